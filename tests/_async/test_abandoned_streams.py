"""`fail_abandoned` before migration 0002, after it, and beside the TypeScript package, which renews no expiry."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from psycopg import sql
from support.concurrency import AsyncBackground, async_sleep
from support.recording import AsyncRecordingClient

from aibind_postgres import AsyncPostgresStreamStore, SchemaError, schema
from aibind_postgres._async.columns import AsyncColumnCatalog
from aibind_postgres._tables import Table

# The tables of the TypeScript package.
SEED = """
CREATE TABLE {chunks} (id TEXT NOT NULL, seq INTEGER NOT NULL, data TEXT NOT NULL, PRIMARY KEY (id, seq));
CREATE TABLE {status} (
    id TEXT PRIMARY KEY, state TEXT NOT NULL DEFAULT 'active', error TEXT, total_chunks INTEGER NOT NULL DEFAULT 0,
    expires_at BIGINT NOT NULL
)
"""
MIGRATION = """
ALTER TABLE {status} ADD COLUMN created_at TIMESTAMPTZ;
ALTER TABLE {status} ALTER COLUMN created_at SET DEFAULT clock_timestamp();
ALTER TABLE {chunks} ADD COLUMN created_at TIMESTAMPTZ;
ALTER TABLE {chunks} ALTER COLUMN created_at SET DEFAULT clock_timestamp()
"""
LONG_AGO = 1  # as expires_at

# A view whose rows are read only while nobody holds the advisory lock.
PAUSED_CHUNKS = """
CREATE FUNCTION {pause}() RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_advisory_xact_lock_shared(4); RETURN true; END $$;
CREATE VIEW {view} AS SELECT * FROM {chunks_table} WHERE {pause}();
ALTER VIEW {view} ALTER created_at SET DEFAULT clock_timestamp()
"""
PAUSE = 4  # the key of this lock


@pytest.fixture
def tables(schema_name):
    return {
        "chunks_table": psycopg.sql.Identifier(schema_name, "seed chunks"),
        "status_table": psycopg.sql.Identifier(schema_name, "seed status"),
    }


@pytest.fixture
async def run(dsn, tables):
    """Return a function that runs a statement with {chunks} and {status}. The tables are those of the seed."""
    names = {"chunks": tables["chunks_table"], "status": tables["status_table"]}
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:

        async def run(sql, *params):
            await connection.execute(psycopg.sql.SQL(sql).format(**names), params or None)

        await run(SEED)
        yield run


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


async def create(run, id):
    """Create a stream as the TypeScript package does, with a ttl that has passed."""
    await run("INSERT INTO {status} (id, state, total_chunks, expires_at) VALUES (%s, 'active', 0, %s)", id, LONG_AGO)


async def append(run, id):
    await run(
        "WITH next AS (UPDATE {status} SET total_chunks = total_chunks + 1 WHERE id = %s RETURNING id, total_chunks) "
        "INSERT INTO {chunks} (id, seq, data) SELECT id, total_chunks, 'x' FROM next",
        id,
    )


async def test_tables_of_the_seed(run, store):
    await create(run, "alive")
    await append(run, "alive")
    with pytest.raises(SchemaError, match=r"^fail_abandoned needs migration 0002.*created_at.*aibind-postgres migrate"):
        await store.fail_abandoned(1)
    assert (await store.get_status("alive")).state == "active"
    await run(MIGRATION)
    await create(run, "silent")
    await async_sleep(0.01)
    assert await store.fail_abandoned(0.005) == ["silent"]  # the same store finds the migration


async def test_missing_migration_leaves_a_transaction_usable(run, dsn, tables):
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        store = AsyncPostgresStreamStore(connection, **tables)
        id = await store.create()
        for _ in range(2):
            with pytest.raises(SchemaError, match="migration 0002"):
                await store.fail_abandoned(0)
        await store.append(id, "a")
        await connection.commit()
        assert await store.get_status(id) == ("active", None, 1)
        await store.close()


async def test_missing_table_leaves_a_transaction_usable(run, dsn, tables):
    names = {**tables, "status_table": "no such table"}
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        store = AsyncPostgresStreamStore(connection, **names)
        with pytest.raises(SchemaError, match='the table "no such table" does not exist'):
            await store.fail_abandoned(0)
        assert await (await connection.execute("SELECT 1")).fetchone() == (1,)
        await store.close()


@pytest.mark.parametrize("table", ["chunks", "status"])
async def test_column_without_a_default_counts_as_missing(run, store, table):
    """Without it, no row has a time, and each writer would seem silent."""
    await run(MIGRATION)
    await run(f"ALTER TABLE {{{table}}} ALTER COLUMN created_at DROP DEFAULT")
    with pytest.raises(SchemaError, match=f"{table}.*created_at"):
        await store.fail_abandoned(0)


async def test_living_typescript_writer_is_kept(run, store):
    await create(run, "alive")
    await append(run, "alive")
    await run(MIGRATION)
    for _ in range(10):
        await append(run, "alive")
        assert await store.fail_abandoned(3600) == []
        await async_sleep(0.02)
    assert (await store.get_status("alive")).state == "active"


async def test_streams_from_before_the_migration(run, store, dsn, tables):
    """They may have living writers until the migration has been present for the time of silence."""
    await create(run, "without chunks")
    await create(run, "with chunks")
    await append(run, "with chunks")
    await create(run, "alive")
    await append(run, "alive")
    await run(MIGRATION)
    assert await store.fail_abandoned(1.5) == []
    await async_sleep(1.6)
    await append(run, "alive")
    async with AsyncPostgresStreamStore(dsn, **tables) as other:  # does not know how old the migration is
        assert await other.fail_abandoned(1.5) == []
    assert await store.fail_abandoned(3600) == []
    assert sorted(await store.fail_abandoned(1.5)) == ["with chunks", "without chunks"]


async def test_chunk_that_is_counted_but_not_stored_yet(run, store):
    """A writer that stores a chunk in a second statement is alive in between."""
    await run(MIGRATION)
    for id in ("new", "old"):
        await create(run, id)
        await append(run, id)
    await run("UPDATE {status} SET total_chunks = 2, created_at = now() - interval '1 hour'")
    await run("UPDATE {chunks} SET created_at = now() - interval '1 hour' WHERE id = 'old'")
    assert await store.fail_abandoned(60) == ["old"]


async def test_columns_are_looked_up_once(run, dsn, tables):
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresStreamStore(client, **tables) as store:

        def look_ups():
            return sum("pg_attribute" in statement.sql for statement in client.statements)

        for number in (1, 2):
            with pytest.raises(SchemaError):
                await store.fail_abandoned()
            assert look_ups() == number
        await run(MIGRATION)
        for _ in range(3):
            assert await store.fail_abandoned() == []
            assert look_ups() == 3


async def test_columns_of_a_table(run, store, schema_name):
    status, missing = Table(schema_name, "seed status"), Table(schema_name, "missing")
    catalog = AsyncColumnCatalog(store._database, [status, missing])
    names = {"id", "state", "error", "total_chunks", "expires_at"}
    first = await catalog.of(status)
    assert first[:2] == (names, True)
    assert (await catalog.of(missing))[:2] == (frozenset(), False)
    assert await catalog.of(status, again=True) == first  # also the time
    await run(MIGRATION)
    await run("ALTER TABLE {status} ADD COLUMN lease_until bigint, DROP COLUMN error")
    assert (await catalog.of(status)).names == names
    with pytest.raises(SchemaError, match=r"^leases needs migration 0004.*has no column owner, error"):
        await catalog.require(status, ["lease_until", "owner", "error"], "leases", "0004")
    assert (await catalog.of(status)).names == (names | {"lease_until", "created_at"}) - {"error"}


@pytest.mark.parametrize("committed", [True, False])
async def test_stream_that_gets_a_lease_during_the_statement_is_kept(dsn, run_sql, schema_name, committed):
    names = {
        "chunks_table": sql.Identifier(schema_name, "chunks"),
        "status_table": sql.Identifier(schema_name, "status"),
        "view": sql.Identifier(schema_name, "paused"),
        "pause": sql.Identifier(schema_name, "pause"),
    }
    tables = {name: names[name] for name in ("chunks_table", "status_table")}
    run_sql(schema.render(**tables, conversations_table=sql.Identifier(schema_name, "conversations")))
    run_sql(sql.SQL(PAUSED_CHUNKS).format(**names))
    async with (
        AsyncPostgresStreamStore(dsn, **tables) as store,
        AsyncPostgresStreamStore(dsn, chunks_table=names["view"], status_table=names["status_table"]) as paused,
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as pause,
        await psycopg.AsyncConnection.connect(dsn) as producer,
    ):
        id = await store.create()
        await store.append(id, "a")
        run_sql(sql.SQL("UPDATE {} SET created_at = now() - interval '1 hour'").format(names["chunks_table"]))
        await pause.execute("SELECT pg_advisory_lock(%s)", [PAUSE])
        async with AsyncBackground(partial(paused.fail_abandoned, 60)) as failing:
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted"
            while await (await pause.execute(waiting, [PAUSE])).fetchone() == (0,):
                await async_sleep(0.01)
            # The statement has found the stream silent and without a lease, and has not locked its row yet.
            await producer.execute(
                sql.SQL("UPDATE {} SET lease_until = 1e15 WHERE id = %s").format(names["status_table"]), [id]
            )
            if committed:
                await producer.commit()
            await pause.execute("SELECT pg_advisory_unlock(%s)", [PAUSE])
            assert await failing.result() == []
            await producer.commit()
        assert (await store.get_status(id)).state == "active"
