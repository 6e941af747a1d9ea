"""Archiving and its reversal: no reader, writer or deletion notices, whenever it happens."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from _async.sources import items
from psycopg import sql
from support.concurrency import AsyncBackground, async_gather
from support.recording import AsyncRecordingClient

from aibind_postgres import (
    ArchiveResult,
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    CleanupResult,
    InvalidDataError,
    SchemaError,
    SequenceConflictError,
    StreamNotActiveError,
    StreamNotFoundError,
    schema,
)
from aibind_postgres._archive import MAX_CHUNK_BYTES, MAX_PAGE_TEXT, MOVED_BYTES, PAGE_CHUNKS
from aibind_postgres._async.reading import SharedRead
from aibind_postgres._pages import PAGE_BYTES

TEXTS = ["", " ", '"', "\\", "\\u0041", "\n\r\t\b\f", "\x01\x1f\x7f", "é😀\u2028\ufffe", "]", "', '", "null", "\x01"]
LONG = [f"{number}{TEXTS[number % len(TEXTS)]}" for number in range(2 * PAGE_CHUNKS + 300)]


@pytest.fixture
async def client(dsn):
    async with AsyncRecordingClient(dsn) as client:
        yield client


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


@pytest.fixture
async def run(admin_dsn, tables, schema_name):
    """Return a function that runs a statement with the names of the tables, and returns its rows."""
    names = {"chunks": tables["chunks_table"], "status": tables["status_table"]}
    names["archive"] = sql.Identifier(schema_name, "chunks_archive")
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as connection:

        async def run(text, params=None):
            cursor = await connection.execute(sql.SQL(text).format(**names), params)
            return await cursor.fetchall() if cursor.description else []

        yield run


async def finished(store, texts, id=None):
    """Create a finished stream."""
    id = await store.create(id)
    for start in range(0, len(texts), 5000):
        await store.append_many(id, texts[start : start + 5000])
    await store.complete(id)
    return id


async def collect(iterator):
    return [item async for item in iterator]


async def reads(store, id, after=0):
    """Return the results of all ways to read a stream."""
    return [
        await collect(store.read_from(id, after)),
        await collect(store.read_from(id, after, follow=False)),
        await collect(store.events(id, after)),
        await collect(store.events(id, after, follow=False)),
        await collect(store.read_with_times(id, after)),
        await collect(store.replay(id, after, speed=float("inf"))),
        await store.get_status(id),
        await store.get_info(id),
        await store.wait(id),
        await collect(store.list()),
    ]


async def counts(run, id):
    """Return the number of chunks in the chunks table, and of pages and of chunks in the archive."""
    [(chunks,)] = await run("SELECT count(*) FROM {chunks} WHERE id = %s", [id])
    [(pages, archived)] = await run(
        "SELECT count(*), coalesce(sum(last_seq - first_seq + 1), 0)::int FROM {archive} WHERE id = %s", [id]
    )
    return chunks, pages, archived


@pytest.mark.parametrize("texts", [[], ["a"], LONG], ids=["empty", "one", "long"])
async def test_archived_stream_reads_the_same(store, other, run, texts):
    id = await finished(store, texts)
    before = await reads(store, id)
    assert await store.archive(0) == ArchiveResult(1, len(texts))
    assert await counts(run, id) == (0, -(-len(texts) // PAGE_CHUNKS), len(texts))
    for reader in (store, other):
        assert await reads(reader, id) == before
    assert await store.archive(0) == (0, 0)


async def test_reading_from_any_number(store):
    id = await finished(store, LONG)
    positions = [0, 1, 49, 50, 998, 999, 1000, 1001, 1999, 2000, 2001, 2299, 2300, 5000, 2**63 - 1]
    before = [(await reads(store, id, after))[:6] for after in positions]
    await store.archive(0)
    for after, expected in zip(positions, before, strict=True):
        assert (await reads(store, id, after))[:6] == expected


async def test_page_has_at_most_the_wanted_chunks(store):
    id = await finished(store, LONG)
    await store.archive(0)
    for after, limit in ((0, 1), (999, 1), (998, 5), (1500, 700)):
        page = await store._pages.page(id, after, limit)
        assert 0 < len(page.rows) <= limit
        assert page.rows[0] == (after + 1, LONG[after])
        assert page.end == page.rows[-1][0]


async def test_unknown_times(store, run):
    id = await finished(store, ["a", "b", "c", "d", "e", "f"])
    await run("UPDATE {chunks} SET created_at = NULL WHERE seq IN (1, 3, 4)")
    await run("UPDATE {chunks} SET created_at = '9999-12-29 00:00:00.000001Z' WHERE seq = 5")
    await run("UPDATE {chunks} SET created_at = '1969-12-31 23:59:59.999999Z' WHERE seq = 6")
    untimed = await finished(store, ["a", "b"])
    await run("UPDATE {chunks} SET created_at = NULL WHERE id = %s", [untimed])
    await run("UPDATE {chunks} SET created_at = 'infinity' WHERE id = %s AND seq = 1", [untimed])
    stored = await run("SELECT * FROM {chunks} WHERE id = %s ORDER BY seq", [id])
    before = [(await reads(store, each))[:6] for each in (id, untimed)]
    await store.archive(0)
    assert [(await reads(store, each))[:6] for each in (id, untimed)] == before
    assert await run("SELECT times FROM {archive} WHERE id = %s", [untimed]) == [(None,)]
    await store.unarchive(id)
    assert await run("SELECT * FROM {chunks} WHERE id = %s ORDER BY seq", [id]) == stored


async def test_gaps_of_other_software(store, run):
    id = await finished(store, LONG[:1500])
    await run("DELETE FROM {chunks} WHERE seq IN (1, 10, 11) OR seq BETWEEN 990 AND 1100 OR seq > 1400")
    await run("UPDATE {status} SET total_chunks = 2000000000")
    before = [(await reads(store, id, after))[:6] for after in (0, 9, 1000, 1100, 1400)]
    await store.archive(0)
    pages = await run("SELECT first_seq, last_seq FROM {archive} ORDER BY 1")
    assert pages == [(2, 9), (12, 989), (1101, 1400)]
    assert [(await reads(store, id, after))[:6] for after in (0, 9, 1000, 1100, 1400)] == before
    assert await store.unarchive(id) == 1500 - 3 - 111 - 100
    assert [(await reads(store, id, after))[:6] for after in (0, 9, 1000, 1100, 1400)] == before


async def test_large_chunks(client, tables, store, run):
    texts = ["x" * size for size in (60_000, 99_000, 5, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 1, 1, 2, 3_000_000)]
    texts += ["y" * 20_000] * 300
    id = await finished(store, texts)
    assert await store.archive(0) == (1, len(texts) - 2)
    assert await run("SELECT seq FROM {chunks} ORDER BY 1") == [(5,), (8,)]
    [(largest,)] = await run("SELECT max(octet_length(texts)) FROM {archive} WHERE first_seq > 8")
    assert largest < MAX_PAGE_TEXT + 21_000
    async with AsyncPostgresStreamStore(client, **tables) as reader:
        assert [chunk.data async for chunk in reader.read_from(id)] == texts
    answers = [sum(len(row[1] or "") for row in each.rows) for each in client.statements if each.params[0] == id]
    assert max(size for size in answers if size != 3_000_000) <= 2 * PAGE_BYTES
    assert await store.unarchive(id) == len(texts) - 2
    assert [chunk.data async for chunk in store.read_from(id)] == texts


async def test_stream_that_begins_with_large_chunks(store, run):
    texts = ["x" * (MAX_CHUNK_BYTES + 1)] * 2 + ["a", "b", "c"]
    id = await finished(store, texts)
    assert await store.archive(0, batch_size=1) == (1, 3)
    assert await run("SELECT seq FROM {chunks} ORDER BY 1") == [(1,), (2,)]
    assert [chunk.data async for chunk in store.read_from(id)] == texts


async def test_statements_are_bounded(client, tables, store):
    big = await finished(store, ["x" * 100_000] * 100)
    small = [await finished(store, ["a"] * 30) for _ in range(3)]
    expected = [await collect(store.read_from(id)) for id in (big, *small)]
    async with AsyncPostgresStreamStore(client, **tables) as archiver:
        assert await archiver.archive(0, batch_size=80) == (4, 190)
        moved = [each.rows[0][:2] for each in client.statements if each.sql == archiver._schema.statements.archive]
        assert moved == [(0, MOVED_BYTES // 100_000), (3, 80), (1, 30), (0, 0)]
        assert [await collect(store.read_from(id)) for id in (big, *small)] == expected
        assert await archiver.unarchive(big) == 100
        restored = [each.rows[0][1] for each in client.statements if each.sql == archiver._schema.statements.unarchive]
        assert restored == [10] * 10 + [0]
    assert [await collect(store.read_from(id)) for id in (big, *small)] == expected


async def test_every_step_of_archiving_and_back(store, other, run):
    """Between all steps, every reader finds each chunk once, from its start and in the middle."""
    id = await finished(store, LONG)
    whole = await collect(store.read_from(id))
    middle, tail = other.read_from(id), other.read_from(id, 2100)
    got, got_tail = [await middle.__anext__()], [await tail.__anext__()]

    async def check():
        assert await collect(store.read_from(id)) == whole
        assert await collect(other.read_with_times(id, 1234)) == timed[1234:]
        got.extend([await middle.__anext__() for _ in range(120)])
        got_tail.append(await tail.__anext__())

    timed = await collect(store.read_with_times(id))
    async for _ in store._archive.steps(0, 300):
        await check()
    assert await counts(run, id) == (0, 10, len(LONG))
    async for _ in store._archive.restore(id):
        await check()
    assert await counts(run, id) == (len(LONG), 0, 0)
    assert got + await collect(middle) == whole
    assert got_tail + await collect(tail) == whole[2100:]


async def test_reader_of_a_stream_that_ends_and_is_archived(store, other):
    id = await store.create()
    await store.append(id, "first")
    readers = [other.read_from(id) for _ in range(3)]
    begun = [[await reader.__anext__()] for reader in readers]
    await store.append_many(id, LONG)
    await store.complete(id)
    assert await store.archive(0) == (1, len(LONG) + 1)
    for chunks, reader in zip(begun, readers, strict=True):
        assert [chunk.data for chunk in chunks + await collect(reader)] == ["first", *LONG]


async def test_shared_reads(store):
    archived = await finished(store, ["a"] * 10)
    await store.archive(0)
    kept = await finished(store, ["b"] * 10)
    reads = [partial(store._pages.shared_page, SharedRead(id, 3, 5)) for id in (archived, kept) * 4]
    for page, text in zip(await async_gather(*reads), ("a", "b") * 4, strict=True):
        assert list(page.rows) == [(seq, text) for seq in range(4, 9)]


async def test_complete_page_of_an_ended_stream_needs_one_statement(client, tables, store):
    ids = [await finished(store, ["a"] * length) for length in (0, 1, 50)]
    async with AsyncPostgresStreamStore(client, **tables) as reader:
        for id in ids:
            await collect(reader.read_from(id))
    assert len(client.statements) == 3


async def test_archived_stream_is_read_in_few_statements(client, tables, store):
    id = await finished(store, ["a"] * 10_000)
    await store.archive(0)
    async with AsyncPostgresStreamStore(client, **tables) as reader:
        await collect(reader.read_from(id, follow=False))
    # The chunks, the columns of the tables, 50 archived chunks, and the rest of them.
    assert len(client.statements) == 4


async def test_age_is_that_of_the_last_chunk(store, run):
    old, recent, empty, active = [await store.create() for _ in range(4)]
    for id in (old, recent, active):
        await store.append_many(id, ["a", "b"])
    for id in (old, recent, empty):
        await store.complete(id)
    await run("UPDATE {status} SET created_at = now() - interval '1 day'")
    await run("UPDATE {chunks} SET created_at = now() - interval '1 day' WHERE id = %s OR seq = 1", [old])
    assert await store.archive(3600) == (2, 2)
    assert {id: (await counts(run, id))[0] for id in (old, recent, active)} == {old: 0, recent: 2, active: 2}
    assert await store.archive(0) == (1, 2)
    assert (await counts(run, active))[0] == 2


async def test_streams_without_times_are_old(store, run):
    id = await finished(store, ["a"])
    await run("UPDATE {status} SET created_at = NULL")
    await run("UPDATE {chunks} SET created_at = NULL")
    assert await store.archive(1e9) == (1, 1)
    assert await collect(store.read_from(id)) == [(1, "a")]


async def test_tombstones_and_markers_are_no_streams(store, run):
    await run("INSERT INTO {status} VALUES ('a deleted x', 'deleted', 'a', 2147483647, 9223372036854775807)")
    await run("INSERT INTO {chunks} VALUES ('a', 1, 'x'), ('a deleted x', 1, 'x')")
    assert await store.archive(0) == (0, 0)
    with pytest.raises(StreamNotFoundError):
        await store.unarchive("a deleted x")


async def test_repeated_append(store, other):
    id = await finished(store, LONG)
    large = await finished(store, ["a", "x" * (MAX_CHUNK_BYTES + 1), "b"])
    await store.archive(0)
    for appender in (store, other):
        assert await appender.append_many(id, LONG, expected_seq=1) == len(LONG)
        assert await appender.append_many(id, LONG[998:1003], expected_seq=999) == 1003
        assert await appender.append(id, LONG[-1], expected_seq=len(LONG)) == len(LONG)
        assert await appender.append_many(large, ["x" * (MAX_CHUNK_BYTES + 1), "b"], expected_seq=2) == 3
        for texts, seq in ((["?"], 1), (LONG[:3], 2), (["a"], len(LONG) + 1), (["a"], 2**63 - 1)):
            with pytest.raises(StreamNotActiveError):
                await appender.append_many(id, texts, expected_seq=seq)
    await store.unarchive(id)
    assert await store.append_many(id, LONG, expected_seq=1) == len(LONG)


async def test_conflict_in_an_active_stream(store):
    id = await store.create()
    await store.append_many(id, ["a", "b"])
    assert await store.append(id, "b", expected_seq=2) == 2
    with pytest.raises(SequenceConflictError):
        await store.append(id, "a", expected_seq=2)


async def test_deletion(store, other, run):
    archived, partly = [await finished(store, LONG, id) for id in ("archived", "partly")]
    steps = store._archive.steps(0, 1000)
    while not (await steps.__anext__()).streams:
        pass
    assert (await counts(run, archived))[0] == 0 < (await counts(run, partly))[0] < len(LONG)
    for id in (archived, partly):
        [existed, tombstone] = await store._deleter.hide(id)
        assert (existed, tombstone) == (True, None)
        with pytest.raises(StreamNotFoundError):
            await collect(other.read_from(id))
        assert await counts(run, id) == (0, 0, 0)
        assert await store.delete(id) is False
    assert await run("SELECT * FROM {status}") == []


async def test_cleanup_counts_archived_chunks(store, run):
    for number in range(3):
        await finished(store, ["a"] * 7, f"archived {number}")
    await finished(store, ["a", "x" * (MAX_CHUNK_BYTES + 1), "b"], "large")
    await store.archive(0)
    await finished(store, ["a"] * 5, "plain")
    await run("UPDATE {status} SET expires_at = 1 WHERE id <> 'archived 0'")
    assert await store.cleanup() == CleanupResult(4, 7 + 7 + 3 + 5)
    assert await run("SELECT DISTINCT id FROM {archive}") == [("archived 0",)]
    assert await run("SELECT * FROM {chunks}") == []


async def test_new_stream_with_the_id_of_an_archived_one(store, run):
    await finished(store, LONG, "again")
    await store.archive(0)
    await run("DELETE FROM {status}")  # as the clean-up of the TypeScript package begins
    assert await run("SELECT * FROM {archive}") == []
    await store.create("again")
    await store.append(id := "again", "new", expected_seq=1)
    await store.complete(id)
    assert await collect(store.read_from(id)) == [(1, "new")]


async def test_unarchived_stream_is_left_alone(store, run):
    id = await finished(store, LONG)
    rows = await run("SELECT * FROM {chunks} ORDER BY seq")
    await store.archive(0)
    assert await store.unarchive(id) == len(LONG)
    assert await run("SELECT * FROM {chunks} ORDER BY seq") == rows
    assert await counts(run, id) == (len(LONG), 0, 0)
    assert await store.archive(0) == (0, 0)
    assert await store.unarchive(id) == 0
    assert await run("SELECT archived_at::text FROM {status}") == [("-infinity",)]


async def test_unarchive_keeps_a_stream_out_of_the_archive(store):
    id = await store.create()
    assert await store.unarchive(id) == 0
    await store.append(id, "a")
    await store.complete(id)
    assert await store.archive(0) == (0, 0)
    with pytest.raises(StreamNotFoundError):
        await store.unarchive("missing")


async def test_unarchive_waits_for_the_archiver(dsn, tables, store, run):
    """A stream that is archived while `unarchive` begins comes back as a whole."""
    id = await finished(store, LONG)
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'last_pages' AND query ~ %s"
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as archiver:
            assert await archiver.archive(0) == (1, len(LONG))
            async with AsyncBackground(partial(store.unarchive, id)) as unarchiving:
                while not await run(waiting, [tables["status_table"].as_string(None)]):
                    pass
                await connection.commit()
                assert await unarchiving.result() == len(LONG)
    assert await counts(run, id) == (len(LONG), 0, 0)


async def test_simultaneous_archivers_and_readers(store, other, dsn, tables):
    ids = [await finished(store, LONG[:500]) for _ in range(8)]
    expected = [(seq, text) for seq, text in enumerate(LONG[:500], 1)]

    async def read():
        for id in ids:
            assert await collect(other.read_from(id)) == expected
            assert await collect(store.read_from(id, 250, follow=False)) == expected[250:]

    async with AsyncPostgresStreamStore(dsn, **tables) as third:
        archivers = [partial(each.archive, 0, batch_size=200) for each in (store, other, third)]
        results = await async_gather(*archivers, read, read)
    assert sum(result.chunks for result in results[:3]) == 8 * 500
    await read()
    assert await store.archive(0) == (0, 0)
    restored = await async_gather(*(partial(store.unarchive, id) for id in ids), read)
    assert restored[:8] == [500] * 8


async def test_locked_streams_are_skipped(dsn, tables, store):
    locked, free = await finished(store, ["a"]), await finished(store, ["b"])
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        query = sql.SQL("SELECT FROM {} WHERE id = %s FOR UPDATE").format(tables["status_table"])
        await connection.execute(query, [locked])
        assert await store.archive(0) == (1, 1)
    assert await store.archive(0) == (1, 1)
    assert await collect(store.read_from(free)) == [(1, "b")]


async def test_transaction_of_the_caller(dsn, tables, store):
    id = await finished(store, LONG)
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as inside:
            assert await inside.archive(0) == (1, len(LONG))
            assert [chunk.data async for chunk in inside.read_from(id)] == LONG
            assert [chunk.data async for chunk in store.read_from(id)] == LONG
            await connection.rollback()
    assert await store.unarchive(id) == 0


async def test_resumed_durable_stream(store, other):
    stream = await AsyncDurableStream.start(store, items(["a\n", "b", "c"]))
    before = b"".join([part async for part in stream.sse()])
    await store.wait(stream.id)
    await store.archive(0)
    resumed = await AsyncDurableStream.resume(other, stream.id, after_seq=1)
    parts = b"".join([part async for part in resumed.sse()])
    assert parts
    assert before.endswith(parts)


async def test_invalid_arguments(store):
    for value, error in ((-1, ValueError), (2e9, ValueError), ("1", TypeError), (None, TypeError)):
        with pytest.raises(error, match="older_than"):
            await store.archive(value)
    for value in (0, -1, 1.5, None):
        with pytest.raises(InvalidDataError, match="batch_size"):
            await store.archive(0, batch_size=value)
    with pytest.raises(InvalidDataError, match="id"):
        await store.unarchive("")


async def drop_0005(run):
    await run("DROP TABLE {archive}")
    await run("ALTER TABLE {status} DROP COLUMN archived_at")


async def test_everything_else_works_without_the_migration(store, run):
    await drop_0005(run)
    for call in (partial(store.archive, 0), partial(store.unarchive, "a")):
        with pytest.raises(SchemaError, match="needs migration 0005"):
            await call()
    id = await finished(store, LONG)
    await run("DELETE FROM {chunks} WHERE seq BETWEEN 40 AND 2000")
    assert await collect(store.read_from(id)) == [(n, LONG[n - 1]) for n in [*range(1, 40), *range(2001, 2301)]]
    assert await store.append(id, LONG[0], expected_seq=1) == 1
    with pytest.raises(StreamNotActiveError):
        await store.append(id, "?", expected_seq=1)
    assert await store.delete(id)
    await finished(store, ["a"])
    await run("UPDATE {status} SET expires_at = 1")
    assert await store.cleanup() == (1, 1)


async def test_migration_of_running_stores(dsn, tables, store, other, run, run_sql, schema_name):
    """A store that has looked before the migration finds the streams that another one archives."""
    await drop_0005(run)
    id = await finished(store, LONG)
    assert not await store._schema.has_archive()
    run_sql(schema.render(**tables, conversations_table=sql.Identifier(schema_name, "conversations")))
    async with AsyncPostgresStreamStore(dsn, **tables) as archiver:
        assert await archiver.archive(0) == (1, len(LONG))
    assert await store.append(id, LONG[5], expected_seq=6) == 6
    assert [chunk.data async for chunk in other.read_from(id)] == LONG
    assert await store.unarchive(id) == len(LONG)


async def test_role_without_privileges_on_the_archive(dsn, tables, store, run, run_sql, schema_name):
    kept, archived = await finished(store, ["a", "b"]), None
    await store.unarchive(kept)
    archived = await finished(store, ["a", "b"])
    await store.archive(0)
    role = f"role_{schema_name}"
    run_sql(
        f'CREATE ROLE "{role}" LOGIN; GRANT USAGE ON SCHEMA "{schema_name}" TO "{role}"; '
        f'GRANT ALL ON ALL TABLES IN SCHEMA "{schema_name}" TO "{role}"'
    )
    await run(f'REVOKE ALL ON {{archive}} FROM "{role}"')
    try:
        async with AsyncPostgresStreamStore(psycopg.conninfo.make_conninfo(dsn, user=role), **tables) as limited:
            assert await collect(limited.read_from(kept)) == [(1, "a"), (2, "b")]
            with pytest.raises(psycopg.errors.InsufficientPrivilege):  # rather than a stream without chunks
                await collect(limited.read_from(archived))
            with pytest.raises(StreamNotActiveError):  # it cannot know whether the text is archived
                await limited.append(archived, "a", expected_seq=1)
            assert [await limited.delete(id) for id in (kept, archived)] == [True, True]
            assert await limited.cleanup() == (0, 0)
    finally:
        run_sql(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')


@pytest.fixture
async def limited(dsn, tables, run, run_sql, schema_name):
    """A store of a role without privileges on the archive. The name of the role is that of the test's schema."""
    run_sql(
        f'CREATE ROLE "{schema_name}" LOGIN; GRANT USAGE ON SCHEMA "{schema_name}" TO "{schema_name}"; '
        f'GRANT ALL ON ALL TABLES IN SCHEMA "{schema_name}" TO "{schema_name}"'
    )
    await run(f'REVOKE ALL ON {{archive}} FROM "{schema_name}"')
    async with AsyncPostgresStreamStore(psycopg.conninfo.make_conninfo(dsn, user=schema_name), **tables) as limited:
        yield limited
    run_sql(f'DROP OWNED BY "{schema_name}"; DROP ROLE "{schema_name}"')


