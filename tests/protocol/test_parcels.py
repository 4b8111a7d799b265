"""Large payloads in pieces: everything arrives, in the order that matters, and nothing else waits for it."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaler_executor.protocol import parcels
from scaler_executor.protocol.codec import Decoder, RemoteProtocolError
from scaler_executor.protocol.messages import (
    AgentCapacity,
    AgentConfirm,
    AgentResult,
    Blocked,
    Bye,
    CancelKind,
    ClientGone,
    ClientLimit,
    Frames,
    Function,
    Message,
    Output,
    TaskCancel,
    TaskResult,
    TaskRun,
    TaskRunning,
    TaskSubmit,
    Unblocked,
)
from scaler_executor.protocol.parcels import MAX_IN_PIECES, Inbox, Outbox, Packet
from scaler_executor.protocol.precedence import PIECE_BYTES

ANY = Decoder(
    AgentCapacity
    | AgentConfirm
    | AgentResult
    | Blocked
    | Bye
    | ClientGone
    | ClientLimit
    | Output
    | TaskCancel
    | TaskResult
    | TaskRun
    | TaskRunning
    | TaskSubmit
    | Unblocked
)


class Way:
    """An outbox and the inbox at the other end."""

    def __init__(self):
        self.outbox, self.inbox = Outbox(), Inbox()
        self.arrived: list[Message] = []
        #: Of each packet: the blob that it is a piece of, 0 for a message.
        self.pieces: list[int] = []

    def put(self, *messages):
        for message in messages:
            self.outbox.put(message)

    def move(self, packets=10**9):
        """Carry so many packets. Return the messages that came with them."""
        arrived = []
        while packets and (packet := self.outbox.take()) is not None:
            packets -= 1
            self.pieces.append(packet.piece_of)
            if (parts := self.inbox.put(packet)) is not None:
                arrived.append(ANY.decode(*parts))
        self.arrived += arrived
        return arrived

    def check_over(self):
        assert self.outbox.pending_bytes == 0 and not self.outbox._waiting and not self.outbox._ready
        assert not self.inbox._blobs and self.inbox._bytes == 0


def large(pieces=4, fill=b"x"):
    return Frames([fill, bytearray(fill * PIECE_BYTES * pieces)])


def run(task_id, payload=b"", client_id=1, function_id=1):
    return TaskRun([(task_id, 1, client_id, 1, 0, function_id, payload)])


def submit(no, payload=b""):
    return TaskSubmit([(no, 1, 1, payload)])


def cancel(task_id, kind=CancelKind.FORCED):
    return TaskCancel([(task_id, 1, int(kind))])


def same(left, right):
    def plain(value):
        if isinstance(value, Frames):
            return [bytes(buffer) for buffer in value.buffers]
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        if hasattr(value, "__struct_fields__"):
            return [type(value), *(plain(getattr(value, name)) for name in value.__struct_fields__)]
        return value

    return plain(left) == plain(right)


def test_small_is_one_packet():
    """What is small goes at once, as it is, encoded or not."""
    way = Way()
    way.put(submit(1, b"a"))
    assert way.outbox.put_encoded(*way.outbox._encoder.encode(submit(2, b"b")))
    assert way.move() == [submit(1, b"a"), submit(2, b"b")]
    assert way.pieces == [0, 0]
    way.check_over()


def test_large_goes_in_pieces():
    """A large payload goes ahead in pieces, and its message follows."""
    way = Way()
    way.put(run(1, large(4)))
    assert way.move(4) == []
    (message,) = way.move()
    assert same(message, run(1, large(4)))
    assert way.pieces == [1, 1, 1, 1, 0]
    way.check_over()


def test_large_header():
    """A header that is large goes in pieces too."""
    way = Way()
    rows = [(no, 1, 1, b"x" * 1000) for no in range(1, 500)]
    way.put(TaskSubmit(rows))
    assert way.move() == [TaskSubmit(rows)] and len(way.pieces) == 9
    way.check_over()


def test_encoded_must_be_known_while_others_wait():
    """What is large, or may have to wait behind what is large, is not taken unseen."""
    outbox = Outbox()
    header, frames = outbox._encoder.encode(submit(1, large()))
    assert not outbox.put_encoded(header, frames)
    outbox.put(submit(1, large()))
    assert not outbox.put_encoded(*outbox._encoder.encode(cancel(7)))


@pytest.mark.parametrize(
    ("waiting", "message", "overtakes"),
    [
        (run(1, large()), run(2), True),
        (run(1, large()), run(2, client_id=2), True),
        (run(1, large()), cancel(2), True),
        (run(1, large()), AgentCapacity(1, 1), True),
        (run(1, large()), TaskRun([(2, 1, 1, 1, 0, 2, b"")], [(1, Function(2, "f", b""))]), True),
        (run(1, large()), TaskRun([], [(1, Function(1, "f", b""))]), False),
        (run(1, large()), TaskRun([], [], [(1, 1)]), False),
        (run(1, large()), TaskRun([], [], [(1, 2)]), True),
        (TaskRun([], [(1, Function(1, "d", large()))]), TaskRun([], [(1, Function(2, "f", b"", needs=[1]))]), False),
        (TaskRun([], [(1, Function(1, "d", large()))]), ClientGone(1), False),
        (run(1, large()), TaskRun([(2, 1, 2, 1, 0, 2, b"")], [(2, Function(2, "f", b""))]), True),
        (run(1, large()), ClientGone(1), False),
        (run(1, large()), ClientGone(2), True),
        (run(1, large()), ClientLimit(1, 0, None, 1), False),
        (run(1, large()), cancel(1, CancelKind.RECALL), False),
        (run(1, large()), Bye(), False),
        (TaskRun([], [(1, Function(1, "f", large()))]), run(1), False),
        (TaskRun([], [(1, Function(1, "f", large()))]), run(1, client_id=2), True),
        (submit(1, large()), submit(2), False),
        (submit(1, large()), cancel(2), True),
        (submit(1, large()), Bye(), False),
        (TaskResult([(1, 0, 1, 0, large())]), TaskResult([(2, 0, 1, 0, b"")]), True),
        (TaskResult([(1, 0, 1, 0, large())]), TaskResult([(1, 1, 1, 0, b"")]), False),
        (TaskResult([(1, 0, 1, 0, large())]), TaskRunning([1]), False),
        (AgentResult([(1, 1, 0, 1, 0, large())]), AgentConfirm([(2, 1, 1, 0, 0)]), True),
        (AgentResult([(1, 1, 0, 1, 0, large())]), AgentConfirm([(1, 1, 1, 0, 0)]), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Message) else str(value),
)
def test_what_overtakes(waiting, message, overtakes):
    """What has nothing to do with a message in pieces overtakes it, and nothing else does."""
    way = Way()
    way.put(waiting)
    way.move(1)
    way.put(message)
    assert (way.move(1) == [message]) is overtakes
    way.move()
    assert len(way.arrived) == 2 and same(way.arrived[1 if not overtakes else 0], message)
    way.check_over()


PRINTED = Output([(3, 1, 0, b"a line\n")])


@pytest.mark.parametrize(
    ("messages", "order"),
    [
        ([AgentResult([(1, 1, 0, 1, 0, large())]), PRINTED, AgentConfirm([(2, 1, 1, 0, 0)])], [1, 2, 0]),
        ([Output([(3, 1, 0, b"x" * PIECE_BYTES)]), PRINTED, AgentResult([(3, 1, 0, 1, 0, b"")])], [0, 1, 2]),
        ([Output([(3, 1, 0, b"x" * PIECE_BYTES)]), Output([(2, 1, 0, b"")]), Blocked([2])], [0, 1, 2]),
        ([AgentResult([(1, 1, 0, 1, 0, large())]), Blocked([2]), Unblocked([2]), Blocked([1])], [1, 2, 0, 3]),
    ],
)
def test_prints_and_waits_hold_nothing_up(messages, order):
    """They wait for nothing but what is said of their own calls; prints keep their order, and go before results."""
    way = Way()
    way.put(*messages)
    assert [next(i for i, sent in enumerate(messages) if same(sent, got)) for got in way.move()] == order
    way.check_over()


def test_rows_are_told_apart():
    """Small rows do not wait for a large one of the same message, except in a client's submit, which is in order."""
    way = Way()
    rows = [(1, 1, 1, 1, 0, 1, b"a"), (2, 1, 1, 1, 0, 1, large()), (3, 1, 1, 1, 0, 1, b"c")]
    way.put(TaskRun(rows))
    way.move()
    assert [[row[0] for row in message.tasks] for message in way.arrived] == [[1], [3], [2]]
    way.put(TaskSubmit([(row[0], 1, 1, row[-1]) for row in rows]))
    assert [[row[0] for row in message.tasks] for message in way.move()] == [[1], [2], [3]]
    way.check_over()


