"""Buffers in files: how messages name them, and what is no name of one."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaler_executor.protocol.codec import Decoder, Encoder, RemoteProtocolError
from scaler_executor.protocol.messages import ClientMessage, Frames, TaskSubmit
from scaler_executor.protocol.segment import SEGMENT_ENTRY, Segment, unpack_entries

SEGMENTS = st.builds(Segment, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 2**63 - 1))


def submit(*payloads):
    return TaskSubmit([(number + 1, 1, 1, payload) for number, payload in enumerate(payloads)])


@given(payloads=st.lists(st.one_of(st.binary(), st.lists(st.one_of(st.binary(), SEGMENTS), min_size=1).map(Frames))))
def test_round_trip(payloads):
    """Files and frames stand where they stood, whatever the order."""
    header, frames = Encoder().encode(submit(*payloads))
    message = Decoder(ClientMessage, Segment).decode(header, frames)
    arrived = [row[-1] for row in message.tasks]
    assert [getattr(payload, "buffers", payload) for payload in arrived] == [
        getattr(payload, "buffers", payload) for payload in payloads
    ]


def test_refused_of_others():
    """A peer on another machine names no files."""
    header, frames = Encoder().encode(submit(Frames([b"a", Segment(0, 1, 2)])))
    with pytest.raises(RemoteProtocolError, match="files"):
        Decoder(ClientMessage).decode(header, frames)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1\0\0",
        b"\1\0\0\0x",
        b"\1\0\0\0" + SEGMENT_ENTRY.pack(1, 0, 1, 1),  # behind the last buffer
        b"\2\0\0\0" + SEGMENT_ENTRY.pack(1, 0, 1, 1) + SEGMENT_ENTRY.pack(0, 0, 1, 1),
        b"\2\0\0\0" + SEGMENT_ENTRY.pack(0, 0, 1, 1) * 2,
        b"\1\0\0\0" + SEGMENT_ENTRY.pack(0, 0, 1, 0),
        b"\1\0\0\0" + SEGMENT_ENTRY.pack(0, 0, 1, 1 << 63),
        b"\0\0\0\0" + SEGMENT_ENTRY.pack(0, 0, 1, 1),
    ],
)
def test_nonsense(data):
    """What names no files, or more of them than there are buffers, is refused."""
    header = msgspec.msgpack.encode(submit(msgspec.msgpack.Ext(1, data)))
    with pytest.raises(RemoteProtocolError):
        Decoder(ClientMessage, Segment).decode(header, [])


@given(data=st.binary(max_size=100), count=st.integers(0, 4))
def test_any_entries(data, count):
    """Whatever comes, entries are of buffers that are there, in order."""
    entries = unpack_entries(data, count)
    if entries is not None:
        indices = [index for index, *_ in entries]
        assert indices == sorted(set(indices)) and all(0 <= index < count for index in indices)


def test_what_passes_on():
    """A segment is told when a message names it."""
    told = []

    class Told(Segment):
        def pass_on(self):
            told.append(self.number)

    Encoder().encode(submit(Frames([Told(1, 5, 10), b"x", Told(1, 6, 10)])))
    assert told == [5, 6]
