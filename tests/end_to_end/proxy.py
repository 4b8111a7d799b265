"""A TCP proxy whose ways can be cut, held up, slowed down and delayed, one direction apart from the other.

It stands where a network would: what it holds up comes later, as what TCP sends again does, unless the connection is
closed before. One thread serves all connections.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType

from scaler_executor.runtime.security import Connection

#: So much of a connection's direction is held here at most; the rest waits in the kernels.
HELD_BYTES = 1 << 17
PIECE_BYTES = 1 << 14
UP, DOWN = 0, 1


class _Flow:
    """One direction of one connection."""

    def __init__(self, direction: int, source: socket.socket, sink: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.sink = sink
        #: (when it may go on, bytes)
        self.held: deque[tuple[float, bytes]] = deque()
        self.held_bytes = 0
        #: When the next piece may be sent, at the rate that is set.
        self.free_at = 0.0


class Proxy:
    """Forwards connections to `address` ("tcp://HOST:PORT").

    Attributes:
        is_refusing: Connections are closed as soon as they are made.
        is_holding: [towards the address, from it]: nothing passes. New connections are made, and find the same.
        rate: The same, in bytes per second; None: as much as there is.
        delay_s: The same: everything comes so much later.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Inherited by what it accepts. With small buffers a sender soon sees what is held up.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, HELD_BYTES)
        self._listener.setblocking(False)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_refusing = False
        self.is_holding = [False, False]
        self.rate: list[float | None] = [None, None]
        self.delay_s = [0.0, 0.0]
        self._flows: list[_Flow] = []
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._cut_wanted = self._is_over = False
        self._lock = threading.Condition()
        #: Bytes that have been forwarded, in both directions.
        self.forwarded = 0
        self._thread = threading.Thread(target=self._serve, name="proxy")
        self._thread.start()

    def connection(self, path: Path, to: Path) -> Path:
        """Write a copy of the connection file `path` that leads through here to `to`; return that."""
        connection = Connection.load(path)
        Connection(self.address, connection.server_key, connection.keys).save(to)
        return to

    # Faults

    def cut(self) -> None:
        """Close all connections, at both ends."""
        with self._lock:
            self._cut_wanted = True
            self._wake()
            assert self._lock.wait_for(lambda: not self._cut_wanted, 10)

    def refuse(self) -> None:
        """Close all connections, and let no other one be made."""
        self.is_refusing = True
        self.cut()

    def hold(self, up: bool = True, down: bool = True) -> None:
        """Let nothing pass from now on in these directions."""
        self.is_holding = [up, down]
        self._wake()

    def restore(self) -> None:
        """Let everything pass again."""
        self.is_refusing = False
        self.is_holding = [False, False]
        self.rate = [None, None]
        self.delay_s = [0.0, 0.0]
        self._wake()

    # The thread

    def _wake(self) -> None:
        self._wake_write.send(b"x")

    def _serve(self) -> None:
        while not self._is_over:
            with selectors.DefaultSelector() as selector:
                selector.register(self._listener, selectors.EVENT_READ)
                selector.register(self._wake_read, selectors.EVENT_READ)
                ready = self._wait(selector)
            if self._wake_read in ready:
                self._wake_read.recv(4096)
            with self._lock:
                if self._cut_wanted:
                    for flow in list(self._flows):
                        self._close(flow)
                    self._cut_wanted = False
                    self._lock.notify_all()
            if self._listener in ready:
                self._accept()
            for flow in list(self._flows):
                if flow in self._flows:  # its end may have closed both
                    try:
                        self._move(flow, ready)
                    except BlockingIOError:
                        pass
                    except OSError:
                        self._close(flow)
        for flow in list(self._flows):
            self._close(flow)

    def _wait(self, selector: selectors.BaseSelector) -> set[socket.socket]:
        """Return the sockets that are ready, or have been for nothing: whoever reads them does not wait."""
        now = time.monotonic()
        until = now + 60.0
        wanted: dict[socket.socket, int] = {}
        for flow in self._flows:
            if self.is_holding[flow.direction]:
                continue
            if flow.held_bytes < HELD_BYTES:
                wanted[flow.source] = wanted.get(flow.source, 0) | selectors.EVENT_READ
            if flow.held:
                due = max(flow.held[0][0], flow.free_at)
                if due <= now:
                    wanted[flow.sink] = wanted.get(flow.sink, 0) | selectors.EVENT_WRITE
                else:
                    until = min(until, due)
        for sock, events in wanted.items():
            selector.register(sock, events)
        return {key.fileobj for key, _ in selector.select(max(0.0, until - now))}  # type: ignore[misc]

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return
        if self.is_refusing:
            accepted.close()
            return
        try:
            made = socket.socket()
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, HELD_BYTES)
            made.connect(self._target)
        except OSError:
            accepted.close()
            made.close()
            return
        for sock in (accepted, made):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._flows += [_Flow(UP, accepted, made), _Flow(DOWN, made, accepted)]

    def _move(self, flow: _Flow, ready: set[socket.socket]) -> None:
        if self.is_holding[flow.direction]:
            return
        now = time.monotonic()
        if flow.source in ready and flow.held_bytes < HELD_BYTES:
            data = flow.source.recv(PIECE_BYTES)
            if not data:
                self._close(flow)
                return
            flow.held.append((now + self.delay_s[flow.direction], data))
            flow.held_bytes += len(data)
        rate = self.rate[flow.direction]
        while flow.held and max(flow.held[0][0], flow.free_at) <= now:
            due, data = flow.held[0]
            sent = flow.sink.send(data)
            flow.held_bytes -= sent
            self.forwarded += sent
            if rate is not None:
                flow.free_at = max(flow.free_at, now - 0.01) + sent / rate
            if sent < len(data):
                flow.held[0] = (due, data[sent:])
            else:
                flow.held.popleft()

    def _close(self, flow: _Flow) -> None:
        """Close the connection that this is a direction of."""
        self._flows = [other for other in self._flows if other.source not in (flow.source, flow.sink)]
        flow.source.close()
        flow.sink.close()

    def close(self) -> None:
        """Close everything."""
        self._is_over = True
        self._wake()
        self._thread.join()
        for sock in (self._listener, self._wake_read, self._wake_write):
            sock.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