def test_functions_go_before_their_calls():
    """A large function, or one that a large call needs, comes first."""
    way = Way()
    function = Function(1, "f", large(2))
    way.put(TaskSubmit([(1, 1, 1, large())], [function], forget=[9]))
    first, second, third = way.move()
    assert first.functions[0].function_id == 1 and second.tasks[0][0] == 1 and third.forget == [9]
    way.check_over()


def test_pieces_take_turns():
    """Of several large messages each has its turn: a short one does not wait for a long one."""
    way = Way()
    way.put(run(1, large(50)), run(2, large(3)))
    way.move(10)
    assert [message.tasks[0][0] for message in way.arrived] == [2]
    assert way.pieces.count(1) in (3, 4, 5, 6)
    way.move()
    way.check_over()


def test_what_is_short_does_not_wait_for_many():
    """A short one takes every other turn, however many long ones there are; and so do those all the same."""
    way = Way()
    way.put(*(run(task_id, large(50), client_id=1) for task_id in range(1, 21)), run(99, large(3), client_id=2))
    way.move(8)
    assert [message.tasks[0][0] for message in way.arrived] == [99]
    way.put(*(run(task_id, large(1)) for task_id in range(100, 120)))
    way.move(60)
    assert len(way.arrived) == 21
    assert min(way.pieces.count(blob) for blob in range(1, MAX_IN_PIECES + 1)) >= 2
    way.move()
    way.check_over()


