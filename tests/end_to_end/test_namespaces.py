"""Several hosts on one machine: scheduler, agent and client in network namespaces of their own, joined by a bridge.

Unlike a proxy, a link that is down loses packets, and TCP knows nothing of it. Needs root and `ip`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import served
from served import Process, Served
from support import DEADLINE_S, IS_LONG, Client, Journal, Scene, wait_until

long = pytest.mark.skipif(not IS_LONG, reason="takes long: set SCALER_EXECUTOR_LONG")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=DEADLINE_S)


def why_not() -> str | None:
    """Return why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if shutil.which("ip") is None:
        return "there is no ip command"
    name = f"se{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "name", "one", "type", "veth", "peer", "name", "two")
        ip("-n", name, "link", "add", "name", "three", "type", "bridge")
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode().strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return None


REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Lan:
    """Three hosts and a switch, which is a namespace as well: nothing of it is seen outside.

    Their addresses are 10.87.0.1 and so on, in namespaces only.
    """

    HOSTS = ("scheduler", "agent", "client")

    def __init__(self) -> None:
        self._prefix = f"se{os.getpid()}"
        self.switch = f"{self._prefix}switch"
        self._made: list[str] = []
        try:
            self._add(self.switch)
            ip("-n", self.switch, "link", "add", "name", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "dev", "bridge", "up")
            for number, host in enumerate(self.HOSTS, 1):
                name = self.name(host)
                self._add(name)
                ip("-n", self.switch, "link", "add", "name", host, "type", "veth", "peer", "name", "eth", "netns", name)
                ip("-n", self.switch, "link", "set", "dev", host, "master", "bridge", "up")
                ip("-n", name, "address", "add", f"10.87.0.{number}/24", "dev", "eth")
                ip("-n", name, "link", "set", "dev", "eth", "up")
                ip("-n", name, "link", "set", "dev", "lo", "up")
        except BaseException:
            self.close()
            raise

    def name(self, host: str) -> str:
        return self._prefix + host

    def _add(self, name: str) -> None:
        ip("netns", "add", name)
        self._made.append(name)

    def run_in(self, host: str) -> list[str]:
        """Return what goes before a command for it to run on this host."""
        return ["ip", "netns", "exec", self.name(host)]

    def cut(self, host: str, seconds: float) -> None:
        """Take a host off the switch for so long."""
        ip("-n", self.switch, "link", "set", "dev", host, "down")
        time.sleep(seconds)
        ip("-n", self.switch, "link", "set", "dev", host, "up")

    def close(self) -> None:
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


#: What is run before the command of each host.
Before = dict[str, list[str]]


class Hosts(Served):
    """A served cluster on the hosts of a LAN."""

    def __init__(self, directory: Path, lan: Lan, before: Before) -> None:
        self.lan = lan
        self.before = {host: [*lan.run_in(host), *before.get(host, [])] for host in Lan.HOSTS}
        super().__init__(directory, 0)
        self.agent = self.join(2)

    def start(self, *arguments: str) -> None:
        super().start("--bind", "tcp://10.87.0.1:5735")

    def command(self, *arguments: str) -> Process:
        host = "agent" if "--join" in arguments else "scheduler"
        process = Process(list(arguments), self.environment, self.before[host])
        self._processes.append(process)
        return process

    def status_command(self) -> list[str]:
        return [*self.lan.run_in("scheduler"), *served.COMMAND]

    def client(self, scene: Scene, source: str, *arguments: object) -> Client:
        """Run a program on the client's host."""
        return scene.client(source, self.connection, *arguments, before=self.before["client"])  # type: ignore[no-any-return]


@pytest.fixture
def lan() -> Iterator[Lan]:
    lan = Lan()
    yield lan
    lan.close()


@pytest.fixture
def before(request: pytest.FixtureRequest) -> Before:
    return getattr(request, "param", {})


@pytest.fixture
def hosts(scene: Scene, lan: Lan, before: Before) -> Iterator[Hosts]:
    with Hosts(scene.directory / "cluster", lan, before) as hosts:
        yield hosts


