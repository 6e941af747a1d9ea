"""A store with a hot standby as its replica: lag, kills, conflicts and promotion are never visible to its readers."""

from __future__ import annotations

import logging
import math
import random
from functools import partial
from time import monotonic

import psycopg
import pytest
from support import servers
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until
from support.proxy import BOTH, proxy
from support.recording import AsyncRecordingClient

from aibind_postgres import AsyncPostgresStreamStore, StreamNotFoundError, _replica, schema

TEXTS = [f"text {number}" for number in range(1, 5001)]
FETCHED = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_user_tables WHERE relname = 'aibind_stream_chunks'"
OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def primary():
    with servers.own_server() as server:
        schema.migrate(server.dsn)
        yield server


@pytest.fixture(scope="module")
def shared_standby(primary):
    with servers.standby_of(primary) as standby:
        yield standby


@pytest.fixture
def own_standby(primary):
    """A standby that the test may kill or promote."""
    with servers.standby_of(primary) as standby:
        yield standby


@pytest.fixture
def admin(shared_standby):
    """A connection to the standby. Its replay continues after the test."""
    with psycopg.connect(shared_standby.dsn, autocommit=True) as admin:
        yield admin
        admin.execute("SELECT pg_wal_replay_resume()")


@pytest.fixture
async def store(primary, shared_standby):
    async with AsyncPostgresStreamStore(primary.dsn, replica=shared_standby.dsn) as store:
        yield store


def catch_up(primary, standby):
    """Wait until the standby has replayed the changes of its primary."""
    with (
        psycopg.connect(primary.dsn, autocommit=True) as writing,
        psycopg.connect(standby.dsn, autocommit=True) as replaying,
    ):
        (position,) = writing.execute("SELECT pg_current_wal_lsn()").fetchone()
        while replaying.execute("SELECT pg_last_wal_replay_lsn() >= %s", [position]).fetchone() != (True,):
            pass


async def finished(store, texts, id=None):
    id = await store.create(id)
    await store.append_many(id, texts)
    await store.complete(id)
    return id


async def collect(chunks):
    return [chunk.data async for chunk in chunks]


def warnings(caplog):
    records = [record for record in caplog.records if record.name.startswith("aibind_postgres")]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


def end_pause(store):
    """Let the next reader ask an unavailable replica."""
    store._replica._outages._ask_at = 0.0


async def read_in_each_way(store, id):
    """Return the distinct results."""
    results = [
        await collect(store.read_from(id)),
        await collect(store.read_from(id, follow=False)),
        await collect(store.events(id)),
        await collect(store.read_with_times(id)),
        await collect(store.replay(id, speed=math.inf)),
    ]
    return [result for number, result in enumerate(results) if result not in results[:number]]


async def test_chunks_of_finished_streams_are_fetched_on_the_standby(primary, shared_standby, admin):
    async with AsyncPostgresStreamStore(primary.dsn) as store:
        id = await finished(store, TEXTS)
    catch_up(primary, shared_standby)
    with psycopg.connect(primary.dsn, autocommit=True) as primary_admin:
        servers = primary_admin, admin

        async def fetched():
            """Return the numbers of chunks that the two servers have fetched."""
            # A server process publishes its statistics before it ends.
            await async_until(lambda: [each.execute(OTHERS).fetchone() for each in servers] == [(0,), (0,)])
            return [each.execute(FETCHED).fetchone()[0] for each in servers]

        before = await fetched()
        async with AsyncPostgresStreamStore(primary.dsn, replica=shared_standby.dsn) as store:
            assert await read_in_each_way(store, id) == [TEXTS]
        on_primary, on_standby = (after - earlier for after, earlier in zip(await fetched(), before, strict=True))
    assert on_standby >= 5 * len(TEXTS)
    assert on_primary <= 5 * 5  # the last chunk of each page, which identifies it


