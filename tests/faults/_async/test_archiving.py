"""Archivers that are cancelled, lose their connections and meet each other: no chunk is lost, twice or out of order."""

from __future__ import annotations

import random
from functools import partial

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support.concurrency import async_gather, async_sleep

from aibind_postgres import AsyncPostgresStreamStore, StreamNotFoundError

pytestmark = pytest.mark.timeout(1800)

STATEMENTS_UNDER_WAY = "FROM pg_stat_activity WHERE application_name = %s AND state = 'active'"


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


def texts_of(number, length):
    return [f"{number}/{seq}\n\x01" for seq in range(1, length + 1)]


async def fill(store, lengths):
    """Create finished streams, and return their texts by their ids."""
    expected = {}
    for number, length in enumerate(lengths):
        id = f"stream {number}"
        expected[id] = texts_of(number, length)
        await store.create(id)
        await store.append_many(id, expected[id])
        await store.complete(id)
    return expected


async def check(store, id, texts, after=0):
    chunks = [tuple(chunk) async for chunk in store.read_from(id, after)]
    assert chunks == list(enumerate(texts[after:], after + 1))
    stored = [(chunk.seq, chunk.data) async for chunk in store.read_with_times(id, after)]
    assert stored == chunks


async def test_interrupted_statements(dsn, tables, store, schema_name, long):
    """Each statement moves all its chunks or none, whether it is cancelled or its connection ends."""
    expected = await fill(store, [3000, 1, 0, 700] * (10 if long else 1))
    admin = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
    archiver = AsyncPostgresStreamStore(make_conninfo(dsn, application_name=schema_name), **tables)
    faults, rng, done = 0, random.Random(schema_name), []

    async def repeat(call):
        while True:
            try:
                return await call()
            except psycopg.OperationalError:  # the connection was lost, or the statement was cancelled
                await async_sleep(0.01)

    async def work():
        for _ in range(10 if long else 2):
            await repeat(partial(archiver.archive, 0, batch_size=150))
            for id in expected:
                await repeat(partial(archiver.unarchive, id))
            await admin.execute(sql.SQL("UPDATE {} SET archived_at = NULL").format(tables["status_table"]))
        await repeat(partial(archiver.archive, 0, batch_size=150))
        done.append(True)

    async def interrupt():
        nonlocal faults
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as other:
            while not done:
                function = rng.choice(["pg_cancel_backend", "pg_terminate_backend"])
                cursor = await other.execute(f"SELECT {function}(pid) {STATEMENTS_UNDER_WAY}", [schema_name])
                faults += len(await cursor.fetchall())
                await async_sleep(rng.random() * 0.04)

    async def read():
        while not done:
            for id, texts in expected.items():
                await check(store, id, texts, rng.randint(0, len(texts)))

    async with admin, archiver:
        await async_gather(work, interrupt, read)
        assert faults > 0
        cursor = await admin.execute(sql.SQL("SELECT count(*) FROM {}").format(tables["chunks_table"]))
        assert await cursor.fetchone() == (0,)
    for id, texts in expected.items():
        await check(store, id, texts)


async def test_everything_at_once(dsn, tables, store, schema_name, long):
    """Archivers, `unarchive`, deletion, clean-up, repeated appends and readers of the same streams."""
    expected = await fill(store, [1200, 50, 400, 0] * (40 if long else 5))
    deleted = set(list(expected)[::3])
    expired = set(list(expected)[1::3])
    archive = sql.Identifier(schema_name, "chunks_archive")
    running = [2]

    async def archiving():
        async with AsyncPostgresStreamStore(dsn, **tables) as archiver:
            for _ in range(5):
                await archiver.archive(0, batch_size=130)
        running[0] -= 1

    async def for_each(seed, call, ids):
        order = list(ids)
        random.Random(seed).shuffle(order)
        for id in order:
            try:
                await call(id)
            except StreamNotFoundError:
                assert id in deleted | expired

    async def reading(seed):
        rng = random.Random(seed)
        async with AsyncPostgresStreamStore(dsn, **tables) as reader:

            async def read(id):
                await check(reader, id, expected[id], rng.randint(0, len(expected[id])))

            while running[0]:
                await for_each(rng.random(), read, expected)

    async def repeat_append(id):
        if expected[id]:
            assert await store.append_many(id, expected[id], expected_seq=1) == len(expected[id])

    async def cleaning():
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
            expire = sql.SQL("UPDATE {} SET expires_at = 1 WHERE id = %s").format(tables["status_table"])
            for id in expired:
                await admin.execute(expire, [id])
                await store.cleanup()

    await async_gather(
        archiving,
        archiving,
        partial(for_each, 1, store.unarchive, list(expected)[::2]),
        partial(for_each, 2, store.delete, deleted),
        partial(for_each, 3, repeat_append, expected),
        cleaning,
        partial(reading, 4),
        partial(reading, 5),
    )
    remaining = expected.keys() - deleted - expired
    await store.cleanup()
    await store.archive(0)
    for id in remaining:
        await check(store, id, expected[id])
    async with await psycopg.AsyncConnection.connect(dsn) as admin:
        for table in (tables["chunks_table"], archive, tables["status_table"]):
            cursor = await admin.execute(sql.SQL("SELECT DISTINCT id FROM {}").format(table))
            assert {id for (id,) in await cursor.fetchall()} <= remaining
