"""What the user's process makes of what calls print: it is shown, and kept with their futures."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from scaler_executor.protocol.printed import LOG, STDERR, STDOUT, LogRecord
from scaler_executor.runtime import display as display_module
from scaler_executor.runtime.display import (
    ITEM_CHARACTERS,
    MAX_LOG_CHARACTERS,
    MAX_WAITING_CHARACTERS,
    PATIENCE_S,
    CallLog,
    Display,
    read_output,
)

DEADLINE_S = 30.0


@pytest.fixture
def display() -> Iterator[Display]:
    display = Display()
    yield display
    display.close()
    assert not any(thread.name == "scaler-executor-display" for thread in threading.enumerate())


class Gate(io.StringIO):
    """A stream that takes nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = threading.Event()

    def write(self, text: str) -> int:
        assert self.is_open.wait(DEADLINE_S)
        return super().write(text)


# Kept


def test_log() -> None:
    """All of it, in order, with what is missing where it is missing."""
    log = CallLog()
    assert log.text() == ""
    log.add(0, "a\n")
    log.add(1, "b\n")
    log.add(12345, "")
    log.add(2, "c")
    assert log.text() == "a\n... 1 line dropped\nb\n... 12,347 lines dropped\nc"


def test_a_long_log() -> None:
    """The end of it is kept, from the begin of a line, and what was before is counted."""
    log = CallLog()
    for number in range(100_000):
        log.add(0, f"{number:09d}\n")
    text = log.text()
    mark, *lines = text.splitlines()
    assert len(text) <= MAX_LOG_CHARACTERS + 100
    assert lines[-1] == "000099999"
    assert mark == f"... {int(lines[0]):,} lines dropped"
    log.add(7, "x" * 10 * MAX_LOG_CHARACTERS)
    text = log.text()
    assert text.endswith("x" * MAX_LOG_CHARACTERS)
    assert text.startswith("... 100,008 lines dropped\nxxx")


def test_records_are_lines() -> None:
    """A record of logging stands in the log as `basicConfig` shows it, its traceback below."""
    record = LogRecord("a.b", logging.WARNING, "text", trace="Traceback\nE")
    assert read_output(LOG, msgspec.msgpack.encode(record)) == (record, "WARNING:a.b:text\nTraceback\nE\n")
    assert read_output(LOG, b"nonsense") == (None, "")
    assert read_output(LOG, b"\x93\xa1\xff\x1e\xa1m") == (None, "")
    assert read_output(LOG, b"\x9e" + msgspec.msgpack.encode(record)[1:] + b"\x91" * 100_000) == (None, "")
    assert read_output(LOG, b"") == (None, "")
    assert read_output(STDOUT, b"caf\xc3\xa9 \xff") == (None, "caf\u00e9 \ufffd")


# Shown


