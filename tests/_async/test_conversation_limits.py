"""Limits of the handler for prompts and stored conversations."""

from __future__ import annotations

import json

import pytest
from psycopg import AsyncRawCursor
from psycopg_pool import AsyncConnectionPool

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    WebRequest,
)

JSON = {"content-type": "application/json"}
LIMITS = {"max_prompt": 100, "max_conversation": 2000, "max_body": 3000}


class Chats:
    """A handler with small limits, whose answers are `answer`."""

    def __init__(self, store, conversations):
        self.store = store
        self.conversations = conversations
        self.answer = "Hello"
        self.generations = []
        self.handler = AsyncStreamHandler(
            self.generate, store=store, conversations=conversations, public=True, **LIMITS
        )

    async def generate(self, generation):
        self.generations.append(generation)
        yield self.answer

    async def post(self, path, body):
        """Send a request. Return the status and the JSON error, if there is one, after all producers have ended."""
        encoded = json.dumps(body, ensure_ascii=False).encode()
        response = await self.handler.handle(WebRequest("POST", f"/__aibind__{path}", {}, JSON, encoded))
        if path in ("/complete", "/title") and response.status == 200:
            assert [text async for text in response.body] == [self.answer.encode()]
        assert await AsyncDurableStream.shutdown(self.store, 20)
        return response.status, json.loads(response.body).get("error") if response.status >= 400 else None

    async def turn(self, prompt="hi"):
        return await self.post("/stream", {"prompt": prompt, "sessionId": "s"})

    async def contents(self):
        return [message["content"] for message in (await self.conversations.load("s")).messages]


@pytest.fixture
async def chats(dsn, tables, conversations):
    async with (
        AsyncPostgresStreamStore(dsn, **tables) as store,
        AsyncPostgresConversationStore(dsn, table=conversations) as conversations_store,
    ):
        yield Chats(store, conversations_store)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/stream", lambda prompt: {"prompt": prompt}),
        ("/structured", lambda prompt: {"prompt": prompt}),
        ("/complete", lambda prompt: {"input": prompt}),
        ("/chat", lambda prompt: {"messages": [{"role": "user", "content": prompt}]}),
    ],
)
async def test_long_prompt_is_refused(chats, path, body):
    assert await chats.post(path, body("é" * 50)) == (200, None)
    for prompt in ("x" * 101, "é" * 51):
        assert await chats.post(path, body(prompt)) == (413, "the prompt must be at most 100 bytes long in UTF-8")
    assert len(chats.generations) == 1


async def test_long_answer_is_saved_and_large_conversation_is_refused_until_compacted(chats):
    assert (await chats.turn())[0] == 200
    chats.answer = "x" * 3000
    assert (await chats.turn())[0] == 200
    assert await chats.contents() == ["hi", "Hello", "hi", chats.answer]
    refused = "the conversation has more than 2000 bytes: summarise it with /compact, or start another conversation"
    assert await chats.turn() == (413, refused)
    assert len(chats.generations) == 2
    chats.answer = "in short"
    assert (await chats.post("/compact", {"messages": [], "sessionId": "s"}))[0] == 200
    assert len(chats.generations[-1].messages) == 4
    assert (await chats.turn())[0] == 200
    assert await chats.contents() == ["in short", "hi", "in short"]


async def test_limit_counts_bytes(chats):
    async with chats.conversations.edit("s") as chat:
        chat.append("é" * 900)
    assert (await chats.turn())[0] == 413


class RecordingClient:
    """A client on a pool that records the length of the longest text in the rows of its statements."""

    def __init__(self, pool):
        self.pool = pool
        self.longest = 0

    async def query(self, sql, params):
        async with self.pool.connection() as connection:
            cursor = AsyncRawCursor(connection)
            await cursor.execute(sql, params)
            rows = await cursor.fetchall() if cursor.description else []
        self.longest = max([self.longest, *(len(value) for row in rows for value in row if isinstance(value, str))])
        return rows


async def test_conversation_above_all_limits_is_not_transferred(chats, dsn, tables, conversations, caplog):
    async with chats.conversations.edit("s") as chat:
        chat.append("x" * 6000)
    async with AsyncConnectionPool(dsn, open=False) as pool:
        client = RecordingClient(pool)
        reader = Chats(chats.store, AsyncPostgresConversationStore(client, table=conversations))
        assert (await reader.turn())[0] == 413
        refused = "the conversation has more than 5000 bytes: start another conversation"
        assert await reader.post("/compact", {"messages": [], "sessionId": "s"}) == (413, refused)
        assert client.longest < 100  # the time of creation


async def test_answer_is_not_merged_into_a_conversation_above_all_limits(chats, caplog):
    async def generate(generation):
        async with chats.conversations.edit("s") as chat:
            chat.append({"role": "user", "content": "x" * 6000})
        yield "Hello"

    options = {"store": chats.store, "conversations": chats.conversations, "public": True, **LIMITS}
    chats.handler = AsyncStreamHandler(generate, **options)
    assert (await chats.turn())[0] == 200
    assert await chats.contents() == ["hi", "x" * 6000]
    assert "conversation 's' has more than 5000 bytes" in caplog.text
    [stream] = [info async for info in chats.store.list()]
    assert (stream.state, stream.total_chunks) == ("done", 1)


@pytest.mark.parametrize("option", ["max_prompt", "max_conversation"])
async def test_invalid_limit_raises(chats, option):
    with pytest.raises(ValueError, match=option):
        AsyncStreamHandler(chats.generate, store=chats.store, **{option: 0})
