"""Live reading without I/O: decides which reader fetches, which waits, and which chunks each one gets.

A `Subscriptions` registry serves one store, in either flavour. Its methods return the subscriptions to wake, and the
caller wakes them with `wake_all`: no callback runs while the mutex is held.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from threading import Lock
from typing import NamedTuple, TypeAlias

from ._arguments import MAX_NUMBER
from ._pages import FIRST_PAGE_CHUNKS, Page
from .errors import StoreClosedError, copy_error
from .models import StreamChunk, StreamStatus

LIVE_PAGE_CHUNKS = 200  # read by one shared fetch at most
TAIL_CHUNKS, TAIL_CHARACTERS = 500, 200_000  # kept for slower readers
TYPICAL_CHUNK_CHARACTERS = 100  # assumed until a chunk of the stream is known


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
    characters: int  # expected in the page
    version: int
    total: int
    ended: bool


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

    def __init__(self, tail: StreamTail, cursor: float, wake: Callable[[], None], ends_only: bool) -> None:
        self.tail = tail
        self.cursor = cursor
        self.wake = wake
        self.ends_only = ends_only  # woken when the stream may have ended, not when it grows
        self.following = False  # it has caught up and reads from the tail
        self.limit = FIRST_PAGE_CHUNKS
        self.delivered = 0  # number of the last chunk that was delivered
        self.decided: deque[Step | Exception] = deque()  # steps that do not depend on the tail


class StreamTail:
    """The cached last chunks of a stream and its state. Guarded by the mutex of its `Subscriptions`."""

    def __init__(self, stream_id: str) -> None:
        self.stream_id = stream_id
        self.subscriptions: set[Subscription] = set()
        self.waiting: set[Subscription] = set()
        self.fetching: Subscription | None = None
        self.version = 1  # grows with each possible change of the stream
        self.total = 0  # chunks that the stream is known to have, to those who wait at the end of the tail
        self._read_total = 0  # chunks that a reader has found
        self.end = 0  # number of the last cached chunk
        self.notified = False  # by a notification, since the last poll that found a change
        self._start = 0  # number before the first cached chunk
        self._chunks: list[StreamChunk] = []
        self._characters = 0
        self._known = False  # a position in the stream is known
        self._fetched_version = 0  # version at the begin of the newest fetch that read everything
        self._state: str | None = "active"  # None: deleted
        self._error: str | None = None
        self._polled: object = None

    @property
    def ended(self) -> bool:
        """Whether no chunk will follow the cached ones."""
        return self._state != "active"

    @property
    def deleted(self) -> bool:
        return self._state is None

    @property
    def is_current(self) -> bool:
        """Whether nothing may have changed since the newest fetch."""
        return self._fetched_version == self.version

    @property
    def least_total(self) -> int:
        """The number of chunks below which the stream is another one of this id."""
        return max(self.total, self._read_total)

    @property
    def is_awaited(self) -> bool:
        return bool(self.waiting) or any(subscription.ends_only for subscription in self.subscriptions)

    @property
    def expected_characters(self) -> int:
        size = self._characters // len(self._chunks) if self._chunks else TYPICAL_CHUNK_CHARACTERS
        return LIVE_PAGE_CHUNKS * size

    @property
    def outcome(self) -> Ended | Deleted:
        """The last step of each reader, once the stream has ended."""
        if self._state is None:
            return DELETED
        return Ended(StreamStatus._make((self._state, self._error, self.total)))

    def after(self, cursor: float) -> Sequence[StreamChunk] | None:
        """Return the cached chunks after `cursor`, or None if chunks after it are no longer cached."""
        if cursor >= self.end:
            return ()
        if cursor < self._start:
            return None
        return self._chunks[bisect_right(self._chunks, cursor, key=itemgetter(0)) :]

    def fetch_after(self, cursor: float) -> int:
        """Return the number after which to fetch: the end of the tail while other readers wait there."""
        if self._known and any(subscription.cursor < math.inf for subscription in self.waiting):
            return self.end
        return int(min(cursor, MAX_NUMBER))

    def take(self, fetch: Fetch, page: Page | None) -> None:
        """Add the page of a shared fetch."""
        # A stream never gets shorter: a shorter one is another stream of this id. A deleted one does not come back.
        if self.deleted or page is None or page.total < fetch.total:
            self._state = None
            return
        after = fetch.after
        if not page.rows and not page.is_last:
            after = page.total  # a hole, perhaps a huge one: each reader catches up behind it on its own
        if not self._known or after > self.end:
            self._begin(min(after, page.total))
        if after <= self.end:  # chunks that were appended in this process meanwhile are cached already
            self._extend([chunk for chunk in page.chunks if chunk.seq > self.end])
            self.end = max(self.end, min(page.end, page.total))
        self.total = max(self.total, page.total)
        if max(after, page.end) >= page.total:
            self._fetched_version = max(self._fetched_version, fetch.version)
            self._state, self._error = page.state, page.error

    def append(self, before: int, texts: Sequence[str]) -> bool:
        """Add texts that were appended here after number `before`; return False if a fetch must read them."""
        follows = self._known and before == self.end
        self.total = max(self.total, before + len(texts))
        if not follows or len(texts) > LIVE_PAGE_CHUNKS:
            return False
        self._extend([StreamChunk(seq, text) for seq, text in enumerate(texts, before + 1)])
        return True

    def record_position(self, version: int, total: int) -> None:
        """Record that a reader was caught up at `total`, the end of an active stream, as of `version`."""
        self._read_total = max(self._read_total, total)
        if not self._known:
            self._begin(total)
        if total == self.end and total >= self.total:  # else chunks are known that the tail lacks
            self._fetched_version = max(self._fetched_version, version)
            self.total = total

    def delete(self) -> None:
        self._state = None

    def finds_change(self, state: str | None, total: int) -> bool:
        """Return whether the result of a poll is a change that is not known yet; state None: no such stream.

        A result counts once, since readers may see other rows than the poll does. A change that a notification may
        still bring is left to it until the next poll.
        """
        result = (state, total)
        if result == self._polled or (state == "active" and total <= self.total):
            return False
        if self.notified:
            self.notified = False
            return False
        self._polled = result
        return True

    def mark_stale(self) -> list[Subscription]:
        self.version += 1
        return self.wake_one()

    def wake_one(self) -> list[Subscription]:
        """Return one waiting reader, to fetch, if a fetch is needed and none is under way."""
        needed = self.waiting and self.fetching is None and not self.is_current
        return [self.waiting.pop()] if needed else []

    def wake_ready(self) -> list[Subscription]:
        """Return the waiting readers that have a next step other than to fetch or to wait."""
        ready = [subscription for subscription in self.waiting if self.ended or subscription.cursor < self.end]
        self.waiting.difference_update(ready)
        return ready

    def wake_ends_only(self) -> list[Subscription]:
        return [subscription for subscription in self.subscriptions if subscription.ends_only]

    def _begin(self, after: int) -> None:
        self._chunks, self._characters = [], 0
        self._start = self.end = after
        self._known = True

    def _extend(self, chunks: Sequence[StreamChunk]) -> None:
        if chunks:
            self._chunks += chunks
            self.end = chunks[-1].seq
            self._characters += sum([len(chunk.data) for chunk in chunks])
            self._trim(len(chunks))

    def _trim(self, newest: int) -> None:
        """Drop the oldest chunks above the limits, but none of the `newest`."""
        surplus = 0
        while len(self._chunks) - surplus > newest and (
            len(self._chunks) - surplus > TAIL_CHUNKS or self._characters > TAIL_CHARACTERS
        ):
            self._characters -= len(self._chunks[surplus].data)
            surplus += 1
        if surplus:
            self._start = self._chunks[surplus - 1].seq
            del self._chunks[:surplus]


class Subscriptions:
    """The registry of the subscriptions of one store. It owns its mutex.

    With `share` false, as in transactions of the callers, each subscription has a tail of its own, since callers may
    see different rows.
    """

    def __init__(self, *, share: bool) -> None:
        self._share = share
        self._mutex = Lock()
        # Several tails of one id: readers of a deleted stream may be busy while a new stream of its id has readers.
        self._tails: dict[str, set[StreamTail]] = {}
        self._left: deque[Subscription] = deque()

    def subscribe(
        self, stream_id: str, cursor: float, wake: Callable[[], None], *, ends_only: bool = False
    ) -> Subscription:
        """Register a reader that has the chunks up to `cursor`, or with `ends_only` a writer."""
        with self._mutex:
            woken = self._remove_left()
            subscription = Subscription(StreamTail(stream_id), cursor, wake, ends_only)
            self._join(subscription)
        wake_all(woken)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Remove a subscription soon."""
        # Without the mutex: the garbage collector closes forgotten readers in any thread, also in one that holds it.
        self._left.append(subscription)

    def next_step(self, subscription: Subscription) -> Step:
        """Return the next step of a reader.

        Raises:
            Exception: A copy of the error of a shared fetch on which the reader waited.
            StoreClosedError: The store was closed.
        """
        with self._mutex:
            if subscription.decided:
                step = subscription.decided.popleft()
                if isinstance(step, Exception):
                    raise copy_error(step) from step
                return step
            tail = subscription.tail
            if not subscription.following:
                return self._catch_up(subscription)
            if tail.deleted:
                return DELETED
            cached = tail.after(subscription.cursor)
            if cached is None:
                return self._catch_up(subscription)
            if cached:
                subscription.cursor = subscription.delivered = cached[-1].seq
                return Deliver(cached)
            if tail.ended:
                return tail.outcome
            if tail.is_current or tail.fetching is not None:
                tail.waiting.add(subscription)
                return WAIT
            tail.fetching = subscription
            after = tail.fetch_after(subscription.cursor)
            return Fetch(after, LIVE_PAGE_CHUNKS, True, tail.expected_characters, tail.version, tail.least_total, False)

    def fetched(self, subscription: Subscription, fetch: Fetch, page: Page | None) -> list[Subscription]:
        """Take the page of a fetch; None if the stream was not found."""
        with self._mutex:
            tail = subscription.tail
            if not fetch.shared:
                return self._caught_up(subscription, fetch, page)
            tail.fetching = None
            tail.take(fetch, page)
            if tail.deleted:
                return self._drop(tail)
            ended = tail.wake_ends_only() if tail.ended else []
            return [*tail.wake_ready(), *tail.wake_one(), *ended]

    def fetch_failed(
        self, subscription: Subscription, fetch: Fetch, error: Exception | None = None
    ) -> list[Subscription]:
        """End a fetch without a page: all readers that wait for it raise `error`, or without one another fetches."""
        with self._mutex:
            tail = subscription.tail
            if not fetch.shared:
                return []
            tail.fetching = None
            if error is None:
                return tail.wake_one()
            failed, tail.waiting = list(tail.waiting), set()
            for waiting in failed:
                waiting.decided.append(error)
            return failed

    def stop_waiting(self, subscription: Subscription) -> list[Subscription]:
        """End the wait of a reader that was cancelled or timed out; another may have to fetch in its place."""
        with self._mutex:
            subscription.tail.waiting.discard(subscription)
            return subscription.tail.wake_one()

    def appended(self, appended: Iterable[tuple[str, int, Sequence[str]]]) -> list[Subscription]:
        """Take texts that were appended in this process: stream ids, the numbers before them, and the texts."""
        woken: list[Subscription] = []
        with self._mutex:
            for stream_id, before, texts in appended:
                for tail in self._tails.get(stream_id, ()):
                    # In a transaction of the caller, others may not see the chunks yet.
                    cached = self._share and tail.append(before, texts)
                    woken += tail.wake_ready() if cached else tail.mark_stale()
        return woken

    def changed(self, stream_ids: Iterable[str] | None) -> list[Subscription]:
        """Mark streams stale, as after a notification, or with None all streams, as after a reconnect."""
        woken: list[Subscription] = []
        with self._mutex:
            for stream_id in list(self._tails) if stream_ids is None else stream_ids:
                for tail in self._tails.get(stream_id, ()):
                    tail.notified = stream_ids is not None
                    woken += tail.mark_stale()
                    # After a reconnect the next poll finds the streams that have ended.
                    woken += tail.wake_ends_only() if stream_ids is not None else []
        return woken

    def deleted(self, stream_id: str) -> list[Subscription]:
        """End the subscriptions of a stream that was deleted in this process: a new one of its id may exist at once."""
        if not self._share:  # the transaction may yet be rolled back
            return self.changed([stream_id])
        with self._mutex:
            return [woken for tail in list(self._tails.get(stream_id, ())) for woken in self._drop(tail)]

    def awaited(self) -> list[StreamTail]:
        """Return the tails on which anyone waits, for a poll."""
        with self._mutex:
            woken = self._remove_left()
            tails = [tail for tails in self._tails.values() for tail in tails if tail.is_awaited]
        wake_all(woken)
        return tails

    def polled(self, tails: Iterable[StreamTail], found: Mapping[str, tuple[str, int]]) -> list[Subscription]:
        """Take the result of a poll for `tails`: the states and numbers of chunks of the streams that exist."""
        woken: list[Subscription] = []
        with self._mutex:
            for tail in tails:
                state, total = found.get(tail.stream_id, (None, 0))
                if tail.finds_change(state, total):
                    woken += tail.mark_stale()
                    woken += tail.wake_ends_only() if state != "active" else []
        return woken

    def closed(self) -> list[Subscription]:
        """End all subscriptions with `StoreClosedError`, since the store is closed."""
        with self._mutex:
            every = [each for tails in self._tails.values() for tail in tails for each in tail.subscriptions]
            for subscription in every:
                subscription.decided.append(StoreClosedError("this store was closed meanwhile"))
            return every

    def _catch_up(self, subscription: Subscription) -> Fetch | Deleted:
        """Let a reader read on its own, from a snapshot of the tail's version."""
        subscription.following = False
        if subscription.tail.deleted:
            if subscription.delivered:  # the next page could be of a new stream of this id
                return DELETED
            self._join(subscription)
        tail, after = subscription.tail, int(min(subscription.cursor, MAX_NUMBER))
        return Fetch(after, subscription.limit, False, 0, tail.version, tail.least_total, tail.ended)

    def _caught_up(self, subscription: Subscription, fetch: Fetch, page: Page | None) -> list[Subscription]:
        """Take the page of a reader that catches up."""
        tail, version = subscription.tail, fetch.version
        woken: list[Subscription] = []
        if page is None or page.total < subscription.delivered:
            subscription.decided.append(DELETED)
            return []
        if tail.deleted:  # since the fetch began: the page may be of a new stream of this id
            return []
        if page.total < fetch.total or (fetch.ended and page.state == "active"):
            # The page is of a new stream of this id, the tail of its predecessor, which other readers still hold.
            woken = self._drop(tail)
            if subscription.delivered:
                subscription.decided.append(DELETED)
                return woken
            self._join(subscription)
            version = 0  # the new tail has missed the changes since the snapshot
        if page.rows:
            subscription.decided.append(Deliver(page.chunks))
            subscription.delivered = page.rows[-1][0]
        if not page.is_last:
            subscription.cursor, subscription.limit = page.end, page.next_limit
            return woken
        subscription.cursor = max(subscription.cursor, page.total)
        if page.state != "active":
            subscription.decided.append(Ended(page.status))
            return woken
        subscription.tail.record_position(version, page.total)
        subscription.following = True
        return woken

    def _join(self, subscription: Subscription) -> None:
        """Move a subscription to the tail of its stream."""
        stream_id = subscription.tail.stream_id
        subscription.tail.subscriptions.discard(subscription)
        if not subscription.tail.subscriptions:
            self._forget(subscription.tail)
        tails = self._tails.setdefault(stream_id, set())
        active = [tail for tail in tails if not tail.ended] if self._share else []
        subscription.tail = active[0] if active else StreamTail(stream_id)
        subscription.tail.subscriptions.add(subscription)
        tails.add(subscription.tail)

    def _drop(self, tail: StreamTail) -> list[Subscription]:
        """Remove the tail of a stream that no longer exists."""
        self._forget(tail)
        tail.delete()
        ends_only = tail.wake_ends_only()
        for subscription in ends_only:  # perhaps of a new stream of this id
            self._join(subscription)
        return [*tail.wake_ready(), *ends_only]

    def _forget(self, tail: StreamTail) -> None:
        tails = self._tails.get(tail.stream_id, set())
        tails.discard(tail)
        if not tails:
            self._tails.pop(tail.stream_id, None)

    def _remove_left(self) -> list[Subscription]:
        woken: list[Subscription] = []
        while self._left:
            subscription = self._left.popleft()
            tail = subscription.tail
            tail.subscriptions.discard(subscription)
            tail.waiting.discard(subscription)
            if tail.fetching is subscription:  # interrupted before it could report
                tail.fetching = None
            woken += tail.wake_one()
            if not tail.subscriptions:
                self._forget(tail)
        return woken


def wake_all(subscriptions: Iterable[Subscription]) -> None:
    """Wake subscriptions; the caller holds no mutex."""
    for subscription in subscriptions:
        subscription.wake()
