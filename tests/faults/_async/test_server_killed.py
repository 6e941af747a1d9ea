"""A server that is killed under load: each acknowledged chunk is stored once, and each reader gets it once.

Writers repeat each call until it succeeds, so in the end exactly the acknowledged chunks are stored.
"""

from __future__ import annotations

import random
from functools import partial

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support.concurrency import async_gather, async_sleep, async_workers
from support.server_killer import ServerKiller

from aibind_postgres import AsyncPostgresConversationStore, AsyncPostgresStreamStore, SequenceConflictError

SEED = 5
RETRY_FOR = 300  # seconds, much longer than the server is ever down
MESSAGES = 20  # messages that each worker adds to one conversation

pytestmark = pytest.mark.timeout(600)


async def retry(call, losses):
    """Repeat a call until it raises no connection error, and collect these errors in `losses`."""
    while True:
        try:
            return await call()
        except psycopg.OperationalError as error:
            losses.append(error)
            await async_sleep(0.05)


async def append_each(store, id, name, log, killer, losses):
    seq = 1
    while not killer.is_done:
        text = f"{name}/{len(log)}"
        try:
            seq = await retry(partial(store.append, id, text, expected_seq=seq), losses)
        except SequenceConflictError as conflict:  # another writer used this number
            seq = conflict.actual
        else:
            log.append((seq, text))
            seq += 1


async def append_batches(store, id, name, log, killer, losses):
    rng = random.Random(f"{SEED} {name}")
    seq = 1
    while not killer.is_done:
        texts = [f"{name}/{len(log) + offset}" for offset in range(rng.randint(2, 20))]
        try:
            last = await retry(partial(store.append_many, id, texts, expected_seq=seq), losses)
        except SequenceConflictError as conflict:
            seq = conflict.actual
        else:
            log += zip(range(seq, last + 1), texts, strict=True)
            seq = last + 1


async def write(store, id, name, log, killer, losses):
    rng = random.Random(f"{SEED} {name}")
    texts = []
    async with store.writer(id) as writer:
        while not killer.is_done:
            for _ in range(rng.randint(1, 20)):
                texts.append(f"{name}/{len(texts)}")
                await writer.write(texts[-1])
            if rng.random() < 0.5:
                last = await writer.flush()
                assert last == len(texts)
                log += zip(range(len(log) + 1, last + 1), texts[len(log) :], strict=True)
    log += enumerate(texts[len(log) :], len(log) + 1)


async def follow(store, id, name, log):
    async for chunk in store.read_from(id):
        log.append(tuple(chunk))


async def resume(store, id, name, log):
    """Read some chunks, leave the loop, and resume after the last chunk."""
    rng = random.Random(f"{SEED} {name}")
    left_early = True
    while left_early:
        left_early = False
        enough = len(log) + rng.randint(1, 100)
        async for chunk in store.read_from(id, log[-1][0] if log else 0):
            log.append(tuple(chunk))
            if len(log) == enough:
                left_early = True
                break


WRITERS = [
    (append_each, "shared"),
    (append_each, "shared"),
    (append_batches, "shared"),
    (append_each, "appended to"),
    (append_batches, "of batches"),
    (write, "of a writer"),
    (write, "of another writer"),
    (write, "of a third writer"),
]
READERS = [
    (follow, "shared"),
    (resume, "shared"),
    (resume, "appended to"),
    (follow, "of batches"),
    (follow, "of a writer"),
    (resume, "of a writer"),
    (resume, "of another writer"),
    (follow, "of a third writer"),
]
STREAMS = {id for _, id in WRITERS}


def named(workers):
    return {f"{call.__name__} {number}": (call, id) for number, (call, id) in enumerate(workers)}


