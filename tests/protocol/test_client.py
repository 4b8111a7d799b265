"""The client's table: each row of the answers to a cancel, and the races around it."""

import pytest

from scaler_executor.protocol.client import (
    PLAIN,
    REST,
    Batch,
    Broken,
    Cancelled,
    CancelRefused,
    ClientState,
    CloseAsked,
    Closed,
    Deliver,
    Disinherited,
    Finished,
    Lost,
    Received,
    Running,
    SchedulerLost,
    Send,
    Show,
)
from scaler_executor.protocol.codec import LocalProtocolError
from scaler_executor.protocol.messages import (
    Bye,
    CancelKind,
    Function,
    InheritanceLost,
    InheritanceReplaced,
    Output,
    Refused,
    ResultKind,
    TaskCancel,
    TaskCancelConfirm,
    TaskCancelConfirmType,
    TaskResult,
    TaskRunning,
    TaskSubmit,
    Welcome,
    WorkersBroken,
)

SOFT, FORCED = CancelKind.SOFT, CancelKind.FORCED
CANCELED = TaskCancelConfirmType.CANCELED
NOT_FOUND = TaskCancelConfirmType.CANCEL_NOT_FOUND
FAILED = TaskCancelConfirmType.CANCEL_FAILED


class Client(ClientState):
    """A client that checks itself after each step."""

    def on(self, event):
        out = self.handle(event, 0.0)
        self.check()
        return out

    def got(self, message):
        return self.on(Received(message))

    def submit(self, *tasks, cancels=()):
        """Tasks: (no, items)."""
        return self.on(Batch([(no, items, 0, b"") for no, items in tasks], [], [], list(cancels)))

    def cancel(self, *cancels):
        return self.on(Batch([], [], [], list(cancels)))


def client(*tasks):
    """Return a welcome client with these tasks sent."""
    state = Client()
    assert state.got(Welcome(1)) == []
    if tasks:
        rows = [(no, items, 0, b"") for no, items in tasks]
        assert state.submit(*tasks) == [Send(TaskSubmit(rows))]
    return state


def result(no, first=0, count=1, kind=ResultKind.VALUE):
    return (no, first, count, kind, b"v")


def confirm(no, cancel_no, kind=CANCELED, first=0, count=1, proven=True):
    return TaskCancelConfirm([(no, cancel_no, kind, first, count, proven)])


def lost(state, reason="gone"):
    return state.on(SchedulerLost(reason))


# UNSENT


def test_submissions_wait_for_the_welcome():
    """What is submitted before the Welcome is sent with it, in order."""
    state = Client()
    assert state.submit((1, 1)) == [] and state.submit((2, 3)) == []
    sent = [Send(TaskSubmit([(1, 1, 0, b"")])), Send(TaskSubmit([(2, 3, 0, b"")]))]
    assert state.got(Welcome(1)) == sent
    assert state.outstanding == 2


def test_cancel_unsent():
    """What nobody has heard of is cancelled without a word, and not sent."""
    state = Client()
    state.submit((1, 1), (2, 1))
    assert state.cancel((1, SOFT)) == [Cancelled([(1, REST, 1, "CANCELED")]), Finished([1])]
    assert state.got(Welcome(1)) == [Send(TaskSubmit([(2, 1, 0, b"")]))]


def test_cancel_in_the_same_batch():
    """A cancel in the batch that submits its task unsends it."""
    state = client()
    out = state.submit((1, 1), (2, 1), cancels=[(1, FORCED)])
    assert out == [Cancelled([(1, REST, 1, "CANCELED")]), Finished([1]), Send(TaskSubmit([(2, 1, 0, b"")]))]


def test_result_of_unsent_task():
    """A scheduler that answers what was not asked is not a scheduler."""
    state = Client()
    state.submit((1, 1))
    out = state.got(TaskResult([result(1)]))
    assert [type(instruction) for instruction in out] == [Lost, Finished]


# SENT


def test_result():
    """A result is delivered, and a task of one item is over with it."""
    state = client((1, 1), (2, 1))
    rows = [result(1), result(2)]
    assert state.got(TaskResult(rows)) == [Deliver(rows)]
    assert state.outstanding == 0


