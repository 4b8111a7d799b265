"""What calls print and log comes to the client that submitted them, and stays with their futures."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import printing
import pytest
from served import Served, python_path
from support import DEADLINE_S, Scene, wait_until

from scaler_executor import ScalerExecutor, WorkerDiedError

Make = Callable[..., ScalerExecutor]

MUCH = "text\nto stderr\nby the buffer\nno end of line"


@pytest.fixture(autouse=True, scope="module")
def _served(served: Served) -> None:
    """It is there before the first test looks."""


@contextlib.contextmanager
def elsewhere() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Have `sys.stdout` and `sys.stderr` go elsewhere. Not a fixture: pytest puts its own in place behind those."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        yield out, err


def taken(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with both streams elsewhere; it gets them as `out` and `err`."""
    parameters = [p for name, p in inspect.signature(test).parameters.items() if name not in ("out", "err")]

    @functools.wraps(test)
    def run(**arguments: object) -> None:
        with elsewhere() as (out, err):
            wanted = {"out": out, "err": err}
            test(**arguments, **{name: wanted[name] for name in wanted if name in inspect.signature(test).parameters})

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


all_kinds = pytest.mark.parametrize("start_method", ["fork", "spawn", "served"])


# Shown


@all_kinds
@taken
def test_shown_before_the_result(out: io.StringIO, err: io.StringIO, make: Make) -> None:
    """Where the client's own output goes elsewhere, or the cluster does, so do the prints of calls."""
    executor = make()
    for number in range(20):
        assert executor.submit(printing.say_much, f"{number}").result(DEADLINE_S) == "value"
        assert out.getvalue() == f"{number}\nby the buffer\nno end of line"
        assert err.getvalue() == "to stderr\n"
        for text in (out, err):
            text.seek(0)
            text.truncate()


@all_kinds
@taken
def test_a_nested_call_is_shown(out: io.StringIO, make: Make) -> None:
    """What a call prints that another call has submitted is shown once, and kept with its own future only."""
    executor = make(1)
    future = executor.submit(printing.say_through_another, "a line")
    assert future.result(DEADLINE_S) == "a line\n"
    executor.shutdown()
    assert (out.getvalue(), future.log) == ("a line\n", "")


@all_kinds
@taken
def test_a_map_is_shown(out: io.StringIO, make: Make) -> None:
    """Its items print as calls do."""
    assert list(make().map(printing.say, map(str, range(1000)))) == [None] * 1000
    assert sorted(map(int, out.getvalue().split())) == list(range(1000))


@all_kinds
@taken
def test_shown_while_the_call_goes_on(out: io.StringIO, make: Make, scene: Scene) -> None:
    """A line appears as it is printed, and so does a part of one that is flushed."""
    executor = make()
    for text, options in (("a line", {}), ("50 %", {"end": "", "flush": True})):
        gate = scene.fifo()
        future = executor.submit(printing.say_and_wait, text, gate, **options)
        wait_until(lambda text=text: text in out.getvalue(), "not shown")  # type: ignore[misc]
        assert not future.done()
        gate.open()
        future.result(DEADLINE_S)


@all_kinds
@taken
def test_lines_are_whole(out: io.StringIO, make: Make) -> None:
    """What several workers print at a time is not mixed within a line."""
    executor = make(2)
    for future in [executor.submit(printing.say_lines, 300, letter, 1000) for letter in "abcd"]:
        future.result(DEADLINE_S)
    assert Counter(out.getvalue().splitlines()) == {letter * 1000: 300 for letter in "abcd"}


def test_lines_are_whole_in_a_pipe(tmp_path: Path) -> None:
    """So they are where the workers write to a pipe themselves."""
    program = f"""
from scaler_executor import ScalerExecutor
import printing
with ScalerExecutor(4) as executor:
    for future in [executor.submit(printing.say_lines, 2000, letter, 777) for letter in "abcdefgh"]:
        future.result({DEADLINE_S})
"""
    # Unbuffered, as some environments have it, each part of a line is a write of its own, as with any other pool.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert Counter(done.stdout.splitlines()) == {letter * 777: 2000 for letter in "abcdefgh"}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_text_is_copied_in_chunks(method: str, tmp_path: Path) -> None:
    """Into a file a line costs no more than it does without a copy, and the log of a call is whole with its result."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import multiprocessing
import sys
from scaler_executor import ScalerExecutor
import printing
if __name__ == "__main__":
    with ScalerExecutor(1, multiprocessing.get_context({method!r})) as executor:
        futures = [executor.submit(printing.count_copies, number) for number in (3, 0, 100)]
        counts = [future.result({DEADLINE_S}) for future in futures]
        logs = [future.log for future in futures]
        mapped = list(executor.map(printing.say, "abc"))
    print([counts, logs, mapped], file=sys.stderr)
""")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**environment, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    logs = ["".join(f"line {line}\n" for line in range(count)) for count in (3, 0, 100)]
    assert done.stderr == f"{[[0, 0, 0], logs, [None] * 3]}\n"
    assert done.stdout == "".join(logs) + "a\nb\nc\n"


