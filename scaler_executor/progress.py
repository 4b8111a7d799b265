"""The bar of `map(..., progress=...)`: what is done, at which rate, until when, how many have failed and how many run.

The I/O thread and the consumer only count, by the range; a thread of the bar's own looks at the numbers a few times a
second and draws them, so a slow terminal holds up nobody. It ends with the map, or with the main thread.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol

from scaler_executor.inbox import CANCELLED
from scaler_executor.protocol.messages import ResultKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaler_executor.inbox import Inbox

#: Between two looks at the numbers.
TICK_S: Final = 0.1
#: So long may the last drawing hold up whoever closes the bar: a terminal may have been stopped.
CLOSE_S: Final = 0.5

#: Held while a bar is drawn, and by whoever forks this process: the child would find the locks of its streams taken.
_DRAWING: Final = threading.Lock()
#: Whether the thread that forks has got it: not from a bar whose terminal is stopped.
_fork = threading.local()

_VALUE: Final = int(ResultKind.VALUE)


class Bar(Protocol):
    """What shows the numbers."""

    def draw(self, done: int, total: int | None, remark: str) -> None:
        """Show them."""

    def close(self) -> None:
        """End the line."""


class Meter:
    """Counts the items of a map for its bar.

    Args:
        make_bar: Called in the thread that draws.
        total: How many items there are, None if nobody knows yet.
    """

    def __init__(self, make_bar: Callable[[], Bar], total: int | None) -> None:
        self._make_bar = make_bar
        self._total = total
        #: Items that are submitted, and whether there are no more. Written by the consumer.
        self._expected = 0
        self._is_complete = False
        #: Items that have a result, those of them that failed, and items that were taken back or cancelled. Written by
        #: whoever brings the answers.
        self._done = 0
        self._failed = 0
        self._cancelled = 0
        self._running: Callable[[], int] = int
        self._owner: Callable[[], object] = object
        self.has_started = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scaler-executor-progress")

    def start(self, owner: object, running: Callable[[], int] = int) -> None:
        """Begin to draw. It goes on until all is answered, as long as `owner` may submit more or until `close`.

        Best after the first item was submitted, which may fork this process.
        """
        self.has_started = True
        self._owner = weakref.ref(owner)
        self._running = running
        try:
            self._thread.start()
        except RuntimeError:
            self._closed.set()  # the interpreter is about to exit

    def expect(self, count: int) -> None:
        """Note that so many more items have been submitted."""
        self._expected += count

    def complete(self) -> None:
        """Note that there will be no more."""
        self._is_complete = True

    def count(self, count: int, kind: int) -> None:
        """Note that so many items have an answer of this kind."""
        if kind == CANCELLED:
            self._cancelled += count
            return
        self._done += count
        if kind != _VALUE:
            self._failed += count

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Draw for the last time, and wait for that so long."""
        if not self._closed.is_set():
            self._closed.set()
            # It may not have been started, or be this one that collects garbage.
            if self._thread.ident not in (None, threading.get_ident()):
                self._thread.join(limit_s)

    def _run(self) -> None:
        with _DRAWING:
            bar = self._make_bar()
        try:
            while not self._closed.wait(TICK_S) and threading.main_thread().is_alive():
                if (self._is_complete or self._owner() is None) and self._done + self._cancelled >= self._expected:
                    break
                self._draw(bar)
            self._draw(bar)
        finally:
            with _DRAWING:
                bar.close()

    def _draw(self, bar: Bar) -> None:
        total = self._total
        if total is None and self._is_complete:
            total = self._expected
        failed = self._failed
        with _DRAWING:
            bar.draw(self._done, total, f"{failed} failed, {self._running()} running")


def _before_fork() -> None:
    _fork.has_lock = _DRAWING.acquire(timeout=CLOSE_S)


def _after_fork() -> None:
    if _fork.has_lock:
        _DRAWING.release()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork, after_in_parent=_after_fork)


class PlainBar:
    """A line of text, on stderr."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = time.monotonic()
        self._file = sys.stderr
        self._width = 0

    def draw(self, done: int, total: int | None, remark: str) -> None:
        """Write the line over the last one."""
        columns = self._columns() - 1
        line = format_line(self._label, done, total, time.monotonic() - self._start, remark, columns)[:columns]
        padding = " " * (self._width - len(line))
        self._width = len(line)
        self._write(f"\r{line}{padding}")

    def close(self) -> None:
        """End the line."""
        self._write("\n")

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._file.fileno()).columns or 80
        except (OSError, ValueError):
            return 120  # a notebook's, say

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except (OSError, ValueError):
            pass  # the terminal is gone, or the stream closed


class TqdmBar:
    """A bar of tqdm: of its notebook kind where there is one."""

    def __init__(self, tqdm: Any, label: str, total: int | None) -> None:
        self._bar = tqdm(
            desc=label or None, total=total, file=sys.stderr, mininterval=0, miniters=1, dynamic_ncols=True
        )

    def draw(self, done: int, total: int | None, remark: str) -> None:
        """Hand the numbers on."""
        bar = self._bar
        if total != bar.total:
            bar.total = total
        bar.set_postfix_str(remark, refresh=False)
        if done > bar.n:
            bar.update(done - bar.n)
        else:
            bar.refresh()

    def close(self) -> None:
        """End the line."""
        self._bar.close()


def make_meter(progress: bool | str, total: int | None) -> Meter | None:
    """Return a meter with a bar; None where none is wanted, or nobody would see it."""
    if not isinstance(progress, (bool, str)):
        raise TypeError(f"progress must be True, False or a label, not {type(progress).__name__}")
    if progress is False or not (_is_terminal() or _is_notebook()):
        return None
    label = "" if progress is True else progress
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return Meter(lambda: PlainBar(label), total)
    return Meter(lambda: TqdmBar(tqdm, label, total), total)


def format_line(label: str, done: int, total: int | None, elapsed_s: float, remark: str, columns: int = 120) -> str:
    """Return the text of a bar, with fewer marks or none where there is not enough room."""
    rate = done / elapsed_s if elapsed_s > 0 else 0.0
    speed = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s"
    label = f"{label}: " if label else ""
    if total is None:
        return f"{label}{done} [{_clock(elapsed_s)}, {speed}, {remark}]"
    part = done / total if total else 1.0
    left = _clock((total - done) / rate) if rate else "?"
    numbers = f"{done}/{total} [{_clock(elapsed_s)}<{left}, {speed}, {remark}]"
    for marks in (20, 10, 5):
        line = f"{label}{part:4.0%} |{'#' * int(marks * part):{marks}}| {numbers}"
        if len(line) <= columns:
            return line
    return f"{label}{part:4.0%} {numbers}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


def running_in(inbox: Inbox, most: int) -> Callable[[], int]:
    """Return what counts the calls of a map that have been seen running: of `most` workers."""
    return lambda: min(most, sum(min(run.seen, run.left) for run in list(inbox.running)))


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        return False  # it is closed


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
