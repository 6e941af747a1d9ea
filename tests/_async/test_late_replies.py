"""Replies of the server that come late or are lost, while other callers change the same stream."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from _async.sources import HookedClient, is_append, is_status_query
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_sleep, async_until, async_workers

from aibind_postgres import AsyncPostgresStreamStore, StreamNotFoundError
from aibind_postgres._concurrency import AsyncEvent


class LateReplies(HookedClient):
    """A client that holds the reply of statements back until `release` is set, and may then lose it."""

    def __init__(self, pool):
        super().__init__(pool)
        self.is_late = lambda sql: False
        self.is_lost = lambda sql: False
        self.replied = AsyncEvent()  # a reply is held back
        self.release = AsyncEvent()

    async def query(self, sql, params):
        rows = await super().query(sql, params)
        if self.is_late(sql):
            self.replied.set()
            assert await self.release.wait(20)
        if self.is_lost(sql):
            raise psycopg.OperationalError("the connection is lost")
        return rows


def is_delete(sql):
    return sql.lstrip().startswith("WITH deleted")


def is_read(sql):
    return "UNION ALL" in sql


def is_end(sql):
    return "SET state = $2" in sql


@pytest.fixture
async def client(dsn):
    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=1, max_size=10, open=False) as pool:
        yield LateReplies(pool)


@pytest.fixture
async def store(client, tables):
    async with AsyncPostgresStreamStore(client, **tables, poll_interval=0.05) as store:
        yield store


async def read(store, id):
    return [chunk.data async for chunk in store.read_from(id)]


async def test_late_append_reaches_no_reader_of_a_new_stream(client, store, other):
    id = await store.create()
    client.is_late = is_append
    async with AsyncBackground(partial(store.append, id, "old 1")) as late:
        assert await client.replied.wait(20)
        await store.delete(id)
        await store.create(id)
        reads = len(client.statements)
        async with AsyncBackground(partial(read, store, id)) as reader:
            await async_until(lambda: len(client.statements) > reads)
            client.release.set()
            assert await late.result() == 1
            await other.append_many(id, ["new 1", "new 2"])
            await other.complete(id)
            assert await reader.result() == ["new 1", "new 2"]


async def test_late_delete_ends_no_reader_of_a_new_stream(client, store, other):
    id = await store.create()
    await store.append(id, "old 1")
    client.is_late = is_delete
    async with AsyncBackground(partial(store.delete, id)) as late:
        assert await client.replied.wait(20)
        await other.create(id)
        await other.append(id, "new 1")
        async with AsyncBackground(partial(read, store, id)) as reader:
            await async_sleep(0.2)  # enough to read, if the reader did not wait
            client.release.set()
            assert await late.result()
            await other.append(id, "new 2")
            await other.complete(id)
            assert await reader.result() == ["new 1", "new 2"]


@pytest.mark.parametrize("deletion_has_begun", [False, True])
async def test_late_first_page_of_a_deleted_stream(client, store, deletion_has_begun):
    id = await store.create()
    await store.append_many(id, ["old 1", "old 2", "old 3"])
    begun, gate = AsyncEvent(), AsyncEvent()

    async def hold_delete(sql, params):
        if is_delete(sql):
            begun.set()
            assert await gate.wait(20)

    async def delete():
        if not deletion_has_begun:
            assert await client.replied.wait(20)
        await store.delete(id)

    client.hook = hold_delete
    client.is_late = is_read
    async with AsyncBackground(delete) as deletion:
        if deletion_has_begun:
            assert await begun.wait(20)
        async with AsyncBackground(partial(read, store, id)) as reader:
            assert await client.replied.wait(20)
            client.is_late = lambda sql: False
            gate.set()
            await deletion.result()
            await store.create(id)
            await store.append_many(id, ["new 1", "new 2", "new 3", "new 4"])
            client.release.set()
            await store.complete(id)
            assert await reader.result() == ["new 1", "new 2", "new 3", "new 4"]


async def test_readers_continue_after_a_failed_delete(client, store):
    id = await store.create()

    async def fail(sql, params):
        if is_delete(sql):
            client.replied.set()
            await client.release.wait(20)
            raise psycopg.OperationalError("no server")

    async def delete():
        with pytest.raises(psycopg.OperationalError):
            await store.delete(id)

    client.hook = fail
    async with AsyncBackground(partial(read, store, id)) as reader, AsyncBackground(delete) as deleting:
        assert await client.replied.wait(20)
        await store.append(id, "a")
        client.release.set()
        await deleting.result()
        await store.complete(id)
        assert await reader.result() == ["a"]


@pytest.mark.parametrize("change", ["append", "stop", "delete"])
async def test_change_with_a_lost_reply_wakes_readers_without_a_poll(client, tables, change):
    async with AsyncPostgresStreamStore(client, **tables, poll_interval=3600) as store:
        id = await store.create()
        await store.append(id, "a")
        received = []

        async def read():
            async for chunk in store.read_from(id):
                received.append(chunk.data)

        client.is_lost = {"append": is_append, "stop": is_end, "delete": is_delete}[change]
        async with AsyncBackground(read) as reader:
            await async_until(lambda: received == ["a"])
            with pytest.raises(psycopg.OperationalError):
                await (store.append(id, "b") if change == "append" else getattr(store, change)(id))
            if change == "append":
                await async_until(lambda: received == ["a", "b"])
                await store.complete(id)
            if change == "delete":
                with pytest.raises(StreamNotFoundError):
                    await reader.result()
            else:
                await reader.result()


async def test_repeated_delete_after_a_lost_reply_notifies(client, store):
    id = await store.create()
    client.is_lost = is_delete
    with pytest.raises(psycopg.OperationalError):
        await store.delete(id)
    client.is_lost = lambda sql: False
    sent = len(client.statements)
    assert not await store.delete(id)
    await async_until(lambda: any("pg_notify" in sql for sql in client.statements[sent:]))


async def test_stop_reaches_a_writer_whose_status_query_fails_once(client, store, other):
    id = await store.create()
    failures = ["no server", "no server"]

    async def fail(sql, params):
        if is_status_query(sql) and failures:
            raise psycopg.OperationalError(failures.pop())

    ended = []
    async with store.writer(id, on_end=ended.append):
        client.hook = fail
        await other.stop(id)
        await async_until(lambda: ended)
    assert failures == []


async def test_writer_without_a_worker_needs_no_listener(dsn, tables):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            id = await store.create()
            async with store.writer(id) as writer:
                await writer.write("a")
                assert async_workers() == []


async def test_replay_of_a_recreated_shorter_stream_raises(store):
    id = await store.create()
    await store.append_many(id, ["old"] * 60)
    seen = []
    with pytest.raises(StreamNotFoundError):
        async for chunk in store.replay(id, speed=float("inf")):
            seen.append(chunk.data)
            if len(seen) == 50:
                await store.delete(id)
                await store.create(id)
                await store.append_many(id, ["new"] * 10)
    assert seen == ["old"] * 50
