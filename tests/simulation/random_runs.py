"""Random runs of whole clusters: everything follows from a seed.

The seed draws a scenario (who is there, how long calls take and how they take an interrupt, what the users do) and
faults, then every delay. Time is virtual. After each step the machines check themselves and the cluster checks what
really happened; at the end nothing may be left.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import replace
from typing import Any

from scaler_executor.protocol import agent as agents
from scaler_executor.protocol import client as clients
from scaler_executor.protocol import link as links
from scaler_executor.protocol import priorities
from scaler_executor.protocol import scheduler as schedulers
from scaler_executor.protocol.agent_hiring import SLICE_S
from scaler_executor.protocol.codec import Decoder, Encoder
from scaler_executor.protocol.messages import (
    AgentMessage,
    CancelKind,
    ClientMessage,
    Hello,
    ToAgentMessage,
    ToClientMessage,
)

from .cluster import KINDS, Behaviour, Cluster, SimAgent, SimClient, SimSession
from .worker import SimWorker

MAX_STEPS = 30_000
MAX_TIME_S = 1_000.0
#: DESIGN section 6: a call waits no longer behind a running one while a worker is idle. Delays come on top.
WAIT_BEHIND_S = 0.05
#: A call is stopped so long after its timeout at most, and its grace time. Delays come on top.
LATE_S = 0.05

_DECODERS = {
    ("up", True): Decoder[Any](ClientMessage),
    ("up", False): Decoder[Any](AgentMessage),
    ("down", True): Decoder[Any](ToClientMessage),
    ("down", False): Decoder[Any](ToAgentMessage),
}


class Run(Cluster):
    """One run. `Run(seed).run()` raises AssertionError if anything is wrong."""

    max_steps = MAX_STEPS

    def __init__(self, seed: int, verbose: bool = False) -> None:
        rng = self.rng = random.Random(seed)
        #: Draws what has to do with options: every second run has some.
        options = self.options = random.Random(f"options {seed}")
        self.has_options = options.random() < 0.5
        super().__init__(rng.choice([0, 0, 0, 1, 2]), options.choice([0.002, 0.02, 0.3, 3.0]))
        #: Draws what calls submit themselves: in every third run some do.
        nested = self.nested = random.Random(f"nested {seed}")
        self.has_nesting = nested.random() < 0.35
        if self.has_nesting:
            self.max_steps = 8 * self.max_steps  # calls last as long as what they wait for
        #: So that few calls are enough.
        self.overtakes = options.choice([1, 3, priorities.OVERTAKES])
        self.seed = seed
        self.verbose = verbose
        self.heap: list[tuple[float, int, str, Any, Any]] = []
        self.pushed = 0
        self.steps = 0
        self.arrivals: dict[Any, float] = {}
        self.ticks: dict[Any, float] = {}
        #: {worker: token of its scheduled step}
        self.tokens: dict[SimWorker, int] = {}
        #: {peer: (scheduler's end, the other end)} of those that are connected over a network.
        self.links: dict[int, list[links.LinkState]] = {}
        #: {peer: number of its current transport}
        self.transports: dict[int, int] = {}
        self.nonces = 0
        self.behind_since: dict[tuple[int, int, int, int], float] = {}
        self.is_over = False
        self.through_codec = rng.random() < 0.1
        self.encoder = Encoder()
        self.link_s = rng.choice([1e-5, 1e-4, 1e-3, 0.02])
        self.forker_s = rng.choice([1e-5, 1e-4, 1e-3])
        self.fork_s = rng.choice([1e-3, 2e-3, 2e-2])
        self.step_s = rng.choice([1e-7, 1e-6, 1e-5])
        self.bad_forks = rng.choice([0, 0, 0, 0.05, 0.5])
        self.stuck = rng.choice([0, 0, 0, 0.1])
        if self.has_nesting:
            # What stands behind a call that waits, in a worker that cannot be frozen, takes the place of what that call
            # waits for.
            self.stuck = 0
        #: Steps of workers, over all of them, at which something happens to the worker that takes it or to its call.
        self.worker_steps = 0
        self.doomed_steps = set(rng.choices(range(1, 120), k=rng.choice([0, 0, 1, 3])))
        self.aimed_steps = set(rng.choices(range(1, 120), k=rng.choice([0, 0, 2, 6])))
        self.items_print = random.Random(f"prints {seed}").random() < 0.3
        self.set_up()

    # The scenario

    def set_up(self) -> None:
        rng = self.rng
        self.agents_wanted = rng.choice([1, 1, 1, 2, 3])
        self.settings = {
            "max_workers": rng.randint(1, 3),
            "max_items_per_worker": rng.choice([None, None, None, 1, 2, 5]),
            "cancel_grace_s": rng.choice([0.0, 0.01, 0.1, 1.0]),
        }
        for _ in range(self.agents_wanted):
            self.add_agent(**self.settings)
        for _ in range(rng.choice([1, 1, 2, 3])):
            self.add_client(rng.choice([None, None, None, 1, 2, 3]), rng.choice([None, None, None, None, 1, 3]))
        self.durations = rng.choice(
            [
                [1e-6],
                [1e-5, 1e-3],
                [1e-5, 1e-5, 1e-5, 0.3],
                [1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 1.0],
                [0.01, 0.1],
                [2.0],
                [1e-4] * 9 + [12.0],
            ]
        )
        self.horizon_s = rng.choice([0.003, 0.02, 0.2]) + 2 * self.link_s
        for client in self.clients:
            for _ in range(rng.choice([1, 1, 2, 3])):
                self.at(self.some_time(), "user", self.submit_some, client)
            for _ in range(rng.choice([0, 1, 1, 2, 4])):
                self.at(self.some_time(), "user", self.cancel_some, client)
        for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
            self.at(self.some_time(), "fault", self.some_fault, None)
        if self.has_options:
            for _ in range(self.options.choice([0, 0, 0, 1, 2])):
                self.at(self.options.random() * 2 * self.horizon_s, "fault", self.lose_some_session, None)

    def some_time(self) -> float:
        return self.rng.random() * self.horizon_s * self.rng.choice([0.3, 1, 1, 2])

    def submit_some(self, client: SimClient) -> None:
        if client.gone or client.closing:
            return
        rng = self.rng
        sizes = [rng.choice([1, 1, 1, 2, 5, 9]) for _ in range(rng.choice([1, 2, 3, 6]))]
        first = client.last_no + 1
        for no in range(first, first + sum(sizes)):
            self.plan[client.index, no] = Behaviour(
                rng.choice(self.durations),
                rng.choice(["unwind", "unwind", "unwind", "swallow", "ignore"]),
                rng.choice([0, 1e-4, 0.05, 3.0]),
                "exit" if rng.random() < 0.02 else "error" if rng.random() < 0.1 else "value",
            )
            if self.has_nesting and self.nested.random() < 0.4:
                self.plan[client.index, no] = self.with_children(self.plan[client.index, no], 3)
        cancels = []
        if rng.random() < 0.1:
            cancels = [(first, rng.choice([CancelKind.SOFT, CancelKind.FORCED]))]
        kinds = [self.options.choice([1, 1, *KINDS]) for _ in sizes] if self.has_options else None
        self.submit(client, sizes, cancels, kinds)
        if rng.random() < 0.05:
            client.closing = True
            self.to_client(client, clients.CloseAsked())

    def with_children(self, behaviour: Behaviour, depth: int) -> Behaviour:
        """Return the behaviour of a call that submits some."""
        rng = self.nested
        children = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            child = Behaviour(
                rng.choice(self.durations),
                rng.choice(["unwind", "unwind", "swallow", "ignore"]),
                rng.choice([0, 1e-4, 0.05]),
                "exit" if rng.random() < 0.03 else "value",
            )
            children.append(self.with_children(child, depth - 1) if depth and rng.random() < 0.5 else child)
        return replace(behaviour, children=tuple(children), waits=rng.random() < 0.9)

    def cancel_some(self, client: SimClient) -> None:
        rng = self.rng
        if client.gone or not client.futures:
            return
        nos = list(client.futures)
        # One, some, or all of them ("clear"), and mostly those that are not over.
        open_nos = [no for no in nos if not client.futures[no].settled] or nos
        chosen = rng.choice(
            [[rng.choice(open_nos)], rng.sample(nos, rng.randint(1, len(nos))), client.state.outstanding_tasks()]
        )
        kind = rng.choice([CancelKind.SOFT, CancelKind.FORCED, CancelKind.FORCED])
        self.cancel(client, [(no, kind) for no in chosen])
        if rng.random() < 0.4:
            # Repeated, or raised from soft to forced, a little later.
            self.at(rng.choice([0, 1, 3]) * self.link_s * rng.random(), "user", self.cancel_again, (client, chosen))

    def cancel_again(self, what: tuple[SimClient, list[int]]) -> None:
        client, chosen = what
        if not client.gone:
            self.cancel(client, [(no, self.rng.choice([CancelKind.SOFT, CancelKind.FORCED])) for no in chosen])

    def lose_some_session(self, _: None) -> None:
        found = [client for client in self.clients if client in self.peers.values() and client.max_running is None]
        if found:
            client = self.options.choice(found)
            peer = self._peer_of(client)
            if not client.gone and not client.closed:
                self.note("fault: session of client", client.index)
                self.links.pop(peer, None)
                for kind in ("wire_up", "wire_down"):
                    self.queues.pop((kind, peer), None)
                self.lose_session(client)

    def some_fault(self, _: None) -> None:
        rng = self.rng
        what = rng.choice(
            ["worker", "worker", "worker", "agent", "client", "drain", "cut", "cut", "look", "forker", "forker"]
        )
        agent = rng.choice(self.agents)
        if what == "worker" and agent.workers:
            worker = rng.choice(list(agent.workers.values()))
            if worker.alive:
                self.note("fault: worker", worker.worker_id)
                worker.killed = True
                worker.exit_code = -11
                self.worker_died(worker)
        elif what == "agent" and not agent.gone and agent.peer in self.peers:
            self.note("fault: agent", agent.index)
            self.lose_agent(agent, stopped=rng.random() < 0.5 and agent.peer not in self.links)
            if not any(not other.gone for other in self.agents):
                self.add_agent(**self.settings)
        elif what == "client":
            client = rng.choice([client for client in self.clients if not isinstance(client, SimSession)])
            if not client.gone and any(owner is client for owner in self.peers.values()):
                self.note("fault: client", client.index)
                self.lose_client(client)
        elif what == "drain" and sum(not other.gone for other in self.agents) > 1 and not agent.gone:
            self.note("fault: drain", agent.index)
            self.to_agent(agent, agents.Drain())
        elif what == "forker" and not agent.gone and not agent.has_lost_forker:
            self.note("fault: forker", agent.index)
            self.lose_forker(agent)
        elif what == "cut" and self.links:
            self.cut(rng.choice(list(self.links)))
        elif what == "look" and not agent.gone:
            for worker_id in list(agent.workers):
                self.read_pipe(agent, worker_id)

    def step(self, worker: SimWorker) -> None:
        self.worker_steps += 1
        super().step(worker)
        if self.worker_steps in self.aimed_steps and worker.seq and worker.pc not in ("idle", "batch_end"):
            self.cancel_what_it_is_at(worker)
        if self.worker_steps in self.doomed_steps and worker.alive:
            self.note("fault: worker", worker.worker_id, "after a step, before", worker.pc)
            worker.killed = True
            worker.exit_code = -11
            self.worker_died(worker)

    def cancel_what_it_is_at(self, worker: SimWorker) -> None:
        """Aim a cancel at the very step that a worker is taking."""
        client, item = self.clients[worker.client], worker.first_no + worker.item
        if isinstance(client, SimSession):
            return
        task = max((no for no in client.futures if no <= item), default=None)
        if not client.gone and task is not None:
            self.cancel(client, [(task, self.rng.choice([CancelKind.SOFT, CancelKind.FORCED]))])

    # The driver

    def at(self, delay: float, what: str, first: Any, second: Any) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (self.now + delay, self.pushed, what, first, second))

    def posted(self, key: Any) -> None:
        time = self.now + self.delay_of(key[0]) * self.rng.random() * self.rng.choice([0.1, 1, 1, 3])
        time = self.arrivals[key] = max(time, self.arrivals.get(key, 0.0))  # in order
        self.at(time - self.now, "deliver", key, None)

    def delay_of(self, kind: str) -> float:
        if kind in ("up", "down", "wire_up", "wire_down"):
            return self.link_s
        if kind == "fork":
            return self.fork_s
        if kind in ("freeze", "death"):
            return 10 * self.forker_s
        return self.forker_s

    def may_step(self, worker: SimWorker) -> None:
        if worker not in self.tokens and worker.can_step():
            self.schedule_step(worker, self.step_delay(worker))

    def step_delay(self, worker: SimWorker) -> float:
        if worker.pc == "running":
            return self.behaviour(*worker.current_item()).duration_s
        if worker.pc == "unwinding":
            return self.behaviour(*worker.current_item()).unwind_s
        delay = self.step_s * self.rng.random()
        return delay + 0.005 * self.rng.random() if self.rng.random() < 0.03 else delay

    def schedule_step(self, worker: SimWorker, delay: float) -> None:
        self.pushed += 1
        self.tokens[worker] = self.pushed
        heapq.heappush(self.heap, (self.now + delay, self.pushed, "step", worker, self.pushed))

    def expedite(self, worker: SimWorker) -> None:
        if worker.pc in ("waiting", "wanting"):
            self.may_step(worker)
        if worker.pc != "running" or worker.frozen or worker.killed or worker.dead:
            return
        if self.behaviour(*worker.current_item()).on_interrupt != "ignore":
            self.schedule_step(worker, 0.0)

    def fork_fate(self, agent: int) -> str:
        if self.rng.random() >= self.bad_forks:
            return "ready"
        return self.rng.choice(["no fork", "dies", "dies", "fails"])

    def is_stuck(self, worker: SimWorker) -> bool:
        return worker.stuck

    def _on_fork(self, key: Any, worker_id: int) -> None:
        super()._on_fork(key, worker_id)
        worker = self.agents[key[1]].workers.get(worker_id)
        if worker is not None and self.rng.random() < self.stuck:
            worker.stuck = True

    def run(self) -> Run:
        overtakes, priorities.OVERTAKES = priorities.OVERTAKES, self.overtakes  # type: ignore[misc]
        try:
            self.drain_heap()
            for client in self.clients:
                if not isinstance(client, SimSession):
                    self.to_client(client, clients.CloseAsked())
            self.drain_heap()
            self.is_over = True
            for agent in self.agents:
                self.to_agent(agent, agents.Drain())
            self.drain_heap()
            for agent in self.agents:
                assert agent.gone, f"agent {agent.index} does not end"
            self.check_over()
        except Exception as error:
            raise AssertionError(f"seed {self.seed}, at {self.now:.6f} s, step {self.steps}: {error!r}") from error
        finally:
            priorities.OVERTAKES = overtakes  # type: ignore[misc]
        return self

    def item_ends(self, worker: SimWorker, is_stopped: bool = False) -> None:
        super().item_ends(worker, is_stopped)
        item = worker.current_item()
        if self.has_timeout(item) and not worker.stuck and not worker.frozen:
            most = self.timeout_s + self.settings["cancel_grace_s"] + LATE_S + 60 * self.forker_s
            assert self.ran_s[item] < most, f"{item} ran for {self.ran_s[item]} s with a timeout of {self.timeout_s} s"

    def drain_heap(self) -> None:
        while self.has_more():
            time, _, what, first, second = heapq.heappop(self.heap)
            self.now = time
            self.steps += 1
            assert self.steps < self.max_steps and time < MAX_TIME_S, "it does not come to an end"
            if what == "deliver":
                if first in self.queues:
                    self.deliver(first)
            elif what == "step":
                if self.tokens.get(first) == second:
                    del self.tokens[first]
                    if first.can_step():
                        self.step(first)
            elif what == "tick":
                self.tick(first)
            else:
                first(second)

    def has_more(self) -> bool:
        """Tell whether anything is still to happen."""
        return bool(self.heap)

    def tick(self, owner: Any) -> None:
        self.ticks.pop(owner, None)
        state = self.scheduler if owner == "scheduler" else owner.state
        deadline = state.next_deadline()
        if deadline is None or (owner != "scheduler" and owner.gone):
            return
        if deadline > self.now:
            self.expect_tick(owner, deadline)
        elif owner == "scheduler":
            self.to_scheduler(schedulers.Tick())
        else:
            self.to_agent(owner, agents.Tick())

    def expect_tick(self, owner: Any, deadline: float | None) -> None:
        if deadline is not None and self.ticks.get(owner, 1e9) > deadline:
            self.ticks[owner] = deadline
            self.at(max(0.0, deadline - self.now), "tick", owner, None)

    def to_scheduler(self, event: Any) -> None:
        super().to_scheduler(event)
        self.expect_tick("scheduler", self.scheduler.next_deadline())

    def to_agent(self, agent: SimAgent, event: Any) -> None:
        super().to_agent(agent, event)
        self.expect_tick(agent, agent.state.next_deadline())

    def after_agent(self, agent: SimAgent) -> None:
        self.check_dispatch(agent)

    def check_dispatch(self, agent: SimAgent) -> None:
        """No call waits behind a running one while a worker is idle."""
        crew = agent.state._crew
        idle_for = {worker.client_id for worker in crew.idle.values()}
        for state in crew.clients.values():
            is_idle = state.client_id in idle_for
            assert not is_idle or state.next_queued() is None, "a call is queued and a worker is idle"
        slack = WAIT_BEHIND_S + 80 * self.forker_s + 2 * self.fork_s
        since = self.behind_since
        for worker in crew.workers.values():
            if worker.held and (len(worker.held) > 1 or worker.held[0].open_items > 1):
                head = worker.held[0]
                key = (agent.index, worker.worker_id, head.seq, head.start)
                sim = agent.workers.get(worker.worker_id)
                stopping = head.state in ("STOPPING_SOFT", "FREEZING", "KILLING")
                # Another client's idle worker is kept for it for a while. It is of no use to one that can have no more
                # workers than its queued calls need, nor to anybody while no worker can be forked.
                client = worker.client
                may_take = client.max_workers - client.staff > client.queued and agent.state._hiring.hire_at is None
                idle = [
                    w
                    for w in crew.idle.values()
                    if w.client is client or (may_take and self.now >= w.idle_since + SLICE_S)
                ]
                stopping = stopping or crew.is_full(client)
                if not idle or stopping or sim is None or sim.dead or sim.killed or sim.stuck or sim.frozen:
                    since.pop(key, None)
                else:
                    waited = self.now - since.setdefault(key, self.now)
                    assert waited < slack, f"call {worker.held[-1].task_id} waits for {waited} s behind a running one"

    def agent_drained(self, agent: SimAgent) -> None:
        agent.gone = True
        agent.ended_early = not self.is_over
        if not self.is_over and all(other.gone for other in self.agents):
            self.add_agent(**self.settings)

    def note(self, *what: Any) -> None:
        if self.verbose:
            print(f"{self.now:12.6f} ", *what)

    # Links

    def _join(self, owner: SimClient | SimAgent) -> None:
        super()._join(owner)
        if self.rng.random() < 0.5:
            self.connect(self.last_peer)

    def connect(self, peer: int) -> None:
        """This peer comes over a network."""
        lease_s = self.rng.choice([0.5, 5.0, 60.0])
        self.nonces += 2
        ends = [
            links.LinkState(b"%d" % (self.nonces + end), connects=bool(end), now=self.now, lease_s=lease_s)
            for end in (0, 1)
        ]
        self.links[peer] = ends
        self.transports[peer] = 1
        for end in (0, 1):
            self.to_link(peer, end, links.Connected())

    def to_link(self, peer: int, end: int, event: Any) -> None:
        link = self.links[peer][end]
        was = link.state
        self.note(f"link {peer}.{end} {was}", event)
        instructions = link.handle(event, self.now)
        link.check()
        self.expect_link_tick(peer, end)
        for instruction in instructions:
            if isinstance(instruction, links.Transmit):
                self.post(("wire_up" if end else "wire_down", peer), (link, instruction.frame))
            elif isinstance(instruction, links.Deliver):
                for message in instruction.packets:
                    super()._on_down(("down", peer), message) if end else super()._on_up(("up", peer), message)
            elif isinstance(instruction, links.Disconnect):
                pass  # the state of the link says it
            else:
                self.link_lost(peer, end, instruction.reason)
                return
        owner = self.peers.get(peer)
        if end and isinstance(owner, SimAgent) and owner.peer == peer:
            self.tell_agent(owner, was, link)

    def tell_agent(self, agent: SimAgent, was: str, link: links.LinkState) -> None:
        """Tell an agent whether its scheduler is there."""
        if was == "UP" != link.state:
            self.to_agent(agent, agents.SchedulerLost())
        elif was != "UP" == link.state:
            self.to_agent(agent, agents.SchedulerBack())

    def expect_link_tick(self, peer: int, end: int) -> None:
        link = self.links[peer][end]
        deadline = link.next_deadline()
        if deadline is not None and self.ticks.get(link, 1e9) > deadline:
            self.ticks[link] = deadline
            self.at(max(0.0, deadline - self.now), "call", self.link_tick, (link, peer, end))

    def link_tick(self, what: tuple[links.LinkState, int, int]) -> None:
        link, peer, end = what
        self.ticks.pop(link, None)
        if self.is_connected(peer) and self.links[peer][end] is link:
            self.to_link(peer, end, links.Tick())

    def is_connected(self, peer: int) -> bool:
        return peer in self.links and peer in self.peers

    def _on_wire_up(self, key: Any, what: Any) -> None:
        self._on_wire(key[1], 0, *what)

    def _on_wire_down(self, key: Any, what: Any) -> None:
        self._on_wire(key[1], 1, *what)

    def _on_wire(self, peer: int, end: int, sender: links.LinkState, frame: Any) -> None:
        if isinstance(frame, schedulers.PeerLost):
            self.links.pop(peer, None)
            self.to_scheduler(frame)
        elif peer in self.links and self.links[peer][1 - end] is sender:
            self.to_link(peer, end, links.Arrived(frame))

    def cut(self, peer: int) -> None:
        """The transport breaks; the ends notice at different times, and another one is made some time later."""
        if not self.is_connected(peer):
            return
        rng = self.rng
        self.note("fault: cut", peer)
        if rng.random() < 0.5:
            for kind in ("wire_up", "wire_down"):
                self.queues.pop((kind, peer), None)
        for end in (0, 1):
            if rng.random() < 0.8:
                self.at(rng.random() * 3 * self.link_s, "call", self.disconnect, (peer, end, self.transports[peer]))
        self.at(rng.random() * rng.choice([0.01, 0.3, 3, 30]), "call", self.reconnect, peer)

    def disconnect(self, what: tuple[int, int, links.LinkState]) -> None:
        peer, end, transport = what
        # The end of a transport that has been replaced interests nobody.
        if self.is_connected(peer) and self.transports[peer] == transport and self.links[peer][end].state != "LOST":
            self.to_link(peer, end, links.Disconnected())

    def reconnect(self, peer: int) -> None:
        if self.is_connected(peer):
            self.transports[peer] += 1
            for end in (0, 1):
                if self.is_connected(peer):
                    self.to_link(peer, end, links.Connected())

    def link_lost(self, peer: int, end: int, reason: str) -> None:
        self.note(f"link {peer}.{end} lost", reason)
        owner = self.peers.get(peer)
        if end == 0:
            self.an_agent_was_lost |= isinstance(owner, SimAgent)
            self.to_scheduler(self.peer_lost(peer, reason))
        elif isinstance(owner, SimClient):
            # It gives up; the scheduler hears of it by its lease, or has.
            del self.peers[peer]
            self.to_client(owner, clients.SchedulerLost(reason))
            self.forget_peer(peer)
        elif isinstance(owner, SimAgent):
            del self.peers[peer]
            self.forget_peer(peer)
            self.an_agent_was_lost = True
            if not owner.gone:
                self.rejoin(owner)
                self.to_agent(owner, agents.NewEpoch())

    def peer_lost(self, peer: int, reason: str) -> schedulers.PeerLost:
        """Return what the scheduler hears when its end of a link is lost."""
        return schedulers.PeerLost(peer, reason, stopped=False)

    def forget_peer(self, peer: int) -> None:
        """The owner's end is gone; the scheduler's goes when its lease is over."""
        link = self.links[peer][0]
        if link.state != "LOST":
            self.at(link.lease_s, "call", self.to_scheduler, schedulers.PeerLost(peer, "lease", stopped=False))
        del self.links[peer]

    def rejoin(self, agent: SimAgent) -> None:
        super()._join(agent)
        agent.peer = self.last_peer
        self.connect(agent.peer)
        self.send(("up", agent.peer), Hello("agent", name=f"agent {agent.index} again"))

    def send(self, key: Any, message: Any) -> None:
        if self.through_codec:
            header, frames = self.encoder.encode(message)
            decoded = _DECODERS[key[0], isinstance(self.peers.get(key[1]), SimClient)].decode(header, frames)
            assert decoded == message, (decoded, message)
            message = decoded
        peer = key[1]
        if peer in self.links:
            if peer in self.peers:
                self.to_link(peer, int(key[0] == "up"), links.Outgoing(message, 100))
        else:
            super().send(key, message)

    def post(self, key: Any, what: Any) -> None:
        if key[0] == "up" and key[1] in self.links and not isinstance(what, schedulers.PeerLost):
            self.send(key, what)
        elif key[0] == "up" and isinstance(what, schedulers.PeerLost) and key[1] in self.links:
            # What it had sent may or may not have got through.
            if self.rng.random() < 0.5:
                self.queues.pop(("wire_up", key[1]), None)
            super().post(("wire_up", key[1]), (None, what))
        else:
            super().post(key, what)
