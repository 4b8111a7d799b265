"""The client over a fake scheduler: what it sends, in which order, and how it ends."""

import gc
import os
import pickle
import signal
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest
from fake_scheduler import PATIENCE_S, Background, Setting, never_called

from scaler_executor import CancelOutcome, WorkerDiedError
from scaler_executor.defaults import DEFAULT_TIMEOUT
from scaler_executor.protocol.messages import CancelKind, TaskSubmit
from scaler_executor.runtime import client as client_module
from scaler_executor.runtime import outbox
from scaler_executor.runtime.ending import wait_until_ended
from scaler_executor.runtime.functions import MAX_FUNCTIONS


def submits(setting: Setting) -> list[TaskSubmit]:
    return [message for message in setting.scheduler.messages if isinstance(message, TaskSubmit)]


# What is sent


def test_the_only_call_is_written_by_its_caller(setting: Setting) -> None:
    """With nothing outstanding the caller sends, and the client's own thread takes the call up with the answer."""
    seen: list[Any] = []
    real = setting.client._send

    def send(packet: bytes) -> int:
        seen.append(threading.current_thread())
        return real(packet)

    setting.client._send = send  # type: ignore[assignment]
    while not seen:  # whether the client's own thread is asleep yet is a matter of luck
        assert setting.finished("value").result(0) == "value"
    assert set(seen) == {threading.current_thread()}
    assert setting.client.outstanding == setting.client._state.outstanding == 0
    numbers = [row[0] for message in submits(setting) for row in message.tasks]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_call_interrupted_before_it_was_written_is_sent_later(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between taking the call in and writing it: submit() raises, and nothing is left that never ends."""

    def interrupted(packet: bytes) -> int:
        raise KeyboardInterrupt

    setting.client._send = interrupted  # type: ignore[assignment]
    setting.scheduler.on_submit = lambda row: setting.scheduler.value(row[0], "value")
    with pytest.raises(KeyboardInterrupt):
        while True:  # until the client's own thread is asleep in time
            assert setting.submit().result(PATIENCE_S) == "value"
    setting.client.close()
    setting.client.join()
    assert setting.client.outstanding == 0
    numbers = [row[0] for message in submits(setting) for row in message.tasks]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_call_written_in_part_is_completed(setting: Setting) -> None:
    """A socket that takes only some of the bytes gets the rest from the client's own thread."""
    real = setting.client._send
    cut: list[int] = []

    def send(packet: bytes) -> int:
        cut.append(real(packet[:3]))
        return cut[-1]

    setting.client._send = send  # type: ignore[assignment]
    while not cut:
        assert setting.finished("value").result(0) == "value"
    numbers = [row[0] for message in submits(setting) for row in message.tasks]
    assert numbers == list(range(1, len(numbers) + 1))


class CrossedClient(client_module.ClientFutureManager):
    """Somebody submits at the very moment at which the I/O thread is about to say that it sleeps."""

    crossing: Callable[[], None] | None = None

    @property
    def _asleep(self) -> list[bool]:  # type: ignore[override]
        return self.__dict__.get("asleep", [])  # type: ignore[no-any-return]

    @_asleep.setter
    def _asleep(self, value: list[bool]) -> None:
        crossing, self.crossing = self.crossing, None
        if crossing is not None:
            crossing()
        self.__dict__["asleep"] = value


def test_a_call_that_crosses_the_io_threads_falling_asleep_is_sent() -> None:
    """Whoever found it awake has not rung: it looks once more after it said that it sleeps."""
    setting = Setting(kind=CrossedClient)
    setting.scheduler.on_submit = lambda row: setting.scheduler.value(row[0], row[0])
    client = setting.client
    assert isinstance(client, CrossedClient)
    crossed: list[Any] = []
    has_crossed = threading.Event()

    def cross() -> None:
        crossed.append(setting.submit())
        has_crossed.set()

    client.crossing = cross
    setting.submit().result(PATIENCE_S)
    assert has_crossed.wait(PATIENCE_S)
    crossed[0].result(PATIENCE_S)
    setting.close()


def test_many_calls_are_sent_in_pieces_and_in_order(setting: Setting) -> None:
    """A large batch is cut: its function goes first, and every call goes once."""
    with setting.client._io_lock:
        futures = [setting.submit(index) for index in range(2500)]
    rows = [setting.scheduler.next_submit() for _ in range(2500)]
    assert [row[0] for row in rows] == list(range(1, 2501))
    assert max(len(message.tasks) for message in submits(setting)) <= outbox.TASKS_PER_MESSAGE
    assert len(submits(setting)[0].functions) == 1
    for row in rows:
        setting.scheduler.value(row[0], row[0])
    assert [future.result(PATIENCE_S) for future in futures] == list(range(1, 2501))


def test_a_function_is_sent_once_and_before_its_calls(setting: Setting) -> None:
    """Calls of a function known by name refer to it by its id."""
    futures = [setting.submit_sent() for _ in range(3)]
    assert [len(message.functions) for message in submits(setting)] == [1, 0, 0]
    for _, no in futures:
        setting.scheduler.value(no, None)


def test_functions_are_forgotten_behind_their_last_call(setting: Setting) -> None:
    """No call names a function that an earlier message forgot, nor one that it has not been sent."""
    exec_namespace: dict[str, Any] = {"__name__": __name__}
    futures = []
    for index in range(MAX_FUNCTIONS + 50):
        exec(f"def made(x): return x + {index}", exec_namespace)
        futures.append(setting.client.submit(exec_namespace["made"], (index,), {}))
    for _ in futures:
        setting.scheduler.value(setting.scheduler.next_submit()[0], None)
    known: set[int] = set()
    forgotten = 0
    for message in submits(setting):
        known |= {function.function_id for function in message.functions}
        assert {row[2] for row in message.tasks} <= known
        known -= set(message.forget)
        forgotten += len(message.forget)
    assert forgotten == 50


def test_what_does_not_pickle_is_the_futures_exception(setting: Setting) -> None:
    """As with ProcessPoolExecutor: submit() returns a future, and nothing is sent."""
    future = setting.submit(threading.Lock())
    with pytest.raises(TypeError, match="cannot pickle"):
        future.result(0)
    assert setting.client.outstanding == 0
    assert future.cancel() and future.cancel_outcome is CancelOutcome.ALREADY_DONE


def test_the_arguments_are_those_at_submit(setting: Setting) -> None:
    """Arguments are pickled in submit(): what happens to them later does not count."""
    argument = [1]
    setting.submit(argument)
    argument.append(2)
    row = setting.scheduler.next_submit()
    assert pickle.loads(row[3]) == (([1],), {})  # type: ignore[arg-type]


def test_argument_and_result_live_no_longer_than_their_holders(setting: Setting) -> None:
    """Neither the client nor its threads keep an argument, a future or a value."""

    future, no = setting.submit_sent()
    done = threading.Event()
    future.add_done_callback(lambda f: done.set())
    setting.scheduler.value(no, {"a", "b"})
    assert done.wait(PATIENCE_S)
    value = weakref.ref(future.result(PATIENCE_S))
    dead = weakref.ref(future)
    setting.sync()
    del future
    gc.collect()
    assert dead() is None and value() is None


# Cancelling many


def test_take_back_sends_soft_cancels_that_keep_values(setting: Setting) -> None:
    """What runs completes with its value, also when that crosses the request; what was taken back is cancelled."""
    finishing, finishing_no = setting.submit_sent()
    running, running_no = setting.submit_sent()
    pending, pending_no = setting.submit_sent()
    setting.client.take_back_all(0)
    rows = {row[0]: row for row in (setting.scheduler.next_cancel() for _ in range(3))}
    assert {row[2] for row in rows.values()} == {CancelKind.SOFT}
    setting.scheduler.value(finishing_no, "in time")
    setting.scheduler.refused(rows[running_no])
    setting.scheduler.canceled(rows[pending_no])
    setting.scheduler.value(running_no, "ran on")
    setting.sync()
    assert finishing.result(0) == "in time"
    assert running.result(0) == "ran on"
    assert pending.cancelled() and pending.cancel_outcome is CancelOutcome.CANCELED


def test_clear_stops_everything_and_stays_usable(setting: Setting) -> None:
    """clear() forces all that is outstanding, in one message, and waits for it."""
    futures = [setting.submit_sent()[0] for _ in range(5)]
    setting.scheduler.on_cancel = setting.scheduler.canceled
    setting.client.clear(DEFAULT_TIMEOUT)
    assert all(future.cancelled() for future in futures)
    assert [type(m).__name__ for m in setting.scheduler.messages].count("TaskCancel") == 1
    assert setting.finished("again").result(0) == "again"


# The end


def test_accepted_work_finishes_after_close(setting: Setting) -> None:
    """close() refuses new calls; those that were accepted are answered, and only then Bye is said."""
    future, no = setting.submit_sent()
    setting.client.close()
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        setting.submit()
    assert not setting.scheduler.said_bye.is_set()
    setting.scheduler.value(no, 1)
    setting.client.join()
    assert setting.scheduler.said_bye.is_set() and setting.scheduler.joined
    assert future.result(0) == 1


def test_callbacks_run_before_join_returns(setting: Setting) -> None:
    """After join() every callback has been called."""
    future, no = setting.submit_sent()
    called: list[Any] = []
    release = threading.Event()
    future.add_done_callback(lambda f: (release.wait(PATIENCE_S), called.append(f)))
    setting.scheduler.value(no, 1)
    setting.client.close()
    joining = Background(setting.client.join)
    release.set()
    joining.result()
    assert called == [future]


def test_a_callback_may_submit_and_shut_down(setting: Setting) -> None:
    """A callback may use the client in every way, closing and joining included."""
    future, no = setting.submit_sent()
    more: list[Any] = []
    done = threading.Event()

    def callback(_: Any) -> None:
        more.append(setting.submit())
        setting.scheduler.value(setting.scheduler.next_submit()[0], "more")
        more.append(more[0].result(PATIENCE_S))
        setting.client.close()
        setting.client.join()
        done.set()

    future.add_done_callback(callback)
    setting.scheduler.value(no, 1)
    assert done.wait(PATIENCE_S)
    assert more[1] == "more"


def test_a_blocked_callback_blocks_no_other_call(setting: Setting) -> None:
    """While a callback waits, results go on arriving."""
    future, no = setting.submit_sent()
    release = threading.Event()
    future.add_done_callback(lambda f: release.wait(PATIENCE_S))
    setting.scheduler.value(no, 1)
    assert setting.finished("others").result(0) == "others"
    release.set()


def test_the_client_closes_when_its_owner_is_garbage(setting: Setting) -> None:
    """Without a shutdown accepted work finishes, and then everything goes away."""

    class Owner:
        pass

    owner = Owner()
    setting.client.close_with(owner)
    future, no = setting.submit_sent()
    del owner
    gc.collect()
    setting.scheduler.value(no, 1)
    assert future.result(PATIENCE_S) == 1
    setting.client.join()
    assert setting.scheduler.said_bye.is_set()


def test_a_first_interrupt_stops_the_calls_and_a_second_kills(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for the end, Ctrl-C cancels everything by force; pressed again it kills the cluster. Both are raised."""
    future, _ = setting.submit_sent()
    interrupts = 0

    def interrupted() -> None:
        nonlocal interrupts
        interrupts += 1
        raise KeyboardInterrupt

    setting.client.close()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(setting.client, "join", interrupted)
        patch.setattr(setting.client, "join_soon", interrupted)
        wait_until_ended(setting.client, interrupted=False)
    assert interrupts == 2
    assert setting.scheduler.was_killed.is_set()
    setting.client.join()
    with pytest.raises(CancelledError):
        future.result(0)


# Forks


def in_child(check: Callable[[], None]) -> int:
    """Run `check` in a fork of this process; return 0 if it returned."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(int(PATIENCE_S))
            check()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_first_calls_count_as_running_while_workers_start(setting: Setting) -> None:
    """Until something has started, as many calls as there may be workers are not taken back; later all are."""
    numbers = [setting.submit_sent()[1] for _ in range(3)]
    setting.client.take_back_all(2)
    assert setting.scheduler.next_cancel()[0] == numbers[2]
    setting.sync()
    setting.client.take_back_all(2)
    assert sorted(setting.scheduler.next_cancel()[0] for _ in range(2)) == numbers[:2]


def test_killed_workers(setting: Setting) -> None:
    """Calls that run end with WorkerDiedError, the others are cancelled; nothing is accepted any more."""
    running, no = setting.submit_sent()
    setting.scheduler.running(no)
    setting.sync()
    queued, _ = setting.submit_sent()
    setting.client.kill_workers()
    assert isinstance(running.exception(PATIENCE_S), WorkerDiedError)
    wait([queued], PATIENCE_S)
    assert queued.cancelled() and setting.scheduler.was_killed.is_set()
    with pytest.raises(RuntimeError, match="after shutdown"):
        setting.submit()


def test_a_forked_child_is_refused_and_harms_nobody(setting: Setting) -> None:
    """In a fork every call is refused with RuntimeError, shutting down does nothing, and the parent goes on."""
    pending, no = setting.submit_sent()
    done = setting.finished("kept")

    def check() -> None:
        for attempt in (setting.submit, pending.cancel, lambda: setting.client.clear(0), setting.client.check_open):
            with pytest.raises(RuntimeError, match="fork"):
                attempt()
        assert done.result(0) == "kept"
        setting.client.close()
        setting.client.take_back_all(0)

    assert in_child(check) == 0
    setting.scheduler.value(no, 1)
    assert pending.result(PATIENCE_S) == 1


def test_a_forked_child_holds_none_of_the_clients_descriptors(setting: Setting) -> None:
    """The child's copies are closed, so that the scheduler sees the parent's end although the child lives."""
    inode = os.fstat(setting.scheduler.socket.fileno()).st_ino

    def check() -> None:
        inodes = []
        for name in os.listdir("/proc/self/fd"):
            try:
                inodes.append(os.fstat(int(name)).st_ino)
            except OSError:
                pass  # the listing's own
        assert inode not in inodes

    assert in_child(check) == 0


def test_a_pickling_error_keeps_the_client_usable(setting: Setting) -> None:
    """A call that cannot be pickled takes no number and leaves nothing queued."""
    setting.client.submit(never_called, (lambda: threading.Lock(), threading.Lock()), {})
    assert setting.finished(1).result(0) == 1
