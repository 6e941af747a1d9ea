"""Cancelled tasks leave no connection checked out, no gap and no lost chunk. Threads cannot be cancelled."""

from __future__ import annotations

import asyncio
import gc
import random
import time

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool
from support.concurrency import async_until, async_workers
from support.leaks import package_objects

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    PostgresStreamStore,
    WebRequest,
)
from aibind_postgres._async.producing import AsyncProducer


async def test_cancelled_calls_leave_no_connection_checked_out_and_no_gap(dsn, tables):
    before = package_objects()["Subscription"]
    rng = random.Random(7)
    async with AsyncConnectionPool(dsn, min_size=2, max_size=2, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            id = await store.create()

            async def read():
                async for _ in store.read_from(id):
                    pass

            for number in range(200):
                task = asyncio.create_task(store.append(id, f"{number}") if number % 4 else read())
                await asyncio.sleep(rng.random() / 200)
                task.cancel()
                await asyncio.wait([task])
            # The next call succeeds, and the connections keep the pool's mode.
            last = await store.append(id, "last")
            seqs = [chunk.seq async for chunk in store.read_from(id, follow=False)]
            assert seqs == list(range(1, last + 1))
            await store.complete(id)
            assert len([chunk async for chunk in store.read_from(id)]) == last  # a new reader drops the cancelled ones
            del task
            assert package_objects()["Subscription"] <= before + 1
        async with pool.connection() as one, pool.connection() as two:
            assert (one.autocommit, two.autocommit) == (False, False)


async def test_pool_after_a_call_cancelled_at_any_step(dsn, tables):
    class SlowPool(AsyncConnectionPool):
        """A pool that needs two iterations of the event loop to take a connection back, like a busy pool."""

        async def putconn(self, connection):
            assert (
                connection.autocommit == is_autocommit or connection.info.transaction_status != TransactionStatus.IDLE
            )
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await super().putconn(connection)

    for is_autocommit in (False, True):
        options = {"kwargs": {"autocommit": is_autocommit}, "min_size": 1, "max_size": 1, "timeout": 5, "open": False}
        async with SlowPool(dsn, **options) as pool, AsyncPostgresStreamStore(pool, **tables) as store:
            id = await store.create()
            cancelled = 0
            while cancelled <= 10:  # on a busy machine a call takes fewer steps
                finished = steps = 0
                while finished < 3:  # each time one step later
                    steps += 1
                    task = asyncio.create_task(store.append(id, "x"))
                    for _ in range(steps):
                        await asyncio.sleep(0)
                        if task.done():
                            break
                    task.cancel()
                    await asyncio.wait([task])
                    finished, cancelled = finished + (not task.cancelled()), cancelled + task.cancelled()
                    assert (await store.get_status(id)).state == "active"
            async with pool.connection() as connection:
                assert connection.autocommit == is_autocommit


async def test_cancellation_as_the_pool_hands_over_a_connection(dsn, tables):
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, timeout=5, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            id = await store.create()
            for turns in range(20):
                async with pool.connection():
                    waiting = asyncio.create_task(store.get_status(id))
                    await asyncio.sleep(0.01)
                for _ in range(turns):
                    await asyncio.sleep(0)
                if waiting.cancel():
                    with pytest.raises(asyncio.CancelledError):
                        await waiting
                assert await store.get_status(id) == ("active", None, 0)


async def test_cancelled_producer_ends_its_stream(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()

        async def produce():
            async with store.writer(id) as writer:
                for number in range(1000):
                    await writer.write(f"{number}")
                    await asyncio.sleep(0.001)

        task = asyncio.create_task(produce())
        assert (await asyncio.wait_for(anext(store.read_from(id)), 20)).data == "0"
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        status = await store.get_status(id)
        assert (status.state, status.error) == ("error", "CancelledError")
        chunks = [chunk async for chunk in store.read_from(id)]
        assert chunks == [(number + 1, f"{number}") for number in range(status.total_chunks)]


async def test_cancelled_write_to_a_full_buffer_is_not_stored(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()
        async with store.writer(id, max_chunks=1) as writer:
            await writer.write("a")
            second = asyncio.create_task(writer.write("b"))
            await asyncio.sleep(0)
            assert not second.done()
            second.cancel()
            await asyncio.wait([second])
            assert await writer.flush() == 1
        assert [chunk.data async for chunk in store.read_from(id)] == ["a"]


def test_end_of_the_loop_loses_no_written_chunk(dsn, tables):
    async def main():
        store = AsyncPostgresStreamStore(dsn, **tables)
        id = await store.create()

        async def produce():
            async with store.writer(id) as writer:
                for number in range(300):
                    await writer.write(f"{number}")
                all_written.append(True)
                await asyncio.sleep(60)

        all_written: list[bool] = []
        task = asyncio.create_task(produce())
        while not all_written:
            await asyncio.sleep(0)
        return id, task

    id, task = asyncio.run(main())  # cancels the producer, the worker and every other task at once
    assert task.cancelled()

    async def check():
        async with AsyncPostgresStreamStore(dsn, **tables) as other:
            status = await other.get_status(id)
            return status, [chunk.data async for chunk in other.read_from(id)]

    status, chunks = asyncio.run(check())
    assert chunks == [f"{number}" for number in range(300)]
    assert status == ("error", "CancelledError", 300)


class SlowReplies:
    """A pool that delays the replies to appends."""

    def __init__(self, pool):
        self.pool = pool
        self.sent = 0
        self.reply = asyncio.Event()

    async def query(self, sql, params):
        async with self.pool.connection() as connection:
            cursor = psycopg.AsyncRawCursor(connection)
            await cursor.execute(sql, params)
            rows = await cursor.fetchall()
        if "total_chunks + " in sql or '_append"(' in sql:
            self.sent += 1
            await self.reply.wait()
        return rows


def test_worker_cancelled_during_a_send_loses_and_repeats_nothing(dsn, tables):
    async def main():
        pool = AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=1, max_size=4, open=False)
        await pool.open()
        client = SlowReplies(pool)
        store = AsyncPostgresStreamStore(client, **tables)
        id = await store.create()

        async def produce():
            try:
                async with store.writer(id) as writer:
                    await writer.write("a")
                    while not client.sent:
                        await asyncio.sleep(0.01)
                    await writer.write("b")
                    await writer.write("c")
                    client.ready = True
                    await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.2)  # the notification of the end starts too late for `asyncio.run` to wait for it
                await pool.close()

        task = asyncio.create_task(produce())
        while not hasattr(client, "ready"):
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.2, client.reply.set)
        return id, task

    id, task = asyncio.run(main())  # cancels the producer and the worker, whose first reply is delayed
    assert task.cancelled()
    with PostgresStreamStore(dsn, **tables) as store:
        assert store.get_status(id) == ("error", "CancelledError", 3)
        assert [chunk.data for chunk in store.read_from(id)] == ["a", "b", "c"]


