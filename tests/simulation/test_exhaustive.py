"""Every order of events of two tasks on two workers with one fault. SCALER_EXECUTOR_EXHAUSTIVE=1 lifts the limit of
states."""

import os

import pytest

from .exhaustive import SCENARIOS, explore

MAX_STATES = None if os.environ.get("SCALER_EXECUTOR_EXHAUSTIVE") else 8500


@pytest.mark.timeout(0 if MAX_STATES is None else 240)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_order(name):
    """Whatever comes first, everything is answered once, and nothing runs twice or after its confirm."""
    assert explore(name, MAX_STATES).ends > 0
