"""Readers that follow one stream here share what is fetched, and each still sees every chunk once."""

from __future__ import annotations

import builtins
import random
from functools import partial

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep

from aibind_postgres import AsyncPostgresStreamStore, InvalidDataError, StoreClosedError, StreamNotFoundError
from aibind_postgres._async import feeds
from aibind_postgres._async.feeds import LIVE_PAGE, AsyncFeed

NEVER = 3600  # a poll_interval: whatever arrives has been announced


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=NEVER, retry_for=0.2) as store:
        yield store


@pytest.fixture
def fetches(store, monkeypatch):
    """What the store has fetched so far for those who follow streams: a list of stream ids for each statement."""
    done = []
    run = store._changes.fetch.__self__._combiner._run

    async def note(items):
        done.append([item.stream_id for item in items])
        return await run(items)

    monkeypatch.setattr(store._changes.fetch.__self__._combiner, "_run", note)
    return done


async def collect(store, id, after_seq=0):
    return [tuple(chunk) async for chunk in store.read_from(id, after_seq)]


async def all_waiting(store, id, number):
    """Wait until so many readers wait at one feed, and the watch listens."""
    while True:
        watch = store._changes._watch
        listening = watch is not None and watch._connection is not None
        if listening and sum(len(feed.waiting) for feed in store._changes._feeds.get(id, ())) == number:
            return
        await async_sleep(0.005)


@pytest.mark.parametrize("writer", ["here", "elsewhere"])
async def test_many_readers_cost_one_fetch_for_a_change(store, other, fetches, writer):
    id = await store.create()
    async with AsyncBackground(partial(async_gather, *[partial(collect, store, id)] * 50)) as readers:
        await all_waiting(store, id, 50)
        await async_sleep(0.1)
        fetches.clear()
        for number in range(1, 21):
            await (store if writer == "here" else other).append(id, f"{number}")
            await all_waiting(store, id, 50)
        await (store if writer == "here" else other).complete(id)
        results = await readers.result()
    assert results == [[(number, f"{number}") for number in range(1, 21)]] * 50
    assert len(fetches) <= 21


async def test_readers_of_many_streams_share_statements(store, fetches):
    ids = [await store.create() for _ in range(30)]
    async with AsyncBackground(partial(async_gather, *[partial(collect, store, id) for id in ids])) as readers:
        for id in ids:
            await all_waiting(store, id, 1)

        async def write(id):
            for number in range(20):
                await store.append(id, f"{id} {number}")
            await store.complete(id)

        await async_gather(*[partial(write, id) for id in ids])
        results = await readers.result()
    assert results == [[(number + 1, f"{id} {number}") for number in range(20)] for id in ids]
    assert max(map(len, fetches)) > 1


async def test_readers_of_every_pace_see_each_chunk_once(store, other, monkeypatch):
    monkeypatch.setattr(feeds, "TAIL_CHUNKS", 20)
    chance = random.Random(5)
    id = await store.create()

    async def read(pace):
        seen = []
        async for chunk in store.read_from(id):
            seen.append(chunk.seq)
            if pace:
                await async_sleep(pace * chance.random())
        return seen

    async def write():
        for number in range(300):
            await (store if number % 3 else other).append_many(id, ["x"] * chance.choice([1, 1, 1, 30]))
            await async_sleep(0.002 * chance.random())
        return await store.complete(id)

    *seen, _ = await async_gather(*[partial(read, pace) for pace in (0, 0, 0.0005, 0.001, 0.002)], write)
    total = (await store.get_status(id)).total_chunks
    assert seen == [list(range(1, total + 1))] * 5


async def test_more_than_a_page_at_once(store):
    id = await store.create()
    async with AsyncBackground(partial(async_gather, *[partial(collect, store, id)] * 3)) as readers:
        await all_waiting(store, id, 3)
        await store.append_many(id, ["x"] * (LIVE_PAGE * 3 + 7))
        await all_waiting(store, id, 3)
        await store.append_many(id, ["x"] * LIVE_PAGE)
        await store.complete(id)
        for chunks in await readers.result():
            assert [seq for seq, _ in chunks] == list(range(1, LIVE_PAGE * 4 + 8))


