"""What a reader makes of a result: a value or an exception, from the kind and the payload that came.

Unpickling runs user code, so this is called in the thread of whoever reads a result and never in the client's own.
"""

from __future__ import annotations

from concurrent.futures import TimeoutError
from pickle import loads as _loads
from typing import Any, Final

import msgspec

from scaler_executor.errors import title_of
from scaler_executor.protocol.messages import DeathReport, Payload, ResultKind
from scaler_executor.runtime.calls import LoadFailed, loads_exception, loads_value, loads_values

#: Beside the ResultKinds: the scheduler is lost, the payload is the reason.
LOST: Final = -1

_VALUE: Final = int(ResultKind.VALUE)


def read_result(kind: int, payload: Payload | str, call_name: str) -> tuple[BaseException | None, Any]:
    """Return (exception, value) of one call. What fails to unpickle gives the exception that said so.

    Raises:
        KeyboardInterrupt: It came while user code was unpickling; the result can be read again.
    """
    try:
        if kind == _VALUE:
            return None, _loads(payload) if type(payload) is bytes else loads_value(payload)  # type: ignore[arg-type]
        return read_failure(kind, payload, call_name), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error, None


def read_values(payload: Payload, count: int) -> list[Any]:
    """Return the values of `count` items, `LoadFailed` in the place of each that does not unpickle."""
    return loads_values(payload, count)


def read_failure(kind: int, payload: Payload | str, call_name: str) -> BaseException:
    """Return the exception of a result that is not a VALUE."""
    if kind == ResultKind.ERROR:
        return loads_exception(payload)  # type: ignore[arg-type]
    if kind == ResultKind.DIED:
        from scaler_executor.errors import WorkerDiedError

        assert isinstance(payload, bytes)
        return WorkerDiedError.from_report(msgspec.msgpack.decode(payload, type=DeathReport), call_name)
    if kind == ResultKind.TIMED_OUT:
        assert isinstance(payload, bytes)
        return TimeoutError(f"{title_of(call_name) or 'the call'} {payload.decode('utf-8', 'replace')}")
    if kind == ResultKind.BROKEN:
        from scaler_executor.errors import WorkerStartError

        assert isinstance(payload, bytes)
        return WorkerStartError(payload.decode("utf-8", "replace"))
    if kind in (LOST, ResultKind.LOST):
        from scaler_executor.errors import SchedulerLostError

        return SchedulerLostError(payload if isinstance(payload, str) else bytes(payload).decode("utf-8", "replace"))  # type: ignore[arg-type]
    raise AssertionError(f"result of kind {kind}")


__all__ = ["LOST", "LoadFailed", "read_failure", "read_result", "read_values"]
