"""The client's `__main__` in workers: what is defined there travels by name.

A function or class of `__main__` is pickled as its name, as any other module's is. What the name stands for travels
apart, once: each global that a call can reach, through the code of the functions that it names, is a *definition*
(name, version, pickle). A worker's `sys.modules["__main__"]` takes a definition only if it is newer than what it has.
So the globals are the same objects from one call of a worker to the next, as if the worker had imported the program
itself, and an initializer, a cache or a counter does there what it does under ProcessPoolExecutor.

When a global gets a new version: when another object is bound to its name; when its content changed and it is small
(its pickle is compared); of a class, when its methods, bases or attributes were set anew. An attribute that the worker
has set itself since stays as the worker set it.

What a worker inherited by fork, it has: such a name is sent only once another object is bound to it, or the
inheritance is lost. Then also calls that were made before need definitions, so the names that they need are noted.

This module knows pickles and names. When a definition is sent to whom is decided where functions are (`functions`,
`protocol.functions`).
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
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any, Final, NamedTuple, Protocol

from scaler_executor.protocol.messages import Frames, Payload

PROTOCOL: Final = 5
#: The content of larger definitions is not compared: they are sent again when another object is bound to the name.
MAX_COMPARED_BYTES: Final = 1 << 14

_ABSENT: Final = object()
_ATOMS: Final = frozenset({int, float, str, bytes, bool, type(None), complex, range, ModuleType, BuiltinFunctionType})
_LRU_WRAPPER: Final = type(lru_cache(maxsize=None)(len))
_SINGLE_DISPATCH: Final = functools.singledispatch(len).__code__  # type: ignore[attr-defined]
_LOCKS: Final = {type(threading.Lock()): "Lock", type(threading.RLock()): "RLock"}
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


def main_dict() -> dict[str, Any]:
    """Return the globals of `__main__`, here."""
    return getattr(sys.modules.get("__main__"), "__dict__", {})


class Names(Protocol):
    """Decides which functions and classes of `__main__` the other side finds by name."""

    def find(self, value: Any) -> str | None:
        """Return the global's name under which a function or class is found, None if it is to travel by value."""


# The client's side


class Definition:
    """What a name of `__main__` stood for when it was last looked at."""

    __slots__ = ("content", "deps", "failures", "held", "is_fixed", "looks_left", "name", "payload", "version")

    def __init__(
        self,
        name: str,
        held: Any,
        payload: Payload,
        deps: frozenset[str],
        content: Any,
        is_fixed: bool,
        failures: int = 0,
    ) -> None:
        self.name = name
        #: 0: the workers inherited it, and it is not sent.
        self.version = 0
        #: The object that it was bound to, see `_hold`.
        self.held = held
        self.payload = payload
        #: Names that are needed where this one is.
        self.deps = deps
        #: See `_content`.
        self.content = content
        #: Whether it stays as it is while the name is bound to the same object.
        self.is_fixed = is_fixed
        #: How often in a row it could not be pickled, and how often it may be asked for before that is tried again.
        self.failures = failures
        self.looks_left = 1 << min(failures, 12)


class Needs(NamedTuple):
    """The definitions that go with a call."""

    definitions: tuple[Definition, ...]
    #: Names that were asked for.
    names: frozenset[str]
    #: Every name that was looked at, and the object that it was bound to, see `_hold`.
    bindings: tuple[tuple[str, Any], ...]
    is_fixed: bool
    #: How often what workers inherited had been lost.
    generation: int


NO_NEEDS: Final = Needs((), frozenset(), (), True, 0)


