"""Peers that say anything that the decoder lets through: nobody but they themselves notice."""

import random

import pytest

from scaler_executor.protocol.agent import (
    AgentState,
    Exited,
    Fork,
    Forked,
    Freeze,
    Frozen,
    Interrupt,
    Kill,
    Records,
    Retire,
    Start,
)
from scaler_executor.protocol.agent import Received as AgentReceived
from scaler_executor.protocol.agent import Send as AgentSend
from scaler_executor.protocol.agent import Tick as AgentTick
from scaler_executor.protocol.codec import Decoder, Encoder
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    PROTOCOL_VERSION,
    AgentCapacity,
    AgentConfirm,
    AgentMessage,
    AgentResult,
    Blocked,
    Bye,
    ClientLimited,
    DeathReport,
    Function,
    Hello,
    InheritanceLost,
    Options,
    Output,
    TaskCancel,
    TaskDied,
    TaskResult,
    TaskReturned,
    TaskRunning,
    TaskSplit,
    TaskSubmit,
    ToAgentMessage,
    ToClientMessage,
    Unblocked,
    WorkersBroken,
)
from scaler_executor.protocol.page import RECORD_BATCH_END, RECORD_READY, RECORD_SKIPPED, RECORD_UNWOUND, RECORD_VALUE
from scaler_executor.protocol.scheduler import Drop, PeerLost, Received, SchedulerState, Tick

