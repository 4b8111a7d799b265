"""What the kernel's control groups say: how many CPUs a process may use, and whether memory has run out.

The counters of kills for want of memory are those of the memory group that a process is in, of version 1 or 2, or of
the whole machine where there is none. They say that something was killed, and never what: so what comes of them is a
suspicion. This module and `platform` alone know the kernel's names for things.
"""

from __future__ import annotations

import os
import sys

from scaler_executor.runtime.platform import PORTABLE


def counter_path(pid: int, *, proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> str | None:
    """Return the file with the counter for a process, which may have ended and not been reaped; None: there is none."""
    if PORTABLE:
        return None
    try:
        with open(f"{proc}/{pid}/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    candidates = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # In a container the path may be the host's and not be there: the mount itself is then its own group.
        if "memory" in controllers.split(","):
            candidates += [f"{cgroup}/{controllers}{at}/memory.oom_control" for at in (path.rstrip("/"), "")]
        elif not controllers:
            mounts = (cgroup, f"{cgroup}/unified")
            candidates += [f"{mount}{at}/memory.events" for at in (path.rstrip("/"), "") for mount in mounts]
    candidates.append(f"{proc}/vmstat")
    return next((path for path in candidates if killed_for_memory(path) is not None), None)


def counter_path_at_end(pid: int, started_with: str | None) -> str | None:
    """As `counter_path`, of a process that has ended and had that one when it started: version 2 still knows what group
    it has moved to, version 1 does not."""
    path = counter_path(pid)
    return path if path is not None and path.endswith("/memory.events") else started_with


def killed_for_memory(path: str | None) -> int | None:
    """Return the counter in a file, None if it has none."""
    if path is None:
        return None
    try:
        with open(path) as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None


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
