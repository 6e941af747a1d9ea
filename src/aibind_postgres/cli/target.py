"""What every command shares: which database it talks to, and how its failures are told."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import psycopg
import typer
from psycopg.conninfo import conninfo_to_dict

from .. import embedded, schema
from .._tables import CHUNKS_TABLE, STATUS_TABLE
from ..errors import AibindError, InvalidDataError, StreamNotFoundError

DONE, FAILED, USAGE, NOT_FOUND, INTERRUPTED = 0, 1, 2, 3, 130


class Target(NamedTuple):
    """Where a command's tables are, as its options say it."""

    dsn: str | None = None
    chunks_table: str = CHUNKS_TABLE
    status_table: str = STATUS_TABLE


def say(text: str) -> None:
    """Tell the user something, on standard error."""
    print(f"aibind-postgres: {text}", file=sys.stderr, flush=True)


def end(code: int, text: str) -> NoReturn:
    """Say how it ended and end the command with an exit code."""
    say(text)
    raise typer.Exit(code)


@contextmanager
def failures_told() -> Iterator[None]:
    """Turn what can go wrong into one line on standard error and an exit code."""
    try:
        yield
    except StreamNotFoundError as error:
        end(NOT_FOUND, str(error))
    except (InvalidDataError, ValueError) as error:
        end(USAGE, str(error))
    except AibindError as error:
        end(FAILED, str(error))
    except psycopg.Error as error:
        end(FAILED, _without_secrets(error))
    except BrokenPipeError:
        # Who read the output has left. Python would complain when it flushes what is left of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(DONE) from None
    except OSError as error:
        end(FAILED, str(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def database(target: Target) -> Iterator[str]:
    """Give the connection string of a server that answers: the one of --dsn, of DATABASE_URL, or the embedded one."""
    with failures_told():
        if target.dsn:
            yield _checked(target.dsn, "--dsn")
        elif dsn := os.environ.get("DATABASE_URL"):
            yield _checked(dsn, "DATABASE_URL")
        else:
            with _embedded(target, "no --dsn and no DATABASE_URL", _data_folder()) as dsn:
                yield dsn


@contextmanager
def playground(target: Target) -> Iterator[str]:
    """Give the connection string of a server to play on: the one of --dsn, or a temporary one.

    DATABASE_URL may well be where an application works.
    """
    with failures_told():
        if target.dsn:
            yield _checked(target.dsn, "--dsn")
        else:
            with _embedded(target, "no --dsn", None) as dsn:
                yield dsn


@contextmanager
def _embedded(target: Target, reason: str, folder: Path | None) -> Iterator[str]:
    """Run the embedded server, say why, and make its tables; those of any other server are its owner's."""
    with ExitStack() as stack:
        try:
            dsn = stack.enter_context(embedded.server(folder))
        except ModuleNotFoundError as error:
            end(USAGE, f"{error}, or give --dsn or DATABASE_URL")
        except (OSError, RuntimeError) as error:
            end(FAILED, f"the embedded PostgreSQL cannot be used: {error}")
        say(f"{reason}: using the embedded PostgreSQL in {folder or 'a temporary folder'}")
        schema.migrate(dsn, chunks_table=target.chunks_table, status_table=target.status_table)
        yield dsn


def _data_folder() -> Path:
    # What platformdirs says, which comes with the extra alone; typer.get_app_dir() is for configuration.
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "aibind-postgres" / "postgresql"


def _checked(dsn: str, source: str) -> str:
    """Return a connection string with which a server answers; refuse what is none."""
    try:
        parameters = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        # libpq's own text quotes the string.
        end(USAGE, f"{source} is not a connection string of PostgreSQL, such as postgresql://user@host/database")
    if "@" in str(parameters.get("host", "")):
        end(USAGE, f"{source}: an @ that is part of the user's name or password must be written as %40")
    psycopg.connect(dsn, connect_timeout=int(parameters.get("connect_timeout") or 10)).close()
    return dsn


def _without_secrets(error: psycopg.Error) -> str:
    # The driver's text may quote parts of the connection string. What follows the last "failed:" is the reason given
    # by the server or by the operating system.
    if error.diag.message_primary:
        return f"PostgreSQL says: {error.diag.message_primary}"
    if reasons := re.findall(r"connection to server [^\n]* failed: ([^\n]+)", str(error)):
        return f"cannot connect to PostgreSQL: {reasons[-1]}"
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return "cannot connect to PostgreSQL: no answer in time"
    if isinstance(error, psycopg.OperationalError):
        return "cannot connect to PostgreSQL: check the host, the port and the options of the connection string"
    return f"the database driver failed: {type(error).__name__}"
