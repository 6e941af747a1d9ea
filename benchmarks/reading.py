"""Reading stored streams: rate, first chunk, and memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from itertools import cycle
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING, Any, cast

from .bench import Bench, with_peer
from .loops import async_repeat, repeat
from .measure import TOKEN, Figures, Row, at_least, at_most, compare
from .peers import NpmDesign, Redis, add_entry
from .processes import peak_memory, process
from .tables import Tables

if TYPE_CHECKING:
    from aibind_postgres import PostgresStreamStore
    from aibind_postgres.models import StreamChunk

PAGE = 1_000  # entries per XRANGE; larger pages are not faster

STORED_STREAMS, STORED_CHUNKS = 200, 20

EVERYTHING = "SELECT seq, data FROM {} WHERE id = $1 ORDER BY seq"


def replay(bench: Bench) -> list[Row]:
    tables, chunks = bench.tables("replay"), bench.size.page
    everything = EVERYTHING.format(tables.chunks)
    with tables.store() as store, tables.connect() as connection:
        stream = store.create()
        for _ in range(chunks // 1_000):
            store.append_many(stream, [TOKEN] * 1_000)
        store.complete(stream)
        connection.execute(f"VACUUM (ANALYZE) {tables.chunks}")
        if isinstance(server := bench.redis["always"], Redis):
            with server.connect() as client:
                for _ in range(chunks // PAGE):
                    pipeline = client.pipeline(transaction=False)
                    for _ in range(PAGE):
                        add_entry(pipeline, "replay", TOKEN)
                    pipeline.execute()

        def read_repeatedly(read: Callable[[], Iterable[Any]]) -> Figures:
            return repeat(lambda: deque(read(), maxlen=0), bench.size.seconds, units=chunks, warm_up=1)

        async def async_store_read() -> Figures:
            async with tables.async_store() as store:

                async def read() -> None:
                    async for _ in store.read_from(stream, follow=False):
                        pass

                return await async_repeat(read, bench.size.seconds, units=chunks, warm_up=1)

        async def async_fetchall() -> Figures:
            async with await tables.async_connect() as connection:
                cursor = connection.cursor(binary=True)

                async def read() -> None:
                    await cursor.execute(everything, [stream], prepare=True)
                    for _ in await cursor.fetchall():
                        pass

                return await async_repeat(read, bench.size.seconds, units=chunks, warm_up=1)

        cursor = connection.cursor(binary=True)
        found = bench.run_interleaved(
            {
                "store": lambda: read_repeatedly(lambda: store.read_from(stream, follow=False)),
                "fetchall": lambda: read_repeatedly(
                    lambda: cursor.execute(everything, [stream], prepare=True).fetchall()
                ),
                "asyncio store": lambda: asyncio.run(async_store_read()),
                "asyncio fetchall": lambda: asyncio.run(async_fetchall()),
                "Redis": with_peer(
                    bench.redis["always"], lambda server: read_repeatedly(lambda: redis_entries(server))
                ),
                "npm": lambda: read_repeatedly(lambda: NpmDesign(tables).read(connection, stream)),
            }
        )
    work, raw = f"replay of {chunks:,} chunks", "psycopg fetchall, binary"
    async_ours, async_raw = found["asyncio store"], found["asyncio fetchall"]
    return [
        compare(work, "rate", found["store"], raw, found["fetchall"], at_least(0.75)),
        compare(f"{work}, asyncio", "rate", async_ours, f"asyncio {raw}", async_raw, at_least(0.6)),
        compare(work, "rate", found["store"], "Redis XRANGE", found["Redis"], at_least(8)),
        compare(work, "rate", found["store"], "the npm package's statements", found["npm"]),
    ]


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


def first_chunk(bench: Bench) -> list[Row]:
    """Open stored, ended streams in turn, as after the reload of a page."""
    tables, seconds = bench.tables("first_chunk"), bench.size.seconds
    everything = EVERYTHING.format(tables.chunks)
    with tables.store() as store, tables.connect() as connection:
        streams = [store.create() for _ in range(STORED_STREAMS)]
        for stream in streams:
            store.append_many(stream, [TOKEN] * STORED_CHUNKS)
            store.complete(stream)
        connection.execute(f"VACUUM (ANALYZE) {tables.chunks}, {tables.status}")
        in_turn, cursor = cycle(streams), connection.cursor(binary=True)

        async def async_store_read() -> Figures:
            async with tables.async_store() as store:

                async def read() -> None:
                    chunks = cast("AsyncGenerator[StreamChunk, None]", store.read_from(next(in_turn)))
                    async with aclosing(chunks):
                        await anext(chunks)

                return await async_repeat(read, seconds)

        async def async_select() -> Figures:
            async with await tables.async_connect() as connection:
                cursor = connection.cursor(binary=True)

                async def read() -> None:
                    await cursor.execute(everything, [next(in_turn)], prepare=True)
                    await cursor.fetchall()

                return await async_repeat(read, seconds)

        found = bench.run_interleaved(
            {
                "store": lambda: repeat(lambda: next(store.read_from(next(in_turn))), seconds),
                "select": lambda: repeat(
                    lambda: cursor.execute(everything, [next(in_turn)], prepare=True).fetchall(), seconds
                ),
                "asyncio store": lambda: asyncio.run(async_store_read()),
                "asyncio select": lambda: asyncio.run(async_select()),
            }
        )
    work, raw = f"first chunk of a stored stream of {STORED_CHUNKS}, p50", "SELECT of the chunks, raw cursor"
    async_ours, async_raw = found["asyncio store"], found["asyncio select"]
    return [
        compare(work, "p50", found["store"], raw, found["select"], at_most(1.5)),
        compare(f"{work}, asyncio", "p50", async_ours, f"asyncio {raw}", async_raw, at_most(1.5)),
    ]


def memory(bench: Bench) -> list[Row]:
    tables, chunks = bench.tables("memory"), bench.size.memory
    with tables.store() as store, tables.connect() as admin:
        stream = store.create()
        bench.step(f"storing {chunks:,} chunks")
        admin.execute(
            f"INSERT INTO {tables.chunks} (id, seq, data) SELECT $1, n, $2 FROM generate_series(1, {chunks}) AS n",
            [stream, TOKEN],
        )
        admin.execute(f"UPDATE {tables.status} SET total_chunks = {chunks} WHERE id = $1", [stream])
        admin.execute(f"VACUUM (ANALYZE) {tables.chunks}")
        store.complete(stream)

    def growth(reader: Callable[[Pipe, Tables, str], None]) -> Figures:
        with process(reader, tables, stream) as pipe:
            return {"growth": pipe.recv()}

    found = bench.run_interleaved(
        {"store": lambda: growth(read_all), "fetchall": lambda: growth(fetch_all)}, bench.size.long_rounds
    )
    work = f"memory to read {chunks:,} chunks"
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
