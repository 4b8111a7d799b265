"""Which messages may overtake which, and how a message is divided so that what may overtake can.

What may overtake: a message that names no task of those that wait, and needs no function that waits. A client's tasks
keep their order on their way to the scheduler, for they are numbered; at an agent each is for itself. Everything else,
the news of a peer's end say, overtakes nothing and is not overtaken. This module knows what messages are about; it does
not know which of them waits, nor why (`parcels` does).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from scaler_executor.protocol.codec import MAX_FRAMES
from scaler_executor.protocol.messages import (
    AgentCapacity,
    AgentConfirm,
    AgentResult,
    Blocked,
    ClientGone,
    ClientLimit,
    ClientLimited,
    Frames,
    InheritanceLost,
    InheritanceReplaced,
    Message,
    Nested,
    Output,
    TaskCancel,
    TaskCancelConfirm,
    TaskDied,
    TaskResult,
    TaskReturned,
    TaskRun,
    TaskRunning,
    TaskSplit,
    TaskSubmit,
    Unblocked,
    WorkersBroken,
)

#: A part that is larger than this goes in pieces of this size.
PIECE_BYTES: Final = 1 << 16
#: Rows go in one message up to so many frames, for a message may have `MAX_FRAMES`: calls of several clients, say, of
#: which each is within it.
GROUP_FRAMES: Final = MAX_FRAMES // 4
#: ... and up to so many of them: whoever takes a message in does nothing else meanwhile, and others wait.
GROUP_ROWS: Final = 1000
#: In the place of a client: this one, where there is only one.
_OWN: Final = -1
#: ... and this one, of what is printed: clients count from 1.
_PRINTED: Final = 0
#: The field that holds the rows, of messages in which each row is for itself and begins with its task.
_ROWS: Final[dict[type[Message], str]] = {
    TaskRun: "tasks",
    TaskCancel: "cancels",
    TaskResult: "results",
    AgentResult: "results",
    TaskCancelConfirm: "confirms",
    AgentConfirm: "confirms",
    TaskReturned: "tasks",
    TaskDied: "deaths",
}


class Keys:
    """What a message is about, for `conflict`."""

    __slots__ = ("clients", "drops", "exclusive", "is_barrier", "makes", "tasks", "uses")

    def __init__(self, message: Message) -> None:
        #: Tasks that it names.
        self.tasks: set[int] = set()
        #: Clients to whose calls or functions it adds.
        self.clients: set[int] = set()
        #: Clients of which it says something that concerns all of that.
        self.exclusive: set[int] = set()
        #: Functions that come with it, that it needs, and that are forgotten with it: (client_id, function_id).
        self.makes: set[tuple[int, int]] = set()
        self.uses: set[tuple[int, int]] = set()
        self.drops: set[tuple[int, int]] = set()
        self.is_barrier = False
        if isinstance(message, TaskSubmit):
            self.tasks.update(row[0] for row in message.tasks)
            self.exclusive.add(_OWN)
        elif isinstance(message, TaskRun):
            self._run(message)
        elif isinstance(message, (TaskRunning, Blocked, Unblocked)):
            self.tasks.update(message.tasks)
        elif isinstance(message, TaskSplit):
            for task_id, _, at in message.splits:
                self.tasks |= {task_id, task_id + at}
        elif isinstance(
            message,
            (ClientGone, ClientLimit, ClientLimited, InheritanceLost, InheritanceReplaced, WorkersBroken),
        ):
            self.exclusive.add(message.client_id)
        elif isinstance(message, Nested):
            # A session keeps its order, and what a call submits goes before its end.
            self.exclusive.add(_OWN - message.worker_id)
            self.tasks.add(message.parent)
        elif isinstance(message, Output):
            # It keeps its order, and goes before what else is said of its calls.
            self.exclusive.add(_PRINTED)
            self.tasks.update(row[0] for row in message.rows)
        elif type(message) in _ROWS:
            self.tasks.update(row[0] for row in getattr(message, _ROWS[type(message)]))
        else:
            self.is_barrier = not isinstance(message, AgentCapacity)

    def _run(self, message: TaskRun) -> None:
        for row in message.tasks:
            self.tasks.add(row[0])
            self.clients.add(row[2])
            self.uses.add((row[2], row[5]))
        for client_id, function in message.functions:
            self.clients.add(client_id)
            self.makes.add((client_id, function.function_id))
            self.uses.update((client_id, needed) for needed in function.needs)
        self.drops.update(message.forget)
        self.clients.update(client_id for client_id, _ in message.forget)

    def conflict(self, other: Keys) -> bool:
        """Tell whether neither may overtake the other."""
        return (
            self.is_barrier
            or other.is_barrier
            or not self.tasks.isdisjoint(other.tasks)
            or not self.exclusive.isdisjoint(other.exclusive)
            or not self.exclusive.isdisjoint(other.clients)
            or not self.clients.isdisjoint(other.exclusive)
            or not self.makes.isdisjoint(other.uses)
            or not self.uses.isdisjoint(other.makes)
            or not self.drops.isdisjoint(other.uses)
            or not self.uses.isdisjoint(other.drops)
            or not self.drops.isdisjoint(other.makes)
            or not self.makes.isdisjoint(other.drops)
        )


def divide(message: Message, waiting: Iterable[Keys]) -> list[Message]:
    """Return messages that say the same as this one, in this order.

    Rows with large payloads get a message of their own, and so do functions that are large or go before such rows.
    While messages wait, those rows that may have to wait as well are parted from the others.
    """
    if isinstance(message, (TaskSubmit, TaskRun)):
        return _divide_calls(message, isinstance(message, TaskRun) and any(True for _ in waiting))
    rows_name = _ROWS.get(type(message))
    if rows_name is None:
        return [message]
    rows: list[Any] = getattr(message, rows_name)
    parts = [rows]
    if len(rows) > 1:
        tasks: set[int] = set().union(*(keys.tasks for keys in waiting))
        if tasks:
            parts = [[row for row in rows if row[0] not in tasks], [row for row in rows if row[0] in tasks]]
    # What was handed back comes in one message: it is queued again in its order.
    groups = parts if isinstance(message, TaskReturned) else [group for part in parts for group in _grouped(part)]
    groups = [group for group in groups if group]
    if len(groups) < 2:
        return [message]
    if isinstance(message, TaskCancel) and len({row[0] for row in rows}) == len(rows):
        # The last first: or what is queued behind those of the first message would start, to be stopped by the next.
        groups.reverse()
    return [msgspec.structs.replace(message, **{rows_name: group}) for group in groups]


def _divide_calls(message: TaskSubmit | TaskRun, are_clients_apart: bool) -> list[Message]:
    parts = [message.tasks]
    if are_clients_apart:
        clients: dict[int, list[Any]] = {}
        for row in message.tasks:
            clients.setdefault(row[2], []).append(row)
        parts = list(clients.values())
    groups = [group for part in parts for group in _grouped(part)]
    blobs = [each.blob if isinstance(message, TaskSubmit) else each[1].blob for each in message.functions]  # type: ignore[union-attr,index]
    has_large = _are_large(blobs) or any(_is_large(group[0][-1]) for group in groups)
    if len(groups) < 2 and not has_large:
        return [message]
    empty = msgspec.structs.replace(message, tasks=[], functions=[], forget=[])
    divided: list[Message] = [msgspec.structs.replace(empty, functions=[function]) for function in message.functions]
    divided += [msgspec.structs.replace(empty, tasks=group) for group in groups]
    if message.forget:
        divided.append(msgspec.structs.replace(empty, forget=message.forget))
    return divided


def _grouped(rows: list[Any]) -> list[list[Any]]:
    """Part the rows, which end with their payloads if they have any, so that large ones are alone and no group has too
    many rows or frames."""
    groups: list[list[Any]] = [[]]
    frames = 0
    for row in rows:
        payload = row[-1]
        if len(groups[-1]) >= GROUP_ROWS:
            groups.append([])
            frames = 0
        if type(payload) is Frames:
            if _is_large(payload):
                groups += [[row], []]
                frames = 0
                continue
            frames += len(payload.buffers)
            if frames > GROUP_FRAMES:
                groups.append([])
                frames = len(payload.buffers)
        groups[-1].append(row)
    return [group for group in groups if group]


def _are_large(blobs: list[Any]) -> bool:
    frames = sum(len(blob.buffers) for blob in blobs if type(blob) is Frames)
    return frames > GROUP_FRAMES or any(map(_is_large, blobs))


def _is_large(payload: Any) -> bool:
    return type(payload) is Frames and (
        len(payload.buffers) > GROUP_FRAMES or any(len(buffer) > PIECE_BYTES for buffer in payload.buffers)
    )
