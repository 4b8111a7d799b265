"""How executors begin and end where threads, callbacks and odd surroundings cross."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import Scene, children_of, wait_gone, wait_until

from scaler_executor import ScalerExecutor

DEADLINE_S = 60.0


@pytest.mark.parametrize("rounds", range(3))
def test_executors_are_made_in_several_threads(rounds: int) -> None:
    """Each is made and works, though the others' forkers are forked while its own processes start."""
    executors: list[ScalerExecutor] = []
    results: list[int] = []

    def make() -> None:
        executor = ScalerExecutor(1)
        executors.append(executor)
        results.append(executor.submit(pow, 2, 5).result(DEADLINE_S))

    threads = [threading.Thread(target=make, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert results == [32, 32, 32]
    for executor in executors:
        executor.shutdown()


def test_shutdown_waits_for_the_first_callback() -> None:
    """A callback that runs while shutdown waits has returned when shutdown does, as in the standard library."""
    executor = ScalerExecutor(1)
    has_ended = threading.Event()
    may_end = threading.Event()

    def call_back(future: object) -> None:
        may_end.wait(DEADLINE_S)
        has_ended.set()

    executor.submit(time.sleep, 0.2).add_done_callback(call_back)
    threading.Timer(0.5, may_end.set).start()
    executor.shutdown()
    assert has_ended.is_set()


def test_numbers_of_numpy_are_numbers() -> None:
    """max_workers and the times may come from anywhere."""
    with ScalerExecutor(np.int64(1), cancel_grace=np.float64(0.5)) as executor:  # type: ignore[arg-type]
        assert executor.submit(pow, 2, 5).result(DEADLINE_S) == 32


@pytest.mark.skipif(sys.version_info[:2] == (3, 13), reason="3.13.0 cannot import socket in a removed directory")
def test_the_working_directory_is_gone(tmp_path: "os.PathLike[str]") -> None:
    """An executor can be made where there is no current directory any more."""
    before = os.getcwd()
    gone = os.path.join(tmp_path, "gone")
    os.mkdir(gone)
    os.chdir(gone)
    try:
        os.rmdir(gone)
        executor = ScalerExecutor(1)
    finally:
        os.chdir(before)
    assert executor.submit(pow, 2, 5).result(DEADLINE_S) == 32
    executor.shutdown()


def test_a_failing_iterable_of_futures_leaves_no_request_behind() -> None:
    """What was asked before the iterable failed is passed on: no value is dropped without a word."""
    with ScalerExecutor(1) as executor:
        running = executor.submit(time.sleep, DEADLINE_S)
        other = executor.submit(pow, 2, 5)

        def futures() -> object:
            yield running
            raise LookupError

        with pytest.raises(LookupError):
            executor.cancel(futures())  # type: ignore[arg-type]
        assert other.result(DEADLINE_S) == 32
        assert running.cancelled()


EXIT_WITH_CALLBACKS = """
import time
from scaler_executor import ScalerExecutor
executor = ScalerExecutor(1)
for number in range(4):
    executor.submit(time.sleep, 0.05).add_done_callback(lambda future: print("called", flush=True))
"""

SHUTDOWN_WITHOUT_WAITING = """
import time
from scaler_executor import ScalerExecutor
executor = ScalerExecutor(1)
def call_back(future):
    time.sleep(0.2)
    print("called", flush=True)
for number in range(4):
    executor.submit(abs, number).add_done_callback(call_back)
executor.shutdown(wait=False)
"""


@pytest.mark.parametrize("program", [EXIT_WITH_CALLBACKS, SHUTDOWN_WITHOUT_WAITING], ids=["exit", "shutdown"])
def test_callbacks_of_accepted_calls_run_before_the_interpreter_exits(program: str) -> None:
    """Each accepted call is made and each callback runs, though the first of them comes when the program has ended."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout.count("called"), done.stderr) == (0, 4, "")


def test_standard_input_is_closed() -> None:
    """A program without standard input, as a daemon's, has workers like any other."""
    program = (
        "from scaler_executor import ScalerExecutor\nwith ScalerExecutor(1) as e: print(e.submit(pow, 2, 5).result())"
    )
    command = ["sh", "-c", f"exec {sys.executable} -c '{program}' <&-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "32\n", "")


UNUSED = """
import multiprocessing, os, sys
from scaler_executor import ScalerExecutor

executor = ScalerExecutor(2, multiprocessing.get_context(sys.argv[1]))
print("made", flush=True)
os.read(os.open(sys.argv[2], os.O_RDWR), 1)
"""


def test_client_is_killed_before_its_first_call(scene: Scene, start_method: str) -> None:
    """What was started for an executor that had no call yet ends with its process."""
    gate = scene.fifo()
    client = scene.client(UNUSED, start_method, gate.path)
    wait_until(lambda: client.output == "made\n", "no executor")
    (serve,) = children_of(client.pid)
    os.kill(client.pid, signal.SIGKILL)
    wait_gone(serve)


STATE = """
import multiprocessing, os, sys
from scaler_executor import ScalerExecutor

def look():
    import module_of_the_test
    return os.environ.get("SET_LATER"), os.getcwd(), module_of_the_test.value, state

executor = ScalerExecutor(1, multiprocessing.get_context(sys.argv[1]))
os.environ["SET_LATER"] = "yes"
os.mkdir("later")
with open("later/module_of_the_test.py", "w") as file:
    file.write("value = 3")
os.chdir("later")
sys.path.insert(0, os.getcwd())
state = [4]
state.append(5)
print(executor.submit(look).result() == ("yes", os.getcwd(), 3, [4, 5]))
executor.shutdown()
"""


def test_workers_are_what_the_process_is_at_the_first_call(
    scene: Scene, start_method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment, directory, path and globals that change between construction and first call are seen."""
    monkeypatch.chdir(tmp_path)
    assert scene.client(STATE, start_method).succeed() == "True\n"


# Files of the user's that are named like what we import

SHADOW = """
import os
os.write(2, b"imported: " + __name__.encode())
raise ImportError(__name__)
"""
DEPENDENCIES = {"cloudpickle", "msgspec", "scaler_executor", "typing_extensions", "zmq"}
SHADOWED_LATE = """
import multiprocessing, os, sys
from scaler_executor import ScalerExecutor
executor = ScalerExecutor(1, multiprocessing.get_context(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
os.chdir(sys.argv[2])
print(executor.submit(pow, 2, 5).result(), *executor.map(abs, [-1, -2]))
executor.shutdown()
"""
SHADOWED_FIRST = """
import sys
from scaler_executor import ScalerExecutor
options = {"max_tasks_per_child": 9} if sys.argv[1] == "spawn" else {}
with ScalerExecutor(1, **options) as executor:
    print(executor.submit(pow, 2, 5).result(), *executor.map(abs, [-1, -2]))
"""


def run_beside(directory: Path, names: set[str], program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a program beside files of such names, its directory also in PYTHONPATH."""
    for name in names:
        (directory / f"{name}.py").write_text(SHADOW)
    (directory / "program.py").write_text(program)
    root = str(Path(__file__).parent.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), root])}
    command = [sys.executable, str(directory / "program.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment)


def test_names_of_our_modules_that_come_late(start_method: str, tmp_path: Path) -> None:
    """What a program puts into its path after construction is not taken for anything that our processes import."""
    shadows = tmp_path / "shadows"
    shadows.mkdir()
    for name in {*sys.stdlib_module_names, *DEPENDENCIES}:
        (shadows / f"{name}.py").write_text(SHADOW)
    done = run_beside(tmp_path, set(), SHADOWED_LATE, start_method, str(shadows))
    assert (done.returncode, done.stdout, done.stderr) == (0, "32 1 2\n", "")


def test_names_of_modules_that_only_our_processes_import(start_method: str, tmp_path: Path) -> None:
    """Files beside the program, in PYTHONPATH even, are not taken for them."""
    names = {"zmq", "cloudpickle", "agent", "calls", "forker", "serve", "worker"}
    if start_method == "spawn":
        names.add("ctypes")  # which the program itself needs for a fork
    done = run_beside(tmp_path, names, SHADOWED_FIRST, start_method)
    assert (done.returncode, done.stdout, done.stderr) == (0, "32 1 2\n", "")


def test_a_file_in_the_place_of_our_library(start_method: str, tmp_path: Path) -> None:
    """The error tells which file it is."""
    (tmp_path / "msgspec.py").write_text("VALUE = 1\n")
    done = run_beside(tmp_path, set(), SHADOWED_FIRST, start_method)
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and str(tmp_path / "msgspec.py") in last
