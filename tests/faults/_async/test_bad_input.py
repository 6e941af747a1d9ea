"""Hostile, odd and huge names, ids and texts: stored unchanged or refused with a named error, and never executed."""

from __future__ import annotations

import uuid

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    ChatHistory,
    InvalidDataError,
    schema,
)

pytestmark = pytest.mark.timeout(600)

MIB = 2**20

# Each would drop the canary, or run, if part of it were executed as SQL. Names have at most 63 bytes.
HOSTILE = [
    "'; DROP TABLE canary; --",
    '"; DROP TABLE canary; --',
    '"; DROP TABLE canary; $migrate$ --',
    "$$; DROP TABLE canary; $$",
    "$notify$; DROP TABLE canary; --",
    "x\nDROP TABLE canary;--",
    "*/ DROP TABLE canary; /*",
    "\\'; DROP TABLE canary; --",
    "pg_sleep(60)",
    "%s %(a)s $1 :a {chunks} {0}",
]
ODD = ["👩‍👩‍👧", "é", "e\u0301", "\u202eabc", "\x01", "\ufffe", "\ufeff", "ﬀ", " ", "\t\r\n"]
HUGE = "x" * MIB
REFUSED = ["NUL \0", "\ud800", "\udfff alone", "", HUGE]


@pytest.fixture
async def admin(dsn, schema_name):
    """A connection to the schema of the test, with the canary table that hostile SQL would drop."""
    options = f'-c search_path="{schema_name}"'
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, options=options) as connection:
        await connection.execute("CREATE TABLE canary ()")
        yield connection
        await connection.execute("SELECT FROM canary")


async def chunks_of(store, id):
    return [tuple(chunk) async for chunk in store.read_from(id, follow=False)]


@pytest.mark.parametrize("name", [*HOSTILE, *ODD])
async def test_hostile_table_name_is_not_executed(dsn, schema_name, admin, name):
    in_schema = make_conninfo(dsn, options=f'-c search_path="{schema_name}"')
    names = {
        "chunks_table": psycopg.sql.Identifier(name + "1"),
        "status_table": psycopg.sql.Identifier(name + "2"),
    }
    conversations = psycopg.sql.Identifier(name + "3")
    await schema.async_migrate(in_schema, **names, conversations_table=conversations, notify_trigger=True)
    async with AsyncPostgresStreamStore(in_schema, **names) as store:
        await store.create("a")
        assert await store.append("a", "1") == 1
        assert await store.append_many("a", ["2", "3"]) == 3
        assert await store.complete("a") is True
        assert [tuple(chunk) async for chunk in store.read_from("a")] == [(1, "1"), (2, "2"), (3, "3")]
        assert await store.fail_abandoned(0) == []
        assert await store.archive(0) == (1, 3)
        assert [tuple(chunk) async for chunk in store.read_from("a")] == [(1, "1"), (2, "2"), (3, "3")]
        assert await store.unarchive("a") == 3
        assert await store.cleanup() == (0, 0)
        assert await store.delete("a") is True
    async with AsyncPostgresConversationStore(in_schema, table=conversations) as store:
        async with store.edit("s") as chat:
            chat.append("message")
        assert (await store.load("s")).messages == ["message"]
    cursor = await admin.execute(
        "SELECT relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace "
        "WHERE nspname = current_schema AND relkind = 'r'"
    )
    created = {name + suffix for suffix in ("1", "1_archive", "2", "3")}
    assert {row[0] for row in await cursor.fetchall()} == {"canary", *created}


@pytest.mark.parametrize("name", REFUSED)
async def test_invalid_table_name_raises(dsn, name):
    for options in ({"chunks_table": name}, {"status_table": psycopg.sql.Identifier(name)}):
        with pytest.raises(ValueError, match="name"):
            AsyncPostgresStreamStore(dsn, **options)
    with pytest.raises(ValueError, match="name"):
        AsyncPostgresConversationStore(dsn, table=name)


async def test_ids_and_texts_are_stored_unchanged(dsn, tables, conversations, admin):
    """Includes texts that look the same, or are equal after Unicode normalization."""
    values = [*HOSTILE, *ODD]
    async with (
        AsyncPostgresStreamStore(dsn, **tables) as store,
        AsyncPostgresConversationStore(dsn, table=conversations) as conversation_store,
    ):
        for id in values:
            assert await store.create(id) == id
            assert await store.append(id, id) == 1
            assert await store.append_many(id, values, expected_seq=2) == len(values) + 1
            assert await store.append_many(id, values, expected_seq=2) == len(values) + 1
            assert await store.fail(id, id) is True
            async with conversation_store.edit(id) as chat:
                chat.append(values, {id: id})
        for id in values:
            assert await chunks_of(store, id) == [*enumerate([id, *values], 1)]
            assert await store.get_status(id) == ("error", id, len(values) + 1)
            assert (await conversation_store.load(id)).messages == [values]
        assert {info.id async for info in store.list()} == set(values)
        assert {info.session_id async for info in conversation_store.list()} == set(values)


