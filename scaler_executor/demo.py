"""The demo: `scaler-executor demo` analyses the standard library's source files, and on the way cancels and crashes.

It runs calls through nothing but the package's public names. Every run's results are compared with those of a plain
loop, and what is not as promised makes the exit code 1. The functions that run in workers are the public ones of this
module: workers import them by name, whatever the start method.
"""

import ast
import itertools
import os
import platform
import signal
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaler_executor import CancelOutcome, ScalerExecutor, ScalerFuture, WorkerDiedError
from scaler_executor.runtime.cgroups import cpu_count_usable

#: About the whole library without its tests. A plain loop takes some seconds for it, and the demo does it four times.
_SAMPLE_BYTES = 12_000_000
#: Beyond it something hangs, and the demo fails instead of hanging too.
_PATIENCE_S = 60.0
_MOST_COMPLEX = 10
#: How many files the map with a crash in its middle reads ahead: the fatal call comes right behind them.
_AHEAD = 64

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)


@dataclass(frozen=True, order=True)
class FunctionReport:
    """One function: the most complex sort last."""

    branches: int
    path: str
    line: int
    name: str


@dataclass(frozen=True)
class SourceReport:
    """What `analyse` found in one file; `functions` are all of its functions and methods."""

    path: str
    lines: int
    classes: int
    functions: tuple[FunctionReport, ...]


def analyse(path: str) -> SourceReport:
    """Parse one source file, count its lines, classes and functions, and the branches of each function."""
    source = Path(path).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in an old module is none of our user's business
        tree = ast.parse(source, path)
    functions = []
    classes = 0
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS):
            functions.append(FunctionReport(_count_branches(node), path, node.lineno, node.name))
        elif isinstance(node, ast.ClassDef):
            classes += 1
    return SourceReport(path, len(source.splitlines()), classes, tuple(functions))


def _count_branches(function: ast.AST) -> int:
    branches = 0
    for node in ast.walk(function):
        if isinstance(node, _BRANCHES):
            branches += 1
        elif isinstance(node, ast.BoolOp):
            branches += len(node.values) - 1
    return branches


def tick(path: str) -> None:
    """Append a byte to the file again and again: Python code that shows from outside whether it still runs.

    It ends after half a minute, so that a cancel that does not work is a failed check and not a hang.
    """
    with open(path, "ab", buffering=0) as file:
        for _ in range(30_000):
            file.write(b".")
            time.sleep(0.001)


def count_in_c(path: str) -> int:
    """Write the worker's process id to the file, then stay in C code that looks for no signal and keeps the GIL."""
    Path(path).write_text(str(os.getpid()))
    return sum(itertools.repeat(1, 3_000_000_000))


def kill_worker() -> None:
    """Kill the worker that runs this call, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Finding:
    """A row of the closing table."""

    what: str
    text: str
    as_promised: bool = True


def run(*, workers: int | None = None) -> int:
    """Run the demo.

    Args:
        workers: The number of worker processes; None means one per CPU that this process may use.

    Returns:
        The exit code: 0 when everything was as promised, else 1.
    """
    workers = workers or cpu_count_usable()
    paths = choose_sources(Path(sysconfig.get_path("stdlib")), limit_bytes=_SAMPLE_BYTES)
    print(
        f"{len(paths)} source files of Python {platform.python_version()}'s standard library, "
        f"{_count(workers, 'worker')}"
    )

    serial, serial_s = _timed("one by one", len(paths), lambda: map(analyse, paths))
    _, peer_s = _timed("ProcessPoolExecutor", len(paths), lambda: _map(ProcessPoolExecutor(workers), paths))
    ours, ours_s = _timed("ScalerExecutor", len(paths), lambda: _map(ScalerExecutor(workers), paths))
    _print_most_complex(ours)

    equal = sum(a == b for a, b in zip(ours, serial, strict=True))
    findings = [
        Finding("results", f"{equal} of {len(paths)} equal to the plain loop's", equal == len(paths)),
        Finding("time", f"{ours_s:.2f} s (ProcessPoolExecutor {peer_s:.2f} s, plain loop {serial_s:.2f} s)"),
    ]
    with tempfile.TemporaryDirectory(prefix="scaler-executor-demo-") as directory, ScalerExecutor(workers) as executor:
        findings.append(_cancel_python_code(executor, Path(directory, "ticks")))
        findings.append(_cancel_c_code(executor, Path(directory, "pid")))
        findings.append(_crash(executor, paths, serial, undisturbed_s=ours_s))
    return _print_table(findings)


def choose_sources(root: Path, *, limit_bytes: int) -> list[str]:
    """Return source files below root, about `limit_bytes` of them: each nth by size, so always the same ones."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    sized = sorted(
        (path.stat().st_size, str(path))
        for path in root.rglob("*.py")
        if left_out.isdisjoint(path.relative_to(root).parts)
    )
    nth = max(1, round(sum(size for size, _ in sized) / limit_bytes))
    return [path for _, path in sized[::-nth]]


def _map(executor: Executor, paths: Sequence[str]) -> Iterator[SourceReport]:
    """Yield the reports in the order of paths: the same line for either executor."""
    with executor:
        yield from executor.map(analyse, paths, timeout=_PATIENCE_S)


