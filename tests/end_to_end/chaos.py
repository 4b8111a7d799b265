"""Chaos: calls by the thousand while processes are killed and stopped at random, and what must hold of them.

A seed decides what is done to whom and after which pause, and what the calls are; real processes decide the rest. So a
seed that failed is likely to fail again, not certain: the log of what was done and the journal of what the calls did,
with the same clock (microseconds, monotonic), are what a failure is understood by.

This module knows processes and journals. It does not know which cluster it is: a `Targets` finds its processes.
"""

from __future__ import annotations

import heapq
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple

import workload
from served import Process, Served
from support import DEADLINE_S, Client, Journal, children_of, copy_of_journal, is_gone, is_serve, read_proc, wait_until

from scaler_executor import CancelOutcome, ScalerExecutor, ScalerFuture, SchedulerLostError, WorkerDiedError

#: {role: pids}
Targets = Callable[[], dict[str, list[int]]]
#: How a worker may end that its call does not want to.
SIGNALS = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS")
FATES = ("exit", "SIGKILL", "SIGSEGV", "raise", "subprocess")


def now_us() -> int:
    return time.monotonic_ns() // 1000


class Fault(NamedTuple):
    """Something that is done to a process of this role.

    Attributes:
        weight: How often, compared with others.
        name: "kill" (with one of SIGNALS), "stop" (for up to `seconds`, then continued), "stop and kill", or the name
            of what `Chaos.deeds` has.
    """

    weight: float
    role: str
    name: str
    seconds: float = 0.0


class Chaos:
    """A thread that does something to somebody, again and again.

    Args:
        seed: Decides what and when.
        faults: What may be done.
        targets: Finds whom to do it to.
        pause_s: Between two faults, on average.
        deeds: What is more than a signal, by the name of the fault: called with the role's pids and a random number.
    """

    def __init__(
        self,
        seed: int,
        faults: list[Fault],
        targets: Targets,
        pause_s: float,
        deeds: dict[str, Callable[[random.Random], str]] | None = None,
    ) -> None:
        self._rng = random.Random(f"chaos {seed}")
        self._faults = faults
        self._targets = targets
        self._pause_s = pause_s
        self._deeds = deeds or {}
        self._over = threading.Event()
        #: When to continue whom: (when, pidfd, pid).
        self._stopped: list[tuple[float, int, int]] = []
        self._thread = threading.Thread(target=self._run, name="chaos")
        self._failure: BaseException | None = None
        #: (us, what was done)
        self.log: list[tuple[int, str]] = []
        #: {"kill worker": times}
        self.done: Counter[str] = Counter()

    def note(self, text: str) -> None:
        self.log.append((now_us(), text))

    def __enter__(self) -> Chaos:
        if self._faults:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let everybody be, and go on who has been stopped."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _run(self) -> None:
        try:
            due = time.monotonic()
            while True:
                fault = self._rng.choices(self._faults, [fault.weight for fault in self._faults])[0]
                due = max(due + self._rng.expovariate(1 / self._pause_s), time.monotonic() - 0.5)
                if self._wait(due):
                    break
                self._do(fault)
        except BaseException as error:
            self._failure = error
        finally:
            while self._stopped:
                self._continue()

    def _wait(self, due: float) -> bool:
        """Wait until then. Return True if it is over."""
        while True:
            until = min(due, self._stopped[0][0]) if self._stopped else due
            if self._over.wait(max(0.0, until - time.monotonic())):
                return True
            if self._stopped and self._stopped[0][0] <= time.monotonic():
                self._continue()
            elif due <= time.monotonic():
                return False

    def _do(self, fault: Fault) -> None:
        # Drawn whether they are needed or not, so that the next fault is what the seed says.
        which, seconds, name = self._rng.random(), self._rng.random() * fault.seconds, self._rng.choice(SIGNALS)
        deed_rng = random.Random(self._rng.random())
        if fault.name in self._deeds:
            self.note(f"{fault.name}: {self._deeds[fault.name](deed_rng)}")
            self.done[fault.name] += 1
            return
        pids = self._targets().get(fault.role, [])
        if not pids:
            return
        pid = pids[int(which * len(pids))]
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        # The number may have been another's by then: it still is one of them, or nothing is done.
        if pid not in self._targets().get(fault.role, []):
            os.close(pidfd)
            return
        is_kept = False
        try:
            if fault.name in ("stop", "stop and kill"):
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            if fault.name == "stop":
                heapq.heappush(self._stopped, (time.monotonic() + seconds, pidfd, pid))
                is_kept = True
                self.note(f"stop {fault.role} {pid} for {seconds:.3f} s")
            else:
                signal.pidfd_send_signal(pidfd, getattr(signal, name))
                if fault.name == "stop and kill" and name != "SIGKILL":
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                self.note(f"{fault.name} {fault.role} {pid} {name}")
            self.done[f"{fault.name} {fault.role}"] += 1
        except ProcessLookupError:
            pass
        finally:
            if not is_kept:
                os.close(pidfd)

    def _continue(self) -> None:
        _, pidfd, pid = heapq.heappop(self._stopped)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            self.note(f"continue {pid}")
        except ProcessLookupError:
            pass
        os.close(pidfd)

    @property
    def kills(self) -> int:
        """How many processes were killed."""
        return sum(count for name, count in self.done.items() if "kill" in name)