@pytest.mark.parametrize("id", [*REFUSED, "👍" * 257])
async def test_invalid_id_raises_a_short_error(dsn, tables, id):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        for call in (store.create, store.acquire, store.get_status, store.stop, store.delete, store.wait):
            with pytest.raises(InvalidDataError) as caught:
                await call(id)
            assert len(str(caught.value)) < 200
        with pytest.raises(InvalidDataError):
            store.read_from(id)
        with pytest.raises(InvalidDataError):
            store.writer(id)
        assert [info async for info in store.list()] == []


async def test_invalid_text_leaves_the_stream_unchanged(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()
        async with store.writer(id) as writer:
            await writer.write("first")
            for text in ("NUL \0", "\ud800", "\udc00\ud800", b"bytes", 1):
                with pytest.raises(InvalidDataError):
                    await writer.write(text)
                with pytest.raises(InvalidDataError):
                    await store.append(id, text, expected_seq=2)
                with pytest.raises(InvalidDataError):
                    await store.append_many(id, ["good", text])
            await writer.write("second")
        assert await chunks_of(store, id) == [(1, "first"), (2, "second")]


async def test_message_with_nul_or_surrogates_is_stored(dsn, conversations):
    """PostgreSQL refuses these characters in text; JSON escapes them."""
    messages = ["NUL \0", "\ud800", "\udc00\ud800", {"\0": "\ud800"}, HUGE]
    async with AsyncPostgresConversationStore(dsn, table=conversations) as store:
        async with store.edit("s") as chat:
            for message in messages:
                chat.append(message)
        assert (await store.load("s")).messages == messages


@pytest.mark.parametrize("letter", ["x", "\x01", "é"])
async def test_huge_chunk_is_stored_whole(dsn, tables, long, letter):
    size = (64 if long else 8) * MIB // len(letter.encode())
    chunk = letter * (size - 1) + "|"
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()
        assert await store.append(id, chunk) == 1
        assert await store.append(id, chunk, expected_seq=1) == 1
        assert await store.append_many(id, [chunk, "small"]) == 3
        async with store.writer(id) as writer:
            await writer.write(chunk)
        found = [chunk.data async for chunk in store.read_from(id)]
        # A failing comparison of the lists would print all of the text.
        assert [len(text) for text in found] == [size, size, 5, size]
        assert all(text == chunk for text in (found[0], found[1], found[3]))


async def test_huge_conversation_is_stored_whole(dsn, conversations, long):
    message = "👍" * ((64 if long else 8) * MIB // 4)
    async with AsyncPostgresConversationStore(dsn, table=conversations) as store:
        chat = ChatHistory()
        chat.append(message)
        await store.save("s", chat)
        [found] = (await store.load("s")).messages
        assert len(found) == len(message)
        assert found == message, "another text of the same length"


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP", "WIN1252"])
async def test_other_database_encodings_store_text_unchanged_or_raise(server, encoding):
    name = f"aibind_{uuid.uuid4().hex}"
    dsn = make_conninfo(server, dbname=name)
    async with await psycopg.AsyncConnection.connect(server, autocommit=True) as admin:
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
        try:
            await schema.async_migrate(dsn)
            async with AsyncPostgresStreamStore(dsn) as store, AsyncPostgresConversationStore(dsn) as conversations:
                for text in ("plain", "é", "日本", "👍", "e\u0301", "\x01", "\ufffe"):
                    await store_everywhere(store, conversations, text, may_refuse=encoding != "SQL_ASCII")
        finally:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def store_everywhere(store, conversations, text, *, may_refuse):
    """Store a text as chunk, id, error text and message; if it is refused, check that nothing was written."""
    id = await store.create()
    try:
        await store.append(id, text)
        await store.append_many(id, [text, text])
    except InvalidDataError:
        assert may_refuse
        assert await chunks_of(store, id) == []
        with pytest.raises(InvalidDataError, match="encoding"):
            await store.append_many(id, ["good", text])
        with pytest.raises(InvalidDataError, match="encoding"):
            await store.create(text)
        with pytest.raises(InvalidDataError, match="encoding"):
            await store.fail(id, text)
        with pytest.raises(InvalidDataError, match="encoding"):
            async with conversations.edit("s") as chat:
                chat.append(text)
        assert await store.get_status(id) == ("active", None, 0)
        assert (await conversations.load("s")).is_empty
    else:
        assert await chunks_of(store, id) == [(1, text), (2, text), (3, text)]
        assert await store.create(text) == text
        assert await store.fail(text, text) is True
        assert await store.get_status(text) == ("error", text, 0)
        async with conversations.edit(text) as chat:
            chat.append(text)
        assert (await conversations.load(text)).messages == [text]
