"""A stream that outlives its response: from a source into the store, and from there to a browser."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from .. import _arguments as arguments
from .._concurrency import Mutex, async_break_off, async_settle, async_spawn
from ..errors import StreamNotActiveError, StreamNotFoundError
from ..models import StreamEvent, StreamStatus, chunk_text, event_of
from ..sse import ServerSentEvent, comment, encode

if TYPE_CHECKING:
    from .stream_store import AsyncPostgresStreamStore
    from .stream_writer import AsyncStreamWriter

logger = logging.getLogger("aibind_postgres")

GENERIC_ERROR = "the answer broke off"  # what is told of an exception of the source


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
    ) -> AsyncDurableStream:
        """Begin a stream, have it written from `source` in the background, and return at once.

        Nothing but the end of the source or of the stream ends this: readers may come and go. When the stream is ended
        by somebody else, wherever that is, the source is closed; one that is a generator, and busy in a thread, when it
        next yields. If the source raises, the stream ends in state error, with a generic text, or with that of the
        exception if `expose_errors`; the log gets all. `on_finish` is called with the text that was written and the
        status: before the stream is done, if the source comes to its end, and after every other end. The status is None
        if the stream was deleted.

        Raises what `create` raises. Before the process ends, see `drain`; if it dies, `fail_abandoned`.
        """
        stream_id = await store.create(id)
        return cls(store, stream_id, AsyncProducer(store, stream_id, source, on_finish, expose_errors))

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
    async def drain(cls, store: AsyncPostgresStreamStore, timeout: float | timedelta = 5.0) -> list[str]:
        """Let the answers end that this process writes into a store; return the ids of those that were broken off.

        To be called at the end of the process, while the stores are still open. After `timeout` seconds, what still is
        written ends in state error, and `on_finish` has two seconds to return.
        """
        deadline = monotonic() + arguments.seconds(timeout, "timeout", zero=True)
        producers = AsyncProducer.writing(store)
        for producer in producers:
            await producer.worker.join(max(0.0, deadline - monotonic()))
        late = [producer for producer in producers if producer.worker.is_alive()]
        broken_off = []
        for producer in late:
            with suppress(StreamNotFoundError):
                if await store.fail(producer.stream_id, GENERIC_ERROR):
                    broken_off.append(producer.stream_id)
        deadline = monotonic() + 2.0
        for producer in late:
            await producer.worker.join(max(0.0, deadline - monotonic()))
        return broken_off

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
            yield encode(ServerSentEvent(self.id, "stream-id", self.id))
        async for chunk in self._store._reader.read(self.id, after_seq, True, heartbeat):
            if not chunk.seq:
                yield comment("ping")
                continue
            event, data = event_of(chunk.data)
            yield encode(ServerSentEvent(data, event, str(chunk.seq)))
        status = await self._store.get_status(self.id)
        if status is None:
            raise StreamNotFoundError(self.id)
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
        generator that is busy in a thread is waited for.
        """
        seconds = None if timeout is None else arguments.seconds(timeout, "timeout", zero=True)
        begun_at = monotonic()
        status = await self._store.wait(self.id, seconds)
        if self._producer is not None:
            await self._producer.worker.join(None if seconds is None else max(0.0, begun_at + seconds - monotonic()))
            if self._producer.worker.is_alive():
                raise TimeoutError(f"stream {self.id!r} has ended, and its source has not")
        return status


class AsyncProducer:
    """The worker that writes a source into a stream."""

    _mutex: ClassVar[Mutex] = Mutex()
    _running: ClassVar[set[AsyncProducer]] = set()  # nobody else may hold on to them

    def __init__(
        self,
        store: AsyncPostgresStreamStore,
        stream_id: str,
        source: AsyncIterable[str | StreamEvent],
        on_finish: Callable[[str, StreamStatus | None], Any] | None,
        expose_errors: bool,
    ) -> None:
        self._store = store
        self.stream_id = stream_id
        self._source = source
        self._on_finish = on_finish
        self._expose_errors = expose_errors
        self._text: list[str] = []
        self._source_open = True
        self._ended = False  # by somebody else
        self._finished = False
        with self._mutex:  # a thread may have ended before this goes on
            self.worker = async_spawn(self._run, "aibind_postgres-producer")
            self._running.add(self)

    @classmethod
    def writing(cls, store: AsyncPostgresStreamStore) -> list[AsyncProducer]:
        """Return those that write into a store."""
        with cls._mutex:
            return [producer for producer in cls._running if producer._store is store]

    async def _run(self) -> None:
        try:
            try:
                async with self._store.writer(self.stream_id, when_ended=self._break_off) as writer:
                    await self._pipe(writer)
                    last = await writer.flush()
                    if not self._ended:
                        # Before the stream is done, so that who sees that finds what is kept here.
                        await self._finish(StreamStatus("done", None, last))
            except (SourceError, StreamNotActiveError, StreamNotFoundError):
                pass  # the log has the one, and the others were meant
            except Exception as error:
                if not self._ended:
                    logger.error("the producer of stream %r gave up: %s", self.stream_id, error)
            except BaseException:
                if not self._ended:
                    raise
            await self._close_source()  # if it did not come to writing
            if not self._finished:
                await self._finish()
        finally:
            with self._mutex:
                self._running.discard(self)

    async def _pipe(self, writer: AsyncStreamWriter) -> None:
        writing = False
        try:
            async for item in self._source:
                text = chunk_text(item)
                writing = True
                await writer.write(text)
                writing = False
                if isinstance(item, str):
                    self._text.append(item)
        except Exception as error:
            if writing or self._ended:
                raise
            logger.exception("the source of stream %r failed", self.stream_id)
            raise SourceError(str(error) if self._expose_errors else GENERIC_ERROR) from error
        except BaseException as interruption:  # by the end of the event loop, say: the writer stores its text
            raise type(interruption)(GENERIC_ERROR) from interruption
        finally:
            await self._close_source()

    def _break_off(self, error: Exception) -> None:
        """Interrupt the source: nothing that it yields can be stored any more."""
        self._ended = True
        if not isinstance(error, (StreamNotActiveError, StreamNotFoundError)):
            logger.error("the producer of stream %r gave up: %s", self.stream_id, error)
        if self._source_open:
            async_break_off(self.worker, self._source)

    async def _close_source(self) -> None:
        if not self._source_open:
            return
        self._source_open = False
        close = getattr(self._source, "aclose", None) or getattr(self._source, "close", None)
        if close is not None:
            try:
                await async_settle(close())
            except Exception:
                logger.exception("the source of stream %r failed when it was closed", self.stream_id)

    async def _finish(self, status: StreamStatus | None = None) -> None:
        self._finished = True
        if self._on_finish is not None:
            try:
                status = status or await self._store.get_status(self.stream_id)
                await async_settle(self._on_finish("".join(self._text), status))
            except Exception:
                logger.exception("on_finish of stream %r failed", self.stream_id)


class SourceError(Exception):
    """Ends a stream in state error, with this text."""
