"""Which workers an agent has: when one is ordered, let go or waited for, and when it is given up to start any.

It knows the workers of `agent_crew`, the clients that they are for, and how often starting one has failed. Of the
calls in their hands it knows no more than that there are some.
"""

from __future__ import annotations

from typing import Final

from scaler_executor.protocol.agent_crew import Client, Crew, Worker
from scaler_executor.protocol.agent_events import Fork, Kill, Retire
from scaler_executor.protocol.agent_inheritance import Inheritance
from scaler_executor.protocol.agent_output import AgentOutput
from scaler_executor.protocol.messages import WorkersBroken

#: So many workers in a row may die before they are ready, and so many of a client that has had calls done: what killed
#: those is more likely to pass.
MAX_START_FAILURES: Final = 3
MAX_LATER_START_FAILURES: Final = 12
#: After a fork failed (no memory, too many processes) the next is tried so much later, and so many times while there is
#: no worker at all.
FORK_RETRY_S: Final = 0.1
MAX_FORK_FAILURES: Final = 30
#: A client keeps a worker that it was given so long before it is replaced for one that has no more than one less: or
#: there would be more forking than work. It is longer by a multiple of the time that its workers take to start.
SLICE_S: Final = 0.2
START_FACTOR: Final = 4
#: So long the workers of a client that is gone may take to exit: a thread that a call has left there may never end.
GONE_EXIT_S: Final = 60.0
INFINITY: Final = float("inf")


