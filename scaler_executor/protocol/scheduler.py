"""The scheduler: routes tasks from clients to agents, alone makes attempts, knows `retries` and answers cancels.

It knows its peers and what each may say, and has every message end as a step of a task. It does not know workers (an
agent does), never looks into a payload, and does no I/O. What a step makes of a task is the table in
`scheduler_tasks`; which agent a task is given to is for `scheduler_assignment`; `scheduler_rows` are what is known of
each task and peer, and `scheduler_output` makes messages of what is to be said.
"""

from __future__ import annotations

import bisect
from typing import Any, Final

from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.functions import MAX_NAME
from scaler_executor.protocol.machine import Transition, unreachable
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    PROTOCOL_VERSION,
    AgentCapacity,
    AgentConfirm,
    AgentMessage,
    AgentResult,
    Blocked,
    Bye,
    CancelKind,
    ClientLimited,
    ClientMessage,
    Hello,
    InheritanceLost,
    InheritanceReplaced,
    Nested,
    Output,
    RefusalKind,
    Refused,
    ResultKind,
    TaskCancel,
    TaskDied,
    TaskReturned,
    TaskRunning,
    TasksAgain,
    TaskSplit,
    TaskSubmit,
    Unblocked,
    Welcome,
    WorkersBroken,
)
from scaler_executor.protocol.scheduler_assignment import Assignment
from scaler_executor.protocol.scheduler_events import (
    Congested,
    Drain,
    Drop,
    Event,
    Hold,
    Instruction,
    PeerLost,
    Received,
    Send,
    Tick,
)
from scaler_executor.protocol.scheduler_intake import Intake
from scaler_executor.protocol.scheduler_limits import Limits
from scaler_executor.protocol.scheduler_nesting import Nesting
from scaler_executor.protocol.scheduler_output import SchedulerOutput
from scaler_executor.protocol.scheduler_prints import forward
from scaler_executor.protocol.scheduler_rows import FENCING, QUEUED, Agent, Client, Observer, Task
from scaler_executor.protocol.scheduler_status import InquiryDesk
from scaler_executor.protocol.scheduler_tasks import (
    CANCELED,
    EVENTS,
    FAILED,
    NOT_FOUND,
    STATES,
    TABLE,
    SchedulerTasks,
)

#: An agent that is cut off stops its calls before this time is over (see `agent.FENCE_S`), so that nothing runs twice.
FENCE_S: Final = 10.0

ERROR: Final = int(ResultKind.ERROR)
TIMED_OUT: Final = int(ResultKind.TIMED_OUT)
#: The highest number of an item, and of a client: see `CLIENT_ID_SHIFT`.
MAX_NO: Final = (1 << CLIENT_ID_SHIFT) - 1
MAX_CLIENT_ID: Final = (1 << 63 - CLIENT_ID_SHIFT) - 1
#: A peer counts workers, tasks and the like up to here.
MAX_COUNT: Final = 1 << 31


