"""Nested calls: calls that submit calls to the cluster that runs them.

Each test runs with an executor of its own workers and with one of a served cluster.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nested_calls
import pytest
from served import Served
from support import DEADLINE_S, Scene, is_gone, wait_gone, wait_until

from scaler_executor import CancelOutcome, ScalerExecutor, WorkerDiedError

Make = Callable[..., ScalerExecutor]


@pytest.fixture(params=["fork", "spawn", "served"])
def start_method(request: pytest.FixtureRequest, served: Served) -> str:
    return str(request.param)


def test_recursion_with_one_worker(make: Make) -> None:
    """A tree of calls, and a chain of fifty, each of which waits for the next, need no more than one worker."""
    executor = make(max_workers=1)
    assert executor.submit(nested_calls.fibonacci, 9).result(DEADLINE_S) == 34
    assert executor.submit(nested_calls.deep, 50).result(DEADLINE_S) == 50
    assert list(executor.map(nested_calls.fibonacci, range(7), timeout=DEADLINE_S)) == [0, 1, 1, 2, 3, 5, 8]


def test_a_handle_is_an_executor(make: Make) -> None:
    """A pickled executor, a view of it and a closure over it do inside a call what they do outside."""
    executor = make(max_workers=2)
    expected = [value**2 for value in range(5)]
    assert executor.submit(nested_calls.through, executor, 5).result(DEADLINE_S) == expected
    view = executor.with_options(retries=1, name="view")
    assert executor.submit(nested_calls.through, view, 5).result(DEADLINE_S) == expected
    assert executor.submit(lambda: nested_calls.through(executor, 5)).result(DEADLINE_S) == expected
    assert executor.submit(nested_calls.raises_inside, executor).result(DEADLINE_S).startswith("invalid literal")
    assert executor.submit(nested_calls.in_threads, executor, 20).result(DEADLINE_S) == sum(range(20))
    assert executor.submit(nested_calls.huge, executor, 3 << 20).result(DEADLINE_S) == 3 << 20


def test_threads_with_one_worker(make: Make) -> None:
    """Threads of a call may wait while the call waits for them."""
    executor = make(max_workers=1)
    assert executor.submit(nested_calls.in_threads, executor, 20).result(DEADLINE_S) == sum(range(20))


@pytest.mark.parametrize("how", ["asubmit", "amap", "wrap_future", "run_in_executor"])
def test_awaiting_with_one_worker(make: Make, how: str) -> None:
    """A call lends its place while its event loop awaits nested calls, and goes on when they are over or given up."""
    executor = make(max_workers=1)
    assert executor.submit(nested_calls.awaits, executor, how, 3).result(DEADLINE_S) == 8
    assert executor.submit(nested_calls.awaits_in_vain, executor).result(DEADLINE_S) == (1, 2)
    assert executor.submit(nested_calls.fibonacci, 5).result(DEADLINE_S) == 5


def test_current_has_the_options_of_the_call(make: Make) -> None:
    """What holds for a call holds for those that it submits through `current`."""
    executor = make(max_workers=1)
    view = executor.with_options(retries=2, timeout=50, priority=3)
    assert view.submit(nested_calls.options_of_current).result(DEADLINE_S) == (2, 50.0, 3)
    assert executor.submit(nested_calls.options_of_current).result(DEADLINE_S)[:1] == (0,)


def test_a_timeout_and_a_cancel_inside(scene: Scene, make: Make) -> None:
    """`result(timeout)` gives up in time, and a cancel inside a call is confirmed and stops the code."""
    said, gate = scene.fifo(), scene.fifo()
    executor = make(max_workers=1)
    future = executor.submit(nested_calls.timed, executor, said, gate)
    heard = [said.hear(), said.hear()]
    assert future.result(DEADLINE_S) == str(CancelOutcome.CANCELED)
    heard.remove("timeout")
    wait_gone(int(heard[0]))


def test_no_more_calls_than_workers(make: Make, tmp_path: Path) -> None:
    """However calls wait for each other, no more of them run at once than there are workers."""
    executor = make(max_workers=2)
    most = executor.submit(nested_calls.counted_tree, executor, str(tmp_path), 3).result(DEADLINE_S)
    assert most <= 2


def test_the_oldest_tree_is_finished_first(make: Make) -> None:
    """Recursion goes deep before it goes wide: trees that are queued are not all begun at once."""
    executor = make(max_workers=1)
    seen: set[int] = set()
    futures = [executor.submit(nested_calls.fibonacci, 4) for _ in range(40)]
    pids = executor.submit(os.getpid)
    for future in futures:
        assert future.result(DEADLINE_S) == 3
    seen.add(pids.result(DEADLINE_S))
    assert len(seen) == 1


@pytest.mark.parametrize("how", ["force", "timeout", "kill"])
def test_the_end_of_a_parent_is_that_of_its_children(scene: Scene, make: Make, how: str) -> None:
    """When a call is cancelled, or runs for too long, or its worker dies, all that it has submitted stops, and what
    that has; a cancel is confirmed after that."""
    said, gate = scene.fifo(), scene.fifo()
    executor = make(max_workers=2)
    view = executor.with_options(timeout=2) if how == "timeout" else executor
    future = view.submit(nested_calls.parent_of, executor, said, gate, 4)
    pids = [int(said.hear()) for _ in range(5)]
    assert len(set(pids)) == 5
    if how == "force":
        assert future.cancel() and future.cancel_outcome is CancelOutcome.CANCELED
        assert all(is_gone(pid) for pid in pids)
    elif how == "kill":
        os.kill(pids[0], 9)
        assert isinstance(future.exception(DEADLINE_S), WorkerDiedError)
    else:
        assert isinstance(future.exception(DEADLINE_S), TimeoutError)
    wait_gone(*pids)
    assert executor.submit(nested_calls.fibonacci, 5).result(DEADLINE_S) == 5


def test_a_parent_that_cannot_be_interrupted(scene: Scene, make: Make) -> None:
    """One that goes on waiting when it is interrupted is killed, and its children stop before that is confirmed."""
    said, gate = scene.fifo(), scene.fifo()
    executor = make(max_workers=1)
    future = executor.submit(nested_calls.stubborn, executor, said, gate)
    pid = int(said.hear())
    assert future.cancel() and future.cancel_outcome is CancelOutcome.CANCELED
    assert is_gone(pid)
    assert executor.submit(nested_calls.fibonacci, 5).result(DEADLINE_S) == 5


def test_the_middle_of_a_chain_dies(scene: Scene, make: Make) -> None:
    """The death of a nested call is its parent's WorkerDiedError, and nobody else's."""
    said, gate = scene.fifo(), scene.fifo()
    executor = make(max_workers=1)
    future = executor.submit(nested_calls.parent_of, executor, said, gate, 3)
    pids = [int(said.hear()) for _ in range(4)]
    os.kill(pids[2], 9)
    assert isinstance(future.exception(DEADLINE_S), WorkerDiedError)
    wait_gone(pids[3])
    assert executor.submit(nested_calls.fibonacci, 5).result(DEADLINE_S) == 5


def test_what_is_left_behind_is_finished(scene: Scene, make: Make) -> None:
    """Calls that nobody has waited for run on when the one that has submitted them ends, by itself or by an error; the
    executor's end waits for them, where it is the cluster's."""
    said, gate = scene.fifo(), scene.fifo()
    executor = make(max_workers=1)
    executor.submit(nested_calls.leaves, executor, said, gate, 3).result(DEADLINE_S)
    gate.open(3)
    assert executor.submit(nested_calls.leaves_and_raises, executor, said, gate).exception(DEADLINE_S)
    gate.open()
    executor.shutdown()
    for _ in range(4):
        said.hear()


def test_what_a_dead_call_has_left_behind_is_stopped(scene: Scene, make: Make) -> None:
    """A call that dies takes with it what it has submitted, also what was waiting for a worker."""
    said, gate = scene.fifo(), scene.fifo()
    executor = make(max_workers=1)
    future = executor.submit(nested_calls.leaves_and_dies, executor, said, gate)
    assert said.hear() == "submitted"
    gate.open()
    assert isinstance(future.exception(DEADLINE_S), WorkerDiedError)
    assert executor.submit(nested_calls.fibonacci, 5).result(DEADLINE_S) == 5
    assert not said.has_news()


def test_the_end_of_a_handle(make: Make) -> None:
    """`with` of a handle waits for its calls, and ends it alone."""
    executor = make(max_workers=1)
    assert executor.submit(nested_calls.with_block, executor, 10).result(DEADLINE_S) == [True] * 10
    assert executor.submit(nested_calls.fibonacci, 5).result(DEADLINE_S) == 5


def test_a_fork_of_a_call_is_refused(make: Make) -> None:
    """A child that a call forks cannot use its handle, and disturbs nobody."""
    executor = make(max_workers=1)
    said = executor.submit(nested_calls.forks, executor).result(DEADLINE_S)
    assert said.count("in a fork of the process that made it") == 2, said


def test_an_executor_made_in_a_call_has_its_own_workers(make: Make) -> None:
    """And its calls' `current` is that one."""
    executor = make(max_workers=1)
    assert executor.submit(nested_calls.plain_inside).result(DEADLINE_S) > 0


