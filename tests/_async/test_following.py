"""Readers of one stream in one process share fetches, and each gets every chunk once."""

from __future__ import annotations

import builtins
import random
from functools import partial

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until
from support.recording import AsyncRecordingConnectionClient, AsyncRecordingPoolClient

from aibind_postgres import (
    AsyncPostgresStreamStore,
    InvalidDataError,
    StoreClosedError,
    StreamNotFoundError,
    _stream_tail,
)
from aibind_postgres._notifications import digest_of
from aibind_postgres._stream_tail import SHARED_PAGE_CHUNKS

NEVER = 3600  # a poll_interval: every change arrives by a notification


@pytest.fixture
async def client(dsn):
    async with AsyncConnectionPool(
        dsn, kwargs={"autocommit": True}, min_size=1, max_size=10, timeout=10, open=False
    ) as pool:
        yield AsyncRecordingPoolClient(pool, None)


@pytest.fixture
async def store(client, tables):
    async with AsyncPostgresStreamStore(client, **tables, poll_interval=NEVER, retry_for=0.2) as store:
        yield store


async def collect(store, id, after_seq=0):
    return [tuple(chunk) async for chunk in store.read_from(id, after_seq)]


async def all_waiting(client, number):
    """Wait until `number` readers have caught up since the start, and all of them wait."""
    await async_until(lambda: len(client.reads) >= number and client.is_quiet())


@pytest.mark.parametrize("writer", ["same store", "other store"])
async def test_many_readers_share_one_fetch_per_change(store, other, client, writer):
    id = await store.create()
    async with AsyncBackground(partial(async_gather, *[partial(collect, store, id)] * 50)) as readers:
        await all_waiting(client, 50)
        await async_sleep(0.1)
        client.fetches.clear()
        for number in range(1, 21):
            await (store if writer == "same store" else other).append(id, f"{number}")
            await async_until(client.is_quiet)
        await (store if writer == "same store" else other).complete(id)
        results = await readers.result()
    assert results == [[(number, f"{number}") for number in range(1, 21)]] * 50
    assert len(client.fetches) <= 21


async def test_foreign_notifications_cause_no_reads(store, other, client, dsn, tables):
    id = await store.create()
    channel = tables["status_table"]._obj[-1]
    async with AsyncBackground(partial(collect, store, id)) as reader:
        await all_waiting(client, 1)
        client.fetches.clear()
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as stranger:
            for payload in ("", "null", f'{{"ids": ["{id}"]}}', id, f"- {digest_of('another')}", "[" * 7999) * 60:
                await stranger.execute("SELECT pg_notify(%s, %s)", [channel, payload])
        await other.append(id, "a")  # notifications arrive in order
        await async_until(lambda: client.fetches)
        await async_until(client.is_quiet)
        assert len(client.fetches) == 1
        await other.complete(id)
        assert await reader.result() == [(1, "a")]


async def test_readers_of_many_streams_share_statements(store, client):
    ids = [await store.create() for _ in range(30)]
    async with AsyncBackground(partial(async_gather, *[partial(collect, store, id) for id in ids])) as readers:
        await all_waiting(client, 30)

        async def write(id):
            for number in range(20):
                await store.append(id, f"{id} {number}")
            await store.complete(id)

        await async_gather(*[partial(write, id) for id in ids])
        results = await readers.result()
    assert results == [[(number + 1, f"{id} {number}") for number in range(20)] for id in ids]
    assert max(map(len, client.fetches)) > 1


async def test_readers_of_every_speed_get_each_chunk_once(store, other, monkeypatch):
    monkeypatch.setattr(_stream_tail, "TAIL_CHUNKS", 20)
    rng = random.Random(5)
    id = await store.create()

    async def read(pause):
        numbers = []
        async for chunk in store.read_from(id):
            numbers.append(chunk.seq)
            if pause:
                await async_sleep(pause * rng.random())
        return numbers

    async def write():
        for number in range(300):
            await (store if number % 3 else other).append_many(id, ["x"] * rng.choice([1, 1, 1, 30]))
            await async_sleep(0.002 * rng.random())
        return await store.complete(id)

    *numbers, _ = await async_gather(*[partial(read, pause) for pause in (0, 0, 0.0005, 0.001, 0.002)], write)
    total = (await store.get_status(id)).total_chunks
    assert numbers == [list(range(1, total + 1))] * 5


