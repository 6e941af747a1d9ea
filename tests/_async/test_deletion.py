"""Deletion in statements of a bounded size: complete, interrupted, and by several callers."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.concurrency import async_gather

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    StreamExistsError,
    StreamNotFoundError,
)
from aibind_postgres._async import deleting

# Stands for a statement_timeout: fails a statement that changes more than a number of rows or bytes.
LIMIT = """
CREATE FUNCTION {schema}.{function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (SELECT {measure} FROM changed) > {limit} THEN
    RAISE EXCEPTION 'canceling statement due to statement timeout' USING ERRCODE = '57014';
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER limited AFTER {event} ON {table} REFERENCING OLD TABLE AS changed
FOR EACH STATEMENT EXECUTE FUNCTION {schema}.{function}()
"""


@pytest.fixture
async def run(admin_dsn, tables):
    """Return a function that runs a statement with {chunks} and {status}, and returns its rows."""
    names = {"chunks": tables["chunks_table"], "status": tables["status_table"]}
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as connection:

        async def run(sql, **more):
            cursor = await connection.execute(psycopg.sql.SQL(sql).format(**names, **more))
            return await cursor.fetchall() if cursor.description else []

        yield run


@pytest.fixture
async def limit(run, schema_name):
    """Return a function that limits what one statement may change in a table."""

    async def limit(table, event, measure, number):
        await run(
            LIMIT,
            schema=psycopg.sql.Identifier(schema_name),
            function=psycopg.sql.Identifier("limit_changes"),
            table=table,
            event=psycopg.sql.SQL(event),
            measure=psycopg.sql.SQL(measure),
            limit=number,
        )

    return limit


class InterruptibleClient:
    """Runs statements with a pool until `remaining` is 0, then raises `InterruptedError`."""

    def __init__(self, pool):
        self.pool = pool
        self.remaining = -1

    async def query(self, sql, params):
        if not self.remaining:
            raise InterruptedError
        self.remaining -= 1
        async with self.pool.connection() as connection:
            cursor = await psycopg.AsyncRawCursor(connection).execute(sql, params)
            return await cursor.fetchall() if cursor.description else []


@pytest.fixture
async def client(dsn):
    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=1, open=False) as pool:
        yield InterruptibleClient(pool)


@pytest.fixture
async def store(client, tables):
    async with AsyncPostgresStreamStore(client, **tables) as store:
        yield store


async def add(run, prefix, streams, chunks, state="done"):
    """Add expired streams with this number of chunks each."""
    await run(
        "INSERT INTO {status} (id, state, total_chunks, expires_at) "
        f"SELECT '{prefix}' || i, '{state}', {chunks}, i FROM generate_series(1, {streams}) i"
    )
    await run(
        "INSERT INTO {chunks} (id, seq, data) "
        f"SELECT '{prefix}' || i, s, 'x' FROM generate_series(1, {streams}) i, generate_series(1, {chunks}) s"
    )


async def count(run):
    """Count the rows of both tables."""
    [rows] = await run("SELECT (SELECT count(*) FROM {status}) AS streams, (SELECT count(*) FROM {chunks}) AS chunks")
    return rows


async def test_cleanup_deletes_at_most_10_000_chunks_at_once(store, run, limit, tables):
    await add(run, "a", 30, 900)
    await add(run, "long", 2, 25_000)
    await add(run, "empty", 10, 0)
    await limit(tables["chunks_table"], "DELETE", "count(*)", 10_000)
    assert await store.cleanup() == (42, 77_000)
    assert await count(run) == (0, 0)


async def test_delete_deletes_at_most_10_000_chunks_at_once(store, run, limit, tables):
    await add(run, "long", 1, 25_000, "active")
    await add(run, "other", 1, 3, "active")
    await limit(tables["chunks_table"], "DELETE", "count(*)", 10_000)
    assert await store.delete("long1")
    assert not await store.delete("long1")
    assert await count(run) == (1, 3)


async def test_delete_without_status_row(store, run):
    await run("INSERT INTO {chunks} (id, seq, data) SELECT 'a', s, 'x' FROM generate_series(1, 25000) s")
    assert not await store.delete("a")
    assert await count(run) == (0, 0)


async def test_fail_abandoned_ends_at_most_1_000_streams_at_once(store, run, limit, tables):
    await add(run, "a", 2500, 0, "active")
    await run("UPDATE {status} SET created_at = created_at - interval '1 hour'")
    await limit(tables["status_table"], "UPDATE", "count(*)", 1000)
    assert len(await store.fail_abandoned(60)) == 2500
    assert await run("SELECT count(*) FROM {status} WHERE state = 'error'") == [(2500,)]


async def test_cleanup_of_conversations_is_bounded_in_bytes(dsn, run, limit, schema_name):
    table = psycopg.sql.Identifier(schema_name, "conversations")
    await run("INSERT INTO {table} SELECT i::text, repeat('x', 6000000), i FROM generate_series(1, 8) i", table=table)
    await limit(table, "DELETE", "sum(octet_length(data))", 20_000_000)
    async with AsyncPostgresConversationStore(dsn, table=table) as store:
        assert await store.cleanup() == 8
        await run("DROP TRIGGER limited ON {table}", table=table)
        await run("INSERT INTO {table} VALUES ('large', repeat('x', 21000000), 1)", table=table)
        assert await store.cleanup() == 1


@pytest.mark.parametrize(
    ("method", "statements"), [*[("cleanup", n) for n in range(6)], *[("delete", n) for n in range(4)]]
)
async def test_interrupted_deletion(store, other, client, run, monkeypatch, method, statements):
    monkeypatch.setattr(deleting, "MAX_CHUNKS", 10)
    await add(run, "short", 2, 5)
    await add(run, "long", 1, 25)
    client.remaining = statements
    with pytest.raises(InterruptedError):
        await (store.cleanup() if method == "cleanup" else store.delete("long1"))
    listed = [info.id async for info in other.list()]
    assert set(listed) <= {"short1", "short2", "long1"}
    if "long1" in listed:
        assert len([chunk async for chunk in other.read_from("long1")]) == 25
    else:
        with pytest.raises(StreamNotFoundError):
            [chunk async for chunk in other.read_from("long1")]
    client.remaining = -1
    await store.cleanup()
    assert await count(run) == (0, 0)


async def test_stream_that_is_created_again_during_its_deletion(store, other, client, run, monkeypatch, on_citus):
    monkeypatch.setattr(deleting, "MAX_CHUNKS", 10)
    await add(run, "a", 1, 25)
    client.remaining = 3 if on_citus else 2  # one looks for the columns, and one for distributed tables
    with pytest.raises(InterruptedError):
        await store.delete("a1")
    assert await other.create("a1") == "a1"
    await other.append_many("a1", ["new"] * 12)
    await run("INSERT INTO {chunks} (id, seq, data) VALUES ('a1', 14, 'appended to the old stream')")
    assert (await other.cleanup()).chunks == 1
    assert [chunk.data async for chunk in other.read_from("a1", follow=False)] == ["new"] * 12
    assert await count(run) == (1, 12)
    with pytest.raises(StreamExistsError):
        await other.create("a1")


async def test_chunk_appended_during_a_delete(store, dsn, run, tables):
    await add(run, "a", 1, 3, "active")
    names = {"chunks": tables["chunks_table"], "status": tables["status_table"]}
    async with await psycopg.AsyncConnection.connect(dsn) as writer:
        for sql in (
            "UPDATE {status} SET total_chunks = 4 WHERE id = 'a1'",
            "INSERT INTO {chunks} (id, seq, data) VALUES ('a1', 4, 'late')",
        ):
            await writer.execute(psycopg.sql.SQL(sql).format(**names))
        deleted, _ = await async_gather(partial(store.delete, "a1"), partial(commit_when_awaited, writer, run))
    assert deleted
    assert await count(run) == (0, 0)


async def commit_when_awaited(writer, run):
    """Commit a transaction once another one waits for it."""
    while not (await run("SELECT count(*) FROM pg_locks WHERE NOT granted"))[0][0]:
        pass
    await writer.commit()


async def test_concurrent_deletions_share_the_work(dsn, tables, run, monkeypatch):
    monkeypatch.setattr(deleting, "MAX_CHUNKS", 20)
    await add(run, "a", 40, 7)
    await add(run, "long", 8, 100)
    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=4, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            results = await async_gather(*[store.cleanup] * 4)
            rest = await store.cleanup()
    assert sum(result.streams for result in [*results, rest]) == 48
    assert sum(result.chunks for result in [*results, rest]) == 1080
    assert await count(run) == (0, 0)


@pytest.mark.parametrize("chunks", [1, 15_000])
async def test_recreated_stream_deletes_at_most_10_000_leftover_chunks_at_once(store, run, limit, tables, chunks):
    for id in ("ours", "theirs"):
        await run(f"INSERT INTO {{chunks}} (id, seq, data) SELECT '{id}', s, 'old' FROM generate_series(1, 25000) s")
    await run("ALTER TABLE {chunks} DROP COLUMN created_at")
    await run("INSERT INTO {status} (id, expires_at) VALUES ('theirs', 9e15)")  # as by the TypeScript package
    await limit(tables["chunks_table"], "DELETE", "count(*)", max(chunks, 10_000))
    await store.create("ours")
    for id in ("ours", "theirs"):
        assert await store.append_many(id, ["new"] * chunks) == chunks
        assert [chunk.data async for chunk in store.read_from(id, follow=False)] == ["new"] * chunks
    assert [info.id async for info in store.list()] == ["ours", "theirs"]
    await store.cleanup()
    assert [info.id async for info in store.list()] == ["ours", "theirs"]
    assert await run("SELECT count(*) FROM {chunks} WHERE id = 'ours'") == [(chunks,)]


async def test_tables_that_refuse_tombstones(store, run):
    await run("ALTER TABLE {status} ADD CHECK (state IN ('active', 'done', 'stopped', 'error'))")
    await add(run, "long", 3, 15_000)
    await run("INSERT INTO {chunks} (id, seq, data) SELECT 'a', s, 'old' FROM generate_series(1, 15000) s")
    assert await store.delete("long1")
    assert await store.create("a") == "a"
    assert await store.cleanup() == (2, 30_000)
    assert await count(run) == (1, 0)
