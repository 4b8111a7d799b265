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
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from scaler_executor.runtime import platform

if TYPE_CHECKING:
    from scaler_executor.runtime.namespace import MainDefinitions

#: What the fresh interpreter runs. It imports while this process goes on and its configuration is yet to come. Its own
#: path
#: comes first, so that a user's `calls.py` or `zmq.py` shadows nothing that serve imports; the package itself comes
#: from
#: where this process has it. An empty configuration: the executor could not be made after all.
_BOOT: Final = """\
import os, sys
low = 3
for fd in {inherited!r}:
    os.closerange(low, fd)
    low = fd + 1
os.closerange(low, 1 << 20)
sys.path[:] = [entry for entry in sys.path if entry]
sys.path.insert(0, {package_home!r})
import scaler_executor
del sys.path[0]
try:
    from scaler_executor.runtime.serve import main
except ImportError:
    main = None
import marshal
with open({fd}, "rb") as file:
    # By its length: a process that another thread forks meanwhile may hold the other end.
    size = int.from_bytes(file.read(8), "little")
    config = size and marshal.loads(file.read(size))
if config:
    if main is None:
        sys.path += [entry for entry in config["sys_path"] if entry and entry not in sys.path]
        from scaler_executor.runtime.serve import main
    main(config)
"""


class EmbeddedCluster:
    """A scheduler and workers on this machine, for this process alone.

    Args:
        max_workers: So many workers at once.
        start_method: "fork": workers are forks of this process as it is now. Anything else: of a fresh interpreter.
        initializer, initargs: Run in each worker before its first call.
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
        max_tasks_per_child: int | None,
        cancel_grace_s: float,
    ) -> None:
        self._forker_pid: int | None = None
        is_fork = start_method == "fork"
        placeholders = _fill_standard_descriptors()
        control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) if is_fork else (None, None)
        self.socket, theirs = socket.socketpair()
        client_pidfd = platform.pidfd_open(os.getpid())
        read_fd, write_fd = os.pipe()
        ends = [end for end in (theirs, control, their_control) if end is not None]
        inherited = [theirs.fileno(), client_pidfd, read_fd]
        if their_control is not None:
            inherited.append(their_control.fileno())
        self.death_fd = -1
        is_started = False
        try:
            self._serve_pid = _start_serve(read_fd, inherited)
            self.death_fd = platform.pidfd_open(self._serve_pid)
            # Imported now, while serve starts.
            from scaler_executor.runtime.namespace import MainDefinitions, snapshot

            inherited_main = snapshot() if is_fork else None
            #: What of `__main__` workers have, and what they are to be sent.
            self.main = MainDefinitions(inherited_main)
            initializer_pickle: bytes | None = None
            definitions: list[tuple[str, int, list[Any]]] = []
            if control is not None:
                ours = [client_pidfd, read_fd, write_fd, self.death_fd, self.socket.fileno()]
                ours += [end.fileno() for end in ends if end is not control]
                self._fork_forker(control, initializer, initargs, inherited_main, ours)
            elif initializer is not None:
                initializer_pickle, definitions = _pickle_initializer(initializer, initargs, self.main)
            config = {
                "max_workers": max_workers,
                "max_tasks_per_child": max_tasks_per_child,
                "cancel_grace_s": cancel_grace_s,
                "start_method": start_method,
                "initializer_pickle": initializer_pickle,
                "definitions": definitions,
                "has_initializer": initializer is not None,
                "sys_path": [str(entry) for entry in sys.path],
                "cwd": _working_directory(),
                "argv": [str(argument) for argument in getattr(sys, "argv", [])],
                "socket_fd": theirs.fileno(),
                "control_fd": None if their_control is None else their_control.fileno(),
                "client_pidfd": client_pidfd,
            }
            os.close(read_fd)
            read_fd = -1
            data = marshal.dumps(config)
            _write_all(write_fd, len(data).to_bytes(8, "little") + data)
            is_started = True
        finally:
            for fd in placeholders:
                os.close(fd)
            for fd in (client_pidfd, read_fd, write_fd):
                if fd >= 0:
                    os.close(fd)
            for end in ends:
                end.close()
            if not is_started:
                # Their pairs and the configuration closed, processes that were started for nothing end.
                self.socket.close()
                if self.death_fd >= 0:
                    self.join()
        self.socket.setblocking(False)

    def _fork_forker(
        self,
        control: socket.socket,
        initializer: Callable[..., Any] | None,
        initargs: tuple[Any, ...],
        inherited_main: dict[str, tuple[Any, int]] | None,
        not_inherited: list[int],
    ) -> None:
        from scaler_executor.runtime.forker import fork_forker
        from scaler_executor.runtime.worker import WorkerConfig

        config = WorkerConfig(initializer=initializer, initargs=initargs, inherited_main=inherited_main)
        self._forker_pid = fork_forker(config, control, not_inherited)

    def join(self) -> str:
        """Wait until the processes are gone, reap them and close the descriptors. Return how serve ended, in words."""
        poller = select.poll()
        poller.register(self.death_fd, select.POLLIN)
        poller.poll()
        status = _reap(self._serve_pid)
        if self._forker_pid is not None:
            _reap(self._forker_pid)
            self._forker_pid = None
        self.close()
        if status is None:
            return "the scheduler process has ended"
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


def _reap(pid: int) -> int | None:
    """Wait for a child; return its exit code, negative for a signal, or None if the user's program has reaped it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


def _fill_standard_descriptors() -> list[int]:
    """Open those of descriptors 0 to 2 that are closed, or ours would get these numbers and be taken for a terminal."""
    opened = []
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        opened.append(fd)
    os.close(fd)
    return opened


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None  # it has been removed


def _pickle_initializer(
    initializer: Callable[..., Any], initargs: tuple[Any, ...], main: MainDefinitions
) -> tuple[bytes, list[tuple[str, int, list[Any]]]]:
    """Return the pickle of (initializer, initargs) and the definitions that it needs, as (name, version, buffers)."""
    from scaler_executor.runtime.calls import CallPickler

    names: set[str] = set()
    pickled = CallPickler(main).dumps_in_band((initializer, initargs), names)
    return pickled, [
        (definition.name, definition.version, getattr(definition.payload, "buffers", [definition.payload]))
        for definition in main.needs(names).definitions
    ]


def _write_all(fd: int, data: bytes) -> None:
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
    except BrokenPipeError:
        pass  # it has ended already, as its pidfd says


def _start_serve(config_fd: int, inherited: list[int]) -> int:
    """Start a fresh interpreter with this one's flags. Return its pid.

    Not by subprocess.Popen: that waits until the write end of a pipe of its own is closed everywhere, and a process
    that
    another thread forks at this moment, the forker of another executor say, keeps it open for life.
    """
    import subprocess

    spawn = sys.modules.get("multiprocessing.spawn")
    executable = os.fsdecode((spawn.get_executable() if spawn is not None else None) or sys.executable)
    package_home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    program = _BOOT.format(fd=config_fd, package_home=package_home, inherited=sorted(inherited))
    # A descriptor that is duplicated onto itself stays open in the new process, all others of Python's do not.
    actions: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherited]
    actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
    arguments = [executable, *flags, "-c", program]
    return os.posix_spawn(executable, arguments, os.environ, file_actions=actions, setsid=True)