def test_where_there_is_no_call() -> None:
    """`current` and handles say so where there is no call."""
    with pytest.raises(RuntimeError, match="inside a call"):
        ScalerExecutor.current()


def test_a_handle_elsewhere(make: Make) -> None:
    """A handle that is unpickled where there is no call, or in another executor's call, says what it is."""
    executor, other = make(max_workers=1), make(max_workers=1)
    handle = pickle.loads(pickle.dumps(executor))
    assert handle.max_workers == executor.max_workers
    for use in (lambda: handle.submit(abs, 1), lambda: handle.map(abs, [1]), lambda: list(handle.map(abs, [1]))):
        with pytest.raises(RuntimeError, match="the handle of a ScalerExecutor"):
            use()
    with pytest.raises(RuntimeError, match="another ScalerExecutor"):
        other.submit(nested_calls.through, executor, 3).result(DEADLINE_S)


PROGRAM = """
import functools, os, sys
from scaler_executor import ScalerExecutor

FACTOR = 3
cache = {}

class Node:
    def __init__(self, value):
        self.value = value

def leaf(node, plus=0):
    return Node(node.value * FACTOR + plus)

def walk(depth):
    here = ScalerExecutor.current()
    if not depth:
        return here.submit(leaf, Node(1)).result().value
    # A lambda over what is local, a partial, a bound method; all are of __main__.
    values = [
        here.submit(lambda: walk(depth - 1)).result(),
        here.submit(functools.partial(leaf, plus=depth), Node(depth)).result().value,
        sum(here.map(lambda value: value * depth, range(3))),
    ]
    exec("def made_here(x): return x + FACTOR", globals())
    values.append(here.submit(made_here, depth).result())
    return sum(values)

import multiprocessing
if sys.argv[1] == "served":
    executor = ScalerExecutor(max_workers=1, address=sys.argv[2])
else:
    executor = ScalerExecutor(max_workers=1, mp_context=multiprocessing.get_context(sys.argv[1]))
with executor:
    print(executor.submit(walk, 2).result(60))
"""


