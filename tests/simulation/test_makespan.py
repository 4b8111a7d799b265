"""How long a map takes whose items last differently, on simulated time: as if each went to the next free worker."""

import heapq
import random

import pytest

from scaler_executor.mapping import RUN_ITEMS, RUNS_PER_WORKER

from .cluster import Behaviour
from .test_sharing import FORK_S, SLACK_S, Shared

_RNG = random.Random(5)
_PARETO = [min(2e-3 * _RNG.paretovariate(1.1), 1.0) for _ in range(1000)]
_HUNDREDFOLD = [_RNG.choice([1e-3] * 9 + [0.1]) for _ in range(600)]
_LOGNORMAL = [_RNG.lognormvariate(-5, 1.5) for _ in range(600)]

DURATIONS_S = {
    "heavy-tailed": _PARETO,
    "heavy-tailed, ascending": sorted(_PARETO),
    "heavy-tailed, descending": sorted(_PARETO, reverse=True),
    "hundredfold": _HUNDREDFOLD,
    "hundredfold, ascending": sorted(_HUNDREDFOLD),
    "hundredfold, descending": sorted(_HUNDREDFOLD, reverse=True),
    "lognormal": _LOGNORMAL,
    "giant first": [1.0] + [1e-3] * 1500,
    "giant in the middle": [1e-3] * 750 + [1.0] + [1e-3] * 750,
    "giant last": [1e-3] * 1500 + [1.0],
    "giant after tiny ones": [1e-5] * 5000 + [1.0],
    "a long one at the end of each run": ([5e-4] * 127 + [0.2]) * 6,
    "few": [0.3] * 4 + [0.01] * 20,
    "even, 10 ms": [0.01] * 200,
    "even, 1 ms": [1e-3] * 1000,
}


def list_scheduling(durations_s, workers):
    """Return how long it takes if each item, in order, goes to the worker that is free first."""
    busy_until = [0.0] * workers
    for duration_s in durations_s:
        heapq.heapreplace(busy_until, busy_until[0] + duration_s)
    return max(busy_until)


class MapRun(Shared):
    """One client that maps."""

    first_at = None

    def to_client(self, client, event):
        super().to_client(client, event)
        if self.first_at is None and 1 in client.futures and client.futures[1].outcomes[0] is not None:
            self.first_at = self.now

    def map(self, durations_s, workers, sizes):
        """Submit runs of these sizes. Return how long all and the first item took."""
        self.add_agent(workers)
        client = self.add_client()
        self.plan = {(client.index, no): Behaviour(duration_s) for no, duration_s in enumerate(durations_s, 1)}
        self.at(0.1, "user", lambda _: self.submit(client, sizes), None)
        self.run()
        assert len(self.ended) == len(durations_s)
        return max(self.ended.values()) - 0.1, self.first_at - 0.1


def sizes_of(items, workers, known):
    """Return what `scaler_executor.mapping` makes of so many items, if it knows how many there are and if not."""
    size = max(1, min(RUN_ITEMS, -(-items // (workers * RUNS_PER_WORKER)))) if known else 1
    sizes: list[int] = []
    while items:
        sizes.append(min(size, items))
        items -= sizes[-1]
        if not known and len(sizes) % (RUNS_PER_WORKER * workers) == 0:
            size = min(2 * size, RUN_ITEMS)
    return sizes


@pytest.mark.parametrize("name", DURATIONS_S)
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("known", [True, False], ids=["known length", "unknown length"])
def test_makespan(name, workers, known):
    """It takes no more than 5 % longer than one by one, and the first result is there as soon as it can be."""
    durations_s = DURATIONS_S[name]
    took_s, first_s = MapRun(workers).map(durations_s, workers, sizes_of(len(durations_s), workers, known))
    assert took_s < 1.05 * list_scheduling(durations_s, workers) + 2 * FORK_S
    assert first_s < durations_s[0] + 2 * FORK_S + SLACK_S
