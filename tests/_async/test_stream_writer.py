"""The stream writer: exactly once, in order, bounded, and told of the end."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until, async_workers

from aibind_postgres import (
    AsyncPostgresStreamStore,
    InvalidDataError,
    SequenceConflictError,
    StoreClosedError,
    StreamNotActiveError,
    StreamNotFoundError,
    StreamWriteError,
)
from aibind_postgres._concurrency import AsyncEvent


class FaultyClient:
    """A pool whose appends can be held back, and lost on the way there or back."""

    def __init__(self, pool):
        self.pool = pool
        self.appends = 0
        self.under_way = 0
        self.most_under_way = 0
        self.gate = AsyncEvent()
        self.gate.set()
        self.lose = []  # for the coming appends: None, "request" or "reply"
        self.is_down = False
        self.connection_errors = (psycopg.OperationalError,)

    async def query(self, sql, params):
        if self.is_down:
            raise psycopg.OperationalError("nobody answers")
        if "UPDATE" not in sql or "total_chunks +" not in sql:
            return await self.send(sql, params)
        self.appends += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            lose = self.lose.pop(0) if self.lose else None
            if lose == "request":
                raise psycopg.OperationalError("lost on the way there")
            await self.gate.wait()
            rows = await self.send(sql, params)
            if lose == "reply":
                raise psycopg.OperationalError("lost on the way back")
            return rows
        finally:
            self.under_way -= 1

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


async def test_what_is_written_is_there_and_the_stream_is_done(store, other):
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


async def test_a_flush_makes_durable_and_tells_the_last_number(store, other):
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


async def test_what_gathers_goes_as_one_statement_one_at_a_time(store, client):
    id = await store.create()
    async with store.writer(id) as writer:
        client.gate.clear()
        await writer.write("first")
        await async_until(lambda: client.appends == 1)
        for number in range(200):
            await writer.write(f"{number}")
        client.gate.set()
        assert await writer.flush() == 201
        assert (client.appends, client.most_under_way) == (2, 1)
    assert await texts(store, id) == ["first", *(f"{number}" for number in range(200))]


@pytest.mark.parametrize(
    ("limits", "fit"), [({"max_chunks": 3}, 3), ({"max_bytes": 10}, 2), ({"max_bytes": 1, "max_chunks": 9}, 1)]
)
async def test_a_full_buffer_makes_write_wait(store, client, limits, fit):
    id = await store.create()
    async with store.writer(id, **limits) as writer:
        client.gate.clear()
        for _ in range(fit):
            await writer.write("äöx")  # 5 bytes
        async with AsyncBackground(partial(writer.write, "more")) as waiting:
            await async_sleep(0.1)
            assert len(writer._unsaved) == fit
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
async def test_an_exception_ends_the_stream_with_its_text(store, other, error, text):
    id = await store.create()
    with pytest.raises(type(error)) as caught:
        async with store.writer(id) as writer:
            await writer.write("before")
            raise error
    assert caught.value is error
    assert await other.get_status(id) == ("error", text, 1)
    assert await texts(other, id) == ["before"]
    assert "aibind_postgres-writer" not in async_workers()


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize(("end", "state"), [("stop", "stopped"), ("complete", "done"), ("delete", None)])
async def test_an_end_by_others_is_noticed_before_the_next_chunk(store, other, where, end, state):
    id = await store.create()
    ender = store if where == "here" else other
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


async def test_a_stop_after_the_last_chunk_is_no_error(store):
    id = await store.create()
    async with store.writer(id) as writer:
        await writer.write("a")
        await writer.flush()
        await store.stop(id)
    assert await store.get_status(id) == ("stopped", None, 1)


async def test_chunks_that_came_too_late_are_told(store, client):
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
async def test_what_is_lost_on_the_way_is_sent_again_and_written_once(store, client, lost):
    id = await store.create()
    async with store.writer(id) as writer:
        for number in range(5):
            client.lose = list(lost)
            await writer.write(f"{number}")
            await writer.write(f"{number}, too")
            assert await writer.flush() == 2 * number + 2
            assert client.lose == []
    assert await texts(store, id) == [text for number in range(5) for text in (f"{number}", f"{number}, too")]


async def test_a_lost_reply_is_no_loss_if_the_stream_was_stopped_meanwhile(store, client):
    id = await store.create()
    async with store.writer(id) as writer:
        client.gate.clear()
        client.lose = ["reply", "request", "request"]
        await writer.write("a")
        await async_until(lambda: client.under_way)
        client.gate.set()
        await async_until(lambda: client.appends >= 2)
        await store.stop(id)
    assert await texts(store, id) == ["a"]


async def test_a_server_that_stays_away_is_told_with_what_is_durable(client, tables):
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
        assert "up to number 1, and 2 more are not" in str(caught.value)
        assert await store.get_status(id) == ("error", str(caught.value), 1)


@pytest.mark.parametrize("when", ["writing", "looking", "leaving"])
async def test_a_server_that_goes_away_altogether(client, tables, when):
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
                elif when == "looking":
                    writer._be_alarmed()  # as a watch does that has lost the server too
                    await async_sleep(0.1)
                    assert writer.is_active
                    await writer.write("b")
        assert (caught.value.durable, caught.value.unsaved) == (1, 0 if when == "leaving" else 1)
        assert isinstance(caught.value.__cause__, (psycopg.OperationalError, StreamWriteError))
        client.is_down = False
        assert await store.get_status(id) == ("active", None, 1)


async def test_a_server_that_comes_back_in_time(store, client):
    id = await store.create()
    async with store.writer(id) as writer:
        for number in range(3):
            client.is_down = True
            await writer.write(f"{number}")
            await async_sleep(0.1)
            client.is_down = False
    assert await texts(store, id) == ["0", "1", "2"]
    assert (await store.get_status(id)).state == "done"


async def test_another_producer_is_left_alone(store, other):
    id = await store.create()
    with pytest.raises(SequenceConflictError):
        async with store.writer(id) as writer:
            await writer.write("a")
            await writer.flush()
            await other.append(id, "intruder")
            await writer.write("b")
    assert await other.get_status(id) == ("active", None, 2)
    assert await texts(other, id) == ["a", "intruder"]


async def test_who_may_be_written_to(store):
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
    assert store._changes.followed() == []


async def test_a_writer_is_used_in_its_block_only(store):
    id = await store.create()
    writer = store.writer(id)
    with pytest.raises(RuntimeError, match="context manager"):
        await writer.write("a")
    async with writer:
        await writer.write("a")
    with pytest.raises(StreamNotActiveError):
        await writer.write("b")
    with pytest.raises(RuntimeError, match="serves one block"):
        await writer.__aenter__()
    assert await texts(store, id) == ["a"]


async def test_what_is_written_while_the_block_is_left_is_refused(store, client):
    id = await store.create()
    writer = store.writer(id)
    await writer.__aenter__()
    client.gate.clear()
    await writer.write("a")
    await async_until(lambda: client.under_way)
    async with AsyncBackground(partial(writer.__aexit__, None, None, None)) as leaving:
        await async_until(lambda: writer._left)
        with pytest.raises(RuntimeError, match="has been left"):
            await writer.write("b")
        client.gate.set()
        await leaving.result()
    assert await texts(store, id) == ["a"]
    assert (await store.get_status(id)).state == "done"


async def test_bad_data_is_refused_and_the_writer_goes_on(store):
    id = await store.create()
    async with store.writer(id) as writer:
        for bad in ["\0", "\ud800", 7]:
            with pytest.raises(InvalidDataError):
                await writer.write(bad)
        await writer.write("good")
    assert await texts(store, id) == ["good"]


async def test_a_store_that_is_closed_is_told(client, tables):
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


async def test_many_writers_and_readers_at_once(store):
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


async def test_one_writer_shared_by_many(store):
    id = await store.create()
    async with store.writer(id, max_chunks=7) as writer:

        async def write(number):
            for _ in range(20):
                await writer.write(f"{number}")

        await async_gather(*[partial(write, number) for number in range(10)])
        assert await writer.flush() == 200
    assert sorted(await texts(store, id)) == sorted(f"{number}" for number in range(10) for _ in range(20))


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
async def test_on_a_connection_of_the_caller_it_takes_part_in_the_transaction(dsn, tables, other, outcome):
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


async def test_an_error_on_a_connection_of_the_caller_is_raised_by_that_write(dsn, tables, other):
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
