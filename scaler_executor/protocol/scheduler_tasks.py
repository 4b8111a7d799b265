"""What becomes of a task: the table at the end of this file, which is the heart of the scheduler.

It knows the state of every accepted task and what each event makes of it, and alone makes attempts. It does not know
how an event got here (`scheduler` has looked at who said it, and of which attempt), nor which agent is next
(`scheduler_assignment`). Each odd-looking cell names the race that needs it.

One task is in exactly one of these states:

QUEUED      waits for room at an agent
ASSIGNED    an agent has it: queued there, in a worker's hands, or running
RECALLING   as ASSIGNED, and the scheduler has asked for it back to run it elsewhere
CANCELING   as ASSIGNED, and its user has asked to cancel it; whatever the agent says next answers that
FENCING     its agent is out of reach and may still be running it, until the fence time is over
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import msgspec

from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.machine import Story, forbidden, peer_error
from scaler_executor.protocol.messages import (
    AgainRow,
    CancelKind,
    Death,
    DeathReport,
    ResultKind,
    TaskCancelConfirmType,
)
from scaler_executor.protocol.scheduler_assignment import Assignment
from scaler_executor.protocol.scheduler_families import Families
from scaler_executor.protocol.scheduler_output import SchedulerOutput
from scaler_executor.protocol.scheduler_rows import (
    ASSIGNED,
    CANCELING,
    FENCING,
    GONE,
    QUEUED,
    RECALLING,
    Client,
    Seat,
    Task,
)

#: What a task takes besides its payload, roughly.
TASK_BYTES: Final = 500
#: A client that has lost its scheduler brings no more tasks than this along.
MAX_AGAIN: Final = 1_000_000
#: So many of the attempts before the last one are told of.
MAX_EARLIER: Final = 20
CANCELED: Final = TaskCancelConfirmType.CANCELED
NOT_FOUND: Final = TaskCancelConfirmType.CANCEL_NOT_FOUND
FAILED: Final = TaskCancelConfirmType.CANCEL_FAILED


class SchedulerTasks:
    """All tasks that are accepted and not over."""

    def __init__(self, assignment: Assignment, output: SchedulerOutput) -> None:
        #: {task_id: Task}
        self.by_id: dict[int, Task] = {}
        #: Clients that are gone but whose tasks have not all been stopped yet.
        self.leaving: dict[Client, None] = {}
        self.story = Story()
        self._assignment = assignment
        self._output = output
        #: `output.touched`, at hand because each result needs it.
        self._touched = output.touched
        self._last_cancel_no = 0
        self.families = Families(self.step, output)

    def step(self, task: Task, event: str, *details: Any) -> None:
        """Do what the table says of this event in the state of `task`."""
        before = task.state
        TABLE[before][event](self, task, *details)
        self.story.add(self._output.now, task.task_id, event, before, task.state, repr(details) if details else "")

    def recall(self, task: Task) -> None:
        """Ask for a task in ASSIGNED back, to run it elsewhere."""
        self.story.add(self._output.now, task.task_id, "recall", ASSIGNED, RECALLING)
        task.state = RECALLING
        self._ask_agent(task, CancelKind.RECALL)

    def drop_queue(self, client: Client) -> None:
        """Forget what a client has in QUEUED: it may be a great deal, so each is no step of its own."""
        for task in client.queue:
            if task.state == QUEUED:
                self._forget(task)
        client.queue.clear()

    def fail(self, task: Task, kind: ResultKind, reason: str) -> None:
        """Answer for a task that will not be started: BROKEN or LOST."""
        self._forward(task, task.start, task.open_items, kind, reason.encode())

    def note_again(self, client: Client, rows: list[AgainRow]) -> None:
        """Note what another scheduler had and is now to come to this one."""
        client.again.update((no, (spent, done)) for no, spent, done in rows)
        if len(client.again) > MAX_AGAIN:
            raise RemoteProtocolError(f"more than {MAX_AGAIN} tasks again")

    def fence_again(self, task: Task, fenced: list[Task]) -> bool:
        """Take in a task that another scheduler had, where it may have been started: put what is left of it in FENCING,
        tasks for the items between those that are done. Return whether its first item is among them.

        Raises:
            RemoteProtocolError: That cannot be.
        """
        client, start = task.client, 0
        spent, done = client.again.pop(task.no)
        left: list[Task] = []
        if spent < 0 or (done and task.items == 1):
            raise RemoteProtocolError(f"task {task.no} again, {spent} retries spent, items {done} done")
        for first, count in [*sorted(done), (task.items, 0)]:
            if first < start or count < 0 or first + count > task.items:
                raise RemoteProtocolError(f"task {task.no} of {task.items} items again, items {done} done")
            if first > start:
                piece = Task(
                    task.task_id + start, client, task.no, start, first - start, start, task.function, task.payload
                )
                piece.state, piece.deaths, piece.attempt, piece.is_again = FENCING, spent, spent + 1, True
                left.append(piece)
            start = first + count
        if not left:
            raise RemoteProtocolError(f"task {task.no} again, all of which is done")
        self.by_id.update((piece.task_id, piece) for piece in left)
        client.account.tasks_left += len(left)
        if task.items > 1:
            client.runs[task.no] = {piece.task_id: piece for piece in left}
        fenced += left
        return not left[0].offset

    def check(self, queued: set[int], fenced: set[int]) -> None:
        """Assert the invariants, given the identities of what stands in the clients' queues and waits for a fence."""
        held: dict[Seat, int] = {}
        for task_id, task in self.by_id.items():
            assert task.task_id == task_id
            assert 0 <= task.start < task.items, (task_id, task.start, task.items)
            assert (task.seat is None) == (task.state in (QUEUED, FENCING)), (task_id, task.state)
            assert bool(task.agent_cancel_no) == (task.state in (RECALLING, CANCELING)), (task_id, task.state)
            assert not task.user_cancel_no or task.state in (CANCELING, FENCING), (task_id, task.state)
            assert task.state != QUEUED or id(task) in queued, task_id
            assert task.state != FENCING or id(task) in fenced, task_id
            account = task.client.account
            assert not account.gone or task.state in (CANCELING, FENCING), (task_id, task.state)
            assert not account.gone or account in self.leaving
            assert task.state != QUEUED or not task.recall_refused
            assert task.no not in task.client.runs or task.client.runs[task.no][task_id] is task
            if task.seat is not None:
                assert task.seat.client is account, task_id
                assert task.seat.tasks[task_id] is task, task_id
                held[task.seat] = held.get(task.seat, 0) + 1
        for seat, count in held.items():
            assert len(seat.tasks) == count, (seat.agent.peer, seat.tasks, count)
        accounts = Counter(task.client.account for task in self.by_id.values())
        assert all(account.tasks_left == count for account, count in accounts.items())
        assert all(client in accounts for client in self.leaving)

    # Cells of the table. Each takes the task and what the event carries.

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
        if task.family is not None and (kind > ResultKind.ERROR or task.kind is CancelKind.FORCED):
            self.families.stop(task)  # it has been stopped, or was to be
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
        if task.family is not None:
            self.families.stop(task)
        task.deaths += 1
        report.attempt = task.attempt
        if task.deaths <= task.function.function.options.retries:
            task.earlier = (*task.earlier[1 - MAX_EARLIER :], _without_earlier(report))
            task.state, task.agent_cancel_no, task.running_since = ASSIGNED, 0, None
            # A client that loses this scheduler must know how often it may still have it tried by another.
            task.client.retried.append((task.no, task.deaths))
            self._touched[task.client] = None
            self._requeue(task, new_attempt=True)
            return
        report.earlier = list(task.earlier)
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
        tail.state = ASSIGNED
        assert task.seat is not None
        self._assignment.hold(tail, task.seat)
        if task.start == at:
            self._forget(task)

    def _split_cancelled(self, task: Task, at: int) -> None:
        # The split and the cancel crossed: the agent took the cancel for the head alone.
        self._split(task, at)
        self._pass_on(self.by_id[task.task_id + at], task.user_cancel_no, task.kind)

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
        self._assignment.release(task)
        task.state, task.agent_cancel_no = FENCING, 0
        fenced.append(task)

    def _fence_due(self, task: Task) -> None:
        if task.user_cancel_no or task.client.gone:
            self._answer(task, task.user_cancel_no, CANCELED, proven=False)
            self._forget(task)
        else:
            what = "scheduler that had it was lost" if task.is_again else "machine that ran it is out of reach"
            self._retry_or_fail(task, DeathReport(reason=f"the {what}"))

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
        row = task.no, cancel_no, kind, task.offset + task.start, task.open_items, proven
        if task.family is not None:
            if kind == FAILED:
                self.families.let_go(task)
            elif self.families.answer_later(task, row):
                return
        if not client.gone:
            client.confirms.append(row)
            self._touched[client] = None

    def _ask_agent(self, task: Task, kind: CancelKind) -> None:
        agent = task.agent
        assert agent is not None
        self._last_cancel_no += 1
        task.agent_cancel_no = self._last_cancel_no
        agent.cancels.append((task.task_id, task.agent_cancel_no, int(kind)))
        self._touched[agent] = None

    def _forget(self, task: Task) -> None:
        del self.by_id[task.task_id]
        client = task.client
        if task.seat is not None:
            self._assignment.release(task)
        task.state = GONE
        if task.family is not None:
            self.families.forgotten(task)
        if task.task_id == client.base + task.no:
            client.held_bytes -= len(task.payload) + TASK_BYTES
        task.payload = b""
        if client.runs:
            pieces = client.runs.get(task.no)
            if pieces is not None:
                del pieces[task.task_id]
                if not pieces:
                    del client.runs[task.no]
        account = client.account
        account.tasks_left -= 1
        if account.gone and not account.tasks_left:
            self.leaving.pop(account, None)
            self._assignment.forget_client(account)

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
        tail.attempt, tail.deaths, tail.earlier = task.attempt, task.deaths, task.earlier
        task.items = at
        self.by_id[tail.task_id] = tail
        task.client.runs[task.no][tail.task_id] = tail
        task.client.account.tasks_left += 1
        if task.family is not None:
            self.families.split(task, tail)
        return tail

    def _requeue(self, task: Task, new_attempt: bool = False) -> None:
        """Put the outstanding items of `task`, which no agent has any more, at the front of the queue."""
        client = task.client.account
        if task.start:
            # Its agent numbers the items of a task from its first one, so what is run again needs its own number.
            rest = self._split_off(task, task.start)
            self._forget(task)
            task = rest
        if task.seat is not None:
            self._assignment.release(task)
        if new_attempt:
            task.attempt += 1
        task.state, task.recall_refused, task.is_again = QUEUED, False, False
        if client.broken is not None:
            self.fail(task, ResultKind.BROKEN, client.broken)
            return
        client.queue.appendleft(task)
        self._assignment.line_up(client)


