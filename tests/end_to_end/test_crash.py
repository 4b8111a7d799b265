"""Crashes: each costs the call that crashed, says what happened, and leaves nothing behind."""

from __future__ import annotations

import itertools
import os
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import workload
from support import DEADLINE_S, Cluster, Scene, is_gone, wait_gone, wait_until

from scaler_executor import (
    CancelOutcome,
    RemoteError,
    ScalerExecutor,
    ScalerFuture,
    SchedulerLostError,
    WorkerDiedError,
    WorkerStartError,
)
from scaler_executor.runtime import platform
from scaler_executor.runtime.segments import sweep

Make = Callable[..., ScalerExecutor]


def death_of(future: ScalerFuture[Any]) -> WorkerDiedError:
    error = future.exception(DEADLINE_S)
    assert isinstance(error, WorkerDiedError), error
    assert isinstance(error, BrokenProcessPool)
    return error


def assert_usable(executor: ScalerExecutor) -> None:
    assert executor.submit(workload.add, 2, right=3).result(DEADLINE_S) == 5


# A worker dies


def test_exit_in_one_of_many(scene: Scene, executor: ScalerExecutor) -> None:
    """os._exit in one of 200 calls costs that one: 199 results, and the error names call, exit code and process."""
    journal = scene.journal()
    futures = [executor.submit(workload.note_and_exit_if, journal, number, 77) for number in range(200)]
    wait(futures, DEADLINE_S)
    error = death_of(futures[77])
    assert error.exit_code == 7 and error.signal_name is None
    assert error.call_name == "note_and_exit_if" and error.pid and error.host
    assert "note_and_exit_if" in str(error) and "7" in error.reason
    assert [future.result(0) for future in futures if future is not futures[77]] == [*range(77), *range(78, 200)]
    assert sorted(int(line[1]) for line in journal.read()) == list(range(200))
    assert_usable(executor)


@pytest.mark.parametrize(
    ("call", "arguments", "number"),
    [
        (workload.read_null, (), signal.SIGSEGV),
        (workload.kill_self, (signal.SIGSEGV,), signal.SIGSEGV),
        (workload.kill_self, (signal.SIGKILL,), signal.SIGKILL),
        (workload.kill_self, (signal.SIGTERM,), signal.SIGTERM),
        (os.abort, (), signal.SIGABRT),
    ],
)
def test_signal(
    executor: ScalerExecutor, call: Callable[..., Any], arguments: tuple[Any, ...], number: signal.Signals
) -> None:
    """A call that dies by a signal says which."""
    error = death_of(executor.submit(call, *arguments))
    assert (error.exit_code, error.signal_name) == (-number, number.name)
    assert number.name in str(error)
    assert_usable(executor)


def test_killed_from_outside(scene: Scene, executor: ScalerExecutor) -> None:
    """kill -9 of a worker costs the call that it was in; its neighbour goes on."""
    gate, started, kept_started = scene.fifo(), scene.fifo(), scene.fifo()
    kept = executor.submit(workload.hold, kept_started, gate, "kept")
    kept_started.hear()
    future = executor.submit(workload.sleep, started)
    pid = int(started.hear())
    os.kill(pid, signal.SIGKILL)
    error = death_of(future)
    assert (error.exit_code, error.signal_name, error.pid) == (-9, "SIGKILL", pid)
    assert_usable(executor)
    gate.open()
    assert kept.result(DEADLINE_S) == "kept"


def test_idle_worker_killed(make: Make) -> None:
    """kill -9 of an idle worker costs nothing."""
    executor = make(1)
    for _ in range(5):
        pid = executor.submit(workload.get_pid).result(DEADLINE_S)
        os.kill(pid, signal.SIGKILL)
        # It may be given a call before its death is known: that call cannot have started, so it is made elsewhere.
        assert executor.submit(workload.get_pid).result(DEADLINE_S) != pid


