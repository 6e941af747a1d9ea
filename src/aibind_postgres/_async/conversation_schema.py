"""The statements of a conversation store for the migrations that its tables have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._conversation_sql import ConversationStatements
from .columns import AsyncColumnCatalog

if TYPE_CHECKING:
    from .._tables import Table
    from .database import AsyncDatabase

ADDED_BY_0004 = "updated_at"  # a column of the table of conversations
ADDED_TO_STATUS_BY_0004 = "session_id"


class AsyncConversationSchema:
    """The statements of one conversation store. Those of migration 0004 are used if the table has its columns."""

    def __init__(self, database: AsyncDatabase, conversations: Table, status: Table) -> None:
        self._columns = AsyncColumnCatalog(database, (conversations, status))
        self._conversations = conversations
        self._status = status
        self.statements = ConversationStatements(conversations)

    async def look_up(self) -> ConversationStatements:
        """Return the statements for the migrations that are present, as of the last look-up."""
        if not self.statements.has_0004 and ADDED_BY_0004 in (await self._columns.of(self._conversations)).names:
            await self._use_0004()
        return self.statements

    async def require_0004(self, feature: str) -> ConversationStatements:
        """Return the statements of migration 0004. It may have been applied since the last look-up.

        Raises:
            SchemaError: The migration is missing.
        """
        if not self.statements.has_0004:
            await self._columns.require(self._conversations, [ADDED_BY_0004], feature, "0004")
            await self._use_0004()
        return self.statements

    async def _use_0004(self) -> None:
        status = await self._columns.of(self._status)
        joins_streams = status.is_readable and ADDED_TO_STATUS_BY_0004 in status.names
        self.statements = ConversationStatements(self._conversations, True, self._status if joins_streams else None)
