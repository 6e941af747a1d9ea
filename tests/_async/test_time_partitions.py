"""Tables with partitions by time: their housekeeping, and the readers and writers beside it."""

from __future__ import annotations

import json
import logging
import uuid
from datetime import datetime, timedelta, timezone
from functools import partial

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from support.concurrency import async_gather, async_sleep, async_until
from support.recording import AsyncRecordingClient

from aibind_postgres import AsyncHousekeeper, AsyncPostgresStreamStore, _time_partitions, schema
from aibind_postgres._async.time_partitions import AsyncTimePartitions
from aibind_postgres._housekeeping import MARKER
from aibind_postgres._tables import Table
from aibind_postgres._time_partition_sql import create_statement, drop_statement
from aibind_postgres._time_partitions import MAX_MOVED_CHUNKS, MAX_MOVED_STREAMS, MAX_SCANNED, PARTITIONS, bound, wanted

HOUR = 3600  # seconds
TODAY = datetime.now(timezone.utc).date()
PAST = TODAY - timedelta(days=3)
TABLES = ("status", "chunks", "chunks_archive")
LONG_AGO = 1  # milliseconds since the epoch
AN_HOUR_AGO = "(extract(epoch FROM now()) * 1000)::bigint - 3600000"
IN_AN_HOUR = "(extract(epoch FROM now()) * 1000)::bigint + 3600000"


@pytest.fixture(autouse=True)
def _records_info(caplog):
    caplog.set_level(logging.INFO, logger="aibind_postgres")


@pytest.fixture(autouse=True)
def _creates_few_partitions(monkeypatch):
    monkeypatch.setattr(_time_partitions, "AHEAD", 2)


@pytest.fixture
def tables(run_sql, schema_name):
    """The stream tables, with partitions for today, the next two days, and a day in the past."""
    names = {f"{kind}_table": sql.Identifier(schema_name, kind) for kind in ("chunks", "status", "conversations")}
    run_sql(schema.render(**names, partitions="time"))
    for day in (PAST, *(TODAY + timedelta(days=number) for number in range(3))):
        run_sql(create_statement([Table(schema_name, table) for table in TABLES], day))
    return {"chunks_table": names["chunks_table"], "status_table": names["status_table"]}


@pytest.fixture
async def run(dsn, tables, schema_name):
    """Return a function that runs a statement with the names of the tables and returns its rows."""
    names = {"chunks": tables["chunks_table"], "status": tables["status_table"], "schema": sql.Identifier(schema_name)}
    names |= {f"{kind}_oid": sql.SQL(f"'\"{schema_name}\".{kind}'::regclass") for kind in TABLES}
    names |= {"schema_oid": sql.SQL(f"'\"{schema_name}\"'::regnamespace")}
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:

        async def run(text, **partitions):
            leaves = {name: sql.Identifier(schema_name, leaf) for name, leaf in partitions.items()}
            cursor = await connection.execute(sql.SQL(text).format(**names, **leaves))
            return await cursor.fetchall() if cursor.description else []

        yield run


@pytest.fixture
async def client(dsn):
    async with AsyncRecordingClient(dsn) as client:
        yield client


@pytest.fixture
async def store(client, tables):
    async with AsyncPostgresStreamStore(client, **tables) as store:
        yield store


def turns(client, store):
    """Return the number of turns of housekeeping that are complete, by their last statement."""
    last = store._schema.statements.tombstones
    return len([each for each in client.statements if each.sql == last and each.rows is not None])


async def take_turn(run, client, store):
    """Run one whole turn of housekeeping."""
    await run(f"DELETE FROM {{status}} WHERE id = '{MARKER}'")
    before = turns(client, store)
    async with AsyncHousekeeper(store, every=HOUR):
        await async_until(lambda: turns(client, store) > before)


def id_of(day, name=""):
    """Return an id that begins with the time of a day."""
    return f"{bound(day)}-7000-8000-{name}"


async def add(run, id, state="done", chunks=3, expires_at=LONG_AGO):
    await run(
        f"INSERT INTO {{status}} (id, state, total_chunks, expires_at) VALUES ('{id}', '{state}', {chunks}, "
        f"{expires_at})"
    )
    await run(f"INSERT INTO {{chunks}} (id, seq, data) SELECT '{id}', i, 'c' || i FROM generate_series(1, {chunks}) i")


