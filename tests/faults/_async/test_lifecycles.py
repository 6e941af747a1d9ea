"""Thousands of readers that start and end: nothing of them is left."""

from __future__ import annotations

import threading
from functools import partial

import psycopg
import pytest
from support.concurrency import async_gather, async_sleep, async_workers
from support.leaks import PER_CONNECTION, package_objects

from aibind_postgres import AsyncPostgresStreamStore

AT_ONCE = 50


async def drop_before_start(store, id):
    store.read_from(id)


async def drop_while_reading(store, id):
    reader = store.read_from(id)
    async for chunk in reader:
        assert chunk.seq == 1
        break


async def close_while_reading(store, id):
    reader = store.read_from(id)
    async for chunk in reader:
        assert chunk.seq == 1
        break
    close = getattr(reader, "aclose", None) or reader.close  # asynchronous generators have `aclose`
    await close()


async def time_out(store, id, timeout=0.001):
    with pytest.raises(TimeoutError):
        await store.wait(id, timeout)


async def read_all(store, id):
    return [chunk.data async for chunk in store.read_from(id, follow=False)]


def connections(dsn):
    with psycopg.connect(dsn, autocommit=True) as admin:
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'dropped'"
        )
        return admin.execute(query).fetchone()[0]


async def test_dropped_readers_leave_nothing_behind(dsn, tables, long):
    rounds = (10_000 if long else 1_000) // AT_ONCE
    named = psycopg.conninfo.make_conninfo(dsn, application_name="dropped")
    threads = threading.active_count()
    async with AsyncPostgresStreamStore(named, **tables) as store:
        ids = [await store.create() for _ in range(5)]
        for id in ids:
            await store.append_many(id, ["a", "b"])
        calls = [drop_before_start, drop_while_reading, close_while_reading, time_out]
        # Reading beyond the first page starts the listener, which stays for a while.
        while not any("listener" in name for name in async_workers()):
            await time_out(store, ids[0], 0.1)
        assert await read_all(store, ids[0]) == ["a", "b"]
        before = package_objects()
        for rnd in range(rounds):
            await async_gather(*(partial(calls[n % 4], store, ids[(n + rnd) % 5]) for n in range(AT_ONCE)))
        while package_objects(except_for=PER_CONNECTION) - before:
            await time_out(store, ids[0], 0.1)  # a new reader makes the store drop the closed ones
            await async_sleep(1.1)  # and the listener drops this one with its next poll
        assert len([name for name in async_workers() if name.startswith("aibind_postgres-")]) <= 2
        assert connections(dsn) <= 11
        assert await read_all(store, ids[0]) == ["a", "b"]
    assert async_workers() == []
    assert threading.active_count() <= threads
    while connections(dsn):  # the server notices closed connections with a delay
        await async_sleep(0.01)
