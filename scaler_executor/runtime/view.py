"""A view of a client: what an executor made by `with_options` has in the place of a client of its own.

Its calls are the client's, with other options, and remembered as the view's: so it can be shut down, cleared and waited
for alone, and whoever is handed one cannot end what is not theirs. It has those methods of `ClientFutureManager` that
executors and maps use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from scaler_executor.defaults import DefaultTimeout
from scaler_executor.future import ScalerFuture, cancel_all
from scaler_executor.protocol.messages import CancelKind, Options, Payload
from scaler_executor.runtime.terms import Terms

if TYPE_CHECKING:
    from scaler_executor.runtime.client import ClientFutureManager
    from scaler_executor.runtime.functions import PreparedFunction
    from scaler_executor.runtime.interfaces import Run
    from scaler_executor.runtime.namespace import Needs


class ClientView:
    """A view. Thread-safe.

    Args:
        client: Of which it is one.
        terms: Of its calls.
        owner: The executor that must not end as garbage as long as the view takes calls.
    """

    def __init__(self, client: ClientFutureManager, terms: Terms, owner: object) -> None:
        self._client = client
        self.terms = terms
        self.pickler = client.pickler
        self._owner = owner
        #: Nobody else had the executor, and so its end was the view's.
        self._has_ended_client = False
        self.token = client.token
        self.lender = client.lender

    def view(self, options: Options, name: str | None, owner: object) -> ClientView:
        """Return a view of this one."""
        return ClientView(self._client, self._client.make_terms(options, name, self.terms), self._owner)

    # As ClientFutureManager

    def check_open(self) -> None:
        """Raise what a new call would raise."""
        self._client.check_open()
        self._client.check_terms(self.terms)

    def start(self) -> None:
        """Do what the first call needs. Raises what a new call would raise."""
        self.check_open()
        self._client.start()

    def submit(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, may_wait: bool = True
    ) -> ScalerFuture[Any]:
        """Pickle and queue a call."""
        return self._client.submit(function, args, kwargs, self.terms, may_wait=may_wait)

    @property
    def is_full(self) -> bool:
        """Whether callers wait for room."""
        return self._client.is_full

    def await_room(self) -> None:
        """Wait for room."""
        self._client.await_room()

    def prepare(self, function: Any) -> PreparedFunction:
        """Make a function ready for `submit_run`."""
        return self._client.prepare(function)

    def needs(self, names: Iterable[str]) -> Needs:
        """Return the definitions that these globals of `__main__` need now."""
        return self._client.needs(names)

    def submit_run(
        self,
        prepared: PreparedFunction,
        needs: Needs,
        function_id: int,
        items: int,
        payload: Payload,
        run: Run,
        *,
        may_wait: bool = True,
    ) -> int | None:
        """Queue a run and number it."""
        return self._client.submit_run(prepared, needs, function_id, items, payload, run, self.terms, may_wait=may_wait)

    def take_back(self, tasks: list[int], kind: CancelKind = CancelKind.SOFT) -> None:
        """Cancel what has not started of these tasks, and what runs if FORCED, without waiting."""
        self._client.take_back(tasks, kind)

    def take_back_all(self, max_workers: int) -> None:
        """Cancel what has not started of its calls, without waiting."""
        self._client.take_back_all(max_workers, self.terms)

    def clear(self, timeout: float | DefaultTimeout | None) -> None:
        """Cancel its calls by force, and wait for that as `ScalerFuture.cancel` does."""
        client = self._client
        client.check_process()
        futures, runs = client.get_outstanding(self.terms)
        if runs:
            client.ask_cancel([(run.task_no, CancelKind.FORCED) for run in runs])
        cancel_all(futures, timeout, force=True, others=[(client, run.over) for run in runs])

    def close(self) -> None:
        """Accept no more calls. Never waits."""
        client = self._client
        client.close_terms(self.terms)
        was_closed = client.is_closing
        owner, self._owner = self._owner, None
        del owner  # which ends the executor if nobody else has it
        self._has_ended_client = self._has_ended_client or (client.is_closing and not was_closed)

    def join(self) -> None:
        """Wait until its calls are over, callbacks included; and for the end of the executor, if the view was all that
        was left of it."""
        client = self._client
        if not client.is_abandoned:
            client.join_view(self.terms)
            if self._has_ended_client:
                client.join()

    join_soon = join

    def kill(self) -> None:
        """Stop its calls without waiting: the workers are others' as well."""
        self.clear(0)

    def kill_workers(self) -> None:
        """Close, and stop its calls without waiting."""
        self.close()
        if not self._client.is_abandoned:
            self.clear(0)
