"""The routes with which a page lists, shows, changes and deletes conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import _arguments as arguments
from .._concurrency import async_run_large
from .._document import NODE_CHARACTERS
from .._turns import unanswered
from ..errors import StreamNotFoundError, WebError
from ..web import conversation_fields, page_position, parse_body, parse_page
from .conversation_histories import ConversationTooLargeError
from .responses import AsyncWebResponse, conversation_not_found, json_response, map_client_errors
from .turns import exists

if TYPE_CHECKING:
    from ..history import ChatHistory
    from ..models import ConversationInfo, StreamInfo
    from ..web import WebRequest
    from .access import AsyncAccess
    from .conversation_store import AsyncPostgresConversationStore
    from .stream_store import AsyncPostgresStreamStore
    from .turns import AsyncTurns

MAX_TITLE = 1000  # characters; each list of conversations contains the titles

TOO_LARGE = "delete it, or start another conversation"


class AsyncConversationRoutes:
    """The routes of one handler for its conversations."""

    def __init__(
        self,
        store: AsyncPostgresStreamStore,
        conversations: AsyncPostgresConversationStore,
        access: AsyncAccess,
        turns: AsyncTurns,
        max_read: int,
    ) -> None:
        self._store = store
        self._conversations = conversations
        self._access = access
        self._turns = turns
        self._max_read = max_read

    async def list(self, request: WebRequest) -> AsyncWebResponse:
        """Respond with a page of the user's conversations, the last saved first."""
        limit, before = parse_page(request.query)
        user = await self._access.user(request)
        if not self._access.has_owners:
            raise WebError(404, "not found: without owners, there is no list of conversations")
        if user is None:
            raise WebError(401, "a list of conversations needs a user")
        with map_client_errors():
            infos = [info async for info in self._conversations.list(user, limit=limit + 1, before=before)]
        page = infos[:limit]
        position = page_position(page[-1]) if len(infos) > limit else None
        return json_response({"conversations": [conversation_fields(info) for info in page], "next": position})

    async def show(self, request: WebRequest, session_id: str) -> AsyncWebResponse:
        """Respond with a conversation and its messages."""
        chat, info = await self.load_with_info(request, await self._access.user(request), session_id)
        document = chat.tree._document
        size = len(chat) * NODE_CHARACTERS
        return await async_run_large(size, json_response, {**conversation_fields(info), "history": document})

    async def load_with_info(
        self, request: WebRequest, user: str | None, session_id: str
    ) -> tuple[ChatHistory[Any], ConversationInfo]:
        """Return a conversation and its entry. If no answer is running, the last one is in the conversation."""
        chat = await self.load(request, user, session_id)
        info = await self.find(user, session_id)
        leaf_id = chat.tree.active_leaf_id
        if info.active_stream_id is None and any(question.id == leaf_id for question in unanswered(chat)):
            chat = await self.load(request, user, session_id)  # its answer may have been saved between the two reads
        return chat, info

    async def change(self, request: WebRequest, session_id: str) -> AsyncWebResponse:
        """Change the title, or the current path. Respond with the conversation without its messages."""
        body = await async_run_large(len(request.body), parse_body, request)
        fields = {name: body[name] for name in ("title", "activeLeafId") if name in body}
        if not fields:
            raise WebError(400, "title or activeLeafId is required")
        if not isinstance(fields.get("title", ""), str | None) or not isinstance(fields.get("activeLeafId", ""), str):
            raise WebError(400, "title must be a string or null, activeLeafId a string")
        title = fields.get("title") or ""
        with map_client_errors():  # before the first change
            arguments.storable_text(title, "title")
        if len(title) > MAX_TITLE:
            raise WebError(400, f"title must have at most {MAX_TITLE} characters")
        user = await self._access.user(request)
        if "activeLeafId" in fields:
            chat = await self.load(request, user, session_id)
            if fields["activeLeafId"] not in chat.tree:
                raise WebError(400, "activeLeafId is not the id of a message of this conversation")
            await self._save_leaf(session_id, chat, fields["activeLeafId"])
        else:
            await self._check(request, user, session_id)
        if "title" in fields:
            with map_client_errors():
                await self._conversations.describe(session_id, title=fields["title"])
        return json_response(conversation_fields(await self.find(user, session_id)))

    async def _save_leaf(self, session_id: str, chat: ChatHistory[Any], leaf_id: str) -> None:
        chat.tree.set_active_leaf(leaf_id)
        try:
            saved = await self._conversations._save(
                session_id, chat, "merge", self._max_read, recreate=False, keep_position=True
            )
            if not saved:
                raise conversation_not_found()
        except ConversationTooLargeError as error:
            raise WebError(413, f"the conversation has more than {error.max_bytes} bytes: {TOO_LARGE}") from None

    async def delete(self, request: WebRequest, session_id: str) -> AsyncWebResponse:
        """Stop the running answers of a conversation, and delete it with its streams."""
        user = await self._access.user(request)
        await self._check(request, user, session_id)
        for info in await self._streams(user, session_id):
            if info.state == "active":
                try:
                    await self._store.stop(info.id)
                except StreamNotFoundError:  # deleted meanwhile
                    continue
        await self._conversations.delete(session_id)
        for info in await self._streams(user, session_id):
            await self._store.delete(info.id)
        return json_response({"ok": True})

    async def _streams(self, user: str | None, session_id: str) -> Sequence[StreamInfo]:
        """Return the streams of a conversation that the user may delete. Without migration 0004, return none.

        Streams of an earlier conversation with this id may still exist, and belong to another user.
        """
        await self._store._schema.look_up()
        if not self._store._schema.has_leases:
            return []
        infos = [info async for info in self._store.list(session_id=session_id)]
        return [info for info in infos if not self._access.has_owners or info.owner in (None, user)]

    async def load(self, request: WebRequest, user: str | None, session_id: str) -> ChatHistory[Any]:
        """Return a conversation that a request may use. Raise `WebError` if it may not, or if there is none."""
        chat = await self._turns.load(request, user, session_id, self._max_read, TOO_LARGE)
        if not exists(chat):
            raise conversation_not_found()
        return chat

    async def _check(self, request: WebRequest, user: str | None, session_id: str) -> None:
        """Check that a conversation exists and that a request may use it."""
        await self._access.check_session(request, user, session_id)
        await self.find(user, session_id)

    async def find(self, user: str | None, session_id: str) -> ConversationInfo:
        """Return the entry of a conversation. Check the owner: another user may have created it again since."""
        with map_client_errors():
            info = await self._conversations.get_info(session_id)
        if info is None or (self._access.has_owners and info.owner != user):
            raise conversation_not_found()
        return info
