"""What only Linux has, each call with a portable twin.

This module knows system calls and nothing of workers or messages; no other module names what only Linux has. The
environment variable SCALER_EXECUTOR_PLATFORM=portable forces the twins, so that they are tried on Linux too.

| on Linux                | elsewhere                                                                            |
|-------------------------|--------------------------------------------------------------------------------------|
| pidfd, to see an end    | a *lifeline*: a pipe whose write end only the process holds, so that its end closes it |
| pidfd, to signal        | by number: a child until it is reaped, others as long as their lifeline is not closed |
| PR_SET_PDEATHSIG        | a thread that watches the parent's lifeline and `getppid`, and kills its own group    |
| PR_SET_CHILD_SUBREAPER  | nothing: init reaps the orphans                                                      |
| epoll                   | poll                                                                                 |
| eventfd                 | a pipe                                                                               |
| memfd                   | an unlinked file                                                                     |
| F_SETPIPE_SZ            | nothing: the pipe has the size that it has                                           |
| setsid of posix_spawn   | setsid by the program that was started                                               |
| /proc                   | /dev/fd, the mode of a new file, or nothing                                          |

Every descriptor leaks into processes that are forked. The write end of a lifeline is closed by exec, and by Python in
a child that it forks (`_close_in_child`); C code that forks and does not exec keeps it, and then the end of the first
process is not seen by its lifeline. So whoever watches its own parent also asks `getppid` every RESERVE_S. A process
that closes all its descriptors seems to have ended: so the lifelines of workers, which run anybody's code, are only
believed where nothing better is left, after the loss of the forker, which itself learns of their ends by SIGCHLD.

What the twins do not reach without the kernel's help:

- A worker whose forker *and* agent are killed at the same moment, in a call that holds the GIL, lives until it lets go
  of it: no thread of its own comes to run. One that was frozen stays so. If forker or agent is left, it kills them.
- Where a lifeline has leaked as above, the end of a parent is seen within RESERVE_S instead of at once.
- A process that is not a child, a worker after the loss of its forker, is signalled by number as soon as its lifeline
  has been seen open. Between the two it would have to end and its number to come round again.
- What a call has started and left behind belongs to init when the call's process is gone. It is killed with the group,
  but the group counts as gone, and a cancel is confirmed, when init has reaped it: some take their time (2 s).
- A worker has a second thread. Python 3.12 and later warn in a call that forks.
- That a worker is stopped by a debugger, and not by a signal, is not seen.

Before this runs on another system, two more things are needed that have no twin here: SOCK_SEQPACKET, for the forker's
control pair, and `os.waitid`, which Python has on macOS since 3.13.

`prepare` does what must not happen in a forked child, imports above all: another thread of the parent may have held an
import lock at the fork, and in the child nobody releases it.
"""

from __future__ import annotations

import _thread
import fcntl
import mmap
import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from scaler_executor.protocol.page import PAGE_BYTES, RANGE_BYTES, RANGE_START

if TYPE_CHECKING:
    import resource

PORTABLE: Final = not sys.platform.startswith("linux") or os.environ.get("SCALER_EXECUTOR_PLATFORM") == "portable"
#: How often a process asks whether its parent is still there; None: it need not ask.
RESERVE_S: Final[float | None] = 1.0 if PORTABLE else None
#: The descriptors of a worker's own have numbers from here on.
FIRST_OWN_FD: Final = 256
#: Signals by which the kernel reports a fault of the thread itself: it cannot wait, and a handler for it is there to
#: tell of the fault.
FAULTS: Final = frozenset({signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP})

#: What a pair takes before its writer has to wait, as far as the system allows. A thread that comes back from waiting
#: first has to get the interpreter's lock: calls of 10 KB take a quarter less time with this than with the default.
SEND_BUFFER_BYTES: Final = 1 << 20

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_PIDFD_SIGNAL_PROCESS_GROUP: Final = 4  # kernel 6.9
_ONE: Final = (1).to_bytes(8, sys.byteorder)

#: Functions of libc, once `prepare` has found them. Written once.
_fflush: Any = None
_prctl: Any = None
#: Whether the kernel signals a process group through a pidfd; cleared for good by the first refusal.
_has_group_flag = not PORTABLE


def prepare() -> None:
    """Load what the calls below need, before a fork (2 to 3 ms, once). Without it those of libc do nothing."""
    global _fflush, _prctl
    if PORTABLE:
        import tempfile  # noqa: F401 - for `create_page`

        os.close(watch_self())
    if _fflush is not None:
        return
    try:
        import ctypes

        libc = ctypes.CDLL(None)
        if not PORTABLE:
            _prctl = libc.prctl
        _fflush = libc.fflush
    except (ImportError, OSError, AttributeError):
        pass  # an interpreter without ctypes: a worker then outlives its forker until it next looks for work


