"""The stream writer: exactly-once delivery, order, limits, and the end of its stream."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial

import psycopg
import pytest
from _async.sources import is_append
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until, async_workers
from support.leaks import package_objects

from aibind_postgres import (
    AsyncPostgresStreamStore,
    InvalidDataError,
    SequenceConflictError,
    StoreClosedError,
    StreamNotActiveError,
    StreamNotFoundError,
    StreamWriteError,
)
from aibind_postgres._async.database import AsyncDatabase
from aibind_postgres._async.sending import StreamOperations
from aibind_postgres._async.stream_writer import AsyncStreamWriter
from aibind_postgres._concurrency import AsyncEvent
from aibind_postgres._write_buffer import WriteBuffer


class FaultyClient:
    """A pool that can delay appends, and lose their requests or replies."""

    def __init__(self, pool):
        self.pool = pool
        self.appends = 0
        self.running = 0
        self.max_running = 0
        self.gate = AsyncEvent()
        self.gate.set()
        self.lose = []  # for the next appends: None, "request" or "reply"
        self.is_down = False
        self.connection_errors = (psycopg.OperationalError,)

    async def query(self, sql, params):
        if self.is_down:
            raise psycopg.OperationalError("no answer")
        if not is_append(sql):
            return await self.send(sql, params)
        self.appends += 1
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        try:
            lose = self.lose.pop(0) if self.lose else None
            if lose == "request":
                raise psycopg.OperationalError("the request is lost")
            await self.gate.wait()
            rows = await self.send(sql, params)
            if lose == "reply":
                raise psycopg.OperationalError("the reply is lost")
            return rows
        finally:
            self.running -= 1

    async def send(self, sql, params):
        async with self.pool.connection() as connection:
            cursor = psycopg.AsyncRawCursor(connection)
            await cursor.execute(sql, params)
            return await cursor.fetchall()


@pytest.fixture
async def client(dsn):
    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=1, max_size=10, open=False) as pool:
        yield FaultyClient(pool)


@pytest.fixture
async def store(client, tables):
    async with AsyncPostgresStreamStore(client, **tables) as store:
        yield store


async def texts(store, id):
    return [chunk.data async for chunk in store.read_from(id, follow=False)]


async def test_written_chunks_are_stored_and_the_stream_is_done(store, other):
    id = await store.create()
    written = [f"{number}" for number in range(500)] + ["", "\x01\n\"'\\", "😀"]
    async with store.writer(id) as writer:
        assert writer.is_active
        for chunk in written:
            await writer.write(chunk)
    assert await texts(other, id) == written
    assert await other.get_status(id) == ("done", None, 503)
    assert not writer.is_active
    assert "aibind_postgres-writer" not in async_workers()


async def test_flush_makes_chunks_durable_and_returns_the_last_number(store, other):
    id = await store.create()
    await store.append_many(id, ["a", "b"])
    async with store.writer(id) as writer:
        assert await writer.flush() == 2
        await writer.write("c")
        await writer.write("d")
        assert await writer.flush() == 4
        assert await texts(other, id) == ["a", "b", "c", "d"]
        assert (await other.get_status(id)).state == "active"
        assert await writer.flush() == 4


async def test_buffered_chunks_are_sent_as_one_statement_at_a_time(store, client):
    id = await store.create()
    async with store.writer(id) as writer:
        client.gate.clear()
        await writer.write("first")
        await async_until(lambda: client.appends == 1)
        for number in range(200):
            await writer.write(f"{number}")
        client.gate.set()
        assert await writer.flush() == 201
        assert (client.appends, client.max_running) == (2, 1)
    assert await texts(store, id) == ["first", *(f"{number}" for number in range(200))]


@pytest.mark.parametrize(
    ("limits", "fit"), [({"max_chunks": 3}, 3), ({"max_bytes": 10}, 2), ({"max_bytes": 1, "max_chunks": 9}, 1)]
)
async def test_full_buffer_makes_write_wait(store, client, limits, fit):
    id = await store.create()
    async with store.writer(id, **limits) as writer:
        client.gate.clear()
        for _ in range(fit):
            await writer.write("äöx")  # 5 bytes
        written = []

        async def write_more():
            await writer.write("more")
            written.append("more")

        async with AsyncBackground(write_more) as waiting:
            await async_sleep(0.1)
            assert written == []
            client.gate.set()
            await waiting.result()
        assert await writer.flush() == fit + 1
    assert await texts(store, id) == ["äöx"] * fit + ["more"]


class MyError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MyError("the model is gone"), "the model is gone"),
        (MyError(), "MyError"),
        (MyError("a\0b\ud800" + "x" * 5000), "ab?" + "x" * 996),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (StreamNotActiveError("another", "stopped"), "stream 'another' has ended: its state is 'stopped'"),
    ],
    ids=["text", "none", "odd and long", "not an Exception", "of another stream"],
)
async def test_exception_ends_the_stream_with_its_text(store, other, error, text):
    id = await store.create()
    with pytest.raises(type(error)) as caught:
        async with store.writer(id) as writer:
            await writer.write("before")
            raise error
    assert caught.value is error
    assert await other.get_status(id) == ("error", text, 1)
    assert await texts(other, id) == ["before"]
    assert "aibind_postgres-writer" not in async_workers()


@pytest.mark.parametrize("where", ["same store", "other store"])
@pytest.mark.parametrize(("end", "state"), [("stop", "stopped"), ("complete", "done"), ("delete", None)])
async def test_end_by_others_is_noticed_before_the_next_chunk(store, other, where, end, state):
    id = await store.create()
    ender = store if where == "same store" else other
    with pytest.raises(StreamNotActiveError if state else StreamNotFoundError) as caught:
        async with store.writer(id) as writer:
            await writer.write("a")
            await writer.flush()
            await getattr(ender, end)(id)
            await async_until(lambda: not writer.is_active)
            await writer.write("b")
    if state:
        assert caught.value.state == state
        assert await other.get_status(id) == (state, None, 1)


async def test_stop_after_the_last_chunk_raises_nothing(store):
    id = await store.create()
    async with store.writer(id) as writer:
        await writer.write("a")
        await writer.flush()
        await store.stop(id)
    assert await store.get_status(id) == ("stopped", None, 1)


async def test_chunks_after_a_stop_raise(store, client):
    id = await store.create()
    with pytest.raises(StreamNotActiveError):
        async with store.writer(id) as writer:
            client.gate.clear()
            await writer.write("a")
            await async_until(lambda: client.appends == 1)
            await store.stop(id)
            client.gate.set()
    assert await store.get_status(id) == ("stopped", None, 0)


@pytest.mark.parametrize("lost", [["reply"], ["request"], ["reply", "request", "reply"], ["request", "reply"]])
async def test_lost_statement_is_sent_again_and_written_once(store, client, lost):
    id = await store.create()
    async with store.writer(id) as writer:
        for number in range(5):
            client.lose = list(lost)
            await writer.write(f"{number}")
            await writer.write(f"{number}, too")
            assert await writer.flush() == 2 * number + 2
            assert client.lose == []
    assert await texts(store, id) == [text for number in range(5) for text in (f"{number}", f"{number}, too")]


async def test_chunk_with_lost_reply_is_kept_if_the_stream_is_stopped_meanwhile(store, client):
    id = await store.create()
    async with store.writer(id) as writer:
        client.gate.clear()
        client.lose = ["reply", "request", "request"]
        await writer.write("a")
        await async_until(lambda: client.running)
        client.gate.set()
        await async_until(lambda: client.appends >= 2)
        await store.stop(id)
    assert await texts(store, id) == ["a"]


async def test_write_error_counts_durable_and_unsaved_chunks(client, tables):
    async with AsyncPostgresStreamStore(client, **tables, retry_for=0.3) as store:
        id = await store.create()
        with pytest.raises(StreamWriteError) as caught:
            async with store.writer(id) as writer:
                await writer.write("a")
                await writer.flush()
                client.lose = ["request"] * 1000
                await writer.write("b")
                await writer.write("c")
                await writer.flush()
        assert (caught.value.durable, caught.value.unsaved) == (1, 2)
        assert "up to number 1 are durable, 2 later ones may be missing" in str(caught.value)
        assert await store.get_status(id) == ("error", str(caught.value), 1)


@pytest.mark.parametrize("when", ["writing", "leaving"])
async def test_server_lost_for_longer_than_retry_for(client, tables, when):
    async with AsyncPostgresStreamStore(client, **tables, retry_for=0.2) as store:
        id = await store.create()
        with pytest.raises(StreamWriteError) as caught:
            async with store.writer(id) as writer:
                await writer.write("a")
                await writer.flush()
                client.is_down = True
                if when == "writing":
                    await writer.write("b")
                    await writer.flush()
        assert (caught.value.durable, caught.value.unsaved) == (1, 0 if when == "leaving" else 1)
        assert isinstance(caught.value.__cause__, (psycopg.OperationalError, StreamWriteError))
        client.is_down = False
        assert await store.get_status(id) == ("active", None, 1)


async def test_failed_status_check_is_not_the_end(client, store):
    wakes = []

    @contextmanager
    def subscribe(wake):
        wakes.append(wake)
        yield

    operations = StreamOperations(append_to(store), store.complete, store.fail, store._take_lease, store.get_status)
    id = await store.create()
    buffer, database = WriteBuffer(1000, 1000), AsyncDatabase(client, 0.2, None)
    with pytest.raises(StreamWriteError) as caught:
        async with AsyncStreamWriter(
            id, buffer, operations, database, subscribe, lambda _: nullcontext(), None
        ) as writer:
            await writer.write("a")
            await writer.flush()
            client.is_down = True
            wakes[0]()
            await async_sleep(0.1)
            assert writer.is_active
            await writer.write("b")
    assert (caught.value.durable, caught.value.unsaved) == (1, 1)
    assert isinstance(caught.value.__cause__, (psycopg.OperationalError, StreamWriteError))
    client.is_down = False
    assert await store.get_status(id) == ("active", None, 1)


def append_to(store):
    def append(id, texts, expected_seq):
        return store.append_many(id, texts, expected_seq=expected_seq)

    return append


async def test_writer_survives_short_outages(store, client):
    id = await store.create()
    async with store.writer(id) as writer:
        for number in range(3):
            client.is_down = True
            await writer.write(f"{number}")
            await async_sleep(0.1)
            client.is_down = False
    assert await texts(store, id) == ["0", "1", "2"]
    assert (await store.get_status(id)).state == "done"


async def test_stream_of_another_producer_stays_active(store, other):
    id = await store.create()
    with pytest.raises(SequenceConflictError):
        async with store.writer(id) as writer:
            await writer.write("a")
            await writer.flush()
            await other.append(id, "intruder")
            await writer.write("b")
    assert await other.get_status(id) == ("active", None, 2)
    assert await texts(other, id) == ["a", "intruder"]


async def test_entering_requires_an_active_stream_and_valid_limits(store):
    before = package_objects()["Subscription"]
    with pytest.raises(StreamNotFoundError):
        await store.writer("missing").__aenter__()
    id = await store.create()
    await store.complete(id)
    with pytest.raises(StreamNotActiveError):
        await store.writer(id).__aenter__()
    for wrong in [{"max_chunks": 0}, {"max_bytes": 0}, {"max_chunks": "1"}]:
        with pytest.raises(InvalidDataError):
            store.writer(id, **wrong)
    with pytest.raises(InvalidDataError):
        store.writer("")
    async with store.writer(await store.create()):  # its subscription makes the store drop those that were closed
        assert package_objects()["Subscription"] <= before + 1


async def test_writer_works_inside_its_block_only(store):
    id = await store.create()
    writer = store.writer(id)
    with pytest.raises(RuntimeError, match="context manager"):
        await writer.write("a")
    async with writer:
        await writer.write("a")
    with pytest.raises(StreamNotActiveError):
        await writer.write("b")
    with pytest.raises(RuntimeError, match="entered only once"):
        await writer.__aenter__()
    assert await texts(store, id) == ["a"]


async def test_write_while_the_block_is_left_raises(store, client):
    id = await store.create()
    writer = store.writer(id)
    await writer.__aenter__()
    client.gate.clear()
    await writer.write("a")
    await async_until(lambda: client.running)
    async with AsyncBackground(partial(writer.__aexit__, None, None, None)) as leaving:
        await async_until(lambda: ", closing, " in repr(writer))
        with pytest.raises(RuntimeError, match="has been left"):
            await writer.write("b")
        client.gate.set()
        await leaving.result()
    assert await texts(store, id) == ["a"]
    assert (await store.get_status(id)).state == "done"


async def test_invalid_chunk_raises_and_the_writer_continues(store):
    id = await store.create()
    async with store.writer(id) as writer:
        for bad in ["\0", "\ud800", 7]:
            with pytest.raises(InvalidDataError):
                await writer.write(bad)
        await writer.write("good")
    assert await texts(store, id) == ["good"]


async def test_write_after_close_of_the_store_raises(client, tables):
    store = AsyncPostgresStreamStore(client, **tables)
    id = await store.create()
    with pytest.raises(StoreClosedError):
        async with store.writer(id) as writer:
            await writer.write("a")
            await writer.flush()
            await store.close()
            await async_until(lambda: not writer.is_active)
            await writer.write("b")
    assert async_workers() == []


async def test_many_concurrent_writers_and_readers(store):
    async def write(id):
        async with store.writer(id) as writer:
            for number in range(50):
                await writer.write(f"{id} {number}")

    async def read(id):
        return [chunk async for chunk in store.read_from(id)]

    ids = [await store.create() for _ in range(20)]
    results = await async_gather(*[partial(read, id) for id in ids], *[partial(write, id) for id in ids])
    for id, chunks in zip(ids, results[:20], strict=True):
        assert chunks == [(number + 1, f"{id} {number}") for number in range(50)]


async def test_writer_shared_by_many_callers(store):
    id = await store.create()
    async with store.writer(id, max_chunks=7) as writer:

        async def write(number):
            for _ in range(20):
                await writer.write(f"{number}")

        await async_gather(*[partial(write, number) for number in range(10)])
        assert await writer.flush() == 200
    assert sorted(await texts(store, id)) == sorted(f"{number}" for number in range(10) for _ in range(20))


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
async def test_writer_on_own_connection_joins_the_transaction(dsn, tables, other, outcome):
    id = await other.create()
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            async with store.writer(id) as writer:
                await writer.write("a")
                await writer.write("b")
                assert await writer.flush() == 2
                assert await texts(store, id) == ["a", "b"]
                assert await texts(other, id) == []
                assert "aibind_postgres-writer" not in async_workers()
            await getattr(connection, outcome)()
    expected = ("done", None, 2) if outcome == "commit" else ("active", None, 0)
    assert await other.get_status(id) == expected


async def test_error_on_own_connection_is_raised_by_that_write(dsn, tables, other):
    id = await other.create()
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            with pytest.raises(SequenceConflictError):
                async with store.writer(id) as writer:
                    await writer.write("a")
                    await other.append(id, "intruder")
                    with pytest.raises(SequenceConflictError):
                        await writer.write("b")
                    await writer.write("c")
    assert await texts(other, id) == ["a", "intruder"]


async def test_repr(store):
    id = await store.create("s")
    writer = store.writer(id)
    name = type(writer).__name__
    assert repr(writer) == f"<{name} of stream 's', not entered, 0 chunks durable, 0 buffered>"
    async with writer:
        await writer.write("a")
        await writer.flush()
        assert repr(writer) == f"<{name} of stream 's', open, 1 chunks durable, 0 buffered>"
    assert repr(writer) == f"<{name} of stream 's', closed, 1 chunks durable, 0 buffered>"
