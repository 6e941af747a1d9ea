"""What a store talks to: one protocol, and what turns psycopg's pools and connections into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, PoolClosed

if TYPE_CHECKING:
    from typing_extensions import Self

Row: TypeAlias = tuple[Any, ...]


class AsyncPostgresClient(Protocol):
    """Anything that runs a statement: the adapter for a driver that is not psycopg.

    `query` runs one statement with numbered parameters (`$1` …) and returns its rows, each a sequence or a mapping in
    the order of the select list. It must be safe to call from several tasks or threads at once.

    Two attributes are optional: `connection_errors`, the exceptions after which another attempt may succeed, and
    `joins_transactions`, true if statements take part in a transaction of the caller.
    """

    async def query(self, sql: str, params: Sequence[Any], /) -> Sequence[Any]: ...


AsyncClientLike: TypeAlias = str | AsyncConnectionPool[Any] | psycopg.AsyncConnection[Any] | AsyncPostgresClient
    )


async def _run(connection: psycopg.AsyncConnection[Any], sql: str, params: Sequence[Any]) -> list[Row]:
    cursor = psycopg.AsyncRawCursor(connection, row_factory=tuple_row)  # whatever the caller's connection makes
    await cursor.execute(sql, params, binary=True)
    return await cursor.fetchall() if cursor.description else []


async def _configure(connection: psycopg.AsyncConnection[Any]) -> None:
    # Behind a transaction pooler the next statement may run in another session, which knows nothing of a statement that
    # was prepared in this one. A pooler shows in its process id: the one it gives is its own invention.
    rows = await _run(connection, "SELECT pg_backend_pid()", ())
    if rows != [(connection.info.backend_pid,)]:
        connection.prepare_threshold = None


async def _connect_like(connection: psycopg.AsyncConnection[Any]) -> psycopg.AsyncConnection[Row]:
    parameters: dict[str, Any] = connection.info.get_parameters()
    # So that a network that has gone away is noticed.
    parameters.setdefault("connect_timeout", "10")
    parameters.setdefault("keepalives_idle", "30")
    return await psycopg.AsyncConnection.connect(
        **parameters,
        password=connection.info.password,
        autocommit=True,
        prepare_threshold=None,
        row_factory=tuple_row,
        cursor_factory=psycopg.AsyncRawCursor,
    )
