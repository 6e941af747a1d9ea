"""Pages: chunks and the state of a stream, as read by one statement. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from .models import StreamChunk, StreamState, StreamStatus

FIRST_PAGE_CHUNKS, MAX_PAGE_CHUNKS = 50, 2000
PAGE_CHARACTERS = 1_000_000  # the target size of the pages after the first one


class Page(NamedTuple):
    """Some chunks of a stream, with the state of the stream in the same snapshot.

    Attributes:
        state: The state of the stream.
        error: The error text of the stream, or None.
        total: The number of chunks of the stream.
        rows: The sequence numbers and texts of the chunks in this page. A statement may add columns.
        end: The position that the page reaches: it contains all chunks of the range up to this sequence number.
    """

    state: StreamState
    error: str | None
    total: int
    rows: Sequence[tuple[Any, ...]]
    end: int

    @classmethod
    def parse(cls, rows: Sequence[tuple[Any, ...]], after: int, limit: int) -> Page | None:
        """Parse the rows of a READ statement, or return None if the stream does not exist.

        The first row is the status. It consists of the negated number of chunks, and of the state, followed by a line
        break and the error text if there is one.

        Args:
            rows: The rows.
            after: The sequence number after which the statement reads.
            limit: The number of sequence numbers that the statement reads.
        """
        if not rows:
            return None
        negative_total, status, *_ = rows[0]
        state, newline, error = status.partition("\n")
        return cls(state, error if newline else None, -negative_total, rows[1:], after + limit)

    @property
    def chunks(self) -> Iterator[StreamChunk]:
        """The chunks. The rows must have no additional columns."""
        # Like `StreamChunk._make`, without a Python call for each row and without a list.
        return map(tuple.__new__, repeat(StreamChunk), self.rows)

    @property
    def is_last(self) -> bool:
        """Whether the stream had no more chunks after this page."""
        return self.end >= self.total

    @property
    def status(self) -> StreamStatus:
        return StreamStatus(self.state, self.error, self.total)

    @property
    def next_limit(self) -> int:
        """The limit of the next page. It is smaller for large chunks, to bound the memory of each reader."""
        size = sum([len(row[1]) for row in self.rows])
        return max(1, min(MAX_PAGE_CHUNKS, PAGE_CHARACTERS * len(self.rows) // size)) if size else MAX_PAGE_CHUNKS
