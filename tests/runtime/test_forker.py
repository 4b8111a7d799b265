"""The forker and its workers: stopping, killing, splitting, reaping, in real processes."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from forked import Agent, Handle, await_death, is_alive, journal, kill_self, state_of

from scaler_executor.protocol.messages import ForkWorker, FreezeWorker, InterruptWorker, KillWorker
from scaler_executor.protocol.page import (
    RECORD_ERROR,
    RECORD_SKIPPED,
    RECORD_START_FAILED,
    RECORD_UNWOUND,
    RECORD_VALUE,
)
from scaler_executor.runtime import forker, platform
from scaler_executor.runtime.worker import worker_main
from scaler_executor.runtime.worker_config import WorkerConfig

BEGUN = 0
pause = threading.Event().wait


def write(index: int, value: int) -> int:
    """Write into the journal."""
    journal[index] = value
    return value


def begin(value: int = 1) -> None:
    """Tell the test that the call runs, and wait for ever."""
    journal[BEGUN] = value
    pause()


def hold_gil() -> int:
    """Run C code that holds the GIL and looks for no signal."""
    journal[BEGUN] = 1
    return sum(itertools.repeat(1, 10**13))


def spin() -> None:
    """Run for ever, and let other threads run as well."""
    journal[BEGUN] = 1
    while True:
        pass


def defy() -> None:
    """Ignore everything that can be ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    journal[BEGUN] = 1
    while True:
        try:
            pause()
        except BaseException:
            pass


def wait_for_child() -> None:
    """Wait for a subprocess that has a child of its own."""
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE).wait()"
    child = subprocess.Popen([sys.executable, "-c", code])
    journal[BEGUN] = child.pid
    child.wait()


def unwind(index: int) -> None:
    """Wait with something to clean up."""
    try:
        begin()
    finally:
        journal[index] = 7


def read_through_signals() -> None:
    """Stand in a system call that the kernel takes up again after a SIGINT."""
    signal.siginterrupt(signal.SIGINT, False)
    reading, _ = os.pipe()
    journal[BEGUN] = 1
    os.read(reading, 1)


def swallow() -> str:
    """Survive a soft stop."""
    try:
        begin()
    except KeyboardInterrupt:
        pass
    return "done"


def square(value: int) -> int:
    return value * value


def gated(item: int) -> int:
    """Write where the run is and wait at item 3 until the test opens the gate."""
    journal[10 + item] += 1
    journal[BEGUN] = item
    while item == 3 and not journal[1]:
        pass
    return item


@pytest.fixture(autouse=True)
def blank_journal() -> None:
    journal[:] = memoryview(bytes(len(journal) * 8)).cast("q")


def begun(agent: Agent, value: int | None = None) -> None:
    agent.wait(lambda: journal[BEGUN] == value if value else bool(journal[BEGUN]))


def freeze(agent: Agent, handle: Handle, *, kill: int = 0, revoke: tuple[int, ...] = (), split: int = 0) -> None:
    """Send FreezeWorker and wait for the answer."""
    count = len(handle.frozen)
    agent.tell(FreezeWorker(handle.worker_id, kill, list(revoke), split))
    agent.wait(lambda: len(handle.frozen) > count or handle.exited is not None)


def test_worker_runs_calls_and_leaves_at_end_of_file(agent: Agent) -> None:
    """A worker answers its calls in order, and ends cleanly when its socket does."""
    worker = agent.fork()
    seqs = worker.send([(square, (n,)) for n in range(100)])
    assert [worker.value_of(seq) for seq in seqs] == [n * n for n in range(100)]
    worker.socket.close()
    agent.wait(lambda: worker.exited is not None)
    assert worker.exited is not None
    assert (worker.exited.exit_code, worker.exited.current, worker.exited.done) == (0, 100, 100)
    assert worker.exited.peak_memory_bytes > 1 << 20


def test_soft_stop_unwinds(agent: Agent) -> None:
    """An interrupted call runs its `finally`, is reported as unwound, and its worker ends."""
    worker = agent.fork()
    seq, after = worker.send([(unwind, (5,)), (write, (6, 1))])
    begun(agent)
    agent.tell(InterruptWorker(1, seq))
    agent.wait(lambda: worker.exited is not None)
    assert worker.answers() == [(RECORD_UNWOUND, seq, 0, b"")]
    assert worker.exited is not None and worker.exited.exit_code == 0
    assert (journal[5], journal[6]) == (7, 0) and after == 2