def flush_c_streams() -> None:
    """Let appear what C code has printed: the end of an interpreter flushes that, and `os._exit` does not."""
    if _fflush is not None:
        _fflush(None)


def become_subreaper() -> None:
    """Make orphaned descendants children of this process, so that it can reap them."""
    if _prctl is not None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def yield_core() -> None:
    """Let whoever waits for this core go first."""
    if PORTABLE:
        time.sleep(0)
    else:
        os.sched_yield()


class Poller:
    """epoll or poll, with level-triggered events that have poll's numbers.

    `poll` is the system's own and takes its timeout in its own unit, since this stands in the innermost loops.
    """

    __slots__ = ("_close", "modify", "poll", "register", "units_per_s", "unregister")

    def __init__(self) -> None:
        poller: Any = select.poll() if PORTABLE else select.epoll()
        self.register = poller.register
        self.modify = poller.modify
        self.unregister = poller.unregister
        self.poll = poller.poll
        #: What `poll` takes for one second. Both round up to milliseconds.
        self.units_per_s = 1000 if PORTABLE else 1
        self._close = None if PORTABLE else poller.close

    def close(self) -> None:
        """Let go of the poller's own descriptor, if it has one."""
        if self._close is not None:
            self._close()


# The ends of processes, and signals

#: Held while a descriptor is made that forked children are to close, so that none is forked in between.
_fork_lock = threading.RLock()
#: {descriptor: its file}: write ends of lifelines, and what else a forked child closes.
_closed_in_children: dict[int, tuple[int, int]] = {}
#: This process's own lifeline: both ends.
_own_lifeline: tuple[int, int] | None = None


def _close_in_child() -> None:
    """In a forked child: let go of the lifelines, which are those of others."""
    global _fork_lock, _own_lifeline
    _fork_lock = threading.RLock()
    for fd, file in _closed_in_children.items():
        if _file_of(fd) == file:  # the program may have closed it, and opened something else
            os.close(fd)
    _closed_in_children.clear()
    _own_lifeline = None


def _file_of(fd: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _close_in_children(fd: int) -> None:
    file = _file_of(fd)
    assert file is not None
    _closed_in_children[fd] = file


if PORTABLE:
    os.register_at_fork(
        before=lambda: _fork_lock.acquire(),
        after_in_parent=lambda: _fork_lock.release(),
        after_in_child=_close_in_child,
    )


def watch_self() -> int:
    """Return a new descriptor that becomes readable, in whatever process it comes to be, when this process ends."""
    global _own_lifeline
    if not PORTABLE:
        return os.pidfd_open(os.getpid())
    with _fork_lock:
        if _own_lifeline is None or any(_closed_in_children.get(fd) != _file_of(fd) for fd in _own_lifeline):
            _own_lifeline = os.pipe()
            for fd in _own_lifeline:
                _close_in_children(fd)
        return os.dup(_own_lifeline[0])


def watch_ancestor(pid: int, lifeline_fd: int) -> int | None:
    """Return a descriptor that becomes readable when the process `pid` ends, None if that cannot be had.

    Args:
        pid: Not this process's child.
        lifeline_fd: What `watch_self` returned there, -1 if it was not passed on.
    """
    if PORTABLE:
        return lifeline_fd if lifeline_fd >= 0 else None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None  # it has just ended


class Lifeline:
    """By which a parent sees the end of a child; made before the child is.

    Args:
        is_spawned: The child is not a fork: it is told of `child_fd` and calls `hold_lifeline`.
    """

    def __init__(self, *, is_spawned: bool = False) -> None:
        #: What the child is to inherit, -1 for nothing.
        self.child_fd = -1
        self._fd = -1
        if PORTABLE:
            with _fork_lock:
                self._fd, self.child_fd = os.pipe()
                if is_spawned:
                    _close_in_children(self.child_fd)

    def watch(self, pid: int) -> int:
        """Return the descriptor that becomes readable when the child ends. It is the caller's."""
        if not PORTABLE:
            return os.pidfd_open(pid)
        fd, self._fd = self._fd, -1
        return fd

    def hold(self) -> None:
        """In the child, a fork: hold the lifeline until the end."""
        if PORTABLE:
            fd, self.child_fd = self.child_fd, -1
            hold_lifeline(fd)
        self.close()

    def close(self) -> None:
        """In the parent: let go of what is left of it here."""
        with _fork_lock:
            for fd in (self._fd, self.child_fd):
                if fd >= 0:
                    _closed_in_children.pop(fd, None)
                    os.close(fd)
            self._fd = self.child_fd = -1


def hold_lifeline(fd: int) -> None:
    """Hold a lifeline, inherited from the parent, until this process ends. Does nothing with -1."""
    if fd >= 0:
        with _fork_lock:
            os.set_inheritable(fd, False)
            _close_in_children(fd)


def die_with_parent(parent: int, lifeline_fd: int) -> bool:
    """Have this process, and where there is only the twin its group, killed when the process that forked it ends.

    Args:
        parent: The number of that process, which has one thread.
        lifeline_fd: What `watch_self` returned there; owned from here on. Only the twin wants it.

    Returns:
        False if it has ended already.
    """
    if PORTABLE:
        # The thread takes no signals: those that the worker handles must find its main thread, in its system call.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            _thread.start_new_thread(_watch_parent, (parent, lifeline_fd))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    elif _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent


def _watch_parent(parent: int, lifeline_fd: int) -> None:
    """Kill this process and its group when the parent has ended: the thread of `die_with_parent`.

    The lifeline only says when to look. A call may have closed it, and its number may be some other file by now.
    """
    assert RESERVE_S is not None
    poller = select.poll()
    poller.register(lifeline_fd, select.POLLIN)
    pause_s = 0.0005
    while os.getppid() == parent:
        if pause_s < RESERVE_S and not poller.poll(RESERVE_S * 1000):
            continue
        # Its descriptors are closed a little before it has ended.
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, RESERVE_S)
    os.killpg(0, signal.SIGKILL)


