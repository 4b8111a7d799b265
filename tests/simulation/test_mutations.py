"""Broken machines are noticed: by a test of the tables, or by the simulator within some hundred seeds."""

import pytest

from .mutations import MUTATIONS, caught_by_pure_tests, caught_by_simulation, mutated, pure_tests
from .random_runs import Run


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_caught(mutation):
    """Breaking the machines in this way does not go unnoticed."""
    tests = pure_tests()
    with mutated(mutation):
        assert caught_by_pure_tests(tests) is not None or caught_by_simulation() is not None
    # And the break is undone.
    assert caught_by_pure_tests(tests) is None
    Run(0).run()
