"""Load and save the histories of conversations, and merge the changes of other writers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from .. import _arguments as arguments
from .._concurrency import async_run_large
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
from ..errors import AibindError, ConversationConflictError
from ..history import ChatHistory, Origin, new_id

if TYPE_CHECKING:
    from .._conversation_sql import ConversationStatements
    from .conversation_schema import AsyncConversationSchema
    from .database import AsyncDatabase

OnConflict: TypeAlias = Literal["merge", "raise", "overwrite"]


class ConversationTooLargeError(AibindError):
    """The stored conversation is too large to be read within the limits of the handler."""

    def __init__(self, session_id: str, max_bytes: int) -> None:
        super().__init__(f"conversation {session_id!r} has more than {max_bytes} bytes")
        self.session_id = session_id
        self.max_bytes = max_bytes


class ConversationOfAnotherOwnerError(AibindError):
    """The stored conversation has another owner than the user of the request."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"conversation {session_id!r} has another owner")
        self.session_id = session_id


class AsyncConversationHistories:
    """Loads and saves the histories of one conversation store."""

    def __init__(self, database: AsyncDatabase, schema: AsyncConversationSchema, ttl: int) -> None:
        self._database = database
        self._schema = schema
        self._ttl = ttl
        self._id = new_id()  # marks the histories that this store has loaded or saved

    async def load(self, session_id: str, max_bytes: int, owner: str | None = None) -> ChatHistory[Any]:
        """Return a conversation.

        Args:
            session_id: The id of the conversation.
            max_bytes: The maximum size of its document.
            owner: The owner whose conversation is read; any owner by default. Needs migration 0004.

        Raises:
            ConversationTooLargeError: The document has more than `max_bytes`.
            ConversationOfAnotherOwnerError: The conversation has another owner, or none. Its document was not read.
        """
        key = arguments.identifier(session_id, "a session id")
        statements = await self._schema.look_up()
        params = [key, max_bytes, owner] if statements.has_0004 else [key, max_bytes]
        rows = await self._database.query(statements.load, params)
        if not rows:
            return await self._to_history(key, None)
        text, *columns = rows[0]
        if owner is not None and columns[1] != owner:
            raise ConversationOfAnotherOwnerError(key)
        if text is None:
            raise ConversationTooLargeError(key, max_bytes)
        return await self._to_history(key, text, _time_of_creation(columns), columns[1] if columns else None)

    async def save(
        self,
        session_id: str,
        chat: ChatHistory[Any],
        on_conflict: OnConflict,
        max_bytes: int,
        *,
        owner: str | None = None,
        recreate: bool = True,
        keep_position: bool = False,
    ) -> bool:
        """Save a conversation. Raise `ConversationTooLargeError` instead of a merge with more than `max_bytes`.

        Args:
            session_id: As for `save` of the store, like `chat`, `on_conflict` and `owner`.
            chat: See the store.
            on_conflict: See the store.
            max_bytes: The most bytes of the stored conversation that are read.
            owner: See the store.
            recreate: Whether to create the conversation again if it has been deleted since this store loaded or saved
                `chat`; True by default. If False, an expired conversation does not count as deleted until it is cleaned
                up, so that a long turn keeps its conversation.
            keep_position: Whether the conversation keeps its position in lists; False by default. Not used by
                `"overwrite"`.

        Returns:
            False if nothing was saved because the conversation has been deleted.
        """
        key = arguments.identifier(session_id, "a session id")
        person = None if owner is None else arguments.identifier(owner, "an owner")
        check_on_conflict(on_conflict)
        if not isinstance(chat, ChatHistory):
            raise TypeError(f"chat must be a ChatHistory, not {type(chat).__name__}")
        if person is None:
            statements = await self._schema.look_up()
        else:
            statements = await self._schema.require_0004("the owner of a conversation")
        document = copy_document(chat.tree._document)
        sent = await async_run_large(estimated_size(document), Version.of, document)
        origin = self._origin_of(key, chat)
        # If the reply is lost, the row may contain this text.
        chat._origin = origin.with_sent(sent.digest)
        if on_conflict == "overwrite":
            params = [key, sent.text, self._ttl, *([person] if statements.has_0004 else [])]
            [(_, *times)] = await self._database.query(statements.overwrite, params)
            stored, created = sent, _time_of_creation(times)
        else:
            only_existing = not recreate and origin.base is not None
            details = [person, origin.created if only_existing else None, keep_position] if statements.has_0004 else []
            found = await self._save_version(
                statements, chat, origin, sent, on_conflict, max_bytes, only_existing, details
            )
            if found is None:
                return False
            stored, created = found
        if stored is not sent:
            await self._apply_stored(chat, sent, stored)
        if self._database.client.in_transaction():
            chat._origin = origin.with_sent(stored.digest)
        else:
            chat._origin = origin._replace(base=stored.document, digests=(stored.digest,), created=created)
        return True

    async def _save_version(
        self,
        statements: ConversationStatements,
        chat: ChatHistory[Any],
        origin: Origin,
        sent: Version,
        on_conflict: OnConflict,
        max_bytes: int,
        only_existing: bool,
        details: Sequence[object],
    ) -> tuple[Version, str | None] | None:
        """Store `sent`, or its merge with the stored document.

        Returns:
            The version that was stored, and when the row was created. None if `only_existing` is true, and the row of
            `origin` no longer exists.
        """
        own = {*origin.digests, sent.digest}
        version, expected = sent, origin.digests[-1]
        while True:
            params = [origin.session_id, version.text, self._ttl, expected, max_bytes, only_existing, *details]
            [(saved, exists, found, *times)] = await self._database.query(statements.save, params)
            if saved:
                return version, _time_of_creation(times)
            if only_existing and not exists:
                return None
            if exists and found is None:
                raise ConversationTooLargeError(origin.session_id, max_bytes)
            expected = None if found is None else await async_run_large(len(found), digest, found)
            if expected in own:  # stored by this history: an earlier reply was lost, or its transaction was rolled back
                version = sent
            elif on_conflict == "raise":
                created = origin.created if only_existing else None  # the statement has compared it
                theirs = await self._to_history(origin.session_id, found, created, origin.owner)
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

    async def _to_history(
        self, session_id: str, text: str | None, created: str | None = None, owner: str | None = None
    ) -> ChatHistory[Any]:
        chat: ChatHistory[Any] = ChatHistory()
        chat._origin = Origin(self._id, session_id, None, (None,))
        if text is not None:
            document, text_digest = await async_run_large(len(text), _parse_with_digest, text)
            chat.tree._document = copy_document(document)
            chat._origin = Origin(self._id, session_id, document, (text_digest,), created, owner)
        return chat

    def _origin_of(self, session_id: str, chat: ChatHistory[Any]) -> Origin:
        """Return the origin of a history, or an empty one if it belongs to another store or session."""
        origin = chat._origin
        if origin is not None and (origin.store, origin.session_id) == (self._id, session_id):
            return origin
        return Origin(self._id, session_id, None, (None,))


def check_on_conflict(on_conflict: OnConflict) -> None:
    if on_conflict not in get_args(OnConflict):
        raise ValueError(f"on_conflict must be one of {', '.join(get_args(OnConflict))}, not {on_conflict!r}")


def _time_of_creation(columns: Sequence[str | None]) -> str | None:
    """Return when a row was created, as text, from the last columns of a result: none without migration 0004."""
    return (columns[0] or "-infinity") if columns else None


def _parse_with_digest(text: str) -> tuple[Document, str]:
    return parse_document(text), digest(text)


def _merge_with_text(base: Document | None, ours: Document, text: str | None) -> Version:
    theirs = empty_document() if text is None else parse_document(text)
    return Version.of(merge(base or empty_document(), ours, theirs))
