"""Nested calls: sessions and families at the scheduler, lent slots at the agent."""

import pytest

from scaler_executor.protocol import agent as agents
from scaler_executor.protocol.agent_hiring import FORK_RETRY_S, MAX_FORK_FAILURES
from scaler_executor.protocol.agent_lending import PARKED_S
from scaler_executor.protocol.functions import ReceivedFunction
from scaler_executor.protocol.messages import (
    BY_OPERATOR,
    CLIENT_ID_SHIFT,
    AgentConfirm,
    AgentResult,
    Blocked,
    Bye,
    CancelKind,
    Function,
    Hello,
    Nested,
    Options,
    ResultKind,
    TaskCancel,
    TaskCancelConfirm,
    TaskCancelConfirmType,
    TaskDied,
    TaskResult,
    TaskRun,
    TaskSubmit,
    Unblocked,
    Welcome,
    WorkerRun,
)
from scaler_executor.protocol.priorities import NESTED, OVERTAKES, PriorityQueue
from scaler_executor.protocol.scheduler import Drop, Received, Send, Tick

from .test_agent import BASE, FUNCTION, READY, REPORT, Agent, batch_end, start, value
from .test_scheduler import AGENT, CLIENT, answer, cancel, confirm, function, result, scheduler, told, with_task

SESSION = 2 << CLIENT_ID_SHIFT
FORCED = CancelKind.FORCED
CANCELED = TaskCancelConfirmType.CANCELED
RANK = 2 * NESTED


def nested_function():
    """Return the function that sessions register, as agents get it."""
    return Function(SESSION + 1, "f", b"blob", options=Options(priority=RANK))


def up(message, parent=0, item=0):
    return Nested(7, message, 1, parent, item)


def down(message):
    return Send(AGENT, Nested(7, message))


def child(no, attempt=1):
    """Return the row of a nested call as its agent gets it."""
    return (SESSION + no, attempt, 1, 1, 0, SESSION + 1, b"c%d" % no)


def with_children(*nos, parent=1, state=None):
    """Return a scheduler with task 1 ASSIGNED, which has submitted these."""
    state = state or with_task()
    assert state.got(AGENT, up(Hello("client"))) == [down(Welcome(2, workers=2))]
    rows = [(no, 1, 1, b"c%d" % no) for no in nos]
    submit = TaskSubmit(rows, [Function(1, "f", b"blob")])
    state.out = state.got(AGENT, up(submit, BASE + parent if parent else 0))
    return state


def test_a_nested_call_is_one_of_its_root():
    """What a session submits goes to agents as a call of the client that its worker serves, with numbers of its own."""
    state = with_children(1, 2)
    assert state.out == [Send(AGENT, TaskRun([child(1), child(2)], [(1, nested_function())]))]
    assert state.got(AGENT, AgentResult([(SESSION + 1, 1, 0, 1, 0, b"v")])) == [down(TaskResult([(1, 0, 1, 0, b"v")]))]


def test_room_for_what_is_waited_for():
    """A call that waits leaves room for another one, and lends its slot only behind that; a nested call that is queued
    goes before others."""
    state = with_task(state=scheduler(capacity=1))
    assert state.got(CLIENT, TaskSubmit([(2, 1, 1, b"p2")])) == []
    with_children(1, state=state)
    out = state.out + state.got(AGENT, Blocked([BASE + 1]))
    runs = [row for send in out if isinstance(send.message, TaskRun) for row in send.message.tasks]
    assert runs[0] == child(1) and out[-1] == Send(AGENT, Blocked([BASE + 1]))
    assert state.got(AGENT, Blocked([BASE + 99])) == []
    state.got(AGENT, Unblocked([BASE + 1]))


def test_a_cancel_is_confirmed_after_the_children():
    """The children of a call are cancelled when it has stopped, and it is confirmed when they have."""
    state = with_children(1)
    assert state.got(CLIENT, cancel(1, 5)) == [Send(AGENT, TaskCancel([(BASE + 1, 1, FORCED)]))]
    assert state.got(AGENT, confirm(1, 1)) == [Send(AGENT, TaskCancel([(SESSION + 1, 2, FORCED)]))]
    out = state.got(AGENT, AgentConfirm([(SESSION + 1, 1, 2, CANCELED, 0)]))
    row = (1, BY_OPERATOR, CANCELED, 0, 1, True)
    assert sorted(out, key=str) == sorted([answer(1, 5), down(TaskCancelConfirm([row]))], key=str)
    assert state.outstanding == 0


@pytest.mark.parametrize("kind", [ResultKind.VALUE, ResultKind.ERROR])
def test_what_is_left_behind_runs_on(kind):
    """A call that ends by itself leaves its children alone, also when its worker ends then; their results are nobody's
    after that."""
    state = with_children(1)
    assert state.got(AGENT, result(1, kind=kind)) == [told(1, kind=kind)]
    assert state.got(AGENT, up(Bye(force=True))) == [Send(AGENT, TaskRun([], [], [(1, SESSION + 1)]))]
    assert state.got(AGENT, AgentResult([(SESSION + 1, 1, 0, 1, 0, b"v")])) == []
    assert state.outstanding == 0


