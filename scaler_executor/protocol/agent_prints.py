"""What workers print, on its way to the scheduler: whole lines, and never more than a client may have sent in a time.

It knows which call printed what and how much of it goes on. It does not know how it was read, nor who shows it.

A line is held until its end is here, unless its call has flushed it or is over. What a client's calls print beyond
their budget waits here, of each worker the end of it; what was before that is dropped and counted. So it is dropped
from the middle: the begin of it has been sent, and the end is sent when there is budget again, or the call is over.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from scaler_executor.protocol.agent_calls import AgentCalls
from scaler_executor.protocol.agent_crew import Call, Crew, Worker
from scaler_executor.protocol.agent_events import Printed, Send
from scaler_executor.protocol.agent_output import AgentOutput
from scaler_executor.protocol.messages import CLIENT_ID_SHIFT, Output, OutputRow
from scaler_executor.protocol.printed import FLUSHED, LOG, MAX_LOST, count_lines

#: Of each client: so much at once, and then so much a second.
BURST_BYTES: Final = 4 << 20
RATE_BYTES: Final = 1 << 20
#: Of each worker so much waits for budget.
KEPT_BYTES: Final = 1 << 16
#: Of what waits when its call ends, so much is sent without budget, until the client owes as much as a burst.
LAST_BYTES: Final = 1 << 12
#: A line that is longer is sent in parts.
MAX_LINE_BYTES: Final = 1 << 14
#: What a row takes besides its data.
_ROW_BYTES: Final = 64


class Budget:
    """A token bucket of bytes, which may be overdrawn."""

    def __init__(self, now: float) -> None:
        self._bytes: float = BURST_BYTES
        self._at = now

    def left(self, now: float) -> float:
        """Return how much may be sent now; negative: it is overdrawn."""
        self._bytes = min(BURST_BYTES, self._bytes + (now - self._at) * RATE_BYTES)
        self._at = now
        return self._bytes

    def spend(self, count: int) -> None:
        """Take note of what is sent."""
        self._bytes -= count

    def due_at(self) -> float:
        """Return when something may be sent again, if nothing may be now."""
        return self._at + (1 - self._bytes) / RATE_BYTES


class _Pending:
    """What one worker has printed and what has not been sent: rows, oldest first, and begins of lines by stream."""

    def __init__(self) -> None:
        self.rows: deque[OutputRow] = deque()
        self.size = 0
        self.lines: dict[int, tuple[int, bytes]] = {}

    def add(self, row: OutputRow) -> None:
        rows = self.rows
        task_id, stream, lost, data = row
        if rows and not lost and stream != LOG and rows[-1][:2] == (task_id, stream):
            last = rows[-1]
            if len(last[3]) + len(data) <= MAX_LINE_BYTES:
                rows[-1] = (task_id, stream, last[2], last[3] + data)
                self.size += len(data)
                return
        rows.append(row)
        self.size += len(data) + _ROW_BYTES

    def end_line(self, stream: int) -> None:
        """Let the begin of a line go as it is."""
        begun = self.lines.pop(stream, None)
        if begun is not None:
            self.add((begun[0], stream, 0, begun[1]))

    def trim(self, max_bytes: float) -> None:
        """Drop the oldest data until the rest takes no more than this; of each call the number of lines stays."""
        dropped: deque[OutputRow] = deque()
        rows = self.rows
        while rows and self.size > max_bytes:
            task_id, stream, lost, data = rows.popleft()
            # Of the last row to be cut the end is left, from the begin of a line.
            at = 0 if stream == LOG else data.find(b"\n", int(self.size - max_bytes)) + 1
            at = at or len(data)
            lost += (1 if data else 0) if stream == LOG else count_lines(data[:at])
            if dropped and dropped[-1][0] == task_id:
                lost += dropped.pop()[2]
            self.size -= at
            if at < len(data):
                rows.appendleft((task_id, stream, min(lost, MAX_LOST), data[at:]))
            else:
                dropped.append((task_id, stream, min(lost, MAX_LOST), b""))
                self.size -= _ROW_BYTES
        rows.extendleft(reversed(dropped))
        self.size += len(dropped) * _ROW_BYTES


class Prints:
    """What the workers of one agent have printed."""

    def __init__(self, crew: Crew, calls: AgentCalls, output: AgentOutput) -> None:
        self._crew = crew
        self._calls = calls
        self._output = output
        #: {worker_id: what waits}. Empty while nothing is printed: then nothing of this takes any time.
        self.pending: dict[int, _Pending] = {}
        #: {client_id: Budget} of those that have printed.
        self._budgets: dict[int, Budget] = {}

    def add(self, event: Printed) -> None:
        """Take in what a worker has printed."""
        worker = self._crew.workers.get(event.worker_id)
        if worker is None:
            return
        pending = self.pending.get(event.worker_id)
        if pending is None:
            pending = self.pending[event.worker_id] = _Pending()
        for seq, kind, lost, data in event.rows:
            stream = kind & ~FLUSHED
            task_id = _task_of(worker, seq)
            begun = pending.lines.get(stream)
            if begun is not None and (begun[0] != task_id or lost):
                pending.end_line(stream)
                begun = None
            if lost:
                pending.add((task_id, stream, lost, b""))
            if stream == LOG:
                pending.add((task_id, stream, 0, data))
                continue
            if begun is not None:
                data = begun[1] + data
                del pending.lines[stream]
            end = len(data) if kind & FLUSHED else data.rfind(b"\n") + 1
            if len(data) - end > MAX_LINE_BYTES:
                end = _whole_characters(data)
            if end:
                pending.add((task_id, stream, 0, data[:end]))
            if end < len(data):
                pending.lines[stream] = (task_id, data[end:])
        if pending.size > KEPT_BYTES + _allowance(self._budget(worker), self._output.now):
            pending.trim(KEPT_BYTES + _allowance(self._budget(worker), self._output.now))

    def send_due(self) -> None:
        """Send what there is budget for."""
        for worker_id, pending in list(self.pending.items()):
            worker = self._crew.workers.get(worker_id)
            if worker is None:
                del self.pending[worker_id]
                continue
            budget = self._budget(worker)
            rows: list[OutputRow] = []
            left = budget.left(self._output.now)
            while pending.rows and left > 0:
                row = pending.rows.popleft()
                size = len(row[3]) + _ROW_BYTES
                pending.size -= size
                budget.spend(size)
                left -= size
                rows.append(row)
            self._send(rows)
            if not pending.rows and not pending.lines:
                del self.pending[worker_id]

    def finish(self, worker_id: int, *, is_gone: bool) -> None:
        """Send the end of what the calls of a worker have printed that are over by now, before that is said of them.

        Args:
            worker_id: Whose.
            is_gone: It is dead: all that it has printed.
        """
        pending = self.pending.get(worker_id)
        worker = self._crew.workers.get(worker_id)
        if pending is None or worker is None:
            return
        by_id = self._calls.by_id
        for stream, (task_id, _) in list(pending.lines.items()):
            if is_gone or task_id not in by_id:
                pending.end_line(stream)
        over = _Pending()
        count = len(pending.rows)
        while count and not is_gone and pending.rows[count - 1][0] in by_id:
            count -= 1
        for _ in range(count):
            row = pending.rows.popleft()
            over.rows.append(row)
            over.size += len(row[3]) + _ROW_BYTES
        pending.size -= over.size
        budget = self._budget(worker)
        left = budget.left(self._output.now)
        over.trim(max(left, LAST_BYTES if left > -BURST_BYTES else 0))
        budget.spend(over.size)
        self._send(list(over.rows))
        if not pending.rows and not pending.lines:
            del self.pending[worker_id]

    def due_at(self) -> float | None:
        """Return when `send_due` will have something to send, or None."""
        due = [
            self._budget(worker).due_at()
            for worker_id, pending in self.pending.items()
            if pending.rows and (worker := self._crew.workers.get(worker_id)) is not None
        ]
        return min(due, default=None)

    def forget_all(self) -> None:
        """Drop everything."""
        self.pending.clear()
        self._budgets.clear()

    def forget_client(self, client_id: int) -> None:
        """Forget what a client may have sent."""
        self._budgets.pop(client_id, None)

    def _budget(self, worker: Worker) -> Budget:
        budget = self._budgets.get(worker.client_id)
        if budget is None:
            budget = self._budgets[worker.client_id] = Budget(self._output.now)
        return budget

    def _send(self, rows: list[OutputRow]) -> None:
        if rows:
            # Before the rows of results and of confirms, which come last.
            self._output.instructions.append(Send(Output(rows)))


def _whole_characters(data: bytes) -> int:
    """Return how much of a text does not end within a character."""
    for back in range(1, 4):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the first of a character, which says how many there are
            return len(data) - back if byte >= 0xC0 and back < 2 + (byte >= 0xE0) + (byte >= 0xF0) else len(data)
    return len(data)


def _allowance(budget: Budget, now: float) -> float:
    return max(0.0, budget.left(now))


def _task_of(worker: Worker, seq: int) -> int:
    """Return the task that number `seq` is of; one with item number 0 if it is over, or was none."""
    call: Call | None = next((call for call in worker.held if call.seq == seq), None) if seq else None
    return worker.client_id << CLIENT_ID_SHIFT if call is None else call.task_id
