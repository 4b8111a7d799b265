"""Peers that say whatever they like: none of it breaks a state machine, or reaches anybody else.

What is tried is what the decoders let through, for nothing else gets so far: well-formed messages with numbers, names
and payloads that fit nothing.
"""

import random
import typing

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaler_executor.protocol import messages
from scaler_executor.protocol.agent import AgentState, Fork, Forked, Freeze, Records
from scaler_executor.protocol.agent import Received as AgentReceived
from scaler_executor.protocol.agent_dispatch import LOOK_S
from scaler_executor.protocol.codec import Decoder, Encoder
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    AgentCapacity,
    AgentConfirm,
    AgentResult,
    Bye,
    CancelKind,
    DeathReport,
    Frames,
    Function,
    Hello,
    OperatorCancel,
    Options,
    Refused,
    StatusAsk,
    TaskCancel,
    TaskCancelConfirm,
    TaskDied,
    TaskReturned,
    TaskRun,
    TaskRunning,
    TaskSplit,
    TaskSubmit,
    Welcome,
)
from scaler_executor.protocol.page import RECORD_READY
from scaler_executor.protocol.scheduler import Drop, PeerLost, Received, SchedulerState, Send, Tick
from scaler_executor.protocol.scheduler_events import Event

HONEST_CLIENT, HONEST_AGENT, LOCAL, CLIENT, AGENT, OBSERVER, STRANGER = range(1, 8)
BASE = 1 << CLIENT_ID_SHIFT
#: What the numbers of clients, tasks, items, functions and requests are in these clusters, and what they never are.
LIKELY = st.sampled_from([0, 1, 2, 3, 4, BASE + 1, BASE + 2, 2 * BASE + 1, 2 * BASE + 2, 2 * BASE + 3])
ODD = st.sampled_from([-1, -2, 5, 200, -BASE, 1 << 40, (1 << 40) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)])
NUMBER = st.integers(0, 3) | LIKELY | LIKELY | ODD
FLOAT = st.sampled_from([0.0, 1.0, -1.0, 1e308, float("inf"), float("-inf"), float("nan")])
PAYLOAD = st.binary(max_size=3) | st.lists(st.binary(max_size=3), min_size=1, max_size=3).map(Frames)
TEXT = st.sampled_from(["", "a", "client", "agent", "observer", "\n\x1b[31m", "x" * 1000])
SIMPLE = {
    int: NUMBER,
    float: FLOAT,
    str: TEXT,
    bytes: st.binary(max_size=3),
    bool: st.booleans(),
    type(None): st.none(),
    messages.WirePayload: PAYLOAD,
}
DECODE = Decoder[typing.Any](messages.FromPeerMessage).decode
DECODERS = {
    "client": Decoder[typing.Any](messages.ToClientMessage).decode,
    "agent": Decoder[typing.Any](messages.ToAgentMessage).decode,
    "observer": Decoder[typing.Any](messages.ToObserverMessage).decode,
}


def values(kind):
    """Return a strategy for a type as it stands in a message."""
    if kind in SIMPLE:
        return SIMPLE[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: values(hints[name]) for name in kind.__struct_fields__})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*(values(argument) for argument in arguments))
    return st.one_of(*(values(argument) for argument in arguments))  # a union


