"""The role with the minimal grants that docs/doctor.md lists.

With the variable `AIBIND_TEST_ROLE`, the stores of the tests connect as such a role, whose name begins with its value.
The fixture `admin_dsn` still leads to the database as the user of the server, for everything else that a test does.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from aibind_postgres._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, Table
from support.skips import skip_named

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"
ARCHIVE_TABLE = f"{CHUNKS_TABLE}_archive"
NAME = os.environ.get("AIBIND_TEST_ROLE")

# The tests that are skipped, by the reason: files, functions, or a single variant of a function.
EXCLUDED = {
    "partitions by time need the owner of the tables": ["test_time_partitions"],
    "the test creates a role or tables of its own": [
        "test_abandoned_streams",
        "test_archiving::test_batch_that_another_archiver_has_moved",
        "test_archiving::test_role_without_privileges_appends_to_a_stream_that_is_not_archived",
        "test_archiving::test_role_without_privileges_on_the_archive",
        "test_archiving::test_stream_whose_chunks_cannot_be_moved",
        "test_caller_settings",
        "test_check::test_check_names_missing_tables",
        "test_check::test_check_of_a_role_without_rights",
        "test_conversation_details::test_active_stream_without_the_right_to_read_it",
        "test_leases::test_acquire_by_a_role_that_may_not_end_streams",
        "test_leases::test_acquire_in_a_transaction_of_the_caller_ends_no_other_stream",
        "test_leases::test_reader_that_may_not_write_keeps_waiting",
        "test_refused_listening::test_refused_listen_connection_is_reported_once",
        "test_refused_notifications",
    ],
    "the test migrates, and the new table has no grants": ["test_archiving::test_migration_of_running_stores"],
    "a trigger of the test writes into a table of its own": [
        "test_housekeeping::test_turns_are_a_period_apart",
        "test_synchronous_commit",
    ],
    "the test changes a setting of the database": ["test_read_only"],
}


def documented() -> list[str]:
    """Return the statements of the page, for the role `app` and the default names of the tables."""
    page = PAGE.read_text("utf-8").partition("## Minimal grants")[2].partition("\n## ")[0]
    return re.findall(r"^GRANT .*;$", page, re.MULTILINE)


def privileges() -> dict[str, list[str]]:
    """Return the documented privileges by the default name of the table."""
    found = (re.fullmatch(r"GRANT (.*) ON (\w+) TO app;", statement) for statement in documented())
    return {match[2]: match[1].split(", ") for match in found if match}


def statements(role: str, schema: str, **names: str) -> str:
    """Return the documented statements for a role and the tables of a schema.

    Args:
        role: The name of the role.
        schema: The name of the schema.
        names: The names of the tables `chunks`, `archive`, `status` and `conversations`. Default: the default names.
    """
    defaults = {"chunks": CHUNKS_TABLE, "archive": ARCHIVE_TABLE, "status": STATUS_TABLE}
    defaults["conversations"] = CONVERSATIONS_TABLE
    tables = {default: sql.Identifier(schema, names.get(key, default)) for key, default in defaults.items()}
    grants = [sql.SQL("GRANT USAGE ON SCHEMA {} TO {};").format(sql.Identifier(schema), sql.Identifier(role))]
    for table, held in privileges().items():
        grant = sql.SQL(f"GRANT {', '.join(held)} ON {{}} TO {{}};")
        grants.append(grant.format(tables[table], sql.Identifier(role)))
    return sql.SQL("\n").join(grants).as_string(None)


def statements_for(role: str, **tables: sql.Identifier) -> str:
    """Return the documented statements for tables that are given as to `schema.render`."""
    schema = tables["chunks_table"]._obj[0]
    names = {key.removesuffix("_table"): table._obj[1] for key, table in tables.items()}
    return statements(role, schema, archive=Table.parse(tables["chunks_table"]).archive.name, **names)


@contextmanager
def own_role(server: str) -> Iterator[str | None]:
    """Create the role of this process, which has no rights. Yield None without `AIBIND_TEST_ROLE`."""
    if NAME is None:
        yield None
        return
    role = f"{NAME}_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), role))
    try:
        yield role
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def as_role(dsn: str, role: str | None) -> str:
    """Return the connection string of a role, or the same one without a role. Its rights are the documented ones."""
    if role is None:
        return dsn
    with psycopg.connect(dsn, autocommit=True) as admin:
        database, user = sql.Identifier(admin.info.dbname), sql.Identifier(role)
        # What PUBLIC has by default must not hide a missing grant.
        admin.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
        admin.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, user))
        admin.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    return make_conninfo(dsn, user=role, password=role)


def skip_excluded(items: Iterable[pytest.Item]) -> None:
    """Skip the tests that need more than the role may do."""
    skip_named(items, EXCLUDED, "with the minimal grants")
