"""The end of a durable stream: for every reason, the source is closed and `on_finish` is called exactly once."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial

import psycopg
import pytest
from _async.sources import (
    FinishRecorder,
    HookedClient,
    SilentSource,
    UninterruptibleSource,
    is_append,
    is_status_query,
    items,
)
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until, async_workers

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    InvalidDataError,
    StreamEvent,
    StreamExistsError,
    WebError,
)
from aibind_postgres._async import producing
from aibind_postgres._concurrency import AsyncEvent

FAILED = ("error", "the answer was interrupted", 1)


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


@pytest.fixture
async def pool(dsn):
    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=1, max_size=10, open=False) as pool:
        yield pool


@pytest.fixture
async def client(pool):
    return HookedClient(pool)


@pytest.fixture
async def hooked(client, tables):
    """A store whose statements the client can delay or fail."""
    async with AsyncPostgresStreamStore(client, **tables, poll_interval=0.05) as store:
        yield store


@pytest.fixture(autouse=True)
def shutdown_grace(monkeypatch):
    """Give producers more time, since the machine may be busy."""
    monkeypatch.setattr(producing, "SHUTDOWN_GRACE", 20.0)


async def no_producers():
    """Wait until no producer's worker runs."""
    await async_until(lambda: not [name for name in async_workers() if "producer" in name])


async def first_word(store, stream):
    """Wait until the source's first word is stored."""
    assert (await store.read_from(stream.id).__anext__()).data == "\x01word"


async def test_uninterruptible_source_delays_neither_the_end_nor_on_finish(store, other):
    source, finish = UninterruptibleSource(), FinishRecorder()
    stream = await AsyncDurableStream.start(store, source, on_finish=finish)
    try:
        await first_word(other, stream)
        assert await other.stop(stream.id)
        assert await stream.wait(20) == ("stopped", None, 1)
        assert finish.calls == [("word", ("stopped", None, 1))]
    finally:
        source.gate.set()
    await no_producers()
    assert len(finish.calls) == 1


async def test_source_is_closed_once(store, other):
    sources = [SilentSource() for _ in range(50)]
    streams = [await AsyncDurableStream.start(store, source) for source in sources]
    await async_until(lambda: all(source.is_started for source in sources))
    for stream in streams:
        await other.stop(stream.id)
    for stream in streams:
        await stream.wait(20)
    await no_producers()
    assert [source.closed for source in sources] == [1] * 50


class CustomInterrupt(BaseException):
    def __init__(self, first, second):
        super().__init__(first, second)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the exception ends its thread
async def test_base_exception_of_the_source_ends_the_stream(store, other):
    class Raising(UninterruptibleSource):
        async def __anext__(self):
            if not self.is_started:
                return await super().__anext__()
            raise CustomInterrupt("geheim", 2)

    finish = FinishRecorder()
    stream = await AsyncDurableStream.start(store, Raising(), on_finish=finish)
    assert await stream.wait(20) == FAILED
    assert finish.calls == [("word", FAILED)]
    await no_producers()


async def test_close_of_the_store_ends_its_streams(store, other, dsn, tables):
    sources, finish = [SilentSource(), UninterruptibleSource()], FinishRecorder()
    async with AsyncPostgresStreamStore(dsn, **tables) as closing:
        streams = [await AsyncDurableStream.start(closing, source, on_finish=finish) for source in sources]
        await async_until(lambda: all(source.is_started for source in sources))
        await first_word(other, streams[1])
    sources[1].gate.set()
    assert await other.get_status(streams[0].id) == ("error", "the answer was interrupted", 0)
    assert await other.get_status(streams[1].id) == FAILED
    assert sorted(finish.calls) == [("", ("error", "the answer was interrupted", 0)), ("word", FAILED)]
    await async_until(lambda: sources[0].closed == 1)


