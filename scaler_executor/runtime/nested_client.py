"""The client in a worker, for calls that submit calls: it speaks to the scheduler through the worker's agent.

It is a client like any other (`runtime.client`). What is different: its end of the pair comes from the worker; each
TaskSubmit says which call submits it; waits lend the call's slot (`lender`); and of `__main__` it sends what it has got
itself, for other workers may lack it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable
from threading import Event as ThreadEvent
from typing import Any, Final

from scaler_executor.defaults import CANCEL_TIMEOUT_S
from scaler_executor.protocol.client import Event, Instruction, Received, Send
from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.messages import (
    Message,
    Payload,
    Refused,
    TaskSubmit,
    ToSessionMessage,
    Unblocked,
    Welcome,
)
from scaler_executor.runtime.client import ClientFutureManager
from scaler_executor.runtime.lender import Lender
from scaler_executor.runtime.namespace import Definition, MainDefinitions
from scaler_executor.runtime.namespace_names import names_reached
from scaler_executor.runtime.namespace_worker import WorkerMain
from scaler_executor.runtime.nesting_site import NestingSite
from scaler_executor.runtime.segments import SegmentStore
from scaler_executor.runtime.terms import Terms

#: So much waits in this process before `submit` does.
MAX_UNSENT_BYTES: Final = 256 << 20
#: A call that ends has what it has submitted sent first; should nobody take it, it ends all the same.
FLUSH_S: Final = 60.0


class NestedDefinitions(MainDefinitions):
    """What this worker's calls use of `__main__`. What came from the client has the version under which it came, and so
    is taken only by workers that lack it; what calls have defined here is newer than what others have defined."""

    def __init__(self, main: WorkerMain) -> None:
        super().__init__()
        self._main = main

    def _define(self, name: str, value: Any) -> Definition:
        if self._main.has_inherited(name):
            return Definition(name, value, b"", frozenset(names_reached(value)), None, True)
        return super()._define(name, value)

    def _version_after(self, name: str, known: Definition | None) -> int:
        return self._main.version_of(name) or time.time_ns() // 1000


class NestedCluster:
    """The way to the cluster of the call, as a client sees it."""

    cancel_grace_s: float | None = None
    max_unsent_bytes: int | None = MAX_UNSENT_BYTES
    may_be_renewed = False
    has_owner = False

    def __init__(self, site: NestingSite) -> None:
        self.token = site.token
        self.socket = site.connect()
        self.socket.setblocking(False)
        self.main: MainDefinitions = NestedDefinitions(site.main)
        # Files of arguments are their client's, and this process may end before its calls do.
        self.store: SegmentStore | None = None
        self._setup = site.setup
        # Shown by the client of the worker, which hears of it too: here it would be a print of the call in progress.
        self.shown_streams: tuple[int, ...] = ()
        # Never readable before `kill`: the end of the agent is the end of this process.
        self.death_fd, self._alive_fd = os.pipe()

    def start(self) -> Payload | None:
        """Return what workers do before the first call."""
        return self._setup

    def join(self) -> str:
        """Close the descriptors."""
        self.close()
        return "the agent has ended the session of its worker's calls"

    def kill(self) -> None:
        """End the session."""
        fd, self._alive_fd = self._alive_fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Close the descriptors."""
        self.socket.close()
        self.kill()
        fd, self.death_fd = self.death_fd, -1
        if fd >= 0:
            os.close(fd)


class NestedClient(ClientFutureManager):
    """The client of all calls in this worker. Thread-safe.

    Args:
        site: The worker.

    Raises:
        OSError: A descriptor could not be made.
    """

    _hears = ToSessionMessage

    def __init__(self, site: NestingSite) -> None:
        self._site = site
        self.lender = self._lender = Lender(site, self._say)
        #: What the lender has said and the I/O thread has not taken.
        self._said: deque[Message] = deque()
        #: Set when everything is sent.
        self._flushed: deque[ThreadEvent] = deque()
        #: The workers of all agents, once the scheduler has said Welcome.
        self.workers = 1
        self._has_welcome = ThreadEvent()
        #: It will not: nothing that is submitted comes to anything.
        self._is_refused = False
        cluster = NestedCluster(site)
        try:
            super().__init__(cluster, cancel_timeout_s=CANCEL_TIMEOUT_S)
        except BaseException:
            cluster.close()
            raise
        self._functions.always_registers = True

    def get_workers(self) -> int:
        """Return how many workers all agents have."""
        self._has_welcome.wait()
        return self.workers

    def flush(self) -> None:
        """Wait until what was submitted has been sent, with the number of the call that has."""
        with self._io_lock:  # the I/O thread is not just taking it up
            if self._has_sent() or self._is_over.is_set():
                return
            flushed = ThreadEvent()
            self._flushed.append(flushed)
        self._ring()
        flushed.wait(FLUSH_S)

    def _has_sent(self) -> bool:
        return self._is_refused or (self._is_welcome and not self._outbox.has_unsent and not self._batch.tasks)

    def join_view(self, terms: Terms) -> None:
        """As `ClientFutureManager.join_view`."""
        self._lender.wait(lambda: super(NestedClient, self).join_view(terms))

    def _is_only(self, payload: bytes) -> bool:
        return False  # only the I/O thread says whose calls they are

    def _say(self, message: Message) -> None:
        self._said.append(message)
        self._ring()

    # The I/O thread

    def _run(self) -> None:
        try:
            super()._run()
        finally:
            self._has_welcome.set()
            self._lender.end()
            self._tell_flushed()

    def _take_up(self) -> int:
        # What is said from now on goes behind what is submitted from now on, which waits for Welcome.
        count = len(self._said) if self._is_welcome or self._is_refused else 0
        calls = super()._take_up()
        for _ in range(count):
            self._outbox.queue(self._said.popleft())
        return calls

    def _note_room(self, max_bytes: int) -> None:
        super()._note_room(max_bytes)
        if self._flushed and self._has_sent():
            self._tell_flushed()

    def _tell_flushed(self) -> None:
        while self._flushed:
            self._flushed.popleft().set()

    def _take_segment(self, writer: int, number: int, size_bytes: int) -> Any:
        store = self._site.store
        if store is None:
            raise RemoteProtocolError("a result in a file, which this client cannot have")
        return store.take_mapped(writer, number, size_bytes)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Received):
            message: Any = event.message
            if isinstance(message, Unblocked):
                self._lender.granted()
                return
            if isinstance(message, Welcome):
                self.workers = max(1, message.workers)
                self._has_welcome.set()
            elif isinstance(message, Refused):
                self._is_refused = True
                self._has_welcome.set()
                self._tell_flushed()
        super()._handle(event)

    def _perform(self, instructions: Iterable[Instruction]) -> None:
        instructions = list(instructions)
        for instruction in instructions:
            if isinstance(instruction, Send) and isinstance(instruction.message, TaskSubmit):
                instruction.message.parent = self._site.parent
        super()._perform(instructions)
