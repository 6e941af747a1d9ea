"""A thousand readers in one process: their cost while idle, and their latency when they follow one stream."""

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
from .peers import NpmDesign
from .processes import process, run_all
from .tables import ASYNC_RAW, Tables

if TYPE_CHECKING:
    from .bench import Bench

NPM_READERS = 200
POOL = 4  # connections of the readers' pool

CHUNKS_PER_SECOND = 50


def idle(bench: Bench) -> list[Row]:
    """Count the transactions of a database that only the readers use. Each of their statements is a transaction."""
    with psycopg.connect(bench.dsn, autocommit=True) as admin:
        tables, readers = bench.database("idle"), bench.size.readers
        with tables.store() as store:
            streams = [store.create() for _ in range(readers)]
            for stream in streams:
                store.append(stream, TOKEN)

        def statements(delay: float) -> list[float]:
            time.sleep(delay)
            rates = []
            for number in range(bench.size.rounds):
                bench.step(f"round {number + 1} of {bench.size.rounds}")
                before, start = transactions(admin, "idle"), time.monotonic()
                time.sleep(max(1.5, 2 * bench.size.seconds))  # the statistics change once per second
                rates.append((transactions(admin, "idle") - before) / (time.monotonic() - start))
            return rates

        bench.step(f"waiting until {readers:,} readers have settled")
        with process(wait_for_chunks, tables, streams) as pipe:
            pipe.recv()
            ours = statements(bench.size.settle)
            [[connections]] = admin.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = 'idle'").fetchall()
        bench.step(f"{NPM_READERS} readers of the npm package")
        with process(wait_as_npm, tables, streams[:NPM_READERS]) as pipe:
            pipe.recv()
            theirs = statements(min(2, bench.size.settle))
    work = f"{readers:,} idle readers in one process"
    return [
        Row(work, "statements/s", ours, target=at_most(2)),
        Row(f"{work}: connections outside the pool", "", [connections - POOL], target=at_most(1)),
        Row(work, "statements/s", ours, f"{NPM_READERS} readers of the npm package, polling", theirs),
    ]


def transactions(admin: psycopg.Connection[Any], database: str) -> int:
    """Return the number of transactions that have ended in a database."""
    statement = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"
    [[count]] = admin.execute(statement, [database]).fetchall()
    return int(count)


@asynccontextmanager
async def reading_store(tables: Tables) -> AsyncIterator[AsyncPostgresStreamStore]:
    """Yield a store with a pool of fixed size."""
    pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
        tables.dsn, min_size=POOL, max_size=POOL, timeout=120, kwargs=ASYNC_RAW, open=False
    )
    async with pool, AsyncPostgresStreamStore(pool, **tables.names) as store:
        yield store


def wait_for_chunks(pipe: Pipe, tables: Tables, streams: list[str]) -> None:
    """Child process: read each stream. Report when all readers have received their first chunk."""

    async def run() -> None:
        async with reading_store(tables) as store:

            async def read(stream: str, has_started: Callable[[], None]) -> None:
                async for _ in store.read_from(stream):
                    has_started()

            await read_until_closed(pipe, streams, read)

    asyncio.run(run())


def wait_as_npm(pipe: Pipe, tables: Tables, streams: list[str]) -> None:
    """Child process: run idle readers of the npm package."""

    async def run() -> None:
        async with tables.async_pool() as pool:

            async def wait(stream: str, has_started: Callable[[], None]) -> None:
                has_started()
                await NpmDesign(tables).wait(pool, stream)

            await read_until_closed(pipe, streams, wait)

    asyncio.run(run())


async def read_until_closed(
    pipe: Pipe, streams: list[str], read: Callable[[str, Callable[[], None]], Awaitable[None]]
) -> None:
    """Read streams until the parent closes the pipe. Report when all readers have started."""
    started = asyncio.Semaphore(0)

    async def report_start() -> None:
        for _ in streams:
            await started.acquire()
        pipe.send("reading")
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    with suppress(EOFError):
        await run_all(report_start(), *(read(stream, started.release) for stream in streams))


def fan_out(bench: Bench) -> list[Row]:
    """Write one stream at a fixed pace. Count the scans of the table of chunks, which appends do not scan."""
    tables, readers = bench.tables("fan_out"), bench.size.readers
    chunks = bench.size.live_seconds * CHUNKS_PER_SECOND
    with tables.store() as store, tables.connect() as admin:
        stream = store.create()
        store.append(stream, TOKEN)
        with process(follow_together, tables, stream, readers) as pipe:
            pipe.recv()
            bench.step(f"waiting until {readers:,} readers have settled")
            time.sleep(bench.size.settle)
            scans_before = scans(admin)
            bench.step(f"{CHUNKS_PER_SECOND} chunks a second")
            start = time.monotonic()
            for number in range(chunks):
                time.sleep(max(0.0, start + number / CHUNKS_PER_SECOND - time.monotonic()))
                store.append(stream, str(time.monotonic()))
            store.complete(stream)
            delays: list[float] = pipe.recv()
    time.sleep(0.5)  # the server processes of the readers end and publish their statistics
    with tables.connect() as admin:
        fetches = scans(admin) - scans_before
    work, figures = f"{readers:,} readers of one stream in one process", latencies(delays)
    return [
        # The end of the stream is one more change.
        Row(f"{work}: fetches for each change", "", [fetches / (chunks + 1)], target=at_most(1)),
        Row(f"{work}: share of the chunks that arrived", "", [len(delays) / (chunks * readers)], target=at_least(1)),
        Row(f"{work}: chunk to reader, p50", "ms", [figures["p50"]]),
        Row(f"{work}: chunk to reader, p99", "ms", [figures["p99"]], target=at_most(60)),
    ]


def scans(admin: psycopg.Connection[Any]) -> int:
    [[count]] = admin.execute(
        "SELECT coalesce(seq_scan, 0) + coalesce(idx_scan, 0) FROM pg_stat_user_tables"
        " WHERE schemaname = 'fan_out' AND relname = 'chunks'"
    ).fetchall()
    return int(count)


def follow_together(pipe: Pipe, tables: Tables, stream: str, readers: int) -> None:
    """Child process: all readers follow one stream. Send the delays of all chunks to the parent."""
    delays: list[float] = []

    async def run() -> None:
        async with reading_store(tables) as store:
            started = asyncio.Semaphore(0)

            async def read() -> None:
                async for chunk in store.read_from(stream):
                    if chunk.seq == 1:
                        started.release()
                    else:
                        delays.append(time.monotonic() - float(chunk.data))

            async def report_start() -> None:
                for _ in range(readers):
                    await started.acquire()
                pipe.send("reading")

            await run_all(report_start(), *(read() for _ in range(readers)))

    asyncio.run(run())
    pipe.send(delays)
