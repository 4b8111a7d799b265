"""Large arguments, results, closures and globals: what arrives, who sees what, and what is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import workload
from support import DEADLINE_S, VARIABLE, Cluster, Scene, wait_gone, wait_until

from scaler_executor import ResultTooLargeError, ScalerExecutor, TaskTooLargeError, WorkerDiedError
from scaler_executor.runtime.calls import CallPickler

Make = Callable[..., ScalerExecutor]
SIZE = 1_000_003


def files(scene: Scene) -> list[Path]:
    """Return the files in shared memory, of all executors of the test."""
    return [path for path in scene.shared.rglob("*") if path.is_file()]


def values() -> list[Any]:
    large = os.urandom(SIZE)
    block = workload.Block(bytearray(large))
    return [large, bytearray(large), "ä" * SIZE, block, [large, {"block": block, "small": (1, None)}], [block] * 3]


def test_values_come_back(scene: Scene, executor: ScalerExecutor) -> None:
    """Large values of any kind and nesting arrive equal, by submit and by map, as argument, result and closure."""
    for value in values():
        assert executor.submit(workload.echo, value).result(DEADLINE_S) == value
        assert list(executor.map(workload.echo, [value, 1, value])) == [value, 1, value]
        assert executor.submit(lambda: value).result(DEADLINE_S) == value  # noqa: B023 - called here
        assert executor.submit(workload.Holder(value).get).result(DEADLINE_S) == value
    executor.submit(workload.echo, 1).result(DEADLINE_S)
    for future in [executor.submit(workload.echo, n) for n in range(600)]:
        future.result(DEADLINE_S)


def test_numpy_and_pandas(executor: ScalerExecutor) -> None:
    """Arrays and frames arrive writable, and what is written to them stays where it is."""
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(SIZE)
    arrived = executor.submit(workload.increment_in_place, array).result(DEADLINE_S)
    assert (arrived == numpy.arange(SIZE) + 1).all() and (array == numpy.arange(SIZE)).all()
    arrived[0] = 5
    assert executor.submit(lambda: array.sum()).result(DEADLINE_S) == array.sum()
    strided = array[::2]
    assert (executor.submit(workload.echo, strided).result(DEADLINE_S) == strided).all()
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": numpy.arange(SIZE), "b": numpy.random.rand(SIZE), "c": ["x"] * SIZE})
    arrived = executor.submit(workload.echo, frame).result(DEADLINE_S)
    assert arrived.equals(frame)
    arrived.loc[0, "b"] = 7.0


def test_buffers_arrive_writable(executor: ScalerExecutor) -> None:
    """A call may change its argument in place, and so may the reader the result; nobody else sees that."""
    block = workload.Block(bytearray(SIZE))
    arrived = executor.submit(workload.set_first, block, 5).result(DEADLINE_S)
    assert (arrived.content[0], block.content[0]) == (5, 0)
    arrived.content[0] = 6


def test_each_call_has_its_snapshot(scene: Scene, make: Make) -> None:
    """An argument or closure that changes between two calls is seen by each as it was; one that does not is in
    shared memory once."""
    executor = make(1)
    started, gate = scene.fifo(), scene.fifo()
    executor.submit(workload.hold, started, gate)
    started.hear()
    block = workload.Block(bytearray(SIZE))
    futures = [executor.submit(workload.first, block) for _ in range(20)]
    assert len(files(scene)) == 1
    for number in range(1, 5):
        block.content[0] = number
        futures.append(executor.submit(workload.first, block))
        futures.append(executor.submit(lambda: block.content[0]))
    gate.open()
    assert [future.result(DEADLINE_S) for future in futures] == [0] * 20 + [n for n in range(1, 5) for _ in range(2)]
    wait_until(lambda: len(files(scene)) <= 1, "arguments are left")  # that of the last closure, which is known still


def test_results_can_be_read_later(make: Make) -> None:
    """Results that nobody has read outlive the executor, take no descriptors, and go when they are dropped."""
    executor = make(2)
    future = executor.submit(workload.make_bytes, SIZE)
    future.result(DEADLINE_S)
    before = len(os.listdir("/proc/self/fd"))
    futures = [executor.submit(workload.make_block, SIZE, number) for number in range(50)]
    dropped = [executor.submit(workload.make_block, SIZE, number) for number in range(50)]
    executor.submit(workload.echo, 1).result(DEADLINE_S)
    wait_until(lambda: all(future.done() for future in futures), "the calls do not end")
    assert len(os.listdir("/proc/self/fd")) == before
    del dropped
    executor.shutdown()
    assert [future.result().content[-1] for future in futures] == list(range(50))


def test_cancelled_calls_leave_nothing(scene: Scene, make: Make) -> None:
    """Queued, running or finished: a cancelled call's payload is gone from shared memory."""
    executor = make(1)
    started = scene.fifo()
    block = workload.Block(bytearray(SIZE))
    running = executor.submit(workload.sleep_with, started, block)
    started.hear()
    queued = []
    for number in range(10):
        block.content[0] = number
        queued.append(executor.submit(workload.echo, block))
    run = executor.map(workload.echo, [block] * 10)
    assert len(files(scene)) == 10  # what has not changed is there once
    executor.cancel(queued)
    running.cancel()
    list(run)
    wait_until(lambda: not files(scene), "payloads are left")
    finished = executor.submit(workload.make_block, SIZE, 1)
    wait_until(finished.done, "the call does not end")
    finished.cancel()
    assert not files(scene)


