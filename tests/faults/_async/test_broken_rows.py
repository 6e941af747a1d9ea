"""Invalid rows from other programs: reads return the rows or raise a named error, and other streams are unaffected."""

from __future__ import annotations

import json
import math
import uuid
from datetime import datetime, timezone
from functools import partial
from time import monotonic

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until
from support.recording import AsyncRecordingClient

from aibind_postgres import (
    AibindError,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    ChatHistory,
    InvalidHistoryError,
    StoreClosedError,
    StreamNotActiveError,
)

pytestmark = pytest.mark.timeout(300)

EXTREME_EXPIRIES = [2**63 - 1, 10**16, -1, -(10**16), -(2**63)]  # values of expires_at
NO_TIMES = ["infinity", "-infinity", "20000-01-01", "0100-01-01 BC"]  # values of created_at outside datetime's range
PAGE = 2000  # streams that one statement lists

NODE = {"id": "q", "message": "secret", "parentId": None, "children": []}
DOCUMENT = {"version": 1, "nodes": {"q": NODE}, "rootIds": ["q"], "activeLeafId": "q"}
BROKEN_DOCUMENTS = [
    "",
    "secret, and no JSON",
    "null",
    "[]",
    "1e400",
    '"secret"',
    '{"secret": NaN}',
    json.dumps(DOCUMENT)[:-1],
    json.dumps(DOCUMENT) + "x",
    "\ufeff" + json.dumps(DOCUMENT),
    "[" * 100_000,
    '{"a":' * 100_000,
    "9" * 100_000,
    json.dumps({**DOCUMENT, "version": 2}),
    json.dumps({**DOCUMENT, "version": True}),
    json.dumps({**DOCUMENT, "nodes": [NODE]}),
    json.dumps({**DOCUMENT, "rootIds": []}),
    json.dumps({**DOCUMENT, "rootIds": ["q", "q"]}),
    json.dumps({**DOCUMENT, "activeLeafId": "missing"}),
    json.dumps({**DOCUMENT, "nodes": {"q": {**NODE, "children": ["q"]}}}),
    json.dumps({**DOCUMENT, "nodes": {"q": {**NODE, "parentId": "missing"}}}),
    json.dumps({**DOCUMENT, "nodes": {"q": {**NODE, "metadata": "secret"}}}),
    json.dumps({**DOCUMENT, "nodes": {"other": NODE}, "rootIds": ["other"]}),
]


class AsyncLimitedClient(AsyncRecordingClient):
    """A client that refuses the hundredth statement."""

    async def query(self, sql, params):
        assert len(self.statements) < 99, "the store sends too many statements"
        return await super().query(sql, params)


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


@pytest.fixture
async def admin(dsn):
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
async def write(admin, tables):
    """Insert a status row and the chunks of a stream, as another program may."""
    names = {"status": tables["status_table"], "chunks": tables["chunks_table"]}

    async def write(id, *, state="active", total=0, chunks=(), expires_at=10**13, **columns):
        values = {"id": id, "state": state, "total_chunks": total, "expires_at": expires_at, **columns}
        insert = psycopg.sql.SQL("INSERT INTO {status} ({columns}) VALUES ({values})").format(
            columns=psycopg.sql.SQL(", ").join(map(psycopg.sql.Identifier, values)),
            values=psycopg.sql.SQL(", ").join(map(psycopg.sql.Placeholder, values)),
            **names,
        )
        await admin.execute(insert, values)
        for seq in chunks:
            insert = psycopg.sql.SQL("INSERT INTO {chunks} (id, seq, data) VALUES (%s, %s, %s)").format(**names)
            await admin.execute(insert, [id, seq, str(seq)])

    return write


@pytest.fixture
async def write_times(admin, tables):
    """Set created_at of the chunks, from number 1 on."""
    update = psycopg.sql.SQL("UPDATE {} SET created_at = %s WHERE seq = %s").format(tables["chunks_table"])

    async def write_times(times):
        for seq, time in enumerate(times, 1):
            await admin.execute(update, [time, seq])

    return write_times


async def numbers(store, id, after=0, *, follow=False):
    return [chunk.seq async for chunk in store.read_from(id, after, follow=follow)]


async def replayed(store, id, speed):
    return [chunk.seq async for chunk in store.replay(id, speed=speed)]