def test_queued_calls_survive(scene: Scene, make: Make) -> None:
    """When a call kills its worker those behind it in the same worker's hands run elsewhere, once each."""
    executor = make(1)
    journal = scene.journal()
    wait([executor.submit(workload.note_and_exit_if, journal, -1, 0) for _ in range(300)])  # it is short
    before = len(journal.read())
    for turn in range(5):
        first = 1000 * (turn + 1)
        futures = [
            executor.submit(workload.note_and_exit_if, journal, first + number, first + 50) for number in range(100)
        ]
        wait(futures, DEADLINE_S)
        assert [number for number, future in enumerate(futures) if future.exception(0)] == [50]
        assert death_of(futures[50]).exit_code == 7
    numbers = [int(line[1]) for line in journal.read()[before:]]
    assert sorted(numbers) == [1000 * turn + number for turn in range(1, 6) for number in range(100)]


def test_death_in_a_map(scene: Scene, executor: ScalerExecutor) -> None:
    """In a map the item that crashed raises, the results before it are there, and no item ran twice."""
    journal = scene.journal()
    arguments = itertools.repeat(journal), range(500), itertools.repeat(300)
    results = executor.map(workload.note_and_exit_if, *arguments)
    assert list(itertools.islice(results, 300)) == list(range(300))
    with pytest.raises(WorkerDiedError) as caught:
        next(results)
    assert caught.value.exit_code == 7
    assert_usable(executor)
    executor.shutdown()
    numbers = [int(line[1]) for line in journal.read()]
    assert len(numbers) == len(set(numbers)) and set(range(301)) <= set(numbers)


def test_every_call_dies(executor: ScalerExecutor) -> None:
    """Fifty crashes in a row do not make the executor give up."""
    futures = [executor.submit(workload.exit_process, 1 + number) for number in range(50)]
    assert [death_of(future).exit_code for future in futures] == list(range(1, 51))
    assert_usable(executor)


def test_subprocess_of_a_dead_worker(scene: Scene, executor: ScalerExecutor) -> None:
    """What a crashed call had started goes with it."""
    started = scene.fifo()
    future = executor.submit(workload.leave_subprocess, started)
    pid, child = started.hear_numbers()
    os.kill(pid, signal.SIGKILL)
    death_of(future)
    wait_gone(child)


# What does not pickle, and other errors of a call


def test_function_that_does_not_pickle(executor: ScalerExecutor) -> None:
    """The pickling error of a function lands on its future."""
    with pytest.raises(TypeError, match="does not pickle"):
        executor.submit(workload.Unpicklable()).result(DEADLINE_S)
    assert_usable(executor)


def test_argument_that_does_not_pickle(executor: ScalerExecutor) -> None:
    """The pickling error of an argument lands on its future."""
    futures = [
        executor.submit(workload.echo, workload.Unpicklable()),
        executor.submit(workload.add, 1, right=workload.Unpicklable()),  # type: ignore[arg-type]
    ]
    for future in futures:
        with pytest.raises(TypeError, match="does not pickle"):
            future.result(DEADLINE_S)
    assert_usable(executor)


def test_what_does_not_unpickle_in_the_worker(make: Make) -> None:
    """An error while function or argument are unpickled lands on the future, and the worker lives."""
    executor = make(1)
    pid = executor.submit(workload.get_pid).result(DEADLINE_S)
    for future in (
        executor.submit(workload.PoisonOnLoad("function")),
        executor.submit(workload.echo, workload.PoisonOnLoad("argument")),
    ):
        with pytest.raises(ValueError, match=r"does not unpickle: (function|argument)"):
            future.result(DEADLINE_S)
    assert executor.submit(workload.get_pid).result(DEADLINE_S) == pid


def test_result_that_does_not_pickle(make: Make) -> None:
    """The pickling error of a result lands on the future, and the worker lives."""
    executor = make(1)
    pid = executor.submit(workload.get_pid).result(DEADLINE_S)
    with pytest.raises(TypeError, match="does not pickle"):
        executor.submit(workload.return_unpicklable).result(DEADLINE_S)
    assert executor.submit(workload.get_pid).result(DEADLINE_S) == pid


def test_result_that_does_not_unpickle(executor: ScalerExecutor) -> None:
    """A result that does not unpickle here raises where it is read, each time; others are not touched."""
    before, bad, after = [
        executor.submit(workload.add, 1),
        executor.submit(workload.return_poison),
        executor.submit(workload.add, 2),
    ]
    for _ in range(2):
        with pytest.raises(ValueError, match="does not unpickle: result"):
            bad.result(DEADLINE_S)
    assert (before.result(DEADLINE_S), after.result(DEADLINE_S)) == (1, 2)


