"""The function of `sql/optional/citus.sql` stores what the statements of an append store, on the same clock."""

from __future__ import annotations

import json

import psycopg
import pytest

from aibind_postgres import schema
from aibind_postgres._sql import StreamStatements
from aibind_postgres._tables import CHUNKS_TABLE, STATUS_TABLE, Table

LEASE = 15_000
STATEMENTS = StreamStatements(Table(None, CHUNKS_TABLE), Table(None, STATUS_TABLE), lease=LEASE)

# The statements find this function instead of PostgreSQL's, by the search_path.
CLOCK = """
CREATE TABLE clock (milliseconds bigint NOT NULL);
INSERT INTO clock VALUES (1800000000001);
CREATE FUNCTION statement_timestamp() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT to_timestamp(milliseconds / 1000.0) FROM clock';
"""


@pytest.fixture
def connection(dsn, schema_name):
    with psycopg.connect(dsn, autocommit=True, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(f'SET search_path = "{schema_name}", pg_catalog')
        text = schema.render() + schema._read("optional/citus.sql").split("DO $distribute$")[0]
        psycopg.ClientCursor(connection).execute(text)
        psycopg.ClientCursor(connection).execute(CLOCK)
        yield connection


ROWS = {
    "active": "('{}', 'active', NULL, 2, 1, NULL, NULL)",
    "with details": "('{}', 'active', NULL, 2, 1, 7000, 5)",
    "with a long lease": "('{}', 'active', NULL, 2, 9e15, NULL, 9e15)",
    "ended": "('{}', 'done', NULL, 2, 1, NULL, NULL)",
    "broken": "('{}', 'active', NULL, -1, 1, NULL, NULL)",
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_function_stores_what_the_statement_stores(connection, row):
    for texts in (["x"], ["", 'a"\\\n', "é🙂"], ["x"] * 20):
        for expected in (None, 2, 3, 4):
            connection.execute("DELETE FROM aibind_stream_status")
            connection.execute("DELETE FROM aibind_stream_chunks")
            for id in ("by function", "by statement"):
                connection.execute(
                    "INSERT INTO aibind_stream_status "
                    f"(id, state, error, total_chunks, expires_at, ttl_ms, lease_until) VALUES {row.format(id)}"
                )
            params = [json.dumps(texts), expected, 300_000]
            [(last,)] = connection.execute(STATEMENTS.append_distributed, ["by function", *params]).fetchall()
            rows = connection.execute(STATEMENTS.append_many, ["by statement", *params]).fetchall()
            assert rows == ([] if last is None else [(last,)])
            assert (last is None) == (expected in (2, 4) or row in (ROWS["ended"], ROWS["broken"]))
            assert stored(connection, "by function") == stored(connection, "by statement")


def stored(connection, id):
    """Return the rows of a stream, without its id and its time of creation."""
    return [
        connection.execute(
            f"SELECT to_jsonb(t) - 'id' - 'created_at' FROM aibind_stream_{table} t WHERE id = $1 ORDER BY 1", [id]
        ).fetchall()
        for table in ("status", "chunks")
    ]


def test_missing_stream_is_skipped(connection):
    params = ["missing", '["x"]', None, 1000]
    assert connection.execute(STATEMENTS.append_distributed, params).fetchall() == [(None,)]


@pytest.mark.parametrize(
    ("statement", "ttl"), [("append", 4_000), ("append", 300_000), ("append_distributed", 300_000)]
)
def test_updates_are_heap_only_at_one_append_per_20_ms(connection, dsn, schema_name, statement, ttl):
    connection.execute(STATEMENTS.create, ["s", ttl, 10])
    for number in range(500):
        connection.execute("UPDATE clock SET milliseconds = milliseconds + 20")
        text = str(number)
        data = text if statement == "append" else json.dumps([text])
        assert connection.execute(getattr(STATEMENTS, statement), ["s", data, None, ttl]).fetchall() == [(number + 1,)]
    connection.close()  # a session reports its last statistics at its end
    with psycopg.connect(dsn, autocommit=True) as other:
        updates = 0
        while updates < 500:
            [(updates, hot)] = other.execute(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
                "WHERE schemaname = %s AND relname = 'aibind_stream_status'",
                [schema_name],
            )
    assert updates == 500
    assert hot >= 0.95 * updates
