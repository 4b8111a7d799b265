"""A served cluster and those who should not be there: strangers, keys that are wrong or revoked, and peers that are let
in and misbehave. Whatever they do, they are refused, and the calls of others go on.

What is refused is refused within the time that the contract gives; the limits here leave room for a busy machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import struct
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import workload
import zmq
from served import Process, Served, environment_of, python_path, run_command
from speaker import Cable, Speaker
from support import DEADLINE_S, Scene, read_proc, wait_until

from scaler_executor import AuthenticationError, ScalerExecutor, VersionMismatchError
from scaler_executor.protocol import link
from scaler_executor.protocol.messages import (
    CLIENT_ID_SHIFT,
    PROTOCOL_VERSION,
    AgentCapacity,
    AgentResult,
    Bye,
    CancelKind,
    Function,
    Hello,
    OperatorCancel,
    RefusalKind,
    Refused,
    StatusAsk,
    TaskCancel,
    TaskCancelConfirm,
    TaskSubmit,
    Welcome,
)
from scaler_executor.protocol.parcels import Packet
from scaler_executor.runtime.hosting import python_version
from scaler_executor.runtime.security import ConfigurationError, Connection, Keys

#: 5 s, and some for a machine that does other things.
REFUSED_S = 9.0


def serve(scene: Scene, *arguments: object, **options: Any) -> Served:
    """A cluster of the test's own: see `Served`."""
    return scene.keep(Served(scene.directory, *arguments, **options))  # type: ignore[no-any-return]


@pytest.fixture
def served(scene: Scene) -> Served:
    """A cluster with two workers."""
    return serve(scene)


@contextlib.contextmanager
def connected(served: Served, path: Path | None = None):
    """An executor of the cluster that makes calls before and after: it is not disturbed."""
    with ScalerExecutor(address=path or served.connection) as executor:
        assert executor.submit(workload.echo, 1).result(DEADLINE_S) == 1
        try:
            yield executor
        except BaseException:
            executor.clear()  # or leaving would wait for what the test holds back
            raise
        assert list(executor.map(workload.echo, range(20), timeout=DEADLINE_S)) == list(range(20))
    assert served.process.poll() is None, served.output