def test_calls_of_a_dead_worker(scene: Scene, make: Make) -> None:
    """A call that waited behind one that crashed still has its argument; what the crashed one had is gone."""
    executor = make(1)
    executor.submit(workload.echo, 1).result(DEADLINE_S)
    block = workload.Block(bytearray(SIZE))
    crashing = [executor.submit(workload.exit_with, 7, block)]
    waiting = [executor.submit(workload.first, block) for _ in range(5)]
    crashing.append(executor.submit(workload.exit_with, 8, block))
    waiting.append(executor.submit(workload.first, block))
    for future in crashing:
        assert isinstance(future.exception(DEADLINE_S), WorkerDiedError)
    assert [future.result(DEADLINE_S) for future in waiting] == [0] * 6
    wait_until(lambda: not files(scene), "payloads are left")


def test_each_attempt_has_its_argument(scene: Scene, make: Make) -> None:
    """A call that is made again finds its argument and its closure, and they are gone when it is over."""
    executor = make(2)
    view = executor.with_options(retries=2)
    journals = [scene.journal() for _ in range(6)]
    block = workload.Block(b"\5" * SIZE)
    bound = workload.Block(b"\6" * SIZE)
    calls = [view.submit(workload.first_at_last, journals[0], 2, block)]
    calls.append(view.submit(lambda: workload.first_at_last(journals[1], 1, bound)))
    # Each later closure drops what is known of the one before it, which is still wanted.
    others = [executor.submit(lambda number=number: bound.content[0] + number) for number in range(4)]
    items = view.map(workload.first_at_last, journals[2:], [0, 2, 1, 0], [block] * 4)
    assert [call.result(DEADLINE_S) for call in calls] == [5, 6]
    assert [other.result(DEADLINE_S) for other in others] == [6, 7, 8, 9]
    assert list(items) == [5] * 4
    assert [len(journal.read()) for journal in journals] == [3, 2, 1, 3, 2, 1]
    wait_until(lambda: len(files(scene)) <= 1, "arguments are left")  # that of the last closure, which is known still
    executor.submit(lambda: None).result(DEADLINE_S)


