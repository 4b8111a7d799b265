"""A worker: reads calls from its socket, makes them in its main thread, writes each result into its pipe.

This module knows the page, the records and how a call is made. It does not know who waits for the result. It runs in a
child of the forker and never returns.

Order is everything here. A call is claimed in the page before the worker looks whether it is still allowed, and its
result is in the pipe before the page says that it is done (see `protocol.page`). A call may be interrupted only while
the worker is *armed*: from before the claim until the user's function has returned. What interrupts it later finds
nothing armed and has no effect, for the result is on its way.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import sys
import traceback
from time import perf_counter
from types import FrameType
from typing import Any, Final, NoReturn

from scaler_executor.errors import ResultTooLargeError, TaskInterrupted
from scaler_executor.protocol.codec import FRAME_LENGTH, INLINE_BYTES, Decoder
from scaler_executor.protocol.messages import CallStyle, DeathReport, Frames, Function, Payload, WorkerRun
from scaler_executor.protocol.page import (
    CURRENT,
    DONE,
    FLOATS,
    HEADER_WORDS,
    HEARD,
    INTEGERS,
    INTERRUPT,
    ITEM,
    PENDING,
    RANG,
    RANGE_BYTES,
    RANGE_FIRST,
    RANGE_SEQ,
    RECORD,
    RECORD_BATCH_END,
    RECORD_ERROR,
    RECORD_READY,
    RECORD_SKIPPED,
    RECORD_START_FAILED,
    RECORD_UNWOUND,
    RECORD_VALUE,
    RECORD_VALUES,
    RING_SLOTS,
    STOP,
)
from scaler_executor.protocol.segment import SEGMENT_MARK, Segment, pack_frame
from scaler_executor.runtime.calls import (
    BULK_TYPES,
    PLAIN_TYPES,
    CallPickler,
    RunForm,
    dumps_exception,
    load_inline_call,
    load_item,
    load_run,
    loads_value,
)
from scaler_executor.runtime.identity import run_as_process
from scaler_executor.runtime.last_words import LastWords
from scaler_executor.runtime.namespace_worker import WorkerMain
from scaler_executor.runtime.nesting_site import NestingSite, set_site
from scaler_executor.runtime.platform import Bell, flush_c_streams, range_buffer
from scaler_executor.runtime.segments import SegmentStore
from scaler_executor.runtime.standard_streams import StandardStreams
from scaler_executor.runtime.transport import StreamReader
from scaler_executor.runtime.worker_config import NUDGE, Setup, WorkerConfig, take_over_process
from scaler_executor.runtime.worker_output import WorkerOutput, pass_on_logs, set_log_levels

#: The bell rings for results that are older than this, though the calls behind them are not over.
RING_INTERVAL_S: Final = 0.005
#: Larger values are not collected: they are worth a system call each.
MAX_RANGE_VALUE_BYTES: Final = 4096
#: More of an initializer's traceback than this helps nobody.
MAX_START_ERROR_BYTES: Final = 1 << 15
#: Exit code of a worker that cannot go on because a call has closed its descriptors: EX_IOERR.
EXIT_CLOSED: Final = 74

_dumps = pickle.dumps
_loads = pickle.loads
_pack = RECORD.pack


def worker_main(
    call_socket: socket.socket, pipe_fd: int, page: memoryview, page_fd: int, bell: Bell, config: WorkerConfig
) -> NoReturn:
    """Run calls until the socket ends. The process is over then."""
    worker = Worker(call_socket, pipe_fd, page, page_fd, bell, config)

    def serve() -> None:
        worker.start()
        worker.run()

    code = run_as_process(config.identity, serve)
    _flush_streams()
    if config.identity.start_method != "fork":
        flush_c_streams()
    os._exit(code)


class Worker:
    """The state of the process. Everything but the signal handler runs in the order in which it is written."""

    def __init__(
        self,
        call_socket: socket.socket,
        pipe_fd: int,
        page: memoryview,
        page_fd: int,
        bell: Bell,
        config: WorkerConfig,
    ) -> None:
        self._socket = call_socket
        self._pipe_fd = pipe_fd
        self._page = page
        self._page_fd = page_fd
        self._range_buffer = range_buffer(page)
        #: {type: (the range buffer as words of it, how it begins then)}
        self._words: dict[type, tuple[Any, bytes]] = {}
        if sys.byteorder == "little":
            self._words[int] = self._range_buffer.cast("q"), INTEGERS
            self._words[float] = self._range_buffer.cast("d"), FLOATS
        self._last_words = LastWords(page)
        self._output = WorkerOutput(page, bell.ring, self._last_words)
        self._bell = bell
        self._config = config
        self._main = WorkerMain(config.inherited_main)
        path = config.segments_path
        self._store = SegmentStore(path, config.worker_id) if path is not None else None
        self._pickler = CallPickler(self._main, copy_buffers=False, store=self._store, too_large=ResultTooLargeError)
        #: The call that may be interrupted now, or 0. Cleared by the handler when it raises, so that it raises once.
        self._armed = 0
        #: Set by the handler: the worker ends after this call.
        self._was_interrupted = False
        #: The client's own wishes have been fulfilled, see `Setup`.
        self._is_set_up = False
        #: A call forked and this is the child: it ends instead of returning into the loop.
        self._is_fork = False
        #: Functions as they arrived, by id; unpickled when first called, as part of that call.
        self._functions: dict[int, Function] = {}
        #: Functions that have been unpickled, by id; None for those that each call brings along.
        self._loaded: dict[int, Any] = {0: None}
        #: Ids of those whose payloads are runs.
        self._map_ids: set[int] = set()
        start_method = config.identity.start_method
        self._site = NestingSite(
            call_socket, page, bell, self._main, self._store, self._functions, config.token, start_method
        )
        set_site(self._site)
        #: Of the message being served: when it began, the items run so far, whether its BATCH_END is written.
        self._began_at = 0.0
        self._items_run = 0
        self._batch_ended = False
        #: When results were last announced, or work began after a pause.
        self._rang_at = 0.0
        self._streams = StandardStreams()

    def start(self) -> None:
        """Become a process fit for user code and run the initializer."""
        config = self._config
        signal.signal(signal.SIGINT, self._on_interrupt)
        signal.signal(NUDGE, _on_nudge)
        os.register_at_fork(after_in_child=self._after_fork)
        os.set_blocking(self._pipe_fd, False)
        self._socket.setblocking(True)
        self._last_words.copy_stderr()
        self._last_words.handle_faults(self._page_fd)  # the user's own handlers come after it
        self._output.take_over(config.taken_streams)
        try:
            if config.passes_on_logs:
                pass_on_logs(self._output)
                set_log_levels(config.log_levels)
            take_over_process(config)
            self._prepare(config.definitions, config.initializer_pickle)
        except BaseException as error:
            self._exit_if_fork(error)
            self._fail_to_start(error)
        self._run_initializer()
        self._exit_if_fork(None)
        _flush_streams()
        self._write(_pack(0, 0, 0, 0, RECORD_READY))
        self._ring()

    def _prepare(self, definitions: list[tuple[str, int, list[bytes]]], initializer_pickle: bytes | None) -> None:
        """Unpickle the initializer, where it is not inherited."""
        for name, version, buffers in definitions:
            self._main.put(name, version, Frames(buffers))
        if initializer_pickle is not None:
            self._main.apply()
            self._config.initializer, self._config.initargs = _loads(initializer_pickle)

    def _run_initializer(self) -> None:
        config = self._config
        if config.initializer is not None:
            try:
                config.initializer(*config.initargs)
            except BaseException as error:
                self._exit_if_fork(error)
                said = self._last_words.text()
                _log_failed_initializer()
                self._fail_to_start(error, "the initializer failed:\n", said)

    def _set_up(self, payload: Payload) -> None:
        """Make ready for a client that has not started this process: what it wants done once, before its first call."""
        if self._is_set_up:
            return  # it has been forgotten by the agent, and sent again
        self._is_set_up = True
        try:
            setup: Setup = loads_value(payload)
            self._site.setup, self._site.token = payload, setup["token"]
            sys.path += [entry for entry in setup["sys_path"] if entry not in sys.path]
            sys.argv[:] = setup["argv"]
            set_log_levels(setup["log_levels"])
            self._prepare(setup["definitions"], setup["initializer_pickle"])
        except BaseException as error:
            self._exit_if_fork(error)
            self._fail_to_start(error)
        self._run_initializer()
        self._exit_if_fork(None)

    def _fail_to_start(self, error: BaseException, what: str = "", said: str = "") -> NoReturn:
        """Say why there will be no calls: `what` it was, and what has been said before; and end."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        if said:
            text += DeathReport("", stderr=said).last_words
        body = what.encode() + text.encode("utf-8", "replace")[-MAX_START_ERROR_BYTES:]
        self._write(_pack(len(body), 0, 0, 0, RECORD_START_FAILED) + body)
        self._ring()
        _abandon_children()
        _exit(1)

    def run(self) -> None:
        """Serve messages until the socket ends or a call was interrupted."""
        self._streams.keep()
        try:
            self._run()
        except OSError as error:
            # Not of a call: those are caught. It has closed descriptors that are the worker's own, whatever their
            # numbers, and so costs itself if it had not been over.
            self._last_words.add(f"(its result cannot be sent: it has closed what is its worker's: {error})".encode())
            _abandon_children()
            _exit(EXIT_CLOSED)

    def _run(self) -> None:
        reader = StreamReader(self._socket)
        decode = Decoder[WorkerRun](WorkerRun, self._store.refer if self._store is not None else None).decode
        on_interrupt = self._on_interrupt
        while not reader.eof:
            packets = reader.read()
            while packets:
                self._serve(decode(*packets.pop(0)))  # no name here keeps a message alive while the next is awaited
                self._ring()
                if self._was_interrupted:
                    _abandon_children()
                    _exit()
                if signal.getsignal(signal.SIGINT) != on_interrupt:
                    signal.signal(signal.SIGINT, on_interrupt)  # a call installed its own
                self._streams.restore()

    def _serve(self, message: WorkerRun) -> None:
        """Make the calls of one message."""
        self._began_at = self._rang_at = perf_counter()
        self._items_run = 0
        self._batch_ended = False
        map_ids = self._map_ids
        for function in message.functions:
            if function.style == CallStyle.DEFINITION:
                self._main.put(function.name, function.version, function.blob)  # type: ignore[arg-type]
                continue
            if function.style == CallStyle.SETUP:
                self._set_up(function.blob)  # type: ignore[arg-type]
                continue
            self._functions[function.function_id] = function
            if function.style == CallStyle.MAP:
                map_ids.add(function.function_id)
            elif function.style == CallStyle.INLINE:
                self._loaded[function.function_id] = None
        left = len(message.calls)
        if left:
            self._site.function_id = message.calls[0][3]
        for seq, items, skip, function_id, payload in message.calls:
            left -= 1
            if function_id in map_ids or items > 1:
                self._make_run(seq, items, skip, function_id, payload, not left)  # type: ignore[arg-type]
            else:
                self._make_call(seq, function_id, payload, not left)  # type: ignore[arg-type]
            if self._was_interrupted:
                return
        if not self._batch_ended:
            self._write(self._batch_end())
        for function_id in message.forget:
            self._functions.pop(function_id, None)
            self._loaded.pop(function_id, None)
            map_ids.discard(function_id)

    def _make_call(self, seq: int, function_id: int, payload: Payload, is_last: bool) -> None:
        """Make one call, from its claim to DONE."""
        page = self._page
        kind = RECORD_VALUE
        value: Any = None
        error: BaseException | None = None
        pending = self._main.pending
        try:
            try:
                self._armed = seq
                page[CURRENT] = seq
                if page[HEADER_WORDS + seq % RING_SLOTS] != seq:
                    kind = RECORD_SKIPPED
                else:
                    if pending:
                        self._main.apply()
                    function = self._loaded.get(function_id, self)
                    if function is self:
                        function = self._load_function(function_id)
                    if function is None:
                        function, args, kwargs = load_inline_call(payload)
                    else:
                        args, kwargs = _loads(payload) if type(payload) is bytes else loads_value(payload)
                    value = function(*args, **kwargs)
                self._armed = 0
            except BaseException as raised:
                self._armed = 0
                error = raised
        except TaskInterrupted as raised:
            error = raised  # it came between the end of the call and the disarming
        if self._site.client is not None:
            self._flush_nested()
        self._report(seq, 0, kind, value, error, is_last)
        error = None  # its traceback refers to this frame
        page[DONE] = seq

    def _make_run(self, seq: int, items: int, skip: int, function_id: int, payload: Payload, is_last: bool) -> None:
        """Make the calls of a run, from its claim to DONE."""
        page = self._page
        page[ITEM] = 0
        page[STOP] = items
        function, form, arguments = self._open_run(seq, function_id, payload, skip + items)
        if function is None:
            if not self._was_interrupted:
                self._report(seq, 0, RECORD_SKIPPED, None, None, is_last)
            page[DONE] = seq
            return
        buffer = self._range_buffer
        is_single, is_plain = form == RunForm.PLAIN_SINGLE, form == RunForm.PLAIN
        #: Items and bytes in the range buffer.
        count = used = 0
        #: The type of the values that stand there as words; None: pickles. Once a value is not of this type, the rest
        #: of the run is pickled: to change between the two takes a system call each time.
        word_type: Any = None
        words: Any = None
        head = b""
        error: BaseException | None = None
        item = 0
        for item in range(items):
            value: Any = None
            try:
                try:
                    self._armed = seq
                    page[ITEM] = item
                    if item >= page[STOP]:
                        self._armed = 0
                        break
                    if page[INTERRUPT] == seq:
                        # The signal came between two items and found nothing armed.
                        self._was_interrupted = True
                        raise TaskInterrupted
                    if is_single:
                        value = function(arguments[skip + item])
                    elif is_plain:
                        value = function(*arguments[skip + item])
                    else:
                        value = function(*load_item(arguments[skip + item]))
                    self._armed = 0
                except BaseException as raised:
                    self._armed = 0
                    error = raised
            except TaskInterrupted as raised:
                error = raised
            if self._is_fork:
                self._exit_if_fork(error)
            if not item and error is None and type(value) in self._words:
                word_type = type(value)
                words, head = self._words[word_type]
            size = 0
            if error is None and type(value) is word_type:
                if used == RANGE_BYTES:
                    self._write_range(seq, count, used)
                    count = used = 0
                if not count:
                    page[RANGE_SEQ] = seq
                    page[RANGE_FIRST] = item
                    buffer[: len(head)] = head
                    used = len(head)
                try:
                    words[used >> 3] = value
                    size = 8
                except ValueError:
                    pass  # more than 64 bits
            if not size:
                body = self._dumps_small(value) if error is None else None
                if word_type is not None or body is None or used + len(body) > RANGE_BYTES:
                    word_type = None
                    if count:
                        self._write_range(seq, count, used)
                    count = used = 0
                if body is None:
                    self._report(seq, item, RECORD_VALUE, value, error, is_last and item + 1 >= page[STOP])
                else:
                    if not count:
                        page[RANGE_SEQ] = seq
                        page[RANGE_FIRST] = item
                    size = len(body)
                    buffer[used : used + size] = body
            if size:
                used += size
                count += 1
                if item + 1 == items:
                    self._output.hand_down()
                page[PENDING] = count << 32 | used
                if perf_counter() - self._rang_at > RING_INTERVAL_S:
                    self._write_range(seq, count, used)
                    count = used = 0
                    self._ring()
            if self._was_interrupted:
                break
            error = None
        if self._site.client is not None:
            self._flush_nested()
        if count:
            self._write_range(seq, count, used, ends_batch=is_last and not self._was_interrupted)
        if self._was_interrupted and error is None and item + 1 < page[STOP]:
            # The item swallowed the interrupt and has its value; the run ends here all the same.
            self._write_unwound(seq, item + 1)
        error = None
        page[DONE] = seq
        page[ITEM] = 0  # a single call has no items: what the page says of it must not be what it said of the run

    def _dumps_small(self, value: Any) -> bytes | None:
        """Return the pickle of a value if it may stand in the range buffer, None of others."""
        body: bytes | None
        try:
            body = _dumps(value, 5) if type(value) in PLAIN_TYPES else self._pickler.dumps_small(value)
        except BaseException:
            return None  # `_report` tries again and says what is wrong
        return body if body is not None and len(body) <= MAX_RANGE_VALUE_BYTES else None

    def _write_range(self, seq: int, count: int, used: int, *, ends_batch: bool = False) -> None:
        """Write what stands in the range buffer into the pipe."""
        self._output.hand_down()
        self._items_run += count
        head = _pack(4 + used, seq, self._page[RANGE_FIRST], 0, RECORD_VALUES) + count.to_bytes(4, "little")
        behind = self._batch_end() if ends_batch else b""
        self._write(head + bytes(self._range_buffer[:used]) + behind)
        self._page[PENDING] = 0

    def _open_run(self, seq: int, function_id: int, payload: Payload, count: int) -> tuple[Any, int, list[Any]]:
        """Claim a run, look, and unpickle it. Return (None, 0, []) if it is not to be made."""
        page = self._page
        error: BaseException | None = None
        try:
            try:
                self._armed = seq
                page[CURRENT] = seq
                if page[HEADER_WORDS + seq % RING_SLOTS] != seq:
                    self._armed = 0
                    return None, 0, []
                self._main.apply()
                function = self._loaded.get(function_id)
                if function is None:
                    function = self._load_function(function_id)
                form, arguments = load_run(payload)
                self._armed = 0
                return function, form, arguments
            except BaseException as raised:
                self._armed = 0
                error = raised
        except TaskInterrupted as raised:
            error = raised
        self._exit_if_fork(error)
        if self._was_interrupted:
            self._write_unwound(seq, 0)
            return None, 0, []

        trace = error.__traceback__

        def fail(argument: None) -> None:
            raise error.with_traceback(trace)

        return fail, RunForm.PLAIN_SINGLE, [None] * count

    def _flush_nested(self) -> None:
        """Have what the call has submitted sent before its end is known."""
        if self._site.is_here and self._site.client is not None:
            self._site.client.flush()

    def _load_function(self, function_id: int) -> Any:
        function = self._functions.get(function_id)
        if function is None:
            raise RuntimeError(f"function {function_id} was not sent to this worker")
        loaded = self._loaded[function_id] = loads_value(function.blob)  # type: ignore[arg-type]
        return loaded

    def _report(
        self, seq: int, item: int, kind: int, value: Any, error: BaseException | None, ends_batch: bool
    ) -> None:
        """Write what became of a call or an item."""
        if self._is_fork:
            self._exit_if_fork(error)
        self._output.hand_down()
        self._items_run += kind != RECORD_SKIPPED
        body: Payload = b""
        if error is not None:
            if self._was_interrupted:
                self._write_unwound(seq, item)
                return
            kind = RECORD_ERROR
            body = dumps_exception(self._pickler, error, self._main.explain(error))
        elif kind == RECORD_VALUE:
            try:
                if type(value) in PLAIN_TYPES and not (type(value) in BULK_TYPES and len(value) > INLINE_BYTES):
                    body = _dumps(value, 5)  # only for want of memory can this fail
                    if len(body) > INLINE_BYTES:
                        body = Frames([body])
                else:
                    body = self._pickler.dumps(value)
            except BaseException as refused:
                kind = RECORD_ERROR
                body = dumps_exception(self._pickler, refused)
        if type(body) is bytes:
            record = _pack(len(body), seq, item, 0, kind) + body
            if ends_batch:
                record += self._batch_end()
            self._write(record)
        else:
            self._write_frames(seq, item, kind, body, ends_batch)  # type: ignore[arg-type]
        if perf_counter() - self._rang_at > RING_INTERVAL_S:
            self._ring()

    def _write_unwound(self, seq: int, item: int) -> None:
        """Say that the call has unwound. What is left of it ends with the process, and is killed where it does not."""
        self._output.hand_down()
        self._write(_pack(0, seq, item, 0, RECORD_UNWOUND))

    def _batch_end(self) -> bytes:
        self._batch_ended = True
        return _pack(0, int((perf_counter() - self._began_at) * 1e9), self._items_run, 0, RECORD_BATCH_END)

    def _write_frames(self, seq: int, item: int, kind: int, body: Frames, ends_batch: bool) -> None:
        frames = [pack_frame(buffer) if isinstance(buffer, Segment) else buffer for buffer in body.buffers]
        lengths = [len(frame) for frame in frames]
        for index, buffer in enumerate(body.buffers):
            if isinstance(buffer, Segment):
                lengths[index] |= SEGMENT_MARK
        packed = b"".join(map(FRAME_LENGTH.pack, lengths))
        self._write(_pack(len(packed) + sum(map(len, frames)), seq, item, len(frames), kind) + packed)
        for buffer, frame in zip(body.buffers, frames, strict=True):
            if isinstance(buffer, Segment):
                buffer.pass_on()
            self._write(frame)
        if ends_batch:
            self._write(self._batch_end())

    def _write(self, data: Any) -> None:
        """Write into the pipe. Where it is full, wake the agent and wait."""
        try:
            written = os.write(self._pipe_fd, data)
        except BlockingIOError:
            written = 0
        except BrokenPipeError:
            _exit()  # nobody is left to tell
        if written == len(data):
            return
        rest = memoryview(data)[written:]
        poller = select.poll()
        poller.register(self._pipe_fd, select.POLLOUT)
        while rest:
            self._ring()  # each time: the agent has emptied the pipe since the last one
            poller.poll()
            try:
                rest = rest[os.write(self._pipe_fd, rest) :]
            except BlockingIOError:
                pass
            except BrokenPipeError:
                _exit()

    def _ring(self) -> None:
        """Announce the results, what was printed first."""
        _flush_streams()
        self._page[RANG] = 1
        self._bell.ring()
        self._rang_at = perf_counter()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT: raise in the call that is meant, and only there.

        The forker writes the call's number before it signals. Another number than the armed one: the signal is late. No
        number at all: the user's own code signalled itself.
        """
        target = self._page[HEARD] = self._page[INTERRUPT]
        armed = self._armed
        if not armed:
            return
        if target == armed:
            self._armed = 0
            self._was_interrupted = True
            raise TaskInterrupted
        if not target:
            raise KeyboardInterrupt

    def _after_fork(self) -> None:
        """In a child that a call forked: let go of everything that is the worker's."""
        if self._is_fork:
            return  # a fork of the fork: the numbers below may be its own by now
        self._is_fork = True
        self._armed = 0
        try:
            self._socket.close()
            os.close(self._pipe_fd)
        except OSError:
            pass
        self._streams.let_go()
        self._output.leave()
        if signal.getsignal(signal.SIGINT) == self._on_interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._last_words.leave_faults()

    def _exit_if_fork(self, error: BaseException | None) -> None:
        """End a child that a call forked and that has come back from it: there is one worker here, and it is the
        parent."""
        if not self._is_fork:
            return
        code = 0
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            traceback.print_exception(type(error), error, error.__traceback__)
            code = 1
        _flush_streams()
        os._exit(code & 0xFF)


def _on_nudge(number: int, frame: FrameType | None) -> None:
    """Handle NUDGE: nothing is left to do. It has ended the system call in which the process was, so that the
    handler of a signal that came before has run."""


def _log_failed_initializer() -> None:
    """Log the exception that is being handled as the standard library's workers do, by its own logger: where logging
    has not been set up, that appears on stderr."""
    try:
        from concurrent.futures._base import LOGGER

        LOGGER.critical("Exception in initializer:", exc_info=True)
    except BaseException:
        traceback.print_exc()  # what the user's logging raised: the initializer's failure is reported all the same


def _flush_streams() -> None:
    """Let what was printed appear now. 0.1 us each where nothing was."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        pass  # replaced, closed or full: none of that is the call's result


def _abandon_children() -> None:
    """Have `_exit` wait for no child of multiprocessing: they are stopped with the call that started them."""
    process: Any = sys.modules.get("multiprocessing.process")
    if process is not None:
        process._children.clear()


def _exit(code: int = 0) -> NoReturn:
    """End as a child of multiprocessing ends: its finalizers run, those of the interpreter do not."""
    try:
        util: Any = sys.modules.get("multiprocessing.util")
        if util is not None:
            util._exit_function()
        _flush_streams()
    finally:
        os._exit(code)
