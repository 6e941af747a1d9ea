"""The methods of the stream store that create, end and delete streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from time import monotonic
from typing import Any

from .. import _arguments as arguments
from .._archive import BATCH_CHUNKS
from .._deletion import MAX_ROWS
from .._message_tree import new_id
from .._subscriptions import wake_all
from .._tables import Table
from ..errors import StreamExistsError, StreamNotFoundError
from ..metrics import STREAMS_CREATED, STREAMS_ENDED
from ..models import ArchiveResult, CleanupResult, StreamState
from ..wire import WireName, find_wire
from .archiving import AsyncArchive
from .columns import AsyncColumnCatalog
from .deleting import AsyncDeleter
from .stream_reads import AsyncStreamReads

ABANDONED_AFTER = 600.0  # seconds, the default of `fail_abandoned`


class AsyncStreamLifecycle(AsyncStreamReads):
    """The base class of the stream store with the methods that create, end and delete. The store sets the attributes.

    It inherits the methods that read, since `delete_owner` lists the streams of an owner.
    """

    _ttl: int
    _lease: int
    _tables: tuple[Table, Table]
    _columns: AsyncColumnCatalog
    _archive: AsyncArchive
    _deleter: AsyncDeleter

    async def create(
        self,
        id: str | None = None,
        *,
        session_id: str | None = None,
        owner: str | None = None,
        metadata: Any = None,
        ttl: float | timedelta | None = None,
        lease: float | timedelta | None = None,
        wire: WireName = "aibind",
    ) -> str:
        """Create a stream. If several callers use one id at the same time, one of them succeeds.

        The arguments other than `id` need migration 0004.

        Args:
            id: The stream id, 1 to 1,024 bytes in UTF-8. Default: a new, unguessable id.
            session_id: The id of the conversation to which the stream belongs, for `active` and `list`. Default: None.
            owner: The owner of the stream, such as a user id, for `list`. Default: None.
            metadata: Data of the application, a JSON value. Default: None.
            ttl: Seconds, or a timedelta, for which this stream is kept after its end. Default: the ttl of the store.
            lease: Seconds, or a timedelta, within which a producer must have begun to write the stream. Otherwise it
                ends in state error, such as after the loss of a job. Default: no limit.
            wire: The wire format in which `DurableStream.produce` will write the stream. Default: `aibind`.

        Returns:
            The stream id.

        Raises:
            StreamExistsError: A stream with this id exists, in any state.
            InvalidDataError: The session id or the owner is not a valid id, `metadata` is not a JSON value, or there is
                no such wire format.
            ValueError: `ttl` or `lease` is not more than zero, or above 1e9 seconds.
            TypeError: `ttl` or `lease` is neither a number nor a timedelta.
            SchemaError: Migration 0004 is missing, and an argument needs it.
        """
        stream_id = new_id() if id is None else id
        details: dict[str, Any] = {"session_id": session_id, "owner": owner, "metadata": metadata, "ttl": ttl}
        if not await self.acquire(stream_id, lease=lease, wire=wire, **details):
            raise StreamExistsError(stream_id)
        return stream_id

    async def acquire(
        self,
        id: str,
        *,
        session_id: str | None = None,
        owner: str | None = None,
        metadata: Any = None,
        ttl: float | timedelta | None = None,
        lease: float | timedelta | None = None,
        wire: WireName = "aibind",
    ) -> bool:
        """Create a stream unless a stream with this id exists.

        Args:
            id: The stream id.
            session_id: As for `create`, like the following arguments.
            owner: See `create`.
            metadata: See `create`.
            ttl: See `create`.
            lease: See `create`.
            wire: See `create`.

        Returns:
            True if this call created the stream: the caller should write it. False if the stream exists: the caller
            should read it.

        Raises:
            Exception: As for `create`, except `StreamExistsError`.
        """
        stream_id = arguments.identifier(id)
        if (metrics := self._database.metrics) is not None:
            await self._schema.look_up()
            metadata = metrics.with_traceparent(metadata) if self._schema.has_leases else metadata
        own_ttl = None if ttl is None else arguments.milliseconds(ttl, "ttl")
        details = [
            None if session_id is None else arguments.identifier(session_id, "a session id"),
            None if owner is None else arguments.identifier(owner, "an owner"),
            arguments.storable_json(metadata, "metadata"),
            own_ttl,
            None if lease is None else arguments.milliseconds(lease, "lease"),
            None if wire == "aibind" else find_wire(wire).name,
        ]
        if details == [None] * len(details):
            return await self._create(stream_id, self._schema.statements.create, [self._ttl])
        statements = await self._schema.require_0004(
            "a session id, an owner, metadata, a ttl, a lease or a wire format of a stream"
        )
        return await self._create(stream_id, statements.create_with_details, [own_ttl or self._ttl, *details])

    async def _create_leased(
        self,
        stream_id: str,
        session_id: str | None = None,
        owner: str | None = None,
        metadata: Any = None,
        ttl: float | timedelta | None = None,
        wire: WireName = "aibind",
    ) -> None:
        """Create a stream for a producer in this process, which renews its lease."""
        await self._schema.look_up()
        lease = self._lease / 1000 if self._schema.has_leases else None
        details: dict[str, Any] = {"session_id": session_id, "owner": owner, "metadata": metadata, "ttl": ttl}
        await self.create(stream_id, lease=lease, wire=wire, **details)

    async def _create(self, stream_id: str, statement: str, params: Sequence[object]) -> bool:
        [(created,)] = await self._deleter.bounded(statement, [stream_id, *params])
        if created:
            self._database.count(STREAMS_CREATED)
            self._notifier.wake([stream_id])  # a deleted stream with this id may still have readers
        elif ended := await self._leases.end_if_expired([stream_id]):
            await self._notifier.changed(ended)
        return bool(created)

    async def stop(self, id: str) -> bool:
        """End a stream in state stopped, for example on a user's request.

        Args:
            id: The stream id.

        Returns:
            True if this call ended the stream, False if it had already ended.

        Raises:
            StreamNotFoundError: The stream does not exist.
        """
        return await self._end(id, "stopped", None)

    async def complete(self, id: str) -> bool:
        """End a stream in state done.

        Args:
            id: The stream id.

        Returns:
            True if this call ended the stream, False if it had already ended.

        Raises:
            StreamNotFoundError: The stream does not exist.
        """
        return await self._end(id, "done", None)

    async def fail(self, id: str, error: str) -> bool:
        """End a stream in state error.

        Args:
            id: The stream id.
            error: The error text, which readers of the stream receive.

        Returns:
            True if this call ended the stream, False if it had already ended.

        Raises:
            StreamNotFoundError: The stream does not exist.
            InvalidDataError: The text cannot be stored.
        """
        return await self._end(id, "error", arguments.storable_text(error, "an error text"))

    async def _end(self, id: str, state: StreamState, error: str | None) -> bool:
        stream_id = arguments.identifier(id)
        try:
            statement = (await self._schema.look_up()).end
            [(ended, exists)] = await self._database.query(statement, [stream_id, state, error, self._ttl])
            if not exists:
                raise StreamNotFoundError(stream_id)
        except GeneratorExit:  # see `AsyncFollower`
            raise
        except BaseException:
            self._notifier.wake([stream_id])  # the stream may have ended
            raise
        self._database.count(STREAMS_ENDED, int(ended), {"state": state})
        # Also if it had already ended: the call that ended it may have lost its reply and not have notified.
        await self._notifier.changed([stream_id])
        return bool(ended)

    async def delete(self, id: str) -> bool:
        """Delete a stream and its chunks, in any state. Its readers and writers raise `StreamNotFoundError`.

        Each statement deletes at most 10,000 chunks. After the first one, no reader finds the stream. If the call is
        interrupted then, `cleanup` deletes the rest.

        Args:
            id: The stream id.

        Returns:
            True if the stream existed.
        """
        stream_id = arguments.identifier(id)
        self._database.check_owner()
        self._subscriptions.begin_delete(stream_id)
        try:
            deleted, tombstone = await self._deleter.hide(stream_id)
        except GeneratorExit:  # see `AsyncFollower`
            raise
        except BaseException:
            wake_all(self._subscriptions.end_delete(stream_id, False))
            raise
        wake_all(self._subscriptions.end_delete(stream_id, deleted))
        # Also if there was none: the call that deleted it may have lost its reply and not have notified.
        await self._notifier.notify([stream_id])
        if tombstone is not None:
            await self._deleter.sweep(stream_id, tombstone)
        return deleted

    async def delete_owner(self, owner: str) -> int:
        """Delete the streams of an owner, in any state, as `delete` does.

        Every stream that exists when the call begins is deleted. If the call is interrupted, repeat it, and call
        `cleanup`. In an application with conversations, call `delete_owner` of the conversation store, which deletes
        the conversations and their streams as well.

        Args:
            owner: The owner, as given to `create`.

        Returns:
            The number of deleted streams.

        Raises:
            InvalidDataError: The owner is not a valid id.
            SchemaError: Migration 0004 is missing.
        """
        return await self._delete_all(None, arguments.identifier(owner, "an owner"))

    async def _delete_all(self, session_id: str | None, owner: str | None) -> int:
        """Delete the streams of a session or of an owner. Return their number."""
        deleted = 0
        async for info in self._list(None, session_id, owner, None, None):
            deleted += await self.delete(info.id)
        return deleted

    async def cleanup(self) -> CleanupResult:
        """Delete the ended streams that have expired, with their chunks. Safe to run in several processes at once.

        Active streams are kept: end abandoned ones with `fail_abandoned`. Each statement deletes at most 10,000 chunks.
        If a stream has more chunks, no reader finds it after the first statement. If the call is interrupted, the next
        one continues.

        Returns:
            The numbers of deleted streams and chunks.
        """
        await self._schema.look_up()
        return await self._deleter.cleanup()

    async def archive(self, older_than: float | timedelta, *, batch_size: int = BATCH_CHUNKS) -> ArchiveResult:
        """Move the chunks of finished streams to the archive, where they need about a twentieth of the space.

        All methods read archived streams as before. Software without support for the archive, such as the TypeScript
        package, finds no chunks in them. Chunks of more than 1 MB stay in the chunks table.

        Each statement moves at most `batch_size` chunks or 8 MB, the oldest streams first. Streams that another process
        is archiving are skipped, so that several processes can share the work. If the call is interrupted, the next one
        continues. Readers are not disturbed: at every moment, each chunk is in one of the tables.

        Args:
            older_than: Seconds, or a timedelta, since the last chunk of a stream, or since the creation of a stream
                without chunks. A time before migration 0002 counts as long ago.
            batch_size: The number of chunks that one statement moves at most; 10,000 by default.

        Returns:
            The numbers of archived streams and of moved chunks.

        Raises:
            InvalidDataError: `batch_size` is not an int of at least 1.
            ValueError: `older_than` is negative, or above 1e9 seconds.
            TypeError: `older_than` is neither a number nor a timedelta.
            SchemaError: Migration 0005 is missing.
        """
        age = round(arguments.seconds(older_than, "older_than", allow_zero=True) * 1000)
        arguments.integer(batch_size, "batch_size", minimum=1)
        streams = chunks = 0
        async for step in self._archive.steps(age, batch_size):
            streams += step.streams
            chunks += step.chunks
        return ArchiveResult(streams, chunks)

    async def unarchive(self, id: str) -> int:
        """Move the chunks of a stream back from the archive, and let `archive` leave the stream alone from now on.

        Use it before software without support for the archive reads the stream. Each statement moves at most ten pages
        of the archive, which have up to 1,000 chunks each. If the call is interrupted, repeat it.

        Args:
            id: The stream id.

        Returns:
            The number of moved chunks; 0 if the stream was not archived.

        Raises:
            StreamNotFoundError: The stream does not exist.
            SchemaError: Migration 0005 is missing.
        """
        stream_id = arguments.identifier(id)
        chunks = 0
        async for step in self._archive.restore(stream_id):
            chunks += step
        return chunks

    async def fail_abandoned(self, older_than: float | timedelta = ABANDONED_AFTER) -> list[str]:
        """End the streams of dead producers in state error.

        These are the streams with an expired lease, and the streams without a lease that have got no chunk for
        `older_than` seconds.

        - Before it ends a stream with an expired lease, the call waits until the store has reached the server for 8
          seconds without interruption, or for 20 seconds if the store has just failed to reach it. After an outage,
          living producers renew their leases in this time.
        - Streams without a lease are those of the TypeScript package and of plain appends, and all streams before
          migration 0004.
        - The time of chunks before migration 0002 is unknown. A stream without a newer chunk is ended by a store object
          that has known the migration for `older_than` seconds, counted from its first call of this method.

        Args:
            older_than: Seconds, or a timedelta, since the last chunk, or since the creation of a stream without chunks.
                Use a longer time than the longest pause of a running producer. 600 by default: models and their tools
                rarely pause for ten minutes.

        Returns:
            The ids of the ended streams.

        Raises:
            SchemaError: Migration 0002 is missing. A transaction of the caller stays usable.
            ValueError: `older_than` is negative, or above 1e9 seconds.
            TypeError: `older_than` is neither a number nor a timedelta.
        """
        idle_seconds = arguments.seconds(older_than, "older_than", allow_zero=True)
        stream_ids: list[str] = []
        async for ended in self._fail_abandoned_steps(idle_seconds):
            stream_ids += ended
        return stream_ids

    async def _fail_abandoned_steps(self, idle_seconds: float) -> AsyncIterator[list[str]]:
        """End the abandoned streams. Yield the ids after each statement."""
        found_at = 0.0
        for table in self._tables:
            columns = await self._columns.require(table, ["created_at"], "fail_abandoned", "0002")
            found_at = max(found_at, columns.found_at)
        await self._schema.look_up()
        ends_untimed = monotonic() - found_at >= idle_seconds
        text = f"abandoned: no chunk for {idle_seconds:g} seconds"
        last: str | None = ""
        while last is not None:
            params = [self._ttl, round(idle_seconds * 1000), text, last, MAX_ROWS, ends_untimed]
            statements = self._schema.statements
            rows = await self._database.query_either(
                statements.fail_abandoned, statements.fail_abandoned_distributed, params
            )
            last = rows[0][0]
            if ended := [stream_id for _, stream_id in rows if stream_id is not None]:
                await self._notifier.changed(ended)
                yield ended
        async for ended in self._leases.end_all_expired():
            await self._notifier.changed(ended)
            yield ended
