"""Which functions the next process already has.

Client to scheduler, scheduler to agent, agent to worker: each hop sends a function before its first use and tells the
receiver to forget it when the sender forgets that it was sent. The sender decides alone, so both always agree, and
neither grows without bound.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

#: So many functions are remembered at a receiver; a message that needs more may exceed it until the next one.
MAX_FUNCTIONS: Final = 512

K = TypeVar("K")


class KnownFunctions(Generic[K]):
    """The keys of the functions that one receiver has, least recently used first."""

    def __init__(self, limit: int = MAX_FUNCTIONS) -> None:
        self._limit = limit
        self._known: dict[K, None] = {}

    def need(self, key: K) -> bool:
        """Note that the message being made uses `key`. Return whether the function must go with it."""
        known = self._known
        if key in known:
            del known[key]
            known[key] = None
            return False
        known[key] = None
        return True

    def trim(self) -> list[K]:
        """Return what the receiver is to forget after the message that was just made."""
        surplus = len(self._known) - self._limit
        if surplus <= 0:
            return []
        oldest = list(self._known)[:surplus]
        for key in oldest:
            del self._known[key]
        return oldest

    def drop(self, keys: list[K]) -> list[K]:
        """Forget `keys`, for which there is no more use, and return those that the receiver must forget too."""
        return [key for key in keys if self._known.pop(key, 0) is None]
