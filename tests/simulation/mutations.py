"""Ways of breaking the machines and the worker, one at a time: each must be noticed by the pure tests or by the
simulator.

`python -m tests.simulation.mutations` prints what caught each of them.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from scaler_executor.protocol import agent, priorities, scheduler, scheduler_intake
from scaler_executor.protocol.agent_calls import EXPIRED, AgentCalls
from scaler_executor.protocol.agent_crew import Crew
from scaler_executor.protocol.agent_dispatch import Dispatch
from scaler_executor.protocol.agent_events import Send
from scaler_executor.protocol.agent_inheritance import Inheritance
from scaler_executor.protocol.agent_prints import Prints
from scaler_executor.protocol.agent_sharing import Sharing
from scaler_executor.protocol.agent_timeouts import Timeouts
from scaler_executor.protocol.client import ClientState
from scaler_executor.protocol.machine import ignore
from scaler_executor.protocol.messages import CancelKind, DeathReport, Output
from scaler_executor.protocol.page import CURRENT, DONE, slot
from scaler_executor.protocol.priorities import PriorityQueue
from scaler_executor.protocol.scheduler import SchedulerState
from scaler_executor.protocol.scheduler_assignment import Assignment
from scaler_executor.protocol.scheduler_limits import Limits
from scaler_executor.protocol.scheduler_tasks import SchedulerTasks

from .cluster import Cluster
from .random_runs import Run
from .worker import SimWorker

MAX_SEEDS = 600
PURE_TESTS = ("test_scheduler", "test_agent", "test_client", "test_sharing", "test_options")

#: (where, name or key, what stands there instead)
Change = tuple[Any, Any, Any]


def cells(table: dict[str, dict[str, Any]], event: str, cell: Any, *states: str) -> list[Change]:
    return [(table[state], event, cell) for state in states]


def drop_the_crossing_result() -> list[Change]:
    """The scheduler drops a result that crosses a cancel."""
    return cells(scheduler.TABLE, "RESULT", ignore, "CANCELING")


def requeue_while_cancelling() -> list[Change]:
    """The scheduler makes an attempt of a call that dies while it is being cancelled."""
    return cells(scheduler.TABLE, "DIED", SchedulerTasks._retry_or_fail, "CANCELING")


def requeue_what_is_returned_while_cancelling() -> list[Change]:
    """The scheduler queues what an agent hands back though it is being cancelled."""
    return cells(scheduler.TABLE, "RETURNED", SchedulerTasks._returned, "CANCELING")


def obey_older_cancel_failed() -> list[Change]:
    """The scheduler takes the CancelFailed of an older request for that of the newest."""
    original = SchedulerState._confirm

    def confirm(self: Any, task: Any, cancel_no: int, kind: int, at: int) -> None:
        original(self, task, task.agent_cancel_no if kind == scheduler.FAILED else cancel_no, kind, at)

    return [(SchedulerState, "_confirm", confirm)]


def client_obeys_older_cancel_failed() -> list[Change]:
    """The client takes the CancelFailed of an older request for that of the newest."""
    original = ClientState._confirms

    def confirms(self: Any, message: Any) -> None:
        known = self._tasks
        message.confirms = [(r[0], known[r[0]].cancel_no if r[0] in known else r[1], *r[2:]) for r in message.confirms]
        original(self, message)

    return [(ClientState, "_confirms", confirms)]


def confirm_before_the_process_is_gone() -> list[Change]:
    """The agent confirms when the process group has been sent SIGKILL."""
    return cells(agent.TABLE, "KILLED", AgentCalls._stopped, "FREEZING")


def confirm_at_the_interrupt() -> list[Change]:
    """The agent confirms when it interrupts."""
    original = AgentCalls._stop

    def stop(self: Any, call: Any) -> None:
        original(self, call)
        self._stopped(call)

    return [(AgentCalls, "_stop", stop)]


def look_before_claim() -> list[Change]:
    """The worker looks whether a call is allowed, and then claims it."""

    def claim(self: Any, cluster: Any) -> None:
        self.allowed = self.page[slot(self.seq)] == self.seq
        self.pc = "look"

    def look(self: Any, cluster: Any) -> None:
        self.armed = self.seq
        self.page[CURRENT] = self.seq
        if not self.allowed:
            self.armed = 0
            self.pc = "write_skipped"
        elif self.is_run:
            self.pc = "claim_item"
        else:
            self._run_item(cluster)

    return [(SimWorker, "_claim", claim), (SimWorker, "_look", look)]


def forget_to_pump_after_a_requeue() -> list[Change]:
    """The scheduler queues a task again and gives it to nobody."""
    original = SchedulerTasks._requeue

    def requeue(self: Any, task: Any, new_attempt: bool = False) -> None:
        assignment = self._assignment
        assignment.line_up = lambda client: None
        try:
            original(self, task, new_attempt)
        finally:
            del assignment.line_up

    return [(SchedulerTasks, "_requeue", requeue)]


def count_attempts_twice() -> list[Change]:
    """The scheduler takes two retries for a death."""
    original = SchedulerTasks._retry_or_fail

    def retry_or_fail(self: Any, task: Any, report: Any) -> None:
        task.deaths += 1
        original(self, task, report)

    changes = cells(scheduler.TABLE, "DIED", retry_or_fail, "ASSIGNED", "RECALLING")
    return [*changes, (SchedulerTasks, "_retry_or_fail", retry_or_fail)]


def start_agent_lost_call_at_once() -> list[Change]:
    """The scheduler starts the calls of an agent that is out of reach elsewhere, at once and whatever the retries."""

    def lost(self: Any, task: Any, fenced: Any, stopped: bool) -> None:
        task.state, task.agent_cancel_no = "ASSIGNED", 0
        self._requeue(task, new_attempt=True)

    return cells(scheduler.TABLE, "AGENT_LOST", lost, "ASSIGNED", "RECALLING")


def no_fence() -> list[Change]:
    """The scheduler retries the calls of an agent that is out of reach without waiting until it has stopped them."""

    def fence(self: Any, task: Any, fenced: Any) -> None:
        self._retry_or_fail(task, DeathReport("out of reach"))

    return [(SchedulerTasks, "_fence", fence)]


def agent_does_not_stop_at_the_fence() -> list[Change]:
    """An agent that is cut off runs on."""
    return [(AgentCalls, "stop_all", lambda self: None)]


def obey_the_recall_after_the_users_cancel() -> list[Change]:
    """The scheduler takes the recall's Canceled for a requeue though the user has cancelled meanwhile."""

    def cancelled(self: Any, task: Any, at: int, is_newest: bool) -> None:
        (SchedulerTasks._cancelled if is_newest else SchedulerTasks._came_back)(self, task, at, is_newest)

    return cells(scheduler.TABLE, "CANCELED", cancelled, "CANCELING")


