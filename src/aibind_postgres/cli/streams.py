"""The commands that write, read, list, end and delete streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Annotated

import typer

from .._sync.stream_store import PostgresStreamStore
from .._tables import CHUNKS_TABLE, STATUS_TABLE
from . import reading, writing
from .options import After, ChunksTable, Dsn, Embedded, Events, Id, Raw, RequiredDsn, StatusTable
from .target import Target, chosen_database, database

app = typer.Typer()


class By(str, Enum):
    """Units of input that `write` stores as one chunk."""

    CHAR = "char"
    WORD = "word"
    LINE = "line"


@app.command()
def write(
    id: Id,
    by: Annotated[By, typer.Option("--by", help="Unit that is stored as one chunk.")] = By.LINE,
    delay: Annotated[float, typer.Option("--delay", metavar="SECONDS", min=0, help="Pause after each chunk.")] = 0.0,
    dsn: Dsn = None,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
) -> None:
    """Store standard input (UTF-8 text) as a new stream, as it arrives.

    The end of the input completes the stream. Ctrl-C stops it. Input that is not text ends it in an error. A chunk that
    contains U+0001 is stored with another U+0001 before it, so that it is read as text and not as a named event.
    """
    with _open_store(Target(dsn, chunks_table, status_table)) as store:
        raise typer.Exit(writing.write(store, id, by.value, delay))


@app.command()
def tail(
    id: Id,
    after: After = 0,
    raw: Raw = False,
    events: Events = False,
    dsn: Dsn = None,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
) -> None:
    """Print the text of a stream, without its named events, and follow it until it ends."""
    output_format = _output_format(raw, events)
    target = Target(dsn, chunks_table, status_table)
    with _open_store(target) as store:
        raise typer.Exit(reading.tail(store, id, after, output_format, target))


@app.command()
def replay(
    id: Id,
    speed: Annotated[
        float | None,
        typer.Option("--speed", metavar="N", help="Speed factor, 1 by default: 2 is twice as fast as written."),
    ] = None,
    instant: Annotated[bool, typer.Option("--instant", help="Print without pauses.")] = False,
    after: After = 0,
    raw: Raw = False,
    events: Events = False,
    dsn: Dsn = None,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
) -> None:
    """Print the stored text of a stream, without its named events, at the pace at which it was written."""
    output_format = _output_format(raw, events)
    if instant and speed is not None:
        raise typer.BadParameter("give --speed or --instant, not both")
    if speed is not None and not speed > 0:
        raise typer.BadParameter(f"--speed must be above zero, not {speed:g}")
    with _open_store(Target(dsn, chunks_table, status_table)) as store:
        raise typer.Exit(reading.replay(store, id, after, output_format, None if instant else speed or 1.0))


@app.command()
def status(
    id: Id,
    dsn: RequiredDsn = None,
    embedded: Embedded = False,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
) -> None:
    """Print the state of a stream. The exit code is 1 if it was stopped or ended in an error."""
    target = Target(dsn, chunks_table, status_table)
    with _open_store(target, chosen_database(target, use_embedded=embedded)) as store:
        raise typer.Exit(reading.status(store, id))


def _output_format(raw: bool, events: bool) -> reading.OutputFormat:
    if raw and events:
        raise typer.BadParameter("give --raw or --events, not both")
    return "raw" if raw else "events" if events else "text"


@contextmanager
def _open_store(target: Target, chosen: AbstractContextManager[str] | None = None) -> Iterator[PostgresStreamStore]:
    with (
        chosen or database(target) as url,
        PostgresStreamStore(url, chunks_table=target.chunks_table, status_table=target.status_table) as store,
    ):
        yield store
