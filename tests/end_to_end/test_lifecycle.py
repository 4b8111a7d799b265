"""An executor from its construction to its end, and what it carries in between."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, wait
from typing import Any

import pytest
import workload
from support import DEADLINE_S, Cluster, Scene, is_gone, wait_gone, wait_until

from scaler_executor import CancelOutcome, ScalerExecutor

Make = Callable[..., ScalerExecutor]


def pids_of(executor: ScalerExecutor) -> list[int]:
    executor.submit(workload.get_pid).result(DEADLINE_S)
    return Cluster().all()


# Shutdown


def test_shutdown(scene: Scene, make: Make) -> None:
    """shutdown() finishes what was accepted, and when it returns nothing is left; new calls are refused."""
    executor = make(2)
    pids = pids_of(executor)
    futures = [executor.submit(workload.add, number) for number in range(100)]
    items = executor.map(workload.add, range(100))
    executor.shutdown()
    assert scene.leftovers() == []
    assert [pid for pid in pids if not is_gone(pid)] == []
    assert [future.result(0) for future in futures] == list(range(100)) == list(items)
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(workload.add, 1)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.map(workload.add, [1])


def test_unused(scene: Scene, make: Make) -> None:
    """An executor that never had a call leaves nothing either."""
    make(2).shutdown()
    assert scene.leftovers() == []


def test_shutdown_without_waiting(scene: Scene, make: Make) -> None:
    """shutdown(wait=False) returns at once; what was accepted completes, then everything goes by itself."""
    executor = make(1)
    gate, started = scene.fifo(), scene.fifo()
    running = executor.submit(workload.hold, started, gate, "held")
    queued = [executor.submit(workload.add, number) for number in range(10)]
    started.hear()
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError):
        executor.submit(workload.add, 1)
    assert not running.done()
    gate.open()
    assert running.result(DEADLINE_S) == "held"
    assert [future.result(DEADLINE_S) for future in queued] == list(range(10))
    wait_until(lambda: not scene.processes(), "processes are left")


def test_cancel_after_shutdown_without_waiting(scene: Scene, make: Make) -> None:
    """What still runs after shutdown(wait=False) can be cancelled."""
    executor = make(1)
    started = scene.fifo()
    running = executor.submit(workload.sleep, started)
    started.hear()
    executor.shutdown(wait=False)
    running.cancel()
    assert running.cancel_outcome is CancelOutcome.CANCELED
    executor.shutdown()


@pytest.mark.parametrize("is_waiting", [True, False])
def test_shutdown_that_cancels(scene: Scene, make: Make, is_waiting: bool) -> None:
    """cancel_futures=True takes back what has not started; what runs, completes."""
    executor = make(1)
    gate, started, journal = scene.fifo(), scene.fifo(), scene.journal()
    running = executor.submit(workload.hold, started, gate, "held")
    started.hear()
    queued = [executor.submit(workload.note, journal, number) for number in range(50)]
    thread = threading.Thread(target=executor.shutdown, args=(is_waiting,), kwargs={"cancel_futures": True})
    thread.start()
    wait(queued, DEADLINE_S)
    assert all(future.cancelled() for future in queued)
    assert not running.done() and thread.is_alive() in (is_waiting, False)
    gate.open()
    assert running.result(DEADLINE_S) == "held"
    thread.join(DEADLINE_S)
    assert journal.read() == []


def test_with_block(scene: Scene, make: Make) -> None:
    """Leaving a with block waits for what was submitted in it."""
    with make(2) as executor:
        future = executor.submit(workload.add, 1)
        pids = pids_of(executor)
    assert future.done() and scene.leftovers() == []
    assert all(map(is_gone, pids))


def test_with_block_and_an_error(make: Make) -> None:
    """So does leaving it by an exception."""
    futures = []
    with pytest.raises(ValueError, match="user's own"), make(2) as executor:
        futures = [executor.submit(workload.add, number) for number in range(100)]
        raise ValueError("user's own")
    assert [future.result(0) for future in futures] == list(range(100))


def test_with_block_and_ctrl_c(scene: Scene, make: Make) -> None:
    """Leaving it by KeyboardInterrupt stops what runs."""
    started = scene.fifo()
    pid = 0
    with pytest.raises(KeyboardInterrupt), make(2) as executor:
        running = executor.submit(workload.sleep, started)
        queued = [executor.submit(workload.sleep, started) for _ in range(10)]
        pid = int(started.hear())
        raise KeyboardInterrupt
    assert is_gone(pid)
    assert running.cancelled() and all(future.cancelled() for future in queued)


def test_garbage(scene: Scene, start_method: str) -> None:
    """An executor that is garbage finishes what it accepted and goes; its futures need no reference to it."""
    executor = ScalerExecutor(2, multiprocessing.get_context(start_method))
    futures = [executor.submit(workload.add, number) for number in range(100)]
    reference = weakref.ref(executor)
    del executor
    gc.collect()
    assert reference() is None
    assert [future.result(DEADLINE_S) for future in futures] == list(range(100))
    wait_until(lambda: not scene.processes(), "processes are left")


def test_garbage_under_a_map(make: Make, start_method: str) -> None:
    """The results of a map keep coming when nobody holds the executor."""
    results = ScalerExecutor(2, multiprocessing.get_context(start_method)).map(workload.add, range(1000))
    gc.collect()
    assert list(results) == list(range(1000))


def test_two_executors(scene: Scene, make: Make) -> None:
    """Two executors do not know of each other: a cancel, a crash and the end of one leave the other alone."""
    one, two = make(2), make(2)
    gate, started, kept = scene.fifo(), scene.fifo(), scene.fifo()
    held = two.submit(workload.hold, kept, gate, "held")
    kept.hear()
    target = one.submit(workload.sleep, started)
    started.hear()
    target.cancel()
    one.submit(workload.exit_process, 1).exception(DEADLINE_S)
    one.clear()
    one.shutdown()
    assert not held.done()
    gate.open()
    assert held.result(DEADLINE_S) == "held"
    assert two.submit(workload.add, 1).result(DEADLINE_S) == 1


# The interpreter's end, and other ways to run a script

SCRIPT = """
import multiprocessing, os, sys
from scaler_executor import ScalerExecutor

