"""What the end-to-end tests share: ways to hear from a call and to hold it back, and what a test leaves behind.

Nothing here waits for a while and hopes. A call tells of itself through a FIFO, is held back by one, counts its
heartbeats in a mapped file and writes what it does into a journal; the death of a process is seen through its pidfd.
Every wait has a deadline that only a hang can reach.

Imported by the calls in `workload` as well, in workers of every kind: so it is light and knows nothing of pytest.
"""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DEADLINE_S = 30.0
#: Set by the tests that run for minutes when asked to.
IS_LONG = bool(os.environ.get("SCALER_EXECUTOR_LONG"))
MARK = "SCALER_EXECUTOR_TEST"
#: As in `runtime.segments`, which workers need not import for this.
VARIABLE = "SCALER_EXECUTOR_SHARED_MEMORY"


class Fifo:
    """A pipe with a name. Tests make it with `Scene.fifo`; calls get a pickled copy that has the path only."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)
        # Both ends: opening never blocks, for whoever opens the other one, and there is no end-of-file.
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._lines: list[str] = []
        self._rest = b""

    def __reduce__(self) -> Any:
        return copy_of_fifo, (self.path,)

    def close(self) -> None:
        os.close(self._fd)

    # A call's side

    def tell(self, text: object = "") -> None:
        """Write a line."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, f"{text}\n".encode())
        os.close(fd)

    def await_opening(self) -> None:
        """Wait until `open` lets one through."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert os.read(fd, 1)
        finally:
            os.close(fd)

    # The test's side

    def hear(self) -> str:
        """Return the next line."""
        deadline = time.monotonic() + DEADLINE_S
        while not self._lines:
            if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"nothing was said in {DEADLINE_S:.0f} s")
            *lines, self._rest = (self._rest + os.read(self._fd, 4096)).split(b"\n")
            self._lines += [line.decode() for line in lines]
        return self._lines.pop(0)

    def hear_numbers(self) -> list[int]:
        """Return the numbers of the next line."""
        return [int(word) for word in self.hear().split()]

    def has_news(self) -> bool:
        """Tell whether there is a line."""
        return bool(self._lines or select.select([self._fd], [], [], 0)[0])

    def open(self, count: int = 1) -> None:
        """Let so many through."""
        os.write(self._fd, b"x" * count)


def copy_of_fifo(path: str) -> Fifo:
    fifo = Fifo.__new__(Fifo)
    fifo.path = path
    return fifo


class Heartbeat:
    """A counter in a file that a call and the test map."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        path.write_bytes(bytes(mmap.PAGESIZE))
        self._words = self._map()

    def __reduce__(self) -> Any:
        return copy_of_heartbeat, (self.path,)

    def _map(self) -> memoryview:
        with open(self.path, "r+b") as file:
            return memoryview(mmap.mmap(file.fileno(), 0)).cast("q")

    @property
    def count(self) -> int:
        return int(self._words[0])

    def beat(self) -> None:
        self._words[0] += 1

    def close(self) -> None:
        mapping = self._words.obj
        self._words.release()
        assert isinstance(mapping, mmap.mmap)
        mapping.close()

    def await_beat(self) -> None:
        """Wait until it beats."""
        start = self.count
        wait_until(lambda: self.count > start, "no heartbeat")


def copy_of_heartbeat(path: str) -> Heartbeat:
    heartbeat = Heartbeat.__new__(Heartbeat)
    heartbeat.path = path
    heartbeat._words = heartbeat._map()
    return heartbeat


class Journal:
    """One file to which calls and the test append lines: the order of the lines is that of the events."""

    _fds: dict[str, int] = {}

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._fds[self.path] = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)

    def __reduce__(self) -> Any:
        return copy_of_journal, (self.path,)

    def write(self, *words: object) -> None:
        """Append a line. A call's process opens the file once."""
        fd = self._fds.get(self.path)
        if fd is None:
            fd = self._fds[self.path] = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.write(fd, (" ".join(map(str, words)) + "\n").encode())

    def read(self) -> list[list[str]]:
        """Return the lines so far, in words."""
        with open(self.path) as file:
            return [line.split() for line in file]

    def close(self) -> None:
        fd = self._fds.pop(self.path, None)
        if fd is not None:
            os.close(fd)


