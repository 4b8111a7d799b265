"""ScalerFuture over a fake scheduler: each row of the cancel contract, and who is told of it."""

import asyncio
import copy
import pickle
import sys
import threading
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    Future,
    InvalidStateError,
    TimeoutError,
    as_completed,
    wait,
)
from typing import Any

import msgspec
import pytest
from fake_scheduler import PATIENCE_S, Background, Setting

import scaler_executor.future
from scaler_executor import CancelOutcome, ScalerFuture, SchedulerLostError, WorkerDiedError, WorkerStartError
from scaler_executor.protocol.messages import CancelKind, DeathReport, ResultKind, TaskCancelConfirmType

ANSWERS = {
    "canceled": CancelOutcome.CANCELED,
    "not found": CancelOutcome.NOT_FOUND,
    "out of reach": CancelOutcome.UNCONFIRMED,
    "value": CancelOutcome.FINISHED_FIRST,
    "error": CancelOutcome.FINISHED_FIRST,
    "lost": CancelOutcome.UNCONFIRMED,
}


def give(setting: Setting, answer: str, row: Any) -> None:
    scheduler = setting.scheduler
    if answer == "canceled":
        scheduler.canceled(row)
    elif answer == "not found":
        scheduler.not_found(row)
    elif answer == "out of reach":
        scheduler.confirm(row, TaskCancelConfirmType.CANCELED, proven=False)
    elif answer == "value":
        scheduler.value(row[0], Bomb())
    elif answer == "error":
        scheduler.error(row[0], ValueError("late"))
    else:
        scheduler.die()


class Bomb:
    """Must not be unpickled."""

    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    raise AssertionError("unpickled")


class Counted:
    """Counts how often it is unpickled."""

    unpickled = 0

    def __setstate__(self, state: Any) -> None:
        Counted.unpickled += 1

    def __getstate__(self) -> Any:
        return {"some": "state"}


# cancel(): the rows of both tables


@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_settles_the_future(setting: Setting, answer: str, is_running: bool) -> None:
    """A pending or running call ends cancelled by the first answer, which gives the outcome; one message asks."""
    future, no = setting.submit_sent()
    if is_running:
        setting.scheduler.running(no)
        setting.sync()
    assert future.running() is is_running
    cancel = Background(future.cancel)
    row = setting.scheduler.next_cancel()
    assert row[0] == no and row[2] == CancelKind.FORCED
    assert future.cancel_outcome is None and not future.done()
    give(setting, answer, row)
    assert cancel.result() is True
    assert future.cancelled() and future.done() and not future.running()
    assert future.cancel_outcome is ANSWERS[answer]
    assert setting.scheduler.cancels.empty()
    with pytest.raises(CancelledError):
        future.result(0)


@pytest.mark.parametrize("is_running", [False, True])
def test_a_refused_cancel_lets_the_call_complete(setting: Setting, is_running: bool) -> None:
    """After CancelFailed the call runs on and completes normally, and another cancel can be made."""
    future, no = setting.submit_sent()
    if is_running:
        setting.scheduler.running(no)
    setting.scheduler.on_cancel = setting.scheduler.refused
    assert future.cancel(force=False) is True
    assert future.cancel_outcome is CancelOutcome.FAILED
    assert not future.cancelled() and not future.done()
    setting.scheduler.on_cancel = setting.scheduler.canceled
    assert future.cancel() is True
    assert future.cancelled() and future.cancel_outcome is CancelOutcome.CANCELED
    second, no = setting.submit_sent()
    setting.scheduler.on_cancel = setting.scheduler.refused
    second.cancel()
    setting.scheduler.value(no, 7)
    assert second.result(PATIENCE_S) == 7
    assert second.cancel_outcome is CancelOutcome.FAILED


