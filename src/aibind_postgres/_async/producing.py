"""Producers: each copies a source into a stream, in the background, and calls `on_finish` at the end."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from .. import _arguments as arguments
from .._concurrency import (
    AsyncEvent,
    AsyncWorker,
    Mutex,
    async_at_exit,
    async_call_or_await,
    async_interrupt,
    async_spawn,
)
from ..errors import StreamNotActiveError, StreamNotFoundError, WebError
from ..models import StreamEvent, StreamStatus, chunk_text

if TYPE_CHECKING:
    from .stream_store import AsyncPostgresStreamStore

logger = logging.getLogger("aibind_postgres")

GENERIC_ERROR = "the answer broke off"  # shown to clients when the source raises

SHUTDOWN_GRACE = 2.0  # seconds that producers have to end after `shutdown` has asked them to


class Phase(Enum):
    """The phases of a producer, in their order. WRITING may be skipped."""

    STARTING = "starting"  # the stream's writer is not open yet
    WRITING = "writing"  # the source is being copied
    FINISHING = "finishing"  # the source is closed or interrupted, `on_finish` runs
    ENDED = "ended"  # the stream has ended and `on_finish` has returned


class EndReason(Enum):
    """Why a producer ends."""

    SOURCE_FINISHED = "the source came to its end"
    SOURCE_FAILED = "the source or its context raised"
    STOPPED = "the stream was ended elsewhere"
    DELETED = "the stream was deleted"
    WRITE_FAILED = "the chunks could not be stored"
    INTERRUPTED = "the worker was interrupted, as by the end of its event loop"
    SHUTDOWN = "the store is being closed, or the application shuts down"
    INTERPRETER_EXIT = "the interpreter exits"


class AsyncProducer:
    """Copies a source into a stream, in a background worker, then calls `on_finish`.

    Two workers take part: the producer's own reads the source, and the writer's sends chunks and reports when the
    stream has ended elsewhere. Every ending goes through `end`.
    """

    _registry: ClassVar[set[AsyncProducer]] = set()  # the producers of this process; these are their only references
    _registry_mutex: ClassVar[Mutex] = Mutex()
    _exit_hook_installed: ClassVar[bool] = False

    def __init__(
        self,
        store: AsyncPostgresStreamStore,
        stream_id: str,
        source: AsyncIterable[str | StreamEvent],
        on_finish: Callable[[str, StreamStatus | None], Any] | None,
        expose_errors: bool,
        context: Callable[[], AbstractAsyncContextManager[object]],
        known_active: bool,
    ) -> None:
        self.stream_id = stream_id
        self.finished = AsyncEvent()  # set in phase ENDED
        self._store = store
        self._source = AsyncSource(source)
        self._on_finish = on_finish
        self._expose_errors = expose_errors
        self._context = context
        self._texts: list[str] = []  # the texts that `on_finish` gets
        self._writer = store.writer(stream_id, on_end=self._writer_closed)
        if known_active:
            self._writer._assume_active()
        self._mutex = Mutex()
        self._phase = Phase.STARTING
        self._reason: EndReason | None = None  # from phase FINISHING on
        with self._registry_mutex:
            self._registry.add(self)
            is_first = not self._exit_hook_installed
            AsyncProducer._exit_hook_installed = True
        if is_first:
            async_at_exit(shutdown_all)
        with self._mutex:  # `end` reads the worker, and may run before this method returns
            # The source belongs to the caller, and so does its context.
            self._worker = async_spawn(self._run, "aibind_postgres-producer", inherit=True)

    @classmethod
    def running(cls, store: AsyncPostgresStreamStore | None = None) -> list[AsyncProducer]:
        """Return the producers of a store, or of all stores, that have not ended."""
        with cls._registry_mutex:
            return [producer for producer in cls._registry if store is None or producer._store is store]

    @classmethod
    def forget_all(cls) -> None:
        """Forget all producers. Called in a forked process: they belong to the parent."""
        cls._registry_mutex, cls._registry = Mutex(), set()

    async def end(self, reason: EndReason, status: StreamStatus | None = None) -> bool:
        """End this producer. Every ending goes through here, and the first one takes effect.

        SHUTDOWN and INTERPRETER_EXIT only request that the writer ends the stream in state error. The writer then
        reports STOPPED, unless the source comes to its end first. Every other reason does the following:

        1. Interrupt the source, unless its reader has closed it.
        2. Call `on_finish`: after SOURCE_FINISHED before the stream is done, else after the stream has ended.
        3. Leave the registry and set `finished`. After SOURCE_FINISHED `_run` does that, when the stream is done.

        Args:
            reason: Why the producer ends.
            status: The status for `on_finish`. Default: queried from the store.

        Returns:
            False if an earlier call has ended the producer.
        """
        with self._mutex:
            if self._phase in (Phase.FINISHING, Phase.ENDED):
                return False
            worker = self._worker
            is_request = reason in (EndReason.SHUTDOWN, EndReason.INTERPRETER_EXIT)
            if not is_request:
                self._phase, self._reason = Phase.FINISHING, reason
        if is_request:
            self._writer._request_end(GENERIC_ERROR)
            return worker.is_alive() or await self._end_without_worker()
        try:
            await self._source.interrupt(worker)
            await self._call_on_finish(status)
        finally:
            if reason is not EndReason.SOURCE_FINISHED:
                self._mark_ended()
        return True

    async def _end_without_worker(self) -> bool:
        """End the stream of a worker that was cancelled before it began, as at the end of an event loop."""
        self._writer._release()
        await self._fail_stream()
        await self._source.close()
        return await self.end(EndReason.INTERRUPTED)

    def _mark_ended(self) -> None:
        with self._mutex:
            self._phase = Phase.ENDED
        with self._registry_mutex:
            self._registry.discard(self)
        self.finished.set()

    async def _writer_closed(self, error: Exception) -> None:
        """End after a report of the writer's worker: nothing more can be stored."""
        reason = _reason_of(error)
        if reason is EndReason.WRITE_FAILED:
            logger.error("the producer of stream %r gave up: %s", self.stream_id, error)
        await self.end(reason)

    async def _run(self) -> None:
        """Copy the source, then leave the writer's block, which ends the stream."""
        reason = EndReason.SOURCE_FINISHED
        interruption: BaseException | None = None
        try:
            async with self._writer:
                with self._mutex:
                    if self._phase is Phase.STARTING:
                        self._phase = Phase.WRITING
                await self._store._database.client.release_thread()  # the source may take long
                await self._write()
        except SourceError:
            reason = EndReason.SOURCE_FAILED
        except Exception as error:
            reason = _reason_of(error)
            if reason is EndReason.DELETED and self._phase is Phase.STARTING:
                logger.error(
                    "stream %r not found by its producer: is the transaction that created it not over?", self.stream_id
                )
            elif reason is EndReason.WRITE_FAILED and not self._ended_by_writer:
                logger.error("the producer of stream %r gave up: %s", self.stream_id, error)
        except BaseException as error:
            reason = EndReason.INTERRUPTED
            if not self._ended_by_writer:
                logger.error("the producer of stream %r was interrupted", self.stream_id)
                interruption = error.__cause__ or error
        if self._phase is Phase.STARTING:
            await self._fail_stream()
        await self._source.close()  # if it was not read
        if self._reason is EndReason.SOURCE_FINISHED:
            self._mark_ended()
        else:
            await self.end(reason)
        await self._store._database.client.release_thread()
        if interruption is not None:
            raise interruption

    @property
    def _ended_by_writer(self) -> bool:
        """Whether the writer's worker has ended this producer: its own worker then has no more to report."""
        return self._reason not in (None, EndReason.SOURCE_FINISHED)

    async def _fail_stream(self) -> None:
        """End the stream in state error, without its writer."""
        try:
            await self._store.fail(self.stream_id, GENERIC_ERROR)
        except StreamNotFoundError:
            pass
        except Exception as error:
            logger.error("stream %r could not be ended by its producer: %s", self.stream_id, error)

    async def _write(self) -> None:
        """Write the source. An exception carries the error text that the writer stores."""
        try:
            await self._copy_source()
            last = await self._writer.flush()
            # Readers that see the end of the stream then find the results of `on_finish`.
            if not await self.end(EndReason.SOURCE_FINISHED, StreamStatus("done", None, last)):
                raise SourceError(GENERIC_ERROR)  # the stream must not become done
        except (SourceError, StreamNotActiveError, StreamNotFoundError):
            raise
        except Exception as error:
            if not self._ended_by_writer:
                logger.error("the producer of stream %r gave up: %s", self.stream_id, error)
            raise SourceError(GENERIC_ERROR) from error
        except BaseException as interruption:
            raise SourceInterrupted(GENERIC_ERROR) from interruption

    async def _copy_source(self) -> None:
        storing = False
        try:
            async with self._entered_context():
                if self._reason is not None:  # the stream ended while the context was entered
                    raise SourceError(GENERIC_ERROR)
                try:
                    async for item in self._source.items:
                        text = arguments.storable_text(chunk_text(item), "a chunk")
                        storing = True
                        await self._writer._write(text)
                        storing = False
                        if self._on_finish is not None and isinstance(item, str):
                            self._texts.append(item)
                finally:
                    await self._source.close()
        except WebError as refusal:
            raise SourceError(refusal.text or GENERIC_ERROR) from None
        except Exception as error:
            if storing or self._reason is not None:
                raise
            logger.exception("the source of stream %r failed", self.stream_id)
            error_text = str(error) or type(error).__name__
            raise SourceError(error_text if self._expose_errors else GENERIC_ERROR) from error

    @asynccontextmanager
    async def _entered_context(self) -> AsyncIterator[None]:
        """Enter the caller's context. Log errors of leaving it: the work inside it is done."""
        context = self._context()
        await context.__aenter__()
        try:
            yield
        finally:
            try:
                await context.__aexit__(*sys.exc_info())
            except Exception:
                logger.exception("the context of stream %r raised when it was left", self.stream_id)

    async def _call_on_finish(self, status: StreamStatus | None) -> None:
        try:
            if self._on_finish is not None:
                status = status or await self._final_status()
                async with self._entered_context():
                    await async_call_or_await(self._on_finish, "".join(self._texts), status)
        except Exception:
            logger.exception("on_finish of stream %r failed", self.stream_id)
        finally:
            self._texts.clear()

    async def _final_status(self) -> StreamStatus | None:
        try:
            return await self._store.get_status(self.stream_id)
        except Exception as error:
            logger.error("the final status of stream %r is unknown to its producer: %s", self.stream_id, error)
            return None


