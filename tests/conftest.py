"""Fixtures for the server, its databases and schemas. Generates the sync flavour of package and tests if needed."""

from __future__ import annotations

import os
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

# Generate the sync flavour again if it is outdated. This must come before the package is imported. The processes of
# pytest-xdist start after it, and the check takes seconds.
if "PYTEST_XDIST_WORKER" not in os.environ:
    converter = runpy.run_path(str(ROOT / "scripts" / "unasync.py"))
    if converter["outdated"]():
        converter["convert"]()

from support import citus, grants, servers  # noqa: E402  # after the conversion
from support.spare_tables import SpareTables  # noqa: E402  # after the conversion

from aibind_postgres import schema  # noqa: E402  # after the conversion

# A process that a shell starts in the background ignores SIGINT, and its children inherit that. Some tests send SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines would fail at random on a busy machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Legal names for the tables of chunks, status and conversations, most of which fail if they are not quoted.
TABLE_NAMES = {
    "plain": ("chunks", "status", "conversations"),
    "quotes": ('we"ird', "it's; -- \n$1", '"; --'),
    "mixed case": ("Stream.Chunks", "Stream.Status", "Conversations"),
    "spaces": (" chunks of streams", "status of streams ", " "),
    "keywords": ("select", "user", "table"),
    "63 bytes": ("c" * 63, "ü" * 31 + "s", "ö" * 31 + "c"),
    "formats": ("{chunks} %s :x", "{status} %(id)s $2", "{conversations} %s $1 :x"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="repeat each fault as often as docs/guarantees.md states")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if grants.NAME is not None:
        grants.skip_excluded(items)
    server = os.environ.get("AIBIND_TEST_DSN")
    if server is not None and citus.cluster_of(server) is not None:
        citus.skip_impossible(items)


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """True for the long run of the tests that repeat something."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The connection string of a server, as a user that may create databases."""
    with servers.test_server() as dsn:
        yield dsn


@pytest.fixture(scope="session")
def on_citus(server: str) -> bool:
    """Whether the server is the coordinator of a Citus cluster."""
    return citus.cluster_of(server) is not None


@pytest.fixture(scope="session")
def granted_role(server: str) -> Iterator[str | None]:
    """The role of the stores, if this run wants one with the minimal grants."""
    with grants.own_role(server) as role:
        yield role


@pytest.fixture(scope="session")
def template(server: str, granted_role: str | None) -> Iterator[str]:
    """The name of a template database with the whole schema."""
    with servers.own_database(server, "template0") as dsn:
        schema.migrate(dsn, partitions=servers.PARTITIONS)
        if granted_role is not None:
            with psycopg.connect(dsn) as connection:
                connection.execute(grants.statements(granted_role, "public").encode())
        yield str(conninfo_to_dict(dsn)["dbname"])


@pytest.fixture(scope="session")
def admin_dsn(server: str, template: str) -> Iterator[str]:
    """The database of this test run, as the user of the server."""
    with servers.own_database(server, template) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def dsn(admin_dsn: str, granted_role: str | None) -> str:
    """The database of this test run, as the stores use it. Tests share it, each in a separate schema."""
    return grants.as_role(admin_dsn, granted_role)


@pytest.fixture
def database(server: str, template: str, granted_role: str | None) -> Iterator[str]:
    """A database for one test, with the whole schema and the default names."""
    with servers.own_database(server, template) as dsn:
        yield grants.as_role(dsn, granted_role)


@pytest.fixture
def empty_database(server: str) -> Iterator[str]:
    """A database for one test, without tables."""
    with servers.own_database(server, "template0") as dsn:
        yield dsn


@pytest.fixture(scope="session")
def admin_connections(admin_dsn: str) -> Iterator[list[psycopg.Connection]]:
    """The connections that `run_sql` uses: one, and a new one each time a test has broken the last."""
    connections: list[psycopg.Connection] = []
    yield connections
    for connection in connections:
        connection.close()


@pytest.fixture(scope="session")
def run_sql(admin_dsn: str, admin_connections: list[psycopg.Connection]) -> Callable[..., psycopg.Cursor]:
    """Run SQL in the database of this test run."""

    def run(sql: str | psycopg.sql.Composable) -> psycopg.Cursor:
        try:
            admin_connections[-1].execute("SELECT")
        except (IndexError, psycopg.OperationalError):
            admin_connections.append(psycopg.connect(admin_dsn, autocommit=True))
        return admin_connections[-1].execute(sql)

    return run


@pytest.fixture(scope="session")
def spare_tables(run_sql: Callable[..., psycopg.Cursor]) -> SpareTables:
    """The tables that later tests use again."""
    return SpareTables(run_sql)


@pytest.fixture
def schema_name(run_sql: Callable[..., psycopg.Cursor], spare_tables: SpareTables) -> Iterator[str]:
    """An empty schema for one test."""
    name = f"Test_{uuid.uuid4().hex[:12]}"
    run_sql(f'CREATE SCHEMA "{name}"')
    yield name
    spare_tables.release(name)


@pytest.fixture
def create_tables(
    admin_dsn: str, spare_tables: SpareTables, on_citus: bool, granted_role: str | None
) -> Callable[..., None]:
    """Create tables with every migration applied, and with the partitions and grants that this run wants."""

    def create(**names: psycopg.sql.Identifier) -> None:
        if on_citus:  # it does not change distributed tables by several commands in one text
            schema.migrate(admin_dsn, **names, citus=True)
        elif servers.PARTITIONS == "time":
            schema.migrate(admin_dsn, **names, partitions="time")  # the SQL of `render` creates no partitions of days
        else:
            kind = tuple((argument, table._obj[1]) for argument, table in names.items())
            definition = schema.render(**names, partitions=servers.PARTITIONS)
            if granted_role is not None:
                definition += grants.statements_for(granted_role, **names)
            spare_tables.create(names["chunks_table"]._obj[0], kind, definition)

    return create


@pytest.fixture
def tables(
    request: pytest.FixtureRequest, create_tables: Callable[..., None], schema_name: str
) -> dict[str, psycopg.sql.Identifier]:
    """The stream tables of one test with every migration applied, as keyword arguments of a store."""
    chunks, status, conversations = TABLE_NAMES[getattr(request, "param", "plain")]
    names = {
        "chunks_table": psycopg.sql.Identifier(schema_name, chunks),
        "status_table": psycopg.sql.Identifier(schema_name, status),
    }
    create_tables(**names, conversations_table=psycopg.sql.Identifier(schema_name, conversations))
    return names


@pytest.fixture
def conversations(
    request: pytest.FixtureRequest, create_tables: Callable[..., None], schema_name: str
) -> psycopg.sql.Identifier:
    """The conversation table of one test with every migration applied."""
    table = psycopg.sql.Identifier(schema_name, TABLE_NAMES[getattr(request, "param", "plain")][2])
    others = {f"{kind}_table": psycopg.sql.Identifier(schema_name, f"other {kind}") for kind in ("chunks", "status")}
    create_tables(**others, conversations_table=table)
    return table
