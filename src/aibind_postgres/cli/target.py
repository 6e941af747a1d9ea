"""Code that all commands share: choice of the database, errors and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import psycopg
import typer
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

from .. import embedded, schema
from .._conninfo import with_defaults
from .._sqlstate import server_reason
from .._sync.conversation_store import PostgresConversationStore
from .._sync.stream_store import PostgresStreamStore
from .._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE
from ..errors import AibindError, InvalidDataError, StreamNotFoundError
from .standard_streams import describe_error, discard_output, print_message

DONE, FAILED, USAGE, NOT_FOUND, INTERRUPTED = 0, 1, 2, 3, 130


class Target(NamedTuple):
    """Database and tables of a command, as given by its options.

    Attributes:
        dsn: The connection string, or None.
        embedded: Whether --embedded is given; None for a command that uses the embedded server if no other is given.
        chunks_table: The name of the table of the chunks.
        status_table: The name of the table of the stream states.
        conversations_table: The name of the table of the conversations.
    """

    dsn: str | None = None
    embedded: bool | None = None
    chunks_table: str = CHUNKS_TABLE
    status_table: str = STATUS_TABLE
    conversations_table: str = CONVERSATIONS_TABLE

    @property
    def tables(self) -> dict[str, str]:
        """The names of the tables, by the names of their options."""
        return {
            "chunks_table": self.chunks_table,
            "status_table": self.status_table,
            "conversations_table": self.conversations_table,
        }


def exit_with(code: int, text: str) -> NoReturn:
    """Print a message and end the command with an exit code."""
    print_message(text)
    raise typer.Exit(code)


def require_terminal() -> None:
    """Exit if the standard input is not a terminal, so that `confirm` cannot ask."""
    if not sys.stdin.isatty():
        exit_with(USAGE, "standard input is not a terminal: give --yes to delete without confirmation")


def confirm(question: str) -> None:
    """Ask on the terminal. Exit unless the answer is yes."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        exit_with(FAILED, "nothing was deleted")


