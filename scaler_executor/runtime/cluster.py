"""Starts the processes of an embedded cluster and sees them off.

Here, and in `runtime.remote`, is where embedded and remote differ: an embedded client starts its own serve process and
holds one end of a pair to it, another one starts a process that leads to a served cluster; what they have in common is
`Cluster`. The serve process is started at once, and imports while its user goes on; the rest waits for the first
call, as ProcessPoolExecutor's processes do: then the forker is forked here where workers are to be forks of the user's
process, and serve is told what workers are to find (sys.path, environment, working directory), as they are then. Where
they are forks of serve's interpreter, and the program has meanwhile set variables that count only at an interpreter's
start, serve begins again with these.

What serve is told (its `config`) goes through a pair of its own: the arguments and the environment of a process can be
read by others.
"""

from __future__ import annotations

import marshal
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from scaler_executor.runtime import platform, spawning, surroundings

if TYPE_CHECKING:
    from scaler_executor.runtime.namespace import MainDefinitions
    from scaler_executor.runtime.segments import SegmentDirectory, SegmentStore

#: What the fresh interpreter runs. It imports while this process goes on and its configuration is yet to come. The
#: standard library comes before PYTHONPATH, and the program's own directory not at all, so that a user's `ctypes.py` or
#: `zmq.py` shadows nothing that serve imports; the package itself comes from where this process has it. No
#: configuration: nobody had a call for it. An environment instead: it begins again with that, as the same process with
#: the same descriptors.
_BOOT: Final = """\
import os, sys
if {calls_setsid} and os.getsid(0) != os.getpid():
    os.setsid()
low = 3
for fd in {inherited!r}:
    os.closerange(low, fd)
    low = fd + 1
os.closerange(low, 1 << 20)
library = os.path.dirname(os.__file__)
sys.path[:] = [entry for entry in sys.path if entry]
sys.path.sort(key=lambda entry: entry not in (library, os.path.join(library, "lib-dynload")))
sys.path.insert(0, {package_home!r})
import scaler_executor
del sys.path[0]
try:
    from scaler_executor.runtime.{module} import main
except ImportError:
    main = None
import marshal, select
poller = select.poll()
poller.register({fd}, select.POLLIN)
poller.register({client_pidfd}, select.POLLIN)
def read(size):
    # By its length, and only while the user's process lives: one that another thread forks meanwhile may hold the other
    # end. Not a byte more: descriptors may come behind it.
    data = bytearray()
    while len(data) < size:
        ready = [fd for fd, _ in poller.poll()]
        part = os.read({fd}, size - len(data)) if {fd} in ready else b""
        if not part:
            sys.exit()
        data += part
    return data
size = int.from_bytes(read(8), "little")
config = marshal.loads(read(size))
if "begin_again_with" in config:
    os.execve(sys.orig_argv[0], sys.orig_argv, config["begin_again_with"])
if main is None:
    sys.path += [entry for entry in config["sys_path"] if entry and entry not in sys.path]
    from scaler_executor.runtime.{module} import main
main(config)
"""


#: How the names of variables begin that an interpreter, its C library or the loader looks at when a process starts.
_LOOKED_AT_START: Final = ("PYTHON", "LC_", "LANG", "LD_", "DYLD_", "MALLOC_", "GLIBC_", "LOCPATH", "GCONV_PATH")


