"""How a forker comes into being: as a fork of the user's process, or of one that has nothing of the user's.

What it is to be rid of, and what it must not do between the fork and its first worker, stands here; what it does then,
in `forker`.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from scaler_executor.runtime import platform, threads
from scaler_executor.runtime.forker import Forker
from scaler_executor.runtime.worker_config import WorkerConfig


def forker_main(control: socket.socket, config: WorkerConfig, creator: int, creator_pidfd: int) -> NoReturn:
    """Run the forker in this process, which has one thread. Ends it."""
    _reset_signals()
    platform.become_subreaper()
    threads.cap(config.workers)
    for name in config.preload:
        importlib.import_module(name)
    gc.freeze()  # a collection in a worker would write to every object, and so copy every page
    Forker(control, config, creator, creator_pidfd).run()


def start_forker_by_fork(config: WorkerConfig, not_inherited: Sequence[int] = ()) -> tuple[int, socket.socket]:
    """Fork the forker from this process. Return its pid and the control socket; the caller reaps it."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        return fork_forker(config, there, [*not_inherited, here.fileno()]), here
    except BaseException:
        here.close()
        raise
    finally:
        there.close()


def fork_forker(config: WorkerConfig, control: socket.socket, not_inherited: list[int]) -> int:
    """Fork the forker from this process. Return its pid; the caller reaps it.

    It lives in a session of its own, so that a terminal's Ctrl-C does not reach it, and ends with this process or with
    the control pair.

    Args:
        config: Of its workers.
        control: The forker's end of the control pair; the caller closes its own copy.
        not_inherited: Descriptors that the forker closes.
    """
    platform.prepare()
    creator, creator_pidfd = os.getpid(), platform.watch_self()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()  # or the child would print it again
        except (AttributeError, OSError, ValueError):
            pass
    with warnings.catch_warnings():
        # Python 3.12 and later warn where there are threads: the child waits for none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        # A Ctrl-C is not for the child: until it has a session of its own and ignores it, it waits.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        pid = -1
        uncap = threads.cap_for_fork(config.workers)
        try:
            pid = os.fork()
        except BaseException:
            os.close(creator_pidfd)
            raise
        finally:
            if pid:
                uncap()
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if pid:
        os.close(creator_pidfd)
        return pid
    try:
        signal.set_wakeup_fd(-1)  # it may be an event loop's of the parent
        os.setsid()
        for fd in not_inherited:
            try:
                os.close(fd)
            except OSError:
                pass  # closed before the fork, after it was listed
        if platform.PORTABLE and config.identity.parent_pid == creator:
            config.identity.parent_fd = creator_pidfd
        forker_main(control, config, creator, creator_pidfd)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(70)


def _reset_signals() -> None:
    """Give every signal the disposition that a fresh interpreter has, except SIGINT: it is ignored until a worker
    handles it.

    An inherited SIG_IGN for SIGCHLD would lose the exit statuses. SIGHUP stays ignored: that is what nohup does. A
    handler of faults that the user enabled stays.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # first: one that waits is dropped by this
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if handler is None or handler == signal.SIG_DFL or number in platform.FAULTS:
            continue
        if number == signal.SIGHUP and handler == signal.SIG_IGN:
            continue
        ignored = number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT)
        try:
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
        except (OSError, ValueError):
            pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)
