"""Fixtures of the tests with other people's libraries: an executor as a user makes it, and a record of who called what.

Each test skips, saying so, where its library is not installed; the extra `libraries` has all of them. A library's own
warnings are its own affair.
"""

from __future__ import annotations

import gc
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from calls import Record

from scaler_executor import ScalerExecutor

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"))
            item.add_marker(pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"))


@pytest.fixture
def library() -> Callable[[str], ModuleType]:
    """Imports a library, or skips the test."""

    def load(name: str) -> ModuleType:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytest.importorskip(name, reason=f"needs {name.partition('.')[0]}, of the extra libraries")  # type: ignore[no-any-return]

    return load


@pytest.fixture
def executor() -> Iterator[ScalerExecutor]:
    """An executor with two workers. When it is shut down, no process is left."""
    before = _children()
    executor = ScalerExecutor(2)
    yield executor
    executor.clear()
    executor.shutdown()
    del executor
    gc.collect()
    assert not _children() - before


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A record of the processes that have made calls, and of what is to happen once."""
    return Record(str(tmp_path))


@pytest.fixture
def check(executor: ScalerExecutor, record: Record) -> Callable[..., None]:
    """See `Check`."""

    def check(
        run: Callable[[Any, Any], Any], serial: Any, *, is_equal: Callable[[Any, Any], bool] | None = None
    ) -> None:
        """Have a library run on the executor, plainly and with a worker that is killed on the way, and compare.

        Args:
            run: Called with an executor and a function to wrap what is called in workers with; returns what it found.
            serial: What the library finds without an executor.
            is_equal: How that is compared.
        """
        same = is_equal or (lambda ours, theirs: bool(ours == theirs))
        assert same(run(executor, record.watched), serial)
        pids = record.pids()
        assert pids and os.getpid() not in pids
        with executor.with_options(retries=2) as view:
            assert same(run(view, record.deadly), serial)
        assert record.has_died()

    return check


def _children() -> set[str]:
    """Return the children of this process, without those of joblib's own backend, which stay."""
    children: set[str] = set()
    for thread in os.listdir("/proc/self/task"):
        children |= set(Path(f"/proc/self/task/{thread}/children").read_text().split())
    return {pid for pid in children if not re.search("loky|resource_tracker", _command(pid))}


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
