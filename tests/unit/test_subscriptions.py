"""Live reading without I/O: the tail of a stream, and the subscriptions to wake."""

from __future__ import annotations

import math

import pytest

from aibind_postgres import StoreClosedError, _stream_tail
from aibind_postgres._followed_stream import Deleted, Deliver, Ended, Fetch, FollowedStream, Wait
from aibind_postgres._pages import PAGE_CHARACTERS, Page
from aibind_postgres._poll_pace import QUICK_POLLS
from aibind_postgres._stream_tail import SHARED_PAGE_CHUNKS, StreamTail
from aibind_postgres._subscriptions import Subscriptions, wake_all


def take_page(tail, version, after, rows, least=None):
    """Pass the page of a shared fetch to a tail."""
    least = tail.total if least is None else least
    tail.take(page(rows, after), after, version, least)


def page(rows, after=0):
    return Page.parse(rows, after, _stream_tail.SHARED_PAGE_CHUNKS)


def rows(state, total, *seqs, text="x"):
    return [(-total, state), *[(seq, text) for seq in seqs]]


def test_tail_keeps_last_chunks():
    tail = StreamTail()
    tail.record_position(1, 5)
    assert tail.is_current
    assert tail.after(5) == ()
    assert tail.after(4) is None  # no longer, or not yet, in the tail
    tail.mark_stale()
    assert not tail.is_current
    take_page(tail, 2, 5, rows("active", 7, 6, 7))
    assert tail.is_current
    assert tail.after(5) == [(6, "x"), (7, "x")]
    assert tail.after(6) == [(7, "x")]
    assert tail.after(7) == tail.after(100) == ()
    take_page(tail, 2, 7, rows("done", 8, 8))
    assert tail.ended
    assert tail.after(5) == [(6, "x"), (7, "x"), (8, "x")]


def test_fetch_from_before_the_latest_change_leaves_tail_stale():
    tail = StreamTail()
    tail.mark_stale()
    take_page(tail, 1, 0, rows("active", 1, 1))
    assert not tail.is_current
    assert tail.after(0) == [(1, "x")]


def test_tail_limits_keep_the_newest_page(monkeypatch):
    monkeypatch.setattr(_stream_tail, "TAIL_CHARACTERS", 100)
    monkeypatch.setattr(_stream_tail, "TAIL_CHUNKS", 5)
    tail = StreamTail()
    take_page(tail, 1, 0, rows("active", 8, *range(1, 9)))
    assert tail.after(0) == [(seq, "x") for seq in range(1, 9)]
    take_page(tail, 1, 8, rows("active", 10, 9, 10))
    assert tail.after(4) is None
    assert [seq for seq, _ in tail.after(5)] == [6, 7, 8, 9, 10]
    take_page(tail, 1, 10, rows("active", 12, 11, 12, text="x" * 200))
    assert tail.after(9) is None
    assert [seq for seq, _ in tail.after(10)] == [11, 12]


def test_poll_ignores_a_notified_change_once():
    tail = StreamTail()
    tail.record_position(1, 0)
    tail.notified = True
    assert not tail.finds_change("active", 1)
    assert tail.finds_change("active", 1)  # the notification did not arrive
    assert tail.finds_change("active", 2)  # nor will that of a later change
    tail.notified = True
    assert not tail.finds_change("done", 2)
    assert tail.finds_change("done", 2)


def test_poll_reports_each_change_once():
    tail = StreamTail()
    tail.record_position(tail.version, 3)
    assert tail.finds_change("active", 3) is False
    assert tail.finds_change("active", 5) is True
    assert tail.finds_change("active", 5) is False  # reported before; a reader has fetched and waits again
    assert tail.finds_change("active", 6) is True
    assert tail.finds_change(None, 0) is True
    assert tail.finds_change("done", 6) is True


def test_lower_total_means_deleted():
    tail = StreamTail()
    take_page(tail, 1, 0, rows("active", 5, 1, 2, 3, 4, 5))
    take_page(tail, 2, 5, rows("active", 1))
    assert tail.deleted
    other = StreamTail()
    take_page(other, 1, 0, [])
    assert other.deleted
    take_page(other, 2, 0, rows("active", 1, 1))  # from an earlier fetch, or of a new stream with this id
    assert other.deleted


