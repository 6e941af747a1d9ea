"""Streams that a program still produces when it ends, and producers in a forked process."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool
from support.concurrency import async_workers, until, workers
from support.lifecycles import in_a_child, run_to_the_end

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    DurableStream,
    ForkedError,
    PostgresStreamStore,
    _subscriptions,
)
from aibind_postgres._sync import producing
from aibind_postgres._sync.producing import Producer

PROGRAM = """
import sys, threading
from aibind_postgres import DurableStream, PostgresStreamStore
from aibind_postgres._sync import producing

producing.SHUTDOWN_GRACE = 20.0  # the machine may be busy
store = PostgresStreamStore(sys.argv[1])
blocked = threading.Event()

def source():
    yield "half"
    blocked.set()
    threading.Event().wait()

def finish(text, status):
    print(text, status.state, flush=True)

DurableStream.start(store, source(), id="s", on_finish=finish)
blocked.wait()
list(zip(range(1), store.read_from("s")))
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError", "store.close()"])
def test_end_of_the_program_ends_its_streams(database, end):
    exit_code, output, errors = run_to_the_end(PROGRAM.replace("{end}", end), database)
    assert output == "half error\n", errors
    assert exit_code == {"sys.exit(3)": 3, "raise ValueError": 1}.get(end, 0)
    with PostgresStreamStore(database) as store:
        assert store.get_status("s") == ("error", "the answer was interrupted", 1)


FIRST_FAILS = """
def no_thread(*args, **options):
    raise RuntimeError("can't start new thread")

spawn, producing.spawn = producing.spawn, no_thread
try:
    DurableStream.start(store, iter(["never"]))
except RuntimeError:
    pass
producing.spawn = spawn
blocked = threading.Event()
"""


def test_end_of_the_program_ends_its_streams_if_the_first_one_did_not_start(database):
    program = PROGRAM.replace("blocked = threading.Event()\n", FIRST_FAILS).replace("{end}", "")
    exit_code, output, errors = run_to_the_end(program, database)
    assert (exit_code, output) == (0, "half error\n"), errors


class CountingMutex:
    """A mutex that counts how often it was taken."""

    def __init__(self):
        self.taken = 0
        self._lock = threading.Lock()

    def __enter__(self):
        self._lock.acquire()
        self.taken += 1

    def __exit__(self, *error):
        self._lock.release()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_child_has_no_producers(database, monkeypatch):
    release, registry_mutex = threading.Event(), CountingMutex()
    with monkeypatch.context() as patch:
        patch.setattr(producing, "Mutex", lambda: registry_mutex)
        Producer.forget_all()  # which replaces the mutex of the registry

    def source():
        yield "half"
        release.wait()

    with PostgresStreamStore(database) as store:
        stream = DurableStream.start(store, source())
        next(store.read_from(stream.id))
        assert registry_mutex.taken
        with registry_mutex:  # held by another thread at the moment of the fork
            assert in_a_child(lambda: (len(Producer.running()), DurableStream.shutdown(store, 20))) == "(0, True)"
        assert [producer.stream_id for producer in Producer.running(store)] == [stream.id]
        release.set()
        assert stream.wait(20).state == "done"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_writer_of_a_forked_child_raises_and_starts_no_worker(database, monkeypatch):
    mutex = CountingMutex()
    with monkeypatch.context() as patch:
        patch.setattr(_subscriptions, "Lock", lambda: mutex)
        store = PostgresStreamStore(database)
    id = store.create()

    def enter_writer():
        with pytest.raises(ForkedError), store.writer(id):
            pass
        return workers()

    with store:
        with pytest.raises(TimeoutError):
            store.wait(id, 0)
        assert mutex.taken
        with mutex:  # held by another thread at the moment of the fork
            assert in_a_child(enter_writer) == "[]"


async def test_writer_of_another_event_loop_raises_and_starts_no_worker(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        id = await store.create()

        async def enter_writer():
            with pytest.raises(RuntimeError, match="different event loop"):
                async with store.writer(id):
                    pass
            return async_workers()

        assert await asyncio.to_thread(asyncio.run, enter_writer()) == []


@pytest.mark.parametrize("worker", ["producer", "listener", "writer", ""])
def test_start_without_a_thread_ends_the_stream(database, monkeypatch, worker):
    start, closed, finished = threading.Thread.start, [], []

    class Source:
        def __iter__(self):
            raise AssertionError("the source must not be read")

        def close(self):
            closed.append(True)

    def refuse(thread):
        if thread.name.startswith(f"aibind_postgres-{worker}"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with PostgresStreamStore(database) as store:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with nullcontext() if worker == "writer" else pytest.raises(RuntimeError, match="can't start new thread"):
                DurableStream.start(store, Source(), id="s", on_finish=lambda *call: finished.append(call))
            until(lambda: finished)
        assert finished == [("", ("error", "the answer was interrupted", 0))]
        assert closed == [True]
        assert store.get_status("s") == ("error", "the answer was interrupted", 0)
        assert DurableStream.shutdown(store, 0) is True
    assert workers() == []


class CancellingClient:
    """A client that cancels new producers right after a stream was created, before they begin."""

    def __init__(self, pool):
        self._pool = pool
        self.cancelled = 0

    async def query(self, sql, params):
        async with self._pool.connection() as connection:
            cursor = await psycopg.AsyncRawCursor(connection).execute(sql, params)
            rows = await cursor.fetchall()
        if "INSERT" in sql:
            asyncio.get_running_loop().call_soon(self.cancel_producers)
        return rows

    def cancel_producers(self):
        for task in asyncio.all_tasks():
            if task.get_name() == "aibind_postgres-producer":
                self.cancelled += task.cancel()


async def test_shutdown_ends_a_producer_that_was_cancelled_before_it_began(dsn, tables):
    closed, calls = [], []

    class Source:
        def __aiter__(self):
            raise AssertionError("the source must not be read")

        def close(self):
            closed.append(True)

    async with AsyncConnectionPool(dsn, kwargs={"autocommit": True}, min_size=1, open=False) as pool:
        client = CancellingClient(pool)
        async with AsyncPostgresStreamStore(client, **tables) as store:
            stream = await AsyncDurableStream.start(store, Source(), on_finish=lambda *call: calls.append(call))
            assert await AsyncDurableStream.shutdown(store, 0) is False
            assert await store.get_status(stream.id) == ("error", "the answer was interrupted", 0)
            assert await AsyncDurableStream.shutdown(store, 0) is True
    assert client.cancelled == 1
    assert closed == [True]
    assert calls == [("", ("error", "the answer was interrupted", 0))]


def test_end_of_an_event_loop_closes_the_connections(dsn, tables):
    async def use():
        await store.append(await store.create(), "a")

    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'a loop'"
    store = AsyncPostgresStreamStore(make_conninfo(dsn, application_name="a loop"), **tables)
    asyncio.run(use())
    with psycopg.connect(dsn, autocommit=True) as observer:
        until(lambda: observer.execute(query).fetchone() == (0,))
    assert repr(store).endswith(", open>")  # the store still refers to the pool