async def days(run, table="status"):
    """Return the days that have a partition."""
    rows = await run(
        f"SELECT right(relname, 8) FROM pg_inherits JOIN pg_class ON oid = inhrelid "
        f"WHERE inhparent = {{{table}_oid}} AND relname ~ '\\d{{{{8}}}}$' ORDER BY 1"
    )
    return [row[0] for row in rows]


def named(*wanted):
    return [f"{day:%Y%m%d}" for day in wanted]


async def drop_partitions(run, day):
    for table in reversed(TABLES):
        await run("DROP TABLE {leaf}", leaf=f"{table}_{day:%Y%m%d}")


AHEAD = named(*(TODAY + timedelta(days=number) for number in range(3)))


async def leaf_of(run, id, table="status"):
    [(leaf,)] = await run(f"SELECT DISTINCT tableoid::regclass::text FROM {{{table}}} WHERE id = '{id}'")
    return leaf.rpartition(".")[2]


async def texts(store, id):
    return [chunk.data async for chunk in store.read_from(id, follow=False)]


def messages(caplog, level=logging.WARNING):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


async def test_new_streams_are_in_the_partition_of_today(run, store):
    id = await store.create()
    await store.append(id, "a")
    assert await leaf_of(run, id) == f"status_{TODAY:%Y%m%d}"
    assert await leaf_of(run, id, "chunks") == f"chunks_{TODAY:%Y%m%d}"
    for other in ("x", str(uuid.uuid4()).replace("01", "f1", 1), "ünï"):
        await store.create(other)
        await store.append(other, "a")
        assert await leaf_of(run, other) == "status_default_other"
        assert await leaf_of(run, other, "chunks") == "chunks_default_other"


async def test_partition_of_expired_streams_is_dropped(run, client, store, caplog):
    await add(run, id_of(PAST, "a"))
    await add(run, id_of(PAST, "b"), "error", expires_at=AN_HOUR_AGO)
    await add(run, id_of(PAST, "c"), "stopped", chunks=0)
    assert await days(run) == named(PAST) + AHEAD
    await take_turn(run, client, store)
    assert await days(run) == await days(run, "chunks") == await days(run, "chunks_archive") == AHEAD
    assert await run("SELECT id FROM {status}") == [(MARKER,)]
    assert await run("SELECT id FROM {chunks}") == []
    assert messages(caplog, logging.INFO)[0].endswith(": partitions dropped: 1")
    assert messages(caplog) == []


async def test_survivors_move_to_the_default_partition(run, client, store):
    kept = {id_of(PAST, name): state for name, state in {"a": "active", "d": "done", "e": "error"}.items()}
    for id, state in kept.items():
        await add(run, id, state, expires_at=LONG_AGO if state == "active" else IN_AN_HOUR)
    await run(f"UPDATE {{status}} SET owner = 'ann', metadata = '{{{{}}}}' WHERE id = '{id_of(PAST, 'a')}'")
    [before] = await run(f"SELECT * FROM {{status}} WHERE id = '{id_of(PAST, 'a')}'")
    times = await run(f"SELECT seq, created_at FROM {{chunks}} WHERE id = '{id_of(PAST, 'a')}' ORDER BY seq")
    # Left over from an earlier stream with this id; readers never get it.
    await run(f"INSERT INTO {{chunks}} VALUES ('{id_of(PAST, 'a')}', 4, 'left over')")
    await add(run, id_of(PAST, "x"))
    await take_turn(run, client, store)
    assert await days(run) == AHEAD
    for id, state in kept.items():
        assert await leaf_of(run, id) == "status_default_time"
        assert await leaf_of(run, id, "chunks") == "chunks_default_time"
        assert (await store.get_status(id)).state == state
        assert await texts(store, id) == ["c1", "c2", "c3"]
    assert await run(f"SELECT * FROM {{status}} WHERE id = '{id_of(PAST, 'a')}'") == [before]
    assert times == await run(f"SELECT seq, created_at FROM {{chunks}} WHERE id = '{id_of(PAST, 'a')}' ORDER BY seq")
    assert await store.append(id_of(PAST, "a"), "c4", expected_seq=4) == 4
    assert await store.stop(id_of(PAST, "a")) is True
    assert len(await run("SELECT id FROM {chunks}")) == 10
    await run(f"UPDATE {{status}} SET expires_at = {AN_HOUR_AGO} WHERE state <> 'deleted'")
    await take_turn(run, client, store)  # cleanup of the DEFAULT partition does not wait
    assert await run("SELECT id FROM {status}") == [(MARKER,)]
    assert await run("SELECT id FROM {chunks}") == []


