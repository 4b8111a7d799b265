"""Packets over socket pairs: any cut, any size, limits, end of the stream."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator

import pytest

from scaler_executor.protocol.codec import FRAME_LENGTH, MAX_FRAMES, MAX_HEADER_BYTES, PREFIX, RemoteProtocolError
from scaler_executor.runtime.transport import READ_BYTES, Packet, StreamReader, StreamWriter


@pytest.fixture
def pair(clean: None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected nonblocking sockets."""
    here, there = socket.socketpair()
    here.setblocking(False)
    there.setblocking(False)
    yield here, there
    here.close()
    there.close()


def packed(header: bytes, frames: list[bytes]) -> list[bytes]:
    lengths = b"".join(FRAME_LENGTH.pack(len(frame)) for frame in frames)
    return [PREFIX.pack(len(header), len(frames)) + lengths + header, *frames]


def some_packets(rng: random.Random) -> list[tuple[bytes, list[bytes]]]:
    def piece(limit: int) -> bytes:
        return rng.randbytes(rng.choice((0, 1, 100, rng.randrange(limit))))

    return [(piece(40_000), [piece(300_000) for _ in range(rng.choice((0, 0, 0, 1, 3)))]) for _ in range(40)]


def plain(packets: list[Packet]) -> list[tuple[bytes, list[bytes]]]:
    return [(bytes(header), [bytes(frame) for frame in frames]) for header, frames in packets]


@pytest.mark.parametrize("seed", range(5))
def test_packets_arrive_as_they_were_sent(pair: tuple[socket.socket, socket.socket], seed: int) -> None:
    """Whatever the sizes and wherever the stream is cut, every packet arrives whole and in order."""
    sent = some_packets(random.Random(seed))
    writer, reader = StreamWriter(pair[0]), StreamReader(pair[1])
    received: list[Packet] = []
    for header, frames in sent:
        writer.send(packed(header, frames))
        received += reader.read()
    while len(received) < len(sent):
        writer.flush()
        received += reader.read()
    assert plain(received) == sent
    assert writer.pending_bytes == 0 and writer.flush()


def test_packets_arrive_byte_by_byte(pair: tuple[socket.socket, socket.socket]) -> None:
    """A packet may come in as many pieces as it has bytes."""
    reader = StreamReader(pair[1])
    received: list[Packet] = []
    for byte in b"".join(packed(b"header", [b"", b"frame", b""]) + packed(b"", []) + packed(b"x", [])):
        pair[0].send(bytes([byte]))
        received += reader.read()
    assert plain(received) == [(b"header", [b"", b"frame", b""]), (b"", []), (b"x", [])]


def test_frames_are_writable(pair: tuple[socket.socket, socket.socket]) -> None:
    """Frames come as bytearrays, so that arrays made of them can be written to."""
    StreamWriter(pair[0]).send(packed(b"h", [b"frame"]))
    assert type(StreamReader(pair[1]).read()[0][1][0]) is bytearray


def test_blocking_reader_waits_for_whole_packets(pair: tuple[socket.socket, socket.socket]) -> None:
    """On a blocking socket reading goes on until a packet is there."""
    for sock in pair:
        sock.setblocking(True)
    sent = packed(b"header", [bytes(3_000_000)])
    thread = threading.Thread(target=lambda: [pair[0].sendall(buffer) for buffer in sent])
    thread.start()
    reader = StreamReader(pair[1])
    received: list[Packet] = []
    while not received:
        received += reader.read()
    thread.join()
    assert len(received[0][1][0]) == 3_000_000


def test_one_read_is_bounded(pair: tuple[socket.socket, socket.socket]) -> None:
    """A peer with a huge packet does not keep the loop: read returns in between."""
    writer, reader = StreamWriter(pair[0]), StreamReader(pair[1])
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * READ_BYTES)
    writer.send(packed(b"header", [bytes(4 * READ_BYTES)]))
    reads = 0
    packets: list[Packet] = []
    while not packets:
        packets = reader.read()
        writer.flush()
        reads += 1
    assert reads >= 4


def test_end_of_stream(pair: tuple[socket.socket, socket.socket]) -> None:
    """What was sent before the end is delivered, then eof is set; sending to a closed peer raises."""
    pair[0].send(b"".join(packed(b"last", [])))
    pair[0].close()
    reader = StreamReader(pair[1])
    assert plain(reader.read()) == [(b"last", [])] and not reader.eof
    assert reader.read() == [] and reader.eof
    with pytest.raises(ConnectionError):
        StreamWriter(pair[1]).send([b"x"])


@pytest.mark.parametrize(
    "junk",
    [
        PREFIX.pack(MAX_HEADER_BYTES + 1, 0),
        PREFIX.pack(1, MAX_FRAMES + 1),
        PREFIX.pack(0, 1) + FRAME_LENGTH.pack(1 << 62),
    ],
)
def test_limits(pair: tuple[socket.socket, socket.socket], junk: bytes) -> None:
    """A peer that announces more than the limits allow is refused before any of it is received."""
    pair[0].send(junk)
    with pytest.raises(RemoteProtocolError):
        StreamReader(pair[1]).read()


def test_writer_keeps_the_order(pair: tuple[socket.socket, socket.socket]) -> None:
    """What the socket does not take is counted, kept in order and written by flush."""
    writer, reader = StreamWriter(pair[0]), StreamReader(pair[1])
    count = 0
    while writer.send(packed(b"%d" % count, [])):
        count += 1
    for extra in range(1, 200):
        writer.send(packed(b"%d" % (count + extra), [b"f" * extra]))
    assert writer.pending_bytes > 0
    received: list[Packet] = []
    while not writer.flush() or len(received) < count + 200:
        received += reader.read()
    assert [int(header) for header, _ in received] == list(range(count + 200))
