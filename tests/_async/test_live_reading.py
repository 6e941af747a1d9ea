"""Reading a stream while it is written, from this process and from others."""

from __future__ import annotations

import json
import random
import textwrap
from functools import partial
from time import monotonic

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support import servers
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until, async_workers, run_python
from support.leaks import package_objects
from support.recording import POLL, AsyncRecordingClient

from aibind_postgres import (
    AsyncPostgresStreamStore,
    StoreClosedError,
    StreamNotActiveError,
    StreamNotFoundError,
    schema,
)
from aibind_postgres._notifications import digest_of

HOSTILE = ["plain", "quotes", "mixed case", "63 bytes", "formats"]  # a channel is named after its table

NEVER = 3600  # seconds as poll_interval: chunks arrive by notification alone


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


async def collect(store, id, after_seq=0):
    return [tuple(chunk) async for chunk in store.read_from(id, after_seq)]


def other_process(code, dsn, id, tables):
    """Run code in another process, which gets a `store` on the same tables and the stream's `id`."""
    names = json.dumps({name: table.as_string(None) for name, table in tables.items()})
    preamble = """
import json, re, sys
from psycopg.sql import Identifier
from aibind_postgres import PostgresStreamStore
dsn, id, names = sys.argv[1:]
names = {key: Identifier(*re.findall('"(.*?)"', name)) for key, name in json.loads(names).items()}
with PostgresStreamStore(dsn, **names) as store:
"""
    return run_python(preamble + textwrap.indent(code, "    "), dsn, id, names)


async def until_last_statement(dsn, query):
    """Wait until the last statement of some connection is like `query`."""
    # Its name keeps this connection out of the count in `test_waiting_readers_use_one_connection`.
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, application_name="test") as connection:
        statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE %s"
        while (await (await connection.execute(statement, [query])).fetchone()) == (0,):
            await async_sleep(0.01)


@pytest.mark.parametrize("end", ["complete", "stop", "fail"])
async def test_reader_gets_each_chunk_once_and_the_end(store, other, end):
    id = await store.create()
    async with (
        AsyncBackground(partial(collect, other, id)) as reader,
        AsyncBackground(partial(collect, store, id)) as own,
    ):
        for number in range(1, 101):
            assert await store.append(id, str(number)) == number
        await getattr(store, end)(id, *["why"] * (end == "fail"))
        expected = [(number, str(number)) for number in range(1, 101)]
        assert await reader.result() == expected
        assert await own.result() == expected


@pytest.mark.parametrize("tables", HOSTILE, indirect=True)
async def test_notifications_alone_wake_a_reader(dsn, tables, store):
    id = await store.create()
    seen = []

    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=NEVER) as listener:

        async def follow():
            async for chunk in listener.read_from(id):
                seen.append(chunk.data)

        async with AsyncBackground(follow) as reader:
            # The store starts to LISTEN some time after the reader started.
            await until_last_statement(dsn, "LISTEN%")
            for number in range(20):
                await store.append(id, str(number))
                await async_until(lambda number=number: len(seen) == number + 1, 10)
            await store.complete(id)
            await reader.result()
    assert seen == [str(number) for number in range(20)]


async def test_lost_listen_connection_is_replaced(dsn, tables, store):
    id = await store.create()
    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=NEVER) as listener:
        async with AsyncBackground(partial(collect, listener, id)) as reader:
            async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
                for number in range(3):
                    await until_last_statement(dsn, "LISTEN%")
                    await store.append(id, f"{number}")
                    statement = (
                        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                        "WHERE query LIKE 'LISTEN%' AND datname = current_database()"
                    )
                    await (await admin.execute(statement)).fetchall()
                    await store.append(id, f"{number}, lost")
            await store.complete(id)
            assert len(await reader.result()) == 6


async def test_reader_of_the_same_store_is_woken_without_notifications(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=NEVER) as store:
        id = await store.create()
        async with AsyncBackground(partial(collect, store, id)) as reader:
            for number in range(10):
                await store.append(id, str(number))
                await async_sleep(0.01)
            await store.stop(id)
            assert len(await reader.result()) == 10


