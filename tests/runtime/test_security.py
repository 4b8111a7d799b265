"""Keys and connection files: who may read them, what is refused and in which words, and who is let in."""

import errno
import json
import os
import re
import socket
import stat
import threading
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from scaler_executor.runtime import security
from scaler_executor.runtime.security import (
    ClusterDirectory,
    ConfigurationError,
    Connection,
    Keys,
    check_address,
    default_directory,
    read_private,
    resolve,
    write_private,
)

ADDRESS = "tcp://127.0.0.1:5735"


def raw(key):
    return bytes(z85.decode(key))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def directory(tmp_path):
    return ClusterDirectory(tmp_path / "state" / "cluster")


@pytest.fixture
def connection_file(tmp_path):
    """A connection file, and what it holds."""
    server = Keys.create()
    connection = Connection(ADDRESS, server.public, Keys.create())
    path = tmp_path / "connection.json"
    connection.save(path)
    return path, connection


def change(path, **changes):
    """Write other values into a connection file; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


# Modes and owners


def test_what_is_written_is_private(directory, connection_file):
    """Whatever the umask, files have mode 0600 and directories 0700, and nothing else is left beside them."""
    path, _ = connection_file
    old = os.umask(0)
    try:
        keys, port = directory.server()
        assert port is None
        directory.keep_port(keys, 1234)
        directory.allow("somebody", keys.public)
        other = ClusterDirectory(path.parent / "other")
    finally:
        os.umask(old)
    assert directory.server() == (keys, 1234)
    made = [path for path in directory.path.rglob("*") if path.is_file()]
    assert {path.name for path in made} == {"server.json", "somebody.json"}
    assert {mode(path) for path in [*made, path]} == {0o600}
    assert {mode(path) for path in (directory.path, directory.path / "clients", other.path)} == {0o700}


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o601, 0o644, 0o666])
def test_files_that_others_may_read(connection_file, bits):
    """They are refused, and the message says which command mends it."""
    path, _ = connection_file
    path.chmod(bits)
    with pytest.raises(ConfigurationError, match=rf"mode {bits:04o}.*chmod 600 {path}"):
        resolve(path)
    path.chmod(0o600)
    assert resolve(path).address == ADDRESS


@pytest.mark.parametrize("name", [".", "clients"])
def test_directories_that_others_may_enter(directory, name):
    """They are refused, and the message says which command mends it."""
    path = directory.path / name
    path.chmod(0o750)
    with pytest.raises(ConfigurationError, match=rf"mode 0750.*chmod 700 {path.resolve()}"):
        ClusterDirectory(directory.path)
    path.chmod(0o700)
    ClusterDirectory(directory.path)


def test_files_of_others(connection_file, directory, monkeypatch):
    """A file or directory of another user is refused, unless it is root's, who may read everything anyway."""
    path, _ = connection_file
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    if me:
        with pytest.raises(ConfigurationError, match=r"belongs to somebody else.*chmod 600"):
            resolve(path)
    else:
        resolve(path)
        os.chown(path, 12345, -1)
        with pytest.raises(ConfigurationError, match=r"belongs to somebody else.*chmod 600"):
            resolve(path)
    with pytest.raises(ConfigurationError, match="belongs to somebody else"):
        ClusterDirectory(directory.path)


def test_links(connection_file, tmp_path):
    """A link is as good as what it leads to, whose mode is looked at; one to nothing, or to itself, is an error."""
    path, connection = connection_file
    link = tmp_path / "link.json"
    link.symlink_to(path)
    assert resolve(link) == connection
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        resolve(link)
    path.unlink()
    with pytest.raises(ConfigurationError, match="there is no connection file"):
        resolve(link)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(ConfigurationError, match="cannot be read: Too many levels"):
        resolve(link)


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path):
    """What a link leads to is not written to."""
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_text("mine")
    link.symlink_to(other)
    write_private(link, {})
    assert not link.is_symlink() and read_private(link, "file") == {}
    assert other.read_text() == "mine"


# What is no file, or no such file


