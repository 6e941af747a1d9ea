"""Our statements run by psycopg without a store, each in its fastest form."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import psycopg
from psycopg import generators
from psycopg.pq.abc import PGconn, PGresult

from .measure import TOKEN
from .tables import POOL_SIZE, TTL, Tables

Append: TypeAlias = Callable[[str, str], object]
AsyncAppend: TypeAlias = Callable[[str, str], Awaitable[object]]

NAME = b"benchmark"  # of the prepared statement
BINARY = 1


def prepared_append(connection: psycopg.Connection[Any], tables: Tables, stream: str) -> Append:
    """Return the append of a token by a statement that is prepared once, without a cursor and with encoded parameters.

    It ignores its arguments.
    """
    pgconn, params = prepare(connection.pgconn, tables.sql.append), encoded(stream)

    def append(*_: str) -> int:
        with connection.lock:
            return connection.wait(run_prepared(pgconn, params))

    return append


def async_prepared_append(connection: psycopg.AsyncConnection[Any], tables: Tables, stream: str) -> AsyncAppend:
    """Return the same in asyncio."""
    pgconn, params = prepare(connection.pgconn, tables.sql.append), encoded(stream)

    async def append(*_: str) -> int:
        async with connection.lock:
            return await connection.wait(run_prepared(pgconn, params))

    return append


def encoded(stream: str) -> list[bytes | None]:
    return [stream.encode(), TOKEN.encode(), None, str(TTL).encode()]


def prepare(pgconn: PGconn, statement: str) -> PGconn:
    result = pgconn.prepare(NAME, statement.encode())
    if result.status != psycopg.pq.ExecStatus.COMMAND_OK:
        raise psycopg.errors.error_from_result(result)
    return pgconn


def run_prepared(pgconn: PGconn, params: Sequence[bytes | None]) -> Generator[Any, Any, int]:
    """Run the prepared append with psycopg's own generators. Return the sequence number."""
    pgconn.send_query_prepared(NAME, params, None, BINARY)
    results: list[PGresult] = yield from generators.execute(pgconn)
    [result] = results
    if result.status != psycopg.pq.ExecStatus.TUPLES_OK:
        raise psycopg.errors.error_from_result(result)
    return int.from_bytes(result.get_value(0, 0) or b"", "big")


def cursor_append(connection: psycopg.Connection[Any], tables: Tables) -> Append:
    """Return our append by one raw cursor."""
    statement, cursor = tables.sql.append, connection.cursor(binary=True)

    def append(stream: str, chunk: str) -> None:
        cursor.execute(statement, [stream, chunk, None, TTL], prepare=True).fetchone()

    return append


@contextmanager
def pooled_append(tables: Tables) -> Iterator[Append]:
    """Yield our append by a raw cursor on a connection of a pool.

    All connections are open and have prepared the statement. `getconn` and `putconn` take less processor time than
    `pool.connection()`.
    """
    statement = tables.sql.append
    with tables.pool() as pool:

        def append(stream: str, chunk: str) -> None:
            connection = pool.getconn()
            try:
                connection.execute(statement, [stream, chunk, None, TTL], prepare=True, binary=True).fetchone()
            finally:
                pool.putconn(connection)

        pool.wait()
        connections = [pool.getconn() for _ in range(POOL_SIZE)]
        for connection in connections:
            connection.execute(statement, ["", "", None, TTL], prepare=True, binary=True)  # no such stream
            pool.putconn(connection)
        yield append


@asynccontextmanager
async def async_pooled_append(tables: Tables) -> AsyncIterator[AsyncAppend]:
    """Yield the same in asyncio."""
    statement = tables.sql.append
    async with tables.async_pool() as pool:

        async def append(stream: str, chunk: str) -> None:
            connection = await pool.getconn()
            try:
                params = [stream, chunk, None, TTL]
                cursor = await connection.execute(statement, params, prepare=True, binary=True)
                await cursor.fetchone()
            finally:
                await pool.putconn(connection)

        await pool.wait()
        connections = [await pool.getconn() for _ in range(POOL_SIZE)]
        for connection in connections:
            await connection.execute(statement, ["", "", None, TTL], prepare=True, binary=True)
            await pool.putconn(connection)
        yield append
