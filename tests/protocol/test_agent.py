"""The agent's table, row by row, and the races between a worker's pipe, its forker and the scheduler."""

import pytest

from scaler_executor.protocol.agent import (
    FENCE_S,
    AgentState,
    Disinherited,
    Drain,
    Drained,
    Exited,
    Fork,
    Forked,
    ForkFailed,
    Freeze,
    Frozen,
    Interrupt,
    Kill,
    Look,
    NewEpoch,
    Received,
    Records,
    Retire,
    SchedulerBack,
    SchedulerLost,
    Seen,
    Send,
    Start,
    Tick,
)
from scaler_executor.protocol.agent_calls import GONE_GRACE_S, MAX_GRACE_S
from scaler_executor.protocol.agent_dispatch import LOOK_S, RECALL_S
from scaler_executor.protocol.agent_hiring import (
    FORK_RETRY_S,
    GONE_EXIT_S,
    MAX_FORK_FAILURES,
    MAX_LATER_START_FAILURES,
)
from scaler_executor.protocol.codec import LocalProtocolError, RemoteProtocolError
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    AgentCapacity,
    AgentConfirm,
    AgentResult,
    Bye,
    CallStyle,
    CancelKind,
    ClientGone,
    DeathReport,
    Function,
    InheritanceLost,
    InheritanceReplaced,
    Options,
    ResultKind,
    TaskCancel,
    TaskCancelConfirmType,
    TaskDied,
    TaskReturned,
    TaskRun,
    TaskRunning,
    TaskSplit,
    Welcome,
    WorkerRun,
    WorkersBroken,
)
from scaler_executor.protocol.page import (
    RECORD_BATCH_END,
    RECORD_READY,
    RECORD_SKIPPED,
    RECORD_START_FAILED,
    RECORD_UNWOUND,
    RECORD_VALUE,
)

BASE = 1 << CLIENT_ID_SHIFT
RECALL, SOFT, FORCED = CancelKind.RECALL, CancelKind.SOFT, CancelKind.FORCED
CANCELED = TaskCancelConfirmType.CANCELED
NOT_FOUND = TaskCancelConfirmType.CANCEL_NOT_FOUND
FAILED = TaskCancelConfirmType.CANCEL_FAILED
VALUE = ResultKind.VALUE
REPORT = DeathReport("killed", -9)
READY = (RECORD_READY, 0, 0, b"")
FUNCTION = Function(1, "f", b"blob")


class Agent(AgentState):
    """An agent that checks itself after each step and tells its time. It keeps looks and capacities to itself."""

    now = 0.0

    def on(self, event):
        out = self.handle(event, self.now)
        self.check()
        return [
            i for i in out if not isinstance(i, Look) and not (type(i) is Send and type(i.message) is AgentCapacity)
        ]

    def got(self, message):
        return self.on(Received(message))

    def tick(self, after):
        self.now += after
        return self.on(Tick())

    def run(self, *tasks, function=FUNCTION):
        """Tasks come: (number, items)."""
        rows = [(BASE + no, 1, 1, items, 0, function.function_id, b"p%d" % no) for no, items in tasks]
        known = (1, function.function_id) in self._functions
        return self.got(TaskRun(rows, [] if known else [(1, function)]))

    def cancel(self, no, cancel_no, kind=FORCED):
        return self.got(TaskCancel([(BASE + no, cancel_no, kind)]))

    def records(self, *records, worker=1):
        return self.on(Records(worker, list(records)))

    def start_worker(self, worker=1):
        assert self.on(Forked(worker, 1000 + worker)) == []
        return self.records(READY, worker=worker)


def start(*calls, worker=1, functions=(FUNCTION,)):
    """Calls: (seq, items, skip, number)."""
    rows = [(seq, items, skip, 1, b"p%d" % no) for seq, items, skip, no in calls]
    return Start(worker, WorkerRun(rows, list(functions)))


def value(seq, item=0, payload=b"v"):
    return (RECORD_VALUE, seq, item, payload)


def batch_end(seconds=1e-6, items=1):
    return (RECORD_BATCH_END, int(seconds * 1e9), items, b"")


def result(no, first=0, count=1, payload=b"v", kind=VALUE):
    return Send(AgentResult([(BASE + no, 1, first, count, kind, payload)]))


def confirm(no, cancel_no, kind=CANCELED, at=0):
    return Send(AgentConfirm([(BASE + no, 1, cancel_no, kind, at)]))


def died(no, report=REPORT):
    return Send(TaskDied([(BASE + no, 1, report)]))


def returned(*nos):
    return Send(TaskReturned([(BASE + no, 1) for no in nos]))


def split(no, at):
    return Send(TaskSplit([(BASE + no, 1, at)]))


def exited(current=0, done=0, item=0, worker=1):
    return Exited(worker, current, done, item, REPORT)


def agent(max_workers=1, **settings):
    return Agent(max_workers, **settings)


def held(items=1, **settings):
    """Return an agent with one worker that holds task 1 as its call 1, of so many items."""
    state = agent(**settings)
    state.run((0, 1))
    state.start_worker()
    # A first call tells the agent that calls of this function are short, so that it gives a run whole.
    assert state.records(value(1), batch_end()) == [result(0)]
    state.run((1, items))
    assert [call.state for call in state._calls.by_id.values()] == ["HELD"]
    return state


def two_held(**settings):
    """Return an agent whose worker holds tasks 1 and 2 as its calls 2 and 3."""
    state = held(**settings)
    assert state.run((2, 1)) == [start((3, 1, 0, 2), functions=())]
    return state


