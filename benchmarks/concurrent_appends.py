"""Concurrent appends: by threads, by asyncio tasks, and by stores in several processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING

from .bench import Bench, with_peer
from .driver import async_pooled_append, pooled_append
from .loops import run_tasks, run_threads
from .measure import TOKEN, Figures, Missing, Row, at_least, at_most, compare
from .peers import pgbench
from .processes import process
from .tables import POOL_SIZE, Tables

if TYPE_CHECKING:
    from aibind_postgres import PostgresStreamStore

POOLED = f"the same statement, raw cursor, pool of {POOL_SIZE}"

TARGETS = {2: 1.0, 8: 1.15, 32: 2.2, 100: 3.0}  # by the number of threads


def new_streams(tables: Tables, count: int) -> list[str]:
    with tables.store() as store:
        return [store.create() for _ in range(count)]


def threads(count: int) -> Callable[[Bench], list[Row]]:
    """Return the benchmark of appends by a number of threads."""

    def run(bench: Bench) -> list[Row]:
        tables, seconds = bench.tables(f"threads_{count}"), bench.size.seconds

        def store_appends() -> Figures:
            with tables.store() as store:
                return run_threads(new_streams(tables, count), seconds, store.append)

        def pooled_appends() -> Figures:
            with pooled_append(tables) as append:
                return run_threads(new_streams(tables, count), seconds, append)

        variants: dict[str, Callable[[], Figures] | Missing] = {"store": store_appends, "pooled": pooled_appends}
        if count == 100:
            with tables.store() as store:
                for number in range(32):
                    store.create(str(number))  # for pgbench
            variants["pgbench"] = with_peer(bench.pgbench, lambda program: pgbench(program, tables, 32, seconds))
        found = bench.run_interleaved(variants)
        work, ours, pooled = f"append, {count} threads", found["store"], found["pooled"]
        rows = [compare(work, "rate", ours, POOLED, pooled, at_least(TARGETS[count]))]
        if count in (8, 100):
            rows.append(compare(f"{work}, processor time", "processor", ours, POOLED, pooled))
        if count == 100:
            rows += [
                compare(f"{work}, p50", "p50", ours, POOLED, pooled),
                compare(f"{work}, p99", "p99", ours, POOLED, pooled),
                compare(work, "rate", ours, "pgbench, 32 clients", found["pgbench"]),
            ]
        return rows

    return run


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
    seconds = 1.5 * bench.size.seconds  # each task appends only a few times per second

    async def store(followed: str) -> Figures:
        async with tables.async_store() as store:
            return await run_tasks([followed, *new_streams(tables, 499)], seconds, store.append)

    async def pooled(followed: str) -> Figures:
        async with async_pooled_append(tables) as append:
            return await run_tasks([followed, *new_streams(tables, 499)], seconds, append)

    with followed_stream(tables) as followed:
        found = bench.run_interleaved(
            {"store": lambda: asyncio.run(store(followed)), "pooled": lambda: asyncio.run(pooled(followed))}
        )
    work, ours, theirs = "append, 500 asyncio tasks, with notifications", found["store"], found["pooled"]
    return [
        compare(work, "rate", ours, POOLED, theirs, at_least(8)),
        compare(f"{work}, p50", "p50", ours, POOLED, theirs),
        compare(f"{work}, p99", "p99", ours, POOLED, theirs, at_most(1)),
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
            pipe.send((bench.size.seconds, notifies))
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
    return [compare(work, "rate", found["notified"], "the same, without notifications", found["silent"], at_least(0.9))]