def status(served: Served) -> dict:
    done = served.run("status", served.connection, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Strangers


def greeting(mechanism: bytes, version: tuple[int, int] = (3, 1), as_server: bool = False) -> bytes:
    """Return the greeting of ZMTP, see ZeroMQ RFC 37."""
    return b"\xff" + bytes(8) + b"\x7f" + bytes(version) + mechanism.ljust(20, b"\0") + bytes([as_server]) + bytes(31)


def command(name: bytes, body: bytes = b"") -> bytes:
    data = bytes([len(name)]) + name + body
    return bytes([4, len(data)]) + data


CURVE = greeting(b"CURVE")
READY = command(b"READY", b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER")
STRANGERS = {
    "silence": b"",
    "HTTP": b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "zeros": bytes(10_000),
    "ones": b"\xff" * 10_000,
    "half a greeting": CURVE[:32],
    "a signature": CURVE[:10],
    "a greeting": CURVE,
    "NULL": greeting(b"NULL") + READY,
    "PLAIN": greeting(b"PLAIN") + command(b"HELLO", b"\x05admin\x05admin") + command(b"INITIATE"),
    "GSSAPI": greeting(b"GSSAPI") + command(b"INITIATE"),
    "no mechanism": greeting(b"") + READY,
    "ZMTP 1": b"\x01\x00" + b"\x06\x00hello",
    "ZMTP 2": b"\xff" + bytes(8) + b"\x7f\x01\x05" + b"\x00\x00" + b"\x00\x05hello",
    "ZMTP 3.0, NULL": greeting(b"NULL", (3, 0)) + READY,
    "ZMTP 9, NULL": greeting(b"NULL", (9, 9)) + READY,
    "CURVE as server": greeting(b"CURVE", as_server=True),
    "CURVE, then READY": CURVE + READY,
    "CURVE, then a message": CURVE + b"\x00\x05hello",
    "CURVE, then nonsense": CURVE + command(b"HELLO", bytes(194)),
    "CURVE, INITIATE first": CURVE + command(b"INITIATE", bytes(240)),
    "CURVE, then a huge frame": CURVE + b"\x02" + struct.pack(">Q", 1 << 62),
    "CURVE, then an error": CURVE + command(b"ERROR", b"\x04oops"),
}


def await_end(sock: socket.socket, deadline: float) -> bytes:
    """Return all that comes until the other end closes."""
    data = b""
    poller = select.poll()  # select knows small descriptors only
    poller.register(sock, select.POLLIN)
    while True:
        left_s = deadline - time.monotonic()
        assert left_s > 0 and poller.poll(left_s * 1000), f"still open; it said {data!r}"
        try:
            part = sock.recv(4096)
        except ConnectionError:
            part = b""
        if not part:
            return data
        data += part


def test_strangers(served: Served) -> None:
    """HTTP, other protocols, other mechanisms, older versions and half a handshake: each is cut off within 5 s without
    having been told anything but the greeting, and a client's calls go on."""
    with connected(served) as executor, contextlib.ExitStack() as stack:
        socks = {}
        deadline = time.monotonic() + REFUSED_S
        for name, data in STRANGERS.items():
            socks[name] = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            socks[name].sendall(data)
        assert list(executor.map(workload.echo, range(20), timeout=DEADLINE_S)) == list(range(20))
        for name, sock in socks.items():
            said = await_end(sock, deadline)
            # It may say why: an ERROR command of the mechanism.
            assert len(said) <= 64 or said[66:71] == b"ERROR", name
            assert b"READY" not in said and b"WELCOME" not in said, name
        assert len(status(served)["clients"]) == 1


@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN", "CURVE server", "ZAP domain only"])
def test_other_mechanisms(served: Served, mechanism: str) -> None:
    """A real zmq socket without our keys gets through no handshake, whatever it calls itself."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        if mechanism == "PLAIN":
            sock.plain_username, sock.plain_password = b"admin", b"admin"
        elif mechanism == "CURVE server":
            keys = Keys.create()
            sock.curve_publickey, sock.curve_secretkey, sock.curve_server = keys.public, keys.secret, True
        elif mechanism == "ZAP domain only":
            sock.zap_domain = b"scaler-executor"
        monitor = sock.get_monitor_socket()
        sock.connect(served.address)
        sock.send_multipart([msgspec.msgpack.encode([1, 1, b"nonce", b"", 0])])
        seen = set()
        deadline = time.monotonic() + REFUSED_S
        while zmq.EVENT_DISCONNECTED not in seen and monitor.poll(max(0, deadline - time.monotonic()) * 1000):
            seen.add(struct.unpack("=hi", monitor.recv_multipart()[0])[0] & 0xFFFF)
        assert zmq.EVENT_CONNECTED in seen and zmq.EVENT_HANDSHAKE_SUCCEEDED not in seen, seen
        assert seen & {zmq.EVENT_DISCONNECTED, 0x0800, 0x1000, 0x2000, 0x4000}, seen
        assert not sock.poll(0)
        sock.disable_monitor()
        monitor.close()
    assert status(served)["clients"] == []


def test_half_open_connections(served: Served) -> None:
    """Two thousand connections that never finish their handshake keep neither a client's calls nor another client from
    getting through, and are gone within the time."""
    count = 2000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 500:
        pytest.skip(f"this process may have {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with connected(served) as executor, contextlib.ExitStack() as stack:
            socks = []
            for number in range(count):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
                sock.sendall([b"", CURVE[:10], CURVE[:40], CURVE][number % 4])
                socks.append(sock)
                if number % 200 == 0:
                    assert executor.submit(workload.echo, number).result(DEADLINE_S) == number
            deadline = time.monotonic() + REFUSED_S
            with connected(served):
                pass
            for sock in socks:
                await_end(sock, deadline)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_descriptor_is_left(scene: Scene) -> None:
    """Strangers who take every descriptor that the cluster may have do not end it, nor anybody's session; when they
    have gone it is as before, revocation included."""
    served = serve(scene, before=["sh", "-c", 'ulimit -n 120 && exec "$@"', "sh"])
    bob = served.keygen("bob")
    with connected(served) as executor:
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            wait_until(lambda: len(os.listdir(f"/proc/{served.pid}/fd")) >= 120, "descriptors are left")
            for number in range(50):
                assert executor.submit(workload.echo, number).result(DEADLINE_S) == number
            served.keygen("late")
            assert executor.submit(workload.echo, 3).result(DEADLINE_S) == 3
        with connected(served, bob):
            served.revoke("late")


# Keys


def with_keys(scene: Scene, served: Served, **changes: object) -> Path:
    """Write another connection file."""
    connection = Connection.load(served.connection)
    values = {"address": connection.address, "server_key": connection.server_key, "keys": connection.keys} | changes
    path = scene.directory / f"other_{len(list(scene.directory.glob('other_*')))}.json"
    Connection(**values).save(path)
    return path


@pytest.mark.parametrize("which", ["client's", "server's", "mismatched"])
def test_wrong_key(scene: Scene, served: Served, which: str) -> None:
    """A key that is not allowed, and one of another server, are refused with AuthenticationError within a second;
    clients that are there notice nothing."""
    own = Connection.load(served.connection).keys
    path = with_keys(
        scene,
        served,
        **{
            "client's": {"keys": Keys.create()},
            "server's": {"server_key": Keys.create().public},
            "mismatched": {"keys": Keys(own.public, Keys.create().secret)},
        }[which],
    )
    with connected(served):
        took_s = []
        # A machine that does other things has its moments, but not ten in a row.
        while len(took_s) < 10 and min(took_s, default=2.0) > 1.0:
            start = time.monotonic()
            with pytest.raises(AuthenticationError, match="refuses this client") as caught:
                ScalerExecutor(address=path)
            took_s.append(time.monotonic() - start)
        assert min(took_s) <= 1.0
        done = served.run("status", path)
        assert done.returncode == 1 and "refuses" in done.stderr
    for key in (own.secret, own.public):
        assert key.decode() not in str(caught.value) + done.stderr


def test_agent_with_wrong_key(scene: Scene, served: Served) -> None:
    """A machine whose key is not allowed does not get in, and says why."""
    path = with_keys(scene, served, keys=Keys.create())
    arguments = ["serve", "--join", path, "--workers", 1]
    agent = scene.keep(Process(arguments, served.environment))
    agent.output.await_line("no connection to .*not allowed")
    assert len(status(served)["agents"]) == 1
    agent.kill()


def test_revoked(scene: Scene, served: Served) -> None:
    """Revoking a key ends its session and stops its calls; it does not get in again. Others notice nothing."""
    bob = served.keygen("bob")
    spinning, beat = scene.fifo(), scene.heartbeat()
    with connected(served) as executor:
        started, gate = scene.fifo(), scene.fifo()
        held = executor.submit(workload.hold, started, gate, "mine")
        started.hear()
        with ScalerExecutor(address=bob) as theirs:
            running = theirs.submit(workload.spin, spinning, beat)
            beat.await_beat()
            served.revoke("bob")
            with pytest.raises(BrokenExecutor):
                running.result(DEADLINE_S)
            with pytest.raises((BrokenExecutor, RuntimeError)):
                theirs.submit(workload.echo, 1).result(DEADLINE_S)
        wait_until(lambda: status(served)["running"] <= 1 and len(status(served)["clients"]) == 1, "it is still there")
        count = beat.count
        with pytest.raises(AuthenticationError, match="refuses this client"):
            ScalerExecutor(address=bob)
        assert beat.count == count
        gate.open()
        assert held.result(DEADLINE_S) == "mine"


def test_revoked_and_given_again(scene: Scene, served: Served) -> None:
    """A name that is given to another key at once does not keep the session of the first one alive."""
    speaker = scene.keep(Speaker(served.keygen("bob")))
    assert isinstance(speaker.hello("client"), Welcome)
    clients = served.files / "clients"
    (clients / "new").write_text(json.dumps({"public_key": Keys.create().public.decode()}))
    (clients / "new").chmod(0o600)
    (clients / "new").replace(clients / "bob.json")
    refused = speaker.hear()
    assert isinstance(refused, Refused) and refused.kind == RefusalKind.KEY


def test_revoked_agent(scene: Scene, served: Served) -> None:
    """An agent's key is revoked like a client's, and the agent ends."""
    agent = served.join(connection=served.keygen("machine"))
    wait_until(lambda: len(status(served)["agents"]) == 2, "it is not there")
    served.revoke("machine")
    assert agent.wait() == 1
    assert "its key has been revoked" in agent.output
    wait_until(lambda: len(status(served)["agents"]) == 1, "it is still there")


def test_files_that_others_may_read(served: Served) -> None:
    """A connection file that others may read is refused, with the command that mends it, wherever one is named."""
    for path in [served.files / name for name in ("server.json", "connection.json", "clients/owner.json")]:
        assert path.stat().st_mode & 0o777 == 0o600, path
    served.connection.chmod(0o644)
    fix = f"chmod 600 {served.connection}"
    with pytest.raises(ConfigurationError, match=fix):
        ScalerExecutor(address=served.connection)
    for arguments in (["serve", "--join", served.connection], ["status", served.connection]):
        done = served.run(*arguments)
        assert done.returncode == 2 and fix in done.stderr
    served.files.chmod(0o755)
    done = served.run("keygen", "bob")
    assert done.returncode == 2 and f"chmod 700 {served.files}" in done.stderr


@pytest.mark.parametrize("bind", ["ipc:///tmp/socket", "inproc://x", "127.0.0.1:5735", "tcp://127.0.0.1", "ws://*:1"])
def test_nothing_but_tcp(scene: Scene, bind: str) -> None:
    """There is nothing else to listen on than TCP with keys."""
    done = run_command(environment_of(scene.directory), "serve", "--bind", bind, "--workers", 0)
    assert done.returncode == 2 and "not of the form tcp://HOST:PORT" in done.stderr


# Versions


@pytest.mark.parametrize("what", ["protocol", "Python"])
def test_other_versions(scene: Scene, what: str) -> None:
    """A cluster that speaks another version, or runs another Python, refuses clients and agents, with both named."""
    hook = scene.directory / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import scaler_executor.protocol.messages as messages; messages.PROTOCOL_VERSION = 77\n"
        if what == "protocol"
        else "import scaler_executor.runtime.host as host; host.python_version = lambda: '2.7'\n"
    )
    served = serve(scene, 0, environment={"PYTHONPATH": python_path(hook)})
    both = {"protocol": f"version {PROTOCOL_VERSION} .* 77", "Python": f"{python_version()}, .* 2.7"}[what]
    with pytest.raises(VersionMismatchError, match=both):
        ScalerExecutor(address=served.connection)
    own = dict(served.environment, PYTHONPATH=python_path())
    agent = scene.keep(Process(["serve", "--join", served.connection, "--workers", 1], own))
    agent.output.await_line(both)
    assert agent.wait() == 1


# Peers with a key that do as they like


def test_guessing_task_ids(scene: Scene, served: Served) -> None:
    """A client that names other clients' calls by every number that they may have stops none and hears of none."""
    mallory = scene.keep(Speaker(served.keygen("mallory")))
    started, gate = scene.fifo(), scene.fifo()
    with connected(served) as executor:
        held = [executor.submit(workload.hold, started, gate, number) for number in range(2)]
        queued = executor.submit(workload.echo, "queued")
        for _ in held:
            started.hear()
        welcome = mallory.hello("client")
        assert isinstance(welcome, Welcome)
        theirs, own = 1 << CLIENT_ID_SHIFT, welcome.peer_id << CLIENT_ID_SHIFT
        guesses = list(range(1, 6))
        for kind in (CancelKind.SOFT, CancelKind.FORCED):
            mallory.say(TaskCancel([(no, 1, kind) for no in guesses]))
            assert mallory.hear() == TaskCancelConfirm([(no, 1, 1, 0, 0, True) for no in guesses])
        assert not any(future.done() for future in [*held, queued])
        gate.open(2)
        assert [future.result(DEADLINE_S) for future in held] == [0, 1]
        assert queued.result(DEADLINE_S) == "queued"
        mallory.say(TaskCancel([(1, 2, CancelKind.FORCED)]))
        assert mallory.hear() == TaskCancelConfirm([(1, 2, 1, 0, 0, True)])  # nothing was said in between
        mallory.say(AgentResult([(theirs + 1, 1, 0, 1, 0, b"forged")]))
        wait_until(mallory.is_forgotten, "a client that speaks as an agent is still there")
        # The numbers by which the scheduler itself knows the calls are those of nobody.
        for number, base in enumerate((theirs, theirs - own, own, own - theirs)):
            trent = scene.keep(Speaker(served.keygen(f"trent_{number}")))
            trent.hello("client")
            trent.say(TaskCancel([(base + 1, 1, CancelKind.FORCED)]))
            wait_until(trent.is_forgotten, "a client that names such a number is still there")


def test_taking_over_a_session(scene: Scene, served: Served) -> None:
    """Who knows the nonces of somebody else's session cannot go on with it: it is of another key."""
    alice = scene.keep(Speaker(served.keygen("alice")))
    mallory = scene.keep(Speaker(served.keygen("mallory"), alice.nonce))
    assert isinstance(alice.hello("client"), Welcome)
    mallory.epoch = 2
    assert mallory.greet(alice.theirs).sender != alice.theirs
    alice.say(TaskCancel([(1, 1, CancelKind.FORCED)]))
    assert isinstance(alice.hear(), TaskCancelConfirm)


def test_another_session_of_a_client(scene: Scene, served: Served) -> None:
    """Who begins anew, and knows the secret of the earlier session, ends that one; with another secret nobody does."""
    sessions = [scene.keep(Speaker(served.keygen(f"carol_{number}"))) for number in range(3)]
    for session, secret in zip(sessions, (b"secret", b"another", b"secret"), strict=True):
        assert isinstance(session.hello("client", secret=secret), Welcome)
    assert len(status(served)["clients"]) == 2
    for session in sessions[1:]:
        session.say(TaskCancel([(1, 1, CancelKind.FORCED)]))
        assert isinstance(session.hear(), TaskCancelConfirm)


def hello_of(role: str) -> Hello:
    return Hello(role, python=python_version())


HUGE = (1 << 64) - 1
MISBEHAVIOUR = {
    "nothing after the greeting": lambda peer: None,
    "no frame": lambda peer: peer.put(b"garbage"),
    "an empty part": lambda peer: peer.put(b""),
    "many parts": lambda peer: peer.put(*[b"x"] * 70_000),
    "a second greeting": lambda peer: peer.transmit(link.Greeting(2, peer.nonce, peer.theirs, 0)),
    "a second session": lambda peer: peer.transmit(link.Greeting(1, os.urandom(16), b"", 0)),
    "a gap": lambda peer: peer.transmit(link.Data(1, 5, 0, Packet([b"x"]))),
    "huge numbers": lambda peer: peer.transmit(link.Data(1, HUGE, HUGE, Packet([b"x"]))),
    "acknowledging what was not sent": lambda peer: peer.transmit(link.Ack(1, HUGE)),
    "an echo from the future": lambda peer: peer.transmit(link.Ack(1, 0, 0.0, 1e300)),
    "no message": lambda peer: peer.packet(Packet([b"garbage"])),
    "no parts": lambda peer: peer.packet(Packet([])),
    "pieces of nothing": lambda peer: peer.packet(Packet([b"x"], 0, False, [(0, 9)])),
    "a negative piece": lambda peer: peer.packet(Packet([b"x"], -9)),
    "calls before Hello": lambda peer: peer.say(TaskSubmit([(1, 1, 0, b"")])),
    "a status before Hello": lambda peer: peer.say(StatusAsk()),
    "no role": lambda peer: peer.say(hello_of("king")),
    "a huge version": lambda peer: peer.say(Hello("client", version=HUGE)),
    "a negative version": lambda peer: peer.say(Hello("client", version=-1)),
    "another Python": lambda peer: peer.say(Hello("client", python="\x1b[31m" * 10_000)),
    "a second Hello": lambda peer: peer.say(hello_of("client"), hello_of("agent")),
    "an agent's words": lambda peer: peer.say(hello_of("client"), AgentCapacity(1, 1)),
    "a client's words": lambda peer: peer.say(hello_of("agent"), TaskSubmit([(1, 1, 0, b"")])),
    "an operator's words": lambda peer: peer.say(hello_of("client"), OperatorCancel([(1, 1)])),
    "huge room": lambda peer: peer.say(hello_of("agent"), AgentCapacity(HUGE, HUGE)),
    "a negative call": lambda peer: peer.say(hello_of("client"), TaskSubmit([(-1, 1, 0, b"")])),
    "huge calls": lambda peer: peer.say(hello_of("client"), TaskSubmit([(1, HUGE, 0, b"")])),
    "no such function": lambda peer: peer.say(hello_of("client"), TaskSubmit([(1, 1, 7, b"")])),
    "no such need": lambda peer: peer.say(hello_of("client"), TaskSubmit([], [Function(1, "", b"", needs=[HUGE])])),
    "no such kind": lambda peer: peer.say(hello_of("client"), TaskCancel([(1, 1, 9)])),
    "leaving with calls": lambda peer: peer.say(hello_of("client"), TaskSubmit([(1, 1 << 30, 0, b"")]), Bye()),
}


def test_misbehaviour(scene: Scene, served: Served) -> None:
    """Whatever somebody with a key does that breaks the rules ends that session within 5 s, and disturbs nobody."""
    path = served.keygen("mallory")
    with connected(served) as executor:
        peers = {}
        deadline = time.monotonic() + REFUSED_S
        for name, act in MISBEHAVIOUR.items():
            peer = peers[name] = scene.keep(Speaker(path))
            peer.greet()
            act(peer)
        assert list(executor.map(workload.echo, range(20), timeout=DEADLINE_S)) == list(range(20))
        for name, peer in peers.items():
            wait_until(peer.is_forgotten, f"{name}: still there", max(1.0, deadline - time.monotonic()))
        report = status(served)
        assert (len(report["clients"]), len(report["agents"])) == (1, 1)
    assert "\x1b" not in served.output and "Traceback" not in served.output


def test_greeting_again_and_again(scene: Scene, served: Served) -> None:
    """One connection has one session: whoever begins thousands has none in the end."""
    peer = scene.keep(Speaker(served.keygen("mallory")))
    with connected(served):
        for _ in range(3000):
            peer.transmit(link.Greeting(1, os.urandom(16), b"", 0))
        observer = scene.keep(Speaker(served.connection))
        assert isinstance(observer.hello("observer"), Welcome)


def test_blobs_that_are_never_finished(scene: Scene, served: Served) -> None:
    """What somebody begins to send and never ends is limited, and takes little more than its own size."""
    peer = scene.keep(Speaker(served.keygen("mallory")))
    with connected(served):
        assert isinstance(peer.hello("client"), Welcome)
        peer.acknowledges = False
        before = memory_of(served.pid)
        for blob in range(1, 20_001):
            peer.packet(Packet([b"x"], blob))
        while (frame := peer.next_frame()) is not None and frame.received < peer.seq:
            pass
        assert frame is not None
        peer.packet(Packet([bytes(1000)] * 2, 1))
        wait_until(peer.is_forgotten, "still there")
        assert memory_of(served.pid) - before < 200 << 20


def memory_of(pid: int) -> int:
    """Return how many bytes are resident."""
    return int(read_proc(pid, "statm").split()[1]) * resource.getpagesize()


def test_hostile_agent(scene: Scene, served: Served) -> None:
    """An agent that answers calls that it does not have, answers its own with nonsense and then vanishes: the calls of
    its that it held fail or are made elsewhere, all others go on."""
    path = served.keygen("machine")
    with connected(served) as executor:
        # Only now, for it says nothing while it does nothing, and would be taken for cut off.
        agent = scene.keep(Speaker(path))
        assert isinstance(agent.hello("agent"), Welcome)
        agent.say(AgentCapacity(2, 2))
        agent.say(AgentResult([((1 << CLIENT_ID_SHIFT) + no, 1, 0, 1, 0, b"forged") for no in range(100)]))
        started, gate = scene.fifo(), scene.fifo()
        futures = [executor.submit(workload.hold, started, gate, number) for number in range(4)]
        row = agent.hear().tasks[0]
        agent.say(AgentResult([(row[0], row[1], 0, HUGE, 0, b"")]))
        wait_until(agent.is_forgotten, "still there")
        for _ in range(2):
            started.hear()
        gate.open(4)
        outcomes = [future.exception(DEADLINE_S) for future in futures]
        assert outcomes.count(None) >= 2
    assert served.process.poll() is None


# What is said on the way


def test_replay(scene: Scene, served: Served) -> None:
    """What was recorded of a session, sent again over another connection, is refused within 5 s and calls nothing."""
    cable = scene.keep(Cable(served.port))
    path = with_keys(scene, served, address=f"tcp://127.0.0.1:{cable.port}")
    journal = scene.journal()
    with connected(served):
        with ScalerExecutor(address=path) as executor:
            executor.submit(journal.write, "called").result(DEADLINE_S)
        (record,) = cable.sent
        assert len(record) > 500 and b"called" not in record and b"journal" not in record
        with contextlib.ExitStack() as stack:
            deadline = time.monotonic() + REFUSED_S
            # All at once, and as it went: handshake first, the rest after an answer.
            for pieces in ([record], [record[:64], record[64:]], [record[:64], record[64:266], record[266:]]):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
                for piece in pieces:
                    sock.sendall(piece)
                    select.select([sock], [], [], 1)
                await_end(sock, deadline)
        assert journal.read() == [["called"]]


@pytest.mark.parametrize("how", ["twice", "damaged"])
def test_what_is_sent_twice_or_damaged_on_the_way(scene: Scene, served: Served, how: str) -> None:
    """Encrypted bytes that somebody on the way repeats or changes are noticed: the connection is cut and the session
    goes on over another one, with each call made once."""
    cable = scene.keep(Cable(served.port))
    path = with_keys(scene, served, address=f"tcp://127.0.0.1:{cable.port}")
    journal = scene.journal()
    with ScalerExecutor(address=path) as executor:
        executor.submit(journal.write, 0).result(DEADLINE_S)
        for number in range(1, 4):
            left = [1]

            def change(data: bytes, left: list[int] = left) -> bytes:
                if not left:
                    return data
                left.pop()
                return data + data if how == "twice" else data[:-1] + bytes([data[-1] ^ 1])

            cable.set_change(change)
            futures = [executor.submit(journal.write, number) for _ in range(3)]
            for future in futures:
                future.result(DEADLINE_S)
            cable.set_change(None)
            executor.submit(workload.echo, 1).result(DEADLINE_S)
    assert sorted(line for (line,) in journal.read()) == ["0", *"111222333"]
    assert len(cable.sent) > 1


# What nobody may see


def test_secrets_stay_secret(scene: Scene) -> None:
    """Keys, arguments, results, errors and environments stand in no process's arguments, in nothing that DEBUG logs of
    any process say, and keys in no environment."""
    canaries = {name: f"canary-{name}-{os.urandom(8).hex()}" for name in ("argument", "result", "error", "environment")}
    served = serve(scene, 0, "--log-level", "debug", environment={"CANARY": canaries["environment"]})
    carol = served.keygen("carol")
    machine = served.join(2, options=["--log-level", "debug"], connection=served.keygen("machine"))
    started, gate = scene.fifo(), scene.fifo()
    client = scene.client(
        """
        import logging, pickle, sys
        logging.basicConfig(level=logging.DEBUG)
        import support, workload
        from scaler_executor import ScalerExecutor
        path, started, gate, canary = sys.argv[1], *map(support.copy_of_fifo, sys.argv[2:4]), sys.argv[4]
        argument, result, error = open(canary).read().split()
        with ScalerExecutor(address=path) as executor:
            held = executor.submit(workload.hold, started, gate, argument)
            assert executor.submit(workload.echo, result).result() == result
            assert str(executor.submit(workload.fail, ValueError(error)).exception()) == error
            cancelled = executor.submit(workload.hold, started, gate, argument)
            cancelled.cancel()
            assert held.result() == argument
            crashed = executor.submit(workload.exit_process, 1)
            assert crashed.exception() is not None
        """.replace("\n        ", "\n"),
        carol,
        started.path,
        gate.path,
        write(scene.directory / "canaries", " ".join(canaries[name] for name in ("argument", "result", "error"))),
    )
    started.hear()
    keys = set()
    for path in [*served.files.rglob("*.json"), carol, served.directory / "machine.connection.json"]:
        data = json.loads(path.read_text())
        keys |= {data[name] for name in ("secret_key", "public_key", "server_key") if name in data}
    assert len(keys) >= 8
    private = [*keys, *(canaries[name] for name in ("argument", "result", "error"))]
    processes = scene.processes()
    assert len(processes) >= 6
    for pid in processes:
        for name in ("cmdline", "environ"):
            text = read_proc(pid, name).decode(errors="replace")
            assert not [secret for secret in private if secret in text], (name, text)
    gate.open(2)
    client.succeed()
    # Sessions that end in other ways say why.
    speaker = scene.keep(Speaker(carol))
    speaker.hello("client")
    speaker.say(TaskSubmit([(1, 1, 9, canaries["argument"].encode())]))
    wait_until(speaker.is_forgotten, "still there")
    other = scene.keep(Speaker(carol))
    other.hello("client")
    other.put(canaries["argument"].encode())
    wait_until(other.is_forgotten, "still there")
    served.revoke("carol")
    machine.stop()
    served.stop()
    logs = client.output + machine.output.read() + served.output
    assert "session" in logs and "DEBUG" in logs
    assert not [secret for secret in [*private, canaries["environment"]] if secret in logs], logs


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


AUDIT = """
import os, pickle, sys
path = os.environ["AUDIT_FILE"]
def note(*words):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, (" ".join(map(str, [os.getpid(), *words])) + "\\n").encode())
    os.close(fd)
def hook(event, arguments):
    if event == "pickle.find_class":
        note(event, *arguments)
    elif event == "import" and arguments[0].split(".")[0] in ("cloudpickle", "dill", "shelve", "copyreg"):
        note(event, arguments[0])
def noting(function):
    def noted(*arguments, **options):
        note("unpickled")
        return function(*arguments, **options)
    return noted
class Unpickler(pickle.Unpickler):
    load = noting(pickle.Unpickler.load)
# A pickle of plain values finds no class: whoever reads any pickle tells.
pickle.loads, pickle.load, pickle.Unpickler = noting(pickle.loads), noting(pickle.load), Unpickler
sys.addaudithook(hook)
"""


def test_the_scheduler_unpickles_nothing(scene: Scene) -> None:
    """While calls of every kind go through it, the scheduler's process reads no pickle, whatever is in it, and imports
    nothing that would; what the agent does, which makes them, shows that the hook would tell."""
    hook = scene.directory / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(AUDIT)
    record = scene.directory / "audit"
    record.touch()
    served = serve(scene, 0, environment={"PYTHONPATH": python_path(hook), "AUDIT_FILE": str(record)})
    agent = served.join(2)
    with ScalerExecutor(address=served.connection, initializer=workload.echo, initargs=(ValueError("x"),)) as executor:
        values = [ValueError, Path("/"), b"x" * 200_000]
        assert list(executor.map(workload.echo, values, chunksize=2)) == values
        assert isinstance(executor.submit(workload.fail, KeyError(Path("/"))).exception(), KeyError)
        assert executor.submit(lambda: 5).result() == 5
        started, gate = scene.fifo(), scene.fifo()
        held = executor.submit(workload.hold, started, gate)
        started.hear()
        assert held.cancel()
        assert executor.submit(workload.exit_process, 1).exception() is not None
    assert status(served)["done"] >= 5
    agent.stop()
    served.stop()
    lines = [line.split(" ", 1) for line in record.read_text().splitlines()]
    assert {"unpickled", "import cloudpickle"} <= {what for _, what in lines}
    assert any(what.startswith("pickle.find_class") for _, what in lines)
    assert [what for pid, what in lines if int(pid) == served.pid] == []
