"""What calls print and log: the streams, and how a log record travels.

Records are data, never pickles: scheduler and agents pass them on without a look, and the client reads no code in them.
"""

from __future__ import annotations

from typing import Final

import msgspec

# Streams: those of `messages.Output`. A record of the ring of the first two may say besides that the call has flushed.
STDOUT: Final = 1
STDERR: Final = 2
LOG: Final = 3  # msgpack of a `LogRecord`, one a row
FLUSHED: Final = 16

#: Lines that are dropped are counted up to here.
MAX_LOST: Final = 1 << 48


class LogRecord(msgspec.Struct, array_like=True):
    """A record of logging, on its way to where it is handled."""

    name: str
    level: int
    message: str
    path: str = ""
    line: int = 0
    function: str = ""
    created: float = 0.0
    process: int = 0
    process_name: str = ""
    thread: int = 0
    thread_name: str = ""
    host: str = ""
    trace: str = ""  # of its exception, and its stack


def count_lines(data: bytes) -> int:
    """Return how many lines are lost with this, the last one whole or not."""
    return data.count(b"\n") + (not data.endswith(b"\n")) if data else 0
