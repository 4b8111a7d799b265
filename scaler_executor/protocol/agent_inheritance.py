"""What an agent's workers lack since the forker that they inherited their client's process from was lost.

Calls that were made before then count on what was inherited. So each client is asked for it, when a worker for it is
first wanted; it is waited for before one is ordered; and each of its workers is sent its answer with the first call.
What the definitions are, and which calls need them, this module does not know.

A client is in one of these states, in which `may_start` and `replaced` are all that happens:

                  may_start                replaced
inherits          yes                      protocol error
to be asked       no, ask: -> asked        protocol error
asked             no                       -> answered
answered          yes                      protocol error

`lost` takes the clients that inherit to "to be asked" and leaves the others where they are: what was lost once is not
there to be lost again.
"""

from __future__ import annotations

from scaler_executor.protocol.agent_events import Send
from scaler_executor.protocol.agent_output import AgentOutput
from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.messages import Function, InheritanceLost


class Inheritance:
    """What replaces the inheritance, for each client."""

    def __init__(self, output: AgentOutput) -> None:
        self._output = output
        #: Why nothing is inherited; None: everything is.
        self._reason: str | None = None
        #: {client_id: definitions}, None: asked for. Those that are to be asked are not in here.
        self._definitions: dict[int, list[Function] | None] = {}

    def lost(self, reason: str) -> None:
        """Workers inherit nothing from now on."""
        self._reason = self._reason or reason

    def may_start(self, client_id: int) -> bool:
        """Tell whether a worker for this client may be ordered: it is, or has, all that calls count on."""
        if self._reason is None or self._definitions.get(client_id) is not None:
            return True
        if client_id not in self._definitions:
            self._definitions[client_id] = None
            self._output.instructions.append(Send(InheritanceLost(client_id, self._reason)))
        return False

    def replaced(self, client_id: int, definitions: list[Function]) -> None:
        """Take the answer of a client."""
        if client_id not in self._definitions or self._definitions[client_id] is not None:
            raise RemoteProtocolError(f"client {client_id} was not asked what its workers inherited")
        self._definitions[client_id] = definitions

    def definitions(self, client_id: int) -> list[Function]:
        """Return what a worker of this client is to be sent with its first call."""
        return self._definitions.get(client_id) or []

    def client_gone(self, client_id: int) -> None:
        """Nothing of this client is needed any more."""
        self._definitions.pop(client_id, None)

    def forget_all(self) -> None:
        """Forget all clients: their numbers may come again and mean others."""
        self._definitions.clear()
