"""The stream writer: chunks from a buffer, sent in the background, each exactly once."""

from __future__ import annotations

import logging
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from .. import _arguments as arguments
from .._concurrency import AsyncEvent, AsyncLock, AsyncWorker, Mutex, async_spawn
from ..errors import (
    AibindError,
    SequenceConflictError,
    StreamNotActiveError,
    StreamNotFoundError,
    StreamWriteError,
    copied,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..models import StreamStatus
    from .changes import AsyncChanges
    from .database import AsyncDatabase
    from .feeds import AsyncPlace
    from .stream_store import AsyncPostgresStreamStore

logger = logging.getLogger("aibind_postgres")

LONGEST_ERROR = 1000  # characters of an exception's text that are stored
CLOSING_TIMEOUT = 10.0  # seconds that closing waits for the worker


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
        changes: AsyncChanges,
        stream_id: str,
        max_chunks: int,
        max_bytes: int,
    ) -> None:
        self._store = store
        self._database = database
        self._changes = changes
        self._stream_id = stream_id
        self._max_chunks = max_chunks
        self._max_bytes = max_bytes
        self._in_background = not database.client.joins_transactions
        self._place: AsyncPlace | None = None
        self._mutex = Mutex()
        self._sending = AsyncLock()  # without a worker, the callers take turns
        self._unsaved: list[str] = []  # what is not known to be durable, also while it is being sent
        self._unsaved_bytes = 0
        self._seq = 0  # the number of the last chunk that is known to be durable
        self._alarmed = False
        self._closing = False
        self._due = AsyncEvent()  # the worker has something to do
        self._progress = AsyncEvent()  # something has become durable, or never will; a new one each time
        self._worker: AsyncWorker | None = None
        self._error: Exception | None = RuntimeError("a stream writer is to be used as a context manager")

    async def write(self, chunk: str) -> None:
        """Put a chunk into the buffer; if that is full, wait until there is room.

        If this is cancelled, the chunk was not taken. Raises `InvalidDataError` for what cannot be stored.
        """
        text = arguments.storable_text(chunk, "a chunk")
        size = len(text.encode())
        while True:
            with self._mutex:
                self._check()
                if not self._unsaved or (
                    len(self._unsaved) < self._max_chunks and self._unsaved_bytes + size <= self._max_bytes
                ):
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
        self._place = self._changes.place(self._stream_id, self._be_alarmed)
        try:
            self._seq = (await self._active_status()).total_chunks
        except BaseException:
            self._changes.leave(self._place)
            raise
        with self._mutex:
            self._error = None
            self._keep_worker()
        self._changes.keep_watch()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        problem = error
        try:
            try:
                await self.flush()
            except Exception as unsaved:
                problem = self._prefer(problem, unsaved)
            try:
                await self._end(problem)
            except Exception as failed:
                problem = self._prefer(problem, failed)
        finally:
            self._leave()
        if (worker := self._worker) is not None:
            await worker.join(CLOSING_TIMEOUT)
        if problem is not None and problem is not error:
            raise problem

    def _prefer(self, problem: BaseException | None, later: Exception) -> BaseException:
        if problem is None:
            return later
        logger.warning(
            "stream %r: when its producer failed, %s followed; %d chunks are durable, %d are not",
            self._stream_id,
            type(later).__name__,
            self._seq,
            len(self._unsaved),
        )
        return problem

    async def _end(self, problem: BaseException | None) -> None:
        """End the stream, unless it has ended or belongs to another producer."""
        with self._mutex:
            error, self._error = self._error, StreamNotActiveError(self._stream_id, "error" if problem else "done")
        if problem is None:
            await self._database.persist(partial(self._store.complete, self._stream_id))
        elif not isinstance(error, (SequenceConflictError, StreamNotActiveError, StreamNotFoundError)):
            attempt = partial(self._store.fail, self._stream_id, _storable(problem))
            # Not persistently once more, if the server could not be reached for so long already.
            await (attempt() if isinstance(error, StreamWriteError) else self._database.persist(attempt))

    def _leave(self) -> None:
        with self._mutex:
            self._closing = True
            self._due.set()
        if self._place is not None:
            self._changes.leave(self._place)

    def _check(self) -> None:
        if self._error is not None:
            raise copied(self._error) from self._error

    def _be_alarmed(self) -> None:
        self._alarmed = True
        self._due.set()

    def _keep_worker(self) -> None:
        if self._in_background and self._worker is None:
            self._worker = async_spawn(self._work, "aibind_postgres-writer")
            self._due.set()

    async def _work(self) -> None:
        try:
            while True:
                await self._due.wait()
                if self._closing or not await self._send_what_is_due():
                    return
        finally:
            with self._mutex:
                self._worker = None
                self._tell()

    async def _advance(self, progress: AsyncEvent) -> None:
        """Wait until more is durable, and see to it that somebody works on that."""
        if self._in_background:
            with self._mutex:
                self._keep_worker()  # the last one may have been cancelled, as when an event loop ends
            await progress.wait()
        else:
            await self._send_here()

    async def _send_here(self) -> None:
        async with self._sending:
            await self._send_what_is_due()
        with self._mutex:
            self._check()

    async def _send_what_is_due(self) -> bool:
        """Look and send once; return False if that has failed for good."""
        with self._mutex:
            self._due.clear()
            alarmed, self._alarmed = self._alarmed, False
            texts = self._unsaved[:]
        try:
            if alarmed:
                await self._active_status()
            if texts:
                await self._send(texts)
        except Exception as error:
            with self._mutex:
                self._error = error
                self._tell()
            return False
        return True

    async def _active_status(self) -> StreamStatus:
        """Return where the stream stands; raise if it is not there or has ended."""
        status = await self._database.persist(partial(self._store.get_status, self._stream_id))
        if status is None:
            raise StreamNotFoundError(self._stream_id)
        if status.state != "active":
            raise StreamNotActiveError(self._stream_id, status.state)
        return status

    async def _send(self, texts: list[str]) -> None:
        attempt = partial(self._store.append_many, self._stream_id, texts, expected_seq=self._seq + 1)
        try:
            last = await self._database.persist(attempt)
        except AibindError:
            raise
        except Exception as error:
            raise StreamWriteError(self._stream_id, self._seq, len(self._unsaved)) from error
        with self._mutex:
            del self._unsaved[: len(texts)]
            self._unsaved_bytes -= sum(len(text.encode()) for text in texts)
            self._seq = last
            if self._unsaved:
                self._due.set()
            self._tell()

    def _tell(self) -> None:
        progress, self._progress = self._progress, AsyncEvent()
        progress.set()


def _storable(error: BaseException) -> str:
    text = str(error)[:LONGEST_ERROR].replace("\0", "").encode(errors="replace").decode()
    return text or type(error).__name__
