"""Append chunks to streams. Simultaneous appends share a statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from .._deletion import MAX_CHUNKS
from .._sql import json_array, json_text
from .._sqlstate import UNIQUE_VIOLATION, sqlstate, wrote_nothing
from ..errors import (
    AibindError,
    SequenceConflictError,
    StreamNotActiveError,
    StreamNotFoundError,
)
from ..metrics import APPEND_CHUNKS
from .combining import AsyncCombiner

if TYPE_CHECKING:
    from .._statement_runner import Row
    from .database import AsyncDatabase
    from .notifying import AsyncNotifier
    from .stream_schema import AsyncStreamSchema

ATTEMPTS = 5  # of an append that is skipped for no apparent reason
LANES = 2  # concurrent batches, so that PostgreSQL executes one while it writes the WAL of the other
BATCH_ITEMS, BATCH_CHARACTERS = 500, 500_000
MIN_ALONE = 20_000  # characters; an append of this size runs alone, since it would delay the rest of its batch
ROW_CHARACTERS = 100  # the assumed overhead of one chunk


# The id of a stream, the texts to append to it, and the sequence number that the first one must get, if any. To make a
# named tuple would need as much processor time as all checks of an append.
Append: TypeAlias = tuple[str, Sequence[str], int | None]


class AsyncAppender:
    """Appends chunks to the streams of one store. Simultaneous appends share statements.

    A shared statement skips an append in these cases:

    - The stream does not exist or has ended.
    - The next sequence number is not the expected one.
    - Another transaction has locked the stream's row.
    - The server rejects the statement. In this case all appends of the statement are skipped.

    A skipped append then runs alone: it raises its own error, or waits for the lock.
    """

    def __init__(
        self,
        database: AsyncDatabase,
        schema: AsyncStreamSchema,
        ttl: int,
        notifier: AsyncNotifier,
    ) -> None:
        self._database = database
        self._schema = schema
        self._ttl = ttl
        self._notifier = notifier
        self._metrics = database.metrics
        self._appends = self._chunks = 0
        # Each stream always uses the same lane, so that concurrent batches do not lock the same row.
        self._lanes = [
            AsyncCombiner(self._append_alone, self._append_batch, max_items=BATCH_ITEMS, max_size=BATCH_CHARACTERS)
            for _ in range(LANES)
        ]

    async def append(self, append: Append) -> int:
        """Append texts and return the sequence number of the last one.

        If the same texts are already stored at `expected_seq`, return that number without writing.

        Raises:
            StreamNotFoundError: The stream does not exist.
            StreamNotActiveError: The stream has ended.
            SequenceConflictError: `expected_seq` is not the next sequence number.
            AibindError: The stream is active, but a policy or trigger of the table prevents the update.
        """
        self._database.check_owner()
        if not self._schema.is_known:
            await self._schema.look_up()
        self._appends += 1
        stream_id, texts, _ = append
        count = len(texts)  # not inside `+=`, where another thread could run and its count be lost
        size = ROW_CHARACTERS * count
        if size < MIN_ALONE:
            size += sum(map(len, texts))
        # A statement in a caller's transaction must not contain the appends of other callers.
        # If the tables are distributed, each append has a statement of its own, on the server of its stream.
        combined = size < MIN_ALONE and not self._database.client.joins_transactions
        try:
            for _ in range(ATTEMPTS):
                if combined and not self._database.is_distributed:
                    last = await self._lanes[hash(stream_id) % LANES].call(append, size)
                else:
                    last = await self._append_alone(append)
                if last is None:
                    last = await self._check_skipped(append)
                if last is not None:
                    self._chunks += count
                    return last
                combined = False
        except GeneratorExit:  # see `AsyncFollower`
            raise
        except BaseException:
            self._notifier.wake([stream_id])  # the texts may be stored
            raise
        raise AibindError(
            f"stream {stream_id!r} is active, but its row cannot be updated: check the policies and triggers "
            "of its table, and that its total_chunks is not negative"
        )

    def get_stats(self) -> dict[str, int]:
        """Return the numbers of appends, of those that shared a statement, and of stored chunks."""
        combined = sum(lane.combined for lane in self._lanes)
        return {"appends_num": self._appends, "appends_combined": combined, "chunks_num": self._chunks}

    async def _append_alone(self, append: Append) -> int | None:
        """Return the last sequence number, or None if nothing was written."""
        stream_id, texts, expected_seq = append
        if self._schema.has_append:
            statement, data = self._schema.statements.append_distributed, json_array(texts)
        elif len(texts) == 1:
            statement, data = self._schema.statements.append, texts[0]
        else:
            statement, data = self._schema.statements.append_many, json_array(texts)
        params = [stream_id, data, expected_seq, self._ttl]
        newest = self._notifier.newest
        try:
            rows = await self._database.query(statement, params)
        except AibindError as error:
            # A TypeScript clean-up that died half-way may have left chunks, and a stream of this id was created again.
            if sqlstate(error) != UNIQUE_VIOLATION or self._database.client.in_transaction():
                raise
            await self._delete_leftovers([stream_id, max(len(texts), MAX_CHUNKS)])
            rows = await self._database.query(statement, params)
        if not rows or rows[0][0] is None:
            return None
        last = int(rows[0][0])
        if self._metrics is not None:
            self._metrics.record(APPEND_CHUNKS, len(texts))
        await self._notifier.appended([(stream_id, last - len(texts), texts)], newest)
        return last

    async def _delete_leftovers(self, params: Sequence[object]) -> None:
        statements = self._schema.statements
        if self._schema.has_leases:
            await self._database.query_either(
                statements.delete_leftovers, statements.delete_leftovers_distributed, params
            )
        else:
            await self._database.query(statements.delete_leftovers, params)

    async def _append_batch(self, appends: Sequence[Append]) -> Sequence[int | None]:
        """Return the last sequence number of each append, or None for a skipped one."""
        if self._database.is_distributed:  # since these calls have queued
            return [None] * len(appends)
        # The texts of one stream are appended together, so only the first append can have an `expected_seq`.
        groups: dict[str, list[int]] = {}
        for index, (stream_id, _, expected_seq) in enumerate(appends):
            group = groups.setdefault(stream_id, [])
            if not group or expected_seq is None:
                group.append(index)
        items = [
            {
                "id": stream_id,
                "expected": appends[group[0]][2],
                "texts": [text for index in group for text in appends[index][1]],
            }
            for stream_id, group in groups.items()
        ]
        lasts: list[int | None] = [None] * len(appends)
        newest = self._notifier.newest
        try:
            rows = await self._database.query(self._schema.statements.append_batch, [json_text(items), self._ttl])
        except Exception as error:
            if not self._database.refuses(error) and not wrote_nothing(error):
                raise
            return lasts
        appended = []
        for stream_id, last in rows:
            for index in groups[stream_id]:
                texts = appends[index][1]
                appended.append((stream_id, last, texts))
                last += len(texts)
                lasts[index] = last
        if appended:
            if self._metrics is not None:
                self._metrics.record(APPEND_CHUNKS, sum([len(texts) for _, _, texts in appended]))
            await self._notifier.appended(appended, newest)
        return lasts

    async def _check_skipped(self, append: Append) -> int | None:
        """Find out why an append was skipped.

        Returns:
            The last sequence number if the texts are already stored at `expected_seq`. None if no reason remains, so
            that another attempt may succeed.

        Raises:
            StreamNotFoundError: The stream does not exist.
            StreamNotActiveError: The stream has ended.
            SequenceConflictError: `expected_seq` is not the next sequence number.
        """
        stream_id, texts, expected_seq = append
        sent = [] if expected_seq is None else texts
        newest = self._notifier.newest
        statement, params = self._schema.statements.skipped, [stream_id, expected_seq or 1, json_array(sent)]
        rows = await self._database.query(statement, params)
        # Another process may have archived the stream after the migration of a running store.
        if rows and _may_be_archived(rows[0], expected_seq or 1, sent) and await self._schema.can_read_archive():
            newer = (await self._schema.require_0005("an archived stream")).skipped
            rows = rows if newer == statement else await self._database.query(newer, params)
        if not rows:
            raise StreamNotFoundError(stream_id)
        [(state, total, stored)] = rows
        if expected_seq is not None and texts and stored == len(texts):
            await self._notifier.appended([(stream_id, expected_seq - 1, texts)], newest)
            return expected_seq + len(texts) - 1
        if state != "active":
            raise StreamNotActiveError(stream_id, state)
        if expected_seq is not None and expected_seq != total + 1:
            raise SequenceConflictError(stream_id, expected_seq, total + 1)
        return None


def _may_be_archived(skipped: Row, expected_seq: int, sent: Sequence[str]) -> bool:
    """Return True if the stream has ended with these numbers, but some of the texts are not in the chunks table."""
    state, total, stored = skipped
    return bool(state != "active" and stored < len(sent) and expected_seq + len(sent) - 1 <= total)
