"""A served cluster as its users see it: the command, connecting, several clients, machines that come and go."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, wait
from pathlib import Path
from typing import Any

import pytest
import workload
from proxy import Proxy
from served import COMMAND, Served, python_path
from support import DEADLINE_S, Scene, is_gone, wait_gone, wait_until

from scaler_executor import CancelOutcome, ScalerExecutor, SchedulerLostError, WorkerDiedError
from scaler_executor.runtime.security import Connection

Connect = Callable[..., ScalerExecutor]


@pytest.fixture
def cluster(scene: Scene) -> Iterator[Served]:
    """A served cluster of the test's own, with two workers."""
    with Served(scene.directory / "cluster") as cluster:
        yield cluster


@pytest.fixture
def connect(cluster: Served) -> Iterator[Connect]:
    """Makes executors of the cluster."""
    made: list[ScalerExecutor] = []

    def connect(max_workers: int | None = None, **options: Any) -> ScalerExecutor:
        made.append(ScalerExecutor(max_workers, address=cluster.connection, **options))
        return made[-1]

    yield connect
    for executor in made:
        executor.kill_workers()
        executor.shutdown()


def run(cluster: Served, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    words = list(map(str, command))
    return subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=DEADLINE_S)


# Connecting

PROGRAM = """
import os, sys
from concurrent.futures import ProcessPoolExecutor
{imports}

offset = 0

class Item:
    def __init__(self, value):
        self.value = value

def begin(value):
    global offset
    offset = value

def work(item):
    return item.value + offset, os.environ.get("XDG_STATE_HOME"), sys.argv[1:]

if __name__ == "__main__":
    with {make} as executor:
        print(executor.submit(work, Item(1)).result())
        print([value for value, *_ in executor.map(work, map(Item, range(5)))])
"""
OURS = "from scaler_executor import ScalerExecutor"
TOLD = "(101, '{state}', ['an', 'argument'])\n[100, 101, 102, 103, 104]\n"


def test_programs(cluster: Served, tmp_path: Path) -> None:
    """A program names the cluster by an argument, by a variable of its environment, or is told from outside. Its
    functions, classes and globals come along, and its initializer runs in each worker."""
    told = TOLD.format(state=cluster.directory)
    arguments = "initializer=begin, initargs=(100,)"
    program = tmp_path / "program.py"
    command = [sys.executable, program, "an", "argument"]

    program.write_text(
        PROGRAM.format(imports=OURS, make=f"ScalerExecutor(address={str(cluster.connection)!r}, {arguments})")
    )
    assert run(cluster, *command).stdout == told

    program.write_text(PROGRAM.format(imports=OURS, make=f"ScalerExecutor({arguments})"))
    cluster.environment["SCALER_EXECUTOR_ADDRESS"] = str(cluster.connection)
    assert run(cluster, *command).stdout == told
    del cluster.environment["SCALER_EXECUTOR_ADDRESS"]

    program.write_text(PROGRAM.format(imports="", make=f"ProcessPoolExecutor({arguments})"))
    swapped = run(cluster, *COMMAND, "run", "--address", cluster.connection, *command[1:])
    assert swapped.stdout == told, swapped.stderr


