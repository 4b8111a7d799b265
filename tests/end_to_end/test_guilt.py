"""What a WorkerDiedError, and the error of an executor whose workers cannot start, tell of the cause."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import odd_calls as calls
import pytest
import workload
from served import Served
from support import DEADLINE_S, Scene, wait_gone, wait_until

from scaler_executor import ScalerExecutor, ScalerFuture, WorkerDiedError, WorkerStartError
from scaler_executor.runtime import platform

Make = Callable[..., ScalerExecutor]


@pytest.fixture(autouse=True, scope="module")
def cluster(served: Served) -> Served:
    """What a third of the executors here use."""
    return served


@pytest.fixture(autouse=True)
def output(served: Served) -> Iterator[None]:
    """What calls print where they are served is read, or they would wait for that."""
    yield
    served.scheduler.output.read()


@pytest.fixture(params=["fork", "spawn", "served"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Reports are the same wherever the worker was."""
    return str(request.param)


def death_of(future: ScalerFuture[Any]) -> WorkerDiedError:
    error = future.exception(DEADLINE_S)
    assert isinstance(error, WorkerDiedError), error
    return error


@pytest.mark.parametrize("how", ["exit", "abort", "segv", "kill"])
def test_report(executor: ScalerExecutor, how: str) -> None:
    """It tells how the process ended, call, host, process, memory, what was said, and where it was at a fault."""
    error = death_of(executor.submit(calls.say_and_die, how))
    number = {"exit": 7, "abort": -signal.SIGABRT, "segv": -signal.SIGSEGV, "kill": -signal.SIGKILL}[how]
    assert error.exit_code == number
    assert error.signal_name == (signal.Signals(-number).name if number < 0 else None)
    assert error.call_name == "say_and_die" and error.host == os.uname().nodename and error.pid
    assert error.peak_memory_bytes > 1 << 20
    assert error.stderr.splitlines()[0] == "the matrix is singular"
    assert "step 17 diverged" in error.stderr
    if how in ("abort", "segv"):
        assert error.fault.startswith("Fatal Python error: ")
        lines = error.fault.splitlines()
        assert any("in die" in line for line in lines) and "in say_and_die" in lines[-1], error.fault
    else:
        assert not error.fault
    for part in ("say_and_die()", str(abs(number)) if number > 0 else str(error.signal_name), error.host, "MiB"):
        assert part in str(error)
    for line in (*error.stderr.splitlines(), *error.fault.splitlines()):
        assert line in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_only_what_the_call_said(make: Make) -> None:
    """What calls before it in the same worker have said is not this one's, nor what others say meanwhile."""
    executor = make(1)
    pid = executor.submit(calls.say, "of another call").result(DEADLINE_S)
    error = death_of(executor.submit(calls.say_and_die, "exit"))
    assert error.pid == pid and "another" not in error.stderr
    executor.submit(calls.say, "of another call").result(DEADLINE_S)
    assert not death_of(executor.submit(os._exit, 3)).stderr


def test_item_of_a_map(executor: ScalerExecutor) -> None:
    """In a run of items it is what the item said."""
    results = executor.map(calls.say_if, range(500), itertools.repeat(300))
    assert list(itertools.islice(results, 300)) == list(range(300))
    with pytest.raises(WorkerDiedError) as caught:
        next(results)
    assert caught.value.stderr == "item 300"


def test_much(executor: ScalerExecutor) -> None:
    """Of a long story the end is kept, in whole lines, and at most 4 KB."""
    error = death_of(executor.submit(calls.say_much_and_die, 2000))
    lines = error.stderr.splitlines()
    assert lines == [f"line {number}" for number in range(2000 - len(lines), 2000)]
    assert len(lines) > 300 and len(error.stderr) <= 4096


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"x" * 10000, "x" * 4096),
        (b"a" * 5000 + b"\nlast", "last"),
        (b"\xff\xfe broken", "\ufffd\ufffd broken"),
        (b"\n\n", ""),
        (b"no line end", "no line end"),
    ],
    ids=["one line", "line cut", "not utf-8", "empty lines", "no line end"],
)
def test_bytes(executor: ScalerExecutor, data: bytes, told: str) -> None:
    """Whatever bytes were written make a text."""
    assert death_of(executor.submit(calls.say_bytes_and_die, data)).stderr == told


@pytest.mark.parametrize(
    ("how", "is_heard"), [("closed", False), ("redirected", True), ("replaced", False), ("none", False)]
)
def test_stderr_that_a_call_has_changed(make: Make, start_method: str, how: str, is_heard: bool) -> None:
    """A call may close, redirect or replace its stderr: the report is without it then, or with what Python wrote."""
    # What is printed on a served cluster does not go through the descriptor that is closed.
    is_heard = is_heard or (how == "closed" and start_method == "served")
    executor = make(1)
    error = death_of(executor.submit(calls.say_elsewhere_and_die, how))
    assert (error.exit_code, error.stderr) == (7, "is it heard?" if is_heard else "")


