"""The forker: forks workers, stops them, reaps them.

This module knows processes, their pages and the control messages. It does not know what a call is for. It is a process
with one thread and one event loop that never waits for anything in particular: a worker that does not stop or die in
time is reported, and no other worker waits for it.

One request's way: the agent sends FreezeWorker(kill_seq); the forker sends SIGSTOP and looks on; once the worker is
stopped its page cannot change. If that call is in progress its process group gets SIGKILL, else the worker goes on. The
pidfd tells of the death, or SIGCHLD alone where there is none; the group is emptied while its number cannot be reused;
then WorkerExited says that nothing is left.

As the workers' parent the forker cannot signal a stranger: a pid is reused only after its parent has reaped it.
"""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Any, Final, NoReturn

import msgspec

from scaler_executor.protocol.machine import unreachable
from scaler_executor.protocol.messages import (
    ForkerMessage,
    ForkerSetup,
    ForkWorker,
    FreezeWorker,
    InterruptWorker,
    KillWorker,
    ToForkerMessage,
    WorkerExited,
    WorkerForked,
    WorkerForkFailed,
    WorkerFrozen,
)
from scaler_executor.protocol.page import CURRENT, DONE, HEARD, INTERRUPT, ITEM, STOP, slot
from scaler_executor.runtime import cgroups, platform
from scaler_executor.runtime.last_words import show_fault
from scaler_executor.runtime.segments import remove_abandoned
from scaler_executor.runtime.worker import worker_main
from scaler_executor.runtime.worker_config import NUDGE, WorkerConfig

PIPE_BYTES: Final = 1 << 20
MAX_PACKET_BYTES: Final = 1 << 17
#: A stop takes some 10 us when a CPU is free: so long the loop looks again at once.
SPIN_S: Final = 0.0002
#: Pauses before the nudges of a worker that has not heard an interrupt. Each one can be missed as the interrupt was, by
#: a hair's breadth; a handler of the user's own, which does not tell that it has heard, is not pestered for ever.
NUDGE_PAUSES_S: Final = tuple(0.005 * 2**number for number in range(8))
#: So long forks leave the CPUs to interrupted workers. To unwind and end takes one of them about 1 ms, as does a fork.
UNWIND_S: Final = 0.002
#: How long the workers' groups may take to die when the forker itself is to end.
END_DEADLINE_S: Final = 2.0
#: So long the client may take to remove the files of large payloads, or to die.
LEFT_BEHIND_S: Final = 10

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[ToForkerMessage]).decode


@dataclass
class _Worker:
    """A worker that has been forked and not yet reported as gone."""

    worker_id: int
    pid: int
    pidfd: int
    page: memoryview
    #: FreezeWorkers that wait for the worker to stop.
    freezes: deque[FreezeWorker] = field(default_factory=deque)
    #: Somebody else had stopped it before we did: it is not continued.
    was_stopped: bool = False
    #: We sent SIGKILL.
    killed: bool = False
    #: The kernel's counter of kills for want of memory: where it is, and where it stood when the worker was forked or
    #: other deaths had been explained by it.
    memory_path: str | None = None
    memory_kills: int | None = None
    #: Its WorkerExited, once it is reaped; sent when its process group is empty.
    exited: WorkerExited | None = None
    #: When to look again (monotonic), and the pause before the next look; None: nothing is awaited but its death.
    look_at: float | None = None
    pause_s: float = 0.0
    #: When it counts as stuck; None: it need not do anything, or it has been reported already.
    stuck_at: float | None = None
    #: When to nudge it (monotonic), and the pauses before the nudges after that; None: it has heard, or need not.
    nudge_at: float | None = None
    nudge_pauses_s: Iterator[float] = field(default_factory=lambda: iter(()))


