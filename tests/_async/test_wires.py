"""Durable streams in wire formats: stored with the stream, known to other processes, and in every final state."""

from __future__ import annotations

import pytest
from _async.sources import FinishRecorder, items
from psycopg import sql
from support.concurrency import async_gather, async_until, async_workers

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    InvalidDataError,
    SchemaError,
    StreamStatus,
)
from aibind_postgres._concurrency import AsyncEvent

FRAMES = [b"event: x\ndata: 1\n", b"\n: comm", b"ent\n\nda", b"ta: \xc3\xa9\r\n\r\n"]


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store
    await async_until(lambda: "aibind_postgres-producer" not in async_workers())


async def body(stream, after_seq=None):
    return b"".join([part async for part in stream.sse(after_seq)])


async def test_event_stream_of_another_library(store, other):
    finished = FinishRecorder()
    stream = await AsyncDurableStream.start(store, items(FRAMES), id="s", wire="sse", on_finish=finished)
    resumed = await AsyncDurableStream.resume(other, "s")
    expected = b"".join(FRAMES)
    assert await async_gather(lambda: body(stream), lambda: body(resumed)) == [expected, expected]
    assert resumed.headers["Content-Type"] == "text/event-stream"
    assert [chunk.data async for chunk in store.read_from("s")] == [
        "event: x\ndata: 1\n\n",
        ": comment\n\n",
        "data: é\r\n\r\n",
    ]
    await stream.wait()
    assert finished.calls == [(expected.decode(), StreamStatus("done", None, 3))]
    assert (await store.get_info("s")).wire == "sse"
    assert await body(await AsyncDurableStream.resume(other, "s", 2)) == "data: é\r\n\r\n".encode()


async def test_default_is_not_stored(store):
    stream = await AsyncDurableStream.start(store, items(["hi"]), id="s")
    await stream.wait()
    assert (await store.get_info("s")).wire is None


async def test_worker_uses_the_wire_format_of_the_stream(store, other):
    await store.create("s", wire="ai_sdk", lease=60)
    reader = await AsyncDurableStream.resume(store, "s")
    assert reader.headers["X-Vercel-Ai-Ui-Message-Stream"] == "v1"
    assert (await AsyncDurableStream.produce(other, "s", items(["hi"]))).state == "done"
    received = await body(reader)
    assert received.startswith(b'data: {"type":"start","messageId":"s"}\n\n')
    assert received.endswith(b"data: [DONE]\n\n")


async def test_stopped_stream(store):
    gate = AsyncEvent()
    stream = await AsyncDurableStream.start(store, items([b"data: 1\n\n"], gate), wire="sse")
    reader = stream.sse()
    assert await reader.__anext__() == b"data: 1\n\n"
    await stream.stop()
    assert [part async for part in reader] == []
    gate.set()


@pytest.mark.parametrize("item", [7, b"\xff", "data: \0\n\n"])
async def test_items_that_cannot_be_stored_end_the_stream(store, item, caplog):
    stream = await AsyncDurableStream.start(store, items([b"data: 1\n\n", item]), wire="sse")
    assert await body(stream) == b"data: 1\n\nevent: error\ndata: the answer was interrupted\n\n"
    assert (await stream.wait()).state == "error"
    assert "the source of stream" in caplog.text


class ClosableSource:
    """An empty source that records whether it was closed."""

    def __init__(self):
        self.closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        raise StopAsyncIteration

    def close(self):
        self.closed = True


async def test_unknown_wire_format(store):
    with pytest.raises(InvalidDataError, match="unknown wire format 'x'"):
        await store.create("s", wire="x")
    source = ClosableSource()
    with pytest.raises(InvalidDataError, match="unknown wire format 'x'"):
        await AsyncDurableStream.start(store, source, wire="x")
    assert source.closed
    assert [info async for info in store.list()] == []


async def test_wire_format_needs_migration_0004(dsn, tables, run_sql):
    run_sql(sql.SQL("ALTER TABLE {} DROP lease_until, DROP wire").format(tables["status_table"]))
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        with pytest.raises(SchemaError, match="wire format"):
            await AsyncDurableStream.start(store, items(["data: 1\n\n"]), wire="sse")
        stream = await AsyncDurableStream.start(store, items(["hi"]))
        assert (await stream.wait()).state == "done"
