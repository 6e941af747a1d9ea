"""Fault tests: servers, networks and processes that fail. Short by default; `--long` repeats the faults.

Tests of both flavours are in `_async/`; `_sync/` is generated from it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import servers

from aibind_postgres import schema


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="repeat each fault as often as docs/guarantees.md states")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """True for the long run."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def disposable_server() -> Iterator[servers.Server]:
    """A server with the whole schema, which the test may stop, kill and restart."""
    with servers.own_server() as server:
        schema.migrate(server.dsn)
        yield server
