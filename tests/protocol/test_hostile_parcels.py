"""Messages in pieces: what a peer that keeps to the rules sends comes out whole, and what another one sends costs it
little more than its own bytes."""

import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaler_executor.protocol import link, parcels, wire
from scaler_executor.protocol.codec import MAX_FRAMES, Decoder, Encoder, RemoteProtocolError
from scaler_executor.protocol.messages import (
    AgentResult,
    Frames,
    FromPeerMessage,
    Function,
    TaskCancel,
    TaskResult,
    TaskRun,
    TaskSubmit,
)
from scaler_executor.protocol.parcels import Inbox, Outbox, Packet
from scaler_executor.protocol.precedence import GROUP_FRAMES, PIECE_BYTES

LARGE = bytes(range(256)) * 1000
#: What an honest peer's bytes may grow to in memory: rows of small numbers grow most.
GROWTH = 60
OVERHEAD_BYTES = 20_000
DECODE_ANY = Decoder(TaskSubmit | TaskRun | TaskResult | AgentResult | TaskCancel).decode
NUMBER = st.integers(0, 5) | st.sampled_from([-1, -5, 1 << 40, (1 << 63) - 1, (1 << 64) - 1, -(1 << 63)])


def carry(*sent):
    """Return what comes out at the other end when these messages are sent, decoded as what they are."""
    outbox, inbox = Outbox(), Inbox()
    for message in sent:
        outbox.put(message)
    came = []
    while (packet := outbox.take()) is not None:
        frame = wire.decode_frame([bytes(part) for part in wire.encode_frame(link.Data(1, 1, 0, packet))])
        whole = inbox.put(frame.packet)
        if whole is not None:
            came.append(DECODE_ANY(*whole))
    assert not outbox.pending_bytes
    return came


# What keeps to the rules


@pytest.mark.parametrize("kind", [TaskSubmit, TaskRun, TaskResult, AgentResult], ids=lambda kind: kind.__name__)
def test_many_small_buffers_of_many_calls(kind):
    """Calls, each within the limit of frames, may stand behind one another: no message gets more frames than it may."""
    payload = Frames([b"x"] * 10_000)
    rows = {
        TaskSubmit: [(no, 1, 0, payload) for no in range(1, 21)],
        TaskRun: [(no, 1, 1, 1, 0, 0, payload) for no in range(1, 21)],
        TaskResult: [(no, 0, 1, 0, payload) for no in range(1, 21)],
        AgentResult: [(no, 1, 0, 1, 0, payload) for no in range(1, 21)],
    }[kind]
    came = carry(kind(list(rows)))
    assert len(came) == 20
    assert [row for message in came for row in (getattr(message, "tasks", None) or message.results)] == rows


def test_many_small_buffers_of_functions():
    """The same for functions, which go before the calls."""
    functions = [Function(number, "f", Frames([b"x"] * 12_000)) for number in range(1, 9)]
    came = carry(TaskSubmit([(1, 1, 8, b"a")], list(functions)))
    assert [function for message in came for function in message.functions] == functions
    assert came[-1].tasks == [(1, 1, 8, b"a")]


@pytest.mark.parametrize("count", [GROUP_FRAMES, GROUP_FRAMES + 1, MAX_FRAMES])
def test_as_many_buffers_as_may_be(count):
    """One call may have all the frames of a message."""
    payload = Frames([b"x"] * count)
    rows = [(1, 1, 0, payload), (2, 1, 0, b"y")]
    assert [row for message in carry(TaskSubmit(list(rows))) for row in message.tasks] == rows


@settings(max_examples=60, deadline=None)
@given(
    payloads=st.lists(
        st.binary(max_size=20)
        | st.lists(st.sampled_from([b"", b"x", LARGE, LARGE[: PIECE_BYTES + 1]]), min_size=1, max_size=4).map(Frames),
        min_size=1,
        max_size=6,
    )
)
def test_whatever_is_sent_comes(payloads):
    """All rows come, once, whole and in order."""
    rows = [(no, 1, 0, payload) for no, payload in enumerate(payloads, 1)]
    came = carry(TaskSubmit(list(rows)), TaskCancel([]), TaskSubmit([(99, 1, 0, b"z")]))[:-1]
    assert [row for message in came if type(message) is TaskSubmit for row in message.tasks] == rows


# What does not


PACKET = st.builds(
    Packet,
    st.lists(st.binary(max_size=5), max_size=3),
    NUMBER,
    st.booleans(),
    st.lists(st.tuples(NUMBER, NUMBER), max_size=3),
)


