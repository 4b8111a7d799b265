"""What a client's state is told and what it tells its runtime to do: the events and instructions of `client`."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec

from scaler_executor.protocol.messages import (
    CancelKind,
    ClientResultRow,
    Function,
    Message,
    OutputRow,
    TaskRow,
    ToClientMessage,
)

Cause = Literal["CANCELED", "NOT_FOUND", "FINISHED_FIRST", "UNCONFIRMED"]

#: In the place of a first item: every item of the run that has no answer yet.
REST: Final = -1


# Events


class Batch(msgspec.Struct):
    """What callers asked for since the last time, in order, but a cancel of a task of the same batch unsends it."""

    tasks: list[TaskRow] = []
    functions: list[Function] = []
    forget: list[int] = []
    cancels: list[tuple[int, CancelKind]] = []
    #: The answer to Disinherited.
    definitions: list[Function] | None = None


class Received(msgspec.Struct):
    """A message came from the scheduler."""

    message: ToClientMessage


class Stranded(msgspec.Struct):
    """The answer to Renewed: what callers had asked for by then, of the scheduler that was lost."""

    batch: Batch


class SchedulerLost(msgspec.Struct):
    """The scheduler, or the way to it, is gone for good."""

    reason: str


class CloseAsked(msgspec.Struct):
    """The user will submit no more: say Bye when nothing is outstanding."""


Event: TypeAlias = Batch | Received | Stranded | SchedulerLost | CloseAsked


# Instructions


class Send(msgspec.Struct):
    """Send to the scheduler."""

    message: Message


class Deliver(msgspec.Struct):
    """These items have a result. A task of one item is over with it."""

    results: list[ClientResultRow]


class Cancelled(msgspec.Struct):
    """Items [first, first + count) of a task end cancelled, and why: (no, first, count, cause). `first` is REST for
    all that are left."""

    items: list[tuple[int, int, int, Cause]]


class CancelRefused(msgspec.Struct):
    """The cancels of these are answered: they run on and complete normally."""

    tasks: list[int]


class Running(msgspec.Struct):
    """These have been seen running."""

    tasks: list[int]


class Finished(msgspec.Struct):
    """Each item of these has been answered. Not said of tasks of one item that are over with Deliver and were never
    asked to cancel."""

    tasks: list[int]


class Lost(msgspec.Struct):
    """These end with SchedulerLostError."""

    tasks: list[int]
    reason: str


class Renewed(msgspec.Struct):
    """Begin anew, with Hello: the scheduler knows no function any more. What has not been fed in yet may count on some:
    it is fed in by Stranded, before anything else."""

    reason: str


class Broken(msgspec.Struct):
    """No worker can be started: what is submitted from now on is refused with this reason."""

    reason: str


class Disinherited(msgspec.Struct):
    """Functions and classes of `__main__` are to be sent from now on: workers inherit them no more. Those that calls
    have counted on so far go into a Batch: no worker is started before that."""

    reason: str


class Show(msgspec.Struct):
    """Calls have printed this: see `messages.OutputRow`."""

    rows: list[OutputRow]


class Closed(msgspec.Struct):
    """Bye has been said: nothing more will happen."""


Instruction: TypeAlias = (
    Send
    | Deliver
    | Cancelled
    | CancelRefused
    | Running
    | Finished
    | Lost
    | Renewed
    | Broken
    | Disinherited
    | Show
    | Closed
)
