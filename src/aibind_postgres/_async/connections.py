"""Open psycopg connections, and run statements on them."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row

from .._conninfo import missing_defaults
from .._workarounds import can_cancel_in_time
from ..errors import AibindError

Row: TypeAlias = tuple[Any, ...]

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


class UnansweredError(psycopg.OperationalError):
    """The server did not answer a statement within the timeout. The statement may or may not have taken effect."""


class AsyncTimedCursor(psycopg.AsyncRawCursor[Row]):
    """A cursor that stops waiting for the answer to a statement at `deadline`, a value of `monotonic()`.

    TCP does not detect a peer that accepts data but never replies.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], deadline: float = math.inf) -> None:
        super().__init__(connection, row_factory=tuple_row)
        self._deadline = deadline

    def _execute_gen(self, *args: Any, **options: Any) -> Generator[Any, Any, None]:
        if self._conn.pgconn.pipeline_status:  # the lock excludes the pipeline of another `executemany`
            raise AibindError(
                "the connection is in pipeline mode, in which a statement has no result yet: use the store outside of "
                "the pipeline, or give it a connection of its own"
            )
        steps = super()._execute_gen(*args, **options)
        return steps if self._deadline == math.inf else self._with_deadline(steps)

    def _with_deadline(self, steps: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        if monotonic() >= self._deadline:
            raise psycopg.OperationalError("the connection was busy for the whole timeout: the statement was not sent")
        # Psycopg resumes this generator several times a second, even if nothing has arrived.
        ready = None
        with suppress(StopIteration):
            while True:
                wanted = steps.send(ready)
                if monotonic() >= self._deadline:
                    raise UnansweredError(
                        "the server has not answered within the timeout: the statement may or may not have taken effect"
                    )
                ready = yield wanted
                if ready is None:  # after an interruption, psycopg waits again with its own timeout
                    self._deadline = math.inf


async def execute(
    connection: psycopg.AsyncConnection[Any],
    sql: str,
    params: Sequence[Any] = (),
    deadline: float = math.inf,
    *,
    prepare: bool | None = False,
) -> Sequence[Row]:
    """Run one statement on a connection and return its rows, independently of the connection's factories.

    Args:
        connection: The connection.
        sql: The statement, with numbered parameters.
        params: The values of the parameters; none by default.
        deadline: The value of `monotonic()` at which to stop waiting; no limit by default.
        prepare: As in psycopg: None prepares repeated statements, False (the default) never prepares.

    Raises:
        UnansweredError: The deadline has passed. Close the connection, since the answer may still arrive.
    """
    cursor = AsyncTimedCursor(connection, deadline)
    await cursor.execute(sql, params, binary=True, prepare=prepare)
    # Reading `cursor.description` would cost as much as reading the rows.
    return await cursor.fetchall() if cursor.pgresult is not None and cursor.pgresult.nfields else []


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
