"""Why a client takes no more calls: what `submit` then raises."""

from __future__ import annotations


def refuse_after_shutdown() -> Exception:
    """Return what a call after `shutdown` raises."""
    return RuntimeError("cannot schedule new futures after shutdown")


def refuse_at_exit() -> Exception:
    """Return what a call at the interpreter's exit raises."""
    return RuntimeError("cannot schedule new futures after interpreter shutdown")


def refuse_child() -> Exception:
    """Return what whoever uses an executor in a forked child is told."""
    return RuntimeError("a ScalerExecutor cannot be used in a fork of the process that made it; make a new one")


def make_lost_error(reason: str) -> Exception:
    """Return a SchedulerLostError."""
    from scaler_executor.errors import SchedulerLostError

    return SchedulerLostError(reason)


def make_start_error(reason: str) -> Exception:
    """Return a WorkerStartError."""
    from scaler_executor.errors import WorkerStartError

    return WorkerStartError(reason)
