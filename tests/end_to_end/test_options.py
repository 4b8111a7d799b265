"""Options per call: views of an executor, retries, timeouts, priorities, names and grace times.

Each test runs with an executor of its own workers and with one of a served cluster.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, TimeoutError, as_completed, wait
from pathlib import Path
from typing import Any

import pytest
import workload
from served import Served
from support import DEADLINE_S, Scene, is_gone, wait_gone, wait_until

from scaler_executor import CancelOutcome, ScalerExecutor, ScalerFuture, SchedulerLostError, WorkerDiedError

Make = Callable[..., ScalerExecutor]

#: Short, and long enough for a call that does nothing on a busy machine.
TIMEOUT_S = 0.5


@pytest.fixture(params=["embedded", "served"])
def start_method(request: pytest.FixtureRequest, served: Served) -> str:
    return "fork" if request.param == "embedded" else "served"


def assert_usable(executor: ScalerExecutor) -> None:
    assert executor.submit(workload.add, 2, right=3).result(DEADLINE_S) == 5


def timeout_of(future: ScalerFuture[Any]) -> TimeoutError:
    error = future.exception(DEADLINE_S)
    assert isinstance(error, TimeoutError), error
    assert not future.cancelled() and future.done() and not future.running()
    return error


# Views


def test_a_view_is_an_executor(executor: ScalerExecutor) -> None:
    """A view does what an executor does, with the same workers."""
    view = executor.with_options(retries=1)
    assert isinstance(view, Executor) and isinstance(view, ScalerExecutor)
    assert view.max_workers == executor.max_workers == view._max_workers
    future = view.submit(workload.add, 2, right=3)
    assert isinstance(future, ScalerFuture) and future.result(DEADLINE_S) == 5
    assert list(view.map(workload.echo, range(100), timeout=DEADLINE_S)) == list(range(100))
    assert list(view.map(workload.echo, range(20), buffersize=3, chunksize=2)) == list(range(20))
    assert view.submit(lambda: "closure").result(DEADLINE_S) == "closure"
    assert view.submit("text".upper).result(DEADLINE_S) == "TEXT"
    assert isinstance(view.submit(workload.fail, ValueError()).exception(DEADLINE_S), ValueError)
    assert {future.result() for future in as_completed([view.submit(workload.echo, 1), view.submit(workload.echo, 2)])}
    called = threading.Event()
    view.submit(workload.echo, 1).add_done_callback(lambda _: called.set())
    assert called.wait(DEADLINE_S)

    async def main() -> int:
        return await asyncio.get_running_loop().run_in_executor(view, workload.add, 1, 2)

    assert asyncio.run(main()) == 3


def test_cancel_through_a_view(scene: Scene, executor: ScalerExecutor) -> None:
    """`cancel` takes any futures, `clear` those of the view."""
    started = scene.fifo()
    view = executor.with_options(name="to be cleared")
    own, other = view.submit(workload.sleep, started), executor.submit(workload.sleep, started)
    started.hear(), started.hear()
    mapped = view.map(workload.echo, range(3))
    view.clear()
    assert own.cancelled() and own.cancel_outcome is CancelOutcome.CANCELED and not other.done()
    with pytest.raises(CancelledError):
        next(mapped)
    assert view.cancel([other]) and other.cancelled()
    assert_usable(view)


def test_options_merge(executor: ScalerExecutor) -> None:
    """A view of a view has the options of both, and the latest of the same counts."""
    view = executor.with_options(retries=2, name="one", timeout=5).with_options(name="two", timeout=None)
    assert (view._client.terms.options.retries, view._client.terms.options.timeout_s) == (2, None)
    error = view.submit(workload.exit_process, 3).exception(DEADLINE_S)
    assert isinstance(error, WorkerDiedError) and len(error.earlier) == 2 and error.call_name == "two"
    assert view.with_options(name=None)._client.terms.name is None


def test_views_of_views_of_views(executor: ScalerExecutor) -> None:
    """A program may make a view of the last one for ever."""
    first = view = executor.with_options()
    for _ in range(3000):
        view = view.with_options(retries=1)
    assert_usable(view)
    future = view.submit(workload.echo, 1)
    first.shutdown()
    assert future.done()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        view.submit(workload.echo, 1)


def test_shutdown_of_a_view(scene: Scene, executor: ScalerExecutor) -> None:
    """A view's `with` waits for the view's calls and ends the view; executor and other views go on."""
    gate, started = scene.fifo(), scene.fifo()
    other = executor.with_options()
    foreign = executor.submit(workload.hold, started, gate, "foreign")
    started.hear()
    with executor.with_options(priority=1) as view:
        below = view.with_options(name="below")
        futures = [view.submit(workload.echo, 1), below.submit(workload.echo, 2)]
        mapped = view.map(workload.echo, range(10))
    assert all(future.done() for future in futures) and not foreign.done()
    assert list(mapped) == list(range(10))
    for closed in (view, below):
        for call in (lambda closed=closed: closed.submit(abs, 1), lambda closed=closed: closed.map(abs, [1])):
            with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
                call()
    view.shutdown()
    assert_usable(other)
    gate.open()
    assert foreign.result(DEADLINE_S) == "foreign"


def test_shutdown_of_a_view_waits_for_callbacks(executor: ScalerExecutor) -> None:
    """A view's `shutdown(wait=True)` returns when the callbacks of its calls have, as the standard library's, but does
    not wait for those of others; and it may be called in one."""
    gate, called = threading.Event(), threading.Event()
    view, other = executor.with_options(), executor.with_options()

    def call_slowly(_: object) -> None:
        gate.wait(DEADLINE_S)
        called.set()

    view.submit(workload.echo, 1).add_done_callback(call_slowly)
    ended = threading.Thread(target=view.shutdown)
    ended.start()
    other.submit(workload.echo, 2).result(DEADLINE_S)
    other.shutdown()
    ended.join(0.2)
    assert ended.is_alive() and not called.is_set()
    gate.set()
    ended.join(DEADLINE_S)
    assert called.is_set() and not ended.is_alive()
    within = executor.with_options()
    done = threading.Event()
    within.submit(workload.echo, 1).add_done_callback(lambda _: (within.shutdown(), done.set()))
    assert done.wait(DEADLINE_S)


def test_cancel_futures_of_a_view(scene: Scene, executor: ScalerExecutor) -> None:
    """`shutdown(cancel_futures=True)` of a view takes back what of its calls has not started, and no others."""
    gate, started = scene.fifo(), scene.fifo()
    holders = [executor.submit(workload.hold, started, gate) for _ in range(2)]
    started.hear(), started.hear()
    wait_until(lambda: all(holder.running() for holder in holders), "they do not run")
    view = executor.with_options()
    own, other = view.submit(workload.echo, "own"), executor.submit(workload.echo, "other")
    view.shutdown(wait=False, cancel_futures=True)
    wait([own], DEADLINE_S)
    assert own.cancelled()
    gate.open(2)
    assert other.result(DEADLINE_S) == "other"


def test_kill_workers_of_a_view(scene: Scene, executor: ScalerExecutor) -> None:
    """`kill_workers` of a view stops its calls; the workers are others' as well."""
    started, gate = scene.fifo(), scene.fifo()
    view = executor.with_options()
    own, other = view.submit(workload.sleep, started), executor.submit(workload.hold, started, gate, 1)
    started.hear(), started.hear()
    view.kill_workers()
    wait([own], DEADLINE_S)
    assert own.cancelled()
    gate.open()
    assert other.result(DEADLINE_S) == 1
    assert_usable(executor)


