"""The agent's side of a worker's result pipe: records, in the layout of `protocol.page`.

This module knows the records and not what they mean. The worker writes a record before its page leaves the call; so
after a worker's death the pipe holds every finished call, and at most one partial record at its end.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from scaler_executor.protocol.codec import FRAME_LENGTH, MAX_FRAMES, RemoteProtocolError
from scaler_executor.protocol.messages import Frames
from scaler_executor.protocol.page import (
    FLOATS,
    INTEGERS,
    PENDING,
    RANGE_FIRST,
    RANGE_SEQ,
    RECORD,
    RECORD_BYTES,
    RECORD_VALUES,
)
from scaler_executor.protocol.segment import SEGMENT_FRAME, SEGMENT_MARK
from scaler_executor.runtime.platform import range_buffer
from scaler_executor.runtime.transport import PartReader

#: One `read`: what a Linux pipe holds by default.
CHUNK_BYTES: Final = 1 << 16
#: A record that is not here whole and is larger than this gets a buffer of its own.
LARGE_BYTES: Final = 1 << 14

#: Kind, seq, item, payload. The payload is bytes, or Frames if the record has frames.
Record: TypeAlias = tuple[int, int, int, "bytes | Frames"]


class ResultPipe:
    """Reads records from a nonblocking descriptor, which it owns.

    Args:
        fd: The descriptor.
        take_segment: Takes over what the worker has put into a file: writer, number and size in bytes; None: it has
            none.
    """

    __slots__ = ("_fd", "_large", "_large_head", "_marks", "_tail", "_take_segment")

    def __init__(self, fd: int, take_segment: Callable[[int, int, int], Any] | None = None) -> None:
        self._fd = fd
        self._take_segment = take_segment
        os.set_blocking(fd, False)
        #: Bytes of a record that is not complete yet. Never more than a small record or the lengths of its frames.
        self._tail = b""
        #: The record that is being received into buffers of its own, and its kind, seq, item and number of frames;
        #: `_tail` is empty then.
        self._large: PartReader | None = None
        self._large_head = (0, 0, 0, 0)
        #: Those of its frames that name files.
        self._marks: list[int] = []

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    @property
    def is_partial(self) -> bool:
        """Whether a record has come in part: its writer may not ring again for the rest."""
        return self._large is not None or bool(self._tail)

    def has_more(self) -> bool:
        """Tell whether there is something to read."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        return any(events & select.POLLIN for _, events in poller.poll(0))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
        self._fd = -1

    def read(self, max_bytes: int) -> list[Record]:
        """Return the records that are complete after reading at most about `max_bytes`, perhaps none.

        Raises:
            RemoteProtocolError: This is not what a worker writes.
        """
        records: list[Record] = []
        while max_bytes > 0:
            count, more = self._read_once(records)
            max_bytes -= count
            if not more:
                break
        return records

    def drain(self) -> list[Record]:
        """Return all that a dead worker left. A partial record is dropped; end-of-file is not waited for, since a stray
        child may hold the other end.

        Raises:
            RemoteProtocolError: This is not what a worker writes.
        """
        records: list[Record] = []
        more = True
        while more:
            _, more = self._read_once(records)
        self._tail = b""
        self._large = None
        return records

    def _read_once(self, records: list[Record]) -> tuple[int, bool]:
        """Read once. Return the number of bytes and whether there may be more."""
        large = self._large
        try:
            if large is not None:
                count = large.receive(self._readinto)
                if large.is_done:
                    self._finish_large(large, records)
                return count, count > 0
            data = os.read(self._fd, CHUNK_BYTES)
        except BlockingIOError:
            return 0, False
        self._parse(self._tail + data if self._tail else data, records)
        # A short read has emptied the pipe. Asking again would cost a system call each time.
        return len(data), len(data) == CHUNK_BYTES or self._large is not None

    def _readinto(self, room: memoryview) -> int:
        return os.readv(self._fd, [room])

    def _parse(self, data: bytes, records: list[Record]) -> None:
        """Take the complete records out of `data`, keep the rest."""
        at = 0
        end = len(data)
        unpack = RECORD.unpack_from
        append = records.append
        while end - at >= RECORD_BYTES:
            size, seq, item, frame_count, kind = unpack(data, at)
            start = at + RECORD_BYTES
            stop = start + size
            if not frame_count and stop <= end:
                append((kind, seq, item, data[start:stop]))
                at = stop
                continue
            if kind > RECORD_VALUES or frame_count > MAX_FRAMES:
                raise RemoteProtocolError(f"a record of kind {kind} with {frame_count} frames")
            if not frame_count and size <= LARGE_BYTES:
                break
            first = start + FRAME_LENGTH.size * frame_count
            if first > end:
                break
            lengths = [length for (length,) in FRAME_LENGTH.iter_unpack(data[start:first])] if frame_count else [size]
            self._marks = []
            if lengths and max(lengths) >= SEGMENT_MARK:
                self._marks = [index for index, length in enumerate(lengths) if length >= SEGMENT_MARK]
                lengths = [length & ~SEGMENT_MARK for length in lengths]
            if sum(lengths) != stop - first:
                raise RemoteProtocolError(f"a record of {size} bytes with frames of {sum(lengths)}")
            large = PartReader(lengths)
            at = large.feed(data, first)
            self._large_head = (kind, seq, item, frame_count)
            if not large.is_done:
                self._large = large
                break
            self._finish_large(large, records)
        self._tail = data[at:] if at else data

    def _finish_large(self, large: PartReader, records: list[Record]) -> None:
        kind, seq, item, frame_count = self._large_head
        parts: list[Any] = large.parts
        for index in self._marks:
            if self._take_segment is None or len(parts[index]) != SEGMENT_FRAME.size:
                raise RemoteProtocolError("a record with a file that its worker cannot have")
            parts[index] = self._take_segment(*SEGMENT_FRAME.unpack(parts[index]))
        records.append((kind, seq, item, Frames(parts) if frame_count else bytes(parts[0])))
        self._large = None


