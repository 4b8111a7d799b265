"""The client's part in the user's process: numbers the calls, carries them to the scheduler and settles their futures.

It knows sockets, threads and futures. What a message means it asks `protocol.client`; what a payload means only readers
of results know.

Two threads. The I/O thread speaks to the scheduler and settles futures; it runs no user code, so nothing a user does
can keep other calls from being answered. Futures that have done-callbacks are settled like others and then handed to
the callback thread, which calls them in that order and may be blocked by them as long as they like. Should what workers
inherited of `__main__` be lost, a third thread pickles it.

Callers add to `_batch` under `_lock`, a short lock that also keeps numbers, functions and their evictions in order. The
I/O thread takes the whole batch at once, so that batches form by themselves while it is busy, and callers ring its bell
only when it sleeps. Who rings is decided by `_asleep`: a list that the I/O thread makes anew before it looks at the
batch for the last time and goes to sleep. A caller that finds it not empty rings and then empties that very list, so
being late, or interrupted by Ctrl-C between the two, can only ring once too often.

A ring takes a switch of threads, as long as ten calls take to submit. So when calls come one right behind the other the
I/O thread only naps after it has sent some: `_wake_at` calls, a look at one's result or a millisecond end that.

A caller that has the only outstanding call writes it to the socket itself: one switch of threads less. The I/O thread
must learn of that call in any case, and exactly once, even if Ctrl-C hits anywhere in between; see `_Direct`.
"""

from __future__ import annotations

import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scaler_executor.defaults import DefaultTimeout
from scaler_executor.future import ScalerFuture, cancel_all, make_future
from scaler_executor.protocol.client import (
    Batch,
    Broken,
    Cancelled,
    CancelRefused,
    ClientState,
    CloseAsked,
    Closed,
    Deliver,
    Disinherited,
    Event,
    Finished,
    Instruction,
    Lost,
    Received,
    Renewed,
    Running,
    SchedulerLost,
    Send,
    Show,
    Stranded,
)
from scaler_executor.protocol.codec import Decoder, Encoder, RemoteProtocolError
from scaler_executor.protocol.machine import unreachable
from scaler_executor.protocol.messages import (
    CallStyle,
    CancelKind,
    Function,
    Hello,
    Options,
    OutputRow,
    Payload,
    TaskRow,
    TaskSubmit,
    ToClientMessage,
    Welcome,
)
from scaler_executor.protocol.printed import STDERR
from scaler_executor.runtime import exiting, log
from scaler_executor.runtime.calls import CallPickler
from scaler_executor.runtime.display import Display, read_output
from scaler_executor.runtime.ending import MANAGERS
from scaler_executor.runtime.functions import FunctionTable, PreparedFunction
from scaler_executor.runtime.interfaces import Cluster, Run
from scaler_executor.runtime.namespace import Definition, Needs
from scaler_executor.runtime.outbox import Outbox
from scaler_executor.runtime.outstanding import Outstanding, is_of_view
from scaler_executor.runtime.platform import FAULTS, Bell
from scaler_executor.runtime.refusals import (
    make_lost_error,
    make_start_error,
    refuse_after_shutdown,
    refuse_at_exit,
    refuse_child,
)
from scaler_executor.runtime.terms import NO_OPTIONS, Terms, TermsTable
from scaler_executor.runtime.transport import StreamReader

if TYPE_CHECKING:
    from scaler_executor.runtime.lender import Lender
    from scaler_executor.runtime.view import ClientView

#: A caller writes its call itself up to this size.
DIRECT_BYTES: Final = 1 << 14
#: So many calls at once, or one after so short a sleep, and the I/O thread naps: more are likely to come.
BURST_CALLS: Final = 8
BURST_S: Final = 0.0002
#: So many calls, or so many milliseconds, end a nap.
NAP_CALLS: Final = 100
NAP_MS: Final = 1
#: A scheduler that has closed its connection has so long to end by itself, so that its exit status can tell why; so
#: have, after a Ctrl-C, the workers whose calls are over.
END_S: Final = 1.0


class _Direct:
    """A call that its caller writes to the socket itself.

    `self.sent[:] = map(send, (packet,))` writes and notes how much was written within one bytecode: Python's signal
    handlers run between bytecodes, so a Ctrl-C leaves either both or neither.
    """

    __slots__ = ("packet", "row", "sent")

    def __init__(self, row: TaskRow, packet: bytes) -> None:
        self.row = row
        self.packet = packet
        self.sent: list[int] = []

    def is_sent(self) -> bool:
        return self.sent == [len(self.packet)]


