"""ScalerFuture: a light `concurrent.futures.Future` whose `cancel()` is confirmed and always ends True.

It knows one call's state and who waits for it. It does not know messages, sockets or threads: the client
(`scaler_executor.runtime.client`) settles it and passes its requests on. This is the only file that touches the private
names of `concurrent.futures.Future`, which `wait` and `as_completed` use on whatever future they are given.

Light. A stock future makes ten objects for the garbage collector. This one makes its condition and its lists on first
use, through descriptors without `__set__`: once the instance's dictionary has the name, they are out of the way.

Settled without a lock. Nearly every future is settled before anybody looks, so settling an unwatched one must not need
a lock, and settling a watched one must. One dictionary operation decides which it is, and it is atomic with and without
a GIL: `setdefault("_state", ...)`. While nobody watches, `_state` is not in the dictionary (the class says PENDING).

- Whoever wants to wait takes `_condition`, and making that puts PENDING there first. The settling thread then finds
  PENDING instead of putting FINISHED, and goes through the condition: the watcher either sees the final state under the
  lock or is told of it, never both and never neither. `as_completed` breaks on both.
- If the settling thread was first, the watcher's `setdefault` changes nothing and the state it reads is final.

So nothing is decided by "write mine, then read yours": there is no window to close. From then on every change of
`_state` happens under the condition. It is one per future and not shared, since `wait` takes those of all its futures
in the order of their ids, and two threads would take two shared ones in different orders.

Read without a lock. A reader looks at the state, takes the values, and looks again. `cancel()` of a finished future
writes the state first and then drops the values: if the state still says FINISHED, the values were there.

Results stay pickled until somebody reads them, in the reader's thread and under no lock: unpickling runs user code,
which may do anything.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, InvalidStateError, TimeoutError
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, LOGGER, PENDING, RUNNING
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

from scaler_executor.defaults import DEFAULT_TIMEOUT, DefaultTimeout
from scaler_executor.protocol.messages import CancelKind, Payload, ResultKind
from scaler_executor.runtime.results import LOST, read_result

if TYPE_CHECKING:
    from scaler_executor.runtime.display import CallLog
    from scaler_executor.runtime.lender import Lender

T = TypeVar("T")

_VALUE: Final = int(ResultKind.VALUE)
_DONE: Final = frozenset({CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED})

#: The outcome of a future that has none.
_NOTHING: Final = (None, None)

#: So long, in total, may cancels hold an event loop in one of its turns: less than a frame, more than most confirms
#: take.
LOOP_TURN_S: Final = 0.010


class CancelOutcome(Enum):
    """What became of a cancel request."""

    CANCELED = "canceled"
    """The call had not started, or its code has stopped."""
    ALREADY_DONE = "already done"
    """The future was finished when `cancel()` was called; its value has been dropped."""
    NOT_FOUND = "not found"
    """The scheduler does not know the call."""
    FINISHED_FIRST = "finished first"
    """The call finished, with a value or an error, before it could be stopped; the value has been dropped."""
    FAILED = "failed"
    """The call runs on and completes normally: it has started and `force` was False, or it cannot be stopped."""
    UNCONFIRMED = "unconfirmed"
    """The scheduler or the machine is out of reach: nobody can tell whether the code has stopped."""


class FutureOwner(Protocol):
    """What a future needs of the client that settles it."""

    cancel_timeout_s: float | None

    def check_process(self) -> None:
        """Raise RuntimeError in a forked child."""

    def ask_cancel(self, cancels: list[tuple[int, CancelKind]]) -> None:
        """Pass cancel requests on, by task number. Never waits."""

    def hurry(self) -> None:
        """Send what was submitted, since somebody waits for it."""

    def may_wait(self) -> bool:
        """Tell whether this thread may wait for an answer: not the one that receives it, nor at interpreter exit."""
        ...

    def expect_callbacks(self) -> None:
        """Be ready to run callbacks: a future has some now."""

    def call_back(self, future: ScalerFuture[Any]) -> None:
        """Run the future's callbacks soon, in another thread."""


class _Answers:
    """The answers for which one call of `cancel_all` waits.

    Not the futures' conditions: a stock `result(timeout)` takes any wake-up without a result for its timeout.
    """

    __slots__ = ("_all_here", "_came", "_expected")

    def __init__(self) -> None:
        self._came: list[None] = []
        #: How many there are to be, once that is known.
        self._expected: int | None = None
        self._all_here = threading.Event()

    def note(self) -> None:
        """Take one. For any thread."""
        self._came.append(None)
        if len(self._came) == self._expected:
            self._all_here.set()

    def wait(self, expected: int, timeout: float | None) -> None:
        """Return when so many are here."""
        self._expected = expected  # before the look: one of the two sees that the last one is here
        if len(self._came) < expected:
            self._all_here.wait(timeout)


