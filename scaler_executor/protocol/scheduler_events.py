"""What the scheduler is told and what it tells its runtime to do: the events and instructions of `scheduler`."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from scaler_executor.protocol.messages import AgentMessage, ClientMessage, Message

# Events


class Received(msgspec.Struct):
    """A message came from a peer, whose first one is Hello. Peers are called by numbers that the caller never uses
    again."""

    peer: int
    message: ClientMessage | AgentMessage


class PeerLost(msgspec.Struct):
    """A peer is gone for good.

    `stopped`: none of its code runs any more, as is known of a process that died on this machine. `unheard_s`: so long
    nothing has been heard of it.
    """

    peer: int
    reason: str
    stopped: bool = False
    unheard_s: float = 0.0


class Drain(msgspec.Struct):
    """Start nothing more: what is queued, and what comes, is given back to its client with this reason."""

    reason: str


class Congested(msgspec.Struct):
    """Much, or not so much any more, waits to be sent to a client: it is given nothing more to run for the time."""

    peer: int
    is_congested: bool


class Tick(msgspec.Struct):
    """Time has passed, see `next_deadline`."""


Event: TypeAlias = Received | PeerLost | Drain | Congested | Tick


# Instructions


class Send(msgspec.Struct):
    """Send to a peer."""

    peer: int
    message: Message


class Drop(msgspec.Struct):
    """Close the connection to a peer, whose part here is over. `error`: it broke the protocol."""

    peer: int
    reason: str
    error: bool = False


class Hold(msgspec.Struct):
    """Read no more of a client than what is on its way, or go on: it has as much here as it may have."""

    peer: int
    is_held: bool


Instruction: TypeAlias = Send | Drop | Hold
