"""Records in result pipes: any cut, any size, what a dead worker leaves."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from scaler_executor.protocol.codec import FRAME_LENGTH, RemoteProtocolError
from scaler_executor.protocol.messages import Frames
from scaler_executor.protocol.page import (
    INTEGERS,
    PENDING,
    RANGE_FIRST,
    RANGE_SEQ,
    RECORD,
    RECORD_ERROR,
    RECORD_VALUE,
    RECORD_VALUES,
)
from scaler_executor.protocol.segment import SEGMENT_FRAME, SEGMENT_MARK, Segment
from scaler_executor.runtime import platform
from scaler_executor.runtime.calls import loads_values
from scaler_executor.runtime.pipe import Record, ResultPipe, WorkerResults


@pytest.fixture
def ends(clean: None) -> Iterator[tuple[ResultPipe, int]]:
    """A pipe's reader and the descriptor to write to."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    pipe = ResultPipe(read_fd)
    yield pipe, write_fd
    pipe.close()
    os.close(write_fd)


def record(kind: int, seq: int, item: int, payload: Any) -> bytes:
    if isinstance(payload, bytes):
        return RECORD.pack(len(payload), seq, item, 0, kind) + payload
    body = b"".join([FRAME_LENGTH.pack(len(buffer)) for buffer in payload.buffers] + payload.buffers)
    return RECORD.pack(len(body), seq, item, len(payload.buffers), kind) + body


def write_all(pipe: ResultPipe, write_fd: int, data: bytes, *, step: int) -> list[Record]:
    """Write in pieces, reading in between."""
    records: list[Record] = []
    at = 0
    while at < len(data):
        try:
            at += os.write(write_fd, data[at : at + step])
        except BlockingIOError:
            pass
        records += pipe.read(1 << 20)
    return records + pipe.read(1 << 20)


@pytest.mark.parametrize("step", [1, 23, 1000, 70_000])
def test_records_arrive_as_they_were_written(ends: tuple[ResultPipe, int], step: int) -> None:
    """Wherever the stream is cut, every record arrives whole and in order, with its frames apart."""
    rng = random.Random(step)
    size = 10 if step == 1 else 200_000
    expected: list[Record] = []
    for seq in range(60):
        payload: Any = rng.randbytes(rng.choice((0, 5, 100)))
        if seq % 10 == 3:
            payload = Frames([rng.randbytes(rng.randrange(size)) for _ in range(rng.randrange(1, 4))])
        if seq % 10 == 5:
            payload = rng.randbytes(rng.randrange(size))
        expected.append((rng.choice((RECORD_VALUE, RECORD_ERROR)), seq, seq * 3, payload))
    data = b"".join(record(*each) for each in expected)
    records = write_all(*ends, data, step=step)
    assert records == expected
    assert all(type(each[3]) in (bytes, Frames) for each in records)


def test_drain_drops_a_partial_record(ends: tuple[ResultPipe, int]) -> None:
    """After a death every whole record counts and the rest does not, though the pipe is still open."""
    pipe, write_fd = ends
    whole = record(RECORD_VALUE, 1, 0, b"abc")
    os.write(write_fd, whole + whole[:-1])
    assert pipe.drain() == [(RECORD_VALUE, 1, 0, b"abc")]
    large = record(RECORD_VALUE, 2, 0, Frames([bytes(50_000)]))
    os.write(write_fd, whole + large[:-1])
    assert pipe.drain() == [(RECORD_VALUE, 1, 0, b"abc")]
    os.write(write_fd, whole)
    assert pipe.drain() == [(RECORD_VALUE, 1, 0, b"abc")]


def test_read_is_bounded(ends: tuple[ResultPipe, int]) -> None:
    """One read takes about as much as it was told to."""
    pipe, write_fd = ends
    whole = record(RECORD_VALUE, 1, 0, bytes(1000))
    os.write(write_fd, whole * 60)
    first = pipe.read(1)
    assert first and len(first) + len(pipe.read(1 << 20)) == 60
    assert pipe.read(1 << 20) == []


