"""The agent: owns the workers of one machine, hands calls to them, stops calls, and says what became of each.

It knows what the scheduler, the forker and the workers can say, and has every word of theirs end as a step of a call
or of a worker. It does not know clients' connections, other agents or retries, and makes no attempts. What a step
makes of a call is the table in `agent_calls`; `agent_records` reads what workers write; `agent_dispatch` gives them
calls, by the measures of `agent_crew`; `agent_hiring` orders and dismisses them; `agent_inheritance` knows what they
lack; `agent_output` makes messages of what is to be said.
"""

from __future__ import annotations

from typing import Final

from scaler_executor.protocol.agent_calls import EVENTS, STATES, TABLE, AgentCalls
from scaler_executor.protocol.agent_crew import UNLIMITED, AgentFunction, Call, Client, Crew
from scaler_executor.protocol.agent_dispatch import Dispatch
from scaler_executor.protocol.agent_events import (
    Disinherited,
    Drain,
    Drained,
    Event,
    Exited,
    Fork,
    Forked,
    ForkFailed,
    Freeze,
    FromWorker,
    Frozen,
    Instruction,
    Interrupt,
    Kill,
    Look,
    NewEpoch,
    Printed,
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
    ToWorker,
)
from scaler_executor.protocol.agent_hiring import Hiring
from scaler_executor.protocol.agent_inheritance import Inheritance
from scaler_executor.protocol.agent_lending import Lending
from scaler_executor.protocol.agent_output import AgentOutput
from scaler_executor.protocol.agent_prints import Prints
from scaler_executor.protocol.agent_records import RecordReader
from scaler_executor.protocol.agent_timeouts import MAX_TIMEOUT_S, Timeouts
from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.machine import Transition, unreachable
from scaler_executor.protocol.messages import (
    Blocked,
    Bye,
    CancelKind,
    ClientGone,
    ClientLimit,
    ClientLimited,
    Function,
    InheritanceReplaced,
    Nested,
    Refused,
    TaskCancel,
    TaskCancelConfirmType,
    TaskRun,
    ToAgentMessage,
    Welcome,
)
from scaler_executor.protocol.priorities import with_priorities

#: An agent that has lost its scheduler stops its calls after so long; shorter than `scheduler.FENCE_S` by more than
#: clocks differ.
FENCE_S: Final = 8.0

