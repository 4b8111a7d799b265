"""Calls that do not keep to themselves: each gets what a user would expect, and others never notice.

As with ProcessPoolExecutor the state of a worker's process is what calls make of it: the next call in it finds its
working directory, environment, limits and signal handlers as the last one left them. What the worker itself needs it
takes back or keeps out of reach.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import odd_calls as calls
import pytest
import workload
from served import Served
from support import DEADLINE_S, Scene, is_gone, state_of, wait_gone, wait_until

from scaler_executor import CancelOutcome, RemoteError, ScalerExecutor, ScalerFuture, WorkerDiedError

Make = Callable[..., ScalerExecutor]


@pytest.fixture(autouse=True, scope="module")
def cluster(served: Served) -> Served:
    """What half of the executors here use."""
    return served


@pytest.fixture(params=["embedded", "served"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Nothing here depends on the start method, nor on where the workers are."""
    return "spawn" if request.param == "embedded" else "served"


@pytest.fixture
def one(make: Make) -> ScalerExecutor:
    """An executor with one worker, which has served a call."""
    executor = make(1)
    executor.submit(workload.get_pid).result(DEADLINE_S)
    return executor


def pid_of(executor: ScalerExecutor) -> int:
    return executor.submit(workload.get_pid).result(DEADLINE_S)


def death_of(future: ScalerFuture[Any]) -> WorkerDiedError:
    error = future.exception(DEADLINE_S)
    assert isinstance(error, WorkerDiedError), error
    return error


# What a call leaves behind


def test_fork(one: ScalerExecutor) -> None:
    """A call that forks has one result, the parent's; its child ends with code 0; the worker lives."""
    pid = pid_of(one)
    assert one.submit(workload.fork_and_return).result(DEADLINE_S) == 0
    assert pid_of(one) == pid


def test_daemon_is_started(scene: Scene, one: ScalerExecutor) -> None:
    """A daemon that a call starts outlives call and executor; the call has its result, the worker lives."""
    started, pid = scene.fifo(), pid_of(one)
    future = one.submit(calls.daemonize, started)
    daemon = int(started.hear())
    try:
        assert future.result(DEADLINE_S) == pid == pid_of(one)
        one.shutdown()
        wait_gone(pid)
        assert not is_gone(daemon)
    finally:
        os.kill(daemon, signal.SIGKILL)
        wait_gone(daemon)


def test_call_becomes_a_daemon(scene: Scene, one: ScalerExecutor) -> None:
    """A call whose process exits, as a daemon's does, is a WorkerDiedError with code 0; the fork of it ends as well."""
    started, pid = scene.fifo(), pid_of(one)
    future = one.submit(calls.become_daemon, started)
    error = death_of(future)
    assert (error.exit_code, error.signal_name, error.pid) == (0, None, pid)
    wait_gone(int(started.hear()))
    assert pid_of(one) != pid


def test_endless_daemon_thread(one: ScalerExecutor) -> None:
    """A daemon thread that never ends keeps neither its call, nor later ones, nor shutdown()."""
    pid = one.submit(calls.start_endless_thread, is_daemon=True).result(DEADLINE_S)
    assert pid_of(one) == pid
    one.shutdown()
    wait_gone(pid)


def test_endless_thread(make: Make, start_method: str) -> None:
    """A thread that is no daemon and never ends keeps no call. shutdown() of an own cluster waits for it, as the
    interpreter's end does and ProcessPoolExecutor, until kill_workers(); that of a served one does not."""
    executor = make(1)
    pid = executor.submit(calls.start_endless_thread, is_daemon=False).result(DEADLINE_S)
    assert pid_of(executor) == pid
    thread = threading.Thread(target=executor.shutdown)
    thread.start()
    if start_method != "served":
        thread.join(0.5)
        executor.kill_workers()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    if start_method == "served":
        os.kill(pid, signal.SIGKILL)  # or its agent does, after a minute
    wait_gone(pid)