class Cluster:
    """A cluster as a client has it: a process with the other end of a pair, whose end is the end of it.

    Args:
        initializer, initargs: Run in each worker before its first call.
    """

    #: What workers have of `__main__`, and what they are to be sent. Set by whoever inherits from this.
    main: MainDefinitions

    def __init__(self, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...]) -> None:
        self._initializer = initializer
        #: Kept as long as workers may be started: what it holds of multiprocessing must not be collected.
        self._initargs = initargs
        #: Tells it from others, in its workers.
        self.token = os.urandom(8)
        #: Of each call; None: all calls have the same, which the process knows.
        self.cancel_grace_s: float | None = None
        #: So much waits in this process before `submit` does; None: there is no limit.
        self.max_unsent_bytes: int | None = None
        #: Whether another scheduler may take the place of one that is lost.
        self.may_be_renewed = False
        #: Of descriptors 1 and 2, those whose streams the client shows what calls print.
        self.shown_streams: tuple[int, ...] = ()
        #: Whether a client's thread waits for the end: whoever made it does not, then.
        self.has_owner = False
        #: Where large payloads go; None: with their messages.
        self.store: SegmentStore | None = None
        self.death_fd = -1

    def _start_process(self, module: str, *, has_control: bool) -> dict[str, Any]:
        """Start a fresh interpreter that runs `main` of a module here, with the other ends of `socket`, by which it is
        spoken to, of `_config_socket`, and of `_control` if it `has_control`. Return what it is to be told of them."""
        #: The control pair of a forker that is still to be forked: serve's end it has.
        self._control: socket.socket | None = None
        lifeline: platform.Lifeline | None = None
        placeholders = fill_standard_descriptors()
        theirs: list[socket.socket] = []
        client_pidfd = -1
        try:
            self.socket, their_socket = socket.socketpair()
            theirs.append(their_socket)
            for end in (self.socket, their_socket):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, platform.SEND_BUFFER_BYTES)
            self._config_socket, their_config = socket.socketpair()
            theirs.append(their_config)
            if has_control:
                self._control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                theirs.append(their_control)
            client_pidfd = platform.watch_self()
            lifeline = platform.Lifeline(is_spawned=True)
            inherited = [client_pidfd, *(end.fileno() for end in theirs)]
            if lifeline.child_fd >= 0:
                inherited.append(lifeline.child_fd)
            self._pid = start_process(module, their_config.fileno(), client_pidfd, inherited)
            self.death_fd = lifeline.watch(self._pid)
            return {
                "socket_fd": their_socket.fileno(),
                "config_fd": their_config.fileno(),
                "control_fd": theirs[2].fileno() if has_control else None,
                "client_pidfd": client_pidfd,
                "client_pid": os.getpid(),
                "lifeline_fd": lifeline.child_fd,
            }
        except BaseException:
            self.close()  # by which it ends, if there is one
            if hasattr(self, "_pid"):
                reap(self._pid)
            raise
        finally:
            if client_pidfd >= 0:
                os.close(client_pidfd)
            for end in theirs:
                end.close()
            if lifeline is not None:
                lifeline.close()
            for fd in placeholders:
                os.close(fd)

    def _pickle_initializer(self) -> tuple[bytes | None, list[tuple[str, int, list[Any]]]]:
        """Return the pickle of (initializer, initargs), None if there is none, and the definitions that it needs, as
        (name, version, buffers)."""
        if self._initializer is None:
            return None, []
        from scaler_executor.runtime.calls import CallPickler

        names: set[str] = set()
        pickled = CallPickler(self.main).dumps_in_band((self._initializer, self._initargs), names)
        definitions = [
            (definition.name, definition.version, getattr(definition.payload, "buffers", [definition.payload]))
            for definition in self.main.needs(names).definitions
        ]
        return pickled, definitions

    def _await_end(self) -> int | None:
        """Wait until the process is gone and reap it. Return its exit code, see `reap`."""
        poller = select.poll()
        poller.register(self.death_fd, select.POLLIN)
        poller.poll()
        return reap(self._pid)

    def close(self) -> None:
        """Close the descriptors."""
        for name in ("socket", "_config_socket", "_control"):
            end = getattr(self, name, None)
            if end is not None:
                end.close()
        fd, self.death_fd = self.death_fd, -1
        if fd >= 0:
            os.close(fd)


