"""Readers on a hot standby whose replay lags behind its primary."""

from __future__ import annotations

import math
from functools import partial

import psycopg
import pytest
from support import servers
from support.concurrency import AsyncBackground, async_gather, async_until
from support.proxy import proxy

from aibind_postgres import AsyncDurableStream, AsyncPostgresStreamStore, StreamNotFoundError

CHECKING = (
    "SELECT count(*) > 0 FROM pg_stat_activity WHERE query LIKE '%pg_is_in_recovery%' AND pid <> pg_backend_pid()"
)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def standby(disposable_server):
    with servers.standby_of(disposable_server) as standby:
        yield standby


@pytest.fixture
def admin(standby):
    with psycopg.connect(standby.dsn, autocommit=True) as admin:
        yield admin


def catch_up(primary, admin):
    """Wait until the standby has replayed the changes of its primary."""
    with psycopg.connect(primary.dsn, autocommit=True) as connection:
        (position,) = connection.execute("SELECT pg_current_wal_lsn()").fetchone()
    while admin.execute("SELECT pg_last_wal_replay_lsn() >= %s", [position]).fetchone() != (True,):
        pass


def is_checked(admin):
    return admin.execute(CHECKING).fetchone()[0]


async def collect(chunks):
    return [tuple(chunk) async for chunk in chunks]


async def test_standby_without_the_stream_yet(disposable_server, standby, admin, caplog):
    async with (
        AsyncPostgresStreamStore(disposable_server.dsn) as store,
        AsyncPostgresStreamStore(standby.dsn, poll_interval=0.02) as replica,
    ):
        first = await replica.check()
        assert first._replace(latency=None) == (True, None, None, True, None)  # it has replayed nothing yet
        admin.execute("SELECT pg_wal_replay_pause()")
        id = await store.create()
        await store.append(id, "a")

        async def resume():
            stream = await AsyncDurableStream.resume(replica, id)
            return b"".join([event async for event in stream.sse()])

        calls = [
            lambda: collect(replica.read_from(id)),
            lambda: collect(replica.replay(id, speed=math.inf)),
            lambda: collect(replica.read_from(id, follow=False)),
            partial(replica.wait, id),
            resume,
        ]
        async with AsyncBackground(partial(async_gather, *calls)) as reading:
            await async_until(lambda: is_checked(admin))
            admin.execute("SELECT pg_wal_replay_resume()")
            await async_until(lambda: "notifications unavailable" in caplog.text)
            await store.complete(id)
            *texts, status, events = await reading.result()
        assert (await replica.check()).lag >= 0
    assert texts == [[(1, "a")]] * 3
    assert status == ("done", None, 1)
    assert events.endswith(b"event: done\ndata: \n\n")
    [warning] = [record.getMessage() for record in caplog.records if record.name.startswith("aibind_postgres")]
    assert "cannot execute LISTEN during recovery" in warning


async def test_standby_without_the_chunks_of_a_reader(disposable_server, standby, admin):
    with proxy(disposable_server.dsn) as network:
        async with (
            AsyncPostgresStreamStore(disposable_server.dsn) as store,
            AsyncPostgresStreamStore(network.dsn, poll_interval=0.02) as moving,
        ):
            id = await store.create()
            catch_up(disposable_server, admin)
            admin.execute("SELECT pg_wal_replay_pause()")
            await store.append_many(id, ["a", "b"])
            chunks = []

            async def read():
                async for chunk in moving.read_from(id):
                    chunks.append(tuple(chunk))

            async with AsyncBackground(read) as reading:
                await async_until(lambda: len(chunks) == 2)
                network.redirect(standby.dsn)
                network.cut()
                await async_until(lambda: is_checked(admin))
                admin.execute("SELECT pg_wal_replay_resume()")
                await store.append(id, "c")
                await store.complete(id)
                await reading.result()
            assert chunks == [(1, "a"), (2, "b"), (3, "c")]


async def test_missing_stream_of_a_standby_raises_after_retry_for(standby):
    async with AsyncPostgresStreamStore(standby.dsn, retry_for=0.2) as replica:
        for call in (partial(replica.wait, "missing"), lambda: collect(replica.read_from("missing"))):
            with pytest.raises(StreamNotFoundError):
                await call()
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await replica.create()