async def test_archived_streams(run, client, store):
    kept, other = id_of(PAST, "kept"), "other"
    for id in (kept, other, id_of(PAST, "gone")):
        await store.create(id)
        await store.append_many(id, ["a", "b", "c"])
        await store.complete(id)
    assert await store.archive(older_than=0) == (3, 9)
    assert await run("SELECT seq FROM {chunks}") == []
    await run(f"UPDATE {{status}} SET expires_at = {LONG_AGO} WHERE id LIKE '%gone'")
    await take_turn(run, client, store)
    assert await days(run) == await days(run, "chunks_archive") == AHEAD
    leaves = dict(await run("SELECT id, tableoid::regclass::text FROM {schema}.chunks_archive"))
    assert leaves.keys() == {kept, other}
    assert leaves[kept].endswith(".chunks_archive_default_time")
    for id in (kept, other):
        assert await texts(store, id) == ["a", "b", "c"]
    assert await store.delete(kept) is True
    assert await run("SELECT id FROM {schema}.chunks_archive") == [(other,)]
    early = id_of(TODAY + timedelta(days=1), "early")
    await drop_partitions(run, TODAY + timedelta(days=1))
    await store.create(early)
    await store.append(early, "a")
    await store.complete(early)
    assert await store.archive(older_than=0) == (1, 1)
    await take_turn(run, client, store)
    assert await leaf_of(run, early) == f"status_{TODAY + timedelta(days=1):%Y%m%d}"
    assert await texts(store, early) == ["a"]
    assert await store.delete(early) is True
    assert await run("SELECT id FROM {schema}.chunks_archive") == [(other,)]


async def test_partly_deleted_streams_are_dropped(run, client, store):
    tombstone = f"{id_of(PAST, 'a')} deleted {uuid.uuid4()}"
    await run(
        f"INSERT INTO {{status}} VALUES ('{tombstone}', 'deleted', '{id_of(PAST, 'a')}', 2147483647, "
        "9223372036854775807)"
    )
    assert await leaf_of(run, tombstone) == f"status_{PAST:%Y%m%d}"
    await run(f"INSERT INTO {{chunks}} SELECT '{id_of(PAST, 'a')}', i, 'rest' FROM generate_series(5, 9) i")
    await store.create(id_of(PAST, "a"))  # a new stream with the same id
    await store.append(id_of(PAST, "a"), "new")
    await take_turn(run, client, store)
    assert await run(f"SELECT id FROM {{status}} WHERE id <> '{MARKER}'") == [(id_of(PAST, "a"),)]
    assert await run("SELECT seq, data FROM {chunks}") == [(1, "new")]


async def test_ids_of_other_writers_in_the_range_of_a_day(run, client, store):
    random = f"{bound(PAST)}-4000-8000-000000000000"  # a UUID of version 4
    await store.create(random)
    await store.append(random, "a")
    assert await leaf_of(run, random) == f"status_{PAST:%Y%m%d}"
    await take_turn(run, client, store)
    assert await leaf_of(run, random) == "status_default_time"
    later = f"{bound(PAST)} any text"  # of a day whose partition has been dropped
    await store.create(later)
    assert await store.append(later, "b") == 1
    assert await leaf_of(run, later) == "status_default_time"
    assert await store.append(random, "c") == 2
    assert [info.id async for info in store.list()] == [later, random]
    await store.stop(later)
    await run(f"UPDATE {{status}} SET expires_at = {AN_HOUR_AGO} WHERE id <> '{MARKER}'")
    await take_turn(run, client, store)
    assert [info.id async for info in store.list()] == [random]


