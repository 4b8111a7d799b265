"""The agent: owns the workers of one machine, hands calls to them, stops calls, and says what became of each.

It knows workers and their pages, as far as the forker reports them; it does not know clients' connections, other
agents or retries, and makes no attempts. The table at the end of this file is over the state of a call; what is given
to whom is `crew`'s.

QUEUED         waits here for a worker
HELD           in a worker's hands; it may have started
RUNNING        as HELD, and it has been seen in progress
RECALLING      a freeze is to tell whether it has started; if not it is taken back
STOPPING_SOFT  its worker has been interrupted; it may unwind until the grace time is over
FREEZING       its worker is being frozen, and killed if it is still in this call
KILLING        its process group has been killed; confirmed when it is gone
UNWOUND        its code has unwound and its worker is exiting; confirmed when what it left in its process group is gone
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from scaler_executor.protocol.agent_events import (
    Drain,
    Drained,
    Event,
    Exited,
    Fork,
    Forked,
    ForkFailed,
    Freeze,
    Frozen,
    Instruction,
    Interrupt,
    Kill,
    Look,
    NewEpoch,
    Received,
    Record,
    Records,
    Retire,
    SchedulerBack,
    SchedulerLost,
    Seen,
    Send,
    Start,
    Tick,
)
from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.crew import PORTION_CALLS, AgentFunction, Call, CallState, Crew, Worker, row_of
from scaler_executor.protocol.machine import Story, Transition, forbidden, ignore, unreachable
from scaler_executor.protocol.messages import (
    AgentCapacity,
    AgentConfirm,
    AgentConfirmRow,
    AgentResult,
    AgentResultRow,
    Bye,
    CancelKind,
    ClientGone,
    DeathReport,
    DeathRow,
    Function,
    Refused,
    SplitRow,
    TaskCancel,
    TaskCancelConfirmType,
    TaskDied,
    TaskReturned,
    TaskRun,
    TaskRunning,
    TaskSplit,
    ToAgentMessage,
    Welcome,
    WorkerRun,
    WorkersBroken,
)
from scaler_executor.protocol.page import (
    RECORD_BATCH_END,
    RECORD_ERROR,
    RECORD_READY,
    RECORD_SKIPPED,
    RECORD_START_FAILED,
    RECORD_UNWOUND,
    RECORD_VALUE,
    RECORD_VALUES,
)

#: An agent that has lost its scheduler stops its calls after so long; shorter than `scheduler.FENCE_S` by more than
#: clocks differ.
FENCE_S: Final = 8.0
#: In the place of a cancel_no: the call is stopped for want of a scheduler.
FENCED: Final = -1
#: Workers that are silent are looked at this often.
LOOK_S: Final = 0.005
#: A call may wait so long behind one in progress before it is taken back for an idle worker.
RECALL_S: Final = 0.02
#: So many workers in a row may die before they are ready.
MAX_START_FAILURES: Final = 3
#: After a fork failed (no memory, too many processes) the next is tried so much later, and so many times while there is
#: no worker at all.
FORK_RETRY_S: Final = 0.1
MAX_FORK_FAILURES: Final = 30
#: A call whose client is gone has no longer than this to unwind, whatever its client had allowed.
GONE_GRACE_S: Final = 1.0

CANCELED: Final = TaskCancelConfirmType.CANCELED
NOT_FOUND: Final = TaskCancelConfirmType.CANCEL_NOT_FOUND
FAILED: Final = TaskCancelConfirmType.CANCEL_FAILED


class AgentState:
    """The calls and workers of one machine.

    Args:
        max_workers: So many workers at once, not counting those that are being stopped.
        max_items_per_worker: A worker is replaced after so many items; None: never.
        cancel_grace_s: Time for a call to unwind after it was interrupted, where its function says nothing else; 0:
        it is killed at once.
    """

    def __init__(self, max_workers: int, max_items_per_worker: int | None = None, cancel_grace_s: float = 1.0) -> None:
        assert max_workers > 0 and (max_items_per_worker is None or max_items_per_worker > 0)
        self._cancel_grace_s = cancel_grace_s
        self._crew = Crew(max_workers, max_items_per_worker)
        #: {task_id: Call}: every task that the scheduler believes is here.
        self._calls: dict[int, Call] = {}
        #: {(client_id, function_id): AgentFunction}
        self._functions: dict[tuple[int, int], AgentFunction] = {}
        self._last_worker_id = 0
        #: {client_id: n}: so many workers in a row died before they were ready.
        self._start_failures: dict[int, int] = {}
        #: {client_id: n}: so many forks in a row failed while it had no worker.
        self._fork_failures: dict[int, int] = {}
        #: When workers may be ordered again after a fork failed, or None.
        self._hire_at: float | None = None
        #: {client_id: reason} of the clients for which no worker can be started.
        self._broken: dict[int, str] = {}
        #: Clients that are gone but still have workers here.
        self._gone_clients: set[int] = set()
        #: Workers of an earlier epoch.
        self._old_workers: set[int] = set()
        self._draining = False
        self._drained = False
        self._said_capacity = 0
        #: When to look at the busy workers next, or None.
        self._look_at: float | None = None
        #: When calls are stopped for want of a scheduler, or None.
        self._fence_at: float | None = None
        #: That time is over: nothing is started until the scheduler is back.
        self._fenced = False
        #: Calls in STOPPING_SOFT and those that have unwound since, for their deadlines.
        self._stopping: dict[int, Call] = {}
        #: Workers with calls in RECALLING or FREEZING about which no freeze has been sent.
        self._to_freeze: dict[int, Worker] = {}
        self._story = Story()
        self._now = 0.0
        self._out: list[Instruction] = []
        #: What may be answered before the call that carries it out returns; so it must come last.
        self._late: list[Fork | Look] = []
        #: Rows of AgentResult, those of joined results still with `_Joined` for payload.
        self._results: list[Any] = []
        self._confirms: list[AgentConfirmRow] = []
        self._splits: list[SplitRow] = []
        self._deaths: list[DeathRow] = []
        self._running: list[int] = []
        self._returned: list[tuple[int, int]] = []
        self._broken_news: list[WorkersBroken] = []

    # The four methods that every state class has

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in and return what is to be done, in order.

        Raises:
            RemoteProtocolError: The scheduler broke the protocol.
        """
        self._now = now
        out = self._out = []
        if isinstance(event, Records):
            self._records(event)
        elif isinstance(event, Received):
            self._received(event.message)
        elif isinstance(event, Tick):
            pass
        elif isinstance(event, Seen):
            self._seen(event)
        elif isinstance(event, Frozen):
            self._frozen(event)
        elif isinstance(event, Exited):
            self._exited(event)
        elif isinstance(event, Forked):
            self._forked(event)
        elif isinstance(event, ForkFailed):
            self._fork_failed(event)
        elif isinstance(event, SchedulerLost):
            if self._fence_at is None and not self._fenced:
                self._fence_at = now + FENCE_S
        elif isinstance(event, SchedulerBack):
            self._fence_at, self._fenced = None, False
        elif isinstance(event, NewEpoch):
            self._new_epoch()
        elif isinstance(event, Drain):
            self._drain()
        else:
            unreachable(event)
        self._timers()
        self._dispatch()
        self._freeze()
        if self._gone_clients:
            self._settle_gone()
        self._flush()
        return out

    def next_deadline(self) -> float | None:
        """Return when the next Tick is due, or None."""
        if not self._stopping and self._hire_at is None and self._fence_at is None:
            return self._look_at  # the common case
        deadlines = [call.grace_due for call in self._stopping.values()]
        deadlines += [at for at in (self._hire_at, self._look_at, self._fence_at) if at is not None]
        return min(deadlines, default=None)

    def story(self, task_id: int) -> list[Transition]:
        """Return what is remembered of a task: everything but the ordinary steps."""
        return self._story.of(task_id)

    def check(self) -> None:
        """Assert the invariants."""
        crew = self._crew
        queued = [call for call in self._calls.values() if call.state == "QUEUED"]
        assert crew.queued == len(queued), (crew.queued, len(queued))
        assert crew.queued_items == sum(call.open_items for call in queued)
        waiting = {id(call) for call in crew.queue}
        for task_id, call in self._calls.items():
            assert call.task_id == task_id
            assert 0 <= call.start < call.items, (task_id, call.start, call.items)
            assert (call.state == "QUEUED") == (call.worker is None), (task_id, call.state)
            assert call.worker is None or call in call.worker.held, task_id
            assert call.worker is None or call.worker.worker_id in crew.workers
            assert call.state != "QUEUED" or (id(call) in waiting and not call.cancel_no)
            is_stopping = task_id in self._stopping
            assert is_stopping if call.state == "STOPPING_SOFT" else call.state == "UNWOUND" or not is_stopping, task_id
            if call.state in ("RECALLING", "FREEZING"):
                worker = call.worker
                assert worker is not None
                asked = worker.freeze is not None and worker.freeze.get(call.seq) is call
                assert asked or worker.killed or worker.worker_id in self._to_freeze, task_id
        for worker in crew.workers.values():
            seqs = [call.seq for call in worker.held]
            assert seqs == sorted(set(seqs)), seqs
            assert all(self._calls.get(call.task_id) is call and call.worker is worker for call in worker.held)
            assert all(call.client_id == worker.client_id for call in worker.held)
            assert (worker.worker_id in crew.idle) == (
                worker.state == "READY" and not worker.held and not worker.portions
            ), (worker.worker_id, worker.state)
            assert not worker.held or worker.state in ("READY", "LEAVING")
        assert crew.staff() <= crew.max_workers
        assert not (self._results or self._confirms or self._splits or self._deaths or self._running or self._returned)

    @property
    def outstanding(self) -> int:
        """Number of tasks that are here."""
        return len(self._calls)

    @property
    def workers(self) -> list[int]:
        """Ids of the workers that are not reaped."""
        return list(self._crew.workers)

    # From the scheduler

    def _received(self, message: ToAgentMessage) -> None:
        if isinstance(message, TaskRun):
            self._run(message)
        elif isinstance(message, TaskCancel):
            for task_id, cancel_no, kind in message.cancels:
                call = self._calls.get(task_id)
                if call is None:
                    self._confirms.append((task_id, 0, cancel_no, NOT_FOUND, 0))
                else:
                    self._step(call, "CANCEL", cancel_no, CancelKind(kind))
        elif isinstance(message, ClientGone):
            self._client_gone(message.client_id)
        elif isinstance(message, Welcome):
            pass
        elif isinstance(message, (Refused, Bye)):
            self._drain()
        else:
            unreachable(message)

    def _run(self, message: TaskRun) -> None:
        functions, calls, crew, broken = self._functions, self._calls, self._crew, self._broken
        for client_id, function in message.functions:
            functions[client_id, function.function_id] = AgentFunction(
                function,
                lambda needed, client_id=client_id: functions.get((client_id, needed)),  # type: ignore[misc]
            )
        append = crew.queue.append
        items_queued = 0
        for task_id, attempt, client_id, items, skip, function_id, payload in message.tasks:
            if task_id in calls or items < 1 or skip < 0:
                raise RemoteProtocolError(f"task {task_id} of {items} items, skip {skip}")
            if (broken and client_id in broken) or self._draining:
                self._returned.append((task_id, attempt))  # it crossed the news
                continue
            used = functions.get((client_id, function_id))
            if used is None:
                if function_id:
                    raise RemoteProtocolError(f"task {task_id} names function {function_id}, which is not known")
                used = functions[client_id, 0] = AgentFunction(Function(0, "", b"", 0), lambda _: None)
            call = calls[task_id] = Call(task_id, attempt, client_id, items, skip, used, payload)
            append(call)
            crew.queued += 1
            items_queued += items
        crew.queued_items += items_queued
        for key in message.forget:
            functions.pop(key, None)

    def _client_gone(self, client_id: int) -> None:
        # Its calls are cancelled one by one, by the scheduler; here it is about its workers.
        self._gone_clients.add(client_id)
        self._broken.pop(client_id, None)
        self._start_failures.pop(client_id, None)
        self._fork_failures.pop(client_id, None)
        for call in self._stopping.values():
            if call.client_id == client_id:
                call.grace_due = min(call.grace_due, self._now + GONE_GRACE_S)
        for key in [key for key in self._functions if key[0] == client_id]:
            del self._functions[key]
        for worker in [worker for worker in self._crew.workers.values() if worker.client_id == client_id]:
            if not worker.held:
                self._retire(worker)

    def _settle_gone(self) -> None:
        """Forget the clients that are gone and of which nothing is left here: neither a worker nor a call."""
        left = {worker.client_id for worker in self._crew.workers.values()}
        if not self._gone_clients <= left:
            left.update(call.client_id for call in self._calls.values())
            self._gone_clients &= left

    def _drain(self) -> None:
        self._draining = True
        self._hand_back(None)
        for worker in [worker for worker in self._crew.workers.values() if not worker.held]:
            self._retire(worker)

    def _new_epoch(self) -> None:
        """Forget all calls and clients: their numbers may come again and mean others. Room is offered when the old
        workers are gone."""
        self._fence_at, self._fenced = None, False
        self._said_capacity = 0
        for call in list(self._calls.values()):
            if call.state == "QUEUED":
                self._unqueue(call)
            else:
                self._release(call)
            self._forget(call)
        for table in (self._functions, self._broken, self._gone_clients, self._start_failures, self._fork_failures):
            table.clear()
        for worker in self._crew.workers.values():
            worker.freeze = {} if worker.freeze is not None else None
            self._crew.idle.pop(worker.worker_id, None)
            worker.state, worker.retired = "LEAVING", True
            self._old_workers.add(worker.worker_id)
            self._out.append(Kill(worker.worker_id))

    def _hand_back(self, client_id: int | None) -> None:
        """Give what is queued (of one client) back to the scheduler."""
        for call in [call for call in self._crew.queue if call.state == "QUEUED"]:
            if client_id is None or call.client_id == client_id:
                self._unqueue(call)
                if call.start:
                    call = self._split_tail(call, call.start)
                self._forget(call)
                self._returned.append((call.task_id, call.attempt))

    def _stop_everything(self) -> None:
        """Stop all calls at once, for the scheduler may soon take it that they have stopped.

        What becomes of them is said as ever: the scheduler hears of it if the connection goes on after all.
        """
        self._hand_back(None)
        for call in list(self._calls.values()):
            if call.state in ("HELD", "RUNNING", "RECALLING", "STOPPING_SOFT"):
                self._stopping.pop(call.task_id, None)
                self._story.add(self._now, call.task_id, "fence", call.state, "FREEZING")
                call.cancel_no, call.kind = call.cancel_no or FENCED, CancelKind.FORCED
                self._want_freeze(call, "FREEZING")

    # From workers

    def _records(self, event: Records) -> None:
        worker = self._crew.workers[event.worker_id]
        held, results = worker.held, self._results
        for kind, seq, item, payload in event.records:
            if kind <= RECORD_ERROR:
                worker.heard_seq = max(worker.heard_seq, seq)
                call = self._head(worker, seq)
                if call is None:
                    continue
                if call.items == 1:
                    # The common case, and the one that has to be short.
                    results.append((call.task_id, call.attempt, 0, 1, kind, payload))
                    self._ended(call)
                else:
                    self._item_result(call, call.given_from + item, kind, payload)
            elif kind == RECORD_VALUES:
                worker.heard_seq = max(worker.heard_seq, seq)
                call = self._head(worker, seq)
                if call is not None:
                    self._range_result(call, call.given_from + item, payload)
            elif kind == RECORD_BATCH_END:
                self._portion_done(worker, seq * 1e-9, item)
            elif kind == RECORD_READY:
                self._ready(worker)
            elif kind == RECORD_START_FAILED:
                if worker.state != "LEAVING":
                    self._broken_client(worker.client_id, bytes(payload).decode("utf-8", "replace"))
            elif kind in (RECORD_UNWOUND, RECORD_SKIPPED):
                worker.heard_seq = max(worker.heard_seq, seq)
                call = next((call for call in held if call.seq == seq), None)
                if call is not None:
                    self._step(call, "UNWOUND" if kind == RECORD_UNWOUND else "SKIPPED")
                if kind == RECORD_UNWOUND:
                    self._leave(worker)
                    self._take_back_unstarted(worker)
            else:
                self._misbehaved(worker, f"record of kind {kind}")
        self._maybe_idle(worker)

    def _head(self, worker: Worker, seq: int) -> Call | None:
        """Return the call that a result with number `seq` is of; None: it has been answered for."""
        held = worker.held
        if held and held[0].seq == seq:
            return held[0]
        # What a freeze under way has taken back says nothing more, and the worker may have come to the calls behind it
        # before the forker's report is here.
        asked = worker.freeze or {}
        skips = False
        for call in held:
            if call.seq == seq:
                if not skips:
                    return call
                self._misbehaved(worker, f"result of call {seq} before that of {held[0].seq}")
            skips = skips or call.seq not in asked
        return None

    def _item_result(self, call: Call, item: int, kind: int, payload: Any) -> None:
        """Forward the result of one item of a run, joined to those before it in this batch where they are plain."""
        if item != call.start:
            worker = call.worker
            assert worker is not None
            if item > call.start:
                self._misbehaved(worker, f"result of item {item}, expected {call.start}")
            return  # an item that has been taken back cannot have started, so this is one that is answered
        results = self._results
        last = results[-1] if results else None
        if (
            last is not None
            and last[0] == call.task_id
            and kind == RECORD_VALUE == last[4]
            and type(payload) is bytes
            and type(last[5]) is _Joined
        ):
            last[5].append(payload)
            results[-1] = (last[0], last[1], last[2], last[3] + 1, RECORD_VALUE, last[5])
        elif kind == RECORD_VALUE and type(payload) is bytes:
            results.append((call.task_id, call.attempt, item, 1, kind, _Joined([payload])))
        else:
            results.append((call.task_id, call.attempt, item, 1, kind, payload))
        call.start = item + 1
        if call.start == call.items:
            self._ended(call)

    def _range_result(self, call: Call, item: int, payload: Any) -> None:
        """Forward the values of consecutive items of a run."""
        count = int.from_bytes(payload[:4], "little")
        if item < call.start:
            return  # they were taken from the page of a worker that died while it wrote them into the pipe
        if item > call.start or not 0 < count <= call.open_items:
            assert call.worker is not None
            self._misbehaved(call.worker, f"results of items {item}+{count}, expected {call.start} of {call.items}")
            return
        self._results.append((call.task_id, call.attempt, item, count, RECORD_VALUE, payload[4:]))
        call.start = item + count
        if call.start == call.items:
            self._ended(call)

    def _ended(self, call: Call) -> None:
        """The call's last item has its result: whatever it was that we wanted of it, this answers."""
        if call.state == "STOPPING_SOFT":
            del self._stopping[call.task_id]
        worker = call.worker
        assert worker is not None
        if worker.held[0] is call:
            worker.held.popleft()
        else:
            worker.held.remove(call)
        del self._calls[call.task_id]
        call.state, call.worker, call.payload = "GONE", None, b""

    def _portion_done(self, worker: Worker, seconds: float, items: int) -> None:
        if not worker.portions:
            self._misbehaved(worker, "end of a portion that it was not given")
            return
        function, calls, expected_s = worker.portions.popleft()
        worker.load_s = max(0.0, worker.load_s - expected_s) if worker.portions else 0.0
        worker.portion_since = self._now
        if items:
            function.measured(seconds / items)
            crew = self._crew
            crew.measured_task(seconds / calls)

    def _ready(self, worker: Worker) -> None:
        self._start_failures.pop(worker.client_id, None)
        if worker.state == "STARTING":
            worker.state = "READY"

    def _maybe_idle(self, worker: Worker) -> None:
        if worker.state == "LEAVING" and not worker.held and not worker.retired and worker.pid:
            # It was interrupted, but its call was over first.
            self._retire(worker)
        if worker.state != "READY" or worker.held or worker.portions or worker.worker_id in self._crew.idle:
            return
        if self._draining or worker.client_id in self._gone_clients or self._crew.room(worker) <= 0:
            self._retire(worker)
        else:
            self._crew.idle[worker.worker_id] = worker

    def _seen(self, event: Seen) -> None:
        worker = self._crew.workers.get(event.worker_id)
        if worker is None or not worker.held:
            return
        head = worker.held[0]
        if head.seq != event.current or event.done >= event.current:
            return
        if head.state == "HELD":
            head.state = "RUNNING"
            self._running.append(head.task_id)

    def _misbehaved(self, worker: Worker, what: str) -> None:
        """A worker said what it cannot have meant: user code has written over our memory or descriptors. It is no use
        any more."""
        self._story.add(self._now, worker.worker_id, "misbehaved", worker.state, "LEAVING", what)
        self._leave(worker)
        self._out.append(Kill(worker.worker_id))

    # From the forker

    def _forked(self, event: Forked) -> None:
        worker = self._crew.workers[event.worker_id]
        worker.pid = event.pid
        self._fork_failures.pop(worker.client_id, None)
        if worker.state == "FORKING":
            worker.state = "STARTING"
        elif worker.retired:
            self._out.append(Retire(worker.worker_id))  # it was retired before it existed

    def _fork_failed(self, event: ForkFailed) -> None:
        worker = self._crew.workers.pop(event.worker_id)
        self._old_workers.discard(event.worker_id)
        if event.forker_lost or self._is_unwanted(worker):
            return
        # What a machine lacks for a moment is no reason to give up while work goes on, and none to ask all the time.
        self._hire_at = self._now + FORK_RETRY_S
        client_id = worker.client_id
        if any(other.client_id == client_id for other in self._crew.workers.values()):
            return
        failures = self._fork_failures[client_id] = self._fork_failures.get(client_id, 0) + 1
        if failures >= MAX_FORK_FAILURES:
            self._broken_client(client_id, f"no worker could be started: {event.reason}")

    def _is_unwanted(self, worker: Worker) -> bool:
        return worker.retired or worker.state == "LEAVING" or worker.client_id in self._gone_clients

    def _start_failed(self, worker: Worker, reason: str) -> None:
        if self._is_unwanted(worker):
            return
        client_id = worker.client_id
        failures = self._start_failures[client_id] = self._start_failures.get(client_id, 0) + 1
        if failures >= MAX_START_FAILURES:
            self._broken_client(worker.client_id, reason)

    def _broken_client(self, client_id: int, reason: str) -> None:
        self._start_failures.pop(client_id, None)
        self._fork_failures.pop(client_id, None)
        if client_id not in self._broken and client_id not in self._gone_clients:
            self._broken[client_id] = reason
            self._hand_back(client_id)
            self._broken_news.append(WorkersBroken(client_id, reason))

    def _frozen(self, event: Frozen) -> None:
        worker = self._crew.workers[event.worker_id]
        # Not those answered in the meantime by their result, or by a record that they were skipped or have unwound; a
        # skipped one may be in the hands of the same worker again, under another number.
        asked = [
            call
            for seq, call in (worker.freeze or {}).items()
            if call.worker is worker and call.seq == seq and call.state in ("RECALLING", "FREEZING")
        ]
        split_seq = worker.freeze_split
        worker.freeze, worker.freeze_split = None, 0
        if event.killed:
            self._leave(worker)
            worker.killed = True
        worker.stuck = event.stuck
        if event.stuck:
            # Also of those about which no freeze was sent because the worker was killed: nobody else will answer them.
            states = {"RECALLING", "FREEZING", "KILLING", "UNWOUND"} if event.killed else {"RECALLING", "FREEZING"}
            asked = [call for call in worker.held if call.state in states]
        for call in asked:
            if event.stuck:
                self._step(call, "STUCK")
            elif call.seq > event.current:
                self._step(call, "NOT_STARTED")
            elif call.seq < event.current or event.done >= event.current:
                self._step(call, "OVER")
            elif event.killed:
                self._step(call, "KILLED")
            elif call.seq != split_seq and call.state == "RECALLING" and call.open_items > 1 and not _is_forced(call):
                self._want_freeze(call, "RECALLING")  # another run was in progress when it was asked to be split
            else:
                at = call.given_from + event.item + 1 if call.seq == split_seq else call.items
                self._step(call, "IN_PROGRESS", min(at, call.items))
        if any(call.state in ("RECALLING", "FREEZING") for call in worker.held):
            self._to_freeze[worker.worker_id] = worker  # asked for while the freeze was under way
        self._maybe_idle(worker)

    def _exited(self, event: Exited) -> None:
        worker = self._crew.workers.pop(event.worker_id)
        self._crew.idle.pop(event.worker_id, None)
        self._to_freeze.pop(event.worker_id, None)
        self._old_workers.discard(event.worker_id)
        if worker.state in ("FORKING", "STARTING"):
            if not event.forker_lost:
                self._start_failed(worker, f"workers end before they are ready: {event.report.reason}")
        elif worker.state == "READY" and worker.held:
            # One that dies idle is replaced when there is work: it may be what its initializer started that ends it.
            self._leave(worker)
        calls = list(worker.held)
        worker.state = "LEAVING"
        # From the back, so that what is queued again stands in front in its old order.
        for call in reversed(calls):
            claimed = call.seq == event.current and event.done < event.current
            if call.given_items == 1:
                # If it claims to be over and has no result, user code has written over the page or the pipe: it may
                # have started.
                in_progress = claimed or call.seq <= event.done
            else:
                in_progress = claimed and call.start == call.given_from + event.item
            if in_progress:
                self._step(call, "EXITED_IN_PROGRESS", event.report)
            else:
                # Not claimed, or between two items of a run.
                self._step(call, "EXITED_NOT_STARTED", event.report)
        assert not worker.held

    # Cells of the table. Each takes the call and what the event carries.

    def _step(self, call: Call, event: str, *details: Any) -> None:
        before = call.state
        _TABLE[before][event](self, call, *details)
        self._story.add(self._now, call.task_id, event, before, call.state, repr(details) if details else "")

    def _drop_queued(self, call: Call, cancel_no: int, kind: CancelKind) -> None:
        call.cancel_no = cancel_no
        self._unqueue(call)
        self._confirm_canceled(call)

    def _cancel_held(self, call: Call, cancel_no: int, kind: CancelKind) -> None:
        call.cancel_no, call.kind = cancel_no, kind
        worker = call.worker
        assert worker is not None
        if kind is CancelKind.FORCED and worker.held[0] is call:
            # Most probably it runs; if not, it is not allowed to any more and the worker says SKIPPED.
            self._stop(call)
        else:
            self._want_freeze(call, "RECALLING")

    def _cancel_running(self, call: Call, cancel_no: int, kind: CancelKind) -> None:
        call.cancel_no, call.kind = cancel_no, kind
        if kind is CancelKind.FORCED:
            self._stop(call)
        elif call.open_items > 1:
            self._want_freeze(call, "RECALLING")  # the items that it has not come to
        else:
            self._refuse(call)

    def _newest_counts(self, call: Call, cancel_no: int, kind: CancelKind) -> None:
        call.cancel_no, call.kind = cancel_no, kind

    def _not_started(self, call: Call, *_: Any) -> None:
        """It has not started (or not gone on, for a run), and its worker will not come to it: taken back, or the
        worker is gone."""
        self._release(call)
        if call.cancel_no:
            self._confirm_canceled(call)
        else:
            self._requeue(call)

    def _in_progress(self, call: Call, at: int) -> None:
        """A freeze has found it running; of a run, the items from `at` on have been taken back."""
        if at <= call.start:
            # Frozen between two items: nothing of it is in progress.
            self._not_started(call)
            return
        call.state = "RUNNING"
        if call.cancel_no and call.kind is CancelKind.FORCED:
            if at < call.items:
                # It was a recall when the freeze was sent, and its worker will not come to these any more.
                self._stop_tail(call, at)
            self._stop(call)
        elif at == call.items:
            if call.cancel_no:
                self._refuse(call)
        elif call.cancel_no:
            self._cancel_tail(call, at)
            call.cancel_no = 0
        else:
            self._requeue(self._split_tail(call, at))

    def _still_held(self, call: Call, *_: Any) -> None:
        # It is over; its result is in the pipe and answers.
        call.state = "HELD"

    def _freeze_again(self, call: Call, at: int) -> None:
        # The freeze was for a recall, sent before it was to be killed.
        if at <= call.start:
            self._stopped(call)
            return
        if at < call.items:
            self._stop_tail(call, at)
        self._want_freeze(call, "FREEZING")

    def _kill_at_grace(self, call: Call) -> None:
        del self._stopping[call.task_id]
        self._want_freeze(call, "FREEZING")

    def _killing(self, call: Call) -> None:
        call.state = "KILLING"

    def _unwound(self, call: Call) -> None:
        # Its code has stopped, but a subprocess of it may run on: that goes with the group of the worker, which exits
        # by itself. The grace time goes on, for its finalizers may hang.
        call.state = "UNWOUND"
        if call.task_id not in self._stopping:
            self._kill_unwound(call)  # it is over already

    def _kill_unwound(self, call: Call) -> None:
        worker = call.worker
        assert worker is not None
        self._stopping.pop(call.task_id, None)
        if not worker.killed:
            worker.killed = True
            self._out.append(Kill(worker.worker_id))

    def _stuck(self, call: Call) -> None:
        call.state = "HELD"
        if call.cancel_no == FENCED:
            call.cancel_no = 0
        elif call.cancel_no:
            self._refuse(call)

    def _stopped(self, call: Call, *_: Any) -> None:
        """The code has stopped, or was not started: unwound, skipped, or its process group is gone."""
        if call.cancel_no == FENCED:
            call.cancel_no = 0
            self._died(call, DeathReport(reason="its machine was cut off from the scheduler, and stopped it"))
            return
        self._release(call)
        self._confirm_canceled(call)

    def _died(self, call: Call, report: DeathReport) -> None:
        """Its worker died in it: in the first outstanding item, the others never started."""
        if call.cancel_no > 0 and _is_forced(call):
            self._stopped(call)
            return
        self._release(call)
        if call.open_items > 1:
            if call.cancel_no > 0:
                self._cancel_tail(call, call.start + 1)
            else:
                self._requeue(self._split_tail(call, call.start + 1))
        self._forget(call)
        self._deaths.append((call.task_id, call.attempt, report))

    def _unwound_late(self, call: Call) -> None:
        # It was interrupted, and then a freeze found it over, or it could not be frozen and its cancel was refused. It
        # has started and has no result: without a cancel that this answers, that is a death.
        if call.cancel_no:
            self._unwound(call)
        else:
            self._died(call, DeathReport(reason="it stopped after its cancel had been refused"))

    # What cells do

    def _stop(self, call: Call) -> None:
        """Stop a call that is in its worker's hands and probably running."""
        worker = call.worker
        assert worker is not None
        grace_s = call.function.function.options.cancel_grace_s
        if grace_s is None:
            grace_s = self._cancel_grace_s
        if call.client_id in self._gone_clients:
            grace_s = min(grace_s, GONE_GRACE_S)
        self._leave(worker)
        if grace_s <= 0:
            self._want_freeze(call, "FREEZING")
            return
        call.state = "STOPPING_SOFT"
        call.grace_due = self._now + grace_s
        self._stopping[call.task_id] = call
        self._out.append(Interrupt(worker.worker_id, call.seq))

    def _want_freeze(self, call: Call, state: CallState) -> None:
        call.state = state
        assert call.worker is not None
        self._to_freeze[call.worker.worker_id] = call.worker

    def _refuse(self, call: Call) -> None:
        self._confirms.append((call.task_id, call.attempt, call.cancel_no, FAILED, 0))
        call.cancel_no = 0

    def _cancel_tail(self, call: Call, at: int) -> None:
        """Confirm that the items from `at` on will not run; those before it are another matter."""
        self._confirms.append((call.task_id, call.attempt, call.cancel_no, CANCELED, at))
        call.items = at

    def _stop_tail(self, call: Call, at: int) -> None:
        """Take the items from `at` on out of a call that is being stopped: its worker will not come to them."""
        if call.cancel_no == FENCED:
            self._requeue(self._split_tail(call, at))
        else:
            tail = self._split_tail(call, at)
            tail.cancel_no = call.cancel_no
            self._confirm_canceled(tail)

    def _confirm_canceled(self, call: Call) -> None:
        """Answer for the outstanding items of a call that no worker has, and forget it."""
        self._forget(call)
        if call.cancel_no == FENCED:
            self._returned.append((call.task_id, call.attempt))
        else:
            self._confirms.append((call.task_id, call.attempt, call.cancel_no, CANCELED, call.start))

    def _forget(self, call: Call) -> None:
        del self._calls[call.task_id]
        call.state, call.payload = "GONE", b""

    def _release(self, call: Call) -> None:
        """Take a call out of its worker's hands."""
        self._stopping.pop(call.task_id, None)
        assert call.worker is not None
        call.worker.held.remove(call)
        call.worker, call.seq = None, 0

    def _unqueue(self, call: Call) -> None:
        self._crew.queued -= 1
        self._crew.queued_items -= call.open_items
        call.state = "GONE"  # until the caller says what it is instead

    def _requeue(self, call: Call) -> None:
        """Put a call that no worker has at the front of the queue, or back to the scheduler if nothing is started
        here any more."""
        if call.start:
            call = self._split_tail(call, call.start)
        call.state, call.cancel_no, call.kind = "QUEUED", 0, CancelKind.RECALL
        client_id = call.client_id
        if self._draining or self._fenced or client_id in self._broken or client_id in self._gone_clients:
            self._forget(call)
            self._returned.append((call.task_id, call.attempt))
            return
        self._crew.queue.appendleft(call)
        self._crew.queued += 1
        self._crew.queued_items += call.open_items

    def _split_tail(self, call: Call, at: int) -> Call:
        """Make the items of `call` from `at` on a call of their own, in nobody's hands. A head without items left is
        forgotten."""
        tail = Call(
            call.task_id + at,
            call.attempt,
            call.client_id,
            call.items - at,
            call.skip + at,
            call.function,
            call.payload,
        )
        self._calls[tail.task_id] = tail
        self._splits.append((call.task_id, call.attempt, at))
        call.items = at
        if call.start == at:
            self._forget(call)
        return tail

    def _take_back_unstarted(self, worker: Worker) -> None:
        """The worker has promised to start nothing more: free what it holds."""
        for call in reversed(list(worker.held)):
            self._step(call, "SKIPPED")

    # Workers

    def _order(self, client_id: int) -> None:
        self._last_worker_id += 1
        worker = Worker(self._last_worker_id, client_id)
        self._crew.workers[worker.worker_id] = worker
        self._late.append(Fork(worker.worker_id))

    def _leave(self, worker: Worker) -> None:
        """The worker will not be used again; its replacement is ordered now, not when it is gone."""
        self._crew.idle.pop(worker.worker_id, None)
        if worker.state == "LEAVING":
            return
        worker.state = "LEAVING"
        is_wanted = worker.client_id not in self._gone_clients and worker.client_id not in self._broken
        if is_wanted and not self._draining and self._hire_at is None:
            self._order(worker.client_id)

    def _retire(self, worker: Worker) -> None:
        """Let a worker with nothing in its hands exit."""
        self._crew.idle.pop(worker.worker_id, None)
        if not worker.retired:
            worker.retired = True
            if worker.state != "FORKING":
                self._out.append(Retire(worker.worker_id))
        worker.state = "LEAVING"

    def _dispatch(self) -> None:
        """Give queued calls to workers, and order workers for those that are left."""
        crew = self._crew
        starved: Call | None = None
        while (call := crew.next_queued()) is not None:
            worker = crew.choose(call)
            if worker is None:
                starved = call
                break
            self._give(worker)
        if starved is not None and self._hire_at is None:
            self._hire(starved.client_id)

    def _hire(self, client_id: int) -> None:
        """Order workers for calls that no worker can take now."""
        crew = self._crew
        coming = sum(1 for worker in crew.workers.values() if worker.state in ("FORKING", "STARTING"))
        wanted = crew.queued_items - coming
        while wanted > 0 and crew.staff() < crew.max_workers:
            self._order(client_id)
            wanted -= 1
        if not coming and crew.staff() >= crew.max_workers:
            other = next((worker for worker in crew.idle.values() if worker.client_id != client_id), None)
            if other is not None:
                self._retire(other)
                self._order(client_id)

    def _give(self, worker: Worker) -> None:
        """Give `worker` the next portion from the front of the queue: calls of one function and client."""
        crew = self._crew
        queue = crew.queue
        first = queue[0]
        function = first.function
        left = crew.portion_items(worker, function)
        rows: list[Any] = []
        items_given = 0
        while left > 0 and len(rows) < PORTION_CALLS:
            call = crew.next_queued()
            if call is None or call.function is not function:
                break
            queue.popleft()
            crew.queued -= 1
            crew.queued_items -= call.items
            if call.items > left:
                call.state = "HELD"
                tail = self._split_tail(call, left)
                queue.appendleft(tail)
                crew.queued += 1
                crew.queued_items += tail.items
            worker.last_seq += 1
            call.seq = worker.last_seq
            call.state, call.worker = "HELD", worker
            call.given_from, call.given_items = call.start, call.items
            worker.held.append(call)
            rows.append(row_of(call))
            items_given += call.items
            left -= call.items
        message = WorkerRun(rows)
        known = worker.known
        message.functions = [part for part in function.parts if known.need(part.function_id)]
        if message.functions:
            message.forget = known.trim()
        expected_s = (function.seconds or 0.0) * items_given
        if not worker.portions:
            worker.portion_since = self._now
        worker.portions.append((function, len(rows), expected_s))
        worker.load_s += expected_s
        worker.items_given += items_given
        crew.idle.pop(worker.worker_id, None)
        self._out.append(Start(worker.worker_id, message))
        if self._look_at is None:
            self._look_at = self._now + LOOK_S

    def _timers(self) -> None:
        now = self._now
        if self._hire_at is not None and self._hire_at <= now:
            self._hire_at = None
        if self._fence_at is not None and self._fence_at <= now:
            self._fence_at, self._fenced = None, True
            self._stop_everything()
        if self._stopping:
            for call in [call for call in self._stopping.values() if call.grace_due <= now]:
                self._step(call, "GRACE_DUE")
        if self._look_at is not None and self._look_at <= now:
            self._look_at = None
            self._look()

    def _look(self) -> None:
        """Look at the busy workers, and take back what waits behind a running call while others are idle."""
        now = self._now
        spare = len(self._crew.idle) + self._crew.max_workers - self._crew.staff() - self._crew.queued
        again = False
        for worker in self._crew.workers.values():
            if not worker.held or worker.state in ("FORKING", "STARTING"):
                continue
            head = worker.held[0]
            behind = len(worker.held) > 1 or head.open_items > 1
            if head.state == "HELD" or behind:
                again = True
                self._late.append(Look(worker.worker_id))
            if (
                behind
                and spare > 0
                and worker.freeze is None
                and not worker.stuck
                and now - worker.portion_since >= RECALL_S
            ):
                spare -= self._recall(worker)
        if again:
            self._look_at = now + LOOK_S

    def _recall(self, worker: Worker) -> int:
        """Ask for what `worker` has not started. Return the number of calls."""
        recalled = 0
        for index, call in enumerate(worker.held):
            if call.state in ("HELD", "RUNNING") and not call.cancel_no and (index or call.open_items > 1):
                self._story.add(self._now, call.task_id, "recall", call.state, "RECALLING")
                self._want_freeze(call, "RECALLING")
                recalled += 1
        return recalled

    def _freeze(self) -> None:
        """Send one freeze for each worker of which something is wanted and that is not being frozen."""
        for worker in list(self._to_freeze.values()):
            if worker.freeze is not None:
                continue
            del self._to_freeze[worker.worker_id]
            asked = [call for call in worker.held if call.state in ("RECALLING", "FREEZING")]
            if worker.stuck and worker.killed:
                for call in asked:
                    self._step(call, "STUCK")
                continue
            if not asked or worker.killed:
                continue  # its exit answers
            kill = next((call.seq for call in asked if call.state == "FREEZING"), 0)
            split = next((call.seq for call in asked if call.open_items > 1 and not _is_forced(call)), 0)
            worker.freeze, worker.freeze_split = {call.seq: call for call in asked}, split
            self._out.append(Freeze(worker.worker_id, kill, [call.seq for call in asked], split))

    # Out

    def _flush(self) -> None:
        """Turn what the step collected into messages, splits before anything is said of their tails."""
        out = self._out
        # First what keeps the scheduler from sending back at once what is handed back below.
        for news in self._broken_news:
            out.append(Send(news))
        self._broken_news.clear()
        capacity = 0 if self._draining or self._old_workers else self._crew.task_capacity()
        said = self._said_capacity
        if capacity != said and (not said or not capacity or not (said / 1.5 < capacity < said * 1.5)):
            self._said_capacity = capacity
            out.append(Send(AgentCapacity(capacity, self._crew.max_workers)))
        if self._splits:
            out.append(Send(TaskSplit(self._splits)))
            self._splits = []
        if self._running:
            out.append(Send(TaskRunning(self._running)))
            self._running = []
        if self._results:
            out.append(Send(AgentResult([_whole(row) for row in self._results])))
            self._results = []
        if self._confirms:
            out.append(Send(AgentConfirm(self._confirms)))
            self._confirms = []
        if self._deaths:
            out.append(Send(TaskDied(self._deaths)))
            self._deaths = []
        if self._returned:
            out.append(Send(TaskReturned(self._returned)))
            self._returned = []
        if self._draining and not self._crew.workers and not self._calls and not self._drained:
            self._drained = True
            out += [Send(Bye()), Drained()]
        if self._late:
            out += self._late
            self._late = []


