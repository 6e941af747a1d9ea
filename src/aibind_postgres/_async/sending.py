"""Send the buffered chunks of a stream writer, each exactly once: in the background, or in the calls of the writer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar

from .._concurrency import AsyncEvent, AsyncLock, AsyncWorker, Mutex, async_call_or_await, async_spawn
from .._lifecycle import WriterState, require_active
from ..errors import AibindError, StreamNotActiveError, StreamWriteError, copy_error
from ..models import StreamStatus

if TYPE_CHECKING:
    from .._write_buffer import WriteBuffer
    from .database import AsyncDatabase

logger = logging.getLogger("aibind_postgres.writer")

Parameters = ParamSpec("Parameters")
ResultOut = TypeVar("ResultOut", covariant=True)

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


class AsyncSender:
    """Sends the buffered chunks of one stream writer.

    Each statement contains the expected sequence number of its first chunk. A statement with an unknown outcome can
    therefore be sent again, and no chunk is written twice.

    Args:
        stream_id: The stream id.
        buffer: The buffer of the writer.
        operations: The operations of the store.
        database: The database of the store.
        has_worker: Whether a background worker sends the chunks. If False, the calls of the writer send them.
        release_lease: Called after an error: no more chunks are sent.
        on_end: Called after an error in state OPEN, or None.
    """

    def __init__(
        self,
        stream_id: str,
        buffer: WriteBuffer,
        operations: StreamOperations,
        database: AsyncDatabase,
        has_worker: bool,
        release_lease: Callable[[], None],
        on_end: Callable[[Exception], Any] | None,
    ) -> None:
        self._stream_id = stream_id
        self._operations = operations
        self._database = database
        self._release_lease = release_lease
        self._on_end = on_end
        self._send_lock = None if has_worker else AsyncLock()  # without a worker, one caller sends at a time
        self._worker: AsyncWorker | None = None
        self._due = AsyncEvent()  # set if the worker has work
        self._progress = AsyncEvent()  # set once chunks are durable or the writer is closed, then replaced
        self._mutex = Mutex()  # guards the worker, the events, and the attributes below
        self._buffer = buffer
        self.state = WriterState.NEW
        self._error: Exception | None = None  # raised by calls in state CLOSED
        self._may_have_ended = False
        self._end_text: str | None = None  # error text to end the stream with
        # Returns the value of `monotonic()` at which to end the stream, and the error text. The time may change.
        self.time_limit: Callable[[], tuple[float, str]] | None = None

    def open(self) -> bool:
        """Accept chunks from now on. Return True if the state was READY.

        Raises:
            RuntimeError: This is not the first call, or the sender is closed.
        """
        with self._mutex:
            state = self.state
            if state not in (WriterState.NEW, WriterState.READY):
                raise RuntimeError(
                    f"the writer of stream {self._stream_id!r} can be entered only once: create another one"
                )
            self.state = WriterState.OPEN
        return state is WriterState.READY

    def start(self) -> None:
        """Start the worker, if the writer has one."""
        with self._mutex:
            self._ensure_worker()

    async def put(self, text: str) -> None:
        """Put a validated text into the buffer. If the buffer is full, wait until it has capacity."""
        while True:
            self._database.check_owner()
            with self._mutex:
                if self.state is not WriterState.OPEN:
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
        """Wait until all accepted chunks are durable. Return the sequence number of the last one."""
        self._database.check_owner()
        with self._mutex:
            last = self._buffer.last
        while True:
            with self._mutex:
                if self._buffer.durable >= last:
                    return last
                if self.state is WriterState.CLOSED:
                    raise self._state_error()
                progress = self._progress
            await self._wait_for(progress)

    def refuse_chunks(self) -> None:
        """Accept no more chunks. The accepted ones are still sent."""
        with self._mutex:
            if self.state is WriterState.OPEN:
                self.state = WriterState.CLOSING

    def close(self, error: Exception) -> Exception | None:
        """Enter state CLOSED, in which calls raise `error`. Only the first call takes effect.

        Returns:
            The error of the first call, if this is a later one.
        """
        with self._mutex:
            earlier = self._error
            self._close(error)
        return earlier

    async def join(self, timeout: float) -> None:
        """Wait for the end of the worker, for up to `timeout` seconds."""
        with self._mutex:
            worker = self._worker
        if worker is not None:
            await worker.join(timeout)

    def request_end(self, text: str) -> None:
        """Request that the worker ends the stream in state error after the next batch. Return at once.

        A request before the block takes effect on entering it. A request after the block has no effect.
        """
        with self._mutex:
            self._end_text = text
            self._due.set()

    def wake(self) -> None:
        """Let the worker check whether the stream has ended."""
        with self._mutex:
            self._may_have_ended = True
            self._due.set()

    def _close(self, error: Exception) -> None:
        """Enter state CLOSED. Call this with the mutex held."""
        if self.state is not WriterState.CLOSED:
            self.state, self._error = WriterState.CLOSED, error
        self._due.set()
        self._wake_callers()

    def _state_error(self) -> Exception:
        """Return the error for a call that the current state does not allow."""
        if self._error is not None:
            error = copy_error(self._error)
            error.__cause__ = self._error.__cause__ or self._error
            return error
        if self.state is WriterState.CLOSING:
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
        if self._send_lock is None and self.state is not WriterState.CLOSED:
            # The client's session may depend on the context variables of the caller. `on_end` gets them, too.
            work = partial(self._work, self._database.client.capture_settings())
            self._worker = async_spawn(work, "aibind_postgres-writer", inherit=True)
            self._due.set()

    async def _work(self, apply_settings: Callable[[], None]) -> None:
        try:
            apply_settings()
            while self.state is not WriterState.CLOSED:
                await self._due.wait(self._seconds_left())
                await self._send_due()
        finally:
            with self._mutex:
                self._worker = None
                self._wake_callers()
            await self._database.client.release_thread()

    def _seconds_left(self) -> float | None:
        """Return the seconds until the next check of the time limit, or None without a limit.

        If the limit is reached, request the end of the stream.
        """
        if self.time_limit is None:
            return None
        at, text = self.time_limit()
        left = at - monotonic()
        if left <= 0:
            self.request_end(text)
        return min(max(0.0, left), WORKER_CHECK_INTERVAL)  # the limit may become shorter

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
            while self._buffer and self.state is not WriterState.CLOSED:
                await self._send_due()
        with self._mutex:
            if self.state is WriterState.CLOSED:
                raise self._state_error()

    async def _send_due(self) -> None:
        """Send the next batch. If there is none and the stream may have ended, check its status.

        Then end the stream if requested.
        """
        with self._mutex:
            if self.state is WriterState.CLOSED:
                return
            self._due.clear()
            may_have_ended, self._may_have_ended = self._may_have_ended, False
            batch = self._buffer.next_batch()
        try:
            if batch:
                await self._send(batch)
            elif may_have_ended:
                await self._check_active()
            if self._end_text is not None and self.state is WriterState.OPEN:
                await self._operations.fail(self._stream_id, self._end_text)
                raise StreamNotActiveError(self._stream_id, "error")
        except Exception as error:
            with self._mutex:
                was_open = self.state is WriterState.OPEN
                self._close(error)
            self._release_lease()  # no more chunks are sent, even if the block goes on
            if was_open and self._on_end is not None:
                await async_call_or_await(self._on_end, error)

    async def _check_active(self) -> None:
        try:
            require_active(self._stream_id, await self._operations.get_status(self._stream_id))
        except AibindError:
            raise
        except Exception as error:  # the next statement or check raises it again
            logger.debug(
                "the writer of stream %r could not query its status: %s", self._stream_id, type(error).__name__
            )

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
