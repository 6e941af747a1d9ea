"""The paired primitives: the asynchronous ones do what the standard library's threading ones do."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextvars import ContextVar

import pytest

from aibind_postgres._concurrency import (
    AsyncEvent,
    AsyncOneShotEvent,
    Event,
    OneShotEvent,
    async_call_or_await,
    async_shielded,
    async_spawn,
    call_or_await,
    shielded,
    spawn,
)


async def test_an_event_wakes_all_who_wait():
    event = AsyncEvent()
    waiters = [asyncio.create_task(event.wait(timeout)) for timeout in (None, 10, None)]
    await asyncio.sleep(0)
    event.set()
    assert await asyncio.gather(*waiters) == [True] * 3
    assert await event.wait() is True
    event.clear()
    assert event.is_set() is False
    assert await event.wait(0) is Event().wait(0) is False


async def test_a_wait_that_ends_leaves_nothing_behind():
    event = AsyncEvent()
    assert await event.wait(0.01) is False
    waiter = asyncio.create_task(event.wait(10))
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert event._waiters == set()


async def test_a_cancellation_that_comes_with_the_event_is_not_lost():
    event = AsyncEvent()
    waiter = asyncio.create_task(event.wait(10))
    await asyncio.sleep(0)
    event.set()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_a_worker_has_none_of_its_starters_context():
    request = ContextVar("request", default="none")
    request.set("of one caller")
    seen = []

    async def work():
        seen.append(request.get())

    worker = async_spawn(work, "worker")
    await worker.join(10)
    thread = spawn(lambda: seen.append(request.get()), "thread")
    thread.join(10)
    assert seen == ["none", "none"]
    assert thread.daemon
    assert thread.name == "thread"
    await async_spawn(work, "worker", inherit=True).join(10)
    spawn(lambda: seen.append(request.get()), "thread", inherit=True).join(10)
    assert seen[2:] == ["of one caller", "of one caller"]


async def test_a_callback_of_the_other_flavour_is_not_taken_for_true():
    async def refuse():
        return False

    assert await async_call_or_await(refuse) is False
    assert await async_call_or_await(bool) is False
    assert call_or_await(bool) is False
    with pytest.raises(TypeError, match="must not be asynchronous"):
        call_or_await(refuse)
    with pytest.raises(TypeError, match="must not be asynchronous"):
        call_or_await(asyncio.get_running_loop().create_future)


async def test_a_signal_is_waited_for_by_one():
    for signal in (AsyncOneShotEvent(), AsyncOneShotEvent()):
        waiter = asyncio.create_task(signal.wait(0.1))
        await asyncio.sleep(0)
        signal.set()
        assert await waiter is True
        assert await signal.wait(0.1) is True
    assert await AsyncOneShotEvent().wait(0.1) is False
    plain = OneShotEvent()
    assert plain.wait(0.01) is False
    plain.set()
    assert plain.wait(0.01) is True


def test_a_signal_keeps_no_event_loop_alive():
    loops = []

    async def main():
        loops.append(weakref.ref(asyncio.get_running_loop()))
        waiter = asyncio.create_task(AsyncOneShotEvent().wait(10))
        await asyncio.sleep(0)
        waiter.cancel()

    for _ in range(3):
        asyncio.run(main())
    gc.collect()
    assert [loop() for loop in loops] == [None] * 3


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="new in Python 3.12")
async def test_a_worker_never_starts_at_once():
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    started = []

    async def run():
        started.append(True)

    worker = async_spawn(run, "aibind_postgres-test")
    assert started == []
    await worker.join()
    assert started == [True]


async def test_what_is_not_to_be_interrupted_goes_on_when_its_caller_is_cancelled():
    done = []

    async def run():
        await asyncio.sleep(0.01)
        done.append("run")

    caller = asyncio.create_task(async_shielded(run, lambda: done.append("over")))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    await asyncio.sleep(0.05)
    assert done == ["run", "over"]


async def test_what_is_thrown_away_is_finished_on_the_spot():
    done = []

    async def run():
        done.append("run")

    async def caller():
        try:
            await asyncio.sleep(60)
        finally:
            await async_shielded(run, lambda: done.append("over"))

    coroutine = caller()
    coroutine.send(None)
    coroutine.close()
    assert done == ["run", "over"]


def test_what_is_over_is_told_in_threads_too():
    done = []
    shielded(lambda: done.append("run"), lambda: done.append("over"))
    shielded(lambda: done.append("run"))
    with pytest.raises(ZeroDivisionError):
        shielded(lambda: 1 / 0, lambda: done.append("over"))
    assert done == ["run", "over", "run", "over"]
