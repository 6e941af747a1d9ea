"""Reads pages of streams: alone, or many streams in one statement."""

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
from .._stream_tail import LIVE_PAGE_CHUNKS
from ..errors import StreamNotFoundError
from ..models import StreamChunk
from .combining import AsyncCombiner

if TYPE_CHECKING:
    from .connections import Row
    from .database import AsyncDatabase

BATCH_STREAMS, BATCH_CHARACTERS = 200, 8_000_000  # read by one statement at most, the characters as expected


class LiveRead(NamedTuple):
    """A read of the chunks after a number, at most `LIVE_PAGE_CHUNKS`."""

    stream_id: str
    after: int


class AsyncPageReader:
    """Reads the streams of one store."""

    def __init__(self, database: AsyncDatabase, statements: StreamStatements) -> None:
        self._database = database
        self._sql = statements
        self._combiner = AsyncCombiner(self._run, max_items=BATCH_STREAMS, max_size=BATCH_CHARACTERS)

    async def page(self, stream_id: str, after: int, limit: int, deadline: float = math.inf) -> Page | None:
        """Read the chunks after a number, at most `limit`; None if there is no such stream.

        A stream may have gaps that other programs made. The page then ends before the next chunk behind the gap.
        """
        rows = await self._database.query_with_retry(self._sql.read, [stream_id, after, limit], deadline)
        return await self._skip_gap(stream_id, Page.parse(rows, after, limit))

    async def live_page(self, read: LiveRead, characters: int, deadline: float) -> Page | None:
        """Read the newest chunks of a stream; simultaneous reads share a statement."""
        return await self._database.retry(partial(self._read_live, read, characters), deadline)

    async def stored(self, stream_id: str, cursor: int) -> AsyncIterator[StreamChunk]:
        """Iterate over the stored chunks after `cursor`, without waiting for more."""
        limit, delivered = FIRST_PAGE_CHUNKS, 0
        while True:
            page = await self.page(stream_id, cursor, limit)
            # A stream never gets shorter: a shorter one is another stream of this id.
            if page is None or page.total < delivered:
                raise StreamNotFoundError(stream_id)
            for chunk in page.chunks:
                yield chunk
            if page.is_last:
                return
            delivered = page.rows[-1][0] if page.rows else delivered
            cursor, limit = page.end, page.next_limit

    async def replay(self, stream_id: str, cursor: int, speed: float) -> AsyncIterator[StreamChunk]:
        """Iterate over the stored chunks at the pace at which they were written."""
        due, limit = monotonic(), FIRST_PAGE_CHUNKS
        written_before: float | None = None
        while True:
            rows = await self._database.query_with_retry(self._sql.read_timed, [stream_id, cursor, limit])
            page = await self._skip_gap(stream_id, Page.parse(rows, cursor, limit))
            if page is None:
                raise StreamNotFoundError(stream_id)
            for seq, data, written_at in page.rows:
                if written_at is not None:
                    due += max(0.0, written_at - (written_before or written_at)) / speed
                    written_before = written_at
                if (pause := due - monotonic()) > 0:
                    await self._database.sleep(min(pause, arguments.MAX_SECONDS))
                yield StreamChunk(seq, data)
            if page.is_last:
                return
            cursor, limit = page.end, page.next_limit

    async def _skip_gap(self, stream_id: str, page: Page | None) -> Page | None:
        """Extend an empty page to the chunk behind the gap, since a stream may count far more chunks than it has."""
        if page is None or page.rows or page.is_last:
            return page
        [(following,)] = await self._database.query_with_retry(self._sql.next, [stream_id, page.end])
        return page._replace(end=page.total if following is None else int(following) - 1)

    async def _read_live(self, read: LiveRead, characters: int) -> Page | None:
        if self._database.client.joins_transactions:  # its statements cannot be shared with other callers
            return await self._read_alone(read)
        [page] = await self._combiner.call(read, characters) or [await self._read_alone(read)]
        return page

    async def _read_alone(self, read: LiveRead) -> Page | None:
        rows = await self._database.query(self._sql.read, [*read, LIVE_PAGE_CHUNKS])
        return Page.parse(rows, read.after, LIVE_PAGE_CHUNKS)

    async def _run(self, reads: Sequence[LiveRead]) -> Sequence[Sequence[Page | None]]:
        """Return each page in a list, or an empty list for reads that have to run alone.

        The server refuses a shared statement if the text of one stream cannot be converted, for example.
        """
        if len(reads) == 1:
            return [[await self._read_alone(reads[0])]]
        items = json_text(
            [{"place": place, "id": read.stream_id, "after": read.after} for place, read in enumerate(reads)]
        )
        try:
            rows = await self._database.query(self._sql.read_batch, [items, LIVE_PAGE_CHUNKS])
        except Exception as error:
            if not wrote_nothing(error):
                raise
            return [[] for _ in reads]
        found: list[list[Row]] = [[] for _ in reads]
        for place, *row in rows:
            found[place].append(tuple(row))
        return [[Page.parse(rows, read.after, LIVE_PAGE_CHUNKS)] for rows, read in zip(found, reads, strict=True)]
