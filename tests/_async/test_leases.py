"""Leases: the stream of a dead producer ends without housekeeping, and that of a living one does not."""

from __future__ import annotations

import json
from datetime import timedelta
from functools import partial
from time import monotonic

import psycopg
import pytest
from _async.sources import SilentSource, items, lease_of, wait_for_renewal
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until
from support.recording import AsyncRecordingClient

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    SequenceConflictError,
    StreamNotActiveError,
    StreamWriteError,
    _leases,
)

LEASE = 0.6  # seconds
EXPIRED = ("error", _leases.EXPIRED_TEXT)
SEVERAL_LEASES = 2 * LEASE


@pytest.fixture(autouse=True)
def quick_contact(monkeypatch):
    """Let a process trust the server after a fraction of a second."""
    monkeypatch.setattr(_leases, "CONTACT", 0.3)
    monkeypatch.setattr(_leases, "CONTACT_AFTER_FAILURE", 0.3)


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables, lease=LEASE, poll_interval=0.02) as store:
        yield store


@pytest.fixture
async def reader(dsn, tables):
    """A store in place of another process."""
    async with AsyncPostgresStreamStore(dsn, **tables, lease=LEASE, poll_interval=0.02) as store:
        yield store


def refuse(run_sql, table, code):
    """Let the server refuse each update with this SQLSTATE."""
    text = (
        "CREATE OR REPLACE FUNCTION pg_temp.refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION 'busy' USING ERRCODE = '{code}'; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON {} FOR EACH ROW EXECUTE FUNCTION pg_temp.refuse()"
    )
    run_sql(sql.SQL(text).format(table))


@pytest.fixture
def limited(dsn, schema_name, run_sql):
    """Return a function that returns a connection string for a role with these privileges on the tables."""
    role = f"limited_{schema_name.lower()}"
    run_sql(f'CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA "{schema_name}" TO {role}')

    def limit(privileges):
        run_sql(f'GRANT {privileges} ON ALL TABLES IN SCHEMA "{schema_name}" TO {role}')
        return make_conninfo(dsn, user=role)

    yield limit
    run_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def status_of(store, id):
    status = await store.wait(id, 20)
    return status.state, status.error


async def reach_steadily(store):
    while not store._database.contact.is_steady(monotonic()):
        await store.get_status("any")


async def test_waiting_reader_ends_the_stream_of_a_producer_that_never_came(store, reader):
    id = await store.create(lease=LEASE)
    assert [chunk async for chunk in reader.read_from(id)] == []
    assert await status_of(reader, id) == EXPIRED


async def test_waiting_reader_ends_the_stream_of_a_dead_producer(store, reader):
    id = await store.create(lease=60)
    writer = store.writer(id)
    await writer.__aenter__()
    await writer.write("acknowledged")
    await writer.flush()
    async with AsyncBackground(partial(status_of, reader, id)) as waiting:
        await store._leases.close()  # the process no longer renews the lease
        assert await waiting.result() == EXPIRED
        assert [chunk.data async for chunk in reader.read_from(id)] == ["acknowledged"]
    # The producer is fenced: it may live and only have been slow.
    with pytest.raises(StreamNotActiveError):
        await store.append(id, "too late")
    await async_until(lambda: not writer.is_active)
    with pytest.raises(StreamNotActiveError):
        await writer.write("too late")


async def test_silent_producer_keeps_its_stream(store, reader):
    source = SilentSource()
    stream = await AsyncDurableStream.start(store, source)
    async with AsyncBackground(partial(status_of, reader, stream.id)) as waiting:
        await async_sleep(SEVERAL_LEASES)
        assert (await reader.get_status(stream.id)).state == "active"
        source.gate.set()
        assert await waiting.result() == ("done", None)


async def test_silent_writer_keeps_its_stream(store, reader):
    id = await store.create()
    async with AsyncBackground(partial(status_of, reader, id)) as waiting:
        async with store.writer(id):
            await async_sleep(SEVERAL_LEASES)
            assert (await reader.get_status(id)).state == "active"
        assert await waiting.result() == ("done", None)


async def test_writer_takes_over_within_the_lease_of_the_creator(store, reader):
    id = await store.create(lease=60)
    async with store.writer(id) as writer:
        (info,) = [info async for info in reader.list()]
        assert info.lease_until < info.created_at + (info.expires_at - info.created_at) / 10  # 60 s would be a fifth
        await writer.write("a")
    assert (await reader.get_status(id)).state == "done"


async def test_appends_renew_the_lease(store, reader):
    id = await store.create(lease=LEASE)
    async with AsyncBackground(partial(status_of, reader, id)) as waiting:
        for append in [store.append, lambda id, text: store.append_many(id, [text, text])] * 5:
            await append(id, "a")
            await async_sleep(LEASE / 3)
        await async_gather(*(partial(store.append, id, "together") for _ in range(5)))
        assert (await reader.get_status(id)).state == "active"
        assert await waiting.result() == EXPIRED