BASE = 1 << CLIENT_ID_SHIFT
ODD = [-(1 << 63), -BASE, -1, 0, 1 << 31, BASE - 1, BASE, BASE + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
SECONDS = [None, 0.0, 1e-9, 1.0, 1e300, float("inf"), float("nan"), -1.0]
CLIENT, AGENT = 1, 2


class Hostile:
    """A scheduler with an honest client and an honest agent, and peers that are not. Every message passes the codec."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.scheduler, self.agent = SchedulerState(), AgentState(2)
        self.now = 0.0
        self.last_peer = AGENT
        self.encoder = Encoder()
        #: Events for the honest agent that it has not had yet.
        self.events = []
        self.answered = set()
        self.budget = 0
        #: {peer: role}
        self.hostile = {}
        self.say(AGENT, Hello("agent"))
        self.say(AGENT, AgentCapacity(8, 2))
        self.say(CLIENT, Hello("client"))

    def recoded(self, message, expected):
        return Decoder(expected).decode(*self.encoder.encode(message))

    def say(self, peer, message):
        """Have a message arrive at the scheduler, and all that follows."""
        is_agent = peer == AGENT or self.hostile.get(peer) == "agent"
        expected = AgentMessage if is_agent and not isinstance(message, Hello) else type(message)
        self.perform(self.scheduler.handle(Received(peer, self.recoded(message, expected)), self.now))
        self.budget = 20  # or a run of a hostile client would take its time
        while self.events:
            self.to_agent(self.events.pop(0))

    def perform(self, instructions):
        self.scheduler.check()
        for instruction in instructions:
            peer = instruction.peer
            if isinstance(instruction, Drop):
                assert peer in self.hostile, instruction.reason
                del self.hostile[peer]
            elif peer == AGENT:
                self.events.append(AgentReceived(self.recoded(instruction.message, ToAgentMessage)))
            elif self.hostile.get(peer) != "agent":
                message = self.recoded(instruction.message, ToClientMessage)
                if peer == CLIENT and isinstance(message, TaskResult):
                    self.answered.update(no for no, *_ in message.results)

    def to_agent(self, event):
        """Let the honest agent go on. Its workers do single calls at once and never come to the end of a run."""
        out = self.agent.handle(event, self.now)
        self.agent.check()
        deadline = self.agent.next_deadline()
        assert deadline is None or deadline <= self.now + 1e7
        for i in out:
            if isinstance(i, AgentSend):
                message = self.recoded(i.message, AgentMessage)
                self.perform(self.scheduler.handle(Received(AGENT, message), self.now))
            elif isinstance(i, Fork):
                self.events += [Forked(i.worker_id, 1), Records(i.worker_id, [(RECORD_READY, 0, 0, b"")])]
            elif isinstance(i, Start) and self.budget:
                self.budget -= 1
                done = [(RECORD_VALUE, row[0], 0, b"v") for row in i.message.calls]
                items = sum(row[1] for row in i.message.calls)
                if items == len(done):
                    done.append((RECORD_BATCH_END, 1000 * items, items, b""))
                self.events.append(Records(i.worker_id, done))
            elif isinstance(i, (Retire, Kill)):
                self.events.append(Exited(i.worker_id, 1 << 40, 1 << 40, 0, DeathReport("gone")))
            elif isinstance(i, Freeze):
                self.events.append(Frozen(i.worker_id, i.kill_seq, 0, 0, killed=bool(i.kill_seq)))
                if i.kill_seq:
                    self.events.append(Exited(i.worker_id, i.kill_seq, 0, 0, DeathReport("killed")))
                elif i.worker_id in self.agent.workers:
                    # It had begun nothing, and so comes to the end of what it was given.
                    skipped = [(RECORD_SKIPPED, seq, 0, b"") for seq in i.revoke]
                    portions = len(self.agent._crew.workers[i.worker_id].portions)
                    ends = [(RECORD_BATCH_END, 1000, 0, b"")] * portions
                    self.events.append(Records(i.worker_id, [*skipped, *ends]))
            elif isinstance(i, Interrupt):
                self.events.append(Records(i.worker_id, [(RECORD_UNWOUND, i.seq, 0, b"")]))
                self.events.append(Exited(i.worker_id, i.seq, i.seq, 0, DeathReport("unwound")))
        alive = set(self.agent.workers)
        gone = {e.worker_id for e in self.events if hasattr(e, "worker_id")} - alive
        self.events = [e for e in self.events if getattr(e, "worker_id", None) not in gone]

    # What hostile peers say

    def number(self):
        rng = self.rng
        return rng.choice(ODD) if rng.random() < 0.3 else rng.choice([0, 1, 1, 2, 3, 5, 7])

    def numbers(self, count):
        return tuple(self.number() for _ in range(count))

    def task(self):
        return self.rng.choice([*self.scheduler._tasks.by_id, self.number()])

    def rows(self, make):
        return [make() for _ in range(self.rng.choice([1, 1, 2, 4]))]

    def hello(self):
        rng = self.rng
        limits = [rng.choice(ODD) if rng.random() < 0.03 else rng.choice([None, None, 1, 2, 3]) for _ in range(2)]
        version = self.number() if rng.random() < 0.05 else PROTOCOL_VERSION
        role = rng.choice(["client"] * 6 + ["agent"] * 3 + ["x" * 2000])
        return Hello(role, version, "", "n" * rng.choice([1, 5000]), b"", *limits)

    def function(self):
        rng = self.rng
        options = Options(self.number(), rng.choice(SECONDS), self.number(), rng.choice(SECONDS))
        if rng.random() < 0.9:
            options = Options(cancel_grace_s=rng.choice(SECONDS[: 6 if rng.random() < 0.9 else 8]))
        needs = self.rows(self.number) if rng.random() < 0.05 else []
        style = self.number() if rng.random() < 0.05 else 1
        return Function(rng.randint(1, 9) if rng.random() < 0.8 else self.number(), "f", b"", style, options, needs)

    def client_message(self, last_no):
        rng = self.rng
        kind = rng.randrange(100)
        if kind < 60:
            nos = [last_no + number for number in (1, 2, 3)]
            items = rng.choice([1, 1, 1, 4, 1 << 38])
            tasks = [(no, items if no == nos[-1] else 1, rng.choice([0] * 20 + [1]), b"p") for no in nos]
            if rng.random() < 0.03:
                tasks = [(*self.numbers(3), b"p")]
            functions = self.rows(self.function) if rng.random() < 0.1 else []
            return TaskSubmit(tasks, functions, self.rows(self.number) if rng.random() < 0.01 else [], self.number())
        if kind < 98:
            no = rng.randint(1, last_no + 1) if rng.random() < 0.9 else self.number()
            return TaskCancel(
                [(no, rng.randint(1, 9), rng.choice([1, 2]))] if rng.random() < 0.9 else [self.numbers(3)]
            )
        return rng.choice([Bye(), self.hello()])

    def agent_message(self):
        rng = self.rng
        report = DeathReport("x", *self.numbers(1), "", *self.numbers(4))
        messages = [
            lambda: AgentResult(self.rows(lambda: (self.task(), 1, *self.numbers(3), b"v"))),
            lambda: AgentResult([(self.task(), 1, 0, 1, 0, b"v")]),
            lambda: AgentConfirm(self.rows(lambda: (self.task(), 1, *self.numbers(3)))),
            lambda: TaskSplit(self.rows(lambda: (self.task(), *self.numbers(2)))),
            lambda: TaskDied(self.rows(lambda: (self.task(), rng.randint(1, 3), report))),
            lambda: TaskReturned(self.rows(lambda: (self.task(), 1))),
            lambda: TaskRunning(self.rows(self.task)),
            lambda: AgentCapacity(rng.randint(0, 8), rng.randint(0, 4)),
            lambda: AgentCapacity(*self.numbers(2)),
            lambda: WorkersBroken(self.number() if rng.random() < 0.5 else self.last_peer, "no"),
            lambda: ClientLimited(*self.numbers(2)),
            lambda: InheritanceLost(self.number(), "lost"),
            lambda: rng.choice([Blocked([1]), Unblocked([1]), Bye()]),
            lambda: Output(self.rows(lambda: (self.task(), rng.choice([1, 2, 3]), 0, b"printed\n"))),
            lambda: Output(self.rows(lambda: (*self.numbers(3), b"printed"))),
        ]
        return rng.choice(messages)()

    def run(self, steps):
        rng = self.rng
        submitted = 0
        for _ in range(steps):
            self.now += rng.choice([0.0, 0.001, 0.05, 1.0])
            what = rng.random()
            peer = rng.choice(list(self.hostile)) if self.hostile else 0
            if what < 0.1 or not peer:
                self.last_peer += 1
                hello = self.hello()
                self.hostile[self.last_peer] = hello.role
                self.say(self.last_peer, hello)
            elif what < 0.2:
                submitted += 1
                self.say(CLIENT, TaskSubmit([(submitted, 1, 0, b"p")]))
            elif what < 0.22:
                del self.hostile[peer]
                self.perform(self.scheduler.handle(PeerLost(peer, "gone"), self.now))
            elif what < 0.3:
                self.events.append(AgentTick())
                self.perform(self.scheduler.handle(Tick(), self.now))
            elif self.hostile[peer] == "agent":
                self.say(peer, self.agent_message())
            else:
                inner = self.scheduler._peers.get(peer)
                self.say(peer, self.client_message(getattr(inner, "last_no", 0)))
        # When they have all gone, and what they held must have stopped, the honest ones go on.
        for peer in list(self.hostile):
            del self.hostile[peer]
            self.perform(self.scheduler.handle(PeerLost(peer, "gone"), self.now))
        for _ in range(30):
            self.now += 1.0
            self.perform(self.scheduler.handle(Tick(), self.now))
            self.events.append(AgentTick())
            self.say(AGENT, TaskRunning([]))
        self.say(CLIENT, TaskSubmit([(submitted + 1, 1, 0, b"p")]))
        self.say(AGENT, TaskRunning([]))
        assert submitted + 1 in self.answered


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_only_the_offender_is_dropped(first):
    """Whatever a client or an agent says, no machine asserts, and no honest peer is dropped."""
    for seed in range(first, first + 20):
        Hostile(seed).run(300)
