"""A forker and its workers in real processes, driven as the agent drives them, for the tests in this folder."""

from __future__ import annotations

import array
import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from scaler_executor.protocol.codec import Encoder
from scaler_executor.protocol.messages import (
    CallStyle,
    ForkerMessage,
    ForkerSetup,
    ForkWorker,
    Function,
    Message,
    WorkerExited,
    WorkerForked,
    WorkerFrozen,
    WorkerRun,
)
from scaler_executor.protocol.page import (
    RANG,
    RECORD_BATCH_END,
    RECORD_ERROR,
    RECORD_READY,
    RECORD_START_FAILED,
    RECORD_VALUE,
    RECORD_VALUES,
    slot,
)
from scaler_executor.runtime import platform
from scaler_executor.runtime.calls import CallPickler, loads_exception, loads_value, loads_values
from scaler_executor.runtime.forker_start import start_forker_by_fork
from scaler_executor.runtime.functions import FunctionTable
from scaler_executor.runtime.namespace import MainDefinitions, snapshot
from scaler_executor.runtime.pipe import WorkerResults
from scaler_executor.runtime.transport import StreamWriter
from scaler_executor.runtime.worker_config import WorkerConfig

DEADLINE_S = 30.0

decode = msgspec.msgpack.Decoder(ForkerMessage).decode


class Handle:
    """One worker, as its agent sees it."""

    def __init__(self, agent: Agent, message: WorkerForked, fds: list[int]) -> None:
        call_fd, pipe_fd, page_fd, self.pidfd = fds
        self.agent = agent
        self.worker_id = message.worker_id
        self.pid = message.pid
        self.socket = socket.socket(fileno=call_fd)
        self.socket.setblocking(False)
        self.writer = StreamWriter(self.socket)
        self.page = platform.map_page(page_fd)
        self.pipe = WorkerResults(pipe_fd, self.page)
        os.close(page_fd)
        self.seq = 0
        self.records: list[tuple[int, int, int, Any]] = []
        self.exited: WorkerExited | None = None
        self.frozen: list[WorkerFrozen] = []
        self.known: set[int] = set()
        self.encoder = Encoder()

    def send(self, calls: list[tuple[Callable[..., Any], list[tuple[Any, ...]] | tuple[Any, ...]]]) -> list[int]:
        """Send one message: (function, args) is a call, (function, [args, ...]) a run. Return the numbers."""
        rows: list[Any] = []
        functions: list[Function] = []
        for function, arguments in calls:
            style = CallStyle.MAP if isinstance(arguments, list) else CallStyle.CALL
            function_id, new, _ = self.agent.table.register(self.agent.table.prepare(function, style))
            for sent in new:
                self.agent.functions[sent.function_id] = sent
            if function_id not in self.known and function_id:
                self.known.add(function_id)
                functions.append(self.agent.functions[function_id])
            if isinstance(arguments, list):
                payload = self.agent.pickler.dumps_run(arguments)
            elif function_id:
                payload = self.agent.pickler.dumps_call((arguments, {}))
            else:
                payload = self.agent.pickler.dumps_call((function, arguments, {}))
            rows.append((len(arguments) if isinstance(arguments, list) else 1, 0, function_id, payload))
        return self.send_rows(rows, functions)

    def send_rows(self, rows: list[Any], functions: list[Function] | None = None) -> list[int]:
        """Send rows as they are, but for their numbers."""
        calls = []
        for row in rows:
            self.seq += 1
            self.page[slot(self.seq)] = self.seq
            calls.append((self.seq, *row))
        self.writer.send(self.encoder.pack(WorkerRun(calls, functions or [])))
        return [call[0] for call in calls]

    def call(self, function: Callable[..., Any], *args: Any) -> int:
        """Send one call."""
        return self.send([(function, args)])[0]

    def answers(self) -> list[tuple[int, int, int, Any]]:
        """Return the records but for READY and BATCH_END, values and exceptions unpickled."""
        return [record for record in self.records if record[0] not in (RECORD_READY, RECORD_BATCH_END)]

    def value_of(self, seq: int, item: int = 0) -> Any:
        """Wait for a value, or raise what came instead."""
        self.agent.wait(lambda: any(record[1:3] == (seq, item) for record in self.answers()))
        kind, _, _, value = next(record for record in self.answers() if record[1:3] == (seq, item))
        if kind == RECORD_ERROR:
            raise value
        assert kind == RECORD_VALUE, kind
        return value

    def close(self) -> None:
        """Close our ends."""
        self.socket.close()
        self.pipe.close()
        platform.unmap_page(self.page)
        os.close(self.pidfd)


