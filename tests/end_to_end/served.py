"""Clusters that `scaler-executor serve` hosts, as tests start them: on loopback, with files of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from support import DEADLINE_S, wait_until

COMMAND = [sys.executable, "-m", "scaler_executor.cli"]
HERE = Path(__file__).parent


class Output:
    """What a process prints, read as it comes. It is a file and not a pipe: a process never waits for a reader, and
    whatever holds it open, reading ends."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `Process.close`
        self.text = ""

    def read(self) -> str:
        """Return all that has been printed so far."""
        if not self.file.closed:
            fd = self.file.fileno()
            self.text = os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")
        return self.text

    def __contains__(self, text: str) -> bool:
        return text in self.read()

    def await_line(self, pattern: str, deadline_s: float = DEADLINE_S) -> re.Match[str]:
        """Wait for a line in which `pattern` is found."""
        found: list[re.Match[str]] = []

        def is_there() -> bool:
            found.extend(re.finditer(pattern, self.read(), re.MULTILINE))
            return bool(found)

        try:
            wait_until(is_there, f"no {pattern!r}", deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}, in:\n{self.text}") from None
        return found[0]


class Process:
    """A `scaler-executor` command that runs, behind the words of another command if there are some."""

    def __init__(self, arguments: Sequence[object], environment: Mapping[str, str], before: Sequence[str] = ()) -> None:
        self.output = Output()
        self.process = subprocess.Popen(
            [*before, *COMMAND, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=self.output.file,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        code = self.process.wait(DEADLINE_S)
        self.output.read()
        return code

    def stop(self) -> int:
        """Have it drain; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill it, and wait for that."""
        self.process.kill()
        self.wait()

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.output.read()
        self.output.file.close()


class Served:
    """A scheduler, and agents that have joined it.

    Args:
        directory: For the files of the cluster.
        workers: In the scheduler's process.
        arguments: More ones for serve.
        environment: What its environment has besides this process's.
        before: In front of all: what starts it in another way.

    Attributes:
        files: Where it keeps its files.
        connection: The connection file of whoever serves.
        address: "tcp://HOST:PORT".
    """

    def __init__(
        self,
        directory: Path,
        workers: int = 2,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.environment = environment_of(directory) | dict(environment or {})
        self.files = directory / "scaler-executor" / "default"
        self.connection = self.files / "connection.json"
        self._before = before
        self._arguments = ["--workers", str(workers), *arguments]
        self._processes: list[Process] = []
        self.start("--bind", "tcp://127.0.0.1:*")

    def start(self, *arguments: str) -> None:
        """Start the scheduler, again where it was if nothing else is said."""
        self.scheduler = self.command("serve", *self._arguments, *arguments)
        self.address = self.scheduler.output.await_line(r"listening on (\S+),")[1]
        self.scheduler.output.await_line(r"^join it")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.scheduler.process

    @property
    def pid(self) -> int:
        return self.scheduler.pid

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def output(self) -> str:
        """What the scheduler has printed so far."""
        return self.scheduler.output.read()

    def command(self, *arguments: str) -> Process:
        """Start any command of ours, among the files of this cluster."""
        is_scheduler = arguments[0] == "serve" and "--join" not in arguments
        process = Process(arguments, self.environment, self._before if is_scheduler else ())
        self._processes.append(process)
        return process

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command of ours that ends by itself, among the files of this cluster."""
        return run_command(self.environment, *arguments)

    def keygen(self, who: str) -> Path:
        """Make a connection file with a key of its own."""
        path = self.directory / f"{who}.connection.json"
        done = self.run("keygen", who, "--output", path)
        assert done.returncode == 0, done.stderr
        return path

    def revoke(self, who: str) -> None:
        """Let that key in no more."""
        done = self.run("keygen", who, "--revoke")
        assert done.returncode == 0, done.stderr

    def join(self, workers: int = 2, connection: Path | None = None, options: Sequence[str] = ()) -> Process:
        """Have another agent join, and wait until its workers count."""
        count = self.workers()
        words = ["serve", "--join", str(connection or self.connection), "--workers", str(workers), *options]
        agent = self.command(*words)
        agent.output.await_line(r"^connected")
        wait_until(lambda: self.workers() >= count + workers, "the agent has not joined")
        return agent

    def workers(self) -> int:
        """Return how many workers all agents together have."""
        return sum(agent["workers"] for agent in self.status()["agents"])  # type: ignore[misc]

    def status(self) -> dict[str, object]:
        """Return what `scaler-executor status --json` says."""
        import json

        told = subprocess.run(
            [*self.status_command(), "status", "--json", str(self.connection)],
            env=self.environment,
            capture_output=True,
            timeout=DEADLINE_S,
            check=True,
        )
        return json.loads(told.stdout)  # type: ignore[no-any-return]

    def status_command(self) -> list[str]:
        """Return the command, as it is run where the scheduler can be reached."""
        return COMMAND

    def stop(self) -> int:
        """Have the scheduler drain; return its exit code."""
        return self.scheduler.stop()

    def kill(self) -> None:
        """Kill the scheduler."""
        self.scheduler.kill()

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave nothing behind."""
        for process in self._processes:
            process.close()


def run_command(environment: Mapping[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a `scaler-executor` command that ends by itself."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=environment,
    )


def environment_of(directory: Path) -> dict[str, str]:
    """Return the environment of a user whose state is in `directory`."""
    environment = {**os.environ, "XDG_STATE_HOME": str(directory)}
    for name in ("SCALER_EXECUTOR_ADDRESS", "SCALER_EXECUTOR_CREDENTIALS", "NOTIFY_SOCKET"):
        environment.pop(name, None)
    return environment


def python_path(*first: Path) -> str:
    """Return where the tests' modules and the package are found, behind other directories."""
    return os.pathsep.join(map(str, [*first, HERE, HERE.parent.parent]))
