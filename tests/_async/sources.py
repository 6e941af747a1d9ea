"""Sources of durable streams, a recorder of `on_finish`, a client that can delay or fail statements, and leases."""

from __future__ import annotations

from time import monotonic

import psycopg
from support.concurrency import TIMEOUT, async_sleep

from aibind_postgres._concurrency import AsyncEvent


async def items(items, gate=None):
    for item in items:
        yield item
    if gate is not None:
        await gate.wait()
        yield "and more"


class SilentSource:
    """A source that yields nothing until it is closed."""

    def __init__(self):
        self.gate = AsyncEvent()
        self.is_started = False
        self.closed = 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        self.is_started = True
        await self.gate.wait()
        raise StopAsyncIteration

    def close(self):
        self.closed += 1
        self.gate.set()


class UninterruptibleSource(SilentSource):
    """A source that yields one word and then cannot be interrupted, like a generator that waits in a thread."""

    async def __anext__(self):
        if not self.is_started:
            self.is_started = True
            return "word"
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except BaseException:
                continue
        raise StopAsyncIteration

    def close(self):
        self.closed += 1
        if not self.gate.is_set():
            raise ValueError("it is running")


class FinishRecorder:
    """Records the arguments of each call of `on_finish`."""

    def __init__(self):
        self.calls = []

    async def __call__(self, text, status):
        self.calls.append((text, status))


class HookedClient:
    """A client around a pool. It awaits `hook` before each statement, and records the statements."""

    connection_errors = (psycopg.OperationalError,)

    def __init__(self, pool, joins_transactions=False):
        self.joins_transactions = joins_transactions
        self.statements = []
        self.hook = pass_through
        self._pool = pool

    async def query(self, sql, params):
        self.statements.append(sql)
        await self.hook(sql, params)
        async with self._pool.connection() as connection:
            cursor = psycopg.AsyncRawCursor(connection)
            await cursor.execute(sql, params)
            return await cursor.fetchall()


async def pass_through(sql, params):
    """The default hook: no delay and no error."""


def is_append(sql):
    return "total_chunks +" in sql or "_append(" in sql or '_append"(' in sql  # the function for distributed tables


def is_status_query(sql):
    return sql.lstrip().startswith(("SELECT state, error", "WITH taken AS"))


async def lease_of(store, id):
    """Return the end of the lease of an active stream."""
    (lease_until,) = [info.lease_until async for info in store.list(state="active") if info.id == id]
    return lease_until


async def wait_for_renewal(store, id, after):
    """Wait until the lease of an active stream ends later than at the time `after`."""
    give_up_at = monotonic() + TIMEOUT
    while await lease_of(store, id) <= after:
        assert monotonic() < give_up_at, "the lease is not renewed"
        await async_sleep(0.05)
