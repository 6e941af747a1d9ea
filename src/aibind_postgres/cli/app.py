"""The commands with their options and exit codes."""

from __future__ import annotations

import atexit
import io
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import Enum
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from .. import schema
from .._partitions import MAX_PARTITIONS
from .._sync.stream_store import PostgresStreamStore
from .._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE
from . import demo as demonstration
from . import doctor as diagnosis
from . import reading, writing
from . import web_demo as web_demonstration
from .target import FAILED, Target, chosen_database, database, demo_database, report_errors

Id = Annotated[str, typer.Argument(metavar="ID", help="The stream's id.", show_default=False)]
Dsn = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        metavar="URL",
        help="Connection string. Default: $DATABASE_URL, or else an embedded PostgreSQL in the user's data folder.",
        show_default=False,
    ),
]
DemoDsn = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        metavar="URL",
        help="Connection string. Default: an embedded PostgreSQL, in the user's data folder with --web, else in a "
        "temporary one; $DATABASE_URL is ignored.",
        show_default=False,
    ),
]
ChunksTable = Annotated[str, typer.Option("--chunks-table", metavar="NAME", help="Table of the chunks.")]
StatusTable = Annotated[str, typer.Option("--status-table", metavar="NAME", help="Table of the stream states.")]
ConversationsTable = Annotated[
    str, typer.Option("--conversations-table", metavar="NAME", help="Table of the conversations.")
]
RequiredDsn = Annotated[
    str | None,
    typer.Option("--dsn", metavar="URL", help="Connection string. Default: $DATABASE_URL.", show_default=False),
]
Embedded = Annotated[bool, typer.Option("--embedded", help="Use an embedded PostgreSQL in the user's data folder.")]
NotifyTrigger = Annotated[
    bool,
    typer.Option(
        "--notify-trigger",
        help="Add a trigger that notifies readers of appends by writers that do not notify, such as the TypeScript "
        "package.",
    ),
]


def _parse_partitions(value: str) -> int | Literal["time"]:
    if value == "time":
        return "time"
    if not value.isdecimal():
        raise typer.BadParameter(f"{value!r} is neither a number nor 'time'")
    return int(value)


