"""What `multiprocessing` is told of a worker, so that user code there sees what it sees in any child of a pool.

A worker runs as the body of a multiprocessing process: `current_process`, `parent_process`, the start method, the
authentication key, finalizers, the wait for threads at the end, and what other libraries hook in there (coverage, say)
are then as usual. But the module takes long to import, and most programs never do: where it is not loaded when the
worker starts, it is told as soon as a call imports it.

It relies on names of `multiprocessing.process` that begin with an underscore; the tests run on every Python that we
support.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final

from scaler_executor.runtime.platform import watch_ancestor

_PROCESS: Final = "multiprocessing.process"
_CONTEXT: Final = "multiprocessing.context"
_TRACKER: Final = "multiprocessing.resource_tracker"
_UTIL: Final = "multiprocessing.util"
#: Children of multiprocessing run what they have registered with `atexit`, however they were started, and their
#: finalizers are among it. Before, only fresh interpreters did, and after the finalizers.
_ENDS_BY_ATEXIT: Final = sys.version_info >= (3, 13)


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
    #: The descriptor of the user's process's resource tracker; None: inherited, as far as there is one.
    tracker_fd: int | None = None


def authkey() -> bytes | None:
    """Return this process's key for connections of multiprocessing, if it has one yet."""
    process: Any = sys.modules.get(_PROCESS)
    return None if process is None else bytes(process.current_process().authkey)


def run_as_process(identity: Identity, body: Callable[[], None]) -> int:
    """Run the body of a worker. Return its exit code.

    It ends as a child of multiprocessing ends: finalizers run, threads that are no daemons are waited for. Where
    workers are not forks of the user's process, or Python is new enough, what was registered with `atexit` runs as
    well.
    """
    is_fork = identity.start_method == "fork"
    pools: Any = sys.modules.get("concurrent.futures.thread")
    if pools is not None:
        # Threads of the user's process, which are not here; the one that made the first call is this one now, and would
        # be joined by itself.
        pools._threads_queues.clear()
    if not is_fork:
        atexit.register(_silence_inherited)
    elif _ENDS_BY_ATEXIT:
        atexit._clear()  # those of the user's process
        if _UTIL in sys.modules:
            atexit.register(sys.modules[_UTIL]._exit_function)
    process: Any = sys.modules.get(_PROCESS)
    if _TRACKER in sys.modules:
        _announce_tracker(sys.modules[_TRACKER], identity)
    if process is None or _TRACKER not in sys.modules:
        sys.meta_path.insert(0, _OnImport(identity))
    if process is not None:
        _announce_method(identity)
        try:
            code = int(_make_process(process, identity, body)._bootstrap(_sentinel(identity)))
        except BaseException:
            code = 1  # not the body's, which it catches: a stream that user code has put in place cannot be flushed
    else:
        body()
        code = 0
        util: Any = sys.modules.get(_UTIL)
        if util is not None and not _ENDS_BY_ATEXIT:
            util._exit_function()
        threading._shutdown()  # type: ignore[attr-defined]
    if not is_fork or _ENDS_BY_ATEXIT:
        atexit._run_exitfuncs()
    return code


def _silence_inherited() -> None:
    """Come before the exit functions of the interpreter that workers are forks of.

    They run, for what a start-up hook has begun there goes on in the fork: coverage writes what it has measured. But
    they may find that it has ended already (so does coverage where it measures children of multiprocessing by itself),
    and that is not the user's fault.
    """
    sys.unraisablehook = lambda unraisable: None


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


def _announce_tracker(tracker: Any, identity: Identity) -> None:
    if identity.tracker_fd is not None:
        tracker._resource_tracker._fd = identity.tracker_fd
    elif identity.start_method != "fork":
        # The user's process had none. A tracker of this worker's own must not take what that process makes later for
        # its own.
        for name in ("register", "unregister"):
            setattr(tracker, name, partial(_track, getattr(tracker, name)))


def _track(call: Callable[[str, str], None], name: str, rtype: str) -> None:
    if rtype != "shared_memory":
        call(name, rtype)


class _OnImport:
    """Has multiprocessing told when it is imported."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in (_PROCESS, _CONTEXT, _TRACKER):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader, self._identity)  # type: ignore[assignment]
        return spec


class _Telling:
    """Another loader, and what is to be said behind it."""

    def __init__(self, loader: Any, identity: Identity) -> None:
        self._loader = loader
        self._identity = identity

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__name__ == _PROCESS:
            _announce(module, self._identity)
        elif module.__name__ == _TRACKER:
            _announce_tracker(module, self._identity)
        else:
            _announce_method(self._identity)
