"""The migrations: any table names, idempotent, atomic."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier

from aibind_postgres import PostgresStreamStore, schema
from aibind_postgres._notifications import digest_of

NAMES = {
    "default": {},
    "in a schema": {
        "chunks_table": "my.chunks",
        "status_table": "my.status",
        "conversations_table": "my.conversations",
    },
    "hostile": {
        "chunks_table": Identifier("my", 'a"b\n;DROP TABLE x; --'),
        "status_table": Identifier("my", "$migrate$ $notify$ $append$ $distribute$"),
        "conversations_table": Identifier("my", "aibind_stream_chunks.aibind_stream_status"),
    },
    "63 bytes": {
        "chunks_table": "my." + "c" * 63,
        "status_table": "my." + "ü" * 31 + "s",
        "conversations_table": "my." + "v" * 63,
    },
}

COLUMNS = {
    "chunks": [("id", "text", "NO"), ("seq", "integer", "NO"), ("data", "text", "NO")],
    "status": [
        ("id", "text", "NO"),
        ("state", "text", "NO"),
        ("error", "text", "YES"),
        ("total_chunks", "integer", "NO"),
        ("expires_at", "bigint", "NO"),
    ],
    "conversations": [("session_id", "text", "NO"), ("data", "text", "NO"), ("expires_at", "bigint", "NO")],
}
ARCHIVE = [
    ("id", "text", "NO"),
    ("first_seq", "bigint", "NO"),
    ("last_seq", "bigint", "NO"),
    ("texts", "text", "NO"),
    ("times", "text", "YES"),
]
CREATED_AT = ("created_at", "timestamp with time zone", "YES")
ADDED = {
    "chunks": [CREATED_AT],
    "status": [
        CREATED_AT,
        ("session_id", "text", "YES"),
        ("owner", "text", "YES"),
        ("metadata", "jsonb", "YES"),
        ("ttl_ms", "bigint", "YES"),
        ("lease_until", "bigint", "YES"),
        ("wire", "text", "YES"),
        ("archived_at", "timestamp with time zone", "YES"),
    ],
    "conversations": [
        ("owner", "text", "YES"),
        ("title", "text", "YES"),
        ("metadata", "jsonb", "YES"),
        CREATED_AT,
        ("updated_at", "timestamp with time zone", "YES"),
    ],
}


@pytest.fixture
def admin(empty_database):
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA my")
        yield connection


def columns(admin):
    statement = """
        SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns
         WHERE table_schema IN ('public', 'my') ORDER BY table_name, ordinal_position"""
    tables = {}
    for table, *column in admin.execute(statement):
        tables.setdefault(table, []).append(tuple(column))
    return tables


def objects(admin):
    """Return all indexes, triggers and functions with their definitions."""
    return admin.execute("""
        SELECT indexname, indexdef FROM pg_indexes WHERE schemaname IN ('public', 'my')
        UNION ALL
        SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL
        SELECT proname, prosrc FROM pg_proc WHERE pronamespace IN ('public'::regnamespace, 'my'::regnamespace)
        ORDER BY 1, 2""").fetchall()


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_migrations_are_idempotent(admin, empty_database, names):
    schema.migrate(empty_database, **names, notify_trigger=True)
    tables, other_objects = columns(admin), objects(admin)
    assert sorted(tables.values()) == sorted([ARCHIVE, *([*COLUMNS[table], *ADDED[table]] for table in COLUMNS)])
    schema.migrate(empty_database, **names, notify_trigger=True)
    asyncio.run(schema.async_migrate(empty_database, **names, notify_trigger=True))
    assert (columns(admin), objects(admin)) == (tables, other_objects)
    assert all(len(name.encode()) <= 63 for name, _ in other_objects)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_tables_cannot_be_distributed_without_citus(admin, empty_database, names, on_citus):
    if on_citus:
        pytest.skip("the server has Citus")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="the extension citus is missing"):
        schema.migrate(empty_database, **names, citus=True)
    assert columns(admin) == {}
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="the extension citus is missing"):
        admin.execute(schema.render(**names, citus=True).encode())


def test_notify_trigger_of_distributed_tables_is_refused(empty_database):
    for call in (schema.render, partial(schema.migrate, empty_database)):
        with pytest.raises(ValueError, match="notify_trigger and citus"):
            call(notify_trigger=True, citus=True)


def test_all_sql_files_are_used():
    names = {file.relative_to(schema.SQL_FOLDER).as_posix() for file in schema.SQL_FOLDER.rglob("*.sql")}
    assert names == {*schema._MIGRATIONS, *schema._NOTIFY_TRIGGER, *schema._CITUS, *schema._MONITORING}


def test_first_migration_is_the_schema_of_the_npm_package(admin):
    admin.execute(schema.SQL_FOLDER.joinpath("0001_tables.sql").read_text())
    assert columns(admin) == {
        f"aibind_{'stream_' * (name != 'conversations')}{name}": COLUMNS[name] for name in COLUMNS
    }


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_migrate_applies_the_rendered_sql(admin, empty_database, names):
    schema.migrate(empty_database, **names, notify_trigger=True)
    applied = columns(admin), objects(admin)
    admin.execute("DROP SCHEMA my CASCADE; DROP SCHEMA public CASCADE; CREATE SCHEMA my; CREATE SCHEMA public")
    admin.execute(schema.render(**names, notify_trigger=True).encode())
    assert (columns(admin), objects(admin)) == applied


@pytest.mark.parametrize("partitions", [None, 2, "time"])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_single_statements_do_the_same_as_the_rendered_sql(admin, empty_database, names, partitions):
    admin.execute(schema.render(**names, notify_trigger=True, partitions=partitions).encode())
    applied = columns(admin), objects(admin)
    admin.execute("DROP SCHEMA my CASCADE; DROP SCHEMA public CASCADE; CREATE SCHEMA my; CREATE SCHEMA public")
    for statement in schema.statements(**names, notify_trigger=True, partitions=partitions):
        admin.execute(statement.encode(), prepare=True)  # a prepared statement is one command
    assert (columns(admin), objects(admin)) == applied


def test_concurrent_migrations(admin, empty_database):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: schema.migrate(empty_database, notify_trigger=True), range(8)))
    assert len(columns(admin)) == 4


def test_migrations_are_atomic(admin, empty_database):
    admin.execute("CREATE VIEW aibind_conversations AS SELECT 1 AS session_id")
    admin.execute("CREATE VIEW aibind_stream_status AS SELECT 1 AS id")
    with pytest.raises(psycopg.DatabaseError):
        schema.migrate(empty_database)
    assert "aibind_stream_chunks" not in columns(admin)


def test_migrate_takes_part_in_a_transaction(admin, empty_database):
    with psycopg.connect(empty_database) as connection:
        schema.migrate(connection)
        connection.rollback()
    assert columns(admin) == {}


def test_migrate_keeps_existing_rows(admin, empty_database):
    admin.execute(schema.SQL_FOLDER.joinpath("0001_tables.sql").read_text())
    with PostgresStreamStore(empty_database) as store:
        store.create("old")
        store.append("old", "a")
        schema.migrate(empty_database)
        store.append("old", "b")
        # The first chunk has no time, so it is replayed without a delay.
        assert list(store.replay("old")) == [(1, "a"), (2, "b")]
        assert [info.created_at for info in store.list()] == [None]
    rows = admin.execute("SELECT seq, created_at IS NULL FROM aibind_stream_chunks ORDER BY seq").fetchall()
    assert rows == [(1, True), (2, False)]


def test_invalid_names_are_rejected():
    for name in ("", "a.", "a" * 64, "a\0b", "a.b.c"):
        with pytest.raises(ValueError, match="name"):
            schema.render(status_table=name)
    with pytest.raises(ValueError, match="differ"):
        schema.render(status_table="same", chunks_table="same")


def test_trigger_notifies_of_any_id(admin, empty_database):
    schema.migrate(empty_database, notify_trigger=True)
    admin.execute("LISTEN aibind_stream_status")
    for id in ("x", '"\n', "é" * 5000):
        statement = SQL("INSERT INTO aibind_stream_status (id, expires_at) VALUES (%s, 0) ON CONFLICT DO NOTHING")
        admin.execute(statement, [id])
        (notify,) = admin.notifies(timeout=5, stop_after=1)
        assert notify.payload == f"- {digest_of(id)}"


def test_trigger_of_a_partitioned_table_uses_its_channel(admin, empty_database):
    admin.execute("""
        CREATE TABLE "my status" (
            id TEXT PRIMARY KEY, state TEXT, error TEXT, total_chunks INTEGER, expires_at BIGINT
        ) PARTITION BY HASH (id);
        CREATE TABLE leaf PARTITION OF "my status" FOR VALUES WITH (MODULUS 1, REMAINDER 0)""")
    tables = schema.render(status_table="my status")
    admin.execute(schema.render(status_table="my status", notify_trigger=True).removeprefix(tables).encode())
    admin.execute('LISTEN "my status"')
    admin.execute("""INSERT INTO "my status" (id, expires_at) VALUES ('a', 0)""")
    (notify,) = admin.notifies(timeout=5, stop_after=1)
    assert notify.payload == f"- {digest_of('a')}"


def test_missing_sql_files_are_an_error(empty_database, tmp_path, monkeypatch):
    shutil.copytree(schema.SQL_FOLDER, tmp_path / "sql")
    (tmp_path / "sql" / "0003_conversations.sql").unlink()
    for folder in (tmp_path / "sql", tmp_path / "none"):
        monkeypatch.setattr(schema, "SQL_FOLDER", folder)
        with pytest.raises(FileNotFoundError, match="sql"):
            schema.migrate(empty_database)


@pytest.fixture
def stranger(admin, empty_database):
    """A role that owns nothing."""
    name = f"stranger_{uuid.uuid4().hex}"
    admin.execute(f"CREATE ROLE {name} LOGIN; GRANT USAGE ON SCHEMA my TO {name}")
    admin.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # the default before PostgreSQL 15
    yield make_conninfo(empty_database, user=name)
    admin.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_nothing_to_migrate_without_permissions(admin, empty_database, stranger, names):
    read_only = make_conninfo(empty_database, options="-c default_transaction_read_only=on")
    schema.migrate(empty_database, **names, notify_trigger=True)
    before = columns(admin), objects(admin)
    for dsn in (stranger, read_only):
        schema.migrate(dsn, **names, notify_trigger=True)
        asyncio.run(schema.async_migrate(dsn, **names))
        with psycopg.connect(dsn) as connection:
            schema.migrate(connection, **names)
            assert connection.execute("SELECT 1").fetchone() == (1,)
    assert (columns(admin), objects(admin)) == before


def test_missing_migrations_need_permissions(admin, empty_database, stranger):
    for file in sorted(schema.SQL_FOLDER.glob("*.sql")):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            schema.migrate(stranger)
        admin.execute(file.read_text())
    schema.migrate(stranger)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        schema.migrate(stranger, notify_trigger=True)
