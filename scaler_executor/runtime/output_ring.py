"""What a worker's calls print, in a ring of the page that it shares with its agent.

It is there whatever becomes of the worker, costs no system call, and is never waited for: what is not read in time is
overwritten, oldest first, and counted. `OutputWriter` is the worker's side, `OutputReader` the agent's.

The ring is a sequence of records; its positions count up for ever. A record begins at a multiple of eight with two
words: size << 8 | kind, and the call's number; then its data. Only the last one grows. The writer moves OUTPUT_FIRST
past a record before it writes there, and OUTPUT_END behind one when all of it stands; so what lies between the two,
looked at before a copy is made and once more afterwards, is whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic, sleep
from typing import Final

from scaler_executor.protocol.page import (
    CURRENT,
    DONE,
    OUTPUT_BYTES,
    OUTPUT_END,
    OUTPUT_FIRST,
    OUTPUT_LOST,
    OUTPUT_READ,
    OUTPUT_START,
)
from scaler_executor.protocol.printed import FLUSHED, LOG, MAX_LOST, STDERR, STDOUT, count_lines

_HEAD_BYTES: Final = 16
#: A record has no more data than this, so that little is overwritten at once.
MAX_RECORD_BYTES: Final = 1 << 12
#: Of what is printed at once so much is kept, the end of it.
MAX_WRITE_BYTES: Final = 1 << 20
#: A writer that may wait does so for this long at most; and if that was in vain, not again for so long.
WAIT_S: Final = 0.05
PAUSE_S: Final = 1.0
_WORDS: Final = OUTPUT_BYTES >> 3

#: Call, kind of `printed`, lines lost before it, data.
OutputRow = tuple[int, int, int, bytes]


class OutputWriter:
    """A worker's side. Thread-safe, also in signal handlers and finalizers.

    Args:
        page: The worker's page.
        announce: Wakes the agent.
    """

    def __init__(self, page: memoryview, announce: Callable[[], None]) -> None:
        self._page = page
        self._announce = announce
        self._ring = memoryview(page.obj)[OUTPUT_START : OUTPUT_START + OUTPUT_BYTES]
        self._words = self._ring.cast("q")
        self._lock = threading.RLock()
        self._is_adding = False
        #: What is printed while something is being added, by the same thread.
        self._later: list[tuple[int, bytes]] = []
        #: The last record: its first word, where its data begins, its kind and number, and up to where it may grow.
        self._head = self._body = self._limit = 0
        self._open = (0, -1)
        #: No wait before this time.
        self._wait_from = 0.0
        #: This is a child that a call forked.
        self.is_off = False

    def add(self, kind: int, data: bytes, *, waits: bool = False) -> None:
        """Add what has been written to a stream.

        Args:
            kind: See `printed`.
            data: A record of LOG as a whole, anything else cut as it comes.
            waits: There is nobody else who sees it: wait a little for room.
        """
        if self.is_off:
            return
        with self._lock:
            if self._is_adding:
                self._later.append((kind, data))
                return
            try:
                self._is_adding = True
                self._add(kind, data, waits)
                while self._later:
                    self._add(*self._later.pop(0), waits)
            finally:
                self._is_adding = False

    def _add(self, kind: int, data: bytes, waits: bool) -> None:
        page = self._page
        current = page[CURRENT]
        seq = current if page[DONE] < current else 0
        end = page[OUTPUT_END]
        size = len(data)
        if self._open == (kind, seq) and end + size <= self._limit:
            # The common case: the last record grows.
            at = end % OUTPUT_BYTES
            if at + size <= OUTPUT_BYTES:
                self._ring[at : at + size] = data
                self._words[self._head] = end + size - self._body << 8 | kind
                page[OUTPUT_END] = end + size
                return
        max_bytes = MAX_WRITE_BYTES if waits else OUTPUT_BYTES // 2
        if size > max_bytes:
            kept = OUTPUT_BYTES // 2
            page[OUTPUT_LOST] += count_lines(data[: size - kept])
            data = data[size - kept :]
        step = len(data) if kind == LOG else MAX_RECORD_BYTES
        for start in range(0, max(1, len(data)), max(1, step)):
            self._begin(kind, seq, data[start : start + step], waits)

    def _begin(self, kind: int, seq: int, data: bytes, waits: bool) -> None:
        """Write another record."""
        page, words = self._page, self._words
        if self._open[0]:
            # A Ctrl-C may have come while it grew: it ends where it is whole.
            words[self._head] = page[OUTPUT_END] - self._body << 8 | self._open[0]
        start = -(-page[OUTPUT_END] // 8) * 8
        end = start + _HEAD_BYTES + len(data)
        # Room for it to grow as well, so that this is looked at once a record.
        limit = start + _HEAD_BYTES + max(len(data), MAX_RECORD_BYTES)
        # What is given up is given up as a whole, also what of a record has not been read.
        beyond = limit + _HEAD_BYTES + MAX_RECORD_BYTES
        if waits and beyond - page[OUTPUT_READ] > OUTPUT_BYTES:
            self._await_room(beyond)
        while limit - page[OUTPUT_FIRST] > OUTPUT_BYTES:
            self._drop_first()
        self._open = (0, -1)
        self._copy(start + _HEAD_BYTES, data)
        self._head = (start >> 3) % _WORDS
        words[self._head] = len(data) << 8 | kind
        words[((start >> 3) + 1) % _WORDS] = seq
        page[OUTPUT_END] = end
        if kind != LOG and not kind & FLUSHED:
            self._body, self._limit = start + _HEAD_BYTES, limit
            self._open = (kind, seq)

    def _drop_first(self) -> None:
        """Give up the oldest record; count what of it was not read."""
        page, words = self._page, self._words
        first, read = page[OUTPUT_FIRST], page[OUTPUT_READ]
        head = words[(first >> 3) % _WORDS]
        start = first + _HEAD_BYTES
        end = start + (head >> 8)
        page[OUTPUT_FIRST] = -(-end // 8) * 8
        if end > read:
            lost = _read_ring(self._ring, max(start, read), end)
            page[OUTPUT_LOST] += 1 if head & 0xFF == LOG else count_lines(lost)

    def _copy(self, start: int, data: bytes) -> None:
        at = start % OUTPUT_BYTES
        first = min(len(data), OUTPUT_BYTES - at)
        self._ring[at : at + first] = data[:first]
        self._ring[: len(data) - first] = data[first:]

    def _await_room(self, end: int) -> None:
        """Wait until there is room up to position `end`, but not for long: the agent may have better things to do."""
        now = monotonic()
        if now < self._wait_from:
            return
        until = now + WAIT_S
        while end - self._page[OUTPUT_READ] > OUTPUT_BYTES:
            self._announce()
            sleep(0.0005)
            if monotonic() > until:
                self._wait_from = monotonic() + PAUSE_S
                return


class OutputReader:
    """The agent's side.

    Args:
        page: The worker's page; not owned.
    """

    __slots__ = ("_head", "_lost", "_page", "_ring", "position")

    def __init__(self, page: memoryview) -> None:
        self._page = page
        self._ring = memoryview(page.obj)[OUTPUT_START : OUTPUT_START + OUTPUT_BYTES]
        #: Up to where it has been read, and where the record begins in which that is: it may have grown since.
        self.position = self._head = 0
        #: Of OUTPUT_LOST, what has been told.
        self._lost = 0

    def read(self) -> list[OutputRow]:
        """Return what has been printed since."""
        page = self._page
        end, first = page[OUTPUT_END], page[OUTPUT_FIRST]
        start, head = max(self.position, first), max(self._head, first)
        if end == self.position:
            return []
        if not 0 <= end - head <= OUTPUT_BYTES or head % 8:
            return self._forget()
        data = _read_ring(self._ring, head, end)
        first = page[OUTPUT_FIRST]
        if first > head:
            # The writer has come this far meanwhile, and has counted what it has overwritten.
            if first >= end:
                first = end
            data = data[first - head :]
            head, start = first, max(start, first)
        told, self._lost = self._lost, page[OUTPUT_LOST]
        lost = self._lost - told
        if not 0 <= lost <= MAX_LOST:
            lost = 0  # user code has written over it: the next one counts from there
        rows: list[OutputRow] = []
        base = head
        while head + _HEAD_BYTES <= end:
            at = head - base
            word = int.from_bytes(data[at : at + 8], "little")
            seq = int.from_bytes(data[at + 8 : at + 16], "little")
            stop = head + _HEAD_BYTES + (word >> 8)
            if word >> 8 > OUTPUT_BYTES or word & 0xFF & ~FLUSHED not in (STDOUT, STDERR, LOG):
                return self._forget()
            self._head = head
            if stop > start or (stop == head + _HEAD_BYTES and head >= start):
                body = data[max(start - base, at + _HEAD_BYTES) : min(stop, end) - base]
                rows.append((seq, word & 0xFF, lost, body))
                lost = 0
            head = -(-stop // 8) * 8
        if lost:
            rows.append((0, 1, lost, b""))
        self.position = page[OUTPUT_READ] = end
        return rows

    def _forget(self) -> list[OutputRow]:
        """User code has written over it: go on behind that, where the next record will begin."""
        self.position = self._page[OUTPUT_READ] = end = self._page[OUTPUT_END]
        self._head = -(-end // 8) * 8
        self._lost = self._page[OUTPUT_LOST]
        return []

    def close(self) -> None:
        """Let go of the page."""
        self._ring.release()


def _read_ring(ring: memoryview, start: int, end: int) -> bytes:
    at, size = start % OUTPUT_BYTES, end - start
    return bytes(ring[at : at + size]) + bytes(ring[: max(0, at + size - OUTPUT_BYTES)])
