"""`scaler-executor serve`: a scheduler for many clients and agents, and the agent of a machine.

`SchedulerHost` is the process that clients and other machines' agents connect to; its own workers, if it has some, are
an agent like any other, in the same loop. `AgentHost` is the process of a machine that has joined. Neither ends with a
client: they end when they are told to, by a signal.

The forker is forked first, before there is a zmq context, whose threads and sockets it should not have.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Final

from scaler_executor.protocol import agent as agent_protocol
from scaler_executor.protocol import link
from scaler_executor.protocol import scheduler as scheduler_protocol
from scaler_executor.protocol.codec import Decoder, RemoteProtocolError
from scaler_executor.protocol.messages import (
    Bye,
    FromPeerMessage,
    Hello,
    Message,
    OperatorCancel,
    RefusalKind,
    Refused,
    ToAgentMessage,
)
from scaler_executor.runtime import log, platform
from scaler_executor.runtime.agent import AgentRuntime
from scaler_executor.runtime.forker_start import start_forker_by_fork
from scaler_executor.runtime.identity import Identity
from scaler_executor.runtime.loop import Loop
from scaler_executor.runtime.network import Dialer, Listener, Peer
from scaler_executor.runtime.security import OWN_NAME, ClusterDirectory, Connection, Keys
from scaler_executor.runtime.signals import watch_signals
from scaler_executor.runtime.worker_config import WorkerConfig

#: The agent in the scheduler's process; peers of the listener count from 1.
LOCAL_AGENT: Final = 0
#: Silence after which an agent counts as dead: it has stopped its calls by then.
AGENT_LEASE_S: Final = scheduler_protocol.FENCE_S
#: Silence after which a client's calls are dropped.
CLIENT_LEASE_S: Final = 60.0
#: How often the allowed keys are looked at.
REREAD_S: Final = 0.5
#: How long the last words may take to arrive.
LAST_WORDS_S: Final = 2.0
#: A client's unfinished tasks may take so much here; what it submits beyond that waits on its own machine.
CLIENT_BYTES: Final = 1 << 30
#: A client to which more than this waits to be sent is given nothing more to run.
CONGESTED_BYTES: Final = 64 << 20
#: The agent stops reading results when so much waits to be sent.
UPSTREAM_BYTES: Final = 1 << 30

EXIT_STOPPED: Final = 1


def python_version() -> str:
    """Return what two processes must have in common to read each other's pickles."""
    major, minor = sys.version_info[:2]
    free_threaded = "t" if "t" in getattr(sys, "abiflags", "") else ""
    return f"{major}.{minor}{free_threaded}"


class Workers:
    """The workers of this machine: the forker, and what starts another one in its place.

    Args:
        count: So many at once; 0: none.
        preload: Modules that workers find imported.
        name: Of the cluster, for whoever looks at the processes.
    """

    def __init__(self, count: int, preload: Sequence[str]) -> None:
        self.count = count
        self._preload = list(preload)
        self._pids: list[int] = []
        self.control = self.start_forker()

    def start_forker(self) -> socket.socket | None:
        """Fork the forker from this process."""
        if not self.count:
            return None
        config = WorkerConfig(
            sys_path=list(sys.path),
            argv=list(sys.argv[:1]),
            identity=Identity(parent_pid=os.getpid(), start_method="spawn", authkey=os.urandom(32)),
            preload=self._preload,
        )
        pid, control = start_forker_by_fork(config, [fd for fd in platform.open_descriptors() if fd > 2])
        self._pids.append(pid)
        return control

    def join(self) -> None:
        """Wait until the forkers have ended, which they do when they are let go."""
        deadline = monotonic() + LAST_WORDS_S
        for pid in self._pids:
            platform.has_child_ended(pid, max(0.0, deadline - monotonic()))


def _watch_ends(loop: Loop, drain: Callable[[], None], stop: Callable[[], None]) -> None:
    """Have the first SIGINT or SIGTERM drain, and the second one stop."""
    steps = iter([drain])
    watch_signals(loop, [signal.SIGINT, signal.SIGTERM], lambda: next(steps, stop)())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


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
        _watch_ends(self.loop, self.drain, self.stop)
        self._end_by: float | None = None
        self._is_ending = self._is_stopped = False
        #: When it ends, whether its last words have arrived or not.
        self._leave_by: float | None = None
        self.exit_code = 0

    def run(self) -> int:
        """Serve. Return the exit code."""
        gc.freeze()
        gc.set_threshold(200_000, 20, 100)
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
        _watch_ends(self.loop, self.drain, self.stop)
        self._end_by: float | None = None
        #: It was told to end: it drains, and then it has said Bye.
        self._is_leaving = self._has_left = False
        self.exit_code = 0

    def run(self) -> int:
        """Work. Return the exit code."""
        gc.freeze()
        gc.set_threshold(200_000, 20, 100)
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
        if self._is_leaving and not self._has_left:
            self._has_left = True
            self._dialer.send(Bye())


def raise_descriptor_limit() -> None:
    """Allow as many open files as may be: a worker costs four, a connection one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
