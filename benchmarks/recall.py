"""Measure how long a call waits behind a running one while a worker is idle: 50 ms at most, says DESIGN.

    python benchmarks/recall.py --quick
    python benchmarks/recall.py --json figures.json

Short calls are given to workers several at a time, and one of them may turn out to be long. So here they are 10 us but
for a few that last a second: asleep, or in C code that does not let go of the GIL. Each call says where and when it
ran; a call's figure is the longest time that it was submitted and not begun, while one and the same worker did nothing.
What a worker needs from one call to the next, on a busy machine, is part of it.
"""

import argparse
import bisect
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaler_executor import ScalerExecutor

#: Shorter pauses of a worker are not looked at.
PAUSE_S = 0.0005
#: How many turns of a loop in C last a second here; set by `main`.
turns_per_s = 0.0

#: (pid, when it began, when it ended, on a clock that all processes share)
Ran = tuple[int, float, float]


def rest(duration_s: float) -> Ran:
    """Sleep, or for 10 us and less do something."""
    began = time.monotonic()
    if duration_s > 1e-5:
        time.sleep(duration_s)
    else:
        while time.monotonic() - began < duration_s:
            pass
    return os.getpid(), began, time.monotonic()


def hold(duration_s: float, turns: float) -> Ran:
    """As `rest`, but in one call of C code."""
    began = time.monotonic()
    sum(itertools.repeat(1, int(duration_s * turns)))
    return os.getpid(), began, time.monotonic()


def submitted(executor: ScalerExecutor, durations_s: list[float], holds: bool) -> Iterator[tuple[float, Ran]]:
    """Submit a call for each. Yield when it was submitted, and where it ran."""
    at, futures = [], []
    for duration_s in durations_s:
        at.append(time.monotonic())
        futures.append(executor.submit(hold, duration_s, turns_per_s) if holds else executor.submit(rest, duration_s))
    yield from zip(at, [future.result() for future in futures], strict=True)


def mapped(executor: ScalerExecutor, durations_s: list[float], holds: bool) -> Iterator[tuple[float, Ran]]:
    """As above, with one map, whose items count as submitted when it is called."""
    at = time.monotonic()
    if holds:
        results: Any = executor.map(hold, durations_s, [turns_per_s] * len(durations_s))
    else:
        results = executor.map(rest, durations_s)
    yield from ((at, ran) for ran in results)


def waits(calls: list[tuple[float, Ran]], workers: int) -> list[float]:
    """Return for each call how long it waited while one worker was idle, in seconds."""
    ran: dict[int, list[tuple[float, float]]] = {}
    for _, (pid, began, ended) in calls:
        ran.setdefault(pid, []).append((began, ended))
    assert len(ran) <= workers, ran.keys()
    pauses = []
    last = max(ended for _, (_, _, ended) in calls)
    first = min(at for at, _ in calls)
    for spans in ran.values():
        spans.append((first, first))
        spans.sort()
        begins = [*(began for began, _ in spans[1:]), last]
        pauses += [(ended, begun) for (_, ended), begun in zip(spans, begins, strict=True) if begun - ended >= PAUSE_S]
    pauses.sort()
    ends = list(itertools.accumulate((until for _, until in pauses), max))
    found = []
    for at, (_, began, _) in calls:
        longest = 0.0
        for since, until in pauses[bisect.bisect_left(ends, at) :]:
            if since >= began:
                break
            longest = max(longest, min(until, began) - max(since, at))
        found.append(longest)
    return found


def measure(workers: int, calls: int, long_s: float, holds: bool, way: Any, rng: random.Random) -> dict[str, float]:
    """Return the figures of one mix, with a long call among each 250 of 10 us."""
    durations_s = [1e-5] * calls
    for index in range(0, calls, 250):
        durations_s[index + rng.randrange(250)] = long_s
    with ScalerExecutor(workers) as executor:
        list(executor.map(time.sleep, [0.1] * workers))
        found = sorted(waits(list(way(executor, durations_s, holds)), workers))
    return {
        "p50, ms": found[len(found) // 2] * 1e3,
        "p99, ms": found[len(found) * 99 // 100] * 1e3,
        "max, ms": found[-1] * 1e3,
    }


def main() -> None:
    """Run the benchmark."""
    global turns_per_s
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer calls and one round, for a first look")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    calls, long_s = (2000, 0.3) if arguments.quick else (5000, 1.0)
    began = time.perf_counter()
    sum(itertools.repeat(1, 3_000_000))
    turns_per_s = 3_000_000 / (time.perf_counter() - began)
    rng = random.Random(1)
    cases = {
        f"{kind}, {name}, {workers} workers": (workers, holds, way)
        for kind, holds in (("asleep", False), ("holding the GIL", True))
        for name, way in (("submit", submitted), ("map", mapped))
        for workers in (2, 4)
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for _ in range(1 if arguments.quick else arguments.rounds):
        for name, (workers, holds, way) in cases.items():
            rounds[name].append(measure(workers, calls, long_s, holds, way, rng))
    print(f"{'worst of the rounds':36}{'p50, ms':>10}{'p99, ms':>10}{'max, ms':>10}")
    for name, figures in rounds.items():
        print(f"{name:36}" + "".join(f"{max(f[m] for f in figures):10.1f}" for m in figures[0]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