def test_functions_of_main(scene: Scene, start_method: str, served: Served, tmp_path: Path) -> None:
    """Functions and classes of `__main__`, lambdas, closures, and what only a worker's `__main__` has, are called as
    from outside."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    arguments = [start_method, str(served.connection)]
    done = subprocess.run(
        [sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=2 * DEADLINE_S
    )
    assert done.stdout.split() == [str((3 + 4 + 3 + 4) + 8 + 6 + 5)], done.stderr


GLOBALS = """
import multiprocessing, os, sys
from concurrent.futures import ThreadPoolExecutor
from scaler_executor import ScalerExecutor

def make(method, address):
    if method == "served":
        return ScalerExecutor(max_workers=1, address=address)
    return ScalerExecutor(max_workers=1, mp_context=multiprocessing.get_context(method))

if __name__ == "__main__" or sys.argv[1] == "fork":
    # Another process that imports this makes executors of its own.
    executor, other = make(*sys.argv[1:]), make(*sys.argv[1:])
    view = executor.with_options(timeout=50, name="view")
    view_of_view = view.with_options(retries=2)

def deep(depth):
    return 0 if not depth else 1 + executor.submit(deep, depth - 1).result()

def options():
    return ScalerExecutor.current()._client.terms.options

def through_views():
    one, both = (used.submit(options).result() for used in (view, view_of_view))
    more = executor.with_options(retries=1).submit(options).result()
    return one.timeout_s, one.retries, both.timeout_s, both.retries, more.retries, sum(view.map(abs, range(5)))

