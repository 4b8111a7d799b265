"""The calls that the tests make. They run in workers, so this module imports little."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from typing import Any, NoReturn

from support import Fifo, Heartbeat, Journal


def echo(value: Any) -> Any:
    return value


def add(left: int, right: int = 0) -> int:
    return left + right


def get_pid() -> int:
    return os.getpid()


def fail(error: BaseException) -> NoReturn:
    raise error


# Held back by the test


def tell(started: Fifo, value: Any = None) -> Any:
    """Say that it runs, and return."""
    started.tell(os.getpid())
    return value


def hold(started: Fifo, gate: Fifo, value: Any = None) -> Any:
    """Say that it runs, and wait until the test opens the gate."""
    started.tell(os.getpid())
    gate.await_opening()
    return value


def pass_or_hold(started: Fifo | None, gate: Fifo | None, value: Any) -> Any:
    """As `hold` if there is a gate."""
    return value if started is None or gate is None else hold(started, gate, value)


def meet(barrier_in: Fifo, barrier_out: Fifo, value: int) -> int:
    """Say that it is there and wait until the test has heard of all."""
    return int(hold(barrier_in, barrier_out, value))


# To be stopped


def sleep(started: Fifo) -> None:
    started.tell(os.getpid())
    time.sleep(3600)


def spin(started: Fifo, heartbeat: Heartbeat) -> NoReturn:
    """Pure Python."""
    started.tell(os.getpid())
    while True:
        heartbeat.beat()


def hold_gil(started: Fifo) -> int:
    """C code that looks for no signal."""
    started.tell(os.getpid())
    return sum(itertools.repeat(1, 10**13))


def defy(started: Fifo, heartbeat: Heartbeat) -> NoReturn:
    """Ignore signals, then catch everything."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    told = False
    while True:
        try:
            if not told:
                started.tell(os.getpid())
                told = True
            while True:
                heartbeat.beat()
        except BaseException:
            pass


def catch_everything(started: Fifo, heartbeat: Heartbeat) -> NoReturn:
    """Catch everything, also what the soft stop raises."""
    told = False
    while True:
        try:
            if not told:
                started.tell(os.getpid())
                told = True
            while True:
                heartbeat.beat()
        except BaseException:
            pass


def beat_in_thread(started: Fifo, heartbeat: Heartbeat) -> None:
    """Leave the work to a thread of one's own."""

    def work() -> None:
        while True:
            heartbeat.beat()

    threading.Thread(target=work, daemon=True).start()
    started.tell(os.getpid())
    time.sleep(3600)


def run_asyncio(started: Fifo, journal: Journal) -> None:
    import asyncio

    async def nap(name: str) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            journal.write("finally", name)

    async def main() -> None:
        tasks = [asyncio.create_task(nap(name)) for name in ("one", "two")]
        await asyncio.sleep(0)
        try:
            started.tell(os.getpid())
            await asyncio.gather(*tasks)
        finally:
            journal.write("finally", "main")

    asyncio.run(main())


def wait_for_subprocess(started: Fifo, *, is_deaf: bool = False) -> None:
    """Wait for a shell that waits for a child of its own; `is_deaf`: it ignores SIGINT and SIGTERM."""
    script = "trap '' INT TERM; " if is_deaf else ""
    script += "sleep 3600 & echo $!; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = process.stdout.readline().strip()
        started.tell(f"{os.getpid()} {process.pid} {grandchild}")
        process.wait()


def run_subprocess(started: Fifo) -> None:
    """Have `subprocess.run` wait: it kills its child when it is interrupted."""
    subprocess.run(["sh", "-c", f"echo {os.getpid()} $$ > {started.path}; sleep 3600; true"], check=False)


def leave_subprocess(started: Fifo) -> None:
    """Leave a child behind when interrupted."""
    process = subprocess.Popen(["sleep", "3600"])
    started.tell(f"{os.getpid()} {process.pid}")
    try:
        time.sleep(3600)
    finally:
        process.returncode = 0  # no warning


