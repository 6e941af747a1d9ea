"""Requests that are refused: by the framework's exceptions, because of their origin, and while there is no database."""

from __future__ import annotations

import json
import logging

import pytest
from support.concurrency import async_until, async_workers

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    WebRequest,
)
from aibind_postgres.sse import EventParser, ServerSentEvent

UNREACHABLE = "host=127.0.0.1 port=1 password=geheim connect_timeout=5"
JSON = {"content-type": "application/json"}
BODY = {"id": "s", "prompt": "x", "input": "x", "sessionId": "s", "messages": [{"role": "user", "content": "x"}]}

# Each kind of route that uses the database, or calls `generate`.
ROUTES = [
    ("POST", "/stream"),
    ("POST", "/structured"),
    ("POST", "/chat"),
    ("POST", "/complete"),
    ("POST", "/title"),
    ("POST", "/compact"),
    ("POST", "/stream/stop"),
    ("GET", "/stream/resume"),
]
GENERATING = [route for route in ROUTES if route[1] not in ("/stream/stop", "/stream/resume")]
STREAMING = ["/stream", "/structured", "/chat"]


class RefusalError(Exception):
    """A framework's exception."""


async def generate(generation):
    yield "Hello"


def refuse(*arguments):
    raise RefusalError("geheim")


async def refuse_in_source(generation):
    raise RefusalError("geheim")
    yield


def request_of(method, path, headers=None, **fields):
    encoded = json.dumps(BODY).encode() if method == "POST" else b""
    headers = {**(JSON if method == "POST" else {}), **(headers or {})}
    query = {"id": "s"} if method == "GET" else {}
    return WebRequest(method, f"/__aibind__{path}", query, headers, encoded)._replace(**fields)


def error_of(response):
    return response.status, json.loads(response.body)["error"]


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        await store.create("s")
        yield store


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_refusal_of_authorize_reaches_the_framework(store, caplog, method, path):
    handler = AsyncStreamHandler(generate, store=store, authorize=refuse)
    with pytest.raises(RefusalError):
        await handler.handle(request_of(method, path, refusals=(RefusalError,)))
    assert caplog.records == []
    assert (await handler.handle(request_of(method, path))).status == 500
    assert "geheim" in caplog.text


@pytest.mark.parametrize(("method", "path"), GENERATING)
async def test_refusal_of_generate_reaches_the_framework(store, caplog, method, path):
    handler = AsyncStreamHandler(refuse, store=store)
    with pytest.raises(RefusalError):
        await handler.handle(request_of(method, path, refusals=(ZeroDivisionError, RefusalError)))
    assert caplog.records == []
    assert [stream.id async for stream in store.list()] == ["s"]


@pytest.mark.parametrize("path", ["/complete", "/title", "/compact"])
async def test_refusal_of_a_source_before_the_response_reaches_the_framework(store, caplog, path):
    handler = AsyncStreamHandler(refuse_in_source, store=store)
    with pytest.raises(RefusalError):
        await handler.handle(request_of("POST", path, refusals=(RefusalError,)))
    assert caplog.records == []
    await async_until(lambda: not any("plain-text" in name for name in async_workers()))


@pytest.mark.parametrize("path", STREAMING)
async def test_refusal_of_a_running_source_ends_the_stream(store, caplog, path):
    handler = AsyncStreamHandler(refuse_in_source, store=store)
    response = await handler.handle(request_of("POST", path, refusals=(RefusalError,)))
    assert response.status == 200
    sent = b"".join([part async for part in response.body])
    assert b"geheim" not in sent
    assert EventParser().feed(sent)[1:] == [
        ServerSentEvent("the answer was interrupted", "error"),
        ServerSentEvent("", "done"),
    ]
    assert "geheim" in caplog.text


CROSS_SITE = [
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site", "origin": "https://evil.example.com", "host": "example.com"},
    {"origin": "https://evil.test", "host": "example.com"},
]


@pytest.mark.parametrize("headers", CROSS_SITE, ids=["cross-site", "same-site", "origin"])
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_cross_site_request_is_refused(store, headers, method, path):
    called = []
    handler = AsyncStreamHandler(called.append, store=store, authorize=lambda *arguments: called.append(arguments))
    status, error = error_of(await handler.handle(request_of(method, path, headers)))
    assert status == 403
    assert "allowed_origins" in error
    assert called == []
    assert (await store.get_status("s")).state == "active"


async def test_allowed_origins(store):
    handler = AsyncStreamHandler(generate, store=store, allowed_origins=["https://app.example.com"])
    for origin, status in (("https://app.example.com", 200), ("https://evil.test", 403)):
        headers = {"sec-fetch-site": "cross-site", "origin": origin}
        assert (await handler.handle(request_of("POST", "/stream/stop", headers))).status == status
    with pytest.raises(ValueError, match="allowed_origins"):
        AsyncStreamHandler(generate, store=store, allowed_origins="https://app.example.com")


@pytest.mark.parametrize("content_type", ["text/plain;charset=UTF-8", "application/x-www-form-urlencoded", ""])
@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route[0] == "POST"])
async def test_body_of_another_type_is_refused(store, content_type, method, path):
    handler = AsyncStreamHandler(generate, store=store)
    response = await handler.handle(request_of(method, path, {"content-type": content_type}))
    assert error_of(response) == (415, "the Content-Type of the body must be application/json")
    assert (await store.get_status("s")).state == "active"


async def test_request_without_a_body_needs_no_content_type(store):
    """Some clients and proxies send none with an empty body. Pages of other origins are refused by their headers."""
    handler = AsyncStreamHandler(generate, store=store)
    request = request_of("POST", "/stream/stop")._replace(body=b"", headers={})
    assert (await handler.handle(request)).status == 400  # the id is missing


def logged_once_without_traceback(caplog, path):
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert f"{path} failed, since the database is unavailable" in record.getMessage()
    assert record.exc_info is None
    assert "geheim" not in caplog.text


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route[1] not in ("/complete", "/title")])
async def test_unreachable_database_is_503(caplog, method, path):
    async with (
        AsyncPostgresStreamStore(UNREACHABLE) as store,
        AsyncPostgresConversationStore(UNREACHABLE) as conversations,
    ):
        handler = AsyncStreamHandler(generate, store=store, conversations=conversations, public=True)
        for _ in range(2):
            caplog.clear()
            response = await handler.handle(request_of(method, path))
            assert error_of(response) == (503, "the database is unavailable: try again later")
            assert response.headers["Retry-After"] == "5"
            assert response.headers["Cache-Control"] == "no-store"
            logged_once_without_traceback(caplog, path)


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_database_that_authorize_cannot_reach_is_503(store, caplog, method, path):
    async with AsyncPostgresStreamStore(UNREACHABLE) as other:

        async def authorize(request, resource):
            return await other.get_status(resource.id)

        handler = AsyncStreamHandler(generate, store=store, authorize=authorize)
        response = await handler.handle(request_of(method, path))
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        logged_once_without_traceback(caplog, path)


async def test_other_error_of_the_database_is_500(dsn, tables, caplog):
    async with AsyncPostgresStreamStore(dsn, **{**tables, "chunks_table": "missing"}) as store:
        handler = AsyncStreamHandler(generate, store=store)
        assert (await handler.handle(request_of("GET", "/stream/resume"))).status == 500
        assert caplog.records[-1].exc_info
