"""Exhausted resources: too few connections, pools that close early, full disks. Calls raise, and recover afterwards."""

from __future__ import annotations

import math
import secrets
from functools import partial

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until
from support.exhaustion import FullDisk, SmallDisk, fill_up, limit_connections

from aibind_postgres import (
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    ChatHistory,
    StoreClosedError,
    StreamWriteError,
)

CALLERS = 100
HANG = 90  # seconds after which a call counts as hanging


async def texts(store, id):
    return [chunk.data async for chunk in store.read_from(id, follow=False)]


async def read_to_the_end(store, id):
    return [tuple(chunk) async for chunk in store.read_from(id)]


async def retry(call):
    """Repeat a call until it raises no error of the driver."""
    while True:
        try:
            return await call()
        except psycopg.OperationalError:
            await async_sleep(0.05)


@pytest.mark.parametrize("autocommit", [True, False])
async def test_pool_of_one_serves_a_hundred_callers(dsn, tables, conversations, long, autocommit):
    rounds = 50 if long else 2
    options = {"min_size": 1, "max_size": 1, "timeout": HANG, "kwargs": {"autocommit": autocommit}, "open": False}
    async with AsyncConnectionPool(dsn, **options) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store:
            chats = AsyncPostgresConversationStore(pool, table=conversations)
            ids = [await store.create() for _ in range(5)]
            live = await store.create()
            acknowledged = {id: [] for id in ids}

            async def append(number, rnd):
                id = ids[number % 5]
                seq = await store.append(id, f"{rnd}/{number}")
                acknowledged[id].append((seq, f"{rnd}/{number}"))

            async def read(number, rnd):
                assert len(await texts(store, ids[number % 5])) <= (rnd + 1) * CALLERS

            async def save(number, rnd):
                async with chats.edit(f"session {number % 10}") as chat:
                    chat.append({"by": f"{rnd}/{number}"})

            async def write():
                async with store.writer(live, max_chunks=10) as writer:
                    for number in range(rounds * CALLERS):
                        await writer.write(f"{number}")

            kinds = [append, read, save]
            readers = [partial(read_to_the_end, store, id) for id in [live] * 5 + ids]
            async with AsyncBackground(partial(async_gather, *readers)) as reading:
                async with AsyncBackground(write) as writing:
                    for rnd in range(rounds):
                        await async_gather(*(partial(kinds[number % 3], number, rnd) for number in range(CALLERS)))
                    await writing.result(HANG)
                for id in ids:
                    await store.complete(id)
                seen = await reading.result(HANG)
            assert seen[:5] == [[(number + 1, f"{number}") for number in range(rounds * CALLERS)]] * 5
            # Each caller appends to one stream only, so each list is complete.
            assert [sorted(acknowledged[id]) for id in ids] == seen[5:]
            assert sum(map(len, seen[5:])) == rounds * len(range(0, CALLERS, 3))
            saved = [node["by"] for number in range(10) for node in messages(await chats.load(f"session {number}"))]
            assert sorted(saved) == sorted(f"{rnd}/{n}" for rnd in range(rounds) for n in range(2, CALLERS, 3))


def messages(chat):
    return [node["message"] for node in chat.tree.serialize()["nodes"].values()]


