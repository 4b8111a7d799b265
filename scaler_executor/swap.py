"""Replaces `concurrent.futures.ProcessPoolExecutor` by ScalerExecutor, in this process.

This module knows the two modules in which the class is found. `concurrent.futures` looks it up on first use, since
`concurrent.futures.process` is slow to import; so do we, and replace it in that module when somebody imports it.
Nothing of ours is imported before the program asks for the class by one of these names.

What has taken the class before `install` keeps the standard library's.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False  # as in `scaler_executor`: this runs at the start of programs that may never want a pool
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from typing import Any

_NAME = "ProcessPoolExecutor"
_PACKAGE = "concurrent.futures"
_MODULE = "concurrent.futures.process"

#: The class that is put in place, once it has been made.
_made: list[type] = []


def install() -> None:
    """Replace the class where it is now, and where it will be imported."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    # The submodule first: the package may have taken the class from it.
    for name in (_MODULE, _PACKAGE):
        if name in sys.modules:
            _swap(sys.modules[name])


def replacement() -> type:
    """Return the class that is put in place: a ScalerExecutor by the name of what it stands for.

    By that name it is pickled. So a process without the swap that is sent the class takes the standard library's.
    """
    if not _made:
        from scaler_executor.executor import ScalerExecutor

        class ProcessPoolExecutor(ScalerExecutor):
            __doc__ = ScalerExecutor.__doc__
            __module__ = _MODULE
            __qualname__ = _NAME

        _made.append(ProcessPoolExecutor)
    return _made[0]  # the same for two threads that come here at once


def _swap(module: ModuleType) -> None:
    """Replace the class in one of the two modules, which has just been run or was there before."""
    if module.__name__ == _MODULE:
        module.ProcessPoolExecutor = replacement()  # type: ignore[attr-defined]
        return
    look_up = module.__getattr__

    def __getattr__(name: str) -> Any:
        if name != _NAME:
            return look_up(name)
        module.ProcessPoolExecutor = value = replacement()  # type: ignore[attr-defined]
        return value

    module.__dict__.pop(_NAME, None)
    module.__getattr__ = __getattr__  # type: ignore[method-assign]


class _Finder:
    """Leaves every module to the finders behind it, and sees to it that the two are swapped when they have been run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (_PACKAGE, _MODULE):
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _swap_after(spec.loader)
                return spec
        return None


def _swap_after(loader: Loader) -> None:
    """Have the next module that `loader` runs swapped.

    Its method is replaced, and not the loader: the module's source is looked up through it, by tracebacks for example.
    """
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        if module.__name__ in (_PACKAGE, _MODULE):
            _swap(module)

    loader.exec_module = exec_module  # type: ignore[method-assign]
