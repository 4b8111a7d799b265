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

import errno
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scaler_executor.defaults import CREDENTIALS_VARIABLE

#: That a file cannot be opened for one of these says nothing of the file.
_PASSING: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
#: Whose key it is that serve makes for the user who serves.
OWN_NAME: Final = "owner"
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
    def load(cls, path: Path, address: str | None = None) -> Connection:
        """Read a connection file.

        Args:
            path: Of the file.
            address: Counts instead of the one in the file.

        Raises:
            ConfigurationError: It is missing, not private or not a connection file.
        """
        data = read_private(path, "connection file")
        try:
            if data["type"] != "scaler-executor connection" or data["version"] != 1:
                raise ValueError
            if address is None and "*" in (address := check_address(data["address"])):
                raise ConfigurationError(
                    f"the address {address} in {path} leads nowhere; make another connection file with"
                    " `scaler-executor keygen --address tcp://HOST:PORT`"
                )
            return cls(
                address,
                _check_key(data["server_key"]),
                Keys(_check_key(data["public_key"]), _check_key(data["secret_key"])),
            )
        except ConfigurationError:
            raise
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
            raise ConfigurationError(
                f"cannot make {self._clients}: {error.strerror}; XDG_STATE_HOME may name another place"
            ) from None
        for directory in (path, self._clients):
            status = directory.stat()
            if status.st_uid != os.geteuid():
                raise ConfigurationError(f"{directory} belongs to somebody else; it must belong to whoever serves")
            if status.st_mode & 0o077:
                raise ConfigurationError(
                    f"{directory} must be open to nobody else (mode {status.st_mode & 0o777:04o});"
                    f" try: chmod 700 {directory}"
                )
        #: {public key, 32 bytes: name}, and the state of the directory that it was read in.
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
            if port is not None and not (type(port) is int and 0 < port < 65536):
                raise ValueError
            return Keys(_check_key(data["public_key"]), _check_key(data["secret_key"])), port
        except (KeyError, ValueError):
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
        try:
            write_private(self._client_path(name), {"public_key": public.decode()}, is_new=True)
        except FileExistsError:
            raise ConfigurationError(f"{name} has a key already; revoke it first, or choose another name") from None

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
        return [path.stem for path in self._paths()]

    def find_user(self, public: bytes) -> str | None:
        """Return the name of a public key (32 bytes), None if it is not let in."""
        return self.reread().get(public)

    def reread(self) -> dict[bytes, str]:
        """Read what has changed. Return the keys that are let in, {public key: name}."""
        try:
            state = self._state()
            if state != self._read_at:
                self._allowed = self._read_all()
                self._read_at = state
        except (FileNotFoundError, NotADirectoryError):
            self._allowed, self._read_at = {}, ()  # the directory has been removed, and with it all keys
        except OSError:
            pass  # no descriptor is left, say: what was true a moment ago holds until it can be read again
        return self._allowed

    def _read_all(self) -> dict[bytes, str]:
        """Read the keys. One that is damaged, or that others may read, is not let in."""
        allowed = {}
        for path in self._paths():
            try:
                key = _decode_key(_check_key(_read_private(path, "key file")["public_key"]))
            except (KeyError, ValueError):
                continue
            except OSError as error:
                if error.errno in _PASSING:
                    raise
                continue
            allowed[key] = path.stem
        return allowed

    def _paths(self) -> list[Path]:
        with os.scandir(self._clients) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.name.endswith(".json"))

    def _state(self) -> tuple[int, ...]:
        """Return what changes when a key is added, removed or replaced."""
        found = [self._clients.stat().st_mtime_ns]
        for path in self._paths():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found += [status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_uid, status.st_mode]
        return tuple(found)

    def _client_path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"{name!r} is no name for a key: letters, digits, dots, hyphens, underscores")
        return self._clients / f"{name}.json"


