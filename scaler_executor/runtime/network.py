"""Connections between machines: sessions over zmq, encrypted and authenticated by CURVE.

This module knows zmq, and carries messages (header and frames) for `protocol.link` and `protocol.parcels`, which
decide what is sent when. It does not know what the messages mean. `Listener` is the scheduler's end of all of its
sessions, `Dialer` the other end of one.

zmq's descriptors tell of an event once, and not again before everything has been read, by whatever looked last: so
`drain` must be called before each wait.
"""

from __future__ import annotations

import heapq
import os
import random
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from scaler_executor.protocol import link
from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.messages import Message
from scaler_executor.protocol.parcels import Inbox, Outbox
from scaler_executor.protocol.wire import MAX_PART_BYTES, decode_frame, encode_frame
from scaler_executor.runtime import log
from scaler_executor.runtime.loop import Loop
from scaler_executor.runtime.security import Keys

#: An unfinished handshake is given up after so long.
HANDSHAKE_S: Final = 5.0
#: Pauses between attempts to connect: at first, at most. Each is drawn at random up to its length.
RECONNECT_S: Final = 0.1
MAX_RECONNECT_S: Final = 5.0
#: For so long after the other end was last heard, when an agent's calls may still be saved, attempts are short and
#: follow each other closely: connecting, the handshake and the pause take at most so long.
HURRY_S: Final = 12.0
HURRIED_CONNECT_S: Final = 0.7
HURRIED_HANDSHAKE_S: Final = 2.0
HURRIED_RECONNECT_S: Final = 0.2
#: A transport over which a peer has not answered for so long is closed: its end may never be told otherwise.
HEARTBEAT_S: Final = 10.0
HEARTBEAT_TIMEOUT_S: Final = 30.0
#: So many messages are read of the network before something else has its turn.
TURN_MESSAGES: Final = 200
#: A peer whose messages are not read so quickly waits when so many are here, and is not read any further.
UNREAD_MESSAGES: Final = 1000
#: More than this never waits for a peer that keeps to the window of its link.
UNSENT_MESSAGES: Final = 1 << 18
_ZAP_DOMAIN: Final = b"scaler-executor"
_FAILED: Final = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_CLOSE_FAILED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def _set_options(sock: zmq.Socket[bytes], keys: Keys) -> None:
    sock.linger = 0
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_PART_BYTES)
    sock.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
    # What is on its way is bounded by the windows of the links.
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RCVHWM, 0)
    sock.curve_publickey = keys.public
    sock.curve_secretkey = keys.secret


class Session:
    """One end of a session: link, what is to be sent, and what has come in part.

    Args:
        connects: See `link.LinkState`.
        lease_s: See there.
        transmit: Puts the parts of a frame on the transport that is there.
    """

    def __init__(self, connects: bool, lease_s: float, transmit: Callable[[list[Any]], None]) -> None:
        self.nonce = os.urandom(16)
        self.link = link.LinkState(self.nonce, connects=connects, now=monotonic(), lease_s=lease_s, beat_s=link.BEAT_S)
        self._transmit = transmit
        self._outbox = Outbox()
        self._inbox = Inbox()
        #: Set when the link is: why.
        self.lost: str | None = None
        self.must_disconnect = False

    @property
    def pending_bytes(self) -> int:
        """What waits to be sent."""
        return self._outbox.pending_bytes

    @property
    def is_idle(self) -> bool:
        """Whether everything that was sent has arrived."""
        return not self.pending_bytes and not self.link.outstanding

    def send(self, message: Message) -> None:
        """Have a message sent, when there is room."""
        self._outbox.put(message)
        self.flush()

    def forward(self, header: Any, frames: list[Any], decode: Callable[[Any, list[Any]], Message]) -> None:
        """Have an encoded message sent; `decode` is called if it must be known."""
        if not self._outbox.put_encoded(header, frames):
            self._outbox.put(decode(header, frames))
        self.flush()

    def flush(self) -> None:
        """Send as much as there is room for."""
        while self.link.small_room > 0 and self.lost is None:
            packet = self._outbox.take(with_pieces=self.link.room > 0)
            if packet is None:
                break
            self.handle(link.Outgoing(packet, len(packet)))

    def handle(self, event: link.Event) -> list[tuple[Any, list[Any]]]:
        """Feed the link. Return the messages that are complete: header and frames.

        Raises:
            RemoteProtocolError: The peer's packets do not fit together.
        """
        messages = []
        for instruction in self.link.handle(event, monotonic()):
            if isinstance(instruction, link.Transmit):
                self._transmit(encode_frame(instruction.frame))
            elif isinstance(instruction, link.Deliver):
                for packet in instruction.packets:
                    message = self._inbox.put(packet)
                    if message is not None:
                        messages.append(message)
            elif isinstance(instruction, link.Disconnect):
                self.must_disconnect = True
            else:
                self.lost = instruction.reason
        return messages


