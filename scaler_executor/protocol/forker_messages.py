"""The messages that an agent and its forker exchange, over the pair that also carries descriptors.

They are small, have no payloads and never leave the machine.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class ForkerControl(msgspec.Struct, array_like=True):
    """Base of what travels."""


class ForkerSetup(ForkerControl, tag=30):
    """Agent to forker, once, with two descriptors: the bell and a pidfd of the agent's process."""

    stop_deadline_s: float = 5.0


class ForkWorker(ForkerControl, tag=31):
    """Agent to forker."""

    worker_id: int


class InterruptWorker(ForkerControl, tag=32):
    """Agent to forker: stop this call softly; it must not start if it has not yet."""

    worker_id: int
    seq: int


class FreezeWorker(ForkerControl, tag=33):
    """Agent to forker: freeze, look; kill if `kill_seq` is in progress, else take back and continue.

    Taken back are the calls of `revoke` that have not been claimed and, if `split_seq` is the run in progress, its
    items that have not been claimed.
    """

    worker_id: int
    kill_seq: int = 0
    revoke: list[int] = []
    split_seq: int = 0


class KillWorker(ForkerControl, tag=34):
    """Agent to forker: kill the worker and its process group, whatever it does."""

    worker_id: int


class WorkerForked(ForkerControl, tag=35):
    """Forker to agent, with four descriptors: call pair, result pipe, page, pidfd."""

    worker_id: int
    pid: int


class WorkerForkFailed(ForkerControl, tag=36):
    """Forker to agent."""

    worker_id: int
    reason: str


class WorkerFrozen(ForkerControl, tag=37):
    """Forker to agent: what the page of the frozen worker said.

    `killed`: `kill_seq` was in progress and its process group has been sent SIGKILL; `WorkerExited` follows. `stuck`:
    the worker did not stop, or did not die, within the deadline.
    """

    worker_id: int
    current: int
    done: int
    item: int
    killed: bool = False
    stuck: bool = False


class WorkerExited(ForkerControl, tag=38):
    """Forker to agent: reaped. After a crash, or if it was killed, its process group is empty as well."""

    worker_id: int
    pid: int
    exit_code: int
    current: int
    done: int
    item: int
    peak_memory_bytes: int = 0
    out_of_memory: bool | None = None  # see `DeathReport`


ToForkerMessage: TypeAlias = ForkerSetup | ForkWorker | InterruptWorker | FreezeWorker | KillWorker
ForkerMessage: TypeAlias = WorkerForked | WorkerForkFailed | WorkerFrozen | WorkerExited
