"""The scheduler's table, row by row, and the races that it is made for."""

import msgspec
import pytest

from scaler_executor.protocol.codec import LocalProtocolError
from scaler_executor.protocol.functions import MAX_CLIENT_FUNCTIONS
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    AgentCapacity,
    AgentConfirm,
    AgentResult,
    Bye,
    CallStyle,
    CancelKind,
    ClientGone,
    ClientLimit,
    ClientLimited,
    Death,
    DeathReport,
    Function,
    Hello,
    InheritanceLost,
    InheritanceReplaced,
    Options,
    Refused,
    ResultKind,
    TaskCancel,
    TaskCancelConfirm,
    TaskCancelConfirmType,
    TaskDied,
    TaskResult,
    TaskRetried,
    TaskReturned,
    TaskRun,
    TaskRunning,
    TaskSplit,
    TaskSubmit,
    Welcome,
    WorkersBroken,
)
from scaler_executor.protocol.scheduler import (
    FENCE_S,
    MAX_NAME,
    Drop,
    PeerLost,
    Received,
    SchedulerState,
    Send,
    Tick,
)
from scaler_executor.protocol.scheduler_assignment import IDLE_BEFORE_RECALL_S

CLIENT, AGENT, OTHER_AGENT, OTHER_CLIENT = 1, 2, 3, 4
BASE = 1 << CLIENT_ID_SHIFT
RECALL, SOFT, FORCED = CancelKind.RECALL, CancelKind.SOFT, CancelKind.FORCED
CANCELED = TaskCancelConfirmType.CANCELED
NOT_FOUND = TaskCancelConfirmType.CANCEL_NOT_FOUND
FAILED = TaskCancelConfirmType.CANCEL_FAILED
VALUE = ResultKind.VALUE
REPORT = DeathReport("killed", -9)


def function(retries=0):
    return Function(1, "f", b"blob", options=Options(retries=retries))


class Scheduler(SchedulerState):
    """A scheduler that checks itself after each step and tells its time."""

    now = 0.0

    def got(self, peer, message):
        out = self.handle(Received(peer, message), self.now)
        self.check()
        return out

    def lost(self, peer, stopped=False):
        out = self.handle(PeerLost(peer, "gone", stopped), self.now)
        self.check()
        return out

    def tick(self, after):
        self.now += after
        out = self.handle(Tick(), self.now)
        self.check()
        return out


def scheduler(capacity=8, workers=2):
    """Return a scheduler with one client and one agent."""
    state = Scheduler()
    assert state.got(CLIENT, Hello("client")) == [Send(CLIENT, Welcome(1))]
    assert state.got(AGENT, Hello("agent", name="a")) == [Send(AGENT, Welcome(0))]
    assert state.got(AGENT, AgentCapacity(capacity, workers)) == []
    return state


def row(no=1, items=1, skip=0, attempt=1, task=None, function_id=1):
    return (BASE + (task or no), attempt, 1, items, skip, function_id, b"p%d" % no)


def with_task(items=1, retries=0, state=None):
    """Return a scheduler with task 1 of so many items ASSIGNED to the agent."""
    state = state or scheduler()
    out = state.got(CLIENT, TaskSubmit([(1, items, 1, b"p1")], [function(retries)]))
    assert out == [Send(AGENT, TaskRun([row(items=items)], [(1, function(retries))]))]
    return state


def recalling(items=1, retries=0):
    """Return a scheduler that has recalled task 1 from its agent for another one, with request number 1."""
    state = scheduler(workers=1)
    state.got(CLIENT, TaskSubmit([(1, items, 1, b"p1"), (2, 1, 1, b"p2")], [function(retries)]))
    state.got(OTHER_AGENT, Hello("agent", name="b"))
    state.got(OTHER_AGENT, AgentCapacity(8, 1))
    assert state.next_deadline() == IDLE_BEFORE_RECALL_S
    assert state.tick(IDLE_BEFORE_RECALL_S) == [Send(AGENT, TaskCancel([(BASE + 2, 1, RECALL)]))]
    return state


def confirm(no, cancel_no, kind=CANCELED, at=0, attempt=1):
    return AgentConfirm([(BASE + no, attempt, cancel_no, kind, at)])


def answer(no, cancel_no, kind=CANCELED, first=0, count=1, proven=True):
    return Send(CLIENT, TaskCancelConfirm([(no, cancel_no, kind, first, count, proven)]))


def result(no, first=0, count=1, attempt=1, payload=b"v", kind=VALUE):
    return AgentResult([(BASE + no, attempt, first, count, kind, payload)])


def told(no, first=0, count=1, payload=b"v", kind=VALUE):
    return Send(CLIENT, TaskResult([(no, first, count, kind, payload)]))


def died(no, attempt=1, count=1, first=0, report=REPORT):
    said = msgspec.structs.replace(report, attempt=attempt)
    return told(no, first, count, msgspec.msgpack.encode(said), ResultKind.DIED)


def retried(no, spent):
    return Send(CLIENT, TaskRetried([(no, spent)]))


def cancel(no, cancel_no, kind=FORCED):
    return TaskCancel([(no, cancel_no, kind)])


# QUEUED


def queued():
    """Return a scheduler with task 1 QUEUED: its agent has no room."""
    state = scheduler(capacity=0)
    assert state.got(CLIENT, TaskSubmit([(1, 1, 1, b"p1")], [function()])) == []
    return state


def test_room_below():
    """A queued task is sent as soon as an agent has room, with its function, once."""
    state = queued()
    assert state.got(AGENT, AgentCapacity(1, 1)) == [Send(AGENT, TaskRun([row()], [(1, function())]))]
    assert state.got(CLIENT, TaskSubmit([(2, 1, 1, b"p2")])) == []
    assert state.got(AGENT, result(1)) == [told(1), Send(AGENT, TaskRun([row(2)]))]


