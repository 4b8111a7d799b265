"""`scaler-executor serve`: a scheduler for many clients and agents.

`SchedulerHost` is the process that clients and other machines' agents (`runtime.agent_host`) connect to; its own
workers, if it has some, are an agent like any other, in the same loop. It does not end with a client, but when it is
told to, by a signal.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from scaler_executor.protocol import agent as agent_protocol
from scaler_executor.protocol import scheduler as scheduler_protocol
from scaler_executor.protocol.codec import Decoder, RemoteProtocolError
from scaler_executor.protocol.messages import FromPeerMessage, Hello, Message, OperatorCancel, RefusalKind, Refused
from scaler_executor.runtime import log
from scaler_executor.runtime.agent import AgentRuntime
from scaler_executor.runtime.hosting import (
    AGENT_LEASE_S,
    CLIENT_LEASE_S,
    EXIT_STOPPED,
    LAST_WORDS_S,
    Workers,
    python_version,
    watch_ends,
)
from scaler_executor.runtime.listener import Listener, Peer
from scaler_executor.runtime.loop import Loop
from scaler_executor.runtime.process import collect_rarely
from scaler_executor.runtime.security import OWN_NAME, ClusterDirectory, Keys

#: The agent in the scheduler's process; peers of the listener count from 1.
LOCAL_AGENT: Final = 0
#: How often the allowed keys are looked at.
REREAD_S: Final = 0.5
#: A client's unfinished tasks may take so much here; what it submits beyond that waits on its own machine.
CLIENT_BYTES: Final = 1 << 30
#: A client to which more than this waits to be sent is given nothing more to run.
CONGESTED_BYTES: Final = 64 << 20
#: The agent stops reading results when so much waits to be sent.
UPSTREAM_BYTES: Final = 1 << 30


class SchedulerHost:
    """Serves clients and agents until it is told to end.

    Args:
        directory: Holds the keys.
        keys: The server's.
        address: Where to listen.
        workers: Of this machine.
        grace_s: What runs when it is told to end may run on for so long.
        say: Takes a line for the person who started it.

    Raises:
        zmq.ZMQError: It cannot listen there.
    """

    def __init__(
        self,
        directory: ClusterDirectory,
        keys: Keys,
        address: str,
        workers: Workers,
        grace_s: float,
        say: Callable[[str], None],
    ) -> None:
        self.loop = Loop()
        self._directory = directory
        self._workers = workers
        self._grace_s = grace_s
        self._say = say
        self._scheduler = scheduler_protocol.SchedulerState(python_version(), CLIENT_BYTES)
        self._decode: Callable[[Any, list[Any]], Any] = Decoder[Any](FromPeerMessage).decode
        self._to_agent: deque[Message] = deque()
        self._to_scheduler: deque[Message] = deque()
        self._peers: dict[int, Peer] = {}
        #: {peer: whether the scheduler has been told}: to whom too much waits to be sent.
        self._congested: dict[int, bool] = {}
        self.listener = Listener(
            self.loop, address, keys, directory.find_user, self._on_message, self._on_lost, CLIENT_LEASE_S
        )
        self._agent: AgentRuntime | None = None
        if workers.control is not None:
            self._agent = AgentRuntime(
                agent_protocol.AgentState(workers.count),
                self.loop,
                workers.control,
                send=self._to_scheduler.append,
                upstream_bytes=self._upstream_bytes,
                restart_forker=workers.start_forker,
                inherits=False,
                is_ending=lambda: False,
                on_drained=lambda: None,
            )
            self._to_scheduler.append(Hello("agent", python=python_version(), name=socket.gethostname()))
        self._reread_at = monotonic() + REREAD_S
        watch_ends(self.loop, workers, self.drain, self.stop)
        self._end_by: float | None = None
        self._is_ending = self._is_stopped = False
        #: When it ends, whether its last words have arrived or not.
        self._leave_by: float | None = None
        self.exit_code = 0

    def run(self) -> int:
        """Serve. Return the exit code."""
        collect_rarely()
        self.loop.run(self._next_deadline, self._on_deadline, self._work, lambda: False)
        if self._agent is not None:
            self._agent.close()
        self.listener.close()
        self._workers.join()
        return self.exit_code

    def drain(self) -> None:
        """Refuse what is new, hand back what has not started, finish what runs."""
        self._say(f"closing: what runs may take another {self._grace_s:g} s; once more to stop it now")
        self._end_by = monotonic() + self._grace_s
        self._is_ending = True
        self._feed(scheduler_protocol.Drain("the cluster is closing"))

    def stop(self) -> None:
        """End now, whatever runs."""
        if self._scheduler.outstanding:
            self.exit_code = EXIT_STOPPED
        if self._agent is not None:
            self._agent.close()
        self._is_stopped = self._is_ending = True
        self._leave()

    def _leave(self) -> None:
        """Say farewell, and end when that has arrived."""
        if self._leave_by is None:
            self._leave_by = monotonic() + LAST_WORDS_S
            for peer in list(self._peers.values()):
                self.listener.send(peer, Refused("the cluster has been closed", RefusalKind.UNREACHABLE))
        elif self._leave_by > monotonic() and not all(peer.is_idle for peer in self._peers.values()):
            return
        else:
            self.loop.stop()

    # The loop

    def _work(self) -> None:
        """Do all there is to do before the loop waits."""
        more = True
        while more:
            more = self.listener.drain()
            more = self._exchange() or more
            if self._congested:
                self._tell_congestion()
        if self._is_ending and (self._is_stopped or not self._scheduler.outstanding):
            self._leave()

    def _tell_congestion(self) -> None:
        """Tell the scheduler for which clients too much waits, and for which no more."""
        for number, is_told in list(self._congested.items()):
            peer = self._peers.get(number)
            if peer is None or peer.pending_bytes < CONGESTED_BYTES // 2:
                del self._congested[number]
                if is_told:
                    self._feed(scheduler_protocol.Congested(number, False))
            elif not is_told:
                self._congested[number] = True
                self._feed(scheduler_protocol.Congested(number, True))

    def _exchange(self) -> bool:
        """Pass messages between scheduler and local agent. Return whether there were any."""
        to_agent, to_scheduler = self._to_agent, self._to_scheduler
        any_passed = False
        while to_agent or to_scheduler:
            any_passed = True
            while to_scheduler:
                self._feed(scheduler_protocol.Received(LOCAL_AGENT, to_scheduler.popleft()))  # type: ignore[arg-type]
            while to_agent:
                assert self._agent is not None
                self._agent.handle(agent_protocol.Received(to_agent.popleft()))  # type: ignore[arg-type]
        return any_passed

    def _next_deadline(self) -> float | None:
        agent_deadline = self._agent.next_deadline() if self._agent is not None else None
        deadlines = (
            self._scheduler.next_deadline(),
            agent_deadline,
            self.listener.next_deadline(),
            self._end_by,
            self._leave_by,
            self._reread_at,
        )
        return min(deadline for deadline in deadlines if deadline is not None)

    def _on_deadline(self) -> None:
        now = monotonic()
        if self._end_by is not None and self._end_by <= now:
            self._end_by = None
            self.stop()
        if self._reread_at <= now:
            self._reread_at = now + REREAD_S
            self._shut_out()
        self.listener.on_deadline()
        if self._agent is not None:
            self._agent.handle(agent_protocol.Tick())
            self._agent.upstream_has_room()
        self._feed(scheduler_protocol.Tick())

    # Peers

    def _on_message(self, peer: Peer, header: Any, frames: list[Any]) -> None:
        try:
            message = self._decode(header, frames)
        except RemoteProtocolError as error:
            self._drop(peer, f"broke the protocol: {error}", is_error=True)
            return
        if peer.number not in self._peers:
            self._peers[peer.number] = peer
            if isinstance(message, Hello) and message.role == "agent":
                peer.link.lease_s = AGENT_LEASE_S
        if isinstance(message, OperatorCancel) and peer.user != OWN_NAME:
            reason = "only the user who serves may stop others' calls"
            self.listener.send(peer, Refused(reason, RefusalKind.KEY))
            self._drop(peer, reason, is_error=True)
            return
        self._feed(scheduler_protocol.Received(peer.number, message))

    def _on_lost(self, peer: Peer, reason: str) -> None:
        if self._peers.pop(peer.number, None) is not None:
            log.debug("serve", "session %d (%s) is over: %s", peer.number, peer.user, reason)
            unheard_s = monotonic() - peer.link.heard_at
            self._feed(scheduler_protocol.PeerLost(peer.number, reason, unheard_s=unheard_s))

    def _drop(self, peer: Peer, reason: str, is_error: bool) -> None:
        if is_error:
            log.warn("serve", "session %d (%s) is ended: %s", peer.number, peer.user, reason)
        self._peers.pop(peer.number, None)
        self.listener.close_peer(peer)
        if is_error:
            self._feed(scheduler_protocol.PeerLost(peer.number, reason))

    def _shut_out(self) -> None:
        """End the sessions of those whose key is not let in any more."""
        allowed = self._directory.reread()
        for peer in self.listener.peers:
            if peer.key not in allowed:
                self.listener.send(peer, Refused("its key has been revoked", RefusalKind.KEY))
                self._drop(peer, "its key has been revoked", is_error=True)

    def _feed(self, event: scheduler_protocol.Event) -> None:
        for instruction in self._scheduler.handle(event, monotonic()):
            if isinstance(instruction, scheduler_protocol.Send):
                if instruction.peer == LOCAL_AGENT:
                    self._to_agent.append(instruction.message)
                else:
                    peer = self._peers.get(instruction.peer)
                    if peer is not None:
                        self.listener.send(peer, instruction.message)
                        if peer.pending_bytes > CONGESTED_BYTES:
                            self._congested.setdefault(peer.number, False)
            elif isinstance(instruction, scheduler_protocol.Hold):
                peer = self._peers.get(instruction.peer)
                if peer is not None:
                    self.listener.hold(peer, instruction.is_held)
            elif instruction.peer == LOCAL_AGENT:
                if instruction.error:
                    raise AssertionError(f"bug: scheduler and agent disagree: {instruction.reason}")
            else:
                peer = self._peers.pop(instruction.peer, None)
                if peer is not None:
                    if instruction.error:
                        log.warn("serve", "session %d (%s): %s", peer.number, peer.user, instruction.reason)
                    self.listener.close_peer(peer)

    def _upstream_bytes(self) -> int:
        # One that takes nothing cannot stop the others.
        waiting = sum(min(peer.pending_bytes, CONGESTED_BYTES) for peer in self._peers.values())
        return waiting if waiting > UPSTREAM_BYTES else 0