async def test_shutdown_waits_and_then_ends_the_remaining_streams(store, other):
    assert await AsyncDurableStream.shutdown(store) is True
    finish, late, gate, never = FinishRecorder(), FinishRecorder(), AsyncEvent(), SilentSource()
    ending = await AsyncDurableStream.start(store, items(["a"], gate), on_finish=finish)
    await AsyncDurableStream.start(store, never, on_finish=late)
    other_stream = await AsyncDurableStream.start(other, items(["a"], gate))
    await async_until(lambda: never.is_started)
    async with AsyncBackground(partial(AsyncDurableStream.shutdown, store, 4)) as shutting_down:
        await async_sleep(0.1)
        gate.set()
        assert await shutting_down.result() is False
    assert finish.calls == [("aand more", ("done", None, 2))]
    assert late.calls == [("", ("error", "the answer was interrupted", 0))]
    await async_until(lambda: never.closed)
    assert await store.get_status(ending.id) == ("done", None, 2)
    assert (await other_stream.wait(20)).state == "done"
    assert await AsyncDurableStream.shutdown(store, 0) is True


async def test_shutdown_waits_until_streams_have_ended(hooked, client):
    async def slow_end(sql, params):
        if "done" in params:
            await async_sleep(0.3)

    client.hook = slow_end
    finish = FinishRecorder()
    stream = await AsyncDurableStream.start(hooked, items(["a"]), on_finish=finish)
    assert await AsyncDurableStream.shutdown(hooked, 20) is True
    assert await hooked.get_status(stream.id) == ("done", None, 1)
    assert finish.calls == [("a", ("done", None, 1))]


async def test_shutdown_after_a_stream_was_deleted(store):
    source = SilentSource()
    stream = await AsyncDurableStream.start(store, source)
    await async_until(lambda: source.is_started)
    await store.delete(stream.id)
    await AsyncDurableStream.shutdown(store, 0)
    await async_until(lambda: source.closed)


async def test_shutdown_without_a_server_raises_nothing(hooked, client, caplog):
    back = AsyncEvent()

    async def fail_ends(sql, params):
        if "error" in params and not back.is_set():
            raise psycopg.OperationalError("no server")

    sources = [SilentSource(), SilentSource()]
    streams = [await AsyncDurableStream.start(hooked, source) for source in sources]
    await async_until(lambda: all(source.is_started for source in sources))
    client.hook = fail_ends
    assert await AsyncDurableStream.shutdown(hooked, 0) is False
    assert caplog.text.count("failed: no server") == 2
    await async_until(lambda: [source.closed for source in sources] == [1, 1])
    back.set()
    for stream in streams:
        assert await stream.wait(20) == ("error", "the answer was interrupted", 0)


async def test_silent_server_does_not_delay_shutdown(hooked, client, monkeypatch):
    silence = AsyncEvent()

    async def delay_ends(sql, params):
        if "error" in params:
            await silence.wait()

    sources = [SilentSource() for _ in range(20)]
    for source in sources:
        await AsyncDurableStream.start(hooked, source)
    await async_until(lambda: all(source.is_started for source in sources))
    client.hook = delay_ends
    monkeypatch.setattr(producing, "SHUTDOWN_GRACE", 0.5)
    async with AsyncBackground(partial(AsyncDurableStream.shutdown, hooked, 0)) as shutting_down:
        assert await shutting_down.result() is False  # before any statement has returned
    silence.set()
    await async_until(lambda: all(source.closed for source in sources))


@pytest.fixture
async def joining_client(pool):
    return HookedClient(pool, joins_transactions=True)


@pytest.fixture
async def joining(joining_client, tables):
    """A store in the transactions of its callers: a producer queries the status of a new stream."""
    async with AsyncPostgresStreamStore(joining_client, **tables) as store:
        yield store


def status_hook(hook):
    """Return a hook for status queries only."""

    async def before(sql, params):
        if is_status_query(sql):
            await hook(params[0])

    return before


