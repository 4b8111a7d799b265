"""What a user may say in `ScalerExecutor.with_options`, and what is refused."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any, Final

from scaler_executor.defaults import UNCHANGED, Unchanged

if TYPE_CHECKING:
    from scaler_executor.protocol.messages import Options

MAX_RETRIES: Final = 1_000_000
MAX_PRIORITY: Final = 1_000_000
MAX_NAME: Final = 200


def check_count(what: str, value: Any, least: int, most: int) -> int:
    """Return `value` if it is an integer in these bounds.

    Raises:
        TypeError, ValueError: It is not.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer, not {type(value).__name__}") from None
    if not least <= value <= most:
        raise ValueError(f"{what} must be between {least} and {most}, not {value}")
    return int(value)


def check_seconds(what: str, value: Any, *, zero: bool, none: str = "") -> float:
    """Return `value` as a float if it is a finite number of seconds.

    Args:
        what: Its name.
        value: The value.
        zero: Whether it may be 0.
        none: What None would mean, if that may be said.

    Raises:
        TypeError, ValueError: It is no number, or none that can be meant.
    """
    other = f", or None for {none}" if none else ""
    try:
        if isinstance(value, (bool, str, bytes, bytearray)):
            raise TypeError
        seconds = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a number of seconds{other}, not {type(value).__name__}") from None
    except OverflowError:
        seconds = math.inf
    if not (seconds >= 0 if zero else seconds > 0) or seconds == math.inf:
        bound = ">= 0" if zero else "> 0"
        raise ValueError(f"{what} must be {bound}, a finite number of seconds{other}, not {value!r}")
    return seconds


def check_timeout(value: Any) -> float | None:
    """Return what a call may run."""
    return None if value is None else check_seconds("timeout", value, zero=False, none="no limit")


def check_name(value: Any) -> str | None:
    """Return what calls are called."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"name must be a string, or None for the function's name, not {type(value).__name__}")
    if not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise ValueError(f"name must be 1 to {MAX_NAME} printable characters, not {value[:MAX_NAME]!r}")
    return str(value)


def check_sizes(chunksize: Any, buffersize: Any) -> tuple[int, int | None]:
    """Return how a map is to cut and to read ahead, or raise as the standard library does."""
    if chunksize < 1:
        raise ValueError("chunksize must be >= 1.")
    if buffersize is not None and not isinstance(buffersize, int):
        raise TypeError("buffersize must be an integer or None")
    if buffersize is not None and buffersize < 1:
        raise ValueError("buffersize must be None or > 0")
    return operator.index(chunksize), buffersize


def merge(
    options: Options,
    name: str | None,
    *,
    retries: int | Unchanged,
    timeout: float | Unchanged | None,
    priority: int | Unchanged,
    new_name: str | Unchanged | None,
    cancel_grace: float | Unchanged,
) -> tuple[Options, str | None]:
    """Return options and name with what is not UNCHANGED put in their places.

    Raises:
        TypeError, ValueError: One of them cannot be.
    """
    from scaler_executor.protocol.messages import Options

    merged = Options(
        options.retries if retries is UNCHANGED else check_count("retries", retries, 0, MAX_RETRIES),
        options.timeout_s if timeout is UNCHANGED else check_timeout(timeout),
        options.priority if priority is UNCHANGED else check_count("priority", priority, -MAX_PRIORITY, MAX_PRIORITY),
        options.cancel_grace_s if cancel_grace is UNCHANGED else check_seconds("cancel_grace", cancel_grace, zero=True),
    )
    return merged, name if new_name is UNCHANGED else check_name(new_name)
