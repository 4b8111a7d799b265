"""Sessions between two ends in one process, over loopback."""

from time import monotonic

import pytest

from scaler_executor.protocol import link
from scaler_executor.protocol.codec import Decoder
from scaler_executor.protocol.messages import Frames, FromPeerMessage, Hello, TaskRun, TaskSubmit
from scaler_executor.runtime import listener as listeners
from scaler_executor.runtime import network
from scaler_executor.runtime.dialer import Dialer
from scaler_executor.runtime.listener import Listener
from scaler_executor.runtime.loop import Loop
from scaler_executor.runtime.security import Keys

DEADLINE_S = 30.0


class Ends:
    """A listener and those who connect to it, in one loop."""

    def __init__(self):
        self.loop = Loop()
        self.keys = Keys.create()
        self.heard, self.lost = [], []
        self.listener = Listener(
            self.loop,
            "tcp://127.0.0.1:*",
            self.keys,
            lambda key: "anybody",
            lambda peer, header, frames: self.heard.append((peer, Decoder(FromPeerMessage).decode(header, frames))),
            lambda peer, reason: self.lost.append((peer, reason)),
            60.0,
        )
        self.dialers = []

    def dial(self, keys):
        """Connect, and return the peer that has said Hello then."""
        number = len(self.heard)
        dialer = Dialer(
            self.loop,
            self.listener.address,
            keys,
            self.keys.public,
            lambda header, frames: None,
            lambda reason: None,
            lambda reason, is_refusal: None,
            60.0,
        )
        self.dialers.append(dialer)
        dialer.send(Hello("client"))
        self.run(lambda: len(self.heard) > number)
        return self.heard[-1][0]

    def run(self, until):
        """Serve until this is true."""
        deadline = monotonic() + DEADLINE_S

        def work():
            self.listener.drain()
            for dialer in list(self.dialers):
                dialer.drain()
            if until():
                self.loop.stop()
            assert monotonic() < deadline

        def on_deadline():
            for end in (self.listener, *self.dialers):
                due = end.next_deadline()
                if due is not None and due <= monotonic():
                    end.on_deadline()

        self.loop.run(lambda: monotonic() + 0.01, on_deadline, work, lambda: False)

    def close(self):
        for dialer in self.dialers:
            dialer.close()
        self.listener.close()


@pytest.fixture
def ends():
    ends = Ends()
    yield ends
    ends.close()


def test_sessions_of_one_key_are_limited(ends, monkeypatch):
    """Those that have been unheard for the longest time are ended, and none of another key."""
    monkeypatch.setattr(listeners, "MAX_SESSIONS", 4)
    monkeypatch.setattr(listeners, "SESSIONS_AT_ONCE", 1)
    other = ends.dial(Keys.create())
    keys = Keys.create()
    peers = [ends.dial(keys) for _ in range(4)]
    peers[1].link.heard_at = 0.0
    assert not ends.lost
    newest = ends.dial(keys)
    assert [(peer, "more than 4 sessions" in reason) for peer, reason in ends.lost] == [(peers[1], True)]
    assert ends.listener.peers == [other, peers[0], *peers[2:], newest]
    assert {len(peers) for peers in ends.listener._by_key.values()} == {1, 4}


def test_unfinished_messages_are_limited(ends, monkeypatch):
    """A peer that sends more than it finishes is ended; one whose messages are complete is not."""
    monkeypatch.setattr(network, "UNFINISHED_BYTES", 3 << 20)
    peer = ends.dial(Keys.create())
    for no in (1, 2, 3):
        ends.dialers[0].send(TaskSubmit([(no, 1, 0, Frames([b"", bytearray(2 << 20)]))]))
    ends.run(lambda: len(ends.heard) == 4)
    assert [len(message.tasks[0][-1]) for _, message in ends.heard[1:]] == [2 << 20] * 3
    ends.dialers[0].send(TaskSubmit([(4, 1, 0, Frames([b"", bytearray(4 << 20)]))]))
    ends.run(lambda: bool(ends.lost))
    assert ends.lost[0][0] is peer and "bytes in unfinished messages" in ends.lost[0][1]


def test_small_messages_do_not_wait_for_room():
    """Where as much of a large message is on its way as may be, a small one goes all the same; not without end."""
    sent = []
    session = network.Session(True, 60.0, lambda parts: sent.append(len(parts[-1])))
    session.handle(link.Connected())
    session.handle(link.Arrived(link.Greeting(1, b"them", session.nonce, 0)))
    session.send(TaskRun([(1, 1, 1, 1, 0, 0, Frames([b"", bytearray(8 << 20)]))]))
    assert session.link.room <= 0 < session.link.small_room
    pieces = len(sent)
    for task_id in range(2, 12):
        session.send(TaskRun([(task_id, 1, 1, 1, 0, 0, b"")]))
    assert len(sent) == pieces + 10 and max(sent[pieces:]) < 100
    while session.link.small_room > 0:
        session.send(TaskRun([(len(sent) + 100, 1, 1, 1, 0, 0, b"x" * 10_000)]))
    before = len(sent)
    session.send(TaskRun([(99, 1, 1, 1, 0, 0, b"")]))
    assert len(sent) == before and session.pending_bytes > 7 << 20


def test_unfinished_messages_have_a_limit():
    """It has to do with the memory of the machine."""
    assert 1 << 30 < network.UNFINISHED_BYTES < 1 << 40


def test_reading_leaves_time_for_others(ends):
    """One who says a great deal keeps nothing else in the scheduler's process waiting, deadlines or not."""
    ends.dial(Keys.create())
    (dialer,) = ends.dialers
    heard = []

    def take_long(peer, header, frames):
        heard.append(header)
        until = monotonic() + 2 * listeners.TURN_S
        while monotonic() < until:
            pass

    ends.listener._on_message = take_long
    for no in range(1, 31):
        dialer.send(TaskSubmit([(no, 1, 0, b"")]))
    deadline = monotonic() + DEADLINE_S
    while len(heard) < 30:
        assert monotonic() < deadline
        for turn in (ends.listener.drain, ends.listener.on_deadline):
            before = len(heard)
            turn()
            assert len(heard) <= before + 1
        dialer.drain()
    assert not ends.lost
