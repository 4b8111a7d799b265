"""A scheduler without a cluster: it says exactly what a test tells it to, so that every race order can be tried.

It stands where an EmbeddedCluster would, at the other end of a pair of sockets. A thread reads what the client sends;
calls and cancels wait in queues until the test answers them, or are answered at once by `on_submit` and `on_cancel`.
"""

from __future__ import annotations

import os
import pickle
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from scaler_executor.future import ScalerFuture
from scaler_executor.protocol.codec import Decoder, Encoder
from scaler_executor.protocol.messages import (
    Bye,
    CancelRow,
    ClientMessage,
    Hello,
    InheritanceReplaced,
    Message,
    Payload,
    ResultKind,
    TaskCancel,
    TaskCancelConfirm,
    TaskCancelConfirmType,
    TaskResult,
    TaskRow,
    TaskRunning,
    TaskSubmit,
    Welcome,
)
from scaler_executor.runtime.calls import CallPickler, dumps_exception
from scaler_executor.runtime.client import ClientFutureManager
from scaler_executor.runtime.namespace import MainDefinitions
from scaler_executor.runtime.transport import StreamReader

PATIENCE_S = 20.0


def never_called(*args: Any, **kwargs: Any) -> Any:
    """Stands for the function of a call: nobody runs it here."""
    raise AssertionError("a fake scheduler runs nothing")


class FakeScheduler:
    """Stands for an EmbeddedCluster."""

    def __init__(self) -> None:
        self.socket, self._mine = socket.socketpair()
        self.socket.setblocking(False)
        self.death_fd, self._alive_fd = os.pipe()
        self.main = MainDefinitions()
        self._encoder = Encoder()
        self._send_lock = threading.Lock()
        self.submits: queue.Queue[TaskRow] = queue.Queue()
        self.cancels: queue.Queue[CancelRow] = queue.Queue()
        self.replacements: queue.Queue[InheritanceReplaced] = queue.Queue()
        self.messages: list[Message] = []
        self.on_submit: Callable[[TaskRow], None] = self.submits.put
        self.on_cancel: Callable[[CancelRow], None] = self.cancels.put
        self.said_bye = threading.Event()
        self.was_killed = threading.Event()
        self.has_owner = False
        self.cancel_grace_s: float | None = None
        self.max_unsent_bytes: int | None = None
        self.token = b""
        self.may_be_renewed = False
        self.store = None
        self.was_started = False
        self.joined = False
        self.on_join: Callable[[], Any] = lambda: None
        self._thread = threading.Thread(target=self._run, name="fake scheduler")
        self._thread.start()

    # As EmbeddedCluster

    def start(self) -> None:
        self.was_started = True

    def join(self) -> str:
        self.on_join()
        if not self.was_started:
            self.socket.close()
        self._thread.join()
        self.close()
        self.joined = True
        return "the fake scheduler ended"

    def close(self) -> None:
        if self.death_fd >= 0:
            os.close(self.death_fd)
            self.death_fd = -1
            self.socket.close()

    def kill(self) -> None:
        self.was_killed.set()
        self.die()

    # What a test makes it say

    def send(self, message: Message) -> None:
        with self._send_lock:
            try:
                self._mine.sendall(b"".join(self._encoder.pack(message)))
            except OSError:
                pass  # it is dead already, as far as the client can tell

    def welcome(self) -> None:
        self.send(Welcome(1))

    def value(self, no: int, value: Any, first: int = 0) -> None:
        self.send(TaskResult([(no, first, 1, int(ResultKind.VALUE), pickle.dumps(value, 5))]))

    def values(self, no: int, first: int, values: list[Any]) -> None:
        body = b"".join(pickle.dumps(value, 5) for value in values)
        self.send(TaskResult([(no, first, len(values), int(ResultKind.VALUE), body)]))

    def result(self, no: int, kind: ResultKind, payload: Payload, first: int = 0, count: int = 1) -> None:
        self.send(TaskResult([(no, first, count, int(kind), payload)]))  # type: ignore[list-item]

    def error(self, no: int, error: BaseException, first: int = 0) -> None:
        self.result(no, ResultKind.ERROR, dumps_exception(CallPickler(MainDefinitions()), error), first)

    def running(self, no: int) -> None:
        self.send(TaskRunning([no]))

    def confirm(
        self, row: CancelRow, kind: TaskCancelConfirmType, first: int = 0, count: int = 1, proven: bool = True
    ) -> None:
        self.send(TaskCancelConfirm([(row[0], row[1], int(kind), first, count, proven)]))

    def canceled(self, row: CancelRow) -> None:
        self.confirm(row, TaskCancelConfirmType.CANCELED)

    def refused(self, row: CancelRow) -> None:
        self.confirm(row, TaskCancelConfirmType.CANCEL_FAILED)

    def not_found(self, row: CancelRow) -> None:
        self.confirm(row, TaskCancelConfirmType.CANCEL_NOT_FOUND)

    def die(self) -> None:
        """End as a killed process does: descriptors closed, nothing said."""
        try:
            self._mine.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def garbage(self) -> None:
        """Say what is no message."""
        self._mine.sendall(b"\x01\x00\x00\x00\x00\x00\x00\x00\xff")

    # What it heard

    def next_submit(self) -> TaskRow:
        return self.submits.get(timeout=PATIENCE_S)

    def next_cancel(self) -> CancelRow:
        return self.cancels.get(timeout=PATIENCE_S)

    def _run(self) -> None:
        reader = StreamReader(self._mine)
        decoder: Decoder[ClientMessage] = Decoder(ClientMessage)
        while not reader.eof and not self.said_bye.is_set():
            for header, frames in reader.read():
                message = decoder.decode(header, frames)
                self.messages.append(message)
                if isinstance(message, Hello):
                    continue
                if isinstance(message, TaskSubmit):
                    for row in message.tasks:
                        self.on_submit(row)
                elif isinstance(message, TaskCancel):
                    for cancel in message.cancels:
                        self.on_cancel(cancel)
                elif isinstance(message, InheritanceReplaced):
                    self.replacements.put(message)
                elif isinstance(message, Bye):
                    self.said_bye.set()
        self._mine.close()
        os.close(self._alive_fd)


