"""What breaks on purpose: servers, networks, processes. Short by default; `--long` takes the numbers of the promises.

What runs in both flavours is in `_async/`, and generated into `_sync/` as in the folder above.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import servers

from aibind_postgres import schema


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the faults as often as the promises say")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether this is the long run."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def victim() -> Iterator[servers.Server]:
    """A server with the whole schema that a test may stop, kill and start again."""
    with servers.own_server() as server:
        schema.migrate(server.dsn)
        yield server