class Forker:
    """The event loop. Ends the process when the agent or the creator is gone."""

    def __init__(self, control: socket.socket, config: WorkerConfig, creator: int, creator_pidfd: int) -> None:
        control.setblocking(False)
        self._control = control
        self._config = config
        self._creator = creator
        self._watched = [creator_pidfd]
        #: {worker_id: worker}, and the same by pidfd. A pidfd stays open until the group is empty.
        self._workers: dict[int, _Worker] = {}
        self._by_pidfd: dict[int, _Worker] = {}
        #: Whether the loop waits for the control socket to take more.
        self._is_full = False
        #: What the control socket has not taken yet: message, descriptors to pass, descriptors to close after that.
        self._outbox: deque[tuple[bytes, list[int], list[int]]] = deque()
        #: Workers to fork. A fork takes longer than all the rest, so deaths are looked at in between.
        self._to_fork: deque[int] = deque()
        #: When to fork, whatever else uses the CPUs (monotonic); and their number.
        self._fork_after = 0.0
        self._cpus = cgroups.cpu_count_usable()
        self._bell_fd = -1
        self._stop_deadline_s = ForkerSetup().stop_deadline_s
        self._pid = os.getpid()
        self._memory_path = cgroups.counter_path(self._pid)
        #: By which workers watch this process, -1 where the kernel does that.
        self._lifeline_fd = platform.watch_self() if platform.PORTABLE else -1
        # SIGCHLD comes as a byte here: when a worker has stopped, and when an orphan of a worker has ended, which no
        # pidfd tells.
        self._child_in, self._child_out = os.pipe()
        os.set_blocking(self._child_in, False)
        os.set_blocking(self._child_out, False)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.set_wakeup_fd(self._child_out, warn_on_full_buffer=False)
        self._poller = platform.Poller()
        for fd in (control.fileno(), self._child_in, creator_pidfd):
            self._poller.register(fd, select.POLLIN)

    def run(self) -> NoReturn:
        """Serve until there is nobody to serve."""
        units_per_s = self._poller.units_per_s
        while True:
            timeout_s = self._timeout_s()
            events = self._poller.poll(None if timeout_s is None else timeout_s * units_per_s)
            for fd, mask in events:
                if fd == self._control.fileno():
                    if mask & select.POLLOUT:
                        self._flush()
                    if mask & ~select.POLLOUT:
                        self._receive()
                elif fd == self._child_in:
                    self._on_children()
                elif fd in self._by_pidfd:
                    self._on_death(self._by_pidfd[fd])
                elif fd in self._watched:
                    self._end()
            self._look_again()
            if self._to_fork and not self._fork_wait_s():
                self._fork(self._to_fork.popleft())
            if platform.RESERVE_S is not None and os.getppid() != self._creator:
                self._end()

    def _receive(self) -> None:
        """Handle the messages that are there, at most a few, so that deaths are seen meanwhile."""
        for _ in range(16):
            try:
                packet, ancillary, flags, _ = self._control.recvmsg(MAX_PACKET_BYTES, socket.CMSG_SPACE(8))
            except BlockingIOError:
                return
            except ConnectionError:
                self._end()
            if not packet:
                self._end()
            assert not flags & socket.MSG_TRUNC, "the agent sent more than MAX_PACKET_BYTES"
            fds = array.array("i")
            for _, _, data in ancillary:
                fds.frombytes(data[: len(data) // 4 * 4])
            for message in _decode(packet):
                self._handle(message, list(fds))

    def _handle(self, message: ToForkerMessage, fds: list[int]) -> None:
        if isinstance(message, ForkerSetup):
            self._stop_deadline_s = message.stop_deadline_s
            self._bell_fd, agent_pidfd = fds
            self._watched.append(agent_pidfd)
            self._poller.register(agent_pidfd, select.POLLIN)
            return
        if isinstance(message, ForkWorker):
            self._to_fork.append(message.worker_id)
            return
        worker = self._workers.get(message.worker_id)
        if worker is None or worker.exited is not None:
            return  # its WorkerExited is on the way
        if isinstance(message, InterruptWorker):
            # The number first: the worker must find it when the signal arrives. The slot, in case it has not come to
            # the call.
            worker.page[INTERRUPT] = message.seq
            _take_back(worker.page, message.seq)
            platform.signal_child(worker.pidfd, worker.pid, signal.SIGINT)
            self._fork_after = monotonic() + UNWIND_S
            worker.nudge_pauses_s = iter(NUDGE_PAUSES_S)
            self._nudge_later(worker)
        elif isinstance(message, FreezeWorker):
            self._freeze(worker, message)
        elif isinstance(message, KillWorker):
            self._kill(worker)
        else:
            unreachable(message)

    def _fork(self, worker_id: int) -> None:
        """Make a worker and hand its descriptors over."""
        opened: list[int] = []
        page: memoryview | None = None
        lifeline: platform.Lifeline | None = None
        pid = 0
        try:
            here, there = socket.socketpair()
            here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, platform.SEND_BUFFER_BYTES)
            opened += [here.detach(), there.detach()]
            opened += os.pipe()
            opened.append(platform.create_page())
            call_here, call_there, pipe_here, pipe_there, page_fd = opened
            platform.grow_pipe(pipe_there, PIPE_BYTES)
            page = platform.map_page(page_fd)
            lifeline = platform.Lifeline()
            pid = os.fork()
            if pid == 0:
                lifeline.hold()
                self._become_worker(worker_id, call_there, pipe_there, page_fd, page, [call_here, pipe_here])
            pidfd = lifeline.watch(pid)
        except OSError as error:
            if pid:
                os.kill(pid, signal.SIGKILL)  # reaped with the orphans
            if page is not None:
                platform.unmap_page(page)
            if lifeline is not None:
                lifeline.close()
            for fd in opened:
                os.close(fd)
            self._send(WorkerForkFailed(worker_id, str(error)))
            return
        lifeline.close()
        os.close(call_there)
        os.close(pipe_there)
        worker = _Worker(worker_id, pid, pidfd, page)
        worker.memory_path = self._memory_path
        worker.memory_kills = cgroups.killed_for_memory(self._memory_path)
        self._workers[worker_id] = worker
        self._by_pidfd[pidfd] = worker
        if not platform.PORTABLE:  # a lifeline tells of nothing that SIGCHLD does not, and a call may close it
            self._poller.register(pidfd, select.POLLIN)
        ours = [call_here, pipe_here, page_fd]
        self._send(WorkerForked(worker_id, pid), [*ours, pidfd], ours)

    def _become_worker(
        self, worker_id: int, call_fd: int, pipe_fd: int, page_fd: int, page: memoryview, fds: list[int]
    ) -> NoReturn:
        """Go on as the worker, with nothing of the forker's."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            if not platform.die_with_parent(self._pid, self._lifeline_fd):
                os._exit(0)
            self._poller.close()
            self._control.close()
            for _, _, held in self._outbox:
                fds += held
            for fd in [self._child_in, self._child_out, *self._watched, *self._by_pidfd, *fds]:
                if fd != self._config.identity.parent_fd:
                    os.close(fd)
            for worker in self._workers.values():
                platform.unmap_page(worker.page)
            call_fd, pipe_fd, page_fd, bell_fd = map(platform.move_away, (call_fd, pipe_fd, page_fd, self._bell_fd))
            self._config.identity.name = f"ScalerWorker-{worker_id}"
            self._config.worker_id = worker_id
            bell = platform.Bell.for_ringing(bell_fd)
            worker_main(socket.socket(fileno=call_fd), pipe_fd, page, page_fd, bell, self._config)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(70)  # EX_SOFTWARE: a bug of ours

    def _freeze(self, worker: _Worker, message: FreezeWorker) -> None:
        """Stop the worker. What is asked follows when it stands still."""
        if worker.killed:
            return
        if not worker.freezes:
            worker.was_stopped = _has_stopped(worker.pid) or platform.is_stopped(worker.pid)
            if not platform.signal_child(worker.pidfd, worker.pid, signal.SIGSTOP):
                return
            self._await(worker)
        worker.freezes.append(message)
        until = perf_counter() + SPIN_S
        while worker.freezes:
            self._look(worker)
            if perf_counter() > until:
                break

    def _look(self, worker: _Worker) -> None:
        """Do what was asked of a frozen worker, if it stands still by now."""
        if not _has_stopped(worker.pid):
            return
        page = worker.page
        answers = []
        while worker.freezes:
            message = worker.freezes.popleft()
            current, done, item = page[CURRENT], page[DONE], page[ITEM]
            in_progress = current if current != done else 0
            must_die = bool(message.kill_seq) and message.kill_seq == in_progress
            answers.append(WorkerFrozen(worker.worker_id, current, done, item, killed=must_die))
            if must_die:
                self._kill(worker)
                break
            for seq in message.revoke:
                if seq > current:
                    _take_back(page, seq)
            if message.split_seq and message.split_seq == in_progress and page[STOP] > item + 1:
                page[STOP] = item + 1
        if not worker.killed:
            worker.look_at = worker.stuck_at = None
            if not worker.was_stopped:
                platform.signal_child(worker.pidfd, worker.pid, signal.SIGCONT)
        for answer in answers:
            self._send(answer)

    def _kill(self, worker: _Worker) -> None:
        """Send SIGKILL to the process group. The rest follows when the worker is dead."""
        worker.freezes.clear()
        worker.killed = True
        platform.signal_group(worker.pidfd, worker.pid, signal.SIGKILL)
        # It may not have made its group yet.
        platform.signal_child(worker.pidfd, worker.pid, signal.SIGKILL)
        self._await(worker)

    def _await(self, worker: _Worker) -> None:
        """Expect something of the worker before the deadline."""
        now = monotonic()
        worker.pause_s = 0.001
        worker.look_at = now + worker.pause_s
        worker.stuck_at = now + self._stop_deadline_s

    def _nudge_later(self, worker: _Worker) -> None:
        pause_s = next(worker.nudge_pauses_s, None)
        worker.nudge_at = None if pause_s is None else monotonic() + pause_s

    def _nudge(self, worker: _Worker) -> None:
        """End the system call in which the worker is, if it has not heard the interrupt."""
        page = worker.page
        if worker.exited is not None or worker.killed or page[HEARD] == page[INTERRUPT]:
            worker.nudge_at = None
            return
        platform.signal_child(worker.pidfd, worker.pid, NUDGE)
        self._nudge_later(worker)

    def _fork_wait_s(self) -> float:
        """Return how long a fork has to wait, since interrupted workers need all the CPUs to unwind and end."""
        wait_s = self._fork_after - monotonic()
        if wait_s <= 0.0 or sum(1 for worker in self._workers.values() if worker.page[INTERRUPT]) < self._cpus:
            return 0.0
        return wait_s

    def _timeout_s(self) -> float | None:
        workers = self._workers.values()
        times = [due for worker in workers for due in (worker.look_at, worker.nudge_at) if due is not None]
        waits_s = [max(0.0, min(times) - monotonic())] if times else []
        if self._to_fork:
            waits_s.append(self._fork_wait_s())
        if platform.RESERVE_S is not None:
            waits_s.append(platform.RESERVE_S)
        return min(waits_s, default=None)

    def _look_again(self) -> None:
        """Look at the workers of which something is awaited and whose time has come."""
        for worker in list(self._workers.values()):
            if worker.nudge_at is not None and worker.nudge_at <= monotonic():
                self._nudge(worker)
            if worker.look_at is None or worker.look_at > monotonic():
                continue
            self._progress(worker)
            if worker.look_at is None:
                continue
            now = monotonic()
            worker.pause_s = min(2 * worker.pause_s, 0.1)
            worker.look_at = now + worker.pause_s
            if worker.stuck_at is not None and now >= worker.stuck_at:
                self._give_up(worker)

    def _give_up(self, worker: _Worker) -> None:
        """Report a worker that does not stop or die. It is told to go on, but a killed one is still awaited."""
        page = worker.page
        worker.stuck_at = None
        for _ in worker.freezes or [None]:
            self._send(WorkerFrozen(worker.worker_id, page[CURRENT], page[DONE], page[ITEM], worker.killed, stuck=True))
        if worker.freezes:
            worker.freezes.clear()
            worker.look_at = None
            platform.signal_child(worker.pidfd, worker.pid, signal.SIGCONT)

    def _progress(self, worker: _Worker) -> None:
        if worker.exited is not None:
            self._finish(worker)
        elif worker.freezes:
            self._look(worker)

    def _on_children(self) -> None:
        """Some child has stopped, gone on or ended."""
        try:
            os.read(self._child_in, 65536)
        except BlockingIOError:
            pass
        self._reap_orphans()
        for worker in list(self._workers.values()):
            if worker.look_at is not None:
                self._progress(worker)

    def _reap_orphans(self) -> None:
        """Reap ended children that are not workers: what workers left behind, and this process adopted."""
        by_pid = {worker.pid: worker for worker in self._workers.values() if worker.exited is None}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            worker = by_pid.pop(ended.si_pid, None)
            if worker is not None:
                self._on_death(worker)
            else:
                os.waitpid(ended.si_pid, 0)

    def _on_death(self, worker: _Worker) -> None:
        """Reap a worker, its group first."""
        if worker.exited is not None:
            return
        ended = os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return  # its threads are still ending
        out_of_memory = None
        if ended.si_code == os.CLD_KILLED and ended.si_status == signal.SIGKILL and not worker.killed:
            out_of_memory = self._ran_out_of_memory(worker)
        show_fault(worker.page)
        if worker.killed or worker.page[INTERRUPT] or ended.si_code != os.CLD_EXITED or ended.si_status:
            # What a stopped or dead call has started goes with it. Nobody else can have the number of a zombie.
            worker.killed = True
            platform.signal_group(worker.pidfd, worker.pid, signal.SIGKILL)
        _, status, usage = os.wait4(worker.pid, 0)
        page = worker.page
        worker.exited = WorkerExited(
            worker.worker_id,
            worker.pid,
            os.waitstatus_to_exitcode(status),
            page[CURRENT],
            page[DONE],
            page[ITEM],
            platform.peak_memory_bytes(usage),
            out_of_memory,
        )
        worker.freezes.clear()
        if not platform.PORTABLE:
            self._poller.unregister(worker.pidfd)
        if worker.killed and worker.stuck_at is None:
            self._await(worker)
        self._finish(worker)

    def _ran_out_of_memory(self, worker: _Worker) -> bool | None:
        """Tell whether a worker that somebody else has killed, and that is not reaped, may have been killed by the
        kernel for want of memory; None: there is no counter."""
        path, before = cgroups.counter_path_at_end(worker.pid, worker.memory_path), worker.memory_kills
        if path != worker.memory_path:
            before = 0  # a call has moved it into a group of its own
        kills = cgroups.killed_for_memory(path)
        if kills is None or before is None:
            return None
        if kills <= before:
            return False
        for other in self._workers.values():
            # One kill explains one death, if it was there when the other worker was.
            if other.memory_path == path and other.memory_kills is not None and other.memory_kills < kills:
                other.memory_kills += 1
        return True

    def _finish(self, worker: _Worker) -> None:
        """Report a reaped worker, if nothing is left of its group that has to go."""
        assert worker.exited is not None
        if worker.killed:
            # Members that were adopted by us end as zombies, and keep the group alive until they are reaped.
            while True:
                try:
                    if os.waitpid(-worker.pid, os.WNOHANG) == (0, 0):
                        break
                except ChildProcessError:
                    break
            if platform.signal_group(worker.pidfd, worker.pid, signal.SIGKILL):
                return
        del self._workers[worker.worker_id]
        del self._by_pidfd[worker.pidfd]
        self._send(worker.exited, to_close=[worker.pidfd])  # its WorkerForked may still stand in the outbox
        platform.unmap_page(worker.page)

    def _send(self, message: ForkerMessage, fds: list[int] | None = None, to_close: list[int] | None = None) -> None:
        """Send, or keep until the control socket takes it."""
        self._outbox.append((_encode(message), fds or [], to_close or []))
        if len(self._outbox) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._outbox:
            data, fds, to_close = self._outbox[0]
            try:
                if fds:
                    socket.send_fds(self._control, [data], fds)
                else:
                    self._control.send(data)
            except BlockingIOError:
                break
            except ConnectionError:
                self._end()
            self._outbox.popleft()
            for fd in to_close:
                os.close(fd)
        if self._is_full != bool(self._outbox):
            self._is_full = bool(self._outbox)
            mask = select.POLLIN | select.POLLOUT if self._is_full else select.POLLIN
            self._poller.modify(self._control.fileno(), mask)

    def _end(self) -> NoReturn:
        """Kill everything and go: nobody is left to tell."""
        try:
            for worker in self._workers.values():
                platform.signal_group(worker.pidfd, worker.pid, signal.SIGKILL)
                if worker.exited is None:
                    platform.signal_child(worker.pidfd, worker.pid, signal.SIGKILL)
            deadline = monotonic() + END_DEADLINE_S
            for worker in self._workers.values():
                if worker.exited is None:
                    if not platform.has_child_ended(worker.pid, max(0.0, deadline - monotonic()), worker.pidfd):
                        break
                    # What it forked between the two signals above is in its group still.
                    platform.signal_group(worker.pidfd, worker.pid, signal.SIGKILL)
            path = self._config.segments_path
            if path is not None and not remove_abandoned(path) and not os.fork():
                # Somebody who kills us all may not have come to the client yet, and it may take some time to die. If it
                # does not die, it removes this itself.
                signal.alarm(LEFT_BEHIND_S)
                remove_abandoned(path, waits=True)
        finally:
            os._exit(0)


def _ignore(number: int, frame: Any) -> None:
    """Handle a signal that is only wanted for its byte in the wake-up pipe."""


def _take_back(page: memoryview, seq: int) -> None:
    """Let a call not start, unless its slot has passed to a later one."""
    if page[slot(seq)] == seq:
        page[slot(seq)] = 0


def _has_stopped(pid: int) -> bool:
    """Tell whether a child has stopped, with all its threads, and has not gone on since. Nothing is consumed: the
    answer stays."""
    try:
        state = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return state is not None and state.si_code == os.CLD_STOPPED
