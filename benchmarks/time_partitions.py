"""The deletion of a day of expired streams, by dropping its partition or by rows, while writers append."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from aibind_postgres import PostgresStreamStore, schema
from aibind_postgres._sync.time_partitions import TimePartitions
from aibind_postgres._tables import Table
from aibind_postgres._time_partition_sql import create_statement
from aibind_postgres._time_partitions import bound

from .measure import TOKEN, Figures, Row, at_most, compare, quantile
from .tables import Tables

if TYPE_CHECKING:
    from .bench import Bench

LENGTH = 1_000  # chunks of each stream
KEPT = 10  # of the streams
KEPT_LENGTH = 100  # chunks of each stream that is kept
MONTH = 32  # days that have partitions
WRITERS, PAUSE = 4, 0.02  # 200 appends per second at most

FILL = """
INSERT INTO {status} (id, state, total_chunks, expires_at)
SELECT '{prefix}-{state}-' || i, '{state}', {length}, 1 FROM generate_series(1, {streams}) AS i;
INSERT INTO {chunks} (id, seq, data)
SELECT '{prefix}-{state}-' || i, seq, '{token}'
  FROM generate_series(1, {streams}) AS i, generate_series(1, {length}) AS seq
"""
SIZE = """
SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class
 WHERE relkind = 'r' AND relnamespace = $1::text::regnamespace
"""


def time_partitions(bench: Bench) -> list[Row]:
    """Delete a million expired chunks of the day before yesterday, but not those of active streams of that day."""
    rows, day = bench.tables("by_rows"), Tables(bench.dsn, "by_day")
    with psycopg.connect(bench.dsn, autocommit=True) as admin:
        admin.execute(f"CREATE SCHEMA {day.schema}")
    schema.migrate(bench.dsn, **day.names, conversations_table=day.conversations, partitions="time")
    found = bench.run_interleaved(
        {"drop": partial(measure, bench, day, drop), "rows": partial(measure, bench, rows, clean_up)},
        bench.size.long_rounds,
    )
    dropped, deleted = found["drop"].figures, found["rows"].figures
    for number in range(MONTH):
        create_day(day, number)
    with day.store() as store, rows.store() as plain:
        appends = bench.alternate(
            {
                "partitions": partial(store.append, store.create(), TOKEN),
                "plain": partial(plain.append, plain.create(), TOKEN),
            }
        )
    work, peer = f"{bench.size.memory:,} expired chunks", "cleanup by rows"
    return [
        Row(f"drop a day of {work}", "ms", dropped["milliseconds"], peer, deleted["milliseconds"]),
        Row(f"drop a day of {work}", "ms", dropped["milliseconds"], target=at_most(200)),
        Row(f"WAL of {work}", "MB", dropped["wal"], peer, deleted["wal"]),
        Row(f"WAL of {work}", "MB", dropped["wal"], target=at_most(1)),
        Row(f"space after {work}", "MB", dropped["space"], peer, deleted["space"]),
        Row(f"longest append beside {work}", "ms", dropped["longest"], peer, deleted["longest"]),
        Row(f"longest append beside {work}", "ms", dropped["longest"], target=at_most(50)),
        Row(f"median append beside {work}", "ms", dropped["p50"], peer, deleted["p50"]),
        compare(
            "append, partitions of a month, p50", "p50", appends["partitions"], "without partitions", appends["plain"]
        ),
    ]


def measure(bench: Bench, tables: Tables, delete: Callable[[PostgresStreamStore], object]) -> Figures:
    """Fill the tables, delete the expired streams, and measure the time, WAL, space, and the appends beside it."""
    day = days_ago(2)
    if delete is drop:
        create_day(tables, 2)
    with tables.connect() as admin, tables.store() as store:
        for state, streams, length in (
            ("done", bench.size.memory // LENGTH, LENGTH),
            ("active", KEPT, KEPT_LENGTH),
        ):
            names = {"status": tables.status, "chunks": tables.chunks, "prefix": bound(day), "token": TOKEN}
            for statement in FILL.format(**names, state=state, streams=streams, length=length).split(";"):
                admin.execute(statement)
        # As autovacuum would have done long before, which otherwise begins in the middle of some of the rounds.
        for table in (tables.status, tables.chunks):
            admin.execute(f"VACUUM ANALYZE {table}")
        with writers(tables) as durations:
            time.sleep(0.5)
            durations.clear()
            before, start = wal(admin), time.perf_counter()
            delete(store)
            seconds = time.perf_counter() - start
            written = wal(admin) - before
            time.sleep(0.1)
        [(space,)] = admin.execute(SIZE, [tables.schema]).fetchall()
        figures = {
            "milliseconds": seconds * 1e3,
            "wal": written / 1e6,
            "space": space / 1e6,
            "longest": max(durations) * 1e3,
            "p50": quantile(durations, 0.5) * 1e3,
        }
        for table in (tables.status, tables.chunks):
            admin.execute(f"TRUNCATE {table} CASCADE")
    return figures


def days_ago(number: int) -> date:
    return (datetime.now(timezone.utc) - timedelta(days=number)).date()


def create_day(tables: Tables, number: int) -> None:
    """Create the partitions of a day in the past."""
    status, chunks = (Table.parse(name) for name in (tables.status, tables.chunks))
    with tables.connect() as admin:
        admin.execute(create_statement([status, chunks, chunks.archive], days_ago(number)))


def drop(store: PostgresStreamStore) -> None:
    """Drop the partitions, as the housekeeper does in its turn."""
    partitions = TimePartitions(store._database, store._schema, store._deleter, store._tables)
    dropped = sum(counts.get("partitions dropped", 0) for counts in partitions.partition_steps())
    if dropped != 1:
        raise RuntimeError("the partition was not dropped: other statements held its tables")


def clean_up(store: PostgresStreamStore) -> None:
    store.cleanup()


def wal(admin: psycopg.Connection[tuple[int]]) -> int:
    """Return the position in the write-ahead log in bytes."""
    [(position,)] = admin.execute("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint").fetchall()
    return int(position)


@contextmanager
def writers(tables: Tables) -> Iterator[list[float]]:
    """Let threads append to streams of today. Yield the durations of their appends."""
    durations: list[float] = []
    ended = threading.Event()

    def write() -> None:
        with tables.store() as store:
            stream = store.create()
            while not ended.wait(PAUSE):
                start = time.perf_counter()
                store.append(stream, TOKEN)
                durations.append(time.perf_counter() - start)

    threads = [threading.Thread(target=write) for _ in range(WRITERS)]
    for thread in threads:
        thread.start()
    try:
        yield durations
    finally:
        ended.set()
        for thread in threads:
            thread.join()
