"""Tables that later tests use again, since creating them takes longer than most tests.

The schema of such tables gets the name of the next test's schema. Something that a test has left running therefore does
not find the tables of another test.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import psycopg
from psycopg import sql

# The versions of the rows that define the objects of a schema. They change if a test changes the definition.
DEFINITION = """
WITH tables AS (SELECT oid, xmin FROM pg_class WHERE relnamespace = {schema}::regnamespace)
SELECT string_agg(concat_ws(' ', kind, id, version), ',' ORDER BY kind, id)
  FROM (SELECT 'tables', oid::text, xmin FROM tables
        UNION ALL SELECT 'columns', concat(attrelid, ' ', attnum), xmin
                    FROM pg_attribute WHERE attrelid IN (SELECT oid FROM tables)
        UNION ALL SELECT 'defaults', oid::text, xmin FROM pg_attrdef WHERE adrelid IN (SELECT oid FROM tables)
        UNION ALL SELECT 'triggers', oid::text, xmin FROM pg_trigger WHERE tgrelid IN (SELECT oid FROM tables)
        UNION ALL SELECT 'policies', oid::text, xmin FROM pg_policy WHERE polrelid IN (SELECT oid FROM tables)
        UNION ALL SELECT 'constraints', oid::text, xmin
                    FROM pg_constraint WHERE connamespace = {schema}::regnamespace
        UNION ALL SELECT 'functions', oid::text, xmin FROM pg_proc WHERE pronamespace = {schema}::regnamespace
        UNION ALL SELECT 'rights', nspacl::text, 1::text::xid FROM pg_namespace WHERE oid = {schema}::regnamespace
       ) AS objects (kind, id, version)
"""

# Partitions are emptied through their table.
TABLES = """
SELECT relname FROM pg_class
 WHERE relnamespace = {schema}::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
"""


class SpareTables:
    """The schemas of earlier tests whose tables are empty and as they were created.

    Args:
        run: Runs SQL and returns a cursor.
    """

    def __init__(self, run: Callable[[Any], psycopg.Cursor[Any]]) -> None:
        self._run = run
        # Schemas with their definitions, by the kind of their tables; renaming does not change a definition.
        self._spare: defaultdict[Hashable, list[tuple[str, str]]] = defaultdict(list)
        self._used: dict[str, tuple[Hashable, str]] = {}  # the kind and the definition, by schema

    def create(self, schema: str, kind: Hashable, definition: str) -> None:
        """Create the tables of a test, or rename a schema with the same tables.

        Args:
            schema: The name of the schema of the tables.
            kind: Equal for tables that differ in nothing but their schema.
            definition: The SQL that creates the tables.
        """
        if not self._remove_empty(schema):  # its other objects belong to this test only
            self._run(definition)
            self._used.pop(schema, None)
            return
        if self._spare[kind]:
            spare, found = self._spare[kind].pop()
            self._run(sql.SQL("ALTER SCHEMA {} RENAME TO {}").format(*map(sql.Identifier, (spare, schema))))
        else:
            self._run(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
            self._run(definition)
            found = self._definition(schema)
        self._used[schema] = (kind, found)

    def release(self, schema: str) -> None:
        """Empty the tables of a schema for a later test, or drop it if its definition has changed."""
        kind, definition = self._used.pop(schema, (None, None))
        if definition is None or definition != self._definition(schema):
            self._run(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
            return
        for (table,) in self._run(sql.SQL(TABLES).format(schema=quoted(schema))).fetchall():
            self._run(sql.SQL("DELETE FROM {}").format(sql.Identifier(schema, table)))
        self._spare[kind].append((schema, definition))

    def _remove_empty(self, schema: str) -> bool:
        try:
            self._run(sql.SQL("DROP SCHEMA {}").format(sql.Identifier(schema)))
        except psycopg.errors.DependentObjectsStillExist:
            return False
        return True

    def _definition(self, schema: str) -> str:
        return str(self._run(sql.SQL(DEFINITION).format(schema=quoted(schema))).fetchall()[0][0])


def quoted(schema: str) -> sql.Literal:
    return sql.Literal(sql.Identifier(schema).as_string())
