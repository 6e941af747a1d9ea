"""The contract of the stream store, under every kind of table name."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone

import psycopg
import pytest

from aibind_postgres import (
    AsyncPostgresStreamStore,
    InvalidDataError,
    SequenceConflictError,
    StoreClosedError,
    StreamChunk,
    StreamExistsError,
    StreamNotActiveError,
    StreamNotFoundError,
    StreamStatus,
)

pytestmark = pytest.mark.parametrize(
    "tables",
    ["plain", "quotes", "mixed case", "spaces", "keywords", "63 bytes", "formats"],
    indirect=True,
)

TEXTS = [
    "",
    " ",
    "plain",
    "emoji 👩‍👩‍👧 and é",
    "\x01",
    "\ufffe",
    "'; DROP TABLE x; --",
    '"\\\n\r\t',
    "{}%s$1",
    "x" * 100_000,
]


@pytest.fixture
async def store(dsn, tables) -> AsyncIterator[AsyncPostgresStreamStore]:
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


@pytest.fixture
async def admin(admin_dsn) -> AsyncIterator[psycopg.AsyncConnection]:
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as connection:
        yield connection


async def run(admin, tables, statement, params=()):
    """Run SQL on the tables of the test. A % in their names is doubled, since it begins a placeholder of psycopg."""
    quoted = [psycopg.sql.SQL(tables[name].as_string(None).replace("%", "%%")) for name in tables]
    return await admin.execute(psycopg.sql.SQL(statement).format(chunks=quoted[0], status=quoted[1]), params)


async def all_chunks(store, id, after_seq=0):
    return [tuple(chunk) async for chunk in store.read_from(id, after_seq, follow=False)]


async def test_create_generates_an_id(store):
    first, second = await store.create(), await store.create()
    assert first != second
    assert uuid.UUID(first).version == 7
    assert await store.get_status(first) == StreamStatus("active", None, 0)


@pytest.mark.parametrize("id", ["x", "'; DROP TABLE x; --", "ünï 😀", '"', "\x01", "i" * 1024])
async def test_ids_are_stored_unchanged(store, id):
    assert await store.create(id) == id
    assert await store.append(id, "a") == 1
    assert await all_chunks(store, id) == [(1, "a")]
    assert [info.id async for info in store.list()] == [id]


async def test_create_of_an_existing_id_raises(store):
    await store.create("a")
    with pytest.raises(StreamExistsError, match="'a'"):
        await store.create("a")
    await store.complete("a")
    with pytest.raises(StreamExistsError):
        await store.create("a")


async def test_only_the_first_acquire_returns_true(store):
    assert await store.acquire("a") is True
    assert await store.acquire("a") is False


async def test_create_deletes_leftover_chunks(store, admin, tables):
    await run(admin, tables, "INSERT INTO {chunks} (id, seq, data) VALUES ('a', 1, 'left over'), ('b', 1, 'kept')")
    await store.create("a")
    assert await store.append("a", "new") == 1
    assert await all_chunks(store, "a") == [(1, "new")]
    cursor = await run(admin, tables, "SELECT id, data FROM {chunks} ORDER BY id")
    assert await cursor.fetchall() == [("a", "new"), ("b", "kept")]


async def test_uncounted_chunks_are_not_read(store, admin, tables):
    await store.create("a")
    await store.append("a", "counted")
    await run(admin, tables, "INSERT INTO {chunks} (id, seq, data) VALUES ('a', 2, 'left over')")
    assert await all_chunks(store, "a") == [(1, "counted")]
    assert [tuple(chunk) async for chunk in store.replay("a")] == [(1, "counted")]


async def test_append_numbers_from_one_and_stores_any_text(store):
    id = await store.create()
    assert [await store.append(id, text) for text in TEXTS] == list(range(1, len(TEXTS) + 1))
    assert await all_chunks(store, id) == list(enumerate(TEXTS, 1))
    assert await store.get_status(id) == StreamStatus("active", None, len(TEXTS))


async def test_append_many_assigns_consecutive_numbers(store):
    id = await store.create()
    assert await store.append(id, "first") == 1
    assert await store.append_many(id, iter(TEXTS)) == len(TEXTS) + 1
    assert await store.append_many(id, []) == len(TEXTS) + 1
    assert await all_chunks(store, id) == list(enumerate(["first", *TEXTS], 1))


async def test_repeated_append_writes_once(store):
    id = await store.create()
    for _ in range(3):
        assert await store.append(id, "a", expected_seq=1) == 1
    for _ in range(3):
        assert await store.append_many(id, ["b", "c"], expected_seq=2) == 3
    assert await all_chunks(store, id) == [(1, "a"), (2, "b"), (3, "c")]


async def test_repeated_append_succeeds_after_the_end(store):
    id = await store.create()
    await store.append(id, "a", expected_seq=1)
    await store.stop(id)
    assert await store.append(id, "a", expected_seq=1) == 1
    assert await store.append_many(id, ["a"], expected_seq=1) == 1
    with pytest.raises(StreamNotActiveError):
        await store.append(id, "b", expected_seq=2)


@pytest.mark.parametrize("expected", [1, 2, 4, 2**31, 2**63 - 1])
async def test_wrong_expected_seq_raises_a_conflict(store, expected):
    id = await store.create()
    await store.append_many(id, ["a", "b"])
    with pytest.raises(SequenceConflictError) as caught:
        await store.append(id, "other", expected_seq=expected)
    assert (caught.value.expected, caught.value.actual) == (expected, 3)
    with pytest.raises(SequenceConflictError):
        await store.append_many(id, ["a", "b", "c"], expected_seq=expected)
    assert await all_chunks(store, id) == [(1, "a"), (2, "b")]


async def test_missing_stream_raises_not_found(store):
    for call in (
        lambda: store.append("none", "a"),
        lambda: store.append("none", "a", expected_seq=1),
        lambda: store.append_many("none", ["a"]),
        lambda: store.append_many("none", []),
        lambda: store.stop("none"),
        lambda: store.complete("none"),
        lambda: store.fail("none", "why"),
        lambda: store.wait("none"),
        lambda: all_chunks(store, "none"),
    ):
        with pytest.raises(StreamNotFoundError, match="'none'"):
            await call()
    for reader in (store.read_from("none"), store.replay("none")):
        with pytest.raises(StreamNotFoundError):
            [chunk async for chunk in reader]
    assert await store.get_status("none") is None
    assert await store.delete("none") is False


async def test_end_is_final(store):
    for end, status in (
        (lambda id: store.stop(id), StreamStatus("stopped", None, 1)),
        (lambda id: store.complete(id), StreamStatus("done", None, 1)),
        (lambda id: store.fail(id, "why"), StreamStatus("error", "why", 1)),
    ):
        id = await store.create()
        await store.append(id, "a")
        assert await end(id) is True
        assert await store.get_status(id) == status
        assert [await store.stop(id), await store.complete(id), await store.fail(id, "other")] == [False] * 3
        for late in (store.append, lambda id, chunk: store.append_many(id, [chunk])):
            with pytest.raises(StreamNotActiveError) as caught:
                await late(id, "late")
            assert caught.value.state == status.state
        assert await store.get_status(id) == status
        assert await store.wait(id) == status
        assert [chunk async for chunk in store.read_from(id)] == [StreamChunk(1, "a")]


async def test_read_starts_after_any_number(store):
    id = await store.create()
    await store.append_many(id, [str(number) for number in range(1, 6)])
    await store.complete(id)
    for after in range(8):
        expected = [(number, str(number)) for number in range(after + 1, 6)]
        assert await all_chunks(store, id, after) == expected
        assert [tuple(chunk) async for chunk in store.read_from(id, after)] == expected
        assert [tuple(chunk) async for chunk in store.replay(id, after, speed=1000)] == expected


async def test_read_over_several_pages(store):
    id = await store.create()
    await store.append_many(id, map(str, range(1, 5001)))
    await store.append_many(id, map(str, range(5001, 10_001)))
    await store.complete(id)
    expected = [(number, str(number)) for number in range(1, 10_001)]
    assert [tuple(chunk) async for chunk in store.read_from(id)] == expected
    assert [tuple(chunk) async for chunk in store.replay(id, speed=float("inf"))] == expected


async def test_delete_removes_the_chunks(store, admin, tables):
    await store.create("a")
    await store.append_many("a", ["1", "2"])
    await store.create("b")
    await store.append("b", "1")
    assert await store.delete("a") is True
    assert await store.delete("a") is False
    assert await store.get_status("a") is None
    cursor = await run(admin, tables, "SELECT id, seq FROM {chunks}")
    assert await cursor.fetchall() == [("b", 1)]


async def server_time(admin):
    cursor = await admin.execute("SELECT clock_timestamp()")
    return (await cursor.fetchone())[0]


async def test_list_returns_every_stream(store, admin):
    before = await server_time(admin)
    for id, end in (("a", None), ("b", store.stop), ("c", store.complete), ("d", None)):
        await store.create(id)
        await store.append(id, "x")
        if end is not None:
            await end(id)
    await store.fail("d", "why")
    after = await server_time(admin)
    listed = [info async for info in store.list()]
    assert [info[:4] for info in listed] == [
        ("a", "active", None, 1),
        ("b", "stopped", None, 1),
        ("c", "done", None, 1),
        ("d", "error", "why", 1),
    ]
    ttl, rounding = timedelta(seconds=300), timedelta(milliseconds=1)
    for info in listed:
        assert before <= info.created_at <= after
        latest = after + ttl / 4 if info.state == "active" else after
        assert before - rounding <= info.expires_at - ttl <= latest + rounding
    for state, ids in (("active", ["a"]), ("stopped", ["b"]), ("done", ["c"]), ("error", ["d"])):
        assert [info.id async for info in store.list(state=state)] == ids


async def test_list_by_time(store, admin, tables):
    for number in range(5):
        await store.create(str(number))
        created = f"2026-01-0{5 - number} 12:00:00+00"
        await run(admin, tables, "UPDATE {status} SET created_at = %s WHERE id = %s", [created, str(number)])
    noon = [datetime(2026, 1, day, 12, tzinfo=timezone.utc) for day in range(1, 6)]

    async def ids(**options):
        return [info.id async for info in store.list(**options)]

    assert await ids(created_after=noon[0]) == ["4", "3", "2", "1", "0"]
    assert await ids(created_after=noon[2]) == ["2", "1", "0"]
    assert await ids(created_before=noon[2]) == ["4", "3"]
    assert await ids(created_after=noon[1], created_before=noon[3]) == ["3", "2"]
    await store.stop("3")
    assert await ids(created_after=noon[1], state="stopped") == ["3"]


async def test_list_over_several_pages(store, admin, tables):
    await run(
        admin,
        tables,
        "INSERT INTO {status} (id, expires_at, created_at) SELECT to_char(i, 'FM00000'), i, '2026-01-01' "
        "FROM generate_series(1, 4500) i",
    )
    expected = [f"{number:05}" for number in range(1, 4501)]
    assert [info.id async for info in store.list()] == expected
    long_ago = datetime(2000, 1, 1, tzinfo=timezone.utc)
    assert [info.id async for info in store.list(created_after=long_ago)] == expected


async def test_cleanup_deletes_expired_ended_streams(store, admin, tables):
    for id in ("active", "fresh", "a", "b", "c"):
        await store.create(id)
        await store.append_many(id, ["1", "2"])
    for id in ("fresh", "a", "b", "c"):
        await store.complete(id)
    assert await store.cleanup() == (0, 0)
    await run(admin, tables, "UPDATE {status} SET expires_at = 1 WHERE id <> 'fresh'")
    result = await store.cleanup()
    assert (result.streams, result.chunks) == (3, 6)
    assert [info.id async for info in store.list()] == ["active", "fresh"]
    cursor = await run(admin, tables, "SELECT DISTINCT id FROM {chunks} ORDER BY id")
    assert await cursor.fetchall() == [("active",), ("fresh",)]


async def test_abandoned_streams_are_failed(store, admin, tables):
    await run(admin, tables, "ALTER TABLE {chunks} ALTER created_at SET DEFAULT now() - interval '90 seconds'")
    for id in ("silent", "stopped"):
        await store.create(id)
        await store.append(id, "a")
    await store.stop("stopped")
    # Both were created long ago; "alive" has a recent chunk.
    await store.create("never began")
    await store.create("alive")
    await run(admin, tables, "ALTER TABLE {chunks} ALTER created_at SET DEFAULT now()")
    await store.append("alive", "a")
    await run(admin, tables, "UPDATE {status} SET created_at = now() - interval '90 seconds'")
    assert await store.fail_abandoned(120) == []
    assert sorted(await store.fail_abandoned(timedelta(seconds=60))) == ["never began", "silent"]
    assert await store.fail_abandoned(60) == []
    assert await store.get_status("silent") == StreamStatus("error", "abandoned: no chunk for 60 seconds", 1)
    assert await store.get_status("alive") == StreamStatus("active", None, 1)
    with pytest.raises(StreamNotActiveError):
        await store.append("silent", "late")


async def test_append_renews_the_expiry(store, admin, tables):
    id = await store.create()
    now, ttl = "(extract(epoch FROM statement_timestamp()) * 1000)::bigint", 300_000

    async def one(statement, params=()):
        return (await (await run(admin, tables, statement, params)).fetchone())[0]

    # An append rounds up to a multiple of 75 seconds, a quarter of the ttl. A store with a longer ttl set the last one.
    for left, is_renewed in [(280_000, True), (-50_000, True), (400_000, False)]:
        expires_at = await one(f"UPDATE {{status}} SET expires_at = {now} + %s RETURNING expires_at", [left])
        before = await one(f"SELECT {now}")
        await store.append(id, "a")
        after = await one(f"SELECT {now}")
        renewed = await one("SELECT expires_at FROM {status}")
        assert renewed % 75_000 == 0 if is_renewed else renewed == expires_at
        assert before + ttl <= renewed < after + ttl + (75_000 if is_renewed else 100_001)


async def test_invalid_arguments_raise(store):
    id = await store.create()
    bad_texts = ["NUL \0", "surrogate \ud800", b"bytes", None, 1, ["a"]]
    for text in bad_texts:
        with pytest.raises(InvalidDataError):
            await store.append(id, text)
        with pytest.raises(InvalidDataError):
            await store.append_many(id, ["good", text])
        with pytest.raises(InvalidDataError):
            await store.fail(id, text)
    for bad_id in ["", "i" * 1025, "ü" * 513, *bad_texts]:
        for call in (
            lambda bad_id: store.acquire(bad_id),
            lambda bad_id: store.append(bad_id, "a"),
            lambda bad_id: store.append_many(bad_id, ["a"]),
            lambda bad_id: store.get_status(bad_id),
            lambda bad_id: store.wait(bad_id),
            lambda bad_id: store.stop(bad_id),
            lambda bad_id: store.delete(bad_id),
        ):
            with pytest.raises(InvalidDataError):
                await call(bad_id)
        for read in (store.read_from, store.replay):
            with pytest.raises(InvalidDataError):
                read(bad_id)
    with pytest.raises(InvalidDataError):
        await store.append_many(id, "a str is not a list of chunks")
    for number in (-1, 1.5, "1", None, True, 2**63):
        with pytest.raises(InvalidDataError):
            store.read_from(id, number)
        with pytest.raises(InvalidDataError):
            store.replay(id, number)
    for number in (0, -1, 1.5, "1", True, 2**63):
        with pytest.raises(InvalidDataError):
            await store.append(id, "a", expected_seq=number)
    for speed in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="speed"):
            store.replay(id, speed=speed)
    for time in (-1, float("nan"), float("inf"), 1e10):
        with pytest.raises(ValueError, match="must be"):
            await store.fail_abandoned(time)
        with pytest.raises(ValueError, match="must be"):
            await store.wait(id, time)
    with pytest.raises(ValueError, match="state"):
        store.list(state="unknown")
    with pytest.raises(ValueError, match="time zone"):
        store.list(created_after=datetime(2026, 1, 1))
    assert await store.get_status(id) == StreamStatus("active", None, 0)


async def test_wait_timeout(store):
    id = await store.create()
    for timeout in (0, 0.05, timedelta(milliseconds=50)):
        with pytest.raises(TimeoutError):
            await store.wait(id, timeout)


async def test_closed_store_raises(store):
    id = await store.create()
    await store.close()
    await store.close()
    for call in (
        lambda: store.create(),
        lambda: store.append(id, "a"),
        lambda: store.get_status(id),
        lambda: store.wait(id),
        lambda: store.cleanup(),
        lambda: all_chunks(store, id),
    ):
        with pytest.raises(StoreClosedError):
            await call()
