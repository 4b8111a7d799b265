"""Loggers, one for each role, that cost nothing until something is to be said: importing logging takes as long as a
tenth of a cold start."""

from __future__ import annotations

from typing import Any


def debug(role: str, text: str, *args: Any) -> None:
    """Log to `scaler_executor.ROLE` what only matters to whoever looks for a fault."""
    import logging

    logging.getLogger(f"scaler_executor.{role}").debug(text, *args)


def warn(role: str, text: str, *args: Any) -> None:
    """Log a warning to `scaler_executor.ROLE`."""
    import logging

    logging.getLogger(f"scaler_executor.{role}").warning(text, *args)


def error(role: str, text: str, *args: Any) -> None:
    """Log an error to `scaler_executor.ROLE`."""
    import logging

    logging.getLogger(f"scaler_executor.{role}").error(text, *args)