def running(items=1, **settings):
    """As `held`, and the call has been seen running: call 2."""
    state = held(items, **settings)
    assert state.on(Seen(1, 2, 1)) == [Send(TaskRunning([BASE + 1]))]
    return state


# Workers come and go


def test_from_task_to_result():
    """A worker is forked on demand, given the call when it is ready, and its result is sent on."""
    state = agent()
    assert state.run((1, 1)) == [Fork(1)]
    assert state.on(Forked(1, 1001)) == []
    assert state.records(READY) == [start((1, 1, 0, 1))]
    assert state.records(value(1), batch_end()) == [result(1)]
    assert state.run((2, 1)) == [start((2, 1, 0, 2), functions=())]
    assert state.outstanding == 1


def test_workers_on_demand():
    """No more workers are forked than there are calls, nor than allowed."""
    state = agent(max_workers=3)
    assert state.run((1, 1), (2, 1)) == [Fork(1), Fork(2)]
    assert state.run((3, 1), (4, 1)) == [Fork(3)]


def test_capacity():
    """An agent offers room at once, and more when its calls turn out to be short."""
    state = AgentState(2)
    assert state.handle(Received(Welcome(0)), 0.0) == [Send(AgentCapacity(4, 2))]


def test_worker_is_replaced_after_its_items():
    """A worker is given no more items than it may have in its life."""
    state = agent(max_items_per_worker=1)
    state.run((1, 1), (2, 1))
    assert state.start_worker() == [start((1, 1, 0, 1))]
    assert state.records(value(1), batch_end()) == [Retire(1), result(1), Fork(2)]
    assert state.on(exited(1, 1)) == []


def test_worker_serves_one_client():
    """A worker of another client is replaced, not given the call."""
    state = agent()
    state.run((1, 1))
    state.start_worker()
    state.records(value(1), batch_end())
    assert state.got(TaskRun([(2 * BASE + 1, 1, 2, 1, 0, 0, b"")])) == [Retire(1), Fork(2)]


def test_workers_die_before_they_are_ready():
    """After three in a row the client's calls are handed back with the reason, and no worker is forked any more."""
    state = agent()
    assert state.run((1, 1)) == [Fork(1)]
    for worker in (1, 2):
        assert state.on(exited(worker=worker)) == [Fork(worker + 1)]
    news, back = state.on(exited(worker=3))
    assert news.message.__class__ is WorkersBroken and "killed" in news.message.reason
    assert back == returned(1)
    assert state.run((2, 1)) == [returned(2)]


def test_workers_die_before_they_are_ready_later():
    """A client that has had calls done loses more workers before it is given up: what kills those may pass."""
    state = held()
    assert state.on(exited(1, 1)) == [Fork(2)]
    for worker in range(2, MAX_LATER_START_FAILURES + 1):
        assert state.on(exited(worker=worker)) == [Fork(worker + 1)]
    state.start_worker(MAX_LATER_START_FAILURES + 1)
    assert state.on(exited(worker=MAX_LATER_START_FAILURES + 1)) == [Fork(MAX_LATER_START_FAILURES + 2)]
    for worker in range(MAX_LATER_START_FAILURES + 2, 2 * MAX_LATER_START_FAILURES + 1):
        assert state.on(exited(worker=worker)) == [Fork(worker + 1)]
    news, back = state.on(exited(worker=2 * MAX_LATER_START_FAILURES + 1))
    assert news.message.__class__ is WorkersBroken
    assert back == returned(1)


def test_workers_die_in_calls_now_and_then():
    """Deaths before the first call count only in a row: a worker that dies in a call has come to one."""
    state = agent()
    state.run(*((number, 1) for number in range(1, 7)))
    for worker in (1, 3, 5):
        state.start_worker(worker)
        assert state.on(exited(worker=worker)) == [Fork(worker + 1)]
        state.start_worker(worker + 1)
        assert state.on(exited(1, worker=worker + 1))[-1] == Fork(worker + 2)


def test_fork_fails():
    """A fork that fails is tried again after a pause, and given up after many while there is no worker at all."""
    state = agent()
    state.run((1, 1))
    for number in range(1, MAX_FORK_FAILURES):
        assert state.on(ForkFailed(number, "no memory")) == []
        assert state.tick(FORK_RETRY_S) == [Fork(number + 1)]
    news, back = state.on(ForkFailed(MAX_FORK_FAILURES, "no memory"))
    assert back == returned(1)
    assert news.message.__class__ is WorkersBroken and "no memory" in news.message.reason


def test_forks_fail_beside_a_worker():
    """What a machine lacks for a moment breaks no client that has a worker."""
    state = running(max_workers=2)
    state.run((2, 1), (3, 1))
    for number in range(2, 2 * MAX_FORK_FAILURES):
        assert state.on(ForkFailed(number, "no memory")) == []
        assert state.tick(FORK_RETRY_S)[-1] == Fork(number + 1)


def test_forker_lost_while_workers_start():
    """The loss of the forker is no failure to start a worker, however many were on their way."""
    state = agent(max_workers=8)
    state.run(*[(number, 1) for number in range(1, 9)])
    for number in range(1, 5):
        state.on(Forked(number, 1000 + number))
        out = state.on(Exited(number, 0, 0, 0, REPORT, forker_lost=True))
        assert out == [Fork(8 + number)]
    for number in range(5, 9):
        assert state.on(ForkFailed(number, "the forker was lost", forker_lost=True)) == [Fork(8 + number)]