@all_kinds
@taken
def test_a_thread_prints_after_its_call(out: io.StringIO, make: Make, scene: Scene) -> None:
    """It is shown, and in no log."""
    executor = make(1)
    gate = scene.fifo()
    future = executor.submit(printing.in_background, "later", gate)
    future.result(DEADLINE_S)
    gate.open()
    wait_until(lambda: out.getvalue() == "later\n", "not shown")
    assert future.log == ""


@pytest.mark.parametrize("start_method", ["served"])
@taken
def test_descriptors_are_left_alone(out: io.StringIO, make: Make, served: Served) -> None:
    """What is written past `sys.stdout`, and by children that a call forks, appears where it is served."""
    executor = make(1)
    executor.submit(printing.by_descriptor, "to the descriptor").result(DEADLINE_S)
    assert executor.submit(printing.in_child, "by a child").result(DEADLINE_S) == 0
    wait_until(lambda: "by a child\n" in served.output, "not there")
    assert "to the descriptor\n" in served.output
    assert out.getvalue() == ""


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("start_method", ["served"])
@taken
def test_an_executor_in_a_call(out: io.StringIO, make: Make, method: str) -> None:
    """What its calls print goes the whole way."""
    future = make(1).submit(printing.nested, "from within", method)
    assert future.result(DEADLINE_S) == "from within\n"
    assert out.getvalue() == future.log == "from within\n"


# Kept


@all_kinds
@pytest.mark.parametrize("is_shown", [True, False])
def test_log_of_every_end(make: Make, scene: Scene, is_shown: bool) -> None:
    """It is all there when the future is done, whatever ended the call; wherever it is shown."""
    with contextlib.ExitStack() as stack:
        if is_shown:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        executor = make(2, cancel_grace=0.1)
        assert executor.submit(abs, -1).result(DEADLINE_S) == 1
        quiet, much = executor.submit(abs, -1), executor.submit(printing.say_much, "text")
        much.result(DEADLINE_S)
        assert (quiet.result(DEADLINE_S), quiet.log, much.log) == (1, "", MUCH)

        failed = executor.submit(printing.fail, "fails")
        assert isinstance(failed.exception(DEADLINE_S), ValueError)
        assert failed.log == "fails\n"

        died = executor.submit(printing.die, "dies")
        assert isinstance(died.exception(DEADLINE_S), WorkerDiedError)
        assert died.log == "dies\n"

        retried = executor.with_options(retries=1).submit(printing.die_once, "again", str(scene.directory / "once"))
        assert retried.exception(DEADLINE_S) is None
        assert retried.log == "again\nagain\n"

        late = executor.with_options(timeout=0.3).submit(printing.hang, "hangs")
        assert isinstance(late.exception(DEADLINE_S), TimeoutError)
        assert late.log == "hangs\n"

        gate = scene.fifo()
        killed = executor.submit(printing.hang, "is killed", gate)
        gate.hear()
        killed.cancel()
        assert killed.cancelled()
        assert killed.log == "is killed\n"


@all_kinds
def test_each_call_has_its_own_log(make: Make) -> None:
    """Also of many short calls, of which a worker has several in its hands."""
    executor = make(2)
    futures = [executor.submit(printing.say, f"{number}") for number in range(2000)]
    for number, future in enumerate(futures):
        future.result(DEADLINE_S)
        assert future.log in (f"{number}\n", "... 1 line dropped\n")
    assert sum(future.log == f"{number}\n" for number, future in enumerate(futures)) > 1900