async def test_a_stream_that_is_replaced_ends_its_readers_and_no_others(store, other):
    id = await store.create()
    await store.append_many(id, ["old"] * 5)
    async with AsyncBackground(partial(async_gather, *[partial(collect, store, id)] * 3, errors=True)) as readers:
        await all_waiting(store, id, 3)
        await other.delete(id)
        await other.create(id)
        await other.append(id, "new")
        assert {type(error) for error in await readers.result()} == {StreamNotFoundError}
    async with AsyncBackground(partial(collect, store, id)) as reader:
        await all_waiting(store, id, 1)
        await other.complete(id)
        assert await reader.result() == [(1, "new")]


async def paused(store, id, chunks):
    """Return a reader that has read so many chunks and then pauses, with its place at the feed."""
    reader = store.read_from(id)
    for _ in range(chunks):
        await reader.__anext__()
    return reader


@pytest.mark.parametrize("where", ["here", "elsewhere"])
async def test_a_new_reader_of_a_new_stream_sees_nothing_of_the_old_one(store, other, where):
    id = await store.create()
    await store.append_many(id, ["old 1", "old 2"])
    async with AsyncBackground(partial(paused, store, id, 5)) as pausing:
        await all_waiting(store, id, 1)
        await store.append_many(id, [f"OLD {number}" for number in range(3, 11)])
        old_reader = await pausing.result()
        await (store if where == "here" else other).delete(id)
        await other.create(id)
        await other.append_many(id, ["new 1", "new 2", "new 3"])
        async with AsyncBackground(partial(collect, store, id)) as reader:
            await all_waiting_together(store, id, 1)
            await other.append(id, "new 4")
            await other.complete(id)
            assert await reader.result() == [(number, f"new {number}") for number in range(1, 5)]
        del old_reader


async def test_the_end_of_an_old_stream_is_not_that_of_a_new_one(store, other):
    id = await store.create()
    await store.append_many(id, ["a", "b"])
    async with AsyncBackground(partial(paused, store, id, 3)) as pausing:
        await all_waiting(store, id, 1)
        await store.append(id, "c")
        await store.complete(id)
        old_reader = await pausing.result()
        await other.delete(id)
        await other.create(id)
        with pytest.raises(TimeoutError):
            await store.wait(id, timeout=0.2)
        async with AsyncBackground(partial(collect, store, id)) as reader:
            await all_waiting_together(store, id, 1)
            await other.append(id, "new")
            await other.complete(id)
            assert await reader.result() == [(1, "new")]
        del old_reader


async def test_a_slow_reader_of_an_old_stream_is_not_put_on_a_new_one(store):
    id = await store.create()
    await store.append_many(id, ["a", "b", "c"])
    reader = store.read_from(id)
    assert (await reader.__anext__()).data == "a"
    await store.delete(id)
    await store.create(id)
    async with AsyncBackground(partial(collect, store, id)) as other_reader:
        await all_waiting_together(store, id, 1)
        await store.append(id, "new")
        assert [(await reader.__anext__()).data, (await reader.__anext__()).data] == ["b", "c"]
        with pytest.raises(StreamNotFoundError):
            await reader.__anext__()
        await store.complete(id)
        assert await other_reader.result() == [(1, "new")]


async def all_waiting_together(store, id, number):
    """Wait until so many readers wait for a stream, at whatever feeds of this id there are."""
    while sum(len(feed.waiting) for feed in store._changes._feeds.get(id, ())) != number:
        await async_sleep(0.005)


async def test_a_text_that_cannot_be_read_harms_only_its_own_stream(dsn, tables, other):
    async with AsyncConnectionPool(
        dsn, kwargs={"autocommit": True, "client_encoding": "LATIN1"}, min_size=1, open=False
    ) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            ids = [await other.create() for _ in range(10)]
            calls = [partial(collect, store, id) for id in ids]
            async with AsyncBackground(partial(async_gather, *calls, errors=True)) as readers:
                for id in ids:
                    await all_waiting(store, id, 1)
                await async_gather(*[partial(other.append, id, "€" if id == ids[3] else "ä") for id in ids])
                await async_gather(*[partial(other.complete, id) for id in ids])
                results = await readers.result()
            assert isinstance(results.pop(3), InvalidDataError)
            assert results == [[(1, "ä")]] * 9