@pytest.mark.parametrize("kind", [SOFT, FORCED])
def test_cancel_queued(kind):
    """A queued task is dropped and confirmed at once, softly or by force."""
    state = queued()
    assert state.got(CLIENT, cancel(1, 7, kind)) == [answer(1, 7)]
    assert state.outstanding == 0
    assert state.got(AGENT, AgentCapacity(1, 1)) == []


def test_result_of_queued_task_is_stale():
    """What an agent says of a task that it does not have is counted and dropped."""
    state = queued()
    assert state.got(AGENT, result(1)) == []
    assert state.got(AGENT, confirm(1, 0)) == []
    assert state.got(AGENT, confirm(1, 0, FAILED)) == []
    assert state.stale == 3 and state.outstanding == 1


def test_client_lost_queued():
    """The queued tasks of a client that is gone are forgotten."""
    state = queued()
    assert state.lost(CLIENT) == [Send(AGENT, ClientGone(1))]
    assert state.outstanding == 0


# ASSIGNED


def test_forced_cancel_assigned():
    """A cancel is passed on with a number of the scheduler's own, and its answer is forwarded with the user's."""
    state = with_task()
    assert state.got(CLIENT, cancel(1, 7)) == [Send(AGENT, TaskCancel([(BASE + 1, 1, FORCED)]))]
    assert state.got(AGENT, confirm(1, 1)) == [answer(1, 7)]
    assert state.outstanding == 0


def test_soft_cancel_refused():
    """CancelFailed is forwarded, the task runs on, and another cancel may be made."""
    state = with_task()
    assert state.got(CLIENT, cancel(1, 7, SOFT)) == [Send(AGENT, TaskCancel([(BASE + 1, 1, SOFT)]))]
    assert state.got(AGENT, confirm(1, 1, FAILED)) == [answer(1, 7, FAILED)]
    assert state.got(CLIENT, cancel(1, 8)) == [Send(AGENT, TaskCancel([(BASE + 1, 2, FORCED)]))]
    assert state.got(AGENT, result(1)) == [told(1)]
    assert state.outstanding == 0


def test_result():
    """A result is forwarded and the task forgotten."""
    state = with_task()
    assert state.got(AGENT, result(1)) == [told(1)]
    assert state.outstanding == 0
    assert state.got(AGENT, result(1)) == []


def test_canceled_without_request():
    """An agent that says Canceled of what nobody cancelled breaks the protocol, and its calls are fenced."""
    state = with_task()
    out = state.got(AGENT, confirm(1, 0))
    assert [type(instruction) for instruction in out] == [Drop] and out[0].error
    assert state.next_deadline() == FENCE_S


def test_worker_died_without_retries():
    """A death is reported with the attempt."""
    state = with_task()
    assert state.got(AGENT, TaskDied([(BASE + 1, 1, REPORT)])) == [died(1)]
    assert state.outstanding == 0


def test_worker_died_with_retries():
    """Each death costs one retry and makes one attempt; the last one is reported."""
    state = with_task(retries=2)
    for attempt in (1, 2):
        out = state.got(AGENT, TaskDied([(BASE + 1, attempt, REPORT)]))
        assert out == [retried(1, attempt), Send(AGENT, TaskRun([row(attempt=attempt + 1)]))]
    attempts = [Death(REPORT.reason, REPORT.exit_code, attempt=attempt) for attempt in (1, 2)]
    report = msgspec.structs.replace(REPORT, earlier=attempts)
    assert state.got(AGENT, TaskDied([(BASE + 1, 3, REPORT)])) == [died(1, attempt=3, report=report)]


def test_report_of_an_earlier_attempt_is_stale():
    """What is said of another attempt than the current one changes nothing."""
    state = with_task(retries=1)
    state.got(AGENT, TaskDied([(BASE + 1, 1, REPORT)]))
    assert state.got(AGENT, result(1, attempt=1)) == []
    assert state.got(AGENT, TaskDied([(BASE + 1, 1, REPORT)])) == []
    assert state.got(AGENT, result(1, attempt=2)) == [told(1)]


def test_returned():
    """Tasks handed back before they started keep their attempt and their place, and are sent again."""
    state = scheduler(capacity=2)
    state.got(CLIENT, TaskSubmit([(no, 1, 1, b"p%d" % no) for no in (1, 2, 3)], [function()]))
    state.got(AGENT, AgentCapacity(0, 2))
    assert state.got(AGENT, TaskReturned([(BASE + 1, 1), (BASE + 2, 1)])) == []
    assert state.got(AGENT, AgentCapacity(3, 2)) == [Send(AGENT, TaskRun([row(1), row(2), row(3)]))]


def test_agent_lost_is_fenced():
    """The calls of an agent out of reach count as started, and are decided when it must have stopped them."""
    state = with_task()
    assert state.lost(AGENT) == []
    assert state.next_deadline() == FENCE_S
    assert state.tick(FENCE_S - 0.1) == []
    reason = DeathReport("the machine that ran it is out of reach")
    assert state.tick(0.1) == [died(1, report=reason)]


def test_agent_lost_with_retries_waits_for_the_fence():
    """A call of a lost agent is not started again before the fence time is over."""
    state = with_task(retries=1)
    state.got(OTHER_AGENT, Hello("agent"))
    state.got(OTHER_AGENT, AgentCapacity(8, 2))
    assert state.lost(AGENT) == []
    assert state.tick(FENCE_S / 2) == []
    again = Send(OTHER_AGENT, TaskRun([row(attempt=2)], [(1, function(1))]))
    assert state.tick(FENCE_S / 2) == [retried(1, 1), again]