def test_a_finished_value_is_dropped(setting: Setting) -> None:
    """cancel() of a finished future flips it without a message, and a value that nobody read is never unpickled."""
    future = setting.finished(Bomb())
    assert future.cancel() is True
    assert future.cancelled() and future.cancel_outcome is CancelOutcome.ALREADY_DONE
    with pytest.raises(CancelledError):
        future.result(0)
    with pytest.raises(CancelledError):
        future.exception(0)
    assert setting.scheduler.cancels.empty()


def test_a_finished_exception_is_dropped(setting: Setting) -> None:
    """The same for a call that raised, also when the exception has been read."""
    future = setting.failed(ValueError("text"))
    assert str(future.exception(0)) == "text"
    future.cancel()
    with pytest.raises(CancelledError):
        future.exception(0)
    assert future.cancel_outcome is CancelOutcome.ALREADY_DONE


def test_flipping_tells_nobody_twice(setting: Setting) -> None:
    """Waiters and callbacks of a finished future are not told again when it is cancelled."""
    future, no = setting.submit_sent()
    called: list[bool] = []
    done = threading.Event()
    future.add_done_callback(lambda f: (called.append(f.cancelled()), done.set()))
    completed = as_completed([future])
    first = Background(next, completed)
    setting.scheduler.value(no, 1)
    assert first.result() is future
    assert done.wait(PATIENCE_S)
    future.cancel()
    assert list(completed) == []
    setting.sync()
    assert called == [False]


def test_cancelling_a_cancelled_future_changes_nothing(setting: Setting) -> None:
    """A second cancel sends nothing and leaves the outcome."""
    future, _ = setting.submit_sent()
    setting.scheduler.on_cancel = setting.scheduler.not_found
    future.cancel()
    assert future.cancel() is True
    assert future.cancel_outcome is CancelOutcome.NOT_FOUND
    assert [type(m).__name__ for m in setting.scheduler.messages].count("TaskCancel") == 1


def test_an_unsent_call_is_taken_back_without_a_message() -> None:
    """Before the scheduler's Welcome nothing is sent: cancel() is confirmed by the client itself."""
    setting = Setting(welcome=False)
    future = setting.submit()
    assert future.cancel() is True
    assert future.cancel_outcome is CancelOutcome.CANCELED and future.cancelled()
    setting.scheduler.welcome()
    setting.sync()
    assert setting.scheduler.cancels.empty()
    setting.close()


def test_a_second_cancel_joins_the_first(setting: Setting) -> None:
    """A cancel of the same kind waits for the outstanding one and sends nothing."""
    future, _ = setting.submit_sent()
    first = Background(future.cancel)
    row = setting.scheduler.next_cancel()
    second = Background(future.cancel, force=False)
    third = Background(future.cancel)
    setting.sync()
    assert first.is_alive and setting.scheduler.cancels.empty()
    setting.scheduler.canceled(row)
    assert [call.result() for call in (first, second, third)] == [True, True, True]
    assert future.cancel_outcome is CancelOutcome.CANCELED


def test_a_soft_cancel_is_raised_to_a_forced_one(setting: Setting) -> None:
    """Forced over soft sends again; the refusal of the soft one then ends nobody's wait."""
    future, _ = setting.submit_sent()
    soft = Background(future.cancel, force=False)
    soft_row = setting.scheduler.next_cancel()
    forced = Background(future.cancel)
    forced_row = setting.scheduler.next_cancel()
    assert (soft_row[2], forced_row[2]) == (CancelKind.SOFT, CancelKind.FORCED)
    setting.scheduler.refused(soft_row)
    setting.sync()
    assert soft.is_alive and forced.is_alive and future.cancel_outcome is None
    setting.scheduler.canceled(forced_row)
    assert soft.result() and forced.result()
    assert future.cancel_outcome is CancelOutcome.CANCELED


