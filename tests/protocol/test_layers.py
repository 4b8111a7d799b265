"""The layers, read from the imports, and rules that the code base keeps."""

import ast
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
    "__future__",
    "collections",
    "enum",
    "itertools",
    "msgspec",
    "struct",
    "typing",
    "typing_extensions",
}


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


@pytest.mark.parametrize("folder", ["protocol", "simulation"])
def test_no_sleeps(folder):
    """Nothing here sleeps: time is virtual."""
    for path in TESTS.joinpath(folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Attribute) and node.attr == "sleep"), path


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