@pytest.mark.parametrize("many", ["streams", "chunks"])
async def test_partition_with_too_many_survivors_is_kept(run, client, store, many):
    if many == "streams":
        for number in range(MAX_MOVED_STREAMS + 1):
            await add(run, id_of(PAST, number), chunks=0, expires_at=IN_AN_HOUR)
    else:
        await add(run, id_of(PAST, "long"), chunks=MAX_MOVED_CHUNKS + 1, expires_at=IN_AN_HOUR)
    await add(run, id_of(PAST, "recently expired"), expires_at=AN_HOUR_AGO)
    await add(run, id_of(PAST, "long expired"))
    await take_turn(run, client, store)
    assert await days(run) == named(PAST) + AHEAD
    ids = {info.id async for info in store.list()}
    assert id_of(PAST, "recently expired") in ids  # waits for the drop
    assert id_of(PAST, "long expired") not in ids
    await run("DELETE FROM {status} WHERE ctid IN (SELECT ctid FROM {status} WHERE expires_at > 9e11 LIMIT 1)")
    await run(f"DELETE FROM {{chunks}} WHERE seq > {MAX_MOVED_CHUNKS}")
    await run(f"UPDATE {{status}} SET total_chunks = {MAX_MOVED_CHUNKS} WHERE total_chunks > {MAX_MOVED_CHUNKS}")
    await take_turn(run, client, store)
    assert await days(run) == AHEAD


async def test_days_without_partitions_are_created(run, client, store, caplog):
    missing = [TODAY + timedelta(days=number) for number in (0, 2)]
    for day in missing:
        await drop_partitions(run, day)
    today, early = await store.create(), id_of(missing[1], "of a clock that runs ahead")
    await store.create(early)
    for id in (today, early):
        assert await leaf_of(run, id) == "status_default_time"
        await store.append_many(id, ["a", "b"])
    await take_turn(run, client, store)
    assert await days(run) == await days(run, "chunks") == AHEAD
    for id, day in ((today, TODAY), (early, missing[1])):
        assert await leaf_of(run, id) == f"status_{day:%Y%m%d}"
        assert await leaf_of(run, id, "chunks") == f"chunks_{day:%Y%m%d}"
        assert await store.append(id, "c") == 3
        assert await texts(store, id) == ["a", "b", "c"]
    assert messages(caplog, logging.INFO)[0].endswith(": partitions dropped: 1, partitions created: 2")
    assert messages(caplog) == []


async def test_rows_with_generated_columns_move(run, client, store, schema_name):
    for table, text in (("status", "state"), ("chunks", "data"), ("chunks_archive", "id")):
        await run(
            f"ALTER TABLE {{leaf}} ADD size int GENERATED ALWAYS AS (length({text})) STORED, "
            "ADD command text DEFAULT 'x', ADD columns text DEFAULT 'y', ADD aibind text DEFAULT 'z'",
            leaf=table,
        )
    await drop_partitions(run, TODAY)
    today, kept = id_of(TODAY, "a"), id_of(PAST, "b")
    for id in (today, kept):
        await store.create(id)
        await store.append_many(id, ["a", "bc"])
    await take_turn(run, client, store)
    assert await days(run) == await days(run, "chunks") == AHEAD
    for id, leaf in ((today, f"{TODAY:%Y%m%d}"), (kept, "default_time")):
        assert await leaf_of(run, id) == f"status_{leaf}"
        assert await leaf_of(run, id, "chunks") == f"chunks_{leaf}"
        assert await run(f"SELECT seq, size, command, columns FROM {{chunks}} WHERE id = '{id}' ORDER BY seq") == [
            (1, 1, "x", "y"),
            (2, 2, "x", "y"),
        ]


async def test_day_with_too_many_streams_gets_no_partition(run, client, store):
    await drop_partitions(run, TODAY)
    await add(run, id_of(TODAY, "a"), "active", chunks=MAX_MOVED_CHUNKS + 1)
    await take_turn(run, client, store)
    assert await days(run) == AHEAD[1:]
    assert await leaf_of(run, id_of(TODAY, "a")) == "status_default_time"
    assert len(await run("SELECT seq FROM {chunks}")) == MAX_MOVED_CHUNKS + 1


