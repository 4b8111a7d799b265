"""Which tasks were submitted by which: when the code of one is stopped, so is what it has submitted.

What a call leaves behind when it ends by itself runs on. What it has submitted when it is cancelled, has run for longer
than its timeout or has lost its worker, is cancelled, and what that has submitted as well, all at the same time; and a
cancel is only confirmed when all of that has stopped. It is done when the parent has stopped: its code would see
cancelled futures otherwise, and might go on without them.

This module knows tasks and their parents. It does not know who submits for whom (see `scheduler_nesting`).
"""

from __future__ import annotations

from collections.abc import Callable

from scaler_executor.protocol.messages import BY_OPERATOR, CancelKind, ClientConfirmRow
from scaler_executor.protocol.scheduler_output import SchedulerOutput
from scaler_executor.protocol.scheduler_rows import GONE, Client, Family, Farewell, Task


class Families:
    """The parents and children among the tasks.

    Args:
        step: Does what the table says of an event in the state of a task.
        output: Takes the answers.
    """

    def __init__(self, step: Callable[..., None], output: SchedulerOutput) -> None:
        self._step = step
        self._output = output

    def adopt(self, child: Task, parent: Task | None, item: int) -> None:
        """Note who has submitted `child`; None: nobody who runs any more."""
        family = child.family = Family(parent, item)
        if parent is None:
            return
        if parent.family is None:
            parent.family = Family(None, 0)
        parent.family.children[child] = None
        # The parent is being stopped with its own parent: this crossed.
        family.farewells += parent.family.farewells
        for farewell in family.farewells:
            farewell.waits[child] = None

    def split(self, task: Task, tail: Task) -> None:
        """The items of `tail` have been those of `task`."""
        family = task.family
        assert family is not None
        tail.family = Family(family.parent, family.item)
        if family.parent is not None:
            assert family.parent.family is not None
            family.parent.family.children[tail] = None
        tail.family.farewells += family.farewells
        for farewell in family.farewells:
            farewell.waits[tail] = None

    def stop(self, task: Task) -> Farewell | None:
        """Cancel what the code of `task` that has not ended has submitted, and all that this has. Return what waits for
        the end of that; None: there is nothing."""
        if task.client.account.gone:
            return None  # all that it has is being stopped
        found: list[Task] = []
        parents = [task]
        while parents:
            parent = parents.pop()
            assert parent.family is not None
            for child in parent.family.children:
                assert child.family is not None
                if child.family.item >= parent.start:
                    found.append(child)
                    parents.append(child)
        for child in found:
            if child.state == GONE:
                continue
            if child.client.gone:
                self._step(child, "CLIENT_LOST")
            else:
                self._step(child, "CANCEL", BY_OPERATOR, CancelKind.FORCED)
        farewell = Farewell()
        for child in found:
            if child.state != GONE and child.family is not None:
                child.family.farewells.append(farewell)
                farewell.waits[child] = None
        return farewell if farewell.waits else None

    def answer_later(self, task: Task, row: ClientConfirmRow) -> bool:
        """Stop what a task that has been cancelled has submitted. Return whether its answer has to wait for that; then
        it is given in time."""
        farewell = self.stop(task)
        if farewell is None:
            return False
        farewell.rows.append((task.client, row))
        return True

    def forgotten(self, task: Task) -> None:
        """A task is over. What it has left behind is on its own."""
        family = task.family
        assert family is not None
        if family.parent is not None and family.parent.family is not None:
            family.parent.family.children.pop(task, None)
        for child in family.children:
            if child.family is not None:
                child.family.parent = None
        family.children.clear()
        self.let_go(task)

    def let_go(self, task: Task) -> None:
        """Nobody waits for the end of a task any more: it has come, or will not."""
        family = task.family
        assert family is not None
        farewells, family.farewells = family.farewells, []
        for farewell in farewells:
            farewell.waits.pop(task, None)
            if not farewell.waits:
                for client, row in farewell.rows:
                    self._answer(client, row)
                farewell.rows.clear()

    def _answer(self, client: Client, row: ClientConfirmRow) -> None:
        if not client.gone:
            client.confirms.append(row)
            self._output.touched[client] = None
