"""The HTTP API for aibind's browser client, for any web framework."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import quote

from .. import _arguments as arguments
from .._concurrency import async_call_or_await, async_run_large
from .._document import NODE_CHARACTERS
from .._sqlstate import server_reason
from ..errors import ConversationConflictError, InvalidDataError, StreamNotFoundError, WebError
from ..history import ChatHistory, new_id
from ..models import StreamEvent, StreamStatus
from ..web import (
    Generation,
    Kind,
    QueryParameters,
    WebRequest,
    count_tokens_saved,
    is_cross_site,
    is_json,
    parse_body,
    parse_generation,
    parse_origins,
    parse_resume_cursor,
    required_text,
)
from .conversation_histories import ConversationTooLargeError
from .conversation_store import AsyncPostgresConversationStore
from .durable_stream import AsyncDurableStream
from .event_bodies import AsyncEventBodies
from .plain_text import AsyncPlainTextBody
from .source import close_source
from .stream_store import AsyncPostgresStreamStore

logger = logging.getLogger("aibind_postgres")

EVENT_STREAM = {
    "Content-Type": "text/event-stream",
    # A compressing proxy would hold events back until it has enough to compress.
    "Cache-Control": "no-cache, no-store, no-transform",
    "X-Accel-Buffering": "no",  # keeps nginx from buffering events
    "Access-Control-Expose-Headers": "X-Stream-Id",
}
PLAIN_TEXT = {
    "Content-Type": "text/plain; charset=utf-8",
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}
RETRY_AFTER = {"Retry-After": "5"}  # seconds


@dataclass(frozen=True)
class AsyncWebResponse:
    """A response for any framework.

    Attributes:
        status: The HTTP status code.
        headers: The response headers.
        body: The complete body, or an iterator of bytes to send as they arrive: encoded events, or parts of a text. If
            the iterator raises, the body is incomplete: close the connection, so that the client notices.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes | AsyncIterator[bytes]

    def __repr__(self) -> str:
        body = f"{len(self.body)} bytes" if isinstance(self.body, bytes) else "streamed"
        return f"<{type(self).__name__} {self.status}, {body}>"


