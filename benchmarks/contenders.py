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

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Any:
        return self._client.gather(self._client.map(function, list(items), pure=False))

    def __enter__(self) -> "_Dask":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.shutdown()


class _Ray:
    """ray as an executor: a remote function for each that is called."""

    def __init__(self, workers: int) -> None:
        ray: Any = importlib.import_module("ray")
        self._ray = ray
        ray.init(num_cpus=workers, include_dashboard=False, logging_level="ERROR")
        self._call = ray.remote(lambda function, *args: function(*args))

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        return _RayResult(self._ray, self._call.remote(function, *args))

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Any:
        return self._ray.get([self._call.remote(function, item) for item in items])

    def __enter__(self) -> "_Ray":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()


class _RayResult:
    """A reference of ray as a future."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def result(self, timeout: float | None = None) -> Any:
        return self._ray.get(self._reference, timeout=timeout)


def _loky(workers: int) -> Any:
    return importlib.import_module("loky").ProcessPoolExecutor(workers)


def _peer(start_method: str) -> Contender:
    made = f"ProcessPoolExecutor({{workers}}, multiprocessing.get_context({start_method!r}))"
    return Contender(
        lambda workers: ProcessPoolExecutor(workers, multiprocessing.get_context(start_method)),
        _COLD_START.format(
            imports="import multiprocessing; from concurrent.futures import ProcessPoolExecutor", executor=made
        ),
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
    ),
    FORK: _peer("fork"),
    SPAWN: _peer("spawn"),
}

_THREADS = Contender(
    ThreadPoolExecutor,
    _COLD_START.format(
        imports="from concurrent.futures import ThreadPoolExecutor", executor="ThreadPoolExecutor({workers})"
    ),
)
_STANDARD = {"ThreadPool": _THREADS, "multiprocessing.Pool": _here("_Pool", maps_fast=True)}
#: {name: (module, contender)}
_LIBRARIES = {
    "loky": ("loky", _here("_loky")),
    "pebble": ("pebble", _here("_Pebble")),
    "mpire": ("mpire", _here("_Mpire")),
    "dask.distributed": ("distributed", _here("_Dask")),
    "ray": ("ray", _here("_Ray")),
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
    """Return {module: version} of what is compared."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("scaler-executor", *(module for module, _ in _LIBRARIES.values())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
