"""Optimizers that are given an executor, or its `map`, find what they find without one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from calls import Wrong, fail, sphere

from scaler_executor import ScalerExecutor

Check = Callable[..., None]
Library = Callable[[str], ModuleType]


def test_scipy(library: Library, check: Check, executor: ScalerExecutor) -> None:
    """`workers=executor.map`."""
    optimize = library("scipy.optimize")

    def run(workers: Any, wrap: Any) -> list[float]:
        found = optimize.differential_evolution(
            wrap(sphere), [(-1, 1)] * 2, workers=workers, updating="deferred", maxiter=5, rng=1, polish=False
        )
        return [*found.x, found.fun]

    check(lambda executor, wrap: run(executor.map, wrap), run(map, lambda function: function))
    with pytest.raises(Wrong):
        run(executor.map, lambda _: fail)


def test_scipy_brute(library: Library, check: Check) -> None:
    """`workers=executor.map`, of a grid."""
    optimize = library("scipy.optimize")

    def run(workers: Any, wrap: Any) -> list[float]:
        found = optimize.brute(wrap(sphere), [slice(-1, 1, 0.25)] * 2, workers=workers, finish=None)
        return [float(value) for value in found]

    check(lambda executor, wrap: run(executor.map, wrap), run(1, lambda function: function))


def test_nevergrad(library: Library, check: Check, executor: ScalerExecutor) -> None:
    """`minimize(..., executor=executor)`."""
    nevergrad = library("nevergrad")

    def run(executor: Any, wrap: Any) -> list[float]:
        parametrization = nevergrad.p.Array(shape=(2,))
        parametrization.random_state.seed(3)
        # One to which the order of the answers is all one.
        optimizer = nevergrad.optimizers.RandomSearch(parametrization, budget=60, num_workers=4)
        best = optimizer.minimize(wrap(sphere), executor=executor)
        return [float(value) for value in best.value]

    check(run, run(None, lambda function: function))
    with pytest.raises(Wrong):
        run(executor, lambda _: fail)


def test_pymoo(library: Library, check: Check, executor: ScalerExecutor) -> None:
    """`StarmapParallelization(executor.starmap)`."""
    parallelization = library("pymoo.parallelization.starmap")
    problem = library("pymoo.core.problem")
    minimize = library("pymoo.optimize").minimize
    ga = library("pymoo.algorithms.soo.nonconvex.ga").GA

    class Sphere(problem.ElementwiseProblem):  # type: ignore[name-defined, misc]
        def __init__(self, function: Any, runner: Any) -> None:
            more = {} if runner is None else {"elementwise_runner": runner}
            super().__init__(n_var=2, n_obj=1, xl=-1.0, xu=1.0, **more)
            self.function = function

        def _evaluate(self, x: Any, out: dict[str, Any], *_: Any, **__: Any) -> None:
            out["F"] = self.function(x)

    def run(executor: Any, wrap: Any) -> list[float]:
        runner = None if executor is None else parallelization.StarmapParallelization(executor.starmap)
        found = minimize(Sphere(wrap(sphere), runner), ga(pop_size=10), ("n_gen", 4), seed=1)
        return [*map(float, found.X), *map(float, found.F)]

    check(run, run(None, lambda function: function))
    with pytest.raises(Wrong):
        run(executor, lambda _: fail)


def test_optuna(library: Library, check: Check) -> None:
    """`ask` and `tell`, and a `submit` in between."""
    optuna = library("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def run(executor: Any, wrap: Any) -> list[float]:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        function = wrap(sphere)
        for _ in range(5):
            trials = [study.ask() for _ in range(4)]
            points = [[trial.suggest_float(name, -1, 1) for name in "xy"] for trial in trials]
            if executor is None:
                values = list(map(function, points))
            else:
                values = [future.result() for future in [executor.submit(function, point) for point in points]]
            for trial, value in zip(trials, values, strict=True):
                study.tell(trial, value)
        return [study.best_value, *study.best_params.values()]

    check(run, run(None, lambda function: function))


def test_optuna_failures(library: Library, executor: ScalerExecutor) -> None:
    """A trial whose call fails, dies or takes too long is told as failed; the study goes on."""
    optuna = library("optuna")
    from calls import sleep_long

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    import os

    calls: list[tuple[Any, tuple[Any, ...]]] = [(fail, ()), (os._exit, (1,)), (sleep_long, ()), (abs, (-3,))]
    view = executor.with_options(timeout=1)
    futures = [(study.ask(), view.submit(function, *args)) for function, args in calls]
    for trial, future in futures:
        try:
            study.tell(trial, future.result())
        except Exception:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    states = [trial.state.name for trial in study.get_trials()]
    assert states == ["FAIL", "FAIL", "FAIL", "COMPLETE"] and study.best_value == 3