async def until_listening(admin, application_name):
    """Wait until a store has a LISTEN connection, which it opens once a reader waits."""
    statement = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND query LIKE 'LISTEN%%'"
    while (await (await admin.execute(statement, [application_name])).fetchone()) == (0,):
        await async_sleep(0.01)


@pytest.mark.parametrize("state", ["paused", "", "ACTIVE", "active ", "'; --"])
async def test_unknown_state_counts_as_ended(store, write, state):
    await write("a", state=state, total=2, chunks=[1, 2])
    assert await store.get_status("a") == (state, None, 2)
    assert await store.wait("a", 0) == (state, None, 2)
    assert await numbers(store, "a", follow=True) == [1, 2]
    assert [info.state async for info in store.list()] == [state]
    for call in (
        lambda: store.append("a", "x"),
        lambda: store.append_many("a", ["x"]),
        lambda: store.append("a", "x", expected_seq=3),
    ):
        with pytest.raises(StreamNotActiveError) as caught:
            await call()
        assert caught.value.state == state
    with pytest.raises(StreamNotActiveError):
        async with store.writer("a"):
            pass
    assert [await store.stop("a"), await store.complete("a"), await store.fail("a", "x")] == [False] * 3
    assert await store.fail_abandoned(0) == []
    assert await store.cleanup() == (0, 0)
    assert await store.get_status("a") == (state, None, 2)
    assert await store.delete("a") is True


@pytest.mark.parametrize("chunks", [[1, 3], [2, 3], [1, 2], [3], []])
async def test_missing_chunks_leave_a_gap(store, write, chunks):
    """Each chunk keeps its number, and readers do not wait for missing ones."""
    await write("a", total=3, chunks=chunks)
    assert await numbers(store, "a") == chunks
    assert await store.append("a", "new") == 4
    await store.complete("a")
    for after in range(5):
        assert await numbers(store, "a", after, follow=True) == [seq for seq in [*chunks, 4] if seq > after]
    assert await replayed(store, "a", math.inf) == [*chunks, 4]


async def test_uncounted_chunks_are_neither_read_nor_overwritten(store, write):
    await write("a", total=1, chunks=[1, 2, 3])
    assert await numbers(store, "a") == [1]
    for expected in (None, 2):
        with pytest.raises(AibindError, match="another program has inserted"):
            await store.append("a", "new", expected_seq=expected)
        with pytest.raises(AibindError, match="another program has inserted"):
            await store.append_many("a", ["new", "newer"], expected_seq=expected)
    with pytest.raises(AibindError, match="another program has inserted"):
        async with store.writer("a") as writer:
            await writer.write("new")
    status = await store.get_status("a")
    assert (status.state, status.total_chunks) == ("error", 1)
    assert await numbers(store, "a", follow=True) == [1]
    assert await store.delete("a") is True
    await store.create("a")
    assert await store.append("a", "new") == 1
    assert await numbers(store, "a") == [1]


async def test_wide_gaps_are_read_with_few_statements(dsn, tables, write):
    await write("a", state="done", total=2**31 - 1, chunks=[1, 2, 2**31 - 1])
    async with AsyncLimitedClient(dsn) as client, AsyncPostgresStreamStore(client, **tables) as store:
        assert await numbers(store, "a") == [1, 2, 2**31 - 1]
        assert await numbers(store, "a", 2, follow=True) == [2**31 - 1]
        assert await numbers(store, "a", 2**31 - 1) == []
        assert await replayed(store, "a", math.inf) == [1, 2, 2**31 - 1]


@pytest.mark.parametrize("last", [[], [2**31 - 1]])
async def test_wide_gaps_are_followed_with_few_statements(dsn, admin, tables, write, last):
    await write("a", total=2, chunks=[1, 2, *last])
    async with (
        AsyncLimitedClient(dsn) as client,
        AsyncPostgresStreamStore(client, **tables, poll_interval=0.05) as store,
        AsyncBackground(partial(async_gather, *[partial(numbers, store, "a", follow=True)] * 3)) as readers,
    ):
        await client.wait_for_followers("a", 3)
        leap = psycopg.sql.SQL("UPDATE {} SET total_chunks = 2147483647").format(tables["status_table"])
        await admin.execute(leap)
        await async_sleep(0.2)
        assert await store.complete("a") is True
        assert await readers.result() == [[1, 2, *last]] * 3


