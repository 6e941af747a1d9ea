"""Combined calls without a database: leaders, followers, batches and errors."""

from __future__ import annotations

from functools import partial

import pytest
from support.concurrency import AsyncBackground, async_gather, async_until

from aibind_postgres import AibindError
from aibind_postgres._async import combining
from aibind_postgres._async.combining import AsyncCombiner
from aibind_postgres._concurrency import AsyncEvent


class Recorder:
    """A run that records its batches, waits for a gate, and raises for items in `broken`."""

    def __init__(self, queued):
        self.queued = queued
        self.batches = []
        self.gate = AsyncEvent()
        self.gate.set()
        self.broken = {}

    async def run(self, items):
        self.batches.append(list(items))
        await self.gate.wait()
        for item in items:
            if item in self.broken:
                raise self.broken[item]
        return [item * 10 for item in items]

    async def run_alone(self, item):
        [result] = await self.run([item])
        return result


@pytest.fixture
def recorder(queued):
    return Recorder(queued)


@pytest.fixture
def combiner(recorder):
    return AsyncCombiner(recorder.run_alone, recorder.run, max_items=100, max_size=1000)


@pytest.fixture
def no_takeover(monkeypatch):
    """A takeover timeout that a slow machine does not exceed, so that the batches are predictable."""
    monkeypatch.setattr(combining, "TAKEOVER_TIMEOUT", 60)


async def run_together(combiner, recorder, items, sizes=None, errors=False):
    """Start a call with item 0, queue one for each of `items` in order, and return their results."""
    recorder.gate.clear()
    recorder.queued.clear()
    calls = []

    async def queue():
        results = []
        async with AsyncBackground(partial(combiner.call, 0)):
            await async_until(lambda: recorder.batches)
            for index, item in enumerate(items):
                call = AsyncBackground(partial(combiner.call, item, (sizes or {}).get(item, 1)))
                await call.__aenter__()
                calls.append(call)
                await async_until(lambda index=index: len(recorder.queued) == index + 1)
            recorder.gate.set()
            for call in calls:
                try:
                    results.append(await call.result())
                except AibindError as error:
                    if not errors:
                        raise
                    results.append(error)
        return results

    return await queue()


async def assert_idle(combiner, recorder):
    """Check that no call is running or queued: the next one runs at once, and alone."""
    recorder.queued.clear()
    assert await combiner.call(7) == 70
    assert not recorder.queued
    assert recorder.batches[-1] == [7]


async def test_single_call_runs_at_once(combiner, recorder):
    assert await combiner.call(1) == 10
    assert await combiner.call(2) == 20
    assert recorder.batches == [[1], [2]]


@pytest.mark.usefixtures("no_takeover")
async def test_queued_calls_run_together_in_order(combiner, recorder):
    assert await run_together(combiner, recorder, [1, 2, 3]) == [10, 20, 30]
    assert recorder.batches == [[0], [1, 2, 3]]
    assert await combiner.call(4) == 40


@pytest.mark.usefixtures("no_takeover")
async def test_max_items(recorder):
    combiner = AsyncCombiner(recorder.run_alone, recorder.run, max_items=2, max_size=1000)
    assert await run_together(combiner, recorder, [1, 2, 3, 4, 5]) == [10, 20, 30, 40, 50]
    assert recorder.batches == [[0], [1, 2], [3, 4], [5]]


@pytest.mark.usefixtures("no_takeover")
async def test_max_size(recorder):
    combiner = AsyncCombiner(recorder.run_alone, recorder.run, max_items=100, max_size=10)
    sizes = {1: 4, 2: 6, 3: 1, 4: 50, 5: 1}
    assert await run_together(combiner, recorder, [1, 2, 3, 4, 5], sizes) == [10, 20, 30, 40, 50]
    assert recorder.batches == [[0], [1, 2], [3], [4], [5]]


@pytest.mark.usefixtures("no_takeover")
async def test_failed_batch_raises_a_separate_error_in_each_caller(combiner, recorder):
    original = recorder.broken[2] = AibindError("no")
    errors = await run_together(combiner, recorder, [1, 2, 3], errors=True)
    assert [str(error) for error in errors] == ["no"] * 3
    assert len({id(error) for error in [*errors, original]}) == 4
    assert all(error.__cause__ is original for error in errors)
    assert await combiner.call(4) == 40


async def test_failed_single_call_raises_the_original_error(combiner, recorder):
    original = recorder.broken[1] = AibindError("no")
    with pytest.raises(AibindError) as caught:
        await combiner.call(1)
    assert caught.value is original
    assert await combiner.call(2) == 20


@pytest.mark.usefixtures("no_takeover")
async def test_call_waits_for_the_current_run_and_its_own(combiner, recorder):
    calls = []

    async def start(items):
        for item in items:
            call = AsyncBackground(partial(combiner.call, item))
            await call.__aenter__()
            calls.append(call)

    recorder.gate.clear()
    await start([0])
    await async_until(lambda: recorder.batches)
    for number in range(1, 20):
        recorder.queued.clear()
        items = [10 * number + index for index in range(10)]
        await start(items)
        await async_until(lambda: len(recorder.queued) == 10)
        gate, recorder.gate = recorder.gate, AsyncEvent()
        gate.set()
        await async_until(lambda number=number: len(recorder.batches) == number + 1)
        assert sorted(recorder.batches[number]) == items
    recorder.gate.set()
    assert [await call.result() for call in calls] == [0, *range(100, 2000, 10)]


async def test_takeover_of_a_stuck_run(combiner, recorder):
    recorder.gate.clear()
    async with AsyncBackground(partial(combiner.call, 1)) as stuck:
        await async_until(lambda: recorder.batches)
        gate, recorder.gate = recorder.gate, AsyncEvent()
        recorder.gate.set()
        assert await async_gather(*[partial(combiner.call, item) for item in (2, 3, 4)]) == [20, 30, 40]
        assert await combiner.call(5) == 50
        gate.set()
        assert await stuck.result() == 10
    assert await combiner.call(6) == 60
    await assert_idle(combiner, recorder)


async def test_each_of_thousands_of_calls_gets_its_own_result(combiner, recorder):
    async def worker(start):
        return [await combiner.call(number) for number in range(start, start + 100)]

    results = await async_gather(*[partial(worker, start * 100) for start in range(40)])
    assert results == [[number * 10 for number in range(start * 100, start * 100 + 100)] for start in range(40)]
    await assert_idle(combiner, recorder)
