"""Large buffers in files: what they hold, who removes them, and what happens where there is no room."""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import resource
import signal
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaler_executor.errors import TaskTooLargeError
from scaler_executor.protocol.messages import Frames
from scaler_executor.protocol.segment import Segment
from scaler_executor.runtime import segments
from scaler_executor.runtime.calls import CallPickler, load_item, load_run, loads_value
from scaler_executor.runtime.namespace import MainDefinitions
from scaler_executor.runtime.segments import (
    SEGMENT_BYTES,
    SegmentDirectory,
    SegmentStore,
    StoredSegment,
    mapped,
    remove_abandoned,
    sweep,
)

SIZE = 1_000_003


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[SegmentDirectory]:
    directory = SegmentDirectory(str(tmp_path))
    yield directory
    directory.remove()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def store(directory: SegmentDirectory) -> SegmentStore:
    """The client's view."""
    return directory.store()


@pytest.fixture
def worker(directory: SegmentDirectory) -> SegmentStore:
    """A worker's view."""
    return SegmentStore(directory.path, 7)


def put(store: SegmentStore, *buffers: Any) -> StoredSegment:
    segment = store.put(list(buffers), sum(map(len, buffers)))
    assert segment is not None
    return segment


def files(store: SegmentStore) -> list[str]:
    return sorted(os.listdir(store.path))


def in_child(function: Callable[[], Any]) -> int:
    """Run a function in a fork of this process; return its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Content


def test_content(store: SegmentStore) -> None:
    """Buffers come back as one, byte for byte."""
    data = os.urandom(SIZE)
    segment = put(store, b"head", memoryview(bytearray(data)), b"tail")
    assert len(segment) == SIZE + 8
    assert bytes(segment.map()) == b"head" + data + b"tail"


def test_mappings_are_private_and_writable(store: SegmentStore) -> None:
    """What a reader writes nobody else sees."""
    segment = put(store, bytes(SIZE))
    reader = SegmentStore(store.path, 9).refer(0, segment.number, SIZE)
    mine = reader.map()
    mine[0] = 1
    assert reader.map()[0] == 0
    with open(store.path_of(segment), "rb") as file:
        assert file.read(1) == b"\0"


def test_mappings_keep_no_descriptor(worker: SegmentStore) -> None:
    """Thousands of large values do not use up the descriptors."""
    before = open_descriptors()
    written = [put(worker, bytes([number]) * SEGMENT_BYTES) for number in range(20)]
    for segment in written:
        segment.pass_on()
    kept = [worker.take_mapped(7, segment.number, SEGMENT_BYTES) for segment in written]
    assert open_descriptors() == before
    assert [mapping[-1] for mapping in kept] == list(range(20))
    assert all(isinstance(mapping, mmap.mmap) for mapping in kept)


def test_a_shorter_file_is_an_error(store: SegmentStore) -> None:
    """Reading what is not there would be SIGBUS."""
    segment = put(store, bytes(SIZE))
    os.truncate(store.path_of(segment), 10)
    with pytest.raises((OSError, ValueError)):
        store.refer(0, segment.number, SIZE).map()


# Who removes


def test_the_end_of_the_owner_is_the_files(store: SegmentStore) -> None:
    """A payload that is dropped takes its file along."""
    segment = put(store, bytes(SIZE))
    assert len(files(store)) == 1
    del segment
    assert files(store) == []


def test_the_client_keeps_what_it_sends(store: SegmentStore) -> None:
    """Arguments are the client's until it lets go of them."""
    segment = put(store, bytes(SIZE))
    segment.pass_on()
    del segment
    assert files(store) == []


def test_a_result_passes_from_hand_to_hand(worker: SegmentStore) -> None:
    """From the worker to the agent to the client, which removes the file and keeps the content."""
    segment = put(worker, b"x" * SIZE)
    number = segment.number
    segment.pass_on()
    del segment
    assert len(files(worker)) == 1
    agent = SegmentStore(worker.path, -1)
    taken = agent.take(7, number, SIZE)
    taken.pass_on()
    del taken
    assert len(files(worker)) == 1
    mapping = SegmentStore(worker.path, 0).take_mapped(7, number, SIZE)
    assert files(worker) == [] and bytes(mapping) == b"x" * SIZE


