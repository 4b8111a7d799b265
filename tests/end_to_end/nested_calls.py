"""Calls that submit calls, for `test_nested`."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor, TimeoutError, as_completed, wait
from typing import Any

from support import Fifo

from scaler_executor import ScalerExecutor

PATIENCE_S = 30.0


def fibonacci(n: int) -> int:
    if n < 2:
        return n
    executor = ScalerExecutor.current()
    futures = [executor.submit(fibonacci, n - step) for step in (1, 2)]
    return sum(future.result() for future in futures)


def deep(n: int) -> int:
    return 0 if not n else 1 + ScalerExecutor.current().submit(deep, n - 1).result()


def through(executor: ScalerExecutor, n: int) -> list[int]:
    """Use a handle in every way that waits."""
    assert list(executor.map(abs, range(-n, 0))) == list(range(n, 0, -1))
    futures = [executor.submit(pow, 2, exponent) for exponent in range(n)]
    done, left = wait(futures)
    assert not left and len(done) == n
    assert sorted(future.result() for future in as_completed(futures)) == [2**exponent for exponent in range(n)]
    assert futures[0].exception() is None
    called = threading.Event()
    executor.submit(abs, -1).add_done_callback(lambda _: called.set())
    assert called.wait(PATIENCE_S)
    return [executor.submit(pow, value, 2).result() for value in range(n)]


def raises_inside(executor: ScalerExecutor) -> str:
    try:
        executor.submit(int, "x").result()
    except ValueError as error:
        return str(error)
    return ""


def timed(executor: ScalerExecutor, said: Fifo, gate: Fifo) -> str:
    """Give up waiting for a call, and then cancel it."""
    future = executor.submit(said_and_gate, said, gate)
    try:
        future.result(timeout=0.2)
    except TimeoutError:
        said.tell("timeout")
    future.cancel()
    assert future.cancelled(), future
    try:
        future.result()
    except CancelledError:
        return str(future.cancel_outcome)
    return ""


def said_and_gate(said: Fifo, gate: Fifo) -> int:
    said.tell(os.getpid())
    gate.await_opening()
    return os.getpid()


def parent_of(executor: ScalerExecutor, said: Fifo, gate: Fifo, depth: int) -> int:
    """A chain of calls that wait, each of which says its pid; the last one waits for the gate."""
    said.tell(os.getpid())
    if not depth:
        gate.await_opening()
        return 0
    return 1 + executor.submit(parent_of, executor, said, gate, depth - 1).result()


def leaves(executor: ScalerExecutor, said: Fifo, gate: Fifo, count: int) -> int:
    """Submit calls and end."""
    for _ in range(count):
        executor.submit(said_and_gate, said, gate)
    return os.getpid()


def leaves_and_raises(executor: ScalerExecutor, said: Fifo, gate: Fifo) -> None:
    executor.submit(said_and_gate, said, gate)
    raise ValueError("on purpose")


def leaves_and_dies(executor: ScalerExecutor, said: Fifo, gate: Fifo) -> None:
    executor.submit(said_and_gate, said, gate)
    said.tell("submitted")
    gate.await_opening()
    os._exit(3)


def stubborn(executor: ScalerExecutor, said: Fifo, gate: Fifo) -> None:
    """Wait for a call, whatever interrupts that."""
    future = executor.submit(said_and_gate, said, gate)
    while True:
        try:
            future.result()
            return
        except BaseException:
            pass


def counted(path: str, item: int) -> int:
    """Note how many run at the same time; `path` is a directory."""
    mine = os.path.join(path, f"run-{os.getpid()}")
    with open(mine, "x"):
        pass
    running = len([name for name in os.listdir(path) if name.startswith("run-")])
    deadline = time.monotonic() + 0.002
    while time.monotonic() < deadline:
        running = max(running, len([name for name in os.listdir(path) if name.startswith("run-")]))
    os.remove(mine)
    return running


def counted_tree(executor: ScalerExecutor, path: str, depth: int) -> int:
    """Return how many calls ran at once, at the most, as any call of a tree has seen."""
    most = counted(path, 0)
    if depth:
        for future in [executor.submit(counted_tree, executor, path, depth - 1) for _ in range(3)]:
            most = max(most, future.result())
            most = max(most, counted(path, 1))
    return most


def in_threads(executor: ScalerExecutor, n: int) -> int:
    with ThreadPoolExecutor(4) as threads:
        return sum(threads.map(lambda value: executor.submit(abs, -value).result(), range(n)))


def awaits(executor: ScalerExecutor, how: str, depth: int) -> int:
    """Return 2**depth, by calls that are awaited in an event loop."""

    async def main() -> int:
        if not depth:
            return 1
        nested = executor, how, depth - 1
        if how == "asubmit":
            return sum(await asyncio.gather(*(executor.asubmit(awaits, *nested) for _ in range(2))))
        if how == "amap":
            return sum([value async for value in executor.amap(awaits, *([item] * 2 for item in nested))])
        if how == "wrap_future":
            futures = [asyncio.wrap_future(executor.submit(awaits, *nested)) for _ in range(2)]
        else:
            loop = asyncio.get_running_loop()
            futures = [loop.run_in_executor(executor, awaits, *nested) for _ in range(2)]
        return await futures[0] + await futures[1]

    return asyncio.run(main())


def awaits_in_vain(executor: ScalerExecutor) -> tuple[int, int]:
    """Leave calls that were awaited: by a timeout, and for ever."""

    async def main() -> int:
        executor_loop = asyncio.get_running_loop()
        left = executor_loop.run_in_executor(executor, abs, -1)
        try:
            await asyncio.wait_for(executor.asubmit(time.sleep, 60), 0.1)
        except asyncio.TimeoutError:
            pass
        return await left

    async def leave() -> None:
        asyncio.get_running_loop().run_in_executor(executor, abs, -1)

    asyncio.run(leave())
    return asyncio.run(main()), executor.submit(abs, -2).result()


def with_block(executor: ScalerExecutor, n: int) -> list[bool]:
    with executor:
        futures = [executor.submit(pow, 2, value) for value in range(n)]
    try:
        executor.submit(abs, 1)
    except RuntimeError as error:
        assert "shutdown" in str(error)
    else:
        raise AssertionError("it takes calls after its end")
    assert ScalerExecutor.current().submit(abs, -1).result() == 1
    return [future.done() for future in futures]


def forks(executor: ScalerExecutor) -> str:
    """Return what a child of the call's process is told."""
    assert executor.submit(abs, -1).result() == 1
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        for use in (lambda: executor.submit(abs, 1), ScalerExecutor.current):
            try:
                use()
            except RuntimeError as error:
                os.write(writing, f"{error}\n".encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    os.waitpid(pid, 0)
    assert executor.submit(abs, -2).result() == 2
    return said


def plain_inside() -> int:
    with ScalerExecutor(max_workers=2) as own:
        return own.submit(plain_innermost).result()


def plain_innermost() -> int:
    return ScalerExecutor.current().submit(os.getpid).result()


def huge(executor: ScalerExecutor, size: int) -> int:
    data = bytes(size)
    returned = executor.submit(bytes.upper, data).result()
    return len(returned)


def options_of_current() -> Any:
    options = ScalerExecutor.current()._client.terms.options
    return options.retries, options.timeout_s, options.priority
