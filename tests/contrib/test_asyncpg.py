"""asyncpg's pools and connections as clients."""

from __future__ import annotations

import json

import asyncpg
import pytest
from contrib import contract
from psycopg.conninfo import make_conninfo
from support.concurrency import AsyncBackground, async_gather, async_sleep

from aibind_postgres import AsyncPostgresConversationStore, AsyncPostgresStreamStore, StreamNotFoundError
from aibind_postgres.adapters import wrap_asyncpg

names_of_all_kinds = pytest.mark.parametrize("tables", ["plain", "quotes", "formats"], indirect=True)


@pytest.fixture
def arguments(dsn):
    return contract.parameters(dsn, dbname="database")


@pytest.fixture
async def pool(arguments):
    pool = await asyncpg.create_pool(**arguments, min_size=0, max_size=4)
    yield pool
    pool.terminate()  # `close` of asyncpg 0.29 may wait forever for connections that the server has closed


@pytest.fixture
async def connection(arguments):
    connection = await asyncpg.connect(**arguments)
    yield connection
    await connection.close()


@pytest.fixture
async def theirs(dsn, tables):
    async with AsyncPostgresStreamStore(make_conninfo(dsn, application_name="stays"), **tables) as store:
        yield store


@names_of_all_kinds
async def test_round_trip(pool, tables):
    async with AsyncPostgresStreamStore(wrap_asyncpg(pool), **tables) as store:
        await contract.async_round_trip(store, wrap_asyncpg(pool), tables)


@pytest.mark.parametrize("conversations", ["plain", "quotes", "formats"], indirect=True)
async def test_conversation_store(pool, connection, conversations):
    for client in (pool, connection):
        async with AsyncPostgresConversationStore(wrap_asyncpg(client), table=conversations) as store:
            await contract.async_check_conversations(store, wrap_asyncpg(client))


async def test_round_trip_on_a_connection(connection, tables):
    async with AsyncPostgresStreamStore(wrap_asyncpg(connection), **tables) as store:
        await contract.async_round_trip(store, wrap_asyncpg(connection), tables)


async def test_round_trip_on_a_connection_of_a_pool(pool, tables):
    async with pool.acquire() as connection, AsyncPostgresStreamStore(wrap_asyncpg(connection), **tables) as store:
        await contract.async_round_trip(store, wrap_asyncpg(connection), tables)


@pytest.mark.parametrize("kind", ["pool", "connection"])
async def test_housekeeping(kind, pool, connection, tables, conversations, caplog):
    client = wrap_asyncpg({"pool": pool, "connection": connection}[kind])
    async with (
        AsyncPostgresStreamStore(client, **tables, ttl=0.001) as store,
        AsyncPostgresConversationStore(client, table=conversations, ttl=0.001) as chats,
    ):
        await contract.async_check_housekeeping(store, chats, caplog)


@pytest.mark.parametrize("kind", ["pool", "connection"])
async def test_following(request, kind, pool, connection, theirs, tables):
    client = {"pool": pool, "connection": connection}[kind]
    async with AsyncPostgresStreamStore(wrap_asyncpg(client), **tables, poll_interval=0.05) as store:
        await contract.async_check_following(store, theirs)


async def test_reader_after_lost_connections(pool, theirs, tables, dsn):
    async with AsyncPostgresStreamStore(wrap_asyncpg(pool), **tables, poll_interval=0.05) as store:
        await contract.async_check_reconnect(store, theirs, dsn)


async def test_read_only_sessions_are_replaced(pool, tables, dsn):
    async with AsyncPostgresStreamStore(wrap_asyncpg(pool), **tables, poll_interval=0.05) as store:
        await contract.async_check_read_only(store, dsn)


async def test_no_server_is_writable_for_some_time(arguments, tables, dsn):
    async with asyncpg.create_pool(**arguments, min_size=0, target_session_attrs="read-write") as pool:
        async with AsyncPostgresStreamStore(wrap_asyncpg(pool), **tables) as store:
            await contract.async_check_read_only(store, dsn, contract.NO_CODE)


async def test_lost_connection_of_the_caller_raises_without_retries(connection, tables, dsn):
    async with AsyncPostgresStreamStore(wrap_asyncpg(connection), **tables, retry_for=3600) as store:
        id = await store.create()
        connection.terminate()
        with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresConnectionError)):
            await anext(store.read_from(id))


async def test_closed_pool_raises_without_retries(pool, tables):
    async with AsyncPostgresStreamStore(wrap_asyncpg(pool), **tables, retry_for=3600) as store:
        id = await store.create()
        await pool.close()
        with pytest.raises(asyncpg.InterfaceError, match="clos"):
            await anext(store.read_from(id))


@pytest.mark.parametrize("kept", [True, False], ids=["committed", "rolled back"])
async def test_transaction(connection, theirs, tables, kept):
    id = await theirs.create()
    async with AsyncPostgresStreamStore(wrap_asyncpg(connection), **tables) as store:
        transaction = connection.transaction()
        await transaction.start()
        assert await store.append(id, "in a transaction") == 1
        await store.create("inside")
        assert await theirs.get_status(id) == ("active", None, 0)
        await (transaction.commit() if kept else transaction.rollback())
    if kept:
        assert await theirs.get_status(id) == ("active", None, 1)
        assert await theirs.stop("inside") is True
    else:
        assert await theirs.get_status(id) == ("active", None, 0)
        with pytest.raises(StreamNotFoundError):
            await theirs.stop("inside")


async def test_commit_wakes_readers_of_other_stores(connection, dsn, tables):
    async with (
        AsyncPostgresStreamStore(dsn, **tables, poll_interval=60) as reading,
        AsyncPostgresStreamStore(wrap_asyncpg(connection), **tables) as writing,
    ):
        id = await writing.create()

        async def follow():
            return [chunk async for chunk in reading.read_from(id)]

        async with AsyncBackground(follow) as reader:
            await async_sleep(1)
            async with connection.transaction():
                await writing.append(id, "one")
                await writing.complete(id)
            assert await reader.result() == [(1, "one")]


async def test_many_readers_share_one_connection(arguments, theirs, tables):
    async with asyncpg.create_pool(**arguments, min_size=1, max_size=1) as pool:
        async with AsyncPostgresStreamStore(wrap_asyncpg(pool), **tables, poll_interval=0.05) as store:
            id = await theirs.create()

            async def follow():
                return [chunk async for chunk in store.read_from(id)]

            async with AsyncBackground(lambda: async_gather(*[follow] * 20)) as readers:
                for number in range(50):
                    await theirs.append(id, f"{number}")
                await theirs.complete(id)
                expected = list(enumerate(map(str, range(50)), start=1))
                assert await readers.result() == [expected] * 20


async def test_custom_json_codecs(arguments, tables):
    async def configure(connection):
        for kind in ("json", "jsonb"):
            await connection.set_type_codec(kind, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")

    async with asyncpg.create_pool(**arguments, min_size=0, init=configure) as pool:
        async with AsyncPostgresStreamStore(wrap_asyncpg(pool), **tables) as store:
            await contract.async_round_trip(store, wrap_asyncpg(pool), tables)


async def test_missing_table(pool):
    await contract.async_missing_tables(wrap_asyncpg(pool))


@pytest.mark.parametrize("name", contract.NAMES)
async def test_hostile_names(pool, schema_name, name):
    await contract.async_hostile_names(wrap_asyncpg(pool), contract.hostile(schema_name, name))


async def test_invalid_client(dsn):
    with pytest.raises(TypeError, match="asyncpg Pool or Connection"):
        wrap_asyncpg(dsn)
