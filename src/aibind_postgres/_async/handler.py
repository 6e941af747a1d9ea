"""The HTTP API for aibind's browser client, for any web framework."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

from .. import _arguments as arguments
from .._concurrency import async_call_or_await, async_run_large
from .._turns import Position, ask, text_answer
from ..errors import ConversationConflictError, WebError
from ..history import new_id
from ..web import (
    Generation,
    Kind,
    Resource,
    WebRequest,
    count_tokens_saved,
    parse_body,
    parse_generation,
    parse_position,
    parse_resume_cursor,
    required_text,
)
from ..wire.aibind import WIRE
from .conversation_histories import ConversationTooLargeError
from .conversation_routes import AsyncConversationRoutes
from .conversation_store import AsyncPostgresConversationStore
from .durable_stream import AsyncDurableStream
from .plain_text import AsyncPlainTextBody
from .responses import AsyncWebResponse, json_response, map_client_errors
from .source import collect
from .stream_store import AsyncPostgresStreamStore
from .turns import AsyncTurns, exists, path_messages
from .web_handler import AsyncWebHandler

PLAIN_TEXT = {
    "Content-Type": "text/plain; charset=utf-8",
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
}


class AsyncStreamHandler(AsyncWebHandler):
    """Handles the requests of chat pages and of aibind's browser client.

    Answers of `/stream`, `/structured` and `/chat` are durable streams: any process can resume them after a reload or a
    lost connection. `/complete` and `/title` send the output of `generate` as plain text while it is produced. The
    other routes respond with JSON.

    With `conversations`, `/stream` continues the conversation of the request's session id, and there are routes to
    list, show, change and delete conversations:

    - The question is saved before the stream begins, with the id of the stream. The first question creates the
      conversation, for its owner. If a turn fails without an answer, its question becomes an alternative to the next
      one, so that two questions never follow each other.
    - The answer is saved before the stream is done. If the stream ends in another state, its text is saved afterwards,
      with the state in the metadata. A stream without a text adds no answer.
    - If the process dies, the next request that loads the conversation saves the text of the stream. With migration
      0004, the stream is kept for at least a day for this purpose.
    - If the conversation is deleted during a turn, the answer is not saved.

    Args:
        generate: Called with a `Generation`. Returns a source: an iterable of `str` and `StreamEvent`, such as a
            generator. The source may yield a `usage` event. The call and the source may raise `WebError`, or an
            exception with which the framework refuses requests. If the source of a stream raises one, the status line
            has already been sent, so the stream ends in state error.
        store: The stream store.
        conversations: The conversation store. One of `owner`, `authorize` and `public` is then required, since clients
            choose the ids of sessions. Default: None, which saves no conversations.
        owner: Called with each request. Returns the id of its user as text, or None if it has no user. It may raise the
            same exceptions as `generate`. New streams and conversations belong to the user. Requests of other users get
            status 404, as for a missing id. A request without a user gets 401 if it uses a conversation. A stream
            without an owner belongs to the owner of its conversation; if there is none either, it is accessible with
            its id. Needs migration 0004. Default: None: streams and conversations have no owners.
        authorize: Called with the request and a `Resource`, before the handler uses a stream or a conversation with an
            id that a client has sent. A false result rejects the request with status 403. It may raise the same
            exceptions as `generate`. Default: None: `owner` alone decides, and without `owner`, anyone with the id has
            access. Generated stream ids are unguessable.
        public: Whether the id of a conversation is sufficient to use it. Default: False.
        prefix: The path prefix of all routes. It must be empty or begin with a slash. Default: `/__aibind__`.
        allowed_origins: Other origins from which pages may send requests, such as `https://example.com`.
            Requests from pages of other origins get status 403. The responses contain no CORS headers: add them with
            middleware of the framework. Default: none, so pages must have the origin of the server.
        max_messages: The maximum number of stored messages that `/stream` puts before the prompt. They begin with a
            message of the user. System messages, such as the summary of `/compact`, do not count and are always
            included. Default: None, which is no limit.
        compact: Called instead of `generate` to summarise a conversation. Default: `generate`.
        max_body: The maximum size of a request body in bytes. The browser sends the attachments of a conversation with
            each request, in base64, which adds a third to their size. Default: 10,000,000.
        max_prompt: The maximum size of a prompt, an `input` or the last message in bytes of UTF-8. Default: 1,000,000.
        max_conversation: The maximum size in bytes of a stored conversation that `/stream` continues. A turn is always
            added completely, so the stored conversation may become larger; then `/compact` must summarise it. The
            routes read no conversation larger than `max_conversation` and `max_body` together: `/compact` refuses it,
            and an answer that would have to be merged into it is not saved. Default: 10,000,000.
        max_running: The maximum number of streams of one user that are produced at the same time, in all processes.
            Further requests get status 429. Requests that several processes receive at the same instant can exceed it.
            Plain text, summaries and requests without a user do not count. Needs `owner`. Default: None, which is no
            limit.
        max_readers: The maximum number of clients that read at the same time through this handler, in this process: for
            one user, or for one stream if the request has no user. Further readers get status 429. Default: 1000.
        heartbeat: Seconds, or a timedelta, without an event after which a response sends a comment. Default: 15.
        send_timeout: Seconds, or a timedelta, after which a body that is streamed ends because the client does not
            read. The check may take a quarter longer. The client can resume an event stream. Default: 60.
        expose_errors: Whether clients see the text of an exception that the source of a stream raises. Default: False,
            which shows a generic text.

    A refused request gets the JSON object `{"error": text}`.

    Raises:
        ValueError: `conversations` is given without `owner`, `authorize` or `public`. `max_running` is given without
            `owner`. `prefix` is not empty and does not begin with a slash. `allowed_origins` contains a text that is
            not an origin. A number is out of range.
        TypeError: A store is not of the flavour of the handler, or `heartbeat` or `send_timeout` is neither a number
            nor a timedelta.
    """

    def __init__(
        self,
        generate: Callable[[Generation], Any],
        *,
        store: AsyncPostgresStreamStore,
        conversations: AsyncPostgresConversationStore | None = None,
        owner: Callable[[WebRequest], Any] | None = None,
        authorize: Callable[[WebRequest, Resource], Any] | None = None,
        public: bool = False,
        prefix: str = "/__aibind__",
        allowed_origins: Collection[str] = (),
        max_messages: int | None = None,
        compact: Callable[[Generation], Any] | None = None,
        max_body: int = 10_000_000,
        max_prompt: int = 1_000_000,
        max_conversation: int = 10_000_000,
        max_running: int | None = None,
        max_readers: int = 1000,
        heartbeat: float | timedelta = 15.0,
        send_timeout: float | timedelta = 60.0,
        expose_errors: bool = False,
    ) -> None:
        super().__init__(
            generate,
            store=store,
            conversations=conversations,
            owner=owner,
            authorize=authorize,
            public=public,
            prefix=prefix,
            allowed_origins=allowed_origins,
            max_body=max_body,
            max_running=max_running,
            max_readers=max_readers,
            heartbeat=heartbeat,
            send_timeout=send_timeout,
            expose_errors=expose_errors,
        )
        if max_messages is not None:
            arguments.integer(max_messages, "max_messages", minimum=1)
        self._max_prompt = arguments.integer(max_prompt, "max_prompt", minimum=1)
        max_continued = arguments.integer(max_conversation, "max_conversation", minimum=1)
        self._max_read = max_continued + self.max_body  # of a stored conversation, to summarise it or to add a turn
        self._compact = compact or generate
        self._max_messages = max_messages
        self._routes = {
            "/stream": {"POST": partial(self._stream, "stream")},
            "/structured": {"POST": partial(self._stream, "structured")},
            "/chat": {"POST": partial(self._stream, "chat")},
            "/complete": {"POST": partial(self._complete, "complete")},
            "/title": {"POST": partial(self._complete, "title")},
            "/compact": {"POST": self._compact_conversation},
        }
        for path in ("/stream", "/structured", "/chat"):
            self._routes[f"{path}/stop"] = {"POST": self._stop}
            self._routes[f"{path}/resume"] = {"GET": self._resume}
            self._routes[f"{path}/compact"] = {"POST": self._compact_conversation}
        self._turns: AsyncTurns | None = None
        if conversations is not None:
            self._turns = AsyncTurns(store, conversations, self._access, text_answer, max_continued, self._max_read)
            routes = AsyncConversationRoutes(store, conversations, self._access, self._turns, self._max_read)
            self._routes["/conversations"] = {"GET": routes.list}
            self._routes["/conversations/{id}"] = {"GET": routes.show, "PATCH": routes.change, "DELETE": routes.delete}

    def _error(self, text: str, status: int, headers: Mapping[str, str] | None = None) -> AsyncWebResponse:
        return json_response({"error": text}, status, headers)

    async def _stream(self, kind: Kind, request: WebRequest) -> AsyncWebResponse:
        generation = (await self._parse(kind, request))._replace(stream_id=new_id())
        position = parse_position(generation.body) if kind == "stream" else Position()
        turn = None
        if self._turns is not None and generation.session_id is not None and kind == "stream":
            turn = await self._turns.begin(
                request,
                generation.owner,
                generation.session_id,
                partial(ask, prompt=generation.prompt, position=position),
                str(generation.stream_id),
            )
            messages = await self._turns.messages(turn, self._max_messages)
            prompt = messages[-1].get("content")
            generation = generation._replace(messages=messages, prompt=prompt if isinstance(prompt, str) else "")
        elif position.is_given or position.regenerate:
            raise WebError(400, "parentId and regenerate need a stored conversation: send its sessionId")
        else:
            await self._check_session(generation)
        save_question = save_answer = None
        if self._turns is not None and turn is not None:
            # The stream exists before the question names it, and a deletion after the question was saved stops it.
            save_question = partial(self._turns.save_question, turn)
            save_answer = partial(self._turns.save_answer, turn)
        return await self._start(generation, WIRE, on_finish=save_answer, before_source=save_question)

    async def _resume(self, request: WebRequest) -> AsyncWebResponse:
        stream_id = request.query.get("id")
        if not stream_id:
            raise WebError(400, "id parameter is required")
        after_seq = parse_resume_cursor(request, stream_id)
        user = await self._access.user(request)
        await self._access.check_stream(request, user, stream_id)
        with map_client_errors():
            stream = await AsyncDurableStream.resume(self._store, stream_id, after_seq)
        return self._event_stream(stream, request, user)

    async def _stop(self, request: WebRequest) -> AsyncWebResponse:
        body = await async_run_large(len(request.body), parse_body, request)
        stream_id = required_text(body, "id")
        await self._access.check_stream(request, await self._access.user(request), stream_id)
        with map_client_errors():
            await self._store.stop(stream_id)
        return json_response({"ok": True})

    async def _complete(self, kind: Kind, request: WebRequest) -> AsyncWebResponse:
        generation = await self._parse(kind, request)
        await self._check_session(generation)
        source = await async_call_or_await(self._generate, generation)
        texts = await AsyncPlainTextBody(source, request.context, request.disconnect, self._send_timeout).open()
        return AsyncWebResponse(200, PLAIN_TEXT, texts or b"")

    async def _compact_conversation(self, request: WebRequest) -> AsyncWebResponse:
        generation = await self._parse("compact", request)
        chat = None
        if self._turns is not None and generation.session_id is not None:
            chat = await self._turns.load(
                request, generation.owner, generation.session_id, self._max_read, "start another conversation"
            )
            if not chat.is_empty:  # an outdated page may send fewer messages than the summary replaces
                generation = generation._replace(messages=await path_messages(chat))
        else:
            await self._check_session(generation)
        if not generation.messages:
            raise WebError(400, "the conversation has no messages to summarise")
        summary, usage = await collect(await async_call_or_await(self._compact, generation))
        if self._conversations is not None and chat is not None:
            if not summary.strip():
                raise WebError(502, "the summary is empty")
            owner = None if exists(chat) else generation.owner
            chat.compact({"role": "system", "content": summary})
            try:
                session_id = str(generation.session_id)
                await self._conversations._save(session_id, chat, "raise", self._max_read, owner=owner)
            except (ConversationConflictError, ConversationTooLargeError):
                # The summary does not cover the newer messages.
                raise WebError(409, "the conversation changed while it was summarised: try again") from None
        return json_response({"summary": summary, "tokensSaved": count_tokens_saved(usage)})

    async def _parse(self, kind: Kind, request: WebRequest) -> Generation:
        generation = await async_run_large(len(request.body), parse_generation, kind, request)
        try:
            size = len(generation.prompt.encode())
        except UnicodeEncodeError:  # no model accepts it, also not in a later turn of the conversation
            raise WebError(400, "the prompt contains a lone surrogate, which is not a character") from None
        if size > self._max_prompt:
            raise WebError(413, f"the prompt must be at most {self._max_prompt} bytes long in UTF-8")
        return generation._replace(owner=await self._access.user(request))

    async def _check_session(self, generation: Generation) -> None:
        if generation.session_id is not None:
            await self._access.check_session(generation.request, generation.owner, generation.session_id)
