"""A stream that this process follows, its subscriptions, and the steps that a subscription can take. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ._arguments import MAX_NUMBER
from ._pages import FIRST_PAGE_CHUNKS
from ._stream_tail import StreamTail

if TYPE_CHECKING:
    from ._pages import Page
    from .models import StreamChunk, StreamStatus


class Deliver(NamedTuple):
    """Give these chunks to the reader."""

    chunks: Iterable[StreamChunk]


class Fetch(NamedTuple):
    """Read a page of at most `limit` chunks after number `after`, and report it to `fetched` or `fetch_failed`.

    A shared fetch serves all readers that wait for the stream; the others serve a reader that catches up. The remaining
    fields are the state of the tail when the fetch began.
    """

    after: int
    limit: int
    shared: bool
    version: int
    min_total: int
    ended: bool

    def contradicts(self, page: Page | None) -> bool:
        """Return True if a page contradicts the tail: the stream was deleted, or a standby lags behind."""
        return page is None or page.total < self.min_total or (self.ended and page.state == "active")


class Wait(NamedTuple):
    """Wait until the subscription is woken, then ask again."""


class Ended(NamedTuple):
    """The stream has ended and the reader has all its chunks."""

    status: StreamStatus


class Deleted(NamedTuple):
    """The stream was not found, or was deleted; there may be a new stream of the same id."""


Step: TypeAlias = Deliver | Fetch | Wait | Ended | Deleted
WAIT, DELETED = Wait(), Deleted()


class Subscription:
    """One reader or writer that follows a stream.

    `wake` is called, from any thread, when the next step may have changed. `cursor` is the number of the last chunk
    that the reader has; infinity follows the end of the stream alone. All other fields belong to `Subscriptions`.
    """

    def __init__(self, stream: FollowedStream, cursor: float, wake: Callable[[], None], ends_only: bool) -> None:
        self.stream = stream
        self.cursor = cursor
        self.wake = wake
        self.ends_only = ends_only  # woken when the stream may have ended, not when it grows
        self.at_tail = False  # it has caught up and reads from the tail
        self.limit = FIRST_PAGE_CHUNKS
        self.delivered = 0  # number of the last chunk that was delivered
        self.queued_steps: deque[Step | Exception] = deque()  # steps that do not depend on the tail


class FollowedStream:
    """A stream that subscriptions of this store follow, with their common tail. Guarded by the registry's mutex."""

    def __init__(self, stream_id: str, number: int) -> None:
        self.id = stream_id
        self.number = number  # grows with each followed stream of the store
        self.tail = StreamTail()
        self.subscriptions: set[Subscription] = set()
        self.waiting: set[Subscription] = set()
        self.fetching: Subscription | None = None

    @property
    def is_awaited(self) -> bool:
        return bool(self.waiting) or self.has_writer

    @property
    def has_writer(self) -> bool:
        """Whether this process writes the stream."""
        return any(subscription.ends_only for subscription in self.subscriptions)

    def fetch_after(self, cursor: float) -> int:
        """Return the number after which to fetch: the end of the tail while other readers wait there."""
        if self.tail.has_position and any(subscription.cursor < math.inf for subscription in self.waiting):
            return self.tail.end
        return int(min(cursor, MAX_NUMBER))

    def mark_stale(self) -> list[Subscription]:
        self.tail.mark_stale()
        return self.wake_one()

    def changed(self) -> list[Subscription]:
        return [*self.mark_stale(), *self.wake_ends_only()]

    def wake_one(self) -> list[Subscription]:
        """Return one waiting reader, to fetch, if a fetch is needed and none is under way."""
        needed = self.waiting and self.fetching is None and not self.tail.is_current
        return [self.waiting.pop()] if needed else []

    def wake_ready(self) -> list[Subscription]:
        """Return the waiting readers that have a next step other than to fetch or to wait."""
        ended, end = self.tail.ended, self.tail.end
        ready = [subscription for subscription in self.waiting if ended or subscription.cursor < end]
        self.waiting.difference_update(ready)
        return ready

    def wake_ends_only(self) -> list[Subscription]:
        return [subscription for subscription in self.subscriptions if subscription.ends_only]