ASKED = Send(InheritanceLost(1, "lost"))
DEFINITION = Function(0, "g", b"blob", CallStyle.DEFINITION, version=1)


def test_inheritance_lost():
    """No worker is ordered before the client has said what replaces it, and each is sent that with its first call."""
    state = running()
    assert state.run((2, 1)) == []
    assert state.on(Disinherited("lost")) == [ASKED]
    out = state.on(Exited(1, 2, 1, 0, REPORT, forker_lost=True))
    assert out == [Send(TaskDied([(BASE + 1, 1, REPORT)]))]
    assert state.run((3, 1)) == []  # asked once
    assert state.got(InheritanceReplaced(1, [DEFINITION])) == [Fork(2)]
    out = state.start_worker(2)
    assert out == [start((1, 1, 0, 2), (2, 1, 0, 3), worker=2, functions=[DEFINITION, FUNCTION])]
    state.records(value(1), value(2), batch_end(items=2), worker=2)
    assert state.run((4, 1)) == [start((3, 1, 0, 4), worker=2, functions=[])]
    # And so is each that comes later.
    assert state.on(Exited(2, 3, 2, 0, REPORT)) == [Send(TaskDied([(BASE + 4, 1, REPORT)])), Fork(3)]
    state.run((5, 1))
    assert state.start_worker(3) == [start((1, 1, 0, 5), worker=3, functions=[DEFINITION, FUNCTION])]


def test_inheritance_lost_while_idle():
    """The client is asked when there is work."""
    state = agent()
    assert state.on(Disinherited("lost")) == []
    assert state.run((1, 1)) == [ASKED]


def test_inheritance_lost_while_workers_are_ordered():
    """Those that the old forker was to fork are not ordered from the new one before the answer."""
    state = agent()
    assert state.run((1, 1)) == [Fork(1)]
    assert state.on(Disinherited("lost")) == [ASKED]
    assert state.on(ForkFailed(1, "lost", forker_lost=True)) == []
    assert state.got(InheritanceReplaced(1, [])) == [Fork(2)]


@pytest.mark.parametrize("is_answered", [False, True])
def test_another_forker_lost(is_answered):
    """The client is asked once, however many forkers are lost before and behind its answer."""
    state = agent()
    state.on(Disinherited("lost"))
    state.run((1, 1))
    if is_answered:
        assert state.got(InheritanceReplaced(1, [DEFINITION])) == [Fork(1)]
        assert state.on(Disinherited("again")) == []
        assert state.on(ForkFailed(1, "lost", forker_lost=True)) == [Fork(2)]
    else:
        assert state.on(Disinherited("again")) == []
        assert state.got(InheritanceReplaced(1, [DEFINITION])) == [Fork(1)]


def test_inheritance_lost_and_the_client_is_gone():
    """Nobody is asked or waited for any more, and the agent can end."""
    state = agent()
    state.on(Disinherited("lost"))
    assert state.run((1, 1)) == [ASKED]
    assert state.got(ClientGone(1)) == []
    state.cancel(1, 1)
    assert state.on(Drain())[-1] == Drained()


def test_inheritance_lost_and_another_client():
    """One client's answer says nothing of another one."""
    state = agent()
    state.on(Disinherited("lost"))
    state.run((1, 1))
    with pytest.raises(RemoteProtocolError):
        state.got(InheritanceReplaced(2, []))
    assert state.got(InheritanceReplaced(1, [])) == [Fork(1)]
    with pytest.raises(RemoteProtocolError):
        state.got(InheritanceReplaced(1, []))


def test_idle_worker_dies():
    """It is not replaced before there is work: what ends workers soon after their start would go on for ever."""
    state = running()
    assert state.records(value(2), batch_end()) == [result(1)]
    assert state.on(exited(2, 2)) == []
    assert state.run((2, 1)) == [Fork(2)]


def test_endless_grace():
    """However long a client gives its calls to unwind, the next deadline is one that can be waited for."""
    state = running(cancel_grace_s=float("inf"))
    state.tick(LOOK_S)
    state.cancel(1, 7)
    assert state._calls.by_id[BASE + 1].grace_due == state.now + MAX_GRACE_S


def test_client_is_gone_while_its_call_is_stopped():
    """Nobody is left to whom a long grace time was promised."""
    state = running(cancel_grace_s=60)
    state.cancel(1, 7)
    state.got(ClientGone(1))
    assert state.tick(GONE_GRACE_S) == [Freeze(1, 2, [2], 0)]


def test_start_failures_are_counted_for_each_client():
    """One client's broken initializer does not make the first accident of another's worker final."""
    state = agent()
    state.run((1, 1))
    state.on(Forked(1, 1001))
    assert state.records((RECORD_START_FAILED, 0, 0, b"boom"))[0] == Send(WorkersBroken(1, "boom"))
    state.on(exited())
    assert state.got(TaskRun([(2 * BASE + 1, 1, 2, 1, 0, 0, b"")])) == [Fork(2)]
    assert state.on(exited(worker=2)) == [Fork(3)]


def test_initializer_fails():
    """An initializer that raises breaks its client at once, with its traceback."""
    state = agent()
    state.run((1, 1))
    state.on(Forked(1, 1001))
    out = state.records((RECORD_START_FAILED, 0, 0, b"boom"))
    assert out == [Send(WorkersBroken(1, "boom")), returned(1)]


# QUEUED


@pytest.mark.parametrize("kind", list(CancelKind))
def test_cancel_queued(kind):
    """What waits for a worker is dropped and confirmed at once."""
    state = agent()
    state.run((1, 1))
    assert state.cancel(1, 7, kind) == [confirm(1, 7)]
    assert state.start_worker() == []


