"""What the scheduler tells those who only look, and does for them: a snapshot, what has been done lately, a cancel.

It reads the rows of `scheduler_rows`, and changes them only through the table of `scheduler_tasks`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.messages import (
    BY_OPERATOR,
    CLIENT_ID_SHIFT,
    PROTOCOL_VERSION,
    AgentStatus,
    CallStatus,
    CancelKind,
    ClientStatus,
    OperatorAnswer,
    OperatorCancel,
    StatusAsk,
    StatusReport,
)
from scaler_executor.protocol.scheduler_events import Send
from scaler_executor.protocol.scheduler_output import SchedulerOutput
from scaler_executor.protocol.scheduler_rows import GONE, QUEUED, Agent, Client, Observer, Task
from scaler_executor.protocol.scheduler_tasks import SchedulerTasks

#: The rate is a mean over about this.
RATE_S: Final = 10.0
#: A report names at most so many running calls, the oldest ones.
MAX_CALLS: Final = 200
#: Longer names of functions are cut.
MAX_NAME: Final = 200


class Tally:
    """How many items have been answered."""

    def __init__(self) -> None:
        self.items = 0
        #: (second, items answered before it), the latest `RATE_S` of them.
        self._marks: deque[tuple[int, int]] = deque()

    def add(self, items: int, now: float) -> None:
        """Count answered items."""
        if not self._marks or self._marks[-1][0] != int(now):
            self._marks.append((int(now), self.items))
            while self._marks[0][0] < now - RATE_S:
                self._marks.popleft()
        self.items += items

    def rate(self, now: float) -> float:
        """Return the items answered per second, lately."""
        for second, before in self._marks:
            if second >= now - RATE_S:
                return (self.items - before) / max(1.0, now - second)
        return 0.0


class InquiryDesk:
    """Answers observers.

    Args:
        peers: All that are there.
        tasks: Those that are not over.
        output: Takes the answers.
        python: The version that clients and agents run.
    """

    def __init__(
        self,
        peers: Mapping[int, Client | Agent | Observer],
        tasks: SchedulerTasks,
        output: SchedulerOutput,
        python: str,
    ) -> None:
        self._peers = peers
        self._tasks = tasks
        self._output = output
        self._python = python
        self.tally = Tally()

    def answer(self, observer: Observer, message: Any) -> None:
        """Do what an observer asks for.

        Raises:
            RemoteProtocolError: That is nothing that an observer may say.
        """
        instructions = self._output.instructions
        if isinstance(message, StatusAsk):
            peers = [peer for peer in self._peers.values() if not isinstance(peer, Observer)]
            status = report(peers, self._tasks.by_id.values(), self.tally, self._output.now, self._python)
            instructions.append(Send(observer.peer, status))
        elif isinstance(message, OperatorCancel):
            stopped = [named for named in message.tasks if self._stop(*named)]
            instructions.append(Send(observer.peer, OperatorAnswer(stopped)))
        else:
            raise RemoteProtocolError(f"{type(message).__name__} from an observer")

    def _stop(self, client_id: int, no: int) -> bool:
        """Cancel a task by force. Return whether there is one."""
        task = self._tasks.by_id.get(client_id << CLIENT_ID_SHIFT | no) if client_id > 0 else None
        if task is None or task.client.gone or not 0 < no < 1 << CLIENT_ID_SHIFT:
            return False
        self._tasks.step(task, "CANCEL", BY_OPERATOR, CancelKind.FORCED)
        return True


def report(
    peers: Iterable[Client | Agent], tasks: Iterable[Task], tally: Tally, now: float, python: str
) -> StatusReport:
    """Return the snapshot.

    Args:
        peers: All clients and agents.
        tasks: All that are not over.
        tally: Of what is over.
        now: The time.
        python: The version that all run.
    """
    agents = []
    clients: dict[int, ClientStatus] = {}
    for peer in peers:
        if isinstance(peer, Agent):
            agents.append(AgentStatus(peer.name, peer.workers, peer.held, now - peer.since))
        else:
            clients[peer.client_id] = ClientStatus(peer.client_id, peer.name, 0, 0, now - peer.since)
    running: list[Task] = []
    queued = 0
    for task in tasks:
        client = clients.get(task.client.account.client_id)
        if task.running_since is not None and task.state not in (QUEUED, GONE):
            running.append(task)
            if client is not None:
                client.running += 1
        else:
            queued += task.open_items
            if client is not None:
                client.queued += task.open_items
    running.sort(key=lambda task: task.running_since or 0.0)
    calls = [
        CallStatus(
            task.client.client_id,
            task.task_id - task.client.base,
            task.function.function.name[:MAX_NAME],
            now - (task.running_since or now),
            task.open_items,
            task.agent.name if task.agent is not None else "",
        )
        for task in running[:MAX_CALLS]
    ]
    return StatusReport(
        agents,
        list(clients.values()),
        calls,
        len(running),
        queued,
        tally.items,
        tally.rate(now),
        PROTOCOL_VERSION,
        python,
    )
