"""Handles: executors that were pickled, or that a worker has inherited, and `ScalerExecutor.current()`. They submit
calls from inside calls.

A handle has in the place of a client what makes one when it is needed, in the worker where it is used: the client of
that worker's calls (`nested_client`). It is a view of that client, so shutting it down waits for the calls that were
submitted through it, and ends nothing that others use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scaler_executor.protocol.messages import Options
from scaler_executor.runtime.nesting_site import NestingSite, get_site
from scaler_executor.runtime.terms import Terms

if TYPE_CHECKING:
    from scaler_executor.executor import ScalerExecutor
    from scaler_executor.runtime.client import ClientFutureManager
    from scaler_executor.runtime.view import ClientView


class Handle:
    """What an executor that was pickled has for a client. Thread-safe.

    Args:
        token: Of the executor that was pickled.
        options, name: Of its calls.
        inherited: The client that it had where it was made, in a fork of that process.
    """

    def __init__(
        self,
        token: bytes,
        options: Options,
        name: str | None,
        inherited: ClientFutureManager | ClientView | None = None,
    ) -> None:
        self.token = token
        # Kept, and never used: what it has is the other process's, and should not end here.
        self._inherited = inherited
        self._terms = Terms(options, name)
        self._made: ClientView | None = None

    @property
    def terms(self) -> Terms:
        """Of its calls."""
        return self._terms if self._made is None else self._made.terms

    def _view(self) -> ClientView:
        view = self._made
        if view is None:
            from scaler_executor.runtime.view import ClientView

            client = _site_of(self.token).get_client()
            terms = client.make_terms(self._terms.options, self._terms.name, client.terms)
            view = ClientView(client, terms, None)
            view = self.__dict__["_made"] = self._made or view
        return view

    def view(self, options: Options, name: str | None, owner: object) -> ClientView:
        """Return a view of this one."""
        return self._view().view(options, name, owner)

    def __getattr__(self, name: str) -> Any:
        # Whatever else executors, maps and the like ask a client: it is as `ClientView`.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._view(), name)


def _site_of(token: bytes) -> NestingSite:
    """Return the worker in which this is, if its calls are those of the executor with this token."""
    site = get_site()
    if site is None:
        raise RuntimeError(
            "this is the handle of a ScalerExecutor, which submits calls from inside a call that the executor runs; "
            "here there is none"
        )
    if token and site.token and token != site.token:
        raise RuntimeError("this is the handle of another ScalerExecutor than the one that runs this call")
    return site


def reduce(executor: ScalerExecutor) -> tuple[Any, ...]:
    """Return what pickles an executor, as its handle."""
    client = executor._client
    terms = client.terms
    return restore, (client.token, terms.options, terms.name, executor._max_workers, executor._start_method)


def restore(token: bytes, options: Options, name: str | None, max_workers: int, start_method: str) -> ScalerExecutor:
    """Return a handle."""
    from scaler_executor.executor import ScalerExecutor

    handle = ScalerExecutor.__new__(ScalerExecutor)
    handle._start_method, handle._max_workers = start_method, max_workers
    handle._client = Handle(token, options, name)
    return handle


def inherit(executor: ScalerExecutor) -> None:
    """Make a handle of an executor that its worker has inherited: a global, say."""
    client = executor._client
    if not isinstance(client, Handle):
        executor._client = Handle(client.token, client.terms.options, client.terms.name, client)


def current() -> ScalerExecutor:
    """Return a handle of the executor that runs the call in which this is asked.

    Raises:
        RuntimeError: There is none.
    """
    site = get_site()
    if site is None:
        raise RuntimeError("ScalerExecutor.current() is for code inside a call that a ScalerExecutor runs")
    workers = site.get_client().get_workers()
    return restore(site.token, site.options, None, workers, site.start_method)
