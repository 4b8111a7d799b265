"""Measure what grows with the number of queued calls, of workers and of executors: nothing per call should.

    python benchmarks/scale.py --quick
    python benchmarks/scale.py --json figures.json

Queued calls: a worker is kept busy, so many calls are submitted behind it, then it is let go. The bytes are those of
all processes (PSS), CPU time is of all processes. Workers: calls that sleep 20 ms. Executors: opened, used once each
while all others are open, and closed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from operator import pos
from pathlib import Path

from processes import cpu_times, descendants, pss_bytes

from scaler_executor import ScalerExecutor


def wait_for_file(path: str) -> None:
    """Return when there is this file."""
    while not os.path.exists(path):
        time.sleep(0.001)


def queued(calls: int) -> dict[str, float]:
    """Return what each of so many calls costs that are all submitted before the first one is run."""
    with tempfile.TemporaryDirectory() as directory, ScalerExecutor(1) as executor:
        for number in range(200):
            executor.submit(pos, number).result()
        path = os.path.join(directory, "go")
        held = executor.submit(wait_for_file, path)
        empty_bytes, cpu = pss_bytes(os.getpid()), cpu_times()
        began = time.perf_counter()
        futures = [executor.submit(pos, number) for number in range(calls)]
        submit_s = time.perf_counter() - began
        time.sleep(0.2 + calls * 2e-6)  # until they have got where they wait
        per_call_bytes = (pss_bytes(os.getpid()) - empty_bytes) / calls
        Path(path).touch()
        held.result()
        began = time.perf_counter()
        assert futures[0].result() == 0
        first_s = time.perf_counter() - began
        assert sum(future.result() for future in futures) == calls * (calls - 1) // 2
        run_s = time.perf_counter() - began
        used_s = sum(seconds - cpu.get(pid, 0.0) for pid, seconds in cpu_times().items())
    return {
        "submit, calls/s": calls / submit_s,
        "both, calls/s": calls / (submit_s + run_s),
        "CPU, us/call": used_s / calls * 1e6,
        "bytes/call": per_call_bytes,
        "first result, ms": first_s * 1e3,
    }


def sleeping(workers: int, calls: int) -> dict[str, float]:
    """Return how near so many workers come to their number in calls of 20 ms."""
    with ScalerExecutor(workers) as executor:
        list(executor.map(time.sleep, [0.2] * workers))
        cpu = cpu_times()
        began = time.perf_counter()
        for future in [executor.submit(time.sleep, 0.02) for _ in range(calls * workers)]:
            future.result()
        took_s = time.perf_counter() - began
        used_s = sum(seconds - cpu.get(pid, 0.0) for pid, seconds in cpu_times().items())
    return {
        "calls/s": calls * workers / took_s,
        "of what is possible": calls * 0.02 / took_s,
        "CPU, us/call": used_s / calls / workers * 1e6,
    }


def many_executors(count: int) -> dict[str, float]:
    """Return what it takes to have so many executors at once."""
    fds = len(os.listdir("/proc/self/fd"))
    before = pss_bytes(os.getpid())
    executors: list[ScalerExecutor] = []
    opened, used = [], []
    for number in range(count):
        began = time.perf_counter()
        executors.append(ScalerExecutor(1))
        opened.append(time.perf_counter() - began)
        assert executors[-1].submit(pos, number).result() == number
        used.append(time.perf_counter() - began)
    memory = pss_bytes(os.getpid()) - before
    began = time.perf_counter()
    for executor in executors:
        executor.shutdown()
    closed_s = time.perf_counter() - began
    left = len(os.listdir("/proc/self/fd")) - fds
    assert left <= 0, f"{left} descriptors are left"
    assert not list(descendants(os.getpid())), "processes are left"
    few = max(1, count // 10)
    return {
        "opened, ms each": statistics.median(opened) * 1e3,
        "first result, ms": statistics.median(used) * 1e3,
        "of the last tenth, ms": statistics.median(used[-few:]) * 1e3,
        "closed, ms each": closed_s / count * 1e3,
        "MB each": memory / count / 1e6,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of everything and one round, for a first look")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    sizes = [1_000, 10_000, 100_000] if arguments.quick else [1_000, 10_000, 100_000, 1_000_000]
    cases: dict[str, Callable[[], dict[str, float]]] = {}
    for calls in sizes:
        cases[f"{calls:,} queued calls"] = lambda calls=calls: queued(calls)  # type: ignore[misc]
    for workers in (1, 2, 4, 16, 64):
        cases[f"{workers} workers asleep"] = lambda workers=workers: sleeping(workers, 20 if arguments.quick else 100)  # type: ignore[misc]
    count = 32 if arguments.quick else 256
    cases[f"{count} executors"] = lambda: many_executors(count)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for number in range(1 if arguments.quick else arguments.rounds):
        print(f"round {number + 1}", file=sys.stderr, flush=True)
        for name, case in cases.items():
            rounds[name].append(case())
    for name, found in rounds.items():
        cells = [f"{metric} {statistics.median(f[metric] for f in found):,.2f}" for metric in found[0]]
        print(f"{name:24} {'; '.join(cells)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
