"""ScalerExecutor: the standard library's executor interface.

It checks arguments as ProcessPoolExecutor does, in its words, and decides which cluster to start. Everything behind
`submit` is the client's (`scaler_executor.runtime.client`), everything behind `map` is in `scaler_executor.mapping`.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from scaler_executor.defaults import (
    ADDRESS_VARIABLE,
    CANCEL_GRACE_S,
    CANCEL_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    DEFAULT_TIMEOUT,
    UNCHANGED,
    DefaultTimeout,
    Unchanged,
)
from scaler_executor.options import MAX_RETRIES, check_count, check_seconds, check_sizes, check_timeout, merge
from scaler_executor.runtime import exiting as exiting  # first of all, see there
from scaler_executor.runtime.cgroups import cpu_count_usable
from scaler_executor.runtime.cluster import EmbeddedCluster

# Everything else of ours is imported when the processes have been started: both take some ten milliseconds, and go on
# side by side.

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from typing_extensions import ParamSpec, Self

    from scaler_executor.aio import AsyncMap
    from scaler_executor.future import ScalerFuture
    from scaler_executor.runtime.client import ClientFutureManager
    from scaler_executor.runtime.handle import Handle
    from scaler_executor.runtime.remote import RemoteCluster
    from scaler_executor.runtime.view import ClientView

    P = ParamSpec("P")

T = TypeVar("T")


class ScalerExecutor(Executor):
    """Runs calls in worker processes.

    As `concurrent.futures.ProcessPoolExecutor`, except that futures are `ScalerFuture`s, whose `cancel()` stops running
    code, and that the death of a worker costs only the call that it was in (WorkerDiedError). All methods are
    thread-safe.

    Args:
        max_workers: The most workers at once; None for the number of CPUs that this process may use: its affinity, or
            its cgroup's quota rounded up where that is less. Workers are started when there is work for them.
        mp_context: A multiprocessing context, of which only the start method counts: with "fork" workers are forks of
            this process as it is at the first call, with any other they start from a fresh interpreter. None for the
            interpreter's default. No start method imports `__main__` again; what calls use of it is sent.
        initializer: Called in each worker before its first call. If it fails no worker can be started, and calls end
            with WorkerStartError.
        initargs: Arguments for `initializer`.
        max_tasks_per_child: A worker is replaced after so many calls; None for never. Not with "fork"; without
            `mp_context` it means "spawn".
        cancel_timeout: Seconds that `ScalerFuture.cancel` waits by default, None for no limit.
        cancel_grace: Seconds that a cancelled call has to unwind before its process group is killed; 0: none.
        retries, timeout: As in `with_options`, for all calls.

        address: The connection file of a cluster that `scaler-executor serve` hosts: calls run there. Or, with
            `credentials`, "tcp://HOST:PORT", where that cluster is reached from here (through a tunnel, say). None for
            what the environment variable SCALER_EXECUTOR_ADDRESS says; without it, for workers of this process's own.
            `max_workers` then limits how many of this executor's calls run at once (None: not at all), `mp_context` has
            no effect, and `initializer` is called in each worker before its first call for this executor. `shutdown`
            ends this executor's calls, never the cluster.
        credentials: The connection file whose keys are used where the address is "tcp://HOST:PORT"; None for the one
            that SCALER_EXECUTOR_CREDENTIALS names.
        connect_timeout: Seconds in which the cluster has to let this executor in.

    Raises:
        ConnectionError: The cluster could not be reached; as AuthenticationError if it refuses the key or has another
            one, as VersionMismatchError if it speaks another version of the protocol or runs another Python.
        ValueError: As ProcessPoolExecutor; also for a negative `cancel_timeout` or `cancel_grace`, and for an `address`
            or `credentials` that are not as they have to be.
        TypeError: As ProcessPoolExecutor.
        OSError: The processes could not be started.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        cancel_timeout: float | None = CANCEL_TIMEOUT_S,
        cancel_grace: float = CANCEL_GRACE_S,
        retries: int = 0,
        timeout: float | None = None,
        address: str | os.PathLike[str] | None = None,
        credentials: str | os.PathLike[str] | None = None,
        connect_timeout: float = CONNECT_TIMEOUT_S,
    ) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if address is None:
            address = os.environ.get(ADDRESS_VARIABLE) or None
            if address is None and credentials is not None:
                raise ValueError("credentials go with an address")
        start_method = _resolve_start_method(mp_context, max_tasks_per_child)
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            elif max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
            if start_method == "fork" and address is None:
                raise ValueError(
                    "max_tasks_per_child is incompatible with the 'fork' multiprocessing start method;"
                    " supply a different mp_context."
                )
        if cancel_timeout is not None and cancel_timeout < 0:
            raise ValueError("cancel_timeout must be >= 0")
        cancel_grace = check_seconds("cancel_grace", cancel_grace, zero=True)
        retries = check_count("retries", retries, 0, MAX_RETRIES)
        timeout = check_timeout(timeout)
        if not connect_timeout > 0:
            raise ValueError("connect_timeout must be > 0")
        # Plain numbers from here on, whatever numpy or a configuration gave.
        max_workers = None if max_workers is None else operator.index(max_workers)
        self._start_method = start_method
        cluster: EmbeddedCluster | RemoteCluster
        if address is None:
            self._max_workers = cpu_count_usable() if max_workers is None else max_workers
            cluster = EmbeddedCluster(
                self._max_workers, start_method, initializer, initargs, max_tasks_per_child, float(cancel_grace)
            )
        else:
            from scaler_executor.runtime.remote import RemoteCluster
            from scaler_executor.runtime.security import resolve

            cluster = RemoteCluster(
                resolve(address, credentials),
                max_workers,
                initializer,
                initargs,
                max_tasks_per_child,
                float(cancel_grace),
                float(connect_timeout),
            )
            self._max_workers = max(1, cluster.workers) if max_workers is None else max_workers
        try:
            from scaler_executor.protocol.messages import Options
            from scaler_executor.runtime.client import ClientFutureManager
            from scaler_executor.runtime.nesting_site import EXECUTORS

            options = Options(retries, timeout)
            client = ClientFutureManager(cluster, cancel_timeout_s=cancel_timeout, options=options)
        except BaseException:
            cluster.kill()
            if not cluster.has_owner:
                cluster.join()
            raise
        client.close_with(self)
        self._client: ClientFutureManager | ClientView | Handle = client
        EXECUTORS[id(self)] = self

    @classmethod
    def current(cls) -> ScalerExecutor:
        """Return a handle of the executor that runs the call in which this is asked: calls that are submitted through
        it run on the same workers, with the options (retries, timeout, priority, cancel_grace) of the call.

        A pickled executor becomes a handle as well: `executor.submit(f, executor)` gives `f` one, with the executor's
        options; and so is, in a call, a global that is the executor. A call that waits for others lets them run in its
        place, so one worker is enough for any depth; it goes on when its place is free again. In an event loop it waits
        as long as any call is awaited, and goes on at once; a wait that is none for a future, say for an event that a
        done-callback sets, keeps the place. Cancelling a call cancels what it has submitted; what it leaves behind when
        it ends is finished. `shutdown` and `with` of a handle wait for the calls that were submitted through it.

        Raises:
            RuntimeError: This is no call of a ScalerExecutor, or a fork of a process that makes one. Using a handle
                raises the same.
        """
        from scaler_executor.runtime.handle import current

        return current()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As `object.__reduce_ex__`: what is unpickled is a handle, see `current`."""
        from scaler_executor.runtime.handle import reduce

        return reduce(self)

    @property
    def max_workers(self) -> int:
        """The most workers at once."""
        return self._max_workers

    @property
    def size(self) -> int:
        """`max_workers`, as libraries ask for it that are made for pools: those of multiprocessing, MPI, schwimmbad."""
        return self._max_workers

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        # By which `isinstance(executor, ProcessPoolExecutor)` holds: there are libraries that ask before they look how
        # many workers there are, and refuse what they do not know. It is nothing that the program itself may have to
        # import, so it is not inherited from; without it nobody can ask.
        cls: type[Any] = type(self)
        for name in ("concurrent.futures.process", "concurrent.futures"):
            pool = vars(sys.modules.get(name, sys)).get("ProcessPoolExecutor")
            if pool is not None:
                return _as_process_pool(cls, pool)
        return cls

    @property
    def _mp_context(self) -> BaseContext:
        # Private in ProcessPoolExecutor too, but there are programs that look at it.
        import multiprocessing

        return multiprocessing.get_context(self._start_method)

    # `fn` and `self` are positional only, so that calls may have keyword arguments of these names.
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> ScalerFuture[T]:
        """As `Executor.submit`. The call is pickled now, in this thread: later changes of its arguments do not count.

        Raises:
            RuntimeError: The executor has been shut down, or this process is a fork of the one that made it.
            BrokenExecutor: SchedulerLostError or WorkerStartError.
        """
        return self._client.submit(fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        ordered: bool = True,
        cancel_running: bool = False,
        progress: bool | str = False,
    ) -> Iterator[T]:
        """As `Executor.map`. How many items travel together is decided by their size and duration.

        An exception of a call is raised where its result would be yielded, and ends the iteration. An iterator that is
        closed, or that raised, takes back the items that have not started; those that run, complete. One that is never
        read takes back nothing.

        Args:
            fn: Called with one item of each iterable.
            iterables: Read at once unless `buffersize` is given.
            timeout: Seconds from now until the last result is there, None for no limit.
            chunksize: If more than 1, at most so many items travel together. Where a subclass or somebody else has put
                another `submit` in place, it is called for each so many items, as in the standard library.
            buffersize: The most items that are read ahead of the consumer; the iterables may then be endless.
            ordered: If False, results are yielded as they come. An exception is raised as soon as it is there.
            cancel_running: Whether an iterator that is closed, or that raised, also stops the items that run, as
                `ScalerFuture.cancel` does; it does not wait for that.
            progress: True, or a label, for a bar on `sys.stderr` (in a notebook: beneath the cell) with rate, time
                left, failures and running calls, by tqdm if that is installed. Where `sys.stderr` is not a terminal
                there is none.

        Raises:
            ValueError: `chunksize` or `buffersize` is less than 1.
            TypeError: `buffersize` is not an integer, `progress` neither a bool nor a string.
            RuntimeError, BrokenExecutor: As `submit`.
        """
        return self._map(fn, iterables, False, timeout, chunksize, buffersize, ordered, cancel_running, progress)

    def starmap(
        self,
        fn: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        *,
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        ordered: bool = True,
        cancel_running: bool = False,
        progress: bool | str = False,
    ) -> Iterator[T]:
        """As `map`, except that each item of the one iterable has all the arguments of a call, as for
        `itertools.starmap`."""
        return self._map(fn, (iterable,), True, timeout, chunksize, buffersize, ordered, cancel_running, progress)

    def _map(
        self,
        fn: Callable[..., T],
        iterables: tuple[Iterable[Any], ...],
        is_starred: bool,
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
        ordered: bool,
        cancel_running: bool,
        progress: bool | str,
    ) -> Iterator[T]:
        chunksize, buffersize = check_sizes(chunksize, buffersize)
        from scaler_executor.mapping import start_map

        return start_map(
            self,
            fn,
            iterables,
            is_starred=is_starred,
            by_submit=getattr(self.submit, "__func__", None) is not ScalerExecutor.submit,
            timeout=timeout,
            chunksize=chunksize,
            buffersize=buffersize,
            ordered=ordered,
            cancel_running=cancel_running,
            progress=progress,
        )

    async def asubmit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call and await its result, in asyncio.

        It is submitted when this is first awaited, so inside of a task at once: `asyncio.gather`, task groups and
        `asyncio.timeout` do what they say. It is pickled in the loop's thread; where `submit` would wait since much is
        unsent, others have their turns. Cancelling the awaiting task stops the call as `ScalerFuture.cancel` does: the
        loop is not held up, and the task ends before the call has.

        Raises:
            asyncio.CancelledError: The task was cancelled; or the call, by `clear` say.
            BaseException: What the call raises, and what `submit` raises.
        """
        from scaler_executor.aio import submit

        return await submit(self, fn, args, kwargs, getattr(self.submit, "__func__", None) is not ScalerExecutor.submit)

    def amap(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any] | AsyncIterable[Any],
        chunksize: int = 1,
        buffersize: int | None = None,
        ordered: bool = True,
        progress: bool | str = False,
    ) -> AsyncMap[T]:
        """As `map`, for `async for`, of iterables of either kind, which are read while results are awaited.

        Nothing is submitted before the first result is asked for. An iterator that is left early, by `break`, by an
        exception, by a timeout or since its task was cancelled, stops all of its calls, those that run as well, as
        `ScalerFuture.cancel` does and without holding up the loop. One that somebody else still refers to is left by
        its `aclose()`.

        Args:
            fn: Called with one item of each iterable.
            iterables: Read in the loop's thread, a few milliseconds at a time, as far as `buffersize` allows.
            chunksize, buffersize, ordered, progress: As for `map`.

        Raises:
            ValueError, TypeError: As `map`.
        """
        chunksize, buffersize = check_sizes(chunksize, buffersize)
        from scaler_executor.aio import amap

        return amap(self, fn, iterables, chunksize=chunksize, buffersize=buffersize, ordered=ordered, progress=progress)

    def with_options(
        self,
        *,
        retries: int | Unchanged = UNCHANGED,
        timeout: float | Unchanged | None = UNCHANGED,
        priority: int | Unchanged = UNCHANGED,
        name: str | Unchanged | None = UNCHANGED,
        cancel_grace: float | Unchanged = UNCHANGED,
    ) -> ScalerExecutor:
        """Return a view of this executor: an executor with the same workers, whose calls have other options.

        It can be handed to whatever takes an `Executor`. `shutdown`, `with`, `clear` and `kill_workers` of a view are
        about the calls that were submitted through it, or through views of it; the executor and its other views go on.
        Shutting down the executor ends its views. A view keeps its executor alive, and ends it with itself if nobody
        else has it.

        Args:
            retries: How often a call is made again when its worker dies in it, or the machine or the scheduler that had
                it is lost, 0 to 1,000,000. It is then made at most `retries + 1` times; an exception, a cancel or a
                timeout is never retried.
            timeout: Seconds that a call, or an item of a map, may run, from its start; None for no limit. It is then
                stopped like a cancelled one and ends with TimeoutError. One that finishes first, in its `cancel_grace`
                at the latest, keeps its result.
            priority: Of the queued calls of this executor and its views those with the highest number start first, and
                among equals the oldest; but no call is overtaken for ever. -1,000,000 to 1,000,000, by default 0. It
                stops nothing that runs, and is nothing to other clients.
            name: What errors and `scaler-executor status` call the calls; None for the name of their function.
            cancel_grace: Seconds that a call has to unwind when it is stopped before its process group is killed.

        Raises:
            TypeError, ValueError: A value that cannot be; says which are possible.
        """
        terms = self._client.terms
        options, name = merge(
            terms.options,
            terms.name,
            retries=retries,
            timeout=timeout,
            priority=priority,
            new_name=name,
            cancel_grace=cancel_grace,
        )
        from scaler_executor.runtime.nesting_site import EXECUTORS

        # Not of the type of a subclass, whose `shutdown` say may end something that the executor still needs.
        view = ScalerExecutor.__new__(ScalerExecutor)
        view._start_method, view._max_workers = self._start_method, self._max_workers
        view._client = self._client.view(options, name, self)
        EXECUTORS[id(view)] = view
        return view

    def cancel(
        self,
        futures: Iterable[Future[Any]],
        timeout: float | DefaultTimeout | None = DEFAULT_TIMEOUT,
        *,
        force: bool = True,
    ) -> bool:
        """Cancel each future as `ScalerFuture.cancel` does, with one message and one wait for all. Return True."""
        from scaler_executor.future import cancel_all

        return cancel_all(futures, timeout, force=force)

    def clear(self) -> None:
        """Cancel all calls that are outstanding, by force, and wait as `ScalerFuture.cancel`. It stays usable.

        Of a view, see `with_options`: those that were submitted through it. Calls that have submitted others take those
        with them; what was submitted by calls that have ended by themselves runs on.
        """
        self._client.clear(DEFAULT_TIMEOUT)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As `Executor.shutdown`. `cancel_futures` takes back what has not started; what runs, completes.

        Of a view, see `with_options`: it takes no more calls, and what was submitted through it is waited for or taken
        back.
        """
        self._client.close()
        if cancel_futures:
            self._client.take_back_all(self._max_workers)
        if wait:
            self._client.join()

    def terminate_workers(self) -> None:
        """As `ProcessPoolExecutor.terminate_workers` of Python 3.14, except that it is the same as `kill_workers`."""
        self._client.kill_workers()

    def kill_workers(self) -> None:
        """Kill all workers at once and shut down without waiting.

        As `ProcessPoolExecutor.kill_workers` of Python 3.14: calls that run end with WorkerDiedError (a
        BrokenProcessPool), those that have not started are cancelled. Of a view, whose workers are others' as well: its
        calls are cancelled by force.
        """
        self._client.kill_workers()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """As `Executor.__exit__`; after a KeyboardInterrupt all calls are stopped, at a second one killed."""
        from scaler_executor.runtime.ending import wait_until_ended

        if getattr(self.shutdown, "__func__", None) is not ScalerExecutor.shutdown:
            # A subclass's, say, which has something of its own to end. It may submit calls still, unless all is over.
            if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
                self._client.close()
                wait_until_ended(self._client, interrupted=True)
            self.shutdown(wait=True)
        self._client.close()
        wait_until_ended(self._client, interrupted=exc_type is not None and issubclass(exc_type, KeyboardInterrupt))
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """As `__exit__`, without holding up the event loop. When the task is cancelled, all calls are stopped."""
        from scaler_executor.aio import leave

        await leave(self, exc_type)


#: What `_as_process_pool` has made.
_made: dict[tuple[type, type], type] = {}


def _as_process_pool(cls: type, pool: type) -> type:
    """Return what an executor says that its class is: one that is both."""
    for one, other in ((cls, pool), (pool, cls)):
        if issubclass(one, other):
            return one  # a class of ours has been put in the place of the standard library's, see `swap`
    made = _made.get((cls, pool))
    if made is None:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        made = _made[cls, pool] = type(cls.__name__, (cls, pool), names)
    return made


def _resolve_start_method(mp_context: BaseContext | None, max_tasks_per_child: int | None) -> str:
    if mp_context is not None:
        return mp_context.get_start_method(allow_none=False)
    if max_tasks_per_child is not None:
        return "spawn"
    context = sys.modules.get("multiprocessing.context")
    if context is not None:
        return context._default_context.get_start_method()  # type: ignore[no-any-return]
    # Nobody has imported multiprocessing, so nobody has chosen, and to import it takes longer than this: its default.
    if sys.platform.startswith("linux") and sys.version_info < (3, 14):
        return "fork"
    import multiprocessing

    return multiprocessing.get_start_method()