def requeue_the_call_in_progress() -> list[Change]:
    """The agent queues the call again that its worker died in."""
    return cells(agent.TABLE, "EXITED_IN_PROGRESS", AgentCalls._not_started, "HELD", "RUNNING", "RECALLING")


def blame_the_call_behind() -> list[Change]:
    """The agent blames a call that the dead worker had not come to."""

    def died(self: Any, call: Any, report: Any) -> None:
        self._died(call, report)

    return cells(agent.TABLE, "EXITED_NOT_STARTED", died, "HELD")


def done_before_the_result() -> list[Change]:
    """The worker says Done and then writes the result."""
    original = SimWorker._write

    def write(self: Any, cluster: Any) -> None:
        if self.page[DONE] != self.seq and not self.is_run:
            self.page[DONE] = self.seq  # and comes back here
        else:
            original(self, cluster)

    return [(SimWorker, "_write", write)]


def soft_over_recall_is_not_answered() -> list[Change]:
    """The scheduler takes the CancelFailed of a soft cancel that took over a recall for the recall's own."""

    def runs_on(self: Any, task: Any) -> None:
        task.user_cancel_no = 0
        self._runs_on(task)

    return cells(scheduler.TABLE, "FAILED", runs_on, "CANCELING")


def soft_over_recall_is_answered_twice() -> list[Change]:
    """The scheduler fails a soft cancel over a recall at once, and forwards the recall's answer as well."""

    def over_recall(self: Any, task: Any, cancel_no: int, kind: Any) -> None:
        if kind is CancelKind.SOFT:
            self._answer(task, cancel_no, scheduler.FAILED)
        SchedulerTasks._over_recall(self, task, cancel_no, kind)

    return cells(scheduler.TABLE, "CANCEL", over_recall, "RECALLING")


def forget_the_partial_answer() -> list[Change]:
    """The scheduler takes a partial answer to a soft cancel for the end of the forced one that overtook it."""

    def cancelled(self: Any, task: Any, at: int, is_newest: bool) -> None:
        SchedulerTasks._cancelled(self, task, at, True)

    return cells(scheduler.TABLE, "CANCELED", cancelled, "CANCELING")


