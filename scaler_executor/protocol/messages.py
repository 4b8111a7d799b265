"""The messages that client, scheduler, agent, worker and forker exchange.

This module knows the shape of every message and nothing of how it travels (`codec`) or what it causes (`client`,
`scheduler`, `agent`). One message carries many rows, because batches form by themselves: a busy loop finds more
waiting each time it looks. The rows that occur once per call are plain tuples, described below; everything else is a
typed struct.

Numbers. A client numbers its items 1, 2, 3...; a *task* is a run of 1..n consecutive items of one function and is
called by the number of its first item (`no`). The scheduler adds the client's base (`client_id << CLIENT_ID_SHIFT`)
to get the cluster-wide `task_id`. A run that is split at an item leaves the head under its own number and makes the
tail a task with the number of *its* first item, so that no new number is ever needed and two tasks never share one.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final, TypeAlias

import msgspec

from scaler_executor.protocol.death_report import Death as Death
from scaler_executor.protocol.death_report import DeathReport as DeathReport
from scaler_executor.protocol.forker_messages import ForkerMessage as ForkerMessage
from scaler_executor.protocol.forker_messages import ForkerSetup as ForkerSetup
from scaler_executor.protocol.forker_messages import ForkWorker as ForkWorker
from scaler_executor.protocol.forker_messages import FreezeWorker as FreezeWorker
from scaler_executor.protocol.forker_messages import InterruptWorker as InterruptWorker
from scaler_executor.protocol.forker_messages import KillWorker as KillWorker
from scaler_executor.protocol.forker_messages import ToForkerMessage as ToForkerMessage
from scaler_executor.protocol.forker_messages import WorkerExited as WorkerExited
from scaler_executor.protocol.forker_messages import WorkerForked as WorkerForked
from scaler_executor.protocol.forker_messages import WorkerForkFailed as WorkerForkFailed
from scaler_executor.protocol.forker_messages import WorkerFrozen as WorkerFrozen
from scaler_executor.protocol.status_rows import AgentStatus as AgentStatus
from scaler_executor.protocol.status_rows import CallStatus as CallStatus
from scaler_executor.protocol.status_rows import ClientStatus as ClientStatus

PROTOCOL_VERSION: Final = 1

#: A task_id is `client_id << CLIENT_ID_SHIFT | no`: room for 2**40 items a client and 2**23 clients in a signed
#: 64-bit word.
CLIENT_ID_SHIFT: Final = 40


class Frames:
    """A payload too large to stand inside a message: buffers that travel beside it, in order, and are never copied on
    the way.

    The first is the pickle, the others are its out-of-band buffers (PEP 574).
    """

    __slots__ = ("buffers",)

    def __init__(self, buffers: list[Any]) -> None:
        self.buffers = buffers

    def __len__(self) -> int:
        """Return the payload's size in bytes, as `len` does for an inline payload."""
        return sum(len(buffer) for buffer in self.buffers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frames) and [bytes(b) for b in self.buffers] == [bytes(b) for b in other.buffers]

    def __repr__(self) -> str:
        return f"Frames({len(self.buffers)} buffers, {len(self)} bytes)"

    __hash__ = None  # type: ignore[assignment]


#: Bytes of a call's or a result's pickle, or `Frames`. On the wire a `Frames` is an extension value that counts its
#: buffers.
Payload: TypeAlias = "bytes | Frames"
WirePayload: TypeAlias = bytes | msgspec.msgpack.Ext


#: In the place of a client's cancel_no: somebody else has stopped its call.
BY_OPERATOR: Final = -1


class CancelKind(IntEnum):
    """How far a TaskCancel may go."""

    RECALL = 0  # the scheduler wants back what has not started, to run it elsewhere
    SOFT = 1  # a user takes back what has not started; running code is left alone
    FORCED = 2  # a user wants it stopped, running or not


class TaskCancelConfirmType(IntEnum):
    """What became of a TaskCancel."""

    CANCELED = 0  # it will not run (any more): it had not started, or its code has stopped
    CANCEL_NOT_FOUND = 1  # nobody knows the task: it was never there, or its result is already on the way
    CANCEL_FAILED = 2  # it exists and will not be stopped


