"""Chaos: thousands of calls while workers, forkers, agents, schedulers and clients are killed and stopped at random.

What must hold is in `chaos.Verdict`; besides, the pool has its full strength again afterwards, and nothing is left. The
long version is for `SCALER_EXECUTOR_LONG=1`; these say what it does:

    SCALER_EXECUTOR_CHAOS_SEED   the first seed, of one run each (default: random)
    SCALER_EXECUTOR_CHAOS_RUNS   how many runs each test makes (default: 20)
    SCALER_EXECUTOR_CHAOS_S      seconds of chaos in each run (default: 20)
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chaos import (
    CLIENT,
    SIGNALS,
    Chaos,
    EmbeddedTargets,
    Fault,
    Grid,
    Load,
    MapLoad,
    Verdict,
    assert_full_strength,
    descriptors_of,
)
from support import DEADLINE_S, IS_LONG, Scene, wait_until

from scaler_executor import ScalerExecutor, SchedulerLostError
from scaler_executor.runtime import platform
from scaler_executor.runtime.segments import sweep

Make = Callable[..., ScalerExecutor]

RUNS = int(os.environ.get("SCALER_EXECUTOR_CHAOS_RUNS", 20 if IS_LONG else 2))
LENGTH_S = float(os.environ.get("SCALER_EXECUTOR_CHAOS_S", 20 if IS_LONG else 2))
FIRST_SEED = os.environ.get("SCALER_EXECUTOR_CHAOS_SEED")

pytestmark = [pytest.mark.timeout(LENGTH_S + 120)]


class Figures:
    """What all runs together have done."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}

    def add(self, test: str, **counts: float) -> None:
        self.counts.setdefault(test, Counter()).update(counts)  # type: ignore[arg-type]
        self.counts[test]["runs"] += 1


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    """Takes the figures of each run, and prints the sums at the end if this is the long version."""
    figures = Figures()
    yield figures
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    if IS_LONG:
        with capture.global_and_fixture_disabled():
            for test, counts in figures.counts.items():
                print(f"\n{test}:", ", ".join(f"{name} {count:g}" for name, count in counts.items()))


@pytest.fixture
def seed(turn: int) -> int:
    seed = random.randrange(1 << 30) if FIRST_SEED is None else int(FIRST_SEED) + turn
    print("seed", seed)
    return seed


@pytest.fixture
def start_method(seed: int) -> str:
    return random.Random(seed).choice(["fork", "spawn"])


@pytest.fixture(autouse=True)
def named_for_a_moment(scene: Scene) -> Iterator[None]:
    """Where there is no memory without a name, who is killed at the wrong moment leaves the file of a page."""
    yield
    if platform.PORTABLE:
        for path in scene.temporary.iterdir():
            path.unlink()


def retrying(executor: ScalerExecutor, retries: int) -> Any:
    """Return a view of `executor` whose calls are made again so often."""
    if not retries:
        return executor
    if not hasattr(executor, "with_options"):
        pytest.skip("needs with_options")
    return executor.with_options(retries=retries)


EMBEDDED_FAULTS = [
    Fault(10, "worker", "kill"),
    Fault(6, "worker", "stop", 0.3),
    Fault(2, "worker", "stop and kill"),
    Fault(1, "forker", "kill"),
    Fault(1, "forker", "stop", 0.3),
    Fault(1, "serve", "stop", 0.3),
]


@pytest.mark.parametrize("turn", range(RUNS))
@pytest.mark.parametrize("retries", [0, 30])
def test_embedded(scene: Scene, make: Make, figures: Figures, seed: int, retries: int, turn: int) -> None:
    """Each death costs the call that was in it, or nothing with retries; nothing is started twice, nothing hangs."""
    rng = random.Random(f"shape {seed}")
    workers = rng.randint(1, 4)
    executor = make(workers, cancel_grace=rng.choice((0, 0.1)))
    caller = retrying(executor, retries)
    targets = EmbeddedTargets()
    assert_full_strength(scene, executor, workers)
    before = descriptors_of(targets()["serve"])
    load = Load(caller, scene.journal(), seed, width=rng.choice((3, 30, 300)))
    chaos = Chaos(seed, EMBEDDED_FAULTS, targets, rng.choice((0.03, 0.1)))
    started_at = time.monotonic()
    try:
        maps = MapLoad(caller, load.journal, seed, first=5_000_000, retries=retries)
        with load, maps, chaos:
            time.sleep(LENGTH_S)
        verdict = Verdict([load], retries=retries)
        chaos.note("verdict")
        assert_full_strength(scene, executor, workers)
        wait_until(lambda: descriptors_of(targets()["serve"]) <= before, f"descriptors are left: {before}")
        forked = chaos.done["kill forker"] * workers
        deaths = forked + chaos.done["kill worker"] + chaos.done["stop and kill worker"]
        deaths += sum(call.fate.startswith("SIG") or call.fate == "exit" for call in load.calls.values())
        assert verdict.outcomes["died"] <= deaths
    finally:
        print(f"{workers} workers, {dict(chaos.done)}")
        print("\n".join(f"{us} {text}" for us, text in chaos.log[-300:]))
    print(verdict.outcomes)
    figures.add(
        f"embedded, retries={retries}",
        calls=len(load.calls),
        kills=chaos.kills,
        seconds=round(time.monotonic() - started_at, 1),
        **verdict.outcomes,
        **maps.done,
    )