def test_unheard_soft_stop_is_repeated(agent: Agent) -> None:
    """A signal that does not end the system call in which the call is, as one that comes right before it, is heard all
    the same."""
    worker = agent.fork()
    seq = worker.call(read_through_signals)
    begun(agent)
    agent.wait(lambda: state_of(worker.pid) == "S")
    agent.tell(InterruptWorker(1, seq))
    agent.wait(lambda: worker.exited is not None)
    assert worker.answers() == [(RECORD_UNWOUND, seq, 0, b"")]


@pytest.mark.parametrize(("call", "unwind_s", "has_ended"), [(read_through_signals, 60.0, True), (defy, 0.01, False)])
def test_fork_waits_for_the_interrupted(
    clean: None, monkeypatch: pytest.MonkeyPatch, call: object, unwind_s: float, has_ended: bool
) -> None:
    """Where interrupted calls need every CPU, new workers come after those have ended, or after a while."""
    monkeypatch.setattr(forker, "UNWIND_S", unwind_s)
    monkeypatch.setattr(forker.cgroups, "cpu_count_usable", lambda: 1)
    agent = Agent()
    try:
        worker = agent.fork()
        seq = worker.call(call)  # type: ignore[arg-type]
        begun(agent)
        agent.tell(InterruptWorker(1, seq), ForkWorker(2))
        agent.wait(lambda: 2 in agent.workers)
        assert (worker.exited is not None) == has_ended
    finally:
        agent.close()


def test_swallowed_interrupt_is_a_value(agent: Agent) -> None:
    """A call that catches the interrupt and returns has finished, and its worker ends all the same."""
    worker = agent.fork()
    seq = worker.call(swallow)
    begun(agent)
    agent.tell(InterruptWorker(1, seq))
    agent.wait(lambda: worker.exited is not None)
    assert worker.answers() == [(RECORD_VALUE, seq, 0, "done")]


def test_interrupt_of_a_call_that_is_not_current(agent: Agent) -> None:
    """An interrupt hits neither the call before nor the call after its target, and the target does not start."""
    worker = agent.fork()
    first, second, third = worker.send([(gated, (3,)), (write, (5, 1)), (write, (6, 1))])
    begun(agent)
    agent.tell(InterruptWorker(1, second))
    freeze(agent, worker)
    journal[1] = 1
    assert worker.value_of(third) == 1
    assert [record[:2] for record in worker.answers()] == [
        (RECORD_VALUE, first),
        (RECORD_SKIPPED, second),
        (RECORD_VALUE, third),
    ]
    assert journal[5] == 0


@pytest.mark.parametrize("call", [hold_gil, defy, begin])
def test_hard_stop(agent: Agent, call: object) -> None:
    """What does not stop softly is killed, and the page says what was in progress."""
    worker = agent.fork()
    seq = worker.call(call)  # type: ignore[arg-type]
    begun(agent)
    if call is not begin:
        agent.tell(InterruptWorker(1, seq))
        freeze(agent, worker)
        assert worker.exited is None and worker.frozen[-1].current == seq
    freeze(agent, worker, kill=seq)
    assert worker.frozen[-1].killed
    agent.wait(lambda: worker.exited is not None)
    assert worker.exited is not None
    assert (worker.exited.exit_code, worker.exited.current, worker.exited.done) == (-9, seq, 0)
    assert worker.answers() == []


def test_hard_stop_takes_the_group(agent: Agent) -> None:
    """WorkerExited comes when the call's subprocess and that one's child are gone, too."""
    worker = agent.fork()
    seq = worker.call(wait_for_child)
    begun(agent)
    child = journal[BEGUN]
    grandchildren: list[int] = []

    def grandchild_is_there() -> bool:
        with open(f"/proc/{child}/task/{child}/children") as file:
            grandchildren[:] = map(int, file.read().split())
        return bool(grandchildren)

    agent.wait(grandchild_is_there)
    freeze(agent, worker, kill=seq)
    agent.wait(lambda: worker.exited is not None)
    assert not any(is_alive(pid) for pid in [child, *grandchildren])


def test_kill_of_a_call_that_is_over(agent: Agent) -> None:
    """A kill aimed at a finished call, or at one that has not started, hits nothing."""
    worker = agent.fork()
    first, second, third = worker.send([(square, (2,)), (gated, (3,)), (square, (4,))])
    begun(agent)
    freeze(agent, worker, kill=first)
    freeze(agent, worker, kill=third)
    assert [(frozen.killed, frozen.current, frozen.done) for frozen in worker.frozen] == 2 * [(False, second, first)]
    journal[1] = 1
    assert worker.value_of(third) == 16


