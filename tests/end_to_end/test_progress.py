"""The bar of a map: what is on a terminal at its end, however it ends, and that nothing is anywhere else."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from support import DEADLINE_S, Scene

PROGRAM = """
import asyncio, itertools, sys
if {is_plain}:
    sys.modules["tqdm"] = None
import workload
from scaler_executor import ScalerExecutor
from support import copy_of_fifo

def check(number):
    if number == 15:
        raise LookupError("the fifteenth")
    return number

async def consume(results):
    return [result async for result in results]

if __name__ == "__main__":
    mode = sys.argv[1]
    started, gate = map(copy_of_fifo, sys.argv[2:])
    with ScalerExecutor(2) as executor:
        if mode == "map":
            list(executor.map(check, range(10), progress="Check"))
        elif mode == "unordered":
            list(executor.map(check, range(10), progress="Check", ordered=False))
        elif mode == "starmap":
            list(executor.starmap(divmod, [(1, 2)] * 10, progress="Check"))
        elif mode == "amap":
            asyncio.run(consume(executor.amap(check, range(10), progress="Check")))
        elif mode == "submit":
            submit = executor.submit
            executor.submit = lambda *arguments: submit(*arguments)
            list(executor.map(check, range(10), progress="Check"))
        elif mode == "generator":
            list(executor.map(check, (number for number in range(10)), progress="Check"))
        elif mode == "error":
            list(executor.map(check, range(20), progress="Check"))
        elif mode == "early":
            results = executor.map(check, itertools.count(100), progress="Check", buffersize=10)
            assert next(results) == 100
            results.close()
            print("behind", file=sys.stderr)
        elif mode == "unread":
            executor.map(check, range(10), progress="Check")
        elif mode == "unread endless":
            kept = executor.map(check, itertools.count(100), progress="Check", buffersize=10)
        elif mode in ("running", "interrupt"):
            list(executor.map(workload.hold, [started] * 4, [gate] * 4, progress="Check"))
"""


class Terminal:
    """A program whose stdout and stderr are a terminal."""

    def __init__(self, scene: Scene, mode: str, *, is_plain: bool = True, is_terminal: bool = True) -> None:
        self.started, self.gate = scene.fifo(), scene.fifo()
        path = scene.directory / "program.py"
        path.write_text(PROGRAM.format(is_plain=is_plain))
        here = Path(__file__).parent
        environment = {
            **os.environ,
            "PYTHONPATH": f"{here}{os.pathsep}{here.parent.parent}",
            "TERM": "xterm",
            "PYTHON_COLORS": "0",
        }
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
        command = [sys.executable, str(path), mode, self.started.path, self.gate.path]
        errors = {} if is_terminal else {"stderr": subprocess.PIPE}
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=slave, **{"stderr": slave, **errors}, env=environment
        )
        os.close(slave)
        self.pid = self._process.pid
        self.output = ""
        scene.keep(self)

    def read_until(self, text: str | None) -> str:
        """Return the output up to this text, or to the end."""
        deadline = time.monotonic() + DEADLINE_S
        while text is None or text not in self.output:
            if not select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"there was no {text!r} in {self.output!r}")
            try:
                data = os.read(self._master, 4096)
            except OSError:
                break  # all have closed it
            self.output += data.decode()
        assert text is None or text in self.output
        return self.output

    def lines(self) -> list[str]:
        """Return the lines that are left at the end, as a terminal shows them."""
        text = self.read_until(None).replace("\r\n", "\n")
        assert self._process.wait(DEADLINE_S) is not None
        shown = (re.sub(r"\x1b\[[A-K]", "", line.rpartition("\r")[2]).rstrip() for line in text.split("\n"))
        return [line for line in shown if line]

    def errors(self) -> bytes:
        """Return what came by a pipe instead."""
        assert self._process.stderr is not None
        return self._process.stderr.read()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()
        os.close(self._master)


@pytest.fixture(params=["plain", "tqdm"])
def is_plain(request: pytest.FixtureRequest) -> bool:
    """Whether there is no tqdm."""
    if request.param == "tqdm":
        pytest.importorskip("tqdm")
    return bool(request.param == "plain")


@pytest.mark.parametrize("mode", ["map", "unordered", "starmap", "amap", "submit", "generator", "unread"])
def test_a_bar_is_full_at_the_end(scene: Scene, is_plain: bool, mode: str) -> None:
    """One line, with label, count and rate, of every kind of map."""
    (line,) = Terminal(scene, mode, is_plain=is_plain).lines()
    assert re.match(r"Check: *100% ?\|[#\u2588]+\| 10/10 \[00:0\d<00:00, .*0 failed, 0 running\]$", line), line


def test_failures_are_counted(scene: Scene, is_plain: bool) -> None:
    """The bar ends before the traceback begins."""
    first, *others, last = Terminal(scene, "error", is_plain=is_plain).lines()
    assert first.startswith("Check: ") and ", 1 failed, 0 running]" in first
    assert "Traceback" in others[0] or '"""' in "".join(others)
    assert last == "LookupError: the fifteenth"


def test_a_map_that_is_closed_early(scene: Scene, is_plain: bool) -> None:
    """The line ends then; of endless iterables there is a count and no end."""
    first, second = Terminal(scene, "early", is_plain=is_plain).lines()
    assert re.match(r"Check: \d+(it)? \[00:0\d, ", first), first
    assert second == "behind"


def test_calls_that_run_are_counted(scene: Scene, is_plain: bool) -> None:
    """While nothing is done, and until it is."""
    terminal = Terminal(scene, "running", is_plain=is_plain)
    terminal.read_until("0 failed, 2 running")
    terminal.gate.open(4)
    (line,) = terminal.lines()
    assert "4/4" in line and "0 running" in line


def test_ctrl_c_ends_the_line(scene: Scene, is_plain: bool) -> None:
    """And then the traceback begins."""
    terminal = Terminal(scene, "interrupt", is_plain=is_plain)
    terminal.read_until("2 running")
    os.kill(terminal.pid, signal.SIGINT)
    first, second, *_, last = terminal.lines()
    assert "0/4" in first and second.startswith("Traceback") and last == "KeyboardInterrupt"


def test_a_map_that_nobody_reads_keeps_no_program(scene: Scene, is_plain: bool) -> None:
    """The bar ends with the main thread, also if its map could go on for ever."""
    (line,) = Terminal(scene, "unread endless", is_plain=is_plain).lines()
    assert re.match(r"Check: \d+(it)? \[00:0\d, ", line), line


@pytest.mark.parametrize("mode", ["map", "amap"])
def test_it_is_quiet_without_a_terminal(scene: Scene, mode: str) -> None:
    """Not a byte, there or on stdout."""
    terminal = Terminal(scene, mode, is_terminal=False)
    assert terminal.lines() == [] and terminal.errors() == b""
