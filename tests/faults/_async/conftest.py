"""A server that is reached through a faulty network and directly."""

from __future__ import annotations

import psycopg
import pytest
from support import proxy, servers
from support.concurrency import async_until, async_workers

from aibind_postgres import AsyncPostgresStreamStore, schema


@pytest.fixture(scope="module")
def server_dsn():
    with servers.own_server() as server:
        schema.migrate(server.dsn, partitions=servers.PARTITIONS)
        yield server.dsn


@pytest.fixture
async def network(server_dsn):
    """The proxy in front of the server. After the test no worker and no connection is left."""
    with proxy.proxy(server_dsn) as network:
        yield network
        network.heal()
        await async_until(lambda: async_workers() == [])
    with psycopg.connect(server_dsn, autocommit=True) as admin:
        others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> %s"
        await async_until(lambda: admin.execute(others, [admin.info.backend_pid]).fetchone() == (0,))


@pytest.fixture
async def direct(server_dsn):
    """A store that bypasses the proxy."""
    async with AsyncPostgresStreamStore(server_dsn) as store:
        yield store
