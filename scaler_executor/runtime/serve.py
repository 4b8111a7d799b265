"""The serve process: scheduler and agent in one loop, for the client that started it.

Started by `runtime.cluster` in a fresh interpreter, with one end of a pair to the client. The scheduler's link to the
agent is a queue in this process;
everything else is said through the same messages as between machines. It ends when the client says Bye, or is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections import deque
from time import monotonic
from typing import Any, Final, NoReturn

from scaler_executor.protocol import agent as agent_protocol
from scaler_executor.protocol import scheduler as scheduler_protocol
from scaler_executor.protocol.codec import Decoder, Encoder, RemoteProtocolError
from scaler_executor.protocol.messages import ClientMessage, Hello, Message
from scaler_executor.protocol.segment import Segment
from scaler_executor.runtime import cgroups, log, platform, surroundings
from scaler_executor.runtime.agent import AgentRuntime
from scaler_executor.runtime.loop import READABLE, WRITABLE, Loop
from scaler_executor.runtime.process import collect_rarely, raise_descriptor_limit
from scaler_executor.runtime.segments import SegmentStore, remove_tree
from scaler_executor.runtime.transport import StreamReader, StreamWriter

AGENT: Final = 0
CLIENT: Final = 1
#: This process writes no files of large payloads.
AGENT_WRITER: Final = -1
#: Without its client everything ends within this, whatever initializers, threads that calls have left, or calls that
#: defy their cancel still do.
ORPHAN_END_S: Final = 1.5
#: So long a forker may take to end its workers and itself.
FORKER_END_S: Final = 3.0
#: So long a client may take to end whose connection has ended.
CLIENT_END_S: Final = 0.5


class ClientPeer:
    """The connection to the client that started this process."""

    def __init__(self, sock: socket.socket, *, has_segments: bool) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.reader = StreamReader(sock)
        self.writer = StreamWriter(sock)
        self.encoder = Encoder()
        self.decoder: Decoder[Any] = Decoder(ClientMessage, Segment if has_segments else None)


class Server:
    """One scheduler, one agent, one client."""

    def __init__(self, sock: socket.socket, client_pidfd: int, control: socket.socket, config: dict[str, Any]) -> None:
        self._loop = Loop()
        self._config = config
        self._scheduler = scheduler_protocol.SchedulerState()
        self._client: ClientPeer | None = ClientPeer(sock, has_segments=config["segments_path"] is not None)
        self._client_pidfd = client_pidfd
        #: When everything ends that is still there, or None while the client lives.
        self._end_by: float | None = None
        #: When to ask next whether the client is still the parent, as a reserve; None: its pidfd is enough.
        self._parent_check_at = None if platform.RESERVE_S is None else monotonic()
        #: Messages on their way from the scheduler to the agent.
        self._to_agent: deque[Message] = deque()
        #: Messages on their way from the agent to the scheduler.
        self._to_scheduler: deque[Message] = deque()
        self._agent = AgentRuntime(
            agent_protocol.AgentState(
                config["max_workers"], config["max_tasks_per_child"], cancel_grace_s=config["cancel_grace_s"]
            ),
            self._loop,
            control,
            send=self._to_scheduler.append,
            upstream_bytes=self._upstream_bytes,
            inherits=config["start_method"] == "fork",
            restart_forker=lambda: _start_forker(config),
            is_ending=self._is_ending,
            on_drained=self._loop.stop,
            store=SegmentStore(config["segments_path"], AGENT_WRITER) if config["segments_path"] is not None else None,
        )
        #: Of cores that may be spun on: one alone is wanted by whoever is waited for.
        cpu_count = cgroups.cpu_count_usable()
        self._cpu_count = cpu_count if cpu_count > 1 else 0
        self._loop.watch(sock.fileno(), self._on_client)
        self._loop.watch(client_pidfd, self._client_died)
        self._feed_scheduler(scheduler_protocol.Received(AGENT, Hello("agent")))

    def run(self) -> None:
        """Serve until the client is gone and the workers are too."""
        self._loop.run(self._next_deadline, self._on_deadline, self._exchange, self._may_spin)
        self._agent.close()
        _wait_for_forkers()
        path = self._config["segments_path"]
        # One that dies closes its connection a little before it has ended.
        timeout_s = 0.0 if self._end_by is None else CLIENT_END_S
        if path is not None and platform.has_ended(self._client_pidfd, timeout_s):
            # Whoever holds its lock: a child that C code has forked, say.
            remove_tree(path)

    # Between scheduler and agent

    def _feed_scheduler(self, event: scheduler_protocol.Event) -> None:
        self._perform(self._scheduler.handle(event, monotonic()))

    def _exchange(self) -> None:
        """Pass messages between scheduler and agent until neither has more to say."""
        to_agent, to_scheduler = self._to_agent, self._to_scheduler
        while to_agent or to_scheduler:
            while to_scheduler:
                event = scheduler_protocol.Received(AGENT, to_scheduler.popleft())  # type: ignore[arg-type]
                self._perform(self._scheduler.handle(event, monotonic()))
            while to_agent:
                self._agent.handle(agent_protocol.Received(to_agent.popleft()))  # type: ignore[arg-type]

    def _perform(self, instructions: list[scheduler_protocol.Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, scheduler_protocol.Send):
                if instruction.peer == AGENT:
                    self._to_agent.append(instruction.message)
                else:
                    self._send_client(instruction.message)
            elif isinstance(instruction, scheduler_protocol.Hold):
                raise AssertionError("the only client has no limit")
            elif instruction.peer == CLIENT:
                if instruction.error:
                    log.error("serve", "the client is dropped: %s", instruction.reason)
                self._hang_up()
            elif instruction.error:
                raise AssertionError(f"bug: scheduler and agent disagree: {instruction.reason}")

    def _next_deadline(self) -> float | None:
        deadlines = (self._scheduler.next_deadline(), self._agent.next_deadline(), self._end_by, self._parent_check_at)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _on_deadline(self) -> None:
        if self._parent_check_at is not None and platform.RESERVE_S is not None:
            self._parent_check_at = monotonic() + platform.RESERVE_S
            if os.getppid() != self._config["client_pid"]:
                self._client_died()
        if self._end_by is not None and self._end_by <= monotonic():
            self._loop.stop()  # the forker is let go, and kills what is left
        self._agent.handle(agent_protocol.Tick())
        self._feed_scheduler(scheduler_protocol.Tick())

    def _may_spin(self) -> bool:
        """Tell whether fewer cores are wanted than there are."""
        return self._agent.outstanding < self._cpu_count

    # The client

    def _on_client(self) -> None:
        client = self._client
        if client is None:
            return
        try:
            for header, frames in client.reader.read():
                message = client.decoder.decode(header, frames)
                self._feed_scheduler(scheduler_protocol.Received(CLIENT, message))
        except RemoteProtocolError as error:
            log.error("serve", "the client broke the protocol: %s", error)
            self._client_gone("broke the protocol")
            return
        if client.reader.eof:
            self._client_gone("closed the connection")
        elif client.writer.pending_bytes:
            self._flush_client()

    def _send_client(self, message: Message) -> None:
        client = self._client
        if client is None:
            return
        try:
            if not client.writer.send(client.encoder.pack(message)):
                self._loop.watch(client.socket.fileno(), self._on_client, READABLE | WRITABLE)
        except ConnectionError:
            pass  # noticed by its pidfd, or by end-of-file

    def _flush_client(self) -> None:
        client = self._client
        assert client is not None
        try:
            if client.writer.flush():
                self._loop.watch(client.socket.fileno(), self._on_client, READABLE)
        except ConnectionError:
            return
        self._agent.upstream_has_room()

    def _upstream_bytes(self) -> int:
        return 0 if self._client is None else self._client.writer.pending_bytes

    def _client_died(self) -> None:
        self._loop.forget(self._client_pidfd)
        self._client_gone("its process has ended")

    def _client_gone(self, reason: str) -> None:
        if self._end_by is None:
            self._end_by = monotonic() + ORPHAN_END_S
        if self._client is not None:
            self._hang_up()
            self._feed_scheduler(scheduler_protocol.PeerLost(CLIENT, reason, stopped=True))

    def _hang_up(self) -> None:
        """The client's part is over: nothing more is read or said, and the agent ends when its calls do."""
        client = self._client
        if client is None:
            return
        self._client = None
        self._loop.forget(client.socket.fileno())
        client.socket.close()
        self._agent.drain()

    def _is_ending(self) -> bool:
        """Tell whether the client has gone: the loss of the forker may be noticed first."""
        if self._client is None:
            return True
        return platform.has_ended(self._client_pidfd)


