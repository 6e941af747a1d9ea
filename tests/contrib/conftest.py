"""The other side of each test of a client: a store on a connection string, as another process has it."""

from __future__ import annotations

import pytest
from psycopg.conninfo import make_conninfo

from aibind_postgres import AsyncPostgresStreamStore, PostgresStreamStore


# Its connections have a name, so that a test which ends the client's connections can leave these alone.
@pytest.fixture
def theirs(dsn, tables):
    with PostgresStreamStore(make_conninfo(dsn, application_name="stays"), **tables) as store:
        yield store


@pytest.fixture
async def async_theirs(dsn, tables):
    async with AsyncPostgresStreamStore(make_conninfo(dsn, application_name="stays"), **tables) as store:
        yield store
