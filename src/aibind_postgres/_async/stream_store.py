"""The stream store: durable, ordered, resumable streams of text."""

from __future__ import annotations

import builtins
import math
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from functools import partial
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

from .. import _arguments as arguments
from .._sql import StreamStatements
from .._subscriptions import Deliver, Ended, Subscriptions, wake_all
from .._tables import CHUNKS_TABLE, STATUS_TABLE, distinct
from ..errors import StreamExistsError, StreamNotFoundError
from ..models import (
    CleanupResult,
    StreamChunk,
    StreamInfo,
    StreamState,
    StreamStatus,
    SynchronousCommit,
    from_epoch_ms,
)
from .appending import Append, AsyncAppender
from .database import AsyncDatabase
from .following import AsyncFollower, watching_end
from .listening import AsyncListener
from .notifying import AsyncNotifier
from .producing import shutdown
from .reading import AsyncPageReader
from .stream_writer import AsyncStreamWriter

if TYPE_CHECKING:
    from psycopg.sql import Identifier
    from typing_extensions import Self

    from .client import AsyncClientLike

LIST_PAGE_ROWS = 2000  # read by one statement


class AsyncPostgresStreamStore:
    """Streams of text chunks in two tables, written by anyone, read from anywhere, resumed after any chunk.

    `client` is a psycopg pool, a psycopg connection, a connection string (the store then owns a pool), or anything
    with the `PostgresClient` protocol. A connection that is inside a transaction makes the store take part in it:
    what is said below of durability then holds once that transaction commits.

    `poll_interval` is how often, in seconds, waiting readers look for chunks that nobody announces, while there are
    some; it backs off to ten times as much. `ttl` is how long, in seconds, a stream is kept after its end. `retry_for`
    is how long, in seconds, a reader or a writer that has lost the server tries to reach it again before the driver's
    error, or `StreamWriteError`, is raised. `timeout` is how long, in seconds, the answer to a statement is waited for,
    with the time in which that waits for a connection of the pool. Then its connection is closed, the server asked to
    end it, and `psycopg.OperationalError` raised: it may have taken effect. None sets no limit, and a server that is
    there but silent is waited for. Connecting has a limit of its own, the `connect_timeout` of the connection string.
    Clients of other drivers take no `timeout`: they have their own.

    `synchronous_commit` is what PostgreSQL waits for before it acknowledges what this store writes, as in its setting
    of this name; None leaves that to the server. With "off" what was acknowledged in the last moments before a crash of
    the server may be lost. In a transaction of the caller it holds for all of that transaction.

    Appends that several callers make at the same time go out together, as one statement of one of them, unless the
    client's statements take part in the callers' transactions. A client of one's own that tells callers apart, by a
    context variable or by the thread, should therefore set `joins_transactions`.

    Every method raises `SchemaError` if a table is missing, `StoreClosedError` once the store is closed, and the
    driver's own error if the server cannot be reached. Callers at the same time may share a store; where there is an
    event loop, all within the one that used it first, else `RuntimeError` is raised. Statements are made for the
    isolation level READ COMMITTED: at a higher one, writers at the same time get serialization errors, and a reader
    inside a transaction sees nothing new.
    """

    def __init__(
        self,
        client: AsyncClientLike,
        *,
        chunks_table: str | Identifier = CHUNKS_TABLE,
        status_table: str | Identifier = STATUS_TABLE,
        poll_interval: float | timedelta = 0.1,
        ttl: float | timedelta = 300.0,
        retry_for: float | timedelta = 30.0,
        timeout: float | timedelta | None = None,
        synchronous_commit: SynchronousCommit | None = None,
    ) -> None:
        chunks, status = distinct(chunks_table, status_table)
        poll_seconds = arguments.seconds(poll_interval, "poll_interval")
        self._ttl = arguments.milliseconds(ttl, "ttl")
        self._database = AsyncDatabase(client, arguments.seconds(retry_for, "retry_for", zero=True), timeout)
        self._sql = StreamStatements(chunks, status, synchronous_commit)
        runner = self._database.client
        self._subscriptions = Subscriptions(share=not runner.joins_transactions)
        self._notifier = AsyncNotifier(runner, self._subscriptions, status.channel)
        self._listener = AsyncListener(
            self._database, self._subscriptions, self._notifier, self._sql.poll, poll_seconds
        )
        self._pages = AsyncPageReader(self._database, self._sql)
        self._appender = AsyncAppender(self._database, self._sql, self._ttl, self._notifier)

    async def create(self, id: str | None = None) -> str:
        """Begin a stream and return its id; without one, a new and unguessable id is made.

        Raises `StreamExistsError` if there is a stream of this id, whatever its state, and `InvalidDataError` if the
        id is empty, longer than 1,024 bytes, or not storable. Of several callers at once, one succeeds.
        """
        stream_id = str(uuid.uuid4()) if id is None else id
        if not await self.acquire(stream_id):
            raise StreamExistsError(stream_id)
        return stream_id

    async def acquire(self, id: str) -> bool:
        """Begin a stream unless there is one of this id. True: begun, the caller produces. False: the caller reads."""
        rows = await self._database.query(self._sql.create, [arguments.identifier(id), self._ttl])
        return bool(rows[0][0])

    async def append(self, id: str, chunk: str, *, expected_seq: int | None = None) -> int:
        """Append one chunk and return its number. When this returns, the chunk is durable.

        `expected_seq` is the number that the chunk must get. If that number is taken by the same text, nothing is
        written and the number is returned: so an append whose outcome is unknown can be sent again. If it is taken by
        another text, or is not the next one, `SequenceConflictError` is raised.

        Raises `StreamNotFoundError`, `StreamNotActiveError` if the stream has ended, and `InvalidDataError` for what
        is not text or cannot be stored. In each case nothing was written.
        """
        return await self._append(id, [arguments.storable_text(chunk, "a chunk")], expected_seq)

    async def append_many(self, id: str, chunks: Iterable[str], *, expected_seq: int | None = None) -> int:
        """Append chunks, all of them or none, and return the number of the last one.

        They get consecutive numbers, the first one `expected_seq` if that is given; if these are taken by the same
        texts, nothing is written. Without any chunk, the last number in the stream is returned. Raises what `append`
        raises, also then.
        """
        return await self._append(id, arguments.chunk_list(chunks), expected_seq)

    async def _append(self, id: str, texts: Sequence[str], expected_seq: int | None) -> int:
        stream_id = arguments.identifier(id)
        if expected_seq is not None:
            arguments.sequence_number(expected_seq, "expected_seq", least=1)
        return await self._appender.append(Append(stream_id, texts, expected_seq))

    def writer(
        self,
        id: str,
        *,
        max_chunks: int = 1000,
        max_bytes: int = 1_000_000,
        on_end: Callable[[Exception], Any] | None = None,
    ) -> AsyncStreamWriter:
        """Return a context manager that writes to a stream from a buffer, each chunk exactly once.

        Entering it raises `StreamNotFoundError`, or `StreamNotActiveError` if the stream has ended. What is written
        goes after what is there. `write` waits while the buffer holds `max_chunks` chunks, or would get more than
        `max_bytes` of them in UTF-8; a single chunk may be larger. `on_end` is called, from the background, once
        it is known inside the block that nothing more can be written, as when a user has stopped the stream, with the
        error that `write` raises from then on. A writer with it works in the background on every client, in Django
        outside of the caller's transaction.
        """
        stream_id = arguments.identifier(id)
        arguments.sequence_number(max_chunks, "max_chunks", least=1)
        arguments.sequence_number(max_bytes, "max_bytes", least=1)
        limits = max_chunks, max_bytes
        subscribe = partial(watching_end, self._subscriptions, self._listener, stream_id)
        return AsyncStreamWriter(self, self._database, subscribe, stream_id, limits, on_end)

    def read_from(self, id: str, after_seq: int = 0, *, follow: bool = True) -> AsyncIterator[StreamChunk]:
        """Iterate over the chunks with a number above `after_seq`, each exactly once and in order.

        With `follow` it goes on as chunks arrive and ends when the stream has ended; `get_status` then tells how.
        Without, it ends with the last chunk that is there. It holds no connection while it waits or while the caller
        is busy, and one page of chunks in memory: 50 at first, then up to 2,000, but no more than would be a million
        characters (or one chunk) if they were as large as those of the page before. If the server goes away it keeps
        its place and tries again for `retry_for` seconds, then raises the driver's error.

        Raises `StreamNotFoundError` if there is no such stream, also when it is deleted meanwhile, and
        `InvalidDataError` for a negative `after_seq`.
        """
        stream_id = arguments.identifier(id)
        cursor = arguments.sequence_number(after_seq, "after_seq", least=0)
        return self._read(stream_id, cursor) if follow else self._pages.stored(stream_id, cursor)

    async def _read(self, stream_id: str, cursor: int) -> AsyncIterator[StreamChunk]:
        with self._follow(stream_id, cursor) as follower:
            while isinstance(step := await follower.next(), Deliver):
                for chunk in step.chunks:
                    yield chunk

    def _follow(self, stream_id: str, cursor: float) -> AsyncFollower:
        return AsyncFollower(self._database, self._subscriptions, self._listener, self._pages, stream_id, cursor)

    def replay(self, id: str, after_seq: int = 0, *, speed: float = 1.0) -> AsyncIterator[StreamChunk]:
        """Iterate over the chunks that are there, at the pace at which they were written.

        `speed` 2 is twice as fast; infinity leaves out the pauses. The first chunk comes at once, and so does a chunk
        whose time is unknown, as before migration 0002 was applied. The caller's own time counts as part of a pause.

        Raises what `read_from` raises, `ValueError` unless `speed` is above zero, and `SchemaError` if migration 0002
        is missing.
        """
        stream_id = arguments.identifier(id)
        cursor = arguments.sequence_number(after_seq, "after_seq", least=0)
        if not speed > 0:
            raise ValueError(f"speed must be above zero, not {speed!r}")
        return self._pages.replay(stream_id, cursor, speed)

    async def get_status(self, id: str) -> StreamStatus | None:
        """Return where a stream stands, or None if there is no such stream."""
        rows = await self._database.query(self._sql.status, [arguments.identifier(id)])
        return StreamStatus._make(rows[0]) if rows else None

    async def wait(self, id: str, timeout: float | timedelta | None = None) -> StreamStatus:
        """Wait until a stream has ended and return its status.

        Raises `TimeoutError` if that takes longer than `timeout` seconds, and `StreamNotFoundError`. If the server
        goes away it tries again as `read_from` does; a statement under way is waited for, as long as the driver does.
        """
        stream_id = arguments.identifier(id)
        deadline = math.inf
        if timeout is not None:
            deadline = monotonic() + arguments.seconds(timeout, "timeout", zero=True)
        with self._follow(stream_id, math.inf) as follower:
            while not isinstance(step := await follower.next(deadline=deadline), Ended):
                pass
            return step.status

    async def stop(self, id: str) -> bool:
        """End a stream as stopped by a user. True if this call ended it, False if it had ended already.

        Raises `StreamNotFoundError`.
        """
        return await self._end(id, "stopped", None)

    async def complete(self, id: str) -> bool:
        """End a stream as done. True if this call ended it, False if it had ended already.

        Raises `StreamNotFoundError`.
        """
        return await self._end(id, "done", None)

    async def fail(self, id: str, error: str) -> bool:
        """End a stream with an error text. True if this call ended it, False if it had ended already.

        Raises `StreamNotFoundError`, and `InvalidDataError` for a text that cannot be stored.
        """
        return await self._end(id, "error", arguments.storable_text(error, "an error text"))

    async def _end(self, id: str, state: StreamState, error: str | None) -> bool:
        stream_id = arguments.identifier(id)
        [(ended, exists)] = await self._database.query(self._sql.end, [stream_id, state, error, self._ttl])
        if not exists:
            raise StreamNotFoundError(stream_id)
        # Also if it had ended: the call that ended it may have lost its reply, and announced nothing.
        await self._notifier.changed([stream_id])
        return bool(ended)

    async def delete(self, id: str) -> bool:
        """Delete a stream and its chunks, active or not. True if there was one.

        Those who read it or append to it get `StreamNotFoundError`.
        """
        stream_id = arguments.identifier(id)
        [(total_chunks, deleted_chunks)] = await self._database.query(self._sql.delete, [stream_id])
        if total_chunks is None:
            return False
        if deleted_chunks < total_chunks:
            await self._database.query(self._sql.delete_orphans, [stream_id])
        await self._notifier.deleted(stream_id)
        return True

    def list(
        self,
        *,
        state: StreamState | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> AsyncIterator[StreamInfo]:
        """Iterate over the streams, or over those in one state, in the order of their ids.

        With a time, in the order of their creation: those created at `created_after` or later and before
        `created_before`, each with a time zone; this raises `SchemaError` if migration 0002 is missing. A stream that
        is created or deleted meanwhile may appear or not. Raises `ValueError` for an unknown state or a naive time.
        """
        if state is not None and state not in get_args(StreamState):
            raise ValueError(f"state must be one of {', '.join(get_args(StreamState))}, not {state!r}")
        for bound in (created_after, created_before):
            if bound is not None and bound.tzinfo is None:
                raise ValueError("created_after and created_before must have a time zone")
        return self._list(state, created_after, created_before)

    async def _list(
        self, state: StreamState | None, after: datetime | None, before: datetime | None
    ) -> AsyncIterator[StreamInfo]:
        by_time = after is not None or before is not None
        last_id = ""
        last_time: str | None = None
        while True:
            if by_time:
                params = [state, last_id, LIST_PAGE_ROWS, after, before, last_time]
                rows = await self._database.query(self._sql.list_by_time, params)
            else:
                rows = await self._database.query(self._sql.list, [state, last_id, LIST_PAGE_ROWS])
            for stream_id, found, error, total_chunks, expires_at, created_at, *_ in rows:
                yield StreamInfo(stream_id, found, error, total_chunks, from_epoch_ms(expires_at), created_at)
            if len(rows) < LIST_PAGE_ROWS:
                return
            last_id, last_time = rows[-1][0], rows[-1][-1]

    async def cleanup(self, *, batch_size: int = 1000) -> CleanupResult:
        """Delete the streams that have ended and whose ttl is over, and their chunks; return how many.

        Each statement deletes at most `batch_size` streams. Safe to run in many processes at once. Active streams are
        left alone: see `fail_abandoned`.
        """
        arguments.sequence_number(batch_size, "batch_size", least=1)
        streams = chunks = 0
        while True:
            [(deleted_streams, deleted_chunks)] = await self._database.query(self._sql.cleanup, [batch_size])
            streams += deleted_streams
            chunks += deleted_chunks
            if deleted_streams < batch_size:
                return CleanupResult(streams, chunks)

    async def fail_abandoned(self, older_than: float | timedelta) -> builtins.list[str]:
        """End, in state error, the active streams that have shown no sign of life for `older_than` seconds.

        Returns their ids. For streams whose producer died: choose a time longer than the longest pause that a living
        producer makes. The last sign of life is the last chunk, else the creation. If migration 0002 is missing it is
        told by the expiry: then every writer must have this store's ttl, and a stream is ended up to a quarter of the
        ttl later.
        """
        silence = arguments.seconds(older_than, "older_than", zero=True)
        text = f"abandoned: no sign of life for {silence:g} seconds"
        rows = await self._database.query(self._sql.fail_abandoned, [self._ttl, round(silence * 1000), text])
        stream_ids = [row[0] for row in rows]
        if stream_ids:
            await self._notifier.changed(stream_ids)
        return stream_ids

    async def close(self) -> None:
        """Close the store, and the pool if the store owns it. Whoever waits gets `StoreClosedError`. Safe to repeat.

        Before, the durable streams that are still written here end in state error; `shutdown` gives them time.
        """
        if self._database.inherited:
            return
        self._database.check_owner()
        if not self._database.closing.is_set():
            await shutdown(self, 0.0)
        self._database.closing.set()
        wake_all(self._subscriptions.closed())
        async with self._database.client:
            try:
                await self._listener.close()
            finally:
                await self._notifier.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
