"""What the scheduler tells those who only look: a snapshot, and what has been done lately.

It reads the rows of `scheduler_rows` and changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from scaler_executor.protocol.messages import AgentStatus, CallStatus, ClientStatus, StatusReport
from scaler_executor.protocol.scheduler_rows import GONE, QUEUED, Agent, Client, Task

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


def report(
    peers: Iterable[Client | Agent], tasks: Iterable[Task], tally: Tally, now: float, version: int, python: str
) -> StatusReport:
    """Return the snapshot.

    Args:
        peers: All clients and agents.
        tasks: All that are not over.
        tally: Of what is over.
        now: The time.
        version: Of the protocol.
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
        client = clients.get(task.client.client_id)
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
        agents, list(clients.values()), calls, len(running), queued, tally.items, tally.rate(now), version, python
    )
