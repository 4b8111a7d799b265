"""A cluster of clients, a scheduler, agents, forkers and workers, in one process and without a clock of its own.

It does what the instructions of the state machines say and knows what really happened: which item started where,
which is running, what was confirmed. What is under way stands in queues, `queues[key]`; a driver decides when the
first entry of which queue arrives, and when a worker takes its next step. So the same cluster runs under a random
driver (`random_runs`) and under one that tries every order (`exhaustive`).
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from scaler_executor.protocol import agent as agents
from scaler_executor.protocol import client as clients
from scaler_executor.protocol import priorities
from scaler_executor.protocol import scheduler as schedulers
from scaler_executor.protocol.client import REST
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    Blocked,
    Bye,
    CallStyle,
    CancelKind,
    DeathReport,
    ForkWorker,
    FreezeWorker,
    Function,
    Hello,
    InterruptWorker,
    KillWorker,
    Options,
    Refused,
    ResultKind,
    SessionLost,
    TaskCancelConfirm,
    TaskCancelConfirmType,
    TaskResult,
    TaskRun,
    TaskSubmit,
    Unblocked,
    Welcome,
)
from scaler_executor.protocol.page import CURRENT, DONE, INTERRUPT, ITEM, STOP, slot
from scaler_executor.protocol.printed import STDOUT
from scaler_executor.protocol.priorities import PriorityQueue

from .worker import Behaviour, SimWorker, value_of

Key = tuple[Any, ...]

#: How a task may be submitted: {kind: (whether it has a timeout, priority)}. The number of its function is that of the
#: kind, and one more for a run.
KINDS = {1: (False, 0), 3: (True, 0), 5: (False, 1), 7: (True, -1), 9: (False, 2)}


def priority_of(item: Any) -> int:
    """Return the priority of a queued task or call."""
    return int(item.function.function.options.priority)


class SimFuture:
    """What the client's user sees of one task."""

    def __init__(self, items: int) -> None:
        self.outcomes: list[str | None] = [None] * items
        self.finished = False
        self.cancel_open = False

    def settle(self, no: int, item: int, outcome: str) -> None:
        assert self.outcomes[item] is None, f"item {item} of task {no}: {outcome} after {self.outcomes[item]}"
        self.outcomes[item] = outcome

    @property
    def settled(self) -> bool:
        return None not in self.outcomes


class SimClient:
    def __init__(self, index: int, max_running: int | None) -> None:
        self.index = index
        self.max_running = max_running
        self.state = clients.ClientState(may_lose_scheduler=True)
        self.futures: dict[int, SimFuture] = {}
        self.gone = False
        self.closing = False
        self.closed = False
        self.last_no = 0
        #: The scheduler has been told its functions.
        self.has_functions = False
        #: {no: kind} of its tasks.
        self.kinds: dict[int, int] = {}
        #: The scheduler's number for it, once it is welcome.
        self.client_id = 0
        #: Items whose lines it was shown: (number that came with the line, item number).
        self.shown: set[tuple[int, int]] = set()


def futures_of(client: SimClient, no: int) -> int:
    """Return how many items a task had."""
    return len(client.futures[no].outcomes)


class SimSession(SimClient):
    """What the calls in one worker submit."""

    def __init__(self, index: int, root: SimClient, worker: SimWorker) -> None:
        super().__init__(index, None)
        self.root = root
        self.worker = worker
        self.is_welcome = False
        #: What is to be said as soon as it is welcome.
        self.waiting: list[Any] = []


class SimAgent:
    def __init__(self, index: int, state: agents.AgentState) -> None:
        self.index = index
        self.state = state
        self.workers: dict[int, SimWorker] = {}
        self.peer = 0
        #: Workers that have been ordered and of which nothing has been heard.
        self.ordered: set[int] = set()
        #: Whether workers inherit their client's process.
        self.inherits = True
        #: The forker is dead and the agent has not noticed.
        self.has_lost_forker = False
        #: It has ended, or was killed.
        self.gone = False
        self.was_killed = False
        self.ended_early = False


