"""A drop-in `concurrent.futures.Executor` over worker processes whose `cancel()` stops running code.

    from scaler_executor import ScalerExecutor

    with ScalerExecutor() as executor:
        future = executor.submit(pow, 2, 10)
        print(future.result())

Where things run:

    user's process               serve process                      this machine's workers
    +--------------------+      +-----------------------------+
    | ScalerExecutor     |      | scheduler (routes tasks,    |
    |  client I/O thread |<---->|   makes attempts)           |  calls: pair, results: pipe
    |  callback thread   |  1   |   ^ in-process link         |<----------------> worker 1 (runs user code)
    +--------------------+      |   v                         |<----------------> worker 2
                                | agent (owns the workers)    |     pair
                                +-----------------------------+<----------------> forker (forks, reaps, stops)

    1  a pair of connected sockets that the serve process inherits; nothing listens

A cluster of several machines has the same parts. `scaler-executor serve` is scheduler and agent in one process
(`runtime.host`), `serve --join` an agent alone (`runtime.agent_host`); an executor reaches them through a process of
its own, the relay (`runtime.relay`), which stands where its serve process would. Between machines there are sessions
(`protocol.link`) over zmq with CURVE (`runtime.network`).

`submit` pickles the call in the caller's thread and leaves it to the I/O thread (`runtime.client`), which speaks to the
scheduler for every future. What a message means is decided in `protocol`, which does no I/O; `runtime` does the I/O.
Read `protocol.messages`, the table in `protocol.scheduler_tasks`, `future`, and then any file of `runtime`.

Every public name is imported on first use, so that importing the package alone costs next to nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module

if sys.platform in ("win32", "emscripten", "wasi"):
    raise ImportError(
        f"scaler-executor runs on Linux and not on {sys.platform!r}: it needs forks, signals and descriptors that are "
        "passed between processes. On Windows, use it in the Windows Subsystem for Linux (WSL); where that cannot be, "
        "concurrent.futures.ProcessPoolExecutor has the same interface."
    )

TYPE_CHECKING = False  # not from `typing`, whose import would cost more than all of this
if TYPE_CHECKING:
    from typing import Any

    from scaler_executor.errors import AuthenticationError as AuthenticationError
    from scaler_executor.errors import RemoteError as RemoteError
    from scaler_executor.errors import ResultTooLargeError as ResultTooLargeError
    from scaler_executor.errors import SchedulerLostError as SchedulerLostError
    from scaler_executor.errors import TaskInterrupted as TaskInterrupted
    from scaler_executor.errors import TaskTooLargeError as TaskTooLargeError
    from scaler_executor.errors import VersionMismatchError as VersionMismatchError
    from scaler_executor.errors import WorkerDiedError as WorkerDiedError
    from scaler_executor.errors import WorkerStartError as WorkerStartError
    from scaler_executor.executor import ScalerExecutor as ScalerExecutor
    from scaler_executor.future import CancelOutcome as CancelOutcome
    from scaler_executor.future import ScalerFuture as ScalerFuture

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "CancelOutcome",
    "RemoteError",
    "ResultTooLargeError",
    "ScalerExecutor",
    "ScalerFuture",
    "SchedulerLostError",
    "TaskInterrupted",
    "TaskTooLargeError",
    "VersionMismatchError",
    "WorkerDiedError",
    "WorkerStartError",
]

_HOMES = {
    "AuthenticationError": "scaler_executor.errors",
    "CancelOutcome": "scaler_executor.future",
    "RemoteError": "scaler_executor.errors",
    "ResultTooLargeError": "scaler_executor.errors",
    "ScalerExecutor": "scaler_executor.executor",
    "ScalerFuture": "scaler_executor.future",
    "SchedulerLostError": "scaler_executor.errors",
    "TaskInterrupted": "scaler_executor.errors",
    "TaskTooLargeError": "scaler_executor.errors",
    "VersionMismatchError": "scaler_executor.errors",
    "WorkerDiedError": "scaler_executor.errors",
    "WorkerStartError": "scaler_executor.errors",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