async def test_repeated_cancellation_of_a_writers_exit(dsn, tables):
    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=1, max_size=4, open=False) as pool:
        client = SlowReplies(pool)
        async with AsyncPostgresStreamStore(client, **tables) as store:
            id = await store.create()
            writers = []

            async def produce():
                async with store.writer(id) as writer:
                    writers.append(writer)
                    await writer.write("a")
                    await asyncio.sleep(60)

            task = asyncio.create_task(produce())
            while not client.sent:
                await asyncio.sleep(0.01)
            for _ in range(5):  # as a cancel scope does
                task.cancel()
                await asyncio.sleep(0.01)
            assert task.cancelled()
            client.reply.set()
            status = await store.wait(id, 20)
            assert status == ("error", "CancelledError", 1)
            assert not writers[0].is_active
            while any(task.get_name() == "aibind_postgres-writer" for task in asyncio.all_tasks()):
                await asyncio.sleep(0.01)


async def test_produce_cancelled_while_its_producer_starts(dsn, tables, monkeypatch):
    async def start(producer, *, is_new):
        task.cancel()
        await original(producer, is_new=is_new)

    async def source():
        yield "a"
        await asyncio.sleep(600)

    original = AsyncProducer.start
    monkeypatch.setattr(AsyncProducer, "start", start)
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()
        task = asyncio.create_task(AsyncDurableStream.produce(store, id, source()))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await store.get_status(id)).state == "error"
        assert AsyncProducer.running(store) == []


async def test_random_cancellations_lose_no_append_of_other_callers(dsn, tables):
    rng = random.Random(3)
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        ids = [await store.create() for _ in range(10)]
        acknowledged = {id: [] for id in ids}

        async def produce(worker):
            for number in range(30):
                id = rng.choice(ids)
                seq = await store.append(id, f"{worker}/{number}")
                acknowledged[id].append((seq, f"{worker}/{number}"))

        tasks = [asyncio.create_task(produce(worker)) for worker in range(40)]
        for task in tasks[::2]:
            await asyncio.sleep(rng.random() / 100)
            task.cancel()
        await asyncio.wait(tasks)
        assert [task.exception() for task in tasks[1::2]] == [None] * 20
        for id in ids:
            chunks = [tuple(chunk) async for chunk in store.read_from(id, follow=False)]
            assert [seq for seq, _ in chunks] == list(range(1, len(chunks) + 1))
            assert set(acknowledged[id]) <= set(chunks)
            assert len({data for _, data in chunks}) == len(chunks)


async def test_workers_cancelled_before_their_first_step_are_replaced(dsn, tables):
    """A task cancelled before its first step, as at the end of a loop, does not run its `finally`."""

    def cancel_new_workers():
        new = [task for task in asyncio.all_tasks() - known if task.get_name().startswith("aibind_postgres")]
        for task in new:
            task.cancel()
        return {task.get_name().removeprefix("aibind_postgres-") for task in new}

    async with AsyncPostgresStreamStore(dsn, **tables, poll_interval=0.01) as store:
        id = await store.create()
        known = asyncio.all_tasks()
        async with store.writer(id) as writer:
            assert cancel_new_workers() == {"writer", "listener", "leases"}
            await async_until(lambda: "aibind_postgres-leases" not in async_workers())
            await writer.write("a")
            assert await asyncio.wait_for(writer.flush(), 20) == 1
            await async_until(lambda: "aibind_postgres-leases" in async_workers())  # without another writer
            async with AsyncPostgresStreamStore(dsn, **tables) as other:
                reading = asyncio.create_task(anext(store.read_from(id, 1)))
                await async_until(lambda: "aibind_postgres-listener" in async_workers())
                await other.append(id, "b")
                assert (await asyncio.wait_for(reading, 20)).data == "b"


