"""The option `synchronous_commit` applies to the commits of the store only."""

from __future__ import annotations

import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool
from support.commit_settings import record_commit_settings
from support.concurrency import async_gather

from aibind_postgres import AsyncPostgresStreamStore


@pytest.fixture
def settings_at_commit(admin_dsn, tables, schema_name):
    with record_commit_settings(admin_dsn, tables["status_table"], schema_name) as settings:
        yield settings


async def write_everything(store):
    ended, deleted, abandoned, *others = [await store.create() for _ in range(13)]
    await store.append(ended, "x")
    await store.append_many(ended, ["y", "z"])
    await async_gather(*[lambda id=id: store.append(id, "x") for id in others])
    async with store.writer(others[0]) as writer:
        await writer.write("x")
    await store.stop(ended)
    await store.delete(deleted)
    assert abandoned in await store.fail_abandoned(0)
    assert (await store.cleanup()).streams == 0


@pytest.mark.parametrize("setting", ["off", "local", "on", "remote_write", "remote_apply"])
async def test_every_write_uses_the_option(dsn, tables, settings_at_commit, setting):
    async with AsyncPostgresStreamStore(dsn, **tables, synchronous_commit=setting) as store:
        await write_everything(store)
    assert settings_at_commit() == {setting}


async def test_default_of_the_server(dsn, tables, settings_at_commit):
    async with AsyncPostgresStreamStore(make_conninfo(dsn, options="-csynchronous_commit=local"), **tables) as store:
        await write_everything(store)
    assert settings_at_commit() == {"local"}


async def test_connection_keeps_its_own_setting(dsn, tables):
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables, synchronous_commit="off") as store:
            await write_everything(store)
        async with pool.connection() as connection:
            assert await (await connection.execute("SHOW synchronous_commit")).fetchone() == ("on",)


async def test_invalid_value(dsn):
    with pytest.raises(ValueError, match="must be one of on, off, local, remote_write, remote_apply, not 'x'"):
        AsyncPostgresStreamStore(dsn, synchronous_commit="x")
