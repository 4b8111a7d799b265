"""asubmit and amap over a fake scheduler: what they ask for, and that the loop's thread never waits."""

import asyncio
import concurrent.futures
import gc
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from fake_scheduler import PATIENCE_S, Setting, never_called
from test_map import echo, rows_of

from scaler_executor import ScalerExecutor
from scaler_executor.aio import LANDINGS_PER_TURN
from scaler_executor.protocol.messages import CancelKind


@pytest.fixture
def executor(setting: Setting) -> ScalerExecutor:
    """An executor with the setting's client."""
    executor = ScalerExecutor.__new__(ScalerExecutor)
    executor._client, executor._max_workers = setting.client, 2
    return executor


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[threading.Event]:
    """The events for which the loop's thread has waited."""
    events: list[threading.Event] = []
    main = threading.current_thread()
    wait = threading.Event.wait

    def noting_wait(self: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is main:
            events.append(self)
        return wait(self, timeout)

    monkeypatch.setattr(threading.Event, "wait", noting_wait)
    return events


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it in a loop. A hang fails."""

    async def limited() -> None:
        await asyncio.wait_for(main(), PATIENCE_S)

    asyncio.run(limited())


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_results_and_errors_reach_the_await(setting: Setting, executor: ScalerExecutor) -> None:
    """Also those of calls that were over before anybody awaited them."""

    async def main() -> None:
        fine = asyncio.ensure_future(executor.asubmit(never_called, 1, keyword=2))
        failing = asyncio.ensure_future(executor.asubmit(never_called))
        await turns(1)
        setting.scheduler.value(setting.scheduler.next_submit()[0], "fine")
        setting.scheduler.error(setting.scheduler.next_submit()[0], ValueError("text"))
        assert await fine == "fine"
        with pytest.raises(ValueError, match="text"):
            await failing

    run(main)


def test_a_failed_await_leaves_no_cycle(setting: Setting, executor: ScalerExecutor) -> None:
    """The exception's traceback does not keep the future, and with it itself, alive."""

    async def fail() -> None:
        setting.scheduler.on_submit = lambda row: setting.scheduler.error(row[0], LookupError("text"))
        await executor.asubmit(never_called)

    async def main() -> None:
        try:
            await fail()
        except LookupError:
            pass

    gc.collect()
    gc.disable()
    try:
        run(main)
        setting.scheduler.on_submit = setting.scheduler.submits.put
        setting.sync()  # the I/O thread has let go of the future
        assert not [thing for thing in gc.get_objects() if type(thing) is LookupError and thing.__traceback__]
    finally:
        gc.enable()


@pytest.mark.parametrize("count", [1, 300])
def test_a_cancelled_task_stops_its_call_without_waiting(
    setting: Setting, executor: ScalerExecutor, waits: list[threading.Event], count: int
) -> None:
    """The requests are forced, and sent together; the loop's thread has waited for nothing, and no answer is needed."""

    async def main() -> None:
        tasks = [asyncio.ensure_future(executor.asubmit(never_called)) for _ in range(count)]
        await turns(1)
        numbers = {setting.scheduler.next_submit()[0] for _ in tasks}
        waits.clear()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        assert not waits
        cancels = [setting.scheduler.next_cancel() for _ in tasks]
        assert {cancel[0] for cancel in cancels} == numbers
        assert {cancel[2] for cancel in cancels} == {CancelKind.FORCED}
        assert setting.client.outstanding == count
        for cancel in cancels:
            setting.scheduler.canceled(cancel)
        await until(lambda: not setting.client.outstanding)

    run(main)


def test_a_task_cancelled_as_its_call_ends_is_cancelled(setting: Setting, executor: ScalerExecutor) -> None:
    """The result has come and has not landed: the task ends cancelled, and nothing is asked for."""

    async def main() -> None:
        task = asyncio.ensure_future(executor.asubmit(never_called))
        await turns(1)
        setting.scheduler.value(setting.scheduler.next_submit()[0], "late")
        setting.sync()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert setting.scheduler.cancels.empty()

    run(main)


def test_a_call_that_others_cancel_cancels_the_await(setting: Setting, executor: ScalerExecutor) -> None:
    """As with asyncio.wrap_future; an error of that name that the call raised is an error."""

    async def main() -> None:
        setting.scheduler.on_cancel = setting.scheduler.canceled
        task = asyncio.ensure_future(executor.asubmit(never_called))
        await turns(1)
        setting.scheduler.next_submit()
        setting.client.clear(PATIENCE_S)
        with pytest.raises(asyncio.CancelledError):
            await task
        task = asyncio.ensure_future(executor.asubmit(never_called))
        await turns(1)
        setting.scheduler.error(setting.scheduler.next_submit()[0], concurrent.futures.CancelledError("its own"))
        with pytest.raises(concurrent.futures.CancelledError, match="its own"):
            await task

    run(main)


def test_many_results_wake_the_loop_once(
    setting: Setting, executor: ScalerExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they are handed out over several turns, between which others have theirs."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        count = 2 * LANDINGS_PER_TURN
        tasks = [asyncio.ensure_future(executor.asubmit(never_called)) for _ in range(count)]
        await turns(1)
        wakings: list[Any] = []
        call_soon_threadsafe = loop.call_soon_threadsafe
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda call: (wakings.append(call), call_soon_threadsafe(call))[1]
        )
        for _ in tasks:
            setting.scheduler.value(setting.scheduler.next_submit()[0], "value")
        setting.sync()
        assert len(wakings) == 1
        done = [0]
        while done[-1] < count:
            await asyncio.sleep(0)
            done.append(sum(task.done() for task in tasks))
        assert LANDINGS_PER_TURN in done

    run(main)


def test_waiting_for_room_leaves_the_loop_alone(
    setting: Setting, executor: ScalerExecutor, waits: list[threading.Event]
) -> None:
    """One thread waits, however many tasks do and give up; then they submit in their order."""
    client = setting.client

    async def main() -> None:
        client._has_room.clear()
        client._is_full = True
        waits.clear()
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(executor.asubmit(never_called), 0.01)
        tasks = [asyncio.ensure_future(executor.asubmit(never_called, number)) for number in range(3)]
        results = executor.amap(never_called, [7])
        mapped = asyncio.ensure_future(anext(results))
        await turns()
        assert setting.scheduler.submits.empty()
        assert [thread.name for thread in threading.enumerate()].count("scaler-executor-room") == 1
        client._is_full = False
        client._has_room.set()
        await turns()
        rows = [await asyncio.to_thread(setting.scheduler.next_submit) for _ in range(4)]
        for row in rows:
            setting.scheduler.value(row[0], row[0])
        got = await asyncio.gather(*tasks, mapped)
        assert sorted(got) == [row[0] for row in rows] and got[:3] == sorted(got[:3])
        assert client._has_room not in waits

    run(main)


def test_results_for_a_closed_loop_are_dropped(setting: Setting, executor: ScalerExecutor) -> None:
    """Somebody closed it with calls outstanding: the client goes on."""
    loop = asyncio.new_event_loop()
    call = executor.asubmit(never_called)

    async def begin() -> None:
        call.send(None)

    loop.run_until_complete(begin())
    loop.close()
    setting.scheduler.value(setting.scheduler.next_submit()[0], "for nobody")
    setting.sync()
    call.close()
    run(lambda: asyncio.sleep(0))


# amap


def serve_echo(setting: Setting) -> None:
    setting.scheduler.on_submit = lambda row: (setting.scheduler.submits.put(row), echo(setting, row))[0]


async def agenerate(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("buffersize", [None, 1, 10])
@pytest.mark.parametrize("kind", ["list", "generator", "async", "both"])
def test_a_map_yields_every_result(
    setting: Setting, executor: ScalerExecutor, ordered: bool, buffersize: int | None, kind: str
) -> None:
    """Of iterables of every kind, the shortest of which decides; nothing is left afterwards."""
    serve_echo(setting)
    iterables: list[Any] = {
        "list": [range(300)],
        "generator": [(number for number in range(300))],
        "async": [agenerate(300)],
        "both": [agenerate(300), itertools.count()],
    }[kind]

    async def main() -> None:
        tasks = asyncio.all_tasks()
        results = executor.amap(never_called, *iterables, buffersize=buffersize, ordered=ordered)
        got = [result async for result in results]
        expected = [(number, number) for number in range(300)] if kind == "both" else list(range(300))
        assert (got if ordered else sorted(got)) == expected
        with pytest.raises(StopAsyncIteration):
            await anext(results)
        await until(lambda: not setting.client.outstanding)
        assert asyncio.all_tasks() == tasks

    run(main)


def test_nothing_is_submitted_before_it_is_asked_for(setting: Setting, executor: ScalerExecutor) -> None:
    """An iterator that nobody reads reads and asks for nothing."""
    read = itertools.count()

    async def main() -> None:
        results = executor.amap(never_called, read, buffersize=3)
        await turns()
        del results

    run(main)
    assert repr(read) == "count(0)" and setting.scheduler.submits.empty()


@pytest.mark.parametrize("is_async", [True, False])
def test_a_buffer_bounds_what_amap_reads_ahead(setting: Setting, executor: ScalerExecutor, is_async: bool) -> None:
    """Endless iterables work, and are left as they are when the iterator is."""
    serve_echo(setting)
    read = itertools.count()

    async def endless() -> AsyncIterator[int]:
        for number in read:
            yield number

    async def main() -> None:
        results = executor.amap(never_called, endless() if is_async else read, buffersize=4)
        for expected in range(100):
            assert await anext(results) == expected
            await turns()
            assert int(repr(read)[6:-1]) - (expected + 1) <= 4
        await results.aclose()

    run(main)


def test_results_come_while_the_iterable_waits(setting: Setting, executor: ScalerExecutor) -> None:
    """An item may depend on the result of the one before."""
    serve_echo(setting)
    got: list[int] = []

    async def next_when_got() -> AsyncIterator[int]:
        for number in range(5):
            await until(lambda number=number: len(got) == number)  # type: ignore[misc]
            yield number

    async def main() -> None:
        async for result in executor.amap(never_called, next_when_got()):
            got.append(result)

    run(main)
    assert got == list(range(5))


@pytest.mark.parametrize("is_async", [True, False])
def test_an_iterables_error_is_raised_behind_its_results(
    setting: Setting, executor: ScalerExecutor, is_async: bool
) -> None:
    """The items before it are called and yielded."""
    serve_echo(setting)

    def generate() -> Iterator[int]:
        yield from range(3)
        raise LookupError

    async def generate_async() -> AsyncIterator[int]:
        for number in generate():
            yield number

    async def main() -> None:
        got = []
        with pytest.raises(LookupError):
            async for result in executor.amap(never_called, generate_async() if is_async else generate()):
                got.append(result)
        assert got == [0, 1, 2]

    run(main)


@pytest.mark.parametrize(
    "how", ["break", "error of a call", "error of the body", "cancel", "aclose", "close of another"]
)
def test_a_map_that_is_left_early_stops_its_calls(
    setting: Setting, executor: ScalerExecutor, waits: list[threading.Event], how: str
) -> None:
    """By force and without waiting, however it is left."""

    async def consume() -> None:
        async for _ in executor.amap(never_called, range(3)):
            if how == "break":
                break
            if how == "error of the body":
                raise LookupError

    async def main() -> None:
        task = asyncio.ensure_future(consume())
        await turns()
        rows = rows_of(setting, 3)
        waits.clear()
        if how == "cancel":
            task.cancel()
        elif how == "error of a call":
            setting.scheduler.error(rows[0][0], LookupError())
            rows = rows[1:]
        else:
            setting.scheduler.value(rows[0][0], "first")
            rows = rows[1:]
        if how in ("error of a call", "error of the body"):
            with pytest.raises(LookupError):
                await task
        elif how == "cancel":
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "break":
            await task
        else:
            await turns()
            results = executor.amap(never_called, range(3))
            first = asyncio.ensure_future(anext(results))
            await turns()
            again = rows_of(setting, 3)
            setting.scheduler.value(again[0][0], "first")
            assert await first == "first"
            waits.clear()
            if how == "aclose":
                await results.aclose()
            else:
                del results, first
            rows = again[1:]
        cancels = [setting.scheduler.next_cancel() for _ in rows]
        assert {cancel[0] for cancel in cancels} == {row[0] for row in rows}
        assert {cancel[2] for cancel in cancels} == {CancelKind.FORCED}
        assert not waits
        await turns()

    run(main)


def test_one_consumer_at_a_time(setting: Setting, executor: ScalerExecutor) -> None:
    """As an asynchronous generator; the first one is not disturbed."""

    async def main() -> None:
        results = executor.amap(never_called, [1])
        first = asyncio.ensure_future(anext(results))
        await turns()
        with pytest.raises(RuntimeError, match="already running"):
            await anext(results)
        setting.scheduler.value(setting.scheduler.next_submit()[0], "first")
        assert await first == "first"

    run(main)


def test_a_map_whose_results_are_always_there_gives_others_their_turns(
    setting: Setting, executor: ScalerExecutor
) -> None:
    """Neither reading a long list nor yielding its results keeps the loop for itself."""
    serve_echo(setting)
    has_turn = 0

    async def count_turns() -> None:
        nonlocal has_turn
        while True:
            has_turn += 1
            await asyncio.sleep(0)

    async def main() -> None:
        other = asyncio.ensure_future(count_turns())
        results = executor.amap(never_called, [str(number) for number in range(50_000)])
        assert await anext(results) == "0"
        while setting.scheduler.submits.qsize() < 49_999 // 512:
            await turns(1)
        await until(lambda: not setting.client.outstanding)
        before = has_turn
        assert len([result async for result in results]) == 49_999
        assert has_turn > before + 3
        other.cancel()

    run(main)


def test_an_executor_that_was_shut_down_refuses(setting: Setting, executor: ScalerExecutor) -> None:
    """As submit does."""

    async def main() -> None:
        setting.client.close()
        with pytest.raises(RuntimeError, match="after shutdown"):
            await executor.asubmit(never_called)
        with pytest.raises(RuntimeError, match="after shutdown"):
            await anext(executor.amap(never_called, [1]))

    run(main)
