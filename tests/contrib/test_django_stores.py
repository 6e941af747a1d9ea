"""The stores of the app for Django, outside of tests of Django."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path

import psycopg
import pytest
from django.db import connections, transaction
from django.test import override_settings
from django.utils.connection import ConnectionDoesNotExist
from support.concurrency import Background
from support.lifecycles import in_a_child

from aibind_postgres import (
    AsyncDurableStream,
    AsyncHousekeeper,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    DurableStream,
    Housekeeper,
    PostgresConversationStore,
    PostgresStreamStore,
    StoreClosedError,
    schema,
)
from aibind_postgres.contrib import django as aibind
from aibind_postgres.contrib.django import _operations, _settings
from aibind_postgres.contrib.django._clients import connection_string


@pytest.fixture(autouse=True)
def _databases(django_databases):
    yield
    connections.close_all()


@pytest.fixture(autouse=True)
def names(tables, schema_name):
    chunks, status = (f"{schema_name}.{table._obj[1]}" for table in tables.values())
    setting = {"CHUNKS_TABLE": chunks, "STATUS_TABLE": status, "CONVERSATIONS_TABLE": f"{schema_name}.conversations"}
    with override_settings(AIBIND_POSTGRES=setting):
        yield


@pytest.fixture
def store():
    store = aibind.stream_store(poll_interval=0.05)
    yield store
    store.close()


def test_kinds():
    assert isinstance(aibind.stream_store(), PostgresStreamStore)
    assert isinstance(aibind.async_stream_store(), AsyncPostgresStreamStore)
    assert isinstance(aibind.conversation_store(), PostgresConversationStore)
    assert isinstance(aibind.async_conversation_store(), AsyncPostgresConversationStore)


def test_store_and_its_producers(store, theirs):
    stream = DurableStream.start(store, iter(["a"]), id="one")
    assert stream.wait(30) == ("done", None, 1)
    assert theirs.get_status("one") == ("done", None, 1)
    assert repr(store).endswith("<DjangoPoolClient of database 'default'>, open>")


def test_store_takes_no_part_in_transactions(store, theirs):
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        DurableStream.start(store, iter(["a"]), id="one").wait(30)
        raise ZeroDivisionError
    assert theirs.get_status("one") == ("done", None, 1)


def test_closing_ends_the_producers(store, theirs):
    def source():
        yield "a"
        release.wait(30)

    release = threading.Event()
    DurableStream.start(store, source(), id="one")
    threading.Timer(0.5, release.set).start()
    store.close()
    assert theirs.get_status("one").state == "error"
    with pytest.raises(StoreClosedError):
        store.create()


def test_store_is_renewed_when_django_creates_or_drops_a_database(store):
    store.create("one")
    first = store._database
    with connections["default"]._nodb_cursor():
        assert first.state == "closed"
    assert store.get_status("one").state == "active"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_process_has_a_store_of_its_own(store, theirs):
    def use():
        store.create("child")
        store.close()

    def hold_lock():
        with store._lock:
            held.set()
            release.wait(30)

    held, release = threading.Event(), threading.Event()
    store.create("parent")
    with Background(hold_lock):  # a thread that the child does not have
        held.wait(30)
        in_a_child(use)
        release.set()
    store.append("parent", "still open")
    assert {info.id for info in theirs.list()} == {"parent", "child"}


def test_each_event_loop_has_a_store_of_its_own(theirs):
    store = aibind.async_stream_store(poll_interval=0.05)
    housekeeper = AsyncHousekeeper(store)

    async def source():
        yield "a"

    async def run(id):
        stream = await AsyncDurableStream.start(store, source(), id=id)
        assert await stream.wait(30) == ("done", None, 1)
        return store._database

    async def run_with_housekeeper(id):
        async with housekeeper:
            return await run(id)

    databases = [asyncio.run(run_with_housekeeper("one")), asyncio.run(run("two"))]
    assert databases[0] is not databases[1]
    assert [info.id for info in theirs.list()] == ["one", "two"]
    assert len(store._stores) == 1


def test_shutdown_in_one_event_loop_leaves_the_producers_of_another(theirs):
    async def source():
        yield "a"
        started.set()
        while not released.is_set():
            await asyncio.sleep(0.01)

    async def produce():
        stream = await AsyncDurableStream.start(store, source(), id="one")
        states.append((await stream.wait(30)).state)
        await store.close()

    async def shut_down():
        assert await AsyncDurableStream.shutdown(store, 0)
        assert store.get_stats()["producers_running"] == 0
        await store.close()

    store = aibind.async_stream_store(poll_interval=0.05)
    started, released, states = threading.Event(), threading.Event(), []
    other = threading.Thread(target=asyncio.run, args=[produce()])
    other.start()
    try:
        assert started.wait(30)
        asyncio.run(shut_down())
        assert theirs.get_status("one").state == "active"
    finally:
        released.set()
        other.join()
    assert states == ["done"]


def test_housekeeper(store, caplog):
    caplog.set_level("INFO", logger="aibind_postgres")
    conversations = aibind.conversation_store()
    with Housekeeper(store, conversations):
        pass
    conversations.close()


async def test_conversations(conversations):
    store = aibind.async_conversation_store(ttl=None)
    async with store:
        async with store.edit("one", owner="ada") as chat:
            chat.append("Hi")
        assert [info.session_id async for info in store.list("ada")] == ["one"]


async def test_lifespan_ends_the_answers(theirs):
    async def source():
        yield "a"
        await asyncio.sleep(600)

    async def application(scope, receive, send):
        calls.append(scope)

    async def receive():
        return await events.get()

    async def send(event):
        sent.append(event["type"])

    calls, sent, events = [], [], asyncio.Queue()
    store = aibind.async_stream_store()
    handle = aibind.with_lifespan(application, timeout=0.1)
    await handle({"type": "http"}, receive, send)
    assert calls == [{"type": "http"}]
    server = asyncio.create_task(handle({"type": "lifespan"}, receive, send))
    await events.put({"type": "lifespan.startup"})
    await AsyncDurableStream.start(store, source(), id="one")
    await events.put({"type": "lifespan.shutdown"})
    await server
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert theirs.get_status("one").state == "error"
    with pytest.raises(StoreClosedError):
        await store.create()


def test_options(theirs):
    with aibind.stream_store(timeout=5, ttl=60) as store:
        assert store._ttl == 60_000
        assert store._database.client._timeout == 5


def test_unknown_option():
    with pytest.raises(TypeError, match="unknown"):
        aibind.stream_store(unknown=1).create()


def test_invalid_database():
    with pytest.raises(ConnectionDoesNotExist):
        aibind.stream_store("missing").create()
    with pytest.raises(TypeError, match="sqlite"):
        aibind.stream_store("lite").create()


def test_connection_string(monkeypatch):
    monkeypatch.setitem(connections["default"].settings_dict, "PASSWORD", "pass word'\\")
    monkeypatch.setitem(connections["default"].settings_dict["OPTIONS"], "assume_role", "a role")
    found = psycopg.conninfo.conninfo_to_dict(connection_string("default"))
    assert found["password"] == "pass word'\\"
    assert found["options"].endswith("-c role=a\\ role")
    assert "pass word" not in repr(aibind.stream_store())


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "must be a dict, not NoneType"),
        ({"chunks_table": "x"}, "unknown key 'chunks_table': the keys are CHUNKS_TABLE,"),
        ({"CHUNKS_TABLE": 7}, "'CHUNKS_TABLE'.*must be a str"),
        ({"STATUS_TABLE": "a.b.c"}, "'STATUS_TABLE'.*more parts"),
        ({"STATUS_TABLE": "x", "CHUNKS_TABLE": "x"}, "must differ"),
    ],
)
def test_invalid_setting(value, problem):
    names, problems = _settings.parse(value)
    assert names == ("aibind_stream_chunks", "aibind_stream_status", "aibind_conversations")
    [found] = problems
    assert re.search(problem, found)


def test_each_sql_file_has_a_migration():
    files = {file.name.partition(".")[0] for file in schema.SQL_FOLDER.iterdir() if file.name.endswith(".sql")}
    folder = Path(_settings.__file__).parent / "migrations"
    assert {file.stem for file in folder.glob("0*.py")} == files
    assert {file.partition(".")[0] for file in _operations._UNDO} == files


def test_names_of_models():
    assert _settings.parse({"STATUS_TABLE": "chat.status"})[0].status == "chat.status"
    assert _settings.as_db_table("status") == "status"
    assert _settings.as_db_table("chat.status") == '"chat"."status"'