class _Ask:
    """An outstanding cancel request. All that wait for it share it, also when it is raised from soft to forced."""

    __slots__ = ("kind", "passed_on", "waiting")

    def __init__(self, kind: CancelKind) -> None:
        self.kind = kind
        #: The strongest kind that the client has taken up; set by its I/O thread. While it is less than `kind` an
        #: answer is one to an older request.
        self.passed_on = CancelKind.RECALL
        #: Told when the future is settled or the request refused. Added to under the future's condition, while this is
        #: the future's request.
        self.waiting: list[_Answers] = []

    def answer(self) -> None:
        """Tell whoever waits, once this is the future's request no more."""
        for answers in self.waiting:
            answers.note()


class _LazyCondition:
    """Makes a future's condition, and with it makes the future watched."""

    def __get__(self, future: ScalerFuture[Any] | None, kind: Any = None) -> Any:
        if future is None:
            return self
        fields = future.__dict__
        if fields.setdefault("_state", PENDING) == PENDING and (owner := future._get_owner()) is not None:
            owner.hurry()
        return fields.setdefault("_condition", threading.Condition())


class _LazyList:
    """Makes a future's list. Whoever uses one holds the condition."""

    def __set_name__(self, kind: Any, name: str) -> None:
        self._name = name

    def __get__(self, future: ScalerFuture[Any] | None, kind: Any = None) -> Any:
        return self if future is None else future.__dict__.setdefault(self._name, [])


class _LazyWaiters(_LazyList):
    """Makes the list of those who wait, in which they lend the slot of the call in which they do."""

    def __get__(self, future: ScalerFuture[Any] | None, kind: Any = None) -> Any:
        if future is None or (lender := future._get_lender()) is None:
            return super().__get__(future, kind)
        return future.__dict__.setdefault(self._name, _LendingWaiters(lender))


class _LendingWaiters(list[Any]):
    def __init__(self, lender: Lender) -> None:
        super().__init__()
        self._lender = lender

    def append(self, waiter: Any) -> None:
        from scaler_executor.runtime.lender import LendingEvent

        if type(getattr(waiter, "event", None)) is threading.Event:
            waiter.event = LendingEvent(self._lender)  # nobody waits for the other one yet
        super().append(waiter)


