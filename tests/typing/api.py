"""The public API as a type checker sees it. This file is only checked, never run: each function states a claim."""

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import aclosing
from pathlib import Path

from typing_extensions import assert_never, assert_type

from scaler_executor import CancelOutcome, ScalerExecutor, ScalerFuture, SchedulerLostError, WorkerDiedError


def power(base: int, exponent: int = 2) -> float:
    return float(base**exponent)


def setup(path: str, level: int) -> None: ...


async def add(a: int, b: int) -> int:
    return a + b


def constructor_takes_the_arguments_of_process_pool_executor() -> None:
    ScalerExecutor()
    ScalerExecutor(None, None, None, ())
    ScalerExecutor(2, multiprocessing.get_context("spawn"), setup, ("here", 1))
    ScalerExecutor(max_workers=2, mp_context=None, initializer=setup, initargs=("here", 1), max_tasks_per_child=10)
    ScalerExecutor(cancel_timeout=None, cancel_grace=0.0)
    ScalerExecutor(address="connection.json", connect_timeout=1)
    ScalerExecutor(address="tcp://127.0.0.1:5735", credentials=Path("connection.json"))
    ScalerExecutor("two")  # type: ignore[arg-type]


def views_are_executors(executor: ScalerExecutor) -> None:
    view = executor.with_options(retries=1, timeout=2.5, priority=-3, name="n", cancel_grace=0)
    assert_type(view, ScalerExecutor)
    assert_type(view.with_options(timeout=None, name=None).submit(power, 3), ScalerFuture[float])
    executor.with_options(retries="1")  # type: ignore[arg-type]
    executor.with_options(color="red")  # type: ignore[call-arg]


def an_executor_is_an_executor(executor: ScalerExecutor) -> Executor:
    return executor


def with_gives_the_executor_itself() -> None:
    with ScalerExecutor(2) as executor:
        assert_type(executor, ScalerExecutor)


def submit_carries_parameters_and_return_type(executor: ScalerExecutor) -> None:
    future = executor.submit(power, 3, exponent=4)
    assert_type(future, ScalerFuture[float])
    assert_type(future.result(), float)
    assert_type(future.result(timeout=1.0), float)
    assert_type(future.exception(), BaseException | None)
    assert_type(executor.submit(lambda: "text").result(), str)
    executor.submit(power)  # type: ignore[call-arg]
    executor.submit(power, "3")  # type: ignore[arg-type]
    executor.submit(power, 3, exponents=4)  # type: ignore[call-arg]
    executor.submit(fn=power)  # type: ignore[call-arg]


def map_carries_the_return_type(executor: ScalerExecutor) -> None:
    assert_type(executor.map(power, [1, 2, 3]), Iterator[float])
    assert_type(executor.map(power, [1, 2, 3], range(3), timeout=None, chunksize=10), Iterator[float])
    assert_type(list(executor.map(str, iter([1, 2]), timeout=1.0, buffersize=8)), list[str])


def maps_have_options(executor: ScalerExecutor) -> None:
    assert_type(executor.map(power, [1], ordered=False, cancel_running=True, progress="label"), Iterator[float])
    assert_type(executor.starmap(power, [(1, 2), [3]], buffersize=4, ordered=False, progress=True), Iterator[float])
    executor.starmap(power, [1, 2])  # type: ignore[list-item]
    executor.map(power, [1], progress=3)  # type: ignore[arg-type]


def a_future_is_a_future(future: ScalerFuture[int]) -> Future[int]:
    wait([future])
    for finished in as_completed([future]):
        assert_type(finished, Future[int])
    return future


def callbacks_get_the_future(future: ScalerFuture[int]) -> None:
    def note(done: Future[int]) -> None: ...

    future.add_done_callback(note)


async def futures_can_be_awaited(executor: ScalerExecutor) -> None:
    assert_type(await asyncio.wrap_future(executor.submit(power, 2)), float)
    assert_type(await asyncio.get_running_loop().run_in_executor(executor, power, 2), float)


async def numbers() -> AsyncIterator[int]:
    yield 1


async def calls_can_be_awaited(executor: ScalerExecutor) -> None:
    assert_type(await executor.asubmit(power, 3, exponent=4), float)
    await executor.asubmit(power, "3")  # type: ignore[arg-type]
    await executor.asubmit(power)  # type: ignore[call-arg]
    task = asyncio.create_task(executor.asubmit(power, 2))
    assert_type(await task, float)
    async for result in executor.amap(power, [1, 2], numbers(), buffersize=4, ordered=False, progress=True):
        assert_type(result, float)
    async with aclosing(executor.amap(power, numbers())) as results:
        assert_type(await anext(results), float)
    async with ScalerExecutor() as entered:
        assert_type(entered, ScalerExecutor)


def cancel_has_a_limit_and_a_kind(
    executor: ScalerExecutor, future: ScalerFuture[int], other: ScalerFuture[str]
) -> None:
    assert_type(future.cancel(), bool)
    assert_type(future.cancel(1.0), bool)
    assert_type(future.cancel(timeout=None, force=False), bool)
    assert_type(executor.cancel([future]), bool)
    assert_type(executor.cancel((future, other), timeout=1.0, force=False), bool)
    future.cancel(1.0, False)  # type: ignore[call-arg]


def outcomes_are_a_closed_set(future: ScalerFuture[int]) -> str:
    outcome = future.cancel_outcome
    assert_type(outcome, CancelOutcome | None)
    if outcome is None:
        return "none asked or answered"
    if outcome is CancelOutcome.CANCELED:
        return "the code has stopped, or never started"
    if outcome is CancelOutcome.ALREADY_DONE or outcome is CancelOutcome.FINISHED_FIRST:
        return "it was done"
    if outcome is CancelOutcome.NOT_FOUND or outcome is CancelOutcome.UNCONFIRMED:
        return "nobody knows"
    if outcome is CancelOutcome.FAILED:
        return "it runs on"
    assert_never(outcome)


def errors_are_caught_by_existing_handlers(died: WorkerDiedError, lost: SchedulerLostError) -> None:
    pool_error: BrokenProcessPool = died
    executor_errors: tuple[BrokenExecutor, ...] = (died, lost)
    del pool_error, executor_errors


def clear_and_shutdown_return_nothing(executor: ScalerExecutor) -> None:
    clear: Callable[[], None] = executor.clear
    shutdown: Callable[[bool], None] = executor.shutdown
    clear()
    shutdown(True)
    executor.shutdown(wait=False, cancel_futures=True)
    executor.shutdown(True, cancel_futures=True)
    executor.shutdown(True, True)  # type: ignore[call-arg]


def current_is_an_executor(executor: ScalerExecutor) -> None:
    assert_type(ScalerExecutor.current(), ScalerExecutor)
    assert_type(ScalerExecutor.current().submit(pow, 2, 3).result(), int)
