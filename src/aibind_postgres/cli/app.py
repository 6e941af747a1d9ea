"""The commands with their options and exit codes."""

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
from .._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE
from . import conversations, maintenance, stats, streams, transfer
from . import demo as demonstration
from . import doctor as diagnosis
from . import web_demo as web_demonstration
from .options import (
    ALL_TABLES,
    ChunksTable,
    Citus,
    ConversationsTable,
    DemoDsn,
    Json,
    NotifyTrigger,
    Partitions,
    StatusTable,
    examples,
    with_target,
)
from .standard_streams import describe_error, discard_output, open_closed_streams, print_message
from .target import DONE, FAILED, INTERRUPTED, Target, database, demo_database, report_errors

EXIT_CODES = {
    0: "done",
    1: "failed; or the stream was stopped, ended in an error, or had already ended; doctor: there are warnings",
    2: "wrong usage, or no database was chosen; doctor: the library will not work",
    3: "not found",
    129: "ended by SIGHUP, such as when the terminal is closed",
    130: "interrupted by Ctrl-C",
    143: "ended by SIGTERM",
}

app = typer.Typer(
    name="aibind-postgres",
    epilog="\n".join(["\b", "Exit codes:", *(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items())]),
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help and usage errors: Rich writes escape codes also under NO_COLOR
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
)
app.add_typer(streams.app)
app.add_typer(maintenance.app)
app.add_typer(transfer.app)
app.add_typer(stats.app)
app.add_typer(
    conversations.app,
    name="conversations",
    help="List, show, export and delete conversations.",
    epilog=examples("conversations list --owner ann", "conversations show chat-1"),
)


class Framework(str, Enum):
    """Web frameworks that `demo --web` supports."""

    FASTAPI = "fastapi"
    FLASK = "flask"
    DJANGO = "django"


def run() -> None:
    """Run the command and exit."""
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Scripts expect JSON in UTF-8. Escapes of Python are only for terminals.
        encoding = None if sys.stdout.isatty() else "utf-8"
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    # psycopg_pool logs every failed attempt. The command reports an unreachable server once.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    # Exit by an exception, so that the embedded server is stopped and a stream in progress is ended.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _exit_on_signal)
    try:
        try:
            app(prog_name="aibind-postgres")
        finally:
            sys.stdout.flush()  # so that a full disk is reported with the exit code of a failure
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        discard_output()
        sys.exit(DONE)
    except OSError as error:
        print_message(describe_error(error))
        sys.exit(FAILED)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


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


@app.command(epilog=examples("demo", "demo --web --framework flask --port 8080"))
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
    """Show how a reader resumes a stream, or serve a chat.

    A second reader resumes a stream after the first one was killed.

    With --web: serve a chat. Its page can be reloaded, closed or opened twice while an answer is written.

    Uses an embedded PostgreSQL, unless --dsn is given. With --web, its data are kept for the next start.
    """
    target = Target(dsn, chunks_table=chunks_table, status_table=status_table)
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


@app.command("schema", epilog=examples('schema | psql "$DATABASE_URL"', "schema --chunks-table app.chunks"))
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


@app.command(epilog=examples("migrate", "migrate --embedded", "migrate --partitions time"))
@with_target(*ALL_TABLES)
def migrate(
    target: Target,
    notify_trigger: NotifyTrigger = False,
    partitions: Partitions = None,
    citus: Citus = False,
) -> None:
    """Create or upgrade the tables. Does nothing if they are up to date."""
    with database(target) as url:
        schema.migrate(
            url,
            **target.tables,
            notify_trigger=notify_trigger,
            partitions=partitions,
            citus=citus,
        )
        trigger = ", and the notify trigger," if notify_trigger else ""
        *others, last = target.tables.values()
        print(f"The tables {', '.join(others)} and {last}{trigger} are up to date.")


@app.command(epilog=examples("doctor", "doctor --json"))
@with_target(*ALL_TABLES)
def doctor(target: Target, as_json: Json = False) -> None:
    """Check a database, and print findings with remedies.

    Checks the server, the pooler, notifications, settings, tables, privileges and streams. Changes nothing. The exit
    code is 0 if all is well, 1 if there are warnings, and 2 if the library will not work.
    """
    try:
        with database(target) as url:
            code = diagnosis.run(url, **target.tables, as_json=as_json)
            sys.stdout.flush()  # so that a full disk is not reported as a warning
    except typer.Exit as reported:  # such as an unreachable server
        raise typer.Exit(diagnosis.WILL_NOT_WORK if reported.exit_code == FAILED else reported.exit_code) from None
    raise typer.Exit(code)
