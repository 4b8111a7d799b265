"""The relay: a process that keeps a client connected to a served cluster.

It speaks to the client over a pair, as the serve process of an embedded cluster does, and to the scheduler over the
network. So the user's process needs no zmq and none of its threads; a program that is stopped, or holds the GIL for
long, is not taken for dead; and one that is killed is known to be so at once.

What goes through is not looked into, except where large and small messages must be told apart (`protocol.parcels`).
The client's Hello is answered here: the scheduler hears of each session from the relay, which begins another one when
the scheduler has forgotten the last.
"""

from __future__ import annotations

import os
import signal
import socket
from time import monotonic
from typing import Any, Final, NoReturn

import msgspec

from scaler_executor.protocol.codec import Decoder, Encoder, RemoteProtocolError, tag_of
from scaler_executor.protocol.messages import (
    Bye,
    ClientMessage,
    Hello,
    Message,
    RefusalKind,
    Refused,
    SessionLost,
    ToClientMessage,
    Welcome,
)
from scaler_executor.runtime import platform
from scaler_executor.runtime.dialer import Dialer
from scaler_executor.runtime.hosting import CLIENT_LEASE_S, LAST_WORDS_S, python_version
from scaler_executor.runtime.loop import READABLE, WRITABLE, Loop
from scaler_executor.runtime.security import Keys
from scaler_executor.runtime.signals import watch_signals
from scaler_executor.runtime.transport import StreamReader, StreamWriter

#: The client is not read while more than this waits to be sent, nor are its cancels: so it is more than one large
#: argument.
UPSTREAM_BYTES: Final = 1 << 32


