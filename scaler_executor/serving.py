"""What `scaler-executor serve` and `keygen` do: the files, the words, the exit codes.

The processes themselves are `scaler_executor.runtime.host` and `agent_host`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scaler_executor.runtime.cgroups import cpu_count_usable
from scaler_executor.runtime.cluster import fill_standard_descriptors
from scaler_executor.runtime.security import (
    OWN_NAME,
    ClusterDirectory,
    ConfigurationError,
    Connection,
    Keys,
    check_address,
    check_destination,
    default_directory,
    resolve,
)

if TYPE_CHECKING:
    import zmq

    from scaler_executor.runtime.hosting import Workers

#: Tried first by a cluster that has had no port yet.
DEFAULT_PORT: Final = 5735


def serve(
    *,
    bind: str | None = None,
    workers: int | None = None,
    connection_file: Path | None = None,
    name: str | None = None,
    preload: Sequence[str] = (),
    grace_s: float = 30.0,
    log_level: str = "warning",
) -> int:
    """Host a cluster until a signal ends it. Return the exit code.

    Args:
        bind: "tcp://HOST:PORT"; None: loopback, the port that this cluster had last, 5735 or a free one.
        workers: On this machine, 0 for none; None: the usable CPUs.
        connection_file: Where to write it; None: in the cluster's directory.
        name: Clusters of one user have different names; None: "default".
        preload: Modules that workers find imported.
        grace_s: Seconds that running calls get at the end.
        log_level: "debug", "info", "warning" or "error".

    Raises:
        ConfigurationError: It cannot start; says what to do.
    """
    import zmq

    announce = _set_up(log_level)
    cluster = name or "default"
    directory = ClusterDirectory(default_directory(cluster))
    lock = _lock(directory, cluster)
    keys, last_port = directory.server()
    addresses = _addresses(bind, last_port)
    path = (connection_file or directory.connection_path).absolute()
    if connection_file is not None and path.exists():
        _check_replaceable(path)
    machine = _start_workers(workers, preload)
    from scaler_executor.runtime.host import SchedulerHost

    host = None
    for address in addresses:
        try:
            host = SchedulerHost(directory, keys, address, machine, grace_s, _say)
            break
        except zmq.ZMQError as error:
            if bind is not None or error.errno != zmq.EADDRINUSE or address is addresses[-1]:
                raise ConfigurationError(_explain(address, error)) from None
            if address is addresses[0] and last_port is not None:
                _say(f"another process listens on {address}, where this cluster was last: connection files that were")
                _say("made for that address do not lead here; the one below does")
    assert host is not None
    reachable = _reachable(host.listener.address)
    directory.keep_port(keys, int(host.listener.address.rpartition(":")[2]))
    _write_own(directory, path, reachable, keys)
    listening = f"listening on {host.listener.address}, {_count(machine.count)} here"
    _say(listening)
    if reachable != host.listener.address:
        _say(f"reached as {reachable}; as another address: scaler-executor keygen NAME --address tcp://HOST:PORT")
    _say(f"use it:  ScalerExecutor(address={str(path)!r})")
    _say(f"join it: scaler-executor serve --join {shlex.quote(str(path))}")
    announce(listening)
    code = host.run()
    _say("closed" if code == 0 else "closed; calls that were running have been stopped")
    os.close(lock)
    return code


def join(
    address: str,
    *,
    credentials: str | None = None,
    workers: int | None = None,
    name: str | None = None,
    preload: Sequence[str] = (),
    grace_s: float = 30.0,
    log_level: str = "warning",
) -> int:
    """Add this machine's workers to a cluster until a signal ends it. Return the exit code.

    Args:
        address, credentials: Of the cluster, see `security.resolve`.
        workers: At least 1; None: the usable CPUs.
        name: As which the cluster knows this machine; None: its host name.
        preload, grace_s, log_level: As for `serve`.

    Raises:
        ConfigurationError: It cannot start; says what to do.
    """
    announce = _set_up(log_level)
    connection = resolve(address, credentials)
    if workers == 0:
        raise ConfigurationError("a machine that joins needs --workers of at least 1")
    machine = _start_workers(workers, preload)
    from scaler_executor.runtime.agent_host import AgentHost

    host = AgentHost(connection, machine, name or socket.gethostname(), grace_s, _say)
    joining = f"joining {connection.address} with {_count(machine.count)}"
    _say(joining)
    announce(joining)
    code = host.run()
    _say("left" if code == 0 else "left; what was running has been stopped")
    return code


def keygen(cluster: str, who: str, *, output: Path | None = None, address: str | None = None) -> None:
    """Make a connection file with a key of its own.

    Args:
        cluster: Name of the cluster, which is or was served by this user on this machine.
        who: Name of the key.
        output: Where to write it; None: "WHO.connection.json" here.
        address: "tcp://HOST:PORT" as which they reach the cluster; None: as in the cluster's own connection file.

    Raises:
        ConfigurationError: It cannot be made; says what to do.
    """
    directory = _existing(cluster)
    keys, _ = directory.server()
    if address is None:
        address = Connection.load(directory.connection_path).address
    else:
        check_destination(address)
    path = (output or Path(f"{who}.connection.json")).absolute()
    if path.exists():
        raise ConfigurationError(f"{path} exists; remove it, or choose another --output")
    own = Keys.create()
    directory.allow(who, own.public)
    try:
        Connection(address, keys.public, own).save(path)
    except ConfigurationError:
        directory.revoke(who)
        raise
    print(f"{path} gives access to {address} until: scaler-executor keygen --cluster {cluster} --revoke {who}")


def revoke(cluster: str, who: str) -> None:
    """Let a key in no more, and end its sessions.

    Raises:
        ConfigurationError: There is no such key.
    """
    _existing(cluster).revoke(who)
    print(f"{who} has no access any more")


def list_keys(cluster: str) -> None:
    """Print the names of the keys that are let in.

    Raises:
        ConfigurationError: There is no such cluster.
    """
    for who in sorted(_existing(cluster).names()):
        print(who)


def _existing(cluster: str) -> ClusterDirectory:
    path = default_directory(cluster)
    if not (path / "server.json").exists():
        command = "scaler-executor serve" + ("" if cluster == "default" else f" --name {cluster}")
        raise ConfigurationError(f"no cluster {cluster!r} has been served here; start it with: {command}")
    return ClusterDirectory(path)


def _set_up(log_level: str) -> Callable[[str], None]:
    """Make this the process of a service, wherever it was started: from a shell, by systemd, as process 1 of a
    container. Return what tells its manager that it is ready, with a line of status (`man 3 sd_notify`)."""
    import logging

    fill_standard_descriptors()
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # It is for this process, and not for what it starts.
    manager = os.environ.pop("NOTIFY_SOCKET", "")

    def announce(status: str) -> None:
        if manager:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.connect(manager.replace("@", "\0", 1) if manager.startswith("@") else manager)
                sock.send(f"READY=1\nSTATUS={status}\n".encode())

    return announce


def _say(line: str) -> None:
    """Print a line at once, or not at all where nobody reads."""
    try:
        print(line, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _lock(directory: ClusterDirectory, cluster: str) -> int:
    """Hold the cluster's directory for this process."""
    fd = os.open(directory.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise ConfigurationError(
            f"the cluster {cluster!r} is served already, by process {pid}; serve another one with --name"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _start_workers(count: int | None, preload: Sequence[str]) -> Workers:
    import importlib.util

    for module in preload:
        try:
            found = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise ConfigurationError(f"there is no module {module!r} to preload")
    from scaler_executor.runtime.hosting import Workers
    from scaler_executor.runtime.process import raise_descriptor_limit

    workers = Workers(cpu_count_usable() if count is None else count, preload)
    raise_descriptor_limit()  # only now: calls find the limit that there was
    return workers


def _addresses(bind: str | None, last_port: int | None) -> list[str]:
    if bind is not None:
        try:
            return [check_address(bind)]
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
    return [f"tcp://127.0.0.1:{port}" for port in (last_port, DEFAULT_PORT, "*") if port is not None]


def _explain(address: str, error: zmq.ZMQError) -> str:
    """Say why an address cannot be bound."""
    reasons = {
        errno.EADDRINUSE: "another process listens there; choose another port, or none for a free one",
        errno.EADDRNOTAVAIL: "this machine has no such address",
        errno.EACCES: "this user may not listen there; choose a port from 1024 on",
        errno.ENODEV: "this machine has no such address; give a number, or * for all",
        errno.EINVAL: "it is not of the form tcp://HOST:PORT",
    }
    return f"cannot listen on {address}: {reasons.get(error.errno or 0, str(error))}"


def _reachable(address: str) -> str:
    """Return as what others reach an address: one that stands for all interfaces is replaced by the machine's name."""
    match = re.fullmatch(r"tcp://(.*):(\d+)", address)
    assert match is not None
    try:
        is_any = ipaddress.ip_address(match[1].strip("[]")).is_unspecified
    except ValueError:
        is_any = match[1] == "*"
    return f"tcp://{socket.getfqdn()}:{match[2]}" if is_any else address


def _check_replaceable(path: Path) -> None:
    """Replace nothing but what an earlier start has written."""
    try:
        Connection.load(path)
    except ConfigurationError:
        raise ConfigurationError(
            f"{path} is there and is no connection file of this user's; remove it, or choose another place"
        ) from None


def _write_own(directory: ClusterDirectory, path: Path, address: str, keys: Keys) -> None:
    """Write the connection file of the user who serves; its key stays the same from start to start."""
    own: Keys | None = None
    if directory.connection_path.exists():
        try:
            before = Connection.load(directory.connection_path)
        except ConfigurationError:
            before = None
        if before is not None and before.server_key == keys.public and OWN_NAME in directory.names():
            own = before.keys
    if own is None:
        own = Keys.create()
        if OWN_NAME in directory.names():
            directory.revoke(OWN_NAME)
        directory.allow(OWN_NAME, own.public)
    connection = Connection(address, keys.public, own)
    for each in {path, directory.connection_path}:
        connection.save(each)


def _count(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"
