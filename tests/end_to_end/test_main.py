"""The client's `__main__` in workers: a table of cases, with every start method and however the program is started."""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest
from support import DEADLINE_S, Cluster, Scene

CASES = Path(__file__).parent / "main_cases.py"
ROOT = str(Path(__file__).parent.parent.parent)


def needs(*modules: str) -> pytest.MarkDecorator:
    """Skip a test where these are not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def run(command: list[str], directory: Path, text: str | None = None) -> str:
    """Run a command that must succeed and say nothing on standard error. Return its output."""
    environment = dict(os.environ, PYTHONPATH=ROOT)
    finished = subprocess.run(
        command,
        input=text if text is not None else "",
        capture_output=True,
        text=True,
        cwd=directory,
        env=environment,
        timeout=2 * DEADLINE_S,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize("moment", ["before", "behind"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_cases(tmp_path: Path, method: str, moment: str) -> None:
    """Everything that a program's functions reach in its `__main__` is there, and is the same from call to call."""
    tree = ast.parse(CASES.read_text())
    cases = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")]
    assert len(cases) >= 40
    output = run([sys.executable, str(CASES), method, moment], tmp_path)
    assert output.splitlines() == [f"{case}: good" for case in cases]


# How a program can be started

PROGRAM = """
import multiprocessing, sys
from scaler_executor import ScalerExecutor

calls = 0

class Thing:
    def __init__(self, value):
        self.value = value

def work(x):
    global calls
    calls += 1
    return Thing(x * 2), calls, __name__

def main():
    with ScalerExecutor(1, multiprocessing.get_context(METHOD)) as executor:
        for x in (1, 2):
            thing, number, name = executor.submit(work, x).result(60)
            assert type(thing) is Thing and (thing.value, number, name) == (2 * x, x, "__main__"), (number, name)
        assert [thing.value for thing, _, _ in executor.map(work, range(3))] == [0, 2, 4]
    print("made", calls, "calls here")

"""
GUARDED = PROGRAM + 'if __name__ == "__main__":\n    main()\n'
UNGUARDED = PROGRAM + "main()\n"
OUTPUT = "made 0 calls here\n"


@pytest.mark.parametrize("text", [GUARDED, UNGUARDED], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("how", ["file", "module", "package", "directory", "zipapp", "command", "stdin", "prompt"])
def test_ways_to_start(tmp_path: Path, start_method: str, how: str, text: str) -> None:
    """A program runs once and finds its own functions, classes and globals, however it was started."""
    text = text.replace("METHOD", repr(start_method))
    (tmp_path / "package").mkdir()
    for path in ("program.py", "package/__init__.py", "package/__main__.py"):
        (tmp_path / path).write_text("" if path.endswith("__init__.py") else text)
    zipapp.create_archive(tmp_path / "package", tmp_path / "program.pyz")
    command, stdin = {
        "file": (["program.py"], None),
        "module": (["-m", "program"], None),
        "package": (["-m", "package"], None),
        "directory": (["package"], None),
        "zipapp": (["program.pyz"], None),
        "command": (["-c", text], None),
        "stdin": (["-"], text),
        "prompt": (["-i", "-q"], _as_typed(text)),
    }[how]
    output = run([sys.executable, *command], tmp_path, stdin)
    assert output == OUTPUT


def _as_typed(text: str) -> str:
    """Return what is typed at the prompt to get a program: a block ends with an empty line."""
    lines = [line for line in text.splitlines() if line]
    typed = []
    for line, following in zip(lines, [*lines[1:], "end"], strict=True):
        typed.append(line)
        if line.startswith(" ") and not following.startswith(" "):
            typed.append("")
    return "\n".join(typed) + "\n"


TEST_MODULE = """
from scaler_executor import ScalerExecutor
import multiprocessing

class Thing:
    def __init__(self, value):
        self.value = value

def work(x):
    return Thing(x * 2)

def test_it():
    with ScalerExecutor(1, multiprocessing.get_context(METHOD)) as executor:
        assert type(executor.submit(work, 1).result(60)) is Thing
        assert executor.submit(lambda: work(2).value).result(60) == 4
"""


def test_under_pytest(tmp_path: Path, start_method: str) -> None:
    """Functions of a test module are found."""
    (tmp_path / "test_program.py").write_text(TEST_MODULE.replace("METHOD", repr(start_method)))
    output = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_program.py"], tmp_path)
    assert "1 passed" in output


@needs("IPython")
def test_under_ipython(tmp_path: Path, start_method: str) -> None:
    """Functions of a program that IPython runs, and of its prompt, are found."""
    text = UNGUARDED.replace("METHOD", repr(start_method))
    (tmp_path / "program.ipy").write_text(text)
    environment = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "--profile-dir", str(tmp_path)]
    assert OUTPUT in run([*environment, "program.ipy"], tmp_path)


