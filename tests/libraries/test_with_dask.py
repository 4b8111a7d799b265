"""dask computes its graphs on an executor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError
from types import ModuleType
from typing import Any

import pytest
from calls import Record, Wrong, fail, sleep_long, square

from scaler_executor import ScalerExecutor, WorkerDiedError

Check = Callable[..., None]
Library = Callable[[str], ModuleType]


def test_dask_delayed(library: Library, check: Check, executor: ScalerExecutor) -> None:
    """`compute(scheduler=executor)`."""
    dask = library("dask")

    def run(executor: Any, wrap: Any) -> Any:
        parts = [dask.delayed(wrap(square))(number) for number in range(20)]
        return dask.delayed(sum)(parts).compute(scheduler=executor or "synchronous")

    check(run, run(None, lambda function: function))
    with pytest.raises(Wrong):
        run(executor, lambda _: fail)


def test_dask_array(library: Library, executor: ScalerExecutor, record: Record) -> None:
    """`dask.config.set(scheduler=executor)`, for a whole block."""
    array, dask = library("dask.array"), library("dask")
    import numpy as np

    whole = np.arange(10_000.0).reshape(100, 100)
    chunked = array.from_array(whole, chunks=(25, 25)).map_blocks(record.watched(np.sqrt), meta=whole[:0])
    with dask.config.set(scheduler=executor):
        found = (chunked @ chunked.T).sum(axis=0).compute()
    assert np.allclose(found, (np.sqrt(whole) @ np.sqrt(whole).T).sum(axis=0))
    assert record.pids() and os.getpid() not in record.pids()


def test_dask_fails_while_others_run(library: Library, executor: ScalerExecutor) -> None:
    """A worker that dies, or a call that takes too long, ends the computation; the executor goes on."""
    dask = library("dask")
    with pytest.raises(WorkerDiedError):
        dask.delayed(sum)([dask.delayed(os._exit)(1), dask.delayed(square)(2)]).compute(scheduler=executor)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        dask.delayed(sleep_long)().compute(scheduler=executor.with_options(timeout=0.5))
    assert time.monotonic() - start < 60
    assert dask.delayed(square)(3).compute(scheduler=executor) == 9
