"""The conversation store: load, save and merge branching conversations."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, TypeAlias, get_args

from psycopg.sql import Identifier

from .. import _arguments as arguments
from .._concurrency import async_run_large
from .._conversation_sql import ConversationStatements
from .._deletion import MAX_ROWS, next_limit
from .._document import (
    Document,
    Version,
    copy_document,
    digest,
    empty_document,
    estimated_size,
    parse_document,
)
from .._merging import merge
from .._tables import CONVERSATIONS_TABLE, Table
from ..errors import AibindError, ConversationConflictError
from ..history import ChatHistory, Origin, new_id
from ..models import NEVER_MS, ConversationInfo, from_epoch_ms
from .database import AsyncDatabase
from .psycopg_clients import AsyncClientLike

MAX_BYTES = 20_000_000  # of the conversations that one statement of `cleanup` deletes
LIST_PAGE_ROWS = 2000  # rows that one statement of `list` returns

OnConflict: TypeAlias = Literal["merge", "raise", "overwrite"]


class ConversationTooLargeError(AibindError):
    """The stored conversation is too large to be read within the limits of the handler."""

    def __init__(self, session_id: str, max_bytes: int) -> None:
        super().__init__(f"conversation {session_id!r} has more than {max_bytes} bytes")
        self.session_id = session_id
        self.max_bytes = max_bytes


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
            default. None: it never expires, unless a store with a ttl saves or touches it later.
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
        ttl: float | timedelta | None = 1800.0,
        timeout: float | timedelta | None = None,
    ) -> None:
        self._table = Table.parse(table)
        self._sql = ConversationStatements(self._table)
        self._ttl = NEVER_MS if ttl is None else arguments.milliseconds(ttl, "ttl")
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
        return await self._load(session_id, arguments.MAX_NUMBER)

    async def _load(self, session_id: str, max_bytes: int) -> ChatHistory[Any]:
        """Return a conversation. Raise `ConversationTooLargeError` if its document has more than `max_bytes`."""
        key = arguments.identifier(session_id, "a session id")
        rows = await self._database.query(self._sql.load, [key, max_bytes])
        text = rows[0][0] if rows else None
        if rows and text is None:
            raise ConversationTooLargeError(key, max_bytes)
        return await self._to_history(key, text)

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
        await self._save(session_id, chat, on_conflict, arguments.MAX_NUMBER)

    async def _save(self, session_id: str, chat: ChatHistory[Any], on_conflict: OnConflict, max_bytes: int) -> None:
        """Save a conversation. Raise `ConversationTooLargeError` instead of a merge with more than `max_bytes`."""
        key = arguments.identifier(session_id, "a session id")
        _check_on_conflict(on_conflict)
        if not isinstance(chat, ChatHistory):
            raise TypeError(f"chat must be a ChatHistory, not {type(chat).__name__}")
        document = copy_document(chat.tree._document)
        sent = await async_run_large(estimated_size(document), Version.of, document)
        origin = self._origin_of(key, chat)
        # If the reply is lost, the row may contain this text.
        chat._origin = origin.with_sent(sent.digest)
        if on_conflict == "overwrite":
            await self._database.query(self._sql.overwrite, [key, sent.text, self._ttl])
            stored = sent
        else:
            stored = await self._save_version(chat, origin, sent, on_conflict, max_bytes)
        if stored is not sent:
            await self._apply_stored(chat, sent, stored)
        if self._database.client.in_transaction():
            chat._origin = origin.with_sent(stored.digest)
        else:
            chat._origin = origin._replace(base=stored.document, digests=(stored.digest,))

    async def _save_version(
        self, chat: ChatHistory[Any], origin: Origin, sent: Version, on_conflict: OnConflict, max_bytes: int
    ) -> Version:
        """Store `sent`, or its merge with the stored document. Return the version that was stored."""
        own = {*origin.digests, sent.digest}
        version, expected = sent, origin.digests[-1]
        while True:
            params = [origin.session_id, version.text, self._ttl, expected, max_bytes]
            [(saved, exists, found)] = await self._database.query(self._sql.save, params)
            if saved:
                return version
            if exists and found is None:
                raise ConversationTooLargeError(origin.session_id, max_bytes)
            expected = None if found is None else await async_run_large(len(found), digest, found)
            if expected in own:  # stored by this history: an earlier reply was lost, or its transaction was rolled back
                version = sent
            elif on_conflict == "raise":
                theirs = await self._to_history(origin.session_id, found)
                raise ConversationConflictError(origin.session_id, chat, theirs)
            else:
                size = len(sent.text) + len(found or "")
                version = await async_run_large(size, _merge_with_text, origin.base, sent.document, found)

    async def _apply_stored(self, chat: ChatHistory[Any], sent: Version, stored: Version) -> None:
        """Give the stored document to the history. Keep changes made after `sent` was sent."""
        document, current = stored.document, copy_document(chat.tree._document)
        if current != sent.document:
            document = await async_run_large(len(stored.text), merge, sent.document, current, document)
            if chat.tree._document != current:  # changed again, while the thread ran
                document = merge(current, chat.tree._document, document)
        chat.tree._document = copy_document(document)

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
        before = copy_document(chat.tree._document)
        yield chat
        if chat.tree._document != before:
            await self.save(session_id, chat, on_conflict=on_conflict)

    async def touch(self, session_id: str) -> bool:
        """Restart the ttl of a conversation. With a ttl of None, the conversation never expires from then on.

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
                yield ConversationInfo(session_id, None if expires_at >= NEVER_MS else from_epoch_ms(expires_at))
            if len(rows) < LIST_PAGE_ROWS:
                return
            last_id = rows[-1][0]

    async def cleanup(self) -> int:
        """Delete the expired conversations. Safe to run in several processes at once.

        Each statement deletes at most 1,000 conversations of at most 20 MB together, or a single larger one.

        Returns:
            The number of deleted conversations.
        """
        total = 0
        async for deleted in self._cleanup_steps():
            total += deleted
        return total

    async def _cleanup_steps(self) -> AsyncIterator[int]:
        """Delete the expired conversations, and yield the number that each statement has deleted."""
        limit = MAX_ROWS
        while limit:
            [(found, deleted)] = await self._database.query(self._sql.cleanup, [limit, MAX_BYTES])
            yield deleted
            limit = next_limit(limit, found, deleted)

    async def close(self) -> None:
        """Close the store, and its pool if it was made from a connection string. Safe to repeat."""
        if self._database.inherited:
            return
        self._database.check_owner()
        self._database.begin_closing()
        await self._database.client.close()

    async def __aenter__(self) -> AsyncPostgresConversationStore:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _to_history(self, session_id: str, text: str | None) -> ChatHistory[Any]:
        chat: ChatHistory[Any] = ChatHistory()
        chat._origin = Origin(self._id, session_id, None, (None,))
        if text is not None:
            document, text_digest = await async_run_large(len(text), _parse_with_digest, text)
            chat.tree._document = copy_document(document)
            chat._origin = chat._origin._replace(base=document, digests=(text_digest,))
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


def _parse_with_digest(text: str) -> tuple[Document, str]:
    return parse_document(text), digest(text)


def _merge_with_text(base: Document | None, ours: Document, text: str | None) -> Version:
    theirs = empty_document() if text is None else parse_document(text)
    return Version.of(merge(base or empty_document(), ours, theirs))
