"""The tests of CPython that ScalerExecutor is not to pass, each with the reason. It has to pass all others.

Names are `<class>.<test>` as in CPython, for all start methods, or as in `test_cpython`, for one of them.
"""

from __future__ import annotations

from pickle import UnpicklingError
from typing import TypeVar

T = TypeVar("T")

_PRIVATE = "uses a private attribute of ProcessPoolExecutor: "
_OTHER = "makes a ProcessPoolExecutor of its own and uses its private attributes"
_CLASS_NAME = "expects the name of a class of the standard library: "
_ONE_CALL = (
    "expects that a value which does not unpickle breaks the pool; here its own error is set on this future, and"
    " workers and other calls go on"
)

#: {test: (what it fails with, why)}. They are run and have to fail with just this.
FAILING: dict[str, tuple[type[BaseException], str]] = {
    # Private attributes
    "ProcessPoolExecutorTest.test_idle_process_reuse_multiple": (AttributeError, f"{_PRIVATE}_processes"),
    "ProcessPoolExecutorTest.test_idle_process_reuse_one": (AttributeError, f"{_PRIVATE}_processes"),
    "ProcessPoolExecutorTest.test_killed_child": (AttributeError, f"{_PRIVATE}_processes"),
    "SpawnProcessPoolExecutorTest.test_max_tasks_per_child": (AttributeError, f"{_PRIVATE}_processes"),
    "ForkserverProcessPoolExecutorTest.test_max_tasks_per_child": (AttributeError, f"{_PRIVATE}_processes"),
    "ProcessPoolExecutorTest.test_saturation": (AttributeError, f"{_PRIVATE}_processes"),
    "ProcessPoolShutdownTest.test_processes_terminate": (AttributeError, f"{_PRIVATE}_processes"),
    "FailingInitializerMixin.test_initializer": (AttributeError, f"{_PRIVATE}_broken"),
    "ExecutorDeadlockTest.test_shutdown_deadlock_pickle": (AttributeError, f"{_PRIVATE}_executor_manager_thread"),
    "FutureTests.test_exception_with_success": (AssertionError, "sets private attributes of a future"),
    # Names of classes
    "ProcessPoolExecutorTest.test_traceback": (AssertionError, f"{_CLASS_NAME}_RemoteTraceback"),
    "FutureTests.test_repr": (AssertionError, f"{_CLASS_NAME}Future"),
    "FutureTests.test_multiple_set_exception": (AssertionError, f"{_CLASS_NAME}Future, in an error's text"),
    "FutureTests.test_multiple_set_result": (AssertionError, f"{_CLASS_NAME}Future, in an error's text"),
    # cancel()
    "FutureTests.test_cancel": (AssertionError, "expects cancel() to return False"),
    # One call's failure is nobody else's
    "ExecutorDeadlockTest.test_error_at_task_unpickle": (UnpicklingError, _ONE_CALL),
    "ExecutorDeadlockTest.test_exit_at_task_unpickle": (SystemExit, _ONE_CALL),
    "ExecutorDeadlockTest.test_error_during_result_unpickle_in_result_handler": (UnpicklingError, _ONE_CALL),
    "ExecutorDeadlockTest.test_exit_during_result_unpickle_in_result_handler": (SystemExit, _ONE_CALL),
    # Parts of ProcessPoolExecutor that there are none of here
    "ProcessPoolExecutorTest.test_python_finalization_error": (
        TypeError,
        "lets ProcessPoolExecutor's second thread fail to start; here is no second one, so the call itself is reached,"
        " and it has an argument too few",
    ),
}

#: {test: why}. They are not run.
SKIPPED: dict[str, str] = {
    "ProcessPoolShutdownTest.test_context_manager_shutdown": _OTHER,
    "ProcessPoolShutdownTest.test_del_shutdown": _OTHER,
    "ProcessPoolShutdownTest.test_shutdown_no_wait": _OTHER,
}


def find(entries: dict[str, T], test_class: str, cpython_class: str, test: str) -> T | None:
    """Return what one of the two dictionaries says of a test, None if it is to pass."""
    return entries.get(f"{cpython_class}.{test}") or entries.get(f"{test_class}.{test}")
