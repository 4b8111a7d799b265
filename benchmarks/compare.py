"""Compare ScalerExecutor with ProcessPoolExecutor: rates, latency, CPU time, cold start, and cancel.

All contenders are measured in the same run, in turn, round after round, so that a machine's changing mood hits each of
them. A cell is the median over the rounds; a ratio, the thing to look at, is the median of the ratios of single rounds.
Every result is checked. The calls are builtins, which any worker can import whatever the start method.

    python benchmarks/compare.py --quick
    python benchmarks/compare.py --json figures.json
    python benchmarks/compare.py --all --json figures.json --markdown table.md --plots .

With --all, so are ThreadPoolExecutor, multiprocessing.Pool, and what is installed of other libraries; the plots need
matplotlib: `pip install -e '.[benchmarks]'`. What fails is left out from then on, and said.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from copy import copy
from dataclasses import asdict, dataclass
from operator import pos
from pathlib import Path

from contenders import CONTENDERS, FORK, OURS, SPAWN, Contender, all_contenders, versions

from scaler_executor import ScalerExecutor

_PATIENCE_S = 60.0

#: {label: seconds} that calls sleep.
DURATIONS = {"0.1 ms": 1e-4, "1 ms": 1e-3, "10 ms": 1e-2}
#: {label: (bytes of an argument that comes back, how many times)}
PAYLOADS = {"10 KB": (10_000, 500), "1 MB": (1_000_000, 20), "10 MB": (10_000_000, 4)}

#: {metric: (unit, True if more is better)}, in the order of the table.
METRICS = {
    "submit": ("calls/s", True),
    "map": ("items/s", True),
    **{f"calls of {label}": ("calls/s", True) for label in DURATIONS},
    **{f"echo of {label}": ("MB/s", True) for label in PAYLOADS},
    "round trip p50": ("us", False),
    "round trip p99": ("us", False),
    "CPU per call": ("us", False),
    "cold start": ("s", False),
    "cancel p50": ("ms", False),
    "cancel max": ("ms", False),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `map_items_peer` is less because the peers' map is slow and only its rate counts."""

    rounds: int = 7
    workers: int = 2
    calls: int = 10_000
    map_items: int = 100_000
    map_items_peer: int = 10_000
    round_trips: int = 1_000
    cold_starts: int = 2
    cancels: int = 10


QUICK = Sizes(rounds=3, calls=2_000, map_items=50_000, map_items_peer=2_000, round_trips=300, cold_starts=1, cancels=5)


def measure(contender: Contender, sizes: Sizes) -> dict[str, float]:
    """Measure one contender once; returns {metric: value}."""
    figures = {}
    with contender.make(sizes.workers) as executor:
        _warm_up(executor, sizes.workers)
        figures["round trip p50"], figures["round trip p99"] = _round_trip(executor, sizes.round_trips)
        figures["submit"], figures["CPU per call"] = _submit(executor, sizes.calls)
        figures["map"] = _map(executor, sizes.map_items if contender.maps_fast else sizes.map_items_peer)
        for label, duration_s in DURATIONS.items():
            figures[f"calls of {label}"] = _sleeping(executor, duration_s)
        for label, (size_bytes, times) in PAYLOADS.items():
            figures[f"echo of {label}"] = _echo(executor, size_bytes, times)
        if isinstance(executor, ScalerExecutor):
            figures["cancel p50"], figures["cancel max"] = _cancel(executor, sizes.workers, sizes.cancels)
    figures["cold start"] = _cold_start(contender.cold_start_program.format(workers=sizes.workers), sizes.cold_starts)
    return figures


def _warm_up(executor: Executor, workers: int) -> None:
    """Have every worker started: each needs to be busy for the next one to be."""
    for future in [executor.submit(time.sleep, 0.1) for _ in range(workers)]:
        future.result(timeout=_PATIENCE_S)
    for number in range(200):
        executor.submit(pos, number).result(timeout=_PATIENCE_S)


