"""Pickling of functions, calls and results, on both sides.

This module knows how values become payloads and payloads values. It does not know what a message is or who is asked to
run what. Unpickling runs code of the peer's choosing: only the user's own process and its workers import this module.

The C pickler goes first. What it refuses (lambdas, closures, local classes) and what names `__main__` goes through the
picklers of `namespace_pickles`, which import cloudpickle only for what they cannot do by themselves.

A run of items travels as the pickle of (form, items), see `RunForm`. The results of a run come back in ranges: pickles
one behind the other, or, where all are integers or all are floats, words.
"""

from __future__ import annotations

import pickle
import struct
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum
from types import FunctionType
from typing import Any, Final

from scaler_executor.errors import RemoteError, ResultTooLargeError, TaskTooLargeError
from scaler_executor.protocol.codec import INLINE_BYTES, MAX_PAYLOAD_BYTES, LocalProtocolError
from scaler_executor.protocol.messages import Frames, Payload
from scaler_executor.protocol.page import FLOATS, INTEGERS
from scaler_executor.protocol.segment import Segment
from scaler_executor.runtime.namespace_names import Names, finds_by_name
from scaler_executor.runtime.namespace_pickles import dumps_by_name
from scaler_executor.runtime.segments import SegmentStore, copied, mapped, place

PROTOCOL: Final = 5
#: Values of exactly these types hold no reference to anything mutable, and pickle without running code of the user's.
PLAIN_TYPES: Final = frozenset({int, float, str, bytes, bool, type(None)})

#: Whose content, where it is large, a pickler writes to a file as it is.
BULK_TYPES: Final = frozenset({bytes, bytearray, str})

#: How a range begins that has no pickles.
WORDS: Final = (INTEGERS, FLOATS)
_MAX_BUFFERS: Final = 1024
#: A larger pickle is searched for names only if its value can have any.
_SEARCHED_BYTES: Final = 1 << 10
#: `is_bulky` looks no further.
_MAX_LOOKED_AT: Final = 16
_FRAME_OPCODE: Final = 0x95
#: How C pickle names something, at our protocol.
_STACK_GLOBAL: Final = b"\x93"
_dumps = pickle.dumps
_loads = pickle.loads


class RunForm(IntEnum):
    """How the items of a run stand in its payload."""

    PLAIN_SINGLE = 0  # plain values, each the only argument of its item
    PLAIN = 1  # tuples of plain values: the arguments
    PICKLED = 2  # (pickle of the argument tuple, number of its frames), or (pickle of an exception, -1)


