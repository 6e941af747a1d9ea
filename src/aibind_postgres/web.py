"""HTTP requests as plain data, and the parsing of their bodies. Pure.

Paths and JSON fields follow the protocol of aibind's browser client.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl

from ._json import reject_constant
from ._turns import Position
from .errors import WebError
from .models import ConversationInfo

Kind = Literal["stream", "structured", "chat", "compact", "complete", "title", "run"]

_DEFAULT_PORTS = {"http": ":80", "https": ":443"}  # browsers leave them out

PAGE, MAX_PAGE = 50, 200  # conversations in a list

MAX_VALUES = 100_000  # in one body: parsing more would block all threads for long, and take much memory


class QueryParameters(dict[str, str]):
    """The parameters of a query string.

    Args:
        query_string: The query string as the client sent it, percent-encoded and without the question mark.

    Attributes:
        problem: The reason for which the handler rejects the request with status 400: a name occurs twice, or the
            string is not UTF-8. None if there is no problem.
    """

    def __init__(self, query_string: bytes) -> None:
        self.problem: str | None = None
        try:
            pairs = parse_qsl(query_string.decode(), keep_blank_values=True, errors="strict")
        except UnicodeDecodeError:
            pairs, self.problem = [], "the query string is not UTF-8"
        super().__init__(pairs)
        if len(self) < len(pairs):  # another program, such as a proxy that checks access, may read the other value
            self.problem = "a query parameter occurs twice"


class WebRequest(NamedTuple):
    """An HTTP request of any framework, as the argument of a handler.

    Attributes:
        method: The HTTP method in upper case.
        path: The path, including the handler's prefix.
        query: The query parameters, one value for each name. Pass `QueryParameters`, so that the handler can reject an
            ambiguous query string.
        headers: The headers, with names in lower case.
        body: The body. If it is longer than the handler's `max_body`, the first `max_body + 1` bytes suffice: the
            handler rejects it.
        original: The request object of the framework, for `generate`, `owner` and `authorize`. Default: None.
        context: Returns a context manager that is entered around the source and around `on_finish`. Both may run after
            the request has ended, so an integration sets up the resources there that the framework binds to requests.
            Default: no context.
        disconnect: Called from any thread if the client has not read a streamed body for the handler's `send_timeout`.
            It should close the connection, so that the server does not wait for the client. Default: None, for
            integrations that cannot close it.
        refusals: The classes of the exceptions with which the framework refuses requests. If `generate`, `owner` or
            `authorize` raises one, `handle` raises it to the framework, which responds with its status. Default: none.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    original: Any = None
    context: Callable[[], Any] = nullcontext
    disconnect: Callable[[], object] | None = None
    refusals: tuple[type[Exception], ...] = ()

    def __repr__(self) -> str:
        """Omit values that may be secret: those of the query and the headers, and the body."""
        query, headers = ", ".join(self.query), ", ".join(self.headers)
        return (
            f"<{type(self).__name__} {self.method} {self.path}, query: [{query}], headers: [{headers}], "
            f"{len(self.body)} bytes>"
        )


class Resource(NamedTuple):
    """The second argument of `authorize`: the stream or conversation that a request wants to use.

    Attributes:
        kind: `"stream"`, or `"conversation"` for a session.
        id: The id of the stream, or of the conversation. Clients choose the ids of conversations, which may not exist.
        owner: The stored owner. For a stream without an owner, the owner of its conversation. None if there is none, or
            without migration 0004.
        session_id: The id of the conversation, or of the conversation of the stream. None if the stream has none.
    """

    kind: Literal["stream", "conversation"]
    id: str
    owner: str | None
    session_id: str | None


class Generation(NamedTuple):
    """The argument of `generate`: one parsed request for text from a model.

    Attributes:
        kind: The route that was called. `run` for an `AgUiHandler`.
        prompt: The `prompt` or `input` field, or the content of the last message. Empty for `compact`.
        messages: The messages of the conversation, each with `role` and `content`. The last one is `prompt`,
            unless the answer continues a message of an `AiSdkHandler`. For `compact`, these are the messages to
            summarise. For an `AgUiHandler`, these are the messages of AG-UI.
        system: The system prompt, if the client sent one.
        model: The name of a model, if the client sent one.
        session_id: The id of the conversation, if the client sent one.
        schema: The JSON schema of a structured answer, or None.
        body: The whole JSON object that the client sent, with application fields such as `attachments`, `toolset` or
            `maxSteps`.
        request: The HTTP request.
        stream_id: The id of the stream that stores the answer. None if the answer is plain text or JSON.
        owner: The result of the handler's `owner`, or None.
        ui_messages: For an `AiSdkHandler`: the messages as UIMessages, with all their parts. If the last one has the
            role `assistant`, the answer continues it. `messages` has the texts only, and no answer without a text: use
            this attribute with tools. Default: none.
        message_id: For an `AiSdkHandler`: the id of the message with the answer. Default: None.
    """

    kind: Kind
    prompt: str
    messages: list[dict[str, Any]]
    system: str | None
    model: str | None
    session_id: str | None
    schema: Any
    body: Mapping[str, Any]
    request: WebRequest
    stream_id: str | None = None
    owner: str | None = None
    ui_messages: Sequence[dict[str, Any]] = ()
    message_id: str | None = None

    def __repr__(self) -> str:
        """Omit the texts and the values of the request, which may be secret."""
        return (
            f"<{type(self).__name__} {self.kind}, {len(self.messages)} messages, model={self.model!r}, "
            f"session_id={self.session_id!r}, stream_id={self.stream_id!r}, {self.request!r}>"
        )


