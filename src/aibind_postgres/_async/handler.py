"""The HTTP surface that aibind's browser client talks to, for any framework."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .. import _arguments as arguments
from .._concurrency import async_call_or_await
from ..errors import ConversationConflictError, InvalidDataError, StreamNotFoundError, WebError
from ..history import new_id
from ..web import (
    Generation,
    Kind,
    WebRequest,
    generation_of,
    parsed_body,
    resume_point,
    text_in,
    tokens_saved,
)
from .durable_stream import AsyncDurableStream
from .producing import GENERIC_ERROR, close_source

if TYPE_CHECKING:
    from ..history import ChatHistory
    from ..models import StreamEvent, StreamStatus
    from .conversation_store import AsyncPostgresConversationStore
    from .stream_store import AsyncPostgresStreamStore

logger = logging.getLogger("aibind_postgres")

EVENT_STREAM = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
    "Access-Control-Expose-Headers": "X-Stream-Id",
}
PLAIN_TEXT = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-cache"}


@dataclass(frozen=True)
class AsyncWebResponse:
    """An answer, for any framework. The body is complete, or an iterator of events to be sent as they come."""

    status: int
    headers: Mapping[str, str]
    body: bytes | AsyncIterator[bytes]

    def __repr__(self) -> str:
        body = f"{len(self.body)} bytes" if isinstance(self.body, bytes) else "event stream"
        return f"<{type(self).__name__} {self.status}, {body}>"


class AsyncStreamHandler:
    """Answers the requests of aibind's browser client.

    `generate` is called with a `Generation` and returns an iterable of `str` and `StreamEvent`, such as a generator.
    What it yields becomes a stream in `store` that survives a reload, a lost connection and a restarted worker; for the
    routes that answer with plain text or JSON it is put together. `compact`, if given, is called in its place for the
    summary of a conversation. Both may yield a `usage` event.

    With `conversations`, a request to `stream` with a session id gets what was said before, the last `max_messages` of
    it, and the turn is saved by a merging save: before the stream is done, or when it was stopped or broke off, with
    what was written until then, and the state in the metadata of the answer.

    `authorize` is called with the request and an id, that of a stream or of a session, before anything of it is read,
    resumed, stopped or saved; if it returns something false, the answer is 403. Whose a stream is, `generate` can note
    by its `stream_id`. Without `authorize`, who knows an id may use it: those of streams cannot be guessed.

    `max_body` is the most bytes that a request may have: the browser sends what is attached to a conversation in each
    of its requests, a third longer than the files are. `heartbeat` and `expose_errors` are those of a durable stream.
    """

    def __init__(
        self,
        generate: Callable[[Generation], Any],
        *,
        store: AsyncPostgresStreamStore,
        conversations: AsyncPostgresConversationStore | None = None,
        prefix: str = "/__aibind__",
        authorize: Callable[[WebRequest, str], Any] | None = None,
        max_messages: int | None = None,
        compact: Callable[[Generation], Any] | None = None,
        max_body: int = 10_000_000,
        heartbeat: float | timedelta = 15.0,
        expose_errors: bool = False,
    ) -> None:
        self.prefix = prefix.rstrip("/")
        if self.prefix and not self.prefix.startswith("/"):
            raise ValueError(f"prefix must begin with a slash, not {prefix!r}")
        self.max_body = arguments.sequence_number(max_body, "max_body", least=0)
        self._generate = generate
        self._compact = compact or generate
        self._store = store
        self._conversations = conversations
        self._authorize = authorize
        if max_messages is not None:
            arguments.sequence_number(max_messages, "max_messages", least=1)
        self._max_messages = max_messages
        self._heartbeat = arguments.seconds(heartbeat, "heartbeat")
        self._expose_errors = expose_errors
        self._routes: dict[str, tuple[str, Callable[[WebRequest], Any]]] = {
            "/stream": ("POST", partial(self._stream, "stream")),
            "/structured": ("POST", partial(self._stream, "structured")),
            "/chat": ("POST", partial(self._stream, "chat")),
            "/complete": ("POST", partial(self._text, "complete")),
            "/title": ("POST", partial(self._text, "title")),
        }
        for path in ("/stream", "/structured"):
            self._routes[f"{path}/stop"] = ("POST", self._stop)
            self._routes[f"{path}/resume"] = ("GET", self._resume)
        for path in ("", "/stream", "/structured"):
            self._routes[f"{path}/compact"] = ("POST", self._summarize)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.prefix!r}, {self._store!r}>"

    async def handle(self, request: WebRequest) -> AsyncWebResponse:
        """Answer a request; what is wrong with it, or with the answer, becomes a status and a text in JSON."""
        route = request.path.removeprefix(self.prefix) if request.path.startswith(self.prefix) else None
        method, respond = self._routes.get(route or "", ("", None))
        try:
            if respond is None:
                raise WebError(404, "not found")
            if request.method != method:
                return _json({"error": f"use {method}"}, 405, {"Allow": method})
            if len(request.body) > self.max_body:
                raise WebError(413, f"the body must be at most {self.max_body} bytes long")
            response: AsyncWebResponse = await respond(request)
        except WebError as refusal:
            return _json({"error": refusal.text or "refused"}, refusal.status)
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            return _json({"error": GENERIC_ERROR}, 500)
        return response

    async def _stream(self, kind: Kind, request: WebRequest) -> AsyncWebResponse:
        generation = (await self._asked(kind, request))._replace(stream_id=new_id())
        save = None
        if self._conversations is not None and generation.session_id is not None and kind == "stream":
            with _told_to_the_client():
                chat = await self._conversations.load(generation.session_id)
            said = chat.messages if self._max_messages is None else chat.messages[-self._max_messages :]
            save = partial(self._save_turn, self._conversations, generation, chat)
            generation = generation._replace(messages=[*said, *generation.messages])
        source = await async_call_or_await(self._generate, generation)
        stream = await AsyncDurableStream.start(
            self._store,
            source,
            id=generation.stream_id,
            on_finish=save,
            expose_errors=self._expose_errors,
            context=request.context,
        )
        return self._events(stream)

    async def _save_turn(
        self,
        conversations: AsyncPostgresConversationStore,
        generation: Generation,
        chat: ChatHistory[Any],
        text: str,
        status: StreamStatus | None,
    ) -> None:
        chat.append({"role": "user", "content": generation.prompt})
        state = "deleted" if status is None else status.state
        if text or state == "done":
            metadata = None if state == "done" else {"state": state}
            chat.append({"role": "assistant", "content": text}, metadata)
        await conversations.save(str(generation.session_id), chat)

    async def _resume(self, request: WebRequest) -> AsyncWebResponse:
        stream_id = request.query.get("id")
        if not stream_id:
            raise WebError(400, "id parameter is required")
        after_seq = resume_point(request, stream_id)
        await self._check(request, stream_id)
        with _told_to_the_client():
            stream = await AsyncDurableStream.resume(self._store, stream_id, after_seq)
        return self._events(stream)

    def _events(self, stream: AsyncDurableStream) -> AsyncWebResponse:
        # What a header cannot hold is encoded; the ids of this handler are never.
        shown = stream.id if stream.id.isascii() and stream.id.isprintable() else quote(stream.id)
        return AsyncWebResponse(200, {**EVENT_STREAM, "X-Stream-Id": shown}, self._told(stream))

    async def _told(self, stream: AsyncDurableStream) -> AsyncIterator[bytes]:
        try:
            async for sent in stream.sse(heartbeat=self._heartbeat):
                yield sent
        except StreamNotFoundError:  # it was deleted meanwhile: a reader who asks again is told
            logger.info("stream %r was deleted while it was read", stream.id)

    async def _stop(self, request: WebRequest) -> AsyncWebResponse:
        stream_id = text_in(parsed_body(request), "id")
        await self._check(request, stream_id)
        with _told_to_the_client():
            await self._store.stop(stream_id)
        return _json({"ok": True})

    async def _text(self, kind: Kind, request: WebRequest) -> AsyncWebResponse:
        text, _ = await _put_together(await async_call_or_await(self._generate, await self._asked(kind, request)))
        return AsyncWebResponse(200, PLAIN_TEXT, text.encode())

    async def _summarize(self, request: WebRequest) -> AsyncWebResponse:
        generation = await self._asked("compact", request)
        chat = None
        if self._conversations is not None and generation.session_id is not None:
            with _told_to_the_client():
                chat = await self._conversations.load(generation.session_id)
            if not chat.is_empty:  # what is replaced is what is summed up: a page that was left open may know less
                generation = generation._replace(messages=chat.messages)
        if not generation.messages:
            raise WebError(400, "there is nothing to sum up")
        summary, usage = await _put_together(await async_call_or_await(self._compact, generation))
        if self._conversations is not None and chat is not None:
            if not summary.strip():
                raise WebError(502, "the summary is empty")
            chat.compact({"role": "system", "content": summary})
            try:
                await self._conversations.save(str(generation.session_id), chat, on_conflict="raise")
            except ConversationConflictError:  # what was said meanwhile is not summed up
                raise WebError(409, "the conversation has changed meanwhile") from None
        return _json({"summary": summary, "tokensSaved": tokens_saved(usage)})

    async def _asked(self, kind: Kind, request: WebRequest) -> Generation:
        generation = generation_of(kind, request)
        if generation.session_id is not None:
            await self._check(request, generation.session_id)
        return generation

    async def _check(self, request: WebRequest, id: str) -> None:
        if self._authorize is not None and not await async_call_or_await(self._authorize, request, id):
            raise WebError(403, "forbidden")


@contextmanager
def _told_to_the_client() -> Iterator[None]:
    """Refuse a request for an id that is not there, or cannot be. What the application raises is its own fault."""
    try:
        yield
    except StreamNotFoundError:
        raise WebError(404, "there is no such stream") from None
    except InvalidDataError as refusal:
        raise WebError(400, str(refusal)) from None


async def _put_together(source: AsyncIterable[str | StreamEvent]) -> tuple[str, str]:
    """Return the text of a source, and the data of its last `usage` event."""
    texts: list[str] = []
    usage = ""
    try:
        async for item in source:
            if isinstance(item, str):
                texts.append(item)
            elif item.event == "usage":
                usage = item.data
    finally:
        await close_source(source)
    return "".join(texts), usage


def _json(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> AsyncWebResponse:
    all_headers = {"Content-Type": "application/json", "Cache-Control": "no-cache", **(headers or {})}
    return AsyncWebResponse(status, all_headers, json.dumps(content).encode())
