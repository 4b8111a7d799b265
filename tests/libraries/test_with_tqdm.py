"""tqdm's bars over what an executor yields."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import as_completed
from types import ModuleType

import pytest
from calls import Record, Wrong, fail, square

from scaler_executor import ScalerExecutor

Library = Callable[[str], ModuleType]


def test_tqdm_over_map(library: Library, executor: ScalerExecutor, record: Record) -> None:
    """Each item counts when it is there; a call that fails ends the bar where it was."""
    tqdm = library("tqdm").tqdm
    screen = io.StringIO()
    bar = tqdm(executor.map(record.watched(square), range(50)), total=50, file=screen)
    assert list(bar) == [number * number for number in range(50)]
    assert bar.n == 50 and "50/50" in screen.getvalue() and record.pids()
    bar = tqdm(executor.map(fail, range(50)), total=50, file=screen)
    with pytest.raises(Wrong):
        list(bar)
    assert bar.n == 0


def test_tqdm_over_as_completed(library: Library, executor: ScalerExecutor) -> None:
    """Also with some that were cancelled."""
    tqdm = library("tqdm").tqdm
    futures = [executor.submit(square, number) for number in range(50)]
    executor.cancel(futures[:5])
    done = list(tqdm(as_completed(futures), total=50, file=io.StringIO()))
    assert len(done) == 50
    assert sorted(future.result() for future in done if not future.cancelled()) == [n * n for n in range(5, 50)]


def test_tqdms_process_map(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """`process_map` makes its own executor, a ScalerExecutor where that is in the place of the standard library's; it
    hands its lock, of multiprocessing, to the workers."""
    contrib = library("tqdm.contrib.concurrent")
    import concurrent.futures

    made = []

    class Recorded(ScalerExecutor):
        def __init__(self, *args: object, **options: object) -> None:
            made.append(self)
            super().__init__(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Recorded)
    found = contrib.process_map(square, range(20), max_workers=2, chunksize=1, file=io.StringIO())
    assert found == [number * number for number in range(20)] and len(made) == 1
