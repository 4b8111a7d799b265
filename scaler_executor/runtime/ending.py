"""How clients end with the process: at its exit, by Ctrl-C, and in its forked children."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from scaler_executor.runtime import exiting

if TYPE_CHECKING:
    from scaler_executor.runtime.client import ClientFutureManager
    from scaler_executor.runtime.handle import Handle
    from scaler_executor.runtime.view import ClientView

#: {id: manager}: those whose I/O thread has not ended.
MANAGERS: Final[dict[int, ClientFutureManager]] = {}


def wait_until_ended(manager: ClientFutureManager | ClientView | Handle, *, interrupted: bool) -> None:
    """Wait for the end of a closed client or view. The first Ctrl-C stops its calls, the second kills the cluster.

    Args:
        interrupted: The first one has been already.
    """
    try:
        if interrupted:
            manager.clear(0)
            manager.join_soon()
        else:
            manager.join()
    except KeyboardInterrupt:
        if interrupted:
            manager.kill()
        else:
            wait_until_ended(manager, interrupted=True)
        raise


def _end_all_at_exit() -> None:
    """Finish the accepted work at the interpreter's exit, as ProcessPoolExecutor does, or stop it after a Ctrl-C."""
    interrupted = issubclass(getattr(sys, "last_type", None) or object, KeyboardInterrupt)
    managers = list(MANAGERS.values())
    for manager in managers:
        manager.exit()
        if interrupted:
            manager.clear(0)  # all at once, so that the times that calls get to unwind do not add up
    raised: KeyboardInterrupt | None = None
    for manager in managers:
        try:
            wait_until_ended(manager, interrupted=interrupted)
        except KeyboardInterrupt as error:
            raised, interrupted = error, True  # it is for all of them
    if raised is not None:
        raise raised


def _abandon_all_in_child() -> None:
    for manager in list(MANAGERS.values()):
        manager.abandon()
    MANAGERS.clear()


exiting.AT_EXIT.append(_end_all_at_exit)
os.register_at_fork(after_in_child=_abandon_all_in_child)
