"""A worker's side of lending: while calls wait for nested ones, others may run in their place.

A call waits as long as any of its threads does, in `result`, `exception`, `wait`, `as_completed`, the iterator of a
`map`, or `shutdown`: so threads that wait for each other end too. What an event loop awaits counts as such a thread;
whether the loop has something else to do cannot be seen. Who has waited goes on when the call has its slot again; but a
thread goes on at once while others wait, a call at once when it has waited for as long as it would, and a loop always:
it must not be held up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from typing import TypeVar

from scaler_executor.protocol.messages import Blocked, Message, Unblocked
from scaler_executor.runtime.nesting_site import NestingSite

T = TypeVar("T")


class Lender:
    """Says when the call in progress waits, and when it wants to go on. Thread-safe.

    Args:
        site: The worker.
        say: Sends a message to the agent, behind what has been submitted.
    """

    def __init__(self, site: NestingSite, say: Callable[[Message], None]) -> None:
        self._site = site
        self._say = say
        #: Reentrant, for signal handlers.
        self._lock = threading.RLock()
        #: The call whose threads are counted, and how many of them wait.
        self._seq = 0
        self._waiting = 0
        #: One for each slot that is wanted, in order.
        self._wanted: deque[threading.Event] = deque()
        self._is_over = False

    def wait(self, wait: Callable[[], T]) -> T:
        """Return what `wait` returns, which takes its time, and have the call's slot."""
        seq = self._begin()
        try:
            result = wait()
        except (KeyboardInterrupt, TimeoutError, FutureTimeoutError):
            # Its end is near, or what it has waited for has the slot and may keep it for long.
            self._end(seq, at_once=True)
            raise
        except BaseException:
            self._await(self._end(seq))
            raise
        self._await(self._end(seq, at_once=result is False))
        return result

    def begin_await(self) -> Callable[[], object]:
        """The call waits, in an event loop, until what this returns is called."""
        return partial(self._end, self._begin(), at_once=True)

    def granted(self) -> None:
        """The slot that was wanted first is there."""
        with self._lock:
            if self._wanted:
                self._wanted.popleft().set()

    def end(self) -> None:
        """Nobody answers any more."""
        with self._lock:
            self._is_over = True
            while self._wanted:
                self._wanted.popleft().set()

    def _begin(self) -> int:
        with self._lock:
            seq = self._site.seq
            if seq != self._seq:
                self._seq, self._waiting = seq, 0  # threads that earlier calls have left wait for themselves
            if seq:
                self._waiting += 1
                if self._waiting == 1:
                    self._say(Blocked([seq]))
            return seq

    def _end(self, seq: int, *, at_once: bool = False) -> threading.Event | None:
        with self._lock:
            if not seq or seq != self._seq or self._is_over:
                return None
            self._waiting -= 1
            if self._waiting:
                return None
            wanted = threading.Event()
            self._wanted.append(wanted)
            self._say(Unblocked([seq], at_once))
            return None if at_once else wanted

    @staticmethod
    def _await(wanted: threading.Event | None) -> None:
        if wanted is not None:
            wanted.wait()


class LendingEvent(threading.Event):
    """The event of a waiter of `concurrent.futures`, which lends while it is waited for."""

    def __init__(self, lender: Lender) -> None:
        super().__init__()
        self._lender = lender

    def wait(self, timeout: float | None = None) -> bool:
        """As `threading.Event.wait`."""
        if self.is_set() or (timeout is not None and timeout <= 0):
            return super().wait(timeout)
        return self._lender.wait(partial(super().wait, timeout))