def test_shutdown_of_the_executor_ends_its_views(make: Make) -> None:
    """An executor waits for the calls of its views, and they take no more."""
    executor = make()
    view = executor.with_options(retries=1)
    future = view.submit(workload.echo, 1)
    executor.shutdown()
    assert future.done()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        view.submit(workload.echo, 1)


def test_a_view_keeps_its_executor(start_method: str, served: Served) -> None:
    """An executor that only a view has lives as long as the view, and ends with it."""
    address = served.connection if start_method == "served" else None
    with ScalerExecutor(1, address=address).with_options(retries=1) as view:
        gc.collect()
        assert_usable(view)
        client = view._client._client  # type: ignore[union-attr]
    assert client._has_joined.is_set()


def test_views_for_a_single_call_leave_nothing(executor: ScalerExecutor) -> None:
    """Views that are alike share what is registered, and those that are gone leave nothing in this process."""
    for number in range(50):
        assert executor.with_options(timeout=60).submit(workload.echo, number).result(DEADLINE_S) == number
    last = weakref.ref(executor.with_options(timeout=60))
    assert last() is None
    client: Any = executor._client
    assert len([entry for entry in client._functions._entries.values() if entry.name == "echo"]) == 1


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"retries": -1}, ValueError, "retries must be between 0 and 1000000, not -1"),
        ({"retries": 10**30}, ValueError, "retries must be between"),
        ({"retries": True}, TypeError, "retries must be an integer, not bool"),
        ({"retries": 1.0}, TypeError, "retries must be an integer, not float"),
        ({"retries": "2"}, TypeError, "retries must be an integer, not str"),
        ({"retries": None}, TypeError, "retries must be an integer"),
        ({"timeout": 0}, ValueError, "timeout must be > 0"),
        ({"timeout": -1.5}, ValueError, "timeout must be > 0.* or None for no limit, not -1.5"),
        ({"timeout": float("nan")}, ValueError, "not nan"),
        ({"timeout": float("inf")}, ValueError, "None for no limit"),
        ({"timeout": 10**400}, ValueError, "a finite number of seconds"),
        ({"timeout": True}, TypeError, "timeout must be a number of seconds, or None for no limit, not bool"),
        ({"timeout": "5"}, TypeError, "not str"),
        ({"timeout": 1j}, TypeError, "not complex"),
        ({"priority": 0.5}, TypeError, "priority must be an integer, not float"),
        ({"priority": False}, TypeError, "priority must be an integer, not bool"),
        ({"priority": -(10**7)}, ValueError, "priority must be between -1000000 and 1000000"),
        ({"name": 5}, TypeError, "name must be a string, or None for the function's name, not int"),
        ({"name": ""}, ValueError, "name must be 1 to 200 printable characters"),
        ({"name": "x" * 201}, ValueError, "name must be 1 to 200"),
        ({"name": "two\nlines"}, ValueError, "printable"),
        ({"name": "\udc80"}, ValueError, "printable"),
        ({"cancel_grace": -1}, ValueError, "cancel_grace must be >= 0"),
        ({"cancel_grace": float("nan")}, ValueError, "cancel_grace must be >= 0"),
        ({"cancel_grace": float("inf")}, ValueError, "finite"),
        ({"cancel_grace": None}, TypeError, "cancel_grace must be a number of seconds, not NoneType"),
        ({"colour": "red"}, TypeError, "unexpected keyword argument 'colour'"),
    ],
    ids=str,
)
def test_bad_values(options: dict[str, Any], error: type[Exception], told: str) -> None:
    """What cannot be meant is refused when it is said, by a view and by the constructor, and says what can be."""
    with ScalerExecutor(1) as executor, pytest.raises(error, match=told):
        executor.with_options(**options)
    if not {"priority", "name"} & set(options):
        with pytest.raises(error, match=told):
            ScalerExecutor(1, **options)


