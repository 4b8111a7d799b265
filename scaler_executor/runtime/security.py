"""Keys, connection files and who is let in.

A served cluster has a directory of its own, which nobody else may read:

    server.json          its key pair, and the port it had last
    connection.json      a connection file for the user who serves
    clients/NAME.json    a public key that is let in

Whoever holds a *connection file* (address, the server's public key, a key pair of their own) may submit calls, and so
run code as the user who serves. Removing `clients/NAME.json` shuts that one out. Keys are CURVE's (X25519), written in
Z85 (ZeroMQ RFC 32).
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class ConfigurationError(ValueError):
    """A file or an address is not as it has to be; says what to do."""


@dataclass(frozen=True, repr=False)
class Keys:
    """A key pair in Z85, 40 bytes each."""

    public: bytes
    secret: bytes

    @classmethod
    def create(cls) -> Keys:
        """Make a new pair."""
        import zmq

        return cls(*zmq.curve_keypair())


@dataclass(frozen=True, repr=False)
class Connection:
    """What a connection file holds.

    Attributes:
        address: "tcp://HOST:PORT".
        server_key: The server's public key, in Z85.
        keys: Of whoever connects.
    """

    address: str
    server_key: bytes
    keys: Keys

    @classmethod
    def load(cls, path: Path) -> Connection:
        """Read a connection file.

        Raises:
            ConfigurationError: It is missing, not private or not a connection file.
        """
        data = read_private(path, "connection file")
        try:
            if data["type"] != "scaler-executor connection" or data["version"] != 1:
                raise ValueError
            return cls(
                check_address(data["address"]),
                _check_key(data["server_key"]),
                Keys(_check_key(data["public_key"]), _check_key(data["secret_key"])),
            )
        except (KeyError, TypeError, ValueError):
            raise ConfigurationError(
                f"{path} is not a connection file of this version; make one with `scaler-executor keygen`"
            ) from None

    def save(self, path: Path) -> None:
        """Write a connection file, readable by nobody else."""
        write_private(
            path,
            {
                "type": "scaler-executor connection",
                "version": 1,
                "address": self.address,
                "server_key": self.server_key.decode(),
                "public_key": self.keys.public.decode(),
                "secret_key": self.keys.secret.decode(),
            },
        )


class ClusterDirectory:
    """The files of one served cluster.

    Args:
        path: Is made, with mode 0700, if it is not there.

    Raises:
        ConfigurationError: It cannot be made, or others may read it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection_path = path / "connection.json"
        self._server_path = path / "server.json"
        self._clients = path / "clients"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._clients.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"cannot make {self._clients}: {error.strerror}") from None
        for directory in (path, self._clients):
            status = directory.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise ConfigurationError(
                    f"{directory} must belong to you and be open to nobody else; try: chmod 700 {directory}"
                )
        #: {public key, 32 bytes: (name, file)}, and the state of the directory that it was read in.
        self._allowed: dict[bytes, str] = {}
        self._read_at: tuple[int, ...] = ()

    def server(self) -> tuple[Keys, int | None]:
        """Return the server's keys, made at the first call, and the port that it had last."""
        if not self._server_path.exists():
            keys = Keys.create()
            self._save_server(keys, None)
            return keys, None
        data = read_private(self._server_path, "server's key file")
        try:
            port = data.get("port")
            return Keys(_check_key(data["public_key"]), _check_key(data["secret_key"])), port and int(port)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigurationError(
                f"{self._server_path} is damaged; remove it, and all connection files of this cluster with it"
            ) from None

    def keep_port(self, keys: Keys, port: int) -> None:
        """Remember the port, for the next start: connection files stay valid."""
        self._save_server(keys, port)

    def _save_server(self, keys: Keys, port: int | None) -> None:
        write_private(
            self._server_path,
            {"public_key": keys.public.decode(), "secret_key": keys.secret.decode(), "port": port},
        )

    def allow(self, name: str, public: bytes) -> None:
        """Let a key in.

        Raises:
            ConfigurationError: There is one of this name, or it is no name.
        """
        path = self._client_path(name)
        if path.exists():
            raise ConfigurationError(f"{name} has a key already; revoke it first, or choose another name")
        write_private(path, {"public_key": public.decode()})

    def revoke(self, name: str) -> None:
        """Let a key in no more; its sessions end.

        Raises:
            ConfigurationError: There is none of this name.
        """
        try:
            self._client_path(name).unlink()
        except FileNotFoundError:
            known = ", ".join(sorted(self.names())) or "none"
            raise ConfigurationError(f"{name} has no key here; those who have: {known}") from None

    def names(self) -> list[str]:
        """Return the names of all keys that are let in."""
        return [path.stem for path in self._clients.glob("*.json")]

    def find_user(self, public: bytes) -> str | None:
        """Return the name of a public key (32 bytes), None if it is not let in."""
        self.reread()
        return self._allowed.get(public)

    def reread(self) -> set[str]:
        """Read what has changed. Return the names of all keys that are let in."""
        state = self._state()
        if state != self._read_at:
            self._read_at = state
            self._allowed = {}
            for path in self._clients.glob("*.json"):
                try:
                    self._allowed[_decode_key(_check_key(read_private(path, "key file")["public_key"]))] = path.stem
                except (ConfigurationError, KeyError, TypeError, ValueError):
                    continue  # not let in
        return set(self._allowed.values())

    def _state(self) -> tuple[int, ...]:
        found = [self._clients.stat().st_mtime_ns]
        for path in sorted(self._clients.glob("*.json")):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found += [status.st_ino, status.st_mtime_ns, status.st_mode]
        return tuple(found)

    def _client_path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"{name!r} is no name for a key: letters, digits, dots, hyphens, underscores")
        return self._clients / f"{name}.json"


