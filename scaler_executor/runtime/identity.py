"""What `multiprocessing` is told of a worker, so that user code there sees what it sees in any child of a pool.

A worker runs as the body of a multiprocessing process: `current_process`, `parent_process`, the start method, the
authentication key, finalizers, the wait for threads at the end, and what other libraries hook in there (coverage, say)
are then as usual. But the module takes long to import, and most programs never do: where it is not loaded when the
worker starts, it is told as soon as a call imports it.

The authentication key is the one thing that both sides must agree on although neither may have loaded the module: the
user's process chooses it at its first call, and gives it to its own `multiprocessing` where that comes later.

It relies on names of `multiprocessing.process` that begin with an underscore; the tests run on every Python that we
support.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
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
    #: See `authkey`; None: inherited.
    authkey: bytes | None = field(default=None, repr=False)
    #: The descriptor of the user's process's resource tracker; None: inherited, as far as there is one.
    tracker_fd: int | None = None


#: This process's key, unless multiprocessing was loaded before we asked. In a worker it is the one that it was given,
#: in a fork of the program's own the parent's.
_key = os.urandom(32)  # as multiprocessing makes it


def authkey() -> bytes:
    """Return this process's key for connections of multiprocessing, which is its workers' as well.

    Where multiprocessing is not loaded, it has this key as soon as it is: workers can use the proxies of a manager that
    is started after the first call.
    """
    if _PROCESS not in sys.modules:
        _ON_IMPORT.tell.setdefault(_PROCESS, _give_key)
        _ON_IMPORT.install()
    # Only now, for an import may have begun before. One that is not over is waited for.
    if _PROCESS in sys.modules:
        return bytes(import_module(_PROCESS).current_process().authkey)
    return _key


def _give_key(process: Any) -> None:
    process.current_process().authkey = _key


def run_as_process(identity: Identity, body: Callable[[], None]) -> int:
    """Run the body of a worker. Return its exit code.

    It ends as a child of multiprocessing ends: finalizers run, threads that are no daemons are waited for. Where
    workers are not forks of the user's process, or Python is new enough, what was registered with `atexit` runs as
    well.
    """
    global _key
    is_fork = identity.start_method == "fork"
    if identity.authkey is not None:
        _key = identity.authkey
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
        _announce_tracker(identity, sys.modules[_TRACKER])
    if process is None or _TRACKER not in sys.modules:
        # Instead of what the user's process waits for, in its fork.
        _ON_IMPORT.tell = {
            _PROCESS: partial(_announce, identity),
            _CONTEXT: partial(_announce_method, identity),
            _TRACKER: partial(_announce_tracker, identity),
        }
        _ON_IMPORT.install()
    context: Any = sys.modules.get(_CONTEXT)
    if context is not None:
        _announce_method(identity, context)
    if process is not None:
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


def _announce(identity: Identity, process: Any) -> None:
    """Tell a module that was imported in a call: as `_bootstrap` does, without its end."""
    made = _make_process(process, identity, lambda: None)
    process._current_process = made
    process._parent_process = process._ParentProcess("MainProcess", identity.parent_pid, _sentinel(identity))


def _announce_method(identity: Identity, context: Any) -> None:
    context._force_start_method(identity.start_method)


def _announce_tracker(identity: Identity, tracker: Any) -> None:
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
    """Has modules told something when they are imported. It stays where it is: another thread may be going through
    `sys.meta_path`, and would skip a finder."""

    def __init__(self) -> None:
        #: {name of the module: called with the module}.
        self.tell: dict[str, Callable[[Any], None]] = {}

    def install(self) -> None:
        """Come before all other finders, if it has not yet."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        tell = self.tell.get(name)
        if tell is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader, tell)  # type: ignore[assignment]
        return spec


class _Telling:
    """Another loader, and what is to be said behind it."""

    def __init__(self, loader: Any, tell: Callable[[Any], None]) -> None:
        self._loader = loader
        self._tell = tell

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        # Whoever asks the module for its loader, for its source say, is to find the real one.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._tell(module)


_ON_IMPORT: Final = _OnImport()
