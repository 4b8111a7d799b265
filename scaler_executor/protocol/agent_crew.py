"""What an agent keeps of its clients, calls and workers, and how it shares the calls out.

It holds the rows, and the measures by which calls are shared out: who should have a call, and how many at once. It
decides nothing of what becomes of a call (`agent_calls`) or a worker (`agent_hiring`), nor which client a worker is
for (`agent_sharing`). Times are seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal

from scaler_executor.protocol.functions import KnownFunctions, ReceivedFunction
from scaler_executor.protocol.messages import CancelKind, Function, WorkerCallRow
from scaler_executor.protocol.page import RING_SLOTS
from scaler_executor.protocol.priorities import PriorityQueue

CallState = Literal["QUEUED", "HELD", "RUNNING", "RECALLING", "STOPPING_SOFT", "FREEZING", "KILLING", "UNWOUND", "GONE"]
WorkerState = Literal["FORKING", "STARTING", "READY", "LEAVING"]

#: A worker is given calls in portions of so much expected work, and a further portion while it has no more than one.
#: Together they are what a call waits at most behind short ones.
PORTION_S: Final = 0.005
#: A portion has no more calls than this, however short they are.
PORTION_CALLS: Final = 400
#: Numbers that a worker may be behind. Half the ring, so that a slot is never given twice.
WINDOW: Final = RING_SLOTS - 100
#: Share of a new measurement in the expected duration of a function's items.
SMOOTHING: Final = 0.6
#: The number of workers that a client without a limit of its own may have.
UNLIMITED: Final = 1 << 40


class AgentFunction(ReceivedFunction):
    """A function, with what this agent has measured of it."""

    __slots__ = ("seconds",)

    def __init__(self, function: Function, others: Callable[[int], ReceivedFunction | None]) -> None:
        super().__init__(function, others)
        #: Expected duration of one item; None: never measured.
        self.seconds: float | None = None

    def measured(self, seconds: float) -> None:
        """Take in the mean duration of an item in one portion."""
        known = self.seconds
        self.seconds = seconds if known is None else known + SMOOTHING * (seconds - known)


class Client:
    """A client as the agent sees it: the calls that it has waiting here, and its part of the workers."""

    def __init__(self, client_id: int, max_items_per_worker: int | None) -> None:
        self.client_id = client_id
        #: Calls in QUEUED, next first, among entries that are not (any more).
        self.queue: deque[Call] | PriorityQueue[Call] = deque()
        #: Number of calls in QUEUED, and of their outstanding items.
        self.queued = 0
        self.queued_items = 0
        #: Number of its workers that can be counted on: not those that are leaving.
        self.staff = 0
        #: It may have so many, and then those count that are being stopped in a call; 0: its calls are not run here.
        self.max_workers = UNLIMITED
        #: A worker is replaced after so many items; None: never.
        self.max_items_per_worker = max_items_per_worker
        #: The number of the limit that the scheduler waits to hear of, see `messages.ClientLimit`; 0: none.
        self.limit_no = 0
        #: So many of its workers are for other clients as soon as they have nothing in their hands.
        self.owes = 0
        #: Counts up with each worker that is ordered for a client or that one lets go for others: among equals, whose
        #: turn was first is next.
        self.turn = 0
        #: It keeps until then what others have not less of than one worker; infinite while a worker is on its way.
        self.slice_end = 0.0
        #: How long it took until the worker that came last was ready.
        self.start_s = 0.0
        #: When its workers that have not exited by themselves are killed; infinite unless it is gone.
        self.workers_due = float("inf")
        #: A worker has done calls for it.
        self.has_worked = False

    def next_queued(self) -> Call | None:
        """Return the call whose turn it is, without taking it."""
        queue = self.queue
        while queue:
            if queue[0].state == "QUEUED":
                return queue[0]
            queue.popleft()
        return None


class Call:
    """A task at this agent. The attributes with a class-level default are set on the way, if ever."""

    state: CallState = "QUEUED"
    #: The worker in whose hands it is, and its number there; None and 0 in QUEUED.
    worker: Worker | None = None
    seq: int = 0
    #: Items answered, from the front.
    start: int = 0
    #: `start` at the time it was given to its worker, which numbers the items from there.
    given_from: int = 0
    #: How many outstanding items it had then.
    given_items: int = 0
    #: Newest cancel request of the scheduler; 0: none, or already answered.
    cancel_no: int = 0
    kind: CancelKind = CancelKind.RECALL
    #: When a soft stop turns into a hard one; only in STOPPING_SOFT.
    grace_due: float = 0.0
    #: When it has run for as long as it may; of a call in `Timeouts.running`.
    timeout_due: float = 0.0

    def __init__(
        self, task_id: int, attempt: int, client: Client, items: int, skip: int, function: AgentFunction, payload: Any
    ) -> None:
        self.task_id = task_id
        self.attempt = attempt
        self.client = client
        self.items = items
        self.skip = skip
        self.function = function
        self.payload = payload

    @property
    def open_items(self) -> int:
        return self.items - self.start

    @property
    def is_forced(self) -> bool:
        """Whether it is to be stopped, running or not."""
        return bool(self.cancel_no) and self.kind is CancelKind.FORCED


class Worker:
    """A worker process, from the order to fork it until it is reaped."""

    def __init__(self, worker_id: int, client: Client, ordered_at: float) -> None:
        self.worker_id = worker_id
        #: The only client that it serves in its life.
        self.client = client
        self.client_id = client.client_id
        self.state: WorkerState = "FORKING"
        self.ordered_at = ordered_at
        #: It counts as one of `staff`: it is neither leaving nor reaped, lends its slot, nor is parked.
        self.counts = True
        #: Since when it has had nothing in its hands, if it is idle.
        self.idle_since = 0.0
        self.pid = 0
        #: Calls in its hands in the order of their numbers; the first one is in progress or next.
        self.held: deque[Call] = deque()
        self.last_seq = 0
        #: Highest number of which it has said anything.
        self.heard_seq = 0
        #: Ids of the functions that it has.
        self.known: KnownFunctions[int] = KnownFunctions(256)
        #: Items it was given in its life, for max_tasks_per_child.
        self.items_given = 0
        #: Portions under way: (function, calls, expected seconds), oldest first, and the sum of the latter.
        self.portions: deque[tuple[AgentFunction, int, float]] = deque()
        self.load_s = 0.0
        #: Since when the oldest portion has been the oldest.
        self.portion_since = 0.0
        #: The calls that the freeze under way asks about, by their numbers; None: no freeze is under way.
        self.freeze: dict[int, Call] | None = None
        #: The run whose items that freeze takes back, as far as it has not come to them; 0: none.
        self.freeze_split = 0
        #: Told to exit when it has nothing left to do.
        self.retired = False
        #: Its process group has been killed: a freeze would not be answered, its exit answers.
        self.killed = False
        #: It did not stand still, or die, in time: nothing is recalled from it, and once killed it cannot be stopped.
        self.stuck = False
        #: Calls in it submit others, which must not stand behind them: it is given one at a time.
        self.has_session = False
        #: The call in it, or an earlier one, that has said that it waits for others; 0: none.
        self.asked_for = 0
        #: That call lends its slot: the worker does not count.
        self.is_lent = False
        #: It has counted as one too many since it has gone on without waiting for its slot.
        self.is_overdrawn = False


class Crew:
    """The workers of one agent and the calls that wait for one."""

    def __init__(self, max_workers: int, max_items_per_worker: int | None) -> None:
        self.max_workers = max_workers
        self.max_items_per_worker = max_items_per_worker
        #: {worker_id: Worker}, all that are not reaped.
        self.workers: dict[int, Worker] = {}
        #: READY workers with nothing in their hands, the one that has been so for the shortest time last.
        self.idle: dict[int, Worker] = {}
        #: Workers with nothing in their hands that do not count, see `agent_lending`.
        self.parked: dict[int, Worker] = {}
        #: Somebody waits for the next slot.
        self.is_wanted = False
        #: {client_id: Client}, all that have or may have something here.
        self.clients: dict[int, Client] = {}
        #: Number of workers that can be counted on: not those that are leaving.
        self.staff = 0
        #: Expected duration of a task as the scheduler hands them out; None: never measured.
        self.task_seconds: float | None = None

    def client(self, client_id: int) -> Client:
        """Return the client of this number, who may be new."""
        client = self.clients.get(client_id)
        if client is None:
            client = self.clients[client_id] = Client(client_id, self.max_items_per_worker)
        return client

    def forget_client(self, client_id: int) -> None:
        """Nothing is left here of this client, so nobody owes it anything."""
        self.clients.pop(client_id, None)
        for client in self.clients.values():
            client.owes = 0

    @property
    def queued(self) -> int:
        """Number of calls in QUEUED."""
        return sum(client.queued for client in self.clients.values())

    def room(self, worker: Worker) -> int:
        """Return how many items `worker` may still be given in its life."""
        most = worker.client.max_items_per_worker
        return 1 << 40 if most is None else most - worker.items_given

    def is_full(self, client: Client) -> bool:
        """Tell whether `client` may have no more workers, however many are free."""
        if client.max_workers == UNLIMITED:
            return False
        return self.in_use(client) >= client.max_workers

    def in_use(self, client: Client) -> int:
        """Return how many workers of `client` may be running something, or soon."""
        workers = self.workers.values()
        stopping = sum(w.client is client and not w.counts and bool(w.held) and not w.is_lent for w in workers)
        return client.staff + stopping

    def choose(self, call: Call) -> Worker | None:
        """Return the worker that should have `call`: an idle one, or one that will soon be if the call is known to be
        short."""
        client = call.client
        for worker in reversed(self.idle.values()):
            if worker.client is client:
                return worker
        seconds = call.function.seconds
        if seconds is None or seconds > PORTION_S or client.owes or client.staff > client.max_workers or self.is_wanted:
            return None
        best: Worker | None = None
        for worker in self.workers.values():
            if (
                worker.state == "READY"
                and not worker.retired
                and worker.counts
                and not worker.has_session
                and worker.client is client
                and worker.load_s <= PORTION_S
                and worker.freeze is None
                and worker.last_seq - worker.heard_seq < WINDOW - PORTION_CALLS
                and worker.held
                and worker.held[0].state == "HELD"
                and len(worker.portions) < 2
                and self.room(worker) > 0
                and (best is None or worker.load_s < best.load_s)
            ):
                best = worker
        return best

    def portion_items(self, worker: Worker, function: AgentFunction) -> int:
        """Return how many items of `function` make up the next portion of `worker`."""
        seconds = function.seconds
        if seconds is None or worker.has_session:
            return 1
        client = worker.client
        fair = -(-client.queued_items // max(1, client.staff))
        return max(1, min(int(PORTION_S / max(seconds, 1e-7)), fair, self.room(worker)))

    def measured_task(self, seconds: float) -> None:
        """Take in the mean duration of the tasks in one portion."""
        known = self.task_seconds
        self.task_seconds = seconds if known is None else known + SMOOTHING * (seconds - known)

    def task_capacity(self) -> int:
        """Return how many tasks are enough to keep all workers busy between two words with the scheduler."""
        seconds = self.task_seconds
        depth = 2 if seconds is None else max(2, min(2000, int(0.02 / max(seconds, 1e-7))))
        return self.max_workers * depth


def row_of(call: Call) -> WorkerCallRow:
    """Return the row that gives the outstanding items of `call` to its worker."""
    return (call.seq, call.items - call.start, call.skip + call.start, call.function.function.function_id, call.payload)
