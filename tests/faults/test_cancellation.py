"""Cancellation after each number of event loop steps: nothing leaks, and other callers are not affected.

Threads cannot be cancelled, so these tests are asynchronous only.
"""

from __future__ import annotations

import asyncio
from time import monotonic

import pytest
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool
from support import proxy
from support.concurrency import async_until, async_workers

from aibind_postgres import AsyncPostgresConversationStore, AsyncPostgresStreamStore, ChatHistory, StreamNotFoundError

FINISHED = 3  # consecutive attempts that ended before their cancellation: then every step has been tested


class Trial:
    """The calls to cancel, with a stream and a conversation for each attempt."""

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
        """Check that all or nothing of each call is stored, without a gap."""
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


def unfinished_tasks():
    """Return the tasks other than the test's own and those of pools and workers."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    # Before Python 3.12 the scheduler of a pool waits in a task that has no name of its own.
    tasks = {task for task in tasks if task.get_coro().__qualname__ != "Event.wait"}
    return [task for task in tasks if not task.get_name().startswith(("aibind_postgres-", "pool-"))]


async def assert_pool_recovers(pool, size, autocommit):
    """Wait until no task is left and each connection is back in the pool, and check the connections."""
    await async_until(lambda: pool.get_stats()["pool_available"] == size and not unfinished_tasks())
    stats = pool.get_stats()
    assert (stats["pool_size"], stats.get("requests_waiting", 0)) == (size, 0)
    connections = [await pool.getconn() for _ in range(size)]
    for connection in connections:
        assert connection.autocommit == autocommit
        assert connection.info.transaction_status == TransactionStatus.IDLE
        await pool.putconn(connection)


async def assert_no_reader_is_left(pool):
    """Check that the store does not poll any more: it polls while a reader waits, at most 0.5 seconds apart."""
    deadline = monotonic() + 30
    requests = None
    while requests != (requests := pool.get_stats().get("requests_num", 0)):
        assert monotonic() < deadline, "the store still polls"
        await asyncio.sleep(0.7)


@pytest.mark.parametrize("autocommit", [True, False])
@pytest.mark.parametrize(
    "call", ["append", "append_many", "writer", "read_from", "wait", "create", "stop", "delete", "save", "edit"]
)
async def test_call_cancelled_at_any_step(dsn, tables, conversations, long, call, autocommit):
    size = 2
    options = {"min_size": size, "max_size": size, "timeout": 30, "open": False, "kwargs": {"autocommit": autocommit}}
    cancelled = attempt = 0
    async with (
        AsyncConnectionPool(dsn, **options) as pool,
        AsyncPostgresStreamStore(pool, **tables, poll_interval=0.05) as store,
    ):
        await pool.wait()
        trial = Trial(store, AsyncPostgresConversationStore(pool, table=conversations))
        rounds = 0
        while rounds < (5 if long else 1) or cancelled <= 10:  # on a busy machine a call takes fewer steps
            rounds += 1
            steps = finished = 0
            while finished < FINISHED:
                steps += 1 + steps // (200 if long else 20)  # one by one at first, then in growing strides
                attempt += 1
                await trial.begin(attempt)
                await store.acquire(f"{trial.id} to {call}")
                task = asyncio.create_task(getattr(trial, call)())
                # Other callers share the statements: three from the beginning, one after the steps. A stream writer
                # needs a stream of its own.
                other = f"{trial.id} to writer" if call == "writer" else trial.id
                others = [asyncio.create_task(store.append(other, "other")) for _ in range(3)]
                if call == "wait":
                    ending = asyncio.create_task(store.complete(f"{trial.id} to wait"))
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
                await trial.check(call)
                stored = {chunk.seq: chunk.data async for chunk in store.read_from(other, follow=False)}
                assert [seq for seq, text in stored.items() if text == "other"] == sorted(seqs)
                await assert_pool_recovers(pool, size, autocommit)
        await assert_no_reader_is_left(pool)
    assert async_workers() == []


async def test_repeated_delete_after_a_cancelled_one_ends_readers(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=0.1) as store:
        for steps in range(1, 200, 7):
            id = await store.create()
            await store.append(id, "first")
            waiting = asyncio.Event()

            async def read(id=id, waiting=waiting):
                async for _ in store.read_from(id):
                    waiting.set()  # once this task has switched to another one

            reader = asyncio.create_task(read())
            await waiting.wait()
            task = asyncio.create_task(store.delete(id))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await store.delete(id)
            with pytest.raises(StreamNotFoundError):
                await reader


@pytest.mark.parametrize("timeout", [None, 0.5])
async def test_unanswered_call_can_be_cancelled(disposable_server, timeout):
    with proxy.proxy(disposable_server.dsn) as network:
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