def test_what_is_begun_is_limited(monkeypatch):
    """The receiver has no more to keep than it allows: large messages are begun when there is room for them, in order,
    one that is larger than that alone; short ones are not kept waiting for that."""
    monkeypatch.setattr(parcels, "BEGUN_BYTES", 10 * PIECE_BYTES)
    monkeypatch.setattr(parcels, "SMALL_BYTES", 2 * PIECE_BYTES)
    way = Way()
    way.put(*(run(task_id, large(pieces)) for task_id, pieces in enumerate([4, 4, 30, 4, 20, 3], 1)), run(7, large(1)))
    most = 0
    while way.outbox._waiting:
        way.move(1)
        begun = [
            waiting for waiting in way.outbox._waiting if waiting.is_begun and waiting.size_bytes > 3 * PIECE_BYTES
        ]
        most = max(most, len(begun))
        assert len(begun) == 1 or sum(waiting.size_bytes for waiting in begun) <= 10 * PIECE_BYTES
    way.move()
    assert most == 2
    assert [message.tasks[0][0] for message in way.arrived if message.tasks[0][0] != 7] == [1, 2, 3, 4, 5, 6]
    assert 7 in [message.tasks[0][0] for message in way.arrived[:2]]
    way.check_over()


def test_rows_that_must_wait_are_parted_from_others():
    """A row about a task that waits does not keep those beside it waiting, nor does another client's function."""
    way = Way()
    way.put(AgentResult([(1, 1, 0, 1, 0, large())]))
    way.move(1)
    way.put(AgentConfirm([(1, 1, 1, 0, 0), (2, 1, 1, 0, 0)]), AgentResult([(1, 1, 1, 1, 0, b""), (3, 1, 0, 1, 0, b"")]))
    assert way.move(2) == [AgentConfirm([(2, 1, 1, 0, 0)]), AgentResult([(3, 1, 0, 1, 0, b"")])]
    way.move()
    assert way.arrived[-2:] == [AgentConfirm([(1, 1, 1, 0, 0)]), AgentResult([(1, 1, 1, 1, 0, b"")])]
    way.put(TaskRun([], [(1, Function(1, "f", large()))]))
    way.move(1)
    way.put(TaskRun([(1, 1, 1, 1, 0, 1, b""), (2, 1, 2, 1, 0, 1, b"")]))
    assert way.move(1) == [run(2, client_id=2)]
    way.move()
    assert way.arrived[-1] == run(1)
    way.check_over()


