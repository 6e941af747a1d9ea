"""Appends that share a statement: each gets its own number or error, and none is delayed by another's lock or fault."""

from __future__ import annotations

import random
from functools import partial

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_until

from aibind_postgres import (
    AibindError,
    AsyncPostgresStreamStore,
    InvalidDataError,
    SequenceConflictError,
    StoreClosedError,
    StreamNotActiveError,
    StreamNotFoundError,
)
from aibind_postgres._async import appending, combining
from aibind_postgres._concurrency import AsyncEvent


class GatedClient:
    """A pool that records each statement, and waits for a gate before it sends it."""

    def __init__(self, pool, joins_transactions=False):
        self.pool = pool
        self.joins_transactions = joins_transactions
        self.statements = []
        self.gate = AsyncEvent()
        self.gate.set()
        self.connection_errors = (psycopg.OperationalError,)

    async def query(self, sql, params):
        self.statements.append(sql)
        await self.gate.wait()
        async with self.pool.connection() as connection:
            cursor = psycopg.AsyncRawCursor(connection)
            await cursor.execute(sql, params)
            return await cursor.fetchall()


@pytest.fixture
async def pool(dsn):
    async with AsyncConnectionPool(
        dsn, kwargs={"autocommit": True}, min_size=1, max_size=10, timeout=20, open=False
    ) as pool:
        yield pool


@pytest.fixture
async def client(pool):
    return GatedClient(pool)


@pytest.fixture
async def store(client, tables, monkeypatch):
    monkeypatch.setattr(appending, "LANES", 1)
    async with AsyncPostgresStreamStore(client, **tables) as store:
        await store._schema.look_up()  # the first statement of a store that writes
        yield store


@pytest.fixture
def no_takeover(monkeypatch):
    """A takeover timeout that a slow machine does not exceed, so that all queued calls share one statement."""
    monkeypatch.setattr(combining, "TAKEOVER_TIMEOUT", 60)


@pytest.fixture
def at_once(store, client, queued):
    """Queue calls during another one, so that they share a statement; return their results or errors."""

    async def run(calls):
        other = await store.create()
        client.gate.clear()
        client.statements.clear()
        async with AsyncBackground(partial(store.append, other, "other")) as first:
            await async_until(lambda: client.statements)
            queued.clear()
            async with AsyncBackground(partial(async_gather, *calls, errors=True)) as rest:
                await async_until(lambda: len(queued) == len(calls))
                client.gate.set()
                assert await first.result() == 1
                return await rest.result()

    return run


async def texts(store, id):
    return [chunk.data async for chunk in store.read_from(id, follow=False)]


def appends_of(client):
    return [sql for sql in client.statements if "UPDATE" in sql]


@pytest.mark.usefixtures("no_takeover")
async def test_appends_to_many_streams_share_a_statement(store, at_once, client):
    ids = [await store.create() for _ in range(50)]
    for id in ids[::2]:
        await store.append(id, "earlier")
    assert await at_once([partial(store.append, id, f"{id}'s") for id in ids]) == [2, 1] * 25
    assert len(appends_of(client)) == 2
    for id in ids:
        assert (await texts(store, id))[-1] == f"{id}'s"


@pytest.mark.usefixtures("no_takeover")
async def test_appends_to_one_stream_share_a_statement(store, at_once, client):
    id = await store.create()
    calls = [partial(store.append, id, f"{number}") for number in range(20)]
    calls += [partial(store.append_many, id, [f"{number}", "", "\"'\\\x01\n😀"]) for number in range(20, 30)]
    lasts = await at_once(calls)
    assert len(appends_of(client)) == 2
    assert len(set(lasts)) == 30
    stored = await texts(store, id)
    assert len(stored) == 50
    for number, last in enumerate(lasts[:20]):
        assert stored[last - 1] == f"{number}"
    for number, last in enumerate(lasts[20:], start=20):
        assert stored[last - 3 : last] == [f"{number}", "", "\"'\\\x01\n😀"]


