"""A router for FastAPI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from .._async.ag_ui_handler import AsyncAgUiHandler
from .._async.ai_sdk_handler import AsyncAiSdkHandler
from .._async.web_handler import AsyncWebHandler
from .starlette import ANY_PATH, METHODS, check_flavour, respond

_TEXT: dict[str, Any] = {"type": "string"}
_MESSAGES = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _TEXT},
        "required": ["role", "content"],
    },
}
_PROPERTIES = {
    "activeLeafId": _TEXT,
    "id": _TEXT,
    "input": _TEXT,
    "messages": _MESSAGES,
    "model": _TEXT,
    "parentId": {"type": ["string", "null"]},
    "prompt": _TEXT,
    "regenerate": {"type": "boolean"},
    "schema": {"type": "object"},
    "sessionId": _TEXT,
    "system": _TEXT,
    "title": {"type": ["string", "null"]},
}
_NULLABLE: dict[str, Any] = {"type": ["string", "null"]}
_TIME: dict[str, Any] = {**_NULLABLE, "format": "date-time"}
_JSON = "application/json"


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_NODE = _object(
    id=_TEXT,
    message={},
    parentId=_NULLABLE,
    children={"type": "array", "items": _TEXT},
    metadata={"type": "object"},
    createdAt={"type": "string", "format": "date-time"},
)
_HISTORY = _object(
    version={"type": "integer"},
    nodes={"type": "object", "additionalProperties": _NODE},
    rootIds={"type": "array", "items": _TEXT},
    activeLeafId=_NULLABLE,
)
_FIELDS: dict[str, dict[str, Any]] = {
    "id": _TEXT,
    "title": _NULLABLE,
    "metadata": {},
    "createdAt": _TIME,
    "updatedAt": _TIME,
    "activeStreamId": _NULLABLE,
}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {_JSON: {"schema": schema}}


# The content of responses.
_EVENTS: dict[str, Any] = {"text/event-stream": {"schema": _TEXT}}
_PLAIN: dict[str, Any] = {"text/plain": {"schema": _TEXT}}
_OK = _json(_object(ok={"const": True}))
_SUMMARY = _json(_object(summary=_TEXT, tokensSaved={"type": "integer"}))
_CONVERSATION = _json(_object(**_FIELDS))
_WITH_HISTORY = _json(_object(**_FIELDS, history=_HISTORY))
_LIST = _json(_object(conversations={"type": "array", "items": _object(**_FIELDS)}, next=_NULLABLE))
_ERROR = _json(_object(error=_TEXT))


class _Description(NamedTuple):
    """A route in the OpenAPI schema: its summary, the content of the response, and what the request consists of."""

    summary: str
    response: dict[str, Any]
    fields: tuple[str, ...] = ()  # of the body
    required: tuple[str, ...] = ()
    parameters: tuple[dict[str, Any], ...] = ()


def _parameter(name: str, place: str = "query") -> dict[str, Any]:
    return {"name": name, "in": place, "required": name == "id", "schema": _TEXT}


_ID = (_parameter("id", "path"),)

# By method and by the last part of a path.
_DESCRIPTIONS = {
    ("POST", "stream"): _Description(
        "Start an answer",
        _EVENTS,
        ("prompt", "system", "model", "sessionId", "parentId", "regenerate"),
        ("prompt",),
    ),
    ("POST", "structured"): _Description(
        "Start a structured answer", _EVENTS, ("prompt", "schema", "system", "model", "sessionId"), ("prompt",)
    ),
    ("POST", "chat"): _Description(
        "Start an answer to messages", _EVENTS, ("messages", "system", "model", "sessionId"), ("messages",)
    ),
    ("GET", "resume"): _Description(
        "Continue reading an answer",
        _EVENTS,
        parameters=(_parameter("id"), _parameter("after"), _parameter("Last-Event-ID", "header")),
    ),
    ("POST", "stop"): _Description("Stop an answer", _OK, ("id",), ("id",)),
    ("POST", "compact"): _Description(
        "Summarise a conversation", _SUMMARY, ("messages", "model", "sessionId"), ("messages",)
    ),
    ("POST", "complete"): _Description(
        "Complete a text", _PLAIN, ("input", "system", "model", "sessionId"), ("input",)
    ),
    ("POST", "title"): _Description("Write a title", _PLAIN, ("messages", "model", "sessionId"), ("messages",)),
    ("GET", "conversations"): _Description(
        "List conversations", _LIST, parameters=(_parameter("limit"), _parameter("before"))
    ),
    ("GET", "{id}"): _Description("Show a conversation", _WITH_HISTORY, parameters=_ID),
    ("PATCH", "{id}"): _Description(
        "Change the title or the branch of a conversation", _CONVERSATION, ("title", "activeLeafId"), parameters=_ID
    ),
    ("DELETE", "{id}"): _Description("Delete a conversation", _OK, parameters=_ID),
}


# The same for an `AsyncAiSdkHandler`, by method and path.
_PARTS: dict[str, Any] = {"type": "array", "items": {"type": "object"}}
_UI_MESSAGE = _object(id=_TEXT, role={"enum": ["user", "assistant", "system"]}, parts=_PARTS)
_UI_MESSAGES = {"type": "array", "items": _UI_MESSAGE}
_PROPERTIES["trigger"] = {"enum": ["submit-message", "regenerate-message"]}
_PROPERTIES["messageId"] = _PROPERTIES["activeStreamId"] = _TEXT
_PROPERTIES["message"] = _UI_MESSAGE
_CHAT = _json(_object(id=_TEXT, title=_NULLABLE, messages=_UI_MESSAGES, activeStreamId=_NULLABLE))
_AI_SDK_DESCRIPTIONS = {
    ("POST", ""): _Description(
        "Start an answer as a UI message stream", _EVENTS, ("id", "message", "trigger", "messageId"), ("id",)
    ),
    ("GET", "/{id}/stream"): _Description("Replay the running answer, and follow it", _EVENTS, parameters=_ID),
    ("POST", "/{id}/stop"): _Description(
        "Stop the running answer", _json(_object(success={"const": True})), ("activeStreamId",), parameters=_ID
    ),
    ("GET", ""): _Description("List chats", _LIST, parameters=(_parameter("limit"), _parameter("before"))),
    ("GET", "/{id}"): _Description("Show a chat", _CHAT, parameters=_ID),
    ("DELETE", "/{id}"): _Description("Delete a chat", _OK, parameters=_ID),
}

# The same for an `AsyncAgUiHandler`.
_PROPERTIES["threadId"] = _PROPERTIES["runId"] = _TEXT
_AG_UI_DESCRIPTIONS = {
    ("POST", ""): _Description("Start a run", _EVENTS, ("threadId", "runId"), ("threadId", "runId", "messages")),
    ("GET", "/{id}"): _Description("Replay a run, and follow it", _EVENTS, parameters=_ID),
    ("POST", "/{id}/stop"): _Description("Stop a run", _OK, parameters=_ID),
}


def router(handler: AsyncWebHandler) -> APIRouter:
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
    for path, methods in handler._routes.items():
        for method in methods:
            description = _description(handler, method, path)
            result.add_api_route(
                (handler.prefix + path.replace("{id}", f"{{id:{ANY_PATH}}}")) or "/",
                _endpoint(handler, path),
                methods=[method],
                name="aibind",
                summary=description.summary,
                response_class=Response,
                responses={
                    200: {"content": description.response},
                    "4XX": {"description": "Refused", "content": _ERROR},
                    "5XX": {"description": "Failed", "content": _ERROR},
                },
                openapi_extra=_request_schema(description),
            )
    # The handler also responds to other paths and methods below its prefix.
    result.add_api_route(
        f"{handler.prefix}/{{path:{ANY_PATH}}}",
        _endpoint(handler),
        methods=METHODS,
        name="aibind",
        include_in_schema=False,
    )
    return result


def _description(handler: AsyncWebHandler, method: str, path: str) -> _Description:
    if isinstance(handler, AsyncAiSdkHandler):
        return _AI_SDK_DESCRIPTIONS[method, path]
    if isinstance(handler, AsyncAgUiHandler):
        return _AG_UI_DESCRIPTIONS[method, path]
    return _DESCRIPTIONS[method, path.rpartition("/")[2]]


def _endpoint(handler: AsyncWebHandler, path: str = "/{path}") -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await respond(handler, request, path.format_map(request.path_params))

    return answer


def _request_schema(description: _Description) -> dict[str, Any]:
    schema: dict[str, Any] = {"parameters": list(description.parameters)} if description.parameters else {}
    if description.fields:
        properties = {name: _PROPERTIES[name] for name in description.fields}
        body: dict[str, Any] = {"type": "object", "properties": properties, "required": list(description.required)}
        if "regenerate" in properties:  # then the prompt is stored
            body["anyOf"] = [{"required": body.pop("required")}, {"required": ["regenerate"]}]
        schema["requestBody"] = {"required": bool(description.required), "content": _json(body)}
    return schema
