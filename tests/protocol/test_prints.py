"""What calls print, on its way through agent and scheduler: which call, in which order, and how much of it."""

import pytest

from scaler_executor.protocol.agent import Exited, Printed, Seen, Send, Tick
from scaler_executor.protocol.agent_prints import (
    BURST_BYTES,
    KEPT_BYTES,
    LAST_BYTES,
    MAX_LINE_BYTES,
    RATE_BYTES,
)
from scaler_executor.protocol.messages import Bye, Hello, Nested, Output
from scaler_executor.protocol.printed import FLUSHED, LOG, MAX_LOST, STDERR, STDOUT
from scaler_executor.protocol.scheduler import Congested, Drop
from scaler_executor.protocol.scheduler import Send as SchedulerSend

from .test_agent import BASE, REPORT, died, held, result, running, two_held, value
from .test_nesting import SESSION, with_children
from .test_scheduler import AGENT, CLIENT, OTHER_AGENT, OTHER_CLIENT, with_task
from .test_scheduler import result as task_result

LINE = b"x" * 99 + b"\n"


def output(*rows):
    """Rows: (number of the task, stream, lost, data)."""
    return Send(Output([(BASE + no, *row) for no, *row in rows]))


def printed(state, *rows, worker=1):
    """Rows: (seq, kind, lost, data)."""
    return state.on(Printed(worker, list(rows)))


def rows_of(out):
    return [row for sent in out if isinstance(sent.message, Output) for row in sent.message.rows]


# The agent: lines


def test_lines_go_on_at_once():
    """Whole lines are sent as they come, in order, with the task that printed them."""
    state = held()
    rows = [(2, STDOUT, 0, b"a\nb\n"), (2, STDERR, 0, b"c\n"), (2, LOG, 0, b"record"), (2, STDOUT, 0, b"d\n")]
    assert printed(state, *rows) == [
        output((1, STDOUT, 0, b"a\nb\n"), (1, STDERR, 0, b"c\n"), (1, LOG, 0, b"record"), (1, STDOUT, 0, b"d\n"))
    ]
    assert state.next_deadline() is not None  # of the call, not of this
    assert not state._prints.pending


def test_the_begin_of_a_line_waits_for_its_end():
    """It is joined to its end, of whichever stream is printed meanwhile."""
    state = held()
    assert printed(state, (2, STDOUT, 0, b"a\nbeg")) == [output((1, STDOUT, 0, b"a\n"))]
    assert printed(state, (2, STDERR, 0, b"c\n")) == [output((1, STDERR, 0, b"c\n"))]
    assert printed(state, (2, STDOUT, 0, b"un\nd")) == [output((1, STDOUT, 0, b"begun\n"))]


def test_what_is_flushed_goes_on_at_once():
    """So a call shows its progress."""
    state = held()
    assert printed(state, (2, STDOUT, 0, b"50 %")) == []
    assert printed(state, (2, STDOUT | FLUSHED, 0, b"")) == [output((1, STDOUT, 0, b"50 %"))]


def test_a_long_line_goes_on_in_parts_of_whole_characters():
    """The agent does not keep a line without an end."""
    state = held()
    text = "\u20ac".encode() * MAX_LINE_BYTES
    out = printed(state, (2, STDOUT, 0, text[:-1]))
    assert rows_of(out) == [(BASE + 1, STDOUT, 0, text[:-3])]
    assert printed(state, (2, STDOUT | FLUSHED, 0, text[-1:])) == [output((1, STDOUT, 0, text[-3:]))]


def test_all_of_it_comes_before_the_result():
    """The begin of a line is sent when its call is over, before that is said."""
    state = held()
    assert printed(state, (2, STDOUT, 0, b"the end")) == []
    assert state.records(value(2)) == [output((1, STDOUT, 0, b"the end")), result(1)]


def test_all_of_it_comes_before_the_death():
    """So it is with a worker that dies."""
    state = running()
    assert printed(state, (2, STDOUT, 0, b"the end")) == []
    out = state.on(Exited(1, 2, 1, 0, REPORT))
    assert out[0] == output((1, STDOUT, 0, b"the end"))
    assert died(1) in out[1:]


