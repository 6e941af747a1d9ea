"""Appends by one producer: single chunks, batches, and appends to a table with ten million chunks."""

from __future__ import annotations

import asyncio
from functools import partial

from aibind_postgres._sql import json_array

from .bench import Bench, with_peer
from .driver import async_prepared_append, cursor_append, prepared_append
from .import_cost import STATEMENTS, measure
from .loops import repeat, run_tasks, run_threads
from .measure import TOKEN, Figures, Row, at_least, at_most, compare
from .peers import NpmDesign, Redis, add_entry, pgbench
from .tables import TTL, Tables

BATCH = [TOKEN] * 1_000


def one_producer(bench: Bench) -> list[Row]:
    tables, seconds = bench.tables("one_producer"), bench.size.seconds
    with tables.store() as store:
        store.create("0")  # for pgbench

    def store_appends() -> Figures:
        with tables.store() as store:
            return run_threads([store.create()], seconds, store.append)

    async def async_store_appends() -> Figures:
        async with tables.async_store() as store:
            return await run_tasks([await store.create()], seconds, store.append)

    def prepared_appends() -> Figures:
        with tables.store() as store, tables.connect() as connection:
            stream = store.create()
            return run_threads([stream], seconds, prepared_append(connection, tables, stream))

    async def async_prepared_appends() -> Figures:
        async with tables.async_store() as store, await tables.async_connect() as connection:
            stream = await store.create()
            return await run_tasks([stream], seconds, async_prepared_append(connection, tables, stream))

    def cursor_appends() -> Figures:
        with tables.store() as store, tables.connect() as connection:
            return run_threads([store.create()], seconds, cursor_append(connection, tables))

    def redis_appends(server: Redis) -> Figures:
        with server.connect() as client:
            return run_threads(["one"], seconds, partial(add_entry, client))

    def npm_appends() -> Figures:
        statement = NpmDesign(tables).append
        with tables.store() as store, tables.pool() as pool:
            pool.wait()

            def append(stream: str, chunk: str) -> None:
                with pool.connection() as connection:
                    connection.execute(statement, [stream, chunk], prepare=False).fetchone()

            return run_threads([store.create()], seconds, append)

    found = bench.run_interleaved(
        {
            "store": store_appends,
            "prepared statement": prepared_appends,
            "asyncio store": lambda: asyncio.run(async_store_appends()),
            "asyncio prepared statement": lambda: asyncio.run(async_prepared_appends()),
            "pgbench": with_peer(bench.pgbench, lambda program: pgbench(program, tables, 1, seconds)),
            "raw cursor": cursor_appends,
            "Redis, always": with_peer(bench.redis["always"], redis_appends),
            "Redis, everysec": with_peer(bench.redis["everysec"], redis_appends),
            "npm": npm_appends,
        }
    )
    work, ours, async_ours = "append, one producer", found["store"], found["asyncio store"]
    prepared, async_prepared = found["prepared statement"], found["asyncio prepared statement"]
    driver, redis, processor = "prepared statement, psycopg's generators", "Redis XADD, appendfsync", "processor time"
    return [
        compare(work, "rate", ours, driver, prepared, at_least(0.9)),
        compare(f"{work}, {processor}", "processor", ours, driver, prepared),
        compare(f"{work}, asyncio", "rate", async_ours, driver, async_prepared, at_least(0.85)),
        compare(f"{work}, asyncio, {processor}", "processor", async_ours, driver, async_prepared),
        compare(work, "rate", ours, "the same statement, raw cursor", found["raw cursor"]),
        compare(work, "rate", ours, "pgbench, 1 client", found["pgbench"]),
        compare(f"{work}, asyncio", "rate", async_ours, "pgbench, 1 client", found["pgbench"]),
        compare(work, "rate", ours, f"{redis} always", found["Redis, always"], at_least(1.7)),
        compare(work, "rate", ours, f"{redis} everysec", found["Redis, everysec"]),
        compare(work, "rate", ours, "the npm package's statement", found["npm"]),
    ]


def batches(bench: Bench) -> list[Row]:
    tables = bench.tables("batches")
    write_repeatedly = partial(repeat, seconds=bench.size.seconds, units=len(BATCH), warm_up=20)

    def store_batches() -> Figures:
        with tables.store() as store:
            stream = store.create()
            return write_repeatedly(lambda: store.append_many(stream, BATCH))

    def raw_batches() -> Figures:
        statement, document = tables.sql.append_many, json_array(BATCH)
        with tables.store() as store, tables.connect() as connection:
            params, cursor = [store.create(), document, None, TTL], connection.cursor(binary=True)
            return write_repeatedly(lambda: cursor.execute(statement, params, prepare=True).fetchone())

    def copies() -> Figures:
        """Copy the rows as one text, and update the status in the same transaction."""
        update = f"""
            UPDATE {tables.status} SET total_chunks = total_chunks + $2 WHERE id = $1 AND state = 'active'
            RETURNING total_chunks"""
        with tables.store() as store, tables.connect() as connection:
            stream, cursor = store.create(), connection.cursor(binary=True)

            def write() -> None:
                with connection.transaction():
                    [[last]] = cursor.execute(update, [stream, len(BATCH)], prepare=True).fetchall()
                    with cursor.copy(f"COPY {tables.chunks} (id, seq, data) FROM STDIN") as copy:
                        numbered = enumerate(BATCH, last - len(BATCH) + 1)
                        copy.write("".join([f"{stream}\t{seq}\t{chunk}\n" for seq, chunk in numbered]))

            return write_repeatedly(write)

    def pipelines(server: Redis) -> Figures:
        with server.connect() as client:

            def write() -> None:
                pipeline = client.pipeline(transaction=False)
                for chunk in BATCH:
                    add_entry(pipeline, "batches", chunk)
                pipeline.execute()

            return write_repeatedly(write)

    found = bench.run_interleaved(
        {
            "store": store_batches,
            "raw statement": raw_batches,
            "COPY": copies,
            "Redis, always": with_peer(bench.redis["always"], pipelines),
        }
    )
    work, ours = "append_many, 1,000 chunks each", found["store"]
    return [
        compare(work, "rate", ours, "the same statement, raw cursor", found["raw statement"], at_least(0.95)),
        compare(work, "rate", ours, "COPY and the status, one transaction", found["COPY"]),
        compare(work, "rate", ours, "Redis XADD pipelined, always", found["Redis, always"]),
    ]


def ten_million(bench: Bench) -> list[Row]:
    """Append single chunks in turn to a table with ten million chunks and to an empty table."""
    stored = bench.size.stored
    full, empty = bench.tables("ten_million_full"), bench.tables("ten_million_empty")
    bench.step(f"storing {stored:,} chunks")
    fill(full, stored)
    with full.store() as full_store, empty.store() as empty_store:
        appends = {
            name: partial(store.append, store.create(), TOKEN)
            for name, store in (("full", full_store), ("empty", empty_store))
        }
        results = bench.alternate(appends)
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
        {name: partial(import_time, statement) for name, statement in STATEMENTS.items()}, rounds=3 * bench.size.rounds
    )
    ours, base = found["ours"].figures["p50"], found["base"].figures["p50"]
    extra = [total - psycopg for total, psycopg in zip(ours, base, strict=True)]
    return [Row("import, beyond psycopg and its pool", "ms", extra, target=at_most(15))]
