"""cancel() of calls that run: their code stops, nothing else does, and only then is it confirmed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest
import workload
from support import DEADLINE_S, Cluster, Scene, is_gone, wait_gone, wait_until

from scaler_executor import CancelOutcome, ScalerExecutor, ScalerFuture

Make = Callable[..., ScalerExecutor]


def assert_stopped(future: ScalerFuture[Any], outcome: CancelOutcome = CancelOutcome.CANCELED) -> None:
    assert future.cancel_outcome is outcome
    assert future.cancelled() and future.done() and not future.running()
    with pytest.raises(CancelledError):
        future.result(0)


def assert_usable(executor: ScalerExecutor) -> None:
    assert executor.submit(workload.add, 2, right=3).result(DEADLINE_S) == 5


def cancel_beside_neighbour(
    scene: Scene, executor: ScalerExecutor, call: Callable[..., Any], *arguments: Any
) -> tuple[int, ScalerFuture[Any]]:
    """Start `call` beside a neighbour, cancel it, check that only it was hit. Return its worker's pid and the future.

    The neighbour is still there afterwards, in its own process, and completes.
    """
    gate, started, neighbour_started = scene.fifo(), scene.fifo(), scene.fifo()
    neighbour = executor.submit(workload.hold, neighbour_started, gate, "neighbour")
    (neighbour_pid,) = neighbour_started.hear_numbers()
    target = executor.submit(call, started, *arguments)
    pid = started.hear_numbers()[0]
    assert target.cancel() is True
    assert not is_gone(neighbour_pid)
    assert_usable(executor)
    gate.open()
    assert neighbour.result(DEADLINE_S) == "neighbour"
    return pid, target


def test_sleep(scene: Scene, executor: ScalerExecutor) -> None:
    """A sleeping call stops and its worker goes."""
    pid, target = cancel_beside_neighbour(scene, executor, workload.sleep)
    assert_stopped(target)
    wait_gone(pid)


@pytest.mark.parametrize("call", [workload.spin, workload.catch_everything, workload.defy, workload.beat_in_thread])
def test_python_loop(scene: Scene, make: Make, call: Callable[..., Any]) -> None:
    """A loop stops before cancel() returns: whether it takes the interrupt, catches it, or ignores every signal.

    So does one in a thread that the call started, when the worker ends.
    """
    executor = make(2, cancel_grace=0.1)
    heartbeat = scene.heartbeat()
    pid, target = cancel_beside_neighbour(scene, executor, call, heartbeat)
    assert_stopped(target)
    wait_gone(pid)


@pytest.mark.parametrize("call", [workload.catch_everything, workload.defy])
@pytest.mark.parametrize("cancel_grace", [0, 0.05])
def test_killed_code_has_stopped_at_the_confirm(
    scene: Scene, make: Make, call: Callable[..., Any], cancel_grace: float
) -> None:
    """When cancel() returns, a call that had to be killed does not make another heartbeat and its process is gone."""
    executor = make(1, cancel_grace=cancel_grace)
    for _ in range(5):
        started, heartbeat = scene.fifo(), scene.heartbeat()
        target = executor.submit(call, started, heartbeat)
        (pid,) = started.hear_numbers()
        heartbeat.await_beat()
        target.cancel()
        count = heartbeat.count
        assert is_gone(pid)
        assert_stopped(target)
        assert_usable(executor)
        assert heartbeat.count == count


def test_unwound_code_has_stopped_at_the_confirm(scene: Scene, make: Make) -> None:
    """When cancel() returns, a call that unwinds does not make another heartbeat."""
    executor = make(1)
    for _ in range(20):
        started, heartbeat = scene.fifo(), scene.heartbeat()
        target = executor.submit(workload.spin, started, heartbeat)
        started.hear()
        heartbeat.await_beat()
        target.cancel()
        count = heartbeat.count
        assert_stopped(target)
        assert_usable(executor)
        assert heartbeat.count == count


@pytest.mark.parametrize("cancel_grace", [0, 0.1])
def test_code_that_holds_the_gil(scene: Scene, make: Make, cancel_grace: float) -> None:
    """C code that holds the GIL and looks for no signal is killed."""
    executor = make(2, cancel_grace=cancel_grace)
    pid, target = cancel_beside_neighbour(scene, executor, workload.hold_gil)
    assert is_gone(pid)
    assert_stopped(target)


def test_asyncio(scene: Scene, executor: ScalerExecutor) -> None:
    """asyncio.run unwinds: each task's finally block runs before the confirm."""
    journal = scene.journal()
    _, target = cancel_beside_neighbour(scene, executor, workload.run_asyncio, journal)
    assert_stopped(target)
    assert sorted(line[1] for line in journal.read()) == ["main", "one", "two"]


