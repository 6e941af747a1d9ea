"""The statements of the TypeScript package on tables with all migrations: both sides read what the other writes."""

from __future__ import annotations

import json
import time

import psycopg
import pytest

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    ChatHistory,
    StreamNotActiveError,
)

STATEMENTS = {
    "create": "INSERT INTO {status} (id, state, total_chunks, expires_at) VALUES ($1, 'active', 0, $2)",
    "append": "WITH next AS (UPDATE {status} SET total_chunks = total_chunks + 1 WHERE id = $1 RETURNING total_chunks) "
    "INSERT INTO {chunks} (id, seq, data) SELECT $1, total_chunks, $2 FROM next",
    "read": "SELECT seq, data FROM {chunks} WHERE id = $1 AND seq > $2 ORDER BY seq",
    "status": "SELECT id, state, error, total_chunks FROM {status} WHERE id = $1",
    "end": "UPDATE {status} SET state = $2, error = $3 WHERE id = $1",
    "cleanup": "DELETE FROM {status} WHERE expires_at < $1 AND state <> 'active' RETURNING id",
    "cleanup chunks": "DELETE FROM {chunks} WHERE id = ANY($1::text[])",
    "load": "SELECT data FROM {conversations} WHERE session_id = $1 AND expires_at > $2",
    "save": "INSERT INTO {conversations} (session_id, data, expires_at) VALUES ($1, $2, $3) "
    "ON CONFLICT (session_id) DO UPDATE SET data = EXCLUDED.data, expires_at = EXCLUDED.expires_at",
    "delete": "DELETE FROM {conversations} WHERE session_id = $1",
    "cleanup conversations": "DELETE FROM {conversations} WHERE expires_at < $1",
}


def milliseconds(seconds=0):
    return round((time.time() + seconds) * 1000)


@pytest.fixture
async def typescript(dsn, tables, table):
    """A function that runs a statement of the TypeScript package."""
    names = {"chunks": tables["chunks_table"], "status": tables["status_table"], "conversations": table}
    opening = psycopg.AsyncConnection.connect(dsn, autocommit=True, cursor_factory=psycopg.AsyncRawCursor)
    async with await opening as connection:

        async def run(name, *params):
            statement = psycopg.sql.SQL(STATEMENTS[name]).format(**names)
            cursor = await connection.execute(statement, params)
            return await cursor.fetchall() if cursor.description else []

        yield run


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=0.05) as store:
        yield store


@pytest.fixture
async def conversations(dsn, tables, table):
    async with AsyncPostgresConversationStore(dsn, table=table, status_table=tables["status_table"]) as store:
        yield store


async def test_python_reads_a_stream_of_typescript(typescript, store):
    await typescript("create", "s", milliseconds(300))
    for text in ("\x01Hello", "usage\x01{}", "plain"):
        await typescript("append", "s", text)
    info = await store.get_info("s")
    assert (info.state, info.total_chunks, info.session_id, info.owner, info.lease_until) == (
        "active",
        3,
        None,
        None,
        None,
    )
    await typescript("end", "s", "error", "broken")
    assert [tuple(event) async for event in store.events("s")] == [
        (1, "message", "Hello"),
        (2, "usage", "{}"),
        (3, "message", "plain"),
    ]
    assert await store.get_status("s") == ("error", "broken", 3)
    with pytest.raises(StreamNotActiveError):
        await store.append("s", "late")


@pytest.mark.parametrize("options", [{}, {"session_id": "c", "owner": "ann", "metadata": {"a": 1}, "lease": 60}])
async def test_typescript_reads_and_continues_a_stream_of_python(typescript, store, options):
    await store.create("s", **options)
    await store.append_many("s", ["one", "two"])
    await typescript("append", "s", "three")
    assert await store.append("s", "four") == 4
    assert await typescript("read", "s", 1) == [(2, "two"), (3, "three"), (4, "four")]
    assert await typescript("status", "s") == [("s", "active", None, 4)]
    await typescript("end", "s", "done", None)
    assert (await store.wait("s", 30)).state == "done"
    info = await store.get_info("s")
    assert (info.session_id, info.owner) == (options.get("session_id"), options.get("owner"))


async def test_cleanup_of_both_sides(typescript, store):
    await typescript("create", "old", milliseconds(-10))
    await typescript("append", "old", "x")
    await typescript("end", "old", "done", None)
    assert await store.cleanup() == (1, 1)
    await store.create("mine")
    await store.append("mine", "x")
    await store.complete("mine")
    assert [id for (id,) in await typescript("cleanup", milliseconds(10**6))] == ["mine"]
    await typescript("cleanup chunks", ["mine"])
    assert await store.get_status("mine") is None


async def test_conversations_of_both_sides(typescript, conversations):
    chat = ChatHistory()
    chat.append({"role": "user", "content": "hi"})
    await typescript("save", "c", chat.to_json(), milliseconds(60))
    info = await conversations.get_info("c")
    assert (info.owner, info.title, info.created_at is None) == (None, None, False)
    loaded = await conversations.load("c")
    loaded.append({"role": "assistant", "content": "hello"})
    await conversations.save("c", loaded, owner="ann")
    await conversations.describe("c", title="T", metadata=[1])
    [(text,)] = await typescript("load", "c", milliseconds())
    assert json.loads(text) == json.loads(loaded.to_json())
    await typescript("save", "c", chat.to_json(), milliseconds(60))
    info = await conversations.get_info("c")
    assert (info.owner, info.title, info.metadata) == ("ann", "T", [1])
    assert [each.session_id async for each in conversations.list("ann")] == ["c"]
    assert (await conversations.load("c")).messages == chat.messages
    await typescript("cleanup conversations", milliseconds(-10))
    assert await conversations.get_info("c") is not None
    await typescript("delete", "c")
    assert await conversations.get_info("c") is None


async def test_conversation_that_never_expires_is_read_by_typescript(dsn, table, tables, typescript):
    options = {"table": table, "status_table": tables["status_table"], "ttl": None}
    async with AsyncPostgresConversationStore(dsn, **options) as forever:
        async with forever.edit("c") as chat:
            chat.append("x")
    assert len(await typescript("load", "c", milliseconds())) == 1
    await typescript("cleanup conversations", milliseconds(10**9))
    assert len(await typescript("load", "c", milliseconds())) == 1
