"""Large buffers in files in shared memory: written once by the sender, mapped copy-on-write by whoever reads them.

This module knows the files, their directory and who removes what. It does not know what the buffers are parts of.

Each executor has a directory of its own, for its client and its workers. Files are written with `write`, never
through a mapping: where there is no room that is an error, not SIGBUS, and the buffer then travels beside its message,
as it does where there is no shared memory. A reader sees a private copy that costs nothing until it is written to.

Who removes a file: arguments, functions and definitions the client, when no call is left that may need them (a call
may be started more than once, on another worker, so its reader cannot); a result whoever has it, from the worker that
writes it through the agent, which takes it over with the record in the pipe, to the client, which maps it as it comes
and removes it at once. An owner is a `StoredSegment`, and its end is the file's: no path on which a payload is dropped
has to think of it. What a worker had written when it was killed and nobody has heard of, the agent removes.

The directory is locked as long as its client lives. So whoever gets the lock may remove it with all that is in it: the
cluster's processes when they end without their client, or, if they all were killed at once, the next start. The forker,
which may end just before a client that is killed too, leaves a process that waits for that.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import threading
import weakref
from functools import lru_cache
from typing import Any, Final

from scaler_executor.protocol.messages import Frames
from scaler_executor.protocol.segment import CLIENT_WRITER, Segment
from scaler_executor.runtime import platform

#: Smaller buffers travel beside their message. Measured with two cores, time by file over time by the pair, for one
#: call after the other and for many at once: 192 KB 1.2 and 0.7, 384 KB 1.4 and 0.5, 768 KB 1.1 and 0.7, 1.5 MB 0.75
#: and 0.4, 12 MB 0.5 to 0.9 and 0.7.
SEGMENT_BYTES: Final = 1 << 19
#: The client looks at so many of its last files for the same content.
RECENT: Final = 16
#: Names a directory for large payloads, instead of the system's shared memory; empty: there is to be none.
VARIABLE: Final = "SCALER_EXECUTOR_SHARED_MEMORY"

_PREFIX: Final = "scaler-executor"
#: A part of the file system that is left to others: one that is full gives them errors, or SIGBUS.
_FREE_SHARE: Final = 4
_MAP_FIXED: Final = 0x10
_VIEW_BYTES: Final = 1 << 30
#: Content is compared in pieces that stay in the cache.
_COMPARED_BYTES: Final = 1 << 18


class _Mapping(mmap.mmap):
    """A file that is mapped copy-on-write."""

    #: Which; None: it is this process's alone.
    source: Segment | None = None


class _Ownership:
    """How many segments of this process stand for a file. The last one removes it."""

    __slots__ = ("count", "key")

    def __init__(self, key: tuple[int, int] | None = None) -> None:
        #: Changed under the store's lock.
        self.count = 1
        #: In `SegmentStore._recent`.
        self.key = key


class StoredSegment(Segment):
    """A segment that can be mapped.

    Args:
        store: Where it is.
        writer, number, size_bytes: As `Segment`.
        ownership: Of the file, which is removed with the last of its owners; None: somebody else removes it.
        is_kept: Whether it stays this object's when a message names it.
    """

    __slots__ = ("_is_kept", "_mapping", "_ownership", "_store")

    def __init__(
        self,
        store: SegmentStore,
        writer: int,
        number: int,
        size_bytes: int,
        ownership: _Ownership | None = None,
        *,
        is_kept: bool = False,
    ) -> None:
        super().__init__(writer, number, size_bytes)
        self._store = store
        self._ownership = ownership
        self._is_kept = is_kept
        self._mapping: Any = None

    def pass_on(self) -> None:
        """As `Segment`."""
        if not self._is_kept:
            self._ownership = None

    def own(self) -> None:
        """Have the file removed with this object from now on."""
        self._ownership = _Ownership()

    def map(self) -> Any:
        """Return the content, a writable buffer of the caller's own. Each call of a segment that was taken over returns
        the same one.

        Raises:
            OSError: It cannot be read.
        """
        if self._mapping is not None:
            return self._mapping
        fd = _open(self._store.path_of(self), os.O_RDONLY)
        try:
            mapping = _map(fd, self.size_bytes)
        finally:
            os.close(fd)
        if self._ownership is not None:
            self._mapping = mapping
            self._let_go()
        else:
            self._store.note_argument(self, mapping)
        return mapping

    def _let_go(self) -> None:
        ownership, self._ownership = self._ownership, None
        if ownership is not None:
            self._store.release(self, ownership)

    def __del__(self) -> None:
        self._let_go()


class SegmentStore:
    """The directory, as one process sees it. Thread-safe.

    Args:
        path: Made by `SegmentDirectory`.
        writer: Under which this process writes.
        max_bytes: Of what was written here and has not been removed; None: what the file system has room for.
    """

    def __init__(self, path: str, writer: int, max_bytes: int | None = None) -> None:
        self.path = path
        self.writer = writer
        self._max_bytes = max_bytes
        #: Reentrant: a signal handler may submit while this thread is in here, and a finalizer give a segment back.
        self._lock = threading.RLock()
        self._last_number = 0
        self._used_bytes = 0
        #: {(id of the object whose content it is, size): file}: the client's last ones that are still there.
        self._recent: dict[tuple[int, int], tuple[int, _Ownership]] = {}
        #: {address: mapping} of the arguments that this process has.
        self._arguments: weakref.WeakValueDictionary[int, _Mapping] = weakref.WeakValueDictionary()
        #: A fork of this process removes nothing that it has copies of.
        self._pid = os.getpid()

    def path_of(self, segment: Segment) -> str:
        """Return the path of a segment's file."""
        return f"{self.path}/{segment.name}"

    def put(self, buffers: list[Any], size_bytes: int) -> StoredSegment | None:
        """Write buffers into a file, one behind the other. Return None where there is no room.

        An object that the client has put before, for a call that is not over, and that has not changed since, is not
        written again, nor is an argument that a call returns as it came. Whether it has changed is seen by comparing
        all of it: that takes a fraction of the time that new memory takes.

        Args:
            buffers: Contiguous, `size_bytes` together.
        """
        if self._pid != os.getpid():
            return None
        if self.writer != CLIENT_WRITER:
            return self._link(buffers, size_bytes) or self._write(buffers, size_bytes)
        key = _origin(buffers), size_bytes
        before = self._find_recent(key)
        if before is not None and self._is_same(before, buffers):
            return before
        return self._write(buffers, size_bytes, key)

    def _link(self, buffers: list[Any], size_bytes: int) -> StoredSegment | None:
        """Give the file of an argument a second name, if this is the argument and has not changed."""
        if len(buffers) != 1 or not self._arguments:
            return None
        argument = self._arguments.get(_address(buffers[0]))
        source = argument.source if argument is not None else None
        if source is None or source.size_bytes != size_bytes or not self._is_same(source, buffers):
            return None
        with self._lock:
            self._last_number = number = self._last_number + 1
        segment = StoredSegment(self, self.writer, number, size_bytes)
        try:
            os.link(self.path_of(source), self.path_of(segment))
        except OSError:
            return None
        segment.own()
        return segment

    def _find_recent(self, key: tuple[int, int]) -> StoredSegment | None:
        with self._lock:
            recent = self._recent.get(key)
            if recent is None:
                return None
            number, ownership = recent
            ownership.count += 1
            return StoredSegment(self, self.writer, number, key[1], ownership, is_kept=True)

    def _write(self, buffers: list[Any], size_bytes: int, key: tuple[int, int] | None = None) -> StoredSegment | None:
        if not self._reserve(size_bytes):
            return None
        with self._lock:
            self._last_number = number = self._last_number + 1
        ownership = _Ownership(key)
        segment = StoredSegment(self, self.writer, number, size_bytes, ownership, is_kept=key is not None)
        try:
            fd = _open(self.path_of(segment), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except OSError:
            return None  # the segment gives the bytes back, and there is no file to be removed
        try:
            end = 0
            for buffer in buffers:
                end = _write(fd, end, buffer)
            os.ftruncate(fd, end)
        except OSError:
            return None  # full: other programs were quicker
        finally:
            os.close(fd)
        if key is not None:
            with self._lock:
                self._recent.pop(key, None)
                self._recent[key] = number, ownership
                if len(self._recent) > RECENT:
                    del self._recent[next(iter(self._recent))]
        return segment

    def _is_same(self, segment: Segment, buffers: list[Any]) -> bool:
        """Tell whether this is what the file holds."""
        piece = bytearray(min(segment.size_bytes, _COMPARED_BYTES))
        at = 0
        try:
            fd = _open(self.path_of(segment), os.O_RDONLY)
        except OSError:
            return False
        try:
            for buffer in buffers:
                with memoryview(buffer) as view, view.cast("B") as rest, memoryview(piece) as room:
                    for start in range(0, len(rest), len(piece)):
                        wanted = rest[start : start + len(piece)]
                        if os.preadv(fd, [room[: len(wanted)]], at) != len(wanted):
                            return False
                        # A bytearray's comparison is memcmp, a memoryview's is not: so the bytearray stands first.
                        if (piece if len(wanted) == len(piece) else piece[: len(wanted)]) != wanted:
                            return False
                        at += len(wanted)
        except OSError:
            return False
        finally:
            os.close(fd)
        return at == segment.size_bytes

    def note_argument(self, segment: Segment, mapping: _Mapping) -> None:
        """Note where a file is mapped that somebody else removes."""
        mapping.source = Segment(segment.writer, segment.number, segment.size_bytes)
        self._arguments[_address(mapping)] = mapping

    def refer(self, writer: int, number: int, size_bytes: int) -> StoredSegment:
        """Return a segment that somebody else removes."""
        return StoredSegment(self, writer, number, size_bytes)

    def take(self, writer: int, number: int, size_bytes: int) -> StoredSegment:
        """Return a segment that is this process's from now on."""
        return StoredSegment(self, writer, number, size_bytes, _Ownership())

    def take_mapped(self, writer: int, number: int, size_bytes: int) -> Any:
        """Map what is this process's from now on, and return that; the segment where it cannot be mapped now."""
        segment = self.take(writer, number, size_bytes)
        try:
            return segment.map()
        except OSError:
            return segment  # whoever reads it tries again, and says what is wrong

    def release(self, segment: Segment, ownership: _Ownership) -> None:
        """Remove a segment's file if this was its last owner, and this process still is who it was."""
        if self._pid != os.getpid():
            return
        with self._lock:
            ownership.count -= 1
            if ownership.count:
                return
            if ownership.key is not None and self._recent.get(ownership.key, (0, None))[1] is ownership:
                del self._recent[ownership.key]
            if segment.writer == self.writer:
                self._used_bytes -= segment.size_bytes
        try:
            os.unlink(self.path_of(segment))
        except OSError:
            pass  # with the directory, say

    def remove_unheard(self, writer: int, last_number: int) -> None:
        """Remove what a dead worker has written behind its file `last_number`."""
        try:
            names = os.listdir(self.path)
        except OSError:
            return
        for name in names:
            of, _, number = name.partition("-")
            if of == f"{writer:x}" and int(number, 16) > last_number:
                try:
                    os.unlink(f"{self.path}/{name}")
                except OSError:
                    pass

    def _reserve(self, size_bytes: int) -> bool:
        try:
            room = os.statvfs(self.path)
        except OSError:
            return False
        free_bytes = room.f_bavail * room.f_frsize
        if room.f_blocks and free_bytes - size_bytes < room.f_blocks * room.f_frsize // _FREE_SHARE:
            return False
        with self._lock:
            if self._max_bytes is not None and self._used_bytes + size_bytes > self._max_bytes:
                return False
            self._used_bytes += size_bytes
        return True


def _origin(buffers: list[Any]) -> int:
    """Return the id of the object that most of the content comes from."""
    largest = max(buffers, key=len)
    return id(largest.obj if isinstance(largest, memoryview) else largest)


def place(store: SegmentStore | None, buffers: list[Any]) -> list[Any]:
    """Return the buffers of a payload with a segment for each that is large and finds room.

    Args:
        store: None: no buffer is put into a file.
        buffers: The pickle and its out-of-band buffers. A list stands for its parts, one behind the other.
    """
    placed: list[Any] = []
    for buffer in buffers:
        parts = buffer if isinstance(buffer, list) else [buffer]
        size_bytes = sum(map(len, parts))
        segment = store.put(parts, size_bytes) if store is not None and size_bytes >= SEGMENT_BYTES else None
        if segment is not None:
            placed.append(segment)
        else:
            placed.append(b"".join(buffer) if isinstance(buffer, list) else buffer)
    return placed


def copied(buffers: list[Any]) -> list[Any]:
    """Return the buffers of a payload as they are now, whatever becomes of what they show."""
    return [buffer if isinstance(buffer, Segment) else bytes(buffer) for buffer in buffers]


def mapped(buffers: list[Any]) -> list[Any]:
    """Return the buffers of a payload, those in files mapped; raises what that raises."""
    return [buffer.map() if isinstance(buffer, StoredSegment) else buffer for buffer in buffers]


def holds_segments(payload: Any) -> bool:
    """Tell whether a payload has a part in a file."""
    return isinstance(payload, Frames) and any(isinstance(buffer, Segment) for buffer in payload.buffers)


class SegmentDirectory:
    """An executor's directory in shared memory, made and locked by the client's process.

    Args:
        base: Where.

    Raises:
        OSError: There can be none.
    """

    def __init__(self, base: str) -> None:
        sweep(base)
        while True:
            path = f"{base}/{_PREFIX}-{os.getuid()}-{os.urandom(6).hex()}"
            os.mkdir(path, 0o700)
            fd = _lock(path)
            if fd is not None:
                break
            # A process that is just starting took it for abandoned, and has removed it.
        self.path = path
        self._fd = fd

    @classmethod
    def create(cls) -> SegmentDirectory | None:
        """Make one where the environment says. Return None where there can be none."""
        base = os.environ.get(VARIABLE)
        if base is None:
            base = platform.shared_memory_path()
        try:
            return cls(base) if base else None
        except OSError:
            return None

    def store(self) -> SegmentStore:
        """Return the client's view, for at most half of the machine's memory."""
        return SegmentStore(self.path, CLIENT_WRITER, platform.memory_bytes() // 2)

    def close(self) -> None:
        """Let go of it, as a fork of the client must: it is no longer locked when the client has gone too."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self) -> None:
        """Remove it, whatever is in it. The cluster's processes are gone."""
        if self._fd >= 0:
            remove_tree(self.path)
            self.close()


def remove_abandoned(path: str, *, waits: bool = False) -> bool:
    """Remove an executor's directory if its client is gone; `waits`: as soon as it is. An empty one is removed in any
    case: only whoever ends after the executor's last call does this. Return whether there is none."""
    fd = _lock(path, waits=waits)
    if fd is not None:
        remove_tree(path)
        os.close(fd)
    else:
        try:
            os.rmdir(path)
        except OSError:
            pass
    return not os.path.exists(path)


def sweep(base: str) -> None:
    """Remove what executors of this user have left of which every process was killed."""
    try:
        names = os.listdir(base)
    except OSError:
        return
    for name in names:
        if name.startswith(f"{_PREFIX}-{os.getuid()}-") and (fd := _lock(f"{base}/{name}")) is not None:
            remove_tree(f"{base}/{name}")
            os.close(fd)


def _lock(path: str, *, waits: bool = False) -> int | None:
    """Lock a directory of this user's. Return the descriptor, None if it is locked or gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(fd)
        if status.st_uid == os.getuid() and os.path.samestat(status, os.stat(path)):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def remove_tree(path: str) -> None:
    """Remove a directory of files. A worker that is being killed may still write some."""
    for _ in range(100):
        try:
            for name in os.listdir(path):
                try:
                    os.unlink(f"{path}/{name}")
                except FileNotFoundError:
                    pass
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError:
            continue


def _open(path: str, flags: int) -> int:
    """Open a file. A call may have closed stdout, say, and left threads that go on printing: not into this file, or at
    most before it is written."""
    return platform.move_away(os.open(path, flags | os.O_CLOEXEC, 0o600))


def _write(fd: int, at: int, buffer: Any) -> int:
    """Write a buffer at a place, whatever stands there. Return where it ends."""
    with memoryview(buffer) as view, view.cast("B") as rest:
        end = at + len(rest)
        while at < end:
            at += os.pwrite(fd, rest[len(rest) - (end - at) :][:_VIEW_BYTES], at)
    return end


def _address(buffer: Any) -> int:
    """Return where a buffer is, 0 if it is read-only."""
    ctypes, _ = _libc()
    try:
        return int(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
    except (TypeError, ValueError, BufferError):
        return 0


def _map(fd: int, size_bytes: int) -> _Mapping:
    """Map a file copy-on-write. No descriptor is kept: there may be thousands."""
    if sys.version_info >= (3, 13):
        return _Mapping(fd, size_bytes, access=mmap.ACCESS_COPY, trackfd=False)
    # Room of the right size, and then the file in its place: `mmap` on a file keeps a descriptor for life.
    mapping = _Mapping(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if os.fstat(fd).st_size < size_bytes:
        raise OSError("a file in shared memory is shorter than it was written")  # or reading it would be SIGBUS
    _map_over(mapping, fd, size_bytes)
    return mapping


@lru_cache(maxsize=1)
def _libc() -> Any:
    """Return libc's mmap and what else `_map_over` needs; made once, for each time would leave garbage."""
    import ctypes

    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    return ctypes, function


def _map_over(mapping: mmap.mmap, fd: int, size_bytes: int) -> None:
    """Put a file in the place of anonymous memory."""
    ctypes, function = _libc()
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    if function(address, size_bytes, protection, flags, fd, 0) != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
