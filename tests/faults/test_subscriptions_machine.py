"""Random interleavings of readers, writers, notifications and polls, against a database in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from aibind_postgres import StoreClosedError, _followed_stream, _pages, _stream_tail, _subscriptions
from aibind_postgres._followed_stream import Deleted, Deliver, Ended, Fetch, FollowedStream, Subscription, Wait
from aibind_postgres._pages import Page
from aibind_postgres._subscriptions import Subscriptions, wake_all

EXAMPLES = 700
STEPS = 80
MAX_READERS = 4
MAX_CHUNKS = 12
UNREAD = object()


class Numbered:
    """Has a hash that does not depend on its address, so that sets have the same order in each run."""

    numbers = count()

    def __init__(self, *args: Any) -> None:
        self.number = next(self.numbers)
        super().__init__(*args)

    def __hash__(self) -> int:
        return self.number


class NumberedSubscription(Numbered, Subscription):
    pass


class NumberedStream(Numbered, FollowedStream):
    pass


class FetchError(Exception):
    """The error of a failed fetch."""


@dataclass(eq=False)
class Stream:
    """One incarnation of a stream id."""

    id: str
    number: int
    created_at: int
    most_chunks: int
    is_limited: bool
    length: int = 0
    state: str = "active"
    error: str | None = None
    ended_at: float = math.inf  # or deleted
    deleted_at: float = math.inf

    def texts(self, after: int, limit: int) -> list[str]:
        return [f"{self.number}:{seq}" for seq in range(after + 1, min(after + limit, self.length) + 1)]

    def page(self, after: int, limit: int) -> Page | None:
        status = (-self.length, self.state if self.error is None else f"{self.state}\n{self.error}")
        while True:
            rows = [
                (seq, text if seq % 4 or limit == 1 else None)
                for seq, text in enumerate(self.texts(after, limit), after + 1)
            ]
            page = Page.parse([status, *rows], after, limit)
            if page.end > after:
                return page
            limit = page.next_limit


@dataclass(eq=False)
class Reader:
    """One subscription, used as `following` does."""

    number: int
    id: str
    cursor: float
    ends_only: bool
    subscribed_at: int
    status: str = "ready"  # ready, fetching, waiting, done
    woken: bool = False
    woken_at: int = -1
    fetch: Fetch | None = None
    page: object = UNREAD
    stream: Stream | None = None  # known once a chunk has arrived
    failed: bool = False  # the fetch for which it waited has failed
    deletion_reported: bool = False  # of the stream that it reads
    subscription: Subscription = field(init=False)

    def __repr__(self) -> str:
        return f"reader {self.number}"

    @property
    def is_runnable(self) -> bool:
        return not self.ends_only and (self.status == "ready" or (self.status == "waiting" and self.woken))

    @property
    def waits_unwoken(self) -> bool:
        return self.status == "waiting" and not self.woken and not self.ends_only


@dataclass(eq=False)
class Delete:
    """A call that deletes a stream in this process."""

    id: str
    is_committed: bool = False
    stream: Stream | None = None  # the deleted one


class SubscriptionsMachine(RuleBasedStateMachine):
    """Each step chooses one of the actions that are possible now.

    There is a single rule, since hypothesis leaves most rules out of each example.
    """

    def __init__(self) -> None:
        super().__init__()
        Numbered.numbers = count()
        self.clock = 0
        self.streams: dict[str, Stream] = {}
        self.every: list[Stream] = []
        self.readers: list[Reader] = []  # those that are subscribed
        self.reader_numbers = count()
        self.left: list[Reader] = []  # those that have unsubscribed, but are not removed yet
        self.reports: list[tuple[str, Callable[[], list[Subscription]]]] = []  # of changes in this process
        self.deletes: list[Delete] = []
        self.notifications: list[str] = []
        self.polls: list[tuple[list[FollowedStream], dict[str, tuple[str, int]]]] = []

    @initialize(
        share=st.sampled_from([True, True, False]),
        ids=st.sampled_from(["a", "a", "ab"]),
        lossy=st.booleans(),
        blind=st.sampled_from([False, False, True]),
    )
    def open(self, share: bool, ids: str, lossy: bool, blind: bool) -> None:
        self.share, self.ids = share, ids
        self.lossy = lossy  # notifications may be lost, and polls run
        self.blind = blind  # polls see no stream, as under row-level security
        self.subscriptions = Subscriptions(share=share)
        for id in ids:
            self.create(id)

    @rule(choice=st.integers(0, 2**24 - 1))
    def step(self, choice: int) -> None:
        groups = [group for weight, group in self.actions() if group for _ in range(weight)]
        choice, place = divmod(choice, len(groups))
        function, *args = groups[place][choice % len(groups[place])]
        note(f"{function.__name__} {args}")
        function(*args)

    @invariant()
    def advance_clock(self) -> None:
        self.clock += 1

    @invariant()
    def one_shared_fetch_at_a_time(self) -> None:
        tails = [reader.subscription.stream for reader in self.readers if reader.fetch and reader.fetch.shared]
        assert len(tails) == len(set(tails)), "two shared fetches of one tail"

    def actions(self) -> list[tuple[int, list[tuple[Any, ...]]]]:
        """Return the actions that are possible now, in groups with the weight of each group."""
        active = [stream for stream in self.streams.values() if stream.state == "active"]
        growing = [(stream, n) for stream in active for n in (1, 1, 3) if stream.length + n <= stream.most_chunks]
        here = [(stream.id, n) for stream, n in growing if not stream.is_limited]
        fetching = [reader for reader in self.readers if reader.fetch is not None]
        waiting = [reader for reader in self.readers if reader.status == "waiting" and not reader.ends_only]
        free = self.ids if len(self.readers) < MAX_READERS else ""
        notices, both = range(len(self.notifications)), (True, False)
        return [
            (3, [(self.append_here, *args, late) for args in here for late in both]),
            (3, [(self.append_elsewhere, stream.id, n, late) for stream, n in growing for late in both]),
            (1, [(self.end, stream.id, here) for stream in active for here in both]),
            (1, [(self.delete_elsewhere, id) for id in self.streams]),
            (1, [(self.delete_elsewhere, stream.id) for stream in self.streams.values() if stream.state != "active"]),
            (1, [(self.begin_delete, id) for id in self.ids if len(self.deletes) < 2]),
            (3, [(self.commit_delete, each) for each in self.deletes if not each.is_committed]),
            (2, [(self.end_delete, each) for each in self.deletes]),
            (3, [(self.create, id) for id in self.ids if id not in self.streams and self.may_create(id)]),
            (3, [(self.deliver_report, place) for place in range(len(self.reports))]),
            (3, [(self.notify, place, once) for place in notices for once in (True, True, True, False)]),
            (3, [(self.notifications.pop, place) for place in notices if self.lossy]),
            (1, [(self.reconnect,), (self.remove_left,)]),
            (2, [(self.begin_poll,)] if self.lossy else []),
            (3, [(self.end_poll, place) for place in range(len(self.polls))]),
            (3, [(self.subscribe, id, cursor, False) for id in free for cursor in (0, 0, 2, 25, math.inf)]),
            (1, [(self.subscribe, id, math.inf, True) for id in free]),
            (2, [(self.run_all,)]),
            (6, [(self.run, reader) for reader in self.readers if reader.is_runnable]),
            (4, [(self.read, reader) for reader in fetching if reader.page is UNREAD]),
            (4, [(self.report, reader) for reader in fetching]),
            (1, [(self.fail, reader, error, leaves) for reader in fetching for error in both for leaves in both]),
            (1, [(self.stop_waiting, reader, leaves) for reader in waiting for leaves in both]),
            (1, [(self.leave, reader) for reader in [*self.readers, *fetching, *fetching]]),
        ]

    # Writers

    def unaware(self, id: str) -> list[Reader]:
        """Return the readers of a stream that may have been deleted meanwhile, without a report of it."""
        if self.share and any(each.id == id and each.stream is not None for each in self.deletes):
            return []  # they wait for the report
        return [each for each in self.readers if each.id == id and not each.subscription.stream.tail.deleted]

    def may_create(self, id: str) -> bool:
        # The page of a read that began earlier could be of either stream.
        return all(reader.fetch is None for reader in self.unaware(id))

    def create(self, id: str) -> None:
        # A successor that is no shorter looks like its predecessor until the deletion was seen.
        lengths = [
            length
            for reader in self.unaware(id)
            for length in (reader.subscription.stream.tail.min_total, reader.subscription.delivered)
            if length
        ]
        most = min(lengths) - 1 if lengths else MAX_CHUNKS
        self.streams[id] = Stream(id, len(self.every), self.clock, most, bool(lengths))
        self.every.append(self.streams[id])

    def append_here(self, id: str, number: int, late: bool) -> None:
        stream, before = self.streams[id], self.streams[id].length
        stream.length += number
        appended = [(id, before, stream.texts(before, number))]
        self.report_change(id, partial(self.subscriptions.appended, appended, self.subscriptions.newest), late)

    def append_elsewhere(self, id: str, number: int, late: bool) -> None:
        self.streams[id].length += number
        self.notifications.append(id)
        if not late:
            self.notify(len(self.notifications) - 1, True)

    def end(self, id: str, here: bool) -> None:
        stream = self.streams[id]
        stream.ended_at = self.clock
        stream.state, stream.error = ("done", None) if stream.number % 2 else ("error", f"error of {stream.number}")
        if here:
            self.report_change(id, partial(self.subscriptions.changed, [id]), late=True)
        else:
            self.notifications.append(id)

    def remove(self, id: str) -> Stream | None:
        stream = self.streams.pop(id, None)
        if stream is not None:
            stream.deleted_at = self.clock
            stream.ended_at = min(stream.ended_at, self.clock)
        return stream

    def delete_elsewhere(self, id: str) -> None:
        # A late report of texts looks like one of the successor. Deletions in this process are told apart.
        for place in reversed(range(len(self.reports))):
            if self.reports[place][0] == id:
                self.deliver_report(place)
        self.remove(id)
        self.notifications.append(id)

    def begin_delete(self, id: str) -> None:
        self.deletes.append(Delete(id))
        self.subscriptions.begin_delete(id)

    def commit_delete(self, delete: Delete) -> None:
        delete.is_committed, delete.stream = True, self.remove(delete.id)

    def end_delete(self, delete: Delete) -> None:
        """Report the outcome of a delete, which is an error if it is not committed."""
        self.deletes.remove(delete)
        if delete.stream is not None and self.share:
            for reader in self.readers:
                reader.deletion_reported |= reader.stream is delete.stream
        wake_all(self.subscriptions.end_delete(delete.id, delete.stream is not None))

    # Reports, notifications and polls

    def report_change(self, id: str, call: Callable[[], list[Subscription]], late: bool) -> None:
        self.reports.append((id, call))
        if not late:
            self.deliver_report(len(self.reports) - 1)

    def deliver_report(self, place: int) -> None:
        wake_all(self.reports.pop(place)[1]())

    def notify(self, place: int, once: bool) -> None:
        id = self.notifications.pop(place) if once else self.notifications[place]
        wake_all(self.subscriptions.changed([id]))

    def reconnect(self) -> None:
        wake_all(self.subscriptions.changed(None))

    def begin_poll(self) -> None:
        self.left.clear()
        visible = {} if self.blind else self.streams
        found = {id: (stream.state, stream.length) for id, stream in visible.items()}
        self.polls.append((self.subscriptions.awaited(), found))

    def end_poll(self, place: int) -> None:
        woken, _ = self.subscriptions.polled(*self.polls.pop(place))
        wake_all(woken)

    # Readers

    def subscribe(self, id: str, cursor: float, ends_only: bool) -> None:
        reader = Reader(next(self.reader_numbers), id, cursor, ends_only, self.clock)

        def wake() -> None:
            assert self.subscriptions._mutex.acquire(blocking=False), "a callback runs while the mutex is held"
            self.subscriptions._mutex.release()
            reader.woken, reader.woken_at = True, self.clock

        self.left.clear()
        reader.subscription = self.subscriptions.subscribe(id, cursor, wake, ends_only=ends_only)
        self.readers.append(reader)

    def leave(self, reader: Reader) -> None:
        self.readers.remove(reader)
        self.left.append(reader)
        self.subscriptions.unsubscribe(reader.subscription)

    def run(self, reader: Reader) -> None:
        if reader.status == "waiting":
            reader.woken = False
        reader.status = "ready"
        is_known_deleted = reader.deletion_reported and not reader.subscription.queued_steps
        try:
            step = self.subscriptions.next_step(reader.subscription)
        except FetchError:
            assert reader.failed, "the error of a fetch for which it did not wait"
            reader.failed = False
            return
        assert not reader.failed, "the error of a fetch is lost"
        assert not is_known_deleted or isinstance(step, Deleted), "a reader of a deleted stream goes on"
        match step:
            case Deliver(chunks):
                self.check_chunks(reader, list(chunks))
            case Fetch():
                reader.status, reader.fetch = "fetching", step
                followed = reader.subscription.stream
                waiting = [each for each in self.readers if each.waits_unwoken and each.subscription.stream is followed]
                skips = step.shared and step.after > followed.tail.end
                assert not (skips and any(each.cursor < math.inf for each in waiting)), (
                    "a shared fetch skips chunks for which others wait"
                )
            case Wait():
                reader.status = "waiting"
            case Ended(status):
                ends = [(stream.state, stream.error, stream.length) for stream in self.candidates(reader)]
                assert status.state != "active"
                assert status in ends, "the end of another stream"
                assert reader.cursor >= status.total_chunks, "ended before the last chunk"
                self.leave(reader)
            case Deleted():
                for stream in [reader.stream] if reader.stream else self.candidates(reader):
                    existed = stream.created_at <= reader.subscribed_at or reader.stream
                    assert not existed or stream.deleted_at < math.inf, "the stream was not deleted"
                self.leave(reader)

    def candidates(self, reader: Reader) -> list[Stream]:
        """Return the streams that a reader may see: those that existed after it subscribed."""
        if reader.stream is not None:
            return [reader.stream]
        return [stream for stream in self.every if stream.id == reader.id and stream.deleted_at >= reader.subscribed_at]

    def check_chunks(self, reader: Reader, chunks: list[Any]) -> None:
        assert chunks
        for seq, text in chunks:
            if reader.stream is None:
                reader.stream = self.every[int(text.partition(":")[0])]
                assert reader.stream in [each for each in self.every if each.deleted_at >= reader.subscribed_at]
            assert seq == reader.cursor + 1, "a chunk is missing or was delivered twice"
            assert [text] == reader.stream.texts(seq - 1, 1), "a chunk of another stream"
            reader.cursor = seq

    def remove_left(self) -> None:
        self.left.clear()
        self.subscriptions.awaited()

    def read(self, reader: Reader) -> None:
        stream = self.streams.get(reader.id)
        reader.page = stream.page(reader.fetch.after, reader.fetch.limit) if stream else None

    def report(self, reader: Reader) -> None:
        if reader.page is UNREAD:
            self.read(reader)
        fetch, page = reader.fetch, reader.page
        reader.status, reader.fetch, reader.page = "ready", None, UNREAD
        wake_all(self.subscriptions.fetched(reader.subscription, fetch, page))
        if fetch.shared:
            self.check_hand_over(reader.subscription.stream, reader)

    def fail(self, reader: Reader, is_error: bool, leaves: bool) -> None:
        """Let a fetch fail, or cancel it."""
        fetch, followed = reader.fetch, reader.subscription.stream
        reader.status, reader.fetch, reader.page = "ready", None, UNREAD
        if is_error and fetch.shared:
            for each in self.readers:
                each.failed |= each.waits_unwoken and each.subscription.stream is followed
        wake_all(self.subscriptions.fetch_failed(reader.subscription, fetch, FetchError() if is_error else None))
        self.check_hand_over(followed, reader)
        if leaves:
            self.leave(reader)

    def stop_waiting(self, reader: Reader, leaves: bool) -> None:
        """Cancel a wait or let it time out, also of a reader that was just woken."""
        reader.status, reader.woken = "ready", False
        wake_all(self.subscriptions.stop_waiting(reader.subscription))
        self.check_hand_over(reader.subscription.stream, reader)
        if leaves:
            self.leave(reader)

    def check_hand_over(self, followed: FollowedStream, reader: Reader) -> None:
        """Check that a reader that may leave has another one fetch."""
        others = [each for each in self.readers if each is not reader and each.subscription.stream is followed]
        # A reader that has left may have been chosen: its removal wakes another one.
        if (
            not self.left
            and all(each.id != followed.id for each in self.deletes)
            and not followed.tail.is_current
            and any(each.waits_unwoken for each in others)
            and followed.fetching is None
        ):
            assert any(each.is_runnable for each in others), "a reader waits, and no other one fetches"

    def run_all(self) -> None:
        """Run all readers until none can go on."""
        for _ in range(200):
            for reader in [reader for reader in self.readers if reader.fetch is not None]:
                self.report(reader)
            runnable = [reader for reader in self.readers if reader.is_runnable]
            if not runnable:
                break
            for reader in runnable:
                self.run(reader)
        else:
            raise AssertionError("readers run without end")
        if not self.lossy and not self.left:  # a reader that has left may have been woken, or have been fetching
            unreported = {*self.notifications, *[id for id, _ in self.reports], *[each.id for each in self.deletes]}
            for reader in self.readers:
                if reader.id not in unreported:
                    self.check_complete(reader)

    # The end of an example

    def teardown(self) -> None:
        if not hasattr(self, "subscriptions"):
            return
        self.remove_left()
        self.run_all()
        while self.reports:
            self.deliver_report(0)
        while self.deletes:
            self.end_delete(self.deletes[0])
        while self.notifications and not self.lossy:
            self.notify(0, True)
        self.run_all()
        self.remove_left()
        if self.lossy:
            for _ in range(2):  # the first leaves changes to notifications
                self.begin_poll()
                self.end_poll(-1)
            self.run_all()
        for reader in self.readers:
            self.check_complete(reader)
        wake_all(self.subscriptions.closed())
        for reader in self.readers:
            assert reader.woken, "a reader waits for a closed store"
            with pytest.raises(StoreClosedError):
                self.subscriptions.next_step(reader.subscription)
            self.subscriptions.unsubscribe(reader.subscription)
        assert self.subscriptions.awaited() == []
        assert self.subscriptions.closed() == []

    def check_complete(self, reader: Reader) -> None:
        stream = self.streams.get(reader.id)
        if reader.ends_only:
            # A poll does not find the end of a stream that was deleted and created again.
            ended = [
                each.ended_at
                for each in self.every
                if each.id == reader.id
                and reader.subscribed_at < each.ended_at < math.inf
                and (not self.lossy or stream in (each, None))
            ]
            assert reader.woken_at >= max(ended, default=-1), "a writer was not woken by the end of its stream"
            return
        assert stream is not None, "a reader waits for a deleted stream"
        assert stream.state == "active", "a reader waits for a stream that has ended"
        assert reader.stream in (None, stream), "a reader waits for a predecessor of its stream"
        assert reader.cursor >= stream.length, "a reader waits although there are chunks"


def test_random_interleavings(monkeypatch):
    # So small that a few chunks fill pages and tails.
    monkeypatch.setattr(_followed_stream, "FIRST_PAGE_CHUNKS", 2)
    monkeypatch.setattr(_stream_tail, "SHARED_PAGE_CHUNKS", 2)
    monkeypatch.setattr(_stream_tail, "TAIL_CHUNKS", 3)
    monkeypatch.setattr(_pages, "MAX_PAGE_CHUNKS", 3)
    monkeypatch.setattr(_subscriptions, "Subscription", NumberedSubscription)
    monkeypatch.setattr(_subscriptions, "FollowedStream", NumberedStream)
    run_state_machine_as_test(
        SubscriptionsMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
