"""What the calls of a worker print and log, seen from inside: a copy of it goes into the ring of `output_ring`.

A stream is either *left* where it goes, or *taken*. One that is left, since the user's own output goes there as well,
writes what it always wrote, at the same moments, but only whole lines unless it is flushed: other workers write there
too. One that is taken, since the user looks elsewhere, writes into the ring alone, and the client shows it. What C code
and programs that a call starts write to the descriptors goes there in any case.

Where standard error is taken and the process is no fork of the user's, records of logging go to the user's own logging,
as far as nothing in the worker has set up another way: they take the place of what logging writes to stderr by itself.
"""

from __future__ import annotations

import io
import os
import select
import stat
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from scaler_executor.protocol.page import OUTPUT_BYTES, OUTPUT_END, OUTPUT_READ, OUTPUT_WATCHED, RANG
from scaler_executor.protocol.printed import FLUSHED, LOG, STDERR, STDOUT, LogRecord
from scaler_executor.runtime.last_words import LastWords
from scaler_executor.runtime.output_ring import OutputWriter

#: A message of logging is cut to this, and so is its traceback.
MAX_LOG_CHARACTERS: Final = 1 << 14
#: What others write to a full pipe comes between two writes, and within one that is larger than this.
_WHOLE_BYTES: Final = select.PIPE_BUF

_STREAMS: Final = ((STDOUT, "stdout"), (STDERR, "stderr"))