class EmbeddedCluster(Cluster):
    """A scheduler and workers on this machine, for this process alone.

    Args:
        max_workers: So many workers at once.
        start_method: "fork": workers are forks of this process as it is at `start`. Anything else: of a fresh
            interpreter.
        initializer, initargs: Run in each worker before its first call.
        max_tasks_per_child: A worker is replaced after so many calls; None: never.
        cancel_grace_s: Time for a cancelled call to unwind before its process is killed.

    Raises:
        OSError: A process or descriptor could not be made.
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
        super().__init__(initializer, initargs)
        #: Where `store` is; both are None until `start`, and where there is no shared memory.
        self._segments: SegmentDirectory | None = None
        self._forker_pid: int | None = None
        #: Held by `start`, and by `join` when it says that it is too late for that. Reentrant, for signal handlers.
        self._lock = threading.RLock()
        self._is_over = False
        self._environment = dict(os.environ)
        self._surroundings = surroundings.take()
        self._config = self._start_process("serve", has_control=start_method == "fork") | {
            "max_workers": max_workers,
            "max_tasks_per_child": max_tasks_per_child,
            "cancel_grace_s": cancel_grace_s,
            "start_method": start_method,
            "has_initializer": initializer is not None,
        }
        self.socket.setblocking(False)
        try:
            self._import_rest()
        except BaseException:
            self.kill()
            self.join()
            raise

    def _import_rest(self) -> None:
        """Import, while serve starts, what the first call will need: nothing that the program puts into its path until
        then is taken for it."""
        _check_library()
        import scaler_executor.runtime.identity
        import scaler_executor.runtime.segments
        import scaler_executor.runtime.streams
        from scaler_executor.runtime.namespace import MainDefinitions

        self.main = MainDefinitions()
        if self._control is not None:
            import scaler_executor.runtime.forker_start  # noqa: F401 - the fork of it must import nothing

            platform.prepare()

    def start(self) -> None:
        """Have workers started from now on, out of this process as it is now.

        Raises:
            OSError: The forker could not be forked; serve is killed.
            Exception: What pickling the initializer raised, where workers are not forks of this process. It may be
            tried again.
        """
        with self._lock:
            if not self._is_over:
                self._start()

    def _start(self) -> None:
        inherited_main: dict[str, Any] = {}
        if self._control is not None:
            # First of all: a signal handler's call may ask what is inherited.
            from scaler_executor.runtime.namespace import snapshot

            inherited_main = snapshot()
            self.main.inherit(inherited_main)
        from scaler_executor.runtime.identity import authkey
        from scaler_executor.runtime.segments import SegmentDirectory
        from scaler_executor.runtime.streams import log_levels, taken_streams

        self.shown_streams = taken_streams()
        key = authkey()
        if self._segments is None:
            self._segments = SegmentDirectory.create()
        segments_path = self._segments.path if self._segments is not None else None
        environment = dict(os.environ)
        must_begin_again = self._control is None and (
            _looked_at_start(environment) != _looked_at_start(self._environment)
        )
        has_environment = must_begin_again or environment == self._environment
        config: dict[str, Any] = {
            **self._config,
            "sys_path": [str(entry) for entry in sys.path],
            "cwd": _working_directory(),
            "argv": [str(argument) for argument in getattr(sys, "argv", [])],
            "environment": None if has_environment else environment,
            "surroundings": surroundings.changes(self._surroundings, surroundings.take()),
            "blocked_signals": _blocked_signals(),
            "authkey": key,
            "initializer_pickle": None,
            "definitions": [],
            "descriptors": 0,
            "has_tracker": False,
            "segments_path": segments_path,
            "token": self.token,
            "taken_streams": self.shown_streams,
            "log_levels": log_levels() if 2 in self.shown_streams else {},
        }
        descriptors: list[int] = []
        if self._control is None:
            if self._initializer is not None:
                with spawning.pickling_for_workers() as descriptors:
                    config["initializer_pickle"], config["definitions"] = self._pickle_initializer()
            tracker_fd = spawning.tracker_fd()
            if tracker_fd is not None:
                descriptors = [*descriptors, tracker_fd]
            config["has_tracker"] = tracker_fd is not None
            config["descriptors"] = len(descriptors)
        data = frame(config)
        if must_begin_again:
            variables = {os.fsencode(name): os.fsencode(value) for name, value in environment.items()}
            data = frame({"begin_again_with": variables}) + data
        try:
            if self._control is not None:
                self._fork_forker(inherited_main, key, segments_path)
            self._config_socket.sendall(data)
            if descriptors:
                socket.send_fds(self._config_socket, [b"d"], descriptors)
        except ConnectionError:
            pass  # it has ended already, as its pidfd says
        except BaseException:
            self.kill()  # what is half done cannot be done again
            raise
        self._config_socket.close()
        if self._segments is not None:
            self.store = self.main.store = self._segments.store()

    def _fork_forker(self, inherited_main: dict[str, Any], key: bytes, segments_path: str | None) -> None:
        from scaler_executor.runtime.forker_start import fork_forker
        from scaler_executor.runtime.identity import Identity
        from scaler_executor.runtime.worker_config import WorkerConfig

        control, self._control = self._control, None
        assert control is not None
        try:
            config = WorkerConfig(
                workers=self._config["max_workers"],
                initializer=self._initializer,
                initargs=self._initargs,
                inherited_main=inherited_main,
                signal_handlers=_signal_handlers(),
                blocked_signals=_blocked_signals(),
                identity=Identity(parent_pid=os.getpid(), authkey=key),
                segments_path=segments_path,
                token=self.token,
                taken_streams=self.shown_streams,
            )
            # What is this process's alone is closed there by the client's at-fork hook.
            self._forker_pid = fork_forker(config, control, [])
        finally:
            control.close()

    def join(self) -> str:
        """Wait until the processes are gone, reap them and close the descriptors. Return how serve ended, in words."""
        with self._lock:
            self._is_over = True
        self._config_socket.close()  # a serve that nobody had a call for ends by this
        status = self._await_end()
        if self._forker_pid is not None:
            reap(self._forker_pid)
            self._forker_pid = None
        if self._segments is not None:
            self._segments.remove()
        self.close()
        if status is None:
            return "the scheduler process has ended"
        if status < 0:
            return f"the scheduler process was killed by signal {-status}"
        return f"the scheduler process exited with code {status}"

    def close(self) -> None:
        """Close the descriptors."""
        super().close()
        if self._segments is not None:
            self._segments.close()

    def kill(self) -> None:
        """Kill serve, at whose end the forker kills the workers."""
        if self.death_fd >= 0:
            platform.kill_process(self.death_fd, self._pid)


def frame(config: dict[str, Any]) -> bytes:
    data = marshal.dumps(config)
    return len(data).to_bytes(8, "little") + data


def _looked_at_start(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_LOOKED_AT_START)}


def _signal_handlers() -> dict[int, Any]:
    """Return what this process does about signals, where it is not the default.

    SIGINT stops calls, so workers have a handler of their own; a handler that is not Python's is inherited as it is.
    """
    handlers: dict[int, Any] = {}
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if handler is not None and handler != signal.SIG_DFL and number != signal.SIGINT:
            handlers[int(number)] = handler
    return handlers


def _blocked_signals() -> list[int]:
    """Return what this thread blocks, which makes the first call: its children would block it."""
    return [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]


def reap(pid: int) -> int | None:
    """Wait for a child; return its exit code, negative for a signal, or None if the user's program has reaped it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


