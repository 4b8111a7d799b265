"""What options make of calls: timeouts, priorities, and retries that outlast a scheduler."""

from random import Random

import pytest

from scaler_executor.protocol import priorities
from scaler_executor.protocol.agent import (
    AgentState,
    Exited,
    Fork,
    Forked,
    Freeze,
    Frozen,
    Interrupt,
    Kill,
    Look,
    Records,
    Seen,
    Start,
)
from scaler_executor.protocol.agent import Received as AgentReceived
from scaler_executor.protocol.agent import Send as AgentSend
from scaler_executor.protocol.agent import Tick as AgentTick
from scaler_executor.protocol.client import (
    REST,
    Batch,
    Cancelled,
    ClientState,
    CloseAsked,
    Closed,
    Deliver,
    Finished,
    Lost,
    Received,
    Renewed,
    Send,
    Stranded,
)
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    AgentCapacity,
    AgentConfirm,
    AgentResult,
    Bye,
    CallStyle,
    CancelKind,
    Death,
    DeathReport,
    Function,
    Hello,
    Options,
    ResultKind,
    SessionLost,
    TaskCancel,
    TaskCancelConfirm,
    TaskCancelConfirmType,
    TaskDied,
    TaskResult,
    TaskRetried,
    TaskRun,
    TaskRunning,
    TasksAgain,
    TaskSubmit,
    Welcome,
)
from scaler_executor.protocol.page import RECORD_BATCH_END, RECORD_READY, RECORD_SKIPPED, RECORD_UNWOUND, RECORD_VALUE
from scaler_executor.protocol.scheduler import FENCE_S, Drop
from scaler_executor.protocol.scheduler import Send as SchedulerSend

from .test_scheduler import Scheduler, scheduler

BASE = 1 << CLIENT_ID_SHIFT
CLIENT, AGENT = 1, 2
SOFT, FORCED = CancelKind.SOFT, CancelKind.FORCED
RECALL = CancelKind.RECALL
CANCELED, FAILED = TaskCancelConfirmType.CANCELED, TaskCancelConfirmType.CANCEL_FAILED
GRACE_S = 0.5
TIMEOUT_S = 2.0
REPORT = DeathReport("killed", -9)


def function(function_id=1, **options):
    return Function(function_id, "f", b"blob", options=Options(**options))


TIMED = function(timeout_s=TIMEOUT_S, retries=1)


class Agent(AgentState):
    """An agent that checks itself after each step and tells its time, and keeps some of its words to itself."""

    now = 0.0

    def on(self, event):
        out = self.handle(event, self.now)
        self.check()
        quiet = (AgentCapacity, TaskRunning)
        return [i for i in out if not isinstance(i, Look) and not (type(i) is AgentSend and type(i.message) in quiet)]

    def run(self, *tasks):
        """Tasks come: (number, function)."""
        rows = [(BASE + no, 1, 1, 1, 0, f.function_id, b"p%d" % no) for no, f in tasks]
        new = {f.function_id: (1, f) for _, f in tasks if (1, f.function_id) not in self._functions}
        return self.on(AgentReceived(TaskRun(rows, list(new.values()))))

    def cancel(self, no, cancel_no, kind=FORCED):
        return self.on(AgentReceived(TaskCancel([(BASE + no, cancel_no, kind)])))

    def records(self, *records, worker=1):
        return self.on(Records(worker, list(records)))

    def tick(self, after):
        self.now += after
        return self.on(AgentTick())

    def seen(self, seq=1, worker=1):
        return self.on(Seen(worker, seq, seq - 1))


def agent(called=TIMED, **settings):
    """Return an agent with one worker that has been given call 1, and may be at it."""
    state = Agent(1, **{"cancel_grace_s": GRACE_S, **settings})
    state.run((1, called))
    state.on(Forked(1, 1001))
    state.records((RECORD_READY, 0, 0, b""))
    return state


def expired():
    """Return an agent that has just interrupted call 1 at its timeout."""
    state = agent()
    state.seen()
    assert state.tick(TIMEOUT_S) == [Interrupt(1, 1), Fork(2)]
    return state


