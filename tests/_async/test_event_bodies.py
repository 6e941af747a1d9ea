"""The bodies of event streams: a limit of readers, and an end for clients that do not read."""

from __future__ import annotations

import gc
import json

import pytest
from support.concurrency import AsyncBackground, async_sleep, async_until

from aibind_postgres import AsyncPostgresStreamStore, AsyncStreamHandler, WebRequest
from aibind_postgres._async.event_bodies import AsyncEventBodies
from aibind_postgres._async.source import close_source
from aibind_postgres.sse import EventParser


class Reading:
    """A handler with its streams, and the clients that were disconnected."""

    def __init__(self, store, **options):
        self.store = store
        self.handler = AsyncStreamHandler(iter, store=store, **options)
        self.disconnected = []

    async def resume(self, id, client="client"):
        request = WebRequest("GET", "/__aibind__/stream/resume", {"id": id}, {}, b"")
        return await self.handler.handle(request._replace(disconnect=lambda: self.disconnected.append(client)))


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        await store.create("s")
        await store.append_many("s", ["one", "two", "three"])
        yield store


async def test_client_that_does_not_read_is_disconnected_and_can_resume(store):
    reading = Reading(store, send_timeout=0.1, max_readers=1)
    body = (await reading.resume("s")).body
    assert b"data: one" in await body.__anext__()
    assert (await reading.resume("s")).status == 429
    await async_until(lambda: reading.disconnected)
    again = (await reading.resume("s")).body
    assert b"data: one" in await again.__anext__()
    assert [event async for event in body] == []
    await close_source(again)


async def test_body_ends_after_its_client_was_disconnected():
    happened = []

    async def events():
        try:
            yield b"one"
            yield b"two"
        finally:
            happened.append("closed")
            await async_until(lambda: "asked" in happened)

    bodies = AsyncEventBodies(max_readers=1, send_timeout=0.1)
    body = bodies.open("s", None, events(), lambda: happened.append("disconnected"))
    assert await body.__anext__() == b"one"
    await async_until(lambda: "closed" in happened)
    happened.append("asked")
    assert [event async for event in body] == []
    # Else the server would use the connection for the next request, which would be disconnected.
    assert "disconnected" in happened


async def test_response_that_is_never_sent_counts_as_not_read(store):
    reading = Reading(store, send_timeout=0.1)
    body = (await reading.resume("s")).body
    await async_until(lambda: reading.disconnected)
    assert [event async for event in body] == []


async def test_quiet_stream_is_not_disconnected(store):
    reading = Reading(store, send_timeout=0.1, heartbeat=3600)
    quiet, stalled = [(await reading.resume("s", client)).body for client in ("quiet", "stalled")]
    assert b"data: one" in await stalled.__anext__()
    received = []

    async def read():
        received.extend([event async for encoded in quiet for event in EventParser().feed(encoded)])

    async with AsyncBackground(read) as background:
        await async_until(lambda: reading.disconnected)
        await store.append("s", "four")
        await store.complete("s")
        await background.result()
    assert [event.data for event in received] == ["one", "two", "three", "four", ""]
    assert reading.disconnected == ["stalled"]


@pytest.mark.parametrize("end", ["read", "closed", "dropped", "dropped before the first event"])
async def test_limit_of_readers_counts_those_of_one_stream_that_still_read(store, end):
    reading = Reading(store, max_readers=2)
    await store.create("other")
    bodies = [(await reading.resume("s")).body for _ in range(2)]
    refused = await reading.resume("s")
    assert refused.status == 429
    assert json.loads(refused.body) == {"error": "the stream has the maximum of 2 readers: try again later"}
    assert (await reading.resume("other")).status == 200
    body = bodies.pop()
    if end != "dropped before the first event":
        await body.__anext__()
    if end == "read":
        await store.complete("s")
        assert [event async for event in body] == [b"event: done\ndata: \n\n"]
    elif end == "closed":
        await close_source(body)
    del body
    gc.collect()
    await async_sleep(0)  # an asynchronous generator is closed by its event loop
    bodies.append((await reading.resume("s")).body)
    assert (await reading.resume("s")).status == 429


@pytest.mark.parametrize("option", [{"max_readers": 0}, {"send_timeout": 0}], ids=str)
async def test_invalid_option_raises(store, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        Reading(store, **option)
