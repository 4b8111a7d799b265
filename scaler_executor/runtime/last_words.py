"""What a call had to say before its worker died: the end of what it wrote to stderr, and the stack at a fatal fault.

Both stand in the page that worker, forker and agent share, so there is nothing to read from a pipe that others may
hold open, nothing to remove, and nothing is done for a call that says nothing. What Python writes to stderr goes where
it always went, and a copy of its last bytes into a ring. What C code, or a program that a call started, writes there is
not copied: it is where the user looks for it, and in no report.

The fault handler of the interpreter writes through a descriptor: one of the page itself, that stands at the right place
in it. Where the user's program has enabled that handler too, the forker shows on stderr what it wrote.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import Any, Final

from scaler_executor.protocol.page import (
    CURRENT,
    FAULT_BYTES,
    FAULT_START,
    ITEM,
    SHOW_FAULT,
    STDERR_BYTES,
    STDERR_COUNT,
    STDERR_ITEM,
    STDERR_SEQ,
    STDERR_START,
)

#: So much of a stack is enough: its innermost frames come first.
MAX_FAULT_CHARACTERS: Final = 4096
#: Frames below this are not the user's.
_OWN_FRAMES: Final = f'File "{os.path.dirname(os.path.abspath(__file__))}{os.sep}'


class LastWords:
    """A worker's side."""

    def __init__(self, page: memoryview) -> None:
        self._page = page
        self._ring = memoryview(page.obj)[STDERR_START : STDERR_START + STDERR_BYTES]

    def copy_stderr(self) -> None:
        """Copy from now on what is written to the streams that are stderr now."""
        streams = {id(stream): stream for stream in (sys.stderr, sys.__stderr__) if stream is not None}
        for stream in streams.values():
            # The lowest layer has what is really written; who has kept one of the others, as logging may, goes through
            # it as well.
            buffer = getattr(stream, "buffer", stream)
            lowest: Any = getattr(buffer, "raw", buffer)
            try:
                lowest.write = self._copying(lowest.write)
            except (AttributeError, TypeError):
                pass  # an object of the user's own kind

    def _copying(self, write: Any) -> Any:
        def write_and_copy(data: Any) -> Any:
            written = write(data)
            if type(written) is int:
                self.add(data.encode("utf-8", "replace") if isinstance(data, str) else memoryview(data)[:written])
            return written

        return write_and_copy

    def add(self, data: Any) -> None:
        """Add to what the call that is in progress has said."""
        page, ring = self._page, self._ring
        if page[STDERR_SEQ] != page[CURRENT] or page[STDERR_ITEM] != page[ITEM]:
            page[STDERR_COUNT] = 0
            page[STDERR_SEQ], page[STDERR_ITEM] = page[CURRENT], page[ITEM]
        count = page[STDERR_COUNT]
        skipped = max(0, len(data) - STDERR_BYTES)
        at = (count + skipped) % STDERR_BYTES
        tail = bytes(data[skipped:])
        first = min(len(tail), STDERR_BYTES - at)
        ring[at : at + first] = tail[:first]
        ring[: len(tail) - first] = tail[first:]
        page[STDERR_COUNT] = count + len(data)

    def text(self) -> str:
        """Return what has been said so far."""
        return stderr_of(self._page, self._page[CURRENT], self._page[ITEM])

    def handle_faults(self, page_fd: int) -> None:
        """Have the stack of a fatal fault written into the page.

        Args:
            page_fd: The page's own descriptor; it stays open.
        """
        is_users = faulthandler.is_enabled()
        self._page[SHOW_FAULT] = is_users
        os.lseek(page_fd, FAULT_START, os.SEEK_SET)
        # All threads if the user is to see it: that is what the user has asked for.
        faulthandler.enable(page_fd, all_threads=is_users)

    def leave_faults(self) -> None:
        """In a process that a call forked: what becomes of it is not the worker's."""
        faulthandler.disable()
        if self._page[SHOW_FAULT]:
            try:
                faulthandler.enable()
            except (AttributeError, OSError, RuntimeError, ValueError):
                pass  # there is no stderr


def stderr_of(page: memoryview, seq: int, item: int) -> str:
    """Return the end of what a call, or an item of a run, has written to stderr; seq 0 is the start of the worker."""
    if (page[STDERR_SEQ], page[STDERR_ITEM]) != (seq, item):
        return ""
    count = page[STDERR_COUNT]
    ring = bytes(memoryview(page.obj)[STDERR_START : STDERR_START + STDERR_BYTES])
    at = count % STDERR_BYTES
    data = ring[at:] + ring[:at] if count > STDERR_BYTES else ring[: max(0, count)]
    text = data.decode("utf-8", "replace")
    if count > STDERR_BYTES:
        # A line that has lost its beginning is left out, unless it is all there is.
        head, _, rest = text.partition("\n")
        text = rest if rest.strip() else head
    return text.strip("\n")


def raw_fault_of(page: memoryview) -> bytes:
    """Return what the fault handler wrote, b"" if there was no fault."""
    return bytes(memoryview(page.obj)[FAULT_START : FAULT_START + FAULT_BYTES]).rstrip(b"\0")


def fault_of(page: memoryview) -> str:
    """Return the user's part of what the fault handler wrote."""
    text = raw_fault_of(page).decode("utf-8", "replace")
    lines = []
    for line in text.splitlines():
        if _OWN_FRAMES in line:
            break
        lines.append(line)
    return "\n".join(lines)[:MAX_FAULT_CHARACTERS].strip("\n")


def show_fault(page: memoryview) -> None:
    """Write on stderr what the fault handler wrote, if the user has asked for that and there is room at once."""
    if not page[SHOW_FAULT]:
        return
    data = raw_fault_of(page)
    try:
        import select

        poller = select.poll()
        poller.register(2, select.POLLOUT)
        while data and any(events & select.POLLOUT for _, events in poller.poll(0)):
            data = data[os.write(2, data[: select.PIPE_BUF]) :]
    except OSError:
        pass
