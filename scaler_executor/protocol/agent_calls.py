"""What becomes of a call at an agent: the table at the end of this file.

It knows the state of every call that the scheduler believes is here, and what each event makes of it. It does not
know how an event got here (`agent` and `agent_records` have looked at what was said of whom), nor which worker is
given a call (`agent_dispatch`).

One call is in exactly one of these states:

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

from scaler_executor.protocol.agent_crew import Call, CallState, Crew, Worker
from scaler_executor.protocol.agent_events import Interrupt, Kill
from scaler_executor.protocol.agent_hiring import Hiring
from scaler_executor.protocol.agent_output import AgentOutput
from scaler_executor.protocol.agent_timeouts import Timeouts
from scaler_executor.protocol.machine import Story, forbidden, ignore
from scaler_executor.protocol.messages import CancelKind, DeathReport, ResultKind, TaskCancelConfirmType

#: In the place of a cancel_no: the call is stopped for want of a scheduler.
FENCED: Final = -1
#: The same: it has run for longer than its timeout.
EXPIRED: Final = -2
#: No call has longer than this to unwind, for nobody can wait for longer in one piece: eleven days.
MAX_GRACE_S: Final = 1e6
#: A call whose client is gone has no longer than this to unwind, whatever its client had allowed.
GONE_GRACE_S: Final = 1.0

TIMED_OUT: Final = int(ResultKind.TIMED_OUT)
CANCELED: Final = TaskCancelConfirmType.CANCELED
FAILED: Final = TaskCancelConfirmType.CANCEL_FAILED


class AgentCalls:
    """All calls of one agent."""

    def __init__(
        self, crew: Crew, hiring: Hiring, timeouts: Timeouts, output: AgentOutput, cancel_grace_s: float
    ) -> None:
        self._crew = crew
        self._hiring = hiring
        self._timeouts = timeouts
        self._output = output
        self._cancel_grace_s = cancel_grace_s
        #: {task_id: Call}: every task that the scheduler believes is here.
        self.by_id: dict[int, Call] = {}
        #: Calls in STOPPING_SOFT and those that have unwound since, for their deadlines.
        self.stopping: dict[int, Call] = {}
        #: Workers with calls in RECALLING or FREEZING about which no freeze has been sent.
        self.to_freeze: dict[int, Worker] = {}
        #: The scheduler was lost for too long: nothing is started until it is back.
        self.fenced = False
        self.story = Story()

    def step(self, call: Call, event: str, *details: Any) -> None:
        """Do what the table says of this event in the state of `call`."""
        before = call.state
        TABLE[before][event](self, call, *details)
        self.story.add(self._output.now, call.task_id, event, before, call.state, repr(details) if details else "")

    def ended(self, call: Call) -> None:
        """The call's last item has its result: whatever it was that we wanted of it, this answers."""
        if call.state == "STOPPING_SOFT":
            del self.stopping[call.task_id]
        worker = call.worker
        assert worker is not None
        if worker.held[0] is call:
            worker.held.popleft()
        else:
            worker.held.remove(call)
        del self.by_id[call.task_id]
        call.state, call.worker, call.payload = "GONE", None, b""

    def take_back_unstarted(self, worker: Worker) -> None:
        """The worker has promised to start nothing more: free what it holds."""
        for call in reversed(list(worker.held)):
            self.step(call, "SKIPPED")

    def hand_back(self, client_id: int | None) -> None:
        """Give what is queued (of one client) back to the scheduler."""
        for client in self._crew.clients.values():
            if client_id in (None, client.client_id):
                queued = [call for call in client.queue if call.state == "QUEUED"]
                self._output.returned += map(self.take_out, queued)

    def take_out(self, call: Call) -> tuple[int, int]:
        """Forget a queued call. Return the number and attempt of what is outstanding of it."""
        self._unqueue(call)
        if call.start:
            call = self.split_tail(call, call.start)
        self._forget(call)
        return call.task_id, call.attempt

    def forget_all(self) -> None:
        """Forget all calls: their numbers may come again and mean others."""
        self.fenced = False
        for call in list(self.by_id.values()):
            if call.state == "QUEUED":
                self._unqueue(call)
            else:
                self._release(call)
            self._forget(call)

    def break_client(self, client_id: int, reason: str) -> None:
        """No worker can be started for a client: hand back its calls."""
        if self._hiring.give_up(client_id, reason):
            self.hand_back(client_id)

    def client_gone(self, client_id: int) -> None:
        """Nobody waits any more for the calls of this client that are being stopped."""
        for call in self.stopping.values():
            if call.client.client_id == client_id:
                call.grace_due = min(call.grace_due, self._output.now + GONE_GRACE_S)

    def stop_all(self) -> None:
        """Stop all calls at once and start none, for the scheduler may soon take it that they have stopped.

        What becomes of them is said as ever: the scheduler hears of it if the connection goes on after all.
        """
        self.fenced = True
        self.hand_back(None)
        for call in list(self.by_id.values()):
            if call.state in ("HELD", "RUNNING", "RECALLING", "STOPPING_SOFT"):
                self.stopping.pop(call.task_id, None)
                self.story.add(self._output.now, call.task_id, "fence", call.state, "FREEZING")
                call.cancel_no, call.kind = call.cancel_no or FENCED, CancelKind.FORCED
                self.want_freeze(call, "FREEZING")

    # Cells of the table. Each takes the call and what the event carries.

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
            self.want_freeze(call, "RECALLING")

    def _cancel_running(self, call: Call, cancel_no: int, kind: CancelKind) -> None:
        call.cancel_no, call.kind = cancel_no, kind
        if kind is CancelKind.FORCED:
            self._stop(call)
        elif call.open_items > 1:
            self.want_freeze(call, "RECALLING")  # the items that it has not come to
        else:
            self._refuse(call)

    def _newest_counts(self, call: Call, cancel_no: int, kind: CancelKind) -> None:
        if call.cancel_no == EXPIRED and kind is not CancelKind.FORCED:
            # It runs, so there is nothing to take back, and what it is being stopped for stands.
            self._output.confirms.append((call.task_id, call.attempt, cancel_no, FAILED, 0))
            return
        call.cancel_no, call.kind = cancel_no, kind

    def _expire(self, call: Call) -> None:
        call.cancel_no, call.kind = EXPIRED, CancelKind.FORCED
        self._stop(call)

    def _not_started(self, call: Call, *_: Any) -> None:
        """It has not started (or not gone on, for a run), and its worker will not come to it: taken back, or the
        worker is gone."""
        self._release(call)
        if call.cancel_no and call.cancel_no != EXPIRED:
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
        self._timeouts.seen_running(call)
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
            self._requeue(self.split_tail(call, at))

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
        self.want_freeze(call, "FREEZING")

    def _kill_at_grace(self, call: Call) -> None:
        del self.stopping[call.task_id]
        self.want_freeze(call, "FREEZING")

    def _killing(self, call: Call) -> None:
        call.state = "KILLING"

    def _unwound(self, call: Call) -> None:
        # Its code has stopped, but a subprocess of it may run on: that goes with the group of the worker, which exits
        # by itself. The grace time goes on, for its finalizers may hang.
        call.state = "UNWOUND"
        if call.task_id not in self.stopping:
            self._kill_unwound(call)  # it is over already

    def _kill_unwound(self, call: Call) -> None:
        worker = call.worker
        assert worker is not None
        self.stopping.pop(call.task_id, None)
        if not worker.killed:
            worker.killed = True
            self._output.instructions.append(Kill(worker.worker_id))

    def _stuck(self, call: Call) -> None:
        call.state = "HELD"
        if call.cancel_no == EXPIRED:
            self._kill_unwound(call)
            self._timed_out(call, ", and its worker cannot be stopped")
        elif call.cancel_no == FENCED:
            call.cancel_no = 0
        elif call.cancel_no:
            self._refuse(call)

    def _stopped(self, call: Call, *_: Any) -> None:
        """The code has stopped, or was not started: unwound, skipped, or its process group is gone."""
        if call.cancel_no == FENCED:
            call.cancel_no = 0
            self._died(call, DeathReport(reason="its machine was cut off from the scheduler, and stopped it"))
            return
        if call.cancel_no == EXPIRED:
            self._timed_out(call)
            return
        self._release(call)
        self._confirm_canceled(call)

    def _died(self, call: Call, report: DeathReport) -> None:
        """Its worker died in it: in the first outstanding item, the others never started."""
        if (call.cancel_no > 0 and call.is_forced) or call.cancel_no == EXPIRED:
            self._stopped(call)
            return
        self._release(call)
        if call.open_items > 1:
            if call.cancel_no > 0:
                self._cancel_tail(call, call.start + 1)
            else:
                self._requeue(self.split_tail(call, call.start + 1))
        self._forget(call)
        self._output.deaths.append((call.task_id, call.attempt, report))

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
        if call.client.client_id in self._hiring.gone_clients:
            grace_s = min(grace_s, GONE_GRACE_S)
        grace_s = min(grace_s, MAX_GRACE_S)
        self._hiring.leave(worker)
        if not grace_s > 0:  # nor is it a number, perhaps: the client says what it likes
            self.want_freeze(call, "FREEZING")
            return
        call.state = "STOPPING_SOFT"
        call.grace_due = self._output.now + grace_s
        self.stopping[call.task_id] = call
        self._output.instructions.append(Interrupt(worker.worker_id, call.seq))

    def want_freeze(self, call: Call, state: CallState) -> None:
        """Have the worker of `call` frozen; `state` says what for."""
        call.state = state
        assert call.worker is not None
        self.to_freeze[call.worker.worker_id] = call.worker

    def _refuse(self, call: Call) -> None:
        self._output.confirms.append((call.task_id, call.attempt, call.cancel_no, FAILED, 0))
        call.cancel_no = 0

    def _timed_out(self, call: Call, how: str = "") -> None:
        """Answer for a call whose timeout has stopped it. That is its result: nobody tries it again."""
        text = f"ran longer than its timeout of {call.function.function.options.timeout_s:g} s{how}"
        self._output.results.append((call.task_id, call.attempt, call.start, 1, TIMED_OUT, text.encode()))
        self._release(call)
        self._forget(call)

    def _cancel_tail(self, call: Call, at: int) -> None:
        """Confirm that the items from `at` on will not run; those before it are another matter."""
        self._output.confirms.append((call.task_id, call.attempt, call.cancel_no, CANCELED, at))
        call.items = at

    def _stop_tail(self, call: Call, at: int) -> None:
        """Take the items from `at` on out of a call that is being stopped: its worker will not come to them."""
        if call.cancel_no == FENCED:
            self._requeue(self.split_tail(call, at))
        else:
            tail = self.split_tail(call, at)
            tail.cancel_no = call.cancel_no
            self._confirm_canceled(tail)

    def _confirm_canceled(self, call: Call) -> None:
        """Answer for the outstanding items of a call that no worker has, and forget it."""
        self._forget(call)
        if call.cancel_no == FENCED:
            self._output.returned.append((call.task_id, call.attempt))
        else:
            self._output.confirms.append((call.task_id, call.attempt, call.cancel_no, CANCELED, call.start))

    def _forget(self, call: Call) -> None:
        del self.by_id[call.task_id]
        call.state, call.payload = "GONE", b""

    def _release(self, call: Call) -> None:
        """Take a call out of its worker's hands."""
        self.stopping.pop(call.task_id, None)
        assert call.worker is not None
        call.worker.held.remove(call)
        call.worker, call.seq = None, 0

    def _unqueue(self, call: Call) -> None:
        client = call.client
        client.queued -= 1
        client.queued_items -= call.open_items
        if not client.queued:
            client.queue.clear()  # what is left has been unqueued before
        call.state = "GONE"  # until the caller says what it is instead

    def _requeue(self, call: Call) -> None:
        """Put a call that no worker has at the front of the queue, or back to the scheduler if nothing is started
        here any more."""
        if call.start:
            call = self.split_tail(call, call.start)
        call.state, call.cancel_no, call.kind = "QUEUED", 0, CancelKind.RECALL
        if self.fenced or not self._hiring.serves(call.client):
            self._forget(call)
            self._output.returned.append((call.task_id, call.attempt))
            return
        client = call.client
        client.queue.appendleft(call)
        client.queued += 1
        client.queued_items += call.open_items

    def split_tail(self, call: Call, at: int) -> Call:
        """Make the items of `call` from `at` on a call of their own, in nobody's hands. A head without items left is
        forgotten."""
        items, skip = call.items - at, call.skip + at
        tail = Call(call.task_id + at, call.attempt, call.client, items, skip, call.function, call.payload)
        self.by_id[tail.task_id] = tail
        self._output.splits.append((call.task_id, call.attempt, at))
        call.items = at
        if call.start == at:
            self._forget(call)
        return tail


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
    "TIMEOUT",  # it has been running for as long as it may
    "EXITED_IN_PROGRESS",  # its worker is gone, and this was the call it was in: report
    "EXITED_NOT_STARTED",  # its worker is gone and had not come to it: report
)