@all_kinds
@taken
def test_a_call_that_prints_at_once(out: io.StringIO, make: Make) -> None:
    """Of very much the end is kept, and the number of lines that are missing is said."""
    future = make(1).submit(printing.say_at_once, 30_000_000)
    future.result(DEADLINE_S)
    for text in (future.log, out.getvalue()):
        assert len(text) < 10_000_000
        assert text.endswith("x" * 99 + "\n\n")
        dropped = sum(int(count.replace(",", "")) for count in re.findall(r"^\.\.\. (\S+) lines dropped$", text, re.M))
        assert dropped + text.count("\n") - text.count("dropped\n") in range(300_002, 300_010)


@all_kinds
@taken
def test_an_endless_printer(out: io.StringIO, make: Make) -> None:
    """It keeps no other call from being made, and can be stopped."""
    executor = make(2, cancel_grace=0.1)
    endless = executor.submit(printing.flood)
    wait_until(lambda: "1 x" in out.getvalue(), "not shown")
    for _ in range(30):
        begin = time.monotonic()
        assert executor.submit(abs, -1).result(DEADLINE_S) == 1
        assert time.monotonic() - begin < 5
    wait_until(lambda: "dropped" in out.getvalue(), "nothing is dropped", 60)
    endless.cancel()
    assert endless.cancelled()
    assert "dropped" in endless.log
    assert len(endless.log) < 100_000


def test_a_client_that_does_not_read(served: Served, tmp_path: Path) -> None:
    """One whose output is a pipe that nobody reads gets its results, and ends."""
    program = f"""
from scaler_executor import ScalerExecutor
import printing, sys
with ScalerExecutor(address={str(served.connection)!r}) as executor:
    futures = [executor.submit(printing.say_lines, 1000, "x", 100) for _ in range(10)]
    done = sum(future.result({DEADLINE_S}) is None for future in futures)
    print(done, len(futures[0].log) > 60_000, file=sys.stderr)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=dict(os.environ, PYTHONPATH=python_path()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b"10 True\n"
    finally:
        process.kill()
        process.communicate()


# Logging

LOGGED = "INFO:some.where:info {0}\nERROR:some.where:error {0}\nTraceback (most recent call last):\n"


@pytest.mark.parametrize("start_method", ["spawn", "served"])
@taken
def test_records_are_handled_by_the_client(
    err: io.StringIO, make: Make, caplog: pytest.LogCaptureFixture, scene: Scene
) -> None:
    """By its own logging, from its levels on, with the name of the call."""
    with caplog.at_level(logging.INFO, "some.where"):
        executor = make(1)
        future = executor.with_options(name="the call").submit(printing.log, "1")
        future.result(DEADLINE_S)
    own = [record for record in caplog.records if record.name == "some.where"]
    assert [(record.levelname, record.getMessage()) for record in own] == [("INFO", "info 1"), ("ERROR", "error 1")]
    assert {record.call_name for record in own} == {"the call"}  # type: ignore[attr-defined]
    assert own[0].filename == "printing.py"
    assert own[0].process != os.getpid()
    assert own[1].exc_text is not None
    assert own[1].exc_text.endswith("KeyError: '1'")
    assert future.log.startswith(LOGGED.format(1))
    assert err.getvalue() == ""


@pytest.mark.parametrize("start_method", ["spawn", "served"])
@taken
def test_logging_that_is_set_up_in_the_worker(
    err: io.StringIO, make: Make, caplog: pytest.LogCaptureFixture, scene: Scene
) -> None:
    """It writes as it was told to, and nothing is shown twice."""
    future = make(1).submit(printing.set_up_and_log, "text")
    future.result(DEADLINE_S)
    assert err.getvalue() == future.log == "set up in the worker: text\n"
    assert not [record for record in caplog.records if record.name == "some.where"]


@pytest.mark.parametrize("start_method", ["fork"])
@taken
def test_forks_have_the_clients_handlers(
    err: io.StringIO, make: Make, caplog: pytest.LogCaptureFixture, scene: Scene
) -> None:
    """What they write to the client's stderr comes there, and nothing is shown twice."""
    handler = logging.StreamHandler(err)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("some.where")
    logger.addHandler(handler)
    try:
        future = make(1).submit(printing.log, "1")
        future.result(DEADLINE_S)
    finally:
        logger.removeHandler(handler)
    assert err.getvalue() == future.log
    assert future.log.startswith("ERROR error 1\nTraceback")
    assert future.log.count("error 1") == 1
    assert not [record for record in caplog.records if record.name == "some.where"]
