"""A server that refuses notifications: the role may not execute pg_notify."""

from __future__ import annotations

import uuid
from functools import partial

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool
from support.concurrency import AsyncBackground, async_until

from aibind_postgres import AsyncPostgresStreamStore, _poll_pace
from aibind_postgres._async import listening


@pytest.fixture
def refusing(database):
    """A database, as a role that may not notify."""
    role = f"silent_{uuid.uuid4().hex}"
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role}")
        admin.execute(f"GRANT ALL ON aibind_stream_chunks, aibind_stream_status TO {role}")
        admin.execute("REVOKE EXECUTE ON FUNCTION pg_notify FROM PUBLIC")
        yield make_conninfo(database, options=f"-c role={role}")
        admin.execute(f"DROP OWNED BY {role}")
        admin.execute(f"DROP ROLE {role}")


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


async def stored(dsn, id):
    async with AsyncPostgresStreamStore(dsn) as store:
        return [chunk.data async for chunk in store.read_from(id, follow=False)]


async def test_writes_on_an_autocommit_connection(database, refusing, caplog):
    async with (
        await psycopg.AsyncConnection.connect(refusing, autocommit=True) as connection,
        AsyncPostgresStreamStore(connection, ttl=0.001) as store,
    ):
        await store.create("a")
        assert await store.append("a", "one") == 1
        assert await store.append("a", "one", expected_seq=1) == 1
        assert await store.append_many("a", ["two", "three"]) == 3
        async with store.writer("a") as writer:
            await writer.write("four")
            assert await writer.flush() == 4
        assert await store.get_status("a") == ("done", None, 4)
        assert await stored(database, "a") == ["one", "two", "three", "four"]
        assert await store.stop("a") is False
        assert await store.delete("a") is True
        await store.create("b")
        assert await store.fail_abandoned(0) == ["b"]
    [warning] = warnings(caplog)
    assert "InsufficientPrivilege" in warning
    assert "notify=False" in warning


async def test_append_in_a_transaction_raises(database, refusing):
    async with (
        await psycopg.AsyncConnection.connect(refusing) as connection,
        AsyncPostgresStreamStore(connection) as store,
    ):
        await store.create("a")
        await connection.commit()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await store.append("a", "undone")
        await connection.rollback()
        assert await stored(database, "a") == []


async def test_store_that_does_not_notify(database, refusing, caplog):
    async with (
        await psycopg.AsyncConnection.connect(refusing) as connection,
        AsyncPostgresStreamStore(connection, notify=False) as store,
    ):
        await store.create("a")
        await store.append("a", "kept")
        await connection.commit()
    assert await stored(database, "a") == ["kept"]
    assert not warnings(caplog)


async def test_pool_warns_once(refusing, caplog):
    async with AsyncConnectionPool(refusing, min_size=1, open=False) as pool:
        async with AsyncPostgresStreamStore(pool) as store:
            id = await store.create()
            await store.append(id, "one")
            await async_until(lambda: warnings(caplog))
            await store.append(id, "two")
        assert len(warnings(caplog)) == 1


async def test_refused_probe_does_not_slow_polls(refusing, monkeypatch):
    monkeypatch.setattr(listening, "PROBE_AFTER", 0)
    monkeypatch.setattr(_poll_pace, "MAX_POLL_RETRY", 3600)
    received = []

    async def read():
        async for chunk in store.read_from("a"):
            received.append(chunk.data)

    async with (
        AsyncPostgresStreamStore(refusing, poll_interval=0.02) as store,
        AsyncPostgresStreamStore(refusing, notify=False) as other,
    ):
        await store.create("a")
        async with AsyncBackground(read) as reader:
            expected = []
            for number in range(14):  # if each refusal doubled the pause, the last ones would take minutes
                expected.append(str(number))
                await other.append("a", str(number))
                await async_until(partial(received.__eq__, expected))
            await other.complete("a")
            await reader.result()