@pytest.mark.parametrize("closed", ["pool", "store"])
async def test_close_during_calls_keeps_acknowledged_chunks(dsn, tables, long, closed):
    async with AsyncPostgresStreamStore(dsn, **tables) as observer:
        for rnd in range(40 if long else 4):
            id, live = await observer.create(), await observer.create()
            pool = AsyncConnectionPool(dsn, min_size=1, max_size=2, timeout=HANG, open=False)
            await pool.open()
            store = AsyncPostgresStreamStore(pool if closed == "pool" else dsn, **tables, retry_for=HANG)
            acknowledged, results, flushed = [], [], []

            async def append(worker, store=store, id=id, acknowledged=acknowledged):
                number = 0
                while True:
                    number += 1
                    acknowledged.append((await store.append(id, f"{worker}/{number}"), f"{worker}/{number}"))

            async def write(store=store, live=live, flushed=flushed):
                async with store.writer(live) as writer:
                    while True:
                        await writer.write("x")
                        flushed.append(await writer.flush())

            async def count(store=store, id=id):
                return len(await read_to_the_end(store, id))

            calls = [partial(append, worker) for worker in range(20)] + [count] * 5 + [partial(store.wait, id)] * 5
            everything = partial(async_gather, *calls, write, errors=True)
            async with AsyncBackground(everything) as working:
                await async_until(lambda flushed=flushed, done=acknowledged: flushed and len(done) > 20)
                await async_sleep(0.001 * rnd)
                await (pool if closed == "pool" else store).close()
                results = await working.result(HANG)
            *errors, writer_error = results
            expected = psycopg.OperationalError if closed == "pool" else StoreClosedError
            assert [error for error in errors if not isinstance(error, expected)] == []
            assert isinstance(writer_error, (StreamWriteError, expected)), writer_error
            if isinstance(writer_error, StreamWriteError):
                assert flushed[-1] == writer_error.durable
            await store.close()
            await pool.close()
            stored = [tuple(chunk) async for chunk in observer.read_from(id, follow=False)]
            assert [seq for seq, _ in stored] == list(range(1, len(stored) + 1))
            assert set(acknowledged) <= set(stored)
            assert len({text for _, text in stored}) == len(stored)
            assert len(await texts(observer, live)) in (flushed[-1], flushed[-1] + 1)


async def test_recovery_from_too_many_connections(disposable_server, long):
    limit_connections(disposable_server, 10)
    async with AsyncPostgresStreamStore(disposable_server.dsn, retry_for=HANG) as store:
        for _ in range(3 if long else 1):
            id, other = await store.create(), await store.create()

            async def append(number, store=store, other=other):
                await store.append(other, f"{number}")

            async with AsyncBackground(partial(read_to_the_end, store, id)) as reading:
                async with store.writer(id) as writer:
                    await writer.write("before")
                    await writer.flush()
                    with fill_up(disposable_server.dsn) as take_all:
                        # The store still has its open connections.
                        await async_gather(*(partial(append, number) for number in range(CALLERS)))
                        take_all()
                        for number in range(10):
                            await writer.write(f"meanwhile {number}")
                        with pytest.raises(psycopg.OperationalError):
                            await store.append(id, "refused")
                        async with AsyncPostgresStreamStore(disposable_server.dsn) as late:
                            with pytest.raises(psycopg.OperationalError, match="too many clients"):
                                await late.create()
                    await retry(partial(store.get_status, other))
                    # A new store can connect again.
                    async with AsyncPostgresStreamStore(disposable_server.dsn) as late:
                        assert len(await texts(late, other)) == CALLERS
                seen = await reading.result(HANG)
            expected = ["before", *(f"meanwhile {number}" for number in range(10))]
            assert seen == list(enumerate(expected, 1))


async def test_idle_store_returns_its_connections(disposable_server):
    limit_connections(disposable_server, 8)
    async with AsyncPostgresStreamStore(disposable_server.dsn) as busy:
        while True:
            errors = await async_gather(*[partial(busy.get_status, "a")] * CALLERS, errors=True)
            assert [error for error in errors if isinstance(error, BaseException)] == []
            try:
                await (await psycopg.AsyncConnection.connect(disposable_server.dsn)).close()
            except psycopg.OperationalError:  # the store has all connections
                break
        async with AsyncPostgresStreamStore(disposable_server.dsn) as late:
            async with AsyncBackground(partial(retry, late.create)) as creating:
                assert await creating.result(HANG)