def timed_out(no=1, how=""):
    text = f"ran longer than its timeout of 2 s{how}".encode()
    return AgentSend(AgentResult([(BASE + no, 1, 0, 1, ResultKind.TIMED_OUT, text)]))


def exited(current=1, done=0, worker=1):
    return Exited(worker, current, done, 0, REPORT)


# Timeouts


def test_time_counts_from_the_start():
    """A call has its time from when it was seen running, however long it has waited."""
    state = agent()
    state.tick(10 * TIMEOUT_S)
    state.seen()
    assert state.tick(TIMEOUT_S / 2) == []
    assert state.next_deadline() == state.now + TIMEOUT_S / 2
    assert Interrupt(1, 1) in state.tick(TIMEOUT_S / 2)


def test_timeout_is_answered_when_the_code_has_stopped():
    """An expired call is stopped like a cancelled one: it unwinds, its process group ends, and that is its result."""
    state = expired()
    assert state.records((RECORD_UNWOUND, 1, 0, b"")) == []
    assert state.on(exited(1, 1)) == [timed_out()]
    assert state.outstanding == 0


def test_timeout_kills_after_the_grace_time():
    """An expired call that does not unwind is frozen and killed; the answer waits until it is gone."""
    state = expired()
    assert state.tick(GRACE_S) == [Freeze(1, 1, [1], 0)]
    assert state.on(Frozen(1, 1, 0, 0, killed=True)) == []
    assert state.on(exited()) == [timed_out()]


def test_expired_call_whose_worker_cannot_be_killed():
    """A call that cannot be stopped has its timeout all the same, which says so."""
    state = expired()
    state.tick(GRACE_S)
    out = state.on(Frozen(1, 1, 0, 0, killed=True, stuck=True))
    assert timed_out(how=", and its worker cannot be stopped") in out
    assert state.on(exited()) == []


def test_expired_call_whose_worker_does_not_stand_still():
    """A worker that cannot be frozen is killed, for nothing is wanted of it any more."""
    state = expired()
    state.tick(GRACE_S)
    out = state.on(Frozen(1, 1, 0, 0, stuck=True))
    assert Kill(1) in out and timed_out(how=", and its worker cannot be stopped") in out
    assert state.on(exited()) == []


def test_result_before_the_stop_counts():
    """A call that finishes before it could be stopped keeps its result."""
    state = expired()
    out = state.records((RECORD_VALUE, 1, 0, b"v"))
    assert AgentSend(AgentResult([(BASE + 1, 1, 0, 1, ResultKind.VALUE, b"v")])) in out
    assert state.outstanding == 0


def test_death_of_an_expired_call_is_its_timeout():
    """A worker that dies while its call is being stopped for its timeout is no death that is retried."""
    assert expired().on(exited()) == [timed_out()]


def test_cancel_of_an_expired_call_wins():
    """A cancel while a call is being stopped for its timeout is answered by that stop."""
    state = expired()
    assert state.cancel(1, 7) == []
    assert state.on(exited()) == [AgentSend(AgentConfirm([(BASE + 1, 1, 7, CANCELED, 0)]))]


@pytest.mark.parametrize("kind", [SOFT, RECALL])
def test_soft_cancel_of_an_expired_call_fails(kind):
    """What would leave a running call alone is refused, and the call ends by its timeout."""
    state = expired()
    assert state.cancel(1, 7, kind) == [AgentSend(AgentConfirm([(BASE + 1, 1, 7, FAILED, 0)]))]
    assert state.on(exited()) == [timed_out()]


def test_timeout_of_a_cancelled_call():
    """The time of a call that is being cancelled does not matter any more."""
    state = agent(cancel_grace_s=10 * TIMEOUT_S)
    state.seen()
    state.cancel(1, 7)
    assert state.tick(2 * TIMEOUT_S) == []
    assert state.on(exited()) == [AgentSend(AgentConfirm([(BASE + 1, 1, 7, CANCELED, 0)]))]


def test_time_of_a_call_that_is_over():
    """What is over in time is left alone, and so is the call behind it that has no timeout."""
    state = agent()
    state.seen()
    state.records((RECORD_VALUE, 1, 0, b"v"))
    state.run((2, function(2)))
    state.seen(2)
    assert state.tick(2 * TIMEOUT_S) == []


