"""How many of a client's items run at once: its `max_running`, divided among the agents.

Agents enforce it, since they split runs: each may have so many workers for the client. The parts are in proportion to
the agents' workers, and change when agents come, go or change. One agent's part is only raised when another one that
had more has said that it keeps its lower one, and what an agent out of reach may still run counts until its fence time
is over: so there are never more than `max_running` at work, not even for a moment.

This module knows the agents and the clients with limits, and no tasks.
"""

from __future__ import annotations

from scaler_executor.protocol.messages import ClientLimit
from scaler_executor.protocol.scheduler_assignment import Assignment
from scaler_executor.protocol.scheduler_output import SchedulerOutput
from scaler_executor.protocol.scheduler_rows import Agent, Client, Seat


class Limits:
    """The clients that have limits, and what each agent was told of them."""

    def __init__(self, assignment: Assignment, output: SchedulerOutput) -> None:
        #: {client_id: Client} of those that have any.
        self.clients: dict[int, Client] = {}
        #: Something has changed since `divide`: for all of them, and for these.
        self.is_due = False
        self.due: dict[Client, None] = {}
        self._assignment = assignment
        self._agents = assignment.agents
        self._output = output
        self._last_limit_no = 0

    def divide(self) -> None:
        """Tell agents what has changed for them."""
        due = list(self.clients.values()) if self.is_due else list(self.due)
        self.is_due = False
        self.due.clear()
        for client in due:
            if client.max_running is None:
                for agent in self._agents:
                    seat = agent.seat(client)
                    if not seat.limit_no:
                        self._say(seat, None)
            else:
                self._divide(client, client.max_running)

    def add(self, client: Client) -> None:
        """Take in a new client with limits."""
        self.clients[client.client_id] = client
        self.due[client] = None

    def forget_client(self, client: Client) -> None:
        """A client is gone."""
        self.clients.pop(client.client_id, None)
        self.due.pop(client, None)

    def limited(self, agent: Agent, client_id: int, limit_no: int) -> None:
        """An agent keeps a limit from now on."""
        client = self.clients.get(client_id)
        seat = agent.seats.get(client) if client is not None else None
        # If it is not the newest one, the agent has more to say.
        if seat is not None and seat.quota is not None and seat.limit_no == limit_no and seat.in_use != seat.quota:
            seat.in_use = seat.quota
            self.due[seat.client] = None

    def agent_lost(self, agent: Agent) -> None:
        """What an agent out of reach may run counts until it must have stopped."""
        for seat in agent.seats.values():
            if not seat.tasks:
                seat.in_use = 0
            seat.client.out_of_reach += seat.in_use

    def agent_stopped(self, agent: Agent) -> None:
        """The fence time of a lost agent is over."""
        for seat in agent.seats.values():
            seat.client.out_of_reach -= seat.in_use
        self.is_due = True

    def check(self) -> None:
        """Assert that no client can have more running than it may."""
        for client in self.clients.values():
            in_use = [agent.seats[client].in_use for agent in self._agents if client in agent.seats]
            assert client.max_running is None or sum(in_use) + client.out_of_reach <= client.max_running, in_use

    def _divide(self, client: Client, max_running: int) -> None:
        parts = self._parts(client, max_running)
        seats = [agent.seat(client) for agent in self._agents]
        for seat in seats:
            part = parts.get(seat.agent, 0)
            if part < (seat.quota or 0):
                self._say(seat, part)
            if not seat.tasks:
                seat.in_use = seat.quota or 0  # it has nothing to stop first
        free = max_running - client.out_of_reach - sum(seat.in_use for seat in seats)
        for seat in seats:
            quota = min(parts.get(seat.agent, 0), seat.in_use + max(0, free))
            if quota > (seat.quota or 0):
                free -= max(0, quota - seat.in_use)
                seat.in_use = max(seat.in_use, quota)
                self._say(seat, quota)

    def _parts(self, client: Client, max_running: int) -> dict[Agent, int]:
        """Divide `max_running` in proportion to the workers of the agents that can run the client's calls."""
        able = [a for a in self._agents if a.capacity > 0 and a.workers > 0 and client.client_id not in a.broken_for]
        workers = sum(agent.workers for agent in able)
        if workers <= max_running:
            return {agent: agent.workers for agent in able}
        parts = {agent: max_running * agent.workers // workers for agent in able}
        # What is left by rounding: where most was cut off, or it is already.
        able.sort(key=lambda a: (-(max_running * a.workers % workers), -(a.seat(client).quota or 0)))
        for agent in able[: max_running - sum(parts.values())]:
            parts[agent] += 1
        return parts

    def _say(self, seat: Seat, quota: int | None) -> None:
        self._last_limit_no += 1
        seat.quota, seat.limit_no = quota, self._last_limit_no
        client = seat.client
        if quota:
            client.quotas[seat.agent] = None
        else:
            client.quotas.pop(seat.agent, None)
        asked = 0 if quota is None else seat.limit_no
        seat.agent.limits.append(ClientLimit(client.client_id, quota, client.max_items_per_worker, asked))
        self._output.touched[seat.agent] = None
        self._assignment.changed(seat.agent)