def test_options_that_stop_a_call_leave_nothing(scene: Scene, make: Make) -> None:
    """The argument of a call that takes too long is gone when it was stopped; a later one still finds its own."""
    executor = make(1)
    started = scene.fifo()
    block = workload.Block(bytearray(SIZE))
    view = executor.with_options(timeout=0.3, cancel_grace=0)
    late = view.submit(workload.tell_and_hold, started, block)
    waiting = view.submit(workload.first, block)
    started.hear()
    assert isinstance(late.exception(DEADLINE_S), TimeoutError)
    assert waiting.result(DEADLINE_S) == 0
    wait_until(lambda: not files(scene), "payloads are left")


def test_workers_killed_while_they_write(scene: Scene, make: Make) -> None:
    """Whatever a worker has written when it is killed is found: as a result, or as nobody's."""
    executor = make(2)
    for turn in range(10):
        futures = [executor.submit(workload.make_block, 8 * SIZE, number) for number in range(4)]
        wait_until(lambda: files(scene) or all(future.done() for future in futures), "nothing is written")  # noqa: B023
        for pid in Cluster().workers()[turn % 2 :]:
            os.kill(pid, signal.SIGKILL)
        for number, future in enumerate(futures):
            error = future.exception(DEADLINE_S)
            assert isinstance(error, WorkerDiedError) or future.result().content[-1] == number
        wait_until(lambda: not files(scene), "results are left")


PROGRAM = """
import os, sys, time, workload
from scaler_executor import ScalerExecutor
from multiprocessing import get_context
from support import copy_of_fifo
method, started, gate, shared = sys.argv[1:]
data = None
def last(factor):
    return factor * data.content[-1]
if __name__ == "__main__":
    executor = ScalerExecutor(2, get_context(method))
    executor.submit(int).result()
"""


def test_a_global_is_sent_once(scene: Scene, start_method: str) -> None:
    """A large global of `__main__` is in shared memory once, for many calls, workers and a later version."""
    source = PROGRAM + (
        "    data = workload.Block(b'\\3' * 5_000_000)\n"
        "    futures = [executor.submit(last, n) for n in range(100)] + [executor.submit(workload.sleep_for, 0.2)]\n"
        "    assert [f.result() for f in futures[:-1]] == [3 * n for n in range(100)]\n"
        "    files = [path for path, _, names in os.walk(shared) for _ in names]\n"
        "    assert len(files) == 1, files\n"
        "    futures[-1].result()\n"
        "    data = workload.Block(b'\\4' * 5_000_000)\n"
        "    futures = [executor.submit(last, n) for n in range(100)]\n"
        "    assert [f.result() for f in futures] == [4 * n for n in range(100)]\n"
        "    executor.submit(int).result()\n"
        "    files = [path for path, _, names in os.walk(shared) for _ in names]\n"
        "    assert len(files) == 1, files\n"
        "    executor.shutdown()\n"
    )
    scene.client(source, start_method, "", "", scene.shared).succeed()
    assert not files(scene)


@pytest.mark.parametrize(
    "killed", ["client", "serve", "forker", "client serve", "serve forker", "client forker", "client serve forker"]
)
def test_kill_leaves_nothing(scene: Scene, start_method: str, killed: str) -> None:
    """Whichever of the processes are killed, those that are left remove everything; if none is, the next start."""
    started, gate = scene.fifo(), scene.fifo()
    source = PROGRAM + (
        "    started, gate = copy_of_fifo(started), copy_of_fifo(gate)\n"
        "    blocks = [workload.Block(bytearray(1_000_000)) for _ in range(6)]\n"
        "    held = [executor.submit(workload.tell_and_hold, started, block) for block in blocks]\n"
        "    results = [executor.submit(workload.make_block, 1_000_000, 1) for _ in range(3)]\n"
        "    gate.await_opening()\n"
        "    try:\n"
        "        executor.clear()\n"
        "    except RuntimeError:\n"
        "        pass\n"
        "    executor.shutdown()\n"
    )
    client = scene.client(source, start_method, started.path, gate.path, scene.shared)
    started.hear()
    started.hear()
    assert files(scene)
    cluster = Cluster(client.pid)
    pids = {"client": client.pid, "serve": cluster.serve, "forker": cluster.forker}
    workers = cluster.workers()
    for name in killed.split():
        os.kill(pids[name], signal.SIGSTOP)
    for name in killed.split():
        os.kill(pids[name], signal.SIGKILL)
    wait_gone(*(pids[name] for name in killed.split() if name != "client"), *workers)
    if "client" not in killed:
        gate.open()
    client.wait()
    others = [pid for name, pid in pids.items() if name not in ("client", "forker")]
    wait_gone(*others)
    if killed == "client serve forker":
        scene.client("from scaler_executor import ScalerExecutor\nScalerExecutor(1).submit(int).result()").succeed()
    wait_until(lambda: not list(scene.shared.iterdir()), f"left: {list(scene.shared.rglob('*'))}")