def _round_trip(executor: Executor, round_trips: int) -> tuple[float, float]:
    """Return p50 and p99, in us, of one call after the other."""
    samples = []
    for number in range(round_trips):
        start_s = time.perf_counter()
        result = executor.submit(pos, number).result()
        samples.append((time.perf_counter() - start_s) * 1e6)
        _check(result == number, "a call returns its own result")
    samples.sort()
    return samples[len(samples) // 2], samples[len(samples) * 99 // 100]


def _submit(executor: Executor, calls: int) -> tuple[float, float]:
    """Return calls/s, from the first submit to the last result read, and CPU time per call in us."""
    before = cpu_times()
    start_s = time.perf_counter()
    futures = [executor.submit(pos, number) for number in range(calls)]
    results = [future.result() for future in futures]
    elapsed_s = time.perf_counter() - start_s
    after = cpu_times()
    _check(results == list(range(calls)), "submitted calls return their own results")
    used_s = sum(cpu_s - before.get(pid, 0.0) for pid, cpu_s in after.items())
    return calls / elapsed_s, used_s / calls * 1e6


def _map(executor: Executor, items: int) -> float:
    """Return items/s of map with its default arguments."""
    start_s = time.perf_counter()
    results = list(executor.map(pos, range(items)))
    elapsed_s = time.perf_counter() - start_s
    _check(results == list(range(items)), "map yields its results in order")
    return items / elapsed_s


def _sleeping(executor: Executor, duration_s: float) -> float:
    """Return calls/s of calls that sleep, about half a second's work."""
    calls = int(min(2000, 1 / duration_s))
    start_s = time.perf_counter()
    for future in [executor.submit(time.sleep, duration_s) for _ in range(calls)]:
        future.result()
    return calls / (time.perf_counter() - start_s)


def _echo(executor: Executor, size_bytes: int, times: int) -> float:
    """Return MB/s of arguments that come back, each way counted."""
    block = bytearray(size_bytes)
    start_s = time.perf_counter()
    for future in [executor.submit(copy, block) for _ in range(times)]:
        _check(len(future.result()) == size_bytes, "a payload comes back whole")
    return 2e-6 * size_bytes * times / (time.perf_counter() - start_s)


def _cancel(executor: ScalerExecutor, workers: int, cancels: int) -> tuple[float, float]:
    """Return p50 and maximum, in ms, from the cancel of a sleep in every worker until a next call's result."""
    samples = []
    for number in range(cancels):
        futures = [executor.submit(time.sleep, _PATIENCE_S) for _ in range(workers)]
        deadline_s = time.monotonic() + _PATIENCE_S
        while not all(future.running() for future in futures):
            _check(time.monotonic() < deadline_s, "as many calls run as there are workers")
            time.sleep(0.001)
        start_s = time.perf_counter()
        executor.cancel(futures)
        result = executor.submit(pos, number).result(timeout=_PATIENCE_S)
        samples.append((time.perf_counter() - start_s) * 1e3)
        _check(all(future.cancelled() for future in futures), "cancelled calls are cancelled")
        _check(result == number, "a call after a cancel returns its own result")
    return statistics.median(samples), max(samples)


def _cold_start(program: str, repeats: int) -> float:
    """Return the median seconds of a fresh interpreter that makes an executor, runs one call and exits."""
    samples = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            stdin=subprocess.DEVNULL,
            timeout=_PATIENCE_S,
            cwd=Path(__file__).parent,
        )
        samples.append(time.perf_counter() - start_s)
    return statistics.median(samples)


def cpu_times() -> dict[int, float]:
    """Return {pid: CPU seconds of all its threads} of this process and its descendants.

    Each process has a CPU clock that others may read; unlike the ticks of /proc/<pid>/stat it counts nanoseconds.
    """
    times = {}
    for pid in [os.getpid(), *descendants(os.getpid())]:
        try:
            times[pid] = time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) makes it
        except OSError:
            continue  # it has ended since it was listed
    return times