class AsyncStreamHandler:
    """Handles the requests of aibind's browser client.

    Answers of `/stream`, `/structured` and `/chat` are durable streams: after a reload or a lost connection, any worker
    resumes them. `/complete` and `/title` send the output of `generate` as plain text while it is produced. The other
    routes respond with JSON.

    With `conversations`, `/stream` continues the conversation of the request's session id. The handler saves each turn
    with `on_conflict="merge"`:

    - If the source ends, before the stream is done.
    - Otherwise after the stream has ended. The saved answer is the text produced so far, if there is any, with the
      state in its metadata.

    If the conversation is deleted during a turn, the turn is not saved. The first turn of a conversation creates it.

    Args:
        generate: Called with a `Generation`. Returns a source: an iterable of `str` and `StreamEvent`, such as a
            generator. The source may yield a `usage` event. The call and the source may raise `WebError`, or an
            exception with which the framework refuses requests. If the source of a stream raises it, the status line
            has been sent, so the stream ends in state error.
        store: The stream store.
        conversations: The conversation store. Default: None, which saves no conversations.
        prefix: The path prefix of all routes. It must be empty or begin with a slash. Default: `/__aibind__`.
        authorize: Called with the request and the id of a stream or session, before the handler reads, resumes, stops
            or saves it. A false result rejects the request with status 403. It may raise the same exceptions as
            `generate`. To record the owner of a stream, use `stream_id` of the `Generation`. Default: None, which gives
            access to anyone with the id; stream ids are unguessable.
        allowed_origins: The origins of other sites whose pages may send requests, such as `https://example.com`.
            Requests from pages of other origins get status 403. The responses contain no CORS headers: add them with
            middleware of the framework. Default: none, so pages must have the origin of the server.
        max_messages: The maximum number of stored messages that `/stream` puts before the prompt. Default: None, which
            is all.
        compact: Called instead of `generate` to summarise a conversation. Default: `generate`.
        max_body: The maximum size of a request body in bytes. The browser sends the attachments of a conversation with
            each request, in base64, which adds a third to their size. Default: 10,000,000.
        max_prompt: The maximum size of a prompt, an `input` or the last message in bytes of UTF-8. Default: 1,000,000.
        max_conversation: The maximum size in bytes of a stored conversation that `/stream` continues. A turn is always
            added completely, so the stored conversation may become larger; then `/compact` must summarise it. The
            routes read no conversation larger than `max_conversation` and `max_body` together: `/compact` refuses it,
            and a turn that would have to be merged into it is not saved. Default: 10,000,000.
        max_readers: The maximum number of clients that read one stream through this handler at the same time, in this
            process. Others get status 429. Default: 1000.
        heartbeat: Seconds, or a timedelta, without an event after which a response sends a comment. Default: 15.
        send_timeout: Seconds, or a timedelta, after which a body that is streamed ends because the client does not
            read. The check may take a quarter longer. The client can resume an event stream. Default: 60.
        expose_errors: Whether clients see the text of an exception that the source of a stream raises. Default: False,
            which shows a generic text.

    Raises:
        ValueError: `prefix` is not empty and does not begin with a slash, `allowed_origins` contains a text that is not
            an origin, or a number is out of range.
        TypeError: `heartbeat` or `send_timeout` is neither a number nor a timedelta.
    """

    def __init__(
        self,
        generate: Callable[[Generation], Any],
        *,
        store: AsyncPostgresStreamStore,
        conversations: AsyncPostgresConversationStore | None = None,
        prefix: str = "/__aibind__",
        authorize: Callable[[WebRequest, str], Any] | None = None,
        allowed_origins: Collection[str] = (),
        max_messages: int | None = None,
        compact: Callable[[Generation], Any] | None = None,
        max_body: int = 10_000_000,
        max_prompt: int = 1_000_000,
        max_conversation: int = 10_000_000,
        max_readers: int = 1000,
        heartbeat: float | timedelta = 15.0,
        send_timeout: float | timedelta = 60.0,
        expose_errors: bool = False,
    ) -> None:
        self.prefix = prefix.rstrip("/")
        if self.prefix and not self.prefix.startswith("/"):
            raise ValueError(f"prefix must be empty or begin with a slash, not {prefix!r}")
        self.max_body = arguments.integer(max_body, "max_body", minimum=0)
        self._max_prompt = arguments.integer(max_prompt, "max_prompt", minimum=1)
        self._max_conversation = arguments.integer(max_conversation, "max_conversation", minimum=1)
        self._generate = generate
        self._compact = compact or generate
        self._store = store
        self._conversations = conversations
        self._authorize = authorize
        self._allowed_origins = parse_origins(allowed_origins)
        if max_messages is not None:
            arguments.integer(max_messages, "max_messages", minimum=1)
        self._max_messages = max_messages
        self._heartbeat = arguments.seconds(heartbeat, "heartbeat")
        self._expose_errors = expose_errors
        self._send_timeout = arguments.seconds(send_timeout, "send_timeout")
        self._bodies = AsyncEventBodies(arguments.integer(max_readers, "max_readers", minimum=1), self._send_timeout)
        self._routes: dict[str, tuple[str, Callable[[WebRequest], Any]]] = {
            "/stream": ("POST", partial(self._stream, "stream")),
            "/structured": ("POST", partial(self._stream, "structured")),
            "/chat": ("POST", partial(self._stream, "chat")),
            "/complete": ("POST", partial(self._complete, "complete")),
            "/title": ("POST", partial(self._complete, "title")),
        }
        for path in ("/stream", "/structured", "/chat"):
            self._routes[f"{path}/stop"] = ("POST", self._stop)
            self._routes[f"{path}/resume"] = ("GET", self._resume)
            self._routes[f"{path}/compact"] = ("POST", self._compact_conversation)
        self._routes["/compact"] = ("POST", self._compact_conversation)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.prefix!r}, {self._store!r}>"

    async def handle(self, request: WebRequest) -> AsyncWebResponse:
        """Handle one request.

        Args:
            request: The request. Its path includes `prefix`.

        Returns:
            The response. For a `WebError`, it has the status of the error. If the database is unavailable, it has
            status 503 and the header `Retry-After`. Any other exception is logged, and the status is 500. In all three
            cases the body is the JSON object `{"error": text}`.

        Raises:
            Exception: `generate` or `authorize` has raised one of `request.refusals`.
        """
        route = request.path.removeprefix(self.prefix) if request.path.startswith(self.prefix) else None
        method, respond = self._routes.get(route or "", ("", None))
        try:
            if respond is None:
                raise WebError(404, "not found")
            if request.method != method:
                return _json({"error": f"use {method}"}, 405, {"Allow": method})
            if is_cross_site(request.headers, self._allowed_origins):
                raise WebError(403, "requests from pages of other origins are refused, except from allowed_origins")
            if method == "POST" and not is_json(request.headers):
                raise WebError(415, "the Content-Type of the body must be application/json")
            if len(request.body) > self.max_body:
                raise WebError(413, f"the body must be at most {self.max_body} bytes long")
            if isinstance(request.query, QueryParameters) and request.query.problem is not None:
                raise WebError(400, request.query.problem)
            response: AsyncWebResponse = await respond(request)
        except WebError as error:
            return _json({"error": error.text or "refused"}, error.status)
        except request.refusals:
            raise
        except Exception as error:
            if self._is_unavailable(error):
                reason = server_reason(error) or type(error).__name__
                logger.error(
                    "%s %s failed, since the database is unavailable: %s", request.method, request.path, reason
                )
                return _json({"error": "the database is unavailable: try again later"}, 503, RETRY_AFTER)
            logger.exception("%s %s failed", request.method, request.path)
            return _json({"error": "internal server error"}, 500)
        return response

    def _is_unavailable(self, error: Exception) -> bool:
        stores = (self._store, self._conversations)
        return any(store._database.client.is_unavailable(error) for store in stores if store is not None)

    async def _stream(self, kind: Kind, request: WebRequest) -> AsyncWebResponse:
        generation = (await self._parse_and_authorize(kind, request))._replace(stream_id=new_id())
        save = None
        if self._conversations is not None and generation.session_id is not None and kind == "stream":
            chat = await self._load(
                self._conversations,
                generation.session_id,
                self._max_conversation,
                "summarise it with /compact, or start another conversation",
            )
            history = await _messages(chat)
            if self._max_messages is not None:
                history = history[-self._max_messages :]
            save = partial(self._save_turn, self._conversations, generation, chat)
            generation = generation._replace(messages=[*history, *generation.messages])
        source = await async_call_or_await(self._generate, generation)
        stream = await AsyncDurableStream.start(
            self._store,
            source,
            id=generation.stream_id,
            on_finish=save,
            expose_errors=self._expose_errors,
            context=request.context,
        )
        return self._event_stream(stream, request)

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
        session_id = str(generation.session_id)
        if not await conversations._save(session_id, chat, "merge", self._max_read, recreate=False):
            logger.info("conversation %r was deleted during a turn: the turn is not saved", session_id)

    @property
    def _max_read(self) -> int:
        """The most bytes of a stored conversation that this handler reads, to summarise it or to add a turn."""
        return self._max_conversation + self.max_body

    async def _load(
        self, conversations: AsyncPostgresConversationStore, session_id: str, max_bytes: int, hint: str
    ) -> ChatHistory[Any]:
        try:
            with _map_client_errors():
                return await conversations._load(session_id, max_bytes)
        except ConversationTooLargeError:
            raise WebError(413, f"the conversation has more than {max_bytes} bytes: {hint}") from None

    async def _resume(self, request: WebRequest) -> AsyncWebResponse:
        stream_id = request.query.get("id")
        if not stream_id:
            raise WebError(400, "id parameter is required")
        after_seq = parse_resume_cursor(request, stream_id)
        await self._check_authorized(request, stream_id)
        with _map_client_errors():
            stream = await AsyncDurableStream.resume(self._store, stream_id, after_seq)
        return self._event_stream(stream, request)

    def _event_stream(self, stream: AsyncDurableStream, request: WebRequest) -> AsyncWebResponse:
        body = self._bodies.open(stream.id, stream.sse(heartbeat=self._heartbeat), request.disconnect)
        # A header contains ASCII only. Ids that this handler creates need no quoting.
        header_id = stream.id if stream.id.isascii() and stream.id.isprintable() else quote(stream.id)
        return AsyncWebResponse(200, {**EVENT_STREAM, "X-Stream-Id": header_id}, body)

    async def _stop(self, request: WebRequest) -> AsyncWebResponse:
        body = await async_run_large(len(request.body), parse_body, request)
        stream_id = required_text(body, "id")
        await self._check_authorized(request, stream_id)
        with _map_client_errors():
            await self._store.stop(stream_id)
        return _json({"ok": True})

    async def _complete(self, kind: Kind, request: WebRequest) -> AsyncWebResponse:
        generation = await self._parse_and_authorize(kind, request)
        source = await async_call_or_await(self._generate, generation)
        texts = await AsyncPlainTextBody(source, request.context, request.disconnect, self._send_timeout).open()
        return AsyncWebResponse(200, PLAIN_TEXT, texts or b"")

    async def _compact_conversation(self, request: WebRequest) -> AsyncWebResponse:
        generation = await self._parse_and_authorize("compact", request)
        chat = None
        if self._conversations is not None and generation.session_id is not None:
            chat = await self._load(
                self._conversations, generation.session_id, self._max_read, "start another conversation"
            )
            if not chat.is_empty:  # an outdated page may send fewer messages than the summary replaces
                generation = generation._replace(messages=await _messages(chat))
        if not generation.messages:
            raise WebError(400, "the conversation has no messages to summarise")
        summary, usage = await _collect(await async_call_or_await(self._compact, generation))
        if self._conversations is not None and chat is not None:
            if not summary.strip():
                raise WebError(502, "the summary is empty")
            chat.compact({"role": "system", "content": summary})
            try:
                await self._conversations._save(str(generation.session_id), chat, "raise", self._max_read)
            except (ConversationConflictError, ConversationTooLargeError):
                # The summary does not cover the newer messages.
                raise WebError(409, "the conversation changed while it was summarised: try again") from None
        return _json({"summary": summary, "tokensSaved": count_tokens_saved(usage)})

    async def _parse_and_authorize(self, kind: Kind, request: WebRequest) -> Generation:
        generation = await async_run_large(len(request.body), parse_generation, kind, request)
        if len(generation.prompt.encode(errors="surrogatepass")) > self._max_prompt:
            raise WebError(413, f"the prompt must be at most {self._max_prompt} bytes long in UTF-8")
        if generation.session_id is not None:
            await self._check_authorized(request, generation.session_id)
        return generation

    async def _check_authorized(self, request: WebRequest, id: str) -> None:
        if self._authorize is not None and not await async_call_or_await(self._authorize, request, id):
            raise WebError(403, "forbidden")


@contextmanager
def _map_client_errors() -> Iterator[None]:
    """Map unknown or invalid ids to 404 or 400. Use it for store calls only: errors of the application propagate."""
    try:
        yield
    except StreamNotFoundError:
        raise WebError(404, "stream not found: it was never created, was deleted, or has expired") from None
    except InvalidDataError as error:
        raise WebError(400, str(error)) from None


async def _messages(chat: ChatHistory[Any]) -> list[Any]:
    """Return copies of the messages of the current path."""
    return await async_run_large(len(chat) * NODE_CHARACTERS, lambda: chat.messages)


async def _collect(source: AsyncIterable[str | StreamEvent]) -> tuple[str, str]:
    """Return the whole text of a source and the data of its last `usage` event."""
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
    all_headers = {"Content-Type": "application/json", "Cache-Control": "no-store", **(headers or {})}
    return AsyncWebResponse(status, all_headers, json.dumps(content).encode())