def test_no_files(tmp_path):
    """A directory, a FIFO, a socket and a device are refused at once: nothing waits for them."""
    fifo, listener = tmp_path / "fifo", tmp_path / "socket"
    os.mkfifo(fifo, 0o600)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(listener))
        for path in (tmp_path, fifo, listener, Path("/dev/null"), tmp_path / "missing", fifo / "below"):
            with pytest.raises(ConfigurationError, match=str(path)):
                resolve(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\0", '"text"', "[" * 100_000, "1" * 10_000, '{"a": ' * 50_000, "{}x", b"\xff\xfe\x00"],
    ids=range(11),
)
def test_damaged_files(connection_file, directory, text):
    """Whatever stands in a file, the message says that it is damaged, and what to do with a server's."""
    path, _ = connection_file
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError, match="is damaged"):
        resolve(path)
    directory.server()
    (directory.path / "server.json").write_bytes(path.read_bytes())
    with pytest.raises(ConfigurationError, match="is damaged"):
        directory.server()


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "other"},
        {"version": 2},
        {"version": None},
        {"secret_key": None},
        {"secret_key": 5},
        {"secret_key": "x" * 39},
        {"public_key": "é" * 40},
        {"server_key": "\\" * 40},
        {"server_key": "#" * 40},
        {"address": "127.0.0.1:5"},
        {"address": "ipc:///tmp/x"},
        {"address": "tcp://127.0.0.1:70000"},
        {"address": ["tcp://127.0.0.1:5"]},
        {"address": {}},
    ],
    ids=str,
)
def test_other_files(connection_file, changes):
    """What is no connection file of this version is refused, with the command that makes one, and without its keys."""
    path, connection = connection_file
    change(path, **changes)
    with pytest.raises(ConfigurationError, match="scaler-executor keygen") as caught:
        resolve(path)
    assert connection.keys.secret.decode() not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("address", ["tcp://*:5", "tcp://127.0.0.1:*"])
def test_addresses_that_lead_nowhere(connection_file, address):
    """One can listen there, but not connect."""
    path, _ = connection_file
    change(path, address=address)
    with pytest.raises(ConfigurationError, match=r"leads nowhere; .* keygen --address"):
        resolve(path)


@pytest.mark.parametrize("port", [0, -1, 65536, 1.5, "x", True, [], float("inf")])
def test_damaged_port(directory, port):
    """A server's key file with a port that is none is damaged."""
    keys, _ = directory.server()
    directory.keep_port(keys, port)
    with pytest.raises(ConfigurationError, match="is damaged; remove it"):
        directory.server()


def test_an_address_is_not_enough(monkeypatch):
    """There is no connection without keys, and the message says what is needed instead."""
    monkeypatch.delenv("SCALER_EXECUTOR_CREDENTIALS", raising=False)
    with pytest.raises(ConfigurationError, match=r"which keys to use: name a connection file .*credentials=PATH"):
        resolve(ADDRESS)


def test_an_address_with_credentials(connection_file, monkeypatch):
    """The keys are those of the connection file that is named, or that the environment names; its own address does not
    count, not even one that leads nowhere."""
    path, connection = connection_file
    other = "tcp://[::1]:99"
    expected = Connection(other, connection.server_key, connection.keys)
    assert resolve(other, path) == resolve(other, str(path)) == resolve(other, os.fsencode(path)) == expected
    monkeypatch.setenv("SCALER_EXECUTOR_CREDENTIALS", str(path))
    assert resolve(other) == expected
    change(path, address="tcp://*:5")
    assert resolve(other) == expected
    change(path, address=ADDRESS)
    monkeypatch.setenv("SCALER_EXECUTOR_CREDENTIALS", str(path.parent / "missing"))
    assert resolve(other, path) == expected
    assert resolve(path) == connection  # a file says all there is to say
    with pytest.raises(ConfigurationError, match="there is no connection file"):
        resolve(other)
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        resolve(other, path)


def test_credentials_with_a_file(connection_file):
    """A connection file has keys of its own: which of two counted, nobody would know."""
    path, _ = connection_file
    with pytest.raises(ConfigurationError, match="leave one of the two away"):
        resolve(path, path)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("tcp://*:5735", "one can listen on"),
        ("tcp://127.0.0.1:*", "one can listen on"),
        ("tcp://127.0.0.1", "not of the form"),
        ("ipc:///tmp/x", "not of the form"),
        ("127.0.0.1:5735", "if it is an address: tcp://127.0.0.1:5735"),
    ],
)
def test_wrong_addresses(connection_file, address, told):
    """What is no address to connect to is refused, with what is wrong."""
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        resolve(address, connection_file[0] if "://" in address else None)


