"""The plans of the statements: every access uses an index. The times they store."""

from __future__ import annotations

import json

import psycopg
import pytest
from support import servers

from aibind_postgres._conversation_sql import ConversationStatements
from aibind_postgres._sql import StreamStatements
from aibind_postgres._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, Table

SEED_STATEMENTS = StreamStatements(Table(None, CHUNKS_TABLE), Table(None, STATUS_TABLE))
STREAM_STATEMENTS = StreamStatements(Table(None, CHUNKS_TABLE), Table(None, STATUS_TABLE), lease=15_000, archive=True)
SEED_CONVERSATION_STATEMENTS = ConversationStatements(Table(None, CONVERSATIONS_TABLE))
CONVERSATION_STATEMENTS = ConversationStatements(Table(None, CONVERSATIONS_TABLE), True, Table(None, STATUS_TABLE))

STREAM_PLANS = {
    "create": (["7", 1000, 10], ["(id = '7'"]),
    "create_with_details": (["7", 1000, "s", "o", "{}", 5, 10, "sse", 10], ["(id = '7'"]),
    "append": (["7", "x", None, 1000], ["(id = '7'"]),
    "append_many": (["7", '["x"]', None, 1000], ["(id = '7'"]),
    "skipped": (["7", 3, '["x", "y"]'], ["(id = '7'", "(seq >= '3'"]),
    "read": (["7", 3, 2000], ["(id = '7'", "(seq > '3'"]),
    "read_timed": (["7", 3, 2000], ["(id = '7'", "(seq > '3'"]),
    "origin": (["7", 3, 2000], ["(id = '7'", "(seq > '3'", "(seq = LEAST("]),
    "read_replica": (["7", 3, 2000], ["(id = '7'", "(seq > '3'", "(seq = LEAST("]),
    "read_replica_timed": (["7", 3, 2000], ["(id = '7'", "(seq > '3'", "(seq = LEAST("]),
    "next": (["7", 3], ["(id = '7'", "(seq > '3'"]),
    "status": (["7"], ["(id = '7'"]),
    "get_info": (["7"], ["(id = '7'"]),
    "running": (["o5", 2], ["(owner = 'o5'"]),
    "standby_status": (["7"], ["(id = '7'"]),
    "age": (["7", 3], ["(id = '7'", "(seq = '3'"]),
    "poll": (['["7", "8"]'], ["(id = "]),
    "end": (["7", "done", None, 1000], ["(id = '7'"]),
    "delete": (["7", 10], ["(id = '7'"]),
    "tombstones": ([], ["(expires_at = "]),
    "sweep": (["7", "t", 10], ["(id = 't'", "(id = '7'"]),
    "delete_leftovers": (["7", 10], ["(id = '7'", "(seq > "]),
    "list": ([None, "7", 2000], ["(id > '7'"]),
    "list_of_session": ([None, "7", 2000, "s5", None], ["(session_id = 's5'"]),
    "list_of_session_by_time": ([None, "7", 2000, None, None, None, "s5", None], ["(session_id = 's5'"]),
    "list_of_owner": ([None, "7", 2000, "o5"], ["(owner = 'o5'"]),
    "list_of_owner_by_time": ([None, "7", 2000, None, None, None, "o5"], ["(owner = 'o5'"]),
    "active": (["s5", 10, True, "o5"], ["aibind_stream_status_running_idx", "(session_id = 's5'"]),
    "take_lease": (["7"], ["(id = '7'"]),
    "drop_lease": (["7"], ["(id = '7'"]),
    "renew_leases": (['["7", "8"]'], ["(id = "]),
    "end_expired": (['["7", "8"]', "x", 1000], ["(id = "]),
    "expired": (["7", 1000], ["aibind_stream_status_active_idx"]),
    "append_batch": (
        ['[{"id": "7", "texts": ["x"]}, {"id": "8", "texts": ["y"]}]', 1000],
        ["(id = wanted.id", "(id = locked.id"],
    ),
    "read_batch": (
        ['[{"index": 0, "id": "7", "after": 5, "limit": 100}]'],
        ["(id = wanted.id)", "(seq > wanted.after)"],
    ),
    "cleanup": ([10, 10], ["(expires_at <= ", "(id = emptied.id", "(id = ended.id"]),
    "cleanup_of_partitions": ([10, 1000, "7", "8", 10], ["(expires_at <= ", "(id = emptied.id", "(id = ended.id"]),
    "cleanup_distributed": ([10, 10], ["(expires_at <= ", "Scan Backward", "(id = ended.id", "(id = emptied.id"]),
    "fail_abandoned": (
        [1000, 1000, "x", "", 10, False],
        ["aibind_stream_status_active_idx", "(seq <= page", "(id = silent.id", "(id = abandoned.id"],
    ),
    "archive": (
        [1000, 100],
        [
            "aibind_stream_status_archivable_idx",
            "(seq <= s.total_chunks",
            "(id = locked.id",
            "(id = t.id",
            "(id = f.id",
        ],
    ),
    "unarchive": (["7"], ["(id = '7'", "(first_seq >= "]),
    "read_archived": (["7", 3, 2000], ["(id = '7'", "(seq > '3'", "(first_seq >= "]),
    "read_archived_timed": (["7", 3, 2000], ["(id = '7'", "(seq > '3'", "(first_seq >= "]),
    "read_replica_archived": (["7", 3, 2000], ["(id = '7'", "(seq > '3'", "(first_seq >= ", "(seq = LEAST("]),
    "read_replica_archived_timed": (["7", 3, 2000], ["(id = '7'", "(seq > '3'", "(first_seq >= ", "(seq = LEAST("]),
    "fail_abandoned_distributed": (
        [1000, 1000, "x", "", 10, False],
        ["aibind_stream_status_active_idx", "(seq <= s", "(id = s.id", "(id = abandoned.id"],
    ),
    "end_expired_distributed": (["7", "x", 1000], ["(id = '7'"]),
    "delete_leftovers_distributed": (["7", 10], ["(id = '7'", "(seq > "]),
    "take_turn": (["m", 1000, STATUS_TABLE], ["(id = 'm'"]),
}