@pytest.mark.parametrize("cancel_grace", [0, 0.3])
@pytest.mark.parametrize("is_deaf", [False, True])
def test_subprocess_of_a_call(scene: Scene, make: Make, cancel_grace: float, is_deaf: bool) -> None:
    """The subprocess that a call waits for, and that one's child, are gone at the confirm.

    The call's `with` block waits for its child, which nobody has told: it lasts until the grace time is over.
    """
    executor = make(1, cancel_grace=cancel_grace)
    started = scene.fifo()
    target = executor.submit(workload.wait_for_subprocess, started, is_deaf=is_deaf)
    pids = started.hear_numbers()
    target.cancel()
    assert [pid for pid in pids[1:] if not is_gone(pid)] == []
    assert_stopped(target)
    assert_usable(executor)


@pytest.mark.parametrize("call", [workload.run_subprocess, workload.leave_subprocess, workload.leave_process])
def test_subprocess_of_an_unwound_call(scene: Scene, make: Make, call: Callable[..., Any]) -> None:
    """A call that unwinds leaves no subprocess either, whether it cleans up after itself or not."""
    executor = make(1, cancel_grace=10)
    started = scene.fifo()
    target = executor.submit(call, started)
    pids = started.hear_numbers()
    target.cancel()
    assert [pid for pid in pids[1:] if not is_gone(pid)] == []
    assert_stopped(target)
    assert_usable(executor)


def test_finally_and_temporary_files(scene: Scene, executor: ScalerExecutor) -> None:
    """Context managers and finally blocks run before the confirm: no temporary file is left."""
    journal = scene.journal()
    _, target = cancel_beside_neighbour(scene, executor, workload.work_with_files, journal)
    assert_stopped(target)
    (_, *paths), *rest = journal.read()
    assert rest == [["finally"]]
    assert [path for path in paths if os.path.exists(path)] == []


def test_swallowed_interrupt(scene: Scene, executor: ScalerExecutor) -> None:
    """A call that swallows the interrupt and returns has finished first; its worker is replaced all the same."""
    pid, target = cancel_beside_neighbour(scene, executor, workload.swallow)
    assert_stopped(target, CancelOutcome.FINISHED_FIRST)
    wait_gone(pid)


def test_death_while_unwinding(scene: Scene, executor: ScalerExecutor) -> None:
    """A call whose process dies of the interrupt is cancelled, not a WorkerDiedError."""
    _, target = cancel_beside_neighbour(scene, executor, workload.die_when_interrupted, 3)
    assert_stopped(target)


def test_error_while_unwinding(scene: Scene, executor: ScalerExecutor) -> None:
    """What a call raises instead of the interrupt is not seen: it was asked to stop and has."""
    _, target = cancel_beside_neighbour(scene, executor, workload.raise_when_interrupted)
    assert target.cancelled()
    assert target.cancel_outcome in (CancelOutcome.CANCELED, CancelOutcome.FINISHED_FIRST)


def test_no_grace(scene: Scene, make: Make) -> None:
    """With cancel_grace=0 nothing unwinds: the process is killed at once."""
    executor = make(2, cancel_grace=0)
    journal = scene.journal()
    pid, target = cancel_beside_neighbour(scene, executor, workload.work_with_files, journal)
    assert_stopped(target)
    assert is_gone(pid)
    (_, directory, *paths), *rest = journal.read()
    assert rest == []
    for path in paths:
        os.unlink(path)
    os.rmdir(directory)


def test_many_at_once(scene: Scene, make: Make) -> None:
    """Running and queued calls are cancelled together; their neighbours complete."""
    executor = make(4)
    gate, started = scene.fifo(), scene.fifo()
    kept = [executor.submit(workload.hold, started, gate, number) for number in range(2)]
    kept_pids = {int(started.hear()) for _ in kept}
    doomed = [executor.submit(workload.sleep, started) for _ in range(2)]
    pids = [int(started.hear()) for _ in doomed]
    queued = [executor.submit(workload.sleep, started) for _ in range(100)]
    assert executor.cancel([*queued, *doomed]) is True
    for future in [*queued, *doomed]:
        assert_stopped(future)
    assert not any(map(is_gone, kept_pids))
    gate.open(2)
    assert [future.result(DEADLINE_S) for future in kept] == [0, 1]
    wait_gone(*pids)
    assert_usable(executor)


