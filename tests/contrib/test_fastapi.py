"""The FastAPI router: dependencies, the OpenAPI schema, and refusals."""

from __future__ import annotations

import asyncio
import json

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    ChatHistory,
    ConversationInfo,
    PostgresStreamStore,
    StreamHandler,
)
from aibind_postgres.contrib.fastapi import router
from aibind_postgres.web import conversation_fields

BODY = {"id": "s", "prompt": "x", "input": "x", "sessionId": "s", "messages": [{"role": "user", "content": "x"}]}


async def generate(generation):
    yield f"{generation.kind} for {generation.request.original.state.user}"


def identify(request: Request, user: str | None = Header(None)) -> None:
    if user is None:
        raise HTTPException(401, "who are you?")
    request.state.user = user


def handler_of(generate=generate, **options):
    return AsyncStreamHandler(generate, store=AsyncPostgresStreamStore(""), **options)


def chat_handler(**options):
    return handler_of(conversations=AsyncPostgresConversationStore(""), public=True, **options)


def send(app, method, path, sent_body=BODY, **headers):
    """Send a request to an application without a server. Return the status and the body."""
    sent = []
    body = json.dumps(sent_body).encode() if method == "POST" else b""
    headers = {"content-type": "application/json", **headers}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "query_string": b"id=s" if method == "GET" else b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    messages = iter([{"type": "http.request", "body": body}])

    async def receive():
        return next(messages, None) or await asyncio.Event().wait()

    async def record(message):
        sent.append(message)

    asyncio.run(app(scope, receive, record))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def routes_of(handler):
    return [(method, path) for path, methods in handler._routes.items() for method in methods]


ROUTES = routes_of(chat_handler())


def included(prefix=""):
    app = FastAPI()
    app.include_router(router(chat_handler()), prefix=prefix, dependencies=[Depends(identify)])
    return app


def nested():
    app, outer = FastAPI(), APIRouter(dependencies=[Depends(identify)])
    outer.include_router(router(chat_handler()))
    app.include_router(outer)
    return app


def of_the_application():
    app = FastAPI(dependencies=[Depends(identify)])
    app.include_router(router(chat_handler()))
    return app


@pytest.mark.parametrize("make_app", [included, nested, of_the_application])
@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("POST", "/nothing"), ("PUT", "/stream")])
def test_dependencies_guard_every_route(make_app, method, path):
    assert send(make_app(), method, f"/__aibind__{path}") == (401, b'{"detail":"who are you?"}')


def test_dependency_passes_data_to_generate():
    assert send(included(), "POST", "/__aibind__/complete", user="me") == (200, b"complete for me")
    assert send(included("/v1"), "POST", "/v1/__aibind__/title", user="me") == (200, b"title for me")


def test_unknown_route_and_wrong_method_have_the_error_of_the_handler():
    assert send(included(), "POST", "/__aibind__/nothing", user="me") == (404, b'{"error": "not found"}')
    assert send(included(), "GET", "/__aibind__/stream", user="me") == (405, b'{"error": "use POST"}')


def test_refusals_have_their_status():
    def refuse(*arguments):
        raise HTTPException(402, "no money left")

    for handler, path in ((handler_of(refuse), "stream"), (handler_of(authorize=refuse), "stream")):
        app = FastAPI()
        app.include_router(router(handler))
        assert send(app, "POST", f"/__aibind__/{path}") == (402, b'{"detail":"no money left"}')


def test_routes_are_in_the_openapi_schema():
    handler = chat_handler(prefix="/ai")
    app = FastAPI()
    app.include_router(router(handler))
    schema = app.openapi()
    paths = schema["paths"].items()
    operations = {(method.upper(), path): item for path, methods in paths for method, item in methods.items()}
    assert operations.keys() == {(method, f"/ai{path}") for method, path in routes_of(handler)}
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
    stream = operations["POST", "/ai/stream"]
    body = stream["requestBody"]["content"]["application/json"]["schema"]
    assert body["anyOf"] == [{"required": ["prompt"]}, {"required": ["regenerate"]}]
    assert set(body["properties"]) == {"prompt", "system", "model", "sessionId", "parentId", "regenerate"}
    assert list(stream["responses"]["200"]["content"]) == ["text/event-stream"]
    resume = operations["GET", "/ai/stream/resume"]
    assert [parameter["name"] for parameter in resume["parameters"]] == ["id", "after", "Last-Event-ID"]
    conversations = operations["GET", "/ai/conversations"]
    assert [parameter["name"] for parameter in conversations["parameters"]] == ["limit", "before"]
    for method in ("GET", "PATCH", "DELETE"):
        operation = operations[method, "/ai/conversations/{id}"]
        assert [(each["name"], each["in"], each["required"]) for each in operation["parameters"]] == [
            ("id", "path", True)
        ]
        assert ("requestBody" in operation) == (method == "PATCH")


def test_answers_in_the_schema_are_those_of_the_handler():
    app = FastAPI()
    app.include_router(router(chat_handler()))
    paths = app.openapi()["paths"]

    def answer(method, path):
        responses = paths[f"/__aibind__{path}"][method]["responses"]
        assert list(responses["4XX"]["content"]["application/json"]["schema"]["properties"]) == ["error"]
        return responses["200"]["content"]["application/json"]["schema"]["properties"]

    fields = conversation_fields(ConversationInfo("s"))
    assert list(answer("patch", "/conversations/{id}")) == list(fields)
    shown = answer("get", "/conversations/{id}")
    assert list(shown) == [*fields, "history"]
    chat = ChatHistory()
    chat.append("x")
    document = chat.tree.serialize()
    assert shown["history"]["properties"].keys() == document.keys()
    [node] = document["nodes"].values()
    assert shown["history"]["properties"]["nodes"]["additionalProperties"]["properties"].keys() == node.keys()
    listed = answer("get", "/conversations")
    assert listed["conversations"]["items"]["properties"].keys() == fields.keys()
    assert list(answer("post", "/compact")) == ["summary", "tokensSaved"]
    assert list(answer("post", "/stream/stop")) == list(answer("delete", "/conversations/{id}")) == ["ok"]


def test_required_fields_of_the_schema_are_those_of_the_handler():
    app = FastAPI()
    app.include_router(router(chat_handler()))
    for path, methods in app.openapi()["paths"].items():
        if "post" in methods:
            schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            [required] = schema["anyOf"][0]["required"] if "anyOf" in schema else schema["required"]
            incomplete = {name: value for name, value in BODY.items() if name != required}
            status, error = send(app, "POST", path, incomplete)
            assert (status, json.loads(error)["error"]) == (400, f"{required} is required")


def test_sync_handler_raises():
    with pytest.raises(TypeError, match="take an asynchronous handler, not StreamHandler"):
        router(StreamHandler(iter, store=PostgresStreamStore("")))
