"""Calls that come in bursts: the client sends the last of them at once when somebody waits for it, else soon."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import workload
from support import DEADLINE_S, Fifo, Scene, wait_until

from scaler_executor import ScalerExecutor, ScalerFuture
from scaler_executor.runtime import client


@pytest.fixture
def gate(scene: Scene) -> Fifo:
    """Where the call waits that the only worker has."""
    return scene.fifo()


@pytest.fixture
def executor(scene: Scene, gate: Fifo, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScalerExecutor]:
    """An executor whose worker is busy, so that no answer wakes its client."""
    monkeypatch.setattr(client, "BURST_CALLS", 1)
    with ScalerExecutor(max_workers=1) as executor:
        started = scene.fifo()
        blocker = executor.submit(workload.hold, started, gate)
        started.hear()
        wait_until(blocker.running, "the call is not said to run")
        yield executor
        gate.open()


def submit_in_a_nap(executor: ScalerExecutor) -> ScalerFuture[Any]:
    """Return the future of a call that the client has not sent yet."""
    manager = executor._client
    executor.submit(workload.echo, 1)
    wait_until(lambda: manager._wake_at > 1 and manager._asleep, "the client does not nap after a burst")
    return executor.submit(workload.echo, 2)


def result_by_callback(future: ScalerFuture[Any]) -> Any:
    is_called = threading.Event()
    future.add_done_callback(lambda _: is_called.set())
    assert is_called.wait(DEADLINE_S)
    return future.result()


READERS: dict[str, Callable[[ScalerFuture[Any]], Any]] = {
    "result": lambda future: future.result(DEADLINE_S),
    "exception": lambda future: future.exception(DEADLINE_S) or 2,
    "wait": lambda future: concurrent.futures.wait([future], DEADLINE_S).done.pop().result(),
    "as_completed": lambda future: next(concurrent.futures.as_completed([future], DEADLINE_S)).result(),
    "callback": result_by_callback,
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_waits_ends_the_nap(
    executor: ScalerExecutor, gate: Fifo, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """A call whose result somebody waits for, in whatever way, is sent at once."""
    monkeypatch.setattr(client, "NAP_MS", 1_000_000_000)
    future = submit_in_a_nap(executor)
    assert executor._client._batch.tasks, "nothing was held back: this test shows nothing"
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(READERS[reader](future)))
    thread.start()
    wait_until(lambda: not executor._client._batch.tasks, "the call is not sent")
    gate.open()
    thread.join(DEADLINE_S)
    assert results == [2]


def test_a_nap_is_short(executor: ScalerExecutor, gate: Fifo) -> None:
    """A call for which nobody waits is sent by itself."""
    future = submit_in_a_nap(executor)
    wait_until(lambda: not executor._client._batch.tasks, "the call is not sent")
    gate.open()
    assert future.result(DEADLINE_S) == 2


def test_many_calls_end_the_nap(executor: ScalerExecutor, gate: Fifo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough calls are sent without anybody waiting for them."""
    monkeypatch.setattr(client, "NAP_MS", 1_000_000_000)
    futures = [submit_in_a_nap(executor)]
    futures += [executor.submit(workload.echo, 2) for _ in range(client.NAP_CALLS - 1)]
    wait_until(lambda: not executor._client._batch.tasks, "the calls are not sent")
    gate.open()
    assert {future.result(DEADLINE_S) for future in futures} == {2}
