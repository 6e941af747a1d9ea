"""Combining calls, where the two flavours are not the same: cancelled tasks, and an interrupted thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aibind_postgres import AibindError
from aibind_postgres._async.combining import AsyncCombiner
from aibind_postgres._sync.combining import Combiner


class Gated:
    def __init__(self):
        self.batches = []
        self.gate = asyncio.Event()

    async def run(self, items):
        self.batches.append(list(items))
        await self.gate.wait()
        return [item * 10 for item in items]


@pytest.fixture
async def gated():
    return Gated()


@pytest.fixture
async def combiner(gated):
    return AsyncCombiner(gated.run, max_items=100, max_size=100)


async def queued(combiner, *items):
    """Have one call run and the others queue; return their tasks."""
    tasks = []
    for item in items:
        tasks.append(asyncio.create_task(combiner.call(item)))
        await asyncio.sleep(0)
    return tasks


async def second_batch(combiner, gated, *items):
    """Have one call run and finish, and the others under way together; return the tasks of these."""
    first, *tasks = await queued(combiner, 0, *items)
    gate, gated.gate = gated.gate, asyncio.Event()
    gate.set()
    await first
    while len(gated.batches) < 2:
        await asyncio.sleep(0)
    assert gated.batches[1] == list(items)
    return tasks


async def test_a_cancelled_call_that_queues_is_never_run(combiner, gated):
    first, second, third = await queued(combiner, 1, 2, 3)
    second.cancel()
    await asyncio.wait([second])
    gated.gate.set()
    assert await asyncio.gather(first, third) == [10, 30]
    assert gated.batches == [[1], [3]]


async def test_a_cancelled_call_alone_is_broken_off_and_hands_on(combiner, gated):
    first, second = await queued(combiner, 1, 2)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    gated.gate.set()
    assert await second == 20


async def test_a_cancelled_leader_breaks_nothing_off(combiner, gated):
    leader, *others = await second_batch(combiner, gated, 1, 2, 3)
    leader.cancel()
    await asyncio.wait([leader])
    assert leader.cancelled()
    gated.gate.set()
    assert await asyncio.gather(*others) == [20, 30]
    assert await combiner.call(4) == 40


async def test_a_cancelled_follower_breaks_nothing_off(combiner, gated):
    leader, follower, other = await second_batch(combiner, gated, 1, 2, 3)
    follower.cancel()
    await asyncio.wait([follower])
    gated.gate.set()
    assert await asyncio.gather(leader, other) == [10, 30]


async def test_the_lead_passes_over_who_is_cancelled_when_it_comes_to_him(combiner, gated):
    first, second, third = await queued(combiner, 1, 2, 3)
    gated.gate.set()
    while not first.done():
        await asyncio.sleep(0)
    # The second leads now; whether it has begun or not, it is gone before its first step in this order.
    second.cancel()
    assert await third == 30
    assert await combiner.call(4) == 40


@pytest.mark.parametrize("steps", range(12))
async def test_cancelled_at_every_step_nobody_hangs(combiner, gated, steps):
    gated.gate.set()
    tasks = await queued(combiner, *range(6))
    for _ in range(steps):
        await asyncio.sleep(0)
    tasks[1].cancel()
    tasks[3].cancel()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    for number in (0, 2, 4, 5):
        assert results[number] == number * 10
    assert combiner._leader is None


def test_a_loop_that_shuts_down_leaves_the_combiner_usable():
    gated = Gated()
    combiner = AsyncCombiner(gated.run, max_items=100, max_size=100)

    async def abandon():
        gated.gate = asyncio.Event()
        await queued(combiner, 1, 2, 3)
        gated.gate.set()
        await asyncio.sleep(0)  # the batch of the others is a task that has not begun
        gated.gate.clear()

    async def use():
        gated.gate = asyncio.Event()
        gated.gate.set()
        return await asyncio.wait_for(combiner.call(5), 20)

    for _ in range(3):
        asyncio.run(abandon())
        assert asyncio.run(use()) == 50


async def test_a_batch_whose_task_is_cancelled_tells_its_callers(combiner, gated):
    leader, follower = await second_batch(combiner, gated, 1, 2)
    [batch] = [task for task in asyncio.all_tasks() if "_run_batch" in repr(task.get_coro())]
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    with pytest.raises(AibindError, match="not known"):
        await follower
    gated.gate.set()
    assert await combiner.call(3) == 30


def test_a_leader_that_is_interrupted_tells_its_followers_and_hands_on():
    batches = []
    gate = threading.Event()

    def run(items):
        batches.append(list(items))
        if len(batches) == 1:
            gate.wait()
        if len(batches) == 2:
            raise KeyboardInterrupt
        return [item * 10 for item in items]

    combiner = Combiner(run, max_items=100, max_size=100)
    outcomes = {}

    def call(item):
        try:
            outcomes[item] = combiner.call(item)
        except BaseException as error:
            outcomes[item] = error

    threads = [threading.Thread(target=call, args=(item,), daemon=True) for item in range(4)]
    for number, thread in enumerate(threads):
        thread.start()
        while len(combiner._queue) + len(batches) <= number:
            pass
    gate.set()
    for thread in threads:
        thread.join(20)
    assert batches == [[0], [1, 2, 3]]
    assert outcomes[0] == 0
    assert isinstance(outcomes[1], KeyboardInterrupt)
    assert [str(outcomes[item]).endswith("not known if it took effect") for item in (2, 3)] == [True, True]
    assert combiner.call(4) == 40
