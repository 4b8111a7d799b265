"""How an agent shares its workers among clients, how a scheduler shares an agent's room, and the limits of a client."""

import pytest

from scaler_executor.protocol.agent import (
    AgentState,
    Drain,
    Exited,
    Fork,
    Forked,
    ForkFailed,
    Frozen,
    Interrupt,
    NewEpoch,
    Records,
    Retire,
    Start,
    Tick,
)
from scaler_executor.protocol.agent import Received as AgentReceived
from scaler_executor.protocol.agent import Send as AgentSend
from scaler_executor.protocol.agent_hiring import FORK_RETRY_S, SLICE_S, START_FACTOR
from scaler_executor.protocol.agent_sharing import IDLE_S
from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    AgentCapacity,
    AgentResult,
    Bye,
    CancelKind,
    ClientGone,
    ClientLimit,
    ClientLimited,
    DeathReport,
    Hello,
    TaskCancel,
    TaskReturned,
    TaskRun,
    TaskSubmit,
    Welcome,
)
from scaler_executor.protocol.page import RECORD_BATCH_END, RECORD_READY, RECORD_VALUE
from scaler_executor.protocol.scheduler import FENCE_S, PeerLost, Received, SchedulerState, Send
from scaler_executor.protocol.scheduler import Tick as SchedulerTick

REPORT = DeathReport("killed", -9)
LONG_S = 1.0


def task_id(client, no):
    return client << CLIENT_ID_SHIFT | no


class Agent(AgentState):
    """An agent that checks itself after each step. It tells of workers and limits only, and starts them itself."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.now = 1.0
        self.seqs = {}

    def on(self, event):
        out = self.handle(event, self.now)
        self.check()
        told = []
        for i in out:
            if isinstance(i, Start):
                self.seqs[i.worker_id] = [row[0] for row in i.message.calls]
            elif isinstance(i, (Fork, Retire, Interrupt)) or type(getattr(i, "message", 0)) in (
                ClientLimited,
                TaskReturned,
            ):
                told.append(i)
        return told

    def tick(self, after):
        self.now += after
        return self.on(Tick())

    def run(self, client, *nos):
        return self.on(AgentReceived(TaskRun([(task_id(client, no), 1, client, 1, 0, 0, b"p") for no in nos])))

    def ready(self, *workers, after=0.0):
        told = []
        for worker in workers:
            told += self.on(Forked(worker, 1000 + worker))
        self.now += after
        for worker in workers:
            told += self.on(Records(worker, [(RECORD_READY, 0, 0, b"")]))
        return told

    def ends(self, worker, seconds=LONG_S):
        """The calls in a worker's hands are over."""
        seqs = self.seqs.pop(worker)
        records = [(RECORD_VALUE, seq, 0, b"v") for seq in seqs]
        return self.on(Records(worker, [*records, (RECORD_BATCH_END, int(seconds * 1e9), len(seqs), b"")]))

    def limit(self, client, workers, items=None, no=7):
        return self.on(AgentReceived(ClientLimit(client, workers, items, no)))

    def held_of(self, client):
        return sum(call.client.client_id == client and call.state != "QUEUED" for call in self._calls.by_id.values())


def limited(client, no=7):
    return AgentSend(ClientLimited(client, no))


def flooded(workers=2):
    """Return an agent whose workers all run long calls of client 1, which has more of them queued."""
    state = Agent(workers)
    assert state.run(1, *range(1, 10)) == [Fork(worker) for worker in range(1, workers + 1)]
    state.ready(*range(1, workers + 1))
    assert state.held_of(1) == workers
    return state


# Sharing workers


def test_a_worker_is_taken_when_its_call_is_over():
    """No call is stopped for another client: who has too many workers lets one go at the end of its call."""
    state = flooded()
    assert state.run(2, 1) == []
    assert state.ends(2) == [Retire(2), Fork(3)]
    state.ready(3)
    assert state.held_of(2) == 1 and state.held_of(1) == 1
    assert state.ends(1) == []


def test_equal_shares_and_no_more():
    """A client with as many calls as it likes gets its share of the workers, and then keeps it."""
    state = flooded(4)
    state.run(2, *range(1, 10))
    assert [state.ends(worker) for worker in (1, 2, 3, 4)] == [[Retire(1), Fork(5)], [Retire(2), Fork(6)], [], []]
    state.ready(5, 6)
    assert [state.ends(worker) for worker in (5, 3, 6, 4)] == [[]] * 4


def test_workers_on_their_way_are_shared():
    """Workers that were ordered for one client a moment ago do not make another one wait until they are there."""
    state = Agent(4)
    state.run(1, *range(1, 10))
    assert state.run(2, *range(1, 10)) == [Fork(5), Fork(6)]
    assert state.ready(1, 2, 3, 4) == [Retire(1), Retire(2)]


