"""A large buffer that does not travel: it stands in a file in shared memory, and messages name the file.

This module knows how such a file is named, on the wire and in a worker's pipe. It does not know the files themselves,
nor who removes them: see `scaler_executor.runtime.segments`.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, Final

#: On the wire, behind the number of a payload's buffers: index of the buffer, writer, number and size in bytes.
SEGMENT_ENTRY: Final = Struct("<IQQQ")
#: In a worker's pipe, in the place of a frame: writer, number and size in bytes.
SEGMENT_FRAME: Final = Struct("<QQQ")
#: Added there to the frame's length.
SEGMENT_MARK: Final = 1 << 63
#: As writer: the user's process. Any other: the worker of this number.
CLIENT_WRITER: Final = 0


class Segment:
    """Stands in `Frames` for a buffer that is in a file.

    Args:
        writer: Who wrote it, see `CLIENT_WRITER`.
        number: Counts the files of one writer.
        size_bytes: Of the buffer, more than 0.
    """

    __slots__ = ("number", "size_bytes", "writer")

    def __init__(self, writer: int, number: int, size_bytes: int) -> None:
        self.writer = writer
        self.number = number
        self.size_bytes = size_bytes

    def __len__(self) -> int:
        """Return the buffer's size in bytes."""
        return self.size_bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segment) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Segment({self.writer}, {self.number}, {self.size_bytes} bytes)"

    def _key(self) -> tuple[int, int, int]:
        return self.writer, self.number, self.size_bytes

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.writer:x}-{self.number:x}"

    def pass_on(self) -> None:
        """A message that names it is being sent: where it was this process's to remove, it is the receiver's now."""


def pack_frame(segment: Segment) -> bytes:
    """Return what stands in a worker's pipe."""
    return SEGMENT_FRAME.pack(segment.writer, segment.number, segment.size_bytes)


def pack_payload(buffers: list[Any]) -> tuple[bytes, list[Any]]:
    """Return what the message says of a payload, and the buffers that travel beside it."""
    data = len(buffers).to_bytes(4, "little")
    frames = [buffer for buffer in buffers if not isinstance(buffer, Segment)]
    if len(frames) < len(buffers):
        for index, buffer in enumerate(buffers):
            if isinstance(buffer, Segment):
                data += SEGMENT_ENTRY.pack(index, buffer.writer, buffer.number, buffer.size_bytes)
                buffer.pass_on()
    return data, frames


def unpack_entries(data: Any, count: int) -> list[tuple[int, int, int, int]] | None:
    """Return the entries of `SEGMENT_ENTRY` that a message has of a payload with `count` buffers, None if it is none
    of `pack_payload`."""
    if len(data) % SEGMENT_ENTRY.size:
        return None
    entries: list[tuple[int, int, int, int]] = list(SEGMENT_ENTRY.iter_unpack(data))
    before = -1
    for index, _, _, size_bytes in entries:
        if not before < index < count or not 0 < size_bytes < SEGMENT_MARK:
            return None
        before = index
    return entries
