"""The conversation store: load, save and merge branching conversations."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from .. import _arguments as arguments
from .._conversation_sql import ConversationStatements
from .._document import empty_document, parse_document, parse_trusted_document, serialize_document
from .._merging import merge
from .._tables import CONVERSATIONS_TABLE, Table
from ..errors import ConversationConflictError
from ..history import ChatHistory, Origin, new_id
from ..models import ConversationInfo, from_epoch_ms
from .database import AsyncDatabase

if TYPE_CHECKING:
    from psycopg.sql import Identifier
    from typing_extensions import Self

    from .client import AsyncClientLike

LIST_PAGE_ROWS = 2000  # rows that one statement of `list` returns

OnConflict: TypeAlias = Literal["merge", "raise", "overwrite"]


class AsyncPostgresConversationStore:
    """Stores conversations with branches in one table.

    Threads, or the tasks of one event loop, may share a store, but not a `ChatHistory`. The statements expect the
    isolation level READ COMMITTED. Expired conversations are treated as deleted. Expiry depends on the server's clock.

    Args:
        client: A connection string, a psycopg pool or connection, or an object with the `PostgresClient` protocol, as
            for the stream store. If the client is a connection inside a transaction, the store takes part in that
            transaction.
        table: The name of the table; `aibind_conversations` by default. Use `psycopg.sql.Identifier` for a name with
            a dot.
        ttl: Seconds, or a timedelta, for which a conversation is kept after it was last saved or touched; 1800 by
            default.
        timeout: Seconds, or a timedelta, to wait for the answer to a statement, as for the stream store; no limit by
            default. Clients of other drivers do not accept it.

    Raises:
        ValueError: By the constructor, for an invalid table name or setting.
        TypeError: By the constructor, for an argument of the wrong type.
        InvalidDataError: By every method, for a session id that is empty, longer than 1,024 bytes, or not storable.
        SchemaError: By every method, if the table is missing.
        StoreClosedError: By every method, once the store is closed. `close` can be repeated.
        RuntimeError: By every method, in a different event loop from the one of the first call.
        ForkedError: By every method except `close`, in a process that was forked after the first call, or after the
            store was made from an open pool or connection.

    Every method raises the driver's own error if the server cannot be reached.
    """

    def __init__(
        self,
        client: AsyncClientLike,
        *,
        table: str | Identifier = CONVERSATIONS_TABLE,
        ttl: float | timedelta = 1800.0,
        timeout: float | timedelta | None = None,
    ) -> None:
        self._table = Table.parse(table)
        self._sql = ConversationStatements(self._table)
        self._ttl = arguments.milliseconds(ttl, "ttl")
        self._database = AsyncDatabase(client, retry_for=0.0, timeout=timeout)
        self._id = new_id()  # marks the histories that this store has loaded or saved

    def __repr__(self) -> str:
        return f"<{type(self).__name__} in {self._table.quoted}, {self._database.client!r}, {self._database.state}>"

    async def load(self, session_id: str) -> ChatHistory[Any]:
        """Return a conversation.

        Args:
            session_id: The id of the conversation.

        Returns:
            The history; an empty one if the conversation does not exist.

        Raises:
            InvalidHistoryError: The stored row is not a valid conversation.
        """
        key = arguments.identifier(session_id, "a session id")
        rows = await self._database.query(self._sql.load, [key])
        return self._to_history(key, rows[0][0] if rows else None)

    async def save(self, session_id: str, chat: ChatHistory[Any], *, on_conflict: OnConflict = "merge") -> None:
        """Save a conversation. When this returns, it is durable, and `chat` equals the stored conversation.

        The call can be repeated if its outcome is unknown because the connection was lost, or if the caller's
        transaction was rolled back.

        Args:
            session_id: The id of the conversation.
            chat: The history to save. A merge updates it.
            on_conflict: The action if the stored conversation has changed since this store loaded or saved `chat`
                under this id:

                - `"merge"` (default): Additions of either side are kept, and removals of either side are applied. If
                  one side has removed the parent of a message, the message moves below the active leaf of that side.
                  The active leaf of `chat` wins if it has moved.
                - `"raise"`: Raise `ConversationConflictError`.
                - `"overwrite"`: Replace the stored conversation without reading it.

        In a merge, a conversation that was deleted or has expired counts as one from which everything was removed. A
        history that this store did not load under this id counts as additions only. Writers that do not check for
        conflicts, such as the TypeScript package, remove the messages that they overwrite.

        Raises:
            ConversationConflictError: The stored conversation has changed, and `on_conflict` is `"raise"`; nothing is
                stored.
            InvalidHistoryError: The stored row is not a valid conversation, or has a different message under an id of
                `chat`; nothing is stored. Not raised for `"overwrite"`.
            TypeError: `chat` is not a `ChatHistory`.
            ValueError: `on_conflict` is not one of these values.
        """
        key = arguments.identifier(session_id, "a session id")
        _check_on_conflict(on_conflict)
        if not isinstance(chat, ChatHistory):
            raise TypeError(f"chat must be a ChatHistory, not {type(chat).__name__}")
        sent = chat.to_json()
        origin = self._origin_of(key, chat)
        # If the reply is lost, the row may contain this text.
        chat._origin = origin.with_sent(_digest(sent))
        if on_conflict == "overwrite":
            await self._database.query(self._sql.overwrite, [key, sent, self._ttl])
            stored = sent
        else:
            stored = await self._save_text(chat, origin, sent, on_conflict)
        if stored != sent:
            chat._apply_stored(sent, stored)
        if self._database.client.in_transaction():
            chat._origin = origin.with_sent(_digest(stored))
        else:
            chat._origin = origin._replace(base=stored, digests=(_digest(stored),))

    async def _save_text(self, chat: ChatHistory[Any], origin: Origin, sent: str, on_conflict: OnConflict) -> str:
        """Store `sent`, or its merge with the stored text. Return the text that was stored."""
        own = {*origin.digests, _digest(sent)}
        text, expected = sent, origin.digests[-1]
        while True:
            params = [origin.session_id, text, self._ttl, expected]
            [(saved, found)] = await self._database.query(self._sql.save, params)
            if saved:
                return text
            expected = None if found is None else _digest(found)
            if expected in own:  # stored by this history: an earlier reply was lost, or its transaction was rolled back
                text = sent
            elif on_conflict == "raise":
                raise ConversationConflictError(origin.session_id, chat, self._to_history(origin.session_id, found))
            else:
                base = empty_document() if origin.base is None else parse_trusted_document(origin.base)
                theirs = empty_document() if found is None else parse_document(found)
                text = serialize_document(merge(base, parse_trusted_document(sent), theirs))

    @asynccontextmanager
    async def edit(self, session_id: str, *, on_conflict: OnConflict = "merge") -> AsyncIterator[ChatHistory[Any]]:
        """Return a context manager that loads a conversation and saves it at the end of the block.

        Nothing is saved if the block raises, or if it does not change the history.

        Args:
            session_id: The id of the conversation.
            on_conflict: As for `save`; `"merge"` by default.

        Yields:
            The history, as returned by `load`.

        Raises:
            ConversationConflictError: As for `save`.
            InvalidHistoryError: As for `load` and `save`.
            ValueError: `on_conflict` is not one of the values of `save`.
        """
        _check_on_conflict(on_conflict)
        chat = await self.load(session_id)
        before = chat.to_json()
        yield chat
        if chat.to_json() != before:
            await self.save(session_id, chat, on_conflict=on_conflict)

    async def touch(self, session_id: str) -> bool:
        """Restart the ttl of a conversation.

        Args:
            session_id: The id of the conversation.

        Returns:
            True if the conversation exists.
        """
        key = arguments.identifier(session_id, "a session id")
        return bool(await self._database.query(self._sql.touch, [key, self._ttl]))

    async def delete(self, session_id: str) -> bool:
        """Delete a conversation.

        Args:
            session_id: The id of the conversation.

        Returns:
            True if the conversation existed.
        """
        rows = await self._database.query(self._sql.delete, [arguments.identifier(session_id, "a session id")])
        return bool(rows and rows[0][0])

    async def list(self) -> AsyncIterator[ConversationInfo]:
        """Iterate over the conversations in the order of their ids.

        A conversation that is saved during the iteration may or may not appear.

        Yields:
            The id and the expiry of each conversation.
        """
        last_id = ""
        while True:
            rows = await self._database.query(self._sql.list, [last_id, LIST_PAGE_ROWS])
            for session_id, expires_at in rows:
                yield ConversationInfo(session_id, from_epoch_ms(expires_at))
            if len(rows) < LIST_PAGE_ROWS:
                return
            last_id = rows[-1][0]

    async def cleanup(self, *, batch_size: int = 1000) -> int:
        """Delete the expired conversations. Safe to run in several processes at once.

        Args:
            batch_size: The maximum number of conversations that one statement deletes; 1000 by default.

        Returns:
            The number of deleted conversations.

        Raises:
            InvalidDataError: `batch_size` is not an int of at least 1.
        """
        arguments.integer(batch_size, "batch_size", minimum=1)
        total: int = 0
        while True:
            [(deleted,)] = await self._database.query(self._sql.cleanup, [batch_size])
            total += deleted
            if deleted < batch_size:
                return total

    async def close(self) -> None:
        """Close the store, and its pool if it was made from a connection string. Safe to repeat."""
        if self._database.inherited:
            return
        self._database.check_owner()
        self._database.closing.set()
        await self._database.client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _to_history(self, session_id: str, text: str | None) -> ChatHistory[Any]:
        chat: ChatHistory[Any] = ChatHistory() if text is None else ChatHistory.from_json(text)
        chat._origin = Origin(self._id, session_id, text, (None if text is None else _digest(text),))
        return chat

    def _origin_of(self, session_id: str, chat: ChatHistory[Any]) -> Origin:
        """Return the origin of a history, or an empty one if it belongs to another store or session."""
        origin = chat._origin
        if origin is not None and (origin.store, origin.session_id) == (self._id, session_id):
            return origin
        return Origin(self._id, session_id, None, (None,))


def _check_on_conflict(on_conflict: OnConflict) -> None:
    if on_conflict not in get_args(OnConflict):
        raise ValueError(f"on_conflict must be one of {', '.join(get_args(OnConflict))}, not {on_conflict!r}")


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
