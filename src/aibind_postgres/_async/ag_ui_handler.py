"""The HTTP API for clients of AG-UI, for any web framework."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from typing import Any

from .. import _arguments as arguments
from .._concurrency import async_run_large
from ..errors import StreamExistsError
from ..web import Generation, Resource, WebRequest, parse_run
from ..wire.ag_ui import AgUiWire
from .durable_stream import AsyncDurableStream
from .responses import AsyncWebResponse, json_response, map_client_errors, stream_not_found
from .stream_store import AsyncPostgresStreamStore
from .web_handler import AsyncWebHandler


class AsyncAgUiHandler(AsyncWebHandler):
    """Handles the requests of clients of AG-UI 1.0, such as `HttpAgent` of `@ag-ui/client`.

    A run is a durable stream. It continues if its client disconnects. Any process can replay or stop it.

    | route | answer |
    |---|---|
    | `POST {prefix}` | starts a run from a `RunAgentInput`, and responds with its events |
    | `GET {prefix}/{id}` | the events of a run from RUN_STARTED on, and the following ones if it is running |
    | `POST {prefix}/{id}/stop` | stops a run, from any device: `{"ok": true}` |

    The id is the `runId`, which the client chooses. It is also the id of the stream, and the `threadId` is its session
    id. A POST with the id of an existing run of the user starts no second run: it responds with the events of the
    existing one, also if its input differs. So a client can repeat a request if it has not received the response. Of
    two such requests at the same instant, both may call `generate`, but only one source is read.

    A stopped run ends with RUN_FINISHED and the outcome `cancelled`. A run ends with RUN_ERROR if its source fails or
    its process dies.

    Needs migration 0004. Without it, a POST gets status 500, and a `SchemaError` is logged.

    Args:
        generate: Called with a `Generation`. Its `body` is the `RunAgentInput`, `messages` are its messages,
            `session_id` is the thread id, and `stream_id` is the run id. Returns a source: an iterable of events, as
            objects of `ag_ui.core`, as `dict`, or encoded by another library. RUN_STARTED and RUN_FINISHED may be left
            out. The call and the source may raise `WebError`, or an exception with which the framework refuses
            requests. If the source raises one, the status line has already been sent, so the run ends with RUN_ERROR.
        store: The stream store.
        owner: As for `StreamHandler`. A run of another user gets status 404, also for a POST with its id. Default:
            None: anyone with the id of a run can read and stop it. The published client chooses random ids.
        authorize: As for `StreamHandler`. For a POST, it is called with the thread as a conversation, and with the run
            if it exists. Default: None.
        prefix: The path prefix of all routes. Default: `/agent`.
        allowed_origins: As for `StreamHandler`, like the following arguments. Default: none.
        max_body: The maximum size of a request body in bytes. A client sends all messages of the thread with each
            request. Default: 10,000,000.
        max_running: The maximum number of runs of one user at the same time. Default: None, which is no limit.
        max_readers: The maximum number of clients of one user, or of one run without a user. Default: 1000.
        heartbeat: Seconds, or a timedelta, without an event after which a response sends a comment. Default: 15.
        send_timeout: Seconds, or a timedelta, after which a response ends because the client does not read.
            Default: 60.
        expose_errors: Whether clients see the text of an exception that a source raises. Default: False.

    A refused request gets the JSON object `{"error": text}`.

    Raises:
        ValueError: As for `StreamHandler`.
        TypeError: As for `StreamHandler`.

    Example:
        `handler = AgUiHandler(generate, store=store, owner=current_user)`
    """

    def __init__(
        self,
        generate: Callable[[Generation], Any],
        *,
        store: AsyncPostgresStreamStore,
        owner: Callable[[WebRequest], Any] | None = None,
        authorize: Callable[[WebRequest, Resource], Any] | None = None,
        prefix: str = "/agent",
        allowed_origins: Collection[str] = (),
        max_body: int = 10_000_000,
        max_running: int | None = None,
        max_readers: int = 1000,
        heartbeat: float | timedelta = 15.0,
        send_timeout: float | timedelta = 60.0,
        expose_errors: bool = False,
    ) -> None:
        super().__init__(
            generate,
            store=store,
            owner=owner,
            authorize=authorize,
            prefix=prefix,
            allowed_origins=allowed_origins,
            max_body=max_body,
            max_running=max_running,
            max_readers=max_readers,
            heartbeat=heartbeat,
            send_timeout=send_timeout,
            expose_errors=expose_errors,
        )
        self._routes = {
            "": {"POST": self._run},
            "/{id}/stop": {"POST": self._stop},
            "/{id}": {"GET": self._replay},
        }

    def _error(self, text: str, status: int, headers: Mapping[str, str] | None = None) -> AsyncWebResponse:
        return json_response({"error": text}, status, headers)

    async def _run(self, request: WebRequest) -> AsyncWebResponse:
        generation = await async_run_large(len(request.body), parse_run, request)
        generation = generation._replace(owner=await self._access.user(request))
        run_id, thread_id = str(generation.stream_id), str(generation.session_id)
        with map_client_errors():
            arguments.identifier(run_id, "runId")
        await self._access.check_session(request, generation.owner, thread_id)
        if await self._store.get_info(run_id) is None:
            try:
                return await self._start(generation, AgUiWire(thread_id))
            except StreamExistsError:  # a request at the same instant was faster, or a standby lags behind
                pass
        return await self._respond(request, generation.owner, run_id)

    async def _replay(self, request: WebRequest, run_id: str) -> AsyncWebResponse:
        return await self._respond(request, await self._access.user(request), run_id)

    async def _stop(self, request: WebRequest, run_id: str) -> AsyncWebResponse:
        await self._find_thread(request, await self._access.user(request), run_id)
        with map_client_errors():
            await self._store.stop(run_id)
        return json_response({"ok": True})

    async def _respond(self, request: WebRequest, user: str | None, run_id: str) -> AsyncWebResponse:
        """Respond with the events of an existing run, from the first one on."""
        wire = AgUiWire(await self._find_thread(request, user, run_id))
        return self._event_stream(AsyncDurableStream(self._store, run_id, wire), request, user)

    async def _find_thread(self, request: WebRequest, user: str | None, run_id: str) -> str | None:
        """Return the thread id of a run that a request may use.

        Raises:
            WebError: 404: there is no such run, or it belongs to another user. 400 and 403: see `check_stream`.
        """
        info = await self._access.find_stream(run_id)
        if info.wire != "ag_ui":  # a stream of another handler
            raise stream_not_found()
        await self._access.check_found_stream(request, user, info)
        return info.session_id