def test_agent_stopped():
    """Of an agent whose process has ended it is known at once that its calls have."""
    state = with_task()
    assert state.lost(AGENT, stopped=True) == [died(1, report=DeathReport("its agent's process has ended"))]


def test_client_lost_stops_its_calls():
    """The calls of a client that is gone are stopped by force and nobody is answered."""
    state = with_task()
    out = state.lost(CLIENT)
    assert out == [Send(AGENT, ClientGone(1)), Send(AGENT, TaskCancel([(BASE + 1, 1, FORCED)]))]
    assert state.got(AGENT, confirm(1, 1)) == []
    assert state.outstanding == 0 and not state._tasks.leaving


def test_call_of_a_gone_client_that_cannot_be_stopped():
    """A call that will not be stopped is remembered until it ends, though its client is gone."""
    state = with_task()
    state.lost(CLIENT)
    assert state.got(AGENT, confirm(1, 1, FAILED)) == []
    assert state.outstanding == 1
    assert state.got(AGENT, result(1)) == []
    assert state.outstanding == 0 and not state._tasks.leaving


def test_running():
    """RUNNING is forwarded under the submitted number."""
    state = with_task()
    assert state.got(AGENT, TaskRunning([BASE + 1, BASE + 9])) == [Send(CLIENT, TaskRunning([1]))]


# RECALLING


def test_recall_comes_back():
    """What comes back from a recall goes to the idle agent, under the same attempt."""
    state = recalling()
    assert state.got(AGENT, confirm(2, 1)) == [Send(OTHER_AGENT, TaskRun([row(2)], [(1, function())]))]


def test_recall_refused():
    """A call that runs is not recalled a second time."""
    state = recalling()
    assert state.got(AGENT, confirm(2, 1, FAILED)) == []
    assert state.tick(IDLE_BEFORE_RECALL_S) == [Send(AGENT, TaskCancel([(BASE + 1, 2, RECALL)]))]
    assert state.got(AGENT, result(2)) == [told(2)]


def test_result_crosses_a_recall():
    """The result of a recalled call counts."""
    state = recalling()
    assert state.got(AGENT, result(2)) == [told(2)]
    assert state.got(AGENT, AgentConfirm([(BASE + 2, 0, 1, NOT_FOUND, 0)])) == []


def test_forced_cancel_over_a_recall():
    """A user's forced cancel goes after the recall, and the recall's own Canceled answers the user."""
    state = recalling()
    assert state.got(CLIENT, cancel(2, 7)) == [Send(AGENT, TaskCancel([(BASE + 2, 2, FORCED)]))]
    assert state.got(AGENT, confirm(2, 1)) == [answer(2, 7)]
    assert state.outstanding == 1
    assert state.got(AGENT, AgentConfirm([(BASE + 2, 0, 2, NOT_FOUND, 0)])) == []


def test_recalls_failure_after_a_forced_cancel_is_dropped():
    """The recall's own CancelFailed arriving after a user's forced cancel says nothing about that one."""
    state = recalling()
    state.got(CLIENT, cancel(2, 7))
    assert state.got(AGENT, confirm(2, 1, FAILED)) == []
    assert state.got(AGENT, confirm(2, 2)) == [answer(2, 7)]


def test_soft_cancel_over_a_recall():
    """The recall becomes the user's: nothing is sent, and its Canceled drops and confirms."""
    state = recalling()
    assert state.got(CLIENT, cancel(2, 7, SOFT)) == []
    assert state.got(AGENT, confirm(2, 1)) == [answer(2, 7)]
    assert state.outstanding == 1


def test_soft_cancel_over_a_recall_that_fails():
    """The recall's CancelFailed is the user's answer, once, and the call runs on."""
    state = recalling()
    state.got(CLIENT, cancel(2, 7, SOFT))
    assert state.got(AGENT, confirm(2, 1, FAILED)) == [answer(2, 7, FAILED)]
    assert state.got(AGENT, confirm(2, 1, FAILED)) == []
    assert state.got(AGENT, result(2)) == [told(2)]


@pytest.mark.parametrize("retries", [0, 1])
def test_worker_dies_under_a_recall(retries):
    """A recall changes nothing about a death."""
    state = recalling(retries=retries)
    out = state.got(AGENT, TaskDied([(BASE + 2, 1, REPORT)]))
    if retries:
        assert out == [retried(2, 1), Send(OTHER_AGENT, TaskRun([row(2, attempt=2)], [(1, function(1))]))]
    else:
        assert out == [died(2)]


def test_agent_lost_under_a_recall():
    """A recall changes nothing about the loss of an agent."""
    state = recalling()
    state.lost(AGENT)
    assert state.next_deadline() == state.now + FENCE_S
    assert len(state.tick(FENCE_S)) == 1
    assert state.outstanding == 0


def test_client_lost_under_a_recall():
    """The call is stopped, whatever the recall says."""
    state = recalling()
    out = state.lost(CLIENT)
    assert out[1] == Send(AGENT, TaskCancel([(BASE + 1, 2, FORCED), (BASE + 2, 3, FORCED)]))
    assert state.got(AGENT, AgentConfirm([(BASE + 2, 1, 1, CANCELED, 0), (BASE + 1, 1, 2, CANCELED, 0)])) == []
    assert state.outstanding == 0


