"""One connection of psycopg: how it is opened, and how a statement runs on it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, TypeAlias

import psycopg
from psycopg import capabilities
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo
from psycopg.rows import tuple_row

Row: TypeAlias = tuple[Any, ...]

# What a connection of our own has where neither the caller's connection string nor the environment says anything. A
# server or a network that has gone away is noticed within a minute (tcp_user_timeout is in milliseconds), and text is
# text, also in a database without an encoding.
DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "tcp_user_timeout": "10000",
    "client_encoding": "UTF8",
}

CANCEL_TIMEOUT = 1.0  # seconds in which the server must take the request to end a statement


def with_defaults(conninfo: str) -> str:
    """Return a connection string with what is ours where it says nothing; raise `ValueError` for what is none.

    That does not repeat it, as the driver's errors do: those for its syntax, and, when it connects, those for a host, a
    port or a database. A password that is not percent-encoded may be in each.
    """
    with suppress(psycopg.ProgrammingError, UnicodeEncodeError):
        given = conninfo_to_dict(conninfo)
        is_uri = re.match(r"postgres(ql)?://", conninfo)
        is_clear = not is_uri or re.fullmatch(r"\w+://([^@/?]*@)?[^@?]*(\?.*)?", conninfo, re.DOTALL)
        if is_clear and re.fullmatch("[0-9, ]*", str(given.get("port", ""))):
            return make_conninfo(conninfo, **_missing_from(given))
    raise ValueError(
        "not a connection string of PostgreSQL, such as postgresql://user@host/database: "
        "in a user's name or password, @ must be written as %40 there, / as %2F, and % as %25"
    )


def _missing_from(given: Mapping[str, Any]) -> dict[str, str]:
    """Return those of our defaults for which neither these parameters of libpq nor its environment have a value."""
    variables = {option.keyword.decode(): option.envvar for option in Conninfo.get_defaults()}
    return {
        name: value
        for name, value in DEFAULTS.items()
        if name not in given and (variables[name] or b"").decode() not in os.environ
    }


def parameters_of(connection: psycopg.AsyncConnection[Any]) -> dict[str, str]:
    """Return what opens another connection like this one."""
    return {**connection.info.get_parameters(), "password": connection.info.password}


async def open_connection(parameters: Mapping[str, Any]) -> psycopg.AsyncConnection[Row]:
    """Open a connection of our own kind, in autocommit mode, with these parameters of libpq."""
    return await psycopg.AsyncConnection.connect(
        **{**_missing_from(parameters), **parameters}, autocommit=True, prepare_threshold=None
    )


class UnansweredError(psycopg.OperationalError):
    """A statement was not answered in time: whether it has taken effect is not known."""


class AsyncTimedCursor(psycopg.AsyncRawCursor[Row]):
    """Gives up waiting for a statement that has not been answered by a `deadline` of the monotonic clock.

    Of a peer that takes what is sent and says nothing, nobody else takes notice: TCP holds it for alive.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], deadline: float = math.inf) -> None:
        super().__init__(connection, row_factory=tuple_row)
        self._deadline = deadline

    def _execute_gen(self, *args: Any, **options: Any) -> Generator[Any, Any, None]:
        steps = super()._execute_gen(*args, **options)
        return steps if self._deadline == math.inf else self._in_time(steps)

    def _in_time(self, steps: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        if monotonic() >= self._deadline:
            raise psycopg.OperationalError("the connection was not free in time: nothing was sent")
        # Psycopg goes on with what it waits for several times a second, also if nothing has come.
        ready = None
        with suppress(StopIteration):
            while True:
                wanted = steps.send(ready)
                if monotonic() >= self._deadline:
                    raise UnansweredError("the server has not answered in time")
                ready = yield wanted
                if ready is None:  # begun again: an interruption, for which psycopg has a limit of its own
                    self._deadline = math.inf


async def execute(
    connection: psycopg.AsyncConnection[Any],
    sql: str,
    params: Sequence[Any] = (),
    deadline: float = math.inf,
    *,
    prepare: bool | None = False,
) -> Sequence[Row]:
    """Run one statement on a connection, whatever factories that has, and return its rows.

    After `UnansweredError` that connection is of no more use: the answer may still come.
    """
    cursor = AsyncTimedCursor(connection, deadline)
    await cursor.execute(sql, params, binary=True, prepare=prepare)
    # Not by the description, which costs as much as the rows.
    return await cursor.fetchall() if cursor.pgresult is not None and cursor.pgresult.nfields else []


async def abandon(connection: psycopg.AsyncConnection[Any]) -> None:
    """Close a connection on which a statement was not answered, and have the server end that, if it can be reached.

    Else statements that wait there, for a lock perhaps, would take up all the connections that it has.
    """
    try:
        if capabilities.has_cancel_safe():  # what older versions of libpq have instead may wait for ever itself
            with suppress(psycopg.Error):
                await connection.cancel_safe(timeout=CANCEL_TIMEOUT)
    finally:
        connection.pgconn.finish()


async def is_direct(connection: psycopg.AsyncConnection[Any], deadline: float) -> bool:
    """Say whether a connection leads to one server process: the process id that a pooler gives is its own invention."""
    [(process_id,)] = await execute(connection, "SELECT pg_backend_pid()", (), deadline)
    return bool(process_id == connection.info.backend_pid)


def has_ended(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Say whether the other side has closed an idle connection; this costs no round trip."""
    try:
        connection.pgconn.consume_input()  # a last message
        connection.pgconn.consume_input()  # and what comes after it
    except psycopg.OperationalError:
        return True
    return False