def refused():
    try:
        other.submit(abs, 1)
    except RuntimeError as error:
        return "ScalerExecutor.current()" in str(error) or "another ScalerExecutor" in str(error)

def refused_in_a_fork():
    pid = os.fork()
    if not pid:
        code = 1
        try:
            executor.submit(abs, 1)
        except RuntimeError as error:
            code = 0 if "make a new one" in str(error) else 2
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def ends():
    with executor:
        future = executor.submit(abs, -1)
    return future.done()

def main():
    assert executor.submit(deep, 5).result(60) == 5
    assert view.submit(deep, 5).result(60) == 5
    said = executor.submit(through_views).result(60)
    assert said == (50, 0, 50, 2, 1, 10), said
    assert executor.submit(refused).result(60)
    assert executor.submit(refused_in_a_fork).result(60) == 0
    assert executor.submit(ends).result(60)
    assert executor.submit(abs, -1).result(60) == 1
    assert refused_in_a_fork() == 0 and executor.submit(abs, -2).result(60) == 2
    executor.shutdown()
    other.shutdown()
    print("good")

if __name__ == "__main__":
    main()
"""


def test_an_executor_that_is_a_global(start_method: str, served: Served, tmp_path: Path) -> None:
    """Inside a call it is a handle, as are its views, also where the worker has inherited them; elsewhere a fork cannot
    use it."""
    (tmp_path / "program.py").write_text(GLOBALS)
    (tmp_path / "importing.py").write_text("import program\nprogram.main()\n")
    for name in ["program.py", "importing.py"] if start_method == "fork" else ["program.py"]:
        arguments = [str(tmp_path / name), start_method, str(served.connection)]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=2 * DEADLINE_S)
        assert done.stdout.split() == ["good"], done.stderr


def test_two_machines(tmp_path: Path) -> None:
    """Nested calls run on whichever machine has room; when one of them is lost, so are the calls there, and what those
    have submitted elsewhere."""
    with Served(tmp_path) as cluster:
        agent = cluster.join(2)
        try:
            with ScalerExecutor(address=cluster.connection) as executor:
                values = list(executor.map(nested_calls.fibonacci, [8] * 6, timeout=DEADLINE_S))
                assert values == [21] * 6
                futures = [executor.submit(nested_calls.fibonacci, 12) for _ in range(4)]
                assert futures[0].result(2 * DEADLINE_S) == 144
                agent.kill()
                for future in futures:
                    error = future.exception(2 * DEADLINE_S)
                    assert error is None or isinstance(error, WorkerDiedError), error
                wait_until(lambda: cluster.workers() == 2, "the machine is not given up")
                assert executor.submit(nested_calls.fibonacci, 5).result(DEADLINE_S) == 5
        finally:
            agent.close()
