"""Messages to packets and back, and what becomes of bytes that are no packets."""

import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaler_executor.protocol import messages
from scaler_executor.protocol.codec import (
    FRAME_LENGTH,
    PREFIX,
    Decoder,
    Encoder,
    LocalProtocolError,
    RemoteProtocolError,
    tag_of,
)
from scaler_executor.protocol.messages import (
    AgentResult,
    Frames,
    Function,
    TaskCancel,
    TaskResult,
    TaskRun,
    TaskSubmit,
    WorkerRun,
)

KINDS = {
    name: getattr(messages, name)
    for name in (
        "ClientMessage",
        "ToClientMessage",
        "AgentMessage",
        "ToAgentMessage",
        "ObserverMessage",
        "ToObserverMessage",
        "ToForkerMessage",
        "ForkerMessage",
    )
}
ALL_MESSAGES = messages.Message.__subclasses__()
INT = st.integers(min_value=-(2**63), max_value=2**63 - 1)
EXAMPLES = {
    int: INT,
    str: st.text(),
    bytes: st.binary(),
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    type(None): st.none(),
    messages.WirePayload: st.binary() | st.lists(st.binary(), min_size=1, max_size=3).map(Frames),
}


def strategy(kind):
    """Return a strategy for a type as it stands in a message. `msgspec.Struct`s are made of their fields."""
    if kind in EXAMPLES:
        return EXAMPLES[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: strategy(hints[name]) for name in kind.__struct_fields__})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return st.lists(strategy(arguments[0]), max_size=3)
    if origin is tuple:
        return st.tuples(*(strategy(argument) for argument in arguments))
    return st.one_of(*(strategy(argument) for argument in arguments))  # a union


@pytest.mark.parametrize("kind", ALL_MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip(kind, data):
    """Each message comes back as it was sent, with its frames."""
    message = data.draw(strategy(kind))
    encoder = Encoder()
    header, frames = encoder.encode(message)
    assert Decoder(kind).decode(header, frames) == message
    # Nothing of one message is left for the next.
    assert encoder.encode(TaskCancel([]))[1] == []


def test_every_message_has_a_number_of_its_own():
    """Tags are unique, and every message can be decoded by somebody."""
    tags = [kind.__struct_config__.tag for kind in ALL_MESSAGES]
    assert len(set(tags)) == len(tags)
    known = {member for union in KINDS.values() for member in typing.get_args(union)}
    assert set(ALL_MESSAGES) - known == {WorkerRun}


def test_pack():
    """On a stream a packet is prefix, lengths, header, frames."""
    message = TaskResult([(1, 0, 1, 0, Frames([b"abc", b"de"])), (2, 0, 1, 0, b"f")])
    header, frames = Encoder().encode(message)
    packed = b"".join(bytes(part) for part in Encoder().pack(message))
    lengths = FRAME_LENGTH.pack(3) + FRAME_LENGTH.pack(2)
    assert frames == [b"abc", b"de"]
    assert packed == PREFIX.pack(len(header), 2) + lengths + header + b"abcde"
    assert Encoder().pack(TaskCancel([])) == [PREFIX.pack(3, 0) + Encoder().encode(TaskCancel([]))[0]]


def test_frames_are_not_copied():
    """The buffers of a Frames are handed on as they are."""
    buffer = bytearray(b"x" * 10)
    _, frames = Encoder().encode(TaskResult([(1, 0, 1, 0, Frames([memoryview(buffer)]))]))
    assert frames[0].obj is buffer


def test_frames_stand_in_the_order_of_the_message():
    """A large function and a large payload in one message are not mixed up."""
    frames = Frames([b"blob"])
    function = Function(1, "f", frames)
    for message in (
        TaskSubmit([(1, 1, 1, Frames([b"a"]))], [function]),
        TaskRun([(1, 1, 1, 1, 0, 1, Frames([b"a"]))], [(1, function)]),
        WorkerRun([(1, 1, 0, 1, Frames([b"a"]))], [function]),
        AgentResult([(1, 1, 0, 1, 0, Frames([b"a"]))]),
    ):
        header, buffers = Encoder().encode(message)
        assert Decoder(type(message)).decode(header, buffers) == message


def test_number_that_does_not_fit():
    """A number that the wire cannot hold is our mistake."""
    with pytest.raises(LocalProtocolError):
        Encoder().encode(TaskCancel([(1 << 70, 1, 1)]))


def test_object_that_cannot_be_sent():
    """An object that no message holds is our mistake, and leaves nothing behind."""
    encoder = Encoder()
    with pytest.raises(LocalProtocolError):
        encoder.encode(TaskResult([(1, 0, 1, 0, Frames([b"x"])), (1, 0, 1, 0, object())]))
    assert encoder.encode(TaskCancel([]))[1] == []


def test_message_of_another_kind():
    """A message that this peer may not send is refused."""
    header, _ = Encoder().encode(TaskCancel([]))
    with pytest.raises(RemoteProtocolError):
        Decoder(messages.ForkerMessage).decode(header, [])


@pytest.mark.parametrize("frames", [[], [b"1"], [b"1", b"2", b"3"]])
def test_wrong_number_of_frames(frames):
    """Too few frames or too many are refused."""
    header, _ = Encoder().encode(TaskResult([(1, 0, 1, 0, Frames([b"a", b"b"]))]))
    with pytest.raises(RemoteProtocolError):
        Decoder(messages.ToClientMessage).decode(header, frames)


def test_foreign_extension():
    """Another extension than ours in the place of a payload is refused."""
    for mark in (msgspec.msgpack.Ext(2, b"1234"), msgspec.msgpack.Ext(1, b"1"), msgspec.msgpack.Ext(1, bytes(4))):
        header = msgspec.msgpack.encode([9, [[1, 0, 1, 0, mark]]])
        with pytest.raises(RemoteProtocolError):
            Decoder(messages.ToClientMessage).decode(header, [b"x"])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), frames=st.lists(st.binary(), max_size=3))
