"""Cancels under fire: by the thousand, from everywhere, while everything ends or is killed; and aimed at the moment
when their target ends.

What calls write into a journal proves that no other call was hit, none ran twice, none on after its confirm, and that
none was lost: see `test_journal`, where shots are aimed by the clock; here the target ends when the test says so.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from typing import Any

import pytest
import workload
from chaos import Call, Chaos, EmbeddedTargets, Fault, Verdict, assert_full_strength, now_us
from served import Served
from support import DEADLINE_S, IS_LONG, Journal, Scene, wait_until

from scaler_executor import CancelOutcome, ScalerExecutor, ScalerFuture

Make = Callable[..., ScalerExecutor]

CALLS = 10_000
#: Each test is made so often: the long version takes some ten minutes.
ROUNDS = 20 if IS_LONG else 1
SHOTS = 400
WORKERS = 4


@pytest.fixture(params=["embedded", "served"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Where the workers are."""
    return "fork" if request.param == "embedded" else "served"


@pytest.fixture(autouse=True, scope="module")
def cluster(served: Served) -> Served:
    """What half of the executors here use."""
    return served


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return random.Random(seed)


class Storm:
    """Many calls, and threads that do something with them."""

    def __init__(self, executor: ScalerExecutor, journal: Journal, rng: random.Random) -> None:
        self.executor = executor
        self.journal = journal
        self.calls: dict[int, Call] = {}
        self.futures: dict[int, ScalerFuture[Any]] = {}
        self.targets: set[int] = set()
        self._rng = rng
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []

    def submit(self, count: int) -> None:
        rng = self._rng
        for number in range(len(self.calls), len(self.calls) + count):
            seconds = rng.choice((0.0, 0.0, 0.0001, 0.001, 0.004)) if rng.random() > 0.002 else 0.2
            call = self.calls[number] = Call(number, seconds, 0, "", 0)
            self.futures[number] = self.executor.submit(
                workload.endure, self.journal, call.number, call.seconds, call.size, call.fate, b""
            )

    def confirm(self, *numbers: int) -> None:
        """Write down that these have been answered."""
        for number in numbers:
            outcome = self.futures[number].cancel_outcome
            assert outcome is not None, f"the cancel of {number} is not confirmed"
            self.journal.write("confirmed", number, outcome.name, now_us())

    def cancel(self, number: int, **options: Any) -> None:
        assert self.futures[number].cancel(**options) is True
        self.confirm(number)

    def numbers(self, group: int, groups: int = 8) -> list[int]:
        """Return a part of the calls, in no order."""
        numbers = [number for number in self.calls if number % groups == group]
        self._rng.shuffle(numbers)
        return numbers

    def thread(self, work: Callable[..., object], *arguments: Any) -> None:
        """Have a thread do it."""

        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                self._failures.append(error)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def settle(self) -> None:
        """Wait for the threads, and for all calls."""
        self.join()
        _, pending = wait(self.futures.values(), DEADLINE_S)
        assert not pending, f"{len(pending)} calls are not over"

    def judge(self, kills: int = 0) -> Counter[str]:
        """Compare the journal with the futures."""
        outcomes = Verdict([self]).outcomes
        assert outcomes["died"] <= kills
        return outcomes


def cancel_each(storm: Storm, numbers: Iterable[int], **options: Any) -> None:
    for number in numbers:
        storm.cancel(number, **options)


def cancel_together(storm: Storm, numbers: list[int]) -> None:
    for first in range(0, len(numbers), 50):
        group = numbers[first : first + 50]
        assert storm.executor.cancel([storm.futures[number] for number in group]) is True
        storm.confirm(*group)


def cancel_from_asyncio(storm: Storm, numbers: list[int]) -> None:
    """Await them all in a loop: some are cancelled by their task, others by a call of their own."""

    async def follow(number: int) -> None:
        future = storm.futures[number]
        wrapped = asyncio.wrap_future(future)
        if number % 3:
            await asyncio.sleep(0)
            wrapped.cancel()
        else:
            assert future.cancel() is True
        # The answer settles the future later, since a loop must not be held.
        loop = asyncio.get_running_loop()
        settled = asyncio.Event()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(settled.set))
        await asyncio.wait_for(settled.wait(), DEADLINE_S)
        if future.cancel_outcome is not None:  # else its result was there before it was asked
            storm.confirm(number)
        await asyncio.wait([wrapped], timeout=DEADLINE_S)
        assert wrapped.done()

    async def main() -> None:
        await asyncio.gather(*map(follow, numbers))

    asyncio.run(main())


def cancel_from_callbacks(storm: Storm, triggers: Iterable[int], numbers: Iterable[int]) -> Callable[[], None]:
    """Have the end of each trigger cancel one of `numbers`. Return what waits for the last one."""
    left = threading.Semaphore(0)
    count = 0
    failures: list[BaseException] = []
    for trigger, number in zip(triggers, numbers, strict=True):
        count += 1

        def cancel(_: object, number: int = number) -> None:
            try:
                storm.cancel(number)
            except BaseException as error:
                failures.append(error)
            finally:
                left.release()

        storm.futures[trigger].add_done_callback(cancel)

    def join() -> None:
        for _ in range(count):
            assert left.acquire(timeout=DEADLINE_S), "a callback has not been called"
        assert not failures, failures[0]

    return join


