"""Turns of the handler that end after the deletion of their conversation: they do not create it again."""

from __future__ import annotations

import json
import logging

import pytest

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresConversationStore,
    AsyncStreamHandler,
    ChatHistory,
    WebRequest,
)
from aibind_postgres._concurrency import AsyncEvent

JSON = {"content-type": "application/json"}


@pytest.fixture
async def store(dsn, tables, table):
    async with AsyncPostgresConversationStore(dsn, table=table, status_table=tables["status_table"]) as store:
        yield store


async def add(store, session_id, message="x", **options):
    async with store.edit(session_id, **options) as chat:
        chat.append(message)


class Turns:
    """A handler whose answer waits for the test."""

    def __init__(self, streams, store):
        self.streams = streams
        self.store = store
        self.reached = AsyncEvent()
        self.proceed = AsyncEvent()
        self.handler = AsyncStreamHandler(self.generate, store=streams, conversations=store, public=True)

    async def generate(self, generation):
        yield "Hel"
        self.reached.set()
        await self.proceed.wait(30)
        yield "lo"

    async def begin(self):
        """Begin a turn in conversation s."""
        body = json.dumps({"prompt": "hi", "sessionId": "s"}).encode()
        response = await self.handler.handle(WebRequest("POST", "/__aibind__/stream", {}, JSON, body))
        assert response.status == 200
        assert await self.reached.wait(30)
        return response.headers["X-Stream-Id"]

    async def end(self):
        """Let the turn end, and wait for its save."""
        self.proceed.set()
        assert await AsyncDurableStream.shutdown(self.streams, 20)

    async def contents(self):
        messages = (await self.store.load("s")).messages
        return [message["content"] if isinstance(message, dict) else message for message in messages]


@pytest.fixture
def turns(streams, store):
    return Turns(streams, store)


@pytest.fixture(params=["with 0004", "without 0004"])
def migration(request, run):
    """Tests run with and without the columns of migration 0004."""
    if request.param == "without 0004":
        columns = ("owner", "title", "metadata", "created_at", "updated_at")
        run("ALTER TABLE {} " + ", ".join(f"DROP COLUMN {column}" for column in columns))
    return request.param


async def test_turn_does_not_create_a_deleted_conversation_again(turns, store, streams, migration, caplog):
    caplog.set_level(logging.INFO, "aibind_postgres")
    await add(store, "s")
    id = await turns.begin()
    assert await store.delete("s") is True
    await turns.end()
    assert await store.get_info("s") is None
    assert (await streams.get_status(id)).state == "done"
    assert "conversation 's' was deleted during a turn" in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("end", ["stopped", "deleted"])
async def test_incomplete_turn_does_not_create_a_deleted_conversation_again(turns, store, streams, end):
    await add(store, "s")
    id = await turns.begin()
    await store.delete("s")
    await (streams.stop(id) if end == "stopped" else streams.delete(id))
    await turns.end()
    assert await store.get_info("s") is None


async def test_erasure_during_a_turn(turns, store, streams):
    await add(store, "s", owner="ann")
    await turns.begin()
    assert await store.delete_owner("ann", streams=streams) == (1, 1)
    await turns.end()
    assert await store.get_info("s") is None


async def test_turn_does_not_get_into_a_new_conversation_of_the_same_id(turns, store):
    await add(store, "s", "old")
    await turns.begin()
    await store.delete("s")
    await add(store, "s", "new")
    await turns.end()
    assert await turns.contents() == ["new"]


async def test_answer_is_added_to_a_conversation_that_has_changed(turns, store, migration):
    await add(store, "s", "old")
    id = await turns.begin()
    await add(store, "s", "other tab")
    await turns.end()
    assert await turns.contents() == ["old", "hi", "other tab"]
    assert [message["content"] for message in (await store.load("s")).tree.path_to(id).messages[1:]] == ["hi", "Hello"]


async def test_first_turn_creates_the_conversation_only_once(turns, store, migration):
    await turns.begin()
    assert await turns.contents() == ["hi"]
    await store.delete("s")
    await turns.end()
    assert await store.get_info("s") is None


async def test_first_turn_creates_the_conversation(turns, migration):
    await turns.begin()
    await turns.end()
    assert await turns.contents() == ["hi", "Hello"]


async def test_turn_in_a_conversation_of_before_the_migration(turns, store, run):
    await add(store, "s", "old")
    run("UPDATE {} SET created_at = NULL, updated_at = '-infinity'")
    await turns.begin()
    await turns.end()
    assert await turns.contents() == ["old", "hi", "Hello"]


async def test_conversation_that_expires_during_a_turn_is_kept(turns, store, run, migration):
    await add(store, "s", "old")
    await turns.begin()
    run("UPDATE {} SET expires_at = 0")
    await turns.end()
    assert await turns.contents() == ["old", "hi", "Hello"]


async def test_conversation_that_is_cleaned_up_during_a_turn_is_not_created_again(turns, store, run):
    await add(store, "s", "old")
    await turns.begin()
    run("UPDATE {} SET expires_at = 0")
    assert await store.cleanup() == 1
    await turns.end()
    assert await turns.contents() == []


async def test_title_and_owner_survive_a_turn(turns, store, run):
    await add(store, "s", owner="ann")
    await store.describe("s", title="T")
    before = await store.get_info("s")
    await turns.begin()
    run("UPDATE {} SET expires_at = 0")
    await turns.end()
    after = await store.get_info("s")
    assert after[:5] == before[:5]
    assert after.updated_at > before.updated_at


async def test_save_of_a_loaded_history_creates_the_conversation_again(store):
    await add(store, "s", "old")
    chat = await store.load("s")
    await store.delete("s")
    chat.append("new")
    await store.save("s", chat)
    assert (await store.load("s")).messages == ["new"]
    await store.delete("s")
    await store.save("s", ChatHistory())
    assert await store.get_info("s") is not None


async def test_compact_does_not_create_a_deleted_conversation_again(turns, store, migration):
    await add(store, "s", {"role": "user", "content": "old"})

    async def summarise(generation):
        await store.delete("s")
        yield "summary"

    handler = AsyncStreamHandler(summarise, store=turns.streams, conversations=store, public=True)
    body = json.dumps({"messages": [], "sessionId": "s"}).encode()
    response = await handler.handle(WebRequest("POST", "/__aibind__/compact", {}, JSON, body))
    assert response.status == 409
    assert await store.get_info("s") is None
