"""SchedulerLostError, apart from `errors` because its base costs an import of `concurrent.futures` (and so of
`logging`)."""

from concurrent.futures import BrokenExecutor


class SchedulerLostError(BrokenExecutor):
    """The scheduler is gone, and with it the calls that were outstanding; the executor cannot be used any more."""

    __module__ = "scaler_executor"
