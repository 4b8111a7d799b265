"""The rows of the failure model, embedded and against a served cluster, each within its time.

A row that is not here is where its tools are: cut-off machines in test_survives and test_namespaces, a scheduler that
is restarted and a machine that is lost in test_served, strangers in test_secured, Ctrl-C in test_terminal, the
interpreter's end in test_lifecycle, what does not pickle in test_crash and test_odd_calls.

The limits are those that are promised, times SLACK: tests run on machines that are busy with other tests.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import odd_calls as calls
import pytest
import workload
from served import Served
from support import DEADLINE_S, Cluster, Scene, children_of, is_gone, is_worker, wait_gone

from scaler_executor import ScalerExecutor, ScalerFuture, SchedulerLostError, WorkerDiedError, WorkerStartError

Make = Callable[..., ScalerExecutor]
SLACK = 5


@pytest.fixture(autouse=True, scope="module")
def cluster(served: Served) -> Served:
    """What half of the executors here use."""
    return served


@pytest.fixture(params=["embedded", "served"])
def start_method(request: pytest.FixtureRequest) -> str:
    """The rows hold wherever the workers are."""
    return "fork" if request.param == "embedded" else "served"


@pytest.fixture
def address(served: Served, start_method: str) -> object:
    """What a client's script is told: where the cluster is, or nothing."""
    return served.connection if start_method == "served" else ""


@contextmanager
def within(limit_s: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    took_s = time.monotonic() - begin
    assert took_s <= SLACK * limit_s, f"took {took_s:.2f} s"


def death_of(future: ScalerFuture[Any]) -> WorkerDiedError:
    error = future.exception(DEADLINE_S)
    assert isinstance(error, WorkerDiedError), error
    return error


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda number: number.name)
def test_worker_is_killed(scene: Scene, executor: ScalerExecutor, number: signal.Signals) -> None:
    """That call fails within 0.2 s and says how; its neighbour goes on; a new worker serves within 1 s."""
    started, gate = scene.fifo(), scene.fifo()
    kept = executor.submit(workload.hold, started, gate, "kept")
    started.hear()
    future = executor.submit(workload.sleep, started)
    pid = int(started.hear())
    with within(0.2):
        os.kill(pid, number)
        error = death_of(future)
    assert (error.signal_name, error.pid) == (number.name, pid)
    with within(1):
        assert executor.submit(workload.get_pid).result(DEADLINE_S) != pid
    gate.open()
    assert kept.result(DEADLINE_S) == "kept"


@pytest.mark.parametrize(("how", "code"), [("exit", 7), ("segv", -signal.SIGSEGV), ("abort", -signal.SIGABRT)])
def test_call_kills_its_worker(executor: ScalerExecutor, how: str, code: int) -> None:
    """os._exit, a segmentation fault and an abort cost that call, within 0.2 s; calls submitted with it are made."""
    pids = {executor.submit(workload.get_pid).result(DEADLINE_S) for _ in range(5)}
    others = [executor.submit(workload.add, number) for number in range(20)]
    with within(0.2):
        assert death_of(executor.submit(calls.die, how)).exit_code == code
    others += [executor.submit(workload.add, number) for number in range(20)]
    with within(1):
        assert [future.result(DEADLINE_S) for future in others] == 2 * list(range(20))
    assert len(pids) <= 2


def test_a_worker_at_its_limit_of_deaths(make: Make) -> None:
    """Calls that die one after the other are no reason to give up: the pool has its strength afterwards."""
    executor = make(2)
    for number in range(20):
        assert death_of(executor.submit(os._exit, 1 + number)).exit_code == 1 + number
    assert executor.submit(workload.add, 1).result(DEADLINE_S) == 1


def forker_of(served: Served, start_method: str) -> int:
    if start_method != "served":
        return Cluster().forker
    (forker,) = [pid for pid in children_of(served.scheduler.pid) if not is_worker(pid) and not is_gone(pid)]
    return forker