class CallPickler:
    """Pickles what travels between the user's process and its workers. Thread-safe.

    Args:
        main: Decides what of `__main__` travels by name.
        copy_buffers: Whether out-of-band buffers are copied, as they must be unless the payload is written before
        anybody can change them.
        store: Takes large buffers; may be set later.
        too_large: Raised for what is larger than `max_bytes`, which the store has not taken.
    """

    def __init__(
        self,
        main: Names,
        *,
        copy_buffers: bool = True,
        store: SegmentStore | None = None,
        too_large: type[TaskTooLargeError | ResultTooLargeError] = TaskTooLargeError,
        max_bytes: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        self._main = main
        self._copy_buffers = copy_buffers
        self.store = store
        self._too_large = too_large
        self._max_bytes = max_bytes

    def dumps(self, value: Any, names: set[str] | None = None) -> Payload:
        """Return the payload of any value.

        Args:
            value: Anything.
            names: Is given the globals of `__main__` that the payload needs.

        Raises:
            Exception: What pickle raises: PicklingError, TypeError, AttributeError, or whatever the value's own methods
            raise.
            TaskTooLargeError, ResultTooLargeError: It is too large.
        """
        data = None if is_bulky(value) else self.dumps_small(value)
        if data is not None:
            return data
        parts = self._dumps_parts(value, names)
        return self._payload(parts[0]) if len(parts) == 1 else self._frames(parts)

    def dumps_small(self, value: Any) -> bytes | None:
        """Return the payload of a value that is small and pickles without further ado, None of others.

        The common case, kept short: most values have no large buffer, and those that have one can afford a second
        attempt.
        """
        try:
            data = _dumps(value, PROTOCOL, buffer_callback=_refuse_large)
        except Exception:
            return None
        if len(data) > INLINE_BYTES:
            return None
        if _STACK_GLOBAL not in data:
            return data  # it names nothing at all
        # A search takes longer than the pickling, where there is much to search.
        if len(data) > _SEARCHED_BYTES and _names_nothing(value):
            return data
        return None if _is_special(data) else data

    def dumps_in_band(self, value: Any, names: set[str] | None = None) -> bytes:
        """Return one pickle of any size; `names` and errors as `dumps`."""
        return self._dumps(value, None, [], names)

    def dumps_call(self, value: tuple[Any, ...], names: set[str] | None = None) -> Payload:
        """Return the payload of (args, kwargs) or (function, args, kwargs); as `dumps`, and an error names the
        argument."""
        try:
            return self.dumps(value, names)
        except Exception as error:
            *function, args, kwargs = value
            parts = [(f"function {name_of(part)}", part) for part in function]
            parts += [(f"argument {index}", part) for index, part in enumerate(args)]
            parts += [(f"argument {name!r}", part) for name, part in kwargs.items()]
            self._name_culprit(error, parts)
            raise

    def dumps_run(self, items: list[tuple[Any, ...]], names: set[str] | None = None) -> Payload:
        """Return the payload of a run: for each item, its arguments; `names` as in `dumps`.

        Items of plain values share one pickle. Any others are pickled one by one: then two items share no object, and
        an item that does not pickle raises in its own call.
        """
        values: list[Any] = [item[0] for item in items if len(item) == 1]
        if len(values) == len(items):
            if _are_plain(values):
                return self._payload(_dumps((int(RunForm.PLAIN_SINGLE), values), PROTOCOL))
        elif all(PLAIN_TYPES.issuperset(map(type, item)) for item in items):
            return self._payload(_dumps((int(RunForm.PLAIN), items), PROTOCOL))
        pickled: list[tuple[bytes, int]] = []
        buffers: list[Any] = []
        for item in items:
            try:
                small = self.dumps_small(item)
                first, *others = [small] if small is not None else self._dumps_parts(item, names)
            except Exception as error:
                self._name_culprit(error, [(f"argument {index}", part) for index, part in enumerate(item)])
                pickled.append((_dumps_exception(self, error, trace=""), -1))
                continue
            pickled.append((b"".join(first) if isinstance(first, list) else first, len(others)))
            buffers += others
        data = _dumps((int(RunForm.PICKLED), pickled), PROTOCOL)
        return self._frames([data, *buffers]) if buffers else self._payload(data)

    def dumps_function(self, function: Any, names: set[str] | None = None) -> Payload:
        """Return the payload of a callable; as `dumps`, and an error names it."""
        try:
            return self.dumps(function, names)
        except Exception as error:
            _add_note(error, f"while pickling the function {name_of(function)}")
            raise

    def finds_by_name(self, function: Any) -> bool:
        """Tell whether a function or class is found by its module and qualified name, here and on the other side."""
        return finds_by_name(self._main, function)

    def _dumps(
        self, value: Any, keep_in_band: Callable[[Any], bool] | None, buffers: list[Any], names: set[str] | None
    ) -> bytes:
        try:
            data = _dumps(value, PROTOCOL, buffer_callback=keep_in_band)
            if not _is_special(data):
                return data
        except Exception:
            pass  # a lambda, say; what refuses it in the end says why
        buffers.clear()
        return dumps_by_name(value, keep_in_band, buffers, self._main, set() if names is None else names)

    def _dumps_parts(self, value: Any, names: set[str] | None) -> list[Any]:
        """Return the pickle of a value that may be large, and its out-of-band buffers as views.

        The pickle is a list of its parts if it has several: large bytes and strings are not copied together.
        """
        views: list[Any] = []

        def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
            view = _large_view(buffer)
            if view is None or len(views) >= _MAX_BUFFERS:
                return True
            views.append(view)
            return False

        chunks: list[Any] = []
        try:
            pickle.Pickler(_ChunkFile(chunks), PROTOCOL, buffer_callback=keep_in_band).dump(value)
            if not any(map(_is_special_chunk, chunks)):
                return [chunks[0] if len(chunks) == 1 else chunks, *views]
        except Exception:
            pass  # a lambda, say; what refuses it in the end says why
        _release(views)
        try:
            data = dumps_by_name(value, keep_in_band, views, self._main, set() if names is None else names)
        except BaseException:
            _release(views)
            raise
        return [data, *views]

    def _payload(self, data: Any) -> Payload:
        """Return the payload of one pickle, which may be a list of its parts."""
        if isinstance(data, list):
            if sum(map(len, data)) > INLINE_BYTES:
                return self._frames([data])
            data = b"".join(data)
        return data if len(data) <= INLINE_BYTES else self._frames([data])

    def _frames(self, parts: list[Any]) -> Frames:
        try:
            placed = place(self.store, parts)
            size_bytes = sum(len(part) for part in placed if not isinstance(part, Segment))
            if size_bytes > self._max_bytes:
                raise self._too_large(size_bytes, self._max_bytes)
            return Frames(copied(placed) if self._copy_buffers else placed)
        except BaseException:
            placed = []
            _release(parts)
            raise

    def _name_culprit(self, error: Exception, parts: list[tuple[str, Any]]) -> None:
        """Say in `error` which of the named parts does not pickle, and where in it."""
        for name, part in parts:
            if self._pickles(part):
                continue
            for _ in range(8):
                inner = next(((step, child) for step, child in _children(part) if not self._pickles(child)), None)
                if inner is None:
                    break
                name += inner[0]
                part = inner[1]
            _add_note(error, f"while pickling {name}, of type {type(part).__qualname__}")
            return

    def _pickles(self, value: Any) -> bool:
        try:
            self._dumps_parts(value, None)
        except Exception:
            return False
        return True


def _release(views: list[Any]) -> None:
    """Let go of views of the user's memory, of which an error's traceback would keep this list: where the memory is a
    memoryview's itself, Python before 3.13 cannot collect the two as parts of a cycle, and crashes."""
    for view in views:
        if type(view) is memoryview:
            view.release()
    views.clear()


def _is_special(data: bytes) -> bool:
    """Tell whether a pickle may name what C pickle alone does not do right: see `namespace_pickles`."""
    return b"__main__" in data or b"multiprocessing." in data


def _names_nothing(value: Any, depth: int = 2) -> bool:
    """Tell whether a value is made of plain ones, seen at a glance."""
    kind = type(value)
    if kind in PLAIN_TYPES:
        return True
    if kind is tuple:
        return depth > 0 and len(value) <= _MAX_LOOKED_AT and all(_names_nothing(part, depth - 1) for part in value)
    return kind is dict and not value


def _is_special_chunk(chunk: Any) -> bool:
    """As `_is_special`, of what `_ChunkFile` got. A string or the like of the value's, which is written by itself, is
    not the pickler's own."""
    is_content = type(chunk) is not bytes or (len(chunk) > 2 * INLINE_BYTES and chunk[0] != _FRAME_OPCODE)
    return not is_content and _is_special(chunk)


def is_bulky(value: Any, depth: int = 2) -> bool:
    """Tell whether a value has something large near its top that C pickle would copy into the pickle."""
    kind = type(value)
    if kind in BULK_TYPES:
        return len(value) > INLINE_BYTES
    if depth and kind in (tuple, list, dict) and len(value) <= _MAX_LOOKED_AT:
        return any(is_bulky(part, depth - 1) for part in (value.values() if kind is dict else value))
    return False


class _ChunkFile:
    """Collects what a pickler writes."""

    __slots__ = ("_chunks",)

    def __init__(self, chunks: list[Any]) -> None:
        self._chunks = chunks

    def write(self, chunk: Any) -> None:
        """Take a part of the pickle: the pickler's own bytes, or content as it is."""
        self._chunks.append(chunk.raw() if type(chunk) is pickle.PickleBuffer else chunk)


class _LargeBufferFound(Exception):
    """Ends an attempt to pickle everything in band."""


def _refuse_large(buffer: pickle.PickleBuffer) -> bool:
    if _large_view(buffer) is not None:
        raise _LargeBufferFound
    return True


def _large_view(buffer: pickle.PickleBuffer) -> memoryview | None:
    """Return the bytes of a buffer that is worth a frame of its own."""
    try:
        view = buffer.raw()
    except BufferError:
        return None  # not contiguous
    return view if len(view) > INLINE_BYTES else None


def _are_plain(values: list[Any]) -> bool:
    types = set(map(type, values))
    if tuple not in types:
        return types <= PLAIN_TYPES
    types.remove(tuple)
    return types <= PLAIN_TYPES and all(PLAIN_TYPES.issuperset(map(type, v)) for v in values if type(v) is tuple)


def _as_payload(data: bytes) -> Payload:
    return Frames([data]) if len(data) > INLINE_BYTES else data


def _children(value: Any) -> list[tuple[str, Any]]:
    """Return what a value is made of, as (how to get there, part)."""
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", part) for index, part in enumerate(value)]
    if isinstance(value, dict):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (type, FunctionType)):
        return []
    return [(f".{name}", part) for name, part in getattr(value, "__dict__", {}).items()]