def _is_forced(call: Call) -> bool:
    return bool(call.cancel_no) and call.kind is CancelKind.FORCED


class _Joined(list[bytes]):
    """Results of consecutive items, joined when the batch is complete."""


def _whole(row: Any) -> AgentResultRow:
    return (*row[:5], b"".join(row[5])) if type(row[5]) is _Joined else row


_Cell: TypeAlias = Callable[..., None]

STATES: Final = ("QUEUED", "HELD", "RUNNING", "RECALLING", "STOPPING_SOFT", "FREEZING", "KILLING", "UNWOUND")
EVENTS: Final = (
    "CANCEL",  # by the scheduler: cancel_no, kind
    "UNWOUND",  # by the worker: it was interrupted in this call and does nothing more
    "SKIPPED",  # by the worker: it found the call taken back, or does nothing more
    "NOT_STARTED",  # a freeze found it unclaimed and has taken it back
    "IN_PROGRESS",  # a freeze found it running: at, the first item taken back
    "OVER",  # a freeze found it over
    "KILLED",  # a freeze found it running and its process group has been killed
    "STUCK",  # its worker does not stop, or does not die
    "GRACE_DUE",
    "EXITED_IN_PROGRESS",  # its worker is gone, and this was the call it was in: report
    "EXITED_NOT_STARTED",  # its worker is gone and had not come to it: report
)

