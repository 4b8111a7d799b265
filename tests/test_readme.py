"""README's own code, run as it stands there.

Every block of Python is run as a program of its own; what it takes for granted is put before it, and what it has to
print is said here. A block without an entry has to end by itself without complaint; it may use `ScalerExecutor` and an
`executor` that is not its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEADLINE_S = 90
#: How the documentation's addresses and ports stand in README.
FIRST_MACHINE = "192.0.2.10"
SECOND_MACHINE = "192.0.2.11"


@dataclass(frozen=True)
class Block:
    """A block of code, and the heading above it."""

    heading: str
    language: str
    text: str


def blocks() -> list[Block]:
    found, heading, language, lines = [], "", "", list[str]()
    for line in (ROOT / "README.md").read_text().splitlines():
        if language and line == "```":
            found.append(Block(heading, language, "\n".join(lines) + "\n"))
            language = ""
        elif language:
            lines.append(line)
        elif line.startswith("```"):
            language, lines = line[3:], []
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()
    return found


def block(heading: str, language: str = "python") -> Block:
    (found,) = [each for each in blocks() if (each.heading, each.language) == (heading, language)]
    return found


EXECUTOR = "from scaler_executor import ScalerExecutor\nexecutor = ScalerExecutor(2)\n"


@dataclass(frozen=True)
class Case:
    """What belongs to a block."""

    before: str = ""
    after: str = ""
    #: A pattern for all that is printed.
    output: str = ""
    needs: tuple[str, ...] = ()


CASES = {
    "Use": Case(output=r"1024 \[3, 2, 1, 0, 1, 2\]\n"),
    "Cancel": Case(
        before=EXECUTOR
        + "import time\nsimulate, model = time.sleep, 600\n"
        + "futures = [executor.submit(simulate, model) for _ in range(4)]\n",
        after="assert str(future.cancel_outcome) == 'CancelOutcome.CANCELED', future.cancel_outcome\n"
        "assert future.cancelled() and all(each.cancelled() for each in futures)\n"
        "print(executor.submit(abs, -1).result())\n",
        output=r"1\n",
    ),
    "asyncio": Case(output=r"1024\n3\n2\n1\n0\n1\n2\n"),
    "The first hit ends the search": Case(output=r"crack\n"),
    "No call runs too long": Case(output=r"stopped\n0.1\nstopped\n0.2\n"),
    "A pool that survives segmentation faults": Case(output=r"0\n1\n4\n[^\n]*decode\(\)[^\n]*SIGSEGV(.|\n)*\n16\n25\n"),
    "joblib and scikit-learn": Case(output=r"\{'C': [0-9.]+, 'gamma': [0-9.]+\}\n", needs=("joblib", "sklearn")),
}
#: Tested one by one, below.
OTHERS = ("Swap", "Serve", "An asyncio service")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a user who has nothing yet."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SCALER_EXECUTOR")}
    path = os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])
    return {**variables, "PATH": path, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state")}


def run(
    text: str, directory: Path, environment: dict[str, str], *, name: str = "program.py", before: tuple[str, ...] = ()
) -> str:
    """Run a program; return what it prints. It may not complain."""
    (directory / name).write_text(text)
    done = subprocess.run(
        [*before, sys.executable, name],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def whole(each: Block, case: Case) -> str:
    """Return the program."""
    before = case.before
    if not before and "import ScalerExecutor" not in each.text:
        before = "from scaler_executor import ScalerExecutor\n"
        if not re.search(r"\bas executor:|^executor =", each.text, re.MULTILINE):
            before = EXECUTOR
    return before + each.text + case.after


def in_turn() -> Iterator[object]:
    for number, each in enumerate(blocks()):
        if each.language == "python" and each.heading not in OTHERS:
            yield pytest.param(each, id=f"{number}-{each.heading.replace(' ', '-')}")


@pytest.mark.parametrize("each", list(in_turn()))
def test_python(each: Block, tmp_path: Path, environment: dict[str, str]) -> None:
    """It runs, and prints what it should."""
    case = CASES.get(each.heading, Case())
    for module in case.needs:
        pytest.importorskip(module, reason=f"needs {module}, of the extra libraries")
    printed = run(whole(each, case), tmp_path, environment)
    assert re.fullmatch(case.output, printed) or each.heading not in CASES, printed


def test_every_case_is_there() -> None:
    """No entry here is left of a block that is no longer there."""
    assert {*CASES, *OTHERS} <= {each.heading for each in blocks()}


def test_swap(tmp_path: Path, environment: dict[str, str]) -> None:
    """The program before and after, and the one before by `scaler-executor run`, print the same."""
    lines = block("Swap", "diff").text.splitlines()
    before = "import os\ndef load(path):\n    os.environ['LOADED'] = path\npath = 'data'\n"
    after = "    print(sorted(executor.map(abs, range(-3, 3))), executor.submit(os.getenv, 'LOADED').result())\n"
    old, new = (
        before + "\n".join(line[1:] for line in lines if not line.startswith(other)) + "\n" + after for other in "+-"
    )
    assert "ProcessPoolExecutor" in old and "ProcessPoolExecutor" not in new and "ScalerExecutor" in new
    result = "[0, 1, 1, 2, 2, 3] data\n"
    assert run(old, tmp_path, environment) == run(new, tmp_path, environment, name="new.py") == result
    command = block("Swap", "sh").text.partition("#")[0].replace("PROGRAM.py ARGS...", "program.py").split()
    assert command[:2] == ["scaler-executor", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "scaler_executor", *command[1:]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", result)


def test_asyncio_service(tmp_path: Path, environment: dict[str, str]) -> None:
    """What takes too long is given up, and leaves the workers to others; Ctrl-C ends it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    text = block("An asyncio service").text
    assert "8000" in text
    (tmp_path / "program.py").write_text(text.replace("8000", str(port)))
    process = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        slow = [ask(process, port, 2305843009213693951) for _ in range(8)]  # a prime
        for connection in slow:
            assert answer(connection) == "that takes too long"
        assert [answer(ask(process, port, number)) for number in (15, 49)] == ["3", "7"]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert errors.splitlines()[-1] == "KeyboardInterrupt", errors
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str], port: int, number: int) -> socket.socket:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
            break
        except ConnectionRefusedError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    connection.sendall(f"{number}\n".encode())
    return connection