# Retries


def die_until(journal: Any, times: int) -> str:
    """End the process as often."""
    journal.write("start", os.getpid())
    if len(journal.read()) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_retries(scene: Scene, executor: ScalerExecutor) -> None:
    """A call whose worker dies is made again, as often as it may, and nobody sees that it was."""
    journal = scene.journal()
    assert executor.with_options(retries=2).submit(die_until, journal, 2).result(DEADLINE_S) == "done"
    assert len({line[1] for line in journal.read()}) == 3


def test_retries_of_the_constructor(scene: Scene, make: Make) -> None:
    """An executor's own retries are those of its calls and of its views."""
    executor = make(retries=1)
    assert executor.submit(die_until, scene.journal(), 1).result(DEADLINE_S) == "done"
    assert list(executor.map(die_until, [scene.journal()], [1])) == ["done"]
    assert executor.with_options(priority=1).submit(die_until, scene.journal(), 1).result(DEADLINE_S) == "done"


def test_the_limit_of_retries(scene: Scene, executor: ScalerExecutor) -> None:
    """A call that kills its worker again and again ends at its limit, with what became of each attempt."""
    journal = scene.journal()
    view = executor.with_options(retries=2, name="the killer")
    error = view.submit(die_until, journal, 100).exception(DEADLINE_S)
    assert isinstance(error, WorkerDiedError)
    assert len(journal.read()) == 3
    attempts = [*error.earlier, error]
    assert [attempt.attempt for attempt in attempts] == [1, 2, 3]
    assert all(attempt.signal_name == "SIGKILL" and attempt.exit_code == -9 and attempt.host for attempt in attempts)
    assert [str(attempt.pid) for attempt in attempts] == [line[1] for line in journal.read()]
    assert str(error).count("SIGKILL") == 3 and "the killer" in str(error)
    assert_usable(executor)