def test_expired_call_that_was_only_claimed():
    """A call that turns out not to have begun is queued again: nothing of its time has passed."""
    state = agent(cancel_grace_s=0)
    state.seen()
    assert Freeze(1, 1, [1], 0) in state.tick(TIMEOUT_S)
    out = state.on(Frozen(1, 0, 0, 0))
    assert not any(isinstance(i, AgentSend) for i in out)
    assert [call.state for call in state._calls.by_id.values()] == ["QUEUED"]


def test_expired_call_that_was_skipped():
    """A call that was claimed and then found taken back has not begun: it is queued again."""
    state = expired()
    out = state.records((RECORD_SKIPPED, 1, 0, b""))
    assert not any(isinstance(i, AgentSend) for i in out)
    assert [call.state for call in state._calls.by_id.values()] == ["QUEUED"]


def test_expired_call_unwinds_after_a_freeze_found_it_over():
    """A call that is stopped for its timeout and found over by a freeze ends by what it says, and not as a death."""
    state = expired()
    state.tick(GRACE_S)
    state.on(Frozen(1, 1, 1, 0))
    assert state.records((RECORD_UNWOUND, 1, 0, b"")) == [Kill(1)]
    assert state.on(exited(1, 1)) == [timed_out()]


def test_time_of_a_call_that_a_freeze_has_found():
    """Also the time of a call counts that is not seen running but found so, when somebody wanted it back."""
    state = agent()
    assert state.cancel(1, 7, SOFT) == [Freeze(1, 0, [1], 0)]
    state.on(Frozen(1, 1, 0, 0))
    assert Interrupt(1, 1) in state.tick(TIMEOUT_S)


# The scheduler


def nos_run(out):
    """Return the numbers of the tasks that are given to the agent."""
    messages = [i.message for i in out if isinstance(i, SchedulerSend) and isinstance(i.message, TaskRun)]
    return [row[0] - BASE for message in messages for row in message.tasks]


def test_timeout_is_not_retried():
    """That a call was stopped at its timeout is its result, whatever its retries."""
    state = scheduler()
    state.got(CLIENT, TaskSubmit([(1, 1, 1, b"p")], [TIMED]))
    out = state.got(AGENT, AgentResult([(BASE + 1, 1, 0, 1, ResultKind.TIMED_OUT, b"late")]))
    assert out == [SchedulerSend(CLIENT, TaskResult([(1, 0, 1, ResultKind.TIMED_OUT, b"late")]))]
    assert state.outstanding == 0


@pytest.mark.parametrize("kind", [ResultKind.DIED, ResultKind.BROKEN, ResultKind.LOST, 9])
def test_other_kinds_are_not_for_agents_to_say(kind):
    """An agent says values, errors and timeouts; what else becomes of a call is for the scheduler to say."""
    state = scheduler()
    state.got(CLIENT, TaskSubmit([(1, 1, 1, b"p")], [TIMED]))
    out = state.got(AGENT, AgentResult([(BASE + 1, 1, 0, 1, kind, b"")]))
    assert [i.error for i in out if isinstance(i, Drop)] == [True]


@pytest.mark.parametrize(
    "message",
    [
        TaskSubmit([(1, 2, 1, b"p")], [TIMED]),
        TaskSubmit([], [function(timeout_s=0.0)]),
        TaskSubmit([], [function(timeout_s=-1.0)]),
        TaskSubmit([], [function(timeout_s=float("nan"))]),
    ],
)
def test_bad_timeouts_break_the_protocol(message):
    """A run of several items has no timeout, and a timeout is a time."""
    out = scheduler().got(CLIENT, message)
    assert [i.error for i in out if isinstance(i, Drop)] == [True]


def test_all_attempts_are_told_of():
    """The last report names the attempts before it, but not without end."""
    state = scheduler()
    state.got(CLIENT, TaskSubmit([(1, 1, 1, b"p")], [function(retries=50)]))
    for attempt in range(1, 51):
        out = state.got(AGENT, TaskDied([(BASE + 1, attempt, DeathReport("killed", -attempt, "h", 7))]))
        assert out[0] == SchedulerSend(CLIENT, TaskRetried([(1, attempt)]))
    (out,) = state.got(AGENT, TaskDied([(BASE + 1, 51, DeathReport("killed", -51, "h", 7))]))
    report = priorities_report(out.message.results[0][4])
    assert report.attempt == 51
    assert report.earlier == [Death("killed", -no, "h", 7, attempt=no) for no in range(31, 51)]


