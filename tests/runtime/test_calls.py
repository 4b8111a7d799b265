"""Pickling of calls and results: what goes by reference, by value, out of band, and where errors land."""

from __future__ import annotations

import enum
import functools
import os.path
import pickle
import struct
import sys
import threading
from typing import Any

import numpy as np
import pytest
import unpicklables
from unpicklables import AwkwardError, CustomError, FailsToLoad, Unpicklable, add, identity, raise_error

from scaler_executor.errors import RemoteError
from scaler_executor.protocol.codec import INLINE_BYTES, LocalProtocolError
from scaler_executor.protocol.messages import CallStyle, Frames, Function
from scaler_executor.protocol.page import FLOATS, INTEGERS
from scaler_executor.runtime.calls import (
    CallPickler,
    LoadFailed,
    RemoteTraceback,
    RunForm,
    dumps_exception,
    load_item,
    load_run,
    loads_exception,
    loads_value,
    loads_values,
)
from scaler_executor.runtime.functions import FunctionTable
from scaler_executor.runtime.namespace import MainDefinitions

main = MainDefinitions()
pickler = CallPickler(main)


def lookup(table: FunctionTable, function: Any, style: CallStyle) -> tuple[int, Function | None, list[int]]:
    """Return the function's id, the message that it needs, and what is forgotten for it."""
    prepared = table.prepare(function, style)
    function_id, messages, forgotten = table.register(prepared, main.needs(prepared.names))
    return function_id, messages[-1] if messages else None, forgotten


@pytest.fixture
def table() -> FunctionTable:
    return FunctionTable(pickler, main)


def test_small_values_are_inline() -> None:
    """What is small is bytes, whatever it is made of; what is large is frames, its buffers apart."""
    small, large = np.arange(10), np.arange(INLINE_BYTES)
    assert isinstance(pickler.dumps((small, "x")), bytes)
    payload = pickler.dumps((small, large))
    assert isinstance(payload, Frames) and [len(buffer) for buffer in payload.buffers[1:]] == [large.nbytes]
    assert isinstance(pickler.dumps(b"x" * INLINE_BYTES), Frames)


def test_a_payload_is_a_snapshot() -> None:
    """An array that is changed after it was pickled arrives as it was, and can be written to."""
    array = np.zeros(INLINE_BYTES)
    payload = pickler.dumps(array)
    array[:] = 1
    assert isinstance(payload, Frames)
    received = loads_value(Frames([bytearray(buffer) for buffer in payload.buffers]))
    assert not received.any() and received.flags.writeable


def test_closures_and_local_classes_travel_by_value() -> None:
    """What pickle refuses goes with cloudpickle; a local class is the same class when it comes back."""
    offset = 5

    class Local:
        pass

    payload = pickler.dumps((lambda x: x + offset, Local()))
    function, instance = loads_value(payload)
    assert function(1) == 6 and type(instance) is Local


@pytest.mark.parametrize(
    ("value", "kind", "place"),
    [
        (((1, threading.Lock()), {}), TypeError, "argument 1"),
        (((1,), {"x": [1, Unpicklable()]}), RuntimeError, "argument 'x'[1]"),
        (((lambda: 1, threading.Lock()), {}), TypeError, "argument 1"),
        ((Unpicklable(), (), {}), RuntimeError, "function Unpicklable object"),
    ],
)
def test_pickling_errors_name_the_part(value: Any, kind: type[Exception], place: str) -> None:
    """The error is the one that pickle raises, and says which argument it was."""
    with pytest.raises(kind) as caught:
        pickler.dumps_call(value)
    said = "".join(getattr(caught.value, "__notes__", ())) or str(caught.value)
    assert f"while pickling {place}" in said


def test_functions_found_by_name_are_sent_once(table: FunctionTable) -> None:
    """A function that is found by its name keeps its id as long as the name leads to it."""
    number, message, forgotten = lookup(table, add, CallStyle.CALL)
    assert message is not None and (number, message.name, forgotten) == (1, "add", [])
    assert loads_value(message.blob) is add  # type: ignore[arg-type]
    assert lookup(table, add, CallStyle.CALL) == (1, None, [])
    assert lookup(table, add, CallStyle.MAP)[0] == 2
    assert lookup(table, os.path.join, CallStyle.CALL)[0] == 3
    assert lookup(table, len, CallStyle.CALL)[0] == 4
    assert lookup(table, CustomError, CallStyle.CALL)[0] == 5


