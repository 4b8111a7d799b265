"""Measure what one client of a served cluster notices of another: round trips beside floods, deaths and huge payloads.

    python benchmarks/shared.py --quick
    python benchmarks/shared.py --rounds 5 --json figures.json

One client makes small calls one after the other, on loopback TCP with CURVE, while another process does its worst. Each
round measures it alone first: a figure is its median or 99th percentile in microseconds, and the median of the rounds'
ratios to the same when alone.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster import Cluster

from scaler_executor import ScalerExecutor

#: What the other client does: it prints a line when it is at it, and goes on until it is killed.
FLOOD = """
while True:
    futures = [executor.submit(time.sleep, 0.001) for _ in range(20_000)]
    print("begun", flush=True)
    futures[-1].result()
"""
RESULTS = """
futures = [executor.submit(bytes, 100_000) for _ in range(20_000)]
futures[0].result()
print("begun", flush=True)
futures[-1].result()
"""
HUGE = """
block = bytes(100 << 20)
while True:
    future = executor.submit(len, block)
    print("begun", flush=True)
    future.result()
"""
HEAD = """
import sys, time
from scaler_executor import ScalerExecutor
executor = ScalerExecutor(address=sys.argv[1])
"""


@contextmanager
def other(connection: Path, source: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Another client, which does what `source` says."""
    process = subprocess.Popen([sys.executable, "-c", HEAD + source, str(connection)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def round_trips(executor: ScalerExecutor, seconds: float) -> list[float]:
    """Return how long each of as many calls as fit took."""
    trips = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        executor.submit(abs, 1).result()
        trips.append(time.perf_counter() - began)
    return trips


def beside(source: str, act: Callable[["subprocess.Popen[bytes]"], None] = lambda process: None) -> "Scenario":
    def scenario(executor: ScalerExecutor, connection: Path, seconds: float) -> list[float]:
        with other(connection, source) as process:
            round_trips(executor, 0.5)  # until each has its share
            act(process)
            return round_trips(executor, seconds)

    return scenario


def dying(executor: ScalerExecutor, connection: Path, seconds: float) -> list[float]:
    trips: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        with other(connection, FLOOD) as process:
            round_trips(executor, 0.3)
            process.kill()
            trips += round_trips(executor, 0.3)
    return trips


def connected(count: int) -> "Scenario":
    def scenario(executor: ScalerExecutor, connection: Path, seconds: float) -> list[float]:
        made = [ScalerExecutor(address=connection) for _ in range(count)]
        try:
            for each in made:
                each.submit(abs, 1).result()
            return round_trips(executor, seconds)
        finally:
            for each in made:
                each.shutdown()

    return scenario


Scenario = Callable[[ScalerExecutor, Path, float], list[float]]
SCENARIOS: dict[str, Scenario] = {
    "alone again": lambda executor, connection, seconds: round_trips(executor, seconds),
    "beside 10 idle clients": connected(10),
    "beside a flood of 1 ms calls": beside(FLOOD),
    "after the death of one in its flood": dying,
    "beside one that is stopped, results of 2 GB": beside(RESULTS, lambda process: process.send_signal(signal.SIGSTOP)),
    "beside arguments of 100 MB": beside(HUGE),
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round, for a first look")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", help="scenarios with this in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    seconds = 1.0 if arguments.quick else 3.0
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(directory, 0, arguments.workers)
        try:
            for _ in range(1 if arguments.quick else arguments.rounds):
                for name, scenario in SCENARIOS.items():
                    if arguments.only and arguments.only not in name:
                        continue
                    with ScalerExecutor(address=cluster.connection) as executor:
                        round_trips(executor, 0.5)
                        alone = figures(round_trips(executor, seconds))
                        measured = figures(scenario(executor, cluster.connection, seconds))
                    for metric in ("p50", "p99"):
                        measured[f"{metric}, to alone"] = measured[metric] / alone[metric]
                    found.setdefault(name, []).append(measured)
        finally:
            with suppress(ProcessLookupError):
                cluster.stop()
    medians = {
        name: {metric: statistics.median(figures[metric] for figures in rounds) for metric in rounds[0]}
        for name, rounds in found.items()
    }
    print(f"{'':45} {'p50, us':>9} {'to alone':>9} {'p99, us':>9} {'to alone':>9} {'max, us':>9}")
    for name, cells in medians.items():
        print(
            f"{name:45} {cells['p50']:9.0f} {cells['p50, to alone']:9.2f} {cells['p99']:9.0f}"
            f" {cells['p99, to alone']:9.2f} {cells['max']:9.0f}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(medians, indent=1))


def figures(trips: list[float]) -> dict[str, float]:
    trips = sorted(trips)
    return {"p50": trips[len(trips) // 2] * 1e6, "p99": trips[len(trips) * 99 // 100] * 1e6, "max": trips[-1] * 1e6}


if __name__ == "__main__":
    main()
