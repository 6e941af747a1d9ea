"""Many live chats in one process, each with a writer and a reader."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from .measure import Figures, Row, at_most, latencies
from .processes import run_all

if TYPE_CHECKING:
    from .bench import Bench
    from .tables import Tables

TOKENS_PER_SECOND = 30
WARM_UP = TOKENS_PER_SECOND  # tokens of each chat that do not count
TARGETS = {"asyncio": 15, "threads": 60}  # milliseconds


def chats(bench: Bench) -> list[Row]:
    tables, count, seconds = bench.tables("chats"), bench.size.chats, bench.size.live_seconds
    found = bench.run_interleaved(
        {
            "asyncio": lambda: asyncio.run(in_tasks(Chats(count, seconds), tables)),
            "threads": lambda: in_threads(Chats(count, seconds), tables),
        },
        bench.size.long_rounds,
    )
    rows = []
    for flavour, target in TARGETS.items():
        work, figures = f"{count} chats, {TOKENS_PER_SECOND} tokens/s each, {flavour}", found[flavour].figures
        rows += [
            Row(f"{work}: time taken, relative to the ideal", "", figures["pace"], target=at_most(1.1)),
            Row(f"{work}: write to reader, p50", "ms", figures["p50"]),
            Row(f"{work}: write to reader, p99", "ms", figures["p99"], target=at_most(target)),
        ]
    return rows


class Chats:
    """The times at which the tokens are due, and the delays with which the readers got them."""

    def __init__(self, count: int, seconds: int) -> None:
        self.count = count
        self.tokens = WARM_UP + seconds * TOKENS_PER_SECOND
        self._seconds = seconds
        self._delays: list[float] = []

    def start(self) -> None:
        self._begin = time.monotonic() + 1  # by then all readers wait

    def pause(self, chat: int, number: int) -> float:
        """Return the time until a token of a chat is due. The chats are not synchronized, as in reality."""
        due = self._begin + (number + chat / self.count) / TOKENS_PER_SECOND
        return max(0.0, due - time.monotonic())

    def received(self, seq: int, text: str) -> None:
        if seq > WARM_UP:
            self._delays.append(time.monotonic() - float(text))

    def figures(self) -> Figures:
        elapsed = time.monotonic() - self._begin - WARM_UP / TOKENS_PER_SECOND
        expected = self.count * (self.tokens - WARM_UP)
        if len(self._delays) != expected:
            raise RuntimeError(f"readers received {len(self._delays)} of {expected} tokens")
        return {"pace": elapsed / self._seconds, **latencies(self._delays)}


async def in_tasks(chats: Chats, tables: Tables) -> Figures:
    async with tables.async_store() as store:
        streams = [await store.create() for _ in range(chats.count)]

        async def read(stream: str) -> None:
            async for chunk in store.read_from(stream):
                chats.received(chunk.seq, chunk.data)

        async def write(chat: int, stream: str) -> None:
            async with store.writer(stream) as writer:
                for number in range(chats.tokens):
                    await asyncio.sleep(chats.pause(chat, number))
                    await writer.write(str(time.monotonic()))

        chats.start()
        await run_all(*map(read, streams), *(write(chat, stream) for chat, stream in enumerate(streams)))
        return chats.figures()


def in_threads(chats: Chats, tables: Tables) -> Figures:
    """Do the same with two threads for each chat."""
    with tables.store() as store, ThreadPoolExecutor(2 * chats.count) as pool:
        streams = [store.create() for _ in range(chats.count)]

        def read(stream: str) -> None:
            for chunk in store.read_from(stream):
                chats.received(chunk.seq, chunk.data)

        def write(chat: int, stream: str) -> None:
            with store.writer(stream) as writer:
                for number in range(chats.tokens):
                    time.sleep(chats.pause(chat, number))
                    writer.write(str(time.monotonic()))

        chats.start()
        futures = [pool.submit(read, stream) for stream in streams]
        futures += [pool.submit(write, chat, stream) for chat, stream in enumerate(streams)]
        for future in futures:
            future.result()
        return chats.figures()