class ResultKind(IntEnum):
    """What a result's payload is."""

    VALUE = 0  # one pickle per item, one behind the other; or words, see `page.INTEGERS`
    ERROR = 1  # pickle of an exception, of one item
    DIED = 2  # msgpack of a `DeathReport`: the worker died in this item
    BROKEN = 3  # utf-8 text: no worker can be started, and why
    LOST = 4  # utf-8 text: it was not started, and will not be: why
    TIMED_OUT = 5  # utf-8 text without the call's name: it ran for longer than its timeout, and was stopped


class CallStyle(IntEnum):
    """How a worker makes a call out of a payload."""

    INLINE = 0  # pickle of (function, args, kwargs)
    CALL = 1  # pickle of (args, kwargs)
    MAP = 2  # pickle of (form, items): a run, see `scaler_executor.runtime.calls`
    DEFINITION = 3  # nothing is called: others need it, see `Function`
    SETUP = 4  # nothing is called: made ready once, before the first call; see `runtime.setup`


class Options(msgspec.Struct, array_like=True, frozen=True):
    """What holds for each call of a function as it was registered."""

    retries: int = 0  # after the death of its worker, or the loss of its agent or scheduler
    timeout_s: float | None = None  # of running; None: no limit. Its tasks have one item each
    priority: int = 0  # higher first, among the client's own
    cancel_grace_s: float | None = None  # None: the agent's


class Function(msgspec.Struct, array_like=True):
    """A function as one client registered it: sent once to each process that needs it, then called by its id.

    Ids count up from 1 per client and are never used again; 0 stands for calls that bring their function along. A
    definition, of a global of the client's `__main__`, is sent and forgotten like a function, but not called: it goes
    to whoever is sent a function that needs it, before that.
    """

    function_id: int
    name: str
    blob: WirePayload
    style: int = CallStyle.CALL
    options: Options = Options()
    needs: list[int] = []  # definitions, by id
    version: int = 0  # of a definition: a worker takes only what is newer than what it has


#: Client to scheduler, one submitted task: (no, items, function_id, payload).
TaskRow: TypeAlias = tuple[int, int, int, WirePayload]
#: Scheduler to agent: (task_id, attempt, client_id, items, skip, function_id, payload). The payload may be that of a
#: longer run: the task's items are those from number `skip` on.
RunRow: TypeAlias = tuple[int, int, int, int, int, int, WirePayload]
#: Client to scheduler: (no, cancel_no, kind); scheduler to agent the same with task_id.
CancelRow: TypeAlias = tuple[int, int, int]
#: To the client: (no, cancel_no, type, first, count, proven). Items [first, first + count) of the submitted task `no`
#: are meant. Not `proven`: the machine that ran it is out of reach.
ClientConfirmRow: TypeAlias = tuple[int, int, int, int, int, bool]
#: Agent to scheduler: (task_id, attempt, cancel_no, type, at). CANCELED with 0 < at: the run was split, its items
#: from number `at` on are taken back, those before run on.
AgentConfirmRow: TypeAlias = tuple[int, int, int, int, int]
#: To the client: (no, first, count, kind, payload).
ClientResultRow: TypeAlias = tuple[int, int, int, int, WirePayload]
#: Agent to scheduler: (task_id, attempt, first, count, kind, payload), `first` counted from the task's own first item.
AgentResultRow: TypeAlias = tuple[int, int, int, int, int, WirePayload]
#: Agent to scheduler: (task_id, attempt, at): the items from number `at` on are a task of their own from now on.
SplitRow: TypeAlias = tuple[int, int, int]
#: Agent to scheduler: (task_id, attempt, report). The worker died in this task's first outstanding item.
DeathRow: TypeAlias = tuple[int, int, DeathReport]
#: Agent to scheduler: (task_id, stream, lost, data); to the client the same with `no`. `stream` is one of `printed`,
#: `lost` the number of lines that were dropped in front of the data. With an item number of 0 no call is meant: it was
#: printed before the first one, between two or after its own was over.
OutputRow: TypeAlias = tuple[int, int, int, bytes]
#: Client to scheduler: (no, spent, done). Task `no`, which follows, has been submitted to a scheduler that is lost;
#: `spent` of its retries are used, and the item ranges (first, count) of `done` are answered.
AgainRow: TypeAlias = tuple[int, int, list[tuple[int, int]]]
#: Agent to worker: (seq, items, skip, function_id, payload). `seq` numbers the calls of one worker, from 1.
WorkerCallRow: TypeAlias = tuple[int, int, int, int, WirePayload]


class Message(msgspec.Struct, array_like=True):
    """Base of what travels."""