SERVED_FAULTS = [
    Fault(10, "worker", "kill"),
    Fault(6, "worker", "stop", 0.3),
    Fault(1, "forker", "kill"),
    Fault(1, "forker", "stop", 0.3),
    Fault(0.5, "agent", "stop", 1),
    Fault(0.5, "scheduler", "stop", 1),
    Fault(0.5, "relay", "stop", 1),
    Fault(0.5, "client", "stop", 1),
    Fault(0.5, "client", "kill client"),
]
#: What is noticed after ten seconds only.
GREATER_FAULTS = [Fault(0.4, "agent", "kill agent"), Fault(0.2, "scheduler", "kill scheduler")]


@pytest.fixture
def grid(scene: Scene) -> Iterator[Grid]:
    """A served cluster of three machines."""
    grid = Grid(scene.directory / "cluster", 2, 2)
    try:
        grid.await_workers()
        yield grid
    finally:
        grid.close()


@pytest.mark.parametrize("turn", range(RUNS))
@pytest.mark.parametrize("retries", [0, 30])
def test_served(scene: Scene, grid: Grid, figures: Figures, seed: int, retries: int, turn: int) -> None:
    """The same of a served cluster, with machines and schedulers that are lost, and clients that are killed."""
    rng = random.Random(f"shape {seed}")
    is_greater = bool(seed % 2)
    faults = SERVED_FAULTS + (GREATER_FAULTS if is_greater else [])
    journal = scene.journal()
    numbers = iter(range(10_000_000, 1_000_000_000, 10_000_000))

    def start_client() -> None:
        method = rng.choice(("fork", "spawn"))
        arguments = [grid.cluster.connection, method, journal.path, seed, next(numbers)]
        grid.clients.append(scene.client(CLIENT, *arguments))

    def kill_client(rng: random.Random) -> str:
        client = grid.clients.pop()
        client.close()
        start_client()
        return f"{client.pid}, now {grid.clients[0].pid}"

    executors = [ScalerExecutor(address=grid.cluster.connection, cancel_grace=0.1) for _ in range(2)]
    try:
        loads = [
            Load(
                retrying(executor, retries),
                journal,
                seed + place,
                first=place * 1_000_000,
                width=rng.choice((3, 30, 300)),
            )
            for place, executor in enumerate(executors)
        ]
        assert_full_strength(scene, executors[0], grid.workers)
        before = descriptors_of([agent.pid for agent in grid.agents])
        deeds = {"kill agent": grid.kill_agent, "kill scheduler": grid.kill_scheduler, "kill client": kill_client}
        chaos = Chaos(seed, faults, grid, rng.choice((0.05, 0.2)), deeds)
        started_at = time.monotonic()
        try:
            start_client()
            with loads[0], loads[1]:
                with chaos:
                    time.sleep(LENGTH_S)
                grid.clients.pop().close()
                chaos.note("over")
            chaos.note("settled")
            verdict = Verdict(loads, retries=retries, may_lose=is_greater)
            grid.await_workers()
            for executor in executors:
                assert_full_strength(scene, executor, grid.workers)
            wait_until(
                lambda: max(descriptors_of([agent.pid for agent in grid.agents])) <= max(before),
                f"descriptors are left: {before}",
            )
        finally:
            print(dict(chaos.done))
            print("\n".join(f"{us} {text}" for us, text in chaos.log[-300:]))
            print(
                grid.cluster.status(),
                *(agent.output.read() for agent in [grid.cluster.scheduler, *grid.agents]),
                sep="\n",
            )
        print(verdict.outcomes)
        figures.add(
            f"served, retries={retries}",
            calls=sum(len(load.calls) for load in loads),
            kills=chaos.kills,
            seconds=round(time.monotonic() - started_at, 1),
            **verdict.outcomes,
        )
    finally:
        for executor in executors:
            executor.kill_workers()
            executor.shutdown()