factor = 3

def multiply(x):
    return factor * x

class Point:
    def __init__(self, x): self.x = x
    def double(self): return Point(2 * self.x)

executor = ScalerExecutor(1, multiprocessing.get_context(sys.argv[1]))
assert executor.submit(multiply, 2).result() == 6
assert list(executor.map(multiply, [1, 2])) == [3, 6]
point = executor.submit(Point(4).double).result()
assert isinstance(point, Point) and point.x == 8
assert executor.submit(lambda x: multiply(x) + 1, 2).result() == 7
print("end of script", os.getpid())
"""


@pytest.mark.parametrize("how", ["file", "command", "stdin"])
def test_unguarded_script(scene: Scene, start_method: str, how: str) -> None:
    """A script without a guard, `python -c` and a script on stdin work with every start method, and run once."""
    client = scene.client(SCRIPT, start_method, how=how)
    assert client.succeed() == f"end of script {client.pid}\n"


PENDING_SCRIPT = """
import multiprocessing, sys
import workload
from scaler_executor import ScalerExecutor
from support import copy_of_journal

journal = copy_of_journal(sys.argv[2])
executor = ScalerExecutor(2, multiprocessing.get_context(sys.argv[1]))
for number in range(500):
    executor.submit(workload.timed, journal, number, 0.0002, False)
executor.map(workload.timed_item, [(journal, number, 0.0) for number in range(500, 1000)])
print("end of script")
"""


def test_interpreter_exit_with_pending_work(scene: Scene, start_method: str) -> None:
    """At the end of the interpreter accepted work is finished, as ProcessPoolExecutor does it, and nothing is said."""
    journal = scene.journal()
    assert scene.client(PENDING_SCRIPT, start_method, journal.path).succeed() == "end of script\n"
    ended = [int(number) for word, number in journal.read() if word == "end"]
    assert sorted(ended) == list(range(1000))


CTRL_C_SCRIPT = """
import multiprocessing, sys
import workload
from scaler_executor import ScalerExecutor
from support import copy_of_fifo

started = copy_of_fifo(sys.argv[2])
with ScalerExecutor(2, multiprocessing.get_context(sys.argv[1])) as executor:
    futures = [executor.submit(workload.sleep, started) for _ in range(10)]
    futures[-1].result()