def test_retries_of_map_items(scene: Scene, executor: ScalerExecutor) -> None:
    """Of a map the item is made again whose worker died, and each item has retries of its own."""
    journals = [scene.journal() for _ in range(6)]
    times = [0, 2, 0, 1, 0, 2]
    view = executor.with_options(retries=2)
    assert list(view.map(die_until, journals, times)) == ["done"] * 6
    assert [len(journal.read()) for journal in journals] == [1 + count for count in times]


def test_exceptions_are_not_retried(scene: Scene, executor: ScalerExecutor) -> None:
    """A call that raises has run."""
    journal = scene.journal()
    future = executor.with_options(retries=5).submit(note_and_fail, journal)
    assert isinstance(future.exception(DEADLINE_S), ValueError)
    assert len(journal.read()) == 1


def note_and_fail(journal: Any) -> None:
    journal.write("start")
    raise ValueError("as it should")


def test_a_cancelled_call_is_not_retried(scene: Scene, executor: ScalerExecutor) -> None:
    """A call whose worker dies while it is being cancelled is not made again."""
    started, journal = scene.fifo(), scene.journal()
    future = executor.with_options(retries=5).submit(note_and_die_when_interrupted, started, journal)
    started.hear()
    assert future.cancel() and future.cancelled()
    assert_usable(executor)
    assert len(journal.read()) == 1


def note_and_die_when_interrupted(started: Any, journal: Any) -> None:
    journal.write("start")
    workload.die_when_interrupted(started, 3)


# Timeouts


def test_timeout(scene: Scene, executor: ScalerExecutor) -> None:
    """A call that runs too long is stopped, its code as by a cancel, and its future says so."""
    journal, started = scene.journal(), scene.fifo()
    view = executor.with_options(timeout=TIMEOUT_S, name="slow one", retries=3)
    began = time.monotonic()
    future = view.submit(workload.work_with_files, started, journal)
    error = timeout_of(future)
    assert time.monotonic() - began >= TIMEOUT_S
    assert "slow one" in str(error) and "0.5 s" in str(error)
    # Unwound, and not tried again.
    assert [line[0] for line in journal.read()] == ["files", "finally"]
    with pytest.raises(TimeoutError, match="longer than its timeout"):
        future.result()
    assert_usable(view)


@pytest.mark.parametrize("grace", [0.0, 0.2])
def test_timeout_kills(scene: Scene, executor: ScalerExecutor, grace: float) -> None:
    """A call that does not unwind in its grace time is killed at its timeout, and the future waits for that."""
    started, heartbeat = scene.fifo(), scene.heartbeat()
    view = executor.with_options(timeout=TIMEOUT_S, cancel_grace=grace)
    future = view.submit(workload.defy, started, heartbeat)
    pid = int(started.hear())
    timeout_of(future)
    wait_gone(pid)
    assert_usable(executor)


def test_time_counts_from_the_start(scene: Scene, make: Make) -> None:
    """A call that waits for longer than its timeout has not begun to use it."""
    executor = make(1)
    gate, started = scene.fifo(), scene.fifo()
    holder = executor.submit(workload.hold, started, gate)
    started.hear()
    future = executor.with_options(timeout=TIMEOUT_S).submit(workload.echo, "in time")
    with pytest.raises(TimeoutError):
        future.result(3 * TIMEOUT_S)
    gate.open()
    assert future.result(DEADLINE_S) == "in time"
    holder.result(DEADLINE_S)


def test_quick_calls_are_in_time(executor: ScalerExecutor) -> None:
    """Calls that end in time are not touched, however many there are."""
    view = executor.with_options(timeout=20)
    futures = [view.submit(workload.echo, number) for number in range(1000)]
    assert [future.result(DEADLINE_S) for future in futures] == list(range(1000))
    assert list(view.map(workload.echo, range(1000))) == list(range(1000))


def test_timeout_of_map_items(executor: ScalerExecutor) -> None:
    """Each item of a map has its own time: that of all of them is longer."""
    view = executor.with_options(timeout=TIMEOUT_S)
    naps = [TIMEOUT_S / 4] * 10
    results = view.map(workload.sleep_for, [*naps, 3600.0], chunksize=11)
    for _ in naps:
        next(results)
    with pytest.raises(TimeoutError, match=r"sleep_for.* ran longer than its timeout of 0\.5 s"):
        next(results)
    assert_usable(executor)


