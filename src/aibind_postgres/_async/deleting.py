"""Delete streams and their chunks, in statements of a bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._deletion import MAX_CHUNKS, MAX_ROWS, next_limit
from .._sql import StreamStatements
from .._sqlstate import refuses_row
from ..models import CleanupResult

if TYPE_CHECKING:
    from .._statement_runner import Row
    from .database import AsyncDatabase


class AsyncDeleter:
    """Deletes streams of one store. Each statement deletes at most `MAX_CHUNKS` chunks.

    The first statement hides a stream from all readers. If it is interrupted after that, `cleanup` deletes the rest.
    """

    def __init__(self, database: AsyncDatabase, statements: StreamStatements) -> None:
        self._database = database
        self._sql = statements

    async def bounded(self, statement: str, params: Sequence[object]) -> Sequence[Row]:
        """Run a statement whose last parameter is the number of chunks that it may delete.

        A policy, constraint or trigger of the application may refuse tombstones. Then the number is unlimited.
        """
        try:
            return await self._database.query(statement, [*params, MAX_CHUNKS])
        except Exception as error:
            if not refuses_row(error) or self._database.client.in_transaction():
                raise
            return await self._database.query(statement, [*params, None])

    async def hide(self, stream_id: str) -> tuple[bool, str | None]:
        """Delete the status row of a stream and its first chunks.

        Returns:
            Whether the stream existed, and the id of the tombstone for `sweep`, or None if no chunks remain.
        """
        [(existed, tombstone)] = await self.bounded(self._sql.delete, [stream_id])
        return existed, tombstone

    async def sweep(self, stream_id: str, tombstone: str) -> int:
        """Delete the remaining chunks of a deleted stream, and its tombstone. Return the number of chunks."""
        chunks, more = 0, True
        while more:
            [(deleted, more)] = await self._database.query(self._sql.sweep, [stream_id, tombstone, MAX_CHUNKS])
            chunks += deleted
        return chunks

    async def cleanup(self) -> CleanupResult:
        """Delete all expired streams. Finish deletions that were interrupted."""
        streams = chunks = 0
        limit = MAX_ROWS
        while limit:
            [(found, deleted, deleted_chunks)] = await self.bounded(self._sql.cleanup, [limit])
            streams += deleted
            chunks += deleted_chunks
            limit = next_limit(limit, found, deleted)
        for tombstone, stream_id in await self._database.query(self._sql.tombstones, []):
            chunks += await self.sweep(stream_id, tombstone)
        return CleanupResult(streams, chunks)