@pytest.mark.parametrize("tables", HOSTILE, indirect=True)
async def test_polling_finds_chunks_without_notifications(dsn, tables, store):
    id = await store.create()
    names = {"chunks": tables["chunks_table"], "status": tables["status_table"]}
    names = {name: psycopg.sql.SQL(table.as_string(None).replace("%", "%%")) for name, table in names.items()}
    append = psycopg.sql.SQL(
        "WITH next AS (UPDATE {status} SET total_chunks = total_chunks + 1 WHERE id = %s RETURNING id, total_chunks) "
        "INSERT INTO {chunks} (id, seq, data) SELECT id, total_chunks, total_chunks::text FROM next"
    ).format(**names)
    end = psycopg.sql.SQL("UPDATE {status} SET state = 'done' WHERE id = %s").format(**names)
    async with AsyncBackground(partial(collect, store, id)) as reader:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as plain:
            for _ in range(20):
                await plain.execute(append, [id])
                await async_sleep(0.02)
            await plain.execute(end, [id])
        assert await reader.result() == [(number, str(number)) for number in range(1, 21)]


@pytest.mark.parametrize("tables", HOSTILE, indirect=True)
async def test_trigger_notifies_for_foreign_writers(dsn, admin_dsn, tables, schema_name):
    conversations = psycopg.sql.Identifier(schema_name, "conversations")
    schema.migrate(admin_dsn, **tables, conversations_table=conversations, notify_trigger=True)
    names = {"chunks": tables["chunks_table"], "status": tables["status_table"]}
    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=NEVER) as store:
        id = await store.create()
        async with AsyncBackground(partial(store.wait, id)) as waiter:
            await until_last_statement(dsn, "LISTEN%")
            async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as plain:
                await plain.execute(psycopg.sql.SQL("UPDATE {status} SET state = 'done'").format(**names))
            assert (await waiter.result()).state == "done"


@pytest.mark.parametrize("notifier", ["writer", "trigger"])
async def test_notifications_contain_no_stream_id(admin_dsn, tables, schema_name, store, notifier):
    if notifier == "trigger":
        conversations = psycopg.sql.Identifier(schema_name, "conversations")
        schema.migrate(admin_dsn, **tables, conversations_table=conversations, notify_trigger=True)
    update = psycopg.sql.SQL("UPDATE {} SET state = 'done'").format(tables["status_table"])
    id = await store.create()
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as stranger:
        await stranger.execute(
            psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(tables["status_table"]._obj[-1]))
        )
        await (store.append(id, "x") if notifier == "writer" else stranger.execute(update))
        [notification] = [each async for each in stranger.notifies(timeout=20, stop_after=1)]
    assert id not in notification.payload
    assert digest_of(id) in notification.payload


async def test_reader_may_start_after_a_future_chunk(store, other):
    id = await store.create()
    async with AsyncBackground(partial(collect, other, id, 3)) as ahead:
        await async_sleep(0.05)
        await store.append_many(id, ["1", "2"])
        await async_sleep(0.05)
        await store.append_many(id, ["3", "4", "5"])
        await store.complete(id)
        assert await ahead.result() == [(4, "4"), (5, "5")]


async def test_readers_leave_and_resume(store, other):
    id = await store.create()
    total = 400

    async def write():
        for number in range(1, total + 1):
            await store.append(id, str(number))
        await store.complete(id)

    async def read(seed):
        rng = random.Random(seed)
        seen, source = [], rng.choice([store, other])
        while len(seen) < total:
            leave_after = rng.randrange(1, 60)
            async for chunk in source.read_from(id, len(seen)):
                seen.append(chunk.seq)
                leave_after -= 1
                if not leave_after:
                    break
            if rng.random() < 0.3:
                await async_sleep(rng.random() / 50)
        return seen

    results = await async_gather(write, *(partial(read, seed) for seed in range(20)))
    assert results[1:] == [list(range(1, total + 1))] * 20


async def test_readers_that_leave_early_are_released(store):
    id, ended = await store.create(), await store.create()
    for stream_id in (id, ended):
        await store.append_many(stream_id, ["1", "2", "3"])
    await store.complete(ended)

    async def read_all():
        return [chunk.data async for chunk in store.read_from(ended)]

    async def leave_early():
        async for _chunk in store.read_from(id):
            break

    assert await read_all() == ["1", "2", "3"]
    before = package_objects()
    for _ in range(100):
        await leave_early()
    while package_objects() - before:  # the store drops closed readers when another one starts
        assert await read_all() == ["1", "2", "3"]
        await async_sleep(0.01)


