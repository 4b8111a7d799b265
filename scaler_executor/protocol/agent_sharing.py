"""How the clients of one agent share its workers.

A worker serves one client in its life, so to share workers is to replace them, which costs a fork. Each client that
has queued calls is to have as many workers as the others, and what one has no use for is for the others. Who has too
few is given what is free, then what lies idle with others; only then do those who have too many owe one, and let it go
when it has nothing in its hands. No call is stopped for another client.

Between two clients that differ by one worker there is no right and wrong, but there are turns: who was given a worker
keeps it for a slice of time. So three clients on two workers, and two on three, share alike in the long run.

This module knows how many workers each client has and wants, and nothing of calls or functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scaler_executor.protocol.agent_crew import Client, Crew, Worker
from scaler_executor.protocol.agent_hiring import INFINITY, SLICE_S, Hiring
from scaler_executor.protocol.agent_output import AgentOutput

#: A worker that is idle for so long may be given to a client that has one less, before the slice is over: a client
#: that waits for each result before it submits the next call is idle for shorter times.
IDLE_S: Final = 0.01


class Sharing:
    """Moves workers from clients that have more of them to those that have less."""

    def __init__(self, crew: Crew, hiring: Hiring, output: AgentOutput) -> None:
        self._crew = crew
        self._hiring = hiring
        self._output = output
        #: When a client that waits may be given a worker by the mere passing of time, or None.
        self.due_at: float | None = None

    @staticmethod
    def rank(client: Client) -> tuple[int, int]:
        """Sort clients: first who has the fewest workers, and of these whose turn was first."""
        return client.staff, client.turn

    def share(self, starved: Sequence[Client]) -> None:
        """Get workers for clients with calls that their own cannot take now."""
        crew, hiring = self._crew, self._hiring
        for client in crew.clients.values():
            client.owes = 0
        if not starved or hiring.hire_at is not None:
            return
        wanted = {client: hiring.wanted(client) for client in starved}
        while poor := self._poorest(wanted):
            if crew.staff >= crew.max_workers:
                other = self.to_take(poor)
                if other is None:
                    break
                hiring.retire(other)
                hiring.has_turn(other.client)
            hiring.order(poor)
            poor.slice_end = INFINITY
            wanted[poor] -= 1
        if poor:
            self._note_debts(wanted)

    def _poorest(self, wanted: dict[Client, int]) -> Client | None:
        full = self._crew.is_full
        waiting = [client for client, workers in wanted.items() if workers > 0 and not full(client)]
        return min(waiting, key=self.rank, default=None)

    def to_take(self, poor: Client) -> Worker | None:
        """Return a worker with nothing in its hands that should be another one's, of `poor`."""
        now = self._output.now
        best: Worker | None = None
        best_surplus = 0
        for worker in self._crew.workers.values():
            owner = worker.client
            if owner is poor or not worker.counts or worker.held or worker.portions:
                continue
            surplus = owner.staff - poor.staff
            if surplus >= 2:
                since = now
            elif worker.state != "READY":
                continue
            elif surplus == 1:
                since = min(worker.idle_since + IDLE_S, owner.slice_end)
            else:
                # It has its share and no use for it. Its next call should find it warm, if that comes soon.
                since = worker.idle_since + SLICE_S
            if since > now:
                self._due(since)
            elif best is None or surplus > best_surplus:
                best, best_surplus = worker, surplus
        return best

    def _note_debts(self, wanted: dict[Client, int]) -> None:
        """Nothing is free: note who is to let a worker go when it has nothing in its hands."""
        now = self._output.now
        staff = {client: client.staff for client in self._crew.clients.values()}
        gave: set[Client] = set()
        was_given: set[Client] = set()
        while True:
            waiting = [client for client, workers in wanted.items() if workers > 0 and client not in gave]
            waiting = [client for client in waiting if staff[client] < client.max_workers]
            if not waiting:
                return
            poor = min(waiting, key=lambda client: (staff[client], client.turn))
            rich = max((c for c in staff if c is not poor), key=lambda client: (staff[client], -client.slice_end))
            surplus = staff[rich] - staff[poor]
            if surplus < 1:
                return
            if surplus == 1 and (rich.slice_end > now or rich in was_given):
                if rich not in was_given:
                    self._due(rich.slice_end)
                return
            rich.owes += 1
            gave.add(rich)
            was_given.add(poor)
            staff[rich] -= 1
            staff[poor] += 1
            wanted[poor] -= 1

    def _due(self, at: float) -> None:
        if at != INFINITY and (self.due_at is None or at < self.due_at):
            self.due_at = at