"""


def test_ctrl_c(scene: Scene, start_method: str) -> None:
    """After SIGINT to the user's process everything is stopped, and only that process shows a traceback."""
    started = scene.fifo()
    client = scene.client(CTRL_C_SCRIPT, start_method, started.path)
    pids = [int(started.hear()) for _ in range(2)]
    os.kill(client.pid, signal.SIGINT)
    assert client.wait() == -signal.SIGINT
    wait_gone(*pids)
    assert client.output.count("Traceback") == 1 and client.output.rstrip().endswith("KeyboardInterrupt")


#: From Python 3.12 on every fork of a process with threads is warned of.
NO_FORK_WARNING = ("-W", "ignore::DeprecationWarning")

FORK_SCRIPT = """
import multiprocessing, os, sys, time
import workload
from scaler_executor import ScalerExecutor

def in_child(executor, future, depth):
    for attempt in (
        lambda: executor.submit(workload.add, 1),
        lambda: executor.map(workload.add, [1]),
        lambda: future.cancel(),
        lambda: executor.clear(),
    ):
        try:
            attempt()
        except RuntimeError as error:
            assert "fork" in str(error), error
        else:
            os._exit(3)
    executor.shutdown()
    with ScalerExecutor(1, multiprocessing.get_context(sys.argv[1])) as own:
        assert own.submit(workload.add, 20, 1).result() == 21
        if depth:
            fork_child(own, own.submit(workload.pass_or_hold, None, None, 1), depth - 1)
        assert own.submit(workload.add, 20, 2).result() == 22

def fork_child(executor, future, depth):
    pid = os.fork()
    if not pid:
        code = 4
        try:
            in_child(executor, future, depth)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status

with ScalerExecutor(2, multiprocessing.get_context(sys.argv[1])) as executor:
    pending = executor.submit(time.sleep, 0.5)
    fork_child(executor, pending, 1)
    assert pending.result() is None
    assert executor.submit(workload.add, 1, 2).result() == 3
    target = executor.submit(time.sleep, 3600)
    target.cancel()
    assert target.cancelled()
print("end of script")
"""


def test_nested_forks_of_the_client(scene: Scene, start_method: str) -> None:
    """A forked child's copy refuses with RuntimeError, it may make its own executor; the parent is not affected."""
    assert scene.client(FORK_SCRIPT, start_method, flags=NO_FORK_WARNING).succeed() == "end of script\n"


EXIT_IN_CHILD_SCRIPT = """
import multiprocessing, os, sys
import workload
from scaler_executor import ScalerExecutor

executor = ScalerExecutor(2, multiprocessing.get_context(sys.argv[1]))
assert executor.submit(workload.add, 1, 2).result() == 3
pid = os.fork()
if not pid:
    sys.exit(0)  # with all that an interpreter does at its end
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert executor.submit(workload.add, 2, 2).result() == 4
print("end of script")
"""


def test_child_that_exits(scene: Scene, start_method: str) -> None:
    """A forked child that ends as an interpreter does takes nothing of its parent's executor along."""
    assert scene.client(EXIT_IN_CHILD_SCRIPT, start_method, flags=NO_FORK_WARNING).succeed() == "end of script\n"


# Workers


def test_max_tasks_per_child() -> None:
    """A worker is replaced after so many calls, in order, and no call is lost."""
    with ScalerExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=3) as executor:
        pids = [executor.submit(workload.get_pid).result(DEADLINE_S) for _ in range(9)]
        assert [len(set(pids[first : first + 3])) for first in (0, 3, 6)] == [1, 1, 1]
        assert len(set(pids)) == 3
        many = [executor.submit(workload.get_pid) for _ in range(60)]
        counts = [future.result(DEADLINE_S) for future in many]
        assert len(set(counts)) == 20 and max(map(counts.count, counts)) == 3
        assert list(executor.map(workload.add, range(30))) == list(range(30))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver", None])
def test_start_methods(method: str | None) -> None:
    """Every context works; with fork, and only then, workers inherit what the client has."""
    workload.set_value("inherited")
    try:
        with ScalerExecutor(1, multiprocessing.get_context(method) if method else None) as executor:
            value = executor.submit(workload.get_value).result(DEADLINE_S)
        is_fork = (method or multiprocessing.get_start_method()) == "fork"
        assert value == ("inherited" if is_fork else None)
    finally:
        workload.set_value(None)