class Peer(Session):
    """A session of the listener, with a peer that has been let in."""

    def __init__(self, number: int, nonce: bytes, key: bytes, user: str) -> None:
        # Nothing is kept for long for one that has not said anything.
        super().__init__(False, HANDSHAKE_S, _nowhere)
        self.number = number
        #: Its nonce.
        self.name = nonce
        #: Its public key, and the name of that.
        self.key = key
        self.user = user
        #: When it is given up if no message of its has come, or None if one has.
        self.speak_by: float | None = monotonic() + HANDSHAKE_S
        #: The transport over which it speaks now, b"" for none.
        self.routing_id = b""
        #: What was sent could not go: the transport is gone.
        self.is_cut = False
        #: When its link is looked at next, at the latest; 0: never.
        self.look_at = 0.0

    def cut(self) -> None:
        """Nothing can be sent until it connects again."""
        self.routing_id = b""
        self._transmit = _nowhere


class Listener:
    """Listens on a TCP port for peers with allowed keys, each of which has one session.

    Args:
        loop: Wakes up when something is to be read.
        address: "tcp://HOST:PORT"; port 0 or "*" for any free one.
        keys: The server's.
        find_user: Returns the name that goes with a public key (32 bytes), None if it is not allowed in.
        on_message: Takes peer, header and frames of each message.
        on_lost: Takes peer and reason when a session is over, unless `close_peer` ended it.
        lease_s: Silence after which a session is over.

    Raises:
        zmq.ZMQError: The address cannot be bound.
    """

    def __init__(
        self,
        loop: Loop,
        address: str,
        keys: Keys,
        find_user: Callable[[bytes], str | None],
        on_message: Callable[[Peer, Any, list[Any]], None],
        on_lost: Callable[[Peer, str], None],
        lease_s: float,
    ) -> None:
        self._loop = loop
        self._find_user = find_user
        self._on_message = on_message
        self._on_lost = on_lost
        self._lease_s = lease_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 100)
        self._zap = self._context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind("inproc://zeromq.zap.01")
        self._router = self._context.socket(zmq.ROUTER)
        try:
            _set_options(self._router, keys)
            self._router.curve_server = True
            self._router.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
            self._router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._router.setsockopt(zmq.BACKLOG, 1024)
            self._router.setsockopt(zmq.RCVHWM, UNREAD_MESSAGES)
            self._router.setsockopt(zmq.SNDHWM, UNSENT_MESSAGES)
            self._router.setsockopt(zmq.HEARTBEAT_IVL, int(HEARTBEAT_S * 1000))
            self._router.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(HEARTBEAT_TIMEOUT_S * 1000))
            self._router.setsockopt(zmq.IPV6, int("[" in address))
            self._router.bind(address)
        except BaseException:
            self._context.destroy(0)
            raise
        #: Where it listens, with the port that was found.
        self.address = self._router.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]
        self._last_number = 0
        #: {nonce of the other end: peer}, {routing id: peer}.
        self._by_nonce: dict[bytes, Peer] = {}
        self._by_route: dict[bytes, Peer] = {}
        #: (when to look, number, peer)
        self._due: list[tuple[float, int, Peer]] = []
        for sock in (self._zap, self._router):
            loop.watch(sock.getsockopt(zmq.FD), _nothing)  # type: ignore[arg-type]

    @property
    def peers(self) -> list[Peer]:
        """All sessions."""
        return list(self._by_nonce.values())

    def drain(self) -> bool:
        """Read what has come, at most a turn's worth. Return whether there may be more."""
        may_be_more = True
        for _ in range(TURN_MESSAGES):
            try:
                self._answer_zap(self._zap.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                may_be_more = False
                break
        for _ in range(TURN_MESSAGES):
            try:
                first, *parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return may_be_more
            self._arrived(first.bytes, parts)
        return True

    def next_deadline(self) -> float | None:
        """Return when `on_deadline` is to be called, or None."""
        return self._due[0][0] if self._due else None

    def on_deadline(self) -> None:
        """Look after the sessions whose time has come."""
        while self.drain():
            pass  # what came while this process was busy counts
        now = monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, peer = heapq.heappop(self._due)
            peer.look_at = 0.0
            if self._by_nonce.get(peer.name) is not peer:
                continue
            if peer.lost is not None:
                self._lose(peer, peer.lost)
            elif peer.speak_by is not None and peer.speak_by <= now:
                self._lose(peer, f"it said nothing for {HANDSHAKE_S:g} s")
            else:
                self._feed(peer, link.Tick())

    def send(self, peer: Peer, message: Message) -> None:
        """Have a message sent."""
        peer.send(message)
        self._look_later(peer)

    def hold(self, peer: Peer, is_held: bool) -> None:
        """Have a peer send no more than it has sent, or go on."""
        peer.handle(link.Hold(is_held))
        self._look_later(peer)

    def close_peer(self, peer: Peer) -> None:
        """End a session on our side. What has been sent may or may not arrive."""
        if peer.lost is None:
            peer.flush()
            peer.handle(link.Leaving())
            peer.lost = "closed"
        self._forget(peer)

    def close(self) -> None:
        """Stop listening. What has been handed to zmq is given a moment to leave."""
        for sock in (self._zap, self._router):
            self._loop.forget(sock.getsockopt(zmq.FD))  # type: ignore[arg-type]
        self._context.destroy(500)

    def _answer_zap(self, request: list[bytes]) -> None:
        """Decide about a connection; see ZeroMQ RFC 27."""
        user: str | None = None
        if len(request) == 7 and request[0] == b"1.0" and request[2] == _ZAP_DOMAIN and request[5] == b"CURVE":
            user = self._find_user(request[6])
        status = [b"400", b"this key is not allowed here", b""]
        if user is not None:
            # A name may be given to another key later; sessions are the key's.
            status = [b"200", b"OK", f"{request[6].hex()} {user}".encode()]
        self._zap.send_multipart([b"1.0", request[1] if len(request) > 1 else b"", *status, b""])

    def _arrived(self, route: bytes, parts: list[Any]) -> None:
        try:
            frame = decode_frame([part.bytes if len(part) < 65536 else bytearray(part.buffer) for part in parts])
        except RemoteProtocolError as error:
            peer = self._by_route.get(route)
            if peer is not None:
                self._broke_protocol(peer, error)
            return
        if isinstance(frame, link.Greeting):
            key, _, user = str(parts[0].get("User-Id")).partition(" ")
            self._greeted(route, frame, bytes.fromhex(key), user)
            return
        peer = self._by_route.get(route)
        if peer is not None:  # else the rest of a session that is over
            self._feed(peer, link.Arrived(frame))

    def _greeted(self, route: bytes, greeting: link.Greeting, key: bytes, user: str) -> None:
        current = self._by_route.get(route)
        if current is not None:
            # Each would have everything sent again, and only the first one means another transport.
            self._broke_protocol(current, RemoteProtocolError("two greetings over one connection"))
            return
        peer = self._by_nonce.get(greeting.sender)
        if peer is None and greeting.sender and not greeting.receiver:
            self._last_number += 1
            peer = self._by_nonce[greeting.sender] = Peer(self._last_number, greeting.sender, key, user)
        if peer is None or peer.key != key:
            # It speaks of a session that is over. A greeting from somebody else tells it so.
            self._transmit(route, encode_frame(link.Greeting(greeting.epoch, os.urandom(16), greeting.sender, 0)))
            return
        self._by_route.pop(peer.routing_id, None)
        peer.routing_id = route
        self._by_route[route] = peer
        peer._transmit = lambda parts: self._transmit(route, parts)
        self._feed(peer, link.Connected())
        if peer.lost is None:
            self._feed(peer, link.Arrived(greeting))

    def _feed(self, peer: Peer, event: link.Event) -> None:
        try:
            for header, frames in peer.handle(event):
                if peer.speak_by is not None:
                    peer.speak_by = None
                    peer.link.lease_s = self._lease_s
                self._on_message(peer, header, frames)
                if peer.lost is not None:
                    return  # by what it said
            peer.flush()
        except RemoteProtocolError as error:
            self._broke_protocol(peer, error)
            return
        if peer.lost is not None:
            self._lose(peer, peer.lost)
        else:
            self._settle(peer)

    def _settle(self, peer: Peer) -> None:
        """Take note of what has become of its link."""
        if peer.must_disconnect or peer.is_cut:
            self._by_route.pop(peer.routing_id, None)
            peer.cut()
            if peer.is_cut:
                peer.handle(link.Disconnected())
            peer.must_disconnect = peer.is_cut = False
        self._look_later(peer)

    def _look_later(self, peer: Peer) -> None:
        """Have its link looked at when that is due, or earlier."""
        # What is sent may find that it is lost; its owner, who is just sending, hears of that later.
        due = peer.link.next_deadline() if peer.lost is None else 0.0
        if peer.speak_by is not None and due is not None:
            due = min(due, peer.speak_by)
        if due is not None and (not peer.look_at or due < peer.look_at):
            peer.look_at = due
            heapq.heappush(self._due, (due, random.getrandbits(32), peer))

    def _broke_protocol(self, peer: Peer, error: RemoteProtocolError) -> None:
        log.warn("network", "session %d (%s) broke the protocol: %s", peer.number, peer.user, error)
        self._lose(peer, f"it broke the protocol: {error}")

    def _lose(self, peer: Peer, reason: str) -> None:
        peer.lost = reason
        self._forget(peer)
        self._on_lost(peer, reason)

    def _forget(self, peer: Peer) -> None:
        self._by_route.pop(peer.routing_id, None)
        self._by_nonce.pop(peer.name, None)

    def _transmit(self, route: bytes, parts: list[Any]) -> None:
        try:
            self._router.send_multipart([route, *parts], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # Its transport is gone, and so is what was on its way. The link keeps it until the peer connects again.
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            peer = self._by_route.get(route)
            if peer is not None:
                peer.is_cut = True


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
                frame = decode_frame([part.bytes if len(part) < 65536 else bytearray(part.buffer) for part in parts])
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
        _set_options(sock, self._keys)
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
            self._loop.watch(each.getsockopt(zmq.FD), _nothing)  # type: ignore[arg-type]
        sock.connect(self._address)

    def _disconnect(self) -> None:
        sock, monitor = self._socket, self._monitor
        self._socket = self._monitor = None
        self._is_connected = False
        if sock is not None and monitor is not None:
            for each in (sock, monitor):
                self._loop.forget(each.getsockopt(zmq.FD))  # type: ignore[arg-type]
            sock.disable_monitor()
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


def _nothing() -> None:
    """What is to be done is done before each wait, see `drain`."""


def _nowhere(parts: list[Any]) -> None:
    """Drop what is sent while there is no transport: the link keeps it."""
