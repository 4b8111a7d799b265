"""The ring in which a worker leaves what its calls print."""

from __future__ import annotations

import os
import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from scaler_executor.protocol.page import CURRENT, DONE, OUTPUT_BYTES, OUTPUT_END, OUTPUT_LOST, OUTPUT_START
from scaler_executor.protocol.printed import FLUSHED, LOG, MAX_LOST, STDERR, STDOUT
from scaler_executor.runtime import output_ring, platform
from scaler_executor.runtime.output_ring import OutputReader, OutputWriter


class Ring:
    """Both sides of one, and how often the agent was woken."""

    def __init__(self) -> None:
        fd = platform.create_page()
        self.page = platform.map_page(fd)
        os.close(fd)
        self.announced = 0
        self.writer = OutputWriter(self.page, self.announce)
        self.reader = OutputReader(self.page)
        self.page[CURRENT] = 1

    def announce(self) -> None:
        self.announced += 1

    def write(self, *what: tuple[int, bytes], **options: Any) -> None:
        for kind, data in what:
            self.writer.add(kind, data, **options)


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring()
    yield ring
    ring.reader.close()


def test_rows(ring: Ring) -> None:
    """What one call writes to one stream is one row, until it was read."""
    ring.write((STDOUT, b"a\n"), (STDOUT, b"b\n"), (STDERR, b"c"))
    assert ring.reader.read() == [(1, STDOUT, 0, b"a\nb\n"), (1, STDERR, 0, b"c")]
    assert ring.reader.read() == []
    ring.write((STDERR, b"d\n"), (STDERR | FLUSHED, b""), (LOG, b"r"), (LOG, b"s"))
    rows = [(1, STDERR, 0, b"d\n"), (1, STDERR | FLUSHED, 0, b""), (1, LOG, 0, b"r"), (1, LOG, 0, b"s")]
    assert ring.reader.read() == rows
    assert ring.reader.read() == []


def test_calls(ring: Ring) -> None:
    """A row has the number of the call in progress, 0 between two."""
    ring.write((STDOUT, b"a"))
    ring.page[DONE] = 1
    ring.write((STDOUT, b"b"))
    ring.page[CURRENT] = 2
    ring.write((STDOUT, b"c"))
    assert [(row[0], row[3]) for row in ring.reader.read()] == [(1, b"a"), (0, b"b"), (2, b"c")]


def test_the_oldest_is_overwritten(ring: Ring) -> None:
    """What is not read in time is lost from the front, and counted by lines."""
    lines = [b"%06d %s\n" % (number, b"x" * 50) for number in range(10_000)]
    for line in lines:
        ring.write((STDOUT, line))
    rows = ring.reader.read()
    text = b"".join(row[3] for row in rows)
    lost = sum(row[2] for row in rows)
    assert len(text) > OUTPUT_BYTES * 0.9
    assert rows[0][2] == lost
    assert b"".join(lines).endswith(text)
    # Where the first row begins in a line, that line is one of those that are lost.
    assert lost == 10_000 - text.count(b"\n") + (not text.startswith(tuple(lines)))
    assert ring.announced == 0


def test_records_of_logging_are_lost_one_by_one(ring: Ring) -> None:
    """Each counts as a line."""
    for _ in range(300):
        ring.write((LOG, b"\n" * 1000))
    rows = ring.reader.read()
    assert len(rows) + rows[0][2] == 300
    assert {len(row[3]) for row in rows} == {1000}


def test_one_large_write(ring: Ring) -> None:
    """Of what is printed at once the end is kept."""
    text = b"".join(b"%07d\n" % number for number in range(1_000_000))
    ring.write((STDOUT, text), waits=True)
    rows = ring.reader.read()
    kept = b"".join(row[3] for row in rows)
    assert len(kept) == OUTPUT_BYTES // 2
    assert text.endswith(kept)
    assert sum(row[2] for row in rows) == 1_000_000 - len(kept) // 8