def test_barrier(scene: Scene, make: Make) -> None:
    """max_workers calls that wait for each other all run at once, however many short calls went before."""
    executor = make(4)
    wait([executor.submit(workload.pass_or_hold, None, None, number) for number in range(500)])
    for _ in range(3):
        arrived, gate = scene.fifo(), scene.fifo()
        futures = [executor.submit(workload.pass_or_hold, arrived, gate, number) for number in range(4)]
        pids = {arrived.hear() for _ in futures}
        assert len(pids) == 4
        gate.open(4)
        assert [future.result(DEADLINE_S) for future in futures] == [0, 1, 2, 3]


def test_results_are_not_held_back(scene: Scene, make: Make) -> None:
    """[quick, quick, long] in one worker: the quick ones' results come while the long one runs."""
    executor = make(1)
    wait([executor.submit(workload.pass_or_hold, None, None, number) for number in range(500)])
    gate, started = scene.fifo(), scene.fifo()
    quick = [executor.submit(workload.pass_or_hold, None, None, number) for number in range(2)]
    long = executor.submit(workload.pass_or_hold, started, gate, 2)
    assert [future.result(DEADLINE_S) for future in quick] == [0, 1]
    started.hear()
    assert not long.done()
    gate.open()
    assert long.result(DEADLINE_S) == 2


def test_results_of_a_map_are_not_held_back(scene: Scene, make: Make) -> None:
    """The same inside one run of a map."""
    executor = make(1)
    list(executor.map(functools.partial(workload.pass_or_hold, None, None), range(500)))
    gate, started = scene.fifo(), scene.fifo()
    results = executor.map(workload.pass_or_hold, [None, None, started], [None, None, gate], range(3), chunksize=3)
    assert [next(results), next(results)] == [0, 1]
    started.hear()
    gate.open()
    assert list(results) == [2]


def test_calls_move_to_an_idle_worker(scene: Scene, make: Make) -> None:
    """Calls that were given to a worker behind one that turns out to be long are made by another, once each."""
    executor = make(2)
    wait([executor.submit(workload.pass_or_hold, None, None, number) for number in range(500)])  # it is short
    for _ in range(5):
        gate, started, journal = scene.fifo(), scene.fifo(), scene.journal()
        long = executor.submit(workload.pass_or_hold, started, gate, "long")
        quick = [executor.submit(workload.pass_or_hold, None, None, number) for number in range(100)]
        notes = [executor.submit(workload.note, journal, number) for number in range(100)]
        assert [future.result(DEADLINE_S) for future in quick] == list(range(100))
        wait(notes, DEADLINE_S)
        started.hear()
        assert not long.done()
        gate.open()
        assert long.result(DEADLINE_S) == "long"
        assert sorted(int(line[0]) for line in journal.read()) == list(range(100))


def test_items_of_a_run_move_to_an_idle_worker(scene: Scene, make: Make) -> None:
    """The items behind a long one in its run are made by another worker."""
    executor = make(2)
    list(executor.map(workload.pass_or_hold, [None] * 1000, [None] * 1000, range(1000)))
    gate, started = scene.fifo(), scene.fifo()
    seen = scene.journal()
    jobs: list[tuple[Any, ...]] = [(started, gate, seen, -1), *[(None, None, seen, number) for number in range(200)]]
    results = executor.map(workload.note_or_hold, jobs)
    started.hear()
    wait_until(lambda: len(seen.read()) == 200, "items wait behind a long one")
    gate.open()
    assert list(results) == [-1, *range(200)]
    assert sorted(int(line[0]) for line in seen.read()) == [-1, *range(200)]


def test_many_workers(scene: Scene, make: Make) -> None:
    """64 workers run 64 calls at once, and 640 more; half of them can be stopped together."""
    executor = make(64)
    arrived, gate = scene.fifo(), scene.fifo()
    futures = [executor.submit(workload.hold, arrived, gate, number) for number in range(64)]
    assert len({arrived.hear() for _ in futures}) == 64
    executor.cancel(futures[::2])
    assert all(future.cancel_outcome is CancelOutcome.CANCELED for future in futures[::2])
    more = [executor.submit(workload.add, number) for number in range(640)]
    gate.open(32)
    assert [future.result(DEADLINE_S) for future in futures[1::2]] == list(range(1, 64, 2))
    assert [future.result(DEADLINE_S) for future in more] == list(range(640))


