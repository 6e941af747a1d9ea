"""Connections and pools in states that a caller may have set."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool
from support.concurrency import async_gather

from aibind_postgres import AibindError, AsyncPostgresStreamStore, InvalidDataError


@pytest.fixture
async def connection(dsn):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def store(connection, tables):
    async with AsyncPostgresStreamStore(connection, **tables) as store:
        yield store


async def read(store, id, **options):
    return [chunk.data async for chunk in store.read_from(id, **options)]


@pytest.mark.parametrize("is_used", [False, True])
async def test_pipeline_is_refused(connection, store, other, is_used):
    id = await other.create()
    if is_used:
        await store.append(id, "before")
    async with connection.pipeline():
        calls = {
            "create": store.create,
            "append": partial(store.append, id, "refused"),
            "append_many": partial(store.append_many, id, ["refused", "refused"]),
            "get_status": partial(store.get_status, id),
            "stop": partial(store.stop, id),
            "delete": partial(store.delete, id),
            "read": partial(read, store, id),
            "wait": partial(store.wait, id),
        }
        for name, call in calls.items():
            with pytest.raises(AibindError, match="pipeline") as caught:
                await call()
            assert type(caught.value) is AibindError, name
    assert await read(other, id, follow=False) == ["before"] * is_used
    assert await store.append(id, "after") == 1 + is_used


async def test_append_waits_for_executemany(connection, store, other):
    id = await other.create()
    await store.get_status(id)
    cursor = connection.cursor()
    rows = [(number,) for number in range(2000)]
    await async_gather(
        partial(cursor.executemany, "SELECT pg_sleep(0) WHERE %s >= 0", rows),
        *[partial(store.append, id, "x") for _ in range(20)],
    )
    assert await read(other, id, follow=False) == ["x"] * 20


async def test_failed_transaction(dsn, tables, other):
    id = await other.create()
    async with (
        await psycopg.AsyncConnection.connect(dsn) as connection,
        AsyncPostgresStreamStore(connection, **tables) as store,
    ):
        for _ in range(2):  # before the first use of the connection, and later
            with pytest.raises(psycopg.errors.DivisionByZero):
                await connection.execute("SELECT 1/0")
            for call in (
                store.create,
                partial(store.append, id, "x"),
                partial(store.append_many, id, ["x", "y"]),
                partial(store.get_status, id),
                partial(store.stop, id),
                partial(store.delete, id),
                partial(read, store, id),
                partial(read, store, id, follow=False),
                partial(store.wait, id),
            ):
                with pytest.raises(psycopg.errors.InFailedSqlTransaction):
                    await call()
            await connection.rollback()
            assert await store.get_status(id) == ("active", None, 0)
            await connection.rollback()


async def test_closed_connection(connection, store):
    await connection.close()
    for call in (store.create, partial(store.append, "a", "x"), partial(read, store, "a"), partial(store.wait, "a")):
        with pytest.raises(psycopg.OperationalError, match="closed"):
            await call()


async def test_changed_encoding(connection, store, other):
    id = await other.create()
    assert await store.append(id, "é") == 1
    await connection.execute("SET client_encoding = 'LATIN1'")
    assert await store.append(id, "è") == 2
    assert await read(store, id, follow=False) == ["é", "è"]
    with pytest.raises(InvalidDataError):
        await store.append(id, "😀")
    await connection.execute("SET client_encoding = 'SQL_ASCII'")  # psycopg would return bytes
    for call in (partial(store.append, id, "ê"), partial(read, store, id), partial(store.get_status, id)):
        with pytest.raises(InvalidDataError, match="SQL_ASCII"):
            await call()
    await connection.execute("SET client_encoding = 'UTF8'")
    assert await read(store, id, follow=False) == ["é", "è"]


async def test_unusable_encoding_begins_no_transaction(dsn, tables):
    async with await psycopg.AsyncConnection.connect(dsn, client_encoding="SQL_ASCII") as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            with pytest.raises(InvalidDataError, match="SQL_ASCII"):
                await store.get_status("nothing")
        assert connection.info.transaction_status == TransactionStatus.IDLE


async def test_changed_settings(connection, store, other):
    id = await other.create()
    for setting in ("DateStyle = 'SQL, DMY'", "TimeZone = 'Asia/Kolkata'", "extra_float_digits = -15"):
        await connection.execute(f"SET {setting}")
    await store.append_many(id, ["a", "b"])
    assert [chunk.data async for chunk in store.replay(id, speed=1e9)] == ["a", "b"]
    [ours] = [info async for info in store.list()]
    [theirs] = [info async for info in other.list()]
    assert ours == theirs
    await connection.execute("SET default_transaction_read_only = on")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        await store.append(id, "c")
    assert await read(store, id, follow=False) == ["a", "b"]


async def test_changed_autocommit(connection, store, other):
    id = await other.create()
    for autocommit, expected in ((True, 1), (False, 1), (True, 2)):
        await connection.set_autocommit(autocommit)
        await store.append(id, "x")
        assert await other.get_status(id) == ("active", None, expected)
        await connection.rollback()


async def test_open_server_side_cursor(connection, store, other):
    id = await other.create()
    async with connection.transaction(), connection.cursor("named") as cursor:
        await cursor.execute("SELECT generate_series(1, 3)")
        assert await cursor.fetchone() == (1,)
        assert await store.append(id, "x") == 1
        assert await cursor.fetchall() == [(2,), (3,)]
    assert await read(other, id, follow=False) == ["x"]


async def test_read_only_pool(dsn, tables, other):
    async def configure(connection):
        await connection.set_read_only(True)

    id = await other.create()
    await other.append(id, "x")
    async with AsyncConnectionPool(dsn, configure=configure, min_size=1, max_size=2, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            for call in (store.create, partial(store.append, id, "y"), partial(store.stop, id)):
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                    await call()
            assert await read(store, id, follow=False) == ["x"]
        async with pool.connection() as connection:
            assert not connection.autocommit
    assert await other.get_status(id) == ("active", None, 1)


async def test_pool_with_another_encoding(dsn, tables, other):
    id = await other.create()
    options = {"autocommit": True, "client_encoding": "SQL_ASCII"}
    async with AsyncConnectionPool(dsn, kwargs=options, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            for _ in range(2):
                with pytest.raises(InvalidDataError, match="SQL_ASCII"):
                    await store.get_status(id)
