"""What the scheduler keeps of its tasks, clients and agents: the rows.

They hold what was said and what is still to be said to each peer, and decide nothing: that is for `scheduler_tasks`
(what becomes of a task) and `scheduler_assignment` (which agent it is given to).
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final, Literal

from scaler_executor.protocol.functions import KnownFunctions, ReceivedFunction
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    CancelKind,
    CancelRow,
    ClientConfirmRow,
    ClientLimit,
    ClientResultRow,
    Death,
    Function,
    RunRow,
)
from scaler_executor.protocol.priorities import PriorityQueue

State = Literal["QUEUED", "ASSIGNED", "RECALLING", "CANCELING", "FENCING", "GONE"]
QUEUED: Final = "QUEUED"
ASSIGNED: Final = "ASSIGNED"
RECALLING: Final = "RECALLING"
CANCELING: Final = "CANCELING"
FENCING: Final = "FENCING"
#: Not a state of the table: marks a task that is forgotten but whose entry still stands in its client's queue.
GONE: Final = "GONE"

_NO_FUNCTION: Final = ReceivedFunction(Function(0, "", b"", 0), lambda _: None)


class Task:
    """A task. The attributes with a class-level default are set on the way, if ever."""

    state: State = QUEUED
    #: Its client at the agent that has it; None in QUEUED and FENCING.
    seat: Seat | None = None
    #: Number of the current attempt. What an agent says of another one is stale.
    attempt: int = 1
    #: How often it was tried and lost its worker so far, and what became of those attempts.
    deaths: int = 0
    earlier: tuple[Death, ...] = ()
    #: A lost scheduler had it before; until it is in QUEUED here.
    is_again: bool = False
    #: Items answered, from the front. The others are outstanding.
    start: int = 0
    #: Newest cancel request to the agent; only set in RECALLING and CANCELING.
    agent_cancel_no: int = 0
    #: Newest cancel request of the user, in CANCELING and FENCING; 0: none, or nobody to answer.
    user_cancel_no: int = 0
    kind: CancelKind = CancelKind.RECALL
    #: When it was first seen running, of this attempt.
    running_since: float | None = None
    #: A recall has been refused once: it was running. It is not asked again.
    recall_refused: bool = False
    #: It has submitted others, or has been submitted by one; None: neither.
    family: Family | None = None
    #: It waits for others, and lends its slot; then its agent holds one less. Changed by `Assignment`.
    is_blocked: bool = False

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

    @property
    def agent(self) -> Agent | None:
        seat = self.seat
        return None if seat is None else seat.agent


class Client:
    """A client as the scheduler sees it."""

    def __init__(
        self,
        peer: int,
        client_id: int,
        max_running: int | None = None,
        max_items_per_worker: int | None = None,
        name: str = "",
        now: float = 0.0,
    ) -> None:
        self.peer = peer
        #: The client that its tasks count as: itself, unless it is a `Session`.
        self.account: Client = self
        #: See `Hello`; b"": this is its only session.
        self.secret = b""
        #: So many of its items may be in progress at once; None: no limit.
        self.max_running = max_running
        #: What its workers are replaced after, if not what agents were told.
        self.max_items_per_worker = max_items_per_worker
        #: So many of its items may be in progress at agents out of reach.
        self.out_of_reach = 0
        self.client_id = client_id
        self.name = name
        #: When it came.
        self.since = now
        self.base = client_id << CLIENT_ID_SHIFT
        self.functions: dict[int, ReceivedFunction] = {0: _NO_FUNCTION}
        #: Tasks in QUEUED, next first, among entries that are GONE.
        self.queue: deque[Task] | PriorityQueue[Task] = deque()
        #: {no: {task_id: Task}} of the submitted runs of more than one item: the tasks that a run has become.
        self.runs: dict[int, dict[int, Task]] = {}
        self.last_no = 0
        #: Set when it is lost: its tasks are being stopped and nobody is answered.
        self.gone = False
        #: What its tasks take here, roughly: of a run that was split, up to the end of its head.
        self.held_bytes = 0
        #: Much waits to be sent to it.
        self.is_congested = False
        #: Lines that its calls have printed and that were dropped meanwhile.
        self.lost_lines = 0
        #: Agents that may have any workers for it, if it is limited.
        self.quotas: dict[Agent, None] = {}
        #: It stands in `Assignment.ready`.
        self.is_ready = False
        #: Number of its tasks that are not over, with those of its sessions; of a session: 0.
        self.tasks_left = 0
        #: Why no worker can be started for it, or None.
        self.broken: str | None = None
        self.results: list[ClientResultRow] = []
        self.confirms: list[ClientConfirmRow] = []
        self.running: list[int] = []
        self.retried: list[tuple[int, int]] = []
        #: {no: (spent, done)} of the tasks to come that it has submitted to another scheduler before, see `AgainRow`.
        self.again: dict[int, tuple[int, list[tuple[int, int]]]] = {}


class Session(Client):
    """A nested session: what the calls in one worker submit. Who it is at the agents, its queue, its place among others
    and its limits are those of its account."""

    def __init__(self, agent: Agent, worker_id: int, account: Client, client_id: int, now: float) -> None:
        super().__init__(agent.peer, client_id, now=now)
        self.account = account
        self.agent = agent
        self.worker_id = worker_id
        self.functions = {}  # each call names one


class Farewell:
    """What is said when certain tasks are over."""

    def __init__(self) -> None:
        #: The tasks that are not.
        self.waits: dict[Task, None] = {}
        self.rows: list[tuple[Client, ClientConfirmRow]] = []


class Family:
    """Who has submitted a task, and what it has submitted.

    Args:
        parent: The task that has; None: it is over, or it was no task.
        item: Of the parent.
    """

    def __init__(self, parent: Task | None, item: int) -> None:
        self.parent = parent
        self.item = item
        #: Tasks that are not over.
        self.children: dict[Task, None] = {}
        #: Those that wait for the end of the task.
        self.farewells: list[Farewell] = []


class Observer:
    """Somebody who only looks."""

    def __init__(self, peer: int) -> None:
        self.peer = peer


class Seat:
    """One client at one agent. The attributes with a class-level default are for a client with limits."""

    #: Workers that the agent was told it may have for the client; None: nothing, or that there is no limit.
    quota: int | None = None
    #: Workers that it may still have for the client: `quota`, or what it was before until the agent keeps that.
    in_use: int = 0
    #: Number of the newest limit that it was told; 0: none.
    limit_no: int = 0

    def __init__(self, agent: Agent, client: Client) -> None:
        self.agent = agent
        self.client = client
        #: {task_id: Task} of the client that the agent holds, in the order in which it got them.
        self.tasks: dict[int, Task] = {}
        #: How many of them lend their slots.
        self.blocked = 0


class Agent:
    """An agent as the scheduler sees it."""

    def __init__(self, peer: int, name: str, now: float = 0.0) -> None:
        self.peer = peer
        self.name = name
        #: When it came.
        self.since = now
        #: How many tasks it wants to hold at once.
        self.capacity = 0
        self.workers = 0
        #: {Client: Seat} of the clients that have, or had, tasks here.
        self.seats: dict[Client, Seat] = {}
        #: How many tasks it holds that do not lend their slots, and of how many clients any: as its seats say.
        self.held = 0
        self.clients_here = 0
        self.is_gone = False
        #: Clients of which it holds less than when `Assignment` last looked.
        self.released: dict[Client, None] = {}
        #: Its tasks per worker when `Assignment` last looked; -1: it takes none. Ties go by `order`.
        self.load = -1.0
        self.order = 0
        #: Clients for which it cannot start a worker.
        self.broken_for: set[int] = set()
        #: Clients that it waits for, to tell what replaces what its workers inherited.
        self.disinherited: set[int] = set()
        #: Keys (client_id, function_id) of the functions that it has.
        self.known: KnownFunctions[tuple[int, int]] = KnownFunctions()
        self.runs: list[RunRow] = []
        self.functions: list[tuple[int, Function]] = []
        #: Keys of functions that it is to forget before the next run: they may come again with that.
        self.forgotten: list[tuple[int, int]] = []
        self.cancels: list[CancelRow] = []
        self.gone_clients: list[int] = []
        self.limits: list[ClientLimit] = []
        #: Tasks whose slots it is to lend.
        self.lent: list[int] = []

    def tasks(self) -> list[Task]:
        """Return all tasks that it holds, those of a client in the order in which it got them."""
        return [task for seat in self.seats.values() for task in seat.tasks.values()]

    def seat(self, client: Client) -> Seat:
        """Return the seat of `client`, which may be new."""
        seat = self.seats.get(client)
        if seat is None:
            seat = self.seats[client] = Seat(self, client)
        return seat