def test_run_splits_under_a_recall():
    """The agent takes a recall that crosses its split for the head alone; the tail stays where it is."""
    state = scheduler(workers=1)
    state.got(CLIENT, TaskSubmit([(1, 1, 1, b"p1"), (2, 4, 1, b"p2")], [function()]))
    state.got(OTHER_AGENT, Hello("agent"))
    state.got(OTHER_AGENT, AgentCapacity(8, 1))
    assert state.tick(IDLE_BEFORE_RECALL_S) == [Send(AGENT, TaskCancel([(BASE + 2, 1, RECALL)]))]
    assert state.got(AGENT, TaskSplit([(BASE + 2, 1, 3)])) == []
    out = state.got(AGENT, confirm(2, 1, at=1))
    assert out == [Send(OTHER_AGENT, TaskRun([row(2, items=2, skip=1, task=3)], [(1, function())]))]
    assert state.got(AGENT, result(5)) == [told(2, first=3)]


# CANCELING


def canceling(kind=FORCED, items=1, retries=0):
    """Return a scheduler with task 1 in CANCELING, requests 7 of the user and 1 to the agent."""
    state = with_task(items, retries)
    assert state.got(CLIENT, cancel(1, 7, kind)) == [Send(AGENT, TaskCancel([(BASE + 1, 1, kind)]))]
    return state


@pytest.mark.parametrize("kind", [SOFT, FORCED])
def test_result_crosses_a_cancel(kind):
    """The result answers the cancel: dropping it would leave the user waiting."""
    state = canceling(kind)
    assert state.got(AGENT, result(1)) == [told(1)]
    assert state.outstanding == 0
    assert state.got(AGENT, AgentConfirm([(BASE + 1, 0, 1, NOT_FOUND, 0)])) == []


def test_forced_overtakes_soft():
    """The newest request counts; the older one's failure is dropped."""
    state = canceling(SOFT)
    assert state.got(CLIENT, cancel(1, 8, FORCED)) == [Send(AGENT, TaskCancel([(BASE + 1, 2, FORCED)]))]
    assert state.got(AGENT, confirm(1, 1, FAILED)) == []
    assert state.got(AGENT, confirm(1, 2)) == [answer(1, 8)]


def test_soft_after_forced():
    """A soft request after a forced one is answered with that one's answer, and not sent."""
    state = canceling(FORCED)
    assert state.got(CLIENT, cancel(1, 8, SOFT)) == []
    assert state.got(AGENT, confirm(1, 1)) == [answer(1, 8)]


def test_older_request_says_canceled():
    """Canceled counts whichever request it answers: the agent has forgotten the call."""
    state = canceling(SOFT)
    state.got(CLIENT, cancel(1, 8, FORCED))
    assert state.got(AGENT, confirm(1, 1)) == [answer(1, 8)]
    assert state.outstanding == 0


def test_forced_overtakes_partial_soft():
    """A soft cancel took back a run's tail while the forced one was on its way: the head stays CANCELING."""
    state = canceling(SOFT, items=4)
    state.got(CLIENT, cancel(1, 8, FORCED))
    assert state.got(AGENT, confirm(1, 1, at=2)) == [answer(1, 8, first=2, count=2)]
    assert state.got(AGENT, confirm(1, 2, at=0)) == [answer(1, 8, first=0, count=2)]
    assert state.outstanding == 0


def test_soft_cancel_of_a_run():
    """A soft cancel takes back the items that have not started; those before run on."""
    state = canceling(SOFT, items=4)
    assert state.got(AGENT, confirm(1, 1, at=2)) == [answer(1, 7, first=2, count=2)]
    assert state.got(AGENT, result(1, 0, 2)) == [told(1, 0, 2)]
    assert state.outstanding == 0


def test_split_crosses_a_cancel():
    """A cancel that crosses a split is sent again for the tail."""
    state = canceling(items=4)
    out = state.got(AGENT, TaskSplit([(BASE + 1, 1, 2)]))
    assert out == [Send(AGENT, TaskCancel([(BASE + 3, 2, FORCED)]))]
    assert state.got(AGENT, confirm(1, 1)) == [answer(1, 7, first=0, count=2)]
    assert state.got(AGENT, confirm(3, 2)) == [answer(1, 7, first=2, count=2)]
    assert state.outstanding == 0


@pytest.mark.parametrize("retries", [0, 5])
def test_worker_dies_while_cancelling(retries):
    """A death answers the cancel, and never makes an attempt, whatever the retries."""
    state = canceling(retries=retries)
    assert state.got(AGENT, TaskDied([(BASE + 1, 1, REPORT)])) == [answer(1, 7)]
    assert state.outstanding == 0


def test_returned_while_cancelling():
    """What is handed back while it is being cancelled is not queued again."""
    state = canceling()
    assert state.got(AGENT, TaskReturned([(BASE + 1, 1)])) == [answer(1, 7)]
    assert state.outstanding == 0


def test_agent_lost_while_cancelling():
    """After the fence time the cancel is confirmed, unproven, and nothing is queued again."""
    state = canceling(retries=5)
    assert state.lost(AGENT) == []
    assert state.tick(FENCE_S) == [answer(1, 7, proven=False)]
    assert state.outstanding == 0


def test_agent_stopped_while_cancelling():
    """An agent whose process has ended has stopped the call."""
    state = canceling(retries=5)
    assert state.lost(AGENT, stopped=True) == [answer(1, 7)]


def test_client_lost_while_cancelling():
    """The request goes on without an addressee, and a soft one is raised."""
    state = canceling(SOFT)
    assert state.lost(CLIENT) == [Send(AGENT, ClientGone(1)), Send(AGENT, TaskCancel([(BASE + 1, 2, FORCED)]))]
    assert state.got(AGENT, confirm(1, 1, FAILED)) == []
    assert state.got(AGENT, confirm(1, 2)) == []
    assert state.outstanding == 0


