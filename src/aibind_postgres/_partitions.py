"""The SQL with which migrations create partitions, and set storage options, which only leaves have. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

from ._tables import ARCHIVE_SUFFIX, CHUNKS_TABLE, STATUS_TABLE, Table, literal
from ._time_partitions import default_partitions, time_leaves

# The argument of the functions that render migrations: a number of partitions by hash, or partitions by time.
PartitionsLike: TypeAlias = int | Literal["time"] | None

MAX_PARTITIONS = 1024

# The SQLSTATE of the error if a table is not partitioned as wanted.
PARTITIONS_DIFFER = "AIB01"

REMEDY = "or move its streams to partitioned tables, as docs/partitions.md describes"

# The statements of a migration that differ for partitioned tables, with the default names: the creation of a table, and
# storage options, which PostgreSQL refuses for a partitioned table.
_STATEMENTS = re.compile(
    rf"^CREATE TABLE IF NOT EXISTS (?P<created>{CHUNKS_TABLE}(?:{ARCHIVE_SUFFIX})?|{STATUS_TABLE}) "
    r"(?P<columns>\(\n.*?\n\));$"
    rf"|^ALTER TABLE (?P<stored>{CHUNKS_TABLE}|{STATUS_TABLE}) SET (?P<options>\([^)]*\));$",
    re.MULTILINE | re.DOTALL,
)

# Only missing leaves are created: others may have names of the user's choice, and may be partitioned themselves.
_HASH_LEAVES = """\
DO {tag}
DECLARE
  parent CONSTANT regclass := {table}::regclass;
  leaves CONSTANT text[] := ARRAY[{leaves}];
  bound text;
BEGIN
  IF coalesce(pg_get_partkeydef(parent), '') !~ '^HASH [(]id[ ,)]' THEN
    RAISE EXCEPTION USING ERRCODE = '{code}', MESSAGE = format(
      'the table %s is not partitioned by hash of its id: omit partitions, {remedy}', parent);
  END IF;
  SELECT pg_get_expr(relpartbound, oid) INTO bound FROM pg_inherits JOIN pg_class ON oid = inhrelid
   WHERE inhparent = parent AND pg_get_expr(relpartbound, oid) NOT LIKE '%(modulus {modulus}, %' LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION USING ERRCODE = '{code}', MESSAGE = format(
      'the table %s has %s hash partitions, not {modulus}: give this number or omit partitions, {remedy}',
      parent, substring(bound FROM 'modulus (\\d+)'));
  END IF;
  FOR number IN 0..{modulus} - 1 LOOP
    IF NOT EXISTS (
      SELECT FROM pg_inherits JOIN pg_class ON oid = inhrelid
       WHERE inhparent = parent AND pg_get_expr(relpartbound, oid) LIKE format('%%, remainder %s)', number)
    ) THEN
      EXECUTE format('CREATE TABLE %s PARTITION OF %s FOR VALUES WITH (MODULUS {modulus}, REMAINDER %s)',
        leaves[number + 1], parent, number);
    END IF;
  END LOOP;
END
{tag};"""

_STORAGE_OPTIONS = """\
DO {tag}
DECLARE
  leaf regclass;
BEGIN
  FOR leaf IN
    SELECT oid FROM pg_class
     WHERE relkind = 'r' AND (oid = {table}::regclass OR oid IN (SELECT relid FROM pg_partition_tree({table})))
  LOOP
    EXECUTE format('ALTER TABLE %s SET {options}', leaf);
  END LOOP;