class MainDefinitions:
    """The definitions of this process's `__main__`. Thread-safe."""

    def __init__(self) -> None:
        #: {name: object}, what workers inherit, see `_hold`.
        self._inherited: dict[str, Any] = {}
        #: How often that was lost.
        self.generation = 0
        #: Names that were asked for while there was an inheritance. Added to under `_lock`.
        self._counted_on: frozenset[str] = frozenset()
        #: {name: Definition}: the newest of each.
        self._known: dict[str, Definition] = {}
        #: {id of an object: the name that it was first found under}. Another name for it is sent as that name's. It may
        #: be the id of another object by now.
        self._owners: dict[int, str] = {}
        #: Held while the newest version is chosen, never while user code runs.
        self._lock = threading.Lock()

    def inherit(self, inherited: dict[str, Any]) -> None:
        """Note what workers inherit. Before the first question."""
        assert not self._known
        self._inherited = {name: _hold(value) for name, value in inherited.items()}

    def forget_inherited(self) -> None:
        """Workers inherit nothing from now on."""
        with self._lock:
            self.generation += 1
            self._inherited = {}
            self._known = {name: known for name, known in self._known.items() if known.version}

    def counted_on(self) -> tuple[Definition, ...]:
        """Return the definitions of what was asked for while it was inherited, as they are now. After
        `forget_inherited`."""
        return self.needs(self._counted_on).definitions

    def find(self, value: Any) -> str | None:
        """As `Names.find`: what `__main__` has under its name now."""
        return find_in(main_dict(), value)

    def needs(self, names: Iterable[str]) -> Needs:
        """Return the definitions that these names need, directly or through others, as they are now."""
        asked = frozenset(names)
        generation = self.generation
        if not asked:
            return NO_NEEDS._replace(generation=generation) if generation else NO_NEEDS
        if self._inherited and not asked <= self._counted_on:
            with self._lock:
                self._counted_on |= asked
        main = main_dict()
        bindings: dict[str, Any] = {}
        definitions: list[Definition] = []
        is_fixed = True
        waiting = list(asked)
        while waiting:
            name = waiting.pop()
            if name in bindings:
                continue
            value = main.get(name, _ABSENT)
            if value is _ABSENT:
                bindings[name] = value
                continue
            definition = self._define(name, value)
            bindings[name] = definition.held
            if definition.version:
                definitions.append(definition)
            is_fixed = is_fixed and definition.is_fixed
            waiting.extend(definition.deps)
        definitions.sort(key=_by_name)
        return Needs(tuple(definitions), asked, tuple(bindings.items()), is_fixed, generation)

    def are_current(self, needs: Needs) -> bool:
        """Tell whether `needs` would be the same now."""
        if needs.generation != self.generation:
            return False
        if not needs.bindings:
            return True
        get = main_dict().get
        for name, held in needs.bindings:
            if not _is_held(held, get(name, _ABSENT)):
                return False
        return needs.is_fixed or self.needs(needs.names).definitions == needs.definitions

    def _define(self, name: str, value: Any) -> Definition:
        """Return the definition of a name that is bound to `value`, a new version if need be."""
        while True:
            known = self._known.get(name)
            if known is None and _is_held(self._inherited.get(name, _ABSENT), value):
                definition = Definition(name, _hold(value), b"", frozenset(_names_reached(value)), None, True)
            elif known is not None and self._is_current(known, value):
                return known
            else:
                definition = self._pickle(name, value, known)
                if definition is known:
                    return known
            if self._publish(definition, known):
                return definition
            # Another thread was quicker, and the object that it has published may be the later one.
            value = main_dict().get(name, value)

    def _is_current(self, known: Definition, value: Any) -> bool:
        if not _is_held(known.held, value):
            return False
        if known.failures:
            known.looks_left -= 1
            return known.looks_left > 0
        return known.is_fixed or _is_same(known.content, _content(value))

    def _pickle(self, name: str, value: Any, known: Definition | None) -> Definition:
        """Return a definition of `value`, or `known` if it is no other."""
        content = _content(value)
        names: set[str] = set()
        is_same = known is not None and _is_held(known.held, value)
        owner = self._owners.setdefault(id(value), name) if content is None else name
        first = self._known.get(owner) if owner != name else None
        payload: Payload
        if first is not None and _is_held(first.held, value) and main_dict().get(owner) is value:
            names.add(owner)
            payload = b"\x80\x05c__main__\n%b\n." % owner.encode()  # PROTO 5, GLOBAL, STOP
        else:
            try:
                payload = _dumps_definition(name, value, self, names)
            except Exception as error:
                if known is not None and is_same and not known.failures:
                    return known  # another thread is changing it: better as it was than not at all
                # Whoever uses it is told why it is not there.
                payload = pickle.dumps(Unsendable(f"{type(error).__name__}: {error}"), PROTOCOL)
                failures = known.failures + 1 if known is not None and is_same else 1
                return Definition(name, _hold(value), payload, frozenset(), content, False, failures)
        names.discard(name)
        is_large = len(payload) > MAX_COMPARED_BYTES
        if known is not None and not is_large and isinstance(payload, bytes) and payload == known.payload:
            known.held, known.content, known.deps = _hold(value), content, frozenset(names)
            return known
        is_fixed = type(value) in _ATOMS or is_large or (type(value) is FunctionType and content is not None)
        return Definition(name, _hold(value), payload, frozenset(names), content, is_fixed)

    def _publish(self, definition: Definition, known: Definition | None) -> bool:
        """Make a definition the newest, unless another thread has made one since `known`."""
        with self._lock:
            if self._known.get(definition.name) is not known:
                return False
            if definition.payload:
                definition.version = known.version + 1 if known is not None else 1
            self._known[definition.name] = definition
            if len(self._owners) > 2 * len(self._known) + 64:
                self._owners = {id(_value_of(of_name.held)): name for name, of_name in self._known.items()}
            return True