class WorkerOutput:
    """The streams of one worker.

    Args:
        page: The worker's page.
        ring_bell: Wakes the agent.
        last_words: Is told what is written to a stderr that is taken.
    """

    def __init__(self, page: memoryview, ring_bell: Callable[[], None], last_words: LastWords) -> None:
        self._page = page
        self._ring_bell = ring_bell
        self.last_words = last_words
        self._writer = OutputWriter(page, self._announce)
        #: Begins of lines that are not written yet, of streams that are left.
        self._held: list[_WholeLines] = []
        #: A stdout that is left and buffers text by itself, with how much of it.
        self._texts: list[tuple[Any, int]] = []

    @property
    def is_off(self) -> bool:
        """Whether this is a child that a call forked: it is on its own."""
        return self._writer.is_off

    def take_over(self, taken: Collection[int]) -> None:
        """Take the streams of these descriptors, and copy what is written to others."""
        for kind, name in _STREAMS:
            stream = getattr(sys, name)
            if kind in taken:
                replacement = io.TextIOWrapper(
                    TakenStream(self, kind, f"<{name}>"),
                    encoding="utf-8",
                    errors="backslashreplace",
                    write_through=True,
                )
                setattr(sys, name, replacement)
                if getattr(sys, f"__{name}__") is stream:
                    setattr(sys, f"__{name}__", replacement)
                _redirect_handlers(stream, replacement)
            elif stream is not None:
                try:
                    self._copy(kind, stream)
                except (AttributeError, OSError, TypeError, ValueError):
                    pass  # an object of the user's own kind, or closed

    def add(self, kind: int, data: bytes, *, is_taken: bool) -> None:
        """Add what was written to a stream."""
        if kind & ~FLUSHED != STDOUT:
            self.hand_down()  # it was printed before
        self._writer.add(kind, data, waits=is_taken)
        page = self._page
        if not page[OUTPUT_WATCHED] and (is_taken or page[OUTPUT_END] - page[OUTPUT_READ] > OUTPUT_BYTES // 2):
            self._announce()

    def hand_down(self) -> None:
        """Copy what a stdout that is left still holds as text. To be done before the result of a call is written.

        It is not flushed: that would take a system call.
        """
        for stream, chunk_characters in self._texts:
            try:
                stream._CHUNK_SIZE = 1
                stream.write("")
                stream._CHUNK_SIZE = chunk_characters
            except Exception:
                pass  # closed or full: neither is the call's result; what interrupts the call goes on

    def leave(self) -> None:
        """In a child that a call forked: nothing of this is its own."""
        self._writer.is_off = True
        for held in self._held:
            held.begun = b""

    def _announce(self) -> None:
        if not self._page[RANG] and not self._writer.is_off:
            self._page[RANG] = 1
            self._ring_bell()

    def _copy(self, kind: int, stream: Any) -> None:
        """Copy from now on what is written to a stream that is left where it goes."""
        buffer = stream.buffer
        is_buffered = isinstance(buffer, io.BufferedWriter)
        if kind == STDOUT and is_buffered and _buffers_text(stream):
            # Copied with what it hands down, a chunk or what there is when it is flushed: as fast as without a copy.
            stream.flush()
            self._texts.append((stream, stream._CHUNK_SIZE))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(write_through=True)  # so that the buffer has at once what a call writes
        write, add = buffer.write, self._writer.add
        is_begun = False

        def write_and_copy(data: Any) -> Any:
            nonlocal is_begun
            written = write(data)
            if written:
                copy = bytes(data) if is_buffered else bytes(memoryview(data)[:written])
                is_begun = copy[-1:] != b"\n"
                self.add(kind, copy, is_taken=False)
            return written

        whole: _WholeLines | None = None
        if kind == STDOUT and is_buffered and not stream.line_buffering:
            whole = _WholeLines(buffer.raw)
            self._held.append(whole)

        def flushing(flush: Callable[[], None]) -> Callable[[], None]:
            def flush_all() -> None:
                nonlocal is_begun
                flush()
                if whole is not None and whole.begun:
                    whole.write_begun()
                if is_begun:
                    is_begun = False
                    add(kind | FLUSHED, b"")

            return flush_all

        buffer.write = write_and_copy
        buffer.flush = flushing(buffer.flush)
        if stream is not buffer:
            stream.flush = flushing(stream.flush)


def _buffers_text(stream: Any) -> bool:
    """Return whether a stream keeps text for a while, and can be made to hand it down by `WorkerOutput.hand_down`."""
    return (
        type(stream) is io.TextIOWrapper
        and not stream.line_buffering
        and not stream.write_through
        and hasattr(stream, "_CHUNK_SIZE")
        and not "".encode(stream.encoding)  # a byte order mark
    )


class _WholeLines:
    """The lowest layer of a stream that is left where it goes: has whole lines written in one go.

    A buffer that is full is written up to its last byte, wherever that is in a line.
    """

    def __init__(self, raw: Any) -> None:
        self._write = raw.write
        #: The begin of a line, until its end is here or the stream is flushed.
        self.begun = b""
        try:
            self._is_pipe = stat.S_ISFIFO(os.fstat(raw.fileno()).st_mode)
        except (OSError, ValueError):
            self._is_pipe = False
        raw.write = self.write

    def write(self, data: Any) -> int | None:
        """As `io.RawIOBase.write`."""
        begun = self.begun
        lines = begun + bytes(data)
        at, end = 0, lines.rfind(b"\n") + 1
        while at < end:
            stop = end
            if self._is_pipe and end - at > _WHOLE_BYTES:
                stop = lines.rfind(b"\n", at, at + _WHOLE_BYTES) + 1 or lines.index(b"\n", at) + 1
            written = self._write(lines[at:stop])
            if written is None:
                # It is full and does not block.
                self.begun = begun[at:]
                return max(0, at - len(begun)) or None
            at += written
        self.begun = lines[end:]
        return len(lines) - len(begun)

    def write_begun(self) -> None:
        """Write what there is of a line."""
        while self.begun:
            written = self._write(self.begun)
            if not written:
                raise BlockingIOError(11, "write could not complete without blocking", 0)
            self.begun = self.begun[written:]


class TakenStream(io.RawIOBase):
    """What stands below `sys.stdout` or `sys.stderr` of a worker whose client shows what is printed."""

    #: See `streams.is_shown_elsewhere`.
    is_taken: Final = True
    mode: Final = "wb"

    def __init__(self, output: WorkerOutput, kind: int, name: str) -> None:
        self._output = output
        self._kind = kind
        self.name = name
        self._is_begun = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """Return the descriptor, for what is to be started with it."""
        return self._kind

    def write(self, data: Any) -> int:
        text = bytes(data)
        output = self._output
        if output.is_off:
            return os.write(self._kind, text)
        if text:
            self._is_begun = text[-1:] != b"\n"
            if self._kind == STDERR:
                output.last_words.add(text)
            output.add(self._kind, text, is_taken=True)
        return len(text)

    def flush(self) -> None:
        super().flush()
        if self._is_begun:
            self._is_begun = False
            if not self._output.is_off:
                self._output.add(self._kind | FLUSHED, b"", is_taken=True)


def pass_on_logs(output: WorkerOutput) -> None:
    """Send records of logging to the client, as far as nothing else is set up for them."""
    import logging
    import traceback

    import msgspec

    host = os.uname().nodename

    class ClientHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                trace = record.exc_text or ""
                if record.exc_info and not trace:
                    trace = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
                if record.stack_info:
                    trace += ("\n" if trace else "") + record.stack_info
                row = LogRecord(
                    name=record.name,
                    level=int(record.levelno),
                    message=_cut(record.getMessage()),
                    path=record.pathname,
                    line=record.lineno or 0,
                    function=record.funcName or "",
                    created=record.created,
                    process=record.process or 0,
                    process_name=record.processName or "",
                    thread=record.thread or 0,
                    thread_name=record.threadName or "",
                    host=host,
                    trace=_cut(trace),
                )
                output.add(LOG, msgspec.msgpack.encode(row), is_taken=True)
            except Exception:
                self.handleError(record)

    # What serve has set up for itself is not the calls'.
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    # Not a handler of the root logger: then `basicConfig` in a call would do nothing, without a word.
    logging.lastResort = ClientHandler()


def set_log_levels(levels: Mapping[str, int]) -> None:
    """Set the levels that are set in the client, where this process has none."""
    import logging

    for name, level in levels.items():
        logger = logging.getLogger(name or None)
        if logger.level in (logging.NOTSET, logging.WARNING):
            logger.setLevel(level)


def _cut(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_LOG_CHARACTERS else text[:MAX_LOG_CHARACTERS] + "..."


def _redirect_handlers(stream: Any, replacement: Any) -> None:
    """Have what was set up for logging write to the stream that takes the place of another one."""
    logging: Any = sys.modules.get("logging")
    if logging is None or stream is None:
        return
    for reference in list(logging._handlerList):
        handler = reference()
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
            handler.stream = replacement
