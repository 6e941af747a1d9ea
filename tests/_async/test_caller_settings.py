"""Clients with caller-dependent sessions: row-level security by a context variable."""

from __future__ import annotations

import uuid
from contextvars import ContextVar
from functools import partial

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_gather, async_until

from aibind_postgres import AsyncPostgresStreamStore, StreamNotFoundError

tenant: ContextVar[str] = ContextVar("tenant", default="")


class TenantClient:
    """A client that sets the tenant of the caller when it takes a connection, as at SQLAlchemy's checkout."""

    def __init__(self, pool):
        self.pool = pool
        self.batches = 0

    async def query(self, sql, params):
        self.batches += "json_to_recordset" in sql
        async with self.pool.connection() as connection:
            await connection.execute("SELECT set_config('app.tenant', %s, false)", [tenant.get()])
            cursor = psycopg.AsyncRawCursor(connection)
            await cursor.execute(sql, params)
            return await cursor.fetchall() if cursor.description else []


@pytest.fixture
def role(run_sql, tables):
    """A role that sees the rows of one tenant. Their ids begin with its name."""
    name = f"tenant_{uuid.uuid4().hex}"
    run_sql(f"CREATE ROLE {name}")
    run_sql(SQL("GRANT USAGE ON SCHEMA {} TO {}").format(Identifier(schema_of(tables)), Identifier(name)).as_string())
    for table in tables.values():
        for statement in (
            "GRANT ALL ON {table} TO {role}",
            "ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY tenant ON {table} USING (starts_with(id, current_setting('app.tenant') || '-'))",
        ):
            run_sql(SQL(statement).format(table=table, role=Identifier(name)).as_string())
    yield name
    run_sql(f"DROP OWNED BY {name}")
    run_sql(f"DROP ROLE {name}")


def schema_of(tables):
    return tables["status_table"]._obj[0]


@pytest.fixture
async def client(dsn, role):
    options = {"autocommit": True, "options": f"-c role={role}"}
    async with AsyncConnectionPool(dsn, kwargs=options, min_size=2, max_size=4, open=False) as pool:
        yield TenantClient(pool)


@pytest.fixture
async def store(client, tables):
    async with AsyncPostgresStreamStore(client, **tables, poll_interval=0.05) as store:
        yield store


async def read(store, id, received):
    tenant.set(id.partition("-")[0])
    async for chunk in store.read_from(id):
        received.append(chunk.data)
    return received


async def test_readers_of_two_tenants_share_statements(store, client, other):
    ids = [f"{name}-{number}" for name in "ab" for number in range(8)]
    for id in ids:
        await other.create(id)
    received = {id: [] for id in ids}

    async def write():
        for number in range(20):
            for id in ids:
                await other.append(id, str(number))
            await async_until(lambda: all(texts for texts in received.values()))
        for id in ids:
            await other.complete(id)

    results = await async_gather(write, *[partial(read, store, id, received[id]) for id in ids])
    assert results[1:] == [[str(number) for number in range(20)]] * len(ids)
    assert client.batches


async def test_polled_reader_under_row_level_security(store, other):
    id = await other.create("a-1")
    received = []
    async with AsyncBackground(partial(read, store, id, received)) as reader:
        for texts in (["a"], ["a", "b"], ["a", "b", "c"]):
            await other.append(id, texts[-1])
            await async_until(partial(received.__eq__, texts))
        await other.delete(id)
        with pytest.raises(StreamNotFoundError):
            await reader.result()


async def test_writer_sends_with_the_settings_of_its_caller(store, other):
    id = await other.create("a-1")

    async def write():
        tenant.set("a")
        async with store.writer(id) as writer:
            await writer.write("x")

    async with AsyncBackground(write) as writing:
        await writing.result()
    assert await other.get_status(id) == ("done", None, 1)
