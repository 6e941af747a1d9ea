"""Pages: chunks and the state of a stream, as read by one statement. The statements, as templates for `_sql`. Pure."""

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

# Whether a page of chunks of this size has at most PAGE_BYTES, or consists of this chunk.
FITS = f"octet_length(data) * {{limit}} <= {PAGE_BYTES} OR {{limit}} = 1"
RUNNING_SIZE = "sum(octet_length(found.data)) OVER (ORDER BY wanted.index, found.seq ROWS UNBOUNDED PRECEDING)"

STATUS_ROW = "-greatest(total_chunks, 0) AS seq, state || coalesce(chr(10) || error, '') AS data"

# Reads the status and a page of chunks in one snapshot. `_pages.Page` parses the row of the status: the negated number
# of chunks, and the state, followed by a line break and the error text. Chunks with a number above total_chunks are
# left over from another stream. A page is a range of sequence numbers, since a LIMIT may be planned as a sort of all
# later chunks. 2^62 avoids an overflow; no chunk has a higher number. Chunks that are too large for their page come as
# NULL: a running sum of the sizes would add half to the time of a page of small chunks. The client sorts the rows, in
# less time than the server.
READ = """
SELECT {status_row} FROM {status} WHERE id = $1::text
UNION ALL
SELECT seq, CASE WHEN {fits_in_page} THEN data END FROM {chunks}
 WHERE id = $1::text AND seq > $2::bigint
   AND seq <= least(least($2::bigint, 1::bigint << 62) + $3::bigint,
                    (SELECT total_chunks FROM {status} WHERE id = $1::text))
"""

# READ for many streams. $1 is a JSON array of objects with index, id, after and limit. The sizes of all chunks have a
# common bound.
READ_BATCH = """
SELECT wanted.index, found.seq,
       CASE WHEN found.seq <= 0 OR {running_size} <= {batch_bytes} THEN found.data END
  FROM json_to_recordset($1::text::json) AS wanted (index integer, id text, after bigint, "limit" bigint),
       LATERAL (
           SELECT {status_row} FROM {status} WHERE id = wanted.id
           UNION ALL
           SELECT seq, CASE WHEN {fits_in_batch} THEN data END FROM {chunks}
            WHERE id = wanted.id AND seq > wanted.after
              AND seq <= least(least(wanted.after, 1::bigint << 62) + wanted."limit",
                               (SELECT total_chunks FROM {status} WHERE id = wanted.id))
       ) AS found
 ORDER BY wanted.index, found.seq
"""

READ_TIMED = """
SELECT {status_row}, NULL::float8 AS written_at FROM {status} WHERE id = $1::text
UNION ALL
SELECT seq, CASE WHEN {fits_in_page} THEN data END,
       CASE WHEN created_at {in_range} THEN epoch END
  FROM {chunks}, LATERAL (SELECT extract(epoch FROM created_at)::float8) AS t (epoch)
 WHERE id = $1::text AND seq > $2::bigint
   AND seq <= least(least($2::bigint, 1::bigint << 62) + $3::bigint,
                    (SELECT total_chunks FROM {status} WHERE id = $1::text))
"""

# The next sequence number after an empty page, since total_chunks may be far larger than the number of chunks.
NEXT = """
SELECT least((SELECT min(seq) FROM {chunks}
               WHERE id = $1::text AND seq > $2::bigint
                 AND seq <= (SELECT total_chunks FROM {status} WHERE id = $1::text)),
             {next_page})
"""

# Whether the server is a standby, and the status of a stream as the first row of READ, or NULL if there is none.
STANDBY_STATUS = """
SELECT pg_is_in_recovery(), found.seq, found.data
  FROM (SELECT) AS one LEFT JOIN (SELECT {status_row} FROM {status} WHERE id = $1::text) AS found ON true
"""


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
        last_seq: The sequence number of the last row, or None if there are no rows.
        is_archived: Whether some of the chunks come from the archive; False by default.
    """

    state: StreamState
    error: str | None
    total: int
    rows: Sequence[tuple[Any, ...]]
    end: int
    next_limit: int
    last_seq: int | None
    is_archived: bool = False

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
        last_seq = found[-1][0] if found else None
        return cls(state, error if newline else None, -negative_total, found, end, next_limit, last_seq)

    @property
    def chunks(self) -> Iterator[StreamChunk]:
        """The chunks. The rows must have no additional columns."""
        return as_chunks(self.rows)

    def lacks_chunks(self, after: int) -> bool:
        """Return True if chunks of an ended stream are missing in this page after `after`: they may be archived."""
        return self.state != "active" and len(self.rows) < min(self.end, self.total) - after

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


def fitting_limit(characters: int, chunks: int, maximum: int = MAX_PAGE_CHUNKS) -> int:
    """Return the limit of a page of chunks that are as large as these on average."""
    return max(1, min(maximum, PAGE_CHARACTERS * chunks // characters)) if characters else maximum
