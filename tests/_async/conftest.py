"""What several of these tests begin with."""

from __future__ import annotations

import pytest

from aibind_postgres import AsyncPostgresStreamStore


@pytest.fixture
async def other(dsn, tables):
    """A store that shares nothing with the test's own but the server, as in another process."""
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store
