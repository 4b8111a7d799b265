"""Measure served clusters: on loopback TCP with CURVE beside an embedded one, of several agents, and a scheduler alone.

    python benchmarks/cluster.py --quick
    python benchmarks/cluster.py --json figures.json

The first two parts start `scaler-executor serve` processes with files of their own, and measure the contenders in turn,
round after round; a cell is the median. The third part has no processes at all: one SchedulerState, which a million
calls of 100 clients pass on their way to 1,000 agents, which answer at once; time is simulated where calls last.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scaler_executor import ScalerExecutor
from scaler_executor.protocol.codec import Encoder
from scaler_executor.protocol.messages import (
    AgentCapacity,
    AgentResult,
    Function,
    Hello,
    TaskResult,
    TaskRun,
    TaskSubmit,
)
from scaler_executor.protocol.scheduler import Received, SchedulerState, Send

COMMAND = [sys.executable, "-m", "scaler_executor.cli", "serve"]


class Cluster:
    """A served cluster.

    Args:
        directory: For its files.
        agents: So many machines' worth of agents, each with `workers` workers; 0: the scheduler's own process has them.
        workers: See there.
    """

    def __init__(self, directory: str, agents: int, workers: int) -> None:
        self._environment = {**os.environ, "XDG_STATE_HOME": directory}
        self.connection = Path(directory) / "scaler-executor" / "default" / "connection.json"
        own = "0" if agents else str(workers)
        self._processes = [self._start("--bind", "tcp://127.0.0.1:*", "--workers", own, until="join it")]
        for _ in range(agents):
            self._processes.append(
                self._start("--join", str(self.connection), "--workers", str(workers), until="connected")
            )

    def _start(self, *arguments: str, until: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen([*COMMAND, *arguments], env=self._environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while not re.match(until, line := process.stdout.readline()):
            assert line, "serve has ended"
        return process

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its processes so far, workers that have ended not counted."""
        total = 0.0
        tick = os.sysconf("SC_CLK_TCK")
        for process in self._processes:
            pids = [process.pid]
            while pids:
                pid = pids.pop()
                try:
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
                except OSError:
                    continue
                total += (int(fields[11]) + int(fields[12])) / tick
        return total

    def stop(self) -> None:
        """End it."""
        for process in reversed(self._processes):
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@contextmanager
def embedded(workers: int) -> Iterator[tuple[ScalerExecutor, Callable[[], float]]]:
    """An executor with workers of its own."""
    with ScalerExecutor(workers) as executor:
        yield executor, lambda: 0.0


@contextmanager
def served(agents: int, workers: int) -> Iterator[tuple[ScalerExecutor, Callable[[], float]]]:
    """An executor of a served cluster."""
    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(directory, agents, workers)
        try:
            with ScalerExecutor(address=cluster.connection) as executor:
                yield executor, cluster.cpu_seconds
        finally:
            cluster.stop()


def measure(executor: ScalerExecutor, calls: int, items: int, round_trips: int) -> dict[str, float]:
    """Return the figures of one executor."""
    list(executor.map(abs, range(1000)))
    began = time.perf_counter()
    futures = [executor.submit(abs, number) for number in range(calls)]
    assert [future.result() for future in futures] == list(range(calls))
    submit_s = time.perf_counter() - began
    began = time.perf_counter()
    assert sum(executor.map(abs, range(items))) == items * (items - 1) // 2
    map_s = time.perf_counter() - began
    trips = []
    for number in range(round_trips):
        began = time.perf_counter()
        executor.submit(abs, number).result()
        trips.append(time.perf_counter() - began)
    cancels = []
    for _ in range(5):
        future = executor.submit(time.sleep, 3600)
        while not future.running():
            wait([future], 0.001)
        began = time.perf_counter()
        future.cancel()
        cancels.append(time.perf_counter() - began)
    block = bytes(16 << 20)
    began = time.perf_counter()
    assert executor.submit(len, block).result() == len(block)
    block_s = time.perf_counter() - began
    return {
        "submit, calls/s": calls / submit_s,
        "map, items/s": items / map_s,
        "round trip, us": statistics.median(trips) * 1e6,
        "cancel, ms": statistics.median(cancels) * 1e3,
        "16 MB argument, MB/s": 16 / block_s,
    }


