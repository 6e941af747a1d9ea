"""The turns of a handler: load the conversation, save the question, and save the answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import _arguments as arguments
from .._concurrency import async_run_large
from .._document import NODE_CHARACTERS
from .._turns import Question, answer, model_messages, unanswered
from ..errors import ConversationConflictError, InvalidDataError, StreamNotFoundError, WebError
from ..history import ChatHistory
from .conversation_histories import ConversationOfAnotherOwnerError, ConversationTooLargeError
from .responses import conversation_not_found, map_client_errors

if TYPE_CHECKING:
    from ..models import StreamStatus
    from ..web import WebRequest
    from ..wire import WireName
    from .access import AsyncAccess
    from .conversation_store import AsyncPostgresConversationStore
    from .stream_store import AsyncPostgresStreamStore

logger = logging.getLogger("aibind_postgres.web")


MAX_ACTIVE = 10  # active streams of one conversation that are looked at, the newest ones

# Adds a question to a conversation, for the stream with an id. May raise `WebError`.
Ask = Callable[[ChatHistory[Any], str], Question]


class Turn:
    """One turn in progress.

    Args:
        request: The request.
        user: The user of the request, or None.
        session_id: The id of the conversation.
        ask: Adds the question to a conversation.
        chat: The conversation with the question.
        question: The question.
        is_new: Whether the question was not stored before.
    """

    def __init__(
        self,
        request: WebRequest,
        user: str | None,
        session_id: str,
        ask: Ask,
        chat: ChatHistory[Any],
        question: Question,
        *,
        is_new: bool,
    ) -> None:
        self.is_new = is_new
        self.request = request
        self.user = user
        self.session_id = session_id
        self.ask = ask
        self.chat = chat
        self.question = question


class AsyncTurns:
    """The turns in the conversations of one handler.

    Args:
        store: The stream store.
        conversations: The conversation store.
        access: Decides which requests may use which conversations.
        compose: Returns the message with the answer to a question from the chunks of its stream.
        max_conversation: The maximum size in bytes of a conversation to which a turn is added.
        max_read: The maximum size in bytes of any conversation that is loaded.
        wire: The stored wire format of the streams that answer. Default: None, which stands for `aibind`.
        hint: What a user can do about a conversation that is too large. Default: summarise it.
        is_exclusive: Whether a conversation may have only one active stream. Needs migration 0004. Default: False.
    """

    def __init__(
        self,
        store: AsyncPostgresStreamStore,
        conversations: AsyncPostgresConversationStore,
        access: AsyncAccess,
        compose: Callable[[Question, Sequence[str]], Any],
        max_conversation: int,
        max_read: int,
        *,
        wire: WireName | None = None,
        hint: str = "summarise it with /compact, or start another conversation",
        is_exclusive: bool = False,
    ) -> None:
        self._store = store
        self._conversations = conversations
        self._access = access
        self._compose = compose
        self._is_exclusive = is_exclusive
        self._wire = wire
        self._hint = hint
        self._max_conversation = max_conversation
        self._max_read = max_read

    async def load(
        self, request: WebRequest, user: str | None, session_id: str, max_bytes: int, hint: str
    ) -> ChatHistory[Any]:
        """Return a conversation that a request may use. Save its abandoned answers.

        Raises:
            WebError: The statuses of `check_conversation`. 400: the id is invalid. 413: the conversation has more than
                `max_bytes`; the text then ends with `hint`.
        """
        if self._access.has_owners:
            self._access.require_user(user)
            await self._conversations._schema.require_0004("the owner of a conversation")
        try:
            with map_client_errors():
                chat = await self._conversations._load(session_id, max_bytes, user)
        except ConversationOfAnotherOwnerError:
            raise conversation_not_found() from None
        except ConversationTooLargeError:
            await self._access.check_session(request, user, session_id)  # only its owner may learn that it exists
            raise WebError(413, f"the conversation has more than {max_bytes} bytes: {hint}") from None
        owner = None if chat._origin is None else chat._origin.owner
        await self._access.check_conversation(request, user, session_id, exists(chat), owner)
        return await self._save_abandoned_answers(session_id, user, chat)

    async def _save_abandoned_answers(
        self, session_id: str, user: str | None, chat: ChatHistory[Any]
    ) -> ChatHistory[Any]:
        """Add and save the texts of ended streams that their processes have not saved. Return the conversation."""
        questions = [question for question in unanswered(chat) if _is_valid(question.stream_id)]
        if not questions:
            return chat
        ended = await self._store._ended([question.stream_id for question in questions])
        for question in questions:
            status = ended.get(question.stream_id)
            if status is None:
                continue
            chunks: list[str] | None = []
            if status.total_chunks:
                chunks = await self._read_chunks(question.stream_id, session_id, user)
            if chunks is None:
                continue
            try:
                chat = await self._save_answer(session_id, chat, question, chunks, status, is_late=True)
            except Exception as error:  # such as on a read-only server: the answer is shown, and saved later
                if isinstance(error, (InvalidDataError, ConversationTooLargeError)):
                    logger.warning("the answer of stream %r cannot be saved: %s", question.stream_id, error)
                elif not self._conversations._database.client.is_unavailable(error):
                    raise
        return chat

    async def _read_chunks(self, stream_id: str, session_id: str, user: str | None) -> list[str] | None:
        """Return the chunks of an ended stream. Return None if it was deleted, or is not one of this conversation."""
        info = await self._store.get_info(stream_id)
        # Other code may have stored the id of another stream in the conversation.
        if info is None or info.session_id not in (None, session_id) or info.owner not in (None, user):
            return None
        if info.wire != self._wire:  # another handler saves it
            return None
        try:
            return [chunk.data async for chunk in self._store.read_from(stream_id, follow=False)]
        except StreamNotFoundError:
            return None

    async def begin(self, request: WebRequest, user: str | None, session_id: str, ask: Ask, stream_id: str) -> Turn:
        """Load a conversation and add a question, without saving it.

        Raises:
            WebError: The statuses of `load` and of `ask`. 409: the conversation may have only one active stream, and
                has another one.
        """
        chat = await self.load(request, user, session_id, self._max_conversation, self._hint)
        if self._is_exclusive:  # after loading: each request creates its stream before it saves its question
            is_answered = not unanswered(chat)
            await check_no_other_stream(self._store, session_id, stream_id, self._access.has_owners, user)
            if not is_answered:  # the answer may have ended and been saved between the two
                chat = await self.load(request, user, session_id, self._max_conversation, self._hint)
        size = len(chat)
        with map_client_errors():
            question = ask(chat, stream_id)
        return Turn(request, user, session_id, ask, chat, question, is_new=len(chat) > size)

    async def messages(self, turn: Turn, max_messages: int | None) -> list[Any]:
        """Return the messages for the model."""
        return model_messages(await path_messages(turn.chat), max_messages)

    async def save_question(self, turn: Turn) -> None:
        """Save a turn's question. The first turn creates the conversation.

        Raises:
            WebError: 404: the conversation was deleted since it was loaded. 413: it became too large. If another
                request has changed the conversation meanwhile, also the statuses of `begin`.
        """
        while True:
            owner = None if exists(turn.chat) else turn.user
            try:
                saved = await self._conversations._save(
                    turn.session_id, turn.chat, "raise", self._max_read, owner=owner, recreate=False
                )
            except ConversationTooLargeError as error:
                raise WebError(413, f"the conversation has more than {error.max_bytes} bytes") from None
            except ConversationConflictError:
                # Check again: another user may have created the conversation, or another question may be its end.
                again = await self.begin(turn.request, turn.user, turn.session_id, turn.ask, turn.question.stream_id)
                # The source may already have been made for the earlier question and the messages before it.
                is_other = not turn.is_new and again.question.id != turn.question.id
                if is_other or (self._is_exclusive and again.chat.node_ids[:-1] != turn.chat.node_ids[:-1]):
                    raise WebError(409, "the conversation has changed: load it again") from None
                turn.chat, turn.question = again.chat, again.question
                continue
            if not saved:
                raise conversation_not_found()
            return

    async def save_answer(self, turn: Turn, chunks: Sequence[str], status: StreamStatus | None) -> None:
        """Save the answer of a turn. Called as `on_finish` of its stream."""
        await self._save_answer(turn.session_id, turn.chat, turn.question, chunks, status)

    async def _save_answer(
        self,
        session_id: str,
        chat: ChatHistory[Any],
        question: Question,
        chunks: Sequence[str],
        status: StreamStatus | None,
        *,
        is_late: bool = False,
    ) -> ChatHistory[Any]:
        """Add an answer to a stored conversation, unless it was deleted, and return the conversation.

        Args:
            session_id: The id of the conversation.
            chat: The last known version of the conversation, with the question.
            question: The question.
            chunks: The chunks of the stream.
            status: The final status of the stream. None if it was deleted.
            is_late: Whether another process has produced the answer. The conversation then keeps its position in lists,
                and nothing is repeated. By default, the save is repeated as the stream store does if the connection is
                lost.
        """
        message = await async_run_large(sum(map(len, chunks)), self._compose, question, chunks)
        while answer(chat, question, message, status):
            save = partial(self._conversations._save, session_id, chat, "raise", self._max_read, recreate=False)
            try:
                saved = await (save(keep_position=True) if is_late else self._store._database.retry(save))
                if not saved:
                    logger.info("conversation %r was deleted during a turn: the answer is not saved", session_id)
                break
            except ConversationConflictError as conflict:
                chat = conflict.theirs
        return chat


async def check_no_other_stream(
    store: AsyncPostgresStreamStore, session_id: str, stream_id: str, has_owners: bool, user: str | None
) -> None:
    """Raise `WebError` (409) if a conversation has an active stream with another id than `stream_id`.

    If streams have owners, only those of this user count: another user may use the same id, or have used it before.
    """
    infos = await store._active(session_id, MAX_ACTIVE, of_owner=has_owners, owner=user)
    others = [info.id for info in infos if info.id != stream_id]
    if others and len(await store._ended(others)) < len(others):
        raise WebError(409, "an answer of this conversation is being written: wait for its end, or stop it")


def _is_valid(stream_id: str) -> bool:
    """Return True if a text from a stored conversation can be the id of a stream."""
    try:
        arguments.identifier(stream_id)
    except InvalidDataError:
        return False
    return True


def exists(chat: ChatHistory[Any]) -> bool:
    """Return whether a loaded or saved history is stored."""
    return chat._origin is not None and chat._origin.base is not None


async def path_messages(chat: ChatHistory[Any]) -> list[Any]:
    """Return copies of the messages of the current path."""
    return await async_run_large(len(chat) * NODE_CHARACTERS, lambda: chat.messages)
