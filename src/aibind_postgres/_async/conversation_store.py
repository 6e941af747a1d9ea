"""The conversation store: load, save and merge branching conversations."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

from psycopg.sql import Identifier

from .. import _arguments as arguments
from .._arguments import NOT_GIVEN, NotGiven
from .._conversation_sql import conversation_info
from .._deletion import MAX_ROWS, next_limit
from .._document import copy_document
from .._tables import CONVERSATIONS_TABLE, STATUS_TABLE, parse_distinct
from ..history import ChatHistory
from ..models import NEVER_MS, ConversationInfo, ErasureResult
from .conversation_histories import AsyncConversationHistories, OnConflict, check_on_conflict
from .conversation_schema import AsyncConversationSchema
from .database import AsyncDatabase
from .observed_store import AsyncObservedStore
from .psycopg_clients import AsyncClientLike
from .stream_store import AsyncPostgresStreamStore

MAX_BYTES = 20_000_000  # of the conversations that one statement of `cleanup` deletes
LIST_PAGE_ROWS = 2000  # rows that one statement of `list` returns


class AsyncPostgresConversationStore(AsyncObservedStore):
    """Stores conversations with branches in one table.

    Threads, or the tasks of one event loop, may share a store, but not a `ChatHistory`. The statements expect the
    isolation level READ COMMITTED. Expired conversations are treated as deleted. Expiry depends on the server's clock.

    Args:
        client: A connection string, a psycopg pool or connection, or an object with the `PostgresClient` protocol, as
            for the stream store. If the client is a connection inside a transaction, the store takes part in that
            transaction.
        table: The name of the table; `aibind_conversations` by default. Use `psycopg.sql.Identifier` for a name with
            a dot.
        status_table: The name of the status table of the stream store, for `active_stream_id` of the conversations;
            `aibind_stream_status` by default. It may be missing.
        ttl: Seconds, or a timedelta, for which a conversation is kept after it was last saved or touched; 1800 by
            default. None: it never expires, unless a store with a ttl saves or touches it later.
        timeout: Seconds, or a timedelta, to wait for the answer to a statement, as for the stream store; no limit by
            default. Clients of other drivers do not accept it.

    Raises:
        ValueError: By the constructor, for an invalid table name or setting.
        TypeError: By the constructor, for an argument of the wrong type.
        InvalidDataError: By every method, for a session id that is empty, longer than 1,024 bytes, or not storable.
        SchemaError: By every method, if the table is missing. By `describe` and `delete_owner`, and by every method
            with an owner, if migration 0004 is missing.
        StoreClosedError: By every method except `get_stats`, once the store is closed. `close` can be repeated.
        RuntimeError: By every method except `get_stats`, in a different event loop from the one of the first call.
        ForkedError: By every method except `close`, in a process that was forked after the first call, or after the
            store was made from an open pool or connection.

    Every method raises the driver's own error if the server cannot be reached.
    """

    def __init__(
        self,
        client: AsyncClientLike,
        *,
        table: str | Identifier = CONVERSATIONS_TABLE,
        status_table: str | Identifier = STATUS_TABLE,
        ttl: float | timedelta | None = 1800.0,
        timeout: float | timedelta | None = None,
    ) -> None:
        self._table, status = parse_distinct(table, status_table)
        self._required_tables = (self._table,)
        self._ttl = NEVER_MS if ttl is None else arguments.milliseconds(ttl, "ttl")
        self._database = AsyncDatabase(client, retry_for=0.0, timeout=timeout)
        self._schema = AsyncConversationSchema(self._database, self._table, status)
        histories = AsyncConversationHistories(self._database, self._schema, self._ttl)
        self._load = histories.load
        self._save = histories.save

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

    async def save(
        self,
        session_id: str,
        chat: ChatHistory[Any],
        *,
        on_conflict: OnConflict = "merge",
        owner: str | None = None,
    ) -> None:
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
            owner: The owner of the conversation, such as a user id, for `list` and `delete_owner`. It replaces an
                owner that is already stored. Default: None, which keeps the stored owner. Needs migration 0004.

        In a merge, a conversation that was deleted or has expired counts as one from which everything was removed. A
        history that this store did not load under this id counts as additions only. Writers that do not check for
        conflicts, such as the TypeScript package, remove the messages that they overwrite.

        Raises:
            ConversationConflictError: The stored conversation has changed, and `on_conflict` is `"raise"`; nothing is
                stored.
            InvalidHistoryError: The stored row is not a valid conversation, or has a different message under an id of
                `chat`; nothing is stored. Not raised for `"overwrite"`.
            InvalidDataError: The session id or the owner is not a valid id.
            SchemaError: An owner is given, and migration 0004 is missing.
            TypeError: `chat` is not a `ChatHistory`.
            ValueError: `on_conflict` is not one of these values.
        """
        await self._save(session_id, chat, on_conflict, arguments.MAX_NUMBER, owner=owner)

    @asynccontextmanager
    async def edit(
        self, session_id: str, *, on_conflict: OnConflict = "merge", owner: str | None = None
    ) -> AsyncIterator[ChatHistory[Any]]:
        """Return a context manager that loads a conversation and saves it at the end of the block.

        Nothing is saved if the block raises, or if it does not change the history.

        Args:
            session_id: The id of the conversation.
            on_conflict: As for `save`; `"merge"` by default.
            owner: As for `save`. Nothing is stored if the block does not change the history.

        Yields:
            The history, as returned by `load`.

        Raises:
            ConversationConflictError: As for `save`.
            InvalidDataError: As for `save`.
            InvalidHistoryError: As for `load` and `save`.
            SchemaError: As for `save`.
            ValueError: `on_conflict` is not one of the values of `save`.
        """
        check_on_conflict(on_conflict)
        if owner is not None:
            arguments.identifier(owner, "an owner")
        chat = await self.load(session_id)
        before = copy_document(chat.tree._document)
        yield chat
        if chat.tree._document != before:
            await self.save(session_id, chat, on_conflict=on_conflict, owner=owner)

    async def touch(self, session_id: str) -> bool:
        """Restart the ttl of a conversation. With a ttl of None, the conversation never expires from then on.

        Args:
            session_id: The id of the conversation.

        Returns:
            True if the conversation exists.
        """
        key = arguments.identifier(session_id, "a session id")
        return bool(await self._database.query(self._schema.statements.touch, [key, self._ttl]))

    async def describe(
        self,
        session_id: str,
        *,
        title: str | NotGiven | None = NOT_GIVEN,
        metadata: Any = NOT_GIVEN,
        owner: str | NotGiven | None = NOT_GIVEN,
    ) -> bool:
        """Change the title, the metadata or the owner of a conversation. Arguments that are not given change nothing.

        The conversation keeps its messages, its expiry and, since `updated_at` does not change, its position in lists.

        Args:
            session_id: The id of the conversation.
            title: The new title. None removes it.
            metadata: Data of the application, a JSON value. None removes it.
            owner: The new owner, such as a user id. None removes it.

        Returns:
            True if the conversation exists.

        Raises:
            InvalidDataError: The title cannot be stored, `metadata` is not a JSON value, or the owner is not a valid
                id.
            SchemaError: Migration 0004 is missing.
        """
        key = arguments.identifier(session_id, "a session id")
        params: builtins.list[object] = [key]
        for value, check, name in (
            (title, arguments.storable_text, "a title"),
            (metadata, arguments.storable_json, "metadata"),
            (owner, arguments.identifier, "an owner"),
        ):
            is_given = value is not NOT_GIVEN
            params += [is_given, check(value, name) if is_given and value is not None else None]
        statements = await self._schema.require_0004("a title, metadata or an owner of a conversation")
        return bool(await self._database.query(statements.describe, params))

    async def get_info(self, session_id: str) -> ConversationInfo | None:
        """Return the entry of a conversation, as `list` does, without its messages.

        Args:
            session_id: The id of the conversation.

        Returns:
            The entry, or None if the conversation does not exist.
        """
        key = arguments.identifier(session_id, "a session id")
        statements = await self._schema.look_up()
        rows = await self._database.query_either(statements.get_info, statements.get_info_distributed, [key])
        return conversation_info(rows[0]) if rows else None

    async def delete(self, session_id: str) -> bool:
        """Delete a conversation.

        A turn of a `StreamHandler` that has begun in the stored conversation does not create it again. `save` does.

        Args:
            session_id: The id of the conversation.

        Returns:
            True if the conversation existed.
        """
        key = arguments.identifier(session_id, "a session id")
        rows = await self._database.query(self._schema.statements.delete, [key])
        return bool(rows and rows[0][0])

    async def delete_owner(self, owner: str, *, streams: AsyncPostgresStreamStore | None) -> ErasureResult:
        """Delete all data of one owner: conversations and streams, in any state, also expired ones.

        These are deleted:

        - the conversations with this owner,
        - the streams that belong to these conversations,
        - the streams with this owner.

        Everything that is stored when the call begins is deleted. Their producers and readers end as after `delete` of
        the stream store. Refuse new requests of this owner before. If the call is interrupted, repeat it, and call
        `cleanup` of the stream store. Each statement deletes at most one conversation, or 10,000 chunks of one stream.

        Args:
            owner: The owner, as given to `save`, `describe` and `create`.
            streams: The stream store of the application. None if it has no streams.

        Returns:
            The numbers of deleted conversations and streams.

        Raises:
            InvalidDataError: The owner is not a valid id.
            SchemaError: Migration 0004 is missing.
        """
        person = arguments.identifier(owner, "an owner")
        statements = await self._schema.require_0004("the owner of a conversation")
        deleted_conversations = deleted_streams = 0
        last_id = ""
        while True:
            rows = await self._database.query(statements.ids_of_owner, [person, last_id, MAX_ROWS])
            for (session_id,) in rows:
                if streams is not None:  # first: only the conversation links them to the owner
                    deleted_streams += await streams._delete_all(session_id, None)
                [(deleted,)] = await self._database.query(statements.delete_of_owner, [session_id, person])
                deleted_conversations += deleted
            if len(rows) < MAX_ROWS:
                break
            last_id = rows[-1][0]
        if streams is not None:
            deleted_streams += await streams.delete_owner(person)
        return ErasureResult(deleted_conversations, deleted_streams)

    def list(
        self, owner: str | None = None, *, limit: int | None = None, before: ConversationInfo | None = None
    ) -> AsyncIterator[ConversationInfo]:
        """Iterate over the conversations, the last saved first. Without migration 0004, in the order of their ids.

        A conversation that is saved during the iteration moves to the beginning. None appears twice, and one that was
        not reached before does not appear.

        Args:
            owner: Return only conversations of this owner; all by default. Needs migration 0004.
            limit: The maximum number of conversations; no limit by default.
            before: An entry of an earlier list. Return only the conversations that come after it in the list: with
                migration 0004, those that were saved before it. Only its `session_id` and `updated_at` are used, so
                `ConversationInfo(session_id, updated_at=updated_at)` is sufficient. Default: None, which begins with
                the first one.

        Yields:
            An entry for each conversation.

        Raises:
            InvalidDataError: The owner or the session id of `before` is not a valid id, or `limit` is not an int of at
                least 1.
            ValueError: `updated_at` of `before` has no time zone.
            TypeError: `before` is not a `ConversationInfo`.
            SchemaError: An owner is given, and migration 0004 is missing.
        """
        person = None if owner is None else arguments.identifier(owner, "an owner")
        number = arguments.MAX_NUMBER if limit is None else arguments.integer(limit, "limit", minimum=1)
        if before is not None:
            if not isinstance(before, ConversationInfo):
                raise TypeError(f"before must be a ConversationInfo, not {type(before).__name__}")
            arguments.identifier(before.session_id, "a session id")
            if before.updated_at is not None and before.updated_at.tzinfo is None:
                raise ValueError(f"updated_at of before must have a time zone, unlike {before.updated_at!r}")
        return self._list(person, number, before)

    async def _list(
        self, owner: str | None, limit: int, before: ConversationInfo | None
    ) -> AsyncIterator[ConversationInfo]:
        if owner is not None:
            statements = await self._schema.require_0004("a list of one owner")
        else:
            statements = await self._schema.look_up()
        last_id = "" if before is None else before.session_id
        last_time = "infinity"
        if before is not None:
            last_time = "-infinity" if before.updated_at is None else before.updated_at.isoformat()
        while limit > 0:
            page = min(limit, LIST_PAGE_ROWS)
            if not statements.has_0004:
                rows = await self._database.query(statements.list_by_id, [last_id, page])
            elif owner is None:
                params: builtins.list[object] = [last_time, last_id, page]
                rows = await self._database.query_either(statements.list, statements.list_distributed, params)
            else:
                params = [last_time, last_id, page, owner]
                rows = await self._database.query_either(
                    statements.list_of_owner, statements.list_of_owner_distributed, params
                )
            for row in rows:
                yield conversation_info(row)
            if len(rows) < page:
                return
            limit -= page
            last_id, last_time = rows[-1][0], rows[-1][-1]

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
        statements = await self._schema.look_up()
        limit = MAX_ROWS
        while limit:
            [(found, deleted)] = await self._database.query_either(
                statements.cleanup, statements.cleanup_distributed, [limit, MAX_BYTES]
            )
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
