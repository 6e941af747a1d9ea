"""Stored chunks come from the replica, and nothing shows it: a second schema takes the place of a replica."""

from __future__ import annotations

import logging
import math
import os

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool
from support import grants
from support.concurrency import AsyncBackground, async_until
from support.recording import AsyncRecordingClient

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    ForkedError,
    StoreClosedError,
    StreamNotFoundError,
    _replica,
    schema,
)
from aibind_postgres._async import replica as replica_module
from aibind_postgres._pages import FIRST_PAGE_CHUNKS

NAMES = {"chunks_table": "chunks", "status_table": "status"}
TEXTS = [f"text {number}" for number in range(1, 121)]


class Copies:
    """Two schemas with the tables of a primary and of its replica, and clients of them that record statements."""

    def __init__(self, dsn, run_sql, primary, replica):
        self.dsns = [make_conninfo(dsn, options=f'-csearch_path="{name}"') for name in (primary, replica)]
        self._run_sql = run_sql
        self._names = {"primary": primary, "replica": replica}
        self.replica = AsyncRecordingClient(self.dsns[1])
        self.primary = AsyncRecordingClient(self.dsns[0])

    def run(self, text):
        """Run SQL with `{primary}` and `{replica}` as the names of the schemas."""
        names = {key: sql.Identifier(name).as_string() for key, name in self._names.items()}
        self._run_sql(text.format(**names))

    def replicate(self, *tables):
        """Replay the changes of the primary, in these tables only if they are named."""
        for table in tables or ("status", "chunks", "chunks_archive"):
            self.run(f"DELETE FROM {{replica}}.{table}; INSERT INTO {{replica}}.{table} TABLE {{primary}}.{table}")

    def clear(self):
        self.primary.statements.clear()
        self.replica.statements.clear()

    def served(self):
        """Return the numbers of chunks that the primary and the replica have returned since the last call."""
        numbers = tuple(
            sum(row[0] > 0 for statement in client.statements for row in statement.rows or [] if is_page(statement))
            for client in (self.primary, self.replica)
        )
        self.clear()
        return numbers


def is_page(statement):
    return "-greatest(total_chunks" in statement.sql


@pytest.fixture
def schemas(run_sql, schema_name, granted_role):
    names = schema_name, f"{schema_name}_replica"
    run_sql(f'CREATE SCHEMA "{names[1]}"')
    for name in names:
        tables = [sql.Identifier(name, table) for table in ("chunks", "status", "conversations")]
        names_of_tables = dict(zip(("chunks_table", "status_table", "conversations_table"), tables, strict=True))
        run_sql(schema.render(**names_of_tables))
        if granted_role is not None:
            run_sql(grants.statements_for(granted_role, **names_of_tables))
    yield names
    run_sql(f'DROP SCHEMA "{names[1]}" CASCADE')


@pytest.fixture
async def copies(dsn, run_sql, schemas):
    copies = Copies(dsn, run_sql, *schemas)
    async with copies.primary, copies.replica:
        yield copies


@pytest.fixture
async def store(copies):
    async with AsyncPostgresStreamStore(copies.primary, replica=copies.replica, **NAMES) as store:
        yield store


@pytest.fixture
def long_pauses(monkeypatch):
    """An unavailable replica is not tried again during the test, unless it calls `end_pause`."""
    monkeypatch.setattr(_replica, "MIN_PAUSE", 1000.0)
    monkeypatch.setattr(_replica, "MAX_PAUSE", 1000.0)


def end_pause(store):
    store._replica._outages._ask_at = 0.0


async def finished(store, texts=TEXTS, id=None):
    id = await store.create(id)
    await store.append_many(id, texts)
    await store.complete(id)
    return id


async def collect(chunks):
    return [chunk.data async for chunk in chunks]


def warnings(caplog):
    records = [record for record in caplog.records if record.name.startswith("aibind_postgres")]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