CELLS = [
    "import multiprocessing\nfrom scaler_executor import ScalerExecutor\n"
    "executor = ScalerExecutor(1, multiprocessing.get_context(METHOD))",
    "factor = 2\nclass Thing:\n    def __init__(self, value): self.value = value\n"
    "def work(x): return Thing(x * factor)",
    "first = executor.submit(work, 1).result(60)\nassert type(first) is Thing and first.value == 2",
    "factor = 3",
    "assert executor.submit(work, 1).result(60).value == 3",
    "def work(x): return Thing(-x)",
    "assert [thing.value for thing in executor.map(work, range(3))] == [0, -1, -2]",
    "import time\nfuture = executor.submit(time.sleep, 3600)\nfuture.cancel(30)\nassert future.cancelled()",
    "import asyncio\nassert (await asyncio.wrap_future(executor.submit(work, 4))).value == -4",
    "executor.shutdown()",
]


RUN_NOTEBOOK = """
import nbclient, nbformat

notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in {cells!r}])
nbclient.NotebookClient(notebook, timeout=60).execute()
print("good")
"""


@needs("nbclient", "nbformat", "ipykernel")
def test_in_a_notebook(tmp_path: Path, start_method: str) -> None:
    """Cells define and redefine functions, classes and globals; the next call sees them."""
    cells = [cell.replace("METHOD", repr(start_method)) for cell in CELLS]
    (tmp_path / "run_notebook.py").write_text(RUN_NOTEBOOK.format(cells=cells))
    assert run([sys.executable, "run_notebook.py"], tmp_path) == "good\n"


INITIALIZER_PROGRAM = """
import multiprocessing, sys
from scaler_executor import ScalerExecutor

model = None
unit = {"kilo": 1000}

class Model:
    def __init__(self, weight):
        self.weight = weight * unit["kilo"]

def load(weight):
    global model
    model = Model(weight)

def use(x):
    return model.weight * x

if __name__ == "__main__":
    for context in (multiprocessing.get_context(method) for method in ("fork", "spawn", "forkserver")):
        with ScalerExecutor(2, context, initializer=load, initargs=(2,)) as executor:
            assert list(executor.map(use, range(5))) == [0, 2000, 4000, 6000, 8000]
            assert executor.submit(use, 1).result(60) == 2000 and model is None
    print("good")
"""


def test_initializer_sets_a_global(scene: Scene) -> None:
    """What an initializer of the program sets in `__main__`, calls find there."""
    assert scene.client(INITIALIZER_PROGRAM).succeed() == "good\n"


SHUTDOWN_OF_DEFINITIONS = """
import multiprocessing
from scaler_executor import ScalerExecutor

numbers = []

def count(marker):
    return len(numbers), marker

if __name__ == "__main__":
    with ScalerExecutor(2, multiprocessing.get_context("spawn")) as executor:
        for number in range(600):
            numbers = list(range(number))
            assert executor.submit(count, "x").result(60) == (number, "x")
        client = executor._client
        assert len(client._functions._entries) < 10 and len(client._functions._definitions) < 10
    print("good")
"""


def test_old_versions_are_forgotten(scene: Scene) -> None:
    """A global that is bound anew before each call is seen each time, and its old versions are not kept."""
    assert scene.client(SHUTDOWN_OF_DEFINITIONS).succeed() == "good\n"


FIRST_CALLS = """
import multiprocessing, threading
from concurrent.futures import ThreadPoolExecutor
from scaler_executor import ScalerExecutor

numbers = (x for x in range(3))

def use(x):
    return x, type(numbers).__name__

if __name__ == "__main__":
    for _ in range(10):
        barrier = threading.Barrier(4)
        with ScalerExecutor(1, multiprocessing.get_context("fork")) as executor, ThreadPoolExecutor(4) as threads:
            def submit(x):
                barrier.wait()
                return executor.submit(use, x).result(60)
            assert sorted(threads.map(submit, range(4))) == [(x, "generator") for x in range(4)]
    print("good")
"""


def test_first_calls_of_several_threads(scene: Scene) -> None:
    """Whoever is first, calls find what workers inherit, also what does not pickle; and nothing is said at the end."""
    assert scene.client(FIRST_CALLS, flags=("-W", "ignore::DeprecationWarning")).succeed() == "good\n"


