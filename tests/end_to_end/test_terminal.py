"""Ctrl-C, Ctrl-Z, the hang-up of a terminal and SIGTERM, at every stage of an executor's life.

After each nothing may be left within a few seconds, only the user's process may say something, and the terminal's
foreground is the job's until it ends.
"""

from __future__ import annotations

import os
import signal

import pytest
from programs import Ended, Program, Terminal, assert_none_left
from support import Fifo, Scene, is_gone, state_of, wait_gone, wait_until

CTRL_C = b"\x03"
CTRL_Z = b"\x1a"

#: {stage: (program, how many lines it tells before Ctrl-C)}. What is told last comes out of the stage, or right
#: before it.
STAGES = {
    "construction": (
        """
made = []
started.tell()
while True:
    made.append(make(1))
    del made[:-3]
""",
        1,
    ),
    "start of workers": (
        """
executor = make(2)
futures = [executor.submit(workload.sleep, silent) for _ in range(10)]
started.tell()
futures[0].result()
""",
        1,
    ),
    "initializer": (
        """
executor = make(2, initializer=workload.sleep, initargs=(started,))
executor.submit(abs, 1).result()
""",
        1,
    ),
    "initializer, with block": (
        """
with make(2, initializer=workload.sleep, initargs=(started,)) as executor:
    executor.submit(abs, 1).result()
""",
        1,
    ),
    "submit": (
        """
executor = make(2)
list(executor.map(abs, range(10)))
started.tell()
while True:
    executor.submit(abs, 1)
""",
        1,
    ),
    "result": (
        """
executor = make(2)
futures = [executor.submit(workload.sleep, started) for _ in range(10)]
futures[0].result()
""",
        2,
    ),
    "result, with block": (
        """
with make(2) as executor:
    futures = [executor.submit(workload.sleep, started) for _ in range(10)]
    futures[0].result()
""",
        2,
    ),
    "result, calls that defy": (
        """
with make(2) as executor:
    futures = [executor.submit(workload.hold_gil, started) for _ in range(10)]
    futures[0].result()
""",
        2,
    ),
    "map": (
        """
executor = make(2)
for value in executor.map(workload.sleep, [started] * 10):
    pass
""",
        2,
    ),
    "map, while it is filled": (
        """
def items():
    yield started
    while True:
        yield silent
with make(2) as executor:
    executor.map(workload.tell, items())
""",
        1,
    ),
    "as_completed": (
        """
with make(2) as executor:
    for future in as_completed([executor.submit(workload.sleep, started) for _ in range(10)]):
        pass
""",
        2,
    ),
    "wait": (
        """
with make(2) as executor:
    wait([executor.submit(workload.sleep, started) for _ in range(10)])
""",
        2,
    ),
    "shutdown": (
        """
executor = make(2)
executor.submit(workload.sleep, started)
executor.map(workload.sleep, [started] * 10)
executor.shutdown()
""",
        2,
    ),
    "leaving the with block": (
        """
with make(2) as executor:
    executor.submit(workload.sleep, started)
    executor.map(workload.sleep, [started] * 10)
""",
        2,
    ),
    "asyncio": (
        """
import asyncio
async def main():
    with make(2) as executor:
        await asyncio.get_running_loop().run_in_executor(executor, workload.sleep, started)
asyncio.run(main())
""",
        1,
    ),
    "two executors": (
        """
with make(1) as one, make(1) as two:
    one.submit(workload.sleep, started)
    two.submit(workload.sleep, started).result()
""",
        2,
    ),
}
FIFOS = """
started, silent = map(copy_of_fifo, arguments)
"""


def make_terminal(scene: Scene, start_method: str, source: str, started: Fifo, *fifos: Fifo) -> Terminal:
    fifos = fifos or (scene.fifo(),)
    return Terminal(scene, "scaler", start_method, FIFOS + source, started.path, *[fifo.path for fifo in fifos])


def assert_interrupted(ended: Ended) -> None:
    """One traceback, the user's process's own, and the exit status of an interrupted program."""
    assert ended.code == -signal.SIGINT, ended
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt"), ended.stderr
    assert ended.stderr.count("Process") == 0, ended.stderr
    assert ended.stderr.count("scaler-executor:") == 0, ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c(scene: Scene, start_method: str, stage: str) -> None:
    """Ctrl-C ends the program at once, whatever its calls do, and says no more than KeyboardInterrupt."""
    source, told = STAGES[stage]
    started = scene.fifo()
    terminal = make_terminal(scene, start_method, source, started)
    for _ in range(told):
        started.hear()
    assert terminal.foreground() == terminal.pid
    terminal.type(CTRL_C)
    ended = terminal.end()
    assert_none_left(scene)
    assert_interrupted(ended)


