"""Durable streams: from the items of a source to the events of a browser."""

from __future__ import annotations

import gc
import re
from functools import partial

import pytest
from _async.sources import FinishRecorder, SilentSource, items
from support.concurrency import AsyncBackground, async_sleep, async_until, async_workers

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    InvalidDataError,
    StreamEvent,
    StreamExistsError,
    StreamNotFoundError,
    WebError,
)
from aibind_postgres._async import event_stream
from aibind_postgres._concurrency import AsyncEvent
from aibind_postgres.models import chunk_text, event_of
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


async def test_items_arrive_and_reading_resumes_after_any_number(store, other):
    finish = FinishRecorder()
    stream = await AsyncDurableStream.start(store, items(ITEMS), on_finish=finish)
    assert await read(stream) == [ServerSentEvent(stream.id, "stream-id", stream.id), *EVENTS, DONE]
    assert await stream.wait() == ("done", None, 6)
    assert finish.calls == [(TEXT, ("done", None, 6))]
    resumed = await AsyncDurableStream.resume(other, stream.id)
    for after_seq in range(8):
        assert await read(resumed, after_seq) == [*EVENTS[after_seq:], DONE]
        assert await read(await AsyncDurableStream.resume(other, stream.id, after_seq)) == [*EVENTS[after_seq:], DONE]
    assert await stream.stop() is False


async def test_available_chunks_arrive_in_few_pieces(store):
    """A web server needs more time for each piece of a body than for an event."""
    texts = [f"{number:0100}" for number in range(1000)]
    stream = await AsyncDurableStream.start(store, items(texts))
    await stream.wait(20)
    sent = [each async for each in stream.sse()]
    received = EventParser().feed(b"".join(sent))
    assert [event.data for event in received] == [stream.id, *texts, ""]
    assert len(sent) < 30
    assert max(map(len, sent)) < 17_000  # else a slow client has to read much within the time limit


HANDLED = ("stream-id", "usage", "partial", "data", "stopped", "error", "done")  # by the clients that resume


def aibind_blocks(sent):
    """Yield the name, the id and the data of each block as aibind's client does, also of blocks without data."""
    for block in b"".join(sent).decode().split("\n\n"):
        fields = [line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":")]
        if fields:
            data = "\n".join(value for name, value in fields if name == "data")
            yield dict(fields).get("event", ""), dict(fields).get("id", ""), data


def aibind_position(sent):
    """Return the number after which aibind's client resumes: it ignores the ids of events that it handles."""
    return [0, *(int(id) for event, id, _ in aibind_blocks(sent) if event not in HANDLED and id.isdigit())][-1]


def aibind_race_texts(sent):
    """Return what aibind's `Race` counts as texts: the data of each block without a name."""
    return [data for event, _, data in aibind_blocks(sent) if not event]


async def test_client_that_ignores_ids_of_named_events_gets_each_event_once(store, monkeypatch):
    monkeypatch.setattr(event_stream, "MAX_PIECE", 1)  # byte: the connection may be lost after each frame
    usage = StreamEvent("usage", "{}")
    stream = await AsyncDurableStream.start(store, items([usage, "a", usage, usage]))
    sent = [each async for each in stream.sse()]
    assert [aibind_position(sent[: 1 + number]) for number in range(5)] == [0, 1, 2, 3, 4]


async def test_named_event_is_no_text_of_a_race(store):
    """The first model with a text wins a race, so an event before the text must not count as one."""
    source = [StreamEvent("usage", "{}"), StreamEvent("tool_call", "{}"), "a", StreamEvent("data", "[]"), "b"]
    stream = await AsyncDurableStream.start(store, items(source))
    assert aibind_race_texts([each async for each in stream.sse()]) == ["a", "b"]
    assert aibind_race_texts([each async for each in stream.sse(after_seq=1)]) == ["a", "b"]


async def test_stream_continues_without_readers_and_references(store, other):
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


async def test_stop_by_another_store_closes_a_silent_source(store, other):
    source, finish = SilentSource(), FinishRecorder()
    stream = await AsyncDurableStream.start(store, source, on_finish=finish)
    await async_until(lambda: source.is_started)
    stopping = await AsyncDurableStream.resume(other, stream.id)
    assert await stopping.stop() is True
    assert await stream.wait(20) == ("stopped", None, 0)
    await async_until(lambda: source.closed)
    assert finish.calls == [("", ("stopped", None, 0))]
    stopped = [ServerSentEvent("", "stopped"), DONE]
    assert await read(stopping) == stopped
    assert (await read(stream))[1:] == stopped
    await async_until(lambda: not [name for name in async_workers() if "producer" in name])