class SourceState(Enum):
    """The states of a source. It is closed once, by its reader or by an interrupt."""

    OPEN = "open"
    INTERRUPTED = "interrupted"  # another worker is closing it
    ABANDONED = "abandoned"  # its reader has left while another worker was closing it
    CLOSED = "closed"


class AsyncSource:
    """An iterable of chunks that is closed exactly once."""

    def __init__(self, items: AsyncIterable[str | StreamEvent]) -> None:
        self.items = items
        self._mutex = Mutex()
        self._state = SourceState.OPEN

    async def close(self) -> None:
        """Close the source. Called by its reader only, when it reads no more."""
        with self._mutex:
            is_open = self._state is SourceState.OPEN
            if is_open:
                self._state = SourceState.CLOSED
            elif self._state is SourceState.INTERRUPTED:
                self._state = SourceState.ABANDONED
        if is_open:
            await close_source(self.items)

    async def interrupt(self, reader: AsyncWorker) -> None:
        """Let a reader that waits for the next item stop.

        In threads a generator is closed by its reader alone: resources that it holds may be bound to that thread, and
        while it runs, no other thread can close it.
        """
        with self._mutex:
            if self._state is not SourceState.OPEN or inspect.isgenerator(self.items):
                return
            self._state = SourceState.INTERRUPTED
        closed = async_interrupt(reader, self.items)
        with self._mutex:
            abandoned = self._state is SourceState.ABANDONED
            self._state = SourceState.CLOSED if closed or abandoned else SourceState.OPEN
        if abandoned and not closed:
            await close_source(self.items)