async def test_a_place_that_was_interrupted_before_it_fetched_lets_others_fetch(store, other):
    id = await store.create()
    async with AsyncBackground(partial(collect, store, id)) as reader:
        await all_waiting(store, id, 1)
        with store._changes.place(id) as place:
            place.feed.fetching = place  # an interrupt comes just here
        await other.append(id, "x")
        await other.complete(id)
        while place.feed.fetching is place:
            store._changes.followed()  # as the watch does with each poll
            await async_sleep(0.01)
        assert await reader.result() == [(1, "x")]


@pytest.mark.parametrize("kind", [psycopg.OperationalError, TimeoutError])  # asyncpg raises the other one, too
async def test_a_fetch_that_fails_is_told_to_all_who_wait_for_it(store, other, monkeypatch, kind):
    id = await store.create()
    async with AsyncBackground(partial(async_gather, *[partial(collect, store, id)] * 5, errors=True)) as readers:
        await all_waiting(store, id, 5)
        query = store._database.client.query

        async def fail(sql, params):
            if "-greatest(total_chunks" in sql:
                raise kind("the server is gone")
            return await query(sql, params)

        monkeypatch.setattr(store._database.client, "query", fail)
        await other.append(id, "x")
        errors = await readers.result()
    assert {(type(error), str(error)) for error in errors} == {(kind, "the server is gone")}
    assert len(set(map(builtins.id, errors))) == 5
    monkeypatch.undo()
    await store.complete(id)
    assert await collect(store, id) == [(1, "x")]


async def test_closing_sends_everybody_away(dsn, tables):
    store = AsyncPostgresStreamStore(dsn, **tables)
    id = await store.create()
    calls = [partial(collect, store, id)] * 5 + [partial(store.wait, id)] * 3
    async with AsyncBackground(partial(async_gather, *calls, errors=True)) as readers:
        await all_waiting(store, id, 8)
        await store.close()
        assert {type(error) for error in await readers.result()} == {StoreClosedError}


async def test_waiting_for_the_end_beside_readers(store, other):
    id = await store.create()
    calls = [partial(collect, store, id)] * 3 + [partial(store.wait, id)] * 3
    async with AsyncBackground(partial(async_gather, *calls)) as all_of_them:
        await all_waiting(store, id, 6)
        for number in range(1, 11):
            await other.append(id, f"{number}")
        await other.fail(id, "why")
        results = await all_of_them.result()
    assert results[:3] == [[(number, f"{number}") for number in range(1, 11)]] * 3
    assert results[3:] == [("error", "why", 10)] * 3


async def test_in_transactions_of_callers_nothing_is_shared(dsn, tables):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            with store._changes.place("a") as one, store._changes.place("a") as two:
                assert one.feed is not two.feed


def rows(state, total, *seqs, text="x"):
    return [(-total, state), *[(seq, text) for seq in seqs]]


def test_a_feed_keeps_a_tail():
    feed = AsyncFeed("a")
    feed.stands(1, 5, 5)
    assert feed.current
    assert feed.after(5) == ()
    assert feed.after(4) is None  # no longer, or not yet, in the tail
    feed.happened()
    assert not feed.current
    feed.take(2, 5, feed.total, rows("active", 7, 6, 7))
    assert feed.current
    assert feed.after(5) == [(6, "x"), (7, "x")]
    assert feed.after(6) == [(7, "x")]
    assert feed.after(7) == feed.after(100) == ()
    feed.take(2, 7, feed.total, rows("done", 8, 8))
    assert feed.over
    assert feed.after(5) == [(6, "x"), (7, "x"), (8, "x")]


def test_a_feed_that_was_fetched_before_the_latest_change_is_not_current():
    feed = AsyncFeed("a")
    feed.happened()
    feed.take(1, 0, feed.total, rows("active", 1, 1))
    assert not feed.current
    assert feed.after(0) == [(1, "x")]


def test_a_tail_is_bounded_but_keeps_what_is_newest(monkeypatch):
    monkeypatch.setattr(feeds, "TAIL_SIZE", 100)
    monkeypatch.setattr(feeds, "TAIL_CHUNKS", 5)
    feed = AsyncFeed("a")
    feed.take(1, 0, feed.total, rows("active", 8, *range(1, 9)))
    assert feed.after(0) == [(seq, "x") for seq in range(1, 9)]
    feed.take(1, 8, feed.total, rows("active", 10, 9, 10))
    assert feed.after(4) is None
    assert [seq for seq, _ in feed.after(5)] == [6, 7, 8, 9, 10]
    feed.take(1, 10, feed.total, rows("active", 12, 11, 12, text="x" * 200))
    assert feed.after(9) is None
    assert [seq for seq, _ in feed.after(10)] == [11, 12]


