"""Statements on psycopg connections: which are prepared, what happens when they are lost, and the caller's settings."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from psycopg.adapt import Dumper, Loader
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until

from aibind_postgres import AsyncPostgresStreamStore
from aibind_postgres._statement_runner import MAX_LOSSES

PREPARED = "SELECT name, statement FROM pg_prepared_statements WHERE name LIKE 'aibind%'"


@pytest.fixture
async def connection(dsn):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=2) as connection:
        yield connection


@pytest.fixture
async def store(connection, tables):
    async with AsyncPostgresStreamStore(connection, **tables) as store:
        yield store


async def prepared(connection):
    """Return the names and texts of our prepared statements in the session."""
    return await (await connection.execute(PREPARED, prepare=False)).fetchall()


async def use(store, id, times):
    for _ in range(times):
        await store.append(id, "x")
        await store.get_status(id)


async def test_statements_are_prepared_once(connection, store, other):
    id = await other.create()
    await use(store, id, 2)
    assert await prepared(connection) == []
    await use(store, id, 5)
    names = await prepared(connection)
    assert len(names) == len({sql for _, sql in names}) >= 2
    assert await other.get_status(id) == ("active", None, 7)


async def test_nothing_is_prepared_if_psycopg_must_not(connection, store, other):
    connection.prepare_threshold = None
    await use(store, await other.create(), 10)
    assert await prepared(connection) == []


async def test_nothing_is_prepared_in_a_transaction(connection, store, other):
    id = await other.create()
    async with connection.transaction():
        await use(store, id, 10)
    assert await prepared(connection) == []
    await use(store, id, 5)
    names = await prepared(connection)
    async with connection.transaction():
        await connection.execute("DISCARD PLANS")
        await connection.execute("DEALLOCATE ALL")
        await use(store, id, 2)  # a lost statement would fail the transaction
    assert names
    assert await other.get_status(id) == ("active", None, 17)


async def test_maximum_of_prepared_statements(connection, store, other):
    connection.prepared_max = 1
    await use(store, await other.create(), 10)
    assert len(await prepared(connection)) == 1


async def test_discarded_statements(connection, store, other):
    id = await other.create()
    for losses in range(MAX_LOSSES + 3):
        await use(store, id, 5)
        assert bool(await prepared(connection)) == (losses < MAX_LOSSES)
        await connection.execute("DISCARD ALL", prepare=False)  # psycopg would lose it itself
    assert await other.get_status(id) == ("active", None, 5 * (MAX_LOSSES + 3))


async def test_pool_that_discards(dsn, tables, other):
    async def reset(connection):
        await connection.execute("DISCARD ALL", prepare=False)  # psycopg would lose it itself

    id = await other.create()
    options = {"autocommit": True, "prepare_threshold": 0}
    async with AsyncConnectionPool(dsn, kwargs=options, reset=reset, min_size=1, max_size=2, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            await use(store, id, 10)
    assert await other.get_status(id) == ("active", None, 10)


async def test_changed_column_type(connection, store, other, tables, run_sql):
    id = await other.create()
    await use(store, id, 5)
    status = tables["status_table"].as_string()
    run_sql(f"ALTER TABLE {status} ALTER COLUMN total_chunks TYPE bigint")
    await use(store, id, 5)
    assert await store.get_status(id) == ("active", None, 10)
    assert [chunk.seq async for chunk in store.read_from(id, follow=False)] == list(range(1, 11))


async def test_statement_that_an_interrupted_call_has_prepared(dsn, connection, store, other, tables):
    id = await other.create()
    await use(store, id, 5)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=0) as second:
        for name, sql in await prepared(connection):
            second.pgconn.prepare(name.encode(), sql.encode())
        async with AsyncPostgresStreamStore(second, **tables) as second_store:
            await use(second_store, id, 5)
    assert await other.get_status(id) == ("active", None, 10)


class BracketDumper(Dumper):
    def dump(self, obj):
        return f"[{obj}]".encode()


class BracketLoader(Loader):
    def load(self, data):
        return f"[{bytes(data).decode()}]"


async def test_factories_and_adapters_of_the_caller(connection, store, other):
    connection.row_factory = dict_row
    connection.adapters.register_dumper(str, BracketDumper)
    connection.adapters.register_loader("text", BracketLoader)
    connection.adapters.register_loader("integer", BracketLoader)
    id = await store.create()
    assert await store.append(id, "x") == 1
    assert await store.get_status(id) == ("active", None, 1)
    assert [chunk.data async for chunk in other.read_from(id, follow=False)] == ["x"]
    assert (await (await connection.execute("SELECT 1 AS a")).fetchone())["a"] == "[1]"


async def test_implicit_transaction_has_the_options_of_the_connection(dsn, tables, other):
    id = await other.create()
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        await connection.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
        await connection.set_read_only(True)
        await connection.set_deferrable(True)
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            assert await store.get_status(id) == ("active", None, 0)  # begins the transaction
            settings = [
                (await (await connection.execute(f"SHOW transaction_{name}")).fetchone())[0]
                for name in ("isolation", "read_only", "deferrable")
            ]
            assert settings == ["serializable", "on", "on"]
            await connection.rollback()
            await connection.set_read_only(False)
            assert await store.append(id, "x") == 1
            await connection.rollback()
    assert await other.get_status(id) == ("active", None, 0)


async def test_failed_begin(dsn, tables):
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            await store.get_status("nothing")
            await connection.rollback()
            with psycopg.connect(dsn, autocommit=True) as admin:
                pid = connection.info.backend_pid
                admin.execute("SELECT pg_terminate_backend(%s::integer)", [pid])
                session = "SELECT FROM pg_stat_activity WHERE pid = %s"
                await async_until(lambda: admin.execute(session, [pid]).fetchone() is None)
            with pytest.raises(psycopg.errors.AdminShutdown):
                await store.get_status("nothing")
            assert connection.closed


async def test_statements_of_two_stores_on_one_connection(connection, store, other, tables):
    id = await other.create()
    async with AsyncPostgresStreamStore(connection, **tables, ttl=60) as second:
        for _ in range(5):
            await store.append(id, "x")
            await second.append(id, "y")
    names = await prepared(connection)
    assert len(names) == len(set(names))
    assert await other.get_status(id) == ("active", None, 10)


async def test_one_connection_for_successive_calls(dsn, tables):
    ours = make_conninfo(dsn, application_name="successive")
    with psycopg.connect(dsn, autocommit=True) as admin:

        def sessions():
            activity = (
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"  # the other flavour has its own
            )
            return admin.execute(f"{activity} AND application_name = 'successive'").fetchall()

        async with AsyncPostgresStreamStore(ours, **tables, notify=False) as store:
            id = await store.create()
            # A pool without a free connection opens one more, for a second.
            await async_until(lambda: store.get_stats()["pool_size"] == len(sessions()) == 1)
            [before] = sessions()
            await use(store, id, 50)
            assert sessions() == [before]
            admin.execute("SELECT pg_terminate_backend(%s::integer)", before)
            await async_until(lambda: before not in sessions())
            await async_sleep(0.1)
            await use(store, id, 1)  # finds the idle connection closed, and takes another one
        await async_until(lambda: not sessions())


async def test_returned_connection_serves_a_waiting_call(dsn, tables):
    """The store keeps no connection while a call waits for one of the pool."""
    ours = make_conninfo(dsn, application_name="waiting")
    lock = psycopg.sql.SQL("SELECT FROM {} WHERE id = ANY (%s) FOR UPDATE").format(tables["status_table"])
    activity = "SELECT FROM pg_stat_activity WHERE datname = current_database()"
    blocked = f"{activity} AND application_name = 'waiting' AND wait_event_type = 'Lock'"
    async with AsyncPostgresStreamStore(ours, **tables, notify=False) as store:
        first, *others = [await store.create() for _ in range(10)]
        with psycopg.connect(dsn) as one, psycopg.connect(dsn) as nine, psycopg.connect(dsn, autocommit=True) as admin:
            one.execute(lock, [[first]])
            nine.execute(lock, [others])
            ends = partial(async_gather, *[partial(store.complete, id) for id in (first, *others)])
            async with AsyncBackground(ends) as ending:
                await async_until(lambda: len(admin.execute(blocked).fetchall()) == 10)
                async with AsyncBackground(partial(store.get_status, "nothing")) as waiting:
                    await async_sleep(0.2)  # until it waits for a connection
                    one.rollback()
                    assert await waiting.result() is None
                    nine.rollback()
                    assert await ending.result() == [True] * 10
