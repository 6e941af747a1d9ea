"""Tables with hash partitions: their creation, existing partitions, and the partitions that each statement reads."""

from __future__ import annotations

import asyncio
import json

import psycopg
import pytest
from integration.test_schema import NAMES, columns, objects
from integration.test_statements import CONVERSATION_PLANS, CONVERSATION_STATEMENTS, STREAM_PLANS, STREAM_STATEMENTS
from psycopg.conninfo import make_conninfo
from psycopg.sql import Identifier

from aibind_postgres import PostgresStreamStore, SchemaError, StreamNotFoundError, schema
from aibind_postgres._tables import CHUNKS_TABLE, STATUS_TABLE, Table

# Leaves of a user's own names, one of them with partitions of its own.
OWN_PARTITIONS = """
CREATE TABLE aibind_stream_chunks (id TEXT, seq INTEGER, data TEXT NOT NULL, PRIMARY KEY (id, seq))
  PARTITION BY HASH (id);
CREATE TABLE aibind_stream_status (
  id TEXT PRIMARY KEY, state TEXT NOT NULL DEFAULT 'active', error TEXT, total_chunks INTEGER NOT NULL DEFAULT 0,
  expires_at BIGINT NOT NULL
) PARTITION BY HASH (id);
CREATE TABLE chunks_a PARTITION OF aibind_stream_chunks FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE chunks_b PARTITION OF aibind_stream_chunks FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TABLE status_a PARTITION OF aibind_stream_status FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE status_b PARTITION OF aibind_stream_status FOR VALUES WITH (MODULUS 2, REMAINDER 1)
  PARTITION BY RANGE (id);
CREATE TABLE status_b_low PARTITION OF status_b FOR VALUES FROM (MINVALUE) TO ('m');
CREATE TABLE status_b_high PARTITION OF status_b FOR VALUES FROM ('m') TO (MAXVALUE);
"""
STORAGE_OPTIONS = ["fillfactor=50", "autovacuum_vacuum_scale_factor=0.05"]


@pytest.fixture
def admin(empty_database):
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA my")
        yield connection


def leaf_options(admin):
    """Return the storage options of all leaves by their names."""
    statement = "SELECT relname, reloptions FROM pg_class WHERE relispartition AND relkind = 'r'"
    return dict(admin.execute(statement).fetchall())


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_migrate_creates_hash_partitions(admin, empty_database, names):
    schema.migrate(empty_database, **names, partitions=3, notify_trigger=True)
    created = columns(admin), objects(admin), leaf_options(admin)
    chunks, status = (
        Table.parse(names.get(name, default))
        for name, default in (("chunks_table", CHUNKS_TABLE), ("status_table", STATUS_TABLE))
    )
    options = {chunks: None, status: STORAGE_OPTIONS}
    assert leaf_options(admin) == {table.derive(f"_p{i}"): options[table] for table in options for i in range(3)}
    assert all(len(name.encode()) <= 63 for name in [*leaf_options(admin), *dict(objects(admin))])
    schema.migrate(empty_database, **names, notify_trigger=True)
    schema.migrate(empty_database, **names, partitions=3, notify_trigger=True)
    asyncio.run(schema.async_migrate(empty_database, **names, partitions=3, notify_trigger=True))
    assert (columns(admin), objects(admin), leaf_options(admin)) == created
    admin.execute("DROP SCHEMA my CASCADE; DROP SCHEMA public CASCADE; CREATE SCHEMA my; CREATE SCHEMA public")
    admin.execute(schema.render(**names, partitions=3, notify_trigger=True).encode())
    assert (columns(admin), objects(admin), leaf_options(admin)) == created


@pytest.mark.parametrize(
    ("existing", "partitions", "text"),
    [
        (None, 8, "aibind_stream_chunks is not partitioned by hash .* omit partitions, or move .*docs/partitions.md"),
        (4, 8, "aibind_stream_chunks has 4 hash partitions, not 8: give this number .* docs/partitions.md"),
    ],
)
def test_other_number_of_partitions_is_refused(admin, empty_database, existing, partitions, text):
    schema.migrate(empty_database, partitions=existing)
    before = columns(admin), objects(admin)
    with pytest.raises(SchemaError, match=text):
        schema.migrate(empty_database, partitions=partitions)
    with pytest.raises(SchemaError, match=text):
        asyncio.run(schema.async_migrate(empty_database, partitions=partitions))
    with pytest.raises(psycopg.Error, match=text):
        admin.execute(schema.render(partitions=partitions).encode())
    assert (columns(admin), objects(admin)) == before


def test_tables_partitioned_otherwise_are_migrated_without_the_argument(admin, empty_database):
    admin.execute("""
        CREATE TABLE aibind_stream_status (
          id TEXT PRIMARY KEY, state TEXT, error TEXT, total_chunks INTEGER, expires_at BIGINT
        ) PARTITION BY RANGE (id);
        CREATE TABLE leaf PARTITION OF aibind_stream_status DEFAULT""")
    with pytest.raises(SchemaError, match="aibind_stream_status is not partitioned by hash"):
        schema.migrate(empty_database, partitions=8)
    schema.migrate(empty_database, notify_trigger=True)
    assert leaf_options(admin) == {"leaf": STORAGE_OPTIONS}


