"""Partitions by time: their names and bounds, which to create and which to drop, and the SQL for it. Pure.

Ids that `new_id` makes begin with their time, so that the streams of a day are a range of ids. Each day in UTC has a
partition of each table. Dropping it deletes the streams of a day in the time of a statement. A day is long enough that
a month of streams has 30 partitions, and short enough that an expired stream occupies its space for one day more.

All other ids are in the DEFAULT partition. Attaching a partition scans DEFAULT under an exclusive lock, since its rows
could belong to the new partition. Therefore DEFAULT has partitions of its own:

- One for the ids that begin with a time, of which it holds those of days without a partition. It stays small.
- One for all others, which may be many. A constraint states that it has none of the former, so it is not scanned.

The bounds are texts, and compare as the times do in the collation "C". A random UUID falls into the range of a day with
a probability of 1 to 3 million, and is then a stream of that day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from datetime import date, datetime, timedelta, timezone
from typing import Any, NamedTuple

from ._tables import Table, literal

# The times that ids are expected to begin with. Of random UUIDs, 1 of 450 falls into this range.
FIRST_DAY, END_DAY = date(2026, 1, 1), date(2046, 1, 1)

# Days for which partitions are created ahead. The clock of a process may run ahead, and housekeeping may fail for days.
AHEAD = 7

# Time after the end of a day before its partition is dropped, since clocks may be slow.
DELAY = timedelta(hours=1)

# Time for which an expired stream waits for its partition to be dropped. The last stream of a day expires one day after
# the first one, if they are kept for the same time. After that, it is deleted by itself.
MAX_WAIT = timedelta(days=3)

# The most that a statement moves, under a lock that stops all others: it takes up to 20 ms.
MAX_MOVED_STREAMS, MAX_MOVED_CHUNKS, MAX_MOVED_PAGES = 100, 2000, 50

# Size up to which the part of DEFAULT for ids with a time is scanned under a lock: it takes up to 20 ms.
MAX_SCANNED = 8 << 20  # bytes

# A statement that waits for a lock stops all later ones, so it waits for a short time, several times. Once it has the
# first one, it waits even less for the others.
FIRST_LOCK_TIMEOUT, LOCK_TIMEOUT = "20ms", "5ms"
ATTEMPTS = 10  # in each turn of housekeeping

# The partitions of the tables in the JSON array $1, if they are partitioned by time. The bits 7 of tgtype mean BEFORE
# INSERT FOR EACH ROW. Since PostgreSQL 16, giving a partition to the owner of the table needs SET.
PARTITIONS = """
SELECT wanted.name, (extract(epoch FROM statement_timestamp()) * 1000)::bigint AS now,
       pg_has_role(relowner, 'USAGE')
         AND pg_has_role(relowner, CASE WHEN current_setting('server_version_num')::integer < 160000 THEN 'USAGE'
                                   ELSE 'SET' END)
         AND has_schema_privilege(relnamespace, 'CREATE') AS may_change,
       pg_relation_size(to_regclass(wanted.scanned)) AS default_bytes,
       (SELECT json_agg(leaf.relname) FROM pg_inherits JOIN pg_class AS leaf ON leaf.oid = inhrelid
         WHERE inhparent = parent.oid)::text AS partitions,
       (SELECT json_agg(quote_ident(attname) ORDER BY attnum) FROM pg_attribute
         WHERE attrelid = parent.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = '')::text AS columns,
       EXISTS (SELECT FROM pg_trigger WHERE tgrelid IN (parent.oid, to_regclass(wanted.scanned))
                AND tgenabled <> 'D' AND NOT tgisinternal AND tgtype & 7 = 7) AS has_insert_triggers
  FROM json_to_recordset($1::text::json) AS wanted (name text, scanned text), pg_class AS parent
 WHERE parent.oid = to_regclass(wanted.name) AND parent.relkind = 'p' AND to_regclass(wanted.scanned) IS NOT NULL
"""

_LEAVES = """\
DO {tag}
BEGIN
  IF coalesce(pg_get_partkeydef({literal}::regclass), '') <> 'RANGE (id)' OR NOT EXISTS (
    SELECT FROM pg_attribute
     WHERE attrelid = {literal}::regclass AND attname = 'id' AND attcollation = 'pg_catalog."C"'::regcollation
  ) THEN
    RAISE EXCEPTION USING ERRCODE = '{code}', MESSAGE = format(
      'the table %s is not partitioned by time: omit partitions, {remedy}', {literal}::regclass);
  END IF;
END
{tag};

CREATE TABLE IF NOT EXISTS {default} PARTITION OF {table} DEFAULT PARTITION BY RANGE (id);

CREATE TABLE IF NOT EXISTS {dated} PARTITION OF {default}{key} FOR VALUES FROM ('{first}') TO ('{end}');

