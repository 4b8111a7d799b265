"""Which agent the scheduler gives a task to, and when: clients take turns, agents are filled evenly.

It knows how much each agent wants to hold and which clients wait for room. It does not know what becomes of a task
that it has handed out (see `scheduler_tasks`), except that it can be asked for again where others are idle.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from scaler_executor.protocol.functions import ReceivedFunction
from scaler_executor.protocol.scheduler_output import SchedulerOutput
from scaler_executor.protocol.scheduler_rows import ASSIGNED, QUEUED, Agent, Client, Task

#: An agent may have idle workers for so long before calls that wait elsewhere are recalled for it.
IDLE_BEFORE_RECALL_S: Final = 0.02
#: Clients take turns of so many tasks.
TURN_TASKS: Final = 64


class Assignment:
    """The clients that wait for room, and the agents that have it."""

    def __init__(self, output: SchedulerOutput) -> None:
        self.agents: list[Agent] = []
        #: Clients that may have something in their queue, the one whose turn it is first.
        self.ready: deque[Client] = deque()
        self._output = output

    def line_up(self, client: Client) -> None:
        """Have `client` take its turns as long as it has something queued."""
        if client.queue and client not in self.ready:
            self.ready.append(client)

    def pump(self) -> None:
        """Give queued tasks to agents with room, the clients taking turns."""
        ready = self.ready
        for _ in range(len(ready)):
            if ready and not self._has_queued(ready[0]):
                ready.popleft()
            else:
                ready.rotate(-1)
        stuck = 0
        while ready and stuck < len(ready):
            client = ready[0]
            agent = self._roomiest(client)
            if agent is None:
                stuck += 1
                ready.rotate(-1)
                continue
            stuck = 0
            room = agent.capacity - agent.held
            turn = room if len(ready) == 1 else min(room, TURN_TASKS)
            if len(self.agents) > 1:
                turn = min(turn, max(1, agent.workers))
            self._assign(client, agent, turn)
            if self._has_queued(client):
                ready.rotate(-1)
            else:
                ready.popleft()

    def _has_queued(self, client: Client) -> bool:
        queue = client.queue
        while queue and queue[0].state != QUEUED:
            queue.popleft()
        return bool(queue)

    def _roomiest(self, client: Client) -> Agent | None:
        """Return the agent with the fewest tasks per worker that has room and can run this client's calls."""
        best: Agent | None = None
        best_load = 0.0
        for agent in self.agents:
            if agent.held >= agent.capacity or client.client_id in agent.broken_for:
                continue
            load = agent.held / max(1, agent.workers)
            if best is None or load < best_load:
                best, best_load = agent, load
        return best

    def _assign(self, client: Client, agent: Agent, turn: int) -> None:
        queue, runs, known, client_id = client.queue, agent.runs, agent.known, client.client_id
        function: ReceivedFunction | None = None
        assigned = 0
        while assigned < turn and queue:
            task = queue.popleft()
            if task.state != QUEUED:
                continue
            task.state = ASSIGNED
            task.agent = agent
            assigned += 1
            if task.function is not function:
                function = task.function
                if function.function_id and known.need((client_id, function.function_id)):
                    for part in function.parts:
                        if part.function_id == function.function_id or known.need((client_id, part.function_id)):
                            agent.functions.append((client_id, part))
                    known.need((client_id, function.function_id))  # it outlasts its parts, which the agent has with it
            runs.append(
                (task.task_id, task.attempt, client_id, task.items, task.skip, task.function.function_id, task.payload)
            )
        agent.held += assigned
        self._output.touched[agent] = None

    def to_recall(self, tasks: dict[int, Task]) -> list[Task]:
        """Return those of `tasks` that wait at one agent while another has had idle workers for some time."""
        now = self._output.now
        idle = 0
        for agent in self.agents:
            if self.ready or agent.held >= min(agent.workers, agent.capacity):
                agent.idle_since = None
            elif agent.idle_since is None:
                agent.idle_since = now
            elif agent.idle_since + IDLE_BEFORE_RECALL_S <= now:
                idle += min(agent.workers, agent.capacity) - agent.held
                agent.idle_since = now
        waiting: dict[Agent | None, int] = {a: a.held - a.workers for a in self.agents if a.held > a.workers}
        if not idle or not waiting:
            return []
        found: list[Task] = []
        for task in reversed(list(tasks.values())):
            if len(found) == idle:
                break
            holder = task.agent
            if task.state == ASSIGNED and holder in waiting and not task.recall_refused and waiting[holder] > 0:
                waiting[holder] -= 1
                found.append(task)
        return found

    def deadlines(self) -> list[float]:
        """Return the times from which on `to_recall` may find something."""
        if len(self.agents) > 1 and any(agent.held > agent.workers for agent in self.agents):
            return [agent.idle_since + IDLE_BEFORE_RECALL_S for agent in self.agents if agent.idle_since is not None]
        return []
