"""A simulated worker and its forker: the page, the pipe and the order of steps are those of
`scaler_executor.protocol.page`.

Each step is atomic, and the forker, a killer or the clock may come between any two. What the user's code does in a
call is read from the call's `Behaviour`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from scaler_executor.protocol.messages import CallStyle, WorkerRun
from scaler_executor.protocol.page import (
    CURRENT,
    DONE,
    INTERRUPT,
    ITEM,
    RECORD_BATCH_END,
    RECORD_ERROR,
    RECORD_READY,
    RECORD_SKIPPED,
    RECORD_START_FAILED,
    RECORD_UNWOUND,
    RECORD_VALUE,
    STOP,
    slot,
)


@dataclass(frozen=True)
class Behaviour:
    """What the code of one item does."""

    duration_s: float = 0.0
    #: When interrupted: "unwind", "swallow" (and return a value at the end), or "ignore" (C code: it sees the signal
    #: at its end).
    on_interrupt: str = "unwind"
    unwind_s: float = 0.0
    #: How it ends: "value", "error", or "exit" (os._exit).
    ending: str = "value"
    #: What it submits itself, and whether it waits for that.
    children: tuple[Behaviour, ...] = ()
    waits: bool = True


class Page(dict):  # type: ignore[type-arg]
    """The words that are not zero."""

    def __missing__(self, index: int) -> int:
        return 0


def value_of(no: int) -> bytes:
    """Return the result of an item: of fixed size, so that joined ones can be told apart."""
    return b"%08d" % no


class SimWorker:
    """One worker process. `step` does the next atomic thing; `cluster` is told what user code does."""

    def __init__(self, agent: int, worker_id: int, start: str) -> None:
        self.agent = agent
        self.worker_id = worker_id
        #: "ready", "fails" (the initializer raises) or "dies".
        self.start = start
        self.page = Page()
        self.inbox: deque[WorkerRun] = deque()
        self.hung_up = False
        self.pipe: list[tuple[int, int, int, bytes]] = []
        #: What its items have printed and the agent has not read.
        self.printed: list[tuple[int, int, int, bytes]] = []
        self.pc = "start"
        #: It has what its client's process had when its forker was forked; or what replaces that.
        self.inherits = True
        self.is_defined = False
        self.dead = False
        self.killed = False
        self.frozen = 0
        self.freezes: deque[Any] = deque()
        self.stuck = False  # survives what it should not, for a while
        self.exit_code = 0
        #: The agent has its descriptors.
        self.is_known = False
        self.signal = False
        self.armed = 0
        self.interrupted = False
        self.calls: deque[Any] = deque()
        self.seq = 0
        self.items = 0
        self.item = 0
        self.is_run = False
        self.first_no = 0
        self.client = 0
        self.ran = 0
        self.seconds = 0.0
        #: Its nested session, what the call in progress has submitted by it and waits for, and whether it has its slot.
        self.session: Any = None
        self.has_nested = False
        self.awaited: list[Any] = []
        self.granted = False

    @property
    def alive(self) -> bool:
        return not self.dead

    def can_step(self) -> bool:
        """Tell whether there is a next step."""
        if self.dead or self.frozen or self.killed:
            return False
        if self.pc in ("waiting", "wanting"):
            is_over = self.granted if self.pc == "wanting" else all(future.settled for future in self.awaited)
            return is_over or (self.signal and self.armed == self.page[INTERRUPT])
        if self.pc == "idle" and self.hung_up and not self.inbox and self.session is not None:
            return all(future.settled for future in self.session.futures.values())
        return self.pc != "idle" or bool(self.inbox) or self.hung_up

    def current_item(self) -> tuple[int, int]:
        """Return (client, no) of the item it is at."""
        return self.client, self.first_no + self.item

    def step(self, cluster: Any) -> None:
        """Do one atomic thing."""
        if self.signal and self.pc in ARMED_AT and self.pc != "running":
            self.signal = False
            if self.armed and self.page[INTERRUPT] == self.armed:
                self.armed = 0
                self.interrupted = True
                self.pc = "write_unwound"
        getattr(self, f"_{self.pc}")(cluster)

    def _exit(self, cluster: Any, code: int) -> None:
        self.exit_code = code
        cluster.worker_died(self)

    def _start(self, cluster: Any) -> None:
        if self.start == "dies":
            self._exit(cluster, 1)
        elif self.start == "fails":
            self.pipe.append((RECORD_START_FAILED, 0, 0, b"initializer"))
            cluster.ring(self)
            self.pc = "leave"
        else:
            self.pipe.append((RECORD_READY, 0, 0, b""))
            cluster.ring(self)
            self.pc = "idle"

    def _leave(self, cluster: Any) -> None:
        self._exit(cluster, 0)

    def _idle(self, cluster: Any) -> None:
        if not self.inbox:
            self._exit(cluster, 0)
            return
        message = self.inbox.popleft()
        self.is_defined = self.is_defined or any(f.style == CallStyle.DEFINITION for f in message.functions)
        self.calls.extend(message.calls)
        self.ran, self.seconds = 0, 0.0
        self._take_next(cluster)

    def _take_next(self, cluster: Any) -> None:
        if self.interrupted:
            self.pc = "leave"
        elif not self.calls:
            self.pc = "batch_end"
        else:
            self.seq, self.items, skip, function_id, payload = self.calls.popleft()
            client, first = payload.split()
            self.client, self.first_no = int(client), int(first) + skip
            self.is_run = function_id % 2 == 0
            self.item = 0
            self.pc = "reset_item" if self.is_run else "claim"

    def _batch_end(self, cluster: Any) -> None:
        self.pipe.append((RECORD_BATCH_END, int(self.seconds * 1e9), self.ran, b""))
        cluster.ring(self)
        self.pc = "idle"

    def _reset_item(self, cluster: Any) -> None:
        self.page[ITEM] = 0
        self.pc = "set_stop"

    def _set_stop(self, cluster: Any) -> None:
        self.page[STOP] = self.items
        self.pc = "claim"

    def _claim(self, cluster: Any) -> None:
        self.armed = self.seq
        self.page[CURRENT] = self.seq
        self.pc = "look"

    def _look(self, cluster: Any) -> None:
        if self.page[slot(self.seq)] != self.seq:
            self.armed = 0
            self.pc = "write_skipped"
        elif self.is_run:
            self.pc = "claim_item"
        else:
            self._run_item(cluster)

    def _claim_item(self, cluster: Any) -> None:
        self.armed = self.seq
        self.page[ITEM] = self.item
        self.pc = "look_item"

    def _look_item(self, cluster: Any) -> None:
        if self.item >= self.page[STOP]:
            self.armed = 0
            self.pc = "done"
        elif self.page[INTERRUPT] == self.seq:
            self.armed = 0
            self.interrupted = True
            self.pc = "write_unwound"
        else:
            self._run_item(cluster)

    def _run_item(self, cluster: Any) -> None:
        cluster.item_starts(self)
        self.has_nested = False
        self.pc = "running"

    def _running(self, cluster: Any) -> None:
        behaviour = cluster.behaviour(*self.current_item())
        if self.signal:
            self.signal = False
            if self.armed and self.page[INTERRUPT] == self.armed:
                self.armed = 0
                self.interrupted = True
                if behaviour.on_interrupt == "unwind":
                    self.pc = "unwinding"
                    return
                if behaviour.on_interrupt == "ignore":
                    cluster.item_ends(self, is_stopped=True)
                    self.pc = "write_unwound"
                    return
        if behaviour.children and not self.has_nested and not self.interrupted:
            self.has_nested = True
            cluster.nest(self, behaviour)
            return
        self.armed = 0
        cluster.item_ends(self)
        if behaviour.ending == "exit":
            self._exit(cluster, 3)
            return
        self.pc = "write"

    def _waiting(self, cluster: Any) -> None:
        if not self._is_interrupted(cluster):
            self.granted = False
            cluster.unblock(self)
            self.pc = "wanting"

    def _wanting(self, cluster: Any) -> None:
        if not self._is_interrupted(cluster):
            cluster.goes_on(self)
            self.pc = "running"

    def _is_interrupted(self, cluster: Any) -> bool:
        if not self.signal or self.armed != self.page[INTERRUPT]:
            return False
        self.signal, self.armed, self.interrupted = False, 0, True
        if cluster.behaviour(*self.current_item()).on_interrupt == "swallow":
            return False  # it waits on
        self.pc = "unwinding"
        return True

    def _unwinding(self, cluster: Any) -> None:
        cluster.item_ends(self, is_stopped=True)
        self.pc = "write_unwound"

    def _write(self, cluster: Any) -> None:
        client, no = self.current_item()
        behaviour = cluster.behaviour(client, no)
        kind = RECORD_ERROR if behaviour.ending == "error" else RECORD_VALUE
        self.pipe.append((kind, self.seq, self.item, value_of(no)))
        self.ran += 1
        self.seconds += behaviour.duration_s
        if behaviour.duration_s >= 0.005:
            cluster.ring(self)
        self.item += 1
        self.pc = "claim_item" if self.is_run and self.item < self.items and not self.interrupted else "done"

    def _write_skipped(self, cluster: Any) -> None:
        self.pipe.append((RECORD_SKIPPED, self.seq, 0, b""))
        self.pc = "done"

    def _write_unwound(self, cluster: Any) -> None:
        self.pipe.append((RECORD_UNWOUND, self.seq, self.item, b""))
        # Should its cancel have been given up meanwhile, this counts as a death.
        cluster.victims[self.current_item()] += 1
        cluster.ring(self)
        self.pc = "done"

    def _done(self, cluster: Any) -> None:
        self.page[DONE] = self.seq
        if self.is_run:
            self.pc = "clear_item"
        else:
            self._take_next(cluster)

    def _clear_item(self, cluster: Any) -> None:
        self.page[ITEM] = 0
        self._take_next(cluster)


#: Where the signal handler may raise: from the claim to the end of the user's function.
ARMED_AT = ("look", "look_item", "running", "claim_item")