def has_ended(pidfd: int, timeout_s: float = 0.0) -> bool:
    """Tell whether the process that a descriptor watches has ended, after waiting for that."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def has_child_ended(pid: int, timeout_s: float, pidfd: int = -1) -> bool:
    """Tell whether a child, which is not reaped here or elsewhere, has ended, after waiting for that."""
    if not PORTABLE:
        if pidfd >= 0:
            return has_ended(pidfd, timeout_s)
        pidfd = os.pidfd_open(pid)
        try:
            return has_ended(pidfd, timeout_s)
        finally:
            os.close(pidfd)
    deadline = time.monotonic() + timeout_s
    pause_s = 0.0005
    while True:
        try:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
        except ChildProcessError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.01)


def signal_child(pidfd: int, pid: int, number: int) -> bool:
    """Signal a child that this process, of one thread, has not reaped: so its number is its own. Return False if it is
    gone."""
    try:
        if PORTABLE:
            os.kill(pid, number)
        else:
            signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


def kill_process(pidfd: int, pid: int) -> None:
    """Kill a process, which may be reaped by now, never another with its number. See the top of the file."""
    signal_process(pidfd, pid, signal.SIGKILL)


def signal_process(pidfd: int, pid: int, number: int) -> None:
    """As `kill_process`, with any signal."""
    try:
        if not PORTABLE:
            signal.pidfd_send_signal(pidfd, number)
        elif not has_ended(pidfd):
            os.kill(pid, number)
    except ProcessLookupError:
        pass


def kill_orphan(pidfd: int, pid: int) -> None:
    """Kill a process whose parent has ended, and the group that it leads."""
    if not PORTABLE or not has_ended(pidfd):
        signal_group(pidfd, pid, signal.SIGKILL)
    kill_process(pidfd, pid)


def signal_group(pidfd: int, pid: int, number: int) -> bool:
    """Signal the process group that `pid` leads or led; number 0 only asks. Return False if the group is empty.

    Through the pidfd this is safe even after the leader was reaped. By number it is safe while the leader is a zombie
    or the group has members, since the kernel does not reuse the number then: do not ask again once it was empty.
    """
    global _has_group_flag
    try:
        if _has_group_flag:
            try:
                signal.pidfd_send_signal(pidfd, number, None, _PIDFD_SIGNAL_PROCESS_GROUP)
                return True
            except ProcessLookupError:
                return False
            except OSError:
                _has_group_flag = False
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # members changed their user: there are some, and they are out of reach
    return True


class Bell:
    """Wakes one poller from any process that shares it. `ring` never blocks, and many rings may count as one.

    A write of the eight bytes adds one to an eventfd and stands in a pipe as it is: so the two are used alike, and a
    process that was sent `ring_fd` need not know which it has.
    """

    __slots__ = ("_read_fd", "ring_fd")

    def __init__(self, read_fd: int, ring_fd: int) -> None:
        self._read_fd = read_fd
        self.ring_fd = ring_fd

    @classmethod
    def create(cls) -> Bell:
        """Make a bell, its descriptors not inherited by exec."""
        if not PORTABLE:
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            return cls(fd, fd)
        read_fd, ring_fd = os.pipe()
        os.set_blocking(read_fd, False)
        os.set_blocking(ring_fd, False)
        return cls(read_fd, ring_fd)

    @classmethod
    def for_ringing(cls, ring_fd: int) -> Bell:
        """Return the other side of a bell whose `ring_fd` was inherited or received; it owns that descriptor."""
        return cls(-1, ring_fd)

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._read_fd

    def ring(self) -> None:
        """Wake the poller."""
        try:
            os.write(self.ring_fd, _ONE)
        except (BlockingIOError, BrokenPipeError):
            pass  # it has enough rings to wake up on, or nobody listens

    def clear(self) -> None:
        """Forget the rings so far."""
        try:
            os.read(self._read_fd, 65536)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Close the descriptors."""
        if self._read_fd not in (-1, self.ring_fd):
            os.close(self._read_fd)
        os.close(self.ring_fd)


