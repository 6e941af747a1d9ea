"""Servers that are away, read-only, or replaced by a standby: nothing acknowledged is lost, and calls recover."""

from __future__ import annotations

from functools import partial
from time import monotonic

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import servers
from support.concurrency import AsyncBackground, async_gather, async_sleep, async_until

from aibind_postgres import AsyncPostgresStreamStore

HANG = 60  # seconds after which a call counts as hanging

pytestmark = pytest.mark.timeout(600)


async def test_single_call_waits_for_a_restarted_server(disposable_server):
    async with AsyncPostgresStreamStore(disposable_server.dsn) as store:
        id = await store.create()
        disposable_server.stop()
        async with AsyncBackground(partial(store.append, id, "a")) as appending:
            await async_sleep(8)  # a pool that doubles its pauses connects after 7 and after 15 seconds
            disposable_server.start()
            assert await appending.result(HANG) == 1  # the pool gives up waiting after 10 seconds


IS_SYNCHRONOUS = "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'"


def replicate_synchronously(server):
    """Let commits wait for the standby of a server. A standby that was started before does not inherit the setting."""
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        admin.execute("SELECT pg_reload_conf()")
        deadline = monotonic() + HANG
        while admin.execute(IS_SYNCHRONOUS).fetchone() != (True,):
            assert monotonic() < deadline, "the standby does not replicate synchronously"


async def append_each(store, id, log, done):
    while not done:
        try:
            log.append(await store.append(id, f"{len(log) + 1}", expected_seq=len(log) + 1))
        except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction):
            await async_sleep(0.1)
    await store.complete(id)


async def write(store, id, log, done):
    async with store.writer(id) as writer:
        while not done:
            await writer.write(f"{len(log) + 1}")
            await writer.write(f"{len(log) + 2}")
            log += range(len(log) + 1, await writer.flush() + 1)


async def read(store, id, log):
    async for chunk in store.read_from(id):
        log.append(tuple(chunk))


async def test_failover_to_a_synchronous_standby(disposable_server, long):
    with servers.standby_of(disposable_server) as standby:
        replicate_synchronously(disposable_server)
        hosts, ports = "127.0.0.1,127.0.0.1", f"{disposable_server.port},{standby.port}"
        dsn = make_conninfo(standby.dsn, host=hosts, port=ports, target_session_attrs="read-write")
        async with AsyncPostgresStreamStore(dsn) as store, AsyncPostgresStreamStore(dsn) as other:
            ids = [await store.create() for _ in range(8)]
            written, seen, done = [[] for _ in ids], [[] for _ in ids], []
            logs = written + seen

            async def fail_over():
                try:
                    await async_until(lambda: all(logs))
                    disposable_server.kill()
                    await async_sleep(5 if long else 0)
                    standby.promote()
                    promoted_at, before = monotonic(), list(map(len, logs))
                    await async_until(lambda: all(len(log) > n for log, n in zip(logs, before, strict=True)), HANG)
                    print(f"{monotonic() - promoted_at:.1f} s from the promotion until every caller had recovered")
                finally:
                    done.append(True)

            calls = [
                partial((append_each, write)[number % 2], store, id, written[number], done)
                for number, id in enumerate(ids)
            ]
            calls += [partial(read, (store, other)[n // 4], id, seen[n]) for n, id in enumerate(ids)]
            await async_gather(fail_over, *calls)
            for id, acknowledged, chunks in zip(ids, written, seen, strict=True):
                assert chunks == [(seq, f"{seq}") for seq in range(1, len(chunks) + 1)]
                assert len(acknowledged) <= len(chunks)
                assert await store.get_status(id) == ("done", None, len(chunks))
