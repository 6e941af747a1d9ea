"""Random interleavings of readers, writers, notifications and polls, against a database in memory."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import Lock
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from aibind_postgres import StoreClosedError, _pages, _stream_tail, _subscriptions
from aibind_postgres._pages import Page
from aibind_postgres._subscriptions import (
    Deleted,
    Deliver,
    Ended,
    Fetch,
    Subscription,
    Subscriptions,
    Wait,
    wake_all,
)

EXAMPLES = int(os.environ.get("SUBSCRIPTIONS_EXAMPLES", "200"))
STEPS = 80
UNREAD = object()


class NumberedSubscription(Subscription):
    """Has a hash that does not depend on its address, so that hypothesis can repeat an example."""

    __slots__ = ("number",)
    numbers = count()

    def __init__(self, *arguments) -> None:
        self.number = next(self.numbers)
        super().__init__(*arguments)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class FetchError(Exception):
    """The error of a failed fetch."""


@dataclass(eq=False)
class Stream:
    """One incarnation of a stream id."""

    id: str
    incarnation: int
    created_at: int
    recreated_elsewhere: bool = False
    chunks: list[str] = field(default_factory=list)
    state: str = "active"
    error: str | None = None
    ended_at: float = math.inf  # or deleted
    deleted_at: float = math.inf

    def append(self, number: int) -> list[str]:
        texts = [f"{self.incarnation}:{len(self.chunks) + place}" for place in range(1, number + 1)]
        self.chunks += texts
        return texts

    @property
    def rows(self) -> list[tuple[int, str]]:
        return [(-len(self.chunks), self.state if self.error is None else f"{self.state}\n{self.error}")]

    def page(self, after: int, limit: int) -> Page | None:
        chunks = enumerate(self.chunks[after : after + limit], after + 1)
        return Page.parse([*self.rows, *chunks], after, limit)


@dataclass(eq=False)
class Reader:
    """One subscription, as `following` uses it."""

    id: str
    cursor: float
    ends_only: bool
    subscribed_at: int
    since: int  # when the oldest fetch began that was under way when it subscribed
    status: str = "ready"  # ready, fetching, waiting, done or left
    woken: bool = False
    woken_at: int = -1
    fetch: Fetch | None = None
    fetch_began_at: int = 0
    page: object = UNREAD
    stream: Stream | None = None  # once a chunk has arrived
    received: int = 0  # number of the last chunk
    outcome: Ended | Deleted | None = None
    failed: bool = False  # it waited for a fetch that failed
    closed: bool = False

    @property
    def is_live(self) -> bool:
        return self.status in ("ready", "fetching", "waiting")

    @property
    def is_runnable(self) -> bool:
        return not self.ends_only and (self.status == "ready" or (self.status == "waiting" and self.woken))


@dataclass(eq=False)
class Poll:
    tails: list[object]
    found: dict[str, tuple[str, int]]


class SubscriptionsMachine(RuleBasedStateMachine):
    locks: ClassVar[list[Lock]] = []  # the mutexes of all registries

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self.incarnations = count(1)
        self.streams: dict[str, Stream] = {}
        self.every: list[Stream] = []
        self.absences: dict[str, list[list[float]]] = {}
        self.exposed: dict[str, list[Reader]] = {}
        self.old_tails: dict[str, set[object]] = {}
        self.readers: list[Reader] = []
        self.reports: list[tuple[str, object]] = []  # calls in this process that come late: stream id, call
        self.notifications: list[tuple[str, bool]] = []  # stream id, whether it may be lost
        self.polls: list[Poll] = []

        NumberedSubscription.numbers = count()

    @initialize(share=st.sampled_from([True, True, False]), ids=st.sampled_from(["a", "ab"]))
    def open(self, share, ids):
        self.share = share
        self.ids = list(ids)
        self.absences = {id: [[0, math.inf]] for id in ids}
        self.exposed = {id: [] for id in ids}
        self.old_tails = {id: set() for id in ids}
        self.subscriptions = Subscriptions(share=share)

    # The database

    def existing(self, active: bool = False) -> list[str]:
        return sorted(id for id, stream in self.streams.items() if not active or stream.state == "active")

    def room(self, id: str) -> int:
        """Return how many chunks may be appended.

        A stream that was re-created elsewhere and is no shorter than its predecessor cannot be told from it.
        """
        stream = self.streams[id]
        exposed = [reader for reader in self.exposed[id] if reader.is_live and reader.stream is not stream]
        most = max(0, min(reader.received for reader in exposed) - 1) if exposed else 20
        tails = {reader.subscription.stream for reader in self.readers if reader.is_live} & self.old_tails[id]
        most = min([most, *(tail.tail.least_total - 1 for tail in tails if tail.tail.least_total and not tail.tail.deleted)])
        return max(0, most - len(stream.chunks))

    def add_stream(self, id: str) -> None:
        self.flush(id)
        self.absences[id][-1][1] = self.clock
        stream = self.streams[id] = Stream(id, next(self.incarnations), self.clock)
        self.every.append(stream)
        if any(reader.is_live for reader in self.exposed[id]):
            # A poll does not notice that a stream has become shorter: its snapshot may be older than the tail.
            self.notifications.append((id, False))

    def remove_stream(self, id: str, elsewhere: bool) -> None:
        stream = self.streams.pop(id)
        stream.deleted_at = self.clock
        stream.ended_at = min(stream.ended_at, self.clock)
        self.absences[id].append([self.clock, math.inf])
        if elsewhere:
            exposed = [reader for reader in self.readers if reader.id == id and reader.is_live]
            self.exposed[id] += exposed
            self.old_tails[id].update(reader.subscription.stream for reader in exposed)

    def was_absent(self, id: str, begin: float, end: float) -> bool:
        return any(start <= end and stop >= begin for start, stop in self.absences[id])

    def flush(self, id: str) -> None:
        """Deliver the late reports on a stream before another one gets its id."""
        for report in [report for report in self.reports if report[0] == id]:
            self.deliver_report(report)

    def deliver_report(self, report: tuple[str, object]) -> None:
        self.reports.remove(report)
        wake_all(report[1]())

    def pick(self, data, items):
        return items[data.draw(st.integers(0, len(items) - 1))]

    # Writers

    @precondition(lambda self: len(self.streams) < len(self.ids))
    @rule(data=st.data())
    def create(self, data):
        self.add_stream(self.pick(data, [id for id in self.ids if id not in self.streams]))

    @precondition(lambda self: any(self.room(id) for id in self.existing(active=True)))
    @rule(data=st.data(), number=st.integers(1, 4), late=st.sampled_from([False, False, True]))
    def append_here(self, data, number, late):
        id = self.pick(data, [id for id in self.existing(active=True) if self.room(id)])
        stream = self.streams[id]
        before = len(stream.chunks)
        texts = stream.append(min(number, self.room(id)))
        report = (id, partial(self.subscriptions.appended, [(id, before, texts)]))
        self.reports.append(report)
        if not late:
            self.deliver_report(report)

    @precondition(lambda self: any(self.room(id) for id in self.existing(active=True)))
    @rule(data=st.data(), number=st.integers(1, 4))
    def append_elsewhere(self, data, number):
        id = self.pick(data, [id for id in self.existing(active=True) if self.room(id)])
        self.streams[id].append(min(number, self.room(id)))
        self.notifications.append((id, True))

    @precondition(lambda self: self.existing(active=True))
    @rule(data=st.data(), state=st.sampled_from(["done", "stopped", "error"]), here=st.booleans(), late=st.booleans())
    def end(self, data, state, here, late):
        stream = self.streams[self.pick(data, self.existing(active=True))]
        stream.state, stream.ended_at = state, self.clock
        stream.error = f"error of {stream.incarnation}" if state == "error" else None
        if here:
            self.reports.append((stream.id, partial(self.subscriptions.changed, [stream.id])))
            if not late:
                self.deliver_report(self.reports[-1])
        else:
            self.notifications.append((stream.id, True))

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), late=st.booleans(), again=st.booleans())
    def delete_here(self, data, late, again):
        id = self.pick(data, self.existing())
        self.remove_stream(id, elsewhere=not self.share)
        self.reports.append((id, partial(self.subscriptions.deleted, id)))
        if not late:
            self.deliver_report(self.reports[-1])
        if again:
            self.add_stream(id)

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), again=st.booleans())
    def delete_elsewhere(self, data, again):
        id = self.pick(data, self.existing())
        self.remove_stream(id, elsewhere=True)
        self.notifications.append((id, True))
        if again:
            self.add_stream(id)

    # Reports and notifications

    @precondition(lambda self: self.reports)
    @rule(data=st.data())
    def report(self, data):
        self.deliver_report(self.pick(data, self.reports))

    @precondition(lambda self: self.notifications)
    @rule(data=st.data(), twice=st.booleans())
    def notify(self, data, twice):
        notification = self.pick(data, self.notifications)
        if not twice:
            self.notifications.remove(notification)
        wake_all(self.subscriptions.changed([notification[0]]))

    @precondition(lambda self: any(may_be_lost for _, may_be_lost in self.notifications))
    @rule(data=st.data())
    def lose_notification(self, data):
        self.notifications.remove(self.pick(data, [each for each in self.notifications if each[1]]))

    @rule()
    def reconnect(self):
        wake_all(self.subscriptions.changed(None))

    @rule()
    def begin_poll(self):
        tails = self.subscriptions.awaited()
        found = {id: (stream.state, len(stream.chunks)) for id, stream in self.streams.items()}
        self.polls.append(Poll(tails, found))

    @precondition(lambda self: self.polls)
    @rule(data=st.data())
    def end_poll(self, data):
        poll = self.pick(data, self.polls)
        self.polls.remove(poll)
        wake_all(self.subscriptions.polled(poll.tails, poll.found))

    # Readers

    @rule(
        data=st.data(),
        cursor=st.one_of(st.just(0), st.integers(0, 6), st.sampled_from([25, math.inf])),
        ends_only=st.sampled_from([False] * 5 + [True]),
    )
    def subscribe(self, data, cursor, ends_only):
        id = self.pick(data, self.ids)
        began = [reader.fetch_began_at for reader in self.readers if reader.id == id and reader.status == "fetching"]
        if ends_only:
            cursor = math.inf
        reader = Reader(id, cursor, ends_only, self.clock, min([self.clock, *began]))
        reader.status = "waiting" if ends_only else "ready"

        def wake():
            assert not self.locks[-1].locked(), "a callback runs while the mutex is held"
            reader.woken, reader.woken_at = True, self.clock

        reader.subscription = self.subscriptions.subscribe(id, cursor, wake, ends_only=ends_only)
        self.readers.append(reader)

    @precondition(lambda self: self.runnable())
    @rule(data=st.data())
    def step(self, data):
        self.run_step(self.pick(data, self.runnable()))

    @precondition(lambda self: self.runnable())
    @rule()
    def run_all(self):
        """Ask all runnable readers once, since otherwise few of them get to wait."""
        for reader in self.runnable():
            self.run_step(reader)

    @precondition(lambda self: self.unread())
    @rule(data=st.data())
    def read_page(self, data):
        self.read(self.pick(data, self.unread()))

    @precondition(lambda self: self.read_pages())
    @rule(data=st.data())
    def report_page(self, data):
        self.report_fetch(self.pick(data, self.read_pages()))

    @precondition(lambda self: self.fetching())
    @rule()
    def fetch_all(self):
        for reader in self.fetching():
            self.read(reader)
            self.report_fetch(reader)

    @precondition(lambda self: self.fetching())
    @rule(data=st.data(), cancelled=st.booleans(), leaves=st.booleans())
    def fail_fetch(self, data, cancelled, leaves):
        reader = self.pick(data, self.fetching())
        waiting = [each for each in self.readers if each.status == "waiting" and not each.ends_only]
        before = {each: each.woken for each in waiting}
        error = None if cancelled else FetchError("the server is gone")
        reader.status = "ready"
        woken = self.subscriptions.fetch_failed(reader.subscription, reader.fetch, error)
        if cancelled:
            assert len(woken) <= 1
        else:
            for each in before:
                each.failed |= each.subscription in woken
        wake_all(woken)
        if leaves:
            self.leave(reader)

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), leaves=st.booleans())
    def stop_waiting(self, data, leaves):
        """Cancel a wait or let it time out, also of a reader that was just woken."""
        reader = self.pick(data, self.waiting())
        reader.status = "ready"
        wake_all(self.subscriptions.stop_waiting(reader.subscription))
        if leaves:
            self.leave(reader)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def unsubscribe(self, data):
        self.leave(self.pick(data, self.live()))

    @precondition(lambda self: len(self.live()) > 3)
    @rule(really=st.sampled_from([False] * 5 + [True]))
    def close(self, really):
        if not really:
            return
        wake_all(self.subscriptions.closed())
        for reader in self.live():
            if reader.status == "fetching":
                wake_all(self.subscriptions.fetch_failed(reader.subscription, reader.fetch, StoreClosedError()))
                reader.status = "ready"
            elif reader.status == "waiting":
                assert reader.woken, "a reader waits for a closed store"
            if not reader.ends_only:
                with suppress(StoreClosedError):
                    step = self.subscriptions.next_step(reader.subscription)
                    assert not isinstance(step, Wait), "a reader of a closed store goes on"
            self.leave(reader)
        assert self.subscriptions.awaited() == []
        assert self.subscriptions.closed() == []
        for id in self.ids:
            self.flush(id)
        self.polls.clear()
        self.subscriptions = Subscriptions(share=self.share)

    def live(self):
        return [reader for reader in self.readers if reader.is_live]

    def runnable(self):
        return [reader for reader in self.readers if reader.is_runnable]

    def waiting(self):
        return [reader for reader in self.readers if reader.status == "waiting" and not reader.ends_only]

    def fetching(self):
        return [reader for reader in self.readers if reader.status == "fetching"]

    def unread(self):
        return [reader for reader in self.fetching() if reader.page is UNREAD]

    def read_pages(self):
        return [reader for reader in self.fetching() if reader.page is not UNREAD]

    def leave(self, reader):
        reader.status = "left"
        self.subscriptions.unsubscribe(reader.subscription)

    def read(self, reader):
        if reader.page is UNREAD:
            stream = self.streams.get(reader.id)
            reader.page = stream.page(reader.fetch.after, reader.fetch.limit) if stream else Page.parse([], 0, 0)

    def report_fetch(self, reader):
        reader.status = "ready"
        wake_all(self.subscriptions.fetched(reader.subscription, reader.fetch, reader.page))

    def run_step(self, reader):
        if reader.status == "waiting":
            reader.woken = False
        reader.status = "ready"
        try:
            step = self.subscriptions.next_step(reader.subscription)
        except FetchError:
            assert reader.failed, "the error of a fetch for which it did not wait"  # raised at times
            reader.failed = False
            return
        assert not reader.failed, "the error of a fetch is lost"
        match step:
            case Deliver(chunks):
                self.check_chunks(reader, chunks)
            case Fetch():
                reader.fetch, reader.page, reader.status = step, UNREAD, "fetching"
                reader.fetch_began_at = self.clock
            case Wait():
                reader.status = "waiting"
            case Ended(status):
                self.check_end(reader, status)
                reader.outcome, reader.status = step, "done"
            case Deleted():
                self.check_deleted(reader)
                reader.outcome, reader.status = step, "done"
        if reader.status == "done":
            self.subscriptions.unsubscribe(reader.subscription)

    # What readers may see

    def candidates(self, reader):
        """Return the streams that a reader may see: those that existed after it subscribed."""
        if reader.stream is not None:
            return [reader.stream]
        return [stream for stream in self.every if stream.id == reader.id and stream.deleted_at >= reader.since]

    def check_chunks(self, reader, chunks):
        assert chunks
        for chunk in chunks:
            if reader.stream is None:
                [reader.stream] = [stream for stream in self.candidates(reader) if chunk.data in stream.chunks]
            assert chunk.seq == reader.cursor + 1, "a chunk is missing or was delivered twice"
            assert chunk.data == reader.stream.chunks[chunk.seq - 1], "a chunk of another stream"
            reader.cursor = reader.received = chunk.seq

    def check_end(self, reader, status):
        ends = [(stream.state, stream.error, len(stream.chunks)) for stream in self.candidates(reader)]
        assert status.state != "active"
        assert status in ends, "the end of another stream"
        assert reader.cursor >= status.total_chunks, "ended before the last chunk"

    def check_deleted(self, reader):
        if reader.stream is not None:
            assert reader.stream.deleted_at < math.inf or self.was_absent(reader.id, reader.since, reader.subscribed_at)
        else:
            assert self.was_absent(reader.id, reader.since, self.clock), "the stream was always there"

    @invariant()
    def advance_clock(self):
        self.clock += 1

    @invariant()
    def one_shared_fetch_at_a_time(self):
        fetching = [reader for reader in self.fetching() if reader.fetch.shared]
        tails = [reader.subscription.stream for reader in fetching]
        assert len(tails) == len(set(tails)), "two shared fetches of one tail"
        if self.share:
            ids = [stream.id for stream in tails if not stream.tail.deleted]
            assert len(ids) == len(set(ids)), "two shared fetches of one stream"

    def settle(self):
        """Run all readers until none can go on."""
        for _ in range(1000):
            if not self.fetching() and not self.runnable():
                self.subscriptions.awaited()  # removes those that have unsubscribed
                if not self.runnable():
                    stale = [reader for reader in self.waiting() if not reader.subscription.stream.tail.is_current]
                    assert not stale, "a change was noticed, and no reader fetches it"
                    return
            for reader in self.fetching():
                self.read(reader)
                self.report_fetch(reader)
            for reader in self.runnable():
                self.run_step(reader)
        raise AssertionError("readers run without end")

    def teardown(self):
        if not hasattr(self, "share"):
            return
        self.settle()  # first, since a report or a poll would make up for a lost wake-up
        for id in self.ids:
            self.flush(id)
        for id, may_be_lost in self.notifications:
            if not may_be_lost:
                wake_all(self.subscriptions.changed([id]))
        while self.polls:
            poll = self.polls.pop()
            wake_all(self.subscriptions.polled(poll.tails, poll.found))
        self.settle()
        for _ in range(2):  # what a notification may still bring is left to it until the next poll
            self.begin_poll()
            poll = self.polls.pop()
            wake_all(self.subscriptions.polled(poll.tails, poll.found))
        self.settle()
        for reader in self.live():
            stream = self.streams.get(reader.id)
            if reader.ends_only:
                self.check_woken(reader)
                continue
            assert stream is not None, "a reader waits for a deleted stream"
            assert stream.state == "active", "a reader waits for a stream that has ended"
            assert reader.stream in (None, stream), "a reader waits for a predecessor of its stream"
            assert reader.cursor >= len(stream.chunks), "a reader waits although there are chunks"
        for reader in self.live():
            self.leave(reader)
        assert self.subscriptions.awaited() == []
        assert self.subscriptions.closed() == []

    def check_woken(self, reader):
        for stream in self.every:
            # Of a later stream of this id a poll may find the same result as before, which counts once.
            existed = stream.created_at <= reader.subscribed_at < stream.ended_at
            if stream.id == reader.id and existed and stream.ended_at < math.inf:
                assert reader.woken_at >= stream.ended_at, "a writer was not woken by the end of its stream"


def test_random_interleavings(monkeypatch):
    # So small that a few chunks fill pages and tails.
    monkeypatch.setattr(_subscriptions, "FIRST_PAGE_CHUNKS", 2)
    monkeypatch.setattr(_subscriptions, "LIVE_PAGE_CHUNKS", 3)
    monkeypatch.setattr(_stream_tail, "TAIL_CHUNKS", 4)
    monkeypatch.setattr(_stream_tail, "LIVE_PAGE_CHUNKS", 3)
    monkeypatch.setattr(_subscriptions, "Subscription", NumberedSubscription)
    monkeypatch.setattr(_pages, "MAX_PAGE_CHUNKS", 3)

    def make_lock():
        SubscriptionsMachine.locks[:] = [Lock()]
        return SubscriptionsMachine.locks[0]

    monkeypatch.setattr(_subscriptions, "Lock", make_lock)
    run_state_machine_as_test(
        SubscriptionsMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