WAYS = {
    "read_from": lambda store, id: store.read_from(id),
    "stored": lambda store, id: store.read_from(id, follow=False),
    "events": lambda store, id: store.events(id),
    "stored events": lambda store, id: store.events(id, follow=False),
    "read_with_times": lambda store, id: store.read_with_times(id),
    "replay": lambda store, id: store.replay(id, speed=math.inf),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_finished_stream_is_read_from_the_replica(store, copies, way):
    id = await finished(store)
    assert await collect(way(store, id)) == TEXTS
    assert copies.served() == (len(TEXTS), 0)
    copies.replicate()
    assert await collect(way(store, id)) == TEXTS
    assert copies.served() == (0, len(TEXTS))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("count", [120, 3000])
async def test_archived_stream_is_read_from_the_replica(store, copies, way, count):
    texts = [f"text {number}" for number in range(count)]
    id = await finished(store, texts)
    copies.replicate()
    await store.archive(0.001)
    assert await collect(way(store, id)) == texts  # the replica still has the chunks
    copies.replicate()
    copies.clear()
    assert await collect(way(store, id)) == texts
    by_primary, by_replica = copies.served()
    assert by_primary == 0
    assert by_replica >= math.ceil(count / 1000)  # a row has a thousand chunks
    copies.run("DELETE FROM {replica}.chunks_archive WHERE first_seq = 1")  # as of a publication without this table
    assert await collect(way(store, id)) == texts


async def test_position_status_and_times(store, copies):
    id = await finished(store)
    await store.delete(id)
    id = await store.create(id)
    await store.append_many(id, TEXTS)
    await store.fail(id, "line 1\nline 2")
    times = [tuple(chunk) async for chunk in store.read_with_times(id, 70)]
    copies.replicate()
    copies.clear()
    assert [tuple(chunk) async for chunk in store.read_with_times(id, 70)] == times
    assert [tuple(chunk) async for chunk in store.read_from(id, 119)] == [(120, TEXTS[-1])]
    assert copies.served() == (0, 51)
    assert await collect(store.read_from(id, 120)) == await collect(store.read_from(id, 500)) == []
    assert copies.replica.statements == []  # the status of the primary shows that no chunk follows
    stream = await AsyncDurableStream.resume(store, id, 100)
    events = b"".join([event async for event in stream.sse()])
    assert events.count(b"data: text ") == 20
    assert b"line 1" in events
    assert copies.served() == (0, 20)


async def test_only_the_end_of_an_active_stream_is_read_on_the_primary(store, copies):
    id = await store.create()
    await store.append_many(id, TEXTS)
    copies.replicate()
    await store.append(id, "new")
    assert await collect(store.read_from(id, follow=False)) == [*TEXTS, "new"]
    assert copies.served() == (len(TEXTS) + 1 - FIRST_PAGE_CHUNKS, FIRST_PAGE_CHUNKS)
    chunks = []

    async def read():
        async for chunk in store.read_from(id):
            chunks.append(chunk.data)

    async with AsyncBackground(read) as reading:
        await async_until(lambda: len(chunks) == 121)
        await store.append(id, "live")
        await store.complete(id)
        await reading.result()
    assert chunks == [*TEXTS, "new", "live"]


async def test_reader_of_a_live_stream_needs_one_statement(store, copies):
    id = await store.create()
    await store.append_many(id, TEXTS[:10])
    await collect(store.read_from(id, follow=False))
    copies.clear()
    assert [tuple(chunk) async for chunk in store.read_from(id, follow=False)] == list(enumerate(TEXTS[:10], 1))
    assert [tuple(chunk)[:2] async for chunk in store.read_with_times(id)] == list(enumerate(TEXTS[:10], 1))
    assert copies.primary.answers(id) == 2  # the notification of the append may come late
    assert copies.replica.statements == []


LAGS = {
    "nothing yet": ["DELETE FROM {replica}.status", "DELETE FROM {replica}.chunks"],
    "no status yet": ["DELETE FROM {replica}.status"],
    "no chunks yet": ["DELETE FROM {replica}.chunks"],
    "fewer chunks": [
        "DELETE FROM {replica}.chunks WHERE seq > 40",
        "UPDATE {replica}.status SET state = 'active', total_chunks = 40",
    ],
    "a gap": ["DELETE FROM {replica}.chunks WHERE seq = 20"],
    "an earlier stream": [
        "UPDATE {replica}.status SET created_at = created_at - interval '1 day'",
        "UPDATE {replica}.chunks SET data = 'old', created_at = created_at - interval '1 day'",
    ],
    "chunks of an earlier stream": [
        "UPDATE {replica}.chunks SET data = 'old', created_at = created_at - interval '1 day'"
    ],
    "continued separately": [
        "UPDATE {replica}.chunks SET data = 'other', created_at = created_at + interval '1 second' WHERE seq > 30"
    ],
}


@pytest.mark.parametrize("changes", LAGS.values(), ids=LAGS)
async def test_lag_is_never_visible(store, copies, caplog, changes):
    id = await finished(store)
    copies.replicate()
    for change in changes:
        copies.run(change)
    for way in WAYS.values():
        copies.clear()
        assert await collect(way(store, id)) == TEXTS
        assert copies.primary.statements[-1].rows
    copies.replicate()
    copies.clear()
    assert await collect(store.read_from(id)) == TEXTS


async def test_stream_with_a_gap_on_both_servers(store, copies, caplog):
    with_gap, whole = await finished(store, TEXTS[:30]), await finished(store)
    copies.run(f"DELETE FROM {{primary}}.chunks WHERE id = '{with_gap}' AND seq = 20")
    copies.replicate()
    for _ in range(11):
        assert await collect(store.read_from(with_gap)) == [*TEXTS[:19], *TEXTS[20:30]]
    copies.clear()
    assert await collect(store.read_from(whole)) == TEXTS
    assert copies.served() == (0, len(TEXTS))
    assert warnings(caplog) == []


async def test_stream_that_is_still_active_on_the_replica(store, copies):
    id = await store.create()
    await store.append_many(id, TEXTS)
    copies.replicate()
    await store.complete(id)
    assert await collect(store.read_from(id)) == TEXTS
    assert copies.served() == (0, len(TEXTS))


async def test_deleted_stream_is_not_found_although_the_replica_has_it(store, copies):
    id = await finished(store)
    copies.replicate()
    reader = store.read_from(id, follow=False)
    assert [(await reader.__anext__()).data for _ in range(FIRST_PAGE_CHUNKS)] == TEXTS[:FIRST_PAGE_CHUNKS]
    async with AsyncPostgresStreamStore(copies.dsns[0], **NAMES) as other:
        await other.delete(id)
    with pytest.raises(StreamNotFoundError):
        await reader.__anext__()
    for way in WAYS.values():
        with pytest.raises(StreamNotFoundError):
            await collect(way(store, id))
    await finished(store, ["new"], id)
    assert await collect(store.read_from(id)) == ["new"]


async def test_streams_from_before_migration_0002_are_read_on_the_primary(store, copies):
    id = await finished(store)
    copies.run("UPDATE {primary}.status SET created_at = NULL")
    copies.run("UPDATE {primary}.chunks SET created_at = NULL")
    copies.replicate()
    copies.clear()
    assert await collect(store.read_from(id)) == TEXTS
    assert copies.replica.statements == []


async def test_tables_without_migration_0002(copies):
    for name in ("primary", "replica"):
        for table in ("chunks", "status"):
            copies.run(f"ALTER TABLE {{{name}}}.{table} DROP COLUMN created_at")
    async with AsyncPostgresStreamStore(copies.primary, replica=copies.replica, **NAMES) as store:
        id = await finished(store)
        copies.replicate()
        assert await collect(store.read_from(id)) == TEXTS
    assert copies.replica.statements == []


async def test_large_chunks(store, copies):
    texts = [*"x" * 60, *["y" * 300_000] * 9, "z" * 2_500_000, *"x" * 60]
    id = await finished(store, texts)
    copies.replicate()
    for way in WAYS.values():
        copies.clear()
        assert await collect(way(store, id)) == texts
        assert not any(row[0] > 0 for each in copies.primary.statements if is_page(each) for row in each.rows)


class Refusing:
    """A client whose statements raise the error of a statement that the server runs instead."""

    def __init__(self, client, statement):
        self._client = client
        self.statement = statement
        self.calls = 0

    async def query(self, text, params):
        self.calls += 1
        return await self._client.query(self.statement or text, [] if self.statement else params)


ERRORS = {
    "missing table": ("SELECT FROM missing", 'relation "missing" does not exist'),
    "missing column": ("SELECT missing FROM status", 'column "missing" does not exist'),
    "no permission": ("SELECT pg_read_file('x')", None),
    "other types": ("SELECT 'x', 1", None),
    "no rows of a status": ("SELECT 0, 'x'", None),
    "shutdown": ("DO $$ BEGIN RAISE EXCEPTION 'shuts down' USING ERRCODE = '57P01'; END $$", "shuts down"),
}


@pytest.mark.parametrize(("statement", "reason"), ERRORS.values(), ids=ERRORS)
async def test_errors_of_the_replica_cause_one_warning(copies, caplog, long_pauses, statement, reason):
    client = Refusing(copies.replica, statement)
    caplog.set_level(logging.INFO, "aibind_postgres")
    async with AsyncPostgresStreamStore(copies.primary, replica=client, **NAMES) as store:
        id = await finished(store)
        copies.replicate()
        for way in WAYS.values():
            assert await collect(way(store, id)) == TEXTS
        [warning] = warnings(caplog)
        assert warning.startswith("replica unavailable: ")
        assert reason is None or reason in warning
        assert "text 1" not in warning
        assert client.calls == 1  # no reader waits for it again
        client.statement = None
        end_pause(store)
        assert await collect(store.read_from(id)) == TEXTS
        assert "replica available again" in caplog.text
        assert len(warnings(caplog)) == 1


async def test_conflict_with_recovery_affects_one_page(copies, caplog):
    client = Refusing(copies.replica, "DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$")
    async with AsyncPostgresStreamStore(copies.primary, replica=client, **NAMES) as store:
        id = await finished(store)
        copies.replicate()
        assert await collect(store.read_from(id)) == TEXTS
        client.statement = None
        copies.clear()
        assert await collect(store.read_from(id)) == TEXTS
    assert copies.served() == (0, len(TEXTS))
    assert warnings(caplog) == []


async def test_unrelated_server_is_left_alone_after_some_pages(store, copies, caplog, long_pauses):
    id = await finished(store)
    for _ in range(20):
        assert await collect(store.read_from(id)) == TEXTS
    assert len(copies.replica.statements) == 10
    [warning] = warnings(caplog)
    assert "is not a replica of the primary" in warning


async def test_lag_that_comes_and_goes_causes_one_warning(store, copies, caplog, long_pauses):
    caplog.set_level(logging.INFO, "aibind_postgres")
    for number in range(1, 3):
        id = await finished(store)
        for _ in range(11):
            assert await collect(store.read_from(id)) == TEXTS
        copies.replicate()
        end_pause(store)
        assert await collect(store.read_from(id)) == TEXTS
        assert caplog.text.count("replica available again") == number
    assert len(warnings(caplog)) == 1


async def test_slow_replica(copies, caplog, monkeypatch):
    monkeypatch.setattr(replica_module, "ANSWER_TIMEOUT", 0.3)
    async with (
        AsyncPostgresStreamStore(copies.primary, replica=copies.dsns[1], **NAMES) as store,
        await psycopg.AsyncConnection.connect(copies.dsns[1]) as blocking,
    ):
        id = await finished(store)
        copies.replicate()
        served = None
        while served != (0, 0):  # on a busy machine, the first connection may take longer than the limit
            end_pause(store)
            copies.clear()
            assert await collect(store.read_from(id)) == TEXTS
            served = copies.served()
        caplog.clear()
        await blocking.execute("LOCK TABLE chunks")
        assert await collect(store.read_from(id)) == TEXTS
        assert copies.served() == (len(TEXTS), 0)
    [warning] = warnings(caplog)
    assert "UnansweredError" in warning


async def test_unreachable_replica(copies, caplog, long_pauses):
    nowhere = "postgresql://user:secret-word@127.0.0.1:1/db"
    async with AsyncPostgresStreamStore(copies.primary, replica=nowhere, **NAMES) as store:
        id = await finished(store)
        assert await collect(store.read_from(id)) == TEXTS
        assert "secret-word" not in repr(store)
    assert len(warnings(caplog)) == 1
    assert "secret-word" not in caplog.text


async def test_arguments(copies):
    with pytest.raises(TypeError, match="the client must be a connection string"):
        AsyncPostgresStreamStore(copies.primary, replica=5)
    with pytest.raises(ValueError, match="not a connection string"):
        AsyncPostgresStreamStore(copies.primary, replica="mysql://x")
    # The time limit of a store is for psycopg.
    store = AsyncPostgresStreamStore(copies.dsns[0], replica=copies.replica, timeout=5)
    assert "replica <" in repr(store)
    await store.close()


async def test_close(copies):
    async with AsyncConnectionPool(copies.dsns[1], min_size=1, open=False) as pool:
        for replica in (copies.dsns[1], pool):
            store = AsyncPostgresStreamStore(copies.primary, replica=replica, **NAMES)
            id = await finished(store)
            copies.replicate()
            copies.clear()
            reader = store.read_from(id)
            await reader.__anext__()
            assert copies.served() == (0, 0)  # it came from the replica
            client = store._replica.client
            assert client.is_connected()
            await store.close()
            assert client.is_connected() == (replica is pool)
            with pytest.raises(StoreClosedError):
                await collect(store.read_from(id))


async def test_open_pool_of_a_replica_belongs_to_its_process(copies, monkeypatch):
    async with AsyncConnectionPool(copies.dsns[1], min_size=1, open=False) as pool:
        store = AsyncPostgresStreamStore(copies.dsns[0], replica=pool, **NAMES)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            with pytest.raises(ForkedError):
                await collect(store.read_from("id"))
        await store.close()


async def test_transaction_of_the_caller_is_read_on_the_primary(copies, caplog, long_pauses):
    """The replica has no changes of an open transaction. This is no lag of the replica."""
    async with (
        await psycopg.AsyncConnection.connect(copies.dsns[0], autocommit=True) as connection,
        AsyncPostgresStreamStore(connection, replica=copies.replica, **NAMES) as store,
    ):
        async with connection.transaction():
            id = await finished(store)
            for _ in range(11):
                assert await collect(store.read_from(id, follow=False)) == TEXTS
        assert copies.replica.statements == []
        copies.replicate()
        assert await collect(store.read_from(id, follow=False)) == TEXTS
        assert copies.served() == (0, len(TEXTS))
    assert warnings(caplog) == []