async def test_killed_server_neither_loses_nor_repeats_chunks(disposable_server, long):
    writers, readers = named(WRITERS), named(READERS)
    written = {name: [] for name in writers}
    read = {name: [] for name in readers}
    losses = []
    # The writers use `store`, so its readers get chunks directly. The readers of `other` get them by notifications.
    async with (
        AsyncPostgresStreamStore(disposable_server.dsn, retry_for=RETRY_FOR) as store,
        AsyncPostgresStreamStore(disposable_server.dsn, retry_for=RETRY_FOR) as other,
    ):
        for id in STREAMS:
            await store.create(id)
        with ServerKiller(disposable_server, 20 if long else 2, {**written, **read}, losses, SEED) as killer:
            writing = [
                partial(call, store, id, name, written[name], killer, losses) for name, (call, id) in writers.items()
            ]
            reading = [
                partial(call, (store, other)[number % 2], id, name, read[name])
                for number, (name, (call, id)) in enumerate(readers.items())
            ]

            async def write_and_end():
                try:
                    await async_gather(*writing)
                finally:
                    for id in STREAMS:
                        await store.complete(id)

            await async_gather(write_and_end, *reading)
    assert async_workers() == []
    print(f"{killer.kills} kills, {len(losses)} lost calls, {sum(map(len, written.values()))} acknowledged chunks")
    assert losses, "no kill interrupted a call"
    async with await psycopg.AsyncConnection.connect(disposable_server.dsn) as connection:
        for id in STREAMS:
            statement = "SELECT seq, data FROM aibind_stream_chunks WHERE id = %s ORDER BY seq"
            stored = await (await connection.execute(statement, [id])).fetchall()
            assert [seq for seq, _ in stored] == list(range(1, len(stored) + 1)), id
            assert stored == sorted(chunk for name in writers if writers[name][1] == id for chunk in written[name]), id
            for name in readers:
                assert readers[name][1] != id or read[name] == stored, name
            statement = "SELECT state, total_chunks FROM aibind_stream_status WHERE id = %s"
            assert await (await connection.execute(statement, [id])).fetchone() == ("done", len(stored))


async def keep_and_save(store, name, log, killer, losses):
    """Load a conversation once, and save it after each message."""
    while not killer.is_done:
        session_id = f"conversation {len(log) // MESSAGES}"
        chat = await retry(partial(store.load, session_id), losses)
        for _ in range(MESSAGES):
            message = f"{name}/{len(log)}"
            node_id = chat.append(message)
            await retry(partial(store.save, session_id, chat), losses)
            log.append((session_id, node_id, message))


async def load_and_save(store, name, log, killer, losses):
    """Load and save the conversation for each message."""
    while not killer.is_done:
        session_id = f"conversation {len(log) // MESSAGES}"
        chat = await retry(partial(store.load, session_id), losses)
        message = f"{name}/{len(log)}"
        node_id = chat.append(message)
        await retry(partial(store.save, session_id, chat), losses)
        log.append((session_id, node_id, message))


async def test_killed_server_loses_no_message(disposable_server, long):
    losses = []
    async with (
        AsyncPostgresConversationStore(disposable_server.dsn) as store,
        AsyncPostgresConversationStore(disposable_server.dsn) as other,
    ):
        workers = {
            f"{call.__name__} {number}": partial(call, (store, other)[number % 2])
            for number in range(4)
            for call in (keep_and_save, load_and_save)
        }
        written = {name: [] for name in workers}
        with ServerKiller(disposable_server, 20 if long else 2, written, losses, SEED) as killer:
            await async_gather(*(partial(work, name, written[name], killer, losses) for name, work in workers.items()))
        acknowledged = sorted(entry for log in written.values() for entry in log)
        stored = []
        async for info in store.list():
            chat = await other.load(info.session_id)
            nodes = chat.tree.serialize()["nodes"]
            stored += [(info.session_id, node_id, node["message"]) for node_id, node in nodes.items()]
    print(f"{killer.kills} kills, {len(losses)} lost calls, {len(acknowledged)} acknowledged messages")
    assert losses, "no kill interrupted a call"
    assert sorted(stored) == acknowledged


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_dead_pool_connections_are_not_used_after_a_restart(disposable_server, how):
    async with (
        AsyncConnectionPool(
            disposable_server.dsn, kwargs={"autocommit": True}, min_size=5, timeout=30, open=False
        ) as pool,
        AsyncPostgresStreamStore(pool) as store,
    ):
        await pool.wait()
        id = await store.create()
        getattr(disposable_server, how)()
        disposable_server.start()
        assert [await store.append(id, "a") for _ in range(10)] == list(range(1, 11))
