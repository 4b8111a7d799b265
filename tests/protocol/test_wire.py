"""Frames of a link as parts of a network message: what is encoded is what is decoded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler_executor.protocol.codec import MAX_FRAMES, RemoteProtocolError
from scaler_executor.protocol.link import Ack, Data, Greeting
from scaler_executor.protocol.parcels import Packet
from scaler_executor.protocol.wire import decode_frame, encode_frame

numbers = st.integers(0, 2**63 - 1)
times = st.floats(allow_nan=False, allow_infinity=False)
packets = st.builds(
    Packet, st.lists(st.binary(max_size=50), max_size=5), numbers, st.booleans(), st.lists(st.tuples(numbers, numbers))
)
frames = st.one_of(
    st.builds(Greeting, numbers, st.binary(max_size=16), st.binary(max_size=16), numbers),
    st.builds(Ack, numbers, numbers, times, times, times),
    st.builds(lambda epoch, seq, got, packet: Data(epoch, seq, got, packet, len(packet)), *[numbers] * 3, packets),
)


@given(frames)
def test_round_trip(frame):
    """Each frame comes back as it was."""
    assert decode_frame(encode_frame(frame)) == frame


@given(st.lists(st.binary(max_size=30), max_size=4))
def test_garbage(parts):
    """Anything is a frame or is refused."""
    try:
        assert isinstance(decode_frame(parts), (Greeting, Ack, Data))
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    "parts",
    [[], [b""], [*encode_frame(Ack(1, 1)), b"more"], [*encode_frame(Greeting(1, b"a", b"b", 0)), b""]],
    ids=["nothing", "an empty part", "an Ack with parts", "a Greeting with parts"],
)
def test_not_a_frame(parts):
    """What is not a frame is refused."""
    with pytest.raises(RemoteProtocolError):
        decode_frame(parts)


def test_too_many_parts():
    """A message of too many parts is refused."""
    head, *_ = encode_frame(Data(1, 1, 0, Packet([b""])))
    with pytest.raises(RemoteProtocolError):
        decode_frame([head, *[b""] * (MAX_FRAMES + 2)])