async def test_large_default_partition_is_not_scanned_under_a_lock(run, client, store, caplog):
    tomorrow = TODAY + timedelta(days=1)
    await drop_partitions(run, tomorrow)
    rows = MAX_SCANNED // 1500
    await run(
        f"INSERT INTO {{chunks}} SELECT '{id_of(PAST - timedelta(days=9))}', i, repeat(md5(i::text), 50) "
        f"FROM generate_series(1, {rows}) i"
    )
    async with AsyncHousekeeper(store, every=0.05):
        await async_until(lambda: turns(client, store) > 2)
    assert await days(run) == [day for day in AHEAD if day != f"{tomorrow:%Y%m%d}"]
    warnings = messages(caplog)
    assert len(warnings) > 2  # one in each turn
    assert all("Call migrate with partitions='time' at a quiet time" in warning for warning in warnings)
    await run("TRUNCATE {chunks}")
    await take_turn(run, client, store)
    assert await days(run) == AHEAD


@pytest.mark.parametrize("cause", ["foreign key", "view", "trigger"])
async def test_day_that_cannot_be_dropped_delays_no_other_day(run, store, schema_name, run_sql, caplog, cause):
    earlier, tomorrow = PAST - timedelta(days=1), TODAY + timedelta(days=1)
    run_sql(create_statement([Table(schema_name, table) for table in TABLES], earlier))
    await drop_partitions(run, tomorrow)
    kept = id_of(earlier, "kept")
    await add(run, kept, "done", expires_at=LONG_AGO if cause == "view" else IN_AN_HOUR)
    await add(run, id_of(PAST, "a"))
    await {
        "foreign key": partial(
            run,
            "CREATE TABLE {schema}.users (id text REFERENCES {status}); "
            f"INSERT INTO {{schema}}.users VALUES ('{kept}')",
        ),
        "view": partial(run, "CREATE VIEW {schema}.v AS SELECT id FROM {leaf}", leaf=f"status_{earlier:%Y%m%d}"),
        "trigger": partial(
            run,
            "CREATE FUNCTION {schema}.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$; "
            "CREATE TRIGGER refuse AFTER INSERT ON {status} FOR EACH ROW "
            f"WHEN (NEW.id = '{kept}') EXECUTE FUNCTION {{schema}}.refuse()",
        ),
    }[cause]()
    partitions = AsyncTimePartitions(store._database, store._schema, store._deleter, store._tables)
    for _ in range(2):
        async for _ in partitions.partition_steps():
            pass
    assert await days(run) == await days(run, "chunks") == named(earlier) + AHEAD
    assert len(await run(f"SELECT seq FROM {{chunks}} WHERE id = '{kept}'")) == 3
    [warning] = messages(caplog)
    assert f"the partitions of {earlier} and perhaps of other days are not dropped: " in warning


DISCARD = (
    "CREATE FUNCTION {schema}.discard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "IF current_setting('app.tenant', true) IS NULL THEN RETURN NULL; END IF; RETURN NEW; END $$; "
    f"CREATE TRIGGER discard BEFORE INSERT ON {{leaf}} FOR EACH ROW WHEN (NEW.id <> '{MARKER}') "
    "EXECUTE FUNCTION {schema}.discard()"
)


@pytest.mark.parametrize("leaf", [*TABLES, "chunks_default_time"])
async def test_triggers_that_could_discard_rows_keep_partitions(run, client, store, caplog, leaf):
    kept = id_of(PAST, "kept")
    await add(run, kept, "active")
    await add(run, id_of(PAST, "expired"), expires_at=AN_HOUR_AGO)
    await drop_partitions(run, TODAY)
    await run(DISCARD, leaf=leaf)
    async with AsyncHousekeeper(store, every=0.05):
        await async_until(lambda: turns(client, store) > 2)
    assert await days(run) == named(PAST) + AHEAD
    assert await texts(store, kept) == ["c1", "c2", "c3"]
    assert await run(f"SELECT id FROM {{status}} WHERE id <> '{MARKER}'") == [(kept,)]  # without the wait for a drop
    [warning] = messages(caplog)
    assert "no partitions are dropped" in warning
    await run("ALTER TABLE {leaf} DISABLE TRIGGER discard", leaf=leaf)
    await take_turn(run, client, store)
    assert await days(run) == AHEAD
    assert await texts(store, kept) == ["c1", "c2", "c3"]


