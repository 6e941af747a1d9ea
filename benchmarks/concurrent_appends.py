"""Concurrent appends: by threads, by asyncio tasks, and by stores in several processes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING

from .bench import Bench, with_peer
from .measure import TOKEN, Figures, Row, at_least, at_most, compare, latencies
from .peers import pgbench
from .processes import process
from .tables import TTL, Tables

if TYPE_CHECKING:
    from aibind_postgres import PostgresStreamStore

WARM_UP = 10  # appends by each caller, to open connections and prepare statements


def run_threads(streams: Sequence[str], seconds: float, append: Callable[[str, str], object]) -> Figures:
    """Run one thread per stream. Each appends for some seconds and waits for each acknowledgement."""
    ready = threading.Barrier(len(streams), timeout=60)

    def work(stream: str) -> tuple[float, list[float]]:
        for _ in range(WARM_UP):
            append(stream, TOKEN)
        ready.wait()
        durations = []
        before = start = time.perf_counter()
        while before < start + seconds:
            append(stream, TOKEN)
            after = time.perf_counter()
            durations.append(after - before)
            before = after
        return before - start, durations

    with ThreadPoolExecutor(len(streams)) as pool:
        outcomes = list(pool.map(work, streams))
    return summary(outcomes)


async def run_tasks(streams: Sequence[str], seconds: float, append: Callable[[str, str], Awaitable[object]]) -> Figures:
    """Do the same as `run_threads` with one asyncio task per stream."""

    async def work(stream: str, begin: asyncio.Event) -> tuple[float, list[float]]:
        await begin.wait()
        durations = []
        before = start = time.perf_counter()
        while before < start + seconds:
            await append(stream, TOKEN)
            after = time.perf_counter()
            durations.append(after - before)
            before = after
        return before - start, durations

    for _ in range(WARM_UP):
        await asyncio.gather(*(append(stream, TOKEN) for stream in streams))
    begin = asyncio.Event()
    working = [asyncio.create_task(work(stream, begin)) for stream in streams]
    begin.set()
    return summary(await asyncio.gather(*working))


def summary(outcomes: Sequence[tuple[float, list[float]]]) -> Figures:
    """Return the total rate and the latencies of all appends."""
    all_durations = [duration for _, durations in outcomes for duration in durations]
    return {"rate": len(all_durations) / max(elapsed for elapsed, _ in outcomes), **latencies(all_durations)}


def shared_store(tables: Tables, count: int, seconds: float) -> Figures:
    with tables.store() as store:
        return run_threads([store.create() for _ in range(count)], seconds, store.append)


def pooled_appends(tables: Tables, count: int, seconds: float) -> Figures:
    """Run our append statement on pooled connections, as an application without a store would."""
    statement = tables.sql.append
    with tables.store() as store:
        streams = [store.create() for _ in range(count)]
    with tables.pool() as pool:
        pool.wait()

        def append(stream: str, chunk: str) -> None:
            with pool.connection() as connection:
                connection.execute(statement, [stream, chunk, None, TTL], binary=True).fetchone()

        return run_threads(streams, seconds, append)


def hundred_threads(bench: Bench) -> list[Row]:
    tables = bench.tables("hundred_threads")
    with tables.store() as store:
        for number in range(32):
            store.create(str(number))
    found = bench.run_interleaved(
        {
            "store": lambda: shared_store(tables, 100, bench.seconds),
            "pooled": lambda: pooled_appends(tables, 100, bench.seconds),
            "pgbench": with_peer(bench.pgbench, lambda program: pgbench(program, tables, 32, bench.seconds)),
        }
    )
    work, pooled = "append, 100 threads", "a pooled connection per append"
    return [
        compare(work, "rate", found["store"], pooled, found["pooled"], at_least(4)),
        compare(f"{work}, p50", "p50", found["store"], pooled, found["pooled"], at_most(1 / 4)),
        compare(f"{work}, p99", "p99", found["store"], pooled, found["pooled"]),
        compare(work, "rate", found["store"], "pgbench, 32 clients", found["pgbench"]),
    ]


def eight_threads(bench: Bench) -> list[Row]:
    tables = bench.tables("eight_threads")
    found = bench.run_interleaved(
        {
            "store": lambda: shared_store(tables, 8, bench.seconds),
            "pooled": lambda: pooled_appends(tables, 8, bench.seconds),
        }
    )
    pooled = "a pooled connection per append"
    return [compare("append, 8 threads", "rate", found["store"], pooled, found["pooled"], at_least(1))]


def follow(pipe: Pipe, tables: Tables, stream: str) -> None:
    """Child process: read a stream to its end, so that the writers have a reader to notify."""
    with tables.store() as store:
        for chunk in store.read_from(stream):
            if chunk.seq == 1:
                pipe.send("reading")


@contextmanager
def followed_stream(tables: Tables) -> Iterator[str]:
    """Yield a new stream that a reader in another process follows."""
    with tables.store() as store:
        stream = store.create()
        store.append(stream, TOKEN)
        with process(follow, tables, stream) as pipe:
            pipe.recv()
            time.sleep(0.5)  # until the reader listens
            yield stream
            store.complete(stream)


def five_hundred_tasks(bench: Bench) -> list[Row]:
    tables = bench.tables("five_hundred_tasks")
    seconds = bench.seconds + 1  # each task appends only a few times per second

    async def store(followed: str) -> Figures:
        async with tables.async_store() as store:
            streams = [await store.create() for _ in range(499)]
            return await run_tasks([followed, *streams], seconds, store.append)

    async def pooled(followed: str) -> Figures:
        statement = tables.sql.append
        async with tables.async_store() as store:
            streams = [await store.create() for _ in range(499)]
        async with tables.async_pool() as pool:
            await pool.wait()

            async def append(stream: str, chunk: str) -> None:
                async with pool.connection(timeout=60) as connection:
                    cursor = await connection.execute(statement, [stream, chunk, None, TTL], binary=True)
                    await cursor.fetchone()

            return await run_tasks([followed, *streams], seconds, append)

    with followed_stream(tables) as followed:
        found = bench.run_interleaved(
            {"store": lambda: asyncio.run(store(followed)), "pooled": lambda: asyncio.run(pooled(followed))}
        )
    work, peer = "append, 500 asyncio tasks, with notifications", "a pooled connection per append"
    return [
        compare(work, "rate", found["store"], peer, found["pooled"], at_least(4)),
        compare(f"{work}, p50", "p50", found["store"], peer, found["pooled"]),
        compare(f"{work}, p99", "p99", found["store"], peer, found["pooled"], at_most(1)),
    ]


def eight_stores(pipe: Pipe, tables: Tables) -> None:
    """Child process: run eight threads, each with its own store. Repeat on each request of the parent."""
    with suppress(EOFError):
        while True:
            seconds, notifies = pipe.recv()
            with ExitStack() as stack:
                stores: dict[str, PostgresStreamStore] = {}
                for _ in range(8):
                    store = stack.enter_context(tables.store(notify=notifies))
                    stores[store.create()] = store
                pipe.send("ready")
                pipe.recv()  # wait for the other processes
                pipe.send(run_threads(list(stores), seconds, partial(append_to, stores)))


def append_to(stores: dict[str, PostgresStreamStore], stream: str, chunk: str) -> None:
    stores[stream].append(stream, chunk)


def separate_stores(bench: Bench) -> list[Row]:
    tables = bench.tables("separate_stores")

    def run(notifies: bool) -> Figures:
        for pipe in pipes:
            pipe.send((bench.seconds, notifies))
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send("begin")
        answers: list[Figures] = [pipe.recv() for pipe in pipes]
        return {"rate": sum(answer["rate"] for answer in answers)}

    with ExitStack() as stack:
        stack.enter_context(followed_stream(tables))
        pipes = [stack.enter_context(process(eight_stores, tables)) for _ in range(4)]
        found = bench.run_interleaved({"notified": lambda: run(True), "silent": lambda: run(False)})
    work = "append, 32 stores in 4 processes, with notifications"
    return [
        compare(work, "rate", found["notified"], "the same, without notifications", found["silent"], at_least(0.85))
    ]
