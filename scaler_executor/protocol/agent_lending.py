"""Slots that are lent: a call that waits for nested calls lets another one run in its place.

Who waits lends: its worker does not count as one of those that there may be, once the scheduler has said that what it
waits for has been offered a place (so it stands in the queue here, if it is to run here, and has the slot rather than
anything else). Who has waited wants its slot back, and goes on when it has it: before anything new is started, but not
before something else is over or waits in its turn. A worker whose slot is given back has nothing to do and does not
count either: it is *parked*, and is there for the next call that may be started, or exits after a while. So recursion
takes as many processes as it is deep, and starts them once.

No call waits for ever for its slot: who has one ends or waits, and holds no slot then.

This module knows workers and what their sessions say of waiting, and passes on all else that these say or are told. It
does not know what the nested calls are.
"""

from __future__ import annotations

from typing import Final

from scaler_executor.protocol.agent_calls import AgentCalls
from scaler_executor.protocol.agent_crew import UNLIMITED, Client, Crew, Worker
from scaler_executor.protocol.agent_events import FromWorker, Send, ToWorker
from scaler_executor.protocol.agent_hiring import Hiring
from scaler_executor.protocol.agent_output import AgentOutput
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    Blocked,
    Bye,
    DeathReport,
    Hello,
    Nested,
    TaskCancel,
    TaskSubmit,
    Unblocked,
)

#: A worker is parked for no longer than this while nobody lends a slot.
PARKED_S: Final = 1.0


