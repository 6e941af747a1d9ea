"""Durable streams: produced from a source in the background, and read as Server-Sent Events."""

from __future__ import annotations

import math
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Any

from .. import _arguments as arguments
from .._concurrency import async_call_or_await, async_shielded
from .._lifecycle import require_active
from .._telemetry import StoreSpan, link_in
from ..errors import StreamNotFoundError, copy_error
from ..history import new_id
from ..models import StreamStatus
from ..wire import Wire, WireName, find_wire
from .database import AsyncAttempt
from .event_stream import encoded_events, traced
from .following import AsyncFollower
from .producing import AsyncProducer, end_producer, end_producers, shutdown
from .source import check_source, close_source, find_wire_of
from .stream_store import AsyncPostgresStreamStore


class AsyncDurableStream:
    """A stream that outlives the request that started it.

    `start` produces a stream from a source. `resume` reads an existing stream, in any process.
    """

    def __init__(
        self,
        store: AsyncPostgresStreamStore,
        id: str,
        wire: Wire,
        producer: AsyncProducer | None = None,
        after_seq: int = 0,
        link: str | None = None,
    ) -> None:
        self.id = id
        self._wire = wire
        self._store = store
        self._producer = producer
        self._after_seq = after_seq
        self._link = link

    def __repr__(self) -> str:
        kind = "read" if self._producer is None else "produced"
        return f"<{type(self).__name__} {self.id!r}, {kind} here>"

    @classmethod
    async def start(
        cls,
        store: AsyncPostgresStreamStore,
        source: AsyncIterable[Any],
        *,
        id: str | None = None,
        wire: WireName = "aibind",
        on_finish: Callable[[str, StreamStatus | None], Any] | None = None,
        expose_errors: bool = False,
        context: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
        idle_timeout: float | timedelta | None = None,
        timeout: float | timedelta | None = None,
        session_id: str | None = None,
        owner: str | None = None,
        metadata: Any = None,
        ttl: float | timedelta | None = None,
    ) -> AsyncDurableStream:
        """Create a stream, copy a source into it in the background, and return at once.

        The items of the source, and the bytes that clients receive, depend on the wire format. With the default, output
        of a model is safe: a `str` of the source arrives as text, with any characters. Only a `StreamEvent` arrives as
        a named event.

        The end of a stream depends on its source:

        - If the source ends, the stream ends in state done.
        - If the source raises, the stream ends in state error, and the exception is logged. If the exception is a
          `WebError`, the stream gets its text, and nothing is logged.
        - If any process ends or deletes the stream, the source is closed. A generator that is running in a thread is
          closed when it next yields.

        The stream does not depend on its readers, and is started even if the call is cancelled.

        Call `shutdown` before the process ends. With migration 0004, the stream has a lease, which is renewed while the
        source runs: if the process dies, waiting readers end the stream in state error. Without it, `fail_abandoned`
        ends the streams of dead processes. In Django, call
        `start` after the transaction has been committed: the producer uses a connection of its own. If it does not see
        the stream, its readers in this process raise `AibindError`. In the transaction of a `TestCase` of Django,
        `start` runs the source before it returns, and time limits have no effect.

        Args:
            store: The store.
            source: An iterable of items of the wire format, such as a generator. For an asynchronous store, an
                asynchronous iterable.
            id: The stream id. Default: a new, unguessable id.
            wire: The wire format. It is stored with the stream, which needs migration 0004 unless it is the default.

                - `aibind`: for aibind's browser client, and for `EventSource`. The items are `str` and `StreamEvent`.
                - `ai_sdk`: for `useChat` of the AI SDK 7. The items are those of `wire.ai_sdk`. `AiSdkHandler` also
                  writes for versions 5 and 6.
                - `ag_ui`: for clients of AG-UI. The items are those of `wire.ag_ui`.
                - `sse`: an event stream that another library has encoded, as `str` or `bytes`, split anywhere. Its
                  frames are sent unchanged.

                Default: `aibind`.
            on_finish: Called once, with the produced text and the final status. Default: no callback.

                - If the source ends, the call comes before the stream is done, so readers wait for it. The status
                  is done. If the stream is stopped or the process ends during the call, there is no second call.
                - Otherwise the call comes after the stream has ended. If another caller ended the stream, the last
                  chunks of the text may not be stored. If chunks could not be stored, the stream may still be active.
                  The status is None if the stream was deleted or the database cannot be reached.

                It must not wait for its own stream, and must not close the store.
            expose_errors: Whether clients see the text of the source's exception. Default: False, which shows a generic
                text.
            context: Returns a context manager, asynchronous for an asynchronous store. Called once for the source and
                once for `on_finish`; both contexts may be open at the same time. The source is read inside the context,
                and closed inside it if it is a generator. Use it for resources that a framework releases at the end of
                a request, such as Flask's `app.app_context`. If entering the context raises, the source or `on_finish`
                counts as failed. An exception on leaving it is only logged. Default: no context.
            idle_timeout: Seconds, or a timedelta, for which the source may yield nothing. After that, the stream ends
                in state error and the source is closed. A generator that is blocked in a thread is closed at its next
                `yield`. Default: no limit.
            timeout: The same for the whole duration of the source. Default: no limit.
            session_id: As for `create` of the store, like the following arguments. They need migration 0004.
            owner: See `create`.
            metadata: See `create`.
            ttl: See `create`.

        Returns:
            The stream.

        Raises:
            TypeError: The source is not an iterable, or not asynchronous for an asynchronous store. It is not closed.
            StreamExistsError: A stream with this id exists. The source is closed.
            InvalidDataError: The id is invalid, or contains a line break, which an event cannot contain; or another
                argument is invalid, as for `create`. The source is closed.
            SchemaError: Migration 0004 is missing, and an argument needs it. The source is closed.
            RuntimeError: No thread can start. The stream ends in state error, the source is closed, and `on_finish` is
                called.
        """
        found = await find_wire_of(wire, source)
        return await cls._start(
            store,
            source,
            id=id,
            wire=found,
            on_finish=on_finish and partial(_call_with_text, on_finish, found),
            expose_errors=expose_errors,
            context=context,
            idle_timeout=idle_timeout,
            timeout=timeout,
            session_id=session_id,
            owner=owner,
            metadata=metadata,
            ttl=ttl,
        )

    @classmethod
    async def _start(
        cls,
        store: AsyncPostgresStreamStore,
        source: AsyncIterable[Any],
        *,
        id: str | None = None,
        wire: Wire,
        on_finish: Callable[[Sequence[str], StreamStatus | None], Any] | None,
        expose_errors: bool,
        context: Callable[[], AbstractAsyncContextManager[object]],
        idle_timeout: float | timedelta | None = None,
        timeout: float | timedelta | None = None,
        before_source: AsyncAttempt[object] | None = None,
        **details: Any,
    ) -> AsyncDurableStream:
        """Do the same as `start`. When the stream exists, call `before_source`. If it raises, delete the stream.

        `on_finish` gets the chunks instead of the text. `details` are the arguments of `create`.
        """
        check_source(source)
        streams: list[AsyncDurableStream] = []

        async def begin() -> None:
            store._close_hooks.add(end_producers)
            try:
                stream_id = new_id() if id is None else arguments.identifier(id)
                encoder = wire.chunk_encoder(stream_id)
                limits = arguments.time_limit(idle_timeout, "idle_timeout"), arguments.time_limit(timeout, "timeout")
                inline = await store._database.client.runs_inline()
                span = StoreSpan(store._database.metrics, "aibind.produce", stream_id, details.get("session_id"))
                rest = on_finish, expose_errors, context, *limits
                with span:  # which ends if the block raises
                    producer = AsyncProducer(store, stream_id, source, encoder, *rest, span=span, inline=inline)
                    await store._create_leased(stream_id, wire=wire.name, **details)
                    if before_source is not None:
                        try:
                            await before_source()
                        except BaseException:
                            await store.delete(stream_id)
                            raise
            except BaseException:
                await close_source(source)
                raise
            await producer.start(is_new=True)
            streams.append(cls(store, stream_id, wire, producer, link=span.traceparent))

        await async_shielded(begin)
        return streams[0]

    @classmethod
    async def produce(
        cls,
        store: AsyncPostgresStreamStore,
        id: str,
        source: AsyncIterable[Any],
        *,
        on_finish: Callable[[str, StreamStatus | None], Any] | None = None,
        expose_errors: bool = False,
        context: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
        idle_timeout: float | timedelta | None = None,
        timeout: float | timedelta | None = None,
    ) -> StreamStatus:
        """Copy a source into an existing stream, and return when the stream has ended.

        For a worker process, such as of a task queue: a web process creates the stream and its readers follow it, also
        before the worker begins. `create(lease=60)` ends the stream if no worker begins within 60 seconds.

        The stream and its source end as after `start`. If the call is cancelled or interrupted, as by the exception of
        a signal handler, the stream ends in state error. If the process is killed, it does so when the lease has
        expired (migration 0004).

        Args:
            store: The store.
            id: The id of an active stream, which no other producer writes.
            source: As for `start`, like the following arguments. Its items are those of the wire format that the
                stream was created with.
            on_finish: See `start`.
            expose_errors: See `start`.
            context: See `start`.
            idle_timeout: See `start`.
            timeout: See `start`.

        Returns:
            The final status. The call returns after `on_finish`.

        Raises:
            TypeError: As for `start`.
            ValueError: A duration is not more than zero, or above 1e9 seconds. The source is closed.
            StreamNotFoundError: The stream does not exist, or was deleted. The source is closed.
            StreamNotActiveError: The stream has ended before the call, such as by a user's request. The source is
                closed.
            RuntimeError: No thread can start. The stream ends in state error, the source is closed, and `on_finish` is
                called.
        """
        check_source(source)
        store._close_hooks.add(end_producers)
        try:
            limits = arguments.time_limit(idle_timeout, "idle_timeout"), arguments.time_limit(timeout, "timeout")
            info = await store.get_info(id)
            if info is None:
                raise StreamNotFoundError(id)
            require_active(id, StreamStatus(info.state, info.error, info.total_chunks))
            wire = find_wire(info.wire)
            finish = on_finish and partial(_call_with_text, on_finish, wire)
            encoder = wire.chunk_encoder(id)
            inline = await store._database.client.runs_inline()
            span = StoreSpan(store._database.metrics, "aibind.produce", id, info.session_id, link_in(info.metadata))
            rest = finish, expose_errors, context, *limits
            producer = AsyncProducer(store, id, source, encoder, *rest, span=span, inline=inline)
        except BaseException:
            await close_source(source)
            raise
        try:
            await async_shielded(partial(producer.start, is_new=False))
            await producer.finished.wait()
            ended = await store._database.retry(partial(store.get_status, id))
            if ended is None:
                raise StreamNotFoundError(id)
            # If the chunks could not be stored, the stream is still active, and ends with its lease.
            return ended if ended.state != "active" else await store.wait(id)
        except BaseException:
            await async_shielded(partial(end_producer, producer))
            raise

    @classmethod
    async def resume(cls, store: AsyncPostgresStreamStore, id: str, after_seq: int = 0) -> AsyncDurableStream:
        """Return an existing stream for reading. Any process can resume a stream.

        Args:
            store: The store.
            id: The stream id.
            after_seq: The sequence number of the last chunk that the client has. Default: 0, the beginning.

        Returns:
            The stream.

        Raises:
            StreamNotFoundError: The stream does not exist.
            InvalidDataError: The id is invalid, `after_seq` is not an int of at least 0, or a newer version of this
                package has written the stream in a wire format that this one does not have.
        """
        cursor = arguments.integer(after_seq, "after_seq", minimum=0)
        # A standby may lag behind: the page is read again for a while.
        info = await store.get_info(id)
        if info is None and await store._pages.page(id, 0, 1) is not None:
            info = await store.get_info(id)
        if info is None:
            raise StreamNotFoundError(id)
        return cls(store, id, find_wire(info.wire), after_seq=cursor, link=link_in(info.metadata))

    @classmethod
    async def shutdown(cls, store: AsyncPostgresStreamStore, timeout: float | timedelta = 5.0) -> bool:
        """Wait for the streams that this process produces, then end the remaining ones in state error.

        Call it before the process ends, while the store is open. Closing the store does the same without waiting.
        After the timeout, `on_finish` has two more seconds to return.

        Args:
            store: The store of the streams.
            timeout: Seconds, or a timedelta, to wait. Default: 5.

        Returns:
            True if all producers finished within `timeout`.

        Raises:
            ValueError: `timeout` is negative, or above 1e9 seconds.
            TypeError: `timeout` is neither a number nor a timedelta.
        """
        return await shutdown(store, arguments.seconds(timeout, "timeout", allow_zero=True))

    def sse(self, after_seq: int | None = None, *, heartbeat: float | timedelta = 15.0) -> AsyncIterator[bytes]:
        """Iterate over the stream as encoded Server-Sent Events, until it has ended.

        The wire format determines the events. With `aibind`, the data of the events without a name are the text, in
        which a CR or CRLF arrives as LF, also if the CRLF spans two chunks. The events are, in this order:

        1. `stream-id`, if `start` returned this object and the stream is read from the beginning.
        2. One event for each chunk, named or unnamed. Its id is the sequence number of the chunk. A chunk that contains
           U+0001 after a name is a named event: `append` of the store describes the risk.
        3. `error` with the error text, or `stopped`, if the stream ended in that state.
        4. `done`, after every final state. If it is missing, the stream was deleted or reading failed.

        Args:
            after_seq: The sequence number of the last chunk that the client has. Default: the value given to `resume`,
                or 0.
            heartbeat: Seconds, or a timedelta, without an event after which a comment is sent, so that proxies keep
                the connection open. Default: 15. None is sent during retries, while the server is unreachable.

        Yields:
            The bytes of one comment, or of one or more events.

        Raises:
            StreamNotFoundError: The stream does not exist, or was deleted.
            AibindError: `start` was called in a transaction, and the producer does not see the stream.
            InvalidDataError: `after_seq` is not an int of at least 0.
            ValueError: `heartbeat` is not more than zero, or above 1e9 seconds.
            TypeError: `heartbeat` is neither a number nor a timedelta.
        """
        cursor = self._after_seq
        if after_seq is not None:
            cursor = arguments.integer(after_seq, "after_seq", minimum=0)
        pause = arguments.seconds(heartbeat, "heartbeat")
        frames = self._wire.frame_encoder(self.id, cursor)
        is_new = self._producer is not None and cursor == 0
        following = traced(self._following(cursor), self._store._database.metrics, self.id, self._link)
        return encoded_events(following, self._store._pages, self.id, frames, pause, is_new=is_new)

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of a response with `sse`, which depend on the wire format. `Content-Type` is one of them."""
        return self._wire.headers

    @contextmanager
    def _following(self, cursor: float) -> Iterator[AsyncFollower]:
        with self._store._follow(self.id, cursor) as follower:
            if self._producer is not None:
                follower.subscribe()  # receives an error that is set after this check
                if self._producer.start_error is not None:
                    raise copy_error(self._producer.start_error)
            yield follower

    async def stop(self) -> bool:
        """End the stream in state stopped, for example on a user's request.

        Returns:
            True if this call ended the stream, False if it had already ended.

        Raises:
            StreamNotFoundError: The stream was deleted.
        """
        return await self._store.stop(self.id)

    async def wait(self, timeout: float | timedelta | None = None) -> StreamStatus:
        """Wait until the stream has ended. If `start` returned this object, also wait until `on_finish` has returned.

        If the producer cannot reach the server to end the stream, the stream stays active until its lease has expired,
        or without a lease until `fail_abandoned` is called.

        Args:
            timeout: Seconds, or a timedelta, to wait. Default: no limit.

        Returns:
            The final status.

        Raises:
            TimeoutError: The stream is still active, or `on_finish` has not returned, after `timeout`.
            StreamNotFoundError: The stream was deleted.
            AibindError: `start` was called in a transaction, and the producer does not see the stream.
            ValueError: `timeout` is negative, or above 1e9 seconds.
            TypeError: `timeout` is neither a number nor a timedelta.
        """
        seconds = math.inf if timeout is None else arguments.seconds(timeout, "timeout", allow_zero=True)
        deadline = monotonic() + seconds
        with self._following(math.inf) as follower:
            status = await follower.end(deadline)
        if self._producer is not None:
            remaining = None if deadline == math.inf else max(0.0, deadline - monotonic())
            if not await self._producer.finished.wait(remaining):
                raise TimeoutError(
                    f"stream {self.id!r} has ended, but its on_finish has not returned within the timeout"
                )
        return status


async def _call_with_text(
    on_finish: Callable[[str, StreamStatus | None], Any],
    wire: Wire,
    chunks: Sequence[str],
    status: StreamStatus | None,
) -> None:
    await async_call_or_await(on_finish, wire.text(chunks), status)