def test_signal_handlers(scene: Scene, one: ScalerExecutor) -> None:
    """A call that ignores every signal has its result, and the next call in its worker can still be stopped."""
    pid = one.submit(calls.change_signals).result(DEADLINE_S)
    started = scene.fifo()
    future = one.submit(workload.sleep, started)
    assert int(started.hear()) == pid
    assert future.cancel(DEADLINE_S) and future.cancel_outcome is CancelOutcome.CANCELED
    assert pid_of(one) != pid


def test_surroundings(make: Make, tmp_path: Path) -> None:
    """Working directory, umask, environment and limits stay as the call made them for later calls in its worker, as
    with ProcessPoolExecutor, and nowhere else."""
    executor, other = make(1), make(1)
    here = calls.surroundings()
    before = executor.submit(calls.surroundings).result(DEADLINE_S)
    executor.submit(calls.change_surroundings, str(tmp_path)).result(DEADLINE_S)
    assert executor.submit(calls.surroundings).result(DEADLINE_S) == (str(tmp_path), 0o077, "changed", 100)
    assert calls.surroundings() == here
    assert other.submit(calls.surroundings).result(DEADLINE_S) == before
    death_of(executor.submit(os._exit, 1))
    assert executor.submit(calls.surroundings).result(DEADLINE_S) == before


# Descriptors


@pytest.mark.parametrize(("low", "high"), [(0, 256), (3, 256), (0, 3), (1, 2), (2, 3), (0, 1)])
def test_close_low_descriptors(one: ScalerExecutor, tmp_path: Path, low: int, high: int) -> None:
    """A call that closes descriptors 0 to 255, or some, has its result, and later calls in its worker print where they
    should, never into a file that was opened since."""
    pid = pid_of(one)
    for _ in range(2):
        assert one.submit(calls.close_descriptors, low, high).result(DEADLINE_S) == pid
        file = tmp_path / "file"
        assert one.submit(calls.open_and_print, str(file)).result(DEADLINE_S) > 2
        assert file.read_text() == ""
    assert pid_of(one) == pid


def test_large_result_after_close(one: ScalerExecutor) -> None:
    """What is written to a descriptor that a call has closed does not get into its result, also where that is large and
    stands in a file."""
    for _ in range(5):
        assert one.submit(calls.close_and_scribble, 8_000_000).result(DEADLINE_S) == bytes(8_000_000)
        one.submit(calls.scribble_no_more).result(DEADLINE_S)


def test_close_all_descriptors(scene: Scene, one: ScalerExecutor) -> None:
    """A call that closes every descriptor there is, its worker's among them, costs itself: the error says so, and the
    calls that wait behind it are made by another worker, once each."""
    started, journal, pid = scene.fifo(), scene.journal(), pid_of(one)
    future = one.submit(calls.close_and_hold, started, 0, 65536)
    waiting = [one.submit(workload.note, journal, number) for number in range(20)]
    started.hear()
    error = death_of(future)
    assert error.pid == pid and "closed" in error.stderr and "Bad file descriptor" in str(error)
    assert [other.result(DEADLINE_S) for other in waiting] == [None] * 20
    assert sorted(int(line[0]) for line in journal.read()) == list(range(20))
    assert pid_of(one) != pid


# Output

PRINTS = """
import sys
from scaler_executor import ScalerExecutor
import odd_calls

if __name__ == "__main__":
    with ScalerExecutor(1) as executor:
        print(executor.submit(odd_calls.print_bytes, sys.argv[1], int(sys.argv[2])).result())
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_gigabyte(stream: str) -> None:
    """A call that prints a gigabyte ends like any other, and all of it arrives."""
    size = 1 << 30
    here = os.path.dirname(__file__)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([here, os.path.join(here, "..", "..")]))
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, stream, str(size)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    assert process.stdout is not None
    count = 0
    tail = b""
    with process:
        while data := process.stdout.read1(1 << 20):
            count += len(data)
            tail = (tail + data)[-20:]
    assert process.returncode == 0 and tail.endswith(f"{size}\n".encode())
    assert count == size + len(f"{size}\n")


# Exceptions


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt("the call's"), GeneratorExit(), calls.OwnBaseError("own")], ids=repr
)
def test_base_exceptions(one: ScalerExecutor, error: BaseException) -> None:
    """SystemExit, KeyboardInterrupt, GeneratorExit and an own BaseException are that call's error, in a map that
    item's; the worker lives."""
    pid = pid_of(one)
    raised = one.submit(workload.fail, error).exception(DEADLINE_S)
    assert type(raised) is type(error) and raised.args == error.args
    with pytest.raises(type(error)):
        list(one.map(workload.fail, [error]))
    assert pid_of(one) == pid


