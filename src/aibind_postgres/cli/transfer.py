"""The commands `export` and `import`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import psycopg
import typer

from .._conninfo import with_defaults
from .._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, parse_distinct
from .export_files import STANDARD_OUTPUT, ExportFile, new_file
from .exporting import Selection, StreamTables, export_streams
from .importing import import_file
from .options import ChunksTable, ConversationsTable, Embedded, Json, RequiredDsn, StatusTable, examples
from .standard_streams import print_message
from .target import Target, chosen_database

app = typer.Typer()

All = Annotated[bool, typer.Option("--all", help="Export all.")]
Owner = Annotated[str | None, typer.Option("--owner", metavar="O", help="Export those of an owner.")]
IdAndFile = Annotated[
    list[str],
    typer.Argument(
        metavar="[ID] FILE",
        help="The id, without --all and --owner. The file, such as x.jsonl or x.jsonl.gz, or - for standard output.",
        show_default=False,
    ),
]


@app.command(
    epilog=examples(
        "export 019ad3a0-5c51-7000-8000-0123456789ab answer.jsonl",
        "export --all streams.jsonl.gz",
        "export --owner ann ann.jsonl",
        "export --all - | jq 'select(.type == \"stream\") | .id'",
    )
)
def export(
    arguments: IdAndFile,
    every: All = False,
    owner: Owner = None,
    dsn: RequiredDsn = None,
    embedded: Embedded = False,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
    conversations_table: ConversationsTable = CONVERSATIONS_TABLE,
) -> None:
    """Export streams to a file of JSON lines: their states, texts and times, from one snapshot.

    The file appears when it is complete; until then it is FILE.partial. --owner also exports the streams without an
    owner that belong to conversations of this owner.
    """
    selection, file = parse_selection(arguments, every, owner)
    target = Target(dsn, chunks_table, status_table, conversations_table)
    with _connection(target, embedded) as connection:
        tables = StreamTables(*parse_distinct(chunks_table, status_table, conversations_table))
        with new_file(file) as output:
            counts = export_streams(connection, tables, selection, output.write, shows_progress=file != STANDARD_OUTPUT)
        if file != STANDARD_OUTPUT:
            print_message(f"{counts.streams} streams with {counts.chunks} chunks exported to {file}")


@app.command(
    "import", epilog=examples("import streams.jsonl.gz", "import streams.jsonl.gz --resume", "import ann.jsonl --json")
)
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file of `export`.", show_default=False)],
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Skip the streams that an interrupted import has written; refuse others."),
    ] = False,
    as_json: Json = False,
    dsn: RequiredDsn = None,
    embedded: Embedded = False,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
    conversations_table: ConversationsTable = CONVERSATIONS_TABLE,
) -> None:
    """Import a file of `export` or of `conversations export`, with its ids, numbers and times.

    Checks the whole file before it writes: nothing is written if a line is malformed or an id exists. Each transaction
    has whole streams. A stream that was active when it was exported ends in an error, since nobody writes it.
    """
    target = Target(dsn, chunks_table, status_table, conversations_table)
    with _connection(target, embedded) as connection, ExportFile(file) as source:
        tables = StreamTables(*parse_distinct(chunks_table, status_table, conversations_table))
        has_begun = False

        def begin() -> None:
            nonlocal has_begun
            has_begun = True

        try:
            result = import_file(connection, tables, source, resume=resume, on_write=begin)
        except BaseException:
            if has_begun:
                print_message("the import was interrupted: repeat the command with --resume")
            raise
        if as_json:
            print(json.dumps(result._asdict()))
        else:
            skipped = f"; {result.skipped} were there before" if resume else ""
            print_message(
                f"{result.streams} streams with {result.chunks} chunks and {result.conversations} conversations "
                f"imported{skipped}"
            )


def parse_selection(arguments: list[str], every: bool, owner: str | None) -> tuple[Selection, str]:
    """Return the selection and the file. Raise `typer.BadParameter` unless there is one of ID, --all and --owner."""
    *ids, file = arguments
    if len(ids) + every + (owner is not None) != 1:
        raise typer.BadParameter("give a FILE and one of ID, --all and --owner")
    if owner == "":  # as of an unset variable
        raise typer.BadParameter("--owner must not be empty")
    return Selection(ids[0] if ids else None, owner), file


@contextmanager
def _connection(target: Target, embedded: bool) -> Iterator[psycopg.Connection]:
    with chosen_database(target, use_embedded=embedded) as dsn, open_connection(dsn) as connection:
        yield connection


def open_connection(dsn: str) -> psycopg.Connection:
    """Return a connection as a store opens its own."""
    return psycopg.connect(with_defaults(dsn), autocommit=True, prepare_threshold=None)