async def test_stop_keeps_written_chunks(store, other):
    finish, gate = FinishRecorder(), AsyncEvent()
    stream = await AsyncDurableStream.start(store, items(["a", "b"], gate), on_finish=finish)
    reader = other.read_from(stream.id)
    assert [(await reader.__anext__()).data for _ in range(2)] == ["\x01a", "\x01b"]
    assert await other.stop(stream.id)
    await async_until(lambda: finish.calls)
    gate.set()  # a generator that runs in a thread cannot be interrupted
    assert await stream.wait(20) == ("stopped", None, 2)
    assert finish.calls == [("ab", ("stopped", None, 2))]


async def test_numeric_stream_id_is_not_sent_as_event_id(store):
    stream = await AsyncDurableStream.start(store, items(["one", "two"]), id="2")
    assert (await read(stream))[0] == ServerSentEvent("2", "stream-id", None)


@pytest.mark.parametrize(
    ("expose_errors", "error", "text"),
    [
        (False, ValueError("the key is geheim"), "the answer was interrupted"),
        (True, ValueError("the key is geheim"), "the key is geheim"),
        (True, TimeoutError(), "TimeoutError"),
    ],
)
async def test_error_of_the_source_ends_the_stream_in_error(store, caplog, expose_errors, error, text):
    async def fail():
        yield "a"
        raise error

    finish = FinishRecorder()
    stream = await AsyncDurableStream.start(store, fail(), on_finish=finish, expose_errors=expose_errors)
    assert (await read(stream))[1:] == [ServerSentEvent("a", id="1"), ServerSentEvent(text, "error"), DONE]
    assert await stream.wait() == ("error", text, 1)
    assert finish.calls == [("a", ("error", text, 1))]
    assert f"{type(error).__name__}: {error}".rstrip(": ") in caplog.text


@pytest.mark.parametrize(("text", "shown"), [("no money left", "no money left"), ("", "the answer was interrupted")])
async def test_web_error_of_the_source_is_exposed_and_not_logged(store, caplog, text, shown):
    async def refuse():
        yield "a"
        raise WebError(402, text)

    stream = await AsyncDurableStream.start(store, refuse())
    assert (await read(stream))[1:] == [ServerSentEvent("a", id="1"), ServerSentEvent(shown, "error"), DONE]
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
async def test_invalid_item_ends_the_stream_in_error(store, item):
    stream = await AsyncDurableStream.start(store, items(["a", item]), expose_errors=True)
    state, error, total_chunks = await stream.wait(20)
    assert (state, total_chunks) == ("error", 1)
    assert error


async def test_chunks_of_other_writers(store):
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


@pytest.mark.parametrize(
    "items_with_crlf",
    [
        ["a\r", "\nb"],
        ["a\r", "\n", "b\r", "\r", "\n\n", "c\r"],
        ["\na", "\n\r", "\n", "\n\r\n", "\r\n", "b"],
        ["a\r", "", StreamEvent("usage", "{}"), "", StreamEvent("usage", "\r"), "\nb"],
        [StreamEvent("usage", "\r"), "\n", "a"],
        ["\n", "a"],
    ],
)
async def test_crlf_between_two_chunks_is_one_line_break(store, items_with_crlf):
    stream = await AsyncDurableStream.start(store, items(items_with_crlf))
    text = "".join(item for item in items_with_crlf if isinstance(item, str))

    def text_of(events):
        return "".join(event.data for event in events if event.event == "message")

    whole = await read(stream, 0)
    assert text_of(whole) == re.sub("\r\n?", "\n", text)
    for seq in range(1, len(items_with_crlf) + 1):
        before = [event for event in whole if event.id is not None and event.id.isdigit() and int(event.id) <= seq]
        resumed = await AsyncDurableStream.resume(store, stream.id, seq)
        assert text_of(before) + text_of(await read(resumed)) == text_of(whole)
    stored = [chunk.data async for chunk in store.read_from(stream.id)]
    assert [event_of(chunk) for chunk in stored if not chunk.startswith("usage")] == [
        ("message", item) for item in items_with_crlf if isinstance(item, str)
    ]


