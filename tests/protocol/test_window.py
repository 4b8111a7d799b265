"""The window: as much on its way as the delay allows."""

from scaler_executor.protocol.window import FIRST_BYTES, MAX_BYTES, MAX_DELAY_S, MIN_BYTES, Window


def test_grows_while_acknowledgements_are_quick():
    """It grows to its most while it is used and nothing takes longer than before."""
    window = Window(0.0)
    for step in range(1, 40):
        window.acknowledged(0.01, window.size_bytes, step * 0.1)
        assert window.size_bytes <= MAX_BYTES
    assert window.size_bytes == MAX_BYTES


def test_unused_it_stays():
    """What is not used need not grow."""
    window = Window(0.0)
    for step in range(1, 10):
        window.acknowledged(0.01, 100, step * 0.1)
    assert window.size_bytes == FIRST_BYTES


def test_shrinks_while_they_are_late():
    """It shrinks to its least while acknowledgements come late, each time only when the last change has had effect."""
    window = Window(0.0)
    window.acknowledged(0.01, 0, 1.0)
    window.acknowledged(0.02 + MAX_DELAY_S, FIRST_BYTES, 2.0)
    assert window.size_bytes == FIRST_BYTES // 2
    window.acknowledged(0.02 + MAX_DELAY_S, FIRST_BYTES, 2.001)
    assert window.size_bytes == FIRST_BYTES // 2
    for step in range(20):
        window.acknowledged(1.0, FIRST_BYTES, 3.0 + step)
    assert window.size_bytes == MIN_BYTES


def test_a_little_late_changes_nothing():
    """Between quick and late it stays."""
    window = Window(0.0)
    window.acknowledged(0.01, 0, 1.0)
    window.acknowledged(0.01 + 0.75 * MAX_DELAY_S, FIRST_BYTES, 2.0)
    assert window.size_bytes == FIRST_BYTES


def test_another_transport_has_another_delay():
    """What was quick over the last transport is no measure for this one."""
    window = Window(0.0)
    window.acknowledged(0.001, 0, 1.0)
    window.renew()
    window.acknowledged(0.5, FIRST_BYTES, 2.0)
    assert window.size_bytes == FIRST_BYTES * 3 // 2
