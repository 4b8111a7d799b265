"""Networks that fail: cut, held up in one direction or both, slow, flapping. What takes less than the dead time is not
noticed; what takes longer costs what it has to, and nothing runs twice.

The ways of an agent and of a client lead through a proxy each (`proxy`), or through namespaces of their own
(`test_namespaces`).
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import workload
from proxy import DOWN, UP, Proxy
from served import Process, Served
from support import DEADLINE_S, IS_LONG, Journal, Scene, wait_gone, wait_until

from scaler_executor import CancelOutcome, ScalerExecutor, ScalerFuture, WorkerDiedError

long = pytest.mark.skipif(not IS_LONG, reason="takes long: set SCALER_EXECUTOR_LONG")

#: What an agent may be silent for, and when it stops its calls by itself.
DEAD_S = 10.0
FENCE_S = 8.0


class Net:
    """A scheduler, an agent with two workers and clients; the ways of the agent and of one client can fail."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cluster = Served(directory, 0)
        self.ways = {"agent": Proxy(self.cluster.address), "client": Proxy(self.cluster.address)}
        self.paths = {
            who: way.connection(self.cluster.connection, directory / f"{who}.json") for who, way in self.ways.items()
        }
        self._executors: list[ScalerExecutor] = []
        self.agent: Process = self.cluster.join(2, self.paths["agent"])

    def connect(self, path: Path | None = None, **options: Any) -> ScalerExecutor:
        """Make an executor whose way can fail, or one that connects as `path` says."""
        self._executors.append(ScalerExecutor(address=path or self.paths["client"], **options))
        return self._executors[-1]

    def fail(self, who: str, how: str, seconds: float) -> None:
        """Have a way fail for so long."""
        way = self.ways[who]
        if how == "cut":
            way.refuse()
        else:
            way.hold(up=how in ("hold", "up"), down=how in ("hold", "down"))
        time.sleep(seconds)
        way.restore()

    def check_unnoticed(self) -> None:
        """Nobody has taken anybody for lost."""
        assert "joins again" not in self.agent.output.read(), self.agent.output.text
        assert "is over" not in self.cluster.scheduler.output.read(), self.cluster.scheduler.output.text

    def close(self) -> None:
        for way in self.ways.values():
            way.restore()
        for executor in self._executors:
            executor.kill_workers()
            executor.shutdown()
        self.cluster.__exit__(None, None, None)
        for way in self.ways.values():
            way.close()


@pytest.fixture
def net(scene: Scene) -> Iterator[Net]:
    net = Net(scene.directory / "cluster")
    try:
        yield net
    finally:
        net.close()


def check_once(journal: Journal, numbers: range) -> None:
    """Each of these calls ran once, to its end."""
    lines = Counter((word, int(number)) for word, number in journal.read())
    assert lines == {(word, number): 1 for number in numbers for word in ("start", "end")}


@pytest.mark.parametrize(
    ("who", "how", "seconds"),
    [
        ("agent", "cut", 1),
        ("agent", "hold", 5),
        ("client", "cut", 5),
        ("client", "hold", 1),
        pytest.param("agent", "cut", 5, marks=long),
        pytest.param("agent", "hold", 1, marks=long),
        pytest.param("agent", "hold", 6, marks=long),
        pytest.param("client", "hold", 12, marks=long),
        pytest.param("client", "cut", 30, marks=long),
        ("agent", "up", 5),
        pytest.param("agent", "down", 5, marks=long),
        pytest.param("client", "up", 5, marks=long),
        ("client", "down", 5),
    ],
)
def test_short_failure_is_not_noticed(scene: Scene, net: Net, who: str, how: str, seconds: float) -> None:
    """A way that is cut, or held up in one direction or both, resumes: each call runs once, and its result arrives."""
    executor, journal, started, gate = net.connect(), scene.journal(), scene.fifo(), scene.fifo()
    held = executor.submit(workload.hold, started, gate, "held")
    started.hear()
    calls = range(int(seconds * 5) + 5)
    futures = [executor.submit(workload.timed, journal, number, 0.2, False) for number in calls]
    wait_until(journal.read, "no call runs")
    net.fail(who, how, seconds)
    began = time.monotonic()
    late = executor.submit(workload.echo, "late")
    assert [future.result(DEADLINE_S) for future in futures] == list(calls)
    assert late.result(DEADLINE_S) == "late"
    gate.open()
    assert held.result(DEADLINE_S) == "held"
    print(f"{time.monotonic() - began:.1f} s after the failure")
    check_once(journal, calls)
    net.check_unnoticed()


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=long)])
def test_flapping(scene: Scene, net: Net, seconds: float) -> None:
    """Ways that are cut again and again, at any moment, lose and repeat nothing."""
    executor, journal = net.connect(), scene.journal()
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    futures: list[ScalerFuture[Any]] = []
    over = threading.Event()

    def submit() -> None:
        while not over.is_set():
            number = len(futures)
            futures.append(executor.submit(workload.timed, journal, number, rng.choice((0.0, 0.001, 0.02)), False))
            over.wait(0.002)

    submitter = threading.Thread(target=submit)
    submitter.start()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        way = net.ways[rng.choice(("agent", "client"))]
        rng.choice((way.cut, way.cut, way.refuse, way.hold))()
        over.wait(rng.choice((0.0, 0.01, 0.1, 0.3)))
        way.restore()
        over.wait(rng.choice((0.0, 0.01, 0.1, 0.3, 0.5)))
    over.set()
    submitter.join()
    assert [future.result(DEADLINE_S) for future in futures] == list(range(len(futures)))
    check_once(journal, range(len(futures)))
    net.check_unnoticed()