async def test_role_without_privileges_appends_to_a_stream_that_is_not_archived(limited, store):
    id = await finished(store, ["a", "b"])
    assert await limited.append(id, "b", expected_seq=2) == 2
    for text, seq in (("c", 3), ("b", 3), ("other", 2), ("c", None)):
        with pytest.raises(StreamNotActiveError):
            await limited.append(id, text, expected_seq=seq)
    id = await store.create()
    with pytest.raises(StreamNotActiveError):
        async with limited.writer(id) as writer:
            await writer.write("a")
            await writer.flush()
            await store.complete(id)
            await writer.write("b")


async def test_simultaneous_unarchive(dsn, tables, store, run):
    """A call that waits for the statement of another one, and then finds its pages gone, continues with the others."""
    id = await finished(store, ["x" * MAX_PAGE_TEXT] * 25)
    await store.archive(0)
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'last_pages' AND query ~ %s"
    second = store._archive.restore(id)
    assert await second.__anext__() == 10
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        async with AsyncPostgresStreamStore(connection, **tables) as inside:
            first = inside._archive.restore(id)
            assert await first.__anext__() == 10
            async with AsyncBackground(partial(collect, second)) as rest:
                while not await run(waiting, [tables["status_table"].as_string(None)]):
                    pass
                await connection.commit()
                assert sum(await rest.result()) == 5
    assert await counts(run, id) == (25, 0, 0)