CHANGED_MEANWHILE = """
import multiprocessing, threading
from scaler_executor import ScalerExecutor

class Item:
    pass

table = {number: Item() for number in range(5000)}
is_over = threading.Event()

def size():
    return len(table)

def fill():
    number = 5000
    while not is_over.wait(0.0002):
        table[number] = Item()
        number += 1

if __name__ == "__main__":
    with ScalerExecutor(1, multiprocessing.get_context("spawn")) as executor:
        thread = threading.Thread(target=fill)
        thread.start()
        sizes = [executor.submit(size).result(60) for _ in range(20)]
        is_over.set()
        thread.join()
        assert min(sizes) >= 5000, sizes
    print("good")
"""


def test_global_that_another_thread_fills(scene: Scene) -> None:
    """A container that changes while it is pickled is there all the same."""
    assert scene.client(CHANGED_MEANWHILE).succeed() == "good\n"


SET_BY_STRING = """
import multiprocessing
from scaler_executor import ScalerExecutor

state = None

def load():
    globals()["state"] = 5

def use():
    return state

if __name__ == "__main__":
    with ScalerExecutor(1, multiprocessing.get_context("spawn"), initializer=load) as executor:
        assert executor.submit(use).result(60) == 5
    print("good")
"""


def test_what_an_initializer_sets_by_string_stays(scene: Scene) -> None:
    """A global that a worker has set before the program's own arrives is left alone."""
    assert scene.client(SET_BY_STRING).succeed() == "good\n"


MANY_GLOBALS = """
import multiprocessing
from scaler_executor import ScalerExecutor

class Counted:
    pickled = 0
    def __reduce__(self):
        Counted.pickled += 1
        return bytes, (b"x" * 20_000,)

counted = Counted()
for number in range(300):
    exec(f"name_{number} = {number}")

exec("def use(): return len(counted), " + ", ".join(f"name_{number}" for number in range(300)))

if __name__ == "__main__":
    with ScalerExecutor(1, multiprocessing.get_context("spawn")) as executor:
        for _ in range(5):
            assert executor.submit(use).result(60)[:2] == (20_000, 0)
        assert Counted.pickled <= 2, Counted.pickled
    print("good")
"""


def test_more_globals_than_are_remembered(scene: Scene) -> None:
    """A function may need hundreds of globals; a large one is pickled once."""
    assert scene.client(MANY_GLOBALS).succeed() == "good\n"


# The forker is lost, and with it what workers inherited

LOST_FORKER = """
import multiprocessing, os, signal, sys, threading, traceback
from pathlib import Path
from scaler_executor import ScalerExecutor, WorkerDiedError
from support import Cluster, Fifo

class Scaled:
    unit = 10

class Item(Scaled):
    def __init__(self, value):
        self.value = value
    def __eq__(self, other):
        return type(other) is Item and self.value == other.value

factor = 3
table = {number: number * number for number in range(100)}
local = (number for number in ())  # does not pickle
rebound = "at the fork"

def helper(value):
    return factor * value + table[value]

def of_number(value):
    return helper(value), Scaled.unit

def of_item(item):
    return Item(helper(item.value))

def use_local():
    return type(local).__name__

def tell_rebound():
    return rebound

def hold(started, gate):
    started.tell(os.getpid())
    gate.await_opening()

def kill_forker():
    # With both workers in a call. Returns calls that were pickled while it was alive.
    running = [executor.submit(hold, started, gate) for _ in range(2)]
    pids = [started.hear() for _ in running]
    queued = (
        [executor.submit(of_number, value) for value in range(50)],
        [executor.submit(of_item, Item(value)) for value in range(50)],
        [executor.submit(lambda value=value: of_number(value)) for value in range(50)],
        [executor.submit(max, [value], key=helper) for value in range(50)],
        executor.map(of_number, range(100)),
        executor.map(of_item, map(Item, range(100)), chunksize=7),
        executor.submit(use_local),
        executor.submit(tell_rebound),
    )
    os.kill(Cluster().forker, signal.SIGKILL)
    for future in running:
        assert type(future.exception(60)) is WorkerDiedError, future.exception(60)
    return queued

def check(queued):
    numbers, items, lambdas, keys, mapped_numbers, mapped_items, with_local, with_rebound = queued
    values = [3 * value + value * value for value in range(100)]
    expected = [(value, 10) for value in values]
    assert [future.result(60) for future in numbers] == expected[:50]
    assert [future.result(60) for future in items] == [Item(value) for value in values[:50]]
    assert [future.result(60) for future in lambdas] == expected[:50]
    assert [future.result(60) for future in keys] == list(range(50))
    assert list(mapped_numbers) == expected
    assert list(mapped_items) == [Item(value) for value in values]
    error = with_local.exception(60)
    told = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert type(error) is NameError and "could not be sent" in told, told
    assert with_rebound.result(60) == "before the loss"

if __name__ == "__main__":
    started, gate = (Fifo(Path(path)) for path in sys.argv[1:])
    with ScalerExecutor(2, multiprocessing.get_context("fork")) as executor:
        assert executor.submit(use_local).result(60) == "generator"
        rebound = "before the loss"
        for turn in range(3):
            check(kill_forker())
    print("good")
"""