RAISED_ON_LOAD = [ValueError("load"), SystemExit(3), GeneratorExit(), calls.OwnBaseError("own")]


@pytest.mark.parametrize("error", RAISED_ON_LOAD, ids=repr)
def test_result_that_raises_when_it_is_loaded(one: ScalerExecutor, error: BaseException) -> None:
    """What a result raises when it is unpickled here is raised by result(), each time, and by a map in its place; no
    thread of the executor ends by it."""
    future = one.submit(calls.return_raising, error)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            future.result(DEADLINE_S)
        assert caught.value.args == error.args
    results = one.map(calls.return_raising_if, range(5), [3] * 5, [error] * 5)
    seen = []
    with pytest.raises(type(error)):
        seen += [next(results) for _ in range(3)]
        next(results)
    assert seen == [0, 1, 2]
    assert_threads_live(one)


@pytest.mark.parametrize("error", RAISED_ON_LOAD, ids=repr)
def test_error_that_raises_when_it_is_loaded(one: ScalerExecutor, error: BaseException) -> None:
    """An exception that cannot be unpickled here stands for itself, by type and text."""
    raised = one.submit(calls.raise_raising, error).exception(DEADLINE_S)
    assert isinstance(raised, RemoteError) and "ErrorThatRaisesOnLoad" in str(raised)
    with pytest.raises(RemoteError, match="ErrorThatRaisesOnLoad"):
        list(one.map(calls.raise_raising, [error]))
    assert_threads_live(one)


def assert_threads_live(executor: ScalerExecutor) -> None:
    """The I/O thread and the callback thread do what they are for."""
    called = threading.Event()
    future = executor.submit(workload.add, 1)
    future.add_done_callback(lambda _: called.set())
    assert future.result(DEADLINE_S) == 1 and called.wait(DEADLINE_S)