async def test_shutdown_before_the_writer_opens_takes_effect_when_it_opens(joining, joining_client, other, monkeypatch):
    entered, gate = AsyncEvent(), AsyncEvent()

    async def delay(id):
        entered.set()
        await gate.wait()

    joining_client.hook = status_hook(delay)
    source, finish = SilentSource(), FinishRecorder()
    stream = await AsyncDurableStream.start(joining, source, on_finish=finish)
    await async_until(entered.is_set)
    with monkeypatch.context() as patch:
        patch.setattr(producing, "SHUTDOWN_GRACE", 0.1)
        assert await AsyncDurableStream.shutdown(joining, 0) is False
    assert finish.calls == []
    gate.set()
    await async_until(lambda: source.closed)
    await async_until(lambda: finish.calls)
    assert finish.calls == [("", ("error", "the answer was interrupted", 0))]
    assert await other.get_status(stream.id) == ("error", "the answer was interrupted", 0)


async def test_source_is_not_read_if_the_stream_is_stopped_before_the_writer_is_open(joining, joining_client, other):
    source, finish = SilentSource(), FinishRecorder()

    async def stop(id):
        await other.stop(id)

    joining_client.hook = status_hook(stop)
    stream = await AsyncDurableStream.start(joining, source, on_finish=finish)
    assert await stream.wait(20) == ("stopped", None, 0)
    assert (source.is_started, source.closed) == (False, 1)
    assert finish.calls == [("", ("stopped", None, 0))]


async def test_writer_that_cannot_be_opened(joining, joining_client, other, caplog):
    async def fail(id):
        raise ConnectionError("no server")

    joining_client.hook = status_hook(fail)
    source, finish = SilentSource(), FinishRecorder()
    stream = await AsyncDurableStream.start(joining, source, on_finish=finish)
    await async_until(lambda: finish.calls)
    await no_producers()
    assert (source.is_started, source.closed, finish.calls) == (False, 1, [("", None)])
    assert "failed: no server" in caplog.text
    assert await other.get_status(stream.id) == ("error", "the answer was interrupted", 0)


async def test_new_stream_is_not_queried_for_its_status(hooked, client, other):
    gate = AsyncEvent()
    stream = await AsyncDurableStream.start(hooked, items(["a"], gate))
    assert (await other.read_from(stream.id).__anext__()).data == "\x01a"
    assert [sql for sql in client.statements if is_append(sql)]
    assert not [sql for sql in client.statements if is_status_query(sql)]
    gate.set()
    await stream.wait(20)
    await hooked.get_status(stream.id)
    assert [sql for sql in client.statements if is_status_query(sql)]


async def test_error_on_closing_the_source_is_not_exposed(client, tables, other):
    class RaisesWhenClosed(UninterruptibleSource):
        next_word = AsyncEvent()
        words = 0

        async def __anext__(self):
            self.words += 1
            if self.words == 1:
                return "word"
            if self.words == 2:
                await self.next_word.wait()
                return "lost"
            try:
                await self.gate.wait()
            finally:
                raise ValueError("the key is geheim")

        def close(self):
            super().close()
            self.gate.set()

    async def fail_appends(sql, params):
        if is_append(sql):
            raise psycopg.OperationalError("geheim, too")

    async with AsyncPostgresStreamStore(client, **tables, retry_for=0.2) as store:
        source = RaisesWhenClosed()
        stream = await AsyncDurableStream.start(store, source)
        await first_word(other, stream)
        client.hook = fail_appends
        source.next_word.set()
        await async_until(lambda: source.closed)
        source.gate.set()
        await no_producers()
    assert await other.get_status(stream.id) == FAILED


@pytest.mark.parametrize("source", [None, "one text", 7, object()])
async def test_invalid_source_raises_before_the_stream_is_created(store, source):
    with pytest.raises(TypeError, match="the source must be an iterable"):
        await AsyncDurableStream.start(store, source)
    assert [info async for info in store.list()] == []


