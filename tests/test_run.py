"""`scaler-executor run`: small programs, run with it and without it, differ in the executor and in nothing else."""

import os
import re
import shlex
import signal
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest

RUN = [sys.executable, "-m", "scaler_executor", "run"]
#: What a program can see of how it was started. (A shell in between sets three variables.)
LOOK = """\
import os, sys
print(sys.argv, sys.orig_argv, sys.executable, sys.path, sys.flags, os.getcwd())
print(sorted((key, value) for key, value in os.environ.items() if key not in ("_", "PWD", "OLDPWD")))
print(__name__, __file__, __package__, __doc__, type(__loader__), __spec__ and (__spec__.name, __spec__.origin))
print(sys.modules["__main__"].__dict__ is globals(), sys.modules.get("sitecustomize"), __builtins__)
print([name for name in sys.modules if name.startswith("concurrent") or name in ("argparse", "runpy", "shutil")])
"""


@pytest.fixture(autouse=True)
def without_settings(monkeypatch):
    """What the environment sets for all interpreters would stand among our flags, and so in `sys.orig_argv`."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)


def start(command, cwd, **options):
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(command, cwd, text="", **options):
    """Return exit code, stdout and stderr."""
    process = start(command, cwd, **options)
    try:
        out, err = process.communicate(text, timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


def run_both(arguments, cwd, text="", **options):
    """Run `python ARGUMENTS` without and with the swap, check that all is equal, and return it."""
    without = run([sys.executable, *arguments], cwd, text, **options)
    assert run([*RUN, *arguments], cwd, text, **options) == without
    return without


def write(path, text, mode=0o644):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


# What the program sees of itself


@pytest.mark.parametrize("arguments", [["a", "-m", "--help", "--", "-x", ""], []], ids=["arguments", "none"])
def test_file(tmp_path, arguments):
    """A file finds its argv, path, flags, environment and `__main__` as if it had been started by the interpreter."""
    write(tmp_path / "elsewhere" / "look.py", LOOK)
    code, out, err = run_both(["elsewhere/look.py", *arguments], tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith(repr(["elsewhere/look.py", *arguments]))


def test_module(tmp_path):
    """So does a module, one in a package, and a package's `__main__`."""
    write(tmp_path / "look.py", LOOK)
    write(tmp_path / "parcel" / "__init__.py", "print('parcel')")
    write(tmp_path / "parcel" / "__main__.py", LOOK)
    write(tmp_path / "parcel" / "look.py", LOOK)
    for name in ["look", "parcel", "parcel.look"]:
        code, out, err = run_both(["-m", name, "--an-option", "-h"], tmp_path)
        assert (code, err) == (0, "")
        assert "__main__ " + str(tmp_path) in out


def test_directory_and_archive(tmp_path):
    """So does a directory, and a zipapp."""
    write(tmp_path / "program" / "__main__.py", LOOK)
    zipapp.create_archive(tmp_path / "program", tmp_path / "archive.pyz")
    assert run_both(["program", "1"], tmp_path)[0] == 0
    assert run_both(["archive.pyz", "1"], tmp_path)[0] == 0


def test_standard_input_as_program(tmp_path):
    """So does a program that is read from standard input."""
    code, out, _ = run_both(["-", "1"], tmp_path, "import sys; print(sys.argv, __name__)")
    assert (code, out) == (0, "['-', '1'] __main__\n")


def test_pipe_as_program(tmp_path):
    """So does one in a pipe, which can be read only once."""
    reading, writing = os.pipe()
    os.write(writing, b"print(__name__, __file__)")
    os.close(writing)
    try:
        code, out, err = run([*RUN, f"/dev/fd/{reading}", "1"], tmp_path, pass_fds=[reading])
    finally:
        os.close(reading)
    assert (code, out, err) == (0, f"__main__ /dev/fd/{reading}\n", "")


def test_interpreter_flags(tmp_path):
    """Flags of the interpreter that runs us are the program's."""
    write(tmp_path / "look.py", LOOK)
    flags = ["-O", "-X", "dev", "-W", "ignore:x", "-B"]
    without = run([sys.executable, *flags, "look.py"], tmp_path)
    code, out, err = run([sys.executable, *flags, *RUN[1:], "look.py"], tmp_path)
    spelling = re.compile(r"\] \[.*?\] ")  # orig_argv: -Wignore:x
    assert (code, spelling.sub("", out), err) == (without[0], spelling.sub("", without[1]), without[2])


