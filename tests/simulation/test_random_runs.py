"""Whole clusters from seeds. SCALER_EXECUTOR_SEEDS=20000 runs more of them, and others."""

import os

import pytest

from .beats import make_run

SEEDS = int(os.environ.get("SCALER_EXECUTOR_SEEDS", "2000"))
CHUNK = 50


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_seeds(first):
    """Every future is settled once, every cancel answered, nothing started twice or left anywhere."""
    for seed in range(first, min(first + CHUNK, SEEDS)):
        make_run(seed).run()
