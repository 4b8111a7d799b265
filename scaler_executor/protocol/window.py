"""How many bytes may be on their way unacknowledged: as many as the delay allows, so that what is urgent never waits
long behind what is large.

The idea is that of LEDBAT (RFC 6817): the quickest acknowledgement tells how long the way is, and what others take
longer has been spent in queues.
"""

from __future__ import annotations

from typing import Final

#: The window in bytes: at first, at least, at most.
FIRST_BYTES: Final = 1 << 19
MIN_BYTES: Final = 1 << 17
MAX_BYTES: Final = 8 << 20
#: An acknowledgement may come so much later than the quickest one did: beyond that the window shrinks.
MAX_DELAY_S: Final = 0.04


class Window:
    """The window of one end of a session."""

    def __init__(self, now: float) -> None:
        self.size_bytes = FIRST_BYTES
        #: The quickest acknowledgement over this transport; None: none yet.
        self._quickest_s: float | None = None
        self._resized_at = now

    def renew(self) -> None:
        """There is another transport."""
        self._quickest_s = None

    def acknowledged(self, delay_s: float, kept_bytes: int, now: float) -> None:
        """Make the window fit the time that an acknowledgement took, when `kept_bytes` more are on their way."""
        quickest_s = self._quickest_s = delay_s if self._quickest_s is None else min(self._quickest_s, delay_s)
        if self._resized_at + quickest_s > now:
            return  # it has had no effect yet
        if delay_s > quickest_s + MAX_DELAY_S:
            self.size_bytes = max(MIN_BYTES, self.size_bytes // 2)
            self._resized_at = now
        elif delay_s < quickest_s + MAX_DELAY_S / 2 and 4 * kept_bytes > self.size_bytes:
            self.size_bytes = min(MAX_BYTES, self.size_bytes * 3 // 2)
            self._resized_at = now
