"""The client's `__main__` in workers: what is defined there travels by name.

A function or class of `__main__` is pickled as its name, as any other module's is. What the name stands for travels
apart, once: each global that a call can reach, through the code of the functions that it names, is a *definition*
(name, version, pickle). A worker's `sys.modules["__main__"]` takes a definition only if it is newer than what it has.
So the globals are the same objects from one call of a worker to the next, as if the worker had imported the program
itself, and an initializer, a cache or a counter does there what it does under ProcessPoolExecutor.

When a global gets a new version: when another object is bound to its name; when its content changed and it is small
(its pickle is compared); of a class, when its methods, bases or attributes were set anew. An attribute that the worker
has set itself since stays as the worker set it.

What holds the state of one process is each worker's own, as if the worker had imported the program: a lock, a context
variable (with its default), a `threading.local`, a weak container, which keeps no entry but functions and classes.

What a worker inherited by fork, it has: such a name is sent only once another object is bound to it, or the
inheritance is lost. Then also calls that were made before need definitions, so the names that they need are noted.

Five modules:

| | |
|---|---|
| `namespace` | this one, the client's side: the definitions, and when there is a new version |
| `namespace_names` | what a name stands for, which names code reaches |
| `namespace_pickles` | the picklers, of both sides, which leave names names |
| `namespace_making` | what those pickles call where they are loaded |
| `namespace_worker` | the worker's side: takes definitions, says what is missing |

This one knows what `__main__` has now. When a definition is sent to whom is decided where functions are (`functions`,
`protocol.functions`).
"""

from __future__ import annotations

import pickle
import threading
import weakref
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Final, NamedTuple

from scaler_executor.protocol.messages import Frames, Payload
from scaler_executor.runtime.namespace_making import Unsendable
from scaler_executor.runtime.namespace_names import Names, find_in, main_dict, names_reached
from scaler_executor.runtime.namespace_pickles import PROTOCOL, dumps_by_name
from scaler_executor.runtime.segments import SegmentStore, copied, place

#: The content of larger definitions is not compared: they are sent again when another object is bound to the name.
MAX_COMPARED_BYTES: Final = 1 << 14

_ABSENT: Final = object()
_ATOMS: Final = frozenset({int, float, str, bytes, bool, type(None), complex, range, ModuleType, BuiltinFunctionType})


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
        #: Takes large buffers; set once there is one.
        self.store: SegmentStore | None = None
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
                definition = Definition(name, _hold(value), b"", frozenset(names_reached(value)), None, True)
            elif known is not None and self._is_current(known, value):
                return known
            else:
                definition = self._pickle(name, value, known)
                if definition is known:
                    return definition
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
                payload = _dumps_definition(name, value, self, names, self.store)
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
                definition.version = self._version_after(definition.name, known)
            self._known[definition.name] = definition
            if len(self._owners) > 2 * len(self._known) + 64:
                self._owners = {id(_value_of(of_name.held)): name for name, of_name in self._known.items()}
            return True

    def _version_after(self, name: str, known: Definition | None) -> int:
        """Return the version of a new definition, which `known` was the last of."""
        return known.version + 1 if known is not None else 1


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


def _dumps_definition(name: str, value: Any, policy: Names, names: set[str], store: SegmentStore | None) -> Payload:
    buffers: list[Any] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:
            return True
        if len(view) <= MAX_COMPARED_BYTES:
            return True
        buffers.append(view)
        return False

    try:
        data = dumps_by_name(value, keep_in_band, buffers, policy, names, (name, value))
    except RuntimeError:
        if type(value) not in (dict, list, set):
            raise
        # "changed size during iteration": another thread fills it. A copy is made in one step.
        buffers.clear()
        taken = value.copy()
        data = dumps_by_name(taken, keep_in_band, buffers, policy, names, (name, taken))
    if not buffers and len(data) <= MAX_COMPARED_BYTES:
        return data
    return Frames(copied(place(store, [data, *buffers])))
