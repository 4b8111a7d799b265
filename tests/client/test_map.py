"""map over a fake scheduler: cutting into runs, ranges in any order, and what is taken back."""

import itertools
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, TimeoutError
from typing import Any

import pytest
from fake_scheduler import PATIENCE_S, Background, Setting, never_called

from scaler_executor import SchedulerLostError
from scaler_executor.inbox import Inbox, MapRun, UnorderedInbox
from scaler_executor.mapping import RUN_BYTES, RUN_ITEMS, MapCall
from scaler_executor.protocol.client import REST
from scaler_executor.protocol.messages import CancelKind, InheritanceLost, ResultKind, TaskCancelConfirmType, TaskRow
from scaler_executor.runtime.calls import RunForm, load_item, load_run


def start(
    setting: Setting,
    *iterables: Any,
    workers: int = 2,
    chunksize: int = 1,
    buffersize: int | None = None,
    ordered: bool = True,
    **options: Any,
) -> MapCall:
    call = MapCall(
        setting.client,
        workers,
        never_called,
        iterables,
        inbox=Inbox() if ordered else UnorderedInbox(),
        chunksize=chunksize,
        buffersize=buffersize,
        **options,
    )
    call.fill()
    return call


def next_run(setting: Setting) -> TaskRow:
    return setting.scheduler.next_submit()


def rows_of(setting: Setting, items: int) -> list[TaskRow]:
    rows: list[TaskRow] = []
    while sum(row[1] for row in rows) < items:
        rows.append(next_run(setting))
    return rows


def echo(setting: Setting, row: TaskRow) -> None:
    """Answer a run with its own arguments."""
    form, items = load_run(row[3])  # type: ignore[arg-type]
    if form is RunForm.PICKLED:
        items = [load_item(item) for item in items]
    setting.scheduler.values(row[0], 0, list(items))


def test_ranges_in_any_order_are_yielded_in_order(setting: Setting) -> None:
    """Results of a run may come in ranges, backwards, and of a later run first."""
    results = start(setting, range(20), chunksize=10).results(None)
    rows = rows_of(setting, 20)
    for row in reversed(rows):
        for item in reversed(range(row[1])):
            setting.scheduler.value(row[0], row[0] + item - 1, item)
    assert list(results) == list(range(20))


def test_items_are_yielded_as_soon_as_they_are_there(setting: Setting) -> None:
    """The first item does not wait for the rest of its run."""
    results = start(setting, range(100), workers=1, chunksize=25).results(None)
    row = next_run(setting)
    assert row[1] > 1
    setting.scheduler.values(row[0], 0, ["first"])
    assert next(results) == "first"
    waiting = Background(next, results)
    setting.scheduler.value(row[0], "second", 1)
    assert waiting.result() == "second"
    results.close()  # type: ignore[attr-defined]


def test_inheritance_lost_between_two_runs(setting: Setting) -> None:
    """The answer is sent at once, also without anything that was counted on; and the map goes on."""

    def items() -> Iterator[int]:
        yield 1
        setting.scheduler.send(InheritanceLost(1, "lost"))
        assert setting.scheduler.replacements.get(timeout=PATIENCE_S).definitions == []
        yield 2

    call = start(setting, items(), workers=1)
    for row in rows_of(setting, 2):
        echo(setting, row)
    assert list(call.results(None)) == [1, 2]


def test_unordered_results_are_yielded_as_they_come(setting: Setting) -> None:
    """Ranges of any run, in the order in which the scheduler gives them."""
    results = start(setting, range(20), chunksize=10, ordered=False).results(None)
    rows = rows_of(setting, 20)
    first_items = {row[0]: row[0] - rows[0][0] for row in rows}
    came = []
    for row in reversed(rows):
        for item in reversed(range(row[1])):
            setting.scheduler.value(row[0], first_items[row[0]] + item, item)
            came.append(first_items[row[0]] + item)
            assert next(results) == came[-1]
    assert sorted(came) == list(range(20))
    assert list(results) == []


def test_an_unordered_consumer_is_woken(setting: Setting) -> None:
    """It waits for whatever comes first, and times out when nothing does."""
    results = start(setting, range(2), ordered=False).results(None)
    rows = rows_of(setting, 2)
    waiting = Background(next, results)
    setting.scheduler.value(rows[1][0], "second")
    assert waiting.result() == "second"
    setting.scheduler.value(rows[0][0], "first")
    assert list(results) == ["first"]
    with pytest.raises(TimeoutError):
        next(start(setting, range(2), ordered=False).results(0.0))