def test_a_death_stops_the_children():
    """A call that dies takes its children with it, whichever is heard of first: its end or that of its session."""
    state = with_children(1)
    state.got(AGENT, up(Bye(force=True)))
    assert state._tasks.by_id[SESSION + 1].state == "CANCELING"
    state = with_children(1)
    state.got(AGENT, TaskDied([(BASE + 1, 1, REPORT)]))
    assert state._tasks.by_id[SESSION + 1].state == "CANCELING"


def test_what_a_stopped_call_still_submits():
    """What crosses the end of its parent is stopped at once, if the parent was stopped."""
    state = with_children(1)
    state.got(CLIENT, cancel(1, 5))
    state.got(AGENT, confirm(1, 1))
    out = state.got(AGENT, up(TaskSubmit([(2, 1, 1, b"c2")]), BASE + 1))
    assert out == [down(TaskCancelConfirm([(2, BY_OPERATOR, CANCELED, 0, 1, True)]))]


def test_bye_waits_for_what_is_left_behind():
    """A client that takes its leave is let go when what its calls have left behind is over; one that dies, at once."""
    state = with_children(1)
    state.got(AGENT, result(1))
    assert state.got(CLIENT, Bye()) == []
    out = state.got(AGENT, AgentResult([(SESSION + 1, 1, 0, 1, 0, b"v")]))
    assert Drop(CLIENT, "bye") in out and down(TaskResult([(1, 0, 1, 0, b"v")])) in out
    state = with_children(1)
    state.got(CLIENT, Bye(force=True))
    assert state._tasks.by_id[SESSION + 1].state == "CANCELING"


class Unseen(dict):
    """One that nobody looks through."""

    __iter__ = keys = values = items = None


def test_who_has_said_bye_costs_others_nothing():
    """While something is left behind, the scheduler does not look for it among all the tasks of everybody."""
    state = with_children(1, 2)
    state.got(AGENT, result(1))
    assert state.got(CLIENT, Bye()) == []
    state._tasks.by_id = Unseen(state._tasks.by_id)
    assert state.handle(Tick(), 0.0) == []
    for no in (1, 2):
        out = state.handle(Received(AGENT, AgentResult([(SESSION + no, 1, 0, 1, 0, b"v")])), 0.0)
        assert (Drop(CLIENT, "bye") in out) is (no == 2)
    assert state.outstanding == 0


def test_nonsense_ends_the_session_alone():
    """A session that breaks the protocol is ended, and neither its agent nor its client notices."""
    state = with_children(1)
    (refused,) = [send for send in state.got(AGENT, up(TaskSubmit([(1, 1, 1, b"")]))) if type(send.message) is Nested]
    assert "task 1 of 1 items after item 1" in refused.message.message.reason
    assert state.got(AGENT, result(1)) == [told(1)]
    assert state.got(CLIENT, TaskSubmit([(2, 1, 1, b"p2")], [function()])) != []


# The agent


def lending():
    """Return an agent with one slot, whose call 1 lends it to call 2, which is on its way to a second worker."""
    agent = Agent(1)
    agent.run((1, 1))
    agent.start_worker()
    agent.on(agents.FromWorker(1, Hello("client")))
    said = agent.on(agents.FromWorker(1, Blocked([1])))
    assert said == [agents.Send(Blocked([BASE + 1]))]
    assert agent.run((2, 1)) == []
    assert agent.got(Blocked([BASE + 1])) == [agents.Fork(2)]
    return agent


def test_the_parent_of_what_is_submitted():
    """An agent says which task a session means by its call, and that none is if the call is over."""
    agent = lending()
    submit = TaskSubmit([(1, 1, 1, b"c")])
    submit.parent = 1 << 32 | 0
    (send,) = agent.on(agents.FromWorker(1, submit))
    assert (send.message.parent, send.message.client_id, send.message.worker_id) == (BASE + 1, 1, 1)
    submit.parent = 9 << 32
    (send,) = agent.on(agents.FromWorker(1, submit))
    assert send.message.parent == 0


def test_a_slot_comes_back_when_it_is_free():
    """Who has waited goes on when the other call is over, before anything new is started; the other worker is parked,
    and used for the next one."""
    agent = lending()
    assert agent.on(agents.Forked(2, 1002)) == []
    assert agent.records(READY, worker=2) == [start((1, 1, 0, 2), worker=2)]
    assert agent.run((3, 1)) == []
    assert agent.on(agents.FromWorker(1, Unblocked([1]))) == []
    out = agent.records(value(1), batch_end(), worker=2)
    assert agents.ToWorker(1, Unblocked([1])) in out and agents.Send(Unblocked([BASE + 1])) in out
    assert not any(isinstance(instruction, agents.Start) for instruction in out)
    assert list(agent._crew.parked) == [2] and agent._crew.staff == 1
    out = agent.records(value(1), batch_end(), worker=1)
    assert any(isinstance(instruction, agents.Start) for instruction in out)
    assert agent.next_deadline() is not None
    agent.records(value(2), batch_end(), worker=1)
    retired = agent.tick(PARKED_S)
    assert retired == [agents.Retire(2)]


