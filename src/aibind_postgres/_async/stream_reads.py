"""The reading methods of the stream store."""

from __future__ import annotations

import builtins
import math
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from time import monotonic
from typing import Any, get_args

from .. import _arguments as arguments
from .._followed_stream import Deliver
from .._pages import as_events
from .._sql import json_array
from .._stream_list import stream_info
from .._subscriptions import Subscriptions
from ..models import StoredEvent, StreamChunk, StreamInfo, StreamState, StreamStatus, TimedChunk
from .database import AsyncDatabase
from .following import AsyncFollower
from .leasing import AsyncLeases
from .listening import AsyncListener
from .notifying import AsyncNotifier
from .reading import AsyncPageReader
from .stream_schema import AsyncStreamSchema

LIST_PAGE_ROWS = 2000  # rows that one statement of `list` returns


class AsyncStreamReads:
    """The base class of the stream store with the methods that read. The store sets the attributes."""

    _database: AsyncDatabase
    _schema: AsyncStreamSchema
    _subscriptions: Subscriptions
    _notifier: AsyncNotifier
    _listener: AsyncListener
    _pages: AsyncPageReader
    _leases: AsyncLeases

    def read_from(self, id: str, after_seq: int = 0, *, follow: bool = True) -> AsyncIterator[StreamChunk]:
        """Iterate over the chunks after `after_seq`, each exactly once and in order.

        The iterator holds no connection while it waits or while the caller is busy. It holds at most one
        page of chunks in memory: at first 50 chunks, later up to 2,000 chunks or about half a million characters. A
        page has at most 2 MB, unless it consists of one larger chunk. Pages of an archived stream have up to 10,000
        chunks, which are in compact form until they are returned. If the connection is lost, the iterator keeps its
        position and retries for the store's `retry_for` seconds. It also does so if a standby does not have the stream,
        or lacks chunks that the iterator has returned.

        Args:
            id: The stream id.
            after_seq: The sequence number of the last chunk that the caller has; 0 by default.
            follow: Whether to wait for new chunks until the stream ends; True by default. `get_status` then returns the
                final state. If False, the iterator ends after the last stored chunk.

        Yields:
            The chunks.

        Raises:
            StreamNotFoundError: The stream does not exist, or was deleted during the iteration.
            InvalidDataError: `after_seq` is not an int of at least 0.
        """
        stream_id = arguments.identifier(id)
        cursor = arguments.integer(after_seq, "after_seq", minimum=0)
        return self._read(stream_id, cursor) if follow else self._pages.stored(stream_id, cursor)

    async def _read(self, stream_id: str, cursor: int) -> AsyncIterator[StreamChunk]:
        with self._follow(stream_id, cursor) as follower:
            while isinstance(step := await follower.next(), Deliver):
                for chunk in step.chunks:
                    yield chunk

    def events(self, id: str, after_seq: int = 0, *, follow: bool = True) -> AsyncIterator[StoredEvent]:
        """Iterate as `read_from` does, and decode each chunk into a text or a named event.

        Use it for a stream that a `DurableStream`, a `StreamHandler` or the TypeScript package writes: its chunks
        contain the names of events. The event of a text is `message`. So is that of a chunk without a name, as `append`
        stores it, and of a chunk with a reserved name: `stream-id`, `error`, `stopped`, `done`.

        Args:
            id: The stream id.
            after_seq: The sequence number of the last event that the caller has; 0 by default.
            follow: Whether to wait for new events until the stream ends; True by default. If False, the iterator ends
                after the last stored chunk.

        Yields:
            One event for each chunk.

        Raises:
            StreamNotFoundError: The stream does not exist, or was deleted during the iteration.
            InvalidDataError: `after_seq` is not an int of at least 0.
        """
        stream_id = arguments.identifier(id)
        cursor = arguments.integer(after_seq, "after_seq", minimum=0)
        return self._events(stream_id, cursor) if follow else self._pages.stored_events(stream_id, cursor)

    async def _events(self, stream_id: str, cursor: int) -> AsyncIterator[StoredEvent]:
        with self._follow(stream_id, cursor) as follower:
            while isinstance(step := await follower.next(), Deliver):
                for event in as_events(step.chunks):
                    yield event

    def read_with_times(self, id: str, after_seq: int = 0) -> AsyncIterator[TimedChunk]:
        """Iterate over the stored chunks and the times at which they were stored, such as for an export.

        The iterator does not wait for new chunks. Its pages and retries are those of `read_from`.

        Args:
            id: The stream id.
            after_seq: The sequence number of the last chunk that the caller has; 0 by default.

        Yields:
            The chunks. Their times are in UTC.

        Raises:
            StreamNotFoundError: The stream does not exist, or was deleted during the iteration.
            InvalidDataError: `after_seq` is not an int of at least 0.
            SchemaError: Migration 0002 is missing.
        """
        stream_id = arguments.identifier(id)
        cursor = arguments.integer(after_seq, "after_seq", minimum=0)
        return self._pages.stored_with_times(stream_id, cursor)

    def _follow(self, stream_id: str, cursor: float) -> AsyncFollower:
        return AsyncFollower(self._database, self._subscriptions, self._listener, self._pages, stream_id, cursor)

    def replay(self, id: str, after_seq: int = 0, *, speed: float = 1.0) -> AsyncIterator[StreamChunk]:
        """Iterate over the stored chunks at the pace at which they were written.

        The first chunk is returned at once. So is a chunk without a known time, which was written before migration
        0002. The time that the caller spends on a chunk counts as part of the next pause.

        Args:
            id: The stream id.
            after_seq: The sequence number of the last chunk that the caller has; 0 by default.
            speed: The factor by which the replay is faster than the writer; 1 by default. Infinity omits the pauses.

        Yields:
            The chunks.

        Raises:
            StreamNotFoundError: The stream does not exist, or was deleted during the iteration.
            InvalidDataError: `after_seq` is not an int of at least 0.
            ValueError: `speed` is not more than zero.
            SchemaError: Migration 0002 is missing.
        """
        stream_id = arguments.identifier(id)
        cursor = arguments.integer(after_seq, "after_seq", minimum=0)
        if not speed > 0:
            raise ValueError(f"speed must be more than zero, not {speed!r}")
        return self._pages.replay(stream_id, cursor, speed)

    async def get_status(self, id: str) -> StreamStatus | None:
        """Return the status of a stream: the state, the error text and the number of chunks.

        Args:
            id: The stream id.

        Returns:
            The status, or None if the stream does not exist.
        """
        stream_id = arguments.identifier(id)
        rows = await self._database.query(self._schema.statements.status, [stream_id])
        return self._found_status(stream_id, rows)

    def _found_status(self, stream_id: str, rows: Sequence[Any]) -> StreamStatus | None:
        status = StreamStatus._make(rows[0]) if rows else None
        if status is None or status.state != "active":
            self._notifier.wake([stream_id])  # the call that ended the stream may not have notified
        return status

    async def get_info(self, id: str) -> StreamInfo | None:
        """Return the entry of a stream, as `list` does: its status, times and, with migration 0004, its owner.

        Args:
            id: The stream id.

        Returns:
            The entry, or None if the stream does not exist.
        """
        stream_id = arguments.identifier(id)
        rows = await self._database.query((await self._schema.look_up()).get_info, [stream_id])
        return stream_info(rows[0]) if rows else None

    async def _running(self, owner: str, limit: int) -> builtins.list[str]:
        """Return the ids of up to `limit` active streams of an owner. A stream with an expired lease does not count."""
        statements = await self._schema.require_0004("the owner of a stream")
        return [row[0] for row in await self._database.query(statements.running, [owner, limit])]

    async def wait(self, id: str, timeout: float | timedelta | None = None) -> StreamStatus:
        """Wait until a stream has ended. If the connection is lost, retry as `read_from` does.

        Args:
            id: The stream id.
            timeout: Seconds, or a timedelta, to wait; no limit by default. A statement that has been sent is not
                interrupted: the call then returns later, when the driver does.

        Returns:
            The final status.

        Raises:
            TimeoutError: The stream is still active after `timeout`, or no up-to-date server could be reached.
            StreamNotFoundError: The stream does not exist, or was deleted during the wait.
            ValueError: `timeout` is negative, or above 1e9 seconds.
            TypeError: `timeout` is neither a number nor a timedelta.
        """
        stream_id = arguments.identifier(id)
        deadline = math.inf
        if timeout is not None:
            deadline = monotonic() + arguments.seconds(timeout, "timeout", allow_zero=True)
        with self._follow(stream_id, math.inf) as follower:
            return await follower.end(deadline)

    async def active(self, session_id: str) -> StreamInfo | None:
        """Return the newest active stream of a conversation: the answer that is being written.

        Args:
            session_id: The id of the conversation, as given to `create`.

        Returns:
            The entry of the stream, or None if the conversation has no active stream.

        Raises:
            InvalidDataError: The session id is not a valid id.
            SchemaError: Migration 0004 is missing.
        """
        found = await self._active(arguments.identifier(session_id, "a session id"), 1)
        return found[0] if found else None

    async def _active(
        self, session_id: str, limit: int, *, of_owner: bool = False, owner: str | None = None
    ) -> builtins.list[StreamInfo]:
        """Return the newest active streams of a session, with `of_owner` only those of `owner`, which may be None."""
        statements = await self._schema.require_0004("a look-up by session")
        rows = await self._database.query(statements.active, [session_id, limit, of_owner, owner])
        return [stream_info(row) for row in rows]

    def list(
        self,
        *,
        state: StreamState | None = None,
        session_id: str | None = None,
        owner: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> AsyncIterator[StreamInfo]:
        """Iterate over the streams in the order of their ids. With a time filter, the order is that of creation, and
        streams without a recorded time are left out: those that are older than migration 0002.

        A stream that is created or deleted during the iteration may or may not appear.

        Args:
            state: Return only streams in this state; all by default.
            session_id: Return only streams of this conversation; all by default.
            owner: Return only streams of this owner; all by default.
            created_after: Return only streams created at this time or later; all by default. A datetime with a time
                zone.
            created_before: Return only streams created before this time; all by default. A datetime with a time zone.

        Yields:
            An entry for each stream.

        Raises:
            ValueError: The state is unknown, or a time has no time zone.
            InvalidDataError: The session id or the owner is not a valid id.
            SchemaError: A time is given, and migration 0002 is missing; or a session id or an owner is given, and
                migration 0004 is missing.
        """
        if state is not None and state not in get_args(StreamState):
            raise ValueError(f"state must be one of {', '.join(get_args(StreamState))}, not {state!r}")
        for bound in (created_after, created_before):
            if bound is not None and bound.tzinfo is None:
                raise ValueError(f"created_after and created_before must have a time zone, unlike {bound!r}")
        session = None if session_id is None else arguments.identifier(session_id, "a session id")
        person = None if owner is None else arguments.identifier(owner, "an owner")
        return self._list(state, session, person, created_after, created_before)

    async def _list(
        self,
        state: StreamState | None,
        session_id: str | None,
        owner: str | None,
        after: datetime | None,
        before: datetime | None,
    ) -> AsyncIterator[StreamInfo]:
        by_time = after is not None or before is not None
        scope: builtins.list[str | None] = []
        if session_id is not None or owner is not None:
            statements = await self._schema.require_0004("a list of one session or owner")
            if session_id is not None:
                scope = [session_id, owner]
                statement = statements.list_of_session_by_time if by_time else statements.list_of_session
            else:
                scope = [owner]
                statement = statements.list_of_owner_by_time if by_time else statements.list_of_owner
        else:
            statements = await self._schema.look_up()
            statement = statements.list_by_time if by_time else statements.list
        last_id = ""
        last_time: str | None = None
        while True:
            times = [after, before, last_time] if by_time else []
            rows = await self._database.query(statement, [state, last_id, LIST_PAGE_ROWS, *times, *scope])
            for row in rows:
                yield stream_info(row[:-1] if by_time else row)
            if len(rows) < LIST_PAGE_ROWS:
                return
            last_id, last_time = rows[-1][0], rows[-1][-1]

    async def _ended(self, stream_ids: Sequence[str]) -> dict[str, StreamStatus]:
        """Return the statuses, without error texts, of the given streams that have ended. End abandoned ones before."""
        statements = await self._schema.look_up()
        rows = await self._database.query(statements.poll, [json_array(stream_ids)])
        expired = [row[0] for row in rows if row[3]]
        abandoned = await self._leases.end_if_expired(expired) if expired else []
        if abandoned:
            await self._notifier.changed(abandoned)
        ended: dict[str, StreamStatus] = {}
        for stream_id, state, total_chunks, _ in rows:
            if stream_id in abandoned or state != "active":
                ended[stream_id] = StreamStatus("error" if stream_id in abandoned else state, None, total_chunks)
        return ended