# Processes


def is_forker_of(pid: int, parent: int) -> bool:
    """Tell whether a child of serve, or of the client that it inherits from, is a forker."""
    return not is_gone(pid) and read_proc(pid, "cmdline") == read_proc(parent, "cmdline")


def workers_of(forkers: list[int]) -> list[int]:
    return [pid for forker in forkers for pid in children_of(forker) if not is_gone(pid)]


class EmbeddedTargets:
    """The processes of the only executor of a client."""

    def __init__(self, client: int | None = None) -> None:
        self.client = client or os.getpid()
        self.serve = 0

    def __call__(self) -> dict[str, list[int]]:
        children = [pid for pid in children_of(self.client) if not is_gone(pid)]
        serves = [pid for pid in children if is_serve(pid)]
        forkers = [pid for pid in children if is_forker_of(pid, self.client)]
        forkers += [pid for serve in serves for pid in children_of(serve) if is_forker_of(pid, serve)]
        return {"serve": serves, "forker": forkers, "worker": workers_of(forkers)}


class Grid:
    """A served cluster with machines that join again when they are killed.

    Args:
        directory: For its files.
        agents: How many machines join.
        workers: Of each of them; the scheduler's own process has one.
    """

    def __init__(self, directory: Path, agents: int, workers: int) -> None:
        self.cluster = Served(directory, 1)
        self._workers = workers
        self.agents = [self.join() for _ in range(agents)]
        self.workers = 1 + agents * workers
        self.clients: list[Client] = []

    def join(self) -> Process:
        return self.cluster.command(
            "serve", "--join", str(self.cluster.connection), "--workers", str(self._workers), "--log-level", "debug"
        )

    def __call__(self) -> dict[str, list[int]]:
        scheduler, agents = self.cluster.scheduler.pid, [agent.pid for agent in self.agents]
        forkers = [pid for parent in [scheduler, *agents] for pid in children_of(parent) if is_forker_of(pid, parent)]
        relays = [pid for pid in children_of(os.getpid()) if not is_gone(pid) and b"relay" in read_proc(pid, "cmdline")]
        return {
            "scheduler": [scheduler],
            "agent": agents,
            "forker": forkers,
            "worker": workers_of(forkers),
            "relay": relays,
            "client": [client.pid for client in self.clients],
        }

    def kill_agent(self, rng: random.Random) -> str:
        place = rng.randrange(len(self.agents))
        agent = self.agents[place]
        os.kill(agent.pid, signal.SIGCONT)
        agent.kill()
        self.agents[place] = self.join()
        return f"{agent.pid}, now {self.agents[place].pid}"

    def kill_scheduler(self, rng: random.Random) -> str:
        pid = self.cluster.scheduler.pid
        self.cluster.kill()
        self.cluster.start()
        return f"{pid}, now {self.cluster.scheduler.pid}"

    def await_workers(self) -> None:
        """Wait until all machines are there, and no others."""
        wait_until(lambda: self._count() == self.workers, "not all workers are back", 60)

    def _count(self) -> int:
        agents: Any = self.cluster.status()["agents"]
        return sum(agent["workers"] for agent in agents)

    def close(self) -> None:
        self.cluster.__exit__(None, None, None)


# Calls


class Call(NamedTuple):
    number: int
    seconds: float
    size: int
    fate: str
    argument_size: int


def draw_calls(seed: int, first: int = 0) -> Iterator[Call]:
    """Yield calls without end."""
    rng = random.Random(f"calls {seed}")
    number = first
    while True:
        seconds = rng.choice((0.0, 0.0, 0.0001, 0.001, 0.01)) * rng.uniform(0.5, 1.5)
        if rng.random() < 0.005:
            seconds = rng.uniform(0.1, 0.4)
        size = rng.choices((0, 1000, 100_000, 3_000_000), (80, 15, 4, 1))[0]
        argument_size = rng.choices((0, 1000, 100_000, 3_000_000), (80, 15, 4, 1))[0]
        fate = rng.choice(FATES) if rng.random() < 0.01 else ""
        yield Call(number, seconds, size, fate, argument_size)
        number += 1


