"""Look up the columns of tables."""

from __future__ import annotations

import psycopg

from .._tables import Table
from ..errors import SchemaError

COLUMNS = """
SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
 WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped
"""


def columns_of(connection: psycopg.Connection, table: Table) -> dict[str, str]:
    """Return the columns of a table with their types; none if it does not exist."""
    return dict(connection.execute(COLUMNS, [table.quoted]).fetchall())


def require_columns(connection: psycopg.Connection, table: Table) -> dict[str, str]:
    """Return the columns of a table with their types.

    Raises:
        SchemaError: The table does not exist.
    """
    columns = columns_of(connection, table)
    if not columns:
        raise SchemaError(
            f"the table {table.quoted} does not exist: create it with `aibind-postgres migrate`, or correct its name"
        )
    return columns


def in_statement(table: Table) -> str:
    """Return a table as SQL text for a statement with parameters of psycopg."""
    return table.quoted.replace("%", "%%")