def test_exceptions_that_do_not_pickle(executor: ScalerExecutor) -> None:
    """An exception that does not survive the journey is replaced by one with its type's name, text and traceback."""
    for call, name, text in [
        (workload.raise_two_arguments, "TwoArgumentsError", "1 and 2"),
        (workload.raise_locked, "LockedError", "locked"),
        (workload.raise_poison, "ValueError", "PoisonOnLoad"),
    ]:
        error = executor.submit(call).exception(DEADLINE_S)
        if isinstance(error, RemoteError):
            assert name in error.type_name and text in error.text
            assert call.__name__ in error.traceback
        else:  # pickled with more care than pickle takes, or refused only here
            assert name == type(error).__name__
    assert_usable(executor)


def test_exceptions_with_odd_constructors(executor: ScalerExecutor) -> None:
    """A local class, a keyword-only argument: the type's name and the text arrive."""
    for call, name, text in [
        (workload.raise_local, "LocalError", "local"),
        (workload.raise_keyword, "KeywordError", "odd"),
    ]:
        error = executor.submit(call).exception(DEADLINE_S)
        assert error is not None
        assert name in f"{type(error).__name__} {error}" and text in str(error)
    assert_usable(executor)


def test_remote_traceback(executor: ScalerExecutor) -> None:
    """The worker's traceback is the cause, shown as ProcessPoolExecutor shows it."""
    error = executor.submit(workload.raise_value, "far away").exception(DEADLINE_S)
    assert isinstance(error, ValueError) and error.args == ("far away",)
    assert type(error.__cause__).__name__.endswith("RemoteTraceback")
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert '"""\nTraceback (most recent call last):' in shown
    assert "in raise_value" in shown and "The above exception was the direct cause" in shown
    chained = executor.submit(workload.raise_chain).exception(DEADLINE_S)
    assert isinstance(chained, KeyError)
    assert "ValueError: inner" in str(chained.__cause__) and "KeyError: 'outer'" in str(chained.__cause__)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("user's"), GeneratorExit(), BaseException("base")])
def test_base_exceptions(make: Make, error: BaseException) -> None:
    """SystemExit, KeyboardInterrupt and their like are an ordinary call's error; the worker lives."""
    executor = make(1)
    pid = executor.submit(workload.get_pid).result(DEADLINE_S)
    raised = executor.submit(workload.fail, error).exception(DEADLINE_S)
    assert type(raised) is type(error) and raised.args == error.args
    assert executor.submit(workload.get_pid).result(DEADLINE_S) == pid


def test_sys_exit(executor: ScalerExecutor) -> None:
    """sys.exit() in a call raises SystemExit where its result is read."""
    with pytest.raises(SystemExit) as caught:
        executor.submit(workload.exit_python, "bye").result(DEADLINE_S)
    assert caught.value.code == "bye"


def test_fork_inside_a_call(executor: ScalerExecutor) -> None:
    """A call that forks and returns in the child, too, has one result: the parent's."""
    assert executor.submit(workload.fork_and_return).result(DEADLINE_S) == 0
    assert_usable(executor)


# Workers that cannot start


def assert_start_error(future: ScalerFuture[Any], text: str) -> None:
    error = future.exception(DEADLINE_S)
    assert isinstance(error, WorkerStartError) and isinstance(error, BrokenExecutor)
    assert text in str(error)


def test_failing_initializer(scene: Scene, make: Make) -> None:
    """A failing initializer breaks the executor, with its traceback, and workers are not tried again and again."""
    journal = scene.journal()
    executor = make(2, initializer=workload.fail_to_start, initargs=(journal,))
    futures = [executor.submit(workload.add, number) for number in range(10)]
    for future in futures:
        assert_start_error(future, "the licence server does not answer")
    assert "in fail_to_start" in str(futures[0].exception())
    with pytest.raises(BrokenExecutor, match="licence server"):
        executor.submit(workload.add, 1)
    with pytest.raises(BrokenExecutor):
        executor.map(workload.add, [1])
    executor.shutdown()
    assert 1 <= len(journal.read()) <= 2


