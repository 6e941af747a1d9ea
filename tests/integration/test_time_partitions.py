"""Tables with partitions by time: their creation, existing partitions, and the partitions that statements read."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import datetime, timedelta, timezone

import psycopg
import pytest
from integration.test_partitions import SEARCHES, executed_nodes, leaf_options, leaves_read
from integration.test_schema import NAMES, columns, objects
from integration.test_statements import STREAM_PLANS, STREAM_STATEMENTS
from psycopg.conninfo import make_conninfo

from aibind_postgres import PostgresStreamStore, SchemaError, schema
from aibind_postgres._tables import CHUNKS_TABLE, STATUS_TABLE, Table
from aibind_postgres._time_partition_sql import create_statement, drop_statement, may_drop_statement
from aibind_postgres._time_partitions import AHEAD, bound, days_ahead, default_partitions, partition

TODAY = datetime.now(timezone.utc).date()
STATUS, CHUNKS = Table(None, STATUS_TABLE), Table(None, CHUNKS_TABLE)
TABLES = (STATUS, CHUNKS, CHUNKS.archive)
STORAGE_OPTIONS = ["fillfactor=50", "autovacuum_vacuum_scale_factor=0.05"]


@pytest.fixture
def admin(empty_database):
    with psycopg.connect(empty_database, autocommit=True, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute("CREATE SCHEMA my")
        yield connection


def partitions_of(admin, table):
    """Return the names of the partitions of a table."""
    rows = admin.execute(
        "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = $1::regclass", [table.quoted]
    )
    return {name for (name,) in rows}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_migrate_creates_partitions_by_time(admin, empty_database, names):
    schema.migrate(empty_database, **names, partitions="time", notify_trigger=True)
    created = columns(admin), objects(admin), leaf_options(admin)
    chunks, status = (
        Table.parse(names.get(name, default))
        for name, default in (("chunks_table", CHUNKS_TABLE), ("status_table", STATUS_TABLE))
    )
    expected = {}
    for table in (status, chunks, chunks.archive):
        options = STORAGE_OPTIONS if table == status else None
        days = [partition(table, day).name for day in days_ahead(TODAY)]
        default, *parts = (part.name for part in default_partitions(table))
        assert partitions_of(admin, table) == {*days, default}
        expected |= dict.fromkeys([*days, *parts], options)
        [(collation,)] = admin.execute(
            "SELECT collname FROM pg_attribute JOIN pg_collation c ON c.oid = attcollation "
            "WHERE attrelid = $1::regclass AND attname = 'id'",
            [table.quoted],
        )
        assert collation == "C"
    assert leaf_options(admin) == expected
    assert all(len(name.encode()) <= 63 for name in [*leaf_options(admin), *dict(objects(admin))])
    schema.migrate(empty_database, **names, notify_trigger=True)
    schema.migrate(empty_database, **names, partitions="time", notify_trigger=True)
    asyncio.run(schema.async_migrate(empty_database, **names, partitions="time", notify_trigger=True))
    assert (columns(admin), objects(admin), leaf_options(admin)) == created
    with PostgresStreamStore(empty_database, **{k: names[k] for k in names if "conv" not in k}) as store:
        id = store.create()
        store.append(id, "a")
        store.complete(id)
        assert store.archive(older_than=0) == (1, 1)
        assert [chunk.data for chunk in store.read_from(id)] == ["a"]
    admin.execute("DROP SCHEMA my CASCADE; DROP SCHEMA public CASCADE; CREATE SCHEMA my; CREATE SCHEMA public")
    admin.execute(schema.render(**names, partitions="time", notify_trigger=True).encode())
    for table in (status, chunks, chunks.archive):  # stored SQL contains no dates
        assert partitions_of(admin, table) == {default_partitions(table)[0].name}
    schema.migrate(empty_database, **names, partitions="time", notify_trigger=True)
    assert (columns(admin), objects(admin), leaf_options(admin)) == created


@pytest.mark.parametrize(
    ("existing", "wanted", "text"),
    [
        (
            None,
            "time",
            "aibind_stream_chunks is not partitioned by time: omit partitions, or move .*docs/partitions.md",
        ),
        (4, "time", "aibind_stream_chunks is not partitioned by time"),
        ("time", 4, "aibind_stream_chunks is not partitioned by hash"),
    ],
)
def test_other_partitions_are_refused(admin, empty_database, existing, wanted, text):
    schema.migrate(empty_database, partitions=existing)
    before = columns(admin), objects(admin)
    with pytest.raises(SchemaError, match=text):
        schema.migrate(empty_database, partitions=wanted)
    with pytest.raises(psycopg.Error, match=text):
        admin.execute(schema.render(partitions=wanted).encode())
    assert (columns(admin), objects(admin)) == before


def test_another_collation_is_refused(admin, empty_database):
    admin.execute(
        "CREATE TABLE aibind_stream_chunks (id text, seq int, data text, PRIMARY KEY (id, seq)) PARTITION BY RANGE (id)"
    )
    with pytest.raises(SchemaError, match="aibind_stream_chunks is not partitioned by time"):
        schema.migrate(empty_database, partitions="time")


def test_names_of_partitions_are_not_those_of_tables():
    with pytest.raises(ValueError, match=r'"s"."x_default" is that of a partition of "s"."x"'):
        schema.render(chunks_table="s.x", status_table="s.x_default", partitions="time")
    for wrong in ("day", "TIME", b"time"):
        with pytest.raises(TypeError, match="'time'"):
            schema.render(partitions=wrong)


def test_role_that_may_not_change_the_tables_can_migrate_again(admin, empty_database):
    schema.migrate(empty_database, partitions="time")
    admin.execute(f"DROP TABLE {', '.join(partition(table, TODAY).quoted for table in reversed(TABLES))}")
    role = f"role_{uuid.uuid4().hex}"
    admin.execute(f"CREATE ROLE {role}")
    try:
        for options in (f"-c role={role}", "-c default_transaction_read_only=on"):
            schema.migrate(make_conninfo(empty_database, options=options), partitions="time")
    finally:
        admin.execute(f"DROP ROLE {role}")
    assert partition(STATUS, TODAY).name not in partitions_of(admin, STATUS)
    schema.migrate(empty_database, partitions="time")
    assert len(partitions_of(admin, STATUS)) == AHEAD + 2


def test_migrate_moves_any_number_of_rows(admin, empty_database):
    admin.execute(schema.render(partitions="time").encode())
    admin.execute(
        "INSERT INTO aibind_stream_status SELECT $1 || i, 'active', NULL, 30, 1 FROM generate_series(1, 200) i",
        [bound(TODAY)],
    )
    admin.execute(
        "INSERT INTO aibind_stream_chunks "
        "SELECT $1 || i, s, 'a' FROM generate_series(1, 200) i, generate_series(1, 30) s",
        [bound(TODAY)],
    )
    admin.execute(create_statement(TABLES, TODAY))  # as the housekeeper does
    assert len(partitions_of(admin, STATUS)) == 1
    schema.migrate(empty_database, partitions="time")
    for table, count in ((STATUS, 200), (CHUNKS, 6000)):
        [(leaf, found)] = admin.execute(f"SELECT tableoid::regclass::text, count(*) FROM {table.quoted} GROUP BY 1")
        assert (leaf, found) == (partition(table, TODAY).name, count)


def test_migrate_moves_rows_with_generated_columns(admin, empty_database):
    names = {"chunks_table": "my.50%1$s_chunks", "status_table": "my.50%s_status"}
    chunks = Table.parse(names["chunks_table"])
    admin.execute(schema.render(**names, partitions="time").encode())
    admin.execute(f"ALTER TABLE {chunks.quoted} ADD size int GENERATED ALWAYS AS (length(data)) STORED")
    with PostgresStreamStore(empty_database, **names) as store:
        id = store.create()
        store.append(id, "abc")
        schema.migrate(empty_database, **names, partitions="time")
        assert [chunk.data for chunk in store.read_from(id, follow=False)] == ["abc"]
    found = admin.execute(
        f"SELECT tableoid::regclass = $1::regclass, size FROM {chunks.quoted}", [partition(chunks, TODAY).quoted]
    ).fetchall()
    assert found == [(True, 3)]


def test_missing_partitions_are_not_dropped(admin, empty_database):
    schema.migrate(empty_database, partitions="time")
    before = objects(admin)
    yesterday = TODAY - timedelta(days=1)  # another process has dropped it
    admin.execute(drop_statement(TABLES, yesterday, [["id"]] * 3))
    admin.execute(f"CREATE TABLE {partition(STATUS, yesterday).quoted} (LIKE aibind_stream_status)")  # of somebody else
    admin.execute(drop_statement(TABLES, yesterday, [["id"]] * 3))
    admin.execute(create_statement(TABLES, yesterday))
    assert admin.execute("SELECT to_regclass($1)::text", [partition(STATUS, yesterday).name]).fetchone() is not None
    assert objects(admin) == before


def test_other_ids_are_not_scanned_when_a_partition_is_attached(admin, empty_database):
    schema.migrate(empty_database, partitions="time")
    found = []
    admin.add_notice_handler(lambda notice: found.append(notice.message_primary))
    admin.execute("SET client_min_messages = debug1")
    day = TODAY + timedelta(days=AHEAD + 1)
    admin.execute(create_statement(TABLES, day))
    verified = {message for message in found if message.startswith("verifying table")}
    new = {f'verifying table "{partition(table, day).name}"' for table in TABLES}
    assert verified - new == {f'verifying table "{default_partitions(table)[1].name}"' for table in TABLES}
    for table in TABLES:
        other = default_partitions(table)[2].name
        assert any(f'"{other}" is implied by existing constraints' in message for message in found)


@pytest.fixture(params=[False, True], ids=["not analyzed", "analyzed"])
def partitioned(request, admin, empty_database):
    """A connection to a database with 3,000 streams in the partitions of 5 days and in DEFAULT, and their ids."""
    schema.migrate(empty_database, partitions="time")
    for number in (-2, -1):
        admin.execute(create_statement(TABLES, TODAY + timedelta(days=number)))
    starts = [bound(TODAY + timedelta(days=number)) for number in (-2, -1, 0, 1, -9)] + ["other"]
    admin.execute(
        "INSERT INTO aibind_stream_status (id, state, total_chunks, expires_at, session_id, owner, lease_until) "
        "SELECT start || '-' || i, CASE WHEN i % 10 = 7 THEN 'active' ELSE 'done' END, 20, 9e15 + i, 's' || i, "
        "'o' || i, CASE WHEN i % 20 = 7 THEN 0 END FROM generate_series(1, 500) i, unnest($1::text[]) start",
        [starts],
    )
    admin.execute(
        "INSERT INTO aibind_stream_chunks (id, seq, data) SELECT start || '-' || i, s, 'token' "
        "FROM generate_series(1, 500) i, generate_series(1, 4) s, unnest($1::text[]) start",
        [starts],
    )
    if request.param:
        admin.execute("ANALYZE")
    return admin, {"7": f"{starts[0]}-7", "8": f"{starts[4]}-8", "t": "other-1", "m": f"{starts[2]}-9"}


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_partitions_of_other_streams_are_not_read(partitioned, mode):
    admin, ids = partitioned
    admin.execute(f"SET plan_cache_mode = {mode}")
    leaves = {
        name: {
            leaf
            for table in (CHUNKS_TABLE, STATUS_TABLE)
            for (leaf,) in admin.execute(f"SELECT DISTINCT tableoid::regclass::text FROM {table} WHERE id = $1", [id])
        }
        for name, id in ids.items()
    }
    assert all(len(names) == 2 for names in leaves.values())
    # The partitions of the archive have the same names.
    leaves = {
        name: found | {leaf.replace(STATUS_TABLE, CHUNKS.archive.name) for leaf in found}
        for name, found in leaves.items()
    }
    for name, (params, _) in STREAM_PLANS.items():
        if name in SEARCHES | {"cleanup", "cleanup_of_partitions", "fail_abandoned", "archive"}:
            continue
        if name.endswith("_distributed"):
            continue
        text = json.dumps(params)
        for short, id in ids.items():
            text = text.replace(f'"{short}"', f'"{id}"').replace(f'\\"{short}\\"', f'\\"{id}\\"')
        wanted = {leaf for short, id in ids.items() if id in text for leaf in leaves[short]}
        read = leaves_read(admin, getattr(STREAM_STATEMENTS, name), json.loads(text))
        assert read, name
        assert read <= wanted, (name, read, wanted)


def test_search_for_streams_to_keep_reads_one_day_by_its_indexes(partitioned):
    admin, _ = partitioned
    day = TODAY - timedelta(days=2)
    statement = may_drop_statement(TABLES, day)
    leaves = {partition(table, day).name for table in TABLES}
    assert leaves_read(admin, statement, []) <= leaves
    assert admin.execute(statement).fetchall() == [(False,)]
    admin.execute("UPDATE aibind_stream_status SET expires_at = 1, state = 'done'")
    admin.execute("VACUUM ANALYZE aibind_stream_status")
    [([plan],)] = admin.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}").fetchall()
    assert "Seq Scan" not in {node["Node Type"] for node in executed_nodes(plan["Plan"])}
    assert admin.execute(statement).fetchall() == [(True,)]
