"""Pages of a replica: only those of the primary are used, wherever the data of the replica come from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import count
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aibind_postgres._replica import (
    MAX_PAUSE,
    MAX_REFUSED,
    MIN_PAUSE,
    Identity,
    Outages,
    page_of_replica,
)

TIMES = count(1)  # no two servers create anything in the same microsecond


@dataclass
class Stream:
    created_at: int
    state: str = "active"
    expires_at: int = 0
    total: int = 0


@dataclass
class Server:
    """The rows of one id on a server."""

    stream: Stream | None = None
    chunks: dict[int, tuple[str, int]] = field(default_factory=dict)  # the text and the time of each chunk

    def change(self, operation: str) -> None:
        if operation == "create" and self.stream is None:
            self.stream, self.chunks = Stream(next(TIMES)), {}
        elif operation == "delete":
            self.stream, self.chunks = None, {}
        elif self.stream is not None and self.stream.state == "active":
            if operation == "append":
                self.stream.total += 1
                self.chunks[self.stream.total] = f"text {next(TIMES)}", next(TIMES)
            elif operation == "append two at once":
                at = next(TIMES)
                for _ in range(2):
                    self.stream.total += 1
                    self.chunks[self.stream.total] = f"text {next(TIMES)}", at
            elif operation == "end":
                self.stream.state, self.stream.expires_at = "done", next(TIMES)

    def read(self, after: int, limit: int) -> list[tuple[int, str]]:
        """Return the rows of READ."""
        if self.stream is None:
            return []
        end = min(after + limit, self.stream.total)
        chunks = [(seq, text) for seq, (text, _) in sorted(self.chunks.items()) if after < seq <= end]
        return [(-self.stream.total, self.stream.state), *chunks]

    def read_identified(self, after: int, limit: int) -> list[tuple[int, str]]:
        """Return the rows of READ with `IDENTIFIED_STATUS_ROW`."""
        if (stream := self.stream) is None:
            return [(seq, text) for seq, (text, _) in sorted(self.chunks.items()) if after < seq <= after + limit]
        _, last_at = self.chunks.get(min(after + limit, stream.total), ("", ""))
        first = f"{stream.created_at} {stream.expires_at} {last_at}\n{stream.state}"
        return [(-stream.total, first), *self.read(after, limit)[1:]]


OPERATIONS = st.lists(
    st.sampled_from(["create", "append", "append", "append", "append two at once", "end", "delete"]), max_size=25
)


@given(
    OPERATIONS, st.integers(0, 25), st.integers(0, 25), OPERATIONS, st.booleans(), st.integers(0, 12), st.integers(1, 8)
)
def test_page_that_is_used_is_that_of_the_primary(
    operations, replayed, replayed_chunks, own_operations, is_consistent, after, limit
):
    """The replica has replayed a part of the changes, perhaps another one for each table, or has changed since."""
    primary = Server()
    versions = [copy.deepcopy(primary)]
    for operation in ["create", *operations]:
        primary.change(operation)
        versions.append(copy.deepcopy(primary))
    status = versions[min(replayed, len(versions) - 1)]
    replica = Server(
        status.stream, status.chunks if is_consistent else versions[replayed_chunks % len(versions)].chunks
    )
    replica = copy.deepcopy(replica)
    if is_consistent:
        for operation in own_operations:
            replica.change(operation)
    if primary.stream is None:
        return
    origin = Identity.parse(primary.read_identified(after, limit)[0])
    assert origin.status_row == primary.read(after, limit)[0]
    if origin.is_complete(after, limit):
        return
    expected = primary.read(after, limit)
    found = page_of_replica(origin, replica.read_identified(after, limit), after, limit)
    assert found in (None, expected)
    # A replica that has caught up serves every page.
    assert page_of_replica(origin, versions[-1].read_identified(after, limit), after, limit) == expected


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(1, 12), st.booleans())
def test_replica_with_all_chunks_of_a_page_serves_it(total, known, after, limit, ended):
    primary = Server()
    primary.change("create")
    versions = []
    for _ in range(total):
        primary.change("append")
        versions.append(copy.deepcopy(primary))
    if ended:
        primary.change("end")
    origin = Identity.parse(primary.read_identified(after, limit)[0])
    if origin.is_complete(after, limit):
        assert total <= after or not ended
        return
    replica = versions[min(max(known, 1), total) - 1]
    found = page_of_replica(origin, replica.read_identified(after, limit), after, limit)
    if replica.stream.total >= min(after + limit, total):
        assert found == primary.read(after, limit)
    else:
        assert found is None


def identified(total=2, first="10.5 900 11.5", status="done"):
    return -total, f"{first}\n{status}"


CHUNKS = [(1, "a"), (2, "b")]
ORIGIN = Identity.parse(identified())


@pytest.mark.parametrize(
    "rows",
    [
        [],
        CHUNKS,  # left over without a status
        [identified(first="10.6 900 11.5"), *CHUNKS],  # an earlier stream
        [identified(first=" 900 11.5"), *CHUNKS],
        [identified(first="10.5 900 11.6"), *CHUNKS],  # continued separately
        [identified(first="10.5 900 "), *CHUNKS],
        [identified(), (1, "a")],
        [identified(), (2, "b")],
        [identified(), (1, "a"), (3, "c")],
        [identified(), (1, "a"), (1, "a")],
    ],
)
def test_other_rows_are_refused(rows):
    assert page_of_replica(ORIGIN, [identified(), *CHUNKS], 0, 50) == [(-2, "done"), *CHUNKS]
    assert page_of_replica(ORIGIN, rows, 0, 50) is None


def test_status_is_that_of_the_primary():
    rows = [identified(first="10.5 800 11.5", status="active"), *CHUNKS]
    assert page_of_replica(ORIGIN, rows, 0, 50) == [(-2, "done"), *CHUNKS]
    failed = Identity.parse(identified(status="error\nline 1\nline 2"))
    assert page_of_replica(failed, rows, 0, 50) == [(-2, "error\nline 1\nline 2"), *CHUNKS]


def test_additional_columns():
    rows = [(*identified(), None), (1, "a", 0.5), (2, "b", 0.6)]
    assert page_of_replica(ORIGIN, rows, 0, 50) == [(-2, "done", None), *rows[1:]]


@pytest.mark.parametrize("created_at", ["", "Infinity", "-Infinity"])
def test_stream_of_unknown_age_is_not_read_from_a_replica(created_at):
    row = identified(first=f"{created_at} 900 11.5")
    assert page_of_replica(Identity.parse(row), [row, *CHUNKS], 0, 50) is None


@pytest.mark.parametrize(
    "first_and_status",
    [("10.5 900 ", "active"), ("10.5 901 ", "done"), ("10.5 900 ", "stopped"), ("10.5 900 1", "done")],
)
def test_without_the_time_of_the_last_chunk_the_whole_stream_must_be_the_same(first_and_status):
    origin = Identity.parse(identified(first="10.5 900 "))
    assert page_of_replica(origin, [identified(first="10.5 900 "), *CHUNKS], 0, 50) == [(-2, "done"), *CHUNKS]
    row = identified(first=first_and_status[0], status=first_and_status[1])
    assert page_of_replica(origin, [row, *CHUNKS], 0, 50) is None
    active = Identity.parse(identified(first="10.5 900 ", status="active"))
    assert page_of_replica(active, [identified(first="10.5 900 ", status="active"), *CHUNKS], 0, 2) is None


def test_outage_begins_and_ends_once():
    outages = Outages()
    assert outages.may_ask(0.0)
    assert outages.failed(0.0, 2.0)
    assert not outages.is_over(2.0 + MIN_PAUSE / 2)
    assert not outages.may_ask(2.0 + MIN_PAUSE / 2)
    assert not outages.failed(2.0, 3.0 + MIN_PAUSE)
    assert outages.may_ask(1000.0)
    assert outages.succeeded(1000.0)
    assert not outages.succeeded(1001.0)
    assert outages.may_ask(1001.0)
    assert outages.failed(1001.0, 1002.0)
    assert outages.may_ask(1002.0 + MIN_PAUSE)


def test_attempts_from_before_a_failure_do_not_count():
    outages = Outages()
    assert outages.failed(0.0, 2.0)
    assert not any(outages.failed(started, 2.1) for started in (0.0, 0.5, 1.9))
    assert not outages.succeeded(1.0)
    assert outages.is_over(2.0 + MIN_PAUSE)


def test_pauses_grow_to_a_maximum():
    outages, now, pauses = Outages(), 0.0, []
    for _ in range(10):
        outages.failed(now, now)
        pause = next(seconds for seconds in range(1, 1000) if outages.is_over(now + seconds))
        pauses.append(pause)
        now += pause
    assert pauses == [min(MAX_PAUSE, MIN_PAUSE * 2**number) for number in range(10)]


def test_one_attempt_at_a_time_during_an_outage():
    outages = Outages()
    outages.failed(0.0, 0.0)
    allowed = []
    threads = [Thread(target=lambda: allowed.append(outages.may_ask(MIN_PAUSE))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert allowed.count(True) == 1


def test_many_refused_pages_in_a_row_are_an_outage():
    outages = Outages()
    for _ in range(3):
        assert not any(outages.refused(0.0, 0.0) for _ in range(MAX_REFUSED - 1))
        assert not outages.succeeded(0.0)
    assert [outages.refused(0.0, 1.0) for _ in range(MAX_REFUSED)] == [*[False] * (MAX_REFUSED - 1), True]
    assert not outages.is_over(1.0)
    now = 1.0 + MIN_PAUSE
    assert outages.may_ask(now)
    assert not outages.refused(now, now)
    assert not outages.is_over(now + MIN_PAUSE)