def test_stderr_that_others_keep_open(scene: Scene, executor: ScalerExecutor) -> None:
    """The report does not wait for a process that the call has left behind with its stderr."""
    started = scene.fifo()
    future = executor.submit(calls.leave_stderr_to_others_and_die, started)
    pid = int(started.hear())
    try:
        assert death_of(future).stderr == "left behind"
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)


def test_fault_of_a_fork(make: Make) -> None:
    """The stack of a process that a call forked is not the worker's."""
    executor = make(1)
    assert executor.submit(calls.fault_in_a_fork).result(DEADLINE_S) == -signal.SIGSEGV
    error = death_of(executor.submit(calls.die, "kill"))
    assert not error.fault


def test_own_fault_handler(make: Make) -> None:
    """A call may enable the fault handler for itself: it is told of the fault where it wants to be."""
    executor = make(1, initializer=calls.enable_fault_handler)
    error = death_of(executor.submit(calls.die, "segv"))
    assert (error.signal_name, error.fault) == ("SIGSEGV", "")


@pytest.mark.skipif(platform.PORTABLE, reason="counters are Linux's")
def test_killed_by_hand(executor: ScalerExecutor) -> None:
    """Of a SIGKILL without a sign of it in the kernel's counters nobody says that memory ran out."""
    error = death_of(executor.submit(calls.die, "kill"))
    assert error.out_of_memory is False
    assert "possibly out of memory" not in str(error) and "SIGKILL" in str(error)
    assert death_of(executor.submit(calls.die, "segv")).out_of_memory is None


def make_memory_group(name: str, limit: int) -> Path | None:
    for root, file in (("memory", "memory.limit_in_bytes"), ("", "memory.max"), ("unified", "memory.max")):
        group = Path("/sys/fs/cgroup", root, name)
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / file).write_text(str(limit))
        except OSError:
            group.rmdir()
            continue
        return group
    return None


@pytest.fixture
def memory_group(scene: Scene) -> Iterator[tuple[Path, int]]:
    """A memory cgroup with a limit of 192 MiB, where such can be made."""
    limit = 192 << 20
    group = make_memory_group(scene.mark, limit)
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    yield group, limit
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "processes are left in the group")
    group.rmdir()


OUT_OF_MEMORY = """
import multiprocessing, signal, sys
import odd_calls
from scaler_executor import ScalerExecutor

if __name__ == "__main__":
    with ScalerExecutor(2, multiprocessing.get_context(sys.argv[1])) as executor:
        error = executor.submit(odd_calls.say_and_use_memory, int(sys.argv[2])).exception()
        assert (error.signal_name, error.out_of_memory) == ("SIGKILL", True), error
        assert "possibly out of memory" in str(error) and error.stderr == "about to use it all", error
        assert int(sys.argv[2]) // 4 < error.peak_memory_bytes < int(sys.argv[2]), error
        error = executor.submit(odd_calls.die, "kill").exception()
        assert error.out_of_memory is False and "out of memory" not in str(error), error
        assert executor.submit(pow, 2, 3).result() == 8
"""


@pytest.mark.skipif(platform.PORTABLE, reason="counters are Linux's")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_out_of_memory(scene: Scene, memory_group: tuple[Path, int], method: str) -> None:
    """A call that the kernel kills for want of memory in its cgroup says so; one that is killed by hand does not."""
    group, limit = memory_group
    join = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    scene.client(OUT_OF_MEMORY, method, 2 * limit, before=join).succeed()


def test_every_death_is_reported(executor: ScalerExecutor) -> None:
    """Many deaths at once are told apart."""
    futures = [executor.submit(calls.say_if, number, number) for number in range(30)]
    wait(futures, DEADLINE_S)
    assert [death_of(future).stderr for future in futures] == [f"item {number}" for number in range(30)]


def start_error_of(future: ScalerFuture[Any]) -> str:
    error = future.exception(DEADLINE_S)
    assert isinstance(error, WorkerStartError), error
    return str(error)


def test_worker_that_dies_at_start(scene: Scene, make: Make) -> None:
    """An executor whose workers die at their start gives up soon, with the exit code and what they said."""
    journal = scene.journal()
    executor = make(2, initializer=calls.speak_and_exit_at_start, initargs=(journal,))
    text = start_error_of(executor.submit(workload.add, 1))
    assert "code 5" in text and "no licence for this host" in text
    assert 1 <= len(journal.read()) <= 6


def test_initializer_that_speaks_and_fails(make: Make) -> None:
    """What an initializer said before it raised is told with its traceback, once."""
    executor = make(1, initializer=calls.speak_and_fail_at_start)
    text = start_error_of(executor.submit(workload.add, 1))
    assert text.count("no licence for this host") == 1
    assert text.count("OSError: refused") == 1 and "in speak_and_fail_at_start" in text
