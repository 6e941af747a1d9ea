"""The Django views with transactions, middleware, and a server that does not match the handler."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from functools import partial

import psycopg
import pytest
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.core.exceptions import BadRequest, DisallowedHost, ImproperlyConfigured, PermissionDenied
from django.core.handlers.base import BaseHandler
from django.core.handlers.exception import convert_exception_to_response
from django.db import connections, transaction
from django.http import Http404, HttpResponse
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
    _leases,
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


def stream_request(factory):
    return factory.post("/__aibind__/stream", json.dumps({"prompt": "hi"}), "application/json")


def generate(generation):
    yield "Hello"


def test_view_is_exempt_from_atomic_requests(store):
    view = view_of(StreamHandler(generate, store=store))
    assert BaseHandler().make_view_atomic(view) is view  # ATOMIC_REQUESTS is set for each database
    response = view(stream_request(RequestFactory()), path="stream")
    assert b"data: Hello" in b"".join(response)


def test_async_view_is_exempt_from_atomic_requests(store):
    view = view_of(AsyncStreamHandler(generate, store=AsyncPostgresStreamStore("")))
    assert BaseHandler().make_view_atomic(view) is view


def test_gzip_middleware_does_not_compress_events(store):
    view = view_of(StreamHandler(generate, store=store))
    request = stream_request(RequestFactory(headers={"Accept-Encoding": "gzip"}))
    response = GZipMiddleware(lambda request: view(request, path="stream"))(request)
    assert response["Content-Encoding"] == "identity"
    assert b"data: Hello" in b"".join(response)


def test_server_that_does_not_match_the_handler_is_refused(store):
    with pytest.raises(ImproperlyConfigured, match="use an asynchronous handler under ASGI"):
        view_of(StreamHandler(generate, store=store))(stream_request(AsyncRequestFactory()), path="stream")
    async_view = view_of(AsyncStreamHandler(generate, store=AsyncPostgresStreamStore("")))
    with pytest.raises(ImproperlyConfigured, match="a synchronous one under WSGI"):
        asyncio.run(async_view(stream_request(RequestFactory()), path="stream"))


@pytest.fixture
def status_pages(monkeypatch):
    """Let Django respond with the text of a status in place of a template."""
    monkeypatch.setattr("django.core.handlers.exception.get_resolver", lambda urlconf: StatusPages)


class StatusPages:
    @staticmethod
    def resolve_error_handler(status):
        return lambda request, exception=None: HttpResponse(f"page {status}", status=status)


REFUSALS = [(PermissionDenied, 403), (Http404, 404), (BadRequest, 400), (DisallowedHost, 400)]


@pytest.mark.parametrize(("refusal", "status"), REFUSALS)
def test_refusal_has_the_status_of_django(store, status_pages, refusal, status):
    def refuse(*arguments):
        raise refusal("geheim")

    for handler in (StreamHandler(refuse, store=store), StreamHandler(generate, store=store, authorize=refuse)):
        request = RequestFactory().post("/", json.dumps({"prompt": "x", "sessionId": "a"}), "application/json")
        response = convert_exception_to_response(partial(view_of(handler), path="stream"))(request)
        assert (response.status_code, response.content) == (status, b"page %d" % status)


@pytest.mark.parametrize(("refusal", "status"), REFUSALS)
async def test_refusal_has_the_status_of_django_under_asgi(status_pages, refusal, status):
    async def refuse(*arguments):
        raise refusal("geheim")

    async with AsyncPostgresStreamStore("") as store:
        view = view_of(AsyncStreamHandler(refuse, store=store))

        async def respond(request):
            return await view(request, path="stream")

        response = await convert_exception_to_response(respond)(stream_request(AsyncRequestFactory()))
        assert (response.status_code, response.content) == (status, b"page %d" % status)


def test_unreachable_database_is_503(tables):
    with PostgresStreamStore(wrap_django("unreachable"), **tables) as unreachable:
        response = view_of(StreamHandler(generate, store=unreachable))(stream_request(RequestFactory()), path="stream")
        assert (response.status_code, response["Retry-After"]) == (503, "5")


def test_queries_of_a_plain_text_source_leave_no_connections(store, count_source_connections):
    def generate(generation):
        yield run_queries()
        yield run_queries()

    view = view_of(StreamHandler(generate, store=store))
    request = RequestFactory().post("/", json.dumps({"input": "x"}), "application/json")
    response = view(request, path="complete")
    assert b"".join(response) == b"(1,)(1,)" * 2
    response.close()
    connections.close_all()
    until(lambda: count_source_connections() == 0)


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
def count_source_connections(dsn, monkeypatch):
    """Count the open connections that Django has made since the fixture started. Disables garbage collection."""
    for alias in ("default", "server_side"):
        monkeypatch.setitem(connections[alias].settings_dict["OPTIONS"], "application_name", "sources")
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sources'"
    gc.disable()
    with psycopg.connect(dsn, autocommit=True) as observer:
        yield lambda: observer.execute(count).fetchone()[0]
    gc.enable()


def run_queries():
    with connections["default"].cursor() as cursor, connections["server_side"].cursor() as another:
        return "".join(str(each.execute("SELECT 1").fetchone()) for each in (cursor, another))


def test_queries_of_a_source_leave_no_connections(store, count_source_connections):
    def generate(generation):
        yield run_queries()
        assert count_source_connections() >= 2

    view = view_of(StreamHandler(generate, store=store))
    assert b"data: (1,)(1,)" in b"".join(view(stream_request(RequestFactory()), path="stream"))
    connections.close_all()
    store.close()
    until(lambda: count_source_connections() == 0)


def test_readers_hold_no_connections(dsn, tables, count_source_connections):
    def find_user(request):
        return run_queries()

    with PostgresStreamStore(dsn, **tables) as store:
        view = view_of(StreamHandler(generate, store=store, owner=find_user))
        connections.close_all()
        response = view(stream_request(RequestFactory()), path="stream")
        until(lambda: count_source_connections() == 0)
        assert b"data: Hello" in b"".join(response)


async def test_readers_hold_no_connections_under_asgi(dsn, tables, count_source_connections):
    async def generate(generation):
        yield "Hello"

    async def find_user(request):
        return await sync_to_async(run_queries)()

    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        view = view_of(AsyncStreamHandler(generate, store=store, owner=find_user))
        async with ThreadSensitiveContext():  # Django enters one around each request
            response = await view(stream_request(AsyncRequestFactory()), path="stream")
            until(lambda: count_source_connections() == 0)
            assert b"data: Hello" in b"".join([part async for part in response])


@pytest.mark.parametrize("middleware", ["asynchronous", "synchronous"])
async def test_queries_of_a_source_after_its_request_leave_no_connections(
    dsn, tables, count_source_connections, middleware
):
    request_ended = asyncio.Event()

    async def generate(generation):
        yield "a"
        await request_ended.wait()
        yield await sync_to_async(run_queries)()
        assert count_source_connections() >= 2

    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        view = view_of(AsyncStreamHandler(generate, store=store))
        threads = threading.active_count()
        async with ThreadSensitiveContext():  # Django enters one around each request
            view = sync_to_async(async_to_sync(view)) if middleware == "synchronous" else view
            response = await view(stream_request(AsyncRequestFactory()), path="stream")
            await sync_to_async(run_queries)()
            await sync_to_async(connections.close_all)()
        request_ended.set()
        assert b"data: (1,)(1,)" in b"".join([part async for part in response])
        assert await AsyncDurableStream.shutdown(store, 20)
        until(lambda: count_source_connections() == 0 and threading.active_count() <= threads)


def test_stream_in_an_open_transaction_is_logged(store, caplog, monkeypatch):
    monkeypatch.setattr(_leases, "CONTACT", 0)
    with transaction.atomic():
        stream = DurableStream.start(store, generate(None))
        until(lambda: "first commit the transaction that creates the stream" in caplog.text)
        assert DurableStream.shutdown(store, 20)
        assert store.get_status(stream.id) == ("active", None, 0)
    until(lambda: store.fail_abandoned() == [stream.id])  # once the lease has expired
    assert store.get_status(stream.id).state == "error"
