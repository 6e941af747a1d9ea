"""The end of a durable stream: whoever makes it, whenever it comes, what is owed is done once."""

from __future__ import annotations

from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial

import psycopg
import pytest
from _async.sources import Deaf, Finish, Silent, items
from support.concurrency import AsyncBackground, async_sleep, async_until, async_workers

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    InvalidDataError,
    StreamExistsError,
    WebError,
)
from aibind_postgres._async import producing
from aibind_postgres._concurrency import AsyncEvent

BROKEN_OFF = ("error", "the answer broke off", 1)


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Let `on_finish` have the time that it takes on a busy machine."""
    monkeypatch.setattr(producing, "LAST_WORDS", 20.0)


async def spoken(store, stream):
    """Wait for the first word."""
    assert (await store.read_from(stream.id).__anext__()).data == "\x01word"


async def test_a_source_that_cannot_be_interrupted_holds_up_neither_the_end_nor_what_is_owed(store, other):
    source, finish = Deaf(), Finish()
    stream = await AsyncDurableStream.start(store, source, on_finish=finish)
    try:
        await spoken(other, stream)
        assert await other.stop(stream.id)
        assert await stream.wait(20) == ("stopped", None, 1)
        assert finish.calls == [("word", ("stopped", None, 1))]
    finally:
        source.gate.set()
    await async_until(lambda: not [name for name in async_workers() if "producer" in name])
    assert len(finish.calls) == 1


async def test_a_source_is_closed_once(store, other):
    sources = [Silent() for _ in range(50)]
    streams = [await AsyncDurableStream.start(store, source) for source in sources]
    await async_until(lambda: all(source.asked for source in sources))
    for stream in streams:
        await other.stop(stream.id)
    for stream in streams:
        await stream.wait(20)
    await async_until(lambda: not [name for name in async_workers() if "producer" in name])
    assert [source.closed for source in sources] == [1] * 50


class OddInterruption(BaseException):
    def __init__(self, first, second):
        super().__init__(first, second)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it ends its thread
async def test_what_is_no_exception_ends_a_stream_too(store, other):
    class Raising(Deaf):
        async def __anext__(self):
            if not self.asked:
                return await super().__anext__()
            raise OddInterruption("geheim", 2)

    finish = Finish()
    stream = await AsyncDurableStream.start(store, Raising(), on_finish=finish)
    assert await stream.wait(20) == BROKEN_OFF
    assert finish.calls == [("word", BROKEN_OFF)]
    await async_until(lambda: not [name for name in async_workers() if "producer" in name])


async def test_closing_a_store_ends_what_is_written_there(store, other, dsn, tables):
    sources, finish = [Silent(), Deaf()], Finish()
    async with AsyncPostgresStreamStore(dsn, **tables) as closing:
        streams = [await AsyncDurableStream.start(closing, source, on_finish=finish) for source in sources]
        await async_until(lambda: all(source.asked for source in sources))
        await spoken(other, streams[1])
    sources[1].gate.set()
    assert await other.get_status(streams[0].id) == ("error", "the answer broke off", 0)
    assert await other.get_status(streams[1].id) == BROKEN_OFF
    assert sorted(finish.calls) == [("", ("error", "the answer broke off", 0)), ("word", BROKEN_OFF)]
    await async_until(lambda: sources[0].closed == 1)


async def test_draining_lets_answers_end_and_breaks_off_those_that_do_not(store, other):
    assert await AsyncDurableStream.shutdown(store) is True
    finish, late, gate, never = Finish(), Finish(), AsyncEvent(), Silent()
    ending = await AsyncDurableStream.start(store, items(["a"], gate), on_finish=finish)
    await AsyncDurableStream.start(store, never, on_finish=late)
    elsewhere = await AsyncDurableStream.start(other, items(["a"], gate))
    await async_until(lambda: never.asked)
    async with AsyncBackground(partial(AsyncDurableStream.shutdown, store, 4)) as draining:
        await async_sleep(0.1)
        gate.set()
        assert await draining.result() is False
    assert finish.calls == [("aand more", ("done", None, 2))]
    assert late.calls == [("", ("error", "the answer broke off", 0))]
    await async_until(lambda: never.closed)
    assert await store.get_status(ending.id) == ("done", None, 2)
    assert (await elsewhere.wait(20)).state == "done"
    assert await AsyncDurableStream.shutdown(store, 0) is True


async def test_draining_waits_until_streams_have_ended(store, monkeypatch):
    complete = store.complete

    async def slow(id):
        await async_sleep(0.3)
        return await complete(id)

    monkeypatch.setattr(store, "complete", slow)
    finish = Finish()
    stream = await AsyncDurableStream.start(store, items(["a"]), on_finish=finish)
    assert await AsyncDurableStream.shutdown(store, 20) is True
    assert await store.get_status(stream.id) == ("done", None, 1)
    assert finish.calls == [("a", ("done", None, 1))]


async def test_draining_a_stream_that_was_deleted(store):
    source = Silent()
    stream = await AsyncDurableStream.start(store, source)
    await async_until(lambda: source.asked)
    await store.delete(stream.id)
    await AsyncDurableStream.shutdown(store, 0)
    await async_until(lambda: source.closed)


async def test_draining_while_the_server_is_away_raises_nothing(store, caplog, monkeypatch):
    back, fail = AsyncEvent(), store.fail

    async def away(id, error):
        if not back.is_set():
            raise psycopg.OperationalError("no server")
        return await fail(id, error)

    sources = [Silent(), Silent()]
    streams = [await AsyncDurableStream.start(store, source) for source in sources]
    await async_until(lambda: all(source.asked for source in sources))
    monkeypatch.setattr(store, "fail", away)
    assert await AsyncDurableStream.shutdown(store, 0) is False
    assert caplog.text.count("gave up: no server") == 2
    await async_until(lambda: [source.closed for source in sources] == [1, 1])
    back.set()
    for stream in streams:
        assert await stream.wait(20) == ("error", "the answer broke off", 0)


async def test_a_server_that_is_silent_holds_up_no_end(store, monkeypatch):
    silence = AsyncEvent()

    async def silent(id, error):
        await silence.wait()

    sources = [Silent() for _ in range(20)]
    for source in sources:
        await AsyncDurableStream.start(store, source)
    await async_until(lambda: all(source.asked for source in sources))
    monkeypatch.setattr(store, "fail", silent)
    monkeypatch.setattr(producing, "LAST_WORDS", 0.5)
    async with AsyncBackground(partial(AsyncDurableStream.shutdown, store, 0)) as draining:
        assert await draining.result() is False  # though nobody has answered
    silence.set()
    await async_until(lambda: all(source.closed for source in sources))


async def test_what_is_broken_off_before_it_has_begun_ends_when_it_begins(store, monkeypatch):
    entered, gate = AsyncEvent(), AsyncEvent()
    get_status = store.get_status

    async def slow(id):
        entered.set()
        await gate.wait()
        return await get_status(id)

    monkeypatch.setattr(store, "get_status", slow)
    source, finish = Silent(), Finish()
    stream = await AsyncDurableStream.start(store, source, on_finish=finish)
    async with AsyncBackground(partial(AsyncDurableStream.shutdown, store, 0)) as draining:
        await async_until(lambda: entered.is_set() and stream._producer._is_late)
        gate.set()
        assert await draining.result() is False
    await async_until(lambda: source.closed)
    assert await get_status(stream.id) == ("error", "the answer broke off", 0)
    assert finish.calls == [("", ("error", "the answer broke off", 0))]


async def test_what_a_source_says_when_it_is_closed_is_told_to_nobody(store, other):
    class Complaining(Deaf):
        async def __anext__(self):
            if not self.asked:
                return await super().__anext__()
            try:
                await self.gate.wait()
            finally:
                raise ValueError("the key is geheim")

        def close(self):
            super().close()
            self.gate.set()

    stream = await AsyncDurableStream.start(store, Complaining())
    await spoken(other, stream)
    stream._producer._writer._error = ConnectionError("geheim, too")  # as after a server that was away for too long
    await stream._producer._break_off(ConnectionError("geheim, too"))
    stream._producer._source.gate.set()
    await async_until(lambda: not [name for name in async_workers() if "producer" in name])
    assert await other.get_status(stream.id) == BROKEN_OFF


@pytest.mark.parametrize("source", [None, "one text", 7, object()])
async def test_what_is_no_source_is_refused_before_anything_is_there(store, source):
    with pytest.raises(TypeError, match="a source must be an iterable"):
        await AsyncDurableStream.start(store, source)
    assert [info async for info in store.list()] == []


async def test_a_stream_that_cannot_begin_closes_its_source(store):
    source = Silent()
    await store.create("taken")
    with pytest.raises(StreamExistsError):
        await AsyncDurableStream.start(store, source, id="taken")
    for number, id in enumerate(("two\nlines", "", "\0"), start=2):
        with pytest.raises(InvalidDataError):
            await AsyncDurableStream.start(store, source, id=id)
        assert source.closed == number
    assert [info.id async for info in store.list()] == ["taken"]


async def test_a_source_and_its_end_see_the_context_that_they_were_begun_in(store, other):
    tenant, seen = ContextVar("tenant"), []

    async def see():
        yield tenant.get("nobody")

    async def finish(text, status):
        seen.append((status.state, tenant.get("nobody")))

    tenant.set("tenant 7")
    silent = Silent()
    stream = await AsyncDurableStream.start(store, see(), on_finish=finish)
    stopped = await AsyncDurableStream.start(store, silent, on_finish=finish)
    tenant.set("tenant 8")
    await stream.wait(20)
    await async_until(lambda: silent.asked)
    await other.stop(stopped.id)
    await stopped.wait(20)
    assert [chunk.data async for chunk in store.read_from(stream.id)] == ["\x01tenant 7"]
    assert seen == [("done", "tenant 7"), ("stopped", "tenant 7")]


async def test_a_source_and_its_end_are_within_what_is_set_up_for_them(store, other, monkeypatch):
    tenant, seen = ContextVar("tenant"), []
    gate, writing, held = AsyncEvent(), AsyncEvent(), AsyncEvent()

    @asynccontextmanager
    async def context():
        token = tenant.set("tenant 9")
        try:
            yield
        finally:
            tenant.reset(token)  # which refuses in any other thread or task
            seen.append("down")

    async def answer():
        async with context():
            try:
                yield tenant.get("nobody")
                await gate.wait()
                yield "and more"
            finally:
                seen.append(tenant.get("nobody"))

    async def finish(text, status):
        seen.append(f"{status.state} in {tenant.get('nobody')}")

    async def write(text):
        writing.set()
        await held.wait()

    tenant.set("tenant 7")
    stream = await AsyncDurableStream.start(store, answer(), context=context, on_finish=finish)
    assert (await other.read_from(stream.id).__anext__()).data == "\x01tenant 9"
    monkeypatch.setattr(stream._producer._writer, "write", write)
    gate.set()
    await async_until(writing.is_set)
    assert await other.stop(stream.id)  # while the source neither runs nor has ended
    await async_until(lambda: "stopped in tenant 9" in seen)
    held.set()
    await async_until(lambda: len(seen) == 5)
    assert sorted(seen) == ["down", "down", "down", "stopped in tenant 9", "tenant 9"]
    assert tenant.get() == "tenant 7"


async def test_what_cannot_be_set_up_is_a_failure_of_what_it_is_for(store, caplog):
    finish, source = Finish(), Silent()
    stream = await AsyncDurableStream.start(store, source, context=partial(int, "geheim"), on_finish=finish)
    assert await stream.wait(20) == ("error", "the answer broke off", 0)
    assert (source.asked, source.closed, finish.calls) == (False, 1, [])
    for failed in ("the source of stream", "on_finish of stream"):
        assert failed in caplog.text
    assert caplog.text.count("ValueError: invalid literal for int() with base 10: 'geheim'") == 2


@pytest.mark.parametrize("error", [None, WebError(402, "no money left"), ValueError("broken")])
async def test_what_fails_to_be_taken_down_changes_nothing(store, caplog, error):
    seen = []

    @asynccontextmanager
    async def context():
        try:
            yield
        except Exception as seen_error:
            seen.append(seen_error)
        raise WebError(500, "geheim")

    async def answer():
        yield "a"
        if error is not None:
            raise error

    finish = Finish()
    stream = await AsyncDurableStream.start(store, answer(), context=context, on_finish=finish, expose_errors=True)
    status = ("done", None, 1) if error is None else ("error", str(error), 1)
    assert await stream.wait(20) == status
    assert finish.calls == [("a", status)]
    assert seen == ([] if error is None else [error])
    assert caplog.text.count("could not be taken down") == 2


async def test_what_fails_to_be_taken_down_after_a_stop_is_told_to_the_log(store, other, caplog):
    @asynccontextmanager
    async def context():
        try:
            yield
        finally:
            raise ValueError("geheim")

    source = Silent()
    stream = await AsyncDurableStream.start(store, source, context=context)
    await async_until(lambda: source.asked)
    await other.stop(stream.id)
    assert (await stream.wait(20)).state == "stopped"
    await async_until(lambda: "could not be taken down" in caplog.text)


async def test_a_source_whose_stream_is_stopped_before_it_could_begin_does_not(store, other):
    entered, gate, asked, finish = AsyncEvent(), AsyncEvent(), [], Finish()

    @asynccontextmanager
    async def context():
        entered.set()
        await gate.wait()
        yield

    async def answer():
        asked.append("the model")
        yield "a"

    stream = await AsyncDurableStream.start(store, answer(), context=context, on_finish=finish)
    await async_until(entered.is_set)
    await other.stop(stream.id)
    await async_until(lambda: stream._producer._ended)
    gate.set()
    assert await stream.wait(20) == ("stopped", None, 0)
    await async_until(lambda: finish.calls)
    await async_until(lambda: not [name for name in async_workers() if "producer" in name])
    assert asked == []


async def test_an_end_that_nobody_can_ask_for_is_told_as_unknown(store, caplog, monkeypatch):
    async def away(id):
        raise ConnectionError("no server")

    finish, source = Finish(), Silent()
    stream = await AsyncDurableStream.start(store, source, on_finish=finish)
    await async_until(lambda: source.asked)
    with monkeypatch.context() as patch:
        patch.setattr(store, "get_status", away)
        await stream._producer._break_off(ConnectionError("no server"))
    assert finish.calls == [("", None)]
    await stream.stop()
    assert "is not known to its producer: no server" in caplog.text


async def test_what_cannot_be_stored_is_told_to_the_log_alone(store, caplog):
    stream = await AsyncDurableStream.start(store, items(["word", "geheim\0"]))
    assert await stream.wait(20) == BROKEN_OFF
    assert "contains a NUL character" in caplog.text
