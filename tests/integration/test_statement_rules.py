"""Rules for all statements, checked on their query trees: those of Citus, and one partition for each stream."""

from __future__ import annotations

import psycopg
import pytest
from support.query_trees import DELETE, INSERT, RELATION, SUBQUERY, UPDATE, Analyzer, walk

from aibind_postgres._conversation_sql import ConversationStatements
from aibind_postgres._sql import NOW, StreamStatements
from aibind_postgres._tables import CHUNKS_TABLE, CONVERSATIONS_TABLE, STATUS_TABLE, Table

TABLES = Table(None, CHUNKS_TABLE), Table(None, STATUS_TABLE)
CONVERSATIONS = Table(None, CONVERSATIONS_TABLE)
STATEMENTS = {
    **{f"{name} without 0004": sql for name, sql in vars(StreamStatements(*TABLES, "off")).items()},
    **vars(StreamStatements(*TABLES, "off", lease=1000, archive=True)),
    **{f"conversation {name} without 0004": sql for name, sql in vars(ConversationStatements(CONVERSATIONS)).items()},
    **{
        f"conversation {name}": sql
        for name, sql in vars(ConversationStatements(CONVERSATIONS, True, TABLES[1])).items()
    },
}
del STATEMENTS["append_distributed"]  # calls a function of sql/optional/citus.sql, and has no table

# The statements on several streams or conversations. Citus refuses those for which there is a form for distributed
# tables, or which have a loop over the streams in their place.
ON_SEVERAL = {"active", "expired", "poll", "running", "tombstones"}
ON_SEVERAL |= {f"list{of}{by}" for of in ("", "_of_session", "_of_owner") for by in ("", "_by_time")}
ON_SEVERAL |= {"conversation ids_of_owner", "conversation list_by_id"}
ON_SEVERAL |= {"archive", "cleanup_of_partitions"}  # not for distributed tables
WITH_ANOTHER_FORM = {"append_batch", "cleanup", "end_expired", "fail_abandoned", "read_batch", "renew_leases"}
WITH_ANOTHER_FORM |= {f"conversation {name}" for name in ("cleanup", "get_info", "list", "list_of_owner")}
FORMS_FOR_SEVERAL = {f"{name}_distributed" for name in WITH_ANOTHER_FORM} - {"end_expired_distributed"}

# `delete_leftovers_distributed` and, for each stream, `take_lease` are in their place. Citus refuses `archive`.
NOT_FOR_CITUS = {"archive", "delete_leftovers", "renew_leases"}


UPSERT = (
    "INSERT INTO aibind_stream_status AS s (id, state, total_chunks, expires_at) VALUES ($1, 'active', 0, 1) "
    "ON CONFLICT (id)"
)


@pytest.fixture(scope="module")
def analyzer(dsn):
    with psycopg.connect(dsn, autocommit=True) as connection:
        yield Analyzer(connection)


def broken_rules(analyzer, statement):
    """Return the rules of Citus that a statement breaks, each with the name of the function."""
    found = []
    for query in analyzer.queries(statement):
        conflict = query["onConflict"]
        places = {
            "CASE or COALESCE": [node for node in walk(query) if node.kind in ("CASEEXPR", "COALESCEEXPR")],
            "RETURNING": query["returningList"],
            "ON CONFLICT": conflict if conflict == "<>" else list(conflict.values.values()),
        }
        for place, nodes in places.items():
            found += [f"{call.function} in {place}" for call in analyzer.calls(nodes)]
        if query["commandType"] in (UPDATE, DELETE):
            for call in analyzer.calls([query["targetList"], query["jointree"]]):
                if call.volatility == "v":
                    found.append(f"{call.function} in UPDATE or DELETE")
                elif any(node.kind == "VAR" for node in walk(call.node)):
                    found.append(f"{call.function} of a column in UPDATE or DELETE")
    return found


def tables_of_any_stream(analyzer, statement):
    """Return the tables of a statement without the condition `id = $1`, or another parameter."""
    return [
        (query["commandType"], table["eref"]["aliasname"])
        for query in analyzer.queries(statement)
        for index, table in enumerate([] if query["rtable"] == "<>" else query["rtable"], start=1)
        if table["rtekind"] == RELATION
        and table["relkind"] in ("r", "p")
        and not (
            inserts_parameter(query)
            if index == int(query["resultRelation"]) and query["commandType"] == INSERT
            else is_pinned(query, index, table)
        )
    ]


def is_pinned(query, index, table):
    """Return True if the key of a table is compared with a parameter, by a condition that all rows must fulfil."""
    conditions, pending = [], [query["jointree"]["quals"]]
    while pending:
        condition = pending.pop()
        if getattr(condition, "kind", None) == "BOOLEXPR" and condition["boolop"] == "and":
            pending += condition["args"]
        else:
            conditions.append(condition)
    return any(is_comparison(condition, index, table) for condition in conditions)


def is_comparison(condition, index, table):
    if getattr(condition, "kind", None) != "OPEXPR":
        return False
    column, value = condition["args"]
    if (column.kind, value.kind) != ("VAR", "PARAM") or (column["varno"], column["varlevelsup"]) != (str(index), "0"):
        return False
    return table["eref"]["colnames"][int(column["varattno"]) - 1] in ('"id"', '"session_id"')


def inserts_parameter(query):
    """Return True if the key of an inserted row is made from a parameter."""
    [key] = [entry["expr"] for entry in query["targetList"] if entry["resno"] == "1"]
    if key.kind == "VAR":
        source = query["rtable"][int(key["varno"]) - 1]
        assert source["rtekind"] == SUBQUERY
        key = source["subquery"]["targetList"][int(key["varattno"]) - 1]
    return any(node.kind == "PARAM" for node in walk(key))


