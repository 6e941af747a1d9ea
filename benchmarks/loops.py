"""Loops that repeat an operation for some seconds. Start-up ends before the clock starts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random

from .measure import TOKEN, Figures, latencies

# The least number of operations before the clock starts, of each caller and in all. A store opens its connections when
# it needs them, and psycopg prepares a statement on each connection after five uses.
WARM_UP, TOTAL_WARM_UP = 10, 100


class Clock:
    """Measures the time, and the processor time of this process, from `start` on."""

    def start(self) -> None:
        self._started, self._processor_started = time.perf_counter(), time.process_time()

    def figures(self, callers: Sequence[Sequence[float]], units: int = 1) -> Figures:
        """Return the rate, the processor time for each operation, and the latencies.

        Args:
            callers: The durations of the operations of each caller.
            units: The number of units that an operation adds to the rate; 1 by default.
        """
        elapsed = time.perf_counter() - self._started
        processor = time.process_time() - self._processor_started
        durations = [duration for caller in callers for duration in caller]
        rate = len(durations) * units / elapsed
        return {"rate": rate, "processor": processor / len(durations) * 1e6, **latencies(durations)}


def repeat(operation: Callable[[], object], seconds: float, *, units: int = 1, warm_up: int = TOTAL_WARM_UP) -> Figures:
    """Repeat an operation for some seconds, after some repetitions that do not count."""
    for _ in range(warm_up):
        operation()
    clock = Clock()
    clock.start()
    return clock.figures([durations(operation, seconds)], units)


async def async_repeat(
    operation: Callable[[], Awaitable[object]], seconds: float, *, units: int = 1, warm_up: int = TOTAL_WARM_UP
) -> Figures:
    """Do the same as `repeat` in asyncio."""
    for _ in range(warm_up):
        await operation()
    clock = Clock()
    clock.start()
    return clock.figures([await async_durations(operation, seconds)], units)


def alternate(operations: Mapping[str, Callable[[], object]], each: int) -> dict[str, Figures]:
    """Run operations in turn, each of them `each` times. Return the latencies of each.

    The order is random, since an operation may be faster or slower after a certain other one.
    """
    found: dict[str, list[float]] = {name: [] for name in operations}
    random, names = Random(each), list(operations)
    for _ in range(each):
        random.shuffle(names)
        for name in names:
            operation = operations[name]
            before = time.perf_counter()
            operation()
            found[name].append(time.perf_counter() - before)
    return {name: latencies(values) for name, values in found.items()}


def run_threads(streams: Sequence[str], seconds: float, append: Callable[[str, str], object]) -> Figures:
    """Run one thread per stream. Each appends for some seconds and waits for each acknowledgement."""
    clock, warm_up = Clock(), max(WARM_UP, TOTAL_WARM_UP // len(streams))
    begin = threading.Barrier(len(streams), clock.start, timeout=60)

    def work(stream: str) -> list[float]:
        for _ in range(warm_up):
            append(stream, TOKEN)
        begin.wait()
        return durations(partial(append, stream, TOKEN), seconds)

    with ThreadPoolExecutor(len(streams)) as pool:
        return clock.figures(list(pool.map(work, streams)))


async def run_tasks(streams: Sequence[str], seconds: float, append: Callable[[str, str], Awaitable[object]]) -> Figures:
    """Do the same as `run_threads` with one asyncio task per stream."""
    for _ in range(max(WARM_UP, TOTAL_WARM_UP // len(streams))):
        await asyncio.gather(*(append(stream, TOKEN) for stream in streams))
    clock = Clock()
    clock.start()
    callers = (async_durations(partial(append, stream, TOKEN), seconds) for stream in streams)
    return clock.figures(await asyncio.gather(*callers))


def durations(operation: Callable[[], object], seconds: float) -> list[float]:
    """Repeat an operation for some seconds. Return the duration of each repetition."""
    found = []
    before = time.perf_counter()
    end = before + seconds
    while before < end:
        operation()
        after = time.perf_counter()
        found.append(after - before)
        before = after
    return found


async def async_durations(operation: Callable[[], Awaitable[object]], seconds: float) -> list[float]:
    found = []
    before = time.perf_counter()
    end = before + seconds
    while before < end:
        await operation()
        after = time.perf_counter()
        found.append(after - before)
        before = after
    return found
