"""What becomes of a future: the rows of cancel()'s contract, and wait, as_completed, callbacks and asyncio in them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, CancelledError, as_completed, wait
from typing import Any

import pytest
import workload
from served import Served
from support import DEADLINE_S, Cluster, Fifo, Scene, wait_gone, wait_until

from scaler_executor import CancelOutcome, ScalerExecutor, ScalerFuture, SchedulerLostError

Make = Callable[..., ScalerExecutor]


@pytest.fixture(autouse=True, scope="module")
def cluster(served: Served) -> Served:
    """What half of the executors here use."""
    return served


@pytest.fixture(params=["embedded", "served"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Nothing here depends on the start method, nor on where the workers are."""
    return "fork" if request.param == "embedded" else "served"


@pytest.fixture
def scheduler(start_method: str, served: Served) -> Callable[[], int]:
    """Finds the process that has the scheduler."""
    return lambda: served.scheduler.pid if start_method == "served" else Cluster().serve


@pytest.fixture
def callback() -> Callback:
    """A callback that remembers."""
    return Callback()


class Callback:
    """A done-callback that remembers its calls."""

    def __init__(self) -> None:
        self.futures: list[Any] = []
        self.threads: list[str] = []
        self.called = threading.Event()

    def __call__(self, future: Any) -> None:
        self.futures.append(future)
        self.threads.append(threading.current_thread().name)
        self.called.set()

    def await_call(self) -> None:
        assert self.called.wait(DEADLINE_S)


def start(executor: ScalerExecutor, scene: Scene, call: Callable[..., Any], *arguments: Any) -> ScalerFuture[Any]:
    """Submit a call and wait until it runs."""
    started = scene.fifo()
    future = executor.submit(call, started, *arguments)
    started.hear()
    return future


def assert_cancelled(future: ScalerFuture[Any], outcome: CancelOutcome) -> None:
    assert future.cancel_outcome is outcome
    assert future.cancelled() and future.done() and not future.running()
    for read in (future.result, future.exception):
        with pytest.raises(CancelledError):
            read(0)


# When cancel() is called


@pytest.mark.parametrize("force", [True, False])
def test_already_cancelled(scene: Scene, executor: ScalerExecutor, callback: Callback, force: bool) -> None:
    """A second cancel changes nothing: not the outcome, and no callback is called again."""
    future = start(executor, scene, workload.sleep)
    future.add_done_callback(callback)
    future.cancel()
    callback.await_call()
    assert future.cancel(force=force) is True
    assert_cancelled(future, CancelOutcome.CANCELED)
    executor.submit(workload.add, 1).result(DEADLINE_S)
    assert callback.futures == [future]


@pytest.mark.parametrize("call", [workload.echo, workload.raise_value])
@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("force", [True, False])
def test_already_finished(
    executor: ScalerExecutor, callback: Callback, call: Callable[..., Any], is_read: bool, force: bool
) -> None:
    """A finished call becomes cancelled and its value is dropped; callbacks and waiters are not told again."""
    future = executor.submit(call, "value")
    future.add_done_callback(callback)
    callback.await_call()
    if is_read:
        future.exception()
    assert future.cancel_outcome is None
    assert future.cancel(force=force) is True
    assert_cancelled(future, CancelOutcome.ALREADY_DONE)
    assert "value" not in map(str, vars(future).values())
    executor.submit(workload.add, 1).result(DEADLINE_S)
    assert callback.futures == [future]
    assert wait([future], 0).done == {future}
    assert list(as_completed([future], 0)) == [future]


def test_not_yet_sent(scene: Scene, executor: ScalerExecutor) -> None:
    """A call that is cancelled at once never runs, or was stopped, or was quicker; the future always ends cancelled."""
    journal = scene.journal()
    for number in range(300):
        future = executor.submit(workload.note, journal, number)
        future.cancel()
        assert future.cancelled()
        assert future.cancel_outcome in (
            CancelOutcome.CANCELED,
            CancelOutcome.FINISHED_FIRST,
            CancelOutcome.ALREADY_DONE,
        )
    numbers = [int(line[0]) for line in journal.read()]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("force", [True, False])
def test_pending(scene: Scene, make: Make, callback: Callback, force: bool) -> None:
    """A queued call is taken back: callbacks and waiters are told once."""
    executor = make(1)
    gate, journal = scene.fifo(), scene.journal()
    running = start(executor, scene, workload.hold, gate)
    future = executor.submit(workload.note, journal, "ran")
    future.add_done_callback(callback)
    assert future.cancel(force=force) is True
    assert_cancelled(future, CancelOutcome.CANCELED)
    callback.await_call()
    gate.open()
    running.result(DEADLINE_S)
    executor.submit(workload.add, 1).result(DEADLINE_S)
    assert callback.futures == [future] and journal.read() == []