async def test_source_is_closed_if_the_stream_cannot_be_created(store):
    source = SilentSource()
    await store.create("taken")
    with pytest.raises(StreamExistsError):
        await AsyncDurableStream.start(store, source, id="taken")
    for number, id in enumerate(("two\nlines", "", "\0"), start=2):
        with pytest.raises(InvalidDataError):
            await AsyncDurableStream.start(store, source, id=id)
        assert source.closed == number
    assert [info.id async for info in store.list()] == ["taken"]


async def test_source_and_on_finish_get_the_context_variables_of_the_caller(store, other):
    tenant, seen = ContextVar("tenant"), []

    async def answer():
        yield tenant.get("no tenant")

    async def finish(text, status):
        seen.append((status.state, tenant.get("no tenant")))

    tenant.set("tenant 7")
    silent = SilentSource()
    stream = await AsyncDurableStream.start(store, answer(), on_finish=finish)
    stopped = await AsyncDurableStream.start(store, silent, on_finish=finish)
    tenant.set("tenant 8")
    await stream.wait(20)
    await async_until(lambda: silent.is_started)
    await other.stop(stopped.id)
    await stopped.wait(20)
    assert [chunk.data async for chunk in store.read_from(stream.id)] == ["\x01tenant 7"]
    assert seen == [("done", "tenant 7"), ("stopped", "tenant 7")]


async def test_source_and_on_finish_run_inside_their_context(hooked, client, other):
    tenant, seen = ContextVar("tenant"), []
    gate, waiting, held, finished = AsyncEvent(), AsyncEvent(), AsyncEvent(), AsyncEvent()

    @asynccontextmanager
    async def context():
        token = tenant.set("tenant 9")
        try:
            yield
        finally:
            tenant.reset(token)  # raises in another thread or task
            seen.append("left")

    async def answer():
        async with context():
            try:
                yield tenant.get("no tenant")
                await gate.wait()
                yield "x" * 1_000_000  # fills the buffer of the writer
                waiting.set()
                yield "and more"
            finally:
                await finished.wait()
                seen.append(tenant.get("no tenant"))

    async def finish(text, status):
        seen.append(f"{status.state} in {tenant.get('no tenant')}")

    async def hold_appends(sql, params):
        if is_append(sql):
            await held.wait()

    tenant.set("tenant 7")
    stream = await AsyncDurableStream.start(hooked, answer(), context=context, on_finish=finish)
    assert (await other.read_from(stream.id).__anext__()).data == "\x01tenant 9"
    client.hook = hold_appends
    gate.set()
    await async_until(waiting.is_set)
    assert await other.stop(stream.id)  # while the source neither runs nor has ended
    held.set()
    await async_until(lambda: "stopped in tenant 9" in seen)
    assert "tenant 9" not in seen
    finished.set()
    await async_until(lambda: len(seen) == 5)
    assert sorted(seen) == ["left", "left", "left", "stopped in tenant 9", "tenant 9"]
    assert tenant.get() == "tenant 7"


async def test_error_on_entering_the_context_fails_the_stream(store, caplog):
    finish, source = FinishRecorder(), SilentSource()
    stream = await AsyncDurableStream.start(store, source, context=partial(int, "geheim"), on_finish=finish)
    assert await stream.wait(20) == ("error", "the answer was interrupted", 0)
    assert (source.is_started, source.closed, finish.calls) == (False, 1, [])
    for failed in ("the source of stream", "on_finish of stream"):
        assert failed in caplog.text
    assert caplog.text.count("ValueError: invalid literal for int() with base 10: 'geheim'") == 2


@pytest.mark.parametrize("error", [None, WebError(402, "no money left"), ValueError("broken")])
async def test_error_on_leaving_the_context_does_not_change_the_status(store, caplog, error):
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

    finish = FinishRecorder()
    stream = await AsyncDurableStream.start(store, answer(), context=context, on_finish=finish, expose_errors=True)
    status = ("done", None, 1) if error is None else ("error", str(error), 1)
    assert await stream.wait(20) == status
    assert finish.calls == [("a", status)]
    assert seen == ([] if error is None else [error])
    assert caplog.text.count("raised when it was left") == 2


