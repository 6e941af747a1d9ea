"""The stream writer: write chunks inside a block that ends the stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any

from .. import _arguments as arguments
from .._concurrency import async_shielded
from .._lifecycle import WriterState, require_active
from .._write_buffer import WriteBuffer
from ..errors import (
    AibindError,
    SequenceConflictError,
    StreamNotActiveError,
    StreamNotFoundError,
    StreamWriteError,
)
from ..models import StreamEvent, chunk_text
from .database import CLOSING_TIMEOUT, AsyncDatabase
from .sending import AsyncSender, StreamOperations

logger = logging.getLogger("aibind_postgres.writer")

MAX_ERROR_LENGTH = 1000  # the most characters of an exception's text that are stored


class AsyncStreamWriter:
    """Writes chunks to one stream. Returned by a store's `writer`, and used as a context manager.

    `write`, `text` and `event` put a chunk into a buffer. A background worker sends all buffered chunks in one
    statement. Chunks that are written during a statement are sent in the next one, so a busy server receives larger
    statements, not more of them.

    If the server is unreachable, the worker retries for the store's `retry_for` seconds. Each statement contains the
    expected sequence number of its first chunk. A statement with an unknown outcome can therefore be sent again, and no
    chunk is written twice.

    The end of the block waits until all chunks are durable, then ends the stream in state done. If the block raises,
    the writer also sends the buffered chunks, and ends the stream in state error with the first 1,000 characters of
    the exception's text.

    A stream must have one producer: if another one appends to it, `SequenceConflictError` is raised. It is also raised
    if a failover has lost chunks that were acknowledged. If another caller ends the stream, `is_active` becomes False
    and `write` raises `StreamNotActiveError` as soon as the writer is notified, without waiting for the next statement.
    After an error of the worker, `write` raises that error, and so does `flush` if not all chunks are durable.

    With a connection as the client, or in Django, there is no worker. Each chunk is sent at once, in the transaction of
    the caller if there is one. The writer then learns from its next statement that the stream has ended.
    """

    def __init__(
        self,
        stream_id: str,
        buffer: WriteBuffer,
        operations: StreamOperations,
        database: AsyncDatabase,
        subscribe: Callable[[Callable[[], None]], AbstractContextManager[object]],
        hold_lease: Callable[[Callable[[], None]], AbstractContextManager[object]],
        on_end: Callable[[Exception], Any] | None,
    ) -> None:
        """Initialise a writer.

        Args:
            stream_id: The stream id.
            buffer: An empty buffer.
            operations: The operations of the store.
            database: The database of the store.
            subscribe: Takes a callback. Returns a context manager inside which the callback is called, from any thread,
                when the stream may have ended.
            hold_lease: Takes a function that applies the settings of the writer's thread. Returns a context manager
                inside which the lease of the stream is renewed.
            on_end: The callback of `writer`, or None.
        """
        self._stream_id = stream_id
        self._buffer = buffer
        self._operations = operations
        self._database = database
        self._subscribe = subscribe
        self._hold_lease = hold_lease
        self._lease = ExitStack()
        self._subscription = ExitStack()
        self._has_worker = on_end is not None or not database.client.joins_transactions
        self._sender = AsyncSender(stream_id, buffer, operations, database, self._has_worker, self._lease.close, on_end)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} of stream {self._stream_id!r}, {self._sender.state.value}, "
            f"{self._buffer.durable} chunks durable, {len(self._buffer)} buffered>"
        )

    async def write(self, chunk: str) -> None:
        """Put a chunk into the buffer. If the buffer is full, wait until it has capacity.

        The text is stored unchanged. Output of a model is not safe here if the stream is read as events, as browsers
        and the store's `events` do: a chunk that contains U+0001 is a named event. Use `text` instead.

        If the call is cancelled while it waits, the chunk is not accepted. Without a worker, it may have been stored.

        Args:
            chunk: Text without NUL characters and lone surrogates.

        Raises:
            InvalidDataError: The chunk is not text, or cannot be stored.
            StreamNotActiveError: The stream has ended.
            StreamNotFoundError: The stream was deleted.
            SequenceConflictError: Another producer writes to the stream, or a failover has lost acknowledged chunks.
            StreamWriteError: Earlier chunks could not be stored.
            RuntimeError: The writer's block has not been entered, or has been left.
        """
        await self._sender.put(arguments.storable_text(chunk, "a chunk"))

    async def text(self, data: str) -> None:
        """Write a text, such as output of a model. It is always read as text, also if it contains U+0001.

        The chunk is encoded as a `DurableStream` encodes it. Read the stream with the store's `events`.

        Args:
            data: Text without NUL characters and lone surrogates.

        Raises:
            AibindError: The classes are those of `write`.
            RuntimeError: The writer's block has not been entered, or has been left.
        """
        await self._sender.put(chunk_text(arguments.storable_text(data, "a text")))

    async def event(self, name: str, data: str) -> None:
        """Write a named event, such as `usage` or `tool_call`. Write the texts of such a stream with `text`.

        Args:
            name: The name of the event, as in a `StreamEvent`. It must not be empty, contain a line break or U+0001, or
                be one of `stream-id`, `error`, `stopped`, `done` and `message`.
            data: The data of the event, often JSON.

        Raises:
            InvalidDataError: The name is not allowed, or an argument is not text or cannot be stored.
            AibindError: The other classes are those of `write`.
            RuntimeError: The writer's block has not been entered, or has been left.
        """
        await self._sender.put(arguments.storable_text(chunk_text(StreamEvent(name, data)), "an event"))

    async def flush(self) -> int:
        """Wait until all written chunks are durable.

        Returns:
            The sequence number of the last chunk of the stream; 0 before the block.

        Raises:
            AibindError: The chunks could not be stored. The classes are those of `write`.
            RuntimeError: The end of the writer's block was interrupted.
        """
        return await self._sender.flush()

    @property
    def is_active(self) -> bool:
        """Whether the writer can store chunks: True from entering the block until an error or the end."""
        return self._sender.state in (WriterState.OPEN, WriterState.CLOSING)

    def _assume_active(self) -> None:
        """Subscribe to a stream that was just created, so that entering the block needs no status query."""
        self._database.check_owner()
        self._follow_end()
        self._sender.state = WriterState.READY

    def _follow_end(self) -> None:
        if self._has_worker:  # without one, only the next statement finds that the stream has ended
            self._subscription.enter_context(self._subscribe(self._sender.wake))

    async def __aenter__(self) -> AsyncStreamWriter:
        self._database.check_owner()  # before any mutex, and before the listener starts
        is_known_active = self._sender.open()
        try:
            if not is_known_active:
                self._follow_end()
                # Without a worker, the lease is not renewed: a connection of the caller is not used in between.
                take_lease = partial(self._operations.take_lease, self._stream_id, self._has_worker)
                status = require_active(self._stream_id, await self._database.retry(take_lease))
                self._buffer.durable = status.total_chunks
            if self._has_worker:
                self._lease.enter_context(self._hold_lease(self._database.client.capture_settings()))
            self._sender.start()
        except BaseException:
            self._abort()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.check_owner()
        self._sender.refuse_chunks()
        errors: list[BaseException] = [] if error is None else [error]
        await async_shielded(partial(self._finish, errors), self._abort)
        if error is None and errors:
            raise errors.pop()

    async def _finish(self, errors: list[BaseException]) -> None:
        """Send the buffered chunks and end the stream. Append the first error to `errors`, and log later errors."""
        for step in (self._sender.flush, partial(self._end_stream, errors)):
            try:
                await step()
            except Exception as error:
                if not errors:
                    errors.append(error)
                elif not isinstance(error, StreamNotActiveError):
                    logger.warning(
                        "stream %r: %s while its writer was closed after an error; %d chunks are durable, %d are not",
                        self._stream_id,
                        type(error).__name__,
                        self._buffer.durable,
                        len(self._buffer),
                    )
        await self._sender.join(CLOSING_TIMEOUT)

    async def _end_stream(self, errors: Sequence[BaseException]) -> None:
        """End the stream in state done, or in state error if there were errors.

        Do nothing if the stream has ended or another producer writes to it.
        """
        state = "error" if errors else "done"
        earlier = self._sender.close(StreamNotActiveError(self._stream_id, state))
        if not errors:
            try:
                await self._database.retry(partial(self._operations.complete, self._stream_id))
            except AibindError:
                raise
            except Exception as error:
                raise StreamWriteError(self._stream_id, self._buffer.durable, 0) from error
        elif not isinstance(earlier, (SequenceConflictError, StreamNotActiveError, StreamNotFoundError)):
            fail = partial(self._operations.fail, self._stream_id, _storable_text(errors[0]))
            # No retries after `StreamWriteError`: the worker has already retried.
            await (fail() if isinstance(earlier, StreamWriteError) else self._database.retry(fail))

    def _abort(self) -> None:
        """Close the writer if it is not closed yet, and unsubscribe."""
        self._sender.close(RuntimeError(f"the block of the writer of stream {self._stream_id!r} was interrupted"))
        self._lease.close()
        self._subscription.close()


def _storable_text(error: BaseException) -> str:
    """Return the part of an exception's text that can be stored. If the text is empty, return the name of its class."""
    text = str(error)[:MAX_ERROR_LENGTH].replace("\0", "").encode(errors="replace").decode()
    return text or type(error).__name__