def name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or f"{type(function).__qualname__} object")


def _add_note(error: BaseException, note: str) -> None:
    """Add to what is printed below the error; before Python 3.11, to its text."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    elif len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} ({note})",)


class RemoteTraceback(Exception):
    """Shows the traceback that an exception had in its worker: it is the exception's `__cause__`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return self.text


class LoadFailed:
    """Stands in a list of values for one that could not be unpickled."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


def dumps_exception(pickler: CallPickler, error: BaseException, note: str | None = None) -> Payload:
    """Return the payload of an exception and its traceback, with a note if there is one, tested to survive the way.
    Never raises.

    An exception that does not come back as an exception is sent as type name, text and traceback, see `RemoteError`.
    """
    if note is not None:
        _add_note(error, note)
    return _as_payload(_dumps_exception(pickler, error, trace=_format_traceback(error)))


def _dumps_exception(pickler: CallPickler, error: BaseException, *, trace: str) -> bytes:
    """Return the pickle of (pickle of the exception or None, traceback text, name of its type, its text)."""
    kind = type(error)
    type_name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    pickled = None
    text = "<its text could not be made>"
    saved = error.__traceback__
    try:
        text = str(error)
        error.__traceback__ = None
        candidate = pickler.dumps_in_band(error)
        if isinstance(_loads(candidate), BaseException):
            pickled = candidate
    except BaseException:
        pass  # its own methods failed, and what they raised is of less use than the exception itself
    finally:
        error.__traceback__ = saved
    return _dumps((pickled, trace, type_name, text), PROTOCOL)


def _format_traceback(error: BaseException) -> str:
    """Return what the interpreter would print, without our own frames at the top."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__package__") == __package__:
        trace = trace.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, trace))
    except BaseException:
        return f"{type(error).__qualname__}: <its traceback could not be made>\n"


