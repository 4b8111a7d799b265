"""The link: in order and exactly once, whatever the transports do, or the peer is lost."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scaler_executor.protocol.codec import LocalProtocolError
from scaler_executor.protocol.link import (
    ACK_AFTER_PACKETS,
    ACK_AFTER_S,
    Ack,
    Arrived,
    Connected,
    Data,
    Deliver,
    Disconnected,
    Greeting,
    LinkState,
    Outgoing,
    PeerLost,
    Tick,
    Transmit,
)

US, THEM = b"us", b"them"


class Link(LinkState):
    """A link end that checks itself after each step."""

    def __init__(self, nonce=US, **settings):
        super().__init__(nonce, **{"connects": True, "now": 0.0, **settings})
        self.now = 0.0

    def on(self, event):
        out = self.handle(event, self.now)
        self.check()
        return out

    def send(self, packet, size=1):
        return self.on(Outgoing(packet, size))

    def got(self, frame):
        return self.on(Arrived(frame))

    def tick(self, after):
        self.now += after
        return self.on(Tick())


def up(**settings):
    """Return the connecting end of a link that is UP, in epoch 1."""
    link = Link(**settings)
    assert link.on(Connected()) == [Transmit(Greeting(1, US, b"", 0))]
    assert link.got(Greeting(1, THEM, US, 0)) == []
    assert link.state == "UP"
    return link


def lost(out):
    return len(out) == 1 and type(out[0]) is PeerLost


def test_accepting_end():
    """The end that waits is greeted first and answers with what it has."""
    link = Link(THEM, connects=False)
    assert link.send("a") == [] and link.on(Connected()) == []
    out = link.got(Greeting(1, US, b"", 0))
    assert out == [Transmit(Greeting(1, THEM, b"", 0)), Transmit(Data(1, 1, 0, "a"))]


def test_packets_flow():
    """Packets are numbered, delivered in order and acknowledged by what goes the other way."""
    link = up()
    assert link.send("a") == [Transmit(Data(1, 1, 0, "a"))]
    assert link.got(Data(1, 1, 1, "x")) == [Deliver(["x"])]
    assert link.outstanding == 0
    assert link.send("b") == [Transmit(Data(1, 2, 1, "b"))]


def test_acknowledged_after_a_while():
    """If nothing goes the other way an acknowledgement of its own is sent, once."""
    link = up()
    link.got(Data(1, 1, 0, "x"))
    assert link.next_deadline() == ACK_AFTER_S
    assert link.tick(ACK_AFTER_S) == [Transmit(Ack(1, 1, sent_at=ACK_AFTER_S, held_s=ACK_AFTER_S))]
    assert link.next_deadline() is None


def test_acknowledged_after_many():
    """Many packets are acknowledged without waiting."""
    link = up()
    for seq in range(1, ACK_AFTER_PACKETS):
        assert link.got(Data(1, seq, 0, seq)) == [Deliver([seq])]
    out = link.got(Data(1, ACK_AFTER_PACKETS, 0, "x"))
    assert out == [Deliver(["x"]), Transmit(Ack(1, ACK_AFTER_PACKETS))]


def test_cut_is_resumed():
    """After a cut what the other end does not have is sent again, in the next epoch, and nothing else."""
    link = up()
    for packet in "abc":
        link.send(packet)
    assert link.on(Disconnected()) == []
    assert link.send("d") == []
    assert link.on(Connected()) == [Transmit(Greeting(2, US, THEM, 0))]
    out = link.got(Greeting(2, THEM, US, 2))
    assert out == [Transmit(Data(2, 3, 0, "c")), Transmit(Data(2, 4, 0, "d"))]


def test_duplicates_are_dropped():
    """A packet that was delivered before the cut is not delivered again."""
    link = up()
    link.got(Data(1, 1, 0, "x"))
    link.on(Connected())
    link.got(Greeting(2, THEM, US, 0))
    assert link.got(Data(2, 1, 0, "x")) == []
    assert link.got(Data(2, 2, 0, "y")) == [Deliver(["y"])]


def test_late_frames_of_an_earlier_epoch():
    """What an earlier transport still delivers is dropped."""
    link = up()
    link.on(Connected())
    assert link.got(Data(1, 1, 0, "x")) == [] and link.got(Ack(1, 0)) == [] and link.got(Greeting(1, THEM, US, 0)) == []
    link.got(Greeting(2, THEM, US, 0))
    assert link.got(Data(1, 1, 0, "x")) == []
    assert link.got(Data(2, 1, 0, "x")) == [Deliver(["x"])]
    assert link.stale == 4


def test_late_greeting_at_the_accepting_end():
    """A late greeting of an earlier transport is corrected by that of the current one."""
    link = Link(THEM, connects=False)
    link.on(Connected())
    link.on(Connected())
    assert link.got(Greeting(1, US, b"", 0)) == [Transmit(Greeting(1, THEM, b"", 0))]
    assert link.got(Greeting(2, US, b"", 0)) == [Transmit(Greeting(2, THEM, US, 0))]
    assert link.state == "UP"


def test_lease():
    """A cut that lasts too long is the loss of the peer, said once."""
    link = up(lease_s=5.0)
    link.on(Disconnected())
    assert link.next_deadline() == 5.0
    assert link.tick(4.9) == []
    assert lost(link.tick(0.2))
    assert link.send("a") == [] and link.on(Connected()) == [] and link.next_deadline() is None


def test_transports_that_never_greet_do_not_prolong_the_lease():
    """The lease runs until the other end has spoken."""
    link = up(lease_s=5.0)
    for _ in range(4):
        link.on(Disconnected())
        link.tick(1.0)
        link.on(Connected())
    assert link.next_deadline() == 5.0


def test_too_much_waits():
    """More than the buffer holds is the loss of the peer."""
    link = up(resend_bytes=10)
    assert link.send("a", 6) == [Transmit(Data(1, 1, 0, "a", 6))]
    assert lost(link.send("b", 6))


def test_peer_started_anew():
    """Another process under the same address knows nothing of this session."""
    link = up()
    link.on(Connected())
    assert lost(link.got(Greeting(2, b"another", b"", 0)))


def test_peer_takes_us_for_another():
    """An end that remembers another partner hears who this is, and the session is over here."""
    link = Link(THEM, connects=False)
    link.on(Connected())
    greeting, over = link.got(Greeting(3, US, b"an earlier one", 7))
    assert greeting == Transmit(Greeting(3, THEM, b"", 0)) and type(over) is PeerLost


@pytest.mark.parametrize(
    "frame",
    [Data(1, 2, 0, "x"), Data(1, 1, 9, "x"), Ack(1, 5)],
    ids=["gap", "received too much", "acknowledges too much"],
)
def test_peer_breaks_the_protocol(frame):
    """What cannot be is the loss of the peer."""
    assert lost(up().got(frame))


def test_packets_before_the_greeting():
    """The end that was connected to greets before anything else."""
    link = Link()
    link.on(Connected())
    assert lost(link.got(Data(1, 1, 0, "x")))


def test_our_own_bug_stops_us():
    """A cell that this side must never reach raises."""
    with pytest.raises(LocalProtocolError):
        up()._step("LEASE_DUE")


def test_story():
    """The story tells the transports."""
    link = up()
    link.on(Disconnected())
    assert [(step.event, step.after) for step in link.story()] == [
        ("CONNECTED", "GREETING"),
        ("GREETING", "UP"),
        ("DISCONNECTED", "DOWN"),
    ]


class TwoEnds(RuleBasedStateMachine):
    """Two ends over transports that break, lose, delay and repeat frames. What arrives is what was sent, in order,
    once."""

    @initialize()
    def start(self):
        self.ends = [Link(THEM, connects=False), Link(US)]
        self.wires = [deque(), deque()]  # to end 0, to end 1
        self.sent = [[], []]
        self.delivered = [[], []]
        self.number = 0

    def feed(self, end, event):
        for instruction in self.ends[end].on(event):
            if isinstance(instruction, Transmit):
                self.wires[1 - end].append(instruction.frame)
            else:
                assert isinstance(instruction, Deliver), instruction
                self.delivered[end] += instruction.packets

    @rule(end=st.integers(0, 1), count=st.integers(1, 80))
    def send(self, end, count):
        for _ in range(count):
            self.number += 1
            self.sent[end].append(self.number)
            self.feed(end, Outgoing(self.number, 1))

    @rule(end=st.integers(0, 1), count=st.integers(1, 50))
    def arrive(self, end, count):
        wire = self.wires[end]
        while wire and count:
            count -= 1
            self.feed(end, Arrived(wire.popleft()))

    @rule(end=st.integers(0, 1))
    def repeat(self, end):
        """A transport of ours never repeats a frame. Should one do so, it does no harm."""
        wire = self.wires[end]
        if wire and isinstance(wire[0], Data):
            self.feed(end, Arrived(wire[0]))

    @rule(end=st.integers(0, 1), seconds=st.floats(0, 1))
    def wait(self, end, seconds):
        for link in self.ends:
            link.now += seconds
        self.feed(end, Tick())

    @rule(end=st.integers(0, 1), lose=st.booleans())
    def cut(self, end, lose):
        if lose:
            self.wires[0].clear()
            self.wires[1].clear()
        self.feed(end, Disconnected())

    @rule(lose=st.booleans(), first=st.integers(0, 1))
    def connect(self, lose, first):
        if lose:
            self.wires[0].clear()
            self.wires[1].clear()
        for end in (first, 1 - first):
            self.feed(end, Connected())

    @invariant()
    @precondition(lambda self: hasattr(self, "ends"))
    def in_order_and_once(self):
        for end in (0, 1):
            delivered = self.delivered[end]
            assert delivered == self.sent[1 - end][: len(delivered)]

    def teardown(self):
        if not hasattr(self, "ends"):
            return
        # Given one good transport, everything arrives.
        self.wires = [deque(), deque()]
        for link in self.ends:
            link.lease_s = 1e9
        for end in (0, 1):
            self.feed(end, Connected())
        while self.wires[0] or self.wires[1]:
            self.arrive(0, 10**6)
            self.arrive(1, 10**6)
        self.in_order_and_once()
        assert [len(d) for d in self.delivered] == [len(s) for s in self.sent[::-1]]
        self.wait(0, 1.0)
        self.wait(1, 1.0)
        self.arrive(0, 10**6)
        self.arrive(1, 10**6)
        assert [link.outstanding for link in self.ends] == [0, 0]


TwoEnds.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestTwoEnds = TwoEnds.TestCase