class _OutcomePart:
    """The exception or the value of a future, unpickled when it is asked for. None unless the future is finished."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, future: ScalerFuture[Any] | None, kind: Any = None) -> Any:
        return self if future is None else future._unpickle()[self._index]


class ScalerFuture(Future[T]):
    """The result of a call made by `ScalerExecutor.submit`.

    As `concurrent.futures.Future`, except for `cancel` and `cancel_outcome`. Done-callbacks run in a thread of the
    executor that does nothing else, so they may block, take locks, submit and cancel. All methods are thread-safe.
    """

    # Set once, when the future is made for a call, `_terms` only for one of a view; but the payload and its kind are
    # set before `_state` becomes FINISHED.
    __slots__ = ("_call_name", "_owner", "_payload", "_result_kind", "_task_no", "_terms")

    if TYPE_CHECKING:
        _call_name: str
        _owner: FutureOwner
        _payload: Payload | str | None
        _result_kind: int
        _task_no: int
        _terms: object
        _done_callbacks: list[Callable[[Future[T]], object]]
    else:
        __init__ = object.__init__
        _condition = _LazyCondition()
        _waiters = _LazyWaiters()
        _done_callbacks = _LazyList()
        _exception = _OutcomePart(0)
        _result = _OutcomePart(1)

    _state = PENDING
    #: The outstanding cancel request. Changed under the condition.
    _ask: _Ask | None = None
    #: What the call has printed, see `runtime.display`; None: nothing. Set by the client before it settles the future.
    _log: CallLog | None = None
    #: The answer to the last cancel request. Changed under the condition.
    _cancel_outcome: CancelOutcome | None = None

    # For whoever holds the future

    def cancel(self, timeout: float | DefaultTimeout | None = DEFAULT_TIMEOUT, *, force: bool = True) -> bool:
        """Cancel the call: take it back if it has not started, stop its code if it has, and wait until that is
        confirmed.

        As `Future.cancel`, except that it also cancels what is running or finished, that it waits for the confirmation,
        and that it always returns True. What became of the request is in `cancelled()` and, exactly, in
        `cancel_outcome`: a call that cannot be stopped runs on and completes normally. Once asked for, a cancel also
        takes the value of a call that was quicker.

        It does not wait in the executor's own threads nor at the interpreter's exit, and it holds a running event loop
        for at most 10 ms a turn, unless a timeout is given. The confirmation then settles the future later.

        Args:
            timeout: Seconds to wait for the confirmation, None for no limit; without it the executor's
            `cancel_timeout`.
                The request stays, whether confirmed in time or not.
            force: Stop running code. If False, only take back a call that has not started.

        Raises:
            RuntimeError: This process is a fork of the one that submitted the call.
        """
        return cancel_all([self], timeout, force=force)

    @property
    def cancel_outcome(self) -> CancelOutcome | None:
        """What became of the last cancel request, None while there was none or no answer has come."""
        return self._cancel_outcome

    @property
    def log(self) -> str:
        """What the call wrote to `sys.stdout` and `sys.stderr`, and its records of logging as far as they came to this
        process, in order: the last 65,536 characters, with a line where some are missing that says how many. Complete
        when the future is done, whatever ended the call; of several attempts all of it. "" if there was nothing. Where
        the calls' `sys.stdout` is your own file or pipe, what that has in its buffer is missing of a killed call."""
        log = self._log
        return "" if log is None else log.text()

    def cancelled(self) -> bool:
        """As `Future.cancelled`."""
        return self._state in (CANCELLED_AND_NOTIFIED, CANCELLED)

    def running(self) -> bool:
        """As `Future.running`. A call shows as running once it has run for some milliseconds."""
        return self._state == RUNNING

    def done(self) -> bool:
        """As `Future.done`."""
        return self._state in _DONE

    def result(self, timeout: float | None = None) -> T:
        """As `Future.result`. The value is unpickled at the first call, in the caller's thread."""
        try:
            exception, value = self._read(timeout)
            if exception is None:
                return value  # type: ignore[no-any-return]
            raise exception
        finally:
            # The exception's traceback holds this frame: without this the two would hold each other.
            del self
            exception = None

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As `Future.exception`."""
        return self._read(timeout)[0]

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """As `Future.add_done_callback`, except that `fn` runs in the executor's callback thread."""
        if _is_asyncio_chain(fn):
            # The loop that waits for it is not to be seen, so the call in which it runs waits from here on.
            lender = None if self._state in _DONE else self._get_lender()
            fn = partial(_call_with_snapshot, fn, None if lender is None else lender.begin_await())
        if self._state not in _DONE:
            with self._condition_lock:
                if self._state not in _DONE:
                    owner = self._get_owner()
                    if owner is not None:
                        owner.expect_callbacks()
                    self._done_callbacks.append(fn)
                    return
        try:
            fn(self)
        except Exception:
            LOGGER.exception("exception calling callback for %r", self)

    def __repr__(self) -> str:
        state = self._state
        what = state.partition("_")[0].lower()
        if state == FINISHED:
            try:
                exception, value = self._read(0)
            except CancelledError:
                what = "cancelled"
            else:
                verb, kind = ("returned", type(value)) if exception is None else ("raised", type(exception))
                what += f" {verb} {kind.__name__}"
        return f"<{type(self).__name__} at {id(self):#x} state={what}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")

    # For the client

    def set_result_ready(self, kind: int, payload: Payload | str) -> None:
        """Finish the call with a result that nobody has unpickled yet; if a cancel was asked for, drop it instead.

        Args:
            kind: A ResultKind, or LOST.
            payload: What that kind says; for LOST the reason.
        """
        self._result_kind = kind
        self._payload = payload
        if self.__dict__.setdefault("_state", FINISHED) != FINISHED:
            self._settle(FINISHED)

    def set_cancel_confirmed(self, outcome: CancelOutcome) -> None:
        """Take the answer to the outstanding cancel request."""
        if outcome is not CancelOutcome.FAILED:
            self._settle(CANCELLED_AND_NOTIFIED, outcome)
            return
        with self._condition_lock:
            ask = self._ask
            if ask is None or ask.passed_on < ask.kind:
                return  # a stronger request is on its way: its answer counts
            self._ask = None
            self._cancel_outcome = outcome
        ask.answer()

    def set_cancel_passed_on(self, kind: CancelKind) -> None:
        """Note that a cancel request has been taken up: answers from here on are answers to it."""
        ask = self._ask
        if ask is not None and ask.passed_on < kind:
            ask.passed_on = kind

    def set_running(self) -> None:
        """Note that the call runs. May come late: a done future stays as it is."""
        if self.__dict__.setdefault("_state", RUNNING) == PENDING:
            with self._condition_lock:
                if self._state == PENDING:
                    self._state = RUNNING

    def set_result(self, result: T) -> None:
        """As `Future.set_result`."""
        self._settle(FINISHED, outcome=(None, result))

    def set_exception(self, exception: BaseException | None) -> None:
        """As `Future.set_exception`."""
        self._settle(FINISHED, outcome=(exception, None))

    def set_running_or_notify_cancel(self) -> bool:
        """As `Future.set_running_or_notify_cancel`, except that for a cancelled future it may be called again."""
        return not self.cancelled() and super().set_running_or_notify_cancel()

    def tell(self, waiter: Any) -> bool:
        """Have a waiter, of the kind that `concurrent.futures.wait` has, told when the call is over, in the thread that
        settles it. Return False if it is over already."""
        with self._condition_lock:
            if self._state in _DONE:
                return False
            self._waiters.append(waiter)
        return True

    def invoke_callbacks(self) -> None:
        """Call the done-callbacks, in order, and forget them."""
        for callback in self.__dict__.pop("_done_callbacks", ()):
            try:
                callback(self)
            except BaseException:  # user code: whatever it raises must not end the thread that calls everybody's
                self._log_failed_callback()

    def _log_failed_callback(self) -> None:
        """Log the exception that is being handled. Both steps run user code again: a result is unpickled to be shown,
        and a handler may be anything."""
        try:
            shown = repr(self)
        except BaseException:
            shown = object.__repr__(self)
        try:
            LOGGER.exception("exception calling callback for %s", shown)
        except BaseException:
            pass

    # Settling

    def _settle(
        self,
        state: str,
        cause: CancelOutcome | None = None,
        *,
        outcome: tuple[BaseException | None, Any] | None = None,
    ) -> None:
        """Make the future done and tell whoever waits. A cancel that was asked for wins over a result."""
        fields = self.__dict__
        ask: _Ask | None = None
        has_callbacks = False
        with self._condition_lock:
            before = self._state
            if before not in _DONE:
                ask, self._ask = self._ask, None
                is_lost = outcome is None and state == FINISHED and self._result_kind == LOST
                if ask is not None and cause is None:
                    state = CANCELLED_AND_NOTIFIED
                    cause = CancelOutcome.UNCONFIRMED if is_lost else CancelOutcome.FINISHED_FIRST
                if cause is not None:
                    self._cancel_outcome = cause
                    self._drop_values()
                elif outcome is not None:
                    fields["_outcome"] = outcome
                self._state = state
                self._tell_waiters(fields.get("_waiters", ()))
                self._condition.notify_all()
                has_callbacks = bool(fields.get("_done_callbacks"))
        if before in _DONE:
            if outcome is not None:
                raise InvalidStateError(f"{before}: {self!r}")
            return  # somebody outside has settled it
        if ask is not None:
            ask.answer()
        if has_callbacks:
            owner = self._get_owner()
            if owner is None:
                self.invoke_callbacks()
            else:
                owner.call_back(self)

    def _tell_waiters(self, waiters: Iterable[Any]) -> None:
        for waiter in waiters:
            if self._state != FINISHED:
                waiter.add_cancelled(self)
            elif self._is_failure():
                waiter.add_exception(self)
            else:
                waiter.add_result(self)

    def _is_failure(self) -> bool:
        """Tell whether the outcome is an exception, as far as that is known without unpickling it."""
        outcome = self.__dict__.get("_outcome")
        return self._result_kind != _VALUE if outcome is None else outcome[0] is not None

    def _drop_values(self) -> None:
        self._payload = None
        self.__dict__["_outcome"] = _NOTHING

    @property
    def _condition_lock(self) -> threading.RLock:
        """For whoever wants only the lock: a Ctrl-C that hits `Condition.__enter__`, which is Python, may leave it held
        for ever, and the I/O thread waiting; the lock's own is C."""
        return self._condition._lock  # type: ignore[attr-defined, no-any-return]

    def _get_owner(self) -> FutureOwner | None:
        return getattr(self, "_owner", None)

    # Reading

    def _read(self, timeout: float | None) -> tuple[BaseException | None, Any]:
        """Wait and return (exception, value). Raise CancelledError or TimeoutError."""
        fields = self.__dict__
        while True:
            if self._state != FINISHED:
                self._wait_until_finished(timeout)
            outcome: tuple[BaseException | None, Any] = fields.get("_outcome") or self._unpickle()
            if self._state == FINISHED:
                return outcome

    def _get_lender(self) -> Lender | None:
        return getattr(getattr(self, "_owner", None), "lender", None)

    def _wait_until_finished(self, timeout: float | None) -> None:
        lender = self._get_lender()
        if lender is None or (timeout is not None and timeout <= 0) or self._state in _DONE:
            self._wait_here(timeout)
        else:
            lender.wait(partial(self._wait_here, timeout))

    def _wait_here(self, timeout: float | None) -> None:
        with self._condition_lock:
            if self._state not in _DONE:
                self._condition.wait(timeout)
            state = self._state
        if state not in _DONE:
            raise TimeoutError()
        if state != FINISHED:
            raise CancelledError()

    def _unpickle(self) -> tuple[BaseException | None, Any]:
        """Return (exception, value), unpickled now if nobody has done it. A KeyboardInterrupt leaves it as it was.

        Two threads may unpickle at the same time; the one that publishes first counts, and both return its objects.
        """
        fields = self.__dict__
        payload = getattr(self, "_payload", None)
        # Looked at after the payload: a cancel changes the state first and then drops the payload.
        if self._state != FINISHED or payload is None:
            return fields.get("_outcome", _NOTHING)  # type: ignore[no-any-return]
        outcome = fields.setdefault("_outcome", read_result(self._result_kind, payload, self._call_name))
        self._payload = None
        if self._state != FINISHED:
            self._drop_values()  # cancelled meanwhile: whoever drops last leaves nothing
        return outcome  # type: ignore[no-any-return]

    def _get_snapshot(self) -> tuple[bool, bool, Any, BaseException | None]:
        """As the standard library's: done, cancelled, result and exception at one moment. Newer asyncio asks for it."""
        if self._state not in _DONE:
            return False, False, None, None
        try:
            exception, value = self._read(0)
        except CancelledError:
            return True, True, None, None
        return True, False, value, exception

    # Cancelling

    def _begin_cancel(self, kind: CancelKind, answers: _Answers) -> _Ask | None:
        """Register a cancel request, of which `answers` are told. Return it, or None if the future is cancelled
        already."""
        owner = self._get_owner()
        if owner is not None and self._state not in _DONE:
            owner.check_process()
        with self._condition_lock:
            if self._state == FINISHED:
                # Whoever waited has been told that it is done, so nobody is told again.
                self._cancel_outcome = CancelOutcome.ALREADY_DONE
                self._state = CANCELLED_AND_NOTIFIED
                self._drop_values()
                return None
            if self._state in _DONE:
                return None
            if owner is not None:
                if self._ask is None:
                    self._ask = _Ask(kind)
                    self._cancel_outcome = None
                elif self._ask.kind < kind:
                    self._ask.kind = kind
                self._ask.waiting.append(answers)
                return self._ask
        self._settle(CANCELLED_AND_NOTIFIED, CancelOutcome.CANCELED)
        return None

    def _is_held_by_this_thread(self) -> bool:
        """Tell whether this thread is inside a method of this future: a signal handler or finalizer runs in one."""
        return self._condition._is_owned()  # type: ignore[attr-defined, no-any-return]


