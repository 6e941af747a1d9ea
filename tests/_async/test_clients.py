"""psycopg's pools and connections, however the user has set them up."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, AsyncNullConnectionPool
from support.concurrency import AsyncBackground, async_gather

from aibind_postgres import AsyncPostgresStreamStore, InvalidDataError, SchemaError, StreamNotFoundError
from aibind_postgres._concurrency import async_sleep


async def round_trip(store):
    """Use every statement; the first ones more often than it takes psycopg to prepare them."""
    id = await store.create()
    for number in range(1, 13):
        assert await store.append(id, str(number)) == number
    assert await store.append_many(id, ["13", "14"], expected_seq=13) == 14
    assert await store.append(id, "14", expected_seq=14) == 14
    read = [tuple(chunk) async for chunk in store.read_from(id, follow=False)]
    assert read == [(number, str(number)) for number in range(1, 15)]
    assert [chunk.seq async for chunk in store.replay(id, 12, speed=1000)] == [13, 14]
    assert id in [info.id async for info in store.list(state="active")]
    assert await store.complete(id) is True
    assert await store.wait(id) == ("done", None, 14)
    assert await store.cleanup() == (0, 0)
    assert await store.fail_abandoned(3600) == []
    assert await store.delete(id) is True


async def collect(store, id):
    return [tuple(chunk) async for chunk in store.read_from(id)]


@pytest.mark.parametrize("kind", [AsyncConnectionPool, AsyncNullConnectionPool])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"autocommit": True},
        {"prepare_threshold": None},
        {"prepare_threshold": 0},
        {"row_factory": dict_row},
        {"cursor_factory": psycopg.AsyncClientCursor},
    ],
    ids=lambda kwargs: ",".join(kwargs) or "default",
)
async def test_a_pool(dsn, tables, kind, kwargs):
    async with kind(dsn, min_size=0, max_size=2, kwargs=kwargs, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            await round_trip(store)
        # The store leaves the pool open and its connections as they were.
        async with pool.connection() as connection:
            assert connection.autocommit == kwargs.get("autocommit", False)
            assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


async def test_a_pool_not_in_autocommit_mode_sends_no_begin(dsn, tables):
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            id = await store.create()
            async with pool.connection() as connection:
                pid = connection.info.backend_pid
            await store.get_status(id)
            async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
                statement = "SELECT query FROM pg_stat_activity WHERE pid = %s"
                (last,) = await (await admin.execute(statement, [pid])).fetchone()
    assert "total_chunks" in last  # and not COMMIT


async def test_an_error_leaves_the_pool_as_it_was(dsn, tables):
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, status_table="no such table") as store:
            for _ in range(3):
                with pytest.raises(SchemaError, match="no such table"):
                    await store.create()
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            await round_trip(store)
        async with pool.connection() as connection:
            assert connection.autocommit is False


async def test_a_connection_in_autocommit_mode(dsn, tables):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            await round_trip(store)
        assert not connection.closed


async def test_a_connection_in_a_transaction(dsn, tables):
    async with (
        await psycopg.AsyncConnection.connect(dsn) as connection,
        AsyncPostgresStreamStore(dsn, **tables) as other,
    ):
        store = AsyncPostgresStreamStore(connection, **tables)
        id = await other.create()
        assert await store.append(id, "rolled back") == 1
        assert await store.get_status(id) == ("active", None, 1)
        assert await other.get_status(id) == ("active", None, 0)
        await connection.rollback()
        assert await store.get_status(id) == ("active", None, 0)
        async with connection.transaction():
            assert await store.append(id, "kept") == 1
            assert await store.create("with it") == "with it"
        await connection.commit()
        assert await collect_now(other, id) == [(1, "kept")]
        assert await other.get_status("with it") == ("active", None, 0)
        await store.close()


async def collect_now(store, id):
    return [tuple(chunk) async for chunk in store.read_from(id, follow=False)]


async def test_a_commit_wakes_readers_elsewhere(dsn, tables):
    async with (
        await psycopg.AsyncConnection.connect(dsn) as connection,
        AsyncPostgresStreamStore(dsn, **tables, poll_interval=3600) as other,
        AsyncPostgresStreamStore(connection, **tables) as store,
    ):
        id = await other.create()
        async with AsyncBackground(partial(collect, other, id)) as reader:
            await async_sleep(0.2)
            async with connection.transaction():
                await store.append(id, "a")
                await store.complete(id)
                await async_sleep(0.1)
            await connection.commit()
            assert await reader.result() == [(1, "a")]


async def test_a_connection_follows_a_stream(dsn, tables):
    async with (
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection,
        AsyncPostgresStreamStore(connection, **tables, poll_interval=3600) as store,
        AsyncPostgresStreamStore(dsn, **tables) as other,
    ):
        id = await other.create()

        async def write():
            await async_sleep(0.2)
            for number in range(10):
                await other.append(id, str(number))
            await other.complete(id)

        results = await async_gather(write, partial(collect, store, id))
        assert [data for _, data in results[1]] == [str(number) for number in range(10)]


async def test_a_wrong_client_is_refused():
    with pytest.raises(TypeError, match="connection string"):
        AsyncPostgresStreamStore(object())
    for wrong in ("", "a" * 64, "ü" * 32, "a\0b", "a.b.c", "a.", ".b", "\ud800"):
        with pytest.raises(ValueError, match="name"):
            AsyncPostgresStreamStore("", status_table=wrong)
    with pytest.raises(ValueError, match="differ"):
        AsyncPostgresStreamStore("", status_table="same", chunks_table="same")
    with pytest.raises(TypeError, match="table name"):
        AsyncPostgresStreamStore("", status_table=1)
    for option in ("ttl", "poll_interval", "retry_for"):
        for value in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=option):
                AsyncPostgresStreamStore("", **{option: value})
    for option in ("ttl", "poll_interval"):
        with pytest.raises(ValueError, match=option):
            AsyncPostgresStreamStore("", **{option: 0})


async def test_without_the_second_migration(dsn, tables):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
        for table in tables.values():
            await admin.execute(psycopg.sql.SQL("ALTER TABLE {} DROP COLUMN created_at").format(table))
    async with AsyncPostgresStreamStore(dsn, **tables, ttl=100) as store:
        id = await store.create()
        await store.append_many(id, ["1", "2"])
        assert await collect_now(store, id) == [(1, "1"), (2, "2")]
        (info,) = [info async for info in store.list()]
        assert info.created_at is None
        with pytest.raises(SchemaError, match=r"created_at.*aibind-postgres migrate"):
            [chunk async for chunk in store.replay(id)]
        with pytest.raises(SchemaError, match="created_at"):
            [info async for info in store.list(created_after=info.expires_at)]
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
            statement = psycopg.sql.SQL("UPDATE {} SET expires_at = expires_at - 60000").format(tables["status_table"])
            await admin.execute(statement)
        # Silent for 60 seconds, or for 35: it is not known any better, so nobody is ended who may be alive.
        assert await store.fail_abandoned(40) == []
        assert await store.fail_abandoned(30) == [id]
        assert await store.cleanup() == (0, 0)
        assert await store.delete(id) is True


async def test_a_database_of_another_encoding(server):
    async with await psycopg.AsyncConnection.connect(server, autocommit=True) as admin:
        await admin.execute("DROP DATABASE IF EXISTS aibind_latin")
        await admin.execute("CREATE DATABASE aibind_latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
        try:
            from psycopg.conninfo import make_conninfo

            from aibind_postgres import schema

            latin = make_conninfo(server, dbname="aibind_latin")
            schema.migrate(latin)
            async with AsyncPostgresStreamStore(latin) as store:
                id = await store.create("ü")
                assert await store.append(id, "é") == 1
                with pytest.raises(InvalidDataError, match="encoding"):
                    await store.append(id, "😀")
                with pytest.raises(InvalidDataError, match="encoding"):
                    await store.append_many(id, ["fine", "😀"])
                assert await collect_now(store, id) == [(1, "é")]
                with pytest.raises(StreamNotFoundError):
                    await store.append("x", "y")
        finally:
            await admin.execute("DROP DATABASE aibind_latin WITH (FORCE)")
