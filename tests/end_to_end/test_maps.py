"""starmap, results as they come, and maps that stop what runs, with real workers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import workload
from served import Served
from support import DEADLINE_S, Scene, wait_gone

from scaler_executor import ScalerExecutor

Make = Callable[..., ScalerExecutor]


@pytest.fixture(autouse=True, scope="module")
def cluster(served: Served) -> Served:
    """What half of the executors here use."""
    return served


@pytest.fixture(params=["embedded", "served"])
def start_method(request: pytest.FixtureRequest) -> str:
    return "fork" if request.param == "embedded" else "served"


@pytest.fixture(params=["executor", "view", "submit of its own"])
def executor(make: Make, request: pytest.FixtureRequest) -> ScalerExecutor:
    """An executor with two workers, a view of one, or one whose submit somebody has replaced."""
    executor = make(2)
    if request.param == "view":
        return executor.with_options(name="of the view")
    if request.param != "executor":
        submit = executor.submit
        executor.submit = lambda fn, /, *args: submit(fn, *args)  # type: ignore[method-assign]
    return executor


@pytest.mark.parametrize("ordered", [True, False])
def test_starmap(executor: ScalerExecutor, ordered: bool) -> None:
    """The results of each tuple's call, of any number of arguments, endless if there is a buffer."""
    results = executor.starmap(workload.add, [(1, 2), [3], (4, 5)], ordered=ordered)
    assert sorted(results) == [3, 3, 9]
    items = [(number, 1) for number in range(2000)]
    assert sorted(executor.starmap(workload.add, items, chunksize=7, ordered=ordered)) == list(range(1, 2001))
    endless = executor.starmap(workload.add, ((number, 1) for number in itertools.count()), buffersize=4)
    assert list(itertools.islice(endless, 20)) == list(range(1, 21))
    with pytest.raises(TypeError, match="positional argument"):
        list(executor.starmap(workload.add, [(1, 2, 3)], ordered=ordered))


def test_results_come_in_their_order(scene: Scene, executor: ScalerExecutor) -> None:
    """A quick item does not wait for a slow one before it; its exception neither."""
    started, gate = scene.fifo(), scene.fifo()
    results = executor.map(workload.pass_or_hold, [started, None], [gate, None], "sq", ordered=False)
    assert next(results) == "q"
    gate.open()
    assert list(results) == ["s"]
    results = executor.starmap(_hold_or_raise, [(started, gate), (None, None)], ordered=False, cancel_running=True)
    with pytest.raises(LookupError):
        next(results)


def _hold_or_raise(started: Any, gate: Any) -> None:
    if started is None:
        raise LookupError
    workload.hold(started, gate)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_first_hit_stops_the_others(scene: Scene, executor: ScalerExecutor, ordered: bool) -> None:
    """`next` of a map with cancel_running leaves nothing running."""
    started, gate = scene.fifo(), scene.fifo()
    results = executor.map(
        workload.pass_or_hold,
        [None, started, started],
        [None, gate, gate],
        range(3),
        ordered=ordered,
        cancel_running=True,
    )
    assert next(results) == 0
    pids = [int(started.hear()), int(started.hear())]
    del results
    wait_gone(*pids)
    assert executor.submit(workload.add, 1).result(DEADLINE_S) == 1
