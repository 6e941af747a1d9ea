"""A router for FastAPI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .. import AsyncStreamHandler
from .starlette import METHODS, check_flavour, respond

_TEXT = {"type": "string"}
_MESSAGES = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _TEXT},
        "required": ["role", "content"],
    },
}
_PROPERTIES = {
    "id": _TEXT,
    "input": _TEXT,
    "messages": _MESSAGES,
    "model": _TEXT,
    "prompt": _TEXT,
    "schema": {"type": "object"},
    "sessionId": _TEXT,
    "system": _TEXT,
}
_EVENTS, _JSON, _PLAIN = "text/event-stream", "application/json", "text/plain"

# By the last part of a route: a summary, the fields of the body with the required one first, and the response.
_DESCRIPTIONS: dict[str, tuple[str, list[str], str]] = {
    "stream": ("Start an answer", ["prompt", "system", "model", "sessionId"], _EVENTS),
    "structured": ("Start a structured answer", ["prompt", "schema", "system", "model", "sessionId"], _EVENTS),
    "chat": ("Start an answer to messages", ["messages", "system", "model", "sessionId"], _EVENTS),
    "resume": ("Continue reading an answer", [], _EVENTS),
    "stop": ("Stop an answer", ["id"], _JSON),
    "compact": ("Summarise a conversation", ["messages", "model", "sessionId"], _JSON),
    "complete": ("Complete a text", ["input", "system", "model", "sessionId"], _PLAIN),
    "title": ("Write a title", ["messages", "model", "sessionId"], _PLAIN),
}
_RESUME_PARAMETERS = [
    {"name": "id", "in": "query", "required": True, "schema": _TEXT},
    {"name": "after", "in": "query", "schema": _TEXT},
    {"name": "Last-Event-ID", "in": "header", "schema": _TEXT},
]


def router(handler: AsyncStreamHandler) -> APIRouter:
    """Return a router with the routes of a handler.

    Dependencies of `include_router` and of the application run before each route, as they do for other routes. They can
    pass data to `generate` and `authorize` in `request.state`: `WebRequest.original` is the Starlette request. The
    routes are part of the OpenAPI schema.

    Args:
        handler: The handler to route requests to.

    Returns:
        The router. Its paths begin with the handler's prefix.

    Raises:
        TypeError: The handler is synchronous.

    Example:
        `app.include_router(router(handler), dependencies=[Depends(current_user)])`
    """
    check_flavour(handler)
    result = APIRouter()
    for path, (method, _) in handler._routes.items():
        summary, fields, media_type = _DESCRIPTIONS[path.rpartition("/")[2]]
        result.add_api_route(
            handler.prefix + path,
            _endpoint(handler, path),
            methods=[method],
            name="aibind",
            summary=summary,
            response_class=Response,
            responses={200: {"content": {media_type: {}}}},
            openapi_extra=_request_schema(fields),
        )
    # The handler also responds to other paths and methods below its prefix.
    result.add_api_route(
        f"{handler.prefix}/{{path:path}}", _endpoint(handler), methods=METHODS, name="aibind", include_in_schema=False
    )
    return result


def _endpoint(handler: AsyncStreamHandler, path: str | None = None) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await respond(handler, request, path or f"/{request.path_params['path']}")

    return answer


def _request_schema(fields: list[str]) -> dict[str, Any]:
    if not fields:
        return {"parameters": _RESUME_PARAMETERS}
    properties = {name: _PROPERTIES[name] for name in fields}
    schema = {"type": "object", "properties": properties, "required": fields[:1]}
    return {"requestBody": {"required": True, "content": {_JSON: {"schema": schema}}}}
