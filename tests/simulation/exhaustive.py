"""Every order of events of a very small cluster: two tasks, two workers and one fault or cancel at any moment.

From each state every action is tried that is possible there: any message may arrive next, any worker may take its
next step, the fault may happen. States that were seen before, whatever led to them, are not followed again. Where
nothing is left to happen, nothing may be left to do.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections import deque
from typing import Any

from scaler_executor.protocol import agent as agents
from scaler_executor.protocol import client as clients
from scaler_executor.protocol import scheduler as schedulers
from scaler_executor.protocol.agent_dispatch import LOOK_S, RECALL_S
from scaler_executor.protocol.client import PLAIN, ClientTask
from scaler_executor.protocol.machine import Story
from scaler_executor.protocol.messages import CancelKind, ForkWorker

from .cluster import Behaviour, Cluster
from .worker import Page, SimWorker

#: Attributes that are times: what matters is how far away they are.
TIMES = {"_idle", "look_at", "grace_due", "portion_since", "_fence_at", "idle_since"}
#: Attributes that say nothing about what can happen next.
IRRELEVANT = {
    "_by_load",
    "load",
    "_now",
    "now",
    "_story",
    "story",
    "_out",
    "instructions",
    "stale",
    "victims",
    "starts",
    "load_s",
    "tries",
    "began",
    "ran_s",
}

#: Steps that write words which mean something only while a call is in progress, when none is.
UNSEEN = {"reset_item", "set_stop", "clear_item"}

Action = tuple[Any, ...]


class Small(Cluster):
    """A cluster with one client and one agent of two workers. `ops` are what may happen besides, once each, in
    order."""

    def __init__(self, ops: list[Action], items: list[int], short: bool, grace_s: float, on_interrupt: str) -> None:
        super().__init__()
        self.default_behaviour = Behaviour(on_interrupt=on_interrupt)
        self.ops = ops
        self.had_ops = bool(ops)
        agent = self.add_agent(2, cancel_grace_s=grace_s)
        client = self.add_client()
        self.run_quietly()
        if short:
            # Both tasks are expected to be short and are given to one worker.
            self.submit(client, [1, 2])
            self.run_quietly()
            agent.state._functions[1, 1].seconds = agent.state._functions[1, 2].seconds = 1e-6
        self.submit(client, items)
        # From here to the point where the workers have their calls, nothing that is tried here can go wrong.
        while not self.calls_at_workers():
            self.do(next(action for action in self.actions(with_ops=False) if not self.is_a_call(action)))

    def calls_at_workers(self) -> bool:
        """Tell whether all calls have just been given to workers."""
        agent = self.agents[0]
        held = sum(len(worker.held) for worker in agent.state._crew.workers.values())
        return held > 0 and held == agent.state.outstanding

    def run_quietly(self) -> None:
        """Let everything happen in the order in which it comes."""
        while actions := self.actions(with_ops=False):
            self.do(actions[0])

    def note(self, *what: Any) -> None:
        if TRACE:
            print(f"{self.now:10.4f} ", *what)

    def is_a_call(self, action: Action) -> bool:
        """Tell whether this is the step of a worker that has been given something to do."""
        return action[0] == "step" and bool(self.agents[0].workers[action[1]].inbox)

    def step(self, worker: SimWorker) -> None:
        """Let a worker take its next step, and the ones behind it that nobody can tell apart from it."""
        super().step(worker)
        while worker.pc in UNSEEN and worker.can_step() and not worker.signal:
            super().step(worker)

    def ring(self, worker: SimWorker) -> None:
        """Ring the bell, which stays rung until somebody looks."""
        if ("bell", worker.agent, worker.worker_id) not in self.queues:
            super().ring(worker)

    # Actions

    def actions(self, with_ops: bool = True) -> list[Action]:
        """Return what can happen next."""
        agent = self.agents[0]
        if not (with_ops and self.ops):
            # What the client is told changes nothing for anybody else, so its moment does not matter. Nor does that of
            # what the agent says, since the scheduler hears nothing else: its answers may take their time.
            for key in self.queues:
                if (key[0] == "down" and key[1] != agent.peer) or key[0] == "up":
                    return [("deliver", key)]
        if with_ops and self.had_ops and not self.ops and not agent.state._crew.queued:
            # A worker that nobody waits for may as well be there at once.
            for action in self.arrivals():
                return [action]
        if with_ops and self.had_ops and not self.ops and self.is_quiet():
            # What was done is done with, and what is left is a cluster at work: that is the scenario "nothing".
            return self.actions(with_ops=False)[:1]
        actions: list[Action] = [("deliver", key) for key in sorted(self.queues, key=repr)]
        actions += [("step", worker_id) for worker_id, worker in sorted(agent.workers.items()) if worker.can_step()]
        if agent.state._calls.stopping:
            actions.append(("tick",))
        if with_ops and self.ops:
            actions += self.possible(self.ops[0])
        return actions

    def is_quiet(self) -> bool:
        """Tell whether nothing is being stopped, taken back or told to an agent."""
        state = self.agents[0].state
        if any(key[0] in ("command", "freeze", "death", "down", "report") for key in self.queues):
            return False
        if state._calls.stopping or state._calls.to_freeze or state._hiring.gone_clients:
            return False
        return not any(worker.freeze or worker.state == "LEAVING" for worker in state._crew.workers.values())

    def arrivals(self) -> list[Action]:
        """Return the next steps of workers on their way to being ready."""
        agent = self.agents[0]
        new = {
            worker.worker_id
            for worker in agent.state._crew.workers.values()
            if worker.state in ("FORKING", "STARTING") or (worker.retired and not worker.last_seq)
        }
        actions: list[Action] = []
        for key, queue in self.queues.items():
            head = queue[0]
            if (
                key[0] == "fork"
                or (key[0] == "bell" and key[2] in new)
                or (key[0] == "command" and isinstance(head, ForkWorker))
                or (key[0] == "report" and getattr(head, "worker_id", None) in new)
            ):
                actions.append(("deliver", key))
        steps = [("step", worker_id) for worker_id in new if worker_id in agent.workers]
        return actions + [step for step in steps if agent.workers[step[1]].can_step()]

    def possible(self, op: Action) -> list[Action]:
        if op[0] == "kill":
            return [("kill", worker.worker_id) for worker in self.agents[0].workers.values() if worker.alive]
        if op[0] == "lose forker" and self.agents[0].has_lost_forker:
            return []  # there is none
        return [op]

    def do(self, action: Action) -> None:
        agent, client = self.agents[0], self.clients[0]
        if action[0] == "deliver":
            self.deliver(action[1])
            return
        if action[0] == "step":
            self.step(agent.workers[action[1]])
            return
        if action[0] == "tick":
            deadline = agent.state.next_deadline()
            self.now = max(self.now, deadline if deadline is not None else self.now)
            self.to_agent(agent, agents.Tick())
            return
        self.note("op", action)
        self.ops = self.ops[1:]
        if action[0] == "kill":
            worker = agent.workers[action[1]]
            worker.killed = True
            worker.exit_code = -11
            self.worker_died(worker)
        elif action[0] == "cancel":
            if not client.gone:
                self.cancel(client, [(no, action[1]) for no in action[2] if no in client.futures])
                key = ("up", self._peer_of(client))
                while key in self.queues:
                    self.deliver(key)  # a request under way is one that is made later
        elif action[0] == "lose client":
            self.lose_client(client)
        elif action[0] == "lose forker":
            self.lose_forker(agent)
        else:
            assert action[0] == "drain"
            self.to_agent(agent, agents.Drain())

    def settle(self) -> bool:
        """Nothing can happen but the passing of time. Let it pass; return whether something came of it."""
        for _ in range(8):
            deadline = self.agents[0].state.next_deadline()
            if deadline is None:
                return False
            self.do(("tick",))
            if self.actions():
                return True
        return False

    def check_settled(self) -> None:
        """Everything is answered."""
        for client in self.clients:
            for no, future in client.futures.items():
                assert client.gone or future.settled, f"task {no}: {future.outcomes}"
        assert self.scheduler.outstanding == 0 and not self.running
        for agent in self.agents:
            assert agent.state.outstanding == 0 and not agent.state._hiring.gone_clients


TRACE = False


def _save_plain(task: ClientTask) -> Any:
    if task is PLAIN:
        return "PLAIN"
    return _new_task, (), (None, {name: getattr(task, name) for name in ClientTask.__slots__})


def _new_task() -> ClientTask:
    return ClientTask.__new__(ClientTask)


# `pickle` looks a name up in the module of the object that it stands for, which for PLAIN is its class's.
assert clients.PLAIN is PLAIN


class _Pickler(pickle.Pickler):
    dispatch_table = {**copyreg.dispatch_table, ClientTask: _save_plain, Story: lambda story: (Story, ())}


def freeze(cluster: Small) -> bytes:
    """Return a copy that can be thawed many times."""
    buffer = io.BytesIO()
    _Pickler(buffer, 5).dump(cluster)
    return buffer.getvalue()


def fingerprint(cluster: Small) -> int:
    """Return the same number for states from which the same can happen."""
    numbers: dict[int, int] = {}
    now = cluster.now

    def of(value: Any, name: str = "") -> Any:
        kind = type(value)
        if kind is float:
            return round(max(value - now, -2 * RECALL_S - LOOK_S), 6) if name in TIMES else value
        if kind in (int, str, bytes, bool, type(None)):
            return value
        if kind in (list, tuple, deque):
            return tuple([of(inner) for inner in value])
        if kind is dict or kind is Page:
            return tuple([(of(key), of(inner, name)) for key, inner in value.items()])
        if kind in (set, frozenset):
            return tuple(sorted(map(repr, value)))
        if isinstance(value, (int, str)):
            return int(value) if isinstance(value, int) else str(value)
        known = numbers.get(id(value))
        if known is not None:
            return known
        numbers[id(value)] = number = len(numbers) + 1_000_000
        attributes = getattr(value, "__struct_fields__", None) or getattr(kind, "__slots__", None)
        if attributes is None:
            attributes = vars(value)
        if not hasattr(value, "__dict__") and not attributes:
            return kind.__name__
        return (
            kind.__name__,
            number,
            tuple([(name, of(getattr(value, name, None), name)) for name in attributes if name not in IRRELEVANT]),
        )

    return hash(of(cluster))


class Explorer:
    """Depth first through the states that can be reached."""

    def __init__(self, start: Small, max_states: int | None = None) -> None:
        self.seen: set[int] = set()
        self.ends = 0
        self.max_states = max_states
        self.start = freeze(start)
        self.path: list[Action] = []

    def run(self) -> Explorer:
        stack: list[tuple[bytes, list[Action], int]] = [(self.start, pickle.loads(self.start).actions(), 0)]
        self.path = []
        while stack:
            frozen, actions, depth = stack[-1]
            del self.path[depth:]
            if not actions:
                stack.pop()
                continue
            action = actions.pop()
            self.path.append(action)
            cluster = pickle.loads(frozen)
            try:
                cluster.do(action)
                mark = fingerprint(cluster)
                if mark in self.seen:
                    continue
                self.seen.add(mark)
                following = cluster.actions()
                if not following:
                    if cluster.settle():
                        following = cluster.actions()
                    else:
                        cluster.check_settled()
                        self.ends += 1
                        continue
            except Exception as error:
                raise AssertionError(f"{error!r} after {self.path}") from error
            if self.max_states is not None and len(self.seen) >= self.max_states:
                return self
            stack.append((freeze(cluster), following, depth + 1))
        return self


def replay(start: Small, path: list[Action]) -> None:
    """Repeat what an AssertionError of `Explorer` told, verbosely."""
    global TRACE
    TRACE = True
    for action in path:
        if not start.actions():
            start.settle()
        start.do(action)


FORCED, SOFT = CancelKind.FORCED, CancelKind.SOFT
#: {name: (ops, items of the tasks, whether both go to one worker, grace, how calls take an interrupt)}
SCENARIOS: dict[str, tuple[list[Action], list[int], bool, float, str]] = {
    "nothing": ([], [1, 1], False, 0.0, "unwind"),
    "worker dies": ([("kill",)], [1, 1], False, 0.0, "unwind"),
    "worker dies with both": ([("kill",)], [1, 1], True, 0.0, "unwind"),
    "worker dies in a run": ([("kill",)], [3], True, 0.0, "unwind"),
    "forced cancel, killed": ([("cancel", FORCED, [1])], [1, 1], False, 0.0, "unwind"),
    "forced cancel, unwinding": ([("cancel", FORCED, [1])], [1, 1], False, 0.001, "unwind"),
    "forced cancel, swallowed": ([("cancel", FORCED, [1])], [1, 1], False, 0.001, "swallow"),
    "forced cancel, ignored": ([("cancel", FORCED, [1])], [1, 1], False, 0.001, "ignore"),
    "soft cancel": ([("cancel", SOFT, [1])], [1, 1], False, 0.0, "unwind"),
    "soft cancel of the second": ([("cancel", SOFT, [5])], [1, 1], True, 0.0, "unwind"),
    "forced cancel of the second": ([("cancel", FORCED, [5])], [1, 1], True, 0.0, "unwind"),
    "soft cancel of a run": ([("cancel", SOFT, [4])], [2], True, 0.0, "unwind"),
    "forced cancel of a run": ([("cancel", FORCED, [4])], [2], True, 0.0, "unwind"),
    "soft raised to forced": ([("cancel", SOFT, [5]), ("cancel", FORCED, [5])], [1, 1], True, 0.0, "unwind"),
    "forker dies": ([("lose forker",)], [1, 1], False, 0.0, "unwind"),
    "forker dies with both in one": ([("lose forker",)], [1, 1], True, 0.0, "unwind"),
    "two forkers die": ([("lose forker",), ("lose forker",)], [1, 1], True, 0.0, "unwind"),
    "forker and client die": ([("lose forker",), ("lose client",)], [1], False, 0.0, "unwind"),
    "client dies": ([("lose client",)], [1, 1], False, 0.0, "unwind"),
    "client dies with both in one": ([("lose client",)], [1, 1], True, 0.0, "unwind"),
}


def explore(name: str, max_states: int | None = None) -> Explorer:
    """Try every order of one scenario."""
    return Explorer(Small(*SCENARIOS[name]), max_states).run()


__all__ = ["SCENARIOS", "Explorer", "SimWorker", "Small", "explore", "replay", "schedulers"]
