"""Random runs over networks that do not tell of their end.

As in `random_runs`, but every peer comes over a network whose ends beat, as `runtime.network` and `runtime.host` have
it: a way may be held up in one direction or both, a transport may die without a word, what it still held may come late
or never, and only the connecting end makes another one. An agent is told until when it was certainly heard, the
scheduler when it last heard of an agent. What follows is checked: when the scheduler decides about the calls of an
agent that is out of reach, none of them runs any more, and none starts there afterwards.
"""

from __future__ import annotations

import random
from typing import Any

from scaler_executor.protocol import agent as agents
from scaler_executor.protocol import link as links
from scaler_executor.protocol import scheduler as schedulers

from .cluster import Cluster, SimAgent, SimClient
from .random_runs import Run
from .worker import SimWorker

CLIENT_LEASE_S = 60.0
WIRES = ("wire_up", "wire_down")


class BeatingRun(Run):
    """A run whose links beat."""

    max_steps = 4 * Run.max_steps
    #: An end that connects tries again after up to one of these.
    redial_s = (0.01, 0.3, 1.3)

    def __init__(self, seed: int, verbose: bool = False) -> None:
        self.network = random.Random(~seed)
        #: {peer: until when nothing passes [towards the scheduler, from it]}
        self.held_until: dict[int, list[float]] = {}
        #: {peer: its transports up to this one carry nothing any more}
        self.dead: dict[int, int] = {}
        #: Connecting ends that are about to try.
        self.dialing: set[int] = set()
        #: {peer: since when its agent is not known to be heard, as it has been told; None: it is}
        self.unheard_since: dict[int, float | None] = {}
        #: Entries of the heap that are more than beats, which never end.
        self.foreground = 0
        #: Items about which the scheduler has decided while their agent was out of reach.
        self.given_up: set[tuple[int, int]] = set()
        super().__init__(seed, verbose)
        if self.retries:
            # What nothing stops would run on at one agent while another one has it.
            self.stuck = 0.0
        if self.network.random() < 0.5:
            self.durations = [*4 * self.durations, 20.0]  # longer than an agent may be out of reach
        for _ in range(self.network.choice([1, 2, 3, 5])):
            self.at(self.network.random() * self.network.choice([0.1, 1, 5, 20]), "fault", self.cut_one, None)

    # The driver

    def at(self, delay: float, what: str, first: Any, second: Any) -> None:
        self.foreground += self._is_foreground(what, first)
        super().at(delay, what, first, second)

    def schedule_step(self, worker: SimWorker, delay: float) -> None:
        self.foreground += 1
        super().schedule_step(worker, delay)

    def _is_foreground(self, what: str, first: Any) -> bool:
        return first[0] not in WIRES if what == "deliver" else first != self.link_tick

    def has_more(self) -> bool:
        if not self.heap or not (self.foreground or not self.is_settled()):
            return False
        _, _, what, first, _ = self.heap[0]
        self.foreground -= self._is_foreground(what, first)
        return True

    def is_settled(self) -> bool:
        """Tell whether all that was sent has arrived, over transports that are there."""
        for peer, ends in self.links.items():
            if self.is_connected(peer) and (
                any(link.state != "UP" or link.outstanding for link in ends) or ends[0]._epoch != ends[1]._epoch
            ):
                return False
        wires = [queue for key, queue in self.queues.items() if key[0] in WIRES]
        return all(isinstance(entry[1], links.Ack) for queue in wires for entry in queue)

    # Faults

    def cut_one(self, _: None) -> None:
        peers = [peer for peer in self.links if self.is_connected(peer)]
        if peers:
            self.cut(self.network.choice(peers))

    def cut(self, peer: int) -> None:
        """Hold up a way for a while, or end its transport; the ends may hear of that."""
        if not self.is_connected(peer):
            return
        network = self.network
        if network.random() < 0.6:
            directions = network.choice([(1, 1), (1, 0), (0, 1)])
            seconds = network.choice([0.3, 2, 5, 9, 12, 15, 40]) * (0.5 + network.random())
            self.note("fault: held", peer, directions, seconds)
            until = [self.now + seconds * direction for direction in directions]
            self.held_until[peer] = [max(pair) for pair in zip(until, self._held_until(peer), strict=True)]
            self.at(seconds, "call", self.is_over_now, peer)
        else:
            self.note("fault: cut", peer)
            if network.random() < 0.5:
                self.dead[peer] = self.transports[peer]
            for end in (0, 1):
                if network.random() < 0.7:
                    delay = network.random() * 3 * self.link_s
                    self.at(delay, "call", self.disconnect, (peer, end, self.transports[peer]))

    def is_over_now(self, peer: int) -> None:
        self.note("nothing holds up", peer)

    def _held_until(self, peer: int) -> list[float]:
        return self.held_until.get(peer, [0.0, 0.0])

    # Transports

    def _join(self, owner: SimClient | SimAgent) -> None:
        Cluster._join(self, owner)
        self.connect(self.last_peer)

    def connect(self, peer: int) -> None:
        accepting = self.accepting_end(peer)
        connecting = links.LinkState(
            b"%d" % (self.nonces + 1), connects=True, now=self.now, lease_s=CLIENT_LEASE_S, beat_s=links.BEAT_S
        )
        self.links[peer] = [accepting, connecting]
        self.transports[peer] = 1
        self.unheard_since[peer] = self.now
        self.to_link(peer, 1, links.Connected())

    def accepting_end(self, peer: int) -> links.LinkState:
        self.nonces += 2
        is_agent = isinstance(self.peers[peer], SimAgent)
        lease_s = schedulers.FENCE_S + links.LEASE_ALLOWANCE_S if is_agent else CLIENT_LEASE_S
        return links.LinkState(b"%d" % self.nonces, connects=False, now=self.now, lease_s=lease_s, beat_s=links.BEAT_S)

    def to_link(self, peer: int, end: int, event: Any) -> None:
        super().to_link(peer, end, event)
        if end and self.is_connected(peer) and self.links[peer][1].state == "DOWN" and peer not in self.dialing:
            self.dial_later(peer)

    def dial_later(self, peer: int) -> None:
        self.dialing.add(peer)
        self.at(self.network.random() * self.network.choice(self.redial_s), "call", self.dial, peer)

    def dial(self, peer: int) -> None:
        self.dialing.discard(peer)
        if not self.is_connected(peer) or self.links[peer][1].state == "LOST":
            return
        if self.now < max(self._held_until(peer)) or self.network.random() < 0.1:
            self.dial_later(peer)
            self.to_link(peer, 1, links.Tick())
            return
        if self.network.random() < 0.5:
            self.dead[peer] = self.transports[peer]  # else what it holds comes late
        self.transports[peer] += 1
        self.to_link(peer, 1, links.Connected())

    def post(self, key: Any, what: Any) -> None:
        if key[0] in WIRES and what[0] is not None:
            what = (*what, self.transports[key[1]])
        super().post(key, what)

    def deliver(self, key: Any) -> None:
        if key[0] in WIRES:
            until = self._held_until(key[1])[key[0] == "wire_down"]
            if self.now < until:
                self.at(until - self.now, "deliver", key, None)
                return
        super().deliver(key)

    def _on_wire(self, peer: int, end: int, sender: Any, frame: Any, transport: int = 0) -> None:
        if sender is not None and transport <= self.dead.get(peer, 0):
            return
        if not end and isinstance(frame, links.Greeting) and peer in self.links and self.links[peer][1] is sender:
            link = self.links[peer][0]
            if link.state == "LOST" and not frame.receiver:
                # It has never been answered, so it has said nothing yet: its session begins now.
                link = self.links[peer][0] = self.accepting_end(peer)
            if link.state == "LOST":
                # Nobody here knows it any more, as it hears from a greeting.
                self.post(("wire_down", peer), (link, links.Greeting(frame.epoch, b"another", frame.sender, 0)))
                return
            if frame.epoch > link._epoch:
                self.to_link(peer, 0, links.Connected())
        super()._on_wire(peer, end, sender, frame)

    # What the machines are told

    def tell_agent(self, agent: SimAgent, was: str, link: links.LinkState) -> None:
        since = self.unheard_since[agent.peer]
        if link.state == "UP" and self.now < link.proven_at + links.SILENCE_S:
            if since is not None:
                self.unheard_since[agent.peer] = None
                self.to_agent(agent, agents.SchedulerBack())
        elif since != link.proven_at:
            self.unheard_since[agent.peer] = link.proven_at
            self.to_agent(agent, agents.SchedulerLost(self.now - link.proven_at))

    def expect_link_tick(self, peer: int, end: int) -> None:
        super().expect_link_tick(peer, end)
        if end and self.unheard_since[peer] is None:
            # Then `tell_agent` looks.
            link = self.links[peer][1]
            due = link.proven_at + links.SILENCE_S
            if self.ticks.get(link, 1e9) > due:
                self.ticks[link] = due
                self.at(max(0.0, due - self.now), "call", self.link_tick, (link, peer, end))

    def link_tick(self, what: Any) -> None:
        if self.ticks.get(what[0], 1e9) <= self.now + 1e-9:  # else another one has come before it
            super().link_tick(what)

    def peer_lost(self, peer: int, reason: str) -> schedulers.PeerLost:
        unheard_s = self.now - self.links[peer][0].heard_at
        return schedulers.PeerLost(peer, reason, stopped=False, unheard_s=unheard_s)

    # What is checked

    def to_scheduler(self, event: Any) -> None:
        state = self.scheduler
        tasks = [task for _, fenced, _ in state._fences for task in fenced]
        if isinstance(event, schedulers.PeerLost):
            lost = state._peers.get(event.peer)
            tasks += [task for task in state._tasks.by_id.values() if task.agent is not None and task.agent is lost]
        items = {task: self._items_of(task) for task in tasks}
        super().to_scheduler(event)
        for task in tasks:
            if task.state != "FENCING" and not self.stuck:
                running = [item for item in items[task] if item in self.running]
                assert not running, f"{running} run on, and the scheduler has given them up"
                self.given_up.update(items[task])

    def _items_of(self, task: Any) -> list[tuple[int, int]]:
        client = int(task.payload.split()[0])
        return [(client, task.no + task.offset + item) for item in range(task.start, task.items)]

    def item_starts(self, worker: SimWorker) -> None:
        super().item_starts(worker)
        item = worker.current_item()
        assert self.retries or item not in self.given_up, f"{item} started after it had been given up"