class Agent:
    """The agent's side: forks workers, polls the bell and the control socket."""

    def __init__(self, config: WorkerConfig | None = None, *, stop_deadline_s: float = 5.0) -> None:
        config = config or WorkerConfig()
        config.inherited_main = snapshot()
        self.bell = platform.Bell.create()
        self.forker_pid, self.control = start_forker_by_fork(config)
        self.forker_pidfd = os.pidfd_open(self.forker_pid)
        main = MainDefinitions()
        main.inherit(config.inherited_main)
        self.pickler = CallPickler(main)
        self.table = FunctionTable(self.pickler, main)
        self.functions: dict[int, Function] = {}
        self.workers: dict[int, Handle] = {}
        self.others: list[ForkerMessage] = []
        self.is_lost = False
        self.poller = select.poll()
        self.poller.register(self.bell.fileno(), select.POLLIN)
        self.poller.register(self.control, select.POLLIN)
        pidfd = platform.watch_self()
        socket.send_fds(
            self.control, [msgspec.msgpack.encode([ForkerSetup(stop_deadline_s)])], [self.bell.ring_fd, pidfd]
        )
        os.close(pidfd)

    def tell(self, *messages: Message) -> None:
        """Send control messages, in one packet."""
        self.control.send(msgspec.msgpack.encode(messages))

    def fork(self, worker_id: int = 1, *, wait: bool = True) -> Handle:
        """Return a new worker, ready."""
        self.tell(ForkWorker(worker_id))
        self.wait(lambda: worker_id in self.workers)
        handle = self.workers[worker_id]
        if wait:
            self.wait(lambda: any(record[0] in (RECORD_READY, RECORD_START_FAILED) for record in handle.records))
        return handle

    def wait(self, condition: Callable[[], bool], *, timeout_s: float = DEADLINE_S) -> None:
        """Serve events until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, "timed out"
            # As the agent does: a silent worker may hold results that it had no reason to ring for.
            events = {fd for fd, _ in self.poller.poll(min(left, 0.02) * 1000)}
            if self.bell.fileno() in events:
                self.bell.clear()
            if self.control.fileno() in events:
                self.receive()
            for handle in self.workers.values():
                if handle.exited is None:
                    handle.page[RANG] = 0
                    self.take(handle, handle.pipe.read(1 << 20))
                    if not handle.pipe.is_partial:
                        self.take(handle, handle.pipe.take_range())

    def take(self, handle: Handle, records: list[Any]) -> None:
        """Keep records, unpickled."""
        for kind, seq, item, payload in records:
            if kind == RECORD_VALUES:
                values = loads_values(payload[4:], int.from_bytes(payload[:4], "little"))
                handle.records += [(RECORD_VALUE, seq, item + index, value) for index, value in enumerate(values)]
                continue
            if kind == RECORD_VALUE:
                payload = loads_value(payload)
            elif kind == RECORD_ERROR:
                payload = loads_exception(payload)
            handle.records.append((kind, seq, item, payload))

    def receive(self) -> None:
        """Handle one control message."""
        packet, ancillary, _, _ = self.control.recvmsg(1 << 16, socket.CMSG_SPACE(16))
        if not packet:
            self.is_lost = True
            self.poller.unregister(self.control)
            return
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        message = decode(packet)
        if isinstance(message, WorkerForked):
            self.workers[message.worker_id] = Handle(self, message, list(fds))
        elif isinstance(message, WorkerExited):
            handle = self.workers[message.worker_id]
            self.take(handle, handle.pipe.drain())
            handle.exited = message
        elif isinstance(message, WorkerFrozen):
            self.workers[message.worker_id].frozen.append(message)
        else:
            self.others.append(message)

    def close(self) -> None:
        """End the forker and see to it that nothing is left."""
        self.control.close()
        os.waitpid(self.forker_pid, 0)
        poller = select.poll()
        for handle in self.workers.values():
            poller.register(handle.pidfd, select.POLLIN)
            assert poller.poll(5000), "a worker outlives its forker"
            poller.unregister(handle.pidfd)
            handle.close()
        os.close(self.forker_pidfd)
        self.bell.close()


def open_fds() -> list[str]:
    """Return what this process has open."""
    return sorted(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}" for fd in _fd_numbers())


def _fd_numbers() -> list[int]:
    # The listing itself opens a descriptor, which is gone when it is looked at.
    return [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def children() -> set[int]:
    """Return the children of this process, the dead that nobody has reaped among them."""
    found = set()
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/children") as file:
            found |= {int(word) for word in file.read().split()}
    return found


def state_of(pid: int) -> str:
    """Return the letter that proc(5) gives for a process's state, "" for none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][:1]
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    return state_of(pid) not in ("", "Z")


def await_death(pid: int) -> None:
    """Return when a process, not necessarily a child, is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        assert poller.poll(DEADLINE_S * 1000), f"process {pid} is still alive"
    finally:
        os.close(pidfd)


#: Inherited by every worker: what calls write here can be read at once, and also when they were killed.
journal = memoryview(mmap.mmap(-1, 1 << 20)).cast("q")


def kill_self(number: int = signal.SIGKILL) -> None:
    """End the worker by a signal."""
    os.kill(os.getpid(), number)