# FENCING


def test_cancel_while_fencing():
    """A cancel of a fenced call is answered when the fence time is over, and it is not tried again."""
    state = with_task(retries=3)
    state.lost(AGENT)
    assert state.got(CLIENT, cancel(1, 7)) == []
    assert state.tick(FENCE_S) == [answer(1, 7, proven=False)]
    assert state.outstanding == 0


def test_client_lost_while_fencing():
    """A fenced call of a client that is gone is forgotten when the fence time is over."""
    state = with_task(retries=3)
    state.lost(AGENT)
    assert state.lost(CLIENT) == []
    assert state.outstanding == 1
    assert state.tick(FENCE_S) == []
    assert state.outstanding == 0 and not state._tasks.leaving and state.next_deadline() is None


# Runs


def test_run_in_ranges():
    """Result ranges are forwarded as they come, and the run is forgotten with the last one."""
    state = with_task(items=5)
    assert state.got(AGENT, result(1, 0, 2)) == [told(1, 0, 2)]
    assert state.got(AGENT, result(1, 2, 1)) == [told(1, 2, 1)]
    assert state.got(AGENT, result(1, 3, 2)) == [told(1, 3, 2)]
    assert state.outstanding == 0


def test_split_run():
    """The items behind a split are a task with the number of the first of them."""
    state = with_task(items=5)
    assert state.got(AGENT, TaskSplit([(BASE + 1, 1, 3)])) == []
    assert state.outstanding == 2
    assert state.got(AGENT, result(4, 0, 2)) == [told(1, 3, 2)]
    assert state.got(AGENT, result(1, 0, 3)) == [told(1, 0, 3)]
    assert state.outstanding == 0


def test_partial_run_dies():
    """Of a run only the item in progress dies; what came before is delivered, what comes after is another task."""
    state = with_task(items=4)
    assert state.got(AGENT, TaskSplit([(BASE + 1, 1, 2)])) == []
    assert state.got(AGENT, result(1, 0, 1)) == [told(1)]
    assert state.got(AGENT, TaskDied([(BASE + 1, 1, REPORT)])) == [died(1, first=1)]
    assert state.got(AGENT, result(3, 0, 2)) == [told(1, 2, 2)]
    assert state.outstanding == 0


def test_partial_run_is_retried():
    """What is left of a run after a death runs again under the number of its first item, as the next attempt."""
    state = with_task(items=4, retries=1)
    state.got(AGENT, TaskSplit([(BASE + 1, 1, 2)]))
    state.got(AGENT, result(1, 0, 1))
    out = state.got(AGENT, TaskDied([(BASE + 1, 1, REPORT)]))
    assert out == [retried(1, 1), Send(AGENT, TaskRun([row(1, items=1, skip=1, task=2, attempt=2)]))]
    assert state.got(AGENT, result(2, 0, 1, attempt=2)) == [told(1, 1, 1)]


def test_cancel_reaches_all_pieces_of_a_run():
    """A user's cancel goes to each task that the run has become, and each answers for its items."""
    state = with_task(items=4)
    state.got(AGENT, TaskSplit([(BASE + 1, 1, 2)]))
    out = state.got(CLIENT, cancel(1, 7))
    assert out == [Send(AGENT, TaskCancel([(BASE + 1, 1, FORCED), (BASE + 3, 2, FORCED)]))]
    out = state.got(AGENT, AgentConfirm([(BASE + 1, 1, 1, CANCELED, 0), (BASE + 3, 1, 2, CANCELED, 0)]))
    assert out == [Send(CLIENT, TaskCancelConfirm([(1, 7, CANCELED, 0, 2, True), (1, 7, CANCELED, 2, 2, True)]))]


def test_pieces_of_a_run_cannot_be_named():
    """A client names what it submitted, not what the scheduler made of it."""
    state = with_task(items=4)
    state.got(AGENT, TaskSplit([(BASE + 1, 1, 2)]))
    assert state.got(CLIENT, cancel(3, 7)) == [answer(3, 7, NOT_FOUND, 0, 0)]


# Unknown tasks, owners, peers


def test_cancel_unknown():
    """A cancel of what the scheduler does not know is answered NotFound."""
    assert scheduler().got(CLIENT, cancel(5, 7)) == [answer(5, 7, NOT_FOUND, 0, 0)]


def test_cancel_of_anothers_task():
    """Numbers are a client's own: nobody can name another's task."""
    state = with_task()
    state.got(OTHER_CLIENT, Hello("client"))
    out = state.got(OTHER_CLIENT, cancel(1, 7))
    assert out == [Send(OTHER_CLIENT, TaskCancelConfirm([(1, 7, NOT_FOUND, 0, 0, True)]))]


def test_another_agent_speaks_of_a_task():
    """What an agent says of a task that another one has is stale."""
    state = with_task()
    state.got(OTHER_AGENT, Hello("agent"))
    assert state.got(OTHER_AGENT, result(1)) == []
    assert state.got(OTHER_AGENT, TaskDied([(BASE + 1, 1, REPORT)])) == []
    assert state.stale == 2


def test_wrong_version():
    """A peer of another version is refused with a reason."""
    out = Scheduler().got(CLIENT, Hello("client", version=99))
    assert [type(i) for i in out] == [Send, Drop]
    assert isinstance(out[0].message, Refused) and "99" in out[0].message.reason


