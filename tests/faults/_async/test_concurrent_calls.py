"""Concurrent writes, ends and reads of a few streams: the results of all calls must agree with the final rows."""

from __future__ import annotations

import random
from functools import partial

import psycopg
import pytest
from support.checker import KNOWN_ERRORS, Record, check
from support.concurrency import async_gather

from aibind_postgres import AsyncPostgresStreamStore

pytestmark = pytest.mark.timeout(1800)

STREAMS = ["a", "b", "c"]
ENDS = {"stop": "stopped", "complete": "done", "fail": "error"}


class Caller:
    """Makes random calls on all streams, and records each call with its result."""

    def __init__(self, store, other, record, name, seed):
        self.store = store
        self.other = other  # the store for repeated appends
        self.record = record
        self.name = name
        self.random = random.Random(f"{seed}/{name}")
        self.written = 0
        self.seen = dict.fromkeys(STREAMS, 0)

    def new_texts(self, number):
        self.written += number
        return [f"{self.name}/{index}" for index in range(self.written - number, self.written)]

    async def append(self, stream, texts, expected, *, alone, again=False):
        store = self.other if again else self.store
        step = self.record.begin(stream, "append", texts=texts, expected=expected)
        try:
            if alone:
                result = await store.append(stream, texts[0], expected_seq=expected)
            else:
                result = await store.append_many(stream, texts, expected_seq=expected)
        except KNOWN_ERRORS as error:
            result = error
        self.record.end(step, result)
        if isinstance(result, int):
            self.seen[stream] = max(self.seen[stream], result)
        else:
            self.seen[stream] = getattr(result, "actual", self.seen[stream] + 1) - 1

    async def append_and_repeat(self, stream, texts, expected, *, alone):
        """Append twice: one after the other, as after a lost reply, or at once, as when the first attempt hangs."""
        attempt = partial(self.append, stream, texts, expected, alone=alone)
        if self.random.random() < 0.5:
            await async_gather(attempt, partial(attempt, again=True))
        else:
            await attempt()
            await attempt(again=True)

    async def end(self, stream):
        method = self.random.choice(list(ENDS))
        step = self.record.begin(stream, "end", state=ENDS[method])
        reason = ["why"] if method == "fail" else []
        self.record.end(step, await getattr(self.store, method)(stream, *reason))

    async def read(self, stream, after, *, follow):
        step = self.record.begin(stream, "read", after=after, follows=follow)
        chunks = [tuple(chunk) async for chunk in self.store.read_from(stream, after, follow=follow)]
        self.record.end(step, chunks)

    async def act(self, rounds, may_end_after):
        for number in range(rounds):
            stream = self.random.choice(STREAMS)
            choice = self.random.random()
            if choice < 0.3:
                await self.append(stream, self.new_texts(1), None, alone=True)
            elif choice < 0.45:
                await self.append(stream, self.new_texts(self.random.randint(1, 5)), None, alone=False)
            elif choice < 0.65:
                await self.append(stream, self.new_texts(1), self.seen[stream] + 1, alone=True)
            elif choice < 0.8:
                size = self.random.randint(1, 3)
                await self.append_and_repeat(stream, self.new_texts(size), self.seen[stream] + 1, alone=size == 1)
            elif choice < 0.98 or number < may_end_after:
                after = self.random.randint(0, self.seen[stream] + 2)
                await self.read(stream, after, follow=False)
            else:
                await self.end(stream)


@pytest.mark.parametrize("seed", range(5))
async def test_results_of_concurrent_calls_are_consistent(dsn, tables, long, seed):
    callers, rounds = (24, 600) if long else (8, 60)
    record = Record()
    async with (
        AsyncPostgresStreamStore(dsn, **tables) as one,
        AsyncPostgresStreamStore(dsn, **tables) as other,
    ):
        for stream in STREAMS:
            await one.create(stream)
        rng = random.Random(seed)
        stores = [(one, other), (other, one)]
        all_callers = [Caller(*stores[number % 2], record, f"caller {number}", seed) for number in range(callers)]
        following = [
            partial(caller.read, rng.choice(STREAMS), rng.choice([0, 0, 1, 7, 30]), follow=True)
            for caller in all_callers
        ]

        async def act_and_end():
            await async_gather(*(partial(caller.act, rounds, rounds * 2 // 3) for caller in all_callers))
            # Streams that are still active are ended by several callers at once.
            await async_gather(*(partial(caller.end, stream) for caller in all_callers[:4] for stream in STREAMS))

        await async_gather(act_and_end, *following)
        statuses = {stream: await one.get_status(stream) for stream in STREAMS}
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        select = psycopg.sql.SQL("SELECT seq, data FROM {} WHERE id = %s ORDER BY seq").format(tables["chunks_table"])
        for stream in STREAMS:
            stored = await (await connection.execute(select, [stream])).fetchall()
            assert check(record, stream, stored, statuses[stream]) > 0, f"seed {seed}"
    print(f"seed {seed}: {len(record.steps)} calls, {sum(status.total_chunks for status in statuses.values())} chunks")
