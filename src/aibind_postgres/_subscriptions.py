"""Live reading without I/O: decides which reader fetches, which waits, and which chunks each one gets.

A `Subscriptions` registry serves one store, in either flavour. Methods that take a report return the subscriptions to
wake, and the caller wakes them with `wake_all`: no callback runs while the mutex is held.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from ._arguments import MAX_NUMBER
from ._followed_stream import DELETED, WAIT, Deliver, Ended, Fetch, FollowedStream, Step, Subscription
from ._notifications import digest_of
from ._poll_pace import QUICK_POLLS
from ._stream_tail import NO_VERSION
from .errors import StoreClosedError, copy_error

if TYPE_CHECKING:
    from ._pages import Page


class Subscriptions:
    """The registry of the subscriptions of one store. It owns its mutex.

    With `share` false, as in transactions of the callers, each subscription has a tail of its own, since callers may
    see different rows.
    """

    def __init__(self, *, share: bool) -> None:
        self._share = share
        self._mutex = Lock()
        # Several of one id: readers of a deleted stream may be busy while a new stream of its id has readers.
        self._streams: dict[str, set[FollowedStream]] = {}
        self._ids: dict[str, str] = {}  # the keys of `_streams` by their digests
        self._quick_polls: dict[FollowedStream, int] = {}  # that remain; no entry for a quiet stream
        self._unsubscribed: deque[Subscription] = deque()
        self.newest = 0  # the number of the newest followed stream
        self._deletes: Counter[str] = Counter()  # statements under way that delete a stream
        self.deletions = 0  # such statements that have ended

    @property
    def has_streams(self) -> bool:
        """Whether any stream is followed. A reader that subscribes later finds what is already stored."""
        return bool(self._streams)

    def follows(self, stream_id: str) -> bool:
        """Return True if a subscription follows the stream."""
        self._release_unsubscribed()
        return stream_id in self._streams

    def subscribe(
        self, stream_id: str, cursor: float, wake: Callable[[], None], *, ends_only: bool = False
    ) -> Subscription:
        """Register a reader that has the chunks up to `cursor`, or with `ends_only` a writer."""
        with self._mutex:
            woken = self._remove_unsubscribed()
            subscription = Subscription(FollowedStream(stream_id, 0), cursor, wake, ends_only)
            self._join(subscription)
        wake_all(woken)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Queue a subscription for removal by the next `subscribe`, `follows`, `awaited` or `is_empty`."""
        # Without the mutex: the garbage collector closes forgotten readers in any thread, also in one that holds it.
        self._unsubscribed.append(subscription)

    def next_step(self, subscription: Subscription) -> Step:
        """Return the next step of a reader.

        Raises:
            Exception: A copy of the error of a shared fetch on which the reader waited.
            StoreClosedError: The store was closed.
        """
        with self._mutex:
            subscription.stream.waiting.discard(subscription)  # a late wake-up may be of an earlier wait
            if subscription.queued_steps:
                step = subscription.queued_steps.popleft()
                if isinstance(step, Exception):
                    raise copy_error(step) from step
                return step
            if subscription.stream.tail.deleted:
                if subscription.at_tail or subscription.delivered:  # the next page could be of a new stream of this id
                    return DELETED
                self._join(subscription)
            stream, tail = subscription.stream, subscription.stream.tail
            if stream.id in self._deletes:
                stream.waiting.add(subscription)
                return WAIT
            if not subscription.at_tail:
                return self._start_own_fetch(subscription)
            cached = tail.after(subscription.cursor)
            if cached is None:
                return self._start_own_fetch(subscription)
            if cached:
                subscription.cursor = subscription.delivered = cached[-1].seq
                return Deliver(cached)
            if tail.ended:
                return Ended(tail.status)
            if tail.is_current or stream.fetching is not None:
                stream.waiting.add(subscription)
                return WAIT
            stream.fetching = subscription
            after = stream.fetch_after(subscription.cursor)
            return Fetch(after, tail.next_limit, True, tail.version, tail.min_total, False)

    def fetched(self, subscription: Subscription, fetch: Fetch, page: Page | None) -> list[Subscription]:
        """Take the page of a fetch; None if the stream was not found."""
        with self._mutex:
            stream = subscription.stream
            if fetch.shared:
                stream.fetching = None
            if stream.id in self._deletes:  # the page may be of a new stream of this id
                return []
            if not fetch.shared:
                return self._take_own_page(subscription, fetch, page)
            stream.tail.take(page, fetch.after, fetch.version, fetch.min_total)
            if stream.tail.deleted:
                return self._drop(stream)
            ended = stream.wake_ends_only() if stream.tail.ended else []
            return [*stream.wake_ready(), *stream.wake_one(), *ended]

    def fetch_failed(
        self, subscription: Subscription, fetch: Fetch, error: Exception | None = None
    ) -> list[Subscription]:
        """End a fetch that returned no page.

        Args:
            subscription: The subscription that fetched.
            fetch: The fetch.
            error: Raised by all waiting readers of a shared fetch. Default: None, which wakes one of them to fetch.
        """
        with self._mutex:
            if not fetch.shared:
                return []
            stream = subscription.stream
            stream.fetching = None
            if error is None:
                return stream.wake_one()
            failed, stream.waiting = list(stream.waiting), set()
            for waiting in failed:
                waiting.queued_steps.append(error)
            return failed

    def stop_waiting(self, subscription: Subscription) -> list[Subscription]:
        """End the wait of a reader that was cancelled or timed out; another may have to fetch in its place."""
        with self._mutex:
            subscription.stream.waiting.discard(subscription)
            return subscription.stream.wake_one()

    def appended(self, appended: Iterable[tuple[str, int, Sequence[str]]], newest: int) -> list[Subscription]:
        """Take texts that were appended in this process.

        Args:
            appended: Tuples of the stream id, the sequence number before the first text, and the texts.
            newest: The attribute of this name before the statement. A stream that is followed since then may be a new
                stream of this id.
        """
        woken: list[Subscription] = []
        with self._mutex:
            for stream_id, before, texts in appended:
                for stream in self._streams.get(stream_id, ()):
                    self._quick_polls.pop(stream, None)
                    # In a transaction of the caller, others may not see the chunks yet.
                    known = self._share and stream.number <= newest and stream_id not in self._deletes
                    cached = known and stream.tail.append(before, texts)
                    woken += stream.wake_ready() if cached else stream.mark_stale()
        return woken

    def notified(self, digests: Iterable[str]) -> list[Subscription]:
        """Mark the streams with these digests stale, after a notification. Unknown digests are ignored."""
        with self._mutex:
            stream_ids = [self._ids[digest] for digest in digests if digest in self._ids]
        return self.changed(stream_ids)

    def changed(self, stream_ids: Iterable[str] | None) -> list[Subscription]:
        """Mark streams stale after a change, or with None all streams, as after a reconnect."""
        woken: list[Subscription] = []
        with self._mutex:
            for stream_id in list(self._streams) if stream_ids is None else stream_ids:
                for stream in self._streams.get(stream_id, ()):
                    stream.tail.notified = stream_ids is not None
                    if stream.tail.notified:
                        self._quick_polls.pop(stream, None)
                    # After a reconnect the next poll finds the streams that have ended.
                    woken += stream.mark_stale() if stream_ids is None else stream.changed()
        return woken

    def begin_delete(self, stream_id: str) -> None:
        """Let the readers of a stream wait until `end_delete`: meanwhile, a page may be of a new stream of its id."""
        if self._share:  # else the transaction may yet be rolled back
            with self._mutex:
                self._deletes[stream_id] += 1

    def end_delete(self, stream_id: str, deleted: bool) -> list[Subscription]:
        """Take the outcome of a statement that deletes a stream: whether it is known to have deleted one."""
        woken: list[Subscription] = []
        with self._mutex:
            if self._share:
                self._deletes[stream_id] -= 1
                self.deletions += 1
                for stream in list(self._streams.get(stream_id, ())) if deleted else []:
                    woken += self._drop(stream)
            if not self._deletes[stream_id]:
                del self._deletes[stream_id]
                for stream in self._streams.get(stream_id, ()):
                    woken += [*stream.waiting, *stream.changed()]
                    stream.waiting.clear()
        return list(dict.fromkeys(woken))

    def awaited(self, *, quick: bool = False) -> list[FollowedStream]:
        """Return the streams on which any subscription waits, for a poll. With `quick`, leave out quiet streams."""
        with self._mutex:
            woken = self._remove_unsubscribed()
            if quick:  # chunks of a writer in this process need no poll
                awaited = [stream for stream in self._quick_polls if stream.waiting and not stream.has_writer]
            else:
                awaited = [stream for streams in self._streams.values() for stream in streams if stream.is_awaited]
            for stream in awaited:
                stream.tail.begin_poll()
        wake_all(woken)
        return awaited

    def polled(
        self, streams: Iterable[FollowedStream], states: Mapping[str, tuple[str, int]]
    ) -> tuple[list[Subscription], bool]:
        """Take the result of a poll for `streams`: the states and numbers of chunks of those that exist.

        Returns:
            The subscriptions to wake, and whether the poll found a change. A fetch may already be under way for it.
        """
        woken: list[Subscription] = []
        found = False
        with self._mutex:
            for stream in streams:
                state, total = states.get(stream.id, (None, 0))
                changed = stream.tail.finds_change(state, total)
                found |= changed
                self._count_poll(stream, changed)
                # The poll runs without the settings of the readers, such as those that row-level security uses: if it
                # does not see the stream, one reader reads in its place.
                if changed or state is None:
                    woken += stream.mark_stale()
                if state != "active":  # at each poll, since the status query of a writer may fail
                    woken += stream.wake_ends_only()
        return woken, found

    def get_stats(self) -> dict[str, int]:
        """Return the numbers of followed streams, readers, waiting readers, and writers."""
        with self._mutex:
            # They are only left out: to remove one may wake a task, which only the thread of its event loop may do.
            left = set(self._unsubscribed.copy())
            streams = [stream for streams in self._streams.values() for stream in streams]
            every = [each for stream in streams for each in stream.subscriptions if each not in left]
            writers = sum(each.ends_only for each in every)
            return {
                "streams_followed": len({each.stream.id for each in every}),
                "readers_open": len(every) - writers,
                "readers_waiting": sum(len(stream.waiting - left) for stream in streams),
                "writers_open": writers,
            }

    def is_empty(self) -> bool:
        """Return True if there are no subscriptions."""
        self._release_unsubscribed()
        return not self._streams

    def closed(self) -> list[Subscription]:
        """End all subscriptions with `StoreClosedError`, since the store is closed."""
        with self._mutex:
            every = [each for streams in self._streams.values() for stream in streams for each in stream.subscriptions]
            for subscription in every:
                subscription.queued_steps.append(StoreClosedError("this store was closed during the call"))
            return every

    def failed(self, stream_id: str, error: Exception) -> list[Subscription]:
        """End the readers of a stream with an error, since its producer cannot write it."""
        with self._mutex:
            streams = self._streams.get(stream_id, ())
            readers = [each for stream in streams for each in stream.subscriptions if not each.ends_only]
            for reader in readers:
                reader.queued_steps.append(error)
            return readers

    def _start_own_fetch(self, subscription: Subscription) -> Fetch:
        """Let a reader read on its own, from a snapshot of the tail's version."""
        subscription.at_tail = False
        tail, after = subscription.stream.tail, int(min(subscription.cursor, MAX_NUMBER))
        min_total = max(tail.min_total, subscription.delivered)
        return Fetch(after, subscription.limit, False, tail.version, min_total, tail.ended)

    def _take_own_page(self, subscription: Subscription, fetch: Fetch, page: Page | None) -> list[Subscription]:
        """Take the page of a reader that catches up."""
        stream, version = subscription.stream, fetch.version
        woken: list[Subscription] = []
        if page is None or page.total < subscription.delivered:
            subscription.queued_steps.append(DELETED)
            return stream.changed()
        # Since the fetch began the stream was deleted or has ended: the page may be of a new stream of this id.
        if stream.tail.deleted or (stream.tail.ended and not fetch.ended and page.state == "active"):
            return []
        if fetch.contradicts(page):
            # The page belongs to a new stream of this id, and the tail to the deleted one.
            woken = self._drop(stream)
            if subscription.delivered:
                subscription.queued_steps.append(DELETED)
                return woken
            self._move(subscription, self._follow(stream.id))
            version = NO_VERSION  # the new tail has missed the changes since the snapshot
            stream = subscription.stream
        if page.state != "active" and not stream.tail.ended:  # the writer may not have notified the others
            woken += stream.changed()
        if page.last_seq is not None:
            subscription.queued_steps.append(Deliver(page.chunks))
            subscription.delivered = page.last_seq
        if not page.is_last:
            subscription.cursor, subscription.limit = page.end, page.next_limit
            return woken
        subscription.cursor = max(subscription.cursor, page.total)
        if page.state != "active":
            subscription.queued_steps.append(Ended(page.status))
            return woken
        stream.tail.record_position(version, page.total)
        subscription.at_tail = True
        if page.total > stream.tail.total:  # chunks that the others lack
            woken += stream.mark_stale()
        return woken

    def _join(self, subscription: Subscription) -> None:
        """Move a subscription to the active stream of its id, or to a new one if none is active or shared."""
        stream_id = subscription.stream.id
        streams = self._streams.get(stream_id, set()) if self._share else set()
        active = [stream for stream in streams if not stream.tail.ended]
        self._move(subscription, active[0] if active else self._follow(stream_id))

    def _move(self, subscription: Subscription, stream: FollowedStream) -> None:
        previous = subscription.stream
        previous.subscriptions.discard(subscription)
        if not previous.subscriptions:
            self._forget(previous)
        subscription.stream = stream
        stream.subscriptions.add(subscription)
        if stream.id not in self._streams:
            self._streams[stream.id] = set()
            self._ids[digest_of(stream.id)] = stream.id
        self._streams[stream.id].add(stream)
        if not subscription.ends_only:
            self._quick_polls[stream] = QUICK_POLLS

    def _count_poll(self, stream: FollowedStream, changed: bool) -> None:
        """Let quick polls follow a change, and end after `QUICK_POLLS` polls without one."""
        remaining = QUICK_POLLS if changed else self._quick_polls.get(stream, 0) - 1
        if remaining > 0 and stream.subscriptions:
            self._quick_polls[stream] = remaining
        else:
            self._quick_polls.pop(stream, None)

    def _follow(self, stream_id: str) -> FollowedStream:
        self.newest += 1
        return FollowedStream(stream_id, self.newest)

    def _drop(self, stream: FollowedStream) -> list[Subscription]:
        """Remove a stream that no longer exists."""
        self._forget(stream)
        stream.tail.delete()
        ends_only = stream.wake_ends_only()
        for subscription in ends_only:  # perhaps of a new stream of this id
            self._join(subscription)
        return [*stream.wake_ready(), *ends_only]

    def _forget(self, stream: FollowedStream) -> None:
        self._quick_polls.pop(stream, None)
        streams = self._streams.get(stream.id, set())
        streams.discard(stream)
        if not streams and stream.id in self._streams:
            del self._streams[stream.id], self._ids[digest_of(stream.id)]

    def _release_unsubscribed(self) -> None:
        if self._unsubscribed:
            with self._mutex:
                woken = self._remove_unsubscribed()
            wake_all(woken)

    def _remove_unsubscribed(self) -> list[Subscription]:
        woken: list[Subscription] = []
        while self._unsubscribed:
            subscription = self._unsubscribed.popleft()
            stream = subscription.stream
            stream.subscriptions.discard(subscription)
            stream.waiting.discard(subscription)
            if stream.fetching is subscription:  # interrupted before it could report
                stream.fetching = None
            woken += stream.wake_one()
            if not stream.subscriptions:
                self._forget(stream)
        return woken


def wake_all(subscriptions: Iterable[Subscription]) -> None:
    """Wake subscriptions; the caller holds no mutex."""
    for subscription in subscriptions:
        subscription.wake()
