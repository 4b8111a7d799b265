"""Whether the interpreter's exit has begun, and what is to be done then.

It is imported along with the executor's class and before any executor is made, for once the exit has begun nothing can
be registered any more. What is to be done it does not know.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

#: Called once, when the main thread has ended and before the interpreter waits for others. Not by `atexit`: that comes
#: later, when no thread can be started any more.
AT_EXIT: Final[list[Callable[[], None]]] = []
_BEGUN: Final = threading.Event()


def has_begun() -> bool:
    return _BEGUN.is_set()


def _exit() -> None:
    _BEGUN.set()
    for call in AT_EXIT:
        call()


try:
    threading._register_atexit(_exit)  # type: ignore[attr-defined]
except RuntimeError:
    _BEGUN.set()
