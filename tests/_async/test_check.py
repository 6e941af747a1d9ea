"""`check` tells a readiness probe whether the store can work."""

from __future__ import annotations

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool

from aibind_postgres import AsyncPostgresConversationStore, AsyncPostgresStreamStore, StoreClosedError


async def test_check_of_a_usable_store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        check = await store.check()
    assert check.latency is not None
    assert check._replace(latency=None) == (True, None, None, False, None)


async def test_check_of_a_conversation_store(dsn, schema_name, conversations):
    async with AsyncPostgresConversationStore(dsn, table=conversations) as store:
        check = await store.check()
    async with AsyncPostgresConversationStore(dsn, table=psycopg.sql.Identifier(schema_name, "nowhere")) as store:
        missing = await store.check()
    assert (check.is_ready, check.problem) == (True, None)
    assert not missing.is_ready
    assert "nowhere" in str(missing.problem)


async def test_check_names_missing_tables(dsn, schema_name):
    table = psycopg.sql.Identifier(schema_name, "nowhere")
    async with AsyncPostgresStreamStore(dsn, status_table=table) as store:
        check = await store.check()
    assert not check.is_ready
    assert "nowhere" in str(check.problem)
    assert "aibind-postgres migrate" in str(check.problem)


async def test_check_of_a_role_without_rights(dsn, tables, schema_name, run_sql):
    role = f"{schema_name}_role"
    run_sql(f'CREATE ROLE "{role}" LOGIN')
    try:
        async with AsyncPostgresStreamStore(make_conninfo(dsn, user=role), **tables) as store:
            without_usage = await store.check()
            run_sql(f'GRANT USAGE ON SCHEMA "{schema_name}" TO "{role}"')
            without_select = await store.check()
    finally:
        run_sql(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')
    assert "permission denied" in str(without_usage.problem)
    assert "grant it SELECT" in str(without_select.problem)
    assert not without_usage.is_ready
    assert not without_select.is_ready


async def test_check_of_an_unreachable_server_has_no_password():
    async with AsyncPostgresStreamStore("postgresql://user:secret@127.0.0.1:1/x?connect_timeout=2") as store:
        check = await store.check(timeout=1)
    assert not check.is_ready
    assert check.latency is None
    assert "secret" not in str(check.problem)


async def test_check_of_a_read_only_session(dsn, tables):
    async with AsyncPostgresStreamStore(
        make_conninfo(dsn, options="-c default_transaction_read_only=on"), **tables
    ) as store:
        check = await store.check()
    assert (check.is_ready, check.is_read_only) == (True, True)


async def test_check_beside_a_full_pool_uses_another_connection_after_its_timeout(dsn, tables):
    async with AsyncConnectionPool(dsn, min_size=1, max_size=1, timeout=600, open=False) as pool:
        async with AsyncPostgresStreamStore(pool, **tables) as store, pool.connection():
            check = await store.check(timeout=0.1)
    assert (check.is_ready, check.problem) == (True, None)  # not after the 600 seconds of the pool


async def test_check_of_a_closed_store_raises(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        pass
    with pytest.raises(StoreClosedError):
        await store.check()
