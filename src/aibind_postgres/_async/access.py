"""Access of requests to streams and conversations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import _arguments as arguments
from .._concurrency import async_call_or_await
from ..errors import WebError
from ..web import Resource, WebRequest
from .responses import conversation_not_found, map_client_errors, stream_not_found

if TYPE_CHECKING:
    from ..models import StreamInfo
    from .conversation_store import AsyncPostgresConversationStore
    from .stream_store import AsyncPostgresStreamStore


class AsyncAccess:
    """Decides which requests of one handler may use which streams and conversations.

    A stream or conversation of another user gets the same error as a missing one.
    """

    def __init__(
        self,
        store: AsyncPostgresStreamStore,
        conversations: AsyncPostgresConversationStore | None,
        owner: Callable[[WebRequest], Any] | None,
        authorize: Callable[[WebRequest, Resource], Any] | None,
    ) -> None:
        self._store = store
        self._conversations = conversations
        self._owner = owner
        self._authorize = authorize

    @property
    def has_owners(self) -> bool:
        """Whether streams and conversations have owners."""
        return self._owner is not None

    async def user(self, request: WebRequest) -> str | None:
        """Return the user of a request. None if it has no user, or if the handler has no `owner`."""
        if self._owner is None:
            return None
        user = await async_call_or_await(self._owner, request)
        return None if user is None else arguments.identifier(user, "the result of owner")

    def require_user(self, user: str | None) -> None:
        """Raise `WebError` (401) if a request for a conversation has no user."""
        if user is None:
            raise WebError(401, "a conversation needs a user")

    async def check_stream(self, request: WebRequest, user: str | None, stream_id: str) -> None:
        """Check that a request may use a stream.

        Raises:
            WebError: 400: the id is invalid. 403: `authorize` refuses the request. 404: the stream does not exist, or
                belongs to another user.
        """
        if self._owner is not None or self._authorize is not None:
            await self.check_found_stream(request, user, await self.find_stream(stream_id))

    async def check_found_stream(self, request: WebRequest, user: str | None, info: StreamInfo) -> None:
        """Do the same for the entry of a stream, which exists."""
        owner = info.owner
        if owner is None and self._conversations is not None and info.session_id is not None:
            conversation = await self._conversations.get_info(info.session_id)
            owner = None if conversation is None else conversation.owner
        # Without an owner, only its id protects a stream.
        if self._owner is not None and owner not in (None, user):
            raise stream_not_found()
        await self._check_authorized(request, Resource("stream", info.id, owner, info.session_id))

    async def check_session(self, request: WebRequest, user: str | None, session_id: str) -> None:
        """Look up a conversation, and check it as `check_conversation` does."""
        info = None
        with map_client_errors():
            arguments.identifier(session_id, "a session id")
            if self._conversations is not None and not (self._owner is None and self._authorize is None):
                info = await self._conversations.get_info(session_id)
        await self.check_conversation(request, user, session_id, info is not None, info and info.owner)

    async def check_conversation(
        self, request: WebRequest, user: str | None, session_id: str, exists: bool, owner: str | None
    ) -> None:
        """Check that a request may use a conversation, or create it.

        Args:
            request: The request.
            user: The user of the request, or None.
            session_id: The id of the conversation.
            exists: Whether the conversation is stored.
            owner: Its owner.

        Raises:
            WebError: 401: the request has no user. 403: `authorize` refuses it. 404: the conversation has another
                owner, or none.
        """
        if self._owner is not None and self._conversations is not None:
            self.require_user(user)
            if exists and owner != user:
                raise conversation_not_found()
        await self._check_authorized(request, Resource("conversation", session_id, owner, session_id))

    async def find_stream(self, stream_id: str) -> StreamInfo:
        """Return the entry of a stream. Raise `WebError`: 400: the id is invalid. 404: there is no such stream."""
        with map_client_errors():
            info = await self._store.get_info(stream_id)
            # A standby may lag behind: `page` retries.
            if info is None and await self._store._pages.page(stream_id, 0, 1) is not None:
                info = await self._store.get_info(stream_id)
        if info is None:
            raise stream_not_found()
        return info

    async def _check_authorized(self, request: WebRequest, resource: Resource) -> None:
        if self._authorize is not None and not await async_call_or_await(self._authorize, request, resource):
            raise WebError(403, "forbidden")
