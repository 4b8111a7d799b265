"""Fixtures of the tests with real processes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import forked
import pytest

from scaler_executor.runtime import platform


@pytest.fixture
def clean() -> Iterator[None]:
    """Check that a test leaves no descriptor open and no child behind."""
    platform.prepare()
    before = forked.open_fds()
    yield
    assert forked.open_fds() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def agent(clean: None) -> Iterator[forked.Agent]:
    """A forker with its agent's side."""
    agent = forked.Agent()
    yield agent
    agent.close()