def test_a_refusal_that_crosses_the_raise_does_not_answer_it(setting: Setting) -> None:
    """CancelFailed of the soft request, taken in before the client took up the forced one, is not the forced one's."""
    future, _ = setting.submit_sent()
    soft = Background(future.cancel, force=False)
    soft_row = setting.scheduler.next_cancel()
    with setting.client._io_lock:
        setting.scheduler.refused(soft_row)
        future.cancel()  # does not wait: this thread holds up the I/O thread
        ask = future._ask
        future.set_cancel_confirmed(CancelOutcome.FAILED)
        assert future._ask is ask is not None
    setting.scheduler.canceled(setting.scheduler.next_cancel())
    assert soft.result() is True
    assert future.cancel_outcome is CancelOutcome.CANCELED


@pytest.mark.parametrize("kind", [ResultKind.VALUE, ResultKind.ERROR])
def test_a_result_that_was_on_its_way_when_cancel_was_asked_is_dropped(setting: Setting, kind: ResultKind) -> None:
    """Once asked, the future ends cancelled, although the client takes in the result before the request."""
    future, no = setting.submit_sent()
    with setting.client._io_lock:
        if kind is ResultKind.VALUE:
            setting.scheduler.value(no, Bomb())
        else:
            setting.scheduler.error(no, ValueError())
        assert future.cancel() is True
        assert not future.done()
    setting.sync()
    assert future.cancelled() and future.cancel_outcome is CancelOutcome.FINISHED_FIRST
    assert setting.scheduler.cancels.empty()


def test_a_result_before_the_request_is_flipped(setting: Setting) -> None:
    """The other order: the future was finished when cancel() came."""
    future = setting.finished(Bomb())
    with setting.client._io_lock:
        future.cancel()
    assert future.cancel_outcome is CancelOutcome.ALREADY_DONE


def test_without_an_answer_cancel_returns_after_its_timeout(setting: Setting) -> None:
    """True is returned, the request stands, and the answer settles the future later."""
    future, _ = setting.submit_sent()
    assert future.cancel(0.001) is True
    row = setting.scheduler.next_cancel()
    assert not future.done() and future.cancel_outcome is None
    setting.scheduler.canceled(row)
    setting.sync()
    assert future.cancelled() and future.cancel_outcome is CancelOutcome.CANCELED


def test_the_executors_timeout_is_the_default() -> None:
    """Without a timeout of its own cancel() waits as long as the executor says."""
    setting = Setting(cancel_timeout_s=0.0)
    future, _ = setting.submit_sent()
    assert future.cancel() is True
    assert not future.done()
    setting.scheduler.next_cancel()
    setting.close()
    assert future.cancelled() and future.cancel_outcome is CancelOutcome.UNCONFIRMED


# Who must not wait


def test_the_callback_thread_may_cancel_and_wait(setting: Setting) -> None:
    """A callback runs beside the I/O thread: it may cancel another call and wait for the confirmation."""
    other, _ = setting.submit_sent()
    setting.scheduler.on_cancel = setting.scheduler.canceled
    first, no = setting.submit_sent()
    seen: list[Any] = []
    done = threading.Event()

    def callback(future: Future[Any]) -> None:
        seen.append((threading.current_thread() is not threading.main_thread(), other.cancel(), other.cancelled()))
        done.set()

    first.add_done_callback(callback)
    setting.scheduler.value(no, 1)
    assert done.wait(PATIENCE_S)
    assert seen == [(True, True, True)]


def test_the_io_thread_does_not_wait(setting: Setting) -> None:
    """A finalizer that happens to run in the I/O thread may cancel: it returns at once."""
    future, _ = setting.submit_sent()
    target, no = setting.submit_sent()
    returned: list[Any] = []

    class Waiter:
        """As a waiter of the standard library; told by the I/O thread itself."""

        def add_result(self, _: Any) -> None:
            returned.append((threading.current_thread().name, future.cancel()))

    with target._condition:
        target._waiters.append(Waiter())
    setting.scheduler.value(no, 1)
    setting.sync()
    assert returned == [("scaler-executor-client", True)]
    assert not future.done()