def default_directory(name: str = "default") -> Path:
    """Return where the cluster of this name keeps its files (XDG base directory specification).

    Raises:
        ConfigurationError: It is no name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{name!r} is no name for a cluster: letters, digits, dots, hyphens, underscores")
    home = os.environ.get("XDG_STATE_HOME")
    base = Path(home) if home and os.path.isabs(home) else Path.home() / ".local" / "state"
    return base / "scaler-executor" / name


def resolve(address: str | os.PathLike[str]) -> Connection:
    """Return the connection that an address stands for: the path of a connection file.

    Raises:
        ConfigurationError: It is not one.
    """
    text = os.fspath(address)
    if text.startswith("tcp://"):
        raise ConfigurationError(
            f"{text} alone does not say which keys to use; give the path of its connection file, which serve has"
            " written, or a scaler_executor.Connection"
        )
    return Connection.load(Path(text).expanduser())


def check_address(address: Any) -> str:
    """Return the address if it is one.

    Raises:
        ValueError: It is not.
    """
    match = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:.%a-z]+\]|[^\s:/\[\]]+):(\*|\d{1,5})", str(address))
    if match is None or (match[2] != "*" and int(match[2]) > 65535):
        raise ValueError(f"{address!r} is not of the form tcp://HOST:PORT")
    return str(address)


def read_private(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON file that only its owner may read.

    Raises:
        ConfigurationError: It is missing, or others may read or write it, or it is not JSON.
    """
    try:
        with open(path, encoding="utf-8", opener=_open_without_links) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigurationError(f"{path} is not a file")
            if status.st_mode & 0o077:
                raise ConfigurationError(
                    f"the {what} {path} may be read by others (mode {status.st_mode & 0o777:04o});"
                    f" if its keys may have been seen, make new ones; then: chmod 600 {path}"
                )
            if status.st_uid not in (os.geteuid(), 0):
                raise ConfigurationError(f"the {what} {path} belongs to somebody else")
            data = json.load(file)
    except FileNotFoundError:
        raise ConfigurationError(f"there is no {what} at {path}") from None
    except IsADirectoryError:
        raise ConfigurationError(f"{path} is not a file") from None
    except PermissionError:
        raise ConfigurationError(f"the {what} {path} may not be read by this user") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ConfigurationError(f"the {what} {path} is damaged") from None
    except OSError as error:
        raise ConfigurationError(f"the {what} {path} cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise ConfigurationError(f"the {what} {path} is damaged")
    return data


def write_private(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file that only its owner may read; whoever reads it meanwhile sees the old one or the new one.

    Raises:
        ConfigurationError: It cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(data, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None


def _open_without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _check_key(text: Any) -> bytes:
    """Return a key in Z85 if it is one, else raise ValueError."""
    key = str(text).encode()
    if len(key) != 40 or len(_decode_key(key)) != 32:
        raise ValueError("not a key")
    return key


def _decode_key(key: bytes) -> bytes:
    from zmq.utils import z85

    try:
        return bytes(z85.decode(key))
    except Exception:
        raise ValueError("not a key") from None