@pytest.mark.parametrize(
    ("how", "seconds"), [("cut", 5), pytest.param("hold", 5, marks=long), pytest.param("cut", 8, marks=long)]
)
def test_large_result_computed_during_a_cut(scene: Scene, net: Net, how: str, seconds: float) -> None:
    """What was computed while nobody could hear of it arrives."""
    executor, started, gate = net.connect(), scene.fifo(), scene.fifo()
    future = executor.submit(workload.hold_and_make, started, gate, 32 << 20)
    started.hear()
    opener = threading.Timer(0.5, gate.open)
    opener.start()
    net.fail("agent", how, seconds)
    assert future.result(DEADLINE_S) == b"x" * (32 << 20)
    opener.join()
    net.check_unnoticed()


@pytest.mark.parametrize("how", ["hold", "up", pytest.param("cut", marks=long), pytest.param("down", marks=long)])
def test_cut_a_little_shorter_than_the_dead_time(scene: Scene, net: Net, how: str) -> None:
    """What was computed before an agent had to stop its calls arrives, also if that is long ago; the agent goes on in
    its session, and says which calls it has stopped."""
    executor, journal, started, gate = net.connect(), scene.journal(), scene.fifo(), scene.fifo()
    computed = executor.submit(workload.hold, started, gate, "computed")
    stopped = executor.submit(workload.write_beats, journal, 0)
    again = executor.submit(workload.write_beats, journal, 1)  # it waits at the agent
    started.hear()
    wait_until(journal.read, "the call does not run")
    opener = threading.Timer(0.5, gate.open)
    opener.start()
    net.fail("agent", how, DEAD_S - 0.4)
    assert computed.result(DEADLINE_S) == "computed"
    error = stopped.exception(DEADLINE_S)
    assert isinstance(error, WorkerDiedError) and "cut off" in str(error)
    assert executor.submit(workload.echo, "on").result(DEADLINE_S) == "on"
    opener.join()
    again.cancel()
    net.check_unnoticed()


@pytest.mark.parametrize("who", ["agent", "client"])
def test_cut_while_cancelling(scene: Scene, net: Net, who: str) -> None:
    """A cancel that is asked for during a cut is answered when that is over, by what has really happened."""
    executor, started = net.connect(), scene.fifo()
    running, neighbour = (executor.submit(workload.sleep, started) for _ in range(2))
    pids = {int(started.hear()) for _ in range(2)}
    queued = executor.submit(workload.echo, 1)
    net.ways[who].refuse()
    for future in (running, queued):
        future.cancel(0)
    assert (running.done(), queued.done()) == (False, queued.done())
    time.sleep(1.0)
    net.ways[who].restore()
    for future in (running, queued):
        future.cancel()
        assert future.cancelled() and future.cancel_outcome is CancelOutcome.CANCELED
    assert neighbour.running()
    assert executor.submit(workload.get_pid).result(DEADLINE_S) not in pids
    net.check_unnoticed()


@pytest.mark.parametrize(
    "how", ["hold", pytest.param("up", marks=long), pytest.param("down", marks=long), pytest.param("cut", marks=long)]
)
def test_agent_out_of_reach(scene: Scene, net: Net, how: str) -> None:
    """An agent that is cut off for longer than the dead time has stopped its calls before the scheduler gives them up.
    It joins again afterwards, and works."""
    executor, journal = net.connect(), scene.journal()
    net.cluster.join(1)
    futures = [executor.submit(workload.write_beats, journal, number) for number in range(3)]
    wait_until(lambda: {line[1] for line in journal.read()} == {"0", "1", "2"}, "the calls do not run")
    began = time.monotonic()
    failure = threading.Thread(target=net.fail, args=("agent", how, 12.0))
    failure.start()
    seen = 0
    last: dict[str, float] = {}
    while sum(future.done() for future in futures) < 2:
        assert time.monotonic() < began + DEADLINE_S
        lines = journal.read()
        for _, number in lines[seen:]:
            last[number] = time.monotonic()
        seen = len(lines)
        time.sleep(0.02)
    ended = time.monotonic()
    journal.write("given up", "-")
    lost = [number for number, future in enumerate(futures) if future.done()]
    for number in lost:
        assert isinstance(futures[number].exception(), WorkerDiedError)
        assert last[str(number)] < ended - 0.5, "it was given up just when it stopped"
        print(f"call {number} ran for {last[str(number)] - began:.2f} s of the failure")
    print(f"given up after {ended - began:.2f} s")
    # Who is heard all the time says by itself that it has stopped them, when it is back.
    assert DEAD_S < ended - began < DEAD_S + (6 if how == "down" else 2.5)
    failure.join()
    wait_until(lambda: net.cluster.workers() == 3, "the agent has not joined again")
    executor.clear()
    pids = {executor.submit(workload.get_pid).result(DEADLINE_S)}
    gate, started = scene.fifo(), scene.fifo()
    held = [executor.submit(workload.hold, started, gate, number) for number in range(3)]
    pids |= {int(started.hear()) for _ in held}
    gate.open(3)
    assert [future.result(DEADLINE_S) for future in held] == [0, 1, 2]
    after = journal.read()
    given_up = after.index(["given", "up", "-"])
    assert not {line[1] for line in after[given_up + 1 :]} & set(map(str, lost)), "a call ran on after it was given up"


