"""The window: as much on its way as the delay allows."""

from scaler_executor.protocol.window import (
    FIRST_BYTES,
    FORGET_S,
    MAX_BYTES,
    MAX_DELAY_S,
    MIN_BYTES,
    ROUND,
    Window,
)


class Way:
    """A way of a certain length and rate, and a sender that always has something to send."""

    PIECE = 1 << 16

    def __init__(self, length_s, bytes_per_s):
        self.window = Window(0.0)
        self.length_s, self.bytes_per_s = length_s, bytes_per_s
        self.now = self.free_at = 0.0
        #: (when its acknowledgement comes, when it was sent)
        self.under_way = []

    def run(self, seconds):
        """Send for so long. Return the longest delay, and how many bytes were acknowledged."""
        until = self.now + seconds
        worst, count = 0.0, 0
        while self.now < until:
            while len(self.under_way) * self.PIECE < self.window.size_bytes:
                self.free_at = max(self.free_at, self.now) + self.PIECE / self.bytes_per_s
                self.under_way.append((self.free_at + self.length_s, self.now))
            self.now, sent_at = self.under_way.pop(0)
            delay_s = self.now - sent_at
            worst, count = max(worst, delay_s), count + 1
            self.window.acknowledged(sent_at, delay_s, (len(self.under_way) + 1) * self.PIECE, self.now)
        return worst, count * self.PIECE


def test_slow_way():
    """What is on its way over a slow one takes hardly longer than a piece alone, and it is used all the time."""
    way = Way(0.002, 8 << 20)
    way.run(1.0)
    worst, count = way.run(30.0)
    assert worst < 0.015 + MAX_DELAY_S + 2 * way.PIECE / way.bytes_per_s
    assert count > 0.95 * 30.0 * way.bytes_per_s


def test_quick_way():
    """A quick one is used all the time as well, and no more waits on it."""
    way = Way(0.001, 48 << 20)
    way.run(1.0)
    worst, count = way.run(30.0)
    assert worst < 0.01 + 2 * MAX_DELAY_S
    assert count > 0.95 * 30.0 * way.bytes_per_s


def test_long_way():
    """Much is on its way over a long one, and soon."""
    way = Way(0.1, 32 << 20)
    way.run(3.0)
    _, count = way.run(10.0)
    assert count > 0.8 * 10.0 * way.bytes_per_s


def test_way_that_becomes_slow():
    """What waits on a way that has become slow is soon as little as on one that was."""
    way = Way(0.001, 48 << 20)
    way.run(5.0)
    way.bytes_per_s = 8 << 20
    way.run(1.0)
    worst, _ = way.run(5.0)
    assert worst < 0.015 + MAX_DELAY_S + 2 * way.PIECE / way.bytes_per_s


def test_way_that_becomes_longer():
    """Its new length is not taken for a queue for ever."""
    way = Way(0.001, 32 << 20)
    way.run(5.0)
    way.length_s = 0.1
    way.run(2 * FORGET_S)
    _, count = way.run(FORGET_S)
    assert count > 0.6 * FORGET_S * way.bytes_per_s


def acknowledge(window, delay_s, kept_bytes, now, count=ROUND):
    for _ in range(count):
        window.acknowledged(now, delay_s, kept_bytes, now)


def test_grows_while_acknowledgements_are_quick():
    """It grows to its most while it is used and nothing takes longer than before."""
    window = Window(0.0)
    for step in range(1, 40):
        acknowledge(window, 0.01, window.size_bytes, step * 0.1)
        assert window.size_bytes <= MAX_BYTES
    assert window.size_bytes == MAX_BYTES


def test_unused_it_stays():
    """What is not used need not grow."""
    window = Window(0.0)
    for step in range(1, 10):
        acknowledge(window, 0.01, 100, step * 0.1)
    assert window.size_bytes == FIRST_BYTES


def test_single_late_ones_change_nothing():
    """A machine that was busy for a moment says nothing of the way."""
    window = Window(0.0)
    acknowledge(window, 0.01, 0, 1.0)
    for step in range(10):
        acknowledge(window, 0.5, FIRST_BYTES, 2.0 + step / 10, ROUND - 1)
        acknowledge(window, 0.01 + 0.75 * MAX_DELAY_S, FIRST_BYTES, 2.0 + step / 10, 1)
    assert window.size_bytes == FIRST_BYTES


def test_what_was_sent_before_a_change_does_not_count():
    """It says nothing of the present size."""
    window = Window(0.0)
    acknowledge(window, 0.01, 0, 1.0)
    acknowledge(window, 0.5, FIRST_BYTES, 2.0)
    assert window.size_bytes == MIN_BYTES
    for _ in range(10):
        window.acknowledged(1.9, 0.01, FIRST_BYTES, 2.1)
    assert window.size_bytes == MIN_BYTES


def test_another_transport_has_another_delay():
    """What was quick over the last transport is no measure for this one."""
    window = Window(0.0)
    acknowledge(window, 0.001, 0, 1.0)
    window.renew(1.5)
    acknowledge(window, 0.5, FIRST_BYTES, 2.0)
    assert window.size_bytes > FIRST_BYTES
