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
from heapq import heapify, heappop, heappush
from typing import Any, Final, Generic, Protocol, TypeVar

from scaler_executor.protocol.functions import ReceivedFunction

#: The oldest call of a queue is overtaken by no more than so many others in a row.
OVERTAKES: Final = 64
#: From this priority on they are those of nested calls, see `scheduler_nesting`: none of them is made to wait for what
#: is older, or there would be ever more calls that wait for them.
NESTED: Final = 1 << 22
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
    """Stands where a deque of calls would: it has as much of its interface as is used of a client's queue.

    Each call may have a priority of its own, so nothing here goes through all priorities.
    """

    def __init__(self, items: Iterable[Q] = ()) -> None:
        #: {priority: its calls, next first}.
        self._levels: dict[int, deque[Q]] = {}
        #: Those priorities, sorted.
        self._order: list[int] = []
        #: A heap of (task_id, priority) with the first one of each level, and with some that are first no more.
        self._firsts: list[tuple[int, int]] = []
        #: The lowest priorities that there have been, sorted.
        self._lowest: list[int] = []
        #: How many in a row have been taken while an older one waited.
        self._overtaken = 0
        for item in items:
            self.append(item)

    def append(self, item: Q) -> None:
        """Queue behind its equals."""
        priority, level = self._level(item)
        level.append(item)
        if len(level) == 1:
            self._note_first(priority, level)

    def appendleft(self, item: Q) -> None:
        """Queue in front of its equals."""
        priority, level = self._level(item)
        level.appendleft(item)
        self._note_first(priority, level)

    def popleft(self) -> Q:
        """Take the next one."""
        priority, is_oldest = self._next()
        if priority < NESTED:
            self._overtaken = 0 if is_oldest else self._overtaken + 1
        level = self._levels[priority]
        item = level.popleft()
        if level:
            self._note_first(priority, level)
        return item

    def clear(self) -> None:
        """Forget all."""
        self._levels.clear()
        self._order.clear()
        self._firsts.clear()
        self._overtaken = 0

    def __getitem__(self, index: int) -> Q:
        """Return the next one, which is number 0."""
        assert index == 0
        return self._levels[self._next()[0]][0]

    def __bool__(self) -> bool:
        while self._order:
            if self._trim(self._order[-1]):
                return True
        return False

    def __iter__(self) -> Iterator[Q]:
        for priority in reversed(self._order):
            yield from self._levels[priority]

    @property
    def rank(self) -> int:
        """How many lower priorities than the highest one here there have been, up to MAX_RANK."""
        return bisect_left(self._lowest, self._order[-1]) if self else 0

    def _level(self, item: Q) -> tuple[int, deque[Q]]:
        priority = item.function.function.options.priority
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = deque()
            insort(self._order, priority)
            if priority not in self._lowest:
                insort(self._lowest, priority)
                del self._lowest[MAX_RANK:]
        return priority, level

    def _note_first(self, priority: int, level: deque[Q]) -> None:
        heappush(self._firsts, (level[0].task_id, priority))
        if len(self._firsts) > 2 * len(self._levels) + MAX_RANK:
            self._firsts = [(level[0].task_id, priority) for priority, level in self._levels.items() if level]
            heapify(self._firsts)

    def _next(self) -> tuple[int, bool]:
        """Return the priority of the next one, and whether no other one is older."""
        has_any = bool(self)
        assert has_any
        if self._order[-1] >= NESTED:
            return self._order[-1], False
        oldest = self._oldest()
        chosen = oldest if self._overtaken >= OVERTAKES else self._order[-1]
        return chosen, chosen == oldest

    def _oldest(self) -> int:
        """Return the priority of the oldest one of the first ones."""
        while True:
            task_id, priority = self._firsts[0]
            level = self._levels.get(priority)
            if level and level[0].task_id == task_id and level[0].state == "QUEUED":
                return priority
            heappop(self._firsts)
            if level and level[0].state != "QUEUED":
                self._trim(priority)

    def _trim(self, priority: int) -> bool:
        """Drop what is gone from the front of a level. Return whether there is a rest."""
        level = self._levels[priority]
        if level and level[0].state == "QUEUED":
            return True
        while level and level[0].state != "QUEUED":
            level.popleft()
        if level:
            self._note_first(priority, level)
            return True
        del self._levels[priority]
        del self._order[bisect_left(self._order, priority)]
        return False


def with_priorities(queue: deque[Q] | PriorityQueue[Q]) -> PriorityQueue[Q]:
    """Return the queue of a client that has given a call a priority, with what stands in its queue."""
    return queue if isinstance(queue, PriorityQueue) else PriorityQueue(queue)