@settings(max_examples=500, deadline=None)
@given(packets=st.lists(PACKET, max_size=30))
def test_packets_that_do_not_fit_together(packets):
    """Whatever packets come, they are messages, pieces or RemoteProtocolError, and what is kept is counted."""
    inbox = Inbox(max_bytes=40)
    for packet in packets:
        try:
            whole = inbox.put(packet)
        except RemoteProtocolError:
            break
        assert whole is None or (whole[0] is not None and len(whole[1]) <= MAX_FRAMES)
        assert inbox._bytes == sum(map(len, inbox._blobs.values())) <= 40


@pytest.mark.parametrize(
    "packet",
    [
        Packet([]),
        Packet([b"x"], -1),
        Packet([b"x", b"y"], 1),
        Packet([], 1),
        Packet([b"x"], 1, False, [(0, 1)]),
        Packet([b"x"], 0, False, [(0, 7)]),
        Packet([b"x"], 0, False, [(0, 1)]),
        Packet([b"x"], 0, False, [(0, -1)]),
        Packet([b"x"], 0, False, [(0, 0)]),
        Packet([b"x"], 0, False, [(-1, 2)]),
        Packet([b"x"], 0, False, [(2, 2)]),
        Packet([b"x"], 0, False, [(0, 2), (0, 2)]),
        Packet([b"x"], 2),
        Packet([b"x"] * (MAX_FRAMES + 2)),
        Packet([b"x"], 0, False, [(0, 2)] * (MAX_FRAMES + 2)),
    ],
    ids=range(15),
)
def test_no_packets(packet):
    """Beside an unfinished blob 1 and a finished blob 2, none of these means anything."""
    inbox = Inbox()
    assert inbox.put(Packet([b"abc"], 1)) is None
    assert inbox.put(Packet([b"def"], 2, True)) is None
    with pytest.raises(RemoteProtocolError):
        inbox.put(packet)


def test_blobs_that_are_never_finished():
    """What is begun is limited, in bytes and in number."""
    inbox = Inbox(max_bytes=1000)
    for blob in range(1, 11):
        inbox.put(Packet([bytes(100)], blob))
    with pytest.raises(RemoteProtocolError, match="more than 1000 bytes in unfinished messages"):
        inbox.put(Packet([b"x"], 1))
    inbox = Inbox()
    with pytest.raises(RemoteProtocolError, match=f"{parcels.MAX_BLOBS} blobs"):
        for blob in range(1, parcels.MAX_BLOBS + 2):
            inbox.put(Packet([b""], blob))


def test_what_is_given_up_or_complete_does_not_count():
    """The limit is of what is kept, not of what has come."""
    inbox = Inbox(max_bytes=100)
    for blob in range(1, 50):
        inbox.put(Packet([bytes(90)], blob, True))
        if blob % 2:
            inbox.put(Packet([b""], blob, True))
        else:
            assert inbox.put(Packet([], 0, False, [(0, blob)])) == (bytes(90), [])
    assert not inbox._blobs and not inbox._bytes


# The frames of the link


FRAME = st.one_of(
    st.builds(link.Greeting, NUMBER, st.binary(max_size=16), st.binary(max_size=16), NUMBER),
    st.builds(link.Data, NUMBER, NUMBER, NUMBER, PACKET),
    st.builds(link.Ack, NUMBER, NUMBER, st.floats(), st.floats(), st.floats()),
)


@settings(max_examples=400, deadline=None)
@given(parts=st.lists(st.binary(max_size=60) | st.binary(max_size=60), max_size=4))
def test_random_parts(parts):
    """Whatever parts come, they are a frame or RemoteProtocolError."""
    try:
        wire.decode_frame(parts)
    except RemoteProtocolError:
        pass


@settings(max_examples=400, deadline=None)
@given(frame=FRAME, at=st.integers(0, 10**6), flip=st.integers(1, 255), more=st.lists(st.binary(), max_size=2))
def test_damaged_frames(frame, at, flip, more):
    """A damaged frame, or one with parts too many, is another frame or RemoteProtocolError."""
    parts = [bytearray(part) for part in wire.encode_frame(frame)]
    parts[0][at % len(parts[0])] ^= flip
    try:
        wire.decode_frame([*parts, *more])
    except RemoteProtocolError:
        pass


@settings(max_examples=400, deadline=None)
@given(frame=FRAME)
def test_frames_come_back(frame):
    """A frame that is sent is the one that comes."""
    came = wire.decode_frame(wire.encode_frame(frame))
    if isinstance(frame, link.Ack):
        assert wire.encode_frame(came) == wire.encode_frame(frame)  # not a number equals none
    elif isinstance(frame, link.Data):
        assert came == link.Data(frame.epoch, frame.seq, frame.received, frame.packet, len(frame.packet))
    else:
        assert came == frame


