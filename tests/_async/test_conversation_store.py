"""What every conversation store promises, under every kind of table name."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

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
async def run(dsn, conversations):
    """Run SQL on the table, as another program does, and return what it gives."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:

        async def run(statement, *params):
            cursor = psycopg.AsyncRawCursor(connection)
            await cursor.execute(statement.replace("TABLE", conversations.as_string(None)), params)
            return await cursor.fetchall() if cursor.description else []

        yield run


async def expire(run, session_id):
    await run("UPDATE TABLE SET expires_at = 0 WHERE session_id = $1", session_id)


async def remaining(run, session_id):
    """Return how many seconds a conversation has left."""
    [(seconds,)] = await run(
        "SELECT expires_at / 1000.0 - extract(epoch FROM now()) FROM TABLE WHERE session_id = $1", session_id
    )
    return float(seconds)


async def test_what_is_saved_is_loaded(store):
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


async def test_what_is_stored_is_the_document_and_no_more(store, run):
    chat = ChatHistory()
    chat.append("x")
    await store.save("s", chat)
    assert await run("SELECT session_id, data FROM TABLE") == [("s", chat.to_json())]


async def test_one_session_does_not_touch_another(store):
    for session_id in ("s", "S", "ß", "s ", "'; --", "x" * 1024):
        async with store.edit(session_id) as chat:
            chat.append(session_id)
    for session_id in ("s", "S", "ß", "s ", "'; --", "x" * 1024):
        assert (await store.load(session_id)).messages == [session_id]
    assert await store.delete("s") is True
    assert (await store.load("S")).messages == ["S"]


async def test_edit_saves_what_was_changed(store):
    async with store.edit("s") as chat:
        first = chat.append("first")
    async with store.edit("s") as chat:
        assert chat.messages == ["first"]
        chat.edit(first, "other")
    again = await store.load("s")
    assert (again.messages, again.alternative_count(first)) == (["other"], 2)


async def test_edit_leaves_the_row_alone_after_an_exception_or_without_a_change(store, run):
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


async def test_edit_says_what_a_save_does(store):
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


async def test_an_edit_can_be_saved_in_the_middle(store):
    async with store.edit("s") as chat:
        chat.append("question")
        await store.save("s", chat)
        assert (await store.load("s")).messages == ["question"]
        chat.append("answer")
    assert (await store.load("s")).messages == ["question", "answer"]


async def test_a_conversation_lives_for_its_ttl_after_it_was_saved_or_touched(dsn, conversations, run):
    for ttl in (60, timedelta(minutes=1)):
        async with AsyncPostgresConversationStore(dsn, table=conversations, ttl=ttl) as store:
            chat = await store.load("s")
            for renew in (store.save, store.touch):
                await run("UPDATE TABLE SET expires_at = expires_at - 30000")
                await renew(*(("s", chat) if renew == store.save else ("s",)))
                assert 50 < await remaining(run, "s") <= 60.1
            await run("UPDATE TABLE SET expires_at = expires_at - 30000")
            await store.load("s")
            async with store.edit("s"):
                pass
            assert await remaining(run, "s") < 31


async def test_what_has_expired_is_as_good_as_deleted(store, run):
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


@pytest.mark.parametrize("gone", ["expired", "cleaned up", "deleted"])
async def test_what_is_gone_does_not_come_back_by_a_stale_save(store, run, gone):
    async with store.edit("s") as chat:
        chat.append("old")
    chat.append("new")
    if gone == "deleted":
        await store.delete("s")
    else:
        await expire(run, "s")
        if gone == "cleaned up":
            await store.cleanup()
    with pytest.raises(ConversationConflictError) as caught:
        await store.save("s", chat, on_conflict="raise")
    assert caught.value.theirs.is_empty
    assert caught.value.ours is chat
    assert (await store.load("s")).is_empty
    await store.save("s", chat)
    assert chat.messages == (await store.load("s")).messages == ["new"]
    assert len(chat) == 1


