"""The frames of a link as the parts of a network message, and back.

The first part says what the others are. Decoding is safe on input from anyone and allocates nothing of a size that the
input merely names.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import msgspec

from scaler_executor.protocol.codec import MAX_FRAMES, RemoteProtocolError
from scaler_executor.protocol.link import Ack, Data, Frame, Greeting
from scaler_executor.protocol.parcels import Packet

#: A part is not larger than this: what is larger goes in pieces.
MAX_PART_BYTES: Final = 1 << 20


class _DataHead(msgspec.Struct, array_like=True, tag=2):
    """A Data without the parts of its packet."""

    epoch: int
    seq: int
    received: int
    piece_of: int = 0
    is_last: bool = False
    blobs: list[tuple[int, int]] = []


_Head: TypeAlias = Greeting | _DataHead | Ack

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Head).decode


def encode_frame(frame: Frame) -> list[Any]:
    """Return the parts of the message."""
    if isinstance(frame, Data):
        packet: Packet = frame.packet
        head = _DataHead(frame.epoch, frame.seq, frame.received, packet.piece_of, packet.is_last, packet.blobs)
        return [_encode(head), *packet.parts]
    return [_encode(frame)]


def decode_frame(parts: list[Any]) -> Frame:
    """Return the frame.

    Raises:
        RemoteProtocolError: These are not the parts of one.
    """
    if not parts or len(parts) > MAX_FRAMES + 2:
        raise RemoteProtocolError(f"a message of {len(parts)} parts")
    try:
        head = _decode(parts[0])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"not a frame of a link: {error}") from None
    if isinstance(head, _DataHead):
        packet = Packet(parts[1:], head.piece_of, head.is_last, head.blobs)
        return Data(head.epoch, head.seq, head.received, packet, len(packet))
    if len(parts) > 1:
        raise RemoteProtocolError(f"{len(parts) - 1} parts behind a frame without any")
    return head  # type: ignore[no-any-return]
