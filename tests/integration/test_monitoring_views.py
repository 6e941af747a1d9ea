"""The views for monitoring systems that query the database."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from aibind_postgres import PostgresStreamStore, schema

NAMES = {"chunks_table": 'we"ird', "status_table": "it's; -- \n$1", "conversations_table": "{user} %s"}


@pytest.fixture(params=["default names", "other names"])
def names(request, schema_name):
    if request.param == "default names":
        return {}
    return {key: sql.Identifier(schema_name, name) for key, name in NAMES.items()}


@pytest.fixture
def connection(request, names):
    database = request.getfixturevalue("dsn" if names else "database")
    with psycopg.connect(database, autocommit=True, row_factory=dict_row) as connection:
        schema.migrate(database, **names)
        for _ in range(2):
            connection.execute(schema.monitoring_views(**names))
        yield connection


def view(names, suffix):
    schema_and_table = names["status_table"]._obj if names else ("public", "aibind_stream_status")
    return sql.Identifier(schema_and_table[0], schema_and_table[1] + suffix)


def row(connection, names):
    return connection.execute(sql.SQL("SELECT * FROM {}").format(view(names, "_summary"))).fetchone()


@pytest.fixture
def store(connection, names):
    tables = {key: name for key, name in names.items() if key != "conversations_table"}
    with PostgresStreamStore(connection, **tables) as store:
        yield store


def test_summary_of_empty_tables(connection, names):
    found = row(connection, names)
    assert found.pop("notification_queue_usage") >= 0
    assert found.pop("active") == found.pop("without_lease") == found.pop("abandoned") == 0
    assert found.pop("failed_last_hour") == found.pop("expired") == 0
    assert set(found.values()) == {None}


def test_summary(connection, names, store):
    store.create("without lease")
    store.create("abandoned", lease=0.001)
    store.create("waiting", lease=1000)
    for id, state in (("failed", "fail"), ("expired", "complete")):
        store.create(id, ttl=0.001 if id == "expired" else 1000)
        getattr(store, state)(*([id, "broken"] if state == "fail" else [id]))
    connection.execute("SELECT pg_sleep(0.01)")
    found = row(connection, names)
    assert (found["active"], found["without_lease"], found["abandoned"]) == (3, 1, 1)
    assert (found["failed_last_hour"], found["expired"]) == (1, 1)
    assert found["oldest_active_age"] > 0
    assert found["cleanup_lag"] > 0
    assert found["housekeeping_age"] is None
    [take_turn] = {store._schema.statements.take_turn}
    store._database.query(take_turn, ["aibind_postgres.housekeeping", 1000, store._tables[0].quoted])
    found = row(connection, names)
    assert 0 <= found["housekeeping_age"] < 60
    assert found["expired"] == 1  # without the marker


def test_ages_are_not_negative(connection, names, store):
    with connection.transaction():  # whose now() is earlier than what it writes
        store.create()
        take_turn = store._schema.statements.take_turn
        store._database.query(take_turn, ["aibind_postgres.housekeeping", 1000, store._tables[0].quoted])
        connection.execute("SELECT pg_sleep(0.01)")
        for name in ("oldest_active_age", "housekeeping_age"):
            assert 0 < row(connection, names)[name] < 60


def test_tables(connection, names, store):
    store.append_many(store.create(), ["x"] * 100)
    rows = connection.execute(sql.SQL("SELECT * FROM {}").format(view(names, "_tables"))).fetchall()
    assert {each["name"] for each in rows} == {"status", "chunks", "archive", "conversations"}
    assert all(each["bytes"] > 0 for each in rows)
    assert {each["name"]: each["live_rows"] >= 0 and 0 <= each["dead_share"] <= 1 for each in rows}


@pytest.mark.parametrize("names", ["default names"], indirect=True)
def test_monitoring_needs_no_right_on_the_tables(connection, names, database):
    role = "monitoring_of_a_test"
    connection.execute(f"CREATE ROLE {role} LOGIN")
    try:
        connection.execute(f"GRANT SELECT ON aibind_stream_status_summary, aibind_stream_status_tables TO {role}")
        with psycopg.connect(make_conninfo(database, user=role), autocommit=True) as monitoring:
            assert monitoring.execute("SELECT active FROM aibind_stream_status_summary").fetchone() == (0,)
            assert len(monitoring.execute("SELECT name FROM aibind_stream_status_tables").fetchall()) == 4
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                monitoring.execute("SELECT FROM aibind_stream_status")
    finally:
        connection.execute(f"DROP OWNED BY {role}")
        connection.execute(f"DROP ROLE {role}")