def test_revoke(agent: Agent) -> None:
    """Calls that have not been claimed are taken back; the one in progress is not."""
    worker = agent.fork()
    seqs = worker.send([(gated, (3,)), *[(write, (20 + n, 1)) for n in range(5)]])
    begun(agent)
    freeze(agent, worker, revoke=tuple(seqs[0:1] + seqs[2:5]))
    assert worker.frozen[0].current == seqs[0]
    journal[1] = 1
    assert worker.value_of(seqs[5]) == 1
    assert [journal[20 + n] for n in range(5)] == [1, 0, 0, 0, 1]
    kinds = [record[0] for record in worker.answers()]
    assert kinds == [RECORD_VALUE, RECORD_VALUE, RECORD_SKIPPED, RECORD_SKIPPED, RECORD_SKIPPED, RECORD_VALUE]


def test_split_of_a_running_run(agent: Agent) -> None:
    """The tail of a run is taken back while an item runs; what was claimed is finished, nothing behind it starts."""
    worker = agent.fork()
    run, after = worker.send([(gated, [(n,) for n in range(10)]), (square, (5,))])
    begun(agent, 3)
    freeze(agent, worker, split=run)
    assert (worker.frozen[0].current, worker.frozen[0].item) == (run, 3)
    journal[1] = 1
    assert worker.value_of(after) == 25
    assert [record[1:] for record in worker.answers()] == [*[(run, n, n) for n in range(4)], (after, 0, 25)]
    assert [journal[10 + n] for n in range(10)] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_soft_stop_inside_a_run(agent: Agent) -> None:
    """An interrupted run keeps the items that were finished."""
    worker = agent.fork()
    run = worker.send([(gated, [(n,) for n in range(10)])])[0]
    begun(agent, 3)
    agent.tell(InterruptWorker(1, run))
    agent.wait(lambda: worker.exited is not None)
    assert [record[:3] for record in worker.answers()] == [
        *[(RECORD_VALUE, run, n) for n in range(3)],
        (RECORD_UNWOUND, run, 3),
    ]


@pytest.mark.parametrize(
    ("call", "arguments", "exit_code"),
    [(os._exit, (3,), 3), (kill_self, (signal.SIGSEGV,), -11), (kill_self, (signal.SIGKILL,), -9), (os.abort, (), -6)],
)
def test_crash(agent: Agent, call: object, arguments: tuple[int, ...], exit_code: int) -> None:
    """A crash is reported with its exit code, the call to blame, and every result that was finished before it."""
    worker = agent.fork()
    first, second, _ = worker.send([(square, (3,)), (call, arguments), (square, (4,))])  # type: ignore[list-item]
    agent.wait(lambda: worker.exited is not None)
    assert worker.exited is not None
    assert (worker.exited.exit_code, worker.exited.current, worker.exited.done) == (exit_code, second, first)
    assert worker.answers() == [(RECORD_VALUE, first, 0, 9)]


def test_freezes_of_several_workers_overlap(agent: Agent) -> None:
    """Many workers are frozen and killed at once, and one that is stopped by somebody else stays stopped."""
    workers = [agent.fork(n) for n in range(1, 5)]
    seqs = [worker.call(begin, worker.worker_id) for worker in workers]
    agent.wait(lambda: all(worker.page[0] for worker in workers))
    os.kill(workers[0].pid, signal.SIGSTOP)
    agent.wait(lambda: state_of(workers[0].pid) == "T")
    for worker in workers:
        agent.tell(FreezeWorker(worker.worker_id, 99))
    agent.wait(lambda: all(worker.frozen for worker in workers))
    assert [state_of(worker.pid) == "T" for worker in workers] == [True, False, False, False]
    for worker, seq in zip(workers, seqs, strict=True):
        agent.tell(FreezeWorker(worker.worker_id, seq))
    agent.wait(lambda: all(worker.exited for worker in workers))
    assert all(worker.frozen[-1].killed for worker in workers)


def test_kill_worker(agent: Agent) -> None:
    """KillWorker needs no call, and requests for a worker that is gone are dropped."""
    worker = agent.fork()
    agent.tell(KillWorker(1))
    agent.tell(FreezeWorker(1, 1))
    agent.wait(lambda: worker.exited is not None)
    agent.tell(InterruptWorker(1, 1))
    agent.tell(KillWorker(1))
    assert worker.frozen == []
    assert agent.fork(2).value_of(agent.workers[2].call(square, 6)) == 36


