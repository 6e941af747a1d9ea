"""Who writes a source into a stream, in the background, and does what is owed when that has ended."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from .. import _arguments as arguments
from .._concurrency import AsyncEvent, Mutex, async_at_exit, async_call_or_await, async_interrupt, async_spawn
from ..errors import StreamNotActiveError, StreamNotFoundError, WebError
from ..models import StreamEvent, StreamStatus, chunk_text

if TYPE_CHECKING:
    from .stream_store import AsyncPostgresStreamStore
    from .stream_writer import AsyncStreamWriter

logger = logging.getLogger("aibind_postgres")

GENERIC_ERROR = "the answer broke off"  # what is told of an exception of the source

LAST_WORDS = 2.0  # seconds that `on_finish` has, where the process is about to end


class AsyncProducer:
    """The worker that writes a source into a stream.

    An end that somebody else has made is dealt with by the writer's worker, since the source may be busy for long.
    """

    _mutex: ClassVar[Mutex] = Mutex()
    _all: ClassVar[set[AsyncProducer]] = set()  # nobody else may hold on to them
    _is_first: ClassVar[bool] = True

    def __init__(
        self,
        store: AsyncPostgresStreamStore,
        stream_id: str,
        source: AsyncIterable[str | StreamEvent],
        on_finish: Callable[[str, StreamStatus | None], Any] | None,
        expose_errors: bool,
        context: Callable[[], AbstractAsyncContextManager[object]],
    ) -> None:
        self.stream_id = stream_id
        self.finished = AsyncEvent()  # nothing is owed any more
        self._owed = {"the end of the stream", "on_finish"}
        self._store = store
        self._source = source
        self._source_open = True
        self._source_left = False
        self._on_finish = on_finish
        self._expose_errors = expose_errors
        self._context = context
        self._texts: list[str] = []  # what the source has yielded, if somebody wants it
        self._ended = False  # by somebody else
        self._writer: AsyncStreamWriter | None = None
        self._is_late = False
        self._finishing = False
        with self._mutex:
            self._all.add(self)
            is_first, AsyncProducer._is_first = AsyncProducer._is_first, False
        if is_first:
            async_at_exit(break_off_all)
        # In the context of who began it: the source is his.
        self._worker = async_spawn(self._run, "aibind_postgres-producer", inherit=True)

    @classmethod
    def writing(cls, store: AsyncPostgresStreamStore | None = None) -> list[AsyncProducer]:
        """Return those that write into a store, or all of them."""
        with cls._mutex:
            return [producer for producer in cls._all if store is None or producer._store is store]

    @classmethod
    def forget(cls) -> None:
        """Take leave of all, in a process that was forked from theirs."""
        cls._mutex, cls._all = Mutex(), set()

    def break_off(self) -> None:
        """Have the stream end in state error soon, unless it is about to end well."""
        with self._mutex:
            self._is_late = True
            if self._writer is not None and not self._finishing:
                self._writer._break_off(GENERIC_ERROR)

    async def _run(self) -> None:
        interruption: BaseException | None = None
        try:
            async with self._store.writer(self.stream_id, on_end=self._break_off) as writer:
                with self._mutex:
                    self._writer = writer
                if self._is_late:
                    writer._break_off(GENERIC_ERROR)
                await self._store._database.client.release_thread()  # the source may take long
                await self._write(writer)
        except (SourceError, StreamNotActiveError):
            pass  # the log has the one, and the other was meant
        except StreamNotFoundError:
            if self._writer is None:
                logger.error("stream %r is not there for its producer: is its transaction not over?", self.stream_id)
        except Exception as error:
            if not self._ended:
                logger.error("the producer of stream %r gave up: %s", self.stream_id, error)
        except BaseException as error:
            if not self._ended:
                logger.error("the producer of stream %r was interrupted", self.stream_id)
                interruption = error.__cause__ or error
        if self._writer is None:
            await self._give_up()
        self._strike("the end of the stream")
        await self._close_source()  # if it did not come to writing
        await self._finish()
        await self._store._database.client.release_thread()
        if interruption is not None:
            raise interruption

    async def _give_up(self) -> None:
        """End a stream to which no writer has come."""
        try:
            await self._store.fail(self.stream_id, GENERIC_ERROR)
        except StreamNotFoundError:
            pass
        except Exception as error:
            logger.error("stream %r could not be ended by its producer: %s", self.stream_id, error)

    async def _write(self, writer: AsyncStreamWriter) -> None:
        try:
            await self._pipe(writer)
            last = await writer.flush()
            if self._ended:  # what came to its end was broken off, and must not count as done
                raise SourceError(GENERIC_ERROR)
            # Before the stream is done, so that who sees that finds what is kept here.
            await self._finish(StreamStatus("done", None, last))
        except (SourceError, StreamNotActiveError, StreamNotFoundError):
            raise
        except Exception as error:  # the writer stores its text
            if not self._ended:
                logger.error("the producer of stream %r gave up: %s", self.stream_id, error)
            raise SourceError(GENERIC_ERROR) from error
        except BaseException as interruption:  # by the end of the event loop, say: the writer stores its text
            raise SourceInterrupted(GENERIC_ERROR) from interruption

    async def _pipe(self, writer: AsyncStreamWriter) -> None:
        writing = False
        try:
            async with self._surroundings():
                if self._ended:  # while that was set up: then the source need not begin
                    raise SourceError(GENERIC_ERROR)
                try:
                    async for item in self._source:
                        text = arguments.storable_text(chunk_text(item), "a chunk")
                        writing = True
                        await writer.write(text)
                        writing = False
                        if self._on_finish is not None and isinstance(item, str):
                            self._texts.append(item)
                finally:
                    await self._close_source()
        except WebError as refusal:
            raise SourceError(refusal.text or GENERIC_ERROR) from None
        except Exception as error:
            if writing or self._ended:
                raise
            logger.exception("the source of stream %r failed", self.stream_id)
            told = str(error) or type(error).__name__
            raise SourceError(told if self._expose_errors else GENERIC_ERROR) from error

    @asynccontextmanager
    async def _surroundings(self) -> AsyncIterator[None]:
        """Be within what the caller wants; a failure to take that down changes nothing of what was done there."""
        surroundings = self._context()
        await surroundings.__aenter__()
        try:
            yield
        finally:
            try:
                await surroundings.__aexit__(*sys.exc_info())
            except Exception:
                logger.exception("what was set up for stream %r could not be taken down", self.stream_id)

    async def _break_off(self, error: Exception) -> None:
        """Interrupt the source: nothing that it yields can be stored any more."""
        self._ended = True
        self._strike("the end of the stream")
        if not isinstance(error, (StreamNotActiveError, StreamNotFoundError)):
            logger.error("the producer of stream %r gave up: %s", self.stream_id, error)
        with self._mutex:
            # In threads, a generator is for the one who runs it, since what it has open may be bound to that thread:
            # while it runs, nobody else can close it, and when it does not, it is about to be closed.
            interrupting = self._source_open and not inspect.isgenerator(self._source)
            if interrupting:
                self._source_open = False
        if interrupting and not async_interrupt(self._worker, self._source):
            with self._mutex:
                self._source_open = True  # it is for the one who reads from it
            if self._source_left:
                await self._close_source()
        await self._finish()

    async def _close_source(self) -> None:
        with self._mutex:
            self._source_left = True
            closing, self._source_open = self._source_open, False
        if closing:
            await close_source(self._source)

    async def _finish(self, status: StreamStatus | None = None) -> None:
        with self._mutex:
            if self._finishing:
                return
            self._finishing = True
        try:
            if self._on_finish is not None:
                status = status or await self._last_status()
                async with self._surroundings():
                    await async_call_or_await(self._on_finish, "".join(self._texts), status)
        except Exception:
            logger.exception("on_finish of stream %r failed", self.stream_id)
        finally:
            self._texts.clear()
            self._strike("on_finish")

    def _strike(self, done: str) -> None:
        with self._mutex:
            self._owed.discard(done)
            if self._owed:
                return
            self._all.discard(self)
        self.finished.set()

    async def _last_status(self) -> StreamStatus | None:
        try:
            return await self._store.get_status(self.stream_id)
        except Exception as error:
            logger.error("how stream %r has ended is not known to its producer: %s", self.stream_id, error)
            return None


async def shutdown(store: AsyncPostgresStreamStore, timeout: float) -> bool:
    """Wait for the streams that are written here to end, after `timeout` seconds break them off; True: none was."""
    deadline = monotonic() + timeout
    producers = AsyncProducer.writing(store)
    late = [producer for producer in producers if not await producer.finished.wait(max(0.0, deadline - monotonic()))]
    for producer in late:
        producer.break_off()
    deadline = monotonic() + LAST_WORDS
    for producer in late:
        await producer.finished.wait(max(0.0, deadline - monotonic()))
    return not late


async def break_off_all() -> None:
    """End what this process still writes."""
    for store in {producer._store for producer in AsyncProducer.writing()}:
        await shutdown(store, 0.0)


async def close_source(source: object) -> None:
    """Close a source, if it can be closed; the log tells of one that fails at it."""
    close = getattr(source, "aclose", None) or getattr(source, "close", None)
    if close is not None:
        try:
            await async_call_or_await(close)
        except Exception:
            logger.exception("a source failed when it was closed")


class SourceError(Exception):
    """Ends a stream in state error, with this text."""


class SourceInterrupted(BaseException):
    """Ends a stream in state error, with this text, in place of what is no `Exception` and may have no text to tell."""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=AsyncProducer.forget)
