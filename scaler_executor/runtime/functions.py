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

MAX_FUNCTIONS: Final = 512
MAX_FUNCTION_BYTES: Final = 64 << 20


class PreparedFunction(NamedTuple):
    """A callable made ready for `FunctionTable.register`."""

    function: Any  # of functions found by name: the object; else None
    style: CallStyle
    name: str
    blob: Payload | None  # None: carried by each call


class _Entry:
    __slots__ = ("attributes", "function", "function_id", "module_name", "size_bytes")

    def __init__(self, function: Any, function_id: int, size_bytes: int) -> None:
        #: Kept alive, since its id() is the key; None where the key is a blob.
        self.function = function
        self.function_id = function_id
        self.size_bytes = size_bytes
        self.module_name = function.__module__ if function is not None else ""
        self.attributes = function.__qualname__.split(".") if function is not None else []

    def is_current(self) -> bool:
        """Tell whether the function is still what its name leads to: it may have been redefined or patched."""
        found = sys.modules.get(self.module_name)
        for name in self.attributes:
            found = getattr(found, name, None)
        return found is self.function


class FunctionTable:
    """Hands out the ids. Bounded: the functions that were not called for longest are forgotten.

    Functions and classes that are found by name are known by identity. Any others are pickled at every call, because
    what they hold may have changed, and are known by their pickle.

    Not thread-safe: the caller holds its lock from `known_id` or `register` until it has queued, in this order, the new
    function, the call that uses the id, and the ids to forget. Only `prepare`, which runs code of the user's, is called
    without the lock.
    """

    def __init__(
        self, pickler: CallPickler, *, max_functions: int = MAX_FUNCTIONS, max_bytes: int = MAX_FUNCTION_BYTES
    ) -> None:
        self._pickler = pickler
        self._max_functions = max_functions
        self._max_bytes = max_bytes
        #: {key: entry}, least recently used first. The key is (id(function), style), (blob, style) or an object of its
        #: own.
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._total_bytes = 0
        self._last_id = 0

    def lookup(self, function: Any, style: CallStyle) -> tuple[int, Function | None, list[int]]:
        """Return the id to call it by, the message if it is new, and the ids that are forgotten for it.

        Id 0 (style CALL only) means that the caller pickles (function, args, kwargs) together, which keeps the identity
        of what they share: bound methods, partials, callable instances.

        Raises:
            Exception: What `CallPickler.dumps` raises.
        """
        known = self.known_id(function, style)
        if known:
            return known, None, []
        return self.register(self.prepare(function, style))

    def known_id(self, function: Any, style: CallStyle) -> int:
        """Return the id of a function that is known by identity, or 0: it is to be prepared and registered."""
        key = (id(function), style)
        entry = self._entries.get(key)
        if entry is None or not entry.is_current():
            return 0
        self._entries.move_to_end(key)
        return entry.function_id

    def prepare(self, function: Any, style: CallStyle) -> PreparedFunction:
        """Pickle what has to be pickled.

        Raises:
            Exception: What `CallPickler.dumps` raises.
        """
        is_definition = isinstance(function, (FunctionType, type))
        is_named = (is_definition or type(function) is BuiltinFunctionType) and self._pickler.finds_by_name(function)
        if not is_named and not is_definition and style is CallStyle.CALL:
            return PreparedFunction(None, CallStyle.INLINE, name_of(function), None)
        blob = self._pickler.dumps_function(function)
        return PreparedFunction(function if is_named else None, style, name_of(function), blob)

    def register(self, prepared: PreparedFunction) -> tuple[int, Function | None, list[int]]:
        """Do the rest of `lookup`."""
        function, style, name, blob = prepared
        if blob is None:
            return 0, None, []
        if function is not None:
            key: Any = (id(function), style)
        elif isinstance(blob, bytes):
            key = (blob, style)
        else:
            key = object()  # comparing a large pickle would cost more than to send it once more
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            return entry.function_id, None, []
        self._last_id += 1
        entry = self._entries[key] = _Entry(function, self._last_id, len(blob))
        self._total_bytes += entry.size_bytes
        return self._last_id, Function(self._last_id, name, blob, int(style)), self._evict()  # type: ignore[arg-type]

    def _evict(self) -> list[int]:
        """Forget the functions beyond the limits, but not the newest. Return their ids."""
        evicted = []
        while len(self._entries) > self._max_functions or (
            self._total_bytes > self._max_bytes and len(self._entries) > 1
        ):
            _, entry = self._entries.popitem(last=False)
            self._total_bytes -= entry.size_bytes
            evicted.append(entry.function_id)
        return evicted
