"""Every order of events of two tasks on two workers with one fault."""

import pytest

from .exhaustive import SCENARIOS, explore


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_order(name):
    """Whatever comes first, everything is answered once, and nothing runs twice or after its confirm."""
    assert explore(name).ends > 0
