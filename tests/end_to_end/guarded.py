"""A cluster that is served over the network, for tests: `scaler-executor serve` and `serve --join` as processes.

Everything is on loopback, at a port that was free, with keys in a directory of the test's own. Processes are ended and
reaped when the scene closes; that nothing else is left is for the scene to see.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from support import DEADLINE_S, Scene, wait_until

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class Command:
    """A `scaler-executor` command that goes on until it is told to end.

    Args:
        arguments: Behind the name of the program.
        directory: Where its output goes.
        environment: Of the process.
        ready: A pattern that its output has to match before anything else is done.
        prefix: In front of all: what starts it in another way.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        directory: Path,
        environment: Mapping[str, str],
        ready: str,
        prefix: Sequence[str] = (),
    ) -> None:
        # A file and not a pipe: whatever holds it open, reading ends.
        self._output = directory / f"command_{len(list(directory.glob('command_*')))}"
        with open(self._output, "wb") as file:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "scaler_executor", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.pid = self.process.pid
        try:
            self.match = self.await_output(ready)
        except BaseException:
            self.kill()
            raise

    @property
    def output(self) -> str:
        """Standard output and standard error so far."""
        return self._output.read_text(errors="replace")

    def await_output(self, pattern: str) -> re.Match[str]:
        """Wait until the output matches, and return the first match."""
        found: list[re.Match[str]] = []

        def is_there() -> bool:
            match = re.search(pattern, self.output, re.MULTILINE)
            if match is not None:
                found.append(match)
            elif self.process.poll() is not None:
                raise AssertionError(f"exit code {self.process.returncode}; it printed:\n{self.output}")
            return match is not None

        try:
            wait_until(is_there, f"no {pattern!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it printed:\n{self.output}") from None
        return found[0]

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs; it printed:\n{self.output}") from None

    def stop(self) -> int:
        """Have it end in order; what runs is stopped when the grace time is over. Return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it at once, as `kill -9` does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it somehow."""
        if self.process.poll() is None:
            try:
                self.stop()
            except AssertionError:
                self.kill()
                raise


class Served(Command):
    """A served cluster.

    Args:
        scene: The test's, which ends it.
        workers: On its own machine, so to speak; 0: only those that join.
        bind: Where it listens.
        options: Further ones of `serve`.
        environment: What its environment has besides this process's.
        home: Holds the files of the cluster; another one served there again has the same keys. None: a new one.
        prefix: See `Command`.
    """

    def __init__(
        self,
        scene: Scene,
        workers: int = 2,
        *,
        bind: str = "tcp://127.0.0.1:0",
        options: Sequence[object] = (),
        environment: Mapping[str, str] | None = None,
        home: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self._scene = scene
        self.home = home or scene.directory / f"state_{len(list(scene.directory.glob('state_*')))}"
        self.home.mkdir(exist_ok=True)
        self.environment = environment_of(self.home) | dict(environment or {})
        super().__init__(
            ["serve", "--bind", bind, "--workers", workers, "--grace", 1, *options],
            scene.directory,
            self.environment,
            r"^listening on (tcp://\S+:\d+),(?s:.*)^join it: ",
            prefix,
        )
        scene.keep(self)
        #: "tcp://HOST:PORT".
        self.address = self.match[1]
        self.port = int(self.address.rpartition(":")[2])
        #: Where it keeps its files.
        self.directory = self.home / "scaler-executor" / "default"
        #: The connection file of whoever serves.
        self.connection = self.directory / "connection.json"

    def join(
        self,
        workers: int = 1,
        *,
        options: Sequence[object] = (),
        connection: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Command:
        """Add an agent, and wait until it is connected."""
        arguments = ["serve", "--join", connection or self.connection, "--workers", workers, "--grace", 1, *options]
        own = self.environment if environment is None else environment
        agent = Command(arguments, self._scene.directory, own, r"^connected to ")
        self._scene.keep(agent)
        return agent

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run another command of the same user: `keygen`, say."""
        return run_command(self.environment, *arguments)

    def keygen(self, who: str) -> Path:
        """Make a connection file with a key of its own."""
        path = self._scene.directory / f"{who}.connection.json"
        done = self.run("keygen", who, "--output", path)
        assert done.returncode == 0, done.stderr
        return path

    def revoke(self, who: str) -> None:
        """Let that key in no more."""
        done = self.run("keygen", who, "--revoke")
        assert done.returncode == 0, done.stderr


def run_command(environment: Mapping[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a `scaler-executor` command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "scaler_executor", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=environment,
    )


def environment_of(home: Path) -> dict[str, str]:
    """Return the environment of a user whose state is in `home`."""
    environment = dict(os.environ, XDG_STATE_HOME=str(home), PYTHONPATH=python_path())
    environment.pop("SCALER_EXECUTOR_ADDRESS", None)
    environment.pop("SCALER_EXECUTOR_CREDENTIALS", None)
    return environment


def python_path(*first: Path) -> str:
    """Return where the tests' modules and the package are found, behind other directories."""
    return os.pathsep.join(map(str, [*first, HERE, ROOT]))
