"""What calls print, on its way through the scheduler: each row to the client whose call it is.

What a nested call prints goes to its session, which keeps it with the call's future, and without a call to the
session's account, which shows it. This module knows whose a row is and whether that client is behind. It keeps nothing
but the number of lines that are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.messages import CLIENT_ID_SHIFT, Output, OutputRow
from scaler_executor.protocol.printed import LOG, MAX_LOST, STDERR, STDOUT, count_lines
from scaler_executor.protocol.scheduler_events import Send
from scaler_executor.protocol.scheduler_output import to_client
from scaler_executor.protocol.scheduler_rows import Agent, Client, Session, Task


def forward(agent: Agent, message: Output, tasks: Mapping[int, Task], sessions: Iterable[Session]) -> list[Send]:
    """Return what to send of what an agent says was printed.

    Only of the clients that have, or had, tasks at this agent, and of their calls only of those that it has: what is
    said of others is shown without a call. A client to which too much waits to be sent gets none of it.

    Raises:
        RemoteProtocolError: This is not what an agent says.
    """
    rows: dict[Client, list[OutputRow]] = {}
    clients = {client.client_id: client for client in agent.seats}
    clients |= {session.client_id: session for session in sessions if session.account in agent.seats}
    for task_id, stream, lost, data in message.rows:
        if stream not in (STDOUT, STDERR, LOG) or not 0 <= lost <= MAX_LOST:
            raise RemoteProtocolError(f"{lost} lines dropped of stream {stream}")
        task = tasks.get(task_id)
        if task is not None and task.agent is not agent:
            task = None
        client = task.client if task is not None else clients.get(task_id >> CLIENT_ID_SHIFT)
        if client is None:
            continue
        account = client.account
        if client is not account:
            if task is not None:
                _add(rows, client, (task.no, stream, lost, data))
            task = None
        _add(rows, account, (task.no if task is not None else 0, stream, lost, data))
    return [to_client(client, Output(own)) for client, own in rows.items()]


def _add(rows: dict[Client, list[OutputRow]], client: Client, row: OutputRow) -> None:
    """Have a client told, or have it told later how much it has missed."""
    no, stream, lost, data = row
    if client.gone:
        return
    if client.is_congested:
        lost += 1 if stream == LOG else count_lines(data)
        client.lost_lines = min(MAX_LOST, client.lost_lines + lost)
        return
    rows.setdefault(client, []).append((no, stream, lost + client.lost_lines, data))
    client.lost_lines = 0
