"""Which worker of an agent is given a call, and when it is taken back because another one has nothing to do.

It knows what workers hold and since when, by the measures of `agent_crew`, and freezes those of which something is
wanted. It does not know what becomes of a call in a worker's hands: that is for `agent_calls`.
"""

from __future__ import annotations

from typing import Any, Final

from scaler_executor.protocol.agent_calls import AgentCalls
from scaler_executor.protocol.agent_crew import PORTION_CALLS, Client, Crew, Worker, row_of
from scaler_executor.protocol.agent_events import Freeze, Look, Start
from scaler_executor.protocol.agent_hiring import Hiring
from scaler_executor.protocol.agent_inheritance import Inheritance
from scaler_executor.protocol.agent_output import AgentOutput
from scaler_executor.protocol.agent_sharing import Sharing
from scaler_executor.protocol.messages import WorkerRun

#: Workers that are silent are looked at this often.
LOOK_S: Final = 0.005
#: A call may wait so long behind one in progress before it is taken back for an idle worker.
RECALL_S: Final = 0.02


class Dispatch:
    """Hands the calls of one agent to its workers."""

    def __init__(
        self, crew: Crew, hiring: Hiring, inheritance: Inheritance, calls: AgentCalls, output: AgentOutput
    ) -> None:
        self._crew = crew
        self._hiring = hiring
        self._inheritance = inheritance
        self._calls = calls
        self._output = output
        self.sharing = Sharing(crew, hiring, output)
        #: When to look at the busy workers next, or None.
        self.look_at: float | None = None

    def give_out(self) -> None:
        """Give queued calls to workers, and order workers for those that are left."""
        clients, sharing = self._crew.clients, self.sharing
        sharing.due_at = None
        if len(clients) < 2:
            for client in clients.values():
                if client.queued and self._give_all(client) and self._hiring.may_order(client):
                    self._hiring.hire(client)
            return
        waiting = [client for client in clients.values() if client.queued]
        # Who has the fewest workers first, and so what is free goes to whom it is owed.
        starved = [client for client in sorted(waiting, key=sharing.rank) if self._give_all(client)]
        sharing.share([client for client in starved if self._hiring.may_start(client)])

    def _give_all(self, client: Client) -> bool:
        """Give a client's calls to its workers. Return whether some are left."""
        choose = self._crew.choose
        while (call := client.next_queued()) is not None:
            worker = choose(call)
            if worker is None:
                return True
            self._give(worker)
        return False

    def _give(self, worker: Worker) -> None:
        """Give `worker` the next portion from the front of its client's queue: calls of one function."""
        crew, client = self._crew, worker.client
        queue, next_queued = client.queue, client.next_queued
        is_first = not worker.last_seq
        first = queue[0]
        function = first.function
        left = crew.portion_items(worker, function)
        rows: list[Any] = []
        items_given = 0
        while left > 0 and len(rows) < PORTION_CALLS:
            call = next_queued()
            if call is None or call.function is not function:
                break
            queue.popleft()
            client.queued -= 1
            client.queued_items -= call.items
            if call.items > left:
                call.state = "HELD"
                tail = self._calls.split_tail(call, left)
                queue.appendleft(tail)
                client.queued += 1
                client.queued_items += tail.items
            worker.last_seq += 1
            call.seq = worker.last_seq
            call.state, call.worker = "HELD", worker
            call.given_from, call.given_items = call.start, call.items
            worker.held.append(call)
            rows.append(row_of(call))
            items_given += call.items
            left -= call.items
        message = WorkerRun(rows)
        function_id, known = function.function_id, worker.known
        if function_id and known.need(function_id):
            message.functions = [
                part for part in function.parts if part.function_id == function_id or known.need(part.function_id)
            ]
            known.need(function_id)  # it outlasts its parts, which the worker has for good with it
            message.forget = known.trim()
        if is_first and (definitions := self._inheritance.definitions(client.client_id)):
            message.functions = [*definitions, *message.functions]
        expected_s = (function.seconds or 0.0) * items_given
        if not worker.portions:
            worker.portion_since = self._output.now
        worker.portions.append((function, len(rows), expected_s))
        worker.load_s += expected_s
        worker.items_given += items_given
        crew.idle.pop(worker.worker_id, None)
        self._output.instructions.append(Start(worker.worker_id, message))
        if self.look_at is None:
            self.look_at = self._output.now + LOOK_S

    def look(self) -> None:
        """Look at the busy workers, and take back what waits behind a running call while others are idle."""
        now = self._output.now
        spare: dict[Client, int] = {}
        again = False
        for worker in self._crew.workers.values():
            if not worker.held or worker.state in ("FORKING", "STARTING"):
                continue
            head = worker.held[0]
            behind = len(worker.held) > 1 or head.open_items > 1
            if head.state == "HELD" or behind:
                again = True
                self._output.late.append(Look(worker.worker_id))
            if behind and worker.freeze is None and not worker.stuck and now - worker.portion_since >= RECALL_S:
                client = worker.client
                if client not in spare:
                    spare[client] = self._spare(client)
                if spare[client] > 0:
                    spare[client] -= self.recall(worker)
        if again:
            self.look_at = now + LOOK_S

    def _spare(self, client: Client) -> int:
        """Return how many calls more than wait already could be started for `client`, or have to be waited for by
        others."""
        crew = self._crew
        idle = sum(worker.client is client for worker in crew.idle.values())
        room = min(crew.max_workers - crew.staff, client.max_workers - client.staff)
        spare = idle + room - client.queued
        if spare <= 0 and not client.queued and self.sharing.to_take(client) is not None:
            spare = 1
        return max(spare, client.owes, client.staff - client.max_workers)

    def recall(self, worker: Worker) -> int:
        """Ask for what `worker` has not started. Return the number of calls."""
        recalled = 0
        for index, call in enumerate(worker.held):
            if call.state in ("HELD", "RUNNING") and not call.cancel_no and (index or call.open_items > 1):
                self._calls.story.add(self._output.now, call.task_id, "recall", call.state, "RECALLING")
                self._calls.want_freeze(call, "RECALLING")
                recalled += 1
        return recalled

    def freeze(self) -> None:
        """Send one freeze for each worker of which something is wanted and that is not being frozen."""
        for worker in list(self._calls.to_freeze.values()):
            if worker.freeze is not None:
                continue
            del self._calls.to_freeze[worker.worker_id]
            asked = [call for call in worker.held if call.state in ("RECALLING", "FREEZING")]
            if worker.stuck and worker.killed:
                for call in asked:
                    self._calls.step(call, "STUCK")
                continue
            if not asked or worker.killed:
                continue  # its exit answers
            kill = next((call.seq for call in asked if call.state == "FREEZING"), 0)
            split = next((call.seq for call in asked if call.open_items > 1 and not call.is_forced), 0)
            worker.freeze, worker.freeze_split = {call.seq: call for call in asked}, split
            self._output.instructions.append(Freeze(worker.worker_id, kill, [call.seq for call in asked], split))