def test_many_rows_are_several_messages():
    """What one message says never takes its receiver long: whole queues are cancelled, and confirmed, piecemeal."""
    cancels = [(no, 1, int(CancelKind.FORCED)) for no in range(1, 2501)]
    for message, rows in (
        (TaskCancel(cancels), "cancels"),
        (TaskSubmit([(no, 1, 1, b"") for no, _, _ in cancels]), "tasks"),
        (TaskRun([(no, 1, 1, 1, 0, 1, b"") for no, _, _ in cancels]), "tasks"),
        (TaskResult([(no, 0, 1, 0, b"") for no, _, _ in cancels]), "results"),
    ):
        way = Way()
        way.put(message)
        parts = [getattr(part, rows) for part in way.move()]
        if rows == "cancels":
            parts.reverse()  # or what is queued would start when those before it are cancelled, to be stopped as well
        assert [len(part) for part in parts] == [1000, 1000, 500]
        assert [row for part in parts for row in part] == getattr(message, rows)
        way.check_over()


def test_many_requests_for_the_same_keep_their_order():
    """The newest request for a task is the last one that arrives."""
    way = Way()
    rows = [(no, cancel_no, int(CancelKind.FORCED)) for cancel_no in (1, 2) for no in range(1, 1001)]
    way.put(TaskCancel(rows))
    assert [row for part in way.move() for row in part.cancels] == rows


def test_small_ones_alone():
    """What is small can be had without what is large."""
    outbox = Outbox()
    outbox.put(run(1, large()))
    assert outbox.take(with_pieces=False) is None
    outbox.put(run(2))
    assert outbox.take(with_pieces=False).piece_of == 0 and outbox.take(with_pieces=False) is None
    assert outbox.take().piece_of == 1


def test_cancelled_submit_is_withdrawn():
    """What is cancelled before it was submitted is not submitted, whether begun or waiting, and the cancel goes at
    once."""
    way = Way()
    way.put(submit(1, large(50)), TaskSubmit([(2, 1, 1, b""), (3, 1, 1, b"")]), submit(4, large()))
    way.move(5)
    for no in (2, 4):
        for kind in CancelKind.SOFT, CancelKind.FORCED:
            way.put(cancel(no, kind))
            assert way.move(1) == [cancel(no, kind)]
    way.put(cancel(1))
    assert way.move() == [TaskSubmit([(3, 1, 1, b"")]), cancel(1)]
    way.check_over()


