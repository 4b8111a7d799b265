"""An event loop: descriptors and one deadline.

This module knows a poller and the monotonic clock, and nothing of what is read or why.

To wake a process on a core that has gone to sleep takes longer than all that we do for a call, and a call crosses four
processes. So where the next event can be expected at once, and a core is free for it, the loop looks for it a little
before it sleeps.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from time import monotonic
from typing import Final

from scaler_executor.runtime.platform import Poller, yield_core

READABLE: Final = select.POLLIN
WRITABLE: Final = select.POLLOUT
#: How long the loop looks before it sleeps, if the last event came in less than twice this.
SPIN_S: Final = 0.0001


class Loop:
    """Calls back when descriptors are ready. Single-threaded."""

    def __init__(self) -> None:
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._poller = Poller()
        self._stopped = False

    def watch(self, fd: int, callback: Callable[[], None], events: int = READABLE) -> None:
        """Have `callback` called when `fd` is ready for `events`, at an error or when its peer is gone. Replaces what
        was watched for."""
        if fd in self._callbacks:
            self._poller.modify(fd, events)
        else:
            self._poller.register(fd, events)
        self._callbacks[fd] = callback

    def forget(self, fd: int) -> None:
        """Stop watching `fd`, before it is closed. Does nothing if it is not watched."""
        if self._callbacks.pop(fd, None) is not None:
            self._poller.unregister(fd)

    def stop(self) -> None:
        """Have `run` return after the callbacks that are due."""
        self._stopped = True

    def run(
        self,
        next_deadline: Callable[[], float | None],
        on_deadline: Callable[[], None],
        before_wait: Callable[[], None],
        may_spin: Callable[[], bool],
    ) -> None:
        """Serve until `stop`.

        Args:
            next_deadline: Returns the time (monotonic) at which `on_deadline` is to be called next, or None.
            on_deadline: Called when that time has come.
            before_wait: Called when the callbacks of one round have returned, to finish what they began.
            may_spin: Tells whether a core is free to wait on without sleep.
        """
        callbacks = self._callbacks
        waited_s = SPIN_S
        while True:
            before_wait()
            if self._stopped:
                self._stopped = False
                break
            deadline = next_deadline()
            began = monotonic()
            ready = self._spin(began + SPIN_S) if waited_s < 2 * SPIN_S and may_spin() else []
            if not ready:
                ready = self._wait(deadline)
            now = monotonic()
            waited_s = now - began
            for fd, _ in ready:
                callback = callbacks.get(fd)
                if callback is not None:  # an earlier callback may have forgotten it
                    callback()
            if deadline is not None and deadline <= now:
                on_deadline()

    def _spin(self, until: float) -> list[tuple[int, int]]:
        """Look until something is ready or the time is over. Whoever else wants this core gets it."""
        poll = self._poller.poll
        ready: list[tuple[int, int]] = poll(0)
        while not ready and monotonic() < until:
            yield_core()
            ready = poll(0)
        return ready

    def _wait(self, deadline: float | None) -> list[tuple[int, int]]:
        """Sleep until something is ready or the deadline has come."""
        if deadline is None:
            return self._poller.poll()  # type: ignore[no-any-return]
        left_s = max(0.0, deadline - monotonic())
        return self._poller.poll(left_s * self._poller.units_per_s)  # type: ignore[no-any-return]