async def test_append_after_the_last_number_raises(store, write):
    await write("a", total=2**31 - 1)
    for call in (
        lambda: store.append("a", "x"),
        lambda: store.append_many("a", ["x"]),
        lambda: store.append("a", "x", expected_seq=2**31),
    ):
        with pytest.raises(AibindError, match="the stream is full"):
            await call()
    assert (await store.get_status("a")).total_chunks == 2**31 - 1
    assert await store.complete("a") is True


@pytest.mark.parametrize("total", [-1, -5, -(2**31)])
async def test_append_to_a_negative_count_raises(store, write, total):
    await write("a", total=total, chunks=[-2, -1, 0])
    await write("b")
    for call in (
        partial(store.append, "a", "x"),
        partial(store.append, "a", "x", expected_seq=1),
        partial(store.append, "a", "x", expected_seq=2),
        partial(store.append_many, "a", ["x", "y"]),
    ):
        with pytest.raises(AibindError):
            await call()
        assert await numbers(store, "a") == await replayed(store, "a", 1) == []
        assert await store.get_status("a") == ("active", None, 0)
        assert [info.total_chunks async for info in store.list()] == [0, 0]
    together = await async_gather(*[partial(store.append, id, "x") for id in ("a", "b", "a", "b")], errors=True)
    assert [type(result) for result in together] == [AibindError, int, AibindError, int]
    with pytest.raises(AibindError):
        async with store.writer("a") as writer:
            await writer.write("x")
    assert (await store.get_status("a")).state == "error"
    assert await numbers(store, "a") == []
    assert await store.delete("a") is True


@pytest.mark.parametrize("total", [-1, -(2**31)])
async def test_negative_count_does_not_end_readers(dsn, tables, admin, write, total):
    await write("a", total=total)
    name = f"negative count {uuid.uuid4()}"
    options = {"min_size": 4, "kwargs": {"autocommit": True, "application_name": name}, "open": False}
    async with (
        AsyncConnectionPool(dsn, **options) as pool,
        AsyncPostgresStreamStore(pool, **tables) as store,
    ):
        calls = [partial(numbers, store, "a", follow=True), partial(store.wait, "a")] * 3
        async with AsyncBackground(partial(async_gather, *calls)) as waiting:
            await async_until(lambda: pool.get_stats().get("requests_num", 0) >= len(calls))
            await until_listening(admin, name)
            with pytest.raises(TimeoutError):
                await store.wait("a", 0.2)
            await store.complete("a")
            assert await waiting.result() == [[], ("done", None, 0)] * 3


@pytest.mark.parametrize("expires_at", EXTREME_EXPIRIES)
async def test_extreme_expiry_does_not_affect_other_streams(store, write, expires_at):
    await write("a", expires_at=expires_at, created_at=None)
    await write("b", state="done", expires_at=expires_at, created_at=None)
    await write("c", total=1, expires_at=expires_at)  # its chunk is missing, and so is the time of that chunk
    await write("d", total=-(2**31), expires_at=expires_at, created_at=None)
    await write("silent", created_at="2000-01-01")
    assert [info.id async for info in store.list()] == ["a", "b", "c", "d", "silent"]
    assert "silent" in await store.fail_abandoned(60)
    assert (await store.cleanup()).streams == (expires_at < 0)
    if (await store.get_status("a")).state == "active":
        assert await store.append("a", "x") == 1


@pytest.mark.parametrize("created_at", NO_TIMES)
async def test_extreme_created_at_does_not_affect_other_streams(store, write, created_at):
    await write("a", created_at=created_at)
    await write("silent", created_at="2000-01-01")
    assert "silent" in await store.fail_abandoned(60)
    assert [(info.id, info.created_at is None) async for info in store.list()] == [("a", True), ("silent", False)]


@pytest.mark.parametrize("groups_per_page", [1, 2, 3, 100])
async def test_extreme_created_at_is_listed_in_order(store, admin, tables, groups_per_page):
    """A page ends after so many groups of streams with the same time and letter."""
    copies = PAGE // groups_per_page
    insert = psycopg.sql.SQL(
        "INSERT INTO {} (id, expires_at, created_at) "
        "SELECT %s || ' ' || letter || ' ' || to_char(copy, 'FM0000'), 10000000000000, %s "
        "FROM unnest('{{a,b}}'::text[]) letter, generate_series(1, %s) copy"
    ).format(tables["status_table"])
    noon = [datetime(2026, 1, day, 12, 0, 0, 123456, timezone.utc) for day in (1, 2, 3)]
    for created_at in (*NO_TIMES, *noon):
        await admin.execute(insert, [str(created_at), created_at, copies])
    ages = ["-infinity", "0100-01-01 BC", *noon, "20000-01-01", "infinity"]
    ids = [f"{time} {letter} {copy:04}" for time in ages for letter in "ab" for copy in range(1, copies + 1)]
    assert [info.id async for info in store.list(created_after=noon[1])] == ids[6 * copies :]
    assert [info.id async for info in store.list(created_before=noon[1])] == ids[: 6 * copies]
    early, late = (time.replace(tzinfo=timezone.utc) for time in (datetime.min, datetime.max))
    between = [info async for info in store.list(created_after=early, created_before=late)]
    assert [info.id for info in between] == ids[4 * copies : 10 * copies]
    assert [info.created_at for info in between] == [time for time in noon for _ in range(2 * copies)]
    assert {info.id async for info in store.list()} == set(ids)


