"""Samplers that are given an executor as their pool draw what they draw without one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from calls import Wrong, fail

from scaler_executor import ScalerExecutor

Check = Callable[..., None]
Library = Callable[[str], ModuleType]


def log_likelihood(x: Any) -> float:
    return -0.5 * float(sum(value * value for value in x))


def from_unit_cube(u: Any) -> Any:
    return 10 * u - 5


def test_emcee(library: Library, check: Check, executor: ScalerExecutor) -> None:
    """`EnsembleSampler(..., pool=executor)`."""
    emcee = library("emcee")
    import numpy as np

    def run(pool: Any, wrap: Any) -> Any:
        sampler = emcee.EnsembleSampler(8, 2, wrap(log_likelihood), pool=pool)
        start = np.random.default_rng(1).normal(size=(8, 2))
        state = emcee.State(start, random_state=np.random.RandomState(1).get_state())
        sampler.run_mcmc(state, 20)
        return sampler.get_chain()

    check(run, run(None, lambda function: function), is_equal=np.array_equal)
    with pytest.raises(Wrong):
        run(executor, lambda _: fail)


def test_dynesty(library: Library, check: Check, executor: ScalerExecutor) -> None:
    """`NestedSampler(..., pool=executor)`, which asks its `size`."""
    dynesty = library("dynesty")
    import numpy as np

    def run(pool: Any, wrap: Any, **more: Any) -> Any:
        sampler = dynesty.NestedSampler(
            wrap(log_likelihood), from_unit_cube, 2, nlive=50, rstate=np.random.default_rng(1), pool=pool, **more
        )
        sampler.run_nested(dlogz=1, print_progress=False)
        assert pool is None or sampler.queue_size == 2
        return sampler.results.logl

    class Serial:
        """What a pool of two is to dynesty, which draws other numbers than without one."""

        map = staticmethod(map)
        size = 2

    check(run, run(Serial(), lambda function: function), is_equal=np.array_equal)
    with pytest.raises(Wrong):
        run(executor, lambda _: fail)


def test_pyabc(library: Library, executor: ScalerExecutor, tmp_path: Any, record: Any) -> None:
    """`ConcurrentFutureSampler(executor)`: it cancels what it no longer needs. The posterior is where it should be;
    what is drawn is not reproducible there, also without an executor."""
    pyabc = library("pyabc")

    def model(parameters: Any) -> dict[str, float]:
        import random

        return {"y": record.watched(float)(parameters["mean"]) + random.gauss(0, 0.1)}

    prior = pyabc.Distribution(mean=pyabc.RV("uniform", 0, 5))
    for executor_or_view, simulate in ((executor, model), (executor.with_options(retries=2), dying(model, record))):
        sampler = pyabc.sampler.ConcurrentFutureSampler(executor_or_view, client_max_jobs=4)
        abc = pyabc.ABCSMC(simulate, prior, pyabc.PNormDistance(p=1), population_size=30, sampler=sampler)
        abc.new(f"sqlite:///{tmp_path / 'history.db'}", {"y": 2.0})
        history = abc.run(max_nr_populations=3)
        frame, weights = history.get_distribution()
        assert abs(float((frame["mean"] * weights).sum()) - 2.0) < 0.7
    import os

    assert record.has_died() and os.getpid() not in record.pids() != set()


def dying(model: Any, record: Any) -> Any:
    def simulate(parameters: Any) -> Any:
        return record.deadly(model)(parameters)

    return simulate
