"""The commands: what they take, and what their exit codes mean."""

from __future__ import annotations

import atexit
import io
import logging
import signal
import sys
from contextlib import ExitStack
from enum import Enum
from importlib.metadata import version
from types import FrameType
from typing import Annotated

import typer

from .. import schema
from .._sync.stream_store import PostgresStreamStore
from .._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE
from . import demo as demonstration
from . import reading, writing
from . import web_demo as web_demonstration
from .target import Target, database, failures_told, playground

Id = Annotated[str, typer.Argument(metavar="ID", help="The stream's id.", show_default=False)]
Dsn = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        metavar="URL",
        help="The database. Default: the variable DATABASE_URL, else an embedded PostgreSQL in your data folder.",
        show_default=False,
    ),
]
ChunksTable = Annotated[str, typer.Option("--chunks-table", metavar="NAME", help="The table of the chunks.")]
StatusTable = Annotated[str, typer.Option("--status-table", metavar="NAME", help="The table of the streams' states.")]
ConversationsTable = Annotated[
    str, typer.Option("--conversations-table", metavar="NAME", help="The table of the conversations.")
]
NotifyTrigger = Annotated[
    bool, typer.Option("--notify-trigger", help="Also announce what writers of other kinds append, by a trigger.")
]
After = Annotated[int, typer.Option("--after", metavar="N", min=0, help="Begin behind chunk number N.")]

app = typer.Typer(
    name="aibind-postgres",
    help="Durable, resumable text streams in PostgreSQL.",
    epilog="Exit codes: 0 done; 1 the stream ended as stopped or in an error, or the command failed; 2 wrong usage; "
    "3 there is no such stream; 130 interrupted with Ctrl-C.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Framework(str, Enum):
    """What `demo --web` runs its chat in."""

    FASTAPI = "fastapi"
    FLASK = "flask"
    DJANGO = "django"


class By(str, Enum):
    """What `write` makes a chunk of."""

    CHAR = "char"
    WORD = "word"
    LINE = "line"


def run() -> None:
    """Run the command and end the process."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what is said; stored text goes out as bytes
    # The user is told once that the server cannot be reached, not at every attempt.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    # An exception, so that the embedded server is stopped and the stream that is being written is ended.
    for ending in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, ending):
            signal.signal(getattr(signal, ending), _terminate)
    try:
        app(prog_name="aibind-postgres")
    except KeyboardInterrupt:
        sys.exit(130)


def _terminate(number: int, frame: FrameType | None) -> None:
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
    web: Annotated[bool, typer.Option("--web", help="Show a chat in the browser instead, until Ctrl-C.")] = False,
    host: Annotated[str, typer.Option("--host", metavar="H", help="Where the chat listens.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="The port of the chat; 0 takes a free one.")
    ] = 8000,
    framework: Annotated[Framework, typer.Option("--framework", help="What the chat runs in.")] = Framework.FASTAPI,
    dsn: Dsn = None,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
) -> None:
    """Show it: a writer, a reader that is killed half-way, and another one that goes on from there.

    With --web: a chat, whose page can be reloaded, closed, and opened twice while an answer is written.

    On a temporary embedded PostgreSQL, unless --dsn names a database.
    """
    target = Target(dsn, chunks_table, status_table)
    if web and target != Target(dsn):
        raise typer.BadParameter("the chat of --web uses the tables of the usual names")
    if web:
        database = ExitStack()
        atexit.register(database.close)  # after what the chat has to do at its end
        with failures_told():
            web_demonstration.serve(database.enter_context(playground(target)), framework.value, host, port)
    else:
        with playground(target) as url:
            raise typer.Exit(0 if demonstration.show(url, target) else 1)


@app.command("schema")
def print_schema(
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
    conversations_table: ConversationsTable = CONVERSATIONS_TABLE,
    notify_trigger: NotifyTrigger = False,
) -> None:
    """Print the SQL that creates or completes the tables."""
    with failures_told():
        sql = schema.render(
            chunks_table=chunks_table,
            status_table=status_table,
            conversations_table=conversations_table,
            notify_trigger=notify_trigger,
        )
        sys.stdout.buffer.write(sql.encode())
        sys.stdout.flush()


@app.command()
def migrate(
    dsn: Dsn = None,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
    conversations_table: ConversationsTable = CONVERSATIONS_TABLE,
    notify_trigger: NotifyTrigger = False,
) -> None:
    """Create or complete the tables. Can be repeated without harm."""
    with database(Target(dsn, chunks_table, status_table)) as url:
        schema.migrate(
            url,
            chunks_table=chunks_table,
            status_table=status_table,
            conversations_table=conversations_table,
            notify_trigger=notify_trigger,
        )
        trigger = ", and the trigger that announces," if notify_trigger else ""
        print(f"The tables {chunks_table}, {status_table} and {conversations_table}{trigger} are there and complete.")


@app.command()
def write(
    id: Id,
    by: Annotated[By, typer.Option("--by", help="What becomes a chunk.")] = By.LINE,
    delay: Annotated[
        float, typer.Option("--delay", metavar="SECONDS", min=0, help="Wait this long between two chunks.")
    ] = 0.0,
    dsn: Dsn = None,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
) -> None:
    """Store standard input, UTF-8 text, as a new stream, while it comes in.

    The stream is done when the input ends. Ctrl-C stops it. What is not text ends it in an error.
    """
    with database(Target(dsn, chunks_table, status_table)) as url, _store(url, chunks_table, status_table) as store:
        raise typer.Exit(writing.write(store, id, by.value, delay))


@app.command()
def tail(
    id: Id,
    after: After = 0,
    dsn: Dsn = None,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
) -> None:
    """Print a stream's text and go on as it arrives, until the stream ends."""
    target = Target(dsn, chunks_table, status_table)
    with database(target) as url, _store(url, chunks_table, status_table) as store:
        raise typer.Exit(reading.tail(store, id, after, target))


@app.command()
def replay(
    id: Id,
    speed: Annotated[
        float | None,
        typer.Option("--speed", metavar="N", help="2 is twice as fast as it was written, which is the default."),
    ] = None,
    instant: Annotated[bool, typer.Option("--instant", help="Leave out the pauses.")] = False,
    after: After = 0,
    dsn: Dsn = None,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
) -> None:
    """Print what is stored of a stream, at the pace at which it was written."""
    if instant and speed is not None:
        raise typer.BadParameter("give --speed or --instant, not both")
    if speed is not None and not speed > 0:
        raise typer.BadParameter(f"--speed must be above zero, not {speed:g}")
    with database(Target(dsn, chunks_table, status_table)) as url, _store(url, chunks_table, status_table) as store:
        raise typer.Exit(reading.replay(store, id, after, None if instant else speed or 1.0))


@app.command()
def status(
    id: Id,
    dsn: Dsn = None,
    chunks_table: ChunksTable = CHUNKS_TABLE,
    status_table: StatusTable = STATUS_TABLE,
) -> None:
    """Print where a stream stands. The exit code says it, too: 1 for a stream that was stopped or ended in an error."""
    with database(Target(dsn, chunks_table, status_table)) as url, _store(url, chunks_table, status_table) as store:
        raise typer.Exit(reading.status(store, id))


def _store(url: str, chunks_table: str, status_table: str) -> PostgresStreamStore:
    return PostgresStreamStore(url, chunks_table=chunks_table, status_table=status_table)
