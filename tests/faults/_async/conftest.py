"""A server that is reached by a network, which breaks, and by a way of its own."""

from __future__ import annotations

import psycopg
import pytest
from support import proxy, servers
from support.concurrency import async_until, async_workers

from aibind_postgres import AsyncPostgresStreamStore, schema


@pytest.fixture(scope="module")
def distant():
    with servers.own_server() as server:
        schema.migrate(server.dsn)
        yield server.dsn


@pytest.fixture
async def network(distant):
    """The way to the server. When a test is over, nothing of it is left there or here."""
    with proxy.proxy(distant) as network:
        yield network
        network.heal()
        await async_until(lambda: async_workers() == [])
    with psycopg.connect(distant, autocommit=True) as admin:
        others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> %s"
        await async_until(lambda: admin.execute(others, [admin.info.backend_pid]).fetchone() == (0,))


@pytest.fixture
async def direct(distant):
    """A store that does not take that way."""
    async with AsyncPostgresStreamStore(distant) as store:
        yield store