@pytest.mark.parametrize("form", ["tcp://{}@127.0.0.1:5735", "tcp://127.0.0.1:5735?key={}", "tcp://{}:5735"])
def test_no_keys_in_addresses(connection_file, form):
    """An address with a key in it is refused without being repeated: messages end up in logs."""
    path, _ = connection_file
    for key in ("hunter2@", *(Keys.create().secret.decode() for _ in range(100))):
        with pytest.raises(ConfigurationError, match="holds nothing else, no keys") as caught:
            resolve(form.format(key), path)
        assert key not in str(caught.value)


def test_keys_are_not_shown(connection_file):
    """The repr of what holds a secret key does not."""
    _, connection = connection_file
    for thing in (connection, connection.keys):
        for key in (connection.keys.secret.decode(), connection.keys.public.decode()):
            assert key not in repr(thing) and key not in str(thing)


# Names


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "-x", "a\0b", "a\n", "a b", "é", "x" * 65, "a\\b"]
)
def test_no_names(directory, name, tmp_path, monkeypatch):
    """A name of a key or of a cluster cannot lead out of the directory."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    keys = Keys.create()
    for act in (lambda: directory.allow(name, keys.public), lambda: directory.revoke(name)):
        with pytest.raises(ConfigurationError, match="no name for a key"):
            act()
    with pytest.raises(ConfigurationError, match="no name for a cluster"):
        default_directory(name)
    assert directory.names() == []


@pytest.mark.parametrize("name", ["a", "a.b", "A-1_2", "x" * 64, "9", "a..", "con.json"])
def test_names(directory, name):
    """These are names, and come back as they were given."""
    keys = Keys.create()
    directory.allow(name, keys.public)
    assert directory.names() == [name]
    assert directory.find_user(raw(keys.public)) == name


def test_where_the_files_are(tmp_path, monkeypatch):
    """XDG_STATE_HOME is heeded if it is absolute, as its specification says."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_directory("a") == tmp_path / "scaler-executor" / "a"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".local" / "state" / "scaler-executor" / "default"


@pytest.mark.parametrize("address", ["tcp://a:1", "tcp://*:*", "tcp://[::1]:5", "tcp://10.0.0.1:65535", "tcp://eth0:*"])
def test_addresses(address):
    """These can be listened at."""
    assert check_address(address) == address


@pytest.mark.parametrize(
    "address", ["tcp://a", "tcp://:5", "udp://a:5", "tcp://a:5/b", "tcp://a:5 ", "tcp://a b:5", "", None, "tcp://a:-1"]
)
def test_no_addresses(address):
    """These cannot."""
    with pytest.raises(ValueError, match="not of the form"):
        check_address(address)


# Who is let in


def test_allow_and_revoke(directory):
    """A key is let in from when it is allowed until it is revoked, also by another process."""
    keys, other = Keys.create(), Keys.create()
    elsewhere = ClusterDirectory(directory.path)
    assert directory.find_user(raw(keys.public)) is None
    elsewhere.allow("one", keys.public)
    elsewhere.allow("two", other.public)
    assert directory.find_user(raw(keys.public)) == "one"
    assert directory.reread() == {raw(keys.public): "one", raw(other.public): "two"}
    with pytest.raises(ConfigurationError, match="one has a key already; revoke it first"):
        elsewhere.allow("one", other.public)
    elsewhere.revoke("one")
    assert directory.find_user(raw(keys.public)) is None
    assert directory.find_user(raw(other.public)) == "two"
    with pytest.raises(ConfigurationError, match="one has no key here; those who have: two"):
        elsewhere.revoke("one")
    elsewhere.revoke("two")
    with pytest.raises(ConfigurationError, match="those who have: none"):
        elsewhere.revoke("two")


def test_a_name_that_is_given_again(directory):
    """The key that had a name before is not let in when another one has it."""
    first, second = Keys.create(), Keys.create()
    directory.allow("name", first.public)
    assert directory.find_user(raw(first.public)) == "name"
    directory.revoke("name")
    directory.allow("name", second.public)
    assert directory.reread() == {raw(second.public): "name"}


