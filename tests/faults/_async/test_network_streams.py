"""Network faults while streams are written and read: each chunk is stored once and read once."""

from __future__ import annotations

import random
from functools import partial
from itertools import count
from time import monotonic

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support import proxy
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until

from aibind_postgres import AsyncPostgresStreamStore

HANG = 30  # seconds after which a call counts as hanging
TIMEOUT = {"timeout": 1.0}  # the store option that bounds calls to a silent server
TEXTS = [f"written {number}" for number in range(1, 31)]


async def texts_of(store, id):
    return [(chunk.seq, chunk.data) async for chunk in store.read_from(id, follow=False)]


def numbered(texts):
    return list(enumerate(texts, 1))


@pytest.mark.parametrize("fault", proxy.LASTING)
async def test_retry_for_outlasts_the_fault(network, direct, fault, long):
    options = {} if fault == "refused" else TIMEOUT
    async with AsyncPostgresStreamStore(network.dsn, retry_for=HANG, **options) as store:
        for _ in range(4 if long else 1):
            id = await direct.create()

            async def write(id=id):
                async with store.writer(id) as writer:
                    for text in TEXTS:
                        await writer.write(text)
                        await async_sleep(0.1)

            async def read(id=id):
                return [(chunk.seq, chunk.data) async for chunk in store.read_from(id)]

            async with AsyncBackground(write) as writing, AsyncBackground(read) as reading:
                async with AsyncBackground(partial(store.wait, id)) as waiting:
                    try:
                        await async_sleep(0.5)
                        proxy.LASTING[fault](network)
                        await async_sleep(2.5)
                        network.heal()
                        await writing.result(HANG)
                        assert await reading.result(HANG) == numbered(TEXTS)
                        assert (await waiting.result(HANG)).state == "done"
                    finally:
                        network.heal()
                        await direct.complete(id)
                        network.cut()
            assert await texts_of(direct, id) == numbered(TEXTS)


async def test_appends_without_expected_seq_are_stored_at_most_once(network, direct, long):
    seed = 5
    rng = random.Random(seed)
    id = await direct.create()
    acknowledged, unknown = {}, set()
    async with AsyncPostgresStreamStore(network.dsn) as store:
        await store.get_status(id)

        async def append(first):
            for number in range(first, first + (500 if long else 25)):
                try:
                    acknowledged[await store.append(id, f"<{number}>")] = f"<{number}>"
                except psycopg.OperationalError:
                    unknown.add(f"<{number}>")

        async def inject_faults():
            while len(acknowledged) + len(unknown) < (4000 if long else 200):
                rng.choice(
                    [
                        network.cut,
                        partial(network.cut_at, "<", answered=True),
                        partial(network.cut_at, "<", answered=False),
                    ]
                )()
                await async_sleep(rng.uniform(0.005, 0.05))

        async def append_under_faults():
            await async_gather(inject_faults, *[partial(append, 1000 * writer) for writer in range(8)])

        async with AsyncBackground(append_under_faults) as running:
            try:
                await running.result(120 if long else HANG)
            finally:
                network.heal()
    stored = await texts_of(direct, id)
    texts = [text for _, text in stored]
    assert [seq for seq, _ in stored] == list(range(1, len(stored) + 1)), seed
    assert len(set(texts)) == len(texts), seed
    assert acknowledged.items() <= dict(stored).items(), seed
    assert set(texts) <= set(acknowledged.values()) | unknown, seed
    assert acknowledged, seed
    assert network.faults, seed


async def test_pool_full_of_dead_connections(network, direct):
    id = await direct.create()
    await direct.complete(id)
    async with (
        AsyncConnectionPool(network.dsn, kwargs={"autocommit": True}, min_size=40, timeout=HANG, open=False) as pool,
        AsyncPostgresStreamStore(pool, retry_for=5) as store,
    ):
        await pool.wait(HANG)
        network.cut()
        assert [chunk async for chunk in store.read_from(id)] == []


async def test_reader_gets_each_chunk_once_despite_many_cuts(network, direct, long):
    seed = 7
    rng = random.Random(seed)
    id = await direct.create()
    total = 2000 if long else 100
    # Many attempts fail here, so the reader needs a long `retry_for`.
    async with AsyncPostgresStreamStore(network.dsn, retry_for=300) as store:

        async def read():
            return [(chunk.seq, chunk.data) async for chunk in store.read_from(id)]

        async with AsyncBackground(read) as first, AsyncBackground(read) as second:
            for number in range(1, total + 1):
                await direct.append(id, f"{number}")
                await async_sleep(0.01)
                if rng.random() < 0.1:
                    network.cut()
            await direct.complete(id)
            assert await first.result(HANG) == numbered(map(str, range(1, total + 1))), seed
            assert await second.result(HANG) == numbered(map(str, range(1, total + 1))), seed


@pytest.mark.parametrize("directions", [proxy.BOTH, (proxy.TO_CLIENT,)], ids=["silent", "notifications stalled"])
async def test_stalled_listen_connection_is_replaced(network, direct, directions):
    id = await direct.create()
    arrived = []
    async with AsyncPostgresStreamStore(network.dsn) as store:

        async def read():
            async for chunk in store.read_from(id):
                arrived.append(chunk.data)

        async with AsyncBackground(read) as reader:
            try:
                await async_until(lambda: network.listened == 1)
                network.stall(*directions, listening_only=True)
                deadline = monotonic() + 2 * HANG
                for number in count(1):
                    await direct.append(id, f"{number}")
                    await async_until(lambda number=number: len(arrived) == number)  # found by the poll
                    if network.listened > 1:
                        break
                    assert monotonic() < deadline, "the listener keeps its stalled connection"
                    await async_sleep(0.3)
            finally:
                await direct.complete(id)
            await reader.result(HANG)
    assert arrived == [f"{number}" for number in range(1, len(arrived) + 1)]
