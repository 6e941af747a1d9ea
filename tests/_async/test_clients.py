"""psycopg's pools and connections in various configurations."""

from __future__ import annotations

import inspect
import uuid
from functools import partial

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, AsyncNullConnectionPool
from support.clients import CoroutineClient, PlainClient
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until

from aibind_postgres import AibindError, AsyncPostgresStreamStore, InvalidDataError, SchemaError, schema

HOUR = 3600  # seconds


async def round_trip(store):
    """Run every statement. The first ones run often enough for psycopg to prepare them."""
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
    assert await store.fail_abandoned() == []
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
async def test_pool(dsn, tables, kind, kwargs):
    async with kind(dsn, min_size=0, max_size=2, kwargs=kwargs, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            await round_trip(store)
        # The store leaves the pool open and its connections as they were.
        async with pool.connection() as connection:
            assert connection.autocommit == kwargs.get("autocommit", False)
            assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


async def test_pool_without_autocommit_sends_no_begin(dsn, tables):
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            id = await store.create()
            async with pool.connection() as connection:
                pid = connection.info.backend_pid
            await store.get_status(id)
            async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
                statement = "SELECT query FROM pg_stat_activity WHERE pid = %s"
                (last,) = await (await admin.execute(statement, [pid])).fetchone()
    assert "total_chunks" in last  # not COMMIT


async def test_busy_store_keeps_connections_and_an_idle_one_returns_them(dsn, tables):
    count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"
    name = f"busy {uuid.uuid4()}"
    with psycopg.connect(dsn, autocommit=True) as admin:

        def connections():
            return admin.execute(count, [name]).fetchone()[0]

        async with AsyncPostgresStreamStore(make_conninfo(dsn, application_name=name), **tables) as store:
            ids = [await store.create() for _ in range(8)]

            async def append_often(id):
                for _ in range(50):
                    await store.append(id, "a")

            await async_gather(*(partial(append_often, id) for id in ids))
            assert connections() > 1
            await async_until(lambda: connections() == 1)
            assert [(await store.get_status(id)).total_chunks for id in ids] == [50] * 8
        await async_until(lambda: connections() == 0)


async def test_pool_after_an_error(dsn, tables):
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, status_table="no such table") as store:
            for _ in range(3):
                with pytest.raises(SchemaError, match="no such table"):
                    await store.create()
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            await round_trip(store)
        async with pool.connection() as connection:
            assert connection.autocommit is False


async def test_connection_in_autocommit_mode(dsn, tables):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            await round_trip(store)
        assert not connection.closed


async def test_connection_in_a_transaction(dsn, tables):
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


async def test_commit_wakes_readers_of_other_stores(dsn, tables):
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


async def test_connection_follows_a_stream(dsn, tables):
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


async def test_unreachable_server_raises_with_the_reason(dsn):
    nowhere = make_conninfo(dsn, dbname="no such database")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        await schema.async_migrate(nowhere)
    async with AsyncPostgresStreamStore(nowhere) as store:
        for call in (store.create, partial(store.wait, "a"), partial(collect, store, "a")):
            with pytest.raises(psycopg.OperationalError, match="does not exist"):
                await call()


async def test_client_of_the_other_flavour():
    for wrong in (CoroutineClient(), PlainClient()):
        is_ours = inspect.iscoroutinefunction(wrong.query) == inspect.iscoroutinefunction(
            AsyncPostgresStreamStore.create
        )
        if is_ours:
            AsyncPostgresStreamStore(wrong)
        else:
            with pytest.raises(TypeError, match="flavour"):
                AsyncPostgresStreamStore(wrong)


async def test_invalid_arguments():
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
        for value in (None, "5m", True):
            with pytest.raises(TypeError, match=option):
                AsyncPostgresStreamStore("", **{option: value})
    for option in ("ttl", "poll_interval"):
        with pytest.raises(ValueError, match=option):
            AsyncPostgresStreamStore("", **{option: 0})


