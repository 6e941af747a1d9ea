"""Tables with and without hash partitions, measured in turns: `python -m benchmarks.partitions`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import psycopg
import typer
from rich.console import Console
from rich.table import Table as Grid

from aibind_postgres import PostgresStreamStore, StreamChunk, embedded, schema

from .tables import TTL, Tables

KINDS = (None, 8, 16, 64)  # numbers of partitions
CHUNKS = 100  # of each stream
LIVE = 100  # streams

# A fifth of the streams has expired.
FILL = """
INSERT INTO {0.status} (id, state, total_chunks, expires_at)
SELECT i::text, CASE WHEN i <= {live} THEN 'active' ELSE 'done' END, {chunks}, CASE WHEN i % 5 = 0 THEN 1 ELSE 9e15 END
  FROM generate_series(1, {streams}) AS i;
INSERT INTO {0.chunks} (id, seq, data) SELECT id, seq, 'token' FROM {0.status}, generate_series(1, {chunks}) AS seq
"""
LEAVES = """
SELECT oid::regclass::text, pg_indexes_size(oid) FROM pg_class
 WHERE relkind = 'r' AND (oid = $1::regclass OR oid IN (SELECT relid FROM pg_partition_tree($1::regclass)))
"""


def main(
    streams: Annotated[int, typer.Option(help="Stored streams of 100 chunks.", min=LIVE)] = 20_000,
    rounds: Annotated[int, typer.Option(help="Calls of each operation.", min=1)] = 300,
) -> None:
    """Compare tables with 0, 8, 16 and 64 partitions in one run, on the embedded server."""
    found: dict[str, dict[int | None, str]] = {}
    with embedded.server(version=18) as dsn, psycopg.connect(dsn, autocommit=True) as admin:
        tables = {kind: Tables(dsn, f"with_{kind or 0}") for kind in KINDS}
        for kind, own in tables.items():
            admin.execute(f"CREATE SCHEMA {own.schema}")
            schema.migrate(dsn, **own.names, conversations_table=own.conversations, partitions=kind)
            for statement in FILL.format(own, live=LIVE, chunks=CHUNKS, streams=streams).split(";"):
                admin.execute(statement.encode())
        admin.execute("VACUUM ANALYZE")
        _time_calls(found, tables, rounds)
        for kind, own in tables.items():
            _maintain(found, kind, own)
    grid = Grid("operation", *("no partitions" if kind is None else f"{kind}" for kind in KINDS))
    for name, values in found.items():
        grid.add_row(name, *(values[kind] for kind in KINDS))
    Console().print(grid)


def _time_calls(found: dict[str, dict[int | None, str]], tables: dict[int | None, Tables], rounds: int) -> None:
    live = json.dumps([str(number) for number in range(1, LIVE + 1)])
    items = json.dumps([{"id": str(number), "texts": ["token"]} for number in range(1, LIVE + 1)])
    seconds: dict[str, dict[int | None, list[float]]] = {}
    stores = {kind: own.store() for kind, own in tables.items()}
    connections = {kind: own.connect() for kind, own in tables.items()}
    ids = {kind: store.create() for kind, store in stores.items()}
    for _ in range(rounds):
        for kind, store in stores.items():
            sql, run = tables[kind].sql, connections[kind].execute
            calls: dict[str, Callable[[], Any]] = {
                "append": partial(store.append, ids[kind], "token"),
                "create": store.create,
                "read a stream": partial(_read, store, "199"),
                "append to 100 streams": partial(run, sql.append_batch, [items, TTL], prepare=True),
                "renew 100 leases": partial(run, sql.renew_leases, [live], prepare=True),
                "poll 100 streams": partial(run, sql.poll, [live], prepare=True),
                "list 100 streams": partial(run, sql.list, [None, "5", 100], prepare=True),
            }
            for name, call in calls.items():
                seconds.setdefault(name, {}).setdefault(kind, []).append(_time(call))
    for name, values in seconds.items():
        found[name] = {kind: f"{1000 * median(times):.2f} ms" for kind, times in values.items()}
    for store in stores.values():
        store.close()
    for connection in connections.values():
        connection.close()


def _maintain(found: dict[str, dict[int | None, str]], kind: int | None, tables: Tables) -> None:
    with tables.connect() as connection, tables.store() as store:
        leaves = connection.execute(LEAVES, [tables.chunks]).fetchall()
        found.setdefault("largest index of chunks", {})[kind] = f"{max(size for _, size in leaves) / 1e6:.0f} MB"
        found.setdefault("cleanup of a fifth", {})[kind] = f"{_time(store.cleanup):.2f} s"
        for name in ("VACUUM", "REINDEX TABLE"):
            times = [_time(partial(connection.execute, f"{name} {leaf}")) for leaf, _ in leaves]
            found.setdefault(f"{name}: all tables of chunks", {})[kind] = f"{sum(times):.2f} s"
            found.setdefault(f"{name}: longest of them", {})[kind] = f"{max(times):.2f} s"


def _read(store: PostgresStreamStore, id: str) -> list[StreamChunk]:
    return list(store.read_from(id, follow=False))


def _time(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
