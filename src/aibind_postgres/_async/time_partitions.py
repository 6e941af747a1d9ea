"""Create partitions by time ahead, and drop those of expired streams."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from datetime import date
from random import uniform
from typing import TYPE_CHECKING

from .._sqlstate import CHECK_VIOLATION, is_transient, server_reason, sqlstate
from .._time_partition_sql import create_statement, drop_statement, may_drop_statement
from .._time_partitions import (
    ATTEMPTS,
    MAX_SCANNED,
    MAX_WAIT,
    PARTITIONS,
    Partitions,
    is_quickly_scanned,
    missing_days,
    parse_partitions,
    past_days,
    span,
    wanted,
)

if TYPE_CHECKING:
    from .._tables import Table
    from .database import AsyncDatabase
    from .deleting import AsyncDeleter
    from .stream_schema import AsyncStreamSchema

logger = logging.getLogger("aibind_postgres.housekeeper")

Counts = Mapping[str, int]


class AsyncTimePartitions:
    """Housekeeping of the partitions of one stream store, and the clean-up of the rows that they leave to it.

    Args:
        database: The database of the store.
        schema: The statements of the store.
        deleter: Deletes rows.
        tables: The status table and the chunks table.
    """

    def __init__(
        self, database: AsyncDatabase, schema: AsyncStreamSchema, deleter: AsyncDeleter, tables: tuple[Table, Table]
    ) -> None:
        self._database = database
        self._schema = schema
        self._deleter = deleter
        status, chunks = tables
        self._tables = (status, chunks, chunks.archive)
        self._warnings: set[str] = set()

    async def partition_steps(self) -> AsyncIterator[Counts]:
        """Create the partitions of the next days and drop those of past days, each by one statement.

        If the server refuses to change the partitions of a day, log it and go on with the other days.

        Yields:
            Counts for the log, after every statement. Nothing if the tables are not partitioned by time.
        """
        before = await self._look_up()
        if not before:
            return
        tables = list(before)
        if not _may_change(before):
            self._warn(
                "this role may not create and drop partitions, so expired streams are deleted row by row. Give the "
                "housekeeper a store whose role owns the tables, and may create tables in their schema"
            )
            return
        if missing := missing_days(before.values()):
            if is_quickly_scanned(before.values()):
                for day in missing:
                    async for step in self._change("created", day, create_statement(tables, day)):
                        yield step
            else:
                logger.warning(  # in each turn: until somebody acts, the rows of new days accumulate
                    "housekeeping of %s: the partitions of the next days are not created, since statements of others "
                    "would have to wait: the partitions of DEFAULT for ids with a time have more than %d MB. Call "
                    "migrate with partitions='time' at a quiet time, and again until VACUUM has returned their space",
                    self._tables[0].quoted,
                    MAX_SCANNED >> 20,
                )
        columns = [partitions.columns for partitions in before.values()]
        if not _may_drop(before):
            self._warn(
                "a trigger BEFORE INSERT FOR EACH ROW could change or discard streams that must be kept, so no "
                "partitions are dropped, and expired streams are deleted row by row. Use a trigger AFTER INSERT"
            )
        for day in past_days(before.values()) if _may_drop(before) else ():
            drop, may_drop = drop_statement(tables, day, columns), may_drop_statement(tables, day)
            async for step in self._change("dropped", day, drop, may_drop):
                yield step
        after = await self._look_up()
        yield {"partitions dropped": _lost(before, after), "partitions created": _lost(after, before)}

    async def cleanup_steps(self) -> AsyncIterator[Counts]:
        """Delete expired streams, and yield counts after every statement.

        If the partitions are dropped with their streams, only those streams are deleted for which this is too late, and
        those in the DEFAULT partition.
        """
        statements = await self._schema.look_up()
        partitions = await self._look_up()
        if partitions and _may_change(partitions) and _may_drop(partitions):
            wait = round(MAX_WAIT.total_seconds() * 1000)
            statement = statements.cleanup_of_partitions
            searches = [(statement, [0, *span(partitions.values())]), (statement, [wait, "", ""])]
            distributed = None  # these partitions exclude Citus
        else:
            searches, distributed = [(statements.cleanup, [])], statements.cleanup_distributed
        for statement, params in searches:
            async for streams, chunks in self._deleter.expired_steps(statement, params, distributed):
                yield {"streams deleted": streams, "chunks deleted": chunks}
        async for streams, chunks in self._deleter.tombstone_steps():
            yield {"streams deleted": streams, "chunks deleted": chunks}

    async def _look_up(self) -> dict[Table, Partitions]:
        """Return the partitions of the tables that are partitioned by time. Empty if those of streams are not."""
        rows = {row[0]: row for row in await self._database.query(PARTITIONS, [wanted(self._tables)])}
        found = {table: parse_partitions(rows[table.quoted], table) for table in self._tables if table.quoted in rows}
        return found if found.keys() >= set(self._tables[:2]) else {}

    async def _change(
        self, done: str, day: date, statement: str, condition: str | None = None
    ) -> AsyncIterator[Counts]:
        """Create or drop the partitions of a day. Log the reason if the server refuses it, once for each reason.

        Args:
            done: The effect of the statement on the partitions, for the log.
            day: The day.
            statement: The statement.
            condition: The query whether to run it. Default: it is run.
        """
        try:
            if condition is not None:
                [(may_change,)] = await self._database.query(condition, [])
                if not may_change:
                    return
            async for step in self._attempts(statement):
                yield step
        except Exception as error:
            if sqlstate(error) is None or self._database.client.is_recoverable(error):
                raise
            reason = server_reason(error) or type(error).__name__
            self._warn(
                f"the partitions of {day} and perhaps of other days are not {done}: {reason}. It is tried again in "
                "each period",
                cause=reason,
            )

    async def _attempts(self, statement: str) -> AsyncIterator[Counts]:
        """Run a statement that gives up soon if it must wait for others. Yield after each attempt."""
        for attempt in range(ATTEMPTS):
            if attempt:
                await self._database.sleep(uniform(0.03, 0.1))
            try:
                await self._database.query(statement, [])
            except Exception as error:
                # A row that was inserted meanwhile may belong to the new partition.
                if not is_transient(error) and sqlstate(error) != CHECK_VIOLATION:
                    raise
                yield {}
            else:
                yield {}
                return
        logger.info(
            "housekeeping of %s: a change of partitions would have to wait for other statements; it is tried again in "
            "the next period",
            self._tables[0].quoted,
        )

    def _warn(self, text: str, cause: str | None = None) -> None:
        """Log a warning once for each text, or for each cause."""
        if (cause or text) not in self._warnings:
            self._warnings.add(cause or text)
            logger.warning("housekeeping of %s: %s", self._tables[0].quoted, text)


def _may_change(tables: Mapping[Table, Partitions]) -> bool:
    return all(partitions.may_change for partitions in tables.values())


def _may_drop(tables: Mapping[Table, Partitions]) -> bool:
    return not any(partitions.has_insert_triggers for partitions in tables.values())


def _lost(before: Mapping[Table, Partitions], after: Mapping[Table, Partitions]) -> int:
    """Return the number of days that have a partition before, but not after."""
    days_before, days_after = ({day for table in tables.values() for day in table.days} for tables in (before, after))
    return len(days_before - days_after)
