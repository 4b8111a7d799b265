"""The numbers of a bar: counted by the range, drawn by the time."""

import io
import os
import sys
import threading
import types
from typing import Any

import pytest

from scaler_executor import progress
from scaler_executor.inbox import CANCELLED, Inbox, MapRun
from scaler_executor.progress import Meter, PlainBar, format_line, make_meter
from scaler_executor.protocol.client import REST
from scaler_executor.protocol.messages import ResultKind
from scaler_executor.runtime.results import LOST

PATIENCE_S = 20.0


class Bar:
    """Remembers what it is to show."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []
        self.has_drawn = threading.Event()
        self.closed = threading.Event()

    def draw(self, done: int, total: int | None, remark: str) -> None:
        assert progress._DRAWING.locked()  # nobody forks meanwhile
        self.drawn.append((done, total, remark))
        self.has_drawn.set()

    def close(self) -> None:
        assert progress._DRAWING.locked()
        self.closed.set()


class Owner:
    pass


class Stream(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_numbers_are_drawn_at_the_end() -> None:
    """Failures are done as well, what was cancelled is not; the total is known when all is submitted."""
    bar, owner = Bar(), Owner()
    meter = Meter(lambda: bar, None)
    meter.start(owner, lambda: 2)
    meter.expect(4)
    meter.count(2, int(ResultKind.VALUE))
    meter.count(1, int(ResultKind.DIED))
    meter.count(1, CANCELLED)
    meter.close()
    assert bar.closed.is_set() and bar.drawn[-1] == (3, None, "1 failed, 2 running")
    bar, meter = Bar(), Meter(lambda: bar, None)
    meter.start(owner)
    meter.expect(1)
    meter.complete()
    meter.close()
    assert bar.drawn[-1] == (0, 1, "0 failed, 0 running")


def test_the_rest_of_a_run_is_counted_as_what_it_is() -> None:
    """An answer for all items that had none counts each of them."""
    bar, owner = Bar(), Owner()
    meter = Meter(lambda: bar, 5)
    meter.start(owner)
    run = MapRun(5, Inbox(meter=meter))
    run.set_items_ready(0, 2, int(ResultKind.VALUE), b"")
    run.set_items_ready(REST, 0, LOST, "lost")
    meter.close()
    assert bar.drawn[-1] == (5, 5, "3 failed, 0 running")


@pytest.mark.parametrize("how", ["complete", "owner is garbage"])
def test_it_ends_by_itself_when_there_is_no_more(how: str) -> None:
    """Also where nobody ever closes it."""
    bar, owner = Bar(), Owner()
    meter = Meter(lambda: bar, None)
    meter.start(owner)
    meter.expect(1)
    assert bar.has_drawn.wait(PATIENCE_S)
    if how == "complete":
        meter.complete()
    else:
        del owner
    meter.count(1, CANCELLED)
    assert bar.closed.wait(PATIENCE_S)
    meter._thread.join()


def test_drawing_is_by_time_and_not_by_item() -> None:
    """A million ranges are as cheap as one."""
    bar, owner = Bar(), Owner()
    meter = Meter(lambda: bar, None)
    meter.start(owner)
    for _ in range(100_000):
        meter.count(1, 0)
    meter.close()
    assert len(bar.drawn) < 1000 and bar.drawn[-1][0] == 100_000


def test_a_fork_waits_until_a_bar_is_drawn() -> None:
    """Its child would inherit the locks of the streams as they are."""
    meter = Meter(Bar, None)
    owner = Owner()
    meter.start(owner)
    progress._before_fork()
    try:
        assert progress._fork.has_lock and progress._DRAWING.locked()
    finally:
        progress._after_fork()
    pid = os.fork()
    if not pid:
        os._exit(progress._DRAWING.locked())
    assert os.waitpid(pid, 0)[1] == 0
    meter.close()


def test_lines() -> None:
    """With and without a total, label and rate."""
    assert format_line("", 0, 10, 0.0, "r") == "  0% |                    | 0/10 [00:00<?, 0.00/s, r]"
    assert format_line("L", 5, 10, 2.0, "r") == "L:  50% |##########          | 5/10 [00:02<00:02, 2.50/s, r]"
    assert format_line("L", 5000, None, 3700.0, "r") == "L: 5000 [1:01:40, 1.35/s, r]"
    assert format_line("", 0, 0, 1.0, "r").startswith("100% |####################| 0/0")
    assert format_line("L", 5, 10, 2.0, "r", 50) == "L:  50% |#####     | 5/10 [00:02<00:02, 2.50/s, r]"
    assert format_line("L", 5, 10, 2.0, "r", 20) == "L:  50% 5/10 [00:02<00:02, 2.50/s, r]"
    assert "1,000/s" in format_line("", 1000, 2000, 1.0, "r")


def test_a_plain_bar_writes_over_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was longer before is wiped out; a stream that is gone hurts nobody."""
    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    bar = PlainBar("Label")
    bar.draw(1, None, "a long remark")
    bar.draw(2, None, "short")
    bar.close()
    first, second = stream.getvalue().lstrip("\r").split("\r")
    assert len(second.rstrip("\n")) == len(first) and second.rstrip(" \n").endswith("short]")
    stream.close()
    bar.draw(3, None, "")
    bar.close()


def test_who_sees_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terminals and notebooks; nobody else, and nobody who has not asked."""
    monkeypatch.setitem(sys.modules, "tqdm", None)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert make_meter(True, 1) is None
    kernel = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))  # type: ignore[arg-type]
    assert make_meter(True, 1) is not None
    monkeypatch.delitem(sys.modules, "IPython")
    monkeypatch.setattr(sys, "stderr", None)
    assert make_meter(True, 1) is None
    monkeypatch.setattr(sys, "stderr", Stream())
    assert make_meter("label", 1) is not None
    assert make_meter(False, 1) is None
    with pytest.raises(TypeError, match="True, False or a label"):
        make_meter(3, 1)  # type: ignore[arg-type]
