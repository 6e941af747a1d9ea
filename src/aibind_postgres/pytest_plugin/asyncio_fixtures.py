"""The asynchronous stores for tests of pytest-asyncio, in its strict and its auto mode."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest_asyncio

if TYPE_CHECKING:
    from .. import AsyncPostgresConversationStore, AsyncPostgresStreamStore


@pytest_asyncio.fixture
async def _asyncio_stream_store(_aibind_postgres_empty: str) -> AsyncIterator[AsyncPostgresStreamStore]:
    from .. import AsyncPostgresStreamStore

    async with AsyncPostgresStreamStore(_aibind_postgres_empty) as store:
        yield store


@pytest_asyncio.fixture
async def _asyncio_conversation_store(_aibind_postgres_empty: str) -> AsyncIterator[AsyncPostgresConversationStore]:
    from .. import AsyncPostgresConversationStore

    async with AsyncPostgresConversationStore(_aibind_postgres_empty) as store:
        yield store
