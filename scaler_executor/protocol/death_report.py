"""What is known of a worker's death: made where it died, read by whoever waits for the call that it was in."""

from __future__ import annotations

import msgspec


class Death(msgspec.Struct, array_like=True):
    """Why a worker is gone."""

    reason: str  # a sentence without the call's name
    exit_code: int | None = None  # negative: the signal, as in subprocess; None: nobody could tell
    host: str = ""
    pid: int = 0
    worker_id: int = 0
    attempt: int = 1
    peak_memory_bytes: int = 0
    story: str = ""
    out_of_memory: bool | None = None  # the kernel's counters say so, or do not; None: they could not be asked
    stderr: str = ""  # the end of what the call wrote there, in Python
    fault: str = ""  # the stack at a fatal fault, as the fault handler wrote it

    @property
    def last_words(self) -> str:
        """What the call, or a worker that was starting, had to say, under a heading each; "" if nothing."""
        parts = []
        if self.stderr:
            parts.append(f"its last words on stderr:\n{_indented(self.stderr)}")
        if self.fault:
            parts.append(f"where it was:\n{_indented(self.fault)}")
        return "\n".join(parts)


class DeathReport(Death, array_like=True):
    """Why a worker is gone, and those of the call's earlier attempts, for `WorkerDiedError`."""

    earlier: list[Death] = []  # the latest ones of many


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
