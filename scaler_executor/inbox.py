"""What a map has submitted and its consumer has not had yet: ranges of results come in, in any order, and are taken out
in the order of the items or in that in which they came.

The I/O thread puts them in; one consumer takes them out. Nothing here unpickles anything.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import TimeoutError
from typing import TYPE_CHECKING, Final, TypeAlias

from scaler_executor.protocol.client import REST
from scaler_executor.protocol.messages import Payload

if TYPE_CHECKING:
    from scaler_executor.progress import Meter
    from scaler_executor.runtime.terms import Terms

#: Beside the ResultKinds: cancelled; could not be submitted, the payload is the exception.
CANCELLED: Final = -2
REFUSED: Final = -3
#: (number of items, ResultKind or one of the above, payload)
Range: TypeAlias = "tuple[int, int, Payload | str | Exception | None]"
#: Held while the event of a run is made: two threads that clear the executor wait for the same one.
_MAKING_EVENT: Final = threading.Lock()


class MapRun:
    """Items of one map that were submitted together: what has come of them, in ranges that nobody has unpickled yet."""

    __slots__ = ("_inbox", "_left", "_over", "_ranges", "_rest", "items", "seen", "task_no", "terms")

    def __init__(self, items: int, inbox: Inbox) -> None:
        self.items = items
        #: Its number at the scheduler, set when it is submitted.
        self.task_no = 0
        #: See `interfaces.Run`.
        self.terms: Terms | None = None
        #: How often a part of it has been seen running.
        self.seen = 0
        #: Items without an answer. Written by the I/O thread.
        self._left = items
        #: {first: (count, kind, payload)}. Added to by the I/O thread, taken out by the reader, who always asks for the
        #: item behind the last range. Empty where results are wanted in any order.
        self._ranges: dict[int, Range] = {}
        #: What holds for each item that no range has, once the run is over.
        self._rest: tuple[int, Payload | str | None] | None = None
        self._inbox = inbox
        self._over: threading.Event | None = None

    @property
    def is_over(self) -> bool:
        """Whether each item has a result or is cancelled."""
        return self._left == 0

    @property
    def left(self) -> int:
        """Number of items that have no result and are not cancelled."""
        return self._left

    @property
    def over(self) -> threading.Event:
        """Is set when the run is over."""
        with _MAKING_EVENT:
            event = self._over = self._over or threading.Event()
        # Made visible first, then looked at; the I/O thread writes `_left` first and then looks for the event.
        if self._left == 0:
            event.set()
        return event

    def set_items_ready(self, first: int, count: int, kind: int, payload: Payload | str) -> None:
        """Take the results of items [first, first + count); `first` is REST for all that have none yet."""
        self._answer(first, count, kind, payload)

    def set_items_cancelled(self, first: int, count: int) -> None:
        """Note that these items end cancelled; `first` as above."""
        self._answer(first, count, CANCELLED, None)

    def set_running(self) -> None:
        """Note that a part of it has been seen running."""
        self.seen += 1
        self._inbox.running[self] = None

    def take(self, first: int) -> Range | None:
        """Return (count, kind, payload) of the range that begins at item `first`, None if it is not there yet."""
        found = self._ranges.pop(first, None)
        if found is None and self._rest is not None:
            # `_rest` is the last that is written: a range that was written before it is there now.
            found = self._ranges.pop(first, None) or (1, *self._rest)
        return found

    def _answer(self, first: int, count: int, kind: int, payload: Payload | str | None) -> None:
        inbox = self._inbox
        if first == REST:
            count = self._left
            if inbox.is_ordered:
                self._rest = (kind, payload)
            self._left = 0
        else:
            if inbox.is_ordered:
                self._ranges[first] = (count, kind, payload)
            self._left -= count
        inbox.note(self, (count, kind, payload))
        if self._left == 0:
            if inbox.running:
                inbox.running.pop(self, None)
            if self._over is not None:
                self._over.set()


class Inbox:
    """What a map has submitted and its consumer has not had yet, in order; and where the consumer waits.

    Args:
        wake: Called, in any thread, when what the consumer waits for has come; without it `wait` can be used.
        meter: Is told of what comes.
    """

    is_ordered = True

    def __init__(self, wake: Callable[[], object] | None = None, meter: Meter | None = None) -> None:
        self._event = threading.Event()
        self._wake = wake or self._event.set
        self._meter = meter
        #: Those that have been seen running and are not over. Changed by the I/O thread.
        self.running: dict[MapRun, None] = {}
        #: In order. An exception stands for items that could not be submitted.
        self._runs: deque[MapRun | Exception] = deque()
        #: Of the first run, the first item that the consumer has not had.
        self._item = 0
        #: The run that it waits for. Written before the consumer looks at the run for the last time and waits; the I/O
        #: thread writes into the run first and then looks here.
        self._wanted: MapRun | Exception | None = None

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, run: MapRun | Exception) -> None:
        """Add what has been submitted, or could not be."""
        self._runs.append(run)

    def note(self, run: MapRun, found: Range) -> None:
        """Wake the consumer if this is what it waits for. Called by the I/O thread."""
        if self._meter is not None:
            self._meter.count(found[0], found[1])
        if self._wanted is run:
            self._wake()

    def take(self) -> Range | None:
        """Return the next range, None if it is not there yet. Only while there is something in it."""
        run = self._runs[0]
        if isinstance(run, Exception):
            self._runs.popleft()
            return 1, REFUSED, run
        found = run.take(self._item)
        if found is not None:
            self._item += found[0]
            if self._item >= run.items:
                self._runs.popleft()
                self._item = 0
        return found

    def take_or_expect(self) -> Range | None:
        """Take, or be told from now on when there is something."""
        self._wanted = self._runs[0] if self._runs else None
        return self.take() if self._runs else None

    def wait(self, end_time: float | None) -> Range:
        """Return the next range when it is there; raise TimeoutError at `end_time`."""
        try:
            while True:
                self._event.clear()
                found = self.take_or_expect()
                if found is not None:
                    return found
                if end_time is None:
                    self._event.wait()
                elif not self._event.wait(max(0.0, end_time - time.monotonic())):
                    found = self.take()
                    if found is not None:
                        return found
                    raise TimeoutError()
        finally:
            self._wanted = None

    def pending(self) -> list[MapRun]:
        """Return the runs that are not over."""
        return [run for run in list(self._runs) if isinstance(run, MapRun) and not run.is_over]

    def clear(self) -> None:
        """Forget everything."""
        self._runs.clear()


class UnorderedInbox(Inbox):
    """The same, for a consumer who takes results in the order in which they come."""

    is_ordered = False

    def __init__(self, wake: Callable[[], object] | None = None, meter: Meter | None = None) -> None:
        super().__init__(wake, meter)
        #: Added to by the I/O thread, taken from by the consumer.
        self._arrived: deque[tuple[MapRun | None, Range]] = deque()
        #: {run: items that the consumer has not had}
        self._open: dict[MapRun, int] = {}
        self._is_wanted = False

    def __bool__(self) -> bool:
        return bool(self._open or self._arrived)

    def add(self, run: MapRun | Exception) -> None:
        if isinstance(run, Exception):
            self._arrived.append((None, (1, REFUSED, run)))
        else:
            self._open[run] = run.items

    def note(self, run: MapRun, found: Range) -> None:
        if self._meter is not None:
            self._meter.count(found[0], found[1])
        self._arrived.append((run, found))
        if self._is_wanted:
            self._wake()

    def take(self) -> Range | None:
        if not self._arrived:
            return None
        run, found = self._arrived.popleft()
        if run is not None:
            self._open[run] -= found[0]
            if not self._open[run]:
                del self._open[run]
        return found

    def take_or_expect(self) -> Range | None:
        self._is_wanted = True
        return self.take()

    def wait(self, end_time: float | None) -> Range:
        try:
            return super().wait(end_time)
        finally:
            self._is_wanted = False

    def pending(self) -> list[MapRun]:
        return [run for run in list(self._open) if not run.is_over]

    def clear(self) -> None:
        self._open.clear()
        self._arrived.clear()
