"""The option `timeout` limits each statement, including the wait for a connection of the pool."""

from __future__ import annotations

import inspect
from functools import partial

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool
from support.clients import CoroutineClient, PlainClient
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until

from aibind_postgres import AsyncPostgresConversationStore, AsyncPostgresStreamStore

UNANSWERED = "has not answered within the timeout"


@pytest.fixture
async def blocked(dsn, tables):
    """A stream with a locked row, and the connection of the transaction that holds the lock."""
    async with AsyncPostgresStreamStore(dsn, **tables) as store, await psycopg.AsyncConnection.connect(dsn) as other:
        id = await store.create()
        row = psycopg.sql.SQL("SELECT 1 FROM {} WHERE id = %s FOR UPDATE").format(tables["status_table"])
        await other.execute(row, [id])
        yield id, other


async def test_unanswered_statement_raises(dsn, tables, blocked):
    id, other = blocked
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        await pool.wait()
        async with AsyncPostgresStreamStore(pool, timeout=0.2, **tables) as store:
            with pytest.raises(psycopg.OperationalError, match=UNANSWERED):
                await store.append(id, "a", expected_seq=1)
        await other.rollback()
        # The pool has replaced the connection, and the statement has no effect.
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            assert await store.append(id, "a", expected_seq=1) == 1
            assert await store.get_status(id) == ("active", None, 1)


async def test_abandoned_statements_do_not_occupy_the_servers_connections(dsn, tables, blocked):
    id, _ = blocked
    sessions = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'abandoned'"
    )
    ours = make_conninfo(dsn, application_name="abandoned")
    async with AsyncPostgresStreamStore(ours, timeout=0.1, **tables) as store:

        async def call():
            for _ in range(5):
                with pytest.raises(psycopg.OperationalError):
                    await store.complete(id)

        with psycopg.connect(dsn, autocommit=True) as admin:
            await async_gather(*[call] * 10)
            # Of 50 calls the connections of the pool are left, once the server has ended the others.
            await async_until(lambda: admin.execute(sessions).fetchone()[0] <= 10)


async def test_stream_writer_retries(dsn, tables, blocked):
    id, other = blocked
    async with AsyncConnectionPool(dsn, min_size=1, max_size=4, open=False) as pool:
        await pool.wait()
        async with AsyncPostgresStreamStore(pool, timeout=0.2, **tables) as store, store.writer(id) as writer:
            await writer.write("a")
            async with AsyncBackground(writer.flush) as flushing:
                await async_until(lambda: pool.get_stats().get("returns_bad", 0) >= 2)  # after two attempts
                await other.rollback()
                assert await flushing.result() == 1


async def test_wait_for_a_connection(dsn, tables):
    async with (
        AsyncConnectionPool(dsn, min_size=1, max_size=1, timeout=3600, open=False) as pool,
        AsyncPostgresStreamStore(pool, timeout=0.2, **tables) as store,
    ):
        async with pool.connection():
            with pytest.raises(psycopg.OperationalError):
                await store.get_status("s")


async def test_callers_connection_is_closed(dsn, tables, blocked):
    id, _ = blocked
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        store = AsyncPostgresStreamStore(connection, timeout=0.2, **tables)
        with pytest.raises(psycopg.OperationalError, match=UNANSWERED):
            await store.complete(id)
        assert connection.closed


async def test_callers_busy_connection_stays_open(dsn, tables, blocked):
    _, other = blocked
    wait_for_lock = psycopg.sql.SQL("SELECT FROM {} FOR UPDATE").format(tables["status_table"])
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        store = AsyncPostgresStreamStore(connection, timeout=0.5, **tables)
        await store.get_status("nothing")
        async with AsyncBackground(partial(connection.execute, wait_for_lock)):
            await async_until(lambda: connection.info.transaction_status == TransactionStatus.ACTIVE)
            async with AsyncBackground(partial(store.create, "s")) as creating:
                await async_sleep(1)  # longer than the timeout: the call finds the connection busy all the time
                await other.rollback()
                with pytest.raises(psycopg.OperationalError, match="was not sent"):
                    await creating.result()
        async with AsyncPostgresStreamStore(connection, **tables) as unlimited:
            assert await unlimited.get_status("s") is None


async def test_conversation_store(dsn, conversations):
    async with (
        AsyncPostgresConversationStore(dsn, table=conversations) as unlimited,
        AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool,
        AsyncPostgresConversationStore(pool, table=conversations, timeout=0.2) as store,
        await psycopg.AsyncConnection.connect(dsn) as other,
    ):
        await pool.wait()
        async with unlimited.edit("s") as chat:
            chat.append({"role": "user"})
        await other.execute(psycopg.sql.SQL("SELECT 1 FROM {} WHERE session_id = 's' FOR UPDATE").format(conversations))
        with pytest.raises(psycopg.OperationalError, match=UNANSWERED):
            await store.touch("s")
        await other.rollback()
        assert await unlimited.touch("s")


async def test_statements_within_the_timeout(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, timeout=60, **tables) as store:
        id = await store.create()
        texts = ["x" * 1000] * 5000
        assert await store.append_many(id, texts) == 5000
        await store.complete(id)
        assert [chunk.data async for chunk in store.read_from(id)] == texts


@pytest.mark.parametrize(("timeout", "error"), [(0, ValueError), (-1, ValueError), ("1", TypeError), (True, TypeError)])
def test_invalid_timeout(timeout, error):
    with pytest.raises(error, match="timeout"):
        AsyncPostgresStreamStore("", timeout=timeout)


def test_clients_without_timeout():
    """A client of another driver takes no timeout; a client of the other flavour is rejected."""
    clients = [CoroutineClient(), PlainClient()]
    if not inspect.iscoroutinefunction(AsyncPostgresStreamStore.create):
        clients.reverse()
    for client, error in zip(clients, [ValueError, TypeError], strict=True):
        with pytest.raises(error, match=r"driver|flavour"):
            AsyncPostgresStreamStore(client, timeout=1)
