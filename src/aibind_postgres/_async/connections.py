"""Open a psycopg connection, and run a statement on it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo
from psycopg.rows import tuple_row

from .._workarounds import can_cancel_in_time

Row: TypeAlias = tuple[Any, ...]

# Defaults for parameters set neither in the connection string nor in the environment. They detect a lost server or
# network within a minute (tcp_user_timeout is in milliseconds), and return text from a database without an encoding.
DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "tcp_user_timeout": "10000",
    "client_encoding": "UTF8",
}

CANCEL_TIMEOUT = 1.0  # seconds within which the server must accept a cancel request


def with_defaults(conninfo: str) -> str:
    """Add `DEFAULTS` for parameters that are not set.

    Raises:
        ValueError: The string is malformed, or the driver would take a part of the password for the host, the port or
            the database, since the password is not percent-encoded. The driver's errors would quote that part; this
            error quotes nothing.
    """
    with suppress(psycopg.ProgrammingError, UnicodeEncodeError):
        given = conninfo_to_dict(conninfo)
        is_uri = re.match(r"postgres(ql)?://", conninfo)
        is_clear = not is_uri or re.fullmatch(r"\w+://([^@/?]*@)?[^@?]*(\?.*)?", conninfo, re.DOTALL)
        if is_clear and re.fullmatch("[0-9, ]*", str(given.get("port", ""))):
            return make_conninfo(conninfo, **_missing_from(given))
    raise ValueError(
        "not a connection string of PostgreSQL, such as postgresql://user@host/database: "
        "in a user's name or password, write @ as %40, / as %2F, and % as %25"
    )


def _missing_from(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the `DEFAULTS` set neither in these parameters of libpq nor in the environment."""
    variables = {option.keyword.decode(): option.envvar for option in Conninfo.get_defaults()}
    return {
        name: value
        for name, value in DEFAULTS.items()
        if name not in given and (variables[name] or b"").decode() not in os.environ
    }


def parameters_of(connection: psycopg.AsyncConnection[Any]) -> dict[str, str]:
    """Return the parameters that open another connection like this one, with the password."""
    return {**connection.info.get_parameters(), "password": connection.info.password}


async def open_connection(parameters: Mapping[str, Any]) -> psycopg.AsyncConnection[Row]:
    """Open a connection in autocommit mode, with these parameters of libpq and `DEFAULTS` for the others."""
    return await psycopg.AsyncConnection.connect(
        **{**_missing_from(parameters), **parameters}, autocommit=True, prepare_threshold=None
    )


class UnansweredError(psycopg.OperationalError):
    """The server did not answer a statement in time: it may or may not have taken effect."""


class AsyncTimedCursor(psycopg.AsyncRawCursor[Row]):
    """Stops waiting for the answer to a statement at `deadline`, a value of `monotonic()`.

    TCP does not detect a peer that accepts data but never replies.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], deadline: float = math.inf) -> None:
        super().__init__(connection, row_factory=tuple_row)
        self._deadline = deadline

    def _execute_gen(self, *args: Any, **options: Any) -> Generator[Any, Any, None]:
        steps = super()._execute_gen(*args, **options)
        return steps if self._deadline == math.inf else self._in_time(steps)

    def _in_time(self, steps: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        if monotonic() >= self._deadline:
            raise psycopg.OperationalError("the connection was not free within the timeout: the statement was not sent")
        # Psycopg resumes this generator several times a second, also if nothing has arrived.
        ready = None
        with suppress(StopIteration):
            while True:
                wanted = steps.send(ready)
                if monotonic() >= self._deadline:
                    raise UnansweredError(
                        "the server has not answered within the timeout: the statement may or may not have taken effect"
                    )
                ready = yield wanted
                if ready is None:  # psycopg starts over after an interruption, with a limit of its own
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
        params: Their values.
        deadline: The value of `monotonic()` at which to stop waiting.
        prepare: As in psycopg: None prepares a repeated statement, False never does.

    Raises:
        UnansweredError: The deadline has passed. Abandon the connection: the answer may still arrive.
    """
    cursor = AsyncTimedCursor(connection, deadline)
    await cursor.execute(sql, params, binary=True, prepare=prepare)
    # Reading `cursor.description` would cost as much as reading the rows.
    return await cursor.fetchall() if cursor.pgresult is not None and cursor.pgresult.nfields else []


async def abandon(connection: psycopg.AsyncConnection[Any]) -> None:
    """Close a connection on which a statement was not answered, and cancel the statement if the server can be reached.

    A statement that waits for a lock would otherwise occupy one of the server's connections.
    """
    try:
        if can_cancel_in_time():
            with suppress(psycopg.Error):
                await connection.cancel_safe(timeout=CANCEL_TIMEOUT)
    finally:
        connection.pgconn.finish()


async def is_direct(connection: psycopg.AsyncConnection[Any], deadline: float) -> bool:
    """Return True if a connection leads to one server process. Poolers report a fake backend PID."""
    [(process_id,)] = await execute(connection, "SELECT pg_backend_pid()", (), deadline)
    return bool(process_id == connection.info.backend_pid)
