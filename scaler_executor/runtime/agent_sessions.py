"""The agent's end of a worker's nested session: what the calls in that worker submit, and what they hear of it.

It knows the pair, which the worker has made and whose other end came through its call pair. What is said on it is
decided by `protocol.agent` and the scheduler.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from scaler_executor.protocol.codec import Decoder, Encoder, RemoteProtocolError
from scaler_executor.protocol.messages import Message, SessionMessage
from scaler_executor.runtime import platform
from scaler_executor.runtime.loop import READABLE, WRITABLE, Loop
from scaler_executor.runtime.transport import StreamReader, StreamWriter


class WorkerSession:
    """One session.

    Args:
        loop: Calls back.
        sock: Our end of the pair.
        take: Is given what the worker says.
        distrust: Is told that it does not keep to the protocol.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        take: Callable[[Any], None],
        distrust: Callable[[RemoteProtocolError], None],
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, platform.SEND_BUFFER_BYTES)
        self._loop = loop
        self._socket = sock
        self._take = take
        self._distrust = distrust
        self._reader = StreamReader(sock)
        self._writer = StreamWriter(sock)
        self._encoder = Encoder()
        self._decode = Decoder[Any](SessionMessage).decode
        self._is_open = True
        loop.watch(sock.fileno(), self._on_ready)

    def send(self, message: Message) -> None:
        """Say something to the worker."""
        if not self._is_open:
            return
        try:
            if not self._writer.send(self._encoder.pack(message)):
                self._loop.watch(self._socket.fileno(), self._on_ready, READABLE | WRITABLE)
        except ConnectionError:
            pass  # it is gone; the forker will say how

    def read(self) -> None:
        """Take what is there."""
        try:
            while self._is_open and (packets := self._reader.read()):
                for header, frames in packets:
                    self._take(self._decode(header, frames))
        except RemoteProtocolError as error:
            self.close()
            self._distrust(error)

    def close(self) -> None:
        """Let go of the pair."""
        if self._is_open:
            self._is_open = False
            self._loop.forget(self._socket.fileno())
            self._socket.close()

    def _on_ready(self) -> None:
        if self._writer.pending_bytes:
            try:
                if self._writer.flush():
                    self._loop.watch(self._socket.fileno(), self._on_ready, READABLE)
            except ConnectionError:
                self.close()
        self.read()
        if self._reader.eof:
            self.close()