def make_future(owner: FutureOwner, task_no: int, call_name: str) -> ScalerFuture[Any]:
    """Return the future of a call. `call_name` is for error messages."""
    future: ScalerFuture[Any] = ScalerFuture()
    future._owner = owner
    future._task_no = task_no
    future._call_name = call_name
    return future


def cancel_all(
    futures: Iterable[Future[Any]],
    timeout: float | DefaultTimeout | None,
    *,
    force: bool,
    others: Iterable[tuple[FutureOwner, threading.Event]] = (),
) -> bool:
    """Cancel each as `ScalerFuture.cancel` does, with one message and one wait per executor.

    Args:
        futures: Of any executors.
        timeout: As `ScalerFuture.cancel`, for all together.
        force: As `ScalerFuture.cancel`.
        others: Requests that have been passed on, to be waited for as well.

    Returns:
        True.
    """
    kind = CancelKind.FORCED if force else CancelKind.SOFT
    answers = _Answers()
    asked = 0
    requests: dict[FutureOwner, list[tuple[int, CancelKind]]] = {}
    may_wait = True
    events = []
    for owner, event in others:
        requests.setdefault(owner, [])
        events.append(event)
    try:
        for future in futures:
            if not isinstance(future, ScalerFuture):
                future.cancel()
                continue
            ask = future._begin_cancel(kind, answers)
            if ask is not None:
                asked += 1
                cancels = requests.setdefault(future._owner, [])
                # Also if another thread has asked for the same and not come this far: it may have been interrupted.
                if ask.passed_on < kind:
                    cancels.append((future._task_no, kind))
                may_wait = may_wait and not future._is_held_by_this_thread()
    finally:
        # Also when the iterable failed: a request that was registered and not passed on would only drop a value.
        for owner, cancels in requests.items():
            if cancels:
                owner.ask_cancel(cancels)
    if (asked or events) and may_wait and all(owner.may_wait() for owner in requests):
        limits = [owner.cancel_timeout_s for owner in requests]
        waits: list[Callable[[float | None], object]] = [partial(answers.wait, asked)]
        waits += [event.wait for event in events]
        _wait_for(waits, timeout, min((limit for limit in limits if limit is not None), default=None))
    return True


