"""Which migrations the stream tables have, and the statements for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .._sql import StreamStatements
from ..errors import SchemaError

if TYPE_CHECKING:
    from .._statement_runner import Row
    from .._tables import Table
    from ..models import SynchronousCommit
    from .database import AsyncDatabase

# Reads the catalog: a failing statement would abort the transaction of a caller.
HAS_COLUMN = """
SELECT EXISTS (
    SELECT FROM pg_attribute
     WHERE attrelid = to_regclass($1::text) AND attname = $2::text AND NOT attisdropped
)
"""


class AsyncQuery(Protocol):
    """Runs a statement and returns its rows."""

    async def __call__(self, sql: str, params: Sequence[object], /) -> Sequence[Row]: ...


class AsyncStreamSchema:
    """The statements of one stream store. Those of migration 0004 are used if the status table has its columns."""

    def __init__(
        self,
        database: AsyncDatabase,
        chunks: Table,
        status: Table,
        synchronous_commit: SynchronousCommit | None,
        lease: int,
    ) -> None:
        self._database = database
        self._status = status
        self._with_0004 = StreamStatements(chunks, status, synchronous_commit, lease=lease)
        self.statements = StreamStatements(chunks, status, synchronous_commit)
        self.is_known = False

    @property
    def has_leases(self) -> bool:
        """Whether the status table is known to have the columns of migration 0004."""
        return self.statements is self._with_0004

    async def look_up(self, query: AsyncQuery | None = None) -> StreamStatements:
        """Return the statements for the migrations that are present. Reads the catalog in the first call.

        Args:
            query: Runs a statement. Default: that of the database.
        """
        if not self.is_known:
            rows = await (query or self._database.query)(HAS_COLUMN, [self._status.quoted, "lease_until"])
            if rows[0][0]:
                self.statements = self._with_0004
            self.is_known = True
        return self.statements

    async def require_0004(self, feature: str) -> StreamStatements:
        """Return the statements of migration 0004. It may have been applied since the last look-up.

        Raises:
            SchemaError: The migration is missing.
        """
        if not self.has_leases:
            self.is_known = False
            await self.look_up()
        if not self.has_leases:
            raise SchemaError(
                f"{feature} needs migration 0004, whose columns {self._status.quoted} does not have: apply it with "
                "`aibind-postgres migrate`, or with aibind_postgres.schema.migrate"
            )
        return self.statements
