"""The SQL that creates, attaches, detaches and drops partitions by time. Pure.

Each step is one transaction. Statements of other sessions wait for its locks, and then find the new partitions and the
moved rows. A process that dies during a step leaves nothing to repair.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta

from ._partitions import unused_tag
from ._tables import Table, literal
from ._time_partitions import (
    FIRST_LOCK_TIMEOUT,
    LOCK_TIMEOUT,
    MAX_MOVED_CHUNKS,
    MAX_MOVED_STREAMS,
    bound,
    default_partitions,
    partition,
)

NOW = "(extract(epoch FROM statement_timestamp()) * 1000)::bigint"

# The rows of streams that must be kept: those that are active or have not expired. Rows in state "deleted" are
# tombstones; the chunks for which they stand are in the same partition. The two parts use the indexes on the state,
# also without statistics.
_SURVIVORS = """\
(SELECT {columns} FROM {table} WHERE {range}state = 'active'{limit})
UNION ALL
(SELECT {columns} FROM {table} WHERE {range}state <> 'active' AND state <> 'deleted' AND expires_at > {now}{limit})"""

# Whether so few rows must be kept that they may be moved under a lock that stops all other statements.
_IS_SMALL = """\
WITH kept AS MATERIALIZED (
{survivors}
)
SELECT (SELECT count(*) FROM kept) <= {max_streams}
       AND (SELECT count(*)
              FROM (SELECT FROM kept, LATERAL (
                        SELECT FROM {chunks} WHERE id = kept.id AND seq <= kept.total_chunks LIMIT {max_chunks} + 1
                    ) AS moved
                     LIMIT {max_chunks} + 1) AS moved) <= {max_chunks} AS is_small"""


def _survivors(columns: str, table: str, now: str, range: str = "", limit: str = "") -> str:
    return _SURVIVORS.format(columns=columns, table=table, now=now, range=range, limit=limit)


def _is_small(status: str, chunks: str, now: str, range: str = "") -> str:
    survivors = _survivors("id, total_chunks", status, now, range, f" LIMIT {MAX_MOVED_STREAMS} + 1")
    limits = {"max_streams": str(MAX_MOVED_STREAMS), "max_chunks": str(MAX_MOVED_CHUNKS)}
    return _IS_SMALL.format(survivors=survivors, chunks=chunks, **limits)


# The same for the streams with ids from $1 to $2.
SURVIVING = "\n" + _is_small("{status}", "{chunks}", "{now}", "id >= $1::text AND id < $2::text AND ")

# With another isolation level, the snapshot is older than the locks, and rows would be lost. Row security must not hide
# rows either: an error is better.
_BEGIN = """\
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION USING ERRCODE = 'feature_not_supported', MESSAGE =
      'partitions by time need the isolation level read committed: set default_transaction_isolation of this role';
  END IF;
  PERFORM set_config('row_security', 'off', true), set_config('lock_timeout', '{first}', true);
  IF NOT pg_try_advisory_xact_lock(
    hashtext('aibind_postgres.time_partitions'), {status}::regclass::oid::integer
  ) THEN
    RAISE EXCEPTION USING ERRCODE = 'lock_not_available', MESSAGE = 'another process changes the partitions';
  END IF;
"""

# All later statements wait for a statement that waits for this lock. With it, no other statement can hold the tables,
# unless it names a partition.
_LOCK = """\
  LOCK TABLE ONLY {first} IN ACCESS EXCLUSIVE MODE;
{shortened}  LOCK TABLE ONLY {others} IN ACCESS EXCLUSIVE MODE;
"""

# Ids whose time comes later, or came before the partition, are in DEFAULT. They move, since the partition could not be
# attached beside them. LIKE does not copy the owner and the storage options.
_CREATE = """\
DECLARE
  command text;
BEGIN
  IF {is_missing} THEN
{created}    FOR command IN
      SELECT format('ALTER TABLE %s OWNER TO %s', made.name, relowner::regrole)
        FROM (VALUES {parents}) AS made (name, model), pg_class WHERE oid = model::regclass
       UNION ALL
      SELECT format('ALTER TABLE %s SET (%s)', made.name, array_to_string(reloptions, ', '))
        FROM (VALUES {models}) AS made (name, model), pg_class
       WHERE oid = model::regclass AND reloptions IS NOT NULL
    LOOP
      EXECUTE command;
    END LOOP;
    IF {has_strays} THEN
{lock}{moved}    END IF;
{attached}  END IF;
END"""

_STRAYS = "SELECT FROM {table} WHERE id >= '{first}' AND id < '{end}'"

_MOVE_STRAYS = """\
      WITH stray AS (DELETE FROM {table} WHERE id >= '{first}' AND id < '{end}' RETURNING *)
      INSERT INTO {partition} SELECT * FROM stray;
"""

_IS_ATTACHED = (
    "EXISTS (SELECT FROM pg_inherits WHERE inhparent = {table}::regclass AND inhrelid = to_regclass({partition}))"
)

# Chunks above total_chunks are left over from another stream. The planner must reach each stream by the index.
_MOVE_CHUNKS = """\
  WITH kept AS MATERIALIZED (
{survivors}
  )
  INSERT INTO {table} ({columns})
  SELECT moved.* FROM kept, LATERAL (
    SELECT {columns} FROM {partition} WHERE id = kept.id AND seq <= kept.total_chunks OFFSET 0
  ) AS moved;