def _wait_for(
    waits: Iterable[Callable[[float | None], object]], timeout: float | DefaultTimeout | None, default: float | None
) -> None:
    turn = None
    if isinstance(timeout, DefaultTimeout):
        timeout = default
        turn = _LoopTurn.current()
        if turn is not None:
            timeout = turn.left_s if timeout is None else min(turn.left_s, timeout)
    start = time.monotonic()
    try:
        for wait in waits:
            left = None if timeout is None else timeout - (time.monotonic() - start)
            if left is not None and left <= 0:
                return
            wait(left)
    finally:
        if turn is not None:
            turn.left_s -= time.monotonic() - start


class _LoopTurn:
    """How much longer cancels may hold an event loop in this turn of it."""

    _local = threading.local()

    def __init__(self, loop: Any) -> None:
        self._loop = weakref.ref(loop)
        self.left_s = LOOP_TURN_S

    @classmethod
    def current(cls) -> _LoopTurn | None:
        """Return this thread's turn, None if no event loop runs here."""
        events = sys.modules.get("asyncio.events")  # no asyncio, no loop
        loop = None if events is None else events._get_running_loop()
        if loop is None:
            return None
        turn: _LoopTurn | None = getattr(cls._local, "turn", None)
        if turn is None or turn._loop() is not loop:
            turn = cls._local.turn = cls(loop)
            loop.call_soon(cls._end)
        return turn

    @classmethod
    def _end(cls) -> None:
        cls._local.turn = None


