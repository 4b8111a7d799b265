"""A served cluster, as a client sees it: the relay process that leads there.

It looks to the client like an embedded one (`runtime.cluster`): a socket, and a process whose end is the end.
"""

from __future__ import annotations

import getpass
import os
import pickle
import select
import signal
import socket
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

import msgspec

from scaler_executor.errors import AuthenticationError, VersionMismatchError
from scaler_executor.protocol.messages import Frames, Payload, RefusalKind
from scaler_executor.runtime import platform
from scaler_executor.runtime.cluster import Cluster, frame
from scaler_executor.runtime.security import Connection
from scaler_executor.runtime.streams import log_levels

#: So much waits in the user's process before `submit` does; the relay and the scheduler take more.
MAX_UNSENT_BYTES: Final = 256 << 20
#: Beyond its own limit, the relay may take so long to start.
START_S: Final = 10.0


class RemoteCluster(Cluster):
    """The way to a served cluster.

    Args:
        connection: Where it is, and with which keys.
        max_running: So many calls at once; None: no limit.
        initializer, initargs: Run in each worker before its first call for this client.
        max_tasks_per_child: A worker is replaced after so many calls; None: never.
        cancel_grace_s: Time for a cancelled call to unwind before its process is killed.
        connect_timeout_s: How long it may take to be let in.

    Raises:
        ConnectionError: It could not be reached in time.
        AuthenticationError: One of the keys is wrong.
        VersionMismatchError: It speaks another version of the protocol, or runs another Python.
        OSError: A process or descriptor could not be made.
    """

    def __init__(
        self,
        connection: Connection,
        max_running: int | None,
        initializer: Callable[..., Any] | None,
        initargs: tuple[Any, ...],
        max_tasks_per_child: int | None,
        cancel_grace_s: float,
        connect_timeout_s: float,
    ) -> None:
        super().__init__(initializer, initargs)
        self.cancel_grace_s = cancel_grace_s
        self.max_unsent_bytes = MAX_UNSENT_BYTES
        self.may_be_renewed = True
        self.shown_streams = (1, 2)
        #: Of all machines, when we were let in.
        self.workers = 0
        config = self._start_process("relay", has_control=False) | {
            "address": connection.address,
            "server_key": connection.server_key,
            "public_key": connection.keys.public,
            "secret_key": connection.keys.secret,
            "name": _client_name(),
            "max_running": max_running,
            "max_tasks_per_child": max_tasks_per_child,
            "connect_timeout_s": connect_timeout_s,
            "sys_path": [str(entry) for entry in sys.path],
        }
        try:
            with self._config_socket:
                self._config_socket.sendall(frame(config))
                self._await_welcome(connection.address, connect_timeout_s)
        except BaseException:
            self.kill()
            self._await_end()
            self.close()
            raise
        self.socket.setblocking(False)
        from scaler_executor.runtime.namespace import MainDefinitions

        self.main = MainDefinitions()

    def start(self) -> Payload | None:
        """Return what workers do before the first call, out of this process as it is now.

        Raises:
            Exception: What pickling the initializer raised.
        """
        initializer_pickle, definitions = self._pickle_initializer()
        setup = {
            "initializer_pickle": initializer_pickle,
            "definitions": [(name, version, list(map(bytes, buffers))) for name, version, buffers in definitions],
            "argv": [str(argument) for argument in getattr(sys, "argv", [])],
            "sys_path": [os.path.abspath(entry) for entry in map(str, sys.path)],
            "token": self.token,
            "log_levels": log_levels(),
        }
        return Frames([pickle.dumps(setup, 5)])

    def join(self) -> str:
        """Wait until the relay is gone, reap it and close the descriptors. Return how it ended, in words."""
        self.socket.close()  # a relay that nobody has said Bye to ends by this
        status = self._await_end()
        self.close()
        if status is not None and status < 0:
            return f"the process that leads to the scheduler was killed by signal {-status}"
        return "the connection to the scheduler has ended"

    def kill(self) -> None:
        """Have the cluster drop all that is outstanding, at once."""
        if self.death_fd >= 0:
            platform.signal_process(self.death_fd, self._pid, signal.SIGTERM)

    def _await_welcome(self, address: str, connect_timeout_s: float) -> None:
        """Wait for the relay's word."""
        deadline = monotonic() + connect_timeout_s + START_S
        poller = select.poll()
        poller.register(self._config_socket, select.POLLIN)
        data = b""
        while True:
            if not poller.poll(max(0.0, deadline - monotonic()) * 1000):
                raise ConnectionError(f"no connection to the scheduler at {address} within {connect_timeout_s:g} s")
            part = self._config_socket.recv(4096)
            if not part:
                break
            data += part
        if not data:
            raise ConnectionError("the process that leads to the scheduler has ended; what it wrote says why")
        refusal, reason, self.workers = msgspec.msgpack.decode(data, type=tuple[int | None, str, int])
        if refusal == RefusalKind.KEY:
            raise AuthenticationError(f"the scheduler at {address} refuses this client: {reason}")
        if refusal == RefusalKind.VERSION:
            raise VersionMismatchError(f"the scheduler at {address} refuses this client: {reason}")
        if refusal is not None:
            raise ConnectionError(
                f"no connection to the scheduler at {address} within {connect_timeout_s:g} s: {reason}"
            )


def _client_name() -> str:
    """Return how people recognise this client."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    program = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) and sys.argv[0] else "python"
    return f"{user}@{socket.gethostname()} {program} {os.getpid()}"