def test_partitions_of_the_user(admin, empty_database):
    admin.execute(OWN_PARTITIONS)
    for partitions in (None, 2):
        schema.migrate(empty_database, partitions=partitions, notify_trigger=True)
        assert leaf_options(admin) == {
            **dict.fromkeys(("chunks_a", "chunks_b")),
            **dict.fromkeys(("status_a", "status_b_low", "status_b_high"), STORAGE_OPTIONS),
        }
    with PostgresStreamStore(empty_database) as store:
        for id in ("a", "b", "x", "y"):
            store.create(id)
            assert store.append(id, "text") == 1
        assert [info.id for info in store.list()] == ["a", "b", "x", "y"]


def test_missing_partition_is_created_with_permissions_only(admin, empty_database):
    schema.migrate(empty_database, partitions=2)
    admin.execute("DROP TABLE aibind_stream_status_p1 CASCADE")
    read_only = make_conninfo(empty_database, options="-c default_transaction_read_only=on")
    schema.migrate(read_only)
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        schema.migrate(read_only, partitions=2)
    schema.migrate(empty_database, partitions=2)
    assert leaf_options(admin)["aibind_stream_status_p1"] == STORAGE_OPTIONS
    before = columns(admin), objects(admin)
    schema.migrate(read_only, partitions=2)
    assert (columns(admin), objects(admin)) == before


def test_invalid_numbers_are_rejected(empty_database):
    for partitions in (0, -1, 1025):
        with pytest.raises(ValueError, match="from 1 to 1024"):
            schema.migrate(empty_database, partitions=partitions)
    for partitions in (True, 8.0, "8"):
        with pytest.raises(TypeError, match="partitions"):
            schema.render(partitions=partitions)
    with pytest.raises(ValueError, match=r'"s"."x_p1" is that of a partition of "s"."x"'):
        schema.render(chunks_table="s.x", status_table="s.x_p1", partitions=2)
    schema.render(chunks_table="s.x", status_table=Identifier("x_p1"), partitions=2)