def test_another_address(scene: Scene, cluster: Served, tmp_path: Path) -> None:
    """Where the cluster is reached as another address than the one in its connection file, that address and the file
    will do together: as arguments, as variables, as options of each command. One alone is told what is missing."""
    proxy = scene.keep(Proxy(cluster.address))
    other = tmp_path / "other.json"
    connection = Connection.load(cluster.connection)
    # Nobody listens at the file's own address.
    Connection("tcp://127.0.0.1:1", connection.server_key, connection.keys).save(other)
    with ScalerExecutor(address=proxy.address, credentials=other) as executor:
        assert executor.submit(workload.echo, 1).result(DEADLINE_S) == 1
    with pytest.raises(ValueError, match="credentials=PATH"):
        ScalerExecutor(address=proxy.address)
    with pytest.raises(ValueError, match="go with an address"):
        ScalerExecutor(credentials=other)

    program = tmp_path / "program.py"
    command = [sys.executable, program, "an", "argument"]
    source = PROGRAM.format(imports=OURS, make="ScalerExecutor(initializer=begin, initargs=(100,))")
    told = TOLD.format(state=cluster.directory)
    program.write_text(source)
    variables = {"SCALER_EXECUTOR_ADDRESS": proxy.address, "SCALER_EXECUTOR_CREDENTIALS": str(other)}
    cluster.environment |= variables
    assert run(cluster, *command).stdout == told
    assert run(cluster, *COMMAND, "status").returncode == 0
    for name in variables:
        del cluster.environment[name]
    program.write_text(source.replace("import os", "import os; os.chdir('/'); import os", 1))
    both = ["--address", proxy.address, "--credentials", os.path.relpath(other)]
    swapped = run(cluster, *COMMAND, "run", *both, *command[1:])
    assert swapped.stdout == told, swapped.stderr

    agent = cluster.command("serve", "--join", proxy.address, "--credentials", str(other), "--workers", "1")
    agent.output.await_line("^connected")
    wait_until(lambda: cluster.workers() == 3, "the machine has not joined")
    assert "3 workers" in run(cluster, *COMMAND, "status", proxy.address, "--credentials", other).stdout
    cancelled = run(cluster, *COMMAND, "cancel", proxy.address, "99.1", "--credentials", other)
    assert cancelled.stdout == "99.1: not found\n", cancelled.stderr
    forgotten = [
        ["status", proxy.address],
        ["serve", "--join", proxy.address],
        ["run", "--address", proxy.address, "x"],
    ]
    for words in [*forgotten, ["cancel", proxy.address, "1.1"]]:
        refused = run(cluster, *COMMAND, *words)
        assert refused.returncode == 2 and "--credentials PATH" in refused.stderr and "Traceback" not in refused.stderr
    lost = [["status"], ["serve"], ["run", "x"]]
    for words in lost:
        refused = run(cluster, *COMMAND, words[0], "--credentials", other, *words[1:])
        assert refused.returncode == 2 and "--credentials goes with" in refused.stderr, refused.stderr


def test_initializer_once_per_worker_and_executor(scene: Scene, connect: Connect) -> None:
    """An initializer runs once in each worker, before its first call for this executor, and for no other executor."""
    journal = scene.journal()
    with connect(2, initializer=workload.note_pid, initargs=(journal, "begun")) as executor:
        pids = set(executor.map(workload.get_pid_for, range(200)))
        executor.submit(workload.note_pid, journal, "called").result(DEADLINE_S)
    with connect(2) as other:
        pids_of_other = set(other.map(workload.get_pid_for, range(200)))
    begun = [int(pid) for word, pid in journal.read() if word == "begun"]
    assert pids <= set(begun) and len(begun) == len(set(begun)) and not pids & pids_of_other
    assert journal.read()[-1][0] == "called"


def test_failing_initializer(connect: Connect) -> None:
    """It breaks its own executor, with the cause, and no other one."""
    broken = connect(initializer=workload.raise_value, initargs=("no licence",))
    assert "no licence" in str(broken.submit(workload.echo, 1).exception(DEADLINE_S))
    with pytest.raises(BrokenExecutor, match="no licence"):
        broken.submit(workload.echo, 1)
    dying = connect(initializer=os._exit, initargs=(3,))
    assert "before their first call" in str(dying.submit(workload.echo, 1).exception(DEADLINE_S))
    assert connect().submit(workload.echo, 1).result(DEADLINE_S) == 1


def test_max_workers_is_a_limit(scene: Scene, connect: Connect) -> None:
    """At most so many of an executor's calls run at once, items of a map included; others are not limited by it."""
    limited, journal = connect(1), scene.journal()
    assert limited.max_workers == 1 and connect().max_workers == 2
    futures = [limited.submit(workload.note_twice, journal) for _ in range(20)]
    list(limited.map(workload.note_twice, [journal] * 20))
    wait(futures, DEADLINE_S)
    words = [line[0] for line in journal.read()]
    assert words == ["begin", "end"] * 40
    gate = scene.fifo()
    held = [connect().submit(workload.await_gate, gate, n) for n in range(1)]
    assert connect(1).submit(workload.echo, "beside").result(DEADLINE_S) == "beside"
    gate.open()
    assert [future.result(DEADLINE_S) for future in held] == [0]