class Hello(Message, tag=1):
    """First message of a client or an agent."""

    role: str
    version: int = PROTOCOL_VERSION
    python: str = ""
    name: str = ""
    secret: bytes = b""  # of a client: the same for each of its sessions, of which a new one ends the others
    max_running: int | None = None  # at most so many of this client's items at once
    max_items_per_worker: int | None = None  # instead of what agents were told for the workers of this client


class Welcome(Message, tag=2):
    """The scheduler's answer to Hello."""

    peer_id: int
    version: int = PROTOCOL_VERSION
    workers: int = 0  # of all agents, at the moment


class RefusalKind(IntEnum):
    """Why a peer is not let in."""

    UNREACHABLE = 0  # nobody answers, or the cluster is closing
    KEY = 1  # one of the two keys is not the right one
    VERSION = 2  # of the protocol, or of Python


class Refused(Message, tag=3):
    """The scheduler's other answer to Hello; it closes the connection behind it."""

    reason: str
    kind: int = RefusalKind.UNREACHABLE


class Bye(Message, tag=4):
    """The peer leaves, in order: a client without outstanding tasks, an agent without calls. By force: whatever is
    outstanding is given up."""

    force: bool = False


class TaskSubmit(Message, tag=5):
    """Client to scheduler: tasks, with the functions that they need and that were not sent before."""

    tasks: list[TaskRow]
    functions: list[Function] = []
    forget: list[int] = []  # functions that no later message will name
    parent: int = 0  # of a nested session: the call that submits these, `seq` << 32 | item; 0: one that is over


class TaskRun(Message, tag=6):
    """Scheduler to agent: tasks to run; functions as in TaskSubmit, each with the client that it belongs to."""

    tasks: list[RunRow]
    functions: list[tuple[int, Function]] = []
    forget: list[tuple[int, int]] = []


class TaskCancel(Message, tag=7):
    """Client to scheduler to agent: stop these."""

    cancels: list[CancelRow]


class TaskCancelConfirm(Message, tag=8):
    """Scheduler to client: the answers to its TaskCancels."""

    confirms: list[ClientConfirmRow]


class TaskResult(Message, tag=9):
    """Scheduler to client."""

    results: list[ClientResultRow]


class TaskRunning(Message, tag=10):
    """These have been running for some milliseconds. It may lag; a settled task implies it. Scheduler to client:
    numbers `no`."""

    tasks: list[int]


class AgentConfirm(Message, tag=11):
    """Agent to scheduler: the answers to its TaskCancels."""

    confirms: list[AgentConfirmRow]


class AgentResult(Message, tag=12):
    """Agent to scheduler."""

    results: list[AgentResultRow]


class TaskSplit(Message, tag=13):
    """Agent to scheduler, before anything else is said of the tails."""

    splits: list[SplitRow]


class TaskDied(Message, tag=14):
    """Agent to scheduler."""

    deaths: list[DeathRow]


class TaskReturned(Message, tag=15):
    """Agent to scheduler: handed back before they started, (task_id, attempt)."""

    tasks: list[tuple[int, int]]


class AgentCapacity(Message, tag=16):
    """Agent to scheduler: how many tasks it wants to hold at once; 0 while it drains."""

    tasks: int
    workers: int


class ClientGone(Message, tag=17):
    """Scheduler to agent: nothing more comes from or goes to this client; its workers are of no use any more."""

    client_id: int


class WorkersBroken(Message, tag=18):
    """No worker can be started. Agent to scheduler: for this client; scheduler to client: `client_id` is its own."""

    client_id: int
    reason: str


class Blocked(Message, tag=19):
    """These calls wait for nested ones and lend their slot: worker to agent (numbers `seq`) to scheduler, which says it
    back when what they wait for has been offered a place, and then the slot is free."""

    tasks: list[int]


class Unblocked(Message, tag=20):
    """These calls want their slot back: worker to agent, which says it back when they have it; agent to scheduler: they
    wait no more."""

    tasks: list[int]
    at_once: bool = False  # whether there is one or not: what they have waited for has not come in time


class Output(Message, tag=21):
    """What calls printed and logged, in order, before anything else is said of them. Agent to scheduler to client."""

    rows: list[OutputRow]


class InheritanceLost(Message, tag=23):
    """Agent to scheduler to client: this client's workers no longer inherit its process, so nothing of its `__main__`
    is there by name. None is started before the answer, InheritanceReplaced."""

    client_id: int
    reason: str