class Setting:
    """A client, the fake scheduler behind it, and what tests keep doing with the two."""

    def __init__(
        self,
        *,
        welcome: bool = True,
        cancel_timeout_s: float | None = PATIENCE_S,
        kind: type[ClientFutureManager] = ClientFutureManager,
    ) -> None:
        self.scheduler = FakeScheduler()
        if welcome:
            self.scheduler.welcome()
        self.client = kind(self.scheduler, cancel_timeout_s=cancel_timeout_s)

    def submit(self, *args: Any) -> ScalerFuture[Any]:
        return self.client.submit(never_called, args, {})

    def submit_sent(self) -> tuple[ScalerFuture[Any], int]:
        """Submit, wait until the scheduler has it, return the future and its number."""
        future = self.submit()
        return future, self.scheduler.next_submit()[0]

    def sync(self) -> None:
        """Wait until the client has heard everything that the scheduler said so far."""
        marker, no = self.submit_sent()
        self.scheduler.value(no, "marker")
        assert marker.result(PATIENCE_S) == "marker"

    def finished(self, value: Any = "value") -> ScalerFuture[Any]:
        future, no = self.submit_sent()
        self.scheduler.value(no, value)
        self.sync()
        return future

    def failed(self, error: BaseException) -> ScalerFuture[Any]:
        future, no = self.submit_sent()
        self.scheduler.error(no, error)
        self.sync()
        return future

    def close(self) -> None:
        """End it, whatever is outstanding."""
        self.client.close()
        if self.client.outstanding:
            self.scheduler.die()
        self.client.join()


class Background:
    """Runs a function in a thread. `result` waits for it."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._future: Future[Any] = Future()
        self._call = function, args, kwargs
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        function, args, kwargs = self._call
        try:
            self._future.set_result(function(*args, **kwargs))
        except BaseException as error:
            self._future.set_exception(error)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        result = self._future.result(PATIENCE_S)
        self._thread.join()
        return result
