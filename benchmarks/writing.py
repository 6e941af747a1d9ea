"""Appends by one producer: single chunks, batches, and appends to a table with ten million chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from aibind_postgres._sql import json_array

from .bench import Bench, with_peer
from .concurrent_appends import run_tasks, run_threads
from .import_cost import STATEMENTS, measure
from .measure import TOKEN, Figures, Results, Row, at_least, at_most, compare, latencies
from .peers import NpmDesign, Redis, add_entry, pgbench
from .tables import TTL, Tables

BATCH = [TOKEN] * 1_000


def one_producer(bench: Bench) -> list[Row]:
    tables = bench.tables("one_producer")
    with tables.store() as store:
        store.create("0")  # for pgbench

    def store_appends() -> Figures:
        with tables.store() as store:
            return run_threads([store.create()], bench.seconds, store.append)

    async def async_store_appends() -> Figures:
        async with tables.async_store() as store:
            return await run_tasks([await store.create()], bench.seconds, store.append)

    def raw_appends() -> Figures:
        statement = tables.sql.append
        with tables.store() as store, tables.connect() as connection:

            def append(stream: str, chunk: str) -> None:
                connection.execute(statement, [stream, chunk, None, TTL], binary=True).fetchone()

            return run_threads([store.create()], bench.seconds, append)

    def redis_appends(server: Redis) -> Figures:
        with server.connect() as client:
            return run_threads(["one"], bench.seconds, partial(add_entry, client))

    def npm_appends() -> Figures:
        statement = NpmDesign(tables).append
        with tables.store() as store, tables.pool() as pool:
            pool.wait()

            def append(stream: str, chunk: str) -> None:
                with pool.connection() as connection:
                    connection.execute(statement, [stream, chunk], prepare=False).fetchone()

            return run_threads([store.create()], bench.seconds, append)

    found = bench.run_interleaved(
        {
            "store": store_appends,
            "asyncio store": lambda: asyncio.run(async_store_appends()),
            "pgbench": with_peer(bench.pgbench, lambda program: pgbench(program, tables, 1, bench.seconds)),
            "raw statement": raw_appends,
            "Redis, always": with_peer(bench.redis["always"], redis_appends),
            "Redis, everysec": with_peer(bench.redis["everysec"], redis_appends),
            "npm": npm_appends,
        }
    )
    work, ours, redis = "append, one producer", found["store"], "Redis XADD, appendfsync"
    server = "pgbench, 1 client"
    return [
        compare(work, "rate", ours, server, found["pgbench"], at_least(0.75)),
        compare(f"{work}, asyncio", "rate", found["asyncio store"], server, found["pgbench"], at_least(0.45)),
        compare(work, "rate", ours, "the store's statement, raw psycopg", found["raw statement"]),
        compare(work, "rate", ours, f"{redis} always", found["Redis, always"], at_least(1.7)),
        compare(work, "rate", ours, f"{redis} everysec", found["Redis, everysec"]),
        compare(work, "rate", ours, "the npm package's statement", found["npm"]),
    ]


def batches(bench: Bench) -> list[Row]:
    tables = bench.tables("batches")

    def repeat(write: Callable[[], object]) -> Figures:
        """Write batches for some seconds. Return the chunks per second."""
        for _ in range(6):  # until the statement is prepared
            write()
        written = 0
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < bench.seconds:
            write()
            written += len(BATCH)
        return {"rate": written / elapsed}

    def store_batches() -> Figures:
        with tables.store() as store:
            stream = store.create()
            return repeat(lambda: store.append_many(stream, BATCH))

    def raw_batches() -> Figures:
        statement, document = tables.sql.append_many, json_array(BATCH)
        with tables.store() as store, tables.connect() as connection:
            params = [store.create(), document, None, TTL]
            return repeat(lambda: connection.execute(statement, params, binary=True).fetchone())

    def pipelines(server: Redis) -> Figures:
        with server.connect() as client:

            def write() -> None:
                pipeline = client.pipeline(transaction=False)
                for chunk in BATCH:
                    add_entry(pipeline, "batches", chunk)
                pipeline.execute()

            return repeat(write)

    found = bench.run_interleaved(
        {
            "store": store_batches,
            "raw statement": raw_batches,
            "Redis, always": with_peer(bench.redis["always"], pipelines),
        }
    )
    work, ours = "append_many, 1,000 chunks each", found["store"]
    return [
        compare(work, "rate", ours, "the store's statement, raw psycopg", found["raw statement"], at_least(0.9)),
        compare(work, "rate", ours, "Redis XADD pipelined, always", found["Redis, always"], at_least(4)),
    ]


def ten_million(bench: Bench) -> list[Row]:
    """Append single chunks in turn to a table with ten million chunks and to an empty table."""
    stored = 1_000_000 if bench.quick else 10_000_000
    full, empty = bench.tables("ten_million_full"), bench.tables("ten_million_empty")
    bench.step(f"storing {stored:,} chunks")
    fill(full, stored)
    with full.store() as full_store, empty.store() as empty_store:
        appends = {"full": full_store.append, "empty": empty_store.append}
        streams = {"full": full_store.create(), "empty": empty_store.create()}

        def alternate(appends_each: int) -> dict[str, Figures]:
            durations: dict[str, list[float]] = {"full": [], "empty": []}
            for _ in range(appends_each):
                for name, append in appends.items():
                    before = time.perf_counter()
                    append(streams[name], TOKEN)
                    durations[name].append(time.perf_counter() - before)
            return {name: latencies(values) for name, values in durations.items()}

        alternate(100)
        results = {"full": Results(), "empty": Results()}
        for number in range(bench.rounds):
            bench.step(f"round {number + 1} of {bench.rounds}")
            for name, figures in alternate(300 if bench.quick else 1_000).items():
                results[name].add(figures)
    work = f"append, {stored:,} chunks stored, p50"
    return [compare(work, "p50", results["full"], "empty tables", results["empty"], at_most(1.3))]


def fill(tables: Tables, stored: int) -> None:
    """Store `stored` chunks in ended streams of 1,000 chunks each."""
    chunks, status = tables.chunks, tables.status
    with tables.connect() as admin:
        # Building the index at the end is several times faster. All changes are written to the WAL.
        admin.execute(f"ALTER TABLE {chunks} DROP CONSTRAINT chunks_pkey")
        admin.execute(
            f"""
            INSERT INTO {status} (id, state, total_chunks, expires_at)
            SELECT 'old-' || n, 'done', 1000, 0 FROM generate_series(0, {stored // 1_000 - 1}) AS n"""
        )
        admin.execute(
            f"""
            INSERT INTO {chunks} (id, seq, data)
            SELECT 'old-' || n / 1000, n % 1000 + 1, '{TOKEN}' FROM generate_series(0, {stored - 1}) AS n"""
        )
        admin.execute("SET maintenance_work_mem = '512MB'")
        admin.execute(f"ALTER TABLE {chunks} ADD PRIMARY KEY (id, seq)")
        # Otherwise the server would do this in the background during a round.
        admin.execute(f"VACUUM (ANALYZE) {chunks}, {status}")
        admin.execute("CHECKPOINT")


def import_time(statement: str) -> Figures:
    return {"p50": measure(statement)}


def import_benchmark(bench: Bench) -> list[Row]:
    for statement in STATEMENTS.values():  # warms the file cache and writes bytecode
        measure(statement)
    found = bench.run_interleaved(
        {name: partial(import_time, statement) for name, statement in STATEMENTS.items()}, rounds=3 * bench.rounds
    )
    ours, base = found["ours"].figures["p50"], found["base"].figures["p50"]
    extra = [total - psycopg for total, psycopg in zip(ours, base, strict=True)]
    return [Row("import, beyond psycopg and its pool", "ms", extra, target=at_most(30))]
