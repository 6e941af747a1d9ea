"""Many chats over a long time, with a server restart: objects, memory, threads and connections return to the start."""

from __future__ import annotations

import gc
import os
import threading
from functools import partial
from pathlib import Path
from random import Random
from time import monotonic

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support.concurrency import async_gather, async_sleep, async_workers
from support.leaks import PER_CONNECTION, package_objects

from aibind_postgres import AsyncPostgresStreamStore, StreamNotFoundError

CHATS = 200
READERS = 2  # readers of each chat
MAX_REMAINING_OBJECTS = 12  # objects of the package that may be left in addition to those of a new store
MAX_GROWTH = 16 * 2**20  # bytes of memory between the first quarter and the end

pytestmark = pytest.mark.timeout(900)


def resident():
    """Return the resident memory of this process in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sessions(dsn):
    """Count the sessions of the store on the server."""
    with psycopg.connect(dsn) as connection:
        statement = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'soak'"
        return connection.execute(statement).fetchone()[0]


async def retry(call):
    """Repeat a call until the server is up."""
    while True:
        try:
            return await call()
        except psycopg.OperationalError:
            await async_sleep(0.2)


async def test_chats_and_a_restart_leave_nothing_behind(disposable_server, long):
    seconds = 600 if long else 30
    started_at = monotonic()
    threads = threading.active_count()
    store = AsyncPostgresStreamStore(
        make_conninfo(disposable_server.dsn, application_name="soak"), ttl=10, retry_for=60
    )
    await store.get_info("missing")  # the store keeps the columns of its tables
    before = package_objects()  # smaller leaks than the noise of the resident memory show here
    rng = Random(7)
    pauses = [rng.uniform(0.05, 0.2) for _ in range(CHATS)]
    memory, streams = [], []

    def time_left():
        return started_at + seconds - monotonic()

    async def produce(stream, pause):
        async with store.writer(stream) as writer:
            for number in range(1, 31):
                await writer.write(f"{stream} {number}")
                await async_sleep(pause)

    async def follow(stream):
        seen = [chunk async for chunk in store.read_from(stream)]
        assert seen == [(number, f"{stream} {number}") for number in range(1, 31)]

    async def chat(number):
        turn = 0
        while time_left() > 0:
            turn += 1
            stream = f"chat {number} turn {turn}"
            await retry(partial(store.acquire, stream))
            readers = [partial(follow, stream)] * READERS
            await async_gather(partial(produce, stream, pauses[number]), *readers)
            streams.append(stream)

    async def clean():
        while time_left() > 0:
            await retry(store.cleanup)
            if not memory and time_left() < 0.75 * seconds:
                memory.append(resident())
            await async_sleep(1)

    async def restart():
        await async_sleep(seconds / 2)
        disposable_server.stop("fast")
        await async_sleep(1)
        disposable_server.start()

    await async_gather(*(partial(chat, number) for number in range(CHATS)), clean, restart)
    memory.append(resident())
    assert len(set(streams)) == len(streams) >= CHATS
    assert sessions(disposable_server.dsn) <= 11  # ten of the pool, one of the listener
    for _ in range(100):  # the store drops ended readers when another one starts
        with pytest.raises(StreamNotFoundError):
            await store.wait("missing")
        remaining = package_objects(except_for=PER_CONNECTION) - before
        if sum(remaining.values()) <= MAX_REMAINING_OBJECTS:
            break
        await async_sleep(0.1)
    assert sum(remaining.values()) <= MAX_REMAINING_OBJECTS, remaining
    with psycopg.connect(disposable_server.dsn) as connection:
        connection.execute("UPDATE aibind_stream_status SET expires_at = 0")
    await store.cleanup()
    assert [info async for info in store.list()] == []
    await store.close()
    assert async_workers() == []
    for _ in range(100):
        if sessions(disposable_server.dsn) == 0 and threading.active_count() <= threads:
            break
        await async_sleep(0.1)
    assert (sessions(disposable_server.dsn), threading.active_count()) == (0, threads)
    # pytest keeps the log records of the pool, which refer to the connections that the restart has broken.
    remaining = package_objects(except_for=PER_CONNECTION) - before
    assert sum(remaining.values()) <= MAX_REMAINING_OBJECTS, remaining
    assert memory[1] - memory[0] < MAX_GROWTH, memory
