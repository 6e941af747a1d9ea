"""Fixtures for the tests of both flavours."""

from __future__ import annotations

import pytest

from aibind_postgres import AsyncPostgresStreamStore


@pytest.fixture
async def other(dsn, tables):
    """A second store on the same tables. It stands for another process, since it shares no state with the first."""
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store
