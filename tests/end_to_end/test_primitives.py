"""What of multiprocessing workers may be given, as ProcessPoolExecutor's: by initargs, as arguments and as results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import primitives_cases as cases
import pytest
from comparison import START_METHODS, Pools, assert_alike

from scaler_executor import ScalerExecutor

IN_INITARGS = [cases.locks, cases.events, cases.queues, cases.pipes, cases.shared_values, cases.many_together]


@pytest.fixture(params=["fork", "spawn"])
def start_method(request: pytest.FixtureRequest) -> str:
    """How workers come into being. Under forkserver everything comes to them as under spawn."""
    return str(request.param)


@pytest.mark.parametrize("case", IN_INITARGS, ids=lambda case: case.__name__)
def test_initargs(case: Callable[[Pools], object], start_method: str, tmp_path: Path) -> None:
    """Whatever a child of multiprocessing may be given works in initargs, in both directions."""
    assert_alike(case, start_method, directory=tmp_path)


@pytest.mark.parametrize("start_method", ["forkserver", None])
def test_initargs_of_other_start_methods(start_method: str | None, tmp_path: Path) -> None:
    """So it does with a fork server and with the interpreter's default."""
    assert_alike(cases.many_together, start_method, directory=tmp_path)


@pytest.mark.parametrize("start_method", [*START_METHODS, None])
def test_shared_memory(start_method: str | None, tmp_path: Path) -> None:
    """Shared memory works in initargs and as an argument, and is still there when the workers have ended."""
    assert assert_alike(cases.shared_memory, start_method, directory=tmp_path) == [[True], 99, True, 99]


def test_managers(start_method: str, tmp_path: Path) -> None:
    """Proxies work in initargs, as arguments and as results; a worker has the key to connect by itself."""
    assert_alike(cases.managers, start_method, directory=tmp_path)


def test_arguments(start_method: str, tmp_path: Path) -> None:
    """As an argument or a result a primitive is refused in the same words, and the executor goes on."""
    assert_alike(cases.as_arguments, start_method, directory=tmp_path)


def test_connections_and_sockets(start_method: str, tmp_path: Path) -> None:
    """They travel as copies, to workers and back."""
    assert_alike(cases.connections_as_arguments, start_method, directory=tmp_path)


@pytest.mark.parametrize("start_method", [*START_METHODS, None])
def test_identity(start_method: str | None, tmp_path: Path) -> None:
    """multiprocessing tells a call the same of its process and its parent."""
    seen = assert_alike(cases.identity, start_method, directory=tmp_path)
    assert seen["parent alive"] and seen["pid"]
    assert assert_alike(cases.parent, start_method, directory=tmp_path)


def test_name_of_a_worker() -> None:
    """It is a number of its own, for logs."""
    with ScalerExecutor(1) as executor:
        assert executor.submit(cases.name_of_process).result().startswith("ScalerWorker-")