def compare(rounds: int, calls: int, items: int, round_trips: int) -> dict[str, dict[str, float]]:
    """Return {contender: {metric: median}} of clusters with the same number of workers."""
    contenders: dict[str, Callable[[], Any]] = {
        "embedded, 2 workers": lambda: embedded(2),
        "served, 2 workers": lambda: served(0, 2),
        "2 agents x 1": lambda: served(2, 1),
        "4 agents x 1": lambda: served(4, 1),
        "8 agents x 1": lambda: served(8, 1),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, make in contenders.items():
            with make() as (executor, cpu_seconds):
                cpu_s = cpu_seconds()
                figures = measure(executor, calls, items, round_trips)
                if cpu_s:
                    figures["CPU of the cluster, us per call"] = (cpu_seconds() - cpu_s) / calls * 1e6
                found[name].append(figures)
    return {
        name: {metric: statistics.median(figures[metric] for figures in rounds) for metric in rounds[0]}
        for name, rounds in found.items()
    }


def scheduler_alone(agents: int, clients: int, calls: int) -> dict[str, float]:
    """Have calls pass one scheduler: in by 1,000s, out to agents, results back. Return what each costs it."""
    state, encoder = SchedulerState(), Encoder()
    received_bytes = sent_bytes = done = 0
    now = 0.0
    submitted_at: dict[int, float] = {}
    delays: list[float] = []
    pending: deque[tuple[int, Any]] = deque()

    def say(peer: int, message: Any) -> None:
        pending.append((peer, message))

    for agent in range(1, agents + 1):
        say(agent, Hello("agent", name=f"agent {agent}"))
        say(agent, AgentCapacity(40, 8))
    for client in range(agents + 1, agents + clients + 1):
        say(client, Hello("client", name=f"client {client}"))
    per_message = 1000
    for start in range(0, calls // clients, per_message):
        for client in range(agents + 1, agents + clients + 1):
            functions: list[Function] = [] if start else [Function(1, "function", b"x" * 100)]
            rows: list[Any] = [(start + number + 1, 1, 1, b"argument") for number in range(per_message)]
            say(client, TaskSubmit(rows, functions))
    handle_s = 0.0
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    while pending:
        peer, message = pending.popleft()
        received_bytes += len(encoder.encode(message)[0])
        began = time.perf_counter()
        instructions = state.handle(Received(peer, message), now)
        took_s = time.perf_counter() - began
        handle_s += took_s
        now += took_s
        if isinstance(message, TaskSubmit):
            for row in message.tasks:
                submitted_at[(peer - agents) << 40 | row[0]] = now
        for instruction in instructions:
            assert isinstance(instruction, Send)
            sent_bytes += len(encoder.encode(instruction.message)[0])
            if isinstance(instruction.message, TaskRun):
                runs = instruction.message.tasks
                delays += [now - submitted_at.pop(run[0], now) for run in runs]
                say(instruction.peer, AgentResult([(run[0], run[1], 0, 1, 0, b"value") for run in runs]))
            elif isinstance(instruction.message, TaskResult):
                done += len(instruction.message.results)
    assert done == calls, (done, calls)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    delays.sort()
    return {
        "calls/s": calls / handle_s,
        "CPU, us per call": handle_s / calls * 1e6,
        "all CPU with encoding, us per call": cpu_s / calls * 1e6,
        "bytes in, per call": received_bytes / calls,
        "bytes out, per call": sent_bytes / calls,
        "peak memory, MB": after.ru_maxrss / 1024,
    }


def dispatch_delay(agents: int, calls: int) -> dict[str, float]:
    """Have calls come one by one to a scheduler with as many idle agents. Return how long each takes to leave."""
    state = SchedulerState()
    for agent in range(1, agents + 1):
        state.handle(Received(agent, Hello("agent")), 0.0)
        state.handle(Received(agent, AgentCapacity(40, 8)), 0.0)
    client = agents + 1
    state.handle(Received(client, Hello("client")), 0.0)
    state.handle(Received(client, TaskSubmit([], [Function(1, "function", b"x")])), 0.0)
    delays = []
    for number in range(1, calls + 1):
        began = time.perf_counter()
        instructions = state.handle(Received(client, TaskSubmit([(number, 1, 1, b"argument")])), began)
        delays.append(time.perf_counter() - began)
        for instruction in instructions:
            assert isinstance(instruction, Send)
            if isinstance(instruction.message, TaskRun):
                (run,) = instruction.message.tasks
                state.handle(Received(instruction.peer, AgentResult([(run[0], run[1], 0, 1, 0, b"value")])), began)
    delays.sort()
    return {"p50, us": delays[len(delays) // 2] * 1e6, "p99, us": delays[len(delays) * 99 // 100] * 1e6}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of everything, for a first look")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    few = 10 if arguments.quick else 1
    clusters = compare(1 if arguments.quick else arguments.rounds, 20_000 // few, 500_000 // few, 500 // few)
    alone = {
        "scheduler with 1,000 agents": scheduler_alone(1000, 100, 1_000_000 // few),
        "dispatch of single calls, 1,000 idle agents": dispatch_delay(1000, 20_000 // few),
    }
    for name, cells in {**clusters, **alone}.items():
        print(name)
        for metric, value in cells.items():
            print(f"    {metric:36} {value:>14,.1f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"clusters": clusters, **alone}, indent=1))


if __name__ == "__main__":
    main()
