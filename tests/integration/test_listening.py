"""Waiting readers in one flavour: garbage collection in threads, and cancelled tasks."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
from support.concurrency import Background

from aibind_postgres import AsyncPostgresStreamStore, PostgresStreamStore, _subscriptions

LISTENER = "aibind_postgres-listener"  # the name of its task


def test_garbage_collection_while_subscriptions_change(request, dsn, tables, monkeypatch):
    class CollectingLock:
        """Collects garbage each time it is acquired, as Python may do."""

        def __init__(self):
            self._lock = threading.Lock()

        def __enter__(self):
            self._lock.acquire()
            gc.collect()

        def __exit__(self, *_):
            self._lock.release()

    closed = []
    unsubscribe = _subscriptions.Subscriptions.unsubscribe

    def record(self, subscription):
        closed.append(subscription)
        unsubscribe(self, subscription)

    monkeypatch.setattr(_subscriptions, "Lock", CollectingLock)
    monkeypatch.setattr(_subscriptions.Subscriptions, "unsubscribe", record)
    gc.freeze()  # the many objects of the test process are not the store's, and would take most of the time
    request.addfinalizer(gc.unfreeze)
    store = PostgresStreamStore(dsn, **tables)  # closed only on success, since a deadlock would also block `close`
    id = store.create()
    store.append_many(id, ["a", "b"])

    class Response:
        def __init__(self):
            self.chunks = store.read_from(id)
            self.cycle = self
            next(self.chunks)

    def collect():
        for _ in range(10):
            Response()
        store.append(id, "c")  # takes the mutex
        return True

    with Background(collect) as collecting:
        assert collecting.result()
    assert len(closed) == 10
    store.close()


@pytest.mark.parametrize("pause", [0, 0.01])  # with 0, the task is cancelled before its first step
async def test_readers_survive_the_cancellation_of_the_listener(dsn, tables, pause):
    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=3600) as store:
        id = await store.create()
        waiter = asyncio.create_task(store.wait(id, 60))
        while not (listeners := [task for task in asyncio.all_tasks() if task.get_name() == LISTENER]):
            await asyncio.sleep(pause)
        listeners[0].cancel()
        await asyncio.sleep(0.1)
        async with AsyncPostgresStreamStore(dsn, **tables) as other:
            await asyncio.sleep(0.1)
            await other.complete(id)
            assert (await asyncio.wait_for(waiter, 20)).state == "done"


async def test_cancelled_close_can_be_repeated(dsn, tables):
    store = AsyncPostgresStreamStore(dsn, **tables)
    id = await store.create()
    waiter = asyncio.create_task(store.wait(id))
    await asyncio.sleep(0.1)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing, waiter])
    await store.close()
    assert [name for task in asyncio.all_tasks() if "aibind_postgres" in (name := task.get_name())] == []
    waiter.exception()
