"""The calls of `test_guilt`, `test_odd_calls` and `test_failures`: what does not keep to a worker's own affairs."""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from support import Fifo, Journal

# To die with something to say


def die(how: str) -> None:
    """End the process in one of the ways there are."""
    if how == "exit":
        os._exit(7)
    elif how == "abort":
        os.abort()
    elif how == "segv":
        ctypes.string_at(0)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def say_and_die(how: str) -> None:
    print("the matrix is singular", file=sys.stderr)
    try:
        raise ArithmeticError("step 17 diverged")
    except ArithmeticError:
        traceback.print_exc()
    die(how)


def say(text: str) -> int:
    print(text, file=sys.stderr)
    return os.getpid()


def say_if(number: int, bad: int) -> int:
    print(f"item {number}", file=sys.stderr)
    if number == bad:
        os._exit(7)
    return number


def say_much_and_die(lines: int) -> NoReturn:
    for number in range(lines):
        print(f"line {number}", file=sys.stderr)
    os._exit(7)


def say_bytes_and_die(data: bytes) -> NoReturn:
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()
    os._exit(7)


def say_elsewhere_and_die(how: str) -> NoReturn:
    """Have nobody hear what is written to stderr, in one way or another."""
    if how == "closed":
        os.close(sys.stderr.fileno())
    elif how == "redirected":
        fd = os.open(os.devnull, os.O_WRONLY)
        os.dup2(fd, 2)
    elif how == "replaced":
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    elif how == "none":
        sys.stderr = None
    try:
        print("is it heard?", file=sys.stderr)
    except OSError:
        pass
    os._exit(7)


def leave_stderr_to_others_and_die(started: Fifo) -> NoReturn:
    """Die while a process of another session keeps stderr open."""
    process = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    started.tell(process.pid)
    print("left behind", file=sys.stderr)
    os._exit(7)


def fault_in_a_fork() -> int:
    """Return how a fork ended that crashed."""
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.string_at(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def enable_fault_handler() -> None:
    faulthandler.enable()


def speak_and_exit_at_start(journal: Journal) -> NoReturn:
    journal.write("initializer", os.getpid())
    print("no licence for this host", file=sys.stderr)
    os._exit(5)


def speak_and_fail_at_start() -> NoReturn:
    print("no licence for this host", file=sys.stderr)
    raise OSError("refused")


def use_memory(size: int) -> None:
    with mmap.mmap(-1, size) as memory:
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1


def say_and_use_memory(size: int) -> None:
    print("about to use it all", file=sys.stderr)
    use_memory(size)


# To leave something behind


def daemonize(started: Fifo) -> int:
    """Start a daemon: a grandchild in a session of its own, with nothing open."""
    if pid := os.fork():
        os.waitpid(pid, 0)
        return os.getpid()
    os.setsid()
    if os.fork():
        os._exit(0)
    started.tell(os.getpid())
    os.closerange(0, 4096)
    time.sleep(3600)
    os._exit(0)


def become_daemon(started: Fifo) -> int:
    """Become a daemon, as programs do: the process that was started exits, a fork goes on."""
    if os.fork():
        os._exit(0)
    os.setsid()
    started.tell(os.getpid())
    return os.getpid()


def start_endless_thread(*, is_daemon: bool) -> int:
    threading.Thread(target=threading.Event().wait, daemon=is_daemon).start()
    return os.getpid()


def change_signals() -> int:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    return os.getpid()


def change_surroundings(directory: str) -> int:
    os.chdir(directory)
    os.umask(0o077)
    os.environ["ODD"] = "changed"
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))
    return os.getpid()


def surroundings() -> tuple[str, int, str | None, int]:
    mask = os.umask(0)
    os.umask(mask)
    return os.getcwd(), mask, os.environ.get("ODD"), resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def close_descriptors(low: int, high: int) -> int:
    os.closerange(low, high)
    return os.getpid()


_has_scribbled_enough = threading.Event()


def close_and_scribble(size_bytes: int) -> bytes:
    """Close stdin, leave a thread that writes to whatever has its number, and return zeros."""
    _has_scribbled_enough.clear()

    def scribble() -> None:
        while not _has_scribbled_enough.is_set():
            try:
                os.write(0, b"x")
            except OSError:
                pass

    os.close(0)
    threading.Thread(target=scribble, daemon=True).start()
    return bytes(size_bytes)


def scribble_no_more() -> None:
    _has_scribbled_enough.set()


def close_and_hold(started: Fifo, low: int, high: int) -> int:
    """Close them, say so by a new one, and return what the new one was."""
    os.closerange(low, high)
    fd = os.open("/dev/null", os.O_RDONLY)
    started.tell(os.getpid())
    os.close(fd)
    return fd


def open_and_print(path: str) -> int:
    """Return the number that a new file gets, after printing."""
    with open(path, "w") as file:
        print("printed")
        print("printed", file=sys.stderr)
        sys.stdout.flush()
        return file.fileno()


def print_bytes(stream: str, count: int) -> int:
    line = "x" * 1023
    out = getattr(sys, stream)
    for _ in range(count // 1024):
        print(line, file=out)
    return count


# To raise and to return


class OwnBaseError(BaseException):
    pass


class RaisesOnLoad:
    """Its unpickling raises, outside of the process that made it."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return load_or_raise, (os.getpid(), self.error)


def load_or_raise(pid: int, error: BaseException) -> RaisesOnLoad:
    if os.getpid() != pid:
        raise error
    return RaisesOnLoad(error)


def return_raising(error: BaseException) -> RaisesOnLoad:
    return RaisesOnLoad(error)


def return_raising_if(number: int, bad: int, error: BaseException) -> Any:
    return RaisesOnLoad(error) if number == bad else number


class ErrorThatRaisesOnLoad(Exception):
    def __init__(self, pid: int, error: BaseException) -> None:
        super().__init__(pid, error)
        if os.getpid() != pid:
            raise error


def raise_raising(error: BaseException) -> NoReturn:
    raise ErrorThatRaisesOnLoad(os.getpid(), error)


class ExitsOnLoad:
    def __reduce__(self) -> Any:
        return exit_unless, (os.getpid(),)


def exit_unless(pid: int) -> None:
    if os.getpid() != pid:
        os._exit(9)


def return_exiting() -> ExitsOnLoad:
    return ExitsOnLoad()


# To take long, or too much


def limit_and_use_memory(size: int) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + size // 2, resource.RLIM_INFINITY))
    bytearray(size)


def make_large_under_limit(size: int) -> int:
    """Return what fits into memory once, and not twice, and is not put into a file as it is."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + size + size // 2, resource.RLIM_INFINITY))
    return 1 << 8 * size


def hold_gil_for(started: Fifo, count: int) -> int:
    started.tell(os.getpid())
    return sum(itertools.repeat(1, count))


def ignore_sigterm(started: Fifo, gate: Fifo) -> str:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started.tell(os.getpid())
    gate.await_opening()
    return "here"


def run_and_read(text: str) -> str:
    return subprocess.run(["sh", "-c", f"sleep 0.1; echo {text}"], capture_output=True, text=True, check=True).stdout
