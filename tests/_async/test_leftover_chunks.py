"""Chunks that a half-finished clean-up of the TypeScript package has left over, under an id that is used again."""

from __future__ import annotations

from functools import partial

import psycopg
import pytest
from psycopg.sql import SQL
from support.concurrency import async_gather

from aibind_postgres import AibindError, AsyncPostgresStreamStore

STREAMS = ["a", "b", "c"]


@pytest.fixture(params=["with times", "without times"])
def leftovers(request, run_sql, tables):
    """Leftover chunks of three streams, which the TypeScript package has created again."""

    def run(statement):
        run_sql(SQL(statement).format(chunks=tables["chunks_table"], status=tables["status_table"]).as_string())

    if request.param == "without times":
        run("ALTER TABLE {chunks} DROP COLUMN created_at")
        run("ALTER TABLE {status} DROP COLUMN created_at")
    for id in STREAMS:
        run(f"INSERT INTO {{chunks}} (id, seq, data) SELECT '{id}', seq, 'old' FROM generate_series(1, 5) AS seq")
        run(f"INSERT INTO {{status}} (id, expires_at) VALUES ('{id}', 9e15)")


async def texts(store, id):
    return [chunk.data async for chunk in store.read_from(id, follow=False)]


@pytest.mark.usefixtures("leftovers")
async def test_append_to_a_recreated_stream(other):
    assert await other.append("a", "new") == 1
    assert await other.append_many("b", ["1", "2"], expected_seq=1) == 2
    async with other.writer("c") as writer:
        await writer.write("new")
    assert [await texts(other, id) for id in STREAMS] == [["new"], ["1", "2"], ["new"]]


@pytest.mark.usefixtures("leftovers")
async def test_simultaneous_appends_to_recreated_streams(other):
    await async_gather(*[partial(other.append, id, id) for id in STREAMS * 5])
    assert [await texts(other, id) for id in STREAMS] == [[id] * 5 for id in STREAMS]


@pytest.mark.usefixtures("leftovers")
async def test_append_on_a_connection_to_a_recreated_stream(dsn, tables):
    async with (
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection,
        AsyncPostgresStreamStore(connection, **tables) as store,
    ):
        with pytest.raises(AibindError, match="outside a transaction"):
            async with connection.transaction():
                await store.append("a", "undone")
        assert await store.append("a", "new") == 1
        assert await texts(store, "a") == ["new"]


async def test_uncounted_chunk_that_is_younger_than_its_stream_is_kept(run_sql, tables, other):
    await other.create("a")
    run_sql(SQL("INSERT INTO {} (id, seq, data) VALUES ('a', 1, 'x')").format(tables["chunks_table"]).as_string())
    for _ in range(2):
        with pytest.raises(AibindError, match="another program has inserted"):
            await other.append("a", "new")
