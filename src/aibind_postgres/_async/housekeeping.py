"""The housekeeper: cleans up the tables in the background, in one process at a time."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from time import monotonic
from types import TracebackType

from .. import _arguments as arguments
from .._archive import BATCH_CHUNKS
from .._concurrency import AsyncEvent, AsyncWorker, async_join_or_cancel, async_spawn
from .._housekeeping import MARKER, describe, seconds_until_next_turn
from .._sqlstate import refuses_row, server_reason
from .._tables import Table
from .._telemetry import StoreMetrics
from ..errors import AibindError, StoreClosedError
from ..metrics import HOUSEKEEPING_FAILURES, HOUSEKEEPING_ROWS
from .conversation_store import AsyncPostgresConversationStore
from .database import AsyncDatabase
from .stream_lifecycle import ABANDONED_AFTER
from .stream_store import AsyncPostgresStreamStore
from .time_partitions import AsyncTimePartitions

logger = logging.getLogger("aibind_postgres.housekeeper")

CLOSING_GRACE = 1.0  # seconds that `close` waits for the statement under way


class AsyncHousekeeper:
    """Cleans up in the background: a context manager around the time in which the application serves.

    Once per period, one of the processes with a housekeeper on these tables calls `fail_abandoned`, with its default,
    and `cleanup` of the stream store, and `cleanup` of the conversation store. If the tables of streams are partitioned
    by time, it creates the partitions of the next days, and drops those of days whose streams have expired, instead of
    deleting their rows. With `archive_after`, it also calls `archive` of the stream store. The first turn is taken at
    once, unless another process took one within the last period. If processes have different periods, the shortest one
    applies. If the process dies during its turn, another one continues in the next period.

    The numbers of ended and deleted rows are logged at level INFO, and reported to the `metrics` of the stream store.
    Nothing is raised in the background: failures are logged as warnings, and tried again in the next period.

    Leaving the block waits for up to one second for the statement under way. An asynchronous housekeeper then cancels
    it; a thread ends when its statement returns. A housekeeper also ends when one of its stores is closed. Start it in
    the process that uses it: a forked process does not continue it.

    The stores should be on a pool or a connection string. A connection of the application must be in autocommit mode,
    and in no transaction when a turn is due: that turn is logged as a failure.

    Args:
        streams: The stream store, or None.
        conversations: The conversation store, or None; None by default. Both cannot be None.
        every: The period in seconds, or a timedelta; 600 by default.
        archive_after: Seconds, or a timedelta, since the last chunk of a finished stream after which it is archived.
            Needs migration 0005, and has an effect only on streams with a longer ttl. Default: None, which archives
            nothing, since the TypeScript package cannot read archived streams.

    Raises:
        ValueError: Both stores are None, `every` is not more than zero, `archive_after` is negative or given without a
            stream store, or a time is above 1e9 seconds.
        TypeError: A store is not of this flavour, or a time is neither a number nor a timedelta.
    """

    def __init__(
        self,
        streams: AsyncPostgresStreamStore | None,
        conversations: AsyncPostgresConversationStore | None = None,
        every: float | timedelta = 600.0,
        *,
        archive_after: float | timedelta | None = None,
    ) -> None:
        if streams is None and conversations is None:
            raise ValueError("streams and conversations must not both be None")
        if streams is None and archive_after is not None:
            raise ValueError("archive_after needs a stream store")
        self._every = arguments.milliseconds(every, "every")
        archive_age = None
        if archive_after is not None:
            archive_age = round(arguments.seconds(archive_after, "archive_after", allow_zero=True) * 1000)
        self._duties: list[AsyncDuty] = []
        if streams is not None:
            _check_kind(streams, AsyncPostgresStreamStore, "streams")
            self._duties.append(_duty_of_streams(streams, archive_age))
        if conversations is not None:
            _check_kind(conversations, AsyncPostgresConversationStore, "conversations")
            metrics = None if streams is None else streams._database.metrics
            self._duties.append(_duty_of_conversations(conversations, metrics))
        self._process: int | None = None
        self._closing = AsyncEvent()
        self._worker: AsyncWorker | None = None

    def __repr__(self) -> str:
        tables = " and ".join(duty.table.quoted for duty in self._duties)
        return f"<{type(self).__name__} of {tables}, every {self._every / 1000:g} s>"

    async def start(self) -> None:
        """Start the housekeeper without a block, for applications that have none around their requests.

        Raises:
            RuntimeError: It runs already, or a store is bound to a different event loop.
            StoreClosedError: A store is closed.
            ForkedError: A store belongs to the parent of this process.
        """
        if self._worker is not None and self._process == os.getpid() and self._worker.is_alive():
            raise RuntimeError("this housekeeper runs already")
        databases = [duty.database for duty in self._duties]
        for database in databases:
            database.check_owner()
        closing = AsyncEvent()
        for database in databases:
            database.closed_with.add(closing)
            database.last_housekeeping = monotonic()
        if any(database.closing.is_set() for database in databases):
            self._forget(closing)
            raise StoreClosedError("a store of this housekeeper is closed: make a new one")
        settings = [database.client.capture_settings() for database in databases]
        self._closing, self._process = closing, os.getpid()
        self._worker = async_spawn(partial(self._work, closing, settings), "aibind_postgres-housekeeper")

    async def close(self) -> None:
        """End the housekeeper, as leaving the block does. Safe to repeat."""
        worker, self._worker = self._worker, None
        if worker is not None and self._process == os.getpid():
            self._closing.set()
            await async_join_or_cancel(worker, CLOSING_GRACE)

    async def __aenter__(self) -> AsyncHousekeeper:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _work(self, closing: AsyncEvent, settings: Sequence[Callable[[], None]]) -> None:
        try:
            for apply in settings:
                apply()
            for duty in self._duties:
                duty.due_at = 0.0
            while not closing.is_set():
                for duty in self._duties:
                    if duty.due_at <= monotonic() and not closing.is_set():
                        await duty.attend(self._every, closing)
                await closing.wait(max(0.0, min(duty.due_at for duty in self._duties) - monotonic()))
        finally:
            self._forget(closing)

    def _forget(self, closing: AsyncEvent) -> None:
        for duty in self._duties:
            duty.database.closed_with.discard(closing)
            duty.database.last_housekeeping = None


class AsyncDuty:
    """The housekeeping of one store.

    Args:
        database: The database of the store.
        table: The table that holds the marker.
        take_turn: The statement that takes a turn.
        calls: The methods to call in a turn, by their names. Each of them yields counts after every statement.
        metrics: The metrics of the housekeeper, or None.
    """

    def __init__(
        self,
        database: AsyncDatabase,
        table: Table,
        take_turn: str,
        calls: Mapping[str, Callable[[], AsyncIterator[Mapping[str, int]]]],
        metrics: StoreMetrics | None,
    ) -> None:
        self.database = database
        self.table = table
        self.due_at = 0.0  # the time of the next attempt, by `monotonic`
        self._take_turn = take_turn
        self._calls = calls
        self._metrics = metrics
        self._warned = False

    async def attend(self, every: int, closing: AsyncEvent) -> None:
        """Take a turn if it is due, and do the work. Failures are logged.

        Args:
            every: The period in milliseconds.
            closing: Ends the work before the next statement.
        """
        self.due_at = monotonic() + every / 1000
        try:
            try:
                taken, wait = await self._turn(every)
                self.due_at = monotonic() + wait
                if not taken:  # another process has the turn
                    self.database.last_housekeeping = monotonic() + wait - every / 1000
                elif await self._do_all(every, closing):
                    self.database.last_housekeeping = monotonic()
            finally:
                await self.database.client.release_thread()
        except Exception as error:
            self._log_failure("taking a turn", error, every, closing)

    async def _turn(self, every: int) -> tuple[bool, float]:
        """Take a turn if it is due. Return whether this process has it, and the seconds until the next attempt."""
        self._check_transaction()
        try:
            rows = await self.database.query(self._take_turn, [MARKER, every, self.table.quoted])
        except Exception as error:
            if not refuses_row(error):
                raise
            if not self._warned:
                self._warned = True
                logger.warning(
                    "housekeeping of %s: a policy, constraint or privilege refuses the row %r, with which processes "
                    "take turns: each process cleans up by itself. Allow this row to clean up once per period",
                    self.table.quoted,
                    MARKER,
                )
            return True, every / 1000
        [(taken, remaining)] = rows
        return taken, seconds_until_next_turn(taken, remaining, every)

    async def _do_all(self, every: int, closing: AsyncEvent) -> bool:
        """Do the work of a turn. Return True if nothing failed."""
        succeeded = True
        counts: Counter[str] = Counter()
        try:
            for name, call in self._calls.items():
                try:
                    await self._do(call, counts, closing)
                except Exception as error:
                    succeeded = False
                    self._log_failure(name, error, every, closing)
        finally:
            if done := describe(counts):
                logger.info("housekeeping of %s: %s", self.table.quoted, done)
        return succeeded

    async def _do(
        self, call: Callable[[], AsyncIterator[Mapping[str, int]]], counts: Counter[str], closing: AsyncEvent
    ) -> None:
        if closing.is_set():
            return
        self._check_transaction()
        async for step in call():
            counts.update(step)
            if self._metrics is not None:
                for kind, count in step.items():
                    self._metrics.add(HOUSEKEEPING_ROWS, count, {"kind": kind})
            if closing.is_set():
                return
            self._check_transaction()

    def _check_transaction(self) -> None:
        """Raise in a transaction of the application, which a failed statement would abort."""
        if self.database.client.in_transaction():
            raise AibindError(
                "the connection of the store is in a transaction of the application: give the housekeeper a store with "
                "a pool or a connection string"
            )

    def _log_failure(self, name: str, error: Exception, every: int, closing: AsyncEvent) -> None:
        if closing.is_set():  # as of a store that was closed
            return
        if self._metrics is not None:
            self._metrics.add(HOUSEKEEPING_FAILURES, 1)
        # The text of a driver's error may contain a part of the connection string.
        reason = str(error) if isinstance(error, AibindError) else server_reason(error) or type(error).__name__
        logger.warning(
            "housekeeping of %s: %s failed: %s. It is tried again in %g seconds; if it fails again, call cleanup of "
            "the store to see the whole error",
            self.table.quoted,
            name,
            reason,
            every / 1000,
        )


def _duty_of_streams(store: AsyncPostgresStreamStore, archive_age: int | None) -> AsyncDuty:
    async def fail_abandoned() -> AsyncIterator[Mapping[str, int]]:
        async for stream_ids in store._fail_abandoned_steps(ABANDONED_AFTER):
            yield {"abandoned streams ended": len(stream_ids)}

    partitions = AsyncTimePartitions(store._database, store._schema, store._deleter, store._tables)

    async def archive() -> AsyncIterator[Mapping[str, int]]:
        async for streams, chunks in store._archive.steps(archive_age or 0, BATCH_CHUNKS):
            yield {"streams archived": streams, "chunks archived": chunks}

    calls = {
        "fail_abandoned": fail_abandoned,
        "the change of partitions": partitions.partition_steps,
        "cleanup": partitions.cleanup_steps,
    }
    if archive_age is not None:
        calls["archive"] = archive
    return AsyncDuty(
        store._database, store._tables[0], store._schema.statements.take_turn, calls, store._database.metrics
    )


def _duty_of_conversations(store: AsyncPostgresConversationStore, metrics: StoreMetrics | None) -> AsyncDuty:
    async def cleanup() -> AsyncIterator[Mapping[str, int]]:
        async for conversations in store._cleanup_steps():
            yield {"conversations deleted": conversations}

    return AsyncDuty(store._database, store._table, store._schema.statements.take_turn, {"cleanup": cleanup}, metrics)


def _check_kind(store: object, kind: type, name: str) -> None:
    if not isinstance(store, kind):
        raise TypeError(f"{name} must be of type {kind.__name__} or None, not {type(store).__name__}")
