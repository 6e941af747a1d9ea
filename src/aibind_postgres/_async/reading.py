"""Reading streams: by pages what is there, then what comes."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from .. import _arguments as arguments
from ..errors import StreamNotFoundError
from ..models import StreamChunk, chunks_of
from .feeds import QuietError

if TYPE_CHECKING:
    from .._sql import StreamStatements
    from .changes import AsyncChanges
    from .connections import Row
    from .database import AsyncDatabase

FIRST_PAGE, PAGE = 50, 2000  # chunks that one statement reads at first, and at most
PAGE_SIZE = 1_000_000  # characters that one statement is to read, if chunks go on as they were


class AsyncReader:
    """Reads the streams of one store."""

    def __init__(self, database: AsyncDatabase, statements: StreamStatements, changes: AsyncChanges) -> None:
        self._database = database
        self._sql = statements
        self._changes = changes

    async def read(
        self, stream_id: str, cursor: int, follow: bool, patience: float = math.inf
    ) -> AsyncIterator[StreamChunk]:
        """Iterate over chunks; one of number 0 tells that nothing has come for `patience` seconds."""
        delivered, page = 0, FIRST_PAGE
        with self._changes.place(stream_id) as place:
            while True:
                look = place.before_look()
                rows = await self._database.query_with_retry(self._sql.read, [stream_id, cursor, page])
                # A stream never gets shorter: if this one has, it is another one of the same id.
                if not rows or -rows[0][0] < delivered:
                    raise StreamNotFoundError(stream_id)
                for chunk in chunks_of(rows[1:]):
                    yield chunk
                total_chunks, state = -rows[0][0], rows[0][1]
                if len(rows) > 1:
                    delivered = rows[-1][0]
                if (read_up_to := await self._read_up_to(stream_id, cursor + page, rows)) < total_chunks:
                    cursor, page = read_up_to, _next_page(rows)
                    continue
                if state != "active" or not follow:
                    return
                cursor = max(cursor, total_chunks)
                place.stands(look, cursor, total_chunks)
                while True:
                    try:
                        chunks = await place.follow(cursor, patience=patience)
                    except QuietError:
                        yield StreamChunk(0, "")
                        continue
                    if not chunks:
                        break
                    for chunk in chunks:
                        yield chunk
                    cursor = delivered = chunks[-1].seq
                if chunks is not None:
                    return

    async def replay(self, stream_id: str, cursor: int, speed: float) -> AsyncIterator[StreamChunk]:
        """Iterate over the chunks that are there, at the pace at which they were written."""
        due, page = monotonic(), FIRST_PAGE
        written_before: float | None = None
        while True:
            rows = await self._database.query_with_retry(self._sql.read_timed, [stream_id, cursor, page])
            if not rows:
                raise StreamNotFoundError(stream_id)
            for seq, data, written_at in rows[1:]:
                if written_at is not None:
                    due += max(0.0, written_at - (written_before or written_at)) / speed
                    written_before = written_at
                if (pause := due - monotonic()) > 0:
                    await self._database.sleep(min(pause, arguments.MAX_SECONDS))
                yield StreamChunk(seq, data)
            cursor, page = await self._read_up_to(stream_id, cursor + page, rows), _next_page(rows)
            if cursor >= -rows[0][0]:
                return

    async def _read_up_to(self, stream_id: str, end: int, rows: Sequence[Row]) -> int:
        """Return the number up to which there is no other chunk than those of a page that was to end at `end`."""
        total_chunks = -rows[0][0]
        if len(rows) > 1 or end >= total_chunks:
            return end
        [(following,)] = await self._database.query_with_retry(self._sql.next, [stream_id, end])
        return total_chunks if following is None else int(following) - 1


def _next_page(rows: Sequence[Row]) -> int:
    """Return how many chunks to read after a page, so that slow readers of large chunks do not fill the memory."""
    size = sum([len(row[1]) for row in rows[1:]])
    return max(1, min(PAGE, PAGE_SIZE * (len(rows) - 1) // size)) if size else PAGE