@pytest.mark.parametrize("retry_for", [0.2, HANG])
async def test_recovery_from_a_full_disk(dsn, tables, conversations, schema_name, long, retry_for):
    disk = FullDisk(dsn, schema_name, [*tables.values(), conversations])
    chats = AsyncPostgresConversationStore(dsn, table=conversations)
    async with AsyncPostgresStreamStore(dsn, **tables, retry_for=retry_for) as store, chats:
        for _ in range(10 if long else 1):
            id, live = await store.create(), await store.create()
            chat = ChatHistory()
            chat.append({"text": "stored"})
            await chats.save("session", chat, on_conflict="overwrite")
            stored = chat.to_json()
            chat.append({"text": "not yet"})

            async def append(number, store=store, id=id):
                return await store.append(id, f"{number}")

            async def write(disk=disk, store=store, live=live):
                async with store.writer(live) as writer:
                    await writer.write("1")
                    await writer.flush()
                    disk.fill()
                    for number in range(2, 12):
                        await writer.write(f"{number}")
                    await writer.flush()

            async with AsyncBackground(partial(read_to_the_end, store, live)) as reading:
                async with AsyncBackground(write) as writing:
                    await async_until(lambda: disk.is_full)
                    calls = [partial(append, number) for number in range(CALLERS)]
                    many = partial(store.append_many, id, ["a", "b"])
                    calls += [many, store.create, partial(store.stop, id), partial(chats.save, "session", chat)]
                    errors = await async_gather(*calls, errors=True)
                    assert [error for error in errors if not isinstance(error, psycopg.errors.DiskFull)] == []
                    # Reading still works.
                    assert await texts(store, id) == []
                    assert (await chats.load("session")).to_json() == stored
                    if retry_for < HANG:
                        with pytest.raises(StreamWriteError) as caught:
                            await writing.result(HANG)
                        assert (caught.value.durable, caught.value.unsaved) == (1, 10)
                        assert isinstance(caught.value.__cause__, psycopg.errors.DiskFull)
                        assert await texts(store, live) == ["1"]
                    disk.free()
                    if retry_for == HANG:
                        await writing.result(HANG)
                    else:  # the writer could not end its stream
                        await store.fail(live, "disk full")
                seen = await reading.result(HANG)
            assert [text for _, text in seen] == [f"{n}" for n in range(1, 12 if retry_for == HANG else 2)]
            assert sorted(await async_gather(*(partial(append, n) for n in range(CALLERS)))) == [*range(1, CALLERS + 1)]
            await chats.save("session", chat)
            assert (await chats.load("session")).to_json() == chat.to_json() != stored


@pytest.fixture
def small_disk(disposable_server):
    disk = SmallDisk(disposable_server)
    yield disk
    disposable_server.stop("immediate")
    disk.close()


async def test_real_disk_runs_full_and_grows(disposable_server, small_disk):
    async with AsyncPostgresStreamStore(disposable_server.dsn, retry_for=0.2) as store:
        ids = [await store.create() for _ in range(4)]
        acknowledged = {id: [] for id in ids}

        async def append(id, at_least=math.inf):
            while len(acknowledged[id]) < at_least:
                text = secrets.token_hex(10_000)  # random: cannot be compressed much
                assert await store.append(id, text) == len(acknowledged[id]) + 1
                acknowledged[id].append(text)

        errors = await async_gather(*(partial(append, id) for id in ids), errors=True)
        assert {type(error) for error in errors} == {psycopg.errors.DiskFull}
        written = [secrets.token_hex(100_000) for _ in range(20)]
        with pytest.raises(StreamWriteError) as caught:
            async with store.writer(ids[0]) as writer:
                for text in written:
                    await writer.write(text)
        assert isinstance(caught.value.__cause__, psycopg.errors.DiskFull)
        acknowledged[ids[0]] += written[: caught.value.durable - len(acknowledged[ids[0]])]
        for id in ids:
            assert await texts(store, id) == acknowledged[id]
        small_disk.grow()
        total = max(map(len, acknowledged.values())) + 20
        await async_gather(*(partial(append, id, total) for id in ids[1:]))
        for id in ids:
            assert await texts(store, id) == acknowledged[id]
        assert min(len(acknowledged[id]) for id in ids[1:]) == total