def test_cancel_unknown():
    """A cancel that crosses the result is answered NotFound, of no attempt."""
    state = agent()
    assert state.cancel(1, 7) == [Send(AgentConfirm([(BASE + 1, 0, 7, NOT_FOUND, 0)]))]


# HELD


@pytest.mark.parametrize("kind", [RECALL, SOFT])
def test_soft_cancel_held(kind):
    """Whether a call in a worker's hands has started is told by a freeze; if not, it is taken back."""
    state = two_held()
    assert state.cancel(2, 7, kind) == [Freeze(1, 0, [3], 0)]
    assert state.on(Frozen(1, 2, 1, 0)) == [confirm(2, 7)]
    assert state.records(value(2), (RECORD_SKIPPED, 3, 0, b""), batch_end(), batch_end()) == [result(1)]


def test_soft_cancel_held_and_started():
    """A soft cancel of a call that a freeze finds running fails."""
    state = held()
    assert state.cancel(1, 7, SOFT) == [Freeze(1, 0, [2], 0)]
    assert state.on(Frozen(1, 2, 1, 0)) == [confirm(1, 7, FAILED)]
    assert state.records(value(2), batch_end()) == [result(1)]


def test_soft_cancel_held_and_over():
    """A call that a freeze finds over answers with its result."""
    state = held()
    state.cancel(1, 7, SOFT)
    assert state.on(Frozen(1, 2, 2, 0)) == []
    assert state.records(value(2), batch_end()) == [result(1)]


def test_forced_cancel_held_first():
    """The first call in a worker's hands is interrupted without asking; the replacement is ordered at once."""
    state = held()
    assert state.cancel(1, 7) == [Interrupt(1, 2), Fork(2)]
    assert state.records((RECORD_SKIPPED, 2, 0, b"")) == [confirm(1, 7), Retire(1)][::-1]


def test_forced_cancel_held_behind():
    """A call behind another one is taken back by a freeze: an interrupt would hit the other."""
    state = two_held()
    assert state.cancel(2, 7) == [Freeze(1, 0, [3], 0)]
    assert state.on(Frozen(1, 2, 1, 0)) == [confirm(2, 7)]


def test_forced_cancel_held_behind_but_started():
    """If it has started meanwhile it is stopped as a running call is."""
    state = two_held()
    state.cancel(2, 7)
    assert state.on(Frozen(1, 3, 2, 0)) == [Interrupt(1, 3), Fork(2)]


def test_worker_dies():
    """The call in progress is to blame; those behind it are queued again, free, in their order."""
    state = two_held()
    state.run((3, 1))
    out = state.on(exited(2, 1))
    assert out == [died(1), Fork(2)]
    assert state.start_worker(2) == [start((1, 1, 0, 2), (2, 1, 0, 3), worker=2)]


def test_worker_dies_between_two_calls():
    """Nobody is to blame if no call was in progress."""
    state = two_held()
    assert state.records(value(2)) == [result(1)]
    assert state.on(exited(2, 2)) == [Fork(2)]
    assert state.start_worker(2) == [start((1, 1, 0, 2), worker=2)]


def test_worker_dies_after_writing_a_result():
    """A result that is in the pipe counts, though the page does not say Done yet."""
    state = two_held()
    assert state.records(value(2)) == [result(1)]
    assert state.on(exited(2, 1)) == [Fork(2)]
    assert state.outstanding == 1


def test_call_claims_to_be_over_without_a_result():
    """A call that the page calls over and that has no result may have started: it is not run again."""
    state = held()
    assert state.on(exited(2, 2)) == [died(1), Fork(2)]


# RUNNING


def test_soft_cancel_running():
    """Running code is left alone by a soft cancel."""
    state = running()
    assert state.cancel(1, 7, SOFT) == [confirm(1, 7, FAILED)]


def test_forced_cancel_running():
    """A running call is interrupted and unwinds; it is confirmed when its worker and all that it started are gone."""
    state = running()
    assert state.cancel(1, 7) == [Interrupt(1, 2), Fork(2)]
    assert state.records((RECORD_UNWOUND, 2, 0, b"")) == []
    assert state.on(exited(2, 2)) == [confirm(1, 7)]


def test_unwound_worker_that_does_not_exit():
    """A worker whose finalizers hang after its call has unwound is killed when the grace time is over."""
    state = running(cancel_grace_s=0.5)
    state.cancel(1, 7)
    assert state.records((RECORD_UNWOUND, 2, 0, b"")) == []
    assert state.tick(0.5) == [Kill(1)]
    assert state.on(exited(2, 2)) == [confirm(1, 7)]


def test_unwound_before_it_is_done():
    """The worker may be killed before its page says that the call is over: it is confirmed all the same."""
    state = running()
    state.cancel(1, 7)
    state.records((RECORD_UNWOUND, 2, 0, b""))
    assert state.on(exited(2, 1)) == [confirm(1, 7)]


@pytest.mark.parametrize(
    "frozen",
    [Frozen(1, 2, 1, 0), Frozen(1, 2, 2, 0), Frozen(1, 2, 1, 0, killed=True)],
    ids=["running", "over", "killed"],
)
def test_unwound_while_it_is_frozen(frozen):
    """The grace time is over, so it is killed, and the answer of a freeze that was under way changes nothing."""
    state = running(cancel_grace_s=0.5)
    state.cancel(1, 7)
    assert state.tick(0.5) == [Freeze(1, 2, [2], 0)]
    assert state.records((RECORD_UNWOUND, 2, 0, b"")) == [Kill(1)]
    assert state.on(frozen) == []
    assert state.on(exited(2, 2)) == [confirm(1, 7)]