def test_a_result_that_nobody_wants(worker: SegmentStore) -> None:
    """A result that the agent drops is removed."""
    segment = put(worker, b"x" * SIZE)
    segment.pass_on()
    taken = SegmentStore(worker.path, -1).take(7, segment.number, SIZE)
    del taken
    assert files(worker) == []


def test_what_cannot_be_mapped_now_can_be_later(worker: SegmentStore) -> None:
    """Without a free descriptor the client keeps the file, and reading it is what fails, or not."""
    segment = put(worker, b"x" * SIZE)
    segment.pass_on()
    client = SegmentStore(worker.path, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd"))) + 1
    holes = [os.dup(0) for _ in range(used - open_descriptors() + 2)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(holes) + 1, hard))
    try:
        kept = client.take_mapped(7, segment.number, SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in holes:
            os.close(fd)
    assert isinstance(kept, StoredSegment) and len(files(worker)) == 1
    assert bytes(mapped([kept])[0]) == b"x" * SIZE
    assert files(worker) == []


def test_a_fork_removes_nothing(store: SegmentStore) -> None:
    """The copies of a forked child are nothing to it, and it writes nothing."""
    segments = [put(store, bytes(SIZE))]

    def child() -> None:
        segments.clear()
        assert store.put([bytes(SIZE)], SIZE) is None

    assert in_child(child) == 0
    assert len(files(store)) == 1


def test_what_a_dead_worker_has_not_told(worker: SegmentStore) -> None:
    """Of a worker that was killed, the files that no record named are removed, and no others."""
    kept = [put(worker, bytes([number]) * SIZE) for number in range(3)]
    other = put(SegmentStore(worker.path, 0x77), bytes(SIZE))
    for segment in kept:
        segment.pass_on()
    SegmentStore(worker.path, -1).remove_unheard(7, 2)
    assert files(worker) == ["7-1", "7-2", other.name]


# The same object again


def test_an_unchanged_object_is_written_once(store: SegmentStore) -> None:
    """Calls that wait together share the file of an argument that has not changed."""
    data = bytearray(os.urandom(SIZE))
    one, two = put(store, data), put(store, data)
    assert one == two and len(files(store)) == 1
    del one
    assert bytes(two.map()) == data
    del two
    assert files(store) == []


@pytest.mark.parametrize("at", [0, SIZE // 2, SIZE - 1])
def test_a_changed_object_is_another(store: SegmentStore, at: int) -> None:
    """Each call sees the argument as it was when it was made, wherever that has changed."""
    data = bytearray(SIZE)
    one = put(store, data)
    data[at] = 1
    two = put(store, data)
    assert (one.map()[at], two.map()[at]) == (0, 1)


def test_parts_are_compared_as_one(store: SegmentStore) -> None:
    """A pickle whose small parts differ is another, though its large part is the same object."""
    data = bytes(SIZE)
    one, two, three = put(store, b"a", data, b"z"), put(store, b"b", data, b"z"), put(store, b"b", data, b"y")
    four = put(store, b"b", data, b"y")
    assert four == three != two
    assert [bytes(segment.map()[:: SIZE + 1]) for segment in (one, two, three)] == [b"az", b"bz", b"by"]


def test_threads_share_and_let_go(store: SegmentStore) -> None:
    """Whoever finds a file that is just being let go of has it, or writes another: it is never gone under him."""
    data = os.urandom(SEGMENT_BYTES)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                assert store.refer(0, put(store, data).number, SEGMENT_BYTES) is not None
                segment = put(store, data)
                assert os.path.exists(store.path_of(segment))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and files(store) == []


@pytest.mark.parametrize("changed_at", [None, 0, SIZE - 1])
def test_an_argument_that_is_returned(store: SegmentStore, worker: SegmentStore, changed_at: int | None) -> None:
    """A call that returns its argument unchanged writes nothing; what each side does with its own is its own."""
    argument = put(store, os.urandom(SIZE))
    mine = worker.refer(0, argument.number, SIZE).map()
    if changed_at is not None:
        mine[changed_at] ^= 1
    result = put(worker, memoryview(mine))
    is_linked = os.path.samefile(store.path_of(argument), worker.path_of(result))
    assert is_linked == (changed_at is None)
    expected = bytes(mine)
    result.pass_on()
    mine[1] ^= 1
    arrived = store.take_mapped(7, result.number, SIZE)
    assert bytes(arrived) == expected
    arrived[2] ^= 1
    assert bytes(store.refer(0, argument.number, SIZE).map()[3 : SIZE - 1]) == expected[3 : SIZE - 1]
    assert files(store) == [argument.name]
    del argument
    assert files(store) == []


# Room


def test_budget(directory: SegmentDirectory) -> None:
    """No more than so many bytes wait in files; what is let go of makes room."""
    store = SegmentStore(directory.path, 0, 2 * SIZE)
    kept = [put(store, bytes([number]) * SIZE) for number in range(2)]
    assert store.put([b"x" * SIZE], SIZE) is None
    kept.pop()
    kept.append(put(store, b"x" * SIZE))
    assert store.put([b"y" * SIZE], SIZE) is None
    assert len(files(store)) == 2


def test_a_part_is_left_to_others(store: SegmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that would be nearly full is not used."""
    room = namedtuple("room", "f_blocks f_bavail f_frsize")
    monkeypatch.setattr(segments.os, "statvfs", lambda path: room(4000, 2001, 1000))
    put(store, bytes(SIZE))
    assert store.put([bytearray(SIZE + 1000)], SIZE + 1000) is None


def test_no_room_is_no_error(store: SegmentStore) -> None:
    """A file that cannot be written whole is removed, and its room given back."""

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
        own = SegmentStore(store.path, 0, 2 * SIZE)
        for _ in range(4):
            assert own.put([b"x" * SIZE], SIZE) is None
            assert files(own) == []
        put(own, b"x" * (SIZE // 2))

    assert in_child(child) == 0


def test_no_directory_is_no_error(directory: SegmentDirectory, store: SegmentStore) -> None:
    """Where somebody has removed the directory, payloads travel."""
    os.rmdir(directory.path)
    assert store.put([bytes(SIZE)], SIZE) is None
    store.remove_unheard(7, 0)


@pytest.mark.parametrize("base", ["", "/nowhere/at/all", "/proc/self"])
def test_no_place_is_no_error(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no directory where none can be made, or none is wanted."""
    monkeypatch.setenv(segments.VARIABLE, base)
    assert SegmentDirectory.create() is None


# The directory


def test_the_directory_is_private(directory: SegmentDirectory, store: SegmentStore) -> None:
    """Nobody else may look into it."""
    assert os.stat(directory.path).st_mode & 0o777 == 0o700
    segment = put(store, bytes(SIZE))
    assert os.stat(store.path_of(segment)).st_mode & 0o777 == 0o600


def test_sweep(tmp_path: Path) -> None:
    """The next start removes what a killed process has left, and nothing of those that live."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        left = SegmentDirectory(str(tmp_path))
        kept = put(left.store(), bytes(SIZE))
        os.write(write_fd, left.path.encode())
        signal.pause()
        del kept
    abandoned = os.read(read_fd, 1000).decode()
    living = SegmentDirectory(str(tmp_path))
    put_in_living = put(living.store(), bytes(SIZE))
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    sweep(str(tmp_path))
    remove_abandoned(abandoned)
    assert os.listdir(abandoned)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    third = SegmentDirectory(str(tmp_path))
    assert not os.path.exists(abandoned)
    assert os.path.exists(living.store().path_of(put_in_living)) and stranger.exists()
    for made in (living, third):
        made.remove()
    os.close(read_fd)
    os.close(write_fd)


def test_a_closed_directory_is_not_removed(tmp_path: Path) -> None:
    """A fork of the client lets go of it; the client still has it."""
    directory = SegmentDirectory(str(tmp_path))
    kept = put(directory.store(), bytes(SIZE))

    def child() -> None:
        directory.close()
        directory.remove()

    assert in_child(child) == 0
    assert not remove_abandoned(directory.path)
    del kept
    sweep(str(tmp_path))
    assert os.path.exists(directory.path)
    directory.remove()
    assert not os.path.exists(directory.path)


# Payloads


class Block:
    """A value with an out-of-band buffer, as numpy's arrays are."""

    def __init__(self, content: Any) -> None:
        self.content = memoryview(content)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Block, (pickle.PickleBuffer(self.content),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Block) and bytes(self.content) == bytes(other.content)

    __hash__ = None  # type: ignore[assignment]


def leaf(kind: str, size: int, fill: int) -> Any:
    if kind == "array":
        numpy = pytest.importorskip("numpy")
        return numpy.full(size // 8 + 1, fill, dtype="i8").tolist() if size < 1000 else Block(bytearray([fill]) * size)
    content = bytes([fill]) * size
    return {"bytes": content, "bytearray": bytearray(content), "str": content.decode(), "block": Block(content)}[kind]


LEAVES = st.builds(
    leaf,
    st.sampled_from(["bytes", "bytearray", "str", "block"]),
    st.sampled_from([0, 1, 1000, 1 << 16, (1 << 16) + 1, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1]),
    st.integers(1, 100),
)
NESTED = st.recursive(
    st.one_of(LEAVES, st.integers(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(value=NESTED, copies=st.booleans(), has_store=st.booleans())
def test_any_nested_value(tmp_path_factory: pytest.TempPathFactory, value: Any, copies: bool, has_store: bool) -> None:
    """Whatever is large in it, and wherever, a value comes back equal, alone and as an item of a run."""
    directory = SegmentDirectory(str(tmp_path_factory.mktemp("values")))
    store = directory.store()
    pickler = CallPickler(MainDefinitions(), copy_buffers=copies, store=store if has_store else None)
    payload = pickler.dumps(value)
    assert loads_value(payload) == value
    run = pickler.dumps_run([(value,), (value, 1)])
    form, items = load_run(run)
    if form == 2:
        items = [load_item(item) for item in items]
    assert list(items) == [(value,), (value, 1)]
    assert has_store or not files(store)
    del payload, run, items
    assert files(store) == []
    directory.remove()


def test_large_parts_go_into_files(store: SegmentStore) -> None:
    """Out-of-band buffers and the pickle itself, where they are large; what is small travels."""
    pickler = CallPickler(MainDefinitions(), store=store)
    payload = pickler.dumps([Block(bytearray(SIZE)), Block(bytearray(SEGMENT_BYTES - 1))])
    assert isinstance(payload, Frames)
    assert [isinstance(buffer, Segment) for buffer in payload.buffers] == [False, True, False]
    for value in (bytes(SIZE), bytearray(SIZE), "x" * SIZE, [bytes(SIZE)], list(range(200_000))):
        payload = pickler.dumps(value)
        assert isinstance(payload, Frames) and len(payload.buffers) == 1
        assert isinstance(payload.buffers[0], Segment)


def test_buffers_arrive_writable(store: SegmentStore) -> None:
    """Also where the sender's was read-only memory of a mapping; and the sender's stays as it is."""
    block = Block(bytearray(SIZE))
    arrived = loads_value(CallPickler(MainDefinitions(), store=store).dumps(block))
    arrived.content[0] = 7
    assert block.content[0] == 0


def test_attempts_that_fail_leave_nothing(store: SegmentStore) -> None:
    """A value that does not pickle has written no file."""
    with pytest.raises(Exception, match="pickle"):
        CallPickler(MainDefinitions(), store=store).dumps([bytes(SIZE), Block(bytearray(SIZE)), threading.Lock()])
    assert files(store) == []


def test_too_large(store: SegmentStore) -> None:
    """What is larger than the limit is refused before it is copied; what a file takes does not count."""
    pickler = CallPickler(MainDefinitions(), max_bytes=SEGMENT_BYTES)
    with pytest.raises(TaskTooLargeError, match=f"more than {SEGMENT_BYTES} bytes are not sent") as caught:
        pickler.dumps_call(((bytes(SIZE),), {}))
    assert caught.value.size_bytes > SIZE and caught.value.limit_bytes == SEGMENT_BYTES
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(TaskTooLargeError):
        pickler.dumps_run([(Block(bytearray(SIZE)),)])
    pickler.store = store
    assert loads_value(pickler.dumps_call(((bytes(SIZE),), {}))) == ((bytes(SIZE),), {})


def test_errors_hold_no_views() -> None:
    """The error of a call that was not sent is collected, with what its traceback holds, though the call's memory was
    a memoryview's: a view left there would end the interpreter in Python before 3.13."""
    value = [Block(bytearray(SIZE))]
    with pytest.raises(TaskTooLargeError) as caught:
        CallPickler(MainDefinitions(), max_bytes=1000).dumps(value)
    assert {type(holder) for holder in gc.get_referrers(value[0].content)} <= {Block, dict}  # its `__dict__`
    assert caught.value.size_bytes > SIZE