def leave_daemon() -> None:
    """Leave a process in a session of its own, which ends at once and is nobody's child."""
    if (pid := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("true", ["true"])
        os._exit(0)
    os.waitpid(pid, 0)


def leave_process(started: Fifo) -> None:
    """Leave a child of multiprocessing behind when interrupted: at its end an interpreter would wait for it."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
    process.start()
    started.tell(f"{os.getpid()} {process.pid}")
    time.sleep(3600)


def work_with_files(started: Fifo, journal: Journal) -> None:
    with tempfile.TemporaryDirectory() as directory, tempfile.NamedTemporaryFile() as file:
        path = os.path.join(directory, "result")
        with open(path, "w") as result:
            try:
                journal.write("files", directory, path, file.name)
                started.tell(os.getpid())
                while True:
                    result.write("x")
            finally:
                journal.write("finally")


def swallow(started: Fifo) -> str:
    """Survive the soft stop."""
    try:
        started.tell(os.getpid())
        time.sleep(3600)
    except KeyboardInterrupt:
        pass
    return "swallowed"


def die_when_interrupted(started: Fifo, exit_code: int) -> None:
    try:
        started.tell(os.getpid())
        time.sleep(3600)
    except KeyboardInterrupt:
        os._exit(exit_code)


def raise_when_interrupted(started: Fifo) -> None:
    try:
        started.tell(os.getpid())
        time.sleep(3600)
    except KeyboardInterrupt:
        raise ValueError("cleaning up failed") from None


def linger_when_interrupted(started: Fifo, interrupted: Fifo, gate: Fifo) -> str:
    """Take the soft stop, say so, and finish when the test lets it."""
    try:
        started.tell(os.getpid())
        time.sleep(3600)
    except KeyboardInterrupt:
        interrupted.tell()
        gate.await_opening()
    return "lingered"


# To crash


def exit_process(code: int) -> NoReturn:
    os._exit(code)


def kill_self(number: int) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)


def read_null() -> None:
    ctypes.string_at(0)


def note_and_exit_if(journal: Journal, number: int, bad: int) -> int:
    """Write the start into the journal; the bad one ends the process."""
    journal.write("start", number)
    if number == bad:
        os._exit(7)
    return number


def hold_and_exit(started: Fifo, gate: Fifo, code: int) -> NoReturn:
    hold(started, gate)
    os._exit(code)


def note(journal: Journal, *words: object) -> None:
    journal.write(*words)


class Unpicklable:
    """Does not pickle."""

    def __reduce__(self) -> Any:
        raise TypeError("this object does not pickle")

    def __call__(self) -> None:
        pass


class PoisonOnLoad:
    """Pickles, and does not unpickle outside the process that made it."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return _refuse_to_load, (os.getpid(), self.where)

    def __call__(self) -> None:
        pass


def _refuse_to_load(pid: int, where: str) -> PoisonOnLoad:
    if os.getpid() != pid:
        raise ValueError(f"does not unpickle: {where}")
    return PoisonOnLoad(where)


class NotesLoading:
    """Writes into the journal whenever it is unpickled."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def __reduce__(self) -> Any:
        return _note_loading, (self.journal,)


def _note_loading(journal: Journal) -> NotesLoading:
    journal.write("loaded", os.getpid())
    return NotesLoading(journal)


def swallow_and_return_note(started: Fifo, journal: Journal) -> NotesLoading:
    swallow(started)
    return NotesLoading(journal)


class TwoArgumentsError(Exception):
    """Its `args` do not fit its constructor: it pickles and does not unpickle."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")
        self.left = left
        self.right = right


class KeywordError(Exception):
    """Has a keyword-only argument."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class LockedError(Exception):
    """Does not pickle."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


def raise_two_arguments() -> None:
    raise TwoArgumentsError(1, 2)


def raise_keyword() -> None:
    raise KeywordError("odd", code=5)


def raise_locked() -> None:
    raise LockedError("locked")


def raise_local() -> None:
    class LocalError(Exception):
        pass

    raise LocalError("local")


def raise_chain() -> None:
    try:
        raise_value("inner")
    except ValueError as error:
        raise KeyError("outer") from error


