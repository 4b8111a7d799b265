"""Large payloads in pieces, so that nothing else waits for them.

A message whose parts are small is one packet. What is large in it, its header or a frame, goes ahead in pieces, and
the message follows when they are all sent; in between goes what has nothing to do with it, see `precedence`. This
module makes the pieces and puts them together again. It knows neither connections (`link` carries the packets) nor
what becomes of a message.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import msgspec

from scaler_executor.protocol.codec import MAX_FRAMES, Encoder, RemoteProtocolError
from scaler_executor.protocol.messages import CancelKind, Frames, Message, TaskCancel, TaskRun, TaskSubmit
from scaler_executor.protocol.precedence import PIECE_BYTES, Keys, divide

#: So many messages are sent piece by piece in turn. Every other turn is that of the one of which the least is left,
#: whichever it is, unless twice as many have been begun.
MAX_IN_PIECES: Final = 8
#: A receiver keeps no more unfinished parts than this of one peer.
MAX_BLOBS: Final = 2 * MAX_IN_PIECES * MAX_FRAMES
#: The messages that have been begun are no larger than this together, besides one that is larger alone and besides
#: those that are small.
BEGUN_BYTES: Final = 1 << 30
SMALL_BYTES: Final = 16 << 20
#: So much comes of a peer, then, that cannot be put together yet, unless one message is larger.
UNFINISHED_BYTES: Final = BEGUN_BYTES + 2 * MAX_IN_PIECES * SMALL_BYTES


class Packet(msgspec.Struct):
    """What a link carries: a message, or the next piece of one of its parts."""

    #: The header and frames of a message that are in no blob; of a piece, its bytes.
    parts: list[Any]
    #: Number of the blob that this is a piece of; 0: it is a message.
    piece_of: int = 0
    #: Of a piece: no other follows.
    is_last: bool = False
    #: Of a message: (index of the part, blob that it is), in rising order.
    blobs: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """Return the size in bytes."""
        return sum(map(len, self.parts)) + 64


class _Waiting:
    """A message that goes in pieces, or that waits behind one."""

    __slots__ = ("at", "behind", "blobs", "keys", "left_bytes", "message", "packet", "sent", "size_bytes")

    def __init__(self, message: Message, keys: Keys) -> None:
        self.message = message
        self.keys = keys
        #: The last one of those before it that it must not overtake, or None.
        self.behind: _Waiting | None = None
        #: The parts that are still to be sent in pieces, next first: (blob, buffer).
        self.blobs: deque[tuple[int, memoryview]] = deque()
        #: What of the first one has been sent.
        self.at = 0
        #: The blobs that have been sent whole.
        self.sent: list[int] = []
        self.packet = Packet([])
        #: Bytes of it, and those that are still to be sent.
        self.size_bytes = self.left_bytes = 0

    @property
    def is_begun(self) -> bool:
        """Whether pieces of it have been sent."""
        return bool(self.at or self.sent)


class Outbox:
    """The messages that one connection is still to carry."""

    def __init__(self) -> None:
        self._encoder = Encoder()
        #: Packets that nothing holds back, in order.
        self._ready: deque[Packet] = deque()
        #: Messages in pieces and those that wait behind them, in order.
        self._waiting: list[_Waiting] = []
        self._last_blob = 0
        #: Whose turn it is to send a piece.
        self._turn = 0
        #: Total of what waits.
        self.pending_bytes = 0

    def put(self, message: Message) -> None:
        """Have `message` sent."""
        if self._waiting and isinstance(message, TaskCancel):
            self._abandon(message)
        for part in divide(message, [waiting.keys for waiting in self._waiting]):
            self._put(part)

    def put_encoded(self, header: Any, frames: list[Any]) -> bool:
        """Have an encoded message sent. Return False, having done nothing, if it has to be known first."""
        if self._waiting or len(header) > PIECE_BYTES or any(len(frame) > PIECE_BYTES for frame in frames):
            return False
        self._append(Packet([header, *frames]))
        return True

    def take(self, with_pieces: bool = True) -> Packet | None:
        """Return the next packet, or None; `with_pieces`: also if it is one of what is large."""
        if not self._ready and with_pieces:
            self._next_piece()
        if not self._ready:
            return None
        packet = self._ready.popleft()
        self.pending_bytes -= len(packet)
        return packet

    def _append(self, packet: Packet) -> None:
        self._ready.append(packet)
        self.pending_bytes += len(packet)

    def _put(self, message: Message) -> None:
        header, frames = self._encoder.encode(message)
        parts = [header, *frames]
        large = [index for index, part in enumerate(parts) if len(part) > PIECE_BYTES]
        if not large and not self._waiting:
            self._append(Packet(parts))
            return
        waiting = _Waiting(message, Keys(message))
        waiting.behind = self._last_conflict(waiting, len(self._waiting))
        if not large and waiting.behind is None:
            self._append(Packet(parts))
            return
        self._fill(waiting, parts, large)
        self._waiting.append(waiting)

    def _last_conflict(self, waiting: _Waiting, end: int) -> _Waiting | None:
        """Return the last one of the first `end` that this one must not overtake."""
        # The last one: of many in a row each is behind the one before it, and is looked at once.
        conflict, others = waiting.keys.conflict, self._waiting
        for index in range(end - 1, -1, -1):
            if conflict(others[index].keys):
                return others[index]
        return None

    def _fill(self, waiting: _Waiting, parts: list[Any], large: list[int]) -> None:
        packet = waiting.packet
        packet.parts, packet.blobs = [part for part in parts if len(part) <= PIECE_BYTES], []
        for index in large:
            self._last_blob += 1
            packet.blobs.append((index, self._last_blob))
            waiting.blobs.append((self._last_blob, memoryview(parts[index]).cast("B")))
        waiting.size_bytes = waiting.left_bytes = sum(map(len, parts))
        self.pending_bytes += waiting.left_bytes

    def _next_piece(self) -> None:
        """Have the next piece sent, and what can go then."""
        waiting = self._next_waiting()
        if waiting is None:
            return
        blob, buffer = waiting.blobs[0]
        piece = buffer[waiting.at : waiting.at + PIECE_BYTES]
        waiting.at += len(piece)
        is_last = waiting.at == len(buffer)
        if is_last:
            waiting.blobs.popleft()
            waiting.at = 0
            waiting.sent.append(blob)
        waiting.left_bytes -= len(piece)
        self.pending_bytes -= len(piece)
        self._append(Packet([piece], blob, is_last))
        if not waiting.blobs:
            self._release()

    def _next_waiting(self) -> _Waiting | None:
        """Return the message whose turn it is."""
        free = [waiting for waiting in self._waiting if waiting.behind is None]
        if not free:
            return None
        self._turn += 1
        free = self._may_be_sent(free)
        if self._turn % 2 and len(free) > 1:
            return min(free, key=_left_bytes)
        oldest = free[:MAX_IN_PIECES]
        return oldest[self._turn // 2 % len(oldest)]

    @staticmethod
    def _may_be_sent(free: list[_Waiting]) -> list[_Waiting]:
        """Return those of these messages that have been begun or may be, by the limits of what may be begun."""
        begun = [waiting for waiting in free if waiting.is_begun]
        if len(begun) == len(free):
            return free
        if len(begun) >= 2 * MAX_IN_PIECES:
            return begun
        room = BEGUN_BYTES - sum(waiting.size_bytes for waiting in begun)
        may_be_sent = []
        is_first = True
        for waiting in free:
            if not waiting.is_begun and waiting.size_bytes > SMALL_BYTES:
                # Those that are behind the first of them do not keep it waiting.
                fits = is_first and (not begun or waiting.size_bytes <= room)
                is_first = False
                if not fits:
                    continue
            may_be_sent.append(waiting)
        return may_be_sent

    def _release(self) -> None:
        """Have those messages sent that wait for nothing any more."""
        left: list[_Waiting] = []
        gone: set[int] = set()
        all_waiting, self._waiting = self._waiting, left
        for waiting in all_waiting:
            if waiting.behind is not None and id(waiting.behind) in gone:
                waiting.behind = self._last_conflict(waiting, len(left))
            if waiting.blobs or waiting.behind is not None:
                left.append(waiting)
            else:
                gone.add(id(waiting))
                self.pending_bytes -= waiting.left_bytes
                self._append(waiting.packet)

    def _abandon(self, cancel: TaskCancel) -> None:
        """Do not send what is cancelled. The cancel follows at once.

        What a client has not submitted is not submitted at all, so its cancel waits for nothing: it is not found. An
        agent has to answer for each task, so it gets a call without its payload, but only if the cancel is one that
        stops what runs: a call that runs on must have its payload.
        """
        every = {row[0] for row in cancel.cancels}
        forced = {row[0] for row in cancel.cancels if row[2] == CancelKind.FORCED}
        left: list[_Waiting] = []
        changed: set[int] = set()
        for waiting in self._waiting:
            message = waiting.message
            if isinstance(message, TaskSubmit) and not every.isdisjoint(waiting.keys.tasks):
                tasks = [row for row in message.tasks if row[0] not in every]
                message = msgspec.structs.replace(message, tasks=tasks)
                self._replace(waiting, message)
                changed.add(id(waiting))
                if not (message.tasks or message.functions or message.forget):
                    self.pending_bytes -= waiting.left_bytes
                    continue
            elif isinstance(message, TaskRun) and len(message.tasks) == 1 and message.tasks[0][0] in forced:
                row = message.tasks[0]
                if isinstance(row[-1], Frames):
                    self._replace(waiting, msgspec.structs.replace(message, tasks=[(*row[:-1], b"")]))
                    changed.add(id(waiting))
            left.append(waiting)
        self._waiting = left
        for index, waiting in enumerate(left):
            if waiting.behind is not None and not changed.isdisjoint((id(waiting), id(waiting.behind))):
                waiting.behind = self._last_conflict(waiting, index)
        self._release()

    def _replace(self, waiting: _Waiting, message: TaskSubmit | TaskRun) -> None:
        """Have `message` sent instead of one that has not been sent whole."""
        begun = [*waiting.sent, waiting.blobs[0][0]] if waiting.at else waiting.sent
        for blob in begun:
            self._append(Packet([b""], blob, True))
        self.pending_bytes -= waiting.left_bytes
        waiting.sent, waiting.at = [], 0
        waiting.blobs.clear()
        waiting.message, waiting.keys = message, Keys(message)
        header, frames = self._encoder.encode(message)
        parts = [header, *frames]
        self._fill(waiting, parts, [index for index, part in enumerate(parts) if len(part) > PIECE_BYTES])


def _left_bytes(waiting: _Waiting) -> int:
    return waiting.left_bytes


class Inbox:
    """Puts the packets of one connection together.

    Args:
        max_bytes: Unfinished messages of the peer take no more than this.
    """

    def __init__(self, max_bytes: int = UNFINISHED_BYTES) -> None:
        self._max_bytes = max_bytes
        #: Unfinished blobs, and finished ones whose message has not come; the latter by their negative numbers.
        self._blobs: dict[int, bytearray] = {}
        self._bytes = 0

    def put(self, packet: Packet) -> tuple[Any, list[Any]] | None:
        """Take the next packet. Return header and frames of the message that it completes, if it does.

        Raises:
            RemoteProtocolError: It does not fit what came before, or there is too much of it.
        """
        if packet.piece_of:
            self._put_piece(packet)
            return None
        parts = packet.parts
        if len(parts) + len(packet.blobs) > MAX_FRAMES + 1:
            raise RemoteProtocolError(f"a message of {len(parts) + len(packet.blobs)} parts")
        if packet.blobs:
            parts = list(parts)
            for index, blob in packet.blobs:
                whole = self._blobs.pop(-blob, None) if blob > 0 else None
                if whole is None or not 0 <= index <= len(parts):
                    raise RemoteProtocolError(f"blob {blob} as part {index} of a message")
                self._bytes -= len(whole)
                parts.insert(index, whole)
        if not parts:
            raise RemoteProtocolError("a message without parts")
        return parts[0], parts[1:]

    def _put_piece(self, packet: Packet) -> None:
        if len(packet.parts) != 1 or packet.piece_of < 0 or packet.blobs:
            raise RemoteProtocolError("a piece of several parts")
        blob = packet.piece_of
        (piece,) = packet.parts
        if not piece and packet.is_last:
            # Given up, see `Outbox._abandon`.
            for number in (blob, -blob):
                self._bytes -= len(self._blobs.pop(number, b""))
            return
        whole = self._blobs.get(blob)
        if whole is None:
            if len(self._blobs) >= MAX_BLOBS or -blob in self._blobs:
                raise RemoteProtocolError(f"{len(self._blobs)} blobs, and blob {blob}")
            whole = self._blobs[blob] = bytearray()
        self._bytes += len(piece)
        if self._bytes > self._max_bytes:
            raise RemoteProtocolError(f"more than {self._max_bytes} bytes in unfinished messages")
        whole += piece
        if packet.is_last:
            self._blobs[-blob] = self._blobs.pop(blob)
