"""Concurrent callers: one creator per stream, gapless unique sequence numbers, heap-only status updates."""

from __future__ import annotations

from functools import partial
from uuid import uuid4

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.concurrency import async_gather, async_sleep

from aibind_postgres import (
    AsyncPostgresStreamStore,
    SequenceConflictError,
    StreamExistsError,
    StreamNotActiveError,
    schema,
)


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


async def test_one_of_fifty_creators_succeeds(store):
    results = await async_gather(*[partial(store.create, "one")] * 50, errors=True)
    assert results.count("one") == 1
    assert sum(isinstance(result, StreamExistsError) for result in results) == 49


async def test_concurrent_writers_get_unique_consecutive_numbers(store):
    id = await store.create()

    async def write(writer):
        return [(await store.append(id, f"{writer}/{number}"), f"{writer}/{number}") for number in range(200)]

    written = await async_gather(*(partial(write, writer) for writer in range(16)))
    chunks = [tuple(chunk) async for chunk in store.read_from(id, follow=False)]
    assert [seq for seq, _ in chunks] == list(range(1, 3201))
    assert sorted(chunk for chunks_of_one in written for chunk in chunks_of_one) == sorted(chunks)
    for chunks_of_one in written:
        seqs = [seq for seq, _ in chunks_of_one]
        assert seqs == sorted(seqs)


async def test_batches_are_not_interleaved(store):
    id = await store.create()

    async def write(writer):
        return [await store.append_many(id, [f"{writer}"] * 7) for _ in range(30)]

    await async_gather(*(partial(write, writer) for writer in range(8)))
    data = [chunk.data async for chunk in store.read_from(id, follow=False)]
    assert len(data) == 8 * 30 * 7
    assert all(len(set(data[start : start + 7])) == 1 for start in range(0, len(data), 7))


async def test_second_producer_gets_a_conflict(store):
    id = await store.create()

    async def produce(name):
        for number in range(1, 101):
            await store.append(id, f"{name}{number}", expected_seq=number)

    results = await async_gather(partial(produce, "a"), partial(produce, "b"), errors=True)
    assert sum(isinstance(result, SequenceConflictError) for result in results) >= 1
    seqs = [chunk.seq async for chunk in store.read_from(id, follow=False)]
    assert seqs == list(range(1, len(seqs) + 1))


async def test_concurrent_retries_of_one_append_write_once(store):
    id = await store.create()
    results = await async_gather(*[partial(store.append, id, "same", expected_seq=1)] * 20)
    assert results == [1] * 20
    assert [tuple(chunk) async for chunk in store.read_from(id, follow=False)] == [(1, "same")]


async def test_no_chunk_is_stored_after_the_end(store):
    for _ in range(20):
        id = await store.create()

        async def write(id=id):
            count = 0
            while True:
                try:
                    count = await store.append(id, "x")
                except StreamNotActiveError:
                    return count

        async def stop(id=id):
            return await store.stop(id)

        *counts, _ = await async_gather(write, write, write, stop)
        status = await store.get_status(id)
        chunks = [chunk.seq async for chunk in store.read_from(id)]
        assert chunks == list(range(1, status.total_chunks + 1))
        assert max(counts) == status.total_chunks


async def test_one_of_many_concurrent_ends_succeeds(store):
    id = await store.create()
    ends = [store.stop, store.complete, lambda id: store.fail(id, "why")] * 5
    assert sorted(await async_gather(*(partial(end, id) for end in ends))) == [False] * 14 + [True]


async def test_concurrent_cleanups_share_the_work(dsn, tables, store):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
        names = {"chunks": tables["chunks_table"], "status": tables["status_table"]}
        for statement in (
            "INSERT INTO {status} (id, state, expires_at) SELECT i::text, 'done', 1 FROM generate_series(1, 1000) i",
            "INSERT INTO {chunks} (id, seq, data) SELECT i::text, 1, '' FROM generate_series(1, 1000) i",
        ):
            await admin.execute(psycopg.sql.SQL(statement).format(**names))
    results = await async_gather(*[store.cleanup] * 8)
    # A cleanup skips locked rows, so it may return early; the others delete the rest.
    assert sum(result.streams for result in results) == sum(result.chunks for result in results) == 1000


async def test_repeated_migration_while_writing(dsn, tables, schema_name, store):
    id = await store.create()
    conversations = psycopg.sql.Identifier(schema_name, "conversations")

    async def write():
        for _ in range(200):
            await store.append(id, "x")

    async def maintain():
        for _ in range(100):
            await store.cleanup()
            await store.fail_abandoned(60)
            await store.delete(await store.create())

    async def migrate():
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            for _ in range(20):
                await schema.async_migrate(connection, **tables, conversations_table=conversations)

    await async_gather(*[write] * 6, maintain, migrate)
    assert (await store.get_status(id)).total_chunks == 1200


@pytest.mark.parametrize("details", [{}, {"session_id": "a", "owner": "b", "ttl": 60, "lease": 0.01}], ids=str)
async def test_appends_are_heap_only_updates(dsn, schema_name, create_tables, details):
    tables = {f"{kind}_table": psycopg.sql.Identifier(schema_name, kind) for kind in ("chunks", "status")}
    # With a name of its own, so that the tables have no updates of other tests.
    create_tables(**tables, conversations_table=psycopg.sql.Identifier(schema_name, uuid4().hex))
    table = tables["status_table"].as_string(None)
    statement = """
        SELECT sum(n_tup_upd)::integer, sum(n_tup_hot_upd)::integer FROM pg_stat_user_tables
         WHERE relid = %(table)s::regclass OR relid IN (SELECT relid FROM pg_partition_tree(%(table)s))"""
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            id = await store.create(**details)
            for number in range(2000):
                await store.append(id, str(number))
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
        updates = 0
        while updates < 2000:  # a session reports its statistics with a delay
            updates, hot = await (await admin.execute(statement, {"table": table})).fetchone()
            await async_sleep(0.01)
    assert updates == 2000
    assert hot >= 0.95 * updates
