"""The command `stats`: numbers of streams and conversations, and sizes of tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, get_args

import psycopg
import typer
from psycopg.rows import dict_row

from .._housekeeping import MARKER
from .._sql import NOW
from .._tables import Table
from ..models import StreamState
from .exporting import StreamTables
from .options import (
    ALL_TABLES,
    Json,
    examples,
    with_target,
)
from .table_columns import columns_of, in_statement, require_columns
from .target import Target, open_connection
from .text_output import align, printable

app = typer.Typer()

UNITS = ("B", "kB", "MB", "GB", "TB")
PERIODS = {"minute": "1 minute", "hour": "1 hour", "day": "1 day"}

# One scan of the status table, which is small. The chunks are not read.
STREAMS = """
SELECT state, count(*) AS streams, coalesce(sum(greatest(total_chunks, 0)), 0)::bigint AS chunks{columns}
  FROM {status} WHERE state <> 'deleted' AND id <> %s
 GROUP BY state ORDER BY state
"""
ARCHIVED = ", count(*) FILTER (WHERE archived_at > '-infinity') AS archived"
PERIOD = """,
       count(*) FILTER (WHERE {recent}) AS streams_{name},
       coalesce(sum(greatest(total_chunks, 0)) FILTER (WHERE {recent}), 0)::bigint AS chunks_{name}"""
RECENT = "created_at > statement_timestamp() - interval '{length}' AND created_at <= statement_timestamp()"
OLDEST = """
SELECT id, extract(epoch FROM clock_timestamp() - created_at)::float8 FROM {status}
 WHERE state = 'active' AND created_at > '-infinity' AND created_at < 'infinity'
 ORDER BY created_at LIMIT 1
"""
CONVERSATIONS = "SELECT count(*) FROM {conversations} WHERE session_id <> %s AND expires_at > {now}"
SIZES = """
SELECT coalesce(sum(pg_table_size(oid)), 0)::bigint, coalesce(sum(pg_indexes_size(oid)), 0)::bigint
  FROM (SELECT to_regclass(%(table)s)::oid UNION SELECT relid::oid FROM pg_partition_tree(to_regclass(%(table)s)))
       AS members (oid)
"""

# A store listens on a connection that does nothing else. Other roles' statements are hidden without pg_read_all_stats.
NOTIFICATIONS = """
SELECT count(*), pg_notification_queue_usage() FROM pg_stat_activity
 WHERE datname = current_database() AND query = %s
"""


@app.command(epilog=examples("stats", "stats --json | jq .streams.active.streams"))
@with_target(*ALL_TABLES)
def stats(target: Target, as_json: Json = False) -> None:
    """Print numbers of streams and chunks, and sizes of tables.

    Counts streams and their chunks by state, and those of streams created in the last minute, hour and day. Also prints
    the numbers of conversations and of listening stores. Reads the table of stream states once, and no chunks.
    """
    with open_connection(target) as connection:
        found = gather(connection, StreamTables.of(target))
        print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(describe(found)))


def gather(connection: psycopg.Connection, tables: StreamTables) -> dict[str, Any]:
    """Return the numbers as JSON values. A number is None if it needs a migration that is missing."""
    columns = require_columns(connection, tables.status)
    has_times = "created_at" in columns
    parts = [ARCHIVED] if "archived_at" in columns else []
    if has_times:
        parts += [PERIOD.format(name=name, recent=RECENT.format(length=PERIODS[name])) for name in PERIODS]
    status = in_statement(tables.status)
    with connection.cursor(row_factory=dict_row) as cursor:
        states = cursor.execute(STREAMS.format(status=status, columns="".join(parts)).encode(), [MARKER]).fetchall()
    oldest = connection.execute(OLDEST.format(status=tables.status.quoted).encode()).fetchone() if has_times else None

    def total(name: str) -> int:
        return sum(state[name] for state in states)

    return {
        "streams": {state: {"streams": 0, "chunks": 0} for state in get_args(StreamState)}
        | {row["state"]: {"streams": row["streams"], "chunks": row["chunks"]} for row in states},
        "total": {"streams": total("streams"), "chunks": total("chunks")},
        "archived_streams": total("archived") if "archived_at" in columns else None,
        "created_in_last": {
            name: {"streams": total(f"streams_{name}"), "chunks": total(f"chunks_{name}")} if has_times else None
            for name in PERIODS
        },
        "oldest_active_stream": None if oldest is None else {"id": oldest[0], "age": oldest[1]},
        "conversations": _count_conversations(connection, tables.conversations),
        "tables": {table.name: _size(connection, table) for table in (*tables, tables.chunks.archive)},
        "notifications": _notifications(connection, tables.status),
    }


def _count_conversations(connection: psycopg.Connection, table: Table) -> int | None:
    if not columns_of(connection, table):
        return None
    statement = CONVERSATIONS.format(conversations=in_statement(table), now=NOW)
    return int(_row(connection.execute(statement.encode(), [MARKER]))[0])


def _size(connection: psycopg.Connection, table: Table) -> dict[str, int]:
    data, indexes = _row(connection.execute(SIZES, {"table": table.quoted}))
    return {"table_bytes": data, "index_bytes": indexes}


def _notifications(connection: psycopg.Connection, status: Table) -> dict[str, Any]:
    listeners, usage = _row(connection.execute(NOTIFICATIONS, [f"LISTEN {Table(None, status.channel).quoted}"]))
    return {"listening_stores": listeners, "queue_usage": usage}


def _row(cursor: psycopg.Cursor[Any]) -> Sequence[Any]:
    row = cursor.fetchone()
    assert row is not None
    return list(row)


def describe(found: dict[str, Any]) -> Iterator[str]:
    """Yield the numbers as lines of text."""
    rows = [("STREAMS", "NUMBER", "CHUNKS")]
    rows += [(printable(state), *_numbers(row)) for state, row in found["streams"].items()]
    rows += [("total", *_numbers(found["total"]))]
    rows += [
        (f"of the last {name}", *_numbers(row)) for name, row in found["created_in_last"].items() if row is not None
    ]
    yield align(rows, [0, 0, 0])
    sizes = [("TABLE", "SIZE", "INDEXES")]
    sizes += [
        (printable(name), _bytes(row["table_bytes"]), _bytes(row["index_bytes"]))
        for name, row in found["tables"].items()
    ]
    yield align(sizes, [0, 0, 0])
    oldest = found["oldest_active_stream"]
    others = {
        "oldest active stream": None if oldest is None else f"{oldest['id']} ({timedelta(seconds=int(oldest['age']))})",
        "archived streams": found["archived_streams"],
        "conversations": found["conversations"],
        "listening stores": found["notifications"]["listening_stores"],
        "notification queue": f"{found['notifications']['queue_usage']:.0%} full",
    }
    lines = [(f"{name}:", "-" if value is None else printable(str(value))) for name, value in others.items()]
    yield align(lines, [0, 0]).rstrip()


def _numbers(row: dict[str, int]) -> tuple[str, str]:
    return str(row["streams"]), str(row["chunks"])


def _bytes(size: int) -> str:
    """Return a size with three digits and its unit."""
    power = min((len(str(size)) - 1) // 3, len(UNITS) - 1)
    return f"{size / 1000**power:.3g} {UNITS[power]}"
