"""The queue of a client that gives its calls priorities: higher first, and nobody waits for ever.

Of two calls that are queued, the one of higher priority is taken first, and of equals the one that was queued first.
But so that no call starves, the oldest of all is taken after OVERTAKES calls in a row that were taken before it. That
counts calls and not seconds: where nothing is started nothing can be overtaken either.

A client whose calls all have the same priority has a plain deque instead, see `with_priorities`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final, Generic, Protocol, TypeVar

from scaler_executor.protocol.functions import ReceivedFunction

#: The oldest call of a queue is overtaken by no more than so many others in a row.
OVERTAKES: Final = 64
#: No distinctions are made among more priorities than this.
MAX_RANK: Final = 8


class Queued(Protocol):
    """What stands in a queue. Entries in another state than QUEUED are as good as gone."""

    @property
    def state(self) -> Any: ...

    @property
    def task_id(self) -> int: ...

    @property
    def function(self) -> ReceivedFunction: ...


Q = TypeVar("Q", bound=Queued)


class PriorityQueue(Generic[Q]):
    """Stands where a deque of calls would: it has as much of its interface as is used of a client's queue."""

    def __init__(self, items: Iterable[Q] = ()) -> None:
        #: {priority: its calls, next first}; none of them is empty.
        self._levels: dict[int, deque[Q]] = {}
        #: Those priorities with their signs changed, sorted: so the highest comes first.
        self._order: list[int] = []
        #: The priorities that there have been, sorted.
        self._seen: list[int] = []
        #: How many in a row have been taken while an older one waited.
        self._overtaken = 0
        for item in items:
            self.append(item)

    def append(self, item: Q) -> None:
        """Queue behind its equals."""
        self._level(item).append(item)

    def appendleft(self, item: Q) -> None:
        """Queue in front of its equals."""
        self._level(item).appendleft(item)

    def popleft(self) -> Q:
        """Take the next one."""
        level, is_oldest = self._next()
        self._overtaken = 0 if is_oldest else self._overtaken + 1
        return level.popleft()

    def clear(self) -> None:
        """Forget all."""
        self._levels.clear()
        self._order.clear()
        self._overtaken = 0

    def __getitem__(self, index: int) -> Q:
        """Return the next one, which is number 0."""
        assert index == 0
        return self._next()[0][0]

    def __bool__(self) -> bool:
        return any(self._trim(order) for order in list(self._order))

    def __iter__(self) -> Iterator[Q]:
        for order in self._order:
            yield from self._levels[-order]

    @property
    def rank(self) -> int:
        """How many lower priorities than the highest one here there have been, up to MAX_RANK."""
        return min(bisect_left(self._seen, -self._order[0]), MAX_RANK) if self else 0

    def _level(self, item: Q) -> deque[Q]:
        priority = item.function.function.options.priority
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = deque()
            insort(self._order, -priority)
            rank = bisect_left(self._seen, priority)
            if rank == len(self._seen) or self._seen[rank] != priority:
                self._seen.insert(rank, priority)
        return level

    def _next(self) -> tuple[deque[Q], bool]:
        """Return the level of the next one, and whether no other one is older."""
        found = [level for order in list(self._order) if (level := self._trim(order))]
        oldest = min(found, key=lambda level: level[0].task_id)
        level = oldest if self._overtaken >= OVERTAKES else found[0]
        return level, level is oldest

    def _trim(self, order: int) -> deque[Q] | None:
        """Drop what is gone from the front of a level. Return the rest, if there is one."""
        level = self._levels[-order]
        while level and level[0].state != "QUEUED":
            level.popleft()
        if level:
            return level
        del self._levels[-order]
        self._order.remove(order)
        return None


def with_priorities(queue: deque[Q] | PriorityQueue[Q]) -> PriorityQueue[Q]:
    """Return the queue of a client that has given a call a priority, with what stands in its queue."""
    return queue if isinstance(queue, PriorityQueue) else PriorityQueue(queue)
