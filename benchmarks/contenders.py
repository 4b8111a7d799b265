"""What is compared: an executor of each library, and the program that a cold start runs.

A library that is not installed is left out, and named. Each is used with its default arguments; where it has no
`submit` or `map` of an Executor, its own way to do the same stands in for them.
"""

import importlib
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from scaler_executor import ScalerExecutor

OURS = "ScalerExecutor"
FORK = "ProcessPool fork"
SPAWN = "ProcessPool spawn"


@dataclass(frozen=True)
class Contender:
    """An executor to measure, and the program that a cold start runs."""

    make: Callable[[int], Any]
    cold_start_program: str
    #: Its map is no slower than ours, so that it can be measured with as many items.
    maps_fast: bool = False
    #: It runs calls in this process: what they return has not been copied, and what they break is broken here.
    in_process: bool = False
    #: Cancels queued calls, given executor and futures; None where nothing can.
    cancel: Callable[[Any, list[Any]], object] | None = None
    #: As above, calls that run.
    stop: Callable[[Any, list[Any]], object] | None = None


def _cancel_each(executor: Any, futures: list[Any]) -> None:
    for future in futures:
        future.cancel()


def _cancel_all(executor: Any, futures: list[Any]) -> None:
    executor.cancel(futures)


def _cancel_confirmed(executor: ScalerExecutor, futures: list[Any]) -> None:
    executor.cancel(futures, timeout=None)


def _stop_all(executor: Any, futures: list[Any]) -> None:
    executor.stop(futures)


_COLD_START = """
{imports}
with {executor} as executor:
    assert executor.submit(abs, -1).result() == 1
"""
_HERE = "import contenders"


class _Pool:
    """multiprocessing.Pool as an executor."""

    def __init__(self, workers: int) -> None:
        self._pool = multiprocessing.get_context("fork").Pool(workers)

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return _Result(self._pool.apply_async(function, args))

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        return self._pool.map(function, items)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()
        self._pool.join()


class _Result:
    """What stands for a future."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def result(self, timeout: float | None = None) -> Any:
        return self._result.get(timeout)


class _Mpire:
    """mpire.WorkerPool as an executor."""

    def __init__(self, workers: int) -> None:
        self._pool: Any = importlib.import_module("mpire").WorkerPool(workers)

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return _Result(self._pool.apply_async(function, args))

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Any:
        return self._pool.map(function, items)

    def __enter__(self) -> "_Mpire":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()


class _Pebble:
    """pebble.ProcessPool as an executor."""

    def __init__(self, workers: int) -> None:
        self._pool: Any = importlib.import_module("pebble").ProcessPool(workers)

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._pool.schedule(function, args=args)

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        return iter(self._pool.map(function, items).result())

    def __enter__(self) -> "_Pebble":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()
        self._pool.join()


class _Dask:
    """dask.distributed as an executor, with a cluster of processes of one thread."""

    def __init__(self, workers: int) -> None:
        client: Any = importlib.import_module("dask.distributed").Client
        self._client = client(n_workers=workers, threads_per_worker=1, dashboard_address=None)

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._client.submit(function, *args, pure=False)

    def cancel(self, futures: list[Any]) -> None:
        self._client.cancel(futures)

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Any:
        return self._client.gather(self._client.map(function, list(items), pure=False))

    def __enter__(self) -> "_Dask":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.shutdown()

    def __reduce__(self) -> Any:
        return _DaskInside, ()


class _DaskInside:
    """The same, inside a call, which gives its place away before it waits for another one."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        distributed: Any = importlib.import_module("dask.distributed")
        distributed.secede()
        return distributed.get_client().submit(function, *args, pure=False)


class _Ray:
    """ray as an executor: a remote function for each that is called."""

    def __init__(self, workers: int) -> None:
        ray: Any = importlib.import_module("ray")
        self._ray = ray
        ray.init(num_cpus=workers, include_dashboard=False, logging_level="ERROR")
        self._call = ray.remote(lambda function, *args: function(*args))

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return _RayResult(self._ray, self._call.remote(function, *args))

    def cancel(self, futures: list[Any], force: bool = False) -> None:
        for future in futures:
            self._ray.cancel(future.reference, force=force)

    def stop(self, futures: list[Any]) -> None:
        self.cancel(futures, force=True)

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Any:
        return self._ray.get([self._call.remote(function, item) for item in items])

    def __enter__(self) -> "_Ray":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()


class _RayResult:
    """A reference of ray as a future."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self.reference = ray, reference

    def result(self, timeout: float | None = None) -> Any:
        return self._ray.get(self.reference, timeout=timeout)

    def cancelled(self) -> bool:
        try:
            self.result(timeout=10)
        except (self._ray.exceptions.TaskCancelledError, self._ray.exceptions.WorkerCrashedError):
            return True  # the second where the call was running
        except self._ray.exceptions.GetTimeoutError:
            pass
        return False


def _loky(workers: int) -> Any:
    return importlib.import_module("loky").ProcessPoolExecutor(workers)


def _peer(start_method: str) -> Contender:
    made = f"ProcessPoolExecutor({{workers}}, multiprocessing.get_context({start_method!r}))"
    return Contender(
        lambda workers: ProcessPoolExecutor(workers, multiprocessing.get_context(start_method)),
        _COLD_START.format(
            imports="import multiprocessing; from concurrent.futures import ProcessPoolExecutor", executor=made
        ),
        cancel=_cancel_each,
    )


def _here(name: str, **settings: Any) -> Contender:
    """Return a contender that stands in this file."""
    program = _COLD_START.format(imports=_HERE, executor=f"contenders.{name}({{workers}})")
    return Contender(globals()[name], program, **settings)


#: Those that are measured unless all are asked for.
CONTENDERS = {
    OURS: Contender(
        lambda workers: ScalerExecutor(workers),
        _COLD_START.format(imports="from scaler_executor import ScalerExecutor", executor="ScalerExecutor({workers})"),
        maps_fast=True,
        cancel=_cancel_confirmed,
        stop=_cancel_confirmed,
    ),
    FORK: _peer("fork"),
    SPAWN: _peer("spawn"),
}

_THREADS = Contender(
    ThreadPoolExecutor,
    _COLD_START.format(
        imports="from concurrent.futures import ThreadPoolExecutor", executor="ThreadPoolExecutor({workers})"
    ),
    in_process=True,
    cancel=_cancel_each,
)
_STANDARD = {"ThreadPool": _THREADS, "multiprocessing.Pool": _here("_Pool", maps_fast=True)}
#: {name: (module, contender)}
_LIBRARIES = {
    "loky": ("loky", _here("_loky", cancel=_cancel_each)),
    "pebble": ("pebble", _here("_Pebble", cancel=_cancel_each, stop=_cancel_each)),
    "mpire": ("mpire", _here("_Mpire")),
    "dask.distributed": ("distributed", _here("_Dask", cancel=_cancel_all)),
    "ray": ("ray", _here("_Ray", cancel=_cancel_all, stop=_stop_all)),
}


def all_contenders() -> tuple[dict[str, Contender], list[str]]:
    """Return everything that can be measured here, and the names of what is not installed."""
    found = {**CONTENDERS, **_STANDARD}
    missing = []
    for name, (module, contender) in _LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            missing.append(name)
        else:
            found[name] = contender
    return found, missing


def versions() -> dict[str, str]:
    """Return {package: version} of what is compared, and of numpy."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("scaler-executor", *(module for module, _ in _LIBRARIES.values()), "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
