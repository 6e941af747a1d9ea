"""Read pages of streams: one stream, or many streams in one statement."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from .. import _arguments as arguments
from .._pages import FIRST_PAGE_CHUNKS, Page
from .._sql import StreamStatements, json_text
from .._sqlstate import wrote_nothing
from .._stream_tail import SHARED_PAGE_CHUNKS
from ..errors import StreamNotFoundError
from ..models import StreamChunk
from .combining import AsyncCombiner

if TYPE_CHECKING:
    from .connections import Row
    from .database import AsyncDatabase

BATCH_STREAMS, BATCH_CHARACTERS = 200, 8_000_000  # the most streams and expected characters of one statement


class SharedRead(NamedTuple):
    """A request for at most `SHARED_PAGE_CHUNKS` chunks after sequence number `after`."""

    stream_id: str
    after: int


class AsyncPageReader:
    """Reads chunks of the streams of one store."""

    def __init__(self, database: AsyncDatabase, statements: StreamStatements) -> None:
        self._database = database
        self._sql = statements
        self._combiner = AsyncCombiner(self._run, max_items=BATCH_STREAMS, max_size=BATCH_CHARACTERS)

    async def page(self, stream_id: str, after: int, limit: int, deadline: float = math.inf) -> Page | None:
        """Return at most `limit` chunks after sequence number `after`, or None if the stream does not exist.

        Other programs may have left gaps in a stream. An empty page ends just before the chunk that follows the gap.
        """
        rows = await self._database.query_with_retry(self._sql.read, [stream_id, after, limit], deadline)
        return await self._skip_gap(stream_id, Page.parse(rows, after, limit))

    async def shared_page(self, read: SharedRead, characters: int, deadline: float) -> Page | None:
        """Read at most `SHARED_PAGE_CHUNKS` chunks after `read.after`. Simultaneous reads share a statement."""
        return await self._database.retry(partial(self._read_shared, read, characters), deadline)

    async def stored(self, stream_id: str, cursor: int) -> AsyncIterator[StreamChunk]:
        """Iterate over the stored chunks after `cursor`, without waiting for more."""
        limit, delivered = FIRST_PAGE_CHUNKS, 0
        while True:
            page = await self._stored_page(self._sql.read, stream_id, cursor, limit, delivered)
            for chunk in page.chunks:
                yield chunk
            if page.is_last:
                return
            delivered = page.rows[-1][0] if page.rows else delivered
            cursor, limit = page.end, page.next_limit

    async def replay(self, stream_id: str, cursor: int, speed: float) -> AsyncIterator[StreamChunk]:
        """Iterate over the stored chunks at `speed` times the pace at which they were written."""
        due_at, limit, delivered = monotonic(), FIRST_PAGE_CHUNKS, 0
        written_before: float | None = None
        while True:
            page = await self._stored_page(self._sql.read_timed, stream_id, cursor, limit, delivered)
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
            cursor, limit = page.end, page.next_limit

    async def _stored_page(self, statement: str, stream_id: str, cursor: int, limit: int, delivered: int) -> Page:
        rows = await self._database.query_with_retry(statement, [stream_id, cursor, limit])
        page = await self._skip_gap(stream_id, Page.parse(rows, cursor, limit))
        # Streams never shrink: a smaller total means a new stream with this id.
        if page is None or page.total < delivered:
            raise StreamNotFoundError(stream_id)
        return page

    async def _skip_gap(self, stream_id: str, page: Page | None) -> Page | None:
        """Extend an empty page up to the next chunk, since `total` may be far larger than the number of chunks."""
        if page is None or page.rows or page.is_last:
            return page
        [(next_seq,)] = await self._database.query_with_retry(self._sql.next, [stream_id, page.end])
        return page._replace(end=page.total if next_seq is None else int(next_seq) - 1)

    async def _read_shared(self, read: SharedRead, characters: int) -> Page | None:
        if self._database.client.joins_transactions:  # its statements must not serve other callers
            return await self._read_alone(read)
        [page] = await self._combiner.call(read, characters) or [await self._read_alone(read)]
        return page

    async def _read_alone(self, read: SharedRead) -> Page | None:
        rows = await self._database.query(self._sql.read, [*read, SHARED_PAGE_CHUNKS])
        return Page.parse(rows, read.after, SHARED_PAGE_CHUNKS)

    async def _run(self, reads: Sequence[SharedRead]) -> Sequence[Sequence[Page | None]]:
        """Return a list with one page for each read, or an empty list for a read that must run alone.

        The server rejects a shared statement if, for example, it cannot convert the text of one stream. A stream that
        the statement does not find may be visible to its reader, whose session may have other settings.
        """
        if len(reads) == 1:
            return [[await self._read_alone(reads[0])]]
        items = json_text(
            [{"index": index, "id": read.stream_id, "after": read.after} for index, read in enumerate(reads)]
        )
        try:
            rows = await self._database.query(self._sql.read_batch, [items, SHARED_PAGE_CHUNKS])
        except Exception as error:
            if not wrote_nothing(error):
                raise
            return [[] for _ in reads]
        found: list[list[Row]] = [[] for _ in reads]
        for index, *row in rows:
            found[index].append(tuple(row))
        pages = [Page.parse(rows, read.after, SHARED_PAGE_CHUNKS) for rows, read in zip(found, reads, strict=True)]
        return [[] if page is None else [page] for page in pages]
