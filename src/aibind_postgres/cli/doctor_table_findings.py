"""Findings with remedies about the tables: definition, privileges, dead rows. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote as quote_for_shell
from typing import Any

from .._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, Table, quote
from .doctor_findings import Finding, Level
from .expected_tables import ExpectedTables

ARCHIVE_TABLE = f"{CHUNKS_TABLE}_archive"

# The privileges with which all methods of the stores work, except partitions by time, which need the owner.
MINIMAL_GRANTS = {
    STATUS_TABLE: ["SELECT", "INSERT", "UPDATE", "DELETE"],
    CHUNKS_TABLE: ["SELECT", "INSERT", "DELETE"],
    ARCHIVE_TABLE: ["SELECT", "INSERT", "DELETE"],
    CONVERSATIONS_TABLE: ["SELECT", "INSERT", "UPDATE", "DELETE"],
}
STRANGERS = ("PUBLIC", "anon", "authenticated")  # roles that anyone may have; the last two are Supabase's
MIN_BLOATED_SIZE = 50_000_000  # bytes; the table of streams is small, unless its dead rows are not removed
MAX_NAMED = 20  # partitions in a remedy


def table_findings(catalog: dict[str, Any], expected: ExpectedTables, names: dict[str, Table]) -> Iterator[Finding]:
    """Yield the findings about the tables.

    Args:
        catalog: The facts of the catalogs.
        expected: The result of the migrations.
        names: The tables by their default names.
    """
    migrate = f"aibind-postgres migrate{_table_options(names)}"
    usable = {}
    for key, migration in expected.tables.items():
        found = [table for table in catalog["tables"] if table["key"] == key]
        visible = [table for table in found if table["is_visible"]]
        if not visible:
            yield _missing_table(names[key], migration, found, migrate, catalog)
        elif not visible[0]["has_usage"]:
            schema = quote(visible[0]["schema"])
            yield Finding(
                "schema-usage",
                "error",
                f"the role {catalog['role']} may not use the schema {schema} of {names[key].quoted}",
                f"GRANT USAGE ON SCHEMA {schema} TO {quote(catalog['role'])};",
            )
        else:
            usable[key] = visible[0]
    complete = len(usable) == len(expected.tables)
    for key, table in usable.items():
        findings = [*_columns(key, table, expected, migrate), *_indexes(key, table, expected, names, migrate)]
        complete = complete and not findings
        yield from findings
        yield from _privileges(key, table, catalog["role"])
        yield from _strangers(table)
    if complete:
        key = usable[STATUS_TABLE]["partition_key"]
        form = f", partitioned by {key}" if key else ", distributed by Citus" if catalog["citus"] else ""
        yield Finding("tables", "ok", f"the tables are those of migration {max(expected.tables.values())}{form}")
    if (status := usable.get(STATUS_TABLE)) is not None:
        yield from _vacuum(status, is_distributed=catalog["citus"])


def _table_options(names: dict[str, Table]) -> str:
    options = {
        CHUNKS_TABLE: "--chunks-table",
        STATUS_TABLE: "--status-table",
        CONVERSATIONS_TABLE: "--conversations-table",
    }
    given = [(options[key], table) for key, table in names.items() if key in options and table != Table(None, key)]
    return "".join(f" {option} {quote_for_shell('.'.join(filter(None, table)))}" for option, table in given)


def _missing_table(
    table: Table, migration: str, elsewhere: list[dict[str, Any]], migrate: str, catalog: dict[str, Any]
) -> Finding:
    level: Level = "error" if migration == "0001" else "warning"
    if elsewhere:
        schemas = ", ".join(quote(found["schema"]) for found in elsewhere)
        return Finding(
            "missing-table",
            level,
            f"the table {table.quoted} is in the schema {schemas}, which search_path ({catalog['search_path']}) does "
            f"not make visible to the role {catalog['role']}",
            f"GRANT USAGE ON SCHEMA {quote(elsewhere[0]['schema'])} TO {quote(catalog['role'])}; and give the stores "
            "the table names with the schema, or set search_path of the role",
        )
    return Finding("missing-table", level, f"the table {table.quoted} of migration {migration} is missing", migrate)


def _columns(key: str, table: dict[str, Any], expected: ExpectedTables, migrate: str) -> Iterator[Finding]:
    columns = table["columns"] or {}
    name = f"{table['schema']}.{table['name']}"
    for column in expected.columns:
        if column.table != key:
            continue
        found = columns.get(column.name)
        if found is None:
            level: Level = "error" if column.migration == expected.tables[key] else "warning"
            text = f"the column {column.name} of {name} from migration {column.migration} is missing"
            yield Finding("missing-column", level, text, migrate)
        elif found["type"] not in (column.type, "bigint" if column.type == "integer" else column.type):
            yield Finding(
                "column-type",
                "error",
                f"the column {column.name} of {name} has type {found['type']} instead of {column.type}",
                f"ALTER TABLE {quote(table['schema'])}.{quote(table['name'])} ALTER COLUMN {quote(column.name)} "
                f"TYPE {column.type};",
            )
    for default in expected.defaults:
        if default.table == key and default.name in columns and not columns[default.name]["default"]:
            text = f"the column {default.name} of {name} has no default, so new rows have no time"
            yield Finding("missing-default", "warning", text, migrate)


def _indexes(
    key: str, table: dict[str, Any], expected: ExpectedTables, names: dict[str, Table], migrate: str
) -> Iterator[Finding]:
    name = f"{table['schema']}.{table['name']}"
    if not table["has_primary_key"]:
        yield Finding(
            "primary-key",
            "error",
            f"{name} has no primary key, so duplicate rows are possible",
            "add the primary key of sql/0001_tables.sql or sql/0005_archive.sql",
        )
    for index in expected.indexes:
        if index.table != key:
            continue
        derived = names[key].derive(index.name.removeprefix(key))
        if derived not in table["indexes"]:
            text = f"the index {derived} from migration {index.migration} is missing"
            yield Finding("missing-index", "warning", text, migrate)
    for index_name, is_valid in table["indexes"].items():
        if not is_valid:
            yield Finding(
                "invalid-index",
                "warning",
                f"the index {index_name} of {name} is invalid: queries do not use it",
                f"REINDEX INDEX CONCURRENTLY {quote(table['schema'])}.{quote(index_name)};",
            )


def _privileges(key: str, table: dict[str, Any], role: str) -> Iterator[Finding]:
    missing = [privilege for privilege in MINIMAL_GRANTS[key] if privilege not in table["privileges"]]
    qualified = f"{quote(table['schema'])}.{quote(table['name'])}"
    if missing:
        yield Finding(
            "missing-privilege",
            "warning" if key == ARCHIVE_TABLE else "error",
            f"the role {role} has no privilege {', '.join(missing)} on {qualified}",
            f"GRANT {', '.join(missing)} ON {qualified} TO {quote(role)};",
        )
    if table["row_security"] and not table["bypasses_row_security"] and not table["policies"]:
        yield Finding(
            "row-security",
            "error",
            f"row-level security of {qualified} has no policy, so the role {role} finds no rows and stores none",
            f"CREATE POLICY aibind_all_rows ON {qualified} TO {quote(role)} USING (true) WITH CHECK (true);",
        )


def _strangers(table: dict[str, Any]) -> Iterator[Finding]:
    qualified = f"{quote(table['schema'])}.{quote(table['name'])}"
    if table["row_security"]:
        return
    for stranger in STRANGERS:
        held = sorted(privilege for grantee, privilege in table["grants"] if grantee == stranger)
        if held:
            grantee = stranger if stranger == "PUBLIC" else quote(stranger)
            yield Finding(
                "foreign-privilege",
                "warning",
                f"{stranger} has {', '.join(held)} on {qualified}",
                f"REVOKE ALL ON {qualified} FROM {grantee}; "
                f"ALTER DEFAULT PRIVILEGES IN SCHEMA {quote(table['schema'])} REVOKE ALL ON TABLES FROM {grantee}; "
                "the second one as the role that creates the tables",
            )


def _vacuum(status: dict[str, Any], *, is_distributed: bool) -> Iterator[Finding]:
    """Yield the findings about the dead rows of the table of streams, or of its partitions."""
    leaves = status["leaves"]
    if is_distributed:
        text = "Citus keeps the rows of the tables on its workers, whose dead rows are not counted here"
        yield Finding("vacuum", "ok", text)
        return
    live, dead = (sum(leaf[name] or 0 for leaf in leaves) for name in ("live", "dead"))
    last = max((leaf["last_vacuum"] for leaf in leaves if leaf["last_vacuum"]), default="never")
    partitions = f" in {len(leaves)} partitions" if status["partition_key"] else ""
    text = f"the table of streams has {live} live and {dead} dead rows{partitions}; last vacuum: {last}"
    minimum = MIN_BLOATED_SIZE / max(1, len(leaves))
    bloated = [leaf for leaf in leaves if leaf["size"] > minimum and leaf["dead"] > 2 * leaf["live"]]
    if not bloated:
        yield Finding("vacuum", "ok", text)
        return
    if partitions:
        worst = bloated[0]
        text += f"; bloated partitions: {len(bloated)}, such as {worst['name']} with {worst['dead']} dead rows, "
        text += f"last vacuum: {worst['last_vacuum'] or 'never'}"
    names = ", ".join(leaf["name"] for leaf in bloated[:MAX_NAMED])
    yield Finding("bloat", "warning", text, f"VACUUM {names}; and end long transactions, which prevent it")
