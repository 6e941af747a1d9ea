"""The synchronous_commit option: in force when a statement of ours commits, and nowhere else."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool
from support.concurrency import async_gather

from aibind_postgres import AsyncPostgresStreamStore

# A deferred trigger runs at the end of the transaction, just before the commit.
WITNESS = """
CREATE TABLE {witness} (operation text, setting text);
CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO {witness} VALUES (TG_OP, current_setting('synchronous_commit'));
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER witness AFTER INSERT OR UPDATE OR DELETE ON {status}
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {function}();
"""


@pytest.fixture
async def seen(dsn, tables, schema_name):
    witness = sql.Identifier(schema_name, "witness")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as admin:
        statement = sql.SQL(WITNESS).format(
            witness=witness, function=sql.Identifier(schema_name, "witnessed"), status=tables["status_table"]
        )
        await admin.execute(statement)

        async def settings():
            rows = await (await admin.execute(sql.SQL("SELECT setting FROM {}").format(witness))).fetchall()
            await admin.execute(sql.SQL("DELETE FROM {}").format(witness))
            return {setting for (setting,) in rows}

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
async def test_every_write_commits_so(dsn, tables, seen, setting):
    async with AsyncPostgresStreamStore(dsn, **tables, synchronous_commit=setting) as store:
        await write_everything(store)
    assert await seen() == {setting}


async def test_without_it_the_server_decides(dsn, tables, seen):
    async with AsyncPostgresStreamStore(make_conninfo(dsn, options="-csynchronous_commit=local"), **tables) as store:
        await write_everything(store)
    assert await seen() == {"local"}


async def test_it_leaves_no_trace_on_a_connection(dsn, tables):
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables, synchronous_commit="off") as store:
            await write_everything(store)
        async with pool.connection() as connection:
            assert await (await connection.execute("SHOW synchronous_commit")).fetchone() == ("on",)


async def test_another_value_is_refused(dsn):
    with pytest.raises(ValueError, match="must be one of on, off, local, remote_write, remote_apply, not 'x'"):
        AsyncPostgresStreamStore(dsn, synchronous_commit="x")