async def test_touch_and_delete_say_whether_there_is_one(store):
    assert (await store.touch("s"), await store.delete("s")) == (False, False)
    await store.save("s", ChatHistory())
    assert (await store.touch("s"), await store.delete("s"), await store.delete("s")) == (True, True, False)


async def test_listing_is_in_the_order_of_the_ids_and_by_pages(store, run, monkeypatch):
    monkeypatch.setattr(conversation_store, "LIST_PAGE_ROWS", 3)
    names = [f"s{number}" for number in range(7)]
    for name in reversed(names):
        await store.save(name, ChatHistory())
    await expire(run, "s4")
    infos = [info async for info in store.list()]
    assert [info.session_id for info in infos] == [name for name in names if name != "s4"]
    assert isinstance(infos[0], ConversationInfo)
    assert abs(infos[0].expires_at - datetime.now(timezone.utc) - timedelta(seconds=1800)) < timedelta(seconds=60)


async def test_cleanup_deletes_what_has_expired_and_says_how_much(store, run):
    await run("INSERT INTO TABLE SELECT i::text, '{}', 0 FROM generate_series(1, 25) i")
    await store.save("s", ChatHistory())
    assert await store.cleanup(batch_size=10) == 25
    assert await store.cleanup() == 0
    assert await run("SELECT session_id FROM TABLE") == [("s",)]


async def test_a_history_saved_under_another_id_is_a_copy(store):
    async with store.edit("a") as chat:
        chat.append("x")
    await store.save("b", chat)
    assert len(await store.load("a")) == len(await store.load("b")) == len(chat) == 1
    chat.append("y")
    await store.save("b", chat)
    assert ((await store.load("a")).messages, (await store.load("b")).messages) == (["x"], ["x", "y"])


async def test_a_history_moves_from_store_to_store(store, dsn, conversations):
    async with store.edit("a") as chat:
        chat.append("x")
    await store.delete("a")
    async with AsyncPostgresConversationStore(dsn, table=conversations) as other:
        await other.save("a", chat)  # it does not matter to this one that it was deleted there
        assert (await other.load("a")).messages == ["x"]


async def test_a_broken_row_is_told_and_left_alone(store, run):
    rows = {"text": "secret, and no JSON", "null": "null", "nodes": '{"version":1,"nodes":[],"rootIds":[]}'}
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


async def test_rows_of_the_other_side_keep_what_is_unknown_here(store, run):
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
async def test_a_session_id_that_cannot_be_one_is_refused(store, session_id):
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


async def test_other_arguments_are_checked_before_anything_is_sent(store, dsn, conversations):
    chat = ChatHistory()
    with pytest.raises(ValueError, match="merge, raise, overwrite"):
        await store.save("s", chat, on_conflict="ignore")
    with pytest.raises(ValueError, match="merge, raise, overwrite"):
        async with store.edit("s", on_conflict="ignore"):
            pass
    with pytest.raises(TypeError, match="not str"):
        await store.save("s", chat.to_json())
    with pytest.raises(InvalidDataError, match="batch_size"):
        await store.cleanup(batch_size=0)
    with pytest.raises(ValueError, match="ttl"):
        AsyncPostgresConversationStore(dsn, table=conversations, ttl=0)
    with pytest.raises(ValueError, match="table"):
        AsyncPostgresConversationStore(dsn, table="")
    assert [info async for info in store.list()] == []


async def test_a_missing_table_is_told(dsn, conversations):
    async with AsyncPostgresConversationStore(dsn, table="no such table") as store:
        with pytest.raises(SchemaError, match="no such table"):
            await store.load("s")


async def test_a_closed_store_says_so(dsn, conversations):
    store = AsyncPostgresConversationStore(dsn, table=conversations)
    chat = await store.load("s")
    await store.close()
    await store.close()
    with pytest.raises(StoreClosedError):
        await store.save("s", chat)
    with pytest.raises(StoreClosedError):
        await store.load("s")