NOT_FOUND: Final = TaskCancelConfirmType.CANCEL_NOT_FOUND


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
        self._output = AgentOutput()
        self._crew = Crew(max_workers, max_items_per_worker)
        self._inheritance = Inheritance(self._output)
        self._hiring = Hiring(self._crew, self._inheritance, self._output)
        self._timeouts = Timeouts(self._output)
        self._calls = AgentCalls(self._crew, self._hiring, self._timeouts, self._output, cancel_grace_s)
        self._lending = Lending(self._crew, self._hiring, self._calls, self._output)
        self._dispatch = Dispatch(self._crew, self._hiring, self._inheritance, self._calls, self._output)
        self._prints = Prints(self._crew, self._calls, self._output)
        self._reader = RecordReader(self._crew, self._hiring, self._calls, self._timeouts, self._output)
        #: {(client_id, function_id): AgentFunction}
        self._functions: dict[tuple[int, int], AgentFunction] = {}
        #: When calls are stopped for want of a scheduler, or None.
        self._fence_at: float | None = None
        #: Some limit has not been answered, see `ClientLimit`.
        self._limits_open = False
        self._drained = False

    # The four methods that every state class has

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in and return what is to be done, in order.

        Raises:
            RemoteProtocolError: The scheduler broke the protocol.
        """
        self._output.begin(now)
        prints = self._prints
        if isinstance(event, Records):
            self._reader.read(event)
            if prints.pending:
                prints.finish(event.worker_id, is_gone=False)
        elif isinstance(event, Received):
            self._received(event.message)
        elif isinstance(event, Tick):
            pass
        elif isinstance(event, Seen):
            self._reader.seen(event)
        elif isinstance(event, Frozen):
            self._frozen(event)
        elif isinstance(event, Exited):
            self._exited(event)
        elif isinstance(event, Forked):
            self._hiring.forked(self._crew.workers[event.worker_id], event.pid)
        elif isinstance(event, ForkFailed):
            self._fork_failed(event)
        elif isinstance(event, Disinherited):
            self._inheritance.lost(event.reason)
        elif isinstance(event, SchedulerLost):
            if not self._calls.fenced:
                self._fence_at = now + FENCE_S - event.unheard_s
        elif isinstance(event, SchedulerBack):
            self._fence_at, self._calls.fenced = None, False
        elif isinstance(event, NewEpoch):
            self._new_epoch()
        elif isinstance(event, FromWorker):
            self._lending.said(event)
        elif isinstance(event, Printed):
            prints.add(event)
        elif isinstance(event, Drain):
            self._drain()
        else:
            unreachable(event)
        if prints.pending:
            prints.send_due()
        self._timers()
        if self._lending.is_at_work:
            self._lending.give_back()
        self._dispatch.give_out()
        self._dispatch.freeze()
        if self._hiring.gone_clients:
            self._settle_gone()
        if self._limits_open:
            self._say_limited()
        return self._end()

    def next_deadline(self) -> float | None:
        """Return when the next Tick is due, or None."""
        stopping, hire_at, look_at = self._calls.stopping, self._hiring.hire_at, self._dispatch.look_at
        share_at, kill_at, timed = self._dispatch.sharing.due_at, self._hiring.kill_at, self._timeouts.running
        prints_at = self._prints.due_at() if self._prints.pending else None
        others = hire_at, share_at, kill_at, self._fence_at, self._lending.due_at, prints_at
        if not stopping and not timed and others == (None, None, None, None, None, None):
            return look_at  # the common case
        deadlines = [call.grace_due for call in stopping.values()]
        deadlines += self._timeouts.deadlines()
        deadlines += [at for at in (look_at, *others) if at is not None]
        return min(deadlines, default=None)

    def story(self, task_id: int) -> list[Transition]:
        """Return what is remembered of a task: everything but the ordinary steps."""
        return self._calls.story.of(task_id)

    def check(self) -> None:
        """Assert the invariants."""
        crew, calls = self._crew, self._calls
        queued = [call for call in calls.by_id.values() if call.state == "QUEUED"]
        for client in crew.clients.values():
            own = [call for call in queued if call.client is client]
            assert client.queued == len(own), (client.queued, len(own))
            assert client.queued_items == sum(call.open_items for call in own)
            assert client.staff == sum(worker.client is client and worker.counts for worker in crew.workers.values())
            assert not client.owes or len(crew.clients) > 1
            assert not (client.queued and client.owes and self._idle_of(client)), client.client_id
        assert {call.client for call in calls.by_id.values()} <= set(crew.clients.values())
        waiting = {id(call) for client in crew.clients.values() for call in client.queue}
        for task_id, call in calls.by_id.items():
            assert call.task_id == task_id
            assert 0 <= call.start < call.items, (task_id, call.start, call.items)
            assert (call.state == "QUEUED") == (call.worker is None), (task_id, call.state)
            assert call.worker is None or call in call.worker.held, task_id
            assert call.worker is None or call.worker.worker_id in crew.workers
            assert call.state != "QUEUED" or (id(call) in waiting and not call.cancel_no)
            timeout_s = call.function.function.options.timeout_s
            if call.state == "RUNNING" and timeout_s is not None and timeout_s <= MAX_TIMEOUT_S:
                assert any(other is call for other in self._timeouts.running.values()), task_id
            is_stopping = task_id in calls.stopping
            assert is_stopping if call.state == "STOPPING_SOFT" else call.state == "UNWOUND" or not is_stopping, task_id
            if call.state in ("RECALLING", "FREEZING"):
                worker = call.worker
                assert worker is not None
                asked = worker.freeze is not None and worker.freeze.get(call.seq) is call
                assert asked or worker.killed or worker.worker_id in calls.to_freeze, task_id
        for worker in crew.workers.values():
            seqs = [call.seq for call in worker.held]
            assert seqs == sorted(set(seqs)), seqs
            assert all(calls.by_id.get(call.task_id) is call and call.worker is worker for call in worker.held)
            assert all(call.client is worker.client for call in worker.held)
            is_parked = worker.worker_id in crew.parked
            assert worker.counts == (worker.state != "LEAVING" and not worker.is_lent and not is_parked)
            assert not is_parked or not (worker.held or worker.is_lent or worker.state == "LEAVING")
            assert not worker.is_lent or worker.held or worker.state == "LEAVING", worker.worker_id
            assert worker.worker_id not in self._lending.wanting or worker.is_lent
            assert (worker.worker_id in crew.idle) == (
                worker.state == "READY" and not worker.held and not worker.portions and not is_parked
            ), (worker.worker_id, worker.state)
            assert not worker.held or worker.state in ("READY", "LEAVING")
        assert sum(worker.counts for worker in crew.workers.values()) == crew.staff
        overdrawn = sum(worker.counts and worker.is_overdrawn for worker in crew.workers.values())
        assert crew.staff <= crew.max_workers + overdrawn
        assert self._output.is_empty()

    def _idle_of(self, client: Client) -> list[int]:
        return [worker.worker_id for worker in self._crew.idle.values() if worker.client is client]

    @property
    def outstanding(self) -> int:
        """Number of tasks that are here."""
        return len(self._calls.by_id)

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
                call = self._calls.by_id.get(task_id)
                if call is None:
                    self._output.confirms.append((task_id, 0, cancel_no, NOT_FOUND, 0))
                else:
                    self._calls.step(call, "CANCEL", cancel_no, CancelKind(kind))
        elif isinstance(message, ClientGone):
            self._client_gone(message.client_id)
        elif isinstance(message, InheritanceReplaced):
            self._inheritance.replaced(message.client_id, message.definitions)
        elif isinstance(message, ClientLimit):
            self._limit(message)
        elif isinstance(message, Nested):
            self._lending.told(message)
        elif isinstance(message, Blocked):
            for worker in self._lending.lend(message):
                self._dispatch.recall(worker)
        elif isinstance(message, Welcome):
            pass
        elif isinstance(message, (Refused, Bye)):
            self._drain()
        else:
            unreachable(message)

    def _run(self, message: TaskRun) -> None:
        functions, calls, crew = self._functions, self._calls.by_id, self._crew
        broken, draining = self._hiring.broken, self._hiring.draining
        for client_id, function in message.functions:
            if function.options.priority:
                asking = crew.client(client_id)
                asking.queue = with_priorities(asking.queue)
            functions[client_id, function.function_id] = AgentFunction(
                function,
                lambda needed, client_id=client_id: functions.get((client_id, needed)),  # type: ignore[misc]
            )
        client: Client | None = None
        for task_id, attempt, client_id, items, skip, function_id, payload in message.tasks:
            if task_id in calls or items < 1 or skip < 0:
                raise RemoteProtocolError(f"task {task_id} of {items} items, skip {skip}")
            if client is None or client.client_id != client_id:
                client = crew.client(client_id)
                append = client.queue.append
                refused = draining or client_id in broken or client.max_workers == 0
            if refused:
                self._output.returned.append((task_id, attempt))  # it crossed the news
                continue
            used = functions.get((client_id, function_id))
            if used is None:
                if function_id:
                    raise RemoteProtocolError(f"task {task_id} names function {function_id}, which is not known")
                used = functions[client_id, 0] = AgentFunction(Function(0, "", b"", 0), lambda _: None)
            call = calls[task_id] = Call(task_id, attempt, client, items, skip, used, payload)
            append(call)
            client.queued += 1
            client.queued_items += items
        for key in message.forget:
            functions.pop(key, None)

    def _client_gone(self, client_id: int) -> None:
        # Its calls are cancelled one by one, by the scheduler; this is about the time that they get, and its workers.
        self._calls.client_gone(client_id)
        for key in [key for key in self._functions if key[0] == client_id]:
            del self._functions[key]
        self._hiring.client_gone(client_id)
        self._inheritance.client_gone(client_id)
        if client_id in self._crew.clients:
            self._crew.clients[client_id].limit_no = 0  # nobody waits for the answer

    def _limit(self, message: ClientLimit) -> None:
        """Note what a client may have here, which may take time to become true."""
        workers, items = message.max_workers, message.max_items_per_worker
        if (workers is not None and workers < 0) or (items is not None and items < 1):
            raise RemoteProtocolError(f"limits {message.max_workers}, {message.max_items_per_worker}")
        client = self._crew.client(message.client_id)
        client.max_workers = UNLIMITED if message.max_workers is None else message.max_workers
        client.max_items_per_worker = message.max_items_per_worker or self._crew.max_items_per_worker
        client.limit_no = message.limit_no
        self._limits_open = True
        if not client.max_workers:
            self._calls.hand_back(client.client_id)
        self._hiring.retire_surplus(client)

    def _say_limited(self) -> None:
        """Answer the limits that are kept by now."""
        crew = self._crew
        self._limits_open = False
        for client in crew.clients.values():
            if client.limit_no and crew.in_use(client) <= client.max_workers:
                self._output.instructions.append(Send(ClientLimited(client.client_id, client.limit_no)))
                client.limit_no = 0
            self._limits_open |= client.limit_no > 0

    def _settle_gone(self) -> None:
        """Forget the clients that are gone and of which nothing is left here: neither a worker nor a call."""
        hiring = self._hiring
        left = {worker.client_id for worker in self._crew.workers.values()}
        if not hiring.gone_clients <= left:
            left.update(call.client.client_id for call in self._calls.by_id.values())
            for client_id in hiring.gone_clients - left:
                self._crew.forget_client(client_id)
                self._prints.forget_client(client_id)
            hiring.gone_clients &= left

    def _drain(self) -> None:
        self._hiring.draining = True
        self._calls.hand_back(None)
        self._hiring.retire_unused(None)

    def _new_epoch(self) -> None:
        """Forget all calls and clients: their numbers may come again and mean others. Room is offered when the old
        workers are gone."""
        self._fence_at = None
        self._hiring.draining = self._drained = False
        self._output.said_capacity = 0
        self._calls.forget_all()
        self._functions.clear()
        self._prints.forget_all()
        self._inheritance.forget_all()
        self._hiring.kill_all()
        self._crew.clients.clear()

    # From the forker

    def _fork_failed(self, event: ForkFailed) -> None:
        worker = self._crew.workers[event.worker_id]
        self._hiring.reaped(worker)
        if not event.forker_lost:
            reason = self._hiring.fork_failed(worker, event.reason)
            if reason is not None and self._lending.lends_all(worker.client):
                self._lending.fail(worker.client, reason)
            elif reason is not None:
                self._calls.break_client(worker.client_id, reason)

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
            self._hiring.leave(worker)
            worker.killed = True
        worker.stuck = event.stuck
        if event.stuck:
            # Also of those about which no freeze was sent because the worker was killed: nobody else will answer them.
            states = {"RECALLING", "FREEZING", "KILLING", "UNWOUND"} if event.killed else {"RECALLING", "FREEZING"}
            asked = [call for call in worker.held if call.state in states]
        for call in asked:
            if event.stuck:
                self._calls.step(call, "STUCK")
            elif call.seq > event.current:
                self._calls.step(call, "NOT_STARTED")
            elif call.seq < event.current or event.done >= event.current:
                self._calls.step(call, "OVER")
            elif event.killed:
                self._calls.step(call, "KILLED")
            elif call.seq != split_seq and call.state == "RECALLING" and call.open_items > 1 and not call.is_forced:
                self._calls.want_freeze(call, "RECALLING")  # another run was in progress when it was asked to be split
            else:
                at = call.given_from + event.item + 1 if call.seq == split_seq else call.items
                self._calls.step(call, "IN_PROGRESS", min(at, call.items))
        if any(call.state in ("RECALLING", "FREEZING") for call in worker.held):
            self._calls.to_freeze[worker.worker_id] = worker  # asked for while the freeze was under way
        self._hiring.rest(worker)

    def _exited(self, event: Exited) -> None:
        worker = self._crew.workers[event.worker_id]
        self._lending.exited(worker)
        self._prints.finish(event.worker_id, is_gone=True)
        self._hiring.reaped(worker)
        self._calls.to_freeze.pop(event.worker_id, None)
        self._timeouts.exited(event.worker_id)
        cause = "\n".join(filter(None, (event.report.reason, event.report.last_words)))
        if worker.state in ("FORKING", "STARTING"):
            reason = None if event.forker_lost else self._hiring.start_failed(worker, cause)
            if reason is not None:
                self._calls.break_client(worker.client_id, reason)
        elif worker.state == "READY" and worker.held:
            # One that dies idle is replaced when there is work: it may be what its initializer started that ends it.
            self._hiring.leave(worker)
            if event.current:
                self._hiring.unused_deaths.pop(worker.client_id, None)  # those that come to a call are of use
            elif not event.forker_lost:
                reason = self._hiring.died_unused(worker, cause)
                if reason is not None:
                    self._calls.break_client(worker.client_id, reason)
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
                self._calls.step(call, "EXITED_IN_PROGRESS", event.report)
            else:
                # Not claimed, or between two items of a run.
                self._calls.step(call, "EXITED_NOT_STARTED", event.report)
        assert not worker.held

    # Each time

    def _timers(self) -> None:
        now = self._output.now
        calls, hiring, dispatch = self._calls, self._hiring, self._dispatch
        if hiring.hire_at is not None and hiring.hire_at <= now:
            hiring.hire_at = None
        if hiring.kill_at is not None and hiring.kill_at <= now:
            hiring.kill_lingering()
        if self._fence_at is not None and self._fence_at <= now:
            self._fence_at = None
            calls.stop_all()
        if calls.stopping:
            for call in [call for call in calls.stopping.values() if call.grace_due <= now]:
                calls.step(call, "GRACE_DUE")
        if self._timeouts.running:
            for call in self._timeouts.take_due():
                if call.state == "RUNNING":  # else it is over, or being stopped already
                    calls.step(call, "TIMEOUT")
        if dispatch.look_at is not None and dispatch.look_at <= now:
            dispatch.look_at = None
            dispatch.look()

    def _end(self) -> list[Instruction]:
        """Say what the event has led to, whether there is room for more, and whether this is the end."""
        crew, hiring = self._crew, self._hiring
        capacity = 0 if hiring.draining or hiring.old_workers else crew.task_capacity()
        drained = hiring.draining and not crew.workers and not self._calls.by_id and not self._drained
        if drained:
            self._drained = True
        return self._output.end(capacity, crew.max_workers, drained=drained)


__all__ = [
    "EVENTS",
    "FENCE_S",
    "STATES",
    "TABLE",
    "AgentState",
    "Disinherited",
    "Drain",
    "Drained",
    "Event",
    "Exited",
    "Fork",
    "ForkFailed",
    "Forked",
    "Freeze",
    "FromWorker",
    "Frozen",
    "Instruction",
    "Interrupt",
    "Kill",
    "Look",
    "NewEpoch",
    "Printed",
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
    "ToWorker",
]
