"""The `scaler-executor` command, run as users run it: in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import scaler_executor
from scaler_executor import demo
from scaler_executor.cli import main


def run_command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "scaler_executor", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_version():
    """--version prints the package's version."""
    finished = run_command("--version")
    assert (finished.returncode, finished.stdout) == (0, f"scaler-executor {scaler_executor.__version__}\n")


def test_help():
    """--help lists the commands and gives an example."""
    finished = run_command("--help")
    assert finished.returncode == 0
    assert re.search(r"^ +demo ", finished.stdout, re.MULTILINE)
    assert "example:\n  scaler-executor demo" in finished.stdout


def test_help_is_quick():
    """Asking for help imports neither the executor nor what it needs."""
    program = (
        "import sys; from scaler_executor.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print({'zmq', 'cloudpickle', 'multiprocessing', 'scaler_executor.executor'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout.splitlines()[-1]) == (0, "set()")


def test_wrong_usage():
    """No command, an unknown one and a bad number of workers are usage errors: exit code 2, nothing on stdout."""
    for arguments in [(), ("nonsense",), ("demo", "--workers", "0"), ("demo", "--workers", "x")]:
        finished = run_command(*arguments)
        assert (finished.returncode, finished.stdout) == (2, ""), arguments
        assert finished.stderr.startswith("usage: scaler-executor"), arguments


def test_demo():
    """The demo finds everything as promised, writes no progress line into a file and nothing to stderr."""
    finished = run_command("demo", "--workers", "2")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stderr == ""
    assert "\r" not in finished.stdout
    assert "WRONG" not in finished.stdout
    assert finished.stdout.count("\n  ok ") == 5


def test_demo_fails_when_something_is_wrong(monkeypatch, capsys):
    """A call that a crash should have cost, but did not, makes the exit code 1."""
    monkeypatch.setattr(demo, "_SAMPLE_BYTES", 500_000)
    monkeypatch.setattr(demo, "kill_worker", os.getpid)
    assert main(["demo", "--workers", "2"]) == 1
    assert re.search(r"WRONG +crash in a map", capsys.readouterr().out)


def test_sources_are_always_the_same(tmp_path: Path):
    """The sample depends on names and sizes only, and leaves tests and installed packages out."""
    for name, size in [
        ("a.py", 10),
        ("b.py", 20),
        ("c.py", 30),
        ("d.py", 40),
        ("test/e.py", 5),
        ("site-packages/f.py", 5),
    ]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"#" * size)
    assert demo.choose_sources(tmp_path, limit_bytes=1000) == [str(tmp_path / f"{name}.py") for name in "dcba"]
    assert demo.choose_sources(tmp_path, limit_bytes=50) == [str(tmp_path / f"{name}.py") for name in "db"]
