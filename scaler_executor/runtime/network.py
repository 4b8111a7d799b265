"""Connections between machines: sessions over zmq, encrypted and authenticated by CURVE.

What the two ends have in common: `listener` is the scheduler's end of all of its sessions, `dialer` the other end of
one. These modules know zmq, and carry messages (header and frames) for `protocol.link` and `protocol.parcels`, which
decide what is sent when. They do not know what the messages mean.

zmq's descriptors tell of an event once, and not again before everything has been read, by whatever looked last: so the
`drain` of both ends must be called before each wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

import zmq

from scaler_executor.protocol import link, parcels
from scaler_executor.protocol.messages import Message
from scaler_executor.protocol.parcels import Inbox, Outbox
from scaler_executor.protocol.wire import MAX_PART_BYTES, decode_frame, encode_frame
from scaler_executor.runtime.security import Keys

#: An unfinished handshake is given up after so long.
HANDSHAKE_S: Final = 5.0
#: So many messages are read of the network before something else has its turn.
TURN_MESSAGES: Final = 200
#: So much of a peer's unfinished messages is kept. One message may be half as large as the memory of this machine,
#: which has to hold more than that.
UNFINISHED_BYTES: Final = max(parcels.UNFINISHED_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
#: A part of a message that is as large is copied out of zmq's memory into a buffer that can be written to.
LARGE_BYTES: Final = 1 << 16


def set_options(sock: zmq.Socket[bytes], keys: Keys) -> None:
    sock.linger = 0
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_PART_BYTES)
    sock.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
    # What is on its way is bounded by the windows of the links.
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RCVHWM, 0)
    sock.curve_publickey = keys.public
    sock.curve_secretkey = keys.secret


def read_frame(parts: list[zmq.Frame]) -> link.Frame:
    """Return the frame of the link that these are the parts of.

    Raises:
        RemoteProtocolError: They are not.
    """
    return decode_frame([part.bytes if len(part) < LARGE_BYTES else bytearray(part.buffer) for part in parts])


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
        self._inbox = Inbox(UNFINISHED_BYTES)
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


def nothing() -> None:
    """What is to be done is done before each wait, see `drain`."""


def nowhere(parts: list[Any]) -> None:
    """Drop what is sent while there is no transport: the link keeps it."""
