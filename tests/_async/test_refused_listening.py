"""LISTEN connections: opened as the pool opens its connections, and replaced by polling if they are refused."""

from __future__ import annotations

import logging
import uuid
from functools import partial
from itertools import count

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_until
from support.sessions import TERMINATE

from aibind_postgres import AsyncPostgresStreamStore

NAMES = """
SELECT application_name, query LIKE 'LISTEN%%' FROM pg_stat_activity
 WHERE datname = current_database() AND application_name LIKE 'token %%'
"""


async def collect(store, id):
    return [chunk.data async for chunk in store.read_from(id)]


class RenewingConnection(psycopg.AsyncConnection):
    """Connects with a new name each time, as a class that fetches a new password."""

    numbers = count()

    @classmethod
    async def connect(cls, conninfo="", **kwargs):
        return await super().connect(conninfo, application_name=f"token {next(cls.numbers)}", **kwargs)


def renewing_pool(how, dsn):
    numbers = count()
    if how == "connection_class":
        return AsyncConnectionPool(dsn, connection_class=RenewingConnection, open=False)

    async def renewed():
        return f"token {next(numbers)}"

    async def renewed_conninfo():
        return make_conninfo(dsn, application_name=await renewed())

    async def renewed_kwargs():
        return {"application_name": await renewed()}

    if how == "conninfo":
        return AsyncConnectionPool(renewed_conninfo, open=False)
    return AsyncConnectionPool(dsn, kwargs=renewed_kwargs, open=False)


@pytest.mark.parametrize("how", ["connection_class", "conninfo", "kwargs"])
async def test_listen_connection_is_opened_as_those_of_the_pool(database, how):
    async with renewing_pool(how, database) as pool, AsyncPostgresStreamStore(pool, poll_interval=3600) as store:
        id = await store.create()
        async with AsyncBackground(partial(collect, store, id)) as reading:
            async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
                for _ in range(2):
                    names = []
                    while not any(listens for _, listens in names):
                        names = await (await admin.execute(NAMES)).fetchall()
                    assert len(set(names)) == len({name for name, _ in names}) == len(names)
                    await admin.execute(TERMINATE)
            async with AsyncPostgresStreamStore(database) as other:
                await other.append(id, "a")
                await other.complete(id)
            assert await reading.result() == ["a"]


async def test_refused_listen_connection_is_reported_once(database, caplog):
    caplog.set_level(logging.DEBUG, "aibind_postgres")
    role = f"role_{uuid.uuid4().hex}"
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as admin:
        await admin.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 1")
        await admin.execute(f"GRANT ALL ON aibind_stream_chunks, aibind_stream_status TO {role}")
        limited = make_conninfo(database, user=role)
        try:
            async with (
                AsyncConnectionPool(limited, min_size=1, max_size=1, open=False) as pool,
                AsyncPostgresStreamStore(pool, poll_interval=0.02) as store,
                AsyncPostgresStreamStore(database) as other,
            ):
                id = await store.create()
                async with AsyncBackground(partial(collect, store, id)) as reading:
                    await async_until(lambda: "notifications unavailable" in caplog.text)
                    await other.append(id, "a")
                    await async_until(lambda: caplog.text.count("LISTEN connection could not be opened") >= 4)
                    await other.complete(id)
                    assert await reading.result() == ["a"]
            records = [record for record in caplog.records if record.name.startswith("aibind_postgres")]
            [warning] = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
            assert "too many connections for role" in warning
        finally:
            await admin.execute(f"DROP OWNED BY {role}")
            await admin.execute(f"DROP ROLE {role}")
