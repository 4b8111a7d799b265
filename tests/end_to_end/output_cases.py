"""Cases of `test_output`: what calls print and write."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import logging.handlers
import os
import sys
import threading
import warnings
from concurrent.futures import BrokenExecutor
from typing import Any

from comparison import Pools, attempt


def settle(executor: Any, fn: Any, /, *args: Any) -> Any:
    return attempt(lambda: executor.submit(fn, *args).result(30))


def write_in_every_way(number: int) -> None:
    print(f"print {number}")
    print(f"flushed {number}", flush=True)
    print(f"to stderr {number}", file=sys.stderr)
    sys.stdout.write(f"no line end {number}")
    sys.stdout.flush()
    print()
    os.write(1, f"to descriptor 1 {number}\n".encode())
    os.write(2, f"to descriptor 2 {number}\n".encode())
    sys.stdout.buffer.write(f"to the buffer {number}\n".encode())
    os.system(f"echo from a shell {number}; echo from a shell to stderr {number} >&2")


def all_ways(pools: Pools) -> object:
    print("before")
    with pools(1) as executor:  # two would tear each other's lines
        seen = list(executor.map(write_in_every_way, range(5)))
    print("after")
    return seen


def print_by_c(text: str) -> None:
    library = ctypes.CDLL(None)
    library.printf(b"%s\n", text.encode())


def print_by_c_and_flush(text: str) -> None:
    print_by_c(text)
    ctypes.CDLL(None).fflush(None)


def c_library(pools: Pools) -> object:
    with pools() as executor:
        settle(executor, print_by_c_and_flush, "flushed by the call")
        if pools.start_method != "fork":
            # A fork ends without flushing them, in either executor.
            settle(executor, print_by_c, "left to the end of the worker")
    return None


def nothing_else(pools: Pools) -> object:
    """Errors, cancelled and refused calls print nothing."""
    with pools(2) as executor:
        seen = [settle(executor, abs, "x"), settle(executor, 5), settle(executor, raise_chain)]
        seen += [settle(executor, threading.Lock)[0]]
        list(executor.map(abs, range(10)))
    return seen


def raise_chain() -> None:
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise ValueError("outer") from error


def replaced(pools: Pools) -> object:
    with pools() as executor:
        return [
            settle(executor, replace_stdout),
            settle(executor, print, "into the replaced one"),
            settle(executor, restore_stdout),
            settle(executor, redirect),
            settle(executor, print, "visible"),
            settle(executor, close_stdout),
            settle(executor, abs, -1),
            settle(executor, print, "x"),
            settle(executor, remove_stdout),
            settle(executor, print, "x"),
            settle(executor, abs, -1),
        ]


def replace_stdout() -> None:
    sys.stdout = io.StringIO()


def restore_stdout() -> Any:
    text = sys.stdout.getvalue()  # type: ignore[attr-defined]
    sys.stdout = sys.__stdout__
    return text


def redirect() -> Any:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(text):
        print("redirected")
        print("redirected", file=sys.stderr)
    return text.getvalue()


def close_stdout() -> None:
    sys.stdout.close()


def remove_stdout() -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]


class Odd:
    """A stream that fails."""

    def write(self, text: str) -> int:
        raise OSError("full")

    def flush(self) -> None:
        raise OSError("cannot be flushed")


def odd_streams(pools: Pools) -> object:
    with pools() as executor:
        return [settle(executor, set_odd), settle(executor, print, "x"), settle(executor, abs, -1)]


def set_odd() -> None:
    sys.stdout = Odd()  # type: ignore[assignment]


def set_up_logging(level: int) -> None:
    logging.basicConfig(level=level, format="%(levelname)s %(processName).0s%(message)s")


def log(text: str) -> None:
    logging.getLogger("some.where").info(text)
    logging.getLogger().debug("not shown")


def configured_logging(pools: Pools) -> object:
    with pools(initializer=set_up_logging, initargs=(logging.INFO,)) as executor:
        settle(executor, log, "from the call")
    with pools() as executor:
        settle(executor, log, "not shown")
    return None


def inherited_logging(pools: Pools) -> object:
    set_up_logging(logging.INFO)
    with pools() as executor:
        settle(executor, log, "shown by forks only")
    return None


def fail_to_start(error: BaseException) -> None:
    print("the initializer")
    raise error


def fail_with_logging(level: int) -> None:
    logging.basicConfig(level=level, format="of the initializer: %(levelname)s %(name)s %(message)s")
    fail_to_start(OSError("no licence"))


def failing_initializer(pools: Pools) -> object:
    """One worker: how many begin before the first has failed, nobody knows."""
    seen = []
    for error in (OSError("no licence"), SystemExit(3)):
        executor = pools(initializer=fail_to_start, initargs=(error,))
        seen.append(isinstance(executor.submit(abs, -1).exception(30), BrokenExecutor))
        executor.shutdown()
    return seen


def failing_initializer_with_logging(pools: Pools) -> object:
    """Forks have the program's set-up; an initializer may have one of its own; a level may hide it."""
    for level in (logging.INFO, logging.CRITICAL + 1):
        executor = pools(initializer=fail_with_logging, initargs=(level,))
        executor.submit(abs, -1).exception(30)
        executor.shutdown()
    logging.basicConfig(format="of the program: %(levelname)s %(name)s %(message)s")
    failing_initializer(pools)
    logging.getLogger("concurrent.futures").disabled = True
    return failing_initializer(pools)