class Liar:
    """Makes messages out of what it has been told: every number that it has seen, in any place, and some more."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        #: Numbers that its kind has been sent, the latest ones last.
        self.seen = [1, 2]
        self.last_no = 2

    def hear(self, message):
        """Take note of all numbers in a message that came."""
        todo = [msgspec.to_builtins(message, enc_hook=lambda _: 0)]
        while todo:
            value = todo.pop()
            if type(value) is int:
                self.seen.append(value)
            elif isinstance(value, (list, tuple)):
                todo += value
        del self.seen[:-60]

    def number(self):
        choice = self.random.random()
        if choice < 0.45:
            return self.random.choice(self.seen)
        if choice < 0.9:
            return self.random.randrange(4)
        return self.random.choice([-1, 5, 200, BASE + 1, -BASE, 1 << 40, 1 << 63, (1 << 64) - 1, -(1 << 63)])

    def message(self, kind):
        """Return a message that may well be believed, for all that it can know of its rows; or any other one."""
        choice, below = self.random.choice, self.random.randrange
        if self.random.random() < 0.25:
            return self.value(kind)
        self.last_no += 4
        no, known = self.last_no, [number for number in self.seen if number > BASE] or [BASE + 1]
        make = {
            TaskSubmit: lambda: TaskSubmit(
                [(no, below(1, 4), 1, b"x")], [Function(1, "f", b"f", 1, Options(below(2)))]
            ),
            TaskCancel: lambda: TaskCancel([(no - 4 * below(3), below(1, 4), below(1, 3))]),
            OperatorCancel: lambda: OperatorCancel([(task >> CLIENT_ID_SHIFT, task % BASE) for task in known[-2:]]),
            AgentResult: lambda: AgentResult([(choice(known), below(1, 3), below(2), below(1, 3), below(3), b"r")]),
            AgentConfirm: lambda: AgentConfirm(
                [(choice(known), below(1, 3), number, below(3), below(3)) for number in self.seen[-6:]]
            ),
            TaskSplit: lambda: TaskSplit([(choice(known), 1, below(3))]),
            TaskDied: lambda: TaskDied([(choice(known), below(1, 3), self.value(DeathReport))]),
            TaskReturned: lambda: TaskReturned([(choice(known), below(1, 3))]),
            AgentCapacity: lambda: AgentCapacity(below(8), below(8)),
        }.get(kind)
        return make() if make is not None else self.value(kind)

    def value(self, kind):
        pick = self.random.choice
        if kind is int:
            return self.number()
        if kind is float:
            return pick([0.0, 1.0, -1.0, 1e308, float("inf"), float("nan")])
        if kind is str:
            return pick(["", "a", "client", "agent", "3.11", "x" * 1000])
        if kind is bytes:
            return pick([b"", b"x", b"yz"])
        if kind is bool:
            return pick([False, True])
        if kind is type(None):
            return None
        if kind == messages.WirePayload:
            return pick([b"", b"x", Frames([b"a", b"bc"])])
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            hints = typing.get_type_hints(kind)
            return kind(**{name: self.value(hints[name]) for name in kind.__struct_fields__})
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is list:
            return [self.value(arguments[0]) for _ in range(pick([0, 1, 1, 2]))]
        if origin is tuple:
            return tuple(self.value(argument) for argument in arguments)
        return self.value(pick(arguments))  # a union


def union(kind):
    return st.one_of(*(values(member) for member in typing.get_args(kind)))


ANY_MESSAGE = union(messages.FromPeerMessage)
FROM_PEER = {
    CLIENT: union(messages.ClientMessage) | ANY_MESSAGE,
    AGENT: union(messages.AgentMessage) | ANY_MESSAGE,
    OBSERVER: union(messages.ObserverMessage) | ANY_MESSAGE,
    STRANGER: values(Hello) | ANY_MESSAGE,
}
STEP = st.one_of(*(st.tuples(st.just(peer), message) for peer, message in FROM_PEER.items()))


def over_the_wire(message, decode):
    """Return what arrives of a message."""
    return decode(*Encoder().encode(message))


class Cluster:
    """A scheduler with an honest client and an honest agent, and others."""

    def __init__(self, liar=None):
        self.liar = liar
        self.state = SchedulerState("3.11")
        self.now = 100.0
        self.roles = {}
        #: What the last stranger wants to be.
        self.asks_for = ""
        #: Every peer that was dropped because of an error.
        self.dropped = set()
        self.last_no = 0
        self.held = []
        self.local = AgentState(2)
        for peer, role in ((HONEST_CLIENT, "client"), (HONEST_AGENT, "agent"), (LOCAL, "agent")):
            self.got(peer, Hello(role, python="3.11"))
        for peer in (HONEST_AGENT, LOCAL):
            self.got(peer, AgentCapacity(2, 1))
        for peer, role in ((CLIENT, "client"), (AGENT, "agent"), (OBSERVER, "observer")):
            self.got(peer, Hello(role, python="3.11"))
        self.got(AGENT, AgentCapacity(5, 5))
        self.got(CLIENT, TaskSubmit([(1, 1, 1, b"a"), (2, 1, 1, b"b")], [Function(1, "f", b"f")]))
        self.submit()

    def submit(self):
        """The honest client submits a run and a call."""
        no = self.last_no + 1
        self.last_no += 4
        self.got(HONEST_CLIENT, TaskSubmit([(no, 3, 7, b"c"), (no + 3, 1, 7, b"d")], [Function(7, "g", b"g")]))

    def got(self, peer, message):
        message = over_the_wire(message, DECODE)
        if isinstance(message, Hello) and peer not in self.roles:
            self.asks_for = message.role
        self.feed(Received(peer, message))

    def feed(self, event: Event):
        todo = [event]
        while todo:
            for instruction in self.state.handle(todo.pop(0), self.now):
                if isinstance(instruction, Drop):
                    if instruction.error:
                        self.dropped.add(instruction.peer)
                    self.roles.pop(instruction.peer, None)
                else:
                    self.sent(instruction.peer, instruction.message, todo)
            self.state.check()

    def sent(self, peer, message, todo):
        """Whatever is sent can be sent, and read by whom it goes to."""
        if isinstance(message, Welcome):
            self.roles[peer] = self.asks_for
        elif peer not in self.roles:
            assert isinstance(message, Refused)
            return
        message = over_the_wire(message, DECODERS[self.roles[peer]])
        if self.liar is not None and peer in (CLIENT, AGENT):
            self.liar.hear(message)
        if peer == HONEST_AGENT and isinstance(message, TaskRun):
            for task_id, attempt, _, items, _, _, _ in message.tasks:
                todo.append(Received(peer, AgentResult([(task_id, attempt, 0, items, 0, b"r")])))
        elif peer == LOCAL:
            for _ in self.local.handle(AgentReceived(message), self.now):
                pass
            self.local.check()


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, max_size=12))
def test_scheduler(steps):
    """Whatever clients, agents, observers and strangers say: no assertion breaks, what is sent can be sent, and nobody
    else is dropped."""
    cluster = Cluster()
    for peer, message in steps:
        if peer not in cluster.dropped and (peer in cluster.roles or peer == STRANGER):
            cluster.got(peer, message)
        cluster.now += 0.01
        cluster.feed(Tick())
    end(cluster)


@pytest.mark.parametrize("seed", range(60))
def test_scheduler_and_peers_that_know_something(seed):
    """The same for peers that lie about the tasks that are really theirs."""
    cluster = Cluster(Liar(seed))
    liar = cluster.liar
    kinds = {
        CLIENT: typing.get_args(messages.ClientMessage),
        AGENT: typing.get_args(messages.AgentMessage),
        OBSERVER: typing.get_args(messages.ObserverMessage),
    }
    for _ in range(150):
        peer = liar.random.choice([CLIENT, AGENT, AGENT, OBSERVER])
        if peer not in cluster.roles:
            # It was dropped, and comes again.
            cluster.dropped.discard(peer)
            cluster.got(peer, Hello({CLIENT: "client", AGENT: "agent", OBSERVER: "observer"}[peer], python="3.11"))
            liar.last_no = 0
            if peer == AGENT:
                cluster.got(AGENT, AgentCapacity(5, 5))
        else:
            kind = liar.random.choice(kinds[peer])
            if kind is not Hello and (kind is not Bye or liar.random.random() < 0.1):
                cluster.got(peer, liar.message(kind))
        if liar.random.random() < 0.3:
            cluster.submit()
            no = cluster.last_no - liar.random.choice([0, 3, 4, 7])
            cluster.got(HONEST_CLIENT, TaskCancel([(no, 1, liar.random.choice([CancelKind.SOFT, CancelKind.FORCED]))]))
        cluster.now += liar.random.choice([0.0, 0.01, 0.5, 3.0])
        cluster.feed(Tick())
    end(cluster)


def end(cluster):
    """Whoever lies leaves; nobody else has been dropped."""
    cluster.submit()
    if cluster.roles.get(OBSERVER) == "observer":
        cluster.got(OBSERVER, StatusAsk())
    for peer in (CLIENT, AGENT, OBSERVER, STRANGER):
        if cluster.roles.pop(peer, None):
            cluster.feed(PeerLost(peer, "gone"))
    cluster.now += 20
    cluster.feed(Tick())
    assert not cluster.dropped & {HONEST_CLIENT, HONEST_AGENT, LOCAL}
    assert cluster.roles.keys() == {HONEST_CLIENT, HONEST_AGENT, LOCAL}


# What was found in this way


def test_numbers_that_add_up_to_too_much():
    """Agents that claim to have more workers than any machine has are dropped: their sum is sent to clients."""
    cluster = Cluster()
    cluster.got(AGENT, AgentCapacity(1, (1 << 64) - 1))
    assert cluster.dropped == {AGENT}
    cluster.got(STRANGER, Hello("client", python="3.11"))
    assert cluster.roles[STRANGER] == "client"


@pytest.mark.parametrize("grace_s", [float("nan"), -1.0, float("-inf")])
def test_grace_that_is_no_time(grace_s):
    """A client's grace time that is no number, or negative, is none: it must not get among an agent's deadlines."""
    agent = AgentState(1)
    function = Function(1, "f", b"f", options=Options(cancel_grace_s=grace_s))
    out = agent.handle(AgentReceived(TaskRun([(1, 1, 1, 1, 0, 1, b"")], [(1, function)])), 0.0)
    (fork,) = [instruction for instruction in out if isinstance(instruction, Fork)]
    agent.handle(Forked(fork.worker_id, 100), 0.0)
    agent.handle(Records(fork.worker_id, [(RECORD_READY, 0, 0, b"")]), 0.0)
    out = agent.handle(AgentReceived(TaskCancel([(1, 1, CancelKind.FORCED)])), 0.0)
    assert any(isinstance(instruction, Freeze) for instruction in out)
    assert agent.next_deadline() == LOOK_S


def test_names_are_cut():
    """What strangers call themselves, their functions and their Python is neither repeated at length nor obeyed by a
    terminal."""
    cluster = Cluster()
    (refused, _) = cluster.state.handle(Received(STRANGER, Hello("client", python="3\x1b[31m")), 100.0)
    assert refused.message.reason == "it runs Python unknown, the scheduler 3.11"
    (refused, _) = cluster.state.handle(Received(STRANGER, Hello("client", python="9" * 10_000)), 100.0)
    assert len(refused.message.reason) < 300
    cluster.feed(PeerLost(HONEST_AGENT, "gone"))  # it would answer at once
    name = "f" * 10_000
    cluster.got(CLIENT, TaskSubmit([(9, 1, 9, b"a")], [Function(9, name, b"f")]))
    task_id = (2 << CLIENT_ID_SHIFT) + 9
    cluster.got(cluster.state._tasks.by_id[task_id].agent.peer, TaskRunning([task_id]))
    (sent,) = cluster.state.handle(Received(OBSERVER, StatusAsk()), 101.0)
    assert [call.function for call in sent.message.calls] == [name[:200]]


@pytest.mark.parametrize(
    "message", [StatusAsk(), TaskSubmit([]), AgentResult([]), Bye(), AgentCapacity(1, 1)], ids=repr
)
def test_before_hello(message):
    """Whoever says anything before Hello is dropped."""
    cluster = Cluster()
    cluster.got(STRANGER, message)
    assert cluster.dropped == {STRANGER}


@pytest.mark.parametrize("peer", [CLIENT, AGENT, OBSERVER])
@pytest.mark.parametrize("role", ["client", "agent", "observer"])
def test_a_second_hello(peer, role):
    """Whoever says Hello again, as itself or as somebody else, is dropped."""
    cluster = Cluster()
    cluster.got(peer, Hello(role, python="3.11"))
    assert cluster.dropped == {peer}


def test_guessing_numbers_of_tasks():
    """Whatever number a client names, it is one of its own calls or none: those of others are neither cancelled nor
    told of."""
    cluster = Cluster()
    state = cluster.state
    theirs = [task_id for task_id, task in state._tasks.by_id.items() if task.client.peer == HONEST_CLIENT]
    assert theirs
    own = 2 << CLIENT_ID_SHIFT
    for task_id in theirs:
        for no in (task_id, task_id - own, task_id + own, task_id % BASE, task_id ^ own):
            if not 0 < no < 1 << CLIENT_ID_SHIFT:
                continue  # no client has such a number: see test_hostile
            message = TaskCancel([(no, 1, CancelKind.FORCED)])
            for sent in state.handle(Received(CLIENT, over_the_wire(message, DECODE)), cluster.now):
                # Its own call of this number is stopped, at its agent; or there is none.
                assert isinstance(sent, Send)
                if sent.peer == CLIENT:
                    assert sent.message == TaskCancelConfirm([(no, 1, 1, 0, 0, True)])
                else:
                    assert {row[0] for row in sent.message.cancels} <= {own + 1, own + 2}
    assert {state._tasks.by_id[task_id].user_cancel_no for task_id in theirs} == {0}
    assert not cluster.dropped
