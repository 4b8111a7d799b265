"""`scaler-executor serve` where no person started it: as process 1 of a container, by systemd, without a terminal."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import workload
from served import COMMAND, Process, environment_of
from support import DEADLINE_S, Scene, children_of, read_proc, state_of, wait_until

from scaler_executor import ScalerExecutor

IN_A_CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@functools.cache
def can_be_process_1() -> bool:
    try:
        return subprocess.run([*IN_A_CONTAINER, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def start(scene: Scene, *options: str, before: tuple[str, ...] = (), **variables: str) -> Process:
    arguments = ["serve", "--bind", "tcp://127.0.0.1:*", "--workers", "1", *options]
    process = Process(arguments, environment_of(scene.directory) | variables, before)
    return scene.keep(process)  # type: ignore[no-any-return]


def connection_of(scene: Scene) -> Path:
    return scene.directory / "scaler-executor" / "default" / "connection.json"


def holds_signals_back(pid: int) -> bool:
    blocked = [line.split()[1] for line in read_proc(pid, "status").decode().splitlines() if line.startswith("SigBlk")]
    return bool(blocked) and bool(int(blocked[0], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.fixture
def process_1(scene: Scene) -> tuple[Process, int]:
    """A served cluster as process 1 of a pid namespace: unshare's process, and its own number outside."""
    if not can_be_process_1():
        pytest.skip("making a pid namespace takes root")
    process = start(scene, before=tuple(IN_A_CONTAINER))
    process.output.await_line("^join it")
    (pid,) = children_of(process.pid)
    return process, pid


def test_process_1_reaps(scene: Scene, process_1: tuple[Process, int]) -> None:
    """Process 1 gets the orphans of its container: those of calls, of whoever came in from outside, and of a forker
    that was killed. None is left as a zombie, and calls go on."""
    _, pid = process_1
    (forker,) = children_of(pid)
    with ScalerExecutor(address=connection_of(scene)) as executor:
        executor.submit(workload.leave_daemon).result(DEADLINE_S)
        enter = ["nsenter", "-t", str(pid), "--pid", "--mount"]
        subprocess.run([*enter, "sh", "-c", "(true &); (sh -c 'kill -9 $$' &)"], check=True)
        os.kill(forker, signal.SIGKILL)
        wait_until(lambda: forker not in children_of(pid), "the forker is a zombie")
        assert executor.submit(workload.echo, 1).result(DEADLINE_S) == 1
        wait_until(lambda: [state_of(child) for child in children_of(pid)] == ["S"], "zombies, or more than the forker")


def test_process_1_hears_signals(scene: Scene, process_1: tuple[Process, int]) -> None:
    """Process 1, for which the system does nothing about a signal, drains at SIGTERM and stops at a second one, with
    the exit codes as everywhere."""
    process, pid = process_1
    with ScalerExecutor(address=connection_of(scene)) as executor:
        executor.submit(workload.echo, 1).result(DEADLINE_S)
    os.kill(pid, signal.SIGTERM)
    assert process.wait() == 0
    process = start(scene, before=tuple(IN_A_CONTAINER))
    process.output.await_line("^join it")
    (pid,) = children_of(process.pid)
    executor = ScalerExecutor(address=connection_of(scene))
    future = executor.submit(workload.sleep_for, 3600)
    wait_until(future.running, "the call does not run")
    os.kill(pid, signal.SIGTERM)
    process.output.await_line("^closing")
    os.kill(pid, signal.SIGTERM)
    assert process.wait() == 1
    assert future.exception(DEADLINE_S) is not None
    executor.shutdown()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_starting(scene: Scene, number: int) -> None:
    """One that comes while it still starts ends it in order, as soon as it can, without a traceback."""
    process = start(scene)
    wait_until(lambda: holds_signals_back(process.pid), "it does not hold signals back")
    process.process.send_signal(number)
    assert process.wait() == 0
    assert "Traceback" not in process.output.text and process.output.text.endswith("closed\n")


def test_blocked_by_whoever_started_it(scene: Scene) -> None:
    """A SIGTERM that was blocked, or ignored, in the process that started it counts all the same."""
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    script = f"import os, signal, sys; {block}; os.execv(sys.argv[1], sys.argv[1:])"
    process = start(scene, before=(COMMAND[0], "-c", script))
    process.output.await_line("^join it")
    assert process.stop() == 0


def test_a_machine_leaves_at_once(scene: Scene) -> None:
    """One that has nothing to do has left when the scheduler has heard so, and waits for nothing else."""
    process = start(scene)
    process.output.await_line("^join it")
    took_s: list[float] = []
    # A machine that does other things has its moments.
    while len(took_s) < 5 and min(took_s, default=DEADLINE_S) > 2:
        agent = scene.keep(Process(["serve", "--join", str(connection_of(scene))], environment_of(scene.directory)))
        agent.output.await_line("^connected")
        began = time.monotonic()
        assert agent.stop() == 0
        took_s.append(time.monotonic() - began)
    assert min(took_s) <= 2


def test_closed_standard_descriptors(scene: Scene) -> None:
    """Without standard input, output and error nothing else gets their numbers, where it would be printed into."""
    process = start(scene, before=("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"))
    wait_until(connection_of(scene).exists, "it is not served")
    with ScalerExecutor(address=connection_of(scene)) as executor:
        executor.submit(print, "nowhere").result(DEADLINE_S)
        assert executor.submit(workload.echo, 1).result(DEADLINE_S) == 1
        (forker,) = children_of(process.pid)
        for pid in (process.pid, forker):
            assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    assert process.stop() == 0


def test_nobody_reads(scene: Scene) -> None:
    """Where its output goes to nobody any more, or the terminal is gone, it serves on."""
    command = [*COMMAND, "serve", "--bind", "tcp://127.0.0.1:*", "--workers", "1"]
    process = subprocess.Popen(command, env=environment_of(scene.directory), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        with process.stdout as output:
            while not output.readline().startswith(b"join it"):
                assert process.poll() is None
        process.send_signal(signal.SIGHUP)
        with ScalerExecutor(address=connection_of(scene)) as executor:
            assert executor.submit(workload.echo, 1).result(DEADLINE_S) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["a path", "abstract"])
def test_notify(scene: Scene, kind: str) -> None:
    """systemd (`Type=notify`) hears from serve that it listens, and from a machine that joins that it has begun; calls
    do not find its socket in their environment."""
    name = str(scene.directory / "notify") if kind == "a path" else f"@scaler-executor-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(DEADLINE_S)
        manager.bind(name.replace("@", "\0"))
        process = start(scene, NOTIFY_SOCKET=name)
        told = manager.recv(4096).decode()
        address = process.output.await_line(r"^listening on (\S+),")[1]
        assert told == f"READY=1\nSTATUS=listening on {address}, 1 worker here\n"
        with ScalerExecutor(address=connection_of(scene)) as executor:
            assert executor.submit(os.environ.get, "NOTIFY_SOCKET").result(DEADLINE_S) is None
        environment = environment_of(scene.directory) | {"NOTIFY_SOCKET": name}
        agent = scene.keep(Process(["serve", "--join", str(connection_of(scene)), "--workers", "1"], environment))
        assert manager.recv(4096).decode() == f"READY=1\nSTATUS=joining {address} with 1 worker\n"
        agent.output.await_line("^connected")
        assert agent.stop() == process.stop() == 0