async def test_append_does_not_shorten_a_lease(store):
    id = await store.create(lease=3600)
    (before,) = [info.lease_until async for info in store.list()]
    await store.append(id, "a")
    assert [info.lease_until async for info in store.list()] == [before]


async def test_stream_without_a_lease_is_left_alone(store, reader, run_sql, tables):
    run_sql(
        sql.SQL(
            "INSERT INTO {} (id, state, error, total_chunks, expires_at) VALUES ('ts', 'active', NULL, 0, 1)"
        ).format(tables["status_table"])
    )
    plain = await store.create()
    await store.append(plain, "a")
    with pytest.raises(TimeoutError):
        await reader.wait("ts", SEVERAL_LEASES)
    assert [(info.state, info.lease_until) async for info in reader.list()] == [("active", None)] * 2


async def test_another_store_does_not_shorten_the_ttl(store, dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables, ttl=timedelta(days=30)) as owning:
        for id in ("stopped", "failed", "abandoned", "completed"):
            await owning.create(id)
            await owning.append(id, "x")
        await owning.create("expired", lease=0.001)
    await store.stop("stopped")
    await store.fail("failed", "why")
    await store.complete("completed")
    ended = []
    while len(ended) < 2:
        ended += await store.fail_abandoned(older_than=0)
    assert sorted(ended) == ["abandoned", "expired"]
    rest = {info.id: info.expires_at - info.created_at async for info in store.list()}
    assert rest.pop("completed") < timedelta(minutes=10)
    assert min(rest.values()) > timedelta(days=29)
    assert len(rest) == 4


async def test_acquire_ends_the_stream_of_a_dead_producer(store, reader):
    id = await store.create(lease=0.01)
    while (await reader.get_status(id)).state == "active":
        assert await reader.acquire(id) is False
        await async_sleep(0.02)
    assert await status_of(reader, id) == EXPIRED


async def test_acquire_of_a_living_stream_writes_nothing(dsn, tables, store):
    id = await store.create(lease=60)
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresStreamStore(client, **tables) as own:
        await reach_steadily(own)
        client.statements.clear()
        assert await own.acquire(id) is False
        create, *others = [call.sql for call in client.statements if "pg_attribute" not in call.sql]
        assert "INSERT" in create
        assert not [sql for sql in others if "UPDATE" in sql]


async def test_refusal_for_the_moment_is_no_outage(store, run_sql, tables):
    table = tables["status_table"]
    refuse(run_sql, table, "40P01")
    id = await store.create()
    await reach_steadily(store)
    with pytest.raises(psycopg.errors.DeadlockDetected):
        await store.append(id, "a")
    assert store._database.contact.is_steady(monotonic())


async def test_lease_is_dropped_also_if_the_row_was_locked(store, dsn, tables):
    id = await store.create(lease=60)
    async with await psycopg.AsyncConnection.connect(dsn) as other:
        await other.execute(sql.SQL("SELECT 1 FROM {} WHERE id = %s FOR UPDATE").format(tables["status_table"]), [id])
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            async with AsyncPostgresStreamStore(connection, **tables) as own:

                async def write():
                    async with own.writer(id):
                        return [info.lease_until async for info in store.list()]

                async with AsyncBackground(write) as writing:
                    await async_sleep(0.3)
                    await other.rollback()
                    assert await writing.result() == [None]


async def test_reader_does_not_write_in_a_transaction_of_its_caller(dsn, tables, store):
    id = await store.create(lease=0.01)
    async with AsyncRecordingClient(dsn) as client:
        client.joins_transactions = True
        async with AsyncPostgresStreamStore(client, **tables, poll_interval=0.02) as reader:
            with pytest.raises(TimeoutError):
                await reader.wait(id, 1)
        assert [call.sql for call in client.statements if "is_expired" in call.sql]
        assert not [call.sql for call in client.statements if "UPDATE" in call.sql]


async def test_reader_without_steady_contact_ends_nothing(store, reader, monkeypatch):
    monkeypatch.setattr(_leases, "CONTACT", 3600)
    id = await store.create(lease=0.01)
    assert await reader.acquire(id) is False
    with pytest.raises(TimeoutError):
        await reader.wait(id, 1)
    async with store.writer(id) as writer:  # and the producer may come back
        await writer.write("a")
    assert await status_of(reader, id) == ("done", None)


async def test_reader_that_may_not_write_keeps_waiting(store, tables, limited):
    id = await store.create(lease=0.01)
    async with AsyncRecordingClient(limited("SELECT")) as client:
        async with AsyncPostgresStreamStore(client, **tables, poll_interval=0.02) as reader:
            with pytest.raises(TimeoutError):
                await reader.wait(id, 1.5)
            # It leaves it to others, and does not try again with each poll.
            assert len([call for call in client.statements if "UPDATE" in call.sql]) == 1
            async with AsyncBackground(partial(status_of, reader, id)) as waiting:
                await store.complete(id)
                assert await waiting.result() == ("done", None)