@pytest.mark.parametrize("where", ["", "/nowhere/at/all", "/proc/self"])
def test_no_shared_memory(make: Make, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Without a place for files large values travel as others do."""
    monkeypatch.setenv(VARIABLE, where)
    executor = make(2)
    for value in values():
        assert executor.submit(workload.echo, value).result(DEADLINE_S) == value


def test_full_shared_memory(scene: Scene, start_method: str) -> None:
    """Where shared memory is small it is used as far as it goes; nothing is killed by SIGBUS."""
    place = scene.directory / "tiny"
    place.mkdir()
    mount = f'mount -t tmpfs -o size=4m none {place} && exec "$@"'
    before = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    source = (
        f"import os\nos.environ[{VARIABLE!r}] = {str(place)!r}\n"
        + PROGRAM
        + (
            "    value = os.urandom(1_000_003)\n"
            "    futures = [executor.submit(workload.echo, workload.Block(bytearray(value))) for _ in range(20)]\n"
            "    assert all(future.result().content == value for future in futures)\n"
            "    assert executor.submit(workload.echo, value * 10).result() == value * 10\n"
            "    executor.shutdown()\n"
            "    assert not os.listdir(shared), os.listdir(shared)\n"
        )
    )
    scene.client(source, start_method, "", "", place, before=before).succeed()


def test_directory_removed_meanwhile(scene: Scene, executor: ScalerExecutor) -> None:
    """Where somebody clears shared memory, calls whose payloads were there fail and say so; later ones do not."""
    started, gate = scene.fifo(), scene.fifo()
    held = [executor.submit(workload.hold, started, gate, number) for number in range(2)]
    started.hear()
    started.hear()
    lost = executor.submit(workload.echo, bytes(SIZE))
    (directory,) = scene.shared.iterdir()
    shutil.rmtree(directory)
    gate.open(2)
    assert [future.result(DEADLINE_S) for future in held] == [0, 1]
    assert isinstance(lost.exception(DEADLINE_S), FileNotFoundError)
    assert executor.submit(workload.echo, bytes(SIZE)).result(DEADLINE_S) == bytes(SIZE)


def test_too_large(make: Make, start_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is larger than can be sent is said on that future, and on no other."""
    if start_method != "fork":
        pytest.skip("workers that are forks have the test's limit")
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setitem(CallPickler.__init__.__kwdefaults__, "max_bytes", 500_000)
    executor = make(1)
    good = executor.submit(workload.make_bytes, 400_000)
    too_large = executor.submit(workload.echo, bytes(SIZE))
    result_too_large = executor.submit(workload.make_bytes, SIZE)
    block_too_large = executor.submit(workload.make_block, SIZE, 1)
    assert isinstance(too_large.exception(DEADLINE_S), TaskTooLargeError)
    for future in (result_too_large, block_too_large):
        error = future.exception(DEADLINE_S)
        assert isinstance(error, ResultTooLargeError) and error.size_bytes > SIZE and error.limit_bytes == 500_000
    with pytest.raises(TaskTooLargeError):
        list(executor.map(workload.echo, [workload.Block(bytearray(SIZE))]))
    assert len(good.result(DEADLINE_S)) == 400_000