def raise_value(text: str) -> None:
    raise ValueError(text)


def exit_python(code: object) -> None:
    sys.exit(code)  # type: ignore[arg-type]


def return_unpicklable() -> Unpicklable:
    return Unpicklable()


def return_poison() -> PoisonOnLoad:
    return PoisonOnLoad("result")


def raise_poison() -> None:
    raise ValueError(PoisonOnLoad("exception"))


# Journals


def timed(journal: Journal, number: int, duration_s: float, is_busy: bool) -> int:
    """Write the start, work for so long, write the end."""
    journal.write("start", number)
    if is_busy:
        until = time.perf_counter() + duration_s
        while time.perf_counter() < until:
            pass
    elif duration_s:
        time.sleep(duration_s)
    journal.write("end", number)
    return number


def timed_item(job: tuple[Journal, int, float]) -> int:
    """As `timed`, for map."""
    return timed(*job, True)


# Initializers


value_of_initializer: object = None


def set_value(value: object) -> None:
    global value_of_initializer
    value_of_initializer = value


def get_value() -> object:
    return value_of_initializer


def fail_to_start(journal: Journal) -> None:
    journal.write("initializer", os.getpid())
    raise OSError("the licence server does not answer")


def exit_at_start(journal: Journal, code: int) -> None:
    journal.write("initializer", os.getpid())
    os._exit(code)


# Large and many


def make_bytes(size: int) -> bytes:
    return b"x" * size


def print_much(lines: int, width: int) -> int:
    for number in range(lines):
        print(f"{number:06d}".ljust(width, "."))
    return lines