def priorities_report(payload):
    import msgspec

    return msgspec.msgpack.decode(payload, type=DeathReport)


# Priorities


class Entry:
    """A queued call."""

    def __init__(self, task_id, priority=0):
        self.task_id = task_id
        self.state = "QUEUED"
        self.function = type("", (), {"function": function(priority=priority)})()


def test_higher_first_then_older():
    """The highest priority is first, and among equals the oldest."""
    queue = priorities.PriorityQueue(Entry(no, no % 3) for no in range(9))
    assert [queue.popleft().task_id for _ in range(9)] == [2, 5, 8, 1, 4, 7, 0, 3, 6]
    assert not queue


def test_put_back_is_next_of_its_equals():
    """What is put back at the front stands before its equals, not before those that are higher."""
    queue = priorities.PriorityQueue([Entry(1, 1), Entry(2, 1)])
    queue.appendleft(Entry(3, 1))
    queue.appendleft(Entry(4, 0))
    assert [queue.popleft().task_id for _ in range(4)] == [3, 1, 2, 4]


def test_what_is_gone_is_not_there():
    """Entries that are not queued any more are passed over."""
    entries = [Entry(1, 1), Entry(2, 1), Entry(3, 0)]
    queue = priorities.PriorityQueue(entries)
    entries[0].state = "GONE"
    assert queue and queue[0] is entries[1]
    entries[1].state = entries[2].state = "GONE"
    assert not queue
    queue.append(Entry(4))
    queue.clear()
    assert not queue and list(queue) == []


def test_nobody_is_overtaken_for_ever():
    """The oldest call is taken after so many others in a row, whatever comes meanwhile, and then the next oldest."""
    queue = priorities.PriorityQueue([Entry(1), Entry(2, 1)])
    taken = []
    for no in range(3, 300):
        queue.append(Entry(no, 5))
        taken.append(queue.popleft().task_id)
    most = priorities.OVERTAKES
    assert [taken.index(1), taken.index(2)] == [most, 2 * most + 1]


class CountedEntry(Entry):
    """Counts how often it is looked at."""

    looks = 0

    @property
    def state(self):
        CountedEntry.looks += 1
        return self.__dict__["state"]

    @state.setter
    def state(self, state):
        self.__dict__["state"] = state


def test_a_priority_for_each_call():
    """Many priorities make a queue no slower: for one call it looks at few others."""
    count, CountedEntry.looks = 2000, 0
    queue = priorities.PriorityQueue(CountedEntry(no, no * 7 % count) for no in range(count))
    taken = []
    while queue:
        assert 0 <= queue.rank <= priorities.MAX_RANK and queue[0] is not None
        taken.append(queue.popleft().task_id)
    assert sorted(taken) == list(range(count)) and CountedEntry.looks < 20 * count


@pytest.mark.parametrize("seed", range(20))
def test_as_if_all_were_looked_at(seed):
    """What is taken is what one finds who looks at every call, whatever has been put back or is gone."""
    random = Random(seed)
    queue, levels, seen, overtaken = priorities.PriorityQueue(), {}, set(), 0
    for no in range(1, 3000):
        priority = random.randrange(random.choice([3, 50]))
        entries = [entry for level in levels.values() for entry in level]
        if random.random() < 0.1 and entries:
            gone = random.choice(entries)
            gone.state = "GONE"
            levels[gone.function.function.options.priority].remove(gone)
        if random.random() < 0.55:
            seen.add(priority)
            levels.setdefault(priority, []).append(Entry(no, priority))
            queue.append(levels[priority][-1])
        levels = {priority: level for priority, level in levels.items() if level}
        assert bool(queue) == bool(levels)
        if levels and random.random() < 0.5:
            highest = levels[max(levels)]
            assert queue.rank == min(priorities.MAX_RANK, sum(priority < max(levels) for priority in seen))
            oldest = min(levels.values(), key=lambda level: level[0].task_id)
            level = oldest if overtaken >= priorities.OVERTAKES else highest
            overtaken = 0 if level is oldest else overtaken + 1
            entry = level.pop(0)
            assert queue[0] is entry and queue.popleft() is entry
            if random.random() < 0.2:
                level.insert(0, entry)
                queue.appendleft(entry)


