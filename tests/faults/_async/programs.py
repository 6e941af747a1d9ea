"""Programs for separate processes: producers, which the tests kill, and a reader. Each reports its results at once."""

from __future__ import annotations

from support.programs import BATCH, report, text_of

from aibind_postgres import AsyncPostgresStreamStore


async def next_seq(store, id):
    await store.acquire(id)
    return (await store.get_status(id)).total_chunks + 1


async def append(dsn, id, name):
    async with AsyncPostgresStreamStore(dsn) as store:
        seq = await next_seq(store, id)
        while True:
            report(await store.append(id, text_of(name, seq), expected_seq=seq))
            seq += 1


async def append_many(dsn, id, name):
    async with AsyncPostgresStreamStore(dsn) as store:
        seq = await next_seq(store, id)
        while True:
            texts = [text_of(name, seq + offset) for offset in range(BATCH)]
            report(await store.append_many(id, texts, expected_seq=seq))
            seq += BATCH


async def write(dsn, id, name):
    async with AsyncPostgresStreamStore(dsn) as store:
        seq = await next_seq(store, id)
        async with store.writer(id) as writer:
            while True:
                for _ in range(BATCH):
                    await writer.write(text_of(name, seq))
                    seq += 1
                report(await writer.flush())


async def read(dsn, id):
    async with AsyncPostgresStreamStore(dsn) as store:
        async for chunk in store.read_from(id):
            report(chunk)
        report(await store.get_status(id))
