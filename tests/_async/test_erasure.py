"""Erasure of the data of one owner: conversations and streams."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from psycopg import sql
from support.concurrency import AsyncBackground

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    SchemaError,
    StreamNotFoundError,
)


@pytest.fixture
async def store(dsn, tables, table):
    async with AsyncPostgresConversationStore(dsn, table=table, status_table=tables["status_table"]) as store:
        yield store


async def add(store, session_id, message="x", **options):
    async with store.edit(session_id, **options) as chat:
        chat.append(message)


async def test_all_data_of_one_owner_are_deleted(store, streams, run):
    for session_id, owner in (("a1", "ann"), ("a2", "ann"), ("a3", "ann"), ("b", "bob"), ("nobody", None)):
        await add(store, session_id, owner=owner)
    run("UPDATE {} SET expires_at = 0 WHERE session_id = 'a2'")
    ours = [
        await streams.create(session_id="a1", owner="ann"),
        await streams.create(session_id="a1"),
        await streams.create(session_id="a2"),
        await streams.create(session_id="b", owner="ann"),
        await streams.create(owner="ann"),
    ]
    others = [
        await streams.create(session_id="b", owner="bob"),
        await streams.create(session_id="nobody"),
        await streams.create(owner="Ann"),
        await streams.create(),
    ]
    for id in (*ours, *others):
        await streams.append(id, "text")
    await streams.complete(ours[1])
    assert await store.delete_owner("ann", streams=streams) == (3, 5)
    assert sorted([info.id async for info in streams.list()]) == sorted(others)
    assert [info.session_id async for info in store.list()] == ["nobody", "b"]
    assert (await store.load("a1")).is_empty
    for id in others:
        assert (await streams.get_status(id)).total_chunks == 1
    assert await store.delete_owner("ann", streams=streams) == (0, 0)
    run("DO $$ BEGIN ASSERT (SELECT count(*) FROM {}) = 2; END $$")


async def test_chunks_of_an_owner_are_deleted(store, streams, tables, run_sql, monkeypatch):
    monkeypatch.setattr(f"{type(streams._deleter).__module__}.MAX_CHUNKS", 10)
    id = await streams.create(owner="ann")
    await streams.append_many(id, [f"{number}" for number in range(35)])
    assert await store.delete_owner("ann", streams=streams) == (0, 1)
    for name in ("chunks_table", "status_table"):
        run_sql(sql.SQL("DO $$ BEGIN ASSERT NOT EXISTS (SELECT 1 FROM {}); END $$").format(tables[name]))


async def test_many_conversations_of_an_owner(store, streams, monkeypatch):
    monkeypatch.setattr(f"{type(store).__module__}.MAX_ROWS", 3)
    for number in range(8):
        await add(store, f"{number}", owner="ann" if number != 4 else "bob")
        await streams.create(session_id=f"{number}")
    assert await store.delete_owner("ann", streams=streams) == (7, 7)
    assert [info.session_id async for info in store.list()] == ["4"]
    assert [info.session_id async for info in streams.list()] == ["4"]


async def test_streams_alone(store, streams):
    await streams.create(owner="ann")
    await streams.create("b", owner="bob")
    assert await streams.delete_owner("ann") == 1
    assert [info.id async for info in streams.list()] == ["b"]
    await add(store, "s", owner="ann")
    assert await store.delete_owner("ann", streams=None) == (1, 0)


async def test_readers_and_producers_find_the_stream_deleted(store, streams, other):
    await add(store, "s", owner="ann")
    id = await streams.create(session_id="s")
    finished = []

    async def endless():
        while True:
            yield "x"

    async def read():
        return [chunk async for chunk in other.read_from(id)]

    def finish(text, status):
        finished.append(status)

    stream = await AsyncDurableStream.start(streams, endless(), owner="ann", on_finish=finish)
    async with AsyncBackground(read) as reader, AsyncBackground(partial(other.wait, stream.id)) as waiter:
        assert await store.delete_owner("ann", streams=other) == (1, 2)
        for background in (reader, waiter):
            with pytest.raises(StreamNotFoundError):
                await background.result()
    assert await AsyncDurableStream.shutdown(streams, 20)
    assert finished == [None]


async def test_conversation_that_gets_another_owner_meanwhile_is_kept(store, dsn, tables):
    await add(store, "s", owner="ann")

    class Transferring(AsyncPostgresStreamStore):
        """A store that transfers the conversation before it deletes the streams."""

        async def _delete_all(self, session_id, owner):
            await store.describe("s", owner="bob")
            return await super()._delete_all(session_id, owner)

    async with Transferring(dsn, **tables) as streams:
        assert await store.delete_owner("ann", streams=streams) == (0, 0)
    assert (await store.get_info("s")).owner == "bob"


async def test_stream_tables_without_the_migration(store, streams, run_sql, tables):
    await add(store, "s", owner="ann")
    run_sql(sql.SQL("ALTER TABLE {} DROP COLUMN lease_until, DROP COLUMN owner").format(tables["status_table"]))
    with pytest.raises(SchemaError, match="0004"):
        await store.delete_owner("ann", streams=streams)
    assert len(await store.load("s")) == 1


async def test_erasure_in_a_transaction(dsn, tables, table, store, streams):
    await add(store, "s", owner="ann")
    await streams.create("a", session_id="s")
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        ours = AsyncPostgresConversationStore(connection, table=table)
        assert await ours.delete_owner("ann", streams=AsyncPostgresStreamStore(connection, **tables)) == (1, 1)
        await connection.rollback()
    assert len(await store.load("s")) == 1
    assert (await streams.get_status("a")).state == "active"
