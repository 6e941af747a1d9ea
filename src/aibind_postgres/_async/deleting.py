"""Delete streams and their chunks, in statements of a bounded size."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .._deletion import MAX_CHUNKS, MAX_ROWS, next_limit
from .._sqlstate import refuses_row
from ..models import CleanupResult

if TYPE_CHECKING:
    from .._statement_runner import Row
    from .database import AsyncDatabase
    from .stream_schema import AsyncStreamSchema


class AsyncDeleter:
    """Deletes streams of one store. Each statement deletes at most `MAX_CHUNKS` chunks, and the pages of
    archived streams.

    The first statement hides a stream from all readers. If it is interrupted after that, `cleanup` deletes the rest.
    """

    def __init__(self, database: AsyncDatabase, schema: AsyncStreamSchema) -> None:
        self._database = database
        self._schema = schema

    async def bounded(self, statement: str, params: Sequence[object], distributed: str | None = None) -> Sequence[Row]:
        """Run a statement whose last parameter is the number of chunks that it may delete.

        A policy, constraint or trigger of the application may refuse tombstones. Then the number is unlimited.

        Args:
            statement: The statement.
            params: Its parameters, without the last one.
            distributed: The statement for distributed tables; the same by default.
        """
        either = partial(self._database.query_either, statement, distributed or statement)
        try:
            return await either([*params, MAX_CHUNKS])
        except Exception as error:
            if not refuses_row(error) or self._database.client.in_transaction():
                raise
            return await either([*params, None])

    async def hide(self, stream_id: str) -> tuple[bool, str | None]:
        """Delete the status row of a stream and its first chunks.

        Returns:
            Whether the stream existed, and the id of the tombstone for `sweep`, or None if no chunks remain.
        """
        [(existed, tombstone)] = await self.bounded((await self._schema.look_up()).delete, [stream_id])
        return existed, tombstone

    async def sweep(self, stream_id: str, tombstone: str) -> int:
        """Delete the remaining chunks of a deleted stream, and its tombstone. Return the number of chunks."""
        total = 0
        async for chunks in self._sweep_steps(stream_id, tombstone):
            total += chunks
        return total

    async def _sweep_steps(self, stream_id: str, tombstone: str) -> AsyncIterator[int]:
        more = True
        sweep = self._schema.statements.sweep
        while more:
            [(chunks, more)] = await self._database.query(sweep, [stream_id, tombstone, MAX_CHUNKS])
            yield chunks

    async def cleanup(self) -> CleanupResult:
        """Delete all expired streams. Finish deletions that were interrupted."""
        streams = chunks = 0
        async for step in self.cleanup_steps():
            streams += step.streams
            chunks += step.chunks
        return CleanupResult(streams, chunks)

    async def cleanup_steps(self) -> AsyncIterator[CleanupResult]:
        """Clean up as `cleanup` does, and yield the result of each statement."""
        statements = await self._schema.look_up()
        async for step in self.expired_steps(statements.cleanup, [], statements.cleanup_distributed):
            yield step
        async for step in self.tombstone_steps():
            yield step

    async def expired_steps(
        self, statement: str, params: Sequence[object], distributed: str | None = None
    ) -> AsyncIterator[CleanupResult]:
        """Delete expired streams, and yield the result of each statement.

        Args:
            statement: A statement that cleans up.
            params: Its parameters, without the limits of its size.
            distributed: The statement for distributed tables; the same by default.
        """
        limit = MAX_ROWS
        while limit:
            [(found, streams, chunks)] = await self.bounded(statement, [limit, *params], distributed)
            yield CleanupResult(streams, chunks)
            limit = next_limit(limit, found, streams)

    async def tombstone_steps(self) -> AsyncIterator[CleanupResult]:
        """Finish deletions that were interrupted, and yield the result of each statement."""
        statements = await self._schema.look_up()
        for tombstone, stream_id in await self._database.query(statements.tombstones, []):
            async for chunks in self._sweep_steps(stream_id, tombstone):
                yield CleanupResult(0, chunks)
