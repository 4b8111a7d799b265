"""The link: in order and exactly once, whatever the transports do, or the peer is lost."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scaler_executor.protocol.codec import LocalProtocolError
from scaler_executor.protocol.link import (
    ACK_AFTER_BYTES,
    ACK_AFTER_PACKETS,
    ACK_AFTER_S,
    Ack,
    Arrived,
    Connected,
    Data,
    Deliver,
    Disconnect,
    Disconnected,
    Greeting,
    Leaving,
    LinkState,
    Outgoing,
    PeerLost,
    Tick,
    Transmit,
)
from scaler_executor.protocol.window import ROUND

US, THEM = b"us", b"them"


class Link(LinkState):
    """A link end that checks itself after each step."""

    def __init__(self, nonce=US, **settings):
        super().__init__(nonce, **{"connects": True, "now": 0.0, **settings})
        self.now = settings.get("now", 0.0)

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


# Beats and silence


def beating(**settings):
    """Return a link that is UP and beats every second; its transport is gone after four of silence."""
    return up(**{"beat_s": 1.0, "silence_s": 4.0, "lease_s": 10.0, **settings})


def test_beats():
    """Something is said each second, if nothing else was; without beats nothing is."""
    link = beating()
    assert link.next_deadline() == 1.0
    assert link.tick(1.0) == [Transmit(Ack(1, 0, sent_at=1.0, held_s=1.0))]
    link.now = 1.5
    link.send("a")
    assert link.next_deadline() == 2.5
    assert up().next_deadline() is None


def test_beats_only_while_up():
    """Nothing is said before the greeting, or into a cut."""
    link = Link(beat_s=1.0)
    link.on(Connected())
    assert link.tick(2.0) == []
    link = beating()
    link.on(Disconnected())
    assert link.tick(2.0) == [] and link.next_deadline() == 10.0


def test_silence():
    """A transport over which nothing comes for long is taken for gone: once, and the other end not yet for lost."""
    link = beating()
    link.now = 2.0
    link.got(Ack(1, 0))
    assert link.heard_at == 2.0
    for _ in range(3):
        link.tick(1.0)
    out = link.tick(1.0)
    assert out == [Disconnect()] and link.state == "DOWN"
    assert link.tick(0.5) == [] and link.on(Disconnected()) == []
    assert link.next_deadline() == 12.0  # the lease counts from when it was heard


def test_unheard():
    """The end that connects hears the other one and is not heard itself: it looks for another transport."""
    link = beating()
    for second in range(1, 6):
        link.now = float(second)
        assert link.got(Ack(1, 0, echo=0.0)) == [Transmit(Ack(1, 0, sent_at=second, held_s=second))]
    assert link.next_deadline() == 6.0
    assert link.tick(1.0) == [Disconnect()]


def test_beats_of_the_connecting_end_are_answered():
    """... at once, so that it knows that it is heard; but not each acknowledgement is."""
    link = Link(THEM, connects=False, beat_s=1.0)
    link.on(Connected())
    link.got(Greeting(1, US, b"", 0))
    link.now = 0.6
    assert link.got(Ack(1, 0, sent_at=50.0)) == [Transmit(Ack(1, 0, sent_at=0.6, echo=50.0, held_s=0.6))]
    link.now = 0.7
    assert link.got(Ack(1, 0, sent_at=51.0)) == []
    assert link.next_deadline() == 2.1  # not asked, it speaks by itself
    link = beating()
    link.now = 0.9
    assert link.got(Ack(1, 0, sent_at=50.0)) == []


def test_silence_before_the_greeting():
    """A transport over which nobody greets is taken for gone, counted from when it was made."""
    link = beating()
    link.now = 3.0
    link.on(Connected())
    assert link.tick(3.9) == []
    assert link.tick(0.2) == [Disconnect()]


def test_late_frames_are_no_sign_of_life():
    """What an earlier transport still held does not count as being heard."""
    link = beating()
    link.on(Connected())
    link.now = 3.0
    link.got(Data(1, 1, 0, "x"))
    link.got(Ack(1, 0))
    assert link.heard_at == 0.0


def test_lease_counts_from_when_it_was_heard():
    """Not from the cut, which is noticed late: so the end that must stop first knows when."""
    link = beating()
    link.now = 3.5
    link.on(Disconnected())
    assert link.next_deadline() == 10.0
    assert lost(link.tick(6.5))


def test_lease_that_is_over_when_the_cut_is_noticed():
    """An end that was stopped itself for long loses the other one at once."""
    link = beating()
    out = link.tick(11.0)
    assert out[0] == Disconnect() and type(out[1]) is PeerLost and len(out) == 2


def test_beats_carry_the_clocks():
    """Each beat gives back what was last read on the other's clock; a delay of the acknowledgement is told."""
    link = beating()
    link.now = 0.5
    link.got(Data(1, 1, 0, "x"))
    link.now = 0.6
    link.got(Ack(1, 0, sent_at=777.0, echo=0.25))
    assert link.proven_at == 0.25
    assert link.tick(0.1) == [Transmit(Ack(1, 1, sent_at=0.7, echo=777.0, held_s=0.7 - 0.5))]
    link.got(Ack(1, 0, sent_at=778.0, echo=0.125))
    assert link.proven_at == 0.25


