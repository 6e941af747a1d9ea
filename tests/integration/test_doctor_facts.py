"""The facts of `doctor`, from real tables."""

from __future__ import annotations

import uuid
from datetime import timedelta

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support.concurrency import until

from aibind_postgres import schema
from aibind_postgres._housekeeping import MARKER
from aibind_postgres._tables import STATUS_TABLE, Table
from aibind_postgres.cli.doctor_facts import gather
from aibind_postgres.cli.doctor_findings import server_findings
from aibind_postgres.cli.doctor_table_findings import MINIMAL_GRANTS

TABLES = {name: Table(None, name) for name in MINIMAL_GRANTS}


@pytest.fixture
def admin(database):
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


def insert(admin, id, **values):
    columns, params = ["id", *values], [id, *values.values()]
    admin.execute(
        f"INSERT INTO {STATUS_TABLE} ({', '.join(columns)}) VALUES ({', '.join(['%s'] * len(params))})", params
    )


def test_streams_are_counted(database, admin):
    now = admin.execute("SELECT (extract(epoch FROM now()) * 1000)::bigint").fetchone()[0]
    insert(admin, MARKER, state="done", expires_at=0)
    insert(admin, "a", state="active", expires_at=now + 10**9, lease_until=now - 700_000)
    insert(admin, "a2", state="active", expires_at=now + 10**9, lease_until=now - 700_000)
    insert(admin, "b", state="active", expires_at=0, lease_until=now)
    insert(admin, "c", state="active", expires_at=0)  # of software without leases
    insert(admin, "d", state="done", expires_at=now - 3_700_000)
    insert(admin, "e", state="done", expires_at=now - 3_500_000)
    insert(admin, "f", state="done", expires_at=now + 10**9, total_chunks=1_000_001)
    insert(admin, "g", state="done", expires_at=now + 10**9, total_chunks=1_000_000)
    assert gather(database, TABLES).streams == {"abandoned": 3, "expired": 1, "too_long": 1}


def test_streams_of_the_first_migration_are_counted(database, admin):
    admin.execute(f"ALTER TABLE {STATUS_TABLE} DROP COLUMN lease_until CASCADE")
    insert(admin, "a", state="active", expires_at=0)
    assert gather(database, TABLES).streams == {"abandoned": 1, "expired": 0, "too_long": 0}


def test_partitions_by_time(empty_database):
    schema.migrate(empty_database, partitions="time")
    day = 24 * 3_600_000
    with psycopg.connect(empty_database, autocommit=True) as admin:
        now = admin.execute("SELECT (extract(epoch FROM now()) * 1000)::bigint").fetchone()[0]
        insert(admin, "a", state="done", expires_at=now - 3 * day)
        insert(admin, "b", state="done", expires_at=now - 4 * day)
        whole = gather(empty_database, TABLES)
        assert whole.streams == {"abandoned": 0, "expired": 1, "too_long": 0}
        named = {finding.name: finding for finding in server_findings(whole)}
        assert named["expired-streams"].text == "1 streams expired more than 3 days ago"
        assert not named.keys() & {"missing-partitions", "partition-owner"}
        last = max(whole.time_partitions[0].days)
        for table in TABLES:
            admin.execute(f"DROP TABLE IF EXISTS {table}_{last:%Y%m%d} CASCADE")
        assert "missing-partitions" not in [finding.name for finding in server_findings(gather(empty_database, TABLES))]
        for table in TABLES:
            admin.execute(f"DROP TABLE IF EXISTS {table}_{last - timedelta(days=1):%Y%m%d} CASCADE")
        [missing] = [f for f in server_findings(gather(empty_database, TABLES)) if f.name == "missing-partitions"]
        assert (missing.level, missing.text.partition(":")[0]) == (
            "warning",
            f"partitions of 1 days are missing, the first one of {last - timedelta(days=1)}",
        )


def test_role_that_does_not_own_partitions(empty_database):
    schema.migrate(empty_database, partitions="time")
    role = f"aibind_{uuid.uuid4().hex}"
    with psycopg.connect(empty_database, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
        try:
            found = {f.name: f for f in server_findings(gather(make_conninfo(empty_database, user=role), TABLES))}
        finally:
            admin.execute(f"DROP ROLE {role}")
    assert found["partition-owner"].level == "ok"
    assert role in found["partition-owner"].text


def test_dead_rows_of_each_partition(empty_database):
    schema.migrate(empty_database, partitions=2)
    with psycopg.connect(empty_database, autocommit=True) as admin:
        for number in range(20):
            insert(admin, f"a{number}", state="done", expires_at=0)
        admin.execute(f"DELETE FROM {STATUS_TABLE}")

    def leaves():
        tables = gather(empty_database, TABLES).catalog["tables"]
        return next(table["leaves"] for table in tables if table["key"] == STATUS_TABLE)

    until(lambda: sum(leaf["dead"] for leaf in leaves()) == 20)  # sessions report their counts when they end
    assert len({leaf["name"] for leaf in leaves()}) == 2
    assert leaves()[0]["dead"] >= leaves()[1]["dead"] > 0


def test_definition_of_a_table(database, admin):
    admin.execute(f"""
        ALTER TABLE {STATUS_TABLE} ADD COLUMN dropped text;
        ALTER TABLE {STATUS_TABLE} DROP COLUMN dropped;
        CREATE INDEX broken ON {STATUS_TABLE} (state);
        UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'broken'::regclass;
        GRANT SELECT ON {STATUS_TABLE} TO PUBLIC""")
    [status] = [table for table in gather(database, TABLES).catalog["tables"] if table["key"] == STATUS_TABLE]
    assert not [name for name in status["columns"] if "dropped" in name]
    assert [name for name, is_valid in status["indexes"].items() if not is_valid] == ["broken"]
    assert status["grants"] == [["PUBLIC", "SELECT"]]  # not those of the owner