def test_a_result_within_the_grace_time_counts(scene: Scene, executor: ScalerExecutor) -> None:
    """A call that takes the stop and returns a value in its grace time has finished first."""
    future = executor.with_options(timeout=TIMEOUT_S, cancel_grace=DEADLINE_S).submit(workload.swallow, scene.fifo())
    assert future.result(DEADLINE_S) == "swallowed"
    assert_usable(executor)


def test_death_at_the_timeout_is_the_timeout(scene: Scene, executor: ScalerExecutor) -> None:
    """A call that ends its process when it is interrupted has timed out, and is not retried."""
    view = executor.with_options(timeout=TIMEOUT_S, retries=3)
    timeout_of(view.submit(workload.die_when_interrupted, scene.fifo(), 3))
    assert_usable(executor)


def test_cancel_while_it_is_stopped(scene: Scene, executor: ScalerExecutor) -> None:
    """A cancel during the stop wins: the future is cancelled, once."""
    started, interrupted, gate = scene.fifo(), scene.fifo(), scene.fifo()
    view = executor.with_options(timeout=TIMEOUT_S, cancel_grace=DEADLINE_S)
    future = view.submit(workload.linger_when_interrupted, started, interrupted, gate)
    interrupted.hear()
    calls: list[object] = []
    future.add_done_callback(calls.append)
    assert future.cancel(0)
    gate.open()
    wait([future], DEADLINE_S)
    assert future.cancelled() and future.cancel_outcome in (CancelOutcome.FINISHED_FIRST, CancelOutcome.CANCELED)
    assert_usable(executor)
    assert calls == [future]


def test_soft_cancel_while_it_is_stopped(scene: Scene, executor: ScalerExecutor) -> None:
    """A cancel that leaves running code alone is refused during the stop, and the timeout stands."""
    interrupted, gate = scene.fifo(), scene.fifo()
    view = executor.with_options(timeout=TIMEOUT_S, cancel_grace=1.0)
    future = view.submit(workload.linger_when_interrupted, scene.fifo(), interrupted, gate)
    interrupted.hear()
    assert future.cancel(DEADLINE_S, force=False)
    assert future.cancel_outcome is CancelOutcome.FAILED
    timeout_of(future)


def test_timeout_of_a_cancelled_call(scene: Scene, executor: ScalerExecutor) -> None:
    """A call that is being cancelled does not time out."""
    started, interrupted, gate = scene.fifo(), scene.fifo(), scene.fifo()
    view = executor.with_options(timeout=TIMEOUT_S, cancel_grace=3 * TIMEOUT_S)
    future = view.submit(workload.linger_when_interrupted, started, interrupted, gate)
    started.hear()
    assert future.cancel(DEADLINE_S)
    assert future.cancelled() and future.cancel_outcome is CancelOutcome.CANCELED


# Priorities


def order_of(scene: Scene, executor: ScalerExecutor, calls: list[tuple[str, ScalerExecutor]]) -> list[str]:
    """Return the order in which these are started that are submitted while the only worker is busy."""
    gate, started, journal = scene.fifo(), scene.fifo(), scene.journal()
    holder = executor.submit(workload.hold, started, gate)
    started.hear()
    futures = [view.submit(workload.note, journal, name) for name, view in calls]
    # They are all there: what was submitted last is known to be queued when it can be taken back.
    last = calls[-1][1].submit(workload.note, journal, "none")
    last.cancel(DEADLINE_S)
    gate.open()
    holder.result(DEADLINE_S)
    wait(futures, DEADLINE_S)
    return [line[0] for line in journal.read()]


def test_priority(scene: Scene, make: Make) -> None:
    """Of what is queued the highest priority starts first, and of equals what was submitted first."""
    executor = make(1)
    low, high = executor.with_options(priority=-1), executor.with_options(priority=5)
    calls = [(f"low{n}", low) for n in range(4)] + [(f"plain{n}", executor) for n in range(4)]
    calls += [(f"high{n}", high) for n in range(4)]
    names = [name for name, _ in calls]
    assert order_of(scene, executor, calls) == names[8:] + names[4:8] + names[:4]
    # And once more, with functions that are known to be short: the first ones may be in the worker's hands already.
    order = order_of(scene, executor, calls)
    handed = next(
        n
        for n in range(9)
        if order[n:] == [name for name in names[8:] + names[4:8] + names[:4] if name not in order[:n]]
    )
    assert order[:handed] == names[:handed]


