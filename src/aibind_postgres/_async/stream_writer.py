"""The stream writer: chunks from a buffer, sent in the background, each exactly once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

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

    from ..models import StreamStatus
    from .database import AsyncDatabase
    from .stream_store import AsyncPostgresStreamStore

logger = logging.getLogger("aibind_postgres")

LONGEST_ERROR = 1000  # characters of an exception's text that are stored

# Seconds after which those who wait see to it that somebody works for them. A worker that is cancelled before it has
# begun, as at the end of an event loop, cannot tell them.
LOOK_AFTER = 1.0


class AsyncStreamWriter:
    """Writes to one stream. Made by a store's `writer`, and used as a context manager.

    `write` only puts a chunk into a buffer. A worker in the background sends what has gathered as one statement, then
    what has gathered meanwhile: a busy server gets larger statements, and not more of them. If the server cannot be
    reached it tries again for the store's `retry_for` seconds. Each statement says which number its first chunk must
    get, so one whose outcome was lost is sent again and writes nothing twice.

    Leaving the block waits until all chunks are durable and completes the stream. An exception in the block does so,
    too, and ends the stream in state error with the exception's text, at most 1,000 characters of it.

    There is one producer: if another one appends to the stream, `SequenceConflictError` is raised. Once anybody has
    ended the stream, `write` raises `StreamNotActiveError`, and `is_active` is false: as soon as it is announced, not
    only with the next chunk that is sent. What the worker runs into is raised by every call after it.

    On a connection of the caller's, or in Django, there is no worker: each chunk is sent at once, in the caller's own
    transaction if there is one.
    """

    def __init__(
        self,
        store: AsyncPostgresStreamStore,
        database: AsyncDatabase,
        subscribe: Callable[[Callable[[], None]], AbstractContextManager[None]],
        stream_id: str,
        limits: tuple[int, int],
        on_end: Callable[[Exception], Any] | None,
    ) -> None:
        self._store = store
        self._database = database
        self._subscribe = subscribe
        self._stream_id = stream_id
        self._max_chunks, self._max_bytes = limits
        self._on_end = on_end
        self._in_background = on_end is not None or not database.client.joins_transactions
        self._place: AbstractContextManager[None] | None = None
        self._mutex = Mutex()
        self._sending = AsyncLock()  # without a worker, the callers take turns
        self._unsaved: list[str] = []  # what is not known to be durable, also while it is being sent
        self._unsaved_bytes = 0
        self._in_doubt = 0  # so many of them were in a statement whose outcome is not known
        self._seq = 0  # the number of the last chunk that is known to be durable
        self._alarmed = False
        self._last_word: str | None = None  # with which to break off
        self._left = False
        self._closing = False
        self._problem: BaseException | None = None
        self._due = AsyncEvent()  # the worker has something to do
        self._progress = AsyncEvent()  # something has become durable, or never will; a new one each time
        self._worker: AsyncWorker | None = None
        self._error: Exception | None = RuntimeError("a stream writer is to be used as a context manager")

    async def write(self, chunk: str) -> None:
        """Put a chunk into the buffer; if that is full, wait until there is room.

        If this is cancelled while it waits, the chunk was not taken; where there is no worker, it may have been stored.
        Raises `InvalidDataError` for what cannot be stored.
        """
        text = arguments.storable_text(chunk, "a chunk")
        size = len(text.encode())
        while True:
            self._database.check_owner()
            with self._mutex:
                self._check()
                if self._left:
                    raise RuntimeError("the block of this stream writer has been left")
                if not self._unsaved or (
                    len(self._unsaved) < self._max_chunks and self._unsaved_bytes + size <= self._max_bytes
                ):
                    self._keep_worker()
                    self._unsaved.append(text)
                    self._unsaved_bytes += size
                    self._due.set()
                    break
                progress = self._progress
            await self._advance(progress)
        if not self._in_background:
            await self._send_here()

    async def flush(self) -> int:
        """Wait until all that has been written is durable; return the number of the last chunk."""
        self._database.check_owner()
        with self._mutex:
            last = self._seq + len(self._unsaved)
        while True:
            with self._mutex:
                if self._seq >= last:
                    return last
                self._check()
                progress = self._progress
            await self._advance(progress)

    @property
    def is_active(self) -> bool:
        """False once it is known that nothing more can be written."""
        return self._error is None

    async def __aenter__(self) -> Self:
        if self._place is not None:
            raise RuntimeError("a stream writer serves one block")
        self._place = self._subscribe(self._be_alarmed)
        self._place.__enter__()
        try:
            self._seq = (await self._database.retry(self._active_status)).total_chunks
            with self._mutex:
                self._error = None
                self._keep_worker()
        except BaseException:
            self._place.__exit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.check_owner()
        with self._mutex:
            self._left = True
        self._problem = error
        await async_shielded(self._conclude, self._let_go)
        if self._problem is not None and self._problem is not error:
            raise self._problem

    async def _conclude(self) -> None:
        """Flush and end the stream, whatever becomes of the caller meanwhile."""
        try:
            await self.flush()
        except Exception as unsaved:
            self._prefer(unsaved)
        try:
            await self._end()
        except Exception as failed:
            self._prefer(failed)
        with self._mutex:
            self._closing = True
            self._due.set()
            worker = self._worker
        if worker is not None:
            await worker.join(CLOSING_TIMEOUT)

    def _let_go(self) -> None:
        with self._mutex:
            self._closing = True  # also if it was broken off
            self._due.set()
            self._error = self._error or RuntimeError("the block of this stream writer was broken off")
            self._tell()
        if self._place is not None:
            self._place.__exit__(None, None, None)

    def _prefer(self, later: Exception) -> None:
        """Keep the first of several problems to raise, and log the others."""
        if self._problem is None:
            self._problem = later
        elif not isinstance(later, StreamNotActiveError):
            logger.warning(
                "stream %r: when its producer failed, %s followed; %d chunks are durable, %d are not",
                self._stream_id,
                type(later).__name__,
                self._seq,
                len(self._unsaved),
            )

    async def _end(self) -> None:
        """End the stream, unless it has ended or belongs to another producer."""
        with self._mutex:
            error, problem = self._error, self._problem
            self._error = StreamNotActiveError(self._stream_id, "error" if problem else "done")
        if problem is None:
            try:
                await self._database.retry(partial(self._store.complete, self._stream_id))
            except AibindError:
                raise
            except Exception as failed:
                raise StreamWriteError(self._stream_id, self._seq, 0) from failed
        elif not isinstance(error, (SequenceConflictError, StreamNotActiveError, StreamNotFoundError)):
            attempt = partial(self._store.fail, self._stream_id, _storable(problem))
            # Not persistently once more, if the server could not be reached for so long already.
            await (attempt() if isinstance(error, StreamWriteError) else self._database.retry(attempt))

    def _check(self) -> None:
        if self._error is not None:
            raise copy_error(self._error) from self._error.__cause__ or self._error

    def _break_off(self, text: str) -> None:
        """Have the stream end in state error with this text, once what was written is sent. Returns at once.

        Without effect once the block has been left.
        """
        with self._mutex:
            self._last_word = text
            self._due.set()

    def _be_alarmed(self) -> None:
        with self._mutex:
            self._alarmed = True
            self._due.set()

    def _keep_worker(self) -> None:
        # The last one may have been cancelled, as when an event loop ends, perhaps before it had begun.
        alive = self._worker is not None and self._worker.is_alive()
        if self._in_background and not alive and not self._closing:
            inherit = self._on_end is not None  # what that does is the caller's
            self._worker = async_spawn(self._work, "aibind_postgres-writer", inherit=inherit)
            self._due.set()

    async def _work(self) -> None:
        try:
            while True:
                await self._due.wait()
                if not await self._send_what_is_due() or self._closing:
                    return
        finally:
            with self._mutex:
                self._worker = None
                self._tell()
            await self._database.client.release_thread()

    async def _advance(self, progress: AsyncEvent) -> None:
        """Wait until more is durable, and see to it that somebody works on that."""
        if self._in_background:
            over = False
            while not over:
                with self._mutex:
                    self._keep_worker()
                over = await progress.wait(LOOK_AFTER)
        else:
            await self._send_here()

    async def _send_here(self) -> None:
        async with self._sending:
            while await self._send_what_is_due() and self._unsaved:
                pass
        with self._mutex:
            self._check()

    async def _send_what_is_due(self) -> bool:
        """Send, or if there is nothing to send, look; return False if nothing more can be sent."""
        with self._mutex:
            self._due.clear()
            alarmed, self._alarmed = self._alarmed, False
            # What was sent before goes again as it was: if it is stored, that is how it is known again.
            texts = self._unsaved[: self._in_doubt or None]
            self._in_doubt = len(texts)
        try:
            if texts:
                await self._send(texts)
            elif alarmed:
                await self._look()
            if self._last_word is not None and not self._left:
                await self._store.fail(self._stream_id, self._last_word)
                raise StreamNotActiveError(self._stream_id, "error")
        except Exception as error:
            with self._mutex:
                self._error = error
                self._tell()
            if self._on_end is not None and not self._left:
                await async_call_or_await(self._on_end, error)
            return False
        return True

    async def _look(self) -> None:
        try:
            await self._active_status()
        except AibindError:
            raise
        except Exception as error:  # the next statement that sends, or the next alarm, tells more
            logger.debug("a stream writer could not look at its stream: %s", type(error).__name__)

    async def _active_status(self) -> StreamStatus:
        """Return where the stream stands; raise if it is not there or has ended."""
        status = await self._store.get_status(self._stream_id)
        if status is None:
            raise StreamNotFoundError(self._stream_id)
        if status.state != "active":
            raise StreamNotActiveError(self._stream_id, status.state)
        return status

    async def _send(self, texts: list[str]) -> None:
        attempt = partial(self._store.append_many, self._stream_id, texts, expected_seq=self._seq + 1)
        try:
            last = await self._database.retry(attempt)
        except AibindError:
            raise
        except Exception as error:
            raise StreamWriteError(self._stream_id, self._seq, len(self._unsaved)) from error
        with self._mutex:
            del self._unsaved[: len(texts)]
            self._unsaved_bytes -= sum(len(text.encode()) for text in texts)
            self._in_doubt = 0
            self._seq = last
            if self._unsaved or self._alarmed:
                self._due.set()
            self._tell()

    def _tell(self) -> None:
        progress, self._progress = self._progress, AsyncEvent()
        progress.set()


def _storable(error: BaseException) -> str:
    text = str(error)[:LONGEST_ERROR].replace("\0", "").encode(errors="replace").decode()
    return text or type(error).__name__
