"""What a worker does with calls, runs, results and errors, in real processes."""

from __future__ import annotations

import gc
import math
import os
import sys
import weakref
from typing import Any

import numpy as np
import pytest
from forked import Agent, journal
from unpicklables import (
    FailsToLoad,
    Unpicklable,
    add,
    identity,
    make_unpicklable,
    raise_awkward,
    raise_error,
    raise_with_lock,
)

from scaler_executor.errors import RemoteError
from scaler_executor.protocol.messages import CallStyle, Function
from scaler_executor.protocol.page import RANG, RECORD_BATCH_END, RECORD_VALUE
from scaler_executor.runtime.calls import RemoteTraceback

kept: list[Any] = []


class Tracked:
    """Can be seen to be collected."""


def keep_reference() -> Tracked:
    tracked = Tracked()
    kept.append(weakref.ref(tracked))
    return tracked


def is_collected() -> bool:
    gc.collect()
    return kept[0]() is None


def fork_and_return() -> int:
    """Come back twice, as parent and as child."""
    pid = os.fork()
    if pid:
        journal[3] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return 1
    return 2


def fork_and_exit() -> int:
    """Leave the child by SystemExit."""
    pid = os.fork()
    if not pid:
        sys.exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def print_then_crash(fd: int) -> None:
    sys.stdout = os.fdopen(fd, "w")
    print("printed")


def read_stdin() -> str:
    return sys.stdin.read()