def _timed(title: str, total: int, reports: Callable[[], Iterable[SourceReport]]) -> tuple[list[SourceReport], float]:
    """Collect the reports; the time includes starting the executor and shutting it down."""
    start_s = time.perf_counter()
    collected = list(_with_progress(title, total, reports()))
    return collected, time.perf_counter() - start_s


def _with_progress(title: str, total: int, reports: Iterable[SourceReport]) -> Iterator[SourceReport]:
    """Pass the reports on under a progress line, which is rewritten on a terminal and printed once elsewhere."""
    on_terminal = sys.stdout.isatty()
    files = lines = 0
    for report in reports:
        files += 1
        lines += report.lines
        if on_terminal and (files % 16 == 0):
            print(f"\r  {title:<20} {files:>4}/{total} files, {lines:>7,} lines", end="", flush=True)
        yield report
    print(f"{chr(13) if on_terminal else ''}  {title:<20} {files:>4}/{total} files, {lines:>7,} lines", flush=True)


def _cancel_python_code(executor: ScalerExecutor, path: Path) -> Finding:
    """Cancel a Python loop; its file must have stopped growing when cancel() returns."""
    future = executor.submit(tick, str(path))
    _wait_for_content(path)
    elapsed_s = _cancel(future)
    ticks = path.stat().st_size
    next_s = _next_result(executor)
    time.sleep(0.05)
    stopped = future.cancel_outcome is CancelOutcome.CANCELED and path.stat().st_size == ticks
    return _cancel_finding("cancel of a Python loop", future, elapsed_s, next_s, stopped)


def _cancel_c_code(executor: ScalerExecutor, path: Path) -> Finding:
    """Cancel a call that no signal handler can reach; its process must be gone when cancel() returns."""
    future = executor.submit(count_in_c, str(path))
    _wait_for_content(path)
    elapsed_s = _cancel(future)
    stopped = future.cancel_outcome is CancelOutcome.CANCELED and not _is_alive(int(path.read_text()))
    return _cancel_finding("cancel of C code", future, elapsed_s, _next_result(executor), stopped)


def _cancel(future: ScalerFuture[Any]) -> float:
    start_s = time.perf_counter()
    future.cancel()
    return time.perf_counter() - start_s


def _next_result(executor: ScalerExecutor) -> float:
    """Return the seconds until a next call's result; a cancelled call's worker has been replaced by then."""
    start_s = time.perf_counter()
    executor.submit(os.getpid).result(timeout=_PATIENCE_S)
    return time.perf_counter() - start_s


def _cancel_finding(what: str, future: ScalerFuture[Any], elapsed_s: float, next_s: float, stopped: bool) -> Finding:
    outcome = future.cancel_outcome.name if future.cancel_outcome else "no outcome"
    code = "code has stopped" if stopped else "code still runs"
    text = f"{outcome} after {elapsed_s * 1e3:.1f} ms, {code}, next result {next_s * 1e3:.1f} ms later"
    print(f"  {what}: {text}")
    return Finding(what, text, stopped and future.cancelled())


def _crash(
    executor: ScalerExecutor, paths: Sequence[str], expected: Sequence[SourceReport], *, undisturbed_s: float
) -> Finding:
    """Map all files, and in the middle submit a call that kills its worker; only that call may fail."""
    start_s = time.perf_counter()
    reports = executor.map(analyse, paths, timeout=_PATIENCE_S, buffersize=min(_AHEAD, len(paths) // 4))
    survivors = []
    fatal: ScalerFuture[None] | None = None
    for report in _with_progress("a worker is killed", len(paths), reports):
        survivors.append(report)
        if len(survivors) == len(paths) // 2:
            fatal = executor.submit(kill_worker)
    assert fatal is not None
    is_in_the_middle = fatal.done()
    error = fatal.exception(timeout=_PATIENCE_S)
    elapsed_s = time.perf_counter() - start_s

    equal = sum(a == b for a, b in zip(survivors, expected, strict=True))
    print(f"  {type(error).__name__}: {error}")
    return Finding(
        "crash in a map",
        f"cost the call that crashed ({type(error).__name__}), no file; {equal} of {len(paths)} results verified; "
        f"{elapsed_s:.2f} s ({undisturbed_s:.2f} s without)",
        isinstance(error, WorkerDiedError) and is_in_the_middle and equal == len(paths),
    )


def _wait_for_content(path: Path) -> None:
    """Wait until a call has written to its file, and so runs."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while not (path.exists() and path.stat().st_size):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"a call has not started within {_PATIENCE_S:.0f} s")
        time.sleep(0.001)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _print_most_complex(reports: Sequence[SourceReport]) -> None:
    functions = sorted(function for report in reports for function in report.functions)
    classes = sum(report.classes for report in reports)
    print(f"\n{len(functions):,} functions, {classes:,} classes. The most complex functions:\n")
    for function in functions[: -_MOST_COMPLEX - 1 : -1]:
        place = os.path.relpath(function.path, sysconfig.get_path("stdlib"))
        print(f"  {function.branches:>4} branches  {function.name:<28} {place}:{function.line}")
    print()


def _print_table(findings: Sequence[Finding]) -> int:
    """Print the table and return the exit code."""
    print()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"  {'ok' if finding.as_promised else 'WRONG':<5}  {finding.what:<{width}}  {finding.text}")
    wrong = sum(not finding.as_promised for finding in findings)
    print(f"\n{'Everything as promised.' if not wrong else f'{wrong} not as promised.'}")
    return 1 if wrong else 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
