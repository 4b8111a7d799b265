"""Runs a case in a program of its own, once with ProcessPoolExecutor and once with ScalerExecutor.

A case is a function of a module `*_cases`: it is given a `Pools`, works with executors as a user would, and returns
what it has seen, of types that `repr` shows in full. Both programs must have seen the same.

This is also the program. It has the guard that ProcessPoolExecutor needs under spawn and forkserver.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

DEADLINE_S = 60.0
START_METHODS = ["fork", "spawn", "forkserver"]
EXECUTORS = ["ProcessPoolExecutor", "ScalerExecutor"]


class Pools:
    """Makes executors of one class and start method. None is the interpreter's default."""

    def __init__(self, executor_class: str, start_method: str | None) -> None:
        self.start_method = start_method
        self.context: Any = None if start_method is None else multiprocessing.get_context(start_method)
        #: A context in any case, to make primitives of.
        self.primitives: Any = self.context or multiprocessing.get_context()
        self.executor_class: type[Executor] = ProcessPoolExecutor
        if executor_class == "ScalerExecutor":
            from scaler_executor import ScalerExecutor

            self.executor_class = ScalerExecutor

    def __call__(self, max_workers: int | None = 1, **options: Any) -> Executor:
        return self.executor_class(max_workers, mp_context=self.context, **options)  # type: ignore[call-arg]


class Run(NamedTuple):
    """What became of a program."""

    seen: object
    stdout: str
    stderr: str
    exit_code: int


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a function returns, or type and text of what it raises, the executor's name made the same."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return describe_error(error)


def describe_error(error: BaseException) -> tuple[str, str]:
    text = str(error)
    for name in EXECUTORS:
        text = text.replace(name, "Executor")
    if sys.version_info < (3, 11):
        text = text.partition(" (while pickling ")[0]  # what is a note of the error since
    return type(error).__name__, text


def run_case(
    case: Callable[[Pools], object],
    executor_class: str,
    start_method: str | None,
    *,
    directory: Path,
    flags: Iterable[str] = (),
    arguments: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Run a case in a fresh program."""
    here = Path(__file__).parent
    result = directory / f"seen_by_{executor_class}"
    command = [sys.executable, *flags, __file__, case.__module__, case.__name__, executor_class]
    command += [str(start_method), str(result), *arguments]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent.parent)])
    # A path short enough for the sockets that multiprocessing makes there.
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        variables |= {"TMPDIR": temporary, "PYTHONHASHSEED": "5", **(environment or {})}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DEADLINE_S,
            stdin=subprocess.DEVNULL,
            env=variables,
        )
    seen = eval(result.read_text()) if result.exists() else None
    return Run(seen, done.stdout, done.stderr, done.returncode)


def run_both(case: Callable[[Pools], object], start_method: str | None, **options: Any) -> tuple[Run, Run]:
    """Run a case with ProcessPoolExecutor, then with ScalerExecutor. Nothing may go wrong in either program."""
    expected = run_case(case, "ProcessPoolExecutor", start_method, **options)
    assert expected.exit_code == 0, expected.stderr
    found = run_case(case, "ScalerExecutor", start_method, **options)
    assert found.exit_code == 0, found.stderr
    return expected, found


def assert_alike(case: Callable[[Pools], object], start_method: str | None, **options: Any) -> Any:
    """Assert that both see the same, and return it."""
    expected, found = run_both(case, start_method, **options)
    assert found.seen == expected.seen
    return found.seen


def assert_output_alike(case: Callable[[Pools], object], start_method: str | None, **options: Any) -> Run:
    """Assert that both see and print the same, the lines of workers in any order; return the second run."""
    expected, found = run_both(case, start_method, **options)
    assert found.seen == expected.seen
    assert _lines(found.stdout) == _lines(expected.stdout)
    assert _lines(found.stderr) == _lines(expected.stderr)
    return found


#: The frame of a traceback in which a worker calls its initializer: it is the executor's, with its own text.
_FRAME_OF_WORKER = re.compile(r'  File "[^"]*", line \d+, in (_process_worker|_run_initializer)\n    .*\n( +[~^]+\n)?')


def _lines(text: str) -> list[str]:
    return sorted(re.sub("0x[0-9a-f]+", "0x", _FRAME_OF_WORKER.sub("", text)).split("\n"))


def main() -> None:
    module, case, executor_class, start_method, result = sys.argv[1:6]
    pools = Pools(executor_class, None if start_method == "None" else start_method)
    seen = getattr(importlib.import_module(module), case)(pools)
    with open(result, "w", encoding="utf-8") as file:
        file.write(repr(seen))


if __name__ == "__main__":
    main()
