"""Producing a stream that another process has created, and time limits of sources."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import psycopg
import pytest
from _async.sources import FinishRecorder, SilentSource, UninterruptibleSource, items
from support.concurrency import AsyncBackground, async_sleep, async_until

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    StoreClosedError,
    StreamEvent,
    StreamNotActiveError,
    StreamNotFoundError,
)
from aibind_postgres._concurrency import AsyncEvent
from aibind_postgres.models import event_of


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


async def events_of(store, id):
    return [event_of(chunk.data) async for chunk in store.read_from(id)]


async def test_produce_writes_the_source_and_returns_the_status(store, other):
    id = await other.create(lease=60)
    recorder = FinishRecorder()
    async with AsyncBackground(partial(events_of, other, id)) as reading:
        source = items(["Hello", StreamEvent("usage", "{}"), "\x01"])
        status = await AsyncDurableStream.produce(store, id, source, on_finish=recorder)
        assert status == ("done", None, 3)
        assert await reading.result() == [("message", "Hello"), ("usage", "{}"), ("message", "\x01")]
    assert recorder.calls == [("Hello\x01", ("done", None, 3))]


async def test_stop_ends_produce(store, other):
    id = await other.create()
    source = SilentSource()
    async with AsyncBackground(partial(AsyncDurableStream.produce, store, id, source)) as producing:
        await async_until(lambda: source.is_started)
        await other.stop(id)
        assert (await producing.result()).state == "stopped"
    assert source.closed == 1


@pytest.mark.parametrize(("end", "error"), [("stop", StreamNotActiveError), ("delete", StreamNotFoundError)])
async def test_ended_stream_is_not_produced(store, other, end, error):
    id = await other.create()
    await getattr(other, end)(id)
    source = SilentSource()
    with pytest.raises(error):
        await AsyncDurableStream.produce(store, id, source)
    assert (source.is_started, source.closed) == (False, 1)


async def test_error_of_the_source_ends_the_stream(store):
    async def fail():
        yield "partial"
        raise ValueError("secret")

    status = await AsyncDurableStream.produce(store, await store.create(), fail())
    assert (status.state, status.total_chunks) == ("error", 1)
    assert "secret" not in status.error


async def test_close_of_the_store_ends_produce(store, other, dsn, tables):
    id = await other.create()
    source = SilentSource()
    own = AsyncPostgresStreamStore(dsn, **tables)
    async with AsyncBackground(partial(AsyncDurableStream.produce, own, id, source)) as producing:
        await async_until(lambda: source.is_started)
        await own.close()
        with suppress(StoreClosedError):  # or the status, if the end of the stream is seen first
            await producing.result()
    assert (await other.get_status(id)).state == "error"


@pytest.mark.parametrize("limit", ["idle_timeout", "timeout"])
async def test_silent_source_ends_at_its_time_limit(store, other, limit):
    source, recorder = SilentSource(), FinishRecorder()
    stream = await AsyncDurableStream.start(store, source, on_finish=recorder, **{limit: 0.2})
    status = await other.wait(stream.id, 30)
    assert status.state == "error"
    assert "0.2 seconds" in status.error
    await stream.wait(30)
    assert source.closed == 1
    assert recorder.calls == [("", status)]


async def test_source_that_cannot_be_interrupted_ends_its_stream_in_time(store, other):
    source = UninterruptibleSource()
    stream = await AsyncDurableStream.start(store, source, idle_timeout=0.2)
    try:
        status = await other.wait(stream.id, 30)
        assert (status.state, status.total_chunks) == ("error", 1)
    finally:
        source.gate.set()
    await stream.wait(30)


async def test_slow_source_within_its_idle_timeout_is_complete(store):
    async def slow():
        for word in "abcd":
            await async_sleep(0.1)
            yield word

    status = await AsyncDurableStream.produce(store, await store.create(), slow(), idle_timeout=30, timeout=60)
    assert status == ("done", None, 4)


async def test_time_in_which_chunks_are_stored_does_not_count(store, dsn, tables, run_sql):
    id = await store.create()
    async with await psycopg.AsyncConnection.connect(dsn) as other:
        statement = psycopg.sql.SQL("SELECT FROM {} WHERE id = %s FOR UPDATE").format(tables["status_table"])
        await other.execute(statement, [id])
        source = items(["a" * 600_000] * 4)  # more than the writer's buffer
        async with AsyncBackground(
            partial(AsyncDurableStream.produce, store, id, source, idle_timeout=0.2)
        ) as producing:
            await async_sleep(2)
            await other.rollback()
            assert await producing.result() == ("done", None, 4)


@pytest.mark.parametrize("limit", ["idle_timeout", "timeout"])
async def test_time_after_the_end_of_the_source_does_not_count(store, dsn, tables, limit):
    id = await store.create()
    async with await psycopg.AsyncConnection.connect(dsn) as other:
        statement = psycopg.sql.SQL("SELECT FROM {} WHERE id = %s FOR UPDATE").format(tables["status_table"])
        await other.execute(statement, [id])
        produce = partial(AsyncDurableStream.produce, store, id, items(["a"]), **{limit: 0.2})
        async with AsyncBackground(produce) as producing:
            await async_sleep(1.5)
            await other.rollback()
            assert await producing.result() == ("done", None, 1)


async def test_total_time_limit_ends_a_source_that_yields(store):
    async def endless():
        while True:
            await async_sleep(0.01)
            yield "a"

    status = await AsyncDurableStream.produce(store, await store.create(), endless(), idle_timeout=30, timeout=0.3)
    assert status.state == "error"
    assert "longer than 0.3 seconds" in status.error
    assert status.total_chunks > 0


async def test_time_limit_does_not_apply_to_on_finish(store):
    released = AsyncEvent()

    async def on_finish(text, status):
        await released.wait(0.6)

    stream = await AsyncDurableStream.start(store, items(["a"]), on_finish=on_finish, idle_timeout=0.2, timeout=0.3)
    assert await stream.wait(30) == ("done", None, 1)


@pytest.mark.parametrize("limits", [{"idle_timeout": 0}, {"timeout": -1}])
async def test_invalid_time_limits_are_refused(store, limits):
    source = SilentSource()
    with pytest.raises(ValueError, match="timeout"):
        await AsyncDurableStream.start(store, source, **limits)
    assert source.closed == 1
    assert [info async for info in store.list()] == []