@pytest.mark.parametrize("table", TABLES)
async def test_drop_that_would_lose_rows_is_undone(run, store, table, schema_name):
    kept = id_of(PAST, "kept")
    for id in (kept, id_of(PAST, "archived")):
        await store.create(id)
        await store.append_many(id, ["a", "b"])
    await store.complete(id)
    assert await store.archive(older_than=0) == (1, 2)
    tables = [Table(schema_name, each) for each in TABLES]
    found = await store._database.query(PARTITIONS, [wanted(tables)])
    columns = {row[0]: json.loads(row[5]) for row in found}
    await run(DISCARD, leaf=table)  # meanwhile
    drop = drop_statement(tables, PAST, [columns[each.quoted] for each in tables])
    with pytest.raises(psycopg.Error, match="discards rows that must be kept"):
        await store._database.query(drop, [])
    assert await days(run) == await days(run, "chunks") == named(PAST) + AHEAD
    assert await texts(store, kept) == await texts(store, id) == ["a", "b"]
    await run("DROP TRIGGER discard ON {leaf}", leaf=table)
    await store._database.query(drop, [])
    assert await days(run) == await days(run, "chunks") == AHEAD
    assert await texts(store, kept) == await texts(store, id) == ["a", "b"]


async def test_drop_gives_up_soon_if_it_must_wait(run, client, store, dsn, tables, caplog):
    id = await store.create()
    async with await psycopg.AsyncConnection.connect(dsn) as reader:
        await reader.execute(sql.SQL("SELECT FROM {}").format(tables["status_table"]))
        await take_turn(run, client, store)
        assert await days(run) == named(PAST) + AHEAD
        assert "it is tried again in the next period" in messages(caplog, logging.INFO)[0]
        assert await store.append(id, "a") == 1
        await reader.rollback()
    await take_turn(run, client, store)
    assert await days(run) == AHEAD
    assert messages(caplog) == []


async def test_readers_and_writers_see_no_gap(run, client, store, dsn, tables, schema_name, run_sql):
    past = [PAST - timedelta(days=number) for number in range(6)]
    ids = [id_of(day, "kept") for day in past]
    read = {id: [] for id in ids}
    ended = False

    async with AsyncPostgresStreamStore(dsn, **tables) as other, AsyncPostgresStreamStore(dsn, **tables) as third:

        async def write():
            number = 0
            while not ended:
                number += 1
                for id in ids:
                    assert await other.append(id, str(number)) == number
            for id in ids:
                await other.complete(id)
            return number

        async def read_one(id):
            async for chunk in third.read_from(id):
                read[id].append(chunk.data)

        async def check():
            while not ended:
                for id in ids:
                    assert (await store.get_status(id)).state == "active" or ended

        async def drop():
            nonlocal ended
            for day in past:
                if day != PAST:
                    run_sql(create_statement([Table(schema_name, table) for table in TABLES], day))
            for id in ids:
                await store.create(id)
            started.append(True)
            while await days(run) != AHEAD:
                await take_turn(run, client, store)
            ended = True

        started = []

        async def after_the_start(call):
            await async_until(lambda: started)
            return await call()

        calls = [drop, *(partial(after_the_start, call) for call in (write, check))]
        calls += [partial(after_the_start, partial(read_one, id)) for id in ids]
        results = await async_gather(*calls)
    written = [str(number) for number in range(1, results[1] + 1)]
    assert all(texts == written for texts in read.values())


