"""`get_stats` returns the measures and counters of a store without a statement."""

from __future__ import annotations

import re
import sys
import threading
from functools import partial
from pathlib import Path

import psycopg
import pytest
from _async.sources import SilentSource
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_until, run_python
from support.recording import AsyncRecordingClient
from support.sessions import TERMINATE

from aibind_postgres import AsyncDurableStream, AsyncPostgresConversationStore, AsyncPostgresStreamStore
from aibind_postgres._async import appending, combining
from aibind_postgres._async.listening import AsyncListenConnection
from aibind_postgres._concurrency import AsyncEvent


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


async def collect(store, id):
    return [chunk.data async for chunk in store.read_from(id)]


def counts(store, *names):
    stats = store.get_stats()
    return tuple(stats[name] for name in names)


async def test_readers_and_the_listener(admin_dsn, store, other):
    id = await store.create()
    names = ("streams_followed", "readers_open", "readers_waiting", "listening", "polling", "listener_reconnects")
    assert counts(store, *names) == (0, 0, 0, 0, 0, 0)
    async with AsyncBackground(partial(collect, store, id)) as first, AsyncBackground(partial(collect, store, id)):
        await async_until(lambda: counts(store, *names) == (1, 2, 2, 1, 0, 0))
        async with await psycopg.AsyncConnection.connect(admin_dsn) as admin:
            await admin.execute(TERMINATE)
        await async_until(lambda: counts(store, *names) == (1, 2, 2, 1, 0, 1))
        await other.complete(id)
        await first.result()
    assert counts(store, *names[:3]) == (0, 0, 0)


async def test_connection_listens_when_the_server_has_answered(admin_dsn, store, monkeypatch):
    async def listen(connection):
        waiting.append(connection)
        await answered.wait(30)
        await original(connection)

    original = AsyncListenConnection._listen
    waiting, answered = [], AsyncEvent()
    monkeypatch.setattr(AsyncListenConnection, "_listen", listen)
    id = await store.create()
    async with AsyncBackground(partial(collect, store, id)):
        for attempt in (1, 2):  # the second one is a reconnect
            await async_until(lambda attempt=attempt: len(waiting) == attempt)
            assert counts(store, "listening", "polling") == (0, 1)
            answered.set()
            await async_until(lambda: counts(store, "listening", "polling") == (1, 0))
            answered.clear()
            if attempt == 1:
                async with await psycopg.AsyncConnection.connect(admin_dsn) as admin:
                    await admin.execute(TERMINATE)
        await store.complete(id)


async def test_polling_without_notifications(dsn, tables):
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresStreamStore(client, **tables) as store:
        id = await store.create()
        async with AsyncBackground(partial(collect, store, id)):
            await async_until(lambda: counts(store, "readers_waiting", "listening", "polling") == (1, 0, 1))
            await store.complete(id)


async def test_writers_and_producers(store):
    id = await store.create()
    names = ("readers_open", "writers_open", "producers_running")
    async with store.writer(id) as writer:
        await writer.write("text")
        assert counts(store, *names) == (0, 1, 0)
        source = SilentSource()
        stream = await AsyncDurableStream.start(store, source)
        await async_until(lambda: source.is_started)
        assert counts(store, *names) == (0, 2, 1)
        await store.stop(stream.id)
        await async_until(lambda: counts(store, *names) == (0, 1, 0))
    assert counts(store, *names) == (0, 0, 0)


async def test_appends_that_share_a_statement(store, monkeypatch):
    monkeypatch.setattr(combining, "TAKEOVER_TIMEOUT", 60)
    monkeypatch.setattr(appending, "LANES", 1)
    id = await store.create()
    assert await store.append_many(id, ["a", "b"]) == 2
    before = store.get_stats()
    assert (before["appends_num"], before["appends_combined"], before["chunks_num"]) == (1, 0, 2)
    await async_gather(*[partial(store.append, id, "text")] * 20)
    after = store.get_stats()
    assert (after["appends_num"], after["chunks_num"]) == (21, 22)
    statements = after["statements_num"] - before["statements_num"]
    # Of each statement with several appends, all are counted.
    assert 20 - after["appends_combined"] <= statements < 20
    assert 0 < after["appends_combined"] < 20


async def test_no_chunk_of_concurrent_appends_is_lost_from_the_count(store):
    id = await store.create()

    async def append_some():
        for _ in range(100):
            await store.append(id, "text")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        await async_gather(*[append_some] * 8)
    finally:
        sys.setswitchinterval(interval)
    assert counts(store, "appends_num", "chunks_num") == (800, 800)


async def test_statements_and_errors(store, conversations, dsn):
    await store.create("id")
    before = counts(store, "statements_num", "statements_errors")
    await store.get_status("id")
    assert counts(store, "statements_num", "statements_errors") == (before[0] + 1, before[1])
    async with AsyncPostgresConversationStore(dsn, table=conversations) as chats:
        assert not await chats.touch("id")
        assert counts(chats, "statements_num", "statements_errors") == (1, 0)
        assert chats.get_stats()["pool_max"] == 10
    async with AsyncPostgresConversationStore(dsn, table="nowhere") as chats:
        with pytest.raises(Exception, match="nowhere"):
            await chats.touch("id")
        assert counts(chats, "statements_num", "statements_errors") == (1, 1)


async def test_pool_of_the_caller_is_not_included(dsn, tables):
    async with AsyncConnectionPool(dsn, open=False) as pool, AsyncPostgresStreamStore(pool, **tables) as store:
        assert not {name for name in store.get_stats() if name.startswith(("pool", "requests"))}


async def test_call_in_another_thread_and_after_close(store):
    await store.create()
    await store.close()
    found = []
    thread = threading.Thread(target=lambda: found.append(store.get_stats()))
    thread.start()
    thread.join()
    assert found == [store.get_stats()]
    assert {type(value) for value in found[0].values()} == {int}


def test_forked_process_raises(dsn):
    code = """
import os, sys
import aibind_postgres
with aibind_postgres.PostgresStreamStore(sys.argv[1]) as store:
    store.check()
    if os.fork() == 0:
        try:
            store.get_stats()
        except aibind_postgres.ForkedError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
"""
    with run_python(code, dsn) as process:
        assert process.wait() == 0


async def test_every_name_is_documented(store):
    await store.create()
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    section = page.partition("\n## Statistics\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    names = {name for name in store.get_stats() if not re.match("(pool|requests|connections|returns|usage)_", name)}
    assert names == documented - {"pool_size"}
