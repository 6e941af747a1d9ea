"""Clients that record the statements of a store, in pairs for the two flavours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from support.concurrency import async_until, until

POLL = "SELECT id, state, total_chunks FROM"  # occurs in the poll for waiting readers, and in no other statement
POOL_OPTIONS: dict[str, Any] = {"min_size": 2, "max_size": 2, "kwargs": {"autocommit": True}, "open": False}


@dataclass
class Statement:
    """A statement as a client received it; `rows` is None until the server has answered."""

    sql: str
    params: Sequence[Any]
    rows: list[Any] | None = None


class _Recorder:
    def __init__(self) -> None:
        self.statements: list[Statement] = []

    def record(self, sql: str, params: Sequence[Any]) -> Statement:
        statement = Statement(sql, params)
        self.statements.append(statement)
        return statement

    def polls(self) -> int:
        """Count the polls that were sent."""
        return sum(POLL in statement.sql for statement in self.statements)

    def answers(self, id: str) -> int:
        """Count the answered statements that have a stream's id as their first parameter."""
        return sum(statement.rows is not None and statement.params[0] == id for statement in self.statements)


class AsyncRecordingClient(_Recorder):
    """A client with a psycopg pool. It has the `query` method only, so its stores poll and do not LISTEN."""

    def __init__(self, dsn: str) -> None:
        super().__init__()
        self._pool: AsyncConnectionPool[Any] = AsyncConnectionPool(dsn, **POOL_OPTIONS)

    async def query(self, sql: str, params: Sequence[Any]) -> list[Any]:
        statement = self.record(sql, params)
        async with self._pool.connection() as connection:
            cursor = await psycopg.AsyncRawCursor(connection).execute(sql, params)
            rows = await cursor.fetchall() if cursor.description else []
        statement.rows = rows
        return rows

    async def wait_for_followers(self, id: str, number: int) -> None:
        """Wait until `number` calls follow a stream: each has its first answer, and the store polls again after it."""
        await async_until(lambda: self.answers(id) >= number)
        before = self.polls()
        await async_until(lambda: self.polls() >= before + 2)

    async def __aenter__(self) -> AsyncRecordingClient:
        await self._pool.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._pool.close()


class RecordingClient(_Recorder):
    def __init__(self, dsn: str) -> None:
        super().__init__()
        self._pool: ConnectionPool[Any] = ConnectionPool(dsn, **POOL_OPTIONS)

    def query(self, sql: str, params: Sequence[Any]) -> list[Any]:
        statement = self.record(sql, params)
        with self._pool.connection() as connection:
            cursor = psycopg.RawCursor(connection).execute(sql, params)
            rows = cursor.fetchall() if cursor.description else []
        statement.rows = rows
        return rows

    def wait_for_followers(self, id: str, number: int) -> None:
        until(lambda: self.answers(id) >= number)
        before = self.polls()
        until(lambda: self.polls() >= before + 2)

    def __enter__(self) -> RecordingClient:
        self._pool.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.close()
