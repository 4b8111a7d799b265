"""What a client has to say and its socket has not taken yet. Used by the I/O thread alone, which holds `_io_lock`."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from scaler_executor.protocol.codec import Encoder
from scaler_executor.protocol.messages import Message, TaskSubmit
from scaler_executor.runtime.transport import StreamWriter

if TYPE_CHECKING:
    import socket

#: A TaskSubmit carries at most so many tasks: the scheduler starts on the first while the next is being encoded.
TASKS_PER_MESSAGE: Final = 1000
#: After so many messages the I/O thread looks for answers before it sends more.
MESSAGES_PER_TURN: Final = 16


class Outbox:
    """The messages of one client on their way into its socket.

    Args:
        sock: The socket.
        counts: Whether to know how much waits.
    """

    def __init__(self, sock: socket.socket, *, counts: bool) -> None:
        self._socket = sock
        self._counts = counts
        self._encoder = Encoder()
        self._writer = StreamWriter(sock)
        #: Messages, each with the bytes of payload in it if these are counted; and the sum of those.
        self._queued: deque[tuple[Message, int]] = deque()
        self._queued_bytes = 0

    @property
    def has_unsent(self) -> bool:
        """Whether anything waits."""
        return bool(self._queued or self._writer.pending_bytes)

    @property
    def unsent_bytes(self) -> int:
        """How much waits."""
        return self._queued_bytes + self._writer.pending_bytes

    def forget(self) -> None:
        """Send nothing of what has not been begun."""
        self._queued.clear()
        self._queued_bytes = 0

    def drop(self) -> None:
        """Send nothing of what waits: nobody reads it."""
        self.forget()
        self._writer = StreamWriter(self._socket)

    def queue(self, message: Message) -> None:
        """Send a message behind all others, a large TaskSubmit in pieces."""
        messages = [message]
        if isinstance(message, TaskSubmit) and len(message.tasks) > TASKS_PER_MESSAGE:
            tasks = message.tasks
            steps = range(0, len(tasks), TASKS_PER_MESSAGE)
            pieces = [TaskSubmit(tasks[at : at + TASKS_PER_MESSAGE], parent=message.parent) for at in steps]
            # Functions go before all calls of theirs, and are forgotten behind all.
            pieces[0].functions = message.functions
            pieces[-1].forget = message.forget
            messages = [*pieces]
        for each in messages:
            payload_bytes = _payload_bytes(each) if self._counts else 0
            self._queued_bytes += payload_bytes
            self._queued.append((each, payload_bytes))

    def flush(self) -> None:
        """Write as much as the socket takes, but not so much that answers have to wait."""
        try:
            for _ in range(MESSAGES_PER_TURN):
                if (self._writer.pending_bytes and not self._writer.flush()) or not self._queued:
                    return
                message, payload_bytes = self._queued.popleft()
                self._queued_bytes -= payload_bytes
                self._writer.send(self._encoder.pack(message))
        except ConnectionError:
            self.drop()  # its last words are still to be read, and then it is lost

    def write_rest(self, packet: bytes, sent_bytes: int) -> None:
        """Write what is left of a packet, before anything else."""
        try:
            self._writer.send([memoryview(packet)[sent_bytes:]])
        except ConnectionError:
            pass  # as above


def _payload_bytes(message: Message) -> int:
    """Return what the payloads of a message's tasks take. Where this counts, none has parts in files."""
    return sum([len(row[-1]) for row in message.tasks]) if isinstance(message, TaskSubmit) else 0  # type: ignore[arg-type,misc]
