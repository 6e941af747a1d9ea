"""Servers that are away, read-only, or replaced by a standby: nothing acknowledged is lost, and calls recover."""

from __future__ import annotations

from functools import partial

import pytest
from support.concurrency import AsyncBackground, async_sleep

from aibind_postgres import AsyncPostgresStreamStore

HANG = 60  # seconds after which a call counts as hanging

pytestmark = pytest.mark.timeout(600)


async def test_single_call_waits_for_a_restarted_server(disposable_server):
    async with AsyncPostgresStreamStore(disposable_server.dsn) as store:
        id = await store.create()
        disposable_server.stop()
        async with AsyncBackground(partial(store.append, id, "a")) as appending:
            await async_sleep(8)  # a pool that doubles its pauses connects after 7 and after 15 seconds
            disposable_server.start()
            assert await appending.result(HANG) == 1  # the pool gives up waiting after 10 seconds
