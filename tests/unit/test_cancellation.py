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
