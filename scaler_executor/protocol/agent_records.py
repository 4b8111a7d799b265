"""What a worker says of the calls in its hands: the records in its result pipe, and what its page shows meanwhile.

It knows in which order a worker can say what, and takes one that breaks it for broken. It does not know what follows
for a call that is being cancelled or taken back: that is for `agent_calls`.
"""

from __future__ import annotations

from typing import Any

from scaler_executor.protocol.agent_calls import AgentCalls
from scaler_executor.protocol.agent_crew import Call, Crew, Worker
from scaler_executor.protocol.agent_events import Kill, Records, Seen
from scaler_executor.protocol.agent_hiring import Hiring
from scaler_executor.protocol.agent_output import AgentOutput, Joined
from scaler_executor.protocol.agent_timeouts import Timeouts
from scaler_executor.protocol.page import (
    RECORD_BATCH_END,
    RECORD_ERROR,
    RECORD_READY,
    RECORD_SKIPPED,
    RECORD_START_FAILED,
    RECORD_UNWOUND,
    RECORD_VALUE,
    RECORD_VALUES,
)


class RecordReader:
    """Reads what the workers of one agent write."""

    def __init__(self, crew: Crew, hiring: Hiring, calls: AgentCalls, timeouts: Timeouts, output: AgentOutput) -> None:
        self._crew = crew
        self._hiring = hiring
        self._calls = calls
        self._timeouts = timeouts
        self._output = output
        #: `output.results`, at hand because each result needs it.
        self._results = output.results

    def read(self, event: Records) -> None:
        """Take in what a worker wrote."""
        worker = self._crew.workers[event.worker_id]
        results, calls, ended = self._results, self._calls, self._calls.ended
        for kind, seq, item, payload in event.records:
            if kind <= RECORD_ERROR:
                worker.heard_seq = max(worker.heard_seq, seq)
                call = self._head(worker, seq)
                if call is None:
                    continue
                if call.items == 1:
                    # The common case, and the one that has to be short.
                    results.append((call.task_id, call.attempt, 0, 1, kind, payload))
                    ended(call)
                else:
                    self._item_result(call, call.given_from + item, kind, payload)
            elif kind == RECORD_VALUES:
                worker.heard_seq = max(worker.heard_seq, seq)
                call = self._head(worker, seq)
                if call is not None:
                    self._range_result(call, call.given_from + item, payload)
            elif kind == RECORD_BATCH_END:
                self._portion_done(worker, seq * 1e-9, item)
            elif kind == RECORD_READY:
                self._hiring.ready(worker)
            elif kind == RECORD_START_FAILED:
                if worker.state != "LEAVING":
                    calls.break_client(worker.client_id, bytes(payload).decode("utf-8", "replace"))
            elif kind in (RECORD_UNWOUND, RECORD_SKIPPED):
                worker.heard_seq = max(worker.heard_seq, seq)
                call = next((call for call in worker.held if call.seq == seq), None)
                if call is not None:
                    calls.step(call, "UNWOUND" if kind == RECORD_UNWOUND else "SKIPPED")
                if kind == RECORD_UNWOUND:
                    self._hiring.leave(worker)
                    calls.take_back_unstarted(worker)
            else:
                self._misbehaved(worker, f"record of kind {kind}")
        self._hiring.rest(worker)

    def _head(self, worker: Worker, seq: int) -> Call | None:
        """Return the call that a result with number `seq` is of; None: it has been answered for."""
        held = worker.held
        if held and held[0].seq == seq:
            return held[0]
        # What a freeze under way has taken back says nothing more, and the worker may have come to the calls behind it
        # before the forker's report is here.
        asked = worker.freeze or {}
        skips = False
        for call in held:
            if call.seq == seq:
                if not skips:
                    return call
                self._misbehaved(worker, f"result of call {seq} before that of {held[0].seq}")
            skips = skips or call.seq not in asked
        return None

    def _item_result(self, call: Call, item: int, kind: int, payload: Any) -> None:
        """Forward the result of one item of a run, joined to those before it in this batch where they are plain."""
        if item != call.start:
            worker = call.worker
            assert worker is not None
            if item > call.start:
                self._misbehaved(worker, f"result of item {item}, expected {call.start}")
            return  # an item that has been taken back cannot have started, so this is one that is answered
        results = self._results
        last = results[-1] if results else None
        if (
            last is not None
            and last[0] == call.task_id
            and kind == RECORD_VALUE == last[4]
            and type(payload) is bytes
            and type(last[5]) is Joined
        ):
            last[5].append(payload)
            results[-1] = (last[0], last[1], last[2], last[3] + 1, RECORD_VALUE, last[5])
        elif kind == RECORD_VALUE and type(payload) is bytes:
            results.append((call.task_id, call.attempt, item, 1, kind, Joined([payload])))
        else:
            results.append((call.task_id, call.attempt, item, 1, kind, payload))
        call.start = item + 1
        if call.start == call.items:
            self._calls.ended(call)

    def _range_result(self, call: Call, item: int, payload: Any) -> None:
        """Forward the values of consecutive items of a run."""
        count = int.from_bytes(payload[:4], "little")
        if item < call.start:
            return  # they were taken from the page of a worker that died while it wrote them into the pipe
        if item > call.start or not 0 < count <= call.open_items:
            assert call.worker is not None
            self._misbehaved(call.worker, f"results of items {item}+{count}, expected {call.start} of {call.items}")
            return
        self._results.append((call.task_id, call.attempt, item, count, RECORD_VALUE, payload[4:]))
        call.start = item + count
        if call.start == call.items:
            self._calls.ended(call)

    def _portion_done(self, worker: Worker, seconds: float, items: int) -> None:
        if not worker.portions:
            self._misbehaved(worker, "end of a portion that it was not given")
            return
        function, calls, expected_s = worker.portions.popleft()
        worker.load_s = max(0.0, worker.load_s - expected_s) if worker.portions else 0.0
        worker.portion_since = self._output.now
        worker.client.has_worked = True
        if self._hiring.unused_deaths:
            self._hiring.unused_deaths.pop(worker.client_id, None)
        if items:
            function.measured(seconds / items)
            self._crew.measured_task(seconds / calls)

    def seen(self, event: Seen) -> None:
        """Take in what the page of a worker said."""
        worker = self._crew.workers.get(event.worker_id)
        if worker is None or not worker.held:
            return
        head = worker.held[0]
        if head.seq != event.current or event.done >= event.current:
            return
        if head.state == "HELD":
            head.state = "RUNNING"
            self._output.running.append(head.task_id)
            self._timeouts.seen_running(head)

    def _misbehaved(self, worker: Worker, what: str) -> None:
        """A worker said what it cannot have meant: user code has written over our memory or descriptors. It is no use
        any more."""
        self._calls.story.add(self._output.now, worker.worker_id, "misbehaved", worker.state, "LEAVING", what)
        self._hiring.leave(worker)
        self._output.instructions.append(Kill(worker.worker_id))
