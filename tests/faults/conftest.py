"""Fault tests: servers, networks and processes that fail. Short by default; `--long` repeats the faults.

Tests of both flavours are in `_async/`; `_sync/` is generated from it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import servers

from aibind_postgres import schema


@pytest.fixture
def disposable_server() -> Iterator[servers.Server]:
    """A server with the whole schema, which the test may stop, kill and restart."""
    with servers.own_server() as server:
        schema.migrate(server.dsn, partitions=servers.PARTITIONS)
        yield server
