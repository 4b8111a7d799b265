"""What a name of `__main__` stands for, and which names code reaches.

This module knows functions, classes and the names in their code. It pickles nothing; see `namespace` for the whole.
"""

from __future__ import annotations

import functools
import sys
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, Final, Protocol

LRU_WRAPPER: Final = type(lru_cache(maxsize=None)(len))


def main_dict() -> dict[str, Any]:
    """Return the globals of `__main__`, here."""
    return getattr(sys.modules.get("__main__"), "__dict__", {})


class Names(Protocol):
    """Decides which functions and classes of `__main__` the other side finds by name."""

    def find(self, value: Any) -> str | None:
        """Return the global's name under which a function or class is found, None if it is to travel by value."""


def find_in(main: dict[str, Any], value: Any) -> str | None:
    """Return the global of `main` through which a function or class is found under its qualified name."""
    if getattr(value, "__module__", None) != "__main__":
        return None
    top, *rest = value.__qualname__.split(".")
    found = main.get(top)
    for name in rest:
        found = getattr(found, name, None)
    return top if found is value else None


def finds_by_name(policy: Names, value: Any) -> bool:
    """Tell whether a function or class is found by its module and qualified name, here and on the other side."""
    module_name = getattr(value, "__module__", None)
    module = sys.modules.get(module_name) if isinstance(module_name, str) else None
    if module is None:
        return False
    if module_name == "__main__":
        return policy.find(value) is not None
    found: Any = module
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


@lru_cache(maxsize=4096)
def global_names(code: CodeType) -> frozenset[str]:
    """Return the globals that code names, also in the functions and classes that it defines."""
    import dis

    names = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if "GLOBAL" in instruction.opname or instruction.opname == "LOAD_NAME"
    }
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= global_names(constant)
    return frozenset(names)


def names_reached(value: Any, depth: int = 4) -> set[str]:
    """Return the globals that functions name which `value` is, wraps or has as methods."""
    names: set[str] = set()
    if depth == 0:
        return names
    kind = type(value)
    parts: list[Any] = []
    if kind is FunctionType:
        if value.__globals__ is main_dict():
            names |= global_names(value.__code__)
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
    elif kind is LRU_WRAPPER:
        parts.append(value.__wrapped__)
    elif kind is functools.partial:
        parts += [value.func, *value.args, *value.keywords.values()]
    elif getattr(kind, "__module__", None) == "__main__":
        parts.append(kind)
    for part in parts:
        names |= names_reached(part, depth - 1)
    return names
