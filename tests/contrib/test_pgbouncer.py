"""Clients of PgBouncer, in transaction mode unless a test says otherwise."""

from __future__ import annotations

import logging
from functools import partial

import psycopg
import pytest
from contrib import contract
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from support import pgbouncer, proxy
from support.commit_settings import record_commit_settings
from support.concurrency import AsyncBackground, Background, async_gather, async_until, gather, until

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    PostgresConversationStore,
    PostgresStreamStore,
)
from aibind_postgres._async import listening as async_listening
from aibind_postgres._sync import listening

pytestmark = pytest.mark.skipif(
    pgbouncer.BINARY is None, reason="PgBouncer is not installed (Debian and Ubuntu: apt-get install pgbouncer)"
)

# The `kwargs` of callers' pools. The store prepares no statement, also if the pool would.
POOLS = {
    "pool": {},
    "pool in autocommit mode": {"autocommit": True, "prepare_threshold": None},
    "pool that prepares at once": {"prepare_threshold": 0},
}
CLIENTS = ["connection string", *POOLS]


@pytest.fixture(scope="module")
def pgbouncer_dsn(dsn, tmp_path_factory):
    """The connection string of a PgBouncer in front of the server."""
    with pgbouncer.pgbouncer(dsn, tmp_path_factory.mktemp("pgbouncer")) as pgbouncer_dsn:
        yield pgbouncer_dsn


@pytest.fixture(params=CLIENTS)
def client(request, pgbouncer_dsn):
    if request.param in POOLS:
        with ConnectionPool(pgbouncer_dsn, min_size=0, max_size=8, kwargs=POOLS[request.param], open=True) as pool:
            yield pool
    else:
        yield pgbouncer_dsn


@pytest.fixture(params=CLIENTS)
async def async_client(request, pgbouncer_dsn):
    if request.param in POOLS:
        async with AsyncConnectionPool(
            pgbouncer_dsn, min_size=0, max_size=8, kwargs=POOLS[request.param], open=False
        ) as pool:
            yield pool
    else:
        yield pgbouncer_dsn


@pytest.fixture
def store(client, tables):
    with PostgresStreamStore(client, **tables) as store:
        yield store


@pytest.fixture
async def async_store(async_client, tables):
    async with AsyncPostgresStreamStore(async_client, **tables) as store:
        yield store


def test_round_trip(store, client, tables):
    for _ in range(3):
        contract.round_trip(store, client, tables)


async def test_round_trip_in_tasks(async_store, async_client, tables):
    for _ in range(3):
        await contract.async_round_trip(async_store, async_client, tables)


def test_conversation_store(client, conversations):
    with PostgresConversationStore(client, table=conversations) as store:
        contract.check_conversations(store, client)


async def test_conversation_store_in_tasks(async_client, conversations):
    async with AsyncPostgresConversationStore(async_client, table=conversations) as store:
        await contract.async_check_conversations(store, async_client)


def test_housekeeping(client, tables, conversations, caplog):
    with (
        PostgresStreamStore(client, **tables, ttl=0.001) as store,
        PostgresConversationStore(client, table=conversations, ttl=0.001) as chats,
    ):
        contract.check_housekeeping(store, chats, caplog)


async def test_housekeeping_in_tasks(async_client, tables, conversations, caplog):
    async with (
        AsyncPostgresStreamStore(async_client, **tables, ttl=0.001) as store,
        AsyncPostgresConversationStore(async_client, table=conversations, ttl=0.001) as chats,
    ):
        await contract.async_check_housekeeping(store, chats, caplog)


def test_following(store, dsn, tables):
    with PostgresStreamStore(dsn, **tables) as theirs:
        contract.check_following(store, theirs)


async def test_following_in_tasks(async_store, dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as theirs:
        await contract.async_check_following(async_store, theirs)


@pytest.mark.parametrize("setting", ["off", "local"])
def test_synchronous_commit(pgbouncer_dsn, dsn, tables, schema_name, setting):
    with record_commit_settings(dsn, tables["status_table"], schema_name) as settings_at_commit:
        with PostgresStreamStore(pgbouncer_dsn, **tables, synchronous_commit=setting) as store:
            contract.round_trip(store, pgbouncer_dsn, tables)
        assert settings_at_commit() == {setting}


def test_many_threads_write_while_one_reads(store):
    id = store.create()

    def write():
        for _ in range(50):
            store.append(id, "x")

    with Background(lambda: list(store.read_from(id))) as reader, contract.ending(store, id):
        gather(*[write] * 8)
        store.complete(id)
        assert [chunk.seq for chunk in reader.result()] == list(range(1, 401))


async def test_many_tasks_write_while_one_reads(async_store):
    id = await async_store.create()

    async def write():
        for _ in range(50):
            await async_store.append(id, "x")

    async def follow():
        return [chunk.seq async for chunk in async_store.read_from(id)]

    async with AsyncBackground(follow) as reader, contract.async_ending(async_store, id):
        await async_gather(*[write] * 8)
        await async_store.complete(id)
        assert await reader.result() == list(range(1, 401))


@pytest.mark.parametrize("client", CLIENTS[:2], indirect=True)
def test_fallback_to_polling_with_one_warning(store, dsn, tables, caplog):
    caplog.set_level(logging.WARNING, "aibind_postgres")
    with PostgresStreamStore(dsn, **tables) as theirs:
        id = theirs.create()
        arrived = []

        def follow():
            for chunk in store.read_from(id):
                arrived.append(chunk)

        with Background(follow) as first, Background(follow) as second, contract.ending(theirs, id):
            until(lambda: bool(caplog.records))
            for number in range(1, 11):
                theirs.append(id, f"{number}")
                until(lambda number=number: len(arrived) >= 2 * number)
            theirs.complete(id)
            first.result()
            second.result()
        again = theirs.create()
        theirs.complete(again)
        assert list(store.read_from(again)) == []
    [record] = caplog.records
    assert "transaction pooler" in record.getMessage()
    assert len(arrived) == 20


@pytest.mark.parametrize("async_client", CLIENTS[:2], indirect=True)
async def test_fallback_to_polling_with_one_warning_in_tasks(async_store, dsn, tables, caplog):
    caplog.set_level(logging.WARNING, "aibind_postgres")
    async with AsyncPostgresStreamStore(dsn, **tables) as theirs:
        id = await theirs.create()
        arrived = []

        async def follow():
            async for chunk in async_store.read_from(id):
                arrived.append(chunk)

        async with (
            AsyncBackground(follow) as first,
            AsyncBackground(follow) as second,
            contract.async_ending(theirs, id),
        ):
            await async_until(lambda: bool(caplog.records))
            for number in range(1, 11):
                await theirs.append(id, f"{number}")
                await async_until(lambda number=number: len(arrived) >= 2 * number)
            await theirs.complete(id)
            await first.result()
            await second.result()
    [record] = caplog.records
    assert "transaction pooler" in record.getMessage()
    assert len(arrived) == 20


def listening_channels(dsn):
    """Return the channels that the next session of PgBouncer LISTENs on; with a pool of one there is no other."""
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=None) as connection:
        return connection.execute("SELECT pg_listening_channels()").fetchall()