def test_secret_keys_and_rubbish_let_nobody_in(directory):
    """Files that are damaged, of others' making or half written let nobody in, and disturb nobody who is."""
    keys = Keys.create()
    directory.allow("good", keys.public)
    clients = directory.path / "clients"
    for number, text in enumerate(["", "{", "[]", '{"public_key": 5}', '{"public_key": "x"}', "[" * 100_000, "{}"]):
        (clients / f"bad{number}.json").write_text(text)
        (clients / f"bad{number}.json").chmod(0o600)
    (clients / "directory.json").mkdir()
    (clients / "link.json").symlink_to("nowhere")
    os.mkfifo(clients / "fifo.json", 0o600)
    other = Keys.create()
    write_private(clients / ".new.json.1", {"public_key": other.public.decode()})
    directory.allow("open", other.public)
    (clients / "open.json").chmod(0o644)
    assert directory.reread() == {raw(keys.public): "good"}
    (clients / "open.json").chmod(0o600)
    assert directory.find_user(raw(other.public)) == "open"


@pytest.mark.parametrize("failing", ["scandir", "open"])
def test_when_no_descriptor_is_left(directory, monkeypatch, failing):
    """Who is let in stays so while the files cannot be read, and the change is seen as soon as they can."""
    keys, other = Keys.create(), Keys.create()
    directory.allow("one", keys.public)
    assert directory.find_user(raw(keys.public)) == "one"
    directory.allow("two", other.public)

    def fail(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(security.os, failing, fail)
        assert directory.find_user(raw(keys.public)) == "one"
        assert directory.find_user(raw(other.public)) is None
    assert directory.find_user(raw(other.public)) == "two"


def test_directory_removed(directory):
    """Whoever removes the directory of a cluster that is served shuts everybody out."""
    keys = Keys.create()
    directory.allow("one", keys.public)
    assert directory.find_user(raw(keys.public)) == "one"
    (directory.path / "clients" / "one.json").unlink()
    (directory.path / "clients").rmdir()
    assert directory.find_user(raw(keys.public)) is None
    assert directory.reread() == {}


# At the same time


def test_readers_see_the_old_or_the_new(tmp_path):
    """A file that is written again and again is always whole."""
    path = tmp_path / "file"
    write_private(path, {"text": "0" * 100_000})
    is_over = threading.Event()
    faults = []

    def read():
        while not is_over.is_set():
            try:
                text = read_private(path, "file")["text"]
                assert len(text) == 100_000 and len(set(text)) == 1
            except BaseException as error:
                faults.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(100):
        write_private(path, {"text": str(number % 10) * 100_000})
    is_over.set()
    for reader in readers:
        reader.join()
    assert not faults
    assert os.listdir(tmp_path) == ["file"]


def test_one_name_for_two(directory):
    """Of several who allow a key under one name at once, one succeeds, and that one's key is let in."""
    keys = [Keys.create() for _ in range(8)]
    start = threading.Barrier(8)
    allowed = []

    def allow(own):
        start.wait()
        try:
            directory.allow("name", own.public)
        except ConfigurationError:
            return
        allowed.append(raw(own.public))

    threads = [threading.Thread(target=allow, args=(own,)) for own in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(allowed) == 1
    assert list(directory.reread()) == allowed
    assert os.listdir(directory.path / "clients") == ["name.json"]


def test_what_a_killed_process_left(tmp_path, monkeypatch):
    """The file that a process of this number was writing when it was killed is in nobody's way."""
    path = tmp_path / "file"
    monkeypatch.setattr(security.os, "replace", lambda *_: os.abort)
    monkeypatch.setattr(security.os, "unlink", lambda *_: None)
    write_private(path, {})
    assert len(os.listdir(tmp_path)) == 1
    monkeypatch.undo()
    write_private(path, {"now": 1})
    assert read_private(path, "file") == {"now": 1}


def test_cannot_write(tmp_path):
    """What cannot be written says where and why."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 250)):
        with pytest.raises(ConfigurationError, match=f"cannot write {path}: "):
            write_private(path, {})


def test_keys():
    """Keys are CURVE's, and no two are the same."""
    first, second = Keys.create(), Keys.create()
    assert first != second
    assert zmq.curve_public(first.secret) == first.public
