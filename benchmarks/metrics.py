"""What `compare.py` measures, and how: the metrics, in groups, and a function for each group.

A group of one contender is measured in a process of its own, with an executor of its own, so that the garbage, the
imports and the broken pools of one are not in the figures of another. Every result is checked. What is called is a
builtin or stands at the top of this file, so that any worker can import it whatever the start method.
"""

import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from operator import pos
from pathlib import Path
from typing import Any

from contenders import Contender
from processes import cpu_times, pss_bytes

MB = 1_000_000
ARRAY_BYTES = 100 * MB
#: Of so many calls the one with this number ends its process.
CRASH_CALLS, CRASH_AT = 200, 50
#: What a call that does not end has ended with.
NEVER = "never"

#: {label: seconds} that calls sleep.
DURATIONS = {"0.1 ms": 1e-4, "1 ms": 1e-3, "10 ms": 1e-2}
#: {label: (bytes of an argument that comes back, how many times)}
PAYLOADS = {"10 KB": (10_000, 500), "1 MB": (1_000_000, 20), "10 MB": (10_000_000, 4)}

#: A number, or why there is none, or what was found where that is no number.
Figure = float | str
Record = Callable[[str, Figure], None]


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `map_items_peer` is less because the peers' map is slow and only its rate counts."""

    rounds: int = 7
    workers: int = 2
    calls: int = 10_000
    many_calls: int = 100_000
    map_items: int = 100_000
    map_items_peer: int = 10_000
    round_trips: int = 1_000
    cold_starts: int = 2
    cancels: int = 10
    queued: int = 10_000
    arguments: int = 10_000
    echoes: int = 3
    limit_s: float = 240.0


QUICK = Sizes(
    rounds=3,
    calls=2_000,
    many_calls=20_000,
    map_items=50_000,
    map_items_peer=2_000,
    round_trips=300,
    cold_starts=1,
    cancels=5,
    queued=2_000,
    arguments=1_000,
    echoes=2,
    limit_s=90.0,
)


@dataclass(frozen=True)
class Metric:
    """A line of the table. `label` may name fields of Sizes; without a unit its figures are no numbers."""

    group: str
    label: str
    unit: str
    more_is_better: bool = False
    #: False where a figure is neither good nor bad, and only has to be known beside others.
    compared: bool = True


#: In the order of the table.
METRICS = {
    "submit": Metric("small", "`submit`, {calls:,} calls", "calls/s", True),
    "submit of many": Metric("many", "`submit`, {many_calls:,} calls", "calls/s", True),
    "map": Metric("small", "`map`, default arguments", "items/s", True),
    **{f"calls of {label}": Metric("small", f"calls that sleep {label}", "calls/s", True) for label in DURATIONS},
    "round trip p50": Metric("small", "round trip, median", "us"),
    "round trip p99": Metric("small", "round trip, 99th percentile", "us"),
    "CPU per call": Metric("small", "CPU time per call, all processes", "us"),
    "cold start": Metric("cold", "cold start to exit, one call", "s"),
    "bytes per queued call": Metric("queued", "memory per queued call (PSS)", "bytes"),
    **{f"echo of {label}": Metric("small", f"bytes that come back, {label}", "MB/s", True) for label in PAYLOADS},
    "calls of 10 KB": Metric("arguments", "{arguments:,} calls with 10 KB", "MB/s", True),
    "echo of an array": Metric("large", "array of 100 MB that comes back", "s"),
    "array to 20 calls": Metric("large", "one array of 100 MB to 20 calls", "s"),
    "peak memory": Metric("memory", "peak memory of the array that comes back (PSS)", "MB"),
    "peak shared memory": Metric("memory", "what of it is in shared memory, mapped or not", "MB", compared=False),
    "changed array": Metric("large", "sees that an array has changed", ""),
    "cancel p50": Metric("cancel", "cancel {workers} running sleeps, to a next result", "ms"),
    "cancel max": Metric("cancel", "the same, slowest of {cancels}", "ms"),
    "cancel of queued": Metric("queued", "cancel {queued:,} queued calls", "s"),
    "results beside a crash": Metric("crash", "one of 200 calls exits: results of the others", "of 199", True),
    "crashed call": Metric("crash", "that one ends with", ""),
    "usable after a crash": Metric("crash", "usable afterwards", ""),
    "nested": Metric("nested", "calls that submit to it and wait, four deep", ""),
    "closure": Metric("closure", "lambdas and closures", ""),
}
#: Those that compare nothing but small calls and what they take; the rest is for `--all`.
FIRST_GROUPS = ("small", "cancel", "cold")
NEED_NUMPY = ("large", "memory")
#: Here the executor is left open, since a pool that has lost a worker may never close.
LEFT_OPEN = ("crash", "closure", "nested")