@pytest.mark.parametrize("text", ["tool_call\x01{}", "\x01", "\x01\x01done\x01", "done\x01", "a\n\nevent: done\x01"])
async def test_text_with_a_separator_stays_text(store, text):
    expected = [ServerSentEvent(text, id="1"), DONE]
    produced = await AsyncDurableStream.start(store, items([text]))
    assert (await read(produced))[1:] == expected
    for write in ("append", "append_many", "writer"):
        await store.create(write)
        if write == "append":
            await store.append(write, chunk_text(text))
        elif write == "append_many":
            await store.append_many(write, [chunk_text(text)])
        else:
            async with store.writer(write) as writer:
                await writer.write(chunk_text(text))
        await store.complete(write)
        assert await read(await AsyncDurableStream.resume(store, write)) == expected


async def test_crlf_between_chunks_of_other_writers(store):
    await store.create("s")
    await store.append_many("s", ["a\r", "\nb", "\x01c\r", "\n"])
    await store.complete("s")
    for after_seq, expected in enumerate(["a\nbc\n", "bc\n", "c\n", "", ""]):
        events = await read(await AsyncDurableStream.resume(store, "s"), after_seq)
        assert "".join(event.data for event in events if event.event == "message") == expected


async def test_missing_stream(store):
    with pytest.raises(StreamNotFoundError):
        await AsyncDurableStream.resume(store, "nothing")
    finish, source = FinishRecorder(), SilentSource()
    stream = await AsyncDurableStream.start(store, source, id="s", on_finish=finish)
    with pytest.raises(StreamExistsError):
        await AsyncDurableStream.start(store, items([]), id="s")
    async with AsyncBackground(partial(read, stream)) as reading:
        await async_until(lambda: source.is_started)
        await store.delete("s")
        with pytest.raises(StreamNotFoundError):
            await reading.result()
    await async_until(lambda: finish.calls == [("", None)])
    await async_until(lambda: source.closed)
    with pytest.raises(StreamNotFoundError):
        await stream.stop()


async def test_heartbeats_of_a_quiet_stream(store):
    source = SilentSource()
    stream = await AsyncDurableStream.start(store, source)
    reader = stream.sse(heartbeat=0.05)
    assert b"stream-id" in await reader.__anext__()
    assert [await reader.__anext__() for _ in range(3)] == [b": ping\n\n"] * 3
    source.gate.set()
    assert b"event: done" in [sent async for sent in reader][-1]


async def test_errors_of_callbacks_are_logged(store, caplog):
    class RaisesWhenClosed(SilentSource):
        def close(self):
            super().close()
            raise ValueError("will not close")

    async def fail(text, status):
        raise ValueError("will not finish")

    source = RaisesWhenClosed()
    source.gate.set()
    stream = await AsyncDurableStream.start(store, source, on_finish=fail)
    assert (await stream.wait(20)).state == "done"
    assert "will not close" in caplog.text
    assert "will not finish" in caplog.text


async def test_conflict_with_another_producer_is_logged(store, other, caplog):
    gate, finish = AsyncEvent(), FinishRecorder()
    stream = await AsyncDurableStream.start(store, items(["a"], gate), on_finish=finish)
    await other.read_from(stream.id).__anext__()
    await other.append(stream.id, "of another producer")
    gate.set()
    await async_until(lambda: finish.calls)
    assert "another producer writes to this stream" in caplog.text


async def test_invalid_arguments_raise(store):
    stream = await AsyncDurableStream.start(store, items([]))
    with pytest.raises(InvalidDataError):
        stream.sse(-1)
    with pytest.raises(ValueError, match="heartbeat"):
        stream.sse(heartbeat=0)
    await stream.wait()


async def test_wait_timeout(store):
    source = SilentSource()
    stream = await AsyncDurableStream.start(store, source)
    with pytest.raises(TimeoutError):
        await stream.wait(0.1)
    source.gate.set()
    assert (await stream.wait(20)).state == "done"


async def test_repr(store):
    stream = await AsyncDurableStream.start(store, items([]), id="s")
    assert repr(stream) == f"<{type(stream).__name__} 's', produced here>"
    assert repr(await AsyncDurableStream.resume(store, "s")) == f"<{type(stream).__name__} 's', read here>"
    await stream.wait()