def test_echo_from_the_future():
    """Nobody can have read on this clock what it does not show yet."""
    assert lost(beating().got(Ack(1, 0, echo=0.1)))


def test_acknowledged_packets_prove_that_they_were_heard():
    """While packets flow both ways there are no beats: what they acknowledge was heard when it was sent or later."""
    link = beating()
    for second in range(1, 20):
        link.now = float(second)
        link.send("a")
        link.now += 0.5
        assert link.got(Data(1, second, second, "x")) == [Deliver(["x"])]
        assert link.proven_at == second


def test_packets_of_an_earlier_transport_prove_what_they_are():
    """What is sent again was not heard before, unless the greeting says so."""
    link = beating()
    link.now = 1.0
    link.send("a")
    link.now = 2.0
    link.send("b")
    link.on(Disconnected())
    link.now = 3.0
    link.on(Connected())
    link.now = 3.5
    link.got(Greeting(2, THEM, US, 1))
    assert link.proven_at == 3.0  # it has answered our greeting of then
    link.now = 4.0
    link.got(Ack(2, 2))
    assert link.proven_at == 3.5  # when "b" was sent again


def test_greeting_proves_nothing_to_the_accepting_end():
    """It was not asked for."""
    link = Link(THEM, connects=False, beat_s=1.0)
    link.now = 1.0
    link.on(Connected())
    link.now = 2.0
    link.got(Greeting(1, US, b"", 0))
    assert link.proven_at == 0.0 and link.heard_at == 2.0


# The window


def test_acknowledged_after_many_bytes():
    """The sender of large packets may wait for that."""
    link = up()
    (_, acknowledged) = link.got(Data(1, 1, 0, "x", ACK_AFTER_BYTES))
    assert acknowledged == Transmit(Ack(1, 1))


def test_room():
    """What is on its way takes room, until it is acknowledged; a cut does not give it back."""
    link = up()
    room = link.room
    link.send("a", 1000)
    assert link.room == room - 1000
    link.on(Disconnected())
    assert link.room == room - 1000
    link.on(Connected())
    link.got(Greeting(2, THEM, US, 1))
    assert link.room == room


def test_window_of_a_single_packet_is_used():
    """It grows again, though nothing is left on its way when that is acknowledged."""
    link = beating()
    for delay_s in [0.01] * ROUND + [0.5] * ROUND + [0.01] * ROUND:
        size_bytes = link._window.size_bytes
        link.send("a", size_bytes)
        link.now += delay_s
        link.got(Ack(1, link._last_seq))
    assert link._window.size_bytes > size_bytes


def test_acknowledgement_that_was_held_back():
    """What the other end waited with its acknowledgement is no delay of the way."""
    link = beating()

    def send(count, held_s=0.0):
        for _ in range(count):
            link.send("a", 1 << 16)
            link.now += 0.01 + held_s
            link.got(Ack(1, link._last_seq, held_s=held_s))

    send(ROUND)
    first = link._window.size_bytes
    send(2 * ROUND, held_s=0.2)
    assert link._window.size_bytes == first
    for _ in range(ROUND):
        link.send("a", 1 << 16)
        link.now += 0.21
        link.got(Ack(1, link._last_seq))
    assert link._window.size_bytes < first


def test_leaving_says_what_was_received():
    """Whoever goes acknowledges at once: afterwards it is not there to do so."""
    link = up()
    link.got(Data(1, 1, 0, "x"))
    assert link.on(Leaving()) == [Transmit(Ack(1, 1))]
    link = up()
    link.on(Disconnected())
    assert link.on(Leaving()) == []


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

    @initialize(beats=st.booleans())
    def start(self, beats):
        settings = {"beat_s": 0.3, "silence_s": 1.0} if beats else {}
        # Their clocks differ.
        self.ends = [Link(THEM, connects=False, **settings), Link(US, now=1000.0, **settings)]
        #: When each end last took a frame in, by the clock of the other end.
        self.heard_at = [1000.0, 0.0]
        self.wires = [deque(), deque()]  # to end 0, to end 1
        self.sent = [[], []]
        self.delivered = [[], []]
        self.number = 0

    def feed(self, end, event):
        for instruction in self.ends[end].on(event):
            if isinstance(instruction, Transmit):
                self.wires[1 - end].append(instruction.frame)
            elif isinstance(instruction, Deliver):
                self.delivered[end] += instruction.packets
            else:
                assert isinstance(instruction, Disconnect), instruction
        if isinstance(event, Arrived) and self.ends[end].heard_at == self.ends[end].now:
            self.heard_at[end] = self.ends[1 - end].now

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

    @rule(end=st.integers(0, 1), lose=st.integers(1, 5))
    def deaf(self, end, lose):
        """Frames of one direction are lost, all that come from here on: the transport is over, whoever knows."""
        self.wires[end] = deque(list(self.wires[end])[: -min(lose, len(self.wires[end])) or None])
        self.feed(1 - end, Disconnected())

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

    @invariant()
    @precondition(lambda self: hasattr(self, "ends"))
    def proven_is_heard(self):
        for end in (0, 1):
            assert self.ends[end].proven_at <= self.heard_at[1 - end]

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
        for end in (0, 1):
            self.wait(end, 0.4)
            self.arrive(1 - end, 10**6)
        assert [link.outstanding for link in self.ends] == [0, 0]


TwoEnds.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestTwoEnds = TwoEnds.TestCase