async def test_each_append_gets_its_own_error(store, at_once):
    good, ended, ahead = [await store.create() for _ in range(3)]
    await store.stop(ended)
    calls = [
        partial(store.append, good, "1", expected_seq=1),
        partial(store.append, ended, "x"),
        partial(store.append, "missing", "x"),
        partial(store.append, ahead, "x", expected_seq=5),
    ]
    results = await at_once(calls)
    assert results[0] == 1
    assert [type(result) for result in results[1:]] == [
        StreamNotActiveError,
        StreamNotFoundError,
        SequenceConflictError,
    ]
    assert (results[3].expected, results[3].actual) == (5, 1)
    assert await texts(store, good) == ["1"]
    assert await texts(store, ahead) == []


async def test_one_of_two_appends_with_the_same_number_raises(store, at_once):
    id = await store.create()
    results = await at_once([partial(store.append, id, text, expected_seq=1) for text in "ab"])
    assert sorted(map(str, results), key=len)[0] == "1"
    assert sum(isinstance(result, SequenceConflictError) for result in results) == 1
    assert len(await texts(store, id)) == 1


async def test_simultaneous_identical_appends_write_once(store, at_once):
    id = await store.create()
    assert await at_once([partial(store.append, id, "a", expected_seq=1)] * 5) == [1] * 5
    assert await texts(store, id) == ["a"]


async def test_simultaneous_consecutive_numbers(store, at_once):
    id = await store.create()
    calls = [partial(store.append, id, f"{seq}", expected_seq=seq) for seq in (1, 2, 3)]
    results = await at_once(calls)
    assert results[0] == 1
    written = await texts(store, id)
    # An append that arrives before its number is next raises; the stored texts have no gap.
    assert written == ["1", "2", "3"][: len(written)]
    for seq, result in enumerate(results, start=1):
        assert result == seq if seq <= len(written) else isinstance(result, SequenceConflictError)


async def test_rejected_batch_raises_only_in_the_append_at_fault(store, at_once, dsn, tables):
    ids = [await store.create() for _ in range(5)]
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        # The next number is taken, as if another program had written to the table.
        statement = psycopg.sql.SQL("INSERT INTO {} (id, seq, data) VALUES (%s, 1, 'x')").format(tables["chunks_table"])
        await connection.execute(statement, [ids[2]])
    results = await at_once([partial(store.append, id, "text") for id in ids])
    rejected = results.pop(2)
    assert isinstance(rejected, AibindError)
    assert isinstance(rejected.__cause__, psycopg.errors.UniqueViolation)
    assert results == [1] * 4
    for id in ids[:2] + ids[3:]:
        assert await texts(store, id) == ["text"]


async def test_batch_with_unknown_outcome_is_not_repeated(store, at_once, client, monkeypatch):
    ids = [await store.create() for _ in range(5)]
    query = client.query

    async def lose_the_reply(sql, params):
        rows = await query(sql, params)
        if "json_to_recordset" in sql:
            raise psycopg.OperationalError("the connection is lost")
        return rows

    monkeypatch.setattr(client, "query", lose_the_reply)
    results = await at_once([partial(store.append, id, "text") for id in ids])
    assert [type(result) for result in results] == [psycopg.OperationalError] * 5
    for id in ids:
        assert await texts(store, id) == ["text"]
        assert await store.append(id, "text", expected_seq=1) == 1


