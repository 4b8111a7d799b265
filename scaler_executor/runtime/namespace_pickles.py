"""Picklers that find names of `__main__` and leave them names.

They tell which names a pickle needs. What C pickle cannot take apart becomes calls of `namespace_making`, made on the
other side. They do not know what a name stands for now, nor whether the other side has it; see `namespace` for the
whole.
"""

from __future__ import annotations

import copyreg
import functools
import io
import marshal
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import CellType, FunctionType, ModuleType
from typing import Any, Final

from scaler_executor.runtime.namespace_making import (
    EmptyCell,
    dataclass_mark,
    import_module,
    make_bound,
    make_class,
    make_context_variable,
    make_function,
    make_lock,
    make_lru_cache,
    make_single_dispatch,
    set_function_state,
)
from scaler_executor.runtime.namespace_names import LRU_WRAPPER, Names, finds_by_name, global_names, main_dict

PROTOCOL: Final = 5
_ABSENT: Final = object()
_SINGLE_DISPATCH: Final = functools.singledispatch(len).__code__  # type: ignore[attr-defined]
_LOCKS: Final = {type(threading.Lock()): "Lock", type(threading.RLock()): "RLock"}
_TAKES_ANY_ARGUMENTS: Final = 0x04 | 0x08  # CO_VARARGS, CO_VARKEYWORDS
#: In a longer one no registry of functions and classes is looked for: it is a cache.
_MAX_WEAK_ENTRIES: Final = 1024
#: Values that `dataclasses` compares by identity.
_DATACLASS_MARKS: Final = (
    "MISSING",
    "KW_ONLY",
    "_FIELD",
    "_FIELD_CLASSVAR",
    "_FIELD_INITVAR",
    "_HAS_DEFAULT_FACTORY",
    "_EMPTY_METADATA",
)


def dumps_by_name(
    value: Any,
    buffer_callback: Any,
    buffers: list[Any],
    policy: Names,
    names: set[str],
    defined: tuple[str, Any] | None = None,
) -> bytes:
    """Return a pickle in which `__main__` stands by name.

    Args:
        value: Anything.
        buffer_callback: As pickle.Pickler; puts into `buffers`, which a second attempt empties first.
        policy, names, defined: As `ByNamePickler`.

    Raises:
        Exception: What pickling raises.
    """
    try:
        with io.BytesIO() as file:
            ByNamePickler(file, buffer_callback, policy, names, defined).dump(value)
            return file.getvalue()
    except Exception as error:
        refused: Exception | None = error
    buffers.clear()
    try:
        with io.BytesIO() as file:
            _by_value_pickler()(file, buffer_callback, policy, names, defined).dump(value)
            return file.getvalue()
    except ImportError:
        if isinstance(refused, NeedsCloudpickle):
            raise pickle.PicklingError("cloudpickle is not installed") from None
        assert refused is not None
        raise refused from None
    except Exception as error:
        # cloudpickle refuses less: what it names is the real obstacle. C pickle may have stopped at a mere lambda.
        raise error from None
    finally:
        refused = (
            None  # or its traceback would keep the callers' frames, and what they pickle, until the collector comes
        )


class ByNamePickler(pickle.Pickler):
    """Pickles functions and classes of `__main__` by name, and its other functions by their code.

    Args:
        file: As pickle.Pickler.
        buffer_callback: As pickle.Pickler.
        policy: Decides what is found by name.
        names: Is given the globals that are needed.
        defined: (name, value) of the definition that is being pickled, which is not found by its own name.
    """

    def __init__(
        self,
        file: Any,
        buffer_callback: Any,
        policy: Names,
        names: set[str],
        defined: tuple[str, Any] | None = None,
    ) -> None:
        self.dispatch_table = {**copyreg.dispatch_table, **_multiprocessing_reducers()}
        super().__init__(file, PROTOCOL, buffer_callback=buffer_callback)
        self._reducer = MainReducer(policy, names, defined)

    def reducer_override(self, obj: Any) -> Any:
        """As pickle.Pickler."""
        return self._reducer.reduce(obj, _refuse_by_value)


