"""The scheduler: routes tasks from clients to agents and holds the state of every accepted task.

It alone makes attempts, knows `retries` and answers cancels. It does not know workers (an agent does), never looks
into a payload, and does no I/O. The table at the end of this file is the heart of it; each odd-looking cell names the
race that needs it.

One task is in exactly one of these states:

QUEUED      waits for room at an agent
ASSIGNED    an agent has it: queued there, in a worker's hands, or running
RECALLING   as ASSIGNED, and the scheduler has asked for it back to run it elsewhere
CANCELING   as ASSIGNED, and its user has asked to cancel it; whatever the agent says next answers that
FENCING     its agent is out of reach and may still be running it, until the fence time is over
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import msgspec

from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.functions import KnownFunctions, ReceivedFunction
from scaler_executor.protocol.machine import Story, Transition, forbidden, peer_error, unreachable
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    PROTOCOL_VERSION,
    AgentCapacity,
    AgentConfirm,
    AgentMessage,
    AgentResult,
    Bye,
    CancelKind,
    CancelRow,
    ClientConfirmRow,
    ClientGone,
    ClientMessage,
    ClientResultRow,
    DeathReport,
    Function,
    Hello,
    InheritanceLost,
    Message,
    Refused,
    ResultKind,
    RunRow,
    TaskCancel,
    TaskCancelConfirm,
    TaskCancelConfirmType,
    TaskDied,
    TaskResult,
    TaskReturned,
    TaskRun,
    TaskRunning,
    TaskSplit,
    TaskSubmit,
    Welcome,
    WorkersBroken,
)

State = Literal["QUEUED", "ASSIGNED", "RECALLING", "CANCELING", "FENCING", "GONE"]
QUEUED: Final = "QUEUED"
ASSIGNED: Final = "ASSIGNED"
RECALLING: Final = "RECALLING"
CANCELING: Final = "CANCELING"
FENCING: Final = "FENCING"
#: Not a state of the table: marks a task that is forgotten but whose entry still stands in its client's queue.
GONE: Final = "GONE"

#: An agent that is cut off stops its calls before this time is over (see `agent.FENCE_S`), so that nothing runs twice.
FENCE_S: Final = 10.0
#: An agent may have idle workers for so long before calls that wait elsewhere are recalled for it.
IDLE_BEFORE_RECALL_S: Final = 0.02
#: Clients take turns of so many tasks.
TURN_TASKS: Final = 64

_NO_FUNCTION: Final = ReceivedFunction(Function(0, "", b"", 0), lambda _: None)

CANCELED: Final = TaskCancelConfirmType.CANCELED
NOT_FOUND: Final = TaskCancelConfirmType.CANCEL_NOT_FOUND
FAILED: Final = TaskCancelConfirmType.CANCEL_FAILED


# Events and instructions


class Received(msgspec.Struct):
    """A message came from a peer, whose first one is Hello. Peers are called by numbers that the caller never uses
    again."""

    peer: int
    message: ClientMessage | AgentMessage


class PeerLost(msgspec.Struct):
    """A peer is gone for good. `stopped`: none of its code runs any more, as is known of a process that died on this
    machine."""

    peer: int
    reason: str
    stopped: bool = False


class Tick(msgspec.Struct):
    """Time has passed, see `next_deadline`."""


Event: TypeAlias = Received | PeerLost | Tick


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


# Rows


class Task:
    """A task. The attributes with a class-level default are set on the way, if ever."""

    state: State = QUEUED
    #: The agent that has it; None in QUEUED and FENCING.
    agent: Agent | None = None
    #: Number of the current attempt. What an agent says of another one is stale.
    attempt: int = 1
    #: How often it was tried and lost its worker so far.
    deaths: int = 0
    #: Items answered, from the front. The others are outstanding.
    start: int = 0
    #: Newest cancel request to the agent; only set in RECALLING and CANCELING.
    agent_cancel_no: int = 0
    #: Newest cancel request of the user, in CANCELING and FENCING; 0: none, or nobody to answer.
    user_cancel_no: int = 0
    kind: CancelKind = CancelKind.RECALL
    #: A recall has been refused once: it was running. It is not asked again.
    recall_refused: bool = False

    def __init__(
        self,
        task_id: int,
        client: Client,
        no: int,
        offset: int,
        items: int,
        skip: int,
        function: ReceivedFunction,
        payload: Any,
    ) -> None:
        self.task_id = task_id
        self.client = client
        #: The number under which the client submitted it, and where in that run its items begin.
        self.no = no
        self.offset = offset
        self.items = items
        #: Where in the payload its items begin.
        self.skip = skip
        self.function = function
        self.payload = payload

    @property
    def open_items(self) -> int:
        return self.items - self.start


class Client:
    """A client as the scheduler sees it."""

    def __init__(self, peer: int, client_id: int) -> None:
        self.peer = peer
        self.client_id = client_id
        self.base = client_id << CLIENT_ID_SHIFT
        self.functions: dict[int, ReceivedFunction] = {0: _NO_FUNCTION}
        #: Tasks in QUEUED, next first, among entries that are GONE.
        self.queue: deque[Task] = deque()
        #: {no: {task_id: Task}} of the submitted runs of more than one item: the tasks that a run has become.
        self.runs: dict[int, dict[int, Task]] = {}
        self.last_no = 0
        #: Set when it is lost: its tasks are being stopped and nobody is answered.
        self.gone = False
        #: Number of its tasks that are not over; kept from the time when it is gone.
        self.tasks_left = 0
        #: Why no worker can be started for it, or None.
        self.broken: str | None = None
        self.results: list[ClientResultRow] = []
        self.confirms: list[ClientConfirmRow] = []
        self.running: list[int] = []


class Agent:
    """An agent as the scheduler sees it."""

    def __init__(self, peer: int, name: str) -> None:
        self.peer = peer
        self.name = name
        #: How many tasks it wants to hold at once.
        self.capacity = 0
        self.workers = 0
        #: How many it holds.
        self.held = 0
        #: Since when it has had fewer tasks than workers while nothing was queued, or None.
        self.idle_since: float | None = None
        #: Clients for which it cannot start a worker.
        self.broken_for: set[int] = set()
        #: Keys (client_id, function_id) of the functions that it has.
        self.known: KnownFunctions[tuple[int, int]] = KnownFunctions()
        self.runs: list[RunRow] = []
        self.functions: list[tuple[int, Function]] = []
        self.cancels: list[CancelRow] = []
        self.gone_clients: list[int] = []


class SchedulerState:
    """All accepted tasks and all peers."""

    def __init__(self) -> None:
        #: {task_id: Task}
        self._tasks: dict[int, Task] = {}
        #: {peer: Client or Agent}, from Hello until the peer is lost or says Bye.
        self._peers: dict[int, Client | Agent] = {}
        self._agents: list[Agent] = []
        #: Clients that may have something in their queue, the one whose turn it is first.
        self._ready: deque[Client] = deque()
        #: Clients that are gone but whose tasks have not all been stopped yet.
        self._leaving: set[Client] = set()
        #: When the tasks in FENCING are decided: [(deadline, [Task])], earliest first.
        self._fences: deque[tuple[float, list[Task]]] = deque()
        self._last_client_id = 0
        self._last_cancel_no = 0
        self._story = Story()
        #: Peers to which this step has something to say, in order.
        self._touched: dict[Client | Agent, None] = {}
        self._now = 0.0
        self._out: list[Instruction] = []
        #: Answers that matched no task, attempt or request: normal after lost races.
        self.stale = 0

    # The four methods that every state class has

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in and return what is to be done, in order."""
        self._now = now
        out = self._out = []
        if isinstance(event, Received):
            try:
                self._received(event.peer, event.message)
            except RemoteProtocolError as error:
                # What it said before the offending row stands; nobody else notices anything.
                out.append(Drop(event.peer, str(error), error=True))
                self._peer_lost(event.peer, f"broke the protocol: {error}", stopped=False)
        elif isinstance(event, PeerLost):
            self._peer_lost(event.peer, event.reason, event.stopped)
        elif isinstance(event, Tick):
            pass
        else:
            unreachable(event)
        while self._fences and self._fences[0][0] <= now:
            for task in self._fences.popleft()[1]:
                self._step(task, "FENCE_DUE")
        self._pump()
        self._flush()
        return out

    def next_deadline(self) -> float | None:
        """Return when the next Tick is due, or None."""
        deadlines = [self._fences[0][0]] if self._fences else []
        if len(self._agents) > 1 and any(agent.held > agent.workers for agent in self._agents):
            deadlines += [a.idle_since + IDLE_BEFORE_RECALL_S for a in self._agents if a.idle_since is not None]
        return min(deadlines, default=None)

    def story(self, task_id: int) -> list[Transition]:
        """Return what is remembered of a task: everything but the ordinary steps."""
        return self._story.of(task_id)

    def check(self) -> None:
        """Assert the invariants."""
        held: dict[Agent, int] = dict.fromkeys(self._agents, 0)
        queued = {id(task) for client in self._peers.values() if isinstance(client, Client) for task in client.queue}
        fenced = {id(task) for _, tasks in self._fences for task in tasks}
        for task_id, task in self._tasks.items():
            assert task.task_id == task_id
            assert 0 <= task.start < task.items, (task_id, task.start, task.items)
            assert (task.agent is None) == (task.state in (QUEUED, FENCING)), (task_id, task.state)
            assert bool(task.agent_cancel_no) == (task.state in (RECALLING, CANCELING)), (task_id, task.state)
            assert not task.user_cancel_no or task.state in (CANCELING, FENCING), (task_id, task.state)
            assert task.state != QUEUED or id(task) in queued, task_id
            assert task.state != FENCING or id(task) in fenced, task_id
            assert not task.client.gone or task.state in (CANCELING, FENCING), (task_id, task.state)
            assert not task.client.gone or task.client in self._leaving
            assert task.state != QUEUED or not task.recall_refused
            assert task.no not in task.client.runs or task.client.runs[task.no][task_id] is task
            if task.agent is not None:
                held[task.agent] += 1
        for agent, count in held.items():
            assert agent.held == count, (agent.peer, agent.held, count)
        for client in self._peers.values():
            if isinstance(client, Client):
                assert client in self._ready or not any(task.state == QUEUED for task in client.queue)
                assert all(client.runs.values())
        for client in self._leaving:
            assert 0 < client.tasks_left == sum(task.client is client for task in self._tasks.values())
        assert not self._touched

    @property
    def outstanding(self) -> int:
        """Number of tasks that are not over."""
        return len(self._tasks)

    # Peers

    def _received(self, peer_id: int, message: ClientMessage | AgentMessage) -> None:
        peer = self._peers.get(peer_id)
        if isinstance(peer, Agent):
            if isinstance(message, AgentResult):
                self._agent_results(peer, message)
            else:
                self._from_agent(peer, message)
        elif isinstance(peer, Client):
            self._from_client(peer, message)
        elif isinstance(message, Hello):
            self._hello(peer_id, message)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} before Hello")

    def _hello(self, peer_id: int, message: Hello) -> None:
        if message.version != PROTOCOL_VERSION:
            reason = f"version {message.version} of the protocol, this scheduler speaks {PROTOCOL_VERSION}"
            self._out += [Send(peer_id, Refused(reason)), Drop(peer_id, reason, error=True)]
        elif message.role == "client":
            self._last_client_id += 1
            self._peers[peer_id] = Client(peer_id, self._last_client_id)
            self._out.append(Send(peer_id, Welcome(self._last_client_id)))
        elif message.role == "agent":
            agent = self._peers[peer_id] = Agent(peer_id, message.name)
            self._agents.append(agent)
            self._out.append(Send(peer_id, Welcome(0)))
        else:
            raise RemoteProtocolError(f"role {message.role!r}")

    def _peer_lost(self, peer_id: int, reason: str, stopped: bool) -> None:
        peer = self._peers.pop(peer_id, None)
        if isinstance(peer, Client):
            self._client_lost(peer)
        elif isinstance(peer, Agent):
            self._agents.remove(peer)
            self._touched.pop(peer, None)
            fenced: list[Task] = []
            for task in [task for task in self._tasks.values() if task.agent is peer]:
                self._step(task, "AGENT_LOST", fenced, stopped)
            if fenced:
                self._fences.append((self._now + FENCE_S, fenced))
            self._check_broken()

    def _client_lost(self, client: Client) -> None:
        client.gone = True
        self._leaving.add(client)
        tasks = [task for task in self._tasks.values() if task.client is client]
        client.tasks_left = len(tasks)
        for task in tasks:
            self._step(task, "CLIENT_LOST")
        client.queue.clear()
        self._touched.pop(client, None)
        keys = [(client.client_id, function_id) for function_id in client.functions]
        for agent in self._agents:
            agent.known.drop(keys)  # it drops its own with ClientGone
            agent.broken_for.discard(client.client_id)
            agent.gone_clients.append(client.client_id)
            self._touched[agent] = None
        if not client.tasks_left:
            self._leaving.discard(client)

    # From clients

    def _from_client(self, client: Client, message: Any) -> None:
        if isinstance(message, TaskSubmit):
            self._submit(client, message)
        elif isinstance(message, TaskCancel):
            for no, cancel_no, kind in message.cancels:
                self._cancel(client, no, cancel_no, kind)
        elif isinstance(message, Bye):
            if any(task.client is client for task in self._tasks.values()):
                raise RemoteProtocolError("Bye with tasks outstanding")
            self._out.append(Drop(client.peer, "bye"))
            self._peer_lost(client.peer, "bye", stopped=True)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} from a client")

    def _submit(self, client: Client, message: TaskSubmit) -> None:
        functions = client.functions
        for function in message.functions:
            functions[function.function_id] = ReceivedFunction(function, functions.get)
        base, last_no, tasks, append = client.base, client.last_no, self._tasks, client.queue.append
        for no, items, function_id, payload in message.tasks:
            if no <= last_no or items < 1 or (last_no := no + items - 1) >> CLIENT_ID_SHIFT:
                raise RemoteProtocolError(f"task {no} of {items} items after item {last_no}")
            used = functions.get(function_id)
            if used is None:
                raise RemoteProtocolError(f"task {no} names function {function_id}, which is not known")
            client.last_no = last_no
            if client.broken is not None:
                client.results.append((no, 0, items, ResultKind.BROKEN, client.broken.encode()))
                self._touched[client] = None
                continue
            task = tasks[base + no] = Task(base + no, client, no, 0, items, 0, used, payload)
            if items > 1:
                client.runs[no] = {task.task_id: task}
            append(task)
        self._is_ready(client)
        for function_id in message.forget:
            if not function_id or functions.pop(function_id, None) is None:
                raise RemoteProtocolError(f"forget function {function_id}, which is not known")

    def _cancel(self, client: Client, no: int, cancel_no: int, kind: int) -> None:
        if kind not in (CancelKind.SOFT, CancelKind.FORCED) or cancel_no < 1:
            raise RemoteProtocolError(f"cancel {cancel_no} of kind {kind}")
        run = client.runs.get(no)
        task = self._tasks.get(client.base + no)
        # Only a submitted task can be named, not the pieces that a run has become here.
        tasks = list(run.values()) if run is not None else [task] if task is not None and task.no == no else []
        for task in tasks:
            self._step(task, "CANCEL", cancel_no, CancelKind(kind))
        if not tasks:
            client.confirms.append((no, cancel_no, NOT_FOUND, 0, 0, True))
            self._touched[client] = None

    # From agents

    def _agent_results(self, agent: Agent, message: AgentResult) -> None:
        tasks, table = self._tasks, _TABLE
        for task_id, attempt, first, count, kind, payload in message.results:
            task = tasks.get(task_id)
            if task is None or task.agent is not agent or task.attempt != attempt:
                self.stale += 1
            else:
                table[task.state]["RESULT"](self, task, first, count, kind, payload)

    def _from_agent(self, agent: Agent, message: Any) -> None:
        if isinstance(message, AgentConfirm):
            for task_id, attempt, cancel_no, kind, at in message.confirms:
                if (task := self._of_agent(agent, task_id, attempt)) is not None:
                    self._confirm(task, cancel_no, kind, at)
        elif isinstance(message, TaskSplit):
            for task_id, attempt, at in message.splits:
                if (task := self._of_agent(agent, task_id, attempt)) is not None:
                    self._step(task, "SPLIT", at)
        elif isinstance(message, TaskDied):
            for task_id, attempt, report in message.deaths:
                if (task := self._of_agent(agent, task_id, attempt)) is not None:
                    self._step(task, "DIED", report)
        elif isinstance(message, TaskReturned):
            # Oldest last, so that they stand in the queue as they did before.
            for task_id, attempt in reversed(message.tasks):
                if (task := self._of_agent(agent, task_id, attempt)) is not None:
                    self._step(task, "RETURNED")
        elif isinstance(message, TaskRunning):
            for task_id in message.tasks:
                if (task := self._tasks.get(task_id)) is not None and task.agent is agent and not task.client.gone:
                    task.client.running.append(task.no)
                    self._touched[task.client] = None
        elif isinstance(message, AgentCapacity):
            agent.capacity, agent.workers = message.tasks, message.workers
        elif isinstance(message, InheritanceLost):
            self._out += [Send(peer.peer, message) for peer in self._peers.values() if isinstance(peer, Client)]
        elif isinstance(message, WorkersBroken):
            agent.broken_for.add(message.client_id)
            for client in list(self._peers.values()):
                if isinstance(client, Client) and client.client_id == message.client_id:
                    self._break(client, message.reason)
        elif isinstance(message, Bye):
            # It says so when it holds nothing: what it still seems to have crossed its Bye and never reached it.
            for task in reversed([task for task in self._tasks.values() if task.agent is agent]):
                self._step(task, "RETURNED")
            self._out.append(Drop(agent.peer, "bye"))
            self._peer_lost(agent.peer, "left", stopped=True)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} from an agent")

    def _of_agent(self, agent: Agent, task_id: int, attempt: int) -> Task | None:
        task = self._tasks.get(task_id)
        if task is None or task.agent is not agent or task.attempt != attempt:
            self.stale += 1
            return None
        return task

    def _confirm(self, task: Task, cancel_no: int, kind: int, at: int) -> None:
        if kind == CANCELED:
            if not (task.start <= at < task.items):
                raise RemoteProtocolError(f"Canceled from item {at} on, of {task.start} to {task.items}")
            # Also if it answers an older request: an agent that says Canceled does not have the items any more.
            self._step(task, "CANCELED", at, cancel_no == task.agent_cancel_no)
        elif cancel_no != task.agent_cancel_no:
            self.stale += 1  # a newer request is out, this one's failure says nothing about it
        elif kind == FAILED:
            self._step(task, "FAILED")
        elif kind == NOT_FOUND:
            self._step(task, "NOT_FOUND")
        else:
            raise RemoteProtocolError(f"confirm of type {kind}")

    # Cells of the table. Each takes the task and what the event carries.

    def _step(self, task: Task, event: str, *details: Any) -> None:
        before = task.state
        _TABLE[before][event](self, task, *details)
        self._story.add(self._now, task.task_id, event, before, task.state, repr(details) if details else "")

    def _drop_queued(self, task: Task, cancel_no: int, kind: CancelKind) -> None:
        self._answer(task, cancel_no, CANCELED)
        self._forget(task)

    def _pass_on(self, task: Task, cancel_no: int, kind: CancelKind) -> None:
        task.state = CANCELING
        task.user_cancel_no, task.kind = cancel_no, kind
        self._ask_agent(task, kind)

    def _over_recall(self, task: Task, cancel_no: int, kind: CancelKind) -> None:
        if kind is CancelKind.FORCED:
            self._pass_on(task, cancel_no, kind)
        else:
            # The agent is asked already, and a recall goes as far as a soft cancel: its answer is the user's.
            task.state = CANCELING
            task.user_cancel_no, task.kind = cancel_no, kind

    def _again(self, task: Task, cancel_no: int, kind: CancelKind) -> None:
        task.user_cancel_no = cancel_no
        if kind > task.kind:
            self._pass_on(task, cancel_no, kind)

    def _note_cancel(self, task: Task, cancel_no: int, kind: CancelKind) -> None:
        task.user_cancel_no, task.kind = cancel_no, kind

    def _forward(self, task: Task, first: int, count: int, kind: int, payload: Any) -> None:
        # Also in CANCELING: the call ended while the request was on its way, and its result is the answer. Dropping
        # it would leave the user waiting for a confirm that no agent will send.
        if first != task.start or count < 1 or first + count > task.items:
            raise RemoteProtocolError(f"items {first}+{count} of {task.start} to {task.items}")
        client = task.client
        if not client.gone:
            client.results.append((task.no, task.offset + first, count, kind, payload))
            self._touched[client] = None
        task.start = first + count
        if task.start == task.items:
            self._forget(task)

    def _came_back(self, task: Task, at: int, is_newest: bool) -> None:
        task.state, task.agent_cancel_no = ASSIGNED, 0
        self._requeue(self._split_off(task, at) if at > task.start else task)

    def _cancelled(self, task: Task, at: int, is_newest: bool) -> None:
        head, user_cancel_no = task, task.user_cancel_no
        if at > task.start:
            task = self._split_off(task, at)
            # Only the tail had not started. The rest runs on, and the request has done what it could; but if a soft
            # request has been overtaken by a forced one, that one is still on its way to the rest.
            if is_newest and not head.client.gone:
                head.state, head.agent_cancel_no, head.user_cancel_no = ASSIGNED, 0, 0
        self._answer(task, user_cancel_no, CANCELED)
        self._forget(task)

    def _cancelled_unasked(self, task: Task, at: int, is_newest: bool) -> None:
        raise RemoteProtocolError(f"Canceled without a request, task {task.task_id}")

    def _runs_on(self, task: Task) -> None:
        task.state, task.agent_cancel_no, task.recall_refused = ASSIGNED, 0, True

    def _refused(self, task: Task) -> None:
        if task.client.gone:
            return  # nobody to tell; it is over when its result comes or its worker goes
        self._answer(task, task.user_cancel_no, FAILED)
        task.state, task.agent_cancel_no, task.user_cancel_no = ASSIGNED, 0, 0

    def _not_there(self, task: Task) -> None:
        self._answer(task, task.user_cancel_no, NOT_FOUND)
        self._forget(task)

    def _retry_or_fail(self, task: Task, report: DeathReport) -> None:
        task.deaths += 1
        if task.deaths <= task.function.function.options.retries:
            task.state, task.agent_cancel_no = ASSIGNED, 0
            self._requeue(task, new_attempt=True)
            return
        report.attempt = task.attempt
        payload = msgspec.msgpack.encode(report)
        self._forward(task, task.start, task.open_items, ResultKind.DIED, payload)

    def _died_cancelled(self, task: Task, report: DeathReport) -> None:
        # Whatever it was that killed the worker, the code has stopped; never start again what its user wanted to stop.
        self._answer(task, task.user_cancel_no, CANCELED)
        self._forget(task)

    def _returned(self, task: Task) -> None:
        task.state, task.agent_cancel_no = ASSIGNED, 0
        self._requeue(task)

    def _returned_cancelled(self, task: Task) -> None:
        self._answer(task, task.user_cancel_no, CANCELED)
        self._forget(task)

    def _split(self, task: Task, at: int) -> None:
        if not (task.start <= at < task.items) or not at:
            raise RemoteProtocolError(f"split at item {at} of {task.start} to {task.items}")
        tail = self._split_off(task, at)
        tail.state, tail.agent = ASSIGNED, task.agent
        assert task.agent is not None
        task.agent.held += 1
        if task.start == at:
            self._forget(task)

    def _split_cancelled(self, task: Task, at: int) -> None:
        # The split and the cancel crossed: the agent took the cancel for the head alone.
        self._split(task, at)
        self._pass_on(self._tasks[task.task_id + at], task.user_cancel_no, task.kind)

    def _lost_with_agent(self, task: Task, fenced: list[Task], stopped: bool) -> None:
        if stopped:
            self._retry_or_fail(task, DeathReport(reason="its agent's process has ended"))
            return
        self._fence(task, fenced)

    def _cancelled_with_agent(self, task: Task, fenced: list[Task], stopped: bool) -> None:
        if stopped:
            self._answer(task, task.user_cancel_no, CANCELED)
            self._forget(task)
            return
        self._fence(task, fenced)

    def _fence(self, task: Task, fenced: list[Task]) -> None:
        assert task.agent is not None
        task.agent.held -= 1
        task.state, task.agent, task.agent_cancel_no = FENCING, None, 0
        fenced.append(task)

    def _fence_due(self, task: Task) -> None:
        if task.user_cancel_no or task.client.gone:
            self._answer(task, task.user_cancel_no, CANCELED, proven=False)
            self._forget(task)
        else:
            self._retry_or_fail(task, DeathReport(reason="the machine that ran it is out of reach"))

    def _stop_unheard(self, task: Task) -> None:
        task.state, task.user_cancel_no, task.kind = CANCELING, 0, CancelKind.FORCED
        self._ask_agent(task, CancelKind.FORCED)

    def _stop_unheard_again(self, task: Task) -> None:
        raised = task.kind is not CancelKind.FORCED
        task.user_cancel_no = 0
        if raised:
            self._stop_unheard(task)

    def _no_addressee(self, task: Task) -> None:
        task.user_cancel_no = 0

    # What cells do

    def _answer(self, task: Task, cancel_no: int, kind: TaskCancelConfirmType, proven: bool = True) -> None:
        client = task.client
        if not client.gone:
            client.confirms.append((task.no, cancel_no, kind, task.offset + task.start, task.open_items, proven))
            self._touched[client] = None

    def _ask_agent(self, task: Task, kind: CancelKind) -> None:
        agent = task.agent
        assert agent is not None
        self._last_cancel_no += 1
        task.agent_cancel_no = self._last_cancel_no
        agent.cancels.append((task.task_id, task.agent_cancel_no, int(kind)))
        self._touched[agent] = None

    def _forget(self, task: Task) -> None:
        del self._tasks[task.task_id]
        agent, client = task.agent, task.client
        if agent is not None:
            agent.held -= 1
            task.agent = None
        task.state = GONE
        task.payload = b""
        if client.runs:
            pieces = client.runs.get(task.no)
            if pieces is not None:
                del pieces[task.task_id]
                if not pieces:
                    del client.runs[task.no]
        if client.gone:
            client.tasks_left -= 1
            if not client.tasks_left:
                self._leaving.discard(client)

    def _split_off(self, task: Task, at: int) -> Task:
        """Make the items of `task` from `at` on a task of their own, held by nobody, of the same attempt."""
        tail = Task(
            task.task_id + at,
            task.client,
            task.no,
            task.offset + at,
            task.items - at,
            task.skip + at,
            task.function,
            task.payload,
        )
        tail.attempt, tail.deaths = task.attempt, task.deaths
        task.items = at
        self._tasks[tail.task_id] = tail
        task.client.runs[task.no][tail.task_id] = tail
        if task.client.gone:
            task.client.tasks_left += 1
        return tail

    def _requeue(self, task: Task, new_attempt: bool = False) -> None:
        """Put the outstanding items of `task`, which no agent has any more, at the front of the queue."""
        client = task.client
        if task.start:
            # Its agent numbers the items of a task from its first one, so what is run again needs its own number.
            rest = self._split_off(task, task.start)
            self._forget(task)
            task = rest
        if task.agent is not None:
            task.agent.held -= 1
            task.agent = None
        if new_attempt:
            task.attempt += 1
        task.state, task.recall_refused = QUEUED, False
        if client.broken is not None:
            self._fail_broken(task, client.broken)
            return
        client.queue.appendleft(task)
        self._is_ready(client)

    def _is_ready(self, client: Client) -> None:
        if client.queue and client not in self._ready:
            self._ready.append(client)

    def _break(self, client: Client, reason: str) -> None:
        if client.broken is None and all(client.client_id in agent.broken_for for agent in self._agents):
            client.broken = reason
            self._out.append(Send(client.peer, WorkersBroken(client.client_id, reason)))
            for task in [task for task in client.queue if task.state == QUEUED]:
                self._fail_broken(task, reason)
            client.queue.clear()

    def _check_broken(self) -> None:
        """Break the clients for which the agent that was just lost was the last that could start a worker."""
        if self._agents:
            for client in list(self._peers.values()):
                if isinstance(client, Client):
                    self._break(client, "no agent is left that can start a worker")

    def _fail_broken(self, task: Task, reason: str) -> None:
        self._forward(task, task.start, task.open_items, ResultKind.BROKEN, reason.encode())

    # Assignment

    def _pump(self) -> None:
        """Give queued tasks to agents with room, the clients taking turns."""
        ready = self._ready
        for _ in range(len(ready)):
            if ready and not self._has_queued(ready[0]):
                ready.popleft()
            else:
                ready.rotate(-1)
        stuck = 0
        while ready and stuck < len(ready):
            client = ready[0]
            agent = self._roomiest(client)
            if agent is None:
                stuck += 1
                ready.rotate(-1)
                continue
            stuck = 0
            room = agent.capacity - agent.held
            turn = room if len(ready) == 1 else min(room, TURN_TASKS)
            if len(self._agents) > 1:
                turn = min(turn, max(1, agent.workers))
            self._assign(client, agent, turn)
            if self._has_queued(client):
                ready.rotate(-1)
            else:
                ready.popleft()
        if len(self._agents) > 1:
            self._recall_for_idle()

    def _has_queued(self, client: Client) -> bool:
        queue = client.queue
        while queue and queue[0].state != QUEUED:
            queue.popleft()
        return bool(queue)

    def _roomiest(self, client: Client) -> Agent | None:
        """Return the agent with the fewest tasks per worker that has room and can run this client's calls."""
        best: Agent | None = None
        best_load = 0.0
        for agent in self._agents:
            if agent.held >= agent.capacity or client.client_id in agent.broken_for:
                continue
            load = agent.held / max(1, agent.workers)
            if best is None or load < best_load:
                best, best_load = agent, load
        return best

    def _assign(self, client: Client, agent: Agent, turn: int) -> None:
        queue, runs, known, client_id = client.queue, agent.runs, agent.known, client.client_id
        function: ReceivedFunction | None = None
        assigned = 0
        while assigned < turn and queue:
            task = queue.popleft()
            if task.state != QUEUED:
                continue
            task.state = ASSIGNED
            task.agent = agent
            assigned += 1
            if task.function is not function:
                function = task.function
                for part in function.parts:
                    if known.need((client_id, part.function_id)):
                        agent.functions.append((client_id, part))
            runs.append(
                (task.task_id, task.attempt, client_id, task.items, task.skip, function.function_id, task.payload)
            )
        agent.held += assigned
        self._touched[agent] = None

    def _recall_for_idle(self) -> None:
        """Recall calls that wait at one agent while another has had idle workers for some time."""
        idle = 0
        for agent in self._agents:
            if self._ready or agent.held >= min(agent.workers, agent.capacity):
                agent.idle_since = None
            elif agent.idle_since is None:
                agent.idle_since = self._now
            elif agent.idle_since + IDLE_BEFORE_RECALL_S <= self._now:
                idle += min(agent.workers, agent.capacity) - agent.held
                agent.idle_since = self._now
        if not idle:
            return
        crowded = [agent for agent in self._agents if agent.held > agent.workers]
        if not crowded:
            return
        waiting: dict[Agent | None, int] = {agent: agent.held - agent.workers for agent in crowded}
        for task in reversed(list(self._tasks.values())):
            if not idle:
                return
            holder = task.agent
            if task.state == ASSIGNED and holder in waiting and not task.recall_refused and waiting[holder] > 0:
                waiting[holder] -= 1
                idle -= 1
                self._story.add(self._now, task.task_id, "recall", ASSIGNED, RECALLING)
                task.state = RECALLING
                self._ask_agent(task, CancelKind.RECALL)

    # Out

    def _flush(self) -> None:
        """Turn what the step collected for each peer into messages."""
        out = self._out
        for peer in self._touched:
            if isinstance(peer, Client):
                # Results first: a result and a later confirm of the same run must not overtake each other.
                if peer.results:
                    out.append(Send(peer.peer, TaskResult(peer.results)))
                    peer.results = []
                if peer.confirms:
                    out.append(Send(peer.peer, TaskCancelConfirm(peer.confirms)))
                    peer.confirms = []
                if peer.running:
                    out.append(Send(peer.peer, TaskRunning(peer.running)))
                    peer.running = []
            else:
                self._flush_agent(peer)
        self._touched.clear()

    def _flush_agent(self, agent: Agent) -> None:
        # Cancels before runs: a task that is cancelled in this step was assigned in an earlier one.
        if agent.cancels:
            self._out.append(Send(agent.peer, TaskCancel(agent.cancels)))
            agent.cancels = []
        if agent.runs:
            forget = agent.known.trim()
            self._out.append(Send(agent.peer, TaskRun(agent.runs, agent.functions, forget)))
            agent.runs, agent.functions = [], []
        for client_id in agent.gone_clients:
            self._out.append(Send(agent.peer, ClientGone(client_id)))
        agent.gone_clients = []


