"""Django's views, as an application may have them around: the other kind of server, transactions, middleware."""

from __future__ import annotations

import asyncio
import gc
import json
import threading

import psycopg
import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.base import BaseHandler
from django.db import connections, transaction
from django.middleware.gzip import GZipMiddleware
from django.test import AsyncRequestFactory, RequestFactory
from support.concurrency import until

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    DurableStream,
    PostgresStreamStore,
    StreamHandler,
    wrap_django,
)
from aibind_postgres.contrib.django import urlpatterns


@pytest.fixture(autouse=True)
def databases(django_databases, monkeypatch):
    for settings in connections.settings.values():
        monkeypatch.setitem(settings, "ATOMIC_REQUESTS", True)
    yield
    connections.close_all()


@pytest.fixture
def store(tables):
    with PostgresStreamStore(wrap_django(), **tables) as store:
        yield store


def view_of(handler):
    [pattern] = urlpatterns(handler)
    return pattern.callback


def prompt(factory):
    return factory.post("/__aibind__/stream", json.dumps({"prompt": "hi"}), "application/json")


def generate(generation):
    yield "Hello"


def test_an_answer_is_stored_while_its_request_is_in_a_transaction_of_its_own(store):
    view = view_of(StreamHandler(generate, store=store))
    assert BaseHandler().make_view_atomic(view) is view  # with ATOMIC_REQUESTS for each database
    answer = view(prompt(RequestFactory()), path="stream")
    assert b"data: Hello" in b"".join(answer)


def test_the_views_of_an_asynchronous_handler_may_be_used_with_atomic_requests(store):
    view = view_of(AsyncStreamHandler(generate, store=AsyncPostgresStreamStore("")))
    assert BaseHandler().make_view_atomic(view) is view


def test_events_are_not_held_back_to_be_compressed(store):
    view = view_of(StreamHandler(generate, store=store))
    request = prompt(RequestFactory(headers={"Accept-Encoding": "gzip"}))
    answer = GZipMiddleware(lambda request: view(request, path="stream"))(request)
    assert answer["Content-Encoding"] == "identity"
    assert b"data: Hello" in b"".join(answer)


def test_the_other_kind_of_server_is_refused(store):
    with pytest.raises(ImproperlyConfigured, match="use AsyncStreamHandler under ASGI"):
        view_of(StreamHandler(generate, store=store))(prompt(AsyncRequestFactory()), path="stream")
    asynchronous = view_of(AsyncStreamHandler(generate, store=AsyncPostgresStreamStore("")))
    with pytest.raises(ImproperlyConfigured, match="StreamHandler under WSGI"):
        asyncio.run(asynchronous(prompt(RequestFactory()), path="stream"))


def test_producers_leave_no_connections(store, dsn, monkeypatch):
    count = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'producers'"
    )
    monkeypatch.setitem(connections["default"].settings_dict["OPTIONS"], "application_name", "producers")
    connections.close_all()
    with psycopg.connect(dsn, autocommit=True) as observer:
        for _ in range(3):
            streams = [DurableStream.start(store, iter(["a", "b"])) for _ in range(5)]
            assert [stream.wait(20).state for stream in streams] == ["done"] * 5
        connections.close_all()
        store.close()
        until(lambda: observer.execute(count).fetchone() == (0,))


@pytest.fixture
def sources_connections(dsn, monkeypatch):
    """Count the connections that Django has made since and not closed, without help from the garbage collector."""
    for alias in ("default", "server_side"):
        monkeypatch.setitem(connections[alias].settings_dict["OPTIONS"], "application_name", "sources")
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sources'"
    gc.disable()
    with psycopg.connect(dsn, autocommit=True) as observer:
        yield lambda: observer.execute(count).fetchone()[0]
    gc.enable()


def ask():
    with connections["default"].cursor() as cursor, connections["server_side"].cursor() as another:
        return "".join(str(each.execute("SELECT 1").fetchone()) for each in (cursor, another))


def test_what_a_source_asks_of_the_database_leaves_no_connections(store, sources_connections):
    def generate(generation):
        yield ask()
        assert sources_connections() >= 2

    view = view_of(StreamHandler(generate, store=store))
    assert b"data: (1,)(1,)" in b"".join(view(prompt(RequestFactory()), path="stream"))
    connections.close_all()
    store.close()
    until(lambda: sources_connections() == 0)


@pytest.mark.parametrize("middleware", ["asynchronous", "synchronous"])
async def test_what_a_source_asks_when_its_request_is_over_leaves_no_connections(
    dsn, tables, sources_connections, middleware
):
    request_over = asyncio.Event()

    async def generate(generation):
        yield "a"
        await request_over.wait()
        yield await sync_to_async(ask)()
        assert sources_connections() >= 2

    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        view = view_of(AsyncStreamHandler(generate, store=store))
        threads = threading.active_count()
        async with ThreadSensitiveContext():  # as Django has it around each request
            view = sync_to_async(async_to_sync(view)) if middleware == "synchronous" else view
            answer = await view(prompt(AsyncRequestFactory()), path="stream")
            await sync_to_async(ask)()
            await sync_to_async(connections.close_all)()
        request_over.set()
        assert b"data: (1,)(1,)" in b"".join([part async for part in answer])
        assert await AsyncDurableStream.shutdown(store, 20)
        until(lambda: sources_connections() == 0 and threading.active_count() <= threads)


def test_a_stream_in_a_transaction_that_is_not_over_is_told_to_the_log(store, caplog):
    with transaction.atomic():
        stream = DurableStream.start(store, generate(None))
        until(lambda: "is its transaction not over?" in caplog.text)
    store.fail_abandoned(0)  # unless the producer has come to that itself
    assert store.get_status(stream.id).state == "error"
