"""Small programs that a test runs with ProcessPoolExecutor and with ScalerExecutor, and a terminal to run them in.

A program finds `make(max_workers, **options)`, which makes the executor of the kind that the test asks for, the
modules that it is likely to need, and its arguments as `arguments`. What it prints goes into files, never into pipes:
nothing that it leaves can keep a test waiting.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, Final, NamedTuple

from support import DEADLINE_S, Scene, is_gone, wait_until

PRELUDE: Final = """
import atexit, gc, multiprocessing, os, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
import workload
from scaler_executor import ScalerExecutor
from support import copy_of_fifo, copy_of_journal
kind, method, *arguments = sys.argv[1:]
def make(max_workers=2, **options):
    executor_class = {"standard": ProcessPoolExecutor, "scaler": ScalerExecutor}[kind]
    return executor_class(max_workers, multiprocessing.get_context(method), **options)
"""
#: From Python 3.12 on every fork of a process with threads is warned of.
FLAGS: Final = ["-W", "ignore::DeprecationWarning"]
#: What a program in a terminal is run by: a shell with job control, of a few lines. It gives the job a process group
#: and the foreground, tells of every change of the job, and takes the foreground back.
SHELL: Final = """
import os, signal, sys
news = int(sys.argv[1])
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
signal.signal(signal.SIGINT, lambda *_: None)
job = os.fork()
if not job:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.close(news)
    os.execv(sys.argv[2], sys.argv[2:])
os.write(news, b"pid %d\\n" % job)
while True:
    _, status = os.waitpid(job, os.WUNTRACED | os.WCONTINUED)
    if os.WIFSTOPPED(status):
        os.tcsetpgrp(0, os.getpgrp())
        os.write(news, b"stopped %d\\n" % os.WSTOPSIG(status))
    elif os.WIFCONTINUED(status):
        os.write(news, b"continued\\n")
    else:
        break
foreground = os.tcgetpgrp(0)
os.tcsetpgrp(0, os.getpgrp())
os.write(news, b"ended %d %d\\n" % (os.waitstatus_to_exitcode(status), foreground == job))
"""


class Ended(NamedTuple):
    """How a program ended."""

    code: int
    stdout: str
    stderr: str


def command_of(kind: str, method: str, source: str, arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, *FLAGS, "-c", PRELUDE + source, kind, method, *map(str, arguments)]


def environment() -> dict[str, str]:
    here = Path(__file__).parent
    return dict(os.environ, PYTHONPATH=os.pathsep.join([str(here), str(here.parent.parent)]))


class Program:
    """A program that runs, or has ended.

    Args:
        kind: "scaler" or "standard".
        method: How its workers come into being.
    """

    def __init__(self, scene: Scene, kind: str, method: str, source: str, *arguments: object, **options: Any) -> None:
        number = len(list(scene.directory.glob("stdout_*")))
        self._paths = [scene.directory / f"{name}_{number}" for name in ("stdout", "stderr")]
        with open(self._paths[0], "wb") as stdout, open(self._paths[1], "wb") as stderr:
            self._start(command_of(kind, method, source, arguments), stdout=stdout, stderr=stderr, **options)
        scene.keep(self)

    def _start(self, command: list[str], **options: Any) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment(), **options)
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        return self._paths[0].read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._paths[1].read_text(errors="replace")

    def end(self) -> Ended:
        """Wait for the end."""
        try:
            code = self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs and printed:\n{self.stdout}\n{self.stderr}") from None
        return Ended(code, self.stdout, self.stderr)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


class Terminal(Program):
    """A program in the foreground of a terminal, started by a shell with job control."""

    def _start(self, command: list[str], **options: Any) -> None:
        self._master, slave = os.openpty()
        self._news, news = os.pipe()
        self._heard = b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", SHELL, str(news), *command],
                stdin=slave,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
                pass_fds=[news],
                env=environment(),
                **options,
            )
        finally:
            os.close(slave)
            os.close(news)
        self.pid = int(self.hear("pid")[0])

    def hear(self, word: str) -> list[str]:
        """Wait until the shell tells this of its job."""

        def is_there() -> bool:
            return b"\n" in self._heard or bool(self._read())

        wait_until(is_there, f"the shell does not say {word!r}; its job printed:\n{self.stdout}\n{self.stderr}\n")
        line, self._heard = self._heard.split(b"\n", 1)
        first, *words = line.decode().split()
        assert first == word, (line, self.stderr)
        return words

    def _read(self) -> bytes:
        os.set_blocking(self._news, False)
        try:
            part = os.read(self._news, 4096)
        except BlockingIOError:
            return b""
        self._heard += part
        return b"\n" if b"\n" in self._heard else b""

    def type(self, keys: bytes) -> None:
        """Type: b"\\x03" is Ctrl-C, b"\\x1a" Ctrl-Z."""
        os.write(self._master, keys)

    def close_shell(self) -> None:
        """Wait until the shell has ended: by itself after its job, or with the terminal."""
        self._process.wait(DEADLINE_S)

    def hang_up(self) -> None:
        """Close the terminal."""
        os.close(self._master)
        self._master = -1

    def foreground(self) -> int:
        """Return the process group in the foreground."""
        return os.tcgetpgrp(self._master)

    def end(self) -> Ended:
        """Wait for the end of the job and its shell. The job was in the foreground to its end."""
        code, had_foreground = map(int, self.hear("ended"))
        assert had_foreground
        self.close_shell()
        return Ended(code, self.stdout, self.stderr)

    def close(self) -> None:
        try:
            if not is_gone(self.pid):
                os.kill(self.pid, 9)
        except ProcessLookupError:
            pass
        super().close()
        os.close(self._news)
        if self._master >= 0:
            self.hang_up()


def run(scene: Scene, kind: str, method: str, source: str, *arguments: object) -> Ended:
    """Run a program to its end."""
    return Program(scene, kind, method, source, *arguments).end()


def assert_none_left(scene: Scene, deadline_s: float = 5.0) -> None:
    """Wait until nothing of the test's programs is left: a few seconds."""
    wait_until(lambda: not scene.processes(), "processes are left", deadline_s)
