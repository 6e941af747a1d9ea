"""Streams that are also changed by writers that do not notify, such as the TypeScript package."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial

import psycopg
import pytest
from _async.sources import items
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_until
from support.recording import POLL, AsyncRecordingClient, AsyncRecordingPoolClient

from aibind_postgres import AsyncDurableStream, AsyncPostgresStreamStore, StreamNotActiveError, StreamNotFoundError
from aibind_postgres._concurrency import AsyncEvent

NEVER = 3600  # seconds as poll_interval: polling wakes no reader


class AsyncSilentWriter:
    """Changes streams as the TypeScript package does: without a notification."""

    def __init__(self, connection, chunks_table, status_table):
        self._connection = connection
        self._names = {"chunks": chunks_table, "status": status_table}

    async def _execute(self, sql, *params):
        await self._connection.execute(psycopg.sql.SQL(sql).format(**self._names), params)

    async def append(self, id, chunk):
        await self._execute(
            "WITH next AS (UPDATE {status} SET total_chunks = total_chunks + 1 WHERE id = $1 RETURNING total_chunks) "
            "INSERT INTO {chunks} (id, seq, data) SELECT $1, total_chunks, $2 FROM next",
            id,
            chunk,
        )

    async def end(self, id, state="stopped"):
        await self._execute("UPDATE {status} SET state = $2 WHERE id = $1", id, state)

    async def delete(self, id):
        await self._execute("DELETE FROM {status} WHERE id = $1", id)


@pytest.fixture
async def silent(dsn, tables):
    connection = await psycopg.AsyncConnection.connect(dsn, autocommit=True, cursor_factory=psycopg.AsyncRawCursor)
    async with connection:
        yield AsyncSilentWriter(connection, **tables)


@pytest.fixture
async def client(dsn):
    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=2, open=False) as pool:
        yield AsyncRecordingPoolClient(pool, None)


@pytest.fixture
async def store(client, tables):
    async with AsyncPostgresStreamStore(client, **tables, poll_interval=NEVER) as store:
        yield store


async def read(store, id):
    """Return the chunks, and "deleted" if the stream was."""
    received = []
    with suppress(StreamNotFoundError):
        async for chunk in store.read_from(id):
            received.append(chunk.data)
        return received
    return [*received, "deleted"]


async def append(store, id):
    with pytest.raises((StreamNotActiveError, StreamNotFoundError)):
        await store.append(id, "refused")


async def append_together(store, id):
    await async_gather(*[partial(append, store, id)] * 3)


async def append_alone(store, id):
    with pytest.raises((StreamNotActiveError, StreamNotFoundError)):
        await store.append(id, "x" * 100_000)


async def stop(store, id):
    with suppress(StreamNotFoundError):
        assert not await store.stop(id)


async def get_status(store, id):
    await store.get_status(id)


async def write(store, id):
    with pytest.raises((StreamNotActiveError, StreamNotFoundError)):
        async with store.writer(id):
            pass


@pytest.mark.parametrize("call", [append, append_together, append_alone, stop, get_status, write, read])
@pytest.mark.parametrize("change", ["end", "delete"])
async def test_call_that_finds_the_end_wakes_readers(store, silent, client, change, call):
    id = await store.create()
    await store.append(id, "a")
    async with AsyncBackground(partial(async_gather, *[partial(read, store, id)] * 3)) as readers:
        await async_until(lambda: len(client.reads) == 3 and client.is_quiet())
        await getattr(silent, change)(id)
        await call(store, id)
        assert await readers.result(5) == [["a"] if change == "end" else ["a", "deleted"]] * 3


async def test_delete_that_finds_no_stream_wakes_readers(store, silent, client):
    id = await store.create()
    async with AsyncBackground(partial(read, store, id)) as reader:
        await async_until(lambda: client.reads and client.is_quiet())
        await silent.delete(id)
        assert not await store.delete(id)
        assert await reader.result(5) == ["deleted"]


async def test_new_stream_wakes_readers_of_the_deleted_one(store, silent, client):
    id = await store.create()
    await store.append(id, "a")
    async with AsyncBackground(partial(read, store, id)) as reader:
        await async_until(lambda: client.reads and client.is_quiet())
        await silent.delete(id)
        await store.create(id)
        assert await reader.result(5) == ["a", "deleted"]


async def test_reader_that_finds_chunks_wakes_the_others(store, silent, client):
    id = await store.create()
    received = []

    async def read():
        async for chunk in store.read_from(id):
            received.append(chunk.data)

    async with AsyncBackground(partial(async_gather, read, read)) as readers:
        await async_until(lambda: len(client.reads) == 2 and client.is_quiet())
        await silent.append(id, "a")
        async with AsyncBackground(read) as new_reader:
            await async_until(lambda: received == ["a"] * 3, 5)
            await store.complete(id)
            await new_reader.result()
        await readers.result()


async def test_refused_chunk_of_a_producer_ends_its_readers(store, silent, client):
    gate = AsyncEvent()
    stream = await AsyncDurableStream.start(store, items(["a"], gate))

    async def events():
        return b"".join([sent async for sent in stream.sse()])

    async with AsyncBackground(events) as reader:
        await async_until(lambda: client.reads and client.is_quiet())
        await silent.end(stream.id)
        gate.set()
        assert (await reader.result(5)).endswith(b"event: stopped\ndata: \n\nevent: done\ndata: \n\n")


async def test_quick_polls_leave_out_quiet_streams(dsn, tables, silent):
    async with (
        AsyncRecordingClient(dsn) as client,
        AsyncPostgresStreamStore(client, **tables, poll_interval=0.02) as store,
    ):
        quiet, changing = await store.create(), await store.create()

        def quick_polls():
            return sum(POLL in sent.sql and json.loads(sent.params[0]) == [changing] for sent in client.statements)

        async with AsyncBackground(partial(store.wait, quiet)) as waiter:
            await client.wait_for_followers(quiet, 2)
            await store.append(quiet, "announced")
            async with AsyncBackground(partial(read, store, changing)) as reader:
                for number in range(10):
                    await silent.append(changing, str(number))
                    before = quick_polls()
                    await async_until(lambda before=before: quick_polls() >= before + 2)
                await silent.end(changing)
                assert await reader.result() == [str(number) for number in range(10)]
            await store.stop(quiet)
            await waiter.result()
