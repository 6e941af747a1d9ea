"""The conversation store, with all kinds of table names."""

from __future__ import annotations

import json
from datetime import timedelta

import psycopg
import pytest

from aibind_postgres import (
    AsyncPostgresConversationStore,
    ChatHistory,
    ConversationConflictError,
    ConversationInfo,
    InvalidDataError,
    InvalidHistoryError,
    SchemaError,
    StoreClosedError,
)
from aibind_postgres._async import conversation_store
from aibind_postgres.models import NEVER_MS

pytestmark = pytest.mark.parametrize(
    "conversations",
    ["plain", "quotes", "mixed case", "spaces", "keywords", "63 bytes", "formats"],
    indirect=True,
)

TEXTS = ["", "emoji 👩‍👩‍👧 and é", "\0\x01\ufffe\ud800", "'; DROP TABLE x; --", '"\\\n\r\t', "{}%s$1 :p", "x" * 100_000]


@pytest.fixture
async def store(dsn, conversations):
    async with AsyncPostgresConversationStore(dsn, table=conversations) as store:
        yield store


@pytest.fixture
async def run(admin_dsn, conversations):
    """Run SQL on the table over a separate connection, and return the rows."""
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as connection:

        async def run(statement, *params):
            cursor = psycopg.AsyncRawCursor(connection)
            await cursor.execute(statement.replace("TABLE", conversations.as_string(None)), params)
            return await cursor.fetchall() if cursor.description else []

        yield run


async def expire(run, session_id):
    await run("UPDATE TABLE SET expires_at = 0 WHERE session_id = $1", session_id)


async def expiry(run, session_id):
    """Return the time at which a conversation expires, in milliseconds since the epoch."""
    [(expires_at,)] = await run("SELECT expires_at FROM TABLE WHERE session_id = $1", session_id)
    return expires_at


