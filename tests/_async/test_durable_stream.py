"""A stream that outlives its response: what a source yields, what a browser gets, and every way in which it ends."""

from __future__ import annotations

import gc
from functools import partial

import pytest
from _async.sources import Finish, Silent, items
from support.concurrency import AsyncBackground, async_sleep, async_until, async_workers

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    InvalidDataError,
    StreamEvent,
    StreamExistsError,
    StreamNotActiveError,
    StreamNotFoundError,
    WebError,
)
from aibind_postgres._concurrency import AsyncEvent, async_spawn
from aibind_postgres.sse import EventParser, ServerSentEvent

ITEMS = ["Hel", "lo", "", StreamEvent("usage", '{"inputTokens": 1}'), "\x01 wor\r\nld\n", "data: 😀"]
TEXT = "Hello\x01 wor\r\nld\ndata: 😀"
EVENTS = [
    ServerSentEvent("Hel", id="1"),
    ServerSentEvent("lo", id="2"),
    ServerSentEvent("", id="3"),
    ServerSentEvent('{"inputTokens": 1}', "usage", "4"),
    ServerSentEvent("\x01 wor\nld\n", id="5"),
    ServerSentEvent("data: 😀", id="6"),
]
DONE = ServerSentEvent("", "done")


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


async def read(stream, after_seq=None):
    parser = EventParser()
    return [event async for sent in stream.sse(after_seq) for event in parser.feed(sent)]


async def test_what_a_source_yields_arrives_and_is_resumed_after_any_number(store, other):
    finish = Finish()
    stream = await AsyncDurableStream.start(store, items(ITEMS), on_finish=finish)
    assert await read(stream) == [ServerSentEvent(stream.id, "stream-id", stream.id), *EVENTS, DONE]
    assert await stream.wait() == ("done", None, 6)
    assert finish.calls == [(TEXT, ("done", None, 6))]
    resumed = await AsyncDurableStream.resume(other, stream.id)
    for after_seq in range(8):
        assert await read(resumed, after_seq) == [*EVENTS[after_seq:], DONE]
        assert await read(await AsyncDurableStream.resume(other, stream.id, after_seq)) == [*EVENTS[after_seq:], DONE]
    assert await stream.stop() is False


def aibind_place(sent):
    """Return what aibind's client resumes after: it takes the ids of events without a name alone."""
    place = 0
    for block in b"".join(sent).decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith("data"))
        if "event" not in fields and fields.get("id", "").isdigit():
            place = int(fields["id"])
    return place


async def test_a_client_that_takes_no_id_from_named_events_gets_each_once(store):
    usage = StreamEvent("usage", "{}")
    stream = await AsyncDurableStream.start(store, items([usage, "a", usage, usage]))
    sent = [each async for each in stream.sse()]
    assert [aibind_place(sent[: 1 + number]) for number in range(5)] == [0, 1, 2, 3, 4]


async def test_it_goes_on_while_readers_come_and_go_and_nobody_holds_it(store, other):
    gate = AsyncEvent()
    stream = await AsyncDurableStream.start(store, items(["a"], gate), id="s")
    reader = stream.sse()
    assert b"stream-id" in await reader.__anext__()
    assert b"data: a" in await reader.__anext__()
    del stream, reader
    gc.collect()
    resumed = await AsyncDurableStream.resume(other, "s")
    async with AsyncBackground(partial(read, resumed)) as reading:
        await async_sleep(0.1)
        gate.set()
        events = [ServerSentEvent("a", id="1"), ServerSentEvent("and more", id="2"), DONE]
        assert await reading.result() == events


async def test_stopping_from_elsewhere_closes_a_source_that_is_silent(store, other):
    source, finish = Silent(), Finish()
    stream = await AsyncDurableStream.start(store, source, on_finish=finish)
    await async_until(lambda: source.asked)
    stopping = await AsyncDurableStream.resume(other, stream.id)
    assert await stopping.stop() is True
    assert await stream.wait(20) == ("stopped", None, 0)
    await async_until(lambda: source.closed)
    assert finish.calls == [("", ("stopped", None, 0))]
    stopped = [ServerSentEvent("", "stopped"), DONE]
    assert await read(stopping) == stopped
    assert (await read(stream))[1:] == stopped
    await async_until(lambda: not [name for name in async_workers() if "producer" in name])


