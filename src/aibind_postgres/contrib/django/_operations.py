"""The operation of the migrations: one file of `sql/`."""

from __future__ import annotations

from typing import Any

from django.db import connections, router
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.operations.base import Operation

from ... import schema
from ..._sql_commands import split_commands
from ..._tables import Table
from ...adapters import is_testing_django
from ._settings import table_names

# The commands that undo a file. Dropping a column drops its indexes. Storage parameters stay: they have no effect on
# older versions.
_UNDO = {
    "0001_tables.sql": "DROP TABLE IF EXISTS {chunks}, {status}, {conversations}",
    "0002_housekeeping.sql": """
ALTER TABLE {status} DROP COLUMN IF EXISTS created_at;
ALTER TABLE {chunks} DROP COLUMN IF EXISTS created_at;
DROP INDEX IF EXISTS {expiry_index}, {active_index}""",
    "0003_conversations.sql": "DROP INDEX IF EXISTS {conversation_expiry_index}",
    "0004_chats.sql": """
ALTER TABLE {status} DROP COLUMN IF EXISTS session_id, DROP COLUMN IF EXISTS owner, DROP COLUMN IF EXISTS metadata,
  DROP COLUMN IF EXISTS ttl_ms, DROP COLUMN IF EXISTS lease_until, DROP COLUMN IF EXISTS wire;
ALTER TABLE {conversations} DROP COLUMN IF EXISTS owner, DROP COLUMN IF EXISTS title, DROP COLUMN IF EXISTS metadata,
  DROP COLUMN IF EXISTS created_at, DROP COLUMN IF EXISTS updated_at""",
    "0005_archive.sql": """
DROP TABLE IF EXISTS {archive};
ALTER TABLE {status} DROP COLUMN IF EXISTS archived_at""",
}


class RunSqlFile(Operation):
    """Run a file of `sql/` with the table names of the setting AIBIND_POSTGRES.

    It does nothing on databases other than PostgreSQL, and on those that a router excludes.
    """

    reduces_to_sql = True
    reversible = True

    def __init__(self, file: str) -> None:
        self.file = file

    def state_forwards(self, app_label: str, state: Any) -> None:
        """Change no model."""

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Run the commands of the file."""
        self._run(app_label, schema_editor, schema._statements_of_file(self.file, *table_names()))

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Undo the file. Its tables or columns are dropped with their data."""
        self._run(app_label, schema_editor, undo(self.file))

    def describe(self) -> str:
        """Return a line for `migrate --plan`."""
        return f"Run sql/{self.file} of aibind_postgres"

    @property
    def migration_name_fragment(self) -> str:
        """The name of the file without its ending."""
        return self.file.partition(".")[0]

    def _run(self, app_label: str, schema_editor: Any, commands: list[str]) -> None:
        connection = schema_editor.connection
        if connection.vendor == "postgresql" and router.allow_migrate(connection.alias, app_label):
            for command in commands:
                schema_editor.execute(command, params=None)


def undo(file: str) -> list[str]:
    """Return the commands that undo a file of `sql/`."""
    chunks, status, conversations = map(Table.parse, table_names())
    text = _UNDO[file].format(
        chunks=chunks.quoted,
        status=status.quoted,
        conversations=conversations.quoted,
        archive=chunks.archive.quoted,
        expiry_index=status.qualify(status.derive("_expires_at_idx")),
        active_index=status.qualify(status.derive("_active_idx")),
        conversation_expiry_index=conversations.qualify(conversations.derive("_expires_at_idx")),
    )
    return split_commands(text)


def create_tables_of_tests(using: str, app_config: Any, plan: Any = None, **_: Any) -> None:
    """Create the tables for tests that run without migrations, such as with `--nomigrations` of pytest-django.

    Django then creates the tables of managed models only.
    """
    connection = connections[using]
    if plan is None or not is_testing_django() or connection.vendor != "postgresql":
        return
    if MigrationLoader.migrations_module(app_config.label)[0] is None and router.allow_migrate(using, app_config.label):
        with connection.cursor() as cursor:
            for file in _UNDO:
                for command in schema._statements_of_file(file, *table_names()):
                    cursor.execute(command)


def empty_tables_of_tests(using: str, plan: Any = None, **_: Any) -> None:
    """Empty the tables with `flush` of a `TransactionTestCase`, which empties the tables of managed models only.

    `flush` sends the signal of `migrate` without a plan. Outside of tests, this does nothing.
    """
    connection = connections[using]
    if plan is not None or not is_testing_django() or connection.vendor != "postgresql":
        return
    chunks, status, conversations = map(Table.parse, table_names())
    quoted = [table.quoted for table in (chunks, status, conversations, chunks.archive)]
    with connection.cursor() as cursor:
        cursor.execute("SELECT name FROM unnest(%s::text[]) AS name WHERE to_regclass(name) IS NOT NULL", [quoted])
        if found := [name for (name,) in cursor.fetchall()]:
            cursor.execute(f"TRUNCATE {', '.join(found)}")