class Hiring:
    """Hires and dismisses the workers of one agent."""

    def __init__(self, crew: Crew, inheritance: Inheritance, output: AgentOutput) -> None:
        self._crew = crew
        self._inheritance = inheritance
        self._output = output
        self._last_worker_id = 0
        self._last_turn = 0
        #: {client_id: n}: so many workers in a row died before they were ready.
        self._start_failures: dict[int, int] = {}
        #: {client_id: n}: so many forks in a row failed while it had no worker.
        self._fork_failures: dict[int, int] = {}
        #: {client_id: n}: so many workers in a row died before their first call was begun.
        self.unused_deaths: dict[int, int] = {}
        #: When workers may be ordered again after a fork failed, or None.
        self.hire_at: float | None = None
        #: {client_id: reason} of the clients for which no worker can be started.
        self.broken: dict[int, str] = {}
        #: Clients that are gone but still have workers here.
        self.gone_clients: set[int] = set()
        #: Workers of an earlier epoch.
        self.old_workers: set[int] = set()
        #: When workers of clients that are gone are killed next, or None.
        self.kill_at: float | None = None
        #: Nobody is hired any more, and who has nothing to do may go.
        self.draining = False

    def serves(self, client: Client) -> bool:
        """Tell whether calls of this client can still be started here."""
        client_id = client.client_id
        refused = self.draining or client_id in self.broken or client_id in self.gone_clients
        return not refused and client.max_workers > 0

    # Coming

    def may_order(self, client: Client) -> bool:
        """Tell whether a worker for this client is to be ordered now, if there is work."""
        return self.hire_at is None and self.may_start(client)

    def may_start(self, client: Client) -> bool:
        """Tell whether a worker of this client could make its calls. May ask the client for what it would lack; looked
        at again with every event."""
        return self.serves(client) and self._inheritance.may_start(client.client_id)

    def hire(self, client: Client) -> None:
        """Order workers for calls that no worker can take now, of the only client that there is."""
        crew = self._crew
        wanted = self.wanted(client)
        while wanted > 0 and crew.staff < crew.max_workers and not crew.is_full(client):
            self.order(client)
            wanted -= 1

    def wanted(self, client: Client) -> int:
        """Return how many workers more than are on their way a client has calls for that no worker can take now."""
        workers = self._crew.workers.values()
        coming = sum(1 for w in workers if w.client is client and w.state in ("FORKING", "STARTING") and w.counts)
        return client.queued_items - coming

    def order(self, client: Client) -> None:
        """Have a worker forked."""
        self._last_worker_id += 1
        worker = Worker(self._last_worker_id, client, self._output.now)
        self._crew.workers[worker.worker_id] = worker
        self._crew.staff += 1
        client.staff += 1
        self.has_turn(client)
        self._output.late.append(Fork(worker.worker_id))

    def forked(self, worker: Worker, pid: int) -> None:
        """The worker's process is there."""
        worker.pid = pid
        self._fork_failures.pop(worker.client_id, None)
        if worker.state == "FORKING":
            worker.state = "STARTING"
        elif worker.retired:
            self._output.instructions.append(Retire(worker.worker_id))  # it was retired before it existed

    def ready(self, worker: Worker) -> None:
        """The worker can be given calls."""
        self._start_failures.pop(worker.client_id, None)
        if worker.state == "STARTING":
            worker.state = "READY"
            client = worker.client
            client.start_s = self._output.now - worker.ordered_at
            if client.slice_end == INFINITY:
                client.slice_end = self._output.now + max(SLICE_S, START_FACTOR * client.start_s)

    def fork_failed(self, worker: Worker, reason: str) -> str | None:
        """A worker's process could not be made. Return why its client is to be given up, if it is."""
        if self._is_unwanted(worker):
            return None
        # What a machine lacks for a moment is no reason to give up while work goes on, and none to ask all the time.
        self.hire_at = self._output.now + FORK_RETRY_S
        client_id = worker.client_id
        if any(other.client_id == client_id and not other.is_lent for other in self._crew.workers.values()):
            return None
        failures = self._fork_failures[client_id] = self._fork_failures.get(client_id, 0) + 1
        return f"no worker could be started: {reason}" if failures >= MAX_FORK_FAILURES else None

    def start_failed(self, worker: Worker, reason: str) -> str | None:
        """A worker died before it was ready. Return why its client is to be given up, if it is."""
        if self._is_unwanted(worker):
            return None
        client_id = worker.client_id
        failures = self._start_failures[client_id] = self._start_failures.get(client_id, 0) + 1
        return f"workers end before they are ready: {reason}" if failures >= _limit(worker) else None

    def died_unused(self, worker: Worker, reason: str) -> str | None:
        """A worker died with calls in its hands, none of which it had come to. Return why its client is to be given up,
        if it is: what a client has done before its first call may be what ends it."""
        client_id = worker.client_id
        deaths = self.unused_deaths[client_id] = self.unused_deaths.get(client_id, 0) + 1
        return f"workers end before their first call: {reason}" if deaths >= _limit(worker) else None

    def _is_unwanted(self, worker: Worker) -> bool:
        return worker.retired or worker.state == "LEAVING" or worker.client_id in self.gone_clients

    def give_up(self, client_id: int, reason: str) -> bool:
        """Order no more workers for a client. Return whether that is news."""
        self._start_failures.pop(client_id, None)
        self._fork_failures.pop(client_id, None)
        self.unused_deaths.pop(client_id, None)
        if client_id in self.broken or client_id in self.gone_clients:
            return False
        self.broken[client_id] = reason
        self._output.broken.append(WorkersBroken(client_id, reason))
        return True

    # Going

    def rest(self, worker: Worker) -> None:
        """Have a worker that may have nothing in its hands wait for the next call, or exit."""
        if worker.state == "LEAVING" and not worker.held and not worker.retired and worker.pid:
            # It was interrupted, but its call was over first.
            self.retire(worker)
        if worker.state != "READY" or worker.held or worker.portions or worker.worker_id in self._crew.idle:
            return
        if not worker.counts and not worker.is_lent:
            return  # it is parked
        client = worker.client
        worker.is_overdrawn = False
        if self._crew.staff > self._crew.max_workers:
            self.retire(worker)  # somebody has gone on without a slot
        elif client.owes:
            self._pay(client)
            self.retire(worker)
        elif (
            worker.is_lent  # its call has ended without wanting its slot: a thread of it waits on
            or self.draining
            or worker.client_id in self.gone_clients
            or self._crew.room(worker) <= 0
            or client.staff > client.max_workers
        ):
            self.retire(worker)
        else:
            worker.idle_since = self._output.now
            self._crew.idle[worker.worker_id] = worker

    def leave(self, worker: Worker) -> None:
        """The worker will not be used again; its replacement is ordered now, not when it is gone."""
        self._crew.idle.pop(worker.worker_id, None)
        if worker.state == "LEAVING":
            return
        self.count_out(worker)
        worker.state = "LEAVING"
        client = worker.client
        if worker.is_lent:
            return  # somebody has its place already
        if client.owes:
            self._pay(client)
        elif self.may_order(client) and not self._crew.is_full(client):
            self.order(client)

    def retire(self, worker: Worker) -> None:
        """Let a worker with nothing in its hands exit."""
        self._crew.idle.pop(worker.worker_id, None)
        self._crew.parked.pop(worker.worker_id, None)
        if not worker.retired:
            worker.retired = True
            if worker.state != "FORKING":
                self._output.instructions.append(Retire(worker.worker_id))
        self.count_out(worker)
        worker.state = "LEAVING"

    def _pay(self, client: Client) -> None:
        """The place of a worker of this client is another one's."""
        client.owes -= 1
        self.has_turn(client)

    def has_turn(self, client: Client) -> None:
        """Others are next, among equals."""
        self._last_turn += 1
        client.turn = self._last_turn

    def count_in(self, worker: Worker) -> None:
        """The worker can be counted on again."""
        assert not worker.counts and worker.state != "LEAVING"
        worker.counts = True
        self._crew.staff += 1
        worker.client.staff += 1

    def count_out(self, worker: Worker) -> None:
        """The worker cannot be counted on any more, or for the time."""
        if worker.counts:
            worker.counts = False
            self._crew.staff -= 1
            client = worker.client
            client.staff -= 1
            if worker.state != "READY" and client.slice_end == INFINITY:
                client.slice_end = self._output.now  # it never came

    def retire_unused(self, client_id: int | None) -> None:
        """Let the workers (of one client) exit that have nothing in their hands."""
        for worker in list(self._crew.workers.values()):
            if not worker.held and client_id in (None, worker.client_id):
                self.retire(worker)

    def retire_surplus(self, client: Client) -> None:
        """Let workers exit that have nothing in their hands and are more than their client may have."""
        for worker in list(self._crew.workers.values()):
            if client.staff <= client.max_workers:
                break
            if worker.client is client and worker.counts and not worker.held and not worker.portions:
                self.retire(worker)

    def client_gone(self, client_id: int) -> None:
        """A client needs no workers any more."""
        self.gone_clients.add(client_id)
        self.broken.pop(client_id, None)
        self._start_failures.pop(client_id, None)
        self._fork_failures.pop(client_id, None)
        self.unused_deaths.pop(client_id, None)
        self.retire_unused(client_id)
        client = self._crew.clients.get(client_id)
        if client is not None:
            client.workers_due = self._output.now + GONE_EXIT_S
            self.kill_at = client.workers_due if self.kill_at is None else self.kill_at

    def kill_lingering(self) -> None:
        """Kill what has not exited of clients that are gone for so long. Not while draining: then whoever waits for the
        end of this agent waits for them as well, and knows what for."""
        self.kill_at = None
        for worker in self._crew.workers.values():
            due = worker.client.workers_due
            if due == INFINITY or worker.killed or self.draining:
                continue
            if due <= self._output.now and worker.retired and worker.pid and not worker.held:
                worker.killed = True
                self._output.instructions.append(Kill(worker.worker_id))
            else:
                due = max(due, self._output.now + GONE_EXIT_S / 2)  # its call is being stopped
                self.kill_at = due if self.kill_at is None else min(self.kill_at, due)

    def kill_all(self) -> None:
        """Kill the workers of all clients, who are forgotten: their numbers may come again and mean others."""
        for table in (
            self.broken,
            self.gone_clients,
            self._start_failures,
            self._fork_failures,
            self.unused_deaths,
        ):
            table.clear()
        self.kill_at = None
        for worker in self._crew.workers.values():
            worker.freeze = {} if worker.freeze is not None else None
            self._crew.idle.pop(worker.worker_id, None)
            self._crew.parked.pop(worker.worker_id, None)
            self.count_out(worker)
            worker.state, worker.retired = "LEAVING", True
            self.old_workers.add(worker.worker_id)
            self._output.instructions.append(Kill(worker.worker_id))

    def reaped(self, worker: Worker) -> None:
        """The worker is no more."""
        self.count_out(worker)
        del self._crew.workers[worker.worker_id]
        self._crew.idle.pop(worker.worker_id, None)
        self._crew.parked.pop(worker.worker_id, None)
        self.old_workers.discard(worker.worker_id)


def _limit(worker: Worker) -> int:
    """Return how many workers in a row a client may lose before they are of use."""
    return MAX_LATER_START_FAILURES if worker.client.has_worked else MAX_START_FAILURES
