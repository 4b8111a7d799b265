"""Handles: executors that were pickled, and `ScalerExecutor.current()`. They submit calls from inside calls.

A handle has in the place of a client what makes one when it is needed, in the worker where it is used: the client of
that worker's calls (`nested_client`). It is a view of that client, so shutting it down waits for the calls that were
submitted through it, and ends nothing that others use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from scaler_executor.defaults import DefaultTimeout
from scaler_executor.future import ScalerFuture
from scaler_executor.protocol.messages import Options, Payload
from scaler_executor.runtime.nesting_site import NestingSite, get_site
from scaler_executor.runtime.terms import Terms

if TYPE_CHECKING:
    from scaler_executor.executor import ScalerExecutor
    from scaler_executor.runtime.calls import CallPickler
    from scaler_executor.runtime.functions import PreparedFunction
    from scaler_executor.runtime.interfaces import Run
    from scaler_executor.runtime.lender import Lender
    from scaler_executor.runtime.namespace import Needs
    from scaler_executor.runtime.view import ClientView


class Handle:
    """What an executor that was pickled has for a client. Thread-safe.

    Args:
        token: Of the executor that was pickled.
        options, name: Of its calls.
    """

    def __init__(self, token: bytes, options: Options, name: str | None) -> None:
        self.token = token
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

    # As ClientView

    @property
    def pickler(self) -> CallPickler:
        """See `ClientView`."""
        return self._view().pickler

    @property
    def lender(self) -> Lender | None:
        """See `ClientView`."""
        return self._view().lender

    def view(self, options: Options, name: str | None, owner: object) -> ClientView:
        """Return a view of this one."""
        return self._view().view(options, name, owner)

    def check_open(self) -> None:
        """Raise what a new call would raise."""
        self._view().check_open()

    def start(self) -> None:
        """Do what the first call needs."""
        self._view().start()

    def submit(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ScalerFuture[Any]:
        """Pickle and queue a call."""
        return self._view().submit(function, args, kwargs)

    def prepare(self, function: Any) -> PreparedFunction:
        """Make a function ready for `submit_run`."""
        return self._view().prepare(function)

    def needs(self, names: Iterable[str]) -> Needs:
        """Return the definitions that these globals of `__main__` need now."""
        return self._view().needs(names)

    def submit_run(
        self, prepared: PreparedFunction, needs: Needs, function_id: int, items: int, payload: Payload, run: Run
    ) -> int | None:
        """Queue a run and number it."""
        return self._view().submit_run(prepared, needs, function_id, items, payload, run)

    def take_back(self, tasks: list[int]) -> None:
        """Cancel what has not started of these tasks, without waiting."""
        self._view().take_back(tasks)

    def take_back_all(self, max_workers: int) -> None:
        """Cancel what has not started of its calls, without waiting."""
        self._view().take_back_all(max_workers)

    def clear(self, timeout: float | DefaultTimeout | None) -> None:
        """Cancel its calls by force."""
        self._view().clear(timeout)

    def close(self) -> None:
        """Accept no more calls. Never waits."""
        self._view().close()

    def join(self) -> None:
        """Wait until its calls are over, callbacks included."""
        self._view().join()

    def join_soon(self) -> None:
        """As `join`."""
        self._view().join_soon()

    def kill(self) -> None:
        """Stop its calls without waiting."""
        self._view().kill()

    def kill_workers(self) -> None:
        """Close, and stop its calls without waiting."""
        self._view().kill_workers()


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