def test_users_sitecustomize(tmp_path):
    """A sitecustomize of the user's own is run as without us."""
    write(tmp_path / "site" / "sitecustomize.py", "import sys; sys.custom = __file__")
    write(tmp_path / "look.py", "import sitecustomize, sys; print(sys.custom, sitecustomize, sys.path)")
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    code, out, _ = run_both(["look.py"], tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert (code, out.split()[0]) == (0, str(tmp_path / "site" / "sitecustomize.py"))


def test_child_processes(tmp_path):
    """A Python that the program starts has the standard library's class, and no trace of us."""
    child = "import concurrent.futures as c, sys; print(c.ProcessPoolExecutor.__mro__, sys.path)"
    write(tmp_path / "p.py", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)")
    assert "scaler" not in run_both(["p.py"], tmp_path)[1].split(")")[0]


# How it ends


@pytest.mark.parametrize(
    "end, code",
    [
        ("sys.exit(3)", 3),
        ("sys.exit('some text')", 1),
        ("sys.exit(None)", 0),
        ("sys.exit(True)", 1),
        ("sys.exit(-1)", 255),
        ("raise SystemExit", 0),
        ("pass", 0),
        ("def f():\n    raise ValueError('wrong')\nf()", 1),
        ("raise ExceptionGroup('several', [ValueError(1)])", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("1 +", 1),
        ("import warnings; warnings.warn('old', stacklevel=2)", 0),
        ("import traceback; traceback.print_stack()", 0),
        ("os._exit(7)", 7),
        ("os.abort()", -signal.SIGABRT),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("sys.excepthook = lambda kind, *_: print('hook', kind); raise ValueError", 1),
        ("import threading; threading.Thread(target=lambda: [time.sleep(0.1), print('late')]).start()", 0),
    ],
)
def test_end(tmp_path, end, code):
    """Exit code or signal, what is printed and the traceback are the program's alone."""
    if "ExceptionGroup" in end and sys.version_info < (3, 11):
        pytest.skip("ExceptionGroup came with Python 3.11")
    text = (
        f"import atexit, os, signal, sys, time\natexit.register(print, 'at exit')\nprint('begun', flush=True)\n{end}\n"
    )
    write(tmp_path / "end.py", text)
    assert run_both(["end.py"], tmp_path)[0] == code
    assert run_both(["-m", "end"], tmp_path)[0] == code


def interrupt(command, cwd, *, is_alone=True):
    """Run a program in a process group of its own, press Ctrl-C when it says so. Return as `run`."""
    process = start(command, cwd, start_new_session=True)
    try:
        assert process.stdout.readline() == "ready\n"
        while is_alone and Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            os.sched_yield()  # it has not come to its sleep yet
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


def test_ctrl_c(tmp_path):
    """Ctrl-C ends a program as without us: its KeyboardInterrupt, its traceback, death by SIGINT."""
    text = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nfinally:\n    print('cleaned up')\n"
    write(tmp_path / "sleep.py", text)
    without = interrupt([sys.executable, "sleep.py"], tmp_path)
    assert interrupt([*RUN, "sleep.py"], tmp_path) == without
    assert (without[0], without[1]) == (-signal.SIGINT, "cleaned up\n")


def test_ctrl_c_in_a_pool(tmp_path):
    """With calls running, too; the workers print nothing. It comes when both workers are there: while the standard
    library's pool forks one, a Ctrl-C can make it hang."""
    text = """\
import time
from concurrent.futures import ProcessPoolExecutor
def work(number):
    if number == 1:
        print("ready", flush=True)
    time.sleep(60)
if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        try:
            list(pool.map(work, range(2)))
        finally:
            print("cleaned up")
"""
    write(tmp_path / "pool.py", text)
    without = interrupt([sys.executable, "pool.py"], tmp_path, is_alone=False)
    code, out, err = interrupt([*RUN, "pool.py"], tmp_path, is_alone=False)
    assert (code, out) == without[:2] == (-signal.SIGINT, "cleaned up\n")
    assert err.count("Traceback") == 1 and err.endswith("\nKeyboardInterrupt\n")


def test_ctrl_c_that_is_caught(tmp_path):
    """A program that catches it chooses its own exit code, 130 for example."""
    text = (
        "import sys, time\ntry:\n  print('ready', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(130)"
    )
    write(tmp_path / "catch.py", text)
    assert interrupt([*RUN, "catch.py"], tmp_path) == interrupt([sys.executable, "catch.py"], tmp_path) == (130, "", "")


def test_standard_input(tmp_path):
    """Standard input is the program's, to the last byte."""
    write(tmp_path / "count.py", "import sys; print(len(sys.stdin.read()), sys.stdin.encoding)")
    assert run_both(["count.py"], tmp_path, "line\n" * 50_000)[1] == "250000 utf-8\n"


# The swap


def check(tmp_path, text):
    """Run a program that asserts, with the swap only."""
    write(tmp_path / "check.py", text)
    code, out, err = run([*RUN, "check.py"], tmp_path)
    assert (code, err) == (0, ""), err
    return out


@pytest.mark.parametrize(
    "spelling",
    [
        "from concurrent.futures import ProcessPoolExecutor as P",
        "from concurrent.futures.process import ProcessPoolExecutor as P",
        "from concurrent.futures import process; P = process.ProcessPoolExecutor",
        "import concurrent.futures; P = concurrent.futures.ProcessPoolExecutor",
        "from concurrent.futures import *; P = ProcessPoolExecutor",
        "import importlib; P = importlib.import_module('concurrent.futures').ProcessPoolExecutor",
        "import pickle; P = pickle.loads(b'cconcurrent.futures.process\\nProcessPoolExecutor\\n.')",
    ],
)
def test_spellings(tmp_path, spelling):
    """Whichever way a program imports the class, it is the same one, a ScalerExecutor by the old name."""
    check(
        tmp_path,
        f"""\
{spelling}
import scaler_executor, concurrent.futures, concurrent.futures.process, pickle
assert issubclass(P, scaler_executor.ScalerExecutor) and issubclass(P, concurrent.futures.Executor)
assert P is concurrent.futures.ProcessPoolExecutor is concurrent.futures.process.ProcessPoolExecutor
assert pickle.loads(pickle.dumps(P)) is P
assert repr(P) == "<class 'concurrent.futures.process.ProcessPoolExecutor'>", P
""",
    )


def test_lazy(tmp_path):
    """Neither the standard library's slow module nor ours is imported before the program asks for the class."""
    check(
        tmp_path,
        """\
import sys
before = set(sys.modules)
import concurrent.futures, asyncio
from concurrent.futures import ThreadPoolExecutor, wait
late = {"concurrent.futures.process", "scaler_executor.executor", "multiprocessing"}
assert not late & set(sys.modules), late & set(sys.modules)
concurrent.futures.ProcessPoolExecutor
assert "concurrent.futures.process" not in sys.modules and "scaler_executor.executor" in sys.modules
try:
    concurrent.futures.Nonsense
except AttributeError as error:
    assert "has no attribute" in str(error) and "Nonsense" in str(error)
""",
    )


@pytest.mark.parametrize("before", ["", "concurrent.futures, ", "concurrent.futures.process, "])
def test_swap_of_what_is_loaded(tmp_path, before):
    """Modules that something at the interpreter's start has imported already are swapped too, and reloaded ones."""
    write(
        tmp_path / "loaded.py",
        f"""\
import {before}sys
if "concurrent.futures" in sys.modules: concurrent.futures.ProcessPoolExecutor
from scaler_executor.swap import install, replacement
install()
install()
import concurrent.futures.process, importlib
for _ in range(2):
    assert replacement() is concurrent.futures.process.ProcessPoolExecutor is concurrent.futures.ProcessPoolExecutor
    importlib.reload(concurrent.futures)
    importlib.reload(concurrent.futures.process)
assert [type(finder).__name__ for finder in sys.meta_path].count("_Finder") == 1
""",
    )
    assert run([sys.executable, "loaded.py"], tmp_path) == (0, "", "")


def test_modules_stay_themselves(tmp_path):
    """The other names of the modules, their specs and their source are the standard library's."""
    text = """\
import concurrent.futures, concurrent.futures.process as process, inspect
print(process._MAX_WINDOWS_WORKERS, process.BrokenProcessPool, process.EXTRA_QUEUED_CALLS, sorted(vars(process)))
print(dir(concurrent.futures), concurrent.futures.__all__)
for module in concurrent.futures, process:
    print(module.__spec__, module.__file__, len(inspect.getsource(module)), module.__loader__.__class__)
"""
    write(tmp_path / "look.py", text)
    clean = re.compile(r"0x\w+")
    without = run([sys.executable, "look.py"], tmp_path)
    assert clean.sub("", run([*RUN, "look.py"], tmp_path)[1]) == clean.sub("", without[1])
    assert without[0] == 0


#: Uses of the class that programs make, each with the result on stdout.
USES = {
    "manager": """\
    with multiprocessing.Manager() as manager, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        queue = manager.Queue()
        pool.submit(put, queue).result()
        print(queue.get()[1])
""",
    "queue as initarg": """\
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with ProcessPoolExecutor(1, context, put, (queue,)) as pool:
        print(pool.submit(double, 1).result(), queue.get()[1])
""",
    "global set by the initializer": """\
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), set_state, (5,)) as pool:
        print(pool.submit(get_state).result())
""",
    "current_process": """\
    with ProcessPoolExecutor(1) as pool:
        print(pool.submit(look_at_process).result())
""",
    "submit and map": """\
    with ProcessPoolExecutor(max_workers=2) as pool:
        print(pool.submit(double, 4).result(), list(pool.map(double, range(5), chunksize=2)))
        print(sorted(f.result() for f in as_completed([pool.submit(double, n) for n in range(3)])))
""",
    "isinstance": """\
    with ProcessPoolExecutor() as pool:
        print(isinstance(pool, ProcessPoolExecutor), isinstance(pool, Executor), type(pool).__name__, type(pool))
    print(isinstance(ThreadPoolExecutor(), ProcessPoolExecutor))
""",
    "subclass": """\
    class Pool(ProcessPoolExecutor):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.calls = 0
        def submit(self, fn, /, *args, **kwargs):
            self.calls += 1
            return super().submit(fn, *args, **kwargs)
    with Pool(1) as pool:
        print(pool.submit(double, 3).result(), pool.calls, pool._max_workers, isinstance(pool, ProcessPoolExecutor))
""",
    "map by one's own submit": """\
    class Pool(ProcessPoolExecutor):
        calls = 0
        def submit(self, fn, /, *args, **kwargs):
            self.calls += 1
            return super().submit(fn, *args, **kwargs)
    with Pool(2) as pool:
        print(list(pool.map(double, range(10))), pool.calls, list(pool.map(pow, range(7), range(9), chunksize=3)))
        print(pool.calls, list(pool.map(double, [])), pool.calls)
        try:
            pool.map(double, range(3), chunksize=0)
        except ValueError as error:
            print(error)
    with ProcessPoolExecutor(2) as pool:
        submitted = []
        submit = pool.submit
        pool.submit = lambda *args: submitted.append(submit(*args)) or submitted[-1]
        print(sum(pool.map(double, range(10), chunksize=5)), len(submitted), wait(submitted).not_done)
""",
    "initializer": """\
    with ProcessPoolExecutor(1, None, set_state, (5,)) as pool:
        print(pool.submit(get_state).result(), state)
""",
    "broken pool": """\
    with ProcessPoolExecutor(1) as pool:
        try:
            pool.submit(os._exit, 3).result()
        except BrokenProcessPool as error:
            print("caught", isinstance(error, BrokenExecutor), isinstance(error, RuntimeError))
""",
    "error": """\
    with ProcessPoolExecutor(1) as pool:
        try:
            pool.submit(double, None).result()
        except TypeError as error:
            print(error, "in double" in str(error.__cause__))
""",
    "wrong arguments": """\
    for arguments in [{"max_workers": 0}, {"initializer": 1}, {"max_workers": "x"}]:
        try:
            ProcessPoolExecutor(**arguments)
        except (TypeError, ValueError) as error:
            print(type(error), error)
""",
    "asyncio": """\
    import asyncio
    async def main():
        loop = asyncio.get_running_loop()
        with ProcessPoolExecutor(2) as pool:
            print(await asyncio.gather(*[loop.run_in_executor(pool, double, n) for n in range(5)]))
            try:
                await loop.run_in_executor(pool, double, None)
            except TypeError as error:
                print(error)
    asyncio.run(main())
""",
    "no shutdown": """\
    pool = ProcessPoolExecutor(1)
    pool.submit(double, 1).add_done_callback(lambda future: print("done", future.result(), flush=True))
""",
    "stdout of calls": """\
    print("before", flush=True)
    with ProcessPoolExecutor(1) as pool:
        list(pool.map(print, "abc"))
    print("after")
""",
    "exit code with a pool": """\
    with ProcessPoolExecutor(1) as pool:
        sys.exit(pool.submit(double, 21).result())
""",
    "spawn": """\
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        print(list(pool.map(double, range(5))), pool.submit(Record, 3).result().value)
""",
    "forkserver": """\
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as pool:
        print(list(pool.map(double, range(5))), pool.submit(Record, 3).result().value)
""",
    "set_start_method": """\
    multiprocessing.set_start_method("spawn")
    with ProcessPoolExecutor(2) as pool:
        print(list(pool.map(double, range(5))))
""",
    "pool in a call": """\
    with ProcessPoolExecutor(1) as pool:
        print(pool.submit(nested).result())
""",
}
USES |= {
    f"multiprocessing {method}": f"""\
    context = multiprocessing.get_context("{method}")
    with context.Pool(2) as pool:
        print(pool.map(double, range(5)))
    queue = context.Queue()
    process = context.Process(target=put, args=(queue,))
    process.start()
    print(queue.get(), process.join(), process.exitcode)
    # What multiprocessing's own process does with a pool works too, with the swap or without it.
    process = context.Process(target=nested)
    process.start()
    print(process.join(), process.exitcode)
"""
    for method in ["fork", "spawn", "forkserver"]
}
USES_HEAD = """\
import multiprocessing, os, sys
from concurrent.futures import (
    BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
)
from concurrent.futures.process import BrokenProcessPool
state = 0
def double(number): return number + number
def set_state(value): global state; state = value
def get_state(): return state
def put(queue): queue.put((__name__, state))
def look_at_process():
    return multiprocessing.parent_process() is None, multiprocessing.current_process().name == "MainProcess"
def nested():
    with ProcessPoolExecutor(1) as pool:
        return pool.submit(double, 5).result()
class Record:
    def __init__(self, value): self.value = value
if __name__ == "__main__":
"""


@pytest.mark.parametrize("use", USES)
def test_use(tmp_path, use):
    """A program that uses a process pool in this way prints the same; as a module too, where that may matter."""
    write(tmp_path / "program.py", USES_HEAD + USES[use])
    code, out, err = run_both(["program.py"], tmp_path)
    assert (code, err) == (42 if "exit code" in use else 0, "")
    assert out or code
    if "spawn" in use or "forkserver" in use:
        assert run_both(["-m", "program"], tmp_path) == (code, out, err)


#: Uses that ScalerExecutor does not serve yet, and why.


@pytest.mark.parametrize("use", ["spawn", "multiprocessing spawn", "multiprocessing forkserver"])
def test_use_in_an_archive(tmp_path, use):
    """So does a zipapp, whose `__main__` is imported by no child."""
    write(tmp_path / "zip" / "work.py", USES_HEAD.replace('if __name__ == "__main__":', "def main():") + USES[use])
    write(tmp_path / "zip" / "__main__.py", "import work\nif __name__ == '__main__': work.main()")
    zipapp.create_archive(tmp_path / "zip", tmp_path / "zip.pyz")
    code, out, err = run_both(["zip.pyz"], tmp_path)
    assert (code, err) == (0, "") and out


# Commands


def test_command(tmp_path):
    """A console script on PATH runs in the interpreter that its first line names, with that line's flags."""
    for name, head in [
        ("plain", f"#!{sys.executable}"),
        ("flagged", f"#!{sys.executable} -B"),
        ("env", "#!/usr/bin/env python3"),
        ("long", f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''"),
    ]:
        write(tmp_path / "bin" / name, f"{head}\n{LOOK}", mode=0o755)
        path = f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path}
        without = run([tmp_path / "bin" / name, "-x", "1"], tmp_path, env=environment)
        code, out, err = run([*RUN, name, "-x", "1"], tmp_path, env=environment)
        if name == "env":  # it starts "python3", and we what it would find: that shows in `sys.orig_argv`
            out = out.replace(f"['{os.path.dirname(sys.executable)}/python3', ", "['python3', ")
        assert (code, out, err) == without, name
        assert code == 0


def test_not_a_program(tmp_path):
    """What does not exist or is no Python of this environment's is refused in a sentence, with exit code 2."""
    folder = tmp_path / "bin"
    write(folder / "script", "#!/bin/sh\necho", mode=0o755)
    write(folder / "script-by-env", "#!/usr/bin/env bash\necho", mode=0o755)
    write(folder / "foreign", f"#!{tmp_path}/bin/python\nprint()", mode=0o755)
    (folder / "python").symlink_to(sys.executable)
    write(tmp_path / "pyvenv.cfg", "")
    write(folder / "gone", "#!/nonexistent/bin/python3\nprint()", mode=0o755)
    write(folder / "headless", "print()", mode=0o755)
    write(folder / "isolated", f"#!{sys.executable} -sE\nprint()", mode=0o755)
    (folder / "binary").write_bytes(b"\x7fELF\x02\x01")
    (folder / "binary").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    another = rf"belongs to another Python, {tmp_path}/bin/python, and this is {sys.executable}"
    for arguments, expected in [
        ("nothing", "no such command on PATH and no file: nothing"),
        ("nothing.py", "no such file: nothing.py"),
        ("./nothing", "no such file: ./nothing"),
        ("-m nothing", "no module named 'nothing'"),
        ("-m nothing.inside", "no module named 'nothing'"),
        ("script", "bin/script is not a Python program: it is run by /bin/sh"),
        ("script-by-env", "it is run by /usr/bin/env bash"),
        ("bin/script", "bin/script is not a Python program: it is run by /bin/sh"),
        ("foreign", another),
        ("gone", "belongs to another Python, /nonexistent/bin/python3"),
        ("headless", "bin/headless does not begin with `#!`"),
        ("isolated", "not with -I, -E or -S"),
        ("binary", "bin/binary is a binary, not a Python program"),
        ("bin/binary", "bin/binary is a binary, not a Python program"),
    ]:
        code, out, err = run([*RUN, *shlex.split(arguments)], tmp_path, env=environment)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("scaler-executor run: ") and expected in err and err.count("\n") == 1, err


def test_command_or_path(tmp_path):
    """A name without a slash is a command first, as in a shell; a file or directory where there is none."""
    write(tmp_path / "bin" / "both", f"#!{sys.executable}\nprint('command')", mode=0o755)
    write(tmp_path / "both" / "__main__.py", "print('directory')")
    write(tmp_path / "single" / "__main__.py", "print('single')")
    write(tmp_path / "bare", "print('bare')")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for name, expected in [("both", "command"), ("./both", "directory"), ("single", "single"), ("bare", "bare")]:
        assert run([*RUN, name], tmp_path, env=environment) == (0, f"{expected}\n", "")


def test_usage(tmp_path):
    """Our options stand before the program, and all behind it are the program's; --help shows how."""
    code, out, err = run([*RUN, "--help"], tmp_path)
    assert (code, err) == (0, "")
    assert "example:\n  scaler-executor run " in out
    write(tmp_path / "argv.py", "import sys; print(sys.argv[1:])")
    for arguments in [["--help"], ["-m", "x"], ["--", "-h"], ["--", "--"], ["-"]]:
        assert run([*RUN, "argv.py", *arguments], tmp_path) == (0, f"{arguments}\n", "")
        assert run([*RUN, "-m", "argv", *arguments], tmp_path) == (0, f"{arguments}\n", "")
    assert run([*RUN, "--", "argv.py", "1"], tmp_path) == (0, "['1']\n", "")
    for arguments in [[], ["-m"], ["--nonsense", "argv.py"], ["--"]]:
        code, out, err = run([*RUN, *arguments], tmp_path)
        assert (code, out) == (2, "") and err.startswith("usage: scaler-executor"), arguments


def test_from_elsewhere(tmp_path):
    """The program need not be able to import the package itself, only the interpreter that runs us."""
    program = write(tmp_path / "p.py", "import concurrent.futures as c; print(c.ProcessPoolExecutor.__mro__[1])")
    package_home = Path(__import__("scaler_executor").__file__).parent.parent
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code, out, _ = run([*RUN, program], package_home, env=environment)
    assert (code, out) == (0, "<class 'scaler_executor.executor.ScalerExecutor'>\n")