def test_forker_is_lost(scene: Scene, served: Served, start_method: str, executor: ScalerExecutor) -> None:
    """The calls that run fail as if their workers had been killed, those that wait are made, once each."""
    started, journal = scene.fifo(), scene.journal()
    running = [executor.submit(workload.sleep, started) for _ in range(2)]
    pids = [int(started.hear()) for _ in running]
    waiting = [executor.submit(workload.note, journal, number) for number in range(10)]
    with within(1):
        os.kill(forker_of(served, start_method), signal.SIGKILL)
        for future in running:
            assert "fork" in death_of(future).reason
        assert executor.submit(workload.add, 1).result(DEADLINE_S) == 1
    wait_gone(*pids)
    wait(waiting, DEADLINE_S)
    assert sorted(int(line[0]) for line in journal.read()) == list(range(10))


def test_scheduler_is_lost(scene: Scene, tmp_path: Path, start_method: str) -> None:
    """What is outstanding fails with SchedulerLostError within 1 s, what is done stays, and no worker is left."""
    with ExitStack() as stack:
        if start_method == "served":
            served = stack.enter_context(Served(tmp_path))
            lose_scheduler(scene, ScalerExecutor(2, address=served.connection), served)
        else:
            lose_scheduler(scene, ScalerExecutor(2), None)


def lose_scheduler(scene: Scene, executor: ScalerExecutor, served: Served | None) -> None:
    started = scene.fifo()
    done = executor.submit(workload.add, 1)
    assert done.result(DEADLINE_S) == 1
    running = [executor.submit(workload.sleep, started) for _ in range(2)]
    pids = [int(started.hear()) for _ in running]
    waiting = [executor.submit(workload.add, number) for number in range(10)]
    if served is not None:
        served.kill()
        served.start()  # of another one it is heard that the first is lost
        limit_s = 10
    else:
        os.kill(Cluster().serve, signal.SIGKILL)
        limit_s = 1
    with within(limit_s):
        for future in [*running, *waiting]:
            assert isinstance(future.exception(DEADLINE_S), SchedulerLostError)
    assert done.result(0) == 1
    wait_gone(*pids)
    executor.shutdown()


CLIENT = """
import sys
import workload
from scaler_executor import ScalerExecutor
from support import copy_of_fifo

address, started, gate, what = sys.argv[1:]

if __name__ == "__main__":
    executor = ScalerExecutor(2, address=address or None)
    if what == "finish":
        for _ in range(2):
            executor.submit(workload.hold, copy_of_fifo(started), copy_of_fifo(gate)).add_done_callback(
                lambda future: print("done", flush=True)
            )
    else:
        futures = [executor.submit(workload.sleep, copy_of_fifo(started)) for _ in range(2)]
        if what == "with":
            with executor:
                futures[0].result()
        futures[0].result()
"""


def client(scene: Scene, address: object, what: str) -> tuple[Any, Any, list[int]]:
    started, gate = scene.fifo(), scene.fifo()
    process = scene.client(CLIENT, address, started.path, gate.path, what)
    return process, gate, [int(started.hear()) for _ in range(2)]


def test_client_is_killed(scene: Scene, address: object) -> None:
    """Within 2 s none of its calls runs any more, and of its own cluster no process is left."""
    process, _, pids = client(scene, address, "result")
    if not address:
        pids += Cluster(process.pid).all()
    process.process.kill()
    process.wait()
    with within(2):
        wait_gone(*pids)


@pytest.mark.parametrize("what", ["result", "with"])
def test_ctrl_c(scene: Scene, address: object, what: str) -> None:
    """Ctrl-C to a client ends it and stops its calls; nothing is said but its own traceback."""
    process, _, pids = client(scene, address, what)
    process.process.send_signal(signal.SIGINT)
    assert process.wait() in (-signal.SIGINT, 130)
    wait_gone(*pids)
    assert process.output.count("Traceback") == 1 and process.output.strip().endswith("KeyboardInterrupt")