def test_withdrawn_submit_leaves_its_function():
    """The function of a withdrawn call may be needed by a later one, and arrives."""
    way = Way()
    way.put(TaskSubmit([(1, 1, 1, large())], [Function(1, "f", large(2))]), submit(2))
    way.move(1)
    way.put(cancel(1))
    way.move()
    assert [type(message) for message in way.arrived] == [TaskCancel, TaskSubmit, TaskSubmit]
    assert way.arrived[1].functions[0].function_id == 1 and way.arrived[2] == submit(2)
    way.check_over()


@pytest.mark.parametrize("begun", [0, 2, 4])
def test_run_that_is_stopped_goes_without_payload(begun):
    """An agent has to answer for a call that is cancelled by force: it gets it without the payload."""
    way = Way()
    way.put(run(1, large(50)))
    way.move(begun)
    way.put(cancel(1))
    assert way.move() == [run(1), cancel(1)]
    assert way.outbox.pending_bytes == 0
    way.check_over()


@pytest.mark.parametrize("kind", [CancelKind.RECALL, CancelKind.SOFT])
def test_run_that_may_run_on_keeps_its_payload(kind):
    """A recall, or a soft cancel, may find the call running: it has its payload then."""
    way = Way()
    way.put(run(1, large(5)))
    way.move(2)
    way.put(cancel(1, kind))
    first, second = way.move()
    assert same(first, run(1, large(5))) and second == cancel(1, kind)
    way.check_over()


def test_forced_after_soft():
    """A forced cancel behind a soft one that waits lets both go."""
    way = Way()
    way.put(run(1, large(50)))
    way.move(2)
    way.put(cancel(1, CancelKind.SOFT), cancel(1))
    assert way.move() == [run(1), cancel(1, CancelKind.SOFT), cancel(1)]
    way.check_over()


@pytest.mark.parametrize(
    "packets",
    [
        [Packet([b"a", b"b"], 1)],
        [Packet([], 1)],
        [Packet([b"a"], -1)],
        [Packet([b"a"], 1, False, [(0, 1)])],
        [Packet([b"a"], 1, True), Packet([b"b"], 1)],
        [Packet([b"a"], 1), Packet([b"head"], 0, False, [(1, 1)])],
        [Packet([b"head"], 0, False, [(1, 1)])],
        [Packet([b"a"], 1, True), Packet([b"head"], 0, False, [(3, 1)])],
        [Packet([])],
        [Packet([b"x" * 11], 1)],
    ],
    ids=[
        "a piece of two parts",
        "a piece of none",
        "a negative blob",
        "a piece with blobs",
        "a blob twice",
        "an unfinished blob",
        "a missing blob",
        "a blob nowhere",
        "no parts",
        "too much",
    ],
)
def test_broken_protocol(packets):
    """What does not fit together is refused."""
    inbox = Inbox(max_bytes=10)
    with pytest.raises(RemoteProtocolError):
        for packet in packets:
            inbox.put(packet)


def test_given_up_blob_is_let_go():
    """The receiver keeps nothing of what was given up, finished or not."""
    inbox = Inbox()
    for last in (False, True):
        assert inbox.put(Packet([b"abc"], 7, last)) is None
        assert inbox.put(Packet([b""], 7, True)) is None
    assert not inbox._blobs and inbox._bytes == 0


# Any sequence

sizes = st.sampled_from([0, 10, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, 20 * PIECE_BYTES])


def payload_of(size):
    return b"x" * size if size <= PIECE_BYTES else Frames([b"head", bytearray(size)])


class Numbers:
    """Draws messages whose order can be told at the other end."""

    def __init__(self):
        self.last = 0

    def next(self, step=1):
        self.last += step
        return self.last


