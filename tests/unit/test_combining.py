"""Combined calls in one flavour: cancelled tasks, and an interrupted thread."""

from __future__ import annotations

import asyncio
import threading

import pytest
from support.concurrency import until

from aibind_postgres import AibindError
from aibind_postgres._async import combining as async_combining
from aibind_postgres._async.combining import AsyncCombiner
from aibind_postgres._concurrency import OneShotEvent
from aibind_postgres._sync import combining
from aibind_postgres._sync.combining import Combiner


class Gated:
    def __init__(self):
        self.batches = []
        self.gate = asyncio.Event()

    async def run(self, items):
        self.batches.append(list(items))
        await self.gate.wait()
        return [item * 10 for item in items]

    async def run_alone(self, item):
        [result] = await self.run([item])
        return result


@pytest.fixture(autouse=True)
def no_takeover(monkeypatch):
    """A takeover would hide that a cancelled call has not handed over."""
    monkeypatch.setattr(async_combining, "TAKEOVER_TIMEOUT", 60)


@pytest.fixture
async def gated():
    return Gated()


@pytest.fixture
async def combiner(gated):
    return AsyncCombiner(gated.run_alone, gated.run, max_items=100, max_size=100)


async def queued(combiner, *items):
    """Start one call, queue the others, and return all their tasks."""
    tasks = []
    for item in items:
        tasks.append(asyncio.create_task(combiner.call(item)))
        await asyncio.sleep(0)
    return tasks


async def second_batch(combiner, gated, *items):
    """Finish one call, start the others as one batch, and return their tasks."""
    first, *tasks = await queued(combiner, 0, *items)
    gate, gated.gate = gated.gate, asyncio.Event()
    gate.set()
    await first
    while len(gated.batches) < 2:
        await asyncio.sleep(0)
    assert gated.batches[1] == list(items)
    return tasks


async def test_cancelled_queued_call_never_runs(combiner, gated):
    first, second, third = await queued(combiner, 1, 2, 3)
    second.cancel()
    await asyncio.wait([second])
    gated.gate.set()
    assert await asyncio.gather(first, third) == [10, 30]
    assert gated.batches == [[1], [3]]


async def test_cancelled_single_call_hands_over_the_lead(combiner, gated):
    first, second = await queued(combiner, 1, 2)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    gated.gate.set()
    assert await second == 20


async def test_cancelled_leader_does_not_interrupt_its_batch(combiner, gated):
    leader, *others = await second_batch(combiner, gated, 1, 2, 3)
    leader.cancel()
    await asyncio.wait([leader])
    assert leader.cancelled()
    gated.gate.set()
    assert await asyncio.gather(*others) == [20, 30]
    assert await combiner.call(4) == 40


async def test_cancelled_follower_does_not_interrupt_its_batch(combiner, gated):
    leader, follower, other = await second_batch(combiner, gated, 1, 2, 3)
    follower.cancel()
    await asyncio.wait([follower])
    gated.gate.set()
    assert await asyncio.gather(leader, other) == [10, 30]


async def test_new_leader_cancelled_before_its_first_step(combiner, gated):
    first, second, third = await queued(combiner, 1, 2, 3)
    gated.gate.set()
    while not first.done():
        await asyncio.sleep(0)
    # The second call is the leader now, and is cancelled before its first step.
    second.cancel()
    assert await third == 30
    assert await combiner.call(4) == 40


@pytest.mark.parametrize("steps", range(12))
async def test_no_call_hangs_after_cancellations_at_any_step(combiner, gated, steps):
    gated.gate.set()
    tasks = await queued(combiner, *range(6))
    for _ in range(steps):
        await asyncio.sleep(0)
    tasks[1].cancel()
    tasks[3].cancel()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    for number in (0, 2, 4, 5):
        assert results[number] == number * 10
    call = asyncio.create_task(combiner.call(9))
    await asyncio.sleep(0)
    assert gated.batches[-1] == [9]  # it runs at once: no other call leads
    assert await call == 90


def test_combiner_after_the_end_of_its_loop():
    gated = Gated()
    combiner = AsyncCombiner(gated.run_alone, gated.run, max_items=100, max_size=100)

    async def end_early():
        gated.gate = asyncio.Event()
        await queued(combiner, 1, 2, 3)
        gated.gate.set()
        await asyncio.sleep(0)  # the task of the second batch has not taken its first step
        gated.gate.clear()

    async def use():
        gated.gate = asyncio.Event()
        gated.gate.set()
        return await asyncio.wait_for(combiner.call(5), 20)

    for _ in range(3):
        asyncio.run(end_early())
        assert asyncio.run(use()) == 50


async def test_cancelled_batch_raises_in_its_callers(combiner, gated):
    leader, follower = await second_batch(combiner, gated, 1, 2)
    [batch] = [task for task in asyncio.all_tasks() if "_run_queue" in repr(task.get_coro())]
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    with pytest.raises(AibindError, match="may or may not have taken effect"):
        await follower
    gated.gate.set()
    assert await combiner.call(3) == 30


def test_interrupted_leader_raises_in_its_followers_and_hands_over(monkeypatch):
    batches, queued_calls = [], set()
    gate = threading.Event()

    class RecordingEvent(OneShotEvent):
        def wait(self, timeout):  # a call waits after it has queued
            queued_calls.add(self)
            return super().wait(timeout)

    def run(items):
        batches.append(list(items))
        if len(batches) == 1:
            gate.wait()
        if len(batches) == 2:
            raise KeyboardInterrupt
        return [item * 10 for item in items]

    monkeypatch.setattr(combining, "OneShotEvent", RecordingEvent)
    monkeypatch.setattr(combining, "TAKEOVER_TIMEOUT", 60)
    combiner = Combiner(lambda item: run([item])[0], run, max_items=100, max_size=100)
    results = {}

    def call(item):
        try:
            results[item] = combiner.call(item)
        except BaseException as error:
            results[item] = error

    threads = [threading.Thread(target=call, args=(item,), daemon=True) for item in range(4)]
    for number, thread in enumerate(threads):
        thread.start()
        until(lambda number=number: len(queued_calls) + len(batches) > number)
    gate.set()
    for thread in threads:
        thread.join(20)
    assert batches == [[0], [1, 2, 3]]
    assert results[0] == 0
    assert isinstance(results[1], KeyboardInterrupt)
    assert [str(results[item]).endswith("may or may not have taken effect") for item in (2, 3)] == [True, True]
    assert combiner.call(4) == 40