def test_the_io_thread_does_not_wait_outside_its_lock_either(setting: Setting) -> None:
    """The same wherever in that thread the finalizer happens to run."""
    answers: list[bool] = []
    setting.scheduler.on_join = lambda: answers.append(setting.client.may_wait())
    assert setting.client.may_wait()
    setting.client.close()
    setting.client.join()
    assert answers == [False]


def test_at_interpreter_exit_nobody_waits(setting: Setting) -> None:
    """From the moment at which the interpreter begins to exit cancel() only passes the request on."""
    future, _ = setting.submit_sent()
    setting.client.exit()
    assert future.cancel(None) is True
    assert not future.done()
    setting.scheduler.canceled(setting.scheduler.next_cancel())
    setting.client.join()
    assert future.cancelled()


def test_an_event_loop_is_held_for_a_bounded_time_per_turn(setting: Setting) -> None:
    """Cancels that are not confirmed use up the turn's ten milliseconds together; the next turn has its own."""
    futures = [setting.submit_sent()[0] for _ in range(3)]
    lefts: list[float] = []

    def left() -> float:
        turn = scaler_executor.future._LoopTurn.current()
        assert turn is not None
        return turn.left_s

    async def main() -> None:
        for future in futures:
            assert future.cancel() is True
            lefts.append(left())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        lefts.append(left())

    asyncio.run(main())
    assert lefts[2] <= lefts[1] <= lefts[0] <= 0
    assert lefts[3] == scaler_executor.future.LOOP_TURN_S
    assert not any(future.done() for future in futures)


def test_an_explicit_timeout_is_honoured_in_an_event_loop(setting: Setting) -> None:
    """With a timeout cancel() waits for the confirmation although a loop runs, however the turn's budget stands."""
    budget_user, _ = setting.submit_sent()
    future, no = setting.submit_sent()

    async def main() -> None:
        budget_user.cancel()
        assert setting.scheduler.next_cancel()[0] != no
        asking = threading.Thread(target=lambda: setting.scheduler.canceled(setting.scheduler.next_cancel()))
        asking.start()
        future.cancel(PATIENCE_S)
        assert future.cancelled()
        asking.join()

    asyncio.run(main())


# Waiters, callbacks, asyncio


@pytest.mark.parametrize("answer", ["finished", "failed", *ANSWERS])
@pytest.mark.parametrize("when", [ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION])
def test_wait_sees_every_end(setting: Setting, answer: str, when: str) -> None:
    """wait() returns whatever ends the call, and with whatever condition."""
    future, no = setting.submit_sent()
    waiting = Background(wait, [future], PATIENCE_S, when)
    end(setting, future, no, answer)
    assert waiting.result() == ({future}, set())


@pytest.mark.parametrize("answer", ["finished", "failed", *ANSWERS])
def test_as_completed_yields_once_for_every_end(setting: Setting, answer: str) -> None:
    """as_completed() yields the future exactly once, whatever ends the call."""
    future, no = setting.submit_sent()
    completing = Background(lambda: list(as_completed([future], PATIENCE_S)))
    end(setting, future, no, answer)
    assert completing.result() == [future]
    assert list(as_completed([future], PATIENCE_S)) == [future]


@pytest.mark.parametrize("answer", ["finished", "failed", *ANSWERS])
def test_callbacks_are_called_once_and_in_order(setting: Setting, answer: str) -> None:
    """Each callback runs once, in the order of adding, not in the I/O thread; late ones run at once."""
    future, no = setting.submit_sent()
    calls: list[Any] = []
    done = threading.Event()
    future.add_done_callback(lambda f: calls.append((1, threading.current_thread().name)))
    future.add_done_callback(lambda f: 1 / 0)
    future.add_done_callback(lambda f: (calls.append((2, f.done())), done.set()))
    end(setting, future, no, answer)
    assert done.wait(PATIENCE_S)
    future.add_done_callback(lambda f: calls.append((3, threading.current_thread() is threading.main_thread())))
    assert calls == [(1, "scaler-executor-callbacks"), (2, True), (3, True)]


