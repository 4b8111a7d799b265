"""Finds the tests of concurrent.futures that come with the running interpreter.

It knows where each version of CPython keeps them: in one module at first, in a package from 3.12 on. It does not know
what is done with them.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

_TESTS = "test.test_concurrent_futures"

#: {class: its module in the package}.
_MODULES = {
    "ProcessPoolExecutorTest": "test_process_pool",
    "WaitTests": "test_wait",
    "AsCompletedTests": "test_as_completed",
    "ProcessPoolShutdownTest": "test_shutdown",
    "InitializerMixin": "test_init",
    "FailingInitializerMixin": "test_init",
    "ExecutorDeadlockTest": "test_deadlock",
    "FutureTests": "test_future",
    "BaseTestCase": "util",
    "ProcessPoolForkMixin": "util",
    "ProcessPoolSpawnMixin": "util",
    "ProcessPoolForkserverMixin": "util",
}


def find_module(class_name: str) -> ModuleType:
    """Return the module of a class of CPython's tests.

    Raises:
        ImportError: The interpreter was installed without its tests.
    """
    tests = importlib.import_module(_TESTS)
    return importlib.import_module(f"{_TESTS}.{_MODULES[class_name]}") if hasattr(tests, "__path__") else tests


def find_class(class_name: str) -> Any:
    """Return a class of CPython's tests. Raises as `find_module`."""
    return getattr(find_module(class_name), class_name)
