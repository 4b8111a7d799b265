"""What the runs over networks that do not tell of their end are to find, they find."""

import pytest

from scaler_executor.protocol import agent, link

from .beats import BeatingRun, ShortCutRun


def test_agent_that_stops_too_late(monkeypatch):
    """An agent that stops its calls when the scheduler has given them up is noticed."""
    monkeypatch.setattr(agent, "FENCE_S", 13.0)
    with pytest.raises(AssertionError, match="the scheduler has given them up"):
        for seed in range(300):
            BeatingRun(seed).run()


def test_cuts_shorter_than_the_dead_time():
    """They lose no agent, and none of its calls that has ended: others run on, or were stopped in time."""
    for seed in range(60):
        ShortCutRun(seed).run()


def test_scheduler_that_gives_up_too_early(monkeypatch):
    """One that waits for no longer than the cut lasts, though it had last heard of the agent before, is noticed."""
    monkeypatch.setattr(link, "LEASE_ALLOWANCE_S", 0.0)
    with pytest.raises(AssertionError, match="an agent is lost for a short cut"):
        for seed in range(300):
            ShortCutRun(seed).run()