def test_full_page_leaves_tail_stale(monkeypatch):
    monkeypatch.setattr(_stream_tail, "SHARED_PAGE_CHUNKS", 2)
    tail = StreamTail()
    take_page(tail, 1, 0, rows("done", 3, 1, 2))
    assert not tail.is_current
    assert not tail.ended
    take_page(tail, 1, 2, rows("done", 3, 3))
    assert tail.is_current
    assert tail.ended
    assert [seq for seq, _ in tail.after(0)] == [1, 2, 3]


def test_tail_does_not_span_a_gap():
    tail = StreamTail()
    tail.record_position(1, 2)
    tail.mark_stale()
    take_page(tail, 2, 2, rows("active", 2 * SHARED_PAGE_CHUNKS))
    assert tail.is_current
    assert tail.after(2) is None
    assert tail.after(2 * SHARED_PAGE_CHUNKS) == ()
    assert tail.append(2 * SHARED_PAGE_CHUNKS, ["x"])
    assert tail.after(2 * SHARED_PAGE_CHUNKS) == [(2 * SHARED_PAGE_CHUNKS + 1, "x")]


def test_cursor_outside_the_tail():
    stream = FollowedStream("a", 1)
    tail = stream.tail
    assert stream.fetch_after(7) == 7
    assert stream.fetch_after(math.inf) == 2**63 - 1
    take_page(tail, 1, 2**63 - 1, rows("active", 4))
    assert tail.is_current
    assert tail.after(3) is None
    assert tail.after(4) == ()
    take_page(tail, 2, 2, rows("active", 5, 3, 4, 5))
    assert tail.after(3) is None
    assert [seq for seq, _ in tail.after(4)] == [5]
    take_page(tail, 3, 9, rows("active", 10, 10))
    assert tail.after(5) is None
    assert [seq for seq, _ in tail.after(9)] == [10]


def test_append_of_the_same_store_needs_no_fetch():
    tail = StreamTail()
    assert not tail.append(0, ["a"])  # no position is known yet
    tail.record_position(1, 1)
    assert tail.append(1, ["b", "c"])
    assert tail.after(1) == [(2, "b"), (3, "c")]
    assert tail.is_current
    assert not tail.append(7, ["x"])  # another process has written in between
    assert not tail.append(2, ["c"])  # reported late, or of another stream with this id
    assert not tail.append(3, ["x"] * (SHARED_PAGE_CHUNKS + 1))  # too long to cache
    assert not tail.append(3, ["x" * PAGE_CHARACTERS, "x"])
    assert tail.after(1) == [(2, "b"), (3, "c")]
    assert not tail.finds_change("active", 3)  # this store has sent the notification


def test_outdated_fetch_keeps_newer_chunks():
    tail = StreamTail()
    tail.record_position(1, 1)
    tail.mark_stale()
    version, after, least = tail.version, tail.end, tail.total
    assert tail.append(1, ["b", "c"])
    take_page(tail, version, after, rows("active", 2, 2, text="b"), least)
    assert not tail.deleted
    assert tail.after(1) == [(2, "b"), (3, "c")]
    take_page(tail, version, 3, rows("active", 4, 4, text="d"), least)
    assert [seq for seq, _ in tail.after(1)] == [2, 3, 4]


class Subscriber:
    """A subscription that counts its wake-ups."""

    def __init__(self, subscriptions, cursor=0, **options):
        self.count = 0
        self.subscriptions = subscriptions
        self.subscription = subscriptions.subscribe("a", cursor, self.wake, **options)

    def wake(self):
        self.count += 1

    def reset(self):
        """Return the number of wake-ups since the last call."""
        count, self.count = self.count, 0
        return count

    def step(self):
        return self.subscriptions.next_step(self.subscription)

    def fetched(self, fetch, rows):
        wake_all(self.subscriptions.fetched(self.subscription, fetch, Page.parse(rows, fetch.after, fetch.limit)))

    def catch_up(self, rows):
        """Read to the last chunk of the stream, and return the chunks."""
        chunks = []
        while True:
            match self.step():
                case Fetch() as fetch:
                    self.fetched(fetch, rows)
                case Deliver(new):
                    chunks += new
                case Wait():
                    return chunks