class ShortCutRun(BeatingRun):
    """A run in which the way of each agent fails once, for almost as long as the scheduler waits for it, and nothing
    else does. Then no agent is lost, so a call is only lost if it ran when its agent had to stop it: the cluster
    checks that whoever is blamed was running when its worker was killed."""

    redial_s = (0.01, 0.3)

    def __init__(self, seed: int, verbose: bool = False) -> None:
        self.has_failed: set[int] = set()
        super().__init__(seed, verbose)

    def some_fault(self, _: None) -> None:
        self.cut_one(None)

    def cut(self, peer: int) -> None:
        if peer in self.has_failed or not isinstance(self.peers.get(peer), SimAgent):
            return
        self.has_failed.add(peer)
        directions = self.network.choice([(1, 1), (1, 0), (0, 1)])
        seconds = self.network.uniform(6.0, schedulers.FENCE_S - 0.1)
        self.note("fault: held", peer, directions, seconds)
        self.held_until[peer] = [self.now + seconds * direction for direction in directions]
        self.at(seconds, "call", self.is_over_now, peer)
        if directions == (1, 1) and self.network.random() < 0.5:
            self.dead[peer] = self.transports[peer]
            for end in (0, 1):
                self.at(
                    self.network.random() * self.link_s, "call", self.disconnect, (peer, end, self.transports[peer])
                )

    def link_lost(self, peer: int, end: int, reason: str) -> None:
        assert not isinstance(self.peers.get(peer), SimAgent), f"an agent is lost for a short cut: {reason}"
        super().link_lost(peer, end, reason)


def make_run(seed: int, verbose: bool = False) -> Run:
    """Return the run of a seed: links beat in every other one."""
    if seed % 2:
        return (ShortCutRun if seed % 10 == 5 else BeatingRun)(seed, verbose)
    return Run(seed, verbose)
