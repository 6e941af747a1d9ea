"""Rules for the text of all statements."""

from __future__ import annotations

import pytest
from support.volatility import mutable_calls

from aibind_postgres._conversation_sql import ConversationStatements
from aibind_postgres._sql import NOW, StreamStatements
from aibind_postgres._tables import Table

STREAM_TABLES = Table(None, "chunks"), Table(None, "status")
SEED_STATEMENTS = StreamStatements(*STREAM_TABLES, synchronous_commit="off")
STREAM_STATEMENTS = StreamStatements(*STREAM_TABLES, synchronous_commit="off", lease=1000, archive=True)
SEED_CONVERSATION_STATEMENTS = ConversationStatements(Table(None, "conversations"))
CONVERSATION_STATEMENTS = ConversationStatements(Table(None, "conversations"), True, Table(None, "status"))
STATEMENTS = [
    *[pytest.param(sql, id=f"{name} without 0004") for name, sql in vars(SEED_STATEMENTS).items()],
    *[pytest.param(sql, id=name) for name, sql in vars(STREAM_STATEMENTS).items()],
    *[
        pytest.param(sql, id=f"conversation {name} without 0004")
        for name, sql in vars(SEED_CONVERSATION_STATEMENTS).items()
    ],
    *[pytest.param(sql, id=f"conversation {name}") for name, sql in vars(CONVERSATION_STATEMENTS).items()],
]


@pytest.mark.parametrize("sql", STATEMENTS)
def test_functions_are_immutable_where_citus_requires_it(sql):
    assert mutable_calls(sql) == []


@pytest.mark.parametrize(
    ("sql", "calls"),
    [
        (f"SELECT CASE WHEN a < {NOW} THEN 1 END", ["extract", "statement_timestamp"]),
        (f"SELECT CASE WHEN a THEN CASE WHEN b THEN 1 END ELSE {NOW} END", ["extract", "statement_timestamp"]),
        ("SELECT coalesce((to_jsonb(s) ->> 'x')::timestamptz, now())", ["to_jsonb", "::timestamptz", "now"]),
        ("SELECT coalesce($1::text::timestamptz, '-infinity')", ["::timestamptz"]),
        ("SELECT coalesce(a, current_timestamp)", ["current_timestamp"]),
        ("SELECT coalesce(a, b + interval '1 second')", ["interval"]),
        ("WITH a AS (DELETE FROM t RETURNING now()) SELECT now()", ["now"]),
        ("DELETE FROM t WHERE a < now() RETURNING gen_random_uuid()", ["gen_random_uuid"]),
        ("INSERT INTO t VALUES (now()) ON CONFLICT (a) DO UPDATE SET b = 1 WHERE t.a < now() RETURNING 1", ["now"]),
        ("INSERT INTO t VALUES (1) ON CONFLICT (a) DO NOTHING RETURNING set_config('a', 'b', true)", ["set_config"]),
    ],
)
def test_mutable_function_is_found(sql, calls):
    assert mutable_calls(sql) == calls


@pytest.mark.parametrize(
    "sql",
    [
        f"UPDATE t SET a = greatest(a, {NOW}) WHERE b < {NOW} RETURNING a",
        "SELECT CASE WHEN a THEN 'now()' END, now()",
        'SELECT coalesce("now" (a), 1), now()',
        "SELECT coalesce($1::timestamptz, '-infinity'), coalesce($2::text, '')::timestamptz",
        "SELECT CASE WHEN sum(octet_length(a)) OVER (ORDER BY b) <= 1 THEN (a) END",
        "WITH a AS (DELETE FROM t RETURNING a, (b)) SELECT now() FROM a",
    ],
)
def test_function_elsewhere_is_allowed(sql):
    assert mutable_calls(sql) == []