def test_initializer_that_exits(scene: Scene, make: Make) -> None:
    """So does one whose process ends, after a few attempts."""
    journal = scene.journal()
    executor = make(2, initializer=workload.exit_at_start, initargs=(journal, 5))
    future = executor.submit(workload.add, 1)
    assert_start_error(future, "code 5")
    executor.shutdown()
    assert 1 <= len(journal.read()) <= 6


def test_initializer(make: Make) -> None:
    """The initializer runs in each worker, also in those that replace dead ones."""
    executor = make(1, initializer=workload.set_value, initargs=("set",))
    assert executor.submit(workload.get_value).result(DEADLINE_S) == "set"
    death_of(executor.submit(workload.exit_process, 1))
    assert executor.submit(workload.get_value).result(DEADLINE_S) == "set"


# The other processes die


def test_serve_killed(scene: Scene, executor: ScalerExecutor) -> None:
    """kill -9 of serve: pending calls get SchedulerLostError, new ones are refused, and no process is left."""
    started, heartbeat = scene.fifo(), scene.heartbeat()
    done = executor.submit(workload.add, 1)
    assert done.result(DEADLINE_S) == 1
    running = executor.submit(workload.defy, started, heartbeat)
    started.hear()
    holding = executor.submit(workload.hold_gil, started)
    started.hear()
    queued = [executor.submit(workload.add, number) for number in range(10)]
    items = executor.map(workload.add, range(10))
    pids = Cluster().all()
    os.kill(pids[0], signal.SIGKILL)
    for future in [running, holding, *queued]:
        error = future.exception(DEADLINE_S)
        assert isinstance(error, SchedulerLostError) and isinstance(error, BrokenExecutor)
        assert "SIGKILL" in str(error) or "signal 9" in str(error)
    with pytest.raises(SchedulerLostError):
        list(items)
    with pytest.raises(SchedulerLostError):
        executor.submit(workload.add, 1)
    assert done.result(0) == 1
    wait_gone(*pids)
    assert running.cancel() is True
    assert running.cancel_outcome is CancelOutcome.ALREADY_DONE


def test_forker_killed(scene: Scene, executor: ScalerExecutor) -> None:
    """kill -9 of the forker: running calls are WorkerDiedErrors, queued ones run, the executor is usable again."""
    started, journal, heartbeat = scene.fifo(), scene.journal(), scene.heartbeat()
    for turn in range(3):
        running = [executor.submit(workload.hold_gil, started), executor.submit(workload.defy, started, heartbeat)]
        pids = [int(started.hear()) for _ in running]
        queued = [executor.submit(workload.note, journal, turn, number) for number in range(10)]
        os.kill(Cluster().forker, signal.SIGKILL)
        for future in running:
            assert "fork" in str(death_of(future))
        wait_gone(*pids)
        wait(queued, DEADLINE_S)
        assert [future.exception(0) for future in queued] == [None] * 10
        assert_usable(executor)
    assert len(journal.read()) == 30


def test_forker_killed_when_idle(executor: ScalerExecutor) -> None:
    """kill -9 of the forker while nothing runs costs nothing."""
    assert_usable(executor)
    pids = Cluster().all()[1:]
    os.kill(pids[0], signal.SIGKILL)
    wait_gone(*pids)
    assert_usable(executor)


def test_forker_killed_with_initializer(scene: Scene, make: Make, start_method: str) -> None:
    """Where the initializer was inherited by fork it is lost with the forker, and the executor says so."""
    executor = make(2, initializer=workload.set_value, initargs=("set",))
    started = scene.fifo()
    running = executor.submit(workload.sleep, started)
    started.hear()
    os.kill(Cluster().forker, signal.SIGKILL)
    death_of(running)
    if start_method == "spawn":
        assert executor.submit(workload.get_value).result(DEADLINE_S) == "set"
    else:
        wait_until(lambda: is_broken(executor), "still usable")


def is_broken(executor: ScalerExecutor) -> bool:
    try:
        error = executor.submit(workload.get_value).exception(DEADLINE_S)
    except BrokenExecutor as refused:
        error = refused
    assert isinstance(error, WorkerStartError) and "fork" in str(error), error
    return True