def test_nobody_starves(scene: Scene, make: Make) -> None:
    """A call of low priority starts at last, though there are always others before it."""
    executor = make(1)
    low, high = executor.with_options(priority=-1), executor.with_options(priority=1)
    gate, started = scene.fifo(), scene.fifo()
    holder = executor.submit(workload.hold, started, gate)
    started.hear()
    ahead = [high.submit(workload.echo, number) for number in range(50)]
    poor = low.submit(workload.echo, "at last")
    gate.open()
    holder.result(DEADLINE_S)
    count = 0
    while not poor.done():
        # So that there are always fifty.
        ahead.pop(0).result(DEADLINE_S)
        ahead.append(high.submit(workload.echo, count))
        count += 1
        assert count < 5000
    assert poor.result() == "at last"
    wait(ahead, DEADLINE_S)


# Names and grace times


def test_names(executor: ScalerExecutor) -> None:
    """A name stands in errors in the place of the function's."""
    view = executor.with_options(name="load 2024")
    for function in (workload.exit_process, lambda code: os._exit(code)):
        error = view.submit(function, 3).exception(DEADLINE_S)
        assert isinstance(error, WorkerDiedError)
        assert error.call_name == "load 2024" and "died in 'load 2024'" in str(error)
    with pytest.raises(WorkerDiedError, match="load 2024"):
        list(view.map(workload.exit_process, [3]))
    error = executor.submit(workload.exit_process, 3).exception(DEADLINE_S)
    assert isinstance(error, WorkerDiedError) and error.call_name == "exit_process"


def test_names_in_status(scene: Scene, start_method: str, served: Served, make: Make) -> None:
    """`scaler-executor status` calls a call by its name."""
    if start_method != "served":
        pytest.skip("there is no status of it")
    executor = make(2)
    future = executor.with_options(name="load 2024").submit(workload.sleep, scene.fifo())
    wait_until(future.running, "it does not run")
    assert [call["function"] for call in served.status()["calls"]] == ["load 2024"]  # type: ignore[index, attr-defined]
    future.cancel()


def test_grace_of_a_view(scene: Scene, executor: ScalerExecutor) -> None:
    """A call has the grace time of its view, and others keep the executor's."""
    started, interrupted, gate = scene.fifo(), scene.fifo(), scene.fifo()
    view = executor.with_options(cancel_grace=DEADLINE_S)
    slow = view.submit(workload.linger_when_interrupted, started, interrupted, gate)
    started.hear()
    slow.cancel(0)
    interrupted.hear()
    quick = executor.with_options(cancel_grace=0).submit(workload.catch_everything, started, scene.heartbeat())
    pid = int(started.hear())
    quick.cancel(DEADLINE_S)
    assert quick.cancel_outcome is CancelOutcome.CANCELED and is_gone(pid) and not slow.done()
    gate.open()
    wait([slow], DEADLINE_S)
    assert slow.cancel_outcome is CancelOutcome.FINISHED_FIRST


# Another scheduler


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Served]:
    """A served cluster of the test's own: one machine, and a scheduler without workers."""
    with Served(tmp_path / "cluster", 0) as cluster:
        yield cluster


def note_and_hold(journal: Any, started: Any, gate: Any) -> str:
    journal.write("start")
    started.tell(os.getpid())
    gate.await_opening()
    return "done"


@pytest.mark.parametrize("start_method", ["served"], indirect=True)
def test_scheduler_lost(scene: Scene, start_method: str) -> None:
    """Calls with retries left survive the loss of their scheduler, the others are lost with it; none runs twice at a
    time."""
    with Served(scene.directory / "cluster", 0) as cluster:
        cluster.join(3)
        executor = ScalerExecutor(address=cluster.connection)
        journal, started, gate = scene.journal(), scene.fifo(), scene.fifo()
        view = executor.with_options(retries=1)
        kept = view.submit(note_and_hold, journal, started, gate)
        pid = int(started.hear())
        plain = executor.submit(workload.sleep_for, 3600)
        mapped = view.map(workload.sleep_for, [0.0, 3600.0])
        next(mapped)
        cluster.kill()
        cluster.start()
        assert isinstance(plain.exception(DEADLINE_S), SchedulerLostError)
        started.hear()
        assert is_gone(pid)
        gate.open()
        assert kept.result(DEADLINE_S) == "done"
        assert len(journal.read()) == 2
        executor.clear()
        executor.shutdown()