_A = AgentState
# A result is not an event of this table: it ends the call in every state, see `_ended`. The call ran to its end, so
# nothing else can be true of it.
_TABLE: dict[str, dict[str, _Cell]] = {
    "QUEUED": {
        "CANCEL": _A._drop_queued,
        # What workers and the forker say is of calls in a worker's hands.
        "UNWOUND": forbidden,
        "SKIPPED": forbidden,
        "NOT_STARTED": forbidden,
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        "STUCK": forbidden,
        "GRACE_DUE": forbidden,
        "EXITED_IN_PROGRESS": forbidden,
        "EXITED_NOT_STARTED": forbidden,
    },
    "HELD": {
        "CANCEL": _A._cancel_held,
        "UNWOUND": _A._unwound_late,
        # Only from a worker that has unwound from the call before it.
        "SKIPPED": _A._not_started,
        # A freeze asks only about calls in RECALLING or FREEZING, and these leave that state by its answer.
        "NOT_STARTED": forbidden,
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        "STUCK": forbidden,
        "GRACE_DUE": forbidden,
        "EXITED_IN_PROGRESS": _A._died,
        "EXITED_NOT_STARTED": _A._not_started,
    },
    "RUNNING": {
        "CANCEL": _A._cancel_running,
        "UNWOUND": _A._unwound_late,
        # It had been claimed when it was seen, but not yet looked at.
        "SKIPPED": _A._not_started,
        "NOT_STARTED": forbidden,
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        "STUCK": forbidden,
        "GRACE_DUE": forbidden,
        "EXITED_IN_PROGRESS": _A._died,
        # Between two items of a run.
        "EXITED_NOT_STARTED": _A._not_started,
    },
    "RECALLING": {
        # A user's cancel over a recall of our own: the freeze tells how far it can go.
        "CANCEL": _A._newest_counts,
        "UNWOUND": _A._unwound_late,
        # The record overtook the forker's report of the freeze.
        "SKIPPED": _A._not_started,
        "NOT_STARTED": _A._not_started,
        "IN_PROGRESS": _A._in_progress,
        "OVER": _A._still_held,
        # What is killed is a call in FREEZING.
        "KILLED": forbidden,
        "STUCK": _A._stuck,
        "GRACE_DUE": forbidden,
        "EXITED_IN_PROGRESS": _A._died,
        "EXITED_NOT_STARTED": _A._not_started,
    },
    "STOPPING_SOFT": {
        "CANCEL": _A._newest_counts,
        "UNWOUND": _A._unwound,
        "SKIPPED": _A._stopped,
        # No freeze asks about it; a report for others says nothing of the time after the interrupt.
        "NOT_STARTED": forbidden,
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        "STUCK": forbidden,
        "GRACE_DUE": _A._kill_at_grace,
        "EXITED_IN_PROGRESS": _A._stopped,
        "EXITED_NOT_STARTED": _A._stopped,
    },
    "FREEZING": {
        "CANCEL": _A._newest_counts,
        # The pipe and the forker are not in order with each other: it unwound, or was skipped, before the freeze.
        "UNWOUND": _A._unwound,
        "SKIPPED": _A._not_started,
        "NOT_STARTED": _A._not_started,
        "IN_PROGRESS": _A._freeze_again,
        "OVER": _A._still_held,
        "KILLED": _A._killing,
        "STUCK": _A._stuck,
        "GRACE_DUE": forbidden,
        "EXITED_IN_PROGRESS": _A._stopped,
        "EXITED_NOT_STARTED": _A._not_started,
    },
    "KILLING": {
        "CANCEL": _A._newest_counts,
        "UNWOUND": _A._stopped,
        "SKIPPED": _A._stopped,
        "NOT_STARTED": forbidden,
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        "STUCK": _A._stuck,
        "GRACE_DUE": forbidden,
        # Not before: a confirm sent while the process may still write a file would be a lie.
        "EXITED_IN_PROGRESS": _A._stopped,
        "EXITED_NOT_STARTED": _A._not_started,
    },
    "UNWOUND": {
        "CANCEL": _A._newest_counts,
        "UNWOUND": forbidden,
        # Said of everything that the worker held.
        "SKIPPED": ignore,
        "NOT_STARTED": forbidden,
        # The answer of a freeze that was under way is not about it any more.
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        # The code has stopped; what does not die of its group is out of anybody's hands.
        "STUCK": _A._stopped,
        "GRACE_DUE": _A._kill_unwound,
        "EXITED_IN_PROGRESS": _A._stopped,
        "EXITED_NOT_STARTED": _A._stopped,
    },
}
TABLE: Final = _TABLE

__all__ = [
    "EVENTS",
    "FENCE_S",
    "STATES",
    "TABLE",
    "AgentState",
    "Drain",
    "Drained",
    "Event",
    "Exited",
    "Fork",
    "ForkFailed",
    "Forked",
    "Freeze",
    "Frozen",
    "Instruction",
    "Interrupt",
    "Kill",
    "Look",
    "NewEpoch",
    "Received",
    "Record",
    "Records",
    "Retire",
    "SchedulerBack",
    "SchedulerLost",
    "Seen",
    "Send",
    "Start",
    "Tick",
]
