"""A store counts the notifications of other stores, and rests for them."""

from __future__ import annotations

from functools import partial

import psycopg
from support.concurrency import AsyncBackground, async_until

from aibind_postgres import AsyncPostgresStreamStore
from aibind_postgres._concurrency import AsyncEvent
from aibind_postgres._notifications import encode_payloads
from aibind_postgres._sql import NOTIFY, json_array

REST = 0.0123


class Traffic:
    """Records the senders, and requires a rest."""

    def __init__(self):
        self.senders = []

    def received(self, sender, now):
        self.senders.append(sender)

    def rest(self, now):
        return REST


class AsyncRecordingEvent(AsyncEvent):
    def __init__(self):
        super().__init__()
        self.timeouts = []

    async def wait(self, timeout=None):
        self.timeouts.append(timeout)
        return await super().wait(timeout)


async def read(store, id):
    return [chunk.data async for chunk in store.read_from(id)]


async def test_received_notifications_prolong_the_rest(dsn, tables):
    async with (
        await psycopg.AsyncConnection.connect(dsn, autocommit=True, cursor_factory=psycopg.AsyncRawCursor) as other,
        AsyncPostgresStreamStore(dsn, **tables) as store,
    ):
        notifier = store._notifier
        notifier.traffic, notifier._closing = Traffic(), AsyncRecordingEvent()
        await store.create("a")
        async with AsyncBackground(partial(read, store, "a")) as reader:
            await store.append("a", "text")
            await async_until(lambda: REST in notifier._closing.timeouts)
            while not {"one", "two"} <= set(notifier.traffic.senders):  # the store may not listen yet
                for sender in ("one", "two"):
                    payloads = json_array(encode_payloads(["b"], sender))
                    await other.execute(NOTIFY, [notifier.channel, payloads])
            await store.complete("a")
            assert await reader.result() == ["text"]
