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
from .._write_buffer import WriteBuffer
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
from .reading import AsyncPageReader
from .stream_writer import AsyncStreamWriter, StreamOperations

if TYPE_CHECKING:
    from psycopg.sql import Identifier
    from typing_extensions import Self

    from .client import AsyncClientLike

LIST_PAGE_ROWS = 2000  # read by one statement


class AsyncPostgresStreamStore:
    """Streams of text chunks in two tables: written by any process, read from any process, resumed after any chunk.

    Callers may share a store between threads, or between the tasks of one event loop.

    Simultaneous appends share statements, unless the client joins the callers' transactions. A client that tells its
    callers apart, by a context variable or by the thread, should therefore set `joins_transactions`. The statements are
    made for the isolation level READ COMMITTED: at a higher one, simultaneous writers get serialization errors, and a
    reader inside a transaction sees nothing new.

    Args:
        client: A psycopg pool, a psycopg connection, a connection string (the store then owns a pool), or an object
            with the `PostgresClient` protocol. On a connection that is inside a transaction the store takes part in it:
            its writes become durable when that transaction commits.
        chunks_table: Table of the chunks, as "table", "schema.table" or `psycopg.sql.Identifier`.
        status_table: Table of the streams.
        poll_interval: Seconds between two looks for chunks without a notification, 0.1 by default. It grows to ten
            times as much while none arrive.
        ttl: Seconds for which a stream is kept after its end, 300 by default.
        retry_for: Seconds for which a reader or a writer that has lost the server tries to reach it again, 30 by
            default. Then it raises the driver's error, or `StreamWriteError`.
        timeout: Seconds to wait for the answer to a statement, including the wait for a connection of the pool. Then
            the connection is closed, the server is asked to cancel the statement, and `psycopg.OperationalError` is
            raised: the statement may have taken effect. None, the default, sets no limit. Connecting has its own limit,
            `connect_timeout` in the connection string. Clients of other drivers have their own timeouts.
        synchronous_commit: PostgreSQL's setting of this name for the writes of this store; None, the default, leaves
            it to the server. With "off", a crash of the server may lose the last acknowledged writes. In a transaction
            of the caller it holds for the whole transaction.

    Raises:
        SchemaError: From every method, if a table or a column is missing.
        StoreClosedError: From every method, once the store is closed.
        RuntimeError: From every method, in another event loop than that of the first call.
        ForkedError: From every method, in a process that was forked after the first call.
        psycopg.Error: From every method, the driver's own error if the server cannot be reached.
        ValueError: A table name or a setting is invalid.
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
        self._tables = (status, chunks)
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
        self._close_hooks: set[Callable[[AsyncPostgresStreamStore], Any]] = set()

    def __repr__(self) -> str:
        tables = " and ".join(table.quoted for table in self._tables)
        return f"<{type(self).__name__} in {tables}, {self._database.client!r}, {self._database.state}>"

    async def create(self, id: str | None = None) -> str:
        """Create a stream and return its id. Of several simultaneous callers with one id, one succeeds.

        Args:
            id: 1 to 1,024 bytes in UTF-8. None, the default, makes a new one that cannot be guessed.

        Raises:
            StreamExistsError: A stream of this id exists, in any state.
            InvalidDataError: The id cannot be stored.
        """
        stream_id = str(uuid.uuid4()) if id is None else id
        if not await self.acquire(stream_id):
            raise StreamExistsError(stream_id)
        return stream_id

    async def acquire(self, id: str) -> bool:
        """Create a stream unless one of this id exists.

        Returns:
            True if this call created it, so that the caller produces; False if the caller is to read it.
        """
        rows = await self._database.query(self._sql.create, [arguments.identifier(id), self._ttl])
        return bool(rows[0][0])

    async def append(self, id: str, chunk: str, *, expected_seq: int | None = None) -> int:
        """Append one chunk and return its number. The chunk is durable when this returns.

        Args:
            id: The stream.
            chunk: Text without NUL.
            expected_seq: The number that the chunk must get. If the same text already has it, nothing is written and
                the call succeeds: so an append whose outcome is unknown can be repeated.

        Raises:
            StreamNotFoundError: There is no such stream.
            StreamNotActiveError: The stream has ended.
            SequenceConflictError: Another text has the expected number, or it is not the next one.
            InvalidDataError: The chunk cannot be stored. After any of these errors nothing was written.
        """
        return await self._append(id, [arguments.storable_text(chunk, "a chunk")], expected_seq)

    async def append_many(self, id: str, chunks: Iterable[str], *, expected_seq: int | None = None) -> int:
        """Append chunks, all of them or none, and return the number of the last one.

        They get consecutive numbers, the first one `expected_seq` if that is given. If the same texts already have
        these numbers, nothing is written. Without chunks the last number of the stream is returned. Raises the errors
        of `append`, also without chunks.
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

        Its chunks follow the stored ones.

        Args:
            id: An active stream.
            max_chunks: `write` waits while the buffer holds this many chunks, 1,000 by default.
            max_bytes: `write` waits while the buffer would exceed this many bytes of UTF-8, 1,000,000 by default. A
                single chunk may be larger.
            on_end: Called in the background when the stream ended before the block did, for example since a user
                stopped it, with the error that `write` raises from then on. It may be a coroutine function in the
                asynchronous flavour. A writer with it works in the background on every client, in Django outside of the
                caller's transaction.

        Raises:
            StreamNotFoundError: When entered, if there is no such stream.
            StreamNotActiveError: When entered, if the stream has ended.
        """
        stream_id = arguments.identifier(id)
        arguments.sequence_number(max_chunks, "max_chunks", least=1)
        arguments.sequence_number(max_bytes, "max_bytes", least=1)
        subscribe = partial(watching_end, self._subscriptions, self._listener, stream_id)
        buffer = WriteBuffer(max_chunks, max_bytes)
        operations = StreamOperations(self._append, self.complete, self.fail, self.get_status)
        return AsyncStreamWriter(stream_id, buffer, operations, self._database, subscribe, on_end)

    def read_from(self, id: str, after_seq: int = 0, *, follow: bool = True) -> AsyncIterator[StreamChunk]:
        """Iterate over the chunks with a number above `after_seq`, each exactly once and in order.

        It holds no connection while it waits or while the caller is busy. It holds one page of chunks in memory: 50
        at first, then up to 2,000, but about a million characters. If the server goes away it keeps its position and
        tries again for `retry_for` seconds.

        Args:
            id: The stream.
            after_seq: The number of the last chunk that the caller has, 0 by default.
            follow: If true, the default, wait for new chunks until the stream ends; `get_status` then returns how. If
                false, end with the last stored chunk.

        Raises:
            StreamNotFoundError: There is no such stream, or it was deleted meanwhile.
            InvalidDataError: `after_seq` is negative.
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
        """Iterate over the stored chunks at the pace at which they were written.

        The first chunk comes at once, and so does a chunk without a known time, written before migration 0002. The
        caller's own time counts as part of a pause.

        Args:
            id: The stream.
            after_seq: The number of the last chunk that the caller has, 0 by default.
            speed: 2 is twice as fast; infinity leaves out the pauses; 1 by default.

        Raises:
            StreamNotFoundError: There is no such stream.
            ValueError: `speed` is not above zero.
            SchemaError: Migration 0002 is missing.
        """
        stream_id = arguments.identifier(id)
        cursor = arguments.sequence_number(after_seq, "after_seq", least=0)
        if not speed > 0:
            raise ValueError(f"speed must be above zero, not {speed!r}")
        return self._pages.replay(stream_id, cursor, speed)

    async def get_status(self, id: str) -> StreamStatus | None:
        """Return the state, the error text and the number of chunks of a stream, or None if there is none."""
        rows = await self._database.query(self._sql.status, [arguments.identifier(id)])
        return StreamStatus._make(rows[0]) if rows else None

    async def wait(self, id: str, timeout: float | timedelta | None = None) -> StreamStatus:
        """Wait until a stream has ended, and return its status.

        If the server goes away it tries again as `read_from` does.

        Args:
            id: The stream.
            timeout: Seconds to wait; None, the default, waits without limit. A statement that has been sent is waited
                for beyond it, as long as the driver does.

        Raises:
            TimeoutError: The stream is still active after `timeout` seconds.
            StreamNotFoundError: There is no such stream, or it was deleted meanwhile.
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
        """End a stream as stopped by a user.

        Returns:
            True if this call ended it, False if it had ended already.

        Raises:
            StreamNotFoundError: There is no such stream.
        """
        return await self._end(id, "stopped", None)

    async def complete(self, id: str) -> bool:
        """End a stream as done.

        Returns:
            True if this call ended it, False if it had ended already.

        Raises:
            StreamNotFoundError: There is no such stream.
        """
        return await self._end(id, "done", None)

    async def fail(self, id: str, error: str) -> bool:
        """End a stream with an error text, which its readers get.

        Returns:
            True if this call ended it, False if it had ended already.

        Raises:
            StreamNotFoundError: There is no such stream.
            InvalidDataError: The text cannot be stored.
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
        """Delete a stream and its chunks, active or not. Its readers and writers get `StreamNotFoundError`.

        Returns:
            True if there was one.
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
        """Iterate over the streams in the order of their ids, or with a time in the order of their creation.

        A stream that is created or deleted meanwhile may appear or not.

        Args:
            state: Only streams in this state; None, the default, for all.
            created_after: Only streams created at this time or later, with a time zone.
            created_before: Only streams created before this time, with a time zone.

        Raises:
            ValueError: The state is unknown, or a time has no time zone.
            SchemaError: A time is given and migration 0002 is missing.
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
        """Delete the ended streams whose ttl is over, with their chunks. Safe to run in many processes at once.

        Active streams remain: see `fail_abandoned`.

        Args:
            batch_size: Streams that one statement deletes at most, 1,000 by default.

        Returns:
            The numbers of deleted streams and chunks.
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
        """End, in state error, the active streams that have been silent for `older_than` seconds, and return their ids.

        It is for streams whose producer died. Without migration 0002 the silence is derived from the expiry: then
        every writer must have this store's ttl, and a stream is ended up to a quarter of the ttl later.

        Args:
            older_than: Seconds since the last chunk, or since the creation of a stream without chunks. Choose more than
                the longest pause of a living producer.
        """
        silence = arguments.seconds(older_than, "older_than", zero=True)
        text = f"abandoned: no sign of life for {silence:g} seconds"
        rows = await self._database.query(self._sql.fail_abandoned, [self._ttl, round(silence * 1000), text])
        stream_ids = [row[0] for row in rows]
        if stream_ids:
            await self._notifier.changed(stream_ids)
        return stream_ids

    async def close(self) -> None:
        """Close the store, and its pool if it owns that. Safe to repeat.

        The streams that are still produced here end in state error first; `DurableStream.shutdown` gives them time to
        end well. Callers that wait get `StoreClosedError`.
        """
        if self._database.inherited:
            return
        self._database.check_owner()
        if not self._database.closing.is_set():
            for hook in tuple(self._close_hooks):
                await hook(self)
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