def test_sent_tasks_of_one_item_share_an_object():
    """A table of many calls is a dictionary and no objects."""
    state = client((1, 1), (2, 1), (3, 2))
    assert [task is PLAIN for task in state._tasks.values()] == [True, True, False]


def test_run_is_finished_after_its_last_results():
    """A run is over when each of its items has an answer, in ranges."""
    state = client((1, 3))
    assert state.got(TaskResult([result(1, 1, 2)])) == [Deliver([result(1, 1, 2)])]
    assert state.got(TaskResult([result(1, 0, 1)])) == [Deliver([result(1, 0, 1)]), Finished([1])]


def test_unknown_result_is_stale():
    """A result of what is over is dropped."""
    state = client((1, 1))
    state.got(TaskResult([result(1)]))
    assert state.got(TaskResult([result(1)])) == []
    assert state.stale == 1


def test_cancel():
    """A cancel sends one numbered request."""
    state = client((1, 1))
    assert state.cancel((1, FORCED)) == [Send(TaskCancel([(1, 1, FORCED)]))]


def test_several_cancels_go_in_one_message():
    """Many cancels make one message; what is over is left out."""
    state = client((1, 1), (2, 1), (3, 4))
    state.got(TaskResult([result(2)]))
    out = state.cancel((1, FORCED), (2, FORCED), (3, SOFT))
    assert out == [Send(TaskCancel([(1, 1, FORCED), (3, 2, SOFT)]))]


def test_old_refusal_after_the_end_of_a_request():
    """A CancelFailed of an older request that arrives late is stale."""
    state = client((1, 1))
    state.cancel((1, SOFT))
    state.got(confirm(1, 1, FAILED))
    assert state.got(confirm(1, 1, FAILED)) == []
    assert state.stale == 1


# CANCELING


def canceling(kind=FORCED, items=1):
    """Return a client with task 1 in CANCELING, by request 1."""
    state = client((1, items))
    state.cancel((1, kind))
    return state


@pytest.mark.parametrize("kind", [SOFT, FORCED])
def test_canceled(kind):
    """Canceled ends the task."""
    state = canceling(kind)
    assert state.got(confirm(1, 1)) == [Cancelled([(1, 0, 1, "CANCELED")]), Finished([1])]
    assert state.outstanding == 0


def test_not_found():
    """NotFound ends all that is left of the task."""
    state = canceling(items=3)
    assert state.got(confirm(1, 1, NOT_FOUND, 0, 0)) == [Cancelled([(1, REST, 3, "NOT_FOUND")]), Finished([1])]


@pytest.mark.parametrize("ending", [ResultKind.VALUE, ResultKind.ERROR, ResultKind.DIED])
def test_result_after_a_forced_request(ending):
    """A result after a forced request answers it, and is dropped."""
    state = canceling(FORCED)
    out = state.got(TaskResult([result(1, kind=ending)]))
    assert out == [Cancelled([(1, 0, 1, "FINISHED_FIRST")]), Finished([1])]


@pytest.mark.parametrize("ending", [ResultKind.VALUE, ResultKind.ERROR, ResultKind.DIED])
def test_result_after_a_soft_request(ending):
    """A result after a soft request is delivered: a shutdown that takes back what has not started loses no value."""
    state = canceling(SOFT)
    assert state.got(TaskResult([result(1, kind=ending)])) == [Deliver([result(1, kind=ending)]), Finished([1])]


def test_refused():
    """CancelFailed ends the request: the call completes normally, and another cancel may be made."""
    state = canceling(SOFT)
    assert state.got(confirm(1, 1, FAILED)) == [CancelRefused([1])]
    assert state.cancel((1, SOFT)) == [Send(TaskCancel([(1, 2, SOFT)]))]
    assert state.got(confirm(1, 2, FAILED)) == [CancelRefused([1])]
    assert state.got(TaskResult([result(1)])) == [Deliver([result(1)]), Finished([1])]


