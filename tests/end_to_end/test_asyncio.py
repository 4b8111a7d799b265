"""asubmit, amap, run_in_executor and wrap_future: what stops an await stops the call, while the loop goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import pytest
import workload
from served import Served
from support import DEADLINE_S, Fifo, Scene, wait_gone

from scaler_executor import ScalerExecutor, WorkerDiedError

Make = Callable[..., ScalerExecutor]

#: Seconds in which calls that heed nothing may unwind. Whoever waited for such a call would hold the loop so long.
GRACE_S = 3.0
#: The loop may be held by other processes, up to here.
GAP_S = 1.5

needs_task_groups = pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio has no TaskGroup and no timeout")


@pytest.fixture(autouse=True, scope="module")
def cluster(served: Served) -> Served:
    """What half of the executors here use."""
    return served


@pytest.fixture(params=["embedded", "served"])
def start_method(request: pytest.FixtureRequest) -> str:
    return "fork" if request.param == "embedded" else "served"


@pytest.fixture(params=["executor", "view"])
def executor(make: Make, request: pytest.FixtureRequest) -> ScalerExecutor:
    """An executor with two workers, or a view of one."""
    executor = make(2)
    return executor if request.param == "executor" else executor.with_options(name="of the view")


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> float:
    """Run it in a loop, and return for how long the loop had no turn."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.001)
            now = time.monotonic()
            longest, last = max(longest, now - last), now

    async def watched() -> None:
        watching = asyncio.ensure_future(watch())
        await main()
        watching.cancel()

    asyncio.run(watched())
    return longest


async def hear(fifo: Fifo) -> int:
    return int(await asyncio.to_thread(fifo.hear))


def test_results_and_errors(executor: ScalerExecutor) -> None:
    """Values, errors, and the death of a worker, which is the one call's."""

    async def main() -> None:
        results = await asyncio.gather(
            *(executor.asubmit(workload.add, number, right=1) for number in range(2000)),
            executor.asubmit(workload.raise_value, "awaited"),
            executor.asubmit(workload.exit_process, 3),
            return_exceptions=True,
        )
        assert results[:2000] == list(range(1, 2001))
        assert isinstance(results[2000], ValueError) and str(results[2000]) == "awaited"
        assert isinstance(results[2001], WorkerDiedError)

    run(main)


@pytest.mark.parametrize("how", ["cancel", "wait_for", "run ends"])
def test_what_stops_the_await_stops_the_call(scene: Scene, executor: ScalerExecutor, how: str) -> None:
    """Its process is gone, and its worker's place free; code that holds the GIL included."""
    started = scene.fifo()
    pids: list[int] = []

    async def main() -> None:
        task = asyncio.ensure_future(executor.asubmit(workload.hold_gil, started))
        pids.append(await hear(started))
        if how == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "wait_for":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.01)

    run(main)
    wait_gone(*pids)
    assert executor.submit(workload.add, 1).result(DEADLINE_S) == 1


@needs_task_groups
@pytest.mark.parametrize("how", ["timeout", "TaskGroup"])
def test_what_ends_a_block_stops_its_calls(scene: Scene, executor: ScalerExecutor, how: str) -> None:
    """asyncio.timeout, and a task group one of whose tasks fails."""

    async def main() -> None:
        started = scene.fifo()
        if how == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(None) as timeout:
                    call = asyncio.ensure_future(executor.asubmit(workload.sleep, started))
                    pid = await hear(started)
                    timeout.reschedule(asyncio.get_running_loop().time())
                    await call
        else:
            with pytest.raises(BaseExceptionGroup) as caught:  # noqa: F821
                async with asyncio.TaskGroup() as group:
                    group.create_task(executor.asubmit(workload.sleep, started))
                    pid = await hear(started)
                    group.create_task(executor.asubmit(workload.raise_value, "of the group"))
            assert [str(error) for error in caught.value.exceptions] == ["of the group"]
        await asyncio.to_thread(wait_gone, pid)
        assert await executor.asubmit(workload.add, 1) == 1

    run(main)


@pytest.mark.parametrize("how", ["asubmit", "amap", "run_in_executor", "wrap_future"])
def test_many_cancels_at_once_do_not_hold_the_loop(scene: Scene, make: Make, how: str) -> None:
    """Calls that run and heed nothing, and many that have not started, all cancelled in one turn."""
    executor = make(2, cancel_grace=GRACE_S)
    started, heartbeat = scene.fifo(), scene.heartbeat()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        call = workload.catch_everything
        awaited: list[asyncio.Future[Any]]
        if how == "amap":
            awaited = [asyncio.ensure_future(anext(executor.amap(call, [started] * 100, [heartbeat] * 100)))]
        elif how == "asubmit":
            awaited = [asyncio.ensure_future(executor.asubmit(call, started, heartbeat)) for _ in range(100)]
        elif how == "run_in_executor":
            awaited = [loop.run_in_executor(executor, call, started, heartbeat) for _ in range(100)]
        else:
            awaited = [asyncio.wrap_future(executor.submit(call, started, heartbeat)) for _ in range(100)]
        pids = [await hear(started), await hear(started)]
        for one in awaited:
            one.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*awaited, return_exceptions=True)
        )
        await asyncio.to_thread(wait_gone, *pids)

    assert run(main) < GAP_S
    assert executor.submit(workload.add, 1).result(DEADLINE_S) == 1


