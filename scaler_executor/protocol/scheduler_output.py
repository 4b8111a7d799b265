"""What one event leads the scheduler to say: collected while the event is handled, and then made into messages.

One message to a peer carries all rows of a kind. This module knows in which order they must be sent, not why any of
them is.
"""

from __future__ import annotations

from scaler_executor.protocol.messages import (
    Blocked,
    ClientGone,
    Message,
    Nested,
    TaskCancel,
    TaskCancelConfirm,
    TaskResult,
    TaskRetried,
    TaskRun,
    TaskRunning,
)
from scaler_executor.protocol.scheduler_events import Instruction, Send
from scaler_executor.protocol.scheduler_rows import Agent, Client, Session


class SchedulerOutput:
    """The outcome of the event that is being handled."""

    def __init__(self) -> None:
        #: When the event came.
        self.now = 0.0
        #: What is to be done, as far as it is known; the rows that the peers hold come after it.
        self.instructions: list[Instruction] = []
        #: Peers that hold rows for a message, in order. Always the same object: others keep it at hand.
        self.touched: dict[Client | Agent, None] = {}

    def begin(self, now: float) -> None:
        """Handle another event."""
        self.now = now
        self.instructions = []

    def end(self) -> list[Instruction]:
        """Turn the rows into messages. Return all that is to be done, in order."""
        instructions = self.instructions
        for peer in self.touched:
            if isinstance(peer, Client):
                # Results first: a result and a later confirm of the same run must not overtake each other.
                if peer.results:
                    instructions.append(to_client(peer, TaskResult(peer.results)))
                    peer.results = []
                if peer.confirms:
                    instructions.append(to_client(peer, TaskCancelConfirm(peer.confirms)))
                    peer.confirms = []
                if peer.retried:
                    instructions.append(to_client(peer, TaskRetried(peer.retried)))
                    peer.retried = []
                if peer.running:
                    instructions.append(to_client(peer, TaskRunning(peer.running)))
                    peer.running = []
            else:
                self._end_agent(peer)
        self.touched.clear()
        return instructions

    def _end_agent(self, agent: Agent) -> None:
        # First that a client is gone: or workers would be ordered in the place of those that its cancels stop.
        for client_id in agent.gone_clients:
            self.instructions.append(Send(agent.peer, ClientGone(client_id)))
        agent.gone_clients = []
        for limit in agent.limits:
            self.instructions.append(Send(agent.peer, limit))
        agent.limits = []
        # Cancels before runs: a task that is cancelled in this step was assigned in an earlier one.
        if agent.cancels:
            self.instructions.append(Send(agent.peer, TaskCancel(agent.cancels)))
            agent.cancels = []
        if agent.forgotten:
            self.instructions.append(Send(agent.peer, TaskRun([], [], agent.forgotten)))
            agent.forgotten = []
        if agent.runs:
            forget = agent.known.trim()
            self.instructions.append(Send(agent.peer, TaskRun(agent.runs, agent.functions, forget)))
            agent.runs, agent.functions = [], []
        if agent.lent:
            # Behind the tasks: what is waited for is to have the slot.
            self.instructions.append(Send(agent.peer, Blocked(agent.lent)))
            agent.lent = []


def to_client(client: Client, message: Message) -> Send:
    """Return how to say something to a client: to a session through its agent."""
    if type(client) is Session:
        return Send(client.peer, Nested(client.worker_id, message))  # type: ignore[arg-type]
    return Send(client.peer, message)