def test_scheduler_gives_out_by_priority():
    """Of what waits at the scheduler the highest priority is given out first."""
    state = scheduler(capacity=0)
    low, high = function(1), function(2, priority=1)
    state.got(CLIENT, TaskSubmit([(1, 1, 1, b""), (2, 1, 1, b"")], [low]))
    state.got(CLIENT, TaskSubmit([(3, 1, 2, b""), (4, 1, 1, b""), (5, 1, 2, b"")], [high]))
    assert nos_run(state.got(AGENT, AgentCapacity(8, 2))) == [3, 5, 1, 2, 4]


def test_high_priority_does_not_wait_for_room():
    """What an agent holds of lower priority does not keep a higher one from it: the agent is to start that first."""
    state = scheduler(capacity=2, workers=1)
    low, high = function(1), function(2, priority=1)
    out = state.got(CLIENT, TaskSubmit([(no, 1, 1, b"") for no in range(1, 6)], [low]))
    assert nos_run(out) == [1, 2]
    assert nos_run(state.got(CLIENT, TaskSubmit([(6, 1, 2, b""), (7, 1, 2, b""), (8, 1, 2, b"")], [high]))) == [6]
    value = ResultKind.VALUE
    assert nos_run(state.got(AGENT, AgentResult([(BASE + 1, 1, 0, 1, value, b"")]))) == [7]


def test_agent_starts_by_priority():
    """Of what waits at an agent the highest priority is started first."""
    state = agent(function(1))
    state.seen()
    state.run((2, function(1)), (3, function(2, priority=1)))
    out = state.records((RECORD_VALUE, 1, 0, b"v"), (RECORD_BATCH_END, 1000, 1, b""))
    assert [row[4] for i in out if isinstance(i, Start) for row in i.message.calls] == [b"p3", b"p2"]


# Another scheduler


class Client(ClientState):
    """A client that checks itself after each step."""

    def on(self, event):
        out = self.handle(event, 0.0)
        self.check()
        return out

    def got(self, message):
        return self.on(Received(message))


RETRIED, PLAIN = function(1, retries=1), function(2)


def client(*tasks):
    """Return a welcome client that has sent tasks (no, items, function_id)."""
    state = Client(may_lose_scheduler=True)
    state.got(Welcome(1))
    rows = [(no, items, function_id, b"p%d" % no) for no, items, function_id in tasks]
    state.on(Batch(rows, [RETRIED, PLAIN]))
    return state


def again(rows, tasks):
    """Return what is said to another scheduler."""
    return [Send(TasksAgain(rows)), Send(TaskSubmit(tasks, [RETRIED], [1]))]


def test_calls_with_retries_go_to_the_next_scheduler():
    """A lost session costs what has no retries, and one retry of what has."""
    state = client((1, 1, 1), (2, 1, 2))
    assert state.got(SessionLost("gone")) == [Lost([2], "gone"), Finished([2]), Renewed("gone")]
    assert state.on(Stranded(Batch())) == []
    assert state.got(Welcome(2)) == again([(1, 0, [])], [(1, 1, 1, b"p1")])
    row = (1, 0, 1, ResultKind.VALUE, b"v")
    assert state.got(TaskResult([row])) == [Deliver([row]), Finished([1])]


def test_spent_retries_are_remembered():
    """What the lost scheduler has spent of a call's retries is not had again."""
    state = client((1, 1, 1))
    state.got(TaskRetried([(1, 1)]))
    assert state.got(SessionLost("gone"))[0] == Lost([1], "gone")


def test_run_goes_on_where_it_was():
    """Of a run those items are done again that have no answer."""
    state = client((1, 5, 1))
    state.got(TaskResult([(1, 1, 2, ResultKind.VALUE, b"vv")]))
    state.got(SessionLost("gone"))
    state.on(Stranded(Batch()))
    assert state.got(Welcome(2)) == again([(1, 0, [(1, 2)])], [(1, 5, 1, b"p1")])


