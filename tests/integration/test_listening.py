"""Waiting readers, where the two flavours are not the same: what threads and the garbage collector do, and tasks."""

from __future__ import annotations

import asyncio
import gc
import os

import pytest
from support.concurrency import Background

from aibind_postgres import AsyncPostgresStreamStore, PostgresStreamStore


@pytest.fixture
def store(dsn, tables):
    with PostgresStreamStore(dsn, **tables) as store:
        yield store


def test_the_garbage_collector_may_close_a_reader_at_any_moment(dsn, tables):
    store = PostgresStreamStore(dsn, **tables)  # closed only if all goes well: closing would wait, too
    id = store.create()
    store.append_many(id, ["a", "b"])

    class Response:
        def __init__(self):
            self.chunks = store.read_from(id)
            self.itself = self
            next(self.chunks)

    def collect():
        for _ in range(10):
            Response()
        with store._changes.mutex:  # as if it came while this thread wakes readers
            gc.collect()
        return True

    with Background(collect) as collecting:
        assert collecting.result()
    assert store._changes.followed() == []
    assert store._changes._feeds == {}
    store.close()


def test_a_finding_is_news_once(store):
    with store._changes.place("a") as place:
        feed = place.feed
        place.stands(place.before_look(), 3, 3)
        assert feed.polled("active", 3) is False
        assert feed.polled("active", 5) is True
        assert feed.polled("active", 5) is False  # somebody has looked, and waits all the same
        assert feed.polled("active", 6) is True
        assert feed.polled(None, 0) is True
        assert feed.polled("done", 6) is True


def test_only_what_may_have_ended_a_stream_alarms_its_writers(store):
    alarms = []
    with store._changes.place("a", lambda: alarms.append("!")) as place:
        store._changes.poll_found({"a": ("active", 5)}, [place.feed])
        store._changes.tell_appended([("a", 0, ["x"])])
        store._changes.wake(None)
        assert alarms == []
        for end in (
            lambda: store._changes.poll_found({"a": ("stopped", 5)}, [place.feed]),
            lambda: store._changes.wake(["a"]),
            lambda: store._changes.tell_deleted("a"),
            store.close,
        ):
            end()
            assert alarms, end
            alarms.clear()
            store._changes.move(place)


def test_a_forked_process_has_another_name(store, monkeypatch):
    name = store._changes.name
    assert name == store._changes.name
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert name != store._changes.name


async def test_readers_outlive_the_watch(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=3600) as store:
        id = await store.create()
        waiter = asyncio.create_task(store.wait(id, 60))
        while store._changes._watch is None:
            await asyncio.sleep(0.01)
        store._changes._watch._worker._task.cancel()
        await asyncio.sleep(0.1)
        async with AsyncPostgresStreamStore(dsn, **tables) as other:
            await asyncio.sleep(0.1)
            await other.complete(id)
            assert (await asyncio.wait_for(waiter, 20)).state == "done"


async def test_a_close_that_is_cancelled_can_be_repeated(dsn, tables):
    store = AsyncPostgresStreamStore(dsn, **tables)
    id = await store.create()
    waiter = asyncio.create_task(store.wait(id))
    await asyncio.sleep(0.1)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing, waiter])
    await store.close()
    assert store._database.client._pool.closed
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith(("aibind", "pool"))] == []
    waiter.exception()
