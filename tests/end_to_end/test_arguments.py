"""Constructor, submit, map and shutdown take what ProcessPoolExecutor's take, and refuse the rest in its words."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import arguments_cases as cases
import pytest
from comparison import Pools, assert_alike

from scaler_executor import ScalerExecutor


@pytest.mark.parametrize(
    "case",
    [
        cases.arguments_of_calls,
        cases.callables,
        cases.checks_of_the_constructor,
        cases.checks_of_submit_and_map,
        cases.after_shutdown,
        cases.signatures,
        cases.failing_initializer,
        cases.subclasses,
    ],
    ids=lambda case: case.__name__,
)
def test_the_same_as_process_pool_executor(case: Callable[[Pools], object], tmp_path: Path) -> None:
    """Each of these programs sees the same with either executor."""
    assert_alike(case, "fork", directory=tmp_path)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("case", [cases.initargs_of_any_kind, cases.unusual_results], ids=lambda case: case.__name__)
def test_the_same_with_each_start_method(case: Callable[[Pools], object], start_method: str, tmp_path: Path) -> None:
    """So does each of these, though values get to the workers in different ways."""
    assert_alike(case, start_method, directory=tmp_path)


def test_a_subclass_is_shut_down_by_its_own_shutdown() -> None:
    """Leaving a with block calls `shutdown`, whoever has defined it, also after an error and a KeyboardInterrupt."""

    class Noting(ScalerExecutor):
        calls = 0

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            self.calls += 1
            super().shutdown(wait, cancel_futures=cancel_futures)

    for error in (None, LookupError, KeyboardInterrupt):
        executor = Noting(1)
        try:
            with executor:
                assert executor.submit(abs, -1).result() == 1
                if error is not None:
                    raise error
        except (LookupError, KeyboardInterrupt) as raised:
            assert type(raised) is error
        assert executor.calls == 1
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(abs, -1)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ProcessPoolExecutor has it since Python 3.11")
def test_keyword_only_arguments_of_the_constructor() -> None:
    """max_tasks_per_child is keyword-only, as are the arguments that ProcessPoolExecutor does not have."""
    parameters = list(inspect.signature(ScalerExecutor).parameters.values())[4:]
    assert parameters[0].name == "max_tasks_per_child"
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)


def test_numbers_of_workers() -> None:
    """`_max_workers` and `max_workers` are the number; there is no table of processes to look at."""
    with ScalerExecutor(3) as executor:
        assert (executor._max_workers, executor.max_workers, type(executor._max_workers)) == (3, 3, int)
        assert not hasattr(executor, "_processes")
        assert executor.submit(abs, -1).result() == 1
        assert not hasattr(executor, "_processes")
    assert executor.max_workers == 3


def test_a_class_of_the_type_of_an_executor() -> None:
    """Names of type checkers and documentation work at run time, too."""
    assert "max_workers" in (ScalerExecutor.__doc__ or "")
    assert inspect.signature(ScalerExecutor.map).parameters["buffersize"].default is None
    assert inspect.signature(ScalerExecutor.terminate_workers) == inspect.signature(ScalerExecutor.kill_workers)
