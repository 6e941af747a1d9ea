"""The statements of a stream store for the migrations that its tables have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._sql import StreamStatements

if TYPE_CHECKING:
    from .._tables import Table
    from ..models import SynchronousCommit
    from .columns import AsyncColumnCatalog, AsyncQuery

ADDED_BY_0004 = "lease_until"  # a column of the status table


class AsyncStreamSchema:
    """The statements of one stream store. Those of migration 0004 are used if the status table has its columns."""

    def __init__(
        self,
        columns: AsyncColumnCatalog,
        chunks: Table,
        status: Table,
        synchronous_commit: SynchronousCommit | None,
        lease: int,
    ) -> None:
        self._columns = columns
        self._status = status
        self._with_0004 = StreamStatements(chunks, status, synchronous_commit, lease=lease)
        self.statements = StreamStatements(chunks, status, synchronous_commit)
        self.is_known = False

    @property
    def has_leases(self) -> bool:
        """Whether the status table is known to have the columns of migration 0004."""
        return self.statements is self._with_0004

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
            self.statements = self._with_0004
        self.is_known = True
        return self.statements

    async def require_0004(self, feature: str) -> StreamStatements:
        """Return the statements of migration 0004. It may have been applied since the last look-up.

        Raises:
            SchemaError: The migration is missing.
        """
        await self._columns.require(self._status, [ADDED_BY_0004], feature, "0004")
        self.statements, self.is_known = self._with_0004, True
        return self.statements