def test_an_unordered_exception_is_raised_when_it_comes(setting: Setting) -> None:
    """It ends the iteration, and what has not started is taken back: also by the runs that came behind it."""
    results = start(setting, range(3), workers=1, ordered=False).results(None)
    rows = rows_of(setting, 3)
    setting.scheduler.value(rows[2][0], "fine")
    setting.scheduler.error(rows[1][0], ValueError("of the second"))
    assert next(results) == "fine"
    with pytest.raises(ValueError, match="of the second"):
        next(results)
    assert list(results) == []
    assert setting.scheduler.next_cancel()[0] == rows[0][0]


def test_unordered_items_that_are_cancelled_together(setting: Setting) -> None:
    """The answer for all that is left of a run stands for each of its items."""
    results = start(setting, range(10), workers=1, chunksize=10, ordered=False).results(None)
    rows = rows_of(setting, 10)
    setting.scheduler.values(rows[0][0], 0, ["first"])
    assert next(results) == "first"
    setting.scheduler.on_cancel = setting.scheduler.not_found
    setting.client.clear(PATIENCE_S)
    with pytest.raises(CancelledError):
        next(results)
    assert list(results) == []


def test_an_unordered_buffer_bounds_what_is_read_ahead(setting: Setting) -> None:
    """Endless iterables work, and what was consumed is forgotten."""
    setting.scheduler.on_submit = lambda row: echo(setting, row)
    read = itertools.count()
    call = start(setting, read, buffersize=4, ordered=False)
    results = call.results(None)
    seen = set()
    for consumed in range(1, 301):
        seen.add(next(results))
        assert int(repr(read)[6:-1]) - consumed <= 4
    assert len(seen) == 300 and seen <= set(range(304))
    assert len(call.inbox._open) <= 4  # type: ignore[attr-defined]
    results.close()  # type: ignore[attr-defined]


def test_items_of_a_starmap_are_the_arguments(setting: Setting) -> None:
    """Any iterable of arguments; it is cut as that of a map is."""
    setting.scheduler.on_submit = lambda row: (setting.scheduler.submits.put(row), echo(setting, row))[0]
    items = [[1, 2], (3,), iter([4, 5])]
    assert list(start(setting, items, is_starred=True).results(None)) == [(1, 2), 3, (4, 5)]
    items = [(number, number) for number in range(5000)]
    assert list(start(setting, items, is_starred=True).results(None)) == items
    assert list(start(setting, zip(range(5000), range(5000)), is_starred=True).results(None)) == items  # noqa: B905
    assert sum(row[1] > 100 for row in rows_of(setting, 10003)) > 20
    generated = zip(range(3), (number for number in range(3)))  # noqa: B905 - which may wait for the results before
    assert len(list(start(setting, generated, is_starred=True).results(None))) == 3
    assert [row[1] for row in rows_of(setting, 3)] == [1] * 3


@pytest.mark.parametrize("ordered", [True, False])
def test_a_closed_iterator_stops_what_runs_if_asked_to(setting: Setting, ordered: bool) -> None:
    """By force, and without waiting for the answer."""
    results = start(setting, range(3), ordered=ordered, cancel_running=True).results(None)
    rows = rows_of(setting, 3)
    setting.scheduler.value(rows[0][0], "hit")
    assert next(results) == "hit"
    results.close()  # type: ignore[attr-defined]
    cancels = [setting.scheduler.next_cancel() for _ in rows[1:]]
    assert {cancel[0] for cancel in cancels} == {row[0] for row in rows[1:]}
    assert {cancel[2] for cancel in cancels} == {CancelKind.FORCED}


@pytest.mark.parametrize("count", [1, 5, 50, 5000])
def test_every_item_is_sent_once(setting: Setting, count: int) -> None:
    """Runs hold the items in order, none twice; few items make several runs for each worker, many make long ones."""
    setting.scheduler.on_submit = lambda row: (setting.scheduler.submits.put(row), echo(setting, row))[0]
    assert list(start(setting, range(count)).results(None)) == list(range(count))
    rows = rows_of(setting, count)
    assert max(row[1] for row in rows) <= RUN_ITEMS
    assert len(rows) >= min(count, 8)