@pytest.fixture(params=[False, True], ids=["not analyzed", "analyzed"])
def partitioned(request, empty_database):
    """A connection to a database with 3,000 streams in 16 partitions, a tenth of them active."""
    schema.migrate(empty_database, partitions=16)
    with psycopg.connect(empty_database, autocommit=True, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(
            "INSERT INTO aibind_stream_status (id, state, total_chunks, expires_at, session_id, owner, lease_until) "
            "SELECT i::text, CASE WHEN i % 10 = 7 THEN 'active' ELSE 'done' END, 20, 9e15 + i, 's' || i, 'o' || i, "
            "CASE WHEN i % 20 = 7 THEN 0 END FROM generate_series(1, 3000) i"
        )
        connection.execute(
            "INSERT INTO aibind_stream_chunks (id, seq, data) "
            "SELECT i::text, s, 'token' FROM generate_series(1, 3000) i, generate_series(1, 4) s"
        )
        connection.execute(
            "INSERT INTO aibind_conversations (session_id, data, expires_at, owner) "
            "SELECT i::text, repeat('data', 100), 9e15 + i, 'o' || i % 100 FROM generate_series(1, 1000) i"
        )
        if request.param:
            connection.execute("ANALYZE")
        yield connection


# They search the table of stream states by other columns than the id, so in all of its partitions.
SEARCHES = {
    *("list", "list_of_session", "list_of_session_by_time", "list_of_owner", "list_of_owner_by_time"),
    *("active", "running", "tombstones", "expired"),
}
CONVERSATION_SEARCHES = {"get_info", "list", "list_of_owner"}
ARCHIVE = {f"{CHUNKS_TABLE}_archive"}  # has no partitions by hash


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_partitions_of_other_streams_are_not_read(partitioned, mode):
    partitioned.execute(f"SET plan_cache_mode = {mode}")
    expected = {
        table: {id: leaf_of(partitioned, table, id) for id in ("7", "8", "t", "m")}
        for table in (CHUNKS_TABLE, STATUS_TABLE)
    }
    for name, (params, _) in STREAM_PLANS.items():
        if name in ("cleanup", "cleanup_of_partitions", "fail_abandoned", "archive"):  # search for streams
            continue
        if name.endswith("_distributed"):
            continue
        read = leaves_read(partitioned, getattr(STREAM_STATEMENTS, name), params) - ARCHIVE
        ids = [id for id in ("7", "8", "t", "m") if f'"{id}"' in json.dumps(params).replace('\\"', '"')]
        wanted = {leaf for leaves in expected.values() for id, leaf in leaves.items() if id in ids}
        if name in SEARCHES:
            assert len(read) == 16, name
            assert not any(leaf.startswith(CHUNKS_TABLE) for leaf in read), name
        else:
            assert read or name.endswith("archived"), name
            assert read <= wanted, (name, read, wanted)
    for name, (params, _) in CONVERSATION_PLANS.items():
        if name.endswith("_distributed"):
            continue
        read = leaves_read(partitioned, getattr(CONVERSATION_STATEMENTS, name), params)
        assert len(read) == (16 if name in CONVERSATION_SEARCHES else 0), name


def test_bulk_statements_read_chunks_of_their_streams_only(partitioned):
    partitioned.execute("UPDATE aibind_stream_status SET expires_at = 1000 WHERE id IN ('18', '28')")
    chunks = {leaf_of(partitioned, CHUNKS_TABLE, id) for id in ("18", "28")}
    read = leaves_read(partitioned, STREAM_STATEMENTS.cleanup, [10, 100])
    assert {leaf for leaf in read - ARCHIVE if leaf.startswith(CHUNKS_TABLE)} == chunks
    partitioned.execute("UPDATE aibind_stream_chunks SET created_at = now() - interval '1 hour' WHERE id = '1117'")
    read = leaves_read(partitioned, STREAM_STATEMENTS.fail_abandoned, [1000, 1000, "x", "1107", 1, False])
    assert {leaf for leaf in read if leaf.startswith(CHUNKS_TABLE)} == {leaf_of(partitioned, CHUNKS_TABLE, "1117")}


def leaf_of(connection, table, id):
    """Return the leaf that stores a stream."""
    [(remainder,)] = connection.execute(
        "SELECT i FROM generate_series(0, 15) i WHERE satisfies_hash_partition($1::regclass, 16, i, $2::text)",
        [table, id],
    ).fetchall()
    return f"{table}_p{remainder}"


def leaves_read(connection, statement, params):
    """Return the leaves that a statement scans, and roll back its changes."""
    with connection.transaction(force_rollback=True):
        connection.execute(f"PREPARE statement AS {statement}")
        values = ", ".join("NULL" if value is None else psycopg.sql.quote(value) for value in params)
        execute = f"EXECUTE statement({values})" if values else "EXECUTE statement"
        [([plan],)] = connection.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {execute}").fetchall()
        connection.execute("DEALLOCATE statement")
    scans = [node for node in executed_nodes(plan["Plan"]) if "Scan" in node["Node Type"]]
    return {node["Relation Name"] for node in scans if node.get("Relation Name", "").startswith("aibind_stream_")}


def executed_nodes(node):
    """Return a plan node and its descendants, without those that were not executed."""
    descendants = [found for child in node.get("Plans", []) for found in executed_nodes(child)]
    return [node, *descendants] if node["Actual Loops"] else descendants


def test_store_with_partitioned_tables(partitioned, empty_database):
    partitioned.execute("TRUNCATE aibind_stream_status, aibind_stream_chunks CASCADE")
    ids = [str(number) for number in range(20)]
    with PostgresStreamStore(empty_database) as store:
        for id in ids:
            assert store.create(id) == id
            assert store.append(id, "1", expected_seq=1) == 1
            assert store.append_many(id, ["2", "3"]) == 3
        items = json.dumps([{"id": id, "texts": ["4", "5"], "expected": 4} for id in [*ids, "missing"]])
        appended = partitioned.execute(STREAM_STATEMENTS.append_batch, [items, 1000]).fetchall()
        assert sorted(appended) == sorted((id, 3) for id in ids)
        assert partitioned.execute(STREAM_STATEMENTS.append_batch, [items, 1000]).fetchall() == []
        polled = partitioned.execute(STREAM_STATEMENTS.poll, [json.dumps([*ids, "missing"])]).fetchall()
        assert sorted(polled) == sorted((id, "active", 5, None) for id in ids)
        reads = json.dumps([{"index": int(id), "id": id, "after": 2, "limit": 100} for id in ids])
        rows = partitioned.execute(STREAM_STATEMENTS.read_batch, [reads]).fetchall()
        assert rows == [row for i in range(20) for row in [(i, -5, "active"), (i, 3, "3"), (i, 4, "4"), (i, 5, "5")]]
        for id in ids:
            assert [chunk.data for chunk in store.read_from(id, follow=False)] == ["1", "2", "3", "4", "5"]
            assert [chunk.seq for chunk in store.replay(id, speed=1e6)] == [1, 2, 3, 4, 5]
        assert [store.stop("0"), store.complete("1"), store.fail("2", "why"), store.delete("3")] == [True] * 4
        with pytest.raises(StreamNotFoundError):
            store.append("3", "late")
        assert sorted(store.fail_abandoned(0)) == sorted(ids[4:])
        states = {info.id: info.state for info in store.list()}
        assert states == {"0": "stopped", "1": "done", **dict.fromkeys(("2", *ids[4:]), "error")}
        partitioned.execute("UPDATE aibind_stream_status SET expires_at = 1 WHERE id <> '0'")
        assert store.cleanup() == (18, 90)
        assert [info.id for info in store.list()] == ["0"]