def _by_name(definition: Definition) -> str:
    return definition.name


def snapshot() -> dict[str, Any]:
    """Return {name: value} of this process's `__main__`, which processes forked from now on have as well."""
    return dict(main_dict())


def _hold(value: Any) -> Any:
    """Return what tells a value from others without keeping it alive; where that cannot be, the value."""
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _value_of(held: Any) -> Any:
    return held() if type(held) is weakref.ReferenceType else held


def _is_held(held: Any, value: Any) -> bool:
    return held is value or (type(held) is weakref.ReferenceType and held() is value)


def find_in(main: dict[str, Any], value: Any) -> str | None:
    """Return the global of `main` through which a function or class is found under its qualified name."""
    if getattr(value, "__module__", None) != "__main__":
        return None
    top, *rest = value.__qualname__.split(".")
    found = main.get(top)
    for name in rest:
        found = getattr(found, name, None)
    return top if found is value else None


def _content(value: Any) -> Any:
    """Return what is equal as long as a pickle of `value` would surely be the same, None where nothing cheap is."""
    kind = type(value)
    if kind in _ATOMS:
        return ()
    if kind is FunctionType:
        if value.__closure__ or value.__kwdefaults__ or value.__dict__:
            return None
        defaults = value.__defaults__ or ()
        return (value.__code__, defaults) if all(type(default) in _ATOMS for default in defaults) else None
    if isinstance(value, type):
        attributes = list(value.__dict__.items())
        return (value.__bases__, attributes, [_code_of(attribute) for _, attribute in attributes])
    return None


def _code_of(value: Any) -> Any:
    return value.__code__ if type(value) is FunctionType else None


def _is_same(before: Any, now: Any) -> bool:
    """Compare two `_content`s by identity of what they hold: `==` could be anything."""
    if before is None or now is None:
        return False
    if type(before) is tuple or type(before) is list:
        return type(now) is type(before) and len(before) == len(now) and all(map(_is_same_part, before, now))
    return before is now


def _is_same_part(before: Any, now: Any) -> bool:
    return before is now or _is_same(before, now)


# Which names code reaches


@lru_cache(maxsize=4096)
def _global_names(code: CodeType) -> frozenset[str]:
    """Return the globals that code names, also in the functions and classes that it defines."""
    import dis

    names = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if "GLOBAL" in instruction.opname or instruction.opname == "LOAD_NAME"
    }
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _global_names(constant)
    return frozenset(names)


