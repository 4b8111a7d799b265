"""Which functions the next process already has.

Client to scheduler, scheduler to agent, agent to worker: each hop sends a function before its first use and tells the
receiver to forget it when the sender forgets that it was sent. The sender decides alone, so both always agree, and
neither grows without bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, TypeVar

from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.messages import CallStyle, Function

#: So many functions are remembered at a receiver; a message that needs more may exceed it until the next one.
MAX_FUNCTIONS: Final = 512

#: The highest id.
MAX_FUNCTION_ID: Final = (1 << 40) - 1
#: A client has no more functions than this at a time; its own side remembers `functions.MAX_FUNCTIONS`.
MAX_CLIENT_FUNCTIONS: Final = 100_000
#: Names of peers and functions are cut to so many characters.
MAX_NAME: Final = 1000

K = TypeVar("K")


def check_function(function: Function) -> None:
    """Look at what a client says of a function before an agent relies on it.

    Raises:
        RemoteProtocolError: That cannot be.
    """
    options = function.options
    grace_s = options.cancel_grace_s
    if not (
        0 < function.function_id <= MAX_FUNCTION_ID
        and 0 <= function.style <= max(CallStyle)
        and options.retries >= 0
        and (options.timeout_s is None or options.timeout_s > 0)
        and (grace_s is None or grace_s >= 0)  # which is false for what is not a number
        and len(function.needs) <= MAX_CLIENT_FUNCTIONS
        and 0 not in function.needs
    ):
        raise RemoteProtocolError(f"function {function.function_id} of style {function.style} with {options}")
    if len(function.name) > MAX_NAME:
        function.name = function.name[:MAX_NAME]


class ReceivedFunction:
    """A function as it came from the peer before.

    Args:
        function: The function.
        others: {id: ReceivedFunction} of those that came before it, the definitions that it needs among them.

    Raises:
        RemoteProtocolError: One of these is not there.
    """

    __slots__ = ("function", "function_id", "parts")

    def __init__(self, function: Function, others: Callable[[int], ReceivedFunction | None]) -> None:
        self.function = function
        self.function_id = function.function_id
        parts = []
        for function_id in function.needs:
            needed = others(function_id)
            if needed is None:
                raise RemoteProtocolError(
                    f"function {function.function_id} needs definition {function_id}, which is not known"
                )
            parts.append(needed.function)
        #: What has to be sent before it is called: the definitions, and itself. They stay, also when the peer has
        #: forgotten them since.
        self.parts = (*parts, function) if function.function_id else ()


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