Partitions = Annotated[
    Any,
    typer.Option(
        "--partitions",
        metavar="N|time",
        parser=_parse_partitions,
        help=f"Number of partitions by hash, from 1 to {MAX_PARTITIONS}, of new tables of chunks and of stream states; "
        "or 'time' for partitions by the day of the id. Default: none. Existing tables keep theirs.",
        show_default=False,
    ),
]
Citus = Annotated[
    bool,
    typer.Option("--citus", help="Distribute the tables over the workers of Citus. The URL is of its coordinator."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Print the stored chunks unchanged, with the names of events.")]
Events = Annotated[
    bool,
    typer.Option("--events", help="Print each chunk as a line of JSON: seq, event ('message' for text) and data."),
]
After = Annotated[int, typer.Option("--after", metavar="N", min=0, help="Start after chunk number N.")]

app = typer.Typer(
    name="aibind-postgres",
    help="Durable, resumable text streams in PostgreSQL.",
    epilog="Exit codes: 0 success; 1 the stream was stopped or ended in an error, or the command failed; "
    "2 wrong usage; 3 stream not found; 130 interrupted by Ctrl-C.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Framework(str, Enum):
    """Web frameworks that `demo --web` supports."""

    FASTAPI = "fastapi"
    FLASK = "flask"
    DJANGO = "django"


class By(str, Enum):
    """Units of input that `write` stores as one chunk."""

    CHAR = "char"
    WORD = "word"
    LINE = "line"


def run() -> None:
    """Run the command and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for messages; stored text is written as bytes
    # psycopg_pool logs every failed attempt. The command reports an unreachable server once.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    # Exit by an exception, so that the embedded server is stopped and a stream in progress is ended.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _exit_on_signal)
    try:
        app(prog_name="aibind-postgres")
    except KeyboardInterrupt:
        sys.exit(130)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"aibind-postgres {version('aibind-postgres')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Durable, resumable text streams in PostgreSQL."""


@app.command()
def demo(
    web: Annotated[bool, typer.Option("--web", help="Serve a chat page instead, until Ctrl-C.")] = False,
    host: Annotated[str, typer.Option("--host", metavar="H", help="Address on which the chat listens.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port of the chat; 0 selects a free one.")
    ] = 8000,
    framework: Annotated[Framework, typer.Option("--framework", help="Web framework of the chat.")] = Framework.FASTAPI,
    dsn: DemoDsn = None,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
) -> None:
    """Run a demonstration: a second reader resumes a stream after the first one was killed.

    With --web: serve a chat. Its page can be reloaded, closed or opened twice while an answer is written.

    Uses an embedded PostgreSQL, unless --dsn is given. With --web, its data are kept for the next start.
    """
    target = Target(dsn, chunks_table, status_table)
    if web and target != Target(dsn):
        raise typer.BadParameter("--web uses the default table names: omit --chunks-table and --status-table")
    if web:
        stack = ExitStack()
        atexit.register(stack.close)  # registered first, so that it runs after the exit handlers of the chat
        with report_errors():
            dsn = stack.enter_context(demo_database(target, keep=True))
            web_demonstration.serve(dsn, framework.value, host, port)
    else:
        with demo_database(target, keep=False) as url:
            raise typer.Exit(0 if demonstration.run(url, target) else 1)


@app.command("schema")
def print_schema(
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
    conversations_table: ConversationsTable = CONVERSATIONS_TABLE,
    notify_trigger: NotifyTrigger = False,
    partitions: Partitions = None,
    citus: Citus = False,
) -> None:
    """Print the SQL that creates or upgrades the tables."""
    with report_errors():
        sql = schema.render(
            chunks_table=chunks_table,
            status_table=status_table,
            conversations_table=conversations_table,
            notify_trigger=notify_trigger,
            partitions=partitions,
            citus=citus,
        )
        sys.stdout.buffer.write(sql.encode())
        sys.stdout.flush()


@app.command()
def migrate(
    dsn: RequiredDsn = None,
    embedded: Embedded = False,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
    conversations_table: ConversationsTable = CONVERSATIONS_TABLE,
    notify_trigger: NotifyTrigger = False,
    partitions: Partitions = None,
    citus: Citus = False,
) -> None:
    """Create or upgrade the tables. Does nothing if they are up to date."""
    with chosen_database(Target(dsn, chunks_table, status_table), use_embedded=embedded) as url:
        schema.migrate(
            url,
            chunks_table=chunks_table,
            status_table=status_table,
            conversations_table=conversations_table,
            notify_trigger=notify_trigger,
            partitions=partitions,
            citus=citus,
        )
        trigger = ", and the notify trigger," if notify_trigger else ""
        print(f"The tables {chunks_table}, {status_table} and {conversations_table}{trigger} are up to date.")


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


@app.command()
def doctor(
    dsn: RequiredDsn = None,
    embedded: Embedded = False,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
    conversations_table: ConversationsTable = CONVERSATIONS_TABLE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as a JSON document.")] = False,
) -> None:
    """Check a database: server, pooler, notifications, settings, tables, privileges and streams.

    Prints each finding with its remedy. Changes nothing. The exit code is 0 if all is well, 1 if there are warnings,
    and 2 if the library will not work.
    """
    try:
        with chosen_database(Target(dsn, chunks_table, status_table), use_embedded=embedded) as url:
            code = diagnosis.run(url, chunks_table, status_table, conversations_table, as_json)
    except typer.Exit as reported:  # such as an unreachable server
        raise typer.Exit(diagnosis.WILL_NOT_WORK if reported.exit_code == FAILED else reported.exit_code) from None
    raise typer.Exit(code)


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
