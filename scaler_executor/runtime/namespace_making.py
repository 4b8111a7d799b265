"""What the pickles of `namespace_pickles` call where they are loaded: makes functions, classes and the like.

This module knows how a thing is made of its parts, in the `__main__` of the process that it runs in. It does not know
where the parts came from; see `namespace` for the whole.
"""

from __future__ import annotations

import functools
import marshal
import threading
from collections.abc import Callable
from functools import lru_cache
from types import CellType, FunctionType
from typing import Any

from scaler_executor.runtime.namespace_names import main_dict


class Unsendable:
    """Stands for a global that could not be pickled."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class EmptyCell:
    """Stands for the content of a cell that has none."""


def make_function(code: bytes, name: str, cells: int) -> FunctionType:
    main = main_dict()
    main.setdefault("__builtins__", __builtins__)
    return FunctionType(marshal.loads(code), main, name, None, tuple(CellType() for _ in range(cells)))


def set_function_state(function: FunctionType, state: tuple[Any, ...]) -> None:
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


def make_bound(name: str, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    value = main_dict()[name] = make(*arguments)
    return value


def make_class(make: Callable[..., type], *arguments: Any) -> type:
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
    """Do nothing: see `make_class`."""


def make_lru_cache(function: Any, parameters: dict[str, Any]) -> Any:
    return lru_cache(**parameters)(function)


def make_single_dispatch(default: Any, others: list[tuple[type, Any]]) -> Any:
    function = functools.singledispatch(default)
    for cls, implementation in others:
        function.register(cls, implementation)
    return function


def make_lock(kind: str) -> Any:
    return getattr(threading, kind)()


def make_context_variable(name: str, *default: Any) -> Any:
    from contextvars import ContextVar

    return ContextVar(name, default=default[0]) if default else ContextVar(name)


def import_module(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def dataclass_mark(name: str) -> Any:
    import dataclasses

    return getattr(dataclasses, name)