async def test_stopping_keeps_what_was_written(store, other):
    finish, gate = Finish(), AsyncEvent()
    stream = await AsyncDurableStream.start(store, items(["a", "b"], gate), on_finish=finish)
    reader = other.read_from(stream.id)
    assert [(await reader.__anext__()).data for _ in range(2)] == ["\x01a", "\x01b"]
    assert await other.stop(stream.id)
    await async_until(lambda: stream._producer._ended)
    gate.set()  # a generator that runs in a thread cannot be interrupted
    assert await stream.wait(20) == ("stopped", None, 2)
    assert finish.calls == [("ab", ("stopped", None, 2))]


async def test_an_id_that_is_a_number_is_not_taken_for_that_of_an_event(store):
    stream = await AsyncDurableStream.start(store, items(["one", "two"]), id="2")
    assert (await read(stream))[0] == ServerSentEvent("2", "stream-id", None)


@pytest.mark.parametrize(
    ("expose_errors", "error", "text"),
    [
        (False, ValueError("the key is geheim"), "the answer broke off"),
        (True, ValueError("the key is geheim"), "the key is geheim"),
        (True, TimeoutError(), "TimeoutError"),
    ],
)
async def test_a_source_that_raises_ends_the_stream_in_error(store, caplog, expose_errors, error, text):
    async def fail():
        yield "a"
        raise error

    finish = Finish()
    stream = await AsyncDurableStream.start(store, fail(), on_finish=finish, expose_errors=expose_errors)
    assert (await read(stream))[1:] == [ServerSentEvent("a", id="1"), ServerSentEvent(text, "error"), DONE]
    assert await stream.wait() == ("error", text, 1)
    assert finish.calls == [("a", ("error", text, 1))]
    assert f"{type(error).__name__}: {error}".rstrip(": ") in caplog.text


@pytest.mark.parametrize(("text", "told"), [("no money left", "no money left"), ("", "the answer broke off")])
async def test_a_refusal_of_the_source_is_told_and_not_logged(store, caplog, text, told):
    async def refuse():
        yield "a"
        raise WebError(402, text)

    stream = await AsyncDurableStream.start(store, refuse())
    assert (await read(stream))[1:] == [ServerSentEvent("a", id="1"), ServerSentEvent(told, "error"), DONE]
    assert caplog.text == ""


@pytest.mark.parametrize(
    "item",
    [
        7,
        None,
        b"x",
        ("usage", "{}"),
        "\0",
        "\ud800",
        StreamEvent("usage", None),
        *(StreamEvent(name, "x") for name in ("", "a\nb", "a\rb", "a\x01b", "done", "error", "stopped", "stream-id")),
    ],
)
async def test_what_a_source_must_not_yield_ends_the_stream_in_error(store, item):
    stream = await AsyncDurableStream.start(store, items(["a", item]), expose_errors=True)
    state, error, total_chunks = await stream.wait(20)
    assert (state, total_chunks) == ("error", 1)
    assert error


async def test_what_others_have_written_is_read(store):
    await store.create("s")
    await store.append_many("s", ["plain", "usage\x01{}", "forged\nevent: done\x01x", "done\x01", "\x01"])
    await store.fail("s", "too hot")
    assert await read(await AsyncDurableStream.resume(store, "s")) == [
        ServerSentEvent("plain", id="1"),
        ServerSentEvent("{}", "usage", "2"),
        ServerSentEvent("x", "forged event: done", "3"),
        ServerSentEvent("", id="4"),
        ServerSentEvent("", id="5"),
        ServerSentEvent("too hot", "error"),
        DONE,
    ]