def test_max_tasks_per_child(connect: Connect) -> None:
    """A worker is replaced after so many calls of an executor that asks for it."""
    executor = connect(1, max_tasks_per_child=3)
    pids = [executor.submit(os.getpid).result(DEADLINE_S) for _ in range(9)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3]


def test_shutdown_ends_only_the_client(connect: Connect) -> None:
    """Shutting one executor down, used or not, cleanly or by force, leaves the cluster and other executors alone."""
    other = connect()
    connect().shutdown()
    connect().submit(workload.echo, 1)
    used = connect()
    used.submit(workload.echo, 1)
    used.shutdown()
    killed = connect()
    running = killed.submit(workload.sleep_for, 3600)
    wait_until(running.running, "the call does not run")
    killed.kill_workers()
    assert isinstance(running.exception(DEADLINE_S), WorkerDiedError)
    assert other.submit(workload.echo, 2).result(DEADLINE_S) == 2


def test_killed_client(scene: Scene, cluster: Served, connect: Connect) -> None:
    """When a client is killed its running calls are killed and its queued ones dropped, at once."""
    started, journal = scene.fifo(), scene.journal()
    source = """
import sys
import time
from scaler_executor import ScalerExecutor
import support, workload
started, journal = support.copy_of_fifo(sys.argv[1]), support.copy_of_journal(sys.argv[2])
executor = ScalerExecutor(address=sys.argv[3])
futures = [executor.submit(workload.sleep, started) for _ in range(2)]
futures += [executor.submit(workload.note, journal, number) for number in range(10)]
futures[-1].result()
"""
    client = scene.client(source, started.path, journal.path, cluster.connection)
    pids = [int(started.hear()) for _ in range(2)]
    os.kill(client.pid, signal.SIGKILL)
    wait_gone(*pids)
    assert connect().submit(workload.echo, 1).result(DEADLINE_S) == 1
    assert journal.read() == []


# Machines and schedulers that come and go


def test_joined_machine(scene: Scene, cluster: Served, connect: Connect) -> None:
    """What joins while work runs shares it; what leaves in order hands back what it has not started."""
    executor, gate = connect(), scene.fifo()
    futures = [executor.submit(workload.await_gate, gate, number) for number in range(8)]
    wait_until(lambda: sum(future.running() for future in futures) == 2, "the calls do not run")
    agent = cluster.join(2)
    wait_until(lambda: sum(future.running() for future in futures) == 4, "the new workers have nothing to do")
    agent.process.send_signal(signal.SIGTERM)
    agent.output.await_line("^leaving")
    gate.open(8)
    assert [future.result(DEADLINE_S) for future in futures] == list(range(8))
    assert agent.wait() == 0
    assert cluster.workers() == 2


def test_scheduler_killed_and_restarted(scene: Scene, cluster: Served, connect: Connect) -> None:
    """What was outstanding is lost, and says so; clients and machines find the next scheduler by themselves."""
    cluster.stop()
    cluster._arguments = ["--workers", "0"]
    cluster.start()
    agent = cluster.join(2)
    executor = connect()
    running, cancelled = (executor.submit(workload.sleep_for, 3600) for _ in range(2))
    wait_until(lambda: running.running() and cancelled.running(), "the calls do not run")
    os.kill(cluster.scheduler.pid, signal.SIGSTOP)
    cancelled.cancel(0)
    cluster.kill()
    cluster.start()
    assert isinstance(running.exception(DEADLINE_S), SchedulerLostError)
    wait([cancelled], DEADLINE_S)
    assert cancelled.cancelled() and cancelled.cancel_outcome is CancelOutcome.UNCONFIRMED
    assert executor.submit(workload.echo, "again").result(DEADLINE_S) == "again"
    assert executor.submit(workload.echo, "and again").result(DEADLINE_S) == "and again"
    assert not is_gone(agent.pid)


