"""What a worker is told, and how it makes what it was forked with its own before it runs code of the user's."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final, TypedDict

from scaler_executor.runtime import spawning
from scaler_executor.runtime.identity import Identity
from scaler_executor.runtime.platform import name_process

#: Ends a system call and does nothing else. Ignored where it has no handler, as in a program that a call started.
NUDGE: Final = signal.SIGURG


@dataclass
class WorkerConfig:
    """What is the same for all workers of a forker."""

    #: The most at once.
    workers: int = 1
    #: Run before the first call, with `initargs`.
    initializer: Callable[..., Any] | None = None
    initargs: tuple[Any, ...] = ()
    #: Pickle of (initializer, initargs), loaded in each worker; used instead of the two above when given.
    initializer_pickle: bytes | None = None
    #: The definitions that it needs: (name, version, buffers of the pickle).
    definitions: list[tuple[str, int, list[bytes]]] = field(default_factory=list)
    #: See `namespace_worker.WorkerMain`; None unless the workers are forks of the user's process.
    inherited_main: dict[str, Any] | None = None
    #: {number: handler}, set in each worker: the forker has none of the user's.
    signal_handlers: dict[int, Any] = field(default_factory=dict)
    #: Signals that each worker blocks: the forker blocks none.
    blocked_signals: list[int] = field(default_factory=list)
    #: Set in each worker; None where they are inherited.
    sys_path: list[str] | None = None
    cwd: str | None = None
    argv: list[str] | None = None
    #: See `spawning`.
    descriptors: list[int] = field(default_factory=list)
    #: What multiprocessing is told.
    identity: Identity = field(default_factory=Identity)
    #: Modules that the forker imports, for all.
    preload: list[str] = field(default_factory=list)
    #: Of descriptors 1 and 2, those whose streams the client shows, see `worker_output`.
    taken_streams: tuple[int, ...] = ()
    #: Whether records of logging go to the client, and the levels that are set there.
    passes_on_logs: bool = False
    log_levels: dict[str, int] = field(default_factory=dict)
    #: What `ps` shows; at most 15 bytes count.
    name: str = "scaler-worker"
    #: Where large payloads are, see `segments`; None: nowhere.
    segments_path: str | None = None
    #: Of the executor that the workers serve; b"": of several, each says it in its `Setup`.
    token: bytes = b""
    #: Set by the forker: the number of the worker.
    worker_id: int = 0


class Setup(TypedDict):
    """What a worker that a client has not started itself does once, before the client's first call: the payload of a
    function of style SETUP."""

    #: As in `WorkerConfig`.
    initializer_pickle: bytes | None
    definitions: list[tuple[str, int, list[bytes]]]
    argv: list[str]
    #: Added behind the worker's own.
    sys_path: list[str]
    #: As in `WorkerConfig`.
    token: bytes
    #: See `WorkerConfig`.
    log_levels: dict[str, int]


def take_over_process(config: WorkerConfig) -> None:
    """Make what was inherited this process's own."""
    fd = os.open(os.devnull, os.O_RDONLY)
    if fd != 0:
        os.dup2(fd, 0)
        os.close(fd)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    name_process(config.name)
    for number, handler in config.signal_handlers.items():
        try:
            signal.signal(number, handler)
        except (OSError, ValueError):
            pass  # it was C code that set it, past the interpreter's own rules
    # After the handlers. Without those by which calls are stopped.
    signal.pthread_sigmask(signal.SIG_SETMASK, set(config.blocked_signals) - {signal.SIGINT, NUDGE})
    spawning.receive(config.descriptors)
    if config.sys_path is not None:
        sys.path[:] = config.sys_path
        # A fresh interpreter's __main__ is ours: nothing in it may be taken for the user's.
        sys.modules["__main__"] = ModuleType("__main__")
    if config.argv is not None:
        sys.argv[:] = config.argv
    if config.cwd is not None:
        os.chdir(config.cwd)