async def test_more_than_a_page_at_once(store, client):
    id = await store.create()
    async with AsyncBackground(partial(async_gather, *[partial(collect, store, id)] * 3)) as readers:
        await all_waiting(client, 3)
        client.fetches.clear()
        await store.append_many(id, ["x"] * (SHARED_PAGE_CHUNKS * 3 + 7))
        await async_until(lambda: client.fetches and client.is_quiet())
        await store.append_many(id, ["x"] * SHARED_PAGE_CHUNKS)
        await store.complete(id)
        for chunks in await readers.result():
            assert [seq for seq, _ in chunks] == list(range(1, SHARED_PAGE_CHUNKS * 4 + 8))


async def test_replaced_stream_ends_only_its_old_readers(store, other, client):
    id = await store.create()
    await store.append_many(id, ["old"] * 5)
    async with AsyncBackground(partial(async_gather, *[partial(collect, store, id)] * 3, errors=True)) as readers:
        await all_waiting(client, 3)
        await other.delete(id)
        await other.create(id)
        await other.append(id, "new")
        assert {type(error) for error in await readers.result()} == {StreamNotFoundError}
    client.reads.clear()
    async with AsyncBackground(partial(collect, store, id)) as reader:
        await all_waiting(client, 1)
        await other.complete(id)
        assert await reader.result() == [(1, "new")]


async def paused(store, id, chunks):
    """Return a reader that has read this number of chunks and is still subscribed."""
    reader = store.read_from(id)
    for _ in range(chunks):
        await reader.__anext__()
    return reader


@pytest.mark.parametrize("where", ["same store", "other store"])
async def test_new_reader_of_a_new_stream_gets_no_old_chunks(store, other, client, where):
    id = await store.create()
    await store.append_many(id, ["old 1", "old 2"])
    async with AsyncBackground(partial(paused, store, id, 5)) as pausing:
        await all_waiting(client, 1)
        await store.append_many(id, [f"OLD {number}" for number in range(3, 11)])
        old_reader = await pausing.result()
        await (store if where == "same store" else other).delete(id)
        await other.create(id)
        await other.append_many(id, ["new 1", "new 2", "new 3"])
        client.reads.clear()
        async with AsyncBackground(partial(collect, store, id)) as reader:
            await all_waiting(client, 1)
            await other.append(id, "new 4")
            await other.complete(id)
            assert await reader.result() == [(number, f"new {number}") for number in range(1, 5)]
        del old_reader


async def test_end_of_an_old_stream_does_not_end_a_new_one(store, other, client):
    id = await store.create()
    await store.append_many(id, ["a", "b"])
    async with AsyncBackground(partial(paused, store, id, 3)) as pausing:
        await all_waiting(client, 1)
        await store.append(id, "c")
        await store.complete(id)
        old_reader = await pausing.result()
        await other.delete(id)
        await other.create(id)
        with pytest.raises(TimeoutError):
            await store.wait(id, timeout=0.2)
        client.reads.clear()
        async with AsyncBackground(partial(collect, store, id)) as reader:
            await all_waiting(client, 1)
            await other.append(id, "new")
            await other.complete(id)
            assert await reader.result() == [(1, "new")]
        del old_reader


async def test_slow_reader_of_an_old_stream_does_not_continue_in_a_new_one(store, client):
    id = await store.create()
    await store.append_many(id, ["a", "b", "c"])
    reader = store.read_from(id)
    assert (await reader.__anext__()).data == "a"
    await store.delete(id)
    await store.create(id)
    client.reads.clear()
    async with AsyncBackground(partial(collect, store, id)) as other_reader:
        await all_waiting(client, 1)
        await store.append(id, "new")
        assert [(await reader.__anext__()).data, (await reader.__anext__()).data] == ["b", "c"]
        with pytest.raises(StreamNotFoundError):
            await reader.__anext__()
        await store.complete(id)
        assert await other_reader.result() == [(1, "new")]