#: Programs that wait for their calls when they have nothing more to do, and how many lines they tell.
EXITS = {
    "calls": ("executor = make(2)\nfor _ in range(10):\n    executor.submit(workload.sleep, started)\n", 2),
    "map": ("executor = make(2)\nexecutor.map(workload.sleep, [started] * 10)\n", 2),
    "initializer": (
        "executor = make(1, initializer=workload.sleep, initargs=(started,))\nexecutor.submit(abs, 1)\n",
        1,
    ),
    "two executors": (
        "one, two = make(1), make(1)\none.submit(workload.sleep, started)\ntwo.submit(workload.sleep, started)\n",
        2,
    ),
}


@pytest.mark.parametrize("what", EXITS)
def test_ctrl_c_at_exit(scene: Scene, start_method: str, what: str) -> None:
    """Ctrl-C while the interpreter's exit waits for accepted calls ends them, with the exit code that the standard
    library has then, and nothing is left when the program has ended."""
    source, told = EXITS[what]
    started = scene.fifo()
    terminal = make_terminal(scene, start_method, source, started)
    pids = [int(started.hear()) for _ in range(told)]
    # The program is at its end when nothing of it runs any more.
    wait_until(lambda: state_of(terminal.pid) == "S", "the program still runs")
    terminal.type(CTRL_C)
    ended = terminal.end()
    assert all(map(is_gone, pids))
    assert_none_left(scene)
    assert ended.stderr.count("Traceback") <= 1 and ended.stderr.rstrip().endswith("KeyboardInterrupt:"), ended
    assert ended.code == 0


@pytest.mark.parametrize("is_exit", [False, True], ids=["with block", "exit"])
def test_second_ctrl_c(scene: Scene, start_method: str, is_exit: bool) -> None:
    """The second Ctrl-C kills at once what defies the first one."""
    source = "executor = make(2, cancel_grace=3600)\n"
    source += "" if is_exit else "with executor:\n    "
    source += (
        "futures = [executor.submit(workload.linger_when_interrupted, started, started, silent) for _ in (1, 2)]\n"
    )
    started = scene.fifo()
    terminal = make_terminal(scene, start_method, source, started)
    for _ in range(2):
        started.hear()
    terminal.type(CTRL_C)
    for _ in range(2):
        started.hear()  # it has caught the interrupt, so the first Ctrl-C has been dealt with
    assert not is_gone(terminal.pid)
    terminal.type(CTRL_C)
    ended = terminal.end()
    assert_none_left(scene)
    assert "KeyboardInterrupt" in ended.stderr and "scaler-executor" not in ended.stderr
    assert ended.code == (0 if is_exit else -signal.SIGINT)


def test_second_ctrl_c_over_a_callback(scene: Scene, start_method: str) -> None:
    """A callback that takes long is waited for after a Ctrl-C, as in the standard library; a second one ends that."""
    source = """
executor = make(2)
executor.submit(abs, 1).add_done_callback(lambda future: workload.sleep(started))
try:
    executor.submit(workload.sleep, started).result()
except KeyboardInterrupt:
    started.tell("interrupted")
    raise
"""
    started = scene.fifo()
    terminal = make_terminal(scene, start_method, source, started)
    for _ in range(2):
        started.hear()
    terminal.type(CTRL_C)
    assert started.hear() == "interrupted"
    wait_until(lambda: len(scene.processes()) == 2, "the calls still run")
    assert not is_gone(terminal.pid)
    terminal.type(CTRL_C)
    terminal.end()
    assert_none_left(scene)


def test_ctrl_c_is_not_the_calls(scene: Scene, start_method: str) -> None:
    """A program that catches KeyboardInterrupt goes on, and so do its calls: Ctrl-C does not reach workers. This is
    our contract; a ProcessPoolExecutor is broken then."""
    source = """
gate = copy_of_fifo(arguments[1])
with make(1) as executor:
    future = executor.submit(workload.hold, started, gate, "held")
    try:
        future.result()
    except KeyboardInterrupt:
        started.tell("interrupted")
    print(future.result(), executor.submit(abs, -1).result())
"""
    started, gate = scene.fifo(), scene.fifo()
    terminal = make_terminal(
        scene,
        start_method,
        source,
        started,
        gate,
    )
    started.hear()
    terminal.type(CTRL_C)
    assert started.hear() == "interrupted"
    gate.open()
    assert terminal.end() == Ended(0, "held 1\n", "")


def test_the_foreground_is_the_jobs(scene: Scene, start_method: str) -> None:
    """Workers do not read from the terminal, nor do they stop when they write to it from another session."""
    source = """
with make(1) as executor:
    print(executor.submit(os.read, 0, 1).result(), executor.submit(os.getpgrp).result() != os.getpgrp())
    os.write(2, input().encode())
"""
    started = scene.fifo()
    terminal = make_terminal(scene, start_method, source, started)
    terminal.type(b"typed\n")
    assert terminal.end() == Ended(0, "b'' True\n", "typed")


