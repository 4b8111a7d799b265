"""asyncio's own ways to an executor: what it cancels stops."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from calls import Record, Wrong, fail, sleep_long, square

from scaler_executor import CancelOutcome, ScalerExecutor, WorkerDiedError


def await_start(record: Record) -> None:
    while not record.pids():
        time.sleep(0.005)


def test_run_in_executor(executor: ScalerExecutor, record: Record) -> None:
    """Results, exceptions and the death of a worker come to whoever awaits them; others finish."""

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        calls: list[tuple[Any, Any]] = [(record.watched(square), number) for number in range(20)]
        calls[5:5] = [(os._exit, 1), (fail, None)]
        return await asyncio.gather(
            *(loop.run_in_executor(executor, function, value) for function, value in calls), return_exceptions=True
        )

    found = asyncio.run(main())
    assert type(found.pop(5)) is WorkerDiedError and type(found.pop(5)) is Wrong
    assert found == [number * number for number in range(20)]
    assert record.pids() and os.getpid() not in record.pids()


def test_cancel_of_a_wrapped_future(executor: ScalerExecutor, record: Record) -> None:
    """Cancelling what `wrap_future` returns stops the running call."""
    future = executor.submit(record.watched(sleep_long))

    async def main() -> None:
        wrapped = asyncio.wrap_future(future)
        await asyncio.to_thread(await_start, record)
        wrapped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wrapped

    asyncio.run(main())
    future.cancel()  # waits for the confirmation, which that in the loop did not
    assert future.cancel_outcome is CancelOutcome.CANCELED


def test_timeout(executor: ScalerExecutor, record: Record) -> None:
    """What `wait_for` gives up does not keep its worker."""

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        for _ in range(2):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(loop.run_in_executor(executor, record.watched(sleep_long)), 0.3)
        return await asyncio.gather(*(loop.run_in_executor(executor, square, number) for number in range(4)))

    assert asyncio.run(asyncio.wait_for(main(), 60)) == [0, 1, 4, 9]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TaskGroup is new in Python 3.11")
@pytest.mark.parametrize("how", ["fails", "times out"])
def test_task_group(how: str, executor: ScalerExecutor, record: Record) -> None:
    """A group that fails, or runs out of time, stops the calls of its other tasks."""
    futures = []

    async def call(function: Callable[..., Any]) -> Any:
        futures.append(executor.submit(function))
        return await asyncio.wrap_future(futures[-1])

    async def main() -> None:
        async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as group:
            group.create_task(call(record.watched(sleep_long)))
            await asyncio.to_thread(await_start, record)
            if how == "fails":
                group.create_task(call(fail))
            else:
                limit.reschedule(asyncio.get_running_loop().time() + 0.1)

    if how == "fails":
        with pytest.raises(BaseExceptionGroup) as caught:  # noqa: F821 - of Python 3.11
            asyncio.run(main())
        assert [type(error) for error in caught.value.exceptions] == [Wrong]
    else:
        with pytest.raises(TimeoutError):
            asyncio.run(main())
    futures[0].cancel()
    assert futures[0].cancel_outcome is CancelOutcome.CANCELED
