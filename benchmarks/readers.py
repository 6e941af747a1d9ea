"""A thousand readers in one process: what they cost while nothing happens, and how they follow one stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg_pool import AsyncConnectionPool

from aibind_postgres import AsyncPostgresStreamStore

from .measure import TOKEN, Row, at_least, at_most, latencies
from .peers import ASYNC_RAW, Seed, Tables, process, together

if TYPE_CHECKING:
    from .bench import Bench

READERS = 1_000
SEED_READERS = 200
POOL = 4  # connections of the readers' pool

# A server process counts what it does for itself, and hands that on once a second while it works, after ten if not.
COUNTED = 11.0

CHUNKS_PER_SECOND = 50


def idle(bench: Bench) -> list[Row]:
    """Count the transactions of a database that only the readers use; each statement of theirs is one."""
    with psycopg.connect(bench.dsn, autocommit=True) as admin:
        tables = bench.database("idle")
        with tables.store() as store:
            streams = [store.create() for _ in range(READERS)]
            for stream in streams:
                store.append(stream, TOKEN)

        def statements(settling: float) -> list[float]:
            time.sleep(settling)
            rates = []
            for number in range(bench.rounds):
                bench.step(f"round {number + 1} of {bench.rounds}")
                before, begun = transactions(admin), time.monotonic()
                time.sleep(2 if bench.quick else 4)
                rates.append((transactions(admin) - before) / (time.monotonic() - begun))
            return rates

        bench.step(f"waiting until {READERS:,} readers have settled")
        with process(wait_for_chunks, tables, streams) as pipe:
            pipe.recv()
            ours = statements(COUNTED)
            [[connections]] = admin.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = 'idle'").fetchall()
        bench.step(f"{SEED_READERS} readers of the seed")
        with process(wait_as_the_seed, tables, streams[:SEED_READERS]) as pipe:
            pipe.recv()
            theirs = statements(2)
    work = f"{READERS:,} idle readers in one process"
    return [
        Row(work, "statements/s", ours, bar=at_most(2)),
        Row(f"{work}: connections beside the pool's", "", [connections - POOL], bar=at_most(1)),
        Row(work, "statements/s", ours, f"{SEED_READERS} readers of the seed, polling", theirs),
    ]


def transactions(admin: psycopg.Connection[Any]) -> int:
    [[count]] = admin.execute(
        "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = 'idle'"
    ).fetchall()
    return int(count)


@asynccontextmanager
async def reading_store(tables: Tables) -> AsyncIterator[AsyncPostgresStreamStore]:
    """Give a store with a pool whose connections are all there from the beginning."""
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
        tables.dsn, min_size=POOL, max_size=POOL, timeout=120, kwargs=ASYNC_RAW, open=False
    )
    async with pool, AsyncPostgresStreamStore(pool, **tables.names) as store:
        yield store


def wait_for_chunks(pipe: Pipe, tables: Tables, streams: list[str]) -> None:
    """In a process of its own: read each stream, and say when all have got their first chunk."""

    async def run() -> None:
        async with reading_store(tables) as store:

            async def read(stream: str, has_begun: Callable[[], None]) -> None:
                async for _ in store.read_from(stream):
                    has_begun()

            await until_told(pipe, streams, read)

    asyncio.run(run())


def wait_as_the_seed(pipe: Pipe, tables: Tables, streams: list[str]) -> None:
    """In a process of its own: let the seed's readers wait."""

    async def run() -> None:
        async with tables.async_pool() as pool:

            async def wait(stream: str, has_begun: Callable[[], None]) -> None:
                has_begun()
                await Seed(tables).wait(pool, stream)

            await until_told(pipe, streams, wait)

    asyncio.run(run())


async def until_told(
    pipe: Pipe, streams: list[str], read: Callable[[str, Callable[[], None]], Awaitable[None]]
) -> None:
    """Read streams until the parent hangs up, and tell it when all readers have begun."""
    begun = asyncio.Semaphore(0)

    async def tell() -> None:
        for _ in streams:
            await begun.acquire()
        pipe.send("reading")
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    with suppress(EOFError):
        await together(tell(), *(read(stream, begun.release) for stream in streams))


def fan_out(bench: Bench) -> list[Row]:
    """Write one stream at a pace, and count how often the table of chunks is looked into; an append does not."""
    tables = bench.tables("fan_out")
    seconds = 3 if bench.quick else 8
    chunks = seconds * CHUNKS_PER_SECOND
    with tables.store() as store, tables.connect() as admin:
        stream = store.create()
        store.append(stream, TOKEN)
        with process(follow_together, tables, stream) as pipe:
            pipe.recv()
            bench.step(f"waiting until {READERS:,} readers have settled")
            time.sleep(COUNTED)
            looks_before = looks(admin)
            bench.step(f"{CHUNKS_PER_SECOND} chunks a second")
            begun = time.monotonic()
            for number in range(chunks):
                time.sleep(max(0.0, begun + number / CHUNKS_PER_SECOND - time.monotonic()))
                store.append(stream, str(time.monotonic()))
            store.complete(stream)
            taken: list[float] = pipe.recv()
    time.sleep(0.5)  # by then the readers' server processes are gone, and have handed on what they counted
    with tables.connect() as admin:
        fetches = looks(admin) - looks_before
    work, figures = f"{READERS:,} readers of one stream in one process", latencies(taken)
    return [
        # Its end is a change like its chunks.
        Row(f"{work}: fetches for each change", "", [fetches / (chunks + 1)], bar=at_most(1)),
        Row(f"{work}: share of the chunks that arrived", "", [len(taken) / (chunks * READERS)], bar=at_least(1)),
        Row(f"{work}: chunk to reader, p50", "ms", [figures["p50"]]),
        Row(f"{work}: chunk to reader, p99", "ms", [figures["p99"]], bar=at_most(60)),
    ]


def looks(admin: psycopg.Connection[Any]) -> int:
    [[count]] = admin.execute(
        "SELECT coalesce(seq_scan, 0) + coalesce(idx_scan, 0) FROM pg_stat_user_tables"
        " WHERE schemaname = 'fan_out' AND relname = 'chunks'"
    ).fetchall()
    return int(count)


def follow_together(pipe: Pipe, tables: Tables, stream: str) -> None:
    """In a process of its own: let all readers follow one stream, and hand over how long each chunk was under way."""
    taken: list[float] = []

    async def run() -> None:
        async with reading_store(tables) as store:
            begun = asyncio.Semaphore(0)

            async def read() -> None:
                async for chunk in store.read_from(stream):
                    if chunk.seq == 1:
                        begun.release()
                    else:
                        taken.append(time.monotonic() - float(chunk.data))

            async def tell() -> None:
                for _ in range(READERS):
                    await begun.acquire()
                pipe.send("reading")

            await together(tell(), *(read() for _ in range(READERS)))

    asyncio.run(run())
    pipe.send(taken)
