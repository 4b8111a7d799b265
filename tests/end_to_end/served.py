"""Clusters that `scaler-executor serve` hosts, as tests start them: on loopback, with files of their own."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from support import DEADLINE_S, wait_until

COMMAND = [sys.executable, "-m", "scaler_executor.cli"]


class Output:
    """What a process prints, read as it comes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._fd = stream.fileno()
        os.set_blocking(self._fd, False)
        self.text = ""

    def read(self) -> str:
        """Return all that has been printed so far."""
        try:
            while data := os.read(self._fd, 65536):
                self.text += data.decode(errors="replace")
        except BlockingIOError:
            pass
        return self.text

    def await_line(self, pattern: str, deadline_s: float = DEADLINE_S) -> re.Match[str]:
        """Wait for a line in which `pattern` is found."""
        deadline = time.monotonic() + deadline_s
        while (match := re.search(pattern, self.read(), re.MULTILINE)) is None:
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"no {pattern!r} in:\n{self.text}"
            select.select([self._fd], [], [], min(left_s, 0.1))
        return match


class Process:
    """A `scaler-executor` command that runs, behind the words of another command if there are some."""

    def __init__(self, arguments: list[str], environment: dict[str, str], before: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*before, *COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        assert self.process.stdout is not None
        self.output = Output(self.process.stdout)

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
        assert self.process.stdout is not None
        self.process.stdout.close()


class Served:
    """A scheduler, and agents that have joined it.

    Args:
        directory: For the files of the cluster.
        workers: In the scheduler's process.
        arguments: More ones for serve.
    """

    def __init__(self, directory: Path, workers: int = 2, *arguments: str) -> None:
        self.directory = directory
        self.environment = {**os.environ, "XDG_STATE_HOME": str(directory)}
        self.environment.pop("SCALER_EXECUTOR_ADDRESS", None)
        self.environment.pop("SCALER_EXECUTOR_CREDENTIALS", None)
        self.connection = directory / "scaler-executor" / "default" / "connection.json"
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

    def command(self, *arguments: str) -> Process:
        """Start any command of ours, among the files of this cluster."""
        process = Process(list(arguments), self.environment)
        self._processes.append(process)
        return process

    def join(self, workers: int = 2, connection: Path | None = None) -> Process:
        """Have another agent join, and wait until its workers count."""
        count = self.workers()
        agent = self.command("serve", "--join", str(connection or self.connection), "--workers", str(workers))
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
        for process in self._processes:
            process.close()