NEWS = st.one_of(
    FRAME.map(link.Arrived),
    FRAME.map(link.Arrived),
    st.just(link.Connected()),
    st.just(link.Disconnected()),
    st.just(link.Outgoing(Packet([b"x"]), 65)),
    st.just(link.Tick()),
)


@settings(max_examples=500, deadline=None)
@given(connects=st.booleans(), news=st.lists(st.tuples(NEWS, st.sampled_from([0.0, 0.1, 5.0])), max_size=25))
def test_link(connects, news):
    """Whatever the other end says, the link carries on or is lost, and what it says itself can be sent."""
    state = link.LinkState(b"me", connects=connects, now=100.0, beat_s=1.0)
    state.handle(link.Connected(), 100.0)
    state.handle(link.Arrived(link.Greeting(1, b"you", b"me" if connects else b"", 0)), 100.0)
    assert state.state == link.UP
    now, lost = 100.0, 0
    for event, after in news:
        now += after
        for instruction in state.handle(event, now):
            assert not lost, instruction
            if isinstance(instruction, link.Transmit):
                wire.decode_frame(wire.encode_frame(instruction.frame))
            lost += isinstance(instruction, link.PeerLost)
        state.check()
        deadline = state.next_deadline()
        assert deadline is None or abs(deadline - now) < 1000
    assert lost == (state.state == link.LOST)


# Memory


def grows(decode, data):
    """Return how much memory it takes to decode something, in the worst moment."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        try:
            kept = decode(data)
        except RemoteProtocolError:
            kept = None
        peak = tracemalloc.get_traced_memory()[1]
        del kept
    finally:
        tracemalloc.stop()
    return peak - before


DECODE_MESSAGE = Decoder(FromPeerMessage).decode


@pytest.mark.parametrize(
    "header",
    [
        msgspec.msgpack.encode([5, [[1, 1, 1, b""]] * 20_000]),
        msgspec.msgpack.encode([5, [], [[1, "", b""]] * 20_000]),
        msgspec.msgpack.encode([5, [], [[1, "", b"", 1, [], [1] * 20_000]]]),
        msgspec.msgpack.encode([14, [[1, 1, [""]]] * 20_000]),
        msgspec.msgpack.encode([10, [1] * 100_000]),
        msgspec.msgpack.encode([10, [1 << 60] * 20_000]),
        msgspec.msgpack.encode([2, 1, 1, 1, 0, False, [[1, 1]] * 20_000]),
        # Lengths that are only named.
        b"\x92\x05\xdd\xff\xff\xff\xff",
        b"\x92\x05\xdd\xff\xff\xff\xff" + b"\x94\x01\x01\x01\xc6\xff\xff\xff\xff",
        b"\x92\x01\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ],
    ids=range(13),
)
def test_memory_of_the_largest(header):
    """The shortest rows that there are, and lengths that are only named, take a small multiple of what came."""
    assert grows(lambda data: DECODE_MESSAGE(data, []), header) < GROWTH * len(header) + OVERHEAD_BYTES
    assert grows(lambda data: wire.decode_frame([data]), header) < GROWTH * len(header) + OVERHEAD_BYTES


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300), tag=st.integers(0, 30), frames=st.lists(st.binary(max_size=10), max_size=3))
def test_memory(data, tag, frames):
    """Whatever comes takes no more than a small multiple of its size."""
    header = bytes([0x9F, tag]) + data
    limit = GROWTH * (len(header) + sum(map(len, frames))) + OVERHEAD_BYTES
    assert grows(lambda data: DECODE_MESSAGE(data, frames), header) < limit
    assert grows(lambda data: wire.decode_frame([data, *frames]), header) < limit


def test_memory_of_pieces():
    """Pieces take their bytes and a little for each."""
    packets = [wire.encode_frame(link.Data(1, 1, 0, Packet([b"x"], blob))) for blob in range(1, 20_001)]
    size = sum(len(part) for parts in packets for part in parts)

    def put_all(packets):
        inbox = Inbox()
        for parts in packets:
            inbox.put(wire.decode_frame(parts).packet)
        return inbox

    assert grows(put_all, packets) < GROWTH * size + OVERHEAD_BYTES


def test_an_encoder_is_not_asked_for_more_than_it_can_write():
    """The largest numbers that may come can also be sent on."""
    message = TaskSubmit([((1 << 64) - 1, -(1 << 63), 0, b"")])
    header, frames = Encoder().encode(message)
    assert Encoder().encode(DECODE_MESSAGE(header, frames)) == (header, frames)
