"""The cost of the columns and leases of migration 0004."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING

import psycopg

from .loops import repeat, run_threads
from .measure import Figures, Row, at_least, at_most, compare
from .processes import process
from .readers import transactions
from .tables import WITHOUT_0004, Tables

if TYPE_CHECKING:
    from .bench import Bench

STREAMS = 1_000  # with a live producer


def leases(bench: Bench) -> list[Row]:
    """Append and create with and without the columns, append with a lease, and count the renewals of idle producers."""
    with_0004, without_0004 = bench.tables("with_0004"), bench.tables("without_0004", WITHOUT_0004)
    seconds = bench.size.seconds

    def appends(tables: Tables) -> Figures:
        with tables.store() as store:
            return run_threads([store.create()], seconds, store.append)

    def leased_appends() -> Figures:
        with with_0004.store() as store:
            stream = store.create()
            with store.writer(stream):  # takes the lease, and keeps it until the end of the block
                return run_threads([stream], seconds, store.append)

    def creates(tables: Tables) -> Figures:
        with tables.store() as store:
            return repeat(store.create, seconds)

    found = bench.run_interleaved(
        {
            "appends": partial(appends, with_0004),
            "appends without 0004": partial(appends, without_0004),
            "leased appends": leased_appends,
            "creates": partial(creates, with_0004),
            "creates without 0004": partial(creates, without_0004),
        },
        rounds=2 * bench.size.rounds,
    )
    work, ours, without = "append, with migration 0004", found["appends"], "without migration 0004"
    return [
        compare(work, "rate", ours, without, found["appends without 0004"], at_least(0.97)),
        compare(f"{work}, with a lease", "rate", found["leased appends"], "without a lease", ours),
        compare(
            "create, with migration 0004",
            "rate",
            found["creates"],
            without,
            found["creates without 0004"],
            at_least(0.97),
        ),
        renewals(bench),
    ]


def renewals(bench: Bench) -> Row:
    """Count the transactions of a database in which producers only renew their leases."""
    tables = bench.database("renewals")
    rates = []
    with psycopg.connect(bench.dsn, autocommit=True) as admin, process(hold_leases, tables, STREAMS) as pipe:
        bench.step(f"waiting until {STREAMS:,} producers have settled")
        pipe.recv()
        time.sleep(bench.size.settle)
        for number in range(bench.size.long_rounds):
            bench.step(f"renewals, round {number + 1} of {bench.size.long_rounds}")
            before, start = transactions(admin, "renewals"), time.monotonic()
            time.sleep(1.5 * bench.size.settle)  # three renewals in a full run
            rates.append((transactions(admin, "renewals") - before) / (time.monotonic() - start))
    return Row(f"leases of {STREAMS:,} producers in one process", "statements/s", rates, target=at_most(2))


def hold_leases(pipe: Pipe, tables: Tables, count: int) -> None:
    """Child process: produce streams that yield nothing, until the parent closes the pipe."""

    async def run() -> None:
        async with tables.async_store() as store, AsyncExitStack() as stack:
            for _ in range(count):
                await stack.enter_async_context(store.writer(await store.create()))
            pipe.send("producing")
            with suppress(EOFError):
                await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    asyncio.run(run())
