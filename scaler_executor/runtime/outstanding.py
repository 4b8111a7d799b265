"""The calls and runs that have no final answer, and what the answers make of them.

Callers add to them under the client's lock; everything else here is for the I/O thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from scaler_executor.future import CancelOutcome, ScalerFuture
from scaler_executor.protocol.client import REST, Cause
from scaler_executor.protocol.messages import ClientResultRow, DeathReport, Payload, ResultKind
from scaler_executor.runtime.display import CallLog
from scaler_executor.runtime.interfaces import Run
from scaler_executor.runtime.results import LOST
from scaler_executor.runtime.segments import holds_segments
from scaler_executor.runtime.terms import Terms


def is_of_view(future: ScalerFuture[Any], terms: Terms) -> bool:
    """Tell whether a call was submitted through the view with these terms, or a view of it."""
    its: Terms | None = getattr(future, "_terms", None)
    return its is not None and its.are_within(terms)


class Outstanding:
    """Everything of one client that has no final answer."""

    def __init__(self) -> None:
        #: {no: future}, {no: run}
        self.futures: dict[int, ScalerFuture[Any]] = {}
        self.runs: dict[int, Run] = {}
        #: {no: what keeps files in shared memory that any attempt of this call or run may need}. Added to under the
        #: client's lock, removed from by the I/O thread, and by whoever finds it too late for that.
        self._kept: dict[int, list[Any]] = {}
        #: Whether any call is known to have started.
        self.has_begun = False
        #: Whether the user has killed the workers: then calls end with that, and not with the loss of the scheduler.
        self.is_killed = False

    def of_view(self, terms: Terms) -> tuple[list[ScalerFuture[Any]], list[Run]]:
        """Return those that were submitted through a view, and views of it. Under the client's lock."""
        futures = [future for future in self.futures.values() if is_of_view(future, terms)]
        runs = [run for run in self.runs.values() if run.terms is not None and run.terms.are_within(terms)]
        return futures, runs

    def keep(self, no: int, payload: Payload) -> None:
        """Keep the files that a payload names until the call or run has its final answer. Under the client's lock."""
        if holds_segments(payload):
            self._kept.setdefault(no, []).append(payload)

    def keep_for_all(self, retired: list[Any]) -> None:
        """Keep the files of functions that no later call names until those that may have named them are answered.
        Under the client's lock."""
        if not retired:
            return
        for no in [*self.futures, *self.runs]:
            self._kept.setdefault(no, []).append(retired)
            if no not in self.futures and no not in self.runs:
                self._kept.pop(no, None)  # it was answered meanwhile

    def _let_go(self, tasks: Iterable[int]) -> None:
        """Let go of what was kept for those of the tasks that are answered."""
        if self._kept:
            for no in tasks:
                if no not in self.runs:
                    self._kept.pop(no, None)

    def finish(self, tasks: list[int]) -> None:
        """Forget what is over."""
        for no in tasks:
            self.futures.pop(no, None)
            self.runs.pop(no, None)
        self._let_go(tasks)

    def deliver(self, results: list[ClientResultRow]) -> None:
        """Settle what has a result."""
        self.has_begun = True
        pop = self.futures.pop
        for no, first, count, kind, payload in results:
            future = pop(no, None)
            if future is not None:
                future.set_result_ready(kind, payload)  # type: ignore[arg-type]
            else:
                run = self.runs[no]
                run.set_items_ready(first, count, kind, payload)  # type: ignore[arg-type]
                if run.is_over:
                    del self.runs[no]
        if self._kept:
            self._let_go([row[0] for row in results])

    def keep_output(self, no: int, lost: int, text: str) -> str:
        """Keep what a call has printed with its future. Return the call's name, "" if it has none."""
        future = self.futures.get(no)
        if future is None:
            return ""
        log = future._log
        if log is None:
            log = future._log = CallLog()
        log.add(lost, text)
        return future._call_name

    def cancel(self, items: list[tuple[int, int, int, Cause]]) -> None:
        """Settle what ends cancelled."""
        for no, first, count, cause in items:
            future = self.futures.pop(no, None)
            if future is None:
                self.runs[no].set_items_cancelled(first, count)
            else:
                future.set_cancel_confirmed(CancelOutcome[cause])
                self._kept.pop(no, None)

    def refuse(self, tasks: list[int]) -> None:
        """Tell those whose cancels have failed."""
        for no in tasks:
            future = self.futures.get(no)
            if future is not None:
                future.set_cancel_confirmed(CancelOutcome.FAILED)

    def run(self, tasks: list[int]) -> None:
        """Note which have been seen running."""
        self.has_begun = True
        for no in tasks:
            future = self.futures.get(no) or self.runs.get(no)
            if future is not None:
                future.set_running()

    def lose(self, tasks: list[int], reason: str) -> None:
        """Settle what is lost with the scheduler."""
        killed = msgspec.msgpack.encode(DeathReport("the user killed the workers")) if self.is_killed else b""
        for no in tasks:
            future = self.futures.pop(no, None)
            if future is not None:
                if not self.is_killed:
                    future.set_result_ready(LOST, reason)
                elif future.running():
                    future.set_result_ready(ResultKind.DIED, killed)
                else:
                    future.set_cancel_confirmed(CancelOutcome.CANCELED)
            else:
                run = self.runs.pop(no, None)
                if run is not None and self.is_killed:
                    run.set_items_ready(REST, 0, ResultKind.DIED, killed)
                elif run is not None:
                    run.set_items_ready(REST, 0, LOST, reason)
        self._let_go(tasks)
