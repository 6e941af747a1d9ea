"""The stream writer: buffer chunks and send them in the background, each exactly once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

from .. import _arguments as arguments
from .._concurrency import AsyncEvent, AsyncLock, AsyncWorker, Mutex, async_call_or_await, async_shielded, async_spawn
from .._lifecycle import WriterState
from .._write_buffer import WriteBuffer
from ..errors import (
    AibindError,
    SequenceConflictError,
    StreamNotActiveError,
    StreamNotFoundError,
    StreamWriteError,
    copy_error,
)
from ..models import StreamEvent, StreamStatus, chunk_text
from .database import CLOSING_TIMEOUT, AsyncDatabase

logger = logging.getLogger("aibind_postgres")

Parameters = ParamSpec("Parameters")
ResultOut = TypeVar("ResultOut", covariant=True)

MAX_ERROR_LENGTH = 1000  # the most characters of an exception's text that are stored

# How often blocked callers check that the worker is alive, in seconds. A worker that is cancelled before its first
# step, as at the end of an event loop, cannot wake them.
WORKER_CHECK_INTERVAL = 1.0


class AsyncOperation(Protocol[Parameters, ResultOut]):
    """The type of a method of a store."""

    async def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> ResultOut: ...


class StreamOperations(NamedTuple):
    """The operations of a store that a writer needs. `append_many` expects validated texts and a sequence number."""

    append_many: AsyncOperation[[str, Sequence[str], int], int]
    complete: AsyncOperation[[str], bool]
    fail: AsyncOperation[[str, str], bool]
    take_lease: AsyncOperation[[str, bool], StreamStatus | None]
    get_status: AsyncOperation[[str], StreamStatus | None]


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
        self._operations = operations
        self._database = database
        self._subscribe = subscribe
        self._hold_lease = hold_lease
        self._lease = ExitStack()
        self._subscription = ExitStack()
        self._on_end = on_end
        in_background = on_end is not None or not database.client.joins_transactions
        self._send_lock = None if in_background else AsyncLock()  # without a worker, one caller sends at a time
        self._worker: AsyncWorker | None = None
        self._due = AsyncEvent()  # set if the worker has work
        self._progress = AsyncEvent()  # set once chunks are durable or the writer is closed, then replaced
        self._mutex = Mutex()  # guards the worker, the events, and the attributes below
        self._buffer = buffer
        self._state = WriterState.NEW
        self._error: Exception | None = None  # raised by calls in state CLOSED
        self._may_have_ended = False
        self._end_text: str | None = None  # error text to end the stream with
        # The value of `monotonic()` at which to end the stream, and the error text for it. The time may change.
        self._time_limit: Callable[[], tuple[float, str]] | None = None

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} of stream {self._stream_id!r}, {self._state.value}, "
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
        await self._write(arguments.storable_text(chunk, "a chunk"))

    async def text(self, data: str) -> None:
        """Write a text, such as output of a model. It is always read as text, also if it contains U+0001.

        The chunk is encoded as a `DurableStream` encodes it. Read the stream with the store's `events`.

        Args:
            data: Text without NUL characters and lone surrogates.

        Raises:
            AibindError: The classes are those of `write`.
            RuntimeError: The writer's block has not been entered, or has been left.
        """
        await self._write(chunk_text(arguments.storable_text(data, "a text")))

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
        await self._write(arguments.storable_text(chunk_text(StreamEvent(name, data)), "an event"))

    async def _write(self, text: str) -> None:
        """Put a validated text into the buffer."""
        while True:
            self._database.check_owner()
            with self._mutex:
                if self._state is not WriterState.OPEN:
                    raise self._state_error()
                self._ensure_worker()  # first, since it raises if no thread can start
                if self._buffer.add(text):
                    self._due.set()
                    break
                progress = self._progress
            await self._wait_for(progress)
        if self._send_lock is not None:
            await self._send_all(self._send_lock)

    async def flush(self) -> int:
        """Wait until all written chunks are durable.

        Returns:
            The sequence number of the last chunk of the stream; 0 before the block.

        Raises:
            AibindError: The chunks could not be stored. The classes are those of `write`.
            RuntimeError: The end of the writer's block was interrupted.
        """
        self._database.check_owner()
        with self._mutex:
            last = self._buffer.last
        while True:
            with self._mutex:
                if self._buffer.durable >= last:
                    return last
                if self._state is WriterState.CLOSED:
                    raise self._state_error()
                progress = self._progress
            await self._wait_for(progress)

    @property
    def is_active(self) -> bool:
        """Whether the writer can store chunks: True from entering the block until an error or the end."""
        return self._state in (WriterState.OPEN, WriterState.CLOSING)

    def _assume_active(self) -> None:
        """Subscribe to a stream that was just created, so that entering the block needs no status query."""
        self._database.check_owner()
        self._follow_end()
        self._state = WriterState.READY

    def _follow_end(self) -> None:
        if self._send_lock is None:  # without a worker, only the next statement finds that the stream has ended
            self._subscription.enter_context(self._subscribe(self._wake))

    async def __aenter__(self) -> AsyncStreamWriter:
        self._database.check_owner()  # before any mutex, and before the listener starts
        with self._mutex:
            state = self._state
            if state not in (WriterState.NEW, WriterState.READY):
                raise RuntimeError(
                    f"the writer of stream {self._stream_id!r} can be entered only once: create another one"
                )
            self._state = WriterState.OPEN
        try:
            renewed = self._send_lock is None  # without a worker, a connection of the caller is not used in between
            if state is WriterState.NEW:
                self._follow_end()
                take_lease = partial(self._operations.take_lease, self._stream_id, renewed)
                status = self._check_status(await self._database.retry(take_lease))
                self._buffer.durable = status.total_chunks
            if renewed:
                self._lease.enter_context(self._hold_lease(self._database.client.capture_settings()))
            with self._mutex:
                self._ensure_worker()
        except BaseException:
            self._abort()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.check_owner()
        with self._mutex:
            if self._state is WriterState.OPEN:
                self._state = WriterState.CLOSING
        errors: list[BaseException] = [] if error is None else [error]
        await async_shielded(partial(self._finish, errors), self._abort)
        if error is None and errors:
            raise errors.pop()

    async def _finish(self, errors: list[BaseException]) -> None:
        """Send the buffered chunks and end the stream. Append the first error to `errors`, and log later errors."""
        for step in (self.flush, partial(self._end_stream, errors)):
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
        with self._mutex:
            worker = self._worker
        if worker is not None:
            await worker.join(CLOSING_TIMEOUT)

    async def _end_stream(self, errors: Sequence[BaseException]) -> None:
        """End the stream in state done, or in state error if there were errors.

        Do nothing if the stream has ended or another producer writes to it.
        """
        state = "error" if errors else "done"
        with self._mutex:
            earlier = self._error
            self._close(StreamNotActiveError(self._stream_id, state))
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
        with self._mutex:
            self._close(RuntimeError(f"the block of the writer of stream {self._stream_id!r} was interrupted"))
        self._lease.close()
        self._subscription.close()

    def _close(self, error: Exception) -> bool:
        """Enter state CLOSED, in which calls raise `error`. Only the first call takes effect.

        Call this with the mutex held.

        Returns:
            True if the state was OPEN.
        """
        was_open = self._state is WriterState.OPEN
        if self._state is not WriterState.CLOSED:
            self._state, self._error = WriterState.CLOSED, error
        self._due.set()
        self._wake_callers()
        return was_open

    def _request_end(self, text: str) -> None:
        """Request that the worker ends the stream in state error after the next batch. Return at once.

        A request before the block takes effect on entering it. A request after the block has no effect.
        """
        with self._mutex:
            self._end_text = text
            self._due.set()

    def _wake(self) -> None:
        """Let the worker check whether the stream has ended."""
        with self._mutex:
            self._may_have_ended = True
            self._due.set()

    def _state_error(self) -> Exception:
        """Return the error for a call that the current state does not allow."""
        if self._error is not None:
            error = copy_error(self._error)
            error.__cause__ = self._error.__cause__ or self._error
            return error
        if self._state is WriterState.CLOSING:
            return RuntimeError(
                f"the block of the writer of stream {self._stream_id!r} has been left: create another writer"
            )
        return RuntimeError(
            f"the writer of stream {self._stream_id!r} has not been entered: use it as a context manager"
        )

    def _ensure_worker(self) -> None:
        """Start a worker if none runs. The previous one may have been cancelled, even before its first step."""
        if self._worker is not None and self._worker.is_alive():
            return
        if self._send_lock is None and self._state is not WriterState.CLOSED:
            # `on_end` and the client get the context variables of the caller, on which its session may depend.
            work = partial(self._work, self._database.client.capture_settings())
            self._worker = async_spawn(work, "aibind_postgres-writer", inherit=True)
            self._due.set()

    async def _work(self, apply_settings: Callable[[], None]) -> None:
        try:
            apply_settings()
            while self._state is not WriterState.CLOSED:
                await self._due.wait(self._seconds_left())
                await self._send_due()
        finally:
            with self._mutex:
                self._worker = None
                self._wake_callers()
            await self._database.client.release_thread()

    def _seconds_left(self) -> float | None:
        """Return the seconds until the next check of the time limit; None without one.

        Request the end of the stream if the time has come.
        """
        if self._time_limit is None:
            return None
        at, text = self._time_limit()
        left = at - monotonic()
        if left <= 0:
            self._request_end(text)
        return min(max(0.0, left), WORKER_CHECK_INTERVAL)  # the time may come nearer

    async def _wait_for(self, progress: AsyncEvent) -> None:
        """Wait for progress of the worker. Without a worker, send the buffered chunks in this call."""
        if self._send_lock is not None:
            await self._send_all(self._send_lock)
            return
        is_set = False
        while not is_set:
            with self._mutex:
                self._ensure_worker()
            is_set = await progress.wait(WORKER_CHECK_INTERVAL)

    async def _send_all(self, lock: AsyncLock) -> None:
        """Send all buffered chunks in this call."""
        async with lock:
            while self._buffer and self._state is not WriterState.CLOSED:
                await self._send_due()
        with self._mutex:
            if self._state is WriterState.CLOSED:
                raise self._state_error()

    async def _send_due(self) -> None:
        """Send the next batch. If there is none and the stream may have ended, check its status.

        Then end the stream if requested.
        """
        with self._mutex:
            if self._state is WriterState.CLOSED:
                return
            self._due.clear()
            may_have_ended, self._may_have_ended = self._may_have_ended, False
            batch = self._buffer.next_batch()
        try:
            if batch:
                await self._send(batch)
            elif may_have_ended:
                await self._check_active()
            if self._end_text is not None and self._state is WriterState.OPEN:
                await self._operations.fail(self._stream_id, self._end_text)
                raise StreamNotActiveError(self._stream_id, "error")
        except Exception as error:
            with self._mutex:
                was_open = self._close(error)
            self._lease.close()  # nothing more is written, although the block may last
            if was_open and self._on_end is not None:
                await async_call_or_await(self._on_end, error)

    async def _check_active(self) -> None:
        try:
            await self._active_status()
        except AibindError:
            raise
        except Exception as error:  # the next statement or check raises it again
            logger.debug(
                "the writer of stream %r could not query its status: %s", self._stream_id, type(error).__name__
            )

    async def _active_status(self) -> StreamStatus:
        """Return the stream's status. Raise if the stream has ended or does not exist."""
        return self._check_status(await self._operations.get_status(self._stream_id))

    def _check_status(self, status: StreamStatus | None) -> StreamStatus:
        if status is None:
            raise StreamNotFoundError(self._stream_id)
        if status.state != "active":
            raise StreamNotActiveError(self._stream_id, status.state)
        return status

    async def _send(self, batch: Sequence[str]) -> None:
        durable = self._buffer.durable
        try:
            append = partial(self._operations.append_many, self._stream_id, batch, durable + 1)
            durable = await self._database.retry(append)
        except AibindError:
            raise
        except Exception as error:
            raise StreamWriteError(self._stream_id, durable, len(self._buffer)) from error
        with self._mutex:
            self._buffer.confirm(durable)
            if self._buffer or self._may_have_ended:
                self._due.set()
            self._wake_callers()

    def _wake_callers(self) -> None:
        progress, self._progress = self._progress, AsyncEvent()
        progress.set()


def _storable_text(error: BaseException) -> str:
    """Return the part of an exception's text that can be stored. If the text is empty, return the name of its class."""
    text = str(error)[:MAX_ERROR_LENGTH].replace("\0", "").encode(errors="replace").decode()
    return text or type(error).__name__
