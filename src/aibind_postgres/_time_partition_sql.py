"""The SQL that creates, attaches, detaches and drops partitions by time. Pure.

Each step is one transaction. Statements of other sessions wait for its locks, and then find the new partitions and the
moved rows. A process that dies during a step leaves nothing to repair.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from ._partitions import unused_tag
from ._tables import Table, literal
from ._time_partitions import (
    FIRST_LOCK_TIMEOUT,
    FOREIGN_KEY,
    LOCK_TIMEOUT,
    MAX_MOVED_CHUNKS,
    MAX_MOVED_PAGES,
    MAX_MOVED_STREAMS,
    bounds,
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
SELECT (SELECT count(*) FROM kept) <= {limit}"""

# Chunks above total_chunks are left over from another stream. The planner must reach each stream by the index.
_OF_STREAM = "SELECT {columns} FROM {table} WHERE id = kept.id AND {number} <= kept.total_chunks"
_AND_IS_SMALL = """
       AND (SELECT count(*)
              FROM (SELECT FROM kept, LATERAL ({rows} LIMIT {limit} + 1) AS a LIMIT {limit} + 1) AS b) <= {limit}"""

# With another isolation level, the snapshot is older than the locks, and rows would be lost. Row security must not hide
# rows either: an error is better. Statistics from the time in which all streams were active, or the compilation of a
# short statement, must not extend the time of the lock.
_BEGIN = """\
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION USING ERRCODE = 'feature_not_supported', MESSAGE =
      'partitions by time need the isolation level read committed: set default_transaction_isolation of this role';
  END IF;
  PERFORM set_config('row_security', 'off', true), set_config('lock_timeout', '{first}', true),
          set_config('enable_seqscan', 'off', true), set_config('jit', 'off', true);
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
  columns text;
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
{attached}{key}  END IF;
END"""

_STRAYS = "SELECT FROM {table} WHERE id >= '{first}' AND id < '{end}'"

# Generated columns accept no values. `migrate` does not know the other ones before.
_MOVE_STRAYS = """\
      SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) INTO columns FROM pg_attribute
       WHERE attrelid = {name}::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = '';
      EXECUTE format({move}, columns);
"""

_MOVE_COLUMNS = (
    "WITH stray AS (DELETE FROM {table} WHERE id >= '{first}' AND id < '{end}' RETURNING *) "
    "INSERT INTO {partition} (%1$s) OVERRIDING SYSTEM VALUE SELECT %1$s FROM stray"
)

_IS_ATTACHED = (
    "EXISTS (SELECT FROM pg_inherits WHERE inhparent = {table}::regclass AND inhrelid = to_regclass({partition}))"
)

# A trigger or a rule that discards a row must not lose it: the error undoes the whole step.
_MOVE = """\
  WITH {kept}moved AS MATERIALIZED (
{rows}
  ), inserted AS (
    INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT * FROM moved RETURNING 1
  )
  SELECT (SELECT count(*) FROM moved) = (SELECT count(*) FROM inserted) INTO aibind_has_all;
  IF NOT aibind_has_all THEN
    RAISE EXCEPTION USING ERRCODE = 'triggered_action_exception', MESSAGE =
      'a trigger or a rule discards rows that must be kept';
  END IF;
"""

_KEPT = """\
kept AS MATERIALIZED (
{survivors}
  ), """

_OF_KEPT = "SELECT moved.* FROM kept, LATERAL ({rows} OFFSET 0) AS moved"

# The tables after the status table: the column that numbers their chunks, and how many rows may be moved.
_NUMBERS = ("seq", "first_seq")
_LIMITS = (MAX_MOVED_CHUNKS, MAX_MOVED_PAGES)


def create_partitions(tables: Sequence[Table], day: date, *, in_use: bool) -> str:
    """Return the PL/pgSQL block that creates the partitions of a day, unless one of them exists.

    Args:
        tables: The status table, the chunks table and, with migration 0005, the archive table.
        day: The day.
        in_use: Whether to do nothing if more rows would have to be moved than other statements may wait for.
    """
    first, end = bounds(day)
    made = [(table, partition(table, day)) for table in tables]
    conditions = [f"to_regclass({literal(leaf.quoted)}) IS NULL" for _, leaf in made]
    strays = [_STRAYS.format(table=table.quoted, first=first, end=end) for table in tables]
    if in_use:
        limits = zip(strays, (MAX_MOVED_STREAMS, *_LIMITS), strict=False)
        conditions += [
            f"(SELECT count(*) FROM ({select} LIMIT {limit + 1}) AS stray) <= {limit}" for select, limit in limits
        ]

    def values(models: Sequence[Table]) -> str:
        pairs = zip(made, models, strict=True)
        return ", ".join(f"({literal(leaf.quoted)}, {literal(model.quoted)})" for (_, leaf), model in pairs)

    return _CREATE.format(
        is_missing="\n     AND ".join(conditions),
        created="".join(
            f"    CREATE TABLE {leaf.quoted} (LIKE {table.quoted} INCLUDING ALL EXCLUDING IDENTITY);\n"
            for table, leaf in made
        ),
        parents=values(tables),
        models=values([default_partitions(table)[1] for table in tables]),
        has_strays=" OR ".join(f"EXISTS ({select})" for select in strays),
        lock=_lock(tables, in_use=in_use),
        moved="".join(
            _MOVE_STRAYS.format(name=literal(table.quoted), move=literal(_move_columns(table, leaf, first, end)))
            for table, leaf in reversed(made)
        ),
        attached="".join(
            f"    ALTER TABLE {table.quoted} ATTACH PARTITION {leaf.quoted} FOR VALUES FROM ('{first}') TO ('{end}');\n"
            for table, leaf in made
        ),
        key="".join(
            f"    ALTER TABLE {leaf.quoted} ADD {FOREIGN_KEY.format(table=made[0][1].quoted)};\n"
            for _, leaf in made[2:]
        ),
    )


