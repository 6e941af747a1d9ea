"""Cancelled appends and readers leave nothing behind. This is of tasks alone: threads cannot be cancelled."""

from __future__ import annotations

import asyncio
import random

from psycopg_pool import AsyncConnectionPool

from aibind_postgres import AsyncPostgresStreamStore


async def test_cancelled_calls_leave_no_connection_checked_out_and_no_hole(dsn, tables):
    chance = random.Random(7)
    async with AsyncConnectionPool(dsn, min_size=2, max_size=2, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            id = await store.create()

            async def read():
                async for _ in store.read_from(id):
                    pass

            for number in range(200):
                task = asyncio.create_task(store.append(id, f"{number}") if number % 4 else read())
                await asyncio.sleep(chance.random() / 200)
                task.cancel()
                await asyncio.wait([task])
            # Whoever comes next is served, in the mode that the pool has.
            last = await store.append(id, "last")
            seqs = [chunk.seq async for chunk in store.read_from(id, follow=False)]
            assert seqs == list(range(1, last + 1))
            assert store._changes.followed() == []
        async with pool.connection() as one, pool.connection() as two:
            assert (one.autocommit, two.autocommit) == (False, False)


async def test_a_cancelled_producer_ends_its_stream(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()

        async def produce():
            async with store.writer(id) as writer:
                for number in range(1000):
                    await writer.write(f"{number}")
                    await asyncio.sleep(0.001)

        task = asyncio.create_task(produce())
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        status = await store.get_status(id)
        assert (status.state, status.error) == ("error", "CancelledError")
        chunks = [chunk async for chunk in store.read_from(id)]
        assert chunks == [(number + 1, f"{number}") for number in range(status.total_chunks)]


async def test_a_cancelled_write_to_a_full_buffer_was_not_taken(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()
        async with store.writer(id, max_chunks=1) as writer:
            await writer.write("a")
            second = asyncio.create_task(writer.write("b"))
            await asyncio.sleep(0)
            assert not second.done()
            second.cancel()
            await asyncio.wait([second])
            assert await writer.flush() == 1
        assert [chunk.data async for chunk in store.read_from(id)] == ["a"]


def test_an_event_loop_that_ends_loses_no_written_chunk(dsn, tables):
    async def main():
        store = AsyncPostgresStreamStore(dsn, **tables)
        id = await store.create()

        async def produce():
            async with store.writer(id) as writer:
                for number in range(300):
                    await writer.write(f"{number}")
                await asyncio.sleep(60)

        task = asyncio.create_task(produce())
        await asyncio.sleep(0)
        while len(store._changes._feeds) == 0:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        return id, task

    id, task = asyncio.run(main())  # cancels the producer, the worker and all else at once
    assert task.cancelled()

    async def check():
        async with AsyncPostgresStreamStore(dsn, **tables) as other:
            status = await other.get_status(id)
            return status, [chunk.data async for chunk in other.read_from(id)]

    status, chunks = asyncio.run(check())
    assert chunks == [f"{number}" for number in range(300)]
    assert status == ("error", "CancelledError", 300)