class WrongResultError(Exception):
    """Figures of wrong results are worth nothing."""


def short(value: float) -> str:
    """Return a figure for a table or a plot, in three digits or so."""
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    if value >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def check(condition: object, claim: str) -> None:
    """As assert, also under -O."""
    if not condition:
        raise WrongResultError(f"not so: {claim}")


# What is called.


def echo(value: Any) -> Any:
    return value


def last(value: Any) -> float:
    return float(value[-1])


def begin_and_wait(begun: str, path: str) -> int:
    """Say that it has begun, by a file, and return when there is the file `path`."""
    Path(begun).touch()
    while not os.path.exists(path):
        time.sleep(0.001)
    return 1


def begin_and_sleep(begun: str) -> None:
    Path(begun).touch()
    time.sleep(600)


def return_or_exit(number: int) -> int:
    time.sleep(0.005)
    if number == CRASH_AT:
        os._exit(3)
    return number


def nest(executor: Any, depth: int) -> int:
    """Return how many calls there are below this one."""
    return 1 + int(executor.submit(nest, executor, depth - 1).result()) if depth else 0


# What is measured, a function for each group.


def measure(group: str, contender: Contender, sizes: Sizes, record: Record) -> None:
    """Measure a group of metrics in this process, and `record` each as soon as it is known."""
    GROUPS[group](contender, sizes, record)


def without_measuring(group: str, contender: Contender) -> dict[str, Figure] | None:
    """Return what is known of a group beforehand, None if it has to be measured."""
    if group in NEED_NUMPY and (contender.in_process or importlib.util.find_spec("numpy") is None):
        return {}  # what comes back is the object itself
    if group == "cancel" and contender.stop is None:
        return {name: "cannot" for name, metric in METRICS.items() if metric.group == group}
    return None


def warm_up(executor: Any, workers: int) -> None:
    """Have every worker started: each needs to be busy for the next one to be."""
    for future in [executor.submit(time.sleep, 0.1) for _ in range(workers)]:
        future.result()
    for number in range(200):
        executor.submit(pos, number).result()


def _small(contender: Contender, sizes: Sizes, record: Record) -> None:
    with contender.make(sizes.workers) as executor:
        warm_up(executor, sizes.workers)
        p50, p99 = _round_trip(executor, sizes.round_trips)
        record("round trip p50", p50)
        record("round trip p99", p99)
        rate, cpu = _submit(executor, sizes.calls)
        record("submit", rate)
        record("CPU per call", cpu)
        record("map", _map(executor, sizes.map_items if contender.maps_fast else sizes.map_items_peer))
        for label, duration_s in DURATIONS.items():
            record(f"calls of {label}", _sleeping(executor, duration_s))
        for label, (size_bytes, times) in PAYLOADS.items():
            record(f"echo of {label}", _echo(executor, size_bytes, times))