def test_idle_workers_of_who_has_more_are_taken_at_once():
    """What one client has no use for is for the others."""
    state = Agent(4)
    state.run(1, 1, 2, 3, 4)
    state.ready(1, 2, 3, 4)
    for worker in (1, 2, 3, 4):
        state.ends(worker)
    out = state.run(2, 1, 2)
    assert [type(i) for i in out] == [Retire, Retire, Fork, Fork]


def test_an_idle_worker_is_kept_warm_for_a_while():
    """Who has its share and no use for it keeps it for a slice: its next call finds a worker."""
    state = Agent(2)
    state.run(1, 1)
    state.ready(1)
    state.run(2, *range(1, 10))
    state.ready(2)
    state.ends(1)
    state.ends(2)
    assert state._dispatch.sharing.due_at == pytest.approx(1.0 + SLICE_S)
    state.now = 1.0
    assert state.tick(SLICE_S / 2) == []
    assert state.tick(SLICE_S) == [Retire(1), Fork(3)]


def test_slices():
    """With more clients than workers each keeps a worker for a slice, however short its calls are."""
    state = flooded(1)
    state.run(2, *range(1, 10))
    assert state.ends(1) == [Retire(1), Fork(2)]
    state.ready(2)
    assert state.tick(SLICE_S / 2) == [] and state.ends(2) == []
    assert state._dispatch.sharing.due_at == pytest.approx(state.now + SLICE_S / 2)
    state.tick(SLICE_S / 2)
    assert state.ends(2) == [Retire(2), Fork(3)]


def test_slices_are_longer_where_workers_start_slowly():
    """There is never more starting than working."""
    state = flooded(1)
    state.run(2, *range(1, 10))
    state.ends(1)
    state.ready(2, after=1.0)
    state.tick(START_FACTOR * 1.0 - 0.1)
    assert state.ends(2) == []
    state.tick(0.1)
    assert state.ends(2) == [Retire(2), Fork(3)]


def test_a_pause_ends_a_slice():
    """A client that has no use for its only worker does not keep it from one that waits."""
    state = flooded(1)
    state.run(2, 1)
    state.ends(1)
    state.ready(2)
    assert state.ends(2) == []
    assert state.tick(IDLE_S) == [Retire(2), Fork(3)]


def test_the_remainder_goes_round():
    """Of three workers two clients have one and two by turns."""
    state = flooded(3)
    state.run(2, *range(1, 20))
    assert state.ends(1) == [Retire(1), Fork(4)]
    # One more than the other: that was so before it came, so its turn is over.
    assert state.ends(2) == [Retire(2), Fork(5)]
    state.ready(4, 5)
    assert [state.ends(worker) for worker in (3, 4, 5)] == [[], [], []]
    state.tick(SLICE_S)
    assert state.ends(4) == [Retire(4), Fork(6)]


def test_who_has_the_fewest_goes_first():
    """A worker that ends goes to the client that is furthest below its share."""
    state = flooded(3)
    state.run(2, *range(1, 10))
    state.ends(1)
    state.ready(4)
    state.run(3, 1)
    assert state.ends(2) == [Retire(2), Fork(5)]
    state.ready(5)
    assert state.held_of(3) == 1


def test_calls_of_a_client_keep_their_order():
    """Each client's calls start in the order in which they came, whatever others submit in between."""
    state = Agent(1)
    state.run(1, 1, 2)
    state.run(2, 1, 2)
    state.run(1, 3)
    queues = [[call.task_id for call in client.queue] for client in state._crew.clients.values()]
    assert queues == [[task_id(1, 1), task_id(1, 2), task_id(1, 3)], [task_id(2, 1), task_id(2, 2)]]


def test_what_waits_behind_a_long_call_is_taken_back_for_a_debt():
    """A client that owes a worker does not keep it by calls that were thought to be short."""
    state = Agent(1)
    state.run(1, 1)
    state.ready(1)
    state.ends(1, 1e-6)
    state.run(1, *range(2, 10))
    assert len(state.seqs[1]) > 2
    state.run(2, 1)
    state.tick(0.1)
    assert state._crew.workers[1].freeze
    first = state.seqs[1][0]
    state.on(Frozen(1, first, first - 1, 0))
    state.seqs[1] = [first]
    assert state.ends(1) == [Retire(1), Fork(2)]


def test_debts_end_with_those_who_are_owed():
    """When the client that waited is gone the others keep what they have."""
    state = flooded()
    state.run(2, 1)
    assert state._crew.clients[1].owes == 1
    state.on(AgentReceived(TaskCancel([(task_id(2, 1), 5, CancelKind.FORCED)])))
    state.on(AgentReceived(ClientGone(2)))
    assert list(state._crew.clients) == [1]
    assert state.ends(1) == []