async def test_lag_of_a_standby_is_never_visible(primary, shared_standby, store, admin):
    old, new = ["old"] * 300, ["new"] * 300
    reused = await finished(store, old)
    growing = await store.create()
    await store.append_many(growing, TEXTS[:100])
    ended = await store.create()
    await store.append_many(ended, TEXTS)
    deleted = await finished(store, TEXTS)
    catch_up(primary, shared_standby)
    admin.execute("SELECT pg_wal_replay_pause()")
    await store.delete(reused)
    await finished(store, new, reused)
    await store.append_many(growing, TEXTS[100:])
    await store.complete(growing)
    await store.fail(ended, "why")
    missing = await finished(store, TEXTS)
    await store.delete(deleted)
    for is_paused in (True, False):
        exists = admin.execute("SELECT FROM aibind_stream_status WHERE id = %s", [missing]).rowcount == 1
        assert exists != is_paused
        assert await read_in_each_way(store, reused) == [new]
        for id in (growing, ended, missing):
            assert await read_in_each_way(store, id) == [TEXTS]
            assert (await store.wait(id)).total_chunks == len(TEXTS)
        with pytest.raises(StreamNotFoundError):
            await collect(store.read_from(deleted))
        if is_paused:
            admin.execute("SELECT pg_wal_replay_resume()")
            catch_up(primary, shared_standby)


async def test_standby_is_lost_during_a_page(primary, shared_standby, caplog, monkeypatch):
    for pause in ("MIN_PAUSE", "MAX_PAUSE"):  # not tried again, unless the test ends the pause
        monkeypatch.setattr(_replica, pause, 1000.0)
    caplog.set_level(logging.INFO, "aibind_postgres")
    with proxy(shared_standby.dsn) as network:
        async with AsyncPostgresStreamStore(primary.dsn, replica=network.dsn) as store:
            id = await finished(store, TEXTS)
            catch_up(primary, shared_standby)
            assert await collect(store.read_from(id)) == TEXTS
            assert warnings(caplog) == []
            for answered in (False, True):
                end_pause(store)
                network.cut_at(id, answered=answered)
                faults = network.faults
                assert await read_in_each_way(store, id) == [TEXTS]
                assert network.faults == faults + 1
            assert len(warnings(caplog)) == 1
            # It accepts connections and never answers.
            end_pause(store)
            network.stall(*BOTH)
            assert await read_in_each_way(store, id) == [TEXTS]
            network.heal()
            while "replica available again" not in caplog.text:
                end_pause(store)
                assert await read_in_each_way(store, id) == [TEXTS]
    assert len(warnings(caplog)) == 1


async def test_standby_is_killed_under_readers(primary, own_standby, caplog, long):
    async with (
        AsyncPostgresStreamStore(primary.dsn) as writing,
        AsyncRecordingClient(primary.dsn) as client,
        AsyncPostgresStreamStore(client, replica=own_standby.dsn) as store,
    ):
        id = await finished(writing, TEXTS)
        catch_up(primary, own_standby)
        done, results = [], []

        async def read():
            while not done:
                results.append(await collect(store.read_from(id)) == TEXTS)

        def reads_use_the_standby():
            """Return True if the newest statements on the primary returned a status alone."""
            end_pause(store)
            newest = client.statements[before:][-20:]
            return len(newest) == 20 and all(statement.rows is None or len(statement.rows) == 1 for statement in newest)

        async with AsyncBackground(partial(async_gather, read, read, read)) as reading:
            for _ in range(20 if long else 2):
                own_standby.kill()
                before = len(results)
                await async_until(lambda before=before: len(results) >= before + 10, 60)
                own_standby.start()
                before = len(client.statements)
                await async_until(reads_use_the_standby, 60)
            done.append(True)
            await reading.result()
    assert all(results)
    assert warnings(caplog)


