"""`ScalerExecutor.map`: items go out in runs and come back in ranges; there is no future and no message per item.

This module knows how the iterables are cut into runs and how ranges of results, which come in any order, become an
iterator in order. What a run is to the scheduler, and when it is split, it does not know.

A run should be as long as possible, since everything between this process and a worker costs per run; but the first
ones decide how soon all workers have something to do, and a run's payload is sent and kept as a whole. So runs begin
small and grow, up to RUN_ITEMS and about RUN_BYTES. The agent cuts and joins them by the time that they take.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import CancelledError, Executor, Future, TimeoutError
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NoReturn

from scaler_executor.future import cancel_all
from scaler_executor.protocol.client import REST
from scaler_executor.protocol.messages import Payload, ResultKind
from scaler_executor.runtime.calls import WORDS
from scaler_executor.runtime.namespace import NO_NEEDS
from scaler_executor.runtime.results import LoadFailed, read_failure, read_values

if TYPE_CHECKING:
    from scaler_executor.runtime.client import ClientFutureManager
    from scaler_executor.runtime.functions import PreparedFunction
    from scaler_executor.runtime.terms import Terms
    from scaler_executor.runtime.view import ClientView

#: The most items in a run.
RUN_ITEMS: Final = 512
#: About so much payload in a run.
RUN_BYTES: Final = 1 << 14
#: Of a map that is short, each worker gets about so many runs: the last ones even out what took longer.
RUNS_PER_WORKER: Final = 4

_CANCELLED: Final = -2
#: Held while the event of a run is made: two threads that clear the executor wait for the same one.
_MAKING_EVENT: Final = threading.Lock()
_VALUE: Final = int(ResultKind.VALUE)


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
    }
)


def _has_its_items(iterable: Iterable[Any]) -> bool:
    return type(iterable) in _COMPLETE or type(iterable).__module__ in ("numpy", "array")


def map_by_submit(
    executor: Executor,
    function: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    *,
    timeout: float | None,
    chunksize: int,
    buffersize: int | None,
) -> Iterator[Any]:
    """Map as the standard library does, by the executor's `submit`: there are programs that put their own there, to
    count the calls that are done say."""
    end_time = None if timeout is None else timeout + time.monotonic()
    items = zip(*iterables)  # noqa: B905 - the shortest decides, as in the standard library
    chunks = iter(lambda: list(islice(items, chunksize)), [])
    pending: deque[Future[list[Any]]] = deque()

    def submit_next() -> bool:
        chunk = next(chunks, None)
        if chunk is None:
            return False
        pending.append(executor.submit(partial(_call_all, function), chunk))
        return True

    ahead = None if buffersize is None else max(1, buffersize // chunksize)
    while (ahead is None or len(pending) < ahead) and submit_next():
        pass

    def results() -> Iterator[Any]:
        try:
            while pending:
                future = pending[0]
                values = future.result(None if end_time is None else max(0.0, end_time - time.monotonic()))
                del future
                pending.popleft()
                if ahead is not None:
                    submit_next()
                values.reverse()
                while values:
                    yield values.pop()
        finally:
            # What is done stays as it is: whoever put that `submit` there may keep it.
            cancel_all([future for future in pending if not future.done()], 0, force=False)

    return results()


def _call_all(function: Callable[..., Any], chunk: list[tuple[Any, ...]]) -> list[Any]:
    """Make the calls of a chunk, in a worker."""
    return [function(*arguments) for arguments in chunk]


class MapRun:
    """Items of one map that were submitted together: what has come of them, in ranges that nobody has unpickled yet."""

    __slots__ = ("_left", "_over", "_ranges", "_reader", "_rest", "items", "task_no", "terms")

    def __init__(self, items: int, reader: _Reader) -> None:
        self.items = items
        #: Its number at the scheduler, set when it is submitted.
        self.task_no = 0
        #: See `interfaces.Run`.
        self.terms: Terms | None = None
        #: Items without an answer. Written by the I/O thread.
        self._left = items
        #: {first: (count, kind, payload)}. Added to by the I/O thread, taken out by the reader, who always asks for the
        #: item behind the last range.
        self._ranges: dict[int, tuple[int, int, Payload | str | None]] = {}
        #: What holds for each item that no range has, once the run is over.
        self._rest: tuple[int, Payload | str | None] | None = None
        self._reader = reader
        self._over: threading.Event | None = None

    @property
    def is_over(self) -> bool:
        """Whether each item has a result or is cancelled."""
        return self._left == 0

    @property
    def over(self) -> threading.Event:
        """Is set when the run is over."""
        with _MAKING_EVENT:
            event = self._over = self._over or threading.Event()
        # Made visible first, then looked at; the I/O thread writes `_left` first and then looks for the event.
        if self._left == 0:
            event.set()
        return event

    def set_items_ready(self, first: int, count: int, kind: int, payload: Payload | str) -> None:
        """Take the results of items [first, first + count); `first` is REST for all that have none yet."""
        self._answer(first, count, kind, payload)

    def set_items_cancelled(self, first: int, count: int) -> None:
        """Note that these items end cancelled; `first` as above."""
        self._answer(first, count, _CANCELLED, None)

    def take(self, first: int) -> tuple[int, int, Payload | str | None] | None:
        """Return (count, kind, payload) of the range that begins at item `first`, None if it is not there yet."""
        found = self._ranges.pop(first, None)
        if found is None and self._rest is not None:
            # `_rest` is the last that is written: a range that was written before it is there now.
            found = self._ranges.pop(first, None) or (1, *self._rest)
        return found

    def _answer(self, first: int, count: int, kind: int, payload: Payload | str | None) -> None:
        if first == REST:
            self._rest = (kind, payload)
            self._left = 0
        else:
            self._ranges[first] = (count, kind, payload)
            self._left -= count
        self._reader.note(self)
        if self._left == 0 and self._over is not None:
            self._over.set()


class _Reader:
    """Where the consumer of a map waits."""

    def __init__(self) -> None:
        #: The run that it waits for. Written before the consumer looks at the run for the last time and waits; the I/O
        #: thread writes into the run first and then looks here.
        self._wanted: MapRun | None = None
        self._event = threading.Event()

    def note(self, run: MapRun) -> None:
        """Wake the consumer if this is what it waits for."""
        if self._wanted is run:
            self._event.set()

    def wait_for(self, run: MapRun, first: int, end_time: float | None) -> tuple[int, int, Payload | str | None]:
        """Return the range of `run` that begins at item `first`; raise TimeoutError at `end_time`."""
        found = run.take(first)
        if found is not None:
            return found
        try:
            while True:
                self._event.clear()
                self._wanted = run
                found = run.take(first)
                if found is not None:
                    return found
                if end_time is None:
                    self._event.wait()
                elif not self._event.wait(max(0.0, end_time - time.monotonic())):
                    found = run.take(first)
                    if found is not None:
                        return found
                    raise TimeoutError()
        finally:
            self._wanted = None


class MapCall:
    """One call of `map`.

    Args:
        client: Gets the runs.
        max_workers: How many workers there may be.
        function, iterables: What to call with what.
        chunksize: The most items in a run; 1 for whatever is best.
        buffersize: The most items that are taken from the iterables ahead of the consumer; None for all at once.
    """

    def __init__(
        self,
        client: ClientFutureManager | ClientView,
        max_workers: int,
        function: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        *,
        chunksize: int,
        buffersize: int | None,
    ) -> None:
        self._client = client
        self._function: Any = function
        self._name: str = client.terms.name or str(getattr(function, "__qualname__", type(function).__qualname__))
        self._prepared: PreparedFunction | None = None
        self._needs = NO_NEEDS
        self._function_id = 0
        self._items = zip(*iterables)  # noqa: B905 - the shortest decides, as in the standard library
        self._workers = max_workers
        self._buffersize = buffersize
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
        self._reader = _Reader()
        #: Submitted and not consumed, in order. An exception stands for items that could not be submitted.
        self._runs: deque[MapRun | Exception] = deque()
        #: Items that were taken from the iterables and not yielded.
        self._ahead = 0
        self._is_exhausted = False

    def fill(self) -> None:
        """Take items from the iterables as far as the buffer allows, and submit them.

        Raises:
            Exception: What an iterable raises, or a client that accepts no calls.
        """
        while not self._is_exhausted:
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
                self._is_exhausted = len(items) < wanted
                if items:
                    self._submit(items)

    def is_worth_filling(self) -> bool:
        """Tell whether the buffer has room for a whole run; a run for each free place would be slow."""
        return not self._is_exhausted and self._buffersize is not None and self._buffersize - self._ahead >= self._size

    def take_back(self) -> None:
        """Cancel what has not started."""
        runs, self._runs = self._runs, deque()
        self._client.take_back([run.task_no for run in runs if isinstance(run, MapRun) and not run.is_over])

    def results(self, end_time: float | None) -> Iterator[Any]:
        """Yield the results in order. Closed or failed, it takes back what has not started."""
        try:
            while self._runs:
                run = self._runs[0]
                if isinstance(run, Exception):
                    self._raise(run)
                item = 0
                while item < run.items:
                    count, kind, payload = self._reader.wait_for(run, item, end_time)
                    item += count
                    if kind != _VALUE:
                        self._raise_failure(kind, payload)
                    values = read_values(payload, count)  # type: ignore[arg-type]
                    if self._buffersize is None and type(payload) is bytes and payload.startswith(WORDS):
                        yield from values
                        continue
                    payload = None
                    # The list must not keep what has been yielded.
                    values.reverse()
                    while values:
                        self._ahead -= 1
                        if type(values[-1]) is LoadFailed:
                            self._raise(values.pop().error)
                        yield values.pop()
                        if self._buffersize is not None and self.is_worth_filling():
                            self.fill()
                self._runs.popleft()
                if self._buffersize is not None and not self._runs:
                    self.fill()
        finally:
            self.take_back()

    def _submit(self, items: list[tuple[Any, ...]]) -> None:
        self._ahead += len(items)
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
            self._runs.append(error)
            return
        run = MapRun(len(items), self._reader)
        while True:
            function_id = self._client.submit_run(
                self._prepared, self._needs, self._function_id, len(items), payload, run
            )
            if function_id is not None:
                break
            self._look_up(names)
        self._function_id = function_id
        self._runs.append(run)
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

    def _raise_failure(self, kind: int, payload: Payload | str | None) -> NoReturn:
        if kind == _CANCELLED:
            raise CancelledError()
        assert payload is not None
        self._raise(read_failure(kind, payload, self._name))
