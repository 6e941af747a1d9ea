"""Clients that record the statements of a store, in pairs for the two flavours."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from types import TracebackType
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from aibind_postgres._async.psycopg_clients import AsyncConnectionClient, AsyncPoolClient
from aibind_postgres._stream_tail import SHARED_PAGE_CHUNKS
from aibind_postgres._sync.psycopg_clients import ConnectionClient, PoolClient
from support.concurrency import async_until, until

POLL = "AS is_expired"  # occurs in the poll for waiting readers, and in no other statement
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


class _ReadRecorder:
    """The reads so far. `read_error` is raised instead of further reads."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.reads: list[str] = []  # stream ids of readers that caught up on their own
        self.fetches: list[list[str]] = []  # stream ids of each statement that served waiting readers
        self.connections = 0  # opened to LISTEN
        self.read_error: Exception | None = None
        self._mutex = Lock()
        self._reads_running = 0
        self._last_read_at = 0.0

    def is_quiet(self, seconds: float = 0.05) -> bool:
        """Return whether the listener has connected, and nothing was read for a while: all readers wait."""
        return self.connections > 0 and self._reads_running == 0 and monotonic() - self._last_read_at > seconds

    def _begin(self, sql: str, params: Sequence[Any]) -> bool:
        if "-greatest(total_chunks" not in sql or "pg_is_in_recovery" in sql:
            return False
        if self.read_error is not None:
            raise self.read_error
        if "json_to_recordset" in sql:
            self.fetches.append([item["id"] for item in json.loads(params[0])])
        elif params[2] == SHARED_PAGE_CHUNKS:
            self.fetches.append([params[0]])
        else:
            self.reads.append(params[0])
        with self._mutex:
            self._reads_running += 1
        return True

    def _end(self) -> None:
        with self._mutex:
            self._reads_running -= 1
        self._last_read_at = monotonic()

    def _record_connection(self) -> None:
        self.connections += 1
        self._last_read_at = monotonic()


class AsyncRecordingPoolClient(_ReadRecorder, AsyncPoolClient):
    """The client of a pool, with LISTEN and everything else. It records the reads of its stores."""

    async def query(self, sql: str, params: Sequence[Any], timeout: float = math.inf) -> Sequence[Any]:
        is_read = self._begin(sql, params)
        try:
            return await super().query(sql, params, timeout)
        finally:
            if is_read:
                self._end()

    async def connect(self) -> Any:
        connection = await super().connect()
        self._record_connection()
        return connection


class RecordingPoolClient(_ReadRecorder, PoolClient):
    def query(self, sql: str, params: Sequence[Any], timeout: float = math.inf) -> Sequence[Any]:
        is_read = self._begin(sql, params)
        try:
            return super().query(sql, params, timeout)
        finally:
            if is_read:
                self._end()

    def connect(self) -> Any:
        connection = super().connect()
        self._record_connection()
        return connection


class AsyncRecordingConnectionClient(_ReadRecorder, AsyncConnectionClient):
    """The client of a connection. It records the reads of its stores."""

    async def query(self, sql: str, params: Sequence[Any]) -> Sequence[Any]:
        is_read = self._begin(sql, params)
        try:
            return await super().query(sql, params)
        finally:
            if is_read:
                self._end()

    async def connect(self) -> Any:
        connection = await super().connect()
        self._record_connection()
        return connection


class RecordingConnectionClient(_ReadRecorder, ConnectionClient):
    def query(self, sql: str, params: Sequence[Any]) -> Sequence[Any]:
        is_read = self._begin(sql, params)
        try:
            return super().query(sql, params)
        finally:
            if is_read:
                self._end()

    def connect(self) -> Any:
        connection = super().connect()
        self._record_connection()
        return connection
