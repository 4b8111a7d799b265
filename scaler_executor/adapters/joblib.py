"""joblib's backend "scaler": importing this module registers it.

    import scaler_executor.adapters.joblib
    from joblib import parallel_config

    with parallel_config("scaler"):
        search.fit(data, target)

Unlike with joblib's own backends, calls that an error, a timeout, Ctrl-C or a generator that is no longer wanted leaves
behind are stopped before `Parallel` returns, and the workers are there for the next one. This module knows joblib and
the public names of `scaler_executor` only.

What is batched, and when, is up to joblib, as for its backend "loky"; so is what `Parallel` within a call does: it
uses threads, and within these nothing.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import get_context
from typing import Any, Final
from weakref import WeakKeyDictionary

from joblib import cpu_count, register_parallel_backend
from joblib.parallel import AutoBatchingMixin, FallbackToBackend, ParallelBackendBase, SequentialBackend

from scaler_executor import ScalerExecutor

#: So long the workers that a backend has started outlive its last use.
IDLE_S: Final = 300.0


class ScalerBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs joblib's calls in the workers of a ScalerExecutor.

    Args:
        executor: Whose workers are used, and which is not shut down; of a view, with its options. None for one of as
            many workers as jobs, which the next `Parallel` takes over; where SCALER_EXECUTOR_ADDRESS is set, for the
            cluster that it names.
        nesting_level, inner_max_num_threads: As for joblib's own backends. The second not with an `executor`.
    """

    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(self, executor: ScalerExecutor | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._executor = executor
        self.supports_inner_max_num_threads = executor is None
        #: Of each Parallel: one that is collected late, as a generator may be, is aborted while the next one runs.
        self._calls: WeakKeyDictionary[Any, _Calls] = WeakKeyDictionary()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many calls run at once. None: as many as there are workers, as -1."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        executor = self._executor
        if executor is None and _is_served():
            executor = _kept.take(None, self.inner_max_num_threads)
        workers = cpu_count() if executor is None else executor.max_workers
        if n_jobs is None or n_jobs < 0:
            return int(max(1, workers + 1 + (-1 if n_jobs is None else n_jobs)))
        return n_jobs if executor is None else min(n_jobs, workers)

    def configure(self, n_jobs: int | None = 1, parallel: Any = None, **options: Any) -> int:
        """Be ready for the calls of a Parallel. What only concerns joblib's own ways to large arrays has no effect."""
        jobs = self.effective_n_jobs(n_jobs)
        if jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        executor = self._executor or _kept.take(None if _is_served() else jobs, self.inner_max_num_threads)
        self._calls[parallel] = _Calls(executor.with_options(), jobs)
        return jobs

    def submit(self, func: Callable[[], Any], callback: Any = None) -> None:
        """Have a batch run, and `callback` called with its future."""
        self._calls[callback.parallel].submit(func, callback)

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """Return the results of a batch that is done."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Stop the calls of the Parallel that says so, and return when they have stopped."""
        for parallel, calls in list(self._calls.items()):
            if parallel._aborting:
                calls.stop()

    def terminate(self) -> None:
        """Be ready for other calls. The workers stay for a while."""
        self.reset_batch_stats()
        _kept.let_go_later()


class _Calls:
    """The calls of one Parallel: at most `jobs` at once, however many workers there are."""

    def __init__(self, view: ScalerExecutor, jobs: int) -> None:
        self._view = view
        #: What may still be submitted at once.
        self._room = jobs
        self._has_all = view.max_workers <= jobs
        self._waiting: deque[tuple[Callable[[], Any], Callable[[Future[Any]], object]]] = deque()
        #: How often they have been stopped. What was submitted before that is of no interest: joblib, which may have
        #: begun anew by then, would take it for a failure of the new calls.
        self._stops = 0
        self._lock = threading.Lock()

    def submit(self, batch: Callable[[], Any], callback: Callable[[Future[Any]], object]) -> None:
        if self._has_all:
            self._submit(batch, callback)
            return
        # So the rest waits here.
        with self._lock:
            self._waiting.append((batch, callback))
        self._fill()

    def stop(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._stops += 1
        try:
            self._view.clear()
        except RuntimeError:
            pass  # they have stopped with it: that is why

    def _fill(self) -> None:
        while True:
            with self._lock:
                if not self._room or not self._waiting:
                    return
                self._room -= 1
                batch, callback = self._waiting.popleft()
            self._submit(batch, callback)

    def _submit(self, batch: Callable[[], Any], callback: Callable[[Future[Any]], object]) -> None:
        stops = self._stops
        future: Future[Any]
        try:
            future = self._view.submit(run_batch, batch)
        except Exception as error:
            # joblib submits in the thread of a callback, too, where nobody would see it and everybody would wait.
            if isinstance(error, RuntimeError):
                _kept.drop()  # if it is this one, it takes no more
            with self._lock:
                self._waiting.clear()  # the first error ends it all
            future = Future()
            future.set_exception(error)

        def settled(future: Future[Any]) -> None:
            if stops == self._stops:
                callback(future)
            if not self._has_all:
                with self._lock:
                    self._room += 1
                self._fill()

        future.add_done_callback(settled)


def run_batch(batch: Callable[[], Any]) -> Any:
    """Make the calls of a batch, in a worker."""
    return batch()


class _Kept:
    """The executor that backends without one use, one after the other.

    Its workers start from a fresh interpreter: a fork of a process that has used OpenMP, as scikit-learn does, hangs
    when it uses it again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ScalerExecutor | None = None
        self._key: tuple[object, ...] = ()
        self._timer: threading.Timer | None = None

    def take(self, workers: int | None, threads: int | None) -> ScalerExecutor:
        """Return an executor with so many workers, and so many threads for BLAS and OpenMP in each."""
        # One of another process, of which this is a fork, cannot be used.
        key = (os.getpid(), workers, threads, os.environ.get("SCALER_EXECUTOR_ADDRESS"))
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._executor is None or self._key != key:
                # Another one ends when nobody uses it any more.
                initializer = None if threads is None else _limiting(threads)
                self._executor = ScalerExecutor(workers, get_context("spawn"), initializer)
                self._key = key
            return self._executor

    def let_go_later(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._executor is not None:
                self._timer = threading.Timer(IDLE_S, self.drop)
                self._timer.daemon = True
                self._timer.start()

    def drop(self) -> None:
        """Keep it no longer: it ends when nobody uses it any more."""
        with self._lock:
            self._executor = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None


def _is_served() -> bool:
    return bool(os.environ.get("SCALER_EXECUTOR_ADDRESS"))


def _limiting(threads: int) -> Callable[[], None]:
    variables = dict.fromkeys(ParallelBackendBase.MAX_NUM_THREADS_VARS, str(threads))

    # Local, and therefore sent by value: to import this module would load the libraries before they are told.
    def limit() -> None:
        import os

        os.environ.update(variables)

    return limit


_kept: Final = _Kept()
register_parallel_backend("scaler", ScalerBackend)