async def server_time(run):
    """Return the time of the server in milliseconds since the epoch, rounded as expires_at is."""
    [(now,)] = await run("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
    return now


async def test_save_and_load(store):
    chat = await store.load("s")
    assert (chat.messages, chat.is_empty) == ([], True)
    for text in TEXTS:
        chat.append({"role": "user", "content": text}, {"note": text})
    chat.edit(chat.node_ids[2], {"role": "user", "content": [{"type": "text", "text": "x"}, 1.5, None, True]})
    await store.save("s", chat)
    again = await store.load("s")
    assert again.to_json() == chat.to_json()
    assert again.messages == chat.messages
    assert len(again) == len(TEXTS) + 1


async def test_row_is_the_document(store, run):
    chat = ChatHistory()
    chat.append("x")
    await store.save("s", chat)
    assert await run("SELECT session_id, data FROM TABLE") == [("s", chat.to_json())]


async def test_sessions_are_separate(store):
    for session_id in ("s", "S", "ß", "s ", "'; --", "x" * 1024):
        async with store.edit(session_id) as chat:
            chat.append(session_id)
    for session_id in ("s", "S", "ß", "s ", "'; --", "x" * 1024):
        assert (await store.load(session_id)).messages == [session_id]
    assert await store.delete("s") is True
    assert (await store.load("S")).messages == ["S"]


async def test_edit_saves_changes(store):
    async with store.edit("s") as chat:
        first = chat.append("first")
    async with store.edit("s") as chat:
        assert chat.messages == ["first"]
        chat.edit(first, "other")
    again = await store.load("s")
    assert (again.messages, again.alternative_count(first)) == (["other"], 2)


async def test_edit_does_not_save_after_an_exception_or_without_changes(store, run):
    async with store.edit("s"):
        pass
    assert await run("SELECT FROM TABLE") == []
    async with store.edit("s") as chat:
        chat.append("first")
    before = await run("SELECT *, xmin::text FROM TABLE")
    with pytest.raises(ZeroDivisionError):
        async with store.edit("s") as chat:
            chat.append("second")
            raise ZeroDivisionError
    async with store.edit("s") as chat:
        chat.append("second")
        chat.tree.remove(chat.node_ids[1])
    assert await run("SELECT *, xmin::text FROM TABLE") == before


async def test_edit_passes_on_conflict_to_save(store):
    with pytest.raises(ConversationConflictError):
        async with store.edit("s", on_conflict="raise") as ours:
            ours.append("ours")
            async with store.edit("s") as theirs:
                theirs.append("theirs")
    async with store.edit("s", on_conflict="overwrite") as ours:
        ours.compact("ours")
        async with store.edit("s") as theirs:
            theirs.append("more")
    assert len(await store.load("s")) == 1
    async with store.edit("s") as ours:
        ours.append("ours")
        async with store.edit("s") as theirs:
            theirs.append("theirs")
    assert len(ours) == len(await store.load("s")) == 3


async def test_save_inside_edit(store):
    async with store.edit("s") as chat:
        chat.append("question")
        await store.save("s", chat)
        assert (await store.load("s")).messages == ["question"]
        chat.append("answer")
    assert (await store.load("s")).messages == ["question", "answer"]


async def test_without_a_ttl_nothing_expires(dsn, conversations, store, run):
    async with AsyncPostgresConversationStore(dsn, table=conversations, ttl=None) as endless:
        async with endless.edit("s") as chat:
            chat.append("hello")
        stored = await expiry(run, "s")
        # JavaScript's Number holds it exactly, and its Date accepts it.
        assert NEVER_MS < stored < min(2**53, 8_640_000_000_000_000)
        for each in (endless, store):
            assert [(info.session_id, info.expires_at) async for info in each.list()] == [("s", None)]

        async with endless.edit("s") as chat:
            chat.append("again")
        assert await endless.cleanup() == await store.cleanup() == 0
        assert (await store.load("s")).messages == ["hello", "again"]

        # The last store that saves or touches it decides.
        assert await store.touch("s") is True
        assert [info.expires_at is None async for info in endless.list()] == [False]
        assert await endless.touch("s") is True
        await endless.save("s", await endless.load("s"), on_conflict="overwrite")
        assert [info.expires_at async for info in store.list()] == [None]

        # An expired row counts as deleted, as with a ttl.
        await expire(run, "s")
        assert await endless.touch("s") is False
        assert [info async for info in endless.list()] == []
        async with endless.edit("s") as chat:
            assert chat.is_empty
            chat.append("new")
        assert (await endless.load("s")).messages == ["new"]
        await expire(run, "s")
        assert await endless.cleanup() == 1


async def test_rows_of_the_typescript_package_without_a_ttl(dsn, conversations, run):
    document = '{"version": 1, "nodes": {}, "rootIds": [], "activeLeafId": null}'
    async with AsyncPostgresConversationStore(dsn, table=conversations, ttl=None) as store:
        # Those with a ttl of 30 minutes, of Number.MAX_SAFE_INTEGER, and with the last date of JavaScript.
        for id, expires_at in (("a", await server_time(run) + 1_800_000), ("b", 2**53), ("c", 8_640_000_000_000_000)):
            await run("INSERT INTO TABLE (session_id, data, expires_at) VALUES ($1, $2, $3)", id, document, expires_at)
            assert (await store.load(id)).is_empty
        assert {info.session_id: info.expires_at is None async for info in store.list()} == {
            "a": False,
            "b": True,
            "c": True,
        }
        assert await store.touch("a") is True
        assert [info.expires_at async for info in store.list()] == [None] * 3
        assert await store.cleanup() == 0


async def test_save_and_touch_restart_the_ttl(dsn, conversations, run):
    for ttl in (60, timedelta(minutes=1)):
        async with AsyncPostgresConversationStore(dsn, table=conversations, ttl=ttl) as store:
            chat = await store.load("s")
            for renew in (store.save, store.touch):
                await run("UPDATE TABLE SET expires_at = expires_at - 30000")
                before = await server_time(run)
                await renew(*(("s", chat) if renew == store.save else ("s",)))
                after = await server_time(run)
                assert before + 60_000 <= await expiry(run, "s") <= after + 60_000
            await run("UPDATE TABLE SET expires_at = expires_at - 30000")
            expires_at = await expiry(run, "s")
            await store.load("s")
            async with store.edit("s"):
                pass
            assert await expiry(run, "s") == expires_at


async def test_expired_conversation_is_treated_as_deleted(store, run):
    async with store.edit("s") as chat:
        chat.append("old")
    await expire(run, "s")
    assert (await store.load("s")).is_empty
    assert await store.touch("s") is False
    assert [info async for info in store.list()] == []
    assert (await store.load("s")).is_empty
    async with store.edit("s") as chat:
        chat.append("new")
    assert (await store.load("s")).messages == ["new"]
    await expire(run, "s")
    assert await store.delete("s") is False
    assert await run("SELECT FROM TABLE") == []


@pytest.mark.parametrize("removal", ["expired", "cleaned up", "deleted"])
async def test_stale_save_does_not_restore_removed_messages(store, run, removal):
    async with store.edit("s") as chat:
        chat.append("old")
    chat.append("new")
    if removal == "deleted":
        await store.delete("s")
    else:
        await expire(run, "s")
        if removal == "cleaned up":
            await store.cleanup()
    with pytest.raises(ConversationConflictError) as caught:
        await store.save("s", chat, on_conflict="raise")
    assert caught.value.theirs.is_empty
    assert caught.value.ours is chat
    assert (await store.load("s")).is_empty
    await store.save("s", chat)
    assert chat.messages == (await store.load("s")).messages == ["new"]
    assert len(chat) == 1


async def test_touch_and_delete_return_whether_the_conversation_exists(store):
    assert (await store.touch("s"), await store.delete("s")) == (False, False)
    await store.save("s", ChatHistory())
    assert (await store.touch("s"), await store.delete("s"), await store.delete("s")) == (True, True, False)


async def test_list_is_paged_and_omits_expired_conversations(store, run, monkeypatch):
    monkeypatch.setattr(conversation_store, "LIST_PAGE_ROWS", 3)
    names = [f"s{number}" for number in range(7)]
    before = await server_time(run)
    for name in reversed(names):
        await store.save(name, ChatHistory())
    after = await server_time(run)
    await expire(run, "s4")
    infos = [info async for info in store.list()]
    assert [info.session_id for info in infos] == [name for name in names if name != "s4"]
    assert isinstance(infos[0], ConversationInfo)
    ttl = 1_800_000
    assert before + ttl <= round(infos[0].expires_at.timestamp() * 1000) <= after + ttl


async def test_cleanup_deletes_expired_conversations_and_returns_their_number(store, run):
    await run("INSERT INTO TABLE SELECT i::text, '{}', 0 FROM generate_series(1, 25) i")
    await store.save("s", ChatHistory())
    assert await store.cleanup() == 25
    assert await store.cleanup() == 0
    assert await run("SELECT session_id FROM TABLE") == [("s",)]


async def test_save_under_another_id_copies(store):
    async with store.edit("a") as chat:
        chat.append("x")
    await store.save("b", chat)
    assert len(await store.load("a")) == len(await store.load("b")) == len(chat) == 1
    chat.append("y")
    await store.save("b", chat)
    assert ((await store.load("a")).messages, (await store.load("b")).messages) == (["x"], ["x", "y"])


async def test_save_to_another_store(store, dsn, conversations):
    async with store.edit("a") as chat:
        chat.append("x")
    await store.delete("a")
    async with AsyncPostgresConversationStore(dsn, table=conversations) as other:
        await other.save("a", chat)  # the deletion in the first store is no conflict
        assert (await other.load("a")).messages == ["x"]


async def test_invalid_row_raises_and_is_kept(store, run):
    rows = {"text": "secret, not JSON", "null": "null", "nodes": '{"version":1,"nodes":[],"rootIds":[]}'}
    for session_id, data in rows.items():
        await run("INSERT INTO TABLE VALUES ($1, $2, 9e15)", session_id, data)
        chat = ChatHistory()
        chat.append("mine")
        for call in (
            lambda session_id=session_id: store.load(session_id),
            lambda session_id=session_id, chat=chat: store.save(session_id, chat),
            lambda session_id=session_id, chat=chat: store.save(session_id, chat, on_conflict="raise"),
        ):
            with pytest.raises(InvalidHistoryError) as caught:
                await call()
            assert "secret" not in str(caught.value)
        assert await run("SELECT data FROM TABLE WHERE session_id = $1", session_id) == [(data,)]
        assert chat.messages == ["mine"]
        await store.save(session_id, chat, on_conflict="overwrite")
        assert (await store.load(session_id)).messages == ["mine"]


async def test_unknown_fields_of_typescript_rows_are_kept(store, run):
    document = {
        "version": 1,
        "nodes": {"q": {"id": "q", "message": "m", "parentId": None, "children": [], "reactions": {"👍": 1}}},
        "rootIds": ["q"],
        "activeLeafId": "q",
        "title": "T",
    }
    await run("INSERT INTO TABLE VALUES ('s', $1, 9e15)", json.dumps(document))
    async with store.edit("s") as chat:
        chat.append("mine")
    [(data,)] = await run("SELECT data FROM TABLE")
    stored = json.loads(data)
    assert stored["title"] == "T"
    assert stored["nodes"]["q"]["reactions"] == {"👍": 1}
    assert list(stored["nodes"]) == ["q", chat.node_ids[-1]]


@pytest.mark.parametrize("session_id", ["", "\0", "\ud800", "x" * 1025, 7, None])
async def test_invalid_session_id_raises(store, session_id):
    for call in (
        lambda: store.load(session_id),
        lambda: store.save(session_id, ChatHistory()),
        lambda: store.touch(session_id),
        lambda: store.delete(session_id),
    ):
        with pytest.raises(InvalidDataError, match="a session id"):
            await call()
    with pytest.raises(InvalidDataError, match="a session id"):
        async with store.edit(session_id):
            pass


async def test_invalid_arguments_raise_before_any_statement(store, dsn, conversations):
    chat = ChatHistory()
    with pytest.raises(ValueError, match="merge, raise, overwrite"):
        await store.save("s", chat, on_conflict="ignore")
    with pytest.raises(ValueError, match="merge, raise, overwrite"):
        async with store.edit("s", on_conflict="ignore"):
            pass
    with pytest.raises(TypeError, match="not str"):
        await store.save("s", chat.to_json())
    with pytest.raises(ValueError, match="ttl"):
        AsyncPostgresConversationStore(dsn, table=conversations, ttl=0)
    with pytest.raises(ValueError, match="table"):
        AsyncPostgresConversationStore(dsn, table="")
    assert [info async for info in store.list()] == []


async def test_missing_table_raises(dsn, conversations):
    async with AsyncPostgresConversationStore(dsn, table="no such table") as store:
        with pytest.raises(SchemaError, match="no such table"):
            await store.load("s")


async def test_closed_store_raises(dsn, conversations):
    store = AsyncPostgresConversationStore(dsn, table=conversations)
    chat = await store.load("s")
    await store.close()
    await store.close()
    with pytest.raises(StoreClosedError):
        await store.save("s", chat)
    with pytest.raises(StoreClosedError):
        await store.load("s")
