"""Two-phase transactions on a server that has them enabled."""

from __future__ import annotations

import psycopg
import pytest

from aibind_postgres import AsyncPostgresStreamStore


@pytest.mark.parametrize("notify", [True, False])
async def test_append_in_a_two_phase_transaction(disposable_server, notify):
    with psycopg.connect(disposable_server.dsn, autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET max_prepared_transactions = 5")
    disposable_server.stop()
    disposable_server.start()
    connection = await psycopg.AsyncConnection.connect(disposable_server.dsn)
    store = AsyncPostgresStreamStore(connection, notify=notify)
    await connection.tpc_begin(connection.xid(1, "transfer", "store"))
    await store.create("a")
    await store.append("a", "hello")
    if notify:
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="NOTIFY"):
            await connection.tpc_prepare()
    else:
        await connection.tpc_prepare()
        await connection.tpc_commit()
    await connection.close()
    async with AsyncPostgresStreamStore(disposable_server.dsn) as other:
        status = await other.get_status("a")
    assert status == (None if notify else ("active", None, 1))