class Load:
    """Calls of one executor, submitted by a thread as others end, some of which are cancelled by another thread.

    Args:
        executor: Or a view of one.
        journal: What the calls write, and "confirmed N OUTCOME" behind each cancel.
        seed: Decides what the calls are, and which are cancelled.
        first: Number of the first call.
        width: So many calls are outstanding at most.
        cancelled: Share of the calls.
    """

    def __init__(
        self,
        executor: Any,
        journal: Journal,
        seed: int,
        *,
        first: int = 0,
        width: int = 100,
        cancelled: float = 0.03,
    ) -> None:
        self._executor = executor
        self.journal = journal
        self._rng = random.Random(f"load {seed}")
        self._calls = draw_calls(seed, first)
        self._cancelled = cancelled
        self._room = threading.Semaphore(width)
        self._over = threading.Event()
        self._to_cancel: deque[int] = deque()
        self._submitter = threading.Thread(target=self._submit, name="submitter")
        self._canceller = threading.Thread(target=self._cancel, name="canceller")
        self._failures: list[BaseException] = []
        self.calls: dict[int, Call] = {}
        self.futures: dict[int, Future[Any]] = {}
        self.targets: set[int] = set()
        #: Set when none is accepted any more.
        self.lost = threading.Event()

    def start(self) -> None:
        self._submitter.start()
        self._canceller.start()

    def __enter__(self) -> Load:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Submit no more, and wait for what is outstanding."""
        self._over.set()
        for thread in (self._submitter, self._canceller):
            thread.join()
        if kind is not None:
            return
        if self._failures:
            raise self._failures[0]
        _, pending = wait(self.futures.values(), DEADLINE_S)
        if pending:
            numbers = [number for number, future in self.futures.items() if future in pending]
            raise AssertionError(f"{len(pending)} calls are not over, {numbers[:20]}")

    def _submit(self) -> None:
        rng = self._rng
        try:
            for call in self._calls:
                while not self._room.acquire(timeout=0.1):
                    if self._over.is_set():
                        return
                if self._over.is_set():
                    return
                number, seconds, size, fate, argument_size = call
                self.calls[number] = call
                argument = bytes(argument_size)
                try:
                    future = self._executor.submit(workload.endure, self.journal, number, seconds, size, fate, argument)
                except SchedulerLostError as error:
                    self.lost.set()
                    future = Future()
                    future.set_exception(error)
                    self._over.wait(0.01)
                self.futures[number] = future
                future.add_done_callback(lambda _: self._room.release())
                if rng.random() < self._cancelled:
                    self._to_cancel.append(number)
        except BaseException as error:
            self._failures.append(error)
            self.lost.set()

    def _cancel(self) -> None:
        rng = random.Random(self._rng.random())
        try:
            while not self._over.wait(0.001):
                if not self._to_cancel:
                    continue
                time.sleep(rng.choice((0.0, 0.001, 0.01)))
                numbers = [self._to_cancel.popleft() for _ in range(min(len(self._to_cancel), rng.choice((1, 1, 5))))]
                futures = [self.futures[number] for number in numbers]
                force = rng.random() < 0.8
                self.targets.update(numbers)
                # Those that were not accepted have a plain future.
                asked = [future for future in futures if isinstance(future, ScalerFuture)]
                started_at = time.monotonic()
                self._executor.cancel(asked, force=force)
                waited_s = time.monotonic() - started_at
                for number, future in zip(numbers, futures, strict=True):
                    outcome = getattr(future, "cancel_outcome", None)
                    if future in asked:
                        assert outcome is not None, f"the cancel of {number} was not confirmed in {waited_s:.1f} s"
                        self.journal.write("confirmed", number, outcome.name, now_us())
        except BaseException as error:
            self._failures.append(error)


class MapLoad:
    """Maps of one executor, one after the other, in a thread. What their items write is for `Verdict`.

    Args:
        executor: Or a view of one.
        journal: What the items write.
        seed: Decides what they are.
        retries: Of each item: then no map may fail.
    """

    def __init__(self, executor: Any, journal: Journal, seed: int, *, first: int, retries: int) -> None:
        self._executor = executor
        self._journal = journal
        self._rng = random.Random(f"maps {seed}")
        self._calls = (call for call in draw_calls(seed, first) if call.fate != "raise")
        self._retries = retries
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mapper")
        self._failure: BaseException | None = None
        self.done: Counter[str] = Counter()

    def __enter__(self) -> MapLoad:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the end of the last one."""
        self._over.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._map()
        except BaseException as error:
            self._failure = error

    def _map(self) -> None:
        calls = list(itertools.islice(self._calls, self._rng.choice((1, 10, 100))))
        jobs = [
            (self._journal, call.number, call.seconds, call.size, call.fate, bytes(call.argument_size))
            for call in calls
        ]
        self.done["items"] += len(calls)
        values = []
        try:
            for value in self._executor.map(workload.endure_item, jobs, timeout=2 * DEADLINE_S):
                values.append(value)
        except WorkerDiedError:
            assert not self._retries
            self.done["maps failed"] += 1
        else:
            assert len(values) == len(calls)
            self.done["maps done"] += 1
        assert values == [(call.number, bytes(call.size)) for call in calls[: len(values)]]