def test_ctrl_z(scene: Scene, start_method: str) -> None:
    """Ctrl-Z stops the user's process, not its calls; when it goes on it finds their results."""
    source = """
gate = copy_of_fifo(arguments[1])
with make(1) as executor:
    future = executor.submit(workload.hold, started, gate, "held")
    more = executor.submit(workload.tell, started, "told")
    print(future.result(), more.result(), executor.submit(abs, -1).result())
"""
    started, gate = scene.fifo(), scene.fifo()
    terminal = make_terminal(scene, start_method, source, started, gate)
    worker = int(started.hear())
    terminal.type(CTRL_Z)
    assert terminal.hear("stopped") == [str(int(signal.SIGTSTP))]
    assert state_of(terminal.pid) == "T" and state_of(worker) != "T"
    gate.open()
    started.hear()  # the next call runs while its client is stopped
    os.kill(terminal.pid, signal.SIGCONT)
    terminal.hear("continued")
    code, had_foreground = map(int, terminal.hear("ended"))
    assert (code, had_foreground) == (0, 0)  # it went on in the background
    assert (terminal.stdout, terminal.stderr) == ("held told 1\n", "")


def test_ctrl_c_after_ctrl_z(scene: Scene, start_method: str) -> None:
    """A program that was stopped and has come back can be interrupted."""
    started = scene.fifo()
    terminal = make_terminal(scene, start_method, STAGES["result, with block"][0], started)
    for _ in range(2):
        started.hear()
    terminal.type(CTRL_Z)
    terminal.hear("stopped")
    os.kill(terminal.pid, signal.SIGINT)
    os.kill(terminal.pid, signal.SIGCONT)
    terminal.hear("continued")
    code, _ = terminal.hear("ended")
    terminal.close_shell()
    assert_none_left(scene)
    assert int(code) == -signal.SIGINT


#: What a program is doing when it is killed, and how many lines it tells.
KILLED = {
    "nothing": ("executor = make(2)\nexecutor.submit(abs, 1).result()\nworkload.sleep(started)\n", 1),
    "result": STAGES["result"],
    "calls that defy": STAGES["result, calls that defy"],
    "initializer": STAGES["initializer"],
    "shutdown": STAGES["shutdown"],
    "threads of calls": (
        """
with make(2) as executor:
    executor.submit(workload.leave_thread, started).result()
""",
        1,
    ),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("what", KILLED)
def test_killed(scene: Scene, start_method: str, what: str, number: signal.Signals) -> None:
    """A client that a signal ends takes everything along within two seconds, and nothing is said."""
    source, told = KILLED[what]
    started = scene.fifo()
    program = Program(scene, "scaler", start_method, FIFOS + source, started.path, scene.fifo().path)
    for _ in range(told):
        started.hear()
    os.kill(program.pid, number)
    ended = program.end()
    assert_none_left(scene, 2.0)
    assert ended == Ended(-number, "", "")


@pytest.mark.parametrize("what", ["result", "initializer"])
def test_hang_up(scene: Scene, start_method: str, what: str) -> None:
    """The hang-up of its terminal ends a program and everything of it."""
    source, told = STAGES[what]
    started = scene.fifo()
    terminal = make_terminal(scene, start_method, source, started)
    for _ in range(told):
        started.hear()
    terminal.hang_up()
    wait_gone(terminal.pid)
    terminal.close_shell()
    assert_none_left(scene, 2.0)
    assert terminal.stderr == ""


def test_nohup(scene: Scene, start_method: str) -> None:
    """A program that ignores SIGHUP, as under nohup, goes on with its calls when its terminal is gone, and so do
    workers that are started after that."""
    source = """
gate = copy_of_fifo(arguments[1])
with make(2) as executor:
    one = executor.submit(workload.hold, started, gate, "held")
    one.result()
    two = [executor.submit(workload.hold, started, gate, "held") for _ in range(2)]
    print([future.result() for future in two], int(executor.submit(signal.getsignal, signal.SIGHUP).result()))
    started.tell("ended")
"""
    started, gate = scene.fifo(), scene.fifo()
    source = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{FIFOS}{source}"
    terminal = Terminal(scene, "scaler", start_method, source, started.path, gate.path)
    started.hear()
    terminal.hang_up()
    gate.open()
    for _ in range(2):
        started.hear()
    gate.open(2)
    assert started.hear() == "ended"
    terminal.close_shell()
    assert_none_left(scene)
    assert (terminal.stdout, terminal.stderr) == (f"['held', 'held'] {int(signal.SIG_IGN)}\n", "")
