"""What an agent is told and what it tells its runtime to do: the events and instructions of `agent`."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from scaler_executor.protocol.messages import (
    DeathReport,
    Message,
    SessionMessage,
    ToAgentMessage,
    ToSessionMessage,
    WorkerRun,
)

#: A record of a result pipe: (kind, seq, item, payload), see `page`.
Record: TypeAlias = tuple[int, int, int, Any]


# Events


class Received(msgspec.Struct):
    """A message came from the scheduler."""

    message: ToAgentMessage


class FromWorker(msgspec.Struct):
    """The nested session of a worker says this."""

    worker_id: int
    message: SessionMessage


class Forked(msgspec.Struct):
    """The worker's process exists; its descriptors are here."""

    worker_id: int
    pid: int


class ForkFailed(msgspec.Struct):
    """The process could not be made."""

    worker_id: int
    reason: str
    #: The forker was lost with the order; another one is there, or this is the last word.
    forker_lost: bool = False


class Records(msgspec.Struct):
    """The worker wrote these into its result pipe."""

    worker_id: int
    records: list[Record]


class Printed(msgspec.Struct):
    """What a worker has printed since it was last said, (seq, stream, lost, data); see `output_ring`. Said before the
    Records that were read first."""

    worker_id: int
    rows: list[tuple[int, int, int, bytes]]


class Seen(msgspec.Struct):
    """What the page of a running worker said, its pipe having been read afterwards. It may be out of date, but not
    ahead."""

    worker_id: int
    current: int
    done: int


class Frozen(msgspec.Struct):
    """What the page of the frozen worker said, as `messages.WorkerFrozen`. The answer to the oldest Freeze of that
    worker."""

    worker_id: int
    current: int
    done: int
    item: int
    killed: bool = False
    stuck: bool = False


class Exited(msgspec.Struct):
    """The worker is gone, its pipe has been read to the end, and these were the last words of its page."""

    worker_id: int
    current: int
    done: int
    item: int
    report: DeathReport
    #: It died because the forker was lost: that says nothing about whether workers can be started.
    forker_lost: bool = False


class Disinherited(msgspec.Struct):
    """The forker was lost, and workers inherited their client's process from it. They are dead or dying, and those that
    are forked from now on inherit nothing. Said before anything else of that loss."""

    reason: str


class SchedulerLost(msgspec.Struct):
    """The connection is gone, but may come back in time. `unheard_s`: what was said so long ago was certainly heard.
    Said again when more is known."""

    unheard_s: float = 0.0


class SchedulerBack(msgspec.Struct):
    """The connection goes on where it was."""


class NewEpoch(msgspec.Struct):
    """The connection is back, but with a scheduler that knows nothing of what was here."""


class Drain(msgspec.Struct):
    """Take nothing more, hand back what has not started, end when the rest is over."""


class Tick(msgspec.Struct):
    """Time has passed, see `next_deadline`."""


Event: TypeAlias = (
    Received
    | FromWorker
    | Forked
    | ForkFailed
    | Records
    | Printed
    | Seen
    | Frozen
    | Exited
    | Disinherited
    | SchedulerLost
    | SchedulerBack
    | NewEpoch
    | Drain
    | Tick
)


# Instructions


class Send(msgspec.Struct):
    """Send to the scheduler."""

    message: Message


class Fork(msgspec.Struct):
    """Have a worker forked. Answered by Forked and a record READY, by ForkFailed, or by Exited."""

    worker_id: int


class Start(msgspec.Struct):
    """Allow these calls in the worker's page, then send them to it."""

    worker_id: int
    message: WorkerRun


class Interrupt(msgspec.Struct):
    """Stop a call softly; see `messages.InterruptWorker`."""

    worker_id: int
    seq: int


class Freeze(msgspec.Struct):
    """See `messages.FreezeWorker`. Answered by Frozen, or by Exited."""

    worker_id: int
    kill_seq: int
    revoke: list[int]
    split_seq: int


class Retire(msgspec.Struct):
    """Let the worker exit when it has done what it holds: close its end of the call pair."""

    worker_id: int


class Kill(msgspec.Struct):
    """Kill the worker, whatever it does."""

    worker_id: int


class Look(msgspec.Struct):
    """Read the worker's page, then its pipe, and say Records and Seen."""

    worker_id: int


class ToWorker(msgspec.Struct):
    """Say this to the nested session of a worker."""

    worker_id: int
    message: ToSessionMessage


class Drained(msgspec.Struct):
    """The last worker is gone after Drain."""


Instruction: TypeAlias = Send | Fork | Start | Interrupt | Freeze | Retire | Kill | Look | ToWorker | Drained
