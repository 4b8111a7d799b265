"""A connection that is in order and exactly once, over transports that break.

Each end of a session has a `LinkState`. It numbers what it sends, keeps it until the other end has it, and sends the
rest again over the next transport: a short cut is then no event at all for the machines above. When that cannot be
promised (the other end is another process by now, too much waits, the cut lasts too long) it says that the peer is
lost, once, and carries nothing more. It knows neither sockets nor what the packets mean, only their size.

    DOWN      no transport
    GREETING  a transport is there; the other end has not said yet what it has received
    UP        packets flow
    LOST      over for good

Each transport is an *epoch* of the session, numbered by the end that connects. A frame of an earlier epoch may arrive
late and is dropped: what it carried has been sent again. The greeting names both ends by nonces, so that an end that
was started anew is not taken for the one that it replaces.

Where a transport does not tell of its end (`beat_s` is given), both ends say something every so often, and one that
hears nothing for too long takes the transport for gone. Each beat carries the sender's clock and gives back what it
last read on the other's: so an end knows until when it was certainly heard (`proven_at`), whatever the two clocks say.
An acknowledged packet proves that too, for beats are left out while packets flow; so does the answer to a greeting.
The end that connects is answered at once, and takes a transport for gone too over which it is heard no more, though it
hears. The lease counts from when the peer was last heard, so of two ends the one that is to stop first can do so in
time.

No more than a window's worth of bytes is on its way unacknowledged, see `room` and `window`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.link_events import (
    Ack,
    Arrived,
    Connected,
    Data,
    Deliver,
    Disconnect,
    Disconnected,
    Event,
    Frame,
    Greeting,
    Hold,
    Instruction,
    Leaving,
    Outgoing,
    PeerLost,
    Tick,
    Transmit,
)
from scaler_executor.protocol.machine import Story, Transition, forbidden, ignore, unreachable
from scaler_executor.protocol.window import Window

State = Literal["DOWN", "GREETING", "UP", "LOST"]
DOWN: Final = "DOWN"
GREETING: Final = "GREETING"
UP: Final = "UP"
LOST: Final = "LOST"

#: A cut that lasts longer is the peer's loss.
LEASE_S: Final = 60.0
#: What `beat_s` is everywhere.
BEAT_S: Final = 1.0
#: For a cut of some length not to be noticed, the lease is so much longer: the peer may have been heard last a beat
#: before it was cut off, and needs a moment to connect and to greet when it can.
LEASE_ALLOWANCE_S: Final = BEAT_S + 0.5
#: With beats: a transport that is silent for longer is gone.
SILENCE_S: Final = 4.0
#: ... and so is, for the end that connects, one over which it is not known to have been heard for so many times as
#: long: on a slow way what it says waits behind what it has sent.
UNHEARD_SILENCES: Final = 1.5
#: More than this is not kept for an end that does not say that it has it.
RESEND_BYTES: Final = 64 << 20
#: Received packets are acknowledged after so long, or after so many, if nothing is sent that would do it by the way.
ACK_AFTER_S: Final = 0.2
ACK_AFTER_PACKETS: Final = 64
#: ... or after so many bytes, for the sender may wait for that.
ACK_AFTER_BYTES: Final = 1 << 15


class LinkState:
    """One end of a session.

    Args:
        nonce: Names this end; drawn at random by the caller, never used before.
        connects: This end makes the transports and numbers the epochs; exactly one end does.
        now: The time.
        lease_s: Silence that lasts longer is the peer's loss.
        resend_bytes: So much is kept for an end that has not acknowledged it.
        beat_s: The end that connects says something at least so often, and is answered; None: the transport tells of
            its end.
        silence_s: With beats, a transport over which nothing has come for so long is taken for gone.
    """

    def __init__(
        self,
        nonce: bytes,
        *,
        connects: bool,
        now: float,
        lease_s: float = LEASE_S,
        resend_bytes: int = RESEND_BYTES,
        beat_s: float | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        assert nonce
        self._nonce = nonce
        self._connects = connects
        #: May be changed while the link is UP.
        self.lease_s = lease_s
        self._resend_bytes = resend_bytes
        self._beat_s = beat_s
        self._silence_s = silence_s
        self.state: State = DOWN
        #: The other end's nonce, once it has greeted.
        self._peer = b""
        #: Number of the current transport, or of the last one; frames of others are dropped.
        self._epoch = 0
        #: Packets without an acknowledgement: (seq, packet, bytes, when it was sent), in order and without a gap.
        self._kept: deque[tuple[int, Any, int, float]] = deque()
        self._kept_bytes = 0
        self._last_seq = 0
        self._window = Window(now)
        #: Number of the last packet that was received and delivered.
        self._received = 0
        self._received_at = now
        #: What of that the other end has been told in this epoch, and how many bytes came since.
        self._acked = 0
        self._unacked_bytes = 0
        #: See `Hold`.
        self._is_held = False
        #: When the other end was last heard, and when something was last said to it.
        self.heard_at = now
        self._said_at = now
        #: Since when the transport has been there.
        self._connected_at = now
        #: The clock of the other end, as its last Ack gave it.
        self._peer_clock = 0.0
        #: What was said then, on this end's clock, has certainly been heard.
        self.proven_at = now
        #: It has said what its clock shows, and waits to have that back.
        self._must_answer = False
        #: When it is to be told the rest, or None.
        self._ack_due: float | None = None
        #: When the cut has lasted too long; None in UP and LOST.
        self._lease_due: float | None = now + lease_s
        self._story = Story()
        self._now = now
        self._out: list[Instruction] = []
        #: Frames of earlier epochs: normal after a cut.
        self.stale = 0

    # The four methods that every state class has

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event in and return what is to be done, in order."""
        self._now = now
        out = self._out = []
        try:
            if isinstance(event, Outgoing):
                self._step("SEND", event.packet, event.packet_bytes)
            elif isinstance(event, Arrived):
                self._arrived(event.frame)
            elif isinstance(event, Connected):
                self._step("CONNECTED")
            elif isinstance(event, Disconnected):
                self._step("DISCONNECTED")
            elif isinstance(event, Leaving):
                self._is_held = False
                self._ack_due = now if self.state == UP else None
            elif isinstance(event, Hold):
                self._is_held = event.is_held
                self._ack_due = now if self.state == UP and self._acked < self._received else None
            elif isinstance(event, Tick):
                pass
            else:
                unreachable(event)
            silent_due = self._silent_due()
            if silent_due is not None and silent_due <= now:
                self._step("SILENT_DUE")
            if self._lease_due is not None and self._lease_due <= now:
                self._step("LEASE_DUE")
        except RemoteProtocolError as error:
            self._lose(f"it broke the protocol of the link: {error}")
        self._acknowledge()
        return out

    def next_deadline(self) -> float | None:
        """Return when the next Tick is due, or None."""
        deadlines = (self._ack_due, self._lease_due, self._silent_due(), self._beat_due())
        return min((due for due in deadlines if due is not None), default=None)

    def story(self, task_id: int = 0) -> list[Transition]:
        """Return what is remembered of the session's transports; packets are not told apart, so any `task_id` will
        do."""
        return self._story.of(0)

    def check(self) -> None:
        """Assert the invariants."""
        seqs = [seq for seq, _, _, _ in self._kept]
        assert seqs == list(range(self._last_seq - len(seqs) + 1, self._last_seq + 1)), seqs
        assert self._kept_bytes == sum(size for _, _, size, _ in self._kept)
        assert self._kept_bytes <= self._resend_bytes or self.state == LOST
        assert self._acked <= self._received
        assert (self._lease_due is None) == (self.state in (UP, LOST)), self.state
        assert self.proven_at <= self._now
        assert self._ack_due is None or (self.state == UP and self._acked < self._received)
        assert self.state != UP or (self._peer and self._epoch)
        assert self.state != LOST or not self._kept

    @property
    def is_established(self) -> bool:
        """Whether the other end has ever been heard."""
        return bool(self._peer)

    @property
    def outstanding(self) -> int:
        """Number of packets that the other end is not known to have."""
        return len(self._kept)

    @property
    def room(self) -> int:
        """How many bytes of what is large should be sent now at most."""
        return self._window.size_bytes - self._kept_bytes

    @property
    def small_room(self) -> int:
        """The same of what is small: it need not wait until there is room for more of what is large."""
        return 2 * self._window.size_bytes - self._kept_bytes

    def _silent_due(self) -> float | None:
        if self._beat_s is None or self.state not in (GREETING, UP):
            return None
        due = max(self.heard_at, self._connected_at) + self._silence_s
        if self._connects and self.state == UP:
            due = min(due, self.proven_at + UNHEARD_SILENCES * self._silence_s)
        return due

    def _beat_due(self) -> float | None:
        if self._beat_s is None or self.state != UP:
            return None
        # The end that connects asks, and the other one answers: it speaks by itself when it is not asked.
        return self._said_at + self._beat_s * (1.0 if self._connects else 1.5)

    # Events

    def _step(self, event: str, *details: Any) -> None:
        TABLE[self.state][event](self, self, *details)

    def _become(self, state: State, event: str, detail: str = "") -> None:
        self._story.add(self._now, 0, event, self.state, state, detail)
        self.state = state

    def _arrived(self, frame: Frame) -> None:
        if isinstance(frame, Greeting):
            self._step("GREETING", frame)
            return
        if frame.epoch != self._epoch or self.state == DOWN:
            # Not for the table: what an earlier transport still held says nothing about this one.
            self.stale += 1
            return
        if self.state == UP:
            self.heard_at = self._now
        if isinstance(frame, Data):
            self._step("DATA", frame)
        elif isinstance(frame, Ack):
            self._step("ACK", frame)
        else:
            unreachable(frame)

    # Cells of the table

    def _keep(self, link: LinkState, packet: Any, packet_bytes: int) -> None:
        if self._kept_bytes + packet_bytes > self._resend_bytes:
            self._lose(f"more than {self._resend_bytes} bytes wait for it")
            return
        self._last_seq += 1
        self._kept.append((self._last_seq, packet, packet_bytes, self._now))
        self._kept_bytes += packet_bytes

    def _send(self, link: LinkState, packet: Any, packet_bytes: int) -> None:
        self._keep(link, packet, packet_bytes)
        if self.state == UP:
            self._out.append(Transmit(self._data(self._last_seq, packet, packet_bytes)))

    def _greet(self, link: LinkState) -> None:
        if self._lease_due is None:
            self._lease_due = self.heard_at + self.lease_s
        self._ack_due = None
        self._connected_at = self._now
        self._window.renew(self._now)
        if self._connects:
            self._epoch += 1
            self._out.append(Transmit(self._greeting()))
        self._become(GREETING, "CONNECTED", f"epoch {self._epoch}")

    def _cut(self, link: LinkState) -> None:
        if self._lease_due is None:
            self._lease_due = self.heard_at + self.lease_s
        self._ack_due = None
        self._become(DOWN, "DISCONNECTED", f"epoch {self._epoch}")

    def _silent(self, link: LinkState) -> None:
        self._cut(link)
        self._out.append(Disconnect())

    def _greeted(self, link: LinkState, frame: Greeting) -> None:
        if frame.epoch != self._epoch if self._connects else frame.epoch <= self._epoch:
            self.stale += 1  # of an earlier transport
            return
        if not self._connects:
            # Also if this ends badly: the other end must hear that it is not known here.
            self._epoch = frame.epoch
            self._out.append(Transmit(self._greeting()))
        if not frame.sender or (self._peer and frame.sender != self._peer):
            self._lose("it was started anew and knows nothing of this session")
            return
        if frame.receiver != self._nonce and (frame.receiver or self._received):
            self._lose("it takes this end for another one")
            return
        if frame.received < self._last_seq - len(self._kept):
            self._lose(f"it has forgotten what it had received after packet {frame.received}")
            return
        self._peer = frame.sender
        if self._connects:
            self.proven_at = max(self.proven_at, self._connected_at)  # it answers what was said then
        self._acked = self._received
        self._unacked_bytes = 0
        self._forget_up_to(frame.received)
        self._lease_due = None
        self.heard_at = self._now
        self._become(UP, "GREETING", f"epoch {self._epoch}, {len(self._kept)} packets again")
        self._kept = deque((seq, packet, size, self._now) for seq, packet, size, _ in self._kept)
        self._out += [Transmit(self._data(seq, packet, size)) for seq, packet, size, _ in self._kept]

    def _stale_greeting(self, link: LinkState, frame: Greeting) -> None:
        self.stale += 1  # the transport that it came over is gone

    def _greeted_again(self, link: LinkState, frame: Greeting) -> None:
        # A late greeting of an earlier transport was taken for that of this one, which has come only now.
        if self._connects:
            self.stale += 1
        else:
            self._greeted(link, frame)

    def _before_greeting(self, link: LinkState, *_: Any) -> None:
        if self._connects:
            raise RemoteProtocolError("packets before a greeting")
        self.stale += 1

    def _receive(self, link: LinkState, frame: Data) -> None:
        self._forget_up_to(frame.received)
        if frame.seq <= self._received:
            self.stale += 1  # a duplicate
            return
        if frame.seq != self._received + 1:
            raise RemoteProtocolError(f"packet {frame.seq} after {self._received}")
        self._received = frame.seq
        self._received_at = self._now
        last = self._out[-1] if self._out else None
        if isinstance(last, Deliver):
            last.packets.append(frame.packet)
        else:
            self._out.append(Deliver([frame.packet]))
        self._unacked_bytes += frame.packet_bytes
        if self._ack_due is None and not self._is_held:
            self._ack_due = self._now + ACK_AFTER_S

    def _acknowledged(self, link: LinkState, frame: Ack) -> None:
        if frame.echo > self._now:
            raise RemoteProtocolError(f"an echo of {frame.echo} at {self._now}")
        self.proven_at = max(self.proven_at, frame.echo)
        self._peer_clock = frame.sent_at
        if not self._connects and self._beat_s is not None:
            # Not each acknowledgement of many: packets tell as much.
            self._must_answer = self._said_at + self._beat_s / 2 <= self._now
        kept, kept_bytes = self._kept, self._kept_bytes
        sent_at = next((at for seq, _, _, at in kept if seq == frame.received), None) if kept else None
        self._forget_up_to(frame.received)
        if sent_at is not None:
            delay_s = max(0.0, self._now - sent_at - max(0.0, frame.held_s))
            self._window.acknowledged(sent_at, delay_s, kept_bytes, self._now)

    def _lease_over(self, link: LinkState) -> None:
        self._lose(f"it could not be reached for {self.lease_s:g} s")

    # What cells do

    def _greeting(self) -> Greeting:
        return Greeting(self._epoch, self._nonce, self._peer, self._received)

    def _data(self, seq: int, packet: Any, packet_bytes: int) -> Data:
        self._said_at = self._now
        return Data(self._epoch, seq, self._take_acked(), packet, packet_bytes)

    def _take_acked(self) -> int:
        """Return up to where the other end is told, now, that packets have been received."""
        if not self._is_held:
            self._acked, self._unacked_bytes = self._received, 0
        self._ack_due = None
        return self._acked

    def _forget_up_to(self, received: int) -> None:
        """Let go of what the other end has."""
        if received > self._last_seq:
            raise RemoteProtocolError(f"it has received packet {received} of {self._last_seq}")
        kept = self._kept
        while kept and kept[0][0] <= received:
            _, _, packet_bytes, sent_at = kept.popleft()
            self._kept_bytes -= packet_bytes
            self.proven_at = max(self.proven_at, sent_at)

    def _acknowledge(self) -> None:
        """Say what was received, or that this end is there, if it is time."""
        much = self._received - self._acked >= ACK_AFTER_PACKETS or self._unacked_bytes >= ACK_AFTER_BYTES
        due = [due for due in (self._ack_due, self._beat_due()) if due is not None and due <= self._now]
        if self._must_answer or due or (much and self._ack_due is not None):
            self._must_answer = False
            self._said_at = self._now
            received = self._take_acked()
            held_s = self._now - self._received_at
            self._out.append(Transmit(Ack(self._epoch, received, self._now, self._peer_clock, held_s)))

    def _lose(self, reason: str) -> None:
        self._become(LOST, "lost", reason)
        self._kept.clear()
        self._kept_bytes = 0
        self._lease_due = self._ack_due = None
        self._must_answer = False
        self._out.append(PeerLost(reason))