async def test_age_if_the_last_counted_chunks_are_missing(store, run):
    id = await finished(store, ["a", "b"])
    await run("UPDATE {status} SET created_at = now() - interval '1 day', total_chunks = 5")
    await run("INSERT INTO {chunks} (id, seq, data, created_at) VALUES (%s, 6, '-', '2000-01-01')", [id])
    assert await store.archive(3600) == (0, 0)
    await run("UPDATE {chunks} SET created_at = now() - interval '1 day'")
    assert await store.archive(3600) == (1, 2)


async def test_repeated_insert_of_other_software(store, run):
    """A chunk that other software inserts again after the archiver has moved it is read once."""
    id = await finished(store, LONG[:1500])
    positions = [0, 3, 4, 5, 900, 1199, 1200]
    before = [(await reads(store, id, after))[:6] for after in positions]
    await store.archive(0)
    for seq in (1, 5, 1000, 1200, 1500):
        await run("INSERT INTO {chunks} (id, seq, data) VALUES (%s, %s, %s)", [id, seq, LONG[seq - 1]])
    after_insertion = [(await reads(store, id, after))[:4] for after in positions]
    assert after_insertion == [each[:4] for each in before]
    assert await store.unarchive(id) == 1495
    assert await counts(run, id) == (1500, 0, 0)
    assert (await reads(store, id))[:4] == before[0][:4]


