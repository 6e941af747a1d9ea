"""Readers come and go in great numbers, and leave nothing."""

from __future__ import annotations

import gc
import threading
from functools import partial

import psycopg
import pytest
from support.concurrency import async_gather, async_sleep, async_workers

from aibind_postgres import AsyncPostgresStreamStore

AT_ONCE = 50


async def drop_at_its_start(store, id):
    store.read_from(id)


async def drop_while_it_reads(store, id):
    reader = store.read_from(id)
    async for chunk in reader:
        assert chunk.seq == 1
        break


async def close_while_it_reads(store, id):
    reader = store.read_from(id)
    async for chunk in reader:
        assert chunk.seq == 1
        break
    close = getattr(reader, "aclose", None) or reader.close  # each flavour has its own
    await close()


async def give_up_waiting(store, id):
    with pytest.raises(TimeoutError):
        await store.wait(id, 0.001)


def connections(dsn):
    with psycopg.connect(dsn, autocommit=True) as admin:
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'dropped'"
        )
        return admin.execute(query).fetchone()[0]


async def test_readers_that_are_dropped_leave_nothing(dsn, tables, long):
    rounds = (10_000 if long else 1_000) // AT_ONCE
    named = psycopg.conninfo.make_conninfo(dsn, application_name="dropped")
    threads = threading.active_count()
    async with AsyncPostgresStreamStore(named, **tables) as store:
        ids = [await store.create() for _ in range(5)]
        for id in ids:
            await store.append_many(id, ["a", "b"])
        ways = [drop_at_its_start, drop_while_it_reads, close_while_it_reads, give_up_waiting]
        for rnd in range(rounds):
            await async_gather(*(partial(ways[n % 4], store, ids[(n + rnd) % 5]) for n in range(AT_ONCE)))
        gc.collect()
        await async_sleep(0)
        # What is left stands for the few that were dropped last, until the next one comes.
        assert store._changes.followed() == []
        assert store._changes._feeds == {}
        assert len(async_workers()) <= 2
        assert connections(dsn) <= 11
        assert [chunk.data async for chunk in store.read_from(ids[0], follow=False)] == ["a", "b"]
    assert async_workers() == []
    assert threading.active_count() <= threads
    while connections(dsn):  # the server takes a moment to see that they are closed
        await async_sleep(0.01)
