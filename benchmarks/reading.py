"""Reading stored streams: rate and memory."""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import Bench, with_peer
from .measure import TOKEN, Figures, Row, at_least, at_most, compare
from .peers import NpmDesign, Redis, add_entry
from .processes import process
from .tables import Tables

if TYPE_CHECKING:
    from aibind_postgres import PostgresStreamStore

CHUNKS = 100_000
MANY_CHUNKS = 1_000_000
PAGE = 1_000  # entries per XRANGE; larger pages are not faster

READ_SECONDS = 0.5  # seconds at least, so that the caches left by the previous variant matter little

EVERYTHING = "SELECT seq, data FROM {} WHERE id = $1 ORDER BY seq"


def replay(bench: Bench) -> list[Row]:
    tables = bench.tables("replay")
    with tables.store() as store, tables.connect() as connection:
        stream = store.create()
        for _ in range(CHUNKS // 1_000):
            store.append_many(stream, [TOKEN] * 1_000)
        store.complete(stream)
        connection.execute(f"VACUUM (ANALYZE) {tables.chunks}")
        everything = EVERYTHING.format(tables.chunks)
        if isinstance(server := bench.redis["always"], Redis):
            with server.connect() as client:
                for _ in range(CHUNKS // PAGE):
                    pipeline = client.pipeline(transaction=False)
                    for _ in range(PAGE):
                        add_entry(pipeline, "replay", TOKEN)
                    pipeline.execute()

        async def async_store_read() -> Figures:
            async with tables.async_store() as store:
                await store.get_status(stream)
                times = 0
                start = time.perf_counter()
                while (elapsed := time.perf_counter() - start) < READ_SECONDS:
                    async for _ in store.read_from(stream, follow=False):
                        pass
                    times += 1
                return {"rate": times * CHUNKS / elapsed}

        found = bench.run_interleaved(
            {
                "store": lambda: read_repeatedly(lambda: store.read_from(stream, follow=False)),
                "asyncio store": lambda: asyncio.run(async_store_read()),
                "fetchall": lambda: read_repeatedly(
                    lambda: connection.execute(everything, [stream], binary=True).fetchall()
                ),
                "Redis": with_peer(
                    bench.redis["always"], lambda server: read_repeatedly(lambda: redis_entries(server))
                ),
                "npm": lambda: read_repeatedly(lambda: NpmDesign(tables).read(connection, stream)),
            }
        )
    work, raw = f"replay of {CHUNKS:,} chunks", "psycopg fetchall, binary"
    return [
        compare(work, "rate", found["store"], raw, found["fetchall"], at_least(0.6)),
        compare(f"{work}, asyncio", "rate", found["asyncio store"], raw, found["fetchall"]),
        compare(work, "rate", found["store"], "Redis XRANGE", found["Redis"], at_least(8)),
        compare(work, "rate", found["store"], "the npm package's statements", found["npm"]),
    ]


def read_repeatedly(read: Callable[[], Iterable[Any]]) -> Figures:
    """Read everything repeatedly and discard it. Return the rate."""
    times = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < READ_SECONDS:
        deque(read(), maxlen=0)
        times += 1
    return {"rate": times * CHUNKS / elapsed}


def redis_entries(server: Redis) -> Iterator[Any]:
    """Read the Redis stream page by page."""
    with server.connect() as client:
        cursor = "-"
        while True:
            page = client.xrange("replay", cursor, "+", PAGE)
            yield from page
            if len(page) < PAGE:
                return
            cursor = f"({page[-1][0]}"


def memory(bench: Bench) -> list[Row]:
    tables = bench.tables("memory")
    with tables.store() as store, tables.connect() as admin:
        stream = store.create()
        bench.step(f"storing {MANY_CHUNKS:,} chunks")
        admin.execute(
            f"INSERT INTO {tables.chunks} (id, seq, data) SELECT $1, n, $2 FROM generate_series(1, {MANY_CHUNKS}) AS n",
            [stream, TOKEN],
        )
        admin.execute(f"UPDATE {tables.status} SET total_chunks = {MANY_CHUNKS} WHERE id = $1", [stream])
        admin.execute(f"VACUUM (ANALYZE) {tables.chunks}")
        store.complete(stream)

    def growth(reader: Callable[[Pipe, Tables, str], None]) -> Figures:
        with process(reader, tables, stream) as pipe:
            return {"growth": pipe.recv()}

    found = bench.run_interleaved(
        {"store": lambda: growth(read_all), "fetchall": lambda: growth(fetch_all)}, rounds=1 if bench.quick else 3
    )
    work = f"memory to read {MANY_CHUNKS:,} chunks"
    return [
        Row(work, "MiB", found["store"].figures["growth"], target=at_most(32)),
        compare(work, "growth", found["store"], "psycopg fetchall, binary", found["fetchall"]),
    ]


def read_all(pipe: Pipe, tables: Tables, stream: str) -> None:
    """Child process: read a stream. Report the growth of the memory of the process."""
    with tables.store() as store:
        consume(store, store.create())
        before = peak_memory()
        consume(store, stream)
        pipe.send(peak_memory() - before)


def consume(store: PostgresStreamStore, stream: str) -> None:
    deque(store.read_from(stream, follow=False), maxlen=0)


def fetch_all(pipe: Pipe, tables: Tables, stream: str) -> None:
    """Do the same as `read_all` with psycopg alone."""
    everything = EVERYTHING.format(tables.chunks)
    with tables.connect() as connection:
        connection.execute(everything, [""], binary=True).fetchall()
        before = peak_memory()
        connection.execute(everything, [stream], binary=True).fetchall()
        pipe.send(peak_memory() - before)


def peak_memory() -> float:
    """Return the peak memory of this process, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux a process inherits ru_maxrss from its parent.
        [peak] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(peak.split()[1]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 1024