def delete(subscriptions):
    subscriptions.begin_delete("a")
    return subscriptions.end_delete("a", deleted=True)


@pytest.fixture
def subscriptions():
    return Subscriptions(share=True)


def test_writers_are_woken_by_possible_ends_only(subscriptions):
    writer = Subscriber(subscriptions, math.inf, ends_only=True)
    wake_all(subscriptions.polled(subscriptions.awaited(), {"a": ("active", 5)})[0])
    wake_all(subscriptions.appended([("a", 0, ["x"])], subscriptions.newest))
    wake_all(subscriptions.changed(None))
    assert writer.count == 0
    for end in (
        lambda: subscriptions.polled(subscriptions.awaited(), {"a": ("stopped", 5)})[0],
        lambda: subscriptions.changed(["a"]),
        lambda: delete(subscriptions),
        subscriptions.closed,
    ):
        wake_all(end())
        assert writer.reset(), end


def test_writer_is_woken_by_the_end_of_a_successor(subscriptions):
    writer = Subscriber(subscriptions, math.inf, ends_only=True)
    wake_all(delete(subscriptions))
    assert writer.reset() == 1
    wake_all(subscriptions.changed(["a"]))
    assert writer.reset() == 1


def test_without_sharing_each_subscription_has_its_own_tail():
    subscriptions = Subscriptions(share=False)
    one, two = Subscriber(subscriptions), Subscriber(subscriptions)
    assert one.subscription.stream is not two.subscription.stream
    for reader in (one, two):
        assert reader.catch_up(rows("active", 0)) == []
    wake_all(subscriptions.appended([("a", 0, ["x"])], subscriptions.newest))
    assert (one.reset(), two.reset()) == (1, 1)
    assert isinstance(one.step(), Fetch)
    assert isinstance(two.step(), Fetch)


def test_unsubscribed_fetcher_lets_another_fetch(subscriptions):
    readers = [Subscriber(subscriptions) for _ in range(2)]
    for reader in readers:
        reader.catch_up(rows("active", 0))
    wake_all(subscriptions.changed(["a"]))
    [fetcher] = [reader for reader in readers if reader.reset()]
    [other] = [reader for reader in readers if reader is not fetcher]
    assert isinstance(fetcher.step(), Fetch)
    subscriptions.unsubscribe(fetcher.subscription)  # interrupted before it could report
    subscriptions.awaited()
    assert other.reset() == 1
    assert isinstance(other.step(), Fetch)


def test_statistics_wake_no_reader(subscriptions):
    """Any thread may ask for them, and a task may only be woken by the thread of its event loop."""
    readers = [Subscriber(subscriptions) for _ in range(2)]
    for reader in readers:
        reader.catch_up(rows("active", 0))
    wake_all(subscriptions.changed(["a"]))
    [fetcher] = [reader for reader in readers if reader.reset()]
    [other] = [reader for reader in readers if reader is not fetcher]
    assert isinstance(fetcher.step(), Fetch)
    expected = {"streams_followed": 1, "readers_open": 1, "readers_waiting": 1, "writers_open": 0}
    subscriptions.unsubscribe(fetcher.subscription)
    assert subscriptions.get_stats() == expected
    assert other.reset() == 0
    subscriptions.awaited()
    assert other.reset() == 1
    assert subscriptions.get_stats() == {**expected, "readers_waiting": 0}
    subscriptions.unsubscribe(other.subscription)
    assert set(subscriptions.get_stats().values()) == {0}


def test_reader_gets_no_chunks_of_a_successor(subscriptions):
    reader = Subscriber(subscriptions)
    fetch = reader.step()
    reader.fetched(fetch, rows("active", 200, *range(1, 51), text="old"))
    assert isinstance(reader.step(), Deliver)
    wake_all(delete(subscriptions))
    assert reader.step() == Deleted()


def test_page_read_across_a_deletion_is_discarded(subscriptions):
    old, new = Subscriber(subscriptions), Subscriber(subscriptions)
    old.fetched(old.step(), rows("active", 200, *range(1, 51), text="old"))
    old.step()
    old_fetch, new_fetch = old.step(), new.step()
    wake_all(delete(subscriptions))
    for reader, fetch in ((old, old_fetch), (new, new_fetch)):
        reader.fetched(fetch, rows("active", 60, *range(fetch.after + 1, 61), text="new"))
    assert old.step() == Deleted()
    assert new.step() == Fetch(0, 50, False, 1, 0, False)
    assert [seq for seq, _ in new.catch_up(rows("active", 3, 1, 2, 3))] == [1, 2, 3]


