"""Open psycopg connections, and run statements on them."""

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

# Defaults for parameters that are set neither in the connection string nor in the environment. The timeouts detect a
# lost server or network within a minute (tcp_user_timeout is in milliseconds). With client_encoding, psycopg returns
# text from a database without an encoding.
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
        ValueError: The string is malformed, or a password that is not percent-encoded would be parsed as the host, the
            port or the database. Unlike the driver's errors, this error does not quote a part of the password.
    """
    with suppress(psycopg.ProgrammingError, UnicodeEncodeError):
        given = conninfo_to_dict(conninfo)
        is_uri = re.match(r"postgres(ql)?://", conninfo)
        is_unambiguous = not is_uri or re.fullmatch(r"\w+://([^@/?]*@)?[^@?]*(\?.*)?", conninfo, re.DOTALL)
        if is_unambiguous and re.fullmatch("[0-9, ]*", str(given.get("port", ""))):
            return make_conninfo(conninfo, **_missing_from(given))
    raise ValueError(
        "not a connection string of PostgreSQL, such as postgresql://user@host/database: "
        "in a user's name or password, write @ as %40, / as %2F, and % as %25"
    )


def _missing_from(given: Mapping[str, Any]) -> dict[str, str]:
    """Return those of `DEFAULTS` that are set neither in these libpq parameters nor in the environment."""
    variables = {option.keyword.decode(): option.envvar for option in Conninfo.get_defaults()}
    return {
        name: value
        for name, value in DEFAULTS.items()
        if name not in given and (variables[name] or b"").decode() not in os.environ
    }


def parameters_of(connection: psycopg.AsyncConnection[Any]) -> dict[str, str]:
    """Return all libpq parameters of a connection, including the password, to open another one.

    Parameters with libpq's default are included: for a missing one, libpq would read the environment again.
    """
    values = {option.keyword: option.val for option in connection.pgconn.info if option.val is not None}
    return {keyword.decode(): value.decode() for keyword, value in values.items()}


async def open_connection(parameters: Mapping[str, Any]) -> psycopg.AsyncConnection[Row]:
    """Open a connection in autocommit mode with these libpq parameters. Add `DEFAULTS` that are not set."""
    return await psycopg.AsyncConnection.connect(
        **{**_missing_from(parameters), **parameters}, autocommit=True, prepare_threshold=None
    )


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
    [(process_id,)] = await execute(connection, "SELECT pg_backend_pid()", (), deadline)
    return bool(process_id == connection.info.backend_pid)
