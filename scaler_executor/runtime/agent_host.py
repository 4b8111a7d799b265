"""`scaler-executor serve --join`: the agent of a machine that has joined a cluster.

`AgentHost` is its process. It ends when it is told to, by a signal; until then it connects again whenever it has to.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from scaler_executor.protocol import agent as agent_protocol
from scaler_executor.protocol import link
from scaler_executor.protocol.codec import Decoder
from scaler_executor.protocol.messages import Bye, Hello, Message, RefusalKind, Refused, ToAgentMessage
from scaler_executor.runtime.agent import AgentRuntime
from scaler_executor.runtime.dialer import Dialer
from scaler_executor.runtime.hosting import CLIENT_LEASE_S, EXIT_STOPPED, Workers, python_version, watch_ends
from scaler_executor.runtime.loop import Loop
from scaler_executor.runtime.process import collect_rarely
from scaler_executor.runtime.security import Connection


class AgentHost:
    """The agent of a machine that has joined a cluster.

    Args:
        connection: Of the cluster.
        workers: Of this machine.
        name: As which the cluster knows it.
        grace_s: What runs when it is told to end may run on for so long.
        say: Takes a line for the person who started it.
    """

    def __init__(
        self, connection: Connection, workers: Workers, name: str, grace_s: float, say: Callable[[str], None]
    ) -> None:
        assert workers.control is not None
        self.loop = Loop()
        self._workers = workers
        self._name = name
        self._grace_s = grace_s
        self._say = say
        self._address = connection.address
        self._decode: Callable[[Any, list[Any]], Any] = Decoder[Any](ToAgentMessage).decode
        self._dialer = Dialer(
            self.loop,
            connection.address,
            connection.keys,
            connection.server_key,
            self._on_message,
            self._on_lost,
            self._on_failed,
            lease_s=CLIENT_LEASE_S,
        )
        self._agent = AgentRuntime(
            agent_protocol.AgentState(workers.count),
            self.loop,
            workers.control,
            send=self._dialer_send,
            upstream_bytes=self._upstream_bytes,
            restart_forker=workers.start_forker,
            inherits=False,
            is_ending=lambda: False,
            on_drained=self._on_drained,
        )
        self._dialer.send(self._hello())
        self._is_up = False
        #: Since when it is not known that the scheduler hears this machine, as the agent has been told; None: it hears.
        self._unheard_since: float | None = self._dialer.session.link.proven_at
        #: Whether the reason why there is no connection has been said.
        self._said = ""
        watch_ends(self.loop, workers, self.drain, self.stop)
        self._end_by: float | None = None
        #: It was told to end: it drains, and then it has said Bye.
        self._is_leaving = self._has_left = False
        self.exit_code = 0

    def run(self) -> int:
        """Work. Return the exit code."""
        collect_rarely()
        self.loop.run(self._next_deadline, self._on_deadline, self._work, lambda: False)
        self._agent.close()
        self._dialer.close()
        self._workers.join()
        return self.exit_code

    def drain(self) -> None:
        """Take nothing more, hand back what has not started, finish what runs."""
        self._say(f"leaving: what runs may take another {self._grace_s:g} s; once more to stop it now")
        self._end_by = monotonic() + self._grace_s
        self._is_leaving = True
        self._agent.drain()

    def stop(self) -> None:
        """End now, whatever runs."""
        if self._agent.outstanding:
            self.exit_code = EXIT_STOPPED
        self._agent.close()
        if self._dialer.session.link.state == link.UP:
            self._dialer.send(Bye(force=True))
        self.loop.stop()

    def _hello(self) -> Hello:
        return Hello("agent", python=python_version(), name=self._name)

    def _dialer_send(self, message: Message) -> None:
        self._dialer.send(message)

    def _upstream_bytes(self) -> int:
        return self._dialer.pending_bytes

    def _work(self) -> None:
        while self._dialer.drain():
            pass
        self._agent.upstream_has_room()
        is_up = self._dialer.session.link.state == link.UP
        if is_up != self._is_up:
            self._is_up = is_up
            if is_up:
                self._said = ""
                self._say(f"connected to {self._address}")
        self._watch_link()
        if self._has_left and (self._dialer.is_idle or not is_up):
            self.loop.stop()

    def _watch_link(self) -> None:
        """Tell the agent whether the scheduler hears this machine: one that hears us no more may still be heard."""
        session_link = self._dialer.session.link
        now = monotonic()
        if session_link.state == link.UP and now < session_link.proven_at + link.SILENCE_S:
            if self._unheard_since is not None:
                self._unheard_since = None
                self._agent.handle(agent_protocol.SchedulerBack())
        elif self._unheard_since != session_link.proven_at:
            self._unheard_since = session_link.proven_at
            self._agent.handle(agent_protocol.SchedulerLost(now - session_link.proven_at))

    def _next_deadline(self) -> float | None:
        unheard_at = self._dialer.session.link.proven_at + link.SILENCE_S if self._unheard_since is None else None
        deadlines = (self._agent.next_deadline(), self._dialer.next_deadline(), self._end_by, unheard_at)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _on_deadline(self) -> None:
        if self._end_by is not None and self._end_by <= monotonic():
            self._end_by = None
            self.stop()
        self._dialer.on_deadline()
        self._agent.handle(agent_protocol.Tick())

    def _on_message(self, header: Any, frames: list[Any]) -> None:
        message = self._decode(header, frames)
        if isinstance(message, Refused):
            self._say(f"the cluster does not want it: {message.reason}")
            if message.kind != RefusalKind.UNREACHABLE:
                self.exit_code = EXIT_STOPPED
                self.loop.stop()
            return
        self._agent.handle(agent_protocol.Received(message))

    def _on_lost(self, reason: str) -> None:
        self._say(f"the cluster has forgotten this machine ({reason}); it joins again")
        self._is_up = False
        self._unheard_since = self._dialer.session.link.proven_at
        self._dialer.send(self._hello())  # before all that the agent has to say
        self._agent.handle(agent_protocol.NewEpoch())
        if self._is_leaving:
            self._agent.drain()

    def _on_failed(self, reason: str, is_refusal: bool) -> None:
        if self._said != reason:
            self._said = reason
            self._say(f"no connection to {self._address}: {reason}; it will be tried again")

    def _on_drained(self) -> None:
        self._has_left = self._is_leaving  # the agent has said Bye
