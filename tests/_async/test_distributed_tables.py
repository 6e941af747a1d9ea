"""Stores on a server that refuses statements on several streams, as Citus does for distributed tables."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from _async.sources import HookedClient, is_append
from psycopg_pool import AsyncConnectionPool
from support.citus import activity
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until

from aibind_postgres import AsyncPostgresConversationStore, AsyncPostgresStreamStore, ChatHistory, _leases
from aibind_postgres._async import appending, combining, deleting, leasing
from aibind_postgres._async.reading import SharedRead
from aibind_postgres._conversation_sql import ConversationStatements
from aibind_postgres._distributed import DISTRIBUTED
from aibind_postgres._sql import COLUMNS, StreamStatements
from aibind_postgres._tables import Table

REFUSED = ("append_batch", "read_batch", "renew_leases", "end_expired", "delete_leftovers", "cleanup", "fail_abandoned")
REFUSED_ON_CONVERSATIONS = ("get_info", "list", "list_of_owner", "cleanup")


class RefusingClient(HookedClient):
    """A client that raises the error of Citus for the statements that it refuses, and counts them.

    The server seems to have Citus, and no distributed tables.
    """

    def __init__(self, pool, status, chunks, conversations):
        super().__init__(pool)
        on_streams = [StreamStatements(chunks, status, lease=15_000, archive=has_0005) for has_0005 in (False, True)]
        on_conversations = ConversationStatements(conversations, True, status)
        self.refusable = {getattr(statements, name) for statements in on_streams for name in REFUSED}
        self.refusable |= {getattr(on_conversations, name) for name in REFUSED_ON_CONVERSATIONS}
        self.refused = 0
        self.hook = self.refuse

    async def query(self, sql, params):
        if sql == DISTRIBUTED:
            return []
        rows = await super().query(sql, params)
        return [(*row[:-1], True) for row in rows] if sql == COLUMNS else rows

    async def refuse(self, sql, params):
        if sql in self.refusable:
            self.refused += 1
            raise psycopg.errors.FeatureNotSupported("cannot push down this subquery")


@pytest.fixture
async def pool(dsn):
    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=4, open=False) as pool:
        yield pool


@pytest.fixture
async def client(pool, tables, table):
    return RefusingClient(pool, *map(Table.parse, (tables["status_table"], tables["chunks_table"], table)))


@pytest.fixture
async def store(client, tables):
    async with AsyncPostgresStreamStore(client, **tables, ttl=60) as store:
        yield store


@pytest.fixture
async def chats(client, tables, table):
    async with AsyncPostgresConversationStore(client, table=table, status_table=tables["status_table"]) as store:
        yield store


@pytest.fixture
async def run(pool, tables, table):
    """Return a function that runs SQL with the names of the tables in braces."""
    names = {"status": tables["status_table"], "chunks": tables["chunks_table"], "conversations": table}

    async def run(text):
        async with pool.connection() as connection:
            cursor = await connection.execute(psycopg.sql.SQL(text).format(**names))
            return await cursor.fetchall() if cursor.description else []

    return run


@pytest.fixture
async def change(dsn, tables, table, schema_name, run, on_citus):
    """Return a function that makes a change in a transaction, and commits it once a call waits for it."""
    names = {"status": tables["status_table"], "chunks": tables["chunks_table"], "conversations": table}
    waiting = (
        f"SELECT count(*) FROM {activity(on_citus)} WHERE wait_event_type = 'Lock' AND datname = current_database() "
        "AND query LIKE '%{schema}%'"
    )
    waiting = waiting.replace("{schema}", schema_name)

    async def change(text, call):
        async with await psycopg.AsyncConnection.connect(dsn) as holder:
            await holder.execute(psycopg.sql.SQL(text).format(**names))
            async with AsyncBackground(call) as calling:
                while (await run(waiting))[0][0] == 0:
                    await async_sleep(0.01)
                await holder.commit()
                return await calling.result()

    return change


async def ids(store):
    return [info.id async for info in store.list()]


async def test_refused_statement_is_tried_once(store, client):
    streams = [await store.create() for _ in range(20)]
    assert await async_gather(*[partial(store.append, id, "x") for id in streams]) == [1] * 20
    refused = client.refused
    assert 1 <= refused <= appending.LANES  # which run at the same time
    assert await async_gather(*[partial(store.append, id, "x") for id in streams]) == [2] * 20

    async def read(id):
        return [chunk.data async for chunk in store.read_from(id, follow=False)]

    assert await async_gather(*[partial(read, id) for id in streams]) == [["x", "x"]] * 20
    assert sorted(await store.fail_abandoned(0)) == sorted(streams)
    assert await store.fail_abandoned(0) == []
    assert await store.cleanup() == (0, 0)
    assert client.refused == refused


async def test_followed_streams_are_read_one_by_one(store, client):
    streams = [await store.create() for _ in range(8)]

    async def follow(id):
        return [chunk.data async for chunk in store.read_from(id)]

    async def write(id):
        for text in "abc":
            await store.append(id, text)
        await store.complete(id)

    results = await async_gather(*[partial(follow, id) for id in streams], *[partial(write, id) for id in streams])
    assert results[:8] == [["a", "b", "c"]] * 8
    assert client.refused <= appending.LANES + 1  # appends and one read may be tried at the same time


async def test_appends_that_queue_during_a_refusal_are_not_refused(store, client, queued, monkeypatch):
    monkeypatch.setattr(combining, "TAKEOVER_TIMEOUT", 60)
    id = await store.create()
    await store.append(id, "first")  # looks up the columns
    sent, answered = [], []

    async def answer(sql, params):
        if not is_append(sql):
            return
        number = len(sent)
        sent.append(sql)
        while len(answered) <= number:
            await async_sleep(0.01)
        await client.refuse(sql, params)

    client.hook = answer
    append = partial(store.append, id, "x")
    async with AsyncBackground(append) as alone:
        await async_until(lambda: len(sent) == 1)
        async with AsyncBackground(partial(async_gather, append, append)) as refused:
            await async_until(lambda: len(queued) == 2)
            answered.append(1)
            await async_until(lambda: len(sent) == 2)
            async with AsyncBackground(partial(async_gather, append, append)) as late:
                await async_until(lambda: len(queued) == 4)
                answered.extend([1] * 100)
                lasts = [await alone.result(), *await refused.result(), *await late.result()]
    assert sorted(lasts) == [2, 3, 4, 5, 6]
    assert client.refused == 1


async def test_reads_that_queue_during_a_refusal_are_not_refused(store, client):
    id = await store.create()
    await store.append(id, "x")
    store._database.is_distributed = True  # as the refusal of another batch sets it
    assert await store._pages._run_batch([SharedRead(id, 0, 10)] * 2) == [[], []]
    assert client.refused == 0


async def test_leases_are_renewed_one_by_one(client, tables, run, monkeypatch):
    monkeypatch.setattr(leasing, "RENEWALS", 300)
    async with AsyncPostgresStreamStore(client, **tables) as store:
        streams = [await store.create() for _ in range(3)]
        one, two, three = map(store.writer, streams)
        async with one, two, three:
            await run("UPDATE {status} SET lease_until = 1")
            while (await run("SELECT min(lease_until) FROM {status}"))[0][0] == 1:
                await async_sleep(0.01)
            assert client.refused == 1


async def test_expired_leases_end_the_streams(store, client, run, monkeypatch):
    monkeypatch.setattr(_leases, "CONTACT", 0.0)
    streams = sorted([await store.create(lease=60), await store.create(lease=60)])
    await store.create("kept", lease=60)
    await run("UPDATE {status} SET lease_until = 1 WHERE id <> 'kept'")
    assert sorted(await store.fail_abandoned()) == streams
    assert [(await store.get_status(id)).error for id in streams] == [_leases.EXPIRED_TEXT] * 2
    assert (await store.get_status("kept")).state == "active"
    assert client.refused == 1


async def test_abandoned_streams_keep_a_later_expiry(store, run, monkeypatch):
    monkeypatch.setattr(_leases, "CONTACT", 0.0)
    await store.create("expired", lease=60)
    await store.create("without a lease")
    await run("UPDATE {status} SET expires_at = 9e15, lease_until = CASE id WHEN 'expired' THEN 1 END")
    assert sorted(await store.fail_abandoned(0)) == ["expired", "without a lease"]
    [(earliest,)] = await run("SELECT min(expires_at) FROM {status}")
    assert earliest > 8e15


async def test_row_that_is_locked_is_not_ended(store, dsn, tables, run, monkeypatch):
    monkeypatch.setattr(_leases, "CONTACT", 0.0)
    id = await store.create(lease=60)
    await run("UPDATE {status} SET lease_until = 1")
    async with await psycopg.AsyncConnection.connect(dsn) as holder:
        update = psycopg.sql.SQL("UPDATE {} SET total_chunks = 1").format(tables["status_table"])
        await holder.execute(update)
        assert [ended async for ended in store._leases.end_all_expired()] == []
    assert (await store.get_status(id)).state == "active"


async def test_cleanup_of_many_and_of_long_streams(store, client, run, monkeypatch):
    monkeypatch.setattr(deleting, "MAX_CHUNKS", 20)
    await run("INSERT INTO {status} SELECT 's' || i, 'done', NULL, 7, i FROM generate_series(1, 40) i")
    await run("INSERT INTO {chunks} SELECT 's' || i, s, 'x' FROM generate_series(1, 40) i, generate_series(1, 7) s")
    await run("INSERT INTO {status} SELECT 'long' || i, 'done', NULL, 100, i FROM generate_series(1, 4) i")
    await run("INSERT INTO {chunks} SELECT 'long' || i, s, 'x' FROM generate_series(1, 4) i, generate_series(1, 100) s")
    await store.create("kept")
    await store.append("kept", "x")
    results = await async_gather(*[store.cleanup] * 4)
    results.append(await store.cleanup())
    assert sum(result.streams for result in results) == 44
    assert sum(result.chunks for result in results) == 680
    assert await ids(store) == ["kept"]
    assert (await run("SELECT count(*) FROM {chunks}"))[0][0] == 1
    assert client.refused <= 4  # all four began at the same time


async def test_stream_that_is_kept_longer_meanwhile_is_not_deleted(store, run, change):
    await run("INSERT INTO {status} VALUES ('a', 'done', NULL, 1, 1)")
    await run("INSERT INTO {chunks} VALUES ('a', 1, 'x')")
    assert await change("UPDATE {status} SET expires_at = 9e15", store.cleanup) == (0, 0)
    assert [chunk.data async for chunk in store.read_from("a")] == ["x"]


async def test_stream_that_gets_a_chunk_meanwhile_is_not_abandoned(store, change):
    await store.create("a")
    assert await change("UPDATE {status} SET total_chunks = 1", partial(store.fail_abandoned, 0)) == []
    assert (await store.get_status("a")).state == "active"


async def test_stream_that_gets_a_lease_meanwhile_is_not_abandoned(store, change):
    await store.create("a")
    assert await change("UPDATE {status} SET lease_until = 9e15", partial(store.fail_abandoned, 0)) == []


async def test_conversations(chats, store, client, run):
    for id, owner in (("a", "x"), ("b", "y"), ("c", "x")):
        chat = ChatHistory()
        chat.append(id)
        await chats.save(id, chat, owner=owner)
    await store.create("s1", session_id="a", owner="x")
    await store.create("s2", session_id="a", owner="x")
    await store.create("s3", session_id="b", owner="another")
    found = [(info.session_id, info.owner, info.active_stream_id) async for info in chats.list()]
    assert found == [("c", "x", None), ("b", "y", None), ("a", "x", "s2")]
    assert [info.session_id async for info in chats.list("x", limit=1)] == ["c"]
    assert [info.active_stream_id async for info in chats.list("x")] == [None, "s2"]
    assert (await chats.get_info("a")).active_stream_id == "s2"
    assert await chats.get_info("missing") is None
    await run("UPDATE {conversations} SET expires_at = 1 WHERE session_id <> 'c'")
    assert await chats.cleanup() == 2
    assert await chats.get_info("a") is None
    assert client.refused == 1


async def test_conversation_that_is_kept_longer_meanwhile_is_not_deleted(chats, run, change):
    await run("INSERT INTO {conversations} VALUES ('a', '{{}}', 1)")
    assert await change("UPDATE {conversations} SET expires_at = 9e15", chats.cleanup) == 0
    assert (await chats.get_info("a")).session_id == "a"


async def test_leftover_chunks_are_deleted(store, client, run):
    await run("INSERT INTO {chunks} (id, seq, data, created_at) VALUES ('a', 1, 'old', '2020-01-01')")
    await run("INSERT INTO {status} (id, expires_at) VALUES ('a', 9e15)")
    assert await store.append("a", "new") == 1
    assert client.refused == 1
    assert [chunk.data async for chunk in store.read_from("a", follow=False)] == ["new"]


async def test_refusal_in_a_transaction_of_the_caller_is_raised(pool, tables, table):
    client = RefusingClient(pool, *map(Table.parse, (tables["status_table"], tables["chunks_table"], table)))
    client.joins_transactions = True
    async with AsyncPostgresStreamStore(client, **tables) as store:
        for _ in range(2):
            with pytest.raises(psycopg.errors.FeatureNotSupported):
                await store.cleanup()
    assert client.refused == 2


async def test_refusal_of_another_extension_is_not_remembered(pool, tables):
    """Without Citus, the error is that of a trigger or driver."""
    plain = HookedClient(pool)
    refused = []

    async def refuse_once(sql, params):
        if "SKIP LOCKED" in sql and not refused:
            refused.append(sql)
            raise psycopg.errors.FeatureNotSupported("a trigger")

    plain.hook = refuse_once
    async with AsyncPostgresStreamStore(plain, **tables) as other:
        id = await other.create()
        assert await other.cleanup() == (0, 0)
        assert len(refused) == 1
        assert not other._database.is_distributed
        assert await other.append(id, "x") == 1
