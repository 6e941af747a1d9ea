"""The pytest plugin: stores for the tests of an application, in a database of their own.

pytest loads this module at each start, wherever the package is installed. It therefore imports neither psycopg nor the
stores nor an extra before a test uses a fixture.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .. import (
        AsyncPostgresConversationStore,
        AsyncPostgresStreamStore,
        PostgresConversationStore,
        PostgresStreamStore,
    )

OPTION = "--aibind-postgres-dsn"
INI = "aibind_postgres_dsn"
VARIABLE = "AIBIND_POSTGRES_TEST_DSN"

# The folder of the embedded server that the processes of pytest-xdist share. The first one starts it.
FOLDER = pytest.StashKey[Path]()
FOLDER_OF_WORKER = "aibind_postgres_folder"


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "connection string of the server on which the fixtures of aibind-postgres create a database"
    parser.getgroup("aibind-postgres").addoption(OPTION, metavar="URL", help=f"{about}; default: an embedded server")
    parser.addini(INI, help=about, default="")


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("asyncio"):  # the name of pytest-asyncio
        from . import asyncio_fixtures

        config.pluginmanager.register(asyncio_fixtures, "aibind-postgres-asyncio")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process of pytest-xdist the folder that all of them share."""
    name = f"aibind-postgres-pytest-{uuid.uuid4().hex}"
    folder = node.config.stash.setdefault(FOLDER, Path(tempfile.gettempdir(), name))
    node.workerinput[FOLDER_OF_WORKER] = str(folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    if (folder := config.stash.get(FOLDER, None)) is not None:
        shutil.rmtree(folder, ignore_errors=True)  # there is none if no test has used the server


@pytest.fixture(scope="session")
def aibind_postgres_dsn(pytestconfig: pytest.Config) -> Iterator[str]:
    """The connection string of the database of this test run, with all tables. Each process has its own database."""
    from .databases import embedded_server, own_database

    if server := _chosen_server(pytestconfig):
        with own_database(server) as dsn:
            yield dsn
    else:
        folder = getattr(pytestconfig, "workerinput", {}).get(FOLDER_OF_WORKER)
        with embedded_server(folder) as server, own_database(server) as dsn:
            yield dsn


def _chosen_server(config: pytest.Config) -> str:
    """Return the connection string of the option, the variable or the ini file; an empty one for an embedded server."""
    return str(config.getoption(OPTION) or os.environ.get(VARIABLE) or config.getini(INI))


@pytest.fixture
def _aibind_postgres_empty(aibind_postgres_dsn: str) -> str:
    """Empty the tables once for each test, before its stores."""
    from .databases import delete_rows

    delete_rows(aibind_postgres_dsn)
    return aibind_postgres_dsn


@pytest.fixture
def stream_store(_aibind_postgres_empty: str) -> Iterator[PostgresStreamStore]:
    """A `PostgresStreamStore` on empty tables, closed after the test."""
    from .. import PostgresStreamStore

    with PostgresStreamStore(_aibind_postgres_empty) as store:
        yield store


@pytest.fixture
def conversation_store(_aibind_postgres_empty: str) -> Iterator[PostgresConversationStore]:
    """A `PostgresConversationStore` on empty tables, closed after the test."""
    from .. import PostgresConversationStore

    with PostgresConversationStore(_aibind_postgres_empty) as store:
        yield store


@pytest.fixture
def async_stream_store(request: pytest.FixtureRequest) -> AsyncPostgresStreamStore:
    """An `AsyncPostgresStreamStore` on empty tables, closed after the test. Works with pytest-asyncio and anyio."""
    store: AsyncPostgresStreamStore = request.getfixturevalue(f"_{_runner(request)}_stream_store")
    return store


@pytest.fixture
def async_conversation_store(request: pytest.FixtureRequest) -> AsyncPostgresConversationStore:
    """An `AsyncPostgresConversationStore` on empty tables, closed after the test. Works like `async_stream_store`."""
    store: AsyncPostgresConversationStore = request.getfixturevalue(f"_{_runner(request)}_conversation_store")
    return store


def _runner(request: pytest.FixtureRequest) -> str:
    """Return the plugin that runs the event loop of the test: its fixtures must run in the same loop."""
    if "anyio_backend" in request.fixturenames:
        return "anyio"
    if request.config.pluginmanager.hasplugin("asyncio"):
        return "asyncio"
    pytest.fail(
        f"{request.fixturename} needs a test that runs in an event loop: install pytest-asyncio, or mark the test with "
        "pytest.mark.anyio",
        pytrace=False,
    )


@pytest.fixture
async def _anyio_stream_store(_aibind_postgres_empty: str) -> AsyncIterator[AsyncPostgresStreamStore]:
    from .. import AsyncPostgresStreamStore

    async with AsyncPostgresStreamStore(_aibind_postgres_empty) as store:
        yield store


@pytest.fixture
async def _anyio_conversation_store(_aibind_postgres_empty: str) -> AsyncIterator[AsyncPostgresConversationStore]:
    from .. import AsyncPostgresConversationStore

    async with AsyncPostgresConversationStore(_aibind_postgres_empty) as store:
        yield store