def test_the_result_of_another_call_tears_no_line():
    """What the call that goes on has begun waits for its end."""
    state = two_held()
    assert printed(state, (2, STDOUT, 0, b"first"), (3, STDOUT, 0, b"sec")) == [output((1, STDOUT, 0, b"first"))]
    assert state.records(value(2)) == [result(1)]
    assert printed(state, (3, STDOUT, 0, b"ond\n")) == [output((2, STDOUT, 0, b"second\n"))]


def test_what_is_of_no_call():
    """Before the first call, and after its own is over, it is sent without a task."""
    state = held()
    assert state.records(value(2)) == [result(1)]
    assert printed(state, (2, STDOUT, 0, b"late\n"), (0, STDERR, 0, b"idle\n")) == [
        output((0, STDOUT, 0, b"late\n"), (0, STDERR, 0, b"idle\n"))
    ]


def test_a_dead_worker_prints_nothing():
    """What is said of one that is not there is dropped."""
    assert printed(held(), (1, STDOUT, 0, b"a\n"), worker=9) == []


# The agent: how much


def flood(state, size, seq=2):
    """Print so many bytes; return the data that is sent."""
    out = []
    for _ in range(size // (100 * len(LINE))):
        out += rows_of(printed(state, (seq, STDOUT, 0, LINE * 100)))
    return out


def test_no_more_than_a_budget_is_sent():
    """A burst, and then so much a second; what waits is the end of it, and what was dropped is counted."""
    state = running()
    sent = flood(state, 4 * BURST_BYTES)
    assert BURST_BYTES * 0.9 < sum(len(row[3]) for row in sent) <= BURST_BYTES + KEPT_BYTES
    assert state._prints.pending[1].size <= KEPT_BYTES
    assert state.next_deadline() < state.now + 0.1
    rest = rows_of(state.tick(1.0))
    assert sum(len(row[3]) for row in rest) < RATE_BYTES
    lines = sum(row[2] + row[3].count(b"\n") for row in sent + rest)
    assert lines == 4 * BURST_BYTES // (100 * len(LINE)) * 100
    assert max(row[2] for row in rest) > 100_000


def test_no_number_of_lines_is_too_large():
    """A worker's page may say anything: what it says is added up to a limit."""
    state = running()
    flood(state, 2 * BURST_BYTES)
    for _ in range(2 * KEPT_BYTES // len(LINE)):
        printed(state, (2, STDOUT, MAX_LOST, LINE))
    rows = rows_of(state.tick(1.0))
    assert max(row[2] for row in rows) == MAX_LOST


def test_the_end_comes_with_the_result():
    """Of a call that has used up the budget the end is sent, until its client owes much."""
    state = running()
    flood(state, 2 * BURST_BYTES)
    out = state.records(value(2))
    last = rows_of(out)
    assert 0 < sum(len(row[3]) for row in last) <= LAST_BYTES
    assert last[-1][3].endswith(LINE)
    assert out[-1] == result(1)
    state._prints._budgets[1].spend(2 * BURST_BYTES)
    state.run((2, 1))
    flood(state, KEPT_BYTES, seq=3)
    out = rows_of(state.records(value(3)))
    assert sum(len(row[3]) for row in out) == 0 < sum(row[2] for row in out)


def test_one_client_does_not_use_anothers_budget():
    """Budgets are the clients'."""
    state = running()
    flood(state, 2 * BURST_BYTES)
    assert list(state._prints._budgets) == [1]
    state._prints.forget_client(1)
    assert rows_of(printed(state, (2, STDOUT, 0, b"again\n")))


def test_nothing_is_due_while_nothing_waits():
    """The begin of a line wakes nobody."""
    state = running()
    before = state.next_deadline()
    printed(state, (2, STDOUT, 0, b"beg"))
    assert state.next_deadline() == before
    assert state.on(Tick()) == []
    assert state.on(Seen(1, 2, 1)) == []


# The scheduler


def forwarded(*rows, peer=CLIENT):
    return [SchedulerSend(peer, Output(list(rows)))]


def test_it_is_forwarded_to_its_client():
    """Each row goes to the client, with its own number of the call."""
    state = with_task()
    rows = [(BASE + 1, STDOUT, 0, b"a\n"), (BASE, STDERR, 2, b"b\n")]
    assert state.got(AGENT, Output(rows)) == forwarded((1, STDOUT, 0, b"a\n"), (0, STDERR, 2, b"b\n"))


def test_a_call_that_is_over_or_elsewhere_is_not_named():
    """An agent speaks of its own tasks; what is said of others is of no call."""
    state = with_task()
    assert state.got(AGENT, Output([(BASE + 7, STDOUT, 0, b"a\n")])) == forwarded((0, STDOUT, 0, b"a\n"))
    state.got(OTHER_AGENT, Hello("agent", name="b"))
    assert state.got(OTHER_AGENT, Output([(BASE + 1, STDOUT, 0, b"a\n")])) == []


def test_a_client_hears_only_of_agents_that_work_for_it():
    """Others cannot have anything of its calls."""
    state = with_task()
    state.got(OTHER_CLIENT, Hello("client"))
    assert state.got(AGENT, Output([(2 * BASE, STDOUT, 0, b"a\n"), (99 * BASE, STDOUT, 0, b"a\n")])) == []


def test_a_client_that_is_behind_gets_none():
    """It is told how much it has missed."""
    state = with_task()
    state.handle(Congested(CLIENT, True), 0.0)
    assert state.got(AGENT, Output([(BASE + 1, STDOUT, 1, b"a\nb\n"), (BASE + 1, LOG, 0, b"\n\n")])) == []
    state.handle(Congested(CLIENT, False), 0.0)
    assert state.got(AGENT, Output([(BASE + 1, STDOUT, 0, b"c\n")])) == forwarded((1, STDOUT, 4, b"c\n"))
    assert state.got(AGENT, Output([(BASE + 1, STDOUT, 0, b"d\n")])) == forwarded((1, STDOUT, 0, b"d\n"))


def test_a_client_that_is_gone_gets_none():
    """Its calls are being stopped."""
    state = with_task()
    state.lost(CLIENT)
    assert state.got(AGENT, Output([(BASE + 1, STDOUT, 0, b"a\n")])) == []


@pytest.mark.parametrize("row", [(4, 0), (0, 0), (1, -1), (1, 1 << 60)])
def test_an_agent_that_makes_no_sense(row):
    """It is dropped."""
    out = with_task().got(AGENT, Output([(BASE + 1, *row, b"")]))
    assert type(out[0]) is Drop


def test_what_a_nested_call_prints():
    """Its session hears of it, to keep it, and without a call its account, which shows it; one that is behind has
    missed it, whatever the other has got."""
    state = with_children(1)
    to_session = [SchedulerSend(AGENT, Nested(7, Output([(1, STDOUT, 0, b"a\n")])))]
    row = (SESSION + 1, STDOUT, 0, b"a\n")
    assert state.got(AGENT, Output([row])) == to_session + forwarded((0, STDOUT, 0, b"a\n"))
    state.handle(Congested(CLIENT, True), 0.0)
    assert state.got(AGENT, Output([row])) == to_session
    state.handle(Congested(CLIENT, False), 0.0)
    assert state.got(AGENT, Output([(SESSION, *row[1:])])) == forwarded((0, STDOUT, 1, b"a\n"))
    state.got(AGENT, task_result(1))
    state.got(AGENT, Nested(7, Bye(force=True), 1))
    assert state.got(AGENT, Output([row])) == forwarded((0, STDOUT, 0, b"a\n"))


def test_a_client_says_nothing_of_the_kind():
    """It prints by itself."""
    state = with_task()
    assert type(state.got(CLIENT, Output([]))[0]) is Drop
