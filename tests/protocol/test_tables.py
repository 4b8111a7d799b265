"""The tables are literal and whole: every cell is a method, or says whose mistake it would be."""

import ast
import inspect

import pytest

from scaler_executor.protocol import (
    agent,
    agent_calls,
    agent_crew,
    agent_dispatch,
    agent_records,
    agent_sharing,
    agent_timeouts,
    client,
    link,
    machine,
    scheduler,
    scheduler_assignment,
    scheduler_limits,
    scheduler_rows,
    scheduler_tasks,
)

#: {machine: (module with the table, class whose methods the cells are, states, events, further modules of it)}
MACHINES = {
    "client": (client, client.ClientState, ("UNSENT", "SENT", "CANCELING"), client.EVENTS, []),
    "scheduler": (
        scheduler_tasks,
        scheduler_tasks.SchedulerTasks,
        scheduler.STATES,
        scheduler.EVENTS,
        [scheduler, scheduler_assignment, scheduler_limits, scheduler_rows],
    ),
    "agent": (
        agent_calls,
        agent_calls.AgentCalls,
        agent.STATES,
        agent.EVENTS,
        [agent, agent_crew, agent_dispatch, agent_records, agent_sharing, agent_timeouts],
    ),
    "link": (link, link.LinkState, link.STATES, link.EVENTS, []),
}
STATE_CLASSES = (client.ClientState, scheduler.SchedulerState, agent.AgentState, link.LinkState)
DEAD_ENDS = (machine.peer_error, machine.forbidden, machine.ignore)


@pytest.mark.parametrize("name", MACHINES)
def test_table_is_whole(name):
    """There is a cell for each state and event, and no other."""
    module, _, states, events, _ = MACHINES[name]
    machine.check_table(module.TABLE, states, events)


@pytest.mark.parametrize("name", MACHINES)
def test_cells(name):
    """Each cell is a method of the machine, peer_error, forbidden or ignore."""
    module, cell_class, _, _, _ = MACHINES[name]
    for state, row in module.TABLE.items():
        for event, cell in row.items():
            is_method = getattr(cell_class, cell.__name__, None) is cell
            assert cell in DEAD_ENDS or is_method, (state, event, cell)


@pytest.mark.parametrize("name", MACHINES)
def test_events_are_used(name):
    """Each event of a table is raised somewhere, and each that is raised is in the table."""
    module, _, _, events, others = MACHINES[name]
    tree = ast.parse("".join(map(inspect.getsource, [module, *others])))
    raised = {
        argument.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ("step", "_step")
        for argument in ast.walk(call)
        if isinstance(argument, ast.Constant) and str(argument.value).isupper()
    }
    # Where a call is a matter of nanoseconds the cell is looked up by hand.
    raised |= {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in events
    }
    assert raised == set(events)


@pytest.mark.parametrize("name", MACHINES)
def test_states_are_entered(name):
    """Each state of a table is assigned, or passed to what assigns it, somewhere."""
    module, _, states, _, others = MACHINES[name]
    source = "".join(map(inspect.getsource, [module, *others]))
    for state in states:
        assert f'"{state}"' in source


@pytest.mark.parametrize("state_class", STATE_CLASSES)
def test_four_methods(state_class):
    """A machine has handle, next_deadline, story and check, and otherwise tells only how much it holds."""
    public = {attribute for attribute in vars(state_class) if not attribute.startswith("_")}
    assert {"handle", "next_deadline", "story", "check"} <= public
    assert public <= {
        "handle",
        "next_deadline",
        "story",
        "check",
        "outstanding",
        "outstanding_tasks",
        "workers",
        "room",
        "small_room",
        "is_established",
    }


def test_dead_ends():
    """peer_error blames the peer, forbidden blames us."""

    class Task:
        state = "X"

    with pytest.raises(machine.RemoteProtocolError):
        machine.peer_error(None, Task())
    with pytest.raises(machine.LocalProtocolError):
        machine.forbidden(None, Task())
    assert machine.ignore(None, Task()) is None


def test_story_is_bounded():
    """A machine remembers so many steps and no more."""
    story = machine.Story()
    for number in range(2 * machine.STORY_LENGTH):
        story.add(0.0, number, "event", "A", "B")
    assert len(story._steps) == machine.STORY_LENGTH
    assert story.of(0) == [] and len(story.of(2 * machine.STORY_LENGTH - 1)) == 1