class ClientFutureManager:
    """The client. Thread-safe.

    Args:
        cluster: Is started with the first call; the client waits for its end.
        cancel_timeout_s: How long `cancel()` waits by default, None for no limit.
        options: Of its calls, where a view has no others.
    """

    #: In a worker: by which its calls lend their slots while they wait, see `nested_client`.
    lender: Lender | None = None
    #: What it may be told.
    _hears: Any = ToClientMessage

    def __init__(self, cluster: Cluster, *, cancel_timeout_s: float | None, options: Options = NO_OPTIONS) -> None:
        self.cancel_timeout_s = cancel_timeout_s
        #: By which calls of this client tell its handles from those of others.
        self.token = cluster.token
        self._main = main = cluster.main
        self.pickler = pickler = CallPickler(main)
        self._dumps_small = pickler.dumps_small
        self._cluster = cluster
        #: Makes the exception with which new calls are refused; None while they are accepted. Changed under `_lock`.
        self._refusal: Callable[[], Exception] | None = None
        #: Whether workers can be started, and whether a thread is at it. Changed under `_start_lock`, for which the I/O
        #: thread never waits.
        self._is_started = False
        self._is_starting = False
        self._start_lock = threading.RLock()
        #: Reentrant, as is `_io_lock`: a signal handler or finalizer may submit while this thread is in here.
        self._lock = threading.RLock()
        self._functions = FunctionTable(pickler, main)
        self._find_call = self._functions.find_call
        self._terms_table = TermsTable()
        if cluster.cancel_grace_s is not None:
            options = msgspec.structs.replace(options, cancel_grace_s=cluster.cancel_grace_s)
        #: What holds for calls that come without a view.
        self.terms = self._terms_table.make(options)
        self._calls = self.terms.calls
        #: Ids that have not been forgotten. Under `_lock`.
        self._live_functions: set[int] = set()
        #: Under `_lock`.
        self._direct_encoder = Encoder()
        self._last_no = 0
        #: What the I/O thread has not taken yet. Under `_lock`.
        self._batch = Batch()
        #: See `_Direct`. Set under `_lock`, taken by the I/O thread under `_io_lock`.
        self._direct: _Direct | None = None
        #: {no: future}, {no: run}: everything that has no final answer. Added to under `_lock`, removed from by the I/O
        #: thread.
        self._outstanding = Outstanding()
        self._futures, self._runs = self._outstanding.futures, self._outstanding.runs
        self._close_asked = False
        self._is_exiting = False
        #: Whether the I/O thread has ended and the bell is gone. Under `_lock`.
        self._has_ended = False

        #: Held by whoever uses the socket, the encoders or `_state`.
        self._io_lock = threading.RLock()
        self._state = ClientState(may_lose_scheduler=cluster.may_be_renewed)
        self._outbox = Outbox(cluster.socket, counts=cluster.max_unsent_bytes is not None)
        self._decoder: Decoder[ToClientMessage] = Decoder(self._hears, self._take_segment)
        self._reader = StreamReader(cluster.socket)
        self._send = cluster.socket.send
        self._hello = Hello("client", python=sys.version.split()[0])
        self._outbox.queue(self._hello)
        #: Shows what calls print, once any does.
        self._display: Display | None = None
        #: Where unsent bytes are limited: whether callers wait, and for what. Changed by the I/O thread.
        self._is_full = False
        self._has_room = threading.Event()
        #: Whether the scheduler has said Welcome and waits for nothing that is still in `_outbox`.
        self._is_direct_possible = False
        self._is_welcome = False
        #: The state has said Bye, or knows that the scheduler is lost: it takes no more events.
        self._is_closed = False
        self._close_told = False
        #: How the cluster ended, once it has been joined.
        self._end_reason: str | None = None

        #: See the top of the file.
        self._asleep: list[bool] = []
        self._wake_at = 1
        self._bell = Bell.create()
        #: What the callback thread is to do: call a future's callbacks, say that it has come so far, end.
        self._callbacks: SimpleQueue[ScalerFuture[Any] | threading.Event | None] = SimpleQueue()
        #: {id: future} of those in there, until their callbacks have returned.
        self._calling: dict[int, ScalerFuture[Any]] = {}
        self._callback_thread: threading.Thread | None = None
        #: All calls are answered and leave is taken, or the scheduler is lost; then, that the processes are gone and
        #: the thread ends; then, that the callback thread ends. Not `Thread.join` alone: up to Python 3.12 one that a
        #: Ctrl-C interrupts lets the next one return at once.
        self._is_over = threading.Event()
        self._has_joined = threading.Event()
        self._has_called_back = threading.Event()
        #: The thread of `_replace_inherited`; whether that is left to whoever waits for the end; and for them: that
        #: this, or the end, has come.
        self._definitions_thread: threading.Thread | None = None
        #: What it has made: workers are sent that for good.
        self._replaced: tuple[Definition, ...] = ()
        self._has_errand = False
        self._may_join = threading.Event()
        self._owner: Any = None
        self._thread = threading.Thread(target=self._run, name="scaler-executor-client", daemon=True)
        # No Ctrl-C in between: whether the thread has started could not be told.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._thread.start()
            cluster.has_owner = True
            MANAGERS[id(self)] = self
        except BaseException:
            self._bell.close()
            if exiting.has_begun():
                raise refuse_at_exit() from None  # no thread can be started any more
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # Looked at only now: whoever ends all clients at exit saw this one, or had begun before.
        if exiting.has_begun():
            self.exit()

    def close_with(self, owner: object) -> None:
        """Close when `owner` is garbage."""
        self._owner = weakref.ref(owner, lambda _: self.close())

    @property
    def outstanding(self) -> int:
        """Number of calls and runs without a final answer."""
        return len(self._futures) + len(self._runs)

    # For callers, in any thread

    def check_process(self) -> None:
        """Raise RuntimeError in a forked child."""
        if self._refusal is refuse_child:
            raise refuse_child()

    def check_open(self) -> None:
        """Raise what a new call would raise."""
        if self._refusal is not None:
            raise self._refusal()

    def start(self) -> None:
        """Do what the first call needs. Raises what a new call would raise."""
        self.check_open()
        if self._is_started:
            return
        with self._start_lock:
            self.check_open()
            # A signal handler of this thread may submit while it is in here: its calls wait with the others.
            if not (self._is_starting or self._is_started):
                try:
                    self._is_starting = True
                    setup = self._cluster.start()
                    self.pickler.store = self._cluster.store
                    if setup is not None:
                        with self._lock:
                            self._functions.set_up(setup)
                    self._is_started = True
                finally:
                    self._is_starting = False
        if self._close_asked:
            self._ring()  # see `_tell_close`

    def submit(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        terms: Terms | None = None,
        *,
        may_wait: bool = True,
    ) -> ScalerFuture[Any]:
        """Pickle and queue a call. What does not pickle is set on the future.

        Small calls of functions that the scheduler knows go no further than this function: it is the busiest of all.

        Args:
            function: As the executor's `submit`.
            args: Likewise.
            kwargs: Likewise.
            terms: Of a view.
            may_wait: Whether to wait while too much is unsent.

        Raises:
            RuntimeError: Closed, broken, lost or forked.
        """
        if self._is_full and may_wait:
            self.await_room()
        known = self._find_call(function, self._calls if terms is None else terms.calls)
        payload = self._dumps_small((args, kwargs)) if known is not None else None
        if known is None or payload is None:
            return self._submit_any(function, args, kwargs, terms or self.terms)
        future: ScalerFuture[Any] = ScalerFuture()
        future._owner = self
        future._call_name = known.name
        direct: _Direct | None = None
        try:
            with self._lock:
                if self._refusal is not None:
                    raise self._refusal()
                is_known = known.is_known
                if is_known:
                    if terms is not None:
                        self.check_terms(terms)
                        future._terms = terms
                    no = self._last_no = self._last_no + 1
                    future._task_no = no
                    row = (no, 1, known.function_id, payload)
                    may_send = self._is_direct_possible and self._asleep and self._is_only(payload)
                    # First the future: an interrupt behind it leaves a future that nobody has, and not a call without
                    # one.
                    self._futures[no] = future
                    if may_send:
                        (packet,) = self._direct_encoder.pack(TaskSubmit([row]))
                        # In the same hold of the lock as the number: what is sent next has a higher one.
                        self._direct = direct = _Direct(row, packet)
                    else:
                        self._batch.tasks.append(row)
            if direct is not None:
                self._send_direct(direct)
            elif self._asleep and len(self._batch.tasks) >= self._wake_at:  # looked at after the call was added
                self._wake()
        finally:
            if direct is not None and not direct.is_sent():
                self._wake()
        return future if is_known else self._submit_any(function, args, kwargs, terms or self.terms)

    def _submit_any(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], terms: Terms
    ) -> ScalerFuture[Any]:
        """Submit what is not a small call of a function that is known already."""
        self.check_terms(terms)
        self.start()
        try:
            prepared = self._functions.prepare(function, CallStyle.CALL)
            names = set(prepared.names)
            call = (function, args, kwargs) if prepared.blob is None else (args, kwargs)
            payload = self.pickler.dumps_call(call, names)
            needs = self._main.needs(names)
        except Exception as error:
            return _failed_future(error)
        while True:
            with self._lock:
                if needs.generation == self._main.generation:
                    self.check_terms(terms)
                    function_id = self._register(prepared, needs, terms)
                    no = self._take_numbers(1)
                    future = make_future(self, no, terms.name or prepared.name)
                    if terms.parent is not None:
                        future._terms = terms
                    self._futures[no] = future
                    if type(payload) is not bytes:
                        self._outstanding.keep(no, payload)
                    self._batch.tasks.append((no, 1, function_id, payload))  # type: ignore[arg-type]
                    break
            needs = self._main.needs(names)  # what workers inherited was lost meanwhile
        if self._asleep:
            self._wake()
        return future

    def submit_run(
        self,
        prepared: PreparedFunction,
        needs: Needs,
        function_id: int,
        items: int,
        payload: Payload,
        run: Run,
        terms: Terms | None = None,
        *,
        may_wait: bool = True,
    ) -> int | None:
        """Queue a run and number it. Return the function's id, for the next run of the same map.

        Or queue nothing and return None: `needs` has to be asked for anew, since what workers inherited was lost.

        Args:
            prepared: The function, style MAP.
            needs: The definitions that it and its items need.
            function_id: What the last call returned for this function and these needs, 0 at first.
            items: Number of items in the payload.
            payload: From `CallPickler.dumps_run`.
            run: Is told what becomes of the items.
            terms: Of a view.
            may_wait: Whether to wait while too much is unsent.

        Raises:
            RuntimeError: Closed, broken, lost or forked.
        """
        if self._is_full and may_wait:
            self.await_room()
        with self._lock:
            if needs.generation != self._main.generation:
                return None
            run.terms = terms
            terms = terms or self.terms
            self.check_terms(terms)
            if function_id not in self._live_functions:
                function_id = self._register(prepared, needs, terms)
            no = run.task_no = self._take_numbers(items)
            self._runs[no] = run
            if type(payload) is not bytes:
                self._outstanding.keep(no, payload)
            self._batch.tasks.append((no, items, function_id, payload))  # type: ignore[arg-type]
        if self._asleep:
            self._wake()
        return function_id

    @property
    def is_full(self) -> bool:
        """Whether callers wait for room."""
        return self._is_full

    def await_room(self) -> None:
        """Wait until some of what was submitted has been sent, or there is no more to be sent."""
        if self.may_wait():
            self._has_room.wait()

    def prepare(self, function: Any) -> PreparedFunction:
        """Make a function ready for `submit_run`, the first of which `start` must precede; raises what does not
        pickle."""
        return self._functions.prepare(function, CallStyle.MAP)

    def needs(self, names: Iterable[str]) -> Needs:
        """Return the definitions that these globals of `__main__` need now."""
        return self._main.needs(names)

    def ask_cancel(self, cancels: list[tuple[int, CancelKind]]) -> None:
        """Pass cancel requests on, by task number. Never waits."""
        self.check_process()
        with self._lock:
            self._batch.cancels += cancels
        if self._asleep:
            self._wake()

    def hurry(self) -> None:
        """Send what was submitted, since somebody waits for it."""
        if self._wake_at <= 1 or not self._asleep or not self._batch.tasks:
            return
        is_held: list[bool] = []
        try:
            # Never waits for the lock: the caller may hold what the lock's owner wants. The nap ends soon in any case.
            is_held[:] = map(self._lock.acquire, (False,))  # within one bytecode, as in `_Direct`
            if is_held[0]:
                self._wake()
        finally:
            if is_held and is_held[0]:
                self._lock.release()

    def may_wait(self) -> bool:
        """Tell whether this thread may wait for an answer."""
        return not (
            self._is_exiting
            or threading.get_ident() == self._thread.ident
            or sys.is_finalizing()
            # A signal handler or finalizer that interrupted this thread in here: the answer could not come.
            or self._lock._is_owned()  # type: ignore[attr-defined]
            or self._io_lock._is_owned()  # type: ignore[attr-defined]
        )

    def call_back(self, future: ScalerFuture[Any]) -> None:
        """Have the future's callbacks called."""
        self._calling[id(future)] = future
        self._callbacks.put(future)

    def expect_callbacks(self) -> None:
        """Start the callback thread, if it is not there. In the thread of whoever adds a callback: at the interpreter's
        exit no thread can be started any more, and calls that were accepted before still end then."""
        if self._callback_thread is not None:
            return
        with self._lock:
            if self._callback_thread is None:
                # At its end, not at that of the I/O thread: the interpreter's exit waits for what is registered.
                thread = threading.Thread(
                    target=_run_callbacks,
                    args=(self._callbacks, self._calling, partial(_end_callbacks, id(self), self._has_called_back)),
                    name="scaler-executor-callbacks",
                    daemon=True,
                )
                thread.start()
                self._callback_thread = thread

    def take_back(self, tasks: list[int], kind: CancelKind = CancelKind.SOFT) -> None:
        """Cancel what has not started of these tasks, and what runs if FORCED, without waiting."""
        if tasks and self._refusal is not refuse_child:
            self.ask_cancel([(no, kind) for no in tasks])

    def take_back_all(self, max_workers: int, terms: Terms | None = None) -> None:
        """Cancel what has not started, without waiting; of a view with these terms, if given.

        ProcessPoolExecutor's first calls have started as soon as they are submitted; here the workers may be on their
        way still. So as long as nothing has started, the first `max_workers` calls count as running.
        """
        with self._lock:
            calls = sorted(self._futures)
            tasks = [*(calls if self._outstanding.has_begun else calls[max_workers:]), *self._runs]
            if terms is not None:
                futures, runs = self.get_outstanding(terms)
                own = {future._task_no for future in futures} | {run.task_no for run in runs}
                tasks = [no for no in tasks if no in own]
        self.take_back(tasks)

    def clear(self, timeout: float | DefaultTimeout | None) -> None:
        """Cancel everything by force, and wait for that as `ScalerFuture.cancel` does."""
        self.check_process()
        with self._lock:
            futures = list(self._futures.values())
            runs = list(self._runs.values())
        if runs:
            self.ask_cancel([(run.task_no, CancelKind.FORCED) for run in runs])
        cancel_all(futures, timeout, force=True, others=[(self, run.over) for run in runs])

    # For views

    def view(self, options: Options, name: str | None, owner: object) -> ClientView:
        """Return a view whose calls have these options. It keeps `owner`, this client's executor."""
        from scaler_executor.runtime.view import ClientView

        return ClientView(self, self.make_terms(options, name, self.terms), owner)

    def make_terms(self, options: Options, name: str | None, parent: Terms) -> Terms:
        """Return the terms of another view."""
        with self._lock:
            return self._terms_table.make(options, name, parent)

    def check_terms(self, terms: Terms) -> None:
        """Raise RuntimeError if a view takes no more calls."""
        if terms.are_closed:
            raise refuse_after_shutdown()

    def close_terms(self, terms: Terms) -> None:
        """Have a view take no more calls."""
        if self._refusal is not refuse_child:
            with self._lock:
                terms.is_closed = True

    def get_outstanding(self, terms: Terms) -> tuple[list[ScalerFuture[Any]], list[Run]]:
        """Return the calls of a view, and of the views of it, that have no final answer."""
        with self._lock:
            return self._outstanding.of_view(terms)

    def join_view(self, terms: Terms) -> None:
        """Wait until the calls of a view are over, callbacks included, but not for the thread that asks."""
        current = threading.current_thread()
        if current is self._thread:
            return
        with self._io_lock:  # the I/O thread is not just settling what it has taken from there
            futures, runs = self.get_outstanding(terms)
        wait(futures)
        for run in runs:
            run.over.wait()
        with self._io_lock:
            calling = list(self._calling.values())
        if self._callback_thread is current or not any(is_of_view(future, terms) for future in calling):
            return
        with self._lock:
            # Behind the end of the queue nothing is looked at.
            passed = self._has_called_back if self._has_ended else threading.Event()
            if not self._has_ended:
                self._callbacks.put(passed)
        passed.wait()

    @property
    def is_closing(self) -> bool:
        """Whether new calls are refused for good."""
        return self._close_asked

    @property
    def is_abandoned(self) -> bool:
        """Whether this process is a fork of the client's."""
        return self._refusal is refuse_child

    def close(self) -> None:
        """Accept no more calls; when the last one is answered everything ends. Never waits."""
        with self._lock:
            if self._refusal is refuse_child:
                return
            if self._refusal is None:
                self._refusal = refuse_after_shutdown
            self._close_asked = True
        self._ring()

    def join(self) -> None:
        """Wait until everything has ended, callbacks included, but not for the thread that asks."""
        if self._refusal is refuse_child:
            return  # the threads are the parent's
        if self._is_starting and self._start_lock._is_owned():  # type: ignore[attr-defined]
            return  # a signal handler in the middle of the first call: nothing ends before it returns
        current = threading.current_thread()
        if self._thread is not current:
            self._may_join.wait()
            if self._has_errand:
                self._has_errand = False
                self._replace_inherited()
            self._has_joined.wait()
            self._thread.join()
            if self._definitions_thread not in (None, current):
                self._definitions_thread.join()
        # Looked at only now: the first callback may have come while we waited.
        if self._callback_thread is not None and self._callback_thread is not current:
            self._has_called_back.wait()
            self._callback_thread.join()

    def join_soon(self) -> None:
        """Wait as `join` does, but kill the workers that do not end when all calls are over: those that are still in
        their initializer, or wait for threads that a call has left."""
        if self._refusal is not refuse_child and self._thread is not threading.current_thread():
            self._is_over.wait()
            if not self._has_joined.wait(END_S):
                self._cluster.kill()
        self.join()

    def kill(self) -> None:
        """Kill the cluster: what is outstanding is lost at once."""
        self._cluster.kill()

    def kill_workers(self) -> None:
        """Close and kill the cluster. Calls that run end with WorkerDiedError, the others are cancelled."""
        if self._refusal is not refuse_child:
            self._outstanding.is_killed = True
            self.close()
            self._cluster.kill()

    def exit(self) -> None:
        """Close for the interpreter's exit: from now on nobody waits for a cancel."""
        with self._lock:
            self._is_exiting = True
            if self._refusal is None:
                self._refusal = refuse_at_exit
        self.close()

    def abandon(self) -> None:
        """Make this copy, in a forked child, refuse everything; what it shares with the parent is left alone."""
        self._refusal = refuse_child
        # A thread of the parent may have held them, and here nobody would let go of them.
        self._lock = threading.RLock()
        self._start_lock = threading.RLock()
        self._io_lock = threading.RLock()
        for close in (self._cluster.close, self._bell.close):
            try:
                close()
            except OSError:
                pass  # the fork came while the parent was closing them

    def _is_only(self, payload: bytes) -> bool:
        """Tell whether a call is the only outstanding one and may be sent by its caller. Under `_lock`."""
        return not self._futures and not self._runs and self._direct is None and len(payload) <= DIRECT_BYTES

    def _send_direct(self, direct: _Direct) -> None:
        """Send a call in the caller's thread, unless the I/O thread was quicker."""
        try:
            with self._io_lock:
                if self._direct is direct:
                    direct.sent[:] = map(self._send, (direct.packet,))
        except OSError:
            pass  # the socket is full, or the scheduler gone: the I/O thread goes on from here

    def _register(self, prepared: PreparedFunction, needs: Needs, terms: Terms) -> int:
        """Return the function's id; queue what is new. Under `_lock`, until the call is queued."""
        function_id, messages, forgotten = self._functions.register(prepared, needs, terms)
        if messages:
            self._batch.functions += messages
            self._live_functions.add(function_id)
        if forgotten:
            self._batch.forget += forgotten
            self._live_functions.difference_update(forgotten)
            self._outstanding.keep_for_all(self._functions.take_retired())
        return function_id

    def _take_numbers(self, count: int) -> int:
        """Return the first of `count` new numbers. Under `_lock`."""
        if self._refusal is not None:
            raise self._refusal()
        no = self._last_no + 1
        self._last_no += count
        return no

    def _wake(self) -> None:
        asleep = self._asleep
        self._ring()
        asleep.clear()

    def _ring(self) -> None:
        with self._lock:
            if not self._has_ended:
                self._bell.ring()

    # The I/O thread

    def _run(self) -> None:
        # Signals are for the user's threads: one that comes while the process is stopped (Ctrl-Z) would be taken by
        # whichever thread runs first, and a main thread that waits would never learn of it.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - FAULTS)
        try:
            self._loop()
        except BaseException as error:
            # A bug of ours: be loud about it, but leave nobody waiting for ever.
            self._cluster.kill()
            reason = f"the client's I/O thread failed: {error!r}"
            self._refuse(lambda: make_lost_error(reason))
            self._outstanding.lose([*self._futures, *self._runs], reason)
            raise
        finally:
            self._is_over.set()
            self._is_full = False
            self._has_room.set()
            if self._end_reason is None:
                self._end_reason = self._cluster.join()
            if self._display is not None:
                self._display.close()
            with self._lock:
                self._callbacks.put(None)
                self._has_ended = True
                self._bell.close()
                if self._callback_thread is None:
                    MANAGERS.pop(id(self), None)
            self._has_joined.set()
            self._may_join.set()

    def _loop(self) -> None:
        poll = select.poll()
        socket_fd = self._cluster.socket.fileno()
        poll.register(self._bell.fileno(), select.POLLIN)
        poll.register(self._cluster.death_fd, select.POLLIN)
        poll.register(socket_fd, select.POLLIN)
        wanted = select.POLLIN
        slept_at = time.monotonic()
        while True:
            with self._io_lock:
                calls = self._take_up()
                naps = calls >= BURST_CALLS or (calls > 0 and time.monotonic() - slept_at < BURST_S)
                self._outbox.flush()
                has_unsent = self._outbox.has_unsent
                if self._cluster.max_unsent_bytes is not None:
                    self._note_room(self._cluster.max_unsent_bytes)
                self._is_direct_possible = self._is_welcome and not has_unsent
                if self._is_closed and not has_unsent:
                    return
                # First say that we sleep, then look once more: a caller adds first and then looks whether we sleep.
                self._wake_at = NAP_CALLS if naps else 1
                asleep = self._asleep = [True]
                batch = self._batch
                is_wanted = (
                    len(batch.tasks) >= self._wake_at
                    or batch.cancels
                    or batch.definitions is not None
                    or self._direct is not None
                )
                timeout = 0 if is_wanted else NAP_MS if naps else None
            if has_unsent != bool(wanted & select.POLLOUT):
                wanted ^= select.POLLOUT
                poll.modify(socket_fd, wanted)
            slept_at = time.monotonic()
            events = dict(poll.poll(timeout))
            asleep.clear()
            with self._io_lock:
                if self._bell.fileno() in events:
                    self._bell.clear()
                if socket_fd in events or self._cluster.death_fd in events:
                    self._take_up_direct()
                    self._receive(is_dead=self._cluster.death_fd in events)

    def _note_room(self, max_bytes: int) -> None:
        """Have callers wait while much could not be sent."""
        unsent_bytes = self._outbox.unsent_bytes
        if not self._is_full and unsent_bytes > max_bytes and self._refusal is None:
            self._has_room.clear()
            self._is_full = True
        elif self._is_full and (unsent_bytes < max_bytes // 2 or self._refusal is not None):
            self._is_full = False
            self._has_room.set()

    def _take_up(self) -> int:
        """Feed what callers asked for into the state. Return the number of calls."""
        self._take_up_direct()
        batch = self._batch
        calls = len(batch.tasks)
        if batch.tasks or batch.cancels or batch.functions or batch.forget or batch.definitions is not None:
            with self._lock:
                batch = self._batch
                self._batch = Batch()
            for no, kind in batch.cancels:
                future = self._futures.get(no)
                if future is not None:
                    future.set_cancel_passed_on(kind)
            if not self._is_closed:
                self._handle(batch)
        if self._close_asked and not self._close_told:
            with self._lock:
                # Calls were refused before this was set, so none can be in a later batch.
                self._close_told = not self._batch.tasks and self._direct is None
            if self._close_told:
                self._tell_close()
        return calls

    def _tell_close(self) -> None:
        """Begin to take leave. A cluster that was never started needs none."""
        if not self._start_lock.acquire(blocking=False):
            self._close_told = False  # a first call is just being made; it rings when that is done
            return
        try:
            was_started = self._is_started  # and stays so: calls are refused
        finally:
            self._start_lock.release()
        if was_started:
            self._handle(CloseAsked())
        else:
            self._outbox.drop()
            self._is_closed = True

    def _take_up_direct(self) -> None:
        direct = self._direct
        if direct is None:
            return
        self._direct = None
        instructions = self._state.handle(Batch([direct.row]), time.monotonic())
        if direct.sent:
            # The state knows the call now; the bytes that it wants sent are on their way, or a part of them is.
            instructions = [instruction for instruction in instructions if not isinstance(instruction, Send)]
            if not direct.is_sent():
                self._outbox.write_rest(direct.packet, direct.sent[0])
        self._perform(instructions)

    def _receive(self, *, is_dead: bool) -> None:
        """Read what has come; all of it if the scheduler is dead."""
        try:
            while True:
                packets = self._reader.read()
                for header, frames in packets:
                    message = self._decoder.decode(header, frames)
                    self._handle(Received(message))
                    self._is_welcome = self._is_welcome or isinstance(message, Welcome)
                if self._reader.eof or not is_dead or not packets:
                    break
        except RemoteProtocolError as error:
            self._cluster.kill()
            self._lose(f"the scheduler broke the protocol: {error}")
            return
        if self._reader.eof or is_dead:
            self._lose(self._wait_for_end())

    def _wait_for_end(self) -> str:
        """Wait until a cluster without scheduler is gone; return how it ended."""
        poll = select.poll()
        poll.register(self._cluster.death_fd, select.POLLIN)
        if not poll.poll(END_S * 1000):
            self._cluster.kill()
        self._end_reason = self._cluster.join()
        return self._end_reason

    def _lose(self, reason: str) -> None:
        """End everything that is outstanding, unless we have said Bye: then this is the end that we wait for."""
        self._outbox.drop()
        if not self._is_closed:
            self._refuse(lambda: make_lost_error(reason))
            self._close_asked = True
            self._take_up()
            self._handle(SchedulerLost(reason))
            self._handle(CloseAsked())
            self._outbox.drop()

    def _refuse(self, make_error: Callable[[], Exception]) -> None:
        with self._lock:
            if self._refusal is None:
                self._refusal = make_error

    def _handle(self, event: Event) -> None:
        self._perform(self._state.handle(event, time.monotonic()))

    def _perform(self, instructions: Iterable[Instruction]) -> None:
        display = self._display
        for instruction in instructions:
            if isinstance(instruction, Deliver):
                if display is not None:
                    display.wait_for(row[0] for row in instruction.results)
                self._outstanding.deliver(instruction.results)
            elif isinstance(instruction, Send):
                self._outbox.queue(instruction.message)
            elif isinstance(instruction, Finished):
                self._outstanding.finish(instruction.tasks)
            elif isinstance(instruction, Cancelled):
                if display is not None:
                    display.wait_for(row[0] for row in instruction.items)
                self._outstanding.cancel(instruction.items)
            elif isinstance(instruction, CancelRefused):
                self._outstanding.refuse(instruction.tasks)
            elif isinstance(instruction, Running):
                self._outstanding.run(instruction.tasks)
            elif isinstance(instruction, Lost):
                self._outstanding.lose(instruction.tasks, instruction.reason)
            elif isinstance(instruction, Show):
                self._on_printed(instruction.rows)
            elif isinstance(instruction, Renewed):
                self._on_renewed()
            elif isinstance(instruction, Broken):
                self._on_broken(instruction.reason)
            elif isinstance(instruction, Disinherited):
                self._on_disinherited(instruction.reason)
            elif isinstance(instruction, Closed):
                self._is_closed = True
            else:
                unreachable(instruction)

    def _take_segment(self, writer: int, number: int, size_bytes: int) -> Any:
        """Map a result that stands in a file."""
        store = self._cluster.store
        if store is None:
            raise RemoteProtocolError("a result in a file, which this client cannot have")
        return store.take_mapped(writer, number, size_bytes)

    def _on_printed(self, rows: list[OutputRow]) -> None:
        """Keep what calls have printed, and show what is not shown elsewhere."""
        shown = self._cluster.shown_streams
        for no, stream, lost, data in rows:
            record, text = read_output(stream, data)
            name = self._outstanding.keep_output(no, lost, text)
            # Records come to where the standard error stream is shown, or nowhere.
            if (STDERR if record is not None else stream) in shown:
                if self._display is None:
                    self._display = Display()
                self._display.add(no, stream, lost, text, record, name)

    def _on_renewed(self) -> None:
        """Begin anew with a scheduler that knows no function."""
        with self._lock:
            batch, self._batch = self._batch, Batch()
            self._functions.forget_all()
            self._live_functions.clear()
        self._outbox.forget()
        self._outbox.queue(self._hello)
        self._is_welcome = False
        self._handle(Stranded(batch))

    def _on_broken(self, reason: str) -> None:
        self._refuse(lambda: make_start_error(reason))

    def _on_disinherited(self, reason: str) -> None:
        with self._lock:
            # In one hold of the lock: what was queued before has been noted, what is queued later is sent.
            self._main.forget_inherited()
            forgotten = self._functions.forget_main()
            self._batch.forget += forgotten
            self._live_functions.difference_update(forgotten)
            self._outstanding.keep_for_all(self._functions.take_retired())
        log.warn("client", "%s; functions and classes of __main__ are sent from now on", reason)
        # In a thread of its own, since pickling runs user code; the callback thread may be blocked by a callback that
        # waits for the very calls that wait for this.
        thread = threading.Thread(target=self._replace_inherited, name="scaler-executor-definitions", daemon=True)
        try:
            thread.start()
            self._definitions_thread = thread
        except RuntimeError:
            if exiting.has_begun():
                self._has_errand = True  # no thread can be started any more
                self._may_join.set()
            else:
                self._answer_disinherited(())  # no thread can be had: calls that need definitions say so

    def _replace_inherited(self) -> None:
        """Pickle what calls counted on so far and workers inherit no more. Not in the I/O thread."""
        definitions: tuple[Definition, ...] = ()
        try:
            definitions = self._main.counted_on()
        finally:
            self._answer_disinherited(definitions)  # in any case: no worker is started before

    def _answer_disinherited(self, definitions: tuple[Definition, ...]) -> None:
        style = int(CallStyle.DEFINITION)
        with self._lock:
            self._replaced = definitions
            self._batch.definitions = [
                Function(0, definition.name, definition.payload, style, version=definition.version)  # type: ignore[arg-type]
                for definition in definitions
            ]
        self._wake()


def _failed_future(error: Exception) -> ScalerFuture[Any]:
    future: ScalerFuture[Any] = ScalerFuture()
    future.set_exception(error)
    return future


def _run_callbacks(
    queue: SimpleQueue[ScalerFuture[Any] | threading.Event | None],
    calling: dict[int, ScalerFuture[Any]],
    at_end: Callable[[], object],
) -> None:
    """The callback thread, until it gets None."""
    while True:
        item = queue.get()
        if item is None:
            at_end()
            return
        if isinstance(item, threading.Event):
            item.set()
        else:
            item.invoke_callbacks()
            calling.pop(id(item), None)
        del item  # or a future would live until the next one comes


def _end_callbacks(manager_id: int, ended: threading.Event) -> None:
    MANAGERS.pop(manager_id, None)
    ended.set()
