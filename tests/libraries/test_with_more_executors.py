"""more-executors, which puts its layers over an executor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from calls import Record, sleep_long, square

from scaler_executor import ScalerExecutor

Library = Callable[[str], ModuleType]


@pytest.fixture
def layers(library: Library) -> Any:
    return library("more_executors").Executors


def fail_twice(directory: str) -> int:
    for name in ("first", "second"):
        try:
            Path(directory, name).touch(exist_ok=False)
        except FileExistsError:
            continue
        if name == "first":
            os._exit(1)
        raise OSError("try again")
    return os.getpid()


def test_retry_and_map(layers: Any, executor: ScalerExecutor, tmp_path: Path) -> None:
    """A call is made again after the death of its worker and after an exception."""
    layered = layers.with_map(layers.with_retry(executor, max_attempts=4, sleep=0.01), lambda pid: -pid)
    assert layered.submit(fail_twice, str(tmp_path)).result(60) not in (0, -os.getpid())
    layered.shutdown()


def test_timeout_stops_the_call(layers: Any, executor: ScalerExecutor, record: Record) -> None:
    """A call that takes too long is cancelled, and stops: its worker is free for the next."""
    assert list(executor.map(square, range(9)))  # the workers are there
    limited = layers.with_timeout(executor, 1)
    for future in [limited.submit(record.watched(sleep_long)) for _ in range(2)]:
        with pytest.raises(CancelledError):
            future.result(60)
    assert executor.submit(square, 3).result(60) == 9
    limited.shutdown()
    assert not record.running()


def test_throttle_and_cancel_on_shutdown(layers: Any, executor: ScalerExecutor, record: Record) -> None:
    """No more at once than the throttle lets through; what runs at the shutdown is stopped."""
    throttled = layers.with_cancel_on_shutdown(layers.with_throttle(executor, 1))
    assert [throttled.submit(square, number).result(60) for number in range(5)] == [0, 1, 4, 9, 16]
    future = throttled.submit(record.watched(sleep_long))
    started = threading.Event()
    while not record.pids():
        started.wait(0.01)
    throttled.shutdown()
    assert future.cancelled()