_Cell: TypeAlias = Callable[..., None]

STATES: Final = (DOWN, GREETING, UP, LOST)
EVENTS: Final = (
    "SEND",  # packet, bytes
    "CONNECTED",
    "DISCONNECTED",
    "GREETING",  # frame
    "DATA",  # frame, of this epoch
    "ACK",  # frame, of this epoch
    "SILENT_DUE",
    "LEASE_DUE",
)

_L = LinkState
TABLE: Final[dict[str, dict[str, _Cell]]] = {
    DOWN: {
        "SEND": _L._keep,
        "CONNECTED": _L._greet,
        "DISCONNECTED": ignore,
        "GREETING": _L._stale_greeting,
        # Without a transport every frame is a late one, see `_arrived`.
        "DATA": forbidden,
        "ACK": forbidden,
        "SILENT_DUE": forbidden,
        "LEASE_DUE": _L._lease_over,
    },
    GREETING: {
        "SEND": _L._keep,
        # The next transport is there before the end of the last one was noticed.
        "CONNECTED": _L._greet,
        "DISCONNECTED": _L._cut,
        "GREETING": _L._greeted,
        # An end that waits for a greeting still has the number of the last epoch, whose transport may have held
        # something. One that has begun a new epoch is greeted before anything else.
        "DATA": _L._before_greeting,
        "ACK": _L._before_greeting,
        "SILENT_DUE": _L._silent,
        "LEASE_DUE": _L._lease_over,
    },
    UP: {
        "SEND": _L._send,
        "CONNECTED": _L._greet,
        "DISCONNECTED": _L._cut,
        "GREETING": _L._greeted_again,
        "DATA": _L._receive,
        "ACK": _L._acknowledged,
        "SILENT_DUE": _L._silent,
        "LEASE_DUE": forbidden,
    },
    LOST: {
        # Its owner is about to hear of it.
        "SEND": ignore,
        "CONNECTED": ignore,
        "DISCONNECTED": ignore,
        "GREETING": ignore,
        "DATA": ignore,
        "ACK": ignore,
        "SILENT_DUE": forbidden,
        "LEASE_DUE": forbidden,
    },
}

__all__ = [
    "EVENTS",
    "STATES",
    "TABLE",
    "Ack",
    "Arrived",
    "Connected",
    "Data",
    "Deliver",
    "Disconnect",
    "Disconnected",
    "Event",
    "Frame",
    "Greeting",
    "Hold",
    "Instruction",
    "Leaving",
    "LinkState",
    "Outgoing",
    "PeerLost",
    "Tick",
    "Transmit",
]
