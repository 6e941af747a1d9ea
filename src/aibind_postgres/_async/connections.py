"""Open psycopg connections, and run statements on them."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from .._conninfo import missing_defaults
from .._statement_runner import Row, run_statement
from .._workarounds import can_cancel_in_time

SESSION_CHECKS = 8  # comparisons of the sessions of two connections; other clients may hide a shared one from some
CANCEL_TIMEOUT = 1.0  # seconds within which the server must accept a cancel request


def parameters_of(connection: psycopg.AsyncConnection[Any]) -> dict[str, str]:
    """Return all libpq parameters of a connection, including the password, to open another one.

    Parameters with libpq's default are included: for a missing one, libpq would read the environment again.
    """
    values = {option.keyword: option.val for option in connection.pgconn.info if option.val is not None}
    return {keyword.decode(): value.decode() for keyword, value in values.items()}


async def open_connection(
    parameters: Mapping[str, Any],
    conninfo: str = "",
    connection_class: type[psycopg.AsyncConnection[Any]] = psycopg.AsyncConnection,
) -> psycopg.AsyncConnection[Row]:
    """Open a connection in autocommit mode. Add our defaults for parameters that are not set.

    Args:
        parameters: Keyword arguments of `connect`, such as libpq's parameters.
        conninfo: A connection string; empty by default.
        connection_class: The class whose `connect` is called; psycopg's by default.
    """
    missing = missing_defaults({**conninfo_to_dict(conninfo), **parameters})
    options = {**missing, **parameters, "autocommit": True, "prepare_threshold": None}
    return await connection_class.connect(conninfo, **options)


async def execute(
    connection: psycopg.AsyncConnection[Any],
    sql: str,
    params: Sequence[Any] = (),
    deadline: float = math.inf,
    *,
    prepare: bool = False,
) -> Sequence[Row]:
    """Run one statement on a connection and return its rows, independently of the connection's factories.

    Args:
        connection: The connection.
        sql: The statement, with numbered parameters.
        params: The values of the parameters; none by default.
        deadline: The value of `monotonic()` at which to stop waiting; no limit by default.
        prepare: As for `run_statement`; False by default.

    Raises:
        Exception: The errors of `run_statement`.
    """
    async with connection.lock:
        rows: Sequence[Row] = await connection.wait(run_statement(connection, sql, params, deadline, prepare=prepare))
        return rows


async def cancel_and_close(connection: psycopg.AsyncConnection[Any]) -> None:
    """Cancel an unanswered statement if the server can be reached, and close its connection.

    Without the cancel request, a statement that waits for a lock would continue to occupy a connection of the server.
    """
    try:
        if can_cancel_in_time():
            with suppress(psycopg.Error):
                await connection.cancel_safe(timeout=CANCEL_TIMEOUT)
    finally:
        connection.pgconn.finish()


async def is_direct(connection: psycopg.AsyncConnection[Any], deadline: float) -> bool:
    """Return True if a connection does not go through a pooler. Poolers report a fake backend PID."""
    return await server_pid(connection, deadline) == connection.info.backend_pid


async def server_pid(connection: psycopg.AsyncConnection[Any], deadline: float) -> int:
    """Return the PID of the server process that runs the statements of a connection, also through a pooler."""
    [(pid,)] = await execute(connection, "SELECT pg_backend_pid()", (), deadline)
    return int(pid)


async def share_session(
    connection: psycopg.AsyncConnection[Any], other: psycopg.AsyncConnection[Any], timeout: float
) -> bool:
    """Return True if a pooler runs the statements of both connections in one session, or in changing ones.

    Args:
        connection: A connection.
        other: Another connection of the same client.
        timeout: Seconds to wait for each answer: a busy pooler may have no session for the statement.
    """
    pid = await server_pid(connection, monotonic() + timeout)
    for _ in range(SESSION_CHECKS):
        if await server_pid(connection, monotonic() + timeout) != pid:
            return True
        if await server_pid(other, monotonic() + timeout) == pid:
            return True
    return False


def shut_down_socket(connection: psycopg.AsyncConnection[Any]) -> None:
    """Wake a thread that waits for a connection. Closing the connection meanwhile would be unsafe."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)