async def test_without_the_second_migration(dsn, admin_dsn, tables):
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as admin:
        for table in tables.values():
            await admin.execute(psycopg.sql.SQL("ALTER TABLE {} DROP COLUMN created_at").format(table))
        # Migration 0004 needs the second one.
        await admin.execute(psycopg.sql.SQL("ALTER TABLE {} DROP COLUMN lease_until").format(tables["status_table"]))
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()
        await store.append_many(id, ["1", "2"])
        assert await collect_now(store, id) == [(1, "1"), (2, "2")]
        (info,) = [info async for info in store.list()]
        assert info.created_at is None
        with pytest.raises(SchemaError, match=r"created_at.*aibind-postgres migrate"):
            [chunk async for chunk in store.replay(id)]
        with pytest.raises(SchemaError, match="created_at"):
            [info async for info in store.list(created_after=info.expires_at)]
        with pytest.raises(SchemaError, match=r"migration 0002.*created_at.*aibind-postgres migrate"):
            await store.fail_abandoned(0)
        assert (await store.get_status(id)).state == "active"
        assert await store.cleanup() == (0, 0)
        assert await store.delete(id) is True


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_database_with_another_encoding(server, encoding):
    name = f"aibind_{encoding.lower()}_{uuid.uuid4().hex}"  # the tests of both flavours may run at the same time
    latin = make_conninfo(server, dbname=name)
    async with await psycopg.AsyncConnection.connect(server, autocommit=True) as admin:
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
        try:
            schema.migrate(latin)
            async with AsyncPostgresStreamStore(latin) as store:
                id = await store.create("ü")
                assert await store.append(id, "é") == 1
                assert await collect_now(store, id) == [(1, "é")]
                if encoding == "LATIN1":
                    with pytest.raises(InvalidDataError, match="encoding"):
                        await store.append(id, "😀")
                    with pytest.raises(InvalidDataError, match="encoding"):
                        await store.append_many(id, ["fine", "😀"])
                    assert await collect_now(store, id) == [(1, "é")]
            async with AsyncConnectionPool(latin, min_size=1, max_size=1, open=False) as pool:
                async with AsyncPostgresStreamStore(pool) as store:
                    if encoding == "LATIN1":
                        assert await collect_now(store, "ü") == [(1, "é")]
                    else:  # psycopg would return bytes
                        with pytest.raises(InvalidDataError, match="UTF8"):
                            await store.get_status("ü")
        finally:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_row_that_cannot_be_updated(dsn, admin_dsn, tables, schema_name):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()
        async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as admin:
            names = {"refuse": psycopg.sql.Identifier(schema_name, "refuse"), "status": tables["status_table"]}
            for statement in (
                "CREATE FUNCTION {refuse}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
                "CREATE TRIGGER refuse BEFORE UPDATE ON {status} FOR EACH ROW EXECUTE FUNCTION {refuse}()",
            ):
                await admin.execute(psycopg.sql.SQL(statement).format(**names))
        with pytest.raises(AibindError, match="cannot be updated"):
            await store.append(id, "a")


async def test_error_of_the_commit_raises(dsn, admin_dsn, tables, schema_name):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()
        async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as admin:
            names = {"refuse": psycopg.sql.Identifier(schema_name, "refuse"), "status": tables["status_table"]}
            for statement in (
                "CREATE FUNCTION {refuse}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''at the commit''; END'",
                "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT OR UPDATE ON {status} "
                "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {refuse}()",
            ):
                await admin.execute(psycopg.sql.SQL(statement).format(**names))
        calls = [store.create, partial(store.append, id, "a"), partial(store.append_many, id, ["a"] * 2)]
        for call in [*calls, partial(store.complete, id)]:
            with pytest.raises(psycopg.errors.RaiseException, match="at the commit"):
                await call()
        for error in await async_gather(*[partial(store.append, id, "a")] * 3, errors=True):
            assert isinstance(error, psycopg.errors.RaiseException)
        assert await store.get_status(id) == ("active", None, 0)


class LosesReplies:
    """A client that loses the reply to its next statement if `loses_next` is set."""

    connection_errors = (ConnectionError,)

    def __init__(self, pool):
        self.pool = pool
        self.loses_next = False

    async def query(self, sql, params):
        async with self.pool.connection() as connection:
            rows = await (await psycopg.AsyncRawCursor(connection).execute(sql, params)).fetchall()
        if self.loses_next and "pg_notify" not in sql:
            self.loses_next = False
            raise ConnectionError("the reply was lost")
        return rows


async def test_retry_after_a_lost_reply(dsn, tables):
    async with (
        AsyncConnectionPool(dsn, min_size=1, max_size=2, kwargs={"autocommit": True}, open=False) as pool,
        AsyncPostgresStreamStore(dsn, **tables, poll_interval=3600) as other,
    ):
        client = LosesReplies(pool)
        store = AsyncPostgresStreamStore(client, **tables)
        id = await store.create()
        async with AsyncBackground(partial(collect, other, id)) as reader:
            await async_sleep(0.2)
            for call in (
                partial(store.append, id, "a", expected_seq=1),
                partial(store.append_many, id, ["b", "c"], expected_seq=2),
                partial(store.complete, id),
            ):
                client.loses_next = True
                with pytest.raises(ConnectionError):
                    await call()
                # The retry also sends the notification of the lost call.
                assert await call() in (1, 3, False)
            assert await reader.result() == [(1, "a"), (2, "b"), (3, "c")]
        await store.close()


async def test_stores_with_different_ttls(dsn, tables):
    async with (
        AsyncPostgresStreamStore(dsn, **tables, ttl=60) as short,
        AsyncPostgresStreamStore(dsn, **tables, ttl=86400) as long,
    ):
        await short.create("new")
        await short.create("written")
        await short.append("written", "a")
        assert await long.fail_abandoned(30) == []
        await async_sleep(0.3)
        assert await long.fail_abandoned(30) == []
        assert sorted(await long.fail_abandoned(0.2)) == ["new", "written"]


async def test_list_with_an_expiry_out_of_range(dsn, tables):
    async with (
        AsyncPostgresStreamStore(dsn, **tables) as store,
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin,
    ):
        insert = psycopg.sql.SQL("INSERT INTO {} (id, expires_at) VALUES (%s, %s)").format(tables["status_table"])
        for id, expires_at in (("a", 2**63 - 1), ("b", -(2**63)), ("c", -1)):
            await admin.execute(insert, [id, expires_at])
        assert [info.expires_at.year for info in [info async for info in store.list()]] == [9999, 1, 1969]