def _names_reached(value: Any, depth: int = 4) -> set[str]:
    """Return the globals that functions name which `value` is, wraps or has as methods."""
    names: set[str] = set()
    if depth == 0:
        return names
    kind = type(value)
    parts: list[Any] = []
    if kind is FunctionType:
        if value.__globals__ is main_dict():
            names |= _global_names(value.__code__)
        for cell in value.__closure__ or ():
            try:
                parts.append(cell.cell_contents)
            except ValueError:
                pass  # empty
        parts += [getattr(value, "__wrapped__", None), *(value.__defaults__ or ())]
    elif isinstance(value, type):
        if value.__module__ == "__main__":
            parts += [*value.__bases__, type(value), *value.__dict__.values()]
            names.add(value.__qualname__.partition(".")[0])
    elif kind in (staticmethod, classmethod):
        parts.append(value.__func__)
    elif kind is property:
        parts += [value.fget, value.fset, value.fdel]
    elif kind is _LRU_WRAPPER:
        parts.append(value.__wrapped__)
    elif kind is functools.partial:
        parts += [value.func, *value.args, *value.keywords.values()]
    elif getattr(kind, "__module__", None) == "__main__":
        parts.append(kind)
    for part in parts:
        names |= _names_reached(part, depth - 1)
    return names


# Picklers


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

    def reducer_override(self, value: Any) -> Any:
        """As pickle.Pickler."""
        return self._reducer.reduce(value, _refuse_by_value)


def _multiprocessing_reducers() -> dict[Any, Any]:
    """Return how multiprocessing pickles sockets, connections and the like, as ProcessPoolExecutor does."""
    reduction: Any = sys.modules.get("multiprocessing.reduction")
    return {} if reduction is None else dict(reduction.ForkingPickler._extra_reducers)


class NeedsCloudpickle(Exception):
    """This is to be pickled by value, which only cloudpickle does."""


def _refuse_by_value(value: Any) -> Any:
    if isinstance(value, ModuleType) or (
        isinstance(value, (type, FunctionType)) and getattr(value, "__module__", None) == "__main__"
    ):
        raise NeedsCloudpickle  # C pickle would look for it under its name
    return NotImplemented


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
        if kind is FunctionType or kind is _LRU_WRAPPER or isinstance(value, type):
            name = self._policy.find(value)
            if name is not None and name != self._defined_name:
                self._names.add(name)
                return NotImplemented
            if isinstance(value, FunctionType):
                if value.__globals__ is main_dict():
                    reduced = self._reduce_function(value)
                elif value.__code__ is _SINGLE_DISPATCH:
                    registry = dict(value.registry)  # type: ignore[attr-defined]
                    reduced = _make_single_dispatch, (registry.pop(object), list(registry.items()))
                else:
                    reduced = otherwise(value)
            elif kind is _LRU_WRAPPER:
                if value.__module__ != "__main__":
                    return otherwise(value)
                reduced = _make_lru_cache, (value.__wrapped__, value.cache_parameters())
            else:
                reduced = _as_made_here(value, otherwise(value))
            if value is self._defined and type(reduced) is tuple:
                # Bound as soon as it is made: what it is made of may refer to it by name.
                reduced = (_make_bound, (self._defined_name, reduced[0], reduced[1]), *reduced[2:])
            return reduced
        if isinstance(value, ModuleType) and sys.modules.get(value.__name__) is value:
            return _import_module, (value.__name__,)
        if self._defined is not _ABSENT and kind in _LOCKS:
            return _make_lock, (_LOCKS[kind],)
        if kind.__module__ == "dataclasses":
            marks = sys.modules["dataclasses"].__dict__
            for mark in _DATACLASS_MARKS:
                if marks.get(mark) is value:
                    return _dataclass_mark, (mark,)
        return otherwise(value)

    def _reduce_function(self, function: FunctionType) -> Any:
        """Reduce a function of `__main__` to its code; the names in it mean the other side's globals."""
        code = function.__code__
        self._names |= _global_names(code)
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
        return _make_function, arguments, state, None, None, _set_function_state


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

        def reducer_override(self, value: Any) -> Any:
            return self._reducer.reduce(value, super().reducer_override)

    return ByValuePickler


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
    return (_make_class, (reduced[0], *arguments), state, *reduced[3:])


