"""Calls of `test_prints`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import Any

from scaler_executor import ScalerExecutor


def say(text: str) -> None:
    print(text)


def say_through_another(text: str) -> str:
    future = ScalerExecutor.current().submit(say, text)
    future.result()
    return future.log


def say_much(text: str) -> str:
    print(text)
    print("to stderr", file=sys.stderr)
    sys.stdout.buffer.write(b"by the buffer\n")
    sys.stdout.write("no end of line")
    return "value"


def fail(text: str) -> None:
    print(text)
    raise ValueError(text)


def say_at_last(text: str) -> None:
    """Print what is to be kept of a call that is killed: a file or pipe of the user's has to be flushed for that."""
    print(text, flush=not hasattr(sys.stdout.buffer, "is_taken"))


def die(text: str) -> None:
    say_at_last(text)
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(text: str, path: str) -> None:
    say_at_last(text)
    if not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)


def hang(text: str, gate: Any = None) -> None:
    """Run on whatever is done about it; `gate` is told when the text is printed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    say_at_last(text)
    if gate is not None:
        gate.tell()
    while True:
        signal.pause()


def say_and_wait(text: str, gate: Any, **options: Any) -> None:
    print(text, **options)
    gate.await_opening()


def flood() -> None:
    number = 0
    while True:
        number += 1
        print(number, "x" * 100)


def say_lines(count: int, letter: str, width: int) -> None:
    for _ in range(count):
        print(letter * width)


def count_copies(count: int) -> int:
    """Print so many lines, and return how often the text was handed down meanwhile."""
    buffer = sys.stdout.buffer
    write, calls = buffer.write, []
    buffer.write = lambda data: calls.append(data) or write(data)  # type: ignore[func-returns-value, method-assign]
    try:
        for number in range(count):
            print("line", number)
        return len(calls)
    finally:
        buffer.write = write  # type: ignore[method-assign]


def say_at_once(size: int) -> None:
    print("y" * 99 + "\n" + ("x" * 99 + "\n") * (size // 100))


def log(text: str) -> None:
    logger = logging.getLogger("some.where")
    logger.debug("debug %s", text)
    logger.info("info %s", text)
    try:
        raise KeyError(text)
    except KeyError:
        logger.exception("error %s", text)


def set_up_and_log(text: str) -> None:
    logging.basicConfig(format="set up in the worker: %(message)s")
    logging.getLogger("some.where").warning(text)


def in_background(text: str, gate: Any) -> None:
    """Have a thread print when the call is over."""

    def say() -> None:
        gate.await_opening()
        print(text, flush=True)

    threading.Thread(target=say, daemon=True).start()


def by_descriptor(text: str) -> None:
    os.write(1, text.encode() + b"\n")


def in_child(text: str) -> int:
    pid = os.fork()
    if not pid:
        print(text, flush=True)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def nested(text: str, method: str) -> str:
    """Print from a call of an executor of the call's own."""
    import multiprocessing

    from scaler_executor import ScalerExecutor

    with ScalerExecutor(1, multiprocessing.get_context(method)) as executor:
        future = executor.submit(say, text)
        future.result()
        return future.log