async def test_reader_between_pages_does_not_continue_in_a_new_stream(store):
    id = await store.create()
    await store.append_many(id, ["old"] * 70)
    reader = await paused(store, id, 50)
    await store.delete(id)
    await store.create(id)
    await store.append_many(id, ["new"] * 90)
    with pytest.raises(StreamNotFoundError):
        await reader.__anext__()


async def test_unreadable_text_affects_only_its_own_stream(dsn, tables, other):
    async with AsyncConnectionPool(
        dsn, kwargs={"autocommit": True, "client_encoding": "LATIN1"}, min_size=1, open=False
    ) as pool:
        client = AsyncRecordingPoolClient(pool, None)
        async with AsyncPostgresStreamStore(client, **tables) as store:
            ids = [await other.create() for _ in range(10)]
            calls = [partial(collect, store, id) for id in ids]
            async with AsyncBackground(partial(async_gather, *calls, errors=True)) as readers:
                await all_waiting(client, 10)
                await async_gather(*[partial(other.append, id, "€" if id == ids[3] else "ä") for id in ids])
                await async_gather(*[partial(other.complete, id) for id in ids])
                results = await readers.result()
            assert isinstance(results.pop(3), InvalidDataError)
            assert results == [[(1, "ä")]] * 9


@pytest.mark.parametrize("kind", [psycopg.OperationalError, TimeoutError])  # asyncpg raises TimeoutError
async def test_failed_fetch_raises_in_every_waiting_reader(store, other, client, kind):
    id = await store.create()
    async with AsyncBackground(partial(async_gather, *[partial(collect, store, id)] * 5, errors=True)) as readers:
        await all_waiting(client, 5)
        client.read_error = kind("the server is gone")
        await other.append(id, "x")
        errors = await readers.result()
    assert {(type(error), str(error)) for error in errors} == {(kind, "the server is gone")}
    assert len(set(map(builtins.id, errors))) == 5
    client.read_error = None
    await store.complete(id)
    assert await collect(store, id) == [(1, "x")]


async def test_close_raises_in_every_waiting_reader(client, tables):
    store = AsyncPostgresStreamStore(client, **tables)
    id = await store.create()
    calls = [partial(collect, store, id)] * 5 + [partial(store.wait, id)] * 3
    async with AsyncBackground(partial(async_gather, *calls, errors=True)) as readers:
        await all_waiting(client, 8)
        await store.close()
        assert {type(error) for error in await readers.result()} == {StoreClosedError}


async def test_readers_and_waits_together(store, other, client):
    id = await store.create()
    calls = [partial(collect, store, id)] * 3 + [partial(store.wait, id)] * 3
    async with AsyncBackground(partial(async_gather, *calls)) as running:
        await all_waiting(client, 6)
        for number in range(1, 11):
            await other.append(id, f"{number}")
        await other.fail(id, "why")
        results = await running.result()
    assert results[:3] == [[(number, f"{number}") for number in range(1, 11)]] * 3
    assert results[3:] == [("error", "why", 10)] * 3


async def test_readers_on_a_callers_connection_share_no_fetch(dsn, tables):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        client = AsyncRecordingConnectionClient(connection, None)
        async with AsyncPostgresStreamStore(client, **tables, poll_interval=NEVER) as store:
            id = await store.create()
            async with connection.transaction(force_rollback=True):
                await store.append(id, "rolled back")
                assert [chunk.data async for chunk in store.read_from(id, follow=False)] == ["rolled back"]
            client.reads.clear()
            async with AsyncBackground(partial(async_gather, *[partial(collect, store, id)] * 10)) as readers:
                await all_waiting(client, 10)
                client.fetches.clear()
                await store.append(id, "x")
                await store.complete(id)
                assert await readers.result() == [[(1, "x")]] * 10
            assert len(client.fetches) >= 10
