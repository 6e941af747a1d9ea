"""The command `doctor`, run in separate processes against real servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import grants, pgbouncer, servers

from aibind_postgres import ChatHistory, PostgresConversationStore, PostgresStreamStore, schema
from aibind_postgres.cli.doctor_table_findings import MINIMAL_GRANTS

COMMAND = [sys.executable, "-W", "error", "-m", "aibind_postgres.cli", "doctor"]


def doctor(dsn: str, *options: str) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    ended = subprocess.run(
        [*COMMAND, "--dsn", dsn, *options], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    return ended.returncode, ended.stdout, ended.stderr


def findings(dsn: str, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code, output, errors = doctor(dsn, "--json", *options)
    assert output, errors
    document = json.loads(output)
    assert document["exit_code"] == code
    return code, {finding["name"]: finding for finding in document["findings"]}


def execute(dsn: str, text: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(text.encode())


@pytest.fixture
def role(database):
    """A role without rights, which may log in."""
    name = f"role_{os.urandom(6).hex()}"
    execute(database, f"CREATE ROLE {name} LOGIN")
    yield name
    execute(database, f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_documented_grants_are_those_that_doctor_expects():
    assert grants.privileges() == MINIMAL_GRANTS


def test_complete_tables(database):
    code, found = findings(database)
    assert code == ("warning" in {finding["level"] for finding in found.values()})
    assert {found[name]["level"] for name in ("tables", "connection", "notifications", "clock", "vacuum")} == {"ok"}
    assert "missing-index" not in found
    assert "direct" in found["connection"]["text"]


def test_server_that_is_well():
    with servers.own_server() as server:
        schema.migrate(server.dsn)
        code, found = findings(server.dsn)
        assert {name: finding["text"] for name, finding in found.items() if finding["level"] != "ok"} == {}
        assert code == 0


def test_text_has_no_escape_codes(database):
    _, output, _ = doctor(database)
    assert "\x1b" not in output
    assert "PostgreSQL" in output


def test_missing_tables_name_migrate(empty_database):
    code, found = findings(empty_database)
    assert code == 2
    assert found["missing-table"]["remedy"] == "aibind-postgres migrate"


def test_first_migration_only(empty_database):
    execute(empty_database, (schema.SQL_FOLDER / "0001_tables.sql").read_text("utf-8"))
    code, found = findings(empty_database)
    assert code == 1
    assert found["missing-column"]["level"] == found["missing-index"]["level"] == "warning"
    assert found["missing-table"]["level"] == "warning"  # the archive


def test_role_without_rights(database, role):
    code, found = findings(make_conninfo(database, user=role))
    assert code == 2
    assert found["missing-privilege"]["remedy"].startswith("GRANT ")
    execute(database, "REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    code, found = findings(make_conninfo(database, user=role))
    assert code == 2
    assert "GRANT USAGE ON SCHEMA" in found["missing-table"]["remedy"]


def test_remedies_of_privileges_work(database, role):
    dsn = make_conninfo(database, user=role)
    document = json.loads(doctor(dsn, "--json")[1])
    remedies = [finding["remedy"] for finding in document["findings"] if finding["name"] == "missing-privilege"]
    for remedy in remedies:
        execute(database, remedy)
    assert len(remedies) == len(MINIMAL_GRANTS)
    assert "missing-privilege" not in findings(dsn)[1]


def test_minimal_grants_suffice(database, role):
    execute(database, grants.statements(role, "public"))
    dsn = make_conninfo(database, user=role)
    with PostgresStreamStore(dsn) as store, PostgresConversationStore(dsn) as conversations:
        store.create("a", owner="ann", session_id="s")
        store.append_many("a", ["x", "y"])
        store.complete("a")
        assert [chunk.data for chunk in store.read_from("a")] == ["x", "y"]
        store.archive(0)
        store.unarchive("a")
        store.fail_abandoned()
        store.cleanup()
        store.delete("a")
        conversations.save("s", ChatHistory(), owner="ann")
        assert conversations.load("s") is not None
        conversations.cleanup()
        conversations.delete_owner("ann", streams=store)
    assert "missing-privilege" not in findings(dsn)[1]


def test_other_roles_with_rights(database):
    execute(database, "GRANT ALL ON aibind_conversations TO PUBLIC")
    code, found = findings(database)
    assert code == 1
    assert "PUBLIC" in found["foreign-privilege"]["text"]
    execute(database, found["foreign-privilege"]["remedy"].partition(";")[0])
    assert "foreign-privilege" not in findings(database)[1]


def test_supabase_like_grants(database):
    with psycopg.connect(database, autocommit=True) as admin:
        exists = admin.execute("SELECT FROM pg_roles WHERE rolname = 'anon'").fetchone() is not None
        if not exists:
            admin.execute("CREATE ROLE anon")
        try:
            admin.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO anon")
            _, found = findings(database)
            assert "anon has DELETE" in found["foreign-privilege"]["text"]
            assert 'FROM "anon"' in found["foreign-privilege"]["remedy"]
        finally:
            admin.execute("DROP OWNED BY anon")
            if not exists:
                admin.execute("DROP ROLE anon")


@pytest.mark.skipif(pgbouncer.BINARY is None, reason="needs PgBouncer")
@pytest.mark.parametrize(("mode", "level"), [("session", "ok"), ("transaction", "warning")])
def test_pgbouncer(database, tmp_path, mode, level):
    with pgbouncer.pgbouncer(database, tmp_path, pool_mode=mode) as dsn:
        code, found = findings(dsn)
    assert code == 1  # the server of the tests runs without fsync
    assert f"{mode} pooling" in found["connection"]["text"]
    shown = subprocess.run([pgbouncer.BINARY, "--version"], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[0] in found["connection"]["text"]
    assert found["notifications"]["level"] == level


def test_hot_standby():
    with servers.own_server() as primary:
        schema.migrate(primary.dsn)
        with servers.standby_of(primary) as standby:
            code, found = findings(standby.dsn)
    assert code == 2
    assert "standby" in found["read-only"]["text"]


def test_abandoned_and_expired_streams(database):
    execute(
        database,
        "INSERT INTO aibind_stream_status (id, state, expires_at) VALUES ('a', 'active', 0), ('b', 'done', 0)",
    )
    code, found = findings(database)
    assert code == 1
    assert found["abandoned-streams"]["text"].startswith("1 ")
    assert found["expired-streams"]["text"].startswith("1 ")


def test_unreachable_server():
    code, output, errors = doctor("postgresql://user:secret@127.0.0.1:1/nowhere?connect_timeout=2")
    assert (code, output) == (2, "")
    assert "cannot connect" in errors
    assert "secret" not in errors