async def test_two_housekeepers_at_once(run, store, dsn, tables, caplog):
    await add(run, id_of(PAST, "a"), "active")
    await drop_partitions(run, TODAY)
    # Without the row with which they take turns, each of them cleans up by itself.
    await run(f"ALTER TABLE {{status}} ADD CHECK (id <> '{MARKER}')")
    async with (
        AsyncPostgresStreamStore(dsn, **tables) as first,
        AsyncPostgresStreamStore(dsn, **tables) as second,
        AsyncHousekeeper(first, every=0.05),
        AsyncHousekeeper(second, every=0.05),
    ):
        while await days(run) != AHEAD:
            await async_sleep(0.02)
        await async_sleep(0.2)
    assert await days(run) == await days(run, "chunks") == AHEAD
    assert not [text for text in messages(caplog) if "failed" in text]
    assert await texts(store, id_of(PAST, "a")) == ["c1", "c2", "c3"]


async def test_process_killed_during_the_drop(run, client, store, dsn, tables, caplog):
    await add(run, id_of(PAST, "a"), "active")
    await run(
        "CREATE FUNCTION {schema}.pause() RETURNS trigger LANGUAGE plpgsql AS $$ "
        "BEGIN PERFORM pg_sleep(60), 'paused drop'; RETURN NEW; END $$; "
        "CREATE TRIGGER pause AFTER INSERT ON {status} FOR EACH ROW "
        "WHEN (NEW.state = 'active') EXECUTE FUNCTION {schema}.pause()"
    )
    sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query LIKE '%$partitions$%'"
    pids = []
    async with AsyncHousekeeper(store, every=HOUR):
        while not pids:
            pids = await run(sleeping)
        for (pid,) in pids:
            await run(f"SELECT pg_terminate_backend({pid}, 5000)")
    assert await days(run) == await days(run, "chunks") == named(PAST) + AHEAD
    assert await leaf_of(run, id_of(PAST, "a")) == f"status_{PAST:%Y%m%d}"
    await run("DROP TRIGGER pause ON {status}")
    await take_turn(run, client, store)
    assert await days(run) == AHEAD
    assert await texts(store, id_of(PAST, "a")) == ["c1", "c2", "c3"]