"""


def create_partitions(tables: Sequence[Table], day: date, *, in_use: bool) -> str:
    """Return the PL/pgSQL block that creates the partitions of a day, unless one of them exists.

    Args:
        tables: The status table and the chunks table.
        day: The day.
        in_use: Whether to do nothing if more rows would have to be moved than other statements may wait for.
    """
    first, end = bound(day), bound(day + timedelta(days=1))
    made = [(table, partition(table, day)) for table in tables]
    conditions = [f"to_regclass({literal(leaf.quoted)}) IS NULL" for _, leaf in made]
    strays = [_STRAYS.format(table=table.quoted, first=first, end=end) for table in tables]
    if in_use:
        limits = zip(strays, (MAX_MOVED_STREAMS, MAX_MOVED_CHUNKS), strict=True)
        conditions += [
            f"(SELECT count(*) FROM ({select} LIMIT {limit + 1}) AS stray) <= {limit}" for select, limit in limits
        ]

    def values(models: Sequence[Table]) -> str:
        pairs = zip(made, models, strict=True)
        return ", ".join(f"({literal(leaf.quoted)}, {literal(model.quoted)})" for (_, leaf), model in pairs)

    return _CREATE.format(
        is_missing="\n     AND ".join(conditions),
        created="".join(
            f"    CREATE TABLE {leaf.quoted} (LIKE {table.quoted} INCLUDING ALL);\n" for table, leaf in made
        ),
        parents=values(tables),
        models=values([default_partitions(table)[1] for table in tables]),
        has_strays=" OR ".join(f"EXISTS ({select})" for select in strays),
        lock=_lock(tables, in_use=in_use),
        moved="".join(
            _MOVE_STRAYS.format(table=table.quoted, partition=leaf.quoted, first=first, end=end)
            for table, leaf in reversed(made)
        ),
        attached="".join(
            f"    ALTER TABLE {table.quoted} ATTACH PARTITION {leaf.quoted} FOR VALUES FROM ('{first}') TO ('{end}');\n"
            for table, leaf in made
        ),
    )


def create_statement(tables: Sequence[Table], day: date) -> str:
    """Return the statement that creates the partitions of a day while the tables are in use, as above."""
    return _as_statement(_begin(tables) + create_partitions(tables, day, in_use=True) + ";\n")


def drop_statement(tables: Sequence[Table], day: date, columns: Sequence[Sequence[str]]) -> str:
    """Return the statement that moves the survivors of a day to DEFAULT, and drops its partitions.

    It does nothing if a partition is missing, or if there are too many survivors.

    Args:
        tables: The status table and the chunks table.
        day: The day.
        columns: The columns of each table, quoted.
    """
    status, chunks = tables
    leaves = [partition(table, day) for table in tables]
    status_leaf, chunks_leaf = leaves
    attached = [
        _IS_ATTACHED.format(table=literal(table.quoted), partition=literal(leaf.quoted))
        for table, leaf in zip(tables, leaves, strict=True)
    ]
    names, chunk_names = (", ".join(of_table) for of_table in columns)
    move_chunks = _MOVE_CHUNKS.format(
        survivors=_survivors("id, total_chunks", status_leaf.quoted, NOW),
        table=chunks.quoted,
        columns=chunk_names,
        partition=chunks_leaf.quoted,
    )
    steps = [
        f"  IF NOT ({' AND '.join(attached)}) THEN RETURN; END IF;\n",
        f"  IF NOT (\n{_is_small(status_leaf.quoted, chunks_leaf.quoted, NOW)}\n  ) THEN RETURN; END IF;\n",
        *(
            f"  ALTER TABLE {table.quoted} DETACH PARTITION {leaf.quoted};\n"
            for table, leaf in zip(tables, leaves, strict=True)
        ),
        f"  INSERT INTO {status.quoted} ({names})\n{_survivors(names, status_leaf.quoted, NOW)};\n",
        move_chunks,
        f"  DROP TABLE {', '.join(leaf.quoted for leaf in reversed(leaves))};\n",
    ]
    return _as_statement(_begin(tables) + _lock(tables, in_use=True) + "".join(steps))


def _begin(tables: Sequence[Table]) -> str:
    return _BEGIN.format(first=FIRST_LOCK_TIMEOUT, status=literal(tables[0].quoted))


def _lock(tables: Sequence[Table], *, in_use: bool) -> str:
    first, *others = (table.quoted for table in tables)
    shortened = f"  PERFORM set_config('lock_timeout', '{LOCK_TIMEOUT}', true);\n" if in_use else ""
    return _LOCK.format(first=first, others=", ONLY ".join(others), shortened=shortened)


def _as_statement(body: str) -> str:
    tag = unused_tag("$partitions$", body)
    return f"DO {tag}\nBEGIN\n{body}END\n{tag}"