@pytest.mark.parametrize(
    "message",
    [
        Hello("client"),
        AgentCapacity(1, 1),
        Bye(),
        TaskSubmit([(0, 1, 1, b"")]),
        TaskSubmit([(1, 1, 1, b"")]),
        TaskSubmit([(5, 0, 1, b"")]),
        TaskSubmit([(5, 1, 77, b"")]),
        TaskSubmit([(5, 1 << 40, 1, b"")]),
        TaskSubmit([], forget=[77]),
        TaskSubmit([(1 << 63, 1, 1, b"")]),
        TaskSubmit([(5, 1 << 63, 1, b"")]),
        TaskSubmit([(5, -1, 1, b"")]),
        TaskSubmit([(-5, 1, 1, b"")]),
        TaskSubmit([], forget=[0]),
        TaskSubmit([], [Function(0, "f", b"")]),
        TaskSubmit([], [Function(-1, "f", b"")]),
        TaskSubmit([], [Function(1 << 60, "f", b"")]),
        TaskSubmit([], [Function(2, "f", b"", style=9)]),
        TaskSubmit([], [Function(2, "f", b"", style=-1)]),
        TaskSubmit([], [Function(2, "f", b"", needs=[2])]),
        TaskSubmit([], [Function(2, "f", b"", options=Options(retries=-1))]),
        TaskSubmit([], [Function(2, "f", b"", options=Options(cancel_grace_s=-1.0))]),
        TaskSubmit([], [Function(2, "f", b"", options=Options(cancel_grace_s=float("nan")))]),
        TaskSubmit([], [Function(2, "f", b"", needs=[0])]),
        cancel(1, 0),
        cancel(1, -1),
        cancel(1, 1 << 63),
        cancel(0, 1),
        cancel(-BASE, 1),
        cancel(BASE + 1, 1),
        cancel(1, 1, RECALL),
        cancel(1, 1, 9),
        cancel(1, 1, -1),
        AgentResult([(BASE + 1, 1, 0, 1, 0, b"")]),
        ClientLimited(1, 1),
    ],
)
def test_client_breaks_the_protocol(message):
    """A client that breaks the protocol is dropped, its calls are stopped, and nobody else notices."""
    state = with_task()
    out = state.got(CLIENT, message)
    assert out[0].peer == CLIENT and out[0].error
    assert out[1:] == [Send(AGENT, ClientGone(1)), Send(AGENT, TaskCancel([(BASE + 1, 1, FORCED)]))]


@pytest.mark.parametrize(
    "message",
    [
        Hello("agent"),
        TaskSubmit([]),
        result(1, 1, 1),
        result(1, 0, 2),
        result(1, 0, 0),
        confirm(1, 0, 9),
        confirm(1, 0, FAILED),
        confirm(1, 0, NOT_FOUND),
        confirm(1, 0, at=1),
        result(1, -1, 1),
        result(1, 0, 1, kind=ResultKind.BROKEN),
        result(1, 0, 1, kind=-1),
        result(1, 0, 1, kind=1 << 40),
        confirm(1, 0, at=-1),
        confirm(1, 0, at=1 << 40),
        TaskSplit([(BASE + 1, 1, 0)]),
        TaskSplit([(BASE + 1, 1, 1)]),
        TaskSplit([(BASE + 1, 1, -1)]),
        AgentCapacity(-1, 1),
        AgentCapacity(1, -1),
        AgentCapacity(1 << 40, 1),
        AgentCapacity(1, 1 << 40),
        cancel(1, 1),
    ],
)
def test_agent_breaks_the_protocol(message):
    """An agent that breaks the protocol is dropped and its calls are fenced."""
    state = with_task()
    out = state.got(AGENT, message)
    assert out == [out[0]] and out[0].peer == AGENT and out[0].error
    assert state.next_deadline() == FENCE_S


@pytest.mark.parametrize("limit", [0, -1, 1 << 40])
@pytest.mark.parametrize("name", ["max_running", "max_items_per_worker"])
def test_hello_with_a_limit_that_makes_no_sense(name, limit):
    """A client that may have no worker, or more than can be counted, is not let in."""
    (drop,) = Scheduler().got(CLIENT, Hello("client", **{name: limit}))
    assert drop.peer == CLIENT and drop.error


def test_too_many_functions():
    """What one client can have remembered is bounded; a name is cut."""
    state = scheduler()
    state.got(CLIENT, TaskSubmit([], [Function(1, "f" * 5000, b"")]))
    (client,) = [peer for peer in state._peers.values() if peer.peer == CLIENT]
    assert len(client.functions[1].function.name) == MAX_NAME
    functions = [Function(number, "f", b"") for number in range(2, MAX_CLIENT_FUNCTIONS + 2)]
    assert state.got(CLIENT, TaskSubmit([], functions))[0].error


@pytest.mark.parametrize(
    "message",
    [
        result(1, 5, 1 << 60),
        confirm(1, 1 << 60, 77, at=-1),
        TaskSplit([(BASE + 1, 1, -1)]),
        TaskDied([(BASE + 1, 1, REPORT)]),
        TaskReturned([(BASE + 1, 1)]),
    ],
)
def test_agent_names_what_it_does_not_have(message):
    """Whatever an agent says of another one's tasks is counted and changes nothing."""
    state = with_task()
    state.got(OTHER_AGENT, Hello("agent"))
    assert state.got(OTHER_AGENT, message) == []
    assert state.stale == 1 and state.outstanding == 1
    assert state.got(OTHER_AGENT, TaskRunning([BASE + 1, -1, 1 << 62])) == []
    assert state.got(OTHER_AGENT, ClientLimited(1 << 60, -1)) == []
    assert state.got(OTHER_AGENT, WorkersBroken(77, "no")) == []
    assert all(not agent.broken_for for agent in state._assignment.agents)