def descendants(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        parent = int(text.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(stat.parent.name))
    pending = [root]
    while pending:
        found = children.get(pending.pop(), [])
        pending.extend(found)
        yield from found


def _check(condition: bool, claim: str) -> None:
    """As assert, also under -O: figures of wrong results are worth nothing."""
    if not condition:
        raise SystemExit(f"not so, so nothing was measured: {claim}")


def summarize(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return {metric: {"median": {contender: value}, "ratio": {peer: ours over the peer's}}}."""
    summary = {}
    for metric in METRICS:
        medians = {
            name: statistics.median(figures[name][metric] for figures in rounds)
            for name in rounds[0]
            if metric in rounds[0][name]
        }
        ratios = {
            peer: statistics.median(figures[OURS][metric] / figures[peer][metric] for figures in rounds)
            for peer in medians
            if peer != OURS and OURS in medians
        }
        summary[metric] = {"median": medians, "ratio": ratios}
    return summary


def print_table(summary: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the medians and ratios, one metric a line."""
    names = list(summary["submit"]["median"])
    print(f"{'':<24}" + "".join(f"{name:>21}" for name in names) + f"{'to fork':>10}{'to spawn':>10}")
    for metric, (unit, more_is_better) in METRICS.items():
        medians, ratios = summary[metric]["median"], summary[metric]["ratio"]
        cells = "".join(f"{_number(medians.get(name)):>21}" for name in names)
        cells += "".join(f"{f'{ratios[peer]:.2f}x' if peer in ratios else '-':>10}" for peer in (FORK, SPAWN))
        print(f"{f'{metric}, {unit}':<24}{cells}  {'more' if more_is_better else 'less'} is better")


def markdown(
    summary: dict[str, dict[str, dict[str, float]]], environment: dict[str, object], left_out: dict[str, str]
) -> str:
    """Return the medians as a table, each with its ratio to ProcessPoolExecutor's with fork."""
    names = list(summary["submit"]["median"])
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for metric, (unit, more_is_better) in METRICS.items():
        medians = summary[metric]["median"]
        cells = []
        for name in names:
            cell = _number(medians.get(name))
            if name != FORK and name in medians and FORK in medians:
                cell += f" ({medians[name] / medians[FORK]:.2g} x)"
            cells.append(cell)
        lines.append(f"| {metric}, {unit} ({'more' if more_is_better else 'less'} is better) | {' | '.join(cells)} |")
    lines += ["", f"In brackets: to {FORK}. " + ", ".join(f"{key} {value}" for key, value in environment.items()) + "."]
    lines += [f"Not measured: {name} ({why})." for name, why in left_out.items()]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _parse() -> tuple[Sizes, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Compare ScalerExecutor with ProcessPoolExecutor.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer calls: a glance, not a measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds and the summary there")
    parser.add_argument("--all", action="store_true", help="all contenders that are installed")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="write plots there, as PNG")
    parser.add_argument("--one-cpu", action="store_true", help="pin everything to one CPU: no waking of another core")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each contender is measured")
    parser.add_argument("--calls", type=int, metavar="N", help="how many calls are submitted at once")
    arguments = parser.parse_args()
    overrides = {key: value for key in ("rounds", "calls") if (value := getattr(arguments, key)) is not None}
    return Sizes(**{**asdict(QUICK if arguments.quick else Sizes()), **overrides}), arguments


def main() -> None:
    """Measure, print the table, and write the figures if asked to."""
    sizes, arguments = _parse()
    if arguments.one_cpu:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    environment: dict[str, object] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        **versions(),
    }
    print(", ".join(f"{key} {value}" for key, value in environment.items()))

    contenders, missing = all_contenders() if arguments.all else (dict(CONTENDERS), [])
    left_out = dict.fromkeys(missing, "not installed")
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(sizes.rounds):
        print(f"round {number + 1} of {sizes.rounds}", file=sys.stderr, flush=True)
        names = list(contenders)
        turn = number % len(names)  # nobody always goes first
        found = {}
        for name in names[turn:] + names[:turn]:
            print(f"    {name}", file=sys.stderr, flush=True)
            try:
                found[name] = measure(contenders[name], sizes)
            except Exception as error:
                if name in CONTENDERS:
                    raise
                left_out[name] = f"{type(error).__name__}: {error}"
                del contenders[name]
        rounds.append(found)
    rounds = [{name: found[name] for name in contenders} for found in rounds]

    summary = summarize(rounds)
    print_table(summary)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(summary, environment, left_out))
    if arguments.plots:
        from plots import write_plots

        write_plots(summary, list(DURATIONS.items()), list(PAYLOADS.items()), arguments.plots)
    if arguments.json:
        report = {
            "environment": environment,
            "left_out": left_out,
            "sizes": asdict(sizes),
            "summary": summary,
            "rounds": rounds,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
