"""SQLAlchemy's engines as clients, in threads and in tasks, with several drivers."""

from __future__ import annotations

import time
from itertools import count

import psycopg
import pytest
import sqlalchemy
from contrib import contract
from contrib.contract import ending
from sqlalchemy.ext.asyncio import create_async_engine
from support.concurrency import AsyncBackground, Background, async_gather, gather, until, workers
from support.sessions import TERMINATE

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    PostgresConversationStore,
    PostgresStreamStore,
)
from aibind_postgres.adapters import wrap_sqlalchemy

names_of_all_kinds = pytest.mark.parametrize("tables", ["plain", "quotes", "formats"], indirect=True)


@pytest.fixture
def engine(dsn):
    engine = sqlalchemy.create_engine("postgresql+psycopg://", connect_args=contract.parameters(dsn))
    yield engine
    engine.dispose()


@pytest.fixture(params=["psycopg", "asyncpg"])
async def async_engine(request, dsn):
    names = {"dbname": "database"} if request.param == "asyncpg" else {}
    arguments = contract.parameters(dsn, **names)
    engine = create_async_engine(f"postgresql+{request.param}://", connect_args=arguments)
    yield engine
    await engine.dispose()


@names_of_all_kinds
def test_round_trip(engine, tables):
    with PostgresStreamStore(wrap_sqlalchemy(engine), **tables) as store:
        contract.round_trip(store, wrap_sqlalchemy(engine), tables)


@names_of_all_kinds
async def test_round_trip_in_tasks(async_engine, tables):
    async with AsyncPostgresStreamStore(wrap_sqlalchemy(async_engine), **tables) as store:
        await contract.async_round_trip(store, wrap_sqlalchemy(async_engine), tables)


@pytest.mark.parametrize("conversations", ["plain", "quotes", "formats"], indirect=True)
def test_conversation_store(engine, conversations):
    with PostgresConversationStore(wrap_sqlalchemy(engine), table=conversations) as store:
        contract.check_conversations(store, wrap_sqlalchemy(engine))


@pytest.mark.parametrize("conversations", ["plain", "quotes", "formats"], indirect=True)
async def test_conversation_store_in_tasks(async_engine, conversations):
    async with AsyncPostgresConversationStore(wrap_sqlalchemy(async_engine), table=conversations) as store:
        await contract.async_check_conversations(store, wrap_sqlalchemy(async_engine))


@names_of_all_kinds
def test_housekeeping(engine, tables, conversations, caplog):
    client = wrap_sqlalchemy(engine)
    with (
        PostgresStreamStore(client, **tables, ttl=0.001) as store,
        PostgresConversationStore(client, table=conversations, ttl=0.001) as chats,
    ):
        contract.check_housekeeping(store, chats, caplog)


async def test_housekeeping_in_tasks(async_engine, tables, conversations, caplog):
    client = wrap_sqlalchemy(async_engine)
    async with (
        AsyncPostgresStreamStore(client, **tables, ttl=0.001) as store,
        AsyncPostgresConversationStore(client, table=conversations, ttl=0.001) as chats,
    ):
        await contract.async_check_housekeeping(store, chats, caplog)


def test_following(engine, theirs, tables):
    with PostgresStreamStore(wrap_sqlalchemy(engine), **tables, poll_interval=0.05) as store:
        contract.check_following(store, theirs)


@names_of_all_kinds
async def test_following_in_tasks(async_engine, async_theirs, tables):
    async with AsyncPostgresStreamStore(wrap_sqlalchemy(async_engine), **tables, poll_interval=0.05) as store:
        await contract.async_check_following(store, async_theirs)


def test_notifications_wake_readers(engine, theirs, tables):
    with PostgresStreamStore(wrap_sqlalchemy(engine), **tables, poll_interval=3600) as store:
        contract.check_notification(store, theirs)


@pytest.mark.parametrize("async_engine", ["psycopg"], indirect=True)
async def test_notifications_wake_readers_in_tasks(async_engine, async_theirs, tables):
    async with AsyncPostgresStreamStore(wrap_sqlalchemy(async_engine), **tables, poll_interval=3600) as store:
        await contract.async_check_notification(store, async_theirs)


# Names each connection, as an event that sets a new password.
NAMED = """
SELECT application_name, query LIKE 'LISTEN%' FROM pg_stat_activity
 WHERE datname = current_database() AND application_name LIKE 'token %'
"""


def test_listen_connection_is_opened_by_the_engine(engine, theirs, tables, dsn):
    numbers = count()

    @sqlalchemy.event.listens_for(engine, "do_connect")
    def renew(dialect, record, arguments, parameters):
        parameters["application_name"] = f"token {next(numbers)}"

    with PostgresStreamStore(wrap_sqlalchemy(engine), **tables, poll_interval=3600) as store:
        id = theirs.create()
        with (
            Background(lambda: store.wait(id)),
            ending(theirs, id),
            psycopg.connect(dsn, autocommit=True) as admin,
        ):
            for _ in range(2):
                until(lambda: any(listens for _, listens in admin.execute(NAMED)))
                names = [name for name, _ in admin.execute(NAMED)]
                assert len(set(names)) == len(names)
                admin.execute(TERMINATE)
    assert "aibind_postgres-listener" not in workers()


