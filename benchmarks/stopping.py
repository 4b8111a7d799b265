"""Measure cancels and crashes: how long until the code has stopped, and from then until a next call has its result.

    python benchmarks/stopping.py --quick
    python benchmarks/stopping.py --json figures.json

There is one worker, so a next call needs the one that was stopped, or its replacement. A cancel counts as stopped when
`executor.cancel` returns with the confirmation, and then the call has been unwound or its process is gone, which is
checked. A crash counts from the moment when the call is about to do it, until its future has the error and until a
next call has its result. Code that no KeyboardInterrupt stops is killed after the `cancel_grace`: it is measured with
none, and a few times with the default.

Everything is measured by a process that has imported little more than the package, and by one with a heavy preload,
numpy and about 200 MB of live Python objects, of which the workers are forks (or not, see --start-method). A figure is
of the samples of all rounds.
"""

import argparse
import ctypes
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from operator import pos
from pathlib import Path
from typing import Any

from compare import environment
from metrics import begin_and_wait, check
from processes import cpu_times

from scaler_executor import ScalerExecutor, WorkerDiedError
from scaler_executor.defaults import CANCEL_GRACE_S

PRELOADS = ("small", "heavy")
#: About 140 bytes each, in three objects.
BALLAST_ITEMS = 1_400_000
PATIENCE_S = 60.0

#: {what was measured: seconds}
Samples = dict[str, list[float]]

#: The heavy preload.
ballast: list[Any] = []


# What is called. Each writes its pid, or when it is about to crash, into the file `begun`.


def say(path: str, what: object) -> None:
    """Write the file at once, so that who sees it can read it."""
    Path(path + "-new").write_text(str(what))
    os.replace(path + "-new", path)


def asleep(begun: str, ended: str) -> None:
    try:
        say(begun, os.getpid())
        time.sleep(600)
    finally:
        Path(ended).touch()


def looping(begun: str, ended: str) -> None:
    try:
        say(begun, os.getpid())
        while True:
            pass
    finally:
        Path(ended).touch()


def holding(begun: str, ended: str) -> None:
    """Be in C code that neither looks at signals nor lets go of the GIL."""
    say(begun, os.getpid())
    sum(itertools.repeat(1, 10**13))


def swallowing(begun: str, ended: str) -> None:
    say(begun, os.getpid())
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            pass