def test_unwound_and_something_survives():
    """What an unwound call left and does not even die of SIGKILL is not waited for."""
    state = running()
    state.cancel(1, 7)
    state.records((RECORD_UNWOUND, 2, 0, b""))
    assert state.on(Frozen(1, 2, 2, 0, killed=True, stuck=True)) == [Retire(1), confirm(1, 7)]
    assert state.on(exited(2, 2)) == []


def test_result_crosses_the_interrupt():
    """A call that is over before the interrupt, or swallows it, answers with its result."""
    state = running()
    state.cancel(1, 7)
    assert state.records(value(2)) == [Retire(1), result(1)]
    assert state.next_deadline() != 1.0 or not state._calls.stopping


def test_grace():
    """After the grace time: freeze, look, kill; the confirm waits until the process is gone."""
    state = running(cancel_grace_s=0.5)
    state.cancel(1, 7)
    assert state.tick(0.4) == []
    assert state.tick(0.1) == [Freeze(1, 2, [2], 0)]
    assert state.on(Frozen(1, 2, 1, 0, killed=True)) == []
    assert state.on(exited(2, 1)) == [confirm(1, 7)]


def test_no_grace():
    """Without a grace time the call is frozen and killed at once."""
    state = running(cancel_grace_s=0)
    assert state.cancel(1, 7) == [Freeze(1, 2, [2], 0), Fork(2)]


def test_grace_of_the_function():
    """A function's own grace time goes before the agent's."""
    state = agent()
    function = Function(1, "f", b"blob", options=Options(cancel_grace_s=0.0))
    state.run((1, 1), function=function)
    state.start_worker()
    assert state.cancel(1, 7) == [Freeze(1, 1, [1], 0), Fork(2)]


def test_stopping_call_ends_before_the_freeze():
    """A call that is over when its worker stands still is not killed: its result answers."""
    state = running(cancel_grace_s=0)
    state.cancel(1, 7)
    assert state.on(Frozen(1, 2, 2, 0)) == []
    assert state.records(value(2)) == [Retire(1), result(1)]


def test_unwound_overtaken_by_the_freeze():
    """A call that unwound before the freeze found it over is stopped by its record, as any that unwinds."""
    state = running(cancel_grace_s=0.5)
    state.cancel(1, 7)
    state.tick(0.5)
    assert state.on(Frozen(1, 2, 2, 0)) == []
    assert state.records((RECORD_UNWOUND, 2, 0, b"")) == [Kill(1)]
    assert state.on(exited(2, 2)) == [confirm(1, 7)]


def test_result_in_the_pipe_of_a_killed_worker():
    """The result that a killed worker had written is the answer, not Canceled."""
    state = running(cancel_grace_s=0)
    state.cancel(1, 7)
    state.on(Frozen(1, 2, 1, 0, killed=True))
    assert state.records(value(2))[-1] == result(1)
    assert state.on(exited(2, 1)) == []


def test_worker_dies_while_it_is_stopped():
    """A death while stopping is what was wanted."""
    state = running()
    state.cancel(1, 7)
    assert state.on(exited(2, 1)) == [confirm(1, 7)]


def test_interrupted_worker_frees_what_it_holds():
    """What stands behind an unwound call is queued again and was never started."""
    state = two_held()
    state.on(Seen(1, 2, 1))
    assert state.cancel(1, 7) == [Interrupt(1, 2), Fork(2)]
    assert state.records((RECORD_UNWOUND, 2, 0, b"")) == []
    assert state.start_worker(2) == [start((1, 1, 0, 2), worker=2)]


def test_repeated_cancels():
    """The newest request is the one that is answered."""
    state = running()
    state.cancel(1, 7)
    assert state.cancel(1, 8) == []
    assert state.records((RECORD_UNWOUND, 2, 0, b"")) == []
    assert state.on(exited(2, 2)) == [confirm(1, 8)]


def test_forced_over_the_agents_own_recall():
    """A user's cancel over a recall of the agent's own waits for the freeze and then goes on."""
    state = two_held()
    state.cancel(2, 7, RECALL)
    assert state.cancel(2, 8, FORCED) == []
    assert state.on(Frozen(1, 3, 2, 0)) == [Interrupt(1, 3), Fork(2)]


# Stuck


def test_worker_does_not_stand_still():
    """A worker that cannot be frozen makes the cancel fail."""
    state = running(cancel_grace_s=0)
    state.cancel(1, 7)
    assert state.on(Frozen(1, 2, 1, 0, stuck=True)) == [confirm(1, 7, FAILED)]
    assert state.records(value(2)) == [Retire(1), result(1)]


def test_worker_survives_sigkill():
    """A process that does not die in time makes the cancel fail; its death later costs the call."""
    state = running(cancel_grace_s=0)
    state.cancel(1, 7)
    state.on(Frozen(1, 2, 1, 0, killed=True))
    assert state.on(Frozen(1, 2, 1, 0, killed=True, stuck=True)) == [confirm(1, 7, FAILED)]
    assert state.cancel(1, 8) == [confirm(1, 8, FAILED)]
    assert state.on(exited(2, 1)) == [died(1)]