def _without_earlier(report: DeathReport) -> Death:
    return Death(*[getattr(report, name) for name in Death.__struct_fields__])


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

_T = SchedulerTasks
TABLE: Final[dict[str, dict[str, _Cell]]] = {
    QUEUED: {
        "CANCEL": _T._drop_queued,
        # No agent has a queued task, and what an agent says of one that it does not have is stale before it gets here.
        "RESULT": forbidden,
        "CANCELED": forbidden,
        "FAILED": forbidden,
        "NOT_FOUND": forbidden,
        "DIED": forbidden,
        "RETURNED": forbidden,
        "SPLIT": forbidden,
        "AGENT_LOST": forbidden,
        "CLIENT_LOST": _T._forget,
        "FENCE_DUE": forbidden,
    },
    ASSIGNED: {
        "CANCEL": _T._pass_on,
        "RESULT": _T._forward,
        "CANCELED": _T._cancelled_unasked,
        # The number of a request is looked at before the state, and in ASSIGNED there is none.
        "FAILED": peer_error,
        "NOT_FOUND": peer_error,
        "DIED": _T._retry_or_fail,
        "RETURNED": _T._returned,
        "SPLIT": _T._split,
        "AGENT_LOST": _T._lost_with_agent,
        "CLIENT_LOST": _T._stop_unheard,
        "FENCE_DUE": forbidden,
    },
    RECALLING: {
        # A user's cancel over a recall: the recall's answer must not send the task round again.
        "CANCEL": _T._over_recall,
        "RESULT": _T._forward,
        "CANCELED": _T._came_back,
        "FAILED": _T._runs_on,
        "NOT_FOUND": peer_error,
        "DIED": _T._retry_or_fail,
        "RETURNED": _T._returned,
        # The recall was for the whole run and the agent takes it for the head alone: the tail stays where it is.
        "SPLIT": _T._split,
        "AGENT_LOST": _T._lost_with_agent,
        "CLIENT_LOST": _T._stop_unheard,
        "FENCE_DUE": forbidden,
    },
    CANCELING: {
        "CANCEL": _T._again,
        "RESULT": _T._forward,
        "CANCELED": _T._cancelled,
        "FAILED": _T._refused,
        "NOT_FOUND": _T._not_there,
        "DIED": _T._died_cancelled,
        "RETURNED": _T._returned_cancelled,
        "SPLIT": _T._split_cancelled,
        "AGENT_LOST": _T._cancelled_with_agent,
        "CLIENT_LOST": _T._stop_unheard_again,
        "FENCE_DUE": forbidden,
    },
    FENCING: {
        "CANCEL": _T._note_cancel,
        # Its agent is gone, and nobody else has it.
        "RESULT": forbidden,
        "CANCELED": forbidden,
        "FAILED": forbidden,
        "NOT_FOUND": forbidden,
        "DIED": forbidden,
        "RETURNED": forbidden,
        "SPLIT": forbidden,
        "AGENT_LOST": forbidden,
        "CLIENT_LOST": _T._no_addressee,
        "FENCE_DUE": _T._fence_due,
    },
}
