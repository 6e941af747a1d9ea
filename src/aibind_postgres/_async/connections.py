"""One connection of psycopg: how it is opened, and how a statement runs on it."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import tuple_row

Row: TypeAlias = tuple[Any, ...]

# What a connection of our own has where the caller's connection string says nothing. A server or a network that has
# gone away is noticed within seconds (tcp_user_timeout is in milliseconds), and text is text, also in a database
# without an encoding.
DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "tcp_user_timeout": "10000",
    "client_encoding": "UTF8",
}


def with_defaults(conninfo: str) -> str:
    """Return a connection string with what is ours where it says nothing; raise `ValueError` for what is none.

    That does not repeat it, as the driver's errors do: those for its syntax, and, when it connects, those for a host or
    a port. A password that is not percent-encoded may be in each.
    """
    with suppress(psycopg.ProgrammingError, UnicodeEncodeError):
        given = conninfo_to_dict(conninfo)
        # The folder of a socket may have any character, and the name of an abstract one begins with @.
        hosts = [host for host in str(given.get("host", "")).split(",") if not host.startswith("/")]
        if not any("@" in host[1:] for host in hosts) and re.fullmatch("[0-9, ]*", str(given.get("port", ""))):
            return make_conninfo(conninfo, **{name: value for name, value in DEFAULTS.items() if name not in given})
    raise ValueError(
        "not a connection string of PostgreSQL, such as postgresql://user@host/database: "
        "in a user's name or password, @ must be written as %40 there, / as %2F, and % as %25"
    )


def parameters_of(connection: psycopg.AsyncConnection[Any]) -> dict[str, str]:
    """Return what opens another connection like this one."""
    return {**connection.info.get_parameters(), "password": connection.info.password}


async def open_connection(parameters: Mapping[str, Any]) -> psycopg.AsyncConnection[Row]:
    """Open a connection of our own kind, in autocommit mode, with these parameters of libpq."""
    return await psycopg.AsyncConnection.connect(
        **{**DEFAULTS, **parameters},
        autocommit=True,
        prepare_threshold=None,
    )


class UnansweredError(psycopg.OperationalError):
    """A statement was given up: whether it has taken effect is not known."""


class AsyncTimedCursor(psycopg.AsyncRawCursor[Row]):
    """Gives a statement up that has not been answered by a `deadline` of the monotonic clock.

    Of a peer that takes what is sent and says nothing, nobody else takes notice: TCP holds it for alive.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], deadline: float = math.inf) -> None:
        super().__init__(connection, row_factory=tuple_row)
        self._deadline = deadline

    def _execute_gen(self, *args: Any, **options: Any) -> Generator[Any, Any, None]:
        steps = super()._execute_gen(*args, **options)
        return steps if self._deadline == math.inf else self._in_time(steps)

    def _in_time(self, steps: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        # Psycopg goes on with what it waits for several times a second, also if nothing has come.
        ready = None
        with suppress(StopIteration):
            while True:
                wanted = steps.send(ready)
                if monotonic() >= self._deadline:
                    raise UnansweredError("the server has not answered in time")
                ready = yield wanted


async def execute(
    connection: psycopg.AsyncConnection[Any],
    sql: str,
    params: Sequence[Any] = (),
    deadline: float = math.inf,
    *,
    prepare: bool | None = False,
) -> Sequence[Row]:
    """Run one statement on a connection, whatever factories that has, and return its rows."""
    cursor = AsyncTimedCursor(connection, deadline)
    try:
        await cursor.execute(sql, params, binary=True, prepare=prepare)
    except UnansweredError:
        connection.pgconn.finish()  # what is on its way would be taken for the answer to the next statement
        raise
    # Not by the description, which costs as much as the rows.
    return await cursor.fetchall() if cursor.pgresult is not None and cursor.pgresult.nfields else []


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