async def test_recreated_stream_is_not_mixed_up_with_its_predecessor(store):
    id = await store.create()
    await store.append_many(id, ["old 1", "old 2", "old 3"])
    reader = store.read_from(id)
    seen = []
    with pytest.raises(StreamNotFoundError):
        async for chunk in reader:
            seen.append(chunk.data)
            if len(seen) == 3:
                await store.delete(id)
                await store.create(id)
                await store.append_many(id, ["new 1", "new 2"])
    assert seen == ["old 1", "old 2", "old 3"]


async def test_concurrent_delete_and_create_leave_no_old_chunk(dsn, tables, store, other):
    for number in range(10):
        await store.create("same")
        await store.append_many("same", ["old"] * 4)
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            late = AsyncPostgresStreamStore(connection, **tables)
            await late.append("same", "late")

            async def create(source=[store, other][number % 2]):
                while not await source.acquire("same"):
                    await async_sleep(0.001)

            async def commit(connection=connection):
                await async_sleep(0.02)
                await connection.commit()

            await async_gather(partial(other.delete, "same"), create, commit)
            await late.close()
        assert await store.get_status("same") == ("active", None, 0)
        assert [chunk async for chunk in store.read_from("same", follow=False)] == []
        assert await store.append("same", "new") == 1
        assert [tuple(chunk) async for chunk in store.read_from("same", follow=False)] == [(1, "new")]
        await store.delete("same")


async def test_close_ends_a_replay(admin_dsn, tables, store):
    id = await store.create()
    await store.append_many(id, ["now", "an hour later"])
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as admin:
        later = psycopg.sql.SQL("UPDATE {} SET created_at = now() + interval '1 hour' WHERE seq = 2")
        await admin.execute(later.format(tables["chunks_table"]))
    seen = []

    async def replay():
        with pytest.raises(StoreClosedError):
            async for chunk in store.replay(id):
                seen.append(chunk.data)

    async with AsyncBackground(replay) as replaying:
        await async_until(lambda: seen, 10)
        await store.close()
        await replaying.result()
    assert seen == ["now"]


async def test_delete_ends_readers_and_waiters(store, other):
    id = await store.create()
    await store.append(id, "a")

    async def read_until_error():
        with pytest.raises(StreamNotFoundError):
            await collect(other, id)

    async def wait_until_error():
        with pytest.raises(StreamNotFoundError):
            await other.wait(id)

    async with AsyncBackground(read_until_error) as reader, AsyncBackground(wait_until_error) as waiter:
        await async_sleep(0.1)
        await store.delete(id)
        await reader.result()
        await waiter.result()


async def test_close_ends_readers(dsn, tables):
    store = AsyncPostgresStreamStore(dsn, **tables, poll_interval=NEVER)
    id = await store.create()

    async def read_until_error():
        with pytest.raises(StoreClosedError):
            await collect(store, id)

    async with AsyncBackground(read_until_error) as reader:
        await until_last_statement(dsn, "LISTEN%")
        await store.close()
        await reader.result()


async def test_close_at_any_moment_leaves_no_worker(dsn, tables, store):
    id = await store.create()

    async def read_until_closed(closing):
        with pytest.raises(StoreClosedError):
            await collect(closing, id)

    before = sorted(async_workers())
    for number in range(30):
        closing = AsyncPostgresStreamStore(dsn, **tables, poll_interval=NEVER)
        await closing.get_status(id)
        async with AsyncBackground(partial(read_until_closed, closing)) as reader:
            await async_sleep(number / 1000)
            await closing.close()
            assert sorted(async_workers()) == before
            await reader.result()


async def test_wait_returns_at_the_end(store, other):
    id = await store.create()
    async with AsyncBackground(partial(other.wait, id, 30)) as waiter:
        await store.append(id, "a")
        await store.fail(id, "why")
        assert await waiter.result() == ("error", "why", 1)


async def test_stop_in_another_process_ends_writer_and_reader(dsn, tables, store):
    id = await store.create()

    async def write():
        with pytest.raises(StreamNotActiveError):
            while True:
                await store.append(id, "x")
                await async_sleep(0.005)

    code = """
sys.stdin.readline()
print(store.stop(id))
"""
    with other_process(code, dsn, id, tables) as process:
        async with AsyncBackground(write) as writer, AsyncBackground(partial(collect, store, id)) as reader:
            await async_sleep(0.2)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            await writer.result()
            chunks = await reader.result()
        assert process.stdout.read() == "True\n"
    status = await store.get_status(id)
    assert status.state == "stopped"
    assert [seq for seq, _ in chunks] == list(range(1, status.total_chunks + 1))


