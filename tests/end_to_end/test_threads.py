"""Libraries that start threads of their own, for BLAS and OpenMP, start as many in each worker as are its share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import numpy
import pytest
from served import Served

from scaler_executor import ScalerExecutor
from scaler_executor.runtime.cgroups import cpu_count_usable
from scaler_executor.runtime.threads import VARIABLES

CPUS = cpu_count_usable()
pytestmark = pytest.mark.skipif(CPUS < 2, reason="one CPU: these libraries start no threads")


@pytest.fixture(scope="module", autouse=True)
def cluster(served: Served) -> Served:
    """There before the first test looks."""
    return served


@pytest.fixture(params=["fork", "spawn", "served"])
def start_method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user has said nothing, and OpenBLAS has threads in this process."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    multiply()


def threads() -> int:
    with open("/proc/self/status") as file:
        return int(re.findall(r"^Threads:\s*(\d+)$", file.read(), re.MULTILINE)[0])


def multiply() -> int:
    """Have numpy's OpenBLAS start its threads; return how many this process has then."""
    import numpy as np

    matrix = np.ones((400, 400))
    assert (matrix @ matrix)[0, 0] == 400
    return threads()


def openblas_threads(count: int | None = None) -> int:
    """Return how many threads OpenBLAS uses, after it was told to use `count`."""
    threadpoolctl = pytest.importorskip("threadpoolctl", reason="needs threadpoolctl, of the extra libraries")
    import numpy  # noqa: F401

    threadpoolctl.threadpool_limits(count, "blas")
    return max(pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas")


def stated() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in VARIABLES}


def has_openblas() -> bool:
    return "openblas" in str(numpy.show_config("dicts")["Build Dependencies"]["blas"]["name"])


@pytest.mark.skipif(not has_openblas(), reason="numpy has another BLAS than OpenBLAS")
def test_as_many_workers_as_cpus(make: Callable[..., ScalerExecutor]) -> None:
    """With a worker for each CPU none of them starts a thread, whether numpy was loaded before the fork or is loaded by
    the call."""
    executor = make(CPUS)
    assert set(executor.map(started, range(2 * CPUS))) == {0}
    assert set(stated().values()) == {None}


def started(_: int) -> int:
    before = threads()
    return multiply() - before


def test_stated_for_children(make: Callable[..., ScalerExecutor]) -> None:
    """What a call starts is told the same."""
    assert set(make(CPUS).submit(stated).result().values()) == {"1"}


@pytest.mark.skipif(not has_openblas(), reason="numpy has another BLAS than OpenBLAS")
@pytest.mark.parametrize("start_method", ["fork", "spawn"], indirect=True)
def test_one_worker(make: Callable[..., ScalerExecutor]) -> None:
    """A single worker's share is all CPUs."""
    assert make(1).submit(multiply).result() >= CPUS


@pytest.mark.skipif(not has_openblas(), reason="numpy has another BLAS than OpenBLAS")
@pytest.mark.parametrize("start_method", ["fork", "spawn"], indirect=True)
@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
def test_the_users_own_word(
    variable: str, make: Callable[..., ScalerExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user has set stays, in words and in effect; OMP_NUM_THREADS for all of them."""
    monkeypatch.setenv(variable, str(CPUS))
    executor = make(CPUS)
    assert executor.submit(multiply).result() >= CPUS
    others = None if variable == "OMP_NUM_THREADS" else "1"
    assert executor.submit(stated).result() == {**dict.fromkeys(VARIABLES, others), variable: str(CPUS)}


@pytest.mark.skipif(not has_openblas(), reason="numpy has another BLAS than OpenBLAS")
def test_raised_by_a_call(make: Callable[..., ScalerExecutor]) -> None:
    """A call may have more again, and this process has as many as before."""
    before = openblas_threads()
    executor = make(CPUS)
    assert executor.submit(openblas_threads).result() == 1
    assert executor.submit(openblas_threads, CPUS).result() == CPUS
    assert openblas_threads() == before


@pytest.mark.parametrize("start_method", ["served"], indirect=True)
def test_served_by_fewer(make: Callable[..., ScalerExecutor]) -> None:
    """A served cluster's workers have the share of those that are served, however many calls a client may run."""
    share = max(1, CPUS // 2)
    assert make(1).submit(stated).result()["OMP_NUM_THREADS"] == str(share)