def _dumps_definition(name: str, value: Any, policy: Names, names: set[str]) -> Payload:
    buffers: list[Any] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:
            return True
        if len(view) <= MAX_COMPARED_BYTES:
            return True
        buffers.append(bytes(view))
        return False

    try:
        data = dumps_by_name(value, keep_in_band, buffers, policy, names, (name, value))
    except RuntimeError:
        if type(value) not in (dict, list, set):
            raise
        # "changed size during iteration": another thread fills it. A copy is made in one step.
        buffers.clear()
        copied = value.copy()
        data = dumps_by_name(copied, keep_in_band, buffers, policy, names, (name, copied))
    return Frames([data, *buffers]) if buffers or len(data) > MAX_COMPARED_BYTES else data


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
        refused = error
    buffers.clear()
    try:
        with io.BytesIO() as file:
            _by_value_pickler()(file, buffer_callback, policy, names, defined).dump(value)
            return file.getvalue()
    except ImportError:
        if isinstance(refused, NeedsCloudpickle):
            raise pickle.PicklingError("cloudpickle is not installed") from None
        raise refused from None
    except Exception as error:
        # cloudpickle refuses less: what it names is the real obstacle. C pickle may have stopped at a mere lambda.
        raise error from None


# What the pickles name


class Unsendable:
    """Stands for a global that could not be pickled."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class EmptyCell:
    """Stands for the content of a cell that has none."""


def _content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return EmptyCell


def _make_function(code: bytes, name: str, cells: int) -> FunctionType:
    main = main_dict()
    main.setdefault("__builtins__", __builtins__)
    return FunctionType(marshal.loads(code), main, name, None, tuple(CellType() for _ in range(cells)))


def _set_function_state(function: FunctionType, state: tuple[Any, ...]) -> None:
    qualname, module, doc, defaults, kwdefaults, annotations, attributes, type_params, contents = state
    function.__qualname__ = qualname
    function.__module__ = module
    function.__doc__ = doc
    function.__defaults__ = defaults
    function.__kwdefaults__ = kwdefaults
    function.__annotations__ = annotations
    function.__dict__.update(attributes)
    if type_params:
        function.__type_params__ = type_params  # type: ignore[attr-defined]
    for cell, content in zip(function.__closure__ or (), contents, strict=True):
        if content is not EmptyCell:
            cell.cell_contents = content


def _make_bound(name: str, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    value = main_dict()[name] = make(*arguments)
    return value


def _make_class(make: Callable[..., type], *arguments: Any) -> type:
    """Make a class as cloudpickle does, but without `__init_subclass__` of its bases."""
    bases = [base for base in arguments[2] if isinstance(base, type)]
    hooks = {
        parent: parent.__dict__["__init_subclass__"]
        for base in bases
        for parent in base.__mro__
        if parent.__module__ == "__main__" and "__init_subclass__" in parent.__dict__
    }
    try:
        for parent in hooks:
            type.__setattr__(parent, "__init_subclass__", classmethod(_ignore_subclass))
        return make(*arguments)
    finally:
        for parent, hook in hooks.items():
            type.__setattr__(parent, "__init_subclass__", hook)


def _ignore_subclass(cls: Any, /, **options: Any) -> None:
    """Do nothing: see `_make_class`."""


def _make_lru_cache(function: Any, parameters: dict[str, Any]) -> Any:
    return lru_cache(**parameters)(function)


def _make_single_dispatch(default: Any, others: list[tuple[type, Any]]) -> Any:
    function = functools.singledispatch(default)
    for cls, implementation in others:
        function.register(cls, implementation)
    return function


def _make_lock(kind: str) -> Any:
    return getattr(threading, kind)()


def _import_module(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def _dataclass_mark(name: str) -> Any:
    import dataclasses

    return getattr(dataclasses, name)


# The worker's side


class WorkerMain:
    """`__main__` in a worker.

    Args:
        inherited: See `snapshot`; None where nothing was.
    """

    def __init__(self, inherited: dict[str, Any] | None) -> None:
        self._inherited = inherited or {}
        #: {name: version} of what was taken.
        self._versions: dict[str, int] = {}
        #: {name: (version, payload)} of what is to be taken before the next call.
        self.pending: dict[str, tuple[int, Payload]] = {}
        #: {name: why it is not there}
        self._missing: dict[str, str] = {}
        #: {class name: its attributes as they came}
        self._attributes: dict[str, dict[str, Any]] = {}

    def put(self, name: str, version: int, payload: Payload) -> None:
        """Note a definition, if it is newer than what is here."""
        if version > self._versions.get(name, 0) and version > self.pending.get(name, (0,))[0]:
            self.pending[name] = (version, payload)

    def apply(self) -> None:
        """Take what is pending. A definition that cannot be unpickled is missing, for whoever uses it.

        Raises:
            KeyboardInterrupt: The call was interrupted.
        """
        while self.pending:
            self.resolve(next(iter(self.pending)))

    def resolve(self, name: str) -> None:
        """Take one definition."""
        version, payload = self.pending.pop(name)
        main = main_dict()
        before = main.get(name, _ABSENT)
        if (
            before is not _ABSENT
            and name not in self._versions
            and name not in self._inherited
            and not name.startswith("__")
        ):
            self._versions[name] = version
            return  # a call has set it here, by a way that we do not see
        self._missing.pop(name, None)
        set_here = self._attributes_set_here(name, before)
        try:
            value = _DefinitionUnpickler(self, payload).load()
        except KeyboardInterrupt:
            self.pending[name] = (version, payload)
            raise
        except BaseException as error:
            value = Unsendable(f"it cannot be unpickled here: {type(error).__name__}: {error}")
        self._versions[name] = version
        if type(value) is Unsendable:
            self._missing[name] = value.reason
            main.pop(name, None)
            return
        main[name] = value
        if isinstance(value, type):
            if value is before:
                for attribute, content in set_here.items():
                    setattr(value, attribute, content)
            self._attributes[name] = dict(value.__dict__)

    def find(self, value: Any) -> str | None:
        """As `Names.find`: what came from the client, or was inherited, and is still bound to its name."""
        main = main_dict()
        name = find_in(main, value)
        if name is None or name in self._versions:
            return name
        return name if self._inherited.get(name, _ABSENT) is main.get(name) else None

    def explain(self, error: BaseException) -> str | None:
        """Return why a name is not there on which a call failed, None if it is not about one."""
        if not self._missing or not isinstance(error, (NameError, AttributeError)):
            return None
        name = getattr(error, "name", None)
        if name not in self._missing:
            text = str(error)
            name = next((missing for missing in self._missing if f"'{missing}'" in text), None)
        if name is None:
            return None
        return f"'{name}' of the program's __main__ could not be sent to the worker: {self._missing[name]}"

    def _attributes_set_here(self, name: str, value: Any) -> dict[str, Any]:
        """Return the attributes of a class that calls have set since it came."""
        came = self._attributes.get(name)
        if came is None or not isinstance(value, type):
            return {}
        return {key: content for key, content in value.__dict__.items() if key in came and came[key] is not content}


class _DefinitionUnpickler(pickle.Unpickler):
    """Resolves pending names where it comes to them, so that their order does not matter."""

    def __init__(self, main: WorkerMain, payload: Payload) -> None:
        data, *buffers = payload.buffers if isinstance(payload, Frames) else [payload]
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._main = main

    def find_class(self, module: str, name: str) -> Any:
        """As pickle.Unpickler."""
        if module == "__main__":
            top = name.partition(".")[0]
            if top in self._main.pending:
                self._main.resolve(top)
        return super().find_class(module, name)
