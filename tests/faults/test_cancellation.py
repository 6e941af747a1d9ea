"""Cancelled after each number of steps: nothing leaks, and nobody else notices. Threads cannot be cancelled."""

from __future__ import annotations

import asyncio

import pytest
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool
from support import proxy
from support.concurrency import async_workers

from aibind_postgres import AsyncPostgresConversationStore, AsyncPostgresStreamStore, ChatHistory, StreamNotFoundError
from aibind_postgres._concurrency import _shielded

FINISHED = 3  # runs in a row that were not cancelled in time: then there is no further step


class World:
    """What the calls are made on, a stream and a conversation for each attempt."""

    def __init__(self, store, chats):
        self.store = store
        self.chats = chats
        self.id = self.session = ""

    async def begin(self, attempt):
        self.id, self.session = f"stream {attempt}", f"session {attempt}"
        await self.store.create(self.id)
        await self.store.append(self.id, "first")

    async def append(self):
        await self.store.append(self.id, "mine")

    async def append_many(self):
        await self.store.append_many(self.id, ["mine 1", "mine 2"])

    async def writer(self):
        async with self.store.writer(self.id) as writer:
            await writer.write("mine")
            await writer.flush()
            await writer.write("mine too")

    async def read_from(self):
        reader = self.store.read_from(self.id)
        try:
            async for chunk in reader:
                if chunk.data == "other":
                    return
        finally:
            await reader.aclose()

    async def wait(self):
        await self.store.wait(f"{self.id} to wait", 60)

    async def create(self):
        await self.store.create(f"{self.id} of mine")

    async def stop(self):
        await self.store.stop(f"{self.id} to stop")

    async def delete(self):
        await self.store.delete(f"{self.id} to delete")

    async def save(self):
        chat = ChatHistory()
        chat.append({"by": "mine"})
        await self.chats.save(self.session, chat)

    async def edit(self):
        async with self.chats.edit(self.session) as chat:
            chat.append({"by": "mine"})

    async def check(self, call):
        """Check what is stored: all or nothing of each call, and no hole."""
        chunks = [chunk async for chunk in self.store.read_from(self.id, follow=False)]
        texts = [chunk.data for chunk in chunks]
        assert [chunk.seq for chunk in chunks] == list(range(1, len(chunks) + 1))
        assert texts[0] == "first"
        mine = [text for text in texts if text.startswith("mine")]
        allowed = {
            "append": [[], ["mine"]],
            "append_many": [[], ["mine 1", "mine 2"]],
            "writer": [[], ["mine"], ["mine", "mine too"]],
        }
        assert mine in allowed.get(call, [[]])
        assert len(await self.chats.load(self.session)) in ((0, 1) if call in ("save", "edit") else (0,))


async def nothing_is_left(pool, size, autocommit, store):
    """Wait until all that is on its way has come back: what leaks never does."""
    while pool.get_stats()["pool_available"] < size or _shielded or store._changes.followed():
        await asyncio.sleep(0.001)
    stats = pool.get_stats()
    assert (stats["pool_size"], stats.get("requests_waiting", 0)) == (size, 0)
    connections = [await pool.getconn() for _ in range(size)]
    for connection in connections:
        assert connection.autocommit == autocommit
        assert connection.info.transaction_status == TransactionStatus.IDLE
        await pool.putconn(connection)


@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize(
    "call", ["append", "append_many", "writer", "read_from", "wait", "create", "stop", "delete", "save", "edit"]
)
async def test_a_call_that_is_cancelled_at_any_step(dsn, tables, conversations, long, call, autocommit):
    size = 2
    options = {"min_size": size, "max_size": size, "timeout": 30, "open": False, "kwargs": {"autocommit": autocommit}}
    cancelled = attempt = 0
    async with AsyncConnectionPool(dsn, **options) as pool, AsyncPostgresStreamStore(pool, **tables) as store:
        await pool.wait()
        world = World(store, AsyncPostgresConversationStore(pool, table=conversations))
        for _ in range(5 if long else 1):
            steps = finished = 0
            while finished < FINISHED:
                steps += 1 + steps // (200 if long else 20)  # the first ones one by one
                attempt += 1
                await world.begin(attempt)
                await store.acquire(f"{world.id} to {call}")
                task = asyncio.create_task(getattr(world, call)())
                # Others wait for the same statements, some from the beginning and one from later on. A stream writer
                # has its stream for itself.
                other = f"{world.id} to writer" if call == "writer" else world.id
                others = [asyncio.create_task(store.append(other, "other")) for _ in range(3)]
                if call == "wait":
                    ending = asyncio.create_task(store.complete(f"{world.id} to wait"))
                for _ in range(steps):
                    await asyncio.sleep(0)
                    if task.done():
                        break
                if not task.done():
                    others.append(asyncio.create_task(store.append(other, "other")))
                    task.cancel()
                await asyncio.wait([task])
                finished = 0 if task.cancelled() else finished + 1
                cancelled += task.cancelled()
                if not task.cancelled():
                    task.result()
                seqs = await asyncio.gather(*others)
                if call == "wait":
                    assert await ending
                await world.check(call)
                stored = {chunk.seq: chunk.data async for chunk in store.read_from(other, follow=False)}
                assert [seq for seq, text in stored.items() if text == "other"] == sorted(seqs)
                await nothing_is_left(pool, size, autocommit, store)
        assert cancelled > 10
    assert async_workers() == []


async def test_a_cancelled_delete_sends_its_readers_away(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=0.1) as store:
        for steps in range(1, 200, 7):
            id = await store.create()

            async def read(id=id):
                async for _ in store.read_from(id):
                    pass

            reader = asyncio.create_task(read())
            while not store._changes.followed():
                await asyncio.sleep(0)
            task = asyncio.create_task(store.delete(id))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await store.delete(id)
            with pytest.raises(StreamNotFoundError):
                await reader


@pytest.mark.parametrize("timeout", [None, 0.5])
async def test_a_call_that_nobody_answers_can_be_cancelled(victim, timeout):
    with proxy.proxy(victim.dsn) as network:
        async with AsyncPostgresStreamStore(network.dsn, timeout=timeout) as store:
            id = await store.create()
            network.stall(*proxy.BOTH)
            task = asyncio.create_task(store.append(id, "a", expected_seq=1))
            await asyncio.sleep(0.2)
            task.cancel()
            await asyncio.wait([task], timeout=30)
            assert task.cancelled()
            network.heal()
            assert await store.append(id, "a", expected_seq=1) == 1