CLIENT = """
import multiprocessing, sys
import workload
from scaler_executor import ScalerExecutor
from support import copy_of_fifo, copy_of_heartbeat

method, is_running, first, third, ready, started, gate, beat = sys.argv[1:]
ready, started, gate = map(copy_of_fifo, (ready, started, gate))

if __name__ == "__main__":
    executor = ScalerExecutor(3, multiprocessing.get_context(method))
    assert list(executor.map(workload.add, range(10))) == list(range(10))
    futures = []
    if int(is_running):
        futures = [
            executor.submit(getattr(workload, first), started),
            executor.submit(workload.defy, started, copy_of_heartbeat(beat)),
            executor.submit(getattr(workload, third), started),
            *[executor.submit(workload.sleep, started) for _ in range(10)],
        ]
    ready.tell()
    gate.await_opening()
    for future in futures:
        future.exception()
    executor.shutdown()
"""

SUBSETS = [subset for count in (1, 2, 3) for subset in itertools.combinations(("client", "serve", "forker"), count)]


@pytest.mark.parametrize("is_running", [False, True], ids=["idle", "running"])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_kill_subset(scene: Scene, start_method: str, subset: tuple[str, ...], is_running: bool) -> None:
    """kill -9 of client, serve, forker, or any of them together: no process is left, whatever the calls do.

    One thing is out of reach: where serve and forker die in the same moment nobody is left who knows of a call's own
    subprocesses. Nor is anybody, where the kernel does not see to it, who ends a call that holds the GIL.
    """
    is_nobody_left = {"serve", "forker"} <= set(subset)
    first = "sleep" if is_nobody_left and platform.PORTABLE else "hold_gil"
    third = "sleep" if is_nobody_left else "work_in_subprocess"
    ready, started, gate, heartbeat = scene.fifo(), scene.fifo(), scene.fifo(), scene.heartbeat()
    paths = [part.path for part in (ready, started, gate, heartbeat)]
    client = scene.client(CLIENT, start_method, int(is_running), first, third, *paths)
    ready.hear()
    if is_running:
        for _ in range(3):
            started.hear()
    cluster = Cluster(client.pid)
    pids = [*cluster.all(), *scene.processes()]
    victims = {"client": client.pid, "serve": cluster.serve, "forker": cluster.forker}
    for name in subset:
        os.kill(victims[name], signal.SIGSTOP)  # so that all of them die at what is the same moment to each other
    for name in subset:
        os.kill(victims[name], signal.SIGKILL)
    if "client" not in subset:
        if subset == ("forker",) and is_running:
            for _ in range(3):
                started.hear()  # the calls that were queued run in new workers
            client.process.kill()
        else:
            gate.open()
        client.wait()
    wait_gone(*[pid for pid in pids if pid != client.pid])
    if len(subset) == len(victims):
        client.wait()
        sweep(str(scene.shared))  # as the next executor does: nobody was left to do it


CLIENT_THAT_C_FORKS = """
import ctypes, multiprocessing, sys
import workload
from scaler_executor import ScalerExecutor
from support import copy_of_fifo

method, ready, started, gate = sys.argv[1:]

if __name__ == "__main__":
    executor = ScalerExecutor(2, multiprocessing.get_context(method))
    running = executor.submit(workload.sleep, copy_of_fifo(started))
    copy_of_fifo(gate).await_opening()
    libc = ctypes.PyDLL(None)  # with the GIL, so that no other thread's hold of it is copied
    fork = libc.fork()
    if not fork:
        while True:
            libc.pause()
    copy_of_fifo(ready).tell(fork)
    running.exception()
"""


def test_client_killed_that_c_code_has_forked(scene: Scene, start_method: str) -> None:
    """kill -9 of a client: nothing of its cluster is left though a fork of it, of which Python does not know, lives on
    and has everything open that the client had."""
    ready, started, gate = scene.fifo(), scene.fifo(), scene.fifo()
    client = scene.client(CLIENT_THAT_C_FORKS, start_method, ready.path, started.path, gate.path)
    started.hear()
    pids = Cluster(client.pid).all()
    gate.open()
    fork = int(ready.hear())
    client.process.kill()
    client.wait()
    wait_gone(*pids)
    assert not is_gone(fork)
    os.kill(fork, signal.SIGKILL)
    wait_gone(fork)
