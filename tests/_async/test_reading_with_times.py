"""The times at which chunks were stored."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import psycopg
import pytest

from aibind_postgres import AsyncPostgresStreamStore, SchemaError, StreamNotFoundError, TimedChunk

OUT_OF_RANGE = ["infinity", "-infinity", "20000-01-01", "0100-01-01 BC"]
TIMES = [
    datetime(2026, 3, 29, 1, 30, 0, 123457, timezone.utc),
    datetime(2026, 3, 29, 1, 30, 0, 123458, timezone.utc),
    datetime(1969, 12, 31, 23, 59, 59, 999999, timezone.utc),
    datetime(1970, 1, 1, tzinfo=timezone.utc),
    datetime(2150, 6, 1, 12, 0, 0, 1, timezone.utc),
    datetime(1, 1, 2, tzinfo=timezone.utc),
    datetime(9999, 12, 30, tzinfo=timezone.utc),
]


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


@pytest.fixture
async def admin(admin_dsn):
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as connection:
        yield connection


async def collect(store, id, after_seq=0):
    return [chunk async for chunk in store.read_with_times(id, after_seq)]


async def write(store, admin, tables, times):
    """Create a stream with a chunk for each time."""
    id = await store.create()
    await store.append_many(id, map(str, range(1, len(times) + 1)))
    update = psycopg.sql.SQL("UPDATE {} SET created_at = %s WHERE id = %s AND seq = %s").format(tables["chunks_table"])
    for seq, time in enumerate(times, 1):
        await admin.execute(update, [time, id, seq])
    return id


async def test_time_of_the_server(store, admin):
    [before] = await (await admin.execute("SELECT clock_timestamp()")).fetchone()
    id = await store.create()
    await store.append(id, "a")
    await store.append_many(id, ["b", "\x01c"])
    [after] = await (await admin.execute("SELECT clock_timestamp()")).fetchone()
    chunks = await collect(store, id)
    assert [(chunk.seq, chunk.data) for chunk in chunks] == [(1, "a"), (2, "b"), (3, "\x01c")]
    assert before <= chunks[0].created_at <= chunks[1].created_at <= chunks[2].created_at <= after
    assert all(type(chunk) is TimedChunk for chunk in chunks)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York"])
async def test_times_are_exact_and_in_utc(dsn, tables, admin, zone):
    named = psycopg.conninfo.make_conninfo(dsn, options=f"-c timezone={zone}")
    async with AsyncPostgresStreamStore(named, **tables) as store:
        id = await write(store, admin, tables, TIMES)
        found = [chunk.created_at for chunk in await collect(store, id)]
    assert found == TIMES
    assert {time.utcoffset() for time in found} == {timedelta(0)}
    assert {time.tzinfo for time in found} == {timezone.utc}


async def test_unknown_times_are_none(store, admin, tables):
    id = await write(store, admin, tables, [None, TIMES[0], *OUT_OF_RANGE, TIMES[1]])
    found = [chunk.created_at for chunk in await collect(store, id)]
    assert found == [None, TIMES[0], None, None, None, None, TIMES[1]]


async def test_reading_over_several_pages_and_after_any_number(store):
    id = await store.create()
    await store.append_many(id, map(str, range(1, 6001)))
    chunks = await collect(store, id)
    assert [(chunk.seq, chunk.data) for chunk in chunks] == [(number, str(number)) for number in range(1, 6001)]
    for after_seq in (1, 49, 50, 51, 5999, 6000, 6001):
        assert await collect(store, id, after_seq) == chunks[after_seq:]


async def test_missing_and_recreated_streams(store):
    with pytest.raises(StreamNotFoundError):
        await collect(store, "missing")
    id = await store.create()
    await store.append_many(id, ["old"] * 60)
    seen = []
    with pytest.raises(StreamNotFoundError):
        async for chunk in store.read_with_times(id):
            seen.append(chunk.data)
            if len(seen) == 50:
                await store.delete(id)
                await store.create(id)
                await store.append_many(id, ["new"] * 10)
    assert seen == ["old"] * 50


async def test_missing_column_raises(store, admin, tables):
    id = await store.create()
    await store.append(id, "a")
    drop = psycopg.sql.SQL("ALTER TABLE {} DROP COLUMN created_at")
    await admin.execute(drop.format(tables["chunks_table"]))
    for read in (store.read_with_times, store.replay):
        with pytest.raises(SchemaError, match=r"created_at.*migration 0002.*aibind-postgres migrate"):
            [chunk async for chunk in read(id)]
