"""Several clients at one agent, on simulated time: what each of them gets, and how long a single call waits."""

import pytest

from scaler_executor.protocol.agent_hiring import SLICE_S
from scaler_executor.protocol.messages import CancelKind

from .cluster import Behaviour
from .random_runs import Run

FORK_S = 0.003
#: What messages, looks and the end of what a worker has in its hands (two portions) take besides.
SLACK_S = 0.02


class Shared(Run):
    """Clients and agents without faults; delays follow from the seed."""

    max_steps = 2_000_000

    def set_up(self):
        self.link_s, self.forker_s, self.fork_s, self.step_s = 1e-4, 1e-5, FORK_S, 1e-6
        self.bad_forks = self.stuck = 0
        self.doomed_steps = self.aimed_steps = set()
        self.through_codec = False
        self.retries = 0
        self.settings = {}
        self.forks = 0
        #: {(client index, no): when}
        self.submitted = {}
        self.ended = {}

    def checks_now(self):
        """With thousands of calls a check takes its time."""
        return self.steps % 500 == 0

    def step_delay(self, worker):
        if worker.pc == "running":
            return self.behaviour(*worker.current_item()).duration_s
        return self.step_s

    def connect(self, peer):
        """Nobody comes over a network."""

    def submit_at(self, at, client, count, duration_s):
        """Have calls of one client submitted in one batch."""

        def submit(_):
            for no in range(client.last_no + 1, client.last_no + 1 + count):
                self.plan[client.index, no] = Behaviour(duration_s)
                self.submitted[client.index, no] = self.now
            self.submit(client, [1] * count)

        self.at(at, "user", submit, None)

    def item_ends(self, worker, is_stopped=False):
        self.ended[worker.current_item()] = self.now
        super().item_ends(worker)

    def _on_fork(self, key, worker_id):
        self.forks += 1
        super()._on_fork(key, worker_id)

    def waits(self, client):
        """Return for each call of a client how long it took."""
        return [at - self.submitted[key] for key, at in self.ended.items() if key[0] == client.index]

    def ended_before(self, client, at):
        """Return how many calls of a client were over by then."""
        return sum(key[0] == client.index and when < at for key, when in self.ended.items())


#: {duration: number of calls of the client that floods}: some seconds' work.
COUNT = {1e-4: 10_000, 1e-3: 10_000, 0.01: 600, 0.1: 60}


def flooded(workers, duration_s, singles=8, every_s=0.3, agents=1):
    """Return a run in which one client has thousands of calls and another submits a single one now and then."""
    if duration_s < 1e-3:
        every_s /= 10
    run = Shared(workers)
    for _ in range(agents):
        run.add_agent(workers)
    flood, other = run.add_client(), run.add_client()
    run.submit_at(0.1, flood, COUNT[duration_s], duration_s)
    for number in range(singles):
        run.submit_at(0.1 + (number + 0.5) * every_s, other, 1, 1e-3)
    run.run()
    return run, flood, other


@pytest.mark.parametrize("duration_s", [1e-4, 1e-3, 0.01, 0.1])
@pytest.mark.parametrize("workers", [2, 3])
def test_single_calls_beside_a_flood(workers, duration_s):
    """A single call waits for no more than the end of what a worker has in its hands, and for a fork."""
    run, _, other = flooded(workers, duration_s)
    assert max(run.waits(other)) < duration_s + 2 * FORK_S + SLACK_S


def test_single_calls_beside_a_flood_on_two_agents():
    """It is the same with several agents."""
    run, _, other = flooded(2, 1e-3, agents=2)
    assert max(run.waits(other)) < 1e-3 + 2 * FORK_S + SLACK_S


def test_single_calls_beside_a_flood_on_one_worker():
    """With one worker for two clients a call waits for a slice at most, and for what is in the worker's hands."""
    run, _, other = flooded(1, 1e-3)
    assert max(run.waits(other)) < SLICE_S + 2 * FORK_S + SLACK_S


def test_little_is_lost_by_a_few_calls_of_another():
    """What one client has no use for is for the other."""
    run, flood, _ = flooded(2, 1e-3, singles=3, every_s=2.0)
    took_s = max(at for key, at in run.ended.items() if key[0] == flood.index) - 0.1
    # It has one worker of two for as long as the other's was used last, and then a while.
    assert took_s < 10_000 * 1e-3 / 2 + 3 * SLICE_S


@pytest.mark.parametrize(("workers", "clients"), [(1, 2), (2, 2), (3, 2), (2, 3), (4, 3), (2, 5)])
def test_shares_whatever_the_length_of_the_queues(workers, clients):
    """Clients that always have something queued get the same, and workers are not replaced call by call."""
    run = Shared(clients)
    run.add_agent(workers)
    duration_s, until_s = 4e-3, 6.0
    everyone = [run.add_client() for _ in range(clients)]
    for index, client in enumerate(everyone):
        run.submit_at(0.1 + 0.01 * index, client, int(until_s * workers / duration_s) // (1 + index % 2), duration_s)
    done = []
    run.at(until_s, "user", lambda _: done.extend(run.ended_before(client, run.now) for client in everyone), None)
    forks = []
    run.at(until_s, "user", lambda _: forks.append(run.forks), None)
    for client in everyone:
        run.at(
            until_s,
            "user",
            lambda c: run.cancel(c, [(no, CancelKind.FORCED) for no in c.state.outstanding_tasks()]),
            client,
        )
    run.run()
    assert sum(done) > 0.9 * (until_s - 0.1) * workers / duration_s
    assert max(done) < 1.25 * min(done), done
    assert forks[0] <= workers + 1 + until_s / SLICE_S * workers


def test_sequential_calls_keep_their_worker():
    """A client that waits for each result before it submits again is not replaced in between, call by call."""
    run = Shared(1)
    run.add_agent(2)
    flood, other = run.add_client(), run.add_client()
    run.submit_at(0.1, flood, 4000, 1e-3)
    for number in range(200):
        run.submit_at(0.2 + number * 5e-3, other, 1, 1e-3)
    run.run()
    assert run.forks < 8
    assert sorted(run.waits(other))[100] < 3e-3


@pytest.mark.parametrize("max_running", [1, 2, 3, 5])
def test_max_running(max_running):
    """So many run at once and not fewer, over several agents, while another client floods them."""
    run = Shared(max_running)
    for _ in range(3):
        run.add_agent(2)
    limited, flood = run.add_client(max_running=max_running), run.add_client()
    run.submit_at(0.1, limited, 300, 0.01)
    run.submit_at(0.1, flood, 3000, 0.01)
    most = 0
    starts = run.item_starts

    def count(worker):
        nonlocal most
        starts(worker)
        most = max(most, sum(client == limited.index for client, _ in run.running))

    run.item_starts = count
    run.run()
    # Half of the workers is its share.
    assert most == min(max_running, 3) or max_running > 3 <= most <= max_running


def test_max_running_while_agents_come_and_go():
    """The parts are divided anew, and together are never too many."""
    run = Shared(7)
    agents = [run.add_agent(2)]
    client = run.add_client(max_running=3)
    run.submit_at(0.1, client, 400, 0.02)
    run.at(0.5, "user", lambda _: agents.append(run.add_agent(4)), None)
    run.at(1.0, "user", lambda _: run.lose_agent(agents[0], stopped=False), None)
    run.at(1.2, "user", lambda _: agents.append(run.add_agent(1)), None)
    run.run()
    assert len(run.ended) >= 398
