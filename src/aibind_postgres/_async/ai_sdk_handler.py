"""The HTTP API for `useChat` of the AI SDK, for any web framework."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, get_args

from .. import _arguments as arguments
from .._concurrency import async_run_large
from .._document import NODE_CHARACTERS
from .._json import parse_object
from .._turns import Question, model_messages, unanswered
from .._ui_message import assemble
from .._ui_message_chunks import message_chunks
from .._ui_turns import UiRequest, ask_ui, parse_ui_request, storable_message, text_messages, ui_messages, ui_text
from ..errors import StreamNotFoundError, WebError
from ..history import ChatHistory, new_id
from ..models import StreamInfo, StreamStatus
from ..web import Generation, Resource, WebRequest, parse_body
from ..wire.ai_sdk import AiSdkWire, OpenParts, SdkVersion
from .conversation_routes import TOO_LARGE, AsyncConversationRoutes
from .conversation_store import AsyncPostgresConversationStore
from .durable_stream import AsyncDurableStream
from .responses import AsyncWebResponse, json_response
from .stream_store import AsyncPostgresStreamStore
from .turns import MAX_ACTIVE, AsyncTurns, Turn, check_no_other_stream
from .web_handler import AsyncWebHandler

NOTHING_RUNS = AsyncWebResponse(204, {"Cache-Control": "no-store"}, b"")


class AsyncAiSdkHandler(AsyncWebHandler):
    """Handles the requests of `useChat` of the AI SDK 5, 6 and 7, sent by its default transport.

    The page loads the chat with `GET {prefix}/{id}`, and passes the messages and `resume: true` to `useChat`.

    | route | answer |
    |---|---|
    | `POST {prefix}` | the answer as a UI message stream |
    | `GET {prefix}/{id}/stream` | the whole running answer of a chat, or 204 if there is none |
    | `POST {prefix}/{id}/stop` | stops the running answer, from any device |
    | `GET {prefix}/{id}` | `{id, title, messages, activeStreamId}`, for the first render |
    | `GET {prefix}` | the chats of the user: `{conversations, next}`, with the parameters `limit` and `before` |
    | `DELETE {prefix}/{id}` | stops the running answer, and deletes the chat with its streams |

    Needs migration 0004. With `conversations`, each chat is stored:

    - The question is saved before the answer begins, the answer before it is done. An answer that was stopped, has
      failed or whose process has died is saved as far as the clients have got it. The stored message is the one that
      the page shows.
    - `generate` gets the stored messages. Of the messages that a page sends, only the last one is used. It is added to
      the end of the stored chat, also if the page shows an older state.
    - An edited question and another answer are alternatives: the earlier ones stay in the conversation store.
    - Results and approvals of tools that the page sends continue the last answer.
    - A page that loads during a continued answer gets the earlier parts as well. Without `conversations`, it does not.
    - While an answer is running, a second question gets status 409. The page shows the question and an error. To send
      the question again, the page calls `sendMessage()` without arguments.
    - `stop()` of a page only disconnects it. A Stop button sends `POST {prefix}/{id}/stop`.
    - Without `conversations`, two requests at the same instant may both start an answer.

    Args:
        generate: Called with a `Generation`. Returns a source: an iterable of `str`, and of the items of
            `aibind_postgres.wire.ai_sdk` for reasoning, tools, sources, files and data. The call should return at once,
            such as a generator does: until then, the question is not stored, and other pages do not see it. The call
            and the source may raise `WebError`, or an exception with which the framework refuses requests. If the
            source raises one, the status line has already been sent, so the answer ends with an error. An `error` chunk
            counts as an exception with its text.
        store: The stream store.
        conversations: The conversation store. One of `owner`, `authorize` and `public` is then required, since clients
            choose the ids of chats. Default: None: `generate` gets the messages that the client sends.
        owner: As for `StreamHandler`. A chat of another user gets the responses of a missing chat: 204 for the running
            answer, 404 otherwise. Default: None.
        authorize: As for `StreamHandler`. Default: None.
        public: Whether the id of a chat is sufficient to use it. Default: False.
        prefix: The path prefix of all routes. Default: `/api/chat`, where `useChat` expects it.
        sdk_version: The major version of `ai` in the pages: 5, 6 or 7. Chunks that it does not know are left out.
            Default: 7.
        allowed_origins: As for `StreamHandler`, like the following arguments. Default: none.
        max_messages: The maximum number of stored messages before the question. Default: None, which is no limit.
        max_body: The maximum size of a request body in bytes. A page sends all messages of a chat with each request,
            unless its transport sends the last one only. Default: 10,000,000.
        max_conversation: The maximum size in bytes of a stored chat that is continued. Default: 10,000,000.
        max_running: The maximum number of answers of one user at the same time. Default: None, which is no limit.
        max_readers: The maximum number of clients of one user, or of one answer without a user. Default: 1000.
        heartbeat: Seconds, or a timedelta, without a chunk after which a response sends a comment. Default: 15.
        send_timeout: Seconds, or a timedelta, after which a response ends because the client does not read.
            Default: 60.
        expose_errors: Whether clients see the text of an exception that a source raises. Default: False.

    A refused request gets the reason as plain text, which `useChat` shows as the message of its error.

    Raises:
        ValueError: As for `StreamHandler`, or `sdk_version` is not 5, 6 or 7.
        TypeError: As for `StreamHandler`.

    Example:
        `handler = AiSdkHandler(generate, store=store, conversations=conversations, owner=current_user)`
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
        prefix: str = "/api/chat",
        sdk_version: SdkVersion = 7,
        allowed_origins: Collection[str] = (),
        max_messages: int | None = None,
        max_body: int = 10_000_000,
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
        if sdk_version not in get_args(SdkVersion):
            raise ValueError(f"sdk_version must be 5, 6 or 7, not {sdk_version!r}")
        if max_messages is not None:
            arguments.integer(max_messages, "max_messages", minimum=1)
        self._sdk_version = sdk_version
        self._max_messages = max_messages
        self._routes = {
            "": {"POST": self._send},
            "/{id}/stream": {"GET": self._resume},
            "/{id}/stop": {"POST": self._stop},
        }
        self._turns: AsyncTurns | None = None
        self._chats: AsyncConversationRoutes | None = None
        if conversations is not None:
            max_continued = arguments.integer(max_conversation, "max_conversation", minimum=1)
            max_read = max_continued + self.max_body
            self._turns = AsyncTurns(
                store,
                conversations,
                self._access,
                self._compose,
                max_continued,
                max_read,
                wire="ai_sdk",
                hint=TOO_LARGE,
                is_exclusive=True,
            )
            self._chats = AsyncConversationRoutes(store, conversations, self._access, self._turns, max_read)
            self._routes[""]["GET"] = self._chats.list
            self._routes["/{id}"] = {"GET": self._show, "DELETE": self._chats.delete}

    def _error(self, text: str, status: int, headers: Mapping[str, str] | None = None) -> AsyncWebResponse:
        all_headers = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store", **(headers or {})}
        return AsyncWebResponse(status, all_headers, text.encode())

    async def _send(self, request: WebRequest) -> AsyncWebResponse:
        parsed = await async_run_large(len(request.body), parse_ui_request, request)
        user = await self._access.user(request)
        stream_id = new_id()
        save_question = save_answer = None
        continued: dict[str, Any] | None = None
        if self._turns is not None:
            turn = await self._turns.begin(request, user, parsed.chat_id, partial(ask_ui, request=parsed), stream_id)
            messages = model_messages(await stored_messages(turn.chat), self._max_messages)
            save_question = partial(self._turns.save_question, turn)
            save_answer = partial(self._save_answer, self._turns, turn)
        else:
            await self._access.check_session(request, user, parsed.chat_id)
            await check_no_other_stream(self._store, parsed.chat_id, stream_id, self._access.has_owners, user)
            messages = await async_run_large(len(request.body), ui_messages, parsed.messages, _ids(parsed))
        if not messages:
            raise WebError(400, "messages is required")
        if messages[-1]["role"] == "assistant":
            continued = messages[-1]
        message_id = stream_id if continued is None else continued["id"]
        body = parsed.body
        generation = Generation(
            kind="chat",
            prompt=ui_text(messages[-1]) if continued is None else "",
            messages=text_messages(messages),
            system=None,
            model=body["model"] if isinstance(body.get("model"), str) else None,
            session_id=parsed.chat_id,
            schema=None,
            body=body,
            request=request,
            stream_id=stream_id,
            owner=user,
            ui_messages=messages,
            message_id=message_id,
        )
        wire = AiSdkWire(message_id, self._sdk_version, continued)
        return await self._start(generation, wire, on_finish=save_answer, before_source=save_question)

    async def _save_answer(
        self, turns: AsyncTurns, turn: Turn, chunks: Sequence[str], status: StreamStatus | None
    ) -> None:
        if status is not None and status.state != "active":
            chunks = chunks[: status.total_chunks]  # the last ones were not stored: no page has got them
        await turns.save_answer(turn, chunks, status)

    def _compose(self, question: Question, chunks: Sequence[str]) -> dict[str, Any]:
        """Return the message with an answer: the one that the page shows."""
        parts = OpenParts()
        for chunk in chunks:
            parts.apply(chunk)
        parsed = [*map(parse_object, chunks), *parts.closing_chunks()]
        continued = question.message if question.message.get("role") == "assistant" else None
        message = assemble(parsed, continued, message_id=question.stream_id, sdk_version=self._sdk_version)
        return storable_message(message)

    async def _resume(self, request: WebRequest, chat_id: str) -> AsyncWebResponse:
        user = await self._access.user(request)
        try:
            info = await self._find_active(request, user, chat_id)
            if info is None:
                return NOTHING_RUNS
            earlier = await self._earlier_chunks(request, user, chat_id, info.id)
        except WebError as error:
            if error.status == 404:
                return NOTHING_RUNS
            raise
        stream = AsyncDurableStream(self._store, info.id, AiSdkWire(earlier=earlier))
        return self._event_stream(stream, request, user)

    async def _stop(self, request: WebRequest, chat_id: str) -> AsyncWebResponse:
        body = await async_run_large(len(request.body), parse_body, request) if request.body else {}
        stream_id = body.get("activeStreamId")
        if stream_id is not None and not isinstance(stream_id, str):
            raise WebError(400, "activeStreamId must be a string")
        user = await self._access.user(request)
        info = await self._find_active(request, user, chat_id)
        if info is not None and stream_id in (None, info.id):  # not for a later answer than the user wants to stop
            with suppress(StreamNotFoundError):
                await self._store.stop(info.id)
        return json_response({"success": True})

    async def _find_active(self, request: WebRequest, user: str | None, chat_id: str) -> StreamInfo | None:
        """Return the running answer of a chat: the one of this user.

        Raises:
            WebError: 404: the chat is unknown, or belongs to another user. The other statuses are those of
                `check_session`.
        """
        await self._access.check_session(request, user, chat_id)
        infos = await self._active(user, chat_id)
        if self._chats is not None and not infos:  # a running answer may belong to a chat that is not stored yet
            await self._chats.find(user, chat_id)
        if len(infos) > 1 and self._chats is not None:
            infos = _with_stored_question(infos, await self._chats.load(request, user, chat_id))
        if not infos:
            return None
        await self._access.check_found_stream(request, user, infos[0])
        return infos[0]

    async def _active(self, user: str | None, chat_id: str) -> list[StreamInfo]:
        """Return the active streams of a chat and a user, the newest one first.

        There are several if requests were sent at the same instant. One of them has saved its question, and the others
        will be refused.
        """
        infos = await self._store._active(chat_id, MAX_ACTIVE, of_owner=self._access.has_owners, owner=user)
        return [info for info in infos if info.wire == "ai_sdk"]

    async def _earlier_chunks(
        self, request: WebRequest, user: str | None, chat_id: str, stream_id: str
    ) -> list[dict[str, Any]]:
        """Return the chunks that rebuild the message that a running answer continues, if it continues one.

        A client begins a replay with an empty message.
        """
        if self._chats is None:
            return []
        page = await self._store._pages.page(stream_id, 0, 1)
        for chunk in page.chunks if page is not None else ():
            if parse_object(chunk.data).get("messageId") == stream_id:
                return []  # a new message: the chat, which may be long, is not needed
        try:
            chat = await self._chats.load(request, user, chat_id)
        except WebError as error:
            if error.status == 413:
                return []
            raise
        for question in unanswered(chat):
            if question.stream_id == stream_id and question.message.get("role") == "assistant":
                return message_chunks(question.message, sdk_version=self._sdk_version)
        return []

    async def _show(self, request: WebRequest, chat_id: str) -> AsyncWebResponse:
        """Respond with a chat, for the first render of a page."""
        assert self._chats is not None
        user = await self._access.user(request)
        chat, info = await self._chats.load_with_info(request, user, chat_id)
        active: list[StreamInfo] = []
        if info.active_stream_id is not None:  # it may be the stream of a request that will be refused
            active = _with_stored_question(await self._active(user, chat_id), chat)
        answer = {
            "id": info.session_id,
            "title": info.title,
            "messages": await stored_messages(chat),
            "activeStreamId": active[0].id if active else None,
        }
        return await async_run_large(len(chat) * NODE_CHARACTERS, json_response, answer)


async def stored_messages(chat: ChatHistory[Any]) -> list[dict[str, Any]]:
    """Return the UIMessages of the current path of a chat."""

    def convert() -> list[dict[str, Any]]:
        path = chat.tree.active_path
        return ui_messages(path.messages, path.node_ids)

    return await async_run_large(len(chat) * NODE_CHARACTERS, convert)


def _with_stored_question(infos: list[StreamInfo], chat: ChatHistory[Any]) -> list[StreamInfo]:
    """Return the streams that answer a stored question of a chat."""
    named = {question.stream_id for question in unanswered(chat)}
    return [info for info in infos if info.id in named]


def _ids(parsed: UiRequest) -> list[str]:
    return [str(message.get("id") or new_id()) for message in parsed.messages]
