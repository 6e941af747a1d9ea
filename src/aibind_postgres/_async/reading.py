"""Read pages of streams: one stream, or many streams in one statement."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from .. import _arguments as arguments
from .._pages import FIRST_PAGE_CHUNKS, MAX_PAGE_CHUNKS, Page, as_chunks, as_events, as_timed_chunks, is_missing
from .._sql import json_text
from .._sqlstate import wrote_nothing
from ..errors import StreamNotFoundError
from ..models import StoredEvent, StreamChunk, TimedChunk
from .combining import AsyncCombiner
from .database import RetryableError

if TYPE_CHECKING:
    from .._statement_runner import Row
    from .archiving import AsyncArchive
    from .columns import AsyncQuery
    from .database import AsyncAttempt, AsyncDatabase
    from .replica import AsyncReplica
    from .stream_schema import AsyncStreamSchema

Item = TypeVar("Item")

AGE_TIMEOUT = 1.0  # seconds to wait for the age of a chunk, for the metrics
BATCH_STREAMS = 200  # in one statement at most


class StandbyLagError(RetryableError):
    """A page contradicts the known state of its stream, and the server may be a standby that lags behind."""

    def __init__(self, page: Page | None) -> None:
        super().__init__("the standby lags behind, or the stream was deleted")
        self.page = page


class SharedRead(NamedTuple):
    """A request for at most `limit` chunks after sequence number `after`."""

    stream_id: str
    after: int
    limit: int


PageCheck: TypeAlias = Callable[[Page | None], bool]


class AsyncPageReader:
    """Reads chunks of the streams of one store.

    Args:
        database: The database of the store.
        schema: The statements of the store.
        archive: The archive of the store.
        replica: The replica of the store, or None.
    """

    def __init__(
        self, database: AsyncDatabase, schema: AsyncStreamSchema, archive: AsyncArchive, replica: AsyncReplica | None
    ) -> None:
        self._database = database
        self._query_stored: AsyncQuery = (replica or database).query
        self._schema = schema
        self._archive = archive
        self._combiner = AsyncCombiner(
            self._run_alone, self._run_batch, max_items=BATCH_STREAMS, max_size=BATCH_STREAMS
        )

    async def page(
        self,
        stream_id: str,
        after: int,
        limit: int,
        contradicts: PageCheck = is_missing,
        deadline: float = math.inf,
        *,
        archived: bool = False,
    ) -> Page | None:
        """Return at most `limit` chunks after sequence number `after`, or None if the stream does not exist.

        Other programs may have left gaps in a stream. An empty page ends just before the chunk that follows the gap.

        Args:
            stream_id: The id of the stream.
            after: The sequence number.
            limit: The number of chunks.
            contradicts: Returns True if a page contradicts the known state of the stream. If the server is a standby,
                which may lag behind, the page is read again for up to `retry_for` seconds. Default: True if the stream
                was not found.
            deadline: As for `retry`.
            archived: Whether the page before came from the archive; False by default. This one is then expected there.
        """
        read = partial(self._read_page, stream_id, after, limit, archived=archived)
        return await self._retry(read, stream_id, contradicts, deadline)

    async def shared_page(
        self, read: SharedRead, contradicts: PageCheck = is_missing, deadline: float = math.inf
    ) -> Page | None:
        """Return the page of a read. Simultaneous reads share a statement."""
        return await self._retry(partial(self._read_shared, read), read.stream_id, contradicts, deadline)

    async def delivery_time(self, stream_id: str, seq: int, delivered_at: float) -> float | None:
        """Return the seconds from the insertion of a chunk to its delivery at `delivered_at`, a time of `monotonic()`.

        Both times are compared with the clock of the server, so that those of other computers do not matter.

        Returns:
            The time. None if it is unknown: migration 0002 is missing, the chunk was archived, or a statement would be
            part of a caller's transaction.
        """
        if self._database.client.joins_transactions or not await self._schema.has_times():
            return None
        sent_at = monotonic()
        rows = await self._database.query(self._schema.statements.age, [stream_id, seq], AGE_TIMEOUT)
        if not rows or rows[0][0] is None:
            return None
        arrived_at = (sent_at + monotonic()) / 2  # at the server
        return max(0.0, float(rows[0][0]) - (arrived_at - delivered_at))

    def stored(self, stream_id: str, cursor: int) -> AsyncIterator[StreamChunk]:
        """Iterate over the stored chunks after `cursor`, without waiting for more."""
        return self._stored(as_chunks, stream_id, cursor)

    def stored_events(self, stream_id: str, cursor: int) -> AsyncIterator[StoredEvent]:
        """Iterate as `stored` does, and decode the chunks."""
        return self._stored(as_events, stream_id, cursor)

    def stored_with_times(self, stream_id: str, cursor: int) -> AsyncIterator[TimedChunk]:
        """Iterate as `stored` does, and add the times of the chunks."""
        return self._stored(as_timed_chunks, stream_id, cursor, timed=True)

    async def _stored(
        self,
        convert: Callable[[Iterable[tuple[Any, ...]]], Iterator[Item]],
        stream_id: str,
        cursor: int,
        *,
        timed: bool = False,
    ) -> AsyncIterator[Item]:
        limit, delivered, archived = FIRST_PAGE_CHUNKS, 0, False
        while True:
            page = await self._stored_page(stream_id, cursor, limit, delivered, timed=timed, archived=archived)
            for item in convert(page.rows):
                yield item
            if page.is_last:
                return
            delivered = page.last_seq or delivered
            cursor, limit, archived = page.end, page.next_limit, page.is_archived
            del page  # not kept during the next statement

    async def replay(self, stream_id: str, cursor: int, speed: float) -> AsyncIterator[StreamChunk]:
        """Iterate over the stored chunks at `speed` times the pace at which they were written."""
        due_at, limit, delivered, archived = monotonic(), FIRST_PAGE_CHUNKS, 0, False
        written_before: float | None = None
        while True:
            page = await self._stored_page(stream_id, cursor, limit, delivered, timed=True, archived=archived)
            for seq, data, written_at in page.rows:
                if written_at is not None:
                    due_at += max(0.0, written_at - (written_before or written_at)) / speed
                    written_before = written_at
                if (pause := due_at - monotonic()) > 0:
                    await self._database.sleep(min(pause, arguments.MAX_SECONDS))
                yield StreamChunk(seq, data)
                delivered = seq
            if page.is_last:
                return
            cursor, limit, archived = page.end, page.next_limit, page.is_archived
            del page

    async def _stored_page(
        self, stream_id: str, cursor: int, limit: int, delivered: int, *, timed: bool, archived: bool
    ) -> Page:
        def contradicts(page: Page | None) -> bool:
            # Streams never shrink: a smaller total means a new stream with this id.
            return page is None or page.total < delivered

        read = partial(self._read_page, stream_id, cursor, limit, timed=timed, archived=archived)
        page = await self._retry(read, stream_id, contradicts)
        if page is None or contradicts(page):
            raise StreamNotFoundError(stream_id)
        return page

    async def _read_page(
        self, stream_id: str, after: int, limit: int, *, timed: bool = False, archived: bool = False
    ) -> Page | None:
        if archived:
            page = await self._archive.page(self._query_stored, stream_id, after, limit, timed=timed)
        else:
            page = await self._read(self._query_stored, stream_id, after, limit, timed=timed)
        if page is None or page.rows or page.is_last:
            return page
        return await self._skip_gap(stream_id, page)

    async def _retry(
        self, read: AsyncAttempt[Page | None], stream_id: str, contradicts: PageCheck, deadline: float = math.inf
    ) -> Page | None:
        try:
            return await self._database.retry(partial(self._read_replicated, read, stream_id, contradicts), deadline)
        except StandbyLagError as error:
            return error.page

    async def _read_replicated(
        self, read: AsyncAttempt[Page | None], stream_id: str, contradicts: PageCheck
    ) -> Page | None:
        page = await read()
        if contradicts(page):
            # One statement, since a pool may have sessions on a standby and on the primary.
            [(is_standby, *status)] = await self._database.query(self._schema.statements.standby_status, [stream_id])
            if is_standby or not contradicts(Page.parse([] if status[0] is None else [tuple(status)], 0, 0)):
                raise StandbyLagError(page)
        return page

    async def _skip_gap(self, stream_id: str, page: Page) -> Page:
        """Extend an empty page up to the next chunk, since `total` may be far larger than the number of chunks."""
        [(next_seq,)] = await self._database.query(self._schema.statements.next, [stream_id, page.end])
        return page._replace(end=page.total if next_seq is None else int(next_seq) - 1)

    async def _read(
        self, query: AsyncQuery, stream_id: str, after: int, limit: int, *, timed: bool = False
    ) -> Page | None:
        """Read a page. If chunks are missing in it, since they have been archived, read it from the archive."""
        statement = self._schema.statements.read_timed if timed else self._schema.statements.read
        page = await self._read_chunks(query, statement, stream_id, after, min(limit, MAX_PAGE_CHUNKS))
        if page is None or not page.lacks_chunks(after) or not await self._schema.has_archive():
            return page
        whole = await self._archive.page(query, stream_id, after, limit, timed=timed)
        if whole is not None and (whole.state == "active" or whole.total < page.total):
            raise StandbyLagError(whole)  # or it is a new stream with this id
        return whole

    async def _read_chunks(
        self, query: AsyncQuery, statement: str, stream_id: str, after: int, limit: int
    ) -> Page | None:
        """Read a page from the chunks table, with a smaller limit if its first chunk is too large for this one."""
        while True:
            rows = await query(statement, [stream_id, after, limit])
            page = Page.parse(sorted(rows, key=itemgetter(0)), after, limit)
            if page is None or page.end > after:
                return page
            limit = page.next_limit

    async def _read_shared(self, read: SharedRead) -> Page | None:
        # In a transaction of the caller, statements must not serve other callers.
        if self._database.client.joins_transactions or self._database.is_distributed:
            return await self._read(self._database.query, *read)
        [page] = await self._combiner.call(read) or [await self._read(self._database.query, *read)]
        return page

    async def _run_alone(self, read: SharedRead) -> Sequence[Page | None]:
        return [await self._read(self._database.query, *read)]

    async def _run_batch(self, reads: Sequence[SharedRead]) -> Sequence[Sequence[Page | None]]:
        """Return a list with one page for each read, or an empty list for a read that must run alone.

        The server rejects a shared statement if, for example, it cannot convert the text of one stream. With other
        settings of its session, a reader may see a stream that the statement does not find. A chunk may be too large
        for the batch, or archived.
        """
        if self._database.is_distributed:  # since these reads have queued
            return [[] for _ in reads]
        items = [
            {"index": index, "id": read.stream_id, "after": read.after, "limit": read.limit}
            for index, read in enumerate(reads)
        ]
        try:
            rows = await self._database.query(self._schema.statements.read_batch, [json_text(items)])
        except Exception as error:
            if not self._database.refuses(error) and not wrote_nothing(error):
                raise
            return [[] for _ in reads]
        found: list[list[Row]] = [[] for _ in reads]
        for index, *row in rows:
            found[index].append(tuple(row))
        pages = [Page.parse(rows, read.after, read.limit) for rows, read in zip(found, reads, strict=True)]
        return [
            [page] if page is not None and page.end > read.after and not page.lacks_chunks(read.after) else []
            for page, read in zip(pages, reads, strict=True)
        ]