@pytest.mark.parametrize("name", STATEMENTS)
def test_citus_accepts_the_functions(analyzer, name):
    if name.removesuffix(" without 0004") not in NOT_FOR_CITUS:
        assert broken_rules(analyzer, STATEMENTS[name]) == []


@pytest.mark.parametrize("name", STATEMENTS)
def test_statement_on_one_stream_names_it_for_each_table(analyzer, name):
    if name.removesuffix(" without 0004") not in ON_SEVERAL | WITH_ANOTHER_FORM | FORMS_FOR_SEVERAL:
        assert tables_of_any_stream(analyzer, STATEMENTS[name]) == []


def test_each_exception_is_a_statement():
    names = {name.removesuffix(" without 0004") for name in STATEMENTS}
    assert names >= ON_SEVERAL | WITH_ANOTHER_FORM
    # Each append, read and renewal is a statement of its own if the tables are distributed.
    assert FORMS_FOR_SEVERAL - names == {
        f"{name}_distributed" for name in ("append_batch", "read_batch", "renew_leases")
    }


@pytest.mark.parametrize(
    ("statement", "rules"),
    [
        (f"SELECT CASE WHEN expires_at < {NOW} THEN 1 END FROM {STATUS_TABLE}", ["extract", "statement_timestamp"]),
        (f"SELECT CASE WHEN true THEN CASE WHEN false THEN 1 END ELSE {NOW} END", ["extract", "statement_timestamp"]),
        ("SELECT coalesce($1::text::timestamptz, '-infinity')", ["timestamptz_in"]),
        ("SELECT coalesce(created_at::text, '') FROM aibind_stream_status", ["timestamptz_out"]),
        ("SELECT coalesce(created_at, current_timestamp) FROM aibind_stream_status", ["current_timestamp"]),
        ("SELECT coalesce($1::timestamptz, $1 + interval '1 day')", ["timestamptz_pl_interval"]),
        ("DELETE FROM aibind_stream_status WHERE id = $1 RETURNING now()", ["now"]),
        ("WITH a AS (DELETE FROM aibind_stream_status WHERE id = $1 RETURNING now()) SELECT now() FROM a", ["now"]),
        ("UPDATE aibind_stream_status SET error = gen_random_uuid() WHERE id = $1", ["gen_random_uuid"]),
        ("UPDATE aibind_stream_status SET error = to_jsonb(state) WHERE id = $1", ["to_jsonb"]),
        (
            "DELETE FROM aibind_stream_status WHERE id = $1 AND date_trunc('day', created_at) = $2",
            ["date_trunc"],
        ),
        (f"{UPSERT} DO UPDATE SET error = now()", ["now", "timestamptz_out"]),
        (f"{UPSERT} DO UPDATE SET error = '' WHERE s.created_at < now()", ["now"]),
        (f"{UPSERT} DO NOTHING RETURNING set_config('a.b', 'c', true)", ["set_config"]),
    ],
)
def test_function_that_citus_refuses_is_found(analyzer, statement, rules):
    assert {rule.split()[0] for rule in broken_rules(analyzer, statement)} == set(rules)


@pytest.mark.parametrize(
    "statement",
    [
        f"UPDATE {STATUS_TABLE} SET expires_at = greatest(expires_at, {NOW}) WHERE expires_at < {NOW} RETURNING id",
        "SELECT CASE WHEN state = 'now()' THEN 1 END, now() FROM aibind_stream_status",
        "SELECT coalesce($1::timestamptz, '-infinity'), coalesce($2::text, '')::timestamptz",
        "WITH a AS (DELETE FROM aibind_stream_status RETURNING id) SELECT now() FROM a",
        f"{UPSERT} DO UPDATE SET expires_at = excluded.expires_at WHERE s.error < excluded.error RETURNING s.id",
    ],
)
def test_function_elsewhere_is_allowed(analyzer, statement):
    assert broken_rules(analyzer, statement) == []


@pytest.mark.parametrize(
    ("statement", "tables"),
    [
        ("SELECT 1 FROM aibind_stream_status WHERE id = $1", 0),
        ("SELECT 1 FROM aibind_stream_status AS s, aibind_stream_chunks AS c WHERE s.id = $1 AND c.id = $1", 0),
        ("SELECT 1 FROM aibind_stream_status AS s, aibind_stream_chunks AS c WHERE s.id = $1 AND c.id = s.id", 1),
        ("SELECT 1 FROM aibind_stream_status WHERE id = $1 OR state = 'done'", 1),
        ("SELECT 1 FROM aibind_stream_status WHERE state = $1", 1),
        ("SELECT (SELECT max(seq) FROM aibind_stream_chunks) FROM aibind_stream_status WHERE id = $1", 1),
        ("UPDATE aibind_stream_status SET error = '' WHERE id IN (SELECT $1::text)", 1),
        ("DELETE FROM aibind_stream_chunks WHERE seq = 1", 1),
        ("INSERT INTO aibind_stream_chunks (id, seq, data) SELECT $1::text, 1, ''", 0),
        ("INSERT INTO aibind_stream_chunks (id, seq, data) VALUES ('a', 1, $1)", 1),
    ],
)
def test_table_of_any_stream_is_found(analyzer, statement, tables):
    assert len(tables_of_any_stream(analyzer, statement)) == tables