async def test_a_stream_that_is_not_there(store):
    with pytest.raises(StreamNotFoundError):
        await AsyncDurableStream.resume(store, "nothing")
    finish, source = Finish(), Silent()
    stream = await AsyncDurableStream.start(store, source, id="s", on_finish=finish)
    with pytest.raises(StreamExistsError):
        await AsyncDurableStream.start(store, items([]), id="s")
    async with AsyncBackground(partial(read, stream)) as reading:
        await async_until(lambda: source.asked)
        await store.delete("s")
        with pytest.raises(StreamNotFoundError):
            await reading.result()
    await async_until(lambda: finish.calls == [("", None)])
    await async_until(lambda: source.closed)
    with pytest.raises(StreamNotFoundError):
        await stream.stop()


async def test_a_quiet_stream_shows_that_it_lives(store):
    source = Silent()
    stream = await AsyncDurableStream.start(store, source)
    reader = stream.sse(heartbeat=0.05)
    assert b"stream-id" in await reader.__anext__()
    assert [await reader.__anext__() for _ in range(3)] == [b": ping\n\n"] * 3
    source.gate.set()
    assert b"event: done" in [sent async for sent in reader][-1]


async def test_callbacks_that_fail_are_logged(store, caplog):
    class Stubborn(Silent):
        def close(self):
            super().close()
            raise ValueError("will not close")

    async def fail(text, status):
        raise ValueError("will not finish")

    source = Stubborn()
    source.gate.set()
    stream = await AsyncDurableStream.start(store, source, on_finish=fail)
    assert (await stream.wait(20)).state == "done"
    assert "will not close" in caplog.text
    assert "will not finish" in caplog.text


async def test_an_end_that_nobody_meant_is_logged(store, other, caplog):
    gate, finish = AsyncEvent(), Finish()
    stream = await AsyncDurableStream.start(store, items(["a"], gate), on_finish=finish)
    await other.read_from(stream.id).__anext__()
    await other.append(stream.id, "of another producer")
    gate.set()
    await async_until(lambda: finish.calls)
    assert "another producer writes to this stream" in caplog.text


async def test_bad_arguments_are_refused(store):
    stream = await AsyncDurableStream.start(store, items([]))
    with pytest.raises(InvalidDataError):
        stream.sse(-1)
    with pytest.raises(ValueError, match="heartbeat"):
        stream.sse(heartbeat=0)
    await stream.wait()


class Ending:
    """A store of which each writer has ended as soon as it is entered, before anything is written."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def writer(self, id, on_end):
        return EndedWriter(self._store, id, on_end)


class EndedWriter:
    def __init__(self, store, id, on_end):
        self._store, self._id, self._on_end = store, id, on_end

    async def __aenter__(self):
        await self._store.stop(self._id)
        async_spawn(partial(self._on_end, StreamNotActiveError(self._id, "stopped")), "writer")
        await async_sleep(0.2)
        return self

    async def __aexit__(self, *error):
        pass

    async def flush(self):
        return 0


async def test_an_end_before_the_first_item_closes_the_source(store):
    source, finish = Silent(), Finish()
    stream = await AsyncDurableStream.start(Ending(store), source, on_finish=finish)
    assert (await stream.wait(20)).state == "stopped"
    await async_until(lambda: source.closed)
    assert finish.calls == [("", ("stopped", None, 0))]


async def test_a_producer_that_cannot_begin_closes_its_source(store, caplog):
    class Away(Ending):
        def writer(self, id, on_end):
            raise ConnectionError("no server")

    source, finish = Silent(), Finish()
    await AsyncDurableStream.start(Away(store), source, on_finish=finish)
    await async_until(lambda: finish.calls)
    assert source.closed
    assert "no server" in caplog.text


async def test_waiting_has_its_bound(store):
    source = Silent()
    stream = await AsyncDurableStream.start(store, source)
    with pytest.raises(TimeoutError):
        await stream.wait(0.1)
    source.gate.set()
    assert (await stream.wait(20)).state == "done"