def test_unproven():
    """A Canceled that nobody can prove is told apart."""
    state = canceling()
    assert state.got(confirm(1, 1, proven=False))[0] == Cancelled([(1, 0, 1, "UNCONFIRMED")])


def test_second_cancel_joins_the_first():
    """While a request is outstanding nothing is sent, unless it raises soft to forced."""
    state = canceling(SOFT)
    assert state.cancel((1, SOFT)) == []
    assert state.cancel((1, FORCED)) == [Send(TaskCancel([(1, 2, FORCED)]))]
    assert state.cancel((1, SOFT)) == [] and state.cancel((1, FORCED)) == []


def test_refusal_of_an_older_request():
    """The soft request's CancelFailed says nothing about the forced one that was sent after it."""
    state = canceling(SOFT)
    state.cancel((1, FORCED))
    assert state.got(confirm(1, 1, FAILED)) == []
    assert state.got(confirm(1, 2)) == [Cancelled([(1, 0, 1, "CANCELED")]), Finished([1])]


def test_success_of_an_older_request():
    """Canceled counts whichever request it answers."""
    state = canceling(SOFT)
    state.cancel((1, FORCED))
    assert state.got(confirm(1, 1))[0] == Cancelled([(1, 0, 1, "CANCELED")])


def test_soft_cancel_of_a_run():
    """Of a run that is taken back softly, items that had started are delivered."""
    state = canceling(SOFT, items=4)
    assert state.got(confirm(1, 1, first=2, count=2)) == [Cancelled([(1, 2, 2, "CANCELED")])]
    out = state.got(TaskResult([result(1, 0, 2)]))
    assert out == [Deliver([result(1, 0, 2)]), Finished([1])]


def test_forced_cancel_of_a_run():
    """Of a run that is stopped, items that finished first are dropped."""
    state = canceling(FORCED, items=4)
    assert state.got(TaskResult([result(1, 0, 2)])) == [Cancelled([(1, 0, 2, "FINISHED_FIRST")])]
    assert state.got(confirm(1, 1, first=2, count=2)) == [Cancelled([(1, 2, 2, "CANCELED")]), Finished([1])]


def test_refusal_of_a_part_of_a_run():
    """A part that runs on says nothing about the others."""
    state = canceling(SOFT, items=4)
    assert state.got(confirm(1, 1, FAILED, 0, 2)) == []
    assert state.got(confirm(1, 1, first=2, count=2)) == [Cancelled([(1, 2, 2, "CANCELED")])]


def test_result_and_confirm_of_others_in_one_batch():
    """Plain and cancelled tasks of one message are told apart, in order."""
    state = client((1, 1), (2, 1), (3, 1))
    state.cancel((2, FORCED))
    out = state.got(TaskResult([result(1), result(2), result(3)]))
    assert out == [Deliver([result(1), result(3)]), Cancelled([(2, 0, 1, "FINISHED_FIRST")]), Finished([2])]


# The scheduler is lost


def test_scheduler_lost():
    """Pending tasks are lost, those being cancelled are cancelled, unconfirmed."""
    state = client((1, 1), (2, 3))
    state.cancel((2, FORCED))
    out = lost(state)
    assert out == [Cancelled([(2, REST, 3, "UNCONFIRMED")]), Lost([1], "gone"), Finished([1, 2])]
    assert lost(state) == []


def test_submit_after_the_loss():
    """What is submitted to a lost scheduler is lost at once; what is cancelled in the same batch is cancelled."""
    state = client()
    lost(state)
    assert state.submit((1, 1)) == [Lost([1], "gone")]
    assert state.submit((2, 1), cancels=[(2, SOFT)]) == [Cancelled([(2, REST, 1, "CANCELED")]), Finished([2])]


def test_refused_by_the_scheduler():
    """A scheduler that refuses the client is lost, with its reason."""
    state = Client()
    state.submit((1, 1))
    assert state.got(Refused("full"))[0] == Lost([1], "the scheduler refused this client: full")


