"""Starts the processes of an embedded cluster and sees them off.

This is the one place where embedded and remote differ: an embedded client starts its own serve process and holds one
end of a pair to it. Where workers are
to be forks of the user's process, the forker is forked here, now, and its control pair is handed to serve.

What serve is told (its `config`) goes through a pipe: the arguments and the environment of a process can be read by
others.
"""

from __future__ import annotations

import marshal
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

from scaler_executor.runtime import platform
from scaler_executor.runtime.calls import CallPickler, main_baseline
from scaler_executor.runtime.forker import start_forker_by_fork
from scaler_executor.runtime.worker import WorkerConfig

#: The interpreter's own path comes first, so that a user's `calls.py` or `zmq.py` shadows nothing that serve imports.
_BOOT: Final = (
    "import sys,marshal\n"
    "with open({fd},'rb') as f: c=marshal.load(f)\n"
    "p=[e for e in sys.path if e]\n"
    "sys.path[:]=p+[e for e in c['sys_path'] if e and e not in p]\n"
    "from scaler_executor.runtime.serve import main\n"
    "main(c)\n"
)


class EmbeddedCluster:
    """A scheduler and workers on this machine, for this process alone.

    Args:
        max_workers: So many workers at once.
        start_method: "fork": workers are forks of this process as it is now. Anything else: of a fresh interpreter.
        initializer, initargs: Run in each worker before its first call.
        mp_context: The multiprocessing context that `start_method` came from, or None.
        max_tasks_per_child: A worker is replaced after so many calls; None: never.
        cancel_grace_s: Time for a cancelled call to unwind before its process is killed.

    Raises:
        OSError: A process or descriptor could not be made.
        Exception: What pickling `initializer` or `initargs` raised, where workers are not forks of this process.
    """

    def __init__(
        self,
        max_workers: int,
        start_method: str,
        initializer: Callable[..., Any] | None,
        initargs: tuple[Any, ...],
        mp_context: Any,
        max_tasks_per_child: int | None,
        cancel_grace_s: float,
    ) -> None:
        is_fork = start_method == "fork"
        platform.prepare()
        pickled = None
        control: socket.socket | None = None
        self._forker_pid: int | None = None
        if is_fork:
            # Before anything else of ours exists here, so that nothing of it is inherited.
            worker_config = WorkerConfig(initializer=initializer, initargs=initargs, baseline=main_baseline())
            self._forker_pid, control = start_forker_by_fork(worker_config)
        elif initializer is not None:
            pickled = CallPickler(None).dumps_in_band((initializer, initargs))
        self.socket, theirs = socket.socketpair()
        client_pidfd = platform.pidfd_open(os.getpid())
        read_fd, write_fd = os.pipe()
        config = {
            "max_workers": max_workers,
            "max_tasks_per_child": max_tasks_per_child,
            "cancel_grace_s": cancel_grace_s,
            "start_method": start_method,
            "initializer_pickle": pickled,
            "has_initializer": initializer is not None,
            "sys_path": [str(entry) for entry in sys.path],
            "cwd": os.getcwd(),
            "argv": [str(argument) for argument in getattr(sys, "argv", [])],
            "socket_fd": theirs.fileno(),
            "control_fd": None if control is None else control.fileno(),
            "client_pidfd": client_pidfd,
        }
        inherited = [theirs.fileno(), client_pidfd, read_fd]
        if control is not None:
            inherited.append(control.fileno())
        try:
            self._process = _start_serve(read_fd, inherited)
            os.close(read_fd)
            read_fd = -1
            self.death_fd = platform.pidfd_open(self._process.pid)
            try:
                with open(write_fd, "wb", closefd=False) as file:
                    marshal.dump(config, file)
            except BrokenPipeError:
                pass  # it has ended already, as `death_fd` says
        finally:
            for fd in (client_pidfd, read_fd, write_fd):
                if fd >= 0:
                    os.close(fd)
            theirs.close()
            if control is not None:
                control.close()  # if serve could not be started this ends the forker
        self.socket.setblocking(False)

    def join(self) -> str:
        """Wait until the processes are gone, reap them and close the descriptors. Return how serve ended, in words."""
        status = self._process.wait()
        if self._forker_pid is not None:
            try:
                os.waitpid(self._forker_pid, 0)
            except ChildProcessError:
                pass  # the user's program has reaped it
            self._forker_pid = None
        self.close()
        if status < 0:
            return f"the scheduler process was killed by signal {-status}"
        return f"the scheduler process exited with code {status}"

    def close(self) -> None:
        """Close the descriptors."""
        self.socket.close()
        if self.death_fd >= 0:
            os.close(self.death_fd)
            self.death_fd = -1

    def kill(self) -> None:
        """Kill serve, at whose end the forker kills the workers."""
        if self.death_fd >= 0:
            platform.signal_process(self.death_fd, signal.SIGKILL)


def _start_serve(config_fd: int, inherited: list[int]) -> Any:
    """Start a fresh interpreter with this one's flags. Return its Popen."""
    import subprocess

    spawn = sys.modules.get("multiprocessing.spawn")
    executable = spawn.get_executable() if spawn is not None else sys.executable
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return subprocess.Popen(
        [os.fsdecode(executable or sys.executable), *flags, "-c", _BOOT.format(fd=config_fd)],
        stdin=subprocess.DEVNULL,
        pass_fds=inherited,
        start_new_session=True,  # a terminal's Ctrl-C is for the user's process alone
    )