def test_reader_after_lost_connections(engine, theirs, tables, dsn):
    with PostgresStreamStore(wrap_sqlalchemy(engine), **tables, poll_interval=0.05) as store:
        contract.check_reconnect(store, theirs, dsn)


async def test_reader_after_lost_connections_in_tasks(async_engine, async_theirs, tables, dsn):
    async with AsyncPostgresStreamStore(wrap_sqlalchemy(async_engine), **tables, poll_interval=0.05) as store:
        await contract.async_check_reconnect(store, async_theirs, dsn)


def test_read_only_sessions_are_replaced(engine, tables, dsn):
    with PostgresStreamStore(wrap_sqlalchemy(engine), **tables, poll_interval=0.05) as store:
        contract.check_read_only(store, dsn)


async def test_read_only_sessions_are_replaced_in_tasks(async_engine, tables, dsn):
    async with AsyncPostgresStreamStore(wrap_sqlalchemy(async_engine), **tables, poll_interval=0.05) as store:
        await contract.async_check_read_only(store, dsn)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_no_server_is_writable_for_some_time(dsn, tables, driver):
    arguments = contract.parameters(dsn, **({"dbname": "database"} if driver == "asyncpg" else {}))
    arguments["target_session_attrs"] = "read-write"
    engine = create_async_engine(f"postgresql+{driver}://", connect_args=arguments)
    async with AsyncPostgresStreamStore(wrap_sqlalchemy(engine), **tables) as store:
        await contract.async_check_read_only(store, dsn, contract.NO_CODE)
    await engine.dispose()


def test_many_readers_share_one_connection(dsn, theirs, tables):
    arguments = contract.parameters(dsn)
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", connect_args=arguments, pool_size=1, max_overflow=0, pool_timeout=10
    )
    with PostgresStreamStore(wrap_sqlalchemy(engine), **tables) as store:
        id = theirs.create()
        with Background(lambda: gather(*[lambda: list(store.read_from(id))] * 20)) as readers:
            for number in range(50):
                theirs.append(id, f"{number}")
                if number % 10 == 0:
                    time.sleep(0.05)
            theirs.complete(id)
            expected = list(enumerate(map(str, range(50)), start=1))
            assert readers.result() == [expected] * 20
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_many_readers_share_one_connection_in_tasks(dsn, async_theirs, tables, driver):
    arguments = contract.parameters(dsn, **({"dbname": "database"} if driver == "asyncpg" else {}))
    engine = create_async_engine(
        f"postgresql+{driver}://", connect_args=arguments, pool_size=1, max_overflow=0, pool_timeout=10
    )
    async with AsyncPostgresStreamStore(wrap_sqlalchemy(engine), **tables, poll_interval=0.05) as store:
        id = await async_theirs.create()

        async def follow():
            return [chunk async for chunk in store.read_from(id)]

        async with AsyncBackground(lambda: async_gather(*[follow] * 20)) as readers:
            for number in range(50):
                await async_theirs.append(id, f"{number}")
            await async_theirs.complete(id)
            expected = list(enumerate(map(str, range(50)), start=1))
            assert await readers.result() == [expected] * 20
    await engine.dispose()


def test_engine_keeps_its_isolation_level(engine, tables):
    with PostgresStreamStore(wrap_sqlalchemy(engine), **tables) as store:
        store.create("first")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE TEMPORARY TABLE vanishing (id int)"))
        connection.rollback()
        assert connection.scalar(sqlalchemy.text("SELECT to_regclass('vanishing')")) is None


def test_missing_table(engine):
    contract.missing_tables(wrap_sqlalchemy(engine))


async def test_missing_table_in_tasks(async_engine):
    await contract.async_missing_tables(wrap_sqlalchemy(async_engine))


@pytest.mark.parametrize("name", contract.NAMES)
def test_hostile_names(engine, schema_name, name):
    contract.hostile_names(wrap_sqlalchemy(engine), contract.hostile(schema_name, name))


@pytest.mark.parametrize("name", contract.NAMES)
async def test_hostile_names_in_tasks(async_engine, schema_name, name):
    await contract.async_hostile_names(wrap_sqlalchemy(async_engine), contract.hostile(schema_name, name))


def test_invalid_engine(engine):
    with engine.connect() as connection, pytest.raises(TypeError, match="Connection"):
        wrap_sqlalchemy(connection)
    with pytest.raises(TypeError, match="sqlite"):
        wrap_sqlalchemy(sqlalchemy.create_engine("sqlite://"))


def test_driver_errors_propagate(tables):
    arguments = {"host": "127.0.0.1", "port": 1}
    engine = sqlalchemy.create_engine("postgresql+psycopg://", connect_args=arguments)
    with PostgresStreamStore(wrap_sqlalchemy(engine), **tables, retry_for=0.2) as store:
        for call in (store.create, lambda: list(store.read_from("x"))):
            with pytest.raises(sqlalchemy.exc.OperationalError) as caught:
                call()
            assert isinstance(caught.value.orig, psycopg.OperationalError)