def masking(begun: str, ended: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    say(begun, os.getpid())
    time.sleep(600)


def exiting(begun: str) -> None:
    say(begun, time.monotonic())
    os._exit(3)


def killed(begun: str) -> None:
    say(begun, time.monotonic())
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def segfaulting(begun: str) -> None:
    say(begun, time.monotonic())
    ctypes.string_at(0)


#: {case: (the call, whether an interrupt stops it)}
CANCELS: dict[str, tuple[Callable[[str, str], None], bool]] = {
    "sleeping call": (asleep, True),
    "Python loop": (looping, True),
    "C loop with the GIL": (holding, False),
    "swallows KeyboardInterrupt": (swallowing, False),
    "masks SIGINT": (masking, False),
}
CRASHES = {"os._exit": exiting, "SIGKILL of itself": killed, "segmentation fault": segfaulting}


# What is measured.


class Measurement:
    """Collects the samples of one round with one preload, in this process."""

    def __init__(self, samples: int, queued: list[int], start_method: str | None) -> None:
        self._samples = samples
        self._queued = queued
        self._context = multiprocessing.get_context(start_method) if start_method else None
        self.found: Samples = {}

    def run(self) -> Samples:
        """Measure all cases, one after the other."""
        for case, (function, stops) in CANCELS.items():
            if stops:
                self._cancels(case, function, self._samples, CANCEL_GRACE_S, gone=False)
            else:
                self._cancels(f"{case}, no grace", function, self._samples, 0.0, gone=True)
                self._cancels(f"{case}, default grace", function, self._samples // 10 or 1, CANCEL_GRACE_S, gone=True)
        for case, crash in CRASHES.items():
            self._crashes(case, crash)
        for calls in self._queued:
            self._cancel_queued(
                f"{calls:,} queued calls", calls, lambda executor, futures: executor.cancel(futures, timeout=None)
            )
        one_by_one = min(self._queued)
        self._cancel_queued(
            f"{one_by_one:,} queued calls, one by one",
            one_by_one,
            lambda executor, futures: [future.cancel(timeout=None) for future in futures],
        )
        return self.found

    def _executor(self, grace_s: float = CANCEL_GRACE_S) -> ScalerExecutor:
        executor = ScalerExecutor(1, self._context, cancel_grace=grace_s)
        for number in range(20):
            check(executor.submit(pos, number).result(PATIENCE_S) == number, "a call returns its own result")
        return executor

    def _add(self, name: str, seconds: float) -> None:
        self.found.setdefault(name, []).append(seconds)

    def _cancels(
        self, case: str, function: Callable[[str, str], None], samples: int, grace_s: float, gone: bool
    ) -> None:
        with tempfile.TemporaryDirectory() as directory, self._executor(grace_s) as executor:
            for number in range(samples):
                begun, ended = os.path.join(directory, f"{number}-begun"), os.path.join(directory, f"{number}-ended")
                future = executor.submit(function, begun, ended)
                pid = int(await_file(begun))
                time.sleep(0.005)  # until it is where it stays
                start_s = time.monotonic()
                executor.cancel([future], timeout=None)
                stopped_s = time.monotonic()
                has_stopped = not is_running(pid) if gone else os.path.exists(ended)
                result = executor.submit(pos, number).result(PATIENCE_S)
                usable_s = time.monotonic()
                check(future.cancelled(), f"{case}: the call is cancelled, not {future.cancel_outcome}")
                check(has_stopped, f"{case}: a confirmed cancel has stopped the code")
                check(result == number, "a call after a cancel returns its own result")
                self._add(f"{case}: stopped", stopped_s - start_s)
                self._add(f"{case}: then usable", usable_s - stopped_s)

    def _crashes(self, case: str, function: Callable[[str], None]) -> None:
        with tempfile.TemporaryDirectory() as directory, self._executor() as executor:
            for number in range(self._samples):
                begun = os.path.join(directory, str(number))
                error = executor.submit(function, begun).exception(PATIENCE_S)
                failed_s = time.monotonic()
                result = executor.submit(pos, number).result(PATIENCE_S)
                usable_s = time.monotonic()
                crashed_s = float(Path(begun).read_text())
                check(isinstance(error, WorkerDiedError), f"{case}: the call says that its worker died, not {error!r}")
                check(result == number, "a call after a crash returns its own result")
                self._add(f"{case}: error", failed_s - crashed_s)
                self._add(f"{case}: next result", usable_s - crashed_s)

    def _cancel_queued(self, case: str, calls: int, cancel: Callable[[ScalerExecutor, list[Any]], object]) -> None:
        with tempfile.TemporaryDirectory() as directory, self._executor() as executor:
            begun, go = os.path.join(directory, "begun"), os.path.join(directory, "go")
            held = executor.submit(begin_and_wait, begun, go)
            await_file(begun, empty=True)
            futures = [executor.submit(pos, number) for number in range(calls)]
            await_rest()
            start_s = time.monotonic()
            cancel(executor, futures)
            stopped_s = time.monotonic()
            check(all(future.cancelled() for future in futures), f"{case}: all are cancelled")
            check(not held.done(), "a call that was not cancelled goes on")
            Path(go).touch()
            check(held.result(PATIENCE_S) == 1, "and returns its result")
            start_usable_s = time.monotonic()
            check(executor.submit(pos, 7).result(PATIENCE_S) == 7, "a call after cancels returns its own result")
            self._add(f"{case}: cancelled", stopped_s - start_s)
            self._add(f"{case}: then usable", time.monotonic() - start_usable_s)


def await_file(path: str, empty: bool = False) -> str:
    """Return what is in the file, when there is one."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not os.path.exists(path):
        check(time.monotonic() < deadline_s, "a call begins")
        time.sleep(0.0005)
    return "" if empty else Path(path).read_text()


def await_rest() -> None:
    """Return when all processes have done what there was to do: what was submitted has got to where it waits."""
    used_s = sum(cpu_times().values())
    while True:
        time.sleep(0.1)
        before_s, used_s = used_s, sum(cpu_times().values())
        if used_s - before_s < 0.02:
            return


def is_running(pid: int) -> bool:
    """Say whether code may run there: a zombie runs none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def preload(which: str) -> None:
    """Have this process be what its workers are forks of."""
    if which == "heavy":
        if importlib.util.find_spec("numpy") is not None:
            importlib.import_module("numpy")
        ballast.extend((number, str(number)) for number in range(BALLAST_ITEMS))


def print_figures(found: dict[str, Samples]) -> None:
    """Print p50, p99 and the maximum of each case, the preloads side by side."""
    print(f"{'ms':52}" + "".join(f"{f'{which} preload: p50':>22}{'p99':>9}{'max':>9}" for which in found))
    for name in next(iter(found.values())):
        row = ""
        for samples in found.values():
            low, high, most = figures(samples[name])
            row += f"{low:22.2f}{high:9.2f}{most:9.2f}"
        print(f"{f'{name} ({len(samples[name])})':52}{row}")
    for which, samples in found.items():
        added = [
            figures(samples[f"{case}, default grace: stopped"])[0] - figures(samples[f"{case}, no grace: stopped"])[0]
            for case, (_, stops) in CANCELS.items()
            if not stops
        ]
        print(
            f"{which} preload: the default cancel_grace of {CANCEL_GRACE_S:g} s adds "
            f"{min(added) / 1e3:.3f} to {max(added) / 1e3:.3f} s where no interrupt stops the code"
        )


def figures(samples_s: list[float]) -> tuple[float, float, float]:
    """Return p50, p99 and maximum in ms."""
    ordered = sorted(samples_s)
    return ordered[len(ordered) // 2] * 1e3, ordered[len(ordered) * 99 // 100] * 1e3, ordered[-1] * 1e3


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples and one round, for a first look")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--start-method", choices=multiprocessing.get_all_start_methods(), help="else the default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--measure", choices=PRELOADS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    queued = [1_000, 10_000] if arguments.quick else [1_000, 10_000, 100_000]
    if arguments.measure:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        preload(arguments.measure)
        print(json.dumps(Measurement(5 if arguments.quick else 40, queued, arguments.start_method).run()))
        return
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    found: dict[str, Samples] = {which: {} for which in PRELOADS}
    for number in range(rounds):
        for which in PRELOADS if number % 2 else reversed(PRELOADS):
            print(f"round {number + 1} of {rounds}, {which} preload", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", which]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            for name, samples_s in json.loads(done.stdout.splitlines()[-1]).items():
                found[which].setdefault(name, []).extend(samples_s)
    print_figures(found)
    if arguments.json is not None:
        summary = {
            which: {
                name: dict(zip(("p50", "p99", "max"), figures(each), strict=True)) for name, each in samples.items()
            }
            for which, samples in found.items()
        }
        report = {"environment": environment(), "rounds": rounds, "ms": summary, "samples, s": found}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
