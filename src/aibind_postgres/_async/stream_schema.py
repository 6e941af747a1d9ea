"""The statements of a stream store for the migrations that its tables have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._sql import StreamStatements

if TYPE_CHECKING:
    from .._tables import Table
    from ..models import SynchronousCommit
    from .columns import AsyncColumnCatalog, AsyncQuery

ADDED_BY_0002 = "created_at"  # a column of the chunks table, which gets its default last
ADDED_BY_0004 = "lease_until"  # a column of the status table
ADDED_BY_0005 = "texts"  # a column of the archive table, which is created last


class AsyncStreamSchema:
    """The statements of one stream store, for the migrations that its tables have.

    Those of migration 0005 are used if the role of the connection may read the archive table: without this privilege,
    a role that has never archived can still append, delete and clean up.
    """

    def __init__(
        self,
        columns: AsyncColumnCatalog,
        chunks: Table,
        status: Table,
        synchronous_commit: SynchronousCommit | None,
        lease: int,
    ) -> None:
        self._columns = columns
        self._chunks = chunks
        self._status = status
        self._archive = chunks.archive
        self._with_0004 = StreamStatements(chunks, status, synchronous_commit, lease=lease)
        self._with_0005 = StreamStatements(chunks, status, synchronous_commit, lease=lease, archive=True)
        self.statements = StreamStatements(chunks, status, synchronous_commit)
        self.is_known = False

    @property
    def has_leases(self) -> bool:
        """Whether the status table is known to have the columns of migration 0004."""
        return self.statements in (self._with_0004, self._with_0005)

    @property
    def has_append(self) -> bool:
        """Whether the tables are distributed, and have the function for appends."""
        return self._columns.has_append and self.has_leases

    async def look_up(self, query: AsyncQuery | None = None, *, again: bool = False) -> StreamStatements:
        """Return the statements for the migrations that are present, as of the first look-up.

        Args:
            query: Runs the statement. Default: the client of the store.
            again: Whether to look again for migration 0004 if it was missing.
        """
        if self.has_leases or (self.is_known and not again):
            return self.statements
        if ADDED_BY_0004 in (await self._columns.of(self._status, query, again=again)).names:
            await self._use_newest(query)
        self.is_known = True
        return self.statements

    async def has_times(self) -> bool:
        """Return True if migration 0002 is present, as of the last look-up."""
        return ADDED_BY_0002 in (await self._columns.of(self._chunks)).names

    async def require_0004(self, feature: str) -> StreamStatements:
        """Return the statements of migration 0004. It may have been applied since the last look-up.

        Raises:
            SchemaError: The migration is missing.
        """
        await self._columns.require(self._status, [ADDED_BY_0004], feature, "0004")
        if not self.has_leases:
            await self._use_newest()
        self.is_known = True
        return self.statements

    async def has_archive(self) -> bool:
        """Return True if migration 0005 is present. It may have been applied since the last look-up."""
        if self.statements is self._with_0005:
            return True
        return ADDED_BY_0005 in (await self._columns.of(self._archive, again=True)).names

    async def can_read_archive(self) -> bool:
        """Return True if migration 0005 is present, and the role of the connection may read the archive table."""
        return await self.has_archive() and (await self._columns.of(self._archive)).is_readable

    async def require_0005(self, feature: str) -> StreamStatements:
        """Return the statements of migration 0005. It may have been applied since the last look-up.

        Raises:
            SchemaError: The migration is missing.
        """
        if self.statements is not self._with_0005:
            await self._columns.require(self._archive, [ADDED_BY_0005], feature, "0005")
            await self.require_0004(feature)
            await self._use_newest()
        return self._with_0005

    async def _use_newest(self, query: AsyncQuery | None = None) -> None:
        """Choose the statements, since migration 0004 is present."""
        archive = await self._columns.of(self._archive, query)
        has_archive = ADDED_BY_0005 in archive.names and archive.is_readable
        self.statements = self._with_0005 if has_archive else self._with_0004