def loads_exception(payload: Payload) -> BaseException:
    """Return the exception of an ERROR payload, its remote traceback as cause."""
    pickled, trace, type_name, text = loads_value(payload)
    error: BaseException
    try:
        error = RemoteError(type_name, text, trace) if pickled is None else _loads(pickled)
        if not isinstance(error, BaseException):
            raise TypeError(f"unpickled to a {type(error).__qualname__}")
    except KeyboardInterrupt:
        raise  # the user's, most probably: it can be read again
    except BaseException as failure:
        error = RemoteError(type_name, f"{text} (it cannot be unpickled here: {failure!r})", trace)
    if trace:
        error.__cause__ = RemoteTraceback(f'\n"""\n{trace}"""')
    return error


def loads_value(payload: Payload) -> Any:
    """Return the value of a payload; raises what its unpickling raises."""
    if isinstance(payload, bytes):
        return _loads(payload)
    pickled, *buffers = mapped(payload.buffers)
    return _loads(pickled, buffers=buffers)


def loads_values(payload: Payload, count: int) -> list[Any]:
    """Return the `count` values of a range; `LoadFailed` for each that does not unpickle."""
    if type(payload) is bytes and payload.startswith(WORDS):
        if len(payload) != 8 * (count + 1):
            raise LocalProtocolError(f"{count} words in {len(payload)} bytes")
        return list(struct.unpack_from(f"<{count}{payload[:1].decode()}", payload, 8))
    values: list[Any] = []
    if count == 1:
        try:
            values.append(loads_value(payload))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            values.append(LoadFailed(error))
        return values
    if not isinstance(payload, bytes):
        raise LocalProtocolError("several values in frames")
    at = 0
    append = values.append
    for _ in range(count):
        end = _pickle_end(payload, at)
        try:
            append(_loads(payload[at:end]))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            append(LoadFailed(error))
        at = end
    if at != len(payload):
        raise LocalProtocolError(f"{count} values take {at} of {len(payload)} bytes")
    return values


_FRAME = struct.Struct("<Q")


def _pickle_end(data: bytes, at: int) -> int:
    """Return where the pickle of protocol 5 that begins at `at` ends.

    The pickler puts everything behind PROTO into one frame, unless it is shorter than 4 bytes (then there is no frame)
    or longer than 64 KB (such a result is sent in frames of its own and is never among several). Unframed are an
    opcode and STOP, or two opcodes or an opcode with one byte of argument and STOP.
    """
    if data[at + 2] == _FRAME_OPCODE:
        return at + 11 + int(_FRAME.unpack_from(data, at + 3)[0])
    if data[at + 3] == 0x2E and data[at + 2] not in (0x4B, 0x82):  # STOP, and not the argument of BININT1 or EXT1
        return at + 4
    return at + 5


def load_inline_call(payload: Payload) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return function, args and kwargs of a CallStyle.INLINE."""
    return loads_value(payload)  # type: ignore[no-any-return]


def load_run(payload: Payload) -> tuple[RunForm, list[Any]]:
    """Return form and items of a CallStyle.MAP; those of RunForm.PICKLED are still to be loaded by `load_item`."""
    if isinstance(payload, bytes):
        form, items = _loads(payload)
        return RunForm(form), items
    pickled, *buffers = payload.buffers
    form, items = loads_value(Frames([pickled]))
    if form == RunForm.PICKLED:
        waiting = iter(buffers)
        items = [(data, [next(waiting) for _ in range(count)] if count > 0 else count) for data, count in items]
    return RunForm(form), items


def load_item(item: tuple[bytes, Any]) -> tuple[Any, ...]:
    """Return the arguments of an item of RunForm.PICKLED, or raise why it could not be pickled."""
    data, buffers = item
    if buffers == -1:
        raise loads_exception(data)
    return _loads(data, buffers=mapped(buffers) if buffers else ())  # type: ignore[no-any-return]
