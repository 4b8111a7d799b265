"""Marks CPython's tests that are expected to fail."""

from __future__ import annotations

import resource

import pytest
from expected import FAILING, SKIPPED, find

# The crashes that the tests provoke are nobody's to debug.
resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Apply `expected`."""
    for item in items:
        test_class = getattr(item, "cls", None)
        if not hasattr(test_class, "cpython_class"):
            continue
        names = test_class.__name__, test_class.cpython_class, item.name
        reason = find(SKIPPED, *names)
        failure = find(FAILING, *names)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif failure is not None:
            error, reason = failure
            item.add_marker(pytest.mark.xfail(strict=True, raises=error, reason=reason))