def test_garbage_is_refused(ends: tuple[ResultPipe, int]) -> None:
    """What no worker writes is a protocol error."""
    pipe, write_fd = ends
    os.write(write_fd, RECORD.pack(100, 1, 0, 2, RECORD_VALUE) + FRAME_LENGTH.pack(1) * 2)
    with pytest.raises(RemoteProtocolError):
        pipe.read(1 << 20)


def segment_record(frames: list[tuple[int, bytes]]) -> bytes:
    """Return a record whose frames have these lengths, marked or not."""
    body = b"".join(FRAME_LENGTH.pack(length) for length, _ in frames) + b"".join(frame for _, frame in frames)
    return RECORD.pack(len(body), 1, 0, len(frames), RECORD_VALUE) + body


@pytest.mark.parametrize("step", [1, 23, 1000])
def test_files_in_the_place_of_frames(clean: None, step: int) -> None:
    """A frame may say in which file it is; whoever reads the pipe takes that over, once, and in its place."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    pipe = ResultPipe(read_fd, Segment)
    mark = SEGMENT_MARK | SEGMENT_FRAME.size
    data = segment_record([(3, b"abc"), (mark, SEGMENT_FRAME.pack(7, 1, 500)), (0, b""), (1, b"d")])
    data += segment_record([(mark, SEGMENT_FRAME.pack(7, 2, 600))]) + segment_record([(2, b"ef")])
    records = write_all(pipe, write_fd, data, step=step)
    buffers = [payload.buffers for *_, payload in records if isinstance(payload, Frames)]
    assert buffers == [[b"abc", Segment(7, 1, 500), b"", b"d"], [Segment(7, 2, 600)], [b"ef"]]
    pipe.close()
    os.close(write_fd)


def test_files_that_cannot_be(ends: tuple[ResultPipe, int]) -> None:
    """A worker without files that names one, or nonsense in the place of a name, is not trusted."""
    pipe, write_fd = ends
    os.write(write_fd, segment_record([(SEGMENT_MARK | SEGMENT_FRAME.size, SEGMENT_FRAME.pack(7, 1, 500))]))
    with pytest.raises(RemoteProtocolError, match="file"):
        pipe.read(1 << 20)


@pytest.mark.parametrize("written", [False, True], ids=["left in the page", "written"])
def test_numbers_that_are_looked_at_twice(clean: None, written: bool) -> None:
    """What is taken of a range of words later is told from pickles as the first part was, wherever it comes from."""
    page_fd = platform.create_page()
    page = platform.map_page(page_fd)
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    results = WorkerResults(read_fd, page)
    body = INTEGERS + b"".join(number.to_bytes(8, "little") for number in (10, 11, 12, 13))
    buffer = platform.range_buffer(page)
    buffer[: len(body)] = body
    page[RANGE_SEQ], page[RANGE_FIRST], page[PENDING] = 7, 5, 2 << 32 | 24
    (first,) = results.read(1 << 20) + results.take_range()
    if written:
        page[PENDING] = 0
        os.write(write_fd, record(RECORD_VALUES, 7, 5, (4).to_bytes(4, "little") + body))
        (second,) = results.read(1 << 20) + results.take_range()
    else:
        page[PENDING] = 4 << 32 | 40
        (second,) = results.read(1 << 20) + results.take_range()
    assert [each[:3] for each in (first, second)] == [(RECORD_VALUES, 7, 5), (RECORD_VALUES, 7, 7)]
    for (*_, payload), expected in ((first, [10, 11]), (second, [12, 13])):
        assert isinstance(payload, bytes)
        assert loads_values(payload[4:], int.from_bytes(payload[:4], "little")) == expected
    buffer.release()
    results.close()
    platform.unmap_page(page)
    os.close(page_fd)
    os.close(write_fd)