_C = AgentCalls
# A result is not an event of this table: it ends the call in every state, see `ended`. The call ran to its end, so
# nothing else can be true of it.
TABLE: Final[dict[str, dict[str, _Cell]]] = {
    "QUEUED": {
        "CANCEL": _C._drop_queued,
        # What workers and the forker say is of calls in a worker's hands.
        "UNWOUND": forbidden,
        "SKIPPED": forbidden,
        "NOT_STARTED": forbidden,
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        "STUCK": forbidden,
        "GRACE_DUE": forbidden,
        "TIMEOUT": forbidden,
        "EXITED_IN_PROGRESS": forbidden,
        "EXITED_NOT_STARTED": forbidden,
    },
    "HELD": {
        "CANCEL": _C._cancel_held,
        "UNWOUND": _C._unwound_late,
        # Only from a worker that has unwound from the call before it.
        "SKIPPED": _C._not_started,
        # A freeze asks only about calls in RECALLING or FREEZING, and these leave that state by its answer.
        "NOT_STARTED": forbidden,
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        "STUCK": forbidden,
        "GRACE_DUE": forbidden,
        # Its time counts when it has been seen running, and until something else is wanted of it.
        "TIMEOUT": forbidden,
        "EXITED_IN_PROGRESS": _C._died,
        "EXITED_NOT_STARTED": _C._not_started,
    },
    "RUNNING": {
        "CANCEL": _C._cancel_running,
        "UNWOUND": _C._unwound_late,
        # It had been claimed when it was seen, but not yet looked at.
        "SKIPPED": _C._not_started,
        "NOT_STARTED": forbidden,
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        "STUCK": forbidden,
        "GRACE_DUE": forbidden,
        "TIMEOUT": _C._expire,
        "EXITED_IN_PROGRESS": _C._died,
        # Between two items of a run.
        "EXITED_NOT_STARTED": _C._not_started,
    },
    "RECALLING": {
        # A user's cancel over a recall of our own: the freeze tells how far it can go.
        "CANCEL": _C._newest_counts,
        "UNWOUND": _C._unwound_late,
        # The record overtook the forker's report of the freeze.
        "SKIPPED": _C._not_started,
        "NOT_STARTED": _C._not_started,
        "IN_PROGRESS": _C._in_progress,
        "OVER": _C._still_held,
        # What is killed is a call in FREEZING.
        "KILLED": forbidden,
        "STUCK": _C._stuck,
        "GRACE_DUE": forbidden,
        "TIMEOUT": forbidden,
        "EXITED_IN_PROGRESS": _C._died,
        "EXITED_NOT_STARTED": _C._not_started,
    },
    "STOPPING_SOFT": {
        "CANCEL": _C._newest_counts,
        "UNWOUND": _C._unwound,
        "SKIPPED": _C._not_started,
        # No freeze asks about it; a report for others says nothing of the time after the interrupt.
        "NOT_STARTED": forbidden,
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        "STUCK": forbidden,
        "GRACE_DUE": _C._kill_at_grace,
        "TIMEOUT": forbidden,
        "EXITED_IN_PROGRESS": _C._stopped,
        "EXITED_NOT_STARTED": _C._stopped,
    },
    "FREEZING": {
        "CANCEL": _C._newest_counts,
        # The pipe and the forker are not in order with each other: it unwound, or was skipped, before the freeze.
        "UNWOUND": _C._unwound,
        "SKIPPED": _C._not_started,
        "NOT_STARTED": _C._not_started,
        "IN_PROGRESS": _C._freeze_again,
        "OVER": _C._still_held,
        "KILLED": _C._killing,
        "STUCK": _C._stuck,
        "GRACE_DUE": forbidden,
        "TIMEOUT": forbidden,
        "EXITED_IN_PROGRESS": _C._stopped,
        "EXITED_NOT_STARTED": _C._not_started,
    },
    "KILLING": {
        "CANCEL": _C._newest_counts,
        "UNWOUND": _C._stopped,
        "SKIPPED": _C._not_started,
        "NOT_STARTED": forbidden,
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        "STUCK": _C._stuck,
        "GRACE_DUE": forbidden,
        "TIMEOUT": forbidden,
        # Not before: a confirm sent while the process may still write a file would be a lie.
        "EXITED_IN_PROGRESS": _C._stopped,
        "EXITED_NOT_STARTED": _C._not_started,
    },
    "UNWOUND": {
        "CANCEL": _C._newest_counts,
        "UNWOUND": forbidden,
        # Said of everything that the worker held.
        "SKIPPED": ignore,
        "NOT_STARTED": forbidden,
        # The answer of a freeze that was under way is not about it any more.
        "IN_PROGRESS": forbidden,
        "OVER": forbidden,
        "KILLED": forbidden,
        # The code has stopped; what does not die of its group is out of anybody's hands.
        "STUCK": _C._stopped,
        "GRACE_DUE": _C._kill_unwound,
        "TIMEOUT": forbidden,
        "EXITED_IN_PROGRESS": _C._stopped,
        "EXITED_NOT_STARTED": _C._stopped,
    },
}