class Relay:
    """One client's way to the scheduler."""

    def __init__(self, config: dict[str, Any], sock: socket.socket, config_socket: socket.socket) -> None:
        self._loop = Loop()
        self._config = config
        self._config_socket: socket.socket | None = config_socket
        sock.setblocking(False)
        self._socket = sock
        self._reader = StreamReader(sock)
        self._writer = StreamWriter(sock)
        self._encoder = Encoder()
        self._decode = Decoder[Any](ClientMessage).decode
        self._decode_down = Decoder[Any](ToClientMessage).decode
        #: Let in, in the current session; what the client says before that waits in its socket.
        self._welcome: Welcome | None = None
        #: The client has said Hello for the current session: what it says counts.
        self._has_hello = False
        #: The scheduler knows the client's sessions by it.
        self._secret = os.urandom(16)
        self._is_leaving = False
        self._end_by: float | None = None
        self._give_up_at: float | None = monotonic() + config["connect_timeout_s"]
        self._last_failure = "nobody answers there"
        self._dialer = Dialer(
            self._loop,
            config["address"],
            Keys(config["public_key"], config["secret_key"]),
            config["server_key"],
            self._on_message,
            self._on_lost,
            self._on_failed,
            lease_s=CLIENT_LEASE_S,
        )
        self._dialer.send(self._hello())
        self._loop.watch(config["client_pidfd"], self._client_gone)
        if platform.RESERVE_S is not None:
            self._parent_check_at: float | None = monotonic()
        else:
            self._parent_check_at = None
        watch_signals(self._loop, {signal.SIGTERM: self._client_gone})

    def run(self) -> None:
        """Relay until the client has gone."""
        self._loop.run(self._next_deadline, self._on_deadline, self._work, lambda: False)
        self._dialer.close()

    def _hello(self) -> Hello:
        return Hello(
            "client",
            python=python_version(),
            name=self._config["name"],
            secret=self._secret,
            max_running=self._config["max_running"],
            max_items_per_worker=self._config["max_tasks_per_child"],
        )

    def _work(self) -> None:
        while self._dialer.drain():
            pass
        self._watch_client()
        if self._is_leaving and self._dialer.is_idle:
            self._loop.stop()

    def _next_deadline(self) -> float | None:
        deadlines = (self._dialer.next_deadline(), self._end_by, self._give_up_at, self._parent_check_at)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _on_deadline(self) -> None:
        now = monotonic()
        if self._parent_check_at is not None and platform.RESERVE_S is not None:
            self._parent_check_at = now + platform.RESERVE_S
            if os.getppid() != self._config["client_pid"]:
                self._client_gone()
        if self._end_by is not None and self._end_by <= now:
            self._loop.stop()
        if self._give_up_at is not None and self._give_up_at <= now:
            self._report(RefusalKind.UNREACHABLE, self._last_failure)
            self._loop.stop()
        self._dialer.on_deadline()

    # The client

    def _watch_client(self) -> None:
        """Read what the client says while it can be sent."""
        wants = not self._is_leaving and self._dialer.pending_bytes < UPSTREAM_BYTES
        events = (READABLE if wants else 0) | (WRITABLE if self._writer.pending_bytes else 0)
        if events:
            self._loop.watch(self._socket.fileno(), self._on_client, events)
        else:
            self._loop.forget(self._socket.fileno())

    def _on_client(self) -> None:
        try:
            if self._writer.pending_bytes:
                self._writer.flush()
            if self._is_leaving:
                return
            for header, frames in self._reader.read():
                self._from_client(header, frames)
        except (RemoteProtocolError, ConnectionError):
            self._client_gone()
            return
        if self._reader.eof:
            self._client_gone()

    def _from_client(self, header: Any, frames: list[Any]) -> None:
        if self._is_leaving:
            return
        if self._has_hello and self._welcome is not None and tag_of(header) not in _FOR_US_FROM_CLIENT:
            self._dialer.forward(header, frames, self._decode)
            return
        message = self._decode(header, frames)
        if isinstance(message, Hello):
            self._has_hello = True
            if self._welcome is not None:
                self._tell(self._welcome)
        elif isinstance(message, Bye):
            self._leave(message)
        elif self._has_hello and self._welcome is not None:
            self._dialer.send(message)
        # Else it is for a session that is over, as the client has been told.

    def _client_gone(self) -> None:
        self._leave(Bye(force=True))

    def _leave(self, bye: Bye) -> None:
        """Take leave of the scheduler, and end when it has heard that."""
        if self._is_leaving:
            return
        self._is_leaving = True
        self._end_by = monotonic() + LAST_WORDS_S
        self._loop.forget(self._config["client_pidfd"])
        if self._welcome is None:
            self._loop.stop()
        else:
            self._dialer.send(bye)

    def _tell(self, message: Message) -> None:
        self._write(self._encoder.pack(message))

    def _write(self, buffers: list[Any]) -> None:
        try:
            self._writer.send(buffers)
        except ConnectionError:
            self._client_gone()

    def _report(self, refusal: int | None, reason: str, workers: int = 0) -> None:
        """Tell the client, once, whether it has been let in: (None or a RefusalKind, reason, workers)."""
        self._give_up_at = None
        if self._config_socket is not None:
            try:
                self._config_socket.sendall(msgspec.msgpack.encode((refusal, reason, workers)))
            except ConnectionError:
                pass
            self._config_socket.close()
            self._config_socket = None

    # The scheduler

    def _on_message(self, header: Any, frames: list[Any]) -> None:
        if self._welcome is not None and tag_of(header) not in _FOR_US_FROM_SCHEDULER:
            if self._has_hello:
                self._write(self._encoder.join(header, frames))
            return
        message = self._decode_down(header, frames)
        if isinstance(message, Welcome):
            self._welcome = message
            self._report(None, "", message.workers)
            if self._has_hello:
                self._tell(message)
        elif isinstance(message, Refused):
            self._report(message.kind, message.reason)
            if message.kind == RefusalKind.UNREACHABLE:
                # Another session begins when this one cannot be resumed: the scheduler takes no Hello in it.
                self._lose_session(message.reason)
            else:
                self._end(message)
        elif self._has_hello:
            self._tell(message)

    def _end(self, refused: Refused) -> None:
        """Nothing more will come of it: the client ends when it has read this."""
        self._tell(refused)
        self._is_leaving = True
        self._end_by = monotonic() + LAST_WORDS_S
        if not self._writer.pending_bytes:
            self._loop.stop()

    def _on_lost(self, reason: str) -> None:
        """The scheduler knows nothing of this client any more."""
        if self._is_leaving:
            self._loop.stop()
            return
        self._lose_session(reason)
        self._dialer.send(self._hello())

    def _lose_session(self, reason: str) -> None:
        """What the client has outstanding is lost. It is let in again with the next Welcome."""
        was_welcome, self._welcome = self._welcome, None
        if was_welcome is not None and self._has_hello:
            self._has_hello = False
            self._tell(SessionLost(reason))

    def _on_failed(self, reason: str, is_refusal: bool) -> None:
        self._last_failure = reason
        if is_refusal:
            self._report(RefusalKind.KEY, reason)
            self._end(Refused(reason, RefusalKind.KEY))


#: Messages that are not just passed on, by their tags. What has none that can be told is decoded, and refused.
_FOR_US_FROM_CLIENT: Final = frozenset({None, *(kind.__struct_config__.tag for kind in (Hello, Bye))})
_FOR_US_FROM_SCHEDULER: Final = frozenset({None, *(kind.__struct_config__.tag for kind in (Welcome, Refused))})


def main(config: dict[str, Any]) -> NoReturn:
    """Relay for one client.

    Args:
        config: See `remote.RemoteCluster`, which makes it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    platform.hold_lifeline(config["lifeline_fd"])
    relay = Relay(config, socket.socket(fileno=config["socket_fd"]), socket.socket(fileno=config["config_fd"]))
    relay.run()
    os._exit(0)
