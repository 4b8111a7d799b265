"""What the ends of a link say to each other, what an end is told, and what it tells its runtime to do: the frames,
events and instructions of `link`."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

# Frames: what the ends say to each other


class Greeting(msgspec.Struct, array_like=True, tag=1):
    """First frame of each epoch in each direction: who speaks, to whom as far as known, and what it has."""

    epoch: int
    sender: bytes
    receiver: bytes
    received: int


class Data(msgspec.Struct, array_like=True, tag=2):
    """Packet number `seq`, of `packet_bytes`; the sender has received all up to `received`."""

    epoch: int
    seq: int
    received: int
    packet: Any
    packet_bytes: int = 1


class Ack(msgspec.Struct, array_like=True, tag=3):
    """The sender has received all up to `received`, the last of it `held_s` ago. It read `sent_at` on its clock, and
    `echo` in the receiver's last Ack."""

    epoch: int
    received: int
    sent_at: float = 0.0
    echo: float = 0.0
    held_s: float = 0.0


Frame: TypeAlias = Greeting | Data | Ack


# Events


class Outgoing(msgspec.Struct):
    """Carry this packet to the other end."""

    packet: Any
    packet_bytes: int


class Connected(msgspec.Struct):
    """A transport is there. Any earlier one is of no use any more, whether its end has been noticed or not."""


class Arrived(msgspec.Struct):
    """A frame came, over this transport or an earlier one."""

    frame: Frame


class Disconnected(msgspec.Struct):
    """The transport is gone."""


class Leaving(msgspec.Struct):
    """This end is about to go: say at once what was received."""


class Hold(msgspec.Struct):
    """Acknowledge nothing more for now, or again: thus the other end, when its window is full, sends no more."""

    is_held: bool


class Tick(msgspec.Struct):
    """Time has passed, see `next_deadline`."""


Event: TypeAlias = Outgoing | Connected | Arrived | Disconnected | Leaving | Hold | Tick


# Instructions


class Transmit(msgspec.Struct):
    """Put this on the transport."""

    frame: Frame


class Deliver(msgspec.Struct):
    """Hand these to whoever waits for them, in order."""

    packets: list[Any]


class Disconnect(msgspec.Struct):
    """The transport is gone, though it has not said so: close it."""


class PeerLost(msgspec.Struct):
    """The session is over: close the transport. Said once; nothing is delivered afterwards."""

    reason: str


Instruction: TypeAlias = Transmit | Deliver | Disconnect | PeerLost