@pytest.mark.parametrize("is_done_before", [False, True])
@pytest.mark.parametrize("answer", ["finished", "failed", *ANSWERS])
def test_an_await_ends(setting: Setting, answer: str, is_done_before: bool) -> None:
    """asyncio.wrap_future ends as the call does, wrapped before or after its end."""
    future, no = setting.submit_sent()

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        if is_done_before:
            await loop.run_in_executor(None, end, setting, future, no, answer)
            return await asyncio.wrap_future(future)
        wrapped = asyncio.wrap_future(future)
        await loop.run_in_executor(None, end, setting, future, no, answer)
        return await wrapped

    if answer == "finished":
        assert asyncio.run(main()) == "value"
    else:
        with pytest.raises(ValueError if answer == "failed" else asyncio.CancelledError):
            asyncio.run(main())


@pytest.mark.parametrize("step", ["before", "cancelled", "exception"])
def test_a_cancel_between_asyncios_steps_does_not_hang_an_await(setting: Setting, step: str) -> None:
    """asyncio copies cancelled(), exception() and result() one after the other: they belong to one moment."""
    future = setting.finished()
    shown: list[Future[Any]] = []

    def _chain_future() -> Any:
        def _call_set_state(source: Future[Any]) -> None:
            shown.append(source)

        return _call_set_state

    callback = _chain_future()
    callback.__qualname__ = "_chain_future.<locals>._call_set_state"
    callback.__module__ = "asyncio.futures"
    future.add_done_callback(callback)
    (source,) = shown
    assert isinstance(source, Future) and source.done()
    answers: dict[str, Any] = {}
    for name in ("before", "cancelled", "exception", "result"):
        if name != "before":
            try:
                answers[name] = getattr(source, name)()
            except CancelledError:
                answers[name] = CancelledError
        if name == step:
            future.cancel()
    if step == "before":
        assert answers == {"cancelled": True, "exception": CancelledError, "result": CancelledError}
    else:
        assert answers == {"cancelled": False, "exception": None, "result": "value"}
    assert future.cancelled()


def test_asyncio_is_shown_a_snapshot(setting: Setting) -> None:
    """The callback by which this Python's asyncio chains futures is recognised."""
    future, no = setting.submit_sent()

    async def main() -> Any:
        wrapped = asyncio.wrap_future(future)
        (callback,) = future._done_callbacks
        assert callback.func is scaler_executor.future._call_with_snapshot
        setting.scheduler.value(no, "value")
        value = await wrapped
        assert value is future.result()
        return value

    assert asyncio.run(main()) == "value"


def test_cancelling_the_awaiting_task_cancels_the_call(setting: Setting) -> None:
    """asyncio's cancel reaches the future, and the loop goes on."""
    future, _ = setting.submit_sent()
    setting.scheduler.on_cancel = setting.scheduler.canceled

    async def main() -> None:
        task = asyncio.ensure_future(asyncio.wrap_future(future))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    setting.sync()
    assert future.cancelled()


def end(setting: Setting, future: ScalerFuture[Any], no: int, answer: str) -> None:
    """End a sent call in one of the ways, and wait until that has happened."""
    if answer == "finished":
        setting.scheduler.value(no, "value")
    elif answer == "failed":
        setting.scheduler.error(no, ValueError("text"))
    else:
        setting.scheduler.on_cancel = lambda row: give(setting, answer, row)
        future.cancel(PATIENCE_S)
        return
    wait([future], PATIENCE_S)


# Results


def test_a_value_is_unpickled_by_its_first_reader(setting: Setting) -> None:
    """Nothing is unpickled until somebody reads; who reads later gets the same object."""
    Counted.unpickled = 0
    future = setting.finished(Counted())
    assert future.done() and Counted.unpickled == 0
    value = future.result()
    assert Counted.unpickled == 1
    assert future.result() is value and future._result is value and future.exception() is None
    assert Counted.unpickled == 1


