"""`ScalerExecutor.map`: items go out in runs and come back in ranges; there is no future and no message per item.

This module knows how the iterables are cut into runs and how ranges of results become an iterator; what comes when is
for `scaler_executor.inbox`. What a run is to the scheduler, and when it is split, it does not know.

A run should be as long as possible, since everything between this process and a worker costs per run; but the first
ones decide how soon all workers have something to do, and a run's payload is sent and kept as a whole. So runs begin
small and grow, up to RUN_ITEMS and about RUN_BYTES. The agent cuts and joins them by the time that they take.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import CancelledError, Executor, Future, TimeoutError
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, NoReturn

from scaler_executor.future import cancel_all
from scaler_executor.inbox import CANCELLED, Inbox, MapRun, Range, UnorderedInbox
from scaler_executor.protocol.messages import CancelKind, Payload, ResultKind
from scaler_executor.runtime.calls import WORDS
from scaler_executor.runtime.namespace import NO_NEEDS
from scaler_executor.runtime.results import LoadFailed, read_failure, read_values

if TYPE_CHECKING:
    from scaler_executor.executor import ScalerExecutor
    from scaler_executor.progress import Meter
    from scaler_executor.runtime.client import ClientFutureManager
    from scaler_executor.runtime.functions import PreparedFunction
    from scaler_executor.runtime.handle import Handle
    from scaler_executor.runtime.view import ClientView

#: The most items in a run.
RUN_ITEMS: Final = 512
#: About so much payload in a run.
RUN_BYTES: Final = 1 << 14
#: Of a map that is short, each worker gets about so many runs: the last ones even out what took longer.
RUNS_PER_WORKER: Final = 4

_VALUE: Final = int(ResultKind.VALUE)
_FAILED: Final = int(ResultKind.ERROR)


_CONTAINERS: Final = (list, tuple, range, dict, set, frozenset, str, bytes, bytearray, deque)
_VIEWS: Final[tuple[Iterable[Any], ...]] = ({}.keys(), {}.values(), {}.items())
#: Iterables that have all their items: to take the next one runs no code of the user's.
_COMPLETE: Final = frozenset(
    {
        *_CONTAINERS,
        *(type(iter(container())) for container in _CONTAINERS if container is not range),
        type(iter(range(0))),
        *map(type, _VIEWS),
        *(type(iter(view)) for view in _VIEWS),
        itertools.count,
        itertools.repeat,
        itertools.product,
        itertools.permutations,
        itertools.combinations,
        itertools.combinations_with_replacement,
    }
)


def _has_its_items(iterable: Iterable[Any]) -> bool:
    if type(iterable) is zip:
        return all(map(_has_its_items, iterable.__reduce__()[1]))
    return type(iterable) in _COMPLETE or type(iterable).__module__ in ("numpy", "array")


def start_map(
    executor: ScalerExecutor,
    function: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    *,
    is_starred: bool,
    by_submit: bool,
    timeout: float | None,
    chunksize: int,
    buffersize: int | None,
    ordered: bool,
    cancel_running: bool,
    progress: bool | str,
) -> Iterator[Any]:
    """Begin a map of an executor, whose `map` and `starmap` say what the arguments are. Return the iterator."""
    end_time = None if timeout is None else timeout + time.monotonic()
    meter = None
    if progress is not False:
        from scaler_executor.progress import make_meter, running_in

        meter = make_meter(progress, count_items(iterables))
    if by_submit:
        return _map_by_submit(
            executor,
            function,
            join_items(iterables, is_starred),
            end_time=end_time,
            chunksize=chunksize,
            buffersize=buffersize,
            ordered=ordered,
            cancel_running=cancel_running,
            meter=meter,
        )
    call = MapCall(
        executor._client,
        executor.max_workers,
        function,
        iterables,
        is_starred=is_starred,
        inbox=(Inbox if ordered else UnorderedInbox)(meter=meter),
        chunksize=chunksize,
        buffersize=buffersize,
        cancel_running=cancel_running,
        meter=meter,
    )
    call.fill()
    if meter is not None:
        meter.start(call, running_in(call.inbox, executor.max_workers))
    return call.results(end_time)


def join_items(iterables: tuple[Iterable[Any], ...], is_starred: bool) -> Iterator[tuple[Any, ...]]:
    """Return the arguments of each call. The shortest iterable decides, as in the standard library."""
    return map(tuple, *iterables) if is_starred else zip(*iterables)  # noqa: B905


def count_items(iterables: tuple[Iterable[Any], ...]) -> int | None:
    """Return how many there are, None if nobody knows."""
    sizes = [len(iterable) for iterable in iterables if isinstance(iterable, Sized)]
    return min(sizes) if sizes and len(sizes) == len(iterables) else None


def _map_by_submit(
    executor: Executor,
    function: Callable[..., Any],
    items: Iterator[tuple[Any, ...]],
    *,
    end_time: float | None,
    chunksize: int,
    buffersize: int | None,
    ordered: bool,
    cancel_running: bool,
    meter: Meter | None,
) -> Iterator[Any]:
    """Map as the standard library does, by the executor's `submit`: there are programs that put their own there, to
    count the calls that are done say."""
    chunks = iter(lambda: list(islice(items, chunksize)), [])
    #: {future: number of its items}, in order.
    pending: dict[Future[list[Any]], int] = {}
    arrived: SimpleQueue[Future[list[Any]]] = SimpleQueue()

    def submit_next() -> bool:
        chunk = next(chunks, None)
        if chunk is None:
            if meter is not None:
                meter.complete()
            return False
        future = executor.submit(partial(_call_all, function), chunk)
        pending[future] = len(chunk)
        if not ordered:
            future.add_done_callback(arrived.put)
        if meter is not None:
            meter.expect(len(chunk))
        return True

    def next_future() -> Future[list[Any]]:
        if ordered:
            return next(iter(pending))
        try:
            return arrived.get(timeout=None if end_time is None else max(0.0, end_time - time.monotonic()))
        except Empty:
            raise TimeoutError() from None

    ahead = None if buffersize is None else max(1, buffersize // chunksize)
    while (ahead is None or len(pending) < ahead) and submit_next():
        pass

    def results() -> Iterator[Any]:
        try:
            if meter is not None:
                meter.start(meter, lambda: sum(future.running() for future in list(pending)))
            while pending:
                future = next_future()
                try:
                    values = future.result(None if end_time is None else max(0.0, end_time - time.monotonic()))
                except Exception:
                    if meter is not None and future.done():
                        meter.count(pending[future], CANCELLED if future.cancelled() else _FAILED)
                    raise
                if meter is not None:
                    meter.count(pending[future], _VALUE)
                del pending[future], future
                if ahead is not None:
                    submit_next()
                values.reverse()
                while values:
                    yield values.pop()
        finally:
            # What is done stays as it is: whoever put that `submit` there may keep it.
            cancel_all([future for future in pending if not future.done()], 0, force=cancel_running)
            if meter is not None:
                meter.close()

    return results()


def _call_all(function: Callable[..., Any], chunk: list[tuple[Any, ...]]) -> list[Any]:
    """Make the calls of a chunk, in a worker."""
    return [function(*arguments) for arguments in chunk]


class MapCall:
    """One call of `map`, `starmap` or `amap`.

    Args:
        client: Gets the runs.
        max_workers: How many workers there may be.
        function, iterables: What to call with what.
        is_starred: There is one iterable, of tuples of arguments.
        inbox: Where the results come.
        chunksize: The most items in a run; 1 for whatever is best.
        buffersize: The most items that are taken from the iterables ahead of the consumer; None for all at once.
        cancel_running: Whether calls that run are stopped when nobody wants the results any more.
        may_wait: Whether it may wait where callers do, see `interfaces.Cluster`.
        meter: Is told how many items there are.
    """

    def __init__(
        self,
        client: ClientFutureManager | ClientView | Handle,
        max_workers: int,
        function: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        *,
        is_starred: bool = False,
        inbox: Inbox | None = None,
        chunksize: int,
        buffersize: int | None,
        cancel_running: bool = False,
        may_wait: bool = True,
        meter: Meter | None = None,
    ) -> None:
        self._client = client
        self._function: Any = function
        self._name: str = client.terms.name or str(getattr(function, "__qualname__", type(function).__qualname__))
        self._prepared: PreparedFunction | None = None
        self._needs = NO_NEEDS
        self._function_id = 0
        self._items = join_items(iterables, is_starred)
        self._workers = max_workers
        self._buffersize = buffersize
        self._cancel_kind = CancelKind.FORCED if cancel_running else CancelKind.SOFT
        self._may_wait = may_wait
        self._meter = meter
        self._limit = RUN_ITEMS if chunksize == 1 else chunksize
        if client.terms.options.timeout_s is not None:
            self._limit = 1  # each item has its own time
        if buffersize is not None:
            self._limit = min(self._limit, max(1, buffersize // (2 * max_workers)))
        self._size = 1
        sizes = [len(iterable) for iterable in iterables if isinstance(iterable, Sized)]
        if chunksize == 1 and not all(_has_its_items(iterable) for iterable in iterables):
            # A generator may be slow, or wait for what becomes of the items that it has given: none is held back.
            self._limit = 1
        elif sizes:
            self._limit = max(1, min(self._limit, -(-min(sizes) // (max_workers * RUNS_PER_WORKER))))
            self._size = self._limit
        #: Runs since the size was last doubled.
        self._steps = 0
        #: Submitted and not consumed.
        self.inbox = Inbox() if inbox is None else inbox
        #: Items that were taken from the iterables and not yielded.
        self._ahead = 0
        self.is_exhausted = False

    def fill(self, until: float | None = None) -> None:
        """Take items from the iterables as far as the buffer allows, and submit them. Stop at the time `until`.

        Raises:
            Exception: What an iterable raises, or a client that accepts no calls.
        """
        while not self.is_exhausted:
            wanted = self._size
            if self._buffersize is not None:
                wanted = min(wanted, self._buffersize - self._ahead)
                if wanted < 1:
                    return
            items: list[tuple[Any, ...]] = []
            try:
                items.extend(islice(self._items, wanted))
            finally:
                # Also what an iterable has given before it failed: it was there to be submitted.
                is_last = self.is_exhausted = len(items) < wanted
                if items:
                    self.submit(items)
                if is_last:
                    self.exhausted()
            if until is not None and time.monotonic() > until:
                return

    def exhausted(self) -> None:
        """Note that there are no more items, where they come by `submit` alone."""
        self.is_exhausted = True
        if self._meter is not None:
            self._meter.complete()

    @property
    def has_room(self) -> bool:
        """Whether the buffer has any."""
        return self._buffersize is None or self._ahead < self._buffersize

    def is_worth_filling(self) -> bool:
        """Tell whether the buffer has room for a whole run; a run for each free place would be slow."""
        return not self.is_exhausted and self._buffersize is not None and self._buffersize - self._ahead >= self._size

    def take_back(self) -> None:
        """Cancel what nobody wants any more: what has not started, and what runs if that was asked for."""
        inbox = self.inbox
        pending = inbox.pending()
        inbox.clear()
        self._client.take_back([run.task_no for run in pending], self._cancel_kind)

    def _wait(self, end_time: float | None) -> Range:
        lender = self._client.lender
        return self.inbox.wait(end_time) if lender is None else lender.wait(partial(self.inbox.wait, end_time))

    def results(self, end_time: float | None) -> Iterator[Any]:
        """Yield the results. Closed or failed, it takes back what nobody wants any more."""
        inbox = self.inbox
        meter = self._meter
        try:
            while inbox:
                found: Range | None = inbox.take() or self._wait(end_time)
                assert found is not None
                count, kind, payload = found
                if kind == _VALUE and self._buffersize is None and type(payload) is bytes and payload.startswith(WORDS):
                    yield from read_values(payload, count)
                    continue
                values = self.open(found)
                found = payload = None  # or what they say would live as long as the last value
                while values:
                    self._ahead -= 1
                    if type(values[-1]) is LoadFailed:
                        self._raise(values.pop().error)
                    yield values.pop()
                    if self._buffersize is not None and self.is_worth_filling():
                        self.fill()
                if self._buffersize is not None and not inbox:
                    self.fill()
        finally:
            self.take_back()
            if meter is not None:
                meter.close()

    def open(self, found: Range) -> list[Any]:
        """Return the values of a range, the last one first: the list must not keep what has been yielded. Raise what it
        says instead."""
        count, kind, payload = found
        if kind != _VALUE:
            self._raise_failure(kind, payload)
        values = read_values(payload, count)  # type: ignore[arg-type]
        values.reverse()
        return values

    def pop(self, values: list[Any]) -> Any:
        """Take the next one of these values, for the consumer."""
        self._ahead -= 1
        if type(values[-1]) is LoadFailed:
            self._raise(values.pop().error)
        return values.pop()

    def submit(self, items: list[tuple[Any, ...]]) -> None:
        """Submit items as a run. What they cannot is raised at their place."""
        self._ahead += len(items)
        if self._meter is not None:
            self._meter.expect(len(items))
        self._client.start()
        try:
            if self._prepared is None:
                self._prepared = self._client.prepare(self._function)
                self._needs = self._client.needs(self._prepared.names)
            names: set[str] = set()
            payload = self._client.pickler.dumps_run(items, names)
            if names:
                self._look_up(names)
        except Exception as error:
            self.inbox.add(error)
            return
        run = MapRun(len(items), self.inbox)
        while True:
            function_id = self._client.submit_run(
                self._prepared, self._needs, self._function_id, len(items), payload, run, may_wait=self._may_wait
            )
            if function_id is not None:
                break
            self._look_up(names)
        self._function_id = function_id
        self.inbox.add(run)
        self._adapt(len(items), len(payload))

    def _look_up(self, names: set[str]) -> None:
        """Look up what the function needs, and items that need these names."""
        assert self._prepared is not None
        needs = self._client.needs(names | self._prepared.names)
        if needs.definitions != self._needs.definitions:
            self._function_id = 0
        self._needs = needs

    def _adapt(self, items: int, payload_bytes: int) -> None:
        """Choose the size of the next run."""
        limit = min(self._limit, max(1, items * RUN_BYTES // max(1, payload_bytes)))
        self._steps += 1
        if self._steps >= RUNS_PER_WORKER * self._workers and self._size < limit:
            self._steps = 0
            self._size *= 2
        self._size = min(self._size, limit)

    def _raise(self, error: BaseException) -> NoReturn:
        try:
            raise error
        finally:
            del self, error  # the traceback holds this frame

    def _raise_failure(self, kind: int, payload: Payload | str | Exception | None) -> NoReturn:
        if kind == CANCELLED:
            raise CancelledError()
        if isinstance(payload, Exception):
            self._raise(payload)
        assert payload is not None
        self._raise(read_failure(kind, payload, self._name))