def read_the_pipe_after_deciding() -> list[Change]:
    """A death is judged before the dead worker's pipe has been read."""

    def on_report(self: Any, key: Any, report: Any) -> None:
        owner = self.agents[key[1]]
        if isinstance(report, agent.Exited) and not owner.gone:
            owner.workers[report.worker_id].pipe.clear()
        original(self, key, report)

    original = Cluster._on_report
    return [(Cluster, "_on_report", on_report)]


def say_late_what_was_printed() -> list[Change]:
    """The agent says what a call has printed after what became of the call."""

    def send(self: Any, rows: list[Any]) -> None:
        if rows:
            self._output.late.append(Send(Output(rows)))

    return [(Prints, "_send", send), (Prints, "send_due", lambda self: None)]


def no_recall_from_busy_workers() -> list[Change]:
    """The agent leaves calls behind a long one though others are idle."""
    return [(Dispatch, "recall", lambda self, worker: 0)]


def start_before_the_definitions_are_there() -> list[Change]:
    """The agent orders workers that inherit nothing while it waits for their client's answer."""
    original = Inheritance.may_start

    def may_start(self: Any, client_id: int) -> bool:
        original(self, client_id)
        return True

    return [(Inheritance, "may_start", may_start)]


def send_the_definitions_once() -> list[Change]:
    """The agent sends what replaces the inheritance to the first worker alone."""

    def definitions(self: Any, client_id: int) -> Any:
        found = self._definitions.get(client_id) or []
        if found:
            self._definitions[client_id] = []
        return found

    return [(Inheritance, "definitions", definitions)]


def forget_debts() -> list[Change]:
    """An agent gives nobody's place to another client."""
    return [(Sharing, "_note_debts", lambda self, wanted: None)]


def let_a_limited_client_have_more() -> list[Change]:
    """An agent has as many workers for a client as there is room for."""
    return [(Crew, "is_full", lambda self, client: False)]


def forget_calls_that_are_being_stopped() -> list[Change]:
    """An agent starts another call of a client at its limit while one is being stopped."""
    return [(Crew, "in_use", lambda self, client: client.staff)]


def raise_a_limit_before_another_is_kept() -> list[Change]:
    """The scheduler takes it that an agent keeps a lower limit as soon as it is told."""
    original = Limits._say

    def say(self: Any, seat: Any, quota: Any) -> None:
        original(self, seat, quota)
        seat.in_use = quota or 0

    return [(Limits, "_say", say)]


def forget_what_is_out_of_reach() -> list[Change]:
    """The scheduler gives the part of a lost agent to others at once."""
    return [(Limits, "agent_lost", lambda self, agent: None), (Limits, "agent_stopped", lambda self, agent: None)]


def say_limited_too_early() -> list[Change]:
    """An agent says that it keeps a limit when it hears of it."""

    def limited(self: Any) -> None:
        in_use, Crew.in_use = Crew.in_use, lambda self, client: 0  # type: ignore[method-assign]
        try:
            original(self)
        finally:
            Crew.in_use = in_use  # type: ignore[method-assign]

    original = agent.AgentState._say_limited
    return [(agent.AgentState, "_say_limited", limited)]


def give_a_flood_all_the_room() -> list[Change]:
    """The scheduler lets a client wait for room behind all that an agent holds of another one."""

    original = Assignment._room

    def room(self: Any, seat: Any) -> int:
        return min(original(self, seat), seat.agent.capacity - seat.agent.held)

    return [(Assignment, "_room", room)]


def report_a_timeout_as_a_death() -> list[Change]:
    """The agent takes a timeout for a death, which is retried."""

    def timed_out(self: Any, call: Any, how: str = "") -> None:
        self._release(call)
        self._forget(call)
        self._output.deaths.append((call.task_id, call.attempt, DeathReport("timed out")))

    return [(AgentCalls, "_timed_out", timed_out)]


def answer_a_timeout_at_the_interrupt() -> list[Change]:
    """The agent says that a call has timed out when it begins to stop it."""
    original = AgentCalls._expire

    def expire(self: Any, call: Any) -> None:
        original(self, call)
        self._timed_out(call)

    return cells(agent.TABLE, "TIMEOUT", expire, "RUNNING")


