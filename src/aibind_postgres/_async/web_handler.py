"""The base class of the handlers: routing, refusals, responses for errors, and the start of answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import quote

from .. import _arguments as arguments
from .._concurrency import async_call_or_await
from .._sqlstate import server_reason
from ..errors import WebError
from ..models import StreamStatus
from ..web import Generation, QueryParameters, Resource, WebRequest, is_cross_site, is_json, parse_origins
from ..wire import Wire
from .access import AsyncAccess
from .conversation_store import AsyncPostgresConversationStore
from .database import AsyncAttempt
from .durable_stream import AsyncDurableStream
from .event_bodies import AsyncEventBodies
from .responses import AsyncWebResponse, map_client_errors
from .running_answers import AsyncRunningAnswers
from .source import close_source
from .stream_store import AsyncPostgresStreamStore

logger = logging.getLogger("aibind_postgres.web")

RETRY_AFTER = {"Retry-After": "5"}  # seconds


class AsyncWebHandler:
    """The base class of the handlers. Each has its own constructor, which documents the arguments, and its own routes.

    Attributes:
        prefix: The path prefix of all routes.
        max_body: The maximum size of a request body in bytes.
    """

    def __init__(
        self,
        generate: Callable[[Any], Any],
        *,
        store: AsyncPostgresStreamStore,
        conversations: AsyncPostgresConversationStore | None = None,
        owner: Callable[[WebRequest], Any] | None,
        authorize: Callable[[WebRequest, Resource], Any] | None,
        public: bool = False,
        prefix: str,
        allowed_origins: Collection[str],
        max_body: int,
        max_running: int | None,
        max_readers: int,
        heartbeat: float | timedelta,
        send_timeout: float | timedelta,
        expose_errors: bool,
    ) -> None:
        self.prefix = prefix.rstrip("/")
        if self.prefix and not self.prefix.startswith("/"):
            raise ValueError(f"prefix must be empty or begin with a slash, not {prefix!r}")
        arguments.instance(store, AsyncPostgresStreamStore, "store")
        if conversations is not None:
            arguments.instance(conversations, AsyncPostgresConversationStore, "conversations")
            if owner is None and authorize is None and not public:
                raise ValueError(
                    "conversations needs owner, authorize or public=True: clients choose the ids of conversations, so "
                    "they are not secret"
                )
        if max_running is not None:
            arguments.integer(max_running, "max_running", minimum=1)
            if owner is None:
                raise ValueError("max_running limits the answers of one owner, so it needs owner")
        self.max_body = arguments.integer(max_body, "max_body", minimum=0)
        self._generate = generate
        self._store = store
        self._conversations = conversations
        self._access = AsyncAccess(store, conversations, owner, authorize)
        self._allowed_origins = parse_origins(allowed_origins)
        self._running = AsyncRunningAnswers(store, max_running)
        self._heartbeat = arguments.seconds(heartbeat, "heartbeat")
        self._expose_errors = expose_errors
        self._send_timeout = arguments.seconds(send_timeout, "send_timeout")
        self._bodies = AsyncEventBodies(arguments.integer(max_readers, "max_readers", minimum=1), self._send_timeout)
        # By path and method. A path may contain `{id}`, which is an additional argument. The first match counts.
        self._routes: dict[str, dict[str, Callable[..., Any]]] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.prefix!r}, {self._store!r}>"

    async def handle(self, request: WebRequest) -> AsyncWebResponse:
        """Handle one request.

        Args:
            request: The request. Its path includes `prefix`.

        Returns:
            The response. For a `WebError`, it has the status and the text of the error. If the database is unavailable,
            it has status 503 and the header `Retry-After`. Any other exception is logged, and the status is 500.

        Raises:
            Exception: `generate`, `owner` or `authorize` has raised one of `request.refusals`.
        """
        methods, ids = self._find_route(request.path)
        try:
            if not methods:
                raise WebError(404, "not found")
            respond = methods.get(request.method)
            if respond is None:
                allowed = ", ".join(methods)
                return self._error(f"use {allowed}", 405, {"Allow": allowed})
            if is_cross_site(request.headers, self._allowed_origins):
                raise WebError(403, "requests from pages of other origins are refused, except from allowed_origins")
            if request.method in ("POST", "PATCH") and request.body and not is_json(request.headers):
                raise WebError(415, "the Content-Type of the body must be application/json")
            if len(request.body) > self.max_body:
                raise WebError(413, f"the body must be at most {self.max_body} bytes long")
            if isinstance(request.query, QueryParameters) and request.query.problem is not None:
                raise WebError(400, request.query.problem)
            response: AsyncWebResponse = await respond(request, *ids)
        except WebError as error:
            return self._error(error.text or "refused", error.status)
        except request.refusals:
            raise
        except Exception as error:
            if self._is_unavailable(error):
                reason = server_reason(error) or type(error).__name__
                logger.error(
                    "%s %s failed, since the database is unavailable: %s", request.method, request.path, reason
                )
                return self._error("the database is unavailable: try again later", 503, RETRY_AFTER)
            logger.exception("%s %s failed", request.method, request.path)
            return self._error("internal server error", 500)
        return response

    def _error(self, text: str, status: int, headers: Mapping[str, str] | None = None) -> AsyncWebResponse:
        raise NotImplementedError

    def _is_unavailable(self, error: Exception) -> bool:
        stores = (self._store, self._conversations)
        return any(store._database.client.is_unavailable(error) for store in stores if store is not None)

    def _find_route(self, path: str) -> tuple[dict[str, Callable[..., Any]], list[str]]:
        """Return the methods of a path, and the ids in it. Ids may contain slashes."""
        if not path.startswith(self.prefix):
            return {}, []
        route = path.removeprefix(self.prefix)
        if route == "/":
            route = ""
        if route in self._routes and "{id}" not in route:
            return self._routes[route], []
        for pattern in self._routes:
            begin, is_pattern, end = pattern.partition("{id}")
            if is_pattern and route.startswith(begin) and route.endswith(end) and len(route) > len(begin) + len(end):
                return self._routes[pattern], [route[len(begin) : len(route) - len(end)]]
        return {}, []

    async def _start(
        self,
        generation: Generation,
        wire: Wire,
        *,
        on_finish: Callable[[Sequence[str], StreamStatus | None], Any] | None = None,
        before_source: AsyncAttempt[object] | None = None,
    ) -> AsyncWebResponse:
        """Call `generate`, produce its source as a stream, and respond with the stream."""
        stream_id = str(generation.stream_id)
        self._bodies.check(stream_id, generation.owner)  # a refused request must not start an answer
        async with self._running.reserved(generation.owner, stream_id):
            source = await async_call_or_await(self._generate, generation)
            try:
                details = await self._stream_details(generation)
            except BaseException:
                await close_source(source)
                raise
            with map_client_errors():
                stream = await AsyncDurableStream._start(
                    self._store,
                    source,
                    id=stream_id,
                    wire=wire,
                    on_finish=on_finish,
                    expose_errors=self._expose_errors,
                    context=generation.request.context,
                    before_source=before_source,
                    **details,
                )
        return self._event_stream(stream, generation.request, generation.owner, checked=True)

    async def _stream_details(self, generation: Generation) -> dict[str, Any]:
        """Return the session and the owner of a new stream, or nothing if it has none or they cannot be stored."""
        details = {"session_id": generation.session_id, "owner": generation.owner}
        if details == {"session_id": None, "owner": None}:
            return {}
        await self._store._schema.look_up()
        return details if self._access.has_owners or self._store._schema.has_leases else {}

    def _event_stream(
        self, stream: AsyncDurableStream, request: WebRequest, user: str | None, *, checked: bool = False
    ) -> AsyncWebResponse:
        events = stream.sse(heartbeat=self._heartbeat)
        body = self._bodies.open(stream.id, user, events, request.disconnect, checked=checked)
        # A header contains ASCII only. Ids that this handler creates need no quoting.
        header_id = stream.id if stream.id.isascii() and stream.id.isprintable() else quote(stream.id)
        ids = {"X-Stream-Id": header_id, "Access-Control-Expose-Headers": "X-Stream-Id"}
        return AsyncWebResponse(200, {**stream.headers, **ids}, body)