def create_statement(tables: Sequence[Table], day: date) -> str:
    """Return the statement that creates the partitions of a day while the tables are in use, as above."""
    return _as_statement(_begin(tables) + create_partitions(tables, day, in_use=True) + ";\n")


def drop_statement(tables: Sequence[Table], day: date, columns: Sequence[Sequence[str]]) -> str:
    """Return the statement that moves the survivors of a day to DEFAULT, and drops its partitions.

    It does nothing if a partition is missing, or if there are too many survivors. It raises if not all of them arrive.

    Args:
        tables: The status table, the chunks table and, with migration 0005, the archive table.
        day: The day.
        columns: The columns of each table, quoted.
    """
    status, *others = tables
    status_leaf, *other_leaves = leaves = [partition(table, day) for table in tables]
    status_columns, *other_columns = (", ".join(names) for names in columns)
    attached = [
        _IS_ATTACHED.format(table=literal(table.quoted), partition=literal(leaf.quoted))
        for table, leaf in zip(tables, leaves, strict=True)
    ]
    moves = [
        _MOVE.format(
            kept=_KEPT.format(survivors=_survivors("id, total_chunks", status_leaf)),
            table=table.quoted,
            columns=names,
            rows=_OF_KEPT.format(rows=_OF_STREAM.format(columns=names, table=leaf.quoted, number=number)),
        )
        for table, leaf, names, number in zip(others, other_leaves, other_columns, _NUMBERS, strict=False)
    ]
    steps = [
        f"  IF NOT ({' AND '.join(attached)}) THEN RETURN; END IF;\n",
        f"  IF NOT (\n{_is_small(leaves)}\n  ) THEN RETURN; END IF;\n",
        *(
            f"  ALTER TABLE {table.quoted} DETACH PARTITION {leaf.quoted};\n"
            for table, leaf in zip(tables, leaves, strict=True)
        ),
        _MOVE.format(
            kept="",
            table=status.quoted,
            columns=status_columns,
            rows=_survivors(status_columns, status_leaf),
        ),
        *moves,
        f"  DROP TABLE {', '.join(leaf.quoted for leaf in reversed(leaves))};\n",
    ]
    body = "".join([_begin(tables), _lock(tables, in_use=True), *steps])
    return _as_statement(f"DECLARE\n  aibind_has_all boolean;\nBEGIN\n{body}END;\n")


def may_drop_statement(tables: Sequence[Table], day: date) -> str:
    """Return the query whether so few streams of a day must be kept that `drop_statement` drops its partitions."""
    first, end = bounds(day)
    return _is_small(tables, f"id >= '{first}' AND id < '{end}' AND ")


def _move_columns(table: Table, leaf: Table, first: str, end: str) -> str:
    """Return the argument of format() that becomes the statement which moves the rows of a day to their partition."""
    names = {"table": table.quoted.replace("%", "%%"), "partition": leaf.quoted.replace("%", "%%")}
    return _MOVE_COLUMNS.format(first=first, end=end, **names)


def _survivors(columns: str, table: Table, range: str = "", limit: str = "") -> str:
    return _SURVIVORS.format(columns=columns, table=table.quoted, now=NOW, range=range, limit=limit)


def _is_small(tables: Sequence[Table], range: str = "") -> str:
    status, *others = tables
    survivors = _survivors("id, total_chunks", status, range, f" LIMIT {MAX_MOVED_STREAMS} + 1")
    parts = [
        _AND_IS_SMALL.format(rows=_OF_STREAM.format(columns="", table=table.quoted, number=number), limit=limit)
        for table, number, limit in zip(others, _NUMBERS, _LIMITS, strict=False)
    ]
    return "".join([_IS_SMALL.format(survivors=survivors, limit=MAX_MOVED_STREAMS), *parts])


def _begin(tables: Sequence[Table]) -> str:
    return _BEGIN.format(first=FIRST_LOCK_TIMEOUT, status=literal(tables[0].quoted))


def _lock(tables: Sequence[Table], *, in_use: bool) -> str:
    first, *others = (table.quoted for table in tables)
    shortened = f"  PERFORM set_config('lock_timeout', '{LOCK_TIMEOUT}', true);\n" if in_use else ""
    return _LOCK.format(first=first, others=", ONLY ".join(others), shortened=shortened)


def _as_statement(body: str) -> str:
    tag = unused_tag("$partitions$", body)
    return f"DO {tag}\nBEGIN\n{body}END\n{tag}"
