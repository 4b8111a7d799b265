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


class Tick(msgspec.Struct):
    """Time has passed, see `next_deadline`."""


Event: TypeAlias = Received | PeerLost | Drain | Tick


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


Instruction: TypeAlias = Send | Drop
