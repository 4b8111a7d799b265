"""Which agent the scheduler gives a task to, and when: clients take turns, agents are filled evenly.

Each client has its part of an agent's room, also when others have filled that: or a single call would wait behind all
that an agent holds of a client with many, and only then be there for the agent to prefer. What one does not use others
may.

It knows how much each agent wants to hold and which clients wait for room. It does not know what becomes of a task
that it has handed out (see `scheduler_tasks`), except that it can be asked for again where others are idle.

What an event costs must not grow with the number of agents or clients. So what each agent holds is kept, not counted;
the agents stand in a heap by their load; and a client that has found no room anywhere is only looked at again where
something has changed since, for all clients or for it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
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
        #: Clients in `ready` that may find room anywhere. For the others all agents have been looked at in vain.
        self._fresh: dict[Client, None] = {}
        #: Those in `ready` that have given their calls priorities: their room depends on what is first in their queue.
        self._ranked: dict[Client, None] = {}
        #: {client: heap of (rank, order, agent)} where fresh clients may find room, if not at the head of `_by_load`.
        self._prospects: dict[Client, list[tuple[float, int, Agent]]] = {}
        #: Agents of which something has changed since the last `pump`: only there may the others find room.
        self._changed: dict[Agent, None] = {}
        #: Those of them where any client may; at the rest only one that has less there than before. True: whether or
        #: not there is room for all.
        self._wide: dict[Agent, bool] = {}
        #: (load, order, agent), least first, of those with any capacity. An entry counts if it has the agent's load.
        self._by_load: list[tuple[float, int, Agent]] = []
        self._last_order = 0
        #: {agent: since when} of those with fewer tasks than workers, and those with more. The longest idle first.
        self._idle: dict[Agent, float] = {}
        self._deep: dict[Agent, None] = {}

    # Who is there

    def add(self, agent: Agent) -> None:
        """Take in a new agent."""
        self._last_order += 1
        agent.order = self._last_order
        self.agents.append(agent)
        if len(self.agents) == 2:
            self.changed(self.agents[0])  # nobody has looked at it as long as it was the only one

    def remove(self, agent: Agent) -> None:
        """Forget an agent that is gone."""
        self.agents.remove(agent)
        agent.is_gone = True
        agent.load = -1.0
        self._changed.pop(agent, None)
        self._wide.pop(agent, None)
        self._idle.pop(agent, None)
        self._deep.pop(agent, None)
        for client in agent.seats:
            client.quotas.pop(agent, None)

    def line_up(self, client: Client) -> None:
        """Have `client` take its turns as long as it has something queued."""
        if client.queue and not client.is_ready:
            client.is_ready = True
            self.ready.append(client)
            self._fresh[client] = None
        if type(client.queue) is PriorityQueue and client.is_ready:
            self._fresh[client] = self._ranked[client] = None

    def refresh(self, client: Client) -> None:
        """Look for room for `client` everywhere again: something has changed for it."""
        if client.is_ready:
            self._fresh[client] = None

    def forget_client(self, client: Client) -> None:
        """Nothing is left of a client that is gone."""
        for agent in self.agents:
            agent.seats.pop(client, None)

    # What agents hold

    def changed(self, agent: Agent) -> None:
        """There may be more room at an agent: its capacity, its workers or a quota is another one."""
        self._changed[agent] = None
        self._wide[agent] = True

    def hold(self, task: Task, seat: Seat) -> None:
        """Have `seat` hold a task that comes from one that it holds."""
        task.seat = seat
        seat.tasks[task.task_id] = task
        seat.agent.held += 1
        self._changed[seat.agent] = None

    def release(self, task: Task) -> None:
        """An agent does not hold a task any more."""
        seat = task.seat
        assert seat is not None
        task.seat = None
        agent = seat.agent
        del seat.tasks[task.task_id]
        if task.is_blocked:
            task.is_blocked = False
            seat.blocked -= 1
        else:
            agent.held -= 1
        self._changed[agent] = None
        agent.released[seat.client] = None
        if not seat.tasks:
            capacity, clients = agent.capacity, agent.clients_here
            agent.clients_here = clients - 1
            # The part of those who are here, or of those who are not, may have become larger.
            if clients > 1 and max(1, capacity // (clients - 1)) != max(1, capacity // (clients + 1)):
                self._wide[agent] = True

    def block(self, task: Task) -> None:
        """A task waits for others: its agent has room for one more."""
        seat = task.seat
        assert seat is not None and not task.is_blocked
        task.is_blocked = True
        seat.blocked += 1
        seat.agent.held -= 1
        self.changed(seat.agent)

    def unblock(self, task: Task) -> None:
        """A task waits no more."""
        seat = task.seat
        assert seat is not None and task.is_blocked
        task.is_blocked = False
        seat.blocked -= 1
        seat.agent.held += 1
        self._changed[seat.agent] = None

    def pump(self) -> None:
        """Give queued tasks to agents with room, the clients taking turns."""
        if not self._changed and not self._fresh:
            return
        if len(self.agents) != 1 or not self._pump_only():
            self._weigh_changed()
            self._take_turns()
            self._fill_up()
            self._look_for_idle()
            self._prospects.clear()
        for agent in self._changed:
            agent.released.clear()
        self._changed.clear()
        self._wide.clear()

    def _weigh_changed(self) -> None:
        changed = self._changed
        for agent in [agent for agent in changed if agent.is_gone]:
            del changed[agent]
            self._wide.pop(agent, None)
        for agent in changed:
            self._weigh(agent)
            if agent.held < agent.capacity:
                self._wide.setdefault(agent, False)

    def _take_turns(self) -> None:
        """Give room to whoever is next, as long as there is any that all may have or a client has not looked."""
        ready, fresh, wide = self.ready, self._fresh, self._wide
        in_vain = 0
        while wide and in_vain < len(ready):
            client = ready[0]
            ready.rotate(-1)
            seat = self._give_turn(client)
            in_vain = 0 if seat is not None else in_vain + client.is_ready
            if seat is not None and seat.agent.held >= seat.agent.capacity and not wide.get(seat.agent):
                wide.pop(seat.agent, None)
        while fresh:
            client = next(iter(fresh))
            if self._give_turn(client) is not None:
                del fresh[client]
                fresh[client] = None

    def _give_turn(self, client: Client) -> Seat | None:
        """Give a client some of its tasks' room. Return where, or None if it has no use for any."""
        if not self._has_queued(client):
            self._leave(client)
            return None
        seat, room = self._best_seat(client)
        if seat is not None:
            self._give(seat, room)
        return seat

    def _fill_up(self) -> None:
        """Give the clients that have less somewhere than before what they may have there."""
        for agent in list(self._changed):
            for client in [*agent.released, *self._ranked]:
                while client.is_ready:
                    if not self._has_queued(client):
                        self._leave(client)
                        break
                    seat = agent.seat(client)
                    room = self._room(seat)
                    if room <= 0:
                        break
                    self._give(seat, room)

    def _give(self, seat: Seat, room: int) -> None:
        turn = room if len(self.ready) == 1 else min(room, TURN_TASKS)
        if type(seat.client.queue) is PriorityQueue:
            turn = 1  # the room is that of the first one
        elif len(self.agents) > 1:
            turn = min(turn, max(1, seat.agent.workers if seat.quota is None else seat.quota))
        self._assign(seat, turn)
        self._weigh(seat.agent)
        self._changed[seat.agent] = None

    def _leave(self, client: Client) -> None:
        """End the turns of a client that has nothing queued."""
        self.ready.remove(client)
        self._fresh.pop(client, None)
        self._ranked.pop(client, None)
        client.is_ready = False

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
        self._fresh.pop(client, None)
        if client.is_congested:
            return True
        room = agent.capacity - agent.held
        if room > 0 and self._has_queued(client):
            self._assign(seat, room)
        if not self._has_queued(client):
            self._leave(client)
        return True

    def _has_queued(self, client: Client) -> bool:
        queue = client.queue
        while queue and queue[0].state != QUEUED:
            queue.popleft()
        return bool(queue)

    def _weigh(self, agent: Agent) -> None:
        """Put an agent where it belongs in the heap; what stood there for it does not count any more."""
        load = agent.held / max(1, agent.workers) if agent.capacity > 0 else -1.0
        if load == agent.load:
            return
        agent.load = load
        by_load = self._by_load
        if len(by_load) > 4 * len(self.agents) + 64:
            by_load[:] = [(a.load, a.order, a) for a in self.agents if a.load >= 0.0]
            heapq.heapify(by_load)
        elif load >= 0.0:
            heapq.heappush(by_load, (load, agent.order, agent))

    def _best_seat(self, client: Client) -> tuple[Seat | None, int]:
        """Return the client's seat at the agent with the fewest tasks per worker that has room for it, and how much."""
        if client not in self._fresh:
            return self._roomiest(client) if self._wide else (None, 0)
        prospects = self._prospects.get(client)
        if prospects is None:
            if client.max_running is None:
                by_load = self._by_load
                while by_load and by_load[0][0] != by_load[0][2].load:
                    heapq.heappop(by_load)
                if by_load and (room := self._room(seat := by_load[0][2].seat(client))) > 0:
                    return seat, room
            prospects = self._prospects[client] = self._look_everywhere(client)
        while prospects:
            rank, order, agent = prospects[0]
            seat = agent.seat(client)
            room = self._room(seat)
            if room <= 0:
                heapq.heappop(prospects)
            elif (risen := self._rank(seat)) > rank:
                heapq.heapreplace(prospects, (risen, order, agent))
            else:
                return seat, room
        del self._fresh[client]
        return None, 0

    def _look_everywhere(self, client: Client) -> list[tuple[float, int, Agent]]:
        """Return all agents with room for a client, as a heap of (rank, order, agent)."""
        agents: Iterable[Agent] = self.agents if client.max_running is None else client.quotas
        found = [
            (self._rank(seat), agent.order, agent) for agent in agents if self._room(seat := agent.seat(client)) > 0
        ]
        heapq.heapify(found)
        return found

    def _roomiest(self, client: Client) -> tuple[Seat | None, int]:
        """Return the best seat of a client where something has changed."""
        best: Seat | None = None
        best_room = 0
        best_rank = (0.0, 0)
        for agent in self._changed:
            seat = agent.seat(client)
            room = self._room(seat)
            if room > 0 and (best is None or (self._rank(seat), agent.order) < best_rank):
                best, best_room, best_rank = seat, room, (self._rank(seat), agent.order)
        return best, best_room

    def _rank(self, seat: Seat) -> float:
        load = seat.agent.load
        return load if seat.quota is None else max(load, (len(seat.tasks) - seat.blocked) / max(1, seat.quota))

    def _room(self, seat: Seat) -> int:
        """Return how many tasks more of a client an agent is to hold."""
        agent, client = seat.agent, seat.client
        capacity = agent.capacity
        if capacity <= 0 or client.is_congested or (agent.broken_for and client.client_id in agent.broken_for):
            return 0
        held = len(seat.tasks) - seat.blocked
        room = capacity - agent.held
        if type(client.queue) is PriorityQueue and client.queue:
            # What the agent holds of lower priority keeps nothing away that it is to start first.
            room += client.queue.rank * agent.workers
        others = agent.clients_here - bool(seat.tasks)
        if others:
            # Its part, whatever others have taken of it: they get nothing more until they are below theirs.
            room = max(room, max(1, capacity // (others + 1)) - held)
        if client.max_running is not None:
            quota = seat.quota or 0
            # Long calls are not sent before they can run: they might be wanted elsewhere meanwhile.
            is_deep = capacity > 2 * agent.workers > 0
            room = min(room, (-(-capacity * quota // agent.workers) if is_deep else quota) - held)
        return room

    def _assign(self, seat: Seat, turn: int) -> None:
        agent, client = seat.agent, seat.client
        queue, runs, known, client_id, held = client.queue, agent.runs, agent.known, client.client_id, seat.tasks
        function: ReceivedFunction | None = None
        before = len(held)
        while turn and queue:
            task = queue.popleft()
            if task.state != QUEUED:
                continue
            turn -= 1
            task.state = ASSIGNED
            task.seat = seat
            task_id = task.task_id
            held[task_id] = task
            if task.function is not function:
                function = task.function
                if function.function_id and known.need((client_id, function.function_id)):
                    for part in function.parts:
                        if part.function_id == function.function_id or known.need((client_id, part.function_id)):
                            agent.functions.append((client_id, part))
                    known.need((client_id, function.function_id))  # it outlasts its parts, which the agent has with it
            runs.append((task_id, task.attempt, client_id, task.items, task.skip, function.function_id, task.payload))
        if not before and held:
            agent.clients_here += 1
        agent.held += len(held) - before
        self._output.touched[agent] = None

    # What waits at one agent while another is idle

    def _look_for_idle(self) -> None:
        """Note which agents are idle, and which hold more than they can run."""
        for agent in self._changed:
            if agent.held >= min(agent.workers, agent.capacity):
                self._idle.pop(agent, None)
            elif agent not in self._idle:
                self._idle[agent] = self._output.now
            if agent.held > agent.workers:
                self._deep[agent] = None
            else:
                self._deep.pop(agent, None)

    def to_recall(self) -> list[Task]:
        """Return the tasks that wait at one agent while another has had idle workers for some time."""
        now = self._output.now
        idle = 0
        idle_agents: list[Agent] = []
        for agent, since in self._idle.items():
            if since + IDLE_BEFORE_RECALL_S > now:
                break
            idle_agents.append(agent)
            idle += min(agent.workers, agent.capacity) - agent.held
        for agent in idle_agents:
            del self._idle[agent]
            self._idle[agent] = now
        found: list[Task] = []
        if not idle:
            return found
        welcome: dict[Client, bool] = {}
        for holder in self._deep:
            waiting = min(holder.held - holder.workers, idle - len(found))
            for seat in holder.seats.values():
                client = seat.client
                if client not in welcome:
                    welcome[client] = any(self._room(agent.seat(client)) > 0 for agent in idle_agents)
                if not welcome[client]:
                    continue
                for task in reversed(seat.tasks.values()):
                    if waiting <= 0:
                        break
                    if task.state == ASSIGNED and not task.recall_refused:
                        waiting -= 1
                        found.append(task)
        return found

    def deadline(self) -> float | None:
        """Return the time from which on `to_recall` may find something, or None."""
        if len(self.agents) > 1 and self._deep and self._idle:
            return next(iter(self._idle.values())) + IDLE_BEFORE_RECALL_S
        return None

    def check(self) -> None:
        """Assert the invariants, between events."""
        assert not self._changed and not self._wide, self._changed
        assert not self._fresh or len(self.agents) < 2, self._fresh
        entries = {(load, agent) for load, _, agent in self._by_load}
        for agent in self.agents:
            seats = agent.seats.values()
            blocked = [sum(task.is_blocked for task in seat.tasks.values()) for seat in seats]
            assert blocked == [seat.blocked for seat in seats], agent.peer
            assert agent.held == sum(len(seat.tasks) for seat in seats) - sum(blocked), agent.peer
            assert agent.clients_here == sum(bool(seat.tasks) for seat in seats), agent.peer
            assert all(seat.client.tasks_left for seat in agent.seats.values() if seat.client.gone), agent.peer
            if len(self.agents) > 1:
                assert agent.load == (agent.held / max(1, agent.workers) if agent.capacity > 0 else -1.0), agent.peer
                assert agent.load < 0.0 or (agent.load, agent) in entries, agent.peer
                assert (agent in self._deep) == (agent.held > agent.workers), agent.peer
                assert (agent in self._idle) == (agent.held < min(agent.workers, agent.capacity)), agent.peer
        assert [*self._idle.values()] == sorted(self._idle.values())
        for client in self.ready:
            assert client.is_ready
            roomy = [agent.peer for agent in self.agents if self._room(agent.seat(client)) > 0]
            assert client.gone or not any(task.state == QUEUED for task in client.queue) or not roomy, roomy
