"""Pages from a replica: the statements, as templates for `_sql`; whether a page is that of the primary; outages. Pure.

The chunks of a stream never change. A page of a replica is therefore that of the primary if the replica has the same
stream and all chunks of the page. The replica may lag behind, have an earlier stream with this id, or be a server whose
data have developed differently since they were copied.

The first line of the data of a status shows which stream it is:

- `created_at` of the stream;
- `expires_at`, which is set at the end of a stream to the millisecond;
- `created_at` of the last chunk of the page. Two copies of a stream that were continued separately, as after a failover
  or in a copy for tests, have other times there.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from typing import TYPE_CHECKING, NamedTuple

from ._concurrency import Mutex

if TYPE_CHECKING:
    from ._statement_runner import Row

MIN_PAUSE, MAX_PAUSE = 1.0, 60.0  # seconds for which an unavailable replica is not asked; the pause doubles each time
MAX_REFUSED = 10  # pages in a row that cannot be used, after which the replica counts as unavailable

# concat treats NULL as an empty text.
IDENTIFIED_STATUS_ROW = """-greatest(total_chunks, 0) AS seq,
       concat(extract(epoch FROM created_at), ' ', expires_at, ' ',
              (SELECT extract(epoch FROM created_at) FROM {chunks}
                WHERE id = $1::text AND seq = least(least($2::bigint, 1::bigint << 62) + $3::bigint, total_chunks)),
              chr(10), state, chr(10) || error) AS data"""

# The identified status of a stream. If the page reaches the end of an active stream, also the page: it is read on the
# primary, and a reader of a live stream needs no further statement.
ORIGIN = """
SELECT {status_row}, NULL::float8 AS written_at FROM {status} WHERE id = $1::text
UNION ALL
SELECT seq, CASE WHEN {fits_in_page} THEN data END,
       CASE WHEN created_at {in_range} THEN epoch END
  FROM {chunks}, LATERAL (SELECT extract(epoch FROM created_at)::float8) AS t (epoch)
 WHERE id = $1::text AND seq > $2::bigint
   AND seq <= (SELECT total_chunks FROM {status}
                WHERE id = $1::text AND state = 'active'
                  AND total_chunks < least($2::bigint, 1::bigint << 62) + $3::bigint)
"""


class Identity(NamedTuple):
    """The status of a stream as a statement with `IDENTIFIED_STATUS_ROW` returns it.

    Attributes:
        total: The number of chunks.
        created_at: The creation time of the stream, as text; empty if it is not known.
        expires_at: The expiry of the stream, as text.
        last_at: The creation time of the last chunk of the page, as text; empty if there is none.
        status: The state, followed by a line break and the error text if there is one.
    """

    total: int
    created_at: str
    expires_at: str
    last_at: str
    status: str

    @classmethod
    def parse(cls, row: Row) -> Identity:
        first, _, status = row[1].partition("\n")
        created_at, expires_at, last_at = first.split(" ")
        return cls(-row[0], created_at, expires_at, last_at, status)

    @property
    def is_active(self) -> bool:
        return self.status.partition("\n")[0] == "active"

    @property
    def is_known(self) -> bool:
        """Whether the creation time shows which stream it is. Other programs may have set it to infinity."""
        return bool(self.created_at) and isfinite(float(self.created_at))

    @property
    def status_row(self) -> tuple[int, str]:
        """The status as READ returns it."""
        return -self.total, self.status

    def is_complete(self, after: int, limit: int) -> bool:
        """Return True if the rows of ORIGIN are the page: its end is that of an active stream, or it has no chunks."""
        return self.total <= after or (self.is_active and self.total < after + limit)

    def is_same(self, other: Identity) -> bool:
        """Return True if a replica has the same stream with all chunks of a page, according to the two statuses."""
        if self.created_at != other.created_at:
            return False
        if self.last_at or other.last_at:
            return self.last_at == other.last_at
        # The time of the last chunk is not known: the whole stream must be the same, with the same end.
        return not self.is_active and self == other


def has_stream(origin: Identity, rows: Sequence[Row]) -> bool:
    """Return True if the rows of a replica are of the stream that the primary has."""
    return origin.is_known and bool(rows) and rows[0][0] <= 0 and origin.is_same(Identity.parse(rows[0]))


def page_of_replica(
    origin: Identity, rows: Sequence[Row], after: int, limit: int, *, archived: bool = False
) -> list[Row] | None:
    """Return the rows of a page as the primary returns them, or None if the replica does not have the page.

    Args:
        origin: The status on the primary.
        rows: The rows of the replica, in the order of the sequence numbers.
        after: The sequence number after which the page begins.
        limit: The number of sequence numbers of the page.
        archived: Whether the rows are those of READ_ARCHIVED; False by default.
    """
    if not has_stream(origin, rows) or not _are_complete(rows[1:], after, min(after + limit, origin.total), archived):
        return None
    added_columns = rows[0][2:]
    return [(*origin.status_row, *added_columns), *rows[1:]]


def _are_complete(rows: Sequence[Row], after: int, last: int, archived: bool) -> bool:
    """Return True if rows are all chunks after number `after` up to number `last`, or up to a text that is left out."""
    if not archived:
        return [row[0] for row in rows] == list(range(after + 1, last + 1))
    for seq, text, last_of_page, *_ in rows:
        if seq > after + 1:
            return False
        if text is None:
            return True
        after = max(after, last_of_page or seq)
    return after >= last


class Outages:
    """Decides when a replica is asked. An unavailable one is asked by one reader at a time, after growing pauses.

    Times are values of `monotonic()`.
    """

    def __init__(self) -> None:
        self._mutex = Mutex()
        self._pause = 0.0  # 0: the replica is available
        self._failed_at = -inf
        self._ask_at = -inf
        self._refused = 0  # pages in a row that could not be used

    def is_over(self, now: float) -> bool:
        """Return True if there is no outage, or if it is time to ask the replica again."""
        return now >= self._ask_at

    def may_ask(self, now: float) -> bool:
        """Return True if this caller may ask the replica now."""
        with self._mutex:
            if not self.is_over(now):
                return False
            if self._pause:
                self._ask_at = now + self._pause  # other readers do not wait for the outcome of this attempt
            return True

    def succeeded(self, started: float) -> bool:
        """Record a page that was used. Return True if it ends an outage."""
        with self._mutex:
            if started < self._failed_at:
                return False
            ended = self._pause > 0
            self._pause, self._refused, self._ask_at = 0.0, 0, -inf
            return ended

    def refused(self, started: float, now: float) -> bool:
        """Record an answer that could not be used. Return True if an outage begins."""
        with self._mutex:
            self._refused += 1
            return (self._pause > 0 or self._refused >= MAX_REFUSED) and self._fail(started, now)

    def failed(self, started: float, now: float) -> bool:
        """Record an attempt that failed. Return True if an outage begins."""
        with self._mutex:
            return self._fail(started, now)

    def _fail(self, started: float, now: float) -> bool:
        if started < self._failed_at:  # many readers may have asked when the outage began
            return False
        begins = self._pause == 0
        self._pause = min(MAX_PAUSE, max(MIN_PAUSE, 2 * self._pause))
        self._failed_at, self._ask_at = now, now + self._pause
        return begins