runs = st.tuples(
    st.just("run"), st.lists(st.tuples(st.integers(1, 3), sizes), min_size=1, max_size=4), st.integers(0, 3)
)
submits = st.tuples(st.just("submit"), st.lists(sizes, min_size=1, max_size=4), sizes)
results = st.tuples(st.just("result"), st.lists(st.tuples(st.integers(1, 4), sizes), min_size=1, max_size=4))
others = st.tuples(st.just("other"), st.sampled_from([Bye(), ClientGone(1), ClientGone(2), AgentCapacity(3, 3)]))
moves = st.tuples(st.just("move"), st.integers(1, 30))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(runs, results, others, moves), max_size=25))
def test_everything_arrives_in_order(steps):
    """Whatever is sent arrives, whole and once; what is about one task or one client is in order, and so is whatever a
    barrier stands between."""
    way, counter = Way(), Numbers()
    sent, sizes_sent = defaultdict(list), {}
    barrier = 0
    for kind, *details in steps:
        if kind == "move":
            way.move(details[0])
        elif kind == "run":
            rows, function_of = details
            message = TaskRun([(counter.next(), 1, client, 1, 0, 1, payload_of(size)) for client, size in rows])
            if function_of:
                message.functions = [(function_of, Function(counter.next(), "f", b""))]
            for (client, size), row in zip(rows, message.tasks, strict=True):
                sent["calls of", client].append(row[0])
                sizes_sent[row[0]] = size
            way.put(message)
        elif kind == "result":
            message = TaskResult([(task, counter.next(), 1, 0, payload_of(size)) for task, size in details[0]])
            for (task, size), row in zip(details[0], message.results, strict=True):
                sent["results of", task].append(row[1])
                sizes_sent[row[1]] = size
            way.put(message)
        else:
            barrier += isinstance(details[0], Bye)
            way.put(details[0])
        assert way.outbox.pending_bytes >= 0
    way.move()
    way.check_over()
    got = defaultdict(list)
    for message in way.arrived:
        if isinstance(message, TaskRun):
            for row in message.tasks:
                got["calls of", row[2]].append(row[0])
                assert (len(row[-1]) if row[-1] else 0) in (sizes_sent[row[0]], sizes_sent[row[0]] + 4)
        elif isinstance(message, TaskResult):
            for row in message.results:
                got["results of", row[0]].append(row[1])
                assert (len(row[-1]) if row[-1] else 0) in (sizes_sent[row[1]], sizes_sent[row[1]] + 4)
    assert sum(isinstance(message, Bye) for message in way.arrived) == barrier
    for key, numbers in sent.items():
        # Calls of a client are told apart by their numbers: at an agent they may overtake each other.
        assert got[key] == numbers if key[0] == "results of" else sorted(got[key]) == numbers


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            submits, moves, st.tuples(st.just("cancel"), st.integers(0, 10**6), st.sampled_from(list(CancelKind)))
        ),
        max_size=25,
    )
)
def test_submits_and_cancels(steps):
    """Submits stay in order, each with its functions before it; a cancelled one comes whole before its cancel, or not
    at all."""
    way, counter, functions = Way(), Numbers(), Numbers()
    sent, cancelled = {}, set()
    for kind, *details in steps:
        if kind == "move":
            way.move(details[0])
        elif kind == "submit":
            function = Function(functions.next(), "f", payload_of(details[1]))
            message = TaskSubmit(
                [(counter.next(), 1, functions.last, payload_of(size)) for size in details[0]], [function]
            )
            sent.update((row[0], len(row[-1])) for row in message.tasks)
            way.put(message)
        elif counter.last:
            no = details[0] % counter.last + 1
            cancelled.add(no)
            way.put(TaskCancel([(no, 1, int(details[1]))]))
    way.move()
    way.check_over()
    seen, known, told = [], set(), set()
    for message in way.arrived:
        if isinstance(message, TaskCancel):
            told |= {row[0] for row in message.cancels}
            continue
        known |= {function.function_id for function in message.functions}
        for no, _, function_id, payload in message.tasks:
            assert function_id in known and no not in told and len(payload) == sent[no]
            seen.append(no)
    assert seen == sorted(seen) and set(sent) - set(seen) <= cancelled and told == cancelled
    assert known == set(range(1, functions.last + 1))