async def test_locked_stream_delays_no_other(store, at_once, dsn, tables):
    ids = [await store.create() for _ in range(5)]
    lock = psycopg.sql.SQL("SELECT FROM {} WHERE id = %s FOR UPDATE").format(tables["status_table"])
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        await holder.execute(lock, [ids[0]])
        async with AsyncBackground(partial(store.append, ids[0], "waits alone")) as alone:
            others = await at_once([partial(store.append, id, "goes on") for id in ids[1:]])
            assert others == [1] * 4
            async with AsyncBackground(partial(store.append, ids[0], "waits, too")) as combined:
                seqs = await async_gather(*[partial(store.append, id, "goes on") for id in ids[1:]] * 5)
                assert sorted(seqs) == sorted([2, 3, 4, 5, 6] * 4)
                # A caller that holds the lock can append to other streams.
                assert await store.append(ids[1], "from the holder") == 7
                await holder.rollback()
                assert sorted([await alone.result(), await combined.result()]) == [1, 2]


@pytest.mark.usefixtures("no_takeover")
async def test_large_append_runs_alone(store, client, queued):
    ids = [await store.create() for _ in range(3)]
    calls = [
        partial(store.append, ids[0], "x" * appending.MIN_ALONE),
        partial(store.append_many, ids[1], [""] * 1000),
    ]
    client.gate.clear()
    client.statements.clear()
    async with AsyncBackground(partial(store.append, ids[2], "other")) as first:
        await async_until(lambda: client.statements)
        async with AsyncBackground(partial(async_gather, *calls)) as large:
            await async_until(lambda: len(client.statements) == 3)  # none waits for the first one
            client.gate.set()
            assert await first.result() == 1
            assert await large.result() == [1, 1000]
    assert not queued


async def test_appends_on_a_callers_connection_are_not_combined(dsn, tables, queued):
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as store:
            ids = [await store.create() for _ in range(10)]
            assert await async_gather(*[partial(store.append, id, "x") for id in ids]) == [1] * 10
            assert not queued
            await connection.commit()


async def test_appends_in_transactions_of_callers_are_not_combined(pool, tables, queued):
    client = GatedClient(pool, joins_transactions=True)
    async with AsyncPostgresStreamStore(client, **tables) as store:
        ids = [await store.create() for _ in range(10)]
        await store._schema.look_up()
        client.gate.clear()
        client.statements.clear()
        async with AsyncBackground(partial(async_gather, *[partial(store.append, id, "x") for id in ids])) as appends:
            await async_until(lambda: len(client.statements) == 10)
            client.gate.set()
            assert await appends.result() == [1] * 10
    assert not queued


async def test_close_rejects_queued_appends(client, tables, queued, monkeypatch):
    monkeypatch.setattr(appending, "LANES", 1)
    store = AsyncPostgresStreamStore(client, **tables)
    await store._schema.look_up()
    id = await store.create()
    client.gate.clear()
    client.statements.clear()
    async with AsyncBackground(partial(store.append, id, "under way")) as first:
        await async_until(lambda: client.statements)
        async with AsyncBackground(partial(async_gather, *[partial(store.append, id, "x")] * 3, errors=True)) as rest:
            await async_until(lambda: len(queued) == 3)
            await store.close()
            client.gate.set()
            assert await first.result() == 1
            assert {type(result) for result in await rest.result()} == {StoreClosedError}


@pytest.mark.parametrize("lanes", [1, 2])
async def test_retried_appends_of_many_streams_write_each_chunk_once(dsn, tables, monkeypatch, lanes):
    monkeypatch.setattr(appending, "LANES", lanes)
    chance = random.Random(lanes)
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        ids = [await store.create() for _ in range(20)]

        async def produce(id):
            for seq in range(1, 41):
                for _ in range(chance.choice([1, 1, 2])):  # a retry after a lost reply
                    assert await store.append(id, f"{seq}", expected_seq=seq) == seq

        await async_gather(*[partial(produce, id) for id in ids])
        for id in ids:
            assert await texts(store, id) == [f"{seq}" for seq in range(1, 41)]


async def test_invalid_data_is_rejected_before_it_queues(store, client):
    id = await store.create()
    client.statements.clear()
    for bad in ["\0", "\ud800", 7]:
        with pytest.raises(InvalidDataError):
            await store.append(id, bad)
    assert client.statements == []
