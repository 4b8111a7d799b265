"""Locks, queues and shared values of multiprocessing in `initargs`, for workers that are not forks of the user's
process.

They pickle only for a child that is being started: their descriptors travel apart, and what stands in the pickle is
the place in that row. The user's process hands the row to serve (SCM_RIGHTS), from which every worker inherits it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

#: A message carries no more descriptors than 253 (SCM_MAX_FD of Linux), and one is the tracker's.
MAX_DESCRIPTORS: Final = 252

#: Modules whose objects a resource tracker cares for.
_TRACKED: Final = ("heap", "managers", "resource_tracker", "shared_memory", "synchronize")

#: In a worker: the descriptors, in order.
_received: list[int] = []


class PassedDescriptor:
    """Stands in the pickle for a descriptor."""

    def __init__(self, place: int) -> None:
        self._place = place

    def detach(self) -> int:
        """Return the descriptor, in the worker. It is the caller's from now on."""
        return _received[self._place]


class _StartedChild:
    """What multiprocessing's reducers ask for the child that is being started."""

    DupFd = PassedDescriptor

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def duplicate_for_child(self, fd: int) -> int:
        if len(self.descriptors) == MAX_DESCRIPTORS:
            raise ValueError(f"initargs hold more than {MAX_DESCRIPTORS} descriptors")
        self.descriptors.append(fd)
        return len(self.descriptors) - 1


@contextmanager
def pickling_for_workers() -> Iterator[list[int]]:
    """Allow this thread to pickle multiprocessing's objects. Yields the descriptors that are to be passed."""
    child = _StartedChild()
    context: Any = sys.modules.get("multiprocessing.context")
    if context is None:
        yield child.descriptors  # then there are no such objects
        return
    context.set_spawning_popen(child)
    try:
        yield child.descriptors
    finally:
        context.set_spawning_popen(None)


def tracker_fd() -> int | None:
    """Return the descriptor of this process's resource tracker, which is started if need be; None where the program has
    imported nothing that needs one.

    Workers that are not its forks share it, as every child of multiprocessing does. One of their own would take shared
    memory of this process for theirs, for they have opened it, and remove it when they end: see `identity`.
    """
    if not any(f"multiprocessing.{name}" in sys.modules for name in _TRACKED):
        return None
    from multiprocessing import resource_tracker

    return resource_tracker.getfd()


def receive(descriptors: list[int]) -> None:
    """Make known what this worker has inherited."""
    _received[:] = descriptors