def test_lost_machine(cluster: Served, connect: Connect) -> None:
    """The calls of a machine that is gone count as started: they end with WorkerDiedError, and others go on."""
    agent = cluster.join(2)
    executor = connect()
    futures = [executor.submit(workload.sleep_for, 3600) for _ in range(4)]
    wait_until(lambda: all(future.running() for future in futures), "the calls do not run")
    agent.kill()
    wait_until(lambda: sum(future.done() for future in futures) == 2, "the loss is not noticed")
    lost = [future for future in futures if future.done()]
    assert all(isinstance(future.exception(), WorkerDiedError) for future in lost)
    executor.clear()
    assert executor.submit(workload.echo, 1).result(DEADLINE_S) == 1


# The command


def test_first_signal_drains_and_second_stops(scene: Scene, cluster: Served, connect: Connect) -> None:
    """The first one lets calls that run finish and hands queued ones back; the second one stops."""
    executor, gate = connect(), scene.fifo()
    running = [executor.submit(workload.await_gate, gate, number) for number in range(2)]
    queued = [executor.submit(workload.echo, number) for number in range(5)]
    wait_until(lambda: all(future.running() for future in running), "the calls do not run")
    cluster.process.send_signal(signal.SIGTERM)
    for future in queued:
        assert isinstance(future.exception(DEADLINE_S), SchedulerLostError)
    assert isinstance(executor.submit(workload.echo, 1).exception(DEADLINE_S), SchedulerLostError)
    gate.open(2)
    assert [future.result(DEADLINE_S) for future in running] == [0, 1]
    assert cluster.scheduler.wait() == 0
    assert "WARNING" not in cluster.output, "nobody has broken the protocol"

    cluster.start()
    other = connect().submit(workload.sleep_for, 3600)
    wait_until(other.running, "the call does not run")
    cluster.process.send_signal(signal.SIGINT)
    cluster.scheduler.output.await_line("^closing")
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.scheduler.wait() == 1
    assert isinstance(other.exception(DEADLINE_S), SchedulerLostError)


def test_grace(cluster: Served, connect: Connect) -> None:
    """What runs longer than --grace is stopped, and the exit code says so."""
    cluster.stop()
    cluster.start("--grace", "0.1")
    future = connect().submit(workload.sleep_for, 3600)
    wait_until(future.running, "the call does not run")
    assert cluster.stop() == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--bind", "127.0.0.1:1"], "not of the form tcp://HOST:PORT"),
        (["--bind", "tcp://127.0.0.1:99999"], "not of the form tcp://HOST:PORT"),
        (["--bind", "tcp://203.0.113.9:0"], "this machine has no such address"),
        (["--preload", "no_such_module"], "no module 'no_such_module' to preload"),
        (["--name", "../name"], "is no name for a cluster"),
        (["--join", "/nonexistent"], "there is no connection file at /nonexistent"),
        (["--join", "x", "--bind", "tcp://127.0.0.1:0"], "--bind does not go with --join"),
        (["--workers", "-1"], "-1 is negative"),
        (["--workers", "x"], "'x' is not a whole number"),
        (["--grace", "x"], "x is not a number of seconds"),
        (["--connection-file", __file__], f"{__file__} is there and is no connection file"),
    ],
)
def test_wrong_usage(scene: Scene, arguments: list[str], told: str) -> None:
    """What is wrong is said in a line, not in a traceback."""
    refuses(scene, ["serve", *arguments], told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["keygen", "--revoke"], "--revoke goes with the NAME of a key"),
        (["keygen", "bob"], "no cluster 'default' has been served here"),
        (["status"], "no cluster is served here"),
        (["cancel", "x"], "'x' is not a task; they are named 3.17, say"),
        (["cancel", "1.1", "y"], "'y' is not a task"),
    ],
)
def test_wrong_usage_of_other_commands(scene: Scene, arguments: list[str], told: str) -> None:
    """The same holds for what is not `serve`."""
    refuses(scene, arguments, told)


def refuses(scene: Scene, arguments: list[str], told: str) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(scene.directory)}
    environment.pop("SCALER_EXECUTOR_ADDRESS", None)
    done = subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_busy(cluster: Served) -> None:
    """A port that is taken, and a cluster that is served already, are said so."""
    busy = run(cluster, *COMMAND, "serve", "--name", "other", "--bind", cluster.address)
    assert busy.returncode == 2 and "another process listens there" in busy.stderr
    served = run(cluster, *COMMAND, "serve")
    assert served.returncode == 2 and f"by process {cluster.scheduler.pid}" in served.stderr