def test_lower_total_in_a_page_of_a_new_reader_ends_the_old_tail(subscriptions):
    waiting = Subscriber(subscriptions)
    waiting.catch_up(rows("active", 5, 1, 2, 3, 4, 5))
    new = Subscriber(subscriptions)
    assert new.catch_up(rows("active", 1, 1, text="new")) == [(1, "new")]
    assert waiting.reset() == 1
    assert waiting.step() == Deleted()


def test_total_below_the_cursor_of_a_reader_means_deleted(subscriptions):
    behind, ahead = Subscriber(subscriptions), Subscriber(subscriptions)
    fetch = ahead.step()
    behind.catch_up(rows("active", 0))
    ahead.fetched(fetch, rows("active", 4, 1, 2, 3, 4))
    assert len(list(ahead.step().chunks)) == 4
    ahead.fetched(ahead.step(), rows("active", 0))
    assert ahead.step() == Deleted()


def test_new_reader_wakes_one_that_lacks_its_chunks(subscriptions):
    behind, ahead = Subscriber(subscriptions), Subscriber(subscriptions)
    fetch = ahead.step()
    behind.catch_up(rows("active", 0))
    ahead.fetched(fetch, rows("active", 1, 1))
    assert behind.reset() == 1
    behind.fetched(behind.step(), rows("active", 1, 1))
    assert [chunk.seq for chunk in behind.step().chunks] == [1]
    assert len(list(ahead.step().chunks)) == 1
    assert ahead.step() == Wait()


@pytest.mark.parametrize("page", [rows("stopped", 0), []], ids=["ended", "deleted"])
def test_new_reader_that_finds_the_end_wakes_the_others(subscriptions, page):
    waiting, writer = Subscriber(subscriptions), Subscriber(subscriptions, math.inf, ends_only=True)
    waiting.catch_up(rows("active", 0))
    new = Subscriber(subscriptions)
    new.fetched(new.step(), page)
    assert waiting.reset() == writer.reset() == 1


def test_end_of_stream(subscriptions):
    reader = Subscriber(subscriptions)
    reader.fetched(reader.step(), rows("error\nwhy", 1, 1))
    assert list(reader.step().chunks) == [(1, "x")]
    assert reader.step() == Ended(("error", "why", 1))


def test_closed_store_raises(subscriptions):
    reader = Subscriber(subscriptions)
    reader.catch_up(rows("active", 0))
    wake_all(subscriptions.closed())
    assert reader.reset() == 1
    with pytest.raises(StoreClosedError):
        reader.step()


def test_older_read_does_not_hide_known_chunks(subscriptions, monkeypatch):
    monkeypatch.setattr(_stream_tail, "SHARED_PAGE_CHUNKS", 3)
    waiting, late = Subscriber(subscriptions), Subscriber(subscriptions)
    waiting.catch_up(rows("active", 1, 1))
    wake_all(subscriptions.changed(["a"]))
    late_fetch = late.step()
    waiting.fetched(waiting.step(), rows("active", 7, 2, 3, 4))
    late.fetched(late_fetch, rows("active", 4, 1, 2, 3, 4))
    assert isinstance(waiting.step(), Deliver)
    assert isinstance(waiting.step(), Fetch)


def test_end_of_a_shorter_successor_is_a_deletion(subscriptions):
    reader = Subscriber(subscriptions)
    reader.catch_up(rows("active", 0))
    wake_all(subscriptions.changed(["a"]))
    fetch = reader.step()
    wake_all(subscriptions.appended([("a", 0, ["x", "y", "z"])], subscriptions.newest))
    reader.fetched(fetch, rows("done", 1, 1, text="new"))  # deleted and created again before the fetch has read it
    assert reader.step() == Deleted()


