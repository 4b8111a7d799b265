"""Which agent the scheduler gives a task to, and when: clients take turns, agents are filled evenly.

Each client has its part of an agent's room, also when others have filled that: or a single call would wait behind all
that an agent holds of a client with many, and only then be there for the agent to prefer. What one does not use others
may.

It knows how much each agent wants to hold and which clients wait for room. It does not know what becomes of a task
that it has handed out (see `scheduler_tasks`), except that it can be asked for again where others are idle.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from scaler_executor.protocol.functions import ReceivedFunction
from scaler_executor.protocol.priorities import PriorityQueue
from scaler_executor.protocol.scheduler_output import SchedulerOutput
from scaler_executor.protocol.scheduler_rows import ASSIGNED, QUEUED, Agent, Client, Seat, Task

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
        if len(self.agents) == 1 and self._pump_only():
            return
        if ready or len(self.agents) > 1:
            self._count()
        stuck = 0
        while ready and stuck < len(ready):
            client = ready[0]
            seat, room = self._roomiest(client)
            if seat is None:
                stuck += 1
                ready.rotate(-1)
                continue
            stuck = 0
            turn = room if len(ready) == 1 else min(room, TURN_TASKS)
            if type(client.queue) is PriorityQueue:
                turn = 1  # the room is that of the first one
            elif len(self.agents) > 1:
                turn = min(turn, max(1, seat.agent.workers if seat.quota is None else seat.quota))
            self._assign(seat, turn)
            if self._has_queued(client):
                ready.rotate(-1)
            else:
                ready.popleft()

    def _pump_only(self) -> bool:
        """If there is one agent and it has one client, give it tasks at no expense. Return whether that was so."""
        agent, ready = self.agents[0], self.ready
        if not ready:
            return True
        client = ready[0]
        seat = agent.seats.get(client)
        if seat is None or len(agent.seats) > 1 or len(ready) > 1 or agent.broken_for or client.max_running is not None:
            return False
        if type(client.queue) is PriorityQueue:
            return False
        if client.is_congested:
            return True
        room = agent.capacity - seat.held
        if room > 0:
            self._assign(seat, room)
            if not self._has_queued(client):
                ready.popleft()
        return True

    def _has_queued(self, client: Client) -> bool:
        queue = client.queue
        while queue and queue[0].state != QUEUED:
            queue.popleft()
        return bool(queue)

    def _count(self) -> None:
        """Count what each agent holds."""
        for agent in self.agents:
            held = clients_here = 0
            for seat in agent.seats.values():
                if seat.held:
                    held += seat.held
                    clients_here += 1
            agent.held, agent.clients_here = held, clients_here

    def _roomiest(self, client: Client) -> tuple[Seat | None, int]:
        """Return the client's seat at the agent with the fewest tasks per worker that has room for it, and how much."""
        best: Seat | None = None
        best_room = 0
        best_load = 0.0
        for agent in self.agents:
            seat = agent.seat(client)
            room = self._room(seat)
            if room <= 0:
                continue
            load = agent.held / max(1, agent.workers)
            if seat.quota is not None:
                load = max(load, seat.held / seat.quota)
            if best is None or load < best_load:
                best, best_room, best_load = seat, room, load
        return best, best_room

    def _room(self, seat: Seat) -> int:
        """Return how many tasks more of a client an agent is to hold."""
        agent, client = seat.agent, seat.client
        capacity = agent.capacity
        if capacity <= 0 or client.is_congested or (agent.broken_for and client.client_id in agent.broken_for):
            return 0
        room = capacity - agent.held
        if type(client.queue) is PriorityQueue:
            # What the agent holds of lower priority keeps nothing away that it is to start first.
            room += client.queue.rank * agent.workers
        others = agent.clients_here - (seat.held > 0)
        if others:
            # Its part, whatever others have taken of it: they get nothing more until they are below theirs.
            room = max(room, max(1, capacity // (others + 1)) - seat.held)
        if client.max_running is not None:
            quota = seat.quota or 0
            # Long calls are not sent before they can run: they might be wanted elsewhere meanwhile.
            is_deep = capacity > 2 * agent.workers > 0
            room = min(room, (-(-capacity * quota // agent.workers) if is_deep else quota) - seat.held)
        return room

    def forget_client(self, client: Client) -> None:
        """Nothing is left of a client that is gone."""
        for agent in self.agents:
            agent.seats.pop(client, None)

    def _assign(self, seat: Seat, turn: int) -> None:
        agent, client = seat.agent, seat.client
        queue, runs, known, client_id = client.queue, agent.runs, agent.known, client.client_id
        function: ReceivedFunction | None = None
        assigned = 0
        while assigned < turn and queue:
            task = queue.popleft()
            if task.state != QUEUED:
                continue
            task.state = ASSIGNED
            task.seat = seat
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
        if assigned and not seat.held:
            agent.clients_here += 1
        seat.held += assigned
        agent.held += assigned
        self._output.touched[agent] = None

    def to_recall(self, tasks: dict[int, Task]) -> list[Task]:
        """Return those of `tasks` that wait at one agent while another has had idle workers for some time."""
        now = self._output.now
        idle = 0
        idle_agents: list[Agent] = []
        for agent in self.agents:
            if agent.held >= min(agent.workers, agent.capacity):
                agent.idle_since = None
            elif agent.idle_since is None:
                agent.idle_since = now
            elif agent.idle_since + IDLE_BEFORE_RECALL_S <= now:
                idle_agents.append(agent)
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
            if (
                task.state == ASSIGNED
                and holder in waiting
                and not task.recall_refused
                and waiting[holder] > 0
                and any(self._room(agent.seat(task.client)) > 0 for agent in idle_agents)
            ):
                waiting[holder] -= 1
                found.append(task)
        return found

    def deadlines(self) -> list[float]:
        """Return the times from which on `to_recall` may find something."""
        if len(self.agents) > 1 and any(agent.held > agent.workers for agent in self.agents):
            return [agent.idle_since + IDLE_BEFORE_RECALL_S for agent in self.agents if agent.idle_since is not None]
        return []
