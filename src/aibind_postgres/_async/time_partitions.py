"""Create partitions by time ahead, and drop those of days whose streams have expired."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import date
from random import uniform
from typing import TYPE_CHECKING

from .._sqlstate import CHECK_VIOLATION, is_transient, sqlstate
from .._time_partition_sql import create_statement, drop_statement
from .._time_partitions import (
    ATTEMPTS,
    MAX_WAIT,
    PARTITIONS,
    Partitions,
    bounds,
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

logger = logging.getLogger("aibind_postgres")

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
        self._tables = tables
        self._warnings: set[str] = set()

    async def partition_steps(self) -> AsyncIterator[Counts]:
        """Drop the partitions of past days and create those of the next days, each by one statement.

        Yields:
            Counts for the log, after every statement. Nothing if the tables are not partitioned by time.
        """
        before = await self._look_up()
        if not before:
            return
        if not _may_change(before):
            self._warn(
                "this role may not create and drop the partitions of %s, so expired streams are deleted row by row. "
                "Give the housekeeper a store whose role owns the tables, and may create tables in their schema",
                self._tables[0].quoted,
            )
            return
        columns = [table.columns for table in before]
        for day in past_days(before):
            if await self._may_drop(day):
                async for step in self._attempts(drop_statement(self._tables, day, columns)):
                    yield step
        now = await self._look_up()
        if missing := missing_days(now):
            if is_quickly_scanned(now):
                for day in missing:
                    async for step in self._attempts(create_statement(self._tables, day)):
                        yield step
            else:
                self._warn(
                    "the partitions of the next days of %s are not created, since other statements would wait for it: "
                    "there are many streams whose days have no partitions. Call migrate with partitions='time' at a "
                    "quiet time",
                    self._tables[0].quoted,
                )
        after = await self._look_up()
        yield {"partitions dropped": _lost(before, after), "partitions created": _lost(after, before)}

    async def cleanup_steps(self) -> AsyncIterator[Counts]:
        """Delete expired streams, and yield counts after every statement.

        If the partitions are dropped with their streams, only those streams are deleted for which this is too late, and
        those in the DEFAULT partition.
        """
        partitions = await self._look_up()
        if partitions and _may_change(partitions):
            statement = self._schema.statements.cleanup_of_partitions
            wait = round(MAX_WAIT.total_seconds() * 1000)
            searches = [(statement, [0, *span(partitions)]), (statement, [wait, "", ""])]
        else:
            searches = [(self._schema.statements.cleanup, [])]
        for statement, params in searches:
            async for streams, chunks in self._deleter.expired_steps(statement, params):
                yield {"streams deleted": streams, "chunks deleted": chunks}
        async for streams, chunks in self._deleter.tombstone_steps():
            yield {"streams deleted": streams, "chunks deleted": chunks}

    async def _look_up(self) -> list[Partitions]:
        """Return the partitions of the tables, or an empty list if they are not partitioned by time."""
        rows = {row[0]: row for row in await self._database.query(PARTITIONS, [wanted(self._tables)])}
        found = [parse_partitions(rows[table.quoted], table) for table in self._tables if table.quoted in rows]
        return found if len(found) == len(self._tables) else []

    async def _may_drop(self, day: date) -> bool:
        """Return True if so few streams of a day must be kept that the partition can be dropped."""
        [(is_small,)] = await self._database.query(self._schema.statements.surviving, [*bounds(day)])
        return bool(is_small)

    async def _attempts(self, statement: str) -> AsyncIterator[Counts]:
        """Run a statement that gives up soon if it must wait for others. Yield after each attempt."""
        for attempt in range(ATTEMPTS):
            if attempt:
                await self._database.sleep(uniform(0.1, 0.3))
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

    def _warn(self, text: str, *arguments: object) -> None:
        if text not in self._warnings:
            self._warnings.add(text)
            logger.warning("housekeeping of time partitions: " + text, *arguments)


def _may_change(tables: Sequence[Partitions]) -> bool:
    return all(table.may_change for table in tables)


def _lost(before: Sequence[Partitions], after: Sequence[Partitions]) -> int:
    """Return the number of days that have a partition before, but not after."""
    return len(before[0].days - after[0].days) if after else 0