def test_same_port_and_keys_again(cluster: Served, connect: Connect) -> None:
    """A cluster that is served again has its address and keys of before, so connection files stay valid."""
    before = cluster.address, cluster.connection.read_text()
    cluster.stop()
    cluster.start()
    assert (cluster.address, cluster.connection.read_text()) == before
    assert connect().submit(workload.echo, 1).result(DEADLINE_S) == 1


def test_port_taken_meanwhile(cluster: Served, connect: Connect) -> None:
    """Where another process has taken the port of before, the cluster takes another one, and says what that means."""
    before = cluster.address
    cluster.stop()
    with socket.create_server(("127.0.0.1", cluster.port)):
        cluster.start()
    assert cluster.address != before
    assert f"another process listens on {before}, where this cluster was last" in cluster.output
    assert connect().submit(workload.echo, 1).result(DEADLINE_S) == 1


def test_preload(cluster: Served, connect: Connect) -> None:
    """Workers find imported what --preload names."""
    cluster.stop()
    cluster.start("--preload", "colorsys")
    assert connect().submit(eval, "'colorsys' in __import__('sys').modules").result(DEADLINE_S) is True


def test_what_serve_prints_works(cluster: Served) -> None:
    """The line of Python and the shell command that serve prints are used as they are."""
    line = cluster.scheduler.output.await_line(r"^use it: +(.*)$")[1]
    program = (
        f"from scaler_executor import ScalerExecutor\nwith {line} as executor: print(executor.submit(abs, -3).result())"
    )
    assert run(cluster, sys.executable, "-c", program).stdout == "3\n"
    command = cluster.scheduler.output.await_line(r"^join it: scaler-executor (.*)$")[1]
    agent = cluster.command(*command.split(), "--workers", "1")
    agent.output.await_line("^connected")
    wait_until(lambda: cluster.workers() == 3, "the machine has not joined")


# Looking and stopping from outside


def test_status_and_cancel(scene: Scene, cluster: Served, connect: Connect) -> None:
    """`status` tells what there is, for people and programs; `cancel` stops calls of whoever they are."""
    executor = connect()
    futures = [executor.submit(workload.sleep, scene.fifo()) for _ in range(2)]
    queued = executor.submit(workload.echo, "queued")
    wait_until(lambda: all(future.running() for future in futures), "the calls do not run")
    status: dict[str, Any] = cluster.status()
    (agent,) = status["agents"]
    (client,) = status["clients"]
    assert agent["workers"] == 2 and (client["running"], client["queued"]) == (2, 1)
    assert [call["function"] for call in status["calls"]] == ["sleep", "sleep"]
    names = [f"{call['client_id']}.{call['no']}" for call in status["calls"]]
    told = run(cluster, *COMMAND, "status")
    assert told.returncode == 0 and all(name in told.stdout for name in names) and "2 running, 1 queued" in told.stdout

    stopped = run(cluster, *COMMAND, "cancel", cluster.connection, names[0], "99.1")
    assert stopped.returncode == 1 and stopped.stdout == f"99.1: not found\n{names[0]}: stopped\n"
    wait(futures, DEADLINE_S, return_when="FIRST_COMPLETED")
    (ended,) = [future for future in futures if future.done()]
    with pytest.raises(CancelledError):
        ended.result()
    assert ended.cancel_outcome is CancelOutcome.CANCELED
    assert queued.result(DEADLINE_S) == "queued"
    executor.clear()
    assert json.loads(run(cluster, *COMMAND, "status", "--json").stdout)["done"] >= 1