def test_random_bytes(kind, data, frames):
    """Whatever bytes come, they are a message or RemoteProtocolError."""
    try:
        Decoder(KINDS[kind]).decode(data, frames)
    except RemoteProtocolError:
        pass


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | INT | st.floats() | st.binary(max_size=9) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(tag=st.integers(0, 45), rest=st.lists(JSON_LIKE, max_size=5), frames=st.lists(st.binary(), max_size=2))
def test_random_messages(kind, tag, rest, frames):
    """Whatever well-formed msgpack comes, it is a message or RemoteProtocolError."""
    try:
        Decoder(KINDS[kind]).decode(msgspec.msgpack.encode([tag, *rest]), frames)
    except RemoteProtocolError:
        pass


@settings(max_examples=150, deadline=None)
@given(data=st.data(), at=st.integers(0, 10**6), flip=st.integers(1, 255), cut=st.integers(0, 10**6))
def test_damaged_messages(data, at, flip, cut):
    """A damaged or shortened message is another message or RemoteProtocolError."""
    message = data.draw(strategy(TaskSubmit))
    header, frames = Encoder().encode(message)
    damaged = bytearray(header)
    damaged[at % len(damaged)] ^= flip
    for bad in (damaged, header[: cut % len(header)]):
        try:
            Decoder(messages.ClientMessage).decode(bad, frames)
        except RemoteProtocolError:
            pass


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(messages.Message.__subclasses__()))
def test_tag(data, kind):
    """The tag of any message can be told without decoding it."""
    header, _ = Encoder().encode(data.draw(strategy(kind)))
    assert tag_of(header) == kind.__struct_config__.tag


@pytest.mark.parametrize("header", [b"", b"\x91", b"\x93\xcc", b"\x82\x05\x06", b"\xc0\x05"])
def test_no_tag(header):
    """What is no message has none, or none that the message is short enough to have."""
    assert tag_of(header) is None


def test_deeply_nested_input():
    """Deep nesting is refused and does not exhaust the stack."""
    for bad in (b"\x91" * 100_000, b"\x92\x05" + b"\x91" * 100_000):
        with pytest.raises(RemoteProtocolError):
            Decoder(messages.ClientMessage).decode(bad, [])