def test_cancelled_calls_do_not_go_on():
    """A call that is being cancelled is not given to another scheduler."""
    state = client((1, 1, 1))
    state.on(Batch(cancels=[(1, FORCED)]))
    out = state.got(SessionLost("gone"))
    assert out == [Cancelled([(1, REST, 1, "UNCONFIRMED")]), Lost([], "gone"), Finished([1]), Renewed("gone")]


def test_cancel_between_two_schedulers():
    """A call that waits for another scheduler is cancelled at once; whether its code has stopped nobody can tell."""
    state = client((1, 1, 1))
    state.got(SessionLost("gone"))
    state.on(Stranded(Batch()))
    assert state.on(Batch(cancels=[(1, FORCED)])) == [Cancelled([(1, REST, 1, "UNCONFIRMED")]), Finished([1])]
    assert state.got(Welcome(2)) == []


def test_what_was_not_sent_yet():
    """What was submitted to the lost scheduler without being sent shares the fate of what was."""
    state = client((1, 1, 1))
    state.got(SessionLost("gone"))
    new = function(3, retries=2)
    rows = [(2, 1, 3, b"p2"), (3, 1, 2, b"p3"), (4, 1, 3, b"p4")]
    out = state.on(Stranded(Batch(rows, [new], [], [(4, SOFT)])))
    assert out == [Cancelled([(4, REST, 1, "CANCELED")]), Finished([4]), Lost([3], "gone")]
    out = state.got(Welcome(2))
    assert out[0] == Send(TasksAgain([(1, 0, []), (2, 0, [])]))
    assert out[1] == Send(TaskSubmit([(1, 1, 1, b"p1"), (2, 1, 3, b"p2")], [RETRIED, new], [1, 3]))


def test_leaving_waits_for_the_next_scheduler():
    """A client whose calls go on does not leave before they are over."""
    state = client((1, 1, 1))
    state.on(CloseAsked())
    assert not any(isinstance(i, Closed) for i in state.got(SessionLost("gone")))
    state.got(Welcome(2))
    out = state.got(TaskResult([(1, 0, 1, ResultKind.VALUE, b"v")]))
    assert out[-2:] == [Send(Bye()), Closed()]


def test_definitions_go_along():
    """What a function needs is sent with it to the next scheduler, also if it is forgotten meanwhile."""
    needed = Function(1, "x", b"", CallStyle.DEFINITION)
    needing = Function(2, "f", b"", options=Options(retries=1), needs=[1])
    state = Client(may_lose_scheduler=True)
    state.got(Welcome(1))
    state.on(Batch([(1, 1, 2, b"p")], [needed, needing]))
    state.on(Batch(forget=[2, 1]))
    state.got(SessionLost("gone"))
    assert state.got(Welcome(2))[1] == Send(TaskSubmit([(1, 1, 2, b"p")], [needed, needing], [1, 2]))


def test_no_call_is_kept_for_a_scheduler_that_has_no_successor():
    """An embedded cluster's calls are lost with it, whatever their retries."""
    state = Client()
    state.got(Welcome(1))
    state.on(Batch([(1, 1, 1, b"p1")], [RETRIED]))
    assert state.got(SessionLost("gone"))[0] == Lost([1], "gone")


def test_calls_of_another_scheduler_are_fenced():
    """They are made again when whoever had them must have stopped them, and that costs a retry."""
    state = scheduler()
    assert state.got(CLIENT, TasksAgain([(1, 0, [])])) == []
    assert nos_run(state.got(CLIENT, TaskSubmit([(1, 1, 1, b"p1"), (2, 1, 1, b"p2")], [RETRIED]))) == [2]
    assert state.tick(FENCE_S - 0.1) == []
    out = state.tick(0.1)
    assert out[0] == SchedulerSend(CLIENT, TaskRetried([(1, 1)]))
    assert nos_run(out) == [1]
    # What was said of it before counts as an attempt.
    (out,) = state.got(AGENT, TaskDied([(BASE + 1, 2, REPORT)]))
    report = priorities_report(out.message.results[0][4])
    assert (report.attempt, report.earlier) == (2, [Death("the scheduler that had it was lost", attempt=1)])


