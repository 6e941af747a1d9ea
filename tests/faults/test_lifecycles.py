"""Stores after a fork, at interpreter exit and at the end of an event loop."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from functools import partial

import psycopg
import pytest
from psycopg_pool import ConnectionPool
from support.concurrency import until, workers
from support.leaks import package_objects
from support.lifecycles import in_a_child, run_to_the_end

from aibind_postgres import (
    AibindError,
    AsyncPostgresStreamStore,
    ChatHistory,
    Housekeeper,
    PostgresConversationStore,
    PostgresStreamStore,
)

CHUNKS = 200
USES = ["unused", "used", "reading", "busy"]

# psycopg, its pools and Python from 3.12 on warn if a process with threads forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@contextmanager
def client_of(kind, dsn):
    """Yield a client for a store."""
    if kind == "string":
        yield dsn
    elif kind == "pool":
        with ConnectionPool(dsn, min_size=2, max_size=4, open=True) as pool:
            pool.wait()
            yield pool
    elif kind == "closed pool":
        pool = ConnectionPool(dsn, min_size=1, max_size=4, open=False)
        yield pool
        pool.close()
    else:
        with psycopg.connect(dsn, autocommit=True) as connection:
            yield connection


@contextmanager
def in_use(store, use):
    """Use a store while the block runs: not at all, before it, with a waiting reader, or with a reader and writers."""
    if use == "unused":
        yield
        return
    id = store.create()
    finished = threading.Event()
    seen = []

    def read():
        seen.extend(store.read_from(id))

    def append():
        while not finished.is_set():
            store.append(id, "x")

    calls = {"used": [], "reading": [read], "busy": [read, append, append]}[use]
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads[:1]:
        thread.start()
        until(lambda: "aibind_postgres-listener" in workers())  # then the reader waits
    for thread in threads[1:]:
        thread.start()
    if threads[1:]:
        until(lambda: seen)
    try:
        yield
    finally:
        finished.set()
        for thread in threads[1:]:
            thread.join(60)
        store.complete(id)
        for thread in threads[:1]:
            thread.join(60)
    assert not threads or [seq for seq, _ in seen] == [*range(1, store.get_status(id).total_chunks + 1)]


def was_refused(call):
    """Return whether a call raised the error for forked processes."""
    try:
        call()
    except AibindError as refusal:
        if "process" not in str(refusal):
            raise
        return True
    return False


# A single connection serves one thread.
KINDS = [(kind, use) for kind in ("string", "pool", "closed pool") for use in USES]
KINDS += [("connection", use) for use in USES if use not in ("reading", "busy")]


@pytest.mark.parametrize(("kind", "use"), KINDS)
def test_store_in_a_forked_process_works_or_raises(dsn, tables, long, kind, use):
    for rnd in range(10 if long else 1):
        child_id = f"child {rnd}"
        with client_of(kind, dsn) as client, PostgresStreamStore(client, **tables) as store:
            if kind == "closed pool" and use != "unused":
                client.open()

            def child(store=store, client=client, child_id=child_id):
                if kind == "closed pool" and use == "unused":
                    client.open()
                calls = [partial(store.create, child_id)]
                calls += [partial(store.append, child_id, f"{number}") for number in range(20)]
                calls += [lambda: list(store.read_from(child_id, follow=False)), partial(write, store, child_id)]
                calls += [partial(store.wait, child_id, 60)]
                [refused] = {was_refused(call) for call in calls}
                store.close()
                return refused

            def work(store=store, client=client):
                if kind == "closed pool":
                    client.open()
                id = store.create()
                for number in range(CHUNKS):
                    assert store.append(id, f"{number}", expected_seq=number + 1) == number + 1
                    assert store.get_status(id) == ("active", None, number + 1)

            with in_use(store, use):
                refused = in_a_child(child, work) == "True"
                work()  # again, after the child has ended
        with PostgresStreamStore(dsn, **tables) as other:
            assert other.get_status(child_id) == (None if refused else ("done", None, 40))
        # gunicorn with `preload` forks before the first connection: that must work.
        assert not (refused and use == "unused" and kind in ("string", "closed pool"))


def write(store, id):
    with store.writer(id) as writer:
        for number in range(20):
            writer.write(f"{number}")


def test_readers_and_writers_of_the_parent_raise_in_a_child(dsn, tables):
    with PostgresStreamStore(dsn, **tables) as store:
        id = store.create()
        store.append(id, "a")
        reader = store.read_from(id)
        assert next(reader).data == "a"
        with store.writer(id) as writer:
            writer.write("b")
            writer.flush()

            def child():
                return [
                    was_refused(lambda: next(reader) and next(reader)),
                    was_refused(lambda: writer.write("c")),
                    was_refused(lambda: writer.flush()),
                ]

            assert in_a_child(child) == "[True, True, True]"
            writer.write("d")
        assert [chunk.data for chunk in reader] == ["b", "d"]


def test_conversation_store_in_a_forked_process_works_or_raises(dsn, conversations):
    with PostgresConversationStore(dsn, table=conversations) as store:
        chat = ChatHistory()
        chat.append({"by": "parent"})
        store.save("parent", chat)

        def child():
            for number in range(20):
                with store.edit("child") as chat:
                    chat.append({"by": number})
            assert len(store.load("child")) == 20

        refused = in_a_child(lambda: was_refused(child)) == "True"
        for _ in range(20):
            assert store.load("parent").to_json() == chat.to_json()
        assert len(store.load("child")) == (0 if refused else 20)


def test_forked_process_does_not_continue_a_housekeeper(dsn, tables):
    with PostgresStreamStore(dsn, **tables) as store:
        housekeeper = Housekeeper(store)

        def child():
            running = [name for name in workers() if "housekeeper" in name]
            housekeeper.close()
            return running, was_refused(housekeeper.start)

        housekeeper.start()
        assert in_a_child(child) == "([], True)"
        assert "aibind_postgres-housekeeper" in workers()
        housekeeper.close()
        assert "aibind_postgres-housekeeper" not in workers()


def test_housekeeper_that_was_made_before_a_fork_works_in_the_child(dsn, tables):
    with PostgresStreamStore(dsn, **tables, ttl=0.001) as store, PostgresStreamStore(dsn, **tables) as other:
        id = other.create()
        housekeeper = Housekeeper(store)

        def child():
            with housekeeper:
                store.complete(id)
                until(lambda: store.fail_abandoned(0) is not None)
                return [name for name in workers() if "housekeeper" in name]

        assert in_a_child(child) == "['aibind_postgres-housekeeper']"


@pytest.mark.parametrize("used", [False, True])
def test_asynchronous_store_in_a_forked_process_works_or_raises(dsn, tables, used):
    store = AsyncPostgresStreamStore(dsn, **tables)

    async def use(id):
        await store.acquire(id)
        for number in range(20):
            await store.append(id, f"{number}")
        assert (await store.get_status(id)).total_chunks % 20 == 0

    async def use_and_close(id):
        try:
            await use(id)
        finally:
            await store.close()

    def child():
        return was_refused(lambda: asyncio.run(use_and_close("child")))

    async def parent():
        await use("parent")
        refused = in_a_child(child)
        await use_and_close("parent")
        return refused

    refused = asyncio.run(parent()) if used else in_a_child(child)
    assert used or refused == "False"
    with PostgresStreamStore(dsn, **tables) as other:
        status = other.get_status("child")
        assert (None if status is None else status.total_chunks) == (None if refused == "True" else 20)
        assert not used or other.get_status("parent").total_chunks == 40


async def follow(store, id, seen):
    async for chunk in store.read_from(id):
        seen.append(chunk.data)


def test_store_serves_one_event_loop(dsn, tables):
    store = AsyncPostgresStreamStore(dsn, **tables)

    async def first():
        id = await store.create()
        return id, await store.writer(id).__aenter__()

    async def second(id, writer):
        calls = [
            store.create,
            partial(store.append, id, "b"),
            partial(store.get_status, id),
            partial(follow, store, id, []),
        ]
        calls += [store.writer(id).__aenter__, partial(writer.write, "b"), writer.flush, store.cleanup, store.close]
        for call in calls:
            with pytest.raises(RuntimeError, match="different event loop"):
                await call()

    asyncio.run(second(*asyncio.run(first())))


async def write_and_sleep(store, id):
    async with store.writer(id) as writer:
        await writer.write("b")
        await writer.flush()
        await asyncio.sleep(60)


def test_one_event_loop_after_another(dsn, tables, long):
    async def use(id):
        store = AsyncPostgresStreamStore(dsn, **tables)
        async with store:
            await store.create(id)
            seen = []
            reader = asyncio.create_task(follow(store, id, seen))
            async with store.writer(id) as writer:
                await writer.write("a")
            await asyncio.wait_for(reader, 20)
            assert seen == ["a"]
            # The loop ends, and the store is closed, while these calls run.
            await store.create(f"{id} interrupted")
            seen = []
            interrupted = [asyncio.create_task(follow(store, f"{id} interrupted", seen)) for _ in range(10)]
            interrupted += [asyncio.create_task(write_and_sleep(store, f"{id} interrupted"))]
            while len(seen) < 10:  # then each reader waits for the next chunk
                await asyncio.sleep(0.01)
        return interrupted

    for number in range(50 if long else 5):
        before = package_objects()
        interrupted = asyncio.run(asyncio.wait_for(use(f"stream {number}"), 40))
        assert all(task.done() for task in interrupted)
        for task in interrupted:
            assert task.cancelled() or task.exception() is not None
        del task, interrupted
        remaining = package_objects() - before
        assert not remaining


def test_event_loop_ends_while_the_pool_of_an_open_store_grows(dsn, tables, long):
    async def use():
        store = AsyncPostgresStreamStore(dsn, **tables)
        await asyncio.gather(*(store.get_status("nothing") for _ in range(20)))

    for _ in range(50 if long else 10):
        asyncio.run(use())


PROGRAM = """
import asyncio, sys, threading, time
from contextlib import suppress
from psycopg.sql import Identifier
from aibind_postgres import AsyncPostgresStreamStore, PostgresStreamStore, StoreClosedError