class WorkerResults:
    """What a worker has said: its pipe, and the range buffer of its page, which together hold each result once.

    Args:
        pipe_fd: The result pipe; owned from here on.
        page: The worker's page; not owned.
        take_segment: As `ResultPipe`.
    """

    __slots__ = ("_page", "_pipe", "_range_buffer", "_taken")

    def __init__(
        self, pipe_fd: int, page: memoryview, take_segment: Callable[[int, int, int], Any] | None = None
    ) -> None:
        self._pipe = ResultPipe(pipe_fd, take_segment)
        self._page = page
        self._range_buffer = range_buffer(page)
        #: What was taken from the range buffer before it came through the pipe: run, first item, items, bytes.
        self._taken = (0, 0, 0, 0)

    @property
    def is_partial(self) -> bool:
        """Whether a record has come in part: its writer may not ring again for the rest."""
        return self._pipe.is_partial

    def fileno(self) -> int:
        """Return the pipe's descriptor."""
        return self._pipe.fileno()

    def read(self, max_bytes: int) -> list[Record]:
        """As `ResultPipe.read`."""
        return self._without_taken(self._pipe.read(max_bytes))

    def drain(self) -> list[Record]:
        """Return everything that a dead worker left."""
        return self._without_taken(self._pipe.drain()) + self.take_range()

    def take_range(self) -> list[Record]:
        """Return the values that stand in the range buffer and were not taken from there before.

        The worker may be alive: what it changes meanwhile is left for later. Read the pipe first, for these come
        behind.
        """
        page = self._page
        before = page[RANGE_SEQ], page[RANGE_FIRST], page[PENDING]
        seq, first, pending = before
        count, used = pending >> 32, pending & 0xFFFFFFFF
        taken_count, taken_bytes = self._taken[2:] if self._taken[:2] == (seq, first) else (0, 0)
        if count <= taken_count:
            return []
        head = _head_of(bytes(self._range_buffer[: len(INTEGERS)])) if taken_bytes else b""
        values = head + bytes(self._range_buffer[taken_bytes:used])
        if (page[RANGE_SEQ], page[RANGE_FIRST], page[PENDING]) != before:
            return []
        if self._pipe.has_more():
            return []  # it went on after the pipe was read: what it wrote since comes before these
        self._taken = (seq, first, count, used)
        body = (count - taken_count).to_bytes(4, "little") + values
        return [(RECORD_VALUES, seq, first + taken_count, body)]

    def _without_taken(self, records: list[Record]) -> list[Record]:
        seq, first, taken_count, taken_bytes = self._taken
        if not taken_count:
            return records
        for index, (kind, *place, body) in enumerate(records):
            if kind == RECORD_VALUES and place == [seq, first]:
                assert isinstance(body, bytes)
                self._taken = (0, 0, 0, 0)
                left = int.from_bytes(body[:4], "little") - taken_count
                values = _head_of(body[4:12]) + body[4 + taken_bytes :]
                rest = (RECORD_VALUES, seq, first + taken_count, left.to_bytes(4, "little") + values)
                records[index : index + 1] = [rest] if left else []
                break
        return records

    def close(self) -> None:
        """Close the pipe and let go of the page."""
        self._pipe.close()
        self._range_buffer.release()


def _head_of(begin: bytes) -> bytes:
    """Return what a part of a range must begin with, given how the whole of it begins."""
    return begin if begin in (INTEGERS, FLOATS) else b""
