"""adaptive and pipefunc, which look what kind of executor they have been given."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from calls import Wrong, fail, square

from scaler_executor import ScalerExecutor

Check = Callable[..., None]
Library = Callable[[str], ModuleType]


def test_adaptive(library: Library, check: Check, executor: ScalerExecutor) -> None:
    """`Runner(learner, executor=executor)` runs as many calls at once as there are workers."""
    adaptive = library("adaptive")

    def run(executor: Any, wrap: Any) -> dict[float, float]:
        learner = adaptive.SequenceLearner(wrap(square), sequence=list(range(40)))
        if executor is None:
            adaptive.runner.simple(learner, goal=lambda learner: learner.done())
        else:
            runner = adaptive.BlockingRunner(learner, goal=lambda learner: learner.done(), executor=executor)
            assert runner._get_max_tasks() == executor.max_workers
        return dict(learner.data)

    check(run, run(None, lambda function: function))
    with pytest.raises(RuntimeError) as caught:  # its own, after it has tried again
        run(executor, lambda _: fail)
    assert isinstance(caught.value.__cause__, Wrong)


def test_adaptive_learner_1d(library: Library, executor: ScalerExecutor, record: Any) -> None:
    """The asynchronous runner of notebooks too; a goal that is reached stops it."""
    adaptive = library("adaptive")
    import asyncio

    learner = adaptive.Learner1D(record.watched(square), bounds=(-1, 1))

    async def main() -> None:
        runner = adaptive.AsyncRunner(learner, npoints_goal=50, executor=executor, shutdown_executor=False)
        await runner.task

    asyncio.run(main())
    assert learner.npoints >= 50 and all(value == x * x for x, value in learner.data.items())
    assert record.pids() and os.getpid() not in record.pids()
    assert executor.submit(square, 3).result() == 9


def test_pipefunc(library: Library, check: Check, executor: ScalerExecutor) -> None:
    """`pipeline.map(..., executor=executor)`."""
    pipefunc = library("pipefunc")

    def run(executor: Any, wrap: Any) -> list[float]:
        def doubled(x: float) -> float:
            return 2 * wrap(square)(x)  # type: ignore[no-any-return]

        def total(y: Any) -> float:
            return float(sum(y))

        steps = [pipefunc.PipeFunc(doubled, "y", mapspec="x[i] -> y[i]"), pipefunc.PipeFunc(total, "sum")]
        pipeline = pipefunc.Pipeline(steps)
        found = pipeline.map({"x": list(range(20))}, parallel=executor is not None, executor=executor, storage="dict")
        return [*map(float, found["y"].output), found["sum"].output]

    check(run, run(None, lambda function: function))
    with pytest.raises(Wrong):
        run(executor, lambda _: fail)