def test_running(scene: Scene, executor: ScalerExecutor, callback: Callback) -> None:
    """A running call shows as running, and is stopped: callbacks and waiters are told once."""
    future = start(executor, scene, workload.sleep)
    wait_until(future.running, "never seen running")
    future.add_done_callback(callback)
    assert future.cancel() is True
    assert_cancelled(future, CancelOutcome.CANCELED)
    callback.await_call()
    assert callback.futures == [future]


def test_outstanding_in_another_thread(scene: Scene, make: Make) -> None:
    """A second thread joins the wait of the first: both return when the one answer comes."""
    executor = make(1, cancel_grace=DEADLINE_S)
    interrupted, gate = scene.fifo(), scene.fifo()
    future = start(executor, scene, workload.linger_when_interrupted, interrupted, gate)
    threads = [threading.Thread(target=future.cancel) for _ in range(3)]
    for thread in threads:
        thread.start()
    interrupted.hear()
    assert all(thread.is_alive() for thread in threads)
    gate.open()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert_cancelled(future, CancelOutcome.FINISHED_FIRST)


def test_soft_is_raised_to_forced(scene: Scene, executor: ScalerExecutor, scheduler: Callable[[], int]) -> None:
    """A soft request that a stopped scheduler has not answered becomes a forced one: that one's answer counts."""
    future = start(executor, scene, workload.sleep)
    serve = scheduler()
    os.kill(serve, signal.SIGSTOP)
    future.cancel(0, force=False)
    future.cancel(0)
    os.kill(serve, signal.SIGCONT)
    wait([future], DEADLINE_S)
    assert_cancelled(future, CancelOutcome.CANCELED)


# The answers


def test_result_after_the_request(scene: Scene, executor: ScalerExecutor) -> None:
    """A result that crosses the request is dropped, and never unpickled here."""
    journal = scene.journal()
    future = start(executor, scene, workload.swallow_and_return_note, journal)
    future.cancel()
    assert_cancelled(future, CancelOutcome.FINISHED_FIRST)
    assert journal.read() == []


def test_error_after_the_request(scene: Scene, executor: ScalerExecutor, scheduler: Callable[[], int]) -> None:
    """So is an error of a call that ended before the request reached it."""
    future = start(executor, scene, workload.tell)
    serve = scheduler()
    os.kill(serve, signal.SIGSTOP)
    crossing = executor.submit(workload.raise_value, "crossing")
    crossing.cancel(0)
    future.cancel(0)
    os.kill(serve, signal.SIGCONT)
    wait([future, crossing], DEADLINE_S)
    assert future.cancelled() and crossing.cancelled()


def test_cancel_failed(scene: Scene, executor: ScalerExecutor, callback: Callback) -> None:
    """CancelFailed ends the request, not the call: it completes, and another request may be made."""
    gate = scene.fifo()
    future = start(executor, scene, workload.hold, gate, "kept")
    future.add_done_callback(callback)
    for _ in range(3):
        assert future.cancel(force=False) is True
        assert future.cancel_outcome is CancelOutcome.FAILED
        assert not future.cancelled() and not future.done() and not callback.futures
    gate.open()
    assert future.result(DEADLINE_S) == "kept"
    callback.await_call()
    future.cancel()
    assert_cancelled(future, CancelOutcome.ALREADY_DONE)


def test_death_meanwhile(scene: Scene, executor: ScalerExecutor) -> None:
    """A worker that dies while its call is being cancelled is an answer: Canceled."""
    future = start(executor, scene, workload.die_when_interrupted, 9)
    future.cancel()
    assert_cancelled(future, CancelOutcome.CANCELED)


@pytest.mark.parametrize("start_method", ["fork"])  # of a served one: see test_served
def test_scheduler_lost_meanwhile(scene: Scene, executor: ScalerExecutor, callback: Callback) -> None:
    """A request that a lost scheduler cannot answer ends the future as cancelled, unconfirmed."""
    future = start(executor, scene, workload.sleep)
    other = executor.submit(workload.sleep, scene.fifo())
    future.add_done_callback(callback)
    cluster = Cluster()
    pids = cluster.all()
    os.kill(cluster.serve, signal.SIGSTOP)
    assert future.cancel(0) is True
    assert not future.done() and future.cancel_outcome is None
    os.kill(cluster.serve, signal.SIGKILL)
    wait([future], DEADLINE_S)
    assert_cancelled(future, CancelOutcome.UNCONFIRMED)
    callback.await_call()
    assert isinstance(other.exception(DEADLINE_S), SchedulerLostError)
    wait_gone(*pids)