def test_message_before_hello():
    """The first message of a peer is Hello."""
    assert Scheduler().got(9, Bye()) == [Drop(9, "Bye before Hello", error=True)]


def test_our_own_bug_stops_us():
    """A cell that this side must never reach raises, and does not go on."""
    state = queued()
    with pytest.raises(LocalProtocolError):
        state._tasks.step(state._tasks.by_id[BASE + 1], "RESULT", 0, 1, VALUE, b"")


# Dispatch


def test_clients_take_turns():
    """A client with few tasks does not wait for one with many."""
    state = scheduler(capacity=0)
    state.got(OTHER_CLIENT, Hello("client"))
    state.got(CLIENT, TaskSubmit([(no, 1, 0, b"") for no in range(1, 1001)]))
    state.got(OTHER_CLIENT, TaskSubmit([(1, 1, 0, b"")]))
    (sent,) = state.got(AGENT, AgentCapacity(100, 4))
    assert 2 << CLIENT_ID_SHIFT | 1 in [task[0] for task in sent.message.tasks]


def test_requeue_pumps():
    """Every requeue pumps the queue: nothing else may happen for a long time."""
    state = recalling()
    state.got(AGENT, AgentCapacity(0, 1))
    out = state.got(AGENT, TaskReturned([(BASE + 1, 1)]))
    assert out == [Send(OTHER_AGENT, TaskRun([row(1)], [(1, function())]))]


def test_workers_broken():
    """If no agent can start a worker for a client, its queued tasks and all later ones end with the reason."""
    state = with_task()
    out = state.got(AGENT, WorkersBroken(1, "no"))
    assert out == [Send(CLIENT, WorkersBroken(1, "no"))]
    assert state.got(AGENT, TaskReturned([(BASE + 1, 1)])) == [told(1, 0, 1, b"no", ResultKind.BROKEN)]
    out = state.got(CLIENT, TaskSubmit([(2, 3, 1, b"")]))
    assert out == [told(2, 0, 3, b"no", ResultKind.BROKEN)]


def test_workers_broken_at_one_of_two_agents():
    """While another agent can start workers the tasks go there."""
    state = scheduler(capacity=1)
    state.got(OTHER_AGENT, Hello("agent"))
    state.got(OTHER_AGENT, AgentCapacity(8, 1))
    assert state.got(AGENT, WorkersBroken(1, "no")) == []
    out = state.got(CLIENT, TaskSubmit([(1, 1, 1, b"p1")], [function()]))
    assert out == [Send(OTHER_AGENT, TaskRun([row()], [(1, function())]))]
    assert state.lost(OTHER_AGENT, stopped=True)[0].message.__class__ is WorkersBroken


def test_inheritance_lost():
    """The client that is meant is asked, and its answer goes to all agents that wait for it."""
    state = scheduler()
    state.got(OTHER_AGENT, Hello("agent"))
    state.got(OTHER_CLIENT, Hello("client"))
    lost, replaced = InheritanceLost(1, "lost"), InheritanceReplaced(1, [function()])
    assert state.got(AGENT, lost) == [Send(CLIENT, lost)]
    assert state.got(CLIENT, InheritanceReplaced(0, [function()])) == [Send(AGENT, replaced)]
    assert state.got(CLIENT, InheritanceReplaced(0, [function()])) == []
    state.got(AGENT, lost)
    state.got(OTHER_AGENT, lost)
    out = state.got(CLIENT, InheritanceReplaced(0, [function()]))
    assert out == [Send(AGENT, replaced), Send(OTHER_AGENT, replaced)]


def test_inheritance_lost_and_the_client_is_gone():
    """It crossed the news: the agent has been told."""
    state = scheduler()
    assert state.lost(CLIENT) == [Send(AGENT, ClientGone(1))]
    assert state.got(AGENT, InheritanceLost(1, "lost")) == []


def test_agent_says_bye():
    """An agent that leaves in order leaves nothing to decide."""
    state = scheduler()
    assert state.got(AGENT, Bye()) == [Drop(AGENT, "bye")]


def test_task_crosses_the_agents_bye():
    """What was sent to an agent that was leaving never reached it, and is sent to another one."""
    state = with_task()
    state.got(OTHER_AGENT, Hello("agent"))
    state.got(OTHER_AGENT, AgentCapacity(8, 1))
    out = state.got(AGENT, Bye())
    assert out == [Drop(AGENT, "bye"), Send(OTHER_AGENT, TaskRun([row()], [(1, function())]))]


def test_cancelled_task_crosses_the_agents_bye():
    """What is cancelled and crosses the Bye of its agent is confirmed."""
    state = canceling()
    assert state.got(AGENT, Bye()) == [Drop(AGENT, "bye"), answer(1, 7)]


def test_client_says_bye():
    """A client that leaves in order is let go, and the agents let its workers go."""
    state = with_task()
    state.got(AGENT, result(1))
    assert state.got(CLIENT, Bye()) == [Drop(CLIENT, "bye"), Send(AGENT, ClientGone(1))]


def test_functions_of_a_gone_client_are_forgotten():
    """Nothing is remembered of what an agent knew for a client that is gone."""
    state = with_task()
    state.lost(CLIENT)
    state.got(AGENT, confirm(1, 1))
    (agent,) = state._assignment.agents
    assert not agent.known._known


def test_story():
    """The story of a task tells its odd steps, in order."""
    state = canceling(SOFT)
    state.got(AGENT, confirm(1, 1, FAILED))
    steps = [(step.event, step.before, step.after) for step in state.story(BASE + 1)]
    assert steps == [("CANCEL", "ASSIGNED", "CANCELING"), ("FAILED", "CANCELING", "ASSIGNED")]


