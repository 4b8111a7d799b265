"""What the runs over networks that do not tell of their end are to find, they find."""

import pytest

from scaler_executor.protocol import agent

from .beats import BeatingRun


def test_agent_that_stops_too_late(monkeypatch):
    """An agent that stops its calls when the scheduler has given them up is noticed."""
    monkeypatch.setattr(agent, "FENCE_S", 11.0)
    with pytest.raises(AssertionError, match="the scheduler has given them up"):
        for seed in range(300):
            BeatingRun(seed).run()