CREATE TABLE IF NOT EXISTS {other} PARTITION OF {default} (CHECK (id < '{first}' OR id >= '{end}'){other_key})
DEFAULT;"""

# Of the archive: the row of the stream is in the partition of the same range.
FOREIGN_KEY = "FOREIGN KEY (id) REFERENCES {table} (id) ON DELETE CASCADE"


class Partitions(NamedTuple):
    """The partitions of a table.

    Attributes:
        now: The time of the server in milliseconds since the epoch.
        may_change: Whether the role of the connection may create and drop partitions.
        default_bytes: The size of the part of DEFAULT that is scanned when a partition is attached.
        days: The days that have a partition.
        columns: The names of the columns, quoted.
        has_insert_triggers: Whether triggers of others could change or discard rows that move to DEFAULT.
    """

    now: int
    may_change: bool
    default_bytes: int
    days: frozenset[date]
    columns: tuple[str, ...]
    has_insert_triggers: bool


def bound(day: date) -> str:
    """Return the beginning of the ids of a day: the first 48 bits of a UUID, which are its time in milliseconds."""
    text = f"{round(_start(day).timestamp() * 1000):012x}"
    return f"{text[:8]}-{text[8:]}"


def bounds(day: date) -> tuple[str, str]:
    """Return the beginning of the ids of a day, and of those of the next day."""
    return bound(day), bound(day + timedelta(days=1))


def partition(table: Table, day: date) -> Table:
    """Return the partition of a table for a day, whose name ends with the day: `aibind_stream_chunks_20261130`."""
    return table._replace(name=table.derive(f"_{day:%Y%m%d}"))


def default_partitions(table: Table) -> tuple[Table, Table, Table]:
    """Return the DEFAULT partition of a table, and its partitions: for ids that begin with a time, and for others."""
    default, dated, other = (table.derive(suffix) for suffix in ("_default", "_default_time", "_default_other"))
    return table._replace(name=default), table._replace(name=dated), table._replace(name=other)


def wanted(tables: Iterable[Table]) -> str:
    """Return the parameter of PARTITIONS."""
    return json.dumps([{"name": table.quoted, "scanned": default_partitions(table)[1].quoted} for table in tables])


def parse_partitions(row: Sequence[Any], table: Table) -> Partitions:
    """Return the partitions of a table from its row of PARTITIONS."""
    _, now, may_change, default_bytes, names, columns, has_insert_triggers = row
    found = (re.search(r"_(\d{8})$", name) for name in json.loads(names or "[]"))
    days = {_parse_day(match[1]) for match in found if match}
    named = {day for day in days if day and partition(table, day).name in json.loads(names)}
    columns = tuple(json.loads(columns))
    return Partitions(now, may_change, default_bytes, frozenset(named), columns, has_insert_triggers)


def days_ahead(today: date) -> list[date]:
    """Return the days that should have partitions: today and the next ones."""
    days = [today + timedelta(days=number) for number in range(AHEAD + 1)]
    return [day for day in days if FIRST_DAY <= day < END_DAY]


def missing_days(tables: Collection[Partitions]) -> list[date]:
    """Return the days for which partitions should be created: today and the next ones.

    Days of which one table has a partition are left alone.
    """
    present = frozenset[date]().union(*(table.days for table in tables))
    return [day for day in days_ahead(_now(tables).date()) if day not in present]


def overdue_days(tables: Collection[Partitions]) -> list[date]:
    """Return the missing days except the last one, which is missing from midnight to the next turn of housekeeping."""
    earlier = days_ahead(_now(tables).date())[:-1]
    return [day for day in missing_days(tables) if day in earlier]


def past_days(tables: Collection[Partitions]) -> list[date]:
    """Return the past days of which each table has a partition, the oldest first. They may be dropped."""
    now = _now(tables)
    present = frozenset.intersection(*(table.days for table in tables))
    return sorted(day for day in present if _start(day + timedelta(days=1)) + DELAY <= now)


def span(tables: Collection[Partitions]) -> tuple[str, str]:
    """Return the bounds of all days that have partitions: empty texts if there are none."""
    present = frozenset[date]().union(*(table.days for table in tables))
    return (bound(min(present)), bound(max(present) + timedelta(days=1))) if present else ("", "")


def is_quickly_scanned(tables: Iterable[Partitions]) -> bool:
    """Return True if partitions may be attached while the tables are in use."""
    return sum(table.default_bytes for table in tables) <= MAX_SCANNED


def time_leaves(table: Table, referenced: Table | None, tag: str, code: str, remedy: str) -> str:
    """Return the statements that check a table, and create its DEFAULT partition.

    Args:
        table: A table that exists.
        referenced: The status table if this is the archive, else None.
        tag: A dollar quote that does not occur in its name.
        code: The SQLSTATE of the error if it is not partitioned by time.
        remedy: The end of the text of this error.
    """
    default, dated, other = default_partitions(table)
    key = other_key = ""
    if referenced is not None:
        _, dated_status, other_status = default_partitions(referenced)
        key = f" ({FOREIGN_KEY.format(table=dated_status.quoted)})"
        other_key = f", {FOREIGN_KEY.format(table=other_status.quoted)}"
    return _LEAVES.format(
        key=key,
        other_key=other_key,
        tag=tag,
        literal=literal(table.quoted),
        table=table.quoted,
        default=default.quoted,
        dated=dated.quoted,
        other=other.quoted,
        first=bound(FIRST_DAY),
        end=bound(END_DAY),
        code=code,
        remedy=remedy,
    )


def _parse_day(text: str) -> date | None:
    try:
        return datetime.strptime(text, "%Y%m%d").date()
    except ValueError:
        return None


def _start(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=timezone.utc)


def _now(tables: Collection[Partitions]) -> datetime:
    return datetime.fromtimestamp(max(table.now for table in tables) / 1000, timezone.utc)