def test_runs_of_an_unknown_number_of_items_grow(setting: Setting) -> None:
    """With an iterator the first runs are short, so that every worker has one soon, and later ones long."""
    setting.scheduler.on_submit = lambda row: (setting.scheduler.submits.put(row), echo(setting, row))[0]
    assert list(start(setting, iter(range(5000))).results(None)) == list(range(5000))
    sizes = [row[1] for row in rows_of(setting, 5000)]
    assert sizes[:8] == [1] * 8 and max(sizes) == RUN_ITEMS


def test_items_of_a_generator_are_not_held_back(setting: Setting) -> None:
    """A generator may wait for results of items that it has given: each is sent before the next is taken."""
    sent: list[TaskRow] = []

    def generate() -> Iterator[int]:
        for number in range(5):
            yield number
            sent.append(next_run(setting))

    start(setting, generate())
    assert [row[1] for row in sent] == [1] * 5


def test_what_a_failing_iterable_has_given_is_submitted(setting: Setting) -> None:
    """map() raises its error, and the items before it run, as by ProcessPoolExecutor."""

    def generate() -> Iterator[int]:
        yield from range(3)
        raise LookupError

    with pytest.raises(LookupError):
        start(setting, generate())
    assert [row[1] for row in rows_of(setting, 3)] == [1] * 3


