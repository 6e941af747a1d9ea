"""A housekeeper survives an outage of the server."""

from __future__ import annotations

import logging

import psycopg
from support.concurrency import async_until

from aibind_postgres import AsyncHousekeeper, AsyncPostgresConversationStore, AsyncPostgresStreamStore


async def test_housekeeper_continues_after_an_outage(disposable_server, caplog):
    caplog.set_level(logging.INFO, logger="aibind_postgres")
    dsn = disposable_server.dsn
    async with (
        AsyncPostgresStreamStore(dsn) as store,
        AsyncPostgresConversationStore(dsn) as chats,
        AsyncHousekeeper(store, chats, every=0.1),
    ):
        disposable_server.kill()

        def records():  # the pool has a logger of its own
            return [record for record in caplog.records if record.name.startswith("aibind_postgres")]

        await async_until(lambda: len(records()) >= 4)
        for record in records():
            assert record.levelno == logging.WARNING
            assert "tried again in 0.1 seconds" in record.getMessage()
        disposable_server.start()
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
            await admin.execute("INSERT INTO aibind_stream_status VALUES ('s', 'done', NULL, 0, 1)")
            await admin.execute("INSERT INTO aibind_conversations VALUES ('s', '', 1)")

        def infos():
            return [record.getMessage() for record in records() if record.levelno == logging.INFO]

        await async_until(lambda: len(infos()) == 2)
        assert [text.partition('": ')[2] for text in sorted(infos(), reverse=True)] == [
            "streams deleted: 1",
            "conversations deleted: 1",
        ]
