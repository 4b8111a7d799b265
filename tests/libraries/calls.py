"""What the libraries have workers call."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Record:
    """Files in a directory by which calls tell the test where they were made."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, each call of which is recorded."""
        return functools.partial(_watched, self.directory, function)

    def deadly(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, whose fourth call or so kills its worker, once."""
        return functools.partial(_deadly, self.directory, function)

    def pids(self) -> set[int]:
        """Return the processes that have made calls of what is watched."""
        return {int(path.suffix[1:]) for path in Path(self.directory).glob("pid.*")}

    def running(self) -> set[int]:
        """Return those of them that have not ended."""
        return {pid for pid in self.pids() if not _has_ended(pid)}

    def after_start(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which is called when one that is watched has been."""
        return functools.partial(_after_start, self.directory, function)

    def has_died(self) -> bool:
        return Path(self.directory, "dead").exists()


def _watched(directory: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    Path(directory, f"pid.{os.getpid()}").touch()
    return function(*args, **kwargs)


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] in "ZX"
    except OSError:
        return True


def _after_start(directory: str, function: Callable[..., Any], *args: Any) -> Any:
    while not list(Path(directory).glob("pid.*")):
        time.sleep(0.005)
    return function(*args)


def _deadly(directory: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for name in ("one", "two", "three", "dead"):
        try:
            Path(directory, name).touch(exist_ok=False)
        except FileExistsError:
            continue
        if name == "dead":
            os.kill(os.getpid(), signal.SIGKILL)
        break
    return function(*args, **kwargs)


class Wrong(Exception):
    """What calls raise."""


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Wrong("on purpose")


def square(x: float) -> float:
    return x * x


def sphere(x: Any) -> float:
    """A minimum of 0 at (0.5, ...)."""
    return float(sum((value - 0.5) ** 2 for value in x))


def sleep_long(*_: Any) -> None:
    """A call that nobody waits for to the end."""
    time.sleep(600)
