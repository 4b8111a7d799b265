"""What `multiprocessing` is told of a worker, so that user code there sees what it sees in any child of a pool.

A worker runs as the body of a multiprocessing process: `current_process`, `parent_process`, the start method, the
authentication key, finalizers, the wait for threads at the end, and what other libraries hook in there (coverage, say)
are then as usual. But the module takes long to import, and most programs never do: where it is not loaded when the
worker starts, it is told as soon as a call imports it.

It relies on names of `multiprocessing.process` that begin with an underscore; the tests run on every Python that we
support.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final

from scaler_executor.runtime.platform import watch_ancestor

_PROCESS: Final = "multiprocessing.process"
_CONTEXT: Final = "multiprocessing.context"


@dataclass
class Identity:
    """Who a worker is."""

    name: str = "ScalerWorker"
    #: The user's process.
    parent_pid: int = 0
    #: Tells of its end, where that has to be inherited; -1: need not be, or is not.
    parent_fd: int = -1
    start_method: str = "fork"
    #: None: inherited, or the user's process had none when it was asked.
    authkey: bytes | None = None


def authkey() -> bytes | None:
    """Return this process's key for connections of multiprocessing, if it has one yet."""
    process: Any = sys.modules.get(_PROCESS)
    return None if process is None else bytes(process.current_process().authkey)


def run_as_process(identity: Identity, body: Callable[[], None]) -> int:
    """Run the body of a worker. Return its exit code.

    It ends as a child of multiprocessing ends: finalizers run, threads that are no daemons are waited for. Where
    workers are not forks of the user's process, what was registered with `atexit` runs as well.
    """
    process: Any = sys.modules.get(_PROCESS)
    if process is not None:
        _announce_method(identity)
        code = int(_make_process(process, identity, body)._bootstrap(_sentinel(identity)))
    else:
        sys.meta_path.insert(0, _OnImport(identity))
        body()
        code = 0
        util: Any = sys.modules.get("multiprocessing.util")
        if util is not None:
            util._exit_function()
        threading._shutdown()  # type: ignore[attr-defined]
    if identity.start_method != "fork":
        import atexit

        atexit._run_exitfuncs()
    return code


def _sentinel(identity: Identity) -> int | None:
    return watch_ancestor(identity.parent_pid, identity.parent_fd)


def _make_process(process: Any, identity: Identity, body: Callable[[], None]) -> Any:
    class WorkerProcess(process.BaseProcess):  # type: ignore[misc]
        _start_method = None

        def run(self) -> None:
            body()

    made = WorkerProcess(name=identity.name)
    made._parent_pid = identity.parent_pid
    made._parent_name = "MainProcess"
    if identity.authkey is not None:
        made.authkey = identity.authkey
    return made


def _announce(process: Any, identity: Identity) -> None:
    """Tell a module that was imported in a call: as `_bootstrap` does, without its end."""
    made = _make_process(process, identity, lambda: None)
    process._current_process = made
    process._parent_process = process._ParentProcess("MainProcess", identity.parent_pid, _sentinel(identity))


def _announce_method(identity: Identity) -> None:
    context: Any = sys.modules.get(_CONTEXT)
    if context is not None:
        context._force_start_method(identity.start_method)


class _OnImport(MetaPathFinder):
    """Has multiprocessing told when it is imported."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in (_PROCESS, _CONTEXT):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader, self._identity)
        return spec


class _Telling(Loader):
    """Another loader, and what is to be said behind it."""

    def __init__(self, loader: Loader, identity: Identity) -> None:
        self._loader = loader
        self._identity = identity

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__name__ == _PROCESS:
            _announce(module, self._identity)
        else:
            _announce_method(self._identity)