def test_killed_worker_is_not_frozen():
    """A cancel of what a killed worker still holds waits for its exit: a freeze would not be answered."""
    state = two_held(cancel_grace_s=0)
    state.on(Seen(1, 2, 1))
    state.cancel(1, 7)
    state.on(Frozen(1, 2, 1, 0, killed=True))
    assert state.cancel(2, 8) == []
    (answers,) = state.on(exited(2, 1))
    assert sorted(row[2] for row in answers.message.confirms) == [7, 8]


def test_unwound_after_its_cancel_was_refused():
    """A call that unwinds after all is not run again (found by simulation)."""
    state = running(cancel_grace_s=0.5)
    state.cancel(1, 7)
    state.tick(0.5)
    assert state.on(Frozen(1, 2, 1, 0, stuck=True)) == [confirm(1, 7, FAILED)]
    out = state.records((RECORD_UNWOUND, 2, 0, b""))
    assert out[-1].message.__class__ is TaskDied
    assert state.on(exited(2, 2)) == [] and state.outstanding == 0


# Recalls of the agent's own


def test_calls_behind_a_long_one_are_taken_back():
    """A call that turns out to be long gives up those behind it as soon as another worker can have them."""
    state = agent(max_workers=2)
    state.run((0, 1))
    state.start_worker()
    state.records(value(1), batch_end())
    state.run((1, 1))
    assert state.run((2, 1)) == [start((3, 1, 0, 2), functions=())]
    state.on(Seen(1, 2, 1))
    assert state.tick(LOOK_S) == []
    out = state.tick(RECALL_S)
    assert out == [Freeze(1, 0, [3], 0)]
    assert state.on(Frozen(1, 2, 1, 0)) == [Fork(2)]
    assert state.start_worker(2) == [start((1, 1, 0, 2), worker=2)]


def test_skipped_overtakes_the_freezes_report():
    """The report of a freeze is not taken for a later stay in the same worker's hands (found by simulation)."""
    state = two_held(max_workers=2)
    state.on(Seen(1, 2, 1))
    assert state.tick(RECALL_S) == [Freeze(1, 0, [3], 0)]
    out = state.records(value(2), batch_end(), (RECORD_SKIPPED, 3, 0, b""), batch_end(items=0))
    assert out == [start((4, 1, 0, 2), functions=()), result(1)]
    assert state.on(Frozen(1, 2, 1, 0)) == []
    assert state.records(value(4)) == [result(2)]


def test_fork_failure_does_not_stop_a_recall_for_ever():
    """Looks go on as long as a call waits behind another one."""
    state = two_held()
    for _ in range(3):
        state.tick(LOOK_S)
        assert state.next_deadline() == pytest.approx(state.now + LOOK_S)


def test_results_overtake_the_freezes_report():
    """A worker may be through with the calls behind a run that a freeze cut short before the report of that freeze is
    here (found by simulation: it was killed for it)."""
    state = held(items=2)
    state.run((3, 1))
    assert state.cancel(1, 7, SOFT) == [Freeze(1, 0, [2], 2)]
    assert state.records(value(2, 0), batch_end(), value(3)) == [
        Send(AgentResult([(BASE + 1, 1, 0, 1, VALUE, b"v"), (BASE + 3, 1, 0, 1, VALUE, b"v")]))
    ]
    assert state.on(Frozen(1, 2, 1, 0)) == [confirm(1, 7, at=1)]
    assert state.records(batch_end()) == [] and state.outstanding == 0


# Runs


def test_run_results_are_joined():
    """Values of consecutive items that come together go on as one range; an exception stands alone."""
    state = held(items=5)
    out = state.records(value(2, 0, b"a"), value(2, 1, b"b"), (1, 2, 2, b"e"), value(2, 3, b"c"))
    rows = [(BASE + 1, 1, 0, 2, 0, b"ab"), (BASE + 1, 1, 2, 1, 1, b"e"), (BASE + 1, 1, 3, 1, 0, b"c")]
    assert out == [Send(AgentResult(rows))]
    assert state.records(value(2, 4)) == [result(1, 4)]


def test_run_is_shared_out():
    """A run is split so that each worker has a share; the scheduler hears of the split first."""
    state = agent(max_workers=2)
    assert state.run((1, 4)) == [Fork(1), Fork(2)]
    assert state.start_worker() == [start((1, 1, 0, 1)), split(1, 1)]


def test_run_dies():
    """Of a run the item in progress is to blame; the items behind it are a task of their own and queued again."""
    state = held(items=4)
    assert state.records(value(2, 0)) == [result(1)]
    assert state.on(exited(2, 1, item=1)) == [split(1, 2), died(1), Fork(2)]
    assert state.start_worker(2)[0].message.calls[0][:3] == (1, 2, 2)


def test_run_dies_between_two_items():
    """A worker that died between two items is nobody's fault: the rest runs again."""
    state = held(items=4)
    state.records(value(2, 0))
    assert state.on(exited(2, 1, item=0)) == [split(1, 1), Fork(2)]
    assert state.start_worker(2)[0].message.calls[0][:3] == (1, 3, 1)


def test_run_dies_under_a_recall_of_the_scheduler():
    """The tail is given back under the recall's number, and then the item in progress dies: no split is announced."""
    state = held(items=4)
    state.cancel(1, 7, RECALL)
    assert state.on(exited(2, 1, item=0)) == [confirm(1, 7, at=1), died(1), Fork(2)]
    assert state.outstanding == 0


def test_run_dies_under_a_forced_cancel():
    """All of it is confirmed, nothing is blamed."""
    state = held(items=4)
    state.cancel(1, 7)
    assert state.on(exited(2, 1, item=0)) == [confirm(1, 7)]