def test_calls_of_an_earlier_session():
    """A client that begins anew where it is still taken to be there has its calls stopped before they are made again;
    others keep theirs, whether they have a secret or not."""
    state = Scheduler()
    for peer, secret in ((CLIENT, b"secret"), (7, b""), (8, b"another")):
        state.got(peer, Hello("client", secret=secret))
    state.got(AGENT, Hello("agent", name="a"))
    state.got(AGENT, AgentCapacity(8, 4))
    for peer in (CLIENT, 7, 8):
        state.got(peer, TaskSubmit([(1, 1, 1, b"p1")], [RETRIED]))
    out = state.got(9, Hello("client", secret=b"secret"))
    assert Drop(CLIENT, "the client has begun another session") in out
    (cancels,) = [i.message.cancels for i in out if isinstance(i, SchedulerSend) and isinstance(i.message, TaskCancel)]
    assert [(task_id, kind) for task_id, _, kind in cancels] == [(BASE + 1, FORCED)]
    assert SchedulerSend(9, Welcome(4, workers=4)) in out
    state.got(9, TasksAgain([(1, 0, [])]))
    state.got(9, TaskSubmit([(1, 1, 1, b"p1")], [RETRIED]))
    assert not any(isinstance(i, Drop) for i in state.got(10, Hello("client")))
    assert state.outstanding == 4


def test_calls_of_another_scheduler_without_retries_left():
    """What has no retries left has been made for the last time."""
    state = scheduler()
    state.got(CLIENT, TasksAgain([(1, 1, [])]))
    state.got(CLIENT, TaskSubmit([(1, 1, 1, b"p1")], [RETRIED]))
    (out,) = state.tick(FENCE_S)
    assert out.message.results[0][3] == ResultKind.DIED
    assert state.outstanding == 0


def test_done_items_are_not_done_again():
    """Of a run the items between those that are done are made again, each range as a task of its own."""
    state = scheduler()
    state.got(CLIENT, TasksAgain([(1, 0, [(4, 1), (0, 2)])]))
    state.got(CLIENT, TaskSubmit([(1, 6, 1, b"p1")], [RETRIED]))
    out = state.tick(FENCE_S)
    (run,) = [i.message for i in out if isinstance(i.message, TaskRun)]
    assert sorted((row[0] - BASE, *row[1:5]) for row in run.tasks) == [(3, 2, 1, 2, 2), (6, 2, 1, 1, 5)]
    out = state.got(AGENT, AgentResult([(BASE + 3, 2, 0, 2, ResultKind.VALUE, b"vv")]))
    assert out == [SchedulerSend(CLIENT, TaskResult([(1, 2, 2, ResultKind.VALUE, b"vv")]))]
    state.got(AGENT, AgentResult([(BASE + 6, 2, 0, 1, ResultKind.VALUE, b"v")]))
    assert state.outstanding == 0 and state._peers[CLIENT].held_bytes == 0


def test_cancel_of_a_fenced_call_of_another_scheduler():
    """It is answered when its fence is over, unproven, and it is not made again."""
    state = scheduler()
    state.got(CLIENT, TasksAgain([(1, 0, [])]))
    state.got(CLIENT, TaskSubmit([(1, 1, 1, b"p1")], [RETRIED]))
    state.got(CLIENT, TaskCancel([(1, 1, FORCED)]))
    assert state.tick(FENCE_S) == [SchedulerSend(CLIENT, TaskCancelConfirm([(1, 1, CANCELED, 0, 1, False)]))]


@pytest.mark.parametrize(
    "row",
    [
        (1, -1, []),
        (1, 0, [(0, 6)]),
        (1, 0, [(0, 2), (1, 1)]),
        (1, 0, [(5, 2)]),
        (1, 0, [(2, -1)]),
    ],
)
def test_nonsense_about_done_items(row):
    """What cannot have been done breaks the protocol."""
    state = scheduler()
    state.got(CLIENT, TasksAgain([row]))
    out = state.got(CLIENT, TaskSubmit([(1, 6, 1, b"p1")], [RETRIED]))
    assert [i.error for i in out if isinstance(i, Drop)] == [True]
