"""The layers, read from the imports, and rules that the code base keeps."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import scaler_executor

PACKAGE = Path(scaler_executor.__file__).parent
TESTS = Path(__file__).parent.parent
PROTOCOL = sorted(PACKAGE.joinpath("protocol").glob("*.py"))
ADAPTERS = sorted(PACKAGE.glob("adapters/**/*.py"))
#: All that the pure layer may import besides itself.
ALLOWED = {
    "bisect",
    "heapq",
    "__future__",
    "collections",
    "enum",
    "itertools",
    "msgspec",
    "struct",
    "typing",
    "typing_extensions",
}
#: What Linux has and other systems have not, by the names that Python gives it: for runtime/platform.py alone.
LINUX_ONLY = {
    "EFD_CLOEXEC",
    "EFD_NONBLOCK",
    "F_ADD_SEALS",
    "F_GETPIPE_SZ",
    "F_SETPIPE_SZ",
    "MFD_CLOEXEC",
    "MSG_CMSG_CLOEXEC",
    "O_TMPFILE",
    "P_PIDFD",
    "SOCK_CLOEXEC",
    "SOCK_NONBLOCK",
    "SO_PEERCRED",
    "copy_file_range",
    "epoll",
    "eventfd",
    "eventfd_read",
    "eventfd_write",
    "memfd_create",
    "pidfd_open",
    "pidfd_send_signal",
    "pipe2",
    "prctl",
    "prlimit",
    "process_cpu_count",
    "sched_getaffinity",
    "sched_setaffinity",
    "sched_yield",
    "setns",
    "splice",
    "timerfd_create",
    "unshare",
}
LINUX_PATHS = ("/proc", "/sys/", "/dev/shm", "libc.so")


def imported(path):
    """Return the full names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", PROTOCOL, ids=lambda path: path.name)
def test_pure(path):
    """The pure layer imports no sockets, threads, processes, clock, random numbers, pickle or logging, nor the
    runtime."""
    for name in imported(path):
        pure = name.startswith("scaler_executor.protocol") or name.split(".")[0] in ALLOWED
        assert pure, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", PROTOCOL, ids=lambda path: path.name)
def test_no_clock(path):
    """The pure layer is told the time: it neither opens, prints nor asks."""
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input", "eval", "exec", "__import__", "time", "monotonic", "perf_counter"}


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.name)
def test_adapters(path):
    """Adapters import the public package and their library only."""
    for name in imported(path):
        assert not name.startswith("scaler_executor.") or name.startswith("scaler_executor.adapters")


def test_wire_needs_no_runtime():
    """Nothing in the pure layer drags the runtime in."""
    assert PROTOCOL and not any(name.startswith("scaler_executor.runtime") for p in PROTOCOL for name in imported(p))


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("worker", {"client", "cluster", "functions", "namespace"}),
        ("client", {"agent", "forker", "namespace_worker", "serve", "worker"}),
    ],
)
def test_each_side_imports_its_own(module, others):
    """Workers do not import what only the client's process needs, nor does it import what only they need."""
    program = f"import sys, scaler_executor.runtime.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = set(done.stdout.split())
    assert not names & {f"scaler_executor.runtime.{other}" for other in others}


@pytest.mark.parametrize("folder", ["protocol", "simulation"])
def test_no_sleeps(folder):
    """Nothing here sleeps: time is virtual."""
    for path in TESTS.joinpath(folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Attribute) and node.attr == "sleep"), path


def linux_only(path):
    """Return what a file names that only Linux has, in code or in strings that are no docstrings."""
    found = set()
    prose = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr):
            prose.add(node.value)
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & LINUX_ONLY
            found |= {"EPOLL*"} if node.attr.startswith("EPOLL") else set()
        elif isinstance(node, ast.Name):
            found |= {node.id} & LINUX_ONLY
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} & LINUX_ONLY
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            found |= {node.value} & LINUX_ONLY
            found |= {start for start in LINUX_PATHS if start in node.value}
    return found


def test_what_only_linux_has_stands_in_one_place():
    """No module but runtime/platform.py, and runtime/cgroups.py about limits, names system calls, constants or files
    that only Linux has."""
    platform, cgroups = (PACKAGE / "runtime" / name for name in ("platform.py", "cgroups.py"))
    assert linux_only(cgroups) <= {*LINUX_PATHS, "process_cpu_count", "sched_getaffinity"}
    assert {"epoll", "eventfd", "memfd_create", "pidfd_open", "pidfd_send_signal", "/proc"} <= linux_only(platform)
    found = {path.name: linux_only(path) for path in PACKAGE.rglob("*.py") if path not in (platform, cgroups)}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("name", ["win32", "emscripten"])
def test_where_it_cannot_run_it_says_so(name):
    """On Windows importing the package, its command included, fails at once and says why."""
    for module in ("scaler_executor", "scaler_executor.cli"):
        program = f"import sys; sys.platform = {name!r}; import {module}"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and last.startswith("ImportError: scaler-executor runs on Linux"), done.stderr
        assert name in last


def test_files_stay_readable():
    """No file of the pure layer is much longer than the yardstick of 500 lines."""
    for path in PROTOCOL:
        assert len(path.read_text().splitlines()) < 550, path


def test_every_test_says_what_it_claims():
    """Each test of these folders has a docstring."""
    for folder in ("protocol", "simulation"):
        for path in TESTS.joinpath(folder).glob("test_*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_python():
    """These tests run on the Pythons that the package claims."""
    assert sys.version_info >= (3, 10)
