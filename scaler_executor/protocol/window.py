"""How many bytes may be on their way unacknowledged: as many as the delay allows, so that what is urgent never waits
long behind what is large.

The idea is that of LEDBAT (RFC 6817): the quickest acknowledgement tells how long the way is, and what others take
longer has been spent in queues. It is judged in rounds, each by its quickest acknowledgement, for a queue that is
always there delays all of them and a busy machine only some; and a round begins with what is sent after the last
change, for earlier packets say nothing about that. A way may become longer, so the quickest one is forgotten after a
while and measured anew with as little on its way as may be (as BBR does).
"""

from __future__ import annotations

from typing import Final

#: The window in bytes: at first, at least, at most.
FIRST_BYTES: Final = 1 << 17
MIN_BYTES: Final = 1 << 16
MAX_BYTES: Final = 8 << 20
#: The quickest acknowledgement of a round may come so much later than the quickest one ever did: beyond that the
#: window shrinks.
MAX_DELAY_S: Final = 0.02
#: So many acknowledgements make a round.
ROUND: Final = 3
#: The quickest one counts for so long.
FORGET_S: Final = 10.0


class Window:
    """The window of one end of a session."""

    def __init__(self, now: float) -> None:
        self.size_bytes = FIRST_BYTES
        #: The quickest acknowledgement over this transport, and when it came; None: it is being measured.
        self._quickest_s: float | None = None
        self._quickest_at = now
        #: What the size is to be when that has been measured anew.
        self._resume_bytes = 0
        #: When this round began, how many acknowledgements of what was sent since have come, and the quickest one.
        self._began_at = now
        self._count = 0
        self._least_s = 0.0

    def renew(self, now: float) -> None:
        """There is another transport."""
        self._quickest_s = None
        self._quickest_at = now
        self._resume_bytes = 0
        self._begin(now)

    def acknowledged(self, sent_at: float, delay_s: float, kept_bytes: int, now: float) -> None:
        """Make the window fit the time that an acknowledgement took, when `kept_bytes` were on their way."""
        if self._resume_bytes:
            quickest_s = None
        else:
            quickest_s = self._quickest_s
            if quickest_s is None or delay_s <= quickest_s:
                quickest_s = self._quickest_s = delay_s
                self._quickest_at = now
        if sent_at < self._began_at:
            return
        self._least_s = min(self._least_s, delay_s) if self._count else delay_s
        self._count += 1
        if self._count < ROUND:
            return
        least_s = self._least_s
        if quickest_s is None:
            self._quickest_s, self._quickest_at = least_s, now
            self.size_bytes, self._resume_bytes = self._resume_bytes, 0
        elif self._quickest_at + FORGET_S <= now:
            self._resume_bytes = self.size_bytes
            self.size_bytes = MIN_BYTES
        elif least_s > quickest_s + MAX_DELAY_S:
            self.size_bytes = max(MIN_BYTES, self.size_bytes // 2)
        elif least_s < quickest_s + MAX_DELAY_S / 2 and 4 * kept_bytes > self.size_bytes:
            factor = 4 if least_s < quickest_s + MAX_DELAY_S / 4 else 3
            self.size_bytes = min(MAX_BYTES, self.size_bytes * factor // 2)
        self._begin(now)

    def _begin(self, now: float) -> None:
        self._began_at, self._count = now, 0
