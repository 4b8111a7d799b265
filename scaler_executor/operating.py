"""What `scaler-executor status` and `cancel` do: ask a served cluster, print what it says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any, Final, TypeVar

import msgspec

from scaler_executor.defaults import ADDRESS_VARIABLE
from scaler_executor.errors import AuthenticationError
from scaler_executor.protocol.codec import Decoder
from scaler_executor.protocol.messages import (
    Bye,
    Hello,
    Message,
    OperatorAnswer,
    OperatorCancel,
    Refused,
    StatusAsk,
    StatusReport,
    ToObserverMessage,
    Welcome,
)
from scaler_executor.runtime.security import ConfigurationError, Connection, default_directory, resolve

#: So long the cluster may take to answer.
TIMEOUT_S: Final = 10.0
#: After so many attempts to connect nothing is hoped for: where nobody listens that is half a second.
MAX_FAILURES: Final = 3

M = TypeVar("M", bound=Message)


def run(command: Callable[[], int], name: str) -> int:
    """Run one of the commands below; print what goes wrong in a line, and return the exit code."""
    try:
        return command()
    except ConfigurationError as error:
        print(f"scaler-executor {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nobody reads any more
        return 1
    except ConnectionError as error:
        print(f"scaler-executor {name}: {error}", file=sys.stderr)
        return 1


def status(address: str | None, credentials: str | None = None, *, as_json: bool) -> int:
    """Print what a cluster is doing.

    Args:
        address: See `security.resolve`; None: SCALER_EXECUTOR_ADDRESS, or the cluster that is served here.
        credentials: See `security.resolve`.
        as_json: For programs.

    Raises:
        ConfigurationError: The connection file.
        ConnectionError: The cluster does not answer, or not to us.
    """
    with _Observer(_find(address, credentials)) as observer:
        report = observer.ask(StatusAsk(), StatusReport)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(msgspec.structs.asdict(report))).decode())
    else:
        print("\n".join(_lines(report)))
    return 0


def cancel(address: str | None, credentials: str | None, tasks: list[tuple[int, int]]) -> int:
    """Stop calls, (client_id, no), and wait until they have stopped. Return the exit code: 1 if some were not found, or
    run on.

    Args:
        address, credentials: As for `status`.
        tasks: Without repetitions.

    Raises:
        ConfigurationError, ConnectionError: As `status`.
    """
    with _Observer(_find(address, credentials)) as observer:
        stopping = set(observer.ask(OperatorCancel(tasks), OperatorAnswer).tasks)
        for task in tasks:
            if task not in stopping:
                print(f"{task[0]}.{task[1]}: not found")
        deadline = monotonic() + TIMEOUT_S
        left = stopping
        while left and monotonic() < deadline:
            calls = {(call.client_id, call.no) for call in observer.ask(StatusAsk(), StatusReport).calls}
            left = left & calls
            if left:
                observer.wait(0.05)
    for task in tasks:
        if task in stopping:
            print(f"{task[0]}.{task[1]}: {'runs on' if task in left else 'stopped'}")
    return int(len(stopping) < len(tasks) or bool(left))


class _Observer:
    """A connection to a scheduler, for somebody who asks and waits."""

    def __init__(self, connection: Connection) -> None:
        from scaler_executor.runtime.dialer import Dialer
        from scaler_executor.runtime.loop import Loop

        self._address = connection.address
        self._loop = Loop()
        self._decode = Decoder[Any](ToObserverMessage).decode
        self._answer: Any = None
        self._failure: Exception | None = None
        self._reason = "nobody answers there"
        self._failures = 0
        self._dialer = Dialer(
            self._loop,
            connection.address,
            connection.keys,
            connection.server_key,
            self._on_message,
            self._on_lost,
            self._on_failed,
            lease_s=TIMEOUT_S,
        )

    def __enter__(self) -> _Observer:
        self.ask(Hello("observer"), Welcome)
        return self

    def __exit__(self, *exception: object) -> None:
        self._dialer.send(Bye())
        self._dialer.close()

    def ask(self, question: Message, kind: type[M]) -> M:
        """Send a question and return the answer.

        Raises:
            ConnectionError: There is none.
        """
        self._answer = None
        self._dialer.send(question)
        deadline = monotonic() + TIMEOUT_S
        while not isinstance(self._answer, kind):
            if self._failure is not None:
                raise self._failure
            if monotonic() > deadline:
                raise ConnectionError(f"no answer from {self._address} within {TIMEOUT_S:g} s: {self._reason}")
            self.wait(min(1.0, deadline - monotonic()))
        return self._answer

    def wait(self, seconds: float) -> None:
        """Let things happen for so long, or until an answer is there."""
        until = monotonic() + seconds
        self._loop.run(
            lambda: min(until, self._dialer.next_deadline() or until),
            lambda: self._on_deadline(until),
            self._work,
            lambda: False,
        )

    def _work(self) -> None:
        while self._dialer.drain():
            pass
        if self._answer is not None or self._failure is not None:
            self._loop.stop()

    def _on_deadline(self, until: float) -> None:
        self._dialer.on_deadline()
        if until <= monotonic():
            self._loop.stop()

    def _on_message(self, header: Any, frames: list[Any]) -> None:
        self._answer = self._decode(header, frames)
        if isinstance(self._answer, Refused):
            self._failure = ConnectionError(f"the scheduler at {self._address} refuses: {self._answer.reason}")

    def _on_lost(self, reason: str) -> None:
        reason = reason if self._answer is not None else self._reason
        self._failure = ConnectionError(f"no connection to the scheduler at {self._address}: {reason}")

    def _on_failed(self, reason: str, is_refusal: bool) -> None:
        self._reason = reason
        self._failures += 1
        if is_refusal:
            self._failure = AuthenticationError(f"the scheduler at {self._address} refuses: {reason}")
        elif self._failures >= MAX_FAILURES:
            self._failure = ConnectionError(f"no connection to the scheduler at {self._address}: {reason}")


def _find(address: str | None, credentials: str | None) -> Connection:
    address = address or os.environ.get(ADDRESS_VARIABLE)
    if address:
        return resolve(address, credentials)
    if credentials is not None:
        raise ConfigurationError("--credentials goes with an address")
    path = default_directory() / "connection.json"
    if not path.exists():
        raise ConfigurationError(f"no cluster is served here ({path} is missing); name a connection file")
    return resolve(path)


def _lines(report: StatusReport) -> list[str]:
    """Return the report for people."""
    workers = sum(agent.workers for agent in report.agents)
    lines = [
        f"{_count(len(report.agents), 'machine')}, {_count(workers, 'worker')},"
        f" {_count(len(report.clients), 'client')}; Python {report.python},"
        f" protocol {report.version}",
        f"{report.running} running, {report.queued} queued, {report.done} done, {report.rate:.0f} a second",
    ]
    if report.agents:
        lines += ["", *_table(["machine", "workers", "calls", "here for"], [_agent_row(a) for a in report.agents])]
    if report.clients:
        rows = [[str(c.client_id), c.name, str(c.running), str(c.queued), _age(c.age_s)] for c in report.clients]
        lines += ["", *_table(["client", "name", "running", "queued", "here for"], rows)]
    if report.calls:
        rows = [
            [f"{c.client_id}.{c.no}", c.function or "(not named)", str(c.items), c.agent, _age(c.age_s)]
            for c in report.calls
        ]
        lines += ["", *_table(["running", "function", "items", "machine", "for"], rows)]
        if report.running > len(report.calls):
            lines.append(f"... and {report.running - len(report.calls)} more")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _agent_row(agent: Any) -> list[str]:
    return [agent.name, str(agent.workers), str(agent.held), _age(agent.age_s)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rows = [head, *([_printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _printable(text: str) -> str:
    """Return what somebody else has chosen without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _age(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