def count_half_the_time() -> list[Change]:
    """The agent stops a call before its time is over."""
    original = Timeouts.seen_running

    def seen_running(self: Any, call: Any) -> None:
        original(self, call)
        call.timeout_due -= (call.timeout_due - self._output.now) / 2

    return [(Timeouts, "seen_running", seen_running)]


def forget_the_time_of_a_call_that_a_freeze_found() -> list[Change]:
    """The agent does not count the time of a call that it has first found running by a freeze."""
    original = AgentCalls._in_progress

    def in_progress(self: Any, call: Any, at: int) -> None:
        timeouts, self._timeouts = self._timeouts, Timeouts(self._output)
        try:
            original(self, call, at)
        finally:
            self._timeouts = timeouts

    return cells(agent.TABLE, "IN_PROGRESS", in_progress, "RECALLING")


def let_a_soft_cancel_take_over_a_timeout() -> list[Change]:
    """The agent takes a soft cancel of a call that is being stopped for its timeout for one that stops it."""

    def newest(self: Any, call: Any, cancel_no: int, kind: CancelKind) -> None:
        call.cancel_no, call.kind = cancel_no, kind

    return cells(agent.TABLE, "CANCEL", newest, "STOPPING_SOFT", "FREEZING", "KILLING", "UNWOUND")


def let_a_timeout_take_over_a_cancel() -> list[Change]:
    """The agent forgets a cancel that comes while it stops a call for its timeout."""
    original = AgentCalls._newest_counts

    def newest(self: Any, call: Any, cancel_no: int, kind: CancelKind) -> None:
        if call.cancel_no != EXPIRED:
            original(self, call, cancel_no, kind)

    return cells(agent.TABLE, "CANCEL", newest, "STOPPING_SOFT", "FREEZING", "KILLING", "UNWOUND")


def take_the_end_of_an_expired_worker_for_a_death() -> list[Change]:
    """The agent reports that a worker died in a call when that is what its timeout led to."""

    def died(self: Any, call: Any, report: Any) -> None:
        call.cancel_no = max(0, call.cancel_no)
        (self._stopped if call.cancel_no else self._died)(call, report)

    return cells(agent.TABLE, "EXITED_IN_PROGRESS", died, "STOPPING_SOFT", "KILLING")


def ignore_priorities_at_the_scheduler() -> list[Change]:
    """The scheduler gives out what came first."""
    return [(scheduler_intake, "with_priorities", lambda queue: queue)]


def ignore_priorities_at_the_agent() -> list[Change]:
    """The agent starts what came first."""
    return [(agent, "with_priorities", lambda queue: queue)]


def never_let_the_oldest_pass() -> list[Change]:
    """A call of low priority waits as long as there are others."""
    return [(priorities, "OVERTAKES", 1 << 60)]


def keep_high_priorities_waiting_for_room() -> list[Change]:
    """The scheduler holds calls of high priority back while an agent is full of others."""
    return [(PriorityQueue, "rank", 0)]


def put_what_is_retried_behind_its_equals() -> list[Change]:
    """A queue with priorities takes what is put back for new."""
    return [(PriorityQueue, "appendleft", PriorityQueue.append)]


def start_what_comes_again_at_once() -> list[Change]:
    """The scheduler starts the calls of another one that may still run there."""
    original = SchedulerState._fence

    def fence(self: Any, after_s: float, tasks: Any, lost: Any) -> None:
        original(self, 0.0 if lost is None else after_s, tasks, lost)

    return [(SchedulerState, "_fence", fence)]


def forget_what_was_spent() -> list[Change]:
    """The scheduler gives the calls of another one all their retries again."""
    original = SchedulerTasks.note_again

    def note_again(self: Any, client: Any, rows: Any) -> None:
        original(self, client, [(no, 0, done) for no, _, done in rows])

    return [(SchedulerTasks, "note_again", note_again)]


def client_forgets_what_was_spent() -> list[Change]:
    """The client gives the next scheduler calls without retries left."""
    original = ClientState._goes_on

    def goes_on(self: Any, task: Any) -> bool:
        if task.row is not None:
            task.spent = 0
        return original(self, task)

    return [(ClientState, "_goes_on", goes_on)]


def do_answered_items_again() -> list[Change]:
    """The client has the next scheduler do a run from its start."""
    original = ClientState._send_again

    def send_again(self: Any) -> None:
        for task in self._again.values():
            task.answered = []
        original(self)

    return [(ClientState, "_send_again", send_again)]


