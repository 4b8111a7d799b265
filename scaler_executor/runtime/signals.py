"""Signals as events of a loop: nothing runs in the middle of something else."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable

from scaler_executor.runtime.loop import Loop


def watch_signals(loop: Loop, numbers: Iterable[int], on_signal: Callable[[], None]) -> None:
    """Have `on_signal` called by the loop for each of these signals that comes. Once in a process."""
    wanted = frozenset(numbers)
    read_fd, write_fd = os.pipe()
    for fd in (read_fd, write_fd):
        os.set_blocking(fd, False)

    def read() -> None:
        for number in os.read(read_fd, 100):
            if number in wanted:
                on_signal()

    for number in wanted:
        signal.signal(number, _wake)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    loop.watch(read_fd, read)


def _wake(number: int, frame: object) -> None:
    """The wakeup descriptor tells the loop."""
