"""`import`: check a file against the database, then write its rows in transactions of whole streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import psycopg

from ..errors import SchemaError
from .export_files import ExportFile
from .export_format import COLUMNS, KEYS, Counts, FileError, Kind, Record, is_common_time, records
from .exporting import StreamTables
from .progress import progress_bar
from .table_columns import in_statement, require_columns

CHECKED_RECORDS, CHECKED_BYTES = 500, 1_000_000  # by one statement, except for a larger record
SENT_BYTES = 1_000_000  # of lines, sent by one statement, except for a larger line
COMMITTED_CHUNKS, COMMITTED_RECORDS = 10_000, 1000  # by one transaction, except for a larger stream
REPORTED_LINES = 1000  # after which the progress bar moves
NAMED = 3  # ids in an error text

UNFINISHED_TEXT = "unfinished: it was still being written when it was exported"

# The server converts the lines itself, so it reports values that it cannot store, such as a number out of range.
CHECK_VALUES = "SELECT count(*) FROM jsonb_to_recordset(%s::jsonb) AS r ({definition})"
UTC = "SELECT set_config('timezone', 'UTC', true)"
FIND_STREAMS = "SELECT id, total_chunks, to_jsonb(created_at) #>> '{{}}' FROM {status} WHERE id = ANY (%s)"
FIND_CHUNKS = "SELECT id FROM {chunks} WHERE id = ANY (%s) LIMIT 1"
FIND_CONVERSATIONS = """
SELECT session_id, data, to_jsonb(created_at) #>> '{{}}' FROM {conversations} WHERE session_id = ANY (%s)
"""

# A stream that was active has no producer any more.
INSERT_STREAMS = """
INSERT INTO {status} ({columns})
SELECT {values} FROM jsonb_to_recordset(%s::jsonb) AS r ({definition})
"""
INSERT_CONVERSATIONS = """
INSERT INTO {conversations} ({columns}) SELECT {columns} FROM jsonb_to_recordset(%s::jsonb) AS r ({definition})
"""
COPY_CHUNKS = "COPY {chunks} (id, seq, data, created_at) FROM STDIN"

IMPORTED_VALUES = {
    "state": "CASE state WHEN 'active' THEN 'error' ELSE state END",
    "error": f"CASE state WHEN 'active' THEN '{UNFINISHED_TEXT}' ELSE error END",
}


class ExistingError(ValueError):
    """Streams or conversations of the file exist, so nothing was written."""


class ImportResult(NamedTuple):
    """The numbers of imported records, and of streams and conversations that existed already."""

    streams: int
    chunks: int
    conversations: int
    skipped: int


def import_file(
    connection: psycopg.Connection,
    tables: StreamTables,
    file: ExportFile,
    *,
    resume: bool,
    on_write: Callable[[], object],
) -> ImportResult:
    """Import a file, after checking all of it.

    Args:
        connection: A connection in autocommit mode.
        tables: The tables.
        file: The file.
        resume: Whether to skip streams with the same `created_at` and `total_chunks` as in the file, and conversations
            with the same `created_at` and text.
        on_write: Called once before the first row is written.

    Raises:
        FileError: A line is malformed; nothing was written.
        ExistingError: A stream or a conversation exists; nothing was written.
        SchemaError: A table or a column is missing; nothing was written.
    """
    statements = _Statements(connection, tables)
    with progress_bar("checking", file.size) as report:
        is_present = bytearray()
        for batch in _checked_batches(records(file.lines())):
            if batch[0].kind == "chunk":
                _check_values(connection, statements.check_values("chunk"), batch)
            else:
                is_present.extend(_find_present(connection, statements, batch, resume=resume))
            report(file.position)
    on_write()
    with progress_bar("importing", file.size) as report, ExitStack() as transaction:
        writer = _Writer(connection, statements, transaction)
        present = iter(is_present)
        skips = False
        for record in records(file.lines()):
            if record.kind != "chunk":
                skips = bool(next(present, True))
            if not skips:
                writer.add(record)
            if record.number % REPORTED_LINES == 0:
                report(file.position)
        writer.commit()
    return ImportResult(*writer.counts, skipped=sum(is_present))


class _Statements:
    def __init__(self, connection: psycopg.Connection, tables: StreamTables) -> None:
        self._connection = connection
        self._tables = {"chunk": tables.chunks, "stream": tables.status, "conversation": tables.conversations}
        self._types: dict[Kind, dict[str, str]] = {}
        self._require("stream")
        self._require("chunk")
        names = {
            "status": in_statement(tables.status),
            "chunks": in_statement(tables.chunks),
            "conversations": in_statement(tables.conversations),
        }
        self.find_streams = FIND_STREAMS.format_map(names).encode()
        self.find_chunks = FIND_CHUNKS.format_map(names).encode()
        self.find_conversations = FIND_CONVERSATIONS.format_map(names).encode()
        # Without parameters, so that psycopg leaves percent signs unchanged.
        self.copy_chunks = COPY_CHUNKS.format(chunks=tables.chunks.quoted).encode()
        self._names = names

    def check_values(self, kind: Kind) -> bytes:
        return CHECK_VALUES.format(definition=self._definition(kind)).encode()

    def insert(self, kind: Kind) -> bytes:
        columns = list(COLUMNS[kind])
        values = ", ".join(IMPORTED_VALUES.get(name, name) for name in columns)
        template = INSERT_STREAMS if kind == "stream" else INSERT_CONVERSATIONS
        return template.format(
            **self._names, columns=", ".join(columns), values=values, definition=self._definition(kind)
        ).encode()

    def _definition(self, kind: Kind) -> str:
        types = self._require(kind)
        return ", ".join(f"{name} {types[name]}" for name in COLUMNS[kind])

    def _require(self, kind: Kind) -> dict[str, str]:
        """Return the types of the columns. The conversations are needed only for a file that has some."""
        if kind not in self._types:
            table = self._tables[kind]
            types = require_columns(self._connection, table)
            if missing := [name for name in COLUMNS[kind] if name not in types]:
                raise SchemaError(
                    f"the table {table.quoted} has no column {missing[0]}: create it with `aibind-postgres migrate`"
                )
            self._types[kind] = types
        return self._types[kind]


def _checked_batches(found: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield the records that the server must check in lists of one kind, after all records between them were checked.

    Of the chunks, these are the ones with an unusual time.
    """
    batch: list[Record] = []
    size = 0
    for record in found:
        time = record.fields.get("created_at")
        if record.kind == "chunk" and (time is None or is_common_time(time)):
            continue
        if batch and (record.kind != batch[0].kind or len(batch) == CHECKED_RECORDS or size > CHECKED_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += len(record.text)
    if batch:
        yield batch


def _find_present(
    connection: psycopg.Connection, statements: _Statements, batch: list[Record], *, resume: bool
) -> list[bool]:
    """Return for each record whether it is in the database, as it is in the file.

    Raises:
        FileError: The server cannot store a record.
        ExistingError: A record exists, and `resume` is false or it differs.
    """
    kind = batch[0].kind
    with connection.transaction():
        connection.execute(UTC)
        _check_values(connection, statements.check_values(kind), batch)
        ids = [record.fields[KEYS[kind]] for record in batch]
        find = statements.find_streams if kind == "stream" else statements.find_conversations
        stored = {row[0]: row[1:] for row in connection.execute(find, [ids])}
        absent = [key for key in ids if key not in stored]
        left_over = connection.execute(statements.find_chunks, [absent]).fetchone() if kind == "stream" else None
    compared = "total_chunks" if kind == "stream" else "data"
    same = {
        key
        for key, record in zip(ids, batch, strict=True)
        if stored.get(key) == (record.fields[compared], record.fields.get("created_at"))
    }
    if refused := [key for key in ids if key in stored and not (resume and key in same)]:
        raise ExistingError(_existing_text(kind, refused, differ=resume, may_resume=same.issuperset(refused)))
    if left_over is not None:
        raise ExistingError(
            f"nothing was imported: there are chunks of the stream {left_over[0]!r}, which was deleted: "
            "run `aibind-postgres cleanup`, delete those that remain, and import again"
        )
    return [key in same for key in ids]


def _existing_text(kind: Kind, ids: list[str], *, differ: bool, may_resume: bool) -> str:
    named = ", ".join(map(repr, ids[:NAMED])) + (" and more" if len(ids) > NAMED else "")
    if differ:
        text = f"nothing was imported: these {kind}s exist and differ from those of the file: {named}"
    else:
        text = f"nothing was imported: these {kind}s exist: {named}"
    return f"{text}; --resume continues an interrupted import" if may_resume else text


def _check_values(connection: psycopg.Connection, statement: bytes, batch: list[Record]) -> None:
    try:
        with connection.transaction():
            connection.execute(statement, [_json_array(record.text for record in batch)])
    except psycopg.DataError as error:
        if len(batch) == 1:
            raise FileError(batch[0].number, f"PostgreSQL refuses it: {error.diag.message_primary}") from None
        for record in batch:
            _check_values(connection, statement, [record])
        raise


def _json_array(lines: Iterable[bytes]) -> str:
    return f"[{','.join(line.decode() for line in lines)}]"


class _Writer:
    """Writes records, and commits after a whole stream.

    Args:
        connection: The connection.
        statements: The statements.
        transaction: Gets the open transaction, which is rolled back if it is closed by an exception.
    """

    def __init__(self, connection: psycopg.Connection, statements: _Statements, transaction: ExitStack) -> None:
        self._connection = connection
        self._statements = statements
        self._transaction = transaction
        self._added: Counter[str] = Counter()
        self._added_now: Counter[str] = Counter()  # in the open transaction
        self._rows: dict[Kind, list[bytes]] = {"stream": [], "conversation": []}
        self._chunks: list[tuple[str, int, str, str | None]] = []
        self._bytes = 0
        self._is_open = False

    @property
    def counts(self) -> Counts:
        """The numbers of the committed records."""
        return Counts.of(self._added)

    def add(self, record: Record) -> None:
        """Write a record, at once or with later ones."""
        if record.kind == "chunk":
            fields = record.fields
            self._chunks.append((fields["id"], fields["seq"], fields["data"], fields.get("created_at")))
        else:
            chunks = self._added_now["chunk"]
            if chunks >= COMMITTED_CHUNKS or self._added_now.total() - chunks >= COMMITTED_RECORDS:
                self.commit()
            self._rows[record.kind].append(record.text)
        self._added_now[record.kind] += 1
        self._bytes += len(record.text)
        if self._bytes >= SENT_BYTES:
            self._send()

    def commit(self) -> None:
        """Write all records, durably."""
        self._send()
        self._transaction.pop_all().close()
        self._is_open = False
        self._added += self._added_now
        self._added_now.clear()

    def _send(self) -> None:
        if not self._is_open:
            self._transaction.enter_context(self._connection.transaction())
            self._is_open = True
        for kind, lines in self._rows.items():
            if lines:
                self._connection.execute(self._statements.insert(kind), [_json_array(lines)])
                lines.clear()
        if self._chunks:
            with self._connection.cursor().copy(self._statements.copy_chunks) as copy:
                for chunk in self._chunks:
                    copy.write_row(chunk)
            self._chunks.clear()
        self._bytes = 0
