"""Fixtures of the end-to-end tests: real executors, and for each test a check that nothing of them is left."""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served import Served
from support import Scene

from scaler_executor import ScalerExecutor
from scaler_executor.runtime import platform

# Its assertions show what differs, too.
pytest.register_assert_rewrite("comparison")

# What stays for good is there before the first test looks.
platform.prepare()

# The crashes that the tests provoke are nobody's to debug.
resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


@pytest.fixture(autouse=True)
def scene(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """The test's files and clients; at its end nothing may be left of the processes, threads, descriptors and files."""
    # It is one per process, started when first needed, and stays: it is none of a test's.
    multiprocessing.resource_tracker.ensure_running()
    scene = Scene(tmp_path, request.node.name)
    monkeypatch.setattr(tempfile, "tempdir", str(scene.temporary))
    monkeypatch.setenv("TMPDIR", str(scene.temporary))
    yield scene
    scene.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A served cluster with two workers, for all tests of a module: whoever uses it with `make` asks for it by an
    autouse fixture, so that it is there before the first test looks what is there."""
    with Served(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture(params=["fork", "spawn"])
def start_method(request: pytest.FixtureRequest) -> str:
    """How workers come into being."""
    return str(request.param)


@pytest.fixture
def make(scene: Scene, start_method: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., ScalerExecutor]]:
    """Makes executors with the start method, or of a served cluster if it is "served", and shuts them down at the end
    of the test; what still runs is stopped."""
    made: list[ScalerExecutor] = []

    def make(max_workers: int | None = 2, **options: object) -> ScalerExecutor:
        if start_method == "served":
            options = {"address": request.getfixturevalue("served").connection, **options}
            context = None
        else:
            context = multiprocessing.get_context(start_method)
        made.append(ScalerExecutor(max_workers, context, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    while made:
        executor = made.pop()
        try:
            executor.clear()
        except RuntimeError:
            pass  # broken, or its scheduler was lost: that is what the test was about
        executor.shutdown()


@pytest.fixture
def executor(make: Callable[..., ScalerExecutor]) -> ScalerExecutor:
    """An executor with two workers."""
    return make(2)
