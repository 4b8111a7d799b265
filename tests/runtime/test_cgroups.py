"""Where the kernel counts whom it has killed for want of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from scaler_executor.runtime import cgroups, platform

pytestmark = pytest.mark.skipif(platform.PORTABLE, reason="the files are Linux's")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("groups", "counter"),
    [
        ("0::/user/job\n", "user/job/memory.events"),
        ("0::/user/job\n", "unified/user/job/memory.events"),
        ("0::/\n", "memory.events"),
        ("0::/of/the/host\n", "memory.events"),
        ("4:memory:/job\n1:cpu:/other\n0::/\n", "memory/job/memory.oom_control"),
        ("4:cpu,memory:/job\n", "cpu,memory/job/memory.oom_control"),
        ("4:memory:/of/the/host\n", "memory/memory.oom_control"),
    ],
)
def test_group(tmp_path: Path, groups: str, counter: str) -> None:
    """Both versions' counters are found, also those of a container that does not see its own path."""
    write(tmp_path / "proc" / "7" / "cgroup", groups)
    write(tmp_path / "proc" / "vmstat", "nr_free_pages 5\noom_kill 9\n")
    path = write(tmp_path / "cgroup" / counter, "low 0\noom 1\noom_kill 3\n")
    found = cgroups.counter_path(7, proc=str(tmp_path / "proc"), cgroup=str(tmp_path / "cgroup"))
    assert found == str(path)
    assert cgroups.killed_for_memory(found) == 3


def test_no_group(tmp_path: Path) -> None:
    """Without a group it is the machine's counter, and without that nothing is told."""
    write(tmp_path / "proc" / "7" / "cgroup", "0::/\n")
    vmstat = tmp_path / "proc" / "vmstat"
    where = {"proc": str(tmp_path / "proc"), "cgroup": str(tmp_path / "cgroup")}
    assert cgroups.counter_path(7, **where) is None
    write(vmstat, "nr_free_pages 5\n")
    assert cgroups.counter_path(7, **where) is None
    write(vmstat, "nr_free_pages 5\noom_kill 9\n")
    assert cgroups.counter_path(7, **where) == str(vmstat)
    assert cgroups.counter_path(8, **where) is None
    assert cgroups.killed_for_memory(None) is None
    write(vmstat, "oom_kill many\n")
    assert cgroups.killed_for_memory(str(vmstat)) is None