def test_shown_in_order(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream's lines go to that stream, as it is then."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for number in range(100):
        display.add(1, STDOUT, 0, f"{number}\n", None, "f")
    display.add(1, STDERR, 3, "error\n", None, "f")
    display.close()
    assert out.getvalue() == "".join(f"{number}\n" for number in range(100))
    assert err.getvalue() == "... 3 lines dropped\nerror\n"


def test_waited_for(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever settles a call waits until its lines are shown."""
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    for number in range(100):
        display.add(number, STDOUT, 0, f"{number}\n", None, "f")
        display.wait_for([number])
        assert out.getvalue().endswith(f"{number}\n") or display._is_behind
    display.wait_for([5, 1000])


def test_a_stream_that_blocks(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for once, for a moment, until all is shown; what waits is bounded, and what is missing is said."""
    monkeypatch.setattr(sys, "stdout", gate := Gate())
    text = "x" * 999 + "\n"
    count = 3 * MAX_WAITING_CHARACTERS // len(text)
    for _ in range(count):
        display.add(1, STDOUT, 0, text, None, "f")
    display.wait_for([1])
    assert display._is_behind
    assert display._waiting_characters <= MAX_WAITING_CHARACTERS
    gate.is_open.set()
    display.close()
    shown = gate.getvalue()
    [mark] = [line for line in shown.splitlines() if line.startswith("...")]
    assert int(mark.split()[1].replace(",", "")) + shown.count(text) == count


def test_a_stream_that_is_slow(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    """All waiting for it together has a limit, though each is short."""

    class Slow(io.StringIO):
        delay_s = 0.02

        def write(self, text: str) -> int:
            time.sleep(self.delay_s)
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", stream := Slow())
    start = time.monotonic()
    for number in range(1, 101):
        display.add(number, STDOUT, 0, "x\n", None, "f")
        display.wait_for([number])
    assert PATIENCE_S / 2 < time.monotonic() - start < 1.5
    stream.delay_s = 0.0
    display.close()


def test_nobody_forks_meanwhile(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child would find the stream's lock taken."""
    in_write, let_go, seen = threading.Event(), threading.Event(), list[bool]()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            in_write.set()
            let_go.wait(0.2)
            return super().write(text)

        def flush(self) -> None:
            seen.append(let_go.is_set())

    monkeypatch.setattr(sys, "stdout", Stream())
    display.add(1, STDOUT, 0, "x\n", None, "f")
    assert in_write.wait(DEADLINE_S)
    pid = os.fork()
    if not pid:
        os._exit(len(seen) != 1 or display_module._WRITING.locked())
    let_go.set()
    assert os.waitpid(pid, 0)[1] == 0
    assert seen == [False]
    display.close()
    assert not display_module._WRITING.locked()


def test_many_short_rows_are_bounded(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take more than their text."""
    monkeypatch.setattr(sys, "stdout", gate := Gate())
    for number in range(50_000):
        display.add(number, STDOUT, 0, "x\n", None, "f")
    assert len(display._items) <= MAX_WAITING_CHARACTERS // ITEM_CHARACTERS
    gate.is_open.set()
    display.close()


def test_a_pipe_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end it is given up, and nothing is left that could block the interpreter."""
    read_fd, write_fd = os.pipe()
    display = Display()
    with open(write_fd, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        for _ in range(300):
            display.add(1, STDOUT, 0, "x" * 999 + "\n", None, "f")
        display.close()
        assert display._thread is not None
        assert not display._thread.is_alive()
        os.set_blocking(read_fd, False)
        assert len(os.read(read_fd, 1 << 20)) > 1 << 15
    os.close(read_fd)


@pytest.mark.parametrize("stream", [None, object(), io.TextIOWrapper(io.BytesIO(), encoding="ascii")])
def test_odd_streams(display: Display, monkeypatch: pytest.MonkeyPatch, stream: object) -> None:
    """Whatever stands there, nothing fails."""
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    display.add(1, STDOUT, 0, "\u20ac\n", None, "f")
    display.add(1, STDERR, 0, "after\n", None, "f")
    display.close()
    assert err.getvalue() == "after\n"
    if isinstance(stream, io.TextIOWrapper):
        assert stream.buffer.getvalue() == b"\\u20ac\n"  # type: ignore[attr-defined]


def test_records_are_handled(display: Display, caplog: pytest.LogCaptureFixture) -> None:
    """By the logger of that name, by its level here, with where it comes from."""
    record = LogRecord("some.where", logging.INFO, "text %s", "/x/y.py", 7, "f", 1.25, 99, "P", 1, "T", "host", "E")
    with caplog.at_level(logging.INFO, "some.where"):
        display.add(1, LOG, 0, "", record, "call")
        display.add(1, LOG, 0, "", msgspec.structs.replace(record, level=logging.DEBUG), "call")
        display.close()
    [handled] = caplog.records
    assert handled.getMessage() == "text %s"
    assert (handled.name, handled.levelname, handled.process, handled.created) == ("some.where", "INFO", 99, 1.25)
    assert (handled.pathname, handled.module, handled.lineno, handled.exc_text) == ("/x/y.py", "y", 7, "E")
    assert (handled.call_name, handled.host) == ("call", "host")  # type: ignore[attr-defined]
