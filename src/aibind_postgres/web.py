"""The HTTP surface as plain data: a request, what it asks to be generated, and why it is refused. Pure.

Paths, bodies and texts are those that aibind's browser client knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

from .errors import WebError

Kind = Literal["stream", "structured", "chat", "compact", "complete", "title"]


class WebRequest(NamedTuple):
    """A request, from any framework. The names of headers are in lower case; `original` is the framework's own.

    An answer goes on when its request may be over: `context`, as for a durable stream, sets up what the framework has
    for a request.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    original: Any = None
    context: Callable[[], Any] = nullcontext

    def __repr__(self) -> str:
        """Leave out values that may be secret: of the query, of headers such as Cookie, and the body."""
        query, headers = ", ".join(self.query), ", ".join(self.headers)
        return (
            f"<{type(self).__name__} {self.method} {self.path}, query: [{query}], headers: [{headers}], "
            f"{len(self.body)} bytes>"
        )


class Generation(NamedTuple):
    """What `generate` is asked for.

    `messages` is the conversation, what was said before included, each with `role` and `content`, and the last one is
    `prompt`; for `compact`, where it is to be summed up, there is no prompt. `body` is all that the client sent, with
    whatever else is agreed on: `attachments`, `toolset`, `maxSteps`. `stream_id` is the id of the stream that the
    answer becomes, where it becomes one.
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

    def __repr__(self) -> str:
        """Leave out texts and the request's values, which may be secret."""
        return (
            f"<{type(self).__name__} {self.kind}, {len(self.messages)} messages, model={self.model!r}, "
            f"session_id={self.session_id!r}, stream_id={self.stream_id!r}, {self.request!r}>"
        )


def parsed_body(request: WebRequest) -> dict[str, Any]:
    """Return the JSON object in the body of a request; raise `WebError` for anything else."""
    try:
        body = json.loads(request.body)
    except (ValueError, RecursionError):
        raise WebError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise WebError(400, "the body must be a JSON object")
    return body


def generation_of(kind: Kind, request: WebRequest) -> Generation:
    """Return what a request asks to be generated; raise `WebError` for one that does not say so."""
    body = parsed_body(request)
    if kind in ("chat", "compact", "title"):
        messages = _messages(body, may_be_empty=kind == "compact")
        prompt = "" if kind == "compact" else messages[-1]["content"]
    else:
        prompt = text_in(body, "input" if kind == "complete" else "prompt")
        messages = [{"role": "user", "content": prompt}]
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


def text_in(body: Mapping[str, Any], name: str) -> str:
    """Return a text that must be there, and more than white space."""
    text = _optional_text(body, name)
    if text is None or not text.strip():
        raise WebError(400, f"{name} is required")
    return text


def _optional_text(body: Mapping[str, Any], name: str) -> str | None:
    text = body.get(name)
    if text is not None and not isinstance(text, str):
        raise WebError(400, f"{name} must be a string")
    return text


def _messages(body: Mapping[str, Any], *, may_be_empty: bool) -> list[dict[str, Any]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not (messages or may_be_empty):
        raise WebError(400, "messages is required")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
            raise WebError(400, "each of the messages must have the role user, assistant or system")
        if not isinstance(message.get("content"), str):
            raise WebError(400, "each of the messages must have a content, a string")
    return messages


def resume_point(request: WebRequest, stream_id: str) -> int:
    """Return the number after which to resume.

    A browser's `EventSource` says it in a header, later than the address that it was made with: and there the id of the
    stream stands for its beginning, since that is the id of the first event, unless it could be that of another.
    """
    point = request.headers.get("last-event-id") or request.query.get("after") or "0"
    if point.isascii() and point.isdigit() and len(point) <= 15:
        return int(point)
    if point != stream_id:
        raise WebError(400, "after must be the number of an event")
    return 0


def tokens_saved(usage: str) -> int:
    """Return how many tokens of its input a summary does without, by the data of a `usage` event; 0 if unknown."""
    try:
        counts = json.loads(usage)
        return int(counts["inputTokens"]) - int(counts["outputTokens"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return 0
