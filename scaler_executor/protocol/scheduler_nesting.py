"""Nested calls: what the scheduler makes of the sessions that workers open for the calls in them.

A session is a client that has no connection of its own: its words come through its worker's agent. Its tasks are
numbered and answered like a client's, but they are queued, placed and limited as those of its *account*, the client
that the worker serves. Of the account's queued calls those of sessions go first, the newest session before the older
ones: so what a call waits for is begun before anything that waits as well, and recursion goes deep before it goes wide.

A call that waits for others lends its slot: its agent holds one less, as far as room is concerned. Only when the room
has been given is the agent told to let somebody have the slot: the nested call stands in the agent's queue then.
"""

from __future__ import annotations

from typing import Final

import msgspec

from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.functions import check_function
from scaler_executor.protocol.messages import (
    BY_OPERATOR,
    Blocked,
    CancelKind,
    Function,
    InheritanceLost,
    InheritanceReplaced,
    Nested,
    Refused,
    TaskSubmit,
    Unblocked,
    Welcome,
)
from scaler_executor.protocol.priorities import NESTED
from scaler_executor.protocol.scheduler_assignment import Assignment
from scaler_executor.protocol.scheduler_events import Send
from scaler_executor.protocol.scheduler_intake import Intake
from scaler_executor.protocol.scheduler_output import SchedulerOutput
from scaler_executor.protocol.scheduler_rows import Agent, Client, Session
from scaler_executor.protocol.scheduler_tasks import SchedulerTasks

#: The highest priority of a session's own, see `priorities.NESTED`.
MAX_PRIORITY: Final = (NESTED >> 1) - 1


class Nesting:
    """The sessions of all agents' workers."""

    def __init__(self, tasks: SchedulerTasks, assignment: Assignment, intake: Intake, output: SchedulerOutput) -> None:
        #: {(agent, worker_id): Session}
        self.sessions: dict[tuple[Agent, int], Session] = {}
        #: Clients that have said Bye while calls that their calls have left behind are not over.
        self.leaving: list[Client] = []
        self._tasks = tasks
        self._assignment = assignment
        self._intake = intake
        self._output = output

    def open(self, agent: Agent, message: Nested, account: Client | None, client_id: int) -> None:
        """Begin a session for a worker that serves `account`; None: that client is gone, and the worker will be."""
        key = agent, message.worker_id
        if key in self.sessions:
            raise RemoteProtocolError(f"a second session of worker {message.worker_id}")
        if account is None or account.gone:
            self._refuse(agent, message.worker_id)
        else:
            session = Session(agent, message.worker_id, account, client_id, self._output.now)
            self.sessions[key] = session
            workers = sum(other.workers for other in self._assignment.agents)
            welcome = Nested(message.worker_id, Welcome(client_id, workers=workers))
            self._output.instructions.append(Send(agent.peer, welcome))

    def _refuse(self, agent: Agent, worker_id: int) -> None:
        refusal = Refused("the client that the worker serves is gone")
        self._output.instructions.append(Send(agent.peer, Nested(worker_id, refusal)))

    def find(self, agent: Agent, message: Nested) -> Session | None:
        """Return the session that a message is of; None: it is over."""
        return self.sessions.get((agent, message.worker_id))

    def submit(self, session: Session, message: Nested, closing: str | None) -> None:
        """Take in what calls of a worker submit."""
        submit = message.message
        assert isinstance(submit, TaskSubmit)
        self._intake.submit(session, _translated(session, submit), closing)
        parent = self._tasks.by_id.get(message.parent) if message.parent else None
        is_orphaned = message.parent != 0 and (parent is None or parent.agent is not session.agent)
        for row in submit.tasks:
            task = self._tasks.by_id.get(session.base + row[0])
            if task is None:
                continue  # refused already
            self._tasks.families.adopt(task, None if is_orphaned else parent, message.item)
            is_late = task.family is not None and bool(task.family.farewells)
            if is_orphaned or is_late:
                self._tasks.step(task, "CANCEL", BY_OPERATOR, CancelKind.FORCED)

    def end(self, session: Session, *, has_last_words: bool = False) -> None:
        """A session is over. What the worker's calls that have ended have left behind goes on, answered to nobody; the
        rest is stopped. `has_last_words`: it still hears what is known."""
        self.sessions.pop((session.agent, session.worker_id), None)
        session.gone = True
        if not has_last_words:
            self._output.touched.pop(session, None)
        if not session.account.gone:
            self._intake.forget_functions(session.account, list(session.functions))
            for task in [task for task in self._tasks.by_id.values() if task.client is session]:
                if task.family is not None and task.family.parent is not None:
                    self._tasks.step(task, "CLIENT_LOST")

    def agent_lost(self, agent: Agent) -> None:
        """End the sessions of an agent's workers."""
        for session in [session for (of, _), session in self.sessions.items() if of is agent]:
            self.end(session)

    def client_lost(self, account: Client) -> None:
        """End the sessions of a client, all of whose calls are being stopped."""
        has_left = account in self.leaving
        for session in [session for session in self.sessions.values() if session.account is account]:
            if not has_left:
                self._refuse(session.agent, session.worker_id)
            self.end(session, has_last_words=has_left)
        if has_left:
            self.leaving.remove(account)

    def leave(self, account: Client) -> None:
        """A client has said Bye, and so says nothing more; what its calls have left behind is to be done."""
        self.leaving.append(account)
        for agent in self._assignment.agents:
            if account.client_id in agent.disinherited:
                self._inherit_nothing(account, agent)

    def ask_for_inheritance(self, account: Client, agent: Agent, message: InheritanceLost) -> None:
        """Have a client say what replaces what its workers inherited."""
        if account in self.leaving:
            self._inherit_nothing(account, agent)
        else:
            self._output.instructions.append(Send(account.peer, message))

    def _inherit_nothing(self, account: Client, agent: Agent) -> None:
        agent.disinherited.remove(account.client_id)
        self._output.instructions.append(Send(agent.peer, InheritanceReplaced(account.client_id, [])))

    def blocked(self, agent: Agent, message: Blocked) -> None:
        """Calls wait for others: there is room for as many, and then they lend their slots."""
        for task_id in message.tasks:
            task = self._tasks.by_id.get(task_id)
            if task is not None and task.agent is agent and not task.is_blocked:
                self._assignment.block(task)
                agent.lent.append(task_id)
                self._output.touched[agent] = None

    def unblocked(self, agent: Agent, message: Unblocked) -> None:
        """Calls wait no more."""
        for task_id in message.tasks:
            task = self._tasks.by_id.get(task_id)
            if task is not None and task.agent is agent and task.is_blocked:
                self._assignment.unblock(task)


def _translated(session: Session, submit: TaskSubmit) -> TaskSubmit:
    """Return a submission with numbers of functions that no other session of the account has, all of which have the
    session's precedence."""
    base = session.base
    functions: list[Function] = []
    for function in submit.functions:
        check_function(function)
        options = function.options
        own = max(-MAX_PRIORITY, min(MAX_PRIORITY, options.priority))
        options = msgspec.structs.replace(options, priority=session.client_id * NESTED + own)
        functions.append(
            msgspec.structs.replace(
                function,
                function_id=base + function.function_id,
                needs=[base + needed for needed in function.needs],
                options=options,
            )
        )
    rows = [(no, items, base + function_id, payload) for no, items, function_id, payload in submit.tasks]
    return TaskSubmit(rows, functions, [base + function_id for function_id in submit.forget])