def give_on_what_is_being_cancelled() -> list[Change]:
    """The client has the next scheduler make calls that their user has cancelled."""
    original = ClientState._lose_all

    def lose_all(self: Any, reason: str) -> None:
        for task in self._tasks.values():
            if task.function is not None and task.cancel_no:
                task.state, task.cancel_no = "SENT", 0
        original(self, reason)

    return [(ClientState, "_lose_all", lose_all)]


MUTATIONS: list[Callable[[], list[Change]]] = [
    report_a_timeout_as_a_death,
    answer_a_timeout_at_the_interrupt,
    count_half_the_time,
    forget_the_time_of_a_call_that_a_freeze_found,
    let_a_soft_cancel_take_over_a_timeout,
    let_a_timeout_take_over_a_cancel,
    take_the_end_of_an_expired_worker_for_a_death,
    ignore_priorities_at_the_scheduler,
    ignore_priorities_at_the_agent,
    never_let_the_oldest_pass,
    keep_high_priorities_waiting_for_room,
    put_what_is_retried_behind_its_equals,
    start_what_comes_again_at_once,
    forget_what_was_spent,
    client_forgets_what_was_spent,
    do_answered_items_again,
    give_on_what_is_being_cancelled,
    drop_the_crossing_result,
    requeue_while_cancelling,
    requeue_what_is_returned_while_cancelling,
    obey_older_cancel_failed,
    client_obeys_older_cancel_failed,
    confirm_before_the_process_is_gone,
    confirm_at_the_interrupt,
    look_before_claim,
    forget_to_pump_after_a_requeue,
    count_attempts_twice,
    start_agent_lost_call_at_once,
    no_fence,
    agent_does_not_stop_at_the_fence,
    obey_the_recall_after_the_users_cancel,
    requeue_the_call_in_progress,
    blame_the_call_behind,
    done_before_the_result,
    soft_over_recall_is_not_answered,
    soft_over_recall_is_answered_twice,
    forget_the_partial_answer,
    read_the_pipe_after_deciding,
    say_late_what_was_printed,
    no_recall_from_busy_workers,
    start_before_the_definitions_are_there,
    send_the_definitions_once,
    forget_debts,
    let_a_limited_client_have_more,
    forget_calls_that_are_being_stopped,
    raise_a_limit_before_another_is_kept,
    forget_what_is_out_of_reach,
    say_limited_too_early,
    give_a_flood_all_the_room,
]


@contextmanager
def mutated(mutation: Callable[[], list[Change]]) -> Iterator[None]:
    """Have the machines broken in one way."""
    undo: list[Change] = []
    for where, name, new in mutation():
        if isinstance(where, dict):
            undo.append((where, name, where[name]))
            where[name] = new
        else:
            undo.append((where, name, vars(where)[name]))
            setattr(where, name, new)
    try:
        yield
    finally:
        for where, name, old in undo:
            if isinstance(where, dict):
                where[name] = old
            else:
                setattr(where, name, old)


def pure_tests() -> list[tuple[str, Callable[[], Any]]]:
    """Return the tests of the tables, those with parameters once for each."""
    tests = []
    for name in PURE_TESTS:
        module = importlib.import_module(f"{__package__.removesuffix('simulation')}protocol.{name}")
        for test_name, test in vars(module).items():
            if test_name.startswith("test_"):
                marks = [mark.args for mark in getattr(test, "pytestmark", [])]
                names = [argument_name for argument_name, *_ in marks]
                for values in itertools.product(*(given for _, given, *_ in marks)):
                    call = functools.partial(test, **dict(zip(names, values, strict=True)))
                    tests.append((f"{name}.{test_name}", call))
    return tests


def caught_by_pure_tests(tests: list[tuple[str, Callable[[], Any]]]) -> str | None:
    """Return the first pure test that fails, or None."""
    for name, test in tests:
        try:
            test()
        except Exception:
            return name
    return None


def caught_by_simulation(max_seeds: int = MAX_SEEDS) -> int | None:
    """Return the first seed that fails, or None."""
    for seed in range(max_seeds):
        try:
            Run(seed).run()
        except AssertionError:
            return seed
    return None


def main() -> int:
    tests = pure_tests()
    missed = 0
    for mutation in MUTATIONS:
        with mutated(mutation):
            pure, seed = caught_by_pure_tests(tests), caught_by_simulation(2000)
        missed += pure is None and seed is None
        print(f"{mutation.__name__:45} {pure or '-':75} {'-' if seed is None else f'seed {seed}'}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
