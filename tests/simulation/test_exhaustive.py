"""Every order of events of two tasks on two workers with one fault.

The largest scenario has 47,000 states, a minute's work: it is cut short here unless SCALER_EXECUTOR_LONG is set. All
others are done whole.
"""

import os

import pytest

from .exhaustive import SCENARIOS, explore

IS_LONG = bool(os.environ.get("SCALER_EXECUTOR_LONG"))
MAX_STATES = {"forced cancel of a run": None if IS_LONG else 10_000}


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_order(name):
    """Whatever comes first, everything is answered once, and nothing runs twice or after its confirm."""
    explorer = explore(name, MAX_STATES.get(name))
    assert explorer.ends > 0