@contextmanager
def report_errors(place: str = "") -> Iterator[None]:
    """Report expected errors as one line on standard error and an exit code.

    Args:
        place: The server and the database, which the errors name. Default: not known.
    """
    suffix = f" ({place})" if place else ""
    try:
        yield
    except StreamNotFoundError as error:
        exit_with(NOT_FOUND, str(error) + suffix)
    except (InvalidDataError, ValueError) as error:
        exit_with(USAGE, str(error))
    except AibindError as error:
        exit_with(FAILED, str(error) + suffix)
    except psycopg.Error as error:
        exit_with(FAILED, _redacted_message(error) + suffix)
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        discard_output()
        raise typer.Exit(DONE) from None
    except OSError as error:
        exit_with(FAILED, describe_error(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def database(target: Target, *, check: bool = True) -> Iterator[str]:
    """Yield the connection string of --dsn, of DATABASE_URL, or of the embedded server.

    Exit if none is chosen and `target.embedded` is False: results from a new, empty server would mislead.

    Args:
        target: The options of the command.
        check: Whether to make a test connection. Default: True.
    """
    with report_errors():
        if target.dsn is not None and target.embedded:
            exit_with(USAGE, "give --dsn or --embedded, not both")
        given = None if target.embedded else _given_dsn(target)
        if given is None:
            if target.embedded is False:
                exit_with(USAGE, "no database: give --dsn or --embedded, or set DATABASE_URL")
            reason = "--embedded" if target.embedded else "no --dsn and no DATABASE_URL"
            with _embedded_server(target, reason, _data_folder("postgresql")) as dsn:
                yield dsn
        elif check:
            with connected(given):
                yield given
        else:
            yield given


@contextmanager
def connected(dsn: str) -> Iterator[None]:
    """Make a test connection, which fails at once, unlike a pool. Errors in the block name the server."""
    complete = with_defaults(dsn)
    try:
        with psycopg.connect(complete) as connection:
            info = connection.info
            place = _place(info.host, info.port, info.dbname)
    except psycopg.Error as error:
        with report_errors(_failed_place(error, complete)):
            raise
    with report_errors(place):
        yield


@contextmanager
def open_store(target: Target) -> Iterator[PostgresStreamStore]:
    """Open the stream store of a command."""
    with (
        database(target) as dsn,
        PostgresStreamStore(dsn, chunks_table=target.chunks_table, status_table=target.status_table) as store,
    ):
        yield store


@contextmanager
def open_both_stores(target: Target) -> Iterator[tuple[PostgresStreamStore, PostgresConversationStore]]:
    """Open the stream store and the conversation store of a command."""
    table, status_table = target.conversations_table, target.status_table
    with (
        database(target) as dsn,
        PostgresStreamStore(dsn, chunks_table=target.chunks_table, status_table=status_table) as streams,
        PostgresConversationStore(dsn, table=table, status_table=status_table) as conversations,
    ):
        yield streams, conversations


@contextmanager
def open_connection(target: Target) -> Iterator[psycopg.Connection]:
    """Open a connection as a store opens its own, in autocommit mode."""
    with (
        database(target) as dsn,
        psycopg.connect(with_defaults(dsn), autocommit=True, prepare_threshold=None) as connection,
    ):
        yield connection


@contextmanager
def demo_database(target: Target, *, keep: bool) -> Iterator[str]:
    """Yield the connection string of --dsn, or of an embedded server, which keeps its data if `keep` is true.

    DATABASE_URL is ignored: it may name the database of an application. So is the folder of the other commands, since
    the chat deletes expired streams.
    """
    with report_errors():
        if target.dsn is not None:
            dsn = _check_syntax(target.dsn, "--dsn")
            with connected(dsn):
                yield dsn
        else:
            with _embedded_server(target, "no --dsn", _data_folder("demo") if keep else None) as dsn:
                yield dsn


@contextmanager
def _embedded_server(target: Target, reason: str, folder: Path | None) -> Iterator[str]:
    """Run the embedded server, report the reason for its use, and create its tables."""
    with ExitStack() as stack:
        try:
            dsn = stack.enter_context(embedded.server(folder))
        except ModuleNotFoundError as error:
            exit_with(USAGE, f"{error}, or give --dsn")
        except (OSError, RuntimeError) as error:
            exit_with(FAILED, f"the embedded PostgreSQL cannot be used: {error}")
        print_message(f"{reason}: using the embedded PostgreSQL in {folder or 'a temporary folder'}")
        schema.migrate(
            dsn,
            chunks_table=target.chunks_table,
            status_table=target.status_table,
            conversations_table=target.conversations_table,
        )
        yield dsn


def _data_folder(name: str) -> Path:
    # The user data folder as in platformdirs, which is not a dependency; typer.get_app_dir() is for configuration.
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "aibind-postgres" / name


def _given_dsn(target: Target) -> str | None:
    """Return the connection string of --dsn or of DATABASE_URL, if there is one. Exit if it is malformed."""
    if target.dsn is not None:
        return _check_syntax(target.dsn, "--dsn")
    if dsn := os.environ.get("DATABASE_URL"):
        return _check_syntax(dsn, "DATABASE_URL")
    return None


def _check_syntax(dsn: str, source: str) -> str:
    if not dsn:  # as of an unset variable, which must not select another database
        exit_with(USAGE, f"{source} is empty")
    try:
        with_defaults(dsn)
    except ValueError as error:
        exit_with(USAGE, f"{source}: {error}")
    return dsn


def _place(host: object, port: object, database: object) -> str:
    parts = {"host": host, "port": port, "database": database}
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value)


def _failed_place(error: psycopg.Error, dsn: str) -> str:
    """Return the address that could not be reached. It contains no password, which `with_defaults` ensures."""
    variables = {option.keyword.decode(): option.val.decode() for option in Conninfo.get_defaults() if option.val}
    given = {**variables, **conninfo_to_dict(dsn)}
    if error.pgconn is not None and not given.get("host"):  # the default of libpq, or that of a service
        tried = error.pgconn
        return _place(tried.host.decode(), tried.port.decode(), tried.db.decode())
    return _place(given.get("host"), given.get("port"), given.get("dbname") or given.get("user"))


def _redacted_message(error: psycopg.Error) -> str:
    if reason := server_reason(error):
        return f"{'PostgreSQL' if error.diag.message_primary else 'cannot connect to PostgreSQL'}: {reason}"
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return "cannot connect to PostgreSQL: the server did not answer in time"
    if isinstance(error, psycopg.OperationalError):
        return "cannot connect to PostgreSQL: check the host, the port and the options of the connection string"
    return f"the database driver failed with {type(error).__name__}"