def copy_of_journal(path: str) -> Journal:
    journal = Journal.__new__(Journal)
    journal.path = path
    return journal


# Waiting


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Ask again and again until `condition` holds: for what no descriptor tells."""
    deadline = time.monotonic() + deadline_s
    pause_s = 0.0005
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}, after {deadline_s:.0f} s")
        select.select([], [], [], pause_s)
        pause_s = min(2 * pause_s, 0.02)


def wait_gone(*pids: int) -> None:
    """Wait until these processes have ended."""
    deadline = time.monotonic() + DEADLINE_S
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"still there: {describe(pid)}")
        finally:
            os.close(pidfd)


def is_gone(pid: int) -> bool:
    """Tell whether the process has ended, reaped or not."""
    return state_of(pid) in ("", "Z", "X")


# Processes


def state_of(pid: int) -> str:
    """Return the letter of the process's state, "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(") ")[2][:1]


def read_proc(pid: int, name: str) -> bytes:
    """Return a file of /proc, b"" if it is not there or not ours to read."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def describe(pid: int) -> str:
    """Return what helps to tell what a process is."""
    command = read_proc(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")[:100]
    name = read_proc(pid, "comm").decode().strip()
    wchan = read_proc(pid, "wchan").decode()
    stat = read_proc(pid, "stat").decode().rpartition(") ")[2].split()
    return f"{pid} {name!r} state {state_of(pid)} parent {stat[1] if stat else '?'} {wchan} {command!r}"


def children_of(pid: int) -> list[int]:
    """Return the children of all threads of a process, ended ones included."""
    children: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    for thread in threads:
        children += map(int, read_proc(pid, f"task/{thread}/children").split())
    return children


def is_serve(pid: int) -> bool:
    return b"scaler_executor.runtime.serve" in read_proc(pid, "cmdline")


def is_worker(pid: int) -> bool:
    return read_proc(pid, "comm").strip() == b"scaler-worker"


class Cluster:
    """The processes of the only executor of a client, as they are now.

    `serve` is a child of the client; the forker is one as well if workers are forks of the client, else serve's.
    """

    def __init__(self, client: int | None = None) -> None:
        self.client = client or os.getpid()
        (self.serve,) = [pid for pid in children_of(self.client) if is_serve(pid) and not is_gone(pid)]
        self.forker = 0
        wait_until(self._has_forker, "no forker")

    def _has_forker(self) -> bool:
        candidates = children_of(self.serve)
        mark = read_proc(self.client, "cmdline")
        candidates += [pid for pid in children_of(self.client) if read_proc(pid, "cmdline") == mark]
        forkers = [pid for pid in candidates if pid != self.serve and not is_worker(pid) and not is_gone(pid)]
        self.forker = forkers[0] if forkers else 0
        return bool(forkers)

    def workers(self) -> list[int]:
        """Return the workers, without the dead."""
        return [pid for pid in children_of(self.forker) if not is_gone(pid)]

    def all(self) -> list[int]:
        return [self.serve, self.forker, *self.workers()]


class Client:
    """A script of its own process, which can be killed."""

    def __init__(
        self,
        source: str,
        *arguments: object,
        directory: Path,
        how: str = "file",
        flags: Iterable[str] = (),
        before: Iterable[str] = (),
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        command = [*before, sys.executable, *flags]
        stdin: Any = subprocess.DEVNULL
        if how == "file":
            path = directory / f"client_{len(list(directory.glob('client_*')))}.py"
            path.write_text(source)
            command += [str(path)]
        elif how == "command":
            command += ["-c", source]
        else:
            command += ["-"]
            stdin = subprocess.PIPE
        here = str(Path(__file__).parent)
        root = str(Path(__file__).parent.parent.parent)
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([here, root]))
        # Files and not pipes: whatever holds them open, reading ends.
        self._output = directory / f"output_{len(list(directory.glob('output_*')))}"
        with open(self._output, "wb") as file:
            self.process = subprocess.Popen(
                [*command, *self.arguments], stdin=stdin, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        if self.process.stdin is not None:
            with self.process.stdin as file:
                file.write(source.encode())
        self.pid = self.process.pid

    @property
    def output(self) -> str:
        """Standard output and standard error so far."""
        return self._output.read_text(errors="replace")

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the client still runs; it printed:\n{self.output}") from None

    def succeed(self) -> str:
        """Wait for exit code 0 and return the output."""
        code = self.wait()
        assert code == 0, f"exit code {code}; it printed:\n{self.output}"
        return self.output

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Scene:
    """One test's files, clients and mark, and what it leaves.

    A process belongs to the test if it is a child of this process, has the mark in its environment (whatever was
    started by exec), or maps the marked file (whatever was forked only): the last two also hold for orphans.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.temporary = directory / "temporary"
        self.temporary.mkdir()
        self.mark = f"{MARK}-{os.getpid()}-{time.monotonic_ns()}"
        os.environ[MARK] = self.mark
        #: Where the test's executors put large payloads.
        self.shared = Path(f"/dev/shm/scaler-executor-{self.mark}")
        self.shared.mkdir()
        os.environ[VARIABLE] = str(self.shared)
        self._parts: list[Any] = []
        self._numbers = itertools.count()
        marked = directory / self.mark
        marked.write_bytes(bytes(mmap.PAGESIZE))
        with open(marked, "r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), 0)
        gc.collect()
        self._processes_before = self.processes()
        self._before = self._inventory()

    def fifo(self) -> Fifo:
        return self.keep(Fifo(self.directory / f"fifo_{next(self._numbers)}"))

    def heartbeat(self) -> Heartbeat:
        return self.keep(Heartbeat(self.directory / f"heartbeat_{next(self._numbers)}"))

    def journal(self) -> Journal:
        return self.keep(Journal(self.directory / f"journal_{next(self._numbers)}"))

    def client(self, source: str, *arguments: object, **options: Any) -> Client:
        return self.keep(Client(source, *arguments, directory=self.directory, **options))

    def keep(self, part: Any) -> Any:
        """Close it at the end of the test."""
        self._parts.append(part)
        return part

    def processes(self) -> list[int]:
        """Return the processes that belong to this test, without this one and the unreaped dead of others."""
        found = set(children_of(os.getpid()))
        mark = self.mark.encode()
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                pid = int(entry)
                if mark in read_proc(pid, "environ") or mark in read_proc(pid, "maps"):
                    found.add(pid)
        # The resource tracker of multiprocessing is one per process, and stays: see conftest.
        tracker: Any = sys.modules.get("multiprocessing.resource_tracker")
        found -= {os.getpid(), tracker._resource_tracker._pid if tracker is not None else 0}
        return sorted(found)

    def _inventory(self) -> set[str]:
        """Return a line for each thing that a test could leave, but for processes."""
        things = {f"thread {thread.name} {thread.ident}" for thread in threading.enumerate()}
        fds = []
        for entry in os.listdir("/proc/self/fd"):
            try:
                fds.append(f"descriptor {entry} of {os.readlink(f'/proc/self/fd/{entry}')}")
            except OSError:
                pass  # that of the listing itself
        things |= set(fds)
        # Of what lies in shared memory only what bears this test's mark is surely its own: other programs use it, too.
        things |= {f"shared memory {entry}" for entry in os.listdir("/dev/shm") if self.mark in entry}
        things |= {f"shared memory {path}" for path in self.shared.rglob("*")}
        things |= {f"temporary file {path}" for path in self.temporary.iterdir()}
        return things

    def leftovers(self) -> list[str]:
        """Return what is there now and was not before."""
        # A process is known by its number alone: what it is doing changes.
        before = self._processes_before
        return [f"process {describe(pid)}" for pid in self.processes() if pid not in before] + sorted(
            self._inventory() - self._before
        )

    def close(self) -> None:
        """Wait until everything is gone; report, and end, what is not."""
        for part in self._parts:
            part.close()
        gc.collect()
        try:
            wait_until(lambda: not self.leftovers(), "the test leaves something")
        except AssertionError as error:
            left = self.leftovers()
            for pid in set(self.processes()) - set(self._processes_before):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            raise AssertionError(f"{error}:\n" + "\n".join(left)) from None
        finally:
            self._mapping.close()
            os.environ.pop(MARK, None)
            os.environ.pop(VARIABLE, None)
            shutil.rmtree(self.shared)
