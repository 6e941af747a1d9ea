"""Columns of migration 0004: the session, owner, metadata, ttl and lease of a stream."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from functools import partial

import psycopg
import pytest
from psycopg import sql
from support.concurrency import async_gather
from support.recording import AsyncRecordingClient

from aibind_postgres import (
    AsyncPostgresStreamStore,
    InvalidDataError,
    SchemaError,
    StreamExistsError,
    schema,
)
from aibind_postgres._async import stream_reads

DETAILS = {"session_id": "chat", "owner": "ann", "metadata": {"model": "ö", "n": [1, None]}, "ttl": 3600}


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


@pytest.fixture
def drop_0004(run_sql, tables):
    """Remove the columns of migration 0004."""

    def drop():
        columns = ("session_id", "owner", "metadata", "ttl_ms", "lease_until", "wire")
        drops = ", ".join(f"DROP COLUMN {column}" for column in columns)
        run_sql(sql.SQL(f"ALTER TABLE {{}} {drops}").format(tables["status_table"]))

    return drop


async def ids(streams):
    return [info.id async for info in streams]


async def test_details_are_stored(store):
    before = datetime.now(timezone.utc)
    id = await store.create(**DETAILS, lease=60)
    (info,) = [info async for info in store.list()]
    assert (info.session_id, info.owner, info.metadata) == ("chat", "ann", {"model": "ö", "n": [1, None]})
    assert info.ttl == timedelta(hours=1)
    assert timedelta(seconds=50) < info.lease_until - before < timedelta(seconds=120)
    assert await store.active("chat") == info
    assert info.id == id


async def test_stream_without_details_has_none(store):
    await store.create("a")
    (info,) = [info async for info in store.list()]
    assert info[6:] == (None, None, None, None, None, None)


async def test_active_is_the_newest_running_stream_of_the_session(store):
    assert await store.active("chat") is None
    await store.create("1", session_id="chat")
    await store.create("2", session_id="chat")
    await store.create("3", session_id="other")
    assert (await store.active("chat")).id == "2"
    await store.complete("2")
    assert (await store.active("chat")).id == "1"
    await store.delete("1")
    assert await store.active("chat") is None


async def test_list_of_a_session_and_of_an_owner(store):
    await store.create("1", session_id="a", owner="ann")
    await store.create("2", session_id="a", owner="bob")
    await store.create("3", session_id="b", owner="ann")
    await store.create("4")
    long_ago = datetime(2020, 1, 1, tzinfo=timezone.utc)
    for times in ({}, {"created_after": long_ago}):
        assert await ids(store.list(session_id="a", **times)) == ["1", "2"]
        assert await ids(store.list(session_id="a", owner="bob", **times)) == ["2"]
        assert await ids(store.list(owner="ann", **times)) == ["1", "3"]
        assert await ids(store.list(owner="ann", state="done", **times)) == []
        assert await ids(store.list(owner="' OR true --", **times)) == []
        assert await ids(store.list(**times)) == ["1", "2", "3", "4"]


async def test_long_list_of_an_owner(store, monkeypatch):
    monkeypatch.setattr(stream_reads, "LIST_PAGE_ROWS", 2)
    names = [str(number) for number in range(5)]
    for name in names:
        await store.create(name, owner="ann")
        await store.create(f"{name} of another", owner="bob")
    assert await ids(store.list(owner="ann")) == names
    assert await ids(store.list(owner="ann", created_before=datetime(9000, 1, 1, tzinfo=timezone.utc))) == names


async def test_ttl_of_a_stream_survives_stores_with_another_ttl(store, other):
    now = datetime.now(timezone.utc)

    async def remaining():
        (info,) = [info async for info in store.list()]
        return info.expires_at - now

    id = await store.create(ttl=timedelta(days=30))
    assert timedelta(days=30) <= await remaining() < timedelta(days=38)
    await other.append(id, "a")
    await other.append_many(id, ["b", "c"])
    await async_gather(*(partial(other.append, id, "d") for _ in range(10)))
    assert timedelta(days=30) <= await remaining() < timedelta(days=38)
    await other.complete(id)
    assert timedelta(days=29) < await remaining() < timedelta(days=31)


async def test_short_ttl_of_a_stream(store):
    id = await store.create(ttl=0.001)
    await store.append(id, "a")
    await store.complete(id)
    assert (await store.get_status(id)).state == "done"
    while (await store.cleanup()).streams == 0:
        pass
    assert await store.get_status(id) is None


@pytest.mark.parametrize(
    "details",
    [
        {"session_id": ""},
        {"owner": ""},
        {"owner": "\0"},
        {"owner": 1},
        {"session_id": "x" * 1025},
        {"metadata": {1, 2}},
        {"metadata": "\0"},
        {"metadata": "\ud800"},
        {"metadata": float("nan")},
    ],
)
async def test_invalid_details_are_refused(store, details):
    with pytest.raises(InvalidDataError):
        await store.create("a", **details)
    assert await store.get_status("a") is None


@pytest.mark.parametrize("details", [{"ttl": 0}, {"lease": -1}, {"ttl": 2e9}])
async def test_invalid_durations_are_refused(store, details):
    with pytest.raises(ValueError, match="seconds"):
        await store.acquire("a", **details)


async def test_backslash_u0000_in_metadata_is_not_a_nul_character(store):
    await store.create("a", metadata="\\u0000")
    assert [info.metadata async for info in store.list()] == ["\\u0000"]


async def test_existing_stream_keeps_its_details(store):
    await store.create("a", owner="ann")
    with pytest.raises(StreamExistsError):
        await store.create("a", owner="bob")
    assert await store.acquire("a", owner="bob", lease=1) is False
    assert [info.owner async for info in store.list()] == ["ann"]


async def test_details_of_a_client_without_psycopg(dsn, tables):
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresStreamStore(client, **tables) as store:
        id = await store.create(**DETAILS)
        await store.append(id, "a")
        assert (await store.active("chat")).metadata == DETAILS["metadata"]


async def test_everything_else_works_without_the_migration(store, drop_0004):
    drop_0004()
    id = await store.create()
    await store.append(id, "a")
    await store.append_many(id, ["b"])
    await store.complete(id)
    assert [chunk.data async for chunk in store.read_from(id)] == ["a", "b"]
    assert await ids(store.list()) == [id]
    for call in (
        partial(store.create, owner="ann"),
        partial(store.acquire, "x", lease=5),
        partial(store.active, "chat"),
        partial(ids, store.list(session_id="chat")),
    ):
        with pytest.raises(SchemaError, match="0004"):
            await call()


async def test_missing_migration_leaves_a_transaction_usable(dsn, tables, drop_0004):
    drop_0004()
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            await store.create("a")
            with pytest.raises(SchemaError, match="0004"):
                await store.create("b", owner="ann")
            await store.append("a", "text")
            await connection.commit()
            assert (await store.get_status("a")).total_chunks == 1


async def test_migration_is_found_when_it_is_needed(store, dsn, tables, drop_0004, schema_name, run_sql):
    drop_0004()
    await store.append(await store.create(), "a")
    with pytest.raises(SchemaError, match="0004"):
        await store.create(owner="ann")
    run_sql(schema.render(**tables, conversations_table=sql.Identifier(schema_name, "conversations")))
    assert (await store.active("chat")) is None
    await store.create("b", session_id="chat")
    assert (await store.active("chat")).id == "b"