def _start_forker(config: dict[str, Any]) -> socket.socket | None:
    """Fork the forker from this process, which is single-threaded and has imported nothing of the user's."""
    from scaler_executor.runtime.forker_start import start_forker_by_fork
    from scaler_executor.runtime.identity import Identity
    from scaler_executor.runtime.worker_config import WorkerConfig

    if config["start_method"] == "fork" and config["has_initializer"]:
        return None  # the initializer lived in the forker that is gone
    descriptors = config["initargs_fds"]
    worker_config = WorkerConfig(
        workers=config["max_workers"],
        initializer_pickle=config["initializer_pickle"],
        definitions=config["definitions"],
        sys_path=config["sys_path"],
        cwd=config["cwd"],
        argv=config["argv"],
        blocked_signals=config["blocked_signals"],
        descriptors=descriptors,
        segments_path=config["segments_path"],
        token=config["token"],
        taken_streams=config["taken_streams"],
        passes_on_logs=2 in config["taken_streams"],
        log_levels=config["log_levels"],
        identity=Identity(
            parent_pid=config["client_pid"],
            parent_fd=config["client_pidfd"] if platform.PORTABLE else -1,
            start_method=config["start_method"],
            authkey=config["authkey"],
            # The last one, see `cluster`.
            tracker_fd=descriptors[-1] if config["has_tracker"] else None,
        ),
    )
    # Nothing of this process is the workers': with its end of the client's pair they could speak for the scheduler.
    inherited = {*descriptors, worker_config.identity.parent_fd}
    not_inherited = [fd for fd in platform.open_descriptors() if fd not in inherited]
    pid, control = start_forker_by_fork(worker_config, not_inherited)
    _forkers.append(pid)
    return control