def test_nothing_is_taken_while_forks_fail():
    """A client does not lose a worker for one that cannot be forked."""
    state = flooded(1)
    state.run(2, 1)
    assert state.ends(1) == [Retire(1), Fork(2)]
    assert state.on(ForkFailed(2, "no memory")) == []
    assert state.tick(FORK_RETRY_S) == [Fork(3)]


# Limits at an agent


def test_limit():
    """A client has no more workers than it may, others have the rest."""
    state = Agent(3)
    assert state.limit(1, 1) == [limited(1)]
    assert state.run(1, 1, 2, 3) == [Fork(1)]
    assert state.run(2, 1, 2, 3) == [Fork(2), Fork(3)]
    state.ready(1)
    assert state.ends(1) == [] and state.held_of(1) == 1


def test_lowered_limit_is_kept_as_calls_end():
    """It is said when it is kept, not before."""
    state = flooded()
    assert state.limit(1, 1) == []
    assert state.ends(1) == [Retire(1), limited(1)]
    assert state.ends(2) == []
    assert state.limit(1, 2, no=8) == [limited(1, 8), Fork(3)]


def test_call_that_is_being_stopped_counts():
    """While a call is being stopped it runs, so its worker is replaced later."""
    state = Agent(2)
    state.limit(1, 1)
    state.run(1, 1, 2)
    state.ready(1)
    assert state.on(AgentReceived(TaskCancel([(task_id(1, 1), 5, CancelKind.FORCED)]))) == [Interrupt(1, 1)]
    assert state.on(Exited(1, 1, 0, 0, REPORT)) == [Fork(2)]


def test_no_part_at_all():
    """With a limit of 0 what has not started goes back, also what crosses the news."""
    state = flooded(1)
    (back,) = state.limit(1, 0)
    assert [no for no, _ in back.message.tasks] == [task_id(1, no) for no in range(2, 10)]
    (back,) = state.run(1, 11)
    assert back.message.tasks == [(task_id(1, 11), 1)]
    assert state.ends(1) == [Retire(1), limited(1)]


def test_items_per_worker_of_one_client():
    """A client's own number takes the place of the agent's."""
    state = Agent(1, max_items_per_worker=5)
    assert state.limit(1, None, 1, 0) == []
    state.run(1, 1, 2)
    state.ready(1)
    assert state.ends(1) == [Retire(1), Fork(2)]


@pytest.mark.parametrize("limits", [(-1, None), (None, 0), (None, -5)])
def test_limits_that_make_no_sense(limits):
    """What a scheduler cannot have meant raises."""
    with pytest.raises(RemoteProtocolError):
        Agent(1).limit(1, *limits)


def test_limits_end_with_an_epoch_and_with_a_drain():
    """Nobody is told of limits that nobody waits for."""
    state = flooded()
    state.limit(1, 1)
    assert state.on(NewEpoch()) == [] and not state._crew.clients
    state = flooded()
    state.limit(1, 1)
    state.on(Drain())


# The scheduler

CLIENT, AGENT, OTHER_AGENT, OTHER_CLIENT = 1, 2, 3, 4


class Scheduler(SchedulerState):
    """A scheduler that checks itself after each step."""

    now = 0.0

    def on(self, event):
        out = self.handle(event, self.now)
        self.check()
        return [i for i in out if type(getattr(i, "message", None)) is not Welcome]

    def got(self, peer, message):
        return self.on(Received(peer, message))

    def agent(self, peer=AGENT, capacity=8, workers=4):
        out = self.got(peer, Hello("agent"))
        return out + self.got(peer, AgentCapacity(capacity, workers))

    def submit(self, peer, first, count=1):
        """Return the numbers of the tasks that were sent to an agent: {peer: [task_id]}."""
        return sent(self.got(peer, TaskSubmit([(no, 1, 0, b"") for no in range(first, first + count)])))

    def result(self, peer, *ids):
        return self.got(peer, AgentResult([(task, 1, 0, 1, 0, b"") for task in ids]))


def sent(out):
    runs = {}
    for i in out:
        if type(i.message) is TaskRun:
            runs.setdefault(i.peer, []).extend(row[0] for row in i.message.tasks)
    return runs


def two_clients(**settings):
    state = Scheduler()
    state.got(CLIENT, Hello("client", **settings))
    state.got(OTHER_CLIENT, Hello("client"))
    return state


def test_a_flood_leaves_room():
    """A client that has filled an agent does not make another one wait until there is room."""
    state = two_clients()
    state.agent(capacity=100)
    assert len(state.submit(CLIENT, 1, 1000)[AGENT]) == 100
    assert state.submit(OTHER_CLIENT, 1) == {AGENT: [task_id(2, 1)]}
    assert len(state.submit(OTHER_CLIENT, 2, 1000)[AGENT]) == 49
    # The first one gets nothing more until it is below its part, and then each gets what it gives back.
    assert state.result(AGENT, task_id(1, 1))[1:] == []
    assert sent(state.result(AGENT, task_id(2, 1))[1:]) == {AGENT: [task_id(2, 51)]}