def test_catch_up_overtaken_by_the_end_reads_again(subscriptions):
    reader, late = Subscriber(subscriptions), Subscriber(subscriptions)
    reader.catch_up(rows("active", 1, 1))
    late_fetch = late.step()
    wake_all(subscriptions.changed(["a"]))
    reader.fetched(reader.step(), rows("done", 1))
    late.fetched(late_fetch, rows("active", 1, 1, text="new"))  # deleted and created again before the fetch has read it
    fetch = late.step()
    assert fetch.ended
    late.fetched(fetch, rows("active", 1, 1, text="new"))
    assert list(late.step().chunks) == [(1, "new")]


def test_append_to_a_successor_does_not_extend_the_ended_tail():
    tail = StreamTail()
    tail.record_position(1, 1)
    tail.mark_stale()
    take_page(tail, 2, 1, rows("done", 1))
    assert not tail.append(1, ["of another stream"])


def test_late_append_to_an_ended_tail_changes_no_total():
    tail = StreamTail()
    tail.record_position(1, 3)
    tail.mark_stale()
    take_page(tail, 2, 3, rows("done", 3))
    assert not tail.append(9, ["of another stream"])
    assert tail.status == ("done", None, 3)


def test_reader_woken_late_waits_no_longer(subscriptions):
    readers = [Subscriber(subscriptions), Subscriber(subscriptions)]
    for reader in readers:
        reader.catch_up(rows("active", 0))
    [chosen] = subscriptions.changed(["a"])
    [late] = [reader for reader in readers if reader.subscription is not chosen]
    fetch = late.step()  # the wake-up of an earlier wait, while this reader waits again
    assert isinstance(fetch, Fetch)
    assert isinstance(subscriptions.next_step(chosen), Wait)
    assert subscriptions.fetch_failed(late.subscription, fetch, OSError()) == [chosen]


def test_poll_reports_a_change_under_a_fetch(subscriptions):
    reader, other = Subscriber(subscriptions), Subscriber(subscriptions)
    for each in (reader, other):
        each.catch_up(rows("active", 0))
    assert isinstance(other.step(), Wait)
    wake_all(subscriptions.changed(None))
    assert isinstance(other.step(), Fetch)
    assert isinstance(reader.step(), Wait)
    assert subscriptions.polled(subscriptions.awaited(), {"a": ("active", 5)}) == ([], True)


def test_late_report_of_an_append_does_not_extend_the_tail_of_a_new_stream(subscriptions):
    newest = subscriptions.newest  # before the statement, whose reply is delayed
    wake_all(delete(subscriptions))
    reader = Subscriber(subscriptions)
    reader.catch_up(rows("active", 0))
    wake_all(subscriptions.appended([("a", 0, ["of the deleted stream"])], newest))
    assert reader.reset() == 1
    assert isinstance(reader.step(), Fetch)


def test_readers_wait_while_their_stream_is_deleted(subscriptions):
    at_tail, catching_up = Subscriber(subscriptions), Subscriber(subscriptions)
    at_tail.catch_up(rows("active", 1, 1))
    own_fetch = catching_up.step()
    wake_all(subscriptions.changed(["a"]))
    assert at_tail.reset() == 1
    shared_fetch = at_tail.step()
    subscriptions.begin_delete("a")
    at_tail.fetched(shared_fetch, rows("active", 2, 2, text="new"))
    catching_up.fetched(own_fetch, rows("active", 2, 1, 2, text="new"))
    new = Subscriber(subscriptions)
    readers = [at_tail, catching_up, new]
    assert [reader.step() for reader in readers] == [Wait()] * 3
    wake_all(subscriptions.end_delete("a", deleted=True))
    assert [reader.reset() for reader in readers] == [1, 1, 1]
    assert at_tail.step() == Deleted()
    for reader in (catching_up, new):
        assert reader.catch_up(rows("active", 2, 1, 2, text="new")) == [(1, "new"), (2, "new")]


def test_readers_continue_after_a_failed_deletion(subscriptions):
    readers = [Subscriber(subscriptions), Subscriber(subscriptions)]
    readers[0].catch_up(rows("active", 0))
    subscriptions.begin_delete("a")
    assert [reader.step() for reader in readers] == [Wait(), Wait()]
    wake_all(subscriptions.end_delete("a", deleted=False))
    assert [reader.reset() for reader in readers] == [1, 1]
    for reader in readers:
        assert reader.catch_up(rows("active", 1, 1)) == [(1, "x")]