def test_what_calls_print_is_shown():
    """Whatever calls print is shown, also when they are being cancelled or over."""
    rows = [(1, 1, 0, b"a\n"), (0, 2, 3, b""), (9, 3, 0, b"x")]
    state = client((1, 1))
    assert state.got(Output(rows)) == [Show(rows)]
    state.submit(cancels=[(1, FORCED)])
    assert state.got(Output(rows)) == [Show(rows)]


@pytest.mark.parametrize(
    "message",
    [
        Welcome(1),
        TaskResult([result(1, 0, 0)]),
        TaskResult([result(1, 0, 4)]),
        TaskCancelConfirm([(1, 0, CANCELED, 0, 1, True)]),
    ],
)
def test_scheduler_breaks_the_protocol(message):
    """A scheduler that breaks the protocol is lost."""
    out = client((1, 3)).got(message)
    assert [type(instruction) for instruction in out][-2:] == [Lost, Finished]


def test_scheduler_of_another_version():
    """A scheduler of another version is lost, with both versions."""
    assert "version 99" in Client().got(Welcome(1, version=99))[0].reason


# The rest


def test_running_and_broken():
    """RUNNING is passed on for what is outstanding; so is why no worker can be started."""
    state = client((1, 1))
    assert state.got(TaskRunning([1, 2])) == [Running([1])]
    assert state.got(WorkersBroken(1, "no")) == [Broken("no")]


def test_inheritance_lost():
    """What calls counted on is pickled elsewhere and then sent, behind the calls; unless it comes too late."""
    state = client((1, 1))
    assert state.got(InheritanceLost(1, "lost")) == [Disinherited("lost")]
    definitions = [Function(0, "g", b"blob")]
    sent = Send(InheritanceReplaced(0, definitions))
    assert state.on(Batch([(2, 1, 0, b"")], definitions=definitions))[1:] == [sent]
    assert state.on(Batch(definitions=[])) == [Send(InheritanceReplaced(0, []))]
    state.got(TaskResult([result(1), result(2)]))
    state.on(CloseAsked())
    assert state.on(Batch(definitions=definitions)) == []


def test_inheritance_replaced_for_a_scheduler_that_is_lost():
    """Nobody is told."""
    state = client()
    state.on(SchedulerLost("gone"))
    assert state.on(Batch(definitions=[])) == []


def test_close():
    """Bye is said when nothing is outstanding, once."""
    state = client((1, 1))
    assert state.on(CloseAsked()) == []
    assert state.got(TaskResult([result(1)])) == [Deliver([result(1)]), Send(Bye()), Closed()]
    assert state.on(CloseAsked()) == []


def test_close_before_the_welcome():
    """Bye waits for the Welcome."""
    state = Client()
    assert state.on(CloseAsked()) == []
    assert state.got(Welcome(1)) == [Send(Bye()), Closed()]


def test_close_after_the_loss():
    """Nothing is said to a scheduler that is gone."""
    state = client()
    lost(state)
    assert state.on(CloseAsked()) == [Closed()]


def test_after_bye():
    """A submission after Bye is our own bug; a cancel is a lost race."""
    state = client()
    state.on(CloseAsked())
    assert state.cancel((1, FORCED)) == []
    with pytest.raises(LocalProtocolError):
        state.submit((1, 1))


def test_functions_travel_with_the_batch():
    """Functions and what is to be forgotten go with the tasks that need them."""
    function = Function(1, "f", b"blob")
    out = client().on(Batch([(1, 1, 1, b"")], [function], [7], []))
    assert out == [Send(TaskSubmit([(1, 1, 1, b"")], [function], [7]))]


def test_outstanding_tasks():
    """What is outstanding is told oldest first."""
    state = client((1, 2), (3, 1), (4, 1))
    state.got(TaskResult([result(1)]))
    assert state.outstanding_tasks() == [1, 3, 4]


def test_story():
    """The story of a task tells its cancels."""
    state = canceling(SOFT)
    state.got(confirm(1, 1, FAILED))
    assert [(step.event, step.after) for step in state.story(1)] == [
        ("cancel SOFT", "CANCELING"),
        ("CancelFailed", "SENT"),
    ]
    assert state.next_deadline() is None
