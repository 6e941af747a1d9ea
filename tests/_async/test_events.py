"""Decoded events of a stream, and the texts and events of a stream writer."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from _async.sources import items
from support.concurrency import AsyncBackground, async_until
from support.leaks import package_objects

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    InvalidDataError,
    StoredEvent,
    StreamEvent,
    StreamNotFoundError,
)
from aibind_postgres.sse import EventParser, ServerSentEvent

USAGE = StreamEvent("usage", '{"inputTokens": 1}')
ITEMS = ["Hel", "lo", "", USAGE, "\x01 wor\r\nld\n", "tool_call\x01{}"]
EVENTS = [
    StoredEvent(1, "message", "Hel"),
    StoredEvent(2, "message", "lo"),
    StoredEvent(3, "message", ""),
    StoredEvent(4, "usage", '{"inputTokens": 1}'),
    StoredEvent(5, "message", "\x01 wor\r\nld\n"),
    StoredEvent(6, "message", "tool_call\x01{}"),
]


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


async def collect(store, id, after_seq=0, **options):
    return [event async for event in store.events(id, after_seq, **options)]


@pytest.mark.parametrize("follow", [True, False])
async def test_events_of_a_durable_stream_after_any_number(store, other, follow):
    stream = await AsyncDurableStream.start(store, items(ITEMS))
    await stream.wait()
    for after_seq in range(8):
        found = await collect(other, stream.id, after_seq, follow=follow)
        assert found == EVENTS[after_seq:]
        assert all(type(event) is StoredEvent for event in found)


@pytest.mark.parametrize("follow", [True, False])
async def test_chunks_of_other_writers(store, follow):
    id = await store.create()
    chunks = ["plain", "\x01text", "usage\x01{}", "\x01", "", "a\r\n\nb\x01x\x01y"]
    reserved = ["stream-id", "error", "stopped", "done", "message"]
    await store.append_many(id, [*chunks, *(f"{name}\x01of {name}" for name in reserved)])
    await store.stop(id)
    expected = [("message", "plain"), ("message", "text"), ("usage", "{}"), ("message", ""), ("message", "")]
    expected += [("a b", "x\x01y"), *(("message", f"of {name}") for name in reserved)]
    assert await collect(store, id, follow=follow) == [(seq, *event) for seq, event in enumerate(expected, 1)]


async def test_events_over_several_pages(store):
    id = await store.create()
    await store.append_many(id, [f"e\x01{number}" if number % 2 else f"\x01{number}" for number in range(1, 6001)])
    await store.complete(id)
    expected = [(number, "e" if number % 2 else "message", f"{number}") for number in range(1, 6001)]
    assert await collect(store, id) == await collect(store, id, follow=False) == expected


async def test_events_are_followed_until_the_end(store, other):
    id = await store.create()
    await other.append(id, "\x01stored before")
    assert await collect(store, id, follow=False) == [(1, "message", "stored before")]
    seen = []

    async def read():
        async for event in store.events(id):
            seen.append(event)

    async with AsyncBackground(read) as reader:
        await async_until(lambda: len(seen) == 1)
        await other.append(id, "usage\x01{}")
        await async_until(lambda: len(seen) == 2)
        await other.complete(id)
        await reader.result()
    assert seen == [(1, "message", "stored before"), (2, "usage", "{}")]


async def test_missing_and_deleted_streams(store, other):
    for follow in (True, False):
        with pytest.raises(StreamNotFoundError):
            await collect(store, "missing", follow=follow)
    id = await store.create()
    await store.append(id, "a")
    seen = []

    async def read():
        with pytest.raises(StreamNotFoundError):
            async for event in store.events(id):
                seen.append(event)

    async with AsyncBackground(read) as reader:
        await async_until(lambda: seen)
        await other.delete(id)
        await reader.result()


async def test_arguments_are_checked_at_the_call(store):
    for wrong in (("",), ("s", -1), ("s", "1"), ("s", None)):
        for read in (store.events, partial(store.events, follow=False), store.read_with_times):
            with pytest.raises(InvalidDataError):
                read(*wrong)


@pytest.mark.parametrize("follow", [True, False])
async def test_reader_that_leaves_early_is_released_when_closed(store, follow):
    id = await store.create()
    await store.append_many(id, ["a", "b"])

    async def leave_early():
        reader = store.events(id, follow=follow)
        async for event in reader:
            assert event == (1, "message", "a")
            break
        close = getattr(reader, "aclose", None) or reader.close  # asynchronous generators have `aclose`
        await close()

    await leave_early()
    before = package_objects()
    for _ in range(100):
        await leave_early()
    assert not store._subscriptions.follows(id)
    while package_objects() - before:  # the store drops closed readers when another one starts
        await leave_early()


# The stream writer


async def sent(store, id):
    parser = EventParser()
    stream = await AsyncDurableStream.resume(store, id)
    return [event async for data in stream.sse() for event in parser.feed(data)]


async def test_texts_and_events_of_a_writer(store, other):
    id = await store.create()
    async with store.writer(id) as writer:
        for item in ITEMS:
            if isinstance(item, str):
                await writer.text(item)
            else:
                await writer.event(item.event, item.data)
    assert await collect(other, id) == EVENTS
    stream = await AsyncDurableStream.start(store, items(ITEMS))
    await stream.wait()
    written = [chunk async for chunk in other.read_from(id)]
    assert written == [chunk async for chunk in other.read_from(stream.id)]


@pytest.mark.parametrize("text", ["tool_call\x01{}", "\x01", "\x01\x01done\x01", "done\x01", "a\n\nevent: done\x01"])
async def test_text_of_a_writer_cannot_forge_events(store, text):
    id = await store.create()
    async with store.writer(id) as writer:
        await writer.text(text)
    assert await collect(store, id) == [(1, "message", text)]
    assert await sent(store, id) == [ServerSentEvent(text, id="1"), ServerSentEvent("", "done")]


async def test_invalid_texts_and_events_raise_and_the_writer_continues(store):
    id = await store.create()
    async with store.writer(id) as writer:
        for bad in ("\0", "\ud800", 7, None, b"x", USAGE):
            with pytest.raises(InvalidDataError):
                await writer.text(bad)
            with pytest.raises(InvalidDataError):
                await writer.event("usage", bad)
            with pytest.raises(InvalidDataError):
                await writer.event(bad, "{}")
        for name in ("", "a\nb", "a\rb", "a\x01b", "done", "error", "stopped", "stream-id", "message"):
            with pytest.raises(InvalidDataError, match="cannot be the name"):
                await writer.event(name, "{}")
        with pytest.raises(InvalidDataError, match="the data of a named event must be a str, not dict"):
            await writer.event("usage", {"inputTokens": 1})
        await writer.text("good")
    assert await collect(store, id) == [(1, "message", "good")]


async def test_writer_without_a_worker_sends_events_in_the_transaction(dsn, tables, other):
    id = await other.create()
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store, store.writer(id) as writer:
            await writer.text("a")
            await writer.event("usage", "{}")
            assert await collect(store, id, follow=False) == [(1, "message", "a"), (2, "usage", "{}")]
            assert await collect(other, id, follow=False) == []
