"""Sources of durable streams that can be silent, deaf, or watched, and what notes their end."""

from __future__ import annotations

from aibind_postgres._concurrency import AsyncEvent


async def items(items, gate=None):
    for item in items:
        yield item
    if gate is not None:
        await gate.wait()
        yield "and more"


class Silent:
    """A source from which nothing comes until it is closed."""

    def __init__(self):
        self.gate = AsyncEvent()
        self.asked = False
        self.closed = 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        self.asked = True
        await self.gate.wait()
        raise StopAsyncIteration

    def close(self):
        self.closed += 1
        self.gate.set()


class Deaf(Silent):
    """A source that nobody can interrupt, such as a generator that waits in a thread. It says one word before."""

    async def __anext__(self):
        if not self.asked:
            self.asked = True
            return "word"
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except BaseException:
                continue
        raise StopAsyncIteration

    def close(self):
        self.closed += 1
        if not self.gate.is_set():
            raise ValueError("it is running")


class Finish:
    """Notes what `on_finish` is called with."""

    def __init__(self):
        self.calls = []

    async def __call__(self, text, status):
        self.calls.append((text, status))