@pytest.mark.parametrize("turn", range(RUNS))
@pytest.mark.parametrize("where", ["embedded", "served"])
def test_scheduler_lost(scene: Scene, figures: Figures, seed: int, start_method: str, where: str, turn: int) -> None:
    """When the process that leads to the scheduler is killed, each call soon has an end; nothing of it stays, and
    another executor works."""
    rng = random.Random(f"shape {seed}")
    grid = Grid(scene.directory / "cluster", 0, 0) if where == "served" else None
    address = None if grid is None else grid.cluster.connection
    victims = "serve" if grid is None else "relay"
    targets = grid or EmbeddedTargets()
    context = multiprocessing.get_context(start_method)
    ended_at = time.monotonic() + LENGTH_S
    calls = rounds = 0
    try:
        while time.monotonic() < ended_at:
            executor = ScalerExecutor(rng.randint(1, 3), context, address=address, cancel_grace=0.1)
            load = Load(
                executor, scene.journal(), rng.randrange(1 << 30), width=rng.choice((3, 30, 300)), cancelled=0.1
            )
            # Without kills: a few in a row, while workers start, would break an executor that has done nothing yet.
            stops = [fault for fault in EMBEDDED_FAULTS if fault.name == "stop" and fault.role != victims]
            chaos = Chaos(rng.randrange(1 << 30), stops, targets, 0.05)
            with chaos, load:
                time.sleep(rng.choice((0.0, 0.01, 0.3)))
                wait_until(lambda: targets()[victims], "there is nobody to kill")
                chosen = targets()[victims]
                if victims == "serve" and rng.random() < 0.3:
                    chosen += targets()["forker"]
                for pid in chosen:
                    number = getattr(signal, rng.choice(SIGNALS))
                    chaos.note(f"{pid}: {number!r}")
                    os.kill(pid, number)
                killed_at = time.monotonic()
                if not load.lost.wait(DEADLINE_S):
                    faulthandler.dump_traceback(all_threads=True)
                    raise AssertionError(f"the loss is not noticed: {chaos.log}, {targets()}")
            noticed_s = time.monotonic() - killed_at
            Verdict([load], may_lose=True)
            with pytest.raises(SchedulerLostError):
                executor.submit(abs, -1)
            executor.shutdown()
            calls += len(load.calls)
            rounds += 1
            assert noticed_s < 10
    finally:
        if grid is not None:
            grid.close()
    figures.add(f"scheduler lost, {where}", calls=calls, kills=rounds, seconds=LENGTH_S)


@pytest.mark.parametrize("turn", range(RUNS))
def test_client_lost(scene: Scene, figures: Figures, seed: int, turn: int) -> None:
    """When a client is killed, alone or with others of its processes, nothing of it is there soon after, and no call
    has been started twice."""
    rng = random.Random(f"shape {seed}")
    before = set(scene.processes())
    ended_at = time.monotonic() + LENGTH_S
    lines = rounds = 0
    while time.monotonic() < ended_at:
        journal = scene.journal()
        method = rng.choice(("fork", "spawn"))
        client = scene.client(CLIENT, "", method, journal.path, rng.randrange(1 << 30), 0)
        wait_until(journal.read, "no call is made")
        targets = EmbeddedTargets(client.pid)
        time.sleep(rng.choice((0.0, 0.01, 0.2)))
        found = targets()
        victims = [("client", client.pid)] + [(role, pid) for role, pids in found.items() for pid in pids]
        chosen = rng.sample(victims[1:], rng.randrange(len(victims))) + victims[:1]
        rng.shuffle(chosen)
        log = []
        for role, pid in chosen:
            how = rng.choice(("SIGKILL", "SIGKILL", "SIGSEGV", "SIGSTOP" if role == "worker" else "SIGKILL"))
            log.append(f"{role} {pid} {how}")
            try:
                os.kill(pid, getattr(signal, how))
            except ProcessLookupError:
                pass  # it has gone with another one
        client.wait()
        wait_until(lambda: set(scene.processes()) <= before, f"processes are left, of {found} after {log}", 10)
        starts = Counter(line[1] for line in journal.read() if line[0] == "start")
        assert set(starts.values()) <= {1}
        lines += len(starts)
        rounds += 1
    sweep(str(scene.shared))  # as the next executor does, where nobody was left to do it
    figures.add("client lost", calls=lines, kills=rounds, seconds=LENGTH_S)