def test_runs_of_large_items_are_short(setting: Setting) -> None:
    """The payload of a run is bounded, also where the number of its items would not be."""
    setting.scheduler.on_submit = lambda row: (setting.scheduler.submits.put(row), echo(setting, row))[0]
    items = [bytes(4000) for _ in range(2000)]
    assert list(start(setting, items).results(None)) == items
    sizes = [row[1] for row in rows_of(setting, 2000)]
    assert all(size <= RUN_BYTES // 4000 for size in sizes[1:])


def test_chunksize_is_an_upper_bound(setting: Setting) -> None:
    """An explicit chunksize is never exceeded."""
    setting.scheduler.on_submit = lambda row: (setting.scheduler.submits.put(row), echo(setting, row))[0]
    assert len(list(start(setting, range(1000), chunksize=7).results(None))) == 1000
    assert max(row[1] for row in rows_of(setting, 1000)) == 7


def test_several_iterables_end_with_the_shortest(setting: Setting) -> None:
    """As the built-in map."""
    setting.scheduler.on_submit = lambda row: echo(setting, row)
    assert list(start(setting, [1, 2, 3], itertools.count(7)).results(None)) == [(1, 7), (2, 8), (3, 9)]
    assert list(start(setting, []).results(None)) == []


@pytest.mark.parametrize("kind", ["error", "cancelled", "value that does not unpickle", "lost"])
def test_an_items_exception_is_raised_at_its_place(setting: Setting, kind: str) -> None:
    """The items before it are yielded, then it is raised, and what has not started is taken back."""
    results = start(setting, range(100), workers=1, chunksize=25).results(None)
    row = next_run(setting)
    setting.scheduler.values(row[0], 0, ["first"])
    assert next(results) == "first"
    if kind == "error":
        setting.scheduler.error(row[0], ValueError("of the second"), 1)
        expected: Any = ValueError
    elif kind == "cancelled":
        expected = CancelledError
        setting.scheduler.on_cancel = setting.scheduler.not_found
        setting.client.clear(PATIENCE_S)
    elif kind == "lost":
        expected = SchedulerLostError
        setting.scheduler.die()
    else:
        expected = AttributeError
        setting.scheduler.result(row[0], ResultKind.VALUE, pickle.dumps(len).replace(b"len", b"xyz"), 1)
    with pytest.raises(expected):
        next(results)
    assert list(results) == []


def test_a_range_that_crosses_the_end_of_its_run_is_not_missed() -> None:
    """The consumer looks for a range, then for the end of the run; both come in between: the range counts."""
    run = MapRun(2, Inbox())

    class Crossed(dict[int, Any]):
        def pop(self, first: int, default: Any = None) -> Any:
            found = super().pop(first, default)
            if found is None and not run.is_over:
                run.set_items_ready(0, 1, int(ResultKind.VALUE), b"payload")
                run.set_items_cancelled(REST, 1)
            return found

    run._ranges = Crossed()
    assert run.take(0) == (1, int(ResultKind.VALUE), b"payload")
    assert run.take(1) == (1, -2, None)


def test_a_closed_iterator_takes_back_softly(setting: Setting) -> None:
    """Closing it asks for what has not started, never for what runs; its results are then nobody's."""
    results = start(setting, range(100), chunksize=10).results(None)
    rows = rows_of(setting, 100)
    echo(setting, rows[0])
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    cancels = [setting.scheduler.next_cancel() for _ in rows[1:]]
    assert {cancel[0] for cancel in cancels} == {row[0] for row in rows[1:]}
    assert {cancel[2] for cancel in cancels} == {CancelKind.SOFT}
    for row, cancel in zip(rows[1:], cancels, strict=True):
        setting.scheduler.refused(cancel)
        echo(setting, row)
    setting.sync()
    assert setting.client.outstanding == 0


def test_an_unread_iterator_takes_back_nothing(setting: Setting) -> None:
    """People use map for its effects: the iterator may be thrown away unread."""
    results: Iterator[Any] | None = start(setting, range(10)).results(None)
    rows = rows_of(setting, 10)
    del results
    setting.sync()
    assert setting.scheduler.cancels.empty()
    for row in rows:
        echo(setting, row)
    setting.sync()
    assert setting.client.outstanding == 0


def test_a_map_times_out(setting: Setting) -> None:
    """TimeoutError when the next item is not there at the end; what is there is yielded even then."""
    results = start(setting, range(100), workers=1, chunksize=25).results(0.0)
    row = next_run(setting)
    setting.scheduler.value(row[0], "there")
    rows_of(setting, 75)
    setting.sync()
    assert next(results) == "there"
    with pytest.raises(TimeoutError):
        next(results)


def test_an_item_that_does_not_pickle_fails_at_its_place(setting: Setting) -> None:
    """The items around it are sent; its error travels as an item and comes back in order."""
    items = [1, threading.Lock(), 3]
    results = start(setting, items).results(None)
    for row in rows_of(setting, 3):
        form, (item,) = load_run(row[3])  # type: ignore[arg-type]
        if form is RunForm.PICKLED and item[1] == -1:
            setting.scheduler.result(row[0], ResultKind.ERROR, item[0])
        else:
            setting.scheduler.value(row[0], "fine")
    assert next(results) == "fine"
    with pytest.raises(TypeError, match="cannot pickle"):
        next(results)


def test_a_function_that_does_not_pickle_fails_at_the_first_item(setting: Setting) -> None:
    """map() itself raises nothing, as with ProcessPoolExecutor."""
    lock = threading.Lock()

    def holds_lock(_: Any) -> Any:
        return lock

    call = MapCall(setting.client, 2, holds_lock, ([1, 2],), chunksize=1, buffersize=None)
    call.fill()
    with pytest.raises(TypeError, match="cannot pickle"):
        next(call.results(None))


@pytest.mark.parametrize("buffersize", [1, 4, 100])
def test_a_buffer_bounds_what_is_read_ahead(setting: Setting, buffersize: int) -> None:
    """Exactly so many items are read at first, never more are ahead, and endless iterables work."""
    setting.scheduler.on_submit = lambda row: echo(setting, row)
    read = itertools.count()
    results = start(setting, read, buffersize=buffersize).results(None)
    assert repr(read) == f"count({buffersize})"
    for expected in range(300):
        assert next(results) == expected
        taken = int(repr(read)[6:-1])
        assert taken - (expected + 1) <= buffersize
    results.close()  # type: ignore[attr-defined]


def test_clear_waits_for_maps(setting: Setting) -> None:
    """clear() forces the runs as well, and returns when they are over."""
    results = start(setting, range(10), workers=1, chunksize=5).results(None)
    rows = {row[0]: row for row in rows_of(setting, 10)}
    setting.scheduler.on_cancel = lambda cancel: setting.scheduler.confirm(
        cancel, TaskCancelConfirmType.CANCELED, 0, rows[cancel[0]][1]
    )
    setting.client.clear(PATIENCE_S)
    assert setting.client.outstanding == 0
    with pytest.raises(CancelledError):
        next(results)
