"""`ScalerExecutor.asubmit` and `amap`: calls that are awaited, and stopped when the awaiting task is.

Everything here but `Landing.add_result` and its kind runs in the thread of an event loop and never waits there. The I/O
thread tells a loop's `Landing` of futures that are settled; many of them make one wake-up of the loop, where a
done-callback of asyncio's own would make one each. Only the public interface of event loops is used.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar

from scaler_executor.future import ScalerFuture
from scaler_executor.inbox import Inbox, UnorderedInbox
from scaler_executor.mapping import MapCall, count_items
from scaler_executor.progress import make_meter, running_in

if TYPE_CHECKING:
    from scaler_executor.executor import ScalerExecutor
    from scaler_executor.runtime.client import ClientFutureManager
    from scaler_executor.runtime.handle import Handle
    from scaler_executor.runtime.lender import Lender
    from scaler_executor.runtime.view import ClientView

    Client: TypeAlias = ClientFutureManager | ClientView | Handle

T = TypeVar("T")

#: So many awaiting tasks are woken in one turn of the loop: what they do then is theirs, and others want their turns.
LANDINGS_PER_TURN: Final = 200
#: So long, in one turn, are items of a map taken and pickled.
FILL_S: Final = 0.002


class Landing:
    """Where calls settled by other threads reach one event loop."""

    _local = threading.local()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Weak, or this thread would keep its last loop.
        self._loop = weakref.ref(loop)
        #: {future: what its task awaits}
        self._awaited: dict[ScalerFuture[Any], asyncio.Future[None]] = {}
        #: Settled, and not landed.
        self._arrived: deque[ScalerFuture[Any]] = deque()
        #: Whether `_land` will be called. It clears this first, so what is added later has it called again.
        self._is_called = False
        #: {client: where calls queue while there is no room; and, while a thread waits for it, what says that there is}
        self._queues: weakref.WeakKeyDictionary[Client, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._rooms: dict[Client, asyncio.Event] = {}

    @classmethod
    def current(cls) -> Landing:
        """Return that of the running loop."""
        loop = asyncio.get_running_loop()
        landing: Landing | None = getattr(cls._local, "landing", None)
        if landing is None or landing._loop() is not loop:
            landing = cls._local.landing = cls(loop)
        return landing

    async def settled(self, future: ScalerFuture[Any]) -> None:
        """Return when the call is over. Whatever ends this earlier cancels the call, without waiting."""
        if future.done():
            return
        loop = self._loop()
        assert loop is not None
        self._awaited[future] = settled = loop.create_future()
        try:
            if not future.tell(self):
                return
            lender = future._get_lender()
            await (settled if lender is None else _lending(lender, settled))
        except BaseException:
            future.cancel(0)
            raise
        finally:
            self._awaited.pop(future, None)

    async def room(self, client: Client) -> None:
        """Return when a call may be submitted: one after the other, while much is unsent."""
        async with self._queues.setdefault(client, asyncio.Lock()):
            while client.is_full:
                event = self._rooms.get(client)
                if event is None:
                    event = self._rooms[client] = asyncio.Event()
                    # One, however many tasks give up: it stays until there is room.
                    threading.Thread(
                        target=self._await_room, args=(client,), name="scaler-executor-room", daemon=True
                    ).start()
                await event.wait()
            # The I/O thread should have seen this call before the next one is let in.
            await asyncio.sleep(0)

    def _await_room(self, client: Client) -> None:
        client.await_room()
        loop = self._loop()
        if loop is not None:
            call_in(loop, lambda: self._rooms.pop(client).set())

    # For the thread that settles

    def add_result(self, future: ScalerFuture[Any]) -> None:
        """As the waiters of `concurrent.futures.wait`."""
        self._arrived.append(future)
        if not self._is_called:
            loop = self._loop()
            if loop is not None:
                self._is_called = True
                call_in(loop, self._land)

    add_exception = add_cancelled = add_result

    def _land(self) -> None:
        self._is_called = False
        arrived = self._arrived
        for _ in range(min(len(arrived), LANDINGS_PER_TURN)):
            settled = self._awaited.get(arrived.popleft())
            if settled is not None and not settled.done():
                settled.set_result(None)
        if arrived and not self._is_called:
            self._is_called = True
            asyncio.get_running_loop().call_soon(self._land)


async def _lending(lender: Lender, awaited: Awaitable[T]) -> T:
    """Await something for which the call in which this is lends its slot."""
    goes_on = lender.begin_await()
    try:
        return await awaited
    finally:
        goes_on()


def call_in(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Have a loop call this, from any thread."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        pass  # it is closed: nobody awaits anything there


async def submit(executor: ScalerExecutor, function: Callable[..., T], args: Any, kwargs: Any, by_submit: bool) -> T:
    """Submit a call and return its result."""
    if by_submit:
        future = executor.submit(function, *args, **kwargs)
    else:
        client = executor._client
        if client.is_full:
            await Landing.current().room(client)
        future = client.submit(function, args, kwargs, may_wait=False)
    try:
        if not isinstance(future, ScalerFuture):
            return await asyncio.wrap_future(future)
        await Landing.current().settled(future)
        try:
            return future.result(0)
        except CancelledError:
            # By somebody else: as for `wrap_future`, a cancelled call is a cancelled await. Or the call has raised it.
            if not future.cancelled():
                raise
        raise asyncio.CancelledError()
    finally:
        # An exception's traceback holds this frame: without this the two would hold each other.
        del future


async def leave(executor: ScalerExecutor, exc_type: type[BaseException] | None) -> None:
    """Shut an executor down, and wait for that in a thread."""
    client = executor._client
    if exc_type is not None and issubclass(exc_type, (asyncio.CancelledError, KeyboardInterrupt)):
        client.close()
        client.clear(0)
    ending = asyncio.get_running_loop().run_in_executor(None, executor.__exit__, None, None, None)
    try:
        await asyncio.shield(ending)
    except asyncio.CancelledError:
        client.clear(0)
        await asyncio.shield(ending)
        raise


class _Feed:
    """A map of an event loop: what takes items from its iterables and submits them, and knows what has come.

    It is referred to by its own task and by the I/O thread; `AsyncMap` is what the consumer has, so that one who lets
    go of that ends this.
    """

    def __init__(
        self,
        executor: ScalerExecutor,
        function: Callable[..., Any],
        iterables: tuple[Iterable[Any] | AsyncIterable[Any], ...],
        *,
        chunksize: int,
        buffersize: int | None,
        ordered: bool,
        progress: bool | str,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = executor._client
        #: Whether `_note_news` will be called; it clears this first.
        self._is_called = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        plain = tuple(iterable for iterable in iterables if not isinstance(iterable, AsyncIterable))
        #: None where `call` reads the iterables itself.
        self._iterators: list[Iterator[Any] | AsyncIterator[Any]] | None = None
        if len(plain) < len(iterables):
            self._iterators = [aiter_or_iter(iterable) for iterable in iterables]
            plain = ()
        self._meter = make_meter(progress, count_items(plain))
        self.call = MapCall(
            self._client,
            executor.max_workers,
            function,
            plain,
            inbox=(Inbox if ordered else UnorderedInbox)(self._wake, self._meter),
            chunksize=chunksize,
            buffersize=buffersize,
            cancel_running=True,
            may_wait=False,
            meter=self._meter,
        )
        self._running = running_in(self.call.inbox, executor.max_workers)
        self._is_over = False
        self._turn_end = time.monotonic() + FILL_S
        self._task = self._loop.create_task(self._feed())
        self._task.add_done_callback(lambda _: self._news.set())

    async def next_values(self) -> list[Any]:
        """Return the next values, the last one first.

        Raises:
            StopAsyncIteration: There are none.
            BaseException: What a call or an iterable has raised.
        """
        if time.monotonic() > self._turn_end:
            # Where results are always there, others would never have their turn.
            await asyncio.sleep(0)
            self._turn_end = time.monotonic() + FILL_S
        inbox = self.call.inbox
        while True:
            self._news.clear()
            found = inbox.take_or_expect()
            if found is not None:
                return self.call.open(found)
            if self._task.done() and not inbox:
                self._task.result()
                raise StopAsyncIteration
            lender = self._client.lender
            await (self._news.wait() if lender is None else _lending(lender, self._news.wait()))
            self._turn_end = time.monotonic() + FILL_S

    def note_consumed(self) -> None:
        """Go on reading if there is room for it."""
        if not self._room.is_set() and self.call.has_room:
            self._room.set()

    def end(self) -> None:
        """Stop all calls, and reading. In any thread; never waits for more than some milliseconds."""
        if not self._is_over:
            self._is_over = True
            self.call.take_back()
            call_in(self._loop, self._task.cancel)
            if self._meter is not None:
                self._meter.close(FILL_S)

    def _wake(self) -> None:
        if not self._is_called:
            self._is_called = True
            call_in(self._loop, self._note_news)

    def _note_news(self) -> None:
        self._is_called = False
        self._news.set()

    async def _feed(self) -> None:
        call = self.call
        end = time.monotonic() + FILL_S
        try:
            while not call.is_exhausted:
                while not call.has_room:
                    self._room.clear()
                    await self._room.wait()
                if self._client.is_full:
                    await Landing.current().room(self._client)
                if self._iterators is None:
                    call.fill(end)
                else:
                    arguments = await _take(self._iterators)
                    if arguments is None:
                        call.exhausted()
                    else:
                        call.submit([arguments])
                self._news.set()
                if self._meter is not None and not self._meter.has_started:
                    self._meter.start(call, self._running)
                if time.monotonic() > end:
                    await asyncio.sleep(0)
                    end = time.monotonic() + FILL_S
        except Exception as error:
            # It is raised at its place, behind the results of the items before.
            call.inbox.add(error)


def aiter_or_iter(iterable: Iterable[Any] | AsyncIterable[Any]) -> Iterator[Any] | AsyncIterator[Any]:
    """Return an iterator of either kind."""
    return aiter(iterable) if isinstance(iterable, AsyncIterable) else iter(iterable)


async def _take(iterators: list[Iterator[Any] | AsyncIterator[Any]]) -> tuple[Any, ...] | None:
    """Return the next item of each iterator, None if one has none."""
    arguments = []
    for iterator in iterators:
        try:
            arguments.append(await anext(iterator) if isinstance(iterator, AsyncIterator) else next(iterator))
        except (StopAsyncIteration, StopIteration):
            return None
    return tuple(arguments)


class AsyncMap(Generic[T]):
    """The results of `ScalerExecutor.amap`: an asynchronous iterator, which may be closed like a generator.

    Args:
        make_feed: Begins the map, in the thread of the loop.
    """

    def __init__(self, make_feed: Callable[[], _Feed]) -> None:
        self._make_feed = make_feed
        self._feed: _Feed | None = None
        self._values: list[Any] = []
        self._is_over = False
        self._is_running = False

    def __aiter__(self) -> AsyncMap[T]:
        return self

    async def __anext__(self) -> T:
        if self._is_running:
            raise RuntimeError("anext(): asynchronous iterator is already running")
        if self._is_over:
            raise StopAsyncIteration
        self._is_running = True
        try:
            if self._feed is None:
                self._feed = self._make_feed()
            if not self._values:
                self._values = await self._feed.next_values()
            value: T = self._feed.call.pop(self._values)
        except BaseException:
            self._end()
            raise
        finally:
            self._is_running = False
        self._feed.note_consumed()
        return value

    async def aclose(self) -> None:
        """Stop all calls that are not over, without waiting for that."""
        self._end()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        self._is_over = True
        self._values.clear()
        if self._feed is not None:
            self._feed.end()


def amap(
    executor: ScalerExecutor,
    function: Callable[..., Any],
    iterables: tuple[Iterable[Any] | AsyncIterable[Any], ...],
    *,
    chunksize: int,
    buffersize: int | None,
    ordered: bool,
    progress: bool | str,
) -> AsyncMap[Any]:
    """Return the results of a map, which begins when the first one is asked for."""
    return AsyncMap(
        lambda: _Feed(
            executor,
            function,
            iterables,
            chunksize=chunksize,
            buffersize=buffersize,
            ordered=ordered,
            progress=progress,
        )
    )
