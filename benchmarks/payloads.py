"""Compare ScalerExecutor with ProcessPoolExecutor on large data: arguments, results, a global of `__main__`, memory.

Each contender runs in a process of its own, in turn, round after round, so that a machine's changing mood hits all of
them; a ratio is the median of the ratios of single rounds. Memory is measured in rounds of its own, since looking costs
time: the most that all processes of the contender have together (PSS: a shared page counts once), and the most that
shared memory holds meanwhile, which counts in no process where it is not mapped.

    python benchmarks/payloads.py --quick
    python benchmarks/payloads.py --json figures.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, FORK, OURS
from metrics import MB, Sizes, argument_rate, array_to_calls, check, echo, echo_of_array, last, make_array
from metrics import measure as measure_group
from processes import watch

NAMES = (OURS, FORK)
WORKERS = 2

#: {metric: (unit, True if more is better)}, in the order of the table.
METRICS = {
    "echo of a 100 MB array": ("s", False),
    "echo of 100 MB bytes": ("s", False),
    "one 100 MB array to 20 calls": ("s", False),
    "changed array to 20 calls": ("s", False),
    "100 MB global of __main__, 20 calls": ("s", False),
    "10k calls of 10 KB": ("MB/s", True),
    "200 calls of 1 MB": ("MB/s", True),
    "200 echoes of 1 MB": ("MB/s", True),
    "peak PSS of the echo": ("MB", False),
    "peak shared memory of the echo": ("MB", False),
}

#: A global, so that calls may use it by name; set after the executor has started, so that no fork inherits it.
data: Any = None


def last_of_global(factor: int) -> float:
    return factor * float(data[-1])


def timed(function: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    function()
    return time.perf_counter() - start_s


def measure(name: str, repeats: int) -> dict[str, float]:
    """Measure one contender, in this process."""
    global data
    figures: dict[str, float] = {}
    with CONTENDERS[name].make(WORKERS) as executor:
        for future in [executor.submit(time.sleep, 0.1) for _ in range(WORKERS)]:
            future.result()
        array = make_array()
        large = bytes(100 * MB)

        def changed_array() -> None:
            futures = []
            for number in range(20):
                array[-1] = number
                futures.append(executor.submit(last, array))
            results = [future.result() for future in futures]
            # The standard library pickles some time after `submit`.
            check(name == FORK or results == list(range(20)), "each call sees the array as it was when it was made")

        def by_global() -> None:
            futures = [executor.submit(last_of_global, number) for number in range(20)]
            check(futures[3].result() == 3 * data[-1], "each call sees the global")
            for future in futures:
                future.result()

        def echoes() -> None:
            futures = [executor.submit(echo, bytes(MB)) for _ in range(200)]
            check([len(future.result()) for future in futures] == [MB] * 200, "bytes come back")

        check(executor.submit(echo, array).result().flags.writeable, "an array comes back writable")
        figures["echo of a 100 MB array"] = min(echo_of_array(executor, array) for _ in range(repeats))
        figures["echo of 100 MB bytes"] = min(
            timed(lambda: check(executor.submit(echo, large).result() == large, "bytes come back"))
            for _ in range(repeats)
        )
        figures["one 100 MB array to 20 calls"] = array_to_calls(executor, array, 20)
        figures["changed array to 20 calls"] = timed(changed_array)
        if name == OURS:
            data = make_array()
            figures["100 MB global of __main__, 20 calls"] = timed(by_global)
        figures["10k calls of 10 KB"] = argument_rate(executor, bytes(10_000), 10_000)
        figures["200 calls of 1 MB"] = argument_rate(executor, bytes(MB), 200)
        figures["200 echoes of 1 MB"] = 200 / timed(echoes)
    return figures


def peak_memory(name: str) -> dict[str, float]:
    """Return the most memory that a contender's processes take together."""
    process = subprocess.Popen([sys.executable, __file__, "--echo-for-memory", name])
    peak, peak_shared = watch(process.pid, lambda: process.poll() is not None)
    check(process.returncode == 0, "the program ends well")
    return {"peak PSS of the echo": peak / MB, "peak shared memory of the echo": peak_shared / MB}


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    """Return the medians, and the medians of the rounds' ratios, in Markdown."""
    lines = [f"| | {OURS} | {FORK} | ratio |", "|---|---|---|---|"]
    for metric, (unit, _) in METRICS.items():
        cells = []
        for name in NAMES:
            values = [figures[name][metric] for figures in rounds if metric in figures[name]]
            cells.append(f"{statistics.median(values):.3g} {unit}" if values else "-")
        ratios = [
            figures[OURS][metric] / figures[FORK][metric] for figures in rounds if figures[FORK].get(metric, 0) > 0
        ]
        cells.append(f"{statistics.median(ratios):.3g}x" if ratios else "-")
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    parser.add_argument("--rounds", type=int, help="so many rounds")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--echo-for-memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, 3)))
        return
    if arguments.echo_for_memory:
        measure_group("memory", CONTENDERS[arguments.echo_for_memory], Sizes(workers=WORKERS), lambda *_: None)
        return
    rounds = []
    for number in range(arguments.rounds or (1 if arguments.quick else 5)):
        figures = {}
        for name in NAMES if number % 2 else reversed(NAMES):
            command = [sys.executable, __file__, "--measure", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures[name] = json.loads(done.stdout) | peak_memory(name)
        rounds.append(figures)
    print(table(rounds))
    if arguments.json:
        arguments.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
