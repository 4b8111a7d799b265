"""Somebody with a key who speaks to a served cluster by hand, and need not keep to any rule; and a cable to cut."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from support import DEADLINE_S

from scaler_executor.protocol import link, wire
from scaler_executor.protocol.codec import Decoder, Encoder
from scaler_executor.protocol.messages import (
    Hello,
    Message,
    ToAgentMessage,
    ToClientMessage,
    ToObserverMessage,
)
from scaler_executor.protocol.parcels import Inbox, Packet
from scaler_executor.runtime.hosting import python_version
from scaler_executor.runtime.security import Connection


class Speaker:
    """One session, spoken by hand.

    Args:
        path: A connection file.
        nonce: Names its end of the session; None: drawn at random.
    """

    def __init__(self, path: Path, nonce: bytes | None = None) -> None:
        self._connection = Connection.load(path)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._connect()
        #: They stay open: what has been put into them goes out.
        self._old: list[zmq.Socket[bytes]] = []
        self.nonce = nonce or os.urandom(16)
        self.epoch = 1
        self.seq = 0
        self.received = 0
        #: The scheduler's nonce.
        self.theirs = b""
        self._inbox = Inbox()
        self._decode = Decoder[Any](ToClientMessage | ToAgentMessage | ToObserverMessage).decode
        #: Whether what comes is acknowledged.
        self.acknowledges = True

    def _connect(self) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.DEALER)
        sock.linger = 0
        sock.curve_publickey = self._connection.keys.public
        sock.curve_secretkey = self._connection.keys.secret
        sock.curve_serverkey = self._connection.server_key
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        sock.connect(self._connection.address)
        return sock

    def close(self) -> None:
        for sock in (self.socket, *self._old):
            sock.close()
        self._context.term()

    # Frames

    def put(self, *parts: Any) -> None:
        """Send a message of the network."""
        self.socket.send_multipart(parts)

    def transmit(self, frame: link.Frame) -> None:
        self.put(*wire.encode_frame(frame))

    def next_frame(self, timeout_s: float = DEADLINE_S) -> link.Frame | None:
        """Return the next frame, or None when none comes."""
        if not self.socket.poll(int(timeout_s * 1000)):
            return None
        return wire.decode_frame(self.socket.recv_multipart())

    def greet(self, receiver: bytes = b"") -> link.Greeting:
        """Begin a session, or go on with one, and return the answer."""
        self.transmit(link.Greeting(self.epoch, self.nonce, receiver, self.received))
        answer = self.next_frame()
        assert isinstance(answer, link.Greeting), answer
        self.theirs = answer.sender
        return answer

    # Messages

    def packet(self, packet: Packet) -> None:
        """Send a packet, in order."""
        self.seq += 1
        self.transmit(link.Data(self.epoch, self.seq, self.received, packet))

    def say(self, *messages: Message) -> None:
        """Send messages."""
        for message in messages:
            header, frames = Encoder().encode(message)
            self.packet(Packet([header, *frames]))

    def hello(self, role: str, **changes: Any) -> Any:
        """Greet and say Hello; return the answer."""
        self.greet()
        self.say(Hello(role, **{"python": python_version(), **changes}))
        return self.hear()

    def beat(self) -> None:
        self.transmit(link.Ack(self.epoch, self.received))

    def hear(self, timeout_s: float = DEADLINE_S) -> Any:
        """Return the next message, or None when none comes, or the session has ended."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            frame = self.next_frame(min(left_s, 1.0))
            if frame is None:
                self.beat()
            elif isinstance(frame, link.Greeting):
                return None
            elif isinstance(frame, link.Data):
                if self.acknowledges:
                    self.received = frame.seq
                    self.beat()
                whole = self._inbox.put(frame.packet)
                if whole is not None:
                    return self._decode(*whole)
        return None

    def is_forgotten(self) -> bool:
        """Tell whether the session is over, as asked over another connection, to which it goes over if it is not."""
        self._old.append(self.socket)
        self.socket = self._connect()
        self.epoch += 1
        theirs = self.theirs
        forgotten = self.greet(theirs).sender != theirs
        self.theirs = theirs
        return forgotten


class Cable:
    """A proxy on loopback through which a client reaches a server; it records, and does as it is told with what passes.

    Args:
        port: Of the server.
        change: Takes and returns what the client sends; None: as it is.
    """

    def __init__(self, port: int, change: Callable[[bytes], bytes] | None = None) -> None:
        self._port = port
        self._change = change
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        #: What the client sent, by connection.
        self.sent: list[bytearray] = []
        self._wake, self._awake = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def set_change(self, change: Callable[[bytes], bytes] | None) -> None:
        self._change = change

    def close(self) -> None:
        self._wake.close()
        self._thread.join()
        self._awake.close()
        self._listener.close()

    def _run(self) -> None:
        #: {socket: (the other one, where it is recorded or None)}
        pairs: dict[socket.socket, tuple[socket.socket, bytearray | None]] = {}
        while True:
            ready, _, _ = select.select([self._awake, self._listener, *pairs], [], [])
            if self._awake in ready:
                break
            for sock in ready:
                if sock is self._listener:
                    client, _ = sock.accept()
                    server = socket.create_connection(("127.0.0.1", self._port))
                    record = bytearray()
                    self.sent.append(record)
                    pairs[client], pairs[server] = (server, record), (client, None)
                elif sock in pairs:
                    self._pass_on(sock, pairs)
        for sock in pairs:
            sock.close()

    def _pass_on(self, sock: socket.socket, pairs: dict[socket.socket, tuple[socket.socket, bytearray | None]]) -> None:
        other, record = pairs[sock]
        try:
            data = sock.recv(1 << 16)
            if data and record is not None:
                record += data
                change = self._change
                data = change(data) if change is not None else data
            if data:
                other.sendall(data)
        except ConnectionError:
            data = b""
        if not data:
            for end in (sock, other):
                del pairs[end]
                end.close()
