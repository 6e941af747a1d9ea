"""Fixtures for the tests of both flavours."""

from __future__ import annotations

import pytest
from psycopg import sql

from aibind_postgres import AsyncPostgresStreamStore
from aibind_postgres._async import combining
from aibind_postgres._concurrency import AsyncOneShotEvent


@pytest.fixture
async def other(dsn, tables):
    """A second store on the same tables. It stands for another process, since it shares no state with the first."""
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


@pytest.fixture
async def streams(dsn, tables):
    """A stream store, for tests whose `store` has conversations."""
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


@pytest.fixture
def table(schema_name):
    """The conversation table that the migrations of `tables` have created."""
    return sql.Identifier(schema_name, "conversations")


@pytest.fixture
def run(run_sql, table):
    """Run SQL on the table of conversations."""
    return lambda text: run_sql(sql.SQL(text).format(table))


@pytest.fixture
def queued(monkeypatch):
    """The events of calls that are in a queue, to be combined with others, or have been in one."""
    events = set()

    class RecordingEvent(AsyncOneShotEvent):
        async def wait(self, timeout):  # a call waits after it has queued
            events.add(self)
            return await super().wait(timeout)

    monkeypatch.setattr(combining, AsyncOneShotEvent.__name__, RecordingEvent)
    return events
