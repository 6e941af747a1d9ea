"""Appends: each one a statement, or many of them one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .._pages import Page
from .._sql import StreamStatements, json_array, json_text
from ..errors import (
    AibindError,
    SequenceConflictError,
    StreamNotActiveError,
    StreamNotFoundError,
    nothing_was_written,
)
from .combining import AsyncCombiner

if TYPE_CHECKING:
    from .database import AsyncDatabase
    from .notifying import AsyncNotifier

ATTEMPTS = 5
LANES = 2  # batches side by side: while PostgreSQL writes the log of one it works on the other
BATCH_ITEMS, BATCH_BYTES = 500, 500_000
LARGEST_COMBINED = 20_000  # bytes; what is larger would hold up the others of its batch
TEXT_BYTES = 100  # what a text counts beyond its own bytes


class Append(NamedTuple):
    stream_id: str
    texts: Sequence[str]
    expected_seq: int | None


class AsyncAppender:
    """Appends to streams; appends at the same time share statements.

    An append that a shared statement left out runs a statement of its own, which tells why or waits for what stands in
    the way. What is left out are appends to streams that are not there or have ended, whose number is not the expected
    one, or whose row is locked by another transaction; and the whole batch if the server refuses it.
    """

    def __init__(
        self,
        database: AsyncDatabase,
        statements: StreamStatements,
        ttl: int,
        notifier: AsyncNotifier,
    ) -> None:
        self._database = database
        self._sql = statements
        self._ttl = ttl
        self._notifier = notifier
        # A stream has its lane, since two batches at once should not want the same row.
        self._lanes = [AsyncCombiner(self._run, max_items=BATCH_ITEMS, max_size=BATCH_BYTES) for _ in range(LANES)]

    async def append(self, append: Append) -> int:
        """Append texts and return the number of the last one; also if they are there already, where expected."""
        self._database.check_owner()
        size = TEXT_BYTES * len(append.texts)
        if size < LARGEST_COMBINED:
            size += sum([len(text.encode()) for text in append.texts])
        # A caller's own transaction is nobody else's.
        combined = size < LARGEST_COMBINED and not self._database.client.joins_transactions
        for _ in range(ATTEMPTS):
            if combined:
                last = await self._lanes[hash(append.stream_id) % LANES].call(append, size)
            else:
                last = await self._append_alone(append)
            if last is None:  # Why? If nothing speaks against it, it was left out, or the stream has changed meanwhile.
                last = await self._explain(append)
            if last is not None:
                return last
            combined = False
        raise AibindError(
            f"stream {append.stream_id!r} is active, and yet its row cannot be updated: see policies and triggers, "
            "and whether its total_chunks is below zero"
        )

    async def _append_alone(self, append: Append) -> int | None:
        """Return the last number, None if nothing was written."""
        stream_id, texts, expected_seq = append
        if len(texts) == 1:
            statement, data = self._sql.append, texts[0]
        else:
            statement, data = self._sql.append_many, json_array(texts)
        rows = await self._database.query(statement, [stream_id, data, expected_seq, self._ttl])
        if not rows:
            return None
        last = int(rows[0][0])
        await self._notifier.appended([(stream_id, last - len(texts), texts)])
        return last

    async def _run(self, appends: Sequence[Append]) -> Sequence[int | None]:
        """Return the last number of each append, None for one that was left out."""
        if len(appends) == 1:
            return [await self._append_alone(appends[0])]
        # The texts of one stream go in together, so only the first of them can have a number that it must get.
        groups: dict[str, list[int]] = {}
        for place, append in enumerate(appends):
            group = groups.setdefault(append.stream_id, [])
            if not group or append.expected_seq is None:
                group.append(place)
        items = [
            {
                "id": stream_id,
                "expected": appends[group[0]].expected_seq,
                "texts": [text for place in group for text in appends[place].texts],
            }
            for stream_id, group in groups.items()
        ]
        lasts: list[int | None] = [None] * len(appends)
        try:
            rows = await self._database.query(self._sql.append_batch, [json_text(items), self._ttl])
        except Exception as error:
            if not nothing_was_written(error):
                raise
            return lasts
        appended = []
        for stream_id, last in rows:
            for place in groups[stream_id]:
                texts = appends[place].texts
                appended.append((stream_id, last, texts))
                last += len(texts)
                lasts[place] = last
        if appended:
            await self._notifier.appended(appended)
        return lasts

    async def _explain(self, append: Append) -> int | None:
        """Return the last number if these texts have been written already, raise what forbids to write them."""
        stream_id, texts, expected_seq = append
        # One statement, so one snapshot: in two, the same append, sent twice, could land between them.
        after, number = (0, 0) if expected_seq is None else (expected_seq - 1, len(texts))
        rows = await self._database.query(self._sql.read, [stream_id, after, number])
        page = Page.parse(rows, after, number)
        if page is None:
            raise StreamNotFoundError(stream_id)
        if expected_seq is not None and texts and [text for _, text in page.rows] == list(texts):
            await self._notifier.appended([(stream_id, expected_seq - 1, texts)])
            return expected_seq + len(texts) - 1
        if page.state != "active":
            raise StreamNotActiveError(stream_id, page.state)
        if expected_seq is not None and expected_seq != page.total + 1:
            raise SequenceConflictError(stream_id, expected_seq, page.total + 1)
        return None