def fork_and_return() -> int:
    """Fork a child that returns from the call too: only the parent's return may count."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)
    return -1


def work_in_subprocess(started: Fifo) -> None:
    """Have a subprocess do the work."""
    with subprocess.Popen(["sh", "-c", "echo started; sleep 3600; true"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started.tell(os.getpid())
        process.wait()


def note_or_hold(job: tuple[Fifo | None, Fifo | None, Journal, int]) -> int:
    """Write the number into the journal, after `hold` if there is a gate. For map."""
    started, gate, journal, number = job
    pass_or_hold(started, gate, number)
    journal.write(number)
    return number


def increment_in_place(array: Any) -> Any:
    """Change the argument and return it."""
    array += 1
    return array


def leave_thread(started: Fifo) -> None:
    """Start a thread that the worker waits for at its end."""
    threading.Thread(target=time.sleep, args=(3600,)).start()
    started.tell(os.getpid())


def start_thread(seconds: float) -> None:
    """Start a thread that the worker waits for at its end, and that prints then."""

    def work() -> None:
        time.sleep(seconds)
        print("thread ends", flush=True)

    threading.Thread(target=work).start()


def start_process(seconds: float) -> bool:
    """Start a process that the worker waits for at its end."""
    process = multiprocessing.get_context("fork").Process(target=start_thread, args=(seconds,))
    process.start()
    return process.is_alive()


def raise_from() -> None:
    try:
        raise ValueError("inner")
    except ValueError as error:
        raise KeyError("outer") from error


def raise_from_none() -> None:
    try:
        raise ValueError("inner")
    except ValueError:
        raise KeyError("outer") from None


def raise_with_note() -> None:
    error = ValueError("noted")
    if sys.version_info >= (3, 11):
        error.add_note("a note")
    raise error


def raise_group() -> None:
    noted = KeyError("two")
    noted.add_note("a note")  # type: ignore[attr-defined]
    noted.__cause__ = ValueError("cause")
    raise ExceptionGroup("group", [ValueError("one"), noted])  # type: ignore[name-defined]  # noqa: F821


class Weak:
    """What can be seen to go, and counts those of this process that have not."""

    alive: weakref.WeakSet[Weak] = weakref.WeakSet()

    def __new__(cls) -> Weak:
        weak = super().__new__(cls)
        cls.alive.add(weak)
        return weak

    def get_self(self) -> Weak:
        return self


class WeakError(Exception):
    """The built-in ones cannot be referred to weakly."""


def raise_weak() -> NoReturn:
    raise WeakError


def make_weak(_: object) -> Weak:
    return Weak()


def count_weak() -> int:
    return len(Weak.alive)


def get_type(value: object) -> type:
    return type(value)


def fail_with(value: object) -> NoReturn:
    raise ValueError("with an argument")


# Of served clusters


def await_gate(gate: Fifo, value: Any) -> Any:
    """Wait until the test lets it through."""
    gate.await_opening()
    return value


def sleep_for(seconds: float) -> None:
    time.sleep(seconds)


def get_pid_for(item: object) -> int:
    return os.getpid()


def note_pid(journal: Journal, word: str) -> None:
    journal.write(word, os.getpid())


def note_twice(journal: Journal) -> None:
    """Note beginning and end: two that run at once mix them."""
    journal.write("begin")
    time.sleep(0.001)
    journal.write("end")


def hold_and_make(started: Fifo, gate: Fifo, size: int) -> bytes:
    """Say that it runs, wait until the test opens the gate, and return so many bytes."""
    hold(started, gate)
    return b"x" * size


def write_beats(journal: Journal, number: int) -> None:
    """Write that it runs, again and again."""
    while True:
        journal.write("beat", number)
        time.sleep(0.005)


def length(value: bytes) -> int:
    return len(value)


# Of chaos


def endure(journal: Journal, number: int, seconds: float, size: int, fate: str, argument: bytes) -> tuple[int, bytes]:
    """Write the start, work for so long, meet one's fate when called for the first time, write the end."""
    journal.write("start", number, os.getpid(), time.monotonic_ns() // 1000)
    if fate == "subprocess":
        with subprocess.Popen(["sleep", "3600"]) as process:
            time.sleep(seconds)
            process.kill()
    elif number % 3:
        time.sleep(seconds)
    else:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
    if fate and fate != "subprocess" and is_first(f"{journal.path}.{number}"):
        if fate == "raise":
            raise ValueError(number)
        if fate == "exit":
            os._exit(number % 100 + 1)
        kill_self(getattr(signal, fate))
    journal.write("end", number, os.getpid(), time.monotonic_ns() // 1000)
    return number, bytes(size)


def endure_item(job: tuple[Journal, int, float, int, str, bytes]) -> tuple[int, bytes]:
    """As `endure`, for map."""
    return endure(*job)


def is_first(path: str) -> bool:
    """Tell whether nobody has asked for this path before."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    except FileExistsError:
        return False
    return True


def until_released(journal: Journal, number: int, released: Heartbeat) -> int:
    """Write the start, wait until the counter has come to the number, write the end. Both with the pid."""
    journal.write("start", number, os.getpid())
    while released.count < number:
        pass
    journal.write("end", number, os.getpid())
    return number


class Block:
    """A value with an out-of-band buffer, as numpy's arrays are."""

    def __init__(self, content: Any) -> None:
        self.content = memoryview(content)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Block, (pickle.PickleBuffer(self.content),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Block) and bytes(self.content) == bytes(other.content)

    __hash__ = None  # type: ignore[assignment]


class Holder:
    """An object whose method is called."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self) -> Any:
        return self.value


def make_block(size: int, fill: int) -> Block:
    return Block(bytearray([fill]) * size)


def set_first(block: Block, value: int) -> Block:
    block.content[0] = value
    return block


def first(block: Block) -> int:
    return int(block.content[0])


def first_at_last(journal: Journal, times: int, block: Block) -> int:
    """Look at the block, and end the process as often before that is the result."""
    journal.write("start", os.getpid())
    value = first(block)
    if len(journal.read()) <= times:
        kill_self(signal.SIGKILL)
    return value


def exit_with(code: int, value: object) -> NoReturn:
    os._exit(code)


def sleep_with(started: Fifo, value: object) -> None:
    sleep(started)


def tell_and_hold(started: Fifo, block: Block) -> NoReturn:
    """Touch the argument, and never end."""
    started.tell(first(block))
    while True:
        time.sleep(1000)
