"""Where the user's own process shows what it prints, which is where its calls' prints belong."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

_STREAMS: Final = ((1, "stdout"), (2, "stderr"))


def is_shown_elsewhere(stream: Any, fd: int) -> bool:
    """Tell whether what is written to a standard stream goes elsewhere than to its descriptor: into a notebook, a
    test's capture, the client of the call in which this is."""
    if stream is None:
        return False
    try:
        return bool(
            getattr(getattr(stream, "buffer", None), "is_taken", False) or not os.path.sameopenfile(stream.fileno(), fd)
        )
    except (AttributeError, OSError, TypeError, ValueError):
        try:
            os.fstat(fd)
        except OSError:
            return False  # there is no descriptor either: it is closed
        return not getattr(stream, "closed", False)


def taken_streams() -> tuple[int, ...]:
    """Return the descriptors whose streams this process shows elsewhere, as they are now."""
    return tuple(fd for fd, name in _STREAMS if is_shown_elsewhere(getattr(sys, name), fd))


def log_levels() -> dict[str, int]:
    """Return the levels that have been set in this process, by the names of their loggers; "" is the root."""
    logging: Any = sys.modules.get("logging")
    if logging is None:
        return {}
    levels = {"": int(logging.root.level)}
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if getattr(logger, "level", 0):
            levels[name] = int(logger.level)
    return levels
