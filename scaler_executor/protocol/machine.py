"""What the three state machines have in common: the cells of a table that lead nowhere, and the story of a task.

A table is a literal `{state: {event: method}}`. Where an event cannot happen the cell says whose mistake it would be:
`peer_error` (the peer broke the protocol: its connection is closed) or `forbidden` (we did: a bug, the process
stops). `ignore` is for events that are right and change nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Final, NamedTuple, NoReturn

from scaler_executor.protocol.codec import LocalProtocolError, RemoteProtocolError

#: How many transitions a machine remembers, over all its tasks.
STORY_LENGTH: Final = 4096


class Transition(NamedTuple):
    """One remembered step of a task, for error reports."""

    now: float
    task_id: int
    event: str
    before: str
    after: str
    detail: str


class Story:
    """The last transitions of a machine.

    The steps that every task takes (submitted, assigned, result) are not kept: they cost as much as the rest of the
    work on a call and say nothing that the task's state does not.
    """

    def __init__(self) -> None:
        self._steps: deque[Transition] = deque(maxlen=STORY_LENGTH)

    def add(self, now: float, task_id: int, event: str, before: str, after: str, detail: str = "") -> None:
        """Remember one step."""
        self._steps.append(Transition(now, task_id, event, before, after, detail))

    def of(self, task_id: int) -> list[Transition]:
        """Return what is remembered of one task, oldest first."""
        return [step for step in self._steps if step.task_id == task_id]


def peer_error(machine: Any, task: Any, *details: Any) -> None:
    """Cell of a table: the peer must not say this of a task in this state."""
    raise RemoteProtocolError(f"not allowed in state {task.state}: {details!r:.200}")


def forbidden(machine: Any, task: Any, *details: Any) -> None:
    """Cell of a table: this side must never get here."""
    raise LocalProtocolError(f"bug: impossible in state {task.state}: {details!r:.200}")


def ignore(machine: Any, task: Any, *details: Any) -> None:
    """Cell of a table: right, and nothing follows."""


def check_table(table: dict[str, dict[str, Any]], states: Iterable[str], events: Iterable[str]) -> None:
    """Assert that the table has a cell for each state and event, and no others."""
    assert set(table) == set(states), set(table) ^ set(states)
    for state, row in table.items():
        assert set(row) == set(events), (state, set(row) ^ set(events))


def unreachable(value: NoReturn) -> NoReturn:
    """Close a dispatch: a type checker complains if a case is missing. As `typing.assert_never`, which Python 3.10
    lacks."""
    raise AssertionError(f"bug: {value!r} is not handled")