async def test_pages_above_the_number_of_chunks(store, run):
    """As chunks with a number above total_chunks, such pages are left over."""
    id = await finished(store, LONG)
    await store.archive(0)
    await run("UPDATE {status} SET total_chunks = 700")
    for after in (0, 500, 699, 700, 1500):
        for chunks in (await reads(store, id, after))[:2]:
            assert [data for _, data in chunks] == LONG[after:700]


async def test_json_escapes(store, run):
    """The size of a page is measured in JSON, where a control character needs six bytes."""
    texts = ["\x01" * 100_000, "\x01" * 200_000, '"' * 400_000, '"' * 600_000, "x" * MAX_CHUNK_BYTES]
    id = await finished(store, texts)
    assert await store.archive(0) == (1, 3)
    assert await run("SELECT seq FROM {chunks} ORDER BY 1") == [(2,), (4,)]
    assert [chunk.data async for chunk in store.read_from(id)] == texts
    assert await store.archive(0) == (0, 0)
    assert await store.unarchive(id) == 3


async def test_batch_that_another_archiver_has_moved(limited, store, run, run_sql, schema_name):
    """An archiver whose snapshot has chunks that another one moves before it locks their stream continues."""
    id = await finished(store, LONG[:300])
    await run(f'GRANT ALL ON {{archive}} TO "{schema_name}"')
    await run(
        f'CREATE FUNCTION "{schema_name}".wait() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN '
        f"PERFORM pg_advisory_xact_lock_shared(hashtext('{schema_name}')); RETURN true; END $$"
    )
    await run("ALTER TABLE {status} ENABLE ROW LEVEL SECURITY")
    await run(f'CREATE POLICY slow ON {{status}} USING ("{schema_name}".wait())')
    await limited.get_status(id)
    await limited._schema.require_0005("archive")
    await run(f"SELECT pg_advisory_lock(hashtext('{schema_name}'))")
    async with AsyncBackground(partial(limited.archive, 0, batch_size=100)) as archiving:
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND usename = %s"
        while not await run(waiting, [schema_name]):
            pass
        other = store._archive.steps(0, 100)
        assert await other.__anext__() == (0, 100)
        await run(f"SELECT pg_advisory_unlock(hashtext('{schema_name}'))")
        assert await archiving.result() == (1, 200)
    assert await counts(run, id) == (0, 3, 300)


async def test_stream_whose_chunks_cannot_be_moved(limited, store, run, schema_name):
    """A policy may prevent the deletion of chunks: the archiver ends."""
    await finished(store, LONG[:300])
    await run(f'GRANT ALL ON {{archive}} TO "{schema_name}"')
    await run("ALTER TABLE {chunks} ENABLE ROW LEVEL SECURITY")
    await run("CREATE POLICY readable ON {chunks} FOR SELECT USING (true)")
    assert await limited.archive(0, batch_size=100) == (0, 0)
