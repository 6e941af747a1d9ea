"""Producers: copy sources into streams in the background, then call `on_finish`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from .. import _arguments as arguments
from .._concurrency import AsyncEvent, AsyncWorker, Mutex, async_at_exit, async_call_or_await, async_spawn
from .._lifecycle import EndReason, Phase, span_attributes
from .._subscriptions import wake_all
from .._telemetry import SourceTimes, StoreSpan
from ..errors import AibindError, StreamNotActiveError, StreamNotFoundError, WebError
from ..models import StreamStatus
from ..wire import INTERRUPTED, ChunkEncoder
from .source import AsyncSource

if TYPE_CHECKING:
    from .stream_store import AsyncPostgresStreamStore

logger = logging.getLogger("aibind_postgres.producer")

SHUTDOWN_GRACE = 2.0  # seconds to wait for producers after `shutdown` has requested their end


class AsyncProducer:
    """Copies a source into a stream, then runs `on_finish`.

    It uses two workers. The producer's worker reads the source. The writer's worker sends the chunks, and reports if
    another caller has ended the stream. Every producer ends through `end`.
    """

    _registry: ClassVar[set[AsyncProducer]] = set()  # the producers of this process; keeps them alive
    _registry_mutex: ClassVar[Mutex] = Mutex()
    _exit_hook_installed: ClassVar[bool] = False

    def __init__(
        self,
        store: AsyncPostgresStreamStore,
        stream_id: str,
        source: AsyncIterable[Any],
        encoder: ChunkEncoder,
        on_finish: Callable[[Sequence[str], StreamStatus | None], Any] | None,
        expose_errors: bool,
        context: Callable[[], AbstractAsyncContextManager[object]],
        idle_timeout: float = math.inf,
        timeout: float = math.inf,
        *,
        span: StoreSpan,
        inline: bool = False,
    ) -> None:
        self.stream_id = stream_id
        self.finished = AsyncEvent()  # set in phase ENDED
        self.start_error: Exception | None = None  # for readers: this producer did not find its stream
        self._store = store
        # The store may stand for several, one in each event loop.
        self._database, self._producers_of_store = store._database, store._producers
        self._source = AsyncSource(source)
        self._on_finish = on_finish
        self._expose_errors = expose_errors
        self._context = context
        self._encoder = encoder
        self._is_storing = False  # whether an error is one of the store, not of the source
        self._chunks: list[str] = []  # the argument of `on_finish`
        self._idle_timeout = idle_timeout
        self._timeout = timeout
        self._began_at = self._item_at = math.inf  # when the source was asked first, and last; not while it is stored
        self._inline = inline  # whether `start` runs the source
        self._writer = store.writer(stream_id, on_end=None if inline else self._writer_closed)
        self._sender = self._writer._sender
        if min(idle_timeout, timeout) < math.inf:
            self._sender.time_limit = self._time_limit
        self._mutex = Mutex()
        self._worker: AsyncWorker | None = None
        self._phase = Phase.STARTING
        self._requested: EndReason | None = None  # SHUTDOWN, INTERPRETER_EXIT or TIMED_OUT
        self._reason: EndReason | None = None  # from phase FINISHING on
        self._span = span

    async def start(self, *, is_new: bool) -> None:
        """Start the worker, or do its work. If no thread can start, end the stream and this producer, and raise.

        Args:
            is_new: Whether the stream has just been created in this process.
        """
        client = self._database.client
        try:
            # In a transaction of the caller, the producer may not see the new stream: it must query the state.
            if is_new and not client.in_transaction():
                self._writer._assume_active()
            run = partial(self._run, client.capture_settings())
            # The source runs on behalf of the caller, so it gets the caller's context variables, and the span as well.
            # The span is entered before the mutex is acquired, since that calls the adapter.
            with self._span, self._mutex:  # `end` reads the worker as soon as the registry has this producer
                with self._registry_mutex:
                    self._registry.add(self)
                    self._producers_of_store.add(self)
                    if not self._exit_hook_installed:
                        AsyncProducer._exit_hook_installed = True
                        async_at_exit(shutdown_all)
                if not self._inline:
                    self._worker = async_spawn(run, "aibind_postgres-producer", inherit=True)
        except BaseException:
            await self._end_without_worker()
            raise
        if self._inline:
            with self._span:
                await run()

    @classmethod
    def running(cls, store: AsyncPostgresStreamStore | None = None) -> list[AsyncProducer]:
        """Return the producers of a store, or of all stores, that have not ended."""
        database = None if store is None else store._database
        with cls._registry_mutex:
            return [producer for producer in cls._registry if database in (None, producer._database)]

    @classmethod
    def forget_all(cls) -> None:
        """Empty the registry in a forked process: the producers belong to the parent."""
        cls._registry_mutex, cls._registry = Mutex(), set()

    async def request_end(self, reason: EndReason) -> None:
        """Let the writer end the stream in state error. `end` then gets `reason`, unless the source ends first.

        Args:
            reason: SHUTDOWN or INTERPRETER_EXIT.
        """
        with self._mutex:
            self._requested = reason
            worker = self._worker
        self._sender.request_end(INTERRUPTED)
        if worker is None or not worker.is_alive():
            await self._end_without_worker()

    async def end(self, reason: EndReason, status: StreamStatus | None = None) -> bool:
        """End this producer. Every ending goes through here, and only the first call takes effect.

        1. Interrupt the source, unless its reader has closed it.
        2. Call `on_finish`. With SOURCE_FINISHED, the stream is still active. With WRITE_FAILED, it may be. With other
           reasons, it has ended.
        3. Remove the producer from the registry and set `finished`. With SOURCE_FINISHED, `_run` does this after the
           stream is done.

        Args:
            reason: Why the producer ends.
            status: The status for `on_finish`. Default: queried from the store.

        Returns:
            False if an earlier call has ended the producer, True otherwise.
        """
        with self._mutex:
            if self._phase in (Phase.FINISHING, Phase.ENDED):
                return False
            self._phase, self._reason = Phase.FINISHING, reason
            worker = self._worker
        logger.debug("the producer of stream %r ends: %s", self.stream_id, reason.value)
        try:
            await self._source.interrupt(worker)
            await self._call_on_finish(status)
        finally:
            if reason is not EndReason.SOURCE_FINISHED:
                self._mark_ended(reason)
        return True

    async def _end_without_worker(self) -> None:
        """End the stream if no worker can start, or it was cancelled before its first step, as at a loop's end."""
        self._writer._abort()
        await fail_stream(self._store, self.stream_id)
        await self._source.close()
        await self.end(EndReason.INTERRUPTED)

    def _mark_ended(self, reason: EndReason) -> None:
        with self._mutex:
            self._phase = Phase.ENDED
        with self._registry_mutex:
            self._registry.discard(self)
            self._producers_of_store.discard(self)
        self._span.end(span_attributes(reason))
        self.finished.set()

    async def _writer_closed(self, error: Exception) -> None:
        """End the producer because the writer's worker reports that no more chunks can be stored."""
        reason = self._reason_of(error)
        if reason is EndReason.WRITE_FAILED:
            logger.error("the producer of stream %r failed: %s", self.stream_id, error)
        await self.end(reason)

    def _time_limit(self) -> tuple[float, str]:
        """Return the time at which the source must have ended or yielded, and the error text for the stream."""
        if self._phase in (Phase.FINISHING, Phase.ENDED):
            return math.inf, ""
        idle_at, end_at = self._item_at + self._idle_timeout, self._began_at + self._timeout
        if monotonic() >= min(idle_at, end_at):
            self._requested = EndReason.TIMED_OUT
        if idle_at < end_at:
            return idle_at, f"the answer was interrupted: no output for {self._idle_timeout:g} seconds"
        return end_at, f"the answer was interrupted: it took longer than {self._timeout:g} seconds"

    def _reason_of(self, error: Exception) -> EndReason:
        if isinstance(error, StreamNotFoundError):
            return EndReason.DELETED
        if isinstance(error, StreamNotActiveError):
            return self._requested or EndReason.ENDED_ELSEWHERE
        return EndReason.WRITE_FAILED

    async def _run(self, apply_settings: Callable[[], None]) -> None:
        """Copy the source inside the writer's block. Leaving the block ends the stream."""
        apply_settings()
        reason = EndReason.SOURCE_FINISHED
        interruption: BaseException | None = None
        try:
            async with self._writer:
                with self._mutex:
                    if self._phase is Phase.STARTING:
                        self._phase = Phase.WRITING
                await self._database.client.release_thread()  # the source may run for a long time
                await self._write()
        except ProducerError:
            reason = EndReason.SOURCE_FAILED
        except Exception as error:
            reason = self._reason_of(error)
            if reason is EndReason.DELETED and self._phase is Phase.STARTING:
                self.start_error = AibindError(
                    f"stream {self.stream_id!r} not found by its producer, which uses another connection: first commit "
                    "the transaction that creates the stream, such as by calling start in transaction.on_commit"
                )
                logger.error("a producer cannot start: %s", self.start_error)
                wake_all(self._store._subscriptions.failed(self.stream_id, self.start_error))
            elif reason is EndReason.WRITE_FAILED and not self._ended_by_writer:
                logger.error("the producer of stream %r failed: %s", self.stream_id, error)
        except BaseException as error:
            reason = EndReason.INTERRUPTED
            if not self._ended_by_writer:
                logger.error("the producer of stream %r was interrupted", self.stream_id)
                interruption = error.__cause__ or error
        if self._phase is Phase.STARTING:
            await fail_stream(self._store, self.stream_id)
        await self._source.close()  # no effect if it was read
        if self._reason is EndReason.SOURCE_FINISHED:
            self._mark_ended(reason)  # which differs if the end of the stream could not be stored
        else:
            await self.end(reason)
        await self._database.client.release_thread()
        if interruption is not None:
            raise interruption

    @property
    def _ended_by_writer(self) -> bool:
        """Whether the writer's worker has ended this producer. Its own worker then logs nothing more."""
        return self._reason not in (None, EndReason.SOURCE_FINISHED)

    async def _write(self) -> None:
        """Copy the source, then run `on_finish`. The text of a raised error becomes the error text of the stream."""
        try:
            await self._copy_source()
            last = await self._writer.flush()
            # `on_finish` comes first, so that readers that see the end of the stream find its results.
            if not await self.end(EndReason.SOURCE_FINISHED, StreamStatus("done", None, last)):
                raise ProducerError(INTERRUPTED)  # prevents state done
        except (ProducerError, StreamNotActiveError, StreamNotFoundError):
            raise
        except Exception as error:
            if not self._ended_by_writer:
                logger.error("the producer of stream %r failed: %s", self.stream_id, error)
            raise ProducerError(INTERRUPTED) from error
        except BaseException as interruption:
            raise ProducerInterrupted(INTERRUPTED) from interruption

    async def _copy_source(self) -> None:
        try:
            async with self._entered_context():
                if self._reason is not None:  # the producer was ended while it entered the context
                    raise ProducerError(INTERRUPTED)
                metrics = self._database.metrics
                times = None if metrics is None else SourceTimes(metrics, monotonic())
                try:
                    with times or nullcontext():
                        self._began_at = self._item_at = monotonic()
                        async for item in self._source.items:
                            self._item_at = math.inf
                            if times is not None:
                                times.arrived(monotonic())
                            await self._put(self._encoder.encode(item))
                            self._item_at = monotonic()
                            if times is not None:
                                times.asked(self._item_at)
                        self._item_at = math.inf
                        await self._put(self._encoder.finish())
                finally:
                    self._began_at = self._item_at = math.inf  # what remains is not the time of the source
                    await self._source.close()
        except WebError as web_error:
            raise ProducerError(web_error.text or INTERRUPTED) from None
        except Exception as error:
            if self._is_storing or self._reason is not None:
                raise
            logger.exception("the source of stream %r failed", self.stream_id)
            error_text = str(error) or type(error).__name__
            raise ProducerError(error_text if self._expose_errors else INTERRUPTED) from error

    async def _put(self, chunks: Sequence[str]) -> None:
        for chunk in chunks:
            arguments.storable_text(chunk, "a chunk")
            self._is_storing = True
            await self._sender.put(chunk)
            self._is_storing = False
            if self._on_finish is not None:
                self._chunks.append(chunk)

    @asynccontextmanager
    async def _entered_context(self) -> AsyncIterator[None]:
        """Enter the caller's context. Errors on leaving it are only logged, since the work inside it is complete."""
        context = self._context()
        await context.__aenter__()
        # Not `sys.exc_info()`: a source that runs inside `start` would see an exception that its caller handles.
        try:
            yield
        except BaseException as error:
            await self._leave(context, type(error), error, error.__traceback__)
            raise
        await self._leave(context, None, None, None)

    async def _leave(self, context: AbstractAsyncContextManager[object], *details: Any) -> None:
        try:
            await context.__aexit__(*details)
        except Exception:
            logger.exception("the context of stream %r raised when it was left", self.stream_id)

    async def _call_on_finish(self, status: StreamStatus | None) -> None:
        try:
            if self._on_finish is not None:
                status = status or await self._final_status()
                async with self._entered_context():
                    await async_call_or_await(self._on_finish, self._chunks, status)
        except Exception:
            logger.exception("on_finish of stream %r failed", self.stream_id)
        finally:
            self._chunks = []

    async def _final_status(self) -> StreamStatus | None:
        try:
            return await self._store.get_status(self.stream_id)
        except Exception as error:
            logger.error("the final status of stream %r could not be queried for on_finish: %s", self.stream_id, error)
            return None


