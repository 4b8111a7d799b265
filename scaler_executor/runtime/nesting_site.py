"""What a worker's process has for the calls in it that submit calls themselves.

It is there before anybody asks, so it costs next to nothing: the client (`nested_client`) is made and imported when a
call first submits one.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from typing import TYPE_CHECKING, Final

from scaler_executor.protocol.messages import Function, Options, Payload
from scaler_executor.protocol.page import CURRENT, DONE, ITEM, NESTS, RANG

if TYPE_CHECKING:
    from scaler_executor.executor import ScalerExecutor
    from scaler_executor.runtime.namespace_worker import WorkerMain
    from scaler_executor.runtime.nested_client import NestedClient
    from scaler_executor.runtime.platform import Bell
    from scaler_executor.runtime.segments import SegmentStore


class NestingSite:
    """The worker, as nested calls need to know it.

    Args:
        call_socket, page, bell, main, store: The worker's.
        functions: {id: Function}, the worker's.
        token: Of the executor that the worker serves; b"": not known yet.
        start_method: The worker's.
    """

    def __init__(
        self,
        call_socket: socket.socket,
        page: memoryview,
        bell: Bell,
        main: WorkerMain,
        store: SegmentStore | None,
        functions: dict[int, Function],
        token: bytes,
        start_method: str,
    ) -> None:
        self.start_method = start_method
        self.main = main
        self.store = store
        self.token = token
        #: What a worker of this client does before its first call, see `worker_config.Setup`.
        self.setup: Payload | None = None
        #: The function of the calls that are being made.
        self.function_id = 0
        #: Made when a call first submits one.
        self.client: NestedClient | None = None
        self._socket = call_socket
        self._page = page
        self._bell = bell
        self._functions = functions
        self._pid = os.getpid()
        self._lock = threading.RLock()

    @property
    def is_here(self) -> bool:
        """Whether this is the worker's process, and not a fork of it."""
        return self._pid == os.getpid()

    @property
    def seq(self) -> int:
        """The number of the call in progress; 0: there is none."""
        current = self._page[CURRENT]
        return current if current != self._page[DONE] else 0

    @property
    def parent(self) -> int:
        """What a TaskSubmit says of the call in progress."""
        seq = self.seq
        return seq << 32 | self._page[ITEM] if seq else 0

    @property
    def options(self) -> Options:
        """Those of the call in progress."""
        function = self._functions.get(self.function_id)
        return Options() if function is None else function.options

    def get_client(self) -> NestedClient:
        """Return the client of this worker's calls.

        Raises:
            RuntimeError: This is a fork of the worker, or no call has begun here yet.
        """
        if not self.is_here:
            raise RuntimeError("a ScalerExecutor cannot be used in a fork of the process that made it; make a new one")
        if not self._page[CURRENT]:
            raise RuntimeError("no call is in progress here: an initializer cannot submit calls")
        with self._lock:
            if self.client is None:
                from scaler_executor.runtime.nested_client import NestedClient

                self.client = NestedClient(self)
            return self.client

    def connect(self) -> socket.socket:
        """Return one end of a pair, the other end of which the agent gets."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._socket, [b"n"], [theirs.fileno()])
        self._page[NESTS] = 1
        self._page[RANG] = 1
        self._bell.ring()
        return ours


#: {id: executor} that this process has made, views too. Weak, and by id since a subclass may not be hashable.
EXECUTORS: Final[weakref.WeakValueDictionary[int, ScalerExecutor]] = weakref.WeakValueDictionary()

#: That of this process; None: it is no worker.
site: NestingSite | None = None


def get_site() -> NestingSite | None:
    """Return that of this process, None if it is no worker."""
    return site


def set_site(made: NestingSite) -> None:
    """This process is a worker. What it has inherited of the executor that it serves becomes a handle."""
    global site
    site = made
    for executor in list(EXECUTORS.values()):
        if executor._client.token == made.token:
            from scaler_executor.runtime.handle import inherit

            inherit(executor)
