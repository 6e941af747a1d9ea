"""The stream writer: it buffers chunks and sends them in the background, each exactly once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from .. import _arguments as arguments
from .._concurrency import AsyncEvent, AsyncLock, AsyncWorker, Mutex, async_call_or_await, async_shielded, async_spawn
from ..errors import (
    AibindError,
    SequenceConflictError,
    StreamNotActiveError,
    StreamNotFoundError,
    StreamWriteError,
    copy_error,
)
from .database import CLOSING_TIMEOUT

if TYPE_CHECKING:
    from typing_extensions import Self

    from .._write_buffer import WriteBuffer
    from ..models import StreamStatus
    from .database import AsyncDatabase

logger = logging.getLogger("aibind_postgres")

Parameters = ParamSpec("Parameters")
ResultOut = TypeVar("ResultOut", covariant=True)

MAX_ERROR_LENGTH = 1000  # characters of an exception's text that are stored

# How often blocked callers check that the worker is alive, in seconds. A worker that is cancelled before it has begun,
# as at the end of an event loop, wakes nobody.
WORKER_CHECK_INTERVAL = 1.0


class AsyncOperation(Protocol[Parameters, ResultOut]):
    """An operation of a store."""

    async def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> ResultOut: ...


@dataclass(frozen=True)
class StreamOperations:
    """The operations of a store that a writer needs. `append_many` expects validated texts and a sequence number."""

    append_many: AsyncOperation[[str, Sequence[str], int], int]
    complete: AsyncOperation[[str], bool]
    fail: AsyncOperation[[str, str], bool]
    get_status: AsyncOperation[[str], StreamStatus | None]


class WriterState(Enum):
    """The states of a stream writer, in this order. READY and CLOSING may be skipped."""

    NEW = "not entered"
    READY = "not entered, of a stream that is known to be active"
    OPEN = "open"  # the block has been entered: chunks are accepted
    CLOSING = "closing"  # the block has been left: buffered chunks are being sent
    CLOSED = "closed"  # nothing more can be stored


class AsyncStreamWriter:
    """Writes chunks to one stream. Returned by a store's `writer`, and used as a context manager.

    `write` puts a chunk into a buffer. A background worker sends the buffered chunks as one statement. Chunks that are
    written meanwhile form the next statement, so a busy server gets larger statements, not more of them. If the server
    cannot be reached, the worker retries for the store's `retry_for` seconds. Each statement contains the number that
    its first chunk must get, so a statement with an unknown outcome is sent again without writing a chunk twice.

    Leaving the block waits until all chunks are durable and completes the stream. If the block raises, the writer also
    sends its chunks, and ends the stream in state error with the first 1,000 characters of the exception's text.

    A stream has one producer: if another one appends to it, `SequenceConflictError` is raised. If the stream is ended
    elsewhere, `is_active` is False and `write` raises `StreamNotActiveError`: as soon as the writer is notified, not
    only with the next statement. An error of the worker is raised by every later call.

    On the caller's own connection, or in Django, there is no worker: each chunk is sent at once, in the caller's
    transaction if there is one.
    """

    def __init__(
        self,
        stream_id: str,
        buffer: WriteBuffer,
        operations: StreamOperations,
        database: AsyncDatabase,
        subscribe: Callable[[Callable[[], None]], AbstractContextManager[object]],
        on_end: Callable[[Exception], Any] | None,
    ) -> None:
        """Initialise a writer.

        `subscribe` gets a callback and returns a context manager inside which the callback is called, from any thread,
        when the stream may have ended.
        """
        self._stream_id = stream_id
        self._operations = operations
        self._database = database
        self._subscribe = subscribe
        self._subscription = ExitStack()
        self._on_end = on_end
        in_background = on_end is not None or not database.client.joins_transactions
        self._turns = None if in_background else AsyncLock()  # without a worker, callers send in turn
        self._worker: AsyncWorker | None = None
        self._due = AsyncEvent()  # the worker has work
        self._progress = AsyncEvent()  # chunks became durable, or the writer is closed; replaced each time
        self._mutex = Mutex()  # guards all that follows, the worker and the events
        self._buffer = buffer
        self._state = WriterState.NEW
        self._error: Exception | None = None  # raised by calls in state CLOSED
        self._may_have_ended = False
        self._end_text: str | None = None  # error text to end the stream with

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} of stream {self._stream_id!r}, {self._state.value}, "
            f"{self._buffer.durable} chunks durable, {len(self._buffer)} buffered>"
        )

    async def write(self, chunk: str) -> None:
        """Put a chunk into the buffer. If the buffer is full, wait until it has room.

        If the call is cancelled while it waits, the chunk was not accepted. Without a worker, it may have been stored.

        Args:
            chunk: The text.

        Raises:
            InvalidDataError: The chunk is not text, or cannot be stored.
            StreamNotActiveError: The stream has ended.
            StreamNotFoundError: The stream was deleted.
            SequenceConflictError: Another producer writes to the stream.
            StreamWriteError: Earlier chunks could not be stored.
            RuntimeError: The call is not inside the writer's block.
        """
        await self._write(arguments.storable_text(chunk, "a chunk"))

    async def _write(self, text: str) -> None:
        """Put a validated text into the buffer."""
        while True:
            self._database.check_owner()
            with self._mutex:
                if self._state is not WriterState.OPEN:
                    raise self._refusal()
                if self._buffer.add(text):
                    self._ensure_worker()
                    self._due.set()
                    break
                progress = self._progress
            await self._wait_for(progress)
        if self._turns is not None:
            await self._send_in_turn(self._turns)

    async def flush(self) -> int:
        """Wait until all written chunks are durable.

        Returns:
            The number of the last chunk.

        Raises:
            AibindError: The chunks could not be stored. The classes are those of `write`.
        """
        self._database.check_owner()
        with self._mutex:
            last = self._buffer.last
        while True:
            with self._mutex:
                if self._buffer.durable >= last:
                    return last
                if self._state is WriterState.CLOSED:
                    raise self._refusal()
                progress = self._progress
            await self._wait_for(progress)

    @property
    def is_active(self) -> bool:
        """False before the block is entered, and once it is known that nothing more can be written."""
        return self._state in (WriterState.OPEN, WriterState.CLOSING)

    def _assume_active(self) -> None:
        """Subscribe now to a stream that was just created, so that entering the block sends no status query."""
        self._subscription.enter_context(self._subscribe(self._wake))
        self._state = WriterState.READY

    async def __aenter__(self) -> Self:
        with self._mutex:
            state = self._state
            if state not in (WriterState.NEW, WriterState.READY):
                raise RuntimeError("a stream writer can be entered only once: create another one")
            self._state = WriterState.OPEN
        try:
            if state is WriterState.NEW:
                self._subscription.enter_context(self._subscribe(self._wake))
                self._buffer.durable = (await self._database.retry(self._active_status)).total_chunks
            with self._mutex:
                self._ensure_worker()
        except BaseException:
            self._release()
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
        await async_shielded(partial(self._conclude, errors), self._release)
        if error is None and errors:
            raise errors.pop()

    async def _conclude(self, errors: list[BaseException]) -> None:
        """Send the buffered chunks and end the stream. Put the error to raise into `errors`; log later errors."""
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
        """End the stream as done, or in state error if there were errors.

        A stream that has ended, or that another producer writes to, is left alone.
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
            fail = partial(self._operations.fail, self._stream_id, _storable(errors[0]))
            # After `StreamWriteError` the server has been retried long enough.
            await (fail() if isinstance(earlier, StreamWriteError) else self._database.retry(fail))

    def _release(self) -> None:
        with self._mutex:
            self._close(RuntimeError("the block of this stream writer was interrupted"))
        self._subscription.close()

    def _close(self, error: Exception) -> bool:
        """Enter state CLOSED, in which calls raise `error`. The first error stays. Return whether the block was open.

        Every ending goes through here. Called with the mutex held.
        """
        was_open = self._state is WriterState.OPEN
        if self._state is not WriterState.CLOSED:
            self._state, self._error = WriterState.CLOSED, error
        self._due.set()
        self._wake_callers()
        return was_open

    def _request_end(self, text: str) -> None:
        """Request that the worker ends the stream in state error, after the next batch. Return at once.

        A request before the block is entered takes effect then. A request after the block is left has no effect.
        """
        with self._mutex:
            self._end_text = text
            self._due.set()

    def _wake(self) -> None:
        """Let the worker check whether the stream has ended."""
        with self._mutex:
            self._may_have_ended = True
            self._due.set()

    def _refusal(self) -> Exception:
        """Return the error to raise in a call that the state does not allow."""
        if self._error is not None:
            error = copy_error(self._error)
            error.__cause__ = self._error.__cause__ or self._error
            return error
        if self._state is WriterState.CLOSING:
            return RuntimeError("the block of this stream writer has been left")
        return RuntimeError("a stream writer must be used as a context manager")

    def _ensure_worker(self) -> None:
        """Start a worker if none runs. The last one may have been cancelled, perhaps before it had begun."""
        if self._worker is not None and self._worker.is_alive():
            return
        if self._turns is None and self._state is not WriterState.CLOSED:
            inherit = self._on_end is not None  # the callback belongs to the caller, and so does its context
            self._worker = async_spawn(self._work, "aibind_postgres-writer", inherit=inherit)
            self._due.set()

    async def _work(self) -> None:
        try:
            while self._state is not WriterState.CLOSED:
                await self._due.wait()
                await self._send_due()
        finally:
            with self._mutex:
                self._worker = None
                self._wake_callers()
            await self._database.client.release_thread()

    async def _wait_for(self, progress: AsyncEvent) -> None:
        """Wait for progress, with a worker or by sending in this call."""
        if self._turns is not None:
            await self._send_in_turn(self._turns)
            return
        is_set = False
        while not is_set:
            with self._mutex:
                self._ensure_worker()
            is_set = await progress.wait(WORKER_CHECK_INTERVAL)

    async def _send_in_turn(self, turns: AsyncLock) -> None:
        """Send all that is buffered, in this call."""
        async with turns:
            while self._buffer and self._state is not WriterState.CLOSED:
                await self._send_due()
        with self._mutex:
            if self._state is WriterState.CLOSED:
                raise self._refusal()

    async def _send_due(self) -> None:
        """Send a batch, or else check that the stream is active if it may have ended; end the stream on request."""
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
            if was_open and self._on_end is not None:
                await async_call_or_await(self._on_end, error)

    async def _check_active(self) -> None:
        try:
            await self._active_status()
        except AibindError:
            raise
        except Exception as error:  # the next statement, or the next call of `_wake`, meets it again
            logger.debug("a stream writer could not query its stream: %s", type(error).__name__)

    async def _active_status(self) -> StreamStatus:
        """Return the stream's status. Raise if the stream has ended or does not exist."""
        status = await self._operations.get_status(self._stream_id)
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


def _storable(error: BaseException) -> str:
    """Return the storable part of an exception's text, or the name of its class."""
    text = str(error)[:MAX_ERROR_LENGTH].replace("\0", "").encode(errors="replace").decode()
    return text or type(error).__name__
