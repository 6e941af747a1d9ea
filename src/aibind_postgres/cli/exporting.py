"""`export` and `conversations export`: write the rows of one snapshot as lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, TypeAlias

import psycopg
from psycopg.rows import dict_row

from .._archive import microseconds_of
from .._housekeeping import MARKER
from .._sql import NOW
from .._tables import Table, parse_distinct
from ..errors import SchemaError, StreamNotFoundError
from .export_format import COLUMNS, Counts, end_line, header_line, line_of, time_text
from .progress import is_shown, progress_bar
from .table_columns import columns_of, in_statement, require_columns
from .target import Target

BATCH_CHUNKS = 10_000  # read by one statement at most
FETCHED_STREAMS = 100  # status rows that one statement reads, since their metadata may be large

# As pg_dump does: limits that are meant for the statements of an application would end a long export, and a policy that
# hides rows is an error instead of a file without them.
SETTINGS = """
SELECT set_config('timezone', 'UTC', true), set_config('row_security', 'off', true),
       (SELECT count(set_config(name, '0', true)) FROM pg_settings WHERE name = ANY (%s))
"""
LIMITS = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"]

STREAMS = """
SELECT {columns} FROM {status}
 WHERE state <> 'deleted' AND id <> %(marker)s AND {condition}
 ORDER BY id COLLATE "C"
"""
COUNT = """
SELECT coalesce(sum(greatest(total_chunks, 0)), 0)::bigint FROM {status} WHERE state <> 'deleted' AND {condition}
"""

# The streams that `delete_owner` deletes, except those of other owners.
OF_OWNER = """
(owner = %(owner)s OR owner IS NULL AND session_id IN (SELECT session_id FROM {conversations} WHERE owner = %(owner)s))
"""

# Chunks and pages of the archive. A page precedes a chunk with its first number, which other software has stored again.
CHUNKS = """
COPY (
  SELECT * FROM (
    SELECT id, seq::bigint AS seq, NULL::bigint AS last_seq, data, {time}, NULL::text AS times
      FROM {chunks} WHERE id = ANY (%(ids)s::text[]) AND seq > %(after)s AND seq <= %(last)s
    {pages}
  ) AS parts
  ORDER BY id COLLATE "C", seq, last_seq
) TO STDOUT
"""
PAGES = """
    UNION ALL
    SELECT id, first_seq, last_seq, texts, NULL, times
      FROM {archive} WHERE id = ANY (%(ids)s::text[]) AND first_seq > %(after)s AND first_seq <= %(last)s