class InheritanceReplaced(Message, tag=24):
    """Client to scheduler to agent: the definitions of what calls, up to this answer, took for inherited. Each worker
    is sent them before its first call. `client_id` is filled in by the scheduler."""

    client_id: int
    definitions: list[Function]


class SessionLost(Message, tag=25):
    """To a client, from its own relay: the scheduler knows nothing of it any more. The client begins anew with Hello;
    what it sent before that is dropped."""

    reason: str


class StatusAsk(Message, tag=26):
    """Observer to scheduler: what is going on?"""


class StatusReport(Message, tag=27):
    """Scheduler to observer. `calls` are the oldest ones of the `running`; `done` and `rate` count items."""

    agents: list[AgentStatus]
    clients: list[ClientStatus]
    calls: list[CallStatus]
    running: int
    queued: int
    done: int
    rate: float
    version: int
    python: str


class OperatorCancel(Message, tag=28):
    """Observer to scheduler: stop these tasks, (client_id, no), by force."""

    tasks: list[tuple[int, int]]


class OperatorAnswer(Message, tag=29):
    """Scheduler to observer: of the tasks that were named, those that are being stopped."""

    tasks: list[tuple[int, int]]


class ClientLimit(Message, tag=39):
    """Scheduler to agent, before the first task of a client with limits, and when they change.

    The agent may have so many workers for this client, counting those that are being stopped in a call; with 0 it
    hands back what it cannot start. It says ClientLimited as soon as this holds, if `limit_no` is not 0.
    """

    client_id: int
    max_workers: int | None = None  # None: no limit
    max_items_per_worker: int | None = None  # None: as the agent was told
    limit_no: int = 0


class ClientLimited(Message, tag=40):
    """Agent to scheduler: the ClientLimit of this number, the newest one of its client, is kept from now on."""

    client_id: int
    limit_no: int


class TaskRetried(Message, tag=41):
    """Scheduler to client: so many of the retries of these tasks are used, (no, spent)."""

    tasks: list[tuple[int, int]]


class TasksAgain(Message, tag=42):
    """Client to scheduler, before the TaskSubmit of these tasks: others may still be stopping them."""

    tasks: list[AgainRow]


class Nested(Message, tag=43):
    """What the nested session of a worker says to the scheduler or hears from it, on its way through the agent.

    `parent` is the task, and `item` its item, that submits what is in a TaskSubmit; 0: it is over. The session's calls
    count as those of `client_id`, which the worker serves.
    """

    worker_id: int
    message: (
        Hello
        | Bye
        | TaskSubmit
        | TaskCancel
        | Welcome
        | Refused
        | TaskResult
        | TaskCancelConfirm
        | TaskRunning
        | TaskRetried
        | Output
    )
    client_id: int = 0
    parent: int = 0
    item: int = 0


class WorkerRun(Message, tag=22):
    """Agent to worker: calls of one function, to be made in this order."""

    calls: list[WorkerCallRow]
    functions: list[Function] = []
    forget: list[int] = []


ClientMessage: TypeAlias = Hello | Bye | TaskSubmit | TasksAgain | TaskCancel | InheritanceReplaced
ToClientMessage: TypeAlias = (
    Welcome
    | Refused
    | TaskResult
    | TaskCancelConfirm
    | TaskRunning
    | TaskRetried
    | WorkersBroken
    | InheritanceLost
    | SessionLost
    | Output
)
AgentMessage: TypeAlias = (
    Hello
    | Bye
    | AgentResult
    | AgentConfirm
    | TaskRunning
    | TaskSplit
    | TaskDied
    | TaskReturned
    | AgentCapacity
    | WorkersBroken
    | InheritanceLost
    | ClientLimited
    | Blocked
    | Unblocked
    | Nested
    | Output
)
ToAgentMessage: TypeAlias = (
    Welcome | Refused | TaskRun | TaskCancel | ClientGone | ClientLimit | InheritanceReplaced | Blocked | Nested | Bye
)
SessionMessage: TypeAlias = Hello | Bye | TaskSubmit | TaskCancel | Blocked | Unblocked
ToSessionMessage: TypeAlias = ToClientMessage | Unblocked
ObserverMessage: TypeAlias = Hello | Bye | StatusAsk | OperatorCancel
FromPeerMessage: TypeAlias = ClientMessage | AgentMessage | ObserverMessage
ToObserverMessage: TypeAlias = Welcome | Refused | StatusReport | OperatorAnswer
