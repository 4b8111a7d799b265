"""Values and exceptions that are hard to pickle, for the tests in this folder; workers import this module by name."""

from __future__ import annotations

from typing import Any


class CustomError(Exception):
    """Survives the way with everything that it carries."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code


class AwkwardError(Exception):
    """Pickles, and cannot be unpickled: its arguments are not those of its constructor."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class Unpicklable:
    """Refuses to be pickled."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


class FailsToLoad:
    """Pickles, and raises when it is unpickled."""

    def __reduce__(self) -> Any:
        return (raise_error, (ValueError("broken on arrival"),))


def raise_error(error: BaseException) -> Any:
    """Raise it."""
    raise error


def raise_awkward() -> None:
    raise AwkwardError("this", "that")


def raise_with_lock() -> None:
    import threading

    error = ValueError("with a lock")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


def make_unpicklable() -> Unpicklable:
    return Unpicklable()


def identity(value: Any) -> Any:
    return value


def add(*values: Any, **named: Any) -> Any:
    return sum(values) + sum(named.values())