#: Forkers of this process that have not been reaped.
_forkers: list[int] = []


def _wait_for_forkers() -> None:
    """Wait until they have ended, which they do when they are let go: or they would outlive this process a little."""
    deadline = monotonic() + FORKER_END_S
    for pid in _forkers:
        platform.has_child_ended(pid, max(0.0, deadline - monotonic()))


def _receive_descriptors(config_socket: socket.socket, count: int) -> list[int]:
    return list(socket.recv_fds(config_socket, 1, count)[1]) if count else []


def main(config: dict[str, Any]) -> NoReturn:
    """Serve one client.

    Args:
        config: See `cluster.EmbeddedCluster`, which makes it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    platform.hold_lifeline(config["lifeline_fd"])
    surroundings.apply(config["surroundings"], config["environment"])
    with socket.socket(fileno=config["config_fd"]) as config_socket:
        config["initargs_fds"] = _receive_descriptors(config_socket, config["descriptors"])
    control_fd = config["control_fd"]
    control = socket.socket(fileno=control_fd) if control_fd is not None else _start_forker(config)
    assert control is not None
    raise_descriptor_limit()  # after the fork of the forker, for the limit of workers is the user's
    collect_rarely()
    server = Server(socket.socket(fileno=config["socket_fd"]), config["client_pidfd"], control, config)
    try:
        server.run()
    except BaseException:
        # A bug of ours: the client is told by our exit status, and the forker by our end, which stops the workers.
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
    os._exit(0)