def parse_origins(origins: Collection[str]) -> frozenset[str]:
    """Return origins in the form in which browsers send them. Raise `ValueError` for a text that is not an origin."""
    if isinstance(origins, str):
        raise ValueError(f"allowed_origins must be a list of origins, not the text {origins!r}")
    for origin in origins:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#@*\s]+", origin):
            raise ValueError(f"allowed_origins must contain origins such as 'https://example.com', not {origin!r}")
    return frozenset(origin.lower() for origin in origins)


def is_cross_site(headers: Mapping[str, str], allowed_origins: Collection[str]) -> bool:
    """Return True if a page of another origin has sent a request, and its origin is not allowed.

    A page cannot forge these headers, and other clients send neither of them:

    - Current browsers send `Sec-Fetch-Site` to HTTPS servers and to this machine. Proxies do not change it. The value
      `same-site` stands for another origin, such as a sibling domain or another port, which someone else may control.
    - Browsers send `Origin` with each POST request. Its host must be the one of the request. It may have another
      scheme, since a proxy may have received the request by HTTPS.

    Args:
        headers: The headers of the request, with names in lower case.
        allowed_origins: The result of `parse_origins`.
    """
    origin = headers.get("origin")
    if origin is not None and origin.lower() in allowed_origins:
        return False
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")  # none: the user entered the address
    if origin is None:
        return False
    scheme, _, host = origin.lower().partition("://")
    port = _DEFAULT_PORTS.get(scheme, "")
    return not host or host.removesuffix(port) != headers.get("host", "").lower().removesuffix(port)