def run_and_cancel(main, last, reverse):
    """Run `main` as `asyncio.run` does, but cancel the tasks with `last` in their name after the others, or before."""
    loop = asyncio.new_event_loop()
    try:
        result = loop.run_until_complete(main)
        tasks = sorted(asyncio.all_tasks(loop), key=lambda task: (last in task.get_name()) != reverse)
        assert any(last in task.get_name() for task in tasks)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
    return result


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("last", ["end of the loop", "producer", "writer", "notifier", "listener", "leases"])
def test_end_of_the_loop_ends_streams_in_error_and_closes_sources(dsn, tables, caplog, last, reverse):
    closed = []

    async def source():
        try:
            yield "a"
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def serve():
        store = AsyncPostgresStreamStore(dsn, **tables)
        streams = [await AsyncDurableStream.start(store, source()) for _ in range(5)]
        for stream in streams:
            await anext(store.read_from(stream.id))
        return [stream.id for stream in streams]

    gc.collect()  # objects of earlier tests
    caplog.clear()
    ids = run_and_cancel(serve(), last, reverse)
    gc.collect()
    assert len(closed) == len(ids)
    assert "destroyed" not in caplog.text
    with PostgresStreamStore(dsn, **tables) as store:
        assert {store.get_status(id) for id in ids} == {("error", "the answer was interrupted", 1)}


async def test_stream_starts_if_its_caller_is_cancelled_at_any_step(dsn, tables):
    async def source():
        yield "word"

    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        cancelled = 0
        while cancelled <= 5:  # on a busy machine a call takes fewer steps
            for turns in range(40):
                starting = asyncio.create_task(AsyncDurableStream.start(store, source()))
                for _ in range(turns):
                    await asyncio.sleep(0)
                starting.cancel()
                await asyncio.wait([starting])
                cancelled += starting.cancelled()
        states = set()
        deadline = time.monotonic() + 20
        while states != {"done"}:
            assert time.monotonic() < deadline, states
            await asyncio.sleep(0.05)
            states = {info.state async for info in store.list()}


async def test_close_cancelled_at_any_step_closes_the_connections(dsn, tables):
    ours = make_conninfo(dsn, application_name="cancelled close")
    with psycopg.connect(dsn, autocommit=True) as admin:
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cancelled close'"
        for steps in range(8):
            store = AsyncPostgresStreamStore(ours, **tables, notify=False)
            await store.append(await store.create(), "x")
            closing = asyncio.create_task(store.close())
            for _ in range(steps):
                await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            if steps:  # else it has not begun
                await async_until(lambda: admin.execute(sessions).fetchone() == (0,))
            await store.close()


async def test_notifier_continues_after_its_task_was_cancelled(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store, AsyncPostgresStreamStore(dsn, **tables) as other:
        id = await store.create()
        for _ in range(5):
            for _ in range(20):  # so many that some changes are pending
                await store.append(id, "x")
            for task in asyncio.all_tasks():
                if task.get_name() == "aibind_postgres-notifier":
                    task.cancel()
            await asyncio.sleep(0)
        before = (await store.get_status(id)).total_chunks

        async def follow():
            return [time.monotonic() async for chunk in other.read_from(id, before)]

        reading = asyncio.create_task(follow())
        await async_until(lambda: "aibind_postgres-listener" in async_workers())
        await store.append(id, "x")
        await async_until(lambda: "aibind_postgres-notifier" in async_workers())
        await store.complete(id)
        assert len(await asyncio.wait_for(reading, 20)) == 1


@pytest.mark.parametrize("texts", [0, 1], ids=["before the first text", "after the first text"])
async def test_cancelled_plain_text_closes_a_silent_source(texts):
    log = []

    async def generate(generation):
        try:
            for _ in range(texts):
                yield "a"
            log.append("silent")
            await asyncio.Event().wait()
        finally:
            log.append("closed")

    async def respond():
        response = await handler.handle(request)
        async for _ in response.body:
            pass

    request = WebRequest("POST", "/__aibind__/complete", {}, {"content-type": "application/json"}, b'{"input": "x"}')
    async with AsyncPostgresStreamStore("") as store:
        handler = AsyncStreamHandler(generate, store=store)
        responding = asyncio.create_task(respond())
        await async_until(lambda: log == ["silent"])
        responding.cancel()
        await async_until(lambda: log == ["silent", "closed"])
        await async_until(lambda: not any("plain-text" in name for name in async_workers()))