class Lending:
    """The sessions and slots of the workers of one agent."""

    def __init__(self, crew: Crew, hiring: Hiring, calls: AgentCalls, output: AgentOutput) -> None:
        self._crew = crew
        self._hiring = hiring
        self._calls = calls
        self._output = output
        #: Workers that want their slots back, the one that has waited longest first.
        self.wanting: dict[int, Worker] = {}
        #: When parked workers exit next, or None.
        self.due_at: float | None = None

    # What sessions say and hear

    def said(self, event: FromWorker) -> None:
        """Take in what the session of a worker says."""
        worker = self._crew.workers.get(event.worker_id)
        message = event.message
        if worker is None or worker.worker_id in self._hiring.old_workers:
            return  # it crossed its end
        if isinstance(message, Blocked):
            self._blocked(worker, message)
        elif isinstance(message, Unblocked):
            self._unblocked(worker, message)
        elif isinstance(message, TaskSubmit):
            parent, item = _parent(worker, message.parent)
            message.parent = 0
            self._pass_on(worker, message, parent, item)
        else:
            worker.has_session = worker.has_session or isinstance(message, Hello)
            self._pass_on(worker, message)

    def _pass_on(
        self, worker: Worker, message: Hello | Bye | TaskSubmit | TaskCancel, parent: int = 0, item: int = 0
    ) -> None:
        self._output.instructions.append(
            Send(Nested(worker.worker_id, message, worker.client_id, parent=parent, item=item))
        )

    def told(self, message: Nested) -> None:
        """Pass on what the scheduler says to a session."""
        if message.worker_id in self._crew.workers:
            self._output.instructions.append(ToWorker(message.worker_id, message.message))  # type: ignore[arg-type]

    def exited(self, worker: Worker) -> None:
        """A worker is gone, and its session with it."""
        self.wanting.pop(worker.worker_id, None)
        worker.asked_for = 0
        if worker.has_session:
            worker.has_session = False
            self._pass_on(worker, Bye(force=True))

    # Who waits

    def _blocked(self, worker: Worker, message: Blocked) -> None:
        call = worker.held[0] if worker.held else None
        if self.wanting.pop(worker.worker_id, None) is not None:
            # Another thread of the call waits again: the one that wants to go on may, and the slot stays lent.
            self._output.instructions.append(ToWorker(worker.worker_id, Unblocked(message.tasks)))
            return
        if call is None or message.tasks != [call.seq] or worker.state != "READY" or worker.asked_for == call.task_id:
            return  # it is over, or is being stopped, or has said so
        # An earlier call may have asked and ended before the answer, which is nothing to this one.
        worker.asked_for = call.task_id
        self._output.instructions.append(Send(Blocked([call.task_id])))

    def lend(self, message: Blocked) -> list[Worker]:
        """Let others have the slots of calls that wait. Return their workers."""
        lenders = []
        for task_id in message.tasks:
            call = self._calls.by_id.get(task_id)
            worker = call.worker if call is not None else None
            if worker is not None and worker.asked_for == task_id and worker.state == "READY" and not worker.is_lent:
                self._hiring.count_out(worker)
                worker.is_lent = True
                lenders.append(worker)
        return lenders

    def _unblocked(self, worker: Worker, message: Unblocked) -> None:
        if worker.is_lent and worker.state == "READY" and worker.held and message.tasks == [worker.held[0].seq]:
            if message.at_once:
                self._have(worker)
            else:
                self.wanting[worker.worker_id] = worker
        else:
            self._go_on(worker, message.tasks[0] if message.tasks else 0)

    def _go_on(self, worker: Worker, seq: int) -> None:
        task_id, worker.asked_for = worker.asked_for, 0
        if task_id:
            self._output.instructions.append(Send(Unblocked([task_id])))
        self._output.instructions.append(ToWorker(worker.worker_id, Unblocked([seq])))

    # Who has a slot

    @property
    def is_at_work(self) -> bool:
        """Whether `give_back` may have something to do."""
        return bool(self._crew.parked or self.wanting or self._crew.is_wanted or self.due_at is not None)

    def give_back(self) -> None:
        """Give slots back to those who want them, and let workers that are parked have what is left."""
        crew = self._crew
        for worker in list(self.wanting.values()):
            if worker.state != "READY" or not worker.held:
                del self.wanting[worker.worker_id]  # it is being stopped, or its call has ended elsewhere
                if worker.state != "READY":
                    worker.asked_for = 0
            elif self._make_room(worker):
                del self.wanting[worker.worker_id]
                self._have(worker)
        crew.is_wanted = bool(self.wanting)
        for worker in list(crew.parked.values()):
            client = worker.client
            is_free = crew.staff < crew.max_workers and not crew.is_full(client) and not crew.is_wanted
            idle = sum(other.client is client for other in crew.idle.values())
            is_wanted = client.queued_items > idle and self._hiring.serves(client)
            if is_free and is_wanted and worker.state == "READY":
                self._unpark(worker)
        self._let_go()

    def _have(self, worker: Worker) -> None:
        """Give a worker a slot, of which there may be none: then nothing is started until there is one too few."""
        worker.is_lent = False
        self._hiring.count_in(worker)
        worker.is_overdrawn = self._crew.staff > self._crew.max_workers
        self._go_on(worker, worker.held[0].seq)

    def _make_room(self, worker: Worker) -> bool:
        """Tell whether there is a slot for a worker that wants its own back. Takes that of one with nothing to do."""
        crew, client = self._crew, worker.client
        # Where the client may have none here any more, its calls are not left for that.
        is_full = client.max_workers != UNLIMITED and client.staff >= max(1, client.max_workers)
        if crew.staff < crew.max_workers and not is_full:
            return True
        others = [other for other in crew.workers.values() if _is_free(other)]
        own = next((other for other in others if other.client is client), None)
        if own is None and (is_full or not others):
            return False
        self._park(own or others[0])
        return True

    def _park(self, worker: Worker) -> None:
        self._crew.idle.pop(worker.worker_id, None)
        self._hiring.count_out(worker)
        self.park_uncounted(worker)

    def park_uncounted(self, worker: Worker) -> None:
        """Park a worker with nothing in its hands that does not count."""
        worker.is_lent = False
        worker.asked_for = 0
        worker.idle_since = self._output.now
        self._crew.parked[worker.worker_id] = worker

    def _unpark(self, worker: Worker) -> None:
        del self._crew.parked[worker.worker_id]
        self._hiring.count_in(worker)
        self._hiring.rest(worker)

    def _let_go(self) -> None:
        """Let parked workers exit that nobody has wanted for a while."""
        crew, now = self._crew, self._output.now
        self.due_at = None
        if not crew.parked:
            return
        if any(worker.is_lent for worker in crew.workers.values()):
            for worker in crew.parked.values():
                worker.idle_since = now
            return
        for worker in list(crew.parked.values()):
            if worker.idle_since + PARKED_S <= now:
                self._hiring.retire(worker)
            else:
                due = worker.idle_since + PARKED_S
                self.due_at = due if self.due_at is None else min(self.due_at, due)

    def lends_all(self, client: Client) -> bool:
        """Tell whether every worker of a client waits for others, so that none of them comes back before another one
        is there."""
        own = [worker for worker in self._crew.workers.values() if worker.client is client]
        return bool(own) and all(worker.is_lent for worker in own)

    def fail(self, client: Client, reason: str) -> None:
        """No further worker can be started, and those that there are wait: fail what they may wait for."""
        for call in [call for call in client.queue if call.state == "QUEUED"]:
            if call.task_id >> CLIENT_ID_SHIFT != client.client_id:
                self._output.deaths.append((*self._calls.take_out(call), DeathReport(reason=reason)))


def _is_free(worker: Worker) -> bool:
    has_work = worker.held or worker.portions
    return worker.counts and worker.state != "LEAVING" and not worker.retired and not has_work


def _parent(worker: Worker, said: int) -> tuple[int, int]:
    """Return the task, and its item, that a worker means by the parent of what it submits; 0: it is over."""
    seq, item = said >> 32, said & 0xFFFFFFFF
    call = next((call for call in worker.held if call.seq == seq), None) if seq else None
    return (call.task_id, call.given_from + item) if call is not None else (0, 0)