END
{tag};"""


def check_partitions(partitions: object, tables: Sequence[Table]) -> None:
    """Check the argument `partitions` of the functions that render migrations.

    Args:
        partitions: The argument.
        tables: The chunks table, the status table and others.

    Raises:
        ValueError: It is below 1 or above 1,024, or a partition would have the name of a table.
        TypeError: It is neither an int, nor "time", nor None.
    """
    if partitions is None:
        return
    if partitions == "time":
        _check_names(tables, default_partitions)
        return
    if not isinstance(partitions, int) or isinstance(partitions, bool):
        raise TypeError(f"partitions must be an int, 'time' or None, not {type(partitions).__name__}")
    if not 1 <= partitions <= MAX_PARTITIONS:
        raise ValueError(f"partitions must be from 1 to {MAX_PARTITIONS}, not {partitions}")
    number = partitions
    _check_names(tables, lambda table: leaves(table, number))


def _check_names(tables: Sequence[Table], leaves_of: Callable[[Table], Sequence[Table]]) -> None:
    for table in tables[:2]:
        for leaf in leaves_of(table):
            if leaf in tables:
                raise ValueError(f"the table name {leaf.quoted} is that of a partition of {table.quoted}")


def fill_names(
    sql: str, tables: Mapping[str, Table], partitions: PartitionsLike, fill_others: Callable[[str], str]
) -> str:
    """Return a migration for given tables.

    Args:
        sql: The migration, with the default table names.
        tables: The tables by their default names.
        partitions: The number of hash partitions that the migration creates, "time" for partitions by time, or None
            for tables without partitions.
        fill_others: Fills the names into the statements that are the same for partitioned tables.
    """
    pieces, end = [], 0
    for match in _STATEMENTS.finditer(sql):
        pieces += [fill_others(sql[end : match.start()])]
        end = match.end()
        if match["stored"]:
            pieces += [_storage_options(tables[match["stored"]], match["options"])]
        elif partitions == "time":
            pieces += [_create_by_time(tables, match["created"], match["columns"])]
        elif partitions is None or match["created"] not in tables:
            pieces += [fill_others(match[0])]
        else:
            table = tables[match["created"]]
            create = f"CREATE TABLE IF NOT EXISTS {table.quoted} {match['columns']} PARTITION BY HASH (id);"
            pieces += [f"{create}\n\n{_hash_leaves(table, partitions)}"]
    return "".join([*pieces, fill_others(sql[end:])])


def leaves(table: Table, partitions: int) -> list[Table]:
    """Return the partitions by hash that a migration creates, by their remainders."""
    return [table._replace(name=table.derive(f"_p{number}")) for number in range(partitions)]


def is_partitioned(table: Table, partitions: int | Literal["time"]) -> str:
    """Return the SQL condition that a table has this number of partitions, or DEFAULT of partitions by time."""
    if partitions == "time":
        return f"to_regclass({literal(default_partitions(table)[-1].quoted)}) IS NOT NULL"
    return f"(SELECT count(*) FROM pg_inherits WHERE inhparent = to_regclass({literal(table.quoted)})) = {partitions}"


def unused_tag(tag: str, text: str) -> str:
    """Return the dollar quote `tag`, made longer until it does not occur in the quoted text."""
    while tag in text:
        tag = f"{tag[:-1]}_$"
    return tag


def _create_by_time(tables: Mapping[str, Table], name: str, columns: str) -> str:
    status, chunks = tables[STATUS_TABLE], tables[CHUNKS_TABLE]
    table = tables.get(name, chunks.archive)
    columns = re.sub(r"^(  id +TEXT)\b", r'\1 COLLATE "C"', columns, flags=re.MULTILINE)
    # The leaves of the archive get its foreign key: that of the table would be checked whenever a partition is dropped.
    columns = re.sub(r" REFERENCES .*?(?=,$)", "", columns, flags=re.MULTILINE)
    create = f"CREATE TABLE IF NOT EXISTS {table.quoted} {columns} PARTITION BY RANGE (id);"
    tag = unused_tag("$partitions$", literal(table.quoted))
    leaves = time_leaves(table, status if table == chunks.archive else None, tag, PARTITIONS_DIFFER, REMEDY)
    return f"{create}\n\n{leaves}"


def _hash_leaves(table: Table, partitions: int) -> str:
    return _fill(
        _HASH_LEAVES,
        "$partitions$",
        table=literal(table.quoted),
        leaves=", ".join(literal(leaf.quoted) for leaf in leaves(table, partitions)),
        modulus=str(partitions),
        code=PARTITIONS_DIFFER,
        remedy=REMEDY,
    )


def _storage_options(table: Table, options: str) -> str:
    return _fill(_STORAGE_OPTIONS, "$options$", table=literal(table.quoted), options=options)


def _fill(block: str, tag: str, **values: str) -> str:
    return block.format(tag=unused_tag(tag, "".join(values.values())), **values)