CALLS = """
import sys
from scaler_executor import ScalerExecutor
import support, workload
journal, count = support.copy_of_journal(sys.argv[2]), int(sys.argv[3])
with ScalerExecutor(address=sys.argv[1]) as executor:
    futures = [executor.submit(workload.timed, journal, number, 0.1, False) for number in range(count)]
    print(sum(future.result() == number for number, future in enumerate(futures)))
"""


def check_once(journal: Journal, count: int) -> None:
    lines = Counter((word, int(number)) for word, number in journal.read())
    assert lines == {(word, number): 1 for number in range(count) for word in ("start", "end")}


@pytest.mark.parametrize(
    ("host", "seconds"),
    [
        ("agent", 3),
        pytest.param("client", 3, marks=long),
        pytest.param("scheduler", 3, marks=long),
        pytest.param("agent", 5.5, marks=long),
        pytest.param("client", 20, marks=long),
    ],
)
def test_short_cut(scene: Scene, lan: Lan, hosts: Hosts, host: str, seconds: float) -> None:
    """A host that was off the network for a while goes on as if nothing had been."""
    journal = scene.journal()
    client = hosts.client(scene, CALLS, journal.path, 80)
    wait_until(journal.read, "no call runs")
    lan.cut(host, seconds)
    assert client.succeed().split() == ["80"]
    check_once(journal, 80)
    assert "joins again" not in hosts.agent.output.read()


LONG_CALLS = """
import sys
from scaler_executor import ScalerExecutor
import support, workload
journal = support.copy_of_journal(sys.argv[2])
with ScalerExecutor(address=sys.argv[1]) as executor:
    futures = [executor.submit(workload.write_beats, journal, number) for number in range(2)]
    errors = [type(future.exception()).__name__ for future in futures]
    journal.write("given", "up")
    print(*errors)
    print(executor.submit(workload.echo, "again").result())
"""
CLOCKS = {
    "agent": ["unshare", "--time", "--monotonic", "1000000", "--boottime", "1000000", "--fork", "--kill-child"],
    "client": ["unshare", "--time", "--monotonic", "5000", "--boottime", "5000", "--fork", "--kill-child"],
}


def why_no_clocks() -> str | None:
    """Return why processes cannot have clocks of their own here, or None."""
    command = [*CLOCKS["agent"], sys.executable, "-c", "import time; print(time.monotonic())"]
    try:
        told = subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no clocks of their own: {error}"
    return None if float(told.stdout) > time.monotonic() + 500_000 else "the clocks are all the same"


clocks = pytest.mark.skipif(REASON is not None or why_no_clocks() is not None, reason="no time namespaces here")


@pytest.mark.parametrize(
    "before", [pytest.param({}, marks=long), pytest.param(CLOCKS, marks=clocks)], indirect=True, ids=["same", "clocks"]
)
def test_long_cut_of_the_agent(scene: Scene, lan: Lan, hosts: Hosts) -> None:
    """Calls of a machine that is off the network too long have stopped before they are given up, also if its clock
    shows something else. It joins again."""
    journal = scene.journal()
    client = hosts.client(scene, LONG_CALLS, journal.path)
    wait_until(lambda: {line[1] for line in journal.read()} == {"0", "1"}, "the calls do not run")
    lan.cut("agent", 12)
    assert client.succeed().split() == ["WorkerDiedError", "WorkerDiedError", "again"]
    lines = journal.read()
    assert lines[-1] == ["given", "up"], "a call ran on after it was given up"
    assert "joins again" in hosts.agent.output.read()


@clocks
@pytest.mark.parametrize("before", [CLOCKS], indirect=True, ids=["clocks"])
def test_short_cut_with_clocks_that_disagree(scene: Scene, lan: Lan, hosts: Hosts) -> None:
    """What the clocks show is of no account."""
    test_short_cut(scene, lan, hosts, "agent", 3)


def test_nothing_is_left(lan: Lan) -> None:
    """The namespaces can be seen, and are gone afterwards."""
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert all(lan.name(host) in names for host in Lan.HOSTS)
    lan.close()
    assert lan.switch not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