async def test_replay_treats_extreme_times_as_unknown(store, write, write_times):
    times = [*NO_TIMES, "2026-01-01 12:00", *NO_TIMES, "2026-01-01 12:00:00.1", *NO_TIMES]
    chunks = list(range(1, len(times) + 1))
    await write("a", total=len(times), chunks=chunks)
    await write_times(times)
    started_at = monotonic()
    assert await replayed(store, "a", 1) == chunks
    assert monotonic() - started_at >= 0.1


async def test_replay_with_a_pause_of_centuries_ends_with_the_store(store, write, write_times):
    await write("a", total=2, chunks=[1, 2])
    await write_times(["0002-01-01", "9998-01-01"])
    async with AsyncBackground(partial(async_gather, partial(replayed, store, "a", 1), errors=True)) as reader:
        await async_sleep(0.3)
        await store.close()
        assert [type(error) for error in await reader.result()] == [StoreClosedError]


@pytest.mark.parametrize("length", [1025, 2000, 20_000])
async def test_overlong_id_does_not_affect_other_streams(store, write, length):
    await write("i" * length, created_at="2000-01-01")
    await write("silent", created_at="2000-01-01")
    assert sorted(await store.fail_abandoned(60)) == ["i" * length, "silent"]
    assert [info.id async for info in store.list()] == ["i" * length, "silent"]
    assert await store.append(await store.create("good"), "x") == 1


@pytest.mark.parametrize("data", BROKEN_DOCUMENTS, ids=range(len(BROKEN_DOCUMENTS)))
async def test_invalid_conversation_raises_and_stays_unchanged(dsn, conversations, admin, data):
    table = conversations.as_string(None)
    await admin.execute(f"INSERT INTO {table} VALUES ('s', %s, 9e15), ('good', %s, 9e15)", [data, json.dumps(DOCUMENT)])
    async with AsyncPostgresConversationStore(dsn, table=conversations) as store:
        chat = ChatHistory()
        chat.append("mine")
        for call in (
            lambda: store.load("s"),
            lambda: store.save("s", chat),
            lambda: store.save("s", chat, on_conflict="raise"),
        ):
            with pytest.raises(InvalidHistoryError) as caught:
                await call()
            assert "secret" not in str(caught.value)
        with pytest.raises(InvalidHistoryError):
            async with store.edit("s"):
                pytest.fail("an invalid conversation was loaded")
        assert await (await admin.execute(f"SELECT data FROM {table} WHERE session_id = 's'")).fetchone() == (data,)
        assert chat.messages == ["mine"]
        assert [info.session_id async for info in store.list()] == ["good", "s"]
        assert (await store.load("good")).messages == ["secret"]
        await store.save("s", chat, on_conflict="overwrite")
        assert (await store.load("s")).messages == ["mine"]


@pytest.mark.parametrize("expires_at", EXTREME_EXPIRIES)
async def test_conversation_with_an_extreme_expiry(dsn, conversations, admin, expires_at):
    table = conversations.as_string(None)
    await admin.execute(f"INSERT INTO {table} VALUES ('s', %s, %s)", [json.dumps(DOCUMENT), expires_at])
    is_alive = expires_at > 0
    async with AsyncPostgresConversationStore(dsn, table=conversations) as store:
        assert (await store.load("s")).is_empty is not is_alive
        assert [info.session_id async for info in store.list()] == ["s"] * is_alive
        assert await store.cleanup() == (not is_alive)
        async with store.edit("s") as chat:
            chat.append("mine")
        assert (await store.load("s")).messages == ["secret"] * is_alive + ["mine"]
