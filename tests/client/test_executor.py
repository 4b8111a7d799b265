"""ScalerExecutor's arguments, checked before anything is started, and the cost of importing the package."""

import multiprocessing
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from typing import Any

import pytest

from scaler_executor import ScalerExecutor
from scaler_executor.executor import _resolve_start_method

WRONG: list[dict[str, Any]] = [
    {"max_workers": 0},
    {"max_workers": -1},
    {"initializer": 5},
    {"max_tasks_per_child": 1.5},
    {"max_tasks_per_child": 0},
    {"max_tasks_per_child": 1, "mp_context": multiprocessing.get_context("fork")},
]


@pytest.mark.parametrize("arguments", WRONG, ids=lambda arguments: "-".join(arguments))
def test_wrong_arguments_are_refused_as_by_process_pool_executor(arguments: dict[str, Any]) -> None:
    """The type and the words of the standard library."""
    if sys.version_info < (3, 11) and "max_tasks_per_child" in arguments:
        pytest.skip("this ProcessPoolExecutor has no max_tasks_per_child")
    with pytest.raises((TypeError, ValueError)) as theirs:
        ProcessPoolExecutor(**arguments)
    with pytest.raises(theirs.type) as ours:
        ScalerExecutor(**arguments)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("name", ["cancel_timeout", "cancel_grace"])
def test_negative_times_are_refused(name: str) -> None:
    """They would mean nothing."""
    with pytest.raises(ValueError, match=f"{name} must be >= 0"):
        ScalerExecutor(**{name: -1})


def test_the_start_method_is_the_contexts_or_the_interpreters() -> None:
    """mp_context=None means what it means for ProcessPoolExecutor; max_tasks_per_child alone means spawn."""
    assert _resolve_start_method(multiprocessing.get_context("forkserver"), None) == "forkserver"
    assert _resolve_start_method(None, 5) == "spawn"
    code = (
        "import sys; from scaler_executor.executor import _resolve_start_method as r; first = r(None, None);"
        "assert 'multiprocessing' not in sys.modules; import multiprocessing as m;"
        "assert first == m.get_start_method() == r(None, None);"
        "m.set_start_method('spawn', force=True); assert r(None, None) == 'spawn'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_is_cheap() -> None:
    """The package alone imports none of its parts; the executor none of what only some programs need."""
    code = (
        "import sys; before = set(sys.modules); import scaler_executor; new = set(sys.modules) - before;"
        "assert not any(name.startswith('scaler_executor.') for name in new), new;"
        "from scaler_executor import ScalerExecutor, ScalerFuture, CancelOutcome, TaskInterrupted;"
        "heavy = {'zmq', 'multiprocessing', 'asyncio', 'cloudpickle'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_libraries_ask_an_executor() -> None:
    """How many workers it has, by the names that they know, and whether it is a ProcessPoolExecutor."""

    class Own(ScalerExecutor):
        pass

    for kind in (ScalerExecutor, Own):
        with kind(3) as executor, executor.with_options(retries=1) as view:
            for each in (executor, view):
                assert each.max_workers == each._max_workers == each.size == 3
                assert isinstance(each, ScalerExecutor) and isinstance(each, ProcessPoolExecutor)
                assert not isinstance(each, ThreadPoolExecutor) and each.__class__.__name__ == type(each).__name__
            assert isinstance(executor, kind) and issubclass(executor.__class__, kind)


def test_what_libraries_ask_where_the_class_is_replaced() -> None:
    """The same, whichever class the library has taken, and none is imported for it."""
    code = (
        "import sys; from scaler_executor import ScalerExecutor, swap; executor = ScalerExecutor(1);"
        "assert executor.__class__ is ScalerExecutor and 'concurrent.futures.process' not in sys.modules;"
        "swap.install(); from concurrent.futures import ProcessPoolExecutor;"
        "assert isinstance(executor, ProcessPoolExecutor) and isinstance(executor.with_options(), ProcessPoolExecutor);"
        "swapped = ProcessPoolExecutor(1); assert swapped.__class__ is ProcessPoolExecutor;"
        "import concurrent.futures.process; assert isinstance(executor, ProcessPoolExecutor);"
        "Own = type('Own', (ScalerExecutor,), {}); own = Own(1); assert isinstance(own, ProcessPoolExecutor);"
        "[each.shutdown() for each in (executor, swapped, own)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_map_goes_through_a_submit_of_ones_own() -> None:
    """A map that fails leaves the futures that are done as they are: somebody else may keep them."""
    made: list[Future[object]] = []

    class Own(ScalerExecutor):
        def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def, override]
            made.append(super().submit(fn, *args, **kwargs))
            return made[-1]

    with Own(1) as executor:
        with pytest.raises(ZeroDivisionError):
            list(executor.map(divmod, [1, 1, 1], [1, 0, 1]))
        wait(made)
    assert [future.cancelled() for future in made[:2]] == [False, False]
    assert isinstance(made[1].exception(), ZeroDivisionError)