def log_into(queue: Any) -> None:
    """As the logging cookbook has it."""
    logging.getLogger().addHandler(logging.handlers.QueueHandler(queue))
    fail_to_start(OSError("no licence"))


def failing_initializer_with_queue(pools: Pools) -> object:
    """What was put into a queue arrives, though the worker ends."""
    queue = pools.primitives.Queue()
    executor = pools(initializer=log_into, initargs=(queue,))
    executor.submit(abs, -1).exception(30)
    record = queue.get(timeout=30)
    executor.shutdown()
    return record.name, record.levelno, record.message.splitlines()[0], record.message.splitlines()[-1]


def warn() -> None:
    warnings.warn("a warning of the call", stacklevel=1)
    warnings.warn("deprecated", DeprecationWarning, stacklevel=1)


def warned(pools: Pools) -> object:
    with pools() as executor:
        return [settle(executor, warn), settle(executor, warn)]


def fail_in_thread() -> None:
    thread = threading.Thread(target=raise_chain, name="Thread of the user")
    thread.start()
    thread.join()


class Failing:
    def __del__(self) -> None:
        raise ValueError("in the finalizer")


def fail_in_finalizer() -> None:
    Failing()


def unraisable(pools: Pools) -> object:
    with pools() as executor:
        return [settle(executor, fail_in_thread), settle(executor, fail_in_finalizer)]


def ask() -> Any:
    return attempt(input), sys.stdin.read(), os.read(0, 10)


def standard_input(pools: Pools) -> object:
    with pools() as executor:
        return settle(executor, ask)


def unencodable(pools: Pools) -> object:
    with pools() as executor:
        return [settle(executor, print, "\xe9\u20ac"), settle(executor, print, "\udc80")]


def at_the_end() -> None:
    import atexit
    from multiprocessing import util

    atexit.register(print, "atexit", flush=True)
    util.Finalize(None, print, ("finalizer",), {"flush": True}, exitpriority=1)
    print("left in the buffer", end="")


def end_of_a_worker(pools: Pools) -> object:
    """Functions of the client's do not run there."""
    import atexit

    pid = os.getpid()
    atexit.register(lambda: print("the client's", os.getpid() == pid))
    with pools() as executor:
        return settle(executor, at_the_end)


_queue: Any = None


def set_queue(queue: Any) -> None:
    global _queue
    _queue = queue


def put(count: int) -> None:
    for number in range(count):
        _queue.put(bytes(1000) + bytes([number]))


def queue_at_the_end(pools: Pools) -> object:
    """What a call has put into a queue arrives, though the worker ends at once and the queue is full."""
    queue = pools.primitives.Queue()
    executor = pools(initializer=set_queue, initargs=(queue,))
    executor.submit(put, 200).result(30)
    executor.shutdown(wait=False)
    return [queue.get(timeout=30)[-1] for _ in range(200)] == list(range(200))


def read_null() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def crash(pools: Pools) -> object:
    """A fault handler tells of the crash."""
    with pools() as executor:
        return settle(executor, read_null)[0] in ("BrokenProcessPool", "WorkerDiedError")


def large(pools: Pools) -> object:
    """By one worker: a pipe keeps only 4096 bytes together when two write at once."""
    with pools(1) as executor:
        return sum(executor.map(print_lines, range(4)))


def print_lines(number: int) -> int:
    for line in range(5000):
        print(f"{number} {line:05d} {'x' * 50}")
    return 1
