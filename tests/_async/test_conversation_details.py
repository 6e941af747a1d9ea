"""Columns of migration 0004: the owner, title, metadata and times of a conversation, and lists by time."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from functools import partial

import psycopg
import pytest
from psycopg import sql
from support.concurrency import async_gather
from support.recording import AsyncRecordingClient

from aibind_postgres import (
    AsyncPostgresConversationStore,
    ChatHistory,
    ConversationInfo,
    InvalidDataError,
    SchemaError,
    schema,
)

TYPESCRIPT_UPSERT = """
INSERT INTO {} (session_id, data, expires_at)
VALUES ('s', '{{"version": 1, "nodes": {{}}, "rootIds": [], "activeLeafId": null}}', 9e15)
ON CONFLICT (session_id) DO UPDATE SET data = EXCLUDED.data, expires_at = EXCLUDED.expires_at
"""


@pytest.fixture
def names(tables, table):
    """The tables of a conversation store, as its keyword arguments."""
    return {"table": table, "status_table": tables["status_table"]}


@pytest.fixture
async def store(dsn, names):
    async with AsyncPostgresConversationStore(dsn, **names) as store:
        yield store


@pytest.fixture
def drop_0004(run):
    """Remove the columns of migration 0004."""
    columns = ("owner", "title", "metadata", "created_at", "updated_at")
    return partial(run, "ALTER TABLE {} " + ", ".join(f"DROP COLUMN {column}" for column in columns))


async def ids(infos):
    return [info.session_id async for info in infos]


async def add(store, session_id, message="x", **options):
    async with store.edit(session_id, **options) as chat:
        chat.append(message)


async def test_new_conversation_has_times_and_nothing_else(store):
    before = datetime.now(timezone.utc) - timedelta(minutes=1)
    await add(store, "s")
    info = await store.get_info("s")
    assert [info] == [info async for info in store.list()]
    assert info._replace(created_at=None, updated_at=None, expires_at=None) == ConversationInfo("s")
    assert before < info.created_at == info.updated_at < before + timedelta(minutes=2)
    assert info.expires_at > info.updated_at
    assert await store.get_info("other") is None


async def test_save_sets_updated_at_and_keeps_the_rest(store):
    await add(store, "s", owner="ann")
    await store.describe("s", title="T", metadata={"pinned": [True, None, "ö"]})
    before = await store.get_info("s")
    assert before[:4] == ("s", "ann", "T", {"pinned": [True, None, "ö"]})
    stale = await store.load("s")
    for on_conflict in ("raise", "overwrite", "merge"):
        chat = stale if on_conflict == "merge" else await store.load("s")
        chat.append(on_conflict)
        await store.save("s", chat, on_conflict=on_conflict)
        after = await store.get_info("s")
        assert after.updated_at > before.updated_at
        assert after._replace(updated_at=None, expires_at=None) == before._replace(updated_at=None, expires_at=None)
        before = after


@pytest.mark.parametrize("on_conflict", ["merge", "raise", "overwrite"])
async def test_owner_of_a_save(store, on_conflict):
    chat = ChatHistory()
    for given, stored in ((None, None), ("ann", "ann"), (None, "ann"), ("bob", "bob")):
        await store.save("s", chat, on_conflict=on_conflict, owner=given)
        assert (await store.get_info("s")).owner == stored


async def test_owner_of_an_edit(store):
    async with store.edit("s", owner="ann"):
        pass
    assert await store.get_info("s") is None
    await add(store, "s", owner="ann")
    await add(store, "s")
    async with store.edit("s", owner="bob"):
        pass
    assert (await store.get_info("s")).owner == "ann"


@pytest.mark.parametrize("on_conflict", ["merge", "overwrite"])
async def test_conversation_after_an_expired_one_is_new(store, run, on_conflict):
    await add(store, "s", owner="ann")
    await store.describe("s", title="T", metadata=1)
    old = await store.get_info("s")
    run("UPDATE {} SET expires_at = 0")
    assert await store.get_info("s") is None
    assert await store.describe("s", title="U") is False
    await store.save("s", ChatHistory(), on_conflict=on_conflict)
    new = await store.get_info("s")
    assert new[1:4] == (None, None, None)
    assert new.created_at == new.updated_at > old.updated_at


async def test_describe_changes_the_given_fields_alone(store):
    assert await store.describe("s", title="T") is False
    await add(store, "s")
    await add(store, "other")
    old = await store.get_info("s")
    expected = old
    for change in (
        {"title": "T"},
        {"metadata": {"a": "\\u0000"}},
        {"owner": "ann"},
        {"title": ""},
        {"title": None},
        {"metadata": None, "owner": "bob", "title": "'; --"},
        {"owner": None},
        {},
    ):
        assert await store.describe("s", **change) is True
        expected = expected._replace(**change)
        assert await store.get_info("s") == expected
    assert (await store.load("s")).messages == ["x"]
    assert (await store.get_info("other"))[1:4] == (None, None, None)
    assert await ids(store.list()) == ["other", "s"]


async def test_describe_during_an_edit(store):
    async with store.edit("s") as chat:
        chat.append("x")
        await store.save("s", chat)
        chat.append("y")
        await store.describe("s", title="T", owner="ann")
    assert (await store.get_info("s"))[1:3] == ("ann", "T")


@pytest.mark.parametrize(
    "change",
    [{"title": 7}, {"title": "\0"}, {"metadata": {1}}, {"metadata": "\ud800"}, {"owner": ""}, {"owner": "x" * 1025}],
)
async def test_invalid_details_are_refused(store, change):
    await add(store, "s")
    before = await store.get_info("s")
    with pytest.raises(InvalidDataError):
        await store.describe("s", **change)
    if "owner" in change:
        for call in (
            lambda: store.save("s", ChatHistory(), **change),
            lambda: add(store, "s", **change),
            lambda: ids(store.list(**change)),
            lambda: store.delete_owner(**change, streams=None),
        ):
            with pytest.raises(InvalidDataError, match="an owner"):
                await call()
    assert await store.get_info("s") == before


async def test_list_is_ordered_by_the_last_save(store):
    for session_id in "bac":
        await add(store, session_id)
    assert await ids(store.list()) == ["c", "a", "b"]
    await add(store, "b")
    await store.touch("a")
    await store.describe("c", title="T")
    assert await ids(store.list()) == ["b", "c", "a"]


async def test_pages_of_a_list(store, run):
    names = [f"{number}" for number in range(7)]
    for name in names:
        await add(store, name, owner="ann" if name in "024" else None)
    run("UPDATE {} SET updated_at = '2026-01-02 03:04:05.678901Z' WHERE session_id IN ('2', '3', '4')")
    run("UPDATE {} SET expires_at = 0 WHERE session_id = '5'")
    expected = ["6", "1", "0", "4", "3", "2"]
    for size in (1, 2, 3, 6, 7):
        found, page = [], []
        while page or not found:
            before = page[-1] if page else None
            if before is not None:  # a position that has passed through a URL
                before = ConversationInfo(
                    before.session_id, updated_at=datetime.fromisoformat(before.updated_at.isoformat())
                )
            page = [info async for info in store.list(limit=size, before=before)]
            assert len(page) <= size
            found += page
        assert [info.session_id for info in found] == expected
    first = [info async for info in store.list("ann", limit=2)]
    assert [info.session_id for info in first] == ["0", "4"]
    assert await ids(store.list("ann", before=first[-1])) == ["2"]
    assert await ids(store.list("' OR true --")) == []


async def test_long_list(store, monkeypatch):
    monkeypatch.setattr(f"{type(store).__module__}.LIST_PAGE_ROWS", 3)
    for number in range(8):
        await add(store, f"{number}", owner="ann" if number % 2 else None)
    assert await ids(store.list()) == list("76543210")
    assert await ids(store.list("ann")) == list("7531")
    for limit in (1, 3, 4, 6, 8, 9):
        assert await ids(store.list(limit=limit)) == list("76543210")[:limit]


async def test_conversations_of_before_the_migration_come_last(store, drop_0004, run_sql, tables, table):
    drop_0004()
    for session_id in "bac":
        await add(store, session_id)
    run_sql(schema.render(**tables, conversations_table=table))
    assert await ids(store.list("nobody")) == []  # finds the migration
    await add(store, "new")
    await add(store, "a")
    infos = [info async for info in store.list()]
    assert [info.session_id for info in infos] == ["a", "new", "c", "b"]
    assert [info.created_at is None for info in infos] == [True, False, True, True]
    assert [info.updated_at is None for info in infos] == [False, False, True, True]
    assert await ids(store.list(before=infos[1])) == ["c", "b"]
    assert await ids(store.list(before=infos[2])) == ["b"]


@pytest.mark.parametrize("time", ["infinity", "-infinity", "0044-03-15 00:00Z BC", "20000-01-01 00:00Z"])
async def test_time_out_of_range_is_none(store, run, time):
    await add(store, "s")
    run(f"UPDATE {{}} SET created_at = '{time}'")
    assert (await store.get_info("s")).created_at is None
    await add(store, "s")
    assert (await store.load("s")).messages == ["x", "x"]


async def test_invalid_arguments_of_list_raise_at_the_call(store):
    for arguments, error, text in (
        ({"limit": 0}, InvalidDataError, "limit"),
        ({"limit": True}, InvalidDataError, "limit"),
        ({"before": "s"}, TypeError, "ConversationInfo"),
        ({"before": ConversationInfo("")}, InvalidDataError, "a session id"),
        ({"before": ConversationInfo("s", updated_at=datetime(2026, 1, 1))}, ValueError, "time zone"),
    ):
        with pytest.raises(error, match=text):
            store.list(**arguments)


async def test_active_stream_is_the_newest_running_one(store, streams):
    await add(store, "s")
    await add(store, "other")

    async def active():
        listed = {info.session_id: info.active_stream_id async for info in store.list()}
        for session_id, stream_id in listed.items():
            assert (await store.get_info(session_id)).active_stream_id == stream_id
        return listed

    assert await active() == {"s": None, "other": None}
    await streams.create("1", session_id="s")
    await streams.create("2", session_id="s")
    await streams.create("3", session_id="without a conversation")
    assert await active() == {"s": "2", "other": None}
    await streams.complete("2")
    assert await active() == {"s": "1", "other": None}
    await streams.delete("1")
    assert await active() == {"s": None, "other": None}


@pytest.mark.parametrize("status", ["missing", "without 0004", "of a foreign shape"])
async def test_active_stream_without_a_status_table(dsn, table, store, run_sql, schema_name, status):
    status_table = sql.Identifier(schema_name, "other")
    if status == "without 0004":
        run_sql(sql.SQL("CREATE TABLE {} (id text PRIMARY KEY, state text)").format(status_table))
    elif status == "of a foreign shape":
        run_sql(sql.SQL("CREATE SEQUENCE {}").format(status_table))
    await add(store, "s", owner="ann")
    async with AsyncPostgresConversationStore(dsn, table=table, status_table=status_table) as other:
        assert await other.get_info("s") == await store.get_info("s")
        assert [info.active_stream_id async for info in other.list("ann")] == [None]


async def test_active_stream_without_the_right_to_read_it(dsn, store, streams, names, run_sql, schema_name):
    role = f"{schema_name}_role".lower()
    await add(store, "s")
    await streams.create("1", session_id="s")
    run_sql(
        sql.SQL("CREATE ROLE {0}; GRANT USAGE ON SCHEMA {1} TO {0}; GRANT ALL ON {2} TO {0}").format(
            sql.Identifier(role), sql.Identifier(schema_name), names["table"]
        )
    )
    try:
        options = f"-c role={role}"
        async with await psycopg.AsyncConnection.connect(dsn, options=options, autocommit=True) as connection:
            async with AsyncPostgresConversationStore(connection, **names) as other:
                assert [(info.session_id, info.active_stream_id) async for info in other.list()] == [("s", None)]
    finally:
        run_sql(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


async def test_same_name_for_both_tables_is_refused(dsn):
    with pytest.raises(ValueError, match="must differ"):
        AsyncPostgresConversationStore(dsn, table="x", status_table="x")


async def test_typescript_writer_keeps_owner_and_title(store, run):
    run(TYPESCRIPT_UPSERT)
    first = await store.get_info("s")
    assert first.created_at is not None
    assert first.updated_at is not None
    await add(store, "s", owner="ann")
    await store.describe("s", title="T", metadata=[1])
    before = await store.get_info("s")
    run(TYPESCRIPT_UPSERT)
    assert (await store.get_info("s"))._replace(expires_at=None) == before._replace(expires_at=None)


async def test_concurrent_first_saves_keep_one_time_of_creation(store):
    await async_gather(*(partial(add, store, "s", f"{number}", owner="ann") for number in range(8)))
    assert len(await store.load("s")) == 8
    info = await store.get_info("s")
    assert info.created_at < info.updated_at
    assert info.owner == "ann"


async def test_client_without_psycopg(dsn, names):
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresConversationStore(client, **names) as store:
        await add(store, "s", owner="ann")
        assert await store.describe("s", title="T", metadata={"a": 1}) is True
        [info] = [info async for info in store.list("ann")]
        assert info[1:4] == ("ann", "T", {"a": 1})
        assert await ids(store.list(before=info)) == []
        assert await store.delete_owner("ann", streams=None) == (1, 0)


async def test_everything_else_works_without_the_migration(store, drop_0004):
    drop_0004()
    for session_id in "bcda":
        await add(store, session_id)
        await add(store, session_id)
    await store.save("a", ChatHistory(), on_conflict="overwrite")
    assert await store.delete("d") is True
    infos = [info async for info in store.list()]
    assert [info.session_id for info in infos] == ["a", "b", "c"]
    assert infos[0] == ConversationInfo("a", expires_at=infos[0].expires_at) == await store.get_info("a")
    assert await ids(store.list(limit=2)) == ["a", "b"]
    assert await ids(store.list(before=infos[0])) == ["b", "c"]
    for call in (
        lambda: store.save("a", ChatHistory(), owner="ann"),
        lambda: add(store, "a", owner="ann"),
        lambda: store.describe("a", title="T"),
        lambda: ids(store.list("ann")),
        lambda: store.delete_owner("ann", streams=None),
    ):
        with pytest.raises(SchemaError, match="0004"):
            await call()
    assert len(await store.load("a")) == 0


async def test_missing_migration_leaves_a_transaction_usable(dsn, names, drop_0004):
    drop_0004()
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        async with AsyncPostgresConversationStore(connection, **names) as store:
            await add(store, "s")
            with pytest.raises(SchemaError, match="0004"):
                await store.describe("s", title="T")
            await add(store, "s")
            await connection.commit()
            assert len(await store.load("s")) == 2


async def test_migration_is_looked_up_once_and_found_when_it_is_needed(dsn, names, tables, table, drop_0004, run_sql):
    drop_0004()
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresConversationStore(client, **names) as store:
        await add(store, "s")
        await ids(store.list())
        assert sum("pg_attribute" in statement.sql for statement in client.statements) == 1
        run_sql(schema.render(**tables, conversations_table=table))
        assert await store.describe("s", title="T") is True
        await add(store, "s", owner="ann")
        assert (await store.get_info("s"))[:3] == ("s", "ann", "T")
        assert sum("pg_attribute" in statement.sql for statement in client.statements) == 2


async def test_simultaneous_first_calls_share_the_look_up(dsn, names):
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresConversationStore(client, **names) as store:
        await async_gather(*(partial(store.load, f"{number}") for number in range(8)))
        assert sum("pg_attribute" in statement.sql for statement in client.statements) == 1