def test_soft_cancel_of_a_run():
    """A soft cancel of a run takes back the items that it has not come to."""
    state = running(items=4)
    assert state.cancel(1, 7, SOFT) == [Freeze(1, 0, [2], 2)]
    assert state.on(Frozen(1, 2, 1, 1)) == [confirm(1, 7, at=2)]
    assert state.records(value(2, 0), value(2, 1), batch_end()) == [result(1, 0, 2, b"vv")]


def test_soft_cancel_of_a_run_between_two_items():
    """If no item is in progress all that are left are taken back."""
    state = running(items=4)
    state.cancel(1, 7, SOFT)
    state.records(value(2, 0), value(2, 1))
    assert state.on(Frozen(1, 2, 1, 1)) == [confirm(1, 7, at=2)]
    assert state.outstanding == 0


def test_soft_cancel_of_two_runs():
    """If the freeze finds another run in progress than the one it was to split, it is asked again."""
    state = held(items=3)
    state.run((4, 3))
    assert state.got(TaskCancel([(BASE + 1, 7, SOFT), (BASE + 4, 8, SOFT)])) == [Freeze(1, 0, [2, 3], 2)]
    assert state.on(Frozen(1, 3, 2, 0)) == [Freeze(1, 0, [3], 3)]
    assert state.on(Frozen(1, 3, 2, 0)) == [confirm(4, 8, at=1)]


def test_forced_overtakes_soft_on_a_run():
    """A forced cancel over a soft one's freeze: the tail is confirmed apart, the rest is stopped."""
    state = running(items=4)
    state.cancel(1, 7, SOFT)
    assert state.cancel(1, 8) == []
    out = state.on(Frozen(1, 2, 1, 1))
    assert out == [Interrupt(1, 2), split(1, 2), confirm(3, 8), Fork(2)]
    assert state.records((RECORD_UNWOUND, 2, 0, b"")) == []
    assert state.on(exited(2, 2)) == [confirm(1, 8)]


def test_interrupted_run():
    """What is left of an interrupted run is confirmed from its first item without a result on."""
    state = running(items=4)
    state.cancel(1, 7)
    out = state.records(value(2, 0), (RECORD_UNWOUND, 2, 1, b""))
    assert out == [result(1)]
    assert state.on(exited(2, 2)) == [confirm(1, 7, at=1)]


# Workers that break the rules


def test_result_out_of_order():
    """A worker whose records make no sense is killed; its calls go the way of a death."""
    state = two_held()
    assert state.records(value(3)) == [Kill(1), Fork(2)]
    assert state.on(exited(2, 1)) == [died(1)]


def test_item_out_of_order():
    """A worker that skips items is killed."""
    state = held(items=4)
    assert state.records(value(2, 2)) == [Kill(1), Fork(2)]


def test_end_of_a_portion_that_was_not_given():
    """A worker that ends more than it was given is killed."""
    state = agent()
    state.run((1, 1))
    state.start_worker()
    state.records(value(1), batch_end())
    assert Kill(1) in state.records(batch_end())


# Clients that are gone


def test_client_gone():
    """The idle workers of a client that is gone are let go, and nothing is remembered of it."""
    state = agent()
    state.run((1, 1))
    state.start_worker()
    state.records(value(1), batch_end())
    assert state.got(ClientGone(1)) == [Retire(1)]
    assert state.on(exited(1, 1)) == []
    assert not state._functions and not state._hiring.gone_clients


def test_worker_of_a_gone_client_does_not_exit():
    """One that lingers, for a thread that a call has left there, is killed after a while, and not before; while the
    agent drains it is waited for."""
    for drains in (False, True):
        state = agent()
        state.run((1, 1))
        state.start_worker()
        state.records(value(1), batch_end())
        state.got(ClientGone(1))
        if drains:
            state.on(Drain())
        assert state.tick(GONE_EXIT_S / 2) == []
        assert state.next_deadline() == GONE_EXIT_S
        assert state.tick(GONE_EXIT_S) == ([] if drains else [Kill(1)])
        assert state.tick(GONE_EXIT_S) == []
        state.on(exited(1, 1))
        assert not state.workers


def test_worker_of_a_gone_client_is_in_a_call():
    """One whose call is still being stopped is looked at again later."""
    state = agent()
    state.run((1, 1))
    state.start_worker()
    state.got(ClientGone(1))
    assert state.tick(GONE_EXIT_S) == []
    state.records(value(1), batch_end())
    assert state.tick(GONE_EXIT_S) == [Kill(1)]


def test_fork_fails_for_a_client_that_is_gone():
    """A worker that never came is forgotten with its client."""
    state = agent()
    state.run((1, 1))
    state.cancel(1, 7)
    state.got(ClientGone(1))
    assert state.on(ForkFailed(1, "no memory")) == []
    assert not state._hiring.gone_clients


def test_call_of_a_gone_client_is_not_queued_again():
    """What nobody waits for is handed back instead of queued again (found by simulation)."""
    state = two_held()
    state.got(ClientGone(1))
    assert state.on(exited(2, 1)) == [died(1), returned(2)]


# Drain, fence, new epoch


def test_drain():
    """A draining agent hands back what waits, finishes what runs and says Bye when its last worker is gone."""
    state = two_held()
    assert state.run((3, 1)) == []
    assert state.on(Drain()) == [returned(3)]
    assert state.run((9, 1)) == [returned(9)]
    assert state.records(value(2), batch_end()) == [result(1)]
    assert state.records(value(3), batch_end()) == [Retire(1), result(2)]
    assert state.on(exited(3, 3)) == [Send(Bye()), Drained()]