async def shutdown(store: AsyncPostgresStreamStore, timeout: float, reason: EndReason = EndReason.SHUTDOWN) -> bool:
    """Wait up to `timeout` seconds for the producers of a store, then end the remaining ones.

    Returns:
        True if all producers ended by themselves.
    """
    deadline = monotonic() + timeout
    producers = AsyncProducer.running(store)
    running = [each for each in producers if not await each.finished.wait(max(0.0, deadline - monotonic()))]
    for producer in running:
        await producer.request_end(reason)
    deadline = monotonic() + SHUTDOWN_GRACE
    for producer in running:
        await producer.finished.wait(max(0.0, deadline - monotonic()))
    return not running


async def end_producers(store: AsyncPostgresStreamStore) -> None:
    """End the producers of a store that is being closed."""
    await shutdown(store, 0.0)


async def end_producer(producer: AsyncProducer) -> None:
    """End a producer that is still running, as after an interruption of its caller."""
    if not producer.finished.is_set():
        await producer.request_end(EndReason.SHUTDOWN)
        await producer.finished.wait(SHUTDOWN_GRACE)


async def shutdown_all() -> None:
    """End all producers of this process."""
    for store in {producer._store for producer in AsyncProducer.running()}:
        await shutdown(store, 0.0, EndReason.INTERPRETER_EXIT)


async def fail_stream(store: AsyncPostgresStreamStore, stream_id: str) -> None:
    """End a stream in state error, without its writer. Log an error."""
    try:
        await store.fail(stream_id, INTERRUPTED)
    except StreamNotFoundError:
        pass
    except Exception as error:
        logger.error(
            "stream %r could not be ended by its producer: it stays active until its lease has expired, or without a "
            "lease until fail_abandoned is called: %s",
            stream_id,
            error,
        )


class ProducerError(Exception):
    """Raised inside the writer's block to end the stream in state error with this text."""


class ProducerInterrupted(BaseException):
    """Raised in place of an interruption, to end the stream with this text instead of the interruption's."""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=AsyncProducer.forget_all)
