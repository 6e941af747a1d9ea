"""The conversation store: branching histories, none of which overwrites another's messages."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from .. import _arguments as arguments
from .._conversation_sql import ConversationStatements
from .._document import document_text, empty_document, known_document, parsed_document
from .._merging import merge
from .._tables import CONVERSATIONS_TABLE, Table
from ..errors import ConversationConflictError
from ..history import ChatHistory, Origin
from ..models import ConversationInfo, from_epoch_ms
from .database import AsyncDatabase

if TYPE_CHECKING:
    from psycopg.sql import Identifier
    from typing_extensions import Self

    from .client import AsyncClientLike

PAGE = 2000  # rows that one statement reads

OnConflict: TypeAlias = Literal["merge", "raise", "overwrite"]


class AsyncPostgresConversationStore:
    """Conversations in one table, each with its branches, and with a time to live that begins anew when it is used.

    `client` is what a stream store takes. A connection that is inside a transaction makes the store take part in it.
    `ttl` is how long, in seconds, a conversation is kept after it was last saved or touched; one that has expired is
    as good as deleted, by the server's clock. `timeout` is what a stream store takes.

    Every method raises `InvalidDataError` for a session id that is empty, longer than 1,024 bytes, or not storable,
    `SchemaError` if the table is missing, `StoreClosedError` once the store is closed, and the driver's own error if
    the server cannot be reached. Callers at the same time may share a store, as they may a stream store, but not a
    history. Statements are made for the isolation level READ COMMITTED.
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
        self._name = uuid.uuid4().hex  # by which a history knows that it was loaded here

    def __repr__(self) -> str:
        return f"<{type(self).__name__} in {self._table.quoted}, {self._database.client!r}, {self._database.state}>"

    async def load(self, session_id: str) -> ChatHistory[Any]:
        """Return a conversation, empty if there is none.

        Raises `InvalidHistoryError` if what is stored is not one.
        """
        key = arguments.identifier(session_id, "a session id")
        rows = await self._database.query(self._sql.load, [key])
        return self._history(key, rows[0][0] if rows else None)

    async def save(self, session_id: str, chat: ChatHistory[Any], *, on_conflict: OnConflict = "merge") -> None:
        """Store a conversation. When this returns it is durable, and `chat` is what was stored.

        If what is stored has changed since this store loaded or saved `chat` under this id, `on_conflict` says what
        happens. "merge": what either side has added stays, what either side has removed goes; a message whose parent
        the other side has removed comes below that side's active leaf, and the active leaf of `chat` wins if it has
        moved. "raise": `ConversationConflictError`, and nothing is stored. "overwrite": what is stored is replaced,
        whatever it is. A conversation that was deleted or has expired meanwhile counts as one from which everything
        was removed, and a history that was not loaded here under this id as one that has only added. What a writer has
        overwritten that does not look before it saves, as the TypeScript package does not, counts as removed by it.

        If the connection breaks, so that the outcome is unknown, the same call can be made again; so it can if a
        transaction of the caller's is rolled back. Raises, unless "overwrite" is asked for, `InvalidHistoryError` if
        what is stored is not a conversation, or has another message under an id of `chat`; then nothing is stored.
        """
        key = arguments.identifier(session_id, "a session id")
        _check(on_conflict)
        if not isinstance(chat, ChatHistory):
            raise TypeError(f"chat must be a ChatHistory, not {type(chat).__name__}")
        sent = chat.to_json()
        origin = self._origin(key, chat)
        # From now on, if no reply comes, it may be what is stored.
        chat._origin = origin.with_sent(_digest(sent))
        if on_conflict == "overwrite":
            await self._database.query(self._sql.overwrite, [key, sent, self._ttl])
            stored = sent
        else:
            stored = await self._store(chat, origin, sent, on_conflict)
        if stored != sent:
            chat._follow(sent, stored)
        if self._database.client.in_transaction():
            chat._origin = origin.with_sent(_digest(stored))
        else:
            chat._origin = origin._replace(agreed=stored, digests=(_digest(stored),))

    async def _store(self, chat: ChatHistory[Any], origin: Origin, sent: str, on_conflict: OnConflict) -> str:
        """Store a text, or what it gives merged with what others have stored, and return it."""
        own = {*origin.digests, _digest(sent)}
        text, expected = sent, origin.digests[-1]
        while True:
            params = [origin.session_id, text, self._ttl, expected]
            [(saved, found)] = await self._database.query(self._sql.save, params)
            if saved:
                return text
            expected = None if found is None else _digest(found)
            if expected in own:  # a call had no reply, or was undone, and nobody else was here
                text = sent
            elif on_conflict == "raise":
                raise ConversationConflictError(origin.session_id, chat, self._history(origin.session_id, found))
            else:
                base = empty_document() if origin.agreed is None else known_document(origin.agreed)
                theirs = empty_document() if found is None else parsed_document(found)
                text = document_text(merge(base, known_document(sent), theirs))

    @asynccontextmanager
    async def edit(self, session_id: str, *, on_conflict: OnConflict = "merge") -> AsyncIterator[ChatHistory[Any]]:
        """Return a context manager that gives a conversation, as `load` does, and saves it at the end of the block.

        After an exception in the block, or if the block has changed nothing, what is stored is left alone. Raises what
        `load` and `save` raise.
        """
        _check(on_conflict)
        chat = await self.load(session_id)
        before = chat.to_json()
        yield chat
        if chat.to_json() != before:
            await self.save(session_id, chat, on_conflict=on_conflict)

    async def touch(self, session_id: str) -> bool:
        """Begin the time to live of a conversation anew. True if there is one."""
        key = arguments.identifier(session_id, "a session id")
        return bool(await self._database.query(self._sql.touch, [key, self._ttl]))

    async def delete(self, session_id: str) -> bool:
        """Delete a conversation. True if there was one."""
        rows = await self._database.query(self._sql.delete, [arguments.identifier(session_id, "a session id")])
        return bool(rows and rows[0][0])

    async def list(self) -> AsyncIterator[ConversationInfo]:
        """Iterate over the conversations, in the order of their ids. One that is saved meanwhile may appear or not."""
        last_id = ""
        while True:
            rows = await self._database.query(self._sql.list, [last_id, PAGE])
            for session_id, expires_at in rows:
                yield ConversationInfo(session_id, from_epoch_ms(expires_at))
            if len(rows) < PAGE:
                return
            last_id = rows[-1][0]

    async def cleanup(self, *, batch_size: int = 1000) -> int:
        """Delete the conversations that have expired, and return how many.

        Each statement deletes at most `batch_size`. Safe to run in many processes at once.
        """
        arguments.sequence_number(batch_size, "batch_size", least=1)
        total: int = 0
        while True:
            [(deleted,)] = await self._database.query(self._sql.cleanup, [batch_size])
            total += deleted
            if deleted < batch_size:
                return total

    async def close(self) -> None:
        """Close the store, and the pool if the store owns it. Safe to repeat."""
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

    def _history(self, session_id: str, text: str | None) -> ChatHistory[Any]:
        chat: ChatHistory[Any] = ChatHistory() if text is None else ChatHistory.from_json(text)
        chat._origin = Origin(self._name, session_id, text, (None if text is None else _digest(text),))
        return chat

    def _origin(self, session_id: str, chat: ChatHistory[Any]) -> Origin:
        """Return what is known of a history under this id; of one that came from elsewhere, nothing."""
        known = chat._origin
        if known is not None and (known.store, known.session_id) == (self._name, session_id):
            return known
        return Origin(self._name, session_id, None, (None,))


def _check(on_conflict: OnConflict) -> None:
    if on_conflict not in get_args(OnConflict):
        raise ValueError(f"on_conflict must be one of {', '.join(get_args(OnConflict))}, not {on_conflict!r}")


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()