def test_readers_at_the_same_time_get_the_same_object(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that overtakes another one in unpickling publishes the object that both return."""
    future = setting.finished(Bomb())
    entered, leave = threading.Event(), threading.Event()

    def slow() -> list[str]:
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            assert leave.wait(PATIENCE_S)
        return ["value"]

    monkeypatch.setitem(globals(), "_explode", slow)
    reader = Background(future.result)
    assert entered.wait(PATIENCE_S)
    value = future.result()
    leave.set()
    assert reader.result() is value


def test_a_value_that_does_not_unpickle_is_the_futures_exception(setting: Setting) -> None:
    """What unpickling raises is raised by result() and returned by exception(), always the same object."""
    future = setting.finished(Bomb())
    with pytest.raises(AssertionError, match="unpickled") as caught:
        future.result()
    assert future.exception() is caught.value and not future.cancelled()


def test_ctrl_c_while_unpickling_leaves_the_result_unread(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyboardInterrupt belongs to the reader: it propagates, and the next reader gets the value."""
    future = setting.finished(Bomb())

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(globals(), "_explode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        future.result()
    monkeypatch.setitem(globals(), "_explode", lambda: "late")
    assert future.result() == "late"


def test_a_cancel_while_unpickling_drops_the_value(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """cancel() does not wait for a reader that is unpickling, and leaves nothing of what that reader made."""
    future = setting.finished(Bomb())
    entered, leave = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        assert leave.wait(PATIENCE_S)
        return "value"

    monkeypatch.setitem(globals(), "_explode", slow)
    reader = Background(future.result)
    assert entered.wait(PATIENCE_S)
    assert future.cancel() is True
    leave.set()
    with pytest.raises(CancelledError):
        reader.result()
    assert future._result is None and future._payload is None


def test_unpickling_may_use_the_executor(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The I/O thread is not held up by a reader: what unpickles may submit a call and wait for it."""
    future, no = setting.submit_sent()
    payload = pickle.dumps(Bomb())

    def nested() -> Any:
        inner, inner_no = setting.submit_sent()
        setting.scheduler.value(inner_no, "inner")
        return inner.result(PATIENCE_S)

    monkeypatch.setitem(globals(), "_explode", nested)
    waiting = Background(wait, [future], PATIENCE_S)
    setting.scheduler.result(no, ResultKind.VALUE, payload)
    assert future.result(PATIENCE_S) == "inner"
    waiting.result()


def test_a_death_report_becomes_an_error_with_its_facts(setting: Setting) -> None:
    """WorkerDiedError names the call, the signal and the host, and survives pickling."""
    future, no = setting.submit_sent()
    report = DeathReport("it was killed by signal 11", -11, "here", 42, 3, 1, 5 << 20)
    setting.scheduler.result(no, ResultKind.DIED, msgspec.msgpack.encode(report))
    with pytest.raises(
        WorkerDiedError, match=r"never_called\(\): it was killed by signal 11 \(host here, pid 42"
    ) as caught:
        future.result(PATIENCE_S)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.exit_code, error.signal_name, error.host, error.pid, error.worker_id) == (
        -11,
        "SIGSEGV",
        "here",
        42,
        3,
    )


def test_a_broken_cluster_becomes_an_error_with_its_cause(setting: Setting) -> None:
    """WorkerStartError carries the text."""
    future, no = setting.submit_sent()
    setting.scheduler.result(no, ResultKind.BROKEN, b"the initializer failed")
    with pytest.raises(WorkerStartError, match="the initializer failed"):
        future.result(PATIENCE_S)


def test_a_lost_scheduler_ends_every_call(setting: Setting) -> None:
    """Outstanding calls end with SchedulerLostError and how the cluster ended; later ones are refused with it."""
    futures = [setting.submit_sent()[0] for _ in range(3)]
    setting.scheduler.die()
    for future in futures:
        with pytest.raises(SchedulerLostError, match="the fake scheduler ended"):
            future.result(PATIENCE_S)
    setting.client.join()
    with pytest.raises(SchedulerLostError, match="the fake scheduler ended"):
        setting.submit()


def test_a_scheduler_that_talks_nonsense_is_lost(setting: Setting) -> None:
    """What is no message ends the cluster, and the calls with SchedulerLostError."""
    future, _ = setting.submit_sent()
    setting.scheduler.garbage()
    with pytest.raises(SchedulerLostError, match="protocol"):
        future.result(PATIENCE_S)
    assert setting.scheduler.was_killed.is_set()


# As the standard library's


def test_a_future_of_nobody_works_as_the_standard_librarys() -> None:
    """Without a client the base class's methods for executors work, and cancel() needs nobody's confirmation."""
    future: ScalerFuture[int] = ScalerFuture()
    assert not future.done() and not future.running() and repr(future).endswith("state=pending>")
    assert future.set_running_or_notify_cancel() is True
    assert future.running()
    with pytest.raises(TimeoutError):
        future.result(0)
    future.set_result(5)
    assert future.result() == 5 and repr(future).endswith("state=finished returned int>")
    with pytest.raises(InvalidStateError):
        future.set_exception(ValueError())
    other: ScalerFuture[int] = ScalerFuture()
    called: list[Any] = []
    other.add_done_callback(called.append)
    assert other.cancel() is True and other.cancelled() and called == [other]
    assert other.set_running_or_notify_cancel() is False
    third: ScalerFuture[int] = ScalerFuture()
    third.set_exception(ValueError("text"))
    assert isinstance(third.exception(), ValueError) and repr(third).endswith("state=finished raised ValueError>")
    with pytest.raises(ValueError, match="text"):
        third.result()


def test_result_waits_and_times_out(setting: Setting) -> None:
    """result() and exception() raise the standard library's TimeoutError, and nothing but a result wakes them."""
    future, no = setting.submit_sent()
    with pytest.raises(TimeoutError):
        future.result(0.001)
    reading = Background(future.result, PATIENCE_S)
    asking = Background(future.cancel, force=False)
    setting.scheduler.refused(setting.scheduler.next_cancel())
    asking.result()
    assert reading.is_alive
    setting.scheduler.value(no, 3)
    assert reading.result() == 3


def test_futures_are_not_pickled(setting: Setting) -> None:
    """As a stock future: TypeError."""
    future, _ = setting.submit_sent()
    with pytest.raises(TypeError, match="cannot pickle 'ScalerFuture' object"):
        pickle.dumps(future)
    with pytest.raises(TypeError):
        copy.deepcopy(future)


def test_wait_on_two_clients_from_two_threads() -> None:
    """Threads that wait for the same futures of two executors, in any order, do not block each other."""
    settings = [Setting(), Setting()]
    futures = [setting.submit_sent() for _ in range(20) for setting in settings]
    all_futures = [future for future, _ in futures]
    waiters = [Background(wait, order, PATIENCE_S) for order in (all_futures, all_futures[::-1])]
    for index, (_, no) in enumerate(futures):
        settings[index % 2].scheduler.value(no, index)
    for waiter in waiters:
        assert waiter.result().not_done == set()
    for setting in settings:
        setting.close()


def test_no_lock_is_taken_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A future's lock is taken by C code: a Ctrl-C within `Condition.__enter__` could leave it held for ever."""
    enter = threading.Condition.__enter__

    def refuse(condition: threading.Condition) -> bool:
        assert sys._getframe(1).f_code.co_filename != scaler_executor.future.__file__
        return enter(condition)

    monkeypatch.setattr(threading.Condition, "__enter__", refuse)
    futures: list[ScalerFuture[int]] = [ScalerFuture() for _ in range(3)]
    called: list[object] = []
    for future in futures:
        future.add_done_callback(called.append)
    settling = threading.Timer(0.05, futures[0].set_result, [1])
    settling.start()
    assert futures[0].result(PATIENCE_S) == 1
    settling.join()
    futures[1].cancel()
    futures[2].set_exception(ValueError())
    assert called == futures
