"""The functions that the other side of a connection knows, by id.

This module knows which callables may be sent once and then named by a number. It does not send anything.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final, NamedTuple

from scaler_executor.protocol.messages import CallStyle, Function, Payload
from scaler_executor.runtime.calls import CallPickler, name_of
from scaler_executor.runtime.namespace import NO_NEEDS, Definition, MainDefinitions, Needs
from scaler_executor.runtime.segments import holds_segments
from scaler_executor.runtime.terms import NO_OPTIONS, KnownCalls, Terms

MAX_FUNCTIONS: Final = 512
MAX_FUNCTION_BYTES: Final = 64 << 20
NO_TERMS: Final = Terms(NO_OPTIONS)


class PreparedFunction(NamedTuple):
    """A callable made ready for `FunctionTable.register`."""

    function: Any  # of functions found by name: the object; else None
    style: CallStyle
    name: str
    blob: Payload | None  # None: carried by each call
    names: frozenset[str] = frozenset()  # globals of `__main__` that it needs


class KnownFunction:
    """A function that has an id. Also in use while it is not known any more, by whoever found it before."""

    __slots__ = (
        "_attributes",
        "_module_name",
        "calls",
        "function",
        "function_id",
        "is_known",
        "name",
        "needs",
        "payload",
        "size_bytes",
        "was_used",
    )

    def __init__(
        self,
        function: Any,
        function_id: int,
        name: str,
        size_bytes: int,
        needs: Needs,
        calls: KnownCalls,
        payload: Payload | None,
    ) -> None:
        #: Kept alive, since its id() is the key; None where the key is a blob.
        self.function = function
        self.function_id = function_id
        self.name = name
        self.size_bytes = size_bytes
        #: Kept alive where it has parts in files; else None.
        self.payload = payload
        #: The definitions that were current when it was registered.
        self.needs = needs
        #: With what it was registered, which stays the same object as long as this does.
        self.calls = calls
        #: Until it is evicted.
        self.is_known = True
        #: Since the eviction last came by.
        self.was_used = True
        self._module_name = function.__module__ if function is not None else ""
        self._attributes = function.__qualname__.split(".") if function is not None else []

    def is_current(self) -> bool:
        """Tell whether the function is still what its name leads to: it may have been redefined or patched."""
        found = sys.modules.get(self._module_name)
        for name in self._attributes:
            found = getattr(found, name, None)
        return found is self.function


class FunctionTable:
    """Hands out the ids. Bounded: functions that were not called for long are forgotten (second chance).

    Functions and classes that are found by name are known by identity. Any others are pickled at every call, because
    what they hold may have changed, and are known by their pickle.

    Not thread-safe: the caller holds its lock from `known_id` or `register` until it has queued, in this order, the new
    function, the call that uses the id, and the ids to forget. Only `prepare`, which runs code of the user's, is called
    without the lock.
    """

    def __init__(
        self,
        pickler: CallPickler,
        main: MainDefinitions,
        *,
        max_functions: int = MAX_FUNCTIONS,
        max_bytes: int = MAX_FUNCTION_BYTES,
    ) -> None:
        self._pickler = pickler
        self._main = main
        self._max_functions = max_functions
        self._max_bytes = max_bytes
        #: {key: entry}, those first that the eviction looks at first. The key is an object of its own, or
        #: (id(function) or the blob, style, definitions, id(calls)).
        self._entries: OrderedDict[Any, KnownFunction] = OrderedDict()
        #: {definition: (id, the keys of the entries that need it)}
        self._definitions: dict[Definition, tuple[int, dict[Any, None]]] = {}
        #: {name: the newest definition that is known}. Entries that need an older one are dropped.
        self._newest: dict[str, Definition] = {}
        self._total_bytes = 0
        #: Key of the last function of style CALL that was too large to be known by its pickle.
        self._passing: Any = None
        #: See `take_retired`.
        self._retired: list[Any] = []
        self._last_id = 0
        #: What workers do first, and its id once it is registered; None: nothing.
        self._setup: Payload | None = None
        self._setup_id = 0
        #: No call has id 0: those of a worker's nested session.
        self.always_registers = False

    def set_up(self, payload: Payload) -> None:
        """Have workers do this before the first call, see `worker.Setup`."""
        self._setup = payload

    def find_call(self, function: Any, calls: KnownCalls) -> KnownFunction | None:
        """Return the one of `calls` that is this function, which is found by name. Needs no lock, but then `is_known`
        has to be looked at once more under the lock."""
        entry: KnownFunction | None = calls.get(id(function))
        if entry is None or not entry.is_current() or not self._main.are_current(entry.needs):
            return None
        entry.was_used = True
        return entry

    def prepare(self, function: Any, style: CallStyle) -> PreparedFunction:
        """Pickle what has to be pickled.

        Raises:
            Exception: What `CallPickler.dumps` raises.
        """
        is_code = isinstance(function, (FunctionType, type))
        is_named = (is_code or type(function) is BuiltinFunctionType) and self._pickler.finds_by_name(function)
        if not is_named and not is_code and style is CallStyle.CALL:
            return PreparedFunction(None, CallStyle.INLINE, name_of(function), None)
        names: set[str] = set()
        blob = self._pickler.dumps_function(function, names)
        return PreparedFunction(function if is_named else None, style, name_of(function), blob, frozenset(names))

    def register(
        self, prepared: PreparedFunction, needs: Needs = NO_NEEDS, terms: Terms = NO_TERMS
    ) -> tuple[int, list[Function], list[int]]:
        """Return the id to call it by, the messages if it is new, and the ids that are forgotten for it.

        Id 0 (style CALL only) means that the caller pickles (function, args, kwargs) together, which keeps the identity
        of what they share: bound methods, partials, callable instances.

        Args:
            prepared: From `prepare`.
            needs: Of the function and of what it is called with.
            terms: With which it is called.
        """
        function, style, name, blob, _ = prepared
        definitions = needs.definitions
        if blob is None:
            if not (definitions or self._setup is not None or terms.are_special or self.always_registers):
                return 0, [], []
            blob = b""
        if function is not None:
            key: Any = (id(function), style, definitions, id(terms.calls))
        elif isinstance(blob, bytes):
            key = (blob, style, definitions, id(terms.calls))
        else:
            key = object()  # comparing a large pickle would cost more than to send it once more
        entry = self._entries.get(key)
        if entry is not None:
            entry.was_used = True
            entry.needs = needs
            if entry.function is not None and style is CallStyle.CALL:
                terms.calls[id(function)] = entry
            return entry.function_id, [], []
        messages: list[Function] = []
        forgotten: list[int] = []
        ids = self._register_setup(messages)
        ids += [self._define(definition, key, messages, forgotten) for definition in definitions]
        self._last_id += 1
        name = terms.name or name
        kept = blob if holds_segments(blob) else None
        entry = KnownFunction(function, self._last_id, name, len(blob), needs, terms.calls, kept)
        self._entries[key] = entry
        if function is not None and style is CallStyle.CALL:
            terms.calls[id(function)] = entry
        self._total_bytes += entry.size_bytes
        if type(key) is object and style is CallStyle.CALL:
            # Never found again. Not before the next one: that may need the same definitions.
            if self._passing in self._entries:
                forgotten += self._drop(self._passing)
            self._passing = key
        forgotten += self._evict()
        entry.was_used = False  # it was True for the eviction, which thus could not take it
        messages.append(Function(entry.function_id, name, blob, int(style), terms.options, ids))  # type: ignore[arg-type]
        return entry.function_id, messages, forgotten

    def _register_setup(self, messages: list[Function]) -> list[int]:
        """Return the id of what workers do first, in a list; have it sent if it is new."""
        if self._setup is None:
            return []
        if not self._setup_id:
            self._last_id += 1
            self._setup_id = self._last_id
            messages.append(Function(self._setup_id, "", self._setup, int(CallStyle.SETUP)))  # type: ignore[arg-type]
        return [self._setup_id]

    def _define(self, definition: Definition, key: Any, messages: list[Function], forgotten: list[int]) -> int:
        """Return a definition's id, for the entry `key`; have it sent if it is new, and older ones forgotten."""
        before = self._newest.get(definition.name)
        if before is None or before.version < definition.version:
            self._newest[definition.name] = definition
            if before is not None and before in self._definitions:
                for old_key in list(self._definitions[before][1]):
                    forgotten += self._drop(old_key)
        if definition not in self._definitions:
            self._last_id += 1
            self._definitions[definition] = self._last_id, {}
            self._total_bytes += len(definition.payload)
            style, version = int(CallStyle.DEFINITION), definition.version
            messages.append(Function(self._last_id, definition.name, definition.payload, style, version=version))  # type: ignore[arg-type]
        known, keys = self._definitions[definition]
        keys[key] = None
        return known

    def forget_main(self) -> list[int]:
        """Forget the functions of `__main__` that are known by name. Return the ids to forget."""
        forgotten = []
        for key, entry in list(self._entries.items()):
            if entry.function is not None and entry.function.__module__ == "__main__":
                forgotten += self._drop(key)
        return forgotten

    def forget_all(self) -> None:
        """Forget everything: the other side knows nothing any more. Ids are not used again."""
        for key in list(self._entries):
            self._drop(key)
        self._newest.clear()
        self._setup_id = 0

    def _drop(self, key: Any) -> list[int]:
        """Forget a function and what only it needs. Return the ids."""
        entry = self._entries.pop(key)
        entry.is_known = False
        if entry.function is not None and entry.calls.get(id(entry.function)) is entry:
            del entry.calls[id(entry.function)]
        self._total_bytes -= entry.size_bytes
        if entry.payload is not None:
            self._retired.append(entry.payload)
        forgotten = [entry.function_id]
        for definition in entry.needs.definitions:
            known, keys = self._definitions[definition]
            keys.pop(key, None)
            if not keys:
                del self._definitions[definition]
                self._total_bytes -= len(definition.payload)
                if holds_segments(definition.payload):
                    self._retired.append(definition)
                forgotten.append(known)
        return forgotten

    def take_retired(self) -> list[Any]:
        """Return what keeps the files of functions that were forgotten since the last time: calls that were made before
        may still need them."""
        retired, self._retired = self._retired, []
        return retired

    def _evict(self) -> list[int]:
        """Forget functions beyond the limits, those that were not used since the last time first. Return the ids."""
        forgotten = []
        entries = self._entries
        while len(entries) > self._max_functions or (self._total_bytes > self._max_bytes and len(entries) > 1):
            key, entry = next(iter(entries.items()))
            if entry.was_used:
                entry.was_used = False
                entries.move_to_end(key)  # the newest is the last to come by a second time
            else:
                forgotten += self._drop(key)
        return forgotten