class Verdict:
    """What the journal and the futures say of each call.

    Args:
        retries: Of each call.
        may_lose: Whether machines and schedulers were lost: calls without retries may end with SchedulerLostError, and
            cancels unconfirmed.
    """

    def __init__(self, loads: list[Load], *, retries: int = 0, may_lose: bool = False) -> None:
        self.outcomes: Counter[str] = Counter()
        lines: dict[int, list[list[str]]] = {}
        for journal in {load.journal for load in loads}:
            for line in journal.read():
                lines.setdefault(int(line[1]), []).append(line)
        for told in lines.values():
            starts = sum(line[0] == "start" for line in told)
            assert starts <= 1 + retries, f"it was started too often: {told}"
        for load in loads:
            for number, future in load.futures.items():
                told = lines.get(number, [])
                outcome = getattr(future, "cancel_outcome", None)
                try:
                    self._judge(load.calls[number], future, outcome, told, number in load.targets, retries, may_lose)
                except AssertionError as error:
                    raise AssertionError(f"{error}: {load.calls[number]}, {future!r}, {outcome}: {told}") from None

    def _judge(
        self,
        call: Call,
        future: Future[Any],
        outcome: CancelOutcome | None,
        told: list[list[str]],
        is_target: bool,
        retries: int,
        may_lose: bool,
    ) -> None:
        ran = [line for line in told if line[0] != "confirmed"]
        words = [line[0] for line in ran]
        starts = words.count("start")
        assert starts <= 1 + retries, "it was started too often"
        # A call is not started again before the last process that made it is gone.
        pids = [line[2] for line in ran]
        for place, pid in enumerate(pids[1:], 1):
            assert words[place] == "start" or pid == pids[place - 1], "it went on after it was started again"
        assert outcome is None or is_target
        if outcome not in (None, CancelOutcome.FAILED):
            self.outcomes[outcome.name] += 1
            assert future.cancelled()
            if outcome in (CancelOutcome.CANCELED, CancelOutcome.NOT_FOUND):
                assert told[-1][0] == "confirmed", "it ran after its confirm"
            elif outcome is CancelOutcome.UNCONFIRMED:
                assert may_lose
            return
        assert not future.cancelled(), "it was cancelled"
        error = future.exception(0)
        if error is None:
            self.outcomes["completed"] += 1
            assert future.result(0) == (call.number, bytes(call.size))
            assert words[-2:] == ["start", "end"], "it did not run to its end"
            assert words.count("end") == 1 or retries, "it ended twice"
        elif isinstance(error, ValueError) and call.fate == "raise":
            self.outcomes["raised"] += 1
            assert words[-1] == "start"
        elif isinstance(error, WorkerDiedError):
            self.outcomes["died"] += 1
            assert not retries or starts == 1 + retries
        else:
            self.outcomes["lost"] += 1
            assert may_lose and not retries and isinstance(error, SchedulerLostError), "it failed"


def assert_full_strength(scene: Any, executor: ScalerExecutor, workers: int) -> None:
    """So many calls run at once, and the executor has not forgotten how to stop them."""
    started, gate = scene.fifo(), scene.fifo()
    futures = [executor.submit(workload.hold, started, gate, number) for number in range(workers + 1)]
    pids: set[str] = set()
    try:
        while len(pids) < workers:
            pids.add(started.hear())
    except AssertionError as error:
        raise AssertionError(f"only {len(pids)} of {workers} workers are there: {error}") from None
    gate.open(workers + 1)
    assert [future.result(DEADLINE_S) for future in futures] == list(range(workers + 1))


def descriptors_of(pids: list[int]) -> list[int]:
    """Return how many descriptors each of these has open."""
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]


#: Runs calls until it is killed.
CLIENT = """
import sys
import chaos
if __name__ == "__main__":
    chaos.be_client(*sys.argv[1:])
"""


def be_client(address: str, method: str, journal: str, seed: str, first: str) -> None:
    context = multiprocessing.get_context(method)
    executor = ScalerExecutor(2, context, address=address or None)
    Load(executor, copy_of_journal(journal), int(seed), first=int(first)).start()
    threading.Event().wait()
