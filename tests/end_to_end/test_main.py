"""The client's `__main__` in workers: a table of cases, with every start method and however the program is started."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest
from support import DEADLINE_S, Scene

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