class Cluster:
    """See above. A driver overrides `posted`, `may_step` and `expedite`."""

    def __init__(self, retries: int = 0, timeout_s: float = 1.0) -> None:
        self.now = 0.0
        self.retries = retries
        #: Of the tasks that have one.
        self.timeout_s = timeout_s
        self.scheduler = schedulers.SchedulerState()
        self.clients: list[SimClient] = []
        self.agents: list[SimAgent] = []
        self.queues: dict[Key, deque[Any]] = {}
        #: {peer: client or agent}
        self.peers: dict[int, SimClient | SimAgent] = {}
        self.last_peer = 0
        self.plan: dict[tuple[int, int], Behaviour] = {}
        self.default_behaviour = Behaviour()
        # What really happened, by (client index, item number).
        self.starts: Counter[tuple[int, int]] = Counter()
        self.completed: Counter[tuple[int, int]] = Counter()
        self.running: dict[tuple[int, int], tuple[int, int]] = {}
        self.confirmed: set[tuple[int, int]] = set()
        #: Items in progress when their worker died, or whose agent was lost.
        self.victims: Counter[tuple[int, int]] = Counter()
        #: When an item last began, and for how long it then ran.
        self.began: dict[tuple[int, int], float] = {}
        self.ran_s: dict[tuple[int, int], float] = {}
        #: {what is overtaken, and where: how often in a row}
        self.overtaken: Counter[Key] = Counter()
        #: {where: how many were taken since one of lower priority than others was}
        self.taken: Counter[Key] = Counter()
        self.an_agent_was_lost = False
        #: {item: the item that has submitted it}
        self.parents: dict[tuple[int, int], tuple[int, int]] = {}
        #: Each item prints its number when it starts.
        self.items_print = False

    # For the driver

    def posted(self, key: Key) -> None:
        """Something was put into this queue."""

    def may_step(self, worker: SimWorker) -> None:
        """This worker may have a next step."""

    def expedite(self, worker: SimWorker) -> None:
        """What this worker waits for has been cut short."""

    def checks_now(self) -> bool:
        """Tell whether a machine is to check itself after this step."""
        return True

    def fork_fate(self, agent: int) -> str:
        """Return "ready", "fails", "dies" or "no fork"."""
        return "ready"

    def is_stuck(self, worker: SimWorker) -> bool:
        """Tell whether this worker resists a stop."""
        return False

    def note(self, *what: Any) -> None:
        """Take part in the story of this run."""

    # Set-up

    def add_client(self, max_running: int | None = None, max_items_per_worker: int | None = None) -> SimClient:
        client = SimClient(len(self.clients), max_running)
        self.clients.append(client)
        self._join(client)
        hello = Hello("client", max_running=max_running, max_items_per_worker=max_items_per_worker)
        self.post(("up", self._peer_of(client)), hello)
        return client

    def add_agent(self, max_workers: int, **settings: Any) -> SimAgent:
        agent = SimAgent(len(self.agents), agents.AgentState(max_workers, **settings))
        self.agents.append(agent)
        self._join(agent)
        agent.peer = self.last_peer
        self.post(("up", agent.peer), Hello("agent", name=f"agent {agent.index}"))
        return agent

    def _join(self, owner: SimClient | SimAgent) -> None:
        self.last_peer += 1
        self.peers[self.last_peer] = owner

    def _peer_of(self, owner: SimClient | SimAgent) -> int:
        return next(peer for peer, other in self.peers.items() if other is owner)

    # Queues

    def post(self, key: Key, what: Any) -> None:
        self.queues.setdefault(key, deque()).append(what)
        self.posted(key)

    def deliver(self, key: Key) -> None:
        """Let the first entry of a queue arrive."""
        queue = self.queues[key]
        what = queue.popleft()
        if not queue:
            del self.queues[key]
        getattr(self, f"_on_{key[0]}")(key, what)

    def _on_up(self, key: Key, message: Any) -> None:
        """Client or agent to scheduler."""
        self.to_scheduler(message if isinstance(message, schedulers.PeerLost) else schedulers.Received(key[1], message))

    def _on_down(self, key: Key, message: Any) -> None:
        """Scheduler to client or agent."""
        owner = self.peers.get(key[1])
        if isinstance(owner, SimClient):
            self.to_client(owner, clients.Received(message))
        elif isinstance(owner, SimAgent):
            self.to_agent(owner, agents.Received(message))

    def _on_command(self, key: Key, message: Any) -> None:
        """Agent to forker."""
        agent = self.agents[key[1]]
        if agent.has_lost_forker:
            return
        if isinstance(message, ForkWorker):
            self.post(("fork", agent.index), message.worker_id)
            return
        worker = agent.workers.get(message.worker_id)
        if worker is None or worker.dead:
            return  # its exit is on the way
        if isinstance(message, InterruptWorker):
            worker.page[INTERRUPT] = message.seq
            self._take_back(worker, message.seq)
            worker.signal = True
            self.expedite(worker)
        elif isinstance(message, FreezeWorker):
            if not worker.killed:
                worker.freezes.append(message)
                worker.frozen += 1
                self.post(("freeze", agent.index, worker.worker_id), None)
        elif isinstance(message, KillWorker):
            self.kill(worker)

    def _on_fork(self, key: Key, worker_id: int) -> None:
        agent = self.agents[key[1]]
        fate = self.fork_fate(agent.index)
        if fate == "no fork":
            self.post(("report", agent.index), agents.ForkFailed(worker_id, "no memory"))
            return
        worker = agent.workers[worker_id] = SimWorker(agent.index, worker_id, fate)
        worker.inherits = agent.inherits
        self.post(("report", agent.index), agents.Forked(worker_id, 1000 + worker_id))
        self.may_step(worker)

    def _on_freeze(self, key: Key, _: None) -> None:
        """The worker stands still: look."""
        worker = self.agents[key[1]].workers.get(key[2])
        if worker is None or worker.dead or not worker.freezes:
            return
        message = worker.freezes.popleft()
        page = worker.page
        current, done, item = page[CURRENT], page[DONE], page[ITEM]
        frozen = agents.Frozen(worker.worker_id, current, done, item)
        in_progress = current if current != done else 0
        if self.is_stuck(worker):
            frozen.stuck = True
        elif message.kill_seq and message.kill_seq == in_progress:
            frozen.killed = True
            self.post(("report", worker.agent), frozen)
            self.kill(worker)
            return
        else:
            for seq in message.revoke:
                if seq > current:
                    self._take_back(worker, seq)
            if message.split_seq and message.split_seq == in_progress:
                page[STOP] = min(page[STOP], item + 1)
        self.post(("report", worker.agent), frozen)
        worker.frozen -= 1
        self.may_step(worker)

    @staticmethod
    def _take_back(worker: SimWorker, seq: int) -> None:
        if worker.page[slot(seq)] == seq:
            worker.page[slot(seq)] = 0

    def kill(self, worker: SimWorker) -> None:
        """Send SIGKILL. It dies when the driver says so; until then it counts as running."""
        worker.freezes.clear()
        if not worker.killed and worker.alive:
            worker.killed = True
            worker.exit_code = -9
            self.post(("death", worker.agent, worker.worker_id), None)

    def _on_death(self, key: Key, _: None) -> None:
        worker = self.agents[key[1]].workers.get(key[2])
        if worker is None or worker.dead:
            return
        if self.is_stuck(worker):
            page = worker.page
            self.post(
                ("report", worker.agent),
                agents.Frozen(worker.worker_id, page[CURRENT], page[DONE], page[ITEM], killed=True, stuck=True),
            )
            worker.stuck = False
            self.post(key, None)
            return
        self.worker_died(worker)

    def worker_died(self, worker: SimWorker, forker_lost: bool = False) -> None:
        """The process is gone."""
        if worker.dead:
            return
        worker.dead = True
        if worker.session is not None:
            worker.session.gone = True
        page = worker.page
        if page[CURRENT] != page[DONE]:
            self.victims[worker.client, worker.first_no + (page[ITEM] if worker.is_run else 0)] += 1
        for item, where in self.running.items():
            if where == (worker.agent, worker.worker_id):
                self.ran_s[item] = self.now - self.began[item]
        self.running = {
            item: where for item, where in self.running.items() if where != (worker.agent, worker.worker_id)
        }
        agent = self.agents[worker.agent]
        if not agent.gone:
            report = DeathReport("killed", worker.exit_code, worker_id=worker.worker_id)
            self.post(
                ("report", worker.agent),
                agents.Exited(worker.worker_id, page[CURRENT], page[DONE], page[ITEM], report, forker_lost),
            )

    def ring(self, worker: SimWorker) -> None:
        self.post(("bell", worker.agent, worker.worker_id), None)

    def _on_bell(self, key: Key, _: None) -> None:
        agent = self.agents[key[1]]
        if not agent.gone:
            self.read_pipe(agent, key[2])

    def read_pipe(self, agent: SimAgent, worker_id: int) -> None:
        worker = agent.workers.get(worker_id)
        if worker is not None and worker.is_known and (worker.pipe or worker.printed):
            records, worker.pipe = worker.pipe, []
            rows, worker.printed = worker.printed, []
            if rows:
                self.to_agent(agent, agents.Printed(worker_id, rows))
            if records:
                self.to_agent(agent, agents.Records(worker_id, records))

    def _on_report(self, key: Key, report: Any) -> None:
        """Forker to agent."""
        agent = self.agents[key[1]]
        if agent.gone:
            return
        if isinstance(report, agents.Disinherited):
            self.queues.pop(("command", agent.index), None)
            agent.has_lost_forker = agent.inherits = False
            ordered, agent.ordered = agent.ordered, set()
            self.to_agent(agent, report)
            for worker_id in sorted(ordered):
                self.to_agent(agent, agents.ForkFailed(worker_id, "the forker was lost", forker_lost=True))
            return
        if isinstance(report, (agents.Forked, agents.ForkFailed)):
            agent.ordered.discard(report.worker_id)
        if isinstance(report, agents.Exited):
            # A result that is in the pipe counts, whatever happened afterwards.
            for message in self.queues.pop(("session", agent.index, report.worker_id), ()):
                self.to_agent(agent, agents.FromWorker(report.worker_id, message))
            self.read_pipe(agent, report.worker_id)
            del agent.workers[report.worker_id]
        elif isinstance(report, agents.Forked):
            agent.workers[report.worker_id].is_known = True
        self.to_agent(agent, report)
        if isinstance(report, agents.Forked):
            self.read_pipe(agent, report.worker_id)  # it may have rung before its pipe was here

    # Nested calls

    def root_of(self, client: int) -> SimClient:
        """Return the client as which this one counts."""
        found = self.clients[client]
        return found.root if isinstance(found, SimSession) else found

    def nest(self, worker: SimWorker, behaviour: Behaviour) -> None:
        """Have the call in progress submit others."""
        session = worker.session
        if session is None:
            session = worker.session = SimSession(len(self.clients), self.root_of(worker.client), worker)
            self.clients.append(session)
            self.post(("session", worker.agent, worker.worker_id), Hello("client"))
        first = session.last_no + 1
        for no, child in enumerate(behaviour.children, first):
            self.plan[session.index, no] = child
            self.parents[session.index, no] = worker.current_item()
        self.note(f"worker {worker.worker_id} of agent {worker.agent}", worker.current_item(), "submits", session.index)
        self.submit(session, [1] * len(behaviour.children))
        if behaviour.waits:
            worker.awaited = [session.futures[first + index] for index in range(len(behaviour.children))]
            self.say(session, Blocked([worker.seq]))
            worker.pc = "waiting"

    def unblock(self, worker: SimWorker) -> None:
        """The call in progress wants to go on."""
        self.say(worker.session, Unblocked([worker.seq]))

    def goes_on(self, worker: SimWorker) -> None:
        """The call in progress has its slot."""
        state = self.agents[worker.agent].state._crew.workers.get(worker.worker_id)
        assert state is None or state.counts or state.state == "LEAVING", "it goes on without a slot"
        self.check_limit(worker)

    def check_limit(self, worker: SimWorker) -> None:
        """Assert that no more calls run than may."""
        root = self.root_of(worker.client)
        if root.max_running is None or len(self.agents) > 1:
            return
        count = 0
        for item, (agent, worker_id) in self.running.items():
            runner = self.agents[agent].workers.get(worker_id)
            waits = runner is not None and (runner.pc in ("waiting", "wanting", "unwinding") or runner.interrupted)
            count += self.root_of(item[0]) is root and item not in self.confirmed and not waits
        assert count <= root.max_running, f"{count} items of client {root.index} run at once"

    def say(self, session: SimSession, message: Any) -> None:
        """Say something to the agent, behind what has been submitted."""
        if session.is_welcome:
            self.post(("session", session.worker.agent, session.worker.worker_id), message)
        else:
            session.waiting.append(message)

    def _on_session(self, key: Key, message: Any) -> None:
        """Worker to agent."""
        agent = self.agents[key[1]]
        if not agent.gone:
            self.read_pipe(agent, key[2])
            self.to_agent(agent, agents.FromWorker(key[2], message))

    def _on_told(self, key: Key, message: Any) -> None:
        """Agent to worker."""
        worker = self.agents[key[1]].workers.get(key[2])
        if worker is None or worker.dead:
            return
        if isinstance(message, Unblocked):
            worker.granted = True
        else:
            self.to_client(worker.session, clients.Received(message))
            if isinstance(message, (Welcome, Refused)):
                worker.session.is_welcome = True
                waiting, worker.session.waiting = worker.session.waiting, []
                for said in waiting:
                    self.say(worker.session, said)
        self.may_step(worker)

    # Steps of the machines

    def to_scheduler(self, event: Any) -> None:
        self.note("scheduler", event)
        instructions = self.scheduler.handle(event, self.now)
        if self.checks_now():
            self.scheduler.check()
        for instruction in instructions:
            if isinstance(instruction, schedulers.Send):
                self._sent_by_scheduler(instruction.peer, instruction.message)
            else:
                assert not instruction.error, f"the scheduler drops peer {instruction.peer}: {instruction.reason}"
                self._dropped(instruction.peer)

    def _dropped(self, peer: int) -> None:
        owner = self.peers.get(peer)
        if isinstance(owner, SimClient):
            del self.peers[peer]

    def _sent_by_scheduler(self, peer: int, message: Any) -> None:
        self.note(f"scheduler to {peer}", message)
        owner = self.peers.get(peer)
        if isinstance(message, TaskCancelConfirm) and isinstance(owner, SimClient):
            for no, _, kind, first, count, proven in message.confirms:
                if kind == TaskCancelConfirmType.CANCELED and proven:
                    self._check_confirmed(owner.index, no + first, count)
        if isinstance(message, TaskResult) and isinstance(owner, SimClient):
            for no, first, _, kind, _ in message.results:
                if kind == ResultKind.TIMED_OUT:
                    self._check_timed_out(owner.index, no + first)
        if isinstance(message, TaskRun):
            for row in message.tasks:
                task = self.scheduler._tasks.by_id[row[0]]
                self._check_order("scheduler", task, task.client.account.queue)
        if owner is not None:
            self.send(("down", peer), message)

    def _check_timed_out(self, client: int, no: int) -> None:
        """A timeout is the last word on an item: it has run for that long, has stopped, and is not started again."""
        item = (client, no)
        assert self.has_timeout(item), f"{item} has no timeout"
        if item in self.running:
            agent, worker_id = self.running[item]
            assert self.agents[agent].workers[worker_id].stuck, f"{item} has timed out and still runs"
            self.ran_s[item] = self.now - self.began[item]
        # It counts from when a worker has claimed it, which may take a while until it begins, or die before.
        ran_s = self.ran_s.get(item, self.timeout_s)
        assert ran_s > self.timeout_s - 0.01, f"{item} timed out after {ran_s} s"
        self.confirmed.add(item)

    def has_timeout(self, item: tuple[int, int]) -> bool:
        return KINDS[self.clients[item[0]].kinds.get(item[1], 1)][0]

    def _check_order(self, where: Any, given: Any, queue: Any) -> None:
        """What is taken out of a queue has the highest priority, but for one in so many; nobody waits for ever."""
        if not isinstance(queue, PriorityQueue):
            return
        left = [item for item in queue if item.state == "QUEUED"]
        priority, most = priority_of(given), max(map(priority_of, left), default=-(1 << 60))
        key = (where, given.client.client_id)
        if self.parents:
            return  # nested calls overtake others for as long as there are any
        if priority >= most:
            self.taken[key] += 1
        else:
            # It has waited for longer. Not longest: what is put back stands in front of its equals.
            taken = self.taken.pop(key, 0)
            assert taken >= priorities.OVERTAKES, f"task {given.task_id} is taken before one of priority {most}"
        self.overtaken.pop((where, given.task_id), None)
        oldest = min(left, key=lambda item: item.task_id, default=given)
        if oldest.task_id < given.task_id and priority_of(oldest) < priority:
            self.overtaken[where, oldest.task_id] += 1
            count = self.overtaken[where, oldest.task_id]
            # In front of it there may be as many as there are, and each is the oldest in its turn.
            most = (priorities.OVERTAKES + 1) * (len(left) + 10)
            assert count <= most, f"task {oldest.task_id} was overtaken {count} times"

    def send(self, key: Key, message: Any) -> None:
        """Send a message between machines."""
        self.post(key, message)

    def _check_confirmed(self, client: int, first: int, count: int) -> None:
        for no in range(first, first + count):
            assert (client, no) not in self.running, f"item {no} of client {client} is confirmed and still running"
            self.confirmed.add((client, no))
        for item in () if self.an_agent_was_lost else self.running:
            ancestor = self.parents.get(item)
            while ancestor is not None:
                is_meant = ancestor[0] == client and first <= ancestor[1] < first + count
                assert not is_meant or self.is_left_behind(item), f"{item} runs, and {ancestor} is confirmed"
                ancestor = self.parents.get(ancestor)

    def is_left_behind(self, item: tuple[int, int]) -> bool:
        """Tell whether a call was left behind by an attempt or an item that had ended, or cannot be stopped."""
        agent, worker_id = self.running[item]
        worker = self.agents[agent].workers.get(worker_id)
        chain = [item]
        while chain[-1] in self.parents:
            chain.append(self.parents[chain[-1]])
        return worker is None or worker.stuck or any(self.completed[ancestor] for ancestor in chain[1:])

    def to_agent(self, agent: SimAgent, event: Any) -> None:
        if agent.gone:
            return
        self.note(f"agent {agent.index}", event)
        instructions = agent.state.handle(event, self.now)
        if self.checks_now():
            agent.state.check()
        self.after_agent(agent)
        for instruction in instructions:
            self._do_for_agent(agent, instruction)

    def after_agent(self, agent: SimAgent) -> None:
        """Look at an agent after each of its steps."""

    def _do_for_agent(self, agent: SimAgent, instruction: Any) -> None:
        self.note(f"agent {agent.index} says", instruction)
        index = agent.index
        if isinstance(instruction, agents.Send):
            self.send(("up", agent.peer), instruction.message)
        elif isinstance(instruction, agents.Start):
            worker = agent.workers[instruction.worker_id]
            held = agent.state._crew.workers[instruction.worker_id].held
            given = {row[0] for row in instruction.message.calls}
            for call in held:
                if call.seq in given:
                    self._check_order(("agent", index), call, call.client.queue)
            for row in instruction.message.calls:
                worker.page[slot(row[0])] = row[0]
            worker.inbox.append(instruction.message)
            self.may_step(worker)
        elif isinstance(instruction, agents.Fork):
            agent.ordered.add(instruction.worker_id)
            self.post(("command", index), ForkWorker(instruction.worker_id))
        elif isinstance(instruction, agents.Interrupt):
            self.post(("command", index), InterruptWorker(instruction.worker_id, instruction.seq))
        elif isinstance(instruction, agents.Freeze):
            message = FreezeWorker(
                instruction.worker_id, instruction.kill_seq, instruction.revoke, instruction.split_seq
            )
            self.post(("command", index), message)
        elif isinstance(instruction, agents.Kill):
            self.post(("command", index), KillWorker(instruction.worker_id))
        elif isinstance(instruction, agents.Retire):
            worker = agent.workers[instruction.worker_id]
            worker.hung_up = True
            self.may_step(worker)
        elif isinstance(instruction, agents.ToWorker):
            self.post(("told", index, instruction.worker_id), instruction.message)
        elif isinstance(instruction, agents.Look):
            looked = agent.workers.get(instruction.worker_id)
            if looked is not None:
                seen = agents.Seen(looked.worker_id, looked.page[CURRENT], looked.page[DONE])
                self.read_pipe(agent, looked.worker_id)
                self.to_agent(agent, seen)
        else:
            assert isinstance(instruction, agents.Drained)
            assert not agent.workers and not agent.state.workers
            self.agent_drained(agent)

    def agent_drained(self, agent: SimAgent) -> None:
        pass

    # Users

    def submit(
        self,
        client: SimClient,
        sizes: list[int],
        cancels: list[tuple[int, CancelKind]] | None = None,
        kinds: list[int] | None = None,
    ) -> list[int]:
        """Submit tasks of these many items and these kinds, in one batch with these cancels. Return their numbers."""
        rows = []
        functions = []
        for items, kind in zip(sizes, kinds or [1] * len(sizes), strict=True):
            no = client.last_no + 1
            client.last_no += items
            if items > 1 and KINDS[kind][0]:
                kind = 1
            client.kinds[no] = kind
            function_id = kind + (items > 1)
            rows.append((no, items, function_id, b"%d %d" % (client.index, no)))
            client.futures[no] = SimFuture(items)
        if not client.has_functions:
            client.has_functions = True
            used = sorted({1, *client.kinds.values()} | set(KINDS if kinds else ()))
            for kind in used:
                is_timed, priority = KINDS[kind]
                options = Options(self.retries, self.timeout_s if is_timed else None, priority)
                functions.append(Function(kind, "one", b"", options=options))
                if not is_timed:
                    functions.append(Function(kind + 1, "run", b"", options=options))
        self.to_client(client, clients.Batch(rows, functions, [], cancels or []))
        return [row[0] for row in rows]

    def cancel(self, client: SimClient, cancels: list[tuple[int, CancelKind]]) -> None:
        for no, _ in cancels:
            client.futures[no].cancel_open = True
        self.to_client(client, clients.Batch([], [], [], cancels))

    def to_client(self, client: SimClient, event: Any) -> None:
        if client.gone:
            return
        self.note(f"client {client.index}", event)
        instructions = client.state.handle(event, self.now)
        if self.checks_now():
            client.state.check()
        for instruction in instructions:
            self._do_for_client(client, instruction)

    def _do_for_client(self, client: SimClient, instruction: Any) -> None:
        self.note(f"client {client.index} says", instruction)
        futures = client.futures
        if isinstance(instruction, clients.Send) and isinstance(client, SimSession):
            worker, message = client.worker, instruction.message
            if isinstance(message, TaskSubmit):
                page = worker.page
                message.parent = page[CURRENT] << 32 | page[ITEM] if page[CURRENT] != page[DONE] else 0
            self.post(("session", worker.agent, worker.worker_id), message)
        elif isinstance(instruction, clients.Send):
            peer = self._peer_of(client)
            self.send(("up", peer), instruction.message)
        elif isinstance(instruction, clients.Deliver):
            for no, first, count, kind, payload in instruction.results:
                self._check_result(client, no + first, count, kind, payload)
                if self.items_print and kind in (ResultKind.VALUE, ResultKind.ERROR):
                    self._check_shown(client, no, range(no + first, no + first + count))
                for item in range(first, first + count):
                    futures[no].settle(no, item, ResultKind(kind).name)
        elif isinstance(instruction, clients.Cancelled):
            for no, first, count, cause in instruction.items:
                outcomes = futures[no].outcomes
                items = range(first, first + count)
                open_items = [item for item, outcome in enumerate(outcomes) if outcome is None]
                for item in open_items if first == REST else items:
                    futures[no].settle(no, item, cause)
        elif isinstance(instruction, clients.CancelRefused):
            for no in instruction.tasks:
                assert futures[no].cancel_open, f"task {no}: refused what nobody asked"
                futures[no].cancel_open = False
        elif isinstance(instruction, clients.Lost):
            for no in instruction.tasks:
                for item, outcome in enumerate(futures[no].outcomes):
                    if outcome is None:
                        futures[no].settle(no, item, "LOST")
        elif isinstance(instruction, clients.Finished):
            for no in instruction.tasks:
                assert futures[no].settled, f"task {no} is finished with {futures[no].outcomes}"
                assert not futures[no].finished
                futures[no].finished = True
        elif isinstance(instruction, clients.Show):
            for no, _, lost, data in instruction.rows:
                assert not lost
                assert not no or not futures[no].settled, f"task {no} prints {data!r} and is settled"
                client.shown.update((no, int(line)) for line in data.split())
        elif isinstance(instruction, clients.Renewed):
            client.has_functions = False
            self._join(client)
            hello = Hello("client", max_running=client.max_running)
            self.post(("up", self._peer_of(client)), hello)
            self.to_client(client, clients.Stranded(clients.Batch()))
        elif isinstance(instruction, clients.Disinherited):
            self.post(("definitions", client.index), None)
        elif isinstance(instruction, clients.Closed):
            client.closed = True
        else:
            assert isinstance(instruction, (clients.Running, clients.Broken))

    def _on_definitions(self, key: Key, _: None) -> None:
        """The client has pickled what calls counted on."""
        definition = Function(0, "global", b"", CallStyle.DEFINITION, version=1)
        self.to_client(self.clients[key[1]], clients.Batch(definitions=[definition]))

    def _check_result(self, client: SimClient, first_no: int, count: int, kind: int, payload: bytes) -> None:
        items = [(client.index, no) for no in range(first_no, first_no + count)]
        if kind in (ResultKind.VALUE, ResultKind.ERROR):
            assert payload == b"".join(value_of(no) for _, no in items), f"items {items} got {payload!r}"
            assert all(self.starts[item] for item in items), f"results of {items}, not all of which started"
            assert all((self.behaviour(*item).ending == "error") == (kind == ResultKind.ERROR) for item in items)
        elif kind == ResultKind.DIED:
            innocent = [item for item in items if self.victims[item] <= self.retries]
            if isinstance(client, SimSession) and b"no worker could be started" in payload:
                return
            assert not innocent or self.an_agent_was_lost, f"{innocent} are blamed for deaths that were not theirs"

    def _check_shown(self, client: SimClient, no: int, items: range) -> None:
        """What a call has printed is there before its result; of a part of a run it may come without a call."""
        for item in items:
            is_shown = (no, item) in client.shown or (futures_of(client, no) > 1 and (0, item) in client.shown)
            assert is_shown, f"item {item} of task {no} has a result and was not shown"

    # What workers do

    def behaviour(self, client: int, no: int) -> Behaviour:
        return self.plan.get((client, no), self.default_behaviour)

    def item_starts(self, worker: SimWorker) -> None:
        item = worker.current_item()
        self.note(f"worker {worker.worker_id} of agent {worker.agent}", "starts", item)
        has_left = self.root_of(worker.client).closed  # and so cannot say what replaces it
        assert worker.inherits or worker.is_defined or has_left, f"{item} runs without what it counts on"
        assert item not in self.running, f"{item} runs twice at the same time"
        assert item not in self.confirmed, f"{item} started after its cancel was confirmed"
        self.starts[item] += 1
        self.began[item] = self.now
        assert self.starts[item] <= 1 + self.retries, f"{item} started {self.starts[item]} times"
        self.running[item] = (worker.agent, worker.worker_id)
        state = self.agents[worker.agent].state._crew.workers.get(worker.worker_id)
        assert state is None or state.counts or state.state == "LEAVING", f"{item} runs without a slot"
        if self.items_print:
            worker.printed.append((worker.page[CURRENT], STDOUT, 0, b"%d\n" % item[1]))
        most = self.clients[worker.client].max_running
        if self.parents:
            self.check_limit(worker)
        elif most is not None:
            # Not those that have timed out and could not be stopped.
            count = sum(other[0] == worker.client and other not in self.confirmed for other in self.running)
            assert count <= most, f"{count} items of client {worker.client} run at once, {most} may"

    def item_ends(self, worker: SimWorker, is_stopped: bool = False) -> None:
        item = worker.current_item()
        del self.running[item]
        self.completed[item] += not is_stopped
        self.ran_s[item] = self.now - self.began[item]

    def step(self, worker: SimWorker) -> None:
        worker.step(self)
        self.may_step(worker)

    # Faults

    def lose_client(self, client: SimClient) -> None:
        """A client dies."""
        client.gone = True
        peer = self._peer_of(client)
        self.queues.pop(("down", peer), None)
        self.peers.pop(peer)
        self.post(("up", peer), schedulers.PeerLost(peer, "died", stopped=True))

    def lose_session(self, client: SimClient) -> None:
        """A client is told that its scheduler knows nothing of it any more; that has lost the client."""
        peer = self._peer_of(client)
        self.an_agent_was_lost = True
        for kind in ("up", "down"):
            self.queues.pop((kind, peer), None)
        del self.peers[peer]
        self.to_scheduler(schedulers.PeerLost(peer, "session", stopped=True))
        self.to_client(client, clients.Received(SessionLost("the session is lost")))

    def lose_forker(self, agent: SimAgent) -> None:
        """A forker dies, and with it its workers. Another one is there when its agent has noticed."""
        agent.has_lost_forker = True
        self.queues.pop(("fork", agent.index), None)
        self.post(("report", agent.index), agents.Disinherited("the forker was lost"))
        for worker in agent.workers.values():
            if worker.alive:
                worker.killed = True
                worker.exit_code = -9
                self.worker_died(worker, forker_lost=True)

    def lose_agent(self, agent: SimAgent, stopped: bool) -> None:
        """An agent's process dies, and with it its forker and workers."""
        agent.gone = agent.was_killed = True
        self.an_agent_was_lost = True
        for worker in agent.workers.values():
            self.worker_died(worker)
        for key in list(self.queues):
            if key[0] in ("command", "fork", "freeze", "death", "bell", "report") and key[1] == agent.index:
                del self.queues[key]
        self.peers.pop(agent.peer, None)
        self.queues.pop(("down", agent.peer), None)
        self.post(("up", agent.peer), schedulers.PeerLost(agent.peer, "died", stopped))

    # The end

    def check_over(self) -> None:
        """Assert that nothing is left, anywhere."""
        for client in self.clients:
            if client.gone:
                continue
            for no, future in client.futures.items():
                assert future.settled, f"task {no} of client {client.index}: {future.outcomes}"
            assert client.state.outstanding == 0 and client.closed
        state = self.scheduler
        assert state.outstanding == 0
        assignment = state._assignment
        left = (state._peers, state._tasks.leaving, state._fences, list(assignment.ready), assignment.agents)
        assert not any(left), left
        for agent in self.agents:
            if agent.was_killed:
                continue
            inner = agent.state
            assert inner.outstanding == 0 and not inner.workers and not agent.workers
            if agent.ended_early:
                continue  # clients may have outlived it
            calls, hiring = inner._calls, inner._hiring
            rest = (inner._functions, hiring.broken, hiring.gone_clients, calls.stopping, calls.to_freeze)
            assert not any(rest), rest
            assert not inner._inheritance._definitions and not agent.ordered
            assert not hiring.old_workers and not hiring._start_failures
            assert not inner._crew.clients, inner._crew.clients
        assert not self.running


__all__ = ["CLIENT_ID_SHIFT", "Behaviour", "Bye", "Cluster", "SimAgent", "SimClient", "SimFuture"]