async def test_reader_in_another_process_waits_for_the_first_chunk(dsn, tables, store):
    id = await store.create()
    code = """
for chunk in store.read_from(id):
    print(*chunk, flush=True)
"""
    with other_process(code, dsn, id, tables) as process:
        assert process.stdout is not None
        await until_last_statement(dsn, "LISTEN%")
        for number in range(1, 11):
            await store.append(id, f"chunk {number}")
            assert process.stdout.readline() == f"{number} chunk {number}\n"
        await store.complete(id)
        assert process.stdout.read() == ""


async def test_many_readers_share_a_pool_of_one(dsn, tables):
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            id = await store.create()
            readers = [partial(collect, store, id) for _ in range(50)]

            async def write():
                for number in range(20):
                    await store.append(id, str(number))
                    await async_sleep(0.005)
                await store.complete(id)

            results = await async_gather(write, *readers)
            assert results[1:] == [[(number + 1, str(number)) for number in range(20)]] * 50


async def test_waiting_readers_use_one_connection(database):
    async with AsyncConnectionPool(database, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool) as store:
            ids = [await store.create() for _ in range(20)]

            async def end_all():
                await until_last_statement(database, f"%{POLL}%")
                async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
                    statement = (
                        "SELECT count(*) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND backend_type LIKE 'client%' "
                        "AND pid <> pg_backend_pid() AND application_name <> 'test'"
                    )
                    (connections,) = await (await admin.execute(statement)).fetchone()
                for id in ids:
                    await store.stop(id)
                return connections

            results = await async_gather(end_all, *(partial(store.wait, id) for id in ids for _ in range(5)))
            assert results[0] == 2  # one of the pool, one of the listener
            assert {status.state for status in results[1:]} == {"stopped"}


async def test_idle_readers_share_one_poll(dsn, tables):
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresStreamStore(client, **tables) as store:
        id = await store.create()

        async def statements_while_idle():
            await client.wait_for_followers(id, 1 + 100)  # `create` and each `wait` have sent one statement
            client.statements.clear()
            await async_sleep(1)
            idle = list(client.statements)
            await store.stop(id)
            return idle

        results = await async_gather(statements_while_idle, *[partial(store.wait, id)] * 100)
        assert [statement for statement in results[0] if POLL not in statement.sql] == []
        assert len({statement.sql for statement in results[0]}) <= 1
        assert len(results[0]) <= 20  # and not 10 of each reader


async def test_reader_survives_a_server_restart():
    with servers.own_server() as server:
        schema.migrate(server.dsn)
        async with AsyncPostgresStreamStore(server.dsn) as store:
            id = await store.create()
            await store.append_many(id, ["1", "2"])
            async with AsyncBackground(partial(collect, store, id)) as reader:
                await async_sleep(0.2)
                for restart in ("fast", "immediate"):
                    server.stop(restart)
                    await async_sleep(0.5)
                    server.start()
                    while True:
                        try:
                            await store.append(id, restart)
                            break
                        except psycopg.OperationalError:
                            await async_sleep(0.05)
                await store.complete(id)
                assert [data for _, data in await reader.result()] == ["1", "2", "fast", "immediate"]
            server.stop("immediate")
            server.start()
        async with AsyncPostgresStreamStore(server.dsn) as store:
            assert [data for _, data in await collect(store, id)] == ["1", "2", "fast", "immediate"]


async def test_reader_raises_after_retry_for():
    with servers.own_server() as server:
        schema.migrate(server.dsn)
        async with AsyncConnectionPool(server.dsn, min_size=1, timeout=0.2, open=False) as pool:
            await pool.wait(30)
            async with AsyncPostgresStreamStore(pool, retry_for=1) as store:
                id = await store.create()

                async def read_until_error():
                    with pytest.raises(psycopg.OperationalError):
                        await collect(store, id)
                    return monotonic()

                async with AsyncBackground(read_until_error) as reader:
                    await async_sleep(0.2)
                    lost_at = monotonic()
                    server.stop()
                    assert await reader.result() >= lost_at + 1
                with pytest.raises(TimeoutError):
                    await store.wait(id, 0.5)