class NeedsCloudpickle(Exception):
    """This is to be pickled by value, which only cloudpickle does."""


def _refuse_by_value(value: Any) -> Any:
    if isinstance(value, ModuleType) or (
        isinstance(value, (type, FunctionType)) and getattr(value, "__module__", None) == "__main__"
    ):
        raise NeedsCloudpickle  # C pickle would look for it under its name
    return NotImplemented


@lru_cache(maxsize=1)
def _by_value_pickler() -> Any:
    """Return cloudpickle's pickler, taught the same; made when first needed, since it takes long to import."""
    import cloudpickle

    class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
        def __init__(
            self,
            file: Any,
            buffer_callback: Any,
            policy: Names,
            names: set[str],
            defined: tuple[str, Any] | None = None,
        ) -> None:
            self.dispatch_table = {**cloudpickle.Pickler.dispatch_table, **_multiprocessing_reducers()}
            super().__init__(file, PROTOCOL, buffer_callback)
            self._reducer = MainReducer(policy, names, defined)

        def reducer_override(self, obj: Any) -> Any:
            return self._reducer.reduce(obj, super().reducer_override)

    return ByValuePickler


def _multiprocessing_reducers() -> dict[Any, Any]:
    """Return how multiprocessing pickles sockets, connections and the like, as ProcessPoolExecutor does."""
    reduction: Any = sys.modules.get("multiprocessing.reduction")
    return {} if reduction is None else dict(reduction.ForkingPickler._extra_reducers)


class MainReducer:
    """What the two picklers have in common."""

    def __init__(self, policy: Names, names: set[str], defined: tuple[str, Any] | None) -> None:
        self._policy = policy
        self._names = names
        self._defined_name: str = ""
        self._defined: Any = _ABSENT
        if defined is not None:
            self._defined_name, self._defined = defined

    def reduce(self, value: Any, otherwise: Callable[[Any], Any]) -> Any:
        """As `reducer_override`; `otherwise` reduces what is not ours."""
        kind: type = type(value)
        if kind is FunctionType or kind is LRU_WRAPPER or isinstance(value, type):
            name = self._policy.find(value)
            if name is not None and name != self._defined_name:
                self._names.add(name)
                return NotImplemented
            if isinstance(value, FunctionType):
                if value.__globals__ is main_dict():
                    reduced = self._reduce_function(value)
                elif value.__code__ is _SINGLE_DISPATCH:
                    registry = dict(value.registry)  # type: ignore[attr-defined]
                    reduced = make_single_dispatch, (registry.pop(object), list(registry.items()))
                else:
                    reduced = otherwise(value)
            elif kind is LRU_WRAPPER:
                if value.__module__ != "__main__":
                    return otherwise(value)
                reduced = make_lru_cache, (value.__wrapped__, value.cache_parameters())
            else:
                reduced = _as_made_here(value, otherwise(value))
            if value is self._defined and type(reduced) is tuple:
                # Bound as soon as it is made: what it is made of may refer to it by name.
                reduced = (make_bound, (self._defined_name, reduced[0], reduced[1]), *reduced[2:])
            return reduced
        if isinstance(value, ModuleType) and sys.modules.get(value.__name__) is value:
            return import_module, (value.__name__,)
        if self._defined is not _ABSENT:
            reduced = self._reduce_made_anew(kind, value)
            if reduced is not NotImplemented:
                return reduced
        if kind.__module__ == "dataclasses":
            marks = sys.modules["dataclasses"].__dict__
            for mark in _DATACLASS_MARKS:
                if marks.get(mark) is value:
                    return dataclass_mark, (mark,)
        return otherwise(value)

    def _reduce_made_anew(self, kind: type, value: Any) -> Any:
        """Reduce what holds the state of one process: each has its own, as if it had run the program itself."""
        if kind in _LOCKS:
            return make_lock, (_LOCKS[kind],)
        if issubclass(kind, threading.local):
            return (kind, ()) if _is_made_without_arguments(kind) else NotImplemented
        if kind is weakref.WeakSet:
            return kind, ([item for item in self._weak_entries(value, iter) if self._stays(item)],)
        if kind is weakref.WeakKeyDictionary or kind is weakref.WeakValueDictionary:
            weak = 0 if kind is weakref.WeakKeyDictionary else 1
            entries = self._weak_entries(value, kind.items)
            return kind, (), None, None, iter([entry for entry in entries if self._stays(entry[weak])])
        if kind.__name__ == "ContextVar" and kind.__module__ in ("_contextvars", "contextvars"):
            return make_context_variable, (value.name, *_default_of(value))
        return NotImplemented

    def _weak_entries(self, container: Any, entries: Callable[[Any], Iterable[Any]]) -> list[Any]:
        if len(container) > _MAX_WEAK_ENTRIES:
            return []
        while True:
            try:
                return list(entries(container))
            except RuntimeError:
                pass  # "changed size during iteration": another thread fills it

    def _stays(self, value: Any) -> bool:
        """Tell whether a weak container keeps this on the other side: modules hold their functions and classes there;
        of any other value it would get a copy that nothing holds."""
        return isinstance(value, (type, FunctionType)) and finds_by_name(self._policy, value)

    def _reduce_function(self, function: FunctionType) -> Any:
        """Reduce a function of `__main__` to its code; the names in it mean the other side's globals."""
        code = function.__code__
        self._names |= global_names(code)
        cells = [_content_of(cell) for cell in function.__closure__ or ()]
        state = (
            function.__qualname__,
            function.__module__,
            function.__doc__,
            function.__defaults__,
            function.__kwdefaults__,
            function.__annotations__,
            function.__dict__,
            getattr(function, "__type_params__", ()),
            cells,
        )
        arguments = (marshal.dumps(code), function.__name__, len(cells))
        return make_function, arguments, state, None, None, set_function_state


