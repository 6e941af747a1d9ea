"""The option `timeout`: no statement, and no wait for a connection of the pool, takes longer."""

from __future__ import annotations

import inspect
from functools import partial

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool
from support.clients import CoroutineClient, PlainClient
from support.concurrency import AsyncBackground, async_gather, async_sleep

from aibind_postgres import AsyncPostgresConversationStore, AsyncPostgresStreamStore

UNANSWERED = "has not answered within the timeout"


@pytest.fixture
async def blocked(dsn, tables):
    """A stream whose row another transaction holds, and that transaction: a server that takes its time."""
    async with AsyncPostgresStreamStore(dsn, **tables) as store, await psycopg.AsyncConnection.connect(dsn) as other:
        id = await store.create()
        row = psycopg.sql.SQL("SELECT FROM {} FOR UPDATE").format(tables["status_table"])
        await other.execute(row)
        yield id, other


async def test_a_statement_that_is_not_answered_is_given_up(dsn, tables, blocked):
    id, other = blocked
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, timeout=0.2, **tables) as store:
            with pytest.raises(psycopg.OperationalError, match=UNANSWERED):
                await store.append(id, "a", expected_seq=1)
        await other.rollback()
        # The pool has another connection in its place, and nothing is left of that statement in it.
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            assert await store.append(id, "a", expected_seq=1) == 1
            assert await store.get_status(id) == ("active", None, 1)


async def test_what_is_given_up_does_not_fill_the_server(dsn, tables, blocked):
    id, _ = blocked
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'given up'"
    ours = make_conninfo(dsn, application_name="given up")
    async with AsyncPostgresStreamStore(ours, timeout=0.1, **tables) as store:

        async def call():
            for _ in range(5):
                with pytest.raises(psycopg.OperationalError):
                    await store.complete(id)

        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
            await async_gather(*[call] * 10)
            cursor = await admin.execute(sessions)
            [(number,)] = await cursor.fetchall()
            assert number <= 20  # of 50: the pool's, and those that are just being ended


async def test_a_stream_writer_gets_over_it(dsn, tables, blocked):
    id, other = blocked
    async with AsyncPostgresStreamStore(dsn, timeout=0.2, **tables) as store, store.writer(id) as writer:
        await writer.write("a")
        async with AsyncBackground(writer.flush) as flushing:
            await async_sleep(0.7)
            await other.rollback()
            assert await flushing.result() == 1


async def test_the_wait_for_a_connection_counts(dsn, tables):
    async with (
        AsyncConnectionPool(dsn, min_size=1, max_size=1, timeout=3600, open=False) as pool,
        AsyncPostgresStreamStore(pool, timeout=0.2, **tables) as store,
    ):
        async with pool.connection():
            with pytest.raises(psycopg.OperationalError):
                await store.get_status("s")


async def test_the_callers_own_connection_is_closed(dsn, tables, blocked):
    id, _ = blocked
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        store = AsyncPostgresStreamStore(connection, timeout=0.2, **tables)
        with pytest.raises(psycopg.OperationalError, match=UNANSWERED):
            await store.complete(id)
        assert connection.closed


async def test_the_callers_own_connection_stays_open_if_it_was_busy_with_something_else(dsn, tables):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        store = AsyncPostgresStreamStore(connection, timeout=0.2, **tables)
        await store.get_status("nothing")
        async with AsyncBackground(partial(connection.execute, "SELECT pg_sleep(1)")):
            await async_sleep(0.2)
            with pytest.raises(psycopg.OperationalError, match="was not sent"):
                await store.create("s")
        async with AsyncPostgresStreamStore(connection, **tables) as patient:
            assert await patient.get_status("s") is None


async def test_conversations_have_it_too(dsn, conversations):
    async with (
        AsyncPostgresConversationStore(dsn, table=conversations) as patient,
        AsyncPostgresConversationStore(dsn, table=conversations, timeout=0.2) as store,
        await psycopg.AsyncConnection.connect(dsn) as other,
    ):
        async with patient.edit("s") as chat:
            chat.append({"role": "user"})
        await other.execute(psycopg.sql.SQL("SELECT FROM {} FOR UPDATE").format(conversations))
        with pytest.raises(psycopg.OperationalError, match=UNANSWERED):
            await store.touch("s")
        await other.rollback()
        assert await patient.touch("s")


async def test_what_comes_in_time_is_not_disturbed(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, timeout=60, **tables) as store:
        id = await store.create()
        texts = ["x" * 1000] * 5000
        assert await store.append_many(id, texts) == 5000
        await store.complete(id)
        assert [chunk.data async for chunk in store.read_from(id)] == texts


@pytest.mark.parametrize(("timeout", "error"), [(0, ValueError), (-1, ValueError), ("1", TypeError), (True, TypeError)])
def test_what_is_no_time_is_refused(timeout, error):
    with pytest.raises(error, match="timeout"):
        AsyncPostgresStreamStore("", timeout=timeout)


def test_other_drivers_have_their_own():
    """And a client of the other flavour is none at all."""
    clients = [CoroutineClient(), PlainClient()]
    if not inspect.iscoroutinefunction(AsyncPostgresStreamStore.create):
        clients.reverse()
    for client, error in zip(clients, [ValueError, TypeError], strict=True):
        with pytest.raises(error, match=r"driver|flavour"):
            AsyncPostgresStreamStore(client, timeout=1)
