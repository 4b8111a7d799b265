"""Carries out what `protocol.agent` decides: the workers' sockets, pipes and pages, and the forker's control pair.

It knows descriptors and processes; it decides nothing about calls. Everything runs in the loop of the serve process.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

import msgspec

from scaler_executor.protocol import agent as protocol
from scaler_executor.protocol.codec import Encoder, RemoteProtocolError
from scaler_executor.protocol.messages import (
    Blocked,
    DeathReport,
    ForkerMessage,
    ForkerSetup,
    ForkWorker,
    FreezeWorker,
    InterruptWorker,
    KillWorker,
    Message,
    SessionMessage,
    ToForkerMessage,
    WorkerExited,
    WorkerForked,
    WorkerFrozen,
)
from scaler_executor.protocol.page import CURRENT, DONE, ITEM, NESTS, OUTPUT_END, OUTPUT_WATCHED, RANG, slot
from scaler_executor.runtime import log, platform
from scaler_executor.runtime.agent_sessions import WorkerSession
from scaler_executor.runtime.last_words import fault_of, stderr_of
from scaler_executor.runtime.loop import READABLE, WRITABLE, Loop
from scaler_executor.runtime.output_ring import OutputReader
from scaler_executor.runtime.pipe import WorkerResults
from scaler_executor.runtime.segments import SegmentStore, StoredSegment
from scaler_executor.runtime.transport import StreamWriter

#: Read from one worker before the others have their turn. More than a pipe holds, so that a ring is never missed.
PIPE_BUDGET_BYTES: Final = 4 << 20
#: Results are left in the pipes while more than this waits to be sent to the client.
UPSTREAM_BYTES: Final = 64 << 20
#: So many messages to the forker are one packet. The largest, a FreezeWorker, takes some 10 KB.
PACKET_MESSAGES: Final = 8
#: A worker that has printed something is looked at again after so long: until then it need not ring.
OUTPUT_INTERVAL_S: Final = 0.01
#: So many forkers in a row may be lost before they have forked anything.
MAX_LOST_FORKERS: Final = 5


class WorkerHandle:
    """This side's ends of one worker.

    Args:
        worker_id, pid: Which.
        fds: Of call pair, result pipe, page, and the process.
        store: Where its large results are; None: nowhere.
    """

    def __init__(self, worker_id: int, pid: int, fds: list[int], store: SegmentStore | None) -> None:
        call_fd, pipe_fd, page_fd, self.pidfd = fds
        self.worker_id = worker_id
        self.pid = pid
        self.socket = socket.socket(fileno=call_fd)
        self.socket.setblocking(False)
        self.writer = StreamWriter(self.socket)
        self.page = platform.map_page(page_fd)
        os.close(page_fd)
        self._store = store
        #: Of the files that it has written, the last one that we have heard of.
        self._last_segment = 0
        self.results = WorkerResults(pipe_fd, self.page, self._take_segment if store is not None else None)
        self.output = OutputReader(self.page)
        #: Told to exit once everything is written.
        self.retired = False
        #: Its pipe is watched, because a record is only half here.
        self.is_watched = False
        #: What the calls in it submit comes by this, if they do.
        self.session: WorkerSession | None = None
        #: Why we had it killed, if we had.
        self.killed_for = ""

    def _take_segment(self, writer: int, number: int, size_bytes: int) -> StoredSegment:
        """Take over a file that a record names."""
        if writer != self.worker_id or not size_bytes:
            raise RemoteProtocolError(f"a record with file {number} of writer {writer}")
        self._last_segment = max(self._last_segment, number)
        assert self._store is not None
        return self._store.take(writer, number, size_bytes)

    def close(self) -> None:
        """Let go of everything. The worker is dead and its results are read."""
        if self._store is not None:
            self._store.remove_unheard(self.worker_id, self._last_segment)
        self.socket.close()
        self.results.close()
        self.output.close()
        platform.unmap_page(self.page)
        os.close(self.pidfd)


class AgentRuntime:
    """The agent of this machine.

    Args:
        state: Decides.
        loop: Calls back.
        control: This side's end of the forker's control pair.
        send: Takes the messages to the scheduler. It must not call back into this object.
        upstream_bytes: How much waits to be sent to clients.
        inherits: Whether workers of this forker, unlike those of another one, inherit their client's process.
        restart_forker: Starts another forker and returns its control socket, or None if there can be none.
        is_ending: Tells whether the end of everything is on its way, so that no other forker is wanted.
        on_drained: Called when nothing is left after `drain`.
        store: Where workers put large results; None: nowhere.
    """

    def __init__(
        self,
        state: protocol.AgentState,
        loop: Loop,
        control: socket.socket,
        *,
        send: Callable[[Message], None],
        upstream_bytes: Callable[[], int],
        inherits: bool,
        restart_forker: Callable[[], socket.socket | None],
        is_ending: Callable[[], bool],
        on_drained: Callable[[], None],
        store: SegmentStore | None = None,
    ) -> None:
        self._state = state
        self._store = store
        self._loop = loop
        self._send = send
        self._upstream_bytes = upstream_bytes
        self._inherits = inherits
        self._restart_forker = restart_forker
        self._is_ending = is_ending
        #: Forkers lost in a row that had forked nothing.
        self._lost_forkers = 0
        self._on_drained = on_drained
        self._encoder = Encoder()
        self._workers: dict[int, WorkerHandle] = {}
        #: Workers to look at, in this order; and whether that is going on.
        self._to_look: dict[int, None] = {}
        self._is_looking = False
        #: Workers that have been ordered but are not here yet.
        self._ordered: set[int] = set()
        self._bell = platform.Bell.create()
        loop.watch(self._bell.fileno(), self._on_bell)
        #: Workers that have just printed something, and when they are looked at again.
        self._printing: dict[int, WorkerHandle] = {}
        self._output_due: float | None = None
        #: Pipes are not read because too much waits upstream.
        self._is_held_up = False
        self._perform_one: dict[type, Callable[[Any], None]] = {
            protocol.Send: lambda instruction: self._send(instruction.message),
            protocol.Start: self._start,
            protocol.Look: self._want_look,
            protocol.Fork: self._fork,
            protocol.Interrupt: lambda i: self._tell_forker(InterruptWorker(i.worker_id, i.seq)),
            protocol.Freeze: lambda i: self._tell_forker(FreezeWorker(i.worker_id, i.kill_seq, i.revoke, i.split_seq)),
            protocol.Kill: lambda i: self._tell_forker(KillWorker(i.worker_id)),
            protocol.Retire: self._retire,
            protocol.ToWorker: self._tell_session,
            protocol.Drained: lambda _: self._on_drained(),
        }
        self._control: socket.socket | None = None
        self._use_forker(control)

    # Events in, instructions out

    def handle(self, event: protocol.Event) -> None:
        """Feed one event to the state and do what it says."""
        now = monotonic()
        if self._output_due is not None and self._output_due <= now and not self._is_looking:
            self._look_at_output(now)
        for instruction in self._state.handle(event, now):
            self._perform_one[type(instruction)](instruction)
        if self._unsent:
            self._flush_control()
        if self._to_look and not self._is_looking:
            self._look_at_workers()

    def next_deadline(self) -> float | None:
        """Return when `handle(Tick())` is due, or None."""
        deadline = 0.0 if self._to_look else self._state.next_deadline()
        due = self._output_due
        return deadline if due is None else due if deadline is None else min(deadline, due)

    @property
    def outstanding(self) -> int:
        """Number of tasks that are here."""
        return self._state.outstanding

    def drain(self) -> None:
        """Take nothing more, let workers end."""
        self.handle(protocol.Drain())

    def close(self) -> None:
        """Let the forker go, and with it whatever workers are left."""
        if self._control is not None:
            self._loop.forget(self._control.fileno())
            self._control.close()
            self._control = None

    # Workers

    def _start(self, instruction: protocol.Start) -> None:
        handle = self._workers.get(instruction.worker_id)
        if handle is None:
            return
        page = handle.page
        for row in instruction.message.calls:
            page[slot(row[0])] = row[0]
        try:
            if not handle.writer.send(self._encoder.pack(instruction.message)):
                self._loop.watch(handle.socket.fileno(), lambda: self._flush(handle), WRITABLE)
        except ConnectionError:
            pass  # it is dead; the forker will say how

    def _flush(self, handle: WorkerHandle) -> None:
        try:
            if not handle.writer.flush():
                return
        except ConnectionError:
            pass
        self._loop.forget(handle.socket.fileno())
        if handle.retired:
            self._hang_up(handle)

    def _retire(self, instruction: protocol.Retire) -> None:
        handle = self._workers.get(instruction.worker_id)
        if handle is not None:
            handle.retired = True
            if not handle.writer.pending_bytes:
                self._hang_up(handle)

    def _hang_up(self, handle: WorkerHandle) -> None:
        try:
            handle.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has gone first

    def _on_bell(self) -> None:
        self._bell.clear()
        self.read_pipes()

    def read_pipes(self) -> None:
        """Read the results of the workers that rang, unless too much waits upstream."""
        self._is_held_up = self._upstream_bytes() > UPSTREAM_BYTES
        if self._is_held_up:
            return
        for handle in list(self._workers.values()):
            if handle.page[RANG]:
                self._read(handle)

    def upstream_has_room(self) -> None:
        """Go on reading after `upstream_bytes` has fallen."""
        if self._is_held_up:
            self.read_pipes()

    def _read(self, handle: WorkerHandle) -> None:
        # First the mark, then the pipe: what is written in between rings again.
        handle.page[RANG] = 0
        if handle.page[NESTS]:
            self._open_session(handle)
        try:
            records = handle.results.read(PIPE_BUDGET_BYTES)
        except RemoteProtocolError as error:
            self._distrust(handle, error)
            return
        if handle.results.is_partial != handle.is_watched:
            # A large record comes in many pieces and rings once.
            handle.is_watched = handle.results.is_partial
            if handle.is_watched:
                self._loop.watch(handle.results.fileno(), lambda: self._read_more(handle))
            else:
                self._loop.forget(handle.results.fileno())
        if handle.page[OUTPUT_END] != handle.output.position:
            self._read_output(handle)  # after the results and said before them: what is in there was printed before
        if records:
            self.handle(protocol.Records(handle.worker_id, records))

    def _read_output(self, handle: WorkerHandle) -> None:
        """Take what a worker has printed."""
        handle.page[OUTPUT_WATCHED] = 1
        self._printing[handle.worker_id] = handle
        if self._output_due is None:
            self._output_due = monotonic() + OUTPUT_INTERVAL_S
        rows = handle.output.read()
        if rows:
            # Nothing is looked at meanwhile: what was read before, this and results, is to be said before what is read
            # later.
            was_looking, self._is_looking = self._is_looking, True
            try:
                self.handle(protocol.Printed(handle.worker_id, rows))
            finally:
                self._is_looking = was_looking

    def _look_at_output(self, now: float) -> None:
        """Look at the workers that have printed something: one that goes on is looked at again, another one rings."""
        self._output_due = None
        printing, self._printing = self._printing, {}
        if self._upstream_bytes() > UPSTREAM_BYTES:
            self._printing, self._output_due = printing, now + OUTPUT_INTERVAL_S
            return
        for handle in printing.values():
            if handle.worker_id in self._workers:
                # First the mark, then the ring: what is printed in between rings.
                handle.page[OUTPUT_WATCHED] = 0
                if handle.page[OUTPUT_END] != handle.output.position:
                    self._read_output(handle)

    def _read_more(self, handle: WorkerHandle) -> None:
        if self._upstream_bytes() > UPSTREAM_BYTES:
            self._is_held_up = True
            handle.page[RANG] = 1
            handle.is_watched = False
            self._loop.forget(handle.results.fileno())
        else:
            self._read(handle)

    def _distrust(self, handle: WorkerHandle, error: RemoteProtocolError) -> None:
        """User code has written into our pipe: the worker is no use any more."""
        log.warn("agent", "worker %d (pid %d) wrote nonsense and is killed: %s", handle.worker_id, handle.pid, error)
        handle.killed_for = f"the worker process wrote nonsense where its results go, and was killed: {error}"
        self._loop.forget(handle.results.fileno())
        self._tell_forker(KillWorker(handle.worker_id))
        self._flush_control()

    def _open_session(self, handle: WorkerHandle) -> None:
        """Take our end of the pair of the worker's nested session."""
        handle.page[NESTS] = 0
        try:
            _, fds, _, _ = socket.recv_fds(handle.socket, 1, 1)
        except OSError:
            return
        if fds and handle.session is None:
            handle.session = WorkerSession(
                self._loop,
                socket.socket(fileno=fds[0]),
                lambda message: self._session_said(handle, message),
                lambda error: self._distrust(handle, error),
            )
        else:
            for fd in fds:
                os.close(fd)

    def _session_said(self, handle: WorkerHandle, message: SessionMessage) -> None:
        if isinstance(message, Blocked):
            self._read(handle)  # the calls before the one that waits are over: it is known then that they are
        self.handle(protocol.FromWorker(handle.worker_id, message))

    def _tell_session(self, instruction: protocol.ToWorker) -> None:
        handle = self._workers.get(instruction.worker_id)
        if handle is not None and handle.session is not None:
            handle.session.send(instruction.message)

    def _want_look(self, instruction: protocol.Look) -> None:
        self._to_look[instruction.worker_id] = None

    def _look_at_workers(self) -> None:
        """Look once at each worker that is to be looked at. What is seen may be the reason for more looks, and is for
        ever where the state takes longer than from one look to the next: those wait for the next round of the loop."""
        self._is_looking = True
        try:
            to_look, self._to_look = self._to_look, {}
            for worker_id in to_look:
                self._look(worker_id)
        finally:
            self._is_looking = False

    def _look(self, worker_id: int) -> None:
        handle = self._workers.get(worker_id)
        if handle is None:
            return
        page = handle.page
        done, current = page[DONE], page[CURRENT]
        if not self._is_held_up:
            self._read(handle)
            if not handle.results.is_partial and (records := handle.results.take_range()):
                self.handle(protocol.Records(handle.worker_id, records))
        if worker_id in self._workers:
            self.handle(protocol.Seen(handle.worker_id, current, done))

    # The forker

    def _use_forker(self, control: socket.socket) -> None:
        control.setblocking(False)
        self._control = control
        self._loop.watch(control.fileno(), self._on_control)
        pidfd = platform.watch_self()
        try:
            packet = msgspec.msgpack.encode([ForkerSetup()])
            socket.send_fds(control, [packet], [self._bell.ring_fd, pidfd])
        except ConnectionError:
            pass  # lost already; its end is noticed by reading
        finally:
            os.close(pidfd)
        self._decode = msgspec.msgpack.Decoder(ForkerMessage).decode
        #: Messages for the forker that the control pair has not taken yet; and whether it was full.
        self._unsent: list[ToForkerMessage] = []
        self._is_control_full = False

    def _fork(self, instruction: protocol.Fork) -> None:
        self._ordered.add(instruction.worker_id)
        self._tell_forker(ForkWorker(instruction.worker_id))

    def _tell_forker(self, message: ToForkerMessage) -> None:
        """Say it with the next `_flush_control`: each packet wakes the forker, which may then take this CPU."""
        if self._control is not None:
            self._unsent.append(message)
        elif isinstance(message, ForkWorker):
            self._fork_failed(message.worker_id, "the process that forks workers was lost")

    def _flush_control(self) -> None:
        control = self._control
        if control is None:
            return
        unsent = self._unsent
        is_full = False
        try:
            while unsent:
                control.send(msgspec.msgpack.encode(unsent[:PACKET_MESSAGES]))
                del unsent[:PACKET_MESSAGES]
        except BlockingIOError:
            is_full = True
        except ConnectionError:
            unsent.clear()  # its end is noticed by reading
        if is_full != self._is_control_full:
            self._is_control_full = is_full
            self._loop.watch(control.fileno(), self._on_control, READABLE | WRITABLE if is_full else READABLE)

    def _on_control(self) -> None:
        while (control := self._control) is not None:
            try:
                packet, fds, _, _ = socket.recv_fds(control, 1 << 16, 4)
            except BlockingIOError:
                break
            except ConnectionError:
                packet, fds = b"", []
            if not packet:
                self._forker_lost()
                break
            self._from_forker(self._decode(packet), fds)
        if self._unsent:
            self._flush_control()

    def _from_forker(self, message: ForkerMessage, fds: list[int]) -> None:
        if isinstance(message, WorkerForked):
            self._lost_forkers = 0
            self._ordered.discard(message.worker_id)
            handle = self._workers[message.worker_id] = WorkerHandle(message.worker_id, message.pid, fds, self._store)
            self.handle(protocol.Forked(message.worker_id, message.pid))
            if handle.page[RANG] and not self._is_held_up:
                self._read(handle)  # it rang, and the bell was heard, before this end of it was here
        elif isinstance(message, WorkerFrozen):
            if message.worker_id in self._workers:
                self.handle(
                    protocol.Frozen(
                        message.worker_id, message.current, message.done, message.item, message.killed, message.stuck
                    )
                )
        elif isinstance(message, WorkerExited):
            self._worker_exited(message)
        else:
            self._fork_failed(message.worker_id, message.reason)

    def _fork_failed(self, worker_id: int, reason: str, forker_lost: bool = False) -> None:
        self._ordered.discard(worker_id)
        self.handle(protocol.ForkFailed(worker_id, reason, forker_lost))

    def _worker_exited(self, message: WorkerExited) -> None:
        handle = self._workers.pop(message.worker_id, None)
        if handle is None:
            return
        report = DeathReport(
            reason=handle.killed_for or _sentence(message.exit_code, message.out_of_memory),
            exit_code=message.exit_code,
            host=socket.gethostname(),
            pid=message.pid,
            worker_id=message.worker_id,
            peak_memory_bytes=message.peak_memory_bytes,
            out_of_memory=message.out_of_memory,
            stderr=stderr_of(handle.page, message.current, message.item),
            fault=fault_of(handle.page),
        )
        self._bury(handle, message.current, message.done, message.item, report)

    def _bury(
        self,
        handle: WorkerHandle,
        current: int,
        done: int,
        item: int,
        report: DeathReport,
        forker_lost: bool = False,
    ) -> None:
        """Take what a dead worker left, then say that it is dead: in this order, for a result that is there counts."""
        if handle.is_watched:
            self._loop.forget(handle.results.fileno())
        self._loop.forget(handle.socket.fileno())
        if handle.session is not None:
            handle.session.read()
            handle.session.close()
        try:
            records = handle.results.drain()
        except RemoteProtocolError:
            records = []
        rows = handle.output.read()
        handle.close()
        if rows:
            self.handle(protocol.Printed(handle.worker_id, rows))
        if records:
            self.handle(protocol.Records(handle.worker_id, records))
        self.handle(protocol.Exited(handle.worker_id, current, done, item, report, forker_lost))

    def _forker_lost(self) -> None:
        """The forker was killed. Its workers die with it; make sure, bury them, and start another forker."""
        self.close()
        is_ending = self._is_ending()
        if not is_ending:
            log.warn("agent", "the process that forks workers was lost; its workers are killed")
        self._unsent = []
        for handle in self._workers.values():
            platform.kill_orphan(handle.pidfd, handle.pid)
        # One forker after the other that is lost before it has forked anything: something here does not let them live.
        self._lost_forkers += 1
        control = self._restart_forker() if not is_ending and self._lost_forkers <= MAX_LOST_FORKERS else None
        ordered = list(self._ordered)
        if control is not None:
            self._use_forker(control)
            if self._inherits:
                # First of all: whatever comes next may order workers.
                reason = "the process that forks workers was lost, and with it what workers inherited"
                self.handle(protocol.Disinherited(reason))
        for worker_id in ordered:
            self._fork_failed(worker_id, "the process that forks workers was lost", control is not None)
        for handle in list(self._workers.values()):
            self._loop.watch(handle.pidfd, lambda handle=handle: self._orphan_died(handle))  # type: ignore[misc]

    def _orphan_died(self, handle: WorkerHandle) -> None:
        self._loop.forget(handle.pidfd)
        if self._workers.pop(handle.worker_id, None) is None:
            return
        page = handle.page
        report = DeathReport(
            reason="the worker was killed because the process that forks workers was lost",
            host=socket.gethostname(),
            pid=handle.pid,
            worker_id=handle.worker_id,
            stderr=stderr_of(page, page[CURRENT], page[ITEM]),
        )
        self._bury(handle, page[CURRENT], page[DONE], page[ITEM], report, forker_lost=True)


def _sentence(exit_code: int, out_of_memory: bool | None) -> str:
    """Say in words how a worker ended."""
    if exit_code >= 0:
        return f"the worker process exited with code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = ""
    if out_of_memory:
        hint = ", possibly out of memory: the kernel says that it has killed a process for want of it"
    elif -exit_code == signal.SIGKILL:
        hint = ", possibly out of memory: whether it was, cannot be told here"
        if out_of_memory is not None:
            hint = ", which somebody sent: the kernel says that it has killed nothing for want of memory"
    return f"the worker process was killed by {name}{hint}"
