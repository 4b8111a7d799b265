"""What the hosts of a scheduler and of an agent have in common: the workers of a machine, leases, ends.

The forker is forked first, before there is a zmq context, whose threads and sockets it should not have.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final

from scaler_executor.protocol import link
from scaler_executor.protocol import scheduler as scheduler_protocol
from scaler_executor.runtime import platform
from scaler_executor.runtime.forker_start import start_forker_by_fork
from scaler_executor.runtime.identity import Identity
from scaler_executor.runtime.loop import Loop
from scaler_executor.runtime.signals import watch_signals
from scaler_executor.runtime.worker_config import WorkerConfig

#: Silence after which an agent counts as dead: it has stopped its calls by then, and a cut that is shorter than
#: `scheduler.FENCE_S` is over.
AGENT_LEASE_S: Final = scheduler_protocol.FENCE_S + link.LEASE_ALLOWANCE_S
#: Silence after which a client's calls are dropped.
CLIENT_LEASE_S: Final = 60.0
#: How long the last words may take to arrive.
LAST_WORDS_S: Final = 2.0

EXIT_STOPPED: Final = 1


def python_version() -> str:
    """Return what two processes must have in common to read each other's pickles."""
    major, minor = sys.version_info[:2]
    free_threaded = "t" if "t" in getattr(sys, "abiflags", "") else ""
    return f"{major}.{minor}{free_threaded}"


class Workers:
    """The workers of this machine: the forker, and what starts another one in its place.

    Args:
        count: So many at once; 0: none.
        preload: Modules that workers find imported.
    """

    def __init__(self, count: int, preload: Sequence[str]) -> None:
        self.count = count
        self._preload = list(preload)
        #: Forkers that are not reaped.
        self._pids: set[int] = set()
        self.control = self.start_forker()

    def start_forker(self) -> socket.socket | None:
        """Fork the forker from this process."""
        if not self.count:
            return None
        config = WorkerConfig(
            workers=self.count,
            sys_path=list(sys.path),
            argv=list(sys.argv[:1]),
            identity=Identity(parent_pid=os.getpid(), start_method="spawn", authkey=os.urandom(32)),
            preload=[*self._preload, "logging"],
            taken_streams=(1, 2),
            passes_on_logs=True,
        )
        pid, control = start_forker_by_fork(config, [fd for fd in platform.open_descriptors() if fd > 2])
        self._pids.add(pid)
        return control

    def reap(self) -> None:
        """Take note of all children that have ended: forkers and, where this is process 1 of a container, whatever
        has lost its parent there."""
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._pids.discard(pid)

    def join(self) -> None:
        """Wait until the forkers have ended, which they do when they are let go."""
        deadline = monotonic() + LAST_WORDS_S
        for pid in self._pids:
            platform.has_child_ended(pid, max(0.0, deadline - monotonic()))


def watch_ends(loop: Loop, workers: Workers, drain: Callable[[], None], stop: Callable[[], None]) -> None:
    """Have the first SIGINT or SIGTERM drain and the second one stop, and reap what ends."""
    steps = iter([drain])

    def end() -> None:
        next(steps, stop)()

    watch_signals(loop, {signal.SIGINT: end, signal.SIGTERM: end, signal.SIGCHLD: workers.reap})
    workers.reap()  # what ended before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
