"""The paired primitives: the asynchronous ones behave like those of `threading`."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from contextvars import ContextVar
from functools import partial

import pytest
from support.concurrency import async_until

from aibind_postgres._concurrency import (
    AsyncEvent,
    AsyncOneShotEvent,
    Event,
    OneShotEvent,
    async_call_or_await,
    async_join_or_cancel,
    async_shielded,
    async_spawn,
    call_or_await,
    join_or_cancel,
    shielded,
    spawn,
)


async def test_event_wakes_all_waiters():
    event = AsyncEvent()
    waiters = [asyncio.create_task(event.wait(timeout)) for timeout in (None, 10, None)]
    await asyncio.sleep(0)
    event.set()
    assert await asyncio.gather(*waiters) == [True] * 3
    assert await event.wait() is True
    event.clear()
    assert event.is_set() is False
    assert await event.wait(0) is Event().wait(0) is False


async def test_ended_wait_leaves_no_future(monkeypatch):
    loop = asyncio.get_running_loop()
    create, futures = loop.create_future, weakref.WeakSet()

    def create_and_record():
        future = create()
        futures.add(future)
        return future

    monkeypatch.setattr(loop, "create_future", create_and_record)
    event = AsyncEvent()
    assert await event.wait(0.01) is False
    waiter = asyncio.create_task(event.wait(10))
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    del waiter
    await asyncio.sleep(0)  # the loop drops the handles of the cancellation
    gc.collect()
    assert not futures
    event.set()


async def test_cancellation_as_the_event_is_set():
    event = AsyncEvent()
    waiter = asyncio.create_task(event.wait(10))
    await asyncio.sleep(0)
    event.set()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter


async def test_worker_context():
    request = ContextVar("request", default="none")
    request.set("of one caller")
    values = []

    async def work():
        values.append(request.get())

    worker = async_spawn(work, "worker")
    await worker.join(10)
    thread = spawn(lambda: values.append(request.get()), "thread")
    thread.join(10)
    assert values == ["none", "none"]
    assert thread.daemon
    assert thread.name == "thread"
    await async_spawn(work, "worker", inherit=True).join(10)
    spawn(lambda: values.append(request.get()), "thread", inherit=True).join(10)
    assert values[2:] == ["of one caller", "of one caller"]


async def test_callback_of_the_other_flavour():
    async def refuse():
        return False

    assert await async_call_or_await(refuse) is False
    assert await async_call_or_await(bool) is False
    assert call_or_await(bool) is False
    with pytest.raises(TypeError, match="must not be asynchronous"):
        call_or_await(refuse)
    with pytest.raises(TypeError, match="must not be asynchronous"):
        call_or_await(asyncio.get_running_loop().create_future)


async def test_one_shot_event():
    for event in (AsyncOneShotEvent(), AsyncOneShotEvent()):
        waiter = asyncio.create_task(event.wait(0.1))
        await asyncio.sleep(0)
        event.set()
        assert await waiter is True
        assert await event.wait(0.1) is True
    assert await AsyncOneShotEvent().wait(0.1) is False
    thread_event = OneShotEvent()
    assert thread_event.wait(0.01) is False
    thread_event.set()
    assert thread_event.wait(0.01) is True


def test_one_shot_event_keeps_no_event_loop_alive():
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
async def test_worker_starts_after_spawn_returns():
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    started = []

    async def run():
        started.append(True)

    worker = async_spawn(run, "aibind_postgres-test")
    assert started == []
    await worker.join()
    assert started == [True]


async def test_shielded_run_continues_when_its_caller_is_cancelled():
    done = []

    async def run():
        await asyncio.sleep(0.01)
        done.append("run")

    caller = asyncio.create_task(async_shielded(run, lambda: done.append("on_done")))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    await async_until(lambda: len(done) == 2)
    assert done == ["run", "on_done"]


async def test_shielded_run_of_a_finalised_coroutine():
    done = []

    async def run():
        done.append("run")

    async def caller():
        try:
            await asyncio.sleep(60)
        finally:
            await async_shielded(run, lambda: done.append("on_done"))

    coroutine = caller()
    coroutine.send(None)
    coroutine.close()
    assert done == ["run", "on_done"]


def test_shielded_in_threads():
    done = []
    shielded(lambda: done.append("run"), lambda: done.append("on_done"))
    shielded(lambda: done.append("run"))
    with pytest.raises(ZeroDivisionError):
        shielded(lambda: 1 / 0, lambda: done.append("on_done"))
    assert done == ["run", "on_done", "run", "on_done"]


async def test_worker_that_does_not_end_is_cancelled() -> None:
    worker = async_spawn(partial(asyncio.sleep, 3600), "test")
    await async_join_or_cancel(worker, 0.01)
    assert not worker.is_alive()


async def test_worker_is_cancelled_if_its_end_is_not_awaited() -> None:
    worker = async_spawn(partial(asyncio.sleep, 3600), "test")
    waiting = asyncio.ensure_future(async_join_or_cancel(worker, 3600))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await worker.join()


def test_thread_that_does_not_end_is_left() -> None:
    event = threading.Event()
    worker = spawn(event.wait, "test")
    join_or_cancel(worker, 0.01)
    assert worker.is_alive()
    event.set()
    join_or_cancel(worker, 30)
    assert not worker.is_alive()
