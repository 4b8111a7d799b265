"""When a call has run for as long as it may.

The time counts from when a call was first seen in progress, which is some milliseconds after it began. This module
knows which calls with a timeout run, and nothing of how one is stopped: that is for `agent_calls`.
"""

from __future__ import annotations

from typing import Final

from scaler_executor.protocol.agent_crew import Call
from scaler_executor.protocol.agent_output import AgentOutput

#: Nobody waits for a timeout that is longer than this: 30 years.
MAX_TIMEOUT_S: Final = 1e9


class Timeouts:
    """The timeouts of the calls that run at one agent."""

    def __init__(self, output: AgentOutput) -> None:
        self._output = output
        #: {worker_id: the call with a timeout that was last seen running there}; it may be over by now.
        self.running: dict[int, Call] = {}

    def deadlines(self) -> list[float]:
        """Return when `take_due` may find something."""
        return [call.timeout_due for call in self.running.values()]

    def seen_running(self, call: Call) -> None:
        """The call has been seen in progress for the first time."""
        timeout_s = call.function.function.options.timeout_s
        if timeout_s is not None and timeout_s <= MAX_TIMEOUT_S:
            assert call.worker is not None
            call.timeout_due = self._output.now + timeout_s
            self.running[call.worker.worker_id] = call

    def take_due(self) -> list[Call]:
        """Return the calls that have run for as long as they may, once."""
        due = [(worker_id, call) for worker_id, call in self.running.items() if call.timeout_due <= self._output.now]
        for worker_id, _ in due:
            del self.running[worker_id]
        return [call for _, call in due]

    def exited(self, worker_id: int) -> None:
        """The worker is gone."""
        self.running.pop(worker_id, None)
