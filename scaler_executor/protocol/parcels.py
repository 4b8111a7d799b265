"""Large payloads in pieces, so that nothing else waits for them.

A message whose parts are small is one packet. What is large in it, its header or a frame, goes ahead in pieces, and
the message follows when they are all sent; in between goes what has nothing to do with it. This module knows which
messages may overtake which, and puts the pieces together again. It knows neither connections (`link` carries the
packets) nor what becomes of a message.

What may overtake: a message that names no task of those that wait, and needs no function that waits. A client's tasks
keep their order, for they are numbered; so do all calls of a client whose functions wait. Everything else, the news of
a peer's end say, overtakes nothing and is not overtaken.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import msgspec

from scaler_executor.protocol.codec import MAX_FRAMES, Encoder, RemoteProtocolError
from scaler_executor.protocol.messages import (
    AgentCapacity,
    AgentConfirm,
    AgentResult,
    CancelKind,
    ClientGone,
    ClientLimit,
    ClientLimited,
    Frames,
    InheritanceLost,
    InheritanceReplaced,
    Message,
    TaskCancel,
    TaskCancelConfirm,
    TaskDied,
    TaskResult,
    TaskReturned,
    TaskRun,
    TaskRunning,
    TaskSplit,
    TaskSubmit,
    WorkersBroken,
)

#: A part that is larger than this goes in pieces of this size.
PIECE_BYTES: Final = 1 << 16
#: So many messages are sent piece by piece at once; others wait.
MAX_IN_PIECES: Final = 8
#: Rows go in one message up to so many frames, for a message may have `MAX_FRAMES`: calls of several clients, say, of
#: which each is within it.
GROUP_FRAMES: Final = MAX_FRAMES // 4
#: A receiver keeps no more unfinished parts than this of one peer.
MAX_BLOBS: Final = 2 * MAX_IN_PIECES * MAX_FRAMES
#: In the place of a client: this one, where there is only one.
_OWN: Final = -1


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


class _Keys:
    """What a message is about, for `conflict`."""

    __slots__ = ("exclusive", "is_barrier", "owners", "tasks")

    def __init__(self, message: Message) -> None:
        #: Tasks that it names.
        self.tasks: set[int] = set()
        #: Clients to whose calls it adds.
        self.owners: set[int] = set()
        #: Clients of which it says something that their other calls need.
        self.exclusive: set[int] = set()
        self.is_barrier = False
        if isinstance(message, TaskSubmit):
            self.tasks.update(row[0] for row in message.tasks)
            self.exclusive.add(_OWN)
        elif isinstance(message, TaskRun):
            self.tasks.update(row[0] for row in message.tasks)
            self.owners.update(row[2] for row in message.tasks)
            self.exclusive.update(client_id for client_id, _ in [*message.functions, *message.forget])
        elif isinstance(message, TaskCancel):
            self.tasks.update(row[0] for row in message.cancels)
        elif isinstance(message, (TaskResult, AgentResult)):
            self.tasks.update(row[0] for row in message.results)
        elif isinstance(message, (TaskCancelConfirm, AgentConfirm)):
            self.tasks.update(row[0] for row in message.confirms)
        elif isinstance(message, TaskRunning):
            self.tasks.update(message.tasks)
        elif isinstance(message, TaskReturned):
            self.tasks.update(row[0] for row in message.tasks)
        elif isinstance(message, TaskDied):
            self.tasks.update(row[0] for row in message.deaths)
        elif isinstance(message, TaskSplit):
            for task_id, _, at in message.splits:
                self.tasks |= {task_id, task_id + at}
        elif isinstance(
            message,
            (ClientGone, ClientLimit, ClientLimited, InheritanceLost, InheritanceReplaced, WorkersBroken),
        ):
            self.exclusive.add(message.client_id)
        else:
            self.is_barrier = not isinstance(message, AgentCapacity)

    def conflict(self, other: _Keys) -> bool:
        """Tell whether neither may overtake the other."""
        return (
            self.is_barrier
            or other.is_barrier
            or not self.tasks.isdisjoint(other.tasks)
            or not self.exclusive.isdisjoint(other.exclusive)
            or not self.exclusive.isdisjoint(other.owners)
            or not self.owners.isdisjoint(other.exclusive)
        )


class _Waiting:
    """A message that goes in pieces, or that waits behind one."""

    __slots__ = ("at", "blobs", "keys", "message", "packet", "sent", "sizes")

    def __init__(self, message: Message, keys: _Keys) -> None:
        self.message = message
        self.keys = keys
        #: The parts that are still to be sent in pieces, next first: (blob, buffer).
        self.blobs: deque[tuple[int, memoryview]] = deque()
        #: What of the first one has been sent.
        self.at = 0
        #: The blobs that have been sent whole.
        self.sent: list[int] = []
        self.packet = Packet([])
        #: Bytes of it that are still to be sent.
        self.sizes = 0


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
        for part in _split(message):
            self._put(part)

    def put_encoded(self, header: Any, frames: list[Any]) -> bool:
        """Have an encoded message sent. Return False, having done nothing, if it has to be known first."""
        if self._waiting or len(header) > PIECE_BYTES or any(len(frame) > PIECE_BYTES for frame in frames):
            return False
        self._append(Packet([header, *frames]))
        return True

    def take(self) -> Packet | None:
        """Return the next packet, or None."""
        if not self._ready:
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
        waiting = _Waiting(message, _Keys(message))
        if not large and not any(waiting.keys.conflict(other.keys) for other in self._waiting):
            self._append(Packet(parts))
            return
        self._fill(waiting, parts, large)
        self._waiting.append(waiting)

    def _fill(self, waiting: _Waiting, parts: list[Any], large: list[int]) -> None:
        packet = waiting.packet
        packet.parts, packet.blobs = [part for part in parts if len(part) <= PIECE_BYTES], []
        for index in large:
            self._last_blob += 1
            packet.blobs.append((index, self._last_blob))
            waiting.blobs.append((self._last_blob, memoryview(parts[index]).cast("B")))
        waiting.sizes = sum(map(len, parts))
        self.pending_bytes += waiting.sizes

    def _next_piece(self) -> None:
        """Have the next piece sent, and what can go then; the messages that go in pieces take turns."""
        candidates = []
        for index, waiting in enumerate(self._waiting):
            if waiting.blobs and not any(waiting.keys.conflict(other.keys) for other in self._waiting[:index]):
                candidates.append(waiting)
                if len(candidates) == MAX_IN_PIECES:
                    break
        if not candidates:
            return
        self._turn += 1
        waiting = candidates[self._turn % len(candidates)]
        blob, buffer = waiting.blobs[0]
        piece = buffer[waiting.at : waiting.at + PIECE_BYTES]
        waiting.at += len(piece)
        is_last = waiting.at == len(buffer)
        if is_last:
            waiting.blobs.popleft()
            waiting.at = 0
            waiting.sent.append(blob)
        waiting.sizes -= len(piece)
        self.pending_bytes -= len(piece)
        self._append(Packet([piece], blob, is_last))
        if not waiting.blobs:
            self._release()

    def _release(self) -> None:
        """Have those messages sent that wait for nothing any more."""
        left: list[_Waiting] = []
        for waiting in self._waiting:
            if waiting.blobs or any(waiting.keys.conflict(other.keys) for other in left):
                left.append(waiting)
            else:
                self.pending_bytes -= waiting.sizes
                self._append(waiting.packet)
        self._waiting = left

    def _abandon(self, cancel: TaskCancel) -> None:
        """Do not send what is cancelled. The cancel follows at once.

        What a client has not submitted is not submitted at all, so its cancel waits for nothing: it is not found. An
        agent has to answer for each task, so it gets a call without its payload, but only if the cancel is one that
        stops what runs: a call that runs on must have its payload.
        """
        every = {row[0] for row in cancel.cancels}
        forced = {row[0] for row in cancel.cancels if row[2] == CancelKind.FORCED}
        left: list[_Waiting] = []
        for waiting in self._waiting:
            message = waiting.message
            if isinstance(message, TaskSubmit) and not every.isdisjoint(waiting.keys.tasks):
                message = TaskSubmit(
                    [row for row in message.tasks if row[0] not in every],
                    message.functions,
                    message.forget,
                    message.parent,
                )
                self._replace(waiting, message)
                if not (message.tasks or message.functions or message.forget):
                    self.pending_bytes -= waiting.sizes
                    continue
            elif isinstance(message, TaskRun) and len(message.tasks) == 1 and message.tasks[0][0] in forced:
                row = message.tasks[0]
                if isinstance(row[-1], Frames):
                    self._replace(waiting, TaskRun([(*row[:-1], b"")], message.functions, message.forget))
            left.append(waiting)
        self._waiting = left
        self._release()

    def _replace(self, waiting: _Waiting, message: TaskSubmit | TaskRun) -> None:
        """Have `message` sent instead of one that has not been sent whole."""
        begun = [*waiting.sent, waiting.blobs[0][0]] if waiting.at else waiting.sent
        for blob in begun:
            self._append(Packet([b""], blob, True))
        self.pending_bytes -= waiting.sizes
        waiting.sent, waiting.at = [], 0
        waiting.blobs.clear()
        waiting.message, waiting.keys = message, _Keys(message)
        header, frames = self._encoder.encode(message)
        parts = [header, *frames]
        self._fill(waiting, parts, [index for index, part in enumerate(parts) if len(part) > PIECE_BYTES])


def _split(message: Message) -> list[Message]:
    """Make messages of their own of rows with large payloads, and of functions that are large or go before them."""
    if isinstance(message, (TaskSubmit, TaskRun)):
        rows: list[Any] = message.tasks
    elif isinstance(message, (TaskResult, AgentResult)):
        rows = message.results
    else:
        return [message]
    groups: list[list[Any]] = [[]]
    frames = 0
    for row in rows:
        payload = row[-1]
        if type(payload) is Frames:
            if _is_large(payload):
                groups += [[row], []]
                frames = 0
                continue
            frames += len(payload.buffers)
            if frames > GROUP_FRAMES:
                groups.append([])
                frames = len(payload.buffers)
        groups[-1].append(row)
    groups = [group for group in groups if group]
    if isinstance(message, TaskSubmit):
        large = _are_large([function.blob for function in message.functions])
        if len(groups) < 2 and not (groups and _is_large(groups[0][0][-1])) and not large:
            return [message]
        submits: list[Message] = [TaskSubmit([], [function]) for function in message.functions]
        submits += [TaskSubmit(group, parent=message.parent) for group in groups]
        return [*submits, TaskSubmit([], forget=message.forget)] if message.forget else submits
    if isinstance(message, TaskRun):
        large = _are_large([function.blob for _, function in message.functions])
        if len(groups) < 2 and not (groups and _is_large(groups[0][0][-1])) and not large:
            return [message]
        runs: list[Message] = [TaskRun([], [function]) for function in message.functions]
        runs += [TaskRun(group) for group in groups]
        return [*runs, TaskRun([], [], message.forget)] if message.forget else runs
    if len(groups) < 2:
        return [message]
    if isinstance(message, TaskResult):
        return [TaskResult(group) for group in groups]
    return [AgentResult(group) for group in groups]


def _are_large(blobs: list[Any]) -> bool:
    frames = sum(len(blob.buffers) for blob in blobs if type(blob) is Frames)
    return frames > GROUP_FRAMES or any(map(_is_large, blobs))


def _is_large(payload: Any) -> bool:
    return type(payload) is Frames and (
        len(payload.buffers) > GROUP_FRAMES or any(len(buffer) > PIECE_BYTES for buffer in payload.buffers)
    )


class Inbox:
    """Puts the packets of one connection together.

    Args:
        max_bytes: Unfinished messages of the peer take no more than this.
    """

    def __init__(self, max_bytes: int = 1 << 40) -> None:
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