@pytest.mark.parametrize("turn", range(ROUNDS))
@pytest.mark.parametrize("is_under_fire", [False, True], ids=["calm", "killed"])
def test_storm(
    scene: Scene, make: Make, start_method: str, rng: random.Random, served: Served, is_under_fire: bool, turn: int
) -> None:
    """10,000 calls, queued, running and over, are cancelled from threads, callbacks and asyncio, once and again: each
    gets what became of it, the others complete, whatever happens to the workers meanwhile."""
    workers = 2 if start_method == "served" else WORKERS
    executor = make(workers, cancel_grace=0.1)
    storm = Storm(executor, scene.journal(), rng)
    assert_full_strength(scene, executor, workers)
    targets = EmbeddedTargets(served.scheduler.pid if start_method == "served" else None)
    faults = [Fault(3, "worker", "kill"), Fault(1, "worker", "stop", 0.05), Fault(0.1, "forker", "kill")]
    chaos = Chaos(rng.randrange(1 << 30), faults if is_under_fire else [], targets, 0.03)
    gate, started = scene.fifo(), scene.fifo()
    held = [executor.submit(workload.hold, started, gate) for _ in range(workers)]
    for _ in held:
        started.hear()
    storm.submit(CALLS)
    with chaos:
        storm.targets = {number for number in storm.calls if number % 8}
        callbacks = cancel_from_callbacks(storm, storm.numbers(0), storm.numbers(3))
        callbacks_of_own = cancel_from_callbacks(storm, *itertools.tee(storm.numbers(7)))
        for part in range(4):
            storm.thread(cancel_each, storm, storm.numbers(1)[part::4])
        storm.thread(cancel_together, storm, storm.numbers(2))
        storm.thread(cancel_from_asyncio, storm, storm.numbers(4))
        for _ in range(2):
            storm.thread(cancel_each, storm, storm.numbers(6))
        gate.open(workers)
        for number in storm.numbers(5):
            assert storm.futures[number].cancel(force=False) is True
            outcome = storm.futures[number].cancel_outcome
            assert outcome is not None
            if outcome is not CancelOutcome.FAILED:
                storm.confirm(number)
        storm.settle()
        callbacks()
        callbacks_of_own()
    # What is over is over, whoever asks.
    before = {number: (future.cancelled(), future.cancel_outcome) for number, future in storm.futures.items()}
    for number in storm.targets:
        if before[number][0]:
            assert storm.futures[number].cancel() is True
            assert (storm.futures[number].cancelled(), storm.futures[number].cancel_outcome) == before[number]
    outcomes = storm.judge(chaos.kills + chaos.done["kill forker"] * workers)
    wait(held, DEADLINE_S)
    print(outcomes, dict(chaos.done))
    assert {"completed", "CANCELED", "ALREADY_DONE"} <= set(outcomes)
    assert_full_strength(scene, executor, workers)