def test_death_of_the_forker(agent: Agent) -> None:
    """Workers die with their forker, whatever they are doing. Where the kernel does not see to it, it is the agent that
    kills those that hold the GIL."""
    workers = [agent.fork(1), agent.fork(2)]
    workers[0].call(spin if platform.PORTABLE else hold_gil)
    begun(agent)
    os.kill(agent.forker_pid, signal.SIGKILL)
    for worker in workers:
        await_death(worker.pid)


def test_initializer(clean: None) -> None:
    """The initializer runs in each worker before its first call."""
    agent = Agent(WorkerConfig(initializer=write, initargs=(9, 4)))
    worker = agent.fork()
    assert journal[9] == 4
    assert worker.value_of(worker.call(square, 2)) == 4
    agent.close()


def test_initializer_that_fails(clean: None) -> None:
    """A failing initializer is reported with its traceback, and the worker ends."""
    agent = Agent(WorkerConfig(initializer=square, initargs=("x",)))
    worker = agent.fork()
    agent.wait(lambda: worker.exited is not None)
    assert worker.exited is not None and worker.exited.exit_code == 1
    assert b"TypeError" in worker.records[0][3] and b"in square" in worker.records[0][3]
    agent.close()


def begin_unstoppable(path: str) -> None:
    """Stand in a system call that no stop interrupts: a vfork whose child waits for a writer of its FIFO."""
    journal[BEGUN] = 1
    os.waitpid(
        os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, path, os.O_RDONLY, 0)]), 0
    )


def test_stop_deadline(clean: None, tmp_path: Path) -> None:
    """A worker that does not stop in time is reported as stuck, and runs on."""
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    agent = Agent(stop_deadline_s=0.05)
    worker = agent.fork()
    seq = worker.call(begin_unstoppable, path)
    begun(agent)
    agent.wait(lambda: state_of(worker.pid) == "D")
    freeze(agent, worker, kill=seq)
    assert worker.frozen[0].stuck and not worker.frozen[0].killed
    with open(path, "w"):
        assert worker.value_of(seq) is None
    assert worker.value_of(worker.call(square, 3)) == 9
    agent.close()


class SlowPage:
    """A page whose words take their time: whatever the worker does between two of them, a stop can fall into it."""

    def __init__(self, words: memoryview) -> None:
        self.words = words
        self.obj = words.obj

    def __getitem__(self, index: int) -> int:
        value: int = self.words[index]
        for _ in range(300):
            pass
        return value

    def __setitem__(self, index: int, value: int) -> None:
        for _ in range(300):
            pass
        self.words[index] = value
        for _ in range(300):
            pass


@pytest.mark.parametrize("is_slow", [False, True])
def test_race(clean: None, monkeypatch: pytest.MonkeyPatch, is_slow: bool) -> None:
    """Stops and revokes aimed at the running and the next calls: none hits another, no result is lost or doubled."""
    if is_slow:
        # Look before claim, or DONE before the result, fails here within a second, and hardly ever at full speed.
        monkeypatch.setattr(
            forker, "worker_main", lambda sock, fd, page, *rest: worker_main(sock, fd, SlowPage(page), *rest)
        )
    seed = random.randrange(1 << 30)
    hostile = HostileRun(random.Random(seed), calls=4000, least_hits=25 if is_slow else 5)
    try:
        hostile.run()
    except BaseException:
        print("seed", seed)
        raise


def count_call(number: int, length: int) -> int:
    """Count a start in the journal."""
    journal[number] += 1
    for _ in range(length):
        pass
    return number


MAX_CALLS = 100_000