def test_a_poll_leaves_what_is_being_announced_to_the_announcement():
    feed = AsyncFeed("a")
    feed.stands(1, 0, 0)
    feed.announced = True
    assert not feed.polled("active", 1)
    assert feed.polled("active", 1)  # it did not come
    assert feed.polled("active", 2)  # nor does any other
    feed.announced = True
    assert not feed.polled("done", 2)
    assert feed.polled("done", 2)


def test_a_stream_that_gets_shorter_is_another_one():
    feed = AsyncFeed("a")
    feed.take(1, 0, feed.total, rows("active", 5, 1, 2, 3, 4, 5))
    feed.take(2, 5, feed.total, rows("active", 1))
    assert feed.gone
    other = AsyncFeed("b")
    other.take(1, 0, 0, [])
    assert other.gone
    other.take(2, 0, 0, rows("active", 1, 1))  # a fetch that was under way, or of a new stream
    assert other.gone


def test_a_full_page_is_not_all(monkeypatch):
    monkeypatch.setattr(feeds, "LIVE_PAGE", 2)
    feed = AsyncFeed("a")
    feed.take(1, 0, feed.total, rows("done", 3, 1, 2))
    assert not feed.current
    assert not feed.over
    feed.take(1, 2, feed.total, rows("done", 3, 3))
    assert feed.current
    assert feed.over
    assert [seq for seq, _ in feed.after(0)] == [1, 2, 3]


def test_a_hole_is_left_to_those_who_follow():
    feed = AsyncFeed("a")
    feed.stands(1, 2, 2)
    feed.happened()
    feed.take(2, 2, feed.total, rows("active", 2 * LIVE_PAGE))
    assert feed.current
    assert feed.after(2) is None
    assert feed.after(2 * LIVE_PAGE) == ()
    assert feed.append(2 * LIVE_PAGE, ["x"])
    assert feed.after(2 * LIVE_PAGE) == [(2 * LIVE_PAGE + 1, "x")]


def test_who_asks_from_beyond_or_behind_the_tail():
    feed = AsyncFeed("a")
    assert feed.wants(7) == 7
    assert feed.wants(float("inf")) == 2**63 - 1
    feed.take(1, 2**63 - 1, feed.total, rows("active", 4))
    assert feed.current
    assert feed.after(3) is None
    assert feed.after(4) == ()
    feed.take(2, 2, feed.total, rows("active", 5, 3, 4, 5))
    assert feed.after(3) is None
    assert [seq for seq, _ in feed.after(4)] == [5]
    feed.take(3, 9, feed.total, rows("active", 10, 10))
    assert feed.after(5) is None
    assert [seq for seq, _ in feed.after(9)] == [10]


def test_what_is_appended_here_needs_no_fetch():
    feed = AsyncFeed("a")
    assert not feed.append(0, ["a"])  # nothing is known yet, so neither whether that is all
    feed.stands(1, 1, 1)
    assert feed.append(1, ["b", "c"])
    assert feed.after(1) == [(2, "b"), (3, "c")]
    assert feed.current
    assert not feed.append(7, ["x"])  # somebody else has written in between
    assert not feed.append(2, ["c"])  # told late, or of another stream of this id
    assert not feed.append(3, ["x"] * (LIVE_PAGE + 1))  # more than is worth keeping
    assert feed.after(1) == [(2, "b"), (3, "c")]
    assert not feed.polled("active", 3)  # that was announced from here


def test_a_fetch_that_is_overtaken_takes_nothing_back():
    feed = AsyncFeed("a")
    feed.stands(1, 1, 1)
    feed.happened()
    version, after, least = feed.version, feed.wants(1), feed.total
    assert feed.append(1, ["b", "c"])
    feed.take(version, after, least, rows("active", 2, 2, text="b"))
    assert not feed.gone
    assert feed.after(1) == [(2, "b"), (3, "c")]
    feed.take(version, 3, least, rows("active", 4, 4, text="d"))
    assert [seq for seq, _ in feed.after(1)] == [2, 3, 4]
