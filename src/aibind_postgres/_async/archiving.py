"""Move finished streams to the archive and back, and read them there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from .._archive import parse_archived
from ..errors import StreamNotFoundError
from ..models import ArchiveResult

if TYPE_CHECKING:
    from .._pages import Page
    from .columns import AsyncQuery
    from .database import AsyncDatabase
    from .stream_schema import AsyncStreamSchema


ATTEMPTS = 10  # to move chunks, before `steps` ends


class AsyncArchive:
    """The archive of the streams of one store."""

    def __init__(self, database: AsyncDatabase, schema: AsyncStreamSchema) -> None:
        self._database = database
        self._schema = schema

    async def steps(self, older_than: int, batch_size: int) -> AsyncIterator[ArchiveResult]:
        """Archive finished streams, and yield the result of each statement.

        Args:
            older_than: The time since the last chunk of a stream, in milliseconds.
            batch_size: The number of chunks that one statement moves at most.

        Raises:
            SchemaError: Migration 0005 is missing.
        """
        statements = await self._schema.require_0005("archive")
        failed = 0  # statements in a row that moved nothing
        while failed < ATTEMPTS:
            rows = await self._database.query(statements.archive, [older_than, batch_size])
            [(streams, chunks, had_streams)] = rows
            if not had_streams:
                return
            # Another archiver may have moved the chunks between the snapshot of the statement and its locks.
            failed = 0 if streams or chunks else failed + 1
            yield ArchiveResult(streams, chunks)

    async def restore(self, stream_id: str) -> AsyncIterator[int]:
        """Move a stream back, and yield the number of chunks of each statement.

        Raises:
            StreamNotFoundError: The stream does not exist.
            SchemaError: Migration 0005 is missing.
        """
        statements = await self._schema.require_0005("unarchive")
        is_first = True
        while True:
            [(found, chunks, had_pages)] = await self._database.query(statements.unarchive, [stream_id])
            if not found:
                raise StreamNotFoundError(stream_id)
            # The first statement may have waited for one that archived the stream, and not see its pages. A later one
            # may have waited for one that moved the pages back, and see only those.
            if not had_pages and not is_first:
                return
            is_first = False
            yield chunks

    async def page(self, query: AsyncQuery, stream_id: str, after: int, limit: int, *, timed: bool) -> Page | None:
        """Return at most `limit` chunks after number `after`, archived or not; None if the stream does not exist.

        It ends with a page of the archive, so it may have fewer chunks than `limit` although more follow.

        Args:
            query: Runs the statement.
            stream_id: The id of the stream.
            after: The sequence number.
            limit: The number of chunks.
            timed: Whether to read the times of the chunks.
        """
        statements = await self._schema.require_0005("an archived stream")
        statement = statements.read_archived_timed if timed else statements.read_archived
        while True:
            rows = await query(statement, [stream_id, after, limit])
            page = parse_archived(rows, after, limit)
            if page is None or page.end > after:
                return page
            limit = page.next_limit  # the first chunk is too large for this one