def check_reading(store, theirs):
    """Read each chunk that another store writes before it writes the next one."""
    id = theirs.create()
    received = []

    def follow():
        for chunk in store.read_from(id):
            received.append(chunk.data)

    with Background(follow) as reader, contract.ending(theirs, id):
        for number in range(3):
            theirs.append(id, f"{number}")
            until(lambda number=number: len(received) > number)
        theirs.complete(id)
        reader.result()
    assert received == ["0", "1", "2"]


async def async_check_reading(store, theirs):
    id = await theirs.create()
    received = []

    async def follow():
        async for chunk in store.read_from(id):
            received.append(chunk.data)

    async with AsyncBackground(follow) as reader, contract.async_ending(theirs, id):
        for number in range(3):
            await theirs.append(id, f"{number}")
            await async_until(lambda number=number: len(received) > number)
        await theirs.complete(id)
        await reader.result()
    assert received == ["0", "1", "2"]


def test_shared_session_does_not_listen(dsn, tables, tmp_path):
    with pgbouncer.pgbouncer(dsn, tmp_path, pool_size=1) as pooled, PostgresStreamStore(dsn, **tables) as theirs:
        with PostgresStreamStore(pooled, **tables) as store:
            check_reading(store, theirs)
            assert listening_channels(pooled) == []
        assert listening_channels(pooled) == []


async def test_shared_session_does_not_listen_in_tasks(dsn, tables, tmp_path):
    with pgbouncer.pgbouncer(dsn, tmp_path, pool_size=1) as pooled:
        async with AsyncPostgresStreamStore(dsn, **tables) as theirs:
            async with AsyncPostgresStreamStore(pooled, **tables) as store:
                await async_check_reading(store, theirs)
                assert listening_channels(pooled) == []
            assert listening_channels(pooled) == []


def test_busy_shared_sessions_do_not_listen(dsn, tables, tmp_path):
    """Other clients of PgBouncer occupy the sessions in turns."""
    is_done = False

    def occupy():
        with psycopg.connect(pooled, autocommit=True, prepare_threshold=None) as connection:
            while not is_done:
                connection.execute("SELECT pg_sleep(random() / 1000)")

    with (
        pgbouncer.pgbouncer(dsn, tmp_path, pool_size=4) as pooled,
        PostgresStreamStore(dsn, **tables) as theirs,
        Background(partial(gather, *[occupy] * 3)) as others,
    ):
        try:
            for _ in range(10):
                with PostgresStreamStore(pooled, **tables) as store:
                    check_reading(store, theirs)
        finally:
            is_done = True
        others.result()
        assert [listening_channels(pooled) for _ in range(10)] == [[]] * 10


@pytest.fixture(params=["near", "far"])
def session_pooler(request, dsn, tmp_path, monkeypatch):
    """The connection string of a PgBouncer in session mode, and of one that delays each statement by 40 ms."""
    with pgbouncer.pgbouncer(dsn, tmp_path, pool_mode="session") as pooled, proxy.proxy(pooled) as link:
        if request.param == "far":
            link.delay(0.02)
            for module in (async_listening, listening):
                monkeypatch.setattr(module, "PROBE_TIMEOUT", 0.4)
        yield link.dsn
        assert listening_channels(pooled) == []


def test_session_mode_notifies(dsn, session_pooler, tables, caplog):
    caplog.set_level(logging.WARNING, "aibind_postgres")
    with PostgresStreamStore(dsn, **tables) as theirs:
        with PostgresStreamStore(session_pooler, **tables, poll_interval=3600) as store:
            check_reading(store, theirs)
    assert caplog.records == []


async def test_session_mode_notifies_in_tasks(dsn, session_pooler, tables, caplog):
    caplog.set_level(logging.WARNING, "aibind_postgres")
    async with AsyncPostgresStreamStore(dsn, **tables) as theirs:
        async with AsyncPostgresStreamStore(session_pooler, **tables, poll_interval=3600) as store:
            await async_check_reading(store, theirs)
    assert caplog.records == []
