"""The client's side of the tasks: which were sent, which are being cancelled, and what each answer means for their
futures.

It knows numbers, not futures: `scaler_executor.runtime.client` keeps those and does what the instructions say. It
does not know which worker or machine runs a task, nor whether the scheduler has split a run: answers name item
ranges, and a run is over when each item has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from scaler_executor.protocol.client_events import (
    REST,
    Batch,
    Broken,
    Cancelled,
    CancelRefused,
    Cause,
    CloseAsked,
    Closed,
    Deliver,
    Disinherited,
    Event,
    Finished,
    Instruction,
    Lost,
    Received,
    Renewed,
    Running,
    SchedulerLost,
    Send,
    Show,
    Stranded,
)
from scaler_executor.protocol.codec import LocalProtocolError, RemoteProtocolError
from scaler_executor.protocol.functions import ReceivedFunction
from scaler_executor.protocol.machine import Story, Transition, peer_error, unreachable
from scaler_executor.protocol.messages import (
    BY_OPERATOR,
    PROTOCOL_VERSION,
    Bye,
    CancelKind,
    ClientResultRow,
    Function,
    InheritanceLost,
    InheritanceReplaced,
    Output,
    Refused,
    SessionLost,
    TaskCancel,
    TaskCancelConfirm,
    TaskCancelConfirmType,
    TaskResult,
    TaskRetried,
    TaskRow,
    TaskRunning,
    TasksAgain,
    TaskSubmit,
    ToClientMessage,
    Welcome,
    WorkersBroken,
)

State = Literal["UNSENT", "SENT", "CANCELING"]
UNSENT: Final = "UNSENT"
SENT: Final = "SENT"
CANCELING: Final = "CANCELING"

#: So many tasks at most are given to another scheduler when one is lost.
MAX_AGAIN: Final = 1_000_000


class ClientTask:
    """One outstanding task. Those of one item that nobody has asked to cancel share a single object, see `PLAIN`."""

    __slots__ = ("answered", "cancel_no", "function", "is_run", "kind", "no", "open_items", "row", "spent", "state")

    def __init__(
        self,
        no: int,
        state: State,
        open_items: int,
        row: TaskRow | None = None,
        function: ReceivedFunction | None = None,
    ) -> None:
        self.no = no
        self.state: State = state
        self.is_run = open_items > 1
        #: Items without an answer.
        self.open_items = open_items
        #: Number of the newest cancel request, 0: none is outstanding. Only answers to this one refuse.
        self.cancel_no = 0
        self.kind = CancelKind.RECALL
        #: Of a task that another scheduler may have again: all that it needs, how many of its retries are used, and
        #: which ranges (first, count) of a run are answered.
        self.row = row
        self.function = function
        self.spent = 0
        self.answered: list[tuple[int, int]] = []


#: Stands for every task of one item in SENT: a table of 100,000 calls then costs a dictionary and no objects.
PLAIN: Final = ClientTask(0, SENT, 1)


class ClientState:
    """The outstanding tasks of one client. Not thread-safe: the caller serialises.

    Args:
        may_lose_scheduler: Its scheduler may be lost and another one be found, see SessionLost: what has retries is
            kept for that.
    """

    def __init__(self, may_lose_scheduler: bool = False) -> None:
        self._may_lose_scheduler = may_lose_scheduler
        #: {function_id: the function} where they are kept; those with retries among them, which the scheduler knows.
        self._functions: dict[int, ReceivedFunction] = {}
        self._retried: dict[int, ReceivedFunction] = {}
        #: {no: task} of those that go to the next scheduler, in UNSENT.
        self._again: dict[int, ClientTask] = {}
        #: {no: ClientTask}: everything submitted and not fully answered.
        self._tasks: dict[int, ClientTask] = {}
        #: Submissions from before the scheduler's Welcome; excludes `_welcome`.
        self._backlog: list[TaskSubmit] = []
        self._welcome: Welcome | None = None
        #: Set once, by SchedulerLost: everything submitted later is lost as well.
        self._lost: str | None = None
        #: The scheduler was lost and another one is to say Welcome; a client that has nothing to do need not wait.
        self._is_between = False
        #: Why the last session was lost.
        self._lost_session = ""
        self._closing = False
        self._said_bye = False
        self._last_cancel_no = 0
        self._story = Story()
        #: Answers to what is no longer asked: normal after a lost race.
        self.stale = 0
        self._now = 0.0
        self._out: list[Instruction] = []

    # The four methods that every state class has

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in and return what is to be done, in order."""
        self._now = now
        out = self._out = []
        if isinstance(event, Received):
            try:
                self._received(event.message)
            except RemoteProtocolError as error:
                self._scheduler_lost(f"the scheduler broke the protocol: {error}")
        elif isinstance(event, Batch):
            self._batch(event)
        elif isinstance(event, Stranded):
            self._stranded(event.batch)
        elif isinstance(event, SchedulerLost):
            self._scheduler_lost(event.reason)
        elif isinstance(event, CloseAsked):
            self._closing = True
        else:
            unreachable(event)
        may_leave = self._welcome is not None or self._lost is not None or self._is_between
        if self._closing and not self._tasks and not self._said_bye and may_leave:
            self._said_bye = True
            if self._lost is None:
                out.append(Send(Bye()))
            out.append(Closed())
        return out

    def next_deadline(self) -> float | None:
        """Return when a Tick is due: never, nothing here depends on time."""
        return None

    def story(self, task_id: int) -> list[Transition]:
        """Return what is remembered of the cancels of task `no`."""
        return self._story.of(task_id)

    def check(self) -> None:
        """Assert the invariants."""
        assert PLAIN.state == SENT and PLAIN.open_items == 1 and not PLAIN.cancel_no
        unsent = {row[0] for submit in self._backlog for row in submit.tasks} | set(self._again)
        for no, task in self._tasks.items():
            assert task.open_items > 0, no
            assert (task.state == CANCELING) == bool(task.cancel_no), (no, task.state)
            assert task is PLAIN or task.no == no
            assert task.state != UNSENT or no in unsent, no
        assert not (self._backlog and self._welcome)
        assert self._lost is None or not self._tasks

    @property
    def outstanding(self) -> int:
        """Number of tasks without a full answer."""
        return len(self._tasks)

    def outstanding_tasks(self) -> list[int]:
        """Return the numbers of the tasks without a full answer, oldest first."""
        return sorted(self._tasks)  # those that are asked about move to the end

    # What callers ask

    def _batch(self, batch: Batch) -> None:
        tasks = batch.tasks
        if self._said_bye and tasks:
            raise LocalProtocolError("bug: submitted after Bye")
        if batch.cancels:
            tasks = self._unsend(tasks, batch.cancels)
        if self._lost is not None:
            if tasks:
                self._out.append(Lost([row[0] for row in tasks], self._lost))
            return
        if (tasks or batch.functions or batch.forget) and not self._said_bye:
            submit = TaskSubmit(tasks, batch.functions, batch.forget)
            if self._may_lose_scheduler and (batch.functions or batch.forget):
                self._note_functions(batch.functions)
            if self._welcome is None:
                self._tasks.update((row[0], self._make_task(row, UNSENT)) for row in tasks)
                self._backlog.append(submit)
            else:
                self._send(submit)
        if batch.cancels:
            self._cancel(batch.cancels)
        if batch.definitions is not None and not self._said_bye:
            self._out.append(Send(InheritanceReplaced(0, batch.definitions)))

    def _send(self, submit: TaskSubmit) -> None:
        plain = PLAIN
        if self._retried:
            self._tasks.update([(row[0], self._make_task(row, SENT)) for row in submit.tasks])
        else:
            self._tasks.update(
                [(row[0], plain if row[1] == 1 else ClientTask(row[0], SENT, row[1])) for row in submit.tasks]
            )
        if submit.forget and self._functions:
            self._forget_functions(submit.forget)
        self._out.append(Send(submit))

    def _make_task(self, row: TaskRow, state: State) -> ClientTask:
        function = self._retried.get(row[2])
        if function is not None:
            return ClientTask(row[0], state, row[1], row, function)
        return PLAIN if row[1] == 1 and state == SENT else ClientTask(row[0], state, row[1])

    def _note_functions(self, functions: list[Function]) -> None:
        for function in functions:
            received = self._functions[function.function_id] = ReceivedFunction(function, self._functions.get)
            if function.options.retries:
                self._retried[function.function_id] = received

    def _forget_functions(self, function_ids: list[int]) -> None:
        for function_id in function_ids:
            self._functions.pop(function_id, None)
            self._retried.pop(function_id, None)

    def _unsend(self, tasks: list[TaskRow], cancels: list[tuple[int, CancelKind]]) -> list[TaskRow]:
        """Drop from `tasks` those that `cancels` names: they are cancelled before anybody heard of them."""
        asked = {no for no, _ in cancels}
        dropped = [row for row in tasks if row[0] in asked]
        if not dropped:
            return tasks
        self._out.append(Cancelled([(row[0], REST, row[1], "CANCELED") for row in dropped]))
        self._out.append(Finished([row[0] for row in dropped]))
        return [row for row in tasks if row[0] not in asked]

    def _cancel(self, cancels: list[tuple[int, CancelKind]]) -> None:
        rows: list[tuple[int, int, int]] = []
        for no, kind in cancels:
            task = self._tasks.get(no)
            if task is None:
                continue  # answered in the meantime: its future has been settled, or it was unsent just now
            if task is PLAIN:
                task = self._tasks[no] = ClientTask(no, SENT, 1)
            _TABLE[task.state]["CANCEL"](self, task, kind, rows)
        if rows:
            self._out.append(Send(TaskCancel(rows)))

    def _drop_unsent(self, task: ClientTask, kind: CancelKind, rows: list[tuple[int, int, int]]) -> None:
        # Its row stays in the backlog until the Welcome, for a search here would make cancelling many a slow affair.
        was_sent = self._again.pop(task.no, None) is not None
        self._cancelled(task, REST, task.open_items, "UNCONFIRMED" if was_sent else "CANCELED")

    def _ask(self, task: ClientTask, kind: CancelKind, rows: list[tuple[int, int, int]]) -> None:
        self._last_cancel_no += 1
        self._story.add(
            self._now, task.no, f"cancel {kind.name}", task.state, CANCELING, f"cancel_no {self._last_cancel_no}"
        )
        task.state = CANCELING
        task.cancel_no = self._last_cancel_no
        task.kind = kind
        rows.append((task.no, task.cancel_no, int(kind)))

    def _raise_or_join(self, task: ClientTask, kind: CancelKind, rows: list[tuple[int, int, int]]) -> None:
        if kind > task.kind:
            self._ask(task, kind, rows)

    # What the scheduler says

    def _received(self, message: ToClientMessage) -> None:
        if isinstance(message, TaskResult):
            self._results(message.results)
        elif isinstance(message, TaskCancelConfirm):
            self._confirms(message)
        elif isinstance(message, TaskRunning):
            self._out.append(Running([no for no in message.tasks if no in self._tasks]))
        elif isinstance(message, TaskRetried):
            for no, spent in message.tasks:
                retried = self._tasks.get(no)
                if retried is not None and retried.row is not None:
                    retried.spent = max(retried.spent, spent)
        elif isinstance(message, InheritanceLost):
            self._out.append(Disinherited(message.reason))
        elif isinstance(message, WorkersBroken):
            self._out.append(Broken(message.reason))
        elif isinstance(message, Welcome):
            self._welcomed(message)
        elif isinstance(message, Refused):
            self._scheduler_lost(f"the scheduler refused this client: {message.reason}")
        elif isinstance(message, SessionLost):
            self._session_lost(message.reason)
        elif isinstance(message, Output):
            self._out.append(Show(message.rows))
        else:
            unreachable(message)

    def _welcomed(self, message: Welcome) -> None:
        if self._welcome is not None:
            raise RemoteProtocolError("a second Welcome")
        if message.version != PROTOCOL_VERSION:
            raise RemoteProtocolError(f"the scheduler speaks version {message.version}, this client {PROTOCOL_VERSION}")
        self._welcome = message
        self._is_between = False
        if self._again:
            self._send_again()
        backlog, self._backlog = self._backlog, []
        for submit in backlog:
            submit.tasks = [row for row in submit.tasks if row[0] in self._tasks]
            self._send(submit)

    def _send_again(self) -> None:
        """Give the scheduler what its predecessor had. It lets nobody start that before it has been stopped there."""
        again = [task for _, task in sorted(self._again.items())]
        self._again = {}
        functions: dict[int, Function] = {}
        rows = []
        for task in again:
            assert task.row is not None and task.function is not None
            functions.update((part.function_id, part) for part in task.function.parts)
            rows.append(task.row)
            task.state = SENT
        self._out.append(Send(TasksAgain([(task.no, task.spent, task.answered) for task in again])))
        # The client's numbers of them are forgotten already, and never used again.
        self._out.append(Send(TaskSubmit(rows, list(functions.values()), [*functions])))

    def _stranded(self, batch: Batch) -> None:
        """Take in what was submitted to the scheduler that is lost, and has not been sent."""
        self._note_functions(batch.functions)
        lost: list[int] = []
        for row in self._unsend(batch.tasks, batch.cancels):
            task = self._make_task(row, UNSENT)
            if not self._goes_on(task):
                lost.append(row[0])
        if lost:
            self._out.append(Lost(lost, self._lost or self._lost_session))
        self._functions.clear()
        self._retried.clear()
        self._cancel(batch.cancels)

    def _goes_on(self, task: ClientTask) -> bool:
        """Keep a task for the next scheduler, if another attempt of it may be made."""
        if self._lost is not None or task.function is None or len(self._again) >= MAX_AGAIN:
            return False
        if task.spent >= task.function.function.options.retries:
            return False
        task.state = UNSENT
        self._tasks[task.no] = self._again[task.no] = task
        return True

    def _results(self, results: list[ClientResultRow]) -> None:
        pop = self._tasks.pop
        others: list[ClientResultRow] | None = None
        done = 0
        try:
            for row in results:
                task = pop(row[0], None)
                if task is not PLAIN:
                    # The rare kinds, one of which makes the batch be taken apart: up to here all were plain.
                    if others is None:
                        others = results[:done]
                    if task is None:
                        self.stale += 1
                    else:
                        self._tasks[row[0]] = task
                        _TABLE[task.state]["RESULT"](self, task, row, others)
                elif others is not None:
                    others.append(row)
                done += 1
        finally:
            # Also when a row broke the protocol: those before it count. And first of all: a run that is over is over
            # after its last results.
            delivered = results[:done] if others is None else others
            if delivered:
                self._out.insert(0, Deliver(delivered))

    def _deliver(self, task: ClientTask, row: ClientResultRow, delivered: list[ClientResultRow]) -> None:
        delivered.append(row)
        self._answered(task, row[1], row[2])

    def _finished_first(self, task: ClientTask, row: ClientResultRow, delivered: list[ClientResultRow]) -> None:
        if task.kind is CancelKind.SOFT:
            # It had started when what had not was taken back. Whether its user asked for that is for the future to
            # know.
            self._deliver(task, row, delivered)
        else:
            self._cancelled(task, row[1], row[2], "FINISHED_FIRST")

    def _confirms(self, message: TaskCancelConfirm) -> None:
        for no, cancel_no, kind, first, count, proven in message.confirms:
            task = self._tasks.get(no)
            if task is PLAIN:
                task = self._tasks[no] = ClientTask(no, SENT, 1)
            if task is None or (cancel_no != task.cancel_no and kind == TaskCancelConfirmType.CANCEL_FAILED):
                self.stale += 1  # over, or a newer request is out: its answer counts
                continue
            if cancel_no == BY_OPERATOR and kind == TaskCancelConfirmType.CANCELED:
                # Whether this client has asked for it as well or not.
                self._cancelled(task, first, count, "CANCELED" if proven else "UNCONFIRMED")
                continue
            _TABLE[task.state]["CONFIRM"](self, task, kind, first, count, proven)

    def _confirmed(self, task: ClientTask, kind: int, first: int, count: int, proven: bool) -> None:
        if kind == TaskCancelConfirmType.CANCELED:
            self._cancelled(task, first, count, "CANCELED" if proven else "UNCONFIRMED")
        elif kind == TaskCancelConfirmType.CANCEL_NOT_FOUND:
            # The scheduler knows nothing of the whole task, so there is nothing more to wait for.
            self._cancelled(task, REST, task.open_items, "NOT_FOUND")
        elif kind == TaskCancelConfirmType.CANCEL_FAILED:
            if task.is_run:
                return  # said of a part of it: those items run on, the others are still to be answered
            self._story.add(self._now, task.no, "CancelFailed", task.state, SENT)
            task.state = SENT
            task.cancel_no = 0
            self._out.append(CancelRefused([task.no]))
        else:
            raise RemoteProtocolError(f"confirm of type {kind}")

    def _cancelled(self, task: ClientTask, first: int, count: int, cause: Cause) -> None:
        self._story.add(self._now, task.no, cause, task.state, task.state, f"items {first}+{count}")
        self._out.append(Cancelled([(task.no, first, count, cause)]))
        self._answered(task, first, count)

    def _answered(self, task: ClientTask, first: int, count: int) -> None:
        if count < 1 or count > task.open_items:
            raise RemoteProtocolError(
                f"{count} items answered of the {task.open_items} outstanding ones of task {task.no}"
            )
        task.open_items -= count
        if task.row is not None and task.open_items:
            task.answered.append((first, count))
        if task.open_items == 0:
            del self._tasks[task.no]
            self._out.append(Finished([task.no]))

    def _session_lost(self, reason: str) -> None:
        """The scheduler knows nothing of this client any more; what is submitted from now on goes to its successor."""
        if not self._said_bye:
            self._lose_all(reason)
            self._welcome = None
            self._is_between = True
            self._lost_session = reason
            self._out.append(Renewed(reason))

    def _scheduler_lost(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
            self._lose_all(reason)

    def _lose_all(self, reason: str) -> None:
        self._backlog.clear()
        self._again.clear()
        tasks, self._tasks = self._tasks, {}
        cancelled: list[tuple[int, int, int, Cause]] = []
        lost: list[int] = []
        for no, task in tasks.items():
            if task.state == CANCELING:
                cancelled.append((no, REST, task.open_items, "UNCONFIRMED"))
            elif not self._goes_on(task):
                lost.append(no)
        if cancelled:
            self._out.append(Cancelled(cancelled))
        self._out.append(Lost(lost, reason))
        self._out.append(Finished([no for no in tasks if no not in self._tasks]))


_Cell: TypeAlias = Callable[..., None]

EVENTS: Final = ("CANCEL", "RESULT", "CONFIRM")
_TABLE: dict[str, dict[str, _Cell]] = {
    UNSENT: {
        "CANCEL": ClientState._drop_unsent,
        "RESULT": peer_error,
        "CONFIRM": peer_error,
    },
    SENT: {
        "CANCEL": ClientState._ask,
        "RESULT": ClientState._deliver,
        # Nothing was asked. A late CancelFailed does not come here: its number is looked at before the state.
        "CONFIRM": peer_error,
    },
    CANCELING: {
        "CANCEL": ClientState._raise_or_join,
        "RESULT": ClientState._finished_first,
        "CONFIRM": ClientState._confirmed,
    },
}
TABLE: Final = _TABLE

__all__ = [
    "EVENTS",
    "PLAIN",
    "REST",
    "TABLE",
    "Batch",
    "Broken",
    "CancelRefused",
    "Cancelled",
    "Cause",
    "ClientState",
    "ClientTask",
    "CloseAsked",
    "Closed",
    "Deliver",
    "Disinherited",
    "Event",
    "Finished",
    "Instruction",
    "LocalProtocolError",
    "Lost",
    "Received",
    "RemoteProtocolError",
    "Renewed",
    "Running",
    "SchedulerLost",
    "Send",
    "Show",
    "Stranded",
]
