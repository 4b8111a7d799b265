"""What calls print, on its way through the scheduler: each row to the client whose call it is.

It knows whose a row is and whether that client is behind. It keeps nothing but the number of lines that are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from scaler_executor.protocol.codec import RemoteProtocolError
from scaler_executor.protocol.messages import CLIENT_ID_SHIFT, Output, OutputRow
from scaler_executor.protocol.printed import LOG, STDERR, STDOUT, count_lines
from scaler_executor.protocol.scheduler_events import Send
from scaler_executor.protocol.scheduler_rows import Agent, Client, Task

#: An agent counts lines up to here.
MAX_LOST: Final = 1 << 48


def forward(agent: Agent, message: Output, tasks: Mapping[int, Task]) -> list[Send]:
    """Return what to send of what an agent says was printed.

    Only of the clients that have, or had, tasks at this agent, and of their calls only of those that it has: what is
    said of others is shown without a call. A client to which too much waits to be sent gets none of it.

    Raises:
        RemoteProtocolError: This is not what an agent says.
    """
    rows: dict[Client, list[OutputRow]] = {}
    clients = {client.client_id: client for client in agent.seats}
    for task_id, stream, lost, data in message.rows:
        if stream not in (STDOUT, STDERR, LOG) or not 0 <= lost <= MAX_LOST:
            raise RemoteProtocolError(f"{lost} lines dropped of stream {stream}")
        client = clients.get(task_id >> CLIENT_ID_SHIFT)
        if client is None or client.gone:
            continue
        if client.is_congested:
            client.lost_lines += min(MAX_LOST, lost + (1 if stream == LOG else count_lines(data)))
            continue
        task = tasks.get(task_id)
        no = task.no if task is not None and task.agent is agent else 0
        rows.setdefault(client, []).append((no, stream, lost + client.lost_lines, data))
        client.lost_lines = 0
    return [Send(client.peer, Output(own)) for client, own in rows.items()]
