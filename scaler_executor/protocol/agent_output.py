"""What one event leads the agent to say and do: collected while the event is handled, and then made into messages.

One message to the scheduler carries all rows of a kind. This module knows in which order they must be sent, not why
any of them is.
"""

from __future__ import annotations

from typing import Any

from scaler_executor.protocol.agent_events import Drained, Fork, Instruction, Look, Send
from scaler_executor.protocol.messages import (
    AgentCapacity,
    AgentConfirm,
    AgentConfirmRow,
    AgentResult,
    AgentResultRow,
    Bye,
    DeathRow,
    SplitRow,
    TaskDied,
    TaskReturned,
    TaskRunning,
    TaskSplit,
    WorkersBroken,
)


class Joined(list[bytes]):
    """Results of consecutive items, joined when the batch is complete."""


class AgentOutput:
    """The outcome of the event that is being handled."""

    def __init__(self) -> None:
        #: When the event came.
        self.now = 0.0
        #: What is to be done, as far as it is known; the rows come after it.
        self.instructions: list[Instruction] = []
        #: What may be answered before the call that carries it out returns; so it must come last.
        self.late: list[Fork | Look] = []
        #: Rows of AgentResult, those of joined results still with `Joined` for payload. Always the same object: others
        #: keep it at hand.
        self.results: list[Any] = []
        self.confirms: list[AgentConfirmRow] = []
        self.splits: list[SplitRow] = []
        self.deaths: list[DeathRow] = []
        self.running: list[int] = []
        self.returned: list[tuple[int, int]] = []
        self.broken: list[WorkersBroken] = []
        #: The capacity that the scheduler knows of; 0: none.
        self.said_capacity = 0

    def begin(self, now: float) -> None:
        """Handle another event."""
        self.now = now
        self.instructions = []

    def end(self, capacity: int, workers: int, *, drained: bool) -> list[Instruction]:
        """Turn the rows into messages, splits before anything is said of their tails. Return all that is to be done,
        in order.

        Args:
            capacity: How many tasks the agent wants to hold now.
            workers: How many workers it may have.
            drained: This is the agent's last word.
        """
        instructions = self.instructions
        # First what keeps the scheduler from sending back at once what is handed back below.
        for news in self.broken:
            instructions.append(Send(news))
        self.broken.clear()
        said = self.said_capacity
        if capacity != said and (not said or not capacity or not (said / 1.5 < capacity < said * 1.5)):
            self.said_capacity = capacity
            instructions.append(Send(AgentCapacity(capacity, workers)))
        if self.splits:
            instructions.append(Send(TaskSplit(self.splits)))
            self.splits = []
        if self.running:
            instructions.append(Send(TaskRunning(self.running)))
            self.running = []
        if self.results:
            instructions.append(Send(AgentResult([_whole(row) for row in self.results])))
            self.results.clear()
        if self.confirms:
            instructions.append(Send(AgentConfirm(self.confirms)))
            self.confirms = []
        if self.deaths:
            instructions.append(Send(TaskDied(self.deaths)))
            self.deaths = []
        if self.returned:
            instructions.append(Send(TaskReturned(self.returned)))
            self.returned = []
        if drained:
            instructions += [Send(Bye()), Drained()]
        if self.late:
            instructions += self.late
            self.late = []
        return instructions

    def is_empty(self) -> bool:
        """Tell whether no rows wait to be sent, as between two events."""
        rows = (self.results, self.confirms, self.splits, self.deaths, self.running, self.returned)
        return not any(rows)


def _whole(row: Any) -> AgentResultRow:
    return (*row[:5], b"".join(row[5])) if type(row[5]) is Joined else row