def test_drain_says_so_first():
    """The scheduler hears that there is no room before it hears what comes back, or it would send it again."""
    state = agent()
    state.handle(Received(Welcome(0)), 0.0)
    state.run((1, 1))
    out = state.handle(Drain(), 0.0)
    assert out == [Send(AgentCapacity(0, 1)), returned(1)]


def test_short_cut():
    """A cut shorter than the fence time changes nothing."""
    state = running()
    state.tick(LOOK_S)
    assert state.on(SchedulerLost()) == []
    assert state.next_deadline() == LOOK_S + FENCE_S
    assert state.on(SchedulerBack()) == []
    assert state.tick(FENCE_S) == []


def test_fence_counts_from_when_it_was_heard():
    """The time in which nobody heard the agent counts, and no longer when it turns out to be less."""
    state = running()
    state.tick(LOOK_S)
    state.on(SchedulerLost(unheard_s=5.0))
    assert state.next_deadline() == LOOK_S + FENCE_S - 5.0
    state.on(SchedulerLost(unheard_s=1.0))
    assert state.next_deadline() == LOOK_S + FENCE_S - 1.0
    assert type(state.tick(FENCE_S)[0]) is Freeze
    assert state.on(SchedulerLost(unheard_s=1.0)) == [] and state.next_deadline() is None


def test_fence():
    """An agent that is cut off stops its calls before the scheduler may start them elsewhere."""
    state = two_held()
    state.run((3, 1))
    state.on(Seen(1, 2, 1))
    state.on(SchedulerLost())
    assert state.tick(FENCE_S) == [Freeze(1, 2, [2, 3], 0), returned(3)]
    assert state.on(Frozen(1, 2, 1, 0, killed=True)) == [returned(2), Fork(2)]
    (death,) = state.on(exited(2, 1))
    assert death.message.deaths[0][0] == BASE + 1
    assert state.outstanding == 0


def test_nothing_starts_behind_the_fence():
    """What a fenced agent cannot run any more it hands back, and runs again when the scheduler is back."""
    state = agent()
    state.run((1, 1))
    state.on(SchedulerLost())
    assert state.tick(FENCE_S) == [returned(1)]
    assert state.start_worker() == []
    assert state.on(SchedulerBack()) == []
    assert state.run((1, 1)) == [start((1, 1, 0, 1))]


def test_new_epoch():
    """A scheduler that knows nothing gets an agent that knows nothing, and room when the old workers are gone."""
    state = running()
    assert state.on(NewEpoch()) == [Kill(1)]
    assert state.outstanding == 0
    assert state.records(value(2)) == []
    out = state.handle(exited(2, 2), 0.0)
    assert [type(i.message) for i in out] == [AgentCapacity]


def test_fork_fails_in_a_new_epoch():
    """An old worker that never came does not keep the room from being offered."""
    state = agent()
    state.run((1, 1))
    state.on(NewEpoch())
    out = state.handle(ForkFailed(1, "no memory"), 0.0)
    assert [type(i.message) for i in out] == [AgentCapacity]


def test_old_initializer_fails_in_a_new_epoch():
    """The numbers of clients come again: what an old worker says is not about a new client."""
    state = agent()
    state.run((1, 1))
    state.on(Forked(1, 1001))
    state.on(NewEpoch())
    assert state.records((RECORD_START_FAILED, 0, 0, b"boom")) == []


# What comes last


def test_looks_and_forks_come_last():
    """What may be answered before the call that carries it out returns stands behind everything else."""
    state = agent(max_workers=2)
    state.run((1, 9))
    state.on(Forked(1, 1001))
    out = state.handle(Records(1, [READY]), 0.0)
    assert [type(i) for i in out] == [Start, Send]
    out = state.handle(Tick(), LOOK_S)
    assert type(out[-1]) is Look


@pytest.mark.parametrize(
    "tasks", [[(BASE + 1, 1, 1, 0, 0, 1, b"")], [(BASE + 1, 1, 1, 1, -1, 1, b"")], [(BASE + 1, 1, 1, 1, 0, 5, b"")]]
)
def test_scheduler_breaks_the_protocol(tasks):
    """What a scheduler cannot have meant raises."""
    with pytest.raises(RemoteProtocolError):
        agent().got(TaskRun(tasks, [(1, FUNCTION)]))


def test_our_own_bug_stops_us():
    """A cell that this side must never reach raises, and does not go on."""
    state = held()
    with pytest.raises(LocalProtocolError):
        state._calls.step(state._calls.by_id[BASE + 1], "KILLED")


def test_definitions_go_before_the_functions_that_need_them():
    """Each worker gets a definition before the first function that needs it, and once."""
    state = Agent(1)
    defined = Function(2, "name", b"value", CallStyle.DEFINITION, version=1)
    needing, other = Function(3, "f", b"blob", needs=[2]), Function(4, "g", b"blob", needs=[2])
    rows = [(BASE + 1, 1, 1, 1, 0, 3, b"p1")]
    assert state.got(TaskRun(rows, [(1, defined), (1, needing)])) == [Fork(1)]
    assert state.start_worker() == [Start(1, WorkerRun([(1, 1, 0, 3, b"p1")], [defined, needing]))]
    state.records(value(1), batch_end())
    rows = [(BASE + 2, 1, 1, 1, 0, 4, b"p2")]
    assert state.got(TaskRun(rows, [(1, other)])) == [Start(1, WorkerRun([(2, 1, 0, 4, b"p2")], [other]))]