def definition(number, version=1):
    return Function(number, "name", b"value", CallStyle.DEFINITION, version=version)


def test_definitions_go_before_the_functions_that_need_them():
    """What a function needs is sent with its first call, once, also when the client has forgotten it since."""
    state = scheduler(capacity=0)
    needing = Function(3, "f", b"blob", needs=[2])
    state.got(CLIENT, TaskSubmit([(1, 1, 3, b"p1")], [definition(2), needing]))
    state.got(CLIENT, TaskSubmit([(2, 1, 3, b"p2")], forget=[3, 2]))
    assert state.got(AGENT, AgentCapacity(8, 2)) == [
        Send(AGENT, TaskRun([row(1, function_id=3), row(2, function_id=3)], [(1, definition(2)), (1, needing)]))
    ]
    later = Function(5, "g", b"blob", needs=[4])
    assert state.got(CLIENT, TaskSubmit([(3, 1, 5, b"p3")], [definition(4, 2), later])) == [
        Send(AGENT, TaskRun([row(3, function_id=5)], [(1, definition(4, 2)), (1, later)]))
    ]


def test_definition_that_is_not_there():
    """A function that needs what was never sent breaks the protocol."""
    state = scheduler()
    out = state.got(CLIENT, TaskSubmit([], [Function(3, "f", b"blob", needs=[2])]))
    assert out[0] == Drop(CLIENT, "function 3 needs definition 2, which is not known", error=True)


# Many agents and clients


class Counting(Scheduler):
    """A scheduler that counts at how many seats it looks."""

    def __init__(self):
        super().__init__()
        self.looks = 0
        room = self._assignment._room

        def counted(seat):
            self.looks += 1
            return room(seat)

        self._assignment._room = counted

    def looks_at(self, peer, message):
        """Take in a message. Return the instructions and the number of seats that it looked at."""
        self.looks = 0
        out = self.handle(Received(peer, message), self.now)
        return out, self.looks


@pytest.mark.parametrize("n_clients", [1, 40], ids=["one client", "many clients"])
def test_an_event_looks_at_few_of_many_agents(n_clients):
    """What an event costs does not grow with the number of agents or clients."""
    scheduler = Counting()
    agents = range(1, 201)
    clients = range(1001, 1001 + n_clients)
    for agent in agents:
        scheduler.got(agent, Hello("agent"))
        scheduler.got(agent, AgentCapacity(8, 2))
    runs = []
    for client in clients:
        scheduler.got(client, Hello("client"))
        submit = TaskSubmit([(no, 1, 1, b"x") for no in range(1, 20_000 // n_clients)], [function()])
        out = scheduler.got(client, submit)
        runs += [(i.peer, run) for i in out if isinstance(i.message, TaskRun) for run in i.message.tasks]
    assert len(runs) >= 8 * len(agents)
    for agent, run in runs[:200]:
        out, looks = scheduler.looks_at(agent, AgentResult([(run[0], run[1], 0, 1, VALUE, b"v")]))
        assert n_clients > 1 or any(isinstance(i.message, TaskRun) for i in out), "its room is used again"
        assert looks <= 5
    scheduler.check()


def test_a_waiting_client_looks_nowhere_in_vain_again():
    """A client for which all agents are full is not looked at again before something has changed."""
    scheduler = Counting()
    for agent in range(1, 101):
        scheduler.got(agent, Hello("agent"))
        scheduler.got(agent, AgentCapacity(2, 2))
    scheduler.got(CLIENT + 1000, Hello("client"))
    scheduler.got(CLIENT + 1000, TaskSubmit([(no, 1, 1, b"x") for no in range(1, 301)], [function()]))
    for no in range(301, 400):
        assert scheduler.looks_at(CLIENT + 1000, TaskSubmit([(no, 1, 1, b"x")])) == ([], 0)


@pytest.mark.parametrize("n_others", [0, 20], ids=["one client", "many clients"])
def test_a_limit_that_is_kept_is_not_divided_again(n_others):
    """When agents say that they keep a limit, the parts are only looked at where that sets something free."""
    scheduler = Scheduler()
    parts = scheduler._limits._parts
    divided = []
    scheduler._limits._parts = lambda client, most: divided.append(client.client_id) or parts(client, most)
    for agent in range(1, 51):
        scheduler.got(agent, Hello("agent"))
        scheduler.got(agent, AgentCapacity(8, 2))
    for client in range(1001, 1001 + n_others):
        scheduler.got(client, Hello("client", max_running=7))
    divided.clear()
    out = scheduler.got(2000, Hello("client", max_running=40))
    limits = [(i.peer, i.message) for i in out if isinstance(i.message, ClientLimit) and i.message.limit_no]
    assert len(limits) == 40 and divided == [n_others + 1]
    for agent, limit in limits:
        assert scheduler.got(agent, ClientLimited(limit.client_id, limit.limit_no)) == []
    assert divided == [n_others + 1]


def test_the_least_loaded_agent_comes_first():
    """Single calls go to the agent with the fewest tasks per worker."""
    scheduler = Scheduler()
    for agent, workers in [(1, 4), (2, 2), (3, 4)]:
        scheduler.got(agent, Hello("agent"))
        scheduler.got(agent, AgentCapacity(8, workers))
    scheduler.got(9, Hello("client"))
    scheduler.got(9, TaskSubmit([], [function()]))
    got = []
    for no in range(1, 11):
        (send,) = scheduler.got(9, TaskSubmit([(no, 1, 1, b"x")]))
        got.append(send.peer)
    # By tasks per worker, and the one that came first where they have the same.
    assert got == [1, 2, 3, 1, 3, 1, 2, 3, 1, 3]