def _round_trip(executor: Any, round_trips: int) -> tuple[float, float]:
    """Return p50 and p99, in us, of one call after the other."""
    samples = []
    for number in range(round_trips):
        start_s = time.perf_counter()
        result = executor.submit(pos, number).result()
        samples.append((time.perf_counter() - start_s) * 1e6)
        check(result == number, "a call returns its own result")
    samples.sort()
    return samples[len(samples) // 2], samples[len(samples) * 99 // 100]


def _submit(executor: Any, calls: int) -> tuple[float, float]:
    """Return calls/s, from the first submit to the last result read, and CPU time per call in us."""
    before = cpu_times()
    start_s = time.perf_counter()
    futures = [executor.submit(pos, number) for number in range(calls)]
    results = [future.result() for future in futures]
    elapsed_s = time.perf_counter() - start_s
    after = cpu_times()
    check(results == list(range(calls)), "submitted calls return their own results")
    used_s = sum(cpu_s - before.get(pid, 0.0) for pid, cpu_s in after.items())
    return calls / elapsed_s, used_s / calls * 1e6


def _map(executor: Any, items: int) -> float:
    """Return items/s of map with its default arguments."""
    start_s = time.perf_counter()
    results = list(executor.map(pos, range(items)))
    elapsed_s = time.perf_counter() - start_s
    check(results == list(range(items)), "map yields its results in order")
    return items / elapsed_s


def _sleeping(executor: Any, duration_s: float) -> float:
    """Return calls/s of calls that sleep, about half a second's work."""
    calls = int(min(2000, 1 / duration_s))
    start_s = time.perf_counter()
    for future in [executor.submit(time.sleep, duration_s) for _ in range(calls)]:
        future.result()
    return calls / (time.perf_counter() - start_s)


def _echo(executor: Any, size_bytes: int, times: int) -> float:
    """Return MB/s of arguments that come back, each way counted."""
    block = bytearray(size_bytes)
    start_s = time.perf_counter()
    for future in [executor.submit(copy, block) for _ in range(times)]:
        check(len(future.result()) == size_bytes, "a payload comes back whole")
    return 2e-6 * size_bytes * times / (time.perf_counter() - start_s)


def _many(contender: Contender, sizes: Sizes, record: Record) -> None:
    with contender.make(sizes.workers) as executor:
        warm_up(executor, sizes.workers)
        rate, _ = _submit(executor, sizes.many_calls)
        record("submit of many", rate)


def _arguments(contender: Contender, sizes: Sizes, record: Record) -> None:
    with contender.make(sizes.workers) as executor:
        warm_up(executor, sizes.workers)
        record("calls of 10 KB", argument_rate(executor, bytes(10_000), sizes.arguments))


def _large(contender: Contender, sizes: Sizes, record: Record) -> None:
    array = make_array()
    with contender.make(sizes.workers) as executor:
        warm_up(executor, sizes.workers)
        executor.submit(last, array).result()  # has the workers import numpy
        record("echo of an array", min(echo_of_array(executor, array) for _ in range(sizes.echoes)))
        record("array to 20 calls", array_to_calls(executor, array, 20))
        array[-1] = -1.0
        record("changed array", "yes" if executor.submit(last, array).result() == -1.0 else "**no**")


def make_array() -> Any:
    return importlib.import_module("numpy").arange(ARRAY_BYTES // 8, dtype=float)


def echo_of_array(executor: Any, array: Any) -> float:
    """Return how many seconds it takes an array to a call and back."""
    start_s = time.perf_counter()
    result = executor.submit(echo, array).result()
    elapsed_s = time.perf_counter() - start_s
    check(result[-1] == array[-1] and len(result) == len(array) and result is not array, "an array comes back")
    return elapsed_s


def array_to_calls(executor: Any, array: Any, calls: int) -> float:
    """Return how many seconds it takes so many calls with the same array."""
    start_s = time.perf_counter()
    results = [future.result() for future in [executor.submit(last, array) for _ in range(calls)]]
    elapsed_s = time.perf_counter() - start_s
    check(results == [array[-1]] * calls, "each call sees the array")
    return elapsed_s


def argument_rate(executor: Any, payload: bytes, calls: int) -> float:
    """Return MB/s of so many calls, each with this argument."""
    start_s = time.perf_counter()
    results = [future.result() for future in [executor.submit(len, payload) for _ in range(calls)]]
    elapsed_s = time.perf_counter() - start_s
    check(results == [len(payload)] * calls, "each call sees its argument")
    return calls * len(payload) / MB / elapsed_s


def _memory(contender: Contender, sizes: Sizes, record: Record) -> None:
    """Only do what is to be watched: looking costs time, and the one who watches records."""
    array = make_array()
    with contender.make(sizes.workers) as executor:
        for future in [executor.submit(time.sleep, 0.1) for _ in range(sizes.workers)]:
            future.result()
        for _ in range(3):
            echo_of_array(executor, array)


def _queued(contender: Contender, sizes: Sizes, record: Record) -> None:
    with tempfile.TemporaryDirectory() as directory, contender.make(sizes.workers) as executor:
        warm_up(executor, sizes.workers)
        go = os.path.join(directory, "go")
        begun = [os.path.join(directory, str(number)) for number in range(sizes.workers)]
        held = [executor.submit(begin_and_wait, path, go) for path in begun]
        _await_files(begun)
        before_bytes = pss_bytes(os.getpid())
        futures = [executor.submit(pos, number) for number in range(sizes.queued)]
        record("bytes per queued call", (_settled_pss_bytes() - before_bytes) / sizes.queued)
        if contender.cancel is None:
            record("cancel of queued", "cannot")
        else:
            start_s = time.perf_counter()
            contender.cancel(executor, futures)
            elapsed_s = time.perf_counter() - start_s
            # Some pools call running what they have put into their pipe.
            cancelled = sum(future.cancelled() for future in futures)
            check(cancelled > sizes.queued - 10 * sizes.workers, f"queued calls are cancelled, not {cancelled}")
            record("cancel of queued", elapsed_s)
        Path(go).touch()
        check([future.result() for future in held] == [1] * sizes.workers, "running calls go on")
        check(executor.submit(pos, 7).result() == 7, "a call after cancels returns its own result")


def _settled_pss_bytes() -> int:
    """Return the memory when what was submitted has got to where it waits, and it grows no more."""
    now = pss_bytes(os.getpid())
    for _ in range(50):
        time.sleep(0.2)
        before, now = now, pss_bytes(os.getpid())
        if abs(now - before) <= 0.002 * now:
            break
    return now


def _await_files(paths: list[str]) -> None:
    while not all(map(os.path.exists, paths)):
        time.sleep(0.001)


def _cancel(contender: Contender, sizes: Sizes, record: Record) -> None:
    assert contender.stop is not None
    samples = []
    with tempfile.TemporaryDirectory() as directory, contender.make(sizes.workers) as executor:
        warm_up(executor, sizes.workers)
        for number in range(sizes.cancels):
            begun = [os.path.join(directory, f"{number}-{worker}") for worker in range(sizes.workers)]
            futures = [executor.submit(begin_and_sleep, path) for path in begun]
            _await_files(begun)
            start_s = time.perf_counter()
            contender.stop(executor, futures)
            result = executor.submit(pos, number).result()
            samples.append((time.perf_counter() - start_s) * 1e3)
            check(all(future.cancelled() for future in futures), "cancelled calls are cancelled")
            check(result == number, "a call after a cancel returns its own result")
    record("cancel p50", statistics.median(samples))
    record("cancel max", max(samples))


def _crash(contender: Contender, sizes: Sizes, record: Record) -> None:
    """Of these calls each sleeps 5 ms; they get half of the limit."""
    executor = contender.make(sizes.workers)
    warm_up(executor, sizes.workers)
    futures = [executor.submit(return_or_exit, number) for number in range(CRASH_CALLS)]
    patience_s = sizes.limit_s / 2
    deadline_s = time.monotonic() + patience_s
    ended = [
        outcome(future, max(0.01, deadline_s - time.monotonic()))
        for number, future in enumerate(futures)
        if number != CRASH_AT
    ]
    results = sum(value == number + (number >= CRASH_AT) for number, value in enumerate(ended))
    record("results beside a crash", f"{results} in {patience_s:g} s" if NEVER in ended else float(results))
    bad = outcome(futures[CRASH_AT], 10)
    record("crashed call", type(bad).__name__ if isinstance(bad, BaseException) else str(bad))
    try:
        record("usable after a crash", "yes" if outcome(executor.submit(pos, 7), 10) == 7 else "no")
    except Exception:
        record("usable after a crash", "no")
    os._exit(0)


def outcome(future: Any, timeout_s: float) -> Any:
    """Return the result, the error, or that there is none."""
    try:
        return future.result(timeout=timeout_s)
    except Exception as error:
        return NEVER if type(error).__name__.endswith("TimeoutError") else error


def _nested(contender: Contender, sizes: Sizes, record: Record) -> None:
    _does("nested", contender, sizes, record, lambda executor: executor.submit(nest, executor, 4), 4)


def _closure(contender: Contender, sizes: Sizes, record: Record) -> None:
    factor = sizes.workers
    _does("closure", contender, sizes, record, lambda executor: executor.submit(lambda: 3 * factor), 3 * factor)


def _does(
    metric: str, contender: Contender, sizes: Sizes, record: Record, submit: Callable[[Any], Any], expected: int
) -> None:
    """Record whether what `submit` submits has the expected result, or what it has in place of it."""
    executor = contender.make(sizes.workers)
    try:
        ended = outcome(submit(executor), sizes.limit_s / 3)
    except Exception as error:
        ended = error
    if isinstance(ended, BaseException):
        ended = type(ended).__name__
    record(metric, "yes" if ended == expected else str(ended))
    os._exit(0)


def _cold(contender: Contender, sizes: Sizes, record: Record) -> None:
    """Record the median seconds of a fresh interpreter that makes an executor, runs one call and exits."""
    samples = []
    for _ in range(sizes.cold_starts):
        start_s = time.perf_counter()
        program = contender.cold_start_program.format(workers=sizes.workers)
        subprocess.run([sys.executable, "-c", program], check=True, stdin=subprocess.DEVNULL)
        samples.append(time.perf_counter() - start_s)
    record("cold start", statistics.median(samples))


GROUPS: dict[str, Callable[[Contender, Sizes, Record], None]] = {
    "small": _small,
    "many": _many,
    "cold": _cold,
    "queued": _queued,
    "arguments": _arguments,
    "large": _large,
    "memory": _memory,
    "cancel": _cancel,
    "crash": _crash,
    "nested": _nested,
    "closure": _closure,
}
assert GROUPS.keys() == {metric.group for metric in METRICS.values()}