def create_page() -> int:
    """Return a descriptor of PAGE_BYTES of zeroed memory, to be mapped by whoever is sent it."""
    if PORTABLE:
        import tempfile

        fd, path = tempfile.mkstemp(prefix="scaler-executor-")
        os.unlink(path)
    else:
        fd = os.memfd_create("scaler-executor-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE_BYTES)
    if not PORTABLE:
        try:
            # What writes through the descriptor, the fault handler, goes no further than the page.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        except OSError:
            pass
    return fd


def map_page(fd: int) -> memoryview:
    """Return the page's words, shared. The descriptor may be closed then."""
    return memoryview(mmap.mmap(fd, PAGE_BYTES)).cast("q")


def range_buffer(words: memoryview) -> memoryview:
    """Return the range buffer of a mapped page; to be released before the page is unmapped."""
    return memoryview(words.obj)[RANGE_START : RANGE_START + RANGE_BYTES]


def unmap_page(words: memoryview) -> None:
    """Give the page back."""
    mapping = words.obj
    words.release()
    assert isinstance(mapping, mmap.mmap)
    mapping.close()


def move_away(fd: int) -> int:
    """Give a descriptor a number above those that programs close wholesale or count on, and return that."""
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_OWN_FD)
    except OSError:
        return fd  # so many are not allowed
    os.close(fd)
    return moved


def shared_memory_path() -> str | None:
    """Return the directory for files in memory, None where there is none."""
    path = "/dev/shm"
    return path if os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK) else None


def memory_bytes() -> int:
    """Return how much memory this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def grow_pipe(fd: int, size_bytes: int) -> None:
    """Make a pipe larger if the kernel lets us: unprivileged users have a budget for that."""
    if PORTABLE:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size_bytes)
    except OSError:
        pass


def is_stopped(pid: int) -> bool:
    """Tell whether a process is stopped, by a signal or by a debugger. A process that is gone is not, nor is any where
    only its parent can tell."""
    if PORTABLE:
        return False
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return False
    return stat[stat.rindex(b")") + 2 :][:1] in (b"T", b"t")


def name_process(name: str) -> None:
    """Set what `ps` shows, where that can be set; at most 15 bytes count."""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(name[:15])
    except OSError:
        pass


def open_descriptors() -> list[int]:
    """Return the numbers of the descriptors that this process has open, without the standard ones; perhaps one more
    that is closed by now."""
    return [fd for fd in map(int, os.listdir("/dev/fd" if PORTABLE else "/proc/self/fd")) if fd > 2]


def loaded_libraries() -> list[str]:
    """Return the files that this process has mapped to run code of theirs; none where that cannot be told."""
    try:
        with open("/proc/self/maps", errors="surrogateescape") as file:
            fields = [line.rstrip("\n").split(None, 5) for line in file]
    except OSError:
        return []
    return sorted({line[5] for line in fields if len(line) == 6 and "x" in line[1] and line[5].startswith("/")})


def peak_memory_bytes(usage: resource.struct_rusage) -> int:
    """Return the most memory that a process has had, which only macOS counts in bytes."""
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024


def file_mode_mask() -> int | None:
    """Return this process's umask, None where that cannot be told: to ask for it by setting it would show for a moment
    in the files of other threads."""
    try:
        if PORTABLE:
            return 0o777 & ~_mode_of_new_file()
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    return None


def _mode_of_new_file() -> int:
    """Return which permissions are left of all that a new file asks for. A directory's default ACL would hide it."""
    import tempfile

    # Not `mkstemp`, which asks for its own permissions.
    path = os.path.join(tempfile.gettempdir(), f"scaler-executor-{os.urandom(8).hex()}")
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o777)
    try:
        os.unlink(path)
        return os.fstat(fd).st_mode
    finally:
        os.close(fd)


def usable_cpus() -> list[int]:
    """Return the numbers of the CPUs that this process may use, [] where that cannot be told."""
    return [] if PORTABLE else sorted(os.sched_getaffinity(0))


def use_cpus(cpus: list[int]) -> None:
    """Use no others."""
    if cpus and not PORTABLE:
        os.sched_setaffinity(0, cpus)
