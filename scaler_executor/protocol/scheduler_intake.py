"""What clients submit: looked at row by row, made tasks, and queued.

It knows the numbers and functions of each client, and how much one may have here. What becomes of a task then is for
`scheduler_tasks`, where it goes for `scheduler_assignment`.
"""

from __future__ import annotations

from typing import Final

from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.functions import MAX_CLIENT_FUNCTIONS, ReceivedFunction, check_function
from scaler_executor.protocol.messages import CLIENT_ID_SHIFT, ResultKind, TaskSubmit
from scaler_executor.protocol.priorities import with_priorities
from scaler_executor.protocol.scheduler_assignment import Assignment
from scaler_executor.protocol.scheduler_events import Hold
from scaler_executor.protocol.scheduler_output import SchedulerOutput
from scaler_executor.protocol.scheduler_rows import Client, Task
from scaler_executor.protocol.scheduler_tasks import TASK_BYTES, SchedulerTasks

LOST: Final = ResultKind.LOST
BROKEN: Final = ResultKind.BROKEN


class Intake:
    """Takes tasks in.

    Args:
        tasks, assignment, output: Of the same scheduler.
        max_client_bytes: A client whose unfinished tasks take more than this is read no further; None: no limit.
    """

    def __init__(
        self,
        tasks: SchedulerTasks,
        assignment: Assignment,
        output: SchedulerOutput,
        max_client_bytes: int | None,
    ) -> None:
        self._tasks = tasks
        self._assignment = assignment
        self._output = output
        self._max_client_bytes = max_client_bytes
        #: Clients that have too much here.
        self.held: list[Client] = []

    def submit(self, client: Client, message: TaskSubmit, closing: str | None) -> list[Task]:
        """Take in what a client submits. Return the tasks that have to be fenced first.

        Args:
            client: Or a nested session, whose functions have been looked at.
            message: Its functions and tasks.
            closing: Why nothing is started any more, or None.

        Raises:
            RemoteProtocolError: The client broke the protocol.
        """
        functions, account = client.functions, client.account
        for function in message.functions:
            if account is client:
                check_function(function)
            functions[function.function_id] = ReceivedFunction(function, functions.get)
            if function.options.priority:
                account.queue = with_priorities(account.queue)
        if len(functions) > MAX_CLIENT_FUNCTIONS:
            raise RemoteProtocolError(f"more than {MAX_CLIENT_FUNCTIONS} functions")
        held_bytes, fenced = client.held_bytes, list[Task]()
        base, last_no, tasks, append = client.base, client.last_no, self._tasks.by_id, account.queue.append
        for no, items, function_id, payload in message.tasks:
            if no <= last_no or items < 1 or (last_no := no + items - 1) >> CLIENT_ID_SHIFT:
                raise RemoteProtocolError(f"task {no} of {items} items after item {last_no}")
            used = functions.get(function_id)
            if used is None:
                raise RemoteProtocolError(f"task {no} names function {function_id}, which is not known")
            client.last_no = last_no
            if account.broken is not None or closing is not None:
                kind = LOST if account.broken is None else BROKEN
                client.results.append((no, 0, items, kind, (account.broken or closing or "").encode()))
                self._output.touched[client] = None
                continue
            task = Task(base + no, client, no, 0, items, 0, used, payload)
            if items > 1:
                if used.function.options.timeout_s is not None:
                    raise RemoteProtocolError(f"task {no} of {items} items has a timeout")
                client.runs[no] = {task.task_id: task}
            if client.again and no in client.again:
                if not self._tasks.fence_again(task, fenced):
                    continue  # its head is done, with which what it takes here would be let go
            else:
                tasks[base + no] = task
                account.tasks_left += 1
                append(task)
            held_bytes += len(payload) + TASK_BYTES  # type: ignore[arg-type]
        client.held_bytes = held_bytes
        most = self._max_client_bytes
        if most is not None and held_bytes > most and client not in self.held and client is account:
            self.held.append(client)
            self._output.instructions.append(Hold(client.peer, True))
        self._assignment.line_up(account)
        for function_id in message.forget:
            if not function_id or functions.pop(function_id, None) is None:
                raise RemoteProtocolError(f"forget function {function_id}, which is not known")
        if message.forget:
            self.forget_functions(account, message.forget)
        return fenced

    def forget_functions(self, account: Client, function_ids: list[int]) -> None:
        """Have agents forget functions that no later call names."""
        keys = [(account.client_id, function_id) for function_id in function_ids]
        for agent in self._assignment.agents:
            agent.forgotten += agent.known.drop(keys)
            self._output.touched[agent] = None

    def release(self) -> None:
        """Go on reading the clients that have not so much here any more."""
        assert self._max_client_bytes is not None
        for client in list(self.held):
            if client.gone or client.held_bytes <= self._max_client_bytes // 2:
                self.held.remove(client)
                self._output.instructions.append(Hold(client.peer, False))