def test_a_replaced_function_is_not_mistaken(table: FunctionTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the name leads elsewhere the old function goes by value, under another id."""
    assert lookup(table, identity, CallStyle.CALL)[0] == 1
    old = unpicklables.identity
    monkeypatch.setattr(unpicklables, "identity", lambda value: "new")
    number, message, _ = lookup(table, old, CallStyle.CALL)
    assert number == 2 and message is not None
    assert loads_value(message.blob)("old") == "old"  # type: ignore[arg-type]


def test_closures_are_snapshots(table: FunctionTable) -> None:
    """A closure is pickled each time; what has not changed keeps its id, what has gets a new one."""
    box = [1]

    def closure() -> int:
        return box[0]

    assert lookup(table, closure, CallStyle.CALL)[0] == 1
    assert lookup(table, closure, CallStyle.CALL) == (1, None, [])
    box[0] = 2
    number, message, _ = lookup(table, closure, CallStyle.CALL)
    assert number == 2 and message is not None and loads_value(message.blob)() == 2  # type: ignore[arg-type]


def test_other_callables_travel_with_their_call(table: FunctionTable) -> None:
    """Bound methods and partials are pickled with the arguments of a call, and registered for a run."""
    for function in ([1].append, functools.partial(add, 1), CustomError(1, "x").with_traceback):
        assert lookup(table, function, CallStyle.CALL) == (0, None, [])
    number, message, _ = lookup(table, functools.partial(add, 1), CallStyle.MAP)
    assert number == 1 and message is not None


def test_functions_are_bounded() -> None:
    """Beyond the limits the functions that were not used for longest are forgotten; ids are never used again."""
    table = FunctionTable(pickler, main, max_functions=3)
    for function in (add, identity, len):
        lookup(table, function, CallStyle.CALL)
    lookup(table, add, CallStyle.CALL)
    number, message, forgotten = lookup(table, raise_error, CallStyle.CALL)
    assert (number, forgotten) == (4, [2]) and message is not None
    assert lookup(table, identity, CallStyle.CALL)[0] == 5
    table = FunctionTable(pickler, main, max_bytes=100_000)
    big = [bytes(90_000), bytes(90_000)]
    ids = [lookup(table, lambda index=index: big[index], CallStyle.CALL)[::2] for index in (0, 1)]
    assert ids == [(1, []), (2, [1])]


def test_runs_of_plain_values() -> None:
    """Plain items share one pickle; exactly the plain types do, for an int subclass may be anything."""
    assert load_run(pickler.dumps_run([(1,), ("a",), ((1, b"x"),)])) == (RunForm.PLAIN_SINGLE, [1, "a", (1, b"x")])
    assert load_run(pickler.dumps_run([(1, 2), (3, None)])) == (RunForm.PLAIN, [(1, 2), (3, None)])
    flag = enum.IntFlag("Flag", "A")
    for item in (np.float64(1), [1], ([1],), flag.A, ((1, (2,)),)):
        assert load_run(pickler.dumps_run([(item,)]))[0] == RunForm.PICKLED


def test_items_share_nothing_and_fail_alone() -> None:
    """Items that are not plain are pickled one by one: no common objects, and errors stay with their item."""
    shared: list[int] = []
    large = np.arange(INLINE_BYTES)
    run = pickler.dumps_run([(shared,), (threading.Lock(),), (shared,), (large,), (FailsToLoad(),)])
    form, items = load_run(run)
    first, third, fourth = (load_item(items[index])[0] for index in (0, 2, 3))
    assert form == RunForm.PICKLED and first == third == [] and first is not third and (fourth == large).all()
    with pytest.raises(TypeError, match="lock"):
        load_item(items[1])
    with pytest.raises(ValueError, match="broken on arrival"):
        load_item(items[4])


def test_values_one_behind_the_other() -> None:
    """Pickles of every length stand behind each other, and one that does not load spoils no other."""
    values = [
        None,
        True,
        0,
        46,
        255,
        256,
        -1,
        1.5,
        2**70,
        "",
        ".",
        "x" * 60_000,
        b"",
        b".",
        (),
        [],
        {},
        set(),
        [[]],
        len,
    ]
    values += [(None,), {"K.": "."}, FailsToLoad()]
    loaded = loads_values(b"".join(pickle.dumps(value, 5) for value in values), len(values))
    failed = loaded.pop()
    assert loaded == values[:-1]
    assert isinstance(failed, LoadFailed) and isinstance(failed.error, ValueError)


def test_words_of_a_wrong_length() -> None:
    """As many values as there are said to be, or none."""
    assert loads_values(FLOATS + struct.pack("<2d", 1.5, -2.5), 2) == [1.5, -2.5]
    with pytest.raises(LocalProtocolError):
        loads_values(INTEGERS + bytes(8), 2)


class RaisesWhenLoaded:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return raise_error, (self.error,)


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), RuntimeError()], ids=repr)
def test_values_that_raise(error: BaseException) -> None:
    """What a value raises when it is loaded, SystemExit even, stands in its place and costs no other value; an
    exception that raises so is replaced."""
    payload = b"".join(pickle.dumps(value, 5) for value in (1, RaisesWhenLoaded(error), 2))
    before, failed, after = loads_values(payload, 3)
    assert (before, after) == (1, 2)
    assert isinstance(failed, LoadFailed) and type(failed.error) is type(error)
    (alone,) = loads_values(pickle.dumps(RaisesWhenLoaded(error)), 1)
    assert isinstance(alone, LoadFailed) and type(alone.error) is type(error)
    inner = pickle.dumps(RaisesWhenLoaded(error))
    assert isinstance(loads_exception(pickle.dumps((inner, "", "TheirError", "text"))), RemoteError)


def test_values_and_ctrl_c() -> None:
    """A KeyboardInterrupt is most probably the user's, who reads again."""
    payload = pickle.dumps(1) + pickle.dumps(RaisesWhenLoaded(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        loads_values(payload, 2)


def caught(error: BaseException) -> BaseException:
    try:
        raise_error(error)
    except BaseException as raised:
        return raised
    raise AssertionError


def test_exceptions_come_back_with_their_traceback() -> None:
    """Type, attributes and notes survive; the remote traceback is the cause."""
    error = caught(CustomError(3, "three"))
    if sys.version_info >= (3, 11):
        error.add_note("a note")
    received = loads_exception(dumps_exception(pickler, error))
    assert isinstance(received, CustomError) and (received.code, received.args) == (3, (3, "three"))
    assert getattr(received, "__notes__", None) == getattr(error, "__notes__", None)
    assert isinstance(received.__cause__, RemoteTraceback)
    assert "in raise_error" in str(received.__cause__) and str(received.__cause__).startswith('\n"""\nTraceback')
    assert error.__traceback__ is not None


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no exception groups")
def test_exception_groups() -> None:
    """A group comes back with its members."""
    group = caught(ExceptionGroup("several", [ValueError(1), CustomError(2, "two")]))  # noqa: F821
    received = loads_exception(dumps_exception(pickler, group))
    assert [type(member) for member in received.exceptions] == [ValueError, CustomError]  # type: ignore[attr-defined]


def test_exceptions_that_do_not_survive() -> None:
    """An exception that cannot make the way is replaced by one that says everything about it."""
    with_lock = ValueError("locked")
    with_lock.lock = threading.Lock()  # type: ignore[attr-defined]
    for error, name in ((AwkwardError("a", "b"), "unpicklables.AwkwardError"), (with_lock, "ValueError")):
        received = loads_exception(dumps_exception(pickler, caught(error)))
        assert isinstance(received, RemoteError)
        assert (received.type_name, received.text) == (name, str(error))
        assert "in raise_error" in received.traceback and isinstance(received.__cause__, RemoteTraceback)
