"""Follow streams: perform the I/O of the steps that `_subscriptions` returns."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from .._concurrency import AsyncEvent
from .._followed_stream import Deleted, Deliver, Ended, Fetch, Subscription, Wait
from .._pages import FIRST_PAGE_CHUNKS
from .._stream_tail import NO_VERSION
from .._subscriptions import Subscriptions, wake_all
from ..errors import StreamNotFoundError
from ..metrics import DELIVERY_DURATION
from .reading import SharedRead

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..models import StreamStatus
    from .database import AsyncDatabase
    from .listening import AsyncListener
    from .reading import AsyncPageReader

logger = logging.getLogger("aibind_postgres.metrics")


class Heartbeat(NamedTuple):
    """No chunk has arrived within the idle timeout."""


class AsyncFollower:
    """One reader of a stream, for one caller at a time. Used as a context manager.

    It reads the chunks after `cursor`. With a cursor of infinity it only waits for the end of the stream.

    The first page is read before there is a subscription: most readers, as after a reload of a web page, find an ended
    stream whose chunks fit into it.
    """

    def __init__(
        self,
        database: AsyncDatabase,
        subscriptions: Subscriptions,
        listener: AsyncListener,
        pages: AsyncPageReader,
        stream_id: str,
        cursor: float,
    ) -> None:
        self._database = database
        self._subscriptions = subscriptions
        self._listener = listener
        self._pages = pages
        self._stream_id = stream_id
        self._cursor = cursor
        self._archived = False  # whether the last page that it read by itself came from the archive
        self._subscription: Subscription | None = None
        self._ended: Ended | None = None  # the last step of a reader that needs no subscription
        self._sample: tuple[int, float] | None = None  # a chunk to report, and the time of its delivery

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._subscription is not None:
            self._subscriptions.unsubscribe(self._subscription)

    async def next(self, *, deadline: float = math.inf, idle_timeout: float = math.inf) -> Deliver | Ended | Heartbeat:
        """Return the next chunks, or the end of the stream.

        Args:
            deadline: The value of `monotonic()` at which to raise `TimeoutError`; no limit by default.
            idle_timeout: Seconds without a chunk after which to return a `Heartbeat`; no limit by default.

        Raises:
            StreamNotFoundError: The stream does not exist, or was deleted.
            TimeoutError: The deadline has passed and the stream is active, or the server could not be reached.
            Exception: The error of a read that was not recoverable, or that exceeded the time for retries.
        """
        self._database.check_owner()
        if self._subscription is None and (first := await self._begin(deadline)) is not None:
            return first
        assert self._subscription is not None
        idle_at = monotonic() + idle_timeout
        has_waited = False
        while True:
            step = self._subscriptions.next_step(self._subscription)
            if isinstance(step, Wait):
                has_waited = True
                if not await self._wait(min(deadline, idle_at)):
                    if deadline <= idle_at:
                        raise TimeoutError(f"stream {self._stream_id!r} is still active")
                    return Heartbeat()
            elif isinstance(step, Fetch):
                await self._fetch(step, deadline)
            elif isinstance(step, Deleted):
                raise StreamNotFoundError(self._stream_id)
            else:
                if has_waited and self._database.metrics is not None and isinstance(step, Deliver):
                    self._begin_sample(self._subscription.delivered)
                return step

    def _begin_sample(self, seq: int) -> None:
        """Let the reader report the delivery time of a chunk when it waits again, if one is due."""
        metrics, now = self._database.metrics, monotonic()
        if metrics is not None and metrics.begin_sample(now):
            self._sample = seq, now

    async def _report_delivery(self, seq: int, delivered_at: float) -> None:
        self._sample = None
        try:
            seconds = await self._pages.delivery_time(self._stream_id, seq, delivered_at)
        except Exception as error:
            logger.debug("the time of a delivery could not be queried: %s", type(error).__name__)
        else:
            if self._database.metrics is not None and seconds is not None:
                self._database.metrics.record(DELIVERY_DURATION, seconds)

    async def end(self, deadline: float) -> StreamStatus:
        """Wait for the end of the stream and return its status. Raise as `next` does."""
        while not isinstance(step := await self.next(deadline=deadline), Ended):
            pass
        return step.status

    def subscribe(self) -> Subscription:
        """Register a subscription. It receives the changes and errors from now on."""
        self._woken = AsyncEvent()
        self._subscription = self._subscriptions.subscribe(self._stream_id, self._cursor, self._woken.set)
        return self._subscription

    async def _begin(self, deadline: float) -> Deliver | Ended | None:
        """Subscribe and return None, or return the next step of a reader that needs no subscription.

        Raises:
            StreamNotFoundError: The stream does not exist.
        """
        if self._ended is not None:
            return self._ended
        subscriptions = self._subscriptions
        if self._cursor == math.inf or subscriptions.follows(self._stream_id):
            self.subscribe()
            return None
        after = int(self._cursor)
        newest, deletions = subscriptions.newest, subscriptions.deletions
        page = await self._pages.page(self._stream_id, after, FIRST_PAGE_CHUNKS, deadline=deadline)
        if page is None:
            raise StreamNotFoundError(self._stream_id)
        self._archived = page.is_archived
        if page.state != "active":
            if subscriptions.has_streams:  # the writer may not have notified the other readers
                wake_all(subscriptions.changed([self._stream_id]))
            if page.is_last:
                self._ended = Ended(page.status)
                return Deliver(page.chunks) if page.rows else self._ended
        subscription = self.subscribe()
        # Otherwise the page and the tail of the stream may be of two streams of this id.
        if subscription.stream.number > newest and subscriptions.deletions == deletions:
            first = Fetch(after, FIRST_PAGE_CHUNKS, False, NO_VERSION, 0, False)
            wake_all(subscriptions.fetched(subscription, first, page))
        return None

    async def _fetch(self, fetch: Fetch, deadline: float) -> None:
        assert self._subscription is not None
        try:
            if fetch.shared:
                read = SharedRead(self._stream_id, fetch.after, fetch.limit)
                page = await self._pages.shared_page(read, fetch.contradicts, deadline)
            else:
                page = await self._pages.page(
                    self._stream_id, fetch.after, fetch.limit, fetch.contradicts, deadline, archived=self._archived
                )
                self._archived = page is not None and page.is_archived
        except GeneratorExit:  # the garbage collector may run this while its thread holds the mutex; `__exit__` follows
            raise
        except BaseException as error:
            # The deadline or cancellation of this reader must not fail the other readers.
            failure = error if isinstance(error, Exception) and monotonic() < deadline else None
            wake_all(self._subscriptions.fetch_failed(self._subscription, fetch, failure))
            raise
        wake_all(self._subscriptions.fetched(self._subscription, fetch, page))

    async def _wait(self, until: float) -> bool:
        """Wait until woken. Return False when `until`, a value of `monotonic()`, has passed."""
        assert self._subscription is not None
        woken = False
        try:
            if self._sample is not None:
                await self._report_delivery(*self._sample)
            timeout = None if until == math.inf else until - monotonic()
            if timeout is None or timeout > 0:
                self._listener.ensure_running()
                woken = await self._woken.wait(timeout)
        except GeneratorExit:
            raise
        except BaseException:
            wake_all(self._subscriptions.stop_waiting(self._subscription))
            raise
        if woken:
            self._woken.clear()  # before `next_step`, so that no later wake-up is lost
        else:
            wake_all(self._subscriptions.stop_waiting(self._subscription))
        return woken


@contextmanager
def subscribe_to_end(
    subscriptions: Subscriptions, listener: AsyncListener, stream_id: str, wake: Callable[[], None]
) -> Iterator[None]:
    """Return a context manager inside which `wake` is called when the stream may have ended."""
    subscription = subscriptions.subscribe(stream_id, math.inf, wake, ends_only=True)
    try:
        listener.ensure_running()
        yield
    finally:
        subscriptions.unsubscribe(subscription)