class SchedulerState:
    """All accepted tasks and all peers.

    Args:
        python: "3.11", say: peers that run another one are refused, for they could not read each other's pickles; "":
            it does not matter.
        max_client_bytes: A client whose unfinished tasks take more than this is read no further; None: no limit.
    """

    def __init__(self, python: str = "", max_client_bytes: int | None = None) -> None:
        self._python = python
        self._output = SchedulerOutput()
        self._assignment = Assignment(self._output)
        self._limits = Limits(self._assignment, self._output)
        self._tasks = SchedulerTasks(self._assignment, self._output)
        self._intake = Intake(self._tasks, self._assignment, self._output, max_client_bytes)
        self._nesting = Nesting(self._tasks, self._assignment, self._intake, self._output)
        #: {peer: Client, Agent or Observer}, from Hello until the peer is lost or says Bye.
        self._peers: dict[int, Client | Agent | Observer] = {}
        self._desk = InquiryDesk(self._peers, self._tasks, self._output, python)
        #: When the tasks in FENCING of an agent, or of those of another scheduler, are decided, earliest first.
        self._fences: list[tuple[float, list[Task], Agent | None]] = []
        self._last_client_id = 0
        #: Why nothing is started any more, or None.
        self._closing: str | None = None
        #: Answers that matched no task, attempt or request: normal after lost races.
        self.stale = 0

    # The four methods that every state class has

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in and return what is to be done, in order."""
        self._output.begin(now)
        if isinstance(event, Received):
            try:
                self._received(event.peer, event.message)
            except RemoteProtocolError as error:
                # What it said before the offending row stands; nobody else notices anything.
                self._output.instructions.append(Drop(event.peer, str(error), error=True))
                self._peer_lost(event.peer, f"broke the protocol: {error}", stopped=False)
        elif isinstance(event, PeerLost):
            self._peer_lost(event.peer, event.reason, event.stopped, event.unheard_s)
        elif isinstance(event, Drain):
            self._drain(event.reason)
        elif isinstance(event, Congested):
            client = self._peers.get(event.peer)
            if isinstance(client, Client):
                client.is_congested = event.is_congested
                self._assignment.refresh(client)
        elif isinstance(event, Tick):
            pass
        else:
            unreachable(event)
        while self._fences and self._fences[0][0] <= now:
            _, tasks, agent = self._fences.pop(0)
            for task in tasks:
                self._tasks.step(task, "FENCE_DUE")
            if agent is not None:
                self._limits.agent_stopped(agent)
        if self._limits.is_due or self._limits.due:
            self._limits.divide()
        if self._closing is not None:
            self._give_back(self._closing)
        if self._intake.held:
            self._intake.release()
        if self._nesting.leaving:
            self._let_leave()
        self._assignment.pump()
        if len(self._assignment.agents) > 1:
            for task in self._assignment.to_recall():
                self._tasks.recall(task)
        return self._output.end()

    def next_deadline(self) -> float | None:
        """Return when the next Tick is due, or None."""
        recall = self._assignment.deadline()
        if not self._fences:
            return recall
        fence = self._fences[0][0]
        return fence if recall is None else min(fence, recall)

    def story(self, task_id: int) -> list[Transition]:
        """Return what is remembered of a task: everything but the ordinary steps."""
        return self._tasks.story.of(task_id)

    def check(self) -> None:
        """Assert the invariants."""
        clients = [peer for peer in self._peers.values() if isinstance(peer, Client)]
        self._tasks.check(
            {id(task) for client in clients for task in client.queue},
            {id(task) for _, tasks, _ in self._fences for task in tasks},
        )
        self._assignment.check()
        self._limits.check()
        for client in clients:
            assert client in self._assignment.ready or not any(task.state == QUEUED for task in client.queue)
            assert all(client.runs.values())
        assert not self._output.touched

    @property
    def outstanding(self) -> int:
        """Number of tasks that are not over."""
        return len(self._tasks.by_id)

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
        elif isinstance(peer, Observer):
            if isinstance(message, Bye):
                self._output.instructions.append(Drop(peer_id, "bye"))
                self._peer_lost(peer_id, "bye", stopped=True)
            else:
                self._desk.answer(peer, message)
        elif isinstance(message, Hello):
            self._hello(peer_id, message)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} before Hello")

    def _hello(self, peer_id: int, message: Hello) -> None:
        if message.version != PROTOCOL_VERSION:
            reason = f"it speaks version {message.version} of the protocol, the scheduler {PROTOCOL_VERSION}"
            self._refuse(peer_id, reason, RefusalKind.VERSION)
        elif self._python and message.python != self._python and message.role != "observer":
            theirs = message.python if message.python.isprintable() else ""
            reason = f"it runs Python {theirs[:20] or 'unknown'}, the scheduler {self._python}"
            self._refuse(peer_id, reason, RefusalKind.VERSION)
        elif message.role == "client":
            limits = message.max_running, message.max_items_per_worker
            if not all(limit is None or 0 < limit <= MAX_COUNT for limit in limits):
                raise RemoteProtocolError(f"max_running {limits[0]}, max_items_per_worker {limits[1]}")
            if self._last_client_id == MAX_CLIENT_ID:
                raise RemoteProtocolError("one client too many: this scheduler has no more numbers")
            self._end_earlier_session(message.secret)
            self._last_client_id += 1
            workers = sum(agent.workers for agent in self._assignment.agents)
            client = Client(peer_id, self._last_client_id, *limits, message.name[:MAX_NAME], self._output.now)
            client.secret = message.secret
            self._peers[peer_id] = client
            self._output.instructions.append(Send(peer_id, Welcome(self._last_client_id, workers=workers)))
            if limits != (None, None):
                self._limits.add(client)
        elif message.role == "agent":
            self._peers[peer_id] = agent = Agent(peer_id, message.name[:MAX_NAME], self._output.now)
            self._assignment.add(agent)
            self._limits.is_due = True
            self._output.instructions.append(Send(peer_id, Welcome(0)))
        elif message.role == "observer":
            self._peers[peer_id] = Observer(peer_id)
            self._output.instructions.append(Send(peer_id, Welcome(0)))
        else:
            raise RemoteProtocolError(f"role {message.role[:20]!r}")

    def _end_earlier_session(self, secret: bytes) -> None:
        """Stop the calls of a client that has begun anew: its lease here may outlast the fence time of those again."""
        for old in [peer for peer in self._peers.values() if isinstance(peer, Client) and peer.secret == secret != b""]:
            self._output.instructions.append(Drop(old.peer, "the client has begun another session"))
            self._peer_lost(old.peer, "another session", stopped=True)

    def _refuse(self, peer_id: int, reason: str, kind: RefusalKind) -> None:
        self._output.instructions += [Send(peer_id, Refused(reason, kind)), Drop(peer_id, reason, error=True)]

    def _peer_lost(self, peer_id: int, reason: str, stopped: bool, unheard_s: float = 0.0) -> None:
        if not stopped and self._peers.get(peer_id) in self._nesting.leaving:
            return  # a relay ends when it has said Bye
        peer = self._peers.pop(peer_id, None)
        if isinstance(peer, Client):
            self._client_lost(peer)
        elif isinstance(peer, Agent):
            self._assignment.remove(peer)
            self._nesting.agent_lost(peer)
            self._output.touched.pop(peer, None)
            self._limits.is_due = True
            if not stopped:
                self._limits.agent_lost(peer)
            fenced: list[Task] = []
            for task in reversed(peer.tasks()):
                self._tasks.step(task, "AGENT_LOST", fenced, stopped)
            self._output.touched.pop(peer, None)  # some may have been cancelled with others
            # It may have been silent for long already; then it has stopped by now.
            self._fence(FENCE_S - unheard_s, fenced, peer)
            self._check_broken()

    def _fence(self, after_s: float, tasks: list[Task], agent: Agent | None) -> None:
        if tasks:
            fence = self._output.now + max(0.0, after_s), tasks, agent
            bisect.insort(self._fences, fence, key=lambda fence: fence[0])

    def _drain(self, reason: str) -> None:
        self._closing = reason
        self._output.instructions += [Send(agent.peer, Bye()) for agent in self._assignment.agents]

    def _give_back(self, reason: str) -> None:
        """Give what is queued back to the clients."""
        for client in list(self._assignment.ready):
            for task in list(client.queue):
                if task.state == QUEUED:
                    self._tasks.fail(task, ResultKind.LOST, reason)

    def _client_lost(self, client: Client) -> None:
        self._tasks.drop_queue(client)
        client.gone = True
        self._nesting.client_lost(client)
        self._tasks.leaving[client] = None
        tasks = self._tasks_of(client)
        client.tasks_left = len(tasks)
        for task in tasks:
            self._tasks.step(task, "CLIENT_LOST")
        self._assignment.refresh(client)
        self._limits.forget_client(client)
        self._output.touched.pop(client, None)
        keys = [(client.client_id, function_id) for function_id in client.functions]
        for agent in self._assignment.agents:
            agent.known.drop(keys)  # it drops its own with ClientGone
            agent.broken_for.discard(client.client_id)
            agent.disinherited.discard(client.client_id)
            agent.gone_clients.append(client.client_id)
            self._output.touched[agent] = None
        if not client.tasks_left:
            self._tasks.leaving.pop(client, None)
            self._assignment.forget_client(client)

    def _tasks_of(self, client: Client) -> list[Task]:
        """Return all tasks of a client that are not over."""
        tasks = [task for task in client.queue if task.state == QUEUED]
        for agent in self._assignment.agents:
            if client in agent.seats:
                tasks += agent.seats[client].tasks.values()
        for _, fenced, _ in self._fences:
            tasks += [task for task in fenced if task.client.account is client and task.state == FENCING]
        return tasks

    def _let_leave(self) -> None:
        """Let the clients go that have said Bye and have nothing left here."""
        for client in [client for client in self._nesting.leaving if not client.tasks_left]:
            self._output.instructions.append(Drop(client.peer, "bye"))
            self._peer_lost(client.peer, "bye", stopped=True)

    # From clients

    def _from_client(self, client: Client, message: Any) -> None:
        if isinstance(message, TaskSubmit):
            self._fence(FENCE_S, self._intake.submit(client, message, self._closing), None)
        elif isinstance(message, TaskCancel):
            for no, cancel_no, kind in message.cancels:
                self._cancel(client, no, cancel_no, kind)
        elif isinstance(message, TasksAgain):
            self._tasks.note_again(client, message.tasks)
        elif isinstance(message, InheritanceReplaced):
            message.client_id = client.client_id
            for agent in self._assignment.agents:
                # One answer is for all that have asked by now: later calls take nothing for inherited.
                if client.client_id in agent.disinherited:
                    agent.disinherited.remove(client.client_id)
                    self._output.instructions.append(Send(agent.peer, message))
        elif isinstance(message, Bye):
            left = [] if message.force else self._tasks_of(client)
            if any(task.client is client for task in left):
                raise RemoteProtocolError("Bye with tasks outstanding")
            if left:
                self._nesting.leave(client)  # what its calls have left behind is still to be done
                return
            self._output.instructions.append(Drop(client.peer, "bye"))
            self._peer_lost(client.peer, "bye", stopped=True)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} from a client")

    def _cancel(self, client: Client, no: int, cancel_no: int, kind: int) -> None:
        if kind not in (CancelKind.SOFT, CancelKind.FORCED) or not 0 < cancel_no <= MAX_NO or not 0 < no <= MAX_NO:
            raise RemoteProtocolError(f"cancel {cancel_no} of kind {kind}, task {no}")
        run = client.runs.get(no)
        task = self._tasks.by_id.get(client.base + no)
        # Only a submitted task can be named, not the pieces that a run has become here.
        tasks = list(run.values()) if run is not None else [task] if task is not None and task.no == no else []
        for task in tasks:
            self._tasks.step(task, "CANCEL", cancel_no, CancelKind(kind))
        if not tasks:
            client.confirms.append((no, cancel_no, NOT_FOUND, 0, 0, True))
            self._output.touched[client] = None

    # From agents

    def _agent_results(self, agent: Agent, message: AgentResult) -> None:
        tasks, by_id, table = self._tasks, self._tasks.by_id, TABLE
        items = 0
        for task_id, attempt, first, count, kind, payload in message.results:
            task = by_id.get(task_id)
            if task is None or (seat := task.seat) is None or seat.agent is not agent or task.attempt != attempt:
                self.stale += 1
            elif kind and kind != ERROR and kind != TIMED_OUT:  # VALUE is 0
                raise RemoteProtocolError(f"result of kind {kind}, task {task_id}")
            else:
                items += count
                table[task.state]["RESULT"](tasks, task, first, count, kind, payload)
        self._desk.tally.add(items, self._output.now)

    def _from_agent(self, agent: Agent, message: Any) -> None:
        if isinstance(message, AgentConfirm):
            for task_id, attempt, cancel_no, kind, at in message.confirms:
                if (task := self._of_agent(agent, task_id, attempt)) is not None:
                    self._confirm(task, cancel_no, kind, at)
        elif isinstance(message, TaskSplit):
            for task_id, attempt, at in message.splits:
                if (task := self._of_agent(agent, task_id, attempt)) is not None:
                    self._tasks.step(task, "SPLIT", at)
        elif isinstance(message, TaskDied):
            for task_id, attempt, report in message.deaths:
                if (task := self._of_agent(agent, task_id, attempt)) is not None:
                    self._tasks.step(task, "DIED", report)
        elif isinstance(message, TaskReturned):
            # Oldest last, so that they stand in the queue as they did before.
            for task_id, attempt in reversed(message.tasks):
                if (task := self._of_agent(agent, task_id, attempt)) is not None:
                    self._tasks.step(task, "RETURNED")
        elif isinstance(message, TaskRunning):
            by_id, touched = self._tasks.by_id, self._output.touched
            for task_id in message.tasks:
                if (task := by_id.get(task_id)) is not None and task.agent is agent and not task.client.gone:
                    if task.running_since is None:
                        task.running_since = self._output.now
                    task.client.running.append(task.no)
                    touched[task.client] = None
        elif isinstance(message, AgentCapacity):
            if not (0 <= message.tasks <= MAX_COUNT and 0 <= message.workers <= MAX_COUNT):
                raise RemoteProtocolError(f"capacity {message.tasks}, {message.workers} workers")
            if (message.workers, message.tasks == 0) != (agent.workers, agent.capacity == 0):
                self._limits.is_due = True
            agent.capacity, agent.workers = message.tasks, message.workers
            self._assignment.changed(agent)
        elif isinstance(message, Nested):
            self._nested(agent, message)
        elif isinstance(message, Blocked):
            self._nesting.blocked(agent, message)
        elif isinstance(message, Unblocked):
            self._nesting.unblocked(agent, message)
        elif isinstance(message, ClientLimited):
            self._limits.limited(agent, message.client_id, message.limit_no)
        elif isinstance(message, InheritanceLost):
            for client in self._peers.values():
                if isinstance(client, Client) and client.client_id == message.client_id:
                    agent.disinherited.add(message.client_id)
                    self._nesting.ask_for_inheritance(client, agent, message)
        elif isinstance(message, WorkersBroken):
            for client in list(self._peers.values()):
                if isinstance(client, Client) and client.client_id == message.client_id:
                    agent.broken_for.add(message.client_id)
                    self._limits.is_due = True
                    self._break(client, message.reason)
        elif isinstance(message, Output):
            self._output.instructions += forward(agent, message, self._tasks.by_id, self._nesting.sessions.values())
        elif isinstance(message, Bye):
            # It says so when it holds nothing: what it still seems to have crossed its Bye and never reached it.
            for task in reversed(agent.tasks()):
                self._tasks.step(task, "RETURNED")
            self._output.instructions.append(Drop(agent.peer, "bye"))
            self._peer_lost(agent.peer, "left", stopped=True)
        else:
            raise RemoteProtocolError(f"{type(message).__name__} from an agent")

    def _nested(self, agent: Agent, message: Nested) -> None:
        """Take in what the session of one of its workers says."""
        said, session = message.message, self._nesting.find(agent, message)
        try:
            if isinstance(said, Hello) and self._last_client_id < MAX_CLIENT_ID:
                self._last_client_id += 1
                clients = [peer for peer in self._peers.values() if isinstance(peer, Client)]
                account = next((client for client in clients if client.client_id == message.client_id), None)
                self._nesting.open(agent, message, account, self._last_client_id)
            elif session is None:
                self.stale += 1  # it is over
            elif isinstance(said, TaskSubmit):
                self._nesting.submit(session, message, self._closing)
            elif isinstance(said, TaskCancel):
                for no, cancel_no, kind in said.cancels:
                    self._cancel(session, no, cancel_no, kind)
            elif isinstance(said, Bye):
                self._nesting.end(session)
            else:
                raise RemoteProtocolError(f"{type(said).__name__} from a nested session")
        except RemoteProtocolError as error:
            # It is not the agent's doing: user code has got at what is its worker's.
            if session is not None:
                self._nesting.end(session)
            self._output.instructions.append(Send(agent.peer, Nested(message.worker_id, Refused(str(error)))))

    def _of_agent(self, agent: Agent, task_id: int, attempt: int) -> Task | None:
        task = self._tasks.by_id.get(task_id)
        if task is None or task.agent is not agent or task.attempt != attempt:
            self.stale += 1
            return None
        return task

    def _confirm(self, task: Task, cancel_no: int, kind: int, at: int) -> None:
        if kind == CANCELED:
            if not (task.start <= at < task.items):
                raise RemoteProtocolError(f"Canceled from item {at} on, of {task.start} to {task.items}")
            # Also if it answers an older request: an agent that says Canceled does not have the items any more.
            self._tasks.step(task, "CANCELED", at, cancel_no == task.agent_cancel_no)
        elif cancel_no != task.agent_cancel_no:
            self.stale += 1  # a newer request is out, this one's failure says nothing about it
        elif kind == FAILED:
            self._tasks.step(task, "FAILED")
        elif kind == NOT_FOUND:
            self._tasks.step(task, "NOT_FOUND")
        else:
            raise RemoteProtocolError(f"confirm of type {kind}")

    # Clients without workers

    def _break(self, client: Client, reason: str) -> None:
        if client.broken is None and all(client.client_id in agent.broken_for for agent in self._assignment.agents):
            client.broken = reason
            self._output.instructions.append(Send(client.peer, WorkersBroken(client.client_id, reason)))
            for task in [task for task in client.queue if task.state == QUEUED]:
                self._tasks.fail(task, ResultKind.BROKEN, reason)
            client.queue.clear()

    def _check_broken(self) -> None:
        """Break the clients for which the agent that was just lost was the last that could start a worker."""
        if self._assignment.agents:
            for client in list(self._peers.values()):
                if isinstance(client, Client):
                    self._break(client, "no agent is left that can start a worker")


__all__ = [
    "EVENTS",
    "FENCE_S",
    "STATES",
    "TABLE",
    "Congested",
    "Drain",
    "Drop",
    "Event",
    "Hold",
    "Instruction",
    "PeerLost",
    "Received",
    "SchedulerState",
    "Send",
    "Tick",
]
