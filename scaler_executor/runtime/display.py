"""What calls printed and logged, in the user's process: shown, and kept with their futures.

`Display` writes to `sys.stdout` and `sys.stderr` and hands records to logging, in a thread of its own, since all of
these may block or run code of the user's. It takes rows from the client's I/O thread, which waits a moment before it
settles a call whose lines are not shown yet; but not for ever, nor twice in a row, nor for more than a small part of
its time: whoever is slow to read what he is shown holds up nobody, and is told how much he has missed. `CallLog` is the
end of what one call wrote.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from scaler_executor.protocol.printed import LOG, STDOUT, LogRecord, count_lines

#: The log of a future has so many characters, the last ones.
MAX_LOG_CHARACTERS: Final = 1 << 16
#: So much waits to be shown, and each piece of it counts for so much besides its text.
MAX_WAITING_CHARACTERS: Final = 4 << 20
ITEM_CHARACTERS: Final = 200
#: Of which as much at once as a pipe takes that is said to have room.
WRITE_BYTES: Final = select.PIPE_BUF
#: A call that is over is settled so much later at most, for its lines to be shown first.
SHOW_S: Final = 0.05
#: All of them together so much: at first, and then so much a second.
PATIENCE_S: Final = 0.25
PATIENCE_RATE: Final = 0.05
#: At the end, what is still to be shown is given up when nothing of it could be for so long.
CLOSE_S: Final = 1.0
#: So long may a stream that is stuck hold up whoever forks this process.
FORK_S: Final = 0.5

#: Held while a stream is written to, and by whoever forks this process: the child would find the stream's lock taken.
_WRITING: Final = threading.Lock()
#: Whether the thread that forks has got it.
_fork = threading.local()


class CallLog:
    """What one call has written, the end of it. Written by one thread, read by any."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        #: (lines dropped before it, text), in order. Replaced as a whole, for readers.
        self._parts: tuple[tuple[int, str], ...] = ((0, ""),)

    def add(self, lost: int, text: str) -> None:
        """Add what it has written, and how many lines are missing before that."""
        *parts, last = self._parts
        if lost and last[1]:
            parts += [last, (lost, text)]
        else:
            parts.append((last[0] + lost, last[1] + text))
        if sum(len(part[1]) for part in parts) > 2 * MAX_LOG_CHARACTERS:
            parts = _cut(parts)
        self._parts = tuple(parts)

    def text(self) -> str:
        """Return it, with lines that say how many are missing there."""
        return "".join((mark(lost) if lost else "") + text for lost, text in _cut(list(self._parts)))


