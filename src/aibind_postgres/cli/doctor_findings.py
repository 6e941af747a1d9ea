"""Derive findings with remedies from the facts about a server. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

from .._tables import Table, quote
from .doctor_facts import MAX_COUNTED, Facts
from .expected_tables import ExpectedTables

WELL, WARNINGS, WILL_NOT_WORK = 0, 1, 2  # exit codes

Level: TypeAlias = Literal["ok", "warning", "error"]

STATUS, CHUNKS = "aibind_stream_status", "aibind_stream_chunks"
ARCHIVE, CONVERSATIONS = "aibind_stream_chunks_archive", "aibind_conversations"

# The privileges with which all methods of the stores work, except partitions by time, which need the owner.
MINIMAL_GRANTS = {
    STATUS: ["SELECT", "INSERT", "UPDATE", "DELETE"],
    CHUNKS: ["SELECT", "INSERT", "DELETE"],
    ARCHIVE: ["SELECT", "INSERT", "DELETE"],
    CONVERSATIONS: ["SELECT", "INSERT", "UPDATE", "DELETE"],
}
MINIMUM_VERSION = 140000
STRANGERS = ("PUBLIC", "anon", "authenticated")  # roles that anyone may have; the last two are Supabase's
POOL_SIZE = 10  # connections of a store's own pool
MAX_CLOCK_DIFFERENCE = 5.0  # seconds
SLOW_NOTIFICATION = 500.0  # milliseconds
SHORT_TIMEOUT = 5_000  # milliseconds; a shorter statement_timeout interrupts `cleanup`
MIN_BLOATED_SIZE = 50_000_000  # bytes; the table of streams is small, unless its dead rows are not removed

RELEASE_NOTES = "https://www.postgresql.org/docs/release/"

# Bugs that matter here: the first and the last minor release that are affected, the effect, and its source.
POSTGRESQL_BUGS = [
    (
        140000,
        140003,
        "CREATE INDEX CONCURRENTLY and REINDEX CONCURRENTLY may corrupt indexes",
        f"{RELEASE_NOTES}14.4/",
    ),
]
LIBPQ_CANCEL = "https://github.com/psycopg/psycopg/issues/534"


class Finding(NamedTuple):
    """One finding.

    Attributes:
        name: A stable name, for scripts.
        level: "ok", "warning", or "error" if the library will not work.
        text: What was found.
        remedy: What to do; None for level "ok".
    """

    name: str
    level: Level
    text: str
    remedy: str | None = None


def exit_code(findings: list[Finding]) -> int:
    """Return 0 if all is well, 1 for warnings, and 2 for errors."""
    levels = {finding.level for finding in findings}
    return WILL_NOT_WORK if "error" in levels else WARNINGS if "warning" in levels else WELL


def diagnose(facts: Facts, expected: ExpectedTables, tables: dict[str, Table]) -> list[Finding]:
    """Return all findings.

    Args:
        facts: The facts.
        expected: What the migrations create.
        tables: The tables by their default names.
    """
    return [
        *_server(facts),
        *_libraries(facts),
        *_path(facts),
        *_settings(facts.catalog),
        *_tables(facts.catalog, expected, tables),
        *_housekeeping(facts),
    ]


def _server(facts: Facts) -> Iterator[Finding]:
    number = facts.catalog["server_version"]
    version = f"{number // 10000}.{number % 10000}"
    if number < MINIMUM_VERSION:
        yield Finding("server-version", "error", f"PostgreSQL {version}", "upgrade to PostgreSQL 14 or newer")
    else:
        yield Finding("server-version", "ok", f"PostgreSQL {version}")
    for first, last, effect, source in POSTGRESQL_BUGS:
        if first <= number <= last:
            fixed = f"{last // 10000}.{last % 10000 + 1}"
            yield Finding(
                "server-bug",
                "warning",
                f"PostgreSQL {version}: {effect} ({source})",
                f"upgrade to PostgreSQL {fixed} or newer, then REINDEX the indexes that were built that way",
            )
    if facts.catalog["in_recovery"]:
        yield Finding(
            "read-only",
            "error",
            "the server is a hot standby: it accepts no writes and no LISTEN",
            "connect to the primary, such as with target_session_attrs=read-write and all hosts in the connection "
            "string; give a standby to the option replica of a store",
        )
    elif facts.catalog["is_read_only"]:
        yield Finding(
            "read-only",
            "error",
            "the sessions of this role are read-only",
            f"ALTER ROLE {quote(facts.catalog['role'])} RESET default_transaction_read_only; or check the same setting "
            "of the database and of the server",
        )


def _libraries(facts: Facts) -> Iterator[Finding]:
    number = facts.libpq
    libpq = f"{number // 10000}.{number % 10000}"
    text = f"psycopg {facts.psycopg}, psycopg_pool {facts.psycopg_pool}, libpq {libpq}"
    if number < 170000:
        yield Finding(
            "libpq",
            "warning",
            f"{text}: before libpq 17, a cancel request has no time limit ({LIBPQ_CANCEL}), so the option timeout of a "
            "store closes the connection without cancelling the statement",
            "install psycopg[binary], or libpq 17 or newer",
        )
    else:
        yield Finding("libraries", "ok", text)


def _path(facts: Facts) -> Iterator[Finding]:
    path = facts.path
    if path.backend_pid == path.server_pid:
        yield Finding("connection", "ok", f"direct connection to {facts.host}, port {facts.port}")
    else:
        pooler = _pooler(facts.host)
        mode = "transaction pooling" if path.shares_sessions else "session pooling, as far as two connections show"
        yield Finding("connection", "ok", f"through {pooler}: {mode}")
    if path.notification_ms is not None:
        slow = path.notification_ms > SLOW_NOTIFICATION
        yield Finding(
            "notifications",
            "warning" if slow else "ok",
            f"a notification took {path.notification_ms:.1f} ms between two connections",
            "check the load of the server, and listening sessions that stay in a transaction" if slow else None,
        )
    elif not facts.catalog["can_notify"]:
        yield Finding(
            "notifications",
            "warning",
            "the role may not call pg_notify, so readers in other processes poll",
            f"GRANT EXECUTE ON FUNCTION pg_catalog.pg_notify(text, text) TO {quote(facts.catalog['role'])};",
        )
    elif path.listen_error is not None or path.backend_pid == path.server_pid:
        reason = f" ({path.listen_error})" if path.listen_error else ""
        yield Finding(
            "notifications",
            "warning",
            f"no notification arrived within two seconds{reason}, so readers in other processes poll",
            "connect to the primary, and see its log",
        )
    else:
        yield Finding(
            "notifications",
            "warning",
            "the pooler passes on no notifications, so readers in other processes poll",
            "connect directly or through session pooling where readers follow streams: see docs/clients.md",
        )
    difference = abs(path.clock_difference)
    if difference - path.clock_uncertainty > MAX_CLOCK_DIFFERENCE:
        yield Finding(
            "clock",
            "warning",
            f"the clocks of the server and of this machine differ by {difference:.1f} s; leases and expiry use the "
            "server's clock",
            "synchronise both clocks by NTP",
        )
    else:
        yield Finding("clock", "ok", f"the clocks differ by {difference:.3f} s, ± {path.clock_uncertainty:.3f} s")


def _pooler(host: str) -> str:
    if host.endswith(".pooler.supabase.com"):
        return "Supavisor of Supabase"
    if host.endswith(".neon.tech"):
        return "PgBouncer of Neon"
    return "a pooler, such as PgBouncer"


def _settings(catalog: dict[str, Any]) -> Iterator[Finding]:
    settings = catalog["settings"]
    role = quote(catalog["role"])

    def number(name: str) -> int:
        return int(settings.get(name) or 0)

    closes = {
        "idle_session_timeout": "the server closes the connection of waiting readers and idle connections of a pool",
        "idle_in_transaction_session_timeout": "stores hold no transaction open, but a store on a connection of yours "
        "shares its transaction, which the server ends between two statements",
    }
    for name, effect in closes.items():
        value = number(name)
        if value and (name == "idle_session_timeout" or value < SHORT_TIMEOUT):
            yield Finding(name, "warning", f"{name} is {value} ms: {effect}", f"ALTER ROLE {role} SET {name} = 0;")
    for name in ("statement_timeout", "transaction_timeout"):
        if 0 < (value := number(name)) < SHORT_TIMEOUT:
            yield Finding(
                name,
                "warning",
                f"{name} is {value} ms: it may interrupt cleanup, which deletes 10,000 chunks in one statement",
                f"ALTER ROLE {role} SET {name} = '30s';",
            )
    available = number("max_connections") - number("superuser_reserved_connections")
    limit = catalog["role_connection_limit"]
    free = available - catalog["connections"]
    if 0 <= limit < POOL_SIZE + 1:
        yield Finding(
            "connections",
            "warning",
            f"the role may open {limit} connections; a store opens up to {POOL_SIZE + 1}",
            f"ALTER ROLE {role} CONNECTION LIMIT -1; or give the store a smaller pool",
        )
    elif free < POOL_SIZE + 1:
        yield Finding(
            "connections",
            "warning",
            f"{free} of {available} connections are free; a store opens up to {POOL_SIZE + 1} in each process",
            "raise max_connections, use a pooler, or give the stores of a process one smaller pool",
        )
    for name in ("fsync", "full_page_writes"):
        if settings.get(name) == "off":
            yield Finding(
                name,
                "warning",
                f"{name} is off: a crash of the machine loses or corrupts acknowledged chunks",
                f"ALTER SYSTEM RESET {name}; SELECT pg_reload_conf();",
            )
    if settings.get("synchronous_commit") == "off":
        yield Finding(
            "synchronous_commit",
            "warning",
            "synchronous_commit is off: a crash of the server loses the last acknowledged chunks",
            f"ALTER ROLE {role} SET synchronous_commit = on; or accept the loss",
        )
    if (isolation := settings.get("default_transaction_isolation")) != "read committed":
        yield Finding(
            "isolation",
            "warning",
            f"default_transaction_isolation is {isolation}: simultaneous writers get serialization errors",
            f"ALTER ROLE {role} SET default_transaction_isolation = 'read committed';",
        )
    if (encoding := settings.get("server_encoding")) != "UTF8":
        yield Finding(
            "encoding",
            "warning",
            f"the encoding of the database is {encoding}: other characters are refused",
            "create a database with ENCODING 'UTF8' and move the tables there",
        )
    for name in ("autovacuum", "track_counts"):
        if settings.get(name) == "off":
            yield Finding(
                name,
                "warning",
                f"{name} is off: dead rows of the table of streams are not removed",
                f"ALTER SYSTEM RESET {name}; SELECT pg_reload_conf();",
            )


def _tables(catalog: dict[str, Any], expected: ExpectedTables, names: dict[str, Table]) -> Iterator[Finding]:
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
        key = usable[STATUS]["partition_key"]
        form = f", partitioned by {key}" if key else ", distributed by Citus" if catalog["citus"] else ""
        yield Finding("tables", "ok", f"the tables are those of migration {max(expected.tables.values())}{form}")
    if (status := usable.get(STATUS)) is not None:
        yield from _vacuum(status)


def _table_options(names: dict[str, Table]) -> str:
    options = {CHUNKS: "--chunks-table", STATUS: "--status-table", CONVERSATIONS: "--conversations-table"}
    given = [(options[key], table) for key, table in names.items() if key in options and table != Table(None, key)]
    return "".join(f" {option} {'.'.join(filter(None, table))}" for option, table in given)


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
            "warning" if key == ARCHIVE else "error",
            f"the role {role} has no privilege {', '.join(missing)} on {qualified}",
            f"GRANT {', '.join(missing)} ON {qualified} TO {quote(role)};",
        )
    if table["row_security"] and not table["bypasses_row_security"] and not table["policies"]:
        yield Finding(
            "row-security",
            "error",
            f"row-level security of {qualified} has no policy, so the role {role} finds no rows and stores none",
            f'CREATE POLICY "{role} may use all rows" ON {qualified} TO {quote(role)} USING (true) WITH CHECK (true);',
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


def _vacuum(status: dict[str, Any]) -> Iterator[Finding]:
    statistics = status["statistics"] or {}
    live, dead = statistics.get("live") or 0, statistics.get("dead") or 0
    last = statistics.get("last_vacuum") or "never"
    text = f"the table of streams has {live} live and {dead} dead rows; last vacuum: {last}"
    if (status["size"] or 0) > MIN_BLOATED_SIZE and dead > 2 * live:
        yield Finding(
            "bloat",
            "warning",
            text,
            f"VACUUM {quote(status['schema'])}.{quote(status['name'])}; and end long transactions, which prevent it",
        )
    else:
        yield Finding("vacuum", "ok", text)


def _housekeeping(facts: Facts) -> Iterator[Finding]:
    texts = {
        "abandoned": ("active streams have no living producer", "run a Housekeeper, or call fail_abandoned()"),
        "expired": ("streams expired more than an hour ago", "run a Housekeeper, or call cleanup()"),
        "too_long": ("streams have more than 1,000,000 chunks", "store longer chunks, or divide the streams"),
    }
    for name, count in (facts.streams or {}).items():
        if count:
            text, remedy = texts[name]
            number = f"{MAX_COUNTED} or more" if count >= MAX_COUNTED else str(count)
            yield Finding(f"{name.replace('_', '-')}-streams", "warning", f"{number} {text}", remedy)