# asyncio


def _is_asyncio_chain(fn: Any) -> bool:
    """Tell whether this is the callback by which `asyncio.wrap_future` copies the state."""
    return (
        getattr(fn, "__qualname__", None) == "_chain_future.<locals>._call_set_state"
        and fn.__module__ == "asyncio.futures"
    )


def _call_with_snapshot(
    fn: Callable[[Future[Any]], object], goes_on: Callable[[], object] | None, future: Future[Any]
) -> object:
    assert isinstance(future, ScalerFuture)
    if goes_on is not None:
        goes_on()
    return fn(_Snapshot(future))


class _Snapshot(Future[Any]):
    """A done future as asyncio is shown it: its answers fit each other, whatever is cancelled meanwhile.

    asyncio asks `cancelled()`, `exception()` and `result()` in turn, in the loop's thread. Were the future cancelled in
    between, `result()` would raise inside the loop and the awaiting coroutine would wait for ever. The first question
    freezes the answers; it is then that the result is unpickled.
    """

    def __init__(self, future: ScalerFuture[Any]) -> None:
        super().__init__()
        self._future = future

    def _freeze(self) -> None:
        with self._condition:
            if self._state != PENDING:
                return
            _, is_cancelled, self._result, self._exception = self._future._get_snapshot()
            self._state = CANCELLED_AND_NOTIFIED if is_cancelled else FINISHED

    def cancel(self, timeout: float | DefaultTimeout | None = DEFAULT_TIMEOUT, *, force: bool = True) -> bool:
        return self._future.cancel(timeout, force=force)

    def done(self) -> bool:
        return True

    def cancelled(self) -> bool:
        self._freeze()
        return super().cancelled()

    def result(self, timeout: float | None = None) -> Any:
        self._freeze()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._freeze()
        return super().exception(timeout)

    def _get_snapshot(self) -> tuple[bool, bool, Any, BaseException | None]:
        self._freeze()
        return True, self.cancelled(), self._result, self._exception
