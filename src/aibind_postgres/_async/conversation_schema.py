"""Which columns the table of conversations has, and the statements for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._conversation_sql import HAS_0004, ConversationStatements
from .columns import missing_migration

if TYPE_CHECKING:
    from .._tables import Table
    from .database import AsyncDatabase


class AsyncConversationSchema:
    """The statements of one conversation store. Those of migration 0004 are used if the table has its columns."""

    def __init__(self, database: AsyncDatabase, conversations: Table, status: Table) -> None:
        self._database = database
        self._conversations = conversations
        self._status = status
        self.statements = ConversationStatements(conversations)
        self._is_known = False

    async def look_up(self) -> ConversationStatements:
        """Return the statements for the migrations that are present. Reads the catalog in the first call."""
        if not self._is_known:
            params = [self._conversations.quoted, self._status.quoted]
            [(has_0004, has_status)] = await self._database.query(HAS_0004, params)
            if has_0004:
                status = self._status if has_status else None
                self.statements = ConversationStatements(self._conversations, True, status)
            self._is_known = True
        return self.statements

    async def require_0004(self, feature: str) -> ConversationStatements:
        """Return the statements of migration 0004. It may have been applied since the last look-up.

        Raises:
            SchemaError: The migration is missing.
        """
        if not self.statements.has_0004:
            self._is_known = False
            await self.look_up()
        if not self.statements.has_0004:
            raise missing_migration(feature, "0004", self._conversations, "lacks its columns or does not exist")
        return self.statements
