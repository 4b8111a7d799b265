"""Signals as events of a loop: nothing runs in the middle of something else."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scaler_executor.runtime.loop import Loop


def hold_back_signals() -> None:
    """Let SIGINT and SIGTERM wait until they are watched: they end what is just starting neither with a traceback nor,
    as process 1 of a container, which has no default actions, not at all."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])


def watch_signals(loop: Loop, callbacks: Mapping[int, Callable[[], None]]) -> None:
    """Have the loop call back for each of these signals that comes, also if they were held back, or blocked by whoever
    started this process. Once in a process. Several signals of a kind may come as one."""
    read_fd, write_fd = os.pipe()
    for fd in (read_fd, write_fd):
        os.set_blocking(fd, False)

    def read() -> None:
        for number in os.read(read_fd, 100):
            if number in callbacks:
                callbacks[number]()

    for number in callbacks:
        signal.signal(number, _wake)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, callbacks)
    loop.watch(read_fd, read)


def _wake(number: int, frame: object) -> None:
    """The wakeup descriptor tells the loop."""