how, dsn, schema = sys.argv[1:]
options = {f"{kind}_table": Identifier(schema, kind) for kind in ("chunks", "status")}


def is_waiting():  # a store with a waiting reader has a listener
    return any(thread.name == "aibind_postgres-listener" for thread in threading.enumerate())


def end():
    print("end", flush=True)
    if "raise" in how:
        sys.exit(3)


def with_threads():
    store = PostgresStreamStore(dsn, **options)
    store.acquire("s")

    def read():
        with suppress(StoreClosedError):
            for chunk in store.read_from("s"):
                pass

    def write():
        with store.writer("s") as writer:
            writer.write("x")
            time.sleep(60)

    if "readers" in how:
        for _ in range(20):
            threading.Thread(target=read, daemon=True).start()
        while not is_waiting():
            time.sleep(0.01)
    if "writer" in how:
        threading.Thread(target=write, daemon=True).start()
    if "open block" in how:
        global kept_open
        kept_open = store.writer("s").__enter__()
        kept_open.write("x")
    if "open iterator" in how:
        kept_open = store.read_from("s")
        store.append("s", "x")
        next(kept_open)
    time.sleep(0.3)
    if "closed" in how:
        store.close()
    end()


async def with_tasks():
    store = AsyncPostgresStreamStore(dsn, **options)
    await store.acquire("s")

    async def read():
        async for chunk in store.read_from("s"):
            pass

    async def write():
        async with store.writer("s") as writer:
            await writer.write("x")
            await asyncio.sleep(60)

    tasks = []
    if "readers" in how:
        tasks += [asyncio.create_task(read()) for _ in range(20)]
    if "writer" in how:
        tasks += [asyncio.create_task(write())]
    if "open block" in how:
        global kept_open
        kept_open = await store.writer("s").__aenter__()
        await kept_open.write("x")
    if "open iterator" in how:
        kept_open = store.read_from("s")
        await store.append("s", "x")
        await anext(kept_open)
    await asyncio.sleep(0.3)
    if "closed" in how:
        await store.close()
        await asyncio.wait(tasks)
        for task in tasks:
            task.exception()
    end()


if "threads" in how:
    with_threads()
else:
    asyncio.run(with_tasks())
"""

SITUATIONS = [
    "readers",
    "writer",
    "readers and writer",
    "open block",
    "open iterator",
    "readers, raise",
    "readers, closed",
]


@pytest.mark.parametrize("kind", ["threads", "tasks"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_interpreter_exits_without_output(dsn, tables, schema_name, long, kind, situation):
    for _ in range(10 if long else 1):
        code, output, errors = run_to_the_end(PROGRAM, f"{kind}: {situation}", dsn, schema_name)
        assert (code, output, errors) == (3 if "raise" in situation else 0, "end\n", "")
        with PostgresStreamStore(dsn, **tables) as store:
            assert store.delete("s")