def default_directory(name: str = "default") -> Path:
    """Return where the cluster of this name keeps its files (XDG base directory specification).

    Raises:
        ConfigurationError: It is no name, or there is no place for it.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{name!r} is no name for a cluster: letters, digits, dots, hyphens, underscores")
    state = os.environ.get("XDG_STATE_HOME")
    if not (state and os.path.isabs(state)):
        state = os.path.expanduser("~/.local/state")
        if not os.path.isabs(state):  # a number that stands in no passwd file, as in many containers
            raise ConfigurationError("this user has no home directory; set XDG_STATE_HOME, say, to a private directory")
    return Path(state) / "scaler-executor" / name


def resolve(address: str | os.PathLike[str], credentials: str | os.PathLike[str] | None = None) -> Connection:
    """Return the connection that an address stands for.

    Args:
        address: The path of a connection file; or "tcp://HOST:PORT", as which the cluster of one is reached from here.
        credentials: In the second case that connection file, of which only the keys count; None: the one that the
            environment variable SCALER_EXECUTOR_CREDENTIALS names.

    Raises:
        ConfigurationError: They are not; says what to do.
    """
    text = os.fsdecode(address)
    if "://" not in text:
        path = Path(os.path.expanduser(text))
        if credentials is not None:
            raise ConfigurationError(
                f"credentials go with an address of the form tcp://HOST:PORT, and {text} is a file, which has keys of"
                " its own; leave one of the two away"
            )
        if re.fullmatch(r"[^/]+:\d+", text) and not path.exists():
            raise ConfigurationError(f"there is no connection file at {text}; if it is an address: tcp://{text}")
        return Connection.load(path)
    check_destination(text)
    if credentials is None:
        credentials = os.environ.get(CREDENTIALS_VARIABLE) or None
    if credentials is None:
        raise ConfigurationError(
            f"{text} alone does not say which keys to use: name a connection file of that cluster as well"
            f" (credentials=PATH, --credentials PATH or {CREDENTIALS_VARIABLE}=PATH), or in the place of the address"
        )
    return Connection.load(Path(os.path.expanduser(os.fsdecode(credentials))), text)


def check_destination(address: str) -> str:
    """Return the address if one can connect to it.

    Raises:
        ConfigurationError: It is not one, or leads nowhere.
    """
    try:
        check_address(address)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    if "*" in address:
        raise ConfigurationError(f"one can listen on {address}, but not connect to it: name a host and a port")
    return address


def check_address(address: Any) -> str:
    """Return the address if it is one.

    Raises:
        ValueError: It is not. The message repeats nothing that may be a key.
    """
    text = str(address)
    match = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:.%a-z]+\]|[\w.*;-]+):(\*|\d{1,5})", text)
    if match is not None and (match[2] == "*" or int(match[2]) <= 65535):
        return text
    if re.search(r"[@?#]|\S{40}", text.partition("://")[2]):
        raise ValueError(
            "an address is of the form tcp://HOST:PORT and holds nothing else, no keys above all: others can read what"
            " stands in the arguments and the environment of a process; keys stand in connection files"
        )
    raise ValueError(f"{address!r} is not of the form tcp://HOST:PORT")


def read_private(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON file that only its owner may read. A link to one will do.

    Raises:
        ConfigurationError: It is missing, or others may read or write it, or it is not JSON.
    """
    try:
        return _read_private(path, what)
    except FileNotFoundError:
        raise ConfigurationError(f"there is no {what} at {path}") from None
    except IsADirectoryError:
        raise ConfigurationError(f"{path} is not a file") from None
    except PermissionError:
        raise ConfigurationError(f"the {what} {path} may not be read by this user; it belongs to another one") from None
    except OSError as error:
        raise ConfigurationError(f"the {what} {path} cannot be read: {error.strerror}") from None


def _read_private(path: Path, what: str) -> dict[str, Any]:
    """As `read_private`, but what the system says is raised as it is."""
    with open(path, encoding="utf-8", opener=_open_without_waiting) as file:
        # Of the file that is open, and not of the path, which may lead to another one by now.
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(f"{path} is not a file")
        if status.st_uid not in (os.geteuid(), 0):
            raise ConfigurationError(
                f"the {what} {path} belongs to somebody else; use a copy of your own: cp it, and chmod 600 the copy"
            )
        if status.st_mode & 0o077:
            raise ConfigurationError(
                f"the {what} {path} may be read by others (mode {status.st_mode & 0o777:04o});"
                f" if its keys may have been seen, make new ones; then: chmod 600 {path}"
            )
        try:
            data = json.load(file)
        except (ValueError, RecursionError):  # not text, not JSON, a number too long or a list too deep
            data = None
    if not isinstance(data, dict):
        raise ConfigurationError(f"the {what} {path} is damaged")
    return data


def write_private(path: Path, data: dict[str, Any], *, is_new: bool = False) -> None:
    """Write a JSON file that only its owner may read; whoever reads it meanwhile sees the old one or the new one.

    Raises:
        FileExistsError: It `is_new`, and there is one.
        ConfigurationError: It cannot be written.
    """
    # A name that no process has used before: one that was killed may have left its own.
    beside = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                json.dump(data, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                os.link(beside, path)
            else:
                os.replace(beside, path)
                return
        except BaseException:
            os.unlink(beside)
            raise
        os.unlink(beside)
    except FileExistsError:
        if is_new:
            raise
        raise ConfigurationError(f"cannot write {path}: there is a file in the place of its directory") from None
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a FIFO would wait for somebody who writes."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _check_key(text: Any) -> bytes:
    """Return a key in Z85 if it is one, else raise ValueError."""
    key = str(text).encode("ascii")
    if len(key) != 40 or len(_decode_key(key)) != 32:
        raise ValueError("not a key")
    return key


def _decode_key(key: bytes) -> bytes:
    from zmq.utils import z85

    try:
        return bytes(z85.decode(key))
    except Exception:
        raise ValueError("not a key") from None