def dispositions() -> list[str]:
    import signal

    return [repr(signal.getsignal(n)) for n in (signal.SIGPIPE, signal.SIGTERM, signal.SIGCHLD)] + [
        repr(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    ]


def spin_until_read(index: int) -> int:
    """Run until the test has seen an earlier result."""
    while not journal[index]:
        pass
    return index


def wait_at_zero(number: int) -> int:
    """Wait only at zero."""
    if not number:
        spin_until_read(5)
    return number


def test_styles(agent: Agent) -> None:
    """Plain functions, lambdas, bound methods and runs of every form are called as they should be."""
    worker = agent.fork()
    calls: list[Any] = [(add, (1, 2)), (lambda x: x + 1, (1,)), ("-".join, (["a", "b"],))]
    calls += [(add, [(1,), (2,)]), (add, [(1, 2), (3, 4)]), (identity, [([1],), ({2},)])]
    seqs = worker.send(calls)
    assert [worker.value_of(seq) for seq in seqs[:3]] == [3, 2, "a-b"]
    found = [[worker.value_of(seq, item) for item in (0, 1)] for seq in seqs[3:]]
    assert found == [[1, 2], [3, 7], [[1], {2}]]


def test_run_of_part_of_a_payload(agent: Agent) -> None:
    """A row may be about some items of a longer run."""
    worker = agent.fork()
    function_id, (function,), _ = agent.table.register(agent.table.prepare(identity, CallStyle.MAP))
    assert function is not None
    payload = agent.pickler.dumps_run([(n,) for n in range(10)])
    (seq,) = worker.send_rows([(3, 4, function_id, payload)], [function])
    assert [worker.value_of(seq, item) for item in range(3)] == [4, 5, 6]


@pytest.mark.parametrize(
    "values",
    [
        [0, -1, 2**63 - 1, -(2**63), 5],
        [0.0, -0.0, math.inf, math.nan, 5e-324],
        [1, 2, 2**63, 3, 2.0, True, None, "x"],
        [1.0, 2, 1.0, False],
        [True, 1, 1.0, None],
        [2**63, 1],
        list(range(20_000)),
    ],
    ids=["integers", "floats", "mixed", "floats first", "bool first", "large first", "more than fit"],
)
def test_values_of_a_run(agent: Agent, values: list[Any]) -> None:
    """Numbers, which need no pickle, come back as what they are, whatever comes before and behind them."""
    worker = agent.fork()
    (seq,) = worker.send([(identity, [(value,) for value in values])])
    worker.value_of(seq, len(values) - 1)
    found = {item: value for _, number, item, value in worker.answers() if number == seq}
    assert [repr(found[item]) for item in range(len(values))] == [repr(value) for value in values]


def test_numbers_before_a_long_item(agent: Agent) -> None:
    """Numbers of a run can be read while a long item runs, and come once."""
    worker = agent.fork()
    (seq,) = worker.send([(wait_at_zero, [(number,) for number in (3, 2, 1, 0, 7)])])
    assert worker.value_of(seq, 2) == 1
    journal[5] = 1
    assert [worker.value_of(seq, item) for item in (3, 4)] == [0, 7]
    journal[5] = 0
    assert [record[1:] for record in worker.answers()] == [(seq, item, n) for item, n in enumerate((3, 2, 1, 0, 7))]


def test_batch_end(agent: Agent) -> None:
    """Each message ends with its duration and the number of items, and with the bell."""
    worker = agent.fork()
    worker.records.clear()
    worker.send([(add, (1, 2)), (add, [(1,), (2,), (3,)])])
    agent.wait(lambda: any(record[0] == RECORD_BATCH_END for record in worker.records))
    kind, duration_ns, items, payload = worker.records[-1]
    assert (kind, items, payload) == (RECORD_BATCH_END, 4, b"") and 0 < duration_ns < 10**10
    worker.send([(add, [(1,)])])
    agent.poller.poll()
    agent.wait(lambda: worker.page[RANG] == 0 and worker.records[-1][2] == 1)


def test_errors_land_on_their_call(agent: Agent) -> None:
    """Whatever cannot be pickled or unpickled, and every exception, is that call's error; the worker lives."""
    worker = agent.fork()
    for function, arguments, expected in [
        (raise_error, (KeyError("k"),), KeyError),
        (raise_error, (SystemExit(3),), SystemExit),
        (raise_error, (KeyboardInterrupt(),), KeyboardInterrupt),
        (raise_error, (GeneratorExit(),), GeneratorExit),
        (make_unpicklable, (), RuntimeError),
        (identity, (FailsToLoad(),), ValueError),
        (raise_awkward, (), RemoteError),
        (raise_with_lock, (), RemoteError),
    ]:
        with pytest.raises(expected) as caught:
            worker.value_of(worker.call(function, *arguments))
        assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert worker.value_of(worker.call(add, 1, 1)) == 2


def test_errors_land_on_their_item(agent: Agent) -> None:
    """A run goes on behind an item that failed to be pickled, to be unpickled, or to run."""
    worker = agent.fork()
    seq = worker.send([(identity, [(Unpicklable(),), (FailsToLoad(),), ([1],), (1, 2)])])[0]
    assert worker.value_of(seq, 2) == [1]
    for item, expected in ((0, RuntimeError), (1, ValueError), (3, TypeError)):
        with pytest.raises(expected):
            worker.value_of(seq, item)


def test_functions_that_cannot_be_called(agent: Agent) -> None:
    """An unknown function and one that does not unpickle fail each of their calls and items, and nothing else."""
    worker = agent.fork()
    args = agent.pickler.dumps_call(((1,), {}))
    run = agent.pickler.dumps_run([(1,), (2,)])
    bad = Function(900, "bad", agent.pickler.dumps(FailsToLoad()))  # type: ignore[arg-type]
    rows = [(1, 0, 900, args), (1, 0, 900, args), (1, 0, 901, args), (2, 0, 902, run)]
    first, second, third, fourth = worker.send_rows(rows, [bad])
    for seq, item, expected in (
        (first, 0, ValueError),
        (second, 0, ValueError),
        (third, 0, RuntimeError),
        (fourth, 0, RuntimeError),
        (fourth, 1, RuntimeError),
    ):
        with pytest.raises(expected):
            worker.value_of(seq, item)
    assert worker.value_of(worker.call(add, 1, 1)) == 2


def test_large_payloads(agent: Agent) -> None:
    """Arguments and results larger than the pipe and every buffer arrive whole, and can be written to on both sides."""
    worker = agent.fork()
    array = np.arange(3_000_000)
    agent.wait(worker.writer.flush)
    seq = worker.call(identity, array)
    agent.wait(worker.writer.flush)
    result = worker.value_of(seq)
    assert (result == array).all() and result.flags.writeable
    text = "x" * 2_000_000
    seq = worker.call(identity, text)
    agent.wait(worker.writer.flush)
    assert worker.value_of(seq) == text


def test_results_before_a_long_call(agent: Agent) -> None:
    """Results that are followed by a long call can be read while it runs."""
    worker = agent.fork()
    quick, long = worker.send([(add, (1, 2)), (spin_until_read, (5,))])
    assert worker.value_of(quick) == 3
    journal[5] = 1
    assert worker.value_of(long) == 5
    journal[5] = 0


def test_results_are_released(agent: Agent) -> None:
    """A worker keeps no reference to arguments and results of a call that is over."""
    worker = agent.fork()
    worker.value_of(worker.call(keep_reference))
    assert worker.value_of(worker.call(is_collected))


def test_forking_calls(agent: Agent) -> None:
    """A child that comes back from a call ends there; the parent's result is the only one."""
    worker = agent.fork()
    assert worker.value_of(worker.call(fork_and_return)) == 1
    assert journal[3] == 0
    assert worker.value_of(worker.call(fork_and_exit)) == 5
    assert [record[0] for record in worker.answers()] == [RECORD_VALUE, RECORD_VALUE]


def test_output_appears_at_once(agent: Agent) -> None:
    """What a call prints is out before its result is."""
    read_fd, write_fd = os.pipe()
    agent_with_pipe = Agent()
    os.close(write_fd)
    worker = agent_with_pipe.fork()
    worker.value_of(worker.call(print_then_crash, write_fd))
    assert os.read(read_fd, 100) == b"printed\n"
    os.close(read_fd)
    agent_with_pipe.close()


def test_environment(agent: Agent) -> None:
    """Standard input is empty, signals are as in a fresh interpreter, the worker leads its own session."""
    worker = agent.fork()
    assert worker.value_of(worker.call(read_stdin)) == ""
    ignored, default, child, mask = worker.value_of(worker.call(dispositions))
    assert "SIG_IGN" in ignored and "SIG_DFL" in default and "SIG_DFL" in child and mask == "set()"
    assert worker.value_of(worker.call(os.getsid, 0)) == worker.pid
    assert worker.value_of(worker.call(os.getppid)) == agent.forker_pid


def test_full_pipe_waits_for_the_agent(agent: Agent) -> None:
    """A worker whose pipe is full rings and waits, and loses nothing."""
    worker = agent.fork()
    seqs = worker.send([(identity, (b"x" * 60_000,)) for _ in range(60)])
    agent.wait(worker.writer.flush)
    agent.wait(lambda: len(worker.answers()) == 60)
    assert [record[1] for record in worker.answers()] == seqs
