"""What a call finds around it is what it finds in a worker of ProcessPoolExecutor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import environment_cases as cases
import pytest
from comparison import START_METHODS, Pools, assert_alike, run_case

FLAGS: list[tuple[list[str], dict[str, str]]] = [
    ([], {}),
    (["-O", "-B", "-W", "error", "-X", "utf8"], {"PYTHONHASHSEED": "77", "LC_ALL": "C"}),
    (["-X", "dev", "-W", "ignore::UserWarning"], {"PYTHONUTF8": "0", "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}),
    (["-u", "-s", "-X", "named=value"], {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "latin-1", "TZ": "Asia/Tokyo"}),
]


@pytest.mark.parametrize("start_method", [*START_METHODS, None])
@pytest.mark.parametrize(("flags", "environment"), FLAGS, ids=["plain", "optimised", "dev", "unbuffered"])
def test_as_the_program_started(
    flags: list[str], environment: dict[str, str], start_method: str | None, tmp_path: Path
) -> None:
    """Flags, environment, locale, path, directory, limits and streams are the program's."""
    assert_alike(cases.as_the_program_started, start_method, directory=tmp_path, flags=flags, environment=environment)


@pytest.mark.parametrize("start_method", START_METHODS)
def test_changed_before_the_first_call(start_method: str, tmp_path: Path) -> None:
    """Workers are started with the first call: they find what the program had made of its surroundings by then."""
    environment = {"REMOVED": "1", "CHANGED": "before", "TZ": "UTC"}
    seen = assert_alike(cases.changed_before_the_first_call, start_method, directory=tmp_path, environment=environment)
    assert seen["umask"] == 0o27 and seen["time zone"] == ("JST", "JST")


@pytest.mark.parametrize("start_method", START_METHODS)
def test_interpreter_shaped_before_the_first_call(start_method: str, tmp_path: Path) -> None:
    """So they do of variables that count only when an interpreter starts."""
    environment = {"PYTHONUTF8": "1", "PYTHONHASHSEED": "7"}
    case = cases.interpreter_shaped_before_the_first_call
    seen = assert_alike(case, start_method, directory=tmp_path, environment=environment)
    if start_method != "fork":
        assert seen[0]["stdout"][0] == "iso8859-1" and not seen[0]["assertions"]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize(
    "case",
    [
        cases.changed_after_the_first_call,
        cases.set_locale,
        cases.signal_handlers,
        cases.signal_mask,
        cases.signal_handler_of_a_call,
        cases.things_that_calls_start,
    ],
    ids=lambda case: case.__name__,
)
def test_the_same_as_process_pool_executor(case: Callable[[Pools], object], start_method: str, tmp_path: Path) -> None:
    """Each of these programs sees the same with either executor."""
    assert_alike(case, start_method, directory=tmp_path)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_stop_with_all_signals_blocked(start_method: str, tmp_path: Path) -> None:
    """What a worker inherits of a signal mask leaves out the signals by which its calls are stopped."""
    found = run_case(cases.stop_with_all_signals_blocked, "ScalerExecutor", start_method, directory=tmp_path)
    assert found.stdout == "unwound\n", found
    is_cancelled, mask = found.seen  # type: ignore[misc]
    assert is_cancelled and signal.SIGUSR1 in mask and signal.SIGINT not in mask


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_tasks_per_child(start_method: str, tmp_path: Path) -> None:
    """A worker is replaced after so many calls, and its successor initialized. (ProcessPoolExecutor may hang here.)"""
    found = run_case(cases.tasks_per_child, "ScalerExecutor", start_method, directory=tmp_path)
    assert found.seen == [([1] * 7, {"here"}), ([3, 3, 1], {"here"})], found.stderr


# Start-up hooks

HOOK = """
import os, sys
sys.hooked_in = getattr(sys, "hooked_in", 0) + 1
"""


@pytest.mark.parametrize("start_method", START_METHODS)
def test_start_up_hooks(start_method: str, tmp_path: Path) -> None:
    """What site runs at the start of an interpreter has been run, once, in each worker."""
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import multiprocessing
import sys
from scaler_executor import ScalerExecutor
def hooked():
    import sys
    return sys.hooked_in
if __name__ == "__main__":
    with ScalerExecutor(1, multiprocessing.get_context({start_method!r})) as executor:
        print(executor.submit(hooked).result())
"""
    )
    root = Path(__file__).parent.parent.parent
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(root)]))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("1\n", "")


MEASURED = """
def covered(value):
    if value:
        return 1
    return 2
"""

PROGRAM = """
import multiprocessing
from scaler_executor import ScalerExecutor
from measured import covered
if __name__ == "__main__":
    with ScalerExecutor(1, multiprocessing.get_context({method!r})) as executor:
        executor.submit(covered, 1).result()
"""


@pytest.mark.parametrize(
    ("start_method", "concurrency"), [*((method, "multiprocessing") for method in START_METHODS), ("spawn", "thread")]
)
def test_coverage(start_method: str, concurrency: str, tmp_path: Path) -> None:
    """Lines that only workers run are measured, by COVERAGE_PROCESS_START and the hook that coverage describes."""
    coverage = pytest.importorskip("coverage")
    (tmp_path / "measured.py").write_text(MEASURED)
    (tmp_path / "program.py").write_text(PROGRAM.format(method=start_method))
    (tmp_path / "sitecustomize.py").write_text("import coverage; coverage.process_startup()\n")
    data = tmp_path / "data"
    data.mkdir()
    configuration = tmp_path / "coveragerc"
    configuration.write_text(
        f"[run]\nconcurrency = {concurrency}\nparallel = true\nsource = {tmp_path}\ndata_file = {data}/coverage\n"
    )
    root = Path(__file__).parent.parent.parent
    path = [str(tmp_path), str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path), COVERAGE_PROCESS_START=str(configuration))
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = coverage.CoverageData(str(data / "combined"))
    for file in data.glob("coverage.*"):
        part = coverage.CoverageData(str(file))
        part.read()
        found.update(part)
    lines = found.lines(str(tmp_path / "measured.py"))
    assert {3, 4} <= set(lines) and 5 not in lines
