"""Fixtures of the tests with real processes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import forked
import pytest

from scaler_executor.runtime import platform


@pytest.fixture
def clean() -> Iterator[None]:
    """Check that a test leaves no descriptor open and no child behind."""
    platform.prepare()
    gc.collect()  # what earlier tests have left to it
    before = forked.open_fds()
    yield
    assert forked.open_fds() == before
    # The resource tracker of multiprocessing is one per process, and stays.
    tracker = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    assert forked.children() - {getattr(tracker, "_pid", None)} == set()


@pytest.fixture
def agent(clean: None) -> Iterator[forked.Agent]:
    """A forker with its agent's side."""
    agent = forked.Agent()
    yield agent
    agent.close()