"""

CONVERSATIONS = """
COPY (
  SELECT {columns} FROM {conversations}
   WHERE session_id <> %(marker)s AND expires_at > {now} AND {condition}
   ORDER BY session_id COLLATE "C"
) TO STDOUT
"""

Write: TypeAlias = Callable[[bytes], object]
Stream: TypeAlias = dict[str, Any]  # the columns of a row of the status table


class Selection(NamedTuple):
    """The streams or conversations to export: the one with an id, those of an owner, or all."""

    id: str | None = None
    owner: str | None = None


class StreamTables(NamedTuple):
    """The tables of streams, and that of conversations, which may be missing."""

    chunks: Table
    status: Table
    conversations: Table

    @classmethod
    def of(cls, target: Target) -> StreamTables:
        """Return the tables of a command. Raise `ValueError` if a name is invalid or two are the same."""
        return cls(*parse_distinct(target.chunks_table, target.status_table, target.conversations_table))


class Chunk(NamedTuple):
    """A chunk as it is in a file."""

    id: str
    seq: int
    data: str
    created_at: str | None


def export_streams(
    connection: psycopg.Connection, tables: StreamTables, selection: Selection, write: Write, *, shows_progress: bool
) -> Counts:
    """Write the lines of streams, in the order of their ids.

    Args:
        connection: A connection in autocommit mode.
        tables: The tables.
        selection: The streams.
        write: Called with the bytes of each line.
        shows_progress: Whether to show a progress bar on a terminal.

    Raises:
        StreamNotFoundError: There is no stream with the id.
        SchemaError: A table is missing.
    """
    columns = require_columns(connection, tables.status)
    chunk_columns = require_columns(connection, tables.chunks)
    has_archive = bool(columns_of(connection, tables.chunks.archive))
    condition, uses_conversations = _condition(connection, tables, selection, columns)
    read = {
        "status": in_statement(tables.status),
        "columns": ", ".join(_expression(name, name in columns) for name in COLUMNS["stream"]),
        "condition": condition,
    }
    values = {"id": selection.id, "owner": selection.owner, "marker": MARKER}
    copy = CHUNKS.format(
        chunks=in_statement(tables.chunks),
        time=_expression("created_at", "created_at" in chunk_columns),
        pages=PAGES.format(archive=in_statement(tables.chunks.archive)) if has_archive else "",
    )
    locked = [tables.status, tables.chunks, *([tables.chunks.archive] if has_archive else [])]
    streams = written = 0
    with snapshot(connection, [*locked, *([tables.conversations] if uses_conversations else [])]):
        total = 0
        if shows_progress and is_shown():
            [total] = connection.execute(COUNT.format_map(read).encode(), values).fetchone() or [0]
        with (
            progress_bar("exporting", total, hidden=not shows_progress) as report,
            connection.cursor("aibind_export", row_factory=dict_row) as cursor,
        ):
            cursor.itersize = FETCHED_STREAMS
            cursor.execute(STREAMS.format_map(read).encode(), values)
            write(header_line())
            for batch in batches(cursor):
                # The COPY must end before the transaction, also if writing fails: it holds the lock of the connection.
                with closing(_read_chunks(connection, copy, batch)) as found:
                    for stream, chunks in zip(batch, split(batch, found), strict=True):
                        metadata = stream.pop("metadata")
                        write(line_of("stream", stream, metadata))
                        streams += 1
                        for chunk in chunks:
                            write(line_of("chunk", chunk._asdict()))
                            written += 1
                report(written)
            if selection.id is not None and not streams:
                raise StreamNotFoundError(selection.id)
            counts = Counts(streams=streams, chunks=written)
            write(end_line(counts))
    return counts


def export_conversations(connection: psycopg.Connection, table: Table, selection: Selection, write: Write) -> Counts:
    """Write the lines of conversations that have not expired, in the order of their ids.

    Args:
        connection: A connection in autocommit mode.
        table: The table.
        selection: The conversations.
        write: Called with the bytes of each line.

    Raises:
        SchemaError: The table is missing, or the column `owner` for a selection by owner.
    """
    columns = require_columns(connection, table)
    if selection.owner is not None:
        _require_owner(table, columns)
    names = list(COLUMNS["conversation"])
    statement = CONVERSATIONS.format(
        columns=", ".join(_expression(name, name in columns) for name in names),
        conversations=in_statement(table),
        now=NOW,
        condition="session_id = %(id)s"
        if selection.id is not None
        else "owner = %(owner)s"
        if selection.owner is not None
        else "true",
    )
    values = {"id": selection.id, "owner": selection.owner, "marker": MARKER}
    conversations = 0
    with snapshot(connection, [table]):
        write(header_line())
        with connection.cursor().copy(statement.encode(), values) as copy:
            copy.set_types(["int8" if kind is int else "text" for kind in COLUMNS["conversation"].values()])
            for row in copy.rows():
                conversation = dict(zip(names, row, strict=True))
                metadata = conversation.pop("metadata")
                write(line_of("conversation", conversation, metadata))
                conversations += 1
        counts = Counts(conversations=conversations)
        write(end_line(counts))
    return counts


@contextmanager
def snapshot(connection: psycopg.Connection, tables: Iterable[Table]) -> Iterator[None]:
    """Run a block in a transaction that reads one snapshot and writes nothing."""
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.read_only = True
    with connection.transaction():
        # Before the snapshot: a partition by time that is dropped meanwhile moves its rows to another partition.
        names = ", ".join(table.quoted for table in tables)
        connection.execute(f"LOCK TABLE {names} IN ACCESS SHARE MODE".encode())
        connection.execute(SETTINGS, [LIMITS])
        yield


def batches(streams: Iterable[Stream]) -> Iterator[list[Stream]]:
    """Yield lists of at most FETCHED_STREAMS streams with at most BATCH_CHUNKS chunks, or one larger stream."""
    batch: list[Stream] = []
    chunks = 0
    for stream in streams:
        if batch and (chunks + stream["total_chunks"] > BATCH_CHUNKS or len(batch) == FETCHED_STREAMS):
            yield batch
            batch, chunks = [], 0
        batch.append(stream)
        chunks += stream["total_chunks"]
    if batch:
        yield batch


def split(batch: list[Stream], chunks: Iterator[Chunk]) -> Iterator[Iterator[Chunk]]:
    """Yield an iterator over the chunks of each stream of a batch, which must be exhausted before the next one."""
    chunk = next(chunks, None)

    def of(stream: Stream) -> Iterator[Chunk]:
        nonlocal chunk
        last = 0
        while chunk is not None and chunk.id == stream["id"]:
            # A chunk may be in both tables. Chunks of a deleted stream with the same id may be left over.
            if last < chunk.seq <= stream["total_chunks"]:
                yield chunk
                last = chunk.seq
            chunk = next(chunks, None)

    for stream in batch:
        yield of(stream)


def _read_chunks(connection: psycopg.Connection, copy: str, batch: list[Stream]) -> Generator[Chunk, None, None]:
    ids = [stream["id"] for stream in batch]
    # A stream with more chunks is alone in its batch. Ranges bound what the server sorts.
    for after in range(0, max(stream["total_chunks"] for stream in batch), BATCH_CHUNKS):
        yield from _copy(connection, copy, ids, after)


def _copy(connection: psycopg.Connection, statement: str, ids: list[str], after: int) -> Iterator[Chunk]:
    params = {"ids": ids, "after": after, "last": after + BATCH_CHUNKS}
    with connection.cursor().copy(statement.encode(), params) as copy:
        copy.set_types(["text", "int8", "int8", "text", "text", "text"])
        for stream_id, seq, last_seq, data, created_at, times in copy.rows():
            if last_seq is None:
                yield Chunk(stream_id, seq, data, created_at)
            else:
                texts = json.loads(data)
                moments = microseconds_of(times, len(texts))
                for number, (text, moment) in enumerate(zip(texts, moments, strict=True), seq):
                    yield Chunk(stream_id, number, text, time_text(moment))


def _condition(
    connection: psycopg.Connection, tables: StreamTables, selection: Selection, columns: dict[str, str]
) -> tuple[str, bool]:
    """Return the condition on streams as SQL text, and whether it reads the table of conversations."""
    if selection.id is not None:
        return "id = %(id)s", False
    if selection.owner is None:
        return "true", False
    _require_owner(tables.status, columns)
    if "owner" not in columns_of(connection, tables.conversations):
        return "owner = %(owner)s", False
    return OF_OWNER.format(conversations=in_statement(tables.conversations)), True


def _require_owner(table: Table, columns: dict[str, str]) -> None:
    if "owner" not in columns:
        raise SchemaError(f"the table {table.quoted} has no column owner: create it with `aibind-postgres migrate`")


def _expression(name: str, exists: bool) -> str:
    """Return a column as SQL text, under its name. Times and JSON are text, in a form that is exact."""
    if not exists:
        return f"NULL::text AS {name}"
    if name in ("created_at", "updated_at"):
        return f"to_jsonb({name}) #>> '{{}}' AS {name}"
    if name == "metadata":
        return "metadata::text AS metadata"
    if name == "total_chunks":
        return "greatest(total_chunks, 0) AS total_chunks"
    return name