def test_no_answer_within_the_timeout(
    scene: Scene, make: Make, callback: Callback, scheduler: Callable[[], int]
) -> None:
    """After the timeout cancel() returns True; the answer settles the future later."""
    executor = make(2, cancel_timeout=0.02)
    future = start(executor, scene, workload.sleep)
    future.add_done_callback(callback)
    serve = scheduler()
    os.kill(serve, signal.SIGSTOP)
    assert future.cancel() is True
    assert future.cancel(0.01) is True
    assert executor.cancel([future]) is True
    assert not future.done() and future.cancel_outcome is None
    os.kill(serve, signal.SIGCONT)
    wait([future], DEADLINE_S)
    assert_cancelled(future, CancelOutcome.CANCELED)
    callback.await_call()
    assert callback.futures == [future]


# Everybody who waits


def test_waiters_see_each_cancel_once(scene: Scene, make: Make) -> None:
    """wait and as_completed, begun before the cancels, see every future once, however it ends."""
    executor = make(2)
    gate = scene.fifo()
    held = start(executor, scene, workload.hold, gate, "held")
    stopped = start(executor, scene, workload.sleep)
    queued = [executor.submit(workload.echo, number) for number in range(20)]
    futures = [held, stopped, *queued]
    waited: list[Any] = []
    completed: list[Any] = []
    threads = [
        threading.Thread(target=lambda: waited.append(wait(futures, DEADLINE_S))),
        threading.Thread(target=lambda: completed.extend(as_completed(futures, DEADLINE_S))),
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(len(future._waiters) == 2 for future in futures), "nobody waits")
    executor.cancel([stopped, *queued[::2]])
    gate.open()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert waited[0].done == set(futures) and not waited[0].not_done
    assert len(completed) == len(futures) and set(completed) == set(futures)
    assert [future.result(0) for future in queued[1::2]] == list(range(1, 20, 2))
    assert all(future.cancelled() for future in queued[::2])


def test_first_completed(scene: Scene, executor: ScalerExecutor) -> None:
    """A cancel counts as completion for wait(FIRST_COMPLETED)."""
    gate = scene.fifo()
    held = start(executor, scene, workload.hold, gate)
    target = start(executor, scene, workload.sleep)
    thread = threading.Thread(target=target.cancel)
    thread.start()
    assert wait([held, target], DEADLINE_S, FIRST_COMPLETED).done == {target}
    thread.join()
    gate.open()
    held.result(DEADLINE_S)


def test_callbacks_may_do_anything(scene: Scene, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A callback may raise, block, submit, cancel and wait for a result; others are called all the same, in order."""
    executor = make(2)
    target = start(executor, scene, workload.sleep)
    results: list[Any] = []
    done = threading.Event()

    def submit_and_cancel(future: Any) -> None:
        results.append(executor.submit(workload.add, future.result(), 1).result(DEADLINE_S))
        target.cancel()
        results.append(target.cancel_outcome)
        raise ValueError("a callback's own error")

    def finish(future: Any) -> None:
        results.append("second")
        done.set()

    gate = scene.fifo()
    future = start(executor, scene, workload.hold, gate, 41)
    future.add_done_callback(submit_and_cancel)
    future.add_done_callback(finish)
    gate.open()
    assert done.wait(DEADLINE_S)
    assert results == [42, CancelOutcome.CANCELED, "second"]
    assert "a callback's own error" in caplog.text


def test_callback_threads(scene: Scene, executor: ScalerExecutor) -> None:
    """Callbacks never run in the thread that talks to the scheduler; of a done future at once, in the caller's."""
    gate = scene.fifo()
    future = start(executor, scene, workload.hold, gate)
    early, late = Callback(), Callback()
    future.add_done_callback(early)
    gate.open()
    early.await_call()
    future.add_done_callback(late)
    assert late.threads == [threading.current_thread().name]
    assert early.threads != late.threads and "client" not in early.threads[0]


def test_a_blocking_callback_holds_up_no_result(scene: Scene, executor: ScalerExecutor) -> None:
    """Results come and cancels are answered while a callback blocks."""
    future = executor.submit(workload.add, 1)
    release, entered = threading.Event(), threading.Event()

    def block(_: Any) -> None:
        entered.set()
        release.wait(DEADLINE_S)

    future.add_done_callback(block)
    target = start(executor, scene, workload.sleep)
    assert executor.submit(workload.add, 2).result(DEADLINE_S) == 2
    target.cancel()
    assert target.cancelled()
    release.set()


# asyncio


def test_wrap_future(scene: Scene, executor: ScalerExecutor) -> None:
    """Results and errors reach an await; a cancelled call cancels it."""

    async def main() -> None:
        assert await asyncio.wrap_future(executor.submit(workload.add, 1, 2)) == 3
        with pytest.raises(ValueError, match="wrapped"):
            await asyncio.wrap_future(executor.submit(workload.raise_value, "wrapped"))
        future = start(executor, scene, workload.sleep)
        wrapped = asyncio.wrap_future(future)
        asyncio.get_running_loop().call_soon(future.cancel)
        with pytest.raises(asyncio.CancelledError):
            await wrapped
        assert_cancelled(future, CancelOutcome.CANCELED)

    asyncio.run(main())


def test_wait_for_stops_the_call(scene: Scene, executor: ScalerExecutor) -> None:
    """asyncio.wait_for really stops a call that takes too long."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        started = scene.fifo()
        waiting = loop.run_in_executor(executor, workload.hold_gil, started)
        pid = int(await asyncio.to_thread(started.hear))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waiting, 0.01)
        return pid

    wait_gone(asyncio.run(main()))
    assert executor.submit(workload.add, 1).result(DEADLINE_S) == 1


def test_cancelled_task_stops_the_call(scene: Scene, executor: ScalerExecutor) -> None:
    """A cancelled asyncio task stops the call that it awaits, and the others of a gather go on."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        started, gate, kept_started = scene.fifo(), scene.fifo(), scene.fifo()
        kept = loop.run_in_executor(executor, workload.hold, kept_started, gate, "kept")
        await asyncio.to_thread(kept_started.hear)
        task = asyncio.ensure_future(loop.run_in_executor(executor, workload.sleep, started))
        pid = int(await asyncio.to_thread(started.hear))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_gone, pid)
        gate.open()
        assert await kept == "kept"

    asyncio.run(main())


