"""A server that is read-only for some time: calls that retry succeed afterwards, and no read-only session is kept."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until
from support.sessions import read_only_sessions

from aibind_postgres import AsyncPostgresConversationStore, AsyncPostgresStreamStore, StreamWriteError


async def raises_read_only(call):
    """Repeat a call until it meets a read-only session: it may first meet a lost connection."""
    while True:
        try:
            await call()
        except psycopg.errors.ReadOnlySqlTransaction:
            return
        except psycopg.OperationalError:
            pass
        await async_sleep(0.01)


async def succeeds_soon(call):
    for _ in range(300):
        try:
            return await call()
        except psycopg.errors.ReadOnlySqlTransaction:
            await async_sleep(0.01)
    raise AssertionError("the client has kept its read-only sessions")


async def test_read_only_sessions_are_replaced(database):
    async with AsyncConnectionPool(database, min_size=3, timeout=10, open=False) as pool:
        async with AsyncPostgresStreamStore(database) as store, AsyncPostgresConversationStore(pool) as chats:
            ids = [await store.create() for _ in range(4)]
            entered, read_only = [], []

            async def write(id):
                async with store.writer(id) as writer:
                    entered.append(id)
                    await async_until(lambda: read_only)
                    await writer.write("a")

            async with AsyncBackground(partial(async_gather, *(partial(write, id) for id in ids[1:]))) as writing:
                await async_until(lambda: len(entered) == 3)
                with read_only_sessions(database):
                    read_only.append(True)
                    await raises_read_only(partial(store.append, ids[0], "refused"))
                    await raises_read_only(partial(chats.touch, "session"))
                    assert await store.get_status(ids[0]) == ("active", None, 0)
                await succeeds_soon(partial(store.append, ids[0], "a"))
                await succeeds_soon(partial(chats.touch, "session"))
                await writing.result()
            assert [await store.get_status(id) for id in ids[1:]] == [("done", None, 1)] * 3


async def test_server_that_stays_read_only_raises_the_error_of_the_driver(database):
    async with AsyncPostgresStreamStore(database, retry_for=0.2) as store:
        id = await store.create()
        with pytest.raises(StreamWriteError) as caught:
            async with store.writer(id) as writer:
                with read_only_sessions(database):
                    await raises_read_only(partial(store.append, id, "refused"))
                    await writer.write("a")
                    await writer.flush()
    assert isinstance(caught.value.__cause__, (psycopg.errors.ReadOnlySqlTransaction, StreamWriteError))
