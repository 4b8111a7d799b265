"""What the client needs of others: of the processes that it owns, and of the maps whose items it has."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

from scaler_executor.protocol.messages import Payload

if TYPE_CHECKING:
    import socket

    from scaler_executor.runtime.namespace import MainDefinitions
    from scaler_executor.runtime.segments import SegmentStore
    from scaler_executor.runtime.terms import Terms


class Cluster(Protocol):
    """What the client needs of the processes that it owns."""

    socket: socket.socket
    death_fd: int
    main: MainDefinitions
    #: Tells it from others, in its workers.
    token: bytes
    #: For each function, where it is not the cluster's own.
    cancel_grace_s: float | None
    #: Callers wait while more than this could not be sent; None: they never do.
    max_unsent_bytes: int | None
    #: Whether it may say that the scheduler is lost, and go on with another one.
    may_be_renewed: bool
    #: Whether a client's thread waits for its end.
    has_owner: bool
    #: Of descriptors 1 and 2, those for which this process shows what calls print; known once it is started.
    shown_streams: tuple[int, ...]
    #: Where large payloads go, once it is started; None: they travel.
    store: SegmentStore | None

    def start(self) -> Payload | None:
        """Have workers started from now on. Called once, unless it raises. Return what they do before the first call,
        see `worker.Setup`, if they do not know."""

    def join(self) -> str:
        """Wait until the processes are gone, release everything, return how they ended."""
        ...

    def kill(self) -> None:
        """Kill the processes."""

    def close(self) -> None:
        """Close the descriptors, nothing else."""


class Run(Protocol):
    """The items of a map that were submitted together. Called by the I/O thread."""

    task_no: int
    #: Of the view that it was submitted through, if any. Set under the client's lock.
    terms: Terms | None

    @property
    def is_over(self) -> bool:
        """Whether each item has a result or is cancelled."""
        ...

    @property
    def over(self) -> threading.Event:
        """Is set when the run is over."""
        ...

    def set_items_ready(self, first: int, count: int, kind: int, payload: Payload | str) -> None:
        """Take the results of items [first, first + count); `first` is REST for all that have none yet."""

    def set_items_cancelled(self, first: int, count: int) -> None:
        """Note that these items end cancelled; `first` as above."""

    def set_running(self) -> None:
        """Note that a part of it has been seen running."""