def test_room_that_others_do_not_use():
    """Room is never kept free for clients that have nothing queued."""
    state = two_clients()
    state.agent(capacity=100)
    state.submit(OTHER_CLIENT, 1)
    assert len(state.submit(CLIENT, 1, 1000)[AGENT]) == 99
    assert len(sent(state.result(AGENT, task_id(2, 1)))[AGENT]) == 1


def test_each_has_a_part_of_little_room():
    """With more clients than room each has one task there."""
    state = Scheduler()
    state.agent(capacity=2, workers=1)
    for peer in range(10, 20):
        state.got(peer, Hello("client"))
        assert len(state.submit(peer, 1, 5)[AGENT]) == (2 if peer == 10 else 1)


def limit_of(out):
    return {i.peer: i.message for i in out if type(i.message) is ClientLimit}


def test_max_running_is_divided():
    """An agent hears of its part before the first task, in proportion to its workers."""
    state = Scheduler()
    state.agent(AGENT, workers=4)
    state.agent(OTHER_AGENT, capacity=4, workers=2)
    out = state.got(CLIENT, Hello("client", max_running=3, max_items_per_worker=9))
    assert out == [Send(AGENT, ClientLimit(1, 2, 9, 1)), Send(OTHER_AGENT, ClientLimit(1, 1, 9, 2))]
    assert {peer: len(tasks) for peer, tasks in state.submit(CLIENT, 1, 50).items()} == {AGENT: 2, OTHER_AGENT: 1}


def test_no_limit_costs_nothing():
    """A client without limits is not told of, nor its end of a limit."""
    state = two_clients()
    assert state.agent() == []


def test_items_per_worker_alone():
    """Agents hear of it once, and there is nothing to answer."""
    state = two_clients(max_items_per_worker=3)
    assert state.agent() == [Send(AGENT, ClientLimit(1, None, 3, 0))]
    assert len(state.submit(CLIENT, 1, 50)[AGENT]) == 8
    assert state.agent(OTHER_AGENT)[0] == Send(OTHER_AGENT, ClientLimit(1, None, 3, 0))


def test_a_part_is_raised_when_another_one_is_kept():
    """An agent that comes gets its part when the one that had it has said that it keeps to less."""
    state = two_clients(max_running=4)
    assert limit_of(state.agent(AGENT, workers=4))[AGENT].max_workers == 4
    state.submit(CLIENT, 1, 4)
    out = limit_of(state.agent(OTHER_AGENT, workers=4))
    assert out[AGENT].max_workers == 2 and OTHER_AGENT not in out
    assert state.got(AGENT, ClientLimited(1, 1)) == []
    out = limit_of(state.got(AGENT, ClientLimited(1, out[AGENT].limit_no)))
    assert out[OTHER_AGENT].max_workers == 2 and AGENT not in out


def test_an_agent_that_holds_nothing_need_not_answer():
    """What an agent does not have it cannot be running."""
    state = two_clients(max_running=4)
    state.agent(AGENT, workers=4)
    out = limit_of(state.agent(OTHER_AGENT, workers=4))
    assert out[AGENT].max_workers == out[OTHER_AGENT].max_workers == 2


def test_what_is_out_of_reach_counts():
    """The part of a lost agent is given to others when it must have stopped."""
    state = two_clients(max_running=4)
    state.agent(AGENT, workers=2)
    state.agent(OTHER_AGENT, workers=2)
    state.submit(CLIENT, 1, 8)
    state.got(OTHER_AGENT, AgentCapacity(8, 4))
    state.on(PeerLost(AGENT, "gone"))
    state.now = FENCE_S
    out = limit_of(state.on(SchedulerTick()))
    assert out[OTHER_AGENT].max_workers == 4


def test_agent_says_bye_and_leaves_its_part():
    """One that leaves in order leaves its part at once."""
    state = two_clients(max_running=2)
    state.agent(AGENT, workers=2)
    state.agent(OTHER_AGENT, workers=2)
    out = [i for i in state.got(AGENT, Bye()) if isinstance(i, Send)]
    assert limit_of(out)[OTHER_AGENT].max_workers == 2


def test_limited_clients_are_forgotten():
    """Nothing is remembered of a client with limits that is gone."""
    state = two_clients(max_running=2)
    state.agent()
    assert state.on(PeerLost(CLIENT, "gone")) == [Send(AGENT, ClientGone(1))]
    (agent,) = state._assignment.agents
    assert not state._limits.clients and not agent.seats
    assert state.got(AGENT, ClientLimited(1, 1)) == []