def test_interpreter_exit(scene: Scene, address: object) -> None:
    """A program that ends without shutdown() has its accepted work finished, callbacks included."""
    process, gate, _ = client(scene, address, "finish")
    gate.open(2)
    assert process.succeed() == "done\ndone\n"


def test_garbage(scene: Scene, make: Make) -> None:
    """An executor that nobody holds finishes what it accepted."""
    executor = make(2)
    started, gate = scene.fifo(), scene.fifo()
    futures = [executor.submit(workload.hold, started, gate, number) for number in range(2)]
    for _ in futures:
        started.hear()
    del executor
    gate.open(2)
    assert [future.result(DEADLINE_S) for future in futures] == [0, 1]


def test_fork_of_the_client(scene: Scene, executor: ScalerExecutor) -> None:
    """In a fork of the client everything is refused with RuntimeError; the parent's calls are not affected."""
    started, gate, told = scene.fifo(), scene.fifo(), scene.fifo()
    future = executor.submit(workload.hold, started, gate, "kept")
    started.hear()
    pid = os.fork()
    if not pid:
        try:
            seen = []
            for use in (lambda: executor.submit(abs, -1), lambda: executor.map(abs, [1]), lambda: future.cancel()):
                try:
                    use()
                    seen.append("nothing")
                except RuntimeError:
                    seen.append("refused")
            told.tell(" ".join(seen))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert told.hear() == "refused refused refused"
    gate.open()
    assert future.result(DEADLINE_S) == "kept"
    assert executor.submit(workload.add, 1).result(DEADLINE_S) == 1


def test_initializer_fails(scene: Scene, make: Make) -> None:
    """Pending calls fail with the cause, and workers are not started again and again; others are not affected."""
    other, journal = make(1), scene.journal()
    executor = make(2, initializer=workload.fail_to_start, initargs=(journal,))
    futures = [executor.submit(workload.add, number) for number in range(10)]
    for future in futures:
        error = future.exception(DEADLINE_S)
        assert isinstance(error, WorkerStartError) and "the licence server does not answer" in str(error)
        assert str(error).splitlines()[0] == "the initializer failed:"
    assert 1 <= len(journal.read()) <= 4
    assert other.submit(workload.add, 1).result(DEADLINE_S) == 1


def test_worker_cannot_start(scene: Scene, make: Make) -> None:
    """So it is with workers that die at their start, after a few attempts, with the exit code and what they said."""
    other, journal = make(1), scene.journal()
    executor = make(2, initializer=calls.speak_and_exit_at_start, initargs=(journal,))
    error = executor.submit(workload.add, 1).exception(DEADLINE_S)
    assert isinstance(error, WorkerStartError)
    assert "code 5" in str(error) and "no licence for this host" in str(error)
    assert 1 <= len(journal.read()) <= 6
    assert other.submit(workload.add, 1).result(DEADLINE_S) == 1


def test_unpicklable(make: Make) -> None:
    """A function, argument, result or exception that does not pickle fails alone, and its worker lives."""
    executor = make(1)
    pid = executor.submit(workload.get_pid).result(DEADLINE_S)
    for future in (
        executor.submit(workload.Unpicklable()),
        executor.submit(workload.echo, workload.Unpicklable()),
        executor.submit(workload.return_unpicklable),
        executor.submit(workload.raise_locked),
    ):
        error = future.exception(DEADLINE_S)
        assert "does not pickle" in str(error) or "LockedError" in f"{type(error)} {error}"
    assert executor.submit(workload.get_pid).result(DEADLINE_S) == pid


def test_nothing_listens(executor: ScalerExecutor, start_method: str) -> None:
    """An own cluster cannot be reached from outside: none of its processes listens."""
    if start_method == "served":
        pytest.skip("it listens, see test_secured")
    assert executor.submit(workload.add, 1).result(DEADLINE_S) == 1
    listening = set()
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as file:
            listening |= {line.split()[9] for line in file if line.split()[3] == "0A"}
    for pid in Cluster().all():
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            assert target.removeprefix("socket:[").rstrip("]") not in listening
