"""Pages: chunks and the state of a stream, as read by one statement. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import repeat, takewhile
from operator import itemgetter
from typing import Any, NamedTuple

from .models import EPOCH, StoredEvent, StreamChunk, StreamState, StreamStatus, TimedChunk, event_of

FIRST_PAGE_CHUNKS, MAX_PAGE_CHUNKS = 50, 2000
PAGE_CHARACTERS = 500_000  # the expected size of the pages after the first one
PAGE_BYTES = 2_000_000  # the largest size of a page that contains more than one chunk
BATCH_BYTES = 8_000_000  # the largest size of the pages that one statement reads for several streams
LIMIT_DIVISOR = 16  # reduces the limit after a chunk that was too large for it

TEXT = itemgetter(1)  # of a row


class Page(NamedTuple):
    """Some chunks of a stream, with the state of the stream in the same snapshot.

    Attributes:
        state: The state of the stream.
        error: The error text of the stream, or None.
        total: The number of chunks of the stream.
        rows: The sequence numbers and texts of the chunks in this page. A statement may add columns.
        end: The position that the page reaches: it contains all chunks of the range up to this sequence number. It is
            the start of the range if the first chunk was too large for the limit.
        next_limit: The limit of the next page, which bounds the memory of a reader.
    """

    state: StreamState
    error: str | None
    total: int
    rows: Sequence[tuple[Any, ...]]
    end: int
    next_limit: int

    @classmethod
    def parse(cls, rows: Sequence[tuple[Any, ...]], after: int, limit: int) -> Page | None:
        """Parse the rows of a READ statement, or return None if the stream does not exist.

        The first row is the status. It consists of the negated number of chunks, and of the state, followed by a line
        break and the error text if there is one. The text of a chunk is None if it is too large. The page ends before
        it.

        Args:
            rows: The rows, in the order of the sequence numbers.
            after: The sequence number after which the statement reads.
            limit: The number of sequence numbers that the statement reads.
        """
        if not rows or rows[0][0] > 0:  # without a status, the chunks are left over from a deleted stream
            return None
        negative_total, status, *_ = rows[0]
        state, newline, error = status.partition("\n")
        found, end = rows[1:], after + limit
        try:
            next_limit = fitting_limit(sum(map(len, map(TEXT, found))), len(found))
        except TypeError:  # len(None)
            found = list(takewhile(lambda row: row[1] is not None, found))
            end = found[-1][0] if found else after
            next_limit = max(1, limit // LIMIT_DIVISOR)
        return cls(state, error if newline else None, -negative_total, found, end, next_limit)

    @property
    def chunks(self) -> Iterator[StreamChunk]:
        """The chunks. The rows must have no additional columns."""
        return as_chunks(self.rows)

    @property
    def is_last(self) -> bool:
        """Whether the stream had no more chunks after this page."""
        return self.end >= self.total

    @property
    def status(self) -> StreamStatus:
        return StreamStatus(self.state, self.error, self.total)


def as_chunks(rows: Iterable[tuple[int, str]]) -> Iterator[StreamChunk]:
    # Like `StreamChunk._make`, without a Python call for each row and without a list.
    return map(tuple.__new__, repeat(StreamChunk), rows)


def as_events(rows: Iterable[tuple[int, str]]) -> Iterator[StoredEvent]:
    return (StoredEvent(seq, *event_of(data)) for seq, data in rows)


def as_timed_chunks(rows: Iterable[tuple[int, str, float | None]]) -> Iterator[TimedChunk]:
    """Convert rows whose times are seconds since the epoch, within datetime's range, or None."""
    return (
        TimedChunk(seq, data, None if written_at is None else EPOCH + timedelta(seconds=written_at))
        for seq, data, written_at in rows
    )


def is_missing(page: Page | None) -> bool:
    return page is None


def fitting_limit(characters: int, chunks: int) -> int:
    """Return the limit of a page of chunks that are as large as these on average."""
    return max(1, min(MAX_PAGE_CHUNKS, PAGE_CHARACTERS * chunks // characters)) if characters else MAX_PAGE_CHUNKS