async def test_error_on_leaving_the_context_after_a_stop_is_logged(store, other, caplog):
    @asynccontextmanager
    async def context():
        try:
            yield
        finally:
            raise ValueError("geheim")

    source = SilentSource()
    stream = await AsyncDurableStream.start(store, source, context=context)
    await async_until(lambda: source.is_started)
    await other.stop(stream.id)
    assert (await stream.wait(20)).state == "stopped"
    await async_until(lambda: "raised when it was left" in caplog.text)


@pytest.mark.parametrize("kind", ["generator", "iterator"])
async def test_source_is_not_read_if_the_stream_is_stopped_while_the_context_is_entered(store, other, kind):
    entered, gate, calls, finish = [], AsyncEvent(), [], FinishRecorder()

    @asynccontextmanager
    async def context():
        entered.append(True)
        await gate.wait()
        yield

    async def answer():
        calls.append("the model")
        yield "a"

    iterator = SilentSource()
    source = answer() if kind == "generator" else iterator
    stream = await AsyncDurableStream.start(store, source, context=context, on_finish=finish)
    await async_until(lambda: entered)
    await other.stop(stream.id)
    await async_until(lambda: len(entered) == 2)  # for `on_finish`: the producer has noticed the stop
    gate.set()
    assert await stream.wait(20) == ("stopped", None, 0)
    await async_until(lambda: finish.calls)
    await no_producers()
    assert finish.calls == [("", ("stopped", None, 0))]
    assert (calls, iterator.is_started, iterator.closed) == ([], False, kind == "iterator")


async def test_status_is_none_if_it_cannot_be_queried(hooked, client, other, caplog):
    gate, last, finish = AsyncEvent(), AsyncEvent(), FinishRecorder()

    async def answer():
        yield "a"
        await gate.wait()
        yield StreamEvent("usage", "{}")
        await last.wait()

    async def fail_status_queries(sql, params):
        if is_status_query(sql):
            raise ConnectionError("no server")

    stream = await AsyncDurableStream.start(hooked, answer(), on_finish=finish)
    assert (await other.read_from(stream.id).__anext__()).data == "\x01a"
    client.hook = fail_status_queries
    await other.stop(stream.id)
    gate.set()
    await async_until(lambda: finish.calls)
    last.set()
    assert finish.calls == [("a", None)]
    assert "could not be queried for on_finish: no server" in caplog.text


async def test_concurrent_ends_at_random_moments(store, other):
    """End many streams in every way at once: each source is closed once, each `on_finish` called once."""
    rng = random.Random(7)
    sources, finishes, streams = [], [], []

    async def begin(number):
        source, finish = SilentSource(), FinishRecorder()
        sources.append(source)
        finishes.append(finish)
        streams.append(await AsyncDurableStream.start(store, source, on_finish=finish))

    async def end(number):
        await async_sleep(rng.random() / 5)
        stream, source = streams[number], sources[number]
        ways = [stream.stop, partial(other.stop, stream.id), partial(other.delete, stream.id)]
        if number % 4 < 3:
            await ways[number % 4]()
        if number % 4 == 3 or rng.random() < 0.3:
            source.gate.set()

    for number in range(40):
        await begin(number)
    ending = [partial(end, number) for number in range(36)]
    await async_gather(*ending, partial(AsyncDurableStream.shutdown, store, 0.1))
    assert await AsyncDurableStream.shutdown(store, 20) is True
    await no_producers()
    assert [source.closed for source in sources] == [1] * 40
    assert [len(finish.calls) for finish in finishes] == [1] * 40


async def test_unstorable_item_is_explained_in_the_log_only(store, caplog):
    stream = await AsyncDurableStream.start(store, items(["word", "geheim\0"]))
    assert await stream.wait(20) == FAILED
    assert "contains a NUL character" in caplog.text
