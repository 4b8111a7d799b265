"""The public exceptions.

Those that derive from the standard library's BrokenExecutor and BrokenProcessPool are made on first use:
`concurrent.futures.process` takes some 40 ms to import, and most programs never see one. They are pickled by their
public name, `scaler_executor.WorkerDiedError` say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaler_executor._broken_executor import SchedulerLostError as SchedulerLostError
    from scaler_executor._broken_pool import WorkerDiedError as WorkerDiedError
    from scaler_executor._broken_pool import WorkerStartError as WorkerStartError

__all__ = [
    "AuthenticationError",
    "RemoteError",
    "ResultTooLargeError",
    "SchedulerLostError",
    "TaskInterrupted",
    "TaskTooLargeError",
    "VersionMismatchError",
    "WorkerDiedError",
    "WorkerStartError",
]


class TaskInterrupted(KeyboardInterrupt):
    """Raised inside a running call, in its worker, when the call is cancelled.

    It is a KeyboardInterrupt because that is what well-behaved code lets pass: `finally` blocks and context managers
    run. A call that swallows it and returns has finished; one that does not end within the executor's `cancel_grace` is
    killed.
    """

    __module__ = "scaler_executor"


class RemoteError(Exception):
    """Stands for an exception of a call that could not be sent back as it was.

    Attributes:
        type_name: Qualified name of the original's type.
        text: `str()` of the original, or why that failed.
        traceback: The formatted traceback from the worker.
    """

    __module__ = "scaler_executor"

    def __init__(self, type_name: str, text: str, traceback: str = "") -> None:
        super().__init__(type_name, text, traceback)
        self.type_name = type_name
        self.text = text
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}"


class _TooLargeError(ValueError):
    """What is to be sent is larger than anything that is.

    Attributes:
        size_bytes: How large the pickle with its buffers is, without those that go through shared memory.
        limit_bytes: How large it may be.
    """

    _what = ""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(size_bytes, limit_bytes)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        return f"{self._what} of {self.size_bytes} bytes: more than {self.limit_bytes} bytes are not sent"


class TaskTooLargeError(_TooLargeError):
    """The arguments of a call, or its function, are too large: set on its future, and nothing was sent.

    Attributes:
        size_bytes: How large the pickle with its buffers is, without those that go through shared memory.
        limit_bytes: How large it may be.
    """

    __module__ = "scaler_executor"
    _what = "a call with arguments"


class ResultTooLargeError(_TooLargeError):
    """The result of a call is too large: the call was made, and its future has this instead of its value.

    Attributes:
        size_bytes: How large the pickle with its buffers is, without those that go through shared memory.
        limit_bytes: How large it may be.
    """

    __module__ = "scaler_executor"
    _what = "a result"


class AuthenticationError(ConnectionError):
    """A served cluster does not let this client in, or is not the one that the connection file is of."""

    __module__ = "scaler_executor"


class VersionMismatchError(ConnectionError):
    """A served cluster speaks another version of the protocol, or runs another version of Python; names both."""

    __module__ = "scaler_executor"


def title_of(call_name: str) -> str:
    """Return how messages call a call: by its function, `load()`, or by the name that `with_options` gave it."""
    parts = call_name.split(".")
    is_function = all(part.isidentifier() or part in ("<locals>", "<lambda>") for part in parts)
    return f"{call_name}()" if is_function else repr(call_name) if call_name else ""


def __getattr__(name: str) -> Any:
    if name == "SchedulerLostError":
        from scaler_executor import _broken_executor as home
    elif name in ("WorkerDiedError", "WorkerStartError"):
        from scaler_executor import _broken_pool as home  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(home, name)
    return value
