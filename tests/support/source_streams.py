"""Copies sources into durable streams, with threads and with asyncio."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, NamedTuple

from aibind_postgres import AsyncDurableStream, AsyncPostgresStreamStore, DurableStream, PostgresStreamStore
from aibind_postgres.models import StreamStatus

TIMEOUT = 60


class Produced(NamedTuple):
    """A stream that has ended."""

    chunks: list[dict[str, Any]]
    status: StreamStatus

    def of(self, *types: str) -> list[dict[str, Any]]:
        return [chunk for chunk in self.chunks if chunk["type"] in types]

    @property
    def text(self) -> str:
        return "".join([chunk["delta"] for chunk in self.of("text-delta")])

    @property
    def reasoning(self) -> str:
        return "".join([chunk["delta"] for chunk in self.of("reasoning-delta")])

    @property
    def types(self) -> list[str]:
        """The types, without those that equal the one before."""
        types = [chunk["type"] for chunk in self.chunks]
        return [kind for kind, before in zip(types, ["", *types], strict=False) if kind != before]


class Sync:
    """Copies sources with threads."""

    def __init__(self, dsn: str, tables: dict[str, Any]) -> None:
        self.open_store = lambda: PostgresStreamStore(dsn, **tables)

    def produce(self, source: Iterable[Any], *, stop: bool = False) -> Produced:
        """Return the stream when it has ended. `stop`: end it when it has a chunk."""
        with self.open_store() as store:
            stream = DurableStream.start(store, source, wire="ai_sdk", expose_errors=True)
            if stop:
                next(iter(store.read_from(stream.id)))
                stream.stop()
            status = stream.wait(TIMEOUT)
            return Produced([json.loads(chunk.data) for chunk in store.read_from(stream.id)], status)

    def iterate(self, items: list[Any]) -> Iterator[Any]:
        return iter(items)


class Async:
    """Copies sources with asyncio."""

    def __init__(self, dsn: str, tables: dict[str, Any]) -> None:
        self.open_store = lambda: AsyncPostgresStreamStore(dsn, **tables)

    def produce(self, source: AsyncIterable[Any], *, stop: bool = False) -> Produced:
        """Return the stream when it has ended. `stop`: end it when it has a chunk."""

        async def run() -> Produced:
            async with self.open_store() as store:
                stream = await AsyncDurableStream.start(store, source, wire="ai_sdk", expose_errors=True)
                if stop:
                    await anext(aiter(store.read_from(stream.id)))
                    await stream.stop()
                status = await stream.wait(TIMEOUT)
                return Produced([json.loads(chunk.data) async for chunk in store.read_from(stream.id)], status)

        return asyncio.run(run())

    async def iterate(self, items: list[Any]) -> AsyncIterator[Any]:
        for item in items:
            yield item
