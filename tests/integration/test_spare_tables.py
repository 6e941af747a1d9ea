"""Tests get tables of earlier ones only if these are empty and as they were created."""

from __future__ import annotations

import psycopg
import pytest
from support import servers
from support.spare_tables import SpareTables

DEFINITION = """
CREATE TABLE {schema}.a (id text PRIMARY KEY, number integer DEFAULT 1);
CREATE FUNCTION {schema}.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
"""
CHANGES = [
    "ALTER TABLE {schema}.a ADD COLUMN more text",
    "ALTER TABLE {schema}.a ALTER COLUMN number SET DEFAULT 2",
    "ALTER TABLE {schema}.a ALTER COLUMN number SET NOT NULL",
    "ALTER TABLE {schema}.a ADD CHECK (number > 0)",
    "ALTER TABLE {schema}.a SET (fillfactor = 50)",
    "ALTER TABLE {schema}.a ENABLE ROW LEVEL SECURITY",
    "CREATE POLICY p ON {schema}.a USING (true)",
    "CREATE INDEX ON {schema}.a (number)",
    "CREATE TRIGGER t BEFORE INSERT ON {schema}.a FOR EACH ROW EXECUTE FUNCTION {schema}.f()",
    "CREATE OR REPLACE FUNCTION {schema}.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "CREATE RULE r AS ON INSERT TO {schema}.a DO INSTEAD NOTHING",
    "GRANT SELECT ON {schema}.a TO PUBLIC",
    "GRANT SELECT (id) ON {schema}.a TO PUBLIC",
    "GRANT USAGE ON SCHEMA {schema} TO PUBLIC",
    "CREATE TABLE {schema}.b ()",
    "DROP TABLE {schema}.a",
]


@pytest.fixture(scope="module")
def run(server):
    """Run SQL in a database of these tests."""
    with servers.own_database(server, "template0") as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        yield connection.execute


@pytest.fixture
def spare(run):
    yield SpareTables(run)
    for schema in ("one", "two", "three"):
        run(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


@pytest.fixture
def use(spare, run):
    """Return a function that creates tables, changes them, releases them, and returns the id of the first one."""

    def use(schema, *changes):
        run(f"CREATE SCHEMA {schema}")
        spare.create(schema, "kind", DEFINITION.format(schema=schema))
        [(oid,)] = run(f"SELECT '{schema}.a'::regclass::oid").fetchall()
        for change in changes:
            run(change.format(schema=schema))
        spare.release(schema)
        return oid

    return use


def test_unchanged_tables_are_used_again_without_their_rows(use, spare, run):
    first = use("one", "INSERT INTO {schema}.a VALUES ('x')")
    run("VACUUM ANALYZE one.a")
    assert use("two") == first
    assert run("SELECT * FROM two.a").fetchall() == []
    assert run("SELECT to_regnamespace('one')").fetchall() == [(None,)]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tables_are_dropped(use, change):
    first = use("one", change)
    assert use("two") != first


def test_schema_with_other_objects_is_dropped(use, spare, run):
    first = use("one")
    run("CREATE SCHEMA two; CREATE TABLE two.other ()")
    spare.create("two", "kind", DEFINITION.format(schema="two"))
    spare.release("two")
    assert run("SELECT to_regnamespace('two')").fetchall() == [(None,)]
    assert use("three") == first


def test_second_creation_in_a_schema_is_not_used_again(use, spare, run):
    run("CREATE SCHEMA one")
    spare.create("one", "kind", DEFINITION.format(schema="one"))
    spare.create("one", "other kind", "CREATE TABLE one.b ()")
    spare.release("one")
    assert run("SELECT to_regnamespace('one')").fetchall() == [(None,)]