def answer(connection: socket.socket) -> str:
    with connection, connection.makefile() as file:
        return file.read().strip()


# Two machines


class Machines:
    """Two of them: network namespaces with a wire between them where that may be, else this one twice."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.before: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._names = [f"readme{os.getpid()}{which}" for which in "ab"]
        self.are_two = os.geteuid() == 0 and shutil.which("ip") is not None and self._connect()
        self._processes: list[subprocess.Popen[bytes]] = []

    def _connect(self) -> bool:
        one, two = self._names
        steps = [f"netns add {one}", f"netns add {two}"]
        steps.append(f"-n {one} link add name wire type veth peer name wire netns {two}")
        for name, address in ((one, FIRST_MACHINE), (two, SECOND_MACHINE)):
            steps.append(f"-n {name} address add {address}/24 dev wire")
            steps += [f"-n {name} link set dev {device} up" for device in ("wire", "lo")]
        for step in steps:
            if subprocess.run(["ip", *step.split()], capture_output=True).returncode:
                self._disconnect()
                return False
        self.before = (("ip", "netns", "exec", one), ("ip", "netns", "exec", two))
        return True

    def _disconnect(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, which: int, line: str, environment: dict[str, str]) -> Path:
        """Start what README has somebody type on one of them; return the file with what it prints."""
        words = shlex.split(line, comments=True)
        assert words[0] == "scaler-executor"
        output = self.directory / f"output{len(self._processes)}"
        with open(output, "wb") as file:
            command = [*self.before[which], sys.executable, "-m", "scaler_executor", *words[1:]]
            directory = self.directory / f"machine{which}"
            directory.mkdir(exist_ok=True)
            self._processes.append(
                subprocess.Popen(
                    command,
                    cwd=directory,
                    env={**environment, "XDG_STATE_HOME": str(directory)},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
        return output

    def await_line(self, output: Path, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + DEADLINE_S
        while not (found := re.search(pattern, output.read_text(), re.MULTILINE)):
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        return found

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.are_two:
            self._disconnect()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path)
    yield machines
    machines.close()


def test_cluster_of_two_machines(machines: Machines, tmp_path: Path, environment: dict[str, str]) -> None:
    """What README has people type on each of them makes a cluster, and the program uses the workers of both; unchanged
    and told by the environment too."""
    first, second = block("Serve", "sh").text.splitlines()
    assert f"tcp://{FIRST_MACHINE}:5735" in first and "connection.json" in second
    if not machines.are_two:
        first = first.replace(f"{FIRST_MACHINE}:5735", "127.0.0.1:*")
    output = machines.start(0, first, environment)
    connection = Path(machines.await_line(output, r"(/\S+connection\.json)")[1])
    machines.await_line(output, "^join it")
    (tmp_path / "machine1").mkdir()
    shutil.copy(connection, tmp_path / "machine1" / "connection.json")
    machines.await_line(machines.start(1, second, environment), "^connected")
    ask = (
        "import os, time\n"
        "def where(_):\n    time.sleep(0.05)\n    return os.stat('/proc/self/ns/net').st_ino, os.getppid()\n"
        "seen = set()\n"
        "while len(seen) < 2:\n    seen |= set(executor.map(where, range(16)))\n"
        "print(len({space for space, _ in seen}))\nexecutor.shutdown()\n"
    )
    directory, before = tmp_path / "machine1", machines.before[1]
    text = "from scaler_executor import ScalerExecutor\n" + block("Serve").text + ask
    count = f"{2 if machines.are_two else 1}\n"
    assert run(text, directory, environment, before=before) == count
    (variable,) = re.findall(r"#.*?(\w+)=connection\.json", block("Serve").text)
    unchanged = "from scaler_executor import ScalerExecutor\nexecutor = ScalerExecutor()\n" + ask
    assert run(unchanged, directory, {**environment, variable: "connection.json"}, before=before) == count
    assert json.loads((directory / "connection.json").read_text())
