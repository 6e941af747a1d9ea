"""The end of a stream as this process knows it: the cached last chunks and the state. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from ._pages import PAGE_CHARACTERS, fitting_limit
from .models import StreamChunk, StreamStatus

if TYPE_CHECKING:
    from ._pages import Page

SHARED_PAGE_CHUNKS = 200  # read by one shared fetch at most
TAIL_CHUNKS, TAIL_CHARACTERS = 500, 200_000  # kept for slower readers

NO_VERSION = 0  # older than all versions of a tail


class StreamTail:
    """The cached last chunks of a stream and its state. The caller guards it by a mutex."""

    def __init__(self) -> None:
        self.version = NO_VERSION + 1  # grows with each possible change of the stream
        self.total = 0  # number of chunks according to shared fetches and local appends, cached or not
        self._read_total = 0  # the largest total at which a reader was caught up
        self.end = 0  # sequence number up to which the tail is complete
        self.notified = False  # marked stale by a notification or a local write since the last poll that found a change
        self._start = 0  # number before the first cached chunk
        self._chunks: list[StreamChunk] = []
        self._characters = 0
        self.has_position = False  # False until the first page or recorded position sets `end`
        self._fetched_version = NO_VERSION  # version at the begin of the newest fetch that read everything
        self._state: str | None = "active"  # None: deleted
        self._error: str | None = None
        self._total_at_poll = 0  # `total` when the newest poll began
        self._polled: object = None

    @property
    def ended(self) -> bool:
        """Whether no chunk will follow the cached ones."""
        return self._state != "active"

    @property
    def deleted(self) -> bool:
        return self._state is None

    @property
    def is_current(self) -> bool:
        """Whether nothing may have changed since the newest fetch."""
        return self._fetched_version == self.version

    @property
    def min_total(self) -> int:
        """The least number of chunks of this stream. A page with fewer is of a new stream with this id."""
        return max(self.total, self._read_total)

    @property
    def next_limit(self) -> int:
        """The limit of the next shared fetch."""
        return min(SHARED_PAGE_CHUNKS, fitting_limit(self._characters, len(self._chunks)))

    @property
    def status(self) -> StreamStatus:
        """The status of a stream that has ended and was not deleted."""
        return StreamStatus._make((self._state, self._error, self.total))

    def after(self, cursor: float) -> Sequence[StreamChunk] | None:
        """Return the cached chunks after `cursor`, or None if chunks after it are no longer cached."""
        if cursor >= self.end:
            return ()
        if cursor < self._start:
            return None
        return self._chunks[bisect_right(self._chunks, cursor, key=itemgetter(0)) :]

    def take(self, page: Page | None, after: int, version: int, min_total: int) -> None:
        """Add a page that was read after number `after`; the other values are those when the read began."""
        # A stream never gets shorter: a shorter one is another stream of this id. A deleted one does not come back.
        # The stream may have grown since the read began, but not after its end.
        if page is not None and page.state != "active":
            min_total = max(min_total, self.min_total)
        if self.deleted or page is None or page.total < min_total:
            self._state = None
            return
        if not page.rows and not page.is_last:
            after = page.total  # a gap, possibly very large: each reader skips it with its own read
        if not self.has_position or after > self.end:
            self._begin(min(after, page.total))
        if after <= self.end:  # chunks that were appended in this process meanwhile are cached already
            self._extend([chunk for chunk in page.chunks if chunk.seq > self.end])
            self.end = max(self.end, min(page.end, page.total))
        self.total = max(self.total, page.total)
        if max(after, page.end) >= page.total:
            self._fetched_version = max(self._fetched_version, version)
            self._state, self._error = page.state, page.error

    def append(self, before: int, texts: Sequence[str]) -> bool:
        """Add texts that were appended here after number `before`; return False if a fetch must read them."""
        if self.ended:  # the append was to a new stream of this id
            return False
        follows = self.has_position and before == self.end
        self.total = max(self.total, before + len(texts))
        is_large = len(texts) > 1 and sum(map(len, texts)) > PAGE_CHARACTERS
        if not follows or is_large or len(texts) > SHARED_PAGE_CHUNKS:
            return False
        self._extend([StreamChunk(seq, text) for seq, text in enumerate(texts, before + 1)])
        return True

    def record_position(self, version: int, total: int) -> None:
        """Record that a reader was caught up at `total`, the end of an active stream, as of `version`."""
        self._read_total = max(self._read_total, total)
        if not self.has_position:
            self._begin(total)
        if total == self.end and total >= self.total:  # else chunks are known that the tail lacks
            self._fetched_version = max(self._fetched_version, version)
            self.total = total

    def delete(self) -> None:
        self._state = None

    def begin_poll(self) -> None:
        self._total_at_poll = self.total

    def finds_change(self, state: str | None, total: int) -> bool:
        """Return True if the result of a poll is a change that is not known yet.

        The same result counts as a change once, since the poll may not see the rows that readers see. If the poll finds
        no stream, growth that a fetch has found counts instead. If the stream was marked stale since the last poll that
        found a change, the next change is ignored once: a fetch or another notification may still deliver it.

        Args:
            state: The state of the stream, or None if the poll did not find it.
            total: The number of chunks that the poll found.
        """
        result = (state, self.total if state is None else total)
        # Fewer chunks than when the poll began: it is a new stream of this id.
        if result == self._polled or (state == "active" and self._total_at_poll <= total <= self.total):
            return False
        if self.notified:
            self.notified = False
            return False
        self._polled = result
        return True

    def mark_stale(self) -> None:
        self.version += 1

    def _begin(self, after: int) -> None:
        self._chunks, self._characters = [], 0
        self._start = self.end = after
        self.has_position = True

    def _extend(self, chunks: Sequence[StreamChunk]) -> None:
        if chunks:
            self._chunks += chunks
            self.end = chunks[-1].seq
            self._characters += sum([len(chunk.data) for chunk in chunks])
            self._trim(len(chunks))

    def _trim(self, newest: int) -> None:
        """Drop the oldest chunks above the limits, but none of the `newest`."""
        surplus = 0
        while len(self._chunks) - surplus > newest and (
            len(self._chunks) - surplus > TAIL_CHUNKS or self._characters > TAIL_CHARACTERS
        ):
            self._characters -= len(self._chunks[surplus].data)
            surplus += 1
        if surplus:
            self._start = self._chunks[surplus - 1].seq
            del self._chunks[:surplus]
