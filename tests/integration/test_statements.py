"""The plans of the statements: every access to a table uses an index."""

from __future__ import annotations

import psycopg
import pytest

from aibind_postgres._conversation_sql import ConversationStatements
from aibind_postgres._sql import StreamStatements
from aibind_postgres._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, Table

STREAM_STATEMENTS = StreamStatements(Table(None, CHUNKS_TABLE), Table(None, STATUS_TABLE))
CONVERSATION_STATEMENTS = ConversationStatements(Table(None, CONVERSATIONS_TABLE))

STREAM_PLANS = {
    "create": (["7", 1000, 10], ["(id = '7'"]),
    "append": (["7", "x", None, 1000], ["(id = '7'"]),
    "append_many": (["7", '["x"]', None, 1000], ["(id = '7'"]),
    "skipped": (["7", 3, '["x", "y"]'], ["(id = '7'", "(seq >= '3'"]),
    "read": (["7", 3, 2000], ["(id = '7'", "(seq > '3'"]),
    "read_timed": (["7", 3, 2000], ["(id = '7'", "(seq > '3'"]),
    "next": (["7", 3], ["(id = '7'", "(seq > '3'"]),
    "status": (["7"], ["(id = '7'"]),
    "standby_status": (["7"], ["(id = '7'"]),
    "poll": (['["7", "8"]'], ["(id = ANY"]),
    "end": (["7", "done", None, 1000], ["(id = '7'"]),
    "delete": (["7", 10], ["(id = '7'"]),
    "tombstones": ([], ["(expires_at = "]),
    "sweep": (["7", "t", 10], ["(id = 't'", "(id = '7'"]),
    "delete_leftovers": (["7", 10], ["(id = '7'", "(seq > "]),
    "list": ([None, "7", 2000], ["(id > '7'"]),
    "append_batch": (['[{"id": "7", "texts": ["x"]}, {"id": "8", "texts": ["y"]}]', 1000], ["(id = ANY", "(id = "]),
    "read_batch": (
        ['[{"index": 0, "id": "7", "after": 5, "limit": 100}]'],
        ["(id = wanted.id)", "(seq > wanted.after)"],
    ),
    "cleanup": ([10, 10], ["(expires_at <= ", "(id = ANY", "(id = expired.id"]),
    "fail_abandoned": ([1000, 1000, "x", "", 10], ["aibind_stream_status_active_idx", "(id = ANY", "(seq = "]),
}

CONVERSATION_PLANS = {
    "load": (["7", 1000], ["(session_id = '7'"]),
    "save": (["7", "{}", 1000, None, 1000], ["(session_id = '7'"]),
    "touch": (["7", 1000], ["(session_id = '7'"]),
    "delete": (["7"], ["(session_id = '7'"]),
    "list": (["7", 100], ["(session_id > '7'"]),
    "cleanup": ([10, 1000], ["(expires_at <= ", "(session_id = ANY"]),
}


@pytest.fixture
def connection(database):
    with psycopg.connect(database, autocommit=True, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(
            "INSERT INTO aibind_stream_status (id, state, total_chunks, expires_at) "
            "SELECT i::text, CASE WHEN i % 10 = 0 THEN 'active' ELSE 'done' END, 20, 1e15 + i "
            "FROM generate_series(1, 5000) i"
        )
        connection.execute(
            "INSERT INTO aibind_stream_chunks (id, seq, data) "
            "SELECT i::text, s, 'token' FROM generate_series(1, 5000) i, generate_series(1, 20) s"
        )
        connection.execute(
            "INSERT INTO aibind_conversations (session_id, data, expires_at) "
            "SELECT i::text, repeat('data', 100), CASE WHEN i % 10 = 0 THEN i ELSE 9e15 + i END "
            "FROM generate_series(1, 5000) i"
        )
        connection.execute("ANALYZE")
        yield connection


@pytest.mark.parametrize(
    ("statements", "plans"), [(STREAM_STATEMENTS, STREAM_PLANS), (CONVERSATION_STATEMENTS, CONVERSATION_PLANS)]
)
def test_statements_use_an_index(connection, statements, plans):
    for name, (params, conditions) in plans.items():
        plan = "\n".join(line for (line,) in connection.execute(f"EXPLAIN {getattr(statements, name)}", params))
        found = [line for line in plan.splitlines() if "Index Cond" in line or "Index Scan" in line]
        for condition in conditions:
            assert any(condition in line for line in found), f"{name}: {plan}"
        assert "Seq Scan" not in plan, f"{name}: {plan}"


def test_every_statement_has_a_plan_or_a_reason(connection):
    scans_the_status_table_by_design = {"list_by_time"}
    assert STREAM_PLANS.keys() | scans_the_status_table_by_design == vars(STREAM_STATEMENTS).keys()
    assert CONVERSATION_PLANS.keys() | {"overwrite"} == vars(CONVERSATION_STATEMENTS).keys()


@pytest.mark.parametrize("name", ["read", "read_timed", "read_batch"])
def test_page_of_a_long_stream_reads_one_page(connection, name):
    connection.execute("INSERT INTO aibind_stream_status VALUES ('long', 'active', NULL, 20000, 0)")
    connection.execute(
        "INSERT INTO aibind_stream_chunks (id, seq, data) SELECT 'long', i, 'token' FROM generate_series(1, 20000) i"
    )
    batch = ['[{"index": 0, "id": "long", "after": 5000, "limit": 100}]']
    params = batch if name == "read_batch" else ["long", 5000, 100]
    statement = f"EXPLAIN (ANALYZE, FORMAT JSON) {getattr(STREAM_STATEMENTS, name)}"
    for setting in ("on", "off"):  # both plans that the planner may choose
        connection.execute(f"SET enable_bitmapscan = {setting}")
        [([plan],)] = connection.execute(statement, params).fetchall()
        assert max(row_counts(plan["Plan"])) == 101


def row_counts(node):
    """Return the numbers of rows of a plan node and its descendants."""
    return [
        node["Actual Rows"] * node["Actual Loops"],
        *[n for child in node.get("Plans", []) for n in row_counts(child)],
    ]


@pytest.mark.parametrize("ttl", [1, 3, 7, 1000, 300_000, 10**12])
def test_expiry_is_rounded_up_to_a_quarter_of_the_ttl(database, ttl):
    quarter = max(ttl // 4, 1)
    appends = {
        "append": ["s", "x", None, ttl],
        "append_many": ["s", '["x", "y"]', None, ttl],
        "append_batch": ['[{"id": "s", "texts": ["x"]}]', ttl],
    }
    with psycopg.connect(database, autocommit=True, cursor_factory=psycopg.RawCursor) as connection:

        def now():
            [(time,)] = connection.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
            return time

        def check(stored, name, params):
            """Check the expiry after a statement. `stored` is the one before."""
            before = now()
            assert connection.execute(getattr(STREAM_STATEMENTS, name), params).fetchall()
            after = now()
            earliest, latest = (-(-(time + ttl) // quarter) * quarter for time in (before, after))
            [(expires_at,)] = connection.execute("SELECT expires_at FROM aibind_stream_status")
            assert max(stored, earliest) <= expires_at <= max(stored, latest)
            assert expires_at == stored or expires_at % quarter == 0
            return expires_at

        created = check(0, "create", ["s", ttl, 10])
        for name, params in appends.items():
            for stored in (created, -(2**63), now(), now() + ttl, now() + 2 * ttl, 2**63 - 1):
                connection.execute("UPDATE aibind_stream_status SET expires_at = $1", [stored])
                check(stored, name, params)
