"""What only Linux has, each call with a portable twin where that is simple.

This module knows system calls and nothing of workers or messages. The environment variable
SCALER_EXECUTOR_PLATFORM=portable forces the twins, so that they are tried on Linux too: a pipe for eventfd, an unlinked
file for memfd, killpg for a signal through a pidfd, and nothing for the prctl calls, without which orphans are only
found by end-of-file. What has no twin yet is pidfd_open, and epoll in the forker.

`prepare` does what must not happen in a forked child, imports above all: another thread of the parent may have held an
import lock at the fork, and in the child nobody releases it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import sys
import time
from typing import Any, Final

from scaler_executor.protocol.page import PAGE_BYTES, PAGE_WORDS

PORTABLE: Final = not sys.platform.startswith("linux") or os.environ.get("SCALER_EXECUTOR_PLATFORM") == "portable"

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_PIDFD_SIGNAL_PROCESS_GROUP: Final = 4  # kernel 6.9
_ONE: Final = (1).to_bytes(8, sys.byteorder)

#: prctl of libc, once `prepare` has found it. Written once.
_prctl: Any = None
#: Whether the kernel signals a process group through a pidfd; cleared for good by the first refusal.
_has_group_flag = not PORTABLE


def prepare() -> None:
    """Load what the calls below need, before a fork (2 to 3 ms, once). Without it the prctl calls do nothing."""
    global _prctl
    if PORTABLE or _prctl is not None:
        return
    try:
        import ctypes

        _prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        _prctl = None  # an interpreter without ctypes: a worker then outlives its forker until it next looks for work


def set_parent_death_signal(number: int, parent: int) -> bool:
    """Have this process signalled when the thread that made it ends. False: `parent` is not its parent any more."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    return os.getppid() == parent


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


def pidfd_open(pid: int) -> int:
    """Return a descriptor that becomes readable when the process ends."""
    return os.pidfd_open(pid)


def signal_process(pidfd: int, number: int) -> bool:
    """Signal one process, never another with a reused pid. Return False if it is gone."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


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
        fd = os.memfd_create("scaler-executor-page", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE_BYTES)
    return fd


def map_page(fd: int) -> memoryview:
    """Return the page's words, shared. The descriptor may be closed then."""
    return memoryview(mmap.mmap(fd, PAGE_BYTES)).cast("q")


def range_buffer(words: memoryview) -> memoryview:
    """Return the range buffer of a mapped page; to be released before the page is unmapped."""
    return memoryview(words.obj)[8 * PAGE_WORDS :]


def unmap_page(words: memoryview) -> None:
    """Give the page back."""
    mapping = words.obj
    words.release()
    assert isinstance(mapping, mmap.mmap)
    mapping.close()


def grow_pipe(fd: int, size_bytes: int) -> None:
    """Make a pipe larger if the kernel lets us: unprivileged users have a budget for that."""
    if PORTABLE:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size_bytes)
    except OSError:
        pass


def is_stopped(pid: int) -> bool:
    """Tell whether a process is stopped, by a signal or by a debugger. A process that is gone is not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return False
    return stat[stat.rindex(b")") + 2 :][:1] in (b"T", b"t")


def cpu_count_usable(*, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> int:
    """Return how many CPUs this process may use: its affinity, or its cgroup's quota rounded up where that is less."""
    if sys.version_info >= (3, 13):
        count = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    if PORTABLE:
        return count
    quotas = [_quota_cpus(group) for group in _cpu_cgroups(proc, cgroup)]
    return max(1, min([count, *[quota for quota in quotas if quota is not None]]))


def _cpu_cgroups(proc: str, cgroup: str) -> list[str]:
    """Return the directories whose quotas bind this process: its group's and those of the groups around it."""
    try:
        with open(f"{proc}/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's and not be there: the mount itself is then its own group.
        mounts = {f"{cgroup}/cpu", f"{cgroup}/{controllers}"} if controllers else {cgroup, f"{cgroup}/unified"}
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):
            groups += ["/".join([mount, *parts[:depth]]) for mount in sorted(mounts)]
    return groups


def _quota_cpus(group: str) -> int | None:
    """Return the quota of one group in CPUs, rounded up, or None if it has none."""
    try:
        try:
            with open(f"{group}/cpu.max") as file:
                quota_us, period_us = file.read().split()
        except FileNotFoundError:
            with open(f"{group}/cpu.cfs_quota_us") as file:
                quota_us = file.read().strip()
            with open(f"{group}/cpu.cfs_period_us") as file:
                period_us = file.read().strip()
        if quota_us == "max" or int(quota_us) <= 0:
            return None
        return -(-int(quota_us) // int(period_us))
    except (OSError, ValueError):
        return None