@pytest.mark.parametrize("turn", range(ROUNDS))
@pytest.mark.parametrize("cancel_futures", [False, True], ids=["finish", "cancel"])
def test_storm_during_shutdown(
    scene: Scene, make: Make, start_method: str, rng: random.Random, cancel_futures: bool, turn: int
) -> None:
    """Cancels from threads that go on while the executor is shut down are all answered, and nothing waits for ever."""
    executor = make(2, cancel_grace=0.1)
    storm = Storm(executor, scene.journal(), rng)
    storm.submit(CALLS // 4)
    storm.targets = {number for number in storm.calls if number % 4}
    for group in (1, 2):
        storm.thread(cancel_each, storm, storm.numbers(group, 4))
    storm.thread(cancel_together, storm, storm.numbers(3, 4))
    wait([storm.futures[rng.randrange(len(storm.calls) // 10)]], DEADLINE_S)
    executor.shutdown(wait=rng.random() < 0.5, cancel_futures=cancel_futures)
    storm.settle()
    if cancel_futures:
        # What had not started has been taken back besides.
        taken = {number for number in storm.numbers(0, 4) if storm.futures[number].cancelled()}
        assert not taken & {int(line[1]) for line in storm.journal.read() if line[0] == "start"}
        storm.confirm(*taken)
        storm.targets |= taken
    outcomes = storm.judge()
    print(outcomes)


# Aimed


class Released:
    """Targets that end when they are told to, at the moment when they are about to be killed."""

    def __init__(self, scene: Scene, executor: ScalerExecutor, rng: random.Random) -> None:
        self.executor = executor
        self.journal = scene.journal()
        self.released = scene.heartbeat()
        self.rng = rng
        #: Seconds from the cancel to the release: it follows what separates too late from too early.
        self.lead_s = 0.0005
        self.futures: dict[int, ScalerFuture[int]] = {}
        self.targets: list[int] = []
        self._last = 0

    def _submit(self, number: int) -> None:
        self.futures[number] = self.executor.submit(workload.until_released, self.journal, number, self.released)

    def shoot(self) -> None:
        """Cancel a call that is running, release it, and have others behind it in the hands of the same worker."""
        rng, released = self.rng, self.released
        target = self._last + 10
        self._last = target
        self._submit(target)
        future = self.futures[target]
        # Behind it: those with numbers that are released already.
        for number in range(target - 9, target - 9 + rng.randrange(1, 6)):
            self._submit(-number)
        wait_until(lambda: self.has_started(target), "the target does not start")
        self.targets.append(target)
        assert future.cancel(0) is True
        until = time.perf_counter() + max(0.0, self.lead_s + rng.gauss(0, 0.0001))
        while time.perf_counter() < until:
            pass
        while released.count < target:
            released.beat()
        wait([future], DEADLINE_S)
        outcome = future.cancel_outcome
        assert outcome is not None, "not confirmed in 30 s"
        self.journal.write("confirmed", target, outcome.name)
        step_s = 0.05 * self.lead_s + 0.00001
        if outcome is CancelOutcome.CANCELED:
            self.lead_s = max(0.0, self.lead_s - step_s)
        else:
            self.lead_s = min(0.02, self.lead_s + step_s)

    def has_started(self, number: int) -> bool:
        return any(line[:2] == ["start", str(number)] for line in self.journal.read()[-20:])

    def judge(self) -> Counter[str]:
        wait(self.futures.values(), DEADLINE_S)
        lines: dict[int, list[list[str]]] = {number: [] for number in self.futures}
        order: list[tuple[str, int, str]] = []
        for line in self.journal.read():
            lines[int(line[1])].append(line)
            order.append((line[0], int(line[1]), line[2]))
        outcomes: Counter[str] = Counter()
        for number, future in self.futures.items():
            words = [line[0] for line in lines[number]]
            story = f"call {number}, {future!r}, {future.cancel_outcome}: {lines[number]}"
            if number < 0:
                assert future.exception(0) is None and words == ["start", "end"], f"it was hit: {story}"
                continue
            assert future.cancelled(), story
            outcome = future.cancel_outcome
            assert outcome is not None
            outcomes[outcome.name] += 1
            if outcome is CancelOutcome.CANCELED:
                assert words in (["start", "confirmed"], ["start", "end", "confirmed"]), story
                outcomes["ended, and killed before its result was there"] += "end" in words
            else:
                assert words == ["start", "end", "confirmed"], story
        # Calls that began in the target's worker right after it: what a shot that comes too late would hit.
        last: dict[str, int] = {}
        for word, number, pid in order:
            if word == "start":
                outcomes["run behind a target"] += number < 0 < last.get(pid, 0)
                last[pid] = number
        return outcomes


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_target_ends_just_before_the_kill(
    scene: Scene, make: Make, start_method: str, rng: random.Random, turn: int
) -> None:
    """A kill whose target ends at that moment hits it or nothing, never the call that its worker comes to next."""
    shots = Released(scene, make(1, cancel_grace=0), rng)
    for _ in range(SHOTS if start_method == "fork" else SHOTS // 5):
        shots.shoot()
    outcomes = shots.judge()
    print(outcomes, shots.lead_s)
    assert outcomes["CANCELED"] and outcomes["FINISHED_FIRST"] and outcomes["run behind a target"]


@pytest.fixture
def machines(start_method: str, served: Served) -> Iterator[int]:
    """Have another machine join where the cluster is served. Return how many workers there are then."""
    if start_method != "served":
        yield WORKERS
        return
    agent = served.join(2)
    yield 4
    assert agent.stop() == 0
    agent.close()
    wait_until(lambda: served.workers() == 2, "the machine has not left")


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_recalls(scene: Scene, make: Make, machines: int, rng: random.Random, turn: int) -> None:
    """Calls that are taken back from behind one that takes long, at the moment when that ends, run once each: those of
    submit, and the items of a map."""
    executor = make(machines)
    journal = scene.journal()
    durations_s = [
        rng.uniform(0.015, 0.03) if rng.random() < 0.04 else rng.choice((0.0, 0.0, 0.0001)) for _ in range(6000)
    ]
    # This one is far longer than all that waits behind it is going to wait.
    durations_s[len(durations_s) // 2] = 1.0
    jobs = [(journal, number, seconds, 0, "", b"") for number, seconds in enumerate(durations_s)]
    half = len(jobs) // 2
    assert [number for number, _ in executor.map(workload.endure_item, jobs[:half])] == list(range(half))
    futures = [executor.submit(workload.endure, *job) for job in jobs[half:]]
    assert [future.result(DEADLINE_S)[0] for future in futures] == list(range(half, len(jobs)))
    lines = [(line[0], int(line[1]), line[2]) for line in journal.read()]
    counted = Counter((word, number) for word, number, _ in lines)
    assert set(counted.values()) == {1} and len(counted) == 2 * len(jobs)
    # Most of what was given out next stood behind the long one or would have; others have made it meanwhile.
    ended = [number for word, number, _ in lines if word == "end"]
    assert len(set(range(half + 1, half + 100)) & set(ended[: ended.index(half)])) > 10
