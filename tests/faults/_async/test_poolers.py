"""PgBouncer that is restarted under load, or has no free session: no chunk is lost, and readers continue."""

from __future__ import annotations

from contextlib import ExitStack, asynccontextmanager
from functools import partial
from itertools import count
from time import monotonic

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool
from support import pgbouncer, proxy
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until, async_workers

from aibind_postgres import AsyncPostgresStreamStore

pytestmark = pytest.mark.skipif(
    pgbouncer.BINARY is None, reason="PgBouncer is not installed (Debian and Ubuntu: apt-get install pgbouncer)"
)

HANG = 60  # seconds after which the test counts as hanging

# Pools of applications, by the `kwargs` of their connections.
POOLS = {
    "pool": {},
    "pool that prepares at once": {"autocommit": True, "prepare_threshold": 0},
    "pool that prepares nothing": {"autocommit": True, "prepare_threshold": None},
}


class Pooler:
    """PgBouncer behind a proxy, so that its address stays the same after a restart."""

    def __init__(self, server, folder):
        self._server = server
        self._folder = folder
        self._running = ExitStack()
        self._address = self._running.enter_context(proxy.proxy(server.dsn))
        self.dsn = self._address.dsn
        self._start()

    def restart(self):
        self._address.refuse()
        self._process.close()
        self._start()
        self._address.heal()

    def _start(self):
        self._process = ExitStack()
        pooled_dsn = self._process.enter_context(pgbouncer.pgbouncer(self._server.dsn, self._folder))
        self._address.redirect(pooled_dsn)

    def close(self):
        self._process.close()
        self._running.close()


@pytest.fixture
def pooler(disposable_server, tmp_path):
    pooler = Pooler(disposable_server, tmp_path)
    yield pooler
    pooler.close()


@asynccontextmanager
async def store_for(client, dsn):
    if client == "connection string":
        async with AsyncPostgresStreamStore(dsn) as store:
            yield store
    else:
        async with (
            AsyncConnectionPool(dsn, kwargs=POOLS[client], min_size=2, max_size=8, timeout=5, open=False) as pool,
            AsyncPostgresStreamStore(pool) as store,
        ):
            yield store


class Load:
    """Writers that run until `is_done` is set, their texts, and the errors of their attempts."""

    def __init__(self, store):
        self._store = store
        self.is_done = False
        self.written = {}
        self.errors = []

    async def retry(self, call):
        deadline = monotonic() + HANG
        while True:
            try:
                return await call()
            except psycopg.OperationalError as error:
                self.errors.append(error)
                assert monotonic() < deadline
                await async_sleep(0.02)

    async def append(self, id, size):
        """Append `size` chunks at a time, and repeat each call until it is acknowledged."""
        texts = self.written[id] = []
        while not self.is_done:
            new = [f"{id} {len(texts) + number}" for number in range(size)]
            first = len(texts) + 1
            if size == 1:
                last = await self.retry(partial(self._store.append, id, new[0], expected_seq=first))
            else:
                last = await self.retry(partial(self._store.append_many, id, new, expected_seq=first))
            texts += new
            assert last == len(texts)
        await self.retry(partial(self._store.complete, id))

    async def write(self, id):
        texts = self.written[id] = []
        async with self._store.writer(id) as writer:
            for number in count():
                if self.is_done:
                    break
                await writer.write(f"{id} {number}")
                texts.append(f"{id} {number}")
                await async_sleep(0.001)

    async def read(self, id):
        return [(chunk.seq, chunk.data) async for chunk in self._store.read_from(id)]


@pytest.mark.parametrize("client", ["connection string", *POOLS])
async def test_restart_under_load_loses_nothing(pooler, disposable_server, client, long):
    phase = 10 if long else 1
    async with AsyncPostgresStreamStore(disposable_server.dsn) as direct, store_for(client, pooler.dsn) as store:
        ids = [await direct.create() for _ in range(8)]
        load = Load(store)
        writers = [partial(load.append, id, 1) for id in ids[:3]]
        writers += [partial(load.append, id, 10) for id in ids[3:6]]
        writers += [partial(load.write, id) for id in ids[6:]]

        async def restart_twice():
            for _ in range(2):
                await async_sleep(phase)
                before = sum(map(len, load.written.values()))
                assert before
                pooler.restart()
                deadline = monotonic() + HANG
                while sum(map(len, load.written.values())) < before + 100:
                    assert monotonic() < deadline, "no progress after a restart"
                    await async_sleep(0.05)
            await async_sleep(phase)

        async def restart_and_finish():
            try:
                await restart_twice()
            finally:
                load.is_done = True

        async with AsyncBackground(partial(async_gather, *[partial(load.read, id) for id in ids])) as readers:
            async with AsyncBackground(partial(async_gather, restart_and_finish, *writers)) as all_writers:
                await all_writers.result(HANG + 3 * phase)
            read = await readers.result(HANG)
        for id, found in zip(ids, read, strict=True):
            assert found == list(enumerate(load.written[id], 1))
            assert [tuple(chunk) async for chunk in direct.read_from(id)] == found
            assert (await direct.get_status(id)).state == "done"
    # No error is invalid_sql_statement_name or duplicate_prepared_statement.
    assert {error.sqlstate for error in load.errors} & {"26000", "42P05"} == set()
    assert async_workers() == []


async def test_reading_without_a_session_to_listen(disposable_server, tmp_path):
    """In session mode the store's pool occupies the only session: the LISTEN connection waits for another one."""
    with pgbouncer.pgbouncer(disposable_server.dsn, tmp_path, pool_mode="session", pool_size=1) as dsn:
        async with (
            AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool,
            AsyncPostgresStreamStore(pool) as store,
            AsyncPostgresStreamStore(disposable_server.dsn) as direct,
        ):
            id = await direct.create()
            read = []

            async def follow():
                async for chunk in store.read_from(id):
                    read.append(chunk.data)

            async with AsyncBackground(follow) as reader:
                for number in range(2):
                    await direct.append(id, str(number))
                    await async_until(lambda number=number: len(read) > number, HANG)
                await direct.complete(id)
                await reader.result(HANG)
    assert read == ["0", "1"]