ACTIVE_STREAM = ["aibind_stream_status_running_idx", "(session_id = c.session_id"]
ACTIVE_STREAMS = ["aibind_stream_status_running_idx", "(session_id = ANY"]
CONVERSATION_PLANS = {
    "load": (["7", 1000, "o"], ["(session_id = '7'"]),
    "save": (["7", "{}", 1000, None, 1000, False, "o", "2026-01-01", True], ["(session_id = '7'"]),
    "touch": (["7", 1000], ["(session_id = '7'"]),
    "describe": (["7", True, "t", False, None, True, "o"], ["(session_id = '7'"]),
    "delete": (["7"], ["(session_id = '7'"]),
    "get_info": (["7"], ["(session_id = '7'", *ACTIVE_STREAM]),
    "get_info_distributed": (["7"], ["(session_id = '7'", *ACTIVE_STREAMS]),
    "list": (["infinity", "", 100], ["aibind_conversations_updated_at_idx", "(ROW(updated_at, ", *ACTIVE_STREAM]),
    "list_distributed": (
        ["infinity", "", 100],
        ["aibind_conversations_updated_at_idx", "(ROW(updated_at, ", *ACTIVE_STREAMS],
    ),
    "list_of_owner": (
        ["2100-01-01", "7", 100, "o5"],
        ["aibind_conversations_owner_idx", "(owner = 'o5'", "(ROW(updated_at, ", *ACTIVE_STREAM],
    ),
    "list_of_owner_distributed": (
        ["2100-01-01", "7", 100, "o5"],
        ["aibind_conversations_owner_idx", "(owner = 'o5'", "(ROW(updated_at, ", *ACTIVE_STREAMS],
    ),
    "ids_of_owner": (["o5", "7", 100], ["(owner = 'o5'"]),
    "delete_of_owner": (["7", "o7"], ["(session_id = '7'"]),
    "cleanup": ([10, 1000], ["(expires_at <= ", "(session_id = chosen.session_id"]),
    "cleanup_distributed": ([10, 1000], ["(expires_at <= ", "(session_id = chosen.session_id"]),
    "take_turn": (["m", 1000, CONVERSATIONS_TABLE], ["(session_id = 'm'"]),
}
SEED_CONVERSATION_PLANS = {
    "load": (["7", 1000], ["(session_id = '7'"]),
    **{name: CONVERSATION_PLANS[name] for name in ("touch", "delete", "cleanup", "cleanup_distributed", "take_turn")},
    "save": (["7", "{}", 1000, None, 1000, False], ["(session_id = '7'"]),
    "get_info": (["7"], ["(session_id = '7'"]),
    "get_info_distributed": (["7"], ["(session_id = '7'"]),
    "list_by_id": (["7", 100], ["(session_id > '7'"]),
}


