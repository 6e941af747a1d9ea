"""An outage of the server that is longer than the lease, and killed producers."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import pytest
from _async.sources import items, lease_of, wait_for_renewal
from psycopg_pool import AsyncConnectionPool
from psycopg_pool.base import AttemptWithBackoff
from support import proxy
from support.concurrency import AsyncBackground, async_sleep, async_until
from support.programs import program

from aibind_postgres import AsyncDurableStream, AsyncPostgresStreamStore, _leases
from aibind_postgres._concurrency import AsyncEvent

PROGRAMS = Path(__file__).parent / "programs.py"


async def state_of(store, id):
    return (await store.wait(id, 120)).state


@pytest.fixture
def readers_network(server_dsn):
    """A second way to the server, which comes back before that of the producer."""
    with proxy.proxy(server_dsn) as network:
        yield network
        network.heal()


async def test_outage_longer_than_the_lease_ends_no_stream(network, readers_network, direct, long):
    lease, outage = (15, 20) if long else (3, 4)
    options = {"lease": lease, "retry_for": 60, "timeout": 2.0}
    async with AsyncPostgresStreamStore(network.dsn, **options) as store:
        async with AsyncPostgresStreamStore(readers_network.dsn, **options) as reader:
            id = await direct.create()
            entered, released = [], []

            async def write():
                async with store.writer(id) as writer:
                    entered.append(True)
                    await async_until(lambda: released, timeout=120)
                    await writer.write("after the outage")

            async with AsyncBackground(write) as writing, AsyncBackground(partial(state_of, reader, id)) as waiting:
                await async_until(lambda: entered)
                await async_sleep(1)
                for way in (network, readers_network):
                    way.refuse()
                    way.cut()
                await async_sleep(outage)
                (info,) = [info async for info in direct.list(state="active") if info.id == id]
                assert info.lease_until.timestamp() < time.time(), "the lease has not expired"
                readers_network.heal()
                await async_sleep(3)
                network.heal()
                async with AsyncPostgresStreamStore(readers_network.dsn, **options) as late:
                    with pytest.raises(TimeoutError):
                        await late.wait(id, _leases.CONTACT + 4)
                    assert await late.acquire(id) is False
                released.append(True)
                await writing.result(60)
                assert await waiting.result(60) == "done"


async def test_renewal_on_a_silent_connection_is_repeated_on_another_one(network, direct, monkeypatch):
    for name in ("CONTACT", "CONTACT_AFTER_FAILURE"):
        monkeypatch.setattr(_leases, name, 0.3)  # `direct` ends the stream as soon as its lease has expired
    lease = 3
    options = {"kwargs": {"autocommit": True}, "min_size": 4, "open": False}
    async with AsyncConnectionPool(network.dsn, **options) as pool:
        await pool.wait()
        async with AsyncPostgresStreamStore(pool, lease=lease) as store:
            id = await store.create()
            async with store.writer(id):
                await wait_for_renewal(direct, id, await lease_of(direct, id))
                network.stall(*proxy.BOTH, connected_only=True)
                try:
                    with pytest.raises(TimeoutError):
                        await direct.wait(id, 2 * lease)
                finally:
                    network.heal()
            assert await state_of(direct, id) == "done"


async def test_renewal_does_not_wait_until_the_callers_pool_connects_again(network, direct, monkeypatch):
    monkeypatch.setattr(AttemptWithBackoff, "INITIAL_DELAY", 3600.0)  # as late in a long outage
    options = {"kwargs": {"autocommit": True}, "min_size": 1, "max_size": 1, "reconnect_timeout": 7200, "open": False}
    async with AsyncConnectionPool(network.dsn, **options) as pool:
        async with AsyncPostgresStreamStore(pool, lease=1) as store:
            id = await direct.create(lease=1)
            await store._schema.look_up()
            with store._leases.held(id, list):  # a writer could not end its stream through this pool
                network.refuse()
                network.cut()
                while await lease_of(direct, id) > datetime.now(timezone.utc):
                    await async_sleep(0.05)
                network.heal()
                await wait_for_renewal(direct, id, datetime.now(timezone.utc))


async def test_produce_outlasts_an_outage_longer_than_its_retries(network, direct, monkeypatch):
    async with AsyncPostgresStreamStore(network.dsn, retry_for=0.5, timeout=0.5) as store:
        appended, acknowledged = store._notifier.appended, []

        async def record(*call):
            await appended(*call)
            acknowledged.append(call)

        monkeypatch.setattr(store._notifier, "appended", record)
        id = await direct.create()
        gate = AsyncEvent()
        source = items(["before"], gate)
        async with AsyncBackground(partial(AsyncDurableStream.produce, store, id, source)) as producing:
            await async_until(lambda: store._leases._held)
            await async_until(lambda: acknowledged)  # another store sees the chunk before the producer has the reply
            network.refuse()
            network.cut()
            await async_sleep(4)
            network.heal()
            gate.set()
            assert (await producing.result(60))[::2] == ("done", 2)
        assert [event.data async for event in direct.events(id)] == ["before", "and more"]


async def test_readers_learn_the_end_of_a_killed_producer_within_its_lease(server_dsn, direct, tmp_path, long):
    lease = 15
    for number in range(5 if long else 1):
        id = f"killed {number}"
        with program(tmp_path, PROGRAMS, "write", server_dsn, id, "first") as producer:
            producer.wait_for(1)
            async with AsyncBackground(partial(direct.wait, id, 120)) as waiting:
                await async_sleep(1)
                producer.kill()
                (info,) = [info async for info in direct.list(state="active") if info.id == id]
                assert info.lease_until.timestamp() < time.time() + lease + 1
                assert tuple(await waiting.result(60))[:2] == ("error", _leases.EXPIRED_TEXT)
                late = time.time() - info.lease_until.timestamp()
                print(f"{id}: the reader learned the end {late:.2f} s after the lease")
                assert late > 0
