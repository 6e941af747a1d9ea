"""The stream store: durable, ordered and resumable streams of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any

from psycopg.sql import Identifier

from .. import _arguments as arguments
from .._subscriptions import Subscriptions, wake_all
from .._tables import CHUNKS_TABLE, STATUS_TABLE, parse_distinct
from .._telemetry import report_gauges
from .._write_buffer import WriteBuffer
from ..metrics import (
    APPEND_DURATION,
    HOUSEKEEPING_AGE,
    READERS_ACTIVE,
    STORES_LISTENING,
    STORES_POLLING,
    WRITERS_ACTIVE,
    Metrics,
)
from ..models import StreamStatus, SynchronousCommit
from .appending import AsyncAppender
from .archiving import AsyncArchive
from .columns import AsyncColumnCatalog
from .database import AsyncDatabase
from .deleting import AsyncDeleter
from .following import subscribe_to_end
from .leasing import AsyncLeases
from .listening import AsyncListener
from .notifying import AsyncNotifier
from .observed_store import AsyncObservedStore
from .psycopg_clients import AsyncClientLike
from .reading import AsyncPageReader
from .replica import AsyncReplica
from .sending import StreamOperations
from .stream_lifecycle import AsyncStreamLifecycle
from .stream_schema import AsyncStreamSchema
from .stream_writer import AsyncStreamWriter


class AsyncPostgresStreamStore(AsyncStreamLifecycle, AsyncObservedStore):
    """Stores streams of text chunks in two tables.

    Any process can write a stream, read it, and resume reading after any chunk. Threads, or the tasks of one event
    loop, may share a store.

    Simultaneous appends share statements, unless the client joins the callers' transactions. A client that runs
    statements in a transaction of the caller, such as on a connection in a context variable, should therefore set
    `joins_transactions`.

    The statements expect the isolation level READ COMMITTED. At a higher level, simultaneous writers get serialization
    errors, and a reader inside a transaction sees no new chunks.

    Args:
        client: A connection string, a psycopg pool or connection, or an object with the `PostgresClient` protocol. A
            connection string becomes a pool that the store owns. If the client is a connection inside a transaction,
            the store takes part in that transaction: its writes become durable when the transaction commits.
        chunks_table: The name of the chunks table, as "table", "schema.table" or `psycopg.sql.Identifier`;
            `aibind_stream_chunks` by default.
        status_table: The name of the status table; `aibind_stream_status` by default.
        poll_interval: Seconds, or a timedelta, between two polls for changes without a notification; 0.1 by default.
            A stream without such a change in the last 50 polls is polled at ten times this interval, until a reader
            joins.
        ttl: Seconds, or a timedelta, for which a stream is kept after its end, unless `create` gives another ttl; 300
            by default. A stream of another store with a longer ttl, which this store stops or fails, is kept until that
            ttl has passed since the last append, less at most a quarter of this one.
        lease: Seconds, or a timedelta, after which the stream of a dead producer ends; 15 by default. A living producer
            renews its lease three times as often. Needs migration 0004.
        retry_for: Seconds, or a timedelta, for which a reader or a writer retries while the server is unreachable,
            starts, is read-only or has no free connection, and for which a reader waits for a standby that lags behind;
            30 by default. After that, a reader raises the driver's error and a writer raises `StreamWriteError`.
        timeout: Seconds, or a timedelta, to wait for the answer to a statement, including the wait for a connection of
            the pool; no limit by default. After that, the connection is closed, the server is asked to cancel the
            statement, and `psycopg.OperationalError` is raised; the statement may have taken effect. It does not limit
            connecting: set `connect_timeout` in the connection string. Clients of other drivers do not accept it.
        synchronous_commit: PostgreSQL's setting of this name for the writes of this store; the server's by default.
            With "off", a crash of the server may lose the last acknowledged writes. In a transaction of the caller, it
            applies to the whole transaction.
        notify: Whether to notify readers in other processes of changes; True by default. If False, they find changes by
            polling. In a two-phase transaction, pass False: PostgreSQL cannot prepare one that has notified.
        replica: A client of a replica of the same tables, in any form of `client`; None by default. Finished streams,
            and the pages of active streams before the last one, are read from it. Before each page, the primary is
            asked for the status of the stream. The page is read from the primary if the replica lags behind, fails, or
            does not answer a psycopg client within 2 seconds. An unavailable replica is asked again after 1 to 60
            seconds. Needs migration 0002.
        metrics: Receives counters, times, gauges and spans: an adapter of `aibind_postgres.contrib.opentelemetry` or
            `aibind_postgres.contrib.prometheus`, or an object with the methods of `aibind_postgres.metrics.Metrics`.
            Its exceptions are logged, never raised. If the adapter has a current span, `create` adds the key
            `traceparent` to the metadata of the stream, if they are None or an object without it. Default: None.

    Raises:
        ValueError: By the constructor, for an invalid table name or setting.
        TypeError: By the constructor, for an argument of the wrong type.
        InvalidDataError: By every method, for an id that is empty, longer than 1,024 bytes, or not storable.
        SchemaError: By every method, if a table or a column is missing.
        StoreClosedError: By every method except `get_stats`, once the store is closed. `close` can be repeated.
        RuntimeError: By every method except `get_stats`, in a different event loop from the one of the first call.
        ForkedError: By every method except `close`, in a process that was forked after the first call, or after the
            store was made from an open pool or connection.

    Every method raises the driver's own error if the server cannot be reached. Iterators raise these errors during the
    iteration, and writers on entering the block.
    """

    def __init__(
        self,
        client: AsyncClientLike,
        *,
        chunks_table: str | Identifier = CHUNKS_TABLE,
        status_table: str | Identifier = STATUS_TABLE,
        poll_interval: float | timedelta = 0.1,
        ttl: float | timedelta = 300.0,
        lease: float | timedelta = 15.0,
        retry_for: float | timedelta = 30.0,
        timeout: float | timedelta | None = None,
        synchronous_commit: SynchronousCommit | None = None,
        notify: bool = True,
        replica: AsyncClientLike | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        chunks, status = parse_distinct(chunks_table, status_table)
        poll_seconds = arguments.seconds(poll_interval, "poll_interval")
        self._ttl = arguments.milliseconds(ttl, "ttl")
        self._lease = arguments.milliseconds(lease, "lease")
        self._tables = self._required_tables = (status, chunks)
        retry_seconds = arguments.seconds(retry_for, "retry_for", allow_zero=True)
        self._database = AsyncDatabase(client, retry_seconds, timeout, metrics)
        self._columns = AsyncColumnCatalog(self._database, (*self._tables, chunks.archive))
        self._schema = AsyncStreamSchema(self._columns, chunks, status, synchronous_commit, self._lease)
        wrapped_client = self._database.client
        self._subscriptions = Subscriptions(share=not wrapped_client.joins_transactions)
        self._notifier = AsyncNotifier(
            wrapped_client, self._subscriptions, status.channel, notify, self._database.metrics
        )
        self._leases = AsyncLeases(self._database, self._schema, self._lease, self._ttl)
        self._listener = AsyncListener(
            self._database, self._subscriptions, self._notifier, self._schema, self._leases, poll_seconds
        )
        self._archive = AsyncArchive(self._database, self._schema)
        limit = arguments.time_limit(timeout, "timeout")
        self._replica = None if replica is None else AsyncReplica(replica, self._database, self._schema, limit)
        self._pages = AsyncPageReader(self._database, self._schema, self._archive, self._replica)
        self._deleter = AsyncDeleter(self._database, self._schema)
        self._appender = AsyncAppender(self._database, self._schema, self._ttl, self._notifier)
        self._producers: set[object] = set()  # those that have not ended
        self._close_hooks: set[Callable[[AsyncPostgresStreamStore], Any]] = set()
        self._end_gauges = report_gauges(self._database.metrics, self, AsyncPostgresStreamStore._gauges)

    def __repr__(self) -> str:
        tables = " and ".join(table.quoted for table in self._tables)
        replica = "" if self._replica is None else f", replica {self._replica.client!r}"
        return f"<{type(self).__name__} in {tables}, {self._database.client!r}{replica}, {self._database.state}>"

    async def append(self, id: str, chunk: str, *, expected_seq: int | None = None) -> int:
        """Append one chunk. The chunk is durable when this returns.

        The text is stored unchanged. Output of a model is not safe here if the stream is read as events, as browsers
        and `events` do: a chunk that contains U+0001 is a named event. Use `DurableStream.start` or a writer's `text`,
        or append `aibind_postgres.models.chunk_text(text)`: all of these are always read as text.

        After any of the errors below, nothing was written.

        Args:
            id: The stream id.
            chunk: Text without NUL characters and lone surrogates.
            expected_seq: The sequence number that the chunk must get; the next one by default. If the same text is
                already stored under this number, nothing is written and the call succeeds. An append with an unknown
                outcome can therefore be repeated.

        Returns:
            The sequence number of the chunk.

        Raises:
            StreamNotFoundError: The stream does not exist.
            StreamNotActiveError: The stream has ended.
            SequenceConflictError: `expected_seq` is not the next sequence number, or another text is stored under it.
            InvalidDataError: The chunk cannot be stored, or `expected_seq` is not an int of at least 1.
            AibindError: The stream is full, another program has used the sequence number, or a policy or trigger of
                the table prevents the update.
        """
        return await self._append(id, [arguments.storable_text(chunk, "a chunk")], expected_seq)

    async def append_many(self, id: str, chunks: Iterable[str], *, expected_seq: int | None = None) -> int:
        """Append several chunks in one transaction, all of them or none.

        The texts are stored unchanged. `append` describes the risk for streams that are read as events.

        Args:
            id: The stream id.
            chunks: The texts. They get consecutive sequence numbers.
            expected_seq: The sequence number that the first chunk must get; the next one by default. If the same texts
                are already stored under these numbers, nothing is written and the call succeeds.

        Returns:
            The sequence number of the last chunk. If `chunks` is empty, the last one of the stream.

        Raises:
            AibindError: The classes are those of `append`, also if `chunks` is empty.
        """
        return await self._append(id, arguments.chunk_list(chunks), expected_seq)

    async def _append(self, id: str, texts: Sequence[str], expected_seq: int | None) -> int:
        stream_id = arguments.identifier(id)
        if expected_seq is not None:
            arguments.integer(expected_seq, "expected_seq", minimum=1)
        if (metrics := self._database.metrics) is None:
            return await self._appender.append((stream_id, texts, expected_seq))
        started = monotonic()
        last = await self._appender.append((stream_id, texts, expected_seq))
        metrics.record(APPEND_DURATION, monotonic() - started)
        return last

    def writer(
        self,
        id: str,
        *,
        max_chunks: int = 1000,
        max_bytes: int = 1_000_000,
        on_end: Callable[[Exception], Any] | None = None,
    ) -> AsyncStreamWriter:
        """Return a context manager that buffers chunks and writes each of them exactly once, after the stored chunks.

        Args:
            id: The id of an active stream.
            max_chunks: The maximum number of chunks in the buffer; 1,000 by default. `write` waits while the buffer
                is full.
            max_bytes: The maximum size of the buffer in bytes of UTF-8; 1,000,000 by default. A single chunk may be
                larger.
            on_end: Called in the background if, before the end of the block, the stream is ended or deleted by another
                caller, or chunks cannot be stored. The argument is the error that `write` raises from then on. For an
                asynchronous store, it may be a coroutine function. A writer with this callback has a background worker
                with every client; in Django the worker writes outside the caller's transaction. Default: no callback.

        Returns:
            The writer.

        Raises:
            InvalidDataError: `max_chunks` or `max_bytes` is not an int of at least 1.
            StreamNotFoundError: On entering the block: the stream does not exist.
            StreamNotActiveError: On entering the block: the stream has ended.
        """
        stream_id = arguments.identifier(id)
        arguments.integer(max_chunks, "max_chunks", minimum=1)
        arguments.integer(max_bytes, "max_bytes", minimum=1)
        subscribe = partial(subscribe_to_end, self._subscriptions, self._listener, stream_id)
        buffer = WriteBuffer(max_chunks, max_bytes)
        hold_lease = partial(self._leases.held, stream_id)
        operations = StreamOperations(self._append, self.complete, self.fail, self._take_lease, self.get_status)
        return AsyncStreamWriter(stream_id, buffer, operations, self._database, subscribe, hold_lease, on_end)

    async def _take_lease(self, stream_id: str, renewed: bool) -> StreamStatus | None:
        return self._found_status(stream_id, await self._leases.take(stream_id, renewed))

    def _own_stats(self) -> dict[str, int]:
        return {
            **self._appender.get_stats(),
            **self._subscriptions.get_stats(),
            **self._listener.get_stats(),
            "producers_running": len(self._producers),
        }

    def _gauges(self) -> Mapping[str, float]:
        """Return the gauges of this process. Empty in a forked process, and once the store is closed."""
        database = self._database
        if database.inherited or database.closing.is_set():
            return {}
        followed, listener = self._subscriptions.get_stats(), self._listener.get_stats()
        gauges: dict[str, float] = {
            READERS_ACTIVE: followed["readers_open"],
            WRITERS_ACTIVE: followed["writers_open"],
            STORES_LISTENING: listener["listening"],
            STORES_POLLING: listener["polling"],
        }
        if (at := database.last_housekeeping) is not None:
            gauges[HOUSEKEEPING_AGE] = monotonic() - at
        return gauges

    async def close(self) -> None:
        """Close the store, and its pool if it was made from a connection string. Safe to repeat.

        Streams that this process still produces end in state error; call `DurableStream.shutdown` before, to wait for
        them. Waiting callers raise `StoreClosedError`.
        """
        if self._database.inherited:
            return
        self._database.check_owner()
        try:
            if not self._database.closing.is_set():
                for hook in tuple(self._close_hooks):
                    await hook(self)
        finally:
            self._end_gauges()
            self._database.begin_closing()
            wake_all(self._subscriptions.closed())
            async with self._database.client, self._replica or nullcontext():
                try:
                    await self._listener.close()
                finally:
                    try:
                        await self._leases.close()
                    finally:
                        await self._notifier.close()

    async def __aenter__(self) -> AsyncPostgresStreamStore:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
