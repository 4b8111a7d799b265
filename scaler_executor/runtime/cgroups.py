"""How often the kernel has killed a process for want of memory, by its own counters.

Those of the memory cgroup that a process is in, of version 1 or 2, or of the whole machine where there is none. They
say that, and never whom: so what comes of them is a suspicion.
"""

from __future__ import annotations

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