@pytest.mark.parametrize("error", [SystemExit(3), calls.OwnBaseError("own"), KeyboardInterrupt()], ids=repr)
def test_callback_that_reads_such_a_result(
    one: ScalerExecutor, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback in which it is raised is logged like any that fails, and those of others are called."""
    seen: list[BaseException] = []
    future = one.submit(calls.return_raising, error)

    def read(done: Any) -> None:
        try:
            done.result(0)
        except BaseException as raised:
            seen.append(raised)
            raise

    future.add_done_callback(read)
    assert_threads_live(one)
    assert [type(raised) for raised in seen] == [type(error)]


def test_such_a_result_in_asyncio(one: ScalerExecutor) -> None:
    """An await of it raises what it raised, and the loop goes on."""

    async def main() -> int:
        with pytest.raises(calls.OwnBaseError):
            await asyncio.wrap_future(one.submit(calls.return_raising, calls.OwnBaseError("own")))
        return await asyncio.wrap_future(one.submit(workload.add, 1))

    assert asyncio.run(main()) == 1


EXITS_ON_LOAD = """
import odd_calls, sys
from scaler_executor import ScalerExecutor

if __name__ == "__main__":
    executor = ScalerExecutor(1, address=sys.argv[1] or None)
    print(executor.submit(abs, -1).result(), flush=True)
    executor.submit(odd_calls.return_exiting).result()
    print("not reached")
"""


def test_result_that_kills_its_reader(scene: Scene, served: Served, start_method: str) -> None:
    """A result that ends the process that unpickles it ends the user's, where the user reads it and not before; of an
    executor of its own nothing is left."""
    client = scene.client(EXITS_ON_LOAD, served.connection if start_method == "served" else "")
    assert client.wait() == 9
    assert client.output == "1\n"


# Memory and time


def test_memory_limit(one: ScalerExecutor) -> None:
    """A call that meets RLIMIT_AS has a MemoryError, also where only its result cannot be pickled for it; the worker
    lives."""
    pid = pid_of(one)
    with pytest.raises(MemoryError):
        one.submit(calls.limit_and_use_memory, 1 << 30).result(DEADLINE_S)
    with pytest.raises(MemoryError):
        one.submit(calls.make_large_under_limit, 1 << 28).result(DEADLINE_S)
    assert pid_of(one) == pid


def test_stopped_from_outside(scene: Scene, make: Make) -> None:
    """A call that somebody stops (SIGSTOP) is waited for, and goes on when it is told to; its neighbour is not held
    up."""
    executor = make(2)
    started, gate = scene.fifo(), scene.fifo()
    future = executor.submit(workload.hold, started, gate, "done")
    pid = int(started.hear())
    os.kill(pid, signal.SIGSTOP)
    gate.open()
    assert list(executor.map(workload.add, range(200))) == list(range(200))
    wait_until(lambda: state_of(pid) == "T", "it is not stopped")
    assert not future.done()
    os.kill(pid, signal.SIGCONT)
    assert future.result(DEADLINE_S) == "done"
    assert pid_of(executor)


def test_cancelled_while_stopped(scene: Scene, one: ScalerExecutor) -> None:
    """A call that somebody has stopped can be cancelled all the same."""
    started = scene.fifo()
    future = one.submit(workload.sleep, started)
    pid = int(started.hear())
    os.kill(pid, signal.SIGSTOP)
    assert future.cancel(DEADLINE_S) and future.cancel_outcome is CancelOutcome.CANCELED
    wait_gone(pid)
    assert pid_of(one) != pid


def test_gil_held_for_seconds(scene: Scene, make: Make) -> None:
    """A call that holds the GIL in C for seconds has its result; meanwhile its neighbour serves, and what waited behind
    it is made elsewhere."""
    executor = make(2)
    started, count = scene.fifo(), 2 * 10**8
    future = executor.submit(calls.hold_gil_for, started, count)
    started.hear()
    assert list(executor.map(workload.add, range(200))) == list(range(200))
    assert not future.done()
    assert future.result(DEADLINE_S) == count


def test_sigterm_ignored(scene: Scene, one: ScalerExecutor) -> None:
    """A call that ignores SIGTERM is not disturbed by it, and one that does not is a WorkerDiedError that names it."""
    started, gate = scene.fifo(), scene.fifo()
    future = one.submit(calls.ignore_sigterm, started, gate)
    pid = int(started.hear())
    os.kill(pid, signal.SIGTERM)
    gate.open()
    assert future.result(DEADLINE_S) == "here"
    os.kill(pid, signal.SIGKILL)
    future = one.submit(workload.sleep, started)
    os.kill(int(started.hear()), signal.SIGTERM)
    assert death_of(future).signal_name == "SIGTERM"


def test_subprocess(scene: Scene, one: ScalerExecutor) -> None:
    """A call that sits in a subprocess has its result; killed or cancelled, it takes the subprocess along."""
    assert one.submit(calls.run_and_read, "from below").result(DEADLINE_S) == "from below\n"
    started = scene.fifo()
    future = one.submit(workload.wait_for_subprocess, started)
    pid, *below = started.hear_numbers()
    os.kill(pid, signal.SIGKILL)
    assert death_of(future).signal_name == "SIGKILL"
    wait_gone(*below)
    future = one.submit(workload.wait_for_subprocess, started, is_deaf=True)
    pids = started.hear_numbers()
    assert future.cancel(DEADLINE_S) and future.cancel_outcome is CancelOutcome.CANCELED
    wait_gone(*pids)