def is_json(headers: Mapping[str, str]) -> bool:
    """Return True if the body is declared as JSON. A page cannot send this to another origin without a preflight."""
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def parse_body(request: WebRequest) -> dict[str, Any]:
    """Return the JSON object in the body of a request.

    Raises:
        WebError: 400: the body is not a JSON object in UTF-8. JSON from the network has no byte order mark (RFC 8259).
            413: it has more than `MAX_VALUES` values.
    """
    if _has_many_values(request.body):
        raise WebError(413, f"the body must have at most {MAX_VALUES} values")
    try:
        # From bytes, `loads` would also accept UTF-16 and UTF-32.
        body = json.loads(request.body.decode(), parse_constant=reject_constant)
    except (ValueError, RecursionError):
        raise WebError(400, "the body is not JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise WebError(400, "the body must be a JSON object")
    return body


def _has_many_values(body: bytes) -> bool:
    """Return True if JSON has more than about `MAX_VALUES` values."""
    if _count_separators(body) <= MAX_VALUES:
        return False
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') > 4 * MAX_VALUES:  # a value has at most two texts: itself and its key
        return True
    return _count_separators(re.sub(rb'"[^"]*"?', b"", unescaped)) > MAX_VALUES


def _count_separators(body: bytes) -> int:
    return sum(map(body.count, (b",", b"[", b"{")))


def parse_generation(kind: Kind, request: WebRequest) -> Generation:
    """Parse the body of a request. Raise `WebError` (400) if a field is missing or has the wrong type."""
    body = parse_body(request)
    if kind in ("chat", "compact", "title"):
        messages = _required_messages(body, allow_empty=kind == "compact")
        prompt = "" if kind == "compact" else messages[-1]["content"]
    else:
        # An answer to a stored question needs no prompt.
        repeats = kind == "stream" and body.get("regenerate") is True
        prompt = "" if repeats else required_text(body, "input" if kind == "complete" else "prompt")
        messages = [] if repeats else [{"role": "user", "content": prompt}]
    return Generation(
        kind=kind,
        prompt=prompt,
        messages=messages,
        system=_optional_text(body, "system"),
        model=_optional_text(body, "model"),
        session_id=_optional_text(body, "sessionId") or None,
        schema=body.get("schema"),
        body=body,
        request=request,
    )


def parse_run(request: WebRequest) -> Generation:
    """Parse a `RunAgentInput` of AG-UI. Raise `WebError` (400) if a required field is missing or has the wrong type."""
    body = parse_body(request)
    run_id, thread_id = required_text(body, "runId"), required_text(body, "threadId")
    if run_id in (".", "..") or run_id.endswith("/stop"):
        raise WebError(400, "runId must not be '.' or '..', and must not end with '/stop', since it is part of a path")
    for name in ("messages", "tools", "context", "resume"):
        items = body.get(name)
        if not (isinstance(items, list) or (items is None and name != "messages")):
            raise WebError(400, f"{name} must be a list")
    messages = body["messages"]
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise WebError(400, "each message must be an object with a role")
    return Generation(
        kind="run",
        prompt=_text_content(messages[-1]) if messages else "",
        messages=messages,
        system=None,
        model=None,
        session_id=thread_id,
        schema=None,
        body=body,
        request=request,
        stream_id=run_id,
    )


def _text_content(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content is a string or a list of parts."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join([text for text in texts if isinstance(text, str)])
    return content if isinstance(content, str) else ""


def parse_position(body: Mapping[str, Any]) -> Position:
    """Parse `parentId` and `regenerate`. Raise `WebError` (400) if one has the wrong type."""
    regenerate = body.get("regenerate", False)
    if not isinstance(regenerate, bool):
        raise WebError(400, "regenerate must be true or false")
    return Position(_optional_text(body, "parentId"), "parentId" in body, regenerate)


def parse_page(query: Mapping[str, str]) -> tuple[int, ConversationInfo | None]:
    """Return the `limit` and the position `before` of a list. Raise `WebError` (400) if one is invalid."""
    limit = query.get("limit", str(PAGE))
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE):
        raise WebError(400, f"limit must be a number from 1 to {MAX_PAGE}")
    if not (before := query.get("before")):
        return int(limit), None
    updated_at, separator, session_id = before.partition(" ")
    try:
        time = _parse_time(updated_at) if updated_at else None
    except (ValueError, OverflowError):
        separator = ""
    if not separator:
        raise WebError(400, "before must be the value of next of an earlier page")
    return int(limit), ConversationInfo(session_id, updated_at=time)


def page_position(info: ConversationInfo) -> str:
    """Return the position after an entry of a list, for `parse_page`."""
    return f"{_time(info.updated_at) or ''} {info.session_id}"


def conversation_fields(info: ConversationInfo) -> dict[str, Any]:
    """Return an entry of a list of conversations as a JSON object."""
    return {
        "id": info.session_id,
        "title": info.title,
        "metadata": info.metadata,
        "createdAt": _time(info.created_at),
        "updatedAt": _time(info.updated_at),
        "activeStreamId": info.active_stream_id,
    }


def _parse_time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("a time zone is missing")
    return time.astimezone(timezone.utc)  # PostgreSQL refuses some offsets that Python accepts


def _time(value: datetime | None) -> str | None:
    return None if value is None else value.isoformat()


def required_text(body: Mapping[str, Any], name: str) -> str:
    """Return a string field. Raise `WebError` (400) if it is missing, blank or not a string."""
    text = _optional_text(body, name)
    if text is None or not text.strip():
        raise WebError(400, f"{name} is required")
    return text


def _optional_text(body: Mapping[str, Any], name: str) -> str | None:
    text = body.get(name)
    if text is not None and not isinstance(text, str):
        raise WebError(400, f"{name} must be a string")
    return text


def _required_messages(body: Mapping[str, Any], *, allow_empty: bool) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not (messages or allow_empty):
        raise WebError(400, "messages is required")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
            raise WebError(400, "each message must have the role user, assistant or system")
        if not isinstance(message.get("content"), str):
            raise WebError(400, "each message must have a content of type string")
    return messages


def parse_resume_cursor(request: WebRequest, stream_id: str) -> int:
    """Return the sequence number after which to resume.

    The header `Last-Event-ID` takes precedence over the query parameter `after`, since `EventSource` updates the header
    and not the URL. The first event of a stream has the stream id as its event id, so this id means 0. A stream
    id of at most 15 digits is read as a sequence number.

    Raises:
        WebError: 400: the value is neither a sequence number nor the stream id.
    """
    cursor = request.headers.get("last-event-id") or request.query.get("after") or "0"
    if cursor.isascii() and cursor.isdigit() and len(cursor) <= 15:
        return int(cursor)
    if cursor != stream_id:
        raise WebError(400, f"after must be a sequence number of at most 15 digits, not {cursor[:50]!r}")
    return 0


def count_tokens_saved(usage: str) -> int:
    """Return `inputTokens` minus `outputTokens` of a `usage` event's data, or 0 if they are unknown."""
    try:
        counts = json.loads(usage)
        return int(counts["inputTokens"]) - int(counts["outputTokens"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return 0