async def shutdown(store: AsyncPostgresStreamStore, timeout: float, reason: EndReason = EndReason.SHUTDOWN) -> bool:
    """Wait `timeout` seconds for the producers of a store, then end them. Return True if all ended by themselves."""
    deadline = monotonic() + timeout
    producers = AsyncProducer.running(store)
    late = [producer for producer in producers if not await producer.finished.wait(max(0.0, deadline - monotonic()))]
    for producer in late:
        await producer.end(reason)
    deadline = monotonic() + SHUTDOWN_GRACE
    for producer in late:
        await producer.finished.wait(max(0.0, deadline - monotonic()))
    return not late


async def shutdown_all() -> None:
    """End all producers of this process."""
    for store in {producer._store for producer in AsyncProducer.running()}:
        await shutdown(store, 0.0, EndReason.INTERPRETER_EXIT)


async def close_source(source: object) -> None:
    """Close a source if it has a method for that. Errors go to the log."""
    close = getattr(source, "aclose", None) or getattr(source, "close", None)
    if close is not None:
        try:
            await async_call_or_await(close)
        except Exception:
            logger.exception("a source raised when it was closed")


def _reason_of(error: Exception) -> EndReason:
    if isinstance(error, StreamNotFoundError):
        return EndReason.DELETED
    return EndReason.STOPPED if isinstance(error, StreamNotActiveError) else EndReason.WRITE_FAILED


class SourceError(Exception):
    """Ends a stream in state error, with this text."""


class SourceInterrupted(BaseException):
    """Ends a stream in state error with this text. It replaces an interruption, which may have a text of its own."""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=AsyncProducer.forget_all)
