"""The housekeeper: one turn per period, its work, its log, failures and its end."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import pairwise

import psycopg
import pytest
from support import servers
from support.concurrency import async_sleep, async_until, async_workers
from support.recording import AsyncRecordingClient

from aibind_postgres import (
    AsyncHousekeeper,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    StoreClosedError,
)
from aibind_postgres._async import deleting
from aibind_postgres._housekeeping import MARKER

HOUR = 3600  # seconds

# Records the time of each turn.
RECORD_TURNS = """
CREATE TABLE {schema}.turns (time bigint);
CREATE FUNCTION {schema}.record_turn() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO {schema}.turns VALUES (NEW.expires_at);
  RETURN NEW;
END $$;
CREATE TRIGGER record_turn AFTER INSERT OR UPDATE ON {status}
FOR EACH ROW WHEN (NEW.state = 'deleted') EXECUTE FUNCTION {schema}.record_turn()
"""

REFUSE_MARKER = """
CREATE FUNCTION {schema}.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'refused';
END $$;
CREATE TRIGGER refuse BEFORE INSERT ON {status}
FOR EACH ROW WHEN (NEW.state = 'deleted') EXECUTE FUNCTION {schema}.refuse()
"""


@pytest.fixture(autouse=True)
def _records_info(caplog):
    caplog.set_level(logging.INFO, logger="aibind_postgres")


@pytest.fixture
async def run(admin_dsn, tables, conversations, schema_name):
    """Return a function that runs a statement with the names of the tables and returns its rows."""
    names = {"chunks": tables["chunks_table"], "status": tables["status_table"], "conversations": conversations}
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as connection:

        async def run(sql):
            cursor = await connection.execute(
                psycopg.sql.SQL(sql).format(**names, schema=psycopg.sql.Identifier(schema_name))
            )
            return await cursor.fetchall() if cursor.description else []

        yield run


@pytest.fixture
def tables(schema_name, conversations):
    """The stream tables, next to those of the fixture `conversations`."""
    return {
        "chunks_table": psycopg.sql.Identifier(schema_name, "other chunks"),
        "status_table": psycopg.sql.Identifier(schema_name, "other status"),
    }


@pytest.fixture
async def client(dsn):
    async with AsyncRecordingClient(dsn) as client:
        yield client


@pytest.fixture
async def store(client, tables, conversations):
    async with AsyncPostgresStreamStore(client, **tables) as store:
        yield store


@pytest.fixture
async def chats(client, conversations):
    async with AsyncPostgresConversationStore(client, table=conversations) as store:
        yield store


async def fill(run):
    """Add two abandoned streams, three expired ones with five chunks, four expired conversations, and some to keep."""
    await run(
        "INSERT INTO {status} (id, state, total_chunks, expires_at, created_at) VALUES "
        "('abandoned 1', 'active', 0, 1, now() - interval '11 minutes'), "
        "('abandoned 2', 'active', 0, 1, now() - interval '1 day'), "
        "('alive', 'active', 0, 1, now() - interval '9 minutes'), "
        "('expired 1', 'done', 3, 1, now()), ('expired 2', 'error', 2, 1, now()), ('expired 3', 'stopped', 0, 1, now())"
    )
    await run("INSERT INTO {chunks} VALUES ('expired 1', 1, ''), ('expired 1', 2, ''), ('expired 1', 3, '')")
    await run("INSERT INTO {chunks} VALUES ('expired 2', 1, ''), ('expired 2', 2, '')")
    await run("INSERT INTO {conversations} SELECT 's' || i, '', 1 FROM generate_series(1, 4) i")
    await run("INSERT INTO {conversations} VALUES ('kept', '', 9e15)")


async def remaining(run):
    """Return the ids that `fill` or the housekeeper has left."""
    streams = await run("SELECT id, state FROM {status} WHERE state <> 'deleted' ORDER BY id")
    return streams + await run("SELECT session_id, '' FROM {conversations} WHERE data <> '' OR expires_at = 9e15")


CLEAN = [("abandoned 1", "error"), ("abandoned 2", "error"), ("alive", "active"), ("kept", "")]


def answered(client, part):
    """Return the answered statements that contain a part."""
    return [each for each in client.statements if part in each.sql and each.rows is not None]


def attempts(client):
    """Return the results of the attempts to take a turn: whether it was taken."""
    return [each.rows[0][0] for each in client.statements if MARKER in each.params and each.rows is not None]


def infos(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


@asynccontextmanager
async def ten_housekeepers(client, tables, every):
    """Run housekeepers with a store each, as in ten processes."""
    stores = [AsyncPostgresStreamStore(client, **tables) for _ in range(10)]
    housekeepers = [AsyncHousekeeper(store, every=every) for store in stores]
    for housekeeper in housekeepers:
        await housekeeper.start()
    yield
    for housekeeper in housekeepers:
        await housekeeper.close()
    for store in stores:
        await store.close()


async def test_ten_housekeepers_take_one_turn_per_period(client, tables, run):
    async def one_period(turns):
        async with ten_housekeepers(client, tables, HOUR):
            await async_until(lambda: len(attempts(client)) == 10 * turns)
            await async_until(lambda: len(answered(client, "state = 'deleted' AND expires_at")) == turns)
        assert attempts(client).count(True) == turns

    await one_period(1)
    for turns in (2, 3):
        await run("UPDATE {status} SET expires_at = expires_at - 3600000")
        await one_period(turns)
    cleanups = [each for each in client.statements if "AS streams" in each.sql]
    statements = 2 if servers.PARTITIONS == "time" else 1  # one for DEFAULT, one for the partitions of days
    assert len(cleanups) == 3 * statements


async def test_restarted_process_does_not_take_another_turn(client, store, chats):
    for number in range(1, 4):
        async with AsyncHousekeeper(store, chats, HOUR):
            await async_until(lambda number=number: len(attempts(client)) == 2 * number)
    assert attempts(client) == [True, True, False, False, False, False]


async def test_turns_are_a_period_apart(client, tables, run):
    await run(RECORD_TURNS)
    turns = []
    async with ten_housekeepers(client, tables, 0.3):
        while len(turns) < 5:
            await async_sleep(0.05)
            turns = [time for (time,) in await run("SELECT time FROM {schema}.turns ORDER BY time")]
    assert [later - earlier for earlier, later in pairwise(turns) if later - earlier < 300] == []


async def test_shortest_period_applies(client, store, chats, run):
    async with AsyncHousekeeper(store, every=HOUR):
        await async_until(lambda: len(attempts(client)) == 1)
    await run("UPDATE {status} SET expires_at = expires_at - 60000")
    async with AsyncHousekeeper(store, every=timedelta(minutes=1)):
        await async_until(lambda: len(attempts(client)) == 2)
    assert attempts(client) == [True, True]


async def test_turn_in_the_future_is_of_a_clock_that_was_set_back(client, store, run):
    for hours, number in ((0.9, 2), (2, 3)):
        async with AsyncHousekeeper(store, every=HOUR):
            await async_until(lambda number=number: len(attempts(client)) == number - 1)
        await run(f"UPDATE {{status}} SET expires_at = expires_at + {hours} * 3600000")
    async with AsyncHousekeeper(store, every=HOUR):
        await async_until(lambda: len(attempts(client)) == 3)
    assert attempts(client) == [True, False, True]


async def test_work_and_log(store, chats, run, caplog):
    await fill(run)
    async with AsyncHousekeeper(store, chats, every=0.2):
        await async_until(lambda: len(infos(caplog)) == 2)
        turn = "SELECT max(expires_at) FROM {status} WHERE state = 'deleted'"
        first = await run(turn)
        while await run(turn) == first:  # the next turns have nothing to do, and log nothing
            await async_sleep(0.02)
    assert await remaining(run) == CLEAN
    assert [text.partition('."')[2] for text in infos(caplog)] == [
        'other status": abandoned streams ended: 2, streams deleted: 3, chunks deleted: 5',
        'conversations": conversations deleted: 4',
    ]
    assert warnings(caplog) == []
    assert (await store.get_status("abandoned 1")).error == "abandoned: no chunk for 600 seconds"


async def test_one_store_alone(store, chats, run, caplog):
    await fill(run)
    async with AsyncHousekeeper(None, chats):
        await async_until(lambda: len(infos(caplog)) == 1)
    assert len(await run("SELECT id FROM {status}")) == 6
    async with AsyncHousekeeper(store, None):
        await async_until(lambda: len(infos(caplog)) == 2)
    assert await remaining(run) == CLEAN


async def test_archiving_only_if_it_is_wanted(store, run, caplog):
    for id, age in (("old", "2 hours"), ("new", "1 minute")):
        await store.create(id)
        await store.append_many(id, ["a", "b", "c"])
        await store.complete(id)
        await run(f"UPDATE {{status}} SET created_at = now() - interval '{age}', expires_at = 9e15 WHERE id = '{id}'")
        await run(f"UPDATE {{chunks}} SET created_at = now() - interval '{age}' WHERE id = '{id}'")
    await run("INSERT INTO {status} (id, state, expires_at) VALUES ('expired', 'done', 1)")
    async with AsyncHousekeeper(store):
        await async_until(lambda: len(infos(caplog)) == 1)
    await run("DELETE FROM {status} WHERE state = 'deleted'")
    async with AsyncHousekeeper(store, archive_after=timedelta(hours=1)):
        await async_until(lambda: len(infos(caplog)) == 2)
    assert [text.partition('."')[2] for text in infos(caplog)] == [
        'other status": streams deleted: 1',
        'other status": streams archived: 1, chunks archived: 3',
    ]
    assert await run("SELECT DISTINCT id FROM {chunks}") == [("new",)]
    assert [chunk.data async for chunk in store.read_from("old")] == ["a", "b", "c"]
    assert warnings(caplog) == []


async def test_archiving_without_the_migration_is_logged(store, run, caplog):
    await run("ALTER TABLE {status} DROP COLUMN archived_at")
    await run("DROP TABLE {schema}.{other}".replace("{other}", '"other chunks_archive"'))
    async with AsyncHousekeeper(store, archive_after=0):
        await async_until(lambda: len(warnings(caplog)) == 1)
    assert "archive failed: archive needs migration 0005" in warnings(caplog)[0]


async def test_invalid_arguments(store, chats):
    with pytest.raises(ValueError, match="archive_after needs a stream store"):
        AsyncHousekeeper(None, chats, archive_after=60)
    with pytest.raises(ValueError, match="archive_after"):
        AsyncHousekeeper(store, archive_after=-1)
    with pytest.raises(ValueError, match="both be None"):
        AsyncHousekeeper(None, None)
    for every in (0, -1, float("nan"), 1e10):
        with pytest.raises(ValueError, match="every"):
            AsyncHousekeeper(store, chats, every)
    for streams, conversations in ((chats, None), (None, store), ("dsn", None)):
        with pytest.raises(TypeError, match="must be of type"):
            AsyncHousekeeper(streams, conversations)


async def test_marker_is_hidden(client, store, chats, run):
    async with AsyncHousekeeper(store, chats, HOUR):
        await async_until(lambda: len(answered(client, "AS deleted")) == 1)
    assert [info async for info in store.list()] == []
    assert [info async for info in chats.list()] == []
    assert len(await chats.load(MARKER)) == 0
    await run("UPDATE {status} SET expires_at = 1")
    await run("UPDATE {conversations} SET expires_at = 1")
    assert await store.cleanup() == (0, 0)
    assert await chats.cleanup() == 0
    assert await store.fail_abandoned(0) == []
    assert await run("SELECT id, state FROM {status}") == [(MARKER, "deleted")]
    assert await run("SELECT session_id, data FROM {conversations}") == [(MARKER, "")]


async def test_failure_of_one_part_leaves_the_others(store, chats, run, caplog):
    await fill(run)
    await run("ALTER TABLE {chunks} RENAME TO elsewhere")
    async with AsyncHousekeeper(store, chats, every=0.2):
        await async_until(lambda: len(warnings(caplog)) >= 4)
        assert "conversations deleted: 4" in infos(caplog)[0]
        for name, text in zip(("fail_abandoned", "cleanup"), warnings(caplog), strict=False):
            assert f"{name} failed: " in text
            assert "other chunks" in text
            assert "tried again in 0.2 seconds" in text
        await run("ALTER TABLE {schema}.elsewhere RENAME TO {other}".replace("{other}", '"other chunks"'))
        await async_until(lambda: len(infos(caplog)) == 2)
    assert await remaining(run) == CLEAN


async def test_end_of_the_block_does_not_wait_for_a_statement(client, dsn, store, chats, run, tables):
    await fill(run)
    lock = psycopg.sql.SQL("LOCK TABLE {}").format(tables["chunks_table"])
    async with await psycopg.AsyncConnection.connect(dsn) as blocker:
        await blocker.execute(lock)
        async with AsyncHousekeeper(store, chats, HOUR):
            await async_until(lambda: any("AS page (last)" in each.sql for each in client.statements))
        assert not answered(client, "AS page (last)")
        await blocker.rollback()
    await async_until(lambda: "aibind_postgres-housekeeper" not in async_workers())
    assert not [each for each in client.statements if "AS chunks" in each.sql]


async def test_end_of_the_block_leaves_the_rest_of_a_clean_up(dsn, tables, conversations, run, monkeypatch, caplog):
    await fill(run)
    monkeypatch.setattr(deleting, "MAX_ROWS", 1)

    class EndsAfterOne(AsyncRecordingClient):
        async def query(self, sql, params):
            rows = await super().query(sql, params)
            if "AS streams" in sql:
                housekeeper._closing.set()
            return rows

    async with EndsAfterOne(dsn) as client, AsyncPostgresStreamStore(client, **tables) as store:
        async with AsyncHousekeeper(store, every=HOUR) as housekeeper:
            await async_until(lambda: infos(caplog))
            await async_until(lambda: "aibind_postgres-housekeeper" not in async_workers())
        assert len([each for each in client.statements if "AS streams" in each.sql]) == 1
    assert "streams deleted: 1" in infos(caplog)[0]


@pytest.mark.parametrize("closed", ["store", "chats"])
async def test_closing_a_store_ends_the_housekeeper(client, store, chats, caplog, closed):
    async with AsyncHousekeeper(store, chats, HOUR) as housekeeper:
        await async_until(lambda: len(attempts(client)) == 2)
        assert "aibind_postgres-housekeeper" in async_workers()
        await {"store": store, "chats": chats}[closed].close()
        await async_until(lambda: "aibind_postgres-housekeeper" not in async_workers())
    with pytest.raises(StoreClosedError):
        await housekeeper.start()
    assert "aibind_postgres-housekeeper" not in async_workers()
    assert caplog.records == []


async def test_start_and_close(client, store):
    housekeeper = AsyncHousekeeper(store, every=HOUR)
    await housekeeper.close()
    for number in (1, 2):
        await housekeeper.start()
        with pytest.raises(RuntimeError, match="runs already"):
            await housekeeper.start()
        await async_until(lambda number=number: len(attempts(client)) == number)
        await housekeeper.close()
        await housekeeper.close()
    assert "aibind_postgres-housekeeper" not in async_workers()


async def test_exception_of_the_block_propagates(store):
    with pytest.raises(LookupError):
        async with AsyncHousekeeper(store):
            raise LookupError


async def test_transaction_of_the_application_is_left_alone(dsn, tables, conversations, run, caplog):
    await fill(run)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        store = AsyncPostgresStreamStore(connection, **tables)
        async with connection.transaction():
            await store.create("kept")
            async with AsyncHousekeeper(store, every=HOUR):
                await async_until(lambda: warnings(caplog))
        assert "give the housekeeper a store with a pool" in warnings(caplog)[0]
        assert (await store.get_status("kept")).state == "active"
        async with AsyncHousekeeper(store, every=HOUR):
            await async_until(lambda: infos(caplog))
        await store.close()


async def test_refused_marker(store, run, caplog):
    await fill(run)
    await run(REFUSE_MARKER)
    async with AsyncHousekeeper(store, every=0.1):
        await async_until(lambda: infos(caplog))
        await run("UPDATE {status} SET expires_at = 1")
        await async_until(lambda: len(infos(caplog)) == 2)
    # With partitions by time, there is another warning of the trigger.
    assert len([text for text in warnings(caplog) if "each process cleans up by itself" in text]) == 1


async def test_long_transaction_with_the_marker_delays_nobody(client, dsn, store, tables, run):
    async with AsyncHousekeeper(store, every=HOUR):
        await async_until(lambda: len(attempts(client)) == 1)
    await run("UPDATE {status} SET expires_at = 1")
    async with await psycopg.AsyncConnection.connect(dsn, cursor_factory=psycopg.AsyncRawCursor) as connection:
        marker = [MARKER, HOUR * 1000, store._tables[0].quoted]
        cursor = await connection.execute(store._schema.statements.take_turn, marker)
        assert (await cursor.fetchone())[0] is True
        async with AsyncHousekeeper(store, every=HOUR):
            await async_until(lambda: len(attempts(client)) == 2)
        assert attempts(client) == [True, False]
