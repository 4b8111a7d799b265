"""What a process of ours asks of the kernel and of its interpreter, for itself alone."""

from __future__ import annotations

import gc
import resource


def raise_descriptor_limit() -> None:
    """Allow as many open files as may be: a worker costs four, a connection one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def collect_rarely() -> None:
    """Have the collector leave alone what is there, and look seldom at the rest.

    Rows and payloads have no cycles, and collecting over 100,000 of them would halve the rate.
    """
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