_Cell: TypeAlias = Callable[..., None]

STATES: Final = (QUEUED, ASSIGNED, RECALLING, CANCELING, FENCING)
EVENTS: Final = (
    "CANCEL",  # by the client: cancel_no, kind
    "RESULT",  # by the agent: first, count, kind, payload
    "CANCELED",  # by the agent: at; whether that answers the newest request
    "FAILED",  # by the agent, of the newest request
    "NOT_FOUND",  # by the agent, of the newest request
    "DIED",  # by the agent: report. The worker died in the first outstanding item.
    "RETURNED",  # by the agent: handed back before it started
    "SPLIT",  # by the agent: at
    "AGENT_LOST",  # fenced, stopped
    "CLIENT_LOST",
    "FENCE_DUE",
)

_S = SchedulerState
_TABLE: dict[str, dict[str, _Cell]] = {
    QUEUED: {
        "CANCEL": _S._drop_queued,
        # No agent has a queued task, and what an agent says of one that it does not have is stale before it gets here.
        "RESULT": forbidden,
        "CANCELED": forbidden,
        "FAILED": forbidden,
        "NOT_FOUND": forbidden,
        "DIED": forbidden,
        "RETURNED": forbidden,
        "SPLIT": forbidden,
        "AGENT_LOST": forbidden,
        "CLIENT_LOST": _S._forget,
        "FENCE_DUE": forbidden,
    },
    ASSIGNED: {
        "CANCEL": _S._pass_on,
        "RESULT": _S._forward,
        "CANCELED": _S._cancelled_unasked,
        # The number of a request is looked at before the state, and in ASSIGNED there is none.
        "FAILED": peer_error,
        "NOT_FOUND": peer_error,
        "DIED": _S._retry_or_fail,
        "RETURNED": _S._returned,
        "SPLIT": _S._split,
        "AGENT_LOST": _S._lost_with_agent,
        "CLIENT_LOST": _S._stop_unheard,
        "FENCE_DUE": forbidden,
    },
    RECALLING: {
        # A user's cancel over a recall: the recall's answer must not send the task round again.
        "CANCEL": _S._over_recall,
        "RESULT": _S._forward,
        "CANCELED": _S._came_back,
        "FAILED": _S._runs_on,
        "NOT_FOUND": peer_error,
        "DIED": _S._retry_or_fail,
        "RETURNED": _S._returned,
        # The recall was for the whole run and the agent takes it for the head alone: the tail stays where it is.
        "SPLIT": _S._split,
        "AGENT_LOST": _S._lost_with_agent,
        "CLIENT_LOST": _S._stop_unheard,
        "FENCE_DUE": forbidden,
    },
    CANCELING: {
        "CANCEL": _S._again,
        "RESULT": _S._forward,
        "CANCELED": _S._cancelled,
        "FAILED": _S._refused,
        "NOT_FOUND": _S._not_there,
        "DIED": _S._died_cancelled,
        "RETURNED": _S._returned_cancelled,
        "SPLIT": _S._split_cancelled,
        "AGENT_LOST": _S._cancelled_with_agent,
        "CLIENT_LOST": _S._stop_unheard_again,
        "FENCE_DUE": forbidden,
    },
    FENCING: {
        "CANCEL": _S._note_cancel,
        # Its agent is gone, and nobody else has it.
        "RESULT": forbidden,
        "CANCELED": forbidden,
        "FAILED": forbidden,
        "NOT_FOUND": forbidden,
        "DIED": forbidden,
        "RETURNED": forbidden,
        "SPLIT": forbidden,
        "AGENT_LOST": forbidden,
        "CLIENT_LOST": _S._no_addressee,
        "FENCE_DUE": _S._fence_due,
    },
}
TABLE: Final = _TABLE
