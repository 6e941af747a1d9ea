"""Metrics: what a store reports to an adapter, and what happens if the adapter raises."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from contextlib import nullcontext
from functools import partial

import psycopg
import pytest
from psycopg import sql
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until
from support.recorded_metrics import RaisingMetrics, RecordedMetrics, RecordedSpan
from support.sessions import TERMINATE

from aibind_postgres import (
    AsyncDurableStream,
    AsyncHousekeeper,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    ChatHistory,
    InvalidDataError,
    _leases,
    metrics,
)
from aibind_postgres._async.producing import AsyncProducer

REFUSE_DELETION = """
CREATE FUNCTION {schema}.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'refused';
END $$;
CREATE TRIGGER refuse BEFORE DELETE ON {status} FOR EACH ROW EXECUTE FUNCTION {schema}.refuse()
"""

REFUSE_DONE = """
CREATE FUNCTION {schema}.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'refused';
END $$;
CREATE TRIGGER refuse BEFORE UPDATE ON {status} FOR EACH ROW WHEN (NEW.state = 'done')
  EXECUTE FUNCTION {schema}.refuse()
"""


class RefusedConnection(psycopg.AsyncConnection):
    """Connects to a server that may be unreachable."""

    refused = False

    @classmethod
    async def connect(cls, conninfo="", **kwargs):
        if cls.refused:
            raise psycopg.OperationalError("unreachable")
        return await super().connect(conninfo, **kwargs)


@pytest.fixture
def recorded():
    return RecordedMetrics()


@pytest.fixture
async def store(dsn, tables, recorded):
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=recorded) as store:
        yield store


async def read(store, id, chunks):
    async for chunk in store.read_from(id):
        chunks.append(chunk.data)


async def words():
    yield "one "
    yield "two "
    yield "three"


async def broken_words():
    yield "one "
    raise LookupError("no more words")


async def test_appends_and_chunks_per_statement(store, recorded):
    id = await store.create()
    await store.append(id, "a")
    await store.append_many(id, ["b", "c", "d"])
    assert recorded.values[metrics.APPEND_CHUNKS] == [1, 3]
    assert len(recorded.values[metrics.APPEND_DURATION]) == 2
    assert min(recorded.values[metrics.APPEND_DURATION]) > 0


async def test_simultaneous_appends(store, recorded):
    ids = [await store.create() for _ in range(100)]
    await async_gather(*[partial(store.append, id, "x") for id in ids])
    assert sum(recorded.values[metrics.APPEND_CHUNKS]) == 100
    assert len(recorded.values[metrics.APPEND_CHUNKS]) < 100
    assert len(recorded.values[metrics.APPEND_DURATION]) == 100


async def test_created_and_ended_streams(store, recorded):
    first, second, third = [await store.create() for _ in range(3)]
    assert not await store.acquire(first)
    await store.complete(first)
    await store.stop(first)
    await store.stop(second)
    await store.fail(third, "broken")
    assert recorded.counts == {
        metrics.STREAMS_CREATED: 3,
        (metrics.STREAMS_ENDED, "done"): 1,
        (metrics.STREAMS_ENDED, "stopped"): 1,
        (metrics.STREAMS_ENDED, "error"): 1,
        **{key: count for key, count in recorded.counts.items() if key == metrics.STREAMS_NOTIFIED},
    }


async def test_active_writers_and_readers(store, recorded):
    id, chunks = await store.create(), []
    assert recorded.gauges[metrics.READERS_ACTIVE] == recorded.gauges[metrics.WRITERS_ACTIVE] == 0
    async with AsyncBackground(partial(read, store, id, chunks)):
        async with store.writer(id) as writer:
            await writer.write("x")
            await async_until(lambda: chunks)
            assert recorded.gauges[metrics.READERS_ACTIVE] == recorded.gauges[metrics.WRITERS_ACTIVE] == 1
    assert recorded.gauges[metrics.READERS_ACTIVE] == recorded.gauges[metrics.WRITERS_ACTIVE] == 0


async def test_gauges_end_with_the_store(dsn, tables, recorded):
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=recorded) as store:
        assert len(recorded.stores) == 1
    assert recorded.stores == []
    del store
    AsyncPostgresStreamStore(dsn, **tables, metrics=recorded)
    gc.collect()
    assert recorded.stores == []


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_time_from_writer_to_reader(store, other, recorded, elsewhere):
    id, chunks = await store.create(), []
    async with AsyncBackground(partial(read, store, id, chunks)):
        await async_until(lambda: recorded.gauges[metrics.READERS_ACTIVE])
        await async_sleep(0.1)  # a reader that still reads its first page has not waited
        await (other if elsewhere else store).append(id, "x")
        await async_until(lambda: recorded.values[metrics.DELIVERY_DURATION])
        await store.complete(id)
    [seconds] = recorded.values[metrics.DELIVERY_DURATION]
    assert 0 <= seconds < 30


async def test_notifications_sent_and_received(store, recorded, dsn, tables):
    reading, id, chunks = RecordedMetrics(), await store.create(), []
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=reading) as reader:
        async with AsyncBackground(partial(read, reader, id, chunks)):
            await async_until(lambda: reading.gauges[metrics.STORES_LISTENING])
            assert reading.gauges[metrics.STORES_POLLING] == 0
            await store.append(id, "x")
            await async_until(lambda: reading.counts[metrics.NOTIFICATIONS_RECEIVED])
            await store.complete(id)
    assert recorded.counts[metrics.STREAMS_NOTIFIED] >= 1


async def test_polls(dsn, tables, recorded, other):
    id, chunks = await other.create(), []
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=recorded, poll_interval=0.02) as store:
        async with AsyncBackground(partial(read, store, id, chunks)):
            await async_until(lambda: recorded.counts[metrics.POLLS] > 2)
            await other.complete(id)


async def test_switches_between_notifications_and_polling(database, recorded, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "aibind_postgres.listener")
    chunks = []
    pool = AsyncConnectionPool(database, connection_class=RefusedConnection, min_size=1, timeout=0.2, open=False)
    async with pool, AsyncPostgresStreamStore(pool, metrics=recorded, poll_interval=0.02) as store:
        id = await store.create()
        async with AsyncBackground(partial(read, store, id, chunks)):
            await async_until(lambda: recorded.gauges[metrics.STORES_LISTENING])
            monkeypatch.setattr(RefusedConnection, "refused", True)
            with psycopg.connect(database, autocommit=True) as admin:
                admin.execute(TERMINATE)
            await async_until(lambda: recorded.counts[metrics.SWITCHES, "polling"])
            assert recorded.gauges[metrics.STORES_POLLING] == 1
            assert recorded.gauges[metrics.STORES_LISTENING] == 0
            await async_until(lambda: recorded.counts[metrics.RETRIES])
            monkeypatch.setattr(RefusedConnection, "refused", False)
            await async_until(lambda: recorded.counts[metrics.SWITCHES, "notifications"])
            assert recorded.counts[metrics.RECONNECTS] == 1
            await store._database.retry(partial(store.complete, id))
    lost, again = [record for record in caplog.records if record.name == "aibind_postgres.listener"]
    assert (lost.levelname, again.levelname) == ("WARNING", "INFO")
    assert "the LISTEN connection was lost" in lost.getMessage()
    assert "notifications arrive" in again.getMessage()


async def test_expired_leases(dsn, tables, recorded, monkeypatch):
    monkeypatch.setattr(_leases, "CONTACT", 0.3)
    monkeypatch.setattr(_leases, "CONTACT_AFTER_FAILURE", 0.3)
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=recorded, poll_interval=0.02) as store:
        id = await store.create(lease=0.3)
        assert (await store.wait(id, 20)).state == "error"
        assert recorded.counts[metrics.LEASES_EXPIRED] == 1


async def test_housekeeping(dsn, tables, table, recorded):
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=recorded, ttl=0.001) as store:
        async with AsyncPostgresConversationStore(dsn, table=table, ttl=0.001) as chats:
            await chats.save("c", ChatHistory())
            # Not a generated id: partitions by time keep an expired stream until its day is over.
            id = await store.create("id")
            await store.append(id, "x")
            await store.complete(id)
            await async_sleep(0.01)
            assert metrics.HOUSEKEEPING_AGE not in recorded.gauges
            async with AsyncHousekeeper(store, chats):
                await async_until(lambda: recorded.counts[metrics.HOUSEKEEPING_ROWS, "conversations deleted"])
                assert 0 <= recorded.gauges[metrics.HOUSEKEEPING_AGE] < 30
            assert metrics.HOUSEKEEPING_AGE not in recorded.gauges
    assert recorded.counts[metrics.HOUSEKEEPING_ROWS, "streams deleted"] == 1
    assert recorded.counts[metrics.HOUSEKEEPING_ROWS, "chunks deleted"] == 1
    assert recorded.counts[metrics.HOUSEKEEPING_ROWS, "conversations deleted"] == 1
    assert recorded.counts[metrics.HOUSEKEEPING_FAILURES] == 0


async def test_failure_of_housekeeping(dsn, tables, recorded, run_sql, schema_name):
    run_sql(sql.SQL(REFUSE_DELETION).format(schema=sql.Identifier(schema_name), status=tables["status_table"]))
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=recorded, ttl=0.001) as store:
        await store.complete(await store.create("id"))  # for the same reason
        await async_sleep(0.01)
        async with AsyncHousekeeper(store):
            await async_until(lambda: recorded.counts[metrics.HOUSEKEEPING_FAILURES])


async def test_age_of_the_turn_of_another_process(store, other, recorded, run_sql, tables):
    async with AsyncHousekeeper(other, every=1000):
        await async_until(lambda: other._database.last_housekeeping)
        earlier = sql.SQL("UPDATE {} SET expires_at = expires_at - 500000 WHERE state = 'deleted'")
        await async_until(lambda: run_sql(earlier.format(tables["status_table"])).rowcount)
    async with AsyncHousekeeper(store, every=1000):
        await async_until(lambda: recorded.gauges[metrics.HOUSEKEEPING_AGE] >= 500)


async def test_times_of_a_source(store, recorded):
    await (await AsyncDurableStream.start(store, words())).wait()
    assert len(recorded.values[metrics.TIME_TO_FIRST_CHUNK]) == 1
    assert len(recorded.values[metrics.TIME_PER_CHUNK]) == 2
    assert recorded.attributes[metrics.SOURCE_DURATION] == [{}]
    await (await AsyncDurableStream.start(store, broken_words())).wait()
    assert recorded.attributes[metrics.SOURCE_DURATION] == [{}, {"error.type": "LookupError"}]


async def test_source_that_runs_while_the_caller_handles_an_exception(store, recorded, monkeypatch):
    """As in the transaction of a test of Django, where the source runs before `start` returns."""

    async def runs_inline():
        return True

    class Context:
        async def __aenter__(self):
            pass

        async def __aexit__(self, kind, *details):
            left.append(kind)

    left = []
    monkeypatch.setattr(store._database.client, "runs_inline", runs_inline)
    try:
        raise LookupError
    except LookupError:
        await AsyncDurableStream.start(store, words(), context=Context)
        await AsyncDurableStream.start(store, broken_words(), context=Context)
    assert left == [None, LookupError]
    assert recorded.attributes[metrics.SOURCE_DURATION] == [{}, {"error.type": "LookupError"}]


async def test_spans_of_producer_and_readers(store, recorded, dsn, tables):
    stream = await AsyncDurableStream.start(store, words(), session_id="conversation")
    await stream.wait()
    [produced] = recorded.spans
    assert produced.name == "aibind.produce"
    assert produced.attributes == {"aibind.stream.id": stream.id, "gen_ai.conversation.id": "conversation"}
    assert produced.ended == {"aibind.end_reason": "source_finished"}
    assert (await store.get_info(stream.id)).metadata == {"traceparent": produced.traceparent}
    elsewhere = RecordedMetrics()
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=elsewhere) as other:
        for each in (stream, await AsyncDurableStream.resume(other, stream.id)):
            assert b"three" in b"".join([piece async for piece in each.sse()])
    for read in (recorded.spans[1], elsewhere.spans[0]):
        assert (read.name, read.link, read.ended) == ("aibind.read", produced.traceparent, {})


async def test_source_runs_inside_the_span_of_its_producer(store, recorded):
    seen = []

    async def source():
        seen.append(recorded.traceparent())
        yield "x"

    await (await AsyncDurableStream.start(store, source())).wait()
    assert seen == [recorded.spans[0].traceparent]
    assert recorded.traceparent() is None


async def test_reader_that_leaves_ends_its_span(store, recorded):
    id = await store.create()
    await store.append(id, "x")
    events = (await AsyncDurableStream.resume(store, id)).sse()
    async for _ in events:
        break
    del events
    gc.collect()
    [span] = recorded.spans
    await async_until(lambda: span.ended is not None)
    assert span.ended == {}


async def test_worker_links_to_the_span_in_which_the_stream_was_created(store, recorded):
    request = recorded.begin_span("request", {}, None)
    with request.activate():
        id = await store.create(metadata={"user": 7})
    assert (await store.get_info(id)).metadata == {"user": 7, "traceparent": request.traceparent}
    await AsyncDurableStream.produce(store, id, words())
    assert recorded.spans[-1].link == request.traceparent


@pytest.mark.parametrize("metadata", [["a list"], {"traceparent": "of the application"}])
async def test_metadata_of_the_application_is_kept(store, recorded, metadata):
    with recorded.begin_span("request", {}, None).activate():
        id = await store.create(metadata=metadata)
    assert (await store.get_info(id)).metadata == metadata


async def test_span_of_a_failed_source(store, recorded):
    await (await AsyncDurableStream.start(store, broken_words())).wait()
    assert recorded.spans[0].ended == {"aibind.end_reason": "source_failed", "error.type": "source_failed"}


async def test_span_of_a_stream_that_exists(store, recorded):
    id = await store.create()
    with pytest.raises(Exception, match="exists"):
        await AsyncDurableStream.start(store, words(), id=id)
    assert recorded.spans[0].ended == {"error.type": "StreamExistsError"}


async def test_span_of_an_id_that_the_wire_format_refuses(store, recorded):
    id = await store.create("two\nlines")
    with pytest.raises(InvalidDataError):
        await AsyncDurableStream.produce(store, id, words())
    assert [span for span in recorded.spans if span.ended is None] == []


async def test_span_of_an_end_that_could_not_be_stored(store, recorded, run_sql, schema_name, tables):
    run_sql(sql.SQL(REFUSE_DONE).format(schema=sql.Identifier(schema_name), status=tables["status_table"]))
    stream = await AsyncDurableStream.start(store, words())
    await async_until(lambda: recorded.spans[0].ended is not None)
    assert (await store.get_status(stream.id)).state == "active"
    assert recorded.spans[0].ended == {"aibind.end_reason": "write_failed", "error.type": "write_failed"}


async def test_no_mutex_is_held_when_a_span_is_activated(store, recorded, monkeypatch):
    def activate(span):
        assert not any(producer._mutex.locked() for producer in AsyncProducer.running(store))
        activated.append(span)
        return nullcontext()

    activated = []
    monkeypatch.setattr(RecordedSpan, "activate", activate)
    await (await AsyncDurableStream.start(store, words())).wait()
    assert len(activated) == 3


async def test_adapter_that_raises_loses_nothing(dsn, tables, caplog):
    caplog.set_level(logging.DEBUG, "aibind_postgres.metrics")
    async with AsyncPostgresStreamStore(dsn, **tables, metrics=RaisingMetrics()) as store:
        stream = await AsyncDurableStream.start(store, words())
        assert b"three" in b"".join([piece async for piece in stream.sse()])
        assert (await stream.wait()).state == "done"
        assert [event.data async for event in store.events(stream.id)] == ["one ", "two ", "three"]
        ids = [await store.create() for _ in range(100)]
        assert await async_gather(*[partial(store.append, id, "x") for id in ids]) == [1] * 100
    levels = Counter(record.levelno for record in caplog.records if record.name == "aibind_postgres.metrics")
    assert levels.keys() == {logging.WARNING, logging.DEBUG}
    assert levels[logging.WARNING] == 1


def test_adapter_without_the_methods(dsn, tables):
    with pytest.raises(TypeError, match="must have the methods"):
        AsyncPostgresStreamStore(dsn, **tables, metrics=object())
