"""The public interface as a caller sees it. Checked by mypy, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg.sql import Identifier
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from typing_extensions import assert_type

from aibind_postgres import (
    AsyncPostgresClient,
    AsyncPostgresStreamStore,
    AsyncStreamWriter,
    CleanupResult,
    PostgresClient,
    PostgresStreamStore,
    SequenceConflictError,
    StreamChunk,
    StreamInfo,
    StreamNotActiveError,
    StreamState,
    StreamStatus,
    StreamWriter,
    embedded,
    schema,
    wrap_asyncpg,
    wrap_django,
    wrap_sqlalchemy,
)

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine


class Driver:
    def query(self, sql: str, params: Sequence[Any], /) -> Sequence[Any]:
        return [(sql, params)]


class AsyncDriver:
    async def query(self, sql: str, params: Sequence[Any], /) -> Sequence[Any]:
        return [(sql, params)]


def clients(connection: psycopg.Connection[DictRow], engine: Engine) -> None:
    pool: ConnectionPool[psycopg.Connection[DictRow]] = ConnectionPool(
        "", connection_class=psycopg.Connection[DictRow], kwargs={"row_factory": dict_row}
    )
    own: PostgresClient = Driver()
    for client in ("", pool, connection, own, Driver(), wrap_sqlalchemy(engine), wrap_django("other")):
        PostgresStreamStore(client)
        schema.migrate(client, chunks_table="chunks", notify_trigger=True)
    assert_type(wrap_sqlalchemy(engine), PostgresClient)
    PostgresStreamStore(AsyncDriver())  # type: ignore[arg-type]
    PostgresStreamStore(wrap_asyncpg(None))  # type: ignore[arg-type]
    schema.migrate("", tables="chunks")  # type: ignore[call-arg]


async def async_clients(
    pool: AsyncConnectionPool, connection: psycopg.AsyncConnection[DictRow], engine: AsyncEngine
) -> None:
    own: AsyncPostgresClient = AsyncDriver()
    AsyncPostgresStreamStore("")
    AsyncPostgresStreamStore(pool)
    AsyncPostgresStreamStore(connection)
    AsyncPostgresStreamStore(own)
    AsyncPostgresStreamStore(AsyncDriver())
    AsyncPostgresStreamStore(wrap_asyncpg(pool))
    AsyncPostgresStreamStore(wrap_sqlalchemy(engine))
    assert_type(wrap_sqlalchemy(engine), AsyncPostgresClient)
    AsyncPostgresStreamStore(Driver())  # type: ignore[arg-type]
    await schema.async_migrate(pool, status_table=Identifier("schema", "status"))


def streams(since: datetime) -> None:
    with PostgresStreamStore(
        "", chunks_table=Identifier("c"), status_table="s", poll_interval=0.1, ttl=timedelta(1), retry_for=1
    ) as store:
        assert_type(store, PostgresStreamStore)
        assert_type(store.create(), str)
        assert_type(store.acquire("id"), bool)
        assert_type(store.append("id", "text", expected_seq=1), int)
        assert_type(store.append_many("id", iter(["text"]), expected_seq=None), int)
        assert_type(store.read_from("id", 3, follow=False), Iterator[StreamChunk])
        assert_type(store.replay("id", after_seq=3, speed=2), Iterator[StreamChunk])
        assert_type(store.get_status("id"), StreamStatus | None)
        assert_type(store.wait("id", timeout=timedelta(seconds=1)), StreamStatus)
        assert_type(store.wait("id").state, StreamState)
        assert_type([store.stop("id"), store.complete("id"), store.fail("id", "why"), store.delete("id")], list[bool])
        assert_type(store.list(state="active", created_after=since), Iterator[StreamInfo])
        assert_type(store.cleanup(batch_size=10), CleanupResult)
        assert_type(store.fail_abandoned(600), list[str])
        for seq, data in store.read_from("id"):
            assert_type(seq, int)
            assert_type(data, str)
        store.append("id", b"bytes")  # type: ignore[arg-type]
        store.list(state="ended")  # type: ignore[arg-type]
        store.replay("id", 0, 2.0)  # type: ignore[call-arg]
        store.close()


async def async_streams(since: datetime) -> None:
    async with AsyncPostgresStreamStore(
        "", chunks_table=Identifier("c"), status_table="s", poll_interval=0.1, ttl=timedelta(1), retry_for=1
    ) as store:
        assert_type(store, AsyncPostgresStreamStore)
        assert_type(await store.create(), str)
        assert_type(await store.acquire("id"), bool)
        assert_type(await store.append("id", "text", expected_seq=1), int)
        assert_type(await store.append_many("id", iter(["text"]), expected_seq=None), int)
        assert_type(store.read_from("id", 3, follow=False), AsyncIterator[StreamChunk])
        assert_type(store.replay("id", after_seq=3, speed=2), AsyncIterator[StreamChunk])
        assert_type(await store.get_status("id"), StreamStatus | None)
        assert_type(await store.wait("id", timeout=timedelta(seconds=1)), StreamStatus)
        assert_type([await store.stop("id"), await store.complete("id"), await store.fail("id", "why")], list[bool])
        assert_type(await store.delete("id"), bool)
        assert_type(store.list(state="active", created_after=since), AsyncIterator[StreamInfo])
        assert_type(await store.cleanup(batch_size=10), CleanupResult)
        assert_type(await store.fail_abandoned(600), list[str])
        async for seq, data in store.read_from("id"):
            assert_type(seq, int)
            assert_type(data, str)
        await store.append("id", b"bytes")  # type: ignore[arg-type]
        store.list(state="ended")  # type: ignore[arg-type]
        await store.close()


def others(status: StreamStatus, info: StreamInfo) -> None:
    assert_type(status.error, str | None)
    assert_type(info.expires_at, datetime)
    assert_type(info.created_at, datetime | None)
    assert_type(schema.render(chunks_table=Identifier("a", "b")), str)
    with embedded.server("folder", version=16) as dsn:
        assert_type(dsn, str)
    try:
        PostgresStreamStore("").append("id", "text")
    except SequenceConflictError as conflict:
        assert_type((conflict.expected, conflict.actual), tuple[int, int])
    except StreamNotActiveError as ended:
        assert_type(ended.state, str)


def writers(store: PostgresStreamStore) -> None:
    assert_type(store.writer("id", max_chunks=5, max_bytes=100), StreamWriter)
    with store.writer("id") as writer:
        writer.write("chunk")
        assert_type(writer.flush(), int)
        assert_type(writer.is_active, bool)
        writer.write(b"chunk")  # type: ignore[arg-type]
    PostgresStreamStore("", synchronous_commit="off")
    PostgresStreamStore("", synchronous_commit="maybe")  # type: ignore[arg-type]


async def async_writers(store: AsyncPostgresStreamStore) -> None:
    assert_type(store.writer("id"), AsyncStreamWriter)
    async with store.writer("id") as writer:
        await writer.write("chunk")
        assert_type(await writer.flush(), int)
