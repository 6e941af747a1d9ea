"""The findings of `doctor`, from given facts, and the reading of the migrations."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest

from aibind_postgres._tables import CHUNKS_TABLE, STATUS_TABLE, Table
from aibind_postgres.cli.doctor_facts import Facts, Path
from aibind_postgres.cli.doctor_findings import Finding, exit_code, server_findings
from aibind_postgres.cli.doctor_table_findings import MINIMAL_GRANTS, table_findings
from aibind_postgres.cli.expected_tables import parse_migrations, read_migrations
from aibind_postgres.cli.known_bugs import bugs_of

IDLE = "idle_in_transaction_session_timeout"
TABLES = {name: Table(None, name) for name in MINIMAL_GRANTS}
SETTINGS = {
    "max_connections": "100",
    "default_transaction_isolation": "read committed",
    "server_encoding": "UTF8",
}


def leaf(name, **changes):
    return {"name": name, "size": 8192, "live": 1, "dead": 0, "last_vacuum": None, **changes}


def facts(path=(), **changes):
    expected = read_migrations()
    tables = [
        {
            "key": name,
            "schema": "public",
            "name": name,
            "is_visible": True,
            "has_usage": True,
            "row_security": False,
            "bypasses_row_security": True,
            "policies": 0,
            "columns": {c.name: {"type": c.type, "default": True} for c in expected.columns if c.table == name},
            "indexes": {index.name: True for index in expected.indexes if index.table == name},
            "has_primary_key": True,
            "privileges": MINIMAL_GRANTS[name],
            "grants": [],
            "partition_key": None,
            "leaves": [leaf(name)],
        }
        for name in TABLES
    ]
    catalog = {
        "server_version": 180000,
        "role": "app",
        "search_path": "public",
        "in_recovery": False,
        "is_read_only": False,
        "connections": 1,
        "role_connection_limit": -1,
        "settings": SETTINGS,
        "can_notify": True,
        "tables": tables,
        "citus": False,
    }
    way = Path(1, 1, False, 1.0, None, 0.0, 0.0)._replace(**dict(path))
    return Facts("localhost", 5432, way, {**catalog, **changes}, {}, "3.3.6", "3.3.3", 170000)


def problems(given: Facts) -> dict[str, Finding]:
    found = [*server_findings(given), *table_findings(given.catalog, read_migrations(), TABLES)]
    return {finding.name: finding for finding in found if finding.level != "ok"}


def test_nothing_to_complain_about():
    assert problems(facts()) == {}


@pytest.mark.parametrize(
    ("changes", "name", "level"),
    [
        ({"server_version": 130005}, "server-version", "error"),
        ({"server_version": 140003}, "server-bug", "warning"),
        ({"in_recovery": True}, "read-only", "error"),
        ({"is_read_only": True}, "read-only", "error"),
        ({"role_connection_limit": 5}, "connections", "warning"),
        ({"connections": 95}, "connections", "warning"),
        ({"tables": []}, "missing-table", "warning"),
        ({"settings": {**SETTINGS, "idle_session_timeout": "1000"}}, "idle_session_timeout", "warning"),
        ({"settings": {**SETTINGS, "statement_timeout": "1000"}}, "statement_timeout", "warning"),
        ({"settings": {**SETTINGS, IDLE: "1000"}}, IDLE, "warning"),
        ({"settings": {**SETTINGS, "transaction_timeout": "1000"}}, "transaction_timeout", "warning"),
        ({"settings": {**SETTINGS, "fsync": "off"}}, "fsync", "warning"),
        ({"settings": {**SETTINGS, "full_page_writes": "off"}}, "full_page_writes", "warning"),
        ({"settings": {**SETTINGS, "autovacuum": "off"}}, "autovacuum", "warning"),
        ({"settings": {**SETTINGS, "track_counts": "off"}}, "track_counts", "warning"),
        ({"settings": {**SETTINGS, "synchronous_commit": "off"}}, "synchronous_commit", "warning"),
        ({"settings": {**SETTINGS, "server_encoding": "LATIN1"}}, "encoding", "warning"),
        ({"settings": {**SETTINGS, "default_transaction_isolation": "serializable"}}, "isolation", "warning"),
    ],
)
def test_finding(changes, name, level):
    found = problems(facts(**changes))
    assert found[name].level == level
    assert found[name].remedy


def test_timeouts_that_hurt_nothing():
    long = dict.fromkeys(["idle_in_transaction_session_timeout", "statement_timeout", "transaction_timeout"], "60000")
    assert problems(facts(settings=SETTINGS | long)) == {}


def test_old_libpq():
    assert list(problems(facts()._replace(libpq=160000))) == ["libpq"]


def test_notifications_of_a_direct_connection():
    slow = problems(facts({"notification_ms": 501.0}))
    assert "501.0 ms" in slow["notifications"].text
    missing = {"notification_ms": None}
    assert "see its log" in problems(facts(missing))["notifications"].remedy
    assert "GRANT EXECUTE" in problems(facts(missing, can_notify=False))["notifications"].remedy


@pytest.mark.parametrize(
    ("table", "change", "name"),
    [
        (STATUS_TABLE, {"leaves": [leaf("s", live=10, dead=21, size=60_000_000)]}, "bloat"),
        (CHUNKS_TABLE, {"has_primary_key": False}, "primary-key"),
        (STATUS_TABLE, {"indexes": {}}, "missing-index"),
        (STATUS_TABLE, {"has_usage": False}, "schema-usage"),
        (STATUS_TABLE, {"is_visible": False}, "missing-table"),
        (STATUS_TABLE, {"columns": {}}, "missing-column"),
        (STATUS_TABLE, {"privileges": ["SELECT", "INSERT", "UPDATE"]}, "missing-privilege"),
        (STATUS_TABLE, {"grants": [["anon", "SELECT"]]}, "foreign-privilege"),
    ],
)
def test_finding_about_a_table(table, change, name):
    given = facts()
    next(found for found in given.catalog["tables"] if found["key"] == table).update(change)
    found = problems(given)
    assert list(found) == [name]
    assert found[name].remedy


def test_large_table_with_few_dead_rows_is_well():
    given = facts()
    given.catalog["tables"][0].update(leaves=[leaf("s", live=10, dead=20, size=60_000_000)])
    assert problems(given) == {}


def test_bloated_partition():
    given = facts()
    well, bloated = leaf("p1", live=1000, size=30_000_000), leaf("p2", live=10, dead=21, size=30_000_000)
    given.catalog["tables"][0].update(leaves=[bloated, well], partition_key="HASH (id)")
    [found] = problems(given).values()
    assert found.name == "bloat"
    assert "1010 live and 21 dead rows in 2 partitions" in found.text
    assert "such as p2 with 21 dead rows" in found.text
    assert found.remedy.startswith("VACUUM p2;")


def test_distributed_tables():
    given = facts(citus=True)
    given.catalog["tables"][0].update(leaves=[leaf("s", live=0, dead=21, size=60_000_000)])
    assert problems(given) == {}


@pytest.mark.parametrize(
    ("versions", "name", "release"),
    [
        ({"psycopg": "3.3.5"}, "psycopg-bug", "psycopg 3.3.6"),
        ({"psycopg_pool": "3.3.2"}, "psycopg-pool-bug", "psycopg_pool 3.3.3"),
        ({"pgbouncer": "1.17.0"}, "pooler-bug", "PgBouncer 1.25.2"),
        ({"pgbouncer": "1.25.1"}, "pooler-bug", "PgBouncer 1.25.2"),
    ],
)
def test_release_with_a_bug(versions, name, release):
    [found] = problems(facts({"backend_pid": 2})._replace(**versions)).values()
    assert (found.name, found.remedy) == (name, f"upgrade to {release} or newer")


def test_bugs_of_pgbouncer():
    effects = {
        version: [bug.source.rpartition("/")[2] for bug in bugs_of("PgBouncer", version)]
        for version in ("1.17.0", "1.18.0", "1.20.1", "1.21.0", "1.22.1", "1.23.0", "1.25.2")
    }
    always = "changelog.html"
    assert effects == {
        "1.17.0": ["717", "845", always],
        "1.18.0": ["845", always],
        "1.20.1": ["845", always],
        "1.21.0": ["1025", always],
        "1.22.1": [always],
        "1.23.0": ["1105", always],
        "1.25.2": [],
    }


def test_version_of_pgbouncer_is_shown():
    given = facts({"backend_pid": 2})._replace(pgbouncer="1.25.2")
    assert "through PgBouncer 1.25.2" in next(f.text for f in server_findings(given) if f.name == "connection")


def test_column_without_its_default():
    given = facts()
    chunks = next(found for found in given.catalog["tables"] if found["key"] == CHUNKS_TABLE)
    chunks["columns"]["created_at"]["default"] = False
    assert list(problems(given)) == ["missing-default"]


def test_pooler_without_notifications():
    found = problems(facts({"server_pid": 2, "shares_sessions": True, "notification_ms": None}))
    assert list(found) == ["notifications"]


def test_clock_difference():
    assert "clock" in problems(facts({"clock_difference": -60.0, "clock_uncertainty": 0.1}))
    assert problems(facts({"clock_difference": 6.0, "clock_uncertainty": 3.0})) == {}


def test_invalid_index_and_wrong_type():
    given = facts()
    table = given.catalog["tables"][0]
    table["indexes"][next(iter(table["indexes"]))] = False
    table["columns"]["state"]["type"] = "integer"
    assert set(problems(given)) == {"invalid-index", "column-type"}


def test_bigint_numbers_are_accepted():
    given = facts()
    given.catalog["tables"][0]["columns"]["total_chunks"]["type"] = "bigint"
    assert problems(given) == {}


def test_remedies_quote_names():
    given = facts(role='a"b', tables=[])
    names = {**TABLES, "aibind_stream_chunks": Table("my schema", "it's")}
    found = [finding.remedy for finding in table_findings(given.catalog, read_migrations(), names)]
    assert """aibind-postgres migrate --chunks-table 'my schema.it'"'"'s'""" in found
    table = facts().catalog["tables"][0] | {"row_security": True, "bypasses_row_security": False}
    found = problems(facts(role='a"b', tables=[table]))
    assert ' TO "a""b" ' in found["row-security"].remedy


def test_exit_codes():
    levels = [Finding("a", "ok", ""), Finding("b", "warning", ""), Finding("c", "error", "")]
    assert [exit_code(levels[:count]) for count in range(4)] == [0, 0, 1, 2]


def test_migrations_are_read_completely():
    expected = read_migrations()
    assert set(expected.tables) == set(MINIMAL_GRANTS)
    assert {column.name for column in expected.columns if column.table == "aibind_stream_chunks"} == {
        "id", "seq", "data", "created_at",
    }  # fmt: skip
    assert len(expected.indexes) == sum(
        line.startswith("CREATE INDEX")
        for file in sorted(FilePath(__file__).parents[2].joinpath("sql").glob("*.sql"))
        for line in file.read_text("utf-8").splitlines()
    )


def test_parsing_of_a_migration():
    parsed = parse_migrations({"0009": "-- x;\nALTER TABLE t ADD COLUMN IF NOT EXISTS a JSONB;"})
    assert [tuple(column) for column in parsed.columns] == [("t", "a", "jsonb", "0009")]