def test_poll_finds_a_shorter_stream(subscriptions):
    reader = Subscriber(subscriptions)
    reader.catch_up(rows("active", 2, 1, 2))
    streams = subscriptions.awaited()
    wake_all(subscriptions.appended([("a", 2, ["x"])], subscriptions.newest))
    assert reader.reset() == 1
    assert isinstance(reader.step(), Deliver)
    reader.step()
    assert subscriptions.polled(streams, {"a": ("active", 2)}) == ([], False)  # it began before the append
    assert subscriptions.polled(subscriptions.awaited(), {"a": ("active", 1)}) == ([reader.subscription], True)


def test_every_poll_wakes_writers_of_an_ended_stream(subscriptions):
    writer = Subscriber(subscriptions, math.inf, ends_only=True)
    for _ in range(3):  # the status query of the writer may fail
        wake_all(subscriptions.polled(subscriptions.awaited(), {"a": ("stopped", 0)})[0])
        assert writer.reset() == 1


def test_poll_that_does_not_see_a_stream_lets_a_reader_read_each_time(subscriptions):
    reader = Subscriber(subscriptions)
    reader.catch_up(rows("active", 0))
    found = []
    for page in (rows("active", 0), rows("active", 1, 1), rows("active", 1), rows("active", 1)):
        woken, changed = subscriptions.polled(subscriptions.awaited(), {})
        wake_all(woken)
        found.append(changed)
        assert reader.reset() == 1
        reader.catch_up(page)
    assert found == [True, False, True, False]


def quick_polls(subscriptions, total):
    """Poll an active stream until it needs no quick poll; return the number of polls."""
    count = 0
    while streams := subscriptions.awaited(quick=True):
        wake_all(subscriptions.polled(streams, {"a": ("active", total)})[0])
        count += 1
    return count


def test_quick_polls_after_a_reader_joins_and_after_a_change_without_a_notification(subscriptions):
    reader = Subscriber(subscriptions)
    reader.catch_up(rows("active", 0))
    assert quick_polls(subscriptions, 0) == QUICK_POLLS
    new = Subscriber(subscriptions)
    new.catch_up(rows("active", 0))
    assert quick_polls(subscriptions, 0) == QUICK_POLLS
    streams = subscriptions.awaited()
    wake_all(subscriptions.polled(streams, {"a": ("active", 1)})[0])
    assert reader.reset() + new.reset() == 1
    assert quick_polls(subscriptions, 1) == QUICK_POLLS
    assert subscriptions.awaited() == streams


@pytest.mark.parametrize("announce", ["notification", "append"])
def test_no_quick_polls_after_an_announced_change(subscriptions, announce):
    reader = Subscriber(subscriptions)
    reader.catch_up(rows("active", 0))
    if announce == "append":
        subscriptions.appended([("a", 0, ["x"])], subscriptions.newest)
    else:
        subscriptions.changed(["a"])
    reader.catch_up(rows("active", 1, 1))
    assert quick_polls(subscriptions, 1) == 0
    assert len(subscriptions.awaited()) == 1


def test_no_quick_polls_of_streams_that_this_process_writes(subscriptions):
    writer, reader = Subscriber(subscriptions, math.inf, ends_only=True), Subscriber(subscriptions)
    reader.catch_up(rows("active", 0))
    assert quick_polls(subscriptions, 0) == 0
    subscriptions.unsubscribe(writer.subscription)
    assert quick_polls(subscriptions, 0) == QUICK_POLLS


def test_failed_ends_waiting_and_fetching_readers_of_the_stream(subscriptions):
    waiting, fetching = Subscriber(subscriptions), Subscriber(subscriptions)
    writer = Subscriber(subscriptions, math.inf, ends_only=True)
    waiting.catch_up(rows("active", 0))
    fetch = fetching.step()
    wake_all(subscriptions.failed("b", OSError("of another stream")))
    wake_all(subscriptions.failed("a", OSError("not visible")))
    assert [each.reset() for each in (waiting, fetching, writer)] == [1, 1, 0]
    fetching.fetched(fetch, rows("active", 0))
    for reader in (waiting, fetching):
        with pytest.raises(OSError, match="not visible"):
            reader.step()