def test_status_and_cancel_of_many(cluster: Served, connect: Connect) -> None:
    """With many clients and machines each is told of apart, in numbers that fit together; calls of several clients on
    several machines are stopped by one command, and what waited gets their workers."""
    for name in ("first", "second", "third"):
        cluster.command("serve", "--join", str(cluster.connection), "--workers", "1", "--name", name)
    wait_until(lambda: cluster.workers() == 5, "the machines have not joined")
    executors = [connect() for _ in range(8)]
    futures = [executor.submit(workload.sleep_for, 3600) for executor in executors]
    wait_until(lambda: sum(future.running() for future in futures) == 5, "the calls do not run")
    status: dict[str, Any] = cluster.status()
    assert {"first", "second", "third"} < {agent["name"] for agent in status["agents"]}
    assert (status["running"], status["queued"]) == (5, 3)
    clients = {client["client_id"]: client for client in status["clients"]}
    assert len(clients) == 8 and {client["running"] + client["queued"] for client in clients.values()} == {1}
    running = {call["client_id"]: f"{call['client_id']}.{call['no']}" for call in status["calls"]}
    assert len(running) == 5 and all(clients[client_id]["running"] == 1 for client_id in running)
    machines = [call["agent"] for call in status["calls"]]
    assert {machine: machines.count(machine) for machine in ("first", "second", "third")} == {
        "first": 1,
        "second": 1,
        "third": 1,
    }
    told = run(cluster, *COMMAND, "status").stdout
    assert told.startswith("4 machines, 5 workers, 8 clients;") and "5 running, 3 queued" in told
    assert all(f"\n{name} " in told for name in [*running.values(), "first", "second", "third"])

    names = list(running.values())[:3]
    stopped = run(cluster, *COMMAND, "cancel", *names, names[0], "7.99")  # the cluster that is served here
    assert stopped.returncode == 1
    assert stopped.stdout.splitlines() == ["7.99: not found", *(f"{name}: stopped" for name in names)]
    wait_until(lambda: sum(future.done() for future in futures) == 3, "the futures do not hear of it")
    assert all(future.cancel_outcome is CancelOutcome.CANCELED for future in futures if future.done())
    wait_until(lambda: sum(future.running() for future in futures) == 5, "what waited does not run")
    queued = [client for client in cluster.status()["clients"] if client["running"]]  # type: ignore[attr-defined]
    assert len(queued) == 5 and not {client["client_id"] for client in queued} & set(list(running)[:3])


def test_only_the_owner_cancels(scene: Scene, cluster: Served, connect: Connect) -> None:
    """Whoever has another key may look, but stops nobody's calls."""
    path = scene.directory / "guest.json"
    assert run(cluster, *COMMAND, "keygen", "guest", "--output", path).returncode == 0
    future = connect().submit(workload.sleep_for, 3600)
    wait_until(future.running, "the call does not run")
    assert "sleep_for" in run(cluster, *COMMAND, "status", path).stdout
    refused = run(cluster, *COMMAND, "cancel", path, "1.1")
    assert refused.returncode == 1 and "only the user who serves" in refused.stderr
    assert future.running()


def test_status_of_nothing(scene: Scene, cluster: Served) -> None:
    """A cluster that does not answer, or a missing file, is said in a line."""
    cluster.kill()
    silent = run(cluster, *COMMAND, "status", cluster.connection)
    assert silent.returncode == 1 and "no connection to the scheduler" in silent.stderr
    missing = run(cluster, *COMMAND, "status", scene.directory / "none.json")
    assert missing.returncode == 2 and "there is no connection file" in missing.stderr


LOOKS_ALL_THE_TIME = """
import sys
import time
if "serve" in sys.argv:
    from scaler_executor.protocol import agent_dispatch
    agent_dispatch.LOOK_S = 0.0
"""


def test_agent_slower_than_its_looks(scene: Scene) -> None:
    """An agent that takes longer for an event than from one look at its workers to the next still serves: here as if
    each look were late."""
    sites = scene.directory / "sites"
    sites.mkdir()
    (sites / "sitecustomize.py").write_text(LOOKS_ALL_THE_TIME)
    environment = {"PYTHONPATH": python_path(sites)}
    with Served(scene.directory / "cluster", environment=environment) as cluster:
        with ScalerExecutor(address=cluster.connection) as executor:
            futures = [executor.submit(time.sleep, 0.2) for _ in range(4)]
            assert len(wait(futures, DEADLINE_S).done) == 4 and not any(future.exception() for future in futures)
            assert list(executor.map(workload.echo, range(1000))) == list(range(1000))
        assert cluster.scheduler.stop() == 0
        assert "Traceback" not in cluster.output