async def test_conflict_with_recovery_ends_the_session_of_a_reader(primary, shared_standby, admin, caplog):
    admin.execute("ALTER SYSTEM SET max_standby_streaming_delay = 0")
    admin.execute("SELECT pg_reload_conf()")
    async with (
        await psycopg.AsyncConnection.connect(shared_standby.dsn) as replica,
        AsyncPostgresStreamStore(primary.dsn, replica=replica) as store,
    ):
        id, deleted = await finished(store, TEXTS), await finished(store, TEXTS)
        catch_up(primary, shared_standby)
        await replica.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
        assert await read_in_each_way(store, id) == [TEXTS]  # its transaction stays open, and needs deleted rows
        assert warnings(caplog) == []
        await store.delete(deleted)
        with psycopg.connect(primary.dsn, autocommit=True) as cleaning:
            cleaning.execute("VACUUM aibind_stream_chunks")
        catch_up(primary, shared_standby)
        assert await read_in_each_way(store, id) == [TEXTS]
        assert replica.closed
    admin.execute("ALTER SYSTEM RESET max_standby_streaming_delay")
    admin.execute("SELECT pg_reload_conf()")


async def test_promoted_standby(primary, own_standby):
    """Two servers continue the same streams, as after a failover that did not stop the old primary."""
    other = ["of the other server"] * 5000
    async with (
        AsyncPostgresStreamStore(primary.dsn, replica=own_standby.dsn) as store,
        AsyncPostgresStreamStore(own_standby.dsn) as promoted,
    ):
        reused, untouched = await finished(store, TEXTS), await finished(store, TEXTS)
        ended, active = await store.create(), await store.create()
        for id in (ended, active):
            await store.append_many(id, TEXTS[:1000])
        catch_up(primary, own_standby)
        assert await collect(store.read_from(active, follow=False)) == TEXTS[:1000]
        own_standby.promote()
        for id in (ended, active):
            await promoted.append_many(id, other[1000:])
        await promoted.complete(ended)
        await promoted.delete(reused)
        await finished(promoted, other, reused)
        for id in (ended, active):
            assert await collect(store.read_from(id, follow=False)) == TEXTS[:1000]
            await store.append_many(id, TEXTS[1000:])
            assert await collect(store.read_from(id, follow=False)) == TEXTS
        await store.complete(ended)
        for id in (ended, reused, untouched):
            assert await read_in_each_way(store, id) == [TEXTS]


async def test_reads_are_never_older_than_the_primary(primary, store, admin, long):
    """Streams are deleted and created again under readers, while the replay of the standby pauses and continues."""
    seed = random.randrange(2**32)
    choose = random.Random(seed)
    ids, created, deleted = [f"stream {number}" for number in range(3)], {}, {}
    until = monotonic() + (60 if long else 5)
    reads = []

    async def write(id):
        number = 0
        async with AsyncPostgresStreamStore(primary.dsn) as writing:
            while monotonic() < until:
                number += 1
                created[id] = number
                await writing.create(id)
                for _ in range(choose.randrange(1, 6)):
                    await writing.append_many(id, [f"{number}"] * choose.choice([1, 49, 50, 51, 700]))
                if choose.random() < 0.7:
                    await writing.complete(id)
                await async_sleep(choose.choice([0, 0.05, 0.3]))
                await writing.delete(id)
                deleted[id] = number

    async def read(id):
        while monotonic() < until:
            oldest = deleted.get(id, 0) + 1
            try:
                chunks = [tuple(chunk) async for chunk in store.read_from(id, follow=False)]
            except StreamNotFoundError:
                await async_sleep(0.01)
                continue
            assert [seq for seq, _ in chunks] == list(range(1, len(chunks) + 1)), seed
            # A reader may continue in a new stream with this id. A page is of one stream.
            pages = [{text for _, text in chunks[start:end]} for start, end in ((0, 50), (50, 2050), (2050, 4050))]
            assert all(len(texts) <= 1 for texts in pages), seed
            numbers = [int(text) for texts in pages for text in texts]
            assert numbers == sorted(numbers), seed
            assert all(oldest <= number <= created[id] for number in numbers), seed
            reads.append(len(chunks))

    async def pause():
        while monotonic() < until:
            admin.execute("SELECT pg_wal_replay_pause()")
            await async_sleep(choose.choice([0.05, 0.4]))
            admin.execute("SELECT pg_wal_replay_resume()")
            await async_sleep(choose.choice([0.05, 0.2]))
            end_pause(store)

    await async_gather(*[partial(call, id) for id in ids for call in (write, read, read)], pause)
    assert reads
