"""Durable streams: each is written from a source in the background and read as Server-Sent Events."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

from .. import _arguments as arguments
from .._concurrency import async_is_source, async_shielded
from .._subscriptions import Ended
from ..errors import StreamNotFoundError
from ..history import new_id
from ..models import StreamChunk, StreamEvent, StreamStatus, event_of
from ..sse import MESSAGE, ServerSentEvent, comment, encode
from .following import Heartbeat
from .producing import AsyncProducer, close_source, shutdown

if TYPE_CHECKING:
    from .stream_store import AsyncPostgresStreamStore


class AsyncDurableStream:
    """A stream that outlives the request it answers. `start` produces one, `resume` reads one from any process."""

    def __init__(
        self, store: AsyncPostgresStreamStore, id: str, producer: AsyncProducer | None = None, after_seq: int = 0
    ) -> None:
        self.id = id
        self._store = store
        self._producer = producer
        self._after_seq = after_seq

    def __repr__(self) -> str:
        kind = "read" if self._producer is None else "produced"
        return f"<{type(self).__name__} {self.id!r}, {kind} here>"

    @classmethod
    async def start(
        cls,
        store: AsyncPostgresStreamStore,
        source: AsyncIterable[str | StreamEvent],
        *,
        id: str | None = None,
        on_finish: Callable[[str, StreamStatus | None], Any] | None = None,
        expose_errors: bool = False,
        context: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
    ) -> AsyncDurableStream:
        """Create a stream, write it from a source in the background, and return at once.

        The stream ends with its source, or when it is ended elsewhere; readers may come and go. When it is ended
        elsewhere, in any process, the source is closed. A generator that is busy in a thread is closed when it next
        yields. If the source raises, the stream ends in state error, and the exception goes to the log. If it raises
        `WebError`, the stream gets the text of that error, and nothing is logged.

        A cancelled call starts the stream all the same. Call `shutdown` before the process ends. After a process has
        died, `fail_abandoned` ends its streams. In Django, call `start` when the transaction is committed.

        Args:
            store: The store.
            source: An iterable of this flavour that yields `str` and `StreamEvent`, such as a generator.
            id: The stream id. Default: a new, unguessable id.
            on_finish: Called once, with the produced text and the final status. If the source comes to its end, it is
                called before the stream is done, so readers wait for it; otherwise after the stream has ended. If the
                stream was ended elsewhere, the last chunks of the text may not be stored. The status is None if the
                stream was deleted or the database cannot be reached. If the stream is stopped, or the process ends,
                while `on_finish` runs, it has received the status done and is not called again. It must not wait for
                its own stream, nor close the store.
            expose_errors: Whether clients see the text of the source's exception. Default: they see a generic text.
            context: Called for a context manager of this flavour, once for the source and once for `on_finish`; both
                may be open at the same time. The source is read inside it, and closed inside it if it is a generator.
                Use it for resources that a framework releases at the end of a request: with threads, Flask's
                `app.app_context`. If entering it raises, the source or `on_finish` counts as failed. An error of
                leaving it goes to the log only. Default: no context.

        Returns:
            The stream.

        Raises:
            TypeError: The source is not an iterable of this flavour.
            StreamExistsError: The id is taken. The source is closed, as after every later error.
            InvalidDataError: The id is invalid, or contains a line break, which an event cannot contain.
        """
        if not async_is_source(source):
            raise TypeError(f"a source must be an iterable of this flavour, not {type(source).__name__}")
        streams: list[AsyncDurableStream] = []

        async def begin() -> None:
            store._close_hooks.add(_end_producers)
            try:
                stream_id = new_id() if id is None else arguments.identifier(id)
                encode(_id_event(stream_id))
                await store.create(stream_id)
                # A transaction of the caller may hide the new stream from the producer, which must query it then.
                known_active = not store._database.client.in_transaction()
                producer = AsyncProducer(store, stream_id, source, on_finish, expose_errors, context, known_active)
            except BaseException:
                await close_source(source)
                raise
            streams.append(cls(store, stream_id, producer))

        await async_shielded(begin)
        return streams[0]

    @classmethod
    async def resume(cls, store: AsyncPostgresStreamStore, id: str, after_seq: int = 0) -> AsyncDurableStream:
        """Return an existing stream, to be read from any process.

        Args:
            store: The store.
            id: The stream id.
            after_seq: The number of the last chunk that the client has. Default 0: read from the beginning.

        Returns:
            The stream.

        Raises:
            StreamNotFoundError: There is no such stream.
            InvalidDataError: The id or the number is invalid.
        """
        cursor = arguments.sequence_number(after_seq, "after_seq", least=0)
        if await store.get_status(id) is None:
            raise StreamNotFoundError(id)
        return cls(store, id, after_seq=cursor)

    @classmethod
    async def shutdown(cls, store: AsyncPostgresStreamStore, timeout: float | timedelta = 5.0) -> bool:
        """Wait for the streams that this process produces into a store, then end the remaining ones in state error.

        Call it before the process ends, while the stores are open. Closing the store does the same without waiting.
        After the timeout, `on_finish` has two more seconds to return.

        Args:
            store: The store.
            timeout: Seconds to wait. Default 5.

        Returns:
            True if all streams came to their end, False if some were ended.
        """
        return await shutdown(store, arguments.seconds(timeout, "timeout", zero=True))

    def sse(self, after_seq: int | None = None, *, heartbeat: float | timedelta = 15.0) -> AsyncIterator[bytes]:
        """Iterate over the stream as encoded Server-Sent Events, until it has ended.

        The first event is `stream-id`, if the stream was started by this object and is read from the beginning. The
        event of each chunk has the chunk's number as its id, whether it has a name or not. The last events are `error`
        with its text or `stopped`, if the stream ended so, and always `done`. If `done` is missing, the connection was
        lost.

        Args:
            after_seq: The number of the last chunk that the client has. Default: the one given to `resume`, else 0.
            heartbeat: Seconds without an event after which a comment is sent, so that proxies keep the connection.
                Default 15.

        Yields:
            The bytes of one event or comment.

        Raises:
            StreamNotFoundError: The stream does not exist, or was deleted.
            InvalidDataError: The number is negative.
        """
        cursor = self._after_seq
        if after_seq is not None:
            cursor = arguments.sequence_number(after_seq, "after_seq", least=0)
        return self._sse(cursor, arguments.seconds(heartbeat, "heartbeat"))

    async def _sse(self, after_seq: int, heartbeat: float) -> AsyncIterator[bytes]:
        if self._producer is not None and after_seq == 0:
            yield encode(_id_event(self.id))
        with self._store._follow(self.id, after_seq) as follower:
            while not isinstance(step := await follower.next(idle_timeout=heartbeat), Ended):
                if isinstance(step, Heartbeat):
                    yield comment("ping")
                    continue
                for chunk in step.chunks:
                    yield _chunk_event(chunk)
        status = step.status
        if status.state == "error":
            yield encode(ServerSentEvent(status.error or "", "error"))
        elif status.state == "stopped":
            yield encode(ServerSentEvent("", "stopped"))
        yield encode(ServerSentEvent("", "done"))

    async def stop(self) -> bool:
        """End the stream as stopped by a user.

        Returns:
            True if this call ended the stream, False if it had ended.

        Raises:
            StreamNotFoundError: The stream was deleted.
        """
        return await self._store.stop(self.id)

    async def wait(self, timeout: float | timedelta | None = None) -> StreamStatus:
        """Wait until the stream has ended and, if it was started by this object, `on_finish` has returned.

        If its producer could not reach the server to end it, the stream is active until `fail_abandoned` is called.

        Args:
            timeout: Seconds to wait. Default: no limit.

        Returns:
            The final status.

        Raises:
            TimeoutError: The time is over.
            StreamNotFoundError: The stream was deleted.
        """
        seconds = None if timeout is None else arguments.seconds(timeout, "timeout", zero=True)
        started_at = monotonic()
        status = await self._store.wait(self.id, seconds)
        if self._producer is not None:
            remaining = None if seconds is None else max(0.0, started_at + seconds - monotonic())
            if not await self._producer.finished.wait(remaining):
                raise TimeoutError(f"stream {self.id!r} has ended, but its on_finish has not returned in time")
        return status


async def _end_producers(store: AsyncPostgresStreamStore) -> None:
    """End the producers of a store that is being closed."""
    await shutdown(store, 0.0)


def _id_event(stream_id: str) -> ServerSentEvent:
    # A client would resume after a numeric id, as after that of a chunk.
    return ServerSentEvent(stream_id, "stream-id", None if stream_id.isdigit() else stream_id)


def _chunk_event(chunk: StreamChunk) -> bytes:
    event, data = event_of(chunk.data)
    encoded = encode(ServerSentEvent(data, event, str(chunk.seq)))
    # aibind's client ignores the id of a named event, and would resume before it. By the standard, an id without data
    # dispatches no event.
    return encoded if event == MESSAGE else encoded + b"id: %d\n\n" % chunk.seq
