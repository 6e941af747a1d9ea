"""Code that all commands share: choice of the database, messages, errors and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import psycopg
import typer

from .. import embedded, schema
from .._conninfo import with_defaults
from .._sqlstate import server_reason
from .._tables import CHUNKS_TABLE, STATUS_TABLE
from ..errors import AibindError, InvalidDataError, StreamNotFoundError

DONE, FAILED, USAGE, NOT_FOUND, INTERRUPTED = 0, 1, 2, 3, 130


class Target(NamedTuple):
    """Database and tables of a command, as given by its options."""

    dsn: str | None = None
    chunks_table: str = CHUNKS_TABLE
    status_table: str = STATUS_TABLE


def print_message(text: str) -> None:
    """Print a message to standard error."""
    print(f"aibind-postgres: {text}", file=sys.stderr, flush=True)


def exit_with(code: int, text: str) -> NoReturn:
    """Print a message and end the command with an exit code."""
    print_message(text)
    raise typer.Exit(code)


@contextmanager
def report_errors() -> Iterator[None]:
    """Report expected errors as one line on standard error and an exit code."""
    try:
        yield
    except StreamNotFoundError as error:
        exit_with(NOT_FOUND, str(error))
    except (InvalidDataError, ValueError) as error:
        exit_with(USAGE, str(error))
    except AibindError as error:
        exit_with(FAILED, str(error))
    except psycopg.Error as error:
        exit_with(FAILED, _redacted_message(error))
    except BrokenPipeError:
        # The reader closed the pipe, as `head` does. Without this, Python reports the error again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(DONE) from None
    except OSError as error:
        exit_with(FAILED, str(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def database(target: Target) -> Iterator[str]:
    """Yield the connection string of --dsn, of DATABASE_URL, or of the embedded server, after a test connection."""
    with report_errors():
        if target.dsn:
            yield _check_dsn(target.dsn, "--dsn")
        elif dsn := os.environ.get("DATABASE_URL"):
            yield _check_dsn(dsn, "DATABASE_URL")
        else:
            with _embedded_server(target, "no --dsn and no DATABASE_URL", _data_folder("postgresql")) as dsn:
                yield dsn


@contextmanager
def chosen_database(target: Target, *, use_embedded: bool) -> Iterator[str]:
    """Yield the connection string of --dsn, of DATABASE_URL, or of the embedded server if `use_embedded` is true.

    Exit if none is chosen: the findings about an empty server of its own would mislead.
    """
    if target.dsn and use_embedded:
        exit_with(USAGE, "give --dsn or --embedded, not both")
    if not (target.dsn or use_embedded or os.environ.get("DATABASE_URL")):
        exit_with(USAGE, "no database: give --dsn or --embedded, or set DATABASE_URL")
    if not use_embedded:
        with database(target) as dsn:
            yield dsn
    else:
        with report_errors(), _embedded_server(target, "--embedded", _data_folder("postgresql")) as dsn:
            yield dsn


@contextmanager
def demo_database(target: Target, *, keep: bool) -> Iterator[str]:
    """Yield the connection string of --dsn, or of an embedded server, which keeps its data if `keep` is true.

    DATABASE_URL is ignored: it may name the database of an application. So is the folder of the other commands, since
    the chat deletes expired streams.
    """
    with report_errors():
        if target.dsn:
            yield _check_dsn(target.dsn, "--dsn")
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
        schema.migrate(dsn, chunks_table=target.chunks_table, status_table=target.status_table)
        yield dsn


def _data_folder(name: str) -> Path:
    # The user data folder as in platformdirs, which is not a dependency; typer.get_app_dir() is for configuration.
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "aibind-postgres" / name


def _check_dsn(dsn: str, source: str) -> str:
    """Return the connection string after a test connection. Exit if it is malformed."""
    try:
        complete = with_defaults(dsn)
    except ValueError as error:
        exit_with(USAGE, f"{source}: {error}")
    psycopg.connect(complete).close()
    return dsn


def _redacted_message(error: psycopg.Error) -> str:
    if reason := server_reason(error):
        return f"{'PostgreSQL' if error.diag.message_primary else 'cannot connect to PostgreSQL'}: {reason}"
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return "cannot connect to PostgreSQL: the server did not answer in time"
    if isinstance(error, psycopg.OperationalError):
        return "cannot connect to PostgreSQL: check the host, the port and the options of the connection string"
    return f"the database driver failed with {type(error).__name__}"