@long
def test_scheduler_that_stands_still(scene: Scene, net: Net) -> None:
    """A scheduler that does nothing for some seconds is nothing to be noticed either."""
    executor, journal = net.connect(), scene.journal()
    futures = [executor.submit(workload.timed, journal, number, 0.2, False) for number in range(60)]
    wait_until(journal.read, "no call runs")
    os.kill(net.cluster.scheduler.pid, signal.SIGSTOP)
    time.sleep(5.5)
    os.kill(net.cluster.scheduler.pid, signal.SIGCONT)
    assert [future.result(DEADLINE_S) for future in futures] == list(range(60))
    check_once(journal, range(60))
    net.check_unnoticed()


def test_dead_transports_do_not_remain(scene: Scene, net: Net) -> None:
    """What was cut without a word is closed at the scheduler's end as well, when the way is there again."""
    executor = net.connect()
    assert executor.submit(workload.echo, 1).result(DEADLINE_S) == 1
    before = count_sockets(net.cluster.scheduler.pid)
    net.fail("agent", "hold", 4.5)
    net.fail("client", "hold", 0.1)
    assert executor.submit(workload.echo, 2).result(DEADLINE_S) == 2
    wait_until(lambda: count_sockets(net.cluster.scheduler.pid) <= before, "there are more sockets than before")


def count_sockets(pid: int) -> int:
    def is_socket(entry: Path) -> bool:
        try:
            return os.readlink(entry).startswith("socket:")
        except OSError:
            return False

    return sum(map(is_socket, Path(f"/proc/{pid}/fd").iterdir()))


# Slow ways

SLOW_BYTES_PER_S = 8 << 20
ARGUMENT_BYTES = (256 if IS_LONG else 32) << 20


def measure(function: Callable[[], object], until: Callable[[], object]) -> list[float]:
    """Return how long each of several turns took, as long as it is not time."""
    took = []
    while not until():
        began = time.monotonic()
        function()
        took.append(time.monotonic() - began)
    return took


@pytest.mark.parametrize("who", ["client", "agent"])
def test_large_argument_over_a_slow_way(scene: Scene, net: Net, who: str) -> None:
    """While a large argument is under way over a slow link, cancels and other clients' calls do not wait for it; nor
    does, at an agent, a new function of the same client."""
    executor, other, started = net.connect(), net.connect(net.cluster.connection), scene.fifo()
    net.ways[who].rate[UP if who == "client" else DOWN] = SLOW_BYTES_PER_S
    executor.submit(workload.echo, 1).result(DEADLINE_S)  # a new function is in order with the client's calls
    target = executor.submit(workload.sleep, started)
    pid = int(started.hear())
    began = time.monotonic()
    large = executor.submit(workload.length, bytearray(ARGUMENT_BYTES))
    wait_until(lambda: net.ways[who].forwarded > 4 << 20, "it is not under way")
    cancelled_s = measure(lambda: target.cancel(), target.done)
    wait_gone(pid)
    behind = executor.submit(workload.echo, "behind")
    behind_s = measure(lambda: behind.cancel(), behind.done)
    if who == "agent":
        assert executor.submit(lambda: "new").result(DEADLINE_S) == "new" and not large.done()
    is_under_way = not large.done()
    took = measure(lambda: other.submit(workload.echo, 1).result(DEADLINE_S), large.done)
    assert large.result(0) == ARGUMENT_BYTES
    whole_s = time.monotonic() - began
    took.sort()
    print(
        f"{who}: {ARGUMENT_BYTES >> 20} MB in {whole_s:.1f} s; cancel {1000 * sum(cancelled_s):.0f} ms,"
        f" of a call behind {1000 * sum(behind_s):.0f} ms ({behind.cancel_outcome}); {len(took)} calls of another"
        f" client: median {1000 * took[len(took) // 2]:.1f} ms, 99 % {1000 * took[len(took) * 99 // 100]:.1f} ms,"
        f" most {1000 * took[-1]:.1f} ms"
    )
    assert is_under_way and whole_s > ARGUMENT_BYTES / SLOW_BYTES_PER_S / 2
    assert target.cancel_outcome is CancelOutcome.CANCELED
    assert sum(cancelled_s) < 2 and sum(behind_s) < 2 and took[len(took) // 2] < 0.5
    net.check_unnoticed()
