"""Answers of dead processes: the next request that loads the conversation ends and saves them, without a reader."""

from __future__ import annotations

import json
from datetime import timedelta
from time import monotonic

import pytest
from psycopg.sql import Identifier
from support.concurrency import async_sleep

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    WebRequest,
    _leases,
)

QUESTION = {"role": "user", "content": "first"}
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def quick_contact(monkeypatch):
    """Let a process trust the server after a fraction of a second."""
    monkeypatch.setattr(_leases, "CONTACT", 0.3)


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables, lease=0.05) as store:
        yield store


@pytest.fixture
async def conversations(dsn, tables, schema_name):
    async with AsyncPostgresConversationStore(dsn, table=Identifier(schema_name, "conversations")) as conversations:
        yield conversations


@pytest.fixture
def generations():
    return []


@pytest.fixture
def handler(store, conversations, generations):
    async def generate(generation):
        generations.append(generation)
        yield "second answer"

    return AsyncStreamHandler(generate, store=store, conversations=conversations, public=True)


async def ask_in_another_process(store, conversations, lease):
    """Store the question and the beginning of the answer, as another process does."""
    async with conversations.edit("chat") as chat:
        chat.append(QUESTION, {"streamId": "stream"})
    await store.create("stream", lease=lease, session_id="chat")
    await store.append("stream", "half an ans")


async def steady_contact(store):
    while not store._database.contact.is_steady(monotonic()):
        await store.get_status("stream")
        await async_sleep(0.02)


async def show(handler):
    response = await handler.handle(WebRequest("GET", "/__aibind__/conversations/chat", {}, {}, b""))
    history = json.loads(response.body)["history"]
    return {id: (node["message"]["content"], node["metadata"]) for id, node in history["nodes"].items()}


async def test_abandoned_answer_is_saved_when_the_conversation_is_shown(store, conversations, handler):
    await ask_in_another_process(store, conversations, 0.01)
    await steady_contact(store)
    assert (await show(handler))["stream"] == ("half an ans", {"state": "error"})
    assert await store.get_status("stream") == ("error", _leases.EXPIRED_TEXT, 1)


async def test_abandoned_answer_is_kept_for_a_day(store, conversations, handler):
    await ask_in_another_process(store, conversations, 0.01)
    await store.create("without a conversation", lease=0.01)
    await steady_contact(store)
    assert set(await store.fail_abandoned()) == {"stream", "without a conversation"}
    times = [(await store.get_info(id)).expires_at for id in ("stream", "without a conversation")]
    assert timedelta(hours=23) < times[0] - times[1] < timedelta(hours=25)


async def test_abandoned_answer_precedes_the_next_question(store, conversations, handler, generations):
    await ask_in_another_process(store, conversations, 0.01)
    await steady_contact(store)
    body = json.dumps({"prompt": "second", "sessionId": "chat"}).encode()
    response = await handler.handle(WebRequest("POST", "/__aibind__/stream", {}, JSON, body))
    assert [event async for event in response.body]
    assert [message["content"] for message in generations[0].messages] == ["first", "half an ans", "second"]


async def test_answer_of_a_living_process_is_left_alone(store, conversations, handler):
    await ask_in_another_process(store, conversations, 60)
    await steady_contact(store)
    assert [content for content, _ in (await show(handler)).values()] == ["first"]
    assert (await store.get_status("stream")).state == "active"
