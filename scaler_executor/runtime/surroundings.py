"""What a process has from the one that started it and may change afterwards: file mode mask, priority, CPUs, limits.

A child of the user's process has them as they were at its start. Serve is started early, so it is told what has changed
until the first call. This module knows the kernel's names for them, and not what they are good for.
"""

from __future__ import annotations

import os
import resource
import time
from typing import Any, Final

from scaler_executor.runtime import platform

_LIMITS: Final = tuple(sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}))


def take() -> dict[str, Any]:
    """Return what holds for this process, in values that marshal takes."""
    return {
        "umask": platform.file_mode_mask(),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "cpus": platform.usable_cpus(),
        **{f"limit {number}": resource.getrlimit(number) for number in _LIMITS},
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what is not as it was, as far as that can be told."""
    return {name: value for name, value in now.items() if value is not None and before.get(name) != value}


def apply(changed: dict[str, Any], environment: dict[str, str] | None) -> None:
    """Make it this process's own, as far as it may: it is not worth a worker that does not start.

    Args:
        changed: See `changes`.
        environment: All variables; None: as they are.
    """
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
        time.tzset()
    for name, value in changed.items():
        try:
            if name == "umask":
                os.umask(value)
            elif name == "priority":
                os.setpriority(os.PRIO_PROCESS, 0, value)
            elif name == "cpus":
                platform.use_cpus(value)
            else:
                resource.setrlimit(int(name.split()[1]), value)
        except (OSError, ValueError):
            pass