def test_maps(executor: ScalerExecutor) -> None:
    """In order and not, of iterables of both kinds, bounded and endless."""

    async def numbers(count: int) -> Any:
        for number in range(count):
            yield number

    async def main() -> None:
        assert [value async for value in executor.amap(workload.add, range(3000))] == list(range(3000))
        unordered = [value async for value in executor.amap(workload.add, range(3000), ordered=False)]
        assert sorted(unordered) == list(range(3000))
        mixed = executor.amap(workload.add, numbers(100), [1] * 50, buffersize=7)
        assert [value async for value in mixed] == list(range(1, 51))
        with pytest.raises(ValueError, match="invalid literal"):
            async for _ in executor.amap(int, ["1", "2", "x", "4"]):
                pass

    assert run(main) < GAP_S


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("how", ["break", "cancel"])
def test_a_map_that_is_left_early_stops_what_runs(
    scene: Scene, executor: ScalerExecutor, how: str, ordered: bool
) -> None:
    """The first hit ends the search, and a cancelled task its map."""
    started = scene.fifo()

    async def search() -> None:
        gates: list[Any] = [None, scene.fifo(), scene.fifo()]
        async for value in executor.amap(
            workload.pass_or_hold, [None, started, started], gates, range(3), ordered=ordered
        ):
            assert value == 0
            if how == "break":
                await hear_both()
                break

    pids: list[int] = []

    async def hear_both() -> None:
        pids.extend([await hear(started), await hear(started)])

    async def main() -> None:
        task = asyncio.ensure_future(search())
        if how == "cancel":
            await hear_both()
            task.cancel()
        await asyncio.wait([task])
        await asyncio.to_thread(wait_gone, *pids)
        assert await executor.asubmit(workload.add, 1) == 1

    run(main)


def test_options_of_a_view_hold(make: Make, scene: Scene) -> None:
    """A timeout of running ends the await."""
    view = make(1).with_options(timeout=0.2)

    async def main() -> None:
        with pytest.raises(FutureTimeoutError):
            await view.asubmit(workload.sleep, scene.fifo())
        with pytest.raises(FutureTimeoutError):
            await anext(view.amap(workload.sleep, [scene.fifo()]))

    run(main)


@pytest.mark.parametrize("when", ["never", "in the block", "at its end"])
def test_leaving_an_async_block_does_not_hold_the_loop(scene: Scene, make: Make, when: str) -> None:
    """It waits for what runs, and stops it when the task is cancelled."""
    executor = make(1)
    started, gate = scene.fifo(), scene.fifo()
    leaving = asyncio.Event()

    async def main() -> None:
        async def block() -> str:
            async with executor as entered:
                assert entered is executor
                future = executor.submit(workload.hold, started, gate, "held")
                if when == "in the block":
                    await asyncio.sleep(DEADLINE_S)
                leaving.set()
            return future.result(0)

        task = asyncio.ensure_future(block())
        pid = await hear(started)
        if when != "in the block":
            await leaving.wait()
            await asyncio.sleep(0.01)
            assert not task.done()
        if when == "never":
            gate.open()
            assert await task == "held"
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.to_thread(wait_gone, pid)
        with pytest.raises(RuntimeError, match="after shutdown"):
            await executor.asubmit(workload.add, 1)

    assert run(main) < GAP_S


PROGRAM = """
import asyncio, sys
import workload
from scaler_executor import ScalerExecutor
from support import copy_of_fifo

async def main(executor):
    started = copy_of_fifo(sys.argv[1])
    if sys.argv[2] == "asubmit":
        await asyncio.gather(*[executor.asubmit(workload.sleep, started) for _ in range(2)])
    else:
        async for _ in executor.amap(workload.sleep, [started, started]):
            pass

if __name__ == "__main__":
    with ScalerExecutor(2) as executor:
        try:
            asyncio.run(main(executor))
        except KeyboardInterrupt:
            # Free again: the executor is not told of the interrupt.
            print(executor.submit(workload.add, 41, 1).result())
"""


@pytest.mark.parametrize("how", ["asubmit", "amap"])
def test_ctrl_c_under_run_stops_the_calls(scene: Scene, how: str) -> None:
    """asyncio.run cancels its task; the calls end with it, and the executor can be used."""
    started = scene.fifo()
    client = scene.client(PROGRAM, started.path, how)
    pids = [int(started.hear()), int(started.hear())]
    os.kill(client.pid, signal.SIGINT)
    wait_gone(*pids)
    assert client.succeed() == "42\n"
