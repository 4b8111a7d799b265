"""What of multiprocessing workers may be given, as ProcessPoolExecutor's: by initargs, as arguments and as results."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import primitives_cases as cases
import pytest
from comparison import EXECUTORS, START_METHODS, Pools, assert_alike

from scaler_executor import ScalerExecutor
from scaler_executor.runtime.identity import Identity

IN_INITARGS = [cases.locks, cases.events, cases.queues, cases.pipes, cases.shared_values, cases.many_together]


@pytest.fixture(params=["fork", "spawn"])
def start_method(request: pytest.FixtureRequest) -> str:
    """How workers come into being. Under forkserver everything comes to them as under spawn."""
    return str(request.param)


@pytest.mark.parametrize("case", IN_INITARGS, ids=lambda case: case.__name__)
def test_initargs(case: Callable[[Pools], object], start_method: str, tmp_path: Path) -> None:
    """Whatever a child of multiprocessing may be given works in initargs, in both directions."""
    assert_alike(case, start_method, directory=tmp_path)


@pytest.mark.parametrize("start_method", ["forkserver", None])
def test_initargs_of_other_start_methods(start_method: str | None, tmp_path: Path) -> None:
    """So it does with a fork server and with the interpreter's default."""
    assert_alike(cases.many_together, start_method, directory=tmp_path)


@pytest.mark.parametrize("start_method", [*START_METHODS, None])
def test_shared_memory(start_method: str | None, tmp_path: Path) -> None:
    """Shared memory works in initargs and as an argument, and is still there when the workers have ended."""
    assert assert_alike(cases.shared_memory, start_method, directory=tmp_path) == [[True], 99, True, 99]


def test_managers(start_method: str, tmp_path: Path) -> None:
    """Proxies work in initargs, as arguments and as results; a worker has the key to connect by itself."""
    assert_alike(cases.managers, start_method, directory=tmp_path)


#: Nothing here imports multiprocessing before a line does it: the default start method needs no context, and a limit of
#: calls means spawn.
IMPORTED_LATE = """
import sys
from concurrent.futures import EXECUTOR
OPTIONS = {"max_tasks_per_child": 50} if "METHOD" == "spawn" else {}

def append(numbers, number):
    numbers.append(number)
    return list(numbers)

def has_key(key):
    from multiprocessing import current_process
    return bytes(current_process().authkey) == key

def nested(numbers, number):
    with EXECUTOR(1, **OPTIONS) as inner:
        return inner.submit(append, numbers, number).result()

if __name__ == "__main__":
    executor = EXECUTOR(1, **OPTIONS)
    BEFORE
    print(executor.submit(abs, -1).result(), "multiprocessing" in sys.modules)
    import inspect, multiprocessing
    print(type(multiprocessing.process.__loader__), len(inspect.getsource(multiprocessing.process)))
    with multiprocessing.Manager() as manager:
        numbers = manager.list([1])
        print(executor.submit(append, numbers, 2).result(), executor.submit(nested, numbers, 3).result())
        with EXECUTOR(1, **OPTIONS) as other:
            print(other.submit(append, numbers, 4).result())
    executor.shutdown()
    key = bytes(multiprocessing.current_process().authkey)
    multiprocessing.current_process().authkey = b"another"
    with EXECUTOR(1, **OPTIONS) as other:
        print(len(key), other.submit(has_key, key).result(), other.submit(has_key, b"another").result())
"""
#: What the program does between the construction of the executor and its first call.
BEFORE = {
    "nothing": "pass",
    "imported": "import multiprocessing",
    "key set": "import multiprocessing; multiprocessing.current_process().authkey = b'chosen by the program'",
}


@pytest.mark.parametrize("before", BEFORE)
def test_multiprocessing_is_imported_late(before: str, start_method: str, tmp_path: Path) -> None:
    """The key of workers is the program's, whichever side imports multiprocessing first; we do not import it."""
    if start_method == "spawn" and sys.version_info < (3, 11):
        pytest.skip("ProcessPoolExecutor has no limit of calls")
    program = tmp_path / "program.py"
    root = str(Path(__file__).parent.parent.parent)
    printed = []
    for name in EXECUTORS:
        text = IMPORTED_LATE.replace("METHOD", start_method).replace("BEFORE", BEFORE[before]).replace("EXECUTOR", name)
        program.write_text(text.replace("concurrent.futures import Scaler", "scaler_executor import Scaler"))
        # A path short enough for the socket of the manager.
        with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
            environment = {**os.environ, "PYTHONPATH": root, "TMPDIR": temporary}
            done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
        assert not done.returncode, done.stderr
        printed.append(done.stdout.splitlines())
    standard, ours = printed
    assert ours[0] == f"1 {before != 'nothing'}"
    assert ours[1:] == standard[1:]


def test_the_key_is_not_shown() -> None:
    """What a log or an error shows of a worker has no key in it."""
    assert "secret" not in repr(Identity(authkey=b"secret"))


def test_arguments(start_method: str, tmp_path: Path) -> None:
    """As an argument or a result a primitive is refused in the same words, and the executor goes on."""
    assert_alike(cases.as_arguments, start_method, directory=tmp_path)


def test_connections_and_sockets(start_method: str, tmp_path: Path) -> None:
    """They travel as copies, to workers and back."""
    assert_alike(cases.connections_as_arguments, start_method, directory=tmp_path)


@pytest.mark.parametrize("start_method", [*START_METHODS, None])
def test_identity(start_method: str | None, tmp_path: Path) -> None:
    """multiprocessing tells a call the same of its process and its parent."""
    seen = assert_alike(cases.identity, start_method, directory=tmp_path)
    assert seen["parent alive"] and seen["pid"]
    assert assert_alike(cases.parent, start_method, directory=tmp_path)


def test_name_of_a_worker() -> None:
    """It is a number of its own, for logs."""
    with ScalerExecutor(1) as executor:
        assert executor.submit(cases.name_of_process).result().startswith("ScalerWorker-")
