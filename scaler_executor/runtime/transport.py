"""Packets over a pair of connected stream sockets, in the layout of `protocol.codec`.

This module knows bytes and lengths, and nothing of messages. Small packets are sliced out of what one `recv` returned;
anything large is received straight into a bytearray of its own size: one copy, and writable for whoever unpickles it.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from scaler_executor.protocol.codec import FRAME_LENGTH, MAX_FRAMES, MAX_HEADER_BYTES, PREFIX, RemoteProtocolError

#: One `recv`. Larger ones cost an mmap each time.
CHUNK_BYTES: Final = 1 << 16
#: A header that is not here whole and is larger than this gets a buffer of its own.
LARGE_BYTES: Final = 1 << 14
#: `read` returns after about so much, for one peer must not starve the others.
READ_BYTES: Final = 1 << 20
_IOV_LIMIT: Final = 64

#: Header and frames.
Packet: TypeAlias = tuple[bytes | bytearray, list[bytearray]]


class PartReader:
    """Fills buffers of known lengths, one behind the other, from a stream that arrives in pieces of any size."""

    __slots__ = ("_at", "_lengths", "_part", "_room", "parts")

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths
        self.parts: list[bytearray] = []
        self._open()

    @property
    def is_done(self) -> bool:
        """Whether every buffer is full."""
        return len(self.parts) == len(self._lengths)

    def feed(self, data: bytes, at: int) -> int:
        """Take what belongs to us from `data[at:]`. Return where the rest begins."""
        while not self.is_done:
            count = min(len(data) - at, len(self._part) - self._at)
            if not count:
                break
            with memoryview(data) as view:
                self._part[self._at : self._at + count] = view[at : at + count]
            at += count
            self._advance(count)
        return at

    def receive(self, readinto: Callable[[memoryview], int]) -> int:
        """Read once into the buffer that is being filled. Return the number of bytes, 0 at the end of the stream."""
        count = readinto(self._room[self._at : self._at + READ_BYTES])
        self._advance(count)
        return count

    def _advance(self, count: int) -> None:
        self._at += count
        if self._at == len(self._part):
            self._room.release()
            self.parts.append(self._part)
            self._open()

    def _open(self) -> None:
        # A buffer is made when its turn comes, so that lengths alone reserve no memory.
        while len(self.parts) < len(self._lengths):
            try:
                self._part = bytearray(self._lengths[len(self.parts)])
            except (MemoryError, OverflowError):
                raise RemoteProtocolError(f"no room for {self._lengths[len(self.parts)]} bytes") from None
            self._at = 0
            if self._part:
                self._room = memoryview(self._part)
                return
            self.parts.append(self._part)


class StreamReader:
    """Reads packets from a socket.

    With a nonblocking one `read` never waits. With a blocking one it waits for the first bytes, and for the rest of a
    large packet; this is how a worker reads.
    """

    __slots__ = ("_large", "_recv", "_recv_into", "_tail", "eof")

    def __init__(self, sock: socket.socket) -> None:
        self._recv = sock.recv
        self._recv_into = sock.recv_into
        #: Bytes of a packet that is not complete yet. Never more than a small header or the lengths of its frames.
        self._tail = b""
        #: The packet that is being received into buffers of its own; then `_tail` is empty.
        self._large: PartReader | None = None
        #: Set when the peer has closed its end, and never cleared.
        self.eof = False

    def read(self) -> list[Packet]:
        """Return the packets that are complete now, perhaps none.

        Raises:
            RemoteProtocolError: The peer does not keep to the layout or its limits.
        """
        packets: list[Packet] = []
        try:
            if self._large is not None and not self._read_large(packets):
                return packets
            data = self._recv(CHUNK_BYTES)
            if not data:
                self.eof = True
                return packets
            self._parse(self._tail + data if self._tail else data, packets)
            if self._large is not None:
                self._read_large(packets)
        except BlockingIOError:
            pass
        except ConnectionError:
            self.eof = True
        return packets

    def _read_large(self, packets: list[Packet]) -> bool:
        """Go on with the large packet. Return whether `read` has budget left for more."""
        large = self._large
        assert large is not None
        budget = READ_BYTES
        while not large.is_done:
            if budget <= 0:
                return False
            count = large.receive(self._recv_into)
            if not count:
                self.eof = True
                return False
            budget -= count
        self._large = None
        packets.append((large.parts[0], large.parts[1:]))
        return not packets

    def _parse(self, data: bytes, packets: list[Packet]) -> None:
        """Take the complete packets out of `data`, keep the rest."""
        at = 0
        end = len(data)
        unpack = PREFIX.unpack_from
        append = packets.append
        while end - at >= 8:
            header_bytes, frame_count = unpack(data, at)
            if not frame_count:
                start = at + 8
                stop = start + header_bytes
                if stop <= end:
                    append((data[start:stop], []))
                    at = stop
                    continue
                if header_bytes <= LARGE_BYTES:
                    break
            if header_bytes > MAX_HEADER_BYTES or frame_count > MAX_FRAMES:
                raise RemoteProtocolError(f"a packet of {header_bytes} header bytes and {frame_count} frames")
            start = at + 8 + FRAME_LENGTH.size * frame_count
            if start > end:
                break
            lengths = [length for (length,) in FRAME_LENGTH.iter_unpack(data[at + 8 : start])]
            large = PartReader([header_bytes, *lengths])
            at = large.feed(data, start)
            if not large.is_done:
                self._large = large
                break
            append((large.parts[0], large.parts[1:]))
        self._tail = data[at:] if at else data


class StreamWriter:
    """Writes packets to a nonblocking socket and keeps what it does not take yet."""

    __slots__ = ("_queue", "_send", "_sendmsg", "pending_bytes")

    def __init__(self, sock: socket.socket) -> None:
        self._send = sock.send
        self._sendmsg = sock.sendmsg
        #: What the socket has not taken; the first may be the rest of a buffer.
        self._queue: deque[Any] = deque()
        #: Total of the above.
        self.pending_bytes = 0

    def send(self, buffers: list[Any]) -> bool:
        """Write the buffers, or keep them in order. Return whether everything has been written.

        Kept buffers are not copied: they must not change until they are written.

        Raises:
            ConnectionError: The peer is gone.
        """
        if self._queue:
            self._queue.extend(buffers)
            self.pending_bytes += sum(map(len, buffers))
            return False
        if len(buffers) == 1:
            (buffer,) = buffers
            try:
                sent = self._send(buffer)
            except BlockingIOError:
                sent = 0
            if sent == len(buffer):
                return True
            self.pending_bytes = len(buffer) - sent
            self._queue.append(memoryview(buffer)[sent:] if sent else buffer)
            return False
        self._queue.extend(buffers)
        self.pending_bytes = sum(map(len, buffers))
        return self.flush()

    def flush(self) -> bool:
        """Write what was kept, as far as the socket takes it. Return whether that was all.

        Raises:
            ConnectionError: The peer is gone.
        """
        queue = self._queue
        while queue:
            vector = [queue[index] for index in range(min(len(queue), _IOV_LIMIT))]
            try:
                sent = self._sendmsg(vector)
            except BlockingIOError:
                return False
            self.pending_bytes -= sent
            for buffer in vector:
                if sent < len(buffer):
                    if sent:
                        queue[0] = memoryview(buffer)[sent:]
                    break
                sent -= len(buffer)
                queue.popleft()
        return True
