"""Any object with a `query` method as a client."""

from __future__ import annotations

import psycopg
import pytest
from contrib import contract
from psycopg.rows import dict_row, namedtuple_row, tuple_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    PostgresConversationStore,
    PostgresStreamStore,
)

SETTINGS = {"min_size": 1, "max_size": 4, "kwargs": {"autocommit": True}}


def as_lists(cursor):
    make = tuple_row(cursor)
    return lambda values: list(make(values))


ROWS = [tuple_row, dict_row, namedtuple_row, as_lists]


class QueryClient:
    def __init__(self, pool, rows):
        self._pool = pool
        self._rows = rows

    def query(self, sql, params):
        with self._pool.connection() as connection:
            cursor = psycopg.RawCursor(connection, row_factory=self._rows).execute(sql, params)
            return cursor.fetchall() if cursor.description else []


class ClientWithErrors(QueryClient):
    connection_errors = (psycopg.OperationalError,)


class AsyncQueryClient(QueryClient):
    async def query(self, sql, params):
        async with self._pool.connection() as connection:
            cursor = await psycopg.AsyncRawCursor(connection, row_factory=self._rows).execute(sql, params)
            return await cursor.fetchall() if cursor.description else []


class AsyncClientWithErrors(AsyncQueryClient):
    connection_errors = (psycopg.OperationalError,)


@pytest.fixture
def pool(dsn):
    with ConnectionPool(dsn, **SETTINGS, open=True) as pool:
        yield pool


@pytest.fixture
async def async_pool(dsn):
    async with AsyncConnectionPool(dsn, **SETTINGS, open=False) as pool:
        yield pool


@pytest.mark.parametrize("rows", ROWS)
def test_round_trip(pool, tables, rows):
    with PostgresStreamStore(QueryClient(pool, rows), **tables) as store:
        contract.round_trip(store, QueryClient(pool, rows), tables)


@pytest.mark.parametrize("rows", ROWS)
async def test_round_trip_in_tasks(async_pool, tables, rows):
    async with AsyncPostgresStreamStore(AsyncQueryClient(async_pool, rows), **tables) as store:
        await contract.async_round_trip(store, AsyncQueryClient(async_pool, rows), tables)


@pytest.mark.parametrize("rows", ROWS)
def test_conversation_store(pool, conversations, rows):
    with PostgresConversationStore(QueryClient(pool, rows), table=conversations) as store:
        contract.check_conversations(store, QueryClient(pool, rows))


@pytest.mark.parametrize("rows", ROWS)
async def test_conversation_store_in_tasks(async_pool, conversations, rows):
    async with AsyncPostgresConversationStore(AsyncQueryClient(async_pool, rows), table=conversations) as store:
        await contract.async_check_conversations(store, AsyncQueryClient(async_pool, rows))


@pytest.mark.parametrize("rows", ROWS)
def test_housekeeping(pool, tables, conversations, rows, caplog):
    client = QueryClient(pool, rows)
    with (
        PostgresStreamStore(client, **tables, ttl=0.001) as store,
        PostgresConversationStore(client, table=conversations, ttl=0.001) as chats,
    ):
        contract.check_housekeeping(store, chats, caplog)


@pytest.mark.parametrize("rows", ROWS)
async def test_housekeeping_in_tasks(async_pool, tables, conversations, rows, caplog):
    client = AsyncQueryClient(async_pool, rows)
    async with (
        AsyncPostgresStreamStore(client, **tables, ttl=0.001) as store,
        AsyncPostgresConversationStore(client, table=conversations, ttl=0.001) as chats,
    ):
        await contract.async_check_housekeeping(store, chats, caplog)


@pytest.mark.parametrize("rows", ROWS)
def test_following(pool, theirs, tables, rows):
    with PostgresStreamStore(QueryClient(pool, rows), **tables, poll_interval=0.05) as store:
        contract.check_following(store, theirs)


@pytest.mark.parametrize("rows", ROWS)
async def test_following_in_tasks(async_pool, async_theirs, tables, rows):
    async with AsyncPostgresStreamStore(AsyncQueryClient(async_pool, rows), **tables, poll_interval=0.05) as store:
        await contract.async_check_following(store, async_theirs)


def test_reader_after_lost_connections_with_connection_errors(pool, theirs, tables, dsn):
    with PostgresStreamStore(ClientWithErrors(pool, tuple_row), **tables, poll_interval=0.05) as store:
        contract.check_reconnect(store, theirs, dsn)


async def test_reader_after_lost_connections_with_connection_errors_in_tasks(async_pool, async_theirs, tables, dsn):
    async with AsyncPostgresStreamStore(
        AsyncClientWithErrors(async_pool, tuple_row), **tables, poll_interval=0.05
    ) as store:
        await contract.async_check_reconnect(store, async_theirs, dsn)


def test_first_error_is_raised_without_connection_errors(pool, tables, monkeypatch):
    client = QueryClient(pool, tuple_row)
    with PostgresStreamStore(client, **tables, retry_for=3600) as store:
        id = store.create()

        def fail(sql, params):
            raise psycopg.OperationalError("gone")

        monkeypatch.setattr(client, "query", fail)
        with pytest.raises(psycopg.OperationalError, match="gone"):
            list(store.read_from(id))


def test_missing_table(pool):
    contract.missing_tables(QueryClient(pool, dict_row))


async def test_missing_table_in_tasks(async_pool):
    await contract.async_missing_tables(AsyncQueryClient(async_pool, dict_row))


def test_migration(pool, schema_name):
    contract.hostile_names(QueryClient(pool, dict_row), contract.hostile(schema_name, "plain"))