def test_who_cannot_wait_goes_on_at_once():
    """One whose wait has come to its limit goes on although the slot is taken; nothing is started until one is over."""
    agent = lending()
    agent.on(agents.Forked(2, 1002))
    agent.records(READY, worker=2)
    agent.run((3, 1))
    out = agent.on(agents.FromWorker(1, Unblocked([1], at_once=True)))
    assert agents.ToWorker(1, Unblocked([1])) in out
    out = agent.records(value(1), batch_end(), worker=2)
    assert agents.Retire(2) in out and not any(isinstance(instruction, agents.Start) for instruction in out)


def test_a_wait_that_is_short():
    """Who goes on before the slot was lent just keeps it."""
    agent = Agent(1)
    agent.run((1, 1))
    agent.start_worker()
    agent.on(agents.FromWorker(1, Hello("client")))
    agent.on(agents.FromWorker(1, Blocked([1])))
    out = agent.on(agents.FromWorker(1, Unblocked([1])))
    assert out == [agents.Send(Unblocked([BASE + 1])), agents.ToWorker(1, Unblocked([1]))]
    assert agent.got(Blocked([BASE + 1])) == []
    assert agent._crew.staff == 1


def test_a_call_ends_before_it_may_lend():
    """A thread of it has waited; the next call in the worker lends its slot all the same, and an answer that is late
    has nothing lent."""
    agent = Agent(1)
    agent.run((1, 1))
    agent.start_worker()
    agent.on(agents.FromWorker(1, Hello("client")))
    agent.on(agents.FromWorker(1, Blocked([1])))
    agent.records(value(1), batch_end(), worker=1)
    agent.run((2, 1))
    assert agent.on(agents.FromWorker(1, Blocked([2]))) == [agents.Send(Blocked([BASE + 2]))]
    assert agent.got(Blocked([BASE + 1])) == [] and agent._crew.staff == 1
    assert agent.run((3, 1)) == []
    assert agent.got(Blocked([BASE + 2])) == [agents.Fork(2)]
    assert agent.on(agents.FromWorker(1, Unblocked([2], at_once=True)))[0] == agents.Send(Unblocked([BASE + 2]))


def test_the_end_of_a_lender():
    """A call that is stopped while it waits leaves no slot behind, and is not replaced; its session ends with it."""
    agent = lending()
    out = agent.cancel(1, 1)
    assert out == [agents.Interrupt(1, 1)]
    out = agent.on(agents.Exited(1, 1, 0, 0, REPORT))
    assert agents.Send(Nested(1, Bye(force=True), 1)) in out
    assert agent._crew.staff == 1


def test_no_process_for_what_is_waited_for():
    """When no worker can be started and all that there are wait, what they wait for fails with the reason."""
    agent = Agent(1)
    agent.run((1, 1))
    agent.start_worker()
    agent.on(agents.FromWorker(1, Hello("client")))
    agent.on(agents.FromWorker(1, Blocked([1])))
    session_function = Function(SESSION + 1, "f", b"blob", options=Options(priority=RANK))
    agent.got(TaskRun([child(1)], [(1, session_function)]))
    assert agent.got(Blocked([BASE + 1])) == [agents.Fork(2)]
    for worker_id in range(2, MAX_FORK_FAILURES + 1):
        assert agent.on(agents.ForkFailed(worker_id, "no memory")) == []
        assert agent.tick(FORK_RETRY_S) == [agents.Fork(worker_id + 1)]
    (send,) = agent.on(agents.ForkFailed(MAX_FORK_FAILURES + 1, "no memory"))
    ((task_id, _, report),) = send.message.deaths
    assert task_id == SESSION + 1 and report.reason == "no worker could be started: no memory"


def test_the_newest_session_goes_first():
    """Of the queued calls those of sessions are given out before others, whatever came first."""
    agent = Agent(1)
    agent.run((1, 1))
    agent.start_worker()
    agent.run((2, 1))
    session_function = Function(SESSION + 1, "f", b"blob", options=Options(priority=RANK))
    agent.got(TaskRun([child(1)], [(1, session_function)]))
    (given,) = agent.records(value(1), batch_end(1.0), worker=1)[:1]
    assert given == agents.Start(1, WorkerRun([(2, 1, 0, SESSION + 1, b"c1")], [session_function]))
    assert FUNCTION.function_id == 1


def test_nested_calls_do_not_let_others_pass():
    """However many nested calls are taken, what is older but of no session waits: it would only add calls that wait."""
    queue = PriorityQueue([Item(1, 0), *(Item(SESSION + no, RANK) for no in range(1, 3 * OVERTAKES))])
    taken = [queue.popleft().task_id for _ in range(3 * OVERTAKES)]
    assert taken == [*range(SESSION + 1, SESSION + 3 * OVERTAKES), 1]


class Item:
    state = "QUEUED"

    def __init__(self, task_id, priority):
        self.task_id = task_id
        self.function = ReceivedFunction(Function(1, "f", b"", options=Options(priority=priority)), lambda _: None)
