"""Pages: the chunks and the state of a stream as one statement reads them, and how large the next page may be. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from .models import StreamChunk, StreamState, StreamStatus

FIRST_PAGE_CHUNKS, MAX_PAGE_CHUNKS = 50, 2000
PAGE_CHARACTERS = 1_000_000  # aimed at in the pages after the first one


class Page(NamedTuple):
    """Some chunks of a stream, with its state in the same snapshot.

    `total` is the number of chunks of the stream, `rows` the numbers and texts of those in this
    page, perhaps with more columns. No chunk up to
    number `end` is missing from the pages so far.
    """

    state: StreamState
    error: str | None
    total: int
    rows: Sequence[tuple[Any, ...]]
    end: int

    @classmethod
    def parse(cls, rows: Sequence[tuple[Any, ...]], after: int, limit: int) -> Page | None:
        """Parse the rows of a READ statement for `limit` chunks after number `after`; None if there is no stream.

        The first row is the status: the number of chunks, negative, and the state with the error text in a second line.
        """
        if not rows:
            return None
        negative_total, status, *_ = rows[0]
        state, newline, error = status.partition("\n")
        return cls(state, error if newline else None, -negative_total, rows[1:], after + limit)

    @property
    def chunks(self) -> Iterator[StreamChunk]:
        """The chunks of rows that have no more columns."""
        # As `StreamChunk._make` does, but without a call of Python for each row, and without a list of them.
        return map(tuple.__new__, repeat(StreamChunk), self.rows)

    @property
    def is_last(self) -> bool:
        """Whether the stream has no chunks behind this page."""
        return self.end >= self.total

    @property
    def status(self) -> StreamStatus:
        return StreamStatus(self.state, self.error, self.total)

    @property
    def next_limit(self) -> int:
        """How many chunks to read next, so that large chunks do not fill the memory of slow readers."""
        size = sum([len(row[1]) for row in self.rows])
        return max(1, min(MAX_PAGE_CHUNKS, PAGE_CHARACTERS * len(self.rows) // size)) if size else MAX_PAGE_CHUNKS
