"""The server, its databases and schemas, and the synchronous half of the tests."""

from __future__ import annotations

import runpy
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

ROOT = Path(__file__).resolve().parent.parent

# The generated halves, of the package and of these tests, are made again when they are not what the sources give. This
# comes before the package is imported.
converter = runpy.run_path(str(ROOT / "scripts" / "unasync.py"))
if converter["outdated"]():
    converter["convert"]()

from support import servers  # noqa: E402  # after the conversion

from aibind_postgres import schema  # noqa: E402  # after the conversion

# A process that is started in the background ignores Ctrl-C, and so would all that it starts: some are sent it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Names for the tables of chunks, streams and conversations that are legal and go wrong when they are not quoted.
TABLE_NAMES = {
    "plain": ("chunks", "status", "conversations"),
    "quotes": ('we"ird', "it's; -- \n$1", '"; --'),
    "mixed case": ("Stream.Chunks", "Stream.Status", "Conversations"),
    "spaces": (" chunks of streams", "status of streams ", " "),
    "keywords": ("select", "user", "table"),
    "63 bytes": ("c" * 63, "ü" * 31 + "s", "ö" * 31 + "c"),
    "formats": ("{chunks} %s :x", "{status} %(id)s $2", "{conversations} %s $1 :x"),
}


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A server, with the right to create databases on it."""
    with servers.test_server() as dsn:
        yield dsn


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a database with the whole schema, to copy from."""
    with servers.own_database(server, "template0") as dsn:
        schema.migrate(dsn)
        yield str(conninfo_to_dict(dsn)["dbname"])


@pytest.fixture(scope="session")
def dsn(server: str, template: str) -> Iterator[str]:
    """This run's database. Tests share it, each in a schema of its own."""
    with servers.own_database(server, template) as dsn:
        yield dsn


@pytest.fixture
def database(server: str, template: str) -> Iterator[str]:
    """A database of one's own, with the whole schema and the default names."""
    with servers.own_database(server, template) as dsn:
        yield dsn


@pytest.fixture
def empty_database(server: str) -> Iterator[str]:
    """A database of one's own, without any table."""
    with servers.own_database(server, "template0") as dsn:
        yield dsn


@pytest.fixture(scope="session")
def administrators(dsn: str) -> Iterator[list[psycopg.Connection]]:
    """The connections that prepare this run's database for its tests: one, and another if a test has broken it."""
    connections: list[psycopg.Connection] = []
    yield connections
    for connection in connections:
        connection.close()


@pytest.fixture
def administer(dsn: str, administrators: list[psycopg.Connection]) -> Callable[[str], None]:
    """Run SQL in this run's database."""

    def run(sql: str) -> None:
        try:
            administrators[-1].execute("SELECT")
        except (IndexError, psycopg.OperationalError):
            administrators.append(psycopg.connect(dsn, autocommit=True))
        administrators[-1].execute(sql)

    return run


@pytest.fixture
def schema_name(administer: Callable[[str], None]) -> Iterator[str]:
    """An empty schema in this run's database."""
    name = f"Test_{uuid.uuid4().hex[:12]}"
    administer(f'CREATE SCHEMA "{name}"')
    yield name
    administer(f'DROP SCHEMA "{name}" CASCADE')


@pytest.fixture
def tables(
    request: pytest.FixtureRequest, administer: Callable[[str], None], schema_name: str
) -> dict[str, psycopg.sql.Identifier]:
    """The stream tables of this test, as a store takes them, with every migration applied."""
    chunks, status, conversations = TABLE_NAMES[getattr(request, "param", "plain")]
    names = {
        "chunks_table": psycopg.sql.Identifier(schema_name, chunks),
        "status_table": psycopg.sql.Identifier(schema_name, status),
    }
    administer(schema.render(**names, conversations_table=psycopg.sql.Identifier(schema_name, conversations)))
    return names


@pytest.fixture
def conversations(
    request: pytest.FixtureRequest, administer: Callable[[str], None], schema_name: str
) -> psycopg.sql.Identifier:
    """The conversation table of this test, as a store takes it, with every migration applied."""
    table = psycopg.sql.Identifier(schema_name, TABLE_NAMES[getattr(request, "param", "plain")][2])
    others = {f"{kind}_table": psycopg.sql.Identifier(schema_name, f"other {kind}") for kind in ("chunks", "status")}
    administer(schema.render(**others, conversations_table=table))
    return table
