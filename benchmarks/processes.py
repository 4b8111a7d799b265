"""What the benchmarks ask the kernel about processes: descendants, CPU time, memory; and how they get rid of them."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_INTERVAL_S = 0.003


def descendants(root: int) -> Iterator[int]:
    """Yield the pids of all processes that `root` has started, and those have, and so on."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        parent = int(text.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(stat.parent.name))
    pending = [root]
    while pending:
        found = children.get(pending.pop(), [])
        pending.extend(found)
        yield from found


def cpu_times() -> dict[int, float]:
    """Return {pid: CPU seconds of all its threads} of this process and its descendants.

    Each process has a CPU clock that others may read; unlike the ticks of /proc/<pid>/stat it counts nanoseconds.
    """
    times = {}
    for pid in [os.getpid(), *descendants(os.getpid())]:
        try:
            times[pid] = time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) makes it
        except OSError:
            continue  # it has ended since it was listed
    return times


def pss_bytes(root: int) -> int:
    """Return the memory of a process and its descendants, what several share counted once."""
    total = 0
    for pid in [root, *descendants(root)]:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += 1024 * int(text.partition("\nPss:")[2].split()[0])
    return total


def shared_bytes() -> int:
    """Return what /dev/shm holds, whoever put it there, mapped or not."""
    room = os.statvfs("/dev/shm")
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def watch(root: int, ended: Callable[[], bool]) -> tuple[int, int]:
    """Return the most bytes that `root` and its descendants have and that /dev/shm gains, until `ended` says so."""
    before = shared_bytes()
    peak = peak_shared = 0
    while not ended():
        peak = max(peak, pss_bytes(root))
        peak_shared = max(peak_shared, shared_bytes() - before)
        time.sleep(_INTERVAL_S)
    return peak, peak_shared


def adopt_orphans() -> None:
    """Make this process the parent of those descendants whose own ends before them, so that none gets out of sight."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def await_none_left(patience_s: float) -> list[int]:
    """Wait until this process has no descendant; kill what is there after `patience_s` seconds, and return the pids.

    To be called when nobody else waits for a child of this process.
    """
    deadline_s = time.monotonic() + patience_s
    while left := _living():
        if time.monotonic() > deadline_s:
            _kill(left)
            return left
        time.sleep(0.01)
    return []


def _living() -> list[int]:
    """Reap what has ended and return the descendants that have not."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return []
    return list(descendants(os.getpid()))


def _kill(pids: Iterable[int]) -> None:
    """Kill these, and what they start meanwhile. All are descendants of this process, so no pid is reused."""
    while pids:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.01)
        pids = _living()