def test_read_while_it_is_written() -> None:
    """A writer that waits for room loses nothing to a reader that keeps up."""
    ring = Ring()
    sent: dict[int, list[bytes]] = defaultdict(list)
    got: dict[int, list[bytes]] = defaultdict(list)
    is_over = threading.Event()

    def read() -> None:
        last = False
        while not last:
            last = is_over.wait(0.0003)
            for seq, _, lost, data in ring.reader.read():
                assert not lost
                got[seq].append(data)

    thread = threading.Thread(target=read)
    thread.start()
    rng = random.Random(1)
    output_ring.WAIT_S, before = 30.0, output_ring.WAIT_S  # type: ignore[misc]
    try:
        for number in range(10_000):
            ring.page[CURRENT] = 1 + number // 50
            sent[1 + number // 50].append(b"%d %s\n" % (number, b"x" * rng.randrange(300)))
            ring.write((rng.choice([STDOUT, STDERR]), sent[1 + number // 50][-1]), waits=True)
    finally:
        output_ring.WAIT_S = before  # type: ignore[misc]
        is_over.set()
        thread.join()
    assert {seq: b"".join(data) for seq, data in got.items()} == {seq: b"".join(data) for seq, data in sent.items()}
    ring.reader.close()


def test_nobody_reads(ring: Ring) -> None:
    """A writer that waits does so once, for a moment, and then overwrites."""
    for _ in range(OUTPUT_BYTES // 100):
        ring.write((STDOUT, b"x" * 999 + b"\n"), waits=True)
    assert 0 < ring.announced < 10_000
    assert ring.reader.read()[0][2] > 0


def test_what_is_printed_by_a_finalizer(ring: Ring) -> None:
    """What is written while something is being written, by the same thread, comes behind it."""
    later = [(STDERR, b"inner\n")]

    class Data(bytes):
        def __len__(self) -> int:
            while later:
                ring.write(later.pop())
            return super().__len__()

    ring.write((STDOUT, Data(b"outer\n")))
    assert [row[3] for row in ring.reader.read()] == [b"outer\n", b"inner\n"]


def test_garbage(ring: Ring) -> None:
    """A reader goes on behind what makes no sense: user code may write anywhere."""
    rng = random.Random(2)
    memory = memoryview(ring.page.obj)  # type: ignore[arg-type]
    for _ in range(300):
        ring.write((STDOUT, b"x" * 500 + b"\n"))
        at = OUTPUT_START + rng.randrange(OUTPUT_BYTES - 500)
        memory[at : at + 500] = rng.randbytes(500)
        ring.reader.read()
    ring.page[OUTPUT_END] += 1 << 40
    assert ring.reader.read() == []
    memory.release()


@pytest.mark.parametrize("lost", [-5, MAX_LOST + 1])
def test_a_number_of_lines_that_makes_no_sense(ring: Ring, lost: int) -> None:
    """It is not passed on, and the next one counts from there."""
    ring.page[OUTPUT_LOST] = lost
    ring.write((STDOUT, b"a\n"))
    assert [row[2:] for row in ring.reader.read()] == [(0, b"a\n")]
    ring.page[OUTPUT_LOST] += 2
    ring.write((STDOUT, b"b\n"))
    assert [row[2:] for row in ring.reader.read()] == [(2, b"b\n")]


@pytest.mark.parametrize("kind", [0, 4, STDOUT | 32, FLUSHED])
def test_a_kind_that_makes_no_sense(ring: Ring, kind: int) -> None:
    """It is not passed on."""
    ring.write((STDOUT, b"a\n"), (kind, b"b\n"))
    assert ring.reader.read() == []
    ring.write((STDOUT, b"c\n"))
    assert [row[1:] for row in ring.reader.read()] == [(STDOUT, 0, b"c\n")]


def test_a_child_that_a_call_forked(ring: Ring) -> None:
    """It writes nothing here: there is one writer."""
    ring.writer.is_off = True
    ring.write((STDOUT, b"a"))
    assert ring.reader.read() == []