def test_cancel_does_not_hold_an_event_loop(scene: Scene, make: Make) -> None:
    """Inside an event loop cancel() returns before a slow confirm; with an explicit timeout it waits."""
    executor = make(2, cancel_grace=0.3)

    async def main() -> None:
        heartbeat = scene.heartbeat()
        future = start(executor, scene, workload.catch_everything, heartbeat)
        assert future.cancel() is True
        assert not future.done() and future.cancel_outcome is None
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wrap_future(future)
        assert_cancelled(future, CancelOutcome.CANCELED)
        future = start(executor, scene, workload.catch_everything, heartbeat)
        assert future.cancel(DEADLINE_S) is True
        assert_cancelled(future, CancelOutcome.CANCELED)

    asyncio.run(main())


def test_finished_future_cancelled_from_another_thread(executor: ScalerExecutor) -> None:
    """An await of a future that another thread cancels as it finishes ends, one way or the other."""

    async def main() -> None:
        for _ in range(200):
            future = executor.submit(workload.add, 1)
            thread = threading.Thread(target=lambda future=future: (wait([future]), future.cancel()))  # type: ignore
            thread.start()
            try:
                assert await asyncio.wait_for(asyncio.wrap_future(future), DEADLINE_S) == 1
            except asyncio.CancelledError:
                assert future.cancelled()
            thread.join()

    asyncio.run(main())


# Many


def test_executor_cancel(scene: Scene, make: Make) -> None:
    """executor.cancel takes any iterable of futures, in whatever state; each ends as its own cancel() would."""
    executor = make(2)
    gate = scene.fifo()
    done = executor.submit(workload.add, 1)
    done.result(DEADLINE_S)
    held = start(executor, scene, workload.hold, gate, "held")
    running = start(executor, scene, workload.sleep)
    queued = executor.submit(workload.echo, 1)
    already = executor.submit(workload.echo, 2)
    already.cancel()
    kept = executor.submit(workload.echo, 3)
    assert executor.cancel(iter([done, running, queued, already])) is True
    assert_cancelled(done, CancelOutcome.ALREADY_DONE)
    for future in (running, queued, already):
        assert_cancelled(future, CancelOutcome.CANCELED)
    assert executor.cancel([held], force=False) is True
    assert held.cancel_outcome is CancelOutcome.FAILED
    assert executor.cancel([]) is True
    gate.open()
    assert (held.result(DEADLINE_S), kept.result(DEADLINE_S)) == ("held", 3)


def test_clear(scene: Scene, make: Make) -> None:
    """clear() cancels running and queued calls and maps; what is done stays, and the executor stays usable."""
    executor = make(2)
    done = executor.submit(workload.add, 1)
    assert done.result(DEADLINE_S) == 1
    started: Fifo = scene.fifo()
    futures = [executor.submit(workload.sleep, started) for _ in range(20)]
    pids = [int(started.hear()) for _ in range(2)]
    items = executor.map(workload.echo, range(100))
    executor.clear()
    for future in futures:
        assert_cancelled(future, CancelOutcome.CANCELED)
    with pytest.raises(CancelledError):
        list(items)
    wait_gone(*pids)
    assert done.result(0) == 1
    assert executor.submit(workload.add, 2).result(DEADLINE_S) == 2
    executor.clear()
