"""The scheduler's end of all of its sessions, see `network`: who is let in, and over which transport a peer speaks."""

from __future__ import annotations

import heapq
import os
import random
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

import zmq

from scaler_executor.protocol import link
from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.messages import Message
from scaler_executor.protocol.wire import encode_frame
from scaler_executor.runtime import log
from scaler_executor.runtime.loop import Loop
from scaler_executor.runtime.network import (
    HANDSHAKE_S,
    TURN_MESSAGES,
    Session,
    nothing,
    nowhere,
    read_frame,
    set_options,
)
from scaler_executor.runtime.security import Keys

#: ... and it is read for no longer than this: messages may have many rows.
TURN_S: Final = 0.01
#: While there is always more to be read, nobody is taken for silent for so long.
PATIENCE_S: Final = 1.0
#: A transport over which a peer has not answered for so long is closed: its end may never be told otherwise.
HEARTBEAT_S: Final = 10.0
HEARTBEAT_TIMEOUT_S: Final = 30.0
#: A peer whose messages are not read so quickly waits when so many are here, and is not read any further.
UNREAD_MESSAGES: Final = 1000
#: More than this never waits for a peer that keeps to the window of its link.
UNSENT_MESSAGES: Final = 1 << 18
#: There are no more sessions of one key than this: those that have been unheard for the longest time are ended, which
#: are such as have been cut off if there are any. So many of these at once.
MAX_SESSIONS: Final = 4096
SESSIONS_AT_ONCE: Final = 64
_ZAP_DOMAIN: Final = b"scaler-executor"


class Peer(Session):
    """A session of the listener, with a peer that has been let in."""

    def __init__(self, number: int, nonce: bytes, key: bytes, user: str) -> None:
        # Nothing is kept for long for one that has not said anything.
        super().__init__(False, HANDSHAKE_S, nowhere)
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
        self._transmit = nowhere


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
            set_options(self._router, keys)
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
        #: Since when what is due waits because there is always more to be read.
        self._unread_since: float | None = None
        #: {nonce of the other end: peer}, {routing id: peer}.
        self._by_nonce: dict[bytes, Peer] = {}
        self._by_route: dict[bytes, Peer] = {}
        #: {public key: {number: peer}}
        self._by_key: dict[bytes, dict[int, Peer]] = {}
        #: (when to look, number, peer)
        self._due: list[tuple[float, int, Peer]] = []
        for sock in (self._zap, self._router):
            loop.watch(sock.getsockopt(zmq.FD), nothing)  # type: ignore[arg-type]

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
        until = monotonic() + TURN_S
        for _ in range(TURN_MESSAGES):
            try:
                first, *parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return may_be_more
            self._arrived(first.bytes, parts)
            if monotonic() >= until:
                break
        return True

    def next_deadline(self) -> float | None:
        """Return when `on_deadline` is to be called, or None."""
        return self._due[0][0] if self._due else None

    def on_deadline(self) -> None:
        """Look after the sessions whose time has come."""
        now = monotonic()
        if self.drain():
            # What came while this process was busy counts; but others in this process have their turns as well.
            if self._unread_since is None:
                self._unread_since = now
            if now < self._unread_since + PATIENCE_S:
                return
        self._unread_since = None
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
            frame = read_frame(parts)
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
            self._make_room(key)
            self._last_number += 1
            peer = self._by_nonce[greeting.sender] = Peer(self._last_number, greeting.sender, key, user)
            self._by_key.setdefault(key, {})[peer.number] = peer
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

    def _make_room(self, key: bytes) -> None:
        """End some sessions of this key if there are too many."""
        peers = self._by_key.get(key)
        if peers is not None and len(peers) >= MAX_SESSIONS:
            longest = sorted(peers.values(), key=lambda peer: peer.link.heard_at)
            for peer in longest[: min(SESSIONS_AT_ONCE, MAX_SESSIONS // 2)]:
                log.debug("network", "session %d (%s) is one too many of its key", peer.number, peer.user)
                self._lose(peer, f"its key has more than {MAX_SESSIONS} sessions")

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
        peers = self._by_key.get(peer.key)
        if peers is not None:
            peers.pop(peer.number, None)
            if not peers:
                del self._by_key[peer.key]

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
