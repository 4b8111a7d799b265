"""Why a client takes no more calls: what `submit` then raises."""

from __future__ import annotations

from scaler_executor.runtime.nesting_site import get_site


def refuse_after_shutdown() -> Exception:
    """Return what a call after `shutdown` raises."""
    return RuntimeError("cannot schedule new futures after shutdown")


def refuse_at_exit() -> Exception:
    """Return what a call at the interpreter's exit raises."""
    return RuntimeError("cannot schedule new futures after interpreter shutdown")


def refuse_child() -> Exception:
    """Return what whoever uses an executor in a forked child is told."""
    site = get_site()
    instead = "make a new one"
    if site is not None and site.is_here:
        instead = "make a new one, or use that which runs this call: ScalerExecutor.current()"
    return RuntimeError(f"a ScalerExecutor cannot be used in a fork of the process that made it; {instead}")


def make_lost_error(reason: str) -> Exception:
    """Return a SchedulerLostError."""
    from scaler_executor.errors import SchedulerLostError

    return SchedulerLostError(reason)


def make_start_error(reason: str) -> Exception:
    """Return a WorkerStartError."""
    from scaler_executor.errors import WorkerStartError

    return WorkerStartError(reason)
