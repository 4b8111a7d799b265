"""Broken machines are noticed: by a test of the tables, or by the simulator within some hundred seeds."""

import pytest

from .mutations import MUTATIONS, caught_by_pure_tests, caught_by_simulation, mutated, pure_tests
from .random_runs import Run

TESTS = pure_tests()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_caught(mutation):
    """Breaking the machines in this way does not go unnoticed."""
    with mutated(mutation):
        # Whatever is quickest first.
        seed = caught_by_simulation(30)
        name = None if seed is not None else caught_by_pure_tests(TESTS)
        if seed is None and name is None:
            seed = caught_by_simulation()
    assert seed is not None or name is not None
    # And the break is undone.
    if seed is not None:
        Run(seed).run()
    else:
        assert caught_by_pure_tests([test for test in TESTS if test[0] == name]) is None
