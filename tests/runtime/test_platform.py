"""How the end of a process is seen, and who is signalled: alike with what Linux has and with its portable twins.

Run with SCALER_EXECUTOR_PLATFORM=portable for the twins.
"""

from __future__ import annotations

import os
import select
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import await_death, is_alive

from scaler_executor.runtime import platform

DEADLINE_S = 10.0

pytestmark = pytest.mark.usefixtures("clean")


def fork(body: Callable[[], object]) -> int:
    """Run `body` in a child, which ends then. Return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
    finally:
        os._exit(0)


def kill(pid: int) -> None:
    """Kill a child and reap it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def fork_watched(body: Callable[[], object]) -> tuple[int, int]:
    """Run `body` in a child. Return its pid and the descriptor that tells of its end."""
    lifeline = platform.Lifeline()

    def run() -> None:
        lifeline.hold()
        body()

    pid = fork(run)
    pidfd = lifeline.watch(pid)
    lifeline.close()
    return pid, pidfd


def test_child_is_watched() -> None:
    """The descriptor tells of a child's end, and of nothing before it."""
    pid, pidfd = fork_watched(signal.pause)
    assert not platform.has_ended(pidfd) and not platform.has_child_ended(pid, 0)
    assert platform.signal_child(pidfd, pid, signal.SIGKILL)
    assert platform.has_ended(pidfd, DEADLINE_S) and platform.has_child_ended(pid, DEADLINE_S, pidfd)
    os.waitpid(pid, 0)
    os.close(pidfd)


def test_grandchild_keeps_no_lifeline() -> None:
    """What a child has forked and left behind does not hide its end."""
    told, tell = os.pipe()

    def leave_behind() -> None:
        os.write(tell, fork(signal.pause).to_bytes(4, "little"))

    pid, pidfd = fork_watched(leave_behind)
    grandchild = int.from_bytes(os.read(told, 4), "little")
    assert platform.has_ended(pidfd, DEADLINE_S) and is_alive(grandchild)
    os.waitpid(pid, 0)
    os.kill(grandchild, signal.SIGKILL)
    await_death(grandchild)
    for fd in (pidfd, told, tell):
        os.close(fd)


def test_process_that_is_watched_by_its_child() -> None:
    """`watch_self` tells a child of its parent's end, also where the parent has forked others that live on."""
    told, tell = os.pipe()
    seen, see = os.pipe()

    def be_parent() -> None:
        pidfd = platform.watch_self()
        others = [fork(signal.pause)]
        fork(lambda: os.write(see, b"e" if platform.has_ended(pidfd, DEADLINE_S) else b"t"))
        others.append(fork(signal.pause))
        os.write(tell, b"".join(pid.to_bytes(4, "little") for pid in others))
        signal.pause()

    pid = fork(be_parent)
    numbers = os.read(told, 8)
    kill(pid)
    assert os.read(seen, 1) == b"e"
    for other in (int.from_bytes(numbers[:4], "little"), int.from_bytes(numbers[4:], "little")):
        assert is_alive(other)
        os.kill(other, signal.SIGKILL)
        await_death(other)
    for fd in (told, tell, seen, see):
        os.close(fd)


def test_nobody_is_killed_in_place_of_a_process_that_has_ended() -> None:
    """Once its end can be seen nothing is sent to its number, which may be another process's: here it is one's."""
    pid, pidfd = fork_watched(lambda: None)
    assert platform.has_ended(pidfd, DEADLINE_S)
    os.waitpid(pid, 0)
    stranger = fork(lambda: (os.setpgid(0, 0), signal.pause()))
    os.set_blocking(pidfd, False)
    platform.kill_process(pidfd, stranger)
    if platform.PORTABLE:  # a group is signalled by number where the kernel is older than 6.9
        platform.kill_orphan(pidfd, stranger)
    assert not platform.has_child_ended(stranger, 0.05)
    kill(stranger)
    os.close(pidfd)


def test_fork_closes_only_lifelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a program has closed a lifeline and opened a file by the same number, a fork of it keeps that."""
    monkeypatch.setattr(platform, "_closed_in_children", {})
    told, tell = os.pipe()
    other, own = os.pipe()
    platform._close_in_children(own)
    os.dup2(tell, own)
    pid = os.fork()
    if not pid:
        try:
            platform._close_in_child()
            os.write(own, b"x")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.set_blocking(told, False)
    assert os.read(told, 1) == b"x"
    for fd in (told, tell, other, own):
        os.close(fd)


@pytest.mark.parametrize("closes", [False, True], ids=["open", "closed"])
def test_child_dies_with_its_parent(closes: bool) -> None:
    """A child ends with its parent, also if it has closed every descriptor; and not before."""
    told, tell = os.pipe()

    def be_parent() -> None:
        lifeline_fd = platform.watch_self() if platform.PORTABLE else -1
        parent = os.getpid()

        def be_child() -> None:
            os.setsid()
            assert platform.die_with_parent(parent, lifeline_fd)
            if closes:
                os.closerange(3, tell)
                os.closerange(tell + 1, 100)
            time.sleep(0.1)  # it goes on though the lifeline cannot be looked at
            os.write(tell, os.getpid().to_bytes(4, "little"))
            while True:
                pass

        fork(be_child)
        signal.pause()

    pid = fork(be_parent)
    child = int.from_bytes(os.read(told, 4), "little")
    kill(pid)
    await_death(child)
    os.close(told)
    os.close(tell)


def test_poller() -> None:
    """The poller tells what is ready, waits as long as it is told, and forgets."""
    poller = platform.Poller()
    reader, writer = os.pipe()
    poller.register(reader, select.POLLIN)
    began = time.monotonic()
    assert poller.poll(0.02 * poller.units_per_s) == []
    assert time.monotonic() - began >= 0.02
    os.write(writer, b"x")
    assert poller.poll(None) == [(reader, select.POLLIN)]
    poller.modify(reader, 0)
    assert poller.poll(0) == []
    poller.unregister(reader)
    poller.close()
    os.close(reader)
    os.close(writer)


def test_open_descriptors() -> None:
    """Every descriptor but the standard ones is listed."""
    reader, writer = os.pipe()
    assert {reader, writer} <= set(platform.open_descriptors()) and not {0, 1, 2} & set(platform.open_descriptors())
    os.close(reader)
    os.close(writer)


def test_file_mode_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is told, whatever it hides, and nothing is left of the telling."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for mask in (0o000, 0o027, 0o777):
        before = os.umask(mask)
        try:
            assert platform.file_mode_mask() == mask
        finally:
            os.umask(before)
    assert os.listdir(tmp_path) == []
