"""What calls print and write appears where ProcessPoolExecutor's would, and nothing else does."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import output_cases as cases
import pytest
from comparison import EXECUTORS, START_METHODS, Pools, assert_output_alike, run_case
from support import Scene, wait_until

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize(
    "case",
    [
        cases.all_ways,
        cases.c_library,
        cases.nothing_else,
        cases.replaced,
        cases.configured_logging,
        cases.inherited_logging,
        cases.failing_initializer,
        cases.failing_initializer_with_logging,
        cases.failing_initializer_with_queue,
        cases.warned,
        cases.unraisable,
        cases.standard_input,
        cases.end_of_a_worker,
        cases.queue_at_the_end,
        cases.large,
    ],
    ids=lambda case: case.__name__,
)
def test_the_same_lines(case: Callable[[Pools], object], start_method: str, tmp_path: Path) -> None:
    """Into pipes each of these programs prints the same with either executor."""
    assert_output_alike(case, start_method, directory=tmp_path)


@pytest.mark.parametrize("start_method", ["forkserver", None])
def test_the_same_lines_of_other_start_methods(start_method: str | None, tmp_path: Path) -> None:
    """So they do with a fork server and with the interpreter's default."""
    assert_output_alike(cases.all_ways, start_method, directory=tmp_path)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_encodings(start_method: str, tmp_path: Path) -> None:
    """What cannot be encoded fails in the call, as it would there."""
    assert_output_alike(cases.unencodable, start_method, directory=tmp_path, environment={"PYTHONIOENCODING": "ascii"})


@pytest.mark.parametrize("start_method", START_METHODS)
def test_streams_that_fail(start_method: str, tmp_path: Path) -> None:
    """A stream that a call has put in place and that cannot be flushed disturbs no other call and prints nothing."""
    seen, *rest = run_case(cases.odd_streams, "ScalerExecutor", start_method, directory=tmp_path)
    assert seen == [None, ("OSError", "full"), 1]
    assert rest == ["", "", 0]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_fault_handler(start_method: str, tmp_path: Path) -> None:
    """A fault handler that the program has enabled tells of the crash of a worker."""
    for name in EXECUTORS:
        run = run_case(cases.crash, name, start_method, directory=tmp_path, flags=["-X", "faulthandler"])
        assert run.seen is True
        assert "Fatal Python error: Segmentation fault" in run.stderr
        assert "in read_null" in run.stderr


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("name", EXECUTORS)
def test_terminal(name: str, start_method: str, tmp_path: Path, scene: Scene) -> None:
    """On a terminal a line appears as it is printed, while the call goes on."""
    gate = scene.fifo()
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from scaler_executor import ScalerExecutor
def call(gate):
    print("is a terminal:", sys.stdout.isatty())
    open(gate).read(1)
    print("the end")
if __name__ == "__main__":
    with {name}(1, multiprocessing.get_context({start_method!r})) as executor:
        executor.submit(call, {gate.path!r}).result()
"""
    )
    master, slave = pty.openpty()
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen([sys.executable, str(program)], stdout=slave, stderr=slave, stdin=slave, env=environment)
    os.close(slave)
    try:
        text = b""
        while b"\n" not in text:
            text += os.read(master, 1000)
        assert text == b"is a terminal: True\r\n"
        gate.open()
        assert process.wait(30) == 0
        assert os.read(master, 1000) == b"the end\r\n"
    finally:
        os.close(master)
        process.kill()
        process.wait()


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_finished_call_has_printed(start_method: str, tmp_path: Path) -> None:
    """Into a file or pipe what a call has printed is there soon after its result, though its worker lives on."""
    program = f"""
import multiprocessing, sys
from scaler_executor import ScalerExecutor
executor = ScalerExecutor(1, multiprocessing.get_context({start_method!r}))
executor.submit(print, "printed").result()
sys.stdin.read()
"""
    output = tmp_path / "output"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    with open(output, "wb") as file:
        process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=file, env=environment)
    try:
        wait_until(lambda: output.read_text() == "printed\n", "nothing was printed")
        process.communicate()
        assert (process.returncode, output.read_text()) == (0, "printed\n")
    finally:
        process.kill()
        process.communicate()


TESTS = """
import multiprocessing, os, sys
import pytest
from concurrent.futures import ProcessPoolExecutor
from scaler_executor import ScalerExecutor
from output_cases import write_in_every_way

def run():
    with NAME(1, multiprocessing.get_context("METHOD")) as executor:
        executor.submit(write_in_every_way, 1).result()

def test_capfd(capfd):
    run()
    captured = capfd.readouterr()
    print(sorted(captured.out.split("\\n")), sorted(captured.err.split("\\n")))
    assert False

def test_capsys(capsys):
    run()
    captured = capsys.readouterr()
    print(sorted(captured.out.split("\\n")), sorted(captured.err.split("\\n")))
    assert False

def test_default():
    run()
    assert False
"""


@pytest.mark.parametrize(("capture", "start_method"), [("fd", "fork"), ("fd", "spawn"), ("sys", "fork")])
def test_capture_of_pytest(capture: str, start_method: str, tmp_path: Path) -> None:
    """A user's tests capture what calls print, in whatever way they do it, as with ProcessPoolExecutor."""
    reports = []
    here = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    for name in EXECUTORS:
        path = tmp_path / "test_captured.py"
        path.write_text(TESTS.replace("NAME", name).replace("METHOD", start_method))
        command = [sys.executable, "-m", "pytest", f"--capture={capture}", "-p", "no:cacheprovider", "--tb=no"]
        command += ["-rA", "--color=no", "-c", os.devnull, str(path)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**environment, "PYTHONPATH": here}
        )
        report = re.sub(r"\d+\.\d+s|=+", "", done.stdout)
        reports.append((sorted(report.split("\n")), sorted(done.stderr.split("\n"))))
    assert reports[0] == reports[1]
