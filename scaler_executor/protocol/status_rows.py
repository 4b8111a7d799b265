"""The rows of a `messages.StatusReport`: what an observer is told of machines, clients and calls."""

from __future__ import annotations

import msgspec


class AgentStatus(msgspec.Struct):
    """A machine: `held` tasks are there, queued or running, since `age_s` seconds."""

    name: str
    workers: int
    held: int
    age_s: float


class ClientStatus(msgspec.Struct):
    """A client, with the calls of its that run and the items that wait."""

    client_id: int
    name: str
    running: int
    queued: int
    age_s: float


class CallStatus(msgspec.Struct):
    """A call, or run of `items`, that has been seen running for `age_s` seconds."""

    client_id: int
    no: int
    function: str
    age_s: float
    items: int
    agent: str