async def test_acquire_by_a_role_that_may_not_end_streams(store, tables, limited):
    id = await store.create(lease=0.01)
    async with AsyncRecordingClient(limited("SELECT, INSERT, DELETE")) as client:
        async with AsyncPostgresStreamStore(client, **tables) as own:
            await reach_steadily(own)
            assert await own.acquire(id) is False
            assert [call for call in client.statements if "UPDATE" in call.sql], "it has not tried"
            assert await own.acquire("new") is True
    assert (await store.get_status(id)).state == "active"


async def test_acquire_in_a_transaction_of_the_caller_ends_no_other_stream(store, tables, limited):
    id = await store.create(lease=0.01)
    async with await psycopg.AsyncConnection.connect(limited("SELECT, INSERT, DELETE")) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as own:
            await reach_steadily(own)
            assert await own.acquire(id) is False
            assert await own.acquire("new") is True  # the transaction is usable
            await connection.commit()
    assert (await store.get_status("new")).state == "active"
    assert await status_of(store, id) == EXPIRED


async def test_writer_finds_a_migration_that_came_after_its_store(store, reader, dsn, run_sql, tables):
    id = await store.create(lease=60)
    status = tables["status_table"].as_string()
    async with AsyncPostgresStreamStore(dsn, **tables, lease=LEASE) as old:
        run_sql(f"ALTER TABLE {status} RENAME lease_until TO later")
        await old._schema.look_up()
        run_sql(f"ALTER TABLE {status} RENAME later TO lease_until")
        assert not old._schema.has_leases
        async with old.writer(id):
            assert [info.lease_until is not None async for info in reader.list()] == [True]
            with pytest.raises(TimeoutError):
                await reader.wait(id, SEVERAL_LEASES)
            assert old._schema.has_leases


async def test_failure_of_one_group_does_not_keep_others_from_renewals(store, reader):
    def fail():
        raise RuntimeError("no such tenant")

    with store._leases.held("other", fail):
        pass
    await store.create("other")
    await store._schema.look_up()
    with store._leases.held("other", fail):
        id = await store.create()
        async with store.writer(id):
            with pytest.raises(TimeoutError):
                await reader.wait(id, SEVERAL_LEASES)


async def test_failed_writer_gives_up_its_lease_inside_its_block(store, reader):
    id = await store.create()
    with pytest.raises(StreamWriteError):
        async with store.writer(id) as writer:
            await reader.append(id, "of another producer")
            await writer.write("a")
            with pytest.raises(SequenceConflictError):
                await writer.flush()
            assert await status_of(reader, id) == EXPIRED
            raise StreamWriteError(id, 0, 1)


async def test_reader_tries_again_after_a_refusal(store, reader, run_sql, tables, monkeypatch):
    monkeypatch.setattr(f"{type(reader._listener).__module__}.REFUSED_PAUSE", 0.1)
    table = tables["status_table"]
    refuse(run_sql, table, "40P01")
    id = await store.create(lease=0.01)
    with pytest.raises(TimeoutError):
        await reader.wait(id, 1)
    # To drop the trigger would lock the partitions in another order than the reader, and could deadlock.
    accept = "CREATE OR REPLACE FUNCTION pg_temp.refuse() RETURNS trigger LANGUAGE plpgsql AS "
    run_sql(accept + "$$ BEGIN RETURN new; END $$")
    assert await status_of(reader, id) == EXPIRED


async def test_one_statement_renews_all_leases(dsn, tables):
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresStreamStore(client, **tables, lease=LEASE) as store:
        streams = [await AsyncDurableStream.start(store, SilentSource()) for _ in range(40)]
        renewals = [json.loads(call.params[0]) for call in client.statements if "AS held (id)" in call.sql]
        await async_until(
            lambda: [call for call in client.statements if "AS held (id)" in call.sql][len(renewals) + 1 :]
        )
        last = [json.loads(call.params[0]) for call in client.statements if "AS held (id)" in call.sql][-1]
        assert sorted(last) == sorted(stream.id for stream in streams)


async def test_ended_stream_is_no_longer_renewed(store):
    stream = await AsyncDurableStream.start(store, items(["a"]))
    assert await status_of(store, stream.id) == ("done", None)
    await async_until(lambda: store._leases._held == {})


async def test_writer_on_a_connection_of_the_caller_has_no_lease(store, reader, dsn, tables):
    id = await store.create(lease=LEASE)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as own:
            async with own.writer(id) as writer:
                await writer.write("a")
                with pytest.raises(TimeoutError):
                    await reader.wait(id, SEVERAL_LEASES)
                await writer.write("b")
    assert [chunk.data async for chunk in reader.read_from(id)] == ["a", "b"]


async def test_renewal_does_not_wait_for_an_exhausted_pool(store, dsn, tables):
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables, lease=LEASE) as own:
            id = await own.create()
            async with own.writer(id):
                async with pool.connection():  # the application uses the only connection
                    await wait_for_renewal(store, id, await lease_of(store, id))
