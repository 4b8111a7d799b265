"""CPython's own tests of concurrent.futures, run against ScalerExecutor with each start method.

They come from the interpreter's `test` package. What ScalerExecutor does otherwise, and why, is in `expected`.
"""

from __future__ import annotations

import logging
import multiprocessing.util
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cpython
import pytest
from expected import FAILING, find

import scaler_executor
from scaler_executor import ScalerExecutor
from scaler_executor.future import ScalerFuture

try:
    cpython.find_module("BaseTestCase")
except ImportError as error:
    pytest.skip(f"this interpreter was installed without CPython's tests: {error}", allow_module_level=True)

from test import support
from test.support import threading_helper

DEADLINE_S = 10.0

_START_METHODS = ("Fork", "Spawn", "Forkserver")
_MIXINS = (
    "ProcessPoolExecutorTest",
    "WaitTests",
    "AsCompletedTests",
    "ProcessPoolShutdownTest",
    "InitializerMixin",
    "FailingInitializerMixin",
    "ExecutorDeadlockTest",
)
#: Scripts find the executor where CPython's tests import theirs from; one of these forgets to import multiprocessing.
_PROLOGUE = f"""
import sys; sys.path.insert(0, {str(Path(scaler_executor.__file__).parent.parent)!r})
import concurrent.futures, multiprocessing, scaler_executor
concurrent.futures.ScalerExecutor = scaler_executor.ScalerExecutor
"""

#: Ends the servers of multiprocessing.
tearDownModule = multiprocessing.util._cleanup_tests


def _patch(test: Any, patcher: Any) -> None:
    """Patch until the end of a test."""
    patcher.start()
    test.addCleanup(patcher.stop)


class _CleanUp:
    """Checks that no thread and no child is left of a test. CPython's runner only warns of them."""

    cpython_class: str

    def setUp(self) -> None:
        # CPython's own check counts a thread that has ended as left while anything refers to it, such as the traceback
        # of a failure, up to 3.10; and it takes long to say so.
        _patch(self, patch.object(threading_helper, "threading_cleanup", lambda *before: None))
        self._threads = set(threading.enumerate())
        self._made: weakref.WeakSet[ScalerExecutor] = weakref.WeakSet()
        make = ScalerExecutor.__init__

        def make_and_note(executor: ScalerExecutor, *args: Any, **kwargs: Any) -> None:
            make(executor, *args, **kwargs)
            self._made.add(executor)

        _patch(self, patch.object(ScalerExecutor, "__init__", make_and_note))
        support.environment_altered = False
        super().setUp()  # type: ignore[misc]

    def tearDown(self) -> None:
        test = self.id().rpartition(".")[2]  # type: ignore[attr-defined]
        if find(FAILING, type(self).__name__, self.cpython_class, test):
            # It has stopped half way, maybe with calls that wait for ever.
            for executor in list(self._made):
                executor.clear()
                executor.shutdown()
        super().tearDown()  # type: ignore[misc]
        left = set(threading.enumerate()) - self._threads
        if left:
            support.gc_collect()
        for thread in left:
            thread.join(DEADLINE_S)
        assert not [thread for thread in left if thread.is_alive()]
        assert not support.environment_altered, "children are left, see stderr"


class _Scripts:
    """Lets the scripts that a test starts use ScalerExecutor."""

    def setUp(self) -> None:
        module = cpython.find_module("ProcessPoolShutdownTest")
        run = module.assert_python_ok

        def run_with_prologue(option: str, script: str) -> Any:
            return run(option, _PROLOGUE + script)

        _patch(self, patch.object(module, "assert_python_ok", run_with_prologue))
        super().setUp()  # type: ignore[misc]


def _make_tests(mixin: str, start_method: str) -> type:
    bases = (
        *((_Scripts,) if mixin == "ProcessPoolShutdownTest" else ()),
        _CleanUp,
        cpython.find_class(mixin),
        cpython.find_class(f"ProcessPool{start_method}Mixin"),
        cpython.find_class("BaseTestCase"),
    )
    # Calls may refer to the class by its name, so it has to be one of this module.
    fields = {"__module__": __name__, "executor_type": ScalerExecutor, "cpython_class": mixin}
    return type(start_method + mixin, bases, fields)


for _mixin in _MIXINS:
    for _start_method in _START_METHODS:
        globals()[_start_method + _mixin] = _make_tests(_mixin, _start_method)


def _make_future(state: str = "PENDING", exception: BaseException | None = None, result: object = None) -> Future[Any]:
    """Make a future as CPython's `create_future` does, by its public methods."""
    future: Future[Any] = ScalerFuture()
    if state.startswith("CANCELLED"):
        future.cancel()
    elif state != "PENDING":
        future.set_running_or_notify_cancel()
        if exception is not None:
            future.set_exception(exception)
        elif state == "FINISHED":
            future.set_result(result)
    return future


class Futures(_CleanUp, cpython.find_class("FutureTests")):  # type: ignore[misc]
    """The tests of futures that belong to no executor."""

    cpython_class = "FutureTests"

    def setUp(self) -> None:
        futures = {
            "Future": ScalerFuture,
            "create_future": _make_future,
            "PENDING_FUTURE": _make_future(),
            "RUNNING_FUTURE": _make_future("RUNNING"),
            "CANCELLED_FUTURE": _make_future("CANCELLED"),
            "CANCELLED_AND_NOTIFIED_FUTURE": _make_future("CANCELLED_AND_NOTIFIED"),
            "EXCEPTION_FUTURE": _make_future("FINISHED", exception=OSError()),
            "SUCCESSFUL_FUTURE": _make_future("FINISHED", result=42),
        }
        _patch(self, patch.multiple(cpython.find_module("FutureTests"), **futures))
        # What logging does where nobody has set up anything; under pytest somebody has.
        logger = logging.getLogger("concurrent.futures")
        logger.addHandler(logging.lastResort)
        self.addCleanup(logger.removeHandler, logging.lastResort)
        super().setUp()