class HostileRun:
    """Makes thousands of quick calls and aims at them. Each call counts its starts in a word of the journal."""

    def __init__(self, rng: random.Random, *, calls: int, least_hits: int) -> None:
        self.rng = rng
        self.least_hits = least_hits
        self.agent = Agent()
        self.counts = {"killed": 0, "crashed": 0, "revoked": 0, "unwound": 0, "skipped": 0, "finished": 0}
        self.pending = list(range(calls, 0, -1))
        #: In the worker's hands, by seq; and taken back from it, but not skipped yet.
        self.outstanding: dict[int, int] = {}
        self.revoked: dict[int, int] = {}
        #: Numbers of the present worker's calls that were asked to stop softly.
        self.interrupted: set[int] = set()
        self.finished: set[int] = set()
        self.stopped: set[int] = set()
        self.aims = [*2 * [self.kill, self.interrupt], *3 * [self.revoke], self.crash]
        self.worker_ids = itertools.count(1)
        self.replace_worker()

    def run(self) -> None:
        """Make every call, then compare with the journal."""
        total = len(self.pending)
        while self.pending or self.outstanding or min(self.counts.values()) < self.least_hits:
            if not self.pending and not self.outstanding:
                # Not every kind of stop has hit often enough: with both CPUs busy they mostly come too late.
                assert total < MAX_CALLS, self.counts
                self.pending = list(range(total + 1000, total, -1))
                total += 1000
            if not self.outstanding:
                batch = [self.pending.pop() for _ in range(min(len(self.pending), self.rng.choice((5, 50, 200))))]
                length = self.rng.choice((0, 1000, 5000))
                seqs = self.worker.send([(count_call, (number, length)) for number in batch])
                self.outstanding.update(zip(seqs, batch, strict=True))
            target = max(1, int(self.worker.page[0]) + self.rng.choice((0, 0, 1, 1, 2, 4)))
            self.rng.choice(self.aims)(target)
            self.take()
        assert len(self.finished) + len(self.stopped) == total and not self.finished & self.stopped
        assert [number for number in self.finished if journal[number] != 1] == [], "started twice"
        assert [number for number in self.stopped if journal[number] > 1] == [], "started twice"
        self.agent.close()

    def kill(self, target: int) -> None:
        freeze(self.agent, self.worker, kill=target)
        if self.worker.exited is not None or not self.worker.frozen[-1].killed:
            return
        assert self.worker.frozen[-1].current == target, "the wrong call was killed"
        self.agent.wait(lambda: self.worker.exited is not None)
        self.counts["killed"] += 1
        self.take()
        if target in self.outstanding:
            self.stopped.add(self.outstanding.pop(target))
        self.requeue(target)

    def crash(self, target: int) -> None:
        """Kill the worker whatever it does. What its page says must agree with its pipe."""
        self.agent.tell(KillWorker(self.worker.worker_id))
        self.agent.wait(lambda: self.worker.exited is not None)
        exited = self.worker.exited
        assert exited is not None
        self.counts["crashed"] += 1
        self.take()
        if exited.current != exited.done and exited.current in self.outstanding:
            self.stopped.add(self.outstanding.pop(exited.current))
        self.requeue(exited.current)

    def revoke(self, target: int) -> None:
        freeze(self.agent, self.worker, revoke=(target, target + 1))
        for seq in (target, target + 1):
            if seq > self.worker.frozen[-1].current and seq in self.outstanding and seq not in self.interrupted:
                number = self.revoked[seq] = self.outstanding.pop(seq)
                assert journal[number] == 0, "a call that was taken back had started"
                self.pending.insert(0, number)
                self.counts["revoked"] += 1

    def interrupt(self, target: int) -> None:
        if target in self.outstanding:
            self.interrupted.add(target)
            self.agent.tell(InterruptWorker(self.worker.worker_id, target))
            freeze(self.agent, self.worker)

    def take(self) -> None:
        """Look at every record since the last time."""
        self.agent.take(self.worker, self.worker.pipe.read(1 << 20))
        records, self.read = self.worker.records[self.read :], len(self.worker.records)
        for kind, seq, _, value in records:
            if kind == RECORD_VALUE:
                number = self.outstanding.pop(seq)
                assert value == number and number not in self.finished, "a result came twice"
                self.finished.add(number)
                self.counts["finished"] += 1
            elif kind == RECORD_SKIPPED and seq in self.revoked:
                del self.revoked[seq]
            elif kind == RECORD_SKIPPED:
                number = self.outstanding.pop(seq)
                assert seq in self.interrupted and journal[number] == 0, "skipped without a reason"
                self.stopped.add(number)
                self.counts["skipped"] += 1
            elif kind == RECORD_UNWOUND:
                assert seq in self.interrupted, "the wrong call was interrupted"
                self.stopped.add(self.outstanding.pop(seq))
                self.counts["unwound"] += 1
                self.agent.wait(lambda: self.worker.exited is not None)
                self.requeue(seq)
                return
            else:
                assert kind not in (RECORD_ERROR, RECORD_START_FAILED), value

    def requeue(self, last: int) -> None:
        """The worker ended in call `last`: what it had not started is made by the next one."""
        for seq, number in self.outstanding.items():
            assert seq > last, "a finished result was lost"
            assert journal[number] == 0, "a call behind the stopped one had started"
            self.pending.append(number)
        self.replace_worker()

    def replace_worker(self) -> None:
        self.outstanding.clear()
        self.revoked.clear()
        self.interrupted.clear()
        self.read = 0
        self.worker = self.agent.fork(next(self.worker_ids))