async def test_role_that_may_not_change_the_tables(run, dsn, tables, schema_name, caplog):
    role = f"role_{uuid.uuid4().hex}"
    await run(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA {{schema}} TO {role}")
    await run(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {{chunks}}, {{status}} TO {role}")
    try:
        await add(run, id_of(PAST, "a"), expires_at=AN_HOUR_AGO)
        await add(run, id_of(PAST, "b"), expires_at=IN_AN_HOUR)
        limited = make_conninfo(dsn, options=f"-c role={role}")
        async with AsyncRecordingClient(limited) as client, AsyncPostgresStreamStore(client, **tables) as store:
            async with AsyncHousekeeper(store, every=0.05):
                await async_until(lambda: turns(client, store) > 2)
        assert await days(run) == named(PAST) + AHEAD
        assert await run(f"SELECT id FROM {{status}} WHERE id <> '{MARKER}'") == [(id_of(PAST, "b"),)]
        [warning] = messages(caplog)
        assert "this role may not create and drop partitions" in warning
        assert "whose role owns the tables" in warning
    finally:
        await run(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_role_that_may_not_give_tables_to_their_owner(run, dsn, tables, caplog):
    if (await run("SELECT current_setting('server_version_num')::integer"))[0][0] < 160000:
        pytest.skip("memberships without SET need PostgreSQL 16")
    owner, member = (f"role_{uuid.uuid4().hex}" for _ in range(2))
    await run(f"CREATE ROLE {owner}; CREATE ROLE {member}; GRANT {owner} TO {member} WITH INHERIT TRUE, SET FALSE")
    await run(f"GRANT ALL ON SCHEMA {{schema}} TO {owner}")
    try:
        for (name,) in await run(
            "SELECT relname FROM pg_class WHERE relnamespace = {schema_oid} AND relkind IN ('r', 'p')"
        ):
            await run(f"ALTER TABLE {{name}} OWNER TO {owner}", name=name)
        await drop_partitions(run, TODAY)
        limited = make_conninfo(dsn, options=f"-c role={member}")
        async with AsyncRecordingClient(limited) as client, AsyncPostgresStreamStore(client, **tables) as store:
            await take_turn(run, client, store)
        [warning] = messages(caplog)
        assert "this role may not create and drop partitions" in warning
    finally:
        await run(f"DROP OWNED BY {owner} CASCADE; DROP ROLE {member}; DROP ROLE {owner}")


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_other_isolation_levels_change_no_partition(run, dsn, tables, caplog, level):
    await add(run, id_of(PAST, "a"))
    isolated = make_conninfo(dsn, options=f"-c default_transaction_isolation={level.replace(' ', chr(92) + ' ')}")
    async with AsyncRecordingClient(isolated) as client, AsyncPostgresStreamStore(client, **tables) as store:
        await take_turn(run, client, store)
    assert await days(run) == named(PAST) + AHEAD
    [warning] = messages(caplog)
    assert f"the partitions of {PAST} and perhaps of other days are not dropped" in warning
    assert "set default_transaction_isolation of this role" in warning


async def test_policy_that_hides_rows_changes_no_partition(run, dsn, tables, caplog, schema_name):
    role = f"role_{uuid.uuid4().hex}"
    await run(f"CREATE ROLE {role}; GRANT ALL ON SCHEMA {{schema}} TO {role}")
    await add(run, id_of(PAST, "hidden"), "active")
    owned = [
        name
        for (name,) in await run(
            "SELECT relname FROM pg_class WHERE relnamespace = {schema_oid} AND relkind IN ('r', 'p')"
        )
    ]
    for name in owned:
        await run(f"ALTER TABLE {{name}} OWNER TO {role}", name=name)
    for name in ("status", f"status_{PAST:%Y%m%d}"):
        await run("ALTER TABLE {name} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY", name=name)
        await run("CREATE POLICY shown ON {name} USING (id NOT LIKE '%hidden')", name=name)
    try:
        limited = make_conninfo(dsn, options=f"-c role={role}")
        async with AsyncRecordingClient(limited) as client, AsyncPostgresStreamStore(client, **tables) as store:
            await take_turn(run, client, store)
        assert await days(run) == named(PAST) + AHEAD
        assert "are not dropped" in messages(caplog)[0]
        assert "row-level security" in messages(caplog)[0]
    finally:
        await run(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


async def test_new_partitions_belong_to_the_owner_of_the_table(run, client, store, schema_name):
    role = f"role_{uuid.uuid4().hex}"
    await run(f"CREATE ROLE {role}; GRANT ALL ON SCHEMA {{schema}} TO {role}")
    await drop_partitions(run, TODAY)
    try:
        for table in ("chunks", "status"):
            await run(f"ALTER TABLE {{{table}}} OWNER TO {role}")
        await take_turn(run, client, store)
        for name in (f"chunks_{TODAY:%Y%m%d}", f"status_{TODAY:%Y%m%d}"):
            assert await run(
                "SELECT relowner::regrole::text, reloptions FROM pg_class "
                f"WHERE relname = '{name}' AND relnamespace = {{schema_oid}}"
            ) == [(role, ["fillfactor=50", "autovacuum_vacuum_scale_factor=0.05"] if "status" in name else None)]
    finally:
        await run(f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


async def test_clean_up_deletes_everything_that_has_expired(run, store):
    await add(run, id_of(PAST, "a"), expires_at=AN_HOUR_AGO)
    await add(run, id_of(TODAY, "b"), expires_at=AN_HOUR_AGO)
    await add(run, "c", expires_at=AN_HOUR_AGO)
    await add(run, "d", expires_at=IN_AN_HOUR)
    assert await store.cleanup() == (3, 9)
    assert [info.id async for info in store.list()] == ["d"]
    assert await days(run) == named(PAST) + AHEAD


async def test_lists_are_sorted_by_code_point_across_partitions(run, store):
    ids = [
        "B",
        "a",
        "Z",
        "_",
        "é",
        "0",
        id_of(TODAY, "x"),
        id_of(PAST, "x"),
        id_of(TODAY + timedelta(days=1), "x"),
        "z",
    ]
    for id in ids:
        await store.create(id)
    assert [info.id async for info in store.list()] == sorted(ids)
