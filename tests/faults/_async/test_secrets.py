"""Logs and error texts contain no passwords, chunks or messages, also when the server is lost."""

from __future__ import annotations

import logging
from functools import partial

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support.concurrency import AsyncBackground, async_gather, async_sleep

from aibind_postgres import (
    AibindError,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    ChatHistory,
    schema,
)

pytestmark = pytest.mark.timeout(300)

SECRETS = {"chunk": "CHUNK-5f1c", "message": "MESSAGE-77ab", "password": "PASSWORD-c0de"}


def texts_of(error):
    """Return the texts of an error and of its causes, without those of the driver's errors."""
    texts = []
    while error is not None:
        if not isinstance(error, psycopg.Error):
            texts += [str(error), repr(error)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(texts)


def assert_no_secret(text):
    assert [kind for kind, secret in SECRETS.items() if secret in text] == [], text


async def failing(call):
    """Return the error that a call must raise."""
    with pytest.raises(Exception) as caught:  # noqa: PT011, the tests check its text
        await call()
    return caught.value


async def test_errors_do_not_quote_refused_data(dsn, tables, conversations, caplog):
    caplog.set_level(logging.DEBUG)
    chunk, message = SECRETS["chunk"], SECRETS["message"]
    secret = make_conninfo(dsn, password=SECRETS["password"])
    chat = ChatHistory()
    chat.append(message)
    async with (
        AsyncPostgresStreamStore(secret, **tables) as store,
        AsyncPostgresConversationStore(secret, table=conversations) as saved,
        AsyncPostgresConversationStore(secret, table="no such table") as missing,
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin,
    ):
        await store.create("a")
        await store.append("a", chunk)
        await store.create("over")
        await store.complete("over")
        await saved.save("s", chat)
        table = conversations.as_string(None)
        await admin.execute(f"INSERT INTO {table} VALUES ('broken', %s, 9e15)", [message])
        other = ChatHistory()
        other.append(message)

        async def write_with_a_conflict():
            async with store.writer("a") as writer:
                await writer.write(chunk)
                await store.append("a", chunk + " of another")
                await writer.write(chunk)
                await writer.flush()

        for call in (
            lambda: store.append("a", chunk + "\0"),
            lambda: store.append("a", chunk + "\ud800"),
            lambda: store.append_many("a", [chunk, chunk + "\ud800"]),
            lambda: store.append_many("a", chunk),
            lambda: store.fail("a", chunk + "\0"),
            lambda: store.append("a", chunk + "2", expected_seq=1),
            lambda: store.append("over", chunk),
            lambda: store.append("none", chunk),
            lambda: saved.load("broken"),
            lambda: saved.save("broken", chat),
            lambda: saved.save("s", other, on_conflict="raise"),
            lambda: missing.save("s", chat),
            write_with_a_conflict,
        ):
            error = await failing(call)
            assert isinstance(error, AibindError), repr(error)
            assert_no_secret(texts_of(error))
        for described in (store, saved, chat, chat.tree, store.writer("a")):
            assert_no_secret(repr(described))
    assert_no_secret(caplog.text)


@pytest.mark.parametrize(
    "dsn",
    [
        "host=127.0.0.1 {password}",
        "host=127.0.0.1 password='{password}",
        "host=127.0.0.1 password=\ud800{password}",
        "host=127.0.0.1 password = with {password}",
        "postgresql://u:with {password}@127.0.0.1/db",
        "postgresql://u:100%{password}@127.0.0.1/db",
        "postgresql://u:p/?{password}@127.0.0.1/db",
        "postgresql://u:p@{password}@127.0.0.1/db",
        "postgresql://u:p@{password}@127.0.0.1:1,127.0.0.1:2/db",
        "postgresql://u:{password}/p@127.0.0.1/db",
        "postgresql://u:p@{password}/x@127.0.0.1/db",
        "postgresql://u:1/{password}@127.0.0.1/db",
    ],
)
async def test_error_does_not_quote_a_malformed_connection_string(dsn, caplog):
    caplog.set_level(logging.DEBUG)
    dsn = dsn.format(**SECRETS)

    async def store():
        AsyncPostgresStreamStore(dsn)

    async def conversation_store():
        AsyncPostgresConversationStore(dsn)

    for call in (store, conversation_store, lambda: schema.async_migrate(dsn)):
        error = await failing(call)
        assert type(error) is ValueError
        assert error.__context__ is None
        assert_no_secret(texts_of(error))
    assert_no_secret(caplog.text)


@pytest.mark.parametrize(
    "dsn",
    [
        "host=/tmp/a@b",
        "host=@abstract port=5432",
        "postgresql://a,b/db",
        "postgresql:///?port=1,2",
        "password=://@ host=/tmp",
    ],
)
async def test_unusual_connection_string_is_accepted_and_not_quoted(dsn):
    async with AsyncPostgresStreamStore(dsn) as store:
        assert dsn not in repr(store)


@pytest.mark.parametrize("text", ["\ud800", "{", "NaN"])
async def test_error_does_not_quote_a_malformed_document(text):
    async def call():
        return ChatHistory.from_json('{"' + SECRETS["message"] + '": ' + text)

    assert_no_secret(texts_of(await failing(call)))


async def test_error_does_not_quote_an_unencodable_chunk(dsn, tables):
    latin = make_conninfo(dsn, client_encoding="LATIN1")
    async with AsyncPostgresStreamStore(latin, **tables) as store:
        await store.create("a")
        for call in (
            lambda: store.append("a", SECRETS["chunk"] + "👍"),
            lambda: store.append_many("a", [SECRETS["chunk"] + "👍", ""]),
        ):
            error = await failing(call)
            assert isinstance(error, AibindError)
            assert_no_secret(texts_of(error))


async def test_lost_server_leaves_no_secret_in_errors_and_logs(disposable_server, caplog):
    caplog.set_level(logging.DEBUG)
    schema.migrate(disposable_server.dsn)
    secret = make_conninfo(disposable_server.dsn, password=SECRETS["password"])
    chat = ChatHistory()
    chat.append(SECRETS["message"])
    async with (
        AsyncPostgresStreamStore(secret, retry_for=1, poll_interval=0.05) as store,
        AsyncPostgresConversationStore(secret) as saved,
    ):
        await store.create("a")

        async def follow():
            return [chunk async for chunk in store.read_from("a")]

        async def write():
            async with store.writer("a") as writer:
                while True:
                    await writer.write(SECRETS["chunk"])
                    await async_sleep(0.005)

        async with (
            AsyncBackground(lambda: failing(follow)) as reader,
            AsyncBackground(lambda: failing(write)) as writer,
        ):
            await saved.save("s", chat)
            await async_sleep(0.2)
            disposable_server.kill()
            errors = [await reader.result(60), await writer.result(60)]
        calls = partial(store.append, "a", SECRETS["chunk"]), partial(saved.save, "s", chat)
        errors += await async_gather(*calls, errors=True)
        disposable_server.start()
    for error in errors:
        assert_no_secret(texts_of(error))
        while error.__cause__ is not None:
            error = error.__cause__
        assert isinstance(error, psycopg.Error)
        assert_no_secret(str(error))
    # The listener logs that it lost its connection, so the log is not empty.
    assert [
        record
        for record in caplog.records
        if record.name.startswith("aibind_postgres") and "failed" in record.getMessage()
    ]
    assert_no_secret(caplog.text)


async def test_unreachable_server_leaves_no_password_in_errors_and_logs(caplog):
    caplog.set_level(logging.DEBUG)
    password = SECRETS["password"]
    for dsn in (
        f"postgresql://u:{password}@127.0.0.1:1/db",
        f"host=127.0.0.1 port=1 user=u password={password}",
        f"postgresql://u:{password}@127.0.0.1:1/db?sslmode=require",
    ):
        async with AsyncPostgresStreamStore(dsn, retry_for=0) as store:
            error = await failing(lambda: store.create("a"))
        assert password not in str(error) + repr(error)
        assert_no_secret(repr(store))
    assert_no_secret(caplog.text)