def test_many_threads_at_once(scene: Scene, make: Make) -> None:
    """Threads that cancel their own calls at the same time do not hit each other's."""
    executor = make(4)
    outcomes: list[tuple[CancelOutcome | None, int]] = []

    def run_one() -> None:
        started = scene.fifo()
        target = executor.submit(workload.sleep, started)
        pid = int(started.hear())
        target.cancel()
        outcomes.append((target.cancel_outcome, pid))

    threads = [threading.Thread(target=run_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert [outcome for outcome, _ in outcomes] == [CancelOutcome.CANCELED] * 4
    wait_gone(*[pid for _, pid in outcomes])
    assert_usable(executor)


def test_queued_behind_running(scene: Scene, make: Make) -> None:
    """Cancelled calls behind a running one never start, the others run, and the running one is left alone."""
    executor = make(1)
    gate, started, journal = scene.fifo(), scene.fifo(), scene.journal()
    running = executor.submit(workload.hold, started, gate, "running")
    started.hear()
    queued = [executor.submit(workload.note, journal, number) for number in range(30)]
    for future in queued[::3]:
        future.cancel()
        assert_stopped(future)
    gate.open()
    assert running.result(DEADLINE_S) == "running"
    wait(queued, DEADLINE_S)
    assert [int(line[0]) for line in journal.read()] == [number for number in range(30) if number % 3]


def test_the_next_call_is_not_hit(scene: Scene, make: Make) -> None:
    """When a running call is stopped, those behind it in the same worker's hands run, once each."""
    executor = make(1)
    journal = scene.journal()
    for _ in range(200):  # known to be short: so several are given to the worker at once
        executor.submit(workload.pass_or_hold, None, None, 0)
    for turn in range(5):
        gate, started = scene.fifo(), scene.fifo()
        target = executor.submit(workload.pass_or_hold, started, gate, 0)
        followers = [executor.submit(workload.note, journal, turn, number) for number in range(50)]
        started.hear()
        target.cancel()
        assert_stopped(target)
        wait(followers, DEADLINE_S)
        assert [future.exception(0) for future in followers] == [None] * 50
    assert sorted((int(a), int(b)) for a, b in journal.read()) == [(a, b) for a in range(5) for b in range(50)]


def test_soft_cancel_of_a_running_call(scene: Scene, executor: ScalerExecutor) -> None:
    """force=False fails on a call that runs; it completes normally, and may be cancelled again."""
    gate, started = scene.fifo(), scene.fifo()
    target = executor.submit(workload.hold, started, gate, "kept")
    started.hear()
    assert target.cancel(force=False) is True
    assert target.cancel_outcome is CancelOutcome.FAILED
    assert not target.cancelled() and not target.done()
    assert target.cancel(force=False) is True
    gate.open()
    assert target.result(DEADLINE_S) == "kept"
    assert target.cancel_outcome is CancelOutcome.FAILED


def test_soft_cancel_then_forced(scene: Scene, executor: ScalerExecutor) -> None:
    """A forced cancel after a failed soft one stops the call."""
    started = scene.fifo()
    target = executor.submit(workload.sleep, started)
    pid = int(started.hear())
    target.cancel(force=False)
    assert target.cancel_outcome is CancelOutcome.FAILED
    target.cancel()
    assert_stopped(target)
    wait_gone(pid)
    assert_usable(executor)


def test_soft_cancel_of_a_queued_call(scene: Scene, make: Make) -> None:
    """force=False takes back a call that has not started."""
    executor = make(1)
    gate, started, journal = scene.fifo(), scene.fifo(), scene.journal()
    running = executor.submit(workload.hold, started, gate)
    started.hear()
    queued = executor.submit(workload.note, journal, "ran")
    queued.cancel(force=False)
    assert_stopped(queued)
    gate.open()
    running.result(DEADLINE_S)
    assert_usable(executor)
    assert journal.read() == []


def test_slot_is_usable_while_the_target_unwinds(scene: Scene, make: Make) -> None:
    """The replacement is ordered when the stop begins: the next call runs while the old one still cleans up."""
    executor = make(1, cancel_grace=DEADLINE_S)
    started, interrupted, gate = scene.fifo(), scene.fifo(), scene.fifo()
    target = executor.submit(workload.linger_when_interrupted, started, interrupted, gate)
    started.hear()
    target.cancel(0)
    interrupted.hear()
    assert_usable(executor)
    assert not target.done()
    gate.open()
    wait([target], DEADLINE_S)
    assert_stopped(target, CancelOutcome.FINISHED_FIRST)


def test_a_worker_is_never_used_again(scene: Scene, make: Make) -> None:
    """After each cancel of a running call another process serves."""
    executor = make(1)
    pids = set()
    for _ in range(10):
        started = scene.fifo()
        target = executor.submit(workload.sleep, started)
        pids.add(started.hear())
        target.cancel()
    assert len(pids) == 10
    wait_until(lambda: len(Cluster().workers()) <= 1, "more workers than allowed")


def test_call_of_numpy_size(scene: Scene, make: Make) -> None:
    """A call whose arguments fill the pipe is stopped while it waits behind another, and one whose result does."""
    executor = make(1)
    started = scene.fifo()
    running = executor.submit(workload.sleep, started)
    queued = executor.submit(workload.echo, bytes(50_000_000))
    queued.cancel()
    assert_stopped(queued)
    started.hear()
    running.cancel()
    assert_stopped(running)
    big = executor.submit(workload.make_bytes, 50_000_000)
    big.cancel()
    assert big.cancelled()
    assert_usable(executor)