@pytest.fixture
def connection(database):
    with psycopg.connect(database, autocommit=True, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(
            "INSERT INTO aibind_stream_status (id, state, total_chunks, expires_at, session_id, owner) "
            "SELECT i::text, CASE WHEN i % 10 = 0 THEN 'active' ELSE 'done' END, 20, 1e15 + i, 's' || i, 'o' || i "
            "FROM generate_series(1, 5000) i"
        )
        connection.execute(
            "INSERT INTO aibind_stream_chunks (id, seq, data) "
            "SELECT i::text, s, 'token' FROM generate_series(1, 5000) i, generate_series(1, 20) s"
        )
        connection.execute(
            "INSERT INTO aibind_conversations (session_id, data, expires_at, owner) "
            "SELECT i::text, repeat('data', 100), CASE WHEN i % 10 = 0 THEN i ELSE 9e15 + i END, 'o' || i % 100 "
            "FROM generate_series(1, 5000) i"
        )
        connection.execute(
            "INSERT INTO aibind_stream_chunks_archive (id, first_seq, last_seq, texts) "
            "SELECT i::text, p * 100 + 1000, p * 100 + 1099, '[]' "
            "FROM generate_series(1, 5000) i, generate_series(1, 5) p"
        )
        connection.execute("ANALYZE")
        yield connection


@pytest.mark.skipif(
    servers.PARTITIONS is not None,
    reason="the indexes of partitions have other names: test_partitions.py tests the plans for partitions",
)
@pytest.mark.parametrize(
    ("statements", "plans"),
    [
        (STREAM_STATEMENTS, STREAM_PLANS),
        (SEED_STATEMENTS, {name: STREAM_PLANS[name] for name in vars(SEED_STATEMENTS).keys() & STREAM_PLANS}),
        (CONVERSATION_STATEMENTS, CONVERSATION_PLANS),
        (SEED_CONVERSATION_STATEMENTS, SEED_CONVERSATION_PLANS),
    ],
)
def test_statements_use_an_index(connection, statements, plans):
    for name, (params, conditions) in plans.items():
        plan = "\n".join(line for (line,) in connection.execute(f"EXPLAIN {getattr(statements, name)}", params))
        found = [line for line in plan.splitlines() if "Index" in line]
        for condition in conditions:
            assert any(condition in line for line in found), f"{name}: {plan}"
        assert "Seq Scan" not in plan, f"{name}: {plan}"


@pytest.mark.skipif(servers.PARTITIONS is not None, reason="the indexes of partitions have other names")
@pytest.mark.parametrize(
    ("statements", "table"),
    [(STREAM_STATEMENTS, "aibind_stream_status"), (CONVERSATION_STATEMENTS, "aibind_conversations")],
)
def test_cleanup_reads_expired_rows_once_with_old_statistics(connection, statements, table):
    connection.execute(f"UPDATE {table} SET expires_at = 9e15")
    connection.execute(f"ANALYZE {table}")
    connection.execute(f"UPDATE {table} SET expires_at = 1")
    for name in ("cleanup", "cleanup_distributed"):
        explained = connection.execute(f"EXPLAIN (FORMAT json) {getattr(statements, name)}", [1000, 1_000_000])
        plan = json.dumps(explained.fetchone()[0])
        assert plan.count(f"{table}_expires_at_idx") == 1, f"{name}: {plan}"


def test_every_statement_has_a_plan_or_a_reason(connection):
    scans_the_status_table_by_design = {"list_by_time"}
    calls_a_function = {"append_distributed"}
    assert STREAM_PLANS.keys() | scans_the_status_table_by_design | calls_a_function == vars(STREAM_STATEMENTS).keys()
    assert CONVERSATION_PLANS.keys() | {"overwrite"} == vars(CONVERSATION_STATEMENTS).keys()
    assert SEED_CONVERSATION_PLANS.keys() | {"overwrite"} == vars(SEED_CONVERSATION_STATEMENTS).keys()


@pytest.mark.parametrize("name", ["read", "read_timed", "read_batch", "read_replica"])
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


def test_archiving_of_a_long_stream_reads_one_batch(connection):
    connection.execute(
        "INSERT INTO aibind_stream_status (id, state, total_chunks, expires_at, created_at) "
        "VALUES ('long', 'done', 20000, 0, '2000-01-01')"
    )
    connection.execute(
        "INSERT INTO aibind_stream_chunks (id, seq, data, created_at) "
        "SELECT 'long', i, 'token', '2000-01-01' FROM generate_series(1, 20000) i"
    )
    statement = f"EXPLAIN (ANALYZE, FORMAT JSON) {STREAM_STATEMENTS.archive}"
    for setting in ("on", "off"):  # both plans that the planner may choose
        connection.execute(f"SET enable_bitmapscan = {setting}")
        [([plan],)] = connection.execute(statement, [10**9, 100]).fetchall()
        assert max(row_counts(plan["Plan"])) == 101


def test_last_chunk_of_a_long_stream_is_found_by_the_index(connection):
    connection.execute("INSERT INTO aibind_stream_status VALUES ('long', 'active', NULL, 20000, 0)")
    connection.execute(
        "INSERT INTO aibind_stream_chunks (id, seq, data) SELECT 'long', i, 'token' FROM generate_series(1, 20000) i"
    )
    statement = f"EXPLAIN (ANALYZE, FORMAT JSON) {STREAM_STATEMENTS.fail_abandoned}"
    for setting in ("on", "off"):
        connection.execute(f"SET enable_bitmapscan = {setting}")
        [([plan],)] = connection.execute(statement, [1000, 10**9, "x", "", 1000, False]).fetchall()
        assert max(row_counts(plan["Plan"])) == 501  # the active streams


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
