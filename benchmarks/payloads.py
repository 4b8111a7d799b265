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
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

OURS = "ScalerExecutor"
FORK = "ProcessPool fork"
CONTENDERS = (OURS, FORK)
WORKERS = 2
MB = 1_000_000

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


def echo(value: Any) -> Any:
    return value


def last(value: Any) -> float:
    return float(value[-1])


def last_of_global(factor: int) -> float:
    return factor * float(data[-1])


def size(value: bytes) -> int:
    return len(value)


def make(name: str) -> Executor:
    if name == FORK:
        return ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork"))
    from scaler_executor import ScalerExecutor

    return ScalerExecutor(WORKERS)


def timed(function: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    function()
    return time.perf_counter() - start_s


def check(condition: object, claim: str) -> None:
    if not condition:
        raise AssertionError(f"not so: {claim}")


def measure(name: str, repeats: int) -> dict[str, float]:
    """Measure one contender, in this process."""
    import numpy

    global data
    figures: dict[str, float] = {}
    with make(name) as executor:
        for future in [executor.submit(time.sleep, 0.1) for _ in range(WORKERS)]:
            future.result()
        array = numpy.arange(100 * MB // 8, dtype=float)
        large = bytes(100 * MB)

        def echo_array() -> None:
            result = executor.submit(echo, array).result()
            check(result[-1] == array[-1] and result.flags.writeable, "the array comes back, writable")

        def same_array() -> None:
            futures = [executor.submit(last, array) for _ in range(20)]
            check([future.result() for future in futures] == [array[-1]] * 20, "each call sees the array")

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

        def many(payload: bytes, calls: int, function: Callable[[Any], Any]) -> float:
            elapsed_s = timed(
                lambda: [future.result() for future in [executor.submit(function, payload) for _ in range(calls)]]
            )
            return calls * len(payload) / MB / elapsed_s

        echo_array()
        figures["echo of a 100 MB array"] = min(timed(echo_array) for _ in range(repeats))
        figures["echo of 100 MB bytes"] = min(
            timed(lambda: check(executor.submit(echo, large).result() == large, "bytes come back"))
            for _ in range(repeats)
        )
        figures["one 100 MB array to 20 calls"] = timed(same_array)
        figures["changed array to 20 calls"] = timed(changed_array)
        if name == OURS:
            data = numpy.arange(100 * MB // 8, dtype=float)
            figures["100 MB global of __main__, 20 calls"] = timed(by_global)
        figures["10k calls of 10 KB"] = many(bytes(10_000), 10_000, size)
        figures["200 calls of 1 MB"] = many(bytes(MB), 200, size)
        figures["200 echoes of 1 MB"] = many(bytes(MB), 200, echo)
    return figures


def echo_for_memory(name: str) -> None:
    """Echo an array some times, to be watched."""
    import numpy

    with make(name) as executor:
        for future in [executor.submit(time.sleep, 0.1) for _ in range(WORKERS)]:
            future.result()
        array = numpy.ones(100 * MB // 8)
        for _ in range(3):
            result = executor.submit(echo, array).result()
            check(result[-1] == 1, "the array comes back")
            del result


def peak_memory(name: str) -> dict[str, float]:
    """Return the most memory that a contender's processes take together."""
    shared_before = shared_bytes()
    process = subprocess.Popen([sys.executable, __file__, "--echo-for-memory", name])
    peak_pss = peak_shared = 0
    while process.poll() is None:
        peak_pss = max(peak_pss, sum(map(pss_bytes, tree(process.pid))))
        peak_shared = max(peak_shared, shared_bytes() - shared_before)
        time.sleep(0.003)
    check(process.returncode == 0, "the program ends well")
    return {"peak PSS of the echo": peak_pss / MB, "peak shared memory of the echo": peak_shared / MB}


def shared_bytes() -> int:
    room = os.statvfs("/dev/shm")
    return (room.f_blocks - room.f_bfree) * room.f_frsize


def tree(pid: int) -> list[int]:
    """Return a process and its descendants."""
    pids = [pid]
    for each in pids:
        try:
            for task in os.listdir(f"/proc/{each}/task"):
                pids += map(int, Path(f"/proc/{each}/task/{task}/children").read_text().split())
        except OSError:
            pass  # it has ended
    return pids


def pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has ended
    return 0


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    """Return the medians, and the medians of the rounds' ratios, in Markdown."""
    lines = [f"| | {OURS} | {FORK} | ratio |", "|---|---|---|---|"]
    for metric, (unit, _) in METRICS.items():
        cells = []
        for name in CONTENDERS:
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
        echo_for_memory(arguments.echo_for_memory)
        return
    rounds = []
    for number in range(arguments.rounds or (1 if arguments.quick else 5)):
        figures = {}
        for name in CONTENDERS if number % 2 else reversed(CONTENDERS):
            command = [sys.executable, __file__, "--measure", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures[name] = json.loads(done.stdout) | peak_memory(name)
        rounds.append(figures)
    print(table(rounds))
    if arguments.json:
        arguments.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
