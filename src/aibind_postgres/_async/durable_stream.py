"""A stream that outlives its response: from a source into the store, and from there to a browser."""

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
    """An answer on its way: made by `start` where it is produced, by `resume` where it is read."""

    def __init__(
        self, store: AsyncPostgresStreamStore, id: str, producer: AsyncProducer | None = None, after_seq: int = 0
    ) -> None:
        self.id = id
        self._store = store
        self._producer = producer
        self._after_seq = after_seq

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
        """Begin a stream, have it written from `source` in the background, and return at once.

        Nothing but the end of the source or of the stream ends this: readers may come and go. When the stream is ended
        by somebody else, wherever that is, the source is closed; one that is a generator, and busy in a thread, when it
        next yields. If the source raises, the stream ends in state error, with a generic text, or with that of the
        exception if `expose_errors`; the log gets all. A `WebError` is told as it is, and not logged.

        `on_finish` is called once, with the text that was produced and the status: before the stream is done, if the
        source comes to its end, so that readers wait for it, and after every other end. Of what was produced just
        before somebody else ended the stream, the last may not be stored. The status is None if the stream was deleted,
        or if the database cannot be asked. It must not wait for its own stream, nor close the store. If somebody
        stops the stream while `on_finish` runs, or the process ends, it has been told that the stream is done, and is
        not called again.

        `context` is called for a context manager of this flavour, once for the source, which is read, and closed if it
        is a generator, inside of it, and once for `on_finish`; both may be open at the same time. It is for what a
        framework takes down at the end of a request: with threads, Flask's `app.app_context`. If it cannot be entered,
        that counts as a failure of what it is for; a failure to leave it goes to the log, and changes nothing.

        Raises what `create` raises, and `InvalidDataError` for an id that an event cannot tell; then the source is
        closed. Raises `TypeError` for what is no source. A caller who is cancelled begins the stream all the same.
        Before the process ends, see `shutdown`; if it dies, `fail_abandoned`. Inside a transaction of Django's, begin
        it when that is committed.
        """
        if not async_is_source(source):
            raise TypeError(f"a source must be an iterable of this flavour, not {type(source).__name__}")
        begun: list[AsyncDurableStream] = []

        async def begin() -> None:
            try:
                stream_id = new_id() if id is None else arguments.identifier(id)
                encode(_introduction(stream_id))
                await store.create(stream_id)
            except BaseException:
                await close_source(source)
                raise
            producer = AsyncProducer(store, stream_id, source, on_finish, expose_errors, context)
            begun.append(cls(store, stream_id, producer))

        await async_shielded(begin)
        return begun[0]

    @classmethod
    async def resume(cls, store: AsyncPostgresStreamStore, id: str, after_seq: int = 0) -> AsyncDurableStream:
        """Return a stream that is there, whoever produces it, to be read from the number after `after_seq` on.

        Raises `StreamNotFoundError`.
        """
        cursor = arguments.sequence_number(after_seq, "after_seq", least=0)
        if await store.get_status(id) is None:
            raise StreamNotFoundError(id)
        return cls(store, id, after_seq=cursor)

    @classmethod
    async def shutdown(cls, store: AsyncPostgresStreamStore, timeout: float | timedelta = 5.0) -> bool:
        """Let the streams end that this process writes into a store; say whether all did, or some were broken off.

        To be called at the end of the process, while the stores are still open; closing the store does it, without any
        time to wait. After `timeout` seconds, what still is written ends in state error, and `on_finish` has two
        seconds to return.
        """
        return await shutdown(store, arguments.seconds(timeout, "timeout", zero=True))

    def sse(self, after_seq: int | None = None, *, heartbeat: float | timedelta = 15.0) -> AsyncIterator[bytes]:
        """Iterate over the stream as Server-Sent Events until it has ended.

        It begins after the number `after_seq`, else where `resume` was told to, else at the first event.

        Where it was started here and is read from the beginning, the first event is `stream-id`. Each event of the
        source has its number as id, named or not. At the end comes `error` with its text, or `stopped`, or neither, and
        always `done`: without that the connection broke off. A comment is sent when nothing has come for `heartbeat`
        seconds, so that proxies keep the connection. Raises what `read_from` raises.
        """
        cursor = self._after_seq
        if after_seq is not None:
            cursor = arguments.sequence_number(after_seq, "after_seq", least=0)
        return self._sse(cursor, arguments.seconds(heartbeat, "heartbeat"))

    async def _sse(self, after_seq: int, heartbeat: float) -> AsyncIterator[bytes]:
        if self._producer is not None and after_seq == 0:
            yield encode(_introduction(self.id))
        with self._store._follow(self.id, after_seq) as follower:
            while not isinstance(step := await follower.next(idle_timeout=heartbeat), Ended):
                if isinstance(step, Heartbeat):
                    yield comment("ping")
                    continue
                for chunk in step.chunks:
                    yield _encode_chunk(chunk)
        status = step.status
        if status.state == "error":
            yield encode(ServerSentEvent(status.error or "", "error"))
        elif status.state == "stopped":
            yield encode(ServerSentEvent("", "stopped"))
        yield encode(ServerSentEvent("", "done"))

    async def stop(self) -> bool:
        """End the stream as stopped by a user. True if this call ended it. Raises `StreamNotFoundError`."""
        return await self._store.stop(self.id)

    async def wait(self, timeout: float | timedelta | None = None) -> StreamStatus:
        """Wait until the stream has ended, and, where it was started, `on_finish` has returned; return the status.

        Raises `TimeoutError` if that takes longer than `timeout` seconds, and what else the store's `wait` raises. A
        stream whose producer could not reach the server to end it is active until `fail_abandoned` is called.
        """
        seconds = None if timeout is None else arguments.seconds(timeout, "timeout", zero=True)
        begun_at = monotonic()
        status = await self._store.wait(self.id, seconds)
        if self._producer is not None:
            left = None if seconds is None else max(0.0, begun_at + seconds - monotonic())
            if not await self._producer.finished.wait(left):
                raise TimeoutError(f"stream {self.id!r} has ended, and its on_finish has not")
        return status


def _introduction(stream_id: str) -> ServerSentEvent:
    # A number would be taken for that of an event, to go on from.
    return ServerSentEvent(stream_id, "stream-id", None if stream_id.isdigit() else stream_id)


def _encode_chunk(chunk: StreamChunk) -> bytes:
    event, data = event_of(chunk.data)
    sent = encode(ServerSentEvent(data, event, str(chunk.seq)))
    # aibind's client takes no id from a named event, and would resume before it. An id without data is no event.
    return sent if event == MESSAGE else sent + b"id: %d\n\n" % chunk.seq
