"""The cost of the columns and leases of migration 0004."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING

import psycopg

from .measure import TOKEN, Row, at_most, compare
from .processes import process
from .readers import transactions
from .tables import WITHOUT_0004, Tables

if TYPE_CHECKING:
    from .bench import Bench

STREAMS = 1_000  # with a live producer
MOST = 1.03  # the ratio of times: 0.97 of the rate


def leases(bench: Bench) -> list[Row]:
    """Append and create with and without the columns, append with a lease, and count the renewals of idle producers."""
    with_0004, without_0004 = bench.tables("with_0004"), bench.tables("without_0004", WITHOUT_0004)
    with with_0004.store() as store, without_0004.store() as older, ExitStack() as stack:
        leased = store.create()
        stack.enter_context(store.writer(leased))  # takes the lease, and keeps it
        found = bench.alternate(
            {
                "append": partial(store.append, store.create(), TOKEN),
                "append without 0004": partial(older.append, older.create(), TOKEN),
                "leased append": partial(store.append, leased, TOKEN),
                "create": store.create,
                "create without 0004": older.create,
            }
        )
    ours, new, peer = found["append"], found["create"], "without migration 0004"
    return [
        compare("append, with migration 0004, p50", "p50", ours, peer, found["append without 0004"], at_most(MOST)),
        compare("append, with a lease, p50", "p50", found["leased append"], "without a lease", ours),
        compare("create, with migration 0004, p50", "p50", new, peer, found["create without 0004"], at_most(MOST)),
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
