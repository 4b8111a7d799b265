"""Messages to packets and back.

A packet is a header (the message in msgpack) and the frames that are too large to stand in it. On a stream it is
written as

    u32 header length, u32 number of frames, u64 length of each frame, header, frames

A payload in frames is an extension value in the header: the number of its buffers, and which of them are in files
instead of frames, see `segment`.

This module knows that layout, the limits and which rows carry payloads; it does no I/O. Decoding is safe on input
from anyone: what is not a valid message of the expected kinds raises RemoteProtocolError and has no other effect.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from struct import Struct
from typing import Any, Final, Generic, TypeVar

import msgspec

from scaler_executor.protocol.messages import (
    AgentResult,
    Frames,
    Function,
    InheritanceReplaced,
    Message,
    Nested,
    TaskResult,
    TaskRun,
    TaskSubmit,
    WorkerRun,
)
from scaler_executor.protocol.segment import pack_payload, unpack_entries

PREFIX: Final = Struct("<II")
FRAME_LENGTH: Final = Struct("<Q")
MAX_HEADER_BYTES: Final = 1 << 30
MAX_FRAMES: Final = 1 << 16
#: A payload larger than this travels as a frame, one copy less on each hop.
INLINE_BYTES: Final = 1 << 16
#: More of one payload does not travel, without what stands in files.
MAX_PAYLOAD_BYTES: Final = 1 << 32

_EXT_FRAMES: Final = 1

M = TypeVar("M")


class ProtocolError(Exception):
    """Base of the two below."""


class LocalProtocolError(ProtocolError):
    """We tried to send or do what the protocol does not allow: a bug on this side."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the protocol does not allow: its connection is closed, others are undisturbed."""


class Encoder:
    """Encodes messages. One for each connection: not thread-safe."""

    def __init__(self) -> None:
        self._frames: list[Any] = []
        self._encode = msgspec.msgpack.Encoder(enc_hook=self._hook).encode

    def encode(self, message: Message) -> tuple[bytes, list[Any]]:
        """Return header and frames of `message`."""
        try:
            header = self._encode(message)
        except BaseException as error:
            self._frames = []  # or the next message would carry what this one took
            if isinstance(error, OverflowError):
                raise LocalProtocolError(f"{type(message).__name__} holds a number too large for the wire") from error
            raise
        frames = self._frames
        if frames:
            self._frames = []
        return header, frames

    def pack(self, message: Message) -> list[Any]:
        """Return the buffers that make up `message` on a stream, one behind the other."""
        return self.join(*self.encode(message))

    @staticmethod
    def join(header: Any, frames: list[Any]) -> list[Any]:
        """Return the buffers that make up an encoded message on a stream."""
        if not frames:
            prefix = PREFIX.pack(len(header), 0)
            return [prefix + header] if len(header) <= INLINE_BYTES else [prefix, header]
        lengths = b"".join([FRAME_LENGTH.pack(len(frame)) for frame in frames])
        return [PREFIX.pack(len(header), len(frames)) + lengths + header, *frames]

    def _hook(self, value: Any) -> msgspec.msgpack.Ext:
        if type(value) is not Frames:
            raise LocalProtocolError(f"a {type(value).__name__} cannot be sent")
        data, frames = pack_payload(value.buffers)
        self._frames += frames
        return msgspec.msgpack.Ext(_EXT_FRAMES, data)


class Decoder(Generic[M]):
    """Decodes the messages that one kind of peer may send.

    Args:
        expected: The union of message classes, `messages.ClientMessage` say.
        open_segment: Makes what stands in `Frames` for a buffer in a file, out of writer, number and size in bytes;
            None: this peer has no files.
    """

    def __init__(self, expected: Any, open_segment: Callable[[int, int, int], Any] | None = None) -> None:
        self._decode = msgspec.msgpack.Decoder(expected).decode
        self._open_segment = open_segment

    def decode(self, header: bytes | bytearray | memoryview, frames: list[Any]) -> M:
        """Return the message.

        Raises:
            RemoteProtocolError: This is not one of the expected messages, or its frames do not fit it.
        """
        try:
            message = self._decode(header)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(f"not a message that this peer may send: {error}") from None
        left = _place_frames(message, frames, self._open_segment)
        if left:
            raise RemoteProtocolError(f"{left} frames that no row of the {type(message).__name__} asks for")
        return message  # type: ignore[no-any-return]


def tag_of(header: Any) -> int | None:
    """Return the tag of an encoded message, None if it has none that its first two bytes tell."""
    is_short_array = len(header) > 1 and header[0] & 0xF0 == 0x90
    return header[1] if is_short_array and header[1] < 0x80 else None


def _place_frames(message: Any, frames: list[Any], open_segment: Callable[[int, int, int], Any] | None) -> int:
    """Put the frames where the extension values stand. Return how many are left over."""
    kind = type(message)
    if kind is Nested:
        message = message.message
        kind = type(message)
    if kind is TaskResult or kind is AgentResult:
        rows = message.results
        functions: list[Function] = []
    elif kind is TaskSubmit:
        rows, functions = message.tasks, message.functions
    elif kind is TaskRun:
        rows, functions = message.tasks, [function for _, function in message.functions]
    elif kind is WorkerRun:
        rows, functions = message.calls, message.functions
    elif kind is InheritanceReplaced:
        rows, functions = [], message.definitions
    else:
        return len(frames)
    waiting = iter(frames)
    # In the order in which they stand in the message.
    for index, row in enumerate(rows):
        if row[-1].__class__ is not bytes:
            rows[index] = (*row[:-1], _take(row[-1], waiting, open_segment))
    for function in functions:
        if type(function.blob) is not bytes:
            function.blob = _take(function.blob, waiting, open_segment)  # type: ignore[assignment]
    return sum(1 for _ in waiting)


def _take(mark: Any, frames: Any, open_segment: Callable[[int, int, int], Any] | None) -> Frames:
    if mark.code != _EXT_FRAMES or len(mark.data) < 4:
        raise RemoteProtocolError(f"extension {mark.code} is not a payload")
    wanted = int.from_bytes(mark.data[:4], "little")
    entries = unpack_entries(mark.data[4:], wanted)
    if entries is None or (entries and open_segment is None):
        raise RemoteProtocolError("a payload in files that this peer cannot have")
    taken = list(itertools.islice(frames, wanted - len(entries)))
    if len(taken) < wanted - len(entries) or not wanted:
        raise RemoteProtocolError("a payload without its frames")
    for index, writer, number, size_bytes in entries:
        taken.insert(index, open_segment(writer, number, size_bytes))  # type: ignore[misc]
    return Frames(taken)