def _check_library() -> None:
    """Say what is wrong where the user has a file of this name: some use of it would fail, far from here."""
    import msgspec

    if not hasattr(msgspec, "Struct"):
        raise ImportError(
            f"scaler-executor needs the library msgspec; {msgspec.__file__} was imported in its place, because of its "
            "name",
            name="msgspec",
            path=msgspec.__file__,
        )


def fill_standard_descriptors() -> list[int]:
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


def start_process(module: str, config_fd: int, client_pidfd: int, inherited: list[int]) -> int:
    """Start a fresh interpreter with this one's flags, which runs `main` of a module here. Return its pid.

    Not by subprocess.Popen: that waits until the write end of a pipe of its own is closed everywhere, and a process
    that
    another thread forks at this moment, the forker of another executor say, keeps it open for life.
    """
    import subprocess

    spawn = sys.modules.get("multiprocessing.spawn")
    executable = os.fsdecode((spawn.get_executable() if spawn is not None else None) or sys.executable)
    package_home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    program = _BOOT.format(
        module=module,
        fd=config_fd,
        client_pidfd=client_pidfd,
        package_home=package_home,
        inherited=sorted(inherited),
        calls_setsid=platform.PORTABLE,
    )
    # A descriptor that is duplicated onto itself stays open in the new process, all others of Python's do not.
    actions: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in inherited]
    actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
    arguments = [executable, *flags, "-c", program]
    # Where the program itself calls setsid, no Ctrl-C may come before that: it never wants one.
    session: dict[str, Any] = {"setsigmask": [signal.SIGINT]} if platform.PORTABLE else {"setsid": True}
    return os.posix_spawn(executable, arguments, os.environ, file_actions=actions, **session)