# Sizes


def test_large_bytes(executor: ScalerExecutor) -> None:
    """100 MB go there and back."""
    data = os.urandom(1 << 20) * 100
    assert executor.submit(workload.echo, data).result(DEADLINE_S) == data


def test_large_arrays(executor: ScalerExecutor) -> None:
    """A 100 MB array goes there and back, is writable on both sides, and is a copy."""
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(13_000_000, dtype=numpy.int64)
    back = executor.submit(workload.increment_in_place, array).result(DEADLINE_S)
    assert int(array[-1]) == 12_999_999 and int(back[-1]) == 13_000_000
    back[0] = 7


def test_results_larger_than_the_pipe(executor: ScalerExecutor) -> None:
    """Many results of several megabytes each, unread for a while, all arrive."""
    futures = [executor.submit(workload.make_bytes, (number % 5 + 1) << 20) for number in range(60)]
    for number, future in enumerate(futures):
        assert len(future.result(DEADLINE_S)) == (number % 5 + 1) << 20


def test_many_large_arguments(executor: ScalerExecutor) -> None:
    """So do arguments."""
    futures = [executor.submit(len, bytes(number << 18)) for number in range(60)]
    assert [future.result(DEADLINE_S) for future in futures] == [number << 18 for number in range(60)]


PRINTING_SCRIPT = """
import multiprocessing, sys
import workload
from scaler_executor import ScalerExecutor

with ScalerExecutor(1, multiprocessing.get_context(sys.argv[1])) as executor:
    assert list(executor.map(workload.print_much, [20000] * 2, [200] * 2)) == [20000] * 2
"""


def test_huge_stdout(scene: Scene, start_method: str) -> None:
    """What calls print appears on the client's standard output, all of it."""
    output = scene.client(PRINTING_SCRIPT, start_method).succeed()
    assert len(output) == 2 * 20000 * 201
    assert sorted(output.split()) == sorted(2 * [f"{number:06d}".ljust(200, ".") for number in range(20000)])


def test_a_million_items(executor: ScalerExecutor) -> None:
    """A map of a million items gives a million results, in order."""
    assert sum(1 for item, value in enumerate(executor.map(abs, range(1_000_000))) if item == value) == 1_000_000


def test_many_calls(executor: ScalerExecutor) -> None:
    """Fifty thousand calls give fifty thousand results."""
    futures = [executor.submit(abs, number) for number in range(50_000)]
    assert [future.result(DEADLINE_S) for future in futures] == list(range(50_000))


def test_map_takes_back_what_has_not_started(scene: Scene, make: Make) -> None:
    """A closed map lets the running item finish, takes back the others, and does not disturb submitted calls."""
    executor = make(1)
    gate, started, journal = scene.fifo(), scene.fifo(), scene.journal()
    jobs = [(None, None, journal, -2), (started, gate, journal, -1), *[(None, None, journal, n) for n in range(50_000)]]
    results = executor.map(workload.note_or_hold, jobs)
    assert next(results) == -2
    started.hear()
    after = executor.submit(workload.add, 1)
    results.close()  # type: ignore[attr-defined]
    gate.open()
    assert after.result(DEADLINE_S) == 1
    executor.shutdown()
    numbers = [int(line[0]) for line in journal.read()]
    assert numbers[:2] == [-2, -1]
    assert len(numbers) == len(set(numbers)) < 50_000


def test_map_timeout(scene: Scene, executor: ScalerExecutor) -> None:
    """A map that takes too long raises TimeoutError; the executor goes on."""
    gate, started = scene.fifo(), scene.fifo()
    results = executor.map(workload.hold, [started], [gate], timeout=0.05)
    started.hear()
    with pytest.raises(concurrent.futures.TimeoutError):  # not yet the built-in one in Python 3.10
        list(results)
    gate.open()
    assert executor.submit(workload.add, 1).result(DEADLINE_S) == 1


def test_it_is_an_executor(executor: ScalerExecutor) -> None:
    """It is a concurrent.futures.Executor, and cancelled maps raise what the standard library's raise."""
    assert isinstance(executor, Executor)
    future = executor.submit(workload.add, 1)
    future.cancel()
    with pytest.raises(CancelledError):
        future.result()