def _is_made_without_arguments(cls: Any) -> bool:
    """Tell whether all instances of a `threading.local` were made alike, and do not pickle by a way of their own."""
    for name in ("__new__", "__reduce_ex__", "__reduce__", "__getstate__"):
        if getattr(cls, name, None) is not getattr(threading.local, name, None):
            return False
    if cls in copyreg.dispatch_table:
        return False
    init = cls.__init__
    if type(init) is not FunctionType:
        return init is threading.local.__init__
    code = init.__code__
    return code.co_argcount == 1 and not code.co_kwonlyargcount and not code.co_flags & _TAKES_ANY_ARGUMENTS


def _default_of(variable: Any) -> tuple[Any, ...]:
    """Return the default of a context variable, in a tuple; () if it has none."""
    from contextvars import Context

    try:
        return (Context().run(variable.get),)
    except LookupError:
        return ()


def _content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return EmptyCell


def _as_made_here(cls: type, reduced: Any) -> Any:
    """Have cloudpickle make a class with its slots, which it sets when the class is there, and that is too late; and
    without the hooks for new subclasses, which have done their work where the class was written."""
    if type(reduced) is not tuple or getattr(reduced[0], "__name__", "") != "_make_skeleton_class":
        return reduced
    arguments, state = reduced[1], reduced[2]
    slots = cls.__dict__.get("__slots__", ())
    names = {slots} if isinstance(slots, str) else set(slots)
    if names and isinstance(arguments[3], dict) and isinstance(state, tuple) and isinstance(state[0], dict):
        arguments = (*arguments[:3], {**arguments[3], "__slots__": slots}, *arguments[4:])
        private = {f"_{cls.__name__.lstrip('_')}{name}" for name in names}  # the descriptors of `__name` slots
        left_out = {"__slots__", *names, *private}
        state = ({name: value for name, value in state[0].items() if name not in left_out}, *state[1:])
    return (make_class, (reduced[0], *arguments), state, *reduced[3:])