def _cut(parts: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Drop what is too much from the front, up to the end of a line if there is one that is near."""
    surplus = sum(len(part[1]) for part in parts) - MAX_LOG_CHARACTERS
    lost = 0
    while surplus > 0:
        before, text = parts.pop(0)
        line_end = text.find("\n", surplus - 1, surplus + MAX_LOG_CHARACTERS // 2)
        at = min(len(text), line_end + 1 if line_end >= 0 else surplus)
        lost += before + count_lines(text[:at].encode("utf-8", "replace"))
        surplus -= at
        if at < len(text):
            parts.insert(0, (lost, text[at:]))
            lost = 0
        elif parts:
            parts[0] = (lost + parts[0][0], parts[0][1])
            lost = 0
    return parts


def mark(lost: int) -> str:
    """Return the line that stands for those that are missing."""
    return f"... {lost:,} {'line' if lost == 1 else 'lines'} dropped\n"


def read_output(stream: int, data: bytes) -> tuple[LogRecord | None, str]:
    """Return what a row says: a record of logging if it is one, and the text of it."""
    if stream != LOG or not data:
        return None, data.decode("utf-8", "replace")
    try:
        record = msgspec.msgpack.decode(data, type=LogRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None, ""  # a call has written over it
    import logging

    text = f"{logging.getLevelName(record.level)}:{record.name}:{record.message}\n"
    return record, text + record.trace + "\n" if record.trace else text


class _Item:
    """Something to be shown: a text for a stream, or a record."""

    __slots__ = ("call_name", "lost", "record", "stream", "text")

    def __init__(self, stream: int, lost: int, text: str, record: LogRecord | None, call_name: str) -> None:
        self.stream = stream
        self.lost = lost
        self.text = text
        self.record = record
        self.call_name = call_name

    @property
    def characters(self) -> int:
        """What it takes of MAX_WAITING_CHARACTERS."""
        return len(self.text) + ITEM_CHARACTERS

    @property
    def lines(self) -> int:
        return self.lost + (1 if self.record is not None else count_lines(self.text.encode("utf-8", "replace")))


class Display:
    """Shows what calls print. `add`, `wait_for` and `close` are for one thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._waiting_characters = 0
        #: Rows that were added, and those that are shown or dropped.
        self._added = self._shown = 0
        #: {no: the last of its rows that was not shown when it was added}
        self._last: dict[int, int] = {}
        #: Nobody waits for what is shown, until all of it is.
        self._is_behind = False
        #: So long may still be waited, as of when.
        self._patience_s = PATIENCE_S
        self._patient_at = time.monotonic()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def add(self, no: int, stream: int, lost: int, text: str, record: LogRecord | None, call_name: str) -> None:
        """Have a row shown soon."""
        if self._is_closing:
            return
        item = _Item(stream, lost, text, record, call_name)
        with self._changed:
            self._items.append(item)
            self._waiting_characters += item.characters
            self._added += 1
            self._last[no] = self._added
            while self._waiting_characters > MAX_WAITING_CHARACTERS and len(self._items) > 1:
                first = self._items.popleft()
                self._waiting_characters -= first.characters
                self._items[0].lost += first.lines
                self._shown += 1
            self._changed.notify_all()
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="scaler-executor-display", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError:
                self._run_here()  # the interpreter ends: no thread can be started any more

    def wait_for(self, tasks: Iterable[int]) -> None:
        """Wait until what these have printed is shown, if that is soon."""
        if not self._last:
            return
        needed = max((self._last.pop(task, 0) for task in tasks), default=0)
        with self._changed:
            if self._shown == self._added:
                self._is_behind = False
                self._last.clear()
            elif self._shown < needed and not self._is_behind:
                self._is_behind = not self._wait(needed)

    def _wait(self, needed: int) -> bool:
        """Wait until so many rows are shown. Return False if that takes too long. Under the lock."""
        start = time.monotonic()
        patience_s = min(PATIENCE_S, self._patience_s + (start - self._patient_at) * PATIENCE_RATE)
        is_shown = self._changed.wait_for(lambda: self._shown >= needed, min(SHOW_S, patience_s))
        self._patient_at = time.monotonic()
        self._patience_s = max(0.0, patience_s - (self._patient_at - start))
        return is_shown

    def close(self) -> None:
        """Wait until all is shown, while there is progress; then show nothing more."""
        with self._changed:
            while self._items or self._shown < self._added:
                shown = self._shown
                if not self._changed.wait_for(lambda shown=shown: self._shown > shown, CLOSE_S):  # type: ignore[misc]
                    break
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    # The thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._is_closing)
                if self._is_closing:
                    return
                items = self._take()
            self._show(items)
            with self._changed:
                self._shown += len(items)
                self._changed.notify_all()

    def _run_here(self) -> None:
        while self._items:
            items = self._take()
            self._show(items)
            self._shown += len(items)

    def _take(self) -> list[_Item]:
        """Take what goes to one stream in one write. Under the lock."""
        items = [self._items.popleft()]
        first = items[0]
        size = len(first.text)
        while (
            first.record is None
            and self._items
            and (following := self._items[0]).record is None
            and following.stream == first.stream
            and not following.lost
            and size + len(following.text) <= WRITE_BYTES
        ):
            items.append(self._items.popleft())
            size += len(following.text)
        self._waiting_characters -= sum(item.characters for item in items)
        return items

    def _show(self, items: list[_Item]) -> None:
        first = items[0]
        try:
            if first.lost:
                self._write(first.stream, mark(first.lost))
            if first.record is not None:
                _handle(first.record, first.call_name)
            else:
                self._write(first.stream, "".join(item.text for item in items))
        except Exception:
            pass  # the stream is closed, or broken, or the user's own: none of that is the calls' affair

    def _write(self, number: int, text: str) -> None:
        stream = sys.stdout if number == STDOUT else sys.stderr
        if stream is None or not text:
            return
        fd = _descriptor_of(stream)
        encoding = getattr(stream, "encoding", None)
        if isinstance(encoding, str) and getattr(stream, "errors", None) in (None, "strict"):
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        for part in _parts(text) if fd is not None else [text]:
            if fd is not None and not self._await_room(fd):
                return
            with _WRITING:
                stream.write(part)
                stream.flush()

    def _await_room(self, fd: int) -> bool:
        """Wait until something can be written, or the end has come. Return whether it can."""
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        while not self._is_closing:
            if poller.poll(100):
                return True
        return False


def _before_fork() -> None:
    _fork.has_lock = _WRITING.acquire(timeout=FORK_S)


def _after_fork() -> None:
    if _fork.has_lock:
        _WRITING.release()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork, after_in_parent=_after_fork)


def _descriptor_of(stream: Any) -> int | None:
    try:
        fd = stream.fileno()
        return fd if isinstance(fd, int) and fd >= 0 and not getattr(stream.buffer, "is_taken", False) else None
    except Exception:
        return None


def _parts(text: str) -> list[str]:
    """Cut a text so that each part can be written at once, at ends of lines where possible."""
    if len(text) * 4 <= WRITE_BYTES or len(text.encode("utf-8", "replace")) <= WRITE_BYTES:
        return [text]
    parts, part, size = [], "", 0
    for line in text.splitlines(keepends=True):
        length = len(line.encode("utf-8", "replace"))
        if part and size + length > WRITE_BYTES:
            parts.append(part)
            part, size = "", 0
        while length > WRITE_BYTES:
            parts.append(line[: WRITE_BYTES // 4])
            line = line[WRITE_BYTES // 4 :]
            length = len(line.encode("utf-8", "replace"))
        part += line
        size += length
    return [*parts, part] if part else parts


def _handle(record: LogRecord, call_name: str) -> None:
    """Hand a record to this process's logging."""
    import logging

    logger = logging.getLogger(record.name)
    if not logger.isEnabledFor(record.level):
        return
    made = logging.makeLogRecord(
        {
            "name": record.name,
            "levelno": record.level,
            "levelname": logging.getLevelName(record.level),
            "msg": record.message,
            "args": None,
            "pathname": record.path,
            "filename": os.path.basename(record.path),
            "module": os.path.splitext(os.path.basename(record.path))[0],
            "lineno": record.line,
            "funcName": record.function,
            "created": record.created,
            "msecs": int(record.created % 1 * 1000) + 0.0,
            "process": record.process,
            "processName": record.process_name,
            "thread": record.thread,
            "threadName": record.thread_name,
            "exc_text": record.trace or None,
            "host": record.host,
            "call_name": call_name,
        }
    )
    logger.handle(made)


__all__ = ["CallLog", "Display", "mark", "read_output"]
