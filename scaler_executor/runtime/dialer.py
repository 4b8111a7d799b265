"""The end of a session that connects, see `network`, and connects again for as long as it is wanted."""

from __future__ import annotations

import random
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from scaler_executor.protocol import link
from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.messages import Message
from scaler_executor.runtime.loop import Loop
from scaler_executor.runtime.network import HANDSHAKE_S, TURN_MESSAGES, Session, nothing, read_frame, set_options
from scaler_executor.runtime.security import Keys

#: Pauses between attempts to connect: at first, at most. Each is drawn at random up to its length.
RECONNECT_S: Final = 0.1
MAX_RECONNECT_S: Final = 5.0
#: For so long after the other end was last heard, when an agent's calls may still be saved, attempts are short and
#: follow each other closely: connecting, the handshake and the pause take at most so long.
HURRY_S: Final = 12.0
HURRIED_CONNECT_S: Final = 0.7
HURRIED_HANDSHAKE_S: Final = 2.0
HURRIED_RECONNECT_S: Final = 0.2
_FAILED: Final = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_CLOSE_FAILED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Dialer:
    """The end of a session that connects, and connects again for as long as it is wanted.

    Args:
        loop: Wakes up when something is to be read.
        address: "tcp://HOST:PORT".
        keys: This end's.
        server_key: The listener's public key.
        on_message: Takes header and frames of each message.
        on_lost: Takes the reason when a session is over. Another one has begun then, which the listener does not know
            from the last.
        on_failed: Takes the reason when an attempt to connect has failed, and whether the listener has refused the key
            or has another one itself.
        lease_s: Silence after which a session is over.
    """

    def __init__(
        self,
        loop: Loop,
        address: str,
        keys: Keys,
        server_key: bytes,
        on_message: Callable[[Any, list[Any]], None],
        on_lost: Callable[[str], None],
        on_failed: Callable[[str, bool], None],
        lease_s: float,
    ) -> None:
        self._loop = loop
        self._address = address
        self._keys = keys
        self._server_key = server_key
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_failed = on_failed
        self._lease_s = lease_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        #: The handshake of the current transport is through.
        self._is_connected = False
        #: Failed attempts since the last handshake, and those of them that ended within the handshake.
        self._failures = 0
        self._refusals = 0
        self._retry_at: float | None = None
        self.session = Session(True, lease_s, self._transmit)
        self._connect()

    def drain(self) -> bool:
        """Read what has come, at most a turn's worth. Return whether there may be more."""
        self._read_monitor()
        for _ in range(TURN_MESSAGES):
            if self._socket is None:
                return False
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self._read_monitor()
                return False
            try:
                frame = read_frame(parts)
                self._feed(link.Arrived(frame))
            except RemoteProtocolError as error:
                self._begin_anew(f"it broke the protocol: {error}")
        return True

    def next_deadline(self) -> float | None:
        """Return when `on_deadline` is to be called, or None."""
        due = self.session.link.next_deadline()
        if self._retry_at is None or due is None:
            return due if self._retry_at is None else self._retry_at
        return min(due, self._retry_at)

    def on_deadline(self) -> None:
        """Do what is due."""
        while self.drain():
            pass  # what came while this process was busy counts
        if self._retry_at is not None and self._retry_at <= monotonic():
            self._connect()
        self._feed(link.Tick())

    def send(self, message: Message) -> None:
        """Have a message sent, now or when there is a connection."""
        self.session.send(message)
        self._settle()

    def forward(self, header: Any, frames: list[Any], decode: Callable[[Any, list[Any]], Message]) -> None:
        """Have an encoded message sent, see `Session.forward`."""
        self.session.forward(header, frames, decode)
        self._settle()

    @property
    def pending_bytes(self) -> int:
        """What waits to be sent."""
        return self.session.pending_bytes

    @property
    def is_idle(self) -> bool:
        """Whether everything that was sent has arrived."""
        return self.session.is_idle

    def renew(self) -> None:
        """Begin another session."""
        self._disconnect()
        self.session = Session(True, self._lease_s, self._transmit)
        self._retry_at = monotonic()

    def close(self) -> None:
        """Let go of the connection. What has been handed to zmq is given a moment to leave."""
        self._retry_at = None
        if self._socket is not None:
            self._socket.linger = 500
        self._disconnect()
        self._context.term()

    @property
    def _is_in_hurry(self) -> bool:
        link = self.session.link
        return link.is_established and monotonic() < link.heard_at + HURRY_S

    def _connect(self) -> None:
        self._retry_at = None
        sock = self._socket = self._context.socket(zmq.DEALER)
        set_options(sock, self._keys)
        sock.curve_serverkey = self._server_key
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        connect_s, handshake_s = HANDSHAKE_S, HANDSHAKE_S
        if self._is_in_hurry:
            connect_s, handshake_s = HURRIED_CONNECT_S, HURRIED_HANDSHAKE_S
        sock.setsockopt(zmq.CONNECT_TIMEOUT, int(connect_s * 1000))
        sock.setsockopt(zmq.HANDSHAKE_IVL, int(handshake_s * 1000))
        sock.setsockopt(zmq.IPV6, int("[" in self._address))
        self._monitor = sock.get_monitor_socket()
        for each in (sock, self._monitor):
            self._loop.watch(each.getsockopt(zmq.FD), nothing)  # type: ignore[arg-type]
        sock.connect(self._address)

    def _disconnect(self) -> None:
        sock, monitor = self._socket, self._monitor
        self._socket = self._monitor = None
        self._is_connected = False
        if sock is not None and monitor is not None:
            for each in (sock, monitor):
                self._loop.forget(each.getsockopt(zmq.FD))  # type: ignore[arg-type]
            sock.disable_monitor()
            monitor.close()
            sock.close()

    def _read_monitor(self) -> None:
        while self._monitor is not None:
            try:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            kind = event["event"]
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_connected = True
                self._failures = self._refusals = 0
                self._feed(link.Connected())
            elif kind & _FAILED:
                self._failed(kind)

    def _failed(self, kind: int) -> None:
        """The transport has ended, or was never there."""
        was_connected = self._is_connected
        self._disconnect()
        self._failures += 1
        longest_s = HURRIED_RECONNECT_S if self._is_in_hurry else MAX_RECONNECT_S
        pause_s = min(longest_s, RECONNECT_S * 2 ** min(self._failures - 1, 10))
        self._retry_at = monotonic() + pause_s * random.uniform(0.5, 1.0)
        if was_connected:
            self._feed(link.Disconnected())
            return
        if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._on_failed("its key is not allowed there", True)
        elif kind in (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
            # One that is just being stopped, say, ends handshakes too.
            self._refusals += 1
            reason = "whoever listens there has another key, or is no scaler-executor"
            # Nor does it say anything about a session that has been let in: what stands in between may end them.
            self._on_failed(reason, self._refusals >= 3 and not self.session.link.is_established)
        else:
            self._on_failed("nobody answers there", False)

    def _feed(self, event: link.Event) -> None:
        session = self.session
        for header, frames in session.handle(event):
            self._on_message(header, frames)
        if session is self.session:
            session.flush()
            self._settle()

    def _settle(self) -> None:
        session = self.session
        if session.lost is not None:
            self._begin_anew(session.lost)
        elif session.must_disconnect:
            session.must_disconnect = False
            self._disconnect()
            self._retry_at = monotonic()

    def _begin_anew(self, reason: str) -> None:
        self.renew()
        self._on_lost(reason)

    def _transmit(self, parts: list[Any]) -> None:
        if self._socket is not None:
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK)
            except zmq.Again:
                pass  # no transport any more, as the monitor is about to say