def test_forker_lost(scene: Scene) -> None:
    """Calls that were pickled when workers inherited `__main__` run as well in those that do not, however often."""
    output = scene.client(LOST_FORKER, scene.directory / "started", scene.directory / "gate").succeed()
    assert output.splitlines()[-1] == "good", output


SLOW_DEFINITIONS = """
import multiprocessing, os, signal, sys, threading
from pathlib import Path
from scaler_executor import ScalerExecutor, WorkerDiedError
from support import Cluster, Fifo

kind, *paths = sys.argv[1:]

class Slow:
    def __reduce__(self):
        started.tell("pickling in " + threading.current_thread().name)
        if kind == "raises":
            raise SystemExit
        gate.await_opening()
        return str, ("slow",)

slow = Slow()

def use(x):
    return x, str(slow)

def hold(started, gate):
    started.tell()
    gate.await_opening()

if __name__ == "__main__":
    started, gate = (Fifo(Path(path)) for path in paths)
    executor = ScalerExecutor(1, multiprocessing.get_context("fork"))
    running = executor.submit(hold, started, gate)
    started.hear()
    queued = [executor.submit(use, x) for x in range(20)]
    # Whoever is blocked by a callback must not be who is to pickle.
    running.add_done_callback(lambda _: queued[0].exception(60))
    cluster = Cluster()
    os.kill(cluster.forker, signal.SIGKILL)
    assert started.hear().startswith("pickling")
    assert type(running.exception(60)) is WorkerDiedError
    if kind == "raises":
        assert [type(future.exception(60)) for future in queued] == [AttributeError] * 20
    else:
        assert queued.pop().cancel() and not any(future.done() for future in queued)
        if kind == "serve":
            os.kill(cluster.serve, signal.SIGKILL)
            assert all("signal 9" in str(future.exception(60)) for future in queued)
        if kind == "client":
            os.kill(os.getpid(), signal.SIGKILL)
        gate.open()
        if kind == "returns":
            assert [future.result(60) for future in queued] == [(x, "slow") for x in range(19)]
    executor.shutdown()
    print("good")
"""


@pytest.mark.parametrize("kind", ["returns", "raises", "serve", "client"])
def test_forker_lost_and_slow_definitions(scene: Scene, kind: str) -> None:
    """While definitions are being pickled, calls wait, can be cancelled, and end with the cluster; however it ends."""
    client = scene.client(SLOW_DEFINITIONS, kind, scene.directory / "started", scene.directory / "gate")
    if kind == "client":
        assert client.wait() == -9
    else:
        assert client.succeed().splitlines()[-1] == "good"


LOST_AT_EXIT = """
import multiprocessing, sys, threading
from scaler_executor import ScalerExecutor
from support import copy_of_fifo, copy_of_journal

started, gate, exiting = map(copy_of_fifo, sys.argv[1:4])
journal = copy_of_journal(sys.argv[4])

def hold():
    started.tell()
    gate.await_opening()

def note(x):
    journal.write(x)

executor = ScalerExecutor(1, multiprocessing.get_context("fork"))
executor.submit(hold)
for x in range(10):
    executor.submit(note, x)
threading._register_atexit(exiting.tell)
"""


def test_forker_lost_at_exit(scene: Scene) -> None:
    """Accepted calls run also then, when no thread can be started any more."""
    started, gate, exiting, journal = scene.fifo(), scene.fifo(), scene.fifo(), scene.journal()
    client = scene.client(LOST_AT_EXIT, started.path, gate.path, exiting.path, journal.path)
    started.hear()
    exiting.hear()
    os.kill(Cluster(client.pid).forker, signal.SIGKILL)
    client.succeed()
    assert [line[0] for line in journal.read()] == [str(x) for x in range(10)]
